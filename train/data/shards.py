# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Write rows of timed messages as Parquet files of limited size, which `datasets` reads as a stream.

```bash
python train/data/shards.py features shards --embed_features
```

`truth` becomes JSON text, because Parquet would give every row the keys of all others. Frame features stay files
beside the rows, or become bytes within them.
"""

import videollm_mod.train  # isort: skip  # noqa: F401 (it names packages that are missing)

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.py_utils import convert_file_size_to_int

from videollm_mod.outputs import copy_file, naming_full_disk, path_from
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.data.faults import WHERE, counted
from videollm_mod.train.data.feature_files import StoredFeatures


_MESSAGE = {"role": pa.string(), "content": pa.string(), "time": pa.float64(), "learn": pa.bool_()}
_COLUMNS = {
    "id": pa.string(),
    "task": pa.string(),
    "video": pa.string(),
    "frame_features": pa.string(),
    "start": pa.float64(),
    "end": pa.float64(),
    "messages": pa.list_(pa.struct(_MESSAGE)),
    "truth": pa.string(),
}
# Bytes that a group of rows may take in memory before it is written. To read the features of a row, a group is read.
_GROUP = 1 << 23


class ShardWriter:
    """
    Write the rows of a split, in order, into `<split>-00000-of-00003.parquet` and so on. A context manager: the files
    get their names at its end, if no error was raised, and replace earlier files of the split.

    Args:
        folder (`Path`): Folder of the files.
        split (`str`): Name of the split.
        max_shard_size (`str`, *optional*, defaults to `"500MB"`): Size after which a new file begins, before
            compression.
        embed_features (`bool`, *optional*, defaults to `False`): Whether `frame_features` holds the content of its
            files in place of their paths.

    Raises:
        `ValueError`: If the size is none.
    """

    def __init__(
        self, folder: Path, split: str, *, max_shard_size: str = "500MB", embed_features: bool = False
    ) -> None:
        self.folder, self.split, self.most = folder, split, shard_size(max_shard_size)
        self.embeds = embed_features
        kinds = _COLUMNS | ({"frame_features": pa.binary()} if embed_features else {})
        self.schema = pa.schema(kinds)
        self.parts: list[Path] = []
        self.rows: list[dict[str, Any]] = []
        self.num_bytes = self.num_in_shard = 0
        self.file: pq.ParquetWriter | None = None

    def __enter__(self) -> "ShardWriter":
        # A run that was killed leaves its parts.
        for part in self.folder.glob(f".{self.split}-*.parquet.part"):
            part.unlink()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with suppress(OSError) if kind is not None else nullcontext():
                self._flush()
                self._end_shard()
            if kind is None:
                for old in shards(self.folder, self.split):
                    old.unlink()
                # Until the last file has its name, `check_shards` refuses the others.
                for index, part in enumerate(self.parts):
                    part.replace(self.folder / f"{self.split}-{index:05d}-of-{len(self.parts):05d}.parquet")
        finally:
            for part in self.parts:
                part.unlink(missing_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """
        Write a row.

        Raises:
            `ValueError`: If it has a key that rows of timed messages do not have.
        """
        row = {name: value for name, value in row.items() if name != WHERE and value is not None}
        if unknown := sorted(set(row) - set(_COLUMNS)):
            raise ValueError(f"row {row.get('id', '')!r} has the key {unknown[0]!r}. Put it into `truth`.")
        if "truth" in row:
            row["truth"] = json.dumps(row["truth"], ensure_ascii=False)
        features = row.pop("frame_features", None)
        size = len(json.dumps(row, ensure_ascii=False))
        if features is not None:
            is_path = self.embeds and not isinstance(features, bytes)
            row["frame_features"] = Path(features).read_bytes() if is_path else features
            size += len(row["frame_features"])
        self.rows.append(row)
        self.num_bytes, self.num_in_shard = self.num_bytes + size, self.num_in_shard + size
        if self.num_bytes >= min(_GROUP, self.most):
            self._flush()
        if self.num_in_shard >= self.most:
            self._end_shard()

    def _flush(self) -> None:
        """Write the rows that wait, as a group of rows."""
        if self.file is None and self.rows:
            self.parts.append(self.folder / f".{self.split}-{len(self.parts):05d}.parquet.part")
        if self.rows:
            with naming_full_disk(self._place):
                self.file = self.file or pq.ParquetWriter(self.parts[-1], self.schema)
                self.file.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows, self.num_bytes = [], 0

    def _end_shard(self) -> None:
        if self.file is not None:
            with naming_full_disk(self._place):
                self.file.close()
        self.file, self.num_in_shard = None, 0

    @property
    def _place(self) -> Path:
        return self.folder / f"{self.split}-{len(self.parts) - 1:05d}.parquet"


def shard_size(text: str) -> int:
    """Return a size such as "500MB" in bytes. Raises `ValueError` for other text."""
    try:
        size = convert_file_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError(f"'{text}' is no size of a file, such as 500MB.")
    return size


def shards(folder: Path, split: str) -> list[Path]:
    """Return the Parquet files of a split, in order."""
    return sorted(path for path in folder.glob("*.parquet") if path.stem == split or path.stem.startswith(f"{split}-"))


def check_shards(files: Iterable[Path]) -> None:
    """Raise `ValueError` if some of the files that belong together are missing, as after a run that was killed."""
    found: dict[tuple[str, str], int] = {}
    for path in files:
        if name := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.stem):
            found[name.groups()] = found.get(name.groups(), 0) + 1
    for (split, total), count in found.items():
        if count != int(total):
            raise ValueError(f"The split {split!r} has {count} of {int(total)} Parquet files: write or copy it again.")
    if len(found) > 1 and len({split for split, _ in found}) < len(found):
        raise ValueError("A split has Parquet files of two runs: remove those of one.")


@contextmanager
def describing(source: Path, folder: Path) -> Iterator[None]:
    """
    Copy `about.json` of a source into a folder after its rows are written there. An `about.json` of another source is
    removed before: if the program is killed in between, no rows have the licence of others.
    """
    theirs, ours = source / "about.json", folder / "about.json"
    if not (theirs.is_file() and ours.is_file() and theirs.read_bytes() == ours.read_bytes()):
        ours.unlink(missing_ok=True)
    yield
    if theirs.is_file():
        copy_file(theirs, ours)


def write_shards(rows: Iterable[dict[str, Any]], folder: Path, split: str, **options: Any) -> int:
    """Write rows as [`ShardWriter`] does, with its options. Return their number."""
    count = 0
    with ShardWriter(folder, split, **options) as writer:
        for row in rows:
            writer.write(row)
            count += 1
    return count


def read_shards(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """
    Yield the rows of Parquet files in order. Frame features within them stay there, as [`StoredFeatures`].

    Args:
        files (sequence of `str`): Paths, or addresses that `fsspec` opens, such as "hf://datasets/ID/FILE".

    Raises:
        `ValueError` or `OSError`: If a file cannot be read.
    """
    for file in files:
        with fsspec.open(file, "rb") as opened:
            try:
                yield from _read_shard(file, pq.ParquetFile(opened))
            except pa.ArrowInvalid as error:
                raise ValueError(f"'{file}' is not Parquet: {str(error).splitlines()[0]}") from None


def _read_shard(file: str, table: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    fields = {field.name: field.type for field in table.schema_arrow}
    is_inside = fields.get("frame_features") in (pa.binary(), pa.large_binary())
    names = [name for name in fields if not (is_inside and name == "frame_features")]
    for group in range(table.num_row_groups):
        batches = table.iter_batches(row_groups=[group], columns=names)
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            if is_inside and row.get("video") is None:
                row["frame_features"] = StoredFeatures(file, group, index)
            yield row


def split_names(folder: Path) -> list[str]:
    """Return the splits of a folder of timed messages, by the names of its files."""
    files = [path for path in sorted(folder.glob("*.*")) if path.suffix.lower() in (".jsonl", ".parquet")]
    return list(dict.fromkeys(path.stem.partition("-")[0] for path in files))


def _has_features(rows: Sequence[dict[str, Any]]) -> bool:
    return any(rows[index].get("frame_features") is not None for index in range(len(rows)))


def _near(rows: Sequence[dict[str, Any]], out: Path, embed_features: bool) -> Iterator[dict[str, Any]]:
    """Yield rows with paths that begin at another folder, but for those of features that will be read."""
    for index in range(len(rows)):
        row = rows[index]
        for name in ("video",) if embed_features else ("video", "frame_features"):
            if isinstance(row.get(name), str) and os.path.isabs(row[name]):
                row = {**row, name: path_from(out, row[name])}
        yield row


def main() -> None:
    """Convert a folder."""
    from videollm_mod.train.data.timed_messages import VIDEO_ROOT_HELP, load_timed_messages

    parser = CommandLineParser(description="Convert a folder of timed messages to Parquet files.")
    parser.add_argument("folder", type=Path, help="folder with JSON lines or Parquet files, one or more per split")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--max_shard_size", default="500MB", help="size of a file, before compression")
    parser.add_argument("--video_root", nargs="+", default=(), help=VIDEO_ROOT_HELP)
    parser.add_argument("--embed_features", action="store_true", help="put frame features into the rows")
    options = parser.parse_args()
    write = {"max_shard_size": options.max_shard_size, "embed_features": options.embed_features}
    try:
        splits = split_names(options.folder)
        if not splits:
            raise ValueError(f"'{options.folder}' has no .jsonl and no .parquet file.")
        if options.out.resolve() == options.folder.resolve():
            raise ValueError(f"'{options.out}' is the folder to convert: write to another.")
        options.out.mkdir(parents=True, exist_ok=True)
        with describing(options.folder, options.out):
            for split in splits:
                rows = load_timed_messages(options.folder, split, video_root=options.video_root)
                if options.embed_features and not _has_features(rows):
                    raise ValueError(
                        f"--embed_features: the rows of {split!r} have no features. train/encode.py makes them."
                    )
                rows = _near(rows, options.out, options.embed_features)
                print(f"{split}: {counted(write_shards(rows, options.out, split, **write), 'row')}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
