# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Key/value cache whose layers differ in length: routed layers hold only text and kept frame tokens."""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Entries that a layer with a capacity makes room for at first. When they are full, the room doubles.
_FIRST_ROOM = 4096

# The name of a cache in arguments and outputs of Transformers: `past_key_values` up to 5.23, `cache` since.
CACHE_NAME = next(x.name for x in fields(BaseModelOutputWithPast) if x.name in ("cache", "past_key_values"))


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache given under either name; raise `ValueError` if both are given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Give only `cache`: `past_key_values` is its name up to Transformers 5.23.")
    return past_key_values if cache is None else cache


class VideoLLMMoDStaticLayer(StaticLayer):
    """A preallocated layer that can be truncated; keys and values are (batch, heads, length, dim)."""

    is_croppable = True

    def truncate(self, length: int) -> None:
        """Keep the first `length` entries."""
        if self.is_initialized:
            self.cumulative_length.fill_(length)

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all entries by these, which must fit."""
        length = keys.shape[2]
        self.keys[:, :, :length].copy_(keys)
        self.values[:, :, :length].copy_(values)
        self.truncate(length)


class VideoLLMMoDDynamicLayer(DynamicLayer):
    """
    A growing layer that can be truncated and may store keys and values, (batch, heads, length, dim), in a dtype.

    Set `capacity` before the first entry to write entries in place: keys and values are then views of `buffers`
    (room, batch, heads, dim). Full buffers double, up to the capacity if that is enough. It needs no gradients.
    """

    def __init__(self, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stored_dtype, self.capacity = dtype, None
        self.buffers: list[torch.Tensor] = []

    def make_room(self, new: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers if `new` more entries like these states (batch, heads, any, dim) do not fit."""
        length, old = self.get_seq_length(), (self.keys, self.values)
        room = len(self.buffers[0]) if self.buffers else 0
        if length + new > room:
            grown = max(2 * room, _FIRST_ROOM, length + new)
            room = min(grown, self.capacity) if length + new <= self.capacity else grown
            shapes = ((room, *x.shape[:2], x.shape[3]) for x in (key_states, value_states))
            self.buffers = [key_states.new_empty(shape, dtype=self.stored_dtype) for shape in shapes]
            self.resize(length)
            for stored, before in zip((self.keys, self.values), old if length else (), strict=False):
                stored.copy_(before)

    def resize(self, length: int) -> None:
        """Let keys and values be the first `length` entries of the buffers."""
        self.keys, self.values = (buffer[:length].permute(1, 2, 0, 3) for buffer in self.buffers)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add entries (batch, heads, new, dim), and return all in the dtype of the new ones."""
        if self.capacity is not None:
            length, new = self.get_seq_length(), key_states.shape[2]
            self.make_room(new, key_states, value_states)
            self.resize(length + new)
            self.keys[:, :, length:], self.values[:, :, length:] = key_states, value_states
            return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        if self.stored_dtype is None:
            return super().update(key_states, value_states, *args, **kwargs)
        new = key_states.to(self.stored_dtype), value_states.to(self.stored_dtype)
        if self.get_seq_length() == 0:
            self.lazy_initialization(*new)
            self.keys, self.values = new
        else:
            super().update(*new, *args, **kwargs)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def reset(self) -> None:
        """Empty the layer."""
        # In Transformers 5.17 the base class keeps the entries and sets them to zero.
        self.keys = self.values = None
        self.is_initialized, self.buffers = False, []

    def truncate(self, length: int) -> None:
        """Keep the first `length` entries."""
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all entries by these. Buffers keep their addresses."""
        if not self.buffers:
            self.keys, self.values = keys, values
            return
        self.resize(keys.shape[2])
        self.keys.copy_(keys)
        self.values.copy_(values)


class PositionsMixin:
    """
    The positions of a routed layer's entries: (batch, length), indices in the full sequence, -1 for filler.

    Filler makes rows with fewer frames as long as others; attention must not see it. Each forward pass records
    positions before keys and values.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.positions = None

    def reset(self) -> None:
        """Empty the layer."""
        self.positions = None
        super().reset()

    def count_before(self, position: int) -> torch.Tensor:
        """Return how many leading entries lie before `position` in the full sequence, in any row: a scalar tensor."""
        # Entries are in order, so the ones to keep are a prefix. It may contain columns that are filler in every row,
        # if longer rows have been removed.
        kept = ((self.positions >= 0) & (self.positions < position)).any(dim=0)
        return (kept * torch.arange(1, kept.shape[0] + 1, device=kept.device)).max()


class RoutedDynamicLayer(PositionsMixin, VideoLLMMoDDynamicLayer):
    """A growing layer of kept and text tokens."""

    # Chunks are joined on first use: most steps need no positions, and joining costs a kernel launch per layer.
    @property
    def positions(self) -> torch.Tensor | None:
        """Positions (batch, length), or `None` if empty."""
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks, dim=1)]
        return self._chunks[0] if self._chunks else None

    @positions.setter
    def positions(self, positions: torch.Tensor | None) -> None:
        self._chunks = [] if positions is None else [positions]

    def record_positions(self, positions: torch.Tensor) -> None:
        """Append the positions (batch, new) of the next entries."""
        self._chunks.append(positions)

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Replace the positions by these, (batch, length)."""
        self.positions = positions

    def truncate_before(self, position: int, length: int) -> None:
        """Keep the first `length` entries, and turn those at or past `position` into filler."""
        kept = self.positions[:, :length]
        self.positions = kept.masked_fill(kept >= position, -1)
        self.truncate(length)


class RoutedStaticLayer(PositionsMixin, VideoLLMMoDStaticLayer):
    """A preallocated layer of kept and text tokens."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate keys, values and positions for states (batch, heads, any, dim)."""
        super().lazy_initialization(key_states, value_states)
        self._allocate_positions(key_states)

    def _allocate_positions(self, like: torch.Tensor) -> None:
        if self.positions is None:
            shape = (like.shape[0], self.max_cache_len)
            self.positions = torch.full(shape, -1, dtype=torch.long, device=like.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.positions)

    def reset(self) -> None:
        """Empty the layer; tensors keep their addresses."""
        VideoLLMMoDStaticLayer.reset(self)
        if self.positions is not None:
            self.positions.fill_(-1)

    def record_positions(self, positions: torch.Tensor) -> None:
        """Write the positions (batch, new) of the next entries."""
        self._allocate_positions(positions)
        slots = torch.arange(positions.shape[1], device=positions.device) + self.get_seq_length()
        self.positions.index_copy_(1, slots, positions)

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Replace the positions by these, (batch, length)."""
        self.positions.fill_(-1)
        self.positions[:, : positions.shape[1]] = positions

    def truncate_before(self, position: int, length: int) -> None:
        """Keep the first `length` entries, and turn those at or past `position` into filler."""
        past = torch.arange(self.max_cache_len, device=self.positions.device) >= length
        self.positions.masked_fill_(past | (self.positions >= position), -1)
        self.truncate(length)


class VideoLLMMoDCache(Cache):
    r"""
    Key/value cache of a routed language model.

    A full layer holds every token; a routed layer holds text and the frame tokens that it kept, with their positions
    in the full sequence.

    Args:
        num_layers (`int`): Number of decoder layers.
        routed_layers (`Collection[int]`, *optional*, defaults to `()`): Indices of routed layers.
        max_lengths (`Sequence[int]`, *optional*): Entries to preallocate in each layer. By default layers grow.
        offloading (`bool`, *optional*, defaults to `False`): Whether layers stay on the CPU between uses.
        dtype (`torch.dtype`, *optional*): Dtype of what growing layers store, such as `torch.float8_e4m3fn`; each step
            converts what it reads. Defaults to the model's.

    Example:

    ```python
    >>> cache = VideoLLMMoDCache(num_layers=4, routed_layers=[1, 3])
    >>> model(**inputs, cache=cache)       # 2 frames of 10 tokens, 2 kept in a routed layer, 5 text tokens
    >>> cache.get_seq_length(), cache.lengths
    (25, [25, 9, 25, 9])
    ```"""

    def __init__(
        self,
        num_layers: int,
        routed_layers: Collection[int] = (),
        *,
        max_lengths: Sequence[int] | None = None,
        offloading: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and max_lengths is not None:
            raise ValueError("`dtype` needs layers that grow: leave `max_lengths` out, or use a paged cache.")
        if max_lengths is not None and len(max_lengths) != num_layers:
            raise ValueError(f"`max_lengths` has {len(max_lengths)} lengths for {num_layers} layers: give one each.")
        is_routed = [layer in routed_layers for layer in range(num_layers)]
        if max_lengths is None:
            kinds = (VideoLLMMoDDynamicLayer, RoutedDynamicLayer)
            layers = [kinds[routed](dtype=dtype) for routed in is_routed]
        else:
            kinds = (VideoLLMMoDStaticLayer, RoutedStaticLayer)
            layers = [kinds[routed](length) for routed, length in zip(is_routed, max_lengths, strict=True)]
        super().__init__(layers=layers, offloading=offloading)
        # A tensor for static layers, so that a compiled step does not specialise on its value.
        self.num_seen: int | torch.Tensor = 0 if max_lengths is None else torch.tensor(0)
        self.has_filler = False  # in a routed layer: attention must mask it
        self.is_grouped = False  # whether attention reads `grouped_mask`, for which see `use_grouped_attention`
        # For each forward pass: its first token, its number of tokens, and which of them are inside a frame.
        self._log: list[tuple[int | torch.Tensor, int, torch.Tensor | None]] = []

    @property
    def lengths(self) -> list[int]:
        """Number of entries each layer holds."""
        return [int(layer.get_seq_length()) for layer in self.layers]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, including preallocated ones."""
        return sum(self.num_bytes_by_kind.values())

    @property
    def num_bytes_by_kind(self) -> dict[str, int]:
        """`num_bytes` of "full" layers and of "routed" layers."""
        kinds = {"full": 0, "routed": 0}
        for layer in self.layers:
            own = getattr(layer, "num_bytes", None)  # of a layer in pages
            tensors = getattr(layer, "buffers", None) or (layer.keys, layer.values)
            stored = sum(x.nbytes for x in tensors if x is not None) if own is None else own
            kinds["routed" if isinstance(layer, PositionsMixin) else "full"] += stored
        return kinds

    def get_seq_length(self, layer_idx: int | None = None) -> int | torch.Tensor:
        """Return the number of tokens seen, or with `layer_idx` the number of entries in that layer."""
        return self.num_seen if layer_idx is None else self.layers[layer_idx].get_seq_length()

    def record_positions(self, layer_idx: int, positions: torch.Tensor, *, has_filler: bool = False) -> None:
        """Record the positions, (batch, new), -1 for filler, of the next entries of routed layer `layer_idx`."""
        self.layers[layer_idx].record_positions(positions)
        self.has_filler = self.has_filler or has_filler

    def get_positions(self, layer_idx: int) -> torch.Tensor | None:
        """Return the positions of routed layer `layer_idx`: (batch, length), -1 for filler; `None` if empty."""
        return self.layers[layer_idx].positions

    def grouped_mask(
        self, layer_idx: int, inputs: torch.Tensor, window: int | None, text_config: Any
    ) -> torch.Tensor | None:
        """Return the mask of a layer's `inputs` (1, new, hidden) for [`grouped_attention_forward`]."""
        past, new, device = self.get_seq_length(layer_idx), inputs.shape[1], inputs.device
        if window is None and (new == 1 or past == 0):
            return None
        # Flash attention has a causal form for the last of many entries. Other kernels need a tensor for it.
        if window is None and device.type == "cuda" and inputs.dtype in (torch.float16, torch.bfloat16):
            return causal_lower_right(new, past + new)
        entries = torch.arange(past + new, device=device)
        return causal_mask(entries[past:], entries, window, text_config, inputs.dtype)

    def advance(self, num_tokens: int, inside_frame: torch.Tensor | None = None) -> None:
        """Count one pass. `inside_frame` (batch, num_tokens) is True at frame tokens except the last of each frame."""
        is_static = isinstance(self.num_seen, torch.Tensor)
        # A growing list would recompile the step. `crop` recognises compiled steps by their missing entries.
        if not torch.compiler.is_compiling():
            self._log.append((self.num_seen.clone() if is_static else self.num_seen, num_tokens, inside_frame))
        self.num_seen = self.num_seen.add_(num_tokens) if is_static else self.num_seen + num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last `-tokens_to_remove` tokens of the full sequence from every layer.

        Raises:
            `ValueError`: If the number is out of range, or part of a frame would stay: frames are kept as a unit.
        """
        num_seen = int(self.num_seen)
        length = num_seen + tokens_to_remove
        if tokens_to_remove > 0 or length < 0:
            raise ValueError(f"`tokens_to_remove` is {tokens_to_remove}; it must be negative, at least {-num_seen}.")
        if tokens_to_remove == 0:
            return
        self._crop_log(length)
        routed = [layer for layer in self.layers if isinstance(layer, PositionsMixin) and layer.positions is not None]
        counts = torch.stack([layer.count_before(length) for layer in routed]).tolist() if routed else []
        for layer, count in zip(routed, counts, strict=True):
            layer.truncate_before(length, count)  # Rows that end before the longest row get filler.
        self.has_filler = self.has_filler or any(layer.positions.shape[0] > 1 for layer in routed)
        for layer in self.layers:
            if not isinstance(layer, PositionsMixin):
                layer.truncate(length)
        self._set_seen(length)

    def evict(
        self, keep: torch.Tensor, rotate: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """
        Remove tokens anywhere in the full sequence from every layer; later tokens move up.

        Args:
            keep (`torch.BoolTensor` of shape `(tokens seen,)`): False at tokens to remove: all or none of a frame.
            rotate (`Callable`, *optional*): Function of a layer's index, its keys (batch, heads, length, dim) and the
                number of positions by which each moves up, (length,), that returns the keys at their new positions.

        Raises:
            `ValueError`: If the cache has several rows, or `keep` does not have one value per token.
        """
        num_seen = int(self.num_seen)
        if keep.shape != (num_seen,):
            raise ValueError(f"`keep` must have the shape ({num_seen},), got {tuple(keep.shape)}.")
        moved = (~keep).cumsum(dim=0)
        for index, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            if layer.keys.shape[0] > 1:
                raise ValueError(f"Eviction works on caches of one row; this one has {layer.keys.shape[0]}.")
            length, device = int(layer.get_seq_length()), layer.keys.device
            is_routed = isinstance(layer, PositionsMixin)
            positions = layer.positions[0, :length] if is_routed else torch.arange(length, device=keep.device)
            positions = positions.to(keep.device)
            entries = (keep[positions] & (positions >= 0)).nonzero().squeeze(1)
            positions, by = positions[entries], moved[positions[entries]]
            keys, values = (x.index_select(2, entries.to(device)) for x in (layer.keys, layer.values))
            layer.replace(keys if rotate is None else rotate(index, keys, by), values)
            if is_routed:
                layer.replace_positions((positions - by)[None].to(layer.positions.device))
        self._evict_from_log(keep)
        self._set_seen(int(keep.sum()))

    def _set_seen(self, count: int) -> None:
        self.num_seen = self.num_seen.fill_(count) if isinstance(self.num_seen, torch.Tensor) else count

    def _evict_from_log(self, keep: torch.Tensor) -> None:
        log = []
        before = [0, *keep.cumsum(dim=0).tolist()]
        for begin, num_tokens, inside in self._log:
            first, end = int(begin), int(begin) + num_tokens
            left = before[end] - before[first]
            if inside is not None and 0 < left < num_tokens:
                inside = inside[:, keep[first:end].to(inside.device)]
            if left > 0:
                begin = begin.fill_(before[first]) if isinstance(begin, torch.Tensor) else before[first]
                log.append((begin, left, inside))
        self._log = log

    def _crop_log(self, length: int) -> None:
        log = [entry for entry in self._log if int(entry[0]) < length]
        begin, num_tokens, inside_frame = log[-1] if log else (0, 0, None)
        kept = length - int(begin)
        if kept < num_tokens:
            if inside_frame is not None and bool(inside_frame[:, kept - 1].any()):
                raise ValueError(f"A crop to {length} tokens would leave part of a frame: crop at its end or in text.")
            log[-1] = (begin, kept, None if inside_frame is None else inside_frame[:, :kept])
        elif kept > num_tokens:
            later = [int(entry[0]) for entry in self._log if int(entry[0]) >= length]
            known = [int(begin) + num_tokens, *later[:1]]
            if length not in known:
                raise ValueError(
                    f"Cannot crop to {length} tokens: compiled steps after token {known[0]} keep no record of frames. "
                    f"Crop to {' or '.join(map(str, known))} tokens."
                )
        self._log = log

    def reset(self) -> None:
        """Empty all layers."""
        super().reset()
        self._set_seen(0)
        self.has_filler, self._log = False, []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            if layer.is_initialized and layer.keys.numel() > 0:
                layer.keys, layer.values, layer.buffers = function(layer.keys), function(layer.values), []
                if isinstance(layer, StaticLayer):
                    layer.batch_size = layer.keys.shape[0]
            if isinstance(layer, PositionsMixin) and layer.positions is not None:
                layer.positions = function(layer.positions)
        self._log = [(*entry, None if inside is None else function(inside)) for *entry, inside in self._log]


def key_rotation(language_model: Any) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    Return the function that moves a layer's rotated keys to earlier positions; see [`~VideoLLMMoDCache.evict`].

    Raises:
        `ValueError`: If the language model's rotation depends on the length of the sequence.
    """
    rotary, layers = language_model.rotary_emb, language_model.layers
    rope_type = getattr(rotary, "rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(f"Tokens cannot be evicted: positions of type {rope_type!r} depend on the sequence length.")
    apply_rotary = sys.modules[type(language_model).__module__].apply_rotary_pos_emb
    scaling = getattr(rotary, "attention_scaling", 1.0)

    def rotate(index: int, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        if not getattr(layers[index].self_attn, "use_rope", True):
            return keys
        exact = keys.float()
        cos, sin = (x.to(keys.device) / scaling for x in rotary(exact, -by[None].to(rotary.inv_freq.device)))
        return apply_rotary(exact, exact, cos, sin)[1].to(keys.dtype)

    return rotate


def causal_mask(
    slots: torch.Tensor, entries: torch.Tensor, window: int | None, text_config: Any, dtype: torch.dtype
) -> torch.Tensor:
    """
    Return what to add to the scores of new tokens, at the indices `slots` (new,) of `entries` (length,): 0 or -inf,
    (1, 1, groups * new, length), with rows as [`grouped_attention_forward`] reads them.
    """
    hidden = entries > slots[:, None]
    if window is not None:
        hidden = hidden | (entries <= slots[:, None] - window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=entries.device).masked_fill(hidden, float("-inf"))
    return mask.repeat(text_config.num_attention_heads // text_config.num_key_value_heads, 1)[None, None]


def grouped_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend as the library's "sdpa", but without copies of keys and values: an attention function of Transformers.

    With a mask of [`causal_mask`], queries that share a key head become rows of one head. Masks that are not of
    [`~VideoLLMMoDCache.grouped_mask`] go to the library's function.
    """
    (batch, heads, new, dim), key_heads = query.shape, key.shape[1]
    rows = heads // key_heads * new
    if isinstance(attention_mask, CausalBias):
        options = {"attn_mask": attention_mask, "scale": scaling, "enable_gqa": rows > new}
        output = F.scaled_dot_product_attention(query, key, value, **options)
    elif attention_mask is not None and attention_mask.shape[-2] == rows != new:
        folded = query.reshape(batch, key_heads, rows, dim)
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output.reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None


def use_grouped_attention(language_model: Any) -> bool:
    """
    Let a text model with "sdpa" attend by [`grouped_attention_forward`], and return whether it does. This changes
    nothing for steps that do not ask for it by their mask.
    """
    config, grouped = language_model.config, "grouped_sdpa"
    name = config._attn_implementation
    if name.endswith("sdpa") and not name.endswith(grouped):
        # An engine may have put its own function, and a prefix, in front.
        own = f"{name.removesuffix('sdpa')}{grouped}"
        AttentionInterface.register(own, ALL_ATTENTION_FUNCTIONS[name])
        AttentionInterface.register(grouped, grouped_attention_forward)
        AttentionMaskInterface.register(own, AttentionMaskInterface()["sdpa"])
        config._attn_implementation = own
    return config._attn_implementation.endswith(grouped)


__all__ = ["CACHE_NAME", "VideoLLMMoDCache", "key_rotation", "one_cache", "use_grouped_attention"]
