# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write the files of a program: check first that they can be written, and lose nothing that was written before."""

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Of a full disk, a full quota, and a file system or process that limits the size of a file.
_FULL = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
# What a folder without permission to write says, and one that is mounted for reading only.
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = "Allow writing there or choose another folder."


class FullDiskError(OSError):
    """A file cannot be written because the disk is full. The message names the file and says what to do."""


def check_outputs(outputs: Mapping[str, Path], *sources: str | Path) -> None:
    """
    Check that files can be written, and leave them as they are.

    Args:
        outputs (`Mapping[str, Path]`): Files by the option that names them.
        sources (`str` or `Path`): Files that must not be overwritten.

    Raises:
        `ValueError`: If a file cannot be written, if two options name one file, or if it is one of the sources.
    """
    for option, path in outputs.items():
        if any(_is_same(path, Path(source)) for source in sources):
            raise ValueError(f"'{path}' is an input: write to another file.")
        twin = next((other for other, theirs in outputs.items() if other != option and _is_same(path, theirs)), None)
        if twin is not None:
            raise ValueError(f"{option} and {twin} both name '{path}': write to two files.")
        try:
            _try(path)
        except (OSError, RuntimeError) as error:  # the latter for links that lead to themselves
            advice = f" {_ADVICE}" if getattr(error, "errno", None) in _DENIED else ""
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"{option} cannot write '{path}': {why}.{advice}") from None


def path_from(folder: Path, path: str | Path) -> str:
    """Return the path of a file as seen from a folder. A file that is a link keeps its own name."""
    path = Path(path)
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Give the name of a new file, which replaces another one when the block ends. After an error the new file is
    removed, and the other one stays as it is. A program that is killed leaves the new file. Its name begins with a
    dot and ends with ".part", so that nothing reads it.

    Args:
        path (`str` or `Path`): The file to replace, if it exists.

    Raises:
        [`FullDiskError`]: If the disk is full.
        `OSError`: If the file cannot be written.
    """
    target = Path(path).resolve()
    part = _part(target)
    try:
        with naming_target(path, part), naming_full_disk(path):
            part.unlink(missing_ok=True)  # of a killed program with the same number
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, part)
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """
    Write a text file. An existing file is replaced when the new one is complete.

    Raises:
        `OSError`: If it cannot be written. An existing file stays as it is.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        with naming_full_disk(path):
            target.write_text(text, encoding="utf-8")  # a pipe or a device
        return
    with replacing(path) as part, open(part, "x", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, as [`write_text`] does."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def save_figure(figure: Any, path: str | Path) -> None:
    """Save a figure of Matplotlib in the format of the suffix. An existing file is replaced when it is complete."""
    with replacing(path) as part:
        figure.savefig(part, format=Path(path).suffix[1:])


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file. An existing one is replaced when the copy is complete."""
    with replacing(path) as part:
        shutil.copyfile(source, part)


def append_line(path: str | Path, line: str) -> None:
    """
    Append a line to a file in one write, so that processes do not mix theirs. Part of a line that a killed program
    left gets its own line.

    Raises:
        [`FullDiskError`]: If the disk is full. The file may then end with a part of the line.
    """
    with naming_full_disk(path), open(path, "a+b", buffering=0) as file:
        end, content = file.seek(0, os.SEEK_END), line.encode() + b"\n"
        if end:
            file.seek(end - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        if file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def complete_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, without parts of lines that a killed program left."""
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def sync(path: str | Path) -> None:
    """
    Wait until a file, or the names in a folder, are on the disk, so that a power failure does not lose them.

    Args:
        path (`str` or `Path`): The file or folder. Files in a folder are files of their own: see [`sync_all`].

    Raises:
        `OSError`: If the disk fails. A system that cannot do this for folders is no fault.
    """
    is_folder = os.path.isdir(path)
    try:
        file = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def sync_all(folder: str | Path) -> None:
    """Wait until all that a folder holds is on the disk, as [`sync`] does. Its own name is in the folder above."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(place, name))
        sync(place)


@contextmanager
def naming_target(path: str | Path, hidden: str | Path) -> Iterator[None]:
    """
    Name a file or folder in errors about the hidden one that is to replace it.

    Args:
        path (`str` or `Path`): What the user has named.
        hidden (`str` or `Path`): The hidden file or folder, or how its name begins.

    Raises:
        `OSError`: If the hidden one cannot be written, with the type and the `errno` of its error.
    """
    try:
        yield
    except OSError as error:
        if not str(error.filename).startswith(str(hidden)):
            raise
        named = type(error)(f"'{path}' cannot be written: {error.strerror}. {_ADVICE}")
        named.errno = error.errno
        raise named from error


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """
    Name a file or folder in errors that mean a full disk.

    Args:
        path (`str` or `Path`): What the block writes.

    Raises:
        [`FullDiskError`]: If the disk is full. Other errors pass through.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if (reason := why_full(error)) is None:
            raise
        raise FullDiskError(
            f"'{path}' cannot be written: {reason}. Free some space or choose another folder, then run the same "
            "command again."
        ) from error


def why_full(error: BaseException) -> str | None:
    """Return the system's words for a full disk, if that is what an error means, whichever library raised it."""
    text = str(error)
    for code, words in _FULL.items():
        if getattr(error, "errno", None) == code or f"(os error {code})" in text:
            return words
    # torch does not say why. Its writer fails once more when it is closed.
    is_of_torch = isinstance(error, RuntimeError) and re.search("inline_container|iostream error", text)
    return "the disk may be full" if is_of_torch else None


def _try(path: Path) -> None:
    """Raise `OSError` if a file, or the file beside it that will replace it, cannot be written."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder '{path.parent}' to write '{path.name}' to.")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder: name a file in it.")
    target = path.resolve()
    if target.exists() and not target.is_file():
        return
    is_new = not target.exists()
    with open(target, "ab"):
        pass
    if is_new:
        target.unlink()
    part = _part(target)
    try:
        with open(part, "xb") as file:
            file.write(bytes(4096))
    finally:
        part.unlink(missing_ok=True)


def _part(target: Path) -> Path:
    # Threads of one process may write to one folder. A name has at most 255 bytes.
    return target.with_name(f".{os.getpid()}.{threading.get_ident()}.part")


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two names are of one file, also if it is still to be written."""
    try:
        return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, RuntimeError, ValueError):  # a name that is too long, or a link to itself
        return False
