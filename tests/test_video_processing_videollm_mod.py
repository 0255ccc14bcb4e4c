# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The video processor: scale, black bars, normalisation, and saving as any Transformers processor."""

import numpy as np
import pytest
import torch
from tiny import random_frames
from torch.testing import assert_close
from transformers import LlavaNextVideoVideoProcessor, LlavaOnevisionVideoProcessor, SmolVLMVideoProcessor
from transformers.image_utils import PILImageResampling

from videollm_mod import VideoLLMMoDVideoProcessor


def processed(frames, **options):
    processor = VideoLLMMoDVideoProcessor(**options)
    return processor(torch.from_numpy(frames), input_data_format="channels_last", return_tensors="pt")


def test_defaults_are_videollm_onlines():
    pixels = processed(random_frames(2, size=(360, 640)))["pixel_values_videos"]
    assert pixels.shape == (1, 2, 3, 384, 384)
    # 640x360 becomes 384x216, centred, with 84 black rows above and below.
    black = torch.full((3, 84, 384), -1.0)
    for frame in pixels[0]:
        assert torch.equal(frame[:, :84], black) and torch.equal(frame[:, -84:], black)
        assert frame[:, 84:300].std() > 0.1


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (32, 32), (400, 100)])
def test_aspect_ratio_is_kept(size):
    white = np.full((1, *size, 3), 255, np.uint8)
    pixels = processed(white, size={"height": 64, "width": 64})["pixel_values_videos"][0, 0]
    picture = pixels[0] > 0
    height, width = picture.any(1).sum(), picture.any(0).sum()
    assert max(height, width) == 64 and height / width == pytest.approx(size[0] / size[1], rel=0.05)
    rows = picture.any(1).nonzero().squeeze(1)
    assert abs(int(rows[0]) - (63 - int(rows[-1]))) <= 1  # centred


@pytest.mark.parametrize("size", [(5, 4000), (4000, 5), (1, 1)])
def test_very_narrow_frames_keep_one_pixel(size):
    white = np.full((1, *size, 3), 255, np.uint8)
    pixels = processed(white, size={"height": 64, "width": 64})["pixel_values_videos"][0, 0]
    assert pixels.shape == (3, 64, 64) and (pixels[0] > 0).sum() == (64 * 64 if size == (1, 1) else 64)


SOURCES = {
    "stretch": LlavaOnevisionVideoProcessor(size={"height": 32, "width": 48}),
    "crop": LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "twice": SmolVLMVideoProcessor(
        size={"longest_edge": 30}, max_image_size={"longest_edge": 48}, resample=PILImageResampling.LANCZOS
    ),
}
OURS = {
    "stretch": {"size": {"height": 32, "width": 48}, "fit": "stretch"},
    "crop": {"size": {"height": 32, "width": 32}, "fit": "crop"},
    "twice": {
        "size": {"height": 48, "width": 48},
        "fit": "stretch",
        "longest_edge": 30,
        "resample": PILImageResampling.LANCZOS,
    },
}


@pytest.mark.parametrize("size", [(60, 100), (100, 61), (32, 32), (20, 17), (33, 800)])
@pytest.mark.parametrize("name", OURS)
def test_pixels_equal_those_of_other_models_processors(name, size):
    source, frames = SOURCES[name], random_frames(2, size=size)
    ours = processed(frames, image_mean=source.image_mean, image_std=source.image_std, **OURS[name])
    theirs = source(torch.from_numpy(frames), input_data_format="channels_last", return_tensors="pt")
    expected = theirs["pixel_values" if name == "twice" else "pixel_values_videos"]
    assert torch.equal(ours["pixel_values_videos"], expected)


def test_an_unknown_way_to_fit_is_refused():
    with pytest.raises(ValueError, match="`fit` is 'squeeze'; known names are pad, stretch, crop"):
        VideoLLMMoDVideoProcessor(fit="squeeze")
    with pytest.raises(ValueError, match="`longest_edge` works with `fit='stretch'` only, not with 'pad'"):
        VideoLLMMoDVideoProcessor(longest_edge=384)


def test_values_are_normalised():
    frames = random_frames(1, size=(64, 64))
    pixels = processed(frames, size={"height": 64, "width": 64})["pixel_values_videos"][0, 0]
    assert_close(pixels, torch.from_numpy(frames[0]).permute(2, 0, 1) / 127.5 - 1)
    other = processed(frames, size={"height": 64, "width": 64}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    assert_close(other["pixel_values_videos"][0, 0], torch.from_numpy(frames[0]).permute(2, 0, 1) / 255)


def test_options_are_saved_and_loaded(tmp_path):
    options = {"fit": "stretch", "longest_edge": 32}
    VideoLLMMoDVideoProcessor(size={"height": 48, "width": 64}, **options).save_pretrained(tmp_path)
    loaded = VideoLLMMoDVideoProcessor.from_pretrained(tmp_path)
    assert (loaded.fit, loaded.longest_edge) == ("stretch", 32)
    assert (loaded.size["height"], loaded.size["width"]) == (48, 64)
    assert (tmp_path / "video_processing_videollm_mod.py").exists()


@pytest.mark.parametrize("size", [(588, 588), (588, 300), (300, 588)])
def test_a_padded_frame_touches_the_sides(size):
    """384 / 588 * 588 is a little less than 384 in floating point."""
    pixels = processed(np.full((1, *size, 3), 255, np.uint8), size={"height": 384, "width": 384}, fit="pad")
    is_white = pixels["pixel_values_videos"][0, 0, 0] > 0
    assert is_white.any(dim=1).all() or is_white.any(dim=0).all()
    assert max(is_white.any(dim=0).sum(), is_white.any(dim=1).sum()) == 384
