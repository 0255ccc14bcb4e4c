# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which data set a name means."""

from itertools import islice
from typing import Any

from datasets import Dataset

from videollm_mod.train.arguments import ScriptArguments
from videollm_mod.train.data import streamworld
from videollm_mod.train.data.timed_messages import check_timed_messages, load_timed_messages


def load_split(script: ScriptArguments, split: str, num_clips: int, first_clip: int = 0) -> Dataset:
    """
    Rows to train or evaluate on: generated, or timed messages that have been checked.

    Args:
        script ([`ScriptArguments`]): Names the data set and how it is made.
        split (`str`): Which split of it.
        num_clips (`int`): How many rows of a generated one.
        first_clip (`int`, *optional*, defaults to 0): Number of its first.

    Raises:
        `SystemExit`: With a message that names what is wrong with the data, or with what was asked for.
    """
    try:
        if script.dataset == "streamworld":
            return streamworld.streamworld_dataset(
                split,
                num_clips=num_clips,
                first_clip=first_clip,
                kinds=_weights(script.kinds),
                world=None if split == "ood" else streamworld.WORLDS[script.world],
                size=script.frame_size,
            )
        rows = load_timed_messages(script.dataset, split)
        check_timed_messages(rows)
        return rows
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"--dataset {script.dataset}: {error}") from None


def first_rows(rows: Dataset, count: int) -> list[dict[str, Any]]:
    """The first rows that have a video to stream, made once."""
    chosen = (rows[index] for index in range(len(rows)))
    return list(islice((row for row in chosen if row.get("video") is not None), count))


def _weights(kinds: str) -> dict[str, float]:
    """ "narrate=2,ask=1" as a table."""
    try:
        pairs = [part.split("=") for part in kinds.split(",")]
        return {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise ValueError(f"`kinds` looks like 'narrate=2,ask=1', got {kinds!r}.") from None
