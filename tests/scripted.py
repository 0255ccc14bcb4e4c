# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A session whose answers are known: the brighter the frames since it was made or forked, the likelier yes."""

from typing import Any

import torch


class BrightnessSession:
    """Answers a question with the mean brightness of what it has seen, from 0 to 1, and "dark" with the rest."""

    def __init__(self, fps: float = 2.0) -> None:
        self.fps = fps
        self.max_frames, self.chunk_frames = 1000, 8
        self.model = torch.nn.Linear(1, 1)
        self.model.device = torch.device("cpu")
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
