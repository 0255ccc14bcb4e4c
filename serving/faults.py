# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Find which of several items a fault belongs to, so that the others continue."""

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_parts(
    run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], device: torch.device
) -> list[Result | Exception]:
    """
    Return `run(items)`. If it fails, run each half of the items, down to single items.

    An item that fails without others has its error in place of its result. If memory ran out, torch's unused memory
    is freed first, and a single item is tried once more.

    Args:
        run (`Callable`): Returns one result per item. It must change nothing if it raises.
        items (`Sequence`): What to run.
        device (`torch.device`): The device that it runs on.

    Raises:
        `Exception`: If the device has failed, so that nothing can run on it.
    """
    outcome = _try(run, items, device)
    if len(items) == 1 and isinstance(outcome, (torch.OutOfMemoryError, MemoryError)):
        forget(outcome)
        outcome = _try(run, items, device)
    if isinstance(outcome, list):
        return outcome
    if len(items) == 1:
        return [outcome]
    forget(outcome)
    middle = len(items) // 2
    return [result for half in (items[:middle], items[middle:]) for result in run_in_parts(run, half, device)]


def _try(
    run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], device: torch.device
) -> list[Result] | Exception:
    """Return the results, or the error without the memory that it holds."""
    try:
        return list(run(items))
    except Exception as caught:
        error = caught
    traceback.clear_frames(error.__traceback__)  # tensors of the attempt
    if device.type == "cuda":
        # After an illegal access every call fails, and no stream is to blame.
        torch.zeros(1, device=device).item()
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
    return error


def forget(error: BaseException | None) -> str:
    """
    Drop the traceback of an error and of its causes, and return it as text for a log.

    A traceback keeps the local variables of all callers, such as an engine, until garbage collection.
    """
    text = "".join(traceback.format_exception(error)) if error is not None and error.__traceback__ else ""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    return f"\n{text}" if text else ""


__all__ = ["forget", "run_in_parts"]
