# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Read large JSON files piece by piece, and values of uncertain type from their entries.

One piece is in memory at a time, such as the narrations of one video, however large the file is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ijson

from videollm_mod.train.data.converters import Notes
from videollm_mod.train.data.dialogues import to_number, to_text
from videollm_mod.train.data.json_rows import mend_halves, unfinished_escape


_BOM = b"\xef\xbb\xbf"
# The parser keeps the place of each list and object that it is in, so that its memory grows with the square of this.
_DEEPEST = 200
# Seconds by which a time may lie outside without a note. Files round their times.
TOLERANCE = 0.01
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class _Shallow:
    """
    A file of JSON that raises `ValueError` before it is read deeper than `_DEEPEST` lists and objects. Characters that
    are not whole are mended: see [`mend_halves`].
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._depth, self._is_text, self._escape = file, 0, False, b""
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        data = self._read_whole(size)
        plain = (self._escape + data).replace(rb"\\", b"")
        # What this backslash escapes comes with the next piece.
        self._escape = b"\\" if plain.endswith(b"\\") else b""
        parts = plain.replace(rb"\"", b"").split(b'"')
        outside = b"".join(parts[self._is_text :: 2])
        self._is_text ^= len(parts) % 2 == 0
        brackets = outside.translate(None, _NO_BRACKETS)
        inner = 0
        while brackets != (brackets := brackets.replace(b"[]", b"").replace(b"{}", b"")):
            inner += 1
        opened = brackets.count(b"[") + brackets.count(b"{")
        self._depth += opened - (len(brackets) - opened)
        if max(self._depth, inner) > _DEEPEST:
            raise ValueError("lists and objects are nested too deeply")
        return data

    def _read_whole(self, size: int) -> bytes:
        """Read a piece that ends between two escapes. What is left comes with the next piece."""
        more = self._file.read(size)
        data, self._rest = self._rest + more, b""
        while more and (end := unfinished_escape(data)) < len(data):
            if end:
                data, self._rest = data[:end], data[end:]
                break
            data += (more := self._file.read(size))
        return mend_halves(data)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file after its byte order mark, and name the file in errors of the parser."""
    with path.open("rb") as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        try:
            yield _Shallow(file)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            # The parser shows the place on a second line.
            reason = " ".join(str(error).partition("(right here)")[0].split()) or type(error).__name__
            raise ValueError(f"'{path}' is not JSON in UTF-8: {reason}") from None
        except ValueError as error:
            raise ValueError(f"'{path}': {error}.") from None


def told_split(path: Path, key: str) -> str | None:
    """
    Return the split that a key at the top of a JSON file names, such as "val" or "test_unannotated".

    Returns:
        `str`, *optional*: "train", "validation" or "test", or `None` if the file names none of them.
    """
    try:
        named = str(next(read_values(path, key), "")).removesuffix("_unannotated")
    except ValueError:  # what reads the file next says what is wrong with it
        return None
    return {"train": "train", "val": "validation", "validation": "validation", "test": "test"}.get(named)


def read_values(path: Path, place: str) -> Iterator[Any]:
    """
    Yield the values at a place of a JSON file, one after the other.

    Args:
        path (`Path`): A JSON file.
        place (`str`): Keys joined by dots, with "item" for each element of an array: "videos.item.video_uid".

    Raises:
        `ValueError`: If the file is not JSON. What comes before the error is yielded first.
        `OSError`: If the file cannot be read.
    """
    with _opened(path) as file:
        yield from ijson.items(file, place, use_float=True)


def read_pairs(path: Path, place: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of each entry of the object at a place: "" is the file's own. See [`read_values`]."""
    with _opened(path) as file:
        yield from ijson.kvitems(file, place, use_float=True)


def read_keys(path: Path) -> Iterator[tuple[str, str]]:
    """Yield place and name of each key of a JSON file, in order. See [`read_values`]."""
    with _opened(path) as file:
        yield from ((place, value) for place, event, value in ijson.parse(file) if event == "map_key")


def take_time(entry: Mapping[Any, Any], key: str | int, notes: Notes, where: str, field: str) -> float | None:
    """Return a time in seconds. Note a time that is text, and leave out an entry that has none."""
    value, number = entry.get(key), to_number(entry.get(key))
    place = f"{field}[{key}]" if isinstance(key, int) else f"{field}.{key}" if field else key
    if number is None:
        notes.leave_out(where, place, "there is no time" if value is None else "the time is not a number")
    elif isinstance(value, str):
        notes.mended(where, place, "a time written as text: read as a number")
    return number


def take_span(
    entry: Mapping[Any, Any],
    keys: tuple[str | int, str | int],
    notes: Notes,
    where: str,
    field: str,
    *,
    may_be_empty: bool = False,
) -> tuple[float, float] | None:
    """
    Return start and end in seconds, from 0 on. Leave out an entry without both, and one that does not end after its
    start, or before it with `may_be_empty`. A start up to 0.01 s before the video is 0, without a note.
    """
    start, end = (take_time(entry, key, notes, where, field) for key in keys)
    if start is None or end is None:
        return None
    if end < start or (end == start and not may_be_empty):
        notes.leave_out(where, field, "it ends where it starts" if end == start else "it ends before it starts")
        return None
    if end < 0:
        notes.leave_out(where, field, "it ends before the video")
        return None
    if start < -TOLERANCE:
        notes.mended(where, field, "it starts before the video: moved to its start")
    return max(start, 0.0), end


def take_pair(
    value: Any, notes: Notes, where: str, field: str, *, may_be_empty: bool = False
) -> tuple[float, float] | None:
    """Return start and end of a list of two times. See [`take_span`]."""
    if not isinstance(value, list) or len(value) != 2:
        notes.leave_out(where, field, "there are no two times")
        return None
    return take_span(dict(enumerate(value)), (0, 1), notes, where, field, may_be_empty=may_be_empty)


def take_text(entry: Mapping[str, Any], key: str, notes: Notes, where: str, field: str) -> str | None:
    """Return text with single spaces. Leave out an entry that has none."""
    text = to_text(entry.get(key))
    if text is None:
        notes.leave_out(where, f"{field}.{key}" if field else key, "there is no text")
    return text


def take_objects(values: Any, notes: Notes, where: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and value of each object of a list. Leave out what is no list, and what is no object."""
    if not isinstance(values, list):
        notes.leave_out(where, field, "there is no list")
        return
    for index, value in enumerate(values):
        if isinstance(value, dict):
            yield f"{field}[{index}]", value
        else:
            notes.leave_out(where, f"{field}[{index}]", "the entry is not an object")
