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
"""Routing by layers: where a batch's frame tokens lie, which of them a layer keeps, and how it runs on those alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    and_masks,
    create_causal_mask,
    packed_sequence_mask_function,
    sliding_window_overlay,
)


@dataclass
class RoutingPlan:
    """
    Where the tokens of a batch go in a layer that keeps `keep_count` tokens of each frame.

    The plan depends on where frames lie and never on scores: layers that keep as many tokens share it, and only put
    their own choice into `frame_slots`.

    Attributes:
        length (`int`): Length of the short sequence, that of the longest row.
        slots (`torch.LongTensor` of shape `(batch * length,)`): Source of each slot in the flattened full sequence. At
            frame slots a stand-in.
        frame_slots (`torch.LongTensor` of shape `(frames * keep_count,)`): Which slots are a frame's kept tokens.
        valid (`torch.LongTensor`, *optional*): The slots that are not filler; `None` if all rows are equally long.
    """

    length: int
    slots: torch.LongTensor
    frame_slots: torch.LongTensor
    valid: torch.LongTensor | None


class FrameLayout:
    """
    Where the frames of a batch lie in its sequences. Made once a forward pass; layers only index.

    Args:
        frame_token_mask (`torch.BoolTensor` of shape `(batch, sequence)`): True at frame tokens.
        num_frames (`Sequence[int]`): Number of frames of each row, known to the host so that shapes are.
        num_tokens (`int`): Number of tokens of a frame.

    Attributes:
        total_frames (`int`): Number of frames in the batch.
        rank (`torch.LongTensor` of shape `(batch, sequence)`): Each frame token's index within its frame.
        token_index (`torch.LongTensor` of shape `(frames, tokens)`): Each frame token's index in the flattened batch.
    """

    def __init__(self, frame_token_mask: torch.BoolTensor, num_frames: Sequence[int], num_tokens: int) -> None:
        self.frame_token_mask = frame_token_mask
        self.num_frames = list(num_frames)
        self.num_tokens = num_tokens
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
                    f"The {num_tokens} tokens of a frame must stand together; other tokens stand within frame "
                    f"{int(torn[0])} of the batch."
                )

    @property
    def inside_frame(self) -> torch.BoolTensor | None:
        """True at frame tokens that are not the last of their frame, (batch, sequence); `None` without frames."""
        if self.total_frames == 0:
            return None
        return self.frame_token_mask & (self.rank < self.num_tokens - 1)

    @property
    def speaking_index(self) -> torch.LongTensor:
        """Index, in the flattened sequences, of the tokens after which the model may speak: text and frames' last."""
        may_speak = ~self.frame_token_mask | (self.rank == self.num_tokens - 1)
        size = self.batch_size * self.sequence_length - self.total_frames * (self.num_tokens - 1)
        return torch.nonzero_static(may_speak.flatten(), size=size).squeeze(1)

    def plan(self, keep_count: int) -> RoutingPlan:
        """The plan of the layers that keep `keep_count` tokens of each frame."""
        if keep_count not in self._plans:
            self._plans[keep_count] = self._make_plan(keep_count)
        return self._plans[keep_count]

    def preference(self, num_tokens: int, count: int) -> torch.LongTensor:
        """[`preference`] where scores are, the same for all layers that keep as many tokens."""
        if (num_tokens, count) not in self._preferences:
            self._preferences[num_tokens, count] = preference(num_tokens, count, self.token_index.device)
        return self._preferences[num_tokens, count]

    def _make_plan(self, keep_count: int) -> RoutingPlan:
        skipped = self.num_tokens - keep_count
        lengths = [self.sequence_length - frames * skipped for frames in self.num_frames]
        length = max(lengths)
        # A frame's kept tokens keep their order, so they may stand in for its first ones: same slots, other sources.
        stand_in = ~self.frame_token_mask | (self.rank < keep_count)
        slots = torch.nonzero_static(stand_in.flatten(), size=sum(lengths)).squeeze(1)
        is_frame = self.frame_token_mask.flatten()[slots]
        frame_slots = torch.nonzero_static(is_frame, size=self.total_frames * keep_count).squeeze(1)
        if min(lengths) == length:
            return RoutingPlan(length, slots, frame_slots, None)
        rows = [torch.arange(row * length, row * length + n, device=slots.device) for row, n in enumerate(lengths)]
        valid = torch.cat(rows)
        padded = slots.new_zeros(self.batch_size * length).index_copy(0, valid, slots)
        return RoutingPlan(length, padded, valid[frame_slots], valid)


class VideoLLMMoDRouter(nn.Linear):
    """Scores tokens for one routed layer: mu = w . x (VideoLLM-MoD, arXiv 2408.16730, equation 2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores (batch, sequence, 1) of hidden states (batch, sequence, hidden), in float32 or better."""
        # Summed in float32: in bfloat16 a score has 8 bits, and many of a frame's 50 would tie.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return (hidden_states * self.weight[0]).sum(dim=-1, keepdim=True, dtype=dtype)


def spread(num_tokens: int, count: int) -> list[int]:
    """Indices 0 to `num_tokens` - 1 in order of preference, of which the first `count` are evenly spaced."""
    first = [(2 * i + 1) * num_tokens // (2 * count) for i in range(count)]
    return first + [index for index in range(num_tokens) if index not in first]


def choose_kept(
    scores: torch.Tensor, keep_count: int, keep_last: bool, layout: FrameLayout | None = None
) -> torch.LongTensor:
    """
    Indices of the tokens that a routed layer keeps, in order.

    Args:
        scores (`torch.Tensor` of shape `(frames, tokens)`): Router scores.
        keep_count (`int`): Number of tokens to keep of each frame, at least 1.
        keep_last (`bool`): Whether the last token is kept whatever its score.
        layout ([`FrameLayout`], *optional*): That of the frames, which remembers what one layer shares with the next.

    Returns:
        `torch.LongTensor` of shape `(frames, keep_count)`: The highest scores, ascending by index. Equal scores go to
        evenly spaced tokens, so that routers that start at zero do not all watch the top left corner.
    """
    num_frames, num_tokens = scores.shape
    count, candidates = (keep_count - 1, num_tokens - 1) if keep_last else (keep_count, num_tokens)
    preferred = (
        preference(candidates, count, scores.device) if layout is None else layout.preference(candidates, count)
    )
    # A stable sort rather than `topk`, which breaks ties differently for one frame and for many.
    ranking = scores.index_select(1, preferred).argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = preferred[ranking].sort(dim=1).values
    if keep_last:
        kept = torch.cat([kept, kept.new_full((num_frames, 1), num_tokens - 1)], dim=1)
    return kept


def preference(num_tokens: int, count: int, device: torch.device) -> torch.LongTensor:
    """[`spread`] as a tensor; on a GPU computed there, since a captured step can copy nothing from the host."""
    if count == 0 or device.type in ("cpu", "meta"):
        return torch.tensor(spread(num_tokens, count) if count else [], device=device, dtype=torch.long)
    return preference_on_device(num_tokens, count, device)


def preference_on_device(num_tokens: int, count: int, device: torch.device) -> torch.LongTensor:
    """[`spread`] by arithmetic on tensors."""
    first = (2 * torch.arange(count, device=device) + 1) * num_tokens // (2 * count)
    is_first = torch.zeros(num_tokens, dtype=torch.long, device=device).index_fill(0, first, 1)
    return is_first.argsort(descending=True, stable=True)


def position_noise(positions: torch.LongTensor, layer: int) -> torch.Tensor:
    """Scores in [0, 1) that look random and depend on layer and position only. Same shape as `positions`, float32."""
    # The 32-bit mixer of Mulvey ("lowbias32"): streamed, chunked and whole, a frame has to be routed alike.
    mask = 0xFFFFFFFF
    x = (positions * 0x9E3779B1 + layer * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
    x = ((x ^ (x >> 15)) * 0x735A2D97) & mask
    return (x ^ (x >> 15)).float() / 2**32


def apply_gate(
    output: torch.Tensor, short: torch.Tensor, gate: torch.Tensor, plan: RoutingPlan, *, on_update: bool
) -> torch.Tensor:
    """x + g * (f(x) - x) on kept frame tokens, or g * f(x) if not `on_update`; f(x) to the last bit on text."""
    # Written as f(x) - (1 - g) * (f(x) - x): 1 - g is 0 on text, and keeps its precision where g is near 1.
    closed = torch.zeros(output.shape[0] * output.shape[1], device=output.device, dtype=output.dtype)
    closed = closed.index_copy(0, plan.frame_slots.to(output.device), (1 - gate).to(output.device, output.dtype))
    # With layers on several devices the output is on its layer's, and what went in on the one before.
    update = output - short.to(output.device) if on_update else output
    return output - closed.view(*output.shape[:2], 1) * update


def write_back(flat: torch.Tensor, output: torch.Tensor, slots: torch.LongTensor, plan: RoutingPlan) -> torch.Tensor:
    """The full sequences (batch * sequence, hidden) with the layer's output at the tokens it ran on."""
    output = output.flatten(0, 1).to(flat.device)
    if plan.valid is not None:
        output, slots = output.index_select(0, plan.valid.to(flat.device)), slots.index_select(0, plan.valid)
    return flat.index_copy(0, slots.to(flat.device), output)


def record_positions(
    cache: Cache | None,
    layer: int,
    routed: bool,
    slots: torch.LongTensor | None,
    layout: FrameLayout,
    num_seen: int | torch.Tensor,
    plan: RoutingPlan | None = None,
) -> None:
    """Tells a routed layer's cache where the tokens it is about to run on lie: those of `slots`, or all of them."""
    if cache is None or not routed:
        return
    if slots is None:
        device = layout.frame_token_mask.device
        positions = torch.arange(layout.sequence_length, device=device).expand(layout.batch_size, -1) + num_seen
    else:
        positions = (slots % layout.sequence_length).view(layout.batch_size, plan.length) + num_seen
        if plan.valid is not None:
            filler = torch.ones(slots.shape[0], dtype=torch.bool, device=slots.device)
            filler = filler.index_fill(0, plan.valid, False).view_as(positions)
            positions = positions.masked_fill(filler, -1)
    cache.record_positions(layer, positions, has_filler=plan is not None and plan.valid is not None)


def by_row(values: torch.Tensor | None, layout: FrameLayout, device: torch.device) -> torch.Tensor:
    """Values (all frames, tokens) as (batch, frames, tokens), 0 where a row has fewer frames."""
    most = max(layout.num_frames)
    if values is not None and min(layout.num_frames) == most:
        return values.to(device, torch.float32).view(layout.batch_size, most, layout.num_tokens)
    rows = torch.zeros(layout.batch_size, most, layout.num_tokens, device=device)
    if values is None:
        return rows
    for row, frames in enumerate(values.to(device).split(layout.num_frames)):
        rows[row, : frames.shape[0]] = frames
    return rows


class LayerMasks:
    """Attention masks of one forward pass: layers that keep as many tokens of a frame share theirs."""

    def __init__(
        self,
        text_config: Any,
        layout: FrameLayout,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        num_seen: int | torch.Tensor,
        seq_idx: torch.Tensor | None = None,
    ) -> None:
        self.text_config = text_config
        self.layout = layout
        self.attention_mask = attention_mask
        self.seq_idx = seq_idx
        self.cache = cache
        self.num_seen = num_seen
        self._masks: dict[tuple[int, int | None], Any] = {}

    def get(self, layer: int, keep_count: int, inputs: torch.Tensor) -> Any:
        """Mask of a layer about to run on `inputs` (batch, length, hidden), its positions already recorded."""
        if not getattr(self.cache, "needs_masks", True):
            return None
        window = self._window(layer, inputs.shape[1])
        key = (min(keep_count, self.layout.num_tokens), window)
        if key not in self._masks:
            self._masks[key] = create_causal_mask(
                self.text_config,
                inputs,
                self._padding(layer, keep_count, inputs.shape[1]),
                self.cache,  # by its place: its name is not the same in all versions of the library
                layer_idx=layer,
                and_mask_function=self._overlay(layer, keep_count, window, inputs.shape[1]),
            )
        return self._masks[key]

    def _overlay(self, layer: int, keep_count: int, window: int | None, length: int) -> Callable | None:
        """Mask function of what causal attention sees too much of: beyond a window, and other dialogues."""
        near = None if window is None else self._window_overlay(layer, keep_count, window)
        if self.seq_idx is None:
            return near
        same = packed_sequence_mask_function(self._by_slot(self.seq_idx, keep_count, length))
        return same if near is None else and_masks(near, same)

    def _window_overlay(self, layer: int, keep_count: int, window: int) -> Callable:
        """Mask function that hides what lies further back than the window, counted in real entries."""
        if self.cache is None or not self.cache.has_filler or keep_count >= self.layout.num_tokens:
            return sliding_window_overlay(window)
        # Filler between a row's entries must not push the older ones out.
        count = (self.cache.get_positions(layer) >= 0).cumsum(dim=1)

        def overlay(batch_idx: int, _head_idx: int, q_idx: int, kv_idx: int) -> bool:
            return count[batch_idx, q_idx] - count[batch_idx, kv_idx] < window

        return overlay

    def _window(self, layer: int, length: int) -> int | None:
        """Sliding window of a layer, in entries of its own sequence; `None` if it has none or has not filled it."""
        window = getattr(self.text_config, "sliding_window", None)
        types = getattr(self.text_config, "layer_types", None)
        if window is None or (types is not None and types[layer] != "sliding_attention"):
            return None
        past = 0 if self.cache is None else self.cache.get_seq_length(layer)
        return None if isinstance(past, int) and past + length <= window else window

    def _padding(self, layer: int, keep_count: int, length: int) -> torch.Tensor | None:
        """Which of a layer's past and new entries are real, (batch, past + new), or `None` if all are."""
        if keep_count >= self.layout.num_tokens:
            return self.attention_mask
        if self.cache is None:
            return self._uncached_padding(keep_count, length)
        if self.attention_mask is None and not self.cache.has_filler:
            return None
        positions = self.cache.get_positions(layer)
        real = positions >= 0
        if self.attention_mask is not None:
            seen = self.attention_mask.to(positions.device, torch.bool)
            real = real & seen.gather(1, positions.clamp(min=0, max=seen.shape[1] - 1))
        return real

    def _uncached_padding(self, keep_count: int, length: int) -> torch.Tensor | None:
        # Without a cache filler stands at the end of a row, where causal attention keeps it from every real token.
        if self.attention_mask is None:
            return None
        seen = self.attention_mask.to(self.layout.frame_token_mask.device, torch.bool)
        return self._by_slot(seen, keep_count, length)

    def _by_slot(self, values: torch.Tensor, keep_count: int, length: int) -> torch.Tensor:
        """Values of tokens (batch, sequence) as those of a layer's slots (batch, length), 0 at filler."""
        if keep_count >= self.layout.num_tokens or self.layout.total_frames == 0:
            return values
        plan = self.layout.plan(keep_count)
        slots = values.flatten().index_select(0, plan.slots)
        if plan.valid is not None:
            slots = torch.zeros_like(slots).index_copy(0, plan.valid, slots.index_select(0, plan.valid))
        return slots.view(self.layout.batch_size, length)


def check_on_device(found: torch.Tensor, expected: torch.Tensor | list[int], message: str) -> None:
    """Raises if `found` is not as expected: on the CPU with what was found, elsewhere without waiting for it."""
    if torch.compiler.is_compiling() or found.device.type == "meta":
        return
    if found.device.type == "cpu":
        wanted = expected.tolist() if isinstance(expected, torch.Tensor) else expected
        if found.tolist() != wanted:
            raise ValueError(f"{message}; found {found.tolist()}.")
        return
    parts = list(zip(found, expected, strict=True)) if isinstance(expected, list) else [(found, expected)]
    # The device keeps messages of up to 255 bytes, and refuses longer ones.
    torch._assert_async(torch.stack([part == want for part, want in parts]).all(), message[:250])


__all__ = [
    "FrameLayout",
    "LayerMasks",
    "RoutingPlan",
    "VideoLLMMoDRouter",
    "apply_gate",
    "by_row",
    "check_on_device",
    "choose_kept",
    "position_noise",
    "preference",
    "preference_on_device",
    "record_positions",
    "spread",
    "write_back",
]
