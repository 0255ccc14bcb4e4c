# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How good a streaming model is: LIVE's four measures under teacher forcing, and free streaming on its own history.

```bash
python train/evaluation.py --checkpoint . --world tiny --kinds narrate=2,ask=1,wait=1
```
"""

import gc
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import torch
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from videollm_mod.serving import StreamingEngine
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.loading import CACHE_DTYPES, WEIGHTS, quantization
from videollm_mod.train.arguments import run
from videollm_mod.train.card import add_results
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.sources import DataSource, load_split
from videollm_mod.train.data.subtitles import video_seconds


METRICS = Path(__file__).parent / "metrics"
# Text that an engine's stream remembers; a clip in which there is more is streamed by itself.
_TEXT_TOKENS = 2048
_END = object()


@dataclass
class Turn:
    """
    One reply and the frames before it, predicted under teacher forcing.

    Args:
        losses (`list[float]`): Cross-entropy of each learned text token.
        labels (`list[int]`): The learned text tokens, from the one that opens the reply to the one that ends it.
        predictions (`list[int]`): The most likely token at each of them.
        speaks (`list[bool]`): At each frame before the reply at which a decision is learned, whether the model would
            speak by the interval rule.
        is_decided (`bool`): Whether the reply was decided on at the last of these frames; otherwise it answers a
            question.
        end (`int`): Number of tokens of the row up to the last frame, that frame included.
        frames (`int`): Number of frames of the row up to there.
        late (`int`): Frames by which the model speaks late, if it does not speak at any of these.
    """

    losses: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    speaks: list[bool] = field(default_factory=list)
    is_decided: bool = False
    end: int = 0
    frames: int = 0
    late: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether the model lets the reply's frame pass without a word."""
        return self.is_decided and not any(self.speaks)

    @property
    def correct_prefix(self) -> int:
        """Number of text tokens predicted right before the first that is not."""
        wrong = [one != two for one, two in zip(self.predictions, self.labels, strict=True)]
        return wrong.index(True) if True in wrong else len(wrong)


def predict_turns(
    model: Any,
    processor: Any,
    examples: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    interval_threshold: float | None = None,
) -> list[list[Turn]]:
    """
    Predicts every turn of some dialogues from the true history (LIVE, arXiv 2406.11816, section 4), as one batch; then
    watches on, where the model let a reply's frame pass, until it speaks.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (`Sequence[dict]`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames a second.
        interval_threshold (`float`, *optional*): By default the configuration's.

    Returns:
        `list[list[Turn]]`: The turns of each dialogue. Frames after its last reply belong to none.
    """
    batch = StreamCollator(processor, fps)(list(examples)).copy()
    labels = batch.pop("labels")
    batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    with torch.no_grad():
        if "pixel_values_videos" in batch:
            batch["frame_features"] = model.model.encode_frames(batch.pop("pixel_values_videos"))
        hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        row, place = torch.nonzero(targets >= 0, as_tuple=True)
        logits = model.lm_head(hidden[row.to(hidden.device), place.to(hidden.device)]).float()
        speaks = model.should_speak(logits, interval_threshold)[0].tolist()
        losses = torch.nn.functional.cross_entropy(logits, targets[row, place].to(logits.device), reduction="none")
        predictions, losses = logits.argmax(dim=-1).tolist(), losses.tolist()
    ids = batch["input_ids"].cpu()
    is_frame = ids == model.config.frame_token_id
    turns: list[list[Turn]] = [[] for _ in examples]
    fresh = [True] * len(turns)
    for at, (i, j) in enumerate(zip(row.tolist(), place.tolist(), strict=True)):
        if is_frame[i, j]:
            if fresh[i]:
                turns[i].append(Turn())
                fresh[i] = False
            turn = turns[i][-1]
            turn.speaks.append(speaks[at])
            target = int(targets[i, j])
            turn.is_decided = target != _silence(model, processor)
            turn.end, turn.frames = j + 1, int(is_frame[i, : j + 1].sum()) // model.config.frame_num_tokens
            if not turn.is_decided:
                continue
        else:
            if not turns[i] or (fresh[i] and place[at - 1] != j - 1):
                turns[i].append(Turn())
            fresh[i] = True
        turn = turns[i][-1]
        turn.losses.append(losses[at])
        turn.labels.append(int(targets[i, j]))
        turn.predictions.append(predictions[at])
    # What follows the last reply is silence and belongs to no turn.
    turns = [[turn for turn in dialogue if turn.labels] for dialogue in turns]
    for i, dialogue in enumerate(turns):
        if any(turn.is_silent for turn in dialogue[:-1]):
            _watch_on(model, ids[i], batch["frame_features"][i], dialogue, interval_threshold)
    return turns


def _silence(model: Any, processor: Any) -> int:
    interval = model.config.frame_token_interval_id
    return processor.tokenizer.eos_token_id if interval is None else interval


@torch.no_grad()
def _watch_on(
    model: Any, ids: torch.Tensor, features: torch.Tensor, turns: list[Turn], interval_threshold: float | None
) -> None:
    """How late the model speaks: it sees the next turn's frames in place of the reply, which it never saw."""
    config, cache = model.config, model.new_cache()
    interval = [] if config.frame_token_interval_id is None else [config.frame_token_interval_id]
    frame = [config.frame_token_id] * config.frame_num_tokens
    tokens = frames = 0
    for turn, following in zip(turns, turns[1:], strict=False):
        count = min(following.frames - turn.frames, len(turn.speaks) - 1)
        if not turn.is_silent or count < 1:
            continue
        part = ids[None, tokens : turn.end].to(model.device)
        seen = features[None, frames : turn.frames]
        shown = {"frame_features": seen} if seen.shape[1] else {}
        model(input_ids=part, **shown, cache=cache, use_cache=True, logits_to_keep=1)
        tokens, frames = turn.end, turn.frames
        more = torch.tensor([(interval + frame) * count], device=model.device)
        ends = torch.arange(1, count + 1, device=model.device) * (len(interval) + len(frame)) - 1
        shown = features[None, frames : frames + count]
        outputs = model(input_ids=more, frame_features=shown, cache=cache, use_cache=True, logits_to_keep=ends)
        speaks = model.should_speak(outputs.logits[0], interval_threshold)[0].tolist()
        turn.late = speaks.index(True) + 1 if True in speaks else count
        # Each routed layer is cut at its own length: nothing of what was only tried stays.
        cache.crop(-more.shape[1])


def teacher_forced(
    model: Any,
    processor: Any,
    examples: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    **options: Any,
) -> dict[str, float]:
    """
    LIVE's four measures (arXiv 2406.11816, section 4.1) over dialogues; arguments are those of [`predict_all_turns`].

    Returns:
        `dict[str, float]`: `lm_ppl`, `time_diff` in seconds, `fluency` and `lm_correctness`, each a mean over turns.
    """
    return score_turns(predict_all_turns(model, processor, examples, fps=fps, **options), fps=fps)


def predict_all_turns(
    model: Any,
    processor: Any,
    examples: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    batch_size: int = 4,
    interval_threshold: float | None = None,
    progress: bool = True,
) -> list[Turn]:
    """
    The turns of all dialogues, by [`predict_turns`], `batch_size` dialogues at a time.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (`Sequence[dict]`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames a second.
        batch_size (`int`, *optional*, defaults to 4): Dialogues of a forward pass.
        interval_threshold (`float`, *optional*): By default the configuration's.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[Turn]`: Of one dialogue after the other.
    """
    turns: list[Turn] = []
    for begin in tqdm(range(0, len(examples), batch_size), desc="teacher forcing", disable=not progress):
        batch = [examples[index] for index in range(begin, min(begin + batch_size, len(examples)))]
        for dialogue in predict_turns(model, processor, batch, fps=fps, interval_threshold=interval_threshold):
            turns += dialogue
    return turns


def score_turns(turns: Sequence[Turn], *, fps: float = 2.0) -> dict[str, float]:
    """LIVE's four measures of predicted turns."""
    scores = evaluate_metric("lm_ppl").compute(predictions=[turn.losses for turn in turns])
    scores |= evaluate_metric("lm_correctness").compute(
        predictions=[turn.predictions for turn in turns], references=[turn.labels for turn in turns]
    )
    timing = {"speaks": [turn.speaks for turn in turns], "late": [turn.late for turn in turns]}
    timing["is_decided"] = [turn.is_decided for turn in turns]
    scores |= evaluate_metric("time_diff").compute(**timing, fps=fps)
    scores |= evaluate_metric("fluency").compute(
        predictions=[turn.predictions for turn in turns], references=[turn.labels for turn in turns], **timing
    )
    return scores


def evaluate_metric(name: str) -> Any:
    """A metric of the folder beside this file."""
    return evaluate.load(str(METRICS / name))


# --------------------------------------------------------------------------------------------------- free streaming


def stream_example(
    model: Any, processor: Any, example: dict[str, Any], *, fps: float = 2.0, **options: Any
) -> tuple[list[Any], int]:
    """
    Streams an example's video with its user's messages at their times; what the model said is its only history.

    A message that is answered at its own time in the data is asked to be answered at once, any other not.

    Returns:
        The session's events, and the number of frames.
    """
    session = model.stream(processor, fps=fps, **options)
    for _ in _show(session, processor, example, fps):
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
    Streams examples as [`stream_example`] does, several at a time in a [`StreamingEngine`], in which each says what it
    says alone. As one ends the next begins, and videos are read as they play.

    By itself is streamed what would be forgotten in part: a clip that exceeds the language model's context or whose
    length is not known, and one in which more is said than an engine's stream remembers. So is all with a `batch_size`
    of 1, with options that say what to remember or whom to tell each token, and by a model that is sharded or spread
    over several devices.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (iterable of `dict`): Rows with `messages` and `video`.
        fps (`float`, *optional*, defaults to 2.0): Frames a second.
        batch_size (`int`, *optional*, defaults to 8): How many to stream at a time.
        options: Options of [`StreamingSession`].

    Yields:
        Each example, its session's events and its number of frames, in the order in which they end.

    Raises:
        `ValueError`: If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    alone = partial(stream_example, model, processor, fps=fps, **options)
    if batch_size == 1 or not _can_share(model, options):
        yield from ((example, *alone(example)) for example in examples)
        return
    cache_dtype = options.pop("cache_dtype", None)
    context, tokens = model.config.text_config.max_position_embeddings, model.config.frame_num_tokens + 1
    # A longest reply that is longer than usual has its room beside the text.
    memory = {"max_streams": batch_size, "max_text_tokens": _TEXT_TOKENS + options.get("max_new_tokens", 0)}
    engine, playing = None, {}
    waiting = iter(examples)
    example = next(waiting, None)
    try:
        while example is not None or playing:
            while example is not None and len(playing) < batch_size:
                count = max(_most_frames(example, fps), 1)
                if count * tokens > context:
                    yield example, *alone(example)
                elif engine is None or count > engine.max_frames:
                    if playing:
                        break  # They end in the memory in which they began.
                    most = count if engine is None else max(count, 2 * engine.max_frames)
                    engine = None
                    most = min(most, context // tokens)
                    engine = StreamingEngine(model, processor, max_frames=most, cache_dtype=cache_dtype, **memory)
                    continue
                else:
                    stream = engine.open(fps=fps, max_frames=count, max_text_tokens=_TEXT_TOKENS, **options)
                    playing[stream] = (example, _show(stream, processor, example, fps))
                example = next(waiting, None)
            for stream, (shown, frames) in list(playing.items()):
                if stream.is_done:
                    del playing[stream]
                    session = stream.session
                    is_whole = stream.error is None and session.num_remembered == session.num_frames
                    yield shown, *((session.events, session.num_frames) if is_whole else alone(shown))
                elif stream.num_waiting == 0 and next(frames, _END) is _END:
                    stream.close()
            if playing:
                engine.step()
    finally:
        # Captured steps and their engine know each other: its memory would wait for the next search for such circles.
        engine = None
        gc.collect()


def _can_share(model: Any, options: dict[str, Any]) -> bool:
    """Whether an engine can stream several clips of a model as a session with these options streams each."""
    if any(options.get(name) is not None for name in ("cache", "max_frames", "max_text_tokens", "streamer")):
        return False
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return not is_sharded and len({parameter.device for parameter in model.parameters()}) == 1


def _most_frames(example: dict[str, Any], fps: float) -> float:
    """How many frames a clip has at most; infinity if that is known at its end only."""
    video, start, end = example["video"], example.get("start") or 0.0, example.get("end")
    if not isinstance(video, (str, Path)):
        return len(video) if isinstance(video, Sized) else math.inf
    try:
        end = video_seconds(video) if end is None else end
    except ValueError:
        return math.inf
    return math.ceil((end - start) * fps) + 1


def _show(stream: Any, processor: Any, example: dict[str, Any], fps: float) -> Iterator[None]:
    """Pushes an example's frames into a session or an engine's stream, one by one, and asks what its user asks."""
    messages = example["messages"]
    asked = [message for message in messages if message["role"] == "user"]
    start = example.get("start") or 0.0
    for time, picture in processor.read_video(example["video"], fps=fps, start=start, end=example.get("end")):
        due = [message for message in asked if message["time"] <= time + 1e-6]
        asked = asked[len(due) :]
        # A question is heard at its frame in place of what the model would have said there, unless the data have
        # something said there first.
        first = [message for message in due if not _is_told_before(messages, message)]
        for message in first:
            stream.ask(message["content"], time=time, reply_now=_is_answered(messages, message))
        stream.push(picture, time=time)
        for message in due[len(first) :]:
            stream.ask(message["content"], reply_now=_is_answered(messages, message))
        yield


def _is_told_before(messages: Sequence[dict[str, Any]], question: dict[str, Any]) -> bool:
    before = messages[: messages.index(question)]
    return any(m["role"] == "assistant" and m["time"] == question["time"] for m in before)


def _is_answered(messages: Sequence[dict[str, Any]], question: dict[str, Any]) -> bool:
    index = messages.index(question)
    following = messages[index + 1] if index + 1 < len(messages) else {"role": None}
    return following["role"] == "assistant" and following["time"] == question["time"]


def free_streaming(
    model: Any,
    processor: Any,
    examples: Iterable[dict[str, Any]],
    *,
    fps: float = 2.0,
    tolerance: float = 0.5,
    delay_window: float = 5.0,
    batch_size: int = 8,
    progress: bool = True,
    **options: Any,
) -> dict[str, float]:
    """
    What users feel: events told right and in time, answers right, silence kept, on the model's own history.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (iterable of `dict`): Rows with `messages` and `video`.
        fps (`float`, *optional*, defaults to 2.0): Frames a second.
        tolerance (`float`, *optional*, defaults to 0.5): Seconds by which a told event may be off to be right.
        delay_window (`float`, *optional*, defaults to 5.0): Seconds by which it may be off to count for the delay.
        batch_size (`int`, *optional*, defaults to 8): How many clips to stream at a time; see [`stream_examples`].
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        options: Options of [`StreamingSession`].

    Returns:
        `dict[str, float]`: `event_precision`, `event_recall`, `event_f1`, `event_delay` (mean seconds in the video
        from an event to the frame at which it is told; see the metric `stream_events`), `answer_accuracy`,
        `silent_frames_right`, `words_per_minute`, `first_word_latency` (mean seconds from the arrival of a frame at
        which the model speaks to its first token, with `batch_size` streams on the machine).
    """
    told: list[list[dict[str, Any]]] = []
    true: list[list[dict[str, Any]]] = []
    answers: list[str] = []
    right_answers: list[str] = []
    silent = silent_right = words = 0
    seconds, latencies = 0.0, []
    streams = stream_examples(model, processor, examples, fps=fps, batch_size=batch_size, **options)
    total = len(examples) if isinstance(examples, Sized) else None
    for example, events, frames in tqdm(streams, desc="streaming", total=total, disable=not progress):
        messages = example["messages"]
        questions = [m for m in messages if m["role"] == "user" and _is_answered(messages, m)]
        to_answers = [messages[messages.index(m) + 1] for m in questions]
        direct = [k for k, e in enumerate(events[:-1]) if e.role == "user" and _answers(events[k + 1], e)]
        # The same question may be asked again later, with another answer: each is matched in its order.
        asked = [events[k] for k in range(len(events)) if events[k].role == "user"]
        given = {id(events[k]): events[k + 1].text for k in direct}
        for question, answer in zip(questions, to_answers, strict=True):
            match = next(
                (e for e in asked if e.text == question["content"] and e.time >= question["time"] - 1e-6), None
            )
            asked = asked[asked.index(match) + 1 :] if match is not None else asked
            answers.append("" if match is None else given.get(id(match), ""))
            right_answers.append(answer["content"])
        free = [e for k, e in enumerate(events) if e.role == "assistant" and k - 1 not in direct]
        true_events = [m for m in messages if m["role"] == "assistant" and not any(m is a for a in to_answers)]
        told.append([{"time": e.time, "text": e.text} for e in free])
        true.append([{"time": float(m["time"]), "text": m["content"]} for m in true_events])
        loud, heard = {round(m["time"] * fps) for m in true_events}, {round(e.time * fps) for e in free}
        silent += frames - len(loud)
        silent_right += sum(index not in heard for index in range(frames) if index not in loud)
        words += sum(len(e.text.split()) for e in events if e.role == "assistant")
        seconds += frames / fps
        latencies += [e.latency for e in free]
    scores = evaluate_metric("stream_events").compute(
        predictions=told, references=true, tolerance=tolerance, delay_window=delay_window
    )
    if right_answers:
        scores |= evaluate_metric("answer_accuracy").compute(predictions=answers, references=right_answers)
    scores["silent_frames_right"] = silent_right / max(silent, 1)
    scores["words_per_minute"] = 60 * words / max(seconds, 1e-9)
    scores["first_word_latency"] = sum(latencies) / max(len(latencies), 1)
    return scores


def _answers(event: Any, question: Any) -> bool:
    return event.role == "assistant" and event.time == question.time and event.interval_probability is None


def measure_checkpoint(
    checkpoint: str | Path,
    rows: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    tolerance: float = 0.5,
    batch_size: int = 8,
    interval_threshold: float | None = None,
    weights: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """
    Both kinds of figures of a checkpoint, loaded as anybody would load it.

    Args:
        checkpoint (`str` or `Path`): A folder or a Hub id.
        rows (`Sequence[dict]`): Rows with `messages` and `video`.
        fps, tolerance, batch_size, interval_threshold, options: See [`teacher_forced`] and [`free_streaming`].
        weights (`str`, *optional*): `"int8"` or `"fp8"` to measure it so.

    Returns:
        `dict[str, float]`: The figures of both by name.
    """
    loading = {"dtype": "auto", "device_map": "auto", **quantization(weights)}
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, **loading).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    options |= {"fps": fps, "interval_threshold": interval_threshold}
    scores = teacher_forced(
        model, processor, rows, fps=fps, batch_size=batch_size, interval_threshold=interval_threshold
    )
    return scores | free_streaming(model, processor, rows, tolerance=tolerance, batch_size=batch_size, **options)


@dataclass
class EvaluationArguments:
    """
    What to measure, and how.

    Args:
        checkpoint (`str`): The model: a folder or a Hub id.
        split (`str`, *optional*, defaults to `"test"`): Split to evaluate on.
        num_clips (`int`, *optional*, defaults to 200): Number of clips, if they are generated.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        tolerance (`float`, *optional*, defaults to 0.5): Seconds by which a narrated event may be early or late.
        delay_window (`float`, *optional*, defaults to 5.0): Seconds by which it may be off and still count for the
            mean delay.
        batch_size (`int`, *optional*, defaults to 8): Number of clips to evaluate at the same time.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the checkpoint's.
        max_new_tokens (`int`, *optional*, defaults to 100): Longest reply in tokens.
        weights (`str`, *optional*): `"int8"` or `"fp8"`: linear layers in eight bits, by torchao.
        cache_dtype (`str`, *optional*): Data type of keys and values while streaming. Teacher-forced measures use no
            cache.
        card (`bool`, *optional*, defaults to `False`): Also write the results into the checkpoint's model card.
    """

    checkpoint: str = field(metadata={"help": "The model: a folder or a Hub id."})
    split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    num_clips: int = field(default=200, metadata={"help": "Number of clips, if they are generated."})
    fps: float = field(default=2.0, metadata={"help": "Frames per second that the model sees."})
    tolerance: float = field(default=0.5, metadata={"help": "Seconds by which an event may be early or late."})
    delay_window: float = field(default=5.0, metadata={"help": "The same, to count for the mean delay."})
    batch_size: int = field(default=8, metadata={"help": "Number of clips to evaluate at the same time."})
    interval_threshold: float | None = field(default=None, metadata={"help": "Default: the checkpoint's."})
    max_new_tokens: int = field(default=100, metadata={"help": "Longest reply in tokens."})
    weights: str | None = field(
        default=None, metadata={"help": "Linear layers in eight bits, by torchao.", "choices": list(WEIGHTS)}
    )
    cache_dtype: str | None = field(
        default=None, metadata={"help": "Keys and values while streaming.", "choices": list(CACHE_DTYPES)}
    )
    card: bool = field(default=False, metadata={"help": "Also write the results into the model card."})

    def __post_init__(self) -> None:
        check_checkpoint(self.checkpoint)

    def options(self) -> dict[str, Any]:
        """Return the options of [`measure_checkpoint`]."""
        names = ("fps", "tolerance", "delay_window", "batch_size", "interval_threshold", "max_new_tokens", "weights")
        return {name: getattr(self, name) for name in names} | {"cache_dtype": CACHE_DTYPES.get(self.cache_dtype)}


def main(source: DataSource, arguments: EvaluationArguments) -> None:
    """Print the measures as JSON."""
    rows = load_split(source, arguments.split, arguments.num_clips)
    scores = measure_checkpoint(arguments.checkpoint, rows, **arguments.options())
    print(json.dumps({name: round(float(value), 4) for name, value in scores.items()}, indent=1))
    if arguments.card:
        add_results(
            arguments.checkpoint,
            {name: value for name, value in scores.items() if name != "first_word_latency"},
            dataset=source.title(arguments.split),
            split=arguments.split,
            command=" ".join(["python", "train/evaluation.py", *(arg for arg in sys.argv[1:] if arg != "--card")]),
        )


if __name__ == "__main__":
    run(main, DataSource, EvaluationArguments, dataset="streamworld")
