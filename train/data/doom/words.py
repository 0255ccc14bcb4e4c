# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld's words without the game: what is said about clips that nobody played."""

from collections.abc import Iterator

import numpy as np

from videollm_mod.train.data.doom.clip import Clip
from videollm_mod.train.data.doom.dialogues import make_dialogue
from videollm_mod.train.data.doom.events import EVENTS, WORDINGS, Event
from videollm_mod.train.data.doom.game import FPS, Sight
from videollm_mod.train.data.doom.things import ITEM_NAMES, MONSTER_NAMES, MONSTERS, SIDES, THINGS, WEAPONS
from videollm_mod.train.data.world.dialogues import KINDS


# The things that each kind of event happens to, if there are any.
_NAMES = (*THINGS, "monster", "item")
_HAPPENS_TO = {"picks_up": ITEM_NAMES, "dies": MONSTER_NAMES, "is_hit": MONSTER_NAMES, "explodes": ("barrel",)}
_HAPPENS_TO |= {"comes_into_view": _NAMES, "changes_weapon": tuple(WEAPONS.values())}


def sentences(count: int) -> Iterator[str]:
    """Yield the messages of dialogues of all kinds and wordings about `count` clips that are made up."""
    for seed in range(count):
        clip = make_up(seed)
        for kind in KINDS:
            for wording in WORDINGS if kind == "narrate" else ("plain",):
                yield from (message["content"] for message in make_dialogue(clip, kind, wording)[0])


def make_up(seed: int) -> Clip:
    """Return a clip with random sights and events, and black pictures."""
    rng, frames = np.random.default_rng((seed, 7)), 24
    sights = tuple(tuple(_sight(rng, number) for number in range(int(rng.integers(4)))) for _ in range(frames))
    events = tuple(_event(rng, index / FPS) for index in range(1, frames) if rng.random() < 0.5)
    pictures, masks = np.zeros((frames, 8, 8, 3), np.uint8), np.zeros((frames, 8, 8), np.uint8)
    weapons = tuple(int(slot) for slot in rng.choice(list(WEAPONS), size=frames))
    return Clip("train", seed, "", pictures, sights, masks, events, weapons)


def _sight(rng: np.random.Generator, number: int) -> Sight:
    kind, x, distance = str(rng.choice(_NAMES)), float(rng.random()), float(rng.uniform(0, 400))
    return Sight(number, kind, x, 0.5, 0.1, float(rng.random()), distance, 0.0)


def _event(rng: np.random.Generator, time: float) -> Event:
    kind = str(rng.choice(EVENTS))
    thing = str(rng.choice(_HAPPENS_TO[kind])) if kind in _HAPPENS_TO else ""
    if kind != "comes_into_view":
        return Event(time, kind, thing)
    count = int(rng.integers(1, 4))
    side, near = str(rng.choice(SIDES)), bool(rng.random() < 0.5) if thing in MONSTERS else None
    return Event(time, kind, thing, count) if count > 1 else Event(time, kind, thing, 1, side, near)
