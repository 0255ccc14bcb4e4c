# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What happens when routers are added to a model that was trained at full compute? Draw the loss of the first steps.

The model continues in four variants on the same batches of new clips: unchanged, and with routers in every second
layer under three gates.

```bash
python train/recipe.py --twin
python benchmarks/added_routers.py outputs/streamworld_cpu/trained_1 docs/added_routers.png
```
"""

import argparse
import copy
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import torch
from report import markdown_row, markdown_table
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import save_figure
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.collator import StreamCollator, normalize_pixels
from videollm_mod.train.data.world.clip import WORLDS
from videollm_mod.train.data.world.rows import streamworld_dataset


# Changes to the configuration of the trained model, by name of the variant.
ROUTED = {"mod_keep_ratio": 0.2, "mod_layers": "interleaved"}
VARIANTS: dict[str, dict[str, Any]] = {
    "full compute": {},
    "routed, tanh gate (default)": {**ROUTED, "mod_gate": "tanh", "mod_gate_on": "update"},
    "routed, linear gate (the paper)": {**ROUTED, "mod_gate": "linear", "mod_gate_on": "update"},
    "routed, sigmoid gate on the output (the authors' code)": {
        **ROUTED,
        "mod_gate": "sigmoid",
        "mod_gate_on": "output",
    },
}


def main() -> None:
    """Train all variants, print a table and draw the losses."""
    quiet()
    parser = CommandLineParser(description="Measure the loss of the first steps after routers are added.")
    parser.add_argument("checkpoint", help="a model trained at full compute")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--steps", type=int, default=50, help="training steps of each variant")
    parser.add_argument("--batch-size", type=int, default=8, help="clips per step")
    parser.add_argument(
        "--first-clip", type=int, default=100_000, help="number of the first clip; training used lower numbers"
    )
    options = parser.parse_args()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(options.checkpoint)
    batches = make_batches(options)
    losses = {}
    print(markdown_table(["variant", "step 1", "step 10", f"step {options.steps}", f"mean of {options.steps}"], []))
    for name, changes in VARIANTS.items():
        losses[name] = train(with_changes(model, changes), batches)
        shown = [losses[name][0], losses[name][min(9, options.steps - 1)], losses[name][-1]]
        mean = sum(losses[name]) / len(losses[name])
        print(markdown_row([name, *(f"{loss:.3f}" for loss in (*shown, mean))]))
    draw(losses, options.out)


def make_batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Return one batch of generated clips per step."""
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    collator = StreamCollator(processor)
    size = options.batch_size
    clips = streamworld_dataset(
        num_clips=options.steps * size,
        first_clip=options.first_clip,
        kinds={"narrate": 1.0},
        world=WORLDS["tiny"],
        size=processor.video_processor.size.height,
    )
    batches = [collator([clips[i] for i in range(begin, begin + size)]) for begin in range(0, len(clips), size)]
    return [normalize_pixels(batch, processor) for batch in batches]


def with_changes(
    full: VideoLLMMoDForConditionalGeneration, changes: dict[str, Any], *, seed: int = 0
) -> VideoLLMMoDForConditionalGeneration:
    """
    Return a copy of the full-compute model with changes to its configuration. The seed is that of new routers.

    Raises:
        `ValueError`: If other weights would be new too.
    """
    config = copy.deepcopy(full.config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = VideoLLMMoDForConditionalGeneration(config)
    missing = model.load_state_dict(full.state_dict(), strict=False).missing_keys
    if new := [name for name in missing if ".router." not in name]:
        raise ValueError(f"only routers may be new, but the changes {changes} need new {', '.join(new)}.")
    return model


def train(
    model: VideoLLMMoDForConditionalGeneration, batches: list[dict[str, torch.Tensor]], *, learning_rate: float = 3e-4
) -> list[float]:
    """Train for one pass over the batches and return the losses."""
    model.train()
    model.model.vision_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Draw the losses, a line for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=150)
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(len(values)), values, label=name)
    axes.set(xlabel="steps after routers were added", ylabel="loss", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
