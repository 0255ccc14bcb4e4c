# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Encoded rows of the ablation: their features, their order, and their frames one by one."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.feature_files import read_features, read_header


# Batches of rows of similar length have little padding. Rows are sorted within this many batches.
BATCHES_SORTED = 8
Row = dict[str, Any]


def read_rows(folder: str | Path, name: str) -> list[Row]:
    """
    Return the encoded rows in `folder/name`. Their features stay in files until [`with_features`] reads them.

    Raises:
        `FileNotFoundError`: If `ablation.py prepare` has not made them.
    """
    for found in sorted((Path(folder) / name).glob("*.jsonl")):
        rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
        return [{**row, "frame_features": str(found.parent / row["frame_features"])} for row in rows]
    raise FileNotFoundError(f"'{folder}' has no rows '{name}': run `ablation.py prepare --folder {folder}` first.")


def with_features(row: Row, grid: Sequence[int] | None = None) -> Row:
    """
    Return a row with its frame features in memory, (frames, tokens, width).

    Args:
        row (`dict`): A row of [`read_rows`], or one that has its features already.
        grid (`Sequence[int]`, *optional*): Height and width of a smaller grid to pool the tokens to. They must be a
            square without a pooled token.
    """
    features = row["frame_features"]
    if isinstance(features, str):
        features = read_features(features, range(num_frames(row)))
    if grid is not None and math.prod(grid) < features.shape[1]:
        side = math.isqrt(features.shape[1])
        square = features.float().transpose(1, 2).unflatten(2, (side, side))
        features = F.adaptive_avg_pool2d(square, tuple(grid)).flatten(2).transpose(1, 2).to(features.dtype)
    return {**row, "frame_features": features}


def num_frames(row: Row) -> int:
    """Return the number of frames of a row, without reading its features."""
    features = row["frame_features"]
    return read_header(features)[0][0] if isinstance(features, str) else len(features)


def batch_order(lengths: Sequence[int], steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """
    Return the indices of the rows of each step. They depend on the seed and these numbers only.

    Every row comes once before any comes again.
    """
    generator, indices = np.random.default_rng((seed, 23)), []
    while len(indices) < steps * batch_size:
        indices += generator.permutation(len(lengths)).tolist()
    batches, together = [], BATCHES_SORTED * batch_size
    for begin in range(0, steps * batch_size, together):
        near = sorted(indices[begin : begin + together], key=lambda index: lengths[index])
        # The last rows of a window may be too few for a batch.
        near_batches = [near[i : i + batch_size] for i in range(0, len(near) - batch_size + 1, batch_size)]
        batches += [near_batches[place] for place in generator.permutation(len(near_batches))]
    return batches[:steps]


def parts_of(row: Row, grid: Sequence[int] | None, *, single_frames: bool = False, fps: float = 2.0) -> list[Row]:
    """Return what the model learns of a row, with features in memory: the row, or each of its frames alone."""
    row = with_features(row, grid)
    return split_frames(row, fps=fps, learned=True) if single_frames else [row]


def split_frames(row: Row, *, fps: float = 2.0, learned: bool = False) -> list[Row]:
    """
    Return a row for each frame of a row: the frame, the request that is open, and the messages at this frame.

    Silence has a label only between two frames. With `learned`, a copy therefore follows each frame without
    messages, except the row's last. Nothing is learned after the copy.

    A message follows the first frame at or after its time, as in `to_stream_turns`. The last request without an
    immediate answer stays open for the frames after it. So each row learns what the clip's row learns at its frame.
    """
    start, count, messages = row.get("start") or 0.0, num_frames(row), row["messages"]
    slots = [_slot(message, start, fps, count) for message in messages]
    following = zip(messages[1:] + [{"role": None}], slots[1:] + [-1], strict=True)
    requests = [
        (slot, {"role": "user", "content": message["content"]})
        for message, slot, (after, later) in zip(messages, slots, following, strict=True)
        if message["role"] == "user" and not (after["role"] == "assistant" and slot == later)
    ]
    rows = []
    for frame in range(count):
        time = start + frame / fps
        is_open = [request for slot, request in requests if slot < frame][-1:]
        here = [{**message, "time": time} for message, slot in zip(messages, slots, strict=True) if slot == frame]
        shown = [frame, frame] if learned and not here and frame + 1 < count else [frame]
        part = {"messages": is_open + here, "frame_features": row["frame_features"][shown], "start": time}
        rows.append(part | ({"covered": [row["covered"][i] for i in shown]} if row.get("covered") else {}))
    return rows


def _slot(message: Row, start: float, fps: float, count: int) -> int:
    """Return the index of the frame that a message follows, or -1 if it comes before the first frame."""
    time = message.get("time")
    return -1 if time is None else min(math.ceil((time - start) * fps - 1e-6), count - 1)


def make_batches(
    rows: Sequence[Row],
    processor: Any,
    order: Sequence[Sequence[int]],
    *,
    grid: Sequence[int] | None = None,
    single_frames: bool = False,
    fps: float = 2.0,
) -> Iterator[Row]:
    """Yield a batch of the model's inputs for each group of row indices."""
    collator, options = StreamCollator(processor, fps), {"single_frames": single_frames, "fps": fps}
    for indices in order:
        yield collator([part for index in indices for part in parts_of(rows[index], grid, **options)])
