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
"""
How good a streaming model is: LIVE's four measures under teacher forcing, and free streaming on its own history.

```bash
python train/evaluation.py --checkpoint space/checkpoint --world tiny --kinds narrate=2,ask=1,wait=1
```
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from videollm_mod.space.loading import CACHE_DTYPES, WEIGHTS, quantization
from videollm_mod.train.collator import StreamCollator


METRICS = Path(__file__).parent / "metrics"


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
        model(input_ids=part, **shown, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, frames = turn.end, turn.frames
        more = torch.tensor([(interval + frame) * count], device=model.device)
        ends = torch.arange(1, count + 1, device=model.device) * (len(interval) + len(frame)) - 1
        shown = features[None, frames : frames + count]
        logits = model(
            input_ids=more, frame_features=shown, past_key_values=cache, use_cache=True, logits_to_keep=ends
        ).logits[0]
        speaks = model.should_speak(logits, interval_threshold)[0].tolist()
        turn.late = speaks.index(True) + 1 if True in speaks else count
        # Each routed layer is cut at its own length: nothing of what was only tried stays.
        cache.crop(-more.shape[1])


def teacher_forced(
    model: Any,
    processor: Any,
    examples: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    batch_size: int = 4,
    interval_threshold: float | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """
    LIVE's four measures (arXiv 2406.11816, section 4.1) over dialogues.

    Returns:
        `dict[str, float]`: `lm_ppl`, `time_diff` in seconds, `fluency` and `lm_correctness`, each a mean over turns.
    """
    turns: list[Turn] = []
    for begin in tqdm(range(0, len(examples), batch_size), desc="teacher forcing", disable=not progress):
        batch = [examples[index] for index in range(begin, min(begin + batch_size, len(examples)))]
        for dialogue in predict_turns(model, processor, batch, fps=fps, interval_threshold=interval_threshold):
            turns += dialogue
    return score_turns(turns, fps=fps)


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
    messages = example["messages"]
    session = model.stream(processor, fps=fps, **options)
    asked = [message for message in messages if message["role"] == "user"]
    start = example.get("start") or 0.0
    for time, picture in processor.read_video(example["video"], fps=fps, start=start, end=example.get("end")):
        due = [message for message in asked if message["time"] <= time + 1e-6]
        asked = asked[len(due) :]
        # A question is heard at its frame in place of what the model would have said there, unless the data have
        # something said there first.
        first = [message for message in due if not _is_told_before(messages, message)]
        for message in first:
            session.ask(message["content"], time=time, reply_now=_is_answered(messages, message))
        session.push(picture, time=time)
        for message in due[len(first) :]:
            session.ask(message["content"], reply_now=_is_answered(messages, message))
    session.close()
    return session.events, session.num_frames


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
        tolerance (`float`, *optional*, defaults to 0.5): Seconds by which a told event may be off.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        options: Options of [`StreamingSession`].

    Returns:
        `dict[str, float]`: `event_precision`, `event_recall`, `event_f1`, `event_delay` (mean seconds from event to
        frame at which it is told), `answer_accuracy`, `silent_frames_right`, `words_per_minute`, `latency` (mean
        seconds from a frame's arrival to the end of its reply).
    """
    told: list[list[dict[str, Any]]] = []
    true: list[list[dict[str, Any]]] = []
    answers: list[str] = []
    right_answers: list[str] = []
    silent = silent_right = words = 0
    seconds, latencies = 0.0, []
    for example in tqdm(examples, desc="streaming", disable=not progress):
        events, frames = stream_example(model, processor, example, fps=fps, **options)
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
        latencies += [e.latency for e in free if e.latency is not None]
    scores = evaluate_metric("stream_events").compute(predictions=told, references=true, tolerance=tolerance)
    if right_answers:
        scores |= evaluate_metric("answer_accuracy").compute(predictions=answers, references=right_answers)
    scores["silent_frames_right"] = silent_right / max(silent, 1)
    scores["words_per_minute"] = 60 * words / max(seconds, 1e-9)
    scores["latency"] = sum(latencies) / max(len(latencies), 1)
    return scores


def _answers(event: Any, question: Any) -> bool:
    return event.role == "assistant" and event.time == question.time and event.interval_probability is None


def measure_checkpoint(
    checkpoint: str | Path,
    rows: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    tolerance: float = 0.5,
    batch_size: int = 4,
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
    return scores | free_streaming(model, processor, rows, tolerance=tolerance, **options)


def main() -> None:
    """Prints both kinds of figures."""
    from videollm_mod.train.arguments import ScriptArguments
    from videollm_mod.train.card import add_results
    from videollm_mod.train.data.loading import load_split

    parser = argparse.ArgumentParser(description="Evaluates a checkpoint on timed messages.")
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id")
    parser.add_argument("--dataset", default="streamworld", help="as of train/sft.py")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num_clips", type=int, default=200)
    parser.add_argument("--world", default="full")
    parser.add_argument("--kinds", default="narrate=1")
    parser.add_argument("--frame_size", type=int, default=96)
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--tolerance", type=float, default=0.5, help="seconds by which a told event may be off")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--interval_threshold", type=float, help="by default the checkpoint's own")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest reply")
    parser.add_argument("--weights", choices=WEIGHTS, help="linear layers in eight bits, by torchao")
    parser.add_argument(
        "--cache",
        choices=CACHE_DTYPES,
        help="keys and values in eight bits where it streams; not what is teacher-forced",
    )
    parser.add_argument("--card", action="store_true", help="also put the figures into the checkpoint's card")
    options = parser.parse_args()
    names = ("dataset", "num_clips", "world", "kinds", "frame_size", "fps")
    script = ScriptArguments(**{name: getattr(options, name) for name in names})
    rows = load_split(script, options.split, options.num_clips)
    scores = measure_checkpoint(
        options.checkpoint,
        rows,
        fps=options.fps,
        tolerance=options.tolerance,
        batch_size=options.batch_size,
        interval_threshold=options.interval_threshold,
        weights=options.weights,
        max_new_tokens=options.max_new_tokens,
        cache_dtype=CACHE_DTYPES.get(options.cache),
    )
    print(json.dumps({name: round(float(value), 4) for name, value in scores.items()}, indent=1))
    if options.card:
        world = "ood" if options.split == "ood" else options.world
        name = f"StreamWorld, {world}" if options.dataset == "streamworld" else Path(options.dataset).name
        add_results(
            options.checkpoint,
            {name: value for name, value in scores.items() if name != "latency"},
            dataset=name,
            split=options.split,
            command=" ".join(["python", "train/evaluation.py", *(arg for arg in sys.argv[1:] if arg != "--card")]),
        )


if __name__ == "__main__":
    main()
