# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Read models of type InternVL (those for Transformers, named `-hf`): a pixel shuffle, a layer norm and an MLP."""

from typing import Any

from .source import Source, check_class_token, feature_layer, load_pixels, patch_grid


def read(model: Any, source: str, tokenizer: Any) -> Source:
    """Return the parts of a model. See [`Source`]; raise `ValueError` if a part does not fit."""
    config, parts, name = model.config, model.model, type(model).__name__
    layer, grid = feature_layer(config, name), patch_grid(config, name)
    check_class_token(parts.vision_tower, config.vision_feature_select_strategy, name)
    factor = int(1 / config.downsample_ratio)
    video_token = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "video_token", None) or "<video>")
    return Source(
        encoder=parts.vision_tower,
        language_model=parts.language_model,
        connector=parts.multi_modal_projector.state_dict(),
        fields={
            "connector": "pixel_shuffle",
            "connector_hidden_act": config.projector_hidden_act,
            # -1 is the encoder's output to InternVL.
            "vision_feature_layer": None if layer == -1 else layer,
        },
        frame_token_pooled=(grid[0] // factor, grid[1] // factor),
        pixels=load_pixels(source, from_video=True),
        frame_token_id=config.image_token_id,
        taken=("model.vision_tower.", "model.language_model.", "model.multi_modal_projector.", "lm_head."),
        stream_format="internvl",
        placeholders=(video_token,) if isinstance(video_token, int) else (),
        left_out=["tiling of pictures"],
    )
