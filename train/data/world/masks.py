# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which patches of a StreamWorld picture show a thing."""

from typing import TYPE_CHECKING

import numpy as np

from videollm_mod.train.data.world.drawing import place_sprite, wall_box


if TYPE_CHECKING:
    from videollm_mod.train.data.world.clip import Clip


PATCH = 16  # Pixels per side of a patch. With a grid of 8 this is exact for pictures of 128 pixels.
QUARTER = 0.25


class Patches:
    """
    What covers the patches of a picture. Clutter, the wall and hidden things cover nothing.

    Args:
        clip ([`Clip`]): The clip.
        time (`float`): Second of the picture.
        grid (`int`): Number of patches per side.

    Attributes:
        actors (`list[Actor]`): The things in sight, in the order in which they are drawn.
        shares (`np.ndarray` of shape `(things, grid * grid)`): Share of each patch's area that shows each thing, in
            float32. A pixel shows only the thing drawn last.
        parts (`np.ndarray` of shape `(things, grid * grid)`): Share of each thing's area that each patch shows, in
            float32.
    """

    def __init__(self, clip: "Clip", time: float, grid: int) -> None:
        size, seen = grid * PATCH, {id(actor) for actor in clip.visible(time)}
        self.actors = [actor for actor in clip.actors if id(actor) in seen]
        shown, areas = np.full((size, size), -1), np.ones(len(self.actors), dtype=int)
        for index, actor in enumerate(self.actors):
            sprite, (left, top) = place_sprite(clip, actor, time, size)
            solid = np.asarray(sprite.getchannel("A")) > 127
            areas[index] = max(1, solid.sum())
            x, y = max(0, -left), max(0, -top)
            window = shown[top + y : max(0, top + len(solid)), left + x : max(0, left + len(solid))]
            window[solid[y : y + window.shape[0], x : x + window.shape[1]]] = index
        if clip.wall is not None:
            left, top, right = wall_box(clip.wall, size)
            shown[top:, max(0, left) : right + 1] = -1
        by_patch = shown.reshape(grid, PATCH, grid, PATCH).swapaxes(1, 2).reshape(grid * grid, -1)
        pixels = np.stack([(by_patch == index).sum(-1) for index in range(len(areas))] or [np.zeros(grid * grid)])
        self.shares = np.float32(pixels[: len(areas)] / PATCH**2)
        self.parts = np.float32(pixels[: len(areas)] / areas[:, None])

    def coverage(self) -> np.ndarray:
        """Return the covered share of each patch's area: float32 `(grid * grid,)`."""
        return self.shares.sum(0)

    def covered(self) -> np.ndarray:
        """Return which patches are covered by a quarter or show a quarter of one thing: bool `(grid * grid,)`."""
        return (self.coverage() >= QUARTER) | (self.parts >= QUARTER).any(0)

    def things(self) -> np.ndarray:
        """Return the index in `actors` of the thing that covers most of a covered patch, else -1: `(grid * grid,)`."""
        if not self.actors:
            return np.full(self.shares.shape[1], -1)
        return np.where(self.covered(), self.shares.argmax(0), -1)
