# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Turn decoded frames into `pixel_values_videos`."""

from typing import Any

import torch
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict
from transformers.video_processing_utils import BaseVideoProcessor


class VideoLLMMoDVideoProcessor(BaseVideoProcessor):
    """
    Scales frames to fit `size`, pads them with black and normalises them, with the options of every Transformers video
    processor. Defaults are VideoLLM-online's: longer side 384, bicubic, mean and standard deviation 0.5.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = False

    def resize(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """Scale frames (..., channels, height, width) to the largest that fits `size`, centred on black."""
        height, width = image.shape[-2:]
        scale = min(size.height / height, size.width / width)
        # A very narrow frame keeps at least one pixel.
        fit = SizeDict(height=max(1, int(scale * height)), width=max(1, int(scale * width)))
        # Width first, then height: the library rounds to uint8 in between, but on a GPU only if these are two calls.
        image = super().resize(image, SizeDict(height=height, width=fit.width), **kwargs)
        return self.center_crop(super().resize(image, fit, **kwargs), size)


VideoLLMMoDVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["VideoLLMMoDVideoProcessor"]
