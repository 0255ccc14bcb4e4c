# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Converters of published checkpoints, one file per family, and what they share.

Nothing here imports torch or Transformers at the top, so that `--help` answers at once.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from videollm_mod.outputs import naming_full_disk


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """
    Give a temporary folder that becomes `out` when the block ends. After an error, nothing is left.

    Raises:
        `FileExistsError`: If `out` is not empty, or a file. It is raised before the block runs.
    """
    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise FileExistsError(f"'{parent}' is a file. Choose another folder.")
    if out.exists():
        if any(out.iterdir()):
            raise FileExistsError(f"'{out}' is not empty. Choose another folder.")
        parent = out.absolute().parent
    with tempfile.TemporaryDirectory(dir=parent) as place:
        with naming_full_disk(out):
            yield Path(place) / "out"
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        shutil.move(Path(place) / "out", out)
