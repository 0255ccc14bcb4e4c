# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Data sources: what `--dataset` may name, and the options that each source adds to the scripts.

A generated or converted source is one file in this folder and one line in [`SOURCES`]; docs/extending.md has a
complete example. Any other name is a file, a folder or a Hub data set of timed messages.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset

from videollm_mod.train.data.faults import Fault, RowRecord, describe_faults, lines_of_rows


@dataclass
class DataSource:
    """
    Base class of data sources. A subclass is a dataclass, and its fields are options of the scripts.

    Args:
        dataset (`str`): The value of `--dataset`.
    """

    dataset: str = field(
        metadata={
            "help": "Name of a generated data set, such as streamworld, or timed messages: a file, a folder or a Hub "
            "data set. --help together with --dataset also lists the options of the data set."
        }
    )

    # Seconds of the longest row, if the source makes its rows and knows it. Others are measured.
    longest_row: ClassVar[float | None] = None
    # Frames per second of the arrays in `video`. Files have none: they are read at any rate.
    frame_rate: ClassVar[float | None] = None

    def longest_row_of(self, split: str) -> float | None:  # noqa: ARG002
        """Return the seconds of the longest row of a split, if the source knows it: by default, `longest_row`."""
        return self.longest_row

    def load(self, split: str, *, num_clips: int, first_clip: int = 0) -> Dataset:
        """
        Return rows of `messages` with `video` or `frame_features`, as docs/stream-format.md describes them.

        Args:
            split (`str`): Name of the split.
            num_clips (`int`): Number of rows, if the source generates them.
            first_clip (`int`, *optional*, defaults to 0): Index of the first row, if the source generates them.

        Raises:
            `ValueError` or `FileNotFoundError`: If an option or the data is wrong.
        """
        raise NotImplementedError

    def stream(self, split: str) -> IterableDataset:  # noqa: ARG002
        """
        Return one pass over the rows of a split, which are read one after the other.

        Raises:
            `ValueError` or `FileNotFoundError`: If the source cannot be streamed.
        """
        raise ValueError("this source makes its rows when they are used: leave --streaming out.")

    def find_faults(
        self,
        rows: Sequence[dict[str, Any]],  # noqa: ARG002
        *,
        fps: float = 2.0,  # noqa: ARG002
        full: bool = False,  # noqa: ARG002
    ) -> Iterator[Fault]:
        """
        Find errors in rows. A source that generates its rows has none.

        Args:
            rows (sequence of `dict`): Rows of [`load`] or [`stream`].
            fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
            full (`bool`, *optional*, defaults to `False`): Whether to decode all frames.
        """
        yield from ()

    def title(self, split: str) -> str:  # noqa: ARG002
        """Return the name of the data for model cards."""
        return Path(self.dataset).name


# The class of each name that `--dataset` accepts, as "module:class" so that only the chosen module is imported.
SOURCES: dict[str, str | type[DataSource]] = {
    "streamworld": "videollm_mod.train.data.streamworld:StreamWorld",
    "doomworld": "videollm_mod.train.data.doomworld:DoomWorld",
}
TIMED_MESSAGES = "videollm_mod.train.data.timed_messages:TimedMessages"


def find_source(dataset: str) -> type[DataSource]:
    """Return the class that loads the data set `dataset`."""
    source = SOURCES.get(dataset, TIMED_MESSAGES)
    if isinstance(source, str):
        module, name = source.split(":")
        source = getattr(import_module(module), name)
    return source


def option_names(source: type[DataSource]) -> set[str]:
    """Return the names of a source's own options."""
    return {option.name for option in fields(source)} - {"dataset"}


def load_split(
    source: DataSource,
    split: str,
    num_clips: int,
    first_clip: int = 0,
    *,
    fps: float = 2.0,
    full: bool = False,
    left_out: RowRecord | None = None,
) -> Dataset:
    """
    Return rows to train or evaluate on, after checking them.

    Args:
        source ([`DataSource`]): The source.
        split (`str`): Name of the split.
        num_clips (`int`): Number of rows of a generated source.
        first_clip (`int`, *optional*, defaults to 0): Index of the first row of a generated source.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        full (`bool`, *optional*, defaults to `False`): Whether to decode all frames to check them.
        left_out ([`RowRecord`], *optional*): Where to record faulty rows, which are then left out.

    Raises:
        `SystemExit`: With a message, if an option or the data is wrong, if the source makes frames at another rate, or
            if no row is left.
    """
    try:
        rows = source.load(split, num_clips=num_clips, first_clip=first_clip)
        if source.frame_rate is not None and source.frame_rate != fps:
            raise ValueError(
                f"its clips have {source.frame_rate:g} frames per second, and --fps is {fps:g}: leave --fps out."
            )
        faults = list(source.find_faults(rows, fps=fps, full=full))
        if faults and left_out is None:
            raise ValueError(describe_faults(faults))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"--dataset {source.dataset}: {error}") from None
    if left_out is not None:
        left_out.num_rows += len(rows)
    if not faults:
        return rows
    lines = lines_of_rows(faults)
    for line in lines.values():
        left_out.leave_out(line)
    if len(lines) == len(rows):
        raise SystemExit(f"--dataset {source.dataset}: no row is left, since all are faulty ({len(rows)} in total).")
    return rows.select([row for row in range(len(rows)) if row not in lines])


def first_rows(rows: Dataset, count: int) -> list[dict[str, Any]]:
    """Return the first `count` rows that have a video. Generated videos are made once and stay in memory."""
    made: Iterable[dict[str, Any]] = (rows[index] for index in range(len(rows)))
    return list(islice((row for row in made if row.get("video") is not None), count))
