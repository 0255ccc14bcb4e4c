# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamWorld as a data set: rows of messages and pictures, made when they are read."""

from typing import Any

import numpy as np
from datasets import Dataset

from videollm_mod.train.data.world.clip import SEEDS_END, SPLITS, STEP, WORLDS, Clip, World
from videollm_mod.train.data.world.dialogues import KINDS, describe, make_dialogue
from videollm_mod.train.data.world.events import make_clip


# Frames in a row of kind "describe". Each comes from a different clip.
SLIDE_FRAMES = 12


def streamworld_dataset(
    split: str = "train",
    *,
    num_clips: int,
    first_clip: int = 0,
    kinds: dict[str, float] | None = None,
    world: World | None = None,
    size: int = 96,
    questions_per_minute: float | None = None,
) -> Dataset:
    """
    Return rows `{"messages", "video", "covered", "kind", "seed"}` that are made when they are read.

    `covered` has a list for each frame: the indices of the patches that show a thing, of 8 x 8 patches, row by row.

    A row of kind "describe" is a slide show: every frame comes from a different clip, so a model cannot copy the
    description of the previous frame.

    Args:
        split (`str`, *optional*, defaults to `"train"`): One of [`SPLITS`]. No two splits share a clip.
        num_clips (`int`): Number of rows.
        first_clip (`int`, *optional*, defaults to 0): Index of the first row in the split.
        kinds (`dict[str, float]`, *optional*): Weight of each kind of dialogue (see [`make_dialogue`]). The default is
            narration only.
        world ([`World`], *optional*): What clips may show. The default is `WORLDS["ood"]` for the split "ood" and
            `WORLDS["full"]` for the others.
        size (`int`, *optional*, defaults to 96): Width and height of the pictures.
        questions_per_minute (`float`, *optional*): How often the user asks (see [`make_dialogue`]).

    Raises:
        `ValueError`: If the split or a kind is unknown, a weight is negative, or the split has too few clips.
    """
    if split not in SPLITS:
        raise ValueError(f"StreamWorld has no split {split!r}; it has {', '.join(SPLITS)}.")
    kinds = kinds or {"narrate": 1.0}
    if set(kinds) - set(KINDS) or min(kinds.values()) < 0 or sum(kinds.values()) <= 0:
        raise ValueError(f"`kinds` gives weights of at least 0 to some of {', '.join(KINDS)}, got {kinds}.")
    ends = [*list(SPLITS.values())[1:], SEEDS_END]
    begin, end = SPLITS[split], ends[list(SPLITS).index(split)]
    # Every row has as many seeds as a slide show needs, so the kinds do not change which rows share a clip: none do.
    if not 0 <= begin + first_clip * SLIDE_FRAMES <= end - num_clips * SLIDE_FRAMES:
        raise ValueError(f"The split {split!r} has {(end - begin) // SLIDE_FRAMES} rows.")
    first = begin + first_clip * SLIDE_FRAMES
    seeds = range(first, first + num_clips * SLIDE_FRAMES, SLIDE_FRAMES)
    world = world or WORLDS["ood" if split == "ood" else "full"]
    return Dataset.from_dict({"seed": seeds}).with_transform(_RowMaker(kinds, world, size, questions_per_minute))


class _RowMaker:
    """Makes rows from their seeds: a batch `{"seed": [...]}` becomes a batch of complete rows."""

    def __init__(
        self,
        kinds: dict[str, float],
        world: World,
        size: int,
        questions_per_minute: float | None = None,
    ) -> None:
        self.kinds, self.weights = list(kinds), np.array(list(kinds.values())) / sum(kinds.values())
        self.world, self.size = world, size
        self.questions_per_minute = questions_per_minute

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [self.make(seed) for seed in batch["seed"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def make(self, seed: int) -> dict[str, Any]:
        """Make one row."""
        kind = self.kinds[np.random.default_rng((seed, 4)).choice(len(self.kinds), p=self.weights)]
        if kind == "describe":
            slides = make_slides(seed, self.world)
            messages = describe([clip.description(time) for clip, time in slides])
            video = np.stack([clip.draw(time, self.size) for clip, time in slides])
            covered = covered_patches(slides)
        else:
            clip = make_clip(seed, self.world)
            messages, _ = make_dialogue(clip, kind, self.questions_per_minute)
            if not messages:
                # The clip has nothing to narrate or to wait for: the row asks about it instead.
                kind = "ask"
                messages, _ = make_dialogue(clip, kind)
            video = clip.frames(fps=1 / STEP, size=self.size)
            covered = covered_patches([(clip, index * STEP) for index in range(len(video))])
        return {"messages": messages, "video": video, "covered": covered, "kind": kind, "seed": seed}


def covered_patches(frames: list[tuple[Any, float]]) -> list[list[int]]:
    """Return the indices of the patches that show a thing (see [`Clip.covered`]), for clips and times of frames."""
    return [np.flatnonzero(clip.covered(time)).tolist() for clip, time in frames]


def make_slides(seed: int, world: World) -> list[tuple[Clip, float]]:
    """Make clips from consecutive seeds and choose the time of one frame in each."""
    clips = [make_clip(seed + index, world) for index in range(SLIDE_FRAMES)]
    return [(clip, float(np.random.default_rng((clip.seed, 5)).choice(_telling_times(clip)))) for clip in clips]


def _telling_times(clip: Clip) -> list[float]:
    """Times worth a description: the times of events, and all times at which something is in sight."""
    times = [index * STEP for index in range(clip.num_frames(1 / STEP))]
    return [event.time for event in clip.events] + [t for t in times if clip.visible(t)] or times
