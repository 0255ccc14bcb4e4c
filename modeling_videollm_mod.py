# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""VideoLLM-MoD: a streaming video language model whose routed layers run on a share of each frame's tokens."""

import inspect
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_peft_available, logging
from transformers.utils.output_capturing import capture_outputs

from .cache_videollm_mod import CACHE_NAME, VideoLLMMoDCache, one_cache
from .configuration_videollm_mod import CostEstimate, VideoLLMMoDConfig
from .generation_videollm_mod import VideoLLMMoDGenerationMixin
from .routing_videollm_mod import (
    FrameLayout,
    LayerMasks,
    RoutingPlan,
    VideoLLMMoDRouter,
    apply_gate,
    by_row,
    check_on_device,
    choose_kept,
    position_noise,
    record_positions,
    write_back,
)


if is_peft_available():
    from peft import LoraConfig

logger = logging.get_logger(__name__)

# Text models whose layers were compared with the library's own forward pass (tests/test_modeling_videollm_mod.py).
_TESTED_TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# A text model that scales what enters its first layer or leaves its head does so outside its layers, where we run.
_SCALING_FIELDS = ("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping", "scale_emb")


_AUTO_MAP = {"AutoConfig": "configuration_videollm_mod.VideoLLMMoDConfig"} | dict.fromkeys(
    ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "modeling_videollm_mod.VideoLLMMoDForConditionalGeneration",
)


@dataclass
class VideoLLMMoDModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Hidden states of the full sequence, with the router's choices where asked for.

    Args:
        router_scores (`tuple[torch.Tensor]`, *optional*, returned when `output_router_scores=True`):
            For each routed layer, the float32 scores of every frame token, of shape `(batch, frames, tokens)`; 0 where
            a row has fewer frames and where a layer keeps no token.
        kept_tokens (`tuple[torch.Tensor]`, *optional*, returned when `output_router_scores=True`):
            For each routed layer, True at the frame tokens it kept, of shape `(batch, frames, tokens)`.
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
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Cross-entropy on text plus `stream_loss_weight` times cross-entropy at frames, over the number of labels.
        logits (`torch.Tensor` of shape `(batch, logits_to_keep, vocabulary)`, *optional*):
            Scores of the next token. `None` in training with labels, where only labelled positions are projected.
        cache ([`VideoLLMMoDCache`], *optional*): The key/value cache. Its key is `past_key_values` up to Transformers
            5.23.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Full sequences, `(batch, sequence, hidden)`, one a layer and
            the embeddings; the last is normalised.
        attentions (`tuple[torch.Tensor]`, *optional*): `(batch, heads, queries, keys)` of each layer that ran; in a
            routed layer queries and keys are its kept and text tokens.
        router_scores (`tuple[torch.Tensor]`, *optional*): See [`VideoLLMMoDModelOutputWithPast`].
        kept_tokens (`tuple[torch.Tensor]`, *optional*): See [`VideoLLMMoDModelOutputWithPast`].
    """

    router_scores: tuple[torch.Tensor, ...] | None = None
    kept_tokens: tuple[torch.Tensor, ...] | None = None
    if CACHE_NAME != "cache":
        cache = property(lambda self: self.past_key_values)


class VideoLLMMoDConnector(nn.Module):
    """Linear, activation, Linear: frame features (..., vision hidden) to text embeddings (..., hidden)."""

    def __init__(self, config: VideoLLMMoDConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.connector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, frame_features: torch.Tensor) -> torch.Tensor:
        """Projects frame features to the width of the language model."""
        return self.linear_2(self.act(self.linear_1(frame_features)))


# ----------------------------------------------------------------------------------------------------------- models


class VideoLLMMoDPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of VideoLLM-MoD models."""

    config_class = VideoLLMMoDConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Steps of an optimiser on a router are far below the 8 bits of a bfloat16 weight. The first list is also what
    # quantisers leave alone, who match it from the start of a name.
    _keep_in_fp32_modules = [r"(?:model\.)?routers"]
    _keep_in_fp32_modules_strict = ["routers"]
    # `_can_record_outputs` stays unset: attentions are recorded by what the language model declares, and hidden
    # states, scores and choices are collected in the layer loop, which sees full sequences where layers do not.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self) -> None:
        """As in Transformers; of the blocks not to be split, those that this model has."""
        super().post_init()
        # An encoder names its pooling head also where its configuration leaves it out, and FSDP looks for each.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules) & present

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; the code travels along, and every fitting `Auto` class finds it."""
        if self.is_remote_code():
            # `register_for_auto_class` remembers one class a model; this model answers to several.
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **_AUTO_MAP}
        # FSDP2 gives the model a class of its own, in torch: the code to save is that of the class it is made from.
        cls = type(self)
        own = next((base for base in cls.__mro__ if vars(base).get("_auto_class") is not None), cls)
        names = cls.__module__, cls.__name__
        cls.__module__, cls.__name__ = own.__module__, own.__name__
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            cls.__module__, cls.__name__ = names

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # By the gate: at a score of 0, tanh's gate is 1 and the routed layer is the plain one.
        if isinstance(module, VideoLLMMoDRouter) and self.config.mod_gate == "tanh":
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)


class VideoLLMMoDModel(VideoLLMMoDPreTrainedModel):
    """
    Vision encoder, connector, language model and routers, without a language modelling head.

    The language model is the library's own, unwrapped: its layers are called from here, on the full sequence or, where
    a layer is routed, on the short sequence of kept frame tokens and text.
    """

    def __init__(self, config: VideoLLMMoDConfig) -> None:
        super().__init__(config)
        # Fields may have been set since the configuration was made, by `from_pretrained` for one.
        for validate in type(config).__class_validators__:
            validate(config)
        self.vision_encoder = AutoModel.from_config(config.vision_config)
        self.connector = VideoLLMMoDConnector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        _check_language_model(self.language_model)
        hidden_size = config.text_config.hidden_size
        self.routers = nn.ModuleDict(
            {str(layer): VideoLLMMoDRouter(hidden_size) for layer in config.learned_router_layers}
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def new_cache(
        self,
        *,
        max_lengths: Sequence[int] | None = None,
        offloading: bool = False,
        dtype: torch.dtype | None = None,
    ) -> VideoLLMMoDCache:
        """An empty key/value cache for this model's layers; see [`VideoLLMMoDCache`]."""
        layers, routed = self.config.text_config.num_hidden_layers, self.config.routed_layers
        return VideoLLMMoDCache(layers, routed, max_lengths=max_lengths, offloading=offloading, dtype=dtype)

    def encode_frames(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """
        Pools what the vision encoder sees in each frame: its pooled token first, then the grid row by row.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(..., channels, height, width)`): Normalised frames.

        Returns:
            `torch.Tensor` of shape `(..., tokens, vision hidden)`: Frame features, which the connector projects.

        Raises:
            `ValueError`: If the encoder gives no patch grid or no pooled token where the configuration needs one.
        """
        leading = pixel_values_videos.shape[:-3]
        pixel_values = pixel_values_videos.flatten(0, -4) if len(leading) > 1 else pixel_values_videos
        pixel_values = pixel_values.to(self.vision_encoder.dtype)
        layer = self.config.vision_feature_layer
        outputs, grid = _run_vision_encoder(self.vision_encoder, pixel_values, output_hidden_states=layer is not None)
        tokens = []
        if self.config.frame_token_cls:
            if outputs.pooler_output is None:
                raise ValueError(
                    f"`frame_token_cls=True`, but {type(self.vision_encoder).__name__} gives no pooled output: set "
                    "`frame_token_cls=False`."
                )
            tokens.append(outputs.pooler_output[:, None])
        if self.config.frame_token_pooled is not None:
            # Class and register tokens, where an encoder has them, come before its patches.
            patches = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
            patches = patches[:, -math.prod(grid) :]
            patches = patches.transpose(1, 2).unflatten(2, grid)
            pooled = F.adaptive_avg_pool2d(patches, tuple(self.config.frame_token_pooled))
            tokens.append(pooled.flatten(2).transpose(1, 2))
        return torch.cat(tokens, dim=1).unflatten(0, leading)

    def get_video_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Frames (..., channels, height, width) as embeddings of the language model, (..., tokens, hidden)."""
        return self.connector(self.encode_frames(pixel_values_videos))

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
        output_hidden_states: bool | None = None,
        output_router_scores: bool = False,
        seq_idx: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoLLMMoDModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Tokens, with `frame_token_id` wherever a frame's tokens stand: whole frames, each contiguous.
            pixel_values_videos (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, *optional*):
                The frames of the frame tokens in this call, in order; rows with fewer frames are padded at the end.
            frame_features (`torch.Tensor` of shape `(batch, frames, tokens, vision hidden)`, *optional*):
                What [`~VideoLLMMoDModel.encode_frames`] gave for those frames, in place of pixels.
            num_frames (`Sequence[int]`, *optional*):
                Number of frames of each row. Without it, and with more than one row, they are counted, which on a GPU
                waits for the device.
            frame_token_mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*):
                True at frame tokens. Found from `input_ids` if not given; needed with `inputs_embeds` with frames.
            attention_mask (`torch.Tensor` of shape `(batch, seen + sequence)`, *optional*):
                0 at padding. Leave it out where there is none, or only on the right while training: attention then
                needs no mask tensor.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Rotary positions in the full sequence.
            cache ([`VideoLLMMoDCache`], *optional*):
                What came before. Any `Cache` serves if no layer is routed. `past_key_values`, its name
                up to Transformers 5.23, is understood too.
            inputs_embeds (`torch.Tensor` of shape `(batch, sequence, hidden)`, *optional*): In place of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache.
            output_hidden_states (`bool`, *optional*): Whether to return the full sequence after every layer.
            output_router_scores (`bool`, *optional*, defaults to `False`):
                Whether to return router scores and kept tokens.
            seq_idx (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
                Index of each token's dialogue where several are packed into a row, for training: none sees another,
                and `position_ids` start anew with each. Not with a cache, nor with flash attention.

        Returns:
            [`VideoLLMMoDModelOutputWithPast`]

        Raises:
            `ValueError`: If inputs exclude or contradict each other.
        """
        text_config = self.config.text_config
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must have two dimensions, (batch, sequence), got {attention_mask.ndim}: routed "
                "layers see other lengths than full ones, so each makes its own mask."
            )
        if any(name.startswith("cu_seq_lens") for name in kwargs):
            raise ValueError(
                "`cu_seq_lens_q` and the like say where dialogues lie in full layers; routed layers are shorter. Give "
                "`seq_idx`, the index of each token's dialogue."
            )
        if seq_idx is not None:
            self._check_packed(cache, use_cache)
            use_cache = False
        use_cache = text_config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing and (torch.is_grad_enabled() or CACHE_NAME != "cache"):
            # Layers leave a cache alone then, without gradients too up to Transformers 5.23.
            if cache is not None:
                raise ValueError("Checkpointed layers drop the cache that is given: call `model.eval()` first.")
            if use_cache:
                logger.warning_once("`use_cache=True` does not go with gradient checkpointing: it is now False.")
            use_cache = False

        layout = self.frame_layout(
            input_ids, inputs_embeds, pixel_values_videos, frame_features, num_frames, frame_token_mask
        )
        hidden_states = self._embed(input_ids, inputs_embeds, pixel_values_videos, frame_features, layout)
        if use_cache and cache is None:
            cache = self.new_cache()
        num_seen = self._num_seen(cache)
        if attention_mask is not None and isinstance(num_seen, int):
            expected = num_seen + layout.sequence_length
            if attention_mask.shape[1] != expected:
                raise ValueError(
                    f"`attention_mask` is {attention_mask.shape[1]} wide; it covers what was seen and what is new: "
                    f"{num_seen} + {layout.sequence_length} tokens."
                )
        needs_masks = getattr(cache, "needs_masks", True)
        if position_ids is not None and attention_mask is None and seq_idx is None and needs_masks:
            check_on_device(
                (position_ids.diff(dim=-1) < 0).sum(dim=-1),
                [0] * position_ids.shape[0],
                "`position_ids` start anew within a row. To keep dialogues of one row apart give `seq_idx`, the index "
                "of each token's dialogue. Times they start anew",
            )
        if position_ids is None:
            position_ids = _positions(layout, attention_mask, num_seen, hidden_states.device, seq_idx)
        if self.training and torch.is_grad_enabled():
            self._warn_if_routers_are_frozen()

        # Hidden states and scores are collected here, attentions by the hooks of the language model's own class.
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        outputs = _run_layers(
            self.language_model,
            self,
            hidden_states,
            layout,
            position_ids,
            attention_mask,
            cache,
            num_seen,
            seq_idx,
            collect_hidden_states=bool(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            collect_scores=output_router_scores,
            **kwargs,
        )
        if hasattr(cache, "advance"):
            cache.advance(layout.sequence_length, layout.inside_frame)
        return outputs

    def evict_tokens(self, cache: VideoLLMMoDCache, keep: torch.BoolTensor) -> None:
        """
        Has a cache forget tokens anywhere in the sequence, and those behind them move up: a stream without end stays
        within the positions that the language model was trained for.

        Keys are kept as they were rotated, and rotated back by as far as they move. The other way, keys that are
        rotated anew at each step, would touch the whole cache in every layer for every frame; this touches it once an
        eviction.

        Args:
            cache ([`VideoLLMMoDCache`]): Of one row.
            keep (`torch.BoolTensor` of shape `(tokens seen,)`): False at tokens to forget. Of a frame all or none.

        Raises:
            `ValueError`: If the language model's rotation depends on the length of the sequence.
        """
        rotary, layers = self.language_model.rotary_emb, self.language_model.layers
        rope_type = getattr(rotary, "rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(f"Rotary positions of type {rope_type!r} change with the length, and cannot be moved.")
        apply_rotary = sys.modules[type(self.language_model).__module__].apply_rotary_pos_emb
        scaling = getattr(rotary, "attention_scaling", 1.0)

        def rotate(index: int, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            if not getattr(layers[index].self_attn, "use_rope", True):
                return keys  # A layer without positions.
            exact = keys.float()
            cos, sin = (x.to(keys.device) / scaling for x in rotary(exact, -by[None].to(rotary.inv_freq.device)))
            return apply_rotary(exact, exact, cos, sin)[1].to(keys.dtype)

        cache.evict(keep, rotate)

    # ------------------------------------------------------------------------------------------------- embedding

    def frame_layout(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
        frame_features: torch.Tensor | None,
        num_frames: Sequence[int] | torch.Tensor | None,
        frame_token_mask: torch.BoolTensor | None,
    ) -> FrameLayout:
        """Where frames lie in the sequences of one call; arguments are those of `forward`."""
        if pixel_values_videos is not None and frame_features is not None:
            raise ValueError("Give `pixel_values_videos` or `frame_features`, not both.")
        frames = pixel_values_videos if frame_features is None else frame_features
        num_tokens = self.config.frame_num_tokens
        source = input_ids if inputs_embeds is None else inputs_embeds
        batch_size, sequence_length = source.shape[:2]
        no_frames = frames is None and frame_token_mask is None
        if frame_token_mask is None and input_ids is not None:
            frame_token_mask = input_ids == self.config.frame_token_id
        elif frame_token_mask is None:
            frame_token_mask = torch.zeros(batch_size, sequence_length, dtype=torch.bool, device=source.device)
        if frames is not None:
            _check_frames(frames, frame_features is not None, batch_size, num_tokens, self.config)
        if num_frames is not None:
            num_frames = num_frames.tolist() if isinstance(num_frames, torch.Tensor) else list(num_frames)
        elif no_frames:
            num_frames = [0] * batch_size
        elif frames is not None and batch_size == 1:
            num_frames = [frames.shape[1]]
        else:
            num_frames = [count // num_tokens for count in frame_token_mask.sum(dim=1).tolist()]
        if len(num_frames) != batch_size or (frames is not None and max(num_frames) > frames.shape[1]):
            given = "none" if frames is None else f"{frames.shape[1]} a row"
            raise ValueError(f"`num_frames` is {num_frames} for a batch of {batch_size} rows; frames given: {given}.")
        if frames is None and inputs_embeds is None and max(num_frames) > 0:
            raise ValueError(
                f"The rows have {num_frames} frames, but neither `pixel_values_videos` nor `frame_features` was given."
            )
        expected = [count * num_tokens for count in num_frames]
        check_on_device(
            frame_token_mask.sum(dim=1),
            expected,
            f"Tokens and frames do not match: the rows have {num_frames} frames of {num_tokens} tokens, so frame "
            f"tokens expected {expected}",
        )
        return FrameLayout(frame_token_mask, num_frames, num_tokens)

    def _embed(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
        frame_features: torch.Tensor | None,
        layout: FrameLayout,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            # The frame token's id may lie past the embedding table, as VideoLLM-online's does: never look it up.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(layout.frame_token_mask, 0))
        frames = pixel_values_videos if frame_features is None else frame_features
        if frames is None or layout.total_frames == 0:
            return inputs_embeds
        if min(layout.num_frames) == frames.shape[1]:
            frames = frames.flatten(0, 1)
        else:
            frames = torch.cat([row[:count] for row, count in zip(frames, layout.num_frames, strict=True)])
        features = self.encode_frames(frames) if frame_features is None else frames
        # The connector may be trained in float32 beside a model in bfloat16, or be quantised to integers.
        dtypes = [weight.dtype for weight in self.connector.parameters() if weight.is_floating_point()]
        connected = self.connector(features.to(dtypes[0] if dtypes else inputs_embeds.dtype)).flatten(0, 1)
        flat = inputs_embeds.flatten(0, 1)
        flat = flat.index_copy(0, layout.token_index.flatten(), connected.to(flat.device, flat.dtype))
        return flat.view_as(inputs_embeds)

    # ---------------------------------------------------------------------------------------------------- routing

    def _check_packed(self, cache: Cache | None, use_cache: bool | None) -> None:
        if cache is not None or use_cache:
            raise ValueError("Dialogues packed into a row (`seq_idx`) are for training and have no cache.")
        attention = self.config.text_config._attn_implementation or ""
        if "flash" in attention:
            raise ValueError(
                f"The attention implementation '{attention}' takes no mask that keeps dialogues of a row apart "
                "(`seq_idx`): use 'flex_attention', 'sdpa' or 'eager', or give one dialogue a row."
            )

    def _num_seen(self, cache: Cache | None) -> int | torch.Tensor:
        if cache is None:
            return 0
        if not hasattr(cache, "record_positions") and self.config.routed_layers:
            raise ValueError(
                f"`cache` is a {type(cache).__name__}, whose layers are all of one length; layers "
                f"{self.config.routed_layers} are routed and hold less. Pass `cache=None` or "
                "`model.new_cache()`."
            )
        return cache.get_seq_length()

    def router_scores(
        self, layer: int, hidden_states: torch.Tensor, layout: FrameLayout, position_ids: torch.LongTensor
    ) -> torch.Tensor:
        """Float32 scores (frames, tokens) of a routed layer, from hidden states (batch, sequence, hidden)."""
        if self.config.mod_router == "learned":
            if str(layer) not in self.routers:
                raise ValueError(
                    f"Layer {layer} is routed but has no router: the model was built with routers in layers "
                    f"{', '.join(self.routers)}. Set `mod_layers` and `mod_keep_ratio` before the model is made."
                )
            scores = self.routers[str(layer)](hidden_states).flatten()
            return scores.to(layout.token_index.device)[layout.token_index]
        if self.config.mod_router == "random":
            positions = position_ids.to(layout.token_index.device).expand(layout.batch_size, -1).flatten()
            return position_noise(positions[layout.token_index], layer)
        return torch.zeros(layout.token_index.shape, device=layout.token_index.device)

    def gate(self, scores: torch.Tensor) -> torch.Tensor:
        """What the scores of kept tokens multiply a layer's update with, any shape, float32 (p-MoD for `"tanh"`)."""
        if self.config.mod_router != "learned" or self.config.mod_gate == "none":
            return torch.ones_like(scores)
        if self.config.mod_gate == "tanh":
            return 1 + 0.2 * scores.tanh()
        return scores.sigmoid() if self.config.mod_gate == "sigmoid" else scores

    def _warn_if_routers_are_frozen(self) -> None:
        frozen = [
            layer
            for layer, router in self.routers.items()
            if not any(weight.requires_grad for weight in router.parameters())
        ]
        if frozen:
            logger.warning_once(
                f"The routers of layers {', '.join(frozen)} are frozen while this model trains, and stay as they are. "
                "With PEFT, use `model.make_lora_config()` or add its `modules_to_save` to yours."
            )


class VideoLLMMoDForConditionalGeneration(VideoLLMMoDPreTrainedModel, VideoLLMMoDGenerationMixin, GenerationMixin):
    """VideoLLM-MoD with its language modelling head: watches a stream, decides when to speak, and speaks."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VideoLLMMoDConfig) -> None:
        super().__init__(config)
        self.model = VideoLLMMoDModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding table."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's embedding table."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language modelling head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the language modelling head."""
        self.lm_head = new_embeddings

    def encode_frames(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """See [`~VideoLLMMoDModel.encode_frames`]."""
        return self.model.encode_frames(pixel_values_videos)

    def get_video_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """See [`~VideoLLMMoDModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos)

    def evict_tokens(self, cache: VideoLLMMoDCache, keep: torch.BoolTensor) -> None:
        """See [`~VideoLLMMoDModel.evict_tokens`]."""
        self.model.evict_tokens(cache, keep)

    def new_cache(
        self,
        *,
        max_lengths: Sequence[int] | None = None,
        offloading: bool = False,
        dtype: torch.dtype | None = None,
    ) -> VideoLLMMoDCache:
        """See [`~VideoLLMMoDModel.new_cache`]."""
        return self.model.new_cache(max_lengths=max_lengths, offloading=offloading, dtype=dtype)

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
        Takes what [`VideoLLMMoDModel`] takes, and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Tokens to learn, not shifted, -100 where nothing is learned: text, and after a frame's last token the
                interval token where the model should stay silent or what follows where it should speak.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Number of last positions, or indices of the positions, to compute logits at; 0 for all.
            num_items_in_batch (`int`, *optional*):
                What to divide the loss by instead of the labels of this call, for gradient accumulation.

        Returns:
            [`VideoLLMMoDCausalLMOutputWithPast`]
        """
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
        if labels is not None:
            layout = self.model.frame_layout(
                input_ids, inputs_embeds, pixel_values_videos, frame_features, num_frames, frame_token_mask
            )
            loss = self._stream_loss(hidden_states, labels, layout, num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
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
        hidden_states: torch.Tensor,
        labels: torch.LongTensor,
        layout: FrameLayout,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """LIVE's objective (arXiv 2406.11816, section 3.2): text, and one decision a frame."""
        # A frame needs one row of logits and not one a token. Which tokens carry labels only the device knows; which
        # can, text and the last of each frame, the layout does, and so nothing waits for the device.
        index = layout.speaking_index
        labels = F.pad(labels[:, 1:], (0, 1), value=-100).to(hidden_states.device)
        num_labels = (labels != -100).sum()
        labels = labels.flatten()[index]
        check_on_device(
            num_labels,
            (labels != -100).sum(),
            "`labels` must be -100 inside frames, where nothing can be learned: the labels that can be are",
        )
        logits = self.lm_head(hidden_states.flatten(0, 1)[index]).float()
        losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        at_frame = layout.frame_token_mask.flatten()[index]
        losses = torch.where(at_frame, self.config.stream_loss_weight * losses, losses)
        count = num_labels.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / (count.to(losses.device) if isinstance(count, torch.Tensor) else count)

    # --------------------------------------------------------------------------------------------------- training

    def make_lora_config(self, **overrides: Any) -> "LoraConfig":
        """
        LIVE's choice of what to train, and the routers (arXiv 2406.11816, section 4): LoRA of rank 128 and alpha 256
        on every linear layer of the language model and on its head, unless that is tied to the embeddings; connector
        and routers whole.

        Args:
            overrides: Fields of `peft.LoraConfig` to set otherwise.

        Returns:
            `peft.LoraConfig`

        Raises:
            `ImportError`: If PEFT is not installed.
        """
        if not is_peft_available():
            raise ImportError("`make_lora_config` needs PEFT: `pip install peft`.")
        # Of a head that shares its table with the embeddings, an adapter would change both once it is merged.
        head = "" if self.config.tie_word_embeddings else r"|(.*\.)?lm_head"
        linear = sorted(
            {n.rsplit(".")[-1] for n, m in self._decoder_layers().named_modules() if isinstance(m, nn.Linear)}
        )
        names = "|".join(linear)
        defaults = {
            "task_type": "CAUSAL_LM",
            "r": 128,
            "lora_alpha": 256,
            "lora_dropout": 0.05,
            "target_modules": rf"(.*\.)?language_model\.layers\..*\.({names}){head}",
            "modules_to_save": ["connector", *self._router_names()],
        }
        return LoraConfig(**{**defaults, **overrides})

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """
        As in Transformers, with the routers added to `modules_to_save`: left out, an adapter would freeze them.

        Raises:
            `ValueError`: If Transformers finds PEFT too old: 5.24 wants 0.22. `peft.get_peft_model` does not ask.
        """
        saved = list(getattr(adapter_config, "modules_to_save", None) or [])
        adapter_config.modules_to_save = saved + [name for name in self._router_names() if name not in saved] or None
        super().add_adapter(adapter_config, adapter_name)

    def _decoder_layers(self) -> nn.ModuleList:
        return self.model.language_model.layers

    def _router_names(self) -> list[str]:
        return [f"routers.{layer}" for layer in self.model.routers]

    # ------------------------------------------------------------------------------------------------------- cost

    def estimate_cost(
        self, frames: int, text_tokens: int, *, past_frames: int = 0, past_text_tokens: int = 0
    ) -> CostEstimate:
        """
        Operations and cache bytes of one forward pass, for this scheme and for full compute, without running it; see
        [`~VideoLLMMoDConfig.estimate_cost`]. `vision_flops` is counted on the vision encoder without its weights.
        """
        cost = self.config.estimate_cost(
            frames,
            text_tokens,
            past_frames=past_frames,
            past_text_tokens=past_text_tokens,
            bytes_per_value=self.dtype.itemsize,
        )
        return CostEstimate(**{**vars(cost), "vision_flops": frames * self._vision_flops_per_frame()})

    def _vision_flops_per_frame(self) -> int:
        vision_config = self.config.vision_config
        patch = getattr(vision_config, "patch_size", 1)
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        grid = self.config.vision_grid
        if grid is None:
            return 0
        with torch.device("meta"):
            # Plain matrix products: not every fused attention is known to the counter.
            encoder = AutoModel.from_config(vision_config, attn_implementation="eager")
            frame = torch.empty(1, getattr(vision_config, "num_channels", 3), grid[0] * patch[0], grid[1] * patch[1])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _run_vision_encoder(encoder, frame)
        return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------- helpers


@capture_outputs
def _run_layers(
    language_model: PreTrainedModel,
    model: VideoLLMMoDModel,
    hidden_states: torch.Tensor,
    layout: FrameLayout,
    position_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    num_seen: int | torch.Tensor,
    seq_idx: torch.Tensor | None,
    *,
    collect_hidden_states: bool,
    collect_scores: bool,
    **kwargs: Unpack[TransformersKwargs],
) -> VideoLLMMoDModelOutputWithPast:
    """The decoder: full layers on the full sequence, routed layers on kept and text tokens."""
    keep_counts = model.config.layer_keep_counts
    cos, sin = language_model.rotary_emb(hidden_states, position_ids)
    # One tensor (2, batch * sequence, dim), from which a routed layer takes its own at once.
    turns = torch.stack([x.expand(layout.batch_size, -1, -1) for x in (cos, sin)])
    masks = LayerMasks(language_model.config, layout, attention_mask, cache, num_seen, seq_idx)
    all_hidden_states = [hidden_states] if collect_hidden_states else None
    all_scores, all_kept = ([], []) if collect_scores else (None, None)

    for index, decoder_layer in enumerate(language_model.layers[: language_model.config.num_hidden_layers]):
        keep_count = keep_counts[index]
        layer_kwargs = {CACHE_NAME: cache, "use_cache": cache is not None, **kwargs}
        # Rotary positions reach a layer as `position_embeddings` alone: gapped `position_ids` read as packed rows.
        if keep_count >= layout.num_tokens or layout.total_frames == 0:
            record_positions(cache, index, keep_count < layout.num_tokens, None, layout, num_seen)
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks.get(index, keep_count, hidden_states),
                position_embeddings=turns.unbind(),
                **layer_kwargs,
            )
            scores = kept = None
        else:
            plan = layout.plan(keep_count)
            scores, kept, gate, slots = _choose(model, index, keep_count, hidden_states, layout, plan, position_ids)
            if plan.length > 0:
                record_positions(cache, index, True, slots, layout, num_seen, plan)
                flat = hidden_states.flatten(0, 1)
                short = flat.index_select(0, slots.to(flat.device)).view(layout.batch_size, plan.length, -1)
                output = decoder_layer(
                    short,
                    attention_mask=masks.get(index, keep_count, short),
                    position_embeddings=turns.flatten(1, 2)
                    .index_select(1, slots.to(turns.device))
                    .view(2, layout.batch_size, plan.length, -1)
                    .unbind(),
                    **layer_kwargs,
                )
                if gate is not None:
                    output = apply_gate(output, short, gate, plan, on_update=model.config.mod_gate_on == "update")
                hidden_states = write_back(flat, output, slots, plan).view_as(hidden_states)
        if collect_hidden_states:
            all_hidden_states.append(hidden_states)
        if collect_scores and keep_count < layout.num_tokens:
            all_scores.append(by_row(scores, layout, hidden_states.device))
            all_kept.append(by_row(kept, layout, hidden_states.device).bool())

    hidden_states = language_model.norm(hidden_states)
    if collect_hidden_states:
        all_hidden_states[-1] = hidden_states
    return VideoLLMMoDModelOutputWithPast(
        last_hidden_state=hidden_states,
        **{CACHE_NAME: cache},
        hidden_states=tuple(all_hidden_states) if collect_hidden_states else None,
        router_scores=tuple(all_scores) if collect_scores else None,
        kept_tokens=tuple(all_kept) if collect_scores else None,
    )


def _choose(
    model: VideoLLMMoDModel,
    layer: int,
    keep_count: int,
    hidden_states: torch.Tensor,
    layout: FrameLayout,
    plan: RoutingPlan,
    position_ids: torch.LongTensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.LongTensor]:
    """Scores (frames, tokens), 1 at kept tokens (frames, tokens), gate (frames * kept,) and the slots' sources."""
    if keep_count == 0:
        return None, None, None, plan.slots
    scores = model.router_scores(layer, hidden_states, layout, position_ids)
    index = choose_kept(scores, keep_count, model.config.mod_keep_last, layout)
    slots = plan.slots.index_copy(0, plan.frame_slots, layout.token_index.gather(1, index).flatten())
    gate = None
    if model.config.mod_router == "learned" and model.config.mod_gate != "none":
        gate = model.gate(scores.gather(1, index)).flatten()
    kept = torch.zeros_like(scores).scatter(1, index, 1.0)
    return scores, kept, gate, slots


def _positions(
    layout: FrameLayout,
    attention_mask: torch.Tensor | None,
    num_seen: int | torch.Tensor,
    device: torch.device,
    seq_idx: torch.Tensor | None,
) -> torch.LongTensor:
    if seq_idx is not None:
        places = torch.arange(layout.sequence_length, device=device).expand(layout.batch_size, -1)
        begins = F.pad(seq_idx.to(device).diff(dim=1), (1, 0)) != 0
        return places - torch.where(begins, places, 0).cummax(dim=1).values
    if attention_mask is not None:
        positions = attention_mask.long().cumsum(dim=1) - 1
        return positions.clamp(min=0)[:, -layout.sequence_length :].to(device)
    return (torch.arange(layout.sequence_length, device=device) + num_seen)[None]


def _check_language_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    missing = [part for part in ("embed_tokens", "layers", "rotary_emb", "norm") if not hasattr(model, part)]
    if missing:
        raise ValueError(
            f"{name} ({model.config.model_type}) does not have the shape of Llama that routing needs; missing: "
            f"{', '.join(missing)}. Tested are {', '.join(_TESTED_TEXT_MODELS)}."
        )
    if "layer_type" in inspect.signature(type(model.rotary_emb).forward).parameters:
        raise ValueError(f"{name} turns positions differently by type of layer, which is not supported.")
    scaled = [field for field in _SCALING_FIELDS if getattr(model.config, field, None) not in (None, 1, 1.0)]
    if scaled:
        raise ValueError(f"{name} scales its embeddings or logits ({', '.join(scaled)}), which is not supported.")
    types = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if types:
        raise ValueError(f"{name} has layers of type {', '.join(sorted(types))}; routing needs attention layers.")
    if model.config.model_type not in _TESTED_TEXT_MODELS:
        logger.warning_once(
            f"{name} has the shape that routing needs, but is not among the text models this code was tested with "
            f"({', '.join(_TESTED_TEXT_MODELS)})."
        )


def _run_vision_encoder(
    encoder: PreTrainedModel, pixel_values: torch.Tensor, **options: Any
) -> tuple[Any, tuple[int, int]]:
    """The encoder's output on frames (frames, channels, height, width), and its patch grid (height, width)."""
    patch = encoder.config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    frames, _, height, width = pixel_values.shape
    grid = (height // patch_height, width // patch_width)
    if encoder.config.model_type != "siglip2_vision_model":
        return encoder(pixel_values, **options), grid
    # SigLIP 2 with native aspect ratio takes rows of patches, each flattened height, width, channels.
    patches = pixel_values.unflatten(3, (grid[1], patch_width)).unflatten(2, (grid[0], patch_height))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor(grid).expand(frames, 2)  # on the CPU, where the encoder reads it
    return encoder(patches, pixel_attention_mask=None, spatial_shapes=shapes, **options), grid


def _check_frames(
    frames: torch.Tensor, are_features: bool, batch_size: int, num_tokens: int, config: VideoLLMMoDConfig
) -> None:
    name, given = ("frame_features", 4) if are_features else ("pixel_values_videos", 5)
    names = "(batch, frames, tokens, vision hidden)" if are_features else "(batch, frames, channels, height, width)"
    if frames.ndim != given or frames.shape[0] != batch_size:
        raise ValueError(
            f"`{name}` must be {names} with a batch of {batch_size}, got a tensor of shape {tuple(frames.shape)}."
        )
    expected = (num_tokens, config.vision_config.hidden_size)
    if are_features and tuple(frames.shape[2:]) != expected:
        raise ValueError(
            f"`frame_features` has {frames.shape[2]} tokens of width {frames.shape[3]} a frame; this model's frames "
            f"are {expected[0]} tokens of width {expected[1]}."
        )


VideoLLMMoDForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["VideoLLMMoDForConditionalGeneration", "VideoLLMMoDModel", "VideoLLMMoDPreTrainedModel"]
