# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Load the checkpoint of a script."""

from pathlib import Path
from typing import Any

from videollm_mod.space.checkpoint_faults import named_faults
from videollm_mod.space.loading import load_parts


def load_checkpoint(checkpoint: str | Path, **options: Any) -> tuple[Any, Any]:
    """
    Load a model in evaluation mode, and its processor, as [`load_parts`] checks them.

    Args:
        checkpoint (`str` or `Path`): A folder or a Hub id. Its code is run.
        options: Options of `AutoModel.from_pretrained`.

    Raises:
        `SystemExit`: With one line, if the checkpoint is broken or incomplete, or its weights are not finite.
    """
    try:
        with named_faults(str(checkpoint)):
            processor, model = load_parts(str(checkpoint), **options)
            return model, processor
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
