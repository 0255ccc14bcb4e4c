# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Free streaming: the model sees its own replies as history, as in use.

Measures are event F1, answer accuracy, correct silence, and the delay of events.
"""

import gc
import math
import time as clock
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from videollm_mod.remembering_videollm_mod import checkpoint_limits
from videollm_mod.serving import StreamingEngine
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.dialogues import ceil_frame, round_frame
from videollm_mod.train.data.faults import naming, open_video, read_clip
from videollm_mod.train.data.windows import Dialogue
from videollm_mod.train.teacher_forcing import evaluate_metric


# Text tokens that a stream of the engine remembers. A clip with more text is streamed in a separate session.
_TEXT_TOKENS = 2048
_END = object()


def stream_example(
    model: Any, processor: Any, example: dict[str, Any], *, fps: float = 2.0, **options: Any
) -> tuple[list[Any], int]:
    """
    Stream the video of an example, and ask its user's questions at their times.

    The model sees its own replies as history. It answers a question at once if the data answer it at the same frame. A
    user's message without a time comes before the first frame, and one after the last frame comes at the last one.

    Returns:
        The session's events, and the number of frames.
    """
    session = model.stream(processor, fps=fps, **options, **_system_prompt(example))
    stream, frames = open_frames(session, example)
    for _ in _show(stream, example, frames, fps):
        pass
    session.close()
    return session.events, session.num_frames


def stream_examples(
    model: Any,
    processor: Any,
    examples: Iterable[dict[str, Any]],
    *,
    fps: float = 2.0,
    batch_size: int = 8,
    **options: Any,
) -> Iterator[tuple[dict[str, Any], list[Any], int]]:
    """
    Stream examples as [`stream_example`] does, several at a time in a [`StreamingEngine`].

    The results are the same as one by one. When one example ends, the next begins. Videos are read while they play.

    An example gets a separate session if the engine would forget a part of it. This is so if its video exceeds what
    the checkpoint remembers or has an unknown length, or if its text exceeds the memory of an engine's stream. It also
    gets one if it has frame features. All examples get their own sessions with `batch_size=1`, with an option for
    memory or tokens (`cache`, `max_frames`, `max_text_tokens`, `streamer`), and if the model is sharded or spread over
    several devices.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (iterable of `dict`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        batch_size (`int`, *optional*, defaults to 8): Number of examples to stream at a time.
        options: Options of [`StreamingSession`].

    Yields:
        Each example, its session's events and its number of frames, when the example ends.

    Raises:
        `ValueError`: If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if batch_size == 1 or not _can_share(model, options):
        for example in examples:
            yield example, *stream_example(model, processor, example, fps=fps, **options)
        return
    yield from _SharedStreaming(model, processor, fps, batch_size, options).play(examples)


class _SharedStreaming:
    """Stream several examples at a time in one engine, and replace it with a larger one if an example needs it."""

    def __init__(self, model: Any, processor: Any, fps: float, batch_size: int, options: dict[str, Any]) -> None:
        self.model, self.processor, self.fps, self.batch_size = model, processor, fps, batch_size
        self.stream_one = partial(stream_example, model, processor, fps=fps, **options)
        self.options = {name: value for name, value in options.items() if name != "cache_dtype"}
        self.cache_dtype = options.get("cache_dtype")
        frame_tokens = model.config.frame_num_tokens + processor.frame_text_tokens
        context, said = model.config.text_config.max_position_embeddings, checkpoint_limits(model.generation_config)
        self.most = min(context // frame_tokens, said.get("max_frames", context))
        self.most_text = min(_TEXT_TOKENS, said.get("max_text_tokens", _TEXT_TOKENS))
        self.engine: StreamingEngine | None = None
        self.playing: dict[Any, tuple[dict[str, Any], Iterator[None]]] = {}

    def play(self, examples: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Any], int]]:
        """Stream all examples; yield as [`stream_examples`] does."""
        waiting = iter(examples)
        example = next(waiting, None)
        try:
            while example is not None or self.playing:
                while example is not None and len(self.playing) < self.batch_size:
                    count = max(_most_frames(example, self.fps), 1)
                    if count > self.most:
                        yield example, *self.stream_one(example)
                    elif self._make_room(count):
                        self._open(example, count)
                    else:
                        break
                    example = next(waiting, None)
                yield from self._advance()
                if self.playing:
                    self.engine.step()
        finally:
            # An engine and its captured steps refer to each other, so its memory waits for the garbage collector.
            self.engine = None
            gc.collect()

    def _make_room(self, count: int) -> bool:
        """Make an engine for clips of `count` frames. Return whether there is one now."""
        if self.engine is not None and count <= self.engine.max_frames:
            return True
        if self.playing:
            return False
        most = count if self.engine is None else max(count, 2 * self.engine.max_frames)
        self.engine = None  # Free its memory first.
        self.engine = StreamingEngine(
            self.model,
            self.processor,
            max_frames=min(most, self.most),
            max_streams=self.batch_size,
            # Room for the longest reply comes on top.
            max_text_tokens=self.most_text + self.options.get("max_new_tokens", 0),
            cache_dtype=self.cache_dtype,
        )
        return True

    def _open(self, example: dict[str, Any], count: int) -> None:
        options = {**self.options, **_system_prompt(example)}
        stream = self.engine.open(fps=self.fps, max_frames=count, max_text_tokens=self.most_text, **options)
        self.playing[stream] = (example, _show(stream, example, _read(example, self.fps), self.fps))

    def _advance(self) -> Iterator[tuple[dict[str, Any], list[Any], int]]:
        """Push the next frame of each stream that is ready for it; yield the results of streams that ended."""
        for stream, (example, frames) in list(self.playing.items()):
            if stream.is_done:
                del self.playing[stream]
                session = stream.session
                if stream.error is None and session.num_remembered == session.num_frames:
                    yield example, session.events, session.num_frames
                else:
                    yield example, *self.stream_one(example)
            elif stream.num_waiting == 0 and next(frames, _END) is _END:
                stream.close()


def _can_share(model: Any, options: dict[str, Any]) -> bool:
    """Return whether an engine can stream several clips with these options."""
    if any(options.get(name) is not None for name in ("cache", "max_frames", "max_text_tokens", "streamer")):
        return False
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return not is_sharded and len({parameter.device for parameter in model.parameters()}) == 1


def _most_frames(example: dict[str, Any], fps: float) -> float:
    """Return the largest number of frames that a clip may have, or infinity if its length is unknown."""
    video, start, end = example.get("video"), example.get("start") or 0.0, example.get("end")
    if video is None:
        # An engine takes frames, not their features.
        return math.inf
    if not isinstance(video, (str, Path)):
        return len(video) if isinstance(video, Sized) else math.inf
    if end is None:
        with naming(example), open_video(video) as reader:
            end = reader.seconds
    return math.inf if end == math.inf else math.ceil((end - start) * fps) + 1


class FeatureStream:
    """A session that is given the features of frames in place of frames."""

    def __init__(self, session: Any) -> None:
        self.session, self.ask = session, session.ask

    def push(self, features: torch.Tensor, *, time: float) -> None:
        """Add the features (features, width) of a frame. The next question or the end runs the model."""
        # The session checks times together with frames.
        self.session.sample(torch.empty(1, 0, *(self.session.model.frame_size or (0, 0))), time)
        self.session.receive(features, time, clock.perf_counter())


def _show(stream: Any, example: dict[str, Any], frames: Iterable[tuple[float, Any]], fps: float) -> Iterator[None]:
    """Push the frames of an example into a session or an engine's stream, one by one, and ask the user's questions."""
    dialogue = Dialogue(example, math.inf, fps)
    waiting = [place for place, message in enumerate(dialogue.all) if message["role"] == "user"]
    for index, (time, picture, is_last) in enumerate(_with_end(frames)):
        if is_last:
            # Messages after the last frame follow it, as in training.
            dialogue = Dialogue(example, index + 1, fps)
        due = [place for place in waiting if dialogue.slots[place] <= index]
        waiting = waiting[len(due) :]
        # A question comes before the model can speak at this frame, unless the data have a reply there first.
        first = [place for place in due if not _comes_after_reply(dialogue, place)]
        for place in first:
            # Only a question with an earlier time comes before the first frame.
            asked = time - 1 if dialogue.slots[place] < 0 else time
            stream.ask(dialogue.all[place]["content"], time=asked, reply_now=_is_answered(dialogue, place))
        stream.push(picture, time=time)
        for place in due[len(first) :]:
            stream.ask(dialogue.all[place]["content"], reply_now=_is_answered(dialogue, place))
        yield


def _with_end(frames: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Any, bool]]:
    """Yield frames with their times, and whether each is the last."""
    waiting: tuple[float, Any] | None = None
    for following in frames:
        if waiting is not None:
            yield *waiting, False
        waiting = following
    if waiting is not None:
        yield *waiting, True


def open_frames(session: Any, example: dict[str, Any]) -> tuple[Any, Iterator[tuple[float, Any]]]:
    """Return what to push into, a session or a [`FeatureStream`], and the frames or their features, with times."""
    if example.get("frame_features") is None:
        return session, _read(example, session.fps)
    return FeatureStream(session), _read_features(session.model, session.processor, example, session.fps)


def _read(example: dict[str, Any], fps: float) -> Iterator[tuple[float, Any]]:
    with naming(example):
        yield from read_clip(example, fps=fps)


def _read_features(
    model: Any, processor: Any, example: dict[str, Any], fps: float
) -> Iterator[tuple[float, torch.Tensor]]:
    with naming(example):
        collator = StreamCollator(processor, fps, frame_feature_shape=model.config.frame_feature_shape)
        features = collator.read_features(example)
    start = example.get("start") or 0.0
    for index, feature in enumerate(features):
        yield start + index / fps, feature.to(model.device)


def _comes_after_reply(dialogue: Dialogue, question: int) -> bool:
    """Return whether a reply comes before a message at the same frame."""
    before = zip(dialogue.all[:question], dialogue.slots, strict=False)
    return any(message["role"] == "assistant" and slot == dialogue.slots[question] for message, slot in before)


def _system_prompt(example: dict[str, Any]) -> dict[str, str]:
    """Return the option of a session for the system message of an example, if it has one."""
    first = next(iter(example["messages"]), None)
    return {"system_prompt": first["content"]} if first is not None and first["role"] == "system" else {}


def _is_answered(dialogue: Dialogue, question: int) -> bool:
    """Return whether the message after a question answers it at once, at the same frame."""
    slots, following = dialogue.slots, dialogue.all[question + 1 : question + 2]
    is_at_once = bool(following) and slots[question + 1] == slots[question] >= 0
    return is_at_once and following[0]["role"] == "assistant"


def free_streaming(
    model: Any,
    processor: Any,
    examples: Iterable[dict[str, Any]],
    *,
    fps: float = 2.0,
    tolerance: float = 0.5,
    delay_window: float = 5.0,
    batch_size: int = 8,
    similarity: str = "token_f1",
    progress: bool = True,
    **options: Any,
) -> dict[str, float]:
    """
    Stream examples and compare what the model says with the data.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (iterable of `dict`): Rows with `messages` and `video`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        tolerance (`float`, *optional*, defaults to 0.5): Seconds by which a narrated event may be early or late.
        delay_window (`float`, *optional*, defaults to 5.0): Seconds by which it may be off and still count for the
            mean delay.
        batch_size (`int`, *optional*, defaults to 8): Number of clips to stream at a time; see [`stream_examples`].
        similarity (`str`, *optional*, defaults to `"token_f1"`): Similarity of texts in ProAssist's measures, by its
            name in [`SIMILARITIES`]. ProAssist itself has `"sentence"`, an encoder.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        options: Options of [`StreamingSession`].

    Returns:
        `dict[str, float]`: `event_precision`, `event_recall`, `event_f1`, `event_delay` (mean seconds in the video
        from an event to the frame at which the model narrates it; see the metric `stream_events`), `answer_accuracy`,
        `silent_frames_right`, `words_per_minute`, `first_word_latency` (mean seconds from the arrival of a frame at
        which the model speaks to its first token, with `batch_size` streams on the machine). If the data have replies
        that nobody asked for at once, also FlowNar's `temporal_precision`, `temporal_recall`, `temporal_f1`,
        `meteor_stem`, `meteor_1.5_stem`, `rouge_l` and `cider` (the metric `narration_segments`), and ProAssist's
        `missing_rate_token_f1`, `redundant_rate_token_f1` and `match_f1_token_f1` (the metric `dialogue_matching`),
        whose names end in the similarity.
    """
    streams = stream_examples(model, processor, examples, fps=fps, batch_size=batch_size, **options)
    total = len(examples) if isinstance(examples, Sized) else None
    tally = StreamTally(fps, similarity)
    for example, events, num_frames in tqdm(streams, desc="streaming", total=total, disable=not progress):
        tally.add(example, events, num_frames)
    return tally.scores(tolerance=tolerance, delay_window=delay_window)


@dataclass
class StreamTally:
    """What the model said in streams, and what the data say."""

    fps: float
    similarity: str
    narrated: list[list[dict[str, Any]]] = field(default_factory=list)
    true_events: list[list[dict[str, Any]]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    true_answers: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    silent: int = 0
    silent_right: int = 0
    words: int = 0
    seconds: float = 0.0

    def add(self, example: dict[str, Any], events: list[Any], num_frames: int) -> None:
        """Add one stream: its data, and its events."""
        self._add_answers(example, events, num_frames)
        free, true_events = spoken_unasked(events), unasked_replies(example, fps=self.fps, num_frames=num_frames)
        self.narrated.append([{"time": e.time, "text": e.text} for e in free])
        self.true_events.append(true_events)
        start = float(example.get("start") or 0.0)
        self.starts.append(start)
        # The model learns to speak at the first frame at or after an event. Its own replies are on the grid.
        loud = {min(ceil_frame(m["time"] - start, self.fps), num_frames - 1) for m in true_events}
        spoken = {round_frame(e.time - start, self.fps) for e in free}
        self.silent += num_frames - len(loud)
        self.silent_right += sum(index not in spoken for index in range(num_frames) if index not in loud)
        self.words += sum(len(e.text.split()) for e in events if e.role == "assistant")
        self.seconds += num_frames / self.fps
        self.latencies += [e.latency for e in free]

    def _add_answers(self, example: dict[str, Any], events: list[Any], num_frames: int) -> None:
        """Add the answers of a stream, and those in the data."""
        for _, answer, given in answered_questions(example, events, fps=self.fps, num_frames=num_frames):
            self.answers.append(given)
            self.true_answers.append(answer)

    def scores(self, *, tolerance: float, delay_window: float) -> dict[str, float]:
        """Compute the measures of [`free_streaming`]."""
        scores = evaluate_metric("stream_events").compute(
            predictions=self.narrated, references=self.true_events, tolerance=tolerance, delay_window=delay_window
        )
        if any(self.true_events):
            scores |= self._narration_scores()
        if self.true_answers:
            scores |= evaluate_metric("answer_accuracy").compute(
                predictions=self.answers, references=self.true_answers
            )
        scores["silent_frames_right"] = self.silent_right / max(self.silent, 1)
        scores["words_per_minute"] = 60 * self.words / max(self.seconds, 1e-9)
        scores["first_word_latency"] = sum(self.latencies) / max(len(self.latencies), 1)
        return scores

    def _narration_scores(self) -> dict[str, float]:
        """Compare what was said with the data by FlowNar's and by ProAssist's measures."""
        matching = evaluate_metric("dialogue_matching").compute(
            predictions=self.narrated, references=self.true_events, similarity=self.similarity, fps=self.fps
        )
        names = [f"{name}_{self.similarity}" for name in ("missing_rate", "redundant_rate", "match_f1")]
        segments = evaluate_metric("narration_segments").compute(
            predictions=self.narrated,
            references=[[replies] for replies in self.true_events],
            starts=self.starts,
            fps=self.fps,
        )
        return segments | {name: matching[name] for name in names}


def answered_questions(
    row: dict[str, Any], events: Sequence[Any], *, fps: float, num_frames: float = math.inf
) -> Iterator[tuple[float, str, str]]:
    """
    Yield for each question that the data answer at once, at the same frame: its second, the true answer, and the one
    in the stream.

    Args:
        row (`dict`): A row with `messages`, and perhaps `start` in seconds.
        events (sequence of [`StreamEvent`]): What was said in its stream.
        fps (`float`): Frames per second.
        num_frames (`int`, *optional*): Number of frames of the row. Messages after the last one come at the last one.
    """
    dialogue = Dialogue(row, num_frames, fps)
    asked = [event for event in events if event.role == "user"]
    given = {id(one): two.text for one, two in pairwise(events) if _answers(two, one)}
    for place, (question, slot) in enumerate(zip(dialogue.all, dialogue.slots, strict=True)):
        if question["role"] != "user" or not _is_answered(dialogue, place):
            continue
        # A question may be asked again later, with another answer, so each event matches one question.
        earliest = min(question["time"], dialogue.time(slot)) - 1e-6
        match = next((e for e in asked if e.text == question["content"] and e.time >= earliest), None)
        asked = asked[asked.index(match) + 1 :] if match is not None else asked
        answer = dialogue.all[place + 1]["content"]
        yield question["time"], answer, "" if match is None else given.get(id(match), "")


def spoken_unasked(events: Sequence[Any]) -> list[Any]:
    """Return the replies of a stream, without those that answer a question at once: the user chose their time."""
    pairs = zip([None, *events], events, strict=False)
    return [two for one, two in pairs if two.role == "assistant" and (one is None or not _answers(two, one))]


def unasked_replies(row: dict[str, Any], *, fps: float, num_frames: float = math.inf) -> list[dict[str, Any]]:
    """
    Return `time` and `text` of the true replies, without those that answer the user at once, at the same frame.

    Args:
        row (`dict`): A row with `messages`, and perhaps `start` in seconds.
        fps (`float`): Frames per second.
        num_frames (`int`, *optional*): Number of frames of the row. Messages after the last one come at the last one.
    """
    dialogue = Dialogue(row, num_frames, fps)
    return [
        {"time": float(message["time"]), "text": message["content"]}
        for place, message in enumerate(dialogue.all)
        if message["role"] == "assistant"
        and "time" in message
        and not (place and dialogue.all[place - 1]["role"] == "user" and _is_answered(dialogue, place - 1))
    ]


def _answers(event: Any, question: Any) -> bool:
    """Return whether an event is the direct answer to the event before it."""
    is_reply = question.role == "user" and event.role == "assistant"
    return is_reply and event.time == question.time and event.interval_probability is None
