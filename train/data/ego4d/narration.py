# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ego4D's narrations, as VideoLLM-online streams them: one dialogue for each pass of an annotator over a video.

Both published files are read, one video at a time: `all_narrations_redacted.json`, which VideoLLM-online's code (LIVE)
reads, and `narration.json`. The rules are those of LIVE's `data/ego4d/narration.py`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videollm_mod.train.data.converters import Notes, Video, Videos
from videollm_mod.train.data.dialogues import clip, place_replies, reply_messages
from videollm_mod.train.data.json_streams import read_keys, read_pairs, read_values, take_objects, take_time


# The wording is ours. It asks what LIVE's instruction asks.
SEVERAL_PASSES = "several annotators: their passes stay apart"
INSTRUCTION = (
    "Narrate the video in real time, in short sentences. Call the person who wears the camera 'C', and other people "
    "by other letters, such as 'X'."
)
# LIVE's benchmarks, whose videos are not trained on, and where their files list the videos.
BENCHMARKS = {
    "goalstep": "videos",
    "fho_lta": "clips",
    "nlq": "videos",
    "moments": "videos",
    "av": "videos",
    "fho_oscc-pnr": "clips",
    "fho_sta": "annotations",
    "vq": "videos",
}
# GoalStep's repository has other names than the files of the Ego4D command.
_OTHER_NAMES = {"goalstep_val": "goalstep_valid", "goalstep_test_unannotated": "goalstep_test"}
_TAGS = re.compile("#C|#c|@c|#O|#o|#Unsure|#unsure|#")
_OF_OTHERS = re.compile(r"\s*#\s*[Oo](?![a-z])")


def clean_narration(text: str) -> str:
    """
    Return a narration as LIVE writes it: without tags, with a capital first letter and one full stop.

    Example:

    ```python
    >>> clean_narration("#C C  opens the drawer ,")
    'C opens the drawer.'
    ```"""
    words = (_TAGS.sub("", text).strip(".,\n ") + ".").split()
    return " ".join([words[0].capitalize(), *words[1:]])


def is_of_others(text: str) -> bool:
    """Return whether a narration is about another person: "#O A man X walks"."""
    return bool(_OF_OTHERS.match(text))


def read_videos(path: Path) -> Iterator[tuple[str, Any]]:
    """
    Yield the id and the entry of each video. What the file contains tells which of the two files it is.

    Raises:
        `ValueError`: If it is neither.
    """
    for place, key in read_keys(path):
        if (place, key) == ("", "videos"):
            return read_pairs(path, "videos")
        if key.startswith("narration_pass_") and place.count(".") == 0 and place:
            return read_pairs(path, "")
    raise ValueError(
        f"'{path}' has neither `videos`, as all_narrations_redacted.json, nor `narration_pass_1`, as narration.json."
    )


def split_passes(entry: Any, notes: Notes, where: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return the narrations of each annotator's pass over a video, each with its place in the entry."""
    if not isinstance(entry, dict):
        notes.leave_out(where, "", "the entry of the video is not an object")
        return {}
    if "narrations" in entry:
        return _by_annotator(entry["narrations"], notes, where)
    passes = {}
    for name, content in entry.items():
        if not name.startswith("narration_pass_"):
            continue
        found = content.get("narrations") if isinstance(content, dict) else None
        if not isinstance(found, list):
            notes.leave_out(where, f"{name}.narrations", "the pass has no list of narrations")
            continue
        passes[name] = list(take_objects(found, notes, where, f"{name}.narrations"))
    if not passes:
        notes.leave_out(where, "", "the video has no narrations")
    return passes


def _by_annotator(narrations: Any, notes: Notes, where: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    passes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for field, narration in take_objects(
        narrations if isinstance(narrations, list) else [], notes, where, "narrations"
    ):
        name = narration.get("_annotation_uid")
        if isinstance(name, str) and name:
            passes.setdefault(name, []).append((field, narration))
        else:
            notes.leave_out(where, f"{field}._annotation_uid", "the narration belongs to no pass")
    if not passes:
        notes.leave_out(where, "narrations", "the video has no narrations")
    return passes


def clean_pass(
    narrations: list[tuple[str, dict[str, Any]]], *, wearer_only: bool, notes: Notes, where: str
) -> list[tuple[float, str]]:
    """
    Return time and cleaned text of the narrations of a pass that are kept: those with a time and two words.

    Args:
        narrations (`list`): Narrations with their places, in either layout.
        wearer_only (`bool`): Whether to leave out what other people do.
        notes ([`Notes`]): Where to count what is left out.
        where (`str`): The video and pass, for notes.
    """
    kept = []
    for field, narration in narrations:
        in_file = "timestamp_sec" in narration or "narration_text" in narration
        time_key, text_key = ("timestamp_sec", "narration_text") if in_file else ("time", "text")
        text = narration.get(text_key)
        if not isinstance(text, str):
            notes.leave_out(where, f"{field}.{text_key}", "there is no text")
            continue
        if wearer_only and is_of_others(text):
            notes.leave_out(where, f"{field}.{text_key}", "it tells what another person does", by_rule=True)
            continue
        cleaned = clean_narration(text)
        if len(cleaned.split()) < 2:
            notes.leave_out(where, f"{field}.{text_key}", "fewer than two words", by_rule=True)
            continue
        time = take_time(narration, time_key, notes, where, field)
        if time is None:
            continue
        if time < 0:
            notes.mended(where, f"{field}.{time_key}", "before the start of the video: moved to the first frame")
        kept.append((time, cleaned))
    return kept


def narration_row(
    replies: list[tuple[float, str]], video: Video, *, fps: float, instruction: str, notes: Notes, where: str
) -> dict[str, Any] | None:
    """
    Return video, start, end and messages of a streaming narration, or `None` if no reply is left.

    The row begins with the frame of the first reply and ends with the frame of the last. The instruction follows the
    first frame, as in LIVE.

    Args:
        replies (`list[tuple[float, str]]`): Seconds and texts.
        video ([`Video`]): The video.
        fps (`float`): Frames per second.
        instruction (`str`): What the user says.
        notes ([`Notes`]): Where to count.
        where (`str`): The dialogue, for notes.
    """
    placed = place_replies(replies, video.last_frame(fps), fps, notes, where, "narrations")
    if not placed:
        notes.leave_out(where, "narrations", "no narration is left", by_rule=True)
        return None
    (first, _), (last, _) = placed[0], placed[-1]
    messages = [{"role": "user", "content": instruction, "time": first / fps}, *reply_messages(placed, fps)]
    return {"video": str(video.path), **clip(first, last, fps), "messages": messages}


def read_splits(folder: Path) -> dict[str, str]:
    """
    Return "validation" or "test" for each video that a benchmark of Ego4D evaluates on, by LIVE's rule.

    The validation split is the union of the `video_uid`s of all benchmarks' validation files, and the test split that
    of their test files without the former. All other videos are for training.

    Args:
        folder (`Path`): Folder with `<benchmark>_val.json` and `<benchmark>_test_unannotated.json` of all benchmarks.

    Raises:
        `FileNotFoundError`: If files are missing. The message names them.
        `ValueError`: If a file lists no video.
    """
    paths = {(name, end): _benchmark_file(folder, f"{name}_{end}") for end in _ENDS for name in BENCHMARKS}
    if missing := [f"{name}_{end}.json" for (name, end), path in paths.items() if path is None]:
        raise FileNotFoundError(
            f"The folder '{folder}' lacks {len(missing)} of {len(paths)} files: {', '.join(missing)}."
        )
    splits: dict[str, str] = {}
    for (name, end), path in paths.items():
        found = {uid for uid in read_values(path, f"{BENCHMARKS[name]}.item.video_uid") if isinstance(uid, str)}
        splits = {**dict.fromkeys(found, _ENDS[end]), **splits}
        if not found:
            raise ValueError(f"'{path}' lists no `{BENCHMARKS[name]}` with `video_uid`.")
    return splits


# Validation files come first: a video of both splits is for validation.
_ENDS = {"val": "validation", "test_unannotated": "test"}


def _benchmark_file(folder: Path, name: str) -> Path | None:
    paths = [folder / f"{stem}.json" for stem in (name, _OTHER_NAMES.get(name, name))]
    return next((path for path in paths if path.is_file()), None)


def convert_narrations(
    path: Path,
    videos: Videos,
    notes: Notes,
    *,
    fps: float,
    wearer_only: bool,
    splits: dict[str, str],
    wanted: str | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the rows of all narrations with their split. One video is in memory at a time.

    Their `task` is "ego4d_narration", and `truth` is empty: the replies are the truth. `id` is "<video>/<pass>".
    """
    for uid, entry in read_videos(path):
        split = splits.get(uid, "train")
        if wanted not in (None, split):
            notes.split = wanted
            notes.leave_out(uid, "", "of another split", by_rule=True)
            continue
        notes.split = split
        video = videos.open(notes, uid, "", uid)
        passes = split_passes(entry, notes, uid) if video else {}
        if len(passes) > 1:
            notes.mended(uid, "", SEVERAL_PASSES, by_rule=True)
        for name, narrations in passes.items():
            where = f"{uid}/{name}"
            replies = clean_pass(narrations, wearer_only=wearer_only, notes=notes, where=where)
            row = narration_row(replies, video, fps=fps, instruction=INSTRUCTION, notes=notes, where=where)
            if row is not None:
                yield split, {"id": where, "task": "ego4d_narration", "truth": {}, **row}
