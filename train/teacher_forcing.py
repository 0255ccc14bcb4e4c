# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
LIVE's measures under teacher forcing: LM-PPL, TimeDiff, Fluency and LM-Correctness.

The model predicts each turn of a dialogue from the true history (VideoLLM-online, arXiv 2406.11816, section 4.1).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import torch
from tqdm.auto import tqdm

from videollm_mod.train.collator import StreamCollator


METRICS = Path(__file__).parent / "metrics"


@dataclass
class Turn:
    """
    One reply and the frames before it, predicted under teacher forcing.

    Args:
        losses (`list[float]`): Cross-entropy of each learned text token.
        labels (`list[int]`): The learned text tokens, from the token that opens the reply to the token that ends it.
        predictions (`list[int]`): The most likely token at each of them.
        speaks (`list[bool]`): Whether the model would speak by the interval rule, at each frame before the reply that
            has a learned decision.
        is_decided (`bool`): Whether the model decides to reply at the last of these frames. `False` means that the
            reply answers a question.
        end (`int`): Number of tokens of the row up to and including the last frame.
        frames (`int`): Number of frames of the row up to there.
        late (`int`): Number of frames by which the model speaks late, if it speaks at none of these frames.
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
        """Whether the model misses the reply: it speaks neither at its frame nor earlier."""
        return self.is_decided and not any(self.speaks)


class _Learned(NamedTuple):
    """A position with a label, and what the model predicts there."""

    place: int
    label: int
    prediction: int
    loss: float
    speaks: bool


def predict_turns(
    model: Any,
    processor: Any,
    examples: Sequence[dict[str, Any]],
    *,
    fps: float = 2.0,
    interval_threshold: float | None = None,
) -> list[list[Turn]]:
    """
    Predict every turn of some dialogues from the true history, as one batch.

    If the model stays silent at the frame of a reply, it also sees the next frames, to measure when it speaks.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (`Sequence[dict]`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's.

    Returns:
        `list[list[Turn]]`: The turns of each dialogue. Frames after the last reply belong to no turn.
    """
    batch = StreamCollator(processor, fps, frame_feature_shape=model.config.frame_feature_shape)(list(examples)).copy()
    labels = batch.pop("labels")
    batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    with torch.no_grad():
        if "pixel_values_videos" in batch:
            batch["frame_features"] = model.model.encode_frames(batch.pop("pixel_values_videos"))
        learned = _predict_labels(model, batch, labels, interval_threshold)
    ids, interval = batch["input_ids"].cpu(), model.config.frame_token_interval_id
    silence = processor.tokenizer.eos_token_id if interval is None else interval
    suffix = len(processor.frame_suffix_ids)
    turns = [
        _split_turns(tokens, row, model.config, silence, suffix) for tokens, row in zip(learned, ids, strict=True)
    ]
    for row, dialogue in enumerate(turns):
        if any(turn.is_silent for turn in dialogue[:-1]):
            features = batch["frame_features"][row]
            _measure_delays(model, processor, ids[row], features, dialogue, interval_threshold, fps)
    return turns


def _predict_labels(
    model: Any, batch: dict[str, Any], labels: torch.Tensor, interval_threshold: float | None
) -> list[list[_Learned]]:
    """Run the model, and return the predictions of each row at the positions that have a label."""
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    row, place = torch.nonzero(targets >= 0, as_tuple=True)
    logits = model.lm_head(hidden[row.to(hidden.device), place.to(hidden.device)]).float()
    speaks = model.should_speak(logits, interval_threshold)[0]
    known = targets[row, place]
    losses = torch.nn.functional.cross_entropy(logits, known.to(logits.device), reduction="none")
    rows: list[list[_Learned]] = [[] for _ in range(len(labels))]
    columns = (row, place, known, logits.argmax(dim=-1), losses, speaks)
    for index, *values in zip(*(column.tolist() for column in columns), strict=True):
        rows[index].append(_Learned(*values))
    return rows


def _split_turns(learned: Iterable[_Learned], ids: torch.Tensor, config: Any, silence: int, suffix: int) -> list[Turn]:
    """
    Split the learned positions of a row into turns. `suffix` tokens of text follow a frame before the decision.

    A turn begins with the first frame after a text. Without a frame, it begins with text that does not continue the
    text before it.
    """
    turns: list[Turn] = []
    is_frame = ids == config.frame_token_id
    is_text, last = True, -1
    for token in learned:
        if token.place >= suffix and is_frame[token.place - suffix]:
            if is_text:
                turns.append(Turn())
            turn, is_text = turns[-1], False
            turn.speaks.append(token.speaks)
            turn.is_decided = token.label != silence
            turn.end = token.place + 1
            turn.frames = int(is_frame[: turn.end].sum()) // config.frame_num_tokens
        else:
            if not turns or (is_text and token.place != last + 1):
                turns.append(Turn())
            turn, is_text = turns[-1], True
        if is_text or turn.is_decided:
            turn.losses.append(token.loss)
            turn.labels.append(token.label)
            turn.predictions.append(token.prediction)
        last = token.place
    # After the last reply there is only silence.
    return [turn for turn in turns if turn.labels]


@torch.no_grad()
def _measure_delays(
    model: Any,
    processor: Any,
    ids: torch.Tensor,
    features: torch.Tensor,
    turns: list[Turn],
    interval_threshold: float | None,
    fps: float,
) -> None:
    """
    Measure how late the model speaks.

    The model sees the frames of the next turn directly after those of the silent turn, without the reply between them.
    """
    config, cache = model.config, model.new_cache()
    frame = [config.frame_token_id] * config.frame_num_tokens + processor.frame_suffix_ids
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
        more, ends = [], []
        for index in range(frames, frames + count):
            place = {"stream_open": True, "then": "stream", "time": index / fps, "index": index + 1}
            more += processor.encode_turns([], **place) + frame
            ends.append(len(more) - 1)
        more, ends = torch.tensor([more], device=model.device), torch.tensor(ends, device=model.device)
        shown = features[None, frames : frames + count]
        outputs = model(input_ids=more, frame_features=shown, cache=cache, use_cache=True, logits_to_keep=ends)
        speaks = model.should_speak(outputs.logits[0], interval_threshold)[0].tolist()
        turn.late = speaks.index(True) + 1 if True in speaks else count
        # This also cuts the caches of routed layers, which have other lengths.
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
    Compute LIVE's four measures (arXiv 2406.11816, section 4.1) over dialogues.

    The arguments are those of [`predict_all_turns`].

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
    Predict the turns of all dialogues with [`predict_turns`].

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (`Sequence[dict]`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        batch_size (`int`, *optional*, defaults to 4): Number of dialogues in a forward pass.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[Turn]`: The turns of all dialogues in order.
    """
    turns: list[Turn] = []
    for begin in tqdm(range(0, len(examples), batch_size), desc="teacher forcing", disable=not progress):
        batch = [examples[index] for index in range(begin, min(begin + batch_size, len(examples)))]
        for dialogue in predict_turns(model, processor, batch, fps=fps, interval_threshold=interval_threshold):
            turns += dialogue
    return turns


def score_turns(turns: Sequence[Turn], *, fps: float = 2.0) -> dict[str, float]:
    """Compute LIVE's four measures of predicted turns."""
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
    """Load a metric from the folder `metrics`."""
    return evaluate.load(str(METRICS / name))
