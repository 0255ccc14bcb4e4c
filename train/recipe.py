# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The complete recipe for generated worlds: train a checkpoint from scratch, and evaluate it before and after.

```bash
python train/recipe.py                     # StreamWorld and DoomWorld together, as long as it takes
python train/recipe.py --minutes 360       # the same within six hours
python train/recipe.py --worlds tiny,hard  # without DoomWorld
python train/recipe.py --begin .           # the language model begins with the weights of another checkpoint
python train/recipe.py --vision ENCODER    # with an encoder that `pretrain_vision.py` has trained
python train/recipe.py --size quick        # a short version of two minutes
python train/recipe.py --twin              # also train the same model at full compute on the same data
python train/recipe.py --size gpu --twin --minutes 30    # the full world and a larger model, for a GPU
```

The stages:

1. `pretrain_vision.py` trains a vision encoder to predict what covers each patch, on all worlds.
2. `encode.py` draws slide shows, clips and long clips of each world, and encodes them once.
3. `sft.py` trains on slide shows, where every frame comes from a different clip, so the model cannot copy the previous
   description. The size "cpu" first sees their frames one by one, because words are learned faster when no other frame
   is there to look at. It then trains on narration, questions and waiting, and last mostly on questions. The last
   stage has long clips too, so that the model goes on narrating.

Finished stages are skipped, and an interrupted stage resumes where it stopped. With `--twin`, the model at full
compute trains last, for the same number of steps, and outside of `--minutes`. The table at the end is also written as
`measures.json`.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time as clock
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import connection
from pathlib import Path
from threading import Lock
from typing import Any

from videollm_mod.console import quiet

from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import write_json, write_text
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.checkpoint_files import LAST_WRITTEN, new_checkpoint
from videollm_mod.train.data.doom.game import find_vizdoom
from videollm_mod.train.loading import load_checkpoint
from videollm_mod.train.recipe_measures import measure, show, write_measures
from videollm_mod.train.recipe_sizes import CONFIGS, FPS, SIZES, WORLDS, Size


ROOT = Path(__file__).resolve().parents[1]
# First row of the narration stage. With more slide shows than this, it begins after them.
FIRST_CLIP = 10_000
# Each stage's share of the time limit. The rest is for loading, saving and evaluation.
SHARES = {"vision": 0.1, "slides": 0.03, "clips": 0.09, "long": 0.04, "questions": 0.05}
SHARES |= {"words": 0.05, "alignment": 0.06, "narration": 0.36, "trained": 0.12}
# Each stage runs in its own process, forked from one that has already imported the libraries. Importing them would
# otherwise dominate a short run.
SCRIPTS = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
# To start a process also polls all others. If two threads polled the same one, one of them would read no exit code.
POLLING = Lock()
SCRIPTS.set_forkserver_preload(
    [*(f"videollm_mod.train.{script}" for script in ("sft", "encoding", "pretrain_vision")), "matplotlib.figure"]
)


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
        with POLLING:
            stage.start()
        connection.wait([stage.sentinel])
        with POLLING:
            stage.join()
            failed = stage.exitcode
    if failed or not done.exists():
        raise SystemExit(f"error: train/{script} failed; the finished stages are in '{done.parent.parent}'")


def _run_script(command: list[str], threads: int | None) -> None:
    os.chdir(ROOT)
    # The start method of this process must not apply to its data workers.
    multiprocessing.set_start_method(None, force=True)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def within(minutes: float | None, stage: str) -> list[Any]:
    """Return the option for a stage's share of the time limit, if there is one."""
    return [] if minutes is None else ["--max_minutes", f"{minutes * SHARES[stage]:.4g}"]


def seen_rows(size: Size) -> dict[str, range]:
    """
    Return the rows of a world's training split that each kind of data uses.

    No row is used twice. Every row has as many seeds as a slide show has frames, so no two rows share a clip.

    Args:
        size ([`Size`]): The size of the run.

    Returns:
        `dict[str, range]`: Rows of slide shows, of clips, of questions and of long clips.
    """
    begin, found = max(FIRST_CLIP, size.slides), {"slides": range(size.slides)}
    for name, count in (("clips", size.clips), ("questions", size.questions), ("long", size.long_clips)):
        found[name] = range(begin, begin + count)
        begin += count
    return {name: rows for name, rows in found.items() if rows}


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
    config = ["--config", CONFIGS / size.vision_config, "--model_config", CONFIGS / size.model_config]
    scenes = ",".join(WORLDS[world].scenes for world in size.worlds)
    run_stage(
        vision / LAST_WRITTEN,
        "pretrain_vision.py",
        *config,
        *("--world", scenes, "--num_clips", size.vision_clips, "--output_dir", vision),
        *("--save_strategy", "steps", "--save_steps", 250, "--save_total_limit", 1),
        *("--resume_from_checkpoint", "true"),
        *within(minutes, "vision"),
    )
    rows = seen_rows(size)
    # Little data is encoded all at once, because starting takes most of the time. Much data gets all cores in turn.
    is_little = len(size.worlds) * sum(map(len, rows.values())) < 2000
    with ThreadPoolExecutor(len(rows) if is_little else 1) as pool:
        list(pool.map(lambda name: encode(name, rows[name], size, folder, minutes, is_little=is_little), rows))
    join_rows(folder, "slides", size.worlds)
    join_rows(folder, "clips", size.worlds)
    # Events are learned faster from short rows. The last stage teaches to go on.
    join_rows(folder, "questions", size.worlds, has_long=True)
    return vision


def encode(name: str, rows: range, size: Size, folder: Path, minutes: float | None, *, is_little: bool) -> None:
    """Encode one kind of rows of all worlds. A world leaves the time that it does not need to those after it."""
    end = None if minutes is None else clock.monotonic() + 60 * minutes * SHARES[name]
    for place, world in enumerate(size.worlds):
        done = folder / "encoded" / f"{name}_{world}" / "train.jsonl"
        source = WORLDS[world].options(name, size.frame_size)
        options = [part for option, value in source.items() for part in (f"--{option}", value)]
        options += ["--checkpoint", folder / "vision", "--dtype", "bfloat16", "--fps", FPS]
        options += ["--first_clip", rows.start, "--num_clips", len(rows), "--output_dir", done.parent]
        if end is not None:
            left = (end - clock.monotonic()) / 60 / (len(size.worlds) - place)
            options += ["--max_minutes", f"{max(left, 0.01):.4g}"]
        how = {"threads": 1} if is_little else {"processes": os.cpu_count() or 1}
        run_stage(done, "encode.py", *options, **how)


def join_rows(folder: Path, name: str, worlds: Sequence[str], *, has_long: bool = False) -> None:
    """
    Write `train.jsonl` with the encoded rows of all worlds.

    Args:
        folder (`Path`): Folder of the recipe. The encoded rows are in `encoded`.
        name (`str`): Kind of the rows, and folder of the file.
        worlds (`Sequence[str]`): Names of the worlds.
        has_long (`bool`, *optional*, defaults to `False`): Whether to add the long rows, if there are any.
    """

    def joined() -> Iterator[str]:
        for world in worlds:
            for kind in (name, "long") if has_long else (name,):
                source = folder / "encoded" / f"{kind}_{world}"
                written = source / "train.jsonl"
                lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
                for row in map(json.loads, lines):
                    row["frame_features"] = f"../encoded/{source.name}/{row['frame_features']}"
                    yield json.dumps(row, ensure_ascii=False) + "\n"

    (folder / name).mkdir(exist_ok=True)
    write_text(folder / name / "train.jsonl", "".join(joined()))


def begin_with(checkpoint: str, folder: Path) -> Path:
    """
    Write a checkpoint with the recipe's vision encoder and the language model of another checkpoint.

    Args:
        checkpoint (`str`): A checkpoint whose language model has layers of the same sizes. Its words are taken over,
            and how many frames streams remember.
        folder (`Path`): Folder of the recipe, with a trained encoder in `vision`.

    Returns:
        `Path`: The folder of the new checkpoint.

    Raises:
        `SystemExit`: If the language models have other sizes.
    """
    begun = folder / "begun"
    if not (begun / LAST_WRITTEN).exists():
        from videollm_mod.train.new_model import take_language_model

        model, processor = load_checkpoint(str(folder / "vision"))
        try:
            trained, words = load_checkpoint(checkpoint)
            taken = take_language_model(model, processor, trained, words)
        except ValueError as error:
            raise SystemExit(f"error: --begin {checkpoint}: {error}") from None
        from videollm_mod.remembering_videollm_mod import checkpoint_limits

        for name, limit in checkpoint_limits(trained.generation_config).items():
            setattr(model.generation_config, name, limit)
        print(f"the language model of {checkpoint}, with {taken} words")
        with new_checkpoint(begun) as place:
            model.save_pretrained(place)
            processor.save_pretrained(place)
    return begun


def take_vision(checkpoint: str, folder: Path) -> None:
    """
    Copy a trained vision encoder to where [`see`] expects it, unless there is one.

    Args:
        checkpoint (`str`): Output folder of `pretrain_vision.py`.
        folder (`Path`): Folder of the recipe.

    Raises:
        `SystemExit`: If the checkpoint is not complete.
    """
    vision, parts = folder / "vision", Path(checkpoint)
    if not (parts / LAST_WRITTEN).is_file():
        raise SystemExit(f"error: --vision {checkpoint}: it is no finished folder of train/pretrain_vision.py.")
    if not (vision / LAST_WRITTEN).exists():
        with new_checkpoint(vision) as place:
            for path in parts.iterdir():
                if path.is_file():
                    shutil.copyfile(path, place / path.name)


def learn(
    size: Size,
    folder: Path,
    *,
    given: Path | None = None,
    keep_ratio: float | None = None,
    minutes: float | None = None,
) -> Path:
    """
    Train a model on the data of [`see`], unless it exists.

    A model with another keep ratio trains for as many steps as the one before it, however long they take.

    Args:
        size ([`Size`]): The size of the run.
        folder (`Path`): Folder to write to, the same as for [`see`].
        given (`Path`, *optional*): The model to begin with. The default is that of [`see`].
        keep_ratio (`float`, *optional*): Keep ratio. The default is that of the model configuration, with the routers'
            own loss.
        minutes (`float`, *optional*): Time limit of the complete recipe, for the model with the default keep ratio.

    Returns:
        `Path`: The folder of the trained model.
    """
    name, ratio = ("", []) if keep_ratio is None else (f"_{keep_ratio:g}", ["--mod_keep_ratio", keep_ratio])
    if keep_ratio is None and size.router_loss is not None:
        ratio = ["--mod_router_loss", size.router_loss]
    # Without a GPU, processes of one thread each share a step. For a model as small as this, more threads would wait
    # for each other, and float32 is faster than bfloat16.
    processes = share_step(size.batch) if size.long_clips else 1
    rows = size.batch // processes
    frames = ["--max_frames", 1, "--per_device_train_batch_size", 6 * rows, "--max_steps", size.word_steps]
    # Beside a long row, a short one would be padding for the most part: they go one by one.
    single = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", rows] if size.long_clips else []
    given = given or folder / "vision"
    for stage, data, config, options in (
        *([("words", "slides", "streamworld_alignment.yaml", frames)] if size.word_steps else []),
        ("alignment", "slides", "streamworld_alignment.yaml", []),
        ("narration", "clips", "streamworld.yaml", ["--num_train_epochs", size.epochs]),
        ("trained", "questions", "streamworld_questions.yaml", single),
    ):
        made = folder / f"{stage}{name}"
        begin = ["--config", CONFIGS / config, "--dataset", folder / data, "--checkpoint", given]
        begin += ["--video_root", folder / "encoded"]
        begin += ["--per_device_train_batch_size", rows]
        begin += [] if has_gpu() else ["--bf16", "false"]
        options = [*begin, *options, "--output_dir", made, *ratio, "--fps", FPS]
        options += ["--save_strategy", "steps", "--save_steps", 250]
        options += within(minutes, stage) if keep_ratio is None else ["--max_steps", last_step(folder / stage)]
        run_stage(made / LAST_WRITTEN, "sft.py", *options, "--resume_from_checkpoint", "true", processes=processes)
        given = made
    return given


def has_gpu() -> bool:
    """Return whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def share_step(rows: int) -> int:
    """Return how many CPU processes can share a step of so many rows evenly; 1 if there is a GPU."""
    if has_gpu():
        return 1
    return max(count for count in range(1, rows + 1) if rows % count == 0 and count <= (os.cpu_count() or 1))


def last_step(trained: Path) -> int:
    """Return the number of steps of a finished stage. Training ends with a checkpoint."""
    return max(int(path.name.split("-")[1]) for path in trained.glob("checkpoint-*"))


def begin_folder(folder: Path, size: Size, begin: str | None = None, vision: str | None = None) -> None:
    """
    Note in a folder what it is for, so that stages of a run with other options are not used.

    Raises:
        `SystemExit`: If it has stages of another run.
    """
    path, about = folder / "size.json", json.loads(json.dumps(asdict(size)))
    about |= {name: given for name, given in (("begin", begin), ("vision", vision)) if given is not None}
    known = json.loads(path.read_text()) if path.exists() else None
    if known != about and (known is not None or (folder / "vision").exists()):
        raise SystemExit(f"error: '{folder}' has stages of a run with other options: give another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, about)


def choose_worlds(names: str | None, size: Size) -> tuple[str, ...]:
    """
    Return the worlds to train on. Without a choice, they are the size's, and without ViZDoom not DoomWorld.

    Raises:
        `SystemExit`: If a world is unknown, or chosen and not installed.
    """
    chosen = size.worlds if names is None else tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    if unknown := [name for name in chosen if name not in WORLDS]:
        raise SystemExit(f"error: --worlds has no {', '.join(unknown)}; it has {', '.join(WORLDS)}.")
    try:
        if "doom" in chosen:
            find_vizdoom()
    except ImportError as error:
        if names is not None:
            raise SystemExit(f"error: --worlds doom: {error}") from None
        print(f"without DoomWorld: {error}")
        chosen = tuple(name for name in chosen if name != "doom")
    return tuple(name for name in WORLDS if name in chosen)


@one_line_errors()
def main() -> None:
    """Train the checkpoint, print the table, and write it as JSON."""
    parser = CommandLineParser(description="Train on generated worlds from scratch, and evaluate the result.")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="size of the model and the data")
    parser.add_argument("--worlds", help=f"worlds to train on, separated by commas: {', '.join(WORLDS)}")
    parser.add_argument("--clips", type=int, help="number of rows of narration of each world; default: the size's")
    parser.add_argument("--begin", metavar="CHECKPOINT", help="begin with the language model of this checkpoint")
    parser.add_argument("--vision", metavar="FOLDER", help="take this encoder of pretrain_vision.py and train none")
    parser.add_argument("--folder", type=Path, help="folder to write to; default: outputs/streamworld_<size>")
    parser.add_argument("--twin", action="store_true", help="also train the same model at full compute")
    parser.add_argument("--minutes", type=float, help="time limit of the complete recipe; every stage gets a share")
    options = parser.parse_args()
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    size, folder = SIZES[options.size], options.folder or ROOT / "outputs" / f"streamworld_{options.size}"
    folder = folder.resolve()  # the stages run in another folder
    if options.clips is not None and options.clips < 1:
        parser.error(f"--clips must be positive, got {options.clips}")
    size = replace(size, worlds=choose_worlds(options.worlds, size), clips=options.clips or size.clips)
    begin_folder(folder, size, options.begin, options.vision)
    if options.vision is not None:
        take_vision(options.vision, folder)
    before = see(size, folder, options.minutes)
    given = None if options.begin is None else begin_with(options.begin, folder)
    checkpoints = {"before": before, "after": learn(size, folder, given=given, minutes=options.minutes)}
    if options.twin:
        checkpoints["full compute"] = learn(size, folder, given=given, keep_ratio=1.0)
    measures = measure(size, checkpoints)
    write_measures(measures, folder / "measures.json")
    print("\n".join(show(measures)))


if __name__ == "__main__":
    quiet()
    main()
