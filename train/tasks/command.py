# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What `train/evaluation.py` does with `--task`."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download

from videollm_mod.space.loading import quantization
from videollm_mod.train.data.about import read_about
from videollm_mod.train.data.faults import FaultyRowError, RowRecord
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.judging import Judge
from videollm_mod.train.loading import load_checkpoint, patient_accelerator
from videollm_mod.train.tasks import choose_tasks
from videollm_mod.train.tasks.evaluating import evaluate_tasks
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.tasks.table import make_table


if TYPE_CHECKING:
    from videollm_mod.train.evaluation import EvaluationArguments

# Options of streams. Replies to questions do not depend on them.
_OF_STREAMS = ("interval_threshold", "max_new_tokens", "cache_dtype")


def run_tasks(
    source: DataSource, rows: Sequence[dict[str, Any]], arguments: "EvaluationArguments", left_out: RowRecord | None
) -> dict[str, float]:
    """
    Evaluate the tasks of `--task`, and print their table.

    Args:
        source ([`DataSource`]): The source of the rows.
        rows (sequence of `dict`): Rows of timed messages with `id`, `task` and `truth`.
        arguments ([`EvaluationArguments`]): What to evaluate, and how.
        left_out ([`RowRecord`], *optional*): Where to record rows that cannot be read, which are then left out.

    Returns:
        `dict[str, float]`: The scores by task and name, such as "coin_step accuracy". Empty in all processes but the
        first.

    Raises:
        `SystemExit`: With a message, if a task or the folder of results is wrong.
    """
    accelerator = patient_accelerator()
    device_map = "auto" if accelerator.num_processes == 1 else {"": accelerator.device}
    name = f"{Path(arguments.checkpoint).resolve().name}-{Path(source.dataset).name}-{arguments.split}"
    out = Path(arguments.out or Path("results") / name)

    def make_runner() -> Runner:
        options = arguments.options()
        loading = {"dtype": "auto", "device_map": device_map, **quantization(options["weights"])}
        model, processor = load_checkpoint(arguments.checkpoint, **loading)
        streams = {name: options[name] for name in ("max_new_tokens", "cache_dtype")}
        options = {name: options[name] for name in ("fps", "batch_size", "interval_threshold")}
        return Runner(model, processor, **options, stream_options=streams)

    try:
        about = {"fps": arguments.fps, **read_about(source.dataset)}
        if about["fps"] != arguments.fps:
            raise ValueError(
                f"the rows are prepared for {about['fps']:g} frames per second: give --fps {about['fps']:g}."
            )
        tasks = choose_tasks(arguments.task, about, arguments.split)
        if not any(task.streams for task in tasks) and (given := arguments.changed(*_OF_STREAMS)):
            raise ValueError(f"--{given[0]} is for tasks that stream, and none of these does.")
        for task in tasks:
            task.judge = _make_judge(arguments, out)
        results = evaluate_tasks(
            make_runner,
            rows,
            tasks,
            about,
            out=out,
            settings=_settings(source, arguments),
            official=arguments.official,
            accelerator=accelerator,
            left_out=left_out,
        )
    except FaultyRowError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: --task {arguments.task}: {error}") from None
    if accelerator.is_main_process:
        print("\n".join([make_table(results), *_gaps(about, arguments.split), f"wrote {out}"]))
    return {f"{task} {name}": value for task, result in results.items() for name, value in result["scores"].items()}


def _make_judge(arguments: "EvaluationArguments", out: Path) -> str | Judge:
    if arguments.judge != "endpoint":
        return arguments.judge
    # The client takes a second to import.
    from videollm_mod.train.endpoint import Endpoint
    from videollm_mod.train.endpoint_judge import EndpointJudge

    return EndpointJudge(Endpoint(arguments.judge_url, arguments.judge_model, cache=out / "judge"))


def _gaps(about: dict[str, Any], split: str) -> list[str]:
    """Return a line about what the preparation of the data left out, if it did: the scores do not cover it."""
    found = about.get("splits", {}).get(split, {}).get("left_out", {})
    reasons = "; ".join(f"{count}: {reason}" for reason, count in found.items())
    return [f"The scores do not cover what prepare.py left out of {split} ({reasons})."] if found else []


def _settings(source: DataSource, arguments: "EvaluationArguments") -> dict[str, Any]:
    """Return what predictions depend on."""
    names = ("fps", "interval_threshold", "max_new_tokens", "weights", "cache_dtype")
    folder = Path(arguments.checkpoint)
    return {
        "checkpoint": str(folder.resolve()) if folder.is_dir() else arguments.checkpoint,
        "checkpoint_version": _version(folder) if folder.is_dir() else _commit(arguments.checkpoint),
        **{name: getattr(arguments, name) for name in ("split", *names)},
        "data": {**asdict(source), "dataset": Path(source.dataset).name},
    }


def _version(folder: Path) -> str | None:
    """Return when the files of a checkpoint last changed."""
    changed = [path.stat().st_mtime for path in folder.glob("*") if path.suffix in (".safetensors", ".json")]
    return datetime.fromtimestamp(max(changed)).isoformat() if changed else None


def _commit(name: str) -> str:
    """Return the commit of a checkpoint of the Hub that a run loads now, or that the cache has."""
    return Path(hf_hub_download(name, "config.json")).parent.name
