# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Many live streams on one model: which streams share a step, the threads, and the end of a stream."""

import os
import threading
import time as clock
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..checks_videollm_mod import check_count
from ..reading_ahead_videollm_mod import WHEN_BEHIND, check_when_behind
from ..streaming_videollm_mod import StepResult, StreamEvent, StreamingSession, StreamStep
from .captured_step import LONG_TEXT, NUM_FRAMES, CapturedSteps, whether_to_capture
from .encoding import FrameEncoder
from .faults import forget, run_in_parts
from .memory import (
    Room,
    allocate_pool,
    check_room,
    default_limits,
    device_of,
    most_pages,
    outgrown,
    reserve,
    room_of,
)
from .packed_cache import set_packed_attention
from .pages import OutOfPagesError, VideoLLMMoDPagedCache
from .saved_files import read
from .saving import options_of
from .stats import EngineStats
from .step import copy_to_host
from .step_runner import StepRunner
from .stream import EngineStream


logger = logging.get_logger(__name__)


class StreamingEngine:
    """
    Runs many streams on one model.

    Streams of any age, frame rate and state share steps: some see a frame, some read a question, some speak. Each
    stream's output is the same as that of a [`StreamingSession`]. The streams that waited longest come first.

    The engine allocates all cache memory at construction. Opening a stream reserves its share. On CUDA, captured
    steps take further memory when they are made, most of them by `warm_up`.

    As a context manager the engine runs in a thread. Otherwise [`~StreamingEngine.step`] runs one step.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, also one loaded with `trust_remote_code=True`.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        max_streams (`int`, *optional*, defaults to 8): Number of streams with the limits below to have memory for.
        max_frames (`int`, *optional*): Frames that a stream remembers unless `open` says otherwise. By default what
            the generation configuration says, else three quarters of the context, and at most 300 frames.
        max_text_tokens (`int`, *optional*): Text tokens that a stream remembers. By default half of what the frames
            leave of the context, at most 2048, or less if the generation configuration says so.
        max_new_tokens (`int`, *optional*, defaults to 100): Tokens of a stream's reply to have memory for.
        max_batch_tokens (`int`, *optional*): Most tokens of a step, except for frames of one stream and the text
            before them. Longer text is read in several steps. By default 2048, or one frame of each of `max_streams`
            if that is more.
        when_behind (`str`, *optional*, defaults to `"catch_up"`): What happens to frames that arrive faster than the
            engine sees them: `"catch_up"`, `"drop_oldest"` or `"block"`; see [`~EngineStream.push`].
        max_waiting (`int`, *optional*): Frames of a stream that may wait before `"catch_up"` refuses more,
            `"drop_oldest"` drops and `"block"` waits. By default 512, 16 and 16. They wait on the host as uint8 at
            the model's size, which is 0.44 MB at 384 x 384.
        cache_dtype (`torch.dtype`, *optional*): Dtype of stored keys and values, such as `torch.float8_e4m3fn`. By
            default the model's. On CUDA a step may copy the pages that it reads, converted to the model's dtype.
            Captured steps then copy as many pages as a stream may have.
        page_size (`int`, *optional*, defaults to 256): Entries per page of the cache.
        capture (`bool`, *optional*): Whether to replay steps as CUDA graphs, by default if the model is on one CUDA
            device. On a CPU, `True` runs steps padded to the same shapes.
        output_router_scores (`bool`, *optional*, defaults to `False`): Whether sessions keep the router scores and
            kept tokens of their last frame.
        compile_steps (`bool`, *optional*, defaults to `False`): Whether to compile captured steps with
            `torch.compile`, also on a CPU. [`~StreamingEngine.warm_up`] then takes minutes, and steps are faster. As
            with captured steps, weights may change in place, but nothing else about the model may change.

    Attributes:
        streams (`list[EngineStream]`): The open streams.
        pool ([`VideoLLMMoDPagePool`]): The memory of their caches.
        stats ([`EngineStats`]): What the engine has done so far.
        runner ([`StepRunner`]): Runs its steps.
        on_step (`Callable`, *optional*): Called in the engine's thread with the new events after each of its steps.

    Raises:
        `ValueError`: If a number is out of range, if steps are to be compiled but not captured, or if steps of a model
            on several devices are to be captured.

    Example:

    ```python
    >>> with StreamingEngine(model, processor, max_streams=16, max_frames=600) as engine:
    ...     stream = engine.open(fps=2, when_behind="drop_oldest")
    ...     stream.ask("Please narrate.", reply_now=False)
    ...     stream.push(frame)                              # from any thread, at any time
    ...     for event in stream:                            # in another thread
    ...         print(event.time, event.text)
    ```"""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_streams: int = 8,
        max_frames: int | None = None,
        max_text_tokens: int | None = None,
        max_new_tokens: int = 100,
        max_batch_tokens: int | None = None,
        when_behind: str = "catch_up",
        max_waiting: int | None = None,
        cache_dtype: torch.dtype | None = None,
        page_size: int = 256,
        capture: bool | None = None,
        output_router_scores: bool = False,
        compile_steps: bool = False,
    ) -> None:
        capture = whether_to_capture(model, capture, compile_steps)
        limits = default_limits(model, processor, max_frames, max_text_tokens)
        max_frames, max_text_tokens, self._remembered_text = limits
        if max_batch_tokens is None:
            max_batch_tokens = max(2048, max_streams * (model.config.frame_num_tokens + processor.frame_text_tokens))
        counts = {"max_streams": max_streams, "max_frames": max_frames, "max_text_tokens": max_text_tokens}
        counts |= {"max_batch_tokens": max_batch_tokens, "max_waiting": 1 if max_waiting is None else max_waiting}
        for name, count in (counts | {"max_new_tokens": max_new_tokens, "page_size": page_size}).items():
            check_count(name, count)
        check_when_behind(when_behind)
        self.model, self.processor = model, processor
        self.max_streams, self.max_frames, self.max_text_tokens = max_streams, max_frames, max_text_tokens
        self.max_batch_tokens = max_batch_tokens
        self.when_behind, self.max_waiting = when_behind, max_waiting
        self.device = device_of(model.get_input_embeddings())
        self.streams: list[EngineStream] = []
        self.stats = EngineStats()
        self.on_step: Callable[[list[tuple[EngineStream, StreamEvent]]], None] | None = None
        # Guards streams and their sessions, and announces every change.
        self.changed = threading.Condition(threading.RLock())
        # Held during a step and while captured steps are made.
        self._stepping = threading.RLock()
        self._stepping_thread = self._telling_thread = None

        frame_text = processor.frame_text_tokens
        room = Room.for_stream(max_frames, max_text_tokens, max_new_tokens, frame_text)
        # The dummy streams of captured steps see frames with their text, more text and one token.
        spare_room = Room(NUM_FRAMES[-1], NUM_FRAMES[-1] * frame_text + LONG_TEXT + 1) if capture else Room(0, 0)
        self.pool = allocate_pool(model, max_streams, room, spare_room, page_size=page_size, dtype=cache_dtype)
        set_packed_attention(model.model.language_model)
        scores = {"output_router_scores": output_router_scores}
        self._captured = self._new_steps(room, spare_room, compile_steps, **scores) if capture else None
        self.runner = StepRunner(model, self.pool, self._captured, self.device, self.stats, **scores)
        self._encoder = FrameEncoder(model, processor, device_of(model.base_model.vision_encoder))
        self._num_opened = 0
        # Captured steps have taken theirs.
        self._num_pages = {kind: len(pages) for kind, pages in self.pool.free.items()}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._error: BaseException | None = None

    def _new_steps(self, room: Room, spare_room: Room, is_compiled: bool, **options: Any) -> CapturedSteps:
        """Return the captured steps of streams with a room, with pages for their dummy streams."""
        spare = VideoLLMMoDPagedCache(self.pool)
        spare.reserve(*spare_room)
        given = (self.model, self.pool, spare, most_pages(self.pool, room, spare), self.device)
        frame_ids = self.processor.encode_typical_frame()
        return CapturedSteps(*given, frame_ids=frame_ids, is_compiled=is_compiled, **options)

    # ---------------------------------------------------------------------------------------------------- streams

    def open(
        self,
        *,
        max_frames: int | None = None,
        max_text_tokens: int | None = None,
        when_behind: str | None = None,
        max_waiting: int | None = None,
        **options: Any,
    ) -> EngineStream:
        """
        Open a stream and reserve its memory.

        Args:
            max_frames (`int`, *optional*): Frames that it remembers, by default the engine's.
            max_text_tokens (`int`, *optional*): Text tokens that it remembers, by default the engine's.
            when_behind (`str`, *optional*): By default the engine's.
            max_waiting (`int`, *optional*): By default the engine's, or the default of `when_behind`.
            options: Other options of [`StreamingSession`].

        Raises:
            `EngineFullError`: If there is not enough memory left for it, also when streams that were closed with
                `discard` have ended. It is a [`TooLargeError`] if there would be too little without any other stream.
            `ValueError`: If an option is invalid.
            `RuntimeError`: If an error has ended the engine's thread; it is the cause.
        """
        when_behind = self.when_behind if when_behind is None else when_behind
        max_waiting = self.max_waiting if max_waiting is None else max_waiting
        check_when_behind(when_behind)
        max_waiting = WHEN_BEHIND[when_behind] if max_waiting is None else max_waiting
        check_count("max_waiting", max_waiting)
        room = self.max_text_tokens if max_text_tokens is None else max_text_tokens
        limits = {
            "max_frames": self.max_frames if max_frames is None else max_frames,
            "max_text_tokens": self._remembered_text if max_text_tokens is None else max_text_tokens,
        }
        with self.changed:
            cache = VideoLLMMoDPagedCache(self.pool)
            session = StreamingSession(self.model, self.processor, cache=cache, **limits, **options)
            if self._captured is not None:
                session.chunk_frames = min(session.chunk_frames, NUM_FRAMES[-1])
            check_room(self.pool, self._num_pages, room_of(session, room), room_of(session, self.max_text_tokens))
            reserve(self, cache, session, room)
            if self._error is not None:  # it may have come while this waited for memory
                cache.release()
                raise RuntimeError(f"The engine has stopped: {self._error}") from self._error
            stream = EngineStream(self, session, when_behind, max_waiting, self._num_opened)
            self._num_opened += 1
            self.streams.append(stream)
            return stream

    def restore(
        self,
        folder: str | os.PathLike,
        *,
        speak: Callable[..., bool | str | None] | None = None,
        streamer: Any | None = None,
        logits_processor: Any | None = None,
        pause: bool = False,
    ) -> EngineStream:
        """
        Open a saved stream or session. It goes on as [`restore_session`] describes.

        Args:
            folder (`str` or `Path`): Where [`~EngineStream.save`] or [`save_session`] has written. The engine may have
                other limits than the one before.
            speak, streamer, logits_processor (*optional*): As for [`restore_session`].
            pause (`bool`, *optional*, defaults to `False`): Whether the stream waits until its
                [`~EngineStream.resume`] is called.

        Returns:
            [`EngineStream`]: The stream. Iterating over it gives later events; `events` also has the earlier ones.

        Raises:
            `EngineFullError`: If there is not enough memory left.
            `FileNotFoundError`: If the folder holds no saved session.
            `ValueError`: As for [`restore_session`], and for a session without `max_frames`.
        """
        saved = read(folder, self.model)
        options = options_of(saved, speak) | {"streamer": streamer, "logits_processor": logits_processor}
        if options["max_frames"] is None or options["max_text_tokens"] is None:
            raise ValueError("This session has no limit: an engine needs `max_frames` and `max_text_tokens`.")
        options |= {name: saved.state[name] for name in ("when_behind", "max_waiting") if name in saved.state}
        if options["max_text_tokens"] == self._remembered_text:
            options["max_text_tokens"] = None  # new text needs memory before old text goes, as at first
        with self.changed:
            stream = self.open(**options)
            stream.go_on(saved, pause=pause)
            return stream

    # ------------------------------------------------------------------------------------------------------- work

    def step(self) -> list[tuple[EngineStream, StreamEvent]]:
        """
        Encode frames that wait, and run one step of the language model for the streams that need one.

        Returns:
            `list[tuple[EngineStream, StreamEvent]]`: The new events. Empty, immediately, if there is no work.
        """
        if self.is_inside_step:
            raise RuntimeError("A streamer cannot run a step of the engine that calls it.")
        with self._stepping:
            self._stepping_thread = threading.get_ident()
            try:
                batch = self._choose_batch() if self._encoder.is_concurrent else []
                if not batch:
                    self._encode()
                    batch = self._choose_batch()
                if batch:
                    self._run_batch(batch)
                return self._collect()
            finally:
                self._stepping_thread = None

    @property
    def is_inside_step(self) -> bool:
        """Whether the caller is a streamer, or other code of a stream, that the engine calls during a step."""
        return threading.get_ident() in (self._stepping_thread, self._telling_thread)

    def take_in(self, frames: Any) -> torch.Tensor:
        """Return frames given to a stream as they wait; see [`FrameEncoder.take_in`]."""
        return self._encoder.take_in(frames)

    def run(self) -> list[tuple[EngineStream, StreamEvent]]:
        """Run steps until no stream has work. Returns the new events."""
        said = self.step()
        while self.has_work:
            said += self.step()
        return said

    @property
    def is_running(self) -> bool:
        """Whether the engine runs in a thread."""
        return self._thread is not None and self._thread.is_alive()

    def make_progress(self, until: Callable[[], bool]) -> None:
        """Run a step, or if the engine runs in a thread, wait until a condition holds, at most a second."""
        if not self.is_running:
            self.step()
        else:
            with self.changed:
                self.changed.wait_for(until, timeout=1)

    @property
    def has_work(self) -> bool:
        """Whether a frame waits, a question is due, a reply is unfinished or a closed stream has not ended."""
        with self.changed:
            return any(stream.is_pending for stream in self.streams)

    def _choose_batch(self) -> list[tuple[EngineStream, StreamStep]]:
        """Return the streams of the next step, those that waited longest first, up to the tokens of a step."""
        with self.changed:
            batch: list[tuple[EngineStream, StreamStep]] = []
            total = 0
            for stream in [stream for stream in self.streams if not stream.is_done]:
                step = self._next_step(stream)
                if step is None or (batch and total + len(step.ids) > self.max_batch_tokens):
                    continue
                if self._reserve_step(stream, step):
                    batch.append((stream, step))
                    total += len(step.ids)
            served = {id(stream) for stream, _ in batch}
            # The sort is stable: a stream that was not served comes first next time.
            self.streams.sort(key=lambda stream: id(stream) in served)
            return batch

    def _next_step(self, stream: EngineStream) -> StreamStep | None:
        try:
            return stream.next_step()
        except Exception as error:  # an error in a stream's own processor or streamer ends that stream only
            self._fail(stream, error)
            return None

    def _reserve_step(self, stream: EngineStream, step: StreamStep) -> bool:
        """Take the pages for a stream's next step. A stream that gets none ends, and the others continue."""
        try:
            stream.session.cache.make_room(len(step.ids), step.num_frames)
        except OutOfPagesError as error:
            self._fail(stream, error)
            return False
        return True

    def _run_batch(self, batch: list[tuple[EngineStream, StreamStep]]) -> None:
        """Run one step of the language model and give each stream its result, or end it by its own fault."""
        results = run_in_parts(self._run_steps, batch, self.device)
        with self.changed:
            for (stream, _), result in zip(batch, results, strict=True):
                if stream.is_done:
                    stream.session.cache.release()  # a later frame of it could not be encoded
                elif isinstance(result, Exception):
                    self._fail(stream, result)
                else:
                    self._give(stream, result)

    def _run_steps(self, batch: Sequence[tuple[EngineStream, StreamStep]]) -> list[StepResult]:
        caches, steps = [stream.session.cache for stream, _ in batch], [step for _, step in batch]
        plan, outputs = self.runner.launch(caches, steps)
        if self._encoder.is_concurrent:
            # The vision encoder runs beside the language model. What the host reads is copied first, so that the
            # streams do not wait for the encoder.
            outputs, copied = copy_to_host(outputs)
            self._encode()
            copied.synchronize()
        return self.runner.finish(plan, outputs, caches, steps)

    def _give(self, stream: EngineStream, result: StepResult) -> None:
        session = stream.session
        num_events, num_frames = len(session.events), session.num_frames
        try:
            stream.give(result)
        except Exception as error:  # an error in a stream's own processor or streamer ends that stream only
            self._fail(stream, error)
            return
        if session.num_frames > num_frames:
            self.stats.frame_latencies.extend(session.frame_latencies)
        self.stats.count_events(session.events[num_events:])

    def _fail(self, stream: EngineStream, error: Exception) -> None:
        """End a stream because of its own error. A stream that has already ended stays as it is."""
        if stream.is_done:
            return
        if isinstance(error, OutOfPagesError):
            error = outgrown(error, stream.session)
        logger.warning(f"Stream {stream.number} was ended: {error}{forget(error)}")
        stream.end(error)

    def _collect(self) -> list[tuple[EngineStream, StreamEvent]]:
        """Return the new events of all streams, and end the streams that are finished."""
        said: list[tuple[EngineStream, StreamEvent]] = []
        with self.changed:
            for stream in list(self.streams):
                said += [(stream, event) for event in stream.collect()]
                stream.end_if_finished()
                if stream.is_done:
                    self.streams.remove(stream)
                    stream.stop_listeners()
            self.changed.notify_all()
        return said

    def _encode(self) -> None:
        """Encode frames that wait, for each stream as many as it sees in one step."""
        with self.changed:
            chosen = [(stream, frame) for stream in self.streams for frame in stream.take_received()]
        encoded = self._encoder.encode(chosen)
        with self.changed:
            for (stream, frame), features in zip(chosen, encoded, strict=True):
                if isinstance(features, Exception):
                    self._fail(stream, features)
                else:
                    stream.receive(features, frame)

    # ---------------------------------------------------------------------------------------------------- warm up

    def warm_up(self, max_streams: int = 1) -> None:
        """
        Make the captured steps that live streams need most, so that no stream waits for them. A progress bar shows
        which attention kernels are used. This does nothing if steps are not captured.

        The steps are, for up to `max_streams` streams: one frame per stream, one token per stream, both at once, each
        with some text; and several frames of one stream that catches up.
        """
        if self._captured is not None:
            self._captured.warm_up(max_streams, self._stepping)

    # ---------------------------------------------------------------------------------------------------- thread

    def __enter__(self) -> "StreamingEngine":
        self.warm_up(self.max_streams)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="StreamingEngine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all open streams. Frames and questions that still wait are discarded."""
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self._thread.join()
        self._thread = None
        self._end_all()
        forget(self._error)

    def _end_all(self, error: BaseException | None = None) -> None:
        with self.changed:
            self._error = error or self._error
            for stream in self.streams:
                stream.collect()
                stream.end(error)
                stream.stop_listeners()
            self.streams = []
            self.changed.notify_all()

    def _wait_for_work(self) -> bool:
        with self.changed:
            self.stats.busy_since = None
            self.changed.wait_for(lambda: self._stopping or self.has_work)
            self.stats.busy_since = clock.monotonic()
            return not self._stopping

    def _serve(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread starts with the first one
        try:
            while self._wait_for_work():
                self._tell(self.step())
        except BaseException as error:  # also `SystemExit`, which a streamer may raise
            # A thread that waits for an event must learn that none will come.
            self._end_all(error)
            self._tell([])
            raise

    def _tell(self, said: list[tuple[EngineStream, StreamEvent]]) -> None:
        on_step = self.on_step  # another thread may remove it
        if on_step is not None:
            self._telling_thread = threading.get_ident()
            try:
                on_step(said)
            finally:
                self._telling_thread = None


__all__ = ["StreamingEngine"]
