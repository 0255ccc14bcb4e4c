# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ego4D's natural language queries: say when what a query asks about starts and ends, as VideoLLM-online streams them.

The user asks before the first frame of a clip. The replies are those of LIVE's `data/ego4d/nlq.py`. It merges
overlapping windows of one query but loses the result; here the merged window is used. The data set has windows and no
answers in words, so a row cannot ask later and be answered from memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videollm_mod.train.data.converters import Notes, Video, Videos
from videollm_mod.train.data.dialogues import begins_after, ceil_frame, clamp, clip, to_text
from videollm_mod.train.data.json_streams import TOLERANCE, read_values, take_objects, take_span
from videollm_mod.train.data.moments import ask_for_moment, to_moment_replies


_SPAN = ("video_start_sec", "video_end_sec")


@dataclass
class Query:
    """
    A query about a clip, with all its windows.

    Args:
        id (`str`): Id of the row.
        text (`str`): The query in small letters, as in LIVE.
        clip (`tuple[float, float]`): Start and end of the clip, in seconds of the video.
        windows (`list[tuple[float, float]]`): Windows of the video in seconds, in order and apart from one another.
        places (`list[dict]`): Where the file asks it: `clip_uid`, `annotation_uid` and `query_idx`, as a submission
            names a query, and its own `window`, unless the split has none.
    """

    id: str
    text: str
    clip: tuple[float, float]
    windows: list[tuple[float, float]] = field(default_factory=list)
    places: list[dict[str, Any]] = field(default_factory=list)


def merge_windows(windows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """
    Return windows in order of time, with those that overlap merged.

    Example:

    ```python
    >>> merge_windows([(5.0, 9.0), (1.0, 2.0), (8.0, 12.0)])
    [(1.0, 2.0), (5.0, 12.0)]
    ```"""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(windows):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def read_queries(entry: Any, split: str, notes: Notes) -> tuple[str, list[Query]]:
    """
    Return the id of a video and its queries. Queries with the same text about the same clip are one.

    Args:
        entry (`dict`): An element of `videos`.
        split (`str`): "train", "validation" or "test". Queries of the test split have no windows.
        notes ([`Notes`]): Where to count what is left out or mended.
    """
    uid = to_text(entry.get("video_uid")) if isinstance(entry, dict) else None
    if uid is None:
        notes.leave_out("videos", "video_uid", "the entry names no video")
        return "", []
    queries: dict[tuple[str, str], Query] = {}
    for clip_field, part in take_objects(entry.get("clips"), notes, uid, "clips"):
        clip_uid, span = to_text(part.get("clip_uid")), take_span(part, _SPAN, notes, uid, clip_field)
        if clip_uid is None:
            notes.leave_out(uid, f"{clip_field}.clip_uid", "the clip has no id")
        for place, annotation, asked in _asked(part, clip_field, notes, uid) if clip_uid and span else ():
            text = _read_text(asked, notes, uid, place)
            window = None if split == "test" or text is None else _read_window(asked, span, notes, uid, place)
            if text is None or (window is None and split != "test"):
                continue
            if split == "test" and (clip_uid, text) in queries:
                notes.mended(uid, f"{place}.query", "the clip has this query already: both get the same row")
            name = f"{clip_uid}/query-{sum(key[0] == clip_uid for key in queries)}"
            query = queries.setdefault((clip_uid, text), Query(name, text, span))
            query.windows += [] if window is None else [window]
            index = int(place.rpartition("[")[2].rstrip("]"))
            where = {"clip_uid": clip_uid, "annotation_uid": annotation, "query_idx": index}
            query.places.append(where if window is None else {**where, "window": list(window)})
    found = list(queries.values())
    for query in found:
        merged = merge_windows(query.windows)
        if len(merged) < len(query.windows):
            notes.mended(query.id, "windows", "overlapping windows of one query: merged")
        query.windows = merged
    return uid, found


def _asked(part: dict[str, Any], field: str, notes: Notes, uid: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield place, id of the annotation, and each query of a clip."""
    for place, annotation in take_objects(part.get("annotations"), notes, uid, f"{field}.annotations"):
        queries = take_objects(annotation.get("language_queries"), notes, uid, f"{place}.language_queries")
        yield from ((where, annotation.get("annotation_uid"), asked) for where, asked in queries)


def _read_text(asked: dict[str, Any], notes: Notes, uid: str, field: str) -> str | None:
    text = to_text(asked.get("query"))
    if text is None:
        notes.leave_out(uid, f"{field}.query", "there is no query")
        return None
    if text != asked["query"]:
        notes.mended(uid, f"{field}.query", "spaces around or within the query: removed")
    return text.lower()


def _read_window(
    asked: dict[str, Any], span: tuple[float, float], notes: Notes, uid: str, field: str
) -> tuple[float, float] | None:
    """Return the window of a query, cut to its clip."""
    window = take_span(asked, _SPAN, notes, uid, field)
    if window is None:
        return None
    inside = (max(window[0], span[0]), min(window[1], span[1]))
    if inside[1] <= inside[0]:
        notes.leave_out(uid, field, "the window lies outside its clip")
        return None
    if max(span[0] - window[0], window[1] - span[1]) > TOLERANCE:
        notes.mended(uid, field, "the window reaches outside its clip: cut")
    return inside


def nlq_row(query: Query, video: Video, *, fps: float, split: str, notes: Notes) -> dict[str, Any] | None:
    """
    Return the row of a query, or `None` if none of its windows has a frame.

    Starts and ends are ceiled to the grid, as in LIVE. A row of training ends with its last reply, as in LIVE. Other
    rows show the complete clip, because an earlier end would tell where the window is. `truth` has `query`, `windows`
    and `clip`, in seconds of the video, and `places` (see [`Query`]). Rows of the test split have no window and no
    reply.
    """
    last = video.last_frame(fps)
    first, end = ceil_frame(query.clip[0], fps), ceil_frame(query.clip[1], fps)
    if begins_after(query.clip[0], last, fps):
        notes.leave_out(query.id, "clips.video_start_sec", "after the end of the video")
        return None
    if end > last + 1:
        notes.mended(query.id, "clips.video_end_sec", "after the end of the video: cut there")
    first, end = clamp(first, last), clamp(end, last)
    windows = [window for window in query.windows if not begins_after(window[0], last, fps)]
    for _ in range(len(query.windows) - len(windows)):
        notes.leave_out(query.id, "windows", "a window after the end of the video")
    messages = to_moment_replies(query.text, windows, fps=fps, first=first, last=end)
    if not messages and split != "test":
        # The reason of a query's only window is the reason of the query.
        if windows or len(query.windows) > 1:
            notes.leave_out(query.id, "windows", "no window is left")
        return None
    truth = {"query": query.text, "windows": [list(window) for window in windows], "clip": list(query.clip)}
    truth["places"] = query.places
    row = {"id": query.id, "task": "ego4d_nlq", "truth": truth, "video": str(video.path)}
    span = clip(first, round(messages[-1]["time"] * fps) if split == "train" else end, fps)
    question = {"role": "user", "content": ask_for_moment(query.text, query.id)}
    return {**row, **span, "messages": [question, *messages]}


def convert_nlq(
    path: Path, split: str, videos: Videos, notes: Notes, *, fps: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield the rows of a file, `nlq_train.json`, `nlq_val.json` or `nlq_test_unannotated.json`. See [`nlq_row`].

    Raises:
        `ValueError`: If the file has no list `videos`.
    """
    count = 0
    for entry in read_values(path, "videos.item"):
        count, notes.split = count + 1, split
        uid, queries = read_queries(entry, split, notes)
        named = str(entry.get("split", "")).removesuffix("_unannotated") if uid else ""
        if named in _SPLITS and _SPLITS[named] != split:
            notes.leave_out(uid, "split", "a video of another split")
            continue
        video = videos.open(notes, uid, "video_uid", uid) if queries else None
        for query in queries if video else ():
            row = nlq_row(query, video, fps=fps, split=split, notes=notes)
            if row is not None:
                yield split, row
    if not count:
        raise ValueError(f"'{path}' has no list `videos` with entries: give a file of Ego4D's NLQ.")


_SPLITS = {"train": "train", "val": "validation", "test": "test"}
