# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The common initialisation of the ablation and its encoded rows."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from videollm_mod.outputs import write_json
from videollm_mod.train.checkpoint_files import LAST_WRITTEN
from videollm_mod.train.recipe import run_stage, share_step
from videollm_mod.train.recipe_sizes import CONFIGS, KINDS, TEST_KINDS


# Options of each world in the scripts of `train/`, and its frame rate.
SOURCES: dict[str, tuple[list[str], float]] = {
    "hard": (["--dataset", "streamworld", "--world", "hard"], 2.0),
    "tiny": (["--dataset", "streamworld", "--world", "tiny"], 2.0),
    "doom": (["--dataset", "doomworld", "--seconds", "4,6"], 4.0),
}
# Each stage's share of the time limit.
SHARES = {"vision": 0.3, "slides": 0.05, "first_clips": 0.1, "clips": 0.1, "test": 0.05}
SHARES |= {"words": 0.1, "aligned": 0.1, "initial": 0.2}
# Single frames per step of the first stage, its steps, and rows per step of the others.
FRAMES_PER_STEP, WORD_STEPS, ROWS_PER_STEP = 24, 600, 4
# First rows of the clips in the training split: slide shows come before. The variants train on other clips than what
# they begin with.
FIRST_CLIP, FIRST_CLIP_OF_INITIAL = 10_000, 30_000
# First row of the test split. Variants were chosen on earlier rows.
FIRST_TEST_CLIP = 1_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prepare`."""
    parser.add_argument("--folder", type=Path, required=True, help="folder to write to")
    parser.add_argument("--world", choices=SOURCES, default="hard", help="world of the clips")
    parser.add_argument("--model-config", type=Path, default=CONFIGS / "local_model.json", help="the new model")
    parser.add_argument("--vision", type=Path, help="checkpoint with a trained encoder; default: train one")
    parser.add_argument("--minutes", type=float, help="time limit; every stage gets a share")
    for name, count in (
        ("vision-clips", 6000),
        ("slides", 3000),
        ("first-clips", 5000),
        ("clips", 4000),
        ("test-clips", 96),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"number of {name.replace('-', ' ')}")


def about_folder(folder: Path) -> dict[str, Any]:
    """
    Return what `prepare` noted: `world` and `fps`.

    Raises:
        `FileNotFoundError`: If it has not made the folder.
    """
    about = Path(folder) / "about.json"
    if not about.exists():
        raise FileNotFoundError(f"'{folder}' has no common initialisation: run `ablation.py prepare` first.")
    return json.loads(about.read_text())


def begin_folder(options: argparse.Namespace) -> None:
    """
    Note in a folder with which options `prepare` makes it, so that stages of other options are not used.

    Raises:
        `ValueError`: If it has stages of other options, or of unknown ones.
    """
    folder, path = options.folder, options.folder / "options.json"
    given = {name: value for name, value in vars(options).items() if name not in ("command", "folder", "minutes")}
    given = json.loads(json.dumps(given, default=str))
    known = json.loads(path.read_text()) if path.exists() else None
    if known != given and (known is not None or any((folder / stage).exists() for stage in SHARES)):
        raise ValueError(f"'{folder}' has stages of a run with other options: give another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, given)


def prepare(options: argparse.Namespace) -> None:
    """
    Train the encoder, encode rows, and train the model at full compute. Finished stages are skipped.

    Raises:
        `ValueError`: If an earlier run made the folder with other options.
    """
    folder, (source, fps) = options.folder, SOURCES[options.world]
    begin_folder(options)

    def run(stage: str, done: str, script: str, *given: Any, **how: Any) -> None:
        limit = [] if options.minutes is None else ["--max_minutes", f"{options.minutes * SHARES[stage]:.4g}"]
        run_stage(folder / stage / done, script, *given, "--output_dir", folder / stage, *limit, **how)

    size = json.loads(options.model_config.read_text())["model"]["vision_config"]["image_size"]
    checkpoint = options.vision or folder / "vision"
    if options.vision is None:
        vision = ["--config", CONFIGS / "local_vision.yaml", "--model_config", options.model_config]
        vision += ["--world", options.world, "--num_clips", options.vision_clips]
        run("vision", LAST_WRITTEN, "pretrain_vision.py", *vision)
    rows = {
        "slides": (options.slides, 0, "train", "describe=1"),
        "first_clips": (options.first_clips, FIRST_CLIP_OF_INITIAL, "train", KINDS),
        "clips": (options.clips, FIRST_CLIP, "train", KINDS),
        "test": (options.test_clips, FIRST_TEST_CLIP, "test", TEST_KINDS),
    }
    for name, (count, first, split, kinds) in rows.items():
        given = [*source, "--kinds", kinds, "--frame_size", size, "--fps", fps, "--train_split", split]
        given += ["--num_clips", count, "--first_clip", first, "--checkpoint", checkpoint]
        how = {"processes": os.cpu_count() or 1}
        run(name, f"{split}.jsonl", "encode.py", *given, "--dtype", "bfloat16", **how)
    # Frames one by one first: words are learned faster when no other frame is there to look at.
    alignment, narration = "streamworld_alignment.yaml", "streamworld.yaml"
    for stage, data, batch, config, more in (
        ("words", "slides", FRAMES_PER_STEP, alignment, ["--max_frames", 1, "--max_steps", WORD_STEPS]),
        ("aligned", "slides", ROWS_PER_STEP, alignment, []),
        ("initial", "first_clips", ROWS_PER_STEP, narration, []),
    ):
        processes = share_step(batch)
        given = ["--config", CONFIGS / config, "--dataset", folder / data, "--fps", fps, "--num_train_epochs", 1]
        given += ["--checkpoint", checkpoint, "--mod_keep_ratio", 1.0, "--save_strategy", "no", *more]
        given += ["--per_device_train_batch_size", batch // processes]
        run(stage, LAST_WRITTEN, "sft.py", *given, processes=processes)
        checkpoint = folder / stage
    write_json(folder / "about.json", {"world": options.world, "fps": fps})
