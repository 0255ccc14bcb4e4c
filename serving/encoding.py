# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder on frames of several streams at once, on CUDA beside the language model."""

from collections.abc import Sequence
from typing import Any

import torch

from .faults import run_in_parts
from .stream import EngineStream, ReceivedFrame


# Most frames that the encoder gets at once: the memory that it needs for more is not reserved.
MOST_FRAMES = 64
# A frame, and the stream that it belongs to.
Waiting = tuple[EngineStream, ReceivedFrame]


class FrameEncoder:
    """
    Encodes frames of several streams together.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        device (`torch.device`): Its device. On CUDA the encoder has a stream of its own.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.cuda_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_concurrent(self) -> bool:
        """Whether the encoder runs beside the language model."""
        return self.cuda_stream is not None

    def encode(self, waiting: Sequence[Waiting]) -> list[torch.Tensor | Exception]:
        """
        Return the features (tokens, hidden) of each frame, or the error of a frame that cannot be encoded.

        Frames of one size are encoded together, at most `MOST_FRAMES` at once.
        """
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, (_, frame) in enumerate(waiting):
            sizes.setdefault(tuple(frame.pixel_values.shape), []).append(index)
        found: dict[int, torch.Tensor | Exception] = {}
        for same in sizes.values():
            for begin in range(0, len(same), MOST_FRAMES):
                group = same[begin : begin + MOST_FRAMES]
                frames = [waiting[index][1].pixel_values for index in group]
                found.update(zip(group, run_in_parts(self._features, frames, self.device), strict=True))
        return [found[index] for index in range(len(waiting))]

    @torch.no_grad()
    def _features(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        pixel_values = torch.stack(list(frames))
        if self.cuda_stream is None:
            return self.model.encode_frames(pixel_values.to(self.device))
        pixel_values = pixel_values.pin_memory()
        with torch.cuda.stream(self.cuda_stream):
            features = self.model.encode_frames(pixel_values.to(self.device, non_blocking=True))
        # The language step that runs now does not wait for the encoder; the next one does.
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.cuda_stream)
        features.record_stream(current)
        return features


__all__ = ["FrameEncoder"]
