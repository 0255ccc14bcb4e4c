# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
LIVE's measures under teacher forcing: LM-PPL, TimeDiff, Fluency and LM-Correctness.

The model predicts each turn of a dialogue from the true history (VideoLLM-online, arXiv 2406.11816, section 4.1). The
rules are those of its code, `stream_evaluate` in `models/modeling_live.py`.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import torch
from tqdm.auto import tqdm

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.windows import MAX_FRAMES, Windows, cut_beginning, parts_of


METRICS = Path(__file__).parent / "metrics"
# The longest video of VideoLLM-online with one token a frame, at 2 frames per second.
_MAX_FRAMES_OF_ONE_TOKEN = 7200
# How many rows of logits and frames of the vision encoder are in memory at a time, and further frames are watched.
_NUM_LOGITS, _NUM_FRAMES, _NUM_WATCHED = 512, 64, 32


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


class Following(NamedTuple):
    """
    What follows a window of a dialogue.

    Args:
        features (`torch.Tensor`): Frame features (1, frames, features, width), from the first frame after the window.
        num_frames (`int`): Number of frames up to the end of the next reply.
    """

    features: torch.Tensor
    num_frames: int


@torch.no_grad()
def predict_turns(
    model: Any,
    processor: Any,
    example: dict[str, Any],
    *,
    fps: float = 2.0,
    interval_threshold: float | None = None,
) -> list[Turn]:
    """
    Predict every turn of a dialogue from the true history.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        example (`dict`): A row with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's. LIVE's own
            evaluation has none, which is 0.

    Returns:
        `list[Turn]`: The turns that have a label. Frames after the last reply are in no turn.
    """
    batch = _read_row(model, processor, example, fps)
    options = {"fps": fps, "interval_threshold": interval_threshold}
    return predict_tokens(model, processor, batch, start=example.get("start") or 0.0, **options)


def _read_row(model: Any, processor: Any, example: dict[str, Any], fps: float) -> dict[str, Any]:
    """Return a row as tokens and frame features, for [`predict_tokens`]."""
    batch = StreamCollator(processor, fps, frame_feature_shape=model.config.frame_feature_shape)([example])
    if "pixel_values_videos" in batch:
        parts = batch.pop("pixel_values_videos")[0].split(_NUM_FRAMES)
        pixels = (processor.normalize_frames(part.to(model.device)) for part in parts)
        batch["frame_features"] = torch.cat([model.model.encode_frames(part) for part in pixels])[None]
    return batch


@torch.no_grad()
def predict_tokens(
    model: Any,
    processor: Any,
    batch: dict[str, Any],
    *,
    fps: float = 2.0,
    start: float = 0.0,
    interval_threshold: float | None = None,
    following: Following | None = None,
) -> list[Turn]:
    """
    Predict every turn of a dialogue that is given as tokens; see [`predict_turns`].

    A turn ends after each end-of-sequence token of the input that ends a reply, learned or not. If the model speaks at
    no stream position of a turn, it also watches the frames after the turn, to measure how late it speaks. These may
    lie in `following`, and beyond the model's context.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        batch (`dict`): `input_ids` and `labels` (1, sequence) and `frame_features` (1, frames, features, width).
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        start (`float`, *optional*, defaults to 0.0): Time of the first frame in seconds.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's.
        following ([`Following`], *optional*): What follows, if the tokens are a window of a dialogue that goes on.

    Returns:
        `list[Turn]`: The turns that have a label.
    """
    ids, features = batch["input_ids"].to(model.device), batch["frame_features"].to(model.device)
    outputs = model.model(input_ids=ids, frame_features=features, use_cache=True)
    learned = _predict_labels(model, outputs.last_hidden_state[0], batch["labels"][0].cpu(), interval_threshold)
    turns = _split_turns(learned, ids[0].cpu(), model.config, processor)
    counts = [turn.num_frames for turn in turns[1:]]
    if following is not None and turns:
        counts.append(features.shape[1] - turns[-1].frames_seen + following.num_frames)
        features = torch.cat([features, following.features.to(features)], dim=1)
    watcher = _Watcher(model, processor, outputs.cache, features, fps, start, interval_threshold)
    # The cache is cut from turn to turn, beginning at the end. Nothing follows the last turn of a dialogue.
    for turn, count in list(zip(turns, counts, strict=False))[::-1]:
        if turn.is_silent:
            count = min(count, turn.num_frames - 1)
            turn.late = watcher.find_delay(turn.place, range(turn.frames_seen, turn.frames_seen + count))
    return [turn for turn in turns if turn.labels or turn.speaks]


def _predict_labels(
    model: Any, hidden: torch.Tensor, labels: torch.Tensor, interval_threshold: float | None
) -> list[_Learned]:
    """Return what the model predicts from hidden states (sequence, hidden) at the positions that have a label."""
    places = torch.nonzero(labels[1:] >= 0)[:, 0]
    known, learned = labels[places + 1], []
    for place, label in zip(places.split(_NUM_LOGITS), known.split(_NUM_LOGITS), strict=True):
        logits = model.lm_head(hidden[place.to(hidden.device)]).float()
        losses = torch.nn.functional.cross_entropy(logits, label.to(logits.device), reduction="none")
        speaks, _ = model.should_speak(logits, interval_threshold)
        columns = (place, label, logits.argmax(dim=-1), losses, speaks)
        learned += map(_Learned, *(column.tolist() for column in columns))
    return learned


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
    at_frame = is_frame.tolist()
    waiting = iter(zip(turns, stops, strict=True))
    turn, stop = None, 0
    for token in learned:
        while token.place >= stop:
            turn, stop = next(waiting, (Turn(), len(ids)))  # the rest belongs to no turn
        if token.place >= suffix and at_frame[token.place - suffix]:
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


@dataclass
class _Watcher:
    """Shows a model further frames, with a cache that has all tokens of a dialogue at first."""

    model: Any
    processor: Any
    cache: Any
    features: torch.Tensor  # (1, frames, features, width)
    fps: float
    start: float
    interval_threshold: float | None

    def find_delay(self, place: int, frames: range) -> int:
        """
        Return how many of some frames the model sees until it speaks, or their number. They follow the first `place`
        tokens of the dialogue. Each call must have a smaller `place` than the one before.
        """
        # This also cuts the caches of routed layers, which have other lengths.
        self.cache.crop(place - int(self.cache.get_seq_length()))
        recent_frames = copy(self.cache.recent_frames)
        delay = len(frames)
        for begin in range(0, len(frames), _NUM_WATCHED):
            speaks = self._show(frames[begin : begin + _NUM_WATCHED])
            if True in speaks:
                delay = begin + speaks.index(True) + 1
                break
        # A router that compares frames remembers those of the last pass only, and the next cut is further back.
        self.cache.recent_frames = recent_frames
        return delay

    def _show(self, frames: range) -> list[bool]:
        """Return whether the model would speak after each of some frames that follow the tokens of the cache."""
        model, processor = self.model, self.processor
        frame = [model.config.frame_token_id] * model.config.frame_num_tokens + processor.frame_suffix_ids
        ids, ends = [], []
        for index in frames:
            place = {"stream_open": True, "then": "stream", "time": self.start + index / self.fps, "index": index + 1}
            ids += processor.encode_turns([], **place) + frame
            ends.append(len(ids) - 1)
        inputs = {"input_ids": torch.tensor([ids], device=model.device), "logits_to_keep": torch.tensor(ends)}
        inputs["frame_features"] = self.features[:, frames.start : frames.stop]
        logits = model(**inputs, cache=self.cache, use_cache=True).logits[0]
        return model.should_speak(logits, self.interval_threshold)[0].tolist()


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
    interval_threshold: float | None = None,
    official: bool = False,
    progress: bool = True,
) -> list[list[Turn]]:
    """
    Predict the turns of all dialogues with [`predict_turns`]. A row that is too long for the model, or for
    VideoLLM-online's 1200 frames, is predicted in windows (see [`Windows`]), each from its own beginning. To measure
    how late the last turn of a window is, the model watches on into the windows after it.

    With `official`, only the beginning of a long row is predicted, as in VideoLLM-online's code (see
    [`cut_beginning`]): at most 1200 frames, or 7200 if a frame has one token. It is predicted in one piece, even if it
    is longer than the model's context. A row of which nothing is left has no turn.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        examples (`Sequence[dict]`): Rows with `messages` and `video` or `frame_features`.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        interval_threshold (`float`, *optional*): Interval threshold; the default is the configuration's.
        official (`bool`, *optional*, defaults to `False`): Whether to cut long rows instead of splitting them.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[list[Turn]]`: The turns of each dialogue.
    """
    # One by one, so that the longest dialogue bounds the memory.
    order = tqdm(range(len(examples)), desc="teacher forcing", disable=not progress)
    options = {"fps": fps, "interval_threshold": interval_threshold}
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    windows = Windows(processor, fps, max_tokens=context)
    most = most_official_frames(model.config)

    def find_parts(row: dict[str, Any]) -> list[dict[str, Any]]:
        if not official:
            return parts_of(row, windows)
        beginning = cut_beginning(row, most, fps=fps)
        return [] if beginning is None else [beginning]

    return [_predict_windows(model, processor, find_parts(examples[index]), **options) for index in order]


def most_official_frames(config: Any) -> int:
    """Return the most frames that VideoLLM-online's code gives to a model of this configuration."""
    return _MAX_FRAMES_OF_ONE_TOKEN if config.frame_num_tokens == 1 else MAX_FRAMES


def _predict_windows(
    model: Any, processor: Any, parts: Sequence[dict[str, Any]], *, fps: float, **options: Any
) -> list[Turn]:
    """Predict the windows of a row, beginning with the last, so that each knows what follows."""
    found: list[list[Turn]] = []
    following = None
    for part in reversed(parts):
        batch = _read_row(model, processor, part, fps)
        place = {"fps": fps, "start": part.get("start") or 0.0, "following": following}
        found.append(predict_tokens(model, processor, batch, **place, **options))
        following = _find_following(batch, following, model.config, processor)
    return [turn for turns in reversed(found) for turn in turns]


def _find_following(
    batch: dict[str, Any], following: Following | None, config: Any, processor: Any
) -> Following | None:
    """Return what follows the window before a window, or `None` if no reply comes after it."""
    ids, features = batch["input_ids"][0], batch["frame_features"]
    if stops := _reply_ends(ids.tolist(), processor):
        num_frames = int((ids[: stops[0]] == config.frame_token_id).sum()) // config.frame_num_tokens
        return Following(features[:, :MAX_FRAMES], num_frames)
    if following is None:
        return None
    longer = torch.cat([features, following.features.to(features)], dim=1)
    return Following(longer[:, :MAX_FRAMES], features.shape[1] + following.num_frames)


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
