# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of VideoLLM-MoD: fields, their validation, the layout they define, and what it costs."""

import copy
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from packaging import version
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .routers_videollm_mod import GATES, ROUTERS


logger = logging.get_logger(__name__)

# Versions are compared here only. The code travels with checkpoints, so it meets whatever is installed.
_found = version.parse(version.parse(transformers.__version__).base_version)
if _found < version.parse("5.17"):
    raise ImportError(
        f"VideoLLM-MoD needs transformers >= 5.17.0, found {transformers.__version__}. "
        'Upgrade with `pip install --upgrade "transformers>=5.17,<6"`.'
    )
if _found >= version.parse("6"):
    logger.warning(
        f"VideoLLM-MoD was written for transformers >= 5.17.0 and < 6.0.0, found {transformers.__version__}. If it "
        'fails, install "transformers>=5.17,<6", or look for a newer revision of the checkpoint.'
    )

# tests/test_modeling_videollm_mod.py compares their layers with the library's own forward pass.
_TESTED_TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# A model with one of these scales its embeddings or logits outside its layers, in code that does not run here.
_SCALING_FIELDS = ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping", "scale_emb")
# What a connector does with a frame's patches; see `VideoLLMMoDConnector`.
CONNECTORS = ("mlp", "mlp_pool_after", "pixel_shuffle")
_SIZES = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "head_dim", "vocab_size")
_SIZES += ("image_size", "patch_size", "intermediate_size", "num_channels", "num_patches")
_LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# The routed layers of each scheme.
MOD_LAYER_SCHEMES = {
    "interleaved": slice(1, None, 2),
    "interleaved_deep": slice(3, None, 2),
    "all": slice(None),
    "all_deep": slice(2, None),
}

_DEFAULT_TEXT = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
_DEFAULT_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}


@dataclass(frozen=True)
class CostEstimate:
    """
    Cost of one forward pass of the language model, routed and at full compute.

    A multiply-add counts as two operations, and attention as dense (query length x key length), as in
    `torch.utils.flop_counter.FlopCounterMode`. A causal kernel does about half of the attention.

    Attributes:
        flops, full_flops (`int`):
            Operations of connector, routers, decoder layers and head: under this scheme, and with every keep ratio 1.
        cache_entries (`tuple[int, ...]`): Key/value cache entries of each layer afterwards.
        cache_bytes, full_cache_bytes (`int`): Bytes of the key/value cache afterwards.
        vision_flops (`int`): Operations of encoding the new frames; 0 in estimates of the configuration.
    """

    flops: int
    full_flops: int
    cache_entries: tuple[int, ...]
    cache_bytes: int
    full_cache_bytes: int
    vision_flops: int = 0

    @property
    def flops_ratio(self) -> float:
        """Share of the operations of full compute."""
        return self.flops / self.full_flops if self.full_flops else 1.0

    @property
    def cache_ratio(self) -> float:
        """Share of the cache of full compute."""
        return self.cache_bytes / self.full_cache_bytes if self.full_cache_bytes else 1.0


@strict
class VideoLLMMoDConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VideoLLMMoDForConditionalGeneration`]: a vision encoder, a connector, and a decoder-only
    language model with routed layers (VideoLLM-MoD, arXiv 2408.16730, section 3). The defaults are the paper's.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to Llama-3-8B's):
            Any decoder-only language model of the Llama shape.
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to SigLIP-L/16-384's):
            Any image encoder with a patch grid, or an image-text model that contains one.
        frame_token_cls (`bool`, *optional*, defaults to `True`): Whether a frame starts with the pooled token.
        frame_token_pooled (`list[int]`, *optional*, defaults to `[3, 3]`):
            Height and width of a frame's grid of tokens, or `None` for no grid.
        frame_size (`int`, *optional*):
            Side in pixels at which frames are encoded. Defaults to the encoder's own. Change it together with the
            processor by `model.set_frame_size(processor, frame_size)`.
        vision_feature_layer (`int`, *optional*):
            Encoder layer that provides the patches: -1 is the last, before the final norm. Defaults to the output.
        frame_token_id (`int`, *optional*, defaults to 128256): Id of the frame token. It needs no embedding row.
        frame_token_interval_id (`int`, *optional*, defaults to 11):
            Id of the interval token between frames. With `None`, the end-of-sequence token means silence.
        connector (`str`, *optional*, defaults to `"mlp"`):
            What makes tokens of patches: `"mlp"` (patches are pooled, then projected), `"mlp_pool_after"` (projected,
            then pooled), or `"pixel_shuffle"` (neighbouring patches are concatenated, then projected).
        connector_pooling (`str`, *optional*, defaults to `"average"`):
            How the two MLP connectors pool patches to `frame_token_pooled`: `"average"` or `"bilinear"`.
        connector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the connector's two linear layers, or `None` for one linear layer without bias.
        mod_keep_ratio (`float` or `list[float]`, *optional*, defaults to 0.2):
            Share of each frame's tokens that a routed layer keeps, in [0, 1]: `ceil(ratio * tokens)` tokens. A list
            gives one ratio per layer.
        mod_layers (`str` or `list[int]`, *optional*):
            The routed layers if `mod_keep_ratio` is one number: `"interleaved"` (1, 3, 5, ..., the default),
            `"interleaved_deep"` (3, 5, ...), `"all"`, `"all_deep"` (from 2), or a list of indices.
        mod_router (`str`, *optional*, defaults to `"learned"`):
            Router type, a name in [`ROUTERS`]: `"learned"` (highest scores), `"change"` (what has changed since the
            previous frame), `"uniform"` (even spacing) or `"random"`. Only `"learned"` has weights.
        mod_gate (`str`, *optional*, defaults to `"tanh"`):
            Factor of a layer's update by routers that learn, a name in [`GATES`]: `"linear"` (the score, as in the
            paper), `"sigmoid"`, `"tanh"` (`1 + 0.2 * tanh(score)`, as in p-MoD), `"straight_through"` (1, with the
            gradient of the sigmoid) or `"none"`. A learned router needs a gate or a `mod_router_loss` to learn from.
        mod_gate_on (`str`, *optional*, defaults to `"update"`):
            Whether the gate multiplies the layer's `"update"` (the paper) or its `"output"` (the authors' code).
        mod_keep_last (`bool`, *optional*, defaults to `True`):
            Whether a layer that keeps any token always keeps the frame's last, where the model decides to speak.
        mod_normalize_scores (`bool`, *optional*, defaults to `True` unless `mod_gate` is `"linear"`):
            Whether learned routers read normalised tokens, and gates read scores minus the mean of their frame.
            Otherwise scores of all tokens can grow together until the gate saturates. Checkpoints saved without
            this field keep their scores as they are.
        mod_router_loss (`str`, *optional*):
            `"gradient"` also trains learned routers to give the highest scores to the tokens of a frame that the loss
            is most sensitive to; see [`RouterLoss`]. It changes neither the reported loss nor inference.
        mod_router_loss_weight (`float`, *optional*, defaults to 1.0): Weight of that loss.
        stream_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the loss at frames, relative to text. A
            decision after the text of a frame counts as text in the model's own loss, and as a frame in training.
        interval_threshold (`float`, *optional*, defaults to 0.725): Speak if the probability of silence is lower.
        speak (`str`, *optional*, defaults to `"learned"`):
            When sessions speak without being asked: `"learned"` if the model was trained for it, otherwise `"every"`,
            `"change"` or `"probe"`; see [`StreamingSession`].
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the head shares the embedding table. True if it is in `text_config`.

    Raises:
        `ValueError`: If ratios, layers, the frame grid or token ids do not fit the two models.

    Example:

    ```python
    >>> config = VideoLLMMoDConfig(mod_layers="all_deep")
    >>> config.frame_num_tokens, config.layer_keep_counts[:4]
    (10, [10, 10, 2, 2])
    ```"""

    model_type = "videollm_mod"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    frame_token_cls: bool = True
    frame_token_pooled: list[int] | tuple[int, ...] | None = (3, 3)
    frame_size: int | None = None
    vision_feature_layer: int | None = None
    frame_token_id: int | None = 128256
    frame_token_interval_id: int | None = 11
    connector: str = "mlp"
    connector_pooling: Literal["average", "bilinear"] = "average"
    connector_hidden_act: str | None = "gelu"
    mod_keep_ratio: int | float | list[int | float] | tuple[int | float, ...] = 0.2
    mod_layers: str | list[int] | tuple[int, ...] | None = None
    mod_router: str = "learned"
    mod_gate: str = "tanh"
    mod_gate_on: Literal["update", "output"] = "update"
    mod_keep_last: bool = True
    mod_normalize_scores: bool | None = None
    mod_router_loss: Literal["gradient"] | None = None
    mod_router_loss_weight: int | float = 1.0
    stream_loss_weight: int | float = 1.0
    interval_threshold: int | float = 0.725
    speak: Literal["learned", "every", "change", "probe"] = "learned"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_near_misses(kwargs)
        self.text_config = make_part("text_config", _as_config, self.text_config, _DEFAULT_TEXT)
        vision_config = make_part("vision_config", _as_config, self.vision_config, _DEFAULT_VISION)
        # Most encoders are published together with a text tower (SigLIP, CLIP).
        self.vision_config = getattr(vision_config, "vision_config", vision_config)
        self.tie_word_embeddings = self.tie_word_embeddings or getattr(self.text_config, "tie_word_embeddings", False)
        if self.mod_normalize_scores is None:
            self.mod_normalize_scores = self.mod_gate != "linear"
        if self.mod_layers is None and not isinstance(self.mod_keep_ratio, (list, tuple)):
            self.mod_layers = "interleaved"
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "VideoLLMMoDConfig":
        """Return the configuration of a checkpoint. See `mod_normalize_scores` for checkpoints without that field."""
        return super().from_dict({"mod_normalize_scores": False, **config_dict}, **kwargs)

    def _refuse_near_misses(self, kwargs: dict[str, Any]) -> None:
        # The base class stores unknown keys silently: a misspelt `mod_keep_ration` would train the default.
        prefixes = ("mod_", "frame_", "connector")
        known = [name for name in type(self).__dataclass_fields__ if name.startswith(prefixes)]
        for name in (name for name in kwargs if name.startswith(prefixes)):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" Known are {', '.join(known)}."
            raise ValueError(f"VideoLLMMoDConfig has no field `{name}`.{hint}")

    @property
    def frame_num_tokens(self) -> int:
        """Number of tokens per frame: the pooled token, if there is one, and the grid."""
        return int(self.frame_token_cls) + math.prod(self.frame_token_pooled or (0,))

    @property
    def pixel_shuffle_factor(self) -> int:
        """Number of patches along each side of the square that `"pixel_shuffle"` concatenates; else 1."""
        return self.vision_grid[0] // self.frame_token_pooled[0] if self.connector == "pixel_shuffle" else 1

    @property
    def frame_feature_shape(self) -> tuple[int, int]:
        """Number and width of the features of one frame, which `encode_frames` returns and the connector reads."""
        width = self.vision_config.hidden_size
        if self.connector == "mlp_pool_after":
            return math.prod(self.vision_grid), width
        return self.frame_num_tokens, width * self.pixel_shuffle_factor**2

    @property
    def layer_keep_ratios(self) -> list[float]:
        """Keep ratio of every decoder layer, in [0, 1]; 1 for full layers."""
        layers = range(self.text_config.num_hidden_layers)
        if isinstance(self.mod_keep_ratio, (list, tuple)):
            return [float(ratio) for ratio in self.mod_keep_ratio]
        # `None` remains if one number replaced a list of ratios after construction.
        routed = "interleaved" if self.mod_layers is None else self.mod_layers
        routed = layers[MOD_LAYER_SCHEMES[routed]] if isinstance(routed, str) else routed
        return [float(self.mod_keep_ratio) if layer in routed else 1.0 for layer in layers]

    @property
    def layer_keep_counts(self) -> list[int]:
        """Number of tokens that every decoder layer keeps per frame: `ceil(ratio * frame_num_tokens)`."""
        # The constant absorbs binary rounding: 0.28 * 25 is 7.000000000000001 in floating point.
        return [math.ceil(ratio * self.frame_num_tokens - 1e-9) for ratio in self.layer_keep_ratios]

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers that keep fewer than all tokens of a frame."""
        return [layer for layer, count in enumerate(self.layer_keep_counts) if count < self.frame_num_tokens]

    @property
    def router_layers(self) -> list[int]:
        """Indices of the layers that have a router: routed, and keeping at least one token."""
        return [layer for layer, count in enumerate(self.layer_keep_counts) if 0 < count < self.frame_num_tokens]

    @property
    def vision_grid(self) -> tuple[int, int] | None:
        """Patch grid (height, width) of the vision encoder at `frame_size`, or `None` if unknown."""
        if self.frame_sides is None or getattr(self.vision_config, "patch_size", None) is None:
            return None
        (height, width), patch = self.frame_sides, patch_sides(self.vision_config)
        return height // patch[0], width // patch[1]

    @property
    def frame_sides(self) -> tuple[int, int] | None:
        """Height and width in pixels at which frames are encoded, or `None` if unknown."""
        image_size = self.frame_size or getattr(self.vision_config, "image_size", None)
        if image_size is not None:
            return height_and_width(image_size)
        side = math.isqrt(getattr(self.vision_config, "num_patches", None) or 0)
        return tuple(side * patch for patch in patch_sides(self.vision_config)) if side else None

    def with_frame_size(self, frame_size: int) -> "VideoLLMMoDConfig":
        """
        Return a copy with another `frame_size`. `"mlp"` keeps its tokens per frame. The other connectors keep the
        number of patches per token, so that a smaller frame has fewer tokens.

        Raises:
            `ValueError`: If the patches at this size do not fit the tokens, or more layers would be routed.
        """
        changed = copy.deepcopy(self)
        changed.frame_size = frame_size
        changed.validate_frame_size()
        before, after, factor = self.vision_grid, changed.vision_grid, self.pixel_shuffle_factor
        if any(side % factor for side in after):
            raise ValueError(
                f"`frame_size` is {frame_size}, which is {after[0]}x{after[1]} patches. This model makes one token of "
                f"{factor}x{factor} patches: choose a multiple of {frame_size // after[0] * factor} pixels."
            )
        if self.connector != "mlp":
            # Rounded up, as LLaVA-OneVision pools an odd number of patches.
            sides = zip(after, self.frame_token_pooled, before, strict=True)
            changed.frame_token_pooled = [max(1, -(-new * tokens // old)) for new, tokens, old in sides]
        for validate in type(self).__class_validators__:
            validate(changed)
        if missing := sorted({*changed.router_layers}.difference(self.router_layers)):
            raise ValueError(
                f"With `frame_size={frame_size}` layers {missing} would be routed too, and they have no router. "
                "Choose another size, or a smaller `mod_keep_ratio`."
            )
        return changed

    def validate_basics(self) -> None:
        """Check names of choices, and the sizes of both models. This runs before other checks, by its name."""
        choices = {"connector": CONNECTORS, "connector_hidden_act": [None, *ACT2FN]}
        for field, known in (choices | {"mod_router": ROUTERS, "mod_gate": GATES}).items():
            if (name := getattr(self, field)) not in known:
                raise ValueError(f"`{field}` is {name!r}; known names are {', '.join(map(str, known))}.")
        for kind, config in (("language model", self.text_config), ("vision encoder", self.vision_config)):
            for name in _SIZES:
                size = getattr(config, name, None)
                sides = size if isinstance(size, (list, tuple)) else [1 if size is None else size]
                sides = [size] if name == "hidden_size" else sides  # the connector needs it
                if not sides or any(type(n) is not int or n < 1 for n in sides):
                    raise ValueError(f"`{name}` of the {kind} must be at least 1, got {size!r}.")
        if (channels := getattr(self.vision_config, "num_channels", 3)) != 3:
            raise ValueError(f"`num_channels` of the vision encoder must be 3, since frames are RGB, got {channels}.")
        heads, groups = self.text_config.num_attention_heads, getattr(self.text_config, "num_key_value_heads", None)
        if heads % (groups or 1):
            raise ValueError(f"`num_attention_heads` {heads} is no multiple of `num_key_value_heads` {groups}.")

    def validate_frame_size(self) -> None:
        """Check the size of frames against the encoder's patches."""
        patch_size, image_size = (getattr(self.vision_config, name, None) for name in ("patch_size", "image_size"))
        height, width = patch_sides(self.vision_config)
        if self.frame_size is None or self.frame_size == image_size:
            # Stages of a hierarchical encoder pad what is left over, so that it has more patches than `vision_grid`.
            sides = zip(self.frame_sides or (), (height, width), strict=False)
            if hasattr(self.vision_config, "depths") and any(side % patch for side, patch in sides):
                raise ValueError(
                    f"`vision_config.image_size` is {image_size}; it must be a multiple of the last stage's patches, "
                    f"{height}x{width} pixels."
                )
            return
        if patch_size is None:
            raise ValueError(f"`frame_size` needs an encoder with patches; {self.vision_config.model_type} has none.")
        if self.frame_size < 1 or self.frame_size % height or self.frame_size % width:
            patches = f"the encoder's patches, {height}x{width} pixels"
            raise ValueError(f"`frame_size` is {self.frame_size}; it must be a multiple of {patches}.")

    def validate_frame_tokens(self) -> None:
        """Check the layout of a frame against the encoder."""
        grid = self.frame_token_pooled
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"`frame_token_pooled` must be two positive numbers (height, width), got {list(grid)}.")
        if self.frame_num_tokens < 1:
            raise ValueError("A frame needs tokens: set `frame_token_cls=True`, `frame_token_pooled=(h, w)` or both.")
        vision_grid = self.vision_grid
        if grid is not None and vision_grid is not None and (grid[0] > vision_grid[0] or grid[1] > vision_grid[1]):
            raise ValueError(
                f"`frame_token_pooled` is {grid[0]}x{grid[1]}, but the vision encoder has only "
                f"{vision_grid[0]}x{vision_grid[1]} patches: choose a grid no larger than that."
            )
        layer, depth = self.vision_feature_layer, getattr(self.vision_config, "num_hidden_layers", math.inf)
        if hasattr(self.vision_config, "depths"):
            depth = 1  # earlier stages have other grids and widths
        if layer is not None and not -depth <= layer <= -1:
            raise ValueError(f"`vision_feature_layer` counts layers from the end, -1 to -{depth}, got {layer}.")
        if self.frame_token_cls and getattr(self.vision_config, "vision_use_head", True) is False:
            raise ValueError("`vision_config.vision_use_head` is False, so set `frame_token_cls=False` too.")

    def validate_connector(self) -> None:
        """Check the connector against the layout of a frame."""
        if self.connector == "mlp" or self.frame_num_tokens < 1:  # `validate_frame_tokens` refuses a frame of none
            return
        name, tokens, patches = f"`connector={self.connector!r}`", self.frame_token_pooled, self.vision_grid
        if self.frame_token_cls:
            raise ValueError(f"{name} reads patches only: set `frame_token_cls=False`.")
        if patches is None:
            kind = self.vision_config.model_type
            raise ValueError(f"{name} needs the patch grid, but `vision_config` ({kind}) gives no `image_size`.")
        if self.connector == "pixel_shuffle" and self.connector_pooling != "average":
            raise ValueError(f"{name} does not pool patches: leave `connector_pooling` out.")
        if self.connector == "pixel_shuffle" and [side * self.pixel_shuffle_factor for side in tokens] != [*patches]:
            raise ValueError(
                f"{name} concatenates squares of patches: the grid of {patches[0]}x{patches[1]} patches must be "
                f"`frame_token_pooled` times one whole number, but that is {'x'.join(map(str, tokens))}."
            )

    def validate_frame_token_ids(self) -> None:
        """Check the ids of the frame token, the interval token and the end of sequence."""
        if self.frame_token_id is None or not 0 <= self.frame_token_id < 2**63:
            raise ValueError(f"`frame_token_id` must be the id of the frame token, got {self.frame_token_id}.")
        vocab_size, interval = self.text_config.vocab_size, self.frame_token_interval_id
        if interval is not None and not 0 <= interval < vocab_size:
            raise ValueError(f"`frame_token_interval_id` {interval} is outside the vocabulary of {vocab_size} tokens.")
        if interval == self.frame_token_id:
            raise ValueError(f"`frame_token_interval_id` and `frame_token_id` are both {interval}; they must differ.")
        if interval is None and getattr(self.text_config, "eos_token_id", None) is None:
            raise ValueError("Set `frame_token_interval_id` or `text_config.eos_token_id` as the target of silence.")

    def validate_routing(self) -> None:
        """Check keep ratios and routed layers against the language model."""
        layers = range(self.text_config.num_hidden_layers)
        per_layer = isinstance(self.mod_keep_ratio, (list, tuple))
        ratios = self.mod_keep_ratio if per_layer else [self.mod_keep_ratio]
        for ratio in ratios:
            if isinstance(ratio, bool) or not 0 <= ratio <= 1:
                raise ValueError(f"`mod_keep_ratio` must lie in [0, 1], got {ratio}.")
        if per_layer and len(ratios) != len(layers):
            raise ValueError(f"`mod_keep_ratio` gives {len(ratios)} ratios, but there are {len(layers)} layers.")
        if per_layer and self.mod_layers is not None:
            raise ValueError("`mod_keep_ratio` already gives one ratio per layer: leave `mod_layers` out.")
        if isinstance(self.mod_layers, str):
            if self.mod_layers not in MOD_LAYER_SCHEMES:
                known = ", ".join(MOD_LAYER_SCHEMES)
                raise ValueError(f"`mod_layers` is {self.mod_layers!r}; known schemes are {known}; or list indices.")
        elif wrong := set(self.mod_layers or ()).difference(layers):
            raise ValueError(f"`mod_layers` names layer {min(wrong)}, but the decoder has layers 0 to {layers[-1]}.")

        has_gradient = GATES[self.mod_gate] is not None or self.mod_router_loss is not None
        if self.router_layers and ROUTERS[self.mod_router].learns and not has_gradient:
            raise ValueError(
                f"`mod_router={self.mod_router!r}` cannot learn with `mod_gate='none'`: its gradient comes through "
                "the gate. Choose a gate, a `mod_router_loss`, or a router that does not learn, such as 'uniform'."
            )
        single = [layer for layer in self.router_layers if self.layer_keep_counts[layer] == 1]
        if single and self.mod_keep_last and ROUTERS[self.mod_router].learns:
            logger.warning_once(
                f"Routers have no choice in layers {', '.join(map(str, single))}: these keep 1 of "
                f"{self.frame_num_tokens} tokens per frame, and `mod_keep_last` makes it the last. Set "
                "`mod_keep_last=False`, or a larger `mod_keep_ratio`."
            )

    def validate_weights_and_threshold(self) -> None:
        """Check the weights of losses and the interval threshold."""
        if not 0 <= self.interval_threshold <= 1:
            raise ValueError(f"`interval_threshold` is a probability in [0, 1], got {self.interval_threshold}.")
        for field in ("stream_loss_weight", "mod_router_loss_weight"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"`{field}` must be finite and not negative, got {getattr(self, field)}.")

    def estimate_cost(
        self,
        frames: int,
        text_tokens: int,
        *,
        past_frames: int = 0,
        past_text_tokens: int = 0,
        bytes_per_value: int = 2,
    ) -> CostEstimate:
        r"""
        Estimate one forward pass in closed form, under this scheme and at full compute.

        A layer that keeps \\(k\\) of \\(N\\) tokens per frame runs on \\(s = kF + T\\) of \\(NF + T\\) new tokens and
        costs \\(2sP + 4 s (s + s_{past}) H\\) operations, with \\(P\\) weights in its linear layers and \\(H\\) heads
        times head size. The head runs once per frame and once per text token.

        Args:
            frames, text_tokens (`int`): Numbers of new frames, and of new text tokens with interval tokens.
            past_frames, past_text_tokens (`int`, *optional*, defaults to 0): The same numbers in the cache.
            bytes_per_value (`int`, *optional*, defaults to 2): Bytes of one number in the key/value cache.

        Raises:
            `ValueError`: If a count is negative, or the language model has mixture-of-experts layers.
        """
        counts = (frames, text_tokens, past_frames, past_text_tokens)
        if min(counts) < 0:
            raise ValueError(f"Numbers of frames and tokens must not be negative, got {counts}.")
        text = self.text_config
        if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
            raise ValueError(f"`estimate_cost` supports dense layers only; {text.model_type!r} has experts.")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query_size = text.num_attention_heads * head_dim
        key_value_size = getattr(text, "num_key_value_heads", text.num_attention_heads) * head_dim
        layer_weights = text.hidden_size * (2 * (query_size + key_value_size) + 3 * text.intermediate_size)

        def layer_cost(keep_count: int) -> tuple[int, int]:
            new = keep_count * frames + text_tokens
            total = new + keep_count * past_frames + past_text_tokens
            return 2 * new * layer_weights + 4 * new * total * query_size, total

        rows, width = self.frame_feature_shape
        has_two_layers = self.connector_hidden_act is not None
        shared = 2 * frames * rows * (width + has_two_layers * text.hidden_size) * text.hidden_size
        shared += 2 * (frames + text_tokens) * text.hidden_size * text.vocab_size
        # A router scores every token of its layer's input.
        router_flops = ROUTERS[self.mod_router].flops_per_token(self)
        routers = len(self.router_layers) * (frames * self.frame_num_tokens + text_tokens) * router_flops
        layers = [layer_cost(count) for count in self.layer_keep_counts]
        full = [layer_cost(self.frame_num_tokens)] * len(layers)
        entry_bytes = 2 * key_value_size * bytes_per_value
        return CostEstimate(
            flops=shared + routers + sum(flops for flops, _ in layers),
            full_flops=shared + sum(flops for flops, _ in full),
            cache_entries=tuple(entries for _, entries in layers),
            cache_bytes=entry_bytes * sum(entries for _, entries in layers),
            full_cache_bytes=entry_bytes * sum(entries for _, entries in full),
        )


def check_language_model(model: Any) -> None:
    """Check that a language model has the shape of Llama, which the layer loop needs. Raises `ValueError`."""
    name, config, tested = type(model).__name__, model.config, ", ".join(_TESTED_TEXT_MODELS)
    if missing := [part for part in ("embed_tokens", "layers", "rotary_emb", "norm") if not hasattr(model, part)]:
        raise ValueError(f"{name} lacks the Llama shape; missing: {', '.join(missing)}. Tested models are {tested}.")
    if "layer_type" in inspect.signature(type(model.rotary_emb).forward).parameters:
        raise ValueError(f"{name} rotates positions differently by layer type, which is not supported.")
    if 2 * model.rotary_emb.inv_freq.numel() > model.layers[0].self_attn.head_dim:  # Transformers before 5.24
        raise ValueError(f"{name} rotates pairs of numbers, so its `head_dim` must be even.")
    if scaled := [field for field in _SCALING_FIELDS if getattr(config, field, None) not in (None, 1, 1.0)]:
        raise ValueError(f"{name} scales its embeddings or logits ({', '.join(scaled)}), which is not supported.")
    if types := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{name} has layers of type {', '.join(sorted(types))}; routing needs attention layers.")
    if config.model_type not in _TESTED_TEXT_MODELS:
        logger.warning_once(f"{name} has the shape that routing needs, but was not tested; {tested} were.")


def make_part(part: str, make: Callable[..., Any], *given: Any) -> Any:
    """Return what the library makes of a part of the configuration. Raise `ValueError` if it fails."""
    try:
        return make(*given)
    except _LIBRARY_ERRORS as error:
        raise ValueError(f"`{part}` makes no model: {type(error).__name__}: {error}") from error
    except StrictDataclassClassValidationError as error:
        raise ValueError(f"`{part}` makes no model: {error.__cause__}") from error


def _as_config(config: dict[str, Any] | PreTrainedConfig | None, default: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(default if config is None else config)  # without a model type, it is the default's
    return AutoConfig.for_model(fields.pop("model_type", default["model_type"]), **fields)


def patch_sides(vision_config: Any) -> tuple[int, int]:
    """Return height and width in pixels of an encoder's output patches. Swin's stages double them (2103.14030)."""
    doublings = len(getattr(vision_config, "depths", (0,))) - 1
    height, width = height_and_width(getattr(vision_config, "patch_size", None) or 1)
    return height << doublings, width << doublings


def height_and_width(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return a size that a vision configuration gives as one number or two as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


VideoLLMMoDConfig.register_for_auto_class()
# `transformers serve` looks here for the model's type, which leads to `auto_map`, and for the name of its class.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["videollm_mod"] = "VideoLLMMoDForConditionalGeneration"


__all__ = ["CostEstimate", "VideoLLMMoDConfig"]
