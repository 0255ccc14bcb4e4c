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
"""Many live streams on one model: their frames and their words share steps, and their caches one memory."""

import gc
import queue
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..streaming_videollm_mod import (
    StepResult,
    StreamEvent,
    StreamingSession,
    StreamStep,
    Work,
    decide,
    within_context,
)
from ..video_reading_videollm_mod import WHEN_BEHIND, TooManyWaitingError, check_when_behind
from .attention import PackedCaches, StepNumbers, attention_in_use, set_packed_attention
from .pages import OutOfPagesError, VideoLLMMoDPagedCache, new_page_pool


logger = logging.get_logger(__name__)

# Streams of a captured step come in these numbers, the rest is filled up; frames of a stream in these.
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_FRAMES = (1, 2, 4, 8)
# Tokens of text that it may read beside: what opens and closes a reply, and a question.
_FEW, _MANY = 4, 32
# Multiplications of a product that compiled code on a CPU sums up by itself: with more of them a library is faster,
# sooner in 16 bits, for which processors have units of their own. One row of 32 bits is faster at any size.
_SUMMED, _SUMMED_IN_16_BITS = 2**20, 2**19
# Frames that the vision encoder sees at once at most: what it takes for more nobody has set aside.
_ENCODED = 64
# A process captures one graph at a time.
_CAPTURING = threading.Lock()


class EngineFullError(RuntimeError):
    """A stream was refused, since its memory is not there."""


@dataclass
class EngineStats:
    """
    What an engine did so far.

    Attributes:
        steps (`int`): Steps of the language model.
        shared_steps (`int`): Those of them in which several streams took part.
        mixed_steps (`int`): Those in which some streams saw frames while others spoke.
        captured_steps (`int`): Those that ran as a captured one, on CUDA by replaying its graph.
        frames (`int`): Frames seen by the language model, those seen again after a reply included.
        tokens (`int`): Tokens of replies.
        dropped (`int`): Frames dropped.
        refused (`int`): Streams refused.
        frame_latencies (`deque[float]`): Seconds from a frame's arrival to the decision on it, the last 10,000.
        first_word_latencies (`deque[float]`): Seconds from a frame's or question's arrival to the first token of what
            is said to it, the last 10,000.
    """

    steps: int = 0
    shared_steps: int = 0
    mixed_steps: int = 0
    captured_steps: int = 0
    frames: int = 0
    tokens: int = 0
    dropped: int = 0
    refused: int = 0
    frame_latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    first_word_latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))


class _Shape(NamedTuple):
    """What a captured step has room for."""

    seeing: int
    """Streams that see frames."""
    frames: int
    """How many each of them sees; all together fewer by one stream's at most."""
    speaking: int
    """Streams that take a token of text."""
    reading: int = 0
    """Further tokens of text of any of these streams: before a frame, or with the one that it takes."""


@dataclass
class _Received:
    time: float
    pixel_values: torch.Tensor
    arrival: float


class EngineStream:
    """
    One stream of a [`StreamingEngine`]: what a [`StreamingSession`] is, but the engine does the work.

    `push` and `ask` take in and return at once; what is said comes by iterating, or from the engine's steps.

    Attributes:
        session ([`StreamingSession`]): Its state, with the figures of a stream.
        error (`Exception`, *optional*): What ended it, if it was not closed.
    """

    def __init__(
        self, engine: "StreamingEngine", session: StreamingSession, when_behind: str, max_waiting: int, number: int
    ) -> None:
        self.session = session
        self.when_behind, self.max_waiting, self.number = when_behind, max_waiting, number
        self.error: Exception | None = None
        self._engine = engine
        self._received: deque[_Received] = deque()
        self._work: Work | None = None
        self._step: StreamStep | None = None
        self._said: queue.SimpleQueue[StreamEvent | None] = queue.SimpleQueue()
        self._num_said = 0
        self._num_encoding = 0
        # Frames of two calls of `push` at once must not come between each other.
        self._pushing = threading.Lock()
        self._is_closing = False
        self._is_done = False

    @property
    def events(self) -> list[StreamEvent]:
        """All that was said."""
        return list(self.session.events)

    @property
    def num_dropped(self) -> int:
        """Number of frames dropped because the engine was behind."""
        return self.session.num_dropped

    @property
    def num_waiting(self) -> int:
        """Number of frames received but not seen yet."""
        return 0 if self._is_done else len(self._received) + self._num_encoding + self.session.num_waiting

    @property
    def is_done(self) -> bool:
        """Whether it is closed and all is said."""
        return self._is_done

    def push(self, frames: Any, *, time: float | Sequence[float] | None = None) -> None:
        """
        Takes in frames; arguments are those of [`~StreamingSession.push`].

        Frames that come faster than they can be seen wait, and are seen several at a time. Where more than
        `max_waiting` would, what happens is up to `when_behind`: with `"catch_up"` they are refused, all of this call;
        with `"drop_oldest"` the oldest is dropped and counted; with `"block"` this call waits.

        Raises:
            `TooManyWaitingError`: If with these more than `max_waiting` would wait to catch up. The stream's time does
                not go on by them: give `time` of the next, if these are left out.
            `ValueError`: If the frames do not have that form, times do not increase, or the stream is closed.
            `RuntimeError`: If the stream was ended by an error, which is its cause.
        """
        self._refuse_if_closed()
        arrival = clock.perf_counter()
        with self._engine.changed:
            self._refuse_too_many()  # before anybody works on them
        # On the host, wherever they come from: all streams' frames go to the device together.
        pixel_values = self.session.processor.process_frames(frames).cpu()
        with self._pushing:
            with self._engine.changed:
                self._refuse_too_many(len(pixel_values))
                pixel_values, times = self.session.sample(pixel_values, time)
            for at, frame in zip(times, pixel_values, strict=True):
                # One that waits longer must not keep the memory of all that came with it.
                own = frame.clone() if len(times) > 1 else frame
                self._make_room()
                with self._engine.changed:
                    self._refuse_if_closed()
                    self._received.append(_Received(at, own, arrival))
                    self._engine.changed.notify_all()

    def ask(self, text: str, *, time: float | None = None, reply_now: bool = True, interrupt: bool = False) -> None:
        """
        Takes in a question; arguments are those of [`~StreamingSession.ask`]. With `interrupt` a reply that is being
        generated ends, and the question comes before the frames that wait.

        Raises:
            `ValueError`: If the text is empty, the time lies before what was seen or asked, or the stream is closed.
            `RuntimeError`: If the stream was ended by an error, which is its cause.
        """
        self._refuse_if_closed()
        with self._engine.changed:
            self.session.hear(text, time=time, reply_now=reply_now, interrupt=interrupt)
            self._engine.changed.notify_all()

    def close(self) -> None:
        """
        Takes in no more; what was taken in is still seen and answered. Then its memory is given back, and its cache is
        empty.
        """
        with self._engine.changed:
            self._is_closing = True
            self._engine.changed.notify_all()

    def __iter__(self) -> Iterator[StreamEvent]:
        """
        What is said, as it is said: until the stream is closed and done, or, of an engine that does not run by itself,
        until there is nothing more to do.
        """
        while True:
            while self._said.empty() and not self._engine.is_running:
                if not self._engine.has_work:
                    return
                self._engine.step()
            event = self._said.get()
            if event is None:
                self._said.put(None)  # for whoever else listens
                break
            yield event
        if self.error is not None:
            raise RuntimeError(f"The stream was ended: {self.error}") from self.error

    def _refuse_too_many(self, new: int = 1) -> None:
        if self.when_behind != "catch_up" or self.num_waiting + new <= self.max_waiting:
            return
        if new > self.max_waiting:
            raise TooManyWaitingError(
                f"{new} frames at once are more than may wait, {self.max_waiting}. Push fewer at a time, or open the "
                'stream with a larger `max_waiting` or `when_behind="block"`, which waits.'
            )
        raise TooManyWaitingError(
            f"{self.num_waiting} frames of this stream wait, and its `max_waiting` is {self.max_waiting}. Push these "
            'later, or open the stream with `when_behind="block"`, which waits, or `"drop_oldest"`.'
        )

    def _make_room(self) -> None:
        if self.when_behind == "drop_oldest":
            with self._engine.changed:
                while self.num_waiting >= self.max_waiting and self._drop_oldest():
                    self._engine.stats.dropped += 1
        elif self.when_behind == "block":
            while not self._has_room():
                self._engine.go_on(self._has_room)

    def _has_room(self) -> bool:
        return self._is_done or self.num_waiting < self.max_waiting

    def _drop_oldest(self) -> bool:
        # Those that are encoded already came before those that are not.
        if self.session.drop_oldest():
            return True
        if self._received:
            self._received.popleft()
            self.session.count_dropped()
            return True
        return False

    def _refuse_if_closed(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"The stream was ended: {self.error}") from self.error
        if self._is_closing:
            raise ValueError("This stream is closed; open another with `engine.open()`.")

    # ------------------------------------------------------------------------------- for the engine, under its lock

    def _next_step(self) -> StreamStep | None:
        """What it needs from the model next, or `None` if it has nothing to do."""
        while self._step is None:
            to_the_end = self._is_closing and not self._received
            if self._work is None and self.session.has_work(to_the_end=to_the_end):
                self._work = self.session.work(to_the_end=to_the_end)
                self._step = next(self._work, None)
                self._work = None if self._step is None else self._work
            elif self._work is None:
                return None
        return self._step

    def _take(self, result: StepResult) -> None:
        try:
            self._step = self._work.send(result)
        except StopIteration:
            self._step = self._work = None

    def _collect(self) -> list[StreamEvent]:
        """What was said since the last time."""
        new = self.session.events[self._num_said :]
        self._num_said += len(new)
        for event in new:
            self._said.put(event)
        return new

    def _end(self, error: Exception | None = None) -> None:
        self.error, self._is_done, self._is_closing = error, True, True
        self._received.clear()
        self._step = self._work = None
        self.session.closed = True
        self.session.cache.release()


class StreamingEngine:
    """
    Runs many streams on one model.

    Sessions of any age, frame rate and state share steps: those that see a frame, those that read a question and those
    that speak are laid in one row, each over its own pages of one memory, and each says what it would say alone. The
    least recently served come first. All memory of caches is taken when the engine is made, and a stream's when it is
    opened: one that would not fit is refused. On CUDA captured steps take theirs as they are made, by `warm_up` most.

    Used as a context it runs by itself, in a thread; else [`~StreamingEngine.step`] makes it go on.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        max_streams (`int`, *optional*, defaults to 8): How many streams of the sizes below to have memory for.
        max_frames (`int`, *optional*): Frames that a stream remembers, unless it is opened otherwise. By default up to
            300, within three quarters of the language model's context.
        max_text_tokens (`int`, *optional*): Tokens of text that it remembers, by default up to 2048, within half of
            what frames leave of the context.
        max_batch_tokens (`int`, *optional*): Most tokens of a step, but for one of a single stream. By default 2048,
            or a frame of each of `max_streams`, if that is more.
        when_behind (`str`, *optional*, defaults to `"catch_up"`): What happens to frames that come faster than they
            can be seen: `"catch_up"`, `"drop_oldest"` or `"block"`; see [`~EngineStream.push`].
        max_waiting (`int`, *optional*): How many frames of a stream may wait, as float32 pixels on the host, before
            `"catch_up"` refuses more, `"drop_oldest"` drops and `"block"` waits. By default 512, 16 and 16.
        cache_dtype (`torch.dtype`, *optional*): That of keys and values as stored, such as `torch.float8_e4m3fn`; by
            default that of the model.
        page_size (`int`, *optional*, defaults to 256): Entries of a page of the cache.
        capture (`bool`, *optional*): Whether to replay steps as CUDA graphs. By default where the model is on CUDA.
            On a CPU `True` runs the same code, filled up to the same shapes, uncaptured.
        compile_steps (`bool`, *optional*, defaults to `False`): Whether to have `torch.compile` make the captured
            steps, so that [`~StreamingEngine.warm_up`] takes much longer and the steps less, on a CPU too. As with
            captured steps, weights may change in place, but nothing else about the model may.

    Attributes:
        streams (`list[EngineStream]`): Those open.
        pool ([`VideoLLMMoDPagePool`]): The memory of their caches.
        stats ([`EngineStats`]): What it did so far.

    Raises:
        `ValueError`: If a number is out of range, or steps are to be compiled and not captured.

    Example:

    ```python
    >>> with StreamingEngine(model, processor, max_streams=16, max_frames=600) as engine:
    ...     stream = engine.open(fps=2, when_behind="drop_oldest")
    ...     stream.ask("Please narrate.", reply_now=False)
    ...     stream.push(frame)                              # from any thread, at any time
    ...     for event in stream:                            # in another
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
        max_batch_tokens: int | None = None,
        when_behind: str = "catch_up",
        max_waiting: int | None = None,
        cache_dtype: torch.dtype | None = None,
        page_size: int = 256,
        capture: bool | None = None,
        compile_steps: bool = False,
    ) -> None:
        if compile_steps and capture is False:
            raise ValueError("`compile_steps` is for captured steps: leave `capture` out, or set it to `True`.")
        if max_frames is None:
            max_frames = min(within_context(model.config)["max_frames"], 300)
        if max_text_tokens is None:
            max_text_tokens = min(within_context(model.config, max_frames)["max_text_tokens"], 2048)
        if max_batch_tokens is None:
            max_batch_tokens = max(2048, max_streams * (model.config.frame_num_tokens + 1))
        numbers = {
            "max_streams": max_streams,
            "max_frames": max_frames,
            "max_text_tokens": max_text_tokens,
            "max_batch_tokens": max_batch_tokens,
            "max_waiting": 1 if max_waiting is None else max_waiting,
            "page_size": page_size,
        }
        _check_positive(**numbers)
        check_when_behind(when_behind)
        self.model, self.processor = model, processor
        self.max_streams, self.max_frames, self.max_text_tokens = max_streams, max_frames, max_text_tokens
        self.max_batch_tokens = max_batch_tokens
        self.when_behind, self.max_waiting = when_behind, max_waiting
        self.device = model.get_input_embeddings().weight.device
        self.streams: list[EngineStream] = []
        self.stats = EngineStats()
        self.changed = threading.Condition(threading.RLock())

        # A stream's pages are its own: what is left of the last counts for each.
        frames, text = self._room(max_frames, max_text_tokens)
        capture = self.device.type == "cuda" or compile_steps if capture is None else capture
        self.compile_steps = compile_steps
        spare = (_FRAMES[-1], _FRAMES[-1] + _MANY + 1) if capture else (0, 0)
        self.pool = new_page_pool(
            model,
            max_streams * frames + spare[0],
            max_streams * (text + page_size - 1) + spare[1] + page_size - 1,
            page_size=page_size,
            dtype=cache_dtype,
        )
        text_config = model.config.text_config
        heads = text_config.num_key_value_heads
        dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        for layer, module in enumerate(model.model.language_model.layers):
            weight = next(module.parameters())
            self.pool.allocate(layer, heads, dim, model.get_input_embeddings().weight.dtype, weight.device)
        set_packed_attention(model.model.language_model)
        self._captured: dict[_Shape, _CapturedStep] | None = {} if capture else None
        # What fills a captured step up to its shape writes into pages that nobody reads.
        self._spare = VideoLLMMoDPagedCache(self.pool)
        self._spare.reserve(*spare)
        # One page more than is reserved, so that what a stream says beyond it need not be read uncaptured.
        tokens = frames * self.pool.num_tokens + text
        entries = {kind: self.pool.num_entries(kind, tokens, frames) for kind in self.pool.num_pages}
        self._most_pages = {
            kind: max(-(-count // page_size) + 1, len(self._spare.tables[kind].pages))
            for kind, count in entries.items()
        }
        # Tokens of a frame and of what parts it from the one before.
        self._frame_length = model.config.frame_num_tokens + (model.config.frame_token_interval_id is not None)
        # Streams that captured steps were warmed up for.
        self._warm_size = 0
        self._num_opened = 0
        self._thread: threading.Thread | None = None
        self._stopping = False
        is_cuda = self.device.type == "cuda"
        self._vision_stream = torch.cuda.Stream(self.device) if is_cuda else None
        self._graph_pool = torch.cuda.graph_pool_handle() if is_cuda and capture else None
        self._capture_stream = torch.cuda.Stream(self.device) if is_cuda and capture else None
        self._error: Exception | None = None
        # One step at a time, and no capture beside it.
        self._stepping = threading.RLock()

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
        Admits a stream.

        Args:
            max_frames (`int`, *optional*): Frames that it remembers, by default the engine's.
            max_text_tokens (`int`, *optional*): Tokens of text that it remembers, by default the engine's.
            when_behind (`str`, *optional*): By default the engine's.
            max_waiting (`int`, *optional*): By default the engine's, or what is usual with `when_behind`.
            options: Others of [`StreamingSession`].

        Raises:
            `EngineFullError`: If there is no memory for it.
            `ValueError`: If an option does not fit.
            `RuntimeError`: If the engine's thread was ended by an error, which is its cause.
        """
        if self._error is not None:
            raise RuntimeError(f"The engine has stopped: {self._error}") from self._error
        when_behind = self.when_behind if when_behind is None else when_behind
        max_waiting = self.max_waiting if max_waiting is None else max_waiting
        check_when_behind(when_behind)
        max_waiting = WHEN_BEHIND[when_behind] if max_waiting is None else max_waiting
        _check_positive(max_waiting=max_waiting)
        max_frames = self.max_frames if max_frames is None else max_frames
        max_text_tokens = self.max_text_tokens if max_text_tokens is None else max_text_tokens
        with self.changed:
            cache = VideoLLMMoDPagedCache(self.pool)
            session = StreamingSession(
                self.model,
                self.processor,
                max_frames=max_frames,
                max_text_tokens=max_text_tokens,
                cache=cache,
                **options,
            )
            if self._captured is not None:
                session.chunk_frames = min(session.chunk_frames, _FRAMES[-1])
            try:
                cache.reserve(*self._room(max_frames, max_text_tokens, session.max_new_tokens))
            except OutOfPagesError as error:
                self.stats.refused += 1
                raise EngineFullError(
                    f"No room for another stream of {max_frames} frames and {max_text_tokens} tokens of text beside "
                    f"the {len(self.streams)} that are open: {error} Close a stream, open this one with a smaller "
                    "`max_frames`, or make the engine with a larger `max_streams`."
                ) from None
            stream = EngineStream(self, session, when_behind, max_waiting, self._num_opened)
            self._num_opened += 1
            self.streams.append(stream)
            return stream

    @staticmethod
    def _room(max_frames: int, max_text_tokens: int, max_new_tokens: int = 100) -> tuple[int, int]:
        """Frames and other tokens that a stream's pages are taken for."""
        # Beside what is remembered, each frame's separator, and a reply with what opens it: only frames make room.
        return max_frames, max_text_tokens + max_frames + max_new_tokens + 16

    # ------------------------------------------------------------------------------------------------------- work

    def step(self) -> list[tuple[EngineStream, StreamEvent]]:
        """
        Encodes frames that wait, runs one step of the language model for the streams that need one, and gives what was
        said. Nothing to do gives nothing, at once.
        """
        with self._stepping:
            return self._step()

    def _step(self) -> list[tuple[EngineStream, StreamEvent]]:
        batch = [] if self._vision_stream is None else self._choose_batch()
        if not batch:
            self._encode()
            batch = self._choose_batch()
        said: list[tuple[EngineStream, StreamEvent]] = []
        if batch:
            row, outputs = self._launch([stream.session.cache for stream, _ in batch], [step for _, step in batch])
            if self._vision_stream is not None:
                # While the language model is at it, the vision encoder sees what comes next. What was decided is on
                # its way before, so that nobody waits for the encoder to hear it.
                decisions = torch.empty(outputs[0].shape, dtype=outputs[0].dtype, pin_memory=True)
                decisions.copy_(outputs[0], non_blocking=True)
                decided = torch.cuda.Event()
                decided.record()
                self._encode()
                decided.synchronize()
                outputs = (decisions, *outputs[1:])
            results = row.results(outputs)
            with self.changed:
                for (stream, _), result in zip(batch, results, strict=True):
                    self._give(stream, result)
        with self.changed:
            for stream in list(self.streams):
                said += [(stream, event) for event in stream._collect()]
                if stream._is_closing and not stream._received and not stream._is_done and not self._has_work(stream):
                    stream._end()
                if stream._is_done:
                    self.streams.remove(stream)
                    stream._said.put(None)
            self.changed.notify_all()
        return said

    def run(self) -> list[tuple[EngineStream, StreamEvent]]:
        """Steps until no stream has anything to do; gives what was said."""
        said = self.step()
        while self.has_work:
            said += self.step()
        return said

    @property
    def is_running(self) -> bool:
        """Whether it runs by itself, in a thread."""
        return self._thread is not None and self._thread.is_alive()

    def go_on(self, until: Callable[[], bool]) -> None:
        """Makes the next step, or, where the engine runs by itself, waits until something is so, a second at most."""
        if not self.is_running:
            self.step()
        else:
            with self.changed:
                self.changed.wait_for(until, timeout=1)

    @property
    def has_work(self) -> bool:
        """Whether a frame waits, a question is due, a reply is unfinished or a closed stream not ended."""
        with self.changed:
            return any(stream._received or stream._is_closing or self._has_work(stream) for stream in self.streams)

    @staticmethod
    def _has_work(stream: EngineStream) -> bool:
        return stream._work is not None or stream.session.has_work(to_the_end=stream._is_closing)

    def _encode(self) -> None:
        """Has the vision encoder see frames that wait, of all streams in turn, up to what a step takes of each."""
        chosen: list[tuple[EngineStream, _Received]] = []
        with self.changed:
            for stream in [stream for stream in self.streams if not stream._is_done]:
                room = stream.session.chunk_frames - stream.session.num_waiting
                stream._num_encoding = max(0, min(room, len(stream._received)))
                chosen += [(stream, stream._received.popleft()) for _ in range(stream._num_encoding)]
        sizes: dict[tuple[int, ...], list[tuple[EngineStream, _Received]]] = {}
        for stream, frame in chosen:
            sizes.setdefault(tuple(frame.pixel_values.shape), []).append((stream, frame))
        for group in [same[at : at + _ENCODED] for same in sizes.values() for at in range(0, len(same), _ENCODED)]:
            pixel_values = torch.stack([frame.pixel_values for _, frame in group])
            if self._vision_stream is not None:
                # Frames are encoded beside the language step that runs, and the next one waits for them.
                pixel_values = pixel_values.pin_memory()
                with torch.cuda.stream(self._vision_stream), torch.no_grad():
                    features = self.model.encode_frames(pixel_values.to(self.device, non_blocking=True))
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(self._vision_stream)
                features.record_stream(current)
            else:
                with torch.no_grad():
                    features = self.model.encode_frames(pixel_values.to(self.device))
            with self.changed:
                for (stream, frame), row in zip(group, features, strict=True):
                    stream.session.receive(row, frame.time, frame.arrival)
                    stream._num_encoding -= 1

    def _choose_batch(self) -> list[tuple[EngineStream, StreamStep]]:
        """The streams whose step is next, the least recently served first, up to the tokens of a step."""
        with self.changed:
            return self._choose()

    def _choose(self) -> list[tuple[EngineStream, StreamStep]]:
        batch: list[tuple[EngineStream, StreamStep]] = []
        total = 0
        for stream in [stream for stream in self.streams if not stream._is_done]:
            try:
                step = stream._next_step()
            except Exception as error:  # whatever a stream's own processor, streamer or memory does, it does to itself
                self._fail(stream, error)
                continue
            if step is None or (batch and total + len(step.ids) > self.max_batch_tokens):
                continue
            if not self._fits(stream, step):
                continue
            batch.append((stream, step))
            total += len(step.ids)
        served = {id(stream) for stream, _ in batch}
        # Stable: who was passed over comes first next time.
        self.streams.sort(key=lambda stream: id(stream) in served)
        return batch

    def _fits(self, stream: EngineStream, step: StreamStep) -> bool:
        """Whether the stream has or gets the pages of its next step; if not, it is ended, and the others go on."""
        try:
            stream.session.cache.make_room(len(step.ids), step.num_frames)
        except OutOfPagesError as error:
            self._fail(stream, error)
            return False
        return True

    def _fail(self, stream: EngineStream, error: Exception) -> None:
        if not isinstance(error, OutOfPagesError):
            logger.warning(f"Stream {stream.number} was ended: {error}")
            stream._end(error)
            return
        frames, text = stream.session.max_frames, stream.session.max_text_tokens
        message = (
            f"it has outgrown the memory of {frames} frames and {text} tokens of text, by more text than the frames "
            f"that it remembers allow to forget. {error} Open it with a larger `max_text_tokens`."
        )
        logger.warning(f"Stream {stream.number} was ended: {message}")
        stream._end(OutOfPagesError(message))

    def execute(self, caches: Sequence[Any], steps: Sequence[StreamStep]) -> list[StepResult]:
        """
        One step of the language model for streams with these caches, of the engine's pool, which then hold its tokens.

        Args:
            caches (`Sequence[VideoLLMMoDPagedCache]`): One a stream.
            steps (`Sequence[StreamStep]`): One a stream.

        Returns:
            `list[StepResult]`: In their order.

        Raises:
            `OutOfPagesError`: If the pool has too few pages for the new entries.
        """
        row, outputs = self._launch(caches, steps)
        return row.results(outputs)

    def _launch(self, caches: Sequence[Any], steps: Sequence[StreamStep]) -> tuple["_Row", tuple]:
        """One step of the language model for all, of which nothing is waited for yet."""
        shape = self._captured_shape(caches, steps)
        if shape is None:
            row = _Row(self, caches, steps)
            outputs = row.forward()
        else:
            self._make(shape)
            row, outputs = self._captured[shape].run(caches, steps)
            self.stats.captured_steps += 1
        row.packed.commit([row.inside_frame(index) for index in range(len(row.caches))])
        with_frames = sum(step.num_frames > 0 for step in steps)
        self.stats.steps += 1
        self.stats.shared_steps += len(steps) > 1
        self.stats.mixed_steps += 0 < with_frames < len(steps)
        self.stats.frames += sum(step.num_frames for step in steps)
        return row, outputs

    def _give(self, stream: EngineStream, result: StepResult) -> None:
        session = stream.session
        if stream._is_done:
            return
        first, seen = len(session.events), session.num_frames
        try:
            stream._take(result)
        except Exception as error:  # as above
            self._fail(stream, error)
            return
        if session.num_frames > seen:
            self.stats.frame_latencies.extend(session.frame_latencies)
        for event in session.events[first:]:
            if event.role == "assistant":
                self.stats.first_word_latencies.append(event.latency)
                self.stats.tokens += len(event.token_ids)

    # -------------------------------------------------------------------------------------------------- captured

    def _captured_shape(self, caches: Sequence[Any], steps: Sequence[StreamStep]) -> _Shape | None:
        """
        The captured step that these fit in.

        `None` if there is none: where streams differ much in how many frames they see, where one catches up while
        another speaks, where one reads a long text, where one remembers more than the engine's own `max_frames`
        and `max_text_tokens`, and where it was left out when others for as many streams were warmed up.
        """
        if self._captured is None:
            return None
        if any(len(cache.tables[kind].pages) > most for cache in caches for kind, most in self._most_pages.items()):
            return None
        counts = [step.num_frames for step in steps if step.num_frames]
        more = [len(step.ids) - max(step.num_frames * self._frame_length, 1) for step in steps]
        if min(more) < 0:
            return None
        need = _Shape(
            seeing=len(counts),
            frames=max(counts, default=0),
            speaking=len(steps) - len(counts),
            reading=sum(more),
        )
        size = _size(max(need.seeing, need.speaking))
        shape = next((shape for shape in _shapes(size) if _has_room(shape, need)), None)
        # What is left of the frames is one stream's. Whatever was not warmed up is not made while streams wait.
        if shape is None or len(counts) * shape.frames - sum(counts) > shape.frames:
            return None
        return shape if shape in self._captured or size > self._warm_size else None

    def warm_up(self, max_streams: int = 1) -> None:
        """
        Makes the captured steps that live streams need most, so that none has to wait for them: one frame a stream,
        one token a stream, both at once, each with text that is read beside, for up to `max_streams` streams together,
        and several frames of a stream that catches up. With a progress bar, which tells what attention runs on.
        Nothing where steps are not captured.
        """
        if self._captured is None:
            return
        with self._stepping:
            # Steps that read long texts are not captured: what they attend by is chosen here too.
            _Row(self, [self._spare], [StreamStep([0], [0])]).forward()
        sizes = [size for size in _SIZES if size <= _size(max_streams)]
        shapes = [shape for size in sizes for shape in _shapes(size) if size == 1 or shape.frames <= 1]
        progress = logging.tqdm(shapes, desc="warming up", unit=" steps")
        for shape in progress:
            self._make(shape)
            if names := attention_in_use(self.device):
                progress.set_postfix_str(f"attention by {' and '.join(names)}")
        self._warm_size = max(self._warm_size, sizes[-1])
        # Compiling leaves hundreds of thousands of objects. Python searches them all for garbage now, which takes half
        # a second, and not amid a step; it does again when as many as a quarter of them have come.
        gc.collect()

    def _make(self, shape: _Shape) -> None:
        with self._stepping:
            if shape not in self._captured:
                self._captured[shape] = _CapturedStep(self, shape, is_compiled=self.compile_steps)

    # ---------------------------------------------------------------------------------------------------- thread

    def __enter__(self) -> "StreamingEngine":
        self.warm_up(self.max_streams)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="StreamingEngine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all streams that are open, what they have not seen yet included."""
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self._thread.join()
        self._thread = None
        self._end_all()

    def _end_all(self, error: Exception | None = None) -> None:
        with self.changed:
            self._error = error or self._error
            for stream in self.streams:
                stream._collect()
                stream._end(error)
                stream._said.put(None)
            self.streams = []

    def _serve(self) -> None:
        try:
            while not self._stopping:
                if self.has_work:
                    self.step()
                else:
                    with self.changed:
                        if not self._stopping and not self.has_work:
                            self.changed.wait()
        except Exception as error:
            # Whoever waits for an event must learn that none will come.
            self._end_all(error)
            raise


class _Row:
    """
    Steps of several streams laid one after the other, as inputs of the model: of a captured step, `over` those that
    it has.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        caches: Sequence[Any],
        steps: Sequence[StreamStep],
        *,
        over: "_Row | None" = None,
        **bounds: Any,
    ) -> None:
        self.engine, self.caches, self.steps = engine, list(caches), list(steps)
        ends, thresholds, begin = [], [], 0
        default = engine.model.config.interval_threshold
        for step in steps:
            ends += [begin + end for end in step.ends]
            threshold = default if step.interval_threshold is None else step.interval_threshold
            thresholds += [threshold] * len(step.ends)
            begin += len(step.ids)
        ids = [token for step in steps for token in step.ids]
        self.packed = PackedCaches(
            caches,
            [len(step.ids) for step in steps],
            [step.num_frames for step in steps],
            engine.device,
            more=[(ids, torch.long), (ends, torch.long), (thresholds, torch.float32)],
            over=None if over is None else over.packed,
            **bounds,
        )
        ids, self.ends, self.thresholds = self.packed.more
        self.ids = ids[None]
        features = [step.frame_features for step in steps if step.frame_features is not None]
        self.features = torch.cat(features)[None] if features else None
        if over is not None and features:
            over.features.copy_(self.features, non_blocking=True)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Decisions (3, ends): to speak, probability of silence, token; logits (ends, vocabulary); and scores and kept
        tokens (routed layers, frames, tokens).
        """
        model = self.engine.model
        inputs = {} if self.features is None else {"frame_features": self.features}
        with torch.no_grad():
            outputs = model(
                input_ids=self.ids,
                cache=self.packed,
                packed_caches=self.packed,
                position_ids=self.packed.positions[None],
                use_cache=True,
                logits_to_keep=self.ends,
                output_router_scores=self.features is not None,
                **inputs,
            )
            logits = outputs.logits[0]
            decisions = torch.stack([x.double() for x in decide(model, logits, self.thresholds)])
            scores, kept = (
                torch.stack([layer[0] for layer in rows]) if rows else None
                for rows in (outputs.router_scores, outputs.kept_tokens)
            )
        return decisions, logits, scores, kept

    def results(self, outputs: tuple) -> list[StepResult]:
        """Each step's share of what [`forward`] gave; the one time that a step waits for the device."""
        decisions, logits, scores, kept = outputs
        speak, silence, tokens = decisions.tolist()
        layers = () if scores is None else self.engine.model.config.routed_layers
        results, end, frame = [], 0, 0
        for step in self.steps:
            ends = slice(end, end + len(step.ends))
            frames = slice(frame, frame + step.num_frames)
            seen = [{}, {}]
            if step.num_frames and scores is not None:
                seen = [dict(zip(layers, rows[:, frames], strict=True)) for rows in (scores, kept)]
            results.append(
                StepResult(
                    [bool(x) for x in speak[ends]], silence[ends], [int(x) for x in tokens[ends]], logits[ends], *seen
                )
            )
            end, frame = ends.stop, frames.stop
        return results

    def inside_frame(self, index: int) -> torch.Tensor | None:
        """True at tokens of a step that are within a frame and not its last, (1, tokens)."""
        step = self.steps[index]
        if not step.num_frames:
            return None
        frame_token, ends = self.engine.model.config.frame_token_id, set(step.ends)
        return torch.tensor([[token == frame_token and i not in ends for i, token in enumerate(step.ids)]])


class _CapturedStep:
    """
    A step of one [`_Shape`].

    On CUDA it is one graph, which is replayed on what was copied into its tensors; elsewhere code, compiled or not.
    What is missing is filled up by a stream that nobody reads. Where a stream begins in the row, and so how much of
    the text is whose, is in the tensors.
    """

    def __init__(self, engine: StreamingEngine, shape: _Shape, *, is_compiled: bool = False) -> None:
        self.engine, self.shape = engine, shape
        config, frames = engine.model.config, shape.frames
        interval = [] if config.frame_token_interval_id is None else [config.frame_token_interval_id]
        frame = [*interval, *[config.frame_token_id] * config.frame_num_tokens]
        ends = [len(frame) * (index + 1) - 1 for index in range(frames)]
        size = (frames, config.frame_num_tokens, config.vision_config.hidden_size)
        connector = next((w.dtype for w in engine.model.model.connector.parameters() if w.is_floating_point()), None)
        features = torch.zeros(size, device=engine.device, dtype=connector or torch.float32)
        self._no_frame = StreamStep(frame * frames, ends, features)
        self._no_token = StreamStep([0], [0])
        # What is left of frames and text is a stream too, and one token at least: not every kernel takes none.
        self._has_rest = shape.reading > 0 or frames > 1
        most_new = max(len(frame) * frames, 1) + shape.reading + self._has_rest
        self._bounds = {"most_new": most_new, "most_pages": engine._most_pages, "spare": engine._spare}
        # Tokens of the whole row.
        self._length = len(frame) * frames * shape.seeing + shape.speaking + shape.reading + self._has_rest
        self._inputs, _ = self._fill([], [])
        self._step: Callable[[], tuple] | None = None
        if is_compiled:
            self._step = self._compile()
        if engine.device.type == "cuda":
            self._step = self._capture(self._step or self._inputs.forward)

    @torch.no_grad()
    def run(self, caches: Sequence[Any], steps: Sequence[StreamStep]) -> tuple[_Row, tuple]:
        """Runs the steps of these streams; gives them, in their order, and what the model gave."""
        row, places = self._fill(caches, steps, None if self._step is None else self._inputs)
        outputs = row.forward() if self._step is None else self._step()
        return self._only_real(row, places, outputs)

    def _fill(
        self, caches: Sequence[Any], steps: Sequence[StreamStep], over: _Row | None = None
    ) -> tuple[_Row, list[int]]:
        """
        The row: streams that see, then those that speak, each filled up, and what is left; and each given step's
        place in it.
        """
        spare = self.engine._spare
        rows: list[tuple[Any, StreamStep]] = []
        places = [0] * len(steps)
        for wanted, stand_in, has_frames in (
            (self.shape.seeing, self._no_frame, True),
            (self.shape.speaking, self._no_token, False),
        ):
            end = len(rows) + wanted
            for index, (cache, step) in enumerate(zip(caches, steps, strict=True)):
                if (step.num_frames > 0) == has_frames:
                    places[index] = len(rows)
                    rows.append((cache, step))
            rows += [(spare, stand_in)] * (end - len(rows))
        if self._has_rest:
            rows.append((spare, self._rest([step for _, step in rows])))
        row = _Row(self.engine, [cache for cache, _ in rows], [step for _, step in rows], over=over, **self._bounds)
        return row, places

    def _rest(self, steps: Sequence[StreamStep]) -> StreamStep:
        """What is left of frames and of text."""
        frames = self.shape.seeing * self.shape.frames - sum(step.num_frames for step in steps)
        ids = self._no_frame.ids[: frames * self.engine._frame_length]
        text = self._length - len(ids) - sum(len(step.ids) for step in steps)
        features = self._no_frame.frame_features[:frames] if frames else None
        return StreamStep(ids + [0] * text, self._no_frame.ends[:frames], features)

    @staticmethod
    def _only_real(row: _Row, places: list[int], outputs: tuple) -> tuple[_Row, tuple]:
        """What the row gave, as if it had been of the steps at these places alone and in this order."""
        if places == list(range(len(row.steps))):
            return row, outputs
        decisions, logits, scores, kept = outputs
        last_ends = list(accumulate(len(step.ends) for step in row.steps))
        last_frames = list(accumulate(step.num_frames for step in row.steps))
        steps = [row.steps[place] for place in places]
        ends, frames = [], []
        for place, step in zip(places, steps, strict=True):
            ends += range(last_ends[place] - len(step.ends), last_ends[place])
            frames += range(last_frames[place] - step.num_frames, last_frames[place])
        ends_index, frames_index = StepNumbers([(ends, torch.long), (frames, torch.long)], logits.device).tensors
        outputs = (
            decisions[:, ends_index],
            logits[ends_index],
            None if scores is None else scores[:, frames_index],
            None if kept is None else kept[:, frames_index],
        )
        row.packed.keep_rows(places)
        row.caches, row.steps = row.packed.caches, steps
        return row, outputs

    @torch.no_grad()
    def _compile(self) -> Callable[[], tuple]:
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx  # takes a second

        patches: dict[str, Any] = {"size_asserts": False}
        # Who has given the compiler a pass of their own keeps it.
        if self.engine.device.type == "cpu" and inductor.post_grad_custom_pre_pass is None:
            patches["post_grad_custom_pre_pass"] = _summed_products()
        # What is chosen and allocated once is not part of the step.
        self._inputs.forward()
        made: list[Any] = []

        def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., tuple]:
            code = compile_fx(graph, inputs, config_patches=patches)

            def run(*tensors: torch.Tensor) -> tuple:
                outputs = code(*tensors)
                made[:] = [code, tensors, outputs]
                return outputs

            return run

        # What was compiled is kept with a function's code, and counted there: each step has its own.
        forward = _Row.forward
        alone = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__)
        given = torch.compile(MethodType(alone, self._inputs), fullgraph=True, dynamic=False, backend=keep)()
        if not made:
            return self._inputs.forward  # Dynamo is switched off.
        code, tensors, outputs = made
        places = {id(x): place for place, x in enumerate(outputs)}
        order = [None if x is None else places[id(x)] for x in given]
        made.clear()

        def replay() -> tuple:
            # The tensors are always the same: to gather a hundred of them, and guard them, takes a tenth of a step.
            outputs = code(*tensors)
            return tuple(None if place is None else outputs[place] for place in order)

        return replay

    @torch.no_grad()
    def _capture(self, step: Callable[[], tuple]) -> Callable[[], tuple]:
        engine = self.engine
        stream = engine._capture_stream
        with torch.cuda.device(engine.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Graphs may share memory, since what one gave is copied before another runs. What other threads do to the
            # device meanwhile, such as bringing frames, is theirs.
            options = {"pool": engine._graph_pool, "stream": stream, "capture_error_mode": "thread_local"}
            with _CAPTURING, torch.cuda.graph(graph, **options):
                outputs = step()

        def replay() -> tuple:
            graph.replay()
            return tuple(None if x is None else x.clone() for x in outputs)

        return replay


def _product_as_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of (rows, inner) and (inner, columns) in the dtype of `left`, summed in 32 bits at least."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide)[:, None] * right.T.to(wide)[None]).sum(-1).to(left.dtype)


@lru_cache(1)
def _summed_products() -> Any:
    """
    A pass of the compiler: small products, and any of one row in 32 bits, become sums, which it joins with the rest.

    Small as they are, a library takes more time to be called than to multiply. The compiler's own `decompose_mm_pass`
    has limits on rows and columns, not on both together, and reads them when it is imported.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.pattern_matcher import Arg, CallFunction, Match, PatternMatcherPass, register_graph_pattern

    aten, passes = torch.ops.aten, PatternMatcherPass()

    def is_small(match: Match) -> bool:
        left, right = (node.meta["val"] for node in match.args[-2:])
        most = _SUMMED if left.itemsize >= 4 else _SUMMED_IN_16_BITS
        # A product may have factors, and one of whole numbers is no floating-point sum.
        is_plain = left.is_floating_point() and not match.output_node().kwargs
        is_row = len(left) == 1 and left.itemsize >= 4
        return is_plain and (is_row or len(left) * right.numel() <= most)

    @register_graph_pattern(CallFunction(aten.mm.default, Arg(), Arg()), extra_check=is_small, pass_dict=passes)
    def _(match: Match, left: torch.fx.Node, right: torch.fx.Node) -> None:
        match.replace_by_example(_product_as_sum, [left, right])

    @register_graph_pattern(
        CallFunction(aten.addmm.default, Arg(), Arg(), Arg()), extra_check=is_small, pass_dict=passes
    )
    def _(match: Match, bias: torch.fx.Node, left: torch.fx.Node, right: torch.fx.Node) -> None:
        match.replace_by_example(lambda bias, *sides: bias + _product_as_sum(*sides), [bias, left, right])

    class SummedProducts(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            passes.apply(graph)

        def uuid(self) -> Any:
            # The compiler's cache keeps what was made with another pass apart.
            return get_hash_for_files((__file__,)), _SUMMED, _SUMMED_IN_16_BITS

    return SummedProducts()


@lru_cache
def _shapes(size: int) -> tuple[_Shape, ...]:
    """The captured steps of so many streams: of those that have room for a step the first is the smallest."""
    reading = (_FEW, _MANY) if size == 1 else (_MANY,)
    return (
        _Shape(0, 0, size),
        *(_Shape(0, 0, size, text) for text in reading),
        _Shape(size, 1, 0),
        # Live streams come in all mixtures: if no other is made than as many that see as that speak, none is new.
        *(_Shape(size, 1, size, text) for text in reading),
        *(_Shape(size, frames, 0, reading[0]) for frames in _FRAMES[1:]),
        # What a video begins with stands before as many frames as a step may have.
        *([_Shape(1, _FRAMES[-1], 0, _MANY)] if size == 1 else []),
    )


def _has_room(shape: _Shape, need: _Shape) -> bool:
    """Whether what is needed fits, and frames are not there for nothing."""
    return bool(shape.frames) == bool(need.frames) and all(a >= b for a, b in zip(shape, need, strict=True))


def _size(count: int) -> int:
    return next((size for size in (0, *_SIZES) if size >= count), _SIZES[-1])


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


__all__ = ["EngineFullError", "EngineStats", "EngineStream", "StreamingEngine"]
