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
import os
import reprlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DownloadManager, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from videollm_mod.data_paths import NamedFiles, load_builder
from videollm_mod.train.data.child_processes import ChildProcesses, CrashError
from videollm_mod.train.data.faults import (
    REFUSAL,
    REFUSED,
    UNREADABLE,
    WHERE,
    ClosedName,
    Fault,
    FaultyRowError,
    name_row,
    note_damage,
    open_video,
)
from videollm_mod.train.data.feature_files import StoredFeatures, read_header
from videollm_mod.train.data.json_rows import index_rows
from videollm_mod.train.data.shards import check_shards, read_shards
from videollm_mod.train.data.sources import DataSource
from videollm_mod.video_opening_videollm_mod import without_secrets
from videollm_mod.video_reading_videollm_mod import ReadingReport, read_video


ROLES = ("system", "user", "assistant")
SOURCES = ("video", "frame_features")
# The query that asks for narration.
NARRATE = "Please narrate the video in real time."
# Rows that are checked together: their files are opened at the same time.
_ROWS_TOGETHER = 64
# Seconds of reading a file after which it is named.
_PATIENCE = 60.0
VIDEO_ROOT_HELP = "Folders, and beginnings of URLs, outside the data set that its rows may name."


@dataclass
class TimedMessages(DataSource):
    """
    Timed messages from a file, a folder or a Hub data set.

    Args:
        video_root (`list[str]`, *optional*): Folders, and beginnings of URLs, outside the data set that rows may name.
    """

    video_root: list[str] | None = field(default=None, metadata={"help": VIDEO_ROOT_HELP})

    def load(self, split: str, *, num_clips: int, first_clip: int = 0) -> Dataset:  # noqa: ARG002
        """Return all rows of a split (see [`load_timed_messages`])."""
        return load_timed_messages(self.dataset, split, video_root=self.video_root or ())

    def stream(self, split: str) -> IterableDataset:
        """Return one pass over the rows of a split (see [`stream_timed_messages`])."""
        return stream_timed_messages(self.dataset, split, video_root=self.video_root or ())

    def find_faults(self, rows: Sequence[dict[str, Any]], *, fps: float = 2.0, full: bool = False) -> Iterator[Fault]:
        """Find all errors in rows (see [`find_faults`])."""
        return find_faults(rows, fps=fps, full=full)


def load_timed_messages(source: str | Path, split: str = "train", *, video_root: Sequence[str | Path] = ()) -> Dataset:
    """
    Load rows of timed messages. Relative paths in `video` or `frame_features` become absolute.

    They start at the folder that holds the files, or at the root of the Hub data set. A row may not name other files.

    Args:
        source (`str` or `Path`): A `.jsonl`, `.json` or `.parquet` file; a folder with `.jsonl` or `.parquet` files,
            named after their split (`train.jsonl`, `validation-00000-of-00002.parquet`); or a Hub data set.
        split (`str`, *optional*, defaults to `"train"`): Split to load. A single file is one split of any name.
        video_root (sequence of `str`, *optional*): Folders, and beginnings of URLs, that rows may name too.

    Raises:
        `FileNotFoundError`: If there is no file to read.
        `ValueError`: If there is no such split, or if a file is of another format. A line that is no row, or names a
            file outside the data set, is not found here: reading the row raises [`FaultyRowError`].
    """
    path = Path(source)
    if path.is_file():
        return _read([path], NamedFiles(path.parent, video_root))
    if path.is_dir():
        return _read(_files_of(path, split), NamedFiles(path, video_root))
    _refuse_a_missing_file(source)
    return _read_hub(str(source), split, NamedFiles(str(source), video_root))


def stream_timed_messages(
    source: str | Path, split: str = "train", *, video_root: Sequence[str | Path] = ()
) -> IterableDataset:
    """
    Return one pass over rows of timed messages, which are read one after the other.

    Args:
        source (`str` or `Path`): A Parquet file, a folder of them, or a Hub data set (see [`load_timed_messages`]).
        split (`str`, *optional*, defaults to `"train"`): Split to read.
        video_root (sequence of `str`, *optional*): As of [`load_timed_messages`].

    Raises:
        `FileNotFoundError`: If there is no such source.
        `ValueError`: If there is no such split, or its files are JSON lines. A row of local files that names a file
            outside the data set raises [`FaultyRowError`] when it is used, and one of the Hub when it is read.
    """
    path = Path(source)
    if not (path.is_file() or path.is_dir()):
        _refuse_a_missing_file(source)
        named = NamedFiles(str(source), video_root)
        builder = load_builder(str(source), named)
        files = (builder.config.data_files or {}).get(split)
        if files is None or not all(str(file).endswith(".parquet") for file in files):
            return builder.as_streaming_dataset(split=split).map(_as_streamed, fn_kwargs={"named": named})
    else:
        files, root = ([path], path.parent) if path.is_file() else (_files_of(path, split), path)
        named = NamedFiles(root, video_root)
        if any(file.suffix.lower() != ".parquet" for file in files):
            raise ValueError("JSON lines are read when they are used: leave --streaming out, or write Parquet.")
    # The reader of `datasets` would read the features of all rows, also of those that other processes use.
    return IterableDataset.from_generator(_stream_shards, gen_kwargs={"files": tuple(map(str, files)), "named": named})


def _stream_shards(files: tuple[str, ...], named: NamedFiles) -> Iterator[dict[str, Any]]:
    for row in read_shards(files):
        try:
            yield _as_streamed(row, named)
        except FaultyRowError as error:
            # An error would end the stream. What may not be opened stands where no reader of rows looks.
            yield {WHERE: error.row and name_row(error.row), REFUSAL: str(error), REFUSED: error.row}


def _as_streamed(row: dict[str, Any], named: NamedFiles) -> dict[str, Any]:
    name, root = row.get("id") or row.get("video"), named.root
    return as_written({**row, WHERE: f"'{root}', {name}" if isinstance(name, str) else f"a row of '{root}'"}, named)


def _refuse_a_missing_file(source: str | Path) -> None:
    if Path(source).suffix.lower() in (".json", ".jsonl", ".parquet") or str(source).count("/") > 1:
        raise FileNotFoundError(f"There is no file or folder '{source}'.")


def _files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split."""
    files = sorted(file for file in folder.glob("*.*") if file.suffix.lower() in (".jsonl", ".parquet"))
    if not files:
        raise FileNotFoundError(f"The folder '{folder}' has no .jsonl and no .parquet file.")
    chosen = [file for file in files if file.stem == split or file.stem.startswith(f"{split}-")]
    if not chosen:
        there = ", ".join(file.name for file in files)
        raise ValueError(f"The folder '{folder}' has no split {split!r}: it has {there}.")
    try:
        check_shards(chosen)
    except ValueError as error:
        raise ValueError(f"'{folder}': {error}") from None
    return chosen


def _read_hub(source: str, split: str, named: NamedFiles) -> Dataset:
    builder = load_builder(source, named)
    files = builder.config.data_files or {}
    if split in files and all(str(file).endswith((".json", ".jsonl")) for file in files[split]):
        paths = DownloadManager().download([str(file) for file in files[split]])
        return index_rows([Path(path) for path in paths], partial(_absolute, named=named))
    try:
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except DatasetGenerationError as error:
        raise ValueError(f"The data set '{source}' cannot be read: {error.__cause__ or error}") from None
    if split not in splits:
        raise ValueError(f"The data set '{source}' has no split {split!r}: it has {', '.join(splits)}.")
    return _with_names(splits[split], {f"'{source}'": len(splits[split])}, named)


def _read(files: list[Path], named: NamedFiles) -> Dataset:
    """Read files of one type."""
    kinds = sorted({file.suffix.lower() for file in files})
    if kinds == [".parquet"]:
        rows = _read_parquet(files, named)
    elif set(kinds) <= {".json", ".jsonl"}:
        rows = index_rows(files, partial(_absolute, named=named))
    elif len(files) > 1:
        raise ValueError(f"The folder '{named.root}' has {' and '.join(kinds)} files of one split: keep one kind.")
    else:
        raise ValueError(f"'{files[0]}' is neither .jsonl nor .parquet.")
    if not len(rows):
        raise ValueError(f"{_names(files)} is empty." if len(files) == 1 else f"{_names(files)} are empty.")
    return rows


def _names(files: list[Path]) -> str:
    return ", ".join(f"'{file}'" for file in files)


def _read_parquet(files: list[Path], named: NamedFiles) -> Dataset:
    counts = {}
    for file in files:
        try:
            counts[f"'{file}'"] = pq.read_metadata(file).num_rows
        except (ValueError, OSError) as error:
            raise ValueError(f"'{file}' is not Parquet: {error}") from None
    if not any(counts.values()):
        # Arrow names a batch size here.
        return Dataset.from_dict({})
    try:
        rows = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, ValueError) as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = " ... ".join(dict.fromkeys((lines[0].strip(), lines[-1].strip())))
        raise ValueError(f"{_names(files)} cannot be read as one table: {reason}") from None
    return _with_names(rows, counts, named)


def _with_names(rows: Dataset, counts: dict[str, int], named: NamedFiles) -> Dataset:
    """Add the file and number of each row. The rest is done when a row is used: its file may hold large features."""
    names = [f"{name}, row {index}" for name, count in counts.items() for index in range(count)]
    rows = rows.remove_columns([WHERE]) if WHERE in rows.column_names else rows
    return rows.add_column(WHERE, names).with_transform(partial(_read_table, named=named))


def _read_table(columns: dict[str, list[Any]], named: NamedFiles) -> dict[str, list[Any]]:
    """Return rows of a table as they were before Arrow filled them up. This is the transform of a data set."""
    made = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [as_written(row, named) for row in made]
    return {name: [row.get(name) for row in rows] for name in columns}


def as_written(row: dict[str, Any], named: NamedFiles) -> dict[str, Any]:
    """
    Return a row of a table as it was written: without the empty values of Arrow, with `truth` as an object, and with
    absolute paths.

    Args:
        row (`dict`): The row.
        named ([`NamedFiles`]): The files that it may name.

    Raises:
        [`FaultyRowError`]: If `truth` is text that is not JSON, or if the row names a file outside the data set.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if isinstance(row.get("messages"), list):
        row["messages"] = [
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
            for message in row["messages"]
        ]
    row = _absolute(row, named)
    if isinstance(row.get("truth"), str):
        try:
            row["truth"] = json.loads(row["truth"])
        except ValueError as error:
            raise FaultyRowError(f"{name_row(row)}, truth: not JSON: {error}") from None
    return row


def _absolute(row: dict[str, Any], named: NamedFiles) -> dict[str, Any]:
    """Make the paths of a row absolute. What is no path is a fault that [`find_faults`] finds."""
    found, refusals = {}, []
    for name in SOURCES:
        if isinstance(row.get(name), str) and "\0" not in row[name]:
            try:
                place = named.locate(row[name])
            except ValueError as error:
                refusals.append(f"{name_row(row)}, {name}: {error}")
                found[name] = _regular_file(named.root, row[name]) if named.is_local else ClosedName(row[name])
                continue
            is_in_hub = not (named.is_local or "://" in place or os.path.isabs(place))
            found[name] = _download(str(named.root), place) if is_in_hub else place
    if refusals:
        # A user who names local files may see all that is wrong with them. Others' data sets open nothing.
        raise FaultyRowError(refusals[0], row={**row, **found} if named.is_local else None)
    return {**row, **found}


def _regular_file(root: Path, name: str) -> str:
    """Return the path of a file, or a name that stays closed if it is none: a URL, a camera or a pipe."""
    path = os.path.realpath(os.path.join(root, name))
    return path if os.path.isfile(path) else ClosedName(name)


@cache
def _download(repository: str, name: str) -> str:
    """Download a file of a Hub data set once. A file that is not there keeps its name, and is a fault of its row."""
    try:
        return hf_hub_download(repository, name, repo_type="dataset")
    except EntryNotFoundError:
        return f"{repository}/{name}"


def find_faults(rows: Sequence[dict[str, Any]], *, fps: float = 2.0, full: bool = False) -> Iterator[Fault]:
    """
    Find all errors in rows of timed messages, row by row. Nothing is corrected.

    A row of local files that names a video outside its data set is checked all the same, if the video is a regular
    file.

    Args:
        rows (sequence of `dict`): Rows with absolute paths, as [`load_timed_messages`] returns them.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        full (`bool`, *optional*, defaults to `False`): Whether to decode all frames of the rows. Otherwise the first
            frame of each row is decoded.

    The record of the script notes which videos are damaged: by their frames, or by what their files lack.
    """
    with ChildProcesses() as children, ThreadPoolExecutor() as pool:
        files = _Files(pool, children, fps, full)
        for begin in range(0, len(rows), _ROWS_TOGETHER):
            some = [_get(rows, index) for index in range(begin, min(begin + _ROWS_TOGETHER, len(rows)))]
            for row, _ in some:
                files.open(row)
            for index, (row, refusal) in enumerate(some, begin):
                if refusal is not None:
                    yield Fault(index, "", refusal)
                for place, message in () if row is None else _row_faults(row, files):
                    yield Fault(index, place, message, row.get(WHERE))
    for source, report in files.reports:
        note_damage(source, report, is_by_file=not full)


def _get(rows: Sequence[dict[str, Any]], index: int) -> tuple[dict[str, Any] | None, str | None]:
    """Return a row, or what can be checked of it, and why it cannot be used."""
    try:
        row = rows[index]
    except FaultyRowError as error:
        return error.row, str(error)
    return (row[REFUSED], row[REFUSAL]) if row.get(REFUSAL) else (row, None)


class _Files:
    """The files of rows. Threads let their child processes open them, each file and each part of a video once."""

    def __init__(self, pool: ThreadPoolExecutor, children: ChildProcesses, fps: float, full: bool) -> None:
        self.pool, self.children, self.fps, self.full = pool, children, fps, full
        self.lengths: dict[tuple[str, str], Future[float | str]] = {}
        self.parts: dict[tuple[str, float, float | None], Future[float | str]] = {}
        self.reports: list[tuple[str, ReadingReport]] = []

    def open(self, row: dict[str, Any] | None) -> None:
        """Begin to open the file of a row."""
        for name in [name for name in SOURCES if row is not None and _is_opened(row.get(name))]:
            self.length(name, row[name])
            start, end = _given(row.get("start"), 0.0), row.get("end")
            is_part = _is_time(start) and (end is None or (_is_time(end) and end >= start))
            if name == "video" and is_part and not _is_pipe(row[name]):
                self.part(row[name], start, end)

    def length(self, name: str, source: str) -> Future[float | str]:
        """Return the length of a file in seconds, or what is wrong with it."""
        if (name, source) not in self.lengths:
            self.lengths[name, source] = self.pool.submit(self._measure, name, source)
        return self.lengths[name, source]

    def part(self, source: str, start: float, end: float | None) -> Future[float | str]:
        """Return the second at which the frames of a part of a video end, or what is wrong with it."""
        key = (source, start, end)
        if key not in self.parts:
            self.parts[key] = self.pool.submit(self._decode, *key)
        return self.parts[key]

    def _decode(self, source: str, start: float, end: float | None) -> float | str:
        given = _decode_part, source, start, end, self.fps, self.full
        try:
            found, report = self.children.call(*given)
        except CrashError as error:
            return _crashed(source, error)
        return self._note(source, found, report if self.full else None)

    def _measure(self, name: str, source: str) -> float | str:
        try:
            found, report = self.children.call(_length, name, source)
        except CrashError as error:
            return _crashed(source, error)
        return self._note(source, found, None if self.full else report)

    def _note(self, source: str, found: float | str, report: ReadingReport | None) -> float | str:
        if report:
            self.reports.append((source, report))
        return found


def _crashed(source: str, error: CrashError) -> str:
    shown = without_secrets(source)
    return f"'{shown}' crashes the program that reads it ({error}). Encode it again, or leave the row out"


def _wait(found: Future[float | str], source: str) -> float | str:
    """Return what reading a file gave. Name the file if that takes long: a decoder may hang."""
    seconds = 0.0
    while not wait([found], timeout=_PATIENCE).done:
        seconds += _PATIENCE
        if found.running():
            sys.stderr.write(f"still reading '{without_secrets(source)}' after {seconds:g} s\n")
    return found.result()


def _row_faults(row: dict[str, Any], files: _Files) -> Iterator[tuple[str, str]]:
    named = [name for name in SOURCES if row.get(name) is not None]
    if len(named) != 1:
        yield "video", f"a row has either `video` or `frame_features`, this one has {' and '.join(named) or 'neither'}"
    start, end = _given(row.get("start"), 0.0), row.get("end")
    length, video = math.inf, None
    for name in named:
        source = row[name]
        if isinstance(source, ClosedName):
            continue
        is_embedded = name == "frame_features" and isinstance(source, (bytes, StoredFeatures))
        if not isinstance(source, str) and not is_embedded:
            yield name, f"must be a path, got {type(source).__name__}"
            continue
        found = _features_length(source, "the row") if is_embedded else _wait(files.length(name, source), source)
        if isinstance(found, str):
            yield name, found
        else:
            length, video = found, source if name == "video" else None
    if not (_is_time(start) and start < length):
        yield "start", f"is {_short(start)}, must be a time from 0 s to the video's end at {length:g} s"
        start, video = 0.0, None
    if end is not None and not (_is_time(end) and start <= end <= length + 0.05):
        yield "end", f"is {_short(end)}, must be a time from {start:g} s to the video's end at {length:g} s"
        end = video = None
    if video is not None:
        found = _wait(files.part(video, start, end), video)
        if isinstance(found, str):
            yield "video", found
        else:
            length = min(length, found)
    end = min(length, math.inf if end is None else end)
    yield from _message_faults(row.get("messages"), start, end, needs_reply=not row.get("task"))


def _message_faults(messages: Any, start: float, end: float, *, needs_reply: bool) -> Iterator[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        yield "messages", "must be a list of at least one message"
        return
    last, is_leading = start, True
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            yield place, f"must be an object with role, content and time, got {type(message).__name__}"
            continue
        role, content, time = (message.get(name) for name in ("role", "content", "time"))
        if role not in ROLES:
            yield f"{place}.role", f"is {_short(role)}, known roles are {', '.join(ROLES)}"
        elif role == "system" and index > 0:
            yield f"{place}.role", "only the first message may be the system's"
        if not isinstance(content, str):
            yield f"{place}.content", f"must be text, got {type(content).__name__}"
        elif not content.strip():
            yield f"{place}.content", "is empty"
        # These come before the first frame.
        is_leading = is_leading and time is None and role in ("system", "user")
        if is_leading:
            continue
        if not _is_time(time):
            yield f"{place}.time", f"is {_short(time)}, must be seconds since the video's beginning"
        elif time < start:
            yield f"{place}.time", f"is {time:g} s, before the beginning at {start:g} s"
        elif time > end:
            yield f"{place}.time", f"is {time:g} s, beyond the end at {end:g} s"
        elif time < last:
            yield f"{place}.time", f"is {time:g} s, before the previous message at {last:g} s"
        else:
            last = time
    # The replies of some benchmarks are not public.
    has_reply = any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages)
    if needs_reply and not has_reply:
        yield "messages", "has no assistant message: there is nothing to learn"


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _is_time(value: Any) -> bool:
    # Beyond this, a number may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def _short(value: Any) -> str:
    """Return a value for a message of one line."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else reprlib.repr(value)


def _is_opened(source: Any) -> bool:
    return isinstance(source, str) and not isinstance(source, ClosedName)


def _is_pipe(source: str) -> bool:
    """Return whether this is a named pipe or a device. Opening it may wait for ever."""
    return os.path.exists(source) and not (os.path.isfile(source) or os.path.isdir(source))


def _length(name: str, source: str) -> tuple[float | str, ReadingReport]:
    """Return the length of a video or of frame features in seconds, or what is wrong, and what the file lacks."""
    report, again = ReadingReport(), "which cannot be read again in each epoch. Record it to a file"
    if _is_pipe(source):
        return f"'{source}' is a pipe or a device, {again}", report
    if name == "frame_features":
        return _features_length(source, f"'{source}'"), report
    try:
        with open_video(source, report=report) as reader:
            if reader.is_live:
                return f"'{without_secrets(source)}' is a live source, {again}", report
            reader.check_file()
            return reader.seconds, report
    except UNREADABLE as error:
        return str(error).splitlines()[0].removesuffix("."), report


def _features_length(source: str | bytes | StoredFeatures, name: str) -> float | str:
    try:
        shape, about = read_header(source)
    except Exception as error:  # safetensors raises several classes of errors
        return f"{name} holds no readable tensor `frame_features`: {error}"
    if len(shape) != 3:
        return f"`frame_features` in {name} must be (frames, tokens, width), got {shape}"
    # The first frame of features is at second `start` of the video.
    try:
        return float(about.get("start", 0.0)) + shape[0] / float(about.get("fps", 2.0))
    except (ValueError, ZeroDivisionError):
        return f"{name} has metadata that is no time or rate: {about}"


def _decode_part(
    source: str, start: float, end: float | None, fps: float, full: bool
) -> tuple[float | str, ReadingReport]:
    """
    Decode the first frame of a part of a video, or all frames.

    Returns:
        The second at which the frames end, infinity if only the first was decoded, or what is wrong. Then the report.
    """
    last, report = start, ReadingReport()
    try:
        frames = read_video(open_video(source, report=report), fps=fps, start=start, end=end)
        for last, _ in frames if full else islice(frames, 1):  # noqa: B007
            pass
        frames.close()
    except UNREADABLE as error:
        return str(error).splitlines()[0].removesuffix("."), report
    return (last + 1 / fps if full else math.inf), report
