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
"""
What routing costs and saves, counted: one forward pass under each scheme, against the prediction of `estimate_cost`.

```bash
python benchmarks/cost.py                                     # a model of 135M parameters, on this machine
python benchmarks/cost.py --shape llama3-8b --device meta     # Llama-3-8B, counted without weights or time
```

Weights and frames are random: operations, cache entries and seconds do not depend on them.
"""

import argparse
import gc
import math
import platform
import time as clock
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration


SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4},
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
SCHEMES = {
    "full": {"mod_keep_ratio": 1.0},
    "interleaved": {"mod_layers": "interleaved", "mod_keep_ratio": 0.2},
    "all_deep": {"mod_layers": "all_deep", "mod_keep_ratio": 0.2},
}


def main() -> None:
    """Runs every scheme and prints a table."""
    parser = argparse.ArgumentParser(description="Counts operations and cache entries against their prediction.")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--text-tokens", type=int, default=100)
    parser.add_argument("--grid", type=int, default=3, help="a frame has 1 + grid x grid tokens")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or meta")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    options = parser.parse_args()
    print(
        f"{options.shape}, {options.frames} frames of {1 + options.grid**2} tokens, {options.text_tokens} text tokens,"
    )
    print(f"float32 on {device_name(options.device)}, torch {torch.__version__}, random weights\n")
    print("| scheme | GFLOP counted | predicted | of full | cache entries counted | predicted | of full | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for scheme in SCHEMES:
        print(row(scheme, options))


def row(scheme: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    model = build(scheme, options)
    config = model.config
    ids, labels = dialogue(config, options.frames, options.text_tokens, options.device)
    features = torch.randn(
        1, options.frames, config.frame_num_tokens, config.vision_config.hidden_size, device=options.device
    )

    def step():
        with torch.no_grad():
            return model(input_ids=ids, frame_features=features, labels=labels, use_cache=True)

    with FlopCounterMode(display=False) as counter:
        cache = step().cache
    cost = model.estimate_cost(options.frames, options.text_tokens)
    seconds = min(timed(step, options.device) for _ in range(options.repeats)) if options.device != "meta" else None
    return (
        f"| {scheme} | {counter.get_total_flops() / 1e9:.2f} | {cost.flops / 1e9:.2f} | {cost.flops_ratio:.2f} "
        f"| {sum(cache.lengths)} | {sum(cost.cache_entries)} | {cost.cache_ratio:.2f} "
        f"| {'-' if seconds is None else f'{seconds:.2f}'} |"
    )


def build(scheme: str, options: argparse.Namespace) -> VideoLLMMoDForConditionalGeneration:
    """A random model, in training mode so that logits are computed at labelled places only."""
    text = AutoConfig.for_model("llama", **{"vocab_size": 1024, **SHAPES[options.shape]})
    config = VideoLLMMoDConfig(
        text_config=text,
        vision_config={"num_hidden_layers": 1},
        frame_token_pooled=(options.grid, options.grid),
        frame_token_id=text.vocab_size,
        **SCHEMES[scheme],
    )
    # Plain matrix products, since not every torch counts the fused attention of every device.
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    with torch.device(options.device):
        return VideoLLMMoDForConditionalGeneration(config).train()


def dialogue(config, frames: int, text_tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames, an interval token after each, and the rest of the text."""
    frame = [config.frame_token_id] * config.frame_num_tokens + [config.frame_token_interval_id]
    ids = torch.tensor([frame * frames + [7] * (text_tokens - frames)], device=device)
    return ids, ids.masked_fill(ids == config.frame_token_id, -100)


def timed(step, device: str) -> float:
    """Seconds of one step."""
    begin = clock.perf_counter()
    step()
    wait(device)
    return clock.perf_counter() - begin


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Frees what was measured before; an engine and its captured steps know each other, and go when searched for."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def p99(seconds: list[float]) -> float:
    """The 99th percentile, of few the slowest."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


def write(path: Path, text: str) -> None:
    """Whole or not at all: who is broken off amid it leaves what was there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def device_name(device: str) -> str:
    """What the figures were taken on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads" if device == "cpu" else "no device (shapes only)"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "CPU " + next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"CPU {platform.processor()}".strip()


if __name__ == "__main__":
    main()
