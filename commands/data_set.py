# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod narrate hf://datasets/OWNER/NAME --out OUT`: the videos of a data set, which is streamed."""

import asyncio
import os
import re
import sys
import tempfile
import threading
import time as clock
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from videollm_mod.console import counted

import typer

from videollm_mod.commands.folder import (
    Folder,
    Narrated,
    Video,
    measure,
    open_engine,
    print_end,
    print_result,
    write_srt,
)
from videollm_mod.data_paths import HUB, VIDEO_FORMATS, NamedFiles, load_builder
from videollm_mod.space.checkpoint_faults import in_one_line


_ADDRESS = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?")
_REMOTE = ("http://", "https://")
# Limits on a video that is copied to the local disk.
_MOST_BYTES, _MOST_SECONDS = 16 << 30, 3600.0
# Seconds after which a copy looks whether it is to stop.
_LOOK_EVERY = 0.1


@dataclass
class Row:
    """
    A video of a data set.

    Args:
        name (`str`): Its path in the data set, or for a video within a table its place there.
        address (`str`): Where it lies, or `""`.
        data (`bytes`): Its file, if it is within a table.
        fault (`str`): Why it cannot be fetched, or `""`.
        is_trusted (`bool`): Whether it may be fetched from a private network: the user allows its address.
    """

    name: str
    address: str = ""
    data: bytes = b""
    fault: str = ""
    is_trusted: bool = False


class DataSet:
    """
    A data set with a column of videos, or of their paths or URLs. Its rows are streamed.

    Args:
        source (`str`): `hf://datasets/OWNER/NAME`, with `@REVISION` for another than the main branch, or a folder.
        split (`str`, *optional*): The split, by default the only one.
        column (`str`, *optional*): The column, by default the only one of videos, or the one named `video`.
        video_root (sequence of `str`, *optional*): Folders, and beginnings of URLs, outside the data set that its rows
            may name.

    Raises:
        `ImportError`: If the library `datasets` is missing.
        `ValueError`: If there is no such data set, split or column.
    """

    def __init__(self, source: str, split: str | None, column: str | None, *, video_root: Sequence[str] = ()) -> None:
        try:
            import datasets
        except ImportError:
            raise ImportError('A data set needs `datasets`: `pip install -e ".[train]"` in the checkout.') from None
        found = _ADDRESS.fullmatch(source)
        if source.startswith(HUB) and found is None:
            raise ValueError(f"'{source}' names no data set: write {HUB}OWNER/NAME.")
        self.source = source
        place, revision = (str(Path(source).resolve()), None) if found is None else (found["repo"], found["revision"])
        self.root = place if found is None else f"{HUB}{place}@{revision or 'main'}"
        self.files = NamedFiles(Path(place) if found is None else place, video_root, option="--video-root")
        try:
            splits = load_builder(place, self.files, revision=revision).as_streaming_dataset()
        except Exception as error:  # of any library that reads data sets
            raise ValueError(f"The data set '{source}' cannot be read: {in_one_line(error)}") from error
        self.split = _choose("split", split, list(splits), list(splits))
        data = splits[self.split]
        # Files with videos have features, and those of other data sets are in their rows.
        data = data.decode(False) if data.features else data
        features = data.features or next(iter(data), {})
        videos = [name for name, feature in features.items() if isinstance(feature, datasets.Video)]
        self.column = _choose("column", column, list(features), videos or [x for x in features if x == "video"])
        self.data = data.select_columns([self.column])

    @property
    def num_parts(self) -> int:
        """Number of files that can be read independently."""
        return self.data.num_shards

    def rows(self, parts: range | None = None) -> Iterator[Row]:
        """Yield the videos of all or some parts. What a row has decides its name, not who reads it."""
        for part in range(self.num_parts) if parts is None else parts:
            for index, row in enumerate(self.data.shard(self.num_parts, part)):
                yield self._row(row[self.column], f"{self.split}-{part:05d}/{index:06d}")

    def _row(self, value: Any, place: str) -> Row:
        """Return the video of a value: bytes, a path or URL, or both in a dictionary."""
        from videollm_mod.video_opening_videollm_mod import without_secrets

        value = value if isinstance(value, dict) else {"path": value} if isinstance(value, str) else {"bytes": value}
        path, data = value.get("path"), value.get("bytes")
        if data is not None:
            # Tables keep the names of files without their folders, so names alone could be the same.
            return Row(place if path is None else f"{place}-{PurePosixPath(path).name}", data=data)
        if not path:
            return Row(place)
        is_trusted = "://" in path and self.files.allows_url(path)
        try:
            # What other URLs lead to is checked when they are fetched.
            address = path if path.startswith(_REMOTE) else self.files.locate(path)
        except ValueError as error:
            return Row(place, fault=str(error))
        if "://" in address:
            inside = re.sub(rf"^{re.escape(self.root.partition('@')[0])}@[^/]+/", "", address)
            name, unmasked = (
                re.sub(r"^\w+://([^/@]*@)?", "", url).partition("?")[0] for url in (without_secrets(inside), inside)
            )
            # Rows may differ in the query only, or in a part of the path that looks like a password.
            if hidden := inside.partition("?")[2] if name == unmasked else inside:
                stem, suffix = os.path.splitext(name)
                name = f"{stem}-{sha256(hidden.encode('utf-8', 'replace')).hexdigest()[:8]}{suffix}"
            return Row(_inside(name), address, is_trusted=is_trusted)
        inside = PurePosixPath(os.path.relpath(address, self.root) if self.files.is_local else address)
        name = _inside(str(inside)) if ".." in inside.parts else str(inside)
        return Row(name.lstrip("/"), address if os.path.isabs(address) else f"{self.root}/{address}")


def _inside(name: str) -> str:
    """Return a name that is a path below a folder."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _choose(kind: str, given: str | None, known: list[str], candidates: list[str]) -> str:
    if given is not None and given not in known:
        raise ValueError(f"There is no {kind} '{given}': there are {', '.join(known)}.")
    if given is None and len(candidates) != 1:
        raise ValueError(f"Choose one with --{kind}: {', '.join(candidates or known)}.")
    return candidates[0] if given is None else given


class StoppedError(Exception):
    """The work was stopped while a video was copied."""


@contextmanager
def fetched(row: Row, stop: threading.Event | None = None) -> Iterator[Path]:
    """
    Give a file with a video of a data set, for as long as it is needed.

    Args:
        row ([`Row`]): The video.
        stop (`threading.Event`, *optional*): Set to end the copying.

    Raises:
        `ValueError`: If it cannot be fetched.
        [`StoppedError`]: If `stop` was set.
    """
    if not (row.data or row.address):
        raise ValueError(row.fault or f"{row.name} has no video.")
    if row.address and os.path.isfile(row.address):
        yield Path(row.address)
        return
    with _temporary(PurePosixPath(row.name).suffix) as (file, path):
        if row.data:
            file.write(row.data)
        else:
            _copy(row, file, threading.Event() if stop is None else stop)
        file.flush()
        yield path


@contextmanager
def _temporary(suffix: str) -> Iterator[tuple[BinaryIO, Path]]:
    """Give a new file that goes with the block. On Linux it has no name, and goes also if the program is killed."""
    if Path("/proc/self/fd").is_dir():
        with tempfile.TemporaryFile() as file:
            yield file, Path(f"/proc/self/fd/{file.fileno()}")
        return
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        yield file, Path(file.name)


def _copy(row: Row, file: BinaryIO, stop: threading.Event) -> None:
    """Copy a video of the Hub or of another server. A row may not name a server of a private network."""
    from videollm_mod.serving.limits import RequestError
    from videollm_mod.video_opening_videollm_mod import without_secrets

    if row.address.startswith(_REMOTE):
        try:
            asyncio.run(_fetch(row, file, stop))
        except RequestError as error:
            shown = without_secrets(row.address)
            hint = f" If you trust the data set, add --video-root {'/'.join(shown.split('/')[:3])}/"
            message = f"'{shown}' is at a private address.{hint}" if error.code == "private_url" else str(error)
            raise ValueError(message) from None
        return
    import fsspec

    with fsspec.open(row.address, "rb") as remote:
        count = 0
        while chunk := remote.read(1 << 20):
            if stop.is_set():
                raise StoppedError
            count += len(chunk)
            if count > _MOST_BYTES:
                raise ValueError(f"'{row.name}' has more than {_MOST_BYTES} bytes, which is the limit.")
            file.write(chunk)


async def _fetch(row: Row, file: BinaryIO, stop: threading.Event) -> None:
    from videollm_mod.serving.fetching import fetch

    limits = {"most_bytes": _MOST_BYTES, "seconds": _MOST_SECONDS, "allows_private": row.is_trusted}
    task = asyncio.create_task(fetch(row.address, file, **limits))
    # A server may also be silent.
    while not (await asyncio.wait([task], timeout=_LOOK_EVERY))[0]:
        if stop.is_set():
            task.cancel()
            await asyncio.wait([task])
            raise StoppedError
    task.result()


class Rows(Folder):
    """
    The work on a data set; see [`Folder`].

    Args:
        out (`Path`, *optional*): Folder for subtitles.
    """

    def __init__(self, *args: Any, out: Path | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.out = out

    def narrate(self, row: Row) -> Narrated | None:
        """Narrate a row and save what was said. Return `None` if the work was stopped before the end."""
        srt = srt_of(row, self.out)
        if self.stop.is_set():
            return None
        try:
            if self.out is not None:
                with suppress(FileNotFoundError):
                    os.stat(srt)  # its name may be too long
            with fetched(row, self.stop) as path:
                video = Video(path, row.name, srt, formats=VIDEO_FORMATS)
                measure([video])
                done = Narrated(video, fault=video.fault) if video.fault else super().narrate(video)
        except StoppedError:
            return None
        except Exception as error:
            if self.stop.is_set():
                raise
            # A file that cannot be fetched does not end the others.
            done = Narrated(Video(Path(row.name), row.name, srt), fault=in_one_line(error))
        if done is not None:
            # The file was a temporary one.
            done.fault, done.video.path = done.fault.replace(str(done.video.path), row.name), Path(row.name)
        return done


def check_data_set(source: str, out: Path | None) -> None:
    """Raise `ValueError` if a data set is no place to read from, or there is none to write to."""
    from videollm_mod.video_opening_videollm_mod import without_secrets

    if not source.startswith(HUB) and not Path(source).is_dir():
        shown = without_secrets(source)
        raise ValueError(f"--split and --column are for a data set, and '{shown}' is none: write {HUB}OWNER/NAME.")
    if out is None:
        raise ValueError("A data set needs --out, a folder for subtitles.")


def srt_of(row: Row, out: Path | None) -> Path:
    """Return where the subtitles of a row lie."""
    return (out or Path()) / f"{row.name}.srt"


def narrate_data_set(
    source: str,
    name: str,
    revision: str | None,
    *,
    split: str | None,
    column: str | None,
    video_root: Sequence[str],
    out: Path,
    workers: int | None,
    as_json: bool,
    **options: Any,
) -> int:
    """
    Narrate the videos of a data set that have no subtitles yet, several at once.

    Args:
        source, split, column, video_root: See [`DataSet`].
        out (`Path`): Folder for subtitles, or with `workers` for Parquet files with a row for each video.
        workers (`int`, *optional*): Processes of a Ray cluster, by default none.
        name, revision, as_json, options: See [`narrate_folder`].

    Returns:
        `int`: The exit code; see [`narrate_folder`].

    Raises:
        `ValueError`: If there is no such data set.
    """
    results, begin, options = [], clock.monotonic(), options | {"out": out}
    data_set, done = DataSet(source, split, column, video_root=video_root), _Done(out)
    if workers is None:
        work = _run(filter(done.is_left, data_set.rows()), name, revision, **options)
    else:
        from videollm_mod.commands.ray_folder import narrate_rows, read_names

        names = read_names(out)
        done.count = len(names)
        work = narrate_rows(data_set, names, name, revision, workers=workers, **options)
    try:
        with closing(work):
            for result in work:
                results.append(result)
                print_result(result, as_json)
    except KeyboardInterrupt:
        typer.echo("\nstopped: the same command goes on", err=True)
        return 130
    if done.count:
        typer.echo(f"{counted(done.count, 'video')} narrated before", err=True)
    elif not results:
        raise ValueError(f"There is no video in '{source}'.")
    if done.num_repeated:
        typer.echo(f"{counted(done.num_repeated, 'row')} named a video again", err=True)
    if results:
        print_end(results, clock.monotonic() - begin)
    return int(any(result.fault for result in results))


class _Done:
    """Which rows have subtitles already, and how many it was asked about. Rows may name a video again."""

    def __init__(self, out: Path) -> None:
        self.out, self.count, self.num_repeated = out, 0, 0
        self._names: set[str] = set()

    def is_left(self, row: Row) -> bool:
        if row.name in self._names:
            self.num_repeated += 1
            return False
        self._names.add(row.name)
        is_done = os.path.exists(srt_of(row, self.out))
        self.count += is_done
        return not is_done


def _run(
    rows: Iterator[Row],
    name: str,
    revision: str | None,
    *,
    out: Path,
    streams: int | None,
    query: str | None,
    fps: float,
    compile: bool | None,
    **options: Any,
) -> Iterator[Narrated]:
    """Yield what became of each row as it ends. A row is read when there is a stream for it."""
    from tqdm import tqdm

    first = next(rows, None)
    if first is None:
        return
    engine, options = open_engine(name, revision, (), streams=streams, fps=fps, compile=compile, **options)
    stop = threading.Event()
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit=" frames", file=sys.stderr, disable=None))
        threads = stack.enter_context(ThreadPoolExecutor(engine.max_streams, thread_name_prefix="narrate_data_set"))
        stack.enter_context(engine)
        # However this ends, threads that still read must end too.
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        stack.callback(stop.set)
        work = Rows(engine, query, fps=fps, stop=stop, progress=bar, save=write_srt, out=out, **options)
        left: set[Future] = {threads.submit(work.narrate, first)}
        while left:
            left |= {threads.submit(work.narrate, row) for row in islice(rows, engine.max_streams - len(left))}
            finished, left = wait(left, return_when=FIRST_COMPLETED)
            for done in finished:
                if (result := done.result()) is not None:
                    with bar.external_write_mode():
                        yield result
            if not left and (row := next(rows, None)) is not None:
                left = {threads.submit(work.narrate, row)}


__all__ = ["HUB", "DataSet", "Row", "Rows", "check_data_set", "fetched", "narrate_data_set", "srt_of"]
