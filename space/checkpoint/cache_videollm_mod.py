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

import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
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


class _PositionsMixin:
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
        super().reorder_cache(beam_idx)
        self._map_positions(lambda positions: positions.index_select(0, beam_idx.to(positions.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_positions(lambda positions: positions.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
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


class RoutedDynamicLayer(_PositionsMixin, VideoLLMMoDDynamicLayer):
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


class RoutedStaticLayer(_PositionsMixin, VideoLLMMoDStaticLayer):
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
            kinds["routed" if isinstance(layer, _PositionsMixin) else "full"] += _layer_bytes(layer)
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
        routed = [layer for layer in self.layers if isinstance(layer, _PositionsMixin) and layer.positions is not None]
        counts = torch.stack([layer.count_before(length) for layer in routed]).tolist() if routed else []
        for layer, count in zip(routed, counts, strict=True):
            # Rows whose entries end earlier than the longest row's are filled up by the cut.
            layer.truncate_before(length, count)
        self.has_filler = self.has_filler or any(layer.positions.shape[0] > 1 for layer in routed)
        for layer in self.layers:
            if not isinstance(layer, _PositionsMixin):
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
            is_routed = isinstance(layer, _PositionsMixin)
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
    if isinstance(layer, PagedLayer):
        return layer.num_bytes
    return sum(x.numel() * x.element_size() for x in (layer.keys, layer.values) if x is not None)


# ------------------------------------------------------------------------------------------------------------- pages


class OutOfPagesError(RuntimeError):
    """A pool has no pages left for what a stream needs."""


class VideoLLMMoDPagePool:
    """
    Memory for the caches of many streams, allocated once: pages of entries, for the layers of each kind their own.

    Layers of one kind keep as many tokens of each frame, so that they are equally long at any time, and a stream's
    pages lie at the same places in all of them. How long each is, the host knows: nothing waits for the device.

    Args:
        kinds (`Sequence[int]`): Of each layer, how many tokens of a frame it keeps.
        num_pages (`Mapping[int, int]`): Of each kind, how many pages to allocate in each of its layers.
        num_tokens (`int`): Tokens of a frame; layers that keep fewer are routed.
        page_size (`int`, *optional*, defaults to 256): Entries of a page.
        dtype (`torch.dtype`, *optional*): That of keys and values as stored, by default that of the model. An 8-bit
            float halves the memory, and is converted where it is read.
    """

    def __init__(
        self,
        kinds: Sequence[int],
        num_pages: Mapping[int, int],
        num_tokens: int,
        *,
        page_size: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.kinds = list(kinds)
        self.num_pages = dict(num_pages)
        self.num_tokens = num_tokens
        self.page_size = page_size
        self.dtype = dtype
        self._free = {kind: list(range(count)) for kind, count in num_pages.items()}
        self._returned: deque[tuple[int, Sequence[int]]] = deque()
        self.layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None] = [None] * len(self.kinds)
        self.compute_dtypes: dict[int, torch.dtype] = {}
        # Of each kind of layer, what kernels that plan on the host keep from one step to the next.
        self.plans: dict[int, dict[Any, Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, those of layers that nothing has passed yet not counted."""
        return sum(x.numel() * x.element_size() for pages in self.layers if pages for x in pages[:2])

    def num_entries(self, kind: int, num_tokens: int, num_frames: int) -> int:
        """Of so many tokens, those of so many frames among them, how many enter layers of a kind."""
        return num_tokens - num_frames * (self.num_tokens - kind)

    def take(self, kind: int, count: int, after: int | None = None) -> list[int]:
        """
        Takes pages from the free ones: such as follow each other, and page `after`, where there are any.

        Raises:
            `OutOfPagesError`: If fewer than `count` are free.
        """
        free = self.free[kind]
        if count > len(free):
            raise OutOfPagesError(
                f"{count} pages of {self.page_size} entries are needed in layers that keep {kind} of "
                f"{self.num_tokens} tokens a frame, and {len(free)} of {self.num_pages[kind]} are free."
            )
        runs = [i for i in range(len(free) - count + 1) if free[i + count - 1] - free[i] == count - 1]
        following = [i for i in runs if after is not None and free[i] == after + 1]
        first = (following or runs or [0])[0]
        taken = free[first : first + count]
        del free[first : first + count]
        return taken

    def give_back(self, kind: int, pages: Sequence[int]) -> None:
        """Makes pages free again."""
        self._returned.append((kind, pages))

    @property
    def free(self) -> dict[int, list[int]]:
        """Of each kind, the pages that no stream has, in order."""
        # Pages may come back at any moment and in any thread, as caches are forgotten: they are put in order here.
        while self._returned:
            kind, pages = self._returned.popleft()
            self._free[kind] = sorted([*self._free[kind], *pages])
        return self._free

    def pages_of(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Pages of a layer's keys and values, (pages, page size, heads, dim), and of positions where it is routed."""
        if self.layers[layer] is None:
            self.allocate(layer, like.shape[1], like.shape[3], like.dtype, like.device)
        return self.layers[layer]

    def allocate(self, layer: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Takes the memory of a layer's pages, for keys and values (batch, heads, any, dim) of this dtype."""
        kind = self.kinds[layer]
        shape = (self.num_pages[kind], self.page_size, heads, dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype or dtype, device=device) for _ in range(2))
        self.compute_dtypes[layer] = dtype
        is_routed = kind < self.num_tokens
        positions = torch.zeros(shape[:2], dtype=torch.long, device=device) if is_routed else None
        self.layers[layer] = (keys, values, positions)


class _PageTable:
    """One stream's pages in the layers of one kind."""

    def __init__(self, pool: VideoLLMMoDPagePool, kind: int) -> None:
        self.pool, self.kind = pool, kind
        self.pages: list[int] = []
        self._slots: tuple[Any, torch.Tensor] | None = None

    def make_room(self, length: int) -> None:
        """Takes what pages are missing for `length` entries."""
        missing = -(-length // self.pool.page_size) - len(self.pages)
        if missing > 0:
            self.pages += self.pool.take(self.kind, missing, self.pages[-1] if self.pages else None)

    def release(self, kept: int = 0) -> None:
        """Gives all pages back but the first ones."""
        gone, self.pages[kept:] = self.pages[kept:], []
        self._slots = None
        self.pool.give_back(self.kind, gone)

    @property
    def strip(self) -> int | None:
        """Where the first entry lies in the flattened pages, if all others follow it."""
        first = self.pages[0] if self.pages else 0
        is_strip = self.pages == list(range(first, first + len(self.pages)))
        return first * self.pool.page_size if is_strip else None

    def slots(self, begin: int, end: int, device: torch.device) -> torch.LongTensor:
        """Where entries `begin` to `end` lie in the flattened pages."""
        # All layers of the kind ask for the same, one after another.
        wanted = (begin, end, device)
        if self._slots is None or self._slots[0] != wanted:
            size, strip = self.pool.page_size, self.strip
            if strip is not None:
                slots = torch.arange(strip + begin, strip + end, device=device)
            else:
                slots = _bring([self.pages[i // size] * size + i % size for i in range(begin, end)], device)
            self._slots = (wanted, slots)
        return self._slots[1]


def _bring(numbers: Sequence[int], device: torch.device) -> torch.LongTensor:
    """Numbers, on a device. On CUDA nobody waits for the copy: torch reuses pinned memory only after it."""
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.long, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


def _release_all(tables: Sequence[_PageTable]) -> None:
    for table in tables:
        table.release()


class PagedLayer(CacheLayerMixin):
    """A layer of one stream, in the pages of a pool. Nothing is copied when it grows, and nothing waits."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, pool: VideoLLMMoDPagePool, layer: int, table: _PageTable) -> None:
        self.pool, self.layer, self.table = pool, layer, table
        self.length = 0
        self.is_initialized = False
        self.dtype: torch.dtype | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its pages, those included that are not full."""
        if not self.is_initialized:
            return 0
        keys, values, _ = self.pool.layers[self.layer]
        return len(self.table.pages) * sum(x[0].numel() * x.element_size() for x in (keys, values))

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys (1, heads, length, dim): a view where its pages follow each other."""
        return self._read(0)

    @property
    def values(self) -> torch.Tensor | None:
        """Values (1, heads, length, dim): a view where its pages follow each other."""
        return self._read(1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:  # noqa: ARG002
        """Allocates the pool's pages of this layer, if no other stream has."""
        self.pool.pages_of(self.layer, key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """Adds entries (1, heads, new, dim) and gives all."""
        if key_states.shape[0] != 1:
            raise ValueError(
                f"A paged cache is of one stream, and got {key_states.shape[0]} rows: for a batch or beams use "
                "`model.new_cache()`, for many streams `model.serve(processor)`."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(self.length, key_states, value_states)
        self.length += key_states.shape[2]
        return self.keys, self.values

    def extend(self, count: int) -> None:
        """Counts entries that were written into its pages by a step of several streams."""
        self.length += count
        pages = self.pool.layers[self.layer]
        if pages is not None and not self.is_initialized:
            self.dtype, self.device, self.is_initialized = self.pool.compute_dtypes[self.layer], pages[0].device, True

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes these entries in place of its own."""
        self._write(0, keys, values)
        self.length = keys.shape[2]

    def truncate(self, length: int) -> None:
        """Keeps the first `length` entries."""
        self.length = min(self.length, length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` entries."""
        self.truncate(self.length + tokens_to_remove)

    def get_seq_length(self) -> int:
        """Number of entries."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it takes pages as it grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries with `query_length` new ones, and where they begin."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Empties the layer; its pages stay its own."""
        self.length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Nothing to reorder in one row."""
        self._refuse_rows(len(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused but for once: a stream is one row."""
        self._refuse_rows(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused but for the one row."""
        self._refuse_rows(len(indices))

    def copy_from(self, other: "PagedLayer") -> None:
        """Takes the entries of a layer of another stream of the pool."""
        if other.is_initialized:
            self.lazy_initialization(other.keys, other.values)
            # Out of the pages, which are those written to.
            self.replace(other.keys.clone(), other.values.clone())

    def _refuse_rows(self, rows: int) -> None:
        if rows != 1:
            raise ValueError(f"A paged cache is of one stream and cannot have {rows} rows: use `model.new_cache()`.")

    def _read(self, which: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        pages = self.pool.layers[self.layer][which]
        strip = self.table.strip
        if strip is not None:
            return read_strip(pages, strip, self.length, self.dtype)
        table = _bring(self.table.pages, pages.device)
        return read_pages(pages, table, self.dtype).flatten(0, 1)[: self.length].transpose(0, 1)[None]

    def _write(self, begin: int, keys: torch.Tensor, values: torch.Tensor, *more: torch.Tensor) -> None:
        end = begin + keys.shape[2]
        self.table.make_room(end)
        slots = self.table.slots(begin, end, keys.device)
        new = (keys[0].transpose(0, 1), values[0].transpose(0, 1), *more)
        for pages, entries in zip(self.pool.layers[self.layer], new, strict=False):
            write_pages(pages, slots, entries)


class RoutedPagedLayer(_PositionsMixin, PagedLayer):
    """A layer of kept and text tokens of one stream."""

    def __init__(self, pool: VideoLLMMoDPagePool, layer: int, table: _PageTable) -> None:
        super().__init__(pool, layer, table)
        self._early: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor | None:
        """Each entry's index in the full sequence, (1, length); `None` before the first."""
        if not self.is_initialized:
            return self._early
        pages = self.pool.layers[self.layer][2].flatten()
        known = pages[self.table.slots(0, self.length, pages.device)][None]
        return known if self._early is None else torch.cat([known, self._early], dim=1)

    @positions.setter
    def positions(self, positions: torch.Tensor | None) -> None:
        self._early = positions  # `None`, where the layer is emptied

    def record_positions(self, positions: torch.Tensor) -> None:
        """Takes the positions (1, new) of the entries that come next."""
        self._early = positions

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Takes these positions (1, length) in place of its own."""
        pages = self.pool.layers[self.layer][2]
        write_pages(pages, self.table.slots(0, positions.shape[1], pages.device), positions[0])

    def truncate_before(self, _position: int, length: int) -> None:
        """Keeps the first `length` entries."""
        self.truncate(length)

    def _map_positions(self, _function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Nothing to do: it has the one row, and refuses what would make others of it."""

    def copy_from(self, other: "RoutedPagedLayer") -> None:
        """Takes the entries of a layer of another stream of the pool."""
        super().copy_from(other)
        if other.is_initialized:
            self.replace_positions(other.positions)

    def _write(self, begin: int, keys: torch.Tensor, values: torch.Tensor, *more: torch.Tensor) -> None:
        super()._write(begin, keys, values, *more, *(() if self._early is None else (self._early[0],)))
        self._early = None


def write_pages(pages: torch.Tensor, slots: torch.LongTensor, entries: torch.Tensor) -> None:
    """Writes entries (new, ...) into pages (pages, page size, ...) at slots (new,) of the flattened pages."""
    flat, entries = pages.flatten(0, 1), entries.to(pages.dtype)
    if pages.dtype.itemsize == 1:
        # Eight-bit floats cannot be written by index everywhere, their bytes can.
        flat, entries = flat.view(torch.uint8), entries.view(torch.uint8)
    flat.index_copy_(0, slots, entries)


def read_pages(pages: torch.Tensor, table: torch.LongTensor, dtype: torch.dtype) -> torch.Tensor:
    """Pages (pages, ...) by index, in another dtype."""
    stored = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages
    return stored[table].view(pages.dtype).to(dtype)


def read_strip(pages: torch.Tensor, begin: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Entries that follow each other in pages (pages, page size, heads, dim): (1, heads, length, dim) in a dtype."""
    _, _, heads, dim = pages.shape
    page, row, head, unit = pages.stride()
    offset = pages.storage_offset() + begin * row
    return pages.as_strided((1, heads, length, dim), (page, head, row, unit), offset).to(dtype)


class VideoLLMMoDPagedCache(VideoLLMMoDCache):
    r"""
    The cache of one stream in the pages of a pool that it shares with others.

    To the outside a cache as any other, which `generate` takes too; where its pages follow each other, as they do
    while the pool is not fragmented, its keys and values are views of them.

    Args:
        pool ([`VideoLLMMoDPagePool`]): Where its pages are.

    Example:

    ```python
    >>> pool = model.new_page_pool(num_frames=1200, num_text_tokens=4000)   # of all streams together
    >>> cache = VideoLLMMoDPagedCache(pool)
    >>> model.generate(**inputs, cache=cache)
    >>> cache.num_bytes_by_kind
    {'full': 786432, 'routed': 262144}
    >>> cache.release()
    ```"""

    def __init__(self, pool: VideoLLMMoDPagePool) -> None:
        super().__init__(0)
        self.pool = pool
        self.tables = {kind: _PageTable(pool, kind) for kind in pool.num_pages}
        # A cache that is forgotten, a fork's for one, has its pages no longer.
        weakref.finalize(self, _release_all, list(self.tables.values()))
        self.layers = [
            (RoutedPagedLayer if kind < pool.num_tokens else PagedLayer)(pool, layer, self.tables[kind])
            for layer, kind in enumerate(pool.kinds)
        ]

    def reserve(self, num_frames: int, num_text_tokens: int) -> None:
        """
        Takes the pages for so much, before it comes.

        Raises:
            `OutOfPagesError`: If the pool has too few; then none are taken.
        """
        tokens = num_frames * self.pool.num_tokens + num_text_tokens
        self._take({kind: self.pool.num_entries(kind, tokens, num_frames) for kind in self.tables})

    def make_room(self, num_tokens: int, num_frames: int) -> None:
        """
        Takes the pages that so many more tokens need, those of so many frames among them.

        Raises:
            `OutOfPagesError`: If the pool has too few; then none are taken.
        """
        new = {kind: self.pool.num_entries(kind, num_tokens, num_frames) for kind in self.tables}
        self._take({kind: self.length_of(kind) + count for kind, count in new.items()})

    def _take(self, lengths: Mapping[int, int]) -> None:
        before = {kind: len(table.pages) for kind, table in self.tables.items()}
        try:
            for kind, table in self.tables.items():
                table.make_room(lengths[kind])
        except OutOfPagesError:
            for kind, table in self.tables.items():
                table.release(before[kind])
            raise

    def release(self) -> None:
        """Forgets everything and gives the pages back."""
        self.reset()
        for table in self.tables.values():
            table.release()

    def length_of(self, kind: int) -> int:
        """Number of entries in the layers of a kind."""
        return self.layers[self.pool.kinds.index(kind)].length

    def __deepcopy__(self, memo: dict) -> "VideoLLMMoDPagedCache":
        twin = VideoLLMMoDPagedCache(self.pool)  # if it runs out of pages amid this, they come back with it
        for mine, theirs in zip(twin.layers, self.layers, strict=True):
            mine.copy_from(theirs)
        twin.num_seen, twin._log = self.num_seen, list(self._log)
        return twin


__all__ = [
    "CACHE_NAME",
    "OutOfPagesError",
    "VideoLLMMoDCache",
    "VideoLLMMoDPagePool",
    "VideoLLMMoDPagedCache",
    "one_cache",
    "read_pages",
    "read_strip",
    "write_pages",
]
