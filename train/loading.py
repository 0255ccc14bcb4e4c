# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Load the checkpoint of a script, and share its work among processes."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videollm_mod.space.checkpoint_faults import named_faults


# `--help` of scripts that load a checkpoint does without libraries.
if TYPE_CHECKING:
    from accelerate import Accelerator

# A process waits for the others until all have finished their rows. By default it gives up after ten minutes.
_PATIENCE = timedelta(days=7)


def patient_accelerator() -> "Accelerator":
    """
    Return the accelerator of processes that share rows, and wait for each other for days if need be.

    The wait is that of the first accelerator or state of a process, so make no other before.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])


def load_checkpoint(checkpoint: str | Path, **options: Any) -> tuple[Any, Any]:
    """
    Load a model in evaluation mode, and its processor, as [`load_parts`] checks them.

    Args:
        checkpoint (`str` or `Path`): A folder or a Hub id. Its code is run.
        options: Options of `AutoModel.from_pretrained`.

    Raises:
        `SystemExit`: With one line, if the checkpoint is broken or incomplete, or its weights are not finite.
    """
    from videollm_mod.space.loading import load_parts

    try:
        with named_faults(str(checkpoint)):
            processor, model = load_parts(str(checkpoint), **options)
            return model, processor
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
