# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What VideoLLM-online's authors made from Ego4D: narrations that a language model refined, and dialogues about GoalStep.

Both are files of their Hub data set. The layouts are those that their code (LIVE) reads and writes:

- `refined_narration_stream_<split>.json`: `{video: {pass: [{"time": seconds, "text": "You look around."}]}}`
- `goalstep_livechat_trainval_filtered_21k.json`: `[{"video_uid", "conversation": [{"role", "content", "time"}]}]`
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videollm_mod.train.data.converters import Notes, Video, Videos
from videollm_mod.train.data.dialogues import ceil_frame, clip, floor_frame, to_text
from videollm_mod.train.data.ego4d.goalstep import open_video_or_group
from videollm_mod.train.data.ego4d.narration import narration_row
from videollm_mod.train.data.json_streams import read_pairs, read_values, take_text, take_time


# The wording is ours. It asks what LIVE's ten instructions ask.
INSTRUCTION = "Tell me in real time what I am doing, in short sentences."
# The most frames before the first question of a dialogue, as in LIVE.
MOST_WAITING = 20
Message = tuple[int, str, str]


def convert_refined(
    path: Path, split: str, videos: Videos, notes: Notes, *, fps: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the rows of refined narrations, one for each pass over a video. Texts stay as they are.

    Raises:
        `ValueError`: If the file has no entries.
    """
    is_empty = True
    for uid, passes in read_pairs(path, ""):
        is_empty, notes.split = False, split
        if not isinstance(passes, dict):
            notes.leave_out(uid, "", "the entry of the video is not an object")
            continue
        video = videos.open(notes, uid, "", uid)
        for name, narrations in passes.items() if video else ():
            where = f"{uid}/{name}/refined"
            replies = _read_replies(narrations, notes, where)
            row = narration_row(replies, video, fps=fps, instruction=INSTRUCTION, notes=notes, where=where)
            if row is not None:
                yield split, {"id": where, "task": "ego4d_refined", "truth": {}, **row}
    if is_empty:
        raise ValueError(f"'{path}' has no entries: give refined_narration_stream_<split>.json.")


def _read_replies(narrations: Any, notes: Notes, where: str) -> list[tuple[float, str]]:
    replies = []
    for index, narration in enumerate(narrations if isinstance(narrations, list) else [None]):
        if not isinstance(narration, dict):
            notes.leave_out(where, f"[{index}]", "the narration is not an object")
            continue
        text = take_text(narration, "text", notes, where, f"[{index}]")
        time = take_time(narration, "time", notes, where, f"[{index}]") if text else None
        if time is not None:
            replies.append((time, text))
    return replies


def convert_livechat(
    path: Path, split: str, videos: Videos, notes: Notes, *, fps: float, groups: dict[str, list[str]] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the rows of dialogues. One dialogue is in memory at a time. The video of a group of `groups` is joined.

    Raises:
        `ValueError`: If the file is not a list with entries.
    """
    is_empty = True
    for index, entry in enumerate(read_values(path, "item")):
        is_empty, notes.split = False, split
        uid = to_text(entry.get("video_uid")) if isinstance(entry, dict) else None
        if uid is None:
            notes.leave_out(path.name, f"[{index}].video_uid", "the entry names no video")
            continue
        where = f"{uid}/dialogue-{index}"
        video = open_video_or_group(uid, videos, notes, groups or {}, where)
        row = None if video is None else livechat_row(entry, video, fps=fps, notes=notes, where=where)
        if row is not None:
            yield split, {"id": where, "task": "ego4d_livechat", "truth": {}, **row}
    if is_empty:
        raise ValueError(f"'{path}' is not a list with entries: give goalstep_livechat_trainval_filtered_21k.json.")


def livechat_row(
    entry: dict[str, Any], video: Video, *, fps: float, notes: Notes, where: str
) -> dict[str, Any] | None:
    """
    Return the row of a dialogue by the rules of LIVE's `data/ego4d/livechat.py`, or `None` if it has no reply.

    The first message must be the user's. Times of questions are floored to the grid, those of replies ceiled. A
    message that goes back in time, or that lies after the end of the video, ends the dialogue. 1 to 20 frames come
    before the first question, as many as the id of the row says. LIVE takes 0 to 20 at random.

    LIVE drops a reply at the frame of the message before if their exact times differ. Here it replaces an earlier
    reply, or answers the question.
    """
    messages = _place_messages(entry.get("conversation"), video.last_frame(fps), fps, notes, where)
    if not any(role == "assistant" for _, role, _ in messages):
        notes.leave_out(where, "conversation", "no reply is left")
        return None
    asked = messages[0][0]
    first = max(asked - zlib.crc32(where.encode()) % MOST_WAITING, 0)
    rows = [{"role": role, "content": text, "time": frame / fps} for frame, role, text in messages]
    return {"video": str(video.path), **clip(first, messages[-1][0], fps), "messages": rows}


def _place_messages(messages: Any, last: int, fps: float, notes: Notes, where: str) -> list[Message]:
    """Return frame, role and text of each message of a dialogue that is kept."""
    placed: list[Message] = []
    before = 0.0
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        field = f"conversation[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant"):
            notes.leave_out(where, field, "neither a question nor a reply")
            continue
        text, time = (
            take_text(message, "content", notes, where, field),
            take_time(message, "time", notes, where, field),
        )
        if text is None or time is None:
            continue
        reason = _reason_to_end(role, time, before, last / fps, placed)
        if reason is not None:
            notes.leave_out(where, field, reason)
            break
        before = time
        _add_message(placed, (floor_frame if role == "user" else ceil_frame)(time, fps), role, text, last)
    return placed


def _reason_to_end(role: str, time: float, before: float, end: float, placed: list[Message]) -> str | None:
    """Return why a dialogue ends before a message, or `None` if it goes on."""
    if not placed and (role != "user" or time <= 0):
        return "the dialogue does not begin with a question after second 0"
    if time > end:
        return "after the end of the video: the dialogue ends"
    if time < before:
        return "before the message before: the dialogue ends"
    if placed and role == "user" and time == before:
        return "a question at the time of the message before: the dialogue ends"
    return None


def _add_message(placed: list[Message], frame: int, role: str, text: str, last: int) -> None:
    frame = min(max(frame, placed[-1][0] if placed else 0), last)
    if placed and role == "assistant" and placed[-1][:2] == (frame, role):
        placed.pop()
    placed.append((frame, role, text))
