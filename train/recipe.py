# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The complete recipe for StreamWorld: train a checkpoint from scratch, and evaluate it before and after.

```bash
python train/recipe.py                     # the embedded checkpoint
python train/recipe.py --size quick        # a short version of two minutes
python train/recipe.py --twin              # also train the same model at full compute on the same data
python train/recipe.py --size gpu --twin --minutes 30    # the full world and a larger model, for a GPU
```

The stages:

1. `pretrain_vision.py` trains a vision encoder to predict what covers each patch.
2. `encode.py` draws slide shows and clips, and encodes them once.
3. `sft.py` trains on slide shows, where every frame comes from a different clip, so the model cannot copy the previous
   description. It then trains on narration, questions and waiting, and last mostly on questions.

Finished stages are skipped. An interrupted stage of `sft.py` resumes from its last checkpoint.
"""

import argparse
import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import torch

from videollm_mod.train.data.sources import load_split
from videollm_mod.train.data.streamworld import StreamWorld
from videollm_mod.train.evaluation import measure_checkpoint


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "train" / "configs"
KINDS = "describe=1,narrate=5,ask=3,wait=1"
QUESTION_KINDS = "narrate=2,ask=5,wait=1"
TEST_KINDS = "narrate=2,ask=1,wait=1"
# First row of the narration stage. With more slide shows than this, it begins after them.
FIRST_CLIP = 10_000
# Each stage's share of the time limit. The rest is for loading, saving and evaluation.
SHARES = {"vision": 0.2, "slides": 0.06, "clips": 0.18, "questions": 0.06}
SHARES |= {"alignment": 0.05, "narration": 0.22, "trained": 0.07}
# The last file that a checkpoint gets: if it exists, the checkpoint is complete.
LAST_WRITTEN = "processor_config.json"
# An untrained model never ends its replies, so it is evaluated on few clips with short replies.
CLIPS_BEFORE, LONGEST_REPLY = 10, 32
# Each stage runs in its own process, forked from one that has already imported the libraries. Importing them would
# otherwise dominate a short run.
SCRIPTS = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
SCRIPTS.set_forkserver_preload([f"videollm_mod.train.{script}" for script in ("sft", "encode", "pretrain_vision")])


@dataclass(frozen=True)
class Size:
    """
    The size of a run.

    Args:
        model_config (`str`): The new model: a file in `train/configs`.
        things (`str`): World of the vision encoder's scenes and of the slide shows.
        world (`str`): World of the clips with events.
        vision_clips (`int`): Number of clips for the vision encoder.
        slides (`int`): Number of slide shows.
        clips (`int`): Number of rows with narration, questions and waiting.
        questions (`int`): Number of rows of the last stage, from other clips and mostly with questions.
        epochs (`int`): Number of epochs over `clips`.
        batch (`int`): Number of rows per step.
        test_clips (`int`): Number of held-out rows for evaluation.
    """

    model_config: str
    things: str
    world: str
    vision_clips: int
    slides: int
    clips: int
    questions: int
    epochs: int
    batch: int
    test_clips: int


SIZES = {
    "quick": Size("streamworld_model.json", "small", "tiny", 400, 160, 400, 40, 1, 8, 8),
    "cpu": Size("streamworld_model.json", "small", "tiny", 24_000, 4_000, 20_000, 10_000, 2, 8, 200),
    "gpu": Size("streamworld_gpu_model.json", "full", "full", 100_000, 20_000, 60_000, 20_000, 4, 32, 200),
}
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


def run_stage(done: Path, script: str, *options: Any, processes: int = 1, threads: int | None = None) -> None:
    """
    Run a script, unless its output exists.

    Args:
        done (`Path`): The file that the script writes last.
        script (`str`): Name of a file in `train/`.
        options: Its command line arguments.
        processes (`int`, *optional*, defaults to 1): Number of CPU processes, with one thread each.
        threads (`int`, *optional*): Threads of a single process. The default is all.

    Raises:
        `SystemExit`: With a message if it fails.
    """
    if done.exists():
        print(f"{done} is there", flush=True)
        return
    command = [f"train/{script}", *map(str, options)]
    print(f"python {' '.join(command)}", flush=True)
    if processes > 1:
        # accelerate starts several processes only with --multi_gpu; the environment makes them use the CPU.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", "0"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        failed = subprocess.run([*launch, *command], cwd=ROOT, env=environment).returncode
    else:
        stage = SCRIPTS.Process(target=_run_script, args=(command, threads))
        stage.start()
        stage.join()
        failed = stage.exitcode
    if failed:
        raise SystemExit(f"error: train/{script} failed; the finished stages are in '{done.parent.parent}'")


def _run_script(command: list[str], threads: int | None) -> None:
    os.chdir(ROOT)
    # The start method of this process must not apply to its data workers.
    multiprocessing.set_start_method(None, force=True)
    if threads is not None:
        torch.set_num_threads(threads)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def within(minutes: float | None, stage: str) -> list[Any]:
    """Return the option for a stage's share of the time limit, if there is one."""
    return [] if minutes is None else ["--max_minutes", f"{minutes * SHARES[stage]:.4g}"]


def seen_rows(size: Size) -> dict[str, range]:
    """
    Return the rows of StreamWorld's training split that each kind of data uses.

    No row is used twice. Every row has as many seeds as a slide show has frames, so no two rows share a clip.

    Args:
        size ([`Size`]): The size of the run.

    Returns:
        `dict[str, range]`: Rows of slide shows, of clips and of questions.
    """
    begin = max(FIRST_CLIP, size.slides)
    end = begin + size.clips
    return {"slides": range(size.slides), "clips": range(begin, end), "questions": range(end, end + size.questions)}


def see(size: Size, folder: Path, minutes: float | None = None) -> Path:
    """
    Make what models of all keep ratios share, unless it exists: the vision encoder and the encoded data.

    Args:
        size ([`Size`]): The size of the run.
        folder (`Path`): Folder to write to.
        minutes (`float`, *optional*): Time limit of the complete recipe.

    Returns:
        `Path`: The folder of a model with a trained encoder and untrained other parts.
    """
    vision = folder / "vision"
    config = ["--config", CONFIGS / "streamworld_vision.yaml", "--model_config", CONFIGS / size.model_config]
    run_stage(
        vision / LAST_WRITTEN,
        "pretrain_vision.py",
        *config,
        *("--world", size.things, "--num_clips", size.vision_clips, "--output_dir", vision),
        *within(minutes, "vision"),
    )
    data = {
        "slides": ["--world", size.things, "--kinds", "describe=1"],
        "clips": ["--world", size.world, "--kinds", KINDS],
        "questions": ["--world", size.world, "--kinds", QUESTION_KINDS],
    }
    rows = seen_rows(size)
    # Little data is encoded all at once, because starting takes most of the time. Much data gets all cores in turn.
    is_little = sum(map(len, rows.values())) < 2000

    def encode(name: str) -> None:
        options = [*data[name], "--dataset", "streamworld", "--checkpoint", vision, "--dtype", "bfloat16"]
        options += ["--first_clip", rows[name].start, "--num_clips", len(rows[name])]
        options += ["--output_dir", folder / name, *within(minutes, name)]
        how = {"threads": 1} if is_little else {"processes": os.cpu_count() or 1}
        run_stage(folder / name / "train.jsonl", "encode.py", *options, **how)

    with ThreadPoolExecutor(len(data) if is_little else 1) as pool:
        list(pool.map(encode, data))
    return vision


def learn(
    size: Size,
    folder: Path,
    *,
    keep_ratio: float | None = None,
    threads: int | None = None,
    minutes: float | None = None,
) -> Path:
    """
    Train a model on the data of [`see`], unless it exists.

    Args:
        size ([`Size`]): The size of the run.
        folder (`Path`): Folder to write to, the same as for [`see`].
        keep_ratio (`float`, *optional*): Keep ratio. The default is that of the model configuration.
        threads (`int`, *optional*): Number of CPU threads. The default is all.
        minutes (`float`, *optional*): Time limit of the complete recipe.

    Returns:
        `Path`: The folder of the trained model.
    """
    name, ratio = ("", []) if keep_ratio is None else (f"_{keep_ratio:g}", ["--mod_keep_ratio", keep_ratio])
    given = folder / "vision"
    for stage, data, config, options in (
        ("alignment", "slides", "streamworld_alignment.yaml", []),
        ("narration", "clips", "streamworld.yaml", ["--num_train_epochs", size.epochs]),
        ("trained", "questions", "streamworld_questions.yaml", []),
    ):
        made = folder / f"{stage}{name}"
        options = ["--config", CONFIGS / config, "--dataset", folder / data, "--checkpoint", given, *options]
        options += ["--output_dir", made, "--per_device_train_batch_size", size.batch, *ratio]
        options += within(minutes, stage)
        run_stage(made / LAST_WRITTEN, "sft.py", *options, "--resume_from_checkpoint", "true", threads=threads)
        given = made
    return given


def main() -> None:
    """Train the checkpoint and print the table."""
    parser = argparse.ArgumentParser(description="Train on StreamWorld from scratch, and evaluate before and after.")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="size of the model and the data")
    parser.add_argument("--folder", type=Path, help="folder to write to; default: outputs/streamworld_<size>")
    parser.add_argument("--twin", action="store_true", help="also train the same model at full compute")
    parser.add_argument("--minutes", type=float, help="time limit of the complete recipe; every stage gets a share")
    options = parser.parse_args()
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    size, folder = SIZES[options.size], options.folder or ROOT / "outputs" / f"streamworld_{options.size}"
    before = see(size, folder, options.minutes)
    ratios = {"after": None} | ({"full compute": 1.0} if options.twin else {})
    threads = max((os.cpu_count() or 1) // len(ratios), 1)
    with ThreadPoolExecutor(len(ratios)) as pool:
        after = pool.map(
            lambda ratio: learn(size, folder, keep_ratio=ratio, threads=threads, minutes=options.minutes),
            ratios.values(),
        )
        checkpoints = {"before": before} | dict(zip(ratios, after, strict=True))
    rows = load_split(StreamWorld("streamworld", world=size.world, kinds=TEST_KINDS), "test", size.test_clips)
    columns = {}
    for name, checkpoint in checkpoints.items():
        some = rows.select(range(min(CLIPS_BEFORE, len(rows)))) if name == "before" else rows
        cut = {"max_new_tokens": LONGEST_REPLY} if name == "before" else {}
        columns[name] = measure_checkpoint(checkpoint, some, **cut) | {"clips": len(some)}
    print(f"\nHeld-out clips of StreamWorld, {size.world}")
    print(f"{'':<36}" + "".join(f"{name:>14}" for name in columns))
    for key, label in TABLE.items():
        print(f"{label:<36}" + "".join(f"{scores[key]:14.4g}" for scores in columns.values()))


if __name__ == "__main__":
    quiet()
    main()
