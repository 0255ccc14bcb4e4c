# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""VideoLLM-MoD: a streaming video language model with routed layers, which run on a share of each frame's tokens."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_peft_available, logging

from .cache_videollm_mod import CACHE_NAME, KeyRotation, TokenRun, VideoLLMMoDCache, one_cache
from .checks_videollm_mod import check_count, check_normalized
from .configuration_videollm_mod import CostEstimate, VideoLLMMoDConfig, check_language_model, make_part, patch_sides
from .generation_videollm_mod import VideoLLMMoDGenerationMixin
from .routers_videollm_mod import ROUTERS
from .routing_videollm_mod import (
    FrameLayout,
    LayerMasks,
    LayerRouting,
    add_routing,
    check_on_device,
    compare_frames,
    find_frames,
    find_positions,
)


if is_peft_available():
    from peft import LoraConfig

logger = logging.get_logger(__name__)

_AUTO_MAP = {"AutoConfig": "configuration_videollm_mod.VideoLLMMoDConfig"} | dict.fromkeys(
    ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "modeling_videollm_mod.VideoLLMMoDForConditionalGeneration",
)

# Encoders that take frames of any size: their positions are interpolated, fractions of the frame, or relative.
_ANY_SIZE = ("smolvlm_vision", "idefics3_vision", "internvl_vision", "siglip2_vision_model", "dinov2")


@dataclass
class VideoLLMMoDModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Hidden states of the full sequence and, on request, the router's choices.

    Args:
        router_scores (`tuple[torch.Tensor]`, *optional*, returned when `output_router_scores=True`):
            One float32 tensor per routed layer, `(batch, frames, tokens)`; 0 for missing frames and unscored tokens.
        kept_tokens (`tuple[torch.Tensor]`, *optional*, returned when `output_router_scores=True`):
            One boolean tensor per routed layer, `(batch, frames, tokens)`: True at kept tokens.
    """

    router_scores: tuple[torch.Tensor, ...] | None = None
    kept_tokens: tuple[torch.Tensor, ...] | None = None
    if CACHE_NAME != "cache":
        cache = property(lambda self: self.past_key_values)


@dataclass
class VideoLLMMoDCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Output of [`VideoLLMMoDForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Cross-entropy on text plus `stream_loss_weight` times cross-entropy at frames, over the number of labels.
        logits (`torch.Tensor` of shape `(batch, logits_to_keep, vocabulary)`, *optional*):
            Scores of the next token. `None` in training with labels, where only labelled positions are projected.
        cache, hidden_states, attentions (*optional*):
            As in Transformers; attentions of a routed layer are those of its kept and text tokens.
        router_scores, kept_tokens (*optional*): See [`VideoLLMMoDModelOutputWithPast`].
    """

    router_scores: tuple[torch.Tensor, ...] | None = None
    kept_tokens: tuple[torch.Tensor, ...] | None = None
    if CACHE_NAME != "cache":
        cache = property(lambda self: self.past_key_values)


class VideoLLMMoDConnector(nn.Module):
    """
    Frame features (..., *`config.frame_feature_shape`) to text embeddings (..., tokens, hidden).

    All connectors are linear, activation, linear, or one linear layer without an activation in the configuration.
    `"mlp_pool_after"` (LLaVA-OneVision's video path) then pools the patches; `"pixel_shuffle"` normalises its input,
    as in InternVL, unless it is one linear layer, as in SmolVLM and Idefics3.
    """

    def __init__(self, config: VideoLLMMoDConfig) -> None:
        super().__init__()
        width, hidden_size = config.frame_feature_shape[1], config.text_config.hidden_size
        has_two_layers = config.connector_hidden_act is not None
        is_normalized = has_two_layers and config.connector == "pixel_shuffle"
        self.layer_norm = nn.LayerNorm(width) if is_normalized else nn.Identity()
        self.linear_1 = nn.Linear(width, hidden_size, bias=has_two_layers)
        self.act = ACT2FN[config.connector_hidden_act] if has_two_layers else nn.Identity()
        self.linear_2 = nn.Linear(hidden_size, hidden_size) if has_two_layers else nn.Identity()
        self.config = config

    def forward(self, frame_features: torch.Tensor) -> torch.Tensor:
        """Project frame features to the width of the language model."""
        projected = self.linear_2(self.act(self.linear_1(self.layer_norm(frame_features))))
        config = self.config
        if config.connector != "mlp_pool_after":
            return projected
        grids = config.vision_grid, config.frame_token_pooled
        pooled = _pool_patches(projected.reshape(-1, *projected.shape[-2:]), *grids, config.connector_pooling)
        return pooled.view(*projected.shape[:-2], *pooled.shape[1:])


class VideoLLMMoDPreTrainedModel(PreTrainedModel):
    """Base class: loading, saving, initialisation, frame features, caches and cost."""

    config_class = VideoLLMMoDConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = True
    _supports_attention_backend = _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Load safetensors as in Transformers; `use_safetensors=False` loads pickled weights. Checkpoints of version 0.1,
        which kept routers in `model.routers`, load too. A `ValueError` names the first weight of another shape.
        """
        # The library's own error names neither the weight nor its shapes.
        options = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        options["key_mapping"] = {r"routers\.(\d+)\.": r"language_model.layers.\1.router.", **(key_mapping or {})}
        path = pretrained_model_name_or_path
        try:
            model, found = super().from_pretrained(path, *args, **options)
        except SafetensorError as error:
            raise ValueError(f"A safetensors file of '{path}' is not complete: {error}.") from error
        wrong = sorted(found["mismatched_keys"])
        if wrong and not ignore_mismatched_sizes:
            name, stored, expected = wrong[0]
            raise ValueError(
                f"{len(wrong)} weights of '{path}' have other shapes than its configuration says: `{name}` is "
                f"{tuple(stored)} in the checkpoint and {tuple(expected)} in the model."
            )
        return (model, found) if output_loading_info else model

    def post_init(self) -> None:
        """Finish construction as in Transformers, and list only the unsplittable blocks that this model has."""
        super().post_init()
        # Some encoders list a pooling head that their configuration leaves out, and FSDP looks for every entry.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules) & present

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as in Transformers, with the code, and register it for every `Auto` class that fits."""
        if self.is_remote_code():
            # `register_for_auto_class` remembers one class per model.
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **_AUTO_MAP}
        # FSDP2 replaces the model's class by one defined in torch. Save the code of the class it derives from.
        cls = type(self)
        own = next((base for base in cls.__mro__ if vars(base).get("_auto_class") is not None), cls)
        names = cls.__module__, cls.__name__
        cls.__module__, cls.__name__ = own.__module__, own.__name__
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            cls.__module__, cls.__name__ = names

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise weights as in Transformers, and routers: the class of the language model does not know them."""
        for router in self.base_model.routers.values():
            router.apply(lambda module: self._initialize_weights(module, self.is_custom_code()))
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not getattr(module, "starts_at_zero", False):
            super()._init_weights(module)
        elif self.config.mod_gate in ("linear", "sigmoid"):
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
        else:
            init.zeros_(module.weight)

    def encode_frames(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """
        Encode normalised frames (..., channels, height, width) as the features that the connector reads, (...,
        *`config.frame_feature_shape`): the pooled token first, then the grid row by row.

        Raises:
            `ValueError`: If frames are not normalised or of a wrong size, or the encoder has no pooled token.
        """
        encoder, layer = self.base_model.vision_encoder, self.config.vision_feature_layer
        leading = check_normalized(pixel_values_videos).shape[:-3]
        pixel_values = pixel_values_videos.reshape(-1, *pixel_values_videos.shape[-3:]).to(encoder.dtype)
        options = {"output_hidden_states": layer is not None}
        outputs, grid = _run_encoder(encoder, pixel_values, self.config.frame_size, **options)
        tokens = []
        if self.config.frame_token_cls:
            if outputs.pooler_output is None:
                raise ValueError(f"{type(encoder).__name__} has no pooled output: set `frame_token_cls=False`.")
            tokens.append(outputs.pooler_output[:, None])
        if self.config.frame_token_pooled is not None:
            patches = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
            # Some encoders put class and register tokens first.
            tokens.append(self._patch_features(patches[:, -math.prod(grid) :], grid))
        features = torch.cat(tokens, dim=1)
        return features.view(*leading, *features.shape[1:])

    def _patch_features(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return patches (frames, patches, vision hidden) as the connector reads them."""
        config = self.config
        if config.connector == "mlp":
            return _pool_patches(patches, grid, config.frame_token_pooled, config.connector_pooling)
        if grid != config.vision_grid:
            expected = " x ".join(map(str, config.vision_grid))
            raise ValueError(f"Frames have {grid[0]} x {grid[1]} patches, but {config.connector!r} needs {expected}.")
        factor = config.pixel_shuffle_factor
        squares = patches.unflatten(1, (grid[0] // factor, factor, grid[1] // factor, factor)).transpose(2, 3)
        return squares.flatten(3).flatten(1, 2)

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """Height and width of frames for the vision encoder, or `None` if it takes several sizes."""
        is_fixed = self.config.frame_size is not None or self.config.connector != "mlp"
        return self.config.frame_sides if is_fixed or _has_one_size(self.base_model.vision_encoder) else None

    def set_frame_size(self, processor: Any, frame_size: int) -> None:
        """
        Encode frames at another size, a side in pixels such as 256, in sessions that are opened from now on. Smaller
        frames take less time and, except with the connector `"mlp"`, have fewer tokens.

        Raises:
            `ValueError`: If the encoder has positions for one size only, or the size does not fit the connector.
        """
        _check_size(self.base_model.vision_encoder, check_count("frame_size", frame_size))
        changed = self.config.with_frame_size(frame_size)
        self.config.frame_size, self.config.frame_token_pooled = changed.frame_size, changed.frame_token_pooled
        processor.set_frame_size(changed.frame_size, changed.frame_num_tokens)

    @can_return_tuple
    def get_video_features(self, pixel_values_videos: torch.Tensor) -> BaseModelOutputWithPooling | tuple:
        """Return frames (..., channels, height, width) as text embeddings (..., tokens, hidden): `pooler_output`."""
        features = self.encode_frames(pixel_values_videos)
        return BaseModelOutputWithPooling(features, self.base_model.connector(features))

    def new_cache(
        self, *, max_lengths: Sequence[int] | None = None, offloading: bool = False, dtype: torch.dtype | None = None
    ) -> VideoLLMMoDCache:
        """Return an empty key/value cache for this model's layers; see [`VideoLLMMoDCache`]."""
        num_tokens, counts = self.config.frame_num_tokens, self.config.layer_keep_counts
        skipped = {layer: num_tokens - count for layer, count in enumerate(counts)}
        return VideoLLMMoDCache(len(counts), skipped, max_lengths=max_lengths, offloading=offloading, dtype=dtype)

    def evict_tokens(self, cache: VideoLLMMoDCache, runs: Sequence[TokenRun]) -> None:
        """
        Remove runs of tokens from a one-row cache; see [`~VideoLLMMoDCache.evict`]. Gaps between tokens are closed, so
        an endless stream stays within the distances that the language model was trained for.
        """
        cache.evict(runs, KeyRotation(self.base_model.language_model))

    def estimate_cost(
        self, frames: int, text_tokens: int, *, past_frames: int = 0, past_text_tokens: int = 0
    ) -> CostEstimate:
        """Estimate a forward pass as [`~VideoLLMMoDConfig.estimate_cost`] does, and count the vision encoder's too."""
        past = {"past_frames": past_frames, "past_text_tokens": past_text_tokens}
        cost = self.config.estimate_cost(frames, text_tokens, **past, bytes_per_value=self.dtype.itemsize)
        return replace(cost, vision_flops=frames * _vision_flops_per_frame(self.config))


class VideoLLMMoDModel(VideoLLMMoDPreTrainedModel):
    """
    Vision encoder, connector and language model, without a language modelling head. The language model is the
    library's; its routed layers have a router and run on kept frame tokens and text.
    """

    def __init__(self, config: VideoLLMMoDConfig) -> None:
        super().__init__(config)
        # `from_pretrained` sets fields after construction, so validate again.
        for validate in type(config).__class_validators__:
            validate(config)
        self.vision_encoder = make_part("vision_config", AutoModel.from_config, config.vision_config)
        _check_size(self.vision_encoder, config.frame_size)
        self.connector = VideoLLMMoDConnector(config)
        self.language_model = make_part("text_config", AutoModel.from_config, config.text_config)
        check_language_model(self.language_model)
        for index, layer in enumerate(self.language_model.layers):
            router = ROUTERS[config.mod_router](config, index) if index in config.router_layers else None
            add_routing(layer, index, router)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        num_frames: Sequence[int] | torch.Tensor | None = None,
        frame_token_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_scores: bool = False,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoLLMMoDModelOutputWithPast:
        r"""
        Run the model. Arguments that are not listed here mean what they mean in Transformers.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Tokens, with `frame_token_id` at frame tokens. Frames must be complete and contiguous.
            pixel_values_videos (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, *optional*):
                The frames of this call, in order. Rows with fewer frames are padded at the end.
            frame_features (`torch.Tensor` of shape `(batch, frames, *config.frame_feature_shape)`, *optional*):
                The same frames as [`~VideoLLMMoDPreTrainedModel.encode_frames`] returns them, in place of pixels.
            num_frames (`Sequence[int]` or `torch.LongTensor` of shape `(batch,)`, *optional*):
                Number of frames of each row. For several rows the call waits for the device unless the host has it.
            frame_token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*):
                True at frame tokens. Required for frames in `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, seen + sequence)`, *optional*):
                0 at padding. Leave it out if nothing is padded, or only on the right in training.
            cache ([`VideoLLMMoDCache`], *optional*):
                Keys and values of earlier calls, also as `past_key_values`. Without routed layers, any `Cache` works.
            output_router_scores (`bool`, *optional*): Whether to return router scores and kept tokens.
            seq_idx (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
                Index of each token's dialogue, if a row packs several for training. Each starts at position 0.
                Does not work with a cache or with flash attention.

        Returns:
            [`VideoLLMMoDModelOutputWithPast`]

        Raises:
            `ValueError`: If inputs exclude or contradict each other.
        """
        cache = one_cache(cache, past_key_values)
        _check_inputs(self.config, input_ids, inputs_embeds, attention_mask, cache, use_cache, seq_idx, kwargs)
        use_cache = seq_idx is None and self._use_cache(use_cache, cache)
        frames = pixel_values_videos if frame_features is None else frame_features
        given = (pixel_values_videos, frame_features, num_frames, frame_token_mask)
        layout = find_frames(self.config, input_ids, inputs_embeds, *given)
        hidden_states = self._embed(input_ids, inputs_embeds, frames, frame_features is not None, layout)
        if use_cache and cache is None:
            cache = self.new_cache()
        num_seen = 0 if cache is None else cache.get_seq_length()
        position_ids = find_positions(
            position_ids, layout, attention_mask, cache, num_seen, seq_idx, device=hidden_states.device
        )
        if self.training and torch.is_grad_enabled():
            self._warn_if_routers_are_frozen()

        # The text model's own hooks record these.
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        kwargs.setdefault("output_hidden_states", self.config.output_hidden_states)
        masks = LayerMasks(self.language_model.config, layout, attention_mask, cache, seq_idx)
        scores = compare_frames(self.config, layout, hidden_states, cache, num_seen, seq_idx)
        routing = LayerRouting(
            self.config, layout, masks, num_seen, position_ids, scores, collects=output_router_scores
        )
        outputs = self.language_model(
            inputs_embeds=hidden_states,
            # Layers get their masks from `routing`. A mask in four dimensions keeps the library from making one.
            attention_mask=hidden_states.new_empty(1, 1, 1, 1),
            position_ids=position_ids,
            use_cache=cache is not None,
            routing=routing,
            **{CACHE_NAME: cache, **kwargs},
        )
        if hasattr(cache, "advance"):
            cache.advance(layout.sequence_length, layout.inside_frame)
        return VideoLLMMoDModelOutputWithPast(
            **outputs,
            router_scores=tuple(routing.scores) if output_router_scores else None,
            kept_tokens=tuple(routing.kept) if output_router_scores else None,
        )

    def _use_cache(self, use_cache: bool | None, cache: Cache | None) -> bool:
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        # Checkpointed layers do not fill a cache. Up to Transformers 5.23 this holds without gradients too.
        if self.training and self.gradient_checkpointing and (torch.is_grad_enabled() or CACHE_NAME != "cache"):
            if cache is not None:
                raise ValueError("Checkpointed layers ignore the cache that is given: call `model.eval()` first.")
            if use_cache:
                logger.warning_once("`use_cache=True` does not work with gradient checkpointing: it is now False.")
            return False
        return use_cache

    def _embed(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        frames: torch.Tensor | None,
        are_features: bool,
        layout: FrameLayout,
    ) -> torch.Tensor:
        """Return the embeddings (batch, sequence, hidden) of text and frames."""
        if inputs_embeds is None:
            # The frame token's id may lie outside the embedding table, as VideoLLM-online's does.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(layout.frame_token_mask, 0))
        if frames is None or layout.total_frames == 0:
            return inputs_embeds
        if min(layout.num_frames) == frames.shape[1]:
            frames = frames.flatten(0, 1)
        else:
            frames = torch.cat([row[:count] for row, count in zip(frames, layout.num_frames, strict=True)])
        features = frames if are_features else self.encode_frames(frames)
        # The connector may be trained in float32 beside a bfloat16 model, or be quantised to integers.
        dtypes = [weight.dtype for weight in self.connector.parameters() if weight.is_floating_point()]
        connected = self.connector(features.to(dtypes[0] if dtypes else inputs_embeds.dtype)).flatten(0, 1)
        flat = inputs_embeds.flatten(0, 1)
        flat = flat.index_copy(0, layout.token_index.flatten(), connected.to(flat.device, flat.dtype))
        return flat.view_as(inputs_embeds)

    @property
    def routers(self) -> dict[str, nn.Module]:
        """The routers, which are submodules of their layers, by the layer's index."""
        layers = self.language_model.layers
        return {str(layer.layer_index): layer.router for layer in layers if layer.router is not None}

    def _warn_if_routers_are_frozen(self) -> None:
        learns = {name: [w.requires_grad for w in router.parameters()] for name, router in self.routers.items()}
        if frozen := [layer for layer, weights in learns.items() if weights and not any(weights)]:
            logger.warning_once(
                f"The routers of layers {', '.join(frozen)} are frozen while this model trains. With PEFT, use "
                "`model.make_lora_config()`, or add its `modules_to_save` to yours."
            )


class VideoLLMMoDForConditionalGeneration(VideoLLMMoDPreTrainedModel, VideoLLMMoDGenerationMixin, GenerationMixin):
    """VideoLLM-MoD with its language modelling head: it watches a stream, decides when to speak, and speaks."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VideoLLMMoDConfig) -> None:
        super().__init__(config)
        self.model = VideoLLMMoDModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        num_frames: Sequence[int] | torch.Tensor | None = None,
        frame_token_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_router_scores: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoLLMMoDCausalLMOutputWithPast:
        r"""
        Run the model and its head. See [`VideoLLMMoDModel.forward`] for the other arguments.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Tokens to learn, not shifted, -100 where nothing is learned. After a frame's last token comes the
                interval token if the model should stay silent, and the text that follows if it should speak.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Number of last positions to compute logits at, or their indices; 0 for all. The loss needs none.
            num_items_in_batch (`int`, *optional*):
                Divisor of the loss for gradient accumulation. Defaults to the number of labels of this call.

        Returns:
            [`VideoLLMMoDCausalLMOutputWithPast`]
        """
        num_frames = num_frames.tolist() if isinstance(num_frames, torch.Tensor) else num_frames
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            frame_features=frame_features,
            num_frames=num_frames,
            frame_token_mask=frame_token_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_scores=output_router_scores,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is None or not self.training:
            counts = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if counts else logits_to_keep.to(hidden_states.device)
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            frames = (pixel_values_videos, frame_features, num_frames)
            layout = find_frames(self.config, input_ids, inputs_embeds, *frames, frame_token_mask)
            # Only text and each frame's last token can carry labels, so a frame needs one row of logits.
            reuse = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
            rows = (logits if reuse else hidden_states).flatten(0, 1)
            rows = rows[layout.speaking_index.to(rows.device)]
            loss = self._stream_loss(rows if reuse else self.lm_head(rows), labels, layout, num_items_in_batch)
        return VideoLLMMoDCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_scores=outputs.router_scores,
            kept_tokens=outputs.kept_tokens,
        )

    def _stream_loss(
        self,
        logits: torch.Tensor,
        labels: torch.LongTensor,
        layout: FrameLayout,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """Return LIVE's loss on text and on one decision per frame (arXiv 2406.11816, section 3.2)."""
        # With layers on several devices, the layout lies beside the embeddings.
        index, is_frame = layout.speaking_index.to(logits.device), layout.frame_token_mask.to(logits.device)
        labels = F.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
        num_labels = (labels != -100).sum()
        labels = labels.flatten()[index]
        message = "`labels` must be -100 inside frames, where nothing can be learned. Number of labels there"
        check_on_device((num_labels - (labels != -100).sum())[None], [0], message)
        losses = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
        losses = torch.where(is_frame.flatten()[index], self.config.stream_loss_weight * losses, losses)
        count = num_labels.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / (count.to(losses.device) if isinstance(count, torch.Tensor) else count)

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the first decoder layer. Patch embeddings get no hook: some return a tuple."""
        self.model.language_model.enable_input_require_grads()
        self._require_grads_hooks = self.model.language_model._require_grads_hooks

    @property
    def router_names(self) -> list[str]:
        """Names of the routers that learn, for PEFT's `modules_to_save`."""
        learns = ROUTERS[self.config.mod_router].learns
        return [f"layers.{layer}.router" for layer in self.model.routers] if learns else []

    def make_lora_config(self, **overrides: Any) -> "LoraConfig":
        """
        Return LIVE's choice of what to train (arXiv 2406.11816, section 4), and the routers: LoRA on the language
        model and an untied head, connector and routers completely. `overrides` change fields of `peft.LoraConfig`.
        Raises `ValueError` if the connector or the vision encoder is to be trained and its weights are quantised.
        """
        if not is_peft_available():
            raise ImportError("`make_lora_config` needs PEFT: `pip install peft`.")
        # Merging the adapter of a tied head would change the embeddings too.
        head = "" if self.config.tie_word_embeddings else r"|(.*\.)?lm_head"
        modules = [item for item in self.model.language_model.layers.named_modules() if ".router" not in item[0]]
        linear = sorted({name.rsplit(".")[-1] for name, module in modules if isinstance(module, nn.Linear)})
        fields = {"task_type": "CAUSAL_LM", "r": 128, "lora_alpha": 256, "lora_dropout": 0.05}
        target = rf"(.*\.)?language_model\.layers\.\d+\.(?!router\.)(.*\.)?({'|'.join(linear)}){head}"
        fields |= {"target_modules": target, "modules_to_save": ["connector", *self.router_names], **overrides}
        saved = fields["modules_to_save"] or ()
        parts = [getattr(self.model, name) for name in ("connector", "vision_encoder") if name in saved]
        # Quantised weights are integers, or four bits stored as another type.
        if any(not w.is_floating_point() or hasattr(w, "quant_state") for part in parts for w in part.parameters()):
            skip = ["lm_head", "model.connector", "model.vision_encoder"]
            raise ValueError(f"Quantised parts cannot be trained: load the model with llm_int8_skip_modules={skip}.")
        return LoraConfig(**fields)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """
        Add an adapter as in Transformers, with the routers in `modules_to_save`: an adapter freezes all other weights.
        Transformers 5.24 requires PEFT 0.22 here; `peft.get_peft_model` does not.
        """
        saved = getattr(adapter_config, "modules_to_save", None) or []
        adapter_config.modules_to_save = list(dict.fromkeys([*saved, *self.router_names])) or None
        super().add_adapter(adapter_config, adapter_name)


def _pool_patches(patches: torch.Tensor, grid: tuple[int, int], pooled: Sequence[int], pooling: str) -> torch.Tensor:
    """Pool a grid of patches (frames, patches, width) to a smaller grid (frames, tokens, width)."""
    patches = patches.transpose(1, 2).unflatten(2, grid)
    pool = partial(F.interpolate, mode="bilinear") if pooling == "bilinear" else F.adaptive_avg_pool2d
    return pool(patches, tuple(pooled)).flatten(2).transpose(1, 2)


def _has_one_size(encoder: PreTrainedModel) -> bool:
    """Whether an encoder takes frames of its own size, unless it is asked to interpolate its positions."""
    option = signature(type(encoder).forward).parameters.get("interpolate_pos_encoding")
    return option is not None and not option.default


def _check_size(encoder: PreTrainedModel, frame_size: int | None) -> None:
    if frame_size is not None and not _has_one_size(encoder) and encoder.config.model_type not in _ANY_SIZE:
        raise ValueError(
            f"`frame_size` cannot be changed: {type(encoder).__name__} is not known to encode frames of other sizes. "
            f"Encoders that do are SigLIP, CLIP, {', '.join(_ANY_SIZE)}."
        )


def _run_encoder(encoder: PreTrainedModel, pixel_values: torch.Tensor, frame_size: int | None, **options: Any) -> Any:
    """Return the encoder's output for frames (frames, channels, height, width), and its patch grid."""
    if frame_size is not None and _has_one_size(encoder):
        options["interpolate_pos_encoding"] = True
    patch_height, patch_width = patch_sides(encoder.config)
    frames, _, height, width = pixel_values.shape
    grid = (height // patch_height, width // patch_width)
    if hasattr(encoder.config, "depths") and (height % patch_height or width % patch_width):
        raise ValueError(
            f"Frames have {height}x{width} pixels, but {type(encoder).__name__} needs multiples of its last stage's "
            f"patches, {patch_height}x{patch_width} pixels."
        )
    if encoder.config.model_type != "siglip2_vision_model":
        return encoder(pixel_values, **options), grid
    # SigLIP 2 with native aspect ratio reads rows of patches, each flattened as height, width, channels.
    patches = pixel_values.unflatten(3, (grid[1], patch_width)).unflatten(2, (grid[0], patch_height))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor(grid).expand(frames, 2)  # on the CPU, where the encoder reads it
    return encoder(patches, pixel_attention_mask=None, spatial_shapes=shapes, **options), grid


def _vision_flops_per_frame(config: VideoLLMMoDConfig) -> int:
    vision_config, grid = config.vision_config, config.vision_grid
    if grid is None:
        return 0
    height, width = patch_sides(vision_config)
    if vision_config.model_type in ("smolvlm_vision", "idefics3_vision"):
        # These read the values of a mask, and tensors without memory have none. SigLIP has the same layers.
        fields = {**vision_config.to_dict(), "model_type": "siglip_vision_model", "vision_use_head": False}
        vision_config = AutoConfig.for_model(**fields)
    with torch.device("meta"), init.no_init_weights():
        # The counter does not know every fused attention.
        encoder = AutoModel.from_config(vision_config, attn_implementation="eager")
        frame = torch.empty(1, getattr(vision_config, "num_channels", 3), grid[0] * height, grid[1] * width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _run_encoder(encoder, frame, config.frame_size)
    return counter.get_total_flops()


def _check_inputs(
    config: VideoLLMMoDConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    use_cache: bool | None,
    seq_idx: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"`attention_mask` must have two dimensions, (batch, sequence), got {attention_mask.ndim}.")
    if any(name.startswith("cu_seq_lens") for name in kwargs):
        raise ValueError("`cu_seq_lens` do not fit routed layers. Give `seq_idx`, the index of each token's dialogue.")
    if seq_idx is not None and (cache is not None or use_cache):
        raise ValueError("Packed dialogues (`seq_idx`) are for training and have no cache.")
    attention = config.text_config._attn_implementation
    if seq_idx is not None and "flash" in (attention or ""):
        raise ValueError(f"'{attention}' cannot separate packed dialogues: use 'flex_attention', 'sdpa' or 'eager'.")
    if cache is not None and not hasattr(cache, "record_positions") and config.routed_layers:
        raise ValueError(
            f"All layers of a {type(cache).__name__} have one length, but layers {config.routed_layers} are routed "
            "and hold less: pass `cache=None` or `model.new_cache()`."
        )


VideoLLMMoDForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["VideoLLMMoDForConditionalGeneration", "VideoLLMMoDModel", "VideoLLMMoDPreTrainedModel"]
