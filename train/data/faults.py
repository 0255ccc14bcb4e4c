# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Rows with faults: how they are named, left out, counted and reported, also by the workers of a data loader."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videollm_mod.console import counted

import numpy as np
from safetensors import SafetensorError
from tqdm.auto import tqdm

from videollm_mod.data_paths import VIDEO_FORMATS
from videollm_mod.outputs import FullDiskError
from videollm_mod.video_opening_videollm_mod import without_secrets
from videollm_mod.video_reading_videollm_mod import ReadingReport, VideoReader, read_video


# The key under which a row carries its file and number.
WHERE = "where"
# Keys of a row of a stream that may not be used: why, and what can be checked of it.
REFUSAL, REFUSED = "refusal", "refused"
# Rows that a message lists.
MOST_LINES = 20
# What ends the name of a video in a line about it.
_NAME_END = "': "
# What a row raises that cannot be read. Other errors are faults of the program.
UNREADABLE = (ValueError, OSError, RecursionError, SafetensorError)


class FaultyRowError(ValueError):
    """
    A row cannot be used. The message names the row in one line.

    Args:
        message (`str`): What is wrong with it.
        row (`dict`, *optional*): The row, if the rest of it can be checked too.
    """

    def __init__(self, message: str, *, row: dict[str, Any] | None = None) -> None:
        # The data loader raises an error of a worker again, with the worker's traceback as its message.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])
        self.row = row


class ClosedName(str):
    """The name of something outside a data set that is not opened, not even to check it: a URL, a camera or a pipe."""


@dataclass(frozen=True)
class Fault:
    """
    An error in a row.

    Args:
        row (`int`): Index of the row.
        field (`str`): Place in the row, such as `messages[2].time`. Empty if the row could not be parsed.
        message (`str`): What is wrong, and what is allowed.
        where (`str`, *optional*): File and number of the row.
    """

    row: int
    field: str
    message: str
    where: str | None = None

    def __str__(self) -> str:
        if not self.field:
            return self.message
        return f"{self.where or f'row {self.row}'}, {self.field}: {self.message}"


def name_row(row: Mapping[str, Any]) -> str:
    """Return the file and number of a row, or its video if it comes from no file."""
    video = row.get("frame_features") if row.get("video") is None else row["video"]
    is_named = isinstance(video, (str, Path))
    return row.get(WHERE) or (f"the row of '{without_secrets(str(video))}'" if is_named else "a row")


@contextmanager
def naming(row: Mapping[str, Any]) -> Iterator[None]:
    """Name the row in errors about it, as [`FaultyRowError`]. A row that may not be used is one."""
    if row.get(REFUSAL):
        raise FaultyRowError(row[REFUSAL])
    try:
        yield
    except (FaultyRowError, FullDiskError):
        raise
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FaultyRowError(f"{name_row(row)}: {reason}") from error


def list_lines(lines: Iterable[str]) -> str:
    """Return the first 20 lines, and how many more there are."""
    lines = list(lines)
    more = [f"... and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join(lines[:MOST_LINES] + more)


def lines_of_rows(faults: Iterable[Fault]) -> dict[int, str]:
    """Return a line for each faulty row, by its index, with its first three faults."""
    of_rows: dict[int, list[Fault]] = {}
    for fault in faults:
        of_rows.setdefault(fault.row, []).append(fault)
    return {row: _line_of_row(of_rows[row]) for row in sorted(of_rows)}


def _line_of_row(faults: Sequence[Fault]) -> str:
    first, *others = faults
    said = [str(first), *(f"{fault.field}: {fault.message}" for fault in others[:2])]
    said += [f"and {len(others) - 2} more"] if len(others) > 2 else []
    return "; ".join(part.removesuffix(".") for part in said) if others else said[0]


def describe_faults(faults: Sequence[Fault]) -> str:
    """Return how many faults there are, and the first 20 of them."""
    rows = len({fault.row for fault in faults})
    return f"{counted(len(faults), 'fault')} in {counted(rows, 'row')}:\n{list_lines(map(str, faults))}"


class RowRecord:
    """
    What the workers of a data loader do with rows: which row each works on, and which rows were left out.

    The record is a folder, because it must outlive a worker that is killed.

    Args:
        folder (`str`): Folder to write to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.num_rows = 0
        self._added: set[tuple[str, str]] = set()

    @contextmanager
    def working_on(self, row: Mapping[str, Any]) -> Iterator[None]:
        """Note that this process works on a row."""
        note = self.folder / f"{os.getpid()}.txt"
        note.write_text(name_row(row), encoding="utf-8", errors="replace")
        try:
            yield
        finally:
            note.write_bytes(b"")

    def leave_out(self, fault: str) -> None:
        """Record a row that is left out, by a line that names it."""
        self._add("left_out", fault)

    def left_out(self) -> list[str]:
        """Return a line for each row that this process and its workers left out."""
        return self._lines("left_out")

    def note_damage(self, video: str | Path, report: Any, *, is_by_file: bool = False) -> None:
        """Record what a [`ReadingReport`] says of a video that was used all the same: by its frames or by its file."""
        self._add("damaged_files" if is_by_file else "damaged", f"'{without_secrets(str(video))}': {report}")

    def damaged(self) -> list[str]:
        """
        Return a line for each video that this process and its workers read in part, or mended. What its file tells
        counts if nothing is known of its frames.
        """
        lines = self._lines("damaged")
        known = tuple(f"{line.split(_NAME_END)[0]}{_NAME_END}" for line in lines)
        return lines + [line for line in self._lines("damaged_files") if not line.startswith(known)]

    def _add(self, name: str, line: str) -> None:
        # A row is read again in each epoch.
        if (name, line) in self._added:
            return
        self._added.add((name, line))
        # One write in append mode: lines of several workers do not mix.
        with (self.folder / f"{name}.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _lines(self, name: str) -> list[str]:
        path = self.folder / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return list(dict.fromkeys(map(json.loads, lines)))

    def count_faults(self) -> str:
        """Return how many rows were left out, in words."""
        count = len(self.left_out())
        return f"{count} left out" if count else "no fault found"

    def rows_of(self, workers: Iterable[int]) -> list[str]:
        """Return the rows that workers, named by their process ids, work on."""
        notes = [self.folder / f"{worker}.txt" for worker in workers]
        return [text for note in notes if note.exists() and (text := note.read_text(encoding="utf-8"))]


# The record of this script. Workers of a data loader may be new processes, so a collator has its own reference.
_record: RowRecord | None = None


def open_video(video: str | Path, *, report: ReadingReport | None = None) -> VideoReader:
    """
    Open the video of a row, in a format that cannot name further files.

    Args:
        video (`str` or `Path`): A file or a URL.
        report ([`ReadingReport`], *optional*): Where to count what is spoilt or mended.

    Raises:
        `ValueError` or `OSError`: If it cannot be read as video.
    """
    return VideoReader(video, formats=VIDEO_FORMATS, report=report)


def read_clip(
    row: Mapping[str, Any], *, fps: float, record: RowRecord | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """
    Play the clip of a row, and note in the record of the script what was spoilt or mended.

    Args:
        row (`dict`): A row with `video`, and perhaps `start` and `end` in seconds.
        fps (`float`): Frames per second.
        record ([`RowRecord`], *optional*): The record. Defaults to that of [`row_record`], if there is one.

    Yields:
        `tuple[float, np.ndarray]`: As [`read_video`].
    """
    report = ReadingReport()
    window = {"start": row.get("start") or 0.0, "end": row.get("end")}
    is_file = isinstance(row["video"], (str, Path))
    video = open_video(row["video"], report=report) if is_file else row["video"]
    yield from read_video(video, fps=fps, **window, report=report)
    if report:
        note_damage(row["video"], report, record)


def note_damage(video: str | Path, report: Any, record: RowRecord | None = None, *, is_by_file: bool = False) -> None:
    """Note what a [`ReadingReport`] says of a video, in a record or in that of [`row_record`], if there is one."""
    record = _record if record is None else record
    if record is not None:
        record.note_damage(video, report, is_by_file=is_by_file)


@contextmanager
def row_record() -> Iterator[RowRecord]:
    """
    Keep a record of rows during a script. At the end, print the rows that were left out and the videos that were read
    in part.

    Raises:
        `SystemExit`: With one line, if a row is faulty or if a worker of a data loader dies. The line names the row.
    """
    with tempfile.TemporaryDirectory(prefix="rows-", ignore_cleanup_errors=True) as folder:
        global _record
        _record = record = RowRecord(folder)
        try:
            yield record
        except BaseException as error:
            # A bar that is left open would end up on the line of the message.
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()
            _report(record.left_out(), record.damaged(), record.num_rows)
            if (line := _in_one_line(error, record)) is not None:
                raise SystemExit(f"error: {line}") from None
            raise
        finally:
            _record = None
        # Imported here, because `--help` of scripts does without.
        from accelerate import PartialState
        from accelerate.utils import gather_object

        left_out, damaged = (list(dict.fromkeys(gather_object(x))) for x in (record.left_out(), record.damaged()))
        if PartialState().is_main_process:
            _report(left_out, damaged, record.num_rows)


def _report(left_out: list[str], damaged: list[str], num_rows: int) -> None:
    if left_out:
        sys.stderr.write(f"left out {len(left_out)} of {counted(num_rows, 'row')}:\n{list_lines(left_out)}\n")
    if damaged:
        # Several parts of a video may each have a line.
        count = len({line.split(_NAME_END)[0] for line in damaged})
        sys.stderr.write(f"mended or read in part: {counted(count, 'video')}:\n{list_lines(damaged)}\n")


def _in_one_line(error: BaseException, record: RowRecord) -> str | None:
    """Return what a faulty row or the death of a worker means, or `None` for other errors."""
    if isinstance(error, FaultyRowError):
        return str(error)
    died = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?", str(error))
    if not isinstance(error, RuntimeError) or died is None:
        return None
    rows = record.rows_of(map(int, died[1].split(",")))
    how = f"was killed ({died[2].strip()})" if died[2] else "died"
    return (
        f"a worker of the data loader {how} at {' and '.join(rows) or 'an unknown row'}. If memory ran out, lower "
        "--dataloader_num_workers; otherwise correct the row or remove it."
    )
