# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Videos as they play: a file, a URL or a stream of frames becomes (time, frame) in constant memory."""

import math
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import is_av_available, logging


if is_av_available():
    import av

logger = logging.get_logger(__name__)

_GO_ON = ("camera:", "rtmp:", "rtmps:", "rtp:", "rtsp:", "rtsps:", "srt:", "udp:")
# How FFmpeg calls a camera by its number.
_CAMERAS = {"Linux": ("v4l2", "/dev/video{}"), "Darwin": ("avfoundation", "{}")}

# What happens to frames that come faster than they can be seen, and how many of a stream wait at most.
WHEN_BEHIND = {"catch_up": 512, "drop_oldest": 16, "block": 16}


class TooManyWaitingError(Exception):
    """Frames were refused, since too many wait to be seen."""


def read_video(
    video: Any, *, fps: float = 2.0, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """
    Plays a video at a frame rate: at each tick, the frame that is on the screen.

    Files, URLs and cameras are decoded as they play, one frame in memory at a time. Where a file has several video
    streams the best is taken, and a rotation in its metadata is applied. Source frame rates may vary.

    Args:
        video (`str`, `Path`, array, tensor or iterable): A file, a URL (whatever FFmpeg opens), `"-"` for standard
            input, `"camera:0"` (on Linux and macOS), or frames: one array (frames, height, width, 3), or anything that
            yields frames or pairs (time, frame).
        fps (`float`, *optional*, defaults to 2.0): Ticks a second. Frames without a time are taken to come at it.
        start (`float`, *optional*, defaults to 0.0): Second of the first tick.
        end (`float`, *optional*): Second after which to stop. By default the end of the video.

    Yields:
        `tuple[float, np.ndarray]`: Seconds since the video's beginning, and the frame: for a file or URL a uint8 RGB
        array (height, width, 3), else as it came.

    Raises:
        `ValueError`: If `fps`, `start` or `end` are out of range, or there is no readable frame.
        `FileNotFoundError`: If there is no such file.
        `ImportError`: If a file or URL is given and PyAV is missing.
    """
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise ValueError(f"`fps` must be a positive number of frames a second, got {fps}.")
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"`start` and `end` must be seconds with 0 <= start <= end, got {start} and {end}.")
    from_file = isinstance(video, (str, Path))
    frames = _play(_source(video), fps, start) if from_file else _pace(video, fps, start)
    empty = True
    for time, frame in frames:
        if end is not None and time > end:
            break
        empty = False
        yield time, frame
    if empty:
        name = f"'{video}'" if from_file else f"The {type(video).__name__} given as video"
        raise ValueError(f"{name} has no frame from {start} s on.")


def is_complete(video: Any) -> bool:
    """Whether all of a video is there to be read, as of a file or an array and maybe not of a camera or a URL."""
    return os.path.isfile(video) if isinstance(video, (str, Path)) else isinstance(video, Sized)


def goes_on(video: Any) -> bool:
    """Whether it goes on while nobody reads it, as a camera and a broadcast, and not a file or a download."""
    return isinstance(video, str) and video.startswith(_GO_ON)


def _source(video: str | Path) -> str:
    if not is_av_available():
        raise ImportError("Reading video files needs PyAV: `pip install av`.")
    source = str(video)
    if source == "-":
        return "file:///dev/stdin"
    if source.startswith("camera:"):
        return source
    if "://" not in source and not Path(source).is_file():
        raise FileNotFoundError(f"There is no video file '{source}'.")
    return source


def _pace(frames: Iterable[Any], fps: float, start: float) -> Iterator[tuple[float, Any]]:
    for index, item in enumerate(frames):
        time, frame = item if isinstance(item, tuple) and len(item) == 2 else (index / fps, item)
        if time >= start - 1e-9:
            yield float(time), frame


def _play(source: str, fps: float, start: float) -> Iterator[tuple[float, np.ndarray]]:
    # Exact ticks: at 30000/1001 fps a float's error would in time choose the neighbouring frame.
    tick, index = 1 / Fraction(fps).limit_denominator(100_000), 0
    begin = Fraction(start).limit_denominator(1_000_000)
    shown, shown_until = None, None
    # One for all frames: to set a conversion up takes ten times as long as to do it.
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
    """Time, duration and picture of each frame from the key frame before `start` on."""
    try:
        with _open(source) as container:
            stream = _best_stream(container)
            if stream is None:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
                raise ValueError(f"'{source}' has no video stream (streams: {kinds}).")
            stream.thread_type = "AUTO"
            origin = (stream.start_time or 0) * stream.time_base
            if start > 0:
                container.seek(int((start + origin) / stream.time_base), stream=stream)
            duration = 1 / stream.average_rate if stream.average_rate else Fraction(1, 25)
            time = -duration
            for frame in container.decode(stream):
                time = time + duration if frame.pts is None else frame.pts * frame.time_base - origin
                own = frame.duration * frame.time_base if frame.duration else duration
                yield time, own, frame
    except av.error.FFmpegError as error:
        raise ValueError(f"'{source}' cannot be read as video: {error.strerror or error}.") from error


def _open(source: str) -> Any:
    if not source.startswith("camera:"):
        return av.open(source)
    number = source.removeprefix("camera:")
    if not number.isdecimal():
        raise ValueError(f"A camera is named by its number, such as 'camera:0', got '{source}'.")
    if platform.system() not in _CAMERAS:
        raise ValueError(f"Cameras are opened by number on {' and '.join(_CAMERAS)} only; give a URL.")
    system, name = _CAMERAS[platform.system()]
    return av.open(name.format(number), format=system)


def _best_stream(container: Any) -> Any | None:
    """The video stream that a player would show: a default one, then the largest, and never a cover picture."""
    flags = av.stream.Disposition
    streams = [stream for stream in container.streams.video if not stream.disposition & flags.attached_pic]
    return max(streams, key=lambda s: (bool(s.disposition & flags.default), s.width * s.height), default=None)


def _to_rgb(frame: Any, reformatter: Any) -> np.ndarray:
    array = reformatter.reformat(frame, format="rgb24").to_ndarray()
    # FFmpeg's angle turns the stored picture counter-clockwise into the one to show, and so does `rot90`.
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(array, quarter_turns)) if quarter_turns else array


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
    The same items, read by a thread that is ahead, so that a video is decoded while the model works.

    Args:
        items (`Iterator`): What to read. An error of it is raised where its item would be.
        most (`int`): Most items to give at once.
        is_live (`bool`, *optional*, defaults to `True`): Whether nobody knows when the next comes, so that those that
            wait are given at once. A file's are given as many together as are asked for: fewer steps take less time.
            A file waits, whatever `when_behind` says, and is read `most` items ahead.
        goes_on (`bool`, *optional*, defaults to `False`): Whether the source goes on while nobody reads it.
        when_behind (`str`, *optional*): What happens to a live source's items that come faster than they are taken:
            `"catch_up"`, `"drop_oldest"` or `"block"`, which lets the source wait. By default the oldest are dropped
            of one that goes on, and others wait.
        max_waiting (`int`, *optional*): How many may wait, by default 512 to catch up, else 16.
        on_drop (`Callable`, *optional*): Called for each that is dropped, by the thread that reads.

    Yields:
        `list`: Those that wait, at least one, or `most`, but for the last.

    Raises:
        `TooManyWaitingError`: After what waits, if more would have to, to catch up.
        `ValueError`: If `when_behind` is another, or `max_waiting` less than 1.
    """
    when_behind = when_behind or ("drop_oldest" if goes_on else "block")
    check_when_behind(when_behind)
    limit = WHEN_BEHIND[when_behind] if max_waiting is None else max_waiting
    if limit < 1:
        raise ValueError(f"`max_waiting` must be at least 1, got {limit}.")
    if not is_live:
        when_behind, limit = "block", most
    waiting: deque[Any] = deque()
    changed = threading.Condition()
    has_ended = is_stopped = False
    error: BaseException | None = None

    def take_in(item: Any) -> None:
        is_full = False
        with changed:
            if when_behind == "block":
                changed.wait_for(lambda: len(waiting) < limit or is_stopped)
            elif len(waiting) == limit and not is_stopped:
                is_full = True
                if when_behind == "catch_up":
                    raise TooManyWaitingError(
                        f"{limit} wait, as many as may, and more frames come than can be seen. Watch fewer a second, "
                        'or choose another `when_behind`: "drop_oldest", or "block".'
                    )
                waiting.popleft()
            waiting.append(item)
            changed.notify_all()
        if is_full:
            on_drop()

    def read() -> None:
        nonlocal has_ended, error
        # Whatever goes wrong, who listens must not wait for more.
        try:
            for item in items:
                take_in(item)
                if is_stopped:
                    break
        except BaseException as raised:
            error = raised
        try:
            close: Callable[[], None] | None = getattr(items, "close", None)
            if close is not None:
                close()
        except BaseException as raised:
            error = error or raised
        with changed:
            has_ended = True
            changed.notify_all()

    thread = threading.Thread(target=read, name="read_ahead", daemon=True)
    thread.start()
    try:
        fewest = 1 if is_live else most
        while True:
            with changed:
                changed.wait_for(lambda: len(waiting) >= fewest or has_ended)
                some = [waiting.popleft() for _ in range(min(most, len(waiting)))]
                changed.notify_all()
            if not some:
                break
            yield some
        if error is not None:
            raise error
    finally:
        with changed:
            is_stopped = True
            changed.notify_all()
        # A source that stands still, a camera that is gone for one, must not keep who has heard enough.
        thread.join(timeout=1)


def check_when_behind(when_behind: str) -> None:
    """Raises `ValueError` if there is no such policy."""
    if when_behind not in WHEN_BEHIND:
        raise ValueError(f"`when_behind` is {when_behind!r}; it must be one of {', '.join(map(repr, WHEN_BEHIND))}.")


__all__ = [
    "WHEN_BEHIND",
    "TooManyWaitingError",
    "check_when_behind",
    "goes_on",
    "is_complete",
    "read_ahead",
    "read_video",
]
