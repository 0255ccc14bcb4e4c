# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Read ahead in a thread, so that a video is decoded while the model works, and sample a live source by the clock."""

import math
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .checks_videollm_mod import check_count, check_number


# What to do with items of a live source that come too fast, and how many may wait by default.
WHEN_BEHIND = {"catch_up": 512, "drop_oldest": 16, "block": 16}
# A frame may take this share of the time until the next one. The rest is for replies.
_SHARE = 0.8
# Frames in a row that take longer than the time until the next one, before [`sample_every`] says so.
_LATE = 3

logger = logging.get_logger(__name__)


class TooManyWaitingError(Exception):
    """A source is faster than the model, and as many frames wait as may."""


def read_ahead(
    items: Iterator[Any],
    most: int,
    *,
    is_live: bool = True,
    goes_on: bool = False,
    when_behind: str | None = None,
    max_waiting: int | None = None,
    on_drop: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> Iterator[list[Any]]:
    """
    Read items in a thread, so that a video is decoded while the model works, and yield them in lists.

    Args:
        items (`Iterator`): What to read. An error that it raises comes after the items before it.
        most (`int`): Most items in a list.
        is_live (`bool`, *optional*, defaults to `True`): Whether to yield items as soon as there are any. Otherwise
            lists are full, which takes fewer steps, and the source always waits.
        goes_on (`bool`, *optional*, defaults to `False`): Whether the source goes on when nothing reads it.
        when_behind, max_waiting (*optional*): See `narrate`. The defaults follow `goes_on`.
        on_drop (`Callable`, *optional*): Called in the reading thread for each dropped item.
        stop (`threading.Event`, *optional*): Set when this iterator is closed; give it to [`read_video`] too.
    """
    when_behind = when_behind or ("drop_oldest" if goes_on else "block")
    check_when_behind(when_behind)
    max_waiting = check_count("max_waiting", WHEN_BEHIND[when_behind] if max_waiting is None else max_waiting)
    when_behind, max_waiting = (when_behind, max_waiting) if is_live else ("block", most)
    reader = _Reader(items, when_behind, max_waiting, on_drop, threading.Event() if stop is None else stop)
    try:
        while some := reader.take(1 if is_live else most, most):
            yield some
    finally:
        reader.stop()


def keep_up(
    ahead: Iterator[list[tuple[float, Any]]], session: Any, *, fps: float, on_slow: Callable[[float, float], None]
) -> Iterator[list[tuple[float, Any]]]:
    """
    Thin a live source to the largest of `fps`, `fps / 2`, `fps / 4`, ... that a session keeps up with.

    The caller pushes each list before it asks for the next. All frames are watched until two lists have shown how long
    a frame takes without a reply. The first list does not count, because it may be slow. Neither does a list with
    frames that reuse features, nor one before which `frame_latency` of the session is `None`.

    Args:
        ahead (`Iterator`): Lists of times and frames at `fps`, from [`read_ahead`].
        session ([`StreamingSession`]): Where the frames are pushed.
        fps (`float`): The rate of the source.
        on_slow (`Callable`): Called with the new rate and the seconds of a frame, if the rate is lower.
    """
    seconds: list[float] = []
    slower, last = 1, -math.inf
    with closing(ahead):
        for waiting in ahead:
            chosen = []
            for time, frame in waiting:
                # Half a tick is left for times that are not exact.
                if (time - last) * fps >= slower - 0.5:
                    chosen.append((time, frame))
                    last = time
            if not chosen:
                continue
            is_first, num_reused = session.num_frames == 0 or session.frame_latency is None, session.num_reused
            yield chosen
            if is_first or len(seconds) == 2 or session.num_reused > num_reused:
                continue
            seconds.append(session.frame_latency / len(chosen))
            # The faster of the two had no reply in it, or a shorter one.
            while len(seconds) == 2 and min(seconds) * fps > _SHARE * slower:
                slower *= 2
            if slower > 1:
                on_slow(fps / slower, min(seconds))


class _Reader:
    """A thread that reads items into a queue."""

    def __init__(
        self,
        items: Iterator[Any],
        when_behind: str,
        max_waiting: int,
        on_drop: Callable[[], None],
        stopped: threading.Event,
    ) -> None:
        self.items, self.when_behind, self.max_waiting, self.on_drop = items, when_behind, max_waiting, on_drop
        self.stopped, self.has_ended = stopped, False
        self.waiting: deque[Any] = deque()
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="read_ahead", daemon=True)
        self.thread.start()

    def take(self, fewest: int, most: int) -> list[Any]:
        """Wait for `fewest` items or the end, and return up to `most` items; none are left at the end."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.waiting) >= fewest or self.has_ended)
            items = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
            self.changed.notify_all()
        if not items and self.error is not None:
            raise self.error
        return items

    def stop(self) -> None:
        """Stop reading; do not wait long for a source that hangs, such as an unplugged camera."""
        self.stopped.set()
        with self.changed:
            self.changed.notify_all()
        self.thread.join(timeout=0.3)

    def _run(self) -> None:
        for work in (self._read, getattr(self.items, "close", lambda: None)):
            try:
                work()
            except BaseException as error:  # The caller must learn of every failure, or it would wait forever.
                self.error = self.error or error
        with self.changed:
            self.has_ended = True
            self.changed.notify_all()

    def _read(self) -> None:
        for item in self.items:
            self._put(item)
            if self.stopped.is_set():
                break

    def _put(self, item: Any) -> None:
        with self.changed:
            if self.when_behind == "block":
                self.changed.wait_for(lambda: len(self.waiting) < self.max_waiting or self.stopped.is_set())
            is_full = len(self.waiting) == self.max_waiting and not self.stopped.is_set()
            if is_full and self.when_behind == "catch_up":
                raise TooManyWaitingError(
                    f"{self.max_waiting} frames wait, the most that may, and more come. Watch fewer per second, or "
                    'set `when_behind` to "drop_oldest" or "block".'
                )
            if is_full:
                self.waiting.popleft()
            self.waiting.append(item)
            self.changed.notify_all()
        if is_full:
            self.on_drop()


def check_when_behind(when_behind: str) -> None:
    """Raise `ValueError` if `when_behind` is unknown."""
    if when_behind not in WHEN_BEHIND:
        raise ValueError(f"`when_behind` is {when_behind!r}; it must be one of {', '.join(map(repr, WHEN_BEHIND))}.")


def sample_every(camera: Iterable[Any], seconds: float) -> Iterator[tuple[float, Any]]:
    """
    Yield the newest frame of a live source every `seconds` of wall-clock time, with its time.

    A thread reads the source as fast as it comes, so frames are new even if the caller is slow: then there are fewer,
    and one warning says so. Times are seconds from the first frame's arrival.

    ```python
    >>> for time, frame in sample_every(camera, 0.5):  # two frames per second; `camera` is an iterable of frames
    ...     session.push(frame, time=time)
    ```"""
    seconds = check_number("seconds", seconds, above=0)
    if isinstance(camera, (str, Path)):
        raise TypeError(f"`camera` must be an iterable of frames, got {camera!r}; `read_video` opens that.")
    arrivals = ((clock.monotonic(), frame) for frame in camera)
    first = due = None
    late = 0
    with closing(read_ahead(arrivals, 1, when_behind="drop_oldest", max_waiting=1)) as newest:
        for [(arrival, frame)] in newest:
            if first is None:
                first = due = arrival
            given = clock.monotonic()
            yield arrival - first, frame
            now = clock.monotonic()
            # What was said once is not counted again.
            late = late + 1 if now - given > seconds or late >= _LATE else 0
            if late == _LATE:
                took = f"The last frame took {now - given:.2g} s, and one every {seconds:g} s was asked for"
                logger.warning(f"{took}: the frames that come meanwhile are not seen.")
            due = max(due + seconds, now)
            clock.sleep(due - now)


__all__ = ["WHEN_BEHIND", "TooManyWaitingError", "check_when_behind", "keep_up", "read_ahead", "sample_every"]
