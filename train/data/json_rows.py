# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Read rows from JSON Lines files, and from JSON files with one array.

The files are read once, for the places of their rows. A row is parsed when it is used, so memory stays small, each row
keeps its own types, and a fault concerns one row. Arrow's reader would give all rows one schema, and a line that is
not an object can kill it.
"""

import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from videollm_mod.outputs import naming_full_disk
from videollm_mod.train.data.faults import WHERE, FaultyRowError


# Bytes of the longest row. A longer one is not a dialogue.
LONGEST_ROW = 1 << 25
# Bytes of the longest array, which is read at once.
LONGEST_ARRAY = 1 << 30
_BOM = b"\xef\xbb\xbf"
# An escape of JSON: both halves of a character, one half, or any other. Only a half has this size in bytes.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)", re.DOTALL
)
_HALF_SIZE = 6
# The beginning of both halves, or of one, at the end of a piece.
_UNFINISHED = re.compile(
    rb"\\(?:u(?:[dD][0-9a-fA-F]{0,2}|[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)?)?\Z"
)
_PLACE = ("file", "line", "begin", "size")


def index_rows(files: Sequence[Path], change: Callable[[dict[str, Any]], dict[str, Any]]) -> Dataset:
    """
    Return the rows of JSON files as a data set. Blank lines are no rows.

    Reading a row that is not a JSON object raises [`FaultyRowError`], which names the file and line.

    Args:
        files (sequence of `Path`): JSON Lines files, or files with one array of rows.
        change (`Callable`): Takes a row, and returns it changed.

    Raises:
        `ValueError`: If an array is not JSON, or if it is too long.
    """
    places = {name: array("q") for name in _PLACE}
    for number, path in enumerate(files):
        for place in _find_elements(path) if _is_array(path) else _find_lines(path):
            for name, value in zip(_PLACE, (number, *place), strict=True):
                places[name].append(value)
    columns = {name: np.frombuffer(values, dtype=np.int64) for name, values in places.items()}
    return Dataset.from_dict(columns).with_transform(_Rows(files, change))


class LineWriter:
    """
    Write rows as JSON lines. A context manager: the file gets its name at its end, if no error was raised. Until then
    its name begins with a dot, so that `datasets` does not read what a killed program left.

    Args:
        path (`Path`): The file. An earlier one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> "LineWriter":
        self.file = self.part.open("w", encoding="utf-8")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with naming_full_disk(self.path):
                self.file.close()
                if kind is None:
                    self.part.replace(self.path)
        finally:
            self.part.unlink(missing_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """Write a row. Raises [`FullDiskError`] if the disk is full."""
        with naming_full_disk(self.path):
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")


class _Rows:
    """Parse rows at their places. This is the transform of a data set of places."""

    def __init__(self, files: Sequence[Path], change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.files = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        self.change = change

    def __call__(self, places: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self._read(*place) for place in zip(*(places[name] for name in _PLACE), strict=True)]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    def _read(self, number: int, line: int, begin: int, size: int) -> dict[str, Any]:
        path, *written = self.files[number]
        where = f"'{path}', line {line}"
        if size > LONGEST_ROW:
            raise FaultyRowError(f"{where}: has {size:,} bytes. A row has at most {LONGEST_ROW:,}.")
        with path.open("rb") as file:
            now = os.fstat(file.fileno())
            if [now.st_size, now.st_mtime_ns] != written:
                raise FaultyRowError(f"'{path}' was changed while it was in use. Run the command again.")
            file.seek(begin)
            return self.change({**parse_row(file.read(size), where), WHERE: where})


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """
    Parse a row.

    Args:
        line (`bytes`): A JSON object in UTF-8.
        where (`str`): File and line, for errors.

    Raises:
        [`FaultyRowError`]: If this is not one object, if a key is there twice, or if text is not Unicode.
    """
    try:
        text = line.removeprefix(_BOM).decode()
        row = json.loads(text, object_pairs_hook=_with_single_keys)
    except UnicodeDecodeError as error:
        place, byte = error.start + 1, line[error.start]
        message = f", byte {place}: not UTF-8 (0x{byte:02x}). Save the file as JSON lines in UTF-8."
    except json.JSONDecodeError as error:
        message = f", column {error.colno}: not JSON: {error.msg}. Each line is one row."
    except RecursionError:
        message = ": lists and objects are nested too deeply."
    except ValueError as error:
        # Python's own message would name a setting of the interpreter.
        message = ": a number has too many digits." if "digits" in str(error) else f": {error}"
    else:
        kind = "null" if row is None else type(row).__name__
        message = None if isinstance(row, dict) else f": a row is an object with messages and a video, got {kind}."
        if message is None and "\\u" in text and (half := _half_character(row)):
            message = f": {half!a} is half of a character (a lone surrogate). Remove it."
    if message is not None:
        raise FaultyRowError(where + message)
    return row


def mend_halves(data: bytes) -> bytes:
    """
    Replace each half of a character (a lone surrogate) in JSON by U+FFFD, the sign for a character that is unknown.

    Python reads halves and cannot write them, and the parser of streams changes or refuses them. The length stays, so
    errors name the same places.

    Example: `mend_halves(rb'"a \\ud83d"')` is `rb'"a \\ufffd"'`.
    """
    if b"\\ud" not in data and b"\\uD" not in data:
        return data
    return _ESCAPE.sub(lambda found: rb"\ufffd" if len(found[0]) == _HALF_SIZE else found[0], data)


def unfinished_escape(data: bytes) -> int:
    """Return where an escape begins that may go on after the end of a piece of JSON, or the length if none does."""
    found = _UNFINISHED.search(data)
    if found is None:
        return len(data)
    begin = found.start()
    # After an odd number of backslashes, this one is what the one before it escapes.
    return begin if (begin - len(data[:begin].rstrip(b"\\"))) % 2 == 0 else len(data)


def _with_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there {names.count(twice)} times in one object. Keep one of them.")
    return found


def _half_character(row: dict[str, Any]) -> str | None:
    """Return a surrogate without its other half, if there is one."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return error.object[error.start]
    return None


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    return head.startswith(b"[")


def _find_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield number, first byte and size of each line that is not blank."""
    number, begin = 1, 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_ROW + 1):
            size, is_blank = len(line), not line.removeprefix(_BOM).strip()
            while not line.endswith(b"\n") and (line := file.readline(LONGEST_ROW + 1)):
                size, is_blank = size + len(line), is_blank and not line.strip()
            if not is_blank:
                yield number, begin, size
            number, begin = number + 1, begin + size


def _find_elements(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield line, first byte and size of each element of an array. If text follows the array, yield lines instead."""
    if path.stat().st_size > LONGEST_ARRAY:
        raise ValueError(f"'{path}' is too long for one array. Write JSON lines: jq -c '.[]' {path} > rows.jsonl")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        yield from _find_lines(path)
        return
    found = list(_walk_array(path, text))
    yield from _find_lines(path) if found and found[-1] is None else found


def _walk_array(path: Path, text: str) -> Iterator[tuple[int, int, int] | None]:
    """Yield line, first byte and size of each element, then `None` if the text goes on after the array."""
    decoder, line, byte, counted = json.JSONDecoder(), 1, 0, 0
    at = _skip_space(text, text.index("[") + 1)
    try:
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            line, byte = line + text.count("\n", counted, at), byte + len(text[counted:at].encode())
            size = len(text[at:end].encode())
            yield line, byte, size
            line, byte, counted = line + text.count("\n", at, end), byte + size, end
            at = _skip_space(text, end)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = at if text[at] == "]" else _skip_space(text, at + 1)
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from None
    except RecursionError:
        raise ValueError(f"'{path}': lists and objects are nested too deeply.") from None
    if text[at + 1 :].strip():
        yield None


def _skip_space(text: str, at: int) -> int:
    return re.compile(r"\s*").match(text, at).end()
