# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Training on streaming dialogues."""

import sys
from pathlib import Path
from types import TracebackType


# What Python calls the packages of the extra `train`, and what they bring along that our scripts import.
_EXTRA = {"charset_normalizer", "datasets", "evaluate", "fsspec", "ijson", "matplotlib", "nltk", "openai", "openpyxl"}
_EXTRA |= {"pandas", "peft", "pyarrow", "pysubs2", "rapidfuzz", "sacrebleu", "scipy", "tensorboard", "trackio", "trl"}


def _name_extra(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print which package of the extra `train` is missing as one line. Other errors keep their traceback."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] not in _EXTRA:
        sys.__excepthook__(kind, error, traceback)
        return
    from videollm_mod.space.checkpoint_faults import in_one_line

    sys.stderr.write(f"error: {in_one_line(error)}\n")


# A script of this folder imports libraries before its `main` can report anything. Other programs are left alone.
_program = getattr(sys.modules["__main__"], "__file__", None)
if _program is not None and Path(_program).resolve().is_relative_to(Path(__file__).resolve().parent):
    sys.excepthook = _name_extra
