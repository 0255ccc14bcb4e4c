# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Read models of the LLaVA family: LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision.

Any other model fits that has a vision encoder on a grid of patches, a projector of two linear layers, and a
decoder-only language model.
"""

import math
from typing import Any

from .source import Source, check_class_token, feature_layer, load_pixels, patch_grid


# Transformers calls the connector a projector.
_PROJECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
# What stands around the turns of models that were made from Vicuna, and from Mistral.
_VICUNA = {
    "system_after": " ",
    "user_before": "USER: ",
    "user_after": " ",
    "assistant_before": "ASSISTANT: ",
    "assistant_end": "</s>",
    "outro": "\n",
}
_MISTRAL = {
    "system_after": " ",
    "user_before": "[INST] ",
    "user_after": " [/INST]",
    "assistant_before": " ",
    "assistant_end": "</s>",
    "assistant_after": " ",
    "outro": "\n",
}


def read(model: Any, source: str, tokenizer: Any) -> Source:
    """Return the parts of a model. See [`Source`]; raise `ValueError` if a part does not fit."""
    _check_parts(model)
    config, parts, name = model.config, model.model, type(model).__name__
    layer, grid = feature_layer(config, name), patch_grid(config, name)
    check_class_token(parts.vision_tower, config.vision_feature_select_strategy, name)
    has_video = config.model_type in ("llava_next_video", "llava_onevision")
    fields = {"vision_feature_layer": layer, "connector_hidden_act": config.projector_hidden_act}
    tokens, newline = grid, None
    differences = [] if has_video else ["The source was made for pictures. Each frame is a picture to it."]
    if config.model_type == "llava_onevision":
        fields |= {"connector": "mlp_pool_after", "connector_pooling": "bilinear"}
        tokens, newline = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)), parts.image_newline
    elif config.model_type == "llava_next_video":
        tokens = _pooled_grid(config, grid, name)
    weights = parts.multi_modal_projector.state_dict()
    # A projector without biases computes the same as one with zero biases.
    for linear in ("linear_1", "linear_2"):
        weights.setdefault(f"{linear}.bias", weights[f"{linear}.weight"].new_zeros(len(weights[f"{linear}.weight"])))
    turns = _turns(config, tokenizer, has_video=has_video)
    if turns in ("chatml", "llama3"):
        differences.append("Each frame is on a line of its own. The source's line breaks between turns may be others.")
    image_token = config.image_token_id
    taken = ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector.", "lm_head.")
    return Source(
        encoder=parts.vision_tower,
        language_model=parts.language_model,
        connector=weights,
        fields=fields,
        frame_token_pooled=tokens,
        pixels=load_pixels(source, from_video=has_video, fit="stretch" if config.model_type == "llava_next" else None),
        frame_token_id=config.video_token_id if has_video else image_token,
        taken=taken if newline is None else (*taken, "model.image_newline"),
        stream_format=turns,
        image_newline=newline,
        placeholders=(image_token,),
        differences=differences,
        left_out=[] if config.model_type == "llava" else ["tiling of pictures"],
    )


def _check_parts(model: Any) -> None:
    """Raise `ValueError` unless the model has the parts of the LLaVA family."""
    parts, config, name = getattr(model, "model", None), model.config, type(model).__name__
    missing = [p for p in ("vision_tower", "multi_modal_projector", "language_model") if not hasattr(parts, p)]
    if missing:
        raise ValueError(f"{name} is not of the LLaVA family: it has no {' and no '.join(missing)}.")
    others = set(parts.multi_modal_projector.state_dict()) - _PROJECTOR
    if others or not hasattr(config, "projector_hidden_act"):
        raise ValueError(
            f"The projector of {name} is not two linear layers with an activation between them"
            + (f": it also has {', '.join(sorted(others))}." if others else ".")
        )


def _pooled_grid(config: Any, grid: tuple[int, int], name: str) -> tuple[int, int]:
    """Return the grid that LLaVA-NeXT-Video pools patches to before its projector."""
    mode, stride = config.spatial_pool_mode, config.spatial_pool_stride
    if mode != "average":
        raise ValueError(f"{name} pools patches by {mode!r} before its projector. Supported is 'average'.")
    if grid[0] % stride or grid[1] % stride:
        raise ValueError(f"{name} pools {grid[0]}x{grid[1]} patches with stride {stride}, which drops some of them.")
    return grid[0] // stride, grid[1] // stride


def _turns(config: Any, tokenizer: Any, *, has_video: bool) -> str | dict[str, str] | None:
    """Return the stream format of the language model that this model was made from, or `None` if it is unknown."""
    tokens = tokenizer.get_vocab()
    if config.model_type == "llava_onevision" and "<|im_start|>" in tokens:
        return "llava_onevision"
    for token, name in (("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama3")):
        if token in tokens:
            return name
    if tokenizer.eos_token != "</s>":
        return None
    # Only the first LLaVA on Mistral, BakLLaVA, speaks as Vicuna does.
    turns = _MISTRAL if config.model_type != "llava" and config.text_config.model_type == "mistral" else _VICUNA
    # Frames of a video stand side by side, and pictures on lines of their own.
    turns = {"begin": tokenizer.bos_token or "", **turns}
    return turns if has_video else {**turns, "frame_between": "\n"}
