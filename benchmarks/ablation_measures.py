# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Held-out measures of one arm of the ablation, by clip, and their totals."""

import time as clock
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from ablation_rows import make_batches, parts_of, split_frames, with_features
from ablation_training import token_grid
from torch.nn import functional as F

from videollm_mod.train.focus import covered_tokens
from videollm_mod.train.streaming_evaluation import StreamTally, stream_examples
from videollm_mod.train.teacher_forcing import evaluate_metric, predict_all_turns, score_turns


BATCH = 8
# Longest time of free streaming in seconds of the processor, and most tokens of a reply in it.
MOST_SECONDS, LONGEST_REPLY = 90.0, 32
Clip = dict[str, Any]


def measure(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    single_frames: bool = False,
    fps: float = 2.0,
) -> dict[str, Any]:
    """
    Measure a model on held-out rows.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        rows (sequence of `dict`): Rows of [`read_rows`].
        single_frames (`bool`, *optional*, defaults to `False`): Whether the model sees each frame alone.
        fps (`float`, *optional*, defaults to 2.0): Frames per second of the rows.

    Returns:
        `dict[str, Any]`: The measures of [`totals`], LIVE's measures (see [`score_turns`]), the cost of
        [`measure_cost`], `streaming_seconds`, and `clips`, a table of counts and sums for each row.
    """
    seen = {"single_frames": single_frames, "fps": fps}
    groups = [parts_of(row, token_grid(model), **seen) for row in rows]
    parts = [part for group in groups for part in group]
    counted = measure_losses(model, processor, parts, fps=fps)
    clips = [added(group) for group in _grouped(counted, groups)]
    turns = predict_all_turns(model, processor, parts, fps=fps, progress=False)
    dialogues = [[turn for part in group for turn in part] for group in _grouped(turns, groups)]
    clips = [clip | {"lm_correctness": value} for clip, value in zip(clips, _correctness(dialogues), strict=True)]
    started = clock.perf_counter()
    shown = [split_frames(with_features(row, token_grid(model)), fps=fps) for row in rows] if single_frames else groups
    counts = list(stream_counts(model, processor, rows, shown, fps=fps))
    # Some clips alone would not be the same clips as another model's.
    if len(counts) == len(clips):
        clips = [{**clip, **counted} for clip, counted in zip(clips, counts, strict=True)]
    seconds = {"streaming_seconds": clock.perf_counter() - started}
    cost = measure_cost(model, [clip | {"frames": 1} for clip in counted] if single_frames else counted, len(rows))
    found = score_turns(dialogues, fps=fps) | totals(clips) | cost | seconds
    return {**found, "clips": clips}


def _grouped(values: Sequence[Any], groups: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return values of parts, in groups of the same lengths."""
    rest = iter(values)
    return [list(islice(rest, len(group))) for group in groups]


def added(counts: Sequence[Clip]) -> Clip:
    """Add up numbers, and lists of numbers, of the same names."""
    columns = {name: [count[name] for count in counts] for name in counts[0]}
    return {
        name: [sum(layer) for layer in zip(*column, strict=True)] if isinstance(column[0], list) else sum(column)
        for name, column in columns.items()
    }


@torch.no_grad()
def measure_losses(model: Any, processor: Any, rows: Sequence[dict[str, Any]], *, fps: float = 2.0) -> list[Clip]:
    """
    Sum the cross-entropy of each row at text and at stream positions, and count what routed layers keep.

    Returns:
        `list[dict]`: By row `text_loss`, `texts`, `stream_loss`, `streams` (sums of losses and numbers of positions),
        `frames`, `text_tokens`, and the counts of [`kept_counts`] if the row has `covered` and the model has routers.
    """
    clips: list[Clip] = []
    order = [range(begin, min(begin + BATCH, len(rows))) for begin in range(0, len(rows), BATCH)]
    for indices, batch in zip(order, make_batches(rows, processor, order, fps=fps), strict=True):
        labels, ids = batch.pop("labels")[:, 1:], batch["input_ids"]
        batch["num_frames"] = batch["num_frames"].tolist()
        outputs = model.model(**batch, use_cache=False, output_router_scores=True)
        is_frame = ids == model.config.frame_token_id
        is_text = (ids != processor.tokenizer.pad_token_id) & ~is_frame
        at_frame = F.pad(is_frame, (len(processor.frame_suffix_ids), 0))[:, : labels.shape[1]]
        for place, index in enumerate(indices):
            frames = batch["num_frames"][place]
            clip = _losses(model, outputs.last_hidden_state[place, :-1], labels[place], at_frame[place])
            clip |= {"frames": frames, "text_tokens": int(is_text[place].sum())}
            if rows[index].get("covered") and model.config.router_layers:
                layers = zip(model.config.routed_layers, outputs.kept_tokens, strict=True)
                first, routers = int(model.config.frame_token_cls), model.config.router_layers
                kept = [layer[place, :frames, first:] for number, layer in layers if number in routers]
                clip |= kept_counts(torch.stack(kept), rows[index]["covered"], model.config.frame_token_pooled)
            clips.append(clip)
    return clips


def _losses(model: Any, hidden: torch.Tensor, labels: torch.Tensor, at_frame: torch.Tensor) -> Clip:
    """Return sums and numbers of losses, given hidden states (sequence, hidden) and shifted labels (sequence,)."""
    learned = labels >= 0
    logits = model.lm_head(hidden[learned]).float()
    losses = F.cross_entropy(logits, labels[learned], reduction="none")
    streams = at_frame[learned]
    clip = {"text_loss": losses[~streams].sum().item(), "texts": int((~streams).sum())}
    return clip | {"stream_loss": losses[streams].sum().item(), "streams": int(streams.sum())}


def kept_counts(kept: torch.Tensor, covered: Sequence[Sequence[int]], grid: Sequence[int]) -> Clip:
    """
    Count kept tokens on things and on background.

    Args:
        kept (`torch.Tensor` of shape `(layers, frames, tokens)`): True where a layer keeps a token.
        covered (sequence of sequences of `int`): Indices of covered patches of each frame, in a grid of 8x8.
        grid (`Sequence[int]`): Height and width of the tokens' grid. A token is covered if one of its patches is.

    Returns:
        `dict`: `covered` and `background`, numbers of tokens; `kept_covered` and `kept_background`, how many of them
        each layer keeps; and `any_covered` and `any_background`, how many at least one layer keeps.
    """
    counts: Clip = {}
    on_thing = covered_tokens(covered, grid)
    for name, tokens in (("covered", on_thing), ("background", ~on_thing)):
        counts[name] = int(tokens.sum())
        counts[f"kept_{name}"] = (kept & tokens).sum(dim=(1, 2)).tolist()
        counts[f"any_{name}"] = int((kept.any(dim=0) & tokens).sum())
    return counts


def _correctness(dialogues: Sequence[Sequence[Any]]) -> list[float]:
    """Return LM-Correctness of each dialogue."""
    metric, values = evaluate_metric("lm_correctness"), []
    for turns in dialogues:
        tokens = {"predictions": [[t.predictions for t in turns]], "references": [[t.labels for t in turns]]}
        values.append(metric.compute(**tokens)["lm_correctness"])
    return values


def stream_counts(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    groups: Sequence[Sequence[dict[str, Any]]],
    *,
    fps: float = 2.0,
) -> Iterator[Clip]:
    """
    Stream rows freely until [`MOST_SECONDS`] are over, and count what is right. Replies are short, since an untrained
    model does not end its own.

    Args:
        model, processor: The model and its processor.
        rows (sequence of `dict`): The rows.
        groups (sequence of sequences of `dict`): What is streamed of each row: the row, or its frames one by one.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.

    Yields:
        `dict`: By row `events_right`, `events_told`, `events_true`, `answers_right`, `answers`, `silent_right` and
        `silent`, numbers of silent frames.
    """
    end = clock.process_time() + MOST_SECONDS
    metrics = {name: evaluate_metric(name) for name in ("stream_events", "answer_accuracy")}
    parts = [part for group in groups for part in group]
    streams = stream_examples(model, processor, parts, fps=fps, batch_size=1, max_new_tokens=LONGEST_REPLY)
    for row, group in zip(rows, groups, strict=True):
        streamed = list(islice(streams, len(group)))
        events = [event for _, said, _ in streamed for event in said]
        yield _count_stream(row, events, sum(count for _, _, count in streamed), fps, metrics)
        if clock.process_time() > end:
            break


def _count_stream(
    example: dict[str, Any], events: Sequence[Any], frames: int, fps: float, metrics: dict[str, Any]
) -> Clip:
    tally = StreamTally(fps, "token_f1")
    tally.add(example, events, frames)
    counts = event_counts(metrics["stream_events"], tally.narrated, tally.true_events)
    counts |= {"silent": tally.silent, "silent_right": tally.silent_right}
    right = 0.0
    if tally.answers:
        given = {"predictions": tally.answers, "references": tally.true_answers}
        right = metrics["answer_accuracy"].compute(**given)["answer_accuracy"]
    return counts | {"answers": len(tally.answers), "answers_right": round(right * len(tally.answers))}


def event_counts(metric: Any, narrated: list[list[Clip]], true_events: list[list[Clip]]) -> Clip:
    """Return how many events are narrated correctly, how many were told, and how many there are."""
    precision = metric.compute(predictions=narrated, references=true_events)["event_precision"]
    told, true = (sum(map(len, events)) for events in (narrated, true_events))
    return {"events_right": round(precision * told), "events_told": told, "events_true": true}


def totals(clips: Sequence[Clip]) -> dict[str, Any]:
    """
    Add up clips.

    Returns:
        `dict[str, Any]`: `text_loss` and `stream_loss` (means per position), `lm_correctness`. If the clips were
        streamed in time, `event_f1`, `event_precision`, `event_recall`, `answer_accuracy` and `silent_frames_right`.
        If they have kept counts, `kept_covered` and `kept_background` by routed layer, `any_covered` and
        `any_background`.
    """
    total = {name: sum(clip.get(name, 0) for clip in clips) for name in _COUNTS}
    found: dict[str, Any] = {
        name: total[part] / total[whole] for name, (part, whole) in SHARES.items() if total[whole] > 0
    }
    found["lm_correctness"] = sum(clip["lm_correctness"] for clip in clips) / len(clips)
    told = total["events_told"] + total["events_true"]
    if any("events_told" in clip for clip in clips):
        found["event_f1"] = 2 * total["events_right"] / max(told, 1)
    counted = [clip for clip in clips if "covered" in clip]
    for name in ("covered", "background") if counted else ():
        whole = max(sum(clip[name] for clip in counted), 1)
        layers = zip(*(clip[f"kept_{name}"] for clip in counted), strict=True)
        found[f"kept_{name}"] = [sum(layer) / whole for layer in layers]
    return found


# Measures that are a part over a whole, added up over clips.
SHARES = {
    "text_loss": ("text_loss", "texts"),
    "stream_loss": ("stream_loss", "streams"),
    "event_precision": ("events_right", "events_told"),
    "event_recall": ("events_right", "events_true"),
    "answer_accuracy": ("answers_right", "answers"),
    "silent_frames_right": ("silent_right", "silent"),
    "any_covered": ("any_covered", "covered"),
    "any_background": ("any_background", "background"),
}
_COUNTS = sorted({name for pair in SHARES.values() for name in pair})


def measure_cost(model: Any, parts: Sequence[Clip], num_clips: int) -> dict[str, Any]:
    """
    Count the operations of the mean clip, and of one more frame after half of it, without the vision encoder.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        parts (sequence of `dict`): `frames` and `text_tokens` of all dialogues: of clips, or of their frames.
        num_clips (`int`): Number of clips.

    Returns:
        `dict[str, Any]`: `clip_flops`, `frame_flops`, `full_clip_flops`, `full_frame_flops` (at full compute),
        `parameters`, `router_layers`, and `chance`, the share of tokens that each of these layers keeps.
    """
    config, per_clip = model.config, len(parts) / num_clips
    frames = round(sum(part["frames"] for part in parts) / len(parts))
    text = round(sum(part["text_tokens"] for part in parts) / len(parts))
    cost = config.estimate_cost(frames, text)
    step = config.estimate_cost(1, 1, past_frames=frames // 2, past_text_tokens=text // 2)
    return {
        "clip_flops": round(per_clip * cost.flops),
        "frame_flops": step.flops,
        "full_clip_flops": round(per_clip * cost.full_flops),
        "full_frame_flops": step.full_flops,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "router_layers": config.router_layers,
        "chance": [config.layer_keep_counts[layer] / config.frame_num_tokens for layer in config.router_layers],
    }
