# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Training of one arm of the ablation, by a direct loop.

```python
rows = read_rows(folder, "clips")
trained = train_arm(folder / "initial", rows, {"mod_keep_ratio": 0.2, "mod_layers": "all_deep"}, steps=100, seed=0)
print(measure(trained.model, trained.processor, read_rows(folder, "test")))   # of ablation_measures.py
```
"""

import copy
import math
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_rows import batch_order, make_batches, num_frames
from added_routers import with_changes
from transformers import AutoProcessor, get_cosine_schedule_with_warmup

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.train.callbacks import KeepRatioWarmup


LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
# Share of the steps in which the learning rate rises.
LEARNING_RATE_WARM_UP = 0.05


@dataclass
class Trained:
    """
    A trained arm.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        losses (`list[float]`): Training loss of each step. Fewer than the steps asked for if time ran out.
        seconds (`float`): Time of the steps.
    """

    model: VideoLLMMoDForConditionalGeneration
    processor: Any
    losses: list[float]
    seconds: float


class MaxConnector(torch.nn.Module):
    """A connector that reads all tokens of a frame and returns one: their maximum after the projection."""

    def __init__(self, connector: torch.nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, frame_features: torch.Tensor) -> torch.Tensor:
        """Project features (..., tokens, width), and return the maximum (..., 1, hidden)."""
        parts = self.connector
        projected = parts.linear_2(parts.act(parts.linear_1(parts.layer_norm(frame_features))))
        return projected.amax(dim=-2, keepdim=True)


def load_initial(
    folder: str | Path, changes: dict[str, Any], *, seed: int = 0, takes_maximum: bool = False
) -> tuple[VideoLLMMoDForConditionalGeneration, Any]:
    """
    Return the common initialisation with changes to its configuration, and its processor.

    Args:
        folder (`str` or `Path`): The checkpoint.
        changes (`dict[str, Any]`): Fields of the configuration.
        seed (`int`, *optional*, defaults to 0): Seed of new routers.
        takes_maximum (`bool`, *optional*, defaults to `False`): Whether a frame is one token, the maximum over all.

    Raises:
        `ValueError`: If the configuration has no such field, or if a value is wrong.
    """
    full = VideoLLMMoDForConditionalGeneration.from_pretrained(folder)
    if unknown := set(changes) - set(type(full.config).__dataclass_fields__):
        raise ValueError(f"the configuration has no field {', '.join(sorted(unknown))}.")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    changes = changes | ({"connector": "mlp_pool_after", "frame_token_pooled": (1, 1)} if takes_maximum else {})
    model = with_changes(full, changes, seed=seed)
    processor.frame_num_tokens = model.config.frame_num_tokens
    if takes_maximum:
        model.model.connector = MaxConnector(model.model.connector)
    return model, processor


def token_grid(model: Any) -> Sequence[int] | None:
    """Return the grid to pool the tokens of a frame to, or `None` if the connector reads all of them."""
    config = model.config
    return config.frame_token_pooled if config.frame_feature_shape[0] == config.frame_num_tokens else None


def equal_grid(
    init_folder: str | Path, routed: dict[str, Any], rows: Sequence[dict[str, Any]], *, fps: float = 2.0
) -> tuple[int, int]:
    """
    Return the grid of tokens at which full compute costs most nearly what routing does.

    Args:
        init_folder (`str` or `Path`): The checkpoint of the common initialisation.
        routed (`dict[str, Any]`): Fields of the routed configuration.
        rows (sequence of `dict`): Rows whose first eight give the numbers of frames and of text tokens.
        fps (`float`, *optional*, defaults to 2.0): Frames per second of the rows.
    """
    model, processor = load_initial(init_folder, {})
    config, size = model.config, min(len(rows), 8)
    (batch,) = make_batches(rows, processor, [range(size)], fps=fps)
    frames = round(int(batch["num_frames"].sum()) / size)
    real = int((batch["input_ids"] != processor.tokenizer.pad_token_id).sum())
    text = round(real / size) - frames * config.frame_num_tokens

    def flops(changes: dict[str, Any]) -> int:
        changed = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed.estimate_cost(frames, text).flops

    wanted, side = flops(routed), math.isqrt(config.frame_num_tokens)
    grids = [(height, width) for height in range(1, side + 1) for width in (height, min(height + 1, side))]
    return min(grids, key=lambda grid: abs(math.log(flops({"frame_token_pooled": grid}) / wanted)))


def train_arm(
    init_folder: str | Path,
    rows: Sequence[dict[str, Any]],
    changes: dict[str, Any],
    steps: int,
    seed: int,
    *,
    batch_size: int = 8,
    learning_rate: float = LEARNING_RATE,
    router_rate: float = 1.0,
    warm_up: float = 0.0,
    watching: float = 0.0,
    takes_maximum: bool = False,
    single_frames: bool = False,
    minutes: float | None = None,
    fps: float = 2.0,
) -> Trained:
    """
    Train the common initialisation with changes: AdamW and a cosine schedule, in bfloat16 autocast.

    The vision encoder does not train, since the rows are encoded.

    Args:
        init_folder (`str` or `Path`): The checkpoint of the common initialisation.
        rows (sequence of `dict`): Rows of [`read_rows`].
        changes (`dict[str, Any]`): Fields of the configuration.
        steps (`int`): Number of steps.
        seed (`int`): Seed of the rows' order and of new routers.
        batch_size (`int`, *optional*, defaults to 8): Rows per step.
        learning_rate (`float`, *optional*, defaults to 1e-3): Highest learning rate.
        router_rate (`float`, *optional*, defaults to 1.0): Learning rate of routers, relative to `learning_rate`.
        warm_up (`float`, *optional*, defaults to 0.0): Share of the steps in which the keep ratio falls from 1.
        watching (`float`, *optional*, defaults to 0.0): Share of the steps in which routed layers keep all tokens but
            one, so that routers learn and skip almost nothing. The keep ratio falls after these steps.
        takes_maximum (`bool`, *optional*, defaults to `False`): See [`load_initial`].
        single_frames (`bool`, *optional*, defaults to `False`): Whether the model sees each frame alone; see
            [`split_frames`].
        minutes (`float`, *optional*): Limit of the process's processor time, which other processes do not lengthen.
            Training that reaches it stops early.
        fps (`float`, *optional*, defaults to 2.0): Frames per second of the rows.

    Returns:
        [`Trained`]
    """
    model, processor = load_initial(init_folder, changes, seed=seed, takes_maximum=takes_maximum)
    model.train()
    model.model.vision_encoder.requires_grad_(False)
    optimizer = _optimizer(model, learning_rate, router_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(LEARNING_RATE_WARM_UP * steps), steps)
    held, falling = round(watching * steps), round(warm_up * steps)
    ratios = KeepRatioWarmup(model.config, falling, held) if held + falling else None
    order = batch_order([num_frames(row) for row in rows], steps, batch_size, seed)
    seen = {"grid": token_grid(model), "single_frames": single_frames, "fps": fps}
    batches = make_batches(rows, processor, order, **seen)
    losses, started, processor_started = [], clock.perf_counter(), clock.process_time()
    for step, batch in enumerate(batches):
        if minutes is not None and clock.process_time() - processor_started > 60 * minutes:
            break
        if ratios is not None:
            model.config.mod_keep_ratio = ratios.ratio(step)
        losses.append(_train_step(model, batch, optimizer))
        schedule.step()
    if ratios is not None:
        model.config.mod_keep_ratio = ratios.target
    return Trained(model.eval(), processor, losses, clock.perf_counter() - started)


def _train_step(model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    with torch.autocast(model.device.type, torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_((w for w in model.parameters() if w.grad is not None), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _optimizer(model: Any, learning_rate: float, router_rate: float) -> torch.optim.Optimizer:
    """Return AdamW with a separate learning rate for routers."""
    routers = {id(weight) for router in model.model.routers.values() for weight in router.parameters()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if (id(weight) in routers) == is_router], "lr": rate}
        for is_router, rate in ((False, learning_rate), (True, router_rate * learning_rate))
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=WEIGHT_DECAY)
