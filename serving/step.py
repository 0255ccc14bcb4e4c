# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""One step of several streams: run the model on its plan, and read each stream's result."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..compiled_step_videollm_mod import decide
from ..streaming_videollm_mod import StepResult, StreamStep
from .packed_cache import PackedCaches, StepPlan
from .pages import VideoLLMMoDPagePool


class StepOutputs(NamedTuple):
    """
    What the model returns for a step, on the device.

    Attributes:
        decisions (`torch.Tensor` of shape `(3, ends)`): Whether to speak, probability of silence, most likely token.
        logits (`torch.Tensor` of shape `(ends, vocabulary)`): Scores of the next token.
        scores (`torch.Tensor` of shape `(routed layers, frames, tokens)`, *optional*): Router scores.
        kept (`torch.Tensor` of shape `(routed layers, frames, tokens)`, *optional*): True at kept tokens.
        frames (`torch.Tensor` of shape `(frames, tokens, hidden)`, *optional*): Embeddings of the frames, if routers
            compare frames.
    """

    decisions: torch.Tensor
    logits: torch.Tensor
    scores: torch.Tensor | None
    kept: torch.Tensor | None
    frames: torch.Tensor | None = None


class PackedStep:
    """
    One step of several streams, ready to run.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        pool ([`VideoLLMMoDPagePool`]): The pool of the streams' caches.
        plan ([`StepPlan`]): The step.
        features (`torch.Tensor` of shape `(1, frames, features, width)`, *optional*): Features of its frames.
        device (`torch.device`): The model's device.
        output_router_scores (`bool`, *optional*, defaults to `False`): Whether to return scores and kept tokens.
    """

    def __init__(
        self,
        model: Any,
        pool: VideoLLMMoDPagePool,
        plan: StepPlan,
        features: torch.Tensor | None,
        device: torch.device,
        *,
        output_router_scores: bool = False,
    ) -> None:
        self.model, self.features, self.output_router_scores = model, features, output_router_scores
        self.caches = PackedCaches(pool, plan, device)

    def overwrite(self, plan: StepPlan, features: torch.Tensor | None) -> None:
        """Replace the inputs by those of another step of the same shape. Features of padding frames may stay."""
        self.caches.overwrite(plan)
        if features is not None:
            self.features[:, : features.shape[1]].copy_(features, non_blocking=True)

    def forward(self) -> StepOutputs:
        """Run the model. The caller counts the step with [`~serving.packed_cache.commit`]."""
        model, caches = self.model, self.caches
        inputs = {} if self.features is None else {"frame_features": self.features}
        with torch.no_grad():
            outputs = model(
                input_ids=caches.ids[None],
                cache=caches,
                packed_caches=caches,
                position_ids=caches.positions[None],
                use_cache=True,
                logits_to_keep=caches.ends,
                output_router_scores=self.output_router_scores and self.features is not None,
                **inputs,
            )
            # With layers on several devices, the head may lie on another than the embeddings.
            logits = outputs.logits[0]
            thresholds = caches.on(logits.device).thresholds
            decisions = decide(model, logits, thresholds)
            scores, kept = (
                torch.stack([layer[0].to(logits.device) for layer in rows]) if rows else None
                for rows in (outputs.router_scores, outputs.kept_tokens)
            )
        return StepOutputs(decisions, logits, scores, kept, caches.frames)


def join_features(steps: Iterable[StreamStep]) -> torch.Tensor | None:
    """Return the frame features of several steps, (1, frames, features, width), or `None` without frames."""
    features = [step.frame_features for step in steps if step.frame_features is not None]
    return torch.cat(features)[None] if features else None


def copy_to_host(outputs: StepOutputs) -> tuple[StepOutputs, torch.cuda.Event]:
    """
    Begin to copy a step's decisions and kept tokens from CUDA to pinned host memory.

    Returns:
        `tuple[StepOutputs, torch.cuda.Event]`: The outputs with the copies, which have the shapes and dtypes of their
        sources, and the event to wait for before they are read.
    """
    copies = {}
    for name in ("decisions", "kept"):
        if (source := getattr(outputs, name)) is not None:
            copies[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            copies[name].copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(outputs.decisions.device))
    return outputs._replace(**copies), copied


def read_results(plan: StepPlan, outputs: StepOutputs, routed_layers: Sequence[int]) -> list[StepResult]:
    """
    Return each stream's result, in the order of the streams. This waits for the device once.

    Args:
        plan ([`StepPlan`]): The plan that was run, including padding.
        outputs ([`StepOutputs`]): Its outputs.
        routed_layers (`Sequence[int]`): Indices of the routed layers.
    """
    speak, silence, tokens = outputs.decisions.tolist()
    results: dict[int, StepResult] = {}
    end = frame = 0
    for part in plan.parts:
        ends, frames = slice(end, end + len(part.ends)), slice(frame, frame + part.num_frames)
        end, frame = ends.stop, frames.stop
        if part.stream is None:
            continue
        seen: list[dict[int, torch.Tensor]] = [{}, {}]
        if part.num_frames and outputs.scores is not None:
            seen = [dict(zip(routed_layers, rows[:, frames], strict=True)) for rows in (outputs.scores, outputs.kept)]
        results[part.stream] = StepResult(
            [bool(x) for x in speak[ends]], silence[ends], [int(x) for x in tokens[ends]], outputs.logits[ends], *seen
        )
    return [results[stream] for stream in sorted(results)]


__all__ = ["PackedStep", "StepOutputs", "copy_to_host", "join_features", "read_results"]
