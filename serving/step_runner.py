# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""One step of the language model for the caches of a pool: captured if there is a captured step for it."""

from collections.abc import Sequence
from typing import Any

import torch

from ..streaming_videollm_mod import StepResult, StreamStep
from .captured_step import CapturedSteps
from .packed_cache import StepPlan, commit, plan_step
from .pages import VideoLLMMoDPagedCache, VideoLLMMoDPagePool
from .stats import EngineStats
from .step import PackedStep, StepOutputs, join_features, read_results


class StepRunner:
    """
    Runs steps of the language model.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        pool ([`VideoLLMMoDPagePool`]): The pool of the caches.
        captured ([`CapturedSteps`], *optional*): The captured steps. Without them all steps run uncaptured.
        device (`torch.device`): The model's device.
        stats ([`EngineStats`]): Where to count steps.
        output_router_scores (`bool`, *optional*, defaults to `False`): Whether steps return scores and kept tokens.
    """

    def __init__(
        self,
        model: Any,
        pool: VideoLLMMoDPagePool,
        captured: CapturedSteps | None,
        device: torch.device,
        stats: EngineStats,
        *,
        output_router_scores: bool = False,
    ) -> None:
        self.model, self.pool, self.captured, self.device, self.stats = model, pool, captured, device, stats
        self.output_router_scores = output_router_scores

    def execute(self, caches: Sequence[VideoLLMMoDPagedCache], steps: Sequence[StreamStep]) -> list[StepResult]:
        """
        Run one step for caches, which then hold its tokens.

        Args:
            caches (`Sequence[VideoLLMMoDPagedCache]`): One per stream.
            steps (`Sequence[StreamStep]`): One per stream.

        Returns:
            `list[StepResult]`: One per stream.

        Raises:
            `OutOfPagesError`: If the pool has too few pages for the new entries.
        """
        for cache, step in zip(caches, steps, strict=True):
            cache.make_room(len(step.ids), step.num_frames)
        return self.finish(*self.launch(caches, steps), caches, steps)

    def launch(
        self, caches: Sequence[VideoLLMMoDPagedCache], steps: Sequence[StreamStep]
    ) -> tuple[StepPlan, StepOutputs]:
        """Run one step without waiting for the device. The caches have room for it."""
        plan, features = plan_step(caches, steps, self.model.config.interval_threshold), join_features(steps)
        captured = None if self.captured is None else self.captured.find(plan)
        if captured is None:
            options = {"output_router_scores": self.output_router_scores}
            return plan, PackedStep(self.model, self.pool, plan, features, self.device, **options).forward()
        return captured.run(plan, features)

    def finish(
        self,
        plan: StepPlan,
        outputs: StepOutputs,
        caches: Sequence[VideoLLMMoDPagedCache],
        steps: Sequence[StreamStep],
    ) -> list[StepResult]:
        """Wait for a step and count it in the caches. A step that failed is not counted, so it can run again."""
        config = self.model.config
        results = read_results(plan, outputs, config.routed_layers)
        commit(plan, caches, config.frame_token_id, outputs.frames)
        self.stats.count(steps, is_captured=plan.bounds is not None)
        return results


__all__ = ["StepRunner"]
