# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Converters of published checkpoints, one file per source, and what they share.

Nothing here imports torch or Transformers at the top, so that `--help` answers at once.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Types that weights can be saved in.
DTYPES = ("float32", "bfloat16", "float16")


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every converter has."""
    parser.add_argument("--dtype", choices=DTYPES, help="type of all weights; default: the type they have")
    parser.add_argument(
        "--mod_layers",
        metavar="LAYERS",
        help="which layers to route: the name of a scheme, such as interleaved, or indices, such as 1,3,5",
    )
    parser.add_argument(
        "--mod_keep_ratio",
        type=float,
        metavar="RATIO",
        help="share of a frame's tokens that routed layers keep; default without --mod_layers: 1, full compute",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """
    Give a temporary folder that becomes `out` when the block ends. After an error, nothing is left.

    Raises:
        `FileExistsError`: If `out` is not empty. It is raised before the block runs.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"'{out}' is not empty. Choose another folder.")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=parent) as place:
        yield Path(place) / "out"
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        shutil.move(Path(place) / "out", out)
