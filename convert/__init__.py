# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Converters of published checkpoints, one file per family, and what they share.

Nothing here imports torch or Transformers at the top, so that `--help` answers at once.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from videollm_mod.outputs import naming_full_disk, naming_target


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """
    Give a temporary folder that becomes `out` when the block ends. After an error, nothing is left.

    A folder that is there already, such as a mount point or the working directory, stays and is filled.

    Raises:
        `FileExistsError`: If `out` is not empty, or a file. It is raised before the block runs.
        `OSError`: If `out` cannot be written, likewise.
    """
    target = out.resolve()
    parent = next(path for path in (target, *target.parents) if path.exists())
    if not parent.is_dir():
        raise FileExistsError(f"'{parent}' is a file. Choose another folder.")
    if parent == target and any(target.iterdir()):
        raise FileExistsError(f"'{out}' is not empty. Choose another folder.")
    hidden = parent / ".converting-"
    with naming_target(out, hidden), tempfile.TemporaryDirectory(dir=parent, prefix=hidden.name) as place:
        made = Path(place) / "out"
        with naming_full_disk(out):
            yield made
        if parent != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.rename(target)
            return
        # Without its configuration, a folder is no checkpoint.
        for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(target / path.name)


def with_name(out: Path) -> Path:
    """Return a path whose last part is the folder's name, also for `.` and `..`."""
    return out if out.name not in ("", "..") else out.resolve()
