# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod narrate ... --ray N --out OUT`: a folder or data set on N processes of a Ray cluster, as Parquet."""

import math
import secrets
import threading
import time as clock
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from videollm_mod.console import printable

from videollm_mod.commands.data_set import DataSet, Row, Rows
from videollm_mod.commands.folder import Folder, Narrated, Video, find_videos, narrate_left, open_engine
from videollm_mod.outputs import replacing


# Videos that a process gets at once, and rows of a file. Larger batches leave fewer streams idle at their end.
_MOST_VIDEOS = 16
# Rows of a data set that a process gets at once. They may hold their videos.
_MOST_ROWS = 4
_FIELDS = ("name", "address", "data", "fault", "is_trusted")


class Narrator:
    """
    A process of the cluster with an engine.

    Args:
        model (`str`), revision (`str`, *optional*): The checkpoint.
        videos (`Sequence[Video]`): All videos of the work; the longest says how much memory a stream needs.
        query (`str`, *optional*), fps (`float`), options: See [`narrate_folder`].
    """

    work = Folder

    def __init__(
        self, model: str, revision: str | None, videos: Sequence[Video], query: str | None, fps: float, **options: Any
    ) -> None:
        self.engine, streaming = open_engine(model, revision, videos, fps=fps, **options)
        self.engine.__enter__()
        progress = SimpleNamespace(update=lambda _: None)
        given = {"fps": fps, "stop": threading.Event(), "progress": progress, "save": lambda _: None}
        self.folder = self.work(self.engine, query, **given, **streaming)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Narrate the videos of a batch, each in `video`. Return a [`Narrated`] for each, in `narrated`."""
        with ThreadPoolExecutor(self.engine.max_streams) as threads:
            return {"narrated": list(threads.map(self.folder.narrate, batch["video"]))}


class RowNarrator(Narrator):
    """As [`Narrator`], for rows of a data set."""

    work = Rows

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Narrate the rows of a batch, given by their fields. Return a [`Narrated`] for each, in `narrated`."""
        columns = (batch[field] for field in _FIELDS)
        rows = [
            Row(str(name), str(at), data, str(fault), bool(is_trusted))
            for name, at, data, fault, is_trusted in zip(*columns, strict=True)
        ]
        return super().__call__({"video": rows})


def narrate_with_ray(
    folder: str,
    model: str,
    revision: str | None,
    *,
    workers: int,
    out: Path,
    as_json: bool,
    **options: Any,
) -> int:
    """
    Narrate the videos of a folder that have no row in `out` yet.

    Args:
        folder (`str`): The folder. All machines of the cluster must have it at the same path.
        model (`str`), revision (`str`, *optional*), options: See [`narrate_folder`].
        workers (`int`): Processes. Each takes a GPU if the cluster has one.
        out (`Path`): Folder for Parquet files with a row for each video.

    Returns:
        `int`: The exit code; see [`narrate_folder`].

    Raises:
        `ValueError`: If the folder has no video.
    """
    unread: list[str] = []
    videos = list(find_videos(Path(folder).resolve(), None, unread))
    if not videos:
        raise ValueError(f"There is no video in '{folder}'.")
    done = read_names(out)
    left = [video for video in videos if printable(video.name) not in done]
    given = {"model": _place(model), "revision": revision, **options}
    code = narrate_left(videos, left, "rows", lambda good: _saved(_run(good, workers, **given), out), as_json=as_json)
    return code or int(bool(unread))


def _saved(batches: Iterator[list[Narrated]], out: Path) -> Iterator[Narrated]:
    """Yield what became of each video of some batches, when the rows of its batch are written."""
    with closing(batches):
        for batch in batches:
            _write(out, [result for result in batch if not result.fault])
            yield from (replace(result, rows=out) for result in batch)


def _place(model: str) -> str:
    """Return a checkpoint's name for processes with another working directory."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _run(videos: Sequence[Video], workers: int, **options: Any) -> Iterator[list[Narrated]]:
    """Yield what became of the videos, in batches as they end."""
    if not videos:
        return
    ray = _start_ray()
    size = min(_MOST_VIDEOS, math.ceil(len(videos) / workers))
    rows = ray.data.from_items(
        [{"video": video} for video in videos], override_num_blocks=math.ceil(len(videos) / size)
    )
    yield from _narrate(rows, Narrator, size, workers, videos=videos, **options)


def _start_ray() -> Any:
    """Connect to a cluster, or start one of this machine. Return the package."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _narrate(rows: Any, kind: type[Narrator], size: int, workers: int, **options: Any) -> Iterator[list[Narrated]]:
    """Yield what became of the rows of a data set of Ray, in batches as they end."""
    import ray

    narrated = rows.map_batches(
        kind,
        fn_constructor_kwargs=options,
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    for batch in narrated.iter_batches(batch_size=None, prefetch_batches=0):
        yield list(batch["narrated"])


# ----------------------------------------------------------------------------------------------------------- data sets


def narrate_rows(
    data_set: DataSet, done: set[str], model: str, revision: str | None, *, workers: int, out: Path, **options: Any
) -> Iterator[Narrated]:
    """
    Narrate the rows of a data set, and write a row for each to Parquet files. Yield what became of each.

    Args:
        data_set ([`DataSet`]): The data set. Processes of Ray read its parts.
        done (`set[str]`): Names of rows that are left out.
        model, revision, workers, out, options: See [`narrate_with_ray`].
    """
    # Reading takes no core for itself: processes that narrate may take all, and would wait for it.
    rows = _start_ray().data.read_datasource(_new_source(data_set, done), ray_remote_args={"num_cpus": 0})
    given = {"model": _place(model), "revision": revision, "videos": (), **options}
    yield from _saved(_first(_narrate(rows, RowNarrator, _MOST_ROWS, workers, **given)), out)


def _first(batches: Iterator[list[Narrated]]) -> Iterator[list[Narrated]]:
    """Yield only the first result of each video: rows of several parts may name one, and their tasks share nothing."""
    names = set()
    with closing(batches):
        for batch in batches:
            yield [result for result in batch if result.video.name not in names and not names.add(result.video.name)]


def _new_source(data_set: DataSet, done: set[str]) -> Any:
    """Return a data set as Ray reads it: each of its tasks reads some parts."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Source(Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            parts = data_set.num_parts
            count = min(parallelism, parts)
            about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            ranges = [range(first, parts, count) for first in range(count)]
            return [ReadTask(partial(_read, data_set, some, done), about) for some in ranges]

    return Source()


def _read(data_set: DataSet, parts: range, done: set[str]) -> Iterator[Any]:
    """Yield a table with one row for each video of some parts that is not done."""
    import pyarrow

    done = set(done)
    for row in data_set.rows(parts):
        if row.name not in done:
            done.add(row.name)
            yield pyarrow.table({name: [getattr(row, name)] for name in _FIELDS})


# ------------------------------------------------------------------------------------------------------------- Parquet


def read_names(out: Path) -> set[str]:
    """
    Return the videos that have a row in the Parquet files of a folder, and make the folder.

    Raises:
        `ValueError`: If a file has other rows.
    """
    from pyarrow import parquet

    out.mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    for file in sorted(out.glob("*.parquet")):
        fields = {field.name: str(field.type) for field in parquet.read_schema(file)}
        if fields.get("video") not in ("string", "large_string"):
            raise ValueError(
                f"'{file}' has no names of videos: choose a folder for --out without other Parquet files."
            )
        names.update(parquet.read_table(file, columns=["video"])["video"].to_pylist())
    return names


def _write(out: Path, results: Sequence[Narrated]) -> None:
    """Write rows to a new Parquet file, which appears when it is complete."""
    import pyarrow
    from pyarrow import parquet

    if not results:
        return
    event = pyarrow.struct([("time", pyarrow.float64()), ("text", pyarrow.string())])
    columns = [("video", pyarrow.string()), ("seconds", pyarrow.float64()), ("frames", pyarrow.int64())]
    schema = pyarrow.schema([*columns, ("events", pyarrow.list_(event)), ("srt", pyarrow.string())])
    # Parquet holds Unicode only.
    rows = [result.to_dict() | {"video": printable(result.video.name), "srt": result.to_srt()} for result in results]
    table = pyarrow.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema)
    file = out / f"{clock.time_ns()}-{secrets.token_hex(4)}.parquet"
    with replacing(file) as part:
        parquet.write_table(table, part)


__all__ = ["Narrator", "narrate_with_ray"]
