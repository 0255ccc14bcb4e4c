# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What happens beside training."""

import time as clock
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState


class Announcement(TrainerCallback):
    """Says once, on the main process, what is trained on what."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Prints the line."""
        if state.is_world_process_zero:
            weights = list(kwargs["model"].parameters())
            tuned, count = sum(w.numel() for w in weights if w.requires_grad), sum(w.numel() for w in weights)
            sharded = ", sharded" if any(isinstance(weight, DTensor) for weight in weights) else ""
            plural = "" if args.world_size == 1 else "es"
            print(
                f"Training {tuned / 1e6:.2f}M of {count / 1e6:.2f}M parameters in {args.world_size} process{plural}"
                f"{sharded} on {args.device.type}, {state.max_steps} steps"
            )


class TimeLimit(TrainerCallback):
    """
    Ends training after some minutes, with a learning rate that has come down by then.

    From the steps done so far it is told how many there is time for. If they are fewer than meant, the schedule, its
    warm-up too, becomes that of so many steps. All processes do as the first one's clock says. A run that is gone on
    with has the time anew.

    Args:
        minutes (`float`): Time for training, from its first step on.

    Raises:
        `ValueError`: If the minutes are not positive, or, when training begins, if the schedule does not depend on how
            many steps there are.
    """

    # Steps after which to estimate, beside every tenth; the first steps are slow, and not counted on for long.
    EARLY = (2, 4, 7)

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"The minutes to train must be positive, got {minutes}.")
        self.seconds = 60 * minutes
        self._times: list[float] = []
        self._all_steps = 0
        self._rates: list[Any] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._times, self._all_steps = [clock.monotonic()], state.max_steps
        self._rates = list(getattr(_schedule(kwargs["lr_scheduler"]), "lr_lambdas", []))
        if not all("num_training_steps" in getattr(rate, "keywords", {}) for rate in self._rates) or not self._rates:
            raise ValueError(
                "With a limit of time the learning rate must come down over the steps that there are: use a schedule "
                "such as 'cosine' or 'linear'."
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Counts what there is time for."""
        self._times.append(clock.monotonic())
        done = len(self._times) - 1
        if done not in self.EARLY and done % 10:
            return
        # Of the steps so far the later half, in which the machine is warm.
        first = done // 2
        left = self._times[0] + self.seconds - self._times[-1]
        estimate = [left, (self._times[-1] - self._times[first]) / (done - first)]
        left, seconds_a_step = broadcast_object_list(estimate)
        steps = min(state.global_step + max(int(left / max(seconds_a_step, 1e-9)), 1), self._all_steps)
        if left <= 0:
            control.should_training_stop = True
        elif steps != state.max_steps:
            if state.is_world_process_zero and state.max_steps == self._all_steps:
                print(f"There is time for about {steps} of {self._all_steps} steps")
            self._set_steps(state, kwargs["lr_scheduler"], steps)

    def _set_steps(self, state: TrainerState, scheduler: Any, steps: int) -> None:
        state.max_steps = steps
        share = steps / self._all_steps
        _schedule(scheduler).lr_lambdas = [
            partial(
                rate.func,
                *rate.args,
                **rate.keywords
                | {"num_training_steps": steps}
                | {key: int(share * rate.keywords[key]) for key in ("num_warmup_steps",) if key in rate.keywords},
            )
            for rate in self._rates
        ]


def _schedule(scheduler: Any) -> Any:
    return getattr(scheduler, "scheduler", scheduler)


class KeepRatioWarmup(TrainerCallback):
    """
    Brings the keep ratio of routed layers from 1 down to its own in a straight line over steps, so that a model that
    was trained at full compute loses its tokens little by little. The configuration of a checkpoint saved on the way
    has the ratio of that step.

    Args:
        config ([`VideoLLMMoDConfig`]): Configuration of the model that is trained.
        steps (`int`): Steps until the ratio is reached.
    """

    def __init__(self, config: Any, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"The keep ratio needs at least 1 step to warm up, got {steps}.")
        self.config, self.steps, self.target = config, steps, config.mod_keep_ratio

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Sets the ratio of this step."""
        self.config.mod_keep_ratio = self.ratio(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Leaves the ratio as it is meant, also where training ended early."""
        self.config.mod_keep_ratio = self.target

    def ratio(self, step: int) -> float | list[float]:
        """`mod_keep_ratio` at a step, counted from 0."""
        if step >= self.steps:
            return self.target
        left = 1 - step / self.steps
        # At a ratio of 1 a layer is not routed, and its router would have no gradient: one token at least is skipped.
        most = 1 - 1 / self.config.frame_num_tokens

        def between(ratio: float) -> float:
            return ratio if ratio == 1 else max(ratio, min(most, ratio + left * (1 - ratio)))

        if isinstance(self.target, (list, tuple)):
            return [between(ratio) for ratio in self.target]
        return between(self.target)
