# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe's figures: of each world, before and after training, with what the routers keep."""

import math
import os
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from videollm_mod.outputs import write_json
from videollm_mod.train.card import published_command
from videollm_mod.train.data.sources import find_source, load_split
from videollm_mod.train.evaluation import measure_checkpoint
from videollm_mod.train.loading import load_checkpoint
from videollm_mod.train.recipe_sizes import FPS, WORLDS, Size


# An untrained model never ends its replies, so it is evaluated on few clips with short replies.
CLIPS_BEFORE, LONGEST_REPLY = 10, 32
TABLE = {
    "clips": "clips",
    "event_f1": "events narrated within 0.5 s, F1",
    "event_precision": "precision",
    "event_recall": "recall",
    "answer_accuracy": "correct answers",
    "silent_frames_right": "silence kept at silent frames",
    "reply_delay": "reply delay, s",
    "reply_fluency": "reply fluency",
    "time_diff": "TimeDiff, s",
    "fluency": "Fluency",
    "lm_correctness": "LM-Correctness",
    "lm_ppl": "LM-PPL",
}
FOCUS = {"covered": "patches of things kept", "background": "background kept", "lift": "lift over chance"}


def measure(size: Size, checkpoints: dict[str, Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Measure checkpoints on held-out rows of each world.

    Args:
        size ([`Size`]): The size of the run.
        checkpoints (`dict[str, Path]`): Folders by name. One with the name "before" is not trained.

    Returns:
        `dict`: For each world, and for its clips of 60 s, the figures of each checkpoint by name. `routers` has the
        figures of [`figures`] if some layers are routed.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for world in size.worlds:
        # A long clip begins as the usual clip of the same index does, so it has an index of its own.
        for kind, first, count in (("test", 0, size.test_clips), ("test_long", size.test_clips, size.test_long)):
            if not count:
                continue
            options = WORLDS[world].options(kind, size.frame_size)
            source = find_source(options["dataset"])(**options)
            title = source.title("test")
            # Rows are made when they are read, and they are read several times.
            rows = list(load_split(source, "test", count, first, fps=FPS))
            # Untrained replies to a long clip take long, and tell nothing more.
            shown = {name: each for name, each in checkpoints.items() if kind == "test" or name != "before"}
            found[title] = {name: _measure(name, checkpoint, rows) for name, checkpoint in shown.items()}
    return found


def _measure(name: str, checkpoint: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from videollm_mod.train.focus import describe, figures, watch

    if name == "before":
        rows = rows[:CLIPS_BEFORE]
    cut = {"max_new_tokens": LONGEST_REPLY} if name == "before" else {}
    scores = measure_checkpoint(checkpoint, rows, fps=FPS, **cut) | {"clips": len(rows)}
    model, processor = load_checkpoint(checkpoint)
    if model.config.router_layers:
        clips = [describe(row, model.config, FPS) for row in rows]
        scores["routers"] = figures(watch(model, processor, rows, FPS), clips)
    return scores


def show(measures: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Yield the lines of the tables of [`measure`]."""
    for world, columns in measures.items():
        yield f"\nHeld-out clips of {world}"
        yield f"{'':<36}" + "".join(f"{name:>14}" for name in columns)
        for key, label in TABLE.items():
            # Without a question, there is no share of correct answers.
            yield f"{label:<36}" + "".join(_cell(scores.get(key, math.nan)) for scores in columns.values())
        routed = [scores.get("routers") for scores in columns.values()]
        for layer in next((found["layers"] for found in routed if found), {}):
            for share, label in FOCUS.items():
                cells = [found["layers"][layer][share] if found else math.nan for found in routed]
                yield f"{f'layer {layer}: {label}':<36}" + "".join(map(_cell, cells))
        if any(routed):
            cells = [found["together"]["covered"] if found else math.nan for found in routed]
            yield f"{'all layers: patches of things kept':<36}" + "".join(map(_cell, cells))


def _cell(value: float) -> str:
    return f"{'-':>14}" if math.isnan(value) else f"{value:14.4g}"


def write_measures(measures: dict[str, Any], path: Path) -> None:
    """Write the figures of [`measure`] with their labels, command, hardware and date, as JSON."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    about = {"command": published_command(["python", "train/recipe.py", *sys.argv[1:]]), "hardware": where}
    about |= {"date": f"{date.today():%d %B %Y}".lstrip("0"), "labels": TABLE}
    # JSON has no NaN.
    write_json(path, about | {"worlds": _without_nan(measures)})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
