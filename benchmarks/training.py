# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What does a training step cost, with routing and at full compute? Time, memory and the loss of the first step.

```bash
python benchmarks/training.py                                                                # small, on the CPU
python benchmarks/training.py --shape llama3-8b --device cuda --frames 600 --tokens 50       # on a GPU
```

Weights and frames are random. Every scheme runs the same step on the same dialogue: all weights or LoRA of rank 128,
with and without gradient checkpointing. Memory is the peak on a GPU; on a CPU it is the size of the tensors that the
forward pass keeps for the backward pass. The loss is that of the first step.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import torch
from common import (
    SCHEMES,
    SHAPES,
    choose_device,
    default_device,
    device_name,
    is_gpu,
    num_frame_tokens,
    random_batch,
    random_config,
    random_model,
    timed,
    to_dtype,
)
from memory import free
from peft import get_peft_model
from report import Bar, draw_bars, markdown_table, ratio, write_results
from tqdm import tqdm

from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.command_line import CommandLineParser


# Steps before the measured ones; the optimizer allocates its memory in the first.
WARM_UP = 2


@dataclass
class Row:
    """
    Results of one way of training.

    Args:
        scheme (`str`): Routing scheme.
        trained (`str`): `"all"` weights or `"lora"`.
        checkpointing (`bool`): Whether the backward pass computes activations again.
        seconds (`float`): Median seconds per step.
        memory (`float`): Gigabytes: the peak on a GPU, on a CPU the tensors kept for the backward pass.
        loss (`float`): Loss of the first step.
    """

    scheme: str
    trained: str
    checkpointing: bool
    seconds: float
    memory: float
    loss: float


@one_line_errors()
def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure a training step, with routing and without.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the language model")
    parser.add_argument("--device", type=choose_device, default=default_device())
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--tokens", type=num_frame_tokens, default=50, help="tokens per frame, 1 + n x n")
    parser.add_argument("--text-tokens", type=int, default=200, help="text tokens besides the interval tokens")
    parser.add_argument("--trained", nargs="+", choices=("all", "lora"), default=["all", "lora"])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each kind")
    parser.add_argument("--out", type=Path, help="folder for training.json, training.md and training.png")
    options = parser.parse_args()
    kinds = [(trained, checkpointing) for trained in options.trained for checkpointing in (False, True)]
    rows: list[Row] = []
    text = ""
    for trained, checkpointing in tqdm(kinds, desc="kinds of training"):
        for scheme in SCHEMES:
            free(options.device)
            try:
                rows.append(measure(scheme, trained, checkpointing, options))
            except torch.OutOfMemoryError:
                how = "with" if checkpointing else "without"
                print(f"{scheme}, {trained}, {how} checkpointing: not enough memory, left out")
            text = report(rows, options)
    print(f"\n{text}")
    if options.out is not None:
        draw(rows, options.out / "training.png")


def report(rows: list[Row], options: argparse.Namespace) -> str:
    """Return all results so far as Markdown, and write them if asked."""
    text = (
        f"{options.shape}, {options.frames} frames of {options.tokens} tokens, {options.text_tokens} text tokens, "
        f"random weights, {device_name(options.device)}, torch {torch.__version__}\n\n{table(rows, options.device)}\n"
    )
    if options.out is not None:
        write_results(options.out, "training", [asdict(row) for row in rows], text)
    return text


def compared(row: Row, rows: list[Row]) -> tuple[float, float, float] | None:
    """Return time and memory over those of full compute, and the loss minus its loss, if full compute was measured."""
    kind = (row.trained, row.checkpointing)
    full = next((one for one in rows if one.scheme == "full" and (one.trained, one.checkpointing) == kind), None)
    if full is None:
        return None
    return row.seconds / full.seconds, row.memory / full.memory, row.loss - full.loss


def table(rows: list[Row], device: str) -> str:
    """Return the results as a Markdown table."""
    memory = "peak, GB" if is_gpu(device) else "kept for the backward pass, GB"
    head = ["trained", "checkpointing", "scheme", "seconds", "of full", memory, "of full", "loss", "minus full's"]
    return markdown_table(head, (cells(row, rows) for row in rows))


def cells(row: Row, rows: list[Row]) -> list[str]:
    """Return one line of the table."""
    seconds, memory, loss = map(ratio, compared(row, rows) or (None, None, None))
    return [
        *(row.trained, "yes" if row.checkpointing else "no", row.scheme),
        *(f"{row.seconds:.3f}", seconds, f"{row.memory:.3f}", memory, f"{row.loss:.4f}", loss),
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Draw seconds and memory as bars, a panel each."""
    bars = [
        Bar(
            label,
            f"{row.trained},\n{'' if row.checkpointing else 'no '}checkpointing",
            row.scheme,
            getattr(row, field),
        )
        for field, label in (("seconds", "seconds"), ("memory", "GB"))
        for row in rows
    ]
    draw_bars(bars, path)


def measure(scheme: str, trained: str, checkpointing: bool, options: argparse.Namespace) -> Row:
    """Measure one way of training."""
    model, batch = build(scheme, trained, checkpointing, options)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    losses, seconds, kept = [], [], {}
    if is_gpu(options.device):
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + options.steps):
        kept.clear()
        taken, loss = timed(make_step(model, batch, optimizer, kept), options.device)
        seconds.append(taken)
        losses.append(loss.item())
    kept_bytes = sum(size for place, size in kept.items() if place not in own)
    memory = torch.cuda.max_memory_allocated() if is_gpu(options.device) else kept_bytes
    return Row(scheme, trained, checkpointing, statistics.median(seconds[WARM_UP:]), memory / 1e9, losses[0])


def make_step(
    model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer, kept: dict[int, int]
) -> Callable[[], torch.Tensor]:
    """Return a training step, which returns its loss and counts the bytes that it keeps by memory address."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def build(
    scheme: str, trained: str, checkpointing: bool, options: argparse.Namespace
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a random model, ready to train, and its batch. Only the routers differ between schemes."""
    device, dtype = options.device, to_dtype(None, options.device)
    model = random_model(
        random_config(options.shape, scheme, options.tokens, {"num_hidden_layers": 1}), dtype=dtype, device=device
    )
    text_tokens = options.text_tokens + options.frames  # one interval token per frame
    batch = random_batch(model.config, frames=options.frames, text_tokens=text_tokens, dtype=dtype, device=device)
    model.model.vision_encoder.requires_grad_(False)
    if trained == "lora":
        model = get_peft_model(model, model.make_lora_config(lora_dropout=0.0))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train(), batch


if __name__ == "__main__":
    main()
