# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluate tasks: predict the rows that no earlier run predicted, and score all."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from videollm_mod.train.data.faults import WHERE, FaultyRowError, RowRecord, name_row
from videollm_mod.train.loading import patient_accelerator
from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.tasks.saving import Key, Predictions, fingerprint, limit_truth, save_results


# Frames and frame features within a row.
_FRAMES = (np.ndarray, torch.Tensor, bytes)


@dataclass
class TaskRows:
    """
    The rows of one task.

    Args:
        task ([`Task`]): The task.
        rows (`list[dict]`): The rows, without frames and frame features.
        places (`list[int]`): Their indices in the data.
        keys (`list[tuple]`): Task, id and fingerprint of each.
    """

    task: Task
    rows: list[dict[str, Any]]
    places: list[int]
    keys: list[Key]


def choose_rows(rows: Sequence[dict[str, Any]], tasks: Sequence[Task], *, fps: float = 2.0) -> list[TaskRows]:
    """
    Return the rows of each task.

    Args:
        rows (sequence of `dict`): Rows of timed messages.
        tasks (sequence of [`Task`]): The tasks.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.

    Raises:
        `ValueError`: If a task has no rows, or if two rows of a task have the same id.
    """
    chosen = [TaskRows(task, [], [], []) for task in tasks]
    found: set[str] = set()
    for place in range(len(rows)):
        row = {name: value for name, value in rows[place].items() if not isinstance(value, _FRAMES)}
        found |= {row["task"]} if row.get("task") else set()
        for each in chosen:
            if each.task.wants(row):
                each.rows.append(row)
                each.places.append(place)
                is_apart = each.task.official and each.task.depends_on_official(row, fps)
                each.keys.append((each.task.name, _id(row, place), fingerprint(row, each.task.truth_keys, is_apart)))
    for each in chosen:
        ids = [key[1] for key in each.keys]
        if not ids:
            there = f"It has {', '.join(sorted(found))}" if found else "Its rows have no `task`"
            raise ValueError(f"there is no row of the task {each.task.name}. {there}.")
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"{ids.count(twice)} rows of the task {each.task.name} have the id {twice!r}.")
    return chosen


def _id(row: dict[str, Any], place: int) -> str:
    return str(row.get("id") or row.get(WHERE) or place)


def evaluate_tasks(
    make_runner: Callable[[], Runner],
    rows: Sequence[dict[str, Any]],
    tasks: Sequence[Task],
    about: dict[str, Any],
    *,
    out: Path,
    settings: dict[str, Any],
    official: bool = False,
    accelerator: Accelerator | None = None,
    left_out: RowRecord | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Predict and score tasks. The processes of an accelerator share the rows, and the folder `out`.

    Predictions are saved a line a row. A run that was interrupted goes on where it stopped, and a run over complete
    predictions only scores them, without loading the model.

    Args:
        make_runner (`Callable`): Loads the model. It is called if a row has no prediction.
        rows (sequence of `dict`): Rows of timed messages.
        tasks (sequence of [`Task`]): The tasks.
        about (`dict`): The folder's `about.json`.
        out (`Path`): Folder for predictions and results.
        settings (`dict`): What predictions depend on. A folder with predictions of other settings is refused.
        official (`bool`, *optional*, defaults to `False`): Whether to score as the published scorers do.
        accelerator (`Accelerator`, *optional*): Distributes rows over processes.
        left_out ([`RowRecord`], *optional*): Where to record rows that cannot be read, which are then left out.

    Returns:
        `dict`: For each task its `scores`, `rows` that were predicted, `unread` ones, whether these `count` as rows
        without a reply, `official`, `papers` and `files`. Empty in all processes but the first, which scores.

    Raises:
        `ValueError`: If a task has no rows, if its score lacks something, or if the folder has predictions of other
            settings.
        [`FaultyRowError`]: If a row cannot be read and `left_out` is not given.
    """
    accelerator = patient_accelerator() if accelerator is None else accelerator
    for task in tasks:
        task.official = official and task.predicts_officially
    chosen = choose_rows(rows, tasks, fps=about.get("fps", 2.0))
    saved = Predictions(out, accelerator.process_index)
    saved.check_settings(settings)
    done = saved.keys()
    if accelerator.is_main_process:
        for each in chosen:
            each.task.check(about)
            each.task.check_rows(each.rows)
    # All processes have read before one writes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        saved.write_settings(settings)
    if todo := _arrange(chosen, done, accelerator.num_processes):
        with accelerator.split_between_processes(todo) as mine:
            _predict(make_runner(), rows, mine, saved, accelerator.is_main_process, left_out)
        accelerator.wait_for_everyone()
    results: dict[str, dict[str, Any]] = {}
    for each in chosen if accelerator.is_main_process else ():
        # Predictions of one task are in memory at a time.
        results[each.task.name] = _score(each, saved.read(each.task.name), about, official, out)
        save_results(out, settings, results)
    return results


def _arrange(chosen: Sequence[TaskRows], done: Container[Key], num_processes: int) -> list[tuple[Task, int, Key]]:
    """
    Return task, place and key of the rows without a prediction, in an order that splits well between processes.

    The longest rows of a task come first. So rows of a batch are about as long, and memory runs out at once or never.
    """
    todo = []
    for each in chosen:
        entries = zip(each.rows, each.places, each.keys, strict=True)
        left = [(_seconds(row), place, key) for row, place, key in entries if key not in done]
        todo += [(each.task, place, key) for _, place, key in sorted(left, key=lambda entry: -entry[0])]
    # A process gets a run of rows next to each other.
    return [entry for process in range(num_processes) for entry in todo[process::num_processes]]


def _seconds(row: dict[str, Any]) -> float:
    return 0.0 if row.get("end") is None else row["end"] - (row.get("start") or 0.0)


def _predict(
    runner: Runner,
    rows: Sequence[dict[str, Any]],
    todo: Sequence[tuple[Task, int, Key]],
    saved: Predictions,
    shows_bar: bool,
    left_out: RowRecord | None,
) -> None:
    """Predict rows in batches of one task, and save each batch when it is done."""
    with tqdm(total=len(todo), desc="rows", disable=not shows_bar) as bar:
        for batch in _batches(todo, runner.batch_size):
            for key, prediction in _predict_batch(runner, rows, batch, left_out):
                saved.add(key, prediction)
            bar.update(len(batch))


def _batches(todo: Sequence[tuple[Task, int, Key]], size: int) -> Iterator[Sequence[tuple[Task, int, Key]]]:
    """Yield runs of at most `size` entries of one task."""
    begin = 0
    for k in range(1, len(todo) + 1):
        if k == len(todo) or k - begin == size or todo[k][0] is not todo[begin][0]:
            yield todo[begin:k]
            begin = k


def _predict_batch(
    runner: Runner,
    rows: Sequence[dict[str, Any]],
    batch: Sequence[tuple[Task, int, Key]],
    left_out: RowRecord | None,
) -> list[tuple[Key, dict[str, Any]]]:
    """
    Predict a batch. If memory runs out, or if a row cannot be read and may be left out, predict it in two parts.

    Raises:
        [`FaultyRowError`]: If a row cannot be read and `left_out` is not given.
        `ValueError`: If memory runs out with one row.
    """
    (task, place, _), *others = batch
    try:
        shown = [{**rows[place], "truth": limit_truth(rows[place], task.truth_keys)} for _, place, _ in batch]
        predictions = task.predict_all(runner, shown)
        return [(key, prediction) for (_, _, key), prediction in zip(batch, predictions, strict=True)]
    except FaultyRowError as error:
        if left_out is None:
            raise
        if not others:
            left_out.leave_out(str(error))
            return []
    except torch.OutOfMemoryError:
        if not others:
            message = "with one row at a time. A larger GPU or --weights int8 may help."
            raise ValueError(f"memory ran out at {name_row(rows[place])}, {message}") from None
    half = len(batch) // 2
    return [one for part in (batch[:half], batch[half:]) for one in _predict_batch(runner, rows, part, left_out)]


def _score(
    each: TaskRows, done: dict[Key, dict[str, Any]], about: dict[str, Any], official: bool, out: Path
) -> dict[str, Any]:
    """Score a task and write its files. Return the entry of `results.json`."""
    found = [(row, done.get(key, each.task.no_reply)) for row, key in zip(each.rows, each.keys, strict=True)]
    read = sum(key in done for key in each.keys)
    kept = [(row, prediction) for row, prediction in found if prediction is not None] if read else []
    rows, predictions = [row for row, _ in kept], [prediction for _, prediction in kept]
    scores = each.task.score(rows, predictions, about, official) if kept else {}
    return {
        "scores": {name: float(value) for name, value in scores.items()},
        "rows": read,
        "unread": len(each.keys) - read,
        "count": each.task.no_reply is not None,
        "official": official and each.task.has_published_scorer,
        "papers": each.task.papers,
        "files": [str(path) for path in each.task.write_files(out, rows, predictions, about)],
    }
