# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Key/value cache whose layers differ in length: routed layers hold only text and kept frame tokens."""

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any, NamedTuple

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
# Each buffer has this many entries more than its room, because compiled steps round up how many they read.
SPARE_ROOM = 128

# Evictions let positions grow. Beyond this one they start again from 0: a float32 angle there is wrong by up to 2**-9,
# which is as much as bfloat16 rounds.
MAX_OFFSET = 2**16

# The name of attention that reads `grouped_mask`; see `use_grouped_attention`.
_GROUPED = "grouped_sdpa"

# The name of a cache in arguments and outputs of Transformers: `past_key_values` up to 5.23, `cache` since.
CACHE_NAME = next(x.name for x in fields(BaseModelOutputWithPast) if x.name in ("cache", "past_key_values"))


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache given under either name; raise `ValueError` if both are given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Give only `cache`: `past_key_values` is its name up to Transformers 5.23.")
    return past_key_values if cache is None else cache


class TokenRun(NamedTuple):
    """Tokens that stand together in a sequence, for [`~VideoLLMMoDCache.evict`]."""

    num_tokens: int
    num_frames: int = 0  # complete ones among the tokens
    stays: bool = True


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
    A growing layer that can be truncated. Keys and values are (batch, heads, length, dim), in `dtype` if it is given.

    Set `capacity` before the first entry to write entries in place: keys and values are then views of `buffers`
    (room, batch, heads, dim). Full buffers double, up to the capacity if that is enough. Gradients do not work then.
    """

    def __init__(self, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stored_dtype, self.capacity = dtype, None
        self.buffers: list[torch.Tensor] = []

    def make_room(self, new: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers if `new` more entries like these states (batch, heads, any, dim) do not fit."""
        length, old = self.get_seq_length(), (self.keys, self.values)
        room = len(self.buffers[0]) - SPARE_ROOM if self.buffers else 0
        if length + new > room:
            grown = max(2 * room, _FIRST_ROOM, length + new)
            room = min(grown, self.capacity) if length + new <= self.capacity else grown
            shapes = ((room + SPARE_ROOM, *x.shape[:2], x.shape[3]) for x in (key_states, value_states))
            # Attention reads what is not written yet with a weight of 0, and 0 times NaN is NaN.
            with torch.inference_mode(False):  # later steps may run outside of it, and write into them
                options = {"dtype": self.stored_dtype or key_states.dtype, "device": key_states.device}
                self.buffers = [torch.zeros(shape, **options) for shape in shapes]
            self.resize(length)
            for stored, before in zip((self.keys, self.values), old if length else (), strict=False):
                stored.copy_(before)

    def resize(self, length: int) -> None:
        """Let keys and values be the first `length` entries of the buffers."""
        self.keys, self.values = (buffer[:length].permute(1, 2, 0, 3) for buffer in self.buffers)
        self.is_initialized, self.device = True, self.keys.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add entries (batch, heads, new, dim), and return all in the dtype of the new ones."""
        if self.capacity is None:
            stored = (states.to(self.stored_dtype or states.dtype) for states in (key_states, value_states))
            super().update(*stored, *args, **kwargs)
        else:
            length, new = self.get_seq_length(), key_states.shape[2]
            self.make_room(new, key_states, value_states)
            self.resize(length + new)
            self.keys[:, :, length:], self.values[:, :, length:] = key_states, value_states
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
        # Entries are in order, so those to keep are a prefix. If longer rows have been removed, columns in it may be
        # filler in every row.
        kept = ((self.positions >= 0) & (self.positions < position)).any(dim=0)
        return F.pad(kept * torch.arange(1, kept.shape[0] + 1, device=kept.device), (1, 0)).max()  # also if empty


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

    def record_positions(self, positions: torch.Tensor, begin: int) -> None:
        """Append the positions (batch, new) of the next entries, counted from `begin`."""
        self._chunks.append(positions + begin if begin else positions)

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Replace the positions by these, (batch, length)."""
        self.positions = positions

    def truncate(self, length: int) -> None:
        """Keep the first `length` entries."""
        too_many = sum(chunk.shape[1] for chunk in self._chunks) - length
        while self._chunks and too_many > 0:
            chunk = self._chunks.pop()
            if chunk.shape[1] > too_many:
                self._chunks.append(chunk[:, : chunk.shape[1] - too_many])
            too_many -= chunk.shape[1]
        super().truncate(length)


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

    def record_positions(self, positions: torch.Tensor, begin: int | torch.Tensor) -> None:
        """Write the positions (batch, new) of the next entries, counted from `begin`."""
        self._allocate_positions(positions)
        slots = torch.arange(positions.shape[1], device=positions.device) + self.cumulative_length.to(positions.device)
        self.positions.index_copy_(1, slots, positions + begin)

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Replace the positions by these, (batch, length)."""
        self.positions.fill_(-1)
        self.positions[:, : positions.shape[1]] = positions

    def truncate(self, length: int) -> None:
        """Keep the first `length` entries."""
        if self.is_initialized:
            self.positions[:, length:].fill_(-1)
        super().truncate(length)


class RecentFrames:
    """
    The newest frames of each row, for routers that compare frames. All lists have one tensor per row.

    Attributes:
        rows (`list[torch.Tensor]`): Embeddings of the frames of the last forward pass that had any, after the frame
            before them (0 if there was none): `(1 + frames, tokens, hidden)`.
        ends (`list[torch.LongTensor]`): Tokens of the row up to the end of each of these frames, `(frames,)`.
        least (`int` or `torch.Tensor`): Fewest tokens to crop to. With fewer, the last frame would not be among these.
    """

    def __init__(self) -> None:
        self.rows, self.ends, self.least = [], [], 0

    @property
    def last(self) -> torch.Tensor | None:
        """Last frame of the only row, (1, tokens, hidden), or `None` before the first."""
        return self.rows[0][-1:] if self.rows else None

    def add(
        self, frames: torch.Tensor, num_frames: Sequence[int], ends: torch.LongTensor, num_seen: int | torch.Tensor
    ) -> torch.Tensor:
        """
        Remember the frames (all frames, tokens, hidden) that rows see after `num_seen` tokens, and their `ends` (all
        frames,). Returns the frame before each of them, 0 before the first.
        """
        if self.rows:
            before = [row[-1:] for row in self.rows]
            self.least = num_seen.clone() if isinstance(num_seen, torch.Tensor) else num_seen
        else:
            before = [torch.zeros_like(frames[:1])] * len(num_frames)
        self.rows = [torch.cat(pair) for pair in zip(before, frames.split(num_frames), strict=True)]
        self.ends = list(ends.split(num_frames))
        previous = [row[:-1] for row in self.rows]
        return previous[0] if len(previous) == 1 else torch.cat(previous)

    def check_crop(self, length: int) -> None:
        """Raise `ValueError` if the last frame of `length` tokens is unknown."""
        if 0 < length < int(self.least):
            raise ValueError(
                f"Cannot crop to {length} tokens: the router compares frames, and the cache remembers only the last "
                f"ones. Crop to at least {int(self.least)} tokens, or reset the cache."
            )

    def crop(self, length: int, num_frames: int | None) -> None:
        """Forget frames that end after `length` tokens: `num_frames` in each row, if it is known."""
        gone = [int((ends > length).sum()) if num_frames is None else num_frames for ends in self.ends]
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, gone, strict=True)]
        self.ends = [ends[: len(ends) - count] for ends, count in zip(self.ends, gone, strict=True)]

    def evict(self, runs: Sequence[TokenRun]) -> None:
        """Count ends without the tokens that go. An evicted frame stays the one before the next."""
        begins = accumulate((run.num_tokens for run in runs), initial=0)
        kept = [(begin, run.num_tokens) for begin, run in zip(begins, runs, strict=False) if run.stays] or [(0, 0)]
        self.least = sum(min(max(int(self.least) - begin, 0), size) for begin, size in kept)
        for ends in self.ends[:1]:  # of the only row
            begins, sizes = to_device(torch.tensor(kept), ends.device).unbind(1)
            self.ends = [(ends[:, None] - begins).clamp(min=0).minimum(sizes).sum(dim=1)]

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, repeat or select rows."""
        if self.rows:
            order = function(torch.arange(len(self.rows), device=self.rows[0].device)).tolist()
            self.rows, self.ends = [self.rows[i] for i in order], [self.ends[i] for i in order]


class VideoLLMMoDCache(Cache):
    r"""
    Key/value cache of a routed language model.

    A full layer holds every token; a routed layer holds text and the frame tokens that it kept, with their positions
    in the full sequence.

    Args:
        num_layers (`int`): Number of decoder layers.
        routed_layers (`Mapping[int, int]`, *optional*): For each routed layer, how many tokens of a frame it skips.
        max_lengths (`Sequence[int]`, *optional*): Entries to preallocate in each layer. By default layers grow.
        offloading (`bool`, *optional*, defaults to `False`): Whether layers stay on the CPU between uses.
        dtype (`torch.dtype`, *optional*): Floating point dtype of what growing layers store, such as
            `torch.float8_e4m3fn`; each step converts what it reads. Defaults to the model's.

    Example:

    ```python
    >>> cache = VideoLLMMoDCache(num_layers=4, routed_layers={1: 8, 3: 8})
    >>> model(**inputs, cache=cache)       # 2 frames of 10 tokens, 2 kept in a routed layer, 5 text tokens
    >>> cache.get_seq_length(), cache.lengths
    (25, [25, 9, 25, 9])
    ```"""

    def __init__(
        self,
        num_layers: int,
        routed_layers: Mapping[int, int] | None = None,
        *,
        max_lengths: Sequence[int] | None = None,
        offloading: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_cache_dtype(dtype)
        if dtype is not None and max_lengths is not None:
            raise ValueError("`dtype` needs layers that grow: leave `max_lengths` out, or use a paged cache.")
        if max_lengths is not None and len(max_lengths) != num_layers:
            raise ValueError(f"`max_lengths` has {len(max_lengths)} lengths for {num_layers} layers: give one each.")
        self.skipped = [(routed_layers or {}).get(layer, 0) for layer in range(num_layers)]
        if max_lengths is None:
            kinds = (VideoLLMMoDDynamicLayer, RoutedDynamicLayer)
            layers = [kinds[count > 0](dtype=dtype) for count in self.skipped]
        else:
            kinds = (VideoLLMMoDStaticLayer, RoutedStaticLayer)
            layers = [kinds[n > 0](length) for n, length in zip(self.skipped, max_lengths, strict=True)]
        super().__init__(layers=layers, offloading=offloading)
        # A tensor for static layers, so that a compiled step does not specialise on its value.
        self.num_seen: int | torch.Tensor = 0 if max_lengths is None else torch.tensor(0)
        # Evictions leave later keys as they are: the rotary position of a token is its place plus this offset.
        self.position_offset: int | torch.Tensor = 0 if max_lengths is None else torch.tensor(0)
        # For each group of layers, how far evictions have moved the first keys, (entries,) on the host, and these keys
        # as they were before, (layers, heads, entries, dim). Each move starts from there: roundings do not add up.
        self._moved: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self.has_filler = False  # in a routed layer: attention must mask it
        self.is_grouped = False  # whether attention reads `grouped_mask`; see `use_grouped_attention`
        self.recent_frames = RecentFrames()
        # For each forward pass: its first token, its number of tokens, and which of them are inside a frame.
        self._log: list[tuple[int | torch.Tensor, int, torch.Tensor | None]] = []

    @property
    def lengths(self) -> list[int]:
        """Number of entries each layer holds."""
        return [int(layer.get_seq_length()) for layer in self.layers]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, including preallocated ones and those that evictions have set aside."""
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
        for (skipped, *_), (_, keys) in self._moved.items():
            kinds["routed" if skipped else "full"] += keys.nbytes
        return kinds

    @property
    def next_position(self) -> int | torch.Tensor:
        """Rotary position of the next token."""
        return self.num_seen + self.position_offset

    def get_seq_length(self, layer_idx: int | None = None) -> int | torch.Tensor:
        """Return the number of tokens seen, or with `layer_idx` the number of entries in that layer."""
        return self.num_seen if layer_idx is None else self.layers[layer_idx].get_seq_length()

    def record_positions(
        self, layer_idx: int, positions: torch.Tensor, begin: int | torch.Tensor = 0, *, has_filler: bool = False
    ) -> None:
        """
        Record the positions (batch, new) of the next entries of routed layer `layer_idx`, counted from `begin`.

        With `has_filler` they are counted from 0, and -1 means filler.
        """
        self.layers[layer_idx].record_positions(positions, begin)
        self.has_filler = self.has_filler or has_filler

    def get_positions(self, layer_idx: int) -> torch.Tensor | None:
        """Return the positions of routed layer `layer_idx`: (batch, length), -1 for filler; `None` if empty."""
        return self.layers[layer_idx].positions

    def remember_frames(
        self, frames: torch.Tensor, num_frames: Sequence[int], ends: torch.LongTensor, num_seen: int | torch.Tensor
    ) -> torch.Tensor:
        """Return the frame before each of `frames`; see [`RecentFrames.add`]."""
        return self.recent_frames.add(frames, num_frames, ends, num_seen)

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

    def crop(self, tokens_to_remove: int, *, num_frames: int | None = None) -> None:
        """
        Remove the last `-tokens_to_remove` tokens of the full sequence from every layer. For one row, `num_frames` may
        say how many complete frames they include; otherwise this waits for the device to count entries.

        Raises:
            `ValueError`: If a number is out of range, or part of a frame would stay: frames are kept as a unit.
        """
        num_seen = int(self.num_seen)
        length = num_seen + tokens_to_remove
        if tokens_to_remove > 0 or length < 0:
            raise ValueError(f"`tokens_to_remove` is {tokens_to_remove}; it must be negative, at least {-num_seen}.")
        if tokens_to_remove == 0:
            return
        self.recent_frames.check_crop(length)
        if num_frames is None:
            self._refuse_torn_frame(length)
            lengths = self._count_before(length)
        else:
            changes = [tokens_to_remove + num_frames * skipped for skipped in self.skipped]
            lengths = [max(before + change, 0) for before, change in zip(self.lengths, changes, strict=True)]
            if max(changes) > 0:
                raise ValueError(f"The last {-tokens_to_remove} tokens cannot include {num_frames} frames.")
        for layer, count in zip(self.layers, lengths, strict=True):
            layer.truncate(count)
            positions = getattr(layer, "positions", None) if num_frames is None else None
            if positions is not None and positions.shape[0] > 1:
                # Rows that end before the longest row get filler.
                layer.replace_positions(positions.masked_fill(positions >= length, -1))
                self.has_filler = True
        for group, (by, keys) in self._moved.items():
            count = lengths[self.skipped.index(group[0])]
            self._moved[group] = by[:count], keys[:, :, :count]
        log = [(begin, min(count, length - int(begin)), inside) for begin, count, inside in self._log]
        self._log = [(begin, n, None if x is None else x[:, :n]) for begin, n, x in log if n > 0]
        self.recent_frames.crop(length, num_frames)
        if length == 0:
            self.recent_frames = RecentFrames()
        self._set("num_seen", length)

    def _count_before(self, position: int) -> list[int]:
        """Return each layer's number of entries before `position` in the full sequence, in the row that has most."""
        routed = [layer for layer in self.layers if isinstance(layer, PositionsMixin) and layer.positions is not None]
        counts = torch.stack([layer.count_before(position) for layer in routed]).tolist() if routed else []
        known = dict(zip(map(id, routed), counts, strict=True))
        return [known.get(id(layer), position) for layer in self.layers]

    def evict(self, runs: Sequence[TokenRun], rotation: "KeyRotation | None" = None) -> None:
        """
        Remove tokens anywhere in the full sequence from every layer, without waiting for the device. Later keys stay
        as they are, and earlier keys move towards them. New tokens follow at `next_position`.

        Args:
            runs (`Sequence[TokenRun]`): The full sequence, in order. All or none of a frame may stay. Later crops must
                not end within a run that includes frames, unless they give `num_frames`.
            rotation ([`KeyRotation`], *optional*): Moves keys. Leave it out if keys have no positions.

        Raises:
            `ValueError`: If the cache has several rows, or `runs` do not have as many tokens and frames as the cache.
        """
        self._check_runs(runs)
        gone = sum(run.num_tokens for run in runs if not run.stays)
        offset = int(self.position_offset) + gone
        back = offset if offset > MAX_OFFSET else 0
        groups: dict[tuple, list[Any]] = defaultdict(list)
        for index, layer in enumerate(self.layers):
            if layer.is_initialized:
                if self.offloading:
                    layer.prefetch()
                is_rotated = rotation is not None and index in rotation.layers
                groups[self.skipped[index], is_rotated, layer.device].append(layer)
        for group, layers in groups.items():
            self._evict_from(group, layers, _find_parts(runs, group[0], back), back, rotation)
        kept = [run for run in runs if run.stays]
        inside = {count: torch.arange(count)[None] < count - 1 for count in {run.num_tokens for run in kept}}
        places = accumulate((run.num_tokens for run in kept), initial=0)
        self._log = [(p, n, inside[n] if frames else None) for p, (n, frames, _) in zip(places, kept, strict=False)]
        self._set("num_seen", int(self.num_seen) - gone)
        self.recent_frames.evict(runs)
        self._set("position_offset", offset - back)

    def _check_runs(self, runs: Sequence[TokenRun]) -> None:
        num_tokens, num_frames = sum(run.num_tokens for run in runs), sum(run.num_frames for run in runs)
        if num_tokens != int(self.num_seen):
            raise ValueError(f"`runs` have {num_tokens} tokens; the cache has seen {int(self.num_seen)}.")
        for index, (layer, skipped) in enumerate(zip(self.layers, self.skipped, strict=True)):
            length, expected = layer.get_seq_length(), num_tokens - num_frames * skipped
            # The length of a static layer is on the device.
            if layer.is_initialized and isinstance(length, int) and length != expected:
                raise ValueError(f"`runs` have {expected} entries in layer {index}; the cache has {length}.")

    def _evict_from(
        self, group: tuple, layers: list[Any], parts: list["_Part"], back: int, rotation: "KeyRotation | None"
    ) -> None:
        """Remove all entries except `parts` from the layers of a group, and move keys, all of them `back`."""
        (skipped, is_rotated, device), begin, moved = group, 0, [()] * len(layers)
        all_keys = deque(layer.keys for layer in layers)  # each is a copy if its pages are scattered
        if (num_rows := all_keys[0].shape[0]) > 1:
            raise ValueError(f"Eviction works on caches of one row; this one has {num_rows}.")
        if is_rotated:
            begin, keys = self._move_first(group, all_keys, parts, back, rotation)
            moved = [(x,) for x in keys.split(1)]
        if skipped:
            # In one launch each for all layers. They lie on the device of the embeddings, wherever the layers are.
            known = torch.cat([layer.positions[:, : parts[-1].end] for layer in layers])
            shift = to_device(torch.cat([torch.full((x.end - x.begin,), x.removed) for x in parts]), known.device)
            positions = torch.cat([known[:, x.begin : x.end] for x in parts], dim=1) - shift
        for index, (layer, first) in enumerate(zip(layers, moved, strict=True)):
            old_keys, old_values = all_keys.popleft(), layer.values
            keys = [old_keys[:, :, max(x.begin, begin) : x.end] for x in parts if x.end >= begin]
            if back and is_rotated:
                keys = [rotation(x, to_device(torch.tensor([-back]), device)).to(x.dtype) for x in keys]
            values = [old_values[:, :, x.begin : x.end] for x in parts]
            layer.replace(torch.cat([*first, *keys], dim=2), torch.cat(values, dim=2))
            if skipped:
                layer.replace_positions(positions[index, None])

    def _move_first(
        self, group: tuple, keys: Sequence[torch.Tensor], parts: list["_Part"], back: int, rotation: "KeyRotation"
    ) -> tuple[int, torch.Tensor]:
        """Return how many of the old entries move, and the moved keys (layers, heads, entries, dim) that stay."""
        by, unmoved = self._moved.get(group, (torch.zeros(0, dtype=torch.long), None))
        known, last = len(by), parts[-1]
        # Keys after the last removed token stay as they are.
        end = max(known, last.begin if last.by == -back else last.end)
        first = [x._replace(end=min(x.end, end)) for x in parts if x.begin < end]
        old = F.pad(by, (0, end - known))
        by = torch.cat([by[:0], *(old[x.begin : x.end] + x.by for x in first)])
        stays = [unmoved[:, :, x.begin : min(x.end, known)] for x in first if x.begin < known]
        if known < end or not stays:
            new = [slice(max(x.begin, known), x.end) for x in first if x.end > known] or [slice(0)]
            stays += [torch.cat([layer[:, :, x] for layer in keys]) for x in new]
        unmoved = torch.cat(stays, dim=2)
        self._moved[group] = by, unmoved
        return end, rotation(unmoved, to_device(by, group[-1])).to(unmoved.dtype)

    def _set(self, name: str, count: int) -> None:
        before = getattr(self, name)
        setattr(self, name, before.fill_(count) if isinstance(before, torch.Tensor) else count)

    def _refuse_torn_frame(self, length: int) -> None:
        """Raise `ValueError` if a crop to `length` tokens would leave part of a frame, or if the log cannot tell."""
        begin, num_tokens, inside_frame = next((x for x in reversed(self._log) if int(x[0]) < length), (0, 0, None))
        kept = length - int(begin)
        if kept < num_tokens and inside_frame is not None and bool(inside_frame[:, kept - 1].any()):
            raise ValueError(f"A crop to {length} tokens would leave part of a frame: crop at its end or in text.")
        if kept > num_tokens:
            later = [int(entry[0]) for entry in self._log if int(entry[0]) >= length]
            known = [int(begin) + num_tokens, *later[:1]]
            if length not in known:
                raise ValueError(
                    f"Cannot crop to {length} tokens: compiled steps after token {known[0]} keep no record of frames. "
                    f"Crop to {' or '.join(map(str, known))} tokens."
                )

    def reset(self) -> None:
        """Empty all layers."""
        super().reset()
        self._set("num_seen", 0)
        self._set("position_offset", 0)
        self.has_filler, self._log, self._moved, self.recent_frames = False, [], {}, RecentFrames()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            if layer.is_initialized and layer.keys.numel() > 0:
                layer.keys, layer.values, layer.buffers = function(layer.keys), function(layer.values), []
                if isinstance(layer, StaticLayer):
                    layer.batch_size = layer.keys.shape[0]
            if isinstance(layer, PositionsMixin) and layer.positions is not None:
                layer.positions = function(layer.positions)
        self._log = [(*entry, None if inside is None else function(inside)) for *entry, inside in self._log]
        self.recent_frames.map_rows(function)


class _Part(NamedTuple):
    """Entries that stay, from `begin` to `end`."""

    begin: int
    end: int
    removed: int  # tokens removed before them
    by: int  # by how many positions their keys move


def _find_parts(runs: Sequence[TokenRun], skipped: int, back: int) -> list[_Part]:
    """Return what stays in a layer that skips so many tokens of each frame, if all keys also move `back`."""
    parts, begin, removed = [_Part(0, 0, 0, 0)], 0, 0
    for run in runs:
        end = begin + run.num_tokens - run.num_frames * skipped
        if not run.stays:
            removed += run.num_tokens
        elif parts[-1].removed == removed:
            parts[-1] = parts[-1]._replace(end=end)
        else:
            parts.append(_Part(begin, end, removed, 0))
        begin = end
    return [x._replace(by=removed - x.removed - back) for x in parts if x.end > x.begin] or parts[:1]


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy numbers of the host to a device, on CUDA asynchronously: torch reuses pinned memory only after the copy."""
    is_cuda = device.type == "cuda"
    return (numbers.pin_memory() if is_cuda else numbers).to(device, non_blocking=is_cuda)


class KeyRotation:
    """
    Moves rotated keys of a language model to other positions; see [`~VideoLLMMoDCache.evict`].

    Attributes:
        layers (`set[int]`): Indices of the layers that rotate keys.

    Raises:
        `ValueError`: If the rotation depends on the length of the sequence.
    """

    def __init__(self, language_model: Any) -> None:
        check_rotation(language_model.config)
        self.rotary = language_model.rotary_emb
        self.layers = {i for i, x in enumerate(language_model.layers) if getattr(x.self_attn, "use_rope", True)}
        self._apply = sys.modules[type(language_model).__module__].apply_rotary_pos_emb

    def __call__(self, keys: torch.Tensor, by: torch.LongTensor) -> torch.Tensor:
        """Return keys (layers, heads, length, dim) in float32, `by` (length,) or (1,) positions later."""
        exact, scaling = keys.float(), getattr(self.rotary, "attention_scaling", 1.0)
        cos, sin = (x.to(keys.device) / scaling for x in self.rotary(exact, by[None]))
        return self._apply(exact[:, :0], exact, cos, sin)[1]


def check_rotation(text_config: Any) -> None:
    """Raise `ValueError` if keys cannot move, since their rotation depends on the length of the sequence."""
    kind = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type")
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"Tokens cannot be evicted, so leave `max_frames` out: rotary positions of type {kind!r} depend on the "
            "length of the sequence."
        )


def check_cache_dtype(dtype: torch.dtype | None) -> None:
    """Raise `ValueError` if keys and values cannot be stored in a dtype: whole numbers would lose nearly all."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"Keys and values cannot be stored as {dtype}: in eight bits, use `torch.float8_e4m3fn`.")


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
    config = language_model.config
    name = config._attn_implementation
    if name.endswith("sdpa") and not name.endswith(_GROUPED):
        own = f"{name.removesuffix('sdpa')}{_GROUPED}"
        if own != _GROUPED:  # an engine has put its own function, and a prefix, in front
            AttentionInterface.register(own, ALL_ATTENTION_FUNCTIONS[name])
            AttentionMaskInterface.register(own, AttentionMaskInterface()["sdpa"])
        config._attn_implementation = own
    return config._attn_implementation.endswith(_GROUPED)


# The configuration of a model that was pickled may name it in another process.
AttentionInterface.register(_GROUPED, grouped_attention_forward)
AttentionMaskInterface.register(_GROUPED, AttentionMaskInterface()["sdpa"])
__all__ = ["CACHE_NAME", "KeyRotation", "TokenRun", "VideoLLMMoDCache", "check_cache_dtype", "check_rotation"]
__all__ += ["one_cache", "to_device", "use_grouped_attention"]
