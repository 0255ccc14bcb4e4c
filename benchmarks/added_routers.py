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
Routers added to a model that was trained at full compute: the first steps, with and without them.

A model that was trained at full compute goes on in four ways on the same batches of new clips: as it is, and with
routers in every second layer under three gates. Draws the losses.

```bash
python train/recipe.py --twin
python benchmarks/added_routers.py outputs/streamworld_cpu/trained_1 docs/added_routers.png
```
"""

import argparse
import copy
from pathlib import Path

import matplotlib
import torch
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.streamworld import WORLDS, streamworld_dataset


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


VARIANTS = {
    "full compute": None,
    "routed, tanh gate (default)": "tanh",
    "routed, linear gate (the paper)": "linear",
    "routed, sigmoid gate on the output (the authors' code)": "sigmoid",
}


def main() -> None:
    """Branches, trains, prints and draws."""
    parser = argparse.ArgumentParser(description="Loss of the first steps after routers are added.")
    parser.add_argument("checkpoint", help="a model trained at full compute")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--steps", type=int, default=50, help="steps of each variant")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--first_clip", type=int, default=100_000, help="first clip; those before were trained on")
    options = parser.parse_args()
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(options.checkpoint)
    collator = StreamCollator(AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True))
    clips = streamworld_dataset(
        num_clips=options.steps * options.batch,
        first_clip=options.first_clip,
        kinds={"narrate": 1.0},
        world=WORLDS["tiny"],
    )
    batches = [collator([clips[i] for i in range(b, b + options.batch)]) for b in range(0, len(clips), options.batch)]
    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=150)
    print("| | step 1 | step 10 | step 50 | mean of 50 |\n|---|---|---|---|---|")
    for name, gate in VARIANTS.items():
        losses = train(branch(model, gate), batches)
        axes.plot(range(len(losses)), losses, label=name)
        mean = sum(losses) / len(losses)
        print(f"| {name} | {losses[0]:.3f} | {losses[min(9, len(losses) - 1)]:.3f} | {losses[-1]:.3f} | {mean:.3f} |")
    axes.set(xlabel="steps after routers were added", ylabel="loss", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out)


def branch(full: VideoLLMMoDForConditionalGeneration, gate: str | None) -> VideoLLMMoDForConditionalGeneration:
    """A copy of the full-compute model, with routers in every second layer if a gate is given."""
    config = copy.deepcopy(full.config)
    if gate is not None:
        config.mod_keep_ratio, config.mod_layers, config.mod_gate = 0.2, "interleaved", gate
        config.mod_gate_on = "output" if gate == "sigmoid" else "update"
    torch.manual_seed(0)
    model = VideoLLMMoDForConditionalGeneration(config)
    model.load_state_dict(full.state_dict(), strict=False)
    return model


def train(model, batches, *, learning_rate: float = 3e-4) -> list[float]:
    """Losses of one pass over the batches."""
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


if __name__ == "__main__":
    main()
