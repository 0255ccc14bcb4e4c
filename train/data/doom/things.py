# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of things that DoomWorld tells about, and the words for them."""

MONSTERS = ("zombie", "imp", "demon", "beast")
ITEMS = ("health", "ammunition", "armor", "weapon", "key")
THINGS = (*MONSTERS, "corpse", *ITEMS, "barrel")
# The game's class names of each kind. A shot monster is called "Dead" and its name. Spectres are almost transparent,
# so no kind has them.
_CLASSES = {
    "zombie": "Zombieman ShotgunGuy ChaingunGuy",
    "imp": "DoomImp",
    "demon": "Demon",
    "beast": "Cacodemon LostSoul Revenant HellKnight BaronOfHell Fatso Arachnotron Archvile PainElemental Cyberdemon",
    "corpse": "DeadMarine DeadZombieMan DeadCacodemon GibbedMarine GibbedMarineExtra Gibs",
    "health": "HealthBonus Stimpack Medikit Soulsphere Megasphere Berserk",
    "ammunition": "Clip ClipBox Shell ShellBox RocketAmmo RocketBox Cell CellPack Backpack",
    "armor": "ArmorBonus GreenArmor BlueArmor",
    "weapon": "Shotgun SuperShotgun Chaingun RocketLauncher PlasmaRifle BFG9000 Chainsaw",
    "key": "BlueCard RedCard YellowCard BlueSkull RedSkull YellowSkull",
    "barrel": "ExplosiveBarrel",
}
# What the vocabulary "small" calls kinds. It tells of monsters and items, and not which, nor how far away.
SMALL = dict.fromkeys(MONSTERS, "monster") | dict.fromkeys(ITEMS, "item")
VOCABULARIES: dict[str, dict[str, str]] = {"full": {}, "small": SMALL}
MONSTER_NAMES, ITEM_NAMES = (*MONSTERS, "monster"), (*ITEMS, "item")
KIND_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
KIND_OF |= {f"Dead{name}": "corpse" for name, kind in list(KIND_OF.items()) if kind in MONSTERS and name != "LostSoul"}
# By the number of the slot that holds them.
WEAPONS = {1: "fist", 2: "pistol", 3: "shotgun", 4: "chain gun", 5: "rocket launcher", 6: "plasma rifle"}
SIDES = ("on the left", "ahead", "on the right")
NEAR = 200.0  # Map units. A monster that is nearer is "near", others are "far". A zombie is 56 units high.


def side_of(x: float) -> str:
    """Say where a thing is whose center is at `x`, from 0 at the left edge of the picture to 1 at the right edge."""
    return SIDES[0] if x < 0.36 else SIDES[2] if x > 0.64 else SIDES[1]


def name_of(kind: str, count: int = 1) -> str:
    """Name things of one kind, for example "a zombie", "two imps" or "health"."""
    if kind in ("health", "ammunition", "armor"):
        return kind
    if count == 1:
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    return f"{'two' if count == 2 else 'several'} {kind}s"
