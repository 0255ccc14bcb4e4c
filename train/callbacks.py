# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the trainer: an announcement, a time limit and a warm-up of the keep ratio."""

import time as clock
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments, get_scheduler


class Announcement(TrainerCallback):
    """Print the parameters, processes and device of a training run once, on the main process."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the line."""
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
    End training after some minutes, at the end of the learning rate schedule.

    The callback estimates from the steps so far how many steps fit. If they do not all fit, it shortens the
    schedule and its warm-up to that number. All processes follow the clock of the first. A resumed run gets the full
    time again.

    Args:
        minutes (`float`): Time for training, from its first step on.

    Raises:
        `ValueError`: If the minutes are not positive. When training begins, also if the schedule does not depend on
            the number of steps.
    """

    # Steps after which to estimate, besides every tenth. The first steps are slow, so re-estimate soon.
    EARLY = (2, 4, 7)

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"The minutes to train must be positive, got {minutes}.")
        self.seconds = 60 * minutes
        self._times: list[float] = []
        self._all_steps = 0
        self._rates: list[Any] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self._times, self._all_steps = [clock.monotonic()], state.max_steps
        self._rates = _rates_of(kwargs["lr_scheduler"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Estimate how many steps fit."""
        self._times.append(clock.monotonic())
        done = len(self._times) - 1
        if done not in self.EARLY and done % 10:
            return
        # Only the later half of the steps counts, because the first ones are slow.
        first = done // 2
        left = self._times[0] + self.seconds - self._times[-1]
        estimate = [left, (self._times[-1] - self._times[first]) / (done - first)]
        left, seconds_a_step = broadcast_object_list(estimate)
        steps = min(state.global_step + max(int(left / max(seconds_a_step, 1e-9)), 1), self._all_steps)
        if left <= 0:
            control.should_training_stop = True
            # As at the last step.
            control.should_save = args.save_strategy == "steps"
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


def _rates_of(scheduler: Any) -> list[Any]:
    """Return the functions of the learning rates, which a time limit replaces."""
    rates = list(getattr(_schedule(scheduler), "lr_lambdas", []))
    if not rates or not all("num_training_steps" in getattr(rate, "keywords", {}) for rate in rates):
        raise ValueError(
            "A time limit needs a learning rate schedule that depends on the number of steps, such as 'cosine' or "
            "'linear'."
        )
    return rates


def check_schedule(args: TrainingArguments) -> None:
    """
    Check before a model is loaded that a time limit can shorten the learning rate schedule.

    Raises:
        `ValueError`: If the schedule does not depend on the number of steps.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    kind, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    try:
        _rates_of(get_scheduler(kind, optimizer, 1, 2, scheduler_specific_kwargs=options))
    except ValueError as error:
        raise ValueError(f"--max_minutes with --lr_scheduler_type {kind.value}: {error}") from None


class KeepRatioWarmup(TrainerCallback):
    """
    Hold the keep ratio of routed layers at 1, then lower it linearly to its final value.

    A model that was trained at full compute then skips its tokens gradually, and routers with a router loss see nearly
    all tokens before they choose. Layers with a ratio of 0 have no router, so they keep it. A checkpoint that is saved
    during the warm-up has the ratio of its step.

    Args:
        config ([`VideoLLMMoDConfig`]): Configuration of the trained model.
        steps (`int`): Number of steps during which the ratio falls.
        hold_steps (`int`, *optional*, defaults to 0): Number of steps before that.
    """

    def __init__(self, config: Any, steps: int, hold_steps: int = 0) -> None:
        if min(steps, hold_steps) < 0 or steps + hold_steps < 1:
            raise ValueError(f"The keep ratio needs at least 1 step to warm up, got {steps} and {hold_steps} to hold.")
        self.config, self.steps, self.hold_steps, self.target = config, steps, hold_steps, config.mod_keep_ratio

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Set the ratio of this step."""
        self.config.mod_keep_ratio = self.ratio(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Set the final ratio, even if training ended early."""
        self.config.mod_keep_ratio = self.target

    def ratio(self, step: int) -> float | list[float]:
        """Return `mod_keep_ratio` at a step, counted from 0."""
        falling = max(step - self.hold_steps, 0)
        if step >= self.hold_steps and falling >= self.steps:
            return self.target
        left = 1 - falling / max(self.steps, 1)
        # At a ratio of 1 a router would have no gradient, so a routed layer skips at least one token.
        most = 1 - 1 / self.config.frame_num_tokens

        def between(ratio: float) -> float:
            return ratio if ratio in (0, 1) else max(ratio, min(most, ratio + left * (1 - ratio)))

        if isinstance(self.target, (list, tuple)):
            return [between(ratio) for ratio in self.target]
        return between(self.target)
