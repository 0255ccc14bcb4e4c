# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Turn decoded frames into `pixel_values_videos`."""

from typing import Any

import torch
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict
from transformers.video_processing_utils import BaseVideoProcessor


# How frames of another shape become `size`.
FITS = ("pad", "stretch", "crop")


class VideoLLMMoDVideoProcessor(BaseVideoProcessor):
    """
    Resizes frames to `size` and normalises them, with the options of every Transformers video processor. Defaults are
    VideoLLM-online's: longer side 384, padded with black, bicubic, mean and standard deviation 0.5.

    Args:
        fit (`str`, *optional*, defaults to `"pad"`):
            How a frame of another shape becomes `size`: scaled to fit and padded with black (`"pad"`), stretched
            (`"stretch"`), or scaled to cover `size` and cropped at the centre (`"crop"`).
        longest_edge (`int`, *optional*):
            Pixels of the longer side after a first resize, in which the other side gets an even number. The frame is
            then stretched. SmolVLM resizes twice in this way.

    Raises:
        `ValueError`: If `fit` is unknown, or `longest_edge` is given with another fit than `"stretch"`.
    """

    fit = "pad"
    longest_edge = None
    resample = PILImageResampling.BICUBIC
    image_mean, image_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    do_sample_frames = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.fit not in FITS:
            raise ValueError(f"`fit` is {self.fit!r}; known names are {', '.join(FITS)}.")
        if self.longest_edge is not None and self.fit != "stretch":
            raise ValueError(f"`longest_edge` works with `fit='stretch'` only, not with {self.fit!r}.")

    def resize(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """Resize frames (..., channels, height, width) to `size`, as `fit` says."""
        height, width = image.shape[-2:]
        if self.fit == "stretch":
            if self.longest_edge is not None:
                image = self._scale(image, *_with_longest_edge(height, width, self.longest_edge), **kwargs)
            return self._scale(image, size.height, size.width, **kwargs)
        # Whole numbers, because 384 / 588 * 588 is less than 384. A very narrow frame keeps at least one pixel.
        by_height = size.height, max(1, size.height * width // height)
        by_width = max(1, size.width * height // width), size.width
        fit = min(by_height, by_width) if self.fit == "pad" else max(by_height, by_width)
        return self.center_crop(self._scale(image, *fit, **kwargs), size)

    def _scale(self, image: torch.Tensor, height: int, width: int, **kwargs: Any) -> torch.Tensor:
        # Width first, then height: the library rounds to uint8 in between, but on a GPU only if these are two calls.
        image = super().resize(image, SizeDict(height=image.shape[-2], width=width), **kwargs)
        return super().resize(image, SizeDict(height=height, width=width), **kwargs)


def _with_longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return the size with this longest edge and an even other one, rounded as SmolVLM's processor does."""
    aspect = width / height
    other = int(longest / aspect if width >= height else longest * aspect)
    other = max(1, other + other % 2)
    return (other, longest) if width >= height else (longest, other)


VideoLLMMoDVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["VideoLLMMoDVideoProcessor"]
