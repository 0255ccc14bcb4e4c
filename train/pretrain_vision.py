# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Pretrain a vision encoder on generated worlds. It takes the place that SigLIP has for natural video.

The encoder learns to predict what covers each patch: the thing, its color, its size and its center. The generator
knows these labels. With captions only, a small encoder would need hours of training. The script writes a checkpoint
with the trained encoder and new weights in all other parts, for `train/sft.py --checkpoint`. The linear head that
predicts the labels lies beside it, for `train/objectness.py`.

```bash
python train/pretrain_vision.py --config train/configs/streamworld_vision.yaml
python train/pretrain_vision.py --config train/configs/local_vision.yaml --world hard,doom
python train/pretrain_vision.py --config train/configs/local_vision.yaml --world small,hard --encoder FOLDER
```

The last command begins with the encoder and the head of an earlier run. To draw scenes costs more than to learn from
them, above all those of DoomWorld. `--clips_folder FOLDER --num_train_epochs 5` draws each once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainingArguments

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.checks_videollm_mod import check_number
from videollm_mod.outputs import replacing
from videollm_mod.train.arguments import Resumable, naming_options, run
from videollm_mod.train.callbacks import TimeLimit, check_schedule
from videollm_mod.train.checkpoint_files import WholeCheckpoints, new_checkpoint
from videollm_mod.train.data.world.clip import SPLITS, WORLDS, Actor, Clip, World
from videollm_mod.train.data.world.clutter import make_clutter
from videollm_mod.train.data.world.masks import Patches
from videollm_mod.train.data.world.sprites import COLORS
from videollm_mod.train.new_model import faults_of, new_model
from videollm_mod.train.objectness import FILE, PatchLabels, load_patch_labels


NUM_EVAL_CLIPS = 64  # At most, of each world.


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


@dataclass(frozen=True)
class LabelSource:
    """
    Where labelled patches come from.

    Args:
        things (`tuple[str, ...]`): Names of the kinds of things. Labels are indices in it; the two indices after the
            last thing are nothing and the wall.
        colors (`tuple[str, ...]`): Names of the colors. A source without colors gives -100 everywhere.
        make (callable): Returns a data set like [`LabelledPatches`] for the name of a split, the number of patches
            per side, the size of pictures, the index of the first clip and the number of clips.
    """

    things: tuple[str, ...]
    colors: tuple[str, ...]
    make: Callable[[str, int, int, int, int], Dataset]


def _streamworld(world: World) -> LabelSource:
    def make(split: str, grid: int, size: int, first: int, count: int) -> Dataset:
        return LabelledPatches(world, grid, size, range(SPLITS[split] + first, SPLITS[split] + first + count))

    return LabelSource(world.things, tuple(COLORS), make)


def _doomworld() -> LabelSource:
    from videollm_mod.train.data.doom import clip, game, patches

    try:
        game.find_vizdoom()
    except ImportError as error:
        raise SystemExit(f"error: --world doom: {error}") from None

    def make(split: str, grid: int, size: int, first: int, count: int) -> Dataset:
        seeds = range(clip.SPLITS[split] + first, clip.SPLITS[split] + first + count)
        return patches.LabelledPatches(split, grid, size, seeds, count=8)

    return LabelSource(patches.THINGS, (), make)


# The source of each name that `--world` accepts.
LABELS: dict[str, Callable[[], LabelSource]] = {
    name: partial(_streamworld, WORLDS[name]) for name in ("full", "small", "tiny", "hard")
}
LABELS["doom"] = _doomworld


class JointLabels(Dataset):
    """
    Labelled patches of one source, with the indices of the labels of several.

    Args:
        patches (`Dataset`): Data set of the source.
        source ([`LabelSource`]): The source.
        things, colors (`tuple[str, ...]`): Names of all sources.
    """

    def __init__(
        self, patches: Dataset, source: LabelSource, things: tuple[str, ...], colors: tuple[str, ...]
    ) -> None:
        self.patches = patches
        self.things = np.array([*map(things.index, source.things), len(things), len(things) + 1])
        # The last one is for -100.
        self.colors = np.array([*map(colors.index, source.colors), -100])

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = dict(self.patches[index])
        colors = np.maximum(example["colors"], -1)
        return example | {"things": self.things[example["things"]], "colors": self.colors[colors]}


class KeptClips(Dataset):
    """
    A data set whose examples are made once, and kept in files.

    Args:
        made (`Dataset`): The data set. Its examples are dictionaries of arrays.
        folder (`Path`): Folder of the files. Each name says which example it holds.
        name (`str`): What distinguishes this data set from others in the folder.
        first (`int`): Index of the first example in the names.
    """

    def __init__(self, made: Dataset, folder: Path, name: str, first: int) -> None:
        self.made, self.folder, self.name, self.first = made, folder, name, first

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path = self.folder / f"{self.name}-{self.first + index}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return dict(arrays)
        example = self.made[index]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two workers never make the same example, and `replacing` never leaves a part of a file.
        with replacing(path) as place, open(place, "wb") as file:
            np.savez(file, **example)
        return example


@dataclass
class VisionArguments:
    """
    Which scenes to train on, and which model to create.

    Args:
        model_config (`str`): JSON file of the new model (see [`new_model`]).
        world (`str`, *optional*, defaults to `"small"`): Worlds of the scenes, separated by commas: `"full"`,
            `"small"`, `"tiny"`, `"hard"` of StreamWorld, and `"doom"` for DoomWorld.
        num_clips (`int`, *optional*, defaults to 1000): Number of clips of each world to train on, each once.
        first_clip (`int`, *optional*, defaults to 0): Index of the first clip.
        encoder (`str`, *optional*): Checkpoint to begin with. The default is a new encoder. Layers that only
            `model_config` has stay new. The head is taken over too if it is there and its labels are the same.
        clips_folder (`str`, *optional*): Folder that keeps the clips, for further epochs and runs. By default they
            are drawn whenever they are read. A clip takes 0.4 MB at 128x128 pixels.
    """

    model_config: str = field(metadata={"help": "JSON file of the new model."})
    world: str = field(default="small", metadata={"help": f"Worlds, separated by commas: {', '.join(LABELS)}."})
    num_clips: int = field(default=1000, metadata={"help": "Number of clips of each world to train on."})
    first_clip: int = field(default=0, metadata={"help": "Index of the first clip."})
    encoder: str | None = field(default=None, metadata={"help": "Checkpoint whose encoder to begin with."})
    clips_folder: str | None = field(default=None, metadata={"help": "Folder that keeps the clips, drawn once."})

    def __post_init__(self) -> None:
        self.worlds = list(dict.fromkeys(name.strip() for name in self.world.split(",")))
        if unknown := sorted(set(self.worlds) - set(LABELS)):
            raise ValueError(f"There is no world {', '.join(unknown)}. Worlds are {', '.join(LABELS)}.")


@dataclass
class VisionTrainingArguments(Resumable, TrainingArguments):
    """
    [`TrainingArguments`] that also accept bf16 without an accelerator.

    Args:
        max_minutes (`float`, *optional*): Time limit of training; see [`StreamingSFTConfig`].
    """

    max_minutes: float | None = field(default=None, metadata={"help": "Time limit of training in minutes."})

    def __post_init__(self) -> None:
        if self.max_minutes is not None:
            with naming_options():
                check_number("max_minutes", self.max_minutes, above=0)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # Transformers hides the bar when it logs errors only.
        self.disable_tqdm = bool(self.disable_tqdm)
        super().__post_init__()
        if self.max_minutes is not None:
            check_schedule(self)


class PatchReader(nn.Module):
    """
    A vision encoder with a linear head for each patch.

    Args:
        encoder (`nn.Module`): The encoder.
        num_things, num_colors (`int`): Number of kinds of things and of colors.
    """

    def __init__(self, encoder: nn.Module, num_things: int, num_colors: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_things, self.sizes = num_things, (num_things + 2, num_colors, 3)
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
            `loss`, and `right` of shape `(frames, 3)`: the shares of correct things and colors per frame, among
            patches with a thing, and how often a patch with a thing has a higher objectness than one without. They
            are NaN for a frame without a thing.
        """
        patches = self.encoder(pixel_values=pixel_values).last_hidden_state
        thing, color, place = self.reading(patches).float().split(self.sizes, dim=-1)
        covered, colored = things < self.num_things, colors >= 0
        # Nine patches in ten show no thing, so patches with a thing count a second time.
        loss = F.cross_entropy(thing.flatten(0, 1), things.flatten())
        if covered.any():
            loss = loss + F.cross_entropy(thing[covered], things[covered])
            loss = loss + F.smooth_l1_loss(place[covered], places[covered])
        if colored.any():
            loss = loss + F.cross_entropy(color[colored], colors[colored])
        things_right = ((thing.argmax(-1) == things) & covered).sum(1) / covered.sum(1)
        ranked = _rank(thing.softmax(-1)[..., : self.num_things].sum(-1), covered)
        if not self.sizes[1]:
            return {"loss": loss, "right": torch.stack([things_right, torch.full_like(ranked, torch.nan), ranked], -1)}
        colors_right = ((color.argmax(-1) == colors) & colored).sum(1) / colored.sum(1)
        return {"loss": loss, "right": torch.stack([things_right, colors_right, ranked], dim=-1)}


def begin_with(reader: PatchReader, checkpoint: str, things: tuple[str, ...], colors: tuple[str, ...]) -> None:
    """
    Copy the weights of a trained encoder, and of its head if that is there and has the same labels.

    Args:
        reader ([`PatchReader`]): The encoder and the head to change.
        checkpoint (`str`): Folder of a checkpoint.
        things, colors (`tuple[str, ...]`): Names of the labels of `reader`.

    Raises:
        `SystemExit`: If the encoder has layers or shapes that `reader` has not.
    """
    trained = VideoLLMMoDForConditionalGeneration.from_pretrained(checkpoint).model.vision_encoder
    try:
        different = bool(reader.encoder.load_state_dict(trained.state_dict(), strict=False).unexpected_keys)
    except RuntimeError:
        different = True
    if different:
        raise SystemExit(f"error: the encoder of '{checkpoint}' is not the one of --model_config, or a part of it")
    if not (Path(checkpoint) / FILE).exists():
        return
    head = load_patch_labels(checkpoint)
    if (head.things, head.colors) == (things, colors):
        reader.reading.load_state_dict({"weight": head.weight, "bias": head.bias})


def _rank(scores: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """Return how often a covered patch of each frame has a higher score than another: the area under the curve."""
    pairs = covered[:, :, None] & ~covered[:, None, :]
    return ((scores[:, :, None] > scores[:, None, :]) & pairs).sum((1, 2)) / pairs.sum((1, 2))


class VisionTrainer(WholeCheckpoints, Trainer):
    """The trainer of Transformers, with checkpoints that are complete or not used."""


def main(arguments: VisionArguments, training: VisionTrainingArguments) -> None:
    """Train the encoder, and write the checkpoint and the labels' head."""
    training.label_names = ["things", "colors", "places"]
    with faults_of(f"--model_config {arguments.model_config}"):
        model, processor = new_model(arguments.model_config, seed=training.seed)
    sources = [LABELS[name]() for name in arguments.worlds]
    things = tuple(dict.fromkeys(name for source in sources for name in source.things))
    colors = tuple(dict.fromkeys(name for source in sources for name in source.colors))
    shape = model.config.vision_grid[0], model.config.vision_config.image_size

    def patches(split: str, first: int, count: int) -> dict[str, Dataset]:
        made = [source.make(split, *shape, first, count) for source in sources]
        if arguments.clips_folder is not None:
            folder = Path(arguments.clips_folder)
            names = [f"{world}-{split}-{shape[0]}-{shape[1]}" for world in arguments.worlds]
            made = [KeptClips(part, folder, name, first) for part, name in zip(made, names, strict=True)]
        joint = [JointLabels(*part, things, colors) for part in zip(made, sources, strict=True)]
        return dict(zip(arguments.worlds, joint, strict=True))

    def collate(examples: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        batch = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
        frames = processor.process_frames(batch.pop("frames"))
        return {"pixel_values": frames, **{name: torch.from_numpy(labels) for name, labels in batch.items()}}

    def seen(prediction: Any) -> dict[str, float]:
        shares = zip(("things", "colors", "covered"), prediction.predictions.T, strict=True)
        return {f"{name}_right": float(np.nanmean(share)) for name, share in shares if not np.isnan(share).all()}

    reader = PatchReader(model.model.vision_encoder, len(things), len(colors))
    if arguments.encoder is not None:
        begin_with(reader, arguments.encoder, things, colors)
    trainer = VisionTrainer(
        model=reader,
        args=training,
        train_dataset=ConcatDataset(patches("train", arguments.first_clip, arguments.num_clips).values()),
        eval_dataset=patches("validation", 0, min(NUM_EVAL_CLIPS, arguments.num_clips)),
        data_collator=collate,
        compute_metrics=seen,
    )
    if training.max_minutes is not None:
        trainer.add_callback(TimeLimit(training.max_minutes))
    trainer.train(resume_from_checkpoint=training.last_checkpoint())
    for world in arguments.worlds:
        found = trainer.evaluate(trainer.eval_dataset[world])
        print(world, {name: round(value, 4) for name, value in found.items() if name.endswith("_right")})
    if trainer.is_world_process_zero():
        with new_checkpoint(training.output_dir) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            PatchLabels(things, colors, reader.reading.weight, reader.reading.bias).save(folder)


if __name__ == "__main__":
    quiet()
    run(main, VisionArguments, VisionTrainingArguments)
