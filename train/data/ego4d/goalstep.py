# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ego4D GoalStep (Song et al., NeurIPS 2023): steps of an activity, and substeps of a step, as streaming dialogues.

As in VideoLLM-online's code (LIVE), a video gives one timeline of its steps, and each step with substeps gives one
more of its substeps. Each is a row. The assistant tells a step when it begins. The row's `truth` has the `timeline`,
from which dialogues can be generated.
"""

import ast
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from videollm_mod.train.data.converters import Notes, Video, Videos
from videollm_mod.train.data.dialogues import begins_after, ceil_frame, clip, place_replies, reply_messages, to_text
from videollm_mod.train.data.joining import open_joined
from videollm_mod.train.data.json_streams import TOLERANCE, read_values, take_span, take_text


# The wording is ours.
_STEPS = "I am doing this: {goal}. Tell me each step when it begins."
_SUBSTEPS = "I am at this step: {goal}. Tell me each part of it when it begins."


@dataclass(frozen=True)
class Level:
    """
    How an annotation writes its steps.

    Args:
        name (`str`): What one is called in notes.
        text_key (`str`): Key of the text.
        other_keys (`tuple[str, ...]`): Keys that each should have and that are not used.
    """

    name: str
    text_key: str
    other_keys: tuple[str, ...]


STEP, SUBSTEP = (
    Level(name, "step_description", ("is_continued", "is_procedural", "is_relevant")) for name in ("step", "substep")
)


@dataclass(frozen=True)
class Timeline:
    """
    What happens in a video, or within a step of it.

    Args:
        id (`str`): Id of the row.
        goal (`str`): What the video, or the step, is about.
        steps (`list[tuple[float, float, str]]`): Start and end in seconds, and text, in order of start.
        level ([`Level`]): What its steps are.
    """

    id: str
    goal: str
    steps: list[tuple[float, float, str]]
    level: Level


def read_timelines(entry: Any, notes: Notes) -> Iterator[Timeline]:
    """
    Yield the timelines of a video: first that of its steps, then that of each step with substeps.

    Args:
        entry (`dict`): An element of `videos`.
        notes ([`Notes`]): Where to count the faults of the annotation.
    """
    uid = to_text(entry.get("video_uid")) if isinstance(entry, dict) else None
    if uid is None:
        notes.leave_out("videos", "video_uid", "the entry names no video")
        return
    if "segments" not in entry and "step_segments" in entry:
        notes.leave_out(uid, "step_segments", "a test video: its steps have no times", by_rule=True)
        return
    goal = to_text(entry.get("goal_description"))
    segments = read_segments(entry.get("segments"), STEP, "segments", notes, uid)
    if segments:
        yield Timeline(f"{uid}/steps", goal or "an activity", [step for _, step, _ in segments], STEP)
    else:
        notes.leave_out(uid, "segments", "the video has no steps")
    for field, (start, end, text), segment in segments:
        below = read_segments(segment.get("segments", []), SUBSTEP, f"{field}.segments", notes, uid)
        for place, (first, last, _), _ in below:
            if first < start - TOLERANCE or last > end + TOLERANCE:
                notes.mended(uid, place, "a substep reaches outside its step: kept with its own times")
        if below:
            index = field.removeprefix("segments[").removesuffix("]")
            yield Timeline(f"{uid}/step-{index}", text, [step for _, step, _ in below], SUBSTEP)


def read_segments(
    values: Any, level: Level, field: str, notes: Notes, uid: str
) -> list[tuple[str, tuple[float, float, str], dict[str, Any]]]:
    """Return place, span with text, and entry of each usable segment, in order of start."""
    if not isinstance(values, list):
        notes.leave_out(uid, field, f"the {level.name}s are not a list")
        return []
    found = []
    for index, segment in enumerate(values):
        place = f"{field}[{index}]"
        if not isinstance(segment, dict):
            notes.leave_out(uid, place, f"the {level.name} is not an object")
            continue
        span = take_span(segment, ("start_time", "end_time"), notes, uid, place)
        text = take_text(segment, level.text_key, notes, uid, place)
        if missing := [name for name in level.other_keys if name not in segment]:
            notes.mended(uid, f"{place}.{missing[0]}", f"a {level.name} lacks keys that are not used: kept")
        if span is not None and text is not None:
            found.append((place, (*span, text), segment))
    for (_, before, _), (place, step, _) in pairwise(found):
        if step[0] < before[1]:
            notes.mended(uid, place, f"a {level.name} overlaps the {level.name} before: kept with its own times")
        if step[2].lower() == before[2].lower():
            again = f"a {level.name} has the text of the {level.name} before: told once"
            notes.mended(uid, place, again, by_rule=True)
    ordered = sorted(found, key=lambda item: item[1][0])
    if ordered != found:
        notes.mended(uid, field, f"{level.name}s not in order of time: sorted")
    return ordered


def timeline_row(
    timeline: Timeline, video: Video, *, fps: float, question: str, notes: Notes, where: str
) -> dict[str, Any] | None:
    """
    Return the row of a timeline: the question at the frame of the first start, and each text when its step begins.

    A step that repeats the text of the step before is not told again; capital letters do not count. Steps after the
    end of the video are left out. The row ends with the last step, or with the video. Its `truth` has `goal` and
    `timeline`, a list of `[start, end, text]` in seconds.

    Args:
        timeline ([`Timeline`]): The timeline.
        video ([`Video`]): Its video.
        fps (`float`): Frames per second.
        question (`str`): What the user says.
        notes ([`Notes`]): Where to count.
        where (`str`): The video, for notes.
    """
    last = video.last_frame(fps)
    shown = [step for step in timeline.steps if not begins_after(step[0], last, fps)]
    for _ in range(len(timeline.steps) - len(shown)):
        notes.leave_out(where, timeline.id, f"a {timeline.level.name} after the end of the video")
    told = [(start, as_reply(text)) for start, _, text in tell_once(shown)]
    placed = place_replies(told, last, fps, notes, where, timeline.id)
    if not placed:
        notes.leave_out(where, timeline.id, f"no {timeline.level.name} is left")
        return None
    first, end = placed[0][0], min(max(ceil_frame(end, fps) for _, end, _ in shown), last)
    messages = [{"role": "user", "content": question, "time": first / fps}, *reply_messages(placed, fps)]
    span = clip(first, max(end, placed[-1][0]), fps)
    truth = {
        "goal": timeline.goal,
        "timeline": [[min(start, video.duration), min(end, video.duration), text] for start, end, text in shown],
    }
    return {"id": timeline.id, "truth": truth, "video": str(video.path), **span, "messages": messages}


def tell_once(steps: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Return steps without those that repeat the text of the step before. Capital letters do not count."""
    texts = [None, *(text.lower() for _, _, text in steps)]
    return [step for step, before in zip(steps, texts, strict=False) if step[2].lower() != before]


def as_reply(text: str) -> str:
    """Return a description as a sentence. Only its first letter and its last mark change."""
    text = text.rstrip(" .,")
    return text[:1].upper() + text[1:] + "."


def read_groups(path: Path, notes: Notes) -> dict[str, list[str]]:
    """
    Return the members of each group of `goalstep_video_groups.tsv`.

    A group is a video that was joined from several. Its id is "grp-" with the id of its first member: so it is in all
    33 groups of the published validation file.
    """
    groups = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for index, row in enumerate(csv.DictReader(file, delimiter="\t")):
            try:
                members = ast.literal_eval(row.get("video_group") or "")
            except (ValueError, SyntaxError):
                members = None
            if isinstance(members, list) and members and all(isinstance(member, str) for member in members):
                groups[f"grp-{members[0]}"] = members
            else:
                notes.leave_out(path.name, f"row {index}, video_group", "not a list of videos")
    return groups


def convert_goalstep(
    path: Path, split: str, videos: Videos, notes: Notes, *, fps: float, groups: dict[str, list[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the rows of a file, `goalstep_train.json` or `goalstep_val.json`. One video is in memory at a time.

    The faults of the annotation are counted in all entries, whether or not the video is there.

    Args:
        path (`Path`): The file.
        split (`str`): Its split.
        videos ([`Videos`]): Finds the videos.
        notes ([`Notes`]): Where to count.
        fps (`float`): Frames per second.
        groups (`dict[str, list[str]]`): Members of each group, of which its video is joined.
    """
    count = 0
    for entry in read_values(path, "videos.item"):
        count, notes.split = count + 1, split
        timelines = list(read_timelines(entry, notes))
        if not timelines:
            continue
        uid = timelines[0].id.partition("/")[0]
        video = open_video_or_group(uid, videos, notes, groups, uid)
        for timeline in timelines if video else ():
            question = (_STEPS if timeline.level is STEP else _SUBSTEPS).format(goal=timeline.goal.rstrip(" ."))
            row = timeline_row(timeline, video, fps=fps, question=question, notes=notes, where=uid)
            if row is not None:
                yield split, {"task": "ego4d_goalstep", **row}
    if not count:
        raise ValueError(f"'{path}' has no list `videos` with entries: give a file of GoalStep.")


def open_video_or_group(
    uid: str, videos: Videos, notes: Notes, groups: dict[str, list[str]], where: str
) -> Video | None:
    """
    Return the video of an id, or note why there is none. That of a group is joined from its members.

    Args:
        uid (`str`): Id of a video, or of a group: "grp-" and the id of its first member.
        videos ([`Videos`]): Finds the videos.
        notes ([`Notes`]): Where to count.
        groups (`dict[str, list[str]]`): Members of each group. See [`read_groups`].
        where (`str`): The entry, for notes.
    """
    if uid.startswith("grp-"):
        return open_joined(videos, notes, where, "video_uid", name=uid, members=groups.get(uid, ()))
    return videos.open(notes, where, "video_uid", uid)
