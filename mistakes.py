# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""User mistakes: programs end with one line that says what to do, and not with a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from videollm_mod.console import visible

from videollm_mod.space.checkpoint_faults import in_one_line, is_a


@contextmanager
def one_line_errors() -> Iterator[None]:
    """
    Print a user's mistake as one line on stderr and exit with code 1.

    Other exceptions pass through, since they are faults of the program and need their traceback.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of the output, such as `head`, has enough. Python would complain about the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if not _is_mistake(error):
            raise
        sys.stderr.write(f"error: {visible(in_one_line(error))}\n")
        raise SystemExit(1) from None


def _is_mistake(error: Exception) -> bool:
    return (
        isinstance(error, (ValueError, OSError, ImportError))
        or is_a("huggingface_hub.errors", "StrictDataclassError", error)
        or is_a("safetensors", "SafetensorError", error)
    )
