# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder on frames of several streams at once, on CUDA beside the language model."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
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
    Takes in frames at any time, and encodes frames of several streams together.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        device (`torch.device`): The model's device. On CUDA the encoder has a stream of its own, and so has the
            resizing of new frames, so that a caller's `push` waits for neither the encoder nor the language model.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model, self.processor, self.device = model, processor, device
        is_cuda = device.type == "cuda"
        self.cuda_stream, self._intake = (torch.cuda.Stream(device) if is_cuda else None for _ in range(2))

    @property
    def is_concurrent(self) -> bool:
        """Whether the encoder runs beside the language model."""
        return self.cuda_stream is not None

    def take_in(self, frames: Any) -> torch.Tensor:
        """Return frames given to `push` at the model's size, uint8 (frames, channels, height, width) on the host."""
        frames = list(frames) if isinstance(frames, Iterator) else frames
        some = frames if isinstance(frames, (list, tuple)) else [frames]
        # What wrote a frame on the device may be unfinished in the caller's stream.
        is_there = any(isinstance(frame, torch.Tensor) and frame.is_cuda for frame in some)
        with nullcontext() if is_there or self._intake is None else torch.cuda.stream(self._intake):
            return self.processor.resize_frames(frames, self.device).cpu()

    def encode(self, waiting: Sequence[Waiting]) -> list[torch.Tensor | Exception]:
        """
        Return the features (tokens, hidden) of each frame, or the error of a frame that cannot be encoded.

        Frames of one size are encoded together, at most `MOST_FRAMES` at once. Frames that reuse the features of an
        earlier frame of their stream are not encoded.
        """
        streams: dict[EngineStream, list[int]] = {}
        for index, (stream, _) in enumerate(waiting):
            streams.setdefault(stream, []).append(index)
        reusing = {stream: stream.session.reuse for stream in streams if stream.session.reuse is not None}
        pixels = [frame.pixels for _, frame in waiting]
        chosen: dict[int, torch.Tensor | None] = {}
        for stream, reuse in reusing.items():
            own = streams[stream]
            chosen.update(zip(own, reuse.choose(torch.stack([pixels[index] for index in own])), strict=True))
        found = self._encode([index for index in range(len(waiting)) if chosen.get(index, True) is not None], pixels)
        for stream, reuse in reusing.items():
            own = streams[stream]
            encoded = [found[index] for index in own if index in found]
            # An error ends the stream, so that none of its frames is seen.
            error = next((x for x in encoded if isinstance(x, Exception)), None)
            features = [error] * len(own) if error else reuse.spread([chosen[index] for index in own], encoded)
            found.update(zip(own, features, strict=True))
        return [found[index] for index in range(len(waiting))]

    def _encode(self, indices: Sequence[int], pixels: Sequence[torch.Tensor]) -> dict[int, torch.Tensor | Exception]:
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            sizes.setdefault(tuple(pixels[index].shape), []).append(index)
        found: dict[int, torch.Tensor | Exception] = {}
        for same in sizes.values():
            for begin in range(0, len(same), MOST_FRAMES):
                group = same[begin : begin + MOST_FRAMES]
                frames = [pixels[index] for index in group]
                found.update(zip(group, run_in_parts(self._features, frames, self.device), strict=True))
        return found

    @torch.no_grad()
    def _features(self, frames: Sequence[torch.Tensor]) -> torch.Tensor:
        pixels = torch.stack(list(frames))
        if self.cuda_stream is None:
            return self.model.encode_frames(self.processor.normalize_frames(pixels.to(self.device)))
        pixels = pixels.pin_memory()
        with torch.cuda.stream(self.cuda_stream):
            pixels = pixels.to(self.device, non_blocking=True)
            features = self.model.encode_frames(self.processor.normalize_frames(pixels))
        # The language step that runs now does not wait for the encoder; the next one does.
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.cuda_stream)
        features.record_stream(current)
        return features


__all__ = ["FrameEncoder"]
