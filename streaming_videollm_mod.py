# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The state of one stream and its step: frames and questions go in, events come out."""

import copy
import math
import time as clock
from bisect import insort
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import torch
from torch.utils._triton import has_triton
from transformers.utils import logging

from .cache_videollm_mod import use_grouped_attention
from .checks_videollm_mod import check_count, check_fps, check_number, check_seconds, check_text
from .compiled_step_videollm_mod import CompiledSteps, decide, speakable
from .frame_reuse_videollm_mod import FrameReuse
from .remembering_videollm_mod import CHECKPOINT, StreamMemory, check_limits, choose_limits
from .speaking_videollm_mod import PROBE_QUESTION, Probe, SeenFrame, Speaking, new_policy


logger = logging.get_logger(__name__)

# The rate of frames pushed without a time is compared with the clock once, at this frame.
_CHECK_RATE_AT = 20


@dataclass(frozen=True)
class StreamEvent:
    """Something said in a stream."""

    time: float  # stream time in seconds at which it was said
    frame: int  # index of the last frame seen by then, -1 before the first
    role: str  # "assistant" or "user"
    text: str
    token_ids: tuple[int, ...] = ()  # tokens of a reply, without end-of-sequence; empty for a user
    interval_probability: float | None = None  # of silence where nobody asked; `None` for answers
    latency: float = 0.0  # seconds from the arrival of the frame or question to the first token of the reply
    interrupted: bool = False  # whether a question cut the reply short


@dataclass
class StreamStep:
    """The input that a session needs the model to process next, with the session's cache."""

    ids: list[int]  # new tokens, including frame tokens
    ends: list[int]  # indices of the tokens to decide after: the last of each frame and its text, or of the text
    frame_features: torch.Tensor | None = None  # (frames, features, width)
    interval_threshold: float | None = None  # the session's own, if it has one

    @property
    def num_frames(self) -> int:
        """Number of new frames."""
        return 0 if self.frame_features is None else len(self.frame_features)


@dataclass
class StepResult:
    """The model's output at each of the `ends` of a [`StreamStep`], and the routing of its frames."""

    speak: list[bool]  # the decision of the interval rule
    silence: list[float]  # probability of silence
    tokens: list[int]  # the most likely token, except the frame token
    logits: torch.Tensor  # (ends, vocabulary)
    router_scores: dict[int, torch.Tensor]  # by routed layer, (frames, tokens)
    kept_tokens: dict[int, torch.Tensor]  # by routed layer, True where a token was kept, (frames, tokens)


# The work of a session yields each step that it needs; `send` it the result.
Work = Generator[StreamStep, StepResult, None]


@dataclass
class _Frame:
    time: float
    features: torch.Tensor  # (features, width)
    arrival: float


@dataclass
class _Question:
    time: float | None  # `None` until the first frame arrives: an earlier question gets that frame's time
    text: str | None
    reply_now: bool
    arrival: float
    received: float  # time of the last frame that had arrived when the question was asked
    interrupt: bool = False
    probe: Probe | None = None
    role: str = "user"
    instructs: bool = False


def _order(question: _Question) -> tuple[bool, float]:
    """Return how questions are sorted: those that interrupt first, then those for the first frame, then by time."""
    return not question.interrupt, -math.inf if question.time is None else question.time


class StreamingSession:
    """
    A live stream on a model, with one growing key/value cache and one conversation.

    Add frames with [`~StreamingSession.push`] and questions with [`~StreamingSession.ask`]; iterate to get the events.
    After each frame the interval rule decides whether the model speaks (VideoLLM-online, arXiv 2406.11816, section
    3.3). Sessions on one model are independent and can be forked.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        fps (`float`, *optional*, defaults to 2.0): Frames to see per second.
        source_fps (`float`, *optional*): Rate at which frames without a time are pushed, such as a camera's 30. The
            session sees the frame that is on screen at each tick of `fps`. Defaults to `fps`: it sees all frames.
        system_prompt (`str`, *optional*): First text of the stream. Defaults to the processor's.
        interval_threshold (`float`, *optional*): Speak where silence is less likely. Defaults to the configuration's.
        max_new_tokens (`int`, *optional*, defaults to 100): Most tokens of a reply.
        chunk_frames (`int`, *optional*, defaults to 8): Most frames per step. Changes speed and memory, not replies.
        max_frames (`int`, *optional*): Most frames to remember, for streams without end. When it is reached, the
            oldest frames are evicted from the cache, an eighth of `max_frames` at once, and the gaps are closed.
            Defaults to the generation configuration's, if it has one. `None` for no limit.
        sink_frames (`int`, *optional*): Number of first frames that are never evicted. Defaults to the generation
            configuration's, or 0.
        max_text_tokens (`int`, *optional*): Most tokens of text to remember. Beyond it the oldest turns are evicted,
            with the frames before them. The system prompt and what is said before the second frame stay, or newer
            instructions in its place. Defaults to the generation configuration's. `None` for no limit.
        reuse_static (`float`, *optional*): Reuse the features of the last encoded frame for frames that hardly differ
            from it: no cell of 16 x 16 by more than so many grey levels of 255, such as 3. Defaults to encoding all
            frames. See [`FrameReuse`].
        speak (`str` or `Callable`, *optional*): When to speak without being asked. `"learned"`: by the interval rule.
            `"every"`: each `every` seconds. `"change"`: at a frame that differs from the one last spoken about.
            `"probe"`: if the model answers yes to "Is there anything new to report?". A function of a [`SeenFrame`]
            returns True, False, or the prompt of this reply. Defaults to the configuration's, or if `every` is
            given for a model that has learned when to speak, to `"every"`.
        every (`float`, *optional*): Period of `"every"`, and least time between two replies of `"change"` and two
            questions of `"probe"`, in seconds. Defaults to 2.
        speak_threshold (`float`, *optional*): What must be exceeded to speak: for `"change"` the cosine distance of
            the frames' averaged features, by default 0.05; for `"probe"` the probability of yes, by default 0.5.
        prompt (`str`, *optional*): What the user is taken to say before a reply that nobody asked for. Defaults to
            nothing with `"learned"`, and otherwise to `DEFAULT_PROMPT`. Prompts are not events.
        no_repeat (`int`, *optional*): How many of its last replies the model must not repeat unless asked. A reply
            that does, or is empty, is not shown and leaves the cache. A reply that repeats itself ends there. Defaults
            to 1, with `"learned"` to 0: no check.
        max_words (`int`, *optional*): Most words of a reply that nobody asked for. It ends with its last sentence
            that fits, if any. Defaults to 40, with `"learned"` to 0: no limit.
        min_silence (`float`, *optional*): Seconds after a reply in which the model is not asked to speak. Defaults to
            1 or `every` if that is less, with `"learned"` to 0.
        streamer (`BaseStreamer`, *optional*): Receives reply tokens as they are generated, as in `generate`.
        logits_processor (`LogitsProcessorList`, *optional*): Applied to the scores of reply tokens.
        do_sample (`bool`, *optional*, defaults to `False`): Whether to sample reply tokens as `generate` does.
        output_router_scores (`bool`, *optional*, defaults to `False`): Whether to keep `router_scores` and
            `kept_tokens` of the last frame.
        cache_dtype (`torch.dtype`, *optional*): Dtype of the stored keys and values; see [`VideoLLMMoDCache`].
        cache ([`VideoLLMMoDCache`], *optional*): An empty cache to use. Defaults to a new one. See its `lengths`.
        compile (`bool`, *optional*): Whether to compile the vision encoder, and the steps of one frame and one reply
            token, by `torch.compile`: on CUDA as CUDA graphs. The first session of a model compiles, which takes
            minutes for a large model. It needs `max_frames`, and with it is the default on CUDA.

    Attributes:
        time (`float`, *optional*): Time of the last frame seen, in seconds.
        num_frames (`int`): Number of frames seen.
        num_dropped (`int`): Number of frames dropped because frames came too fast.
        answering (*optional*): The question, as `hear` returns it, that the reply in progress answers.
        is_paused (`bool`): Whether `work` ends before the next frame or question.
        events (`list[StreamEvent]`): Everything said so far.
        interval_probability (`float`, *optional*): Probability of silence at the last frame.
        frame_latencies (`list[float]`): Seconds from arrival to decision, for each frame of the last step.
        router_scores (`dict[int, torch.Tensor]`): Scores of the last frame by routed layer, (tokens,).
        kept_tokens (`dict[int, torch.Tensor]`): True where a routed layer kept a token of the last frame, (tokens,).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float = 2.0,
        source_fps: float | None = None,
        system_prompt: str | None = None,
        interval_threshold: float | None = None,
        max_new_tokens: int = 100,
        chunk_frames: int = 8,
        max_frames: int | str | None = CHECKPOINT,
        sink_frames: int | None = None,
        max_text_tokens: int | str | None = CHECKPOINT,
        reuse_static: float | None = None,
        speak: str | Callable[[SeenFrame], bool | str] | None = None,
        every: float | None = None,
        speak_threshold: float | None = None,
        prompt: str | None = None,
        no_repeat: int | None = None,
        max_words: int | None = None,
        min_silence: float | None = None,
        streamer: Any | None = None,
        logits_processor: Any | None = None,
        do_sample: bool = False,
        output_router_scores: bool = False,
        cache_dtype: torch.dtype | None = None,
        cache: Any | None = None,
        compile: bool | None = None,
    ) -> None:
        fps = check_fps(fps)
        source_fps = None if source_fps is None else check_fps(source_fps, "source_fps")
        check_count("max_new_tokens", max_new_tokens)
        check_count("chunk_frames", chunk_frames)
        if interval_threshold is not None:
            interval_threshold = check_number("interval_threshold", interval_threshold, least=0, most=1)
        max_frames, sink_frames, max_text_tokens = choose_limits(model, max_frames, sink_frames, max_text_tokens)
        check_limits(model.config, max_frames, sink_frames, max_text_tokens, processor.frame_text_tokens)
        guards = {"prompt": prompt, "no_repeat": no_repeat, "max_words": max_words, "min_silence": min_silence}
        self._speaking = Speaking(new_policy(speak, every, speak_threshold, model.config.speak), **guards)
        if cache is not None and cache_dtype is not None:
            raise ValueError("Give `cache` or `cache_dtype`, not both: an existing cache has its own dtype.")
        self.model, self.processor = model, processor
        self.fps, self.source_fps = fps, source_fps
        self.max_frames, self.sink_frames, self.max_text_tokens = max_frames, sink_frames, max_text_tokens
        self.interval_threshold, self.max_new_tokens = interval_threshold, max_new_tokens
        self.chunk_frames = chunk_frames if max_frames is None else min(chunk_frames, max_frames - sink_frames)
        self.streamer, self.logits_processor, self.do_sample = streamer, logits_processor, do_sample
        self._warpers: Any | None = None  # made at the first draw, since a restored session gets `do_sample` later
        self.output_router_scores = output_router_scores
        self.reuse = None if reuse_static is None else FrameReuse(reuse_static)

        self.cache = self._new_cache(cache_dtype) if cache is None else cache
        self._must_compile, self._compiled = bool(compile), self._compile(compile, is_own=cache is None)
        self.time: float | None = None
        self.num_frames = self.num_dropped = self._num_in_step = 0
        self.answering: _Question | None = None
        self.events: list[StreamEvent] = []
        self.interval_probability: float | None = None
        self.frame_latencies: list[float] = []
        self.router_scores: dict[int, torch.Tensor] = {}
        self.kept_tokens: dict[int, torch.Tensor] = {}
        self.closed = self.is_paused = self._is_working = self._is_broken = False
        self.answers_early = False  # questions before the first frame are answered at once, and not at that frame
        self._waiting: deque[_Frame] = deque()
        self._questions: deque[_Question] = deque()
        self._received_time: float | None = None
        self._frame_size: tuple[int, int] | None = None
        # Frames without a time are counted from this time on.
        self._untimed_from, self._num_untimed, self._untimed_arrival = 0.0, 0, 0.0
        # Text that is said but not in the cache yet: the end of a reply, then turns. The next step feeds it.
        self._unfed_ids: list[int] = []
        prompt = check_text("The system prompt", processor.system_prompt if system_prompt is None else system_prompt)
        self._unfed_turns: list[dict[str, str]] = [{"role": "system", "content": prompt}]
        self._bare_turns: dict[tuple[bool, str, bool], list[int]] = {}
        self._stream_open = False
        self._memory = StreamMemory(max_frames, sink_frames, max_text_tokens)
        self._reply_tokens, self._reply_seconds = 0, 0.0
        self._interrupted = -math.inf  # replies that began earlier are cut short

    def push(self, frames: Any, *, time: float | Sequence[float] | None = None) -> list[StreamEvent]:
        """
        Add one or more frames, and return the new events up to the last of them, in order.

        Args:
            frames (PIL image, uint8 array or tensor (height, width, 3), or several of them):
                Frames in order of time. Several may also be one array (frames, height, width, 3).
            time (`float` or `Sequence[float]`, *optional*): Capture time of each frame in seconds, increasing. The
                session sees every frame that has a time. Frames without one come at `source_fps`, from 0 on.

        Raises:
            `ValueError`: If frames have another form or size, times do not increase, or the session is closed.
        """
        self._refuse_if_closed()
        arrival, device = clock.perf_counter(), self.model.device
        resized = self.processor.resize_frames(frames, device)
        before = self._received_time, self._untimed_from, self._num_untimed
        try:
            pixels, times = self.sample(resized, time)
            features = [row for part in pixels.split(self.chunk_frames) for row in self._encode(part)]
        except BaseException:
            # None of the frames was received, so they may be pushed again.
            self._received_time, self._untimed_from, self._num_untimed = before
            raise
        for at, row in zip(times, features, strict=True):
            self.receive(row, at, arrival)
        del resized, pixels, features  # The model may speak for long.
        return self._run()

    def ask(
        self,
        text: str,
        *,
        time: float | None = None,
        reply_now: bool = True,
        interrupt: bool = False,
        instructs: bool = False,
    ) -> list[StreamEvent]:
        """
        Add a question or an instruction. Return its events if it is due; otherwise a later call returns them.

        Args:
            text (`str`): What the user says.
            time (`float`, *optional*): Stream time in seconds. Questions come in order of time, each after a frame of
                the same time. Defaults to the time of the last frame pushed, or of the first one to come.
            reply_now (`bool`, *optional*, defaults to `True`): Whether the model must answer at once. Otherwise it
                keeps watching and speaks when it decides to: for instructions such as "Narrate the video".
            interrupt (`bool`, *optional*, defaults to `False`): Whether to cut short a reply in progress and come
                before waiting frames, without a `time`. A streamer may ask so during `push`.
            instructs (`bool`, *optional*, defaults to `False`): Whether these are instructions that replace earlier
                ones: they are never evicted, and the earlier ones are like other text.

        Raises:
            `ValueError`: If the text is empty, there is no frame to answer from, the time lies before a frame or
            question already processed, or the session is closed.
        """
        self._refuse_if_closed()
        if reply_now and time is None and self._received_time is None:
            raise ValueError("There is no frame to answer from yet: push one first, or ask with `reply_now=False`.")
        self.hear(text, time=time, reply_now=reply_now, interrupt=interrupt, instructs=instructs)
        return self._run()

    def hear(
        self,
        text: str | None,
        *,
        time: float | None = None,
        reply_now: bool = True,
        interrupt: bool = False,
        role: str = "user",
        instructs: bool = False,
    ) -> _Question:
        """
        Queue a question for `work`, as [`~StreamingSession.ask`] does, and return it as it waits. It may also come
        before the first frame. Without a `text` the model replies to what it has seen and heard so far. With the
        `role` `"assistant"` the text is an earlier reply of the model.
        """
        self._refuse_if_closed()
        if text is None and not reply_now or role not in ("user", "assistant"):
            raise ValueError(f"Got {text=}, {role=}: no text needs `reply_now=True`; a role is user or assistant.")
        if text is not None and not check_text("A question", text).strip():
            raise ValueError(f"A question must be a text that is not empty, got {text!r}.")
        if interrupt and time is not None:
            raise ValueError("A question that interrupts is asked now: leave `time` out.")
        arrival = clock.perf_counter()
        received = -math.inf if self._received_time is None else self._received_time
        if interrupt:
            time = self.time
        else:
            time = self._received_time if time is None else check_seconds("time", time)
            if time is not None and self.time is not None and time < self.time:
                raise ValueError(f"The question's time is {time} s, but the stream is at {self.time} s already.")
        question = _Question(time, text, reply_now, arrival, received, interrupt, None, role, instructs)
        insort(self._questions, question, key=_order)
        return question

    def withdraw(self, question: _Question) -> bool:
        """Remove a question that `hear` returned. Return whether it still waited."""
        if is_waiting := question in self._questions:
            self._questions.remove(question)
        return is_waiting

    def interrupt(self, begun: float = math.inf) -> None:
        """Cut short the reply in progress, if there is one and it had begun by this time of `time.perf_counter()`."""
        self._interrupted = max(self._interrupted, min(begun, clock.perf_counter()))

    def discard(self) -> None:
        """Drop frames and questions that wait, and cut short the reply in progress and later ones."""
        self._waiting.clear()
        self._questions.clear()
        self._interrupted = math.inf

    def set_speaking(
        self,
        *,
        speak: str | Callable[[SeenFrame], bool | str] | None = None,
        every: float | None = None,
        speak_threshold: float | None = None,
        **guards: Any,
    ) -> None:
        """Change when to speak without being asked. The options, with their defaults, are those of the session."""
        speaking = Speaking(new_policy(speak, every, speak_threshold, self.model.config.speak), **guards)
        speaking.follow(self._speaking)
        self._speaking = speaking

    def probe(self, question: str, *, answers: Sequence[str] = ("Yes", "No")) -> float:
        """
        Return how likely the model answers a question about what it has seen with the first of two answers, against
        the second. Nothing of it stays: no event, and no token in the cache.

        Args:
            question (`str`): What the user asks.
            answers (`Sequence[str]`, *optional*, defaults to `("Yes", "No")`): Two answers that begin differently.

        Returns:
            `float`: Probability of the first answer divided by that of both, summed over the first tokens of their
            usual spellings.

        Raises:
            `ValueError`: If a text is empty, both answers begin with the same token, there is no frame to answer from,
                a reply is in progress, or the session is closed.
        """
        if self._is_working:
            raise ValueError("A session cannot be probed during a reply: probe it when `push` or `ask` has returned.")
        probe = self.hear_probe(question, answers)
        self._run()
        return probe.probability

    def hear_probe(self, question: str, answers: Sequence[str] = ("Yes", "No")) -> Probe:
        """Queue a question for `work`, as [`~StreamingSession.probe`] asks it, after the last frame received."""
        self._refuse_if_closed()
        if self._received_time is None:
            raise ValueError("There is no frame to answer from yet: push one first.")
        probe, time = Probe(self.processor.tokenizer, question, answers), self._received_time
        asked = _Question(time, question, False, clock.perf_counter(), math.inf, probe=probe)
        insort(self._questions, asked, key=_order)
        return probe

    def sample(self, frames: torch.Tensor, time: float | Sequence[float] | None) -> tuple[torch.Tensor, list[float]]:
        """Choose the frames to see among `frames` (frames, channels, height, width); return them and their times."""
        size, expected = tuple(frames.shape[-2:]), self._frame_size or self.model.frame_size
        if expected not in (None, size):
            raise ValueError("Frames of this stream must be {} x {} pixels, got {} x {}.".format(*expected, *size))
        if time is None:
            indices, times = self._ticks(len(frames))
            self._num_untimed += len(frames)
            if self.source_fps is None and len(frames) == 1:
                self._warn_if_too_fast()
            frames = frames[indices]
        else:
            given = time.tolist() if hasattr(time, "tolist") else time
            given = given if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else [given]
            times = [check_seconds(f"time[{index}]", at) for index, at in enumerate(given)]
            if len(times) != len(frames):
                raise ValueError(f"Got {len(times)} times for {len(frames)} frames: give one per frame.")
            past = -math.inf if self._received_time is None else self._received_time
            for before, after in zip([past, *times], times, strict=False):
                if not after > before:
                    raise ValueError(f"Frame times must increase, got {after} s after {before} s.")
            self._untimed_from, self._num_untimed = times[-1] + 1 / (self.source_fps or self.fps), 0
        self._received_time = times[-1] if times else self._received_time
        self._frame_size = size
        return frames, times

    def count_seen(self, count: int) -> int:
        """Return how often the session would see one of the next `count` frames without a time."""
        return len(self._ticks(count)[0])

    def receive(self, features: torch.Tensor, time: float, arrival: float) -> None:
        """Queue a frame's `features` (features, width) for `work`; `arrival` is by `time.perf_counter()`."""
        self._waiting.append(_Frame(time, features, arrival))

    def close(self) -> list[StreamEvent]:
        """Answer the remaining questions and end the session. Its figures stay readable."""
        events = [] if self.closed or self._is_broken else self._run(to_the_end=True)
        self.closed = True
        return events

    def fork(self) -> "StreamingSession":
        """Return a copy that continues independently on the same model; raise `ValueError` during a reply."""
        if self._is_working:
            raise ValueError("A session cannot be forked during a reply: fork it when `push` or `ask` has returned.")
        twin = copy.copy(self)
        for name in ("cache", "reuse", "_waiting", "_questions", "_unfed_ids", "_unfed_turns", "_memory"):
            setattr(twin, name, copy.deepcopy(getattr(self, name)))
        twin.events, twin._speaking = list(self.events), self._speaking.fork()
        if self._compiled is not None:
            compiled = self._compiled
            twin._compiled = CompiledSteps(self.model, twin.cache, compiled.frame_ids, compiled.most_text)
        return twin

    def __iter__(self) -> Iterator[StreamEvent]:
        return iter(self.events)

    @property
    def frame_latency(self) -> float | None:
        """Seconds from the last frame's arrival to the decision on it, or `None` before the first."""
        return self.frame_latencies[-1] if self.frame_latencies else None

    @property
    def num_waiting(self) -> int:
        """Number of frames received but not seen yet."""
        return len(self._waiting) + self._num_in_step

    @property
    def num_reused(self) -> int:
        """Number of frames that reused the features of an earlier one."""
        return 0 if self.reuse is None else self.reuse.num_reused

    @property
    def speak(self) -> str:
        """Name of the policy that chooses when to speak, `"function"` for a function."""
        return self._speaking.policy.name

    @property
    def num_suppressed(self) -> int:
        """Number of replies that were not shown, because they said nothing new."""
        return self._speaking.num_suppressed

    @property
    def num_remembered(self) -> int:
        """Number of frames in the cache: all frames seen, minus those evicted."""
        return self._memory.num_frames

    @property
    def tokens_per_second(self) -> float | None:
        """Reply tokens generated per second, or `None` before the first reply."""
        return self._reply_tokens / self._reply_seconds if self._reply_seconds > 0 else None

    @property
    def keep_ratio(self) -> float:
        """Share of a frame's tokens that a layer keeps, averaged over layers."""
        counts = self.model.config.layer_keep_counts
        return sum(counts) / (len(counts) * self.model.config.frame_num_tokens)

    def _new_cache(self, dtype: torch.dtype | None) -> Any:
        """Return a cache with room for what the session may remember, or one that grows without `max_frames`."""
        model = self.model
        cache, frame_tokens = model.new_cache(dtype=dtype), model.config.frame_num_tokens
        if self.max_frames is not None:
            # Text and a reply come between two evictions. If there is more text, layers grow.
            text = self.max_frames * frame_tokens // 8 if self.max_text_tokens is None else self.max_text_tokens
            text += self.max_frames * self.processor.frame_text_tokens + self.max_new_tokens + 256
            for layer, count in zip(cache.layers, model.config.layer_keep_counts, strict=True):
                layer.capacity = self.max_frames * count + text
        # With layers on several devices, masks are moved between them, and only those of the library survive that.
        on_one_device = len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2
        cache.is_grouped = on_one_device and use_grouped_attention(model.base_model.language_model)
        return cache

    def _compile(self, wanted: bool | None, *, is_own: bool) -> CompiledSteps | None:
        """Return the compiled steps if they are wanted, or if that is left open and they are known to help."""
        model = self.model
        can = self.max_frames is not None and is_own and self.cache.is_grouped
        if wanted and not can:
            raise ValueError(
                "`compile=True` needs `max_frames`, no `cache`, and a model on one device with "
                "`attn_implementation='sdpa'`: set `max_frames`, for example to 600, or leave `compile` out."
            )
        if not can or not (model.device.type == "cuda" and has_triton() if wanted is None else wanted):
            return None
        most_text = self.processor.frame_text_tokens if self.processor.numbers_frames else None
        return CompiledSteps(model, self.cache, self.processor.encode_typical_frame(), most_text)

    def _run_compiled(self, name: str, *inputs: Any) -> Any | None:
        """
        Run a method of the compiled steps and return its result, or `None` if steps are not compiled. After an error
        the session runs uncompiled, unless the user asked for compilation.
        """
        try:
            return None if self._compiled is None else getattr(self._compiled, name)(*inputs)
        except Exception as error:
            if self._must_compile:
                raise
            # A step is counted after it has run, so it can run again.
            logger.warning(f"Steps of this session run uncompiled from now on, because a compiled one failed: {error}")
            self._compiled = None
            return None

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the features (features, width) of each of some frames (frames, channels, height, width)."""
        chosen = None if self.reuse is None else self.reuse.choose(pixels)
        if chosen is not None:
            pixels = pixels[[index for index, thumbnail in enumerate(chosen) if thumbnail is not None]]
        features: Sequence[torch.Tensor] | None = ()
        if len(pixels):
            pixel_values = self.processor.normalize_frames(pixels)
            features = self._run_compiled("encode", pixel_values)
            features = self.model.encode_frames(pixel_values) if features is None else features
        return features if chosen is None else self.reuse.spread(chosen, features)

    def _run(self, to_the_end: bool = False) -> list[StreamEvent]:
        """Do all work that is due, and return the new events."""
        if self._is_working:
            return []  # A streamer called during a reply: the work in progress includes its question.
        first = len(self.events)
        self._is_working = True
        try:
            work, result = self.work(to_the_end=to_the_end), None
            with suppress(StopIteration):
                while True:
                    result = self._execute(work.send(result))
        except BaseException:
            # It is unknown which tokens of the step reached the cache.
            self._is_broken = True
            raise
        finally:
            self._is_working = False
        return self.events[first:]

    def work(self, *, to_the_end: bool = False) -> Work:
        """Process waiting frames and due questions, `to_the_end` also later questions; the caller runs the model."""
        while not self.is_paused:
            if self._waiting and self.time is None:
                # Questions asked before any frame get the time of the first.
                for early in (question for question in self._questions if question.time is None):
                    early.time = self._waiting[0].time
                self._questions = deque(sorted(self._questions, key=_order))
            question = self._questions[0] if self._questions else None
            if question is not None and self._is_due(question, to_the_end):
                yield from self._take_question(self._questions.popleft())
            elif self._waiting:
                yield from self._watch(question)
            else:
                return

    def has_work(self, *, to_the_end: bool = False) -> bool:
        """Whether a frame waits or a question is due, unless `is_paused`."""
        if self.is_paused:
            return False
        return bool(self._waiting) or (bool(self._questions) and self._is_due(self._questions[0], to_the_end))

    def drop_oldest(self) -> bool:
        """Drop the oldest waiting frame unseen; return whether there was one."""
        if has_frame := bool(self._waiting):
            self._waiting.popleft()
            self.count_dropped()
        return has_frame

    def count_dropped(self) -> None:
        """Count a frame that was dropped unseen."""
        self.num_dropped += 1

    def _execute(self, step: StreamStep) -> StepResult:
        """Run one step on this session's model, and wait for the device once."""
        threshold = step.interval_threshold
        features = None if step.frame_features is None else step.frame_features[None]
        collects = self.output_router_scores and features is not None
        outputs = None
        if self._compiled is not None and self._compiled.fits(step.ids, step.num_frames):
            threshold = self.model.config.interval_threshold if threshold is None else threshold
            outputs = self._run_compiled("run", step.ids, features, threshold, collects)
        if outputs is not None:
            decisions, logits, *seen = outputs
        else:
            device = self.model.get_input_embeddings().weight.device
            with torch.no_grad():
                outputs = self.model(
                    input_ids=torch.tensor([step.ids], device=device),
                    frame_features=features,
                    cache=self.cache,
                    use_cache=True,
                    logits_to_keep=torch.tensor(step.ends, device=device),
                    output_router_scores=collects,
                )
            logits = outputs.logits[0]
            decisions = decide(self.model, logits, threshold)
            seen = [[layer[0] for layer in rows] for rows in (outputs.router_scores, outputs.kept_tokens) if rows]
        speak, silence, tokens = decisions.tolist()
        scores, kept = (
            (dict(zip(self.model.config.routed_layers, rows, strict=True)) for rows in seen) if seen else ({}, {})
        )
        return StepResult([x > 0 for x in speak], silence, [int(x) for x in tokens], logits, scores, kept)

    def _is_due(self, question: _Question, to_the_end: bool) -> bool:
        if question.interrupt:
            return True
        if self._waiting:
            return question.time < self._waiting[0].time
        is_early = self.answers_early and self._received_time is None
        if is_early and any(waiting.reply_now for waiting in self._questions):
            return True
        return to_the_end or (question.time is not None and self.time is not None and question.time <= self.time)

    def _take_question(self, question: _Question) -> Work:
        if question.probe is not None:
            yield from self._probe(question.probe)
            return
        # A step that was running when a question interrupted has seen frames since.
        time = (self.time or 0.0) if question.time is None or question.interrupt else question.time
        if question.text is not None:
            self.events.append(StreamEvent(time, self.num_frames - 1, question.role, question.text))
            self._unfed_turns.append({"role": question.role, "content": question.text})
            self._memory.instructs |= question.instructs
        if question.reply_now:
            self.answering = question
            yield from self._reply(time, question.arrival)
            self.answering = None

    def _probe(self, probe: Probe) -> Work:
        """Ask a question, read the probability of its answers, and remove it from the cache again."""
        turns = [*self._unfed_turns, {"role": "user", "content": probe.question}]
        asked = self._unfed_ids + self._encode_turns(turns, "assistant", 0.0, self.num_frames + 1)
        seen = yield StreamStep(asked, [len(asked) - 1])
        self.cache.crop(-len(asked), num_frames=0)
        probe.read(seen.logits[0])

    def _watch(self, question: _Question | None) -> Work:
        """See waiting frames in one step, up to the next question; reply at the first frame that calls for it."""
        is_text = bool(self._unfed_turns) or not self._stream_open
        opening = self._take_unfed("stream", self._waiting[0].time)
        limit = math.inf if question is None else question.time
        most = self._make_room(len(opening) if is_text else 0)
        ready = [frame for frame in islice(self._waiting, most) if frame.time <= limit]
        count, is_chosen = self._speaking.choose(ready)
        chunk = [self._waiting.popleft() for _ in range(count)]
        self._warn_beyond_context()
        self._num_in_step = len(chunk)
        seen = yield self._see(opening, is_text, chunk)
        self._num_in_step, silence = 0, seen.silence
        speak = self._speaking.decide(chunk, self.num_frames, seen.speak, silence, is_chosen)
        last = next((index for index, wanted in enumerate(speak) if wanted), len(chunk) - 1)
        self._unsee(chunk[last + 1 :])
        self.time = chunk[last].time
        self.num_frames += last + 1
        self.interval_probability = silence[last]
        self.frame_latencies = [clock.perf_counter() - frame.arrival for frame in chunk[: last + 1]]
        self.router_scores = {layer: rows[last] for layer, rows in seen.router_scores.items()}
        self.kept_tokens = {layer: rows[last] for layer, rows in seen.kept_tokens.items()}
        yield from self._speak(chunk[last], speak[last], silence[last])

    def _speak(self, frame: _Frame, wanted: bool | str, silence: float) -> Work:
        """Say something at the frame just seen if that is `wanted`, with this text as the prompt if it is one."""
        # A question with the frame's time takes the place of what the model would say. It does not if it was asked
        # when the frame had arrived already, however late the frame is seen. Prompts follow what needs no answer.
        while wanted and self._questions and self._questions[0].time == frame.time > self._questions[0].received:
            if self._questions[0].reply_now or self._speaking.is_learned:
                return
            yield from self._take_question(self._questions.popleft())
        # A reply that a waiting question would interrupt at once does not start.
        if not wanted or any(question.interrupt for question in self._questions):
            return
        policy = self._speaking.policy
        policy.attempt(frame)
        if policy.name == "probe":
            probe = Probe(self.processor.tokenizer, PROBE_QUESTION)
            yield from self._probe(probe)
            if probe.probability <= policy.threshold:
                return
        prompt = wanted if isinstance(wanted, str) else self._speaking.prompt
        yield from self._reply(frame.time, frame.arrival, silence, prompt)

    def _make_room(self, num_new_text: int) -> int:
        """Evict what must go before the next frame; return how many frames may come before the next eviction."""
        if runs := self._memory.forget(num_new_text):
            self.model.evict_tokens(self.cache, runs)
        if self._memory.is_crowded:
            logger.warning_once("The first texts nearly fill `max_text_tokens`, so frames are forgotten: raise it.")
        # Evictions must not depend on how many frames are seen at once, or replies would.
        return min(self.chunk_frames, self._memory.room(num_new_text))

    def _see(self, opening: list[int], is_text: bool, chunk: list[_Frame]) -> StreamStep:
        """Return the step that sees these frames, with the tokens that stand before them."""
        frame = [self.model.config.frame_token_id] * self.model.config.frame_num_tokens
        ids, ends = [], []
        self._stream_open = True
        for offset, shown in enumerate(chunk):
            index = self.num_frames + offset + 1
            before = self._encode_turns([], "stream", shown.time, index) if offset else opening
            own, after = self.processor.encode_frame(shown.time, index)
            # The text before a frame is evicted with it, unless one token belongs to both that and other text.
            splits = before[len(before) - len(own) :] == own
            if is_text and offset == 0:
                own = own if splits else []
                self._memory.add_text(len(before) - len(own))
                separator = 0
            else:
                separator = len(before) - len(own) if splits else 0
                own = before[separator:]
            self._memory.add_frame(len(own) + len(frame) + len(after), separator)
            ids += [*before, *frame, *after]
            ends.append(len(ids) - 1)
        return StreamStep(ids, ends, torch.stack([frame.features for frame in chunk]), self.interval_threshold)

    def _unsee(self, frames: list[_Frame]) -> None:
        """Return the newest frames to the queue: the model speaks before they are seen."""
        if frames:
            self.cache.crop(-self._memory.remove_frames(len(frames)), num_frames=len(frames))
            self._waiting.extendleft(reversed(frames))

    def _reply(
        self, time: float, arrival: float, interval_probability: float | None = None, prompt: str | None = None
    ) -> Work:
        """
        Generate one reply, and close its turn when it ends, reaches the token limit or is interrupted. A reply with a
        `prompt`, which may be empty, was not asked for: it may be cut short or withdrawn.
        """
        begin, tokenizer = clock.perf_counter(), self.processor.tokenizer
        before = self._unfed_ids, self._unfed_turns, self._stream_open
        if prompt:
            self._unfed_turns = [*self._unfed_turns, {"role": "user", "content": prompt}]
        opening = self._take_unfed("assistant")
        said = yield StreamStep(opening, [len(opening) - 1])
        self._stream_open = False
        eos = self.model.generation_config.eos_token_id
        end = self.processor.end_of_reply_id
        ends = {end, tokenizer.eos_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos])}
        draft = self._speaking.new_draft(tokenizer, self.streamer, is_asked=prompt is None)
        token, num_fed, latency, interrupted, is_complete = None, 0, None, False, False
        while len(draft.token_ids) < self.max_new_tokens and not (interrupted or draft.must_end):
            if token is not None:
                said = yield StreamStep([token], [0])
                num_fed += 1
            token = self._choose_token(said, draft.token_ids)
            latency = clock.perf_counter() - arrival if latency is None else latency
            if is_complete := token in ends:
                break
            draft.add(token)
            interrupted = self._interrupted > begin
            interrupted |= any(question.interrupt and question.arrival > begin for question in self._questions)
        self._reply_tokens += len(draft.token_ids)
        self._reply_seconds += clock.perf_counter() - begin
        is_shown = draft.end(is_complete=is_complete)
        kept = len(draft.token_ids) if is_shown else -len(opening)
        if kept < num_fed:
            self.cache.crop(kept - num_fed, num_frames=0)
        if not is_shown:
            self._unfed_ids, self._unfed_turns, self._stream_open = before
            self._speaking.num_suppressed += 1
            return
        self._memory.add_text(len(opening))
        self._memory.add_text(min(kept, num_fed))
        self._unfed_ids = [*draft.token_ids[num_fed:], end]
        text = tokenizer.decode(draft.token_ids, skip_special_tokens=True).strip()
        self._speaking.shown(time, text)
        details = (tuple(draft.token_ids), interval_probability, latency, interrupted)
        self.events.append(StreamEvent(time, self.num_frames - 1, "assistant", text, *details))

    def _choose_token(self, said: StepResult, token_ids: list[int]) -> int:
        if self.logits_processor is None and not self.do_sample:
            return said.tokens[0]
        scores = speakable(self.model, said.logits)
        if self.do_sample and self._warpers is None:
            self._warpers = self.model.new_warpers()
        ids = torch.tensor([token_ids], device=scores.device, dtype=torch.long)
        for processors in (self.logits_processor, self._warpers):
            scores = scores if processors is None else processors(ids, scores)
        if self.do_sample:
            return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1))
        return int(scores.argmax(dim=-1))

    def _take_unfed(self, then: str, time: float = 0.0) -> list[int]:
        """Return the tokens of everything said since the last step, up to a frame ("stream") at `time` or a reply."""
        ids = self._unfed_ids + self._encode_turns(self._unfed_turns, then, time, self.num_frames + 1)
        self._unfed_ids, self._unfed_turns = [], []
        return ids

    def _encode_turns(self, turns: list[dict[str, str]], then: str, time: float, index: int) -> list[int]:
        """Return the tokens of turns and of what stands before a reply, or before the frame `index` at `time`."""
        options = {"stream_open": self._stream_open, "then": then, "time": time, "index": index}
        if turns or (then == "stream" and self.processor.numbers_frames):
            return self.processor.encode_turns(turns, **options)
        # These tokens are always the same. They are stored, since a template is slow beside a small model.
        key = (self._stream_open, then, index == 1)
        if key not in self._bare_turns:
            self._bare_turns[key] = self.processor.encode_turns([], **options)
        return self._bare_turns[key]

    def _ticks(self, count: int) -> tuple[list[int], list[float]]:
        """Return which of the next `count` frames without a time are on screen at a tick, and the ticks' times."""
        first, rates = self._num_untimed, (self.fps, self.source_fps or self.fps)
        fps, source_fps = (Fraction(rate).limit_denominator(100_000) or Fraction(rate) for rate in rates)
        ticks = [math.ceil((first + index) * fps / source_fps) for index in range(count + 1)]
        shown = [(index, tick) for index in range(count) for tick in range(ticks[index], ticks[index + 1])]
        return [index for index, _ in shown], [self._untimed_from + tick / self.fps for _, tick in shown]

    def _warn_if_too_fast(self) -> None:
        now = clock.perf_counter()
        if self._num_untimed == 1:
            self._untimed_arrival = now
        elif self._num_untimed == _CHECK_RATE_AT and now - self._untimed_arrival < _CHECK_RATE_AT / self.fps / 2:
            logger.warning_once(
                f"Frames without a time arrive more than twice as fast as `fps`, {self.fps}: stream time runs ahead. "
                "Push each with its time, as `processor.sample_every(camera, 0.5)` yields it, or set the camera's "
                f"rate, such as `source_fps=30`. If they are already sampled, set `source_fps={self.fps}`."
            )

    def _warn_beyond_context(self) -> None:
        context = self.model.config.text_config.max_position_embeddings
        if int(self.cache.get_seq_length()) > context:
            logger.warning_once(
                f"The stream is longer than the language model's context, {context} tokens: replies will get worse. "
                "Limit it with `max_frames` and `max_text_tokens`."
            )

    def _refuse_if_closed(self) -> None:
        if self._is_broken or self.closed:
            why = "failed during a step" if self._is_broken else "is closed"
            raise ValueError(f"This session {why}; open another with `model.stream(processor)`.")


__all__ = ["StepResult", "StreamEvent", "StreamStep", "StreamingSession"]
