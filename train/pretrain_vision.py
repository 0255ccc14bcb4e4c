# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
A vision encoder for StreamWorld, in the place that SigLIP has for natural video: it learns what covers each patch.

A caption says little about where each of its words is to be seen, and a small encoder would need hours of them. The
generator knows what covers every patch: the thing, its colour, how large it is and where its middle is. What is
written is a checkpoint whose encoder sees and whose other parts are new, for `train/sft.py --checkpoint`.

```bash
python train/pretrain_vision.py --config train/configs/streamworld_vision.yaml
```
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from videollm_mod.train.arguments import run
from videollm_mod.train.callbacks import TimeLimit
from videollm_mod.train.data.world.clip import SPLITS, WORLDS, Actor, Clip, World
from videollm_mod.train.data.world.sprites import COLORS
from videollm_mod.train.new_model import new_model


@dataclass
class VisionArguments:
    """
    What to look at, and with what.

    Args:
        model_config (`str`): JSON file of the new model (see [`new_model`]).
        world (`str`, *optional*, defaults to `"small"`): Which StreamWorld.
        num_clips (`int`, *optional*, defaults to 1000): How many clips of scenes to see, each once.
        first_clip (`int`, *optional*, defaults to 0): Number of the first clip.
    """

    model_config: str = field(metadata={"help": "JSON file of the new model."})
    world: str = field(default="small", metadata={"help": "Which StreamWorld.", "choices": ["full", "small", "tiny"]})
    num_clips: int = field(default=1000, metadata={"help": "How many clips to see."})
    first_clip: int = field(default=0, metadata={"help": "Number of the first clip; the next have the next."})


@dataclass
class VisionTrainingArguments(TrainingArguments):
    """
    As [`TrainingArguments`]; bf16 without an accelerator means the CPU's, and needs no further word.

    Args:
        max_minutes (`float`, *optional*): Time for training; see [`StreamingSFTConfig`].
    """

    max_minutes: float | None = field(default=None, metadata={"help": "Time for training, in minutes."})

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


def make_scenes(seed: int, world: World, count: int = 8) -> Clip:
    """
    A clip in which nothing happens, but each second shows other things, as many as find room: of every kind and colour
    far more than a story shows in as many frames.

    Args:
        seed (`int`): Decides everything.
        world ([`World`]): What may be seen.
        count (`int`, *optional*, defaults to 8): Number of scenes.

    Returns:
        [`Clip`]: As many seconds as scenes, and no events.
    """
    rng = np.random.default_rng((seed, 6))
    size, pairs, actors = 0.3, world.pairs(), []
    for second in range(count):
        taken: list[tuple[float, float, float]] = []
        for _ in range(12):
            scale = float(np.exp(rng.uniform(np.log(0.55), np.log(1.5))))
            reach = 0.5 * size * scale
            x, y = (float(v) for v in rng.uniform(0, 1, 2))
            color, thing = pairs[int(rng.integers(len(pairs)))]
            if all(np.hypot(x - x1, y - y1) > 0.9 * (reach + reach1) for x1, y1, reach1 in taken):
                taken.append((x, y, reach))
                actor = Actor(thing, [(0.0, x, y)], [(0.0, scale)], [(0.0, color)], second, second + 1)
                actors.append(actor)
    wall = float(rng.uniform(0.35, 0.65)) if rng.random() < 0.3 else None
    return Clip(seed, float(count), tuple(actors), (), size, wall)


class LabelledPatches(Dataset):
    """
    Scenes with what covers each patch, drawn when they are read.

    Args:
        world ([`World`]): What may be seen.
        grid (`int`): Patches a side.
        size (`int`): Width and height of the pictures.
        seeds (`range`): Of the clips.
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
        What covers each patch's middle at a time, row by row.

        Returns:
            Indices of things (patches,), after the last of which come nothing and the wall; of colours (patches,),
            -100 where there is no thing; and (patches, 3) float32, the thing's middle in the picture, x and y in
            patches, and its width in pictures. Not the way from the patch to it: the connector pools patches, which
            blurs where each of them is.
        """
        y, x = (np.indices((self.grid, self.grid)).reshape(2, -1) + 0.5) / self.grid
        things = np.full(x.shape, len(self.world.things), dtype=np.int64)
        colors = np.full(x.shape, -100, dtype=np.int64)
        places = np.zeros((*x.shape, 3), dtype=np.float32)
        behind = clip.behind_wall(x, y)
        things[behind] += 1
        for actor in clip.visible(time):
            (x0, y0), width = actor.place(time), clip.size * actor.scale(time)
            under = (np.maximum(abs(x - x0), abs(y - y0)) < width / 2) & ~behind
            things[under] = self.world.things.index(actor.thing)
            colors[under] = list(COLORS).index(actor.color(time))
            places[under] = (x0 * self.grid, y0 * self.grid, width)
        return things, colors, places


class PatchReader(nn.Module):
    """A vision encoder with a linear reading of each patch, which is thrown away afterwards."""

    def __init__(self, encoder: nn.Module, num_things: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.sizes = (num_things + 2, len(COLORS), 3)
        self.reading = nn.Linear(encoder.config.hidden_size, sum(self.sizes))

    def forward(
        self, pixel_values: torch.Tensor, things: torch.Tensor, colors: torch.Tensor, places: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Reads patches.

        Args:
            pixel_values (`torch.Tensor` of shape `(frames, 3, height, width)`): Normalised frames.
            things, colors, places: As [`LabelledPatches.labels`] gives them, with frames in front.

        Returns:
            `loss`, and `right` of shape `(frames, 2)`: per frame the share of the patches with a thing on them whose
            thing, and colour, is read right; not a number where there are none.
        """
        patches = self.encoder(pixel_values=pixel_values).last_hidden_state
        thing, color, place = self.reading(patches).float().split(self.sizes, dim=-1)
        covered = colors >= 0
        # Nine patches in ten have no thing on them: counted alike, which thing it is would weigh next to nothing.
        loss = F.cross_entropy(thing.flatten(0, 1), things.flatten())
        loss = loss + F.cross_entropy(thing[covered], things[covered])
        loss = loss + F.cross_entropy(color[covered], colors[covered])
        loss = loss + F.smooth_l1_loss(place[covered], places[covered])
        right = torch.stack([thing.argmax(-1) == things, color.argmax(-1) == colors], dim=-1) & covered[..., None]
        return {"loss": loss, "right": right.sum(dim=1) / covered.sum(dim=1, keepdim=True)}


def main(arguments: VisionArguments, training: VisionTrainingArguments) -> None:
    """Trains the encoder and writes the checkpoint."""
    training.label_names = ["things", "colors", "places"]
    model, processor = new_model(arguments.model_config, seed=training.seed)
    vision, world = model.config.vision_config, WORLDS[arguments.world]
    grid, size = vision.image_size // vision.patch_size, vision.image_size

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
    run(main, VisionArguments, VisionTrainingArguments)
