# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
LIVE's measures under teacher forcing: LM-PPL, TimeDiff, Fluency and LM-Correctness.

The model predicts each turn of a dialogue from the true history (VideoLLM-online, arXiv 2406.11816, section 4.1). The
rules are those of its code, `stream_evaluate` in `models/modeling_live.py`.
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
_NUM_LOGITS = 512  # rows of logits in memory at a time


@dataclass
class Turn:
    """
    A part of a dialogue up to the end of a reply, predicted under teacher forcing.

    *Stream positions* are the learned decisions after frames, and *text positions* all other learned tokens.

    Args:
        losses (`list[float]`): Cross-entropy at each text position.
        labels (`list[int]`): The true token at each text position.
        predictions (`list[int]`): The most likely token at each text position.
        speaks (`list[bool]`): Whether the model would speak by the interval rule, at each stream position.
        is_decided (`bool`): Whether the label of the last stream position opens the reply. `False` means that the
            reply answers a question, or that this decision is not learned.
        late (`int`): Number of frames by which the model speaks late, if it speaks at no stream position.
        place (`int`): Number of tokens of the row up to and including the last stream position.
        num_frames (`int`): Number of frames of the turn.
        frames_seen (`int`): Number of frames of the row up to the end of the turn.
    """

    losses: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    speaks: list[bool] = field(default_factory=list)
    is_decided: bool = False
    late: int = 0
    place: int = 0
    num_frames: int = 0
    frames_seen: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether the model speaks at no stream position, and there are some."""
        return bool(self.speaks) and not any(self.speaks)

    @property
    def frame_diff(self) -> int:
        """LIVE's frame difference: stream positions by which the model is early, or minus the frames it is late."""
        return len(self.speaks) - 1 - self.speaks.index(True) if any(self.speaks) else -self.late

    @property
    def reply_diff(self) -> int:
        """`frame_diff`, except that a reply is never late if its frame is not the model's decision."""
        if self.is_decided:
            return self.frame_diff
        return len(self.speaks) - self.speaks.index(True) if any(self.speaks) else 0


class _Learned(NamedTuple):
    """A position with a label, and what the model predicts there."""

    place: int
    label: int
    prediction: int
    loss: float
    speaks: bool


@torch.no_grad()
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

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (`Sequence[dict]`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's. LIVE's own
            evaluation has none, which is 0.

    Returns:
        `list[list[Turn]]`: The turns of each dialogue that have a label. Frames after the last reply are in no turn.
    """
    collator = StreamCollator(processor, fps, frame_feature_shape=model.config.frame_feature_shape)
    batch, mask = collator.tokenize(list(examples))
    batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    if "pixel_values_videos" in batch:
        batch["frame_features"] = model.model.encode_frames(batch.pop("pixel_values_videos"))
    lengths = mask.sum(dim=1).tolist()
    return predict_batch(model, processor, batch, lengths, fps=fps, interval_threshold=interval_threshold)


@torch.no_grad()
def predict_batch(
    model: Any,
    processor: Any,
    batch: dict[str, Any],
    lengths: Sequence[int],
    *,
    fps: float = 2.0,
    interval_threshold: float | None = None,
) -> list[list[Turn]]:
    """
    Predict every turn of a batch; see [`predict_turns`].

    A turn ends after each end-of-sequence token of the input that ends a reply, learned or not. If the model speaks at
    no stream position of a turn, it also watches the frames after the turn, to measure how late it speaks.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        batch (`dict`): `input_ids` and `labels` (batch, sequence), padded on the right, `frame_features` (batch,
            frames, features, width), and `num_frames` and `position_ids` if there are several rows.
        lengths (`Sequence[int]`): Number of tokens of each row without padding.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's.

    Returns:
        `list[list[Turn]]`: The turns of each dialogue that have a label.
    """
    batch = dict(batch)
    learned = _predict_labels(model, batch, batch.pop("labels"), interval_threshold)
    rows = zip(learned, batch["input_ids"].cpu(), lengths, batch["frame_features"], strict=True)
    dialogues = []
    for tokens, ids, length, features in rows:
        turns = _split_turns(tokens, ids[:length], model.config, processor)
        _measure_delays(model, processor, ids, features, turns, interval_threshold, fps)
        dialogues.append([turn for turn in turns if turn.labels or turn.speaks])
    return dialogues


def _predict_labels(
    model: Any, batch: dict[str, Any], labels: torch.Tensor, interval_threshold: float | None
) -> list[list[_Learned]]:
    """Run the model, and return the predictions of each row at the positions that have a label."""
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    targets = labels[:, 1:].cpu()
    row, place = torch.nonzero(targets >= 0, as_tuple=True)
    known = targets[row, place]
    predicted = []
    for part in torch.arange(len(row)).split(_NUM_LOGITS):
        logits = model.lm_head(hidden[row[part].to(hidden.device), place[part].to(hidden.device)]).float()
        losses = torch.nn.functional.cross_entropy(logits, known[part].to(logits.device), reduction="none")
        speaks, _ = model.should_speak(logits, interval_threshold)
        predicted.append((logits.argmax(dim=-1), losses, speaks))
    columns = [torch.cat(column) for column in zip(*predicted, strict=True)]
    rows: list[list[_Learned]] = [[] for _ in range(len(labels))]
    for index, *values in zip(*(column.tolist() for column in (row, place, known, *columns)), strict=True):
        rows[index].append(_Learned(*values))
    return rows


def _split_turns(learned: Iterable[_Learned], ids: torch.Tensor, config: Any, processor: Any) -> list[Turn]:
    """Split the learned positions of a row of tokens (sequence,) into turns. Turns without any are included."""
    is_frame = ids == config.frame_token_id
    seen = (is_frame.cumsum(dim=0) // config.frame_num_tokens).tolist()
    stops = _reply_ends(ids.tolist(), processor)
    turns = [Turn(frames_seen=seen[stop - 1]) for stop in stops]
    for turn, before in zip(turns, [0, *(turn.frames_seen for turn in turns)], strict=False):
        turn.num_frames = turn.frames_seen - before
    interval, suffix = config.frame_token_interval_id, len(processor.frame_suffix_ids)
    silence = processor.tokenizer.eos_token_id if interval is None else interval
    waiting = iter(zip(turns, stops, strict=True))
    turn, stop = None, 0
    for token in learned:
        while token.place >= stop:
            turn, stop = next(waiting, (Turn(), len(ids)))  # the rest belongs to no turn
        if token.place >= suffix and is_frame[token.place - suffix]:
            turn.speaks.append(token.speaks)
            turn.is_decided, turn.place = token.label != silence, token.place + 1
        else:
            turn.losses.append(token.loss)
            turn.labels.append(token.label)
            turn.predictions.append(token.prediction)
    return turns


def _reply_ends(ids: list[int], processor: Any) -> list[int]:
    """Return the number of tokens up to the end of each reply."""
    end = processor.end_of_reply_id
    words = processor.encode_turns([{"role": "user", "content": "."}], stream_open=False, then="assistant")
    # Some stream formats end the user's turn with the same token, followed by the text that opens a reply.
    opening = words[len(words) - words[::-1].index(end) :] if end in words else None
    stops = [place + 1 for place, token in enumerate(ids) if token == end]
    return [stop for stop in stops if opening is None or ids[stop : stop + len(opening)] != opening]


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
    Measure how late the model speaks in turns where it is silent, except the last.

    After the last stream position the model sees the frames after the turn, without the text between them.
    """
    config, cache = model.config, model.new_cache()
    frame = [config.frame_token_id] * config.frame_num_tokens + processor.frame_suffix_ids
    tokens = frames = 0
    for turn, following in zip(turns, turns[1:], strict=False):
        count = min(following.num_frames, turn.num_frames - 1)
        if not turn.is_silent or count < 1:
            continue
        part = ids[None, tokens : turn.place].to(model.device)
        shown = int((part == config.frame_token_id).sum()) // config.frame_num_tokens
        inputs = {"frame_features": features[None, frames : frames + shown]} if shown else {}
        model(input_ids=part, **inputs, cache=cache, use_cache=True, logits_to_keep=1)
        tokens, frames = turn.place, frames + shown
        more, ends = [], []
        for index in range(turn.frames_seen, turn.frames_seen + count):
            place = {"stream_open": True, "then": "stream", "time": index / fps, "index": index + 1}
            more += processor.encode_turns([], **place) + frame
            ends.append(len(more) - 1)
        more, ends = torch.tensor([more], device=model.device), torch.tensor(ends, device=model.device)
        watched = features[None, turn.frames_seen : turn.frames_seen + count]
        outputs = model(input_ids=more, frame_features=watched, cache=cache, use_cache=True, logits_to_keep=ends)
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
    Compute LIVE's four measures (arXiv 2406.11816, section 4.1), and `reply_delay` and `reply_fluency`.

    The arguments are those of [`predict_all_turns`], and the result is that of [`score_turns`].
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
) -> list[list[Turn]]:
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
        `list[list[Turn]]`: The turns of each dialogue.
    """
    dialogues: list[list[Turn]] = []
    for begin in tqdm(range(0, len(examples), batch_size), desc="teacher forcing", disable=not progress):
        batch = [examples[index] for index in range(begin, min(begin + batch_size, len(examples)))]
        dialogues += predict_turns(model, processor, batch, fps=fps, interval_threshold=interval_threshold)
    return dialogues


def score_turns(dialogues: Sequence[Sequence[Turn]], *, fps: float = 2.0) -> dict[str, float]:
    """
    Compute the measures of predicted turns, each a mean over the turns of a dialogue, then over dialogues.

    Args:
        dialogues (`Sequence[Sequence[Turn]]`): The turns of each dialogue.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.

    Returns:
        `dict[str, float]`: LIVE's `lm_ppl`, `lm_correctness`, `time_diff` in seconds and `fluency`. `reply_delay` in
        seconds and `reply_fluency` are the latter two, except that an answer to a question is never late: its frame
        is the user's decision. So a model that is right everywhere reaches 0 and 1.
    """
    tokens = {
        "predictions": [[turn.predictions for turn in turns] for turns in dialogues],
        "references": [[turn.labels for turn in turns] for turns in dialogues],
    }
    losses = [[turn.losses for turn in turns] for turns in dialogues]
    scores = evaluate_metric("lm_ppl").compute(predictions=losses)
    scores |= evaluate_metric("lm_correctness").compute(**tokens)
    tokens["num_stream_positions"] = [[len(turn.speaks) for turn in turns] for turns in dialogues]
    for time_diff, fluency, name in (
        ("time_diff", "fluency", "frame_diff"),
        ("reply_delay", "reply_fluency", "reply_diff"),
    ):
        timed = [[getattr(turn, name) for turn in turns if turn.speaks] for turns in dialogues]
        scores[time_diff] = evaluate_metric("time_diff").compute(predictions=timed, fps=fps)["time_diff"]
        diffs = [[getattr(turn, name) for turn in turns] for turns in dialogues]
        scores[fluency] = evaluate_metric("fluency").compute(**tokens, frame_diff=diffs)["fluency"]
    return scores


def evaluate_metric(name: str) -> Any:
    """Load a metric from the folder `metrics`."""
    return evaluate.load(str(METRICS / name))
