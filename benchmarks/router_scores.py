# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Do gates saturate? Print statistics of router scores after a short training, with and without normalised scores.

The embedded checkpoint gets new routers, which start at 0, and trains on new clips of StreamWorld: once with
`mod_normalize_scores`, once without.

```bash
python benchmarks/router_scores.py --steps 60            # a minute on two cores
```

The table has one row per routed layer, of kept tokens on clips that training did not see. The slope is that of tanh, 1
at a score of 0. A token counts as saturated if its |tanh(score)| is above 0.95. The spread is the standard
deviation of the scores of one frame. The loss is the mean of the last ten steps.
"""

import argparse
from pathlib import Path

from videollm_mod.console import quiet

import torch
from added_routers import make_batches, train, with_changes
from common import device_name
from report import markdown_table

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser


HEADER = ["scores", "layer", "mean", "spread in a frame", "slope of the gate", "saturated, %", "gate", "loss"]


def main() -> None:
    """Train both variants and print the table."""
    quiet()
    parser = CommandLineParser(description="Print statistics of router scores after a short training.")
    parser.add_argument(
        "--checkpoint", default=str(Path(__file__).resolve().parents[1]), help="the model to start from"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps of each variant")
    parser.add_argument("--batch-size", type=int, default=8, help="clips per step")
    parser.add_argument("--first-clip", type=int, default=100_000, help="number of the first clip to train on")
    options = parser.parse_args()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(options.checkpoint)
    batches = make_batches(options)
    held_out = make_batches(argparse.Namespace(**{**vars(options), "steps": 4, "first_clip": options.first_clip * 2}))
    rows = []
    for normalizes in (False, True):
        variant = with_changes(model, {"mod_normalize_scores": normalizes})
        for router in variant.model.routers.values():
            torch.nn.init.zeros_(router.weight)
        losses = train(variant, batches, learning_rate=1e-3)
        loss = sum(losses[-10:]) / len(losses[-10:])
        rows += [["normalised" if normalizes else "raw", *row, f"{loss:.3f}"] for row in statistics(variant, held_out)]
    print(f"{device_name('cpu')}, torch {torch.__version__}; {options.steps} steps of {options.batch_size} clips\n")
    print(markdown_table(HEADER, rows))


@torch.no_grad()
def statistics(model: VideoLLMMoDForConditionalGeneration, batches: list[dict[str, torch.Tensor]]) -> list[list[str]]:
    """Return a row for each routed layer: layer, mean, spread, slope, share of saturated tokens, and gate."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in model.config.routed_layers}
    for batch in batches:
        outputs = model.eval()(**{**batch, "labels": None}, output_router_scores=True)
        for layer, scores, kept in zip(found, outputs.router_scores, outputs.kept_tokens, strict=True):
            t = scores[kept].tanh()
            saturated, gate = (t.abs() > 0.95).float(), 1 + 0.2 * t
            spread = scores[kept.any(dim=-1)].std(dim=-1)
            found[layer].append(torch.stack([x.mean() for x in (scores[kept], spread, 1 - t * t, saturated, gate)]))
    rows = []
    for layer, parts in found.items():
        mean, spread, slope, saturated, gate = torch.stack(parts).mean(dim=0).tolist()
        rows.append(
            [str(layer), f"{mean:.2f}", f"{spread:.2f}", f"{slope:.2f}", f"{100 * saturated:.0f}", f"{gate:.3f}"]
        )
    return rows


if __name__ == "__main__":
    main()
