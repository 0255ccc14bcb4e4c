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
"""One stream's whole state and its step: frames and questions go in, events come out."""

import copy
import time as clock
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class StreamEvent:
    """
    Something said in a stream.

    Attributes:
        time (`float`): Stream time in seconds at which it was said.
        frame (`int`): Index of the last frame seen by then, -1 before the first.
        role (`str`): `"assistant"` or `"user"`.
        text (`str`): What was said.
        token_ids (`tuple[int, ...]`): The tokens a reply was generated as, without end-of-sequence; empty for a user.
        interval_probability (`float`, *optional*): Probability of silence at that frame, if the model decided there to
            speak; `None` for questions and their answers.
        latency (`float`): Seconds from the arrival of the frame or question to the first token of the text.
        interrupted (`bool`): Whether a question cut the reply short.
    """

    time: float
    frame: int
    role: str
    text: str
    token_ids: tuple[int, ...] = ()
    interval_probability: float | None = None
    latency: float = 0.0
    interrupted: bool = False


@dataclass
class StreamStep:
    """
    What a session needs from the model next.

    Attributes:
        ids (`list[int]`): New tokens, frame tokens included.
        ends (`list[int]`): Indices of those after which something is to be decided: the last of each frame, or of all.
        frame_features (`torch.Tensor` of shape `(frames, tokens, vision hidden)`, *optional*): Of the new frames.
        interval_threshold (`float`, *optional*): The session's, if it has one of its own.
    """

    ids: list[int]
    ends: list[int]
    frame_features: torch.Tensor | None = None
    interval_threshold: float | None = None

    @property
    def num_frames(self) -> int:
        """Number of new frames."""
        return 0 if self.frame_features is None else len(self.frame_features)


@dataclass
class StepResult:
    """
    What the model says to a [`StreamStep`], at each of its `ends`.

    Attributes:
        speak (`list[bool]`): Whether the interval rule is to speak.
        silence (`list[float]`): Probability of silence.
        tokens (`list[int]`): The most likely token, the frame token apart.
        logits (`torch.Tensor` of shape `(ends, vocabulary)`): Scores of the next token.
        router_scores (`dict[int, torch.Tensor]`): Of each routed layer, (frames, tokens).
        kept_tokens (`dict[int, torch.Tensor]`): Of each routed layer, True where a frame's token was kept.
    """

    speak: list[bool]
    silence: list[float]
    tokens: list[int]
    logits: torch.Tensor
    router_scores: dict[int, torch.Tensor]
    kept_tokens: dict[int, torch.Tensor]


# A session's work: gives what it needs from the model, is sent what the model says to it.
Work = Generator[StreamStep, StepResult, None]


@dataclass
class _Frame:
    time: float
    features: torch.Tensor  # (tokens, vision hidden)
    arrival: float


@dataclass
class _Question:
    time: float | None  # None until the first frame comes: asked before any, it belongs to that one
    text: str
    reply_now: bool
    arrival: float
    received: float  # time of the last frame that had come when it was asked
    interrupt: bool = False


@dataclass
class _Piece:
    """A stretch of what is in the cache."""

    kind: str  # "text", "interval" or "frame"
    length: int  # tokens


class StreamingSession:
    """
    A live stream on a model: one growing key/value cache, one conversation.

    Frames come in by [`~StreamingSession.push`], questions by [`~StreamingSession.ask`]. After each frame the model
    decides by the interval rule whether to speak (VideoLLM-online, arXiv 2406.11816, section 3.3). All state is here
    and none on the model, so sessions run side by side and can be forked. Iterating over a session gives its events.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        fps (`float`, *optional*, defaults to 2.0): Frame rate at which frames without a time of their own arrive.
        system_prompt (`str`, *optional*): First text of the stream. Defaults to the processor's.
        interval_threshold (`float`, *optional*): Probability of silence below which the model speaks. Defaults to
            the configuration's.
        max_new_tokens (`int`, *optional*, defaults to 100): Longest reply, in tokens.
        chunk_frames (`int`, *optional*, defaults to 8): Most waiting frames to take in one step. It changes speed and
            memory, not what is said.
        max_frames (`int`, *optional*): Most frames to remember. Before there would be more, the oldest are evicted
            from the cache, an eighth of the most at once, and all behind them move up, so that a stream may go on
            without end. Text stays.
        sink_frames (`int`, *optional*, defaults to 0): How many of the very first frames are never evicted.
        max_text_tokens (`int`, *optional*): Most tokens of text to remember; beyond it the oldest turns are evicted,
            with the frames before them. The system prompt and what is said before the first frame stay.
        streamer (`BaseStreamer`, *optional*): Gets the tokens of replies as they come, as from `generate`.
        logits_processor (`LogitsProcessorList`, *optional*): Applied to the scores of reply tokens.
        do_sample (`bool`, *optional*, defaults to `False`): Whether to sample reply tokens instead of taking the best.
        cache_dtype (`torch.dtype`, *optional*): That of keys and values as stored, such as `torch.float8_e4m3fn`; each
            step converts what it reads. By default that of the model.
        cache ([`VideoLLMMoDCache`], *optional*): An empty cache, such as one of pages. By default one that grows.

    Attributes:
        cache ([`VideoLLMMoDCache`]): Everything seen so far; its `lengths` and `num_bytes` are figures of the stream.
        time (`float`, *optional*): Time of the last frame seen, in seconds.
        num_frames (`int`): Number of frames seen.
        num_dropped (`int`): Number of frames dropped, since more came than could be seen.
        events (`list[StreamEvent]`): All that was said.
        interval_probability (`float`, *optional*): Probability of silence at the last frame.
        frame_latencies (`list[float]`): Of the frames last seen together, the seconds from each one's arrival to the
            decision on it.
        router_scores (`dict[int, torch.Tensor]`): For each routed layer, the last frame's scores, (tokens,).
        kept_tokens (`dict[int, torch.Tensor]`): For each routed layer, True where the last frame's token was kept.

    Raises:
        `ValueError`: If a number is out of range.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float = 2.0,
        system_prompt: str | None = None,
        interval_threshold: float | None = None,
        max_new_tokens: int = 100,
        chunk_frames: int = 8,
        max_frames: int | None = None,
        sink_frames: int = 0,
        max_text_tokens: int | None = None,
        streamer: Any | None = None,
        logits_processor: Any | None = None,
        do_sample: bool = False,
        cache_dtype: torch.dtype | None = None,
        cache: Any | None = None,
    ) -> None:
        if not fps > 0:
            raise ValueError(f"`fps` must be positive, got {fps}.")
        if interval_threshold is not None and not 0 <= interval_threshold <= 1:
            raise ValueError(f"`interval_threshold` is a probability in [0, 1], got {interval_threshold}.")
        for name, value in (("max_new_tokens", max_new_tokens), ("chunk_frames", chunk_frames)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if max_frames is not None and not 0 <= sink_frames < max_frames:
            raise ValueError(f"`sink_frames` is {sink_frames}; it must be less than `max_frames`, {max_frames}.")
        most = model.config.text_config.max_position_embeddings
        if max_frames is not None and max_frames * (model.config.frame_num_tokens + 1) > most:
            raise ValueError(
                f"`max_frames` is {max_frames}, of {model.config.frame_num_tokens} tokens each; the language model "
                f"was trained for {most} tokens."
            )
        if max_frames is None and (sink_frames or max_text_tokens is not None):
            raise ValueError("`sink_frames` and `max_text_tokens` say what stays beside `max_frames`: give that too.")
        self.model = model
        self.processor = processor
        self.fps = fps
        self.max_frames, self.sink_frames, self.max_text_tokens = max_frames, sink_frames, max_text_tokens
        self.interval_threshold = interval_threshold
        self.max_new_tokens = max_new_tokens
        self.chunk_frames = chunk_frames if max_frames is None else min(chunk_frames, max_frames - sink_frames)
        self.streamer = streamer
        self.logits_processor = logits_processor
        self.do_sample = do_sample

        if cache is not None and cache_dtype is not None:
            raise ValueError("Give `cache` or `cache_dtype`, not both: a cache given has its dtype.")
        self.cache = model.new_cache(dtype=cache_dtype) if cache is None else cache
        self.time: float | None = None
        self.num_frames = self.num_dropped = 0
        self.events: list[StreamEvent] = []
        self.interval_probability: float | None = None
        self.frame_latencies: list[float] = []
        self.router_scores: dict[int, torch.Tensor] = {}
        self.kept_tokens: dict[int, torch.Tensor] = {}
        self.closed = False

        self._waiting: deque[_Frame] = deque()
        self._questions: deque[_Question] = deque()
        self._received_time: float | None = None
        # What was said but is not in the cache yet: the end of a reply, then turns, tokenised with what follows them.
        self._unfed_ids: list[int] = []
        prompt = processor.system_prompt if system_prompt is None else system_prompt
        self._unfed_turns: list[dict[str, str]] = [{"role": "system", "content": prompt}]
        self._bare_turns: dict[tuple[bool, str], list[int]] = {}
        self._stream_open = False
        self._reply_tokens, self._reply_seconds = 0, 0.0
        self._pieces: list[_Piece] = []
        self._is_working = self._is_broken = False
        self._num_in_sight = 0

    # ----------------------------------------------------------------------------------------------------- verbs

    def push(self, frames: Any, *, time: float | Sequence[float] | None = None) -> list[StreamEvent]:
        """
        Takes in one frame or several, answers what was asked before them, and says what there is to say.

        Args:
            frames (PIL image, uint8 array or tensor (height, width, 3), or several of them):
                In order of time. Several may also be one array (frames, height, width, 3).
            time (`float` or `Sequence[float]`, *optional*): Seconds at which they were taken, one a frame, increasing.
                By default they follow each other at `fps`, from 0.

        Returns:
            `list[StreamEvent]`: What was said, in order.

        Raises:
            `ValueError`: If the frames do not have that form, times do not increase, or the session is closed.
        """
        self._refuse_if_closed()
        arrival = clock.perf_counter()
        pixel_values = self.processor.process_frames(frames)
        times = self.frame_times(len(pixel_values), time)
        for begin in range(0, len(pixel_values), self.chunk_frames):
            chunk = slice(begin, begin + self.chunk_frames)
            with torch.no_grad():
                features = self.model.encode_frames(pixel_values[chunk].to(self.model.device))
            for at, row in zip(times[chunk], features, strict=True):
                self.receive(row, at, arrival)
        return self._run()

    def ask(
        self, text: str, *, time: float | None = None, reply_now: bool = True, interrupt: bool = False
    ) -> list[StreamEvent]:
        """
        Puts a question or an instruction into the stream.

        Asked before a frame's time, it comes before that frame; asked at its time, after it.

        Args:
            text (`str`): What the user says.
            time (`float`, *optional*): Second at which it is said. By default the time of the last frame received, or
                of the first one to come.
            reply_now (`bool`, *optional*, defaults to `True`): Whether the model must answer at once. If not, it goes
                on watching and speaks when it decides to: for instructions, and questions whose answer is to come.
            interrupt (`bool`, *optional*, defaults to `False`): Whether to cut a reply short that is being generated,
                and come before the frames that wait. So it can be asked while `push` is at work, by a streamer, or
                in a [`StreamingEngine`]. It has no `time`: it is now.

        Returns:
            `list[StreamEvent]`: The question and its answer if its time has come; else a later call returns them.

        Raises:
            `ValueError`: If the text is empty, the time lies before what was seen or asked, or the session is closed.
        """
        self.hear(text, time=time, reply_now=reply_now, interrupt=interrupt)
        return self._run()

    def hear(self, text: str, *, time: float | None = None, reply_now: bool = True, interrupt: bool = False) -> None:
        """Takes a question in as [`~StreamingSession.ask`] does, for its place in the stream's [`work`]."""
        self._refuse_if_closed()
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"A question is a text that is not empty, got {text!r}.")
        arrival = clock.perf_counter()
        received = float("-inf") if self._received_time is None else self._received_time
        if interrupt:
            if time is not None:
                raise ValueError("A question that interrupts is asked now: leave `time` out.")
            # Before all that do not interrupt, and behind those that do.
            place = sum(question.interrupt for question in self._questions)
            self._questions.insert(place, _Question(self.time, text, reply_now, arrival, received, interrupt=True))
            return
        time = self._received_time if time is None else time
        if time is not None and self.time is not None and time < self.time:
            raise ValueError(f"The question's time is {time} s, but the stream is at {self.time} s already.")
        if time is not None and self._questions and time < (self._questions[-1].time or 0.0):
            raise ValueError(f"The question's time is {time} s, before that of an earlier one still waiting.")
        self._questions.append(_Question(time, text, reply_now, arrival, received))

    def receive(self, features: torch.Tensor, time: float, arrival: float) -> None:
        """
        Takes in a frame that is encoded already, to be seen in the stream's [`~StreamingSession.work`].

        Args:
            features (`torch.Tensor` of shape `(tokens, vision hidden)`): What the model's `encode_frames` gives.
            time (`float`): Seconds, later than those of frames before.
            arrival (`float`): When it came, by `time.perf_counter()`.
        """
        self._waiting.append(_Frame(time, features, arrival))

    def close(self) -> list[StreamEvent]:
        """Answers what is still asked and ends the session; its figures stay readable."""
        events = [] if self.closed or self._is_broken else self._run(to_the_end=True)
        self.closed = True
        return events

    def fork(self) -> "StreamingSession":
        """
        A copy that goes on by itself from here, on the same model.

        Raises:
            `ValueError`: Amid a reply, when called by a streamer.
        """
        if self._is_working:
            raise ValueError("A session cannot be forked amid a reply: what is half said is in nobody's hands.")
        twin = copy.copy(self)
        for name in ("cache", "_waiting", "_questions", "_unfed_ids", "_unfed_turns", "_pieces"):
            setattr(twin, name, copy.deepcopy(getattr(self, name)))
        twin.events = list(self.events)
        return twin

    def __iter__(self) -> Iterator[StreamEvent]:
        return iter(self.events)

    # --------------------------------------------------------------------------------------------------- figures

    @property
    def frame_latency(self) -> float | None:
        """Seconds from the last frame's arrival to the decision on it, or `None` before the first."""
        return self.frame_latencies[-1] if self.frame_latencies else None

    @property
    def num_waiting(self) -> int:
        """Number of frames received but not seen yet."""
        return len(self._waiting) + self._num_in_sight

    @property
    def num_remembered(self) -> int:
        """Number of frames in the cache: those seen, but for those that were evicted."""
        return sum(piece.kind == "frame" for piece in self._pieces)

    @property
    def tokens_per_second(self) -> float | None:
        """Reply tokens generated a second, or `None` before the first reply."""
        return self._reply_tokens / self._reply_seconds if self._reply_seconds > 0 else None

    @property
    def keep_ratio(self) -> float:
        """Share of a frame's tokens that a layer keeps, averaged over layers."""
        counts = self.model.config.layer_keep_counts
        return sum(counts) / (len(counts) * self.model.config.frame_num_tokens)

    # ------------------------------------------------------------------------------------------------- the stream

    def _run(self, to_the_end: bool = False) -> list[StreamEvent]:
        """Goes on until no frame waits and no question is due; returns what was said meanwhile."""
        if self._is_working:
            return []  # Called by a streamer amid a reply: it has its place in the work that goes on.
        first = len(self.events)
        self._is_working = True
        try:
            work = self.work(to_the_end=to_the_end)
            step = next(work, None)
            while step is not None:
                try:
                    step = work.send(self._execute(step))
                except StopIteration:
                    step = None
        except BaseException:
            # Tokens are in the cache or not, and nobody can say which.
            self._is_broken = True
            raise
        finally:
            self._is_working = False
        return self.events[first:]

    def work(self, *, to_the_end: bool = False) -> Work:
        """
        Goes on until no frame waits and no question is due, and leaves the model to the caller.

        Args:
            to_the_end (`bool`, *optional*, defaults to `False`): Whether questions are due whose time has not come.

        Yields:
            [`StreamStep`]: To be answered by `send` with a [`StepResult`], once its tokens are in `cache`.
        """
        while True:
            if self._waiting and self.time is None:
                # What was asked before any frame belongs to the first.
                for early in (question for question in self._questions if question.time is None):
                    early.time = self._waiting[0].time
            question = self._questions[0] if self._questions else None
            if question is not None and self._is_due(question, to_the_end):
                yield from self._take_question(self._questions.popleft())
            elif self._waiting:
                yield from self._watch(question)
            else:
                return

    def drop_oldest(self) -> bool:
        """Forgets the oldest frame that waits, unseen; says whether there was one."""
        if self._waiting:
            self._waiting.popleft()
            self.count_dropped()
            return True
        return False

    def count_dropped(self) -> None:
        """Counts a frame that was dropped unseen."""
        self.num_dropped += 1

    def has_work(self, *, to_the_end: bool = False) -> bool:
        """Whether a frame waits or a question is due."""
        return bool(self._waiting) or (bool(self._questions) and self._is_due(self._questions[0], to_the_end))

    def _execute(self, step: StreamStep) -> StepResult:
        """One step of this stream alone."""
        device = self.model.get_input_embeddings().weight.device
        inputs = {} if step.frame_features is None else {"frame_features": step.frame_features[None]}
        with torch.no_grad():
            outputs = self.model(
                input_ids=torch.tensor([step.ids], device=device),
                cache=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor(step.ends, device=device),
                output_router_scores=bool(inputs),
                **inputs,
            )
        logits = outputs.logits[0]
        speak, silence, tokens = decide(self.model, logits, step.interval_threshold)
        layers = self.model.config.routed_layers if inputs else []
        scores, kept = (
            dict(zip(layers, (layer[0] for layer in rows or ()), strict=True))
            for rows in (outputs.router_scores, outputs.kept_tokens)
        )
        return StepResult(speak.tolist(), silence.tolist(), tokens.tolist(), logits, scores, kept)

    def _is_due(self, question: _Question, to_the_end: bool) -> bool:
        if question.interrupt:
            return True
        if self._waiting:
            return question.time < self._waiting[0].time
        return to_the_end or (question.time is not None and self.time is not None and question.time <= self.time)

    def _take_question(self, question: _Question) -> Work:
        time = (self.time or 0.0) if question.time is None else question.time
        self._emit(time, "user", question.text)
        self._unfed_turns.append({"role": "user", "content": question.text})
        if question.reply_now:
            yield from self._reply(time, question.arrival)

    def _watch(self, question: _Question | None) -> Work:
        """Sees the frames that wait, those up to the next question, and replies at the first that calls for it."""
        is_text = bool(self._unfed_turns) or not self._stream_open
        opening = self._take_unfed("stream") if is_text else self._interval
        # Where frames are forgotten must not depend on how many are seen at once, or what is said would.
        most = min(self.chunk_frames, self._evict(len(opening) if is_text else 0))
        chunk = [self._waiting.popleft()]
        limit = float("inf") if question is None else question.time
        while self._waiting and len(chunk) < most and self._waiting[0].time <= limit:
            chunk.append(self._waiting.popleft())
        self._warn_beyond_context()
        self._remember("text" if is_text else "interval", len(opening))
        self._num_in_sight = len(chunk)
        seen = yield self._look(opening, chunk)
        self._num_in_sight = 0
        speak, silence = list(seen.speak), seen.silence
        # A question asked for a frame's time is answered after the frame, whatever the model would have said there.
        # One that was asked when the frame had come finds that said, however late the frame was seen.
        if question is not None and question.received < limit <= chunk[-1].time:
            speak[-1] = False
        last = speak.index(True) if any(speak) else len(chunk) - 1
        # What a question would cut short at once is not begun.
        speak[last] = speak[last] and not any(question.interrupt for question in self._questions)
        self._unsee(chunk[last + 1 :])
        self.time = chunk[last].time
        self.num_frames += last + 1
        self.interval_probability = silence[last]
        self.frame_latencies = [clock.perf_counter() - frame.arrival for frame in chunk[: last + 1]]
        self.router_scores = {layer: rows[last] for layer, rows in seen.router_scores.items()}
        self.kept_tokens = {layer: rows[last] for layer, rows in seen.kept_tokens.items()}
        if speak[last]:
            yield from self._reply(self.time, chunk[last].arrival, silence[last])

    @property
    def _interval(self) -> list[int]:
        """What stands between two frames."""
        interval = self.model.config.frame_token_interval_id
        return [] if interval is None else [interval]

    def _look(self, opening: list[int], chunk: list[_Frame]) -> StreamStep:
        """The step that sees these frames, after what stands before them."""
        frame_ids = [self.model.config.frame_token_id] * self.model.config.frame_num_tokens
        ids, interval = list(opening), self._interval
        ends = []
        for index in range(len(chunk)):
            ids = ids + (interval if index else []) + frame_ids
            ends.append(len(ids) - 1)
            self._remember("interval", len(interval) if index else 0)
            self._remember("frame", len(frame_ids))
        self._stream_open = True
        features = torch.stack([frame.features for frame in chunk])
        return StreamStep(ids, ends, features, self.interval_threshold)

    def _unsee(self, frames: list[_Frame]) -> None:
        """Puts frames that were seen too early back to wait."""
        if frames:
            config = self.model.config
            separator = 0 if config.frame_token_interval_id is None else 1
            self.cache.crop(-len(frames) * (config.frame_num_tokens + separator))
            del self._pieces[-len(frames) * (1 + separator) :]
            self._waiting.extendleft(reversed(frames))

    def _remember(self, kind: str, length: int) -> None:
        if kind == "text" and self._pieces and self._pieces[-1].kind == "text":
            self._pieces[-1].length += length
        elif length > 0:
            self._pieces.append(_Piece(kind, length))

    def _evict(self, num_new_text: int) -> int:
        """
        Makes room for a frame and the text before it: the oldest frames go, and with them what separated them.

        Returns:
            `int`: How many frames may come before this has to be asked again.
        """
        if self.max_frames is None:
            return self.chunk_frames
        gone = self._to_forget(num_new_text)
        kept: list[_Piece] = []
        stays: list[torch.Tensor] = []
        for index, piece in enumerate(self._pieces):
            is_kept = index not in gone
            if piece.kind == "interval":
                # It stands before a frame, and stays between two that stay.
                is_kept = index + 1 not in gone and bool(kept) and kept[-1].kind == "frame"
            stays.append(torch.full((piece.length,), is_kept))
            if is_kept:
                kept.append(piece)
        if gone:
            self.model.evict_tokens(self.cache, torch.cat(stays))
            self._pieces = kept
        text = num_new_text + sum(piece.length for piece in self._pieces if piece.kind == "text")
        too_much_text = self.max_text_tokens is not None and text > self.max_text_tokens
        return 1 if too_much_text else self.max_frames - self.num_remembered

    def _to_forget(self, num_new_text: int) -> set[int]:
        """Which pieces, frames and text, go before a frame comes with so much text before it."""
        frames = [index for index, piece in enumerate(self._pieces) if piece.kind == "frame"]
        after_sinks = frames[self.sink_frames - 1] if 0 < self.sink_frames <= len(frames) else 0
        frames = frames[self.sink_frames :]
        # An eighth more than needed, so that the cache is moved at every so many frames and not at each.
        is_full = self.num_remembered == self.max_frames
        gone = set(frames[: 1 + self.max_frames // 8] if is_full else [])
        texts = [index for index, piece in enumerate(self._pieces) if piece.kind == "text"]
        total = num_new_text + sum(self._pieces[index].length for index in texts)
        if self.max_text_tokens is None or total <= self.max_text_tokens:
            return gone
        # Text goes only with the frames before it, so that it stays with those that it was said of. Of what was said
        # before the first frame, the system prompt for one, all stays.
        old = [index for index in texts[1:] if index > after_sinks]
        for frame in [index for index in frames if index not in gone]:
            while old and old[0] < frame and total > self.max_text_tokens * 7 // 8:
                total -= self._pieces[old[0]].length
                gone.add(old.pop(0))
            if total <= self.max_text_tokens * 7 // 8 or frame == frames[-1]:
                break
            gone.add(frame)
        return gone

    def _warn_beyond_context(self) -> None:
        context = self.model.config.text_config.max_position_embeddings
        if int(self.cache.get_seq_length()) > context:
            logger.warning_once(
                f"The stream has outgrown the {context} tokens that the language model was trained for, and what it "
                "says will suffer. Bound it with `max_frames` and `max_text_tokens`."
            )

    def _reply(self, time: float, arrival: float, interval_probability: float | None = None) -> Work:
        """Generates one reply and closes its turn, whether it ended by itself, at the token limit or by a question."""
        begin = clock.perf_counter()
        eos_token_id = self.processor.tokenizer.eos_token_id
        opening = self._take_unfed("assistant")
        self._remember("text", len(opening))
        said = yield StreamStep(opening, [len(opening) - 1])
        self._stream_open = False
        token_ids: list[int] = []
        latency = None
        interrupted = False
        while len(token_ids) < self.max_new_tokens and not interrupted:
            token = self._choose_token(said, token_ids)
            latency = clock.perf_counter() - arrival if latency is None else latency
            if token in self._eos_token_ids():
                break
            token_ids.append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            interrupted = any(question.interrupt and question.arrival > begin for question in self._questions)
            if len(token_ids) == self.max_new_tokens or interrupted:
                self._unfed_ids = [token]
            else:
                self._remember("text", 1)
                said = yield StreamStep([token], [0])
        if self.streamer is not None:
            self.streamer.end()
        self._unfed_ids = [*self._unfed_ids, eos_token_id]
        self._reply_tokens += len(token_ids)
        self._reply_seconds += clock.perf_counter() - begin
        text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        self._emit(time, "assistant", text, tuple(token_ids), interval_probability, latency, interrupted)

    def _choose_token(self, said: StepResult, token_ids: list[int]) -> int:
        if self.logits_processor is None and not self.do_sample:
            return said.tokens[0]
        scores = _speakable(self.model, said.logits)
        if self.logits_processor is not None:
            scores = self.logits_processor(torch.tensor([token_ids], device=scores.device, dtype=torch.long), scores)
        if self.do_sample:
            return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1))
        return int(scores.argmax(dim=-1))

    def _eos_token_ids(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, (list, tuple)) else [configured]
        return {self.processor.tokenizer.eos_token_id, *configured}

    def _take_unfed(self, then: str) -> list[int]:
        """Tokens of all that was said since the last step, up to where a frame ("stream") or a reply begins."""
        turns, before = self._unfed_turns, self._stream_open
        # What stands around replies is always the same, and a template takes long against a step of a small model.
        around = None if turns else self._bare_turns.get((before, then))
        if around is None:
            around = self.processor.encode_turns(turns, stream_open=before, then=then)
            if not turns:
                self._bare_turns[before, then] = around
        ids = self._unfed_ids + around
        self._unfed_ids, self._unfed_turns = [], []
        return ids

    # ---------------------------------------------------------------------------------------------------- helpers

    def _emit(
        self,
        time: float,
        role: str,
        text: str,
        token_ids: tuple[int, ...] = (),
        interval_probability: float | None = None,
        latency: float = 0.0,
        interrupted: bool = False,
    ) -> None:
        frame = self.num_frames - 1
        self.events.append(StreamEvent(time, frame, role, text, token_ids, interval_probability, latency, interrupted))

    def frame_times(self, count: int, time: float | Sequence[float] | None) -> list[float]:
        """Times of the frames that come next, as given to [`~StreamingSession.push`]: checked, and remembered."""
        past = self._received_time
        if time is None:
            first = 0.0 if past is None else past + 1 / self.fps
            times = [first + index / self.fps for index in range(count)]
        else:
            times = [float(t) for t in time] if isinstance(time, Sequence) else [float(time)]
        if len(times) != count:
            raise ValueError(f"Got {len(times)} times for {count} frames: give one a frame.")
        for before, after in zip([float("-inf") if past is None else past, *times], times, strict=False):
            if not after > before:
                raise ValueError(f"Frame times must increase, got {after} s after {before} s.")
        self._received_time = times[-1] if times else past
        return times

    def _refuse_if_closed(self) -> None:
        if self._is_broken:
            raise ValueError("This session was broken off amid a step; open another with `model.stream(processor)`.")
        if self.closed:
            raise ValueError("This session is closed; open another with `model.stream(processor)`.")


def within_context(config: Any, max_frames: int | None = None) -> dict[str, int]:
    """
    What a session is to remember of a stream that may have no end, within what the language model was trained for.

    Args:
        config ([`VideoLLMMoDConfig`]): The model's.
        max_frames (`int`, *optional*): Frames, by default as many as three quarters of the context hold.

    Returns:
        `dict`: `max_frames`, and as `max_text_tokens` half of what they leave, beside what is being said.
    """
    context, tokens = config.text_config.max_position_embeddings, config.frame_num_tokens + 1
    most = max(context * 3 // 4 // tokens, 1) if max_frames is None else max_frames
    return {"max_frames": most, "max_text_tokens": max((context - most * tokens) // 2, 1)}


def decide(
    model: Any, logits: torch.Tensor, interval_threshold: float | torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    All that a stream may want to know of scores (rows, vocabulary) of the next token.

    Returns:
        Of each row, whether the interval rule is to speak, the probability of silence, and the most likely token.
    """
    speak, silence = model.should_speak(logits, interval_threshold)
    return speak, silence, _speakable(model, logits).argmax(dim=-1)


def _speakable(model: Any, logits: torch.Tensor) -> torch.Tensor:
    # An id past the vocabulary has no score; one within it must not be said, for no frame would come with it.
    frame = model.config.frame_token_id
    scores = logits.to(torch.float32, copy=True)
    if frame < scores.shape[-1]:
        scores[..., frame] = float("-inf")
    return scores


__all__ = ["StepResult", "StreamEvent", "StreamStep", "StreamingSession", "decide", "within_context"]
