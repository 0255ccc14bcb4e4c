# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""One person's stream: a streaming session and the source of its frames."""

import itertools
import math
import tempfile
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TextStreamer
from uploads import FORMATS, Limits


NARRATE = "Please narrate the video in real time."
# The page tells streams apart by their numbers.
_NUMBERS = itertools.count()
# Frames that plots show; longest call of `watch_until`, in seconds; longest question or query, in characters.
HISTORY, BREATH, MOST_TYPED = 240, 0.5, 500


@dataclass(frozen=True)
class Moment:
    """
    A frame that the model has seen.

    Args:
        time (`float`): Its second in the stream.
        silence (`float`): Probability of silence after it.
        latency (`float`): Seconds from its arrival to the decision whether to speak.
        spoke (`bool`): Whether the model spoke.
    """

    time: float
    silence: float
    latency: float
    spoke: bool


class Words(TextStreamer):
    """
    Pass on the words of each reply as soon as they are decoded.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        hear (`Callable[[str], None]`): Called with new text, in the thread of the model.
    """

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.hear = hear

    def on_finalized_text(self, text: str, **_: Any) -> None:
        """Take in new text."""
        if text:
            self.hear(text)


class Viewer:
    """
    A stream and the source of its frames. It is safe to call from several threads: one waits for the other.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        fps (`float`, *optional*, defaults to 2.0): Frames per second to watch.
        interval_threshold (`float`, *optional*): The model speaks when silence is less likely; by default the model's.
        query (`str`, *optional*): What the user says at the first frame; at most 500 characters of it. The default is
            said only to a model that has learned when to speak.
        speaking (`dict`, *optional*): Other options of the session: when to speak.

    Attributes:
        session ([`StreamingSession`]): The stream. When it fills the model's context, a new session replaces it.
        video (`Path`, *optional*): The file, `None` for a camera.
        moments (`deque[Moment]`): The last frames.
        dropped (`int`): Camera frames that arrived faster than the model could watch, and were dropped.
        report ([`ReadingReport`], *optional*): What was spoilt, mended or left out in the file.
        shape (`tuple[int, int]`): Height and width of the last frame.
        seconds (`float`): Time spent on the frames and on the replies to them.
        on_words (`Callable`): Called in the thread of the model when `words` has grown.
        last_active (`float`): Time of the last frame or question, by the monotonic clock.
        kept (`float`): When the page last renewed the file, by the monotonic clock.
        folder (`Path`): Holds this viewer's files. Closing the viewer deletes it.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float = 2.0,
        interval_threshold: float | None = None,
        query: str = NARRATE,
        speaking: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.fps, self.interval_threshold, self.query, self.speaking = fps, interval_threshold, query, speaking or {}
        self.context = model.config.text_config.max_position_embeddings
        self.lock = threading.RLock()
        self._words: tuple[int, str] = (-1, "")
        self.on_words: Callable[[], None] = lambda: None
        self.kept = -math.inf
        self._folder = tempfile.TemporaryDirectory(prefix="narration-")
        self.folder = Path(self._folder.name)
        self.begin()

    def begin(self, *, video: str | Path | None = None, start: float = 0.0, end: float | None = None) -> None:
        """
        Start a new stream, on the part of a file between two seconds, or on a camera.

        Raises:
            `ValueError`: If the video has no frames there. The previous stream then goes on.
            `FileNotFoundError`: If the file has been deleted. The previous stream then goes on, too.
        """
        with self.lock:
            session = self._new_session()
            frames, first, report = iter(()), None, None
            if video is not None:
                report = self.processor.new_report()
                try:
                    reader = self._open(video, report=report)
                    frames = self.processor.read_video(reader, fps=self.fps, start=start, end=end)
                    first = next(frames)
                except FileNotFoundError:
                    raise
                except (ValueError, OSError):
                    raise ValueError(f"This video has no frames from {start:.1f} s on.") from None
            self.video = None if video is None else Path(video)
            self.session, self._frames, self._next = session, frames, first
            self.report = report
            self._past: list[Any] = []
            self.number = next(_NUMBERS)
            self.moments: deque[Moment] = deque(maxlen=HISTORY)
            self.dropped, self.shape, self.seconds = 0, (1, 1), 0.0
            self._is_behind = False
            self.jump: float | None = None  # Where the person went while the stream was busy, in seconds.
            self.last_active = clock.monotonic()

    def go_to(self, start: float) -> None:
        """
        Start a new stream at another second of the file. If there are no frames, as at its end, the stream is over.

        Raises:
            `FileNotFoundError`: If the file has been deleted. The stream is then over, too.
        """
        with self.lock:
            self._frames, self._next = iter(()), None  # Nobody wants to hear what was skipped.
            with suppress(ValueError):
                self.begin(video=self.video, start=start)

    def watch_until(self, time: float) -> None:
        """
        Watch the file's frames up to a second, for at most half a second, so that the page shows replies soon.

        Raises:
            `ValueError`: If the file is damaged there. The stream then ends.
        """
        with self.lock:
            begin = clock.monotonic()
            while self._next is not None and self._next[0] <= time + 1e-6:
                (at, frame), self._next = self._next, None
                self._see(frame, at)
                try:
                    self._next = next(self._frames, None)
                except ValueError:
                    raise ValueError(f"This video is damaged after {at:.1f} s. The stream ends there.") from None
                if clock.monotonic() - begin > BREATH:
                    break

    def see(self, frames: Iterable[tuple[float, np.ndarray]], dropped: int = 0) -> None:
        """
        Watch camera frames, pairs of a second and uint8 (height, width, 3). `dropped` were dropped before them. Frames
        that are not later than the last one are dropped too.
        """
        with self.lock:
            self.dropped += dropped
            for time, frame in frames:
                if self.session.time is None or time > self.session.time:
                    self._see(frame, time)
                else:
                    self.dropped += 1

    def falls_behind(self) -> bool:
        """Return whether half as many camera frames were dropped as were seen, and at least four. It is said once."""
        was_behind = self._is_behind
        self._is_behind = was_behind or (self.dropped >= 4 and 2 * self.dropped >= self.session.num_frames)
        return self._is_behind and not was_behind

    def ask(self, text: str, *, now: bool = True) -> None:
        """Ask a question, to be answered at once or when the event happens."""
        with self.lock:
            self._make_room(text)
            if self.session.time is None:
                self.session.hear(text, reply_now=now)
            else:
                self.session.ask(text, reply_now=now)
            self.last_active = clock.monotonic()

    def while_speaking(self, work: Callable[[], Any], pool: Executor) -> Generator[None, None, Any]:
        """
        Call a function in a thread, under the viewer's lock. Yield when the reply in progress has new words.

        Args:
            work (`Callable`): What to call, such as [`~Viewer.ask`]. It goes on if the caller stops to iterate.
            pool (`Executor`): Runs it.

        Returns:
            What `work` returns, as the value of the generator.
        """
        news = threading.Event()

        def run() -> Any:
            with self.lock:
                self.on_words = news.set
                return work()

        done = pool.submit(run)
        done.add_done_callback(lambda _: news.set())
        while True:
            news.wait()
            news.clear()
            if done.done():
                return done.result()
            yield

    def _open(self, video: str | Path, **options: Any) -> Any:
        return self.processor.open_video(video, formats=FORMATS, max_pixels=Limits.pixels, **options)

    def set_interval_threshold(self, interval_threshold: float) -> None:
        """Set the threshold from the next frame on, without waiting for the lock."""
        self.interval_threshold = self.session.interval_threshold = interval_threshold

    @property
    def events(self) -> list[Any]:
        """All events so far."""
        return [*self._past, *self.session.events]

    @property
    def is_busy(self) -> bool:
        """Whether another thread works on the stream."""
        is_free = self.lock.acquire(blocking=False)
        if is_free:
            self.lock.release()
        return not is_free

    @property
    def words(self) -> str:
        """Words so far of the reply in progress, empty between replies."""
        # A finished reply is an event, and would be shown twice.
        number, words = self._words
        return words if number == len(self.session.events) else ""

    @property
    def waiting(self) -> float | None:
        """Second of the file's next frame, `None` at its end."""
        return None if self._next is None else self._next[0]

    @property
    def ended(self) -> bool:
        """Whether the file has no more frames."""
        return self.video is not None and self._next is None

    @property
    def end(self) -> float:
        """End of the last caption at the latest: the file's length, or for a camera the end of its last frame."""
        if self.video is not None:
            with self._open(self.video) as reader:
                return reader.seconds
        return (self.session.time or 0.0) + 1 / self.fps

    def cost(self) -> Any:
        """
        Return the language model's cost of what the stream remembers, and at full compute; see the config's
        `estimate_cost`.
        """
        config, frames = self.model.config, self.session.num_remembered
        text = max(int(self.session.cache.get_seq_length()) - frames * config.frame_num_tokens, 0)
        return config.estimate_cost(frames, text, bytes_per_value=self.model.dtype.itemsize)

    def close(self) -> None:
        """Free the stream's memory. Its events stay."""
        self._next = None  # Ends a running call after its frame.
        with self.lock:
            self._frames, self._next = iter(()), None
            self.session.closed = True
            self.session.cache = self.model.new_cache()
            self._folder.cleanup()

    def _new_session(self) -> Any:
        options = {"fps": self.fps, "interval_threshold": self.interval_threshold, "output_router_scores": True}
        options["streamer"] = Words(self.processor.tokenizer, self._hear)
        # On a GPU the first person would wait for a compilation, for minutes, while the camera's frames are dropped.
        options["compile"] = False
        session = self.model.stream(self.processor, **options, **self.speaking)
        self._words = (-1, "")
        if self.query.strip() and (self.query != NARRATE or session.speak == "learned"):
            session.ask(self.query[:MOST_TYPED], reply_now=False)
        return session

    def _hear(self, text: str) -> None:
        number, words = len(self.session.events), self.words
        # Older streamers pass on the space before the first word alone.
        if text := words + text if words else text.lstrip():
            self._words = (number, text)
            self.on_words()

    def _make_room(self, text: str = "") -> None:
        """Replace a session that has filled the model's context."""
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
    Show a video to several models, each frame to one after the other, so that all share the machine equally.

    Args:
        models (sequence of [`VideoLLMMoDForConditionalGeneration`]): The models.
        processor ([`VideoLLMMoDProcessor`]): Their processor.
        video (`str` or `Path`): The video.
        fps (`float`, *optional*, defaults to 2.0): Frames per second to watch.
        end (`float`, *optional*): Second of the video at which to stop.

    Yields:
        `list[Viewer]`: One viewer per model, after each frame. The objects are the same each time.
    """
    viewers = [Viewer(model, processor, fps=fps) for model in models]
    for viewer in viewers:
        viewer.begin(video=video, end=end)
    while any(not viewer.ended for viewer in viewers):
        for viewer in viewers:
            viewer.watch_until(viewer.waiting or 0.0)
        yield viewers
