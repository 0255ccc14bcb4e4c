# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the converters read from a vision-language model of Transformers, and how it makes pixels of a frame."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# Transformers scales no side to more than this before it cuts pictures into tiles.
_MOST_PIXELS = 4096


@dataclass(kw_only=True)
class Source:
    """
    The parts of a vision-language model, and what its video path does with a frame.

    Args:
        encoder (`PreTrainedModel`): The vision encoder.
        language_model (`PreTrainedModel`): The decoder layers, without their head.
        connector (`dict[str, torch.Tensor]`): The projector's weights, by the names of our connector.
        fields (`dict[str, Any]`): Fields of [`VideoLLMMoDConfig`] that describe the connector.
        frame_token_pooled (`tuple[int, int]`): Height and width of a frame's grid of tokens in the video path.
        pixels (`dict[str, Any]`): Options of [`VideoLLMMoDVideoProcessor`] that make the same pixels.
        frame_token_id (`int`): The token that stands for a frame's tokens.
        taken (`tuple[str, ...]`): Prefixes of the weights that are converted.
        stream_format (`str` or `dict`, *optional*): See [`VideoLLMMoDProcessor`].
        image_newline (`torch.Tensor` of shape `(hidden,)`, *optional*): What follows the frames of a turn.
        placeholders (`tuple[int, ...]`, *optional*): Further tokens that stand for pictures and are never said.
        differences (`list[str]`, *optional*): Sentences on what the source does otherwise.
        left_out (`list[str]`, *optional*): Parts without weights that are not converted.
    """

    encoder: "PreTrainedModel"
    language_model: "PreTrainedModel"
    connector: "dict[str, torch.Tensor]"
    fields: dict[str, Any]
    frame_token_pooled: tuple[int, int]
    pixels: dict[str, Any]
    frame_token_id: int
    taken: tuple[str, ...]
    stream_format: str | dict[str, str] | None = None
    image_newline: "torch.Tensor | None" = None
    placeholders: tuple[int, ...] = ()
    differences: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def feature_layer(config: Any, name: str) -> int:
    """Return the encoder layer that a model reads. Raise `ValueError` unless it is one, counted from the end."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or layer >= 0:
        raise ValueError(f"{name} reads encoder layers {layer}. Supported is one layer, counted from the end: -2.")
    return layer


def patch_grid(config: Any, name: str) -> tuple[int, int]:
    """Return the encoder's grid of patches. Raise `ValueError` if it has none."""
    from videollm_mod.configuration_videollm_mod import height_and_width

    vision = config.vision_config
    for field_name in ("image_size", "patch_size"):
        if getattr(vision, field_name, None) is None:
            raise ValueError(f"The encoder of {name}, {vision.model_type}, has no `{field_name}`.")
    sides, patches = height_and_width(vision.image_size), height_and_width(vision.patch_size)
    return sides[0] // patches[0], sides[1] // patches[1]


def check_class_token(encoder: Any, strategy: str, name: str) -> None:
    """Raise `ValueError` unless a model reads exactly the patches: no class token, and all patches."""
    has_class_token = any("class_embedding" in key or "cls_token" in key for key in encoder.state_dict())
    if has_class_token and strategy == "full":
        raise ValueError(f"{name} reads the encoder's class token too: `vision_feature_select_strategy` is 'full'.")
    if not has_class_token and strategy == "default":
        raise ValueError(
            f"{name} drops the encoder's first patch: `vision_feature_select_strategy` is 'default', "
            "and the encoder has no class token."
        )


def load_pixels(source: str, *, from_video: bool, fit: str | None = None) -> dict[str, Any]:
    """
    Return options of our video processor that make the same pixels as a model's own processor.

    Args:
        source (`str`): The model: a folder or a Hub id.
        from_video (`bool`): Whether to read its video processor, or else its image processor.
        fit (`str`, *optional*): How frames are fitted, if its processor does not say.

    Raises:
        `ValueError`: If its frames are made in a way that our processor does not know.
    """
    from transformers import AutoImageProcessor, AutoVideoProcessor

    theirs = (AutoVideoProcessor if from_video else AutoImageProcessor).from_pretrained(source)
    name, size = type(theirs).__name__, dict(theirs.size)
    missing = [step for step in ("do_resize", "do_rescale", "do_normalize") if not getattr(theirs, step, True)]
    if missing:
        raise ValueError(f"{name} has {' and '.join(f'{step}=False' for step in missing)}, which is not supported.")
    options = {"image_mean": [*theirs.image_mean], "image_std": [*theirs.image_std], "resample": theirs.resample}
    if getattr(theirs, "max_image_size", None):
        side = theirs.max_image_size["longest_edge"]
        longest = {"longest_edge": min(size["longest_edge"], _MOST_PIXELS)} if "longest_edge" in size else {}
        return {**options, **longest, "fit": "stretch", "size": {"height": side, "width": side}}
    crop = dict(theirs.crop_size) if getattr(theirs, "do_center_crop", False) and fit is None else None
    edge = size.get("shortest_edge")
    square = {"height": edge, "width": edge} if edge else {name: size.get(name) for name in ("height", "width")}
    if None in square.values() or (edge and crop is None and fit is None) or (crop is not None and crop != square):
        raise ValueError(f"{name} makes frames of size {size}, cropped to {crop}, which is not supported.")
    if getattr(theirs, "do_pad", False) and crop is not None:
        raise ValueError(f"{name} pads frames to a square before it crops them, which is not supported.")
    return {**options, "size": square, "fit": fit or ("crop" if edge else "stretch")}
