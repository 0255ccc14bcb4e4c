# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Attention of several streams, each over its own pages: the kernels, and the choice of one."""

import copy
import inspect
from collections.abc import Callable
from functools import cache, lru_cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.utils import is_flash_attn_2_available, logging

from .entries import EntryPlan, PackedEntries
from .pages import read_pages, read_strip


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

Attend = Callable[..., torch.Tensor]

# Masks with up to this many elements are kept from layer to layer. Attention under a larger one takes far longer
# than making it.
_LARGEST_KEPT_MASK = 2**17


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
    # What another stream left behind has no weight, but no weight times NaN is NaN.
    unused = (entry >= entries.used[:, None])[:, None, :, None]
    keys, values = keys.masked_fill(unused, 0), values.masked_fill(unused, 0)
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


def _flash_window(query: torch.Tensor, entries: PackedEntries, window: int | None) -> tuple[int, int]:
    """Return how many entries before and after its own a query sees in flash attention; -1 is all."""
    # The last entry of a stream needs no causal mask. Without one, flash attention packs heads that share keys.
    if window is None and entries.most_new == 1 and query.shape[0] == entries.table.shape[0]:
        return -1, -1
    return -1 if window is None else window - 1, 0


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
        window_size=_flash_window(query, entries, window),
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
    window_size = _flash_window(query, entries, window)
    return flash_attn_varlen_func(
        query,
        keys,
        values,
        cu_seqlens_q=entries.begins,
        cu_seqlens_k=entries.key_begins,
        max_seqlen_q=entries.most_new,
        max_seqlen_k=entries.table.shape[1] * keys.shape[1],
        softmax_scale=scaling,
        causal=window_size[1] == 0,
        window_size=window_size,
        block_table=entries.table,
    )


def _flex(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: BlockMask, scaling: float
) -> torch.Tensor:
    return flex_attention(query, keys, values, block_mask=blocks, scale=scaling, enable_gqa=True)


@cache
def _compiled_flex(num_streams: int) -> Callable[..., torch.Tensor]:  # noqa: ARG001
    """Return flex attention compiled for a number of streams."""
    # Its decoding kernel requires that number to be static, and Dynamo limits how often it compiles one code object.
    return torch.compile(FunctionType(_flex.__code__.replace(), _flex.__globals__, _flex.__name__))


def attend_flex(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
    *,
    is_compiled: bool = False,
) -> torch.Tensor:
    """Run torch's flex attention, which should be compiled, with streams as a batch: CUDA, any dtype."""
    (num_pages, page_size), (streams, width) = keys.shape[:2], entries.table.shape
    length, groups = entries.most_new, query.shape[1] // keys.shape[2]
    # Fewer than 128 queries run in the decoding kernel, if the block is a multiple of the rows that it computes at
    # once: the next power of two of the queries that share a key head.
    block = max(128, 1 << (length * groups - 1).bit_length())
    padded, row, place = entries.by_stream(query, length)
    table, used = entries.table.long(), entries.used.long()
    past = used - entries.begins.diff()
    count = (used + page_size - 1) // page_size
    # Invert the table: the index of each page in a stream, far too large for pages of others. Padding of the table
    # goes to an extra page.
    page = torch.arange(width, device=query.device).expand(streams, -1)
    target = torch.where(page < count[:, None], table, num_pages)
    order = table.new_full((streams, num_pages + 1), 2**40).scatter(1, target, page)

    def sees(stream: torch.Tensor, _head: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        entry, last = order[stream, kv_idx // page_size] * page_size + kv_idx % page_size, past[stream] + q_idx
        return entry <= last if window is None else (entry <= last) & (entry > last - window)

    blocks = BlockMask.from_kv_blocks(
        count.int()[:, None, None],
        # torch before 2.13 requires as many columns as there are pages.
        F.pad(entries.table, (0, max(num_pages - width, 0)))[:, None, None],
        BLOCK_SIZE=(block, page_size),
        mask_mod=sees,
        seq_lengths=(length, num_pages * page_size),
    )
    # Inside a compiled step flex attention is compiled with it.
    flex = _compiled_flex(streams) if is_compiled and not torch.compiler.is_compiling() else _flex
    keys, values = (x.flatten(0, 1).transpose(0, 1)[None] for x in (keys, values))
    output = flex(padded.transpose(1, 2), keys, values, blocks, scaling)
    return output.transpose(1, 2)[row, place]


def attend_copied(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: PackedEntries,
    scaling: float,
    window: int | None = None,
    *,
    attend: Attend,
) -> torch.Tensor:
    """Run a kernel that reads pages of the queries' dtype only, on copies of the streams' pages in that dtype."""
    own = copy.copy(entries)
    own.table = torch.arange(entries.table.numel(), device=query.device, dtype=torch.int32).view_as(entries.table)
    keys, values = (read_pages(x, entries.table.flatten().long(), query.dtype) for x in (keys, values))
    return attend(query, keys, values, own, scaling, window)


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
    if device_type != "cuda":
        return []
    found: list[tuple[str, Attend]] = []
    if dtype in (torch.float16, torch.bfloat16):
        if varlen_attn is not None:
            found.append(("torch's varlen attention", attend_varlen))
        if flash_attn_varlen_func is not None:
            found.append(("flash-attn", attend_flash_attn))
    # Needed for 32 bits, and for torch before 2.13 without flash-attn.
    flex = ("compiled flex attention", partial(attend_flex, is_compiled=True))
    if stored == dtype:
        return [*found, flex]
    # Newer versions of flex attention read pages of eight bits.
    direct = [flex] if stored.itemsize == 1 else []
    return [
        *direct,
        *((f"{name} on copied pages", partial(attend_copied, attend=one)) for name, one in (*found, flex)),
    ]


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
    "attend_copied",
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
