# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Rows that are read while the model trains, in the same order in every run, from any row on.

The data set repeats for ever. All processes and workers read all rows, but each makes batches only of its own: batches
do not depend on the number of workers, and a run that resumes at a row goes on with the batches of the first run.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import IterableDataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from videollm_mod.train.data.faults import Fault, FaultyRowError, RowRecord, counted, describe_faults, lines_of_rows
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.windows import NO_ROW_LEFT, Windows, parts_of


# Rows that are checked before training. Others are checked when their turn comes.
NUM_CHECKED = 64
# Rows that take the place of rows that cannot be read.
_NUM_REPLACEMENTS = 16


@dataclass(frozen=True)
class RowOrder:
    """
    Which rows a loader reads, and in which order.

    Args:
        batch_size (`int`): Rows of a batch of one process.
        first_row (`int`, *optional*, defaults to 0): Rows that an earlier run has used.
        num_processes (`int`, *optional*, defaults to 1): Number of processes that train. They take batches in turn.
        num_workers (`int`, *optional*, defaults to 0): Workers of each process. They take its batches in turn.
        seed (`int`, *optional*, defaults to 0): Seed of the order. It changes with each pass over the data.
        buffer_size (`int`, *optional*, defaults to 1000): Rows among which the next is drawn. 0 keeps their order.
    """

    batch_size: int
    first_row: int = 0
    num_processes: int = 1
    num_workers: int = 0
    seed: int = 0
    buffer_size: int = 1000


def repeat_rows(
    rows: IterableDataset,
    order: RowOrder,
    *,
    windows: Windows | None = None,
    left_out: RowRecord | None = None,
) -> IterableDataset:
    """
    Return an endless data set of the rows of a stream, with `epoch`, the number of earlier passes.

    Args:
        rows (`IterableDataset`): One pass over the rows.
        order ([`RowOrder`]): Their order.
        windows ([`Windows`], *optional*): What splits long rows.
        left_out ([`RowRecord`], *optional*): Where to record rows that cannot be split, which are then left out.

    The data set raises [`FaultyRowError`] if no row of the first pass has a window.
    """
    # Accelerate shares the entries of a list among processes, as runs, and `datasets` among the workers of a loader,
    # in turn.
    readers = list(range(order.num_processes * max(order.num_workers, 1)))
    options = {"rows": rows, "order": order, "windows": windows, "left_out": left_out}
    return IterableDataset.from_generator(_repeat, gen_kwargs={**options, "readers": readers})


def _repeat(
    rows: IterableDataset,
    order: RowOrder,
    windows: Windows | None,
    left_out: RowRecord | None,
    readers: list[int],
) -> Iterator[dict[str, Any]]:
    passes, num_workers = _all_passes(rows, order), max(order.num_workers, 1)
    parts = passes if windows is None else _split(passes, windows, left_out)
    for index, row in enumerate(islice(parts, order.first_row, None)):
        step, process = divmod(index // order.batch_size, order.num_processes)
        if process * num_workers + step % num_workers in readers:
            yield row


def _split(rows: Iterator[dict[str, Any]], windows: Windows, left_out: RowRecord | None) -> Iterator[dict[str, Any]]:
    is_empty = True
    for row in rows:
        if is_empty and row["epoch"] > 0:
            # Further passes would be as empty, and the loader would wait for ever.
            raise FaultyRowError(NO_ROW_LEFT)
        try:
            parts = parts_of(row, windows)
        except FaultyRowError as error:
            if left_out is None:
                raise
            left_out.leave_out(str(error))
            continue
        is_empty = is_empty and not parts
        yield from parts


def _all_passes(rows: IterableDataset, order: RowOrder) -> Iterator[dict[str, Any]]:
    for epoch in count():
        # Iterating over the data set itself would give each worker of a loader a part of it.
        some = ({name: values[0] for name, values in columns.items()} for columns in rows.iter(batch_size=1))
        for row in _shuffle(some, np.random.default_rng((order.seed, epoch)), order.buffer_size):
            yield {**row, "epoch": epoch}


def _shuffle(rows: Iterator[Any], rng: np.random.Generator, buffer_size: int) -> Iterator[Any]:
    """Yield rows in a random order: each is drawn among the next `buffer_size`."""
    # That of `datasets` reads several files at once, sleeps for seconds at its end, and differs between versions.
    waiting = list(islice(rows, max(buffer_size, 1)))
    for row in rows:
        place = int(rng.integers(len(waiting)))
        yield waiting[place]
        waiting[place] = row
    if buffer_size:
        rng.shuffle(waiting)
    yield from waiting


class RowCounter(TrainerCallback, ExportableState):
    """
    Count the rows that a run has used. The trainer saves the number with each checkpoint.

    Args:
        num_rows (`int`, *optional*, defaults to 0): Rows that earlier runs have used.
    """

    def __init__(self, num_rows: int = 0) -> None:
        self.num_rows = num_rows

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the rows of a step."""
        self.num_rows += args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint saves."""
        return {"args": {"num_rows": self.num_rows}, "attributes": {}}


def rows_before(checkpoint: str | Path | None) -> int:
    """Return how many rows a streamed run had used at a checkpoint, or 0 without one."""
    if checkpoint is None:
        return 0
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    saved = state.get("stateful_callbacks", {}).get(RowCounter.__name__)
    if saved is None:
        raise SystemExit(f"error: '{checkpoint}' comes from a run without --streaming. Resume it without, too.")
    return saved["args"]["num_rows"]


def open_stream(
    source: DataSource, split: str, *, fps: float = 2.0, may_replace: bool = False
) -> tuple[IterableDataset, list[dict[str, Any]]]:
    """
    Return one pass over the rows of a split, and rows that can replace others, after a check of the first 64.

    Args:
        source ([`DataSource`]): The source.
        split (`str`): Name of the split.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        may_replace (`bool`, *optional*, defaults to `False`): Whether faulty rows may be replaced.

    Raises:
        `SystemExit`: With a message, if an option or the data is wrong, or none of the first rows can be used.
    """
    try:
        rows = source.stream(split)
        head = list(islice(rows, NUM_CHECKED))
        faults = list(source.find_faults(head, fps=fps))
        if not head:
            raise ValueError(f"the split {split!r} has no row.")
        if faults and not may_replace:
            raise ValueError(describe_faults(faults))
    except (ValueError, OSError) as error:
        raise SystemExit(f"--dataset {source.dataset}: {error}") from None
    faulty = {fault.row for fault in faults}
    if len(faulty) == len(head):
        raise SystemExit(f"--dataset {source.dataset}: none of the first {counted(len(head), 'row')} can be used.")
    good = [row for index, row in enumerate(head) if index not in faulty]
    return rows, good[:_NUM_REPLACEMENTS]


def check_stream(
    source: DataSource,
    split: str,
    *,
    fps: float = 2.0,
    full: bool = False,
    left_out: RowRecord | None = None,
    windows: Windows | None = None,
) -> int:
    """
    Check all rows of a stream, with 64 in memory at a time. Return the number of rows without a fault.

    Args:
        source ([`DataSource`]), split (`str`), fps (`float`, *optional*): As of [`open_stream`].
        full (`bool`, *optional*, defaults to `False`): Whether to decode all frames to check them.
        left_out ([`RowRecord`], *optional*): Where to record faulty rows.
        windows ([`Windows`], *optional*): The limits of training. A text that fits into no window is a fault.

    Raises:
        `SystemExit`: With a message, if an option or the data is wrong.
    """
    total, faults = 0, []
    try:
        waiting = iter(source.stream(split))
        while some := list(islice(waiting, NUM_CHECKED)):
            found = list(source.find_faults(some, fps=fps, full=full))
            found += _too_long(some, {fault.row for fault in found}, windows)
            faults += [replace(fault, row=total + fault.row) for fault in found]
            total += len(some)
        if faults and left_out is None:
            raise ValueError(describe_faults(faults))
    except (ValueError, OSError) as error:
        raise SystemExit(f"--dataset {source.dataset}: {error}") from None
    if left_out is not None:
        left_out.num_rows += total
    lines = lines_of_rows(faults)
    for line in lines.values():
        left_out.leave_out(line)
    return total - len(lines)


def _too_long(rows: list[dict[str, Any]], faulty: set[int], windows: Windows | None) -> Iterator[Fault]:
    """Yield a fault for each good row with a text that fits into no window."""
    for index, row in enumerate(rows if windows is not None else ()):
        try:
            if index not in faulty:
                windows.find(row)
        except FaultyRowError as error:
            yield Fault(index, "", str(error))
