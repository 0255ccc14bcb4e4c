# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld as a data set: rows of messages and pictures, recorded when they are read."""

from typing import Any

import numpy as np
from datasets import Dataset

from videollm_mod.train.data.doom.clip import RATES, SECONDS, SEEDS_END, SPLITS, record_clip, record_slides
from videollm_mod.train.data.doom.dialogues import describe, make_dialogue
from videollm_mod.train.data.doom.events import WORDINGS
from videollm_mod.train.data.doom.things import VOCABULARIES
from videollm_mod.train.data.world.dialogues import KINDS
from videollm_mod.train.data.world.rows import covered_patches


def doomworld_dataset(
    split: str = "train",
    *,
    num_clips: int,
    first_clip: int = 0,
    kinds: dict[str, float] | None = None,
    wordings: dict[str, float] | None = None,
    size: int = 128,
    seconds: tuple[float, float] = SECONDS,
    fps: int = RATES[0],
    vocabulary: str = "full",
) -> Dataset:
    """
    Return rows `{"messages", "video", "kind", "seed", "covered"}` that are recorded when they are read.

    `covered` lists, for each frame, the patches of an 8x8 grid that show things (see
    [`Clip.covered`]). A row of kind "describe" is a slide show: every frame shows another place.

    Args:
        split (`str`, *optional*, defaults to `"train"`): One of [`SPLITS`]. No two splits share a seed or a map.
        num_clips (`int`): Number of rows.
        first_clip (`int`, *optional*, defaults to 0): Index of the first row in the split.
        kinds (`dict[str, float]`, *optional*): Weight of each kind of dialogue (see [`make_dialogue`]). The default is
            narration only.
        wordings (`dict[str, float]`, *optional*): Weight of each of [`WORDINGS`]. The default is "plain" only.
        size (`int`, *optional*, defaults to 128): Width and height of the pictures.
        seconds (`tuple[float, float]`, *optional*, defaults to 8 to 15): Shortest and longest clip.
        fps (`int`, *optional*, defaults to 4): Frames per second, one of [`RATES`].
        vocabulary (`str`, *optional*, defaults to `"full"`): What things are called, one of [`VOCABULARIES`].

    Raises:
        `ValueError`: If the split, a kind, a wording or the vocabulary is unknown, a weight is negative, a length or a
            frame rate is wrong, or the split has too few clips.
    """
    if split not in SPLITS:
        raise ValueError(f"DoomWorld has no split {split!r}; it has {', '.join(SPLITS)}.")
    kinds, wordings = kinds or {"narrate": 1.0}, wordings or {"plain": 1.0}
    check_weights("kinds", kinds, KINDS)
    check_weights("wordings", wordings, WORDINGS)
    if not 2 <= seconds[0] <= seconds[1]:
        raise ValueError(f"clips last at least 2 seconds, and the shortest comes first, got {seconds}.")
    if fps not in RATES:
        raise ValueError(f"clips have {' or '.join(map(str, RATES))} frames a second, got {fps}.")
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"DoomWorld has no vocabulary {vocabulary!r}; it has {', '.join(VOCABULARIES)}.")
    ends = [*list(SPLITS.values())[1:], SEEDS_END]
    begin, end = SPLITS[split], ends[list(SPLITS).index(split)]
    if not 0 <= first_clip <= end - begin - num_clips:
        raise ValueError(f"The split {split!r} has {end - begin} rows.")
    first = begin + first_clip
    maker = _RowMaker(split, kinds, wordings, size, seconds, {"fps": fps, "vocabulary": vocabulary})
    return Dataset.from_dict({"seed": range(first, first + num_clips)}).with_transform(maker)


def check_weights(name: str, weights: dict[str, float], known: Any) -> None:
    """Raise `ValueError` if a name is unknown, a weight is negative, or all are 0."""
    if set(weights) - set(known) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"`{name}` gives weights of at least 0 to some of {', '.join(known)}, got {weights}.")


class _RowMaker:
    """Makes rows from their seeds: a batch `{"seed": [...]}` becomes a batch of complete rows."""

    def __init__(
        self,
        split: str,
        kinds: dict[str, float],
        wordings: dict[str, float],
        size: int,
        seconds: tuple[float, float],
        how: dict[str, Any],
    ) -> None:
        self.split, self.kinds, self.wordings = split, kinds, wordings
        self.size, self.seconds, self.how = size, seconds, how

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [self.make(seed) for seed in batch["seed"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def make(self, seed: int) -> dict[str, Any]:
        """Make one row."""
        rng = np.random.default_rng((seed, 4))
        kind, wording = draw(rng, self.kinds), draw(rng, self.wordings)
        if kind == "describe":
            clip = record_slides(self.split, seed, size=self.size, **self.how)
            messages = describe(clip)
        else:
            clip = record_clip(self.split, seed, size=self.size, seconds=self.seconds, **self.how)
            messages, _ = make_dialogue(clip, kind, wording)
            if not messages:
                # The clip has nothing to narrate or to wait for: the row asks about it instead.
                kind = "ask"
                messages, _ = make_dialogue(clip, kind)
        covered = covered_patches([(clip, index / clip.fps) for index in range(len(clip.pictures))])
        return {"messages": messages, "video": clip.pictures, "kind": kind, "seed": seed, "covered": covered}


def draw(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """Return one of the names at random, by their weights."""
    chances = np.array(list(weights.values())) / sum(weights.values())
    return list(weights)[int(rng.choice(len(chances), p=chances))]
