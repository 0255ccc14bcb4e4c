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
"""Memory of the caches of many streams: pages, taken and given back."""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..cache_videollm_mod import PositionsMixin, VideoLLMMoDCache


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
                "`model.new_cache()`, for many streams `StreamingEngine(model, processor)`."
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


class RoutedPagedLayer(PositionsMixin, PagedLayer):
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
    >>> pool = new_page_pool(model, num_frames=1200, num_text_tokens=4000)   # of all streams together
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


def new_page_pool(
    model: Any,
    num_frames: int,
    num_text_tokens: int,
    *,
    page_size: int = 256,
    dtype: torch.dtype | None = None,
) -> VideoLLMMoDPagePool:
    """
    Memory for the caches of many streams of a model.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        num_frames (`int`): Frames that all streams together can remember.
        num_text_tokens (`int`): Tokens of text, separators of frames included, that all can remember.
        page_size (`int`, *optional*, defaults to 256): Entries of a page. Kernels may want a multiple of 256.
        dtype (`torch.dtype`, *optional*): That of what is stored; see [`VideoLLMMoDPagePool`].
    """
    num_tokens = model.config.frame_num_tokens
    kinds = [min(count, num_tokens) for count in model.config.layer_keep_counts]
    pages = {kind: -(-(num_frames * kind + num_text_tokens) // page_size) for kind in sorted(set(kinds))}
    return VideoLLMMoDPagePool(kinds, pages, num_tokens, page_size=page_size, dtype=dtype)


__all__ = [
    "OutOfPagesError",
    "VideoLLMMoDPagePool",
    "VideoLLMMoDPagedCache",
    "new_page_pool",
    "read_pages",
    "read_strip",
    "write_pages",
]
