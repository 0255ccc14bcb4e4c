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
"""Attention of several streams at once, each over its own pages, by the best kernel that is installed."""

import copy
import importlib
import importlib.util
import inspect
import sys
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, logging

from .pages import read_pages, read_strip, write_pages


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
if varlen_attn is not None and "block_table" not in inspect.signature(varlen_attn).parameters:
    varlen_attn = None  # torch before 2.13 cannot read pages

if is_flash_attn_2_available():
    from flash_attn import flash_attn_varlen_func
else:
    flash_attn_varlen_func = None

logger = logging.get_logger(__name__)

# Bytes that FlashInfer's documentation recommends.
_FLASHINFER_WORKSPACE = 128 * 2**20
# Elements of masks that a step keeps from layer to layer: where there are more, attention itself takes far longer.
_MOST_KEPT = 2**20
# A text model set to "packed_sdpa" runs "sdpa", but where streams are packed: then it runs what is here.
PACKED = "packed_"


@dataclass
class HostEntries:
    """
    What the host knows of where the entries of several streams lie in the layers of one kind, in one step.

    Attributes:
        new (`list[int]`): Entries that each stream adds.
        lengths (`list[int]`): Entries of each stream, those that it adds included.
        strips (`list[int | None]`): Where each stream's first entry lies in the flattened pages, if all follow it.
        pages (`list[list[int]]`): Each stream's pages.
        unread (`list[bool]`): Which streams only fill a captured step up, so that nobody reads what they attend to.
        is_captured (`bool`): Whether the step is one that is captured, of which the host may do nothing anew.
        masks (`dict`): Of streams that add and hold as many, made once, if they are small.
    """

    new: list[int]
    lengths: list[int]
    strips: list[int | None]
    pages: list[list[int]]
    unread: list[bool]
    is_captured: bool = field(default=False, kw_only=True)
    masks: dict[Any, torch.Tensor] = field(default_factory=dict, kw_only=True)


@dataclass
class PackedEntries(HostEntries):
    """
    Where the entries of several streams lie in the layers of one kind, in one step, on the device too.

    Attributes:
        most_new (`int`): Not less than any of `new`.
        slots (`torch.LongTensor` of shape `(all new,)`): Where in the flattened pages each new entry goes.
        begins (`torch.IntTensor` of shape `(streams + 1,)`): Where each stream's new entries begin, and their number.
        used (`torch.IntTensor` of shape `(streams,)`): `lengths`.
        key_begins (`torch.IntTensor` of shape `(streams + 1,)`): `used`, summed up, from 0.
        table (`torch.IntTensor` of shape `(streams, pages)`): `pages`; what is past a stream's last is not read.
        idle (`torch.IntTensor` of shape `(streams,)`): `unread`.
        plans (`dict`): What kernels that plan on the host keep for this step, and for the next of this kind of layer.
    """

    most_new: int
    slots: torch.LongTensor
    begins: torch.IntTensor
    used: torch.IntTensor
    key_begins: torch.IntTensor
    table: torch.IntTensor
    idle: torch.IntTensor
    plans: dict[Any, Any] = field(default_factory=dict)

    def pad(self, query: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New queries (all new, heads, dim) as (streams, length, heads, dim), and where each is: stream and place."""
        streams, begins = self.table.shape[0], self.begins.long()
        index = torch.arange(query.shape[0], device=query.device)
        row = torch.bucketize(index, begins[1:], right=True).clamp(max=streams - 1)
        place = index - begins[row]
        return query.new_zeros(streams, length, *query.shape[1:]).index_put((row, place), query), row, place


class StepNumbers:
    """
    Lists of numbers that a step needs on the device, and the next step others of: brought there in one copy, for which
    nobody waits.

    Args:
        lists (`Sequence[tuple[Sequence, torch.dtype]]`): Numbers, and what they are to be there.
        device (`torch.device`): Where to.

    Attributes:
        tensors (`list[torch.Tensor]`): One a list, of one dimension.
    """

    def __init__(self, lists: Sequence[tuple[Sequence[float], torch.dtype]], device: torch.device | str) -> None:
        self._form = [(len(numbers), dtype) for numbers, dtype in lists]
        # Kernels read several numbers at once, from where such a read may begin.
        sizes = [-(-count * dtype.itemsize // 64) * 64 for count, dtype in self._form]
        self._begins = [0, *accumulate(sizes)]
        self._memory = torch.empty(self._begins[-1], dtype=torch.uint8, device=device)
        self.tensors = self._views(self._memory)
        self._is_here = self._memory.device.type == "cpu"
        self._arrays = [tensor.numpy() for tensor in self.tensors] if self._is_here else []
        self.write(lists)

    def write(self, lists: Sequence[tuple[Sequence[float], torch.dtype]]) -> None:
        """
        Brings others of as many numbers there, over those that were there.

        Raises:
            `ValueError`: If they are more or fewer, or to be of another dtype.
        """
        if [(len(numbers), dtype) for numbers, dtype in lists] != self._form:
            raise ValueError("These are numbers of a step of another shape.")
        arrays = self._arrays
        if not self._is_here:
            # Its memory goes to nobody else before it is copied: torch sees to that for what is pinned, and only then.
            is_cuda = self._memory.device.type == "cuda"
            host = torch.empty_like(self._memory, device="cpu", pin_memory=is_cuda)
            arrays = [tensor.numpy() for tensor in self._views(host)]
        for array, (numbers, _) in zip(arrays, lists, strict=True):
            array[:] = numbers
        if not self._is_here:
            self._memory.copy_(host, non_blocking=is_cuda)

    def _views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[begin : begin + count * dtype.itemsize].view(dtype)
            for begin, (count, dtype) in zip(self._begins, self._form, strict=False)
        ]


# ---------------------------------------------------------------------------------------------------------- kernels
# Each takes new queries (all new, heads, dim), pages (pages, page size, key heads, dim), the entries, the scaling and
# the sliding window in entries or None, and gives (all new, heads, dim).


def attend_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """The reference: copies each stream's pages together and masks. Any device and dtype; reads every page given."""
    page_size = keys.shape[1]
    padded, row, place = entries.pad(query, entries.most_new)
    table = entries.table.long()
    keys, values = (read_pages(pages, table, query.dtype).flatten(1, 2).transpose(1, 2) for pages in (keys, values))
    entry = torch.arange(table.shape[1] * page_size, device=query.device)
    new = entries.begins.diff()
    last = (entries.used - new)[:, None, None] + torch.arange(entries.most_new, device=query.device)[:, None]
    seen = entry <= last
    if window is not None:
        seen = seen & (entry > last - window)
    output = F.scaled_dot_product_attention(
        padded.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)[row, place]


def attend_strips(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Stream by stream, without copying pages that follow each other: for a CPU."""
    if entries.is_captured:
        # Its numbers are of another step by the time it runs: they are in its tensors, and read there.
        where = (entries.begins, entries.used, entries.table, entries.idle)
        return torch.ops.videollm_mod.attend_strips_v2(query, keys, values, *where, scaling, window)
    heads, groups = keys.shape[2], query.shape[1] // keys.shape[2]
    outputs, end = [], 0
    for index, (new, length) in enumerate(zip(entries.new, entries.lengths, strict=True)):
        begin, end = end, end + new
        if new == 0:
            continue
        rows, strip = query[begin:end], entries.strips[index]
        if entries.unread[index]:
            outputs.append(torch.zeros_like(rows))
            continue
        # The queries that share a key head stand beside each other, so that its keys are read once.
        folded = rows.view(new, heads, groups, -1).permute(1, 2, 0, 3).reshape(1, heads, groups * new, -1)
        if strip is None:
            pages = torch.tensor(entries.pages[index], device=keys.device)
            parts = [read_pages(x, pages, query.dtype).flatten(0, 1)[:length] for x in (keys, values)]
            key, value = (x.transpose(0, 1)[None] for x in parts)
        else:
            key, value = (read_strip(x, strip, length, query.dtype) for x in (keys, values))
        wanted = (new, length, window, groups, query.dtype)
        mask = entries.masks.get(wanted)
        if mask is None and (new > 1 or (window is not None and length > window)):
            mask = _causal_mask(new, length, window, groups, query)
            if mask.numel() + sum(kept.numel() for kept in entries.masks.values()) <= _MOST_KEPT:
                entries.masks[wanted] = mask
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        outputs.append(output.view(heads, groups, new, -1).permute(2, 0, 1, 3).reshape(new, heads * groups, -1))
    if not outputs:
        return torch.empty_like(query)
    # Laid out as the operation promises: what is compiled reads it so.
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()


def _causal_mask(new: int, length: int, window: int | None, groups: int, like: torch.Tensor) -> torch.Tensor:
    """
    What to add to the scores of the last `new` of `length` entries, (groups * new, length), 0 or minus infinity, in
    the dtype of `like`.
    """
    mask = like.new_full((new, length), float("-inf")).triu_(length - new + 1)
    if window is not None:
        mask += like.new_full((new, length), float("-inf")).tril_(length - new - window)
    return mask.repeat(groups, 1)


def _strips_by_tensors(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begins: torch.Tensor,
    used: torch.Tensor,
    table: torch.Tensor,
    idle: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """[`attend_strips`] where streams begin, what they hold and their pages are on a CPU's tensors."""
    numbers = (x.numpy().tobytes() for x in (begins, used, table, idle))
    return attend_strips(query, keys, values, _read_entries(*numbers, keys.shape[1]), scaling, window)


# All layers of a kind ask for the same; there are two kinds in most models.
@lru_cache(maxsize=8)
def _read_entries(begins: bytes, used: bytes, table: bytes, idle: bytes, page_size: int) -> HostEntries:
    """Entries of what is in these tensors."""
    bounds, lengths, pages, unread = (np.frombuffer(numbers, np.int32) for numbers in (begins, used, table, idle))
    counts = -(-lengths // page_size)
    pages = [row[:count].tolist() for row, count in zip(pages.reshape(len(lengths), -1), counts, strict=True)]
    new = np.diff(bounds).tolist()
    return HostEntries(new, lengths.tolist(), [_strip(own, page_size) for own in pages], pages, (unread != 0).tolist())


# To `torch.compile` one operation, since it depends on numbers that only a step knows. Defined by hand: what
# `torch.library.custom_op` puts around a function takes as long as attending to a short stream. A second copy of this
# module, as code from the Hub is, shares it: what changes its results or its schema changes its name.
if not hasattr(torch.ops.videollm_mod, "attend_strips_v2"):
    torch.library.define(
        "videollm_mod::attend_strips_v2",
        "(Tensor query, Tensor keys, Tensor values, Tensor begins, Tensor used, Tensor table, Tensor idle, "
        "float scaling, int? window) -> Tensor",
    )
    torch.library.impl("videollm_mod::attend_strips_v2", "CPU", _strips_by_tensors)
    torch.library.register_fake("videollm_mod::attend_strips_v2", lambda query, *_: torch.empty_like(query))


def attend_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
    *,
    with_begins: bool = True,
) -> torch.Tensor:
    """torch's flash attention over pages, split over keys where queries are few: half precision on CUDA."""
    return varlen_attn(
        query,
        keys,
        values,
        entries.begins,
        # Flash attention wants them beside the pages, which say it already; cuDNN may not.
        entries.key_begins if with_begins else None,
        entries.most_new,
        entries.table.shape[1] * keys.shape[1],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=entries.used,
        block_table=entries.table,
    )


def attend_flash_attn(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """The flash-attn package over pages: half precision on CUDA."""
    return flash_attn_varlen_func(
        query,
        keys,
        values,
        cu_seqlens_q=entries.begins,
        cu_seqlens_k=entries.key_begins,
        max_seqlen_q=entries.most_new,
        max_seqlen_k=entries.table.shape[1] * keys.shape[1],
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        block_table=entries.table,
    )


def attend_flashinfer(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """
    FlashInfer over pages, planned on the host once a step for all layers of a kind: half precision on CUDA, and steps
    that are not captured.
    """
    (heads, dim), (page_size, key_heads, _) = query.shape[1:], keys.shape[1:]
    key = (heads, dim, page_size, key_heads, query.dtype, scaling, window)
    wrapper, planned_for = entries.plans.get(key, (None, None))
    if planned_for is not entries.slots:
        if wrapper is None:
            workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=query.device)
            wrapper = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        counts = [-(-length // page_size) for length in entries.lengths]
        indices = [page for own, count in zip(entries.pages, counts, strict=True) for page in own[:count]]
        last = [length - max(count - 1, 0) * page_size for length, count in zip(entries.lengths, counts, strict=True)]
        begins, page_begins = ([0, *accumulate(numbers)] for numbers in (entries.new, counts))
        wrapper.plan(
            *(torch.tensor(numbers, dtype=torch.int32) for numbers in (begins, page_begins, indices, last)),
            *(heads, key_heads, dim, page_size),
            causal=True,
            sm_scale=scaling,
            window_left=-1 if window is None else window - 1,
            q_data_type=query.dtype,
        )
        # By a tensor of the step: the step itself would hold what holds it.
        entries.plans[key] = (wrapper, entries.slots)
    return wrapper.run(query, (keys, values))


def attend_flex(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
    *,
    flex: Callable[..., torch.Tensor] = flex_attention,
) -> torch.Tensor:
    """torch's flex attention, to be compiled: a block of queries a stream, and of keys its pages. CUDA, any dtype."""
    (num_pages, page_size), (streams, width) = keys.shape[:2], entries.table.shape
    length = -(-entries.most_new // 128) * 128  # what its blocks of queries are made of
    padded, row, place = entries.pad(query, length)
    table, used = entries.table.long(), entries.used.long()
    past = used - entries.begins.diff()
    count = (used + page_size - 1) // page_size
    # Whose each page is, and which of its pages; what stands past a stream's last page is sent past the last of all.
    page = torch.arange(width, device=query.device).expand(streams, -1)
    target = torch.where(page < count[:, None], table, num_pages).flatten()
    stream = torch.arange(streams, device=query.device)[:, None].expand(-1, width).flatten()
    owner = table.new_full((num_pages + 1,), -1).index_copy(0, target, stream)
    order = table.new_zeros(num_pages + 1).index_copy(0, target, page.flatten())

    def sees(_batch: torch.Tensor, _head: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        own, physical = q_idx // length, kv_idx // page_size
        entry, last = order[physical] * page_size + kv_idx % page_size, past[own] + q_idx % length
        seen = (owner[physical] == own) & (entry <= last)
        return seen if window is None else seen & (entry > last - window)

    blocks = BlockMask.from_kv_blocks(
        count.int()[None, None],
        # As wide as there are pages, which torch before 2.13 takes for granted.
        F.pad(entries.table, (0, max(num_pages - width, 0)))[None, None],
        BLOCK_SIZE=(length, page_size),
        mask_mod=sees,
        seq_lengths=(streams * length, num_pages * page_size),
    )
    rows = padded.flatten(0, 1).transpose(0, 1)[None]
    keys, values = (x.flatten(0, 1).transpose(0, 1)[None] for x in (keys, values))
    output = flex(rows, keys, values, block_mask=blocks, scale=scaling, enable_gqa=True)
    return output[0].transpose(0, 1).unflatten(0, (streams, length))[row, place]


# ----------------------------------------------------------------------------------------------------------- choice

Attend = Callable[..., torch.Tensor]
_chosen: dict[Any, tuple[str, Attend]] = {}
# Pages of the long stream that kernels are compared with: over few, which is fastest says nothing of an hour.
_LONG = {"cuda": 64}


def choose_attention(
    query: torch.Tensor, keys: torch.Tensor, window: int | None = None, *, is_captured: bool = False
) -> tuple[str, Attend]:
    """
    The kernel for queries (all new, heads, dim) over pages (pages, page size, key heads, dim), with a sliding window
    or not, in steps that are captured or not: of those that are installed and agree with the reference on random
    numbers on this device, the fastest. Chosen once, and said.

    Returns:
        Its name and the function.
    """
    kind = (query.device, query.dtype, keys.dtype, query.shape[1:], keys.shape[1:], window is None, is_captured)
    if kind not in _chosen:
        _chosen[kind] = _choose(query, keys, window is not None, is_captured)
        steps = "captured steps" if is_captured else "steps"
        logger.info(f"Attention to pages in {steps}: {_chosen[kind][0]} ({query.dtype} on {query.device}).")
    return _chosen[kind]


def attention_in_use(device: torch.device) -> list[str]:
    """Names of the kernels that were chosen on a device so far."""
    return sorted({name for (at, *_), (name, _) in _chosen.items() if at == device})


def _choose(query: torch.Tensor, keys: torch.Tensor, has_window: bool, is_captured: bool) -> tuple[str, Attend]:
    if query.device.type == "cpu":
        return ("strips of pages", attend_strips)
    candidates = _candidates(query.dtype, keys.dtype, is_captured) if query.device.type == "cuda" else []
    return _fastest(candidates, query, keys, has_window, is_captured)


def _candidates(dtype: torch.dtype, stored: torch.dtype, is_captured: bool) -> list[tuple[str, Attend]]:
    """Kernels for CUDA that are installed, for queries of a dtype over pages of one."""
    found: list[tuple[str, Attend]] = []
    is_half = dtype in (torch.float16, torch.bfloat16) and stored == dtype
    if is_half and varlen_attn is not None:
        found += [("torch's varlen attention", attend_varlen)]
        found += [("torch's varlen attention", partial(attend_varlen, with_begins=False))]
    if is_half and flash_attn_varlen_func is not None:
        found += [("flash-attn", attend_flash_attn)]
    # A graph that is replayed leaves no room for a plan. FlashInfer's own way around that wants a workspace that grows
    # with the streams, gigabytes for many.
    if is_half and not is_captured and importlib.util.find_spec("flashinfer") is not None:
        found += [("FlashInfer", attend_flashinfer)]
    if stored == dtype:
        found += [("compiled flex attention", partial(attend_flex, flex=torch.compile(flex_attention)))]
    return found


def _fastest(
    candidates: Sequence[tuple[str, Attend]],
    query: torch.Tensor,
    keys: torch.Tensor,
    has_window: bool,
    is_captured: bool,
) -> tuple[str, Attend]:
    """Of these kernels that which takes least, of those that are right, else the reference."""
    times = {}
    for name, attend in candidates:
        try:
            times[name, attend] = check_attention(attend, query, keys, has_window=has_window, is_captured=is_captured)
        except Exception as error:  # a kernel fails in as many ways as there are kernels; whichever, it is not used
            logger.info(f"{name} is installed, and not used so: {error}")
    if times:
        return min(times, key=times.__getitem__)
    if query.device.type == "cuda":
        logger.warning_once(
            f"No kernel that reads pages of {keys.dtype} for queries of {query.dtype} works here: each step copies "
            "the cache."
        )
    return ("gathered pages", attend_gathered)


def check_attention(
    attend: Attend,
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    has_window: bool = False,
    is_captured: bool = False,
    repeats: int = 5,
) -> float:
    """
    Compares a kernel with the reference, on random numbers in the shapes of `query` and `keys`: streams, one of them
    long, that add much and that add one entry each, since kernels differ in what they run for those, and if
    `is_captured` within bounds that are wider.

    Returns:
        `float`: Seconds of a call.

    Raises:
        `ValueError`: If it differs by more than the arithmetic of the dtype explains.
    """
    (heads, dim), (page_size, key_heads, _) = query.shape[1:], keys.shape[1:]
    long = _LONG.get(query.device.type, 1)
    lengths = [long * page_size + page_size // 2, 3 * page_size, 5]
    pages = [[1, 3, *range(7, 6 + long)], [6, 0, 4], [2]]
    window = page_size // 2 if has_window else None
    generator = torch.Generator(query.device).manual_seed(0)
    options = {"device": query.device, "generator": generator}
    stored = [torch.randn(6 + long, page_size, key_heads, dim, **options).to(keys.dtype) for _ in range(2)]
    taken = 0.0
    for new in ([11, 1, 5], [1, 1, 1]):
        bounds = {"most_new": max(new) + 5 * (max(new) > 1), "most_pages": max(4, long + 2)} if is_captured else {}
        rows = torch.randn(sum(new), heads, dim, **options).to(query.dtype)
        entries = pack_entries(new, lengths, pages, page_size, query.device, **bounds)
        expected = attend_gathered(rows.float(), *(x.float() for x in stored), entries, dim**-0.5, window)
        found = attend(rows, *stored, entries, dim**-0.5, window)
        far = (found.float() - expected).abs().max().item()
        most = 8 * torch.finfo(query.dtype).eps
        if not far <= most:
            raise ValueError(f"it differs from the reference by {far:.2g}, more than {most:.2g}")
        for _ in range(repeats):
            # Of a step of its own, since some kernels plan each.
            entries = pack_entries(new, lengths, pages, page_size, query.device, **bounds, plans=entries.plans)
            begin = clock.perf_counter()
            attend(rows, *stored, entries, dim**-0.5, window).sum().item()
            taken += (clock.perf_counter() - begin) / repeats
    return taken / 2


def pack_entries(
    new: Sequence[int],
    lengths: Sequence[int],
    pages: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device | str,
    *,
    unread: Sequence[bool] | None = None,
    most_new: int | None = None,
    most_pages: int | None = None,
    plans: dict[Any, Any] | None = None,
) -> PackedEntries:
    """
    Entries of several streams in the layers of one kind.

    Args:
        new (`Sequence[int]`): Entries that each stream adds.
        lengths (`Sequence[int]`): Entries of each stream, those included.
        pages (`Sequence[Sequence[int]]`): Each stream's pages, in order.
        page_size (`int`): Entries of a page.
        device (`torch.device`): Where the tensors go.
        unread (`Sequence[bool]`, *optional*): Streams whose results nobody reads; by default none.
        most_new (`int`, *optional*): Bound of `new` that a captured step is made for.
        most_pages (`int`, *optional*): Bound of the pages of a stream that a captured step is made for.
        plans (`dict`, *optional*): What kernels that plan on the host kept at the last step of this kind of layer.
    """
    unread = [False] * len(new) if unread is None else unread
    lists = _lists_of_entries(new, lengths, pages, page_size, unread, most_pages)
    tensors = StepNumbers(lists, device).tensors
    bounds = {"most_new": most_new, "is_captured": most_pages is not None, "plans": plans}
    return _entries_of_tensors(new, lengths, pages, page_size, unread, tensors, **bounds)


def _lists_of_entries(
    new: Sequence[int],
    lengths: Sequence[int],
    pages: Sequence[Sequence[int]],
    page_size: int,
    unread: Sequence[bool],
    most_pages: int | None,
) -> list[tuple[list[int], torch.dtype]]:
    """`slots`, `begins`, `used`, `key_begins`, `table`, row by row, and `idle` of [`PackedEntries`]."""
    slots = [
        own[place // page_size] * page_size + place % page_size
        for count, length, own in zip(new, lengths, pages, strict=True)
        for place in range(length - count, length)
    ]
    width = most_pages or max((len(own) for own in pages), default=1)
    table = [page for own in pages for page in (*own, *[0] * (width - len(own)))]
    short = [[0, *accumulate(new)], list(lengths), [0, *accumulate(lengths)], table, list(unread)]
    return [(slots, torch.long), *((numbers, torch.int32) for numbers in short)]


def _entries_of_tensors(
    new: Sequence[int],
    lengths: Sequence[int],
    pages: Sequence[Sequence[int]],
    page_size: int,
    unread: Sequence[bool],
    tensors: Sequence[torch.Tensor],
    *,
    most_new: int | None,
    is_captured: bool,
    plans: dict[Any, Any] | None,
) -> PackedEntries:
    slots, begins, used, key_begins, table, idle = tensors
    return PackedEntries(
        new=list(new),
        lengths=list(lengths),
        strips=[_strip(own, page_size) for own in pages],
        most_new=most_new or max(new, default=0),
        slots=slots,
        begins=begins,
        used=used,
        key_begins=key_begins,
        table=table.unflatten(0, (len(pages), -1)),
        idle=idle,
        pages=[list(own) for own in pages],
        unread=list(unread),
        is_captured=is_captured,
        plans={} if plans is None else plans,
    )


def _strip(pages: Sequence[int], page_size: int) -> int | None:
    """Where the first entry lies in the flattened pages, if all others follow it."""
    is_strip = bool(pages) and list(pages) == list(range(pages[0], pages[0] + len(pages)))
    return pages[0] * page_size if is_strip else None


# ------------------------------------------------------------------------------------------------------------ entry


class PackedCaches:
    """
    What a model is given as `cache` for one step of several streams, laid one after the other in a single
    row: each token enters its own stream's cache, and sees that alone.

    The pages that the step needs are taken here, so that nothing can run out within the model.

    Args:
        caches (`Sequence[VideoLLMMoDPagedCache]`): Of the streams, in one pool.
        num_tokens (`Sequence[int]`): New tokens of each stream, frame tokens included.
        num_frames (`Sequence[int]`): New frames of each stream.
        device (`torch.device`): That of the model.
        most_new (`int`, *optional*): Bound of `num_tokens` that a captured step is made for.
        most_pages (`Mapping[int, int]`, *optional*): Of each kind of layer, the bound of a stream's pages.
        spare (`VideoLLMMoDPagedCache`, *optional*): That of what fills a captured step up, and nobody reads.
        more (`Sequence[tuple[Sequence, torch.dtype]]`, *optional*): Other numbers of the step, to bring to the device
            in the same copy.
        over (`PackedCaches`, *optional*): Those of a captured step, whose tensors get the numbers of this step. What
            the host knows of entries stays that of the step that they were made with.

    Attributes:
        positions (`torch.LongTensor` of shape `(all new,)`): Each token's place in its own stream.
        more (`list[torch.Tensor]`): The other numbers.

    Raises:
        `OutOfPagesError`: If the pool has too few.
        `ValueError`: If `over` are those of a step of another shape.
    """

    # Each stream sees itself only, which its entries say.
    needs_masks = False

    def __init__(
        self,
        caches: Sequence[Any],
        num_tokens: Sequence[int],
        num_frames: Sequence[int],
        device: torch.device | str,
        *,
        most_new: int | None = None,
        most_pages: Mapping[int, int] | None = None,
        spare: Any | None = None,
        more: Sequence[tuple[Sequence[float], torch.dtype]] = (),
        over: "PackedCaches | None" = None,
    ) -> None:
        self.caches, self.num_tokens = list(caches), list(num_tokens)
        self.pool = self.caches[0].pool
        self.new: dict[int, list[int]] = {}
        self._early: dict[int, torch.Tensor] = {}
        page_size = self.pool.page_size
        for cache, tokens, frames in zip(self.caches, num_tokens, num_frames, strict=True):
            cache.make_room(tokens, frames)
        unread = [cache is spare for cache in self.caches]
        where: dict[int, tuple] = {}
        lists: list[tuple[Sequence[float], torch.dtype]] = []
        for kind in self.pool.num_pages:
            counts = zip(num_tokens, num_frames, strict=True)
            new = [self.pool.num_entries(kind, tokens, frames) for tokens, frames in counts]
            total = [cache.length_of(kind) + count for cache, count in zip(self.caches, new, strict=True)]
            pages = [
                cache.tables[kind].pages[: -(-length // page_size)]
                for cache, length in zip(self.caches, total, strict=True)
            ]
            self.new[kind], where[kind] = new, (new, total, pages, page_size, unread)
            lists += _lists_of_entries(*where[kind], None if most_pages is None else most_pages[kind])
        begins = [cache.get_seq_length() for cache in self.caches]
        places = [
            place for begin, count in zip(begins, num_tokens, strict=True) for place in range(begin, begin + count)
        ]
        lists += [(places, torch.long), *more]
        if over is not None:
            over._numbers.write(lists)
            self._numbers, self.entries, self.positions, self.more = (
                over._numbers,
                over.entries,
                over.positions,
                over.more,
            )
            return
        self._numbers = StepNumbers(lists, device)
        tensors = iter(self._numbers.tensors)
        bounds = {"most_new": most_new, "is_captured": most_pages is not None}
        self.entries: dict[int, PackedEntries] = {
            kind: _entries_of_tensors(
                *known, list(islice(tensors, 6)), **bounds, plans=self.pool.plans.setdefault(kind, {})
            )
            for kind, known in where.items()
        }
        self.positions, *self.more = tensors

    def get_seq_length(self, _layer_idx: int | None = None) -> int:
        """0: what came before differs by stream, and is not part of the row."""
        return 0

    def record_positions(self, layer_idx: int, positions: torch.Tensor, **_: bool) -> None:
        """Records which tokens of the row, (1, new), routed layer `layer_idx` is about to add."""
        self._early[layer_idx] = positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple:
        """Writes entries (1, heads, all new, dim) into their streams' pages, and gives them as they came."""
        pages = self.pool.pages_of(layer_idx, key_states)
        slots = self.entries[self.pool.kinds[layer_idx]].slots
        new = [key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)]
        if pages[2] is not None:
            new.append(self.positions[self._early.pop(layer_idx)[0]])
        for stored, state in zip(pages, new, strict=False):
            write_pages(stored, slots, state)
        return key_states, value_states

    def attend(
        self, layer_idx: int, query: torch.Tensor, scaling: float | None = None, window: int | None = None
    ) -> torch.Tensor:
        """What queries (1, heads, all new, dim) see, each in its own stream, as (1, all new, heads, dim)."""
        keys, values, _ = self.pool.layers[layer_idx]
        entries = self.entries[self.pool.kinds[layer_idx]]
        rows = query[0].transpose(0, 1)
        _, kernel = choose_attention(rows, keys, window, is_captured=entries.is_captured)
        scaling = rows.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel(rows.contiguous(), keys, values, entries, scaling, window)[None]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Of what is to be counted, keeps these streams, in this order: the others filled the row up."""
        self.caches = [self.caches[row] for row in rows]
        self.num_tokens = [self.num_tokens[row] for row in rows]
        self.new = {kind: [new[row] for row in rows] for kind, new in self.new.items()}

    def advance(self, num_tokens: int, inside_frame: torch.Tensor | None = None) -> None:  # noqa: ARG002
        """Does nothing: [`commit`] counts the step in each stream's own cache."""

    def commit(self, inside_frames: Sequence[torch.Tensor | None]) -> None:
        """
        Counts the step in each stream's cache, once it has run.

        Args:
            inside_frames (`Sequence[torch.BoolTensor]`): Of each stream, True at new tokens, (1, tokens), that are
                within a frame and not its last, or `None` if there are none.
        """
        for row, (cache, tokens, inside) in enumerate(zip(self.caches, self.num_tokens, inside_frames, strict=True)):
            for layer, kind in zip(cache.layers, self.pool.kinds, strict=True):
                layer.extend(self.new[kind][row])
            cache.advance(tokens, inside)


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_caches: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    An attention function of Transformers (`AttentionInterface`).

    Given `packed_caches`, whose `update` has just stored `key` and `value`, the queries (1, heads, all new, dim) of
    several streams each attend to their own stream; without, it is the implementation that the text model had before.
    """
    if packed_caches is None:
        name = module.config._attn_implementation.removeprefix(PACKED)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        base = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        if "flash" in name:
            module = _AsItWas(module, name)
        return base(
            module, query, key, value, attention_mask, *args, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    # By them, and not here: this function may be another copy's of this module, of code from the Hub.
    return packed_caches.attend(module.layer_idx, query, scaling, sliding_window), None


class _AsItWas:
    """An attention module whose configuration names the implementation that it had, for those that look there."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def set_packed_attention(language_model: Any) -> None:
    """Has a text model attend by [`packed_attention_forward`], which changes nothing where streams are not packed."""
    base = language_model.config._attn_implementation
    if base.startswith(PACKED):
        return
    AttentionInterface.register(PACKED + base, packed_attention_forward)
    masks = AttentionMaskInterface()
    if base in masks:
        AttentionMaskInterface.register(PACKED + base, masks[base])
    language_model.config._attn_implementation = PACKED + base


__all__ = [
    "HostEntries",
    "PackedCaches",
    "PackedEntries",
    "StepNumbers",
    "attend_flash_attn",
    "attend_flashinfer",
    "attend_flex",
    "attend_gathered",
    "attend_strips",
    "attend_varlen",
    "attention_in_use",
    "check_attention",
    "choose_attention",
    "pack_entries",
    "packed_attention_forward",
    "set_packed_attention",
]
