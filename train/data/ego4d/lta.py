# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ego4D's long-term anticipation: after 8 actions, the next 20, as VideoLLM-online asks for them.

The windows, their frames, and the words are those of LIVE's `data/ego4d/lta.py`. The question is in our words.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videollm_mod.train.data.converters import Notes, Video, Videos, read_json
from videollm_mod.train.data.dialogues import begins_after, clamp, clip, round_frame, to_text
from videollm_mod.train.data.json_streams import read_values, take_span, take_time


NUM_OBSERVED, NUM_FUTURE = 8, 20
QUESTION = (
    "The video has {num_frames} frames. After them, predict the next {num_future} actions. Write one action a line, "
    "with a number before it, and nothing else."
)
# LIVE's words for labels that would otherwise have the same word. The spelling "wood'_metal)," is that of Ego4D.
_WORDS = {
    "pot_(planter)": "flowerpot",
    "bat_(sports)": "sport bat",
    "bat_(tool)": "bat",
    "nut_(food)": "nuts",
    "nut_(tool)": "nut",
    "chip_(food)": "snack",
    "chip_(wood'_metal),": "chips",
    "chip_(wood,_metal)": "chip",
}


@dataclass(frozen=True, slots=True)
class Action:
    """
    An annotated action.

    Args:
        index (`int`): Its number in the clip.
        start, end (`float`): Seconds of the video, not of the clip.
        verb, noun (`int`, *optional*): Indices of the taxonomy, or `None` if the file has none, as in the test split.
    """

    index: int
    start: float
    end: float
    verb: int | None
    noun: int | None


@dataclass
class Clip:
    """A clip of a video with its actions."""

    uid: str
    video_uid: str
    actions: list[Action]


def to_words(label: str) -> str:
    """
    Return a label of the taxonomy as LIVE writes it.

    Example:

    ```python
    >>> to_words("turn_on_(switch_on,_start,_light)"), to_words("bat_(sports)")
    ('turn on', 'sport bat')
    ```"""
    return _WORDS.get(label, re.sub("_$", "", label.split("(")[0]).replace("_", " "))


def read_taxonomy(path: Path) -> tuple[list[str], list[str]]:
    """
    Return the words of all verbs and of all nouns, each at the index of its label.

    Raises:
        `ValueError`: If the file is not `fho_lta_taxonomy.json`.
    """
    content = read_json(path)
    lists = [content.get(name) for name in ("verbs", "nouns")] if isinstance(content, dict) else [None]
    if not all(isinstance(words, list) and words and all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError(f"'{path}' must have lists of texts `verbs` and `nouns`: give fho_lta_taxonomy.json.")
    verbs, nouns = ([to_words(word) for word in words] for words in lists)
    return verbs, nouns


def read_clips(path: Path, sizes: tuple[int, int], notes: Notes) -> list[Clip]:
    """
    Return the clips of a file with their actions in order. Entries are read one by one. Actions stay in memory.

    Args:
        path (`Path`): `fho_lta_train.json`, `fho_lta_val.json` or `fho_lta_test_unannotated.json`.
        sizes (`tuple[int, int]`): Number of verbs and of nouns.
        notes ([`Notes`]): Where to count faults.

    Raises:
        `ValueError`: If the file has no list `clips`.
    """
    clips: dict[str, Clip] = {}
    seen: set[tuple[str, int]] = set()
    count = 0
    for index, entry in enumerate(read_values(path, "clips.item")):
        count += 1
        field = f"clips[{index}]"
        uids = [to_text(entry.get(name)) for name in ("clip_uid", "video_uid")] if isinstance(entry, dict) else [None]
        if None in uids:
            notes.leave_out(path.name, field, "the action names no clip or no video")
            continue
        action = _read_action(entry, sizes, notes, uids[0], field)
        if action is not None and (uids[0], action.index) in seen:
            notes.leave_out(uids[0], f"{field}.action_idx", "another action of the clip has this number")
        elif action is not None:
            seen.add((uids[0], action.index))
            clips.setdefault(uids[0], Clip(*uids, [])).actions.append(action)
    if not count:
        raise ValueError(f"'{path}' has no list `clips` with entries: give a file of Ego4D's long-term anticipation.")
    for found in clips.values():
        found.actions.sort(key=lambda action: action.index)
    return list(clips.values())


def _read_action(
    entry: Mapping[str, Any], sizes: tuple[int, int], notes: Notes, uid: str, field: str
) -> Action | None:
    """Return an action with times of the video: its file has times of the clip, and the start of the clip."""
    span = take_span(entry, ("action_clip_start_sec", "action_clip_end_sec"), notes, uid, field)
    begin = take_time(entry, "clip_parent_start_sec", notes, uid, field)
    index = entry.get("action_idx")
    if not isinstance(index, int) or isinstance(index, bool):
        notes.leave_out(uid, f"{field}.action_idx", "the action has no number")
        return None
    if span is None or begin is None:
        return None
    labels = []
    for name, size in zip(("verb_label", "noun_label"), sizes, strict=True):
        label = entry.get(name)
        is_label = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < size
        if label is not None and not is_label:
            notes.leave_out(uid, f"{field}.{name}", "the label is not in the taxonomy")
        labels.append(label if is_label else None)
    return Action(index, begin + span[0], begin + span[1], *labels)


def lta_rows(
    clip_: Clip, video: Video, words: tuple[list[str], list[str]], *, fps: float, is_test: bool, notes: Notes
) -> Iterator[dict[str, Any]]:
    """
    Yield a row for each 8 actions of a clip that 20 follow.

    The row shows the frames from the start of the first to the end of the eighth action, rounded to the grid, both
    included. `truth` has `clip_uid` and `last_visible_action_idx`, and, if the split has labels, lists of 20: `verb`
    and `noun` (words), `verb_label` and `noun_label` (indices of the taxonomy). Rows of the test split have no reply.
    """
    actions, width = clip_.actions, NUM_OBSERVED + NUM_FUTURE
    if len(actions) < width:
        notes.leave_out(clip_.uid, "action_idx", f"a clip with fewer than {width} actions", by_rule=True)
    if any(after.index != before.index + 1 for before, after in zip(actions, actions[1:], strict=False)):
        notes.mended(clip_.uid, "action_idx", "numbers of actions have gaps: kept, in order")
    for begin in range(len(actions) - width + 1):
        seen, future = actions[begin : begin + NUM_OBSERVED], actions[begin + NUM_OBSERVED : begin + width]
        name = f"{clip_.uid}_{seen[-1].index}"
        last = video.last_frame(fps)
        first, end = (round_frame(time, fps) for time in (seen[0].start, seen[-1].end))
        if begins_after(seen[0].start, last, fps):
            notes.leave_out(name, "action_clip_start_sec", "after the end of the video")
            continue
        if end > last:
            notes.mended(name, "action_clip_end_sec", "after the end of the video: cut there")
        first, end = clamp(first, last), clamp(max(first, end), last)
        truth: dict[str, Any] = {"clip_uid": clip_.uid, "last_visible_action_idx": seen[-1].index}
        question = QUESTION.format(num_frames=end - first + 1, num_future=NUM_FUTURE)
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        if not is_test:
            if any(action.verb is None or action.noun is None for action in future):
                notes.leave_out(name, "verb_label", "an action to predict has no label")
                continue
            truth |= _labels(future, words)
            lines = zip(truth["verb"], truth["noun"], strict=True)
            answer = "\n".join(f"{i}. {verb.capitalize()} {noun}." for i, (verb, noun) in enumerate(lines, 1))
            messages.append({"role": "assistant", "content": answer, "time": end / fps})
        row = {"id": name, "task": "ego4d_lta", "truth": truth, "video": str(video.path)}
        yield {**row, **clip(first, end, fps), "messages": messages}


def _labels(actions: list[Action], words: tuple[list[str], list[str]]) -> dict[str, list[Any]]:
    verbs, nouns = [action.verb for action in actions], [action.noun for action in actions]
    return {
        "verb": [words[0][verb] for verb in verbs],
        "noun": [words[1][noun] for noun in nouns],
        "verb_label": verbs,
        "noun_label": nouns,
    }


def convert_lta(
    path: Path, split: str, videos: Videos, notes: Notes, *, fps: float, words: tuple[list[str], list[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file. See [`lta_rows`]."""
    notes.split = split
    for found in read_clips(path, (len(words[0]), len(words[1])), notes):
        notes.split = split
        video = videos.open(notes, found.uid, f"video_uid {found.video_uid}", found.video_uid)
        if video is not None:
            is_test = split == "test"
            yield from ((split, row) for row in lta_rows(found, video, words, fps=fps, is_test=is_test, notes=notes))
