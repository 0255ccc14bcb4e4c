# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Attention of several streams, each over its own pages: the kernels, and the choice of one."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.utils import is_flash_attn_2_available, logging

from .pages import read_pages, read_strip, strip_of


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

# Numbers for the device, and their dtype there.
Numbers = tuple[Sequence[float], torch.dtype]
Attend = Callable[..., torch.Tensor]

# Masks with up to this many elements are kept from layer to layer. Attention under a larger one takes far longer
# than making it.
_LARGEST_KEPT_MASK = 2**17


@dataclass(frozen=True)
class EntryPlan:
    """
    Where the entries of several streams lie in the layers of one kind during one step, as plain lists.

    Attributes:
        new (`list[int]`): Number of entries that each stream adds.
        lengths (`list[int]`): Number of entries of each stream, including those that it adds.
        pages (`list[list[int]]`): Pages of each stream, in order.
        is_padding (`list[bool]`): Whether each stream only pads a captured step. Its attention is never read.
        page_size (`int`): Entries per page.
    """

    new: list[int]
    lengths: list[int]
    pages: list[list[int]]
    is_padding: list[bool]
    page_size: int

    @cached_property
    def strips(self) -> list[int | None]:
        """For each stream, the slot of its first entry if its pages are consecutive, else `None`."""
        return [strip_of(own, self.page_size) for own in self.pages]

    @property
    def slots(self) -> list[int]:
        """Slot of each new entry in the flattened pages."""
        size = self.page_size
        return [
            own[place // size] * size + place % size
            for count, length, own in zip(self.new, self.lengths, self.pages, strict=True)
            for place in range(length - count, length)
        ]

    def numbers(self, num_columns: int | None = None) -> list[Numbers]:
        """
        Return the numbers that kernels need on the device, in the order of the tensors of [`PackedEntries`].

        Args:
            num_columns (`int`, *optional*): Width of the page table, by default the most pages of a stream.
        """
        width = num_columns or max((len(own) for own in self.pages), default=1)
        table = [page for own in self.pages for page in (*own, *[0] * (width - len(own)))]
        begins, key_begins = [0, *accumulate(self.new)], [0, *accumulate(self.lengths)]
        short = (begins, self.lengths, key_begins, table, self.is_padding)
        return [(self.slots, torch.long), *((numbers, torch.int32) for numbers in short)]


class PackedEntries:
    """
    An [`EntryPlan`] with its numbers on the device, for kernels.

    A captured step overwrites the tensors and keeps the rest. In such a step `plan` is therefore the plan of the step
    that was captured, and kernels must read the tensors.

    Args:
        plan ([`EntryPlan`]): The plan.
        tensors (`Sequence[torch.Tensor]`): Its `numbers`, on the device.
        most_new (`int`, *optional*): Upper bound of `plan.new`, also for later plans. By default the largest.
        is_captured (`bool`, *optional*, defaults to `False`): Whether the tensors are overwritten later.

    Attributes:
        slots (`torch.LongTensor` of shape `(all new,)`): Slot of each new entry in the flattened pages.
        begins (`torch.IntTensor` of shape `(streams + 1,)`): Cumulative `new`, from 0.
        used (`torch.IntTensor` of shape `(streams,)`): `lengths`.
        key_begins (`torch.IntTensor` of shape `(streams + 1,)`): Cumulative `lengths`, from 0.
        table (`torch.IntTensor` of shape `(streams, pages)`): `pages`, padded with zeros.
        is_padding (`torch.IntTensor` of shape `(streams,)`): `is_padding`.
    """

    def __init__(
        self,
        plan: EntryPlan,
        tensors: Sequence[torch.Tensor],
        *,
        most_new: int | None = None,
        is_captured: bool = False,
    ) -> None:
        self.plan, self.is_captured = plan, is_captured
        self.most_new = max(plan.new, default=0) if most_new is None else most_new
        self.slots, self.begins, self.used, self.key_begins, table, self.is_padding = tensors
        self.table = table.unflatten(0, (len(plan.pages), -1))

    def by_stream(self, query: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return new queries (all new, heads, dim) padded to (streams, length, heads, dim), and for each query the
        indices of its stream and of its place there.
        """
        streams, begins = self.table.shape[0], self.begins.long()
        index = torch.arange(query.shape[0], device=query.device)
        row = torch.bucketize(index, begins[1:], right=True).clamp(max=streams - 1)
        place = index - begins[row]
        return query.new_zeros(streams, length, *query.shape[1:]).index_put((row, place), query), row, place


# ---------------------------------------------------------------------------------------------------------- kernels
# Each kernel gets new queries (all new, heads, dim), pages of keys and of values (pages, page size, key heads, dim),
# the entries, the scaling, and the sliding window in entries or `None`. It returns (all new, heads, dim).


def attend_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Copy each stream's pages together and mask: the reference, for any device and dtype. It reads all pages."""
    page_size = keys.shape[1]
    padded, row, place = entries.by_stream(query, entries.most_new)
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
    """Run torch's attention stream by stream, on views where pages are consecutive: for the CPU."""
    if entries.is_captured:
        # The plan is an older step's, so the plan of this step is read from the tensors.
        numbers = (entries.begins, entries.used, entries.table, entries.is_padding)
        return torch.ops.videollm_mod.attend_strips(query, keys, values, *numbers, scaling, window)
    return _attend_strips(query, keys, values, entries.plan, scaling, window)


def _attend_strips(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: EntryPlan,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    outputs = []
    for index, rows in enumerate(query.split(plan.new)):
        if plan.is_padding[index]:
            outputs.append(torch.zeros_like(rows))
        elif len(rows) > 0:
            key, value = (_entries_of(x, plan, index, query.dtype) for x in (keys, values))
            outputs.append(_attend_one(rows, key, value, scaling, window))
    if not outputs:
        return torch.empty_like(query)
    # The registered operation promises a contiguous result, and compiled code relies on that.
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()


def _entries_of(pages: torch.Tensor, plan: EntryPlan, index: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the entries of one stream, (1, heads, length, dim), without a copy if its pages are consecutive."""
    strip, length = plan.strips[index], plan.lengths[index]
    if strip is not None:
        return read_strip(pages, strip, length, dtype)
    table = torch.tensor(plan.pages[index], device=pages.device)
    return read_pages(pages, table, dtype).flatten(0, 1)[:length].transpose(0, 1)[None]


def _attend_one(
    rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Attend with new queries (new, heads, dim) to all entries (1, key heads, length, dim) of their stream."""
    (new, num_heads, _), (heads, length) = rows.shape, key.shape[1:3]
    groups = num_heads // heads
    # Queries that share a key head lie side by side, so that its keys are read once.
    folded = rows.view(new, heads, groups, -1).permute(1, 2, 0, 3).reshape(1, heads, groups * new, -1)
    mask = None
    if new > 1 or (window is not None and length > window):
        make = _kept_mask if groups * new * length <= _LARGEST_KEPT_MASK else _causal_mask
        mask = make(new, length, window, groups, rows.dtype)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return output.view(heads, groups, new, -1).permute(2, 0, 1, 3).reshape(new, num_heads, -1)


def _causal_mask(new: int, length: int, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what to add to the scores of the last `new` of `length` entries: 0 or -inf, (groups * new, length)."""
    hidden = torch.full((new, length), float("-inf"), dtype=dtype)
    mask = hidden.triu(length - new + 1)
    if window is not None:
        mask += hidden.tril(length - new - window)
    return mask.repeat(groups, 1)


_kept_mask = lru_cache(maxsize=64)(_causal_mask)


def _strips_by_tensors(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begins: torch.Tensor,
    used: torch.Tensor,
    table: torch.Tensor,
    is_padding: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """[`attend_strips`] by the numbers that are in tensors on the CPU."""
    numbers = (x.numpy().tobytes() for x in (begins, used, table, is_padding))
    return _attend_strips(query, keys, values, _read_plan(*numbers, keys.shape[1]), scaling, window)


# All layers of a kind read the same plan, and most models have two kinds of layer.
@lru_cache(maxsize=8)
def _read_plan(begins: bytes, used: bytes, table: bytes, is_padding: bytes, page_size: int) -> EntryPlan:
    bounds, lengths, pages, padding = (
        np.frombuffer(numbers, np.int32) for numbers in (begins, used, table, is_padding)
    )
    counts = -(-lengths // page_size)
    pages = [row[:count].tolist() for row, count in zip(pages.reshape(len(lengths), -1), counts, strict=True)]
    return EntryPlan(np.diff(bounds).tolist(), lengths.tolist(), pages, (padding != 0).tolist(), page_size)


# `torch.compile` must not look inside: the operation depends on numbers that only a step knows. It is registered by
# hand because the wrapper of `torch.library.custom_op` takes as long as attention to a short stream.
torch.library.define(
    "videollm_mod::attend_strips",
    "(Tensor query, Tensor keys, Tensor values, Tensor begins, Tensor used, Tensor table, Tensor is_padding, "
    "float scaling, int? window) -> Tensor",
)
torch.library.impl("videollm_mod::attend_strips", "CPU", _strips_by_tensors)
torch.library.register_fake("videollm_mod::attend_strips", lambda query, *_: torch.empty_like(query))


def attend_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """Run torch's flash attention over pages, split over keys if queries are few: half precision on CUDA."""
    return varlen_attn(
        query,
        keys,
        values,
        entries.begins,
        entries.key_begins,  # flash attention requires them, although `seqused_k` says the same
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
    """Run the flash-attn package over pages: half precision on CUDA."""
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
    """Run torch's flex attention, which should be compiled, with one block of queries per stream: CUDA, any dtype."""
    (num_pages, page_size), (streams, width) = keys.shape[:2], entries.table.shape
    length = -(-entries.most_new // 128) * 128  # flex attention requires blocks of a multiple of 128 queries
    padded, row, place = entries.by_stream(query, length)
    table, used = entries.table.long(), entries.used.long()
    past = used - entries.begins.diff()
    count = (used + page_size - 1) // page_size
    # Invert the table: the stream of each page, and its index there. Padding of the table goes to an extra page.
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
        # torch before 2.13 requires as many columns as there are pages.
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

_chosen: dict[Any, tuple[str, Attend]] = {}


def choose_attention(query: torch.Tensor, keys: torch.Tensor, window: int | None = None) -> tuple[str, Attend]:
    """
    Return the name and the function of the kernel for these queries and pages.

    It is the first installed kernel for the device and dtypes that passes [`check_attention`], else the reference.
    The choice is made once per device, dtypes and shape.

    Args:
        query (`torch.Tensor` of shape `(all new, heads, dim)`): Queries of a step.
        keys (`torch.Tensor` of shape `(pages, page size, key heads, dim)`): Pages of keys.
        window (`int`, *optional*): Sliding window of the layer, in entries.
    """
    kind = (query.device, query.dtype, keys.dtype, query.shape[1:], keys.shape[1:], window is None)
    if kind not in _chosen:
        _chosen[kind] = _first_correct(query, keys, window is not None)
        logger.info(f"Attention to pages of {keys.dtype}: {_chosen[kind][0]} ({query.dtype} on {query.device}).")
    return _chosen[kind]


def attention_in_use(device: torch.device) -> list[str]:
    """Return the names of the kernels chosen on a device so far."""
    return sorted({name for (at, *_), (name, _) in _chosen.items() if at == device})


def _first_correct(query: torch.Tensor, keys: torch.Tensor, has_window: bool) -> tuple[str, Attend]:
    for name, attend in installed_kernels(query.device.type, query.dtype, keys.dtype):
        try:
            check_attention(attend, query, keys, has_window=has_window)
            return name, attend
        except Exception as error:  # a kernel may fail in any way; the next one takes its place
            logger.warning(f"{name} is installed but failed its check, and is not used: {error}")
    if query.device.type == "cuda":
        logger.warning(
            f"No installed kernel reads {keys.dtype} pages for {query.dtype} queries: each step copies the cache."
        )
    return "gathered pages", attend_gathered


def installed_kernels(device_type: str, dtype: torch.dtype, stored: torch.dtype) -> list[tuple[str, Attend]]:
    """Return the installed kernels for queries of `dtype` over pages of dtype `stored`, the preferred first."""
    if device_type == "cpu":
        return [("strips of pages", attend_strips)]
    found: list[tuple[str, Attend]] = []
    if device_type != "cuda" or stored != dtype:
        return found
    if dtype in (torch.float16, torch.bfloat16):
        if varlen_attn is not None:
            found.append(("torch's varlen attention", attend_varlen))
        if flash_attn_varlen_func is not None:
            found.append(("flash-attn", attend_flash_attn))
    # Needed for 32 bits, and for torch before 2.13 without flash-attn.
    return [*found, ("compiled flex attention", partial(attend_flex, flex=torch.compile(flex_attention)))]


def check_attention(
    attend: Attend, query: torch.Tensor, keys: torch.Tensor, *, has_window: bool = False, is_captured: bool = False
) -> None:
    """
    Compare a kernel with the reference on random numbers in the shapes and dtypes of `query` and `keys`.

    Kernels run different code for many and for few queries, so it runs once with streams that add several entries and
    once with streams that add one. Bounds are wider than the numbers, as in captured steps.

    Raises:
        `ValueError`: If the kernel differs by more than the rounding of the dtype explains.
    """
    (heads, dim), (page_size, key_heads, _) = query.shape[1:], keys.shape[1:]
    lengths, pages = [page_size + page_size // 2, 3 * page_size, 5], [[1, 3], [6, 0, 4], [2]]
    window = page_size // 2 if has_window else None
    options = {"device": query.device, "generator": torch.Generator(query.device).manual_seed(0)}
    stored = [torch.randn(7, page_size, key_heads, dim, **options).to(keys.dtype) for _ in range(2)]
    for new in ([11, 1, 5], [1, 1, 1]):
        rows = torch.randn(sum(new), heads, dim, **options).to(query.dtype)
        plan = EntryPlan(new, lengths, pages, [False] * 3, page_size)
        tensors = [torch.tensor(x, dtype=dtype, device=query.device) for x, dtype in plan.numbers(num_columns=5)]
        entries = PackedEntries(plan, tensors, most_new=max(new) + 5, is_captured=is_captured)
        expected = attend_gathered(rows.double(), *(x.double() for x in stored), entries, dim**-0.5, window)
        found = attend(rows, *stored, entries, dim**-0.5, window)
        error = (found.double() - expected).abs().max().item()
        # In 32 bits sums of hundreds of products, each about 1, differ by some 1e-6. A wrong key changes far more.
        allowed = max(8 * torch.finfo(query.dtype).eps, 1e-5)
        if not error <= allowed:
            raise ValueError(f"it differs from the reference by {error:.2g}, more than {allowed:.2g}")


__all__ = [
    "EntryPlan",
    "Numbers",
    "PackedEntries",
    "attend_flash_attn",
    "attend_flex",
    "attend_gathered",
    "attend_strips",
    "attend_varlen",
    "attention_in_use",
    "check_attention",
    "choose_attention",
    "installed_kernels",
]
