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
"""Key/value cache whose layers differ in length: a routed layer holds text and kept frame tokens only."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast


# What Transformers calls a model's cache in arguments and outputs: `past_key_values` up to 5.23, `cache` since.
CACHE_NAME = next(x.name for x in fields(BaseModelOutputWithPast) if x.name in ("cache", "past_key_values"))


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """
    The one that is given, by whichever of its names.

    Raises:
        `ValueError`: If both are.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Give `cache` alone: `past_key_values` is what it was called up to Transformers 5.23.")
    return past_key_values if cache is None else cache


class VideoLLMMoDStaticLayer(StaticLayer):
    """A preallocated layer that can be cropped and re-batched. Keys and values are (batch, heads, length, dim)."""

    is_croppable = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` entries; they are overwritten by the next update."""
        self.truncate(int(self.get_seq_length()) + tokens_to_remove)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` entries."""
        if self.is_initialized:
            self.cumulative_length.fill_(length)

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes these entries, no more than it has room for, in place of its own."""
        length = keys.shape[2]
        self.keys[:, :, :length].copy_(keys)
        self.values[:, :, :length].copy_(values)
        self.truncate(length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        self._map_batch(lambda tensor: tensor[indices])

    def _map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
            self.batch_size = self.keys.shape[0]


class VideoLLMMoDDynamicLayer(DynamicLayer):
    """
    A growing layer that can be cut to a length. Keys and values are (batch, heads, length, dim).

    Args:
        dtype (`torch.dtype`, *optional*): That of keys and values as stored, by default as they come.
    """

    def __init__(self, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stored_dtype = dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds entries (batch, heads, new, dim) and gives all, in the dtype in which they came."""
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
        """Empties the layer."""
        # Up to Transformers 5.17 the base class zeroes the entries and keeps them.
        self.keys = self.values = None
        self.is_initialized = False

    def truncate(self, length: int) -> None:
        """Keeps the first `length` entries."""
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes these entries in place of its own."""
        self.keys, self.values = keys, values


class PositionsMixin:
    """
    Positions of a routed layer's entries: (batch, length), each entry's index in the full sequence, -1 for filler.

    Filler exists where rows of a batch have different numbers of frames; attention must not see it. The positions of
    one forward pass are recorded before its keys and values arrive.
    """

    def reset(self) -> None:
        """Empties the layer."""
        self.positions = None
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._map_positions(lambda positions: positions.index_select(0, beam_idx.to(positions.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_positions(lambda positions: positions.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_positions(lambda positions: positions[indices])

    def count_before(self, position: int) -> torch.Tensor:
        """Number of leading entries, in any row, that lie before `position` of the full sequence: a scalar tensor."""
        # Entries are in order, so those to keep are a prefix that ends with the last of them. Columns of filler alone
        # may lie within it, where rows that were longer have been dropped.
        kept = ((self.positions >= 0) & (self.positions < position)).any(dim=0)
        return (kept * torch.arange(1, kept.shape[0] + 1, device=kept.device)).max()

    def _map_positions(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.positions is not None:
            self.positions = function(self.positions)


class RoutedDynamicLayer(PositionsMixin, VideoLLMMoDDynamicLayer):
    """A growing layer of kept and text tokens."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.positions = None

    # One concatenation a layer and step is a kernel launch that only padding, crops and pictures ever need: collect
    # the chunks and join them when somebody looks.
    @property
    def positions(self) -> torch.Tensor | None:
        """Each entry's index in the full sequence, (batch, length), -1 for filler; `None` before the first."""
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks, dim=1)]
        return self._chunks[0] if self._chunks else None

    @positions.setter
    def positions(self, positions: torch.Tensor | None) -> None:
        self._chunks = [] if positions is None else [positions]

    def record_positions(self, positions: torch.Tensor) -> None:
        """Appends the positions (batch, new) of the entries that come next."""
        self._chunks.append(positions)

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Takes these positions (batch, length) in place of its own."""
        self.positions = positions

    def truncate_before(self, position: int, length: int) -> None:
        """Keeps the first `length` entries; those at or past `position` become filler."""
        kept = self.positions[:, :length]
        self.positions = kept.masked_fill(kept >= position, -1)
        self.truncate(length)


class RoutedStaticLayer(PositionsMixin, VideoLLMMoDStaticLayer):
    """A preallocated layer of kept and text tokens."""

    def __init__(self, max_cache_len: int, **kwargs) -> None:
        super().__init__(max_cache_len, **kwargs)
        self.positions = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates keys, values and positions for states (batch, heads, any, dim)."""
        super().lazy_initialization(key_states, value_states)
        if self.positions is None:
            self._allocate_positions(key_states.shape[0], key_states.device)

    def _allocate_positions(self, batch_size: int, device: torch.device) -> None:
        self.positions = torch.full((batch_size, self.max_cache_len), -1, dtype=torch.long, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.positions)

    def reset(self) -> None:
        """Empties the layer; its tensors stay where they are."""
        VideoLLMMoDStaticLayer.reset(self)
        if self.positions is not None:
            self.positions.fill_(-1)

    def record_positions(self, positions: torch.Tensor) -> None:
        """Writes the positions (batch, new) of the entries that come next."""
        if self.positions is None:
            self._allocate_positions(positions.shape[0], positions.device)
        slots = torch.arange(positions.shape[1], device=positions.device) + self.get_seq_length()
        self.positions.index_copy_(1, slots, positions)

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Takes these positions (batch, length) in place of its own."""
        self.positions.fill_(-1)
        self.positions[:, : positions.shape[1]] = positions

    def truncate_before(self, position: int, length: int) -> None:
        """Keeps the first `length` entries; those at or past `position` become filler."""
        past = torch.arange(self.max_cache_len, device=self.positions.device) >= length
        self.positions.masked_fill_(past | (self.positions >= position), -1)
        self.truncate(length)


class VideoLLMMoDCache(Cache):
    r"""
    Key/value cache of a routed language model.

    A full layer holds every token, a routed layer only text and the frame tokens it kept, each with its position in
    the full sequence. `get_seq_length()` is the number of tokens *seen*, whichever layer is routed;
    `get_seq_length(layer_idx)` is what that layer holds.

    Args:
        num_layers (`int`): Number of decoder layers.
        routed_layers (`Collection[int]`, *optional*, defaults to none): Indices of the layers that are routed.
        max_lengths (`Sequence[int]`, *optional*): Entries to preallocate in each layer. Without it, layers grow.
        offloading (`bool`, *optional*, defaults to `False`): Whether layers wait on the CPU until they are used.
        dtype (`torch.dtype`, *optional*): That of keys and values as stored, such as `torch.float8_e4m3fn`, for layers
            that grow; each step converts what it reads. By default that of the model.

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
            raise ValueError("`dtype` is for layers that grow: leave `max_lengths` out, or use a pool of pages.")
        routed = set(routed_layers)
        if max_lengths is None:
            layers = [
                (RoutedDynamicLayer if layer in routed else VideoLLMMoDDynamicLayer)(dtype=dtype)
                for layer in range(num_layers)
            ]
        elif len(max_lengths) != num_layers:
            raise ValueError(
                f"`max_lengths` has {len(max_lengths)} lengths for {num_layers} layers: give one a layer."
            )
        else:
            layers = [
                RoutedStaticLayer(length) if layer in routed else VideoLLMMoDStaticLayer(length)
                for layer, length in enumerate(max_lengths)
            ]
        super().__init__(layers=layers, offloading=offloading)
        # A tensor where layers are static, so that a compiled step does not specialise on it.
        self.num_seen: int | torch.Tensor = 0 if max_lengths is None else torch.tensor(0)
        # Whether some row is shorter than others in a routed layer, so that attention needs to be told.
        self.has_filler = False
        # What each forward pass added: where it began, how many tokens, and which of them are inside a frame.
        self._log: list[tuple[int | torch.Tensor, int, torch.Tensor | None]] = []

    @property
    def lengths(self) -> list[int]:
        """Number of entries each layer holds."""
        return [int(layer.get_seq_length()) for layer in self.layers]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, preallocated ones included."""
        return sum(_layer_bytes(layer) for layer in self.layers)

    @property
    def num_bytes_by_kind(self) -> dict[str, int]:
        """`num_bytes` of the layers that hold every token, "full", and of those that are "routed"."""
        kinds = {"full": 0, "routed": 0}
        for layer in self.layers:
            kinds["routed" if isinstance(layer, PositionsMixin) else "full"] += _layer_bytes(layer)
        return kinds

    def get_seq_length(self, layer_idx: int | None = None) -> int | torch.Tensor:
        """Number of tokens seen, or with `layer_idx` the number of entries in that layer."""
        return self.num_seen if layer_idx is None else self.layers[layer_idx].get_seq_length()

    def record_positions(self, layer_idx: int, positions: torch.Tensor, *, has_filler: bool = False) -> None:
        """Records where the entries that routed layer `layer_idx` is about to add lie: (batch, new), -1 for filler."""
        self.layers[layer_idx].record_positions(positions)
        self.has_filler = self.has_filler or has_filler

    def get_positions(self, layer_idx: int) -> torch.Tensor | None:
        """Positions of the entries of routed layer `layer_idx`: (batch, length), -1 for filler; `None` if empty."""
        return self.layers[layer_idx].positions

    def advance(self, num_tokens: int, inside_frame: torch.Tensor | None = None) -> None:
        """
        Counts the tokens of one forward pass.

        Args:
            num_tokens (`int`): Number of new tokens, frame tokens included.
            inside_frame (`torch.Tensor` of shape `(batch, num_tokens)`, *optional*):
                True at frame tokens that are not the last of their frame, after which the cache must not be cut.
        """
        is_static = isinstance(self.num_seen, torch.Tensor)
        # A list that grows would have the step compiled again: `crop` tells such stretches by their absence.
        if not torch.compiler.is_compiling():
            self._log.append((self.num_seen.clone() if is_static else self.num_seen, num_tokens, inside_frame))
        self.num_seen = self.num_seen.add_(num_tokens) if is_static else self.num_seen + num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forgets the last `-tokens_to_remove` tokens of the full sequence, in each layer those of them that it holds.

        Raises:
            `ValueError`: If the number is positive or larger than what was seen, or would leave part of a frame: its
            tokens were chosen together and enter the cache together.
        """
        num_seen = int(self.num_seen)
        length = num_seen + tokens_to_remove
        if tokens_to_remove > 0 or length < 0:
            raise ValueError(
                f"`tokens_to_remove` is {tokens_to_remove}; it must be negative and no less than {-num_seen}."
            )
        if tokens_to_remove == 0:
            return
        self._crop_log(length)
        routed = [layer for layer in self.layers if isinstance(layer, PositionsMixin) and layer.positions is not None]
        counts = torch.stack([layer.count_before(length) for layer in routed]).tolist() if routed else []
        for layer, count in zip(routed, counts, strict=True):
            # Rows whose entries end earlier than the longest row's are filled up by the cut.
            layer.truncate_before(length, count)
        self.has_filler = self.has_filler or any(layer.positions.shape[0] > 1 for layer in routed)
        for layer in self.layers:
            if not isinstance(layer, PositionsMixin):
                layer.truncate(length)
        self.num_seen = self.num_seen.fill_(length) if isinstance(self.num_seen, torch.Tensor) else length

    def evict(
        self, keep: torch.Tensor, rotate: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """
        Forgets tokens anywhere in the full sequence, in each layer those of them that it holds; those behind move up.

        Args:
            keep (`torch.BoolTensor` of shape `(tokens seen,)`): False at tokens to forget. Of a frame all or none.
            rotate (`Callable`, *optional*): Called with a layer's index, its keys (batch, heads, length, dim) and by
                how many positions each has moved up, (length,); returns the keys at their new positions.

        Raises:
            `ValueError`: If the cache is of several rows, or `keep` is not of the tokens seen.
        """
        num_seen = int(self.num_seen)
        if keep.shape != (num_seen,):
            raise ValueError(f"`keep` must say of each of the {num_seen} tokens seen whether it stays.")
        moved = (~keep).cumsum(dim=0)
        for index, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            if layer.keys.shape[0] > 1:
                raise ValueError(f"Only the cache of one row can be evicted from; this one has {layer.keys.shape[0]}.")
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
        count = int(keep.sum())
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
                raise ValueError(
                    f"Cropping to {length} tokens would cut a frame in two: crop to the end of a frame or into text."
                )
            log[-1] = (begin, kept, None if inside_frame is None else inside_frame[:, :kept])
        elif kept > num_tokens:
            later = [int(entry[0]) for entry in self._log if int(entry[0]) >= length]
            known = [int(begin) + num_tokens, *later[:1]]
            if length not in known:
                raise ValueError(
                    f"Cropping to {length} tokens is not possible: compiled steps keep no record of frames, and they "
                    f"added what follows token {known[0]}. Crop to {' or '.join(map(str, known))} tokens."
                )
        self._log = log

    def reset(self) -> None:
        """Empties all layers."""
        super().reset()
        self.has_filler = False
        self.num_seen = self.num_seen.zero_() if isinstance(self.num_seen, torch.Tensor) else 0
        self._log = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._map_log(lambda inside: inside.index_select(0, beam_idx.to(inside.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_log(lambda inside: inside.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_log(lambda inside: inside[indices])

    def _map_log(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._log = [
            (begin, count, None if inside is None else function(inside)) for begin, count, inside in self._log
        ]


def _layer_bytes(layer: CacheLayerMixin) -> int:
    own = getattr(layer, "num_bytes", None)
    if own is not None:
        return own
    return sum(x.numel() * x.element_size() for x in (layer.keys, layer.values) if x is not None)


__all__ = ["CACHE_NAME", "VideoLLMMoDCache", "one_cache"]
