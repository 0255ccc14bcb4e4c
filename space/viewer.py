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
"""What one person watches: a streaming session with a source of frames."""

import tempfile
import threading
import time as clock
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from captions import video_seconds


NARRATE = "Please narrate the video in real time."
# Frames that plots show; seconds after which what was seen so far is shown; characters of a question or instruction.
HISTORY, BREATH, MOST_TYPED = 240, 0.5, 500


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
        instruction (`str`, *optional*): What the user says at the first frame; at most 500 characters of it.

    Attributes:
        session ([`StreamingSession`]): The stream. When it has filled the model's context, a new one goes on.
        video (`Path`, *optional*): The file that is watched, `None` for a camera.
        moments (`deque[Moment]`): The last frames.
        dropped (`int`): Frames of the camera that came faster than they could be seen, and were left out.
        shape (`tuple[int, int]`): Height and width of the last frame.
        seconds (`float`): Time spent on its frames and on what was said of them.
        last_active (`float`): When something was seen or asked last, by the monotonic clock.
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
        self.context = model.config.text_config.max_position_embeddings
        self.lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="narration-")
        self.folder = Path(self._folder.name)
        self.begin()

    def begin(self, *, video: str | Path | None = None, start: float = 0.0, end: float | None = None) -> None:
        """
        Begins a new stream, on a file from one second to another or on a camera. What was there goes on if it cannot.

        Raises:
            `ValueError`: If the video has nothing to be seen from there on.
        """
        with self.lock:
            session = self._new_session()
            frames, first = iter(()), None
            if video is not None:
                frames = self.processor.read_video(str(video), fps=self.fps, start=start, end=end)
                try:
                    first = next(frames)
                except (ValueError, OSError):
                    raise ValueError(f"This video has nothing to be seen from {start:.1f} s on.") from None
            self.video = None if video is None else Path(video)
            self.session, self._frames, self._next = session, frames, first
            self._past: list[Any] = []
            self.moments: deque[Moment] = deque(maxlen=HISTORY)
            self.dropped, self.shape, self.seconds = 0, (1, 1), 0.0
            self.last_active = clock.monotonic()

    def watch_until(self, time: float) -> None:
        """
        Sees the file's frames up to a second, but pauses for breath, so that what was said is shown soon.

        Raises:
            `ValueError`: If the file is damaged there; the stream is at its end then.
        """
        with self.lock:
            begin = clock.monotonic()
            while self._next is not None and self._next[0] <= time + 1e-6:
                (at, frame), self._next = self._next, None
                self._see(frame, at)
                try:
                    self._next = next(self._frames, None)
                except ValueError:
                    raise ValueError(f"This video is damaged after {at:.1f} s and cannot be seen further.") from None
                if clock.monotonic() - begin > BREATH:
                    break

    def see(self, frames: Iterable[tuple[float, np.ndarray]], dropped: int = 0) -> None:
        """Sees frames of a camera: (second, uint8 (height, width, 3)); some before them may have been dropped."""
        with self.lock:
            self.dropped += dropped
            for time, frame in frames:
                if self.session.time is None or time > self.session.time:
                    self._see(frame, time)

    def ask(self, text: str, *, now: bool = True) -> None:
        """Asks, to be answered at once or when what is asked for happens."""
        with self.lock:
            self._make_room(text)
            self.session.ask(text, reply_now=now)
            self.last_active = clock.monotonic()

    def set_threshold(self, threshold: float) -> None:
        """From the next frame on. Waits for nothing."""
        self.threshold = self.session.interval_threshold = threshold

    @property
    def events(self) -> list[Any]:
        """All that was said."""
        return [*self._past, *self.session.events]

    @property
    def waiting(self) -> float | None:
        """Second of the file's next frame, `None` at its end."""
        return None if self._next is None else self._next[0]

    @property
    def ended(self) -> bool:
        """Whether the file's last frame was seen."""
        return self.video is not None and self._next is None

    @property
    def end(self) -> float:
        """End of the last caption at the latest: the file's length, or for a camera the end of its last frame."""
        if self.video is not None:
            return video_seconds(self.video)
        return (self.session.time or 0.0) + 1 / self.fps

    def cost(self) -> Any:
        """What the language model cost so far, and what full compute would have: see the config's `estimate_cost`."""
        config, frames, tokens = self.model.config, self.session.num_frames, int(self.session.cache.get_seq_length())
        text = max(tokens - frames * config.frame_num_tokens, 0)
        return config.estimate_cost(frames, text, bytes_per_value=self.model.dtype.itemsize)

    def close(self) -> None:
        """Lets go of the stream's memory; what was said stays."""
        self._next = None  # A call that is at work ends after its frame.
        with self.lock:
            self._frames, self._next = iter(()), None
            self.session.closed = True
            self.session.cache = self.model.new_cache()
            self._folder.cleanup()

    def _new_session(self) -> Any:
        session = self.model.stream(self.processor, fps=self.fps, interval_threshold=self.threshold)
        if self.instruction.strip():
            session.ask(self.instruction[:MOST_TYPED], reply_now=False)
        return session

    def _make_room(self, text: str = "") -> None:
        """A stream that has filled the model's context is followed by a new one."""
        margin = self.model.config.frame_num_tokens + self.session.max_new_tokens + len(text)
        if int(self.session.cache.get_seq_length()) > self.context - min(margin, self.context // 2):
            self._past = self.events
            self.session = self._new_session()

    def _see(self, frame: np.ndarray, time: float) -> None:
        self._make_room()
        begin = clock.perf_counter()
        said = self.session.push(frame, time=time)
        self.seconds += clock.perf_counter() - begin
        self.shape, self.last_active = frame.shape[:2], clock.monotonic()
        spoke = any(event.role == "assistant" and event.interval_probability is not None for event in said)
        self.moments.append(Moment(time, self.session.interval_probability, self.session.frame_latency or 0.0, spoke))


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
            viewer.watch_until(viewer.waiting or 0.0)
        yield viewers
