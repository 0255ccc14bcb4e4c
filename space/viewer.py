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
"""What one person watches: a streaming session with a source of frames; and the room in which people sit."""

import tempfile
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np


NARRATE = "Please narrate the video in real time."
# Frames that plots show, and most that are taken in at one call: what is more waits for the next.
HISTORY, MOST_AT_ONCE = 240, 16


@dataclass(frozen=True)
class Limits:
    """
    What a video may be, and how long a stream.

    Args:
        megabytes (`int`): Largest file.
        seconds (`float`): Longest video.
        pixels (`int`): Largest picture, width times height.
        frames (`int`): Most frames of a stream, whose memory grows with each.
        compared (`float`): Seconds of a video that are compared.
    """

    megabytes: int = 200
    seconds: float = 1800.0
    pixels: int = 4096 * 2304
    frames: int = 7200
    compared: float = 60.0

    def check(self, path: str | Path) -> float:
        """
        Length of a video in seconds.

        Raises:
            `ValueError`: With a message for its owner, if it is not a video or is beyond a limit.
        """
        size = Path(path).stat().st_size
        if size > self.megabytes * 1_000_000:
            raise ValueError(
                f"This file has {size / 1e6:.0f} MB; at most {self.megabytes} are taken. Cut or shrink it."
            )
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError("This file has no picture in it. Choose a video.")
                stream = container.streams.video[0]
                width, height = stream.width, stream.height
                if width * height > self.pixels:
                    raise ValueError(f"This video's picture has {width}x{height} pixels. Choose a smaller one.")
                next(container.decode(stream))
                if stream.duration is not None:
                    seconds = float(stream.duration * stream.time_base)
                else:
                    seconds = (container.duration or 0) / av.time_base
        except (av.error.FFmpegError, StopIteration):
            raise ValueError("This file cannot be read as a video. Choose an mp4, webm or mov.") from None
        if seconds > self.seconds:
            raise ValueError(f"This video lasts {seconds / 60:.0f} min; at most {self.seconds / 60:.0f} are watched.")
        return seconds


@dataclass(frozen=True)
class Moment:
    """
    A frame that was seen.

    Args:
        time (`float`): Second of the stream.
        silence (`float`): Probability of silence after it.
        latency (`float`): Seconds from its arrival to the decision on it.
        spoke (`bool`): Whether the model spoke.
    """

    time: float
    silence: float
    latency: float
    spoke: bool


class Viewer:
    """
    One stream and where its frames come from. Calls may come from several threads: one waits for the other.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        fps (`float`, *optional*, defaults to 2.0): Frames a second to watch.
        threshold (`float`, *optional*): Probability of silence below which the model speaks; by default the model's.
        instruction (`str`, *optional*): What the user says at the first frame.

    Attributes:
        session ([`StreamingSession`]): The stream.
        video (`Path`, *optional*): The file that is watched, `None` for a camera.
        moments (`deque[Moment]`): The last frames.
        dropped (`int`): Frames of the camera that came faster than they could be seen, and were left out.
        shape (`tuple[int, int]`): Height and width of the last frame.
        ended (`bool`): Whether the file's last frame was seen.
        seconds (`float`): Time spent on its frames and on what was said of them.
        folder (`Path`): For files of this viewer, deleted when it is closed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float = 2.0,
        threshold: float | None = None,
        instruction: str = NARRATE,
    ) -> None:
        self.model, self.processor = model, processor
        self.fps, self.threshold, self.instruction = fps, threshold, instruction
        self.lock = threading.RLock()
        self.video: Path | None = None
        self.last_call = clock.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="narration-")
        self.folder = Path(self._folder.name)
        self._frames: Iterator[tuple[float, np.ndarray]] | None = None
        self._next: tuple[float, np.ndarray] | None = None
        self.begin()

    def begin(self, *, video: str | Path | None = None, start: float = 0.0, end: float | None = None) -> None:
        """
        Begins a new stream, on a file from one second to another or on a camera.

        Raises:
            `ValueError`: If the video cannot be read from there on.
        """
        with self.lock:
            self.video = None if video is None else Path(video)
            self.session = self.model.stream(self.processor, fps=self.fps, interval_threshold=self.threshold)
            self.moments: deque[Moment] = deque(maxlen=HISTORY)
            self.dropped, self.shape, self.ended, self.seconds = 0, (1, 1), False, 0.0
            if self.instruction.strip():
                self.session.ask(self.instruction, reply_now=False)
            self._frames = self._next = None
            if video is not None:
                self._frames = self.processor.read_video(str(video), fps=self.fps, start=start, end=end)
                self._next = next(self._frames)

    def watch_until(self, time: float) -> None:
        """Sees the file's frames up to a second, a handful at most at once; after the last one may still ask."""
        with self.lock:
            for _ in range(MOST_AT_ONCE):
                if self._next is None or self._next[0] > time + 1e-6:
                    break
                self._see(self._next[1], self._next[0])
                self._next = next(self._frames, None) if self._frames is not None else None
            self.ended = self.video is not None and self._next is None

    def see(self, frames: Sequence[tuple[float, np.ndarray]], dropped: int = 0) -> None:
        """Sees frames of a camera: (second, uint8 (height, width, 3)); some before them may have been dropped."""
        with self.lock:
            self.dropped += dropped
            for time, frame in frames:
                if self.session.time is None or time > self.session.time:
                    self._see(frame, time)

    def ask(self, text: str, *, now: bool = True) -> None:
        """Asks, to be answered at once or when what is asked for happens."""
        with self.lock:
            self.session.ask(text, reply_now=now)

    def set_threshold(self, threshold: float) -> None:
        """From the next frame on."""
        with self.lock:
            self.threshold = self.session.interval_threshold = threshold

    @property
    def waiting(self) -> float | None:
        """Second of the file's next frame, `None` at its end."""
        return None if self._next is None else self._next[0]

    def cost(self) -> Any:
        """What the language model cost so far, and what full compute would have: see the config's `estimate_cost`."""
        config, frames, tokens = self.model.config, self.session.num_frames, int(self.session.cache.get_seq_length())
        text = max(tokens - frames * config.frame_num_tokens, 0)
        return config.estimate_cost(frames, text, bytes_per_value=self.model.dtype.itemsize)

    def close(self) -> None:
        """Lets go of the stream's memory; what was said stays."""
        with self.lock:
            self._frames = self._next = None
            self.session.closed = True
            self.session.cache = self.model.new_cache()
            self._folder.cleanup()

    def _see(self, frame: np.ndarray, time: float) -> None:
        begin = clock.perf_counter()
        said = self.session.push(frame, time=time)
        self.seconds += clock.perf_counter() - begin
        self.shape = frame.shape[:2]
        spoke = any(event.role == "assistant" and event.interval_probability is not None for event in said)
        self.moments.append(Moment(time, self.session.interval_probability, self.session.frame_latency or 0.0, spoke))


class RoomIsFull(Exception):
    """Nobody more can be let in now."""


class Room:
    """
    Who watches, by the name of their page. Nobody sees another's stream.

    Args:
        seats (`int`): Most people at once.
        patience (`float`, *optional*, defaults to 60.0): Seconds without a word after which a seat is given away when
            somebody else wants it.
        on_leave (`Callable`, *optional*): Called with the viewer of who leaves.
    """

    def __init__(
        self, seats: int, *, patience: float = 60.0, on_leave: Callable[[Viewer], None] | None = None
    ) -> None:
        self.seats, self.patience, self.on_leave = seats, patience, on_leave
        self._viewers: dict[str, Viewer] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._viewers)

    def enter(self, name: str, viewer: Viewer) -> None:
        """
        Gives somebody a seat, in place of the one they had.

        Raises:
            [`RoomIsFull`]: If there is none; what they had is left as it is.
        """
        with self._lock:
            others = {key: other for key, other in self._viewers.items() if key != name}
            if len(others) >= self.seats:
                now = clock.monotonic()
                others = {key: o for key, o in others.items() if now - o.last_call <= self.patience}
            if len(others) >= self.seats:
                raise RoomIsFull(
                    f"{self.seats} people are watching, and there is no seat free. Try again in a minute."
                )
            gone = [other for key, other in self._viewers.items() if key not in others]
            self._viewers = {**others, name: viewer}
        for other in gone:
            self._let_go(other)

    def watches(self, video: Path) -> bool:
        """Whether anybody watches a file."""
        return any(viewer.video == video for viewer in list(self._viewers.values()))

    def find(self, name: str) -> Viewer | None:
        """Whose page it is, if they watch."""
        viewer = self._viewers.get(name)
        if viewer is not None:
            viewer.last_call = clock.monotonic()
        return viewer

    def leave(self, name: str) -> None:
        """The page was closed."""
        with self._lock:
            viewer = self._viewers.pop(name, None)
        if viewer is not None:
            self._let_go(viewer)

    def _let_go(self, viewer: Viewer) -> None:
        viewer.close()
        if self.on_leave is not None:
            self.on_leave(viewer)


def compare(
    models: Sequence[Any], processor: Any, video: str | Path, *, fps: float = 2.0, end: float | None = None
) -> Iterator[list[Viewer]]:
    """
    Shows a video to several models at once, each frame to one after the other, so that none has the machine when it is
    faster.

    Args:
        models (sequence of [`VideoLLMMoDForConditionalGeneration`]): The models.
        processor ([`VideoLLMMoDProcessor`]): Of all of them.
        video (`str` or `Path`): The video.
        fps (`float`, *optional*, defaults to 2.0): Frames a second to watch.
        end (`float`, *optional*): Second of the video after which to stop.

    Yields:
        `list[Viewer]`: One a model, after each frame, the same objects each time.
    """
    viewers = [Viewer(model, processor, fps=fps) for model in models]
    for viewer in viewers:
        viewer.begin(video=video, end=end)
    while any(not viewer.ended for viewer in viewers):
        for viewer in viewers:
            viewer.watch_until(viewer.waiting if viewer.waiting is not None else 0.0)
        yield viewers
