# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A session whose answers are known, and videos for it: the brighter the frames of a window, the likelier is yes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import write_clip


class BrightnessSession:
    """Answers a question with the mean brightness of what it has seen, from 0 to 1, and "dark" with the rest."""

    def __init__(self, fps: float = 2.0) -> None:
        self.fps = fps
        self.max_frames, self.chunk_frames = 1000, 8
        self.model = torch.nn.Linear(1, 1)
        self.model.device = torch.device("cpu")
        self.reuse, self.num_reused = None, 0
        self.seen: list[float] = []

    def fork(self) -> "BrightnessSession":
        assert not self.seen, "a window must not remember"
        return BrightnessSession(self.fps)

    def push(self, frames: Any, *, time: Any) -> None:
        assert len(frames) == len(time)
        self.seen += [float(frame.float().mean()) / 255 for frame in frames]

    def probe(self, question: str) -> float:
        mean = sum(self.seen) / len(self.seen)
        return 1 - mean if "dark" in question else mean


def write_brightness(path: Path, levels: list[float], **options: Any) -> Path:
    """Write a video at 2 fps with a second of each brightness, from 0 to 1."""
    values = [np.full((32, 32, 3), round(255 * level), np.uint8) for level in levels for _ in range(2)]
    return write_clip(path, np.stack(values), fps=2, **options)
