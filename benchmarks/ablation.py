# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Does learned routing help? Train many variants of one model from the same initialisation, and compare them.

```bash
python benchmarks/ablation.py prepare --folder outputs/ablation_hard --world hard --minutes 60
python benchmarks/ablation.py run --folder outputs/ablation_hard --seeds 0 1 2 --processes 2   # the main comparison
python benchmarks/ablation.py run --folder outputs/ablation_hard --arms learned --insertion interleaved
python benchmarks/ablation.py run --folder outputs/ablation_hard --arms learned --set mod_router_loss=gradient
python benchmarks/ablation.py arms                                                           # all variants
python benchmarks/ablation.py table --folder outputs/ablation_hard
python benchmarks/ablation.py plot --folder outputs/ablation_hard --out docs/evidence.png
```

`prepare` trains a vision encoder, encodes clips, and trains a model at full compute: on single frames, then on slide
shows, then on narration. Every run continues from this model on the same rows for the same number of steps. The order
of the rows depends on the seed only. Each run is a process with one thread. A finished run appends one JSON line to
`results.jsonl` in the folder, and a second command skips it. A run that is interrupted, or that reaches `--minutes`
before its last step, leaves no line.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time as clock
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import torch
from ablation_arms import ARMS, MAIN
from ablation_measures import measure
from ablation_plots import draw_kept, draw_quality
from ablation_prepare import about_folder, add_options, prepare
from ablation_rows import read_rows
from ablation_table import tables, variants
from ablation_training import LEARNING_RATE, equal_grid, train_arm
from common import device_name
from filelock import FileLock, Timeout

from videollm_mod.configuration_videollm_mod import MOD_LAYER_SCHEMES, VideoLLMMoDConfig
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import append_line, complete_lines
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.checkpoint_files import new_checkpoint


RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Run:
    """
    What identifies a run. Two runs with the same fields give the same result.

    Args:
        arm (`str`): A name in [`ARMS`].
        seed (`int`): Seed of the order of rows and of new weights.
        insertion (`str`, *optional*): Routed layers. `None` for an arm that has its own.
        steps (`int`): Number of training steps.
        batch_size (`int`): Rows per step.
        learning_rate (`float`): Highest learning rate.
        test_clips (`int`): Number of held-out rows.
        settings (`str`): Further fields of the configuration, as JSON.
        initial (`str`): Digest of the weights of the common initialisation.
    """

    arm: str
    seed: int
    insertion: str | None
    steps: int
    batch_size: int
    learning_rate: float
    test_clips: int
    settings: str
    initial: str

    @property
    def name(self) -> str:
        """The arm with all that was changed by options."""
        changed = [f"{name}={value}" for name, value in json.loads(self.settings).items()]
        insertion = [] if self.insertion in (None, "all_deep") else [self.insertion]
        return " ".join([self.arm, *insertion, *changed])


def main() -> None:
    """Run a command."""
    quiet()
    parser = CommandLineParser(description="Compare variants of routing from the same initialisation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("arms", help="list the variants")
    add_options(commands.add_parser("prepare", help="make the encoded rows and the common initialisation"))
    add_run_options(commands.add_parser("run", help="train and measure variants"))
    add_result_options(commands.add_parser("table", help="print Markdown tables with intervals"))
    plot = commands.add_parser("plot", help="draw quality against operations, and what layers keep")
    add_result_options(plot)
    plot.add_argument("--out", type=Path, required=True, help="PNG to write; the second is beside it, NAME_kept.png")
    options = parser.parse_args()
    run = {"arms": list_arms, "prepare": prepare, "run": run_all, "table": print_tables, "plot": draw}
    with one_line_errors():
        run[options.command](options)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.add_argument("--folder", type=Path, required=True, help="folder that `prepare` made")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=MAIN, metavar="ARM", help="variants, see `arms`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the order of rows")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--batch-size", type=int, default=2, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="highest learning rate")
    parser.add_argument("--test-clips", type=int, default=96, help="held-out rows")
    parser.add_argument("--insertion", choices=MOD_LAYER_SCHEMES, default="all_deep", help="layers with routers")
    parser.add_argument(
        "--set", nargs="+", default=[], type=setting, metavar="FIELD=VALUE", help="further fields of the configuration"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, with one thread each")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="longest training on one core; a longer run does not count"
    )
    parser.add_argument("--save", action="store_true", help="keep the trained models, in FOLDER/models")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `table` and `plot`."""
    parser.add_argument("--folder", type=Path, nargs="+", required=True, help="folders with results, one a world")
    parser.add_argument("--steps", type=int, help="training steps of the results; default: those of the last result")
    parser.add_argument("--variants", nargs="+", help="names of variants as the table shows them; default: all")


def print_tables(options: argparse.Namespace) -> None:
    """Print the tables of each folder."""
    for folder in options.folder:
        print(tables(chosen_results(folder, options)), end="\n\n")


def draw(options: argparse.Namespace) -> None:
    """Draw both plots, with a column for each folder."""
    worlds = [variants(chosen_results(folder, options)) for folder in options.folder]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_name(f"{options.out.stem}_kept.png")
    draw_quality(worlds, options.out)
    draw_kept(worlds, kept)
    print(f"wrote {options.out} and {kept}")


def chosen_results(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """
    Return the results to show.

    Raises:
        `ValueError`: If there are none.
    """
    lines = read_results(folder)
    if options.steps is not None:
        lines = [line for line in lines if line["steps"] == options.steps]
    known = dict.fromkeys(line["name"] for line in lines)
    if missing := set(options.variants or ()) - set(known):
        names = ", ".join(known)
        raise ValueError(f"'{folder}' has no results of {', '.join(sorted(missing))}; it has {names or 'none'}.")
    lines = [line for line in lines if options.variants is None or line["name"] in options.variants]
    if not lines:
        raise ValueError(f"'{folder}' has no results: run `ablation.py run --folder {folder}` first.")
    return lines


def setting(text: str) -> tuple[str, Any]:
    """Read "field=value", where the value is JSON or a word."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def list_arms(_options: argparse.Namespace) -> None:
    """Print the variants."""
    for name, arm in ARMS.items():
        print(f"{name:18} {arm.about}")


def run_all(options: argparse.Namespace) -> None:
    """Train and measure the variants that have no result yet: all first seeds, then all second ones."""
    about_folder(options.folder)
    check_settings(options.arms, [name for name, _ in options.set])
    initial = hashlib.sha256((options.folder / "initial" / "model.safetensors").read_bytes()).hexdigest()[:12]
    shared = {name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate", "test_clips")}
    shared |= {"settings": json.dumps(dict(options.set), sort_keys=True), "initial": initial}
    runs = [
        Run(arm=arm, seed=seed, insertion=options.insertion if ARMS[arm].takes_insertion else None, **shared)
        for seed in options.seeds
        for arm in options.arms
    ]
    done = {run_of(line) for line in read_results(options.folder)}
    waiting = [run for run in runs if run not in done]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are in {options.folder / RESULTS}", flush=True)
    if options.processes == 1:
        failed = [run for run in waiting if not run_one(run, options)]
    else:
        with ThreadPoolExecutor(options.processes) as pool:
            ended = list(pool.map(lambda run: run_in_process(run, options), waiting))
        failed = [run for run, has_ended in zip(waiting, ended, strict=True) if not has_ended]
    if failed:
        names = ", ".join(f"{run.name} (seed {run.seed})" for run in failed)
        raise SystemExit(f"error: without a result: {names}")


def check_settings(arms: Sequence[str], names: Sequence[str]) -> None:
    """
    Check that arms remain what they are called.

    Raises:
        `ValueError`: If a field that makes an arm what it is would have another value.
    """
    for arm in arms:
        if changed := sorted(ARMS[arm].own_fields.intersection(names)):
            raise ValueError(f"--set cannot change {', '.join(changed)} of the arm {arm}: leave one of them out.")


def run_of(line: dict[str, Any]) -> Run:
    """Return what identifies a line of results."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of results in a folder, in order."""
    path = Path(folder) / RESULTS
    return list(complete_lines(path)) if path.exists() else []


def run_in_process(run: Run, options: argparse.Namespace) -> bool:
    """Run [`run_one`] in a new process with one thread. Return whether it has a result."""
    command = [sys.executable, __file__, "run", "--folder", str(options.folder), "--arms", run.arm]
    command += ["--seeds", str(run.seed), "--insertion", options.insertion, "--minutes", str(options.minutes)]
    for name in ("steps", "batch_size", "learning_rate", "test_clips"):
        command += [f"--{name.replace('_', '-')}", str(getattr(run, name))]
    command += ["--save"] if options.save else []
    if options.set:
        command += ["--set", *(f"{name}={json.dumps(value)}" for name, value in options.set)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0


def run_one(run: Run, options: argparse.Namespace) -> bool:
    """Train and measure one variant, and append its line. Return whether there is a result."""
    locks = options.folder / ".running"
    locks.mkdir(exist_ok=True)
    lock = locks / hashlib.sha256(repr(run).encode()).hexdigest()[:16]
    try:
        # The system releases the lock of a process that is killed.
        with FileLock(lock, timeout=0):
            if run in map(run_of, read_results(options.folder)):
                return True
            line = train_and_measure(run, options.folder, options.minutes, saves=options.save)
            if line is not None:
                append_line(options.folder / RESULTS, json.dumps(line))
        return line is not None
    except Timeout:
        print(f"{run.name}, seed {run.seed}: another process is at it", flush=True)
        return True


def train_and_measure(run: Run, folder: Path, minutes: float, *, saves: bool = False) -> dict[str, Any] | None:
    """Return the line of a run, or `None` if time ran out before the last step. With `saves`, keep the model."""
    torch.set_num_threads(1)
    arm, about = ARMS[run.arm], about_folder(folder)
    config = VideoLLMMoDConfig.from_pretrained(folder / "initial")
    rows, test = read_rows(folder, "clips"), read_rows(folder, "test")[: run.test_clips]
    layers = config.text_config.num_hidden_layers
    changes = arm.fields(layers, run.insertion) | json.loads(run.settings)
    if arm.tokens == "fewer":
        routed = ARMS["learned"].fields(layers, run.insertion)
        changes["frame_token_pooled"] = equal_grid(folder / "initial", routed, test, fps=about["fps"])
    training = {name: getattr(arm, name) for name in ("router_rate", "warm_up", "watching", "single_frames")}
    training |= {"takes_maximum": arm.tokens == "one", "fps": about["fps"]}
    training |= {"batch_size": run.batch_size, "learning_rate": run.learning_rate}
    trained = train_arm(folder / "initial", rows, changes, run.steps, run.seed, minutes=minutes, **training)
    steps, label = len(trained.losses), f"{run.name}, seed {run.seed}"
    if steps < run.steps:
        print(f"{label}: only {steps} of {run.steps} steps in {minutes:g} minutes, so it does not count", flush=True)
        return None
    if saves and arm.tokens != "one":  # its connector is the ablation's own, so a checkpoint of it could not be loaded
        with new_checkpoint(folder / "models" / f"{run.name.replace(' ', '_')}_{run.seed}") as place:
            for part in (trained.model, trained.processor):
                part.save_pretrained(place)
    started = clock.perf_counter()
    measured = measure(trained.model, trained.processor, test, single_frames=arm.single_frames, fps=about["fps"])
    line = asdict(run) | {
        "name": run.name,
        "world": about["world"],
        "changes": {name: value for name, value in changes.items() if getattr(config, name) != value},
        "training_seconds": trained.seconds,
        "measuring_seconds": clock.perf_counter() - started,
        "training_loss": sum(trained.losses[-20:]) / len(trained.losses[-20:]),
        "hardware": device_name("cpu"),
        "date": clock.strftime("%d %B %Y"),
    }
    shown = ("event_f1", "answer_accuracy", "silent_frames_right", "lm_correctness", "text_loss", "stream_loss")
    if "event_f1" not in measured:
        print(f"{label}: streaming took too long, so events and answers are not measured", flush=True)
    figures = " ".join(f"{name} {measured[name]:.3f}" for name in shown if name in measured)
    print(f"{label}: {trained.seconds:.0f} s, {figures}", flush=True)
    return line | measured


if __name__ == "__main__":
    main()
