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


_BOM = b"\xef\xbb\xbf"


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file after its byte order mark, and name the file in errors of the parser."""
    with path.open("rb") as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        try:
            yield file
        except (ijson.JSONError, UnicodeDecodeError) as error:
            # The parser shows the place on a second line.
            reason = " ".join(str(error).partition("(right here)")[0].split()) or type(error).__name__
            raise ValueError(f"'{path}' is not JSON in UTF-8: {reason}") from None


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


def take_time(entry: Mapping[str, Any], key: str, notes: Notes, where: str, field: str) -> float | None:
    """Return a time in seconds. Note a time that is text, and leave out an entry that has none."""
    value, number = entry.get(key), to_number(entry.get(key))
    place = f"{field}.{key}" if field else key
    if number is None:
        notes.leave_out(where, place, "there is no time" if value is None else "the time is not a number")
    elif isinstance(value, str):
        notes.mended(where, place, "a time written as text: read as a number")
    return number


def take_span(
    entry: Mapping[str, Any], keys: tuple[str, str], notes: Notes, where: str, field: str
) -> tuple[float, float] | None:
    """Return start and end in seconds. Leave out an entry without both, and one that does not end after its start."""
    start, end = (take_time(entry, key, notes, where, field) for key in keys)
    if start is None or end is None:
        return None
    if end <= start:
        notes.leave_out(where, field, "it ends where it starts" if end == start else "it ends before it starts")
        return None
    return start, end


def take_text(entry: Mapping[str, Any], key: str, notes: Notes, where: str, field: str) -> str | None:
    """Return text with single spaces. Leave out an entry that has none."""
    text = to_text(entry.get(key))
    if text is None:
        notes.leave_out(where, f"{field}.{key}" if field else key, "there is no text")
    return text
