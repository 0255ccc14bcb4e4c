# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Pretrain a vision encoder on StreamWorld. It takes the place that SigLIP has for natural video.

The encoder learns to predict what covers each patch: the thing, its color, its size and its center. The generator
knows these labels. With captions only, a small encoder would need hours of training. The script writes a checkpoint
with the trained encoder and new weights in all other parts, for `train/sft.py --checkpoint`.

```bash
python train/pretrain_vision.py --config train/configs/streamworld_vision.yaml
```
"""

from dataclasses import dataclass, field
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from videollm_mod.train.arguments import run
from videollm_mod.train.callbacks import TimeLimit
from videollm_mod.train.data.world.clip import SPLITS, WORLDS, Actor, Clip, World
from videollm_mod.train.data.world.clutter import make_clutter
from videollm_mod.train.data.world.masks import Patches
from videollm_mod.train.data.world.sprites import COLORS
from videollm_mod.train.new_model import new_model


@dataclass
class VisionArguments:
    """
    Which scenes to train on, and which model to create.

    Args:
        model_config (`str`): JSON file of the new model (see [`new_model`]).
        world (`str`, *optional*, defaults to `"small"`): World of the scenes: `"full"`, `"small"`, `"tiny"`,
            `"hard"`.
        num_clips (`int`, *optional*, defaults to 1000): Number of clips to train on, each once.
        first_clip (`int`, *optional*, defaults to 0): Index of the first clip.
    """

    model_config: str = field(metadata={"help": "JSON file of the new model."})
    world: str = field(
        default="small", metadata={"help": "World of the scenes.", "choices": ["full", "small", "tiny", "hard"]}
    )
    num_clips: int = field(default=1000, metadata={"help": "Number of clips to train on."})
    first_clip: int = field(default=0, metadata={"help": "Index of the first clip."})


@dataclass
class VisionTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] that also accept bf16 without an accelerator.

    Args:
        max_minutes (`float`, *optional*): Time limit of training; see [`StreamingSFTConfig`].
    """

    max_minutes: float | None = field(default=None, metadata={"help": "Time limit of training in minutes."})

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # Transformers hides the bar when it logs errors only.
        self.disable_tqdm = bool(self.disable_tqdm)
        super().__post_init__()


def make_scenes(seed: int, world: World, count: int = 8) -> Clip:
    """
    Make a clip that shows a new scene every second, with as many things as fit.

    The scenes show more kinds and colors than the same number of frames of a usual clip.

    Args:
        seed (`int`): The seed from which everything else follows.
        world ([`World`]): What scenes may show.
        count (`int`, *optional*, defaults to 8): Number of scenes.

    Returns:
        [`Clip`]: One second per scene, and no events.
    """
    rng = np.random.default_rng((seed, 6))
    size = 0.3 if world.sizes is None else sum(world.sizes) / 2
    low, high = (0.55, 1.5) if world.sizes is None else (width / size for width in world.sizes)
    pairs, actors = world.pairs(), []
    for second in range(count):
        taken: list[tuple[float, float, float]] = []
        for _ in range(12):
            scale = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            reach = 0.5 * size * scale
            x, y = (float(v) for v in rng.uniform(0, 1, 2))
            color, thing = pairs[int(rng.integers(len(pairs)))]
            if all(np.hypot(x - x1, y - y1) > 0.9 * (reach + reach1) for x1, y1, reach1 in taken):
                taken.append((x, y, reach))
                actor = Actor(thing, [(0.0, x, y)], [(0.0, scale)], [(0.0, color)], second, second + 1)
                actors.append(actor)
    wall = float(rng.uniform(0.35, 0.65)) if rng.random() < 0.3 else None
    clutter = make_clutter(seed, world, size)
    moves = world.clutter is not None
    return Clip(seed, float(count), tuple(actors), (), size, wall, clutter=clutter, ground_moves=moves)


class LabelledPatches(Dataset):
    """
    Scenes with labels of what covers each patch. They are drawn when they are read.

    Args:
        world ([`World`]): What scenes may show.
        grid (`int`): Number of patches per side.
        size (`int`): Width and height of the pictures.
        seeds (`range`): Seeds of the clips.
    """

    def __init__(self, world: World, grid: int, size: int, seeds: range) -> None:
        self.world, self.grid, self.size, self.seeds = world, grid, size, seeds

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        clip = make_scenes(self.seeds[index], self.world)
        labels = [self.labels(clip, second) for second in range(clip.num_frames(1.0))]
        return {
            "frames": clip.frames(fps=1.0, size=self.size),
            "things": np.stack([things for things, _, _ in labels]),
            "colors": np.stack([colors for _, colors, _ in labels]),
            "places": np.stack([places for _, _, places in labels]),
        }

    def labels(self, clip: Clip, time: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Return what each patch shows at a time, row by row. A covered patch shows the thing that covers most of it.

        Returns:
            `tuple`: Three arrays:

            - things `(patches,)`: index of the thing; the two indices after the last thing are nothing and the wall.
            - colors `(patches,)`: index of the color, or -100 without a thing.
            - places `(patches, 3)` in float32: x and y of the thing's center in patches, and its width relative to the
              picture. Places are absolute, because the connector pools patches and blurs their own positions.
        """
        y, x = (np.indices((self.grid, self.grid)).reshape(2, -1) + 0.5) / self.grid
        things = np.full(x.shape, len(self.world.things), dtype=np.int64)
        colors = np.full(x.shape, -100, dtype=np.int64)
        places = np.zeros((*x.shape, 3), dtype=np.float32)
        things[clip.behind_wall(x, y)] += 1
        patches = Patches(clip, time, self.grid)
        covering = patches.things()
        for index, actor in enumerate(patches.actors):
            (x0, y0), width = actor.place(time), clip.size * actor.scale(time)
            under = covering == index
            things[under] = self.world.things.index(actor.thing)
            colors[under] = list(COLORS).index(actor.color(time))
            places[under] = (x0 * self.grid, y0 * self.grid, width)
        return things, colors, places


class PatchReader(nn.Module):
    """A vision encoder with a linear head for each patch. The head is discarded after training."""

    def __init__(self, encoder: nn.Module, num_things: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.sizes = (num_things + 2, len(COLORS), 3)
        self.reading = nn.Linear(encoder.config.hidden_size, sum(self.sizes))

    def forward(
        self, pixel_values: torch.Tensor, things: torch.Tensor, colors: torch.Tensor, places: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Predict what covers each patch.

        Args:
            pixel_values (`torch.Tensor` of shape `(frames, 3, height, width)`): Normalised frames.
            things, colors, places: Labels of [`LabelledPatches.labels`], with frames as the first dimension.

        Returns:
            `loss`, and `right` of shape `(frames, 2)`: the shares of correct things and colors per frame, among
            patches with a thing. They are NaN for a frame without a thing.
        """
        patches = self.encoder(pixel_values=pixel_values).last_hidden_state
        thing, color, place = self.reading(patches).float().split(self.sizes, dim=-1)
        covered = colors >= 0
        # Nine patches in ten show no thing, so patches with a thing count a second time.
        loss = F.cross_entropy(thing.flatten(0, 1), things.flatten())
        loss = loss + F.cross_entropy(thing[covered], things[covered])
        loss = loss + F.cross_entropy(color[covered], colors[covered])
        loss = loss + F.smooth_l1_loss(place[covered], places[covered])
        right = torch.stack([thing.argmax(-1) == things, color.argmax(-1) == colors], dim=-1) & covered[..., None]
        return {"loss": loss, "right": right.sum(dim=1) / covered.sum(dim=1, keepdim=True)}


def main(arguments: VisionArguments, training: VisionTrainingArguments) -> None:
    """Train the encoder and write the checkpoint."""
    training.label_names = ["things", "colors", "places"]
    model, processor = new_model(arguments.model_config, seed=training.seed)
    world = WORLDS[arguments.world]
    grid, size = model.config.vision_grid[0], model.config.vision_config.image_size

    def collate(examples: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        batch = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
        frames = processor.process_frames(batch.pop("frames"))
        return {"pixel_values": frames, **{name: torch.from_numpy(labels) for name, labels in batch.items()}}

    def seen(prediction: Any) -> dict[str, float]:
        things, colors = np.nanmean(prediction.predictions, axis=0)
        return {"things_right": float(things), "colors_right": float(colors)}

    train, validation = SPLITS["train"] + arguments.first_clip, SPLITS["validation"]
    trainer = Trainer(
        model=PatchReader(model.model.vision_encoder, len(world.things)),
        args=training,
        train_dataset=LabelledPatches(world, grid, size, range(train, train + arguments.num_clips)),
        eval_dataset=LabelledPatches(world, grid, size, range(validation, validation + 64)),
        data_collator=collate,
        compute_metrics=seen,
    )
    if training.max_minutes is not None:
        trainer.add_callback(TimeLimit(training.max_minutes))
    trainer.train()
    print({name: round(value, 4) for name, value in trainer.evaluate().items() if name.endswith("_right")})
    model.save_pretrained(training.output_dir)
    processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    quiet()
    run(main, VisionArguments, VisionTrainingArguments)
