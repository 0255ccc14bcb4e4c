# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamWorld's clutter: shapes in the colors of things that no dialogue mentions."""

import numpy as np

from videollm_mod.train.data.world.clip import Clutter, World
from videollm_mod.train.data.world.sprites import SHAPES


def make_clutter(seed: int, world: World, size: float) -> tuple[Clutter, ...]:
    """
    Make the clutter of a clip. It has a random generator of its own, so that it changes nothing else.

    Args:
        seed (`int`): The clip's seed.
        world ([`World`]): What may appear. A world without `clutter` gives no shapes.
        size (`float`): Width of a thing, as a fraction of the picture's. Shapes have half to all of it.

    Returns:
        `tuple[Clutter, ...]`: Still shapes, which lie apart if there is room, and then drifting ones.
    """
    if world.clutter is None:
        return ()
    rng = np.random.default_rng((seed, 7))
    still, drifting = (int(rng.integers(low, high + 1)) for low, high in world.clutter)
    made: list[Clutter] = []
    for index in range(still + drifting):
        width = float(size * rng.uniform(0.5, 1.0))
        shape, color = str(rng.choice(list(SHAPES))), str(rng.choice(world.colors))
        start = _apart(rng, width, made)
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.04, 0.15)
        drift = (float(speed * np.cos(angle)), float(speed * np.sin(angle))) if index >= still else (0.0, 0.0)
        made.append(Clutter(shape, color, width, start, drift))
    return tuple(made)


def _apart(rng: np.random.Generator, width: float, others: list[Clutter]) -> tuple[float, float]:
    """Return a random place, if possible away from other shapes."""
    for _ in range(20):
        x, y = (float(v) for v in rng.uniform(0, 1, 2))
        if all(np.hypot(x - o.start[0], y - o.start[1]) > 0.7 * (width + o.width) for o in others):
            break
    return x, y
