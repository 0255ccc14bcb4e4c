# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""User mistakes: programs end with one line that says what to do, and not with a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """
    Print a user's mistake as one line on stderr and exit with code 1.

    Other exceptions pass through, since they are faults of the program and need their traceback.
    """
    try:
        yield
    except Exception as error:
        if not _is_mistake(error):
            raise
        sys.stderr.write(f"error: {in_one_line(error)}\n")
        raise SystemExit(1) from None


def in_one_line(error: BaseException) -> str:
    """Return the line of an error message that helps the user most."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ModuleNotFoundError):
        return f'{lines[0]}. `pip install -e ".[train]"` in the checkout installs what training and conversion need.'
    if _is_a("huggingface_hub.errors", "StrictDataclassError", error):
        # The validator's name comes first, and the reason last.
        return lines[-1].strip().removeprefix("ValueError: ")
    if _is_a("safetensors", "SafetensorError", error):
        return f"The weights are not a complete safetensors file ({lines[0]}). Copy or download them again."
    # Libraries may write a paragraph. Its first line says what went wrong.
    return lines[0]


def _is_mistake(error: Exception) -> bool:
    return (
        isinstance(error, (ValueError, OSError, ImportError))
        or _is_a("huggingface_hub.errors", "StrictDataclassError", error)
        or _is_a("safetensors", "SafetensorError", error)
    )


def _is_a(module: str, name: str, error: BaseException) -> bool:
    """Whether an error is of a library's class. If the library was never imported, it is not."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)
