# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Frame features that `train/encode.py` wrote: safetensors files, or their content within a row or a Parquet file."""

import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open


# `--help` of scripts that name data does without torch.
if TYPE_CHECKING:
    import torch

NAME = "frame_features"


@dataclass(frozen=True)
class StoredFeatures:
    """
    The frame features of a row of a Parquet file. They are read when they are used.

    Args:
        file (`str`): Path or address of the file.
        group (`int`): Index of the group of rows.
        row (`int`): Index of the row in its group.
    """

    file: str
    group: int
    row: int

    def read(self) -> bytes:
        """
        Return the content of a safetensors file. The features of one group of rows stay in memory.

        Raises:
            `SafetensorError` or `OSError`: If there is none, or if the file cannot be read.
        """
        content = _read_group(self.file, self.group)[self.row].as_py()
        if content is None:
            raise SafetensorError(f"the row has no `{NAME}`")
        return content


@lru_cache(maxsize=1)
def _read_group(file: str, group: int) -> pa.ChunkedArray:
    with fsspec.open(file, "rb") as opened:
        return pq.ParquetFile(opened).read_row_group(group, columns=[NAME]).column(NAME)


# Where frame features can be.
FeatureSource = str | Path | bytes | StoredFeatures


def read_header(source: FeatureSource) -> tuple[tuple[int, ...], dict[str, str]]:
    """
    Return the shape and the metadata of frame features, without reading those of a file.

    Args:
        source (`str`, `Path`, `bytes` or [`StoredFeatures`]): A safetensors file, or the content of one.

    Raises:
        `SafetensorError` or `OSError`: If it holds no tensor `frame_features`.
    """
    source = source.read() if isinstance(source, StoredFeatures) else source
    if not isinstance(source, bytes):
        with safe_open(source, "pt") as file:
            return tuple(file.get_slice(NAME).get_shape()), file.metadata() or {}
    # The format: the length of the header as 8 bytes, then the header as JSON.
    try:
        header = json.loads(source[8 : 8 + struct.unpack("<Q", source[:8])[0]])
        return tuple(header[NAME]["shape"]), header.get("__metadata__", {})
    except (ValueError, KeyError, TypeError, struct.error):
        raise SafetensorError(f"the bytes hold no tensor `{NAME}`") from None


def read_features(source: FeatureSource, frames: range) -> "torch.Tensor":
    """
    Return frame features `(frames, tokens, width)`, and read no more of a file than these.

    Args:
        source (`str`, `Path`, `bytes` or [`StoredFeatures`]): See [`read_header`], also for the errors.
        frames (`range`): Which frames.
    """
    source = source.read() if isinstance(source, StoredFeatures) else source
    if isinstance(source, bytes):
        from safetensors.torch import load

        read_header(source)
        return load(source)[NAME][frames.start : frames.stop].clone()
    with safe_open(source, "pt") as file:
        return file.get_slice(NAME)[frames.start : frames.stop]
