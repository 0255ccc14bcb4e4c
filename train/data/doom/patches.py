# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld's frames with labels of what covers each patch, to train vision encoders on."""

import numpy as np
from torch.utils.data import Dataset

from videollm_mod.train.data.doom.clip import STEP, Clip, record_slides
from videollm_mod.train.data.doom.things import THINGS


class LabelledPatches(Dataset):
    """
    Slide shows with labels of what covers each patch. They are recorded when they are read.

    Args:
        split (`str`): One of [`SPLITS`].
        grid (`int`): Number of patches per side.
        size (`int`): Width and height of the pictures.
        seeds (`range`): Seeds of the slide shows.
        count (`int`, *optional*, defaults to 16): Number of frames in each.
    """

    def __init__(self, split: str, grid: int, size: int, seeds: range, count: int = 16) -> None:
        self.split, self.grid, self.size, self.seeds, self.count = split, grid, size, seeds, count

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        clip = record_slides(self.split, self.seeds[index], size=self.size, count=self.count)
        labels = [label_patches(clip, i * STEP, self.grid) for i in range(len(clip.pictures))]
        things, places = (np.stack(part) for part in zip(*labels, strict=True))
        return {"frames": clip.pictures, "things": things, "colors": np.full_like(things, -100), "places": places}


def label_patches(clip: Clip, time: float, grid: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """
    Return what each patch shows at a time, row by row. The patches with a thing are those of [`Clip.covered`].

    Returns:
        `tuple`: Two arrays:

        - things `(patches,)` in int64: index in [`THINGS`] of the thing that covers most of the patch, or
          `len(THINGS)` for nothing.
        - places `(patches, 3)` in float32: x and y of the center of the thing's visible part in patches, and its width
          relative to the picture.
    """
    sights, parts = clip.visible(time), clip.parts(time, grid)
    things = np.full(grid * grid, len(THINGS), dtype=np.int64)
    places = np.zeros((grid * grid, 3), dtype=np.float32)
    for patch in np.flatnonzero(clip.covered(time, grid)):
        sight = sights[int(parts[:, patch].argmax())]
        things[patch] = THINGS.index(sight.kind)
        places[patch] = sight.x * grid, sight.y * grid, sight.width
    return things, places
