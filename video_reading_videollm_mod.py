# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Read files, URLs, cameras and iterables as (time, frame) in constant memory, and read ahead in a thread."""

import difflib
import math
import os
import platform
import shutil
import sys
import tempfile
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers.utils import is_av_available


if is_av_available():
    import av

_BROADCASTS = ("camera:", "rtmp:", "rtmps:", "rtp:", "rtsp:", "rtsps:", "srt:", "udp:")
# FFmpeg's input format and name of a numbered camera.
_CAMERAS = {"Linux": ("v4l2", "/dev/video{}"), "Darwin": ("avfoundation", "{}")}

# What to do with items of a live source that come too fast, and how many may wait by default.
WHEN_BEHIND = {"catch_up": 512, "drop_oldest": 16, "block": 16}


class TooManyWaitingError(Exception):
    """A source is faster than the model, and as many frames wait as may."""


def read_video(
    video: Any, *, fps: float = 2.0, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """
    Play a video at a frame rate: yield the frame on screen at each tick.

    Files, URLs and cameras are decoded as they play, with one frame in memory at a time. If there are several video
    streams, the best is read. Rotation in the metadata is applied, and the source's frame rate may vary.

    Args:
        video (`str`, `Path`, array, tensor or iterable): A file, a URL (anything FFmpeg opens), `"-"` for standard
            input, `"camera:0"` (on Linux and macOS), an array (frames, height, width, 3), or an iterable of frames or
            of pairs (time, frame).
        fps (`float`, *optional*, defaults to 2.0): Ticks per second. Frames without a time are read at this rate.
        start (`float`, *optional*, defaults to 0.0): Second of the first tick.
        end (`float`, *optional*): Second after which to stop. Defaults to the end of the video.

    Yields:
        `tuple[float, np.ndarray]`: Seconds since the beginning of the video, and the frame. Frames of files and URLs
        are uint8 RGB arrays (height, width, 3); others stay as they are.

    Raises:
        `ValueError`: If `fps`, `start` or `end` is out of range, or the video has no readable frame.
        `FileNotFoundError`: If the file does not exist.
        `ImportError`: If PyAV is missing and the video is not a sequence of frames.
    """
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise ValueError(f"`fps` must be a positive number of frames per second, got {fps}.")
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"`start` and `end` must be seconds with 0 <= start <= end, got {start} and {end}.")
    is_source = isinstance(video, (str, Path))
    frames = _play(_check_source(video), fps, start) if is_source else _pace(video, fps, start)
    is_empty = True
    for time, frame in frames:
        if end is not None and time > end:
            break
        is_empty = False
        yield time, frame
    if is_empty:
        name = f"'{video}'" if is_source else f"The {type(video).__name__} given as video"
        raise ValueError(f"{name} has no frame from {start} s on.")


def is_complete(video: Any) -> bool:
    """Return whether all of a video can be read now: True for files and arrays, False for cameras, URLs and pipes."""
    return os.path.isfile(video) if isinstance(video, (str, Path)) else isinstance(video, Sized)


def goes_on(video: Any) -> bool:
    """Return whether the source produces frames even when nothing reads them, as cameras and broadcasts do."""
    return isinstance(video, str) and video.startswith(_BROADCASTS)


def _check_source(video: str | Path) -> str:
    if not is_av_available():
        raise ImportError("Reading video files needs PyAV: `pip install av`.")
    source, path = str(video), Path(video)
    if source != "-" and not source.startswith("camera:") and "://" not in source and not path.is_file():
        names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean '{path.with_name(close[0])}'?" if close else "."
        raise FileNotFoundError(f"There is no video file '{source}'{hint}")
    return source


def _pace(frames: Iterable[Any], fps: float, start: float) -> Iterator[tuple[float, Any]]:
    for index, item in enumerate(frames):
        time, frame = item if isinstance(item, tuple) and len(item) == 2 else (index / fps, item)
        if time >= start - 1e-9:
            yield float(time), frame


def _play(source: str, fps: float, start: float) -> Iterator[tuple[float, np.ndarray]]:
    # Ticks are exact: at 30000/1001 fps, rounding errors of floats would in time select a neighbouring frame.
    tick, index = 1 / Fraction(fps).limit_denominator(100_000), 0
    begin = Fraction(start).limit_denominator(1_000_000)
    shown, shown_until = None, None
    # One reformatter for all frames: its setup takes ten times as long as a conversion.
    reformatter = av.video.reformatter.VideoReformatter()
    for time, duration, frame in _decode(source, start):
        while begin + index * tick < time:
            yield float(begin + index * tick), _to_rgb(frame if shown is None else shown, reformatter)
            index += 1
        shown, shown_until = frame, time + duration
    while shown is not None and begin + index * tick < shown_until:
        yield float(begin + index * tick), _to_rgb(shown, reformatter)
        index += 1


def _decode(source: str, start: float) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Yield time, duration and picture of each frame, from the key frame before `start` on."""
    try:
        with _open(source) as container:
            stream = _best_stream(container)
            if stream is None:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
                raise ValueError(f"'{source}' has no video stream (streams: {kinds}).")
            stream.thread_type = "AUTO"
            origin = (stream.start_time or 0) * stream.time_base
            if start > 0 and source != "-":
                container.seek(int((start + origin) / stream.time_base), stream=stream)
            duration = 1 / stream.average_rate if stream.average_rate else Fraction(1, 25)
            time = -duration
            for frame in container.decode(stream):
                time = time + duration if frame.pts is None else frame.pts * frame.time_base - origin
                yield time, frame.duration * frame.time_base if frame.duration else duration, frame
    except av.error.FFmpegError as error:
        raise ValueError(f"'{source}' cannot be read as video: {error.strerror or error}.") from error


def _open(source: str) -> Any:
    if source == "-":
        return av.open(_standard_input())
    if not source.startswith("camera:"):
        return av.open(source)
    number = source.removeprefix("camera:")
    if not number.isdecimal():
        raise ValueError(f"A camera is named by its number, such as 'camera:0', got '{source}'.")
    if platform.system() not in _CAMERAS:
        raise ValueError(f"Cameras can be opened by number on {' and '.join(_CAMERAS)} only; give a URL.")
    system, name = _CAMERAS[platform.system()]
    return av.open(name.format(number), format=system)


def _standard_input() -> Any:
    """Return standard input as a file for FFmpeg; a piped mp4 with its index at the end goes through the disk."""
    pipe = sys.stdin.buffer
    if pipe.seekable():
        return pipe
    head, at = pipe.peek(256), 0
    while head[at + 4 : at + 8] in (b"ftyp", b"free", b"skip", b"wide"):
        at += max(int.from_bytes(head[at : at + 4], "big"), 8)
    if head[at + 4 : at + 8] not in (b"mdat", b""):
        return SimpleNamespace(read=pipe.read1)
    # The media data comes first: FFmpeg must seek to the index and back.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(pipe, file)
    file.seek(0)
    return file


def _best_stream(container: Any) -> Any | None:
    """Return the video stream that a player would show: a default one, then the largest, never a cover picture."""
    flags = av.stream.Disposition
    streams = [stream for stream in container.streams.video if not stream.disposition & flags.attached_pic]
    return max(streams, key=lambda s: (bool(s.disposition & flags.default), s.width * s.height), default=None)


def _to_rgb(frame: Any, reformatter: Any) -> np.ndarray:
    array = reformatter.reformat(frame, format="rgb24").to_ndarray()
    # Both FFmpeg's angle and `rot90` turn the stored picture counter-clockwise.
    return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))


def read_ahead(
    items: Iterator[Any],
    most: int,
    *,
    is_live: bool = True,
    goes_on: bool = False,
    when_behind: str | None = None,
    max_waiting: int | None = None,
    on_drop: Callable[[], None] = lambda: None,
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
    """
    when_behind = when_behind or ("drop_oldest" if goes_on else "block")
    check_when_behind(when_behind)
    max_waiting = WHEN_BEHIND[when_behind] if max_waiting is None else max_waiting
    if max_waiting < 1:
        raise ValueError(f"`max_waiting` must be at least 1, got {max_waiting}.")
    reader = _Reader(items, when_behind, max_waiting, on_drop) if is_live else _Reader(items, "block", most, on_drop)
    try:
        while some := reader.take(1 if is_live else most, most):
            yield some
    finally:
        reader.stop()


class _Reader:
    """A thread that reads items into a queue."""

    def __init__(self, items: Iterator[Any], when_behind: str, max_waiting: int, on_drop: Callable[[], None]) -> None:
        self.items, self.when_behind, self.max_waiting, self.on_drop = items, when_behind, max_waiting, on_drop
        self.waiting: deque[Any] = deque()
        self.changed = threading.Condition()
        self.has_ended = self.is_stopped = False
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
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()
        self.thread.join(timeout=1)

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
            if self.is_stopped:
                break

    def _put(self, item: Any) -> None:
        with self.changed:
            if self.when_behind == "block":
                self.changed.wait_for(lambda: len(self.waiting) < self.max_waiting or self.is_stopped)
            is_full = len(self.waiting) == self.max_waiting and not self.is_stopped
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

    A thread reads the source as fast as it comes, so frames are new even if the caller is slow. Times are seconds from
    the first frame's arrival.

    ```python
    >>> for time, frame in sample_every(camera, 0.5):  # two frames per second; `camera` is an iterable of frames
    ...     session.push(frame, time=time)
    ```"""
    if not 0 < seconds < math.inf:
        raise ValueError(f"`seconds` must be a positive time between frames, got {seconds}.")
    if isinstance(camera, (str, Path)):
        raise TypeError(f"`camera` must be an iterable of frames, got {camera!r}; `read_video` opens that.")
    arrivals = ((clock.monotonic(), frame) for frame in camera)
    first = due = None
    with closing(read_ahead(arrivals, 1, when_behind="drop_oldest", max_waiting=1)) as newest:
        for [(arrival, frame)] in newest:
            if first is None:
                first = due = arrival
            yield arrival - first, frame
            now = clock.monotonic()
            due = max(due + seconds, now)
            clock.sleep(due - now)


__all__ = ["WHEN_BEHIND", "TooManyWaitingError", "check_when_behind", "read_ahead", "read_video", "sample_every"]
