# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How many operations and cache entries does routing save? Count them in a forward pass and compare with `estimate_cost`.

```bash
python benchmarks/cost.py                                     # a model of 135M parameters on the CPU, also timed
python benchmarks/cost.py --shape llama3-8b --device meta     # Llama-3-8B, counted without weights
```

Weights and frames are random: operations, cache entries and seconds do not depend on them.
"""

import argparse

from videollm_mod.console import quiet

import torch
from common import (
    SCHEMES,
    SHAPES,
    choose_device,
    device_name,
    num_frame_tokens,
    random_batch,
    random_config,
    random_model,
    timed,
)
from report import markdown_row, markdown_table
from torch.utils.flop_counter import FlopCounterMode

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.space.command_line import CommandLineParser


def main() -> None:
    """Run every scheme and print a table."""
    quiet()
    parser = CommandLineParser(description="Count operations and cache entries and compare the prediction.")
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="shape of the language model")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--text-tokens", type=int, default=100)
    parser.add_argument("--tokens", type=num_frame_tokens, default=10, help="tokens per frame, 1 + n x n")
    parser.add_argument("--device", type=choose_device, default="cpu", help="cpu, cuda or meta")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts")
    options = parser.parse_args()
    if options.text_tokens < options.frames:
        parser.error(
            f"--text-tokens {options.text_tokens} --frames {options.frames}: an interval token follows each frame, "
            "so there must be at least as many text tokens as frames"
        )
    print(f"{options.shape}, {options.frames} frames of {options.tokens} tokens, {options.text_tokens} text tokens,")
    print(f"float32 on {device_name(options.device)}, torch {torch.__version__}, random weights\n")
    head = ["scheme", "GFLOP counted", "predicted", "of full", "cache entries counted", "predicted", "of full"]
    print(markdown_table([*head, "seconds"], []))
    for scheme in SCHEMES:
        print(markdown_row(cells(scheme, options)))


def cells(scheme: str, options: argparse.Namespace) -> list[str]:
    """Run one scheme and return its line of the table."""
    model = build(scheme, options)
    batch = random_batch(
        model.config,
        frames=options.frames,
        text_tokens=options.text_tokens,
        dtype=torch.float32,
        device=options.device,
    )

    def step():
        with torch.no_grad():
            return model(**batch, use_cache=True)

    with FlopCounterMode(display=False) as counter:
        cache = step().cache
    cost = model.estimate_cost(options.frames, options.text_tokens)
    seconds = "-"
    if options.device != "meta":
        seconds = f"{min(timed(step, options.device)[0] for _ in range(options.repeats)):.2f}"
    return [
        *(scheme, f"{counter.get_total_flops() / 1e9:.2f}", f"{cost.flops / 1e9:.2f}", f"{cost.flops_ratio:.2f}"),
        *(str(sum(cache.lengths)), str(sum(cost.cache_entries)), f"{cost.cache_ratio:.2f}", seconds),
    ]


def build(scheme: str, options: argparse.Namespace) -> VideoLLMMoDForConditionalGeneration:
    """Return a random model in training mode, which computes logits at labelled positions only."""
    config = random_config(options.shape, scheme, options.tokens, {"num_hidden_layers": 1})
    # Not every version of torch counts the operations of fused attention on every device.
    config._attn_implementation = "eager"
    return random_model(config, dtype=torch.float32, device=options.device).train()


if __name__ == "__main__":
    main()
