# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reuse the features of a frame for the frames after it that hardly differ from it."""

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from .checks_videollm_mod import check_number


# A frame is compared as so many cells a side.
_CELLS = 16


class FrameReuse:
    """
    Chooses which frames of a stream are encoded. The others get the features of the last frame that was encoded.

    A frame is averaged to 16 x 16 cells. It is encoded if a colour of any cell differs by more than `threshold` from
    the last *encoded* frame, so that slow changes add up.

    Args:
        threshold (`float`): Largest difference of a cell, in grey levels of 255, at which features are reused.

    Attributes:
        num_reused (`int`): Number of frames that were not encoded.

    Raises:
        `ValueError`: If the threshold is not positive.
    """

    # The largest difference notices small things, and the mean does not. In a NASA clip of a hall, the head of a
    # distant worker moves one cell by 4 to 7 levels and the mean by 0.1. Noise of 10 levels per pixel moves no cell of
    # a frame of 512 x 512 by 2.

    def __init__(self, threshold: float) -> None:
        self.threshold, self.num_reused = check_number("reuse_static", threshold, above=0), 0
        self._thumbnail: torch.Tensor | None = None
        self._features: torch.Tensor | None = None

    def choose(self, frames: torch.Tensor) -> list[torch.Tensor | None]:
        """
        Choose among the next frames, uint8 (frames, channels, height, width). Return the thumbnail of each frame that
        must be encoded, and `None` for each that reuses features. Nothing changes until `spread`.
        """
        last, chosen = self._thumbnail, []
        for thumbnail in F.adaptive_avg_pool2d(frames.float(), _CELLS).cpu():
            is_static = last is not None and bool((thumbnail - last).abs().max() <= self.threshold)
            last = last if is_static else thumbnail
            chosen.append(None if is_static else thumbnail)
        return chosen

    def spread(self, chosen: Sequence[torch.Tensor | None], encoded: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the features of all frames, given what `choose` returned and the features of the chosen ones."""
        features, encoded = [], iter(encoded)
        for thumbnail in chosen:
            if thumbnail is None:
                self.num_reused += 1
            else:
                # A view would keep the features of all frames that were encoded with this one.
                self._thumbnail, self._features = thumbnail, next(encoded).clone()
            features.append(self._features)
        return features


__all__ = ["FrameReuse"]
