# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Files that a program writes: what cannot be written is found before any work, and nothing written before is lost."""

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path


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
            raise ValueError(f"{option} cannot write '{path}': {getattr(error, 'strerror', None) or error}.") from None


def path_from(folder: Path, path: str | Path) -> str:
    """Return the path of a file as seen from a folder. A file that is a link keeps its own name."""
    path = Path(path)
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def write_text(path: Path, text: str) -> None:
    """
    Write a text file. An existing file is replaced when the new one is complete.

    Raises:
        `OSError`: If it cannot be written. An existing file stays as it is.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")  # a pipe or a device
        return
    part = _part(target)
    try:
        with open(part, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


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
    # Threads of one process may write to one folder.
    return target.with_name(f".{os.getpid()}.{threading.get_ident()}.part")


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two names are of one file, also if it is still to be written."""
    try:
        return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, RuntimeError, ValueError):  # a name that is too long, or a link to itself
        return False
