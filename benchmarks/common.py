# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: model shapes, routing schemes, random models, tokens on things, and timing."""

import argparse
import math
import platform
import time as clock
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration


T = TypeVar("T")
# Run a step and return its undo function, which is not timed.
Step = Callable[[], Callable[[], None]]

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Please narrate the video in real time."
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4},
    # Many layers so narrow that an eager step takes as long as its kernel launches.
    "narrow": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
SCHEMES: dict[str, dict[str, Any]] = {
    "full": {"mod_keep_ratio": 1.0},
    "interleaved": {"mod_layers": "interleaved", "mod_keep_ratio": 0.2},
    "all_deep": {"mod_layers": "all_deep", "mod_keep_ratio": 0.2},
}
# Consecutive steps of one variant before the next variant has its turn.
STEPS_PER_TURN = 5


def num_frame_tokens(text: str) -> int:
    """
    Read the option `--tokens`, the number of tokens per frame: one pooled token and a square grid, such as 1 + 3x3.

    Raises:
        `argparse.ArgumentTypeError`: If no square grid gives this number.
    """
    tokens = int(text)
    side = math.isqrt(max(tokens - 1, 0))
    if side < 1 or 1 + side**2 != tokens:
        raise argparse.ArgumentTypeError(f"{tokens} is not 1 + n x n; use a number such as 10 or 50")
    return tokens


def random_config(shape: str, scheme: str, tokens: int, vision_config: Any = None) -> VideoLLMMoDConfig:
    """
    Return the configuration of a random model.

    Args:
        shape (`str`): A name in `SHAPES`.
        scheme (`str`): A name in `SCHEMES`.
        tokens (`int`): Tokens per frame, 1 + n x n.
        vision_config (`Any`, *optional*): Of the vision encoder. By default the shape of SigLIP-L/16-384.
    """
    text = {"vocab_size": 1024, "max_position_embeddings": 2**20, **SHAPES[shape]}
    side = math.isqrt(tokens - 1)
    return VideoLLMMoDConfig(
        text_config=AutoConfig.for_model("llama", **text),
        vision_config=vision_config,
        frame_token_pooled=(side, side),
        frame_token_id=text["vocab_size"],
        **SCHEMES[scheme],
    )


def random_model(config: VideoLLMMoDConfig, *, dtype: torch.dtype, device: str) -> VideoLLMMoDForConditionalGeneration:
    """Return a model with random weights, the same ones at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        return VideoLLMMoDForConditionalGeneration._from_config(config, dtype=dtype)


def random_batch(
    config: VideoLLMMoDConfig, *, frames: int, text_tokens: int, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """
    Return one dialogue as model inputs: `input_ids`, `labels` and random `frame_features`.

    An interval token follows each frame. These interval tokens count as text, and the rest of the text follows the
    last frame. All text has labels.
    """
    frame = [config.frame_token_id] * config.frame_num_tokens + [config.frame_token_interval_id]
    ids = torch.tensor([frame * frames + [7] * (text_tokens - frames)], device=device)
    size = (1, frames, *config.frame_feature_shape)
    generator = torch.Generator().manual_seed(0)
    features = torch.empty(size, dtype=dtype, device=device)
    if device != "meta":
        features.copy_(torch.randn(size, generator=generator))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == config.frame_token_id, -100),
        "frame_features": features,
    }


def default_device() -> str:
    """Return `"cuda"` if a GPU is available, otherwise `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_gpu(device: str) -> bool:
    """Return whether a device, such as `"cuda"` or `"cuda:1"`, is a GPU."""
    return torch.device(device).type == "cuda"


def choose_device(text: str) -> str:
    """
    Read the option `--device`. A GPU with a number, such as `cuda:1`, becomes the one that all other calls refer to.

    Raises:
        `argparse.ArgumentTypeError`: If torch knows no such device.
    """
    try:
        if is_gpu(text) and torch.device(text).index is not None:
            torch.cuda.set_device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return text


def to_dtype(name: str | None, device: str) -> torch.dtype:
    """Return the dtype with this name; by default bfloat16 on a GPU and float32 elsewhere."""
    return getattr(torch, name or ("bfloat16" if is_gpu(device) else "float32"))


def wait(device: str) -> None:
    """Wait until the GPU has finished all queued work."""
    if is_gpu(device):
        torch.cuda.synchronize()


def timed(step: Callable[[], T], device: str) -> tuple[float, T]:
    """Run a step and return its duration in seconds and its result."""
    wait(device)
    begin = clock.perf_counter()
    result = step()
    wait(device)
    return clock.perf_counter() - begin, result


def in_turns(steps: dict[str, Step], count: int, device: str) -> dict[str, list[float]]:
    """
    Time each step `count` times and return the seconds by name.

    The steps are interleaved, five consecutive runs of each, because the speed of a machine changes over time. The
    first run of a turn is not counted: in a stream, a step follows one of its own kind and finds the processor's
    caches warm.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(0, count, STEPS_PER_TURN):
        for name, step in steps.items():
            for index in range(1 + min(STEPS_PER_TURN, count - done)):
                seconds, undo = timed(step, device)
                if index > 0:
                    taken[name].append(seconds)
                undo()
    return taken


def p99(seconds: Iterable[float]) -> float:
    """Return the 99th percentile; of fewer than 100 values, the largest."""
    ordered = sorted(seconds)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


@cache
def machine_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure bytes per second of a copy (read plus written) and operations per second of a matrix product."""
    side, length = (8192, 2**30) if is_gpu(device) else (2048, 2**27)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    copying = min(timed(lambda: target.copy_(source), device)[0] for _ in range(10))
    multiplying = min(timed(lambda: matrix @ matrix, device)[0] for _ in range(10))
    return 2 * length / copying, 2 * side**3 / multiplying


def device_name(device: str) -> str:
    """Return the name of the hardware, as results state it."""
    if is_gpu(device):
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" if device == "cpu" else "no device (shapes only)"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "CPU " + next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"CPU {platform.processor()}".strip()
