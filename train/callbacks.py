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
"""What happens beside training."""

import time as clock
from functools import partial
from typing import Any

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

    From the steps done so far it is told how many there is time for. If they are fewer than meant, the schedule is
    that of so many steps from there on.

    Args:
        minutes (`float`): Time for training, from its first step on.
    """

    # Steps before the first estimate, the first few of which are slow, and between estimates.
    FIRST, AGAIN = 10, 10

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"The minutes to train must be positive, got {minutes}.")
        self.seconds = 60 * minutes
        self._begin = self._measured_from = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._begin, self._first_step = clock.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Counts what there is time for."""
        now, done = clock.monotonic(), state.global_step - self._first_step
        left = self._begin + self.seconds - now
        if done == self.FIRST // 2:
            self._measured_from = now
        if left <= 0:
            control.should_training_stop = True
        elif done >= self.FIRST and done % self.AGAIN == 0:
            seconds_a_step = (now - self._measured_from) / (done - self.FIRST // 2)
            steps = max(state.global_step + int(left / seconds_a_step), state.global_step + 1)
            if steps < state.max_steps:
                self._shorten(state, kwargs["lr_scheduler"], steps)

    @staticmethod
    def _shorten(state: TrainerState, scheduler: Any, steps: int) -> None:
        print(f"There is time for {steps} of {state.max_steps} steps")
        state.max_steps = steps
        schedule = getattr(scheduler, "scheduler", scheduler)
        schedule.lr_lambdas = [
            partial(rate.func, *rate.args, **{**rate.keywords, "num_training_steps": steps})
            if "num_training_steps" in getattr(rate, "keywords", {})
            else rate
            for rate in getattr(schedule, "lr_lambdas", [])
        ]


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
