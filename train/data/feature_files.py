# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Frame features that `train/encode.py` wrote: safetensors files, or their content within a row."""

import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load


NAME = "frame_features"


def read_header(source: str | Path | bytes) -> tuple[tuple[int, ...], dict[str, str]]:
    """
    Return the shape and the metadata of frame features, without reading them.

    Args:
        source (`str`, `Path` or `bytes`): A safetensors file, or the content of one.

    Raises:
        `SafetensorError` or `OSError`: If it holds no tensor `frame_features`.
    """
    if not isinstance(source, bytes):
        with safe_open(source, "pt") as file:
            return tuple(file.get_slice(NAME).get_shape()), file.metadata() or {}
    # The format: the length of the header as 8 bytes, then the header as JSON.
    try:
        header = json.loads(source[8 : 8 + struct.unpack("<Q", source[:8])[0]])
        return tuple(header[NAME]["shape"]), header.get("__metadata__", {})
    except (ValueError, KeyError, TypeError, struct.error):
        raise SafetensorError(f"the bytes hold no tensor `{NAME}`") from None


def read_features(source: str | Path | bytes, frames: range) -> torch.Tensor:
    """
    Return frame features `(frames, tokens, width)`, and read no more of a file than these.

    Args:
        source (`str`, `Path` or `bytes`): See [`read_header`], also for the errors.
        frames (`range`): Which frames.
    """
    if isinstance(source, bytes):
        read_header(source)
        return load(source)[NAME][frames.start : frames.stop].clone()
    with safe_open(source, "pt") as file:
        return file.get_slice(NAME)[frames.start : frames.stop]
