# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Moments in a stream: a query comes before the video, and the assistant says when the moment starts and ends.

The replies have the form of VideoLLM-online's code for Ego4D NLQ (data/ego4d/nlq.py). The questions are ours.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

from videollm_mod.train.data.dialogues import ceil_frame


STARTS = 'The video related to the query "{}" starts.'
ENDS = 'The video related to the query "{}" ends.'
QUESTIONS = (
    'Tell me when the video shows "{}", and when it no longer does.',
    'When does "{}" start and end?',
    'Watch for "{}". Say when it starts and when it ends.',
    'Please point out each part of the video that matches "{}".',
    'Which parts of the video show "{}"?',
)
_SAID = re.compile(r"\b(starts?|ends?)\W*$", re.IGNORECASE)


def ask_for_moment(query: str, key: str) -> str:
    """Return a question for a query. The wording depends on `key` only, the id of the row."""
    return QUESTIONS[crc32(key.encode()) % len(QUESTIONS)].format(query)


def to_moment_replies(
    query: str, windows: Iterable[Sequence[float]], *, fps: float, first: int = 0, last: int
) -> list[dict[str, Any]]:
    """
    Return the replies that say when a moment starts and ends.

    A reply comes at the first frame that is not before its time. Windows that touch on this grid become one, because a
    frame has room for one reply. A window within one frame ends at the next frame.

    Args:
        query (`str`): The query.
        windows (iterable of two `float`): Starts and ends in seconds of the video, in any order.
        fps (`float`): Frames per second.
        first (`int`, *optional*, defaults to 0): Index of the first frame of the row.
        last (`int`): Index of the last frame of the row.

    Returns:
        `list[dict]`: Messages in order of time. There are none if the row has a single frame.

    Example: `to_moment_replies("he sings", [(1.2, 3.0)], fps=2, last=20)` has replies at 1.5 s and 3.0 s.
    """
    merged: list[list[int]] = []
    for start, end in sorted(windows) if first < last else ():
        opens = min(max(ceil_frame(start, fps), first), last - 1)
        closes = min(max(ceil_frame(end, fps), opens + 1), last)
        if merged and opens <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], closes)
        else:
            merged.append([opens, closes])
    return [
        {"role": "assistant", "content": text.format(query), "time": frame / fps}
        for window in merged
        for text, frame in zip((STARTS, ENDS), window, strict=True)
    ]


def spoken_windows(replies: Iterable[tuple[float, str, float]], end: float) -> list[dict[str, float]]:
    """
    Return the windows that a model spoke, best first.

    A reply that ends in "starts" opens a window, and the next that ends in "ends" closes it. A second "starts" does
    not move the start. An "ends" without a start counts for nothing. The end of the video closes an open window.

    Args:
        replies (iterable of `(float, str, float)`): Time in seconds, text and score of each reply, in order of time.
            The score is how sure the model was to speak, such as `1 - event.interval_probability`.
        end (`float`): End of the video in seconds.

    Returns:
        `list[dict]`: `start` and `end` in seconds, and `score`, the one of the reply that opened the window. The order
        is that of scores, and of time where scores are equal.
    """
    windows: list[dict[str, float]] = []
    is_open = False
    for time, text, score in replies:
        said = _SAID.search(text)
        if said is None:
            continue
        if said[1].lower().startswith("start"):
            if not is_open:
                windows.append({"start": time, "end": end, "score": score})
            is_open = True
        elif is_open:
            windows[-1]["end"] = time
            is_open = False
    return sorted(windows, key=lambda window: -window["score"])


def window_iou(one: Mapping[str, Any], two: Mapping[str, Any]) -> float:
    """Return the intersection over the union of two windows with `start` and `end` in seconds."""
    shared = max(min(one["end"], two["end"]) - max(one["start"], two["start"]), 0.0)
    union = one["end"] - one["start"] + two["end"] - two["start"] - shared
    return shared / union if union > 0 else 0.0
