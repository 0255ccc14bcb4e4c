# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Memory for the caches of many streams: a pool of pages, and one stream's cache in it."""

import copy
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..cache_videollm_mod import PositionsMixin, VideoLLMMoDCache, check_cache_dtype, to_device


class OutOfPagesError(RuntimeError):
    """The pool has too few free pages for a stream."""


class VideoLLMMoDPagePool:
    """
    Memory for the caches of many streams, allocated once and divided into pages of entries.

    Layers of one *kind* keep the same number of tokens per frame, so they always have the same length. A stream's
    pages therefore have the same indices in all layers of a kind. The host knows every length, so growing a cache
    never waits for the device.

    Args:
        kinds (`Sequence[int]`): For each layer, the number of tokens that it keeps per frame.
        num_pages (`Mapping[int, int]`): For each kind, the number of pages to allocate in each of its layers.
        num_tokens (`int`): Tokens per frame; layers that keep fewer are routed.
        page_size (`int`, *optional*, defaults to 256): Entries per page.
        dtype (`torch.dtype`, *optional*): Dtype of stored keys and values, by default the model's. An 8-bit float
            halves the memory, and each step converts what it reads.

    Raises:
        `ValueError`: If `dtype` is not of floating point.
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
        check_cache_dtype(dtype)
        self.kinds = list(kinds)
        self.num_pages = dict(num_pages)
        self.num_tokens = num_tokens
        self.page_size = page_size
        self.dtype = dtype
        self._free = {kind: list(range(count)) for kind, count in num_pages.items()}
        self._returned: deque[tuple[int, Sequence[int]]] = deque()
        self.layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None] = [None] * len(self.kinds)
        self.compute_dtypes: dict[int, torch.dtype] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all allocated pages."""
        return sum(x.numel() * x.element_size() for pages in self.layers if pages for x in pages[:2])

    def num_entries(self, kind: int, num_tokens: int, num_frames: int) -> int:
        """Return how many of `num_tokens` tokens, including `num_frames` frames, enter the layers of a kind."""
        return num_tokens - num_frames * (self.num_tokens - kind)

    def take(self, kind: int, count: int, after: int | None = None) -> list[int]:
        """
        Take pages from the free ones, consecutive ones if possible, and best those that follow page `after`.

        Raises:
            `OutOfPagesError`: If fewer than `count` pages are free.
        """
        free = self.free[kind]
        if count > len(free):
            raise OutOfPagesError(
                f"Layers that keep {kind} of {self.num_tokens} tokens per frame need {count} pages of "
                f"{self.page_size} entries; {len(free)} of {self.num_pages[kind]} are free."
            )
        runs = [i for i in range(len(free) - count + 1) if free[i + count - 1] - free[i] == count - 1]
        following = [i for i in runs if after is not None and free[i] == after + 1]
        first = (following or runs or [0])[0]
        taken = free[first : first + count]
        del free[first : first + count]
        return taken

    def give_back(self, kind: int, pages: Sequence[int]) -> None:
        """Make pages free again."""
        self._returned.append((kind, pages))

    @property
    def free(self) -> dict[int, list[int]]:
        """For each kind, the sorted free pages."""
        # Garbage collection can return pages at any moment, in any thread. They are merged here.
        while self._returned:
            kind, pages = self._returned.popleft()
            self._free[kind] = sorted([*self._free[kind], *pages])
        return self._free

    def pages_of(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Return a layer's keys and values, (pages, page size, heads, dim), and positions if it is routed. Pages that do
        not exist yet are allocated for keys `like`, (batch, heads, any, dim).
        """
        if self.layers[layer] is None:
            self.allocate(layer, like.shape[1], like.shape[3], like.dtype, like.device)
        return self.layers[layer]

    def allocate(self, layer: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the pages of a layer with keys and values (batch, heads, any, dim) of this dtype."""
        kind = self.kinds[layer]
        shape = (self.num_pages[kind], self.page_size, heads, dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype or dtype, device=device) for _ in range(2))
        self.compute_dtypes[layer] = dtype
        is_routed = kind < self.num_tokens
        positions = torch.zeros(shape[:2], dtype=torch.long, device=device) if is_routed else None
        self.layers[layer] = (keys, values, positions)


def new_page_pool(
    model: Any,
    num_frames: int,
    num_text_tokens: int,
    *,
    page_size: int = 256,
    dtype: torch.dtype | None = None,
) -> VideoLLMMoDPagePool:
    """
    Return a pool for the caches of many streams of a model.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        num_frames (`int`): Frames that all streams together can remember.
        num_text_tokens (`int`): Text tokens, including frame separators, that all streams together can remember.
        page_size (`int`, *optional*, defaults to 256): Entries per page. Some kernels require a multiple of 256.
        dtype (`torch.dtype`, *optional*): Dtype of what is stored; see [`VideoLLMMoDPagePool`].
    """
    num_tokens = model.config.frame_num_tokens
    kinds = [min(count, num_tokens) for count in model.config.layer_keep_counts]
    pages = {kind: -(-(num_frames * kind + num_text_tokens) // page_size) for kind in sorted(set(kinds))}
    return VideoLLMMoDPagePool(kinds, pages, num_tokens, page_size=page_size, dtype=dtype)


def strip_of(pages: Sequence[int], page_size: int) -> int | None:
    """Return the slot of the first entry if the pages are consecutive, else `None`."""
    first = pages[0] if pages else 0
    is_strip = list(pages) == list(range(first, first + len(pages)))
    return first * page_size if is_strip else None


def write_pages(pages: torch.Tensor, slots: torch.LongTensor, entries: torch.Tensor) -> None:
    """Write entries (new, ...) into pages (pages, page size, ...) at slots (new,) of the flattened pages."""
    flat, entries = pages.flatten(0, 1), entries.to(pages.device, pages.dtype)
    if pages.dtype.itemsize == 1:
        # Not every device can index eight-bit floats. All can index bytes.
        flat, entries = flat.view(torch.uint8), entries.view(torch.uint8)
    flat.index_copy_(0, slots, entries)


def read_pages(pages: torch.Tensor, table: torch.LongTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return pages (pages, ...) by index, converted to a dtype."""
    stored = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages
    return stored[table].view(pages.dtype).to(dtype)


def read_strip(pages: torch.Tensor, begin: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return consecutive entries of pages (pages, page size, heads, dim) as (1, heads, length, dim), in a dtype."""
    _, _, heads, dim = pages.shape
    page, row, head, unit = pages.stride()
    offset = pages.storage_offset() + begin * row
    return pages.as_strided((1, heads, length, dim), (page, head, row, unit), offset).to(dtype)


class _PageTable:
    """One stream's pages in the layers of one kind."""

    def __init__(self, pool: VideoLLMMoDPagePool, kind: int) -> None:
        self.pool, self.kind = pool, kind
        self.pages: list[int] = []
        self._slots: tuple[int, int, torch.Tensor] | None = None

    def make_room(self, length: int) -> None:
        """Take the pages that are missing for `length` entries."""
        missing = -(-length // self.pool.page_size) - len(self.pages)
        if missing > 0:
            self.pages += self.pool.take(self.kind, missing, self.pages[-1] if self.pages else None)

    def release(self, kept: int = 0) -> None:
        """Give back all pages except the first `kept`."""
        gone, self.pages[kept:] = self.pages[kept:], []
        self._slots = None
        self.pool.give_back(self.kind, gone)

    @property
    def strip(self) -> int | None:
        """Slot of the first entry if the pages are consecutive, else `None`."""
        return strip_of(self.pages, self.pool.page_size)

    def slots(self, begin: int, end: int, device: torch.device) -> torch.LongTensor:
        """Return the slots of entries `begin` to `end` in the flattened pages."""
        # All layers of the kind ask for the same slots, or the first of them, one after another.
        known = self._slots
        if known is None or not known[0] <= begin <= end <= known[1] or known[2].device != device:
            size, strip = self.pool.page_size, self.strip
            if strip is not None:
                slots = torch.arange(strip + begin, strip + end, device=device)
            else:
                slots = [self.pages[i // size] * size + i % size for i in range(begin, end)]
                slots = to_device(torch.tensor(slots, dtype=torch.long), device)
            self._slots = known = (begin, end, slots)
        return known[2][begin - known[0] : end - known[0]]


def _release_all(tables: Sequence[_PageTable]) -> None:
    for table in tables:
        table.release()


class PagedLayer(CacheLayerMixin):
    """A layer of one stream in the pages of a pool. Growing it copies nothing and waits for nothing."""

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
        """Bytes of its pages, including partly filled ones."""
        if not self.is_initialized:
            return 0
        keys, values, _ = self.pool.layers[self.layer]
        return len(self.table.pages) * sum(x[0].numel() * x.element_size() for x in (keys, values))

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys (1, heads, length, dim), a view if the pages are consecutive."""
        return self._read(0)

    @property
    def values(self) -> torch.Tensor | None:
        """Values (1, heads, length, dim), a view if the pages are consecutive."""
        return self._read(1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:  # noqa: ARG002
        """Allocate the pool's pages of this layer, unless another stream has done so."""
        self.pool.pages_of(self.layer, key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """Add entries (1, heads, new, dim) and return all."""
        if key_states.shape[0] != 1:
            raise ValueError(
                f"A paged cache holds one stream, got {key_states.shape[0]} rows. For a batch or beams use "
                "`model.new_cache()`, for many streams `StreamingEngine(model, processor)`."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(self.length, key_states, value_states)
        self.length += key_states.shape[2]
        return self.keys, self.values

    def extend(self, count: int) -> None:
        """Count entries that a step of several streams has written into the pages."""
        self.length += count
        pages = self.pool.layers[self.layer]
        if pages is not None and not self.is_initialized:
            self.dtype, self.device, self.is_initialized = self.pool.compute_dtypes[self.layer], pages[0].device, True

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all entries by these."""
        self._write(0, keys, values)
        self.length = keys.shape[2]

    def truncate(self, length: int) -> None:
        """Keep the first `length` entries."""
        self.length = min(self.length, length)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` entries."""
        self.truncate(self.length + tokens_to_remove)

    def get_seq_length(self) -> int:
        """Return the number of entries."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: the layer takes pages as it grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of entries including `query_length` new ones, and the offset of the first."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Empty the layer; it keeps its pages."""
        self.length = 0

    def copy_from(self, other: "PagedLayer") -> None:
        """Copy the entries of the same layer of another stream."""
        if other.is_initialized:
            self.lazy_initialization(other.keys, other.values)
            # The views lie in the memory that is written to.
            self.replace(other.keys.clone(), other.values.clone())

    def _read(self, which: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        pages = self.pool.layers[self.layer][which]
        strip = self.table.strip
        if strip is not None:
            return read_strip(pages, strip, self.length, self.dtype)
        table = to_device(torch.tensor(self.table.pages), pages.device)
        return read_pages(pages, table, self.dtype).flatten(0, 1)[: self.length].transpose(0, 1)[None]

    def _write(self, begin: int, keys: torch.Tensor, values: torch.Tensor, *more: torch.Tensor) -> None:
        end = begin + keys.shape[2]
        self.table.make_room(end)
        slots = self.table.slots(begin, end, keys.device)
        new = (keys[0].transpose(0, 1), values[0].transpose(0, 1), *more)
        for pages, entries in zip(self.pool.layers[self.layer], new, strict=False):
            write_pages(pages, slots, entries)


class RoutedPagedLayer(PositionsMixin, PagedLayer):
    """A layer of one stream that holds text and kept frame tokens."""

    @property
    def positions(self) -> torch.Tensor | None:
        """Index of each entry in the full sequence, (1, length), or `None` before the first entry."""
        if not self.is_initialized:
            return self._early
        pages = self.pool.layers[self.layer][2].flatten()
        known = pages[self.table.slots(0, self.length, pages.device)][None]
        return known if self._early is None else torch.cat([known, self._early.to(known.device)], dim=1)

    @positions.setter
    def positions(self, positions: torch.Tensor | None) -> None:
        self._early = positions  # `None` when the layer is emptied

    def record_positions(self, positions: torch.Tensor, begin: int) -> None:
        """Remember the positions (1, new), counted from `begin`, of the entries that come next."""
        self._early = positions + begin

    def replace_positions(self, positions: torch.Tensor) -> None:
        """Replace all positions by these, (1, length)."""
        pages = self.pool.layers[self.layer][2]
        write_pages(pages, self.table.slots(0, positions.shape[1], pages.device), positions[0])

    def copy_from(self, other: "RoutedPagedLayer") -> None:
        """Copy the entries of the same layer of another stream."""
        super().copy_from(other)
        if other.is_initialized:
            self.replace_positions(other.positions)

    def _write(self, begin: int, keys: torch.Tensor, values: torch.Tensor, *more: torch.Tensor) -> None:
        super()._write(begin, keys, values, *more, *(() if self._early is None else (self._early[0],)))
        self._early = None


class VideoLLMMoDPagedCache(VideoLLMMoDCache):
    r"""
    The cache of one stream in the pages of a pool that it shares with others.

    It works like any other cache, also in `generate`. While its pages are consecutive, which they are until the pool
    is fragmented, its keys and values are views of them.

    Args:
        pool ([`VideoLLMMoDPagePool`]): The pool of its pages.

    Example:

    ```python
    >>> pool = new_page_pool(model, num_frames=1200, num_text_tokens=4000)   # for all streams together
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
        self._most_pages: dict[int, int] | None = None  # that `make_room` takes
        # A cache that is garbage-collected, such as a fork's, gives its pages back.
        weakref.finalize(self, _release_all, list(self.tables.values()))
        self.skipped = [pool.num_tokens - kind for kind in pool.kinds]
        self.layers = [
            (RoutedPagedLayer if kind < pool.num_tokens else PagedLayer)(pool, layer, self.tables[kind])
            for layer, kind in enumerate(pool.kinds)
        ]

    def reserve(self, num_frames: int, num_text_tokens: int) -> None:
        """
        Take the pages for this many frames and text tokens in advance. The cache may grow to twice as many pages, so
        that one stream does not take the memory of all others.

        Raises:
            `OutOfPagesError`: If the pool has too few free pages. The cache then takes none.
        """
        tokens = num_frames * self.pool.num_tokens + num_text_tokens
        self._take({kind: self.pool.num_entries(kind, tokens, num_frames) for kind in self.tables})
        self._most_pages = {kind: 2 * len(table.pages) for kind, table in self.tables.items()}

    def make_room(self, num_tokens: int, num_frames: int) -> None:
        """
        Take the pages for `num_tokens` more tokens, including those of `num_frames` frames.

        Raises:
            `OutOfPagesError`: If the pool has too few free pages, or the cache would have more than twice the pages
                that it has reserved. It then takes none.
        """
        new = {kind: self.pool.num_entries(kind, num_tokens, num_frames) for kind in self.tables}
        lengths = {kind: self.length_of(kind) + count for kind, count in new.items()}
        for kind, most in (self._most_pages or {}).items():
            if lengths[kind] > most * self.pool.page_size:
                raise OutOfPagesError(
                    f"Layers that keep {kind} of {self.pool.num_tokens} tokens per frame need room for "
                    f"{lengths[kind]} entries; a stream has at most {most} pages of {self.pool.page_size}, twice "
                    "what it has reserved."
                )
        self._take(lengths)

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
        """Empty the cache and give all pages back."""
        self.reset()
        for table in self.tables.values():
            table.release()

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Refuse to reorder, repeat or select rows unless one row stays: the cache holds one stream."""
        rows = len(function(torch.zeros(1)))
        if rows != 1:
            raise ValueError(f"A paged cache holds one stream and cannot have {rows} rows: use `model.new_cache()`.")

    def length_of(self, kind: int) -> int:
        """Return the number of entries in the layers of a kind."""
        return self.layers[self.pool.kinds.index(kind)].length

    def __deepcopy__(self, memo: dict) -> "VideoLLMMoDPagedCache":
        twin = VideoLLMMoDPagedCache(self.pool)  # if copying runs out of pages, the twin's come back with it
        for mine, theirs in zip(twin.layers, self.layers, strict=True):
            mine.copy_from(theirs)
        twin.num_seen, twin._log = self.num_seen, list(self._log)
        twin.position_offset, twin._moved = self.position_offset, dict(self._moved)
        twin.recent_frames = copy.copy(self.recent_frames)  # its lists and tensors are replaced, never changed
        return twin


__all__ = [
    "OutOfPagesError",
    "VideoLLMMoDPagePool",
    "VideoLLMMoDPagedCache",
    "new_page_pool",
    "read_pages",
    "read_strip",
    "strip_of",
    "write_pages",
]
