# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
StreamWorld's whole recipe: from nothing to a checkpoint, measured before and after.

```bash
python train/recipe.py                     # the embedded checkpoint
python train/recipe.py --size quick        # two minutes of it, for a look
python train/recipe.py --twin              # also the same model at full compute, beside it and from the same data
python train/recipe.py --size gpu --twin --minutes 30    # the whole world and a larger model, what a GPU makes of it
```

Stages: a vision encoder that knows what covers each patch (`pretrain_vision.py`); features of slides and of clips,
drawn and encoded once (`encode.py`); words for what is seen in slides, then narration, questions and waiting, then
more questions (`sft.py`). A stage that is there is not made again, and the last go on from where they were stopped.
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

import torch

from videollm_mod.train.data.sources import load_split
from videollm_mod.train.data.streamworld import StreamWorld
from videollm_mod.train.evaluation import measure_checkpoint


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "train" / "configs"
KINDS = "describe=1,narrate=5,ask=3,wait=1"
QUESTION_KINDS = "narrate=2,ask=5,wait=1"
TEST_KINDS = "narrate=2,ask=1,wait=1"
# First row of the narration stage, or later where there are more slides: rows before are for those.
FIRST_CLIP = 10_000
# Of the time given, which share is for what; the rest is for loading, saving and measuring.
SHARES = {"vision": 0.2, "slides": 0.06, "clips": 0.18, "questions": 0.06}
SHARES |= {"alignment": 0.05, "narration": 0.22, "trained": 0.07}
# Of a checkpoint: where it is, the rest is.
LAST_WRITTEN = "processor_config.json"
# A model that has learned no words would babble to the end of every reply: it is measured on few clips, and cut short.
CLIPS_BEFORE, LONGEST_REPLY = 10, 32
# A stage is a process of its own, forked from one in which the libraries are loaded already: most of a short training
# would be for that.
SCRIPTS = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
SCRIPTS.set_forkserver_preload([f"videollm_mod.train.{script}" for script in ("sft", "encode", "pretrain_vision")])


@dataclass(frozen=True)
class Size:
    """
    How much of everything.

    Args:
        model_config (`str`): The new model, a file of `train/configs`.
        things (`str`): The StreamWorld whose things are looked at.
        world (`str`): The one in which things happen.
        vision_clips (`int`): Clips for the vision encoder.
        slides (`int`): Rows of slides.
        clips (`int`): Rows of narration, questions and waiting.
        questions (`int`): Rows, of other clips, of which most are questions: what happened before is learned last.
        epochs (`int`): How often each row of `clips` is seen.
        batch (`int`): Rows a step.
        test_clips (`int`): Held-out rows to measure on.
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
    "event_f1": "events told right within 0.5 s, F1",
    "event_precision": "precision",
    "event_recall": "recall",
    "answer_accuracy": "answers right",
    "silent_frames_right": "silent frames right",
    "time_diff": "TimeDiff, s",
    "fluency": "Fluency",
    "lm_correctness": "LM-Correctness",
    "lm_ppl": "LM-PPL",
}


def run_stage(done: Path, script: str, *options: Any, processes: int = 1, threads: int | None = None) -> None:
    """
    Runs a script, unless what it makes is there.

    Args:
        done (`Path`): A file that it writes last.
        script (`str`): A file of `train/`.
        options: Its command line.
        processes (`int`, *optional*, defaults to 1): On how many CPU processes, of one thread each.
        threads (`int`, *optional*): Threads of a single process, all by default.

    Raises:
        `SystemExit`: With a message if it fails.
    """
    if done.exists():
        print(f"{done} is there", flush=True)
        return
    command = [f"train/{script}", *map(str, options)]
    print(f"python {' '.join(command)}", flush=True)
    if processes > 1:
        # "Multi-GPU" is how accelerate starts several processes; of what, the environment says.
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
        raise SystemExit(f"error: train/{script} failed; what was made before is in '{done.parent.parent}'")


def _run_script(command: list[str], threads: int | None) -> None:
    os.chdir(ROOT)
    # How this process was started is not how it starts its own, which read data.
    multiprocessing.set_start_method(None, force=True)
    if threads is not None:
        torch.set_num_threads(threads)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def within(minutes: float | None, stage: str) -> list[Any]:
    """A stage's option for its share of the minutes, if they are limited."""
    return [] if minutes is None else ["--max_minutes", f"{minutes * SHARES[stage]:.4g}"]


def seen_rows(size: Size) -> dict[str, range]:
    """
    Which rows of StreamWorld's training split each kind of data has. None is in two, and since a row takes as many
    seeds as a row of slides has frames, whatever it shows, none has a clip of another.

    Args:
        size ([`Size`]): How much of everything.

    Returns:
        `dict[str, range]`: Rows of slides, of clips and of questions.
    """
    begin = max(FIRST_CLIP, size.slides)
    end = begin + size.clips
    return {"slides": range(size.slides), "clips": range(begin, end), "questions": range(end, end + size.questions)}


def see(size: Size, folder: Path, minutes: float | None = None) -> Path:
    """
    Makes, where it is not there yet, what models of all keep ratios share: the vision encoder and data seen by it.

    Args:
        size ([`Size`]): How much of everything.
        folder (`Path`): Where to write.
        minutes (`float`, *optional*): Time for the whole recipe.

    Returns:
        The folder of a model whose encoder alone is trained.
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
    # Of little data most of the time is for beginning: then all at once, and else each on all cores.
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
    Makes, where it is not there yet, a model of what [`see`] has made.

    Args:
        size ([`Size`]): How much of everything.
        folder (`Path`): The same.
        keep_ratio (`float`, *optional*): In place of the model configuration's.
        threads (`int`, *optional*): CPU threads to use, all by default.
        minutes (`float`, *optional*): Time for the whole recipe.

    Returns:
        The folder of the trained model.
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
    """Makes the checkpoint and prints the table."""
    parser = argparse.ArgumentParser(description="Trains on StreamWorld from nothing, and measures before and after.")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="how much of everything")
    parser.add_argument("--folder", type=Path, help="where to write; default: outputs/streamworld_<size>")
    parser.add_argument("--twin", action="store_true", help="also train the same model at full compute, beside it")
    parser.add_argument("--minutes", type=float, help="time for all of it: of each stage as much as there is time for")
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
    main()
