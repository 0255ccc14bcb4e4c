# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Routing on one page: router types, where frames lie, which tokens a layer keeps, and how it runs on those only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    and_masks,
    create_causal_mask,
    packed_sequence_mask_function,
    sliding_window_overlay,
)


# What `mod_gate` computes from a router score; `None` leaves the layer at full strength. "linear" is the paper's
# (arXiv 2408.16730), "tanh" is p-MoD's (arXiv 2412.04449): it is 1 at a score of 0.
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "linear": lambda scores: scores,
    "sigmoid": torch.sigmoid,
    "tanh": lambda scores: 1 + 0.2 * scores.tanh(),
    "none": None,
}


class VideoLLMMoDRouter(nn.Module):
    """
    Base class of router types. A routed layer has one router and keeps each frame's highest scores.

    To add a type, subclass this class and add it to [`ROUTERS`]; `mod_router` then accepts its name. The class
    attribute `learns` says whether a router has weights to train, and so whether `mod_gate` applies. With the tanh
    gate, weights of modules that set `starts_at_zero` are initialised to 0, so that the first gates are 1.

    Args:
        config ([`VideoLLMMoDConfig`]): The model's configuration.
        layer (`int`): Index of the routed layer.
    """

    learns = False

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor, ranks: torch.LongTensor
    ) -> torch.Tensor:
        """
        Score every token. The model reads the scores of frame tokens and ignores those of text.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden)`): Input of the routed layer.
            position_ids (`torch.LongTensor` of shape `(batch or 1, sequence)`): Positions in the stream. The score of
                a frame must not depend on other frames, else streaming and training choose differently.
            ranks (`torch.LongTensor` of shape `(batch, sequence)`): Index of each frame token within its frame.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, 1)`: Scores in float32 or better.
        """
        raise NotImplementedError

    @classmethod
    def gate(cls, scores: torch.Tensor, mod_gate: str) -> torch.Tensor | None:
        """Return the factor that multiplies the layer's update, with the shape of `scores`, or `None` for 1."""
        function = GATES[mod_gate] if cls.learns else None
        return None if function is None else function(scores)

    @classmethod
    def flops_per_token(cls, config: Any) -> int:  # noqa: ARG003
        """Return the matrix-product operations of one token's score, a multiply-add counted as two."""
        return 0


class LearnedRouter(VideoLLMMoDRouter, nn.Linear):
    """Score tokens by a learned direction: mu = w . x (VideoLLM-MoD, arXiv 2408.16730, equation 2)."""

    learns = True
    starts_at_zero = True

    def __init__(self, config: Any, layer: int) -> None:
        nn.Linear.__init__(self, config.text_config.hidden_size, 1, bias=False)
        self.config, self.layer = config, layer

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return the scores, summed in float32: a bfloat16 score has 8 bits, so many of 50 tokens would tie."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return (hidden_states * self.weight[0]).sum(dim=-1, keepdim=True, dtype=dtype)


class UniformRouter(VideoLLMMoDRouter):
    """Score all tokens alike, so that evenly spaced ones are kept."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden_states[..., :1], dtype=torch.float32)


class RandomRouter(VideoLLMMoDRouter):
    """Score tokens by a hash of layer and position, so that streaming and one forward pass choose alike."""

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor, *_: Any) -> torch.Tensor:
        """Return numbers in [0, 1) that look random."""
        return position_noise(position_ids, self.layer).expand(hidden_states.shape[:2])[..., None]


ROUTERS: dict[str, type[VideoLLMMoDRouter]] = {
    "learned": LearnedRouter,
    "uniform": UniformRouter,
    "random": RandomRouter,
}


def position_noise(positions: torch.LongTensor, layer: int) -> torch.Tensor:
    """Return float32 numbers in [0, 1), same shape, from layer and position by Mulvey's 32-bit mixer "lowbias32"."""
    mask = 0xFFFFFFFF
    x = (positions * 0x9E3779B1 + layer * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
    x = ((x ^ (x >> 15)) * 0x735A2D97) & mask
    return (x ^ (x >> 15)).float() / 2**32


@dataclass
class RoutingPlan:
    """
    Where the tokens of a batch go in layers that keep `keep_count` tokens per frame, whatever their scores.

    Attributes:
        length (`int`): Length of the short sequence of kept and text tokens in the longest row.
        slots (`torch.LongTensor` of shape `(batch * length,)`): Index of each slot's token in the flattened batch.
        frame_slots (`torch.LongTensor` of shape `(frames * keep_count,)`): Slots where layers write their choice.
        valid (`torch.LongTensor`, *optional*): The slots that are not filler, or `None` if all rows are equally long.
    """

    length: int
    slots: torch.LongTensor
    frame_slots: torch.LongTensor
    valid: torch.LongTensor | None


class FrameLayout:
    """
    Where the frames of a batch lie in its sequences. Each forward pass makes one, and layers only index it.

    Args:
        frame_token_mask (`torch.BoolTensor` of shape `(batch, sequence)`): True at frame tokens.
        num_frames (`Sequence[int]`): Number of frames of each row. The host knows it, so it knows all shapes.
        num_tokens (`int`): Number of tokens per frame.

    Attributes:
        rank (`torch.LongTensor` of shape `(batch, sequence)`): Index of each frame token within its frame.
        token_index (`torch.LongTensor` of shape `(frames, tokens)`): Index of each frame token in the flattened batch.

    Raises:
        `ValueError`: On a CPU, if other tokens stand within a frame.
    """

    def __init__(self, frame_token_mask: torch.BoolTensor, num_frames: Sequence[int], num_tokens: int) -> None:
        self.frame_token_mask, self.num_frames, self.num_tokens = frame_token_mask, list(num_frames), num_tokens
        self.total_frames = sum(num_frames)
        self.batch_size, self.sequence_length = frame_token_mask.shape
        self._plans: dict[int, RoutingPlan] = {}
        self._preferences: dict[tuple[int, int], torch.LongTensor] = {}
        self.rank = (frame_token_mask.cumsum(dim=1) - 1) % num_tokens
        index = torch.nonzero_static(frame_token_mask.flatten(), size=self.total_frames * num_tokens)
        self.token_index = index.view(self.total_frames, num_tokens)
        if self.total_frames > 0 and frame_token_mask.device.type == "cpu" and not torch.compiler.is_compiling():
            torn = (self.token_index[:, -1] - self.token_index[:, 0] != num_tokens - 1).nonzero()
            if len(torn):
                raise ValueError(
                    f"Frame tokens must stand together; other tokens stand within frame {int(torn[0])} of the batch."
                )

    @property
    def inside_frame(self) -> torch.BoolTensor | None:
        """True at frame tokens that are not the last of their frame, (batch, sequence); `None` without frames."""
        if self.total_frames == 0:
            return None
        return self.frame_token_mask & (self.rank < self.num_tokens - 1)

    @property
    def speaking_index(self) -> torch.LongTensor:
        """Index in the flattened batch of the tokens after which the model may speak: text and each frame's last."""
        may_speak = ~self.frame_token_mask | (self.rank == self.num_tokens - 1)
        size = self.batch_size * self.sequence_length - self.total_frames * (self.num_tokens - 1)
        return torch.nonzero_static(may_speak.flatten(), size=size).squeeze(1)

    def plan(self, keep_count: int) -> RoutingPlan:
        """Return the plan of layers that keep `keep_count` tokens per frame, made once."""
        if keep_count in self._plans:
            return self._plans[keep_count]
        skipped = self.num_tokens - keep_count
        lengths = [self.sequence_length - frames * skipped for frames in self.num_frames]
        length, valid = max(lengths), None
        # Kept tokens keep their order, so a frame's first `keep_count` tokens can stand in for them.
        stand_in = ~self.frame_token_mask | (self.rank < keep_count)
        slots = torch.nonzero_static(stand_in.flatten(), size=sum(lengths)).squeeze(1)
        is_frame = self.frame_token_mask.flatten()[slots]
        frame_slots = torch.nonzero_static(is_frame, size=self.total_frames * keep_count).squeeze(1)
        if min(lengths) < length:
            rows = [torch.arange(row * length, row * length + n, device=slots.device) for row, n in enumerate(lengths)]
            valid = torch.cat(rows)
            slots = slots.new_zeros(self.batch_size * length).index_copy(0, valid, slots)
            frame_slots = valid[frame_slots]
        self._plans[keep_count] = RoutingPlan(length, slots, frame_slots, valid)
        return self._plans[keep_count]

    def preference(self, num_tokens: int, count: int) -> torch.LongTensor:
        """Return [`preference`] on the device of the frames, made once."""
        if (num_tokens, count) not in self._preferences:
            self._preferences[num_tokens, count] = preference(num_tokens, count, self.token_index.device)
        return self._preferences[num_tokens, count]


def find_frames(
    config: Any,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.Tensor | None,
    pixel_values_videos: torch.Tensor | None,
    frame_features: torch.Tensor | None,
    num_frames: Sequence[int] | torch.Tensor | None,
    frame_token_mask: torch.BoolTensor | None,
) -> FrameLayout:
    """
    Find the frames in the inputs of a forward pass; see [`VideoLLMMoDModel.forward`] for the arguments.

    Raises:
        `ValueError`: If frames and frame tokens do not match. On a GPU the check runs asynchronously.
    """
    frames = pixel_values_videos if frame_features is None else frame_features
    source = input_ids if inputs_embeds is None else inputs_embeds
    batch_size, sequence_length = source.shape[:2]
    num_tokens = config.frame_num_tokens
    _check_frames(config, pixel_values_videos, frame_features, batch_size)
    no_frames = frames is None and frame_token_mask is None
    if frame_token_mask is None and input_ids is not None:
        frame_token_mask = input_ids == config.frame_token_id
    elif frame_token_mask is None:
        frame_token_mask = torch.zeros(batch_size, sequence_length, dtype=torch.bool, device=source.device)
    if num_frames is not None:
        num_frames = num_frames.tolist() if isinstance(num_frames, torch.Tensor) else list(num_frames)
    elif no_frames:
        num_frames = [0] * batch_size
    elif frames is not None and batch_size == 1:
        num_frames = [frames.shape[1]]
    else:
        num_frames = [count // num_tokens for count in frame_token_mask.sum(dim=1).tolist()]
    if len(num_frames) != batch_size or (frames is not None and max(num_frames) > frames.shape[1]):
        given = "none" if frames is None else f"{frames.shape[1]} per row"
        raise ValueError(f"`num_frames` is {num_frames} for a batch of {batch_size} rows; frames given: {given}.")
    if frames is None and inputs_embeds is None and max(num_frames) > 0:
        raise ValueError(f"Rows have {num_frames} frames, but neither `pixel_values_videos` nor `frame_features`.")
    expected = [count * num_tokens for count in num_frames]
    message = f"The rows have {num_frames} frames of {num_tokens} tokens, so frame tokens expected {expected}"
    check_on_device(frame_token_mask.sum(dim=1), expected, message)
    return FrameLayout(frame_token_mask, num_frames, num_tokens)


def _check_frames(
    config: Any, pixel_values_videos: torch.Tensor | None, frame_features: torch.Tensor | None, batch_size: int
) -> None:
    if pixel_values_videos is not None and frame_features is not None:
        raise ValueError("Give `pixel_values_videos` or `frame_features`, not both.")
    shapes = {
        "pixel_values_videos": (pixel_values_videos, "(batch, frames, channels, height, width)"),
        "frame_features": (frame_features, "(batch, frames, tokens, vision hidden)"),
    }
    for name, (frames, shape) in shapes.items():
        if frames is not None and (frames.ndim != shape.count(",") + 1 or frames.shape[0] != batch_size):
            raise ValueError(f"`{name}` must be {shape} with a batch of {batch_size}, got {tuple(frames.shape)}.")
    expected = (config.frame_num_tokens, config.vision_config.hidden_size)
    if frame_features is not None and tuple(frame_features.shape[2:]) != expected:
        raise ValueError(
            f"`frame_features` has {frame_features.shape[2]} tokens of width {frame_features.shape[3]} per frame; "
            f"this model's frames are {expected[0]} tokens of width {expected[1]}."
        )


def find_positions(
    position_ids: torch.LongTensor | None,
    layout: FrameLayout,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    num_seen: int | torch.Tensor,
    seq_idx: torch.Tensor | None,
    *,
    device: torch.device,
) -> torch.LongTensor:
    """Return rotary positions (batch or 1, sequence): the given ones after checks, or a count of each dialogue."""
    given = None if attention_mask is None or isinstance(num_seen, torch.Tensor) else attention_mask.shape[1]
    if given is not None and given != num_seen + layout.sequence_length:
        needed = f"{num_seen} + {layout.sequence_length}"
        raise ValueError(f"`attention_mask` is {given} wide; it must cover past and new tokens: {needed}.")
    if position_ids is not None:
        if attention_mask is None and seq_idx is None and getattr(cache, "needs_masks", True):
            check_on_device(
                (position_ids.diff(dim=-1) < 0).sum(dim=-1),
                [0] * position_ids.shape[0],
                "`position_ids` restart within a row: give `seq_idx` to keep its dialogues apart. Number of restarts",
            )
        return position_ids
    if seq_idx is not None:
        places = torch.arange(layout.sequence_length, device=device).expand(layout.batch_size, -1)
        begins = F.pad(seq_idx.to(device).diff(dim=1), (1, 0)) != 0
        return places - torch.where(begins, places, 0).cummax(dim=1).values
    if attention_mask is not None:
        positions = attention_mask.long().cumsum(dim=1) - 1
        positions = positions.clamp(min=0)[:, -layout.sequence_length :].to(device)
        return positions + getattr(cache, "position_offset", 0)
    return (torch.arange(layout.sequence_length, device=device) + getattr(cache, "next_position", num_seen))[None]


@dataclass
class Choice:
    """
    What one routed layer chose.

    Attributes:
        slots (`torch.LongTensor` of shape `(batch * length,)`): The plan's slots with the kept tokens in place.
        gate (`torch.Tensor` of shape `(frames * kept,)`, *optional*): Factor of each kept token's update.
        scores (`torch.Tensor` of shape `(frames, tokens)`, *optional*): Router scores.
        kept (`torch.Tensor` of shape `(frames, tokens)`, *optional*): 1 at kept tokens, 0 at skipped ones.
    """

    slots: torch.LongTensor
    gate: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    kept: torch.Tensor | None = None


def choose(
    scores: torch.Tensor | None, plan: RoutingPlan, layout: FrameLayout, keep_count: int, config: Any
) -> Choice:
    """Choose `keep_count` tokens per frame by scores (frames, tokens), which are `None` in a layer that keeps none."""
    if scores is None:
        return Choice(plan.slots)
    index = choose_kept(scores, keep_count, config.mod_keep_last, layout)
    slots = plan.slots.index_copy(0, plan.frame_slots, layout.token_index.gather(1, index).flatten())
    gate = ROUTERS[config.mod_router].gate(scores.gather(1, index), config.mod_gate)
    kept = torch.zeros_like(scores).scatter(1, index, 1.0)
    return Choice(slots, None if gate is None else gate.flatten(), scores, kept)


def choose_kept(
    scores: torch.Tensor, keep_count: int, keep_last: bool, layout: FrameLayout | None = None
) -> torch.LongTensor:
    """
    Return the indices of the tokens that a routed layer keeps, in order.

    Args:
        scores (`torch.Tensor` of shape `(frames, tokens)`): Router scores.
        keep_count (`int`): Number of tokens to keep per frame, at least 1.
        keep_last (`bool`): Whether to keep the last token whatever its score.
        layout ([`FrameLayout`], *optional*): Layout of the frames, which caches the order of preference.

    Returns:
        `torch.LongTensor` of shape `(frames, keep_count)`: Indices of the highest scores, ascending. Among equal
        scores, evenly spaced tokens win: routers that start at zero do not all keep the top left corner.
    """
    num_tokens = scores.shape[1]
    count, candidates = (keep_count - 1, num_tokens - 1) if keep_last else (keep_count, num_tokens)
    preferred = layout.preference(candidates, count) if layout else preference(candidates, count, scores.device)
    # A stable sort, since `topk` breaks ties differently for one frame and for many.
    ranking = scores.index_select(1, preferred).argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = preferred[ranking].sort(dim=1).values
    return F.pad(kept, (0, 1), value=num_tokens - 1) if keep_last else kept


def preference(num_tokens: int, count: int, device: torch.device) -> torch.LongTensor:
    """Return the indices 0 to `num_tokens` - 1 in order of preference: first `count` evenly spaced ones."""
    first = (2 * torch.arange(count, device=device) + 1) * num_tokens // (2 * max(count, 1))
    is_first = torch.zeros(num_tokens, dtype=torch.long, device=device).index_fill(0, first, 1)
    return is_first.argsort(descending=True, stable=True)


def apply_gate(
    output: torch.Tensor, short: torch.Tensor, gate: torch.Tensor, plan: RoutingPlan, *, on_update: bool
) -> torch.Tensor:
    """Return x + g * (f(x) - x) at kept frame tokens, or g * f(x) if not `on_update`, and exactly f(x) at text."""
    # Written as f(x) - (1 - g) * (f(x) - x): 1 - g is 0 at text, and keeps its precision where g is near 1.
    closed = torch.zeros(output.shape[0] * output.shape[1], device=output.device, dtype=output.dtype)
    closed = closed.index_copy(0, plan.frame_slots.to(output.device), (1 - gate).to(output.device, output.dtype))
    # With layers on several devices, the input is still on the previous layer's device.
    update = output - short.to(output.device) if on_update else output
    return output - closed.view(*output.shape[:2], 1) * update


def run_on_kept(
    run: Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor],
    hidden_states: torch.Tensor,
    rotary: torch.Tensor,
    choice: Choice,
    plan: RoutingPlan,
    *,
    on_update: bool,
) -> torch.Tensor:
    """
    Run a layer on kept and text tokens only; skipped tokens pass unchanged. `hidden_states` (batch, sequence, hidden)
    and `rotary` (2, batch, sequence, dim), cos and sin, are of the full sequences. `run` receives their short parts.
    """
    batch_size, flat = hidden_states.shape[0], hidden_states.flatten(0, 1)
    short = flat.index_select(0, choice.slots.to(flat.device)).view(batch_size, plan.length, -1)
    short_rotary = rotary.flatten(1, 2).index_select(1, choice.slots.to(rotary.device))
    output = run(short, short_rotary.view(2, batch_size, plan.length, -1).unbind())
    if choice.gate is not None:
        output = apply_gate(output, short, choice.gate, plan, on_update=on_update)
    return write_back(flat, output, choice.slots, plan).view_as(hidden_states)


def write_back(flat: torch.Tensor, output: torch.Tensor, slots: torch.LongTensor, plan: RoutingPlan) -> torch.Tensor:
    """Return the full sequences (batch * sequence, hidden) with the layer's output at the tokens it ran on."""
    output = output.flatten(0, 1).to(flat.device)
    if plan.valid is not None:
        output, slots = output.index_select(0, plan.valid.to(flat.device)), slots.index_select(0, plan.valid)
    return flat.index_copy(0, slots.to(flat.device), output)


def record_positions(
    cache: Cache | None,
    layer: int,
    slots: torch.LongTensor | None,
    layout: FrameLayout,
    num_seen: int | torch.Tensor,
    plan: RoutingPlan | None = None,
) -> None:
    """Record the positions of a routed layer's next cache entries: those of `slots`, or of all tokens if `None`."""
    if cache is None:
        return
    has_filler = plan is not None and plan.valid is not None
    if slots is None:
        device = layout.frame_token_mask.device
        positions = torch.arange(layout.sequence_length, device=device).expand(layout.batch_size, -1) + num_seen
    else:
        positions = (slots % layout.sequence_length).view(layout.batch_size, plan.length) + num_seen
    if has_filler:
        filler = torch.ones_like(slots, dtype=torch.bool).index_fill(0, plan.valid, False)
        positions = positions.masked_fill(filler.view_as(positions), -1)
    cache.record_positions(layer, positions, has_filler=has_filler)


def by_row(values: torch.Tensor | None, layout: FrameLayout, device: torch.device) -> torch.Tensor:
    """Return values (all frames, tokens) as (batch, frames, tokens), 0 where a row has fewer frames."""
    if values is None:
        return torch.zeros(layout.batch_size, max(layout.num_frames), layout.num_tokens, device=device)
    return nn.utils.rnn.pad_sequence(values.to(device, torch.float32).split(layout.num_frames), batch_first=True)


@dataclass
class LayerMasks:
    """
    Attention masks of one forward pass. Layers that keep the same number of tokens share a mask.

    Args:
        text_config (`PreTrainedConfig`): Configuration of the language model.
        layout ([`FrameLayout`]): Layout of the batch.
        attention_mask (`torch.Tensor` of shape `(batch, seen + sequence)`, *optional*): 0 at padding.
        cache (`Cache`, *optional*): The key/value cache. If it has `needs_masks = False`, masks are `None`.
        seq_idx (`torch.Tensor` of shape `(batch, sequence)`, *optional*): Index of each token's dialogue.
    """

    text_config: Any
    layout: FrameLayout
    attention_mask: torch.Tensor | None
    cache: Cache | None
    seq_idx: torch.Tensor | None = None
    _masks: dict[tuple[int, int | None], Any] = field(default_factory=dict)

    def get(self, layer: int, keep_count: int, inputs: torch.Tensor) -> Any:
        """Return the mask for `inputs` (batch, length, hidden) of a layer. Record their positions first."""
        if not getattr(self.cache, "needs_masks", True):
            return None
        window = self._window(layer, inputs.shape[1])
        key = (min(keep_count, self.layout.num_tokens), window)
        if key not in self._masks and getattr(self.cache, "is_grouped", False):
            self._masks[key] = self.cache.grouped_mask(layer, inputs, window, self.text_config)
        elif key not in self._masks:
            self._masks[key] = create_causal_mask(
                self.text_config,
                inputs,
                self._padding(layer, keep_count, inputs.shape[1]),
                self.cache,  # by position: its name differs between versions of Transformers
                layer_idx=layer,
                and_mask_function=self._overlay(layer, keep_count, window, inputs.shape[1]),
            )
        return self._masks[key]

    def _overlay(self, layer: int, keep_count: int, window: int | None, length: int) -> Callable | None:
        """Return the mask function that hides what lies beyond the window and in other dialogues."""
        near = None if window is None else self._window_overlay(layer, keep_count, window)
        if self.seq_idx is None:
            return near
        same = packed_sequence_mask_function(self._by_slot(self.seq_idx, keep_count, length))
        return same if near is None else and_masks(near, same)

    def _window_overlay(self, layer: int, keep_count: int, window: int) -> Callable:
        if self.cache is None or not self.cache.has_filler or keep_count >= self.layout.num_tokens:
            return sliding_window_overlay(window)
        # Count real entries only: filler between them must not push older ones out of the window.
        count = (self.cache.get_positions(layer) >= 0).cumsum(dim=1)
        return lambda row, _head, query, key: count[row, query] - count[row, key] < window

    def _window(self, layer: int, length: int) -> int | None:
        """Return a layer's sliding window, in entries of its own sequence, or `None` while all entries fit."""
        window = getattr(self.text_config, "sliding_window", None)
        types = getattr(self.text_config, "layer_types", None)
        if window is None or (types is not None and types[layer] != "sliding_attention"):
            return None
        past = 0 if self.cache is None else self.cache.get_seq_length(layer)
        return None if isinstance(past, int) and past + length <= window else window

    def _padding(self, layer: int, keep_count: int, length: int) -> torch.Tensor | None:
        """Return which of a layer's entries are real, (batch, past + new), or `None` if all are."""
        if keep_count >= self.layout.num_tokens:
            return self.attention_mask
        # Without a cache, filler ends a row, so causal attention already hides it from every real token.
        if self.attention_mask is None and (self.cache is None or not self.cache.has_filler):
            return None
        if self.cache is None:
            seen = self.attention_mask.to(self.layout.frame_token_mask.device, torch.bool)
            return self._by_slot(seen, keep_count, length)
        positions = self.cache.get_positions(layer)
        real = positions >= 0
        if self.attention_mask is not None:
            seen = self.attention_mask.to(positions.device, torch.bool)
            real = real & seen.gather(1, positions.clamp(min=0, max=seen.shape[1] - 1))
        return real

    def _by_slot(self, values: torch.Tensor, keep_count: int, length: int) -> torch.Tensor:
        """Return values of tokens (batch, sequence) as values of a layer's slots (batch, length), 0 at filler."""
        if keep_count >= self.layout.num_tokens or self.layout.total_frames == 0:
            return values
        plan = self.layout.plan(keep_count)
        slots = values.flatten().index_select(0, plan.slots)
        if plan.valid is not None:
            slots = torch.zeros_like(slots).index_copy(0, plan.valid, slots.index_select(0, plan.valid))
        return slots.view(self.layout.batch_size, length)


def check_on_device(found: torch.Tensor, expected: torch.Tensor | list[int], message: str) -> None:
    """Raise an error unless `found` is as expected. On a GPU it is raised there, without waiting for the device."""
    if torch.compiler.is_compiling() or found.device.type == "meta":
        return
    if found.device.type == "cpu":
        wanted = expected.tolist() if isinstance(expected, torch.Tensor) else expected
        if found.tolist() != wanted:
            raise ValueError(f"{message}; found {found.tolist()}.")
        return
    parts = list(zip(found, expected, strict=True)) if isinstance(expected, list) else [(found, expected)]
    # The device accepts messages of up to 255 bytes.
    torch._assert_async(torch.stack([part == want for part, want in parts]).all(), message[:250])


__all__ = ["GATES", "ROUTERS", "LearnedRouter", "RandomRouter", "UniformRouter", "VideoLLMMoDRouter"]
