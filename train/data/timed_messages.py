# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Read and check timed messages: JSON Lines, Parquet, a folder of them, or a Hub data set.

A row is a dialogue about a video, or about its frame features, with times in seconds:

```json
{"video": "videos/abc.mp4", "start": 0.0, "end": 62.5,
 "messages": [{"role": "user", "content": "Please narrate the video in real time.", "time": 0.0},
              {"role": "assistant", "content": "You pick up the knife.", "time": 3.5}]}
```
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from videollm_mod.train.data.sources import DataSource


ROLES = ("system", "user", "assistant")
SOURCES = ("video", "frame_features")
# The query that asks for narration.
NARRATE = "Please narrate the video in real time."


@dataclass(frozen=True)
class Fault:
    """
    An error in a row.

    Args:
        row (`int`): Index of the row.
        field (`str`): Place in the row, such as `messages[2].time`.
        message (`str`): What is wrong, and what is allowed.
    """

    row: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.field}: {self.message}"


@dataclass
class TimedMessages(DataSource):
    """Timed messages from a file, a folder or a Hub data set. This source has no further options."""

    def load(self, split: str, *, num_clips: int, first_clip: int = 0) -> Dataset:  # noqa: ARG002
        """Return all rows of a split (see [`load_timed_messages`]) after checking them."""
        rows = load_timed_messages(self.dataset, split)
        check_timed_messages(rows)
        return rows


def load_timed_messages(source: str | Path, split: str = "train") -> Dataset:
    """
    Load rows of timed messages. Relative paths in `video` or `frame_features` become absolute.

    They start at the folder that holds the files, or at the root of the Hub data set.

    Args:
        source (`str` or `Path`): A `.jsonl` or `.parquet` file; a folder with such files, named after their split
            (`train.jsonl`, `validation-00000-of-00002.parquet`); or a Hub data set.
        split (`str`, *optional*, defaults to `"train"`): Split to load. A single file is one split of any name.

    Raises:
        `FileNotFoundError`: If there is no file to read, or if a row names a file that a Hub data set does not have.
        `ValueError`: If there is no such split, or if a file cannot be parsed. The message names the file and line.
    """
    path = Path(source)
    if path.is_file():
        rows, root = _read([path]), path.parent
    elif path.is_dir():
        files = sorted(file for kind in ("jsonl", "parquet") for file in path.glob(f"*.{kind}"))
        if not files:
            raise FileNotFoundError(f"The folder '{path}' has no .jsonl and no .parquet file.")
        chosen = [file for file in files if file.stem == split or file.stem.startswith(f"{split}-")]
        if not chosen:
            there = ", ".join(file.name for file in files)
            raise ValueError(f"The folder '{path}' has no split {split!r}: it has {there}.")
        rows, root = _read(chosen), path
    elif path.suffix in (".jsonl", ".parquet") or str(source).count("/") > 1:
        raise FileNotFoundError(f"There is no file or folder '{source}'.")
    else:
        try:
            splits = load_dataset(str(source))
        except DatasetGenerationError as error:
            raise ValueError(f"The data set '{source}' cannot be read: {error.__cause__ or error}") from None
        if not isinstance(splits, DatasetDict) or split not in splits:
            raise ValueError(f"The data set '{source}' has no split {split!r}: it has {', '.join(splits)}.")
        rows, root = splits[split], str(source)
    return rows.map(_absolute, fn_kwargs={"root": root}) if set(SOURCES) & set(rows.column_names) else rows


def _read(files: list[Path]) -> Dataset:
    """Read files of one type as one table."""
    kind = _kind(files[0])
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        faults = [f"'{file}'{fault}" for file in files for fault in [_fault(file)] if fault]
        names = ", ".join(f"'{file}'" for file in files)
        raise ValueError(
            faults[0] if faults else f"{names} cannot be read as one table: {error.__cause__ or error}"
        ) from None


def _fault(path: Path) -> str | None:
    """Return the first error in a JSON Lines or Parquet file, or `None`."""
    if path.suffix == ".parquet":
        try:
            pq.read_metadata(path)
        except (ValueError, OSError) as error:
            return f" is not Parquet: {error}"
        return None
    if not path.stat().st_size:
        return " is empty."
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f", line {number}, column {error.colno}: not JSON: {error.msg}. Each line is one row."
            except UnicodeDecodeError:
                return f", line {number}: not text. The file should be JSON lines."
            if not isinstance(row, dict):
                return f", line {number}: a row is an object with messages and a video, got {type(row).__name__}."
    return None


def _kind(path: Path) -> str:
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise ValueError(f"'{path}' is neither .jsonl nor .parquet.")
    return kinds[path.suffix]


def _absolute(row: dict[str, Any], root: Path | str) -> dict[str, Any]:
    """Make the paths of a row absolute."""
    return {name: _absolute_name(row[name], root) for name in SOURCES if row.get(name) is not None}


def _absolute_name(name: Any, root: Path | str) -> Any:
    if not isinstance(name, str) or "://" in name or Path(name).is_absolute():
        return name
    if isinstance(root, Path):
        return str((root / name).resolve())
    try:
        return hf_hub_download(root, name, repo_type="dataset")
    except EntryNotFoundError:
        raise FileNotFoundError(f"The data set '{root}' has no file '{name}', which a row names.") from None


def find_faults(rows: Iterable[dict[str, Any]], *, check_files: bool = True) -> Iterator[Fault]:
    """
    Find all errors in rows of timed messages, row by row. Nothing is corrected.

    Args:
        rows (iterable of `dict`): Rows with absolute paths, as [`load_timed_messages`] returns them.
        check_files (`bool`, *optional*, defaults to `True`): Whether to open each video and compare times with
            its length.
    """
    lengths: dict[str, float | str] = {}
    for index, row in enumerate(rows):
        for place, message in _row_faults(row, lengths if check_files else None):
            yield Fault(index, place, message)


def check_timed_messages(rows: Iterable[dict[str, Any]], *, check_files: bool = True, show: int = 20) -> None:
    """
    Check rows with [`find_faults`], and raise one error that lists the first faults.

    Raises:
        `ValueError`: If a row has a fault.
    """
    faults = list(find_faults(rows, check_files=check_files))
    if faults:
        more = f"\n... and {len(faults) - show} more" if len(faults) > show else ""
        listed = "\n".join(str(fault) for fault in faults[:show])
        raise ValueError(f"{len(faults)} faults in {len({fault.row for fault in faults})} rows:\n{listed}{more}")


def _row_faults(row: dict[str, Any], lengths: dict[str, float | str] | None) -> Iterator[tuple[str, str]]:
    named = [name for name in SOURCES if row.get(name) is not None]
    if len(named) != 1:
        yield "video", f"a row has either `video` or `frame_features`, this one has {' and '.join(named) or 'neither'}"
    start, end = row.get("start") or 0.0, row.get("end")
    length = math.inf
    for name in named if lengths is not None else ():
        source = row[name]
        if not isinstance(source, str):
            yield name, f"must be a path, got {type(source).__name__}"
            continue
        if source not in lengths:
            lengths[source] = _length(name, source)
        if isinstance(lengths[source], str):
            yield name, lengths[source]
        else:
            length = lengths[source]
    if not (_is_time(start) and start < length):
        yield "start", f"is {start}, must be a time from 0 s to the video's end at {length:g} s"
        start = 0.0
    if end is not None and not (_is_time(end) and start < end <= length + 0.05):
        yield "end", f"is {end}, must be a time after {start:g} s and not after the video's end at {length:g} s"
        end = None
    yield from _message_faults(row.get("messages"), start, min(length, math.inf if end is None else end))


def _message_faults(messages: Any, start: float, end: float) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        yield "messages", "must be a list of at least one message"
        return
    last = start
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            yield place, f"must be an object with role, content and time, got {type(message).__name__}"
            continue
        role, content, time = (message.get(name) for name in ("role", "content", "time"))
        if role not in ROLES:
            yield f"{place}.role", f"is {role!r}, known roles are {', '.join(ROLES)}"
        elif role == "system" and index > 0:
            yield f"{place}.role", "only the first message may be the system's"
        if not isinstance(content, str):
            yield f"{place}.content", f"must be text, got {type(content).__name__}"
        elif not content.strip():
            yield f"{place}.content", "is empty"
        if role == "system" and time is None:
            continue
        if not _is_time(time):
            yield f"{place}.time", f"is {time}, must be seconds since the video's beginning"
        elif time < start:
            yield f"{place}.time", f"is {time:g} s, before the beginning at {start:g} s"
        elif time > end:
            yield f"{place}.time", f"is {time:g} s, beyond the end at {end:g} s"
        elif time < last:
            yield f"{place}.time", f"is {time:g} s, before the previous message at {last:g} s"
        else:
            last = time
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        yield "messages", "has no assistant message: there is nothing to learn"


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _length(name: str, source: str) -> float | str:
    """Return the length of a video or of frame features in seconds, or what is wrong with the file."""
    if "://" not in source and not Path(source).is_file():
        return f"there is no file '{source}'"
    if name == "frame_features":
        try:
            with safe_open(source, "pt") as file:
                shape = file.get_slice("frame_features").get_shape()
                about = file.metadata() or {}
        except Exception as error:  # safetensors raises several classes of errors
            return f"'{source}' holds no readable tensor `frame_features`: {error}"
        if len(shape) != 3:
            return f"`frame_features` in '{source}' must be (frames, tokens, width), got {tuple(shape)}"
        # The first frame of features is at second `start` of the video.
        return float(about.get("start", 0.0)) + shape[0] / float(about.get("fps", 2.0))
    try:
        with av.open(source) as container:
            if not container.streams.video:
                return f"'{source}' has no video stream"
            ends = [s.duration * s.time_base for s in container.streams.video if s.duration]
            ends += [container.duration / 1_000_000] if container.duration and not ends else []
            # A live source has no end.
            return float(max(ends)) if ends else math.inf
    except av.error.FFmpegError as error:
        return f"'{source}' cannot be read as video: {error.strerror or error}"
