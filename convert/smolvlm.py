# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Read models of type SmolVLM and Idefics3: a pixel shuffle and one linear layer."""

from typing import Any

from .source import Source, load_pixels, patch_grid


def read(model: Any, source: str, tokenizer: Any) -> Source:
    """Return the parts of a model. See [`Source`]; raise `ValueError` if a part does not fit."""
    from videollm_mod.stream_format_videollm_mod import STREAM_FORMATS

    config, name = model.config, type(model).__name__
    has_video = config.model_type == "smolvlm"
    factor, grid = config.scale_factor, patch_grid(config, name)
    stream_format: Any = "smolvlm"
    differences = [
        "The source tells the number of frames and the length of the video before the first frame. A stream does not "
        "know them, so this text leaves them out."
    ]
    if not has_video:
        picture = {"frame_before": "<fake_token_around_image><global-img>", "intro": "", "outro": ""}
        turns = {"begin": tokenizer.bos_token or "", "user_before": "User:", "words_before": " "}
        stream_format = {**STREAM_FORMATS["smolvlm"], **turns, **picture}
        differences = ["The source was made for pictures. Each frame is a picture to it, without a time."]
    return Source(
        encoder=model.model.vision_model,
        language_model=model.model.text_model,
        connector={"linear_1.weight": model.model.connector.modality_projection.proj.weight},
        fields={"connector": "pixel_shuffle", "connector_hidden_act": None},
        frame_token_pooled=(grid[0] // factor, grid[1] // factor),
        pixels=load_pixels(source, from_video=has_video),
        frame_token_id=config.image_token_id,
        taken=("model.vision_model.", "model.text_model.", "model.connector.", "lm_head."),
        stream_format=stream_format,
        differences=differences,
        left_out=["tiling of pictures"],
    )
