# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What converters share: values of uncertain type, frames on a grid, and the rules by which replies become a dialogue.

The rules are those of VideoLLM-online's code (LIVE). Times become indices of frames, which are integers: sums of
floats would lose a frame now and then.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from videollm_mod.train.data.converters import Notes

# A time that is a millionth of a frame late counts as on time, as in the processor.
_TOUCH = 1e-6


# ------------------------------------------------------------------------------------------------------------- values


def to_number(value: Any) -> float | None:
    """Return a finite number, also from text such as "3.5". Other values, truth values included, give `None`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_text(value: Any) -> str | None:
    """Return text with single spaces. Other values, and text without a character, give `None`."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text or None


def to_flag(value: Any) -> bool | None:
    """Return a truth value, also from 0, 1, "0", "1", "false" or "true". Other values give `None`."""
    known = {"0": False, "false": False, "1": True, "true": True}
    return known.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None


# --------------------------------------------------------------------------------------------------------------- grid


def ceil_frame(seconds: float, fps: float) -> int:
    """Return the index of the first frame at or after a time."""
    return math.ceil(seconds * fps - _TOUCH)


def floor_frame(seconds: float, fps: float) -> int:
    """Return the index of the last frame at or before a time."""
    return math.floor(seconds * fps + _TOUCH)


def round_frame(seconds: float, fps: float) -> int:
    """Return the index of the nearest frame, and of two that are as near the even one, as Python's `round`."""
    return round(seconds * fps)


def last_frame(duration: float, fps: float) -> int:
    """Return the index of the last frame of a video. Frames stand at 0, 1/fps, ..., before the end at `duration`."""
    return max(math.ceil(duration * fps - _TOUCH) - 1, 0)


def begins_after(start: float, last: int, fps: float) -> bool:
    """
    Return whether something begins after the end of a video: more than a frame after its last one.

    What begins in the time of the last frame is shown by this frame, although the grid has none at or after its start.
    """
    return ceil_frame(start, fps) > last + 1


def clamp(frame: int, last: int) -> int:
    """Return the index of a frame within a video of `last + 1` frames."""
    return min(max(frame, 0), last)


def clip(first: int, last: int, fps: float) -> dict[str, float]:
    """Return `start` and `end` of a row that shows the frames `first` to `last`, both included."""
    return {"start": first / fps, "end": last / fps}


# ---------------------------------------------------------------------------------------------------------- dialogues


def as_sentence(text: str) -> str:
    """Return text as LIVE writes labels: a capital first letter, small letters, and a full stop."""
    return text.capitalize() + "."


def question_messages(question: str, answer: str, last: int, fps: float) -> list[dict[str, Any]]:
    """Return a question before the first frame, and its answer at frame `last`."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "time": last / fps},
    ]


def heard_message(text: str, frame: int, fps: float) -> dict[str, Any]:
    """Return what a speaker in the video says, as a message of the user: the model has no ears. The words are ours."""
    return {"role": "user", "content": f'The speaker says: "{text}"', "time": frame / fps}


def place_replies(
    replies: Iterable[tuple[float, str]], last: int, fps: float, notes: "Notes", where: str, field: str
) -> list[tuple[int, str]]:
    """
    Place replies on frames by LIVE's rules: sort them by time, drop a text that equals the one before it, and let the
    later of two replies at one frame replace the earlier.

    A reply after the end comes at the last frame. Replies that follow one at the last frame are left out.

    Args:
        replies (iterable of `tuple[float, str]`): Seconds and cleaned texts.
        last (`int`): Index of the last frame.
        fps (`float`): Frames per second.
        notes ([`Notes`]): Where to count what was left out or mended.
        where, field (`str`): The entry, for notes.

    Returns:
        `list[tuple[int, str]]`: Frames, which rise, and texts.
    """
    replies = list(replies)
    ordered = sorted(replies, key=lambda reply: reply[0])
    if ordered != replies:
        notes.mended(where, field, "not in order of time: sorted")
    placed: list[tuple[int, str]] = []
    for time, text in ordered:
        frame = clamp(ceil_frame(time, fps), last)
        before, said = placed[-1] if placed else (-1, None)
        if before == last:
            notes.leave_out(where, field, "after the reply at the last frame")
        elif text == said:
            notes.leave_out(where, field, "same text as the reply before", by_rule=True)
        elif frame == before:
            notes.leave_out(where, field, "another reply follows at the same frame", by_rule=True)
            placed[-1] = (frame, text)
        else:
            if time * fps > last + 1:
                notes.mended(where, field, "after the end of the video: moved to the last frame")
            placed.append((frame, text))
    return placed


def join_events(
    events: Iterable[tuple[float, str, str]], last: int, fps: float, notes: "Notes", where: str
) -> list[tuple[int, str]]:
    """
    Place what is said of events on frames, in the order given. The texts at one frame are one reply.

    A text that equals the one before it stays, unlike in [`place_replies`]: it tells another event, which the truth
    has too. Only within one reply is a text said once.

    Args:
        events (iterable of `tuple[float, str, str]`): Seconds, text and field of each event.
        last, fps, notes, where: As of [`place_replies`].

    Returns:
        `list[tuple[int, str]]`: Frames, which rise, and texts.
    """
    said: dict[int, list[str]] = {}
    for time, text, field in events:
        frame = clamp(ceil_frame(time, fps), last)
        if frame in said:
            notes.mended(where, field, "is said at the same frame as another: one reply", by_rule=True)
        if text not in said.setdefault(frame, []):
            said[frame].append(text)
    return [(frame, " ".join(said[frame])) for frame in sorted(said)]


def reply_messages(placed: Iterable[tuple[int, str]], fps: float) -> list[dict[str, Any]]:
    """Return replies that [`place_replies`] or [`join_events`] placed, as messages."""
    return [{"role": "assistant", "content": text, "time": frame / fps} for frame, text in placed]
