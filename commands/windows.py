# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ask yes/no questions about each few seconds of a video, and remember nothing of what came before."""

import time as clock
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from videollm_mod.checks_videollm_mod import check_number, check_text
from videollm_mod.commands.watching import CtrlC


# Frames of a video are rounded: one may come this many seconds before its window.
_EARLY = 1e-6


@dataclass(frozen=True)
class Window:
    """A few seconds of a video, and the probability of yes for each question."""

    start: float
    end: float
    probabilities: list[float]


class WindowedSession:
    """
    Sees a video in windows, and asks questions at the end of each.

    Each window is seen by a new copy of the session, so a frame never answers for a later window.

    Args:
        session ([`StreamingSession`]): A session that has seen nothing, and that does not speak.
        seconds (`float`): Length of a window.
        questions (`Sequence[str]`): What to ask; see [`to_question`].

    Attributes:
        time (`float`, *optional*): Time of the last frame seen, in seconds.
        fps (`float`): Frames per second that it is shown. Set it if they become fewer.
        num_frames, num_dropped (`int`): Number of frames seen, and dropped because they came too fast.
        num_reused (`int`): Number of frames that reused the features of the frame before.
        frame_latency (`float`, *optional*): Seconds that the last push took, with as large a share of a window's
            questions as its frames have of the window. `None` before the first question.

    Raises:
        `ValueError`: If the session remembers fewer frames than a window has.
    """

    def __init__(self, session: Any, seconds: float, questions: Sequence[str]) -> None:
        count = seconds * session.fps
        if session.max_frames is not None and count > session.max_frames:
            raise ValueError(
                f"{seconds:g} s at {session.fps:g} fps are {count:.0f} frames, and the model remembers "
                f"{session.max_frames}: choose a shorter window or a lower --fps."
            )
        self.session, self.seconds, self.questions = session, seconds, list(questions)
        self.model, self.chunk_frames, self.fps = session.model, session.chunk_frames, session.fps
        self.time: float | None = None
        self.frame_latency: float | None = None
        self.num_frames = self.num_dropped = self.num_reused = 0
        self._asking: float | None = None
        self._current: Any = None
        self._number = 0

    def count_dropped(self) -> None:
        """Count a frame that was dropped unseen."""
        self.num_dropped += 1

    def push(self, frames: Sequence[tuple[float, Any]]) -> Iterator[Window]:
        """See frames, as pairs of time and frame, and yield each window that ends with them."""
        seeing = 0.0
        for number, group in groupby(frames, key=lambda pair: int((pair[0] + _EARLY) // self.seconds)):
            if self._current is not None and number != self._number:
                yield self._ask()
            if self._current is None:
                self._current, self._number = self.session.fork(), number
                # The features of a still picture hold for the next window too.
                self._current.reuse = self.session.reuse
            times, pictures = zip(*group, strict=True)
            began, num_reused = clock.perf_counter(), self._current.num_reused
            self._current.push(list(pictures), time=times)
            seeing += clock.perf_counter() - began
            self.num_reused += self._current.num_reused - num_reused
            self.time, self.num_frames = times[-1], self.num_frames + len(times)
            # A live source must not wait for the next frame to know that this one was the window's last.
            if self.time + 1 / self.fps >= (number + 1) * self.seconds - _EARLY:
                yield self._ask()
        if self._asking is not None:
            self.frame_latency = seeing + self._asking * len(frames) / (self.seconds * self.fps)

    def end(self) -> Iterator[Window]:
        """Yield the last window, if the video ended within it."""
        if self._current is not None:
            yield self._ask(at_end=True)

    def _ask(self, *, at_end: bool = False) -> Window:
        current, self._current = self._current, None
        start, end = self._number * self.seconds, (self._number + 1) * self.seconds
        end = min(end, self.time + 1 / self.fps) if at_end else end
        began = clock.perf_counter()
        probabilities = [current.probe(question) for question in self.questions]
        self._asking = clock.perf_counter() - began
        return Window(start, end, probabilities)


def see_windows(
    session: WindowedSession, frames: Iterator[list[tuple[float, Any]]], ctrl_c: CtrlC
) -> Iterator[Window]:
    """Yield the windows of frames as [`read_frames`] yields them, also the last one of a source that breaks off."""
    failure = None
    with closing(frames) as ahead:
        try:
            for waiting in ahead:
                yield from session.push(waiting)
                # A library may have swallowed the exception.
                if ctrl_c.is_pressed:
                    raise KeyboardInterrupt
        except ValueError as error:
            failure = error
    yield from session.end()
    if failure is not None:
        raise failure


def _never(_: Any) -> bool:
    return False


# Options of a session that says nothing unless it is asked. Each copy of a session would compile its own steps.
ASKED_ONLY = {"speak": _never, "compile": False}


def to_question(what: str) -> str:
    """
    Return the question about what to look for. A text that ends with a question mark is a question already.

    ```python
    >>> to_question("a red car")
    'Do you see a red car? Answer yes or no.'
    >>> to_question("Is the door open?")
    'Is the door open? Answer yes or no.'
    ```"""
    what = check_text("What to look for", what).strip()
    if not what:
        raise ValueError('What to look for is empty: name it, for example "a red car".')
    return f"{what if what.endswith('?') else f'Do you see {what}?'} Answer yes or no."


def check_window(option: str, seconds: float, fps: float) -> None:
    """Raise `ValueError` if a window of so many seconds is shorter than a frame, or no positive number."""
    seconds = check_number(option, seconds, above=0, unit=" of seconds")
    if seconds * fps < 1:
        least = f"at --fps {fps:g} choose at least {1 / fps:g}"
        raise ValueError(f"{option} {seconds:g} is shorter than a frame: {least}.")


__all__ = ["ASKED_ONLY", "Window", "WindowedSession", "check_window", "see_windows", "to_question"]
