# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Attention over pages: every kernel against plain attention, and the choice of a kernel."""

import inspect
import math
from functools import lru_cache, partial

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from videollm_mod.serving import kernels
from videollm_mod.serving.entries import EntryPlan, PackedEntries
from videollm_mod.serving.kernels import (
    attend_copied,
    attend_flash_attn,
    attend_flex,
    attend_gathered,
    attend_strips,
    attend_varlen,
    attention_in_use,
    check_attention,
    choose_attention,
    installed_kernels,
)
from videollm_mod.serving.pages import write_pages


HEADS, KEY_HEADS, DIM, PAGE = 4, 2, 8, 16
# Streams with several new entries, one, none, and only new ones, on consecutive and scattered pages.
NEW, LENGTHS, PAGES = [5, 1, 0, 7], [40, 33, 3, 7], [[4, 0, 7], [1, 2, 3], [5], [6]]
SCALING = 0.3


def entries_of(new, lengths, pages, *, is_padding=None, columns=None, **options):
    plan = EntryPlan(new, lengths, pages, is_padding or [False] * len(new), PAGE)
    return PackedEntries(plan, [torch.tensor(x, dtype=dtype) for x, dtype in plan.numbers(columns)], **options)


def case(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(NEW), HEADS, DIM, generator=generator)
    pages = [torch.randn(8, PAGE, KEY_HEADS, DIM, generator=generator).to(dtype) for _ in range(2)]
    return query, *pages, entries_of(NEW, LENGTHS, PAGES)


def plain(query, keys, values, window=None):
    """Attention stream by stream, on keys and values that are cut out by hand."""
    outputs = []
    for rows, length, own in zip(query.split(NEW), LENGTHS, PAGES, strict=True):
        key, value = (
            torch.cat([x[page] for page in own])[:length].transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, 0)
            for x in (keys.float(), values.float())
        )
        last = torch.arange(length - len(rows), length)[:, None]
        seen = torch.arange(length) <= last
        if window is not None:
            seen &= torch.arange(length) > last - window
        output = F.scaled_dot_product_attention(rows.transpose(0, 1), key, value, attn_mask=seen, scale=SCALING)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attend", [attend_gathered, attend_strips, attend_flex])
def test_a_kernel_is_plain_attention_of_each_stream(attend, window):
    query, keys, values, entries = case()
    assert_close(attend(query, keys, values, entries, SCALING, window), plain(query, keys, values, window))


def reads_one_dtype(query, keys, values, *how):
    assert query.dtype == keys.dtype == values.dtype
    return attend_gathered(query, keys, values, *how)


@pytest.mark.parametrize("attend", [attend_gathered, attend_strips, partial(attend_copied, attend=reads_one_dtype)])
def test_eight_bit_pages_are_converted_when_read(attend):
    query, keys, values, entries = case(dtype=torch.float8_e4m3fn)
    assert_close(attend(query, keys, values, entries, SCALING), plain(query, keys, values))


@pytest.mark.parametrize("attend", [attend_gathered, attend_strips])
def test_what_another_stream_left_in_a_page_does_not_matter(attend):
    query, keys, values, entries = case()
    expected = attend(query, keys, values, entries, SCALING)
    for length, own in zip(LENGTHS, PAGES, strict=True):
        for pages in (keys, values):
            pages[own[-1], length % PAGE or PAGE :] = torch.nan
    assert torch.equal(attend(query, keys, values, entries, SCALING), expected)


@pytest.mark.parametrize(("new", "heads", "block"), [([11, 1], 4, 128), ([51, 1], 8, 256), ([1, 1], 4, 128)])
def test_flex_attention_may_decode(monkeypatch, new, heads, block):
    """By the conditions in `torch/_inductor/kernel/flex/flex_decoding.py`."""

    def recorded(query, keys, _values, blocks, _scaling):
        assert query.shape == (2, heads, max(new), DIM) and keys.shape == (1, KEY_HEADS, 8 * PAGE, DIM)
        assert query.shape[2] < 128 and blocks.kv_indices.shape[:3] == (2, 1, 1)
        rows = 2 ** math.ceil(math.log2(max(new) * heads // KEY_HEADS))
        assert (block, PAGE) == blocks.BLOCK_SIZE and block % max(rows, 16) == 0
        return torch.zeros_like(query)

    monkeypatch.setattr(kernels, "_flex", recorded)
    entries = entries_of(new, [100, 16], [[4, 0, 7, 1, 2, 3, 5], [6]])
    _, keys, values, _ = case()
    attend_flex(torch.zeros(sum(new), heads, DIM), keys, values, entries, SCALING)


def test_each_number_of_streams_has_compiled_code_of_its_own(monkeypatch):
    """Dynamo would make a number of streams that changes dynamic, and flex attention would not decode."""
    monkeypatch.setattr(kernels, "_compiled_flex", lru_cache(kernels._compiled_flex.__wrapped__))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    one, two = kernels._compiled_flex(1), kernels._compiled_flex(2)
    assert one is kernels._compiled_flex(1) and one.__code__ is not two.__code__
    found = []
    monkeypatch.setattr(kernels, "_compiled_flex", lambda count: found.append(count) or (lambda query, *_: query))
    query, keys, values, entries = case()
    attend_flex(query, keys, values, entries, SCALING, is_compiled=True)
    assert found == [4]


@pytest.mark.parametrize("heads", [HEADS, KEY_HEADS])
@pytest.mark.parametrize("window", [None, 4])
def test_strips_of_a_captured_step_are_those_of_its_tensors(window, heads):
    """When it runs, the tensors hold another step's numbers, and the plan is out of date. Padding gives zeros."""
    query, keys, values, entries = case()
    query, bounds = query[:, :heads].contiguous(), {"most_new": 13, "columns": 3, "is_captured": True}
    made = entries_of([4, 2, 1, 6], [39, 30, 9, 6], [[0, 1, 2], [3, 4], [5], [6]], **bounds)
    is_padding = [False, True, False, True]
    of_now = entries_of(NEW, LENGTHS, PAGES, is_padding=is_padding, **bounds)
    for name in ("slots", "begins", "used", "key_begins", "table", "is_padding"):
        getattr(made, name).copy_(getattr(of_now, name))
    found = attend_strips(query, keys, values, made, SCALING, window)
    expected = attend_gathered(query, keys, values, entries, SCALING, window).split(NEW)
    for rows, wanted, is_dummy in zip(found.split(NEW), expected, is_padding, strict=True):
        assert_close(rows, torch.zeros_like(wanted) if is_dummy else wanted)
    # `torch.compile` sees one operation, and knows only its shape.
    args = (query, keys, values, made.begins, made.used, made.table, made.is_padding, SCALING, window)
    torch.library.opcheck(torch.ops.videollm_mod.attend_strips.default, args)
    alone = entries_of([5], [40], [[4, 0, 7]], **bounds)
    args = (query[:5], keys, values, alone.begins, alone.used, alone.table, alone.is_padding, SCALING, window)
    torch.library.opcheck(torch.ops.videollm_mod.attend_strips.default, args)


def test_entries_say_where_everything_lies():
    entries = entries_of([2, 1], [18, 3], [[3, 1], [0]], most_new=4, columns=3)
    assert entries.slots.tolist() == [1 * PAGE, 1 * PAGE + 1, 2]
    assert entries.begins.tolist() == [0, 2, 3] and entries.used.tolist() == [18, 3]
    assert (
        entries.table.tolist() == [[3, 1, 0], [0, 0, 0]] and entries.plan.strips == [None, 0] and entries.most_new == 4
    )
    pages = torch.zeros(4, PAGE, 1)
    write_pages(pages, entries.slots, torch.tensor([[1.0], [2.0], [3.0]]))
    assert pages[1, :2, 0].tolist() == [1, 2] and pages[0, 2, 0] == 3 and pages.sum() == 6


# --------------------------------------------------------------------------------- kernels that only a GPU can run


def stand_in(query, keys, values, begins, used, table, scaling, window):
    """What the kernels do according to their documentation."""
    left, right = window
    # Only a step with one new entry of every stream needs no causal mask.
    is_single = window == (-1, -1)
    assert right == (-1 if is_single else 0) and is_single == (begins.diff() == 1).all()
    assert all(x.dtype == torch.int32 for x in (begins, used, table))
    own = [row[: -(-length // PAGE)] for row, length in zip(table.tolist(), used.tolist(), strict=True)]
    entries = entries_of(begins.diff().tolist(), used.tolist(), own)
    return attend_gathered(query, keys, values, entries, scaling, None if left < 0 else left + 1)


# The parameters of torch.nn.attention.varlen.varlen_attn (torch 2.13 and later) that are used.
VARLEN = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
VARLEN_OPTIONS = ["scale", "window_size", "enable_gqa", "seqused_k", "block_table"]


@pytest.mark.parametrize("window", [None, 4])
def test_torchs_varlen_attention_is_called_as_it_is_documented(monkeypatch, window):
    if kernels.varlen_attn is not None:
        parameters = inspect.signature(kernels.varlen_attn).parameters
        assert list(parameters)[: len(VARLEN)] == VARLEN and set(VARLEN_OPTIONS) <= set(parameters)

    def called(*args, **options):
        given = dict(zip(VARLEN, args, strict=True)) | options
        assert set(options) == set(VARLEN_OPTIONS)
        # Flash attention refuses `cu_seq_q` without `cu_seq_k`.
        assert given["cu_seq_k"].tolist() == [0, 40, 73, 76, 83] and given["cu_seq_k"].dtype == torch.int32
        assert given["enable_gqa"] and given["max_q"] == 7 and given["max_k"] == 3 * PAGE
        return stand_in(
            *(given[name] for name in ("query", "key", "value", "cu_seq_q", "seqused_k", "block_table", "scale")),
            given["window_size"],
        )

    monkeypatch.setattr(kernels, "varlen_attn", called)
    query, keys, values, entries = case()
    assert_close(attend_varlen(query, keys, values, entries, SCALING, window), plain(query, keys, values, window))


@pytest.mark.parametrize("is_single", [False, True])
def test_flash_attn_is_called_as_it_is_documented(monkeypatch, is_single):
    def called(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert (max_seqlen_q, max_seqlen_k) == (1 if is_single else 7, 3 * PAGE)
        assert options.pop("causal") != is_single and cu_seqlens_k.dtype == torch.int32
        table, scaling, window = (options.pop(x) for x in ("block_table", "softmax_scale", "window_size"))
        assert not options
        return stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), table, scaling, window)

    monkeypatch.setattr(kernels, "flash_attn_varlen_func", called)
    query, keys, values, entries = case()
    if is_single:
        query, entries = query[:2], entries_of([1, 1], [40, 33], [[4, 0, 7], [1, 2, 3]])
    expected = attend_gathered(query, keys, values, entries, SCALING)
    assert_close(attend_flash_attn(query, keys, values, entries, SCALING), expected)


@pytest.mark.parametrize(
    ("new", "window", "given"), [([1, 1], None, (-1, -1)), ([1, 1], 4, (3, 0)), ([1, 0], None, (-1, 0))]
)
def test_a_step_of_one_entry_per_stream_needs_no_causal_mask(monkeypatch, new, window, given):
    """Flash attention packs heads that share keys if neither side has a window and no stream is without a query."""
    seen = []
    monkeypatch.setattr(kernels, "varlen_attn", lambda query, *_, **options: seen.append(options) or query)
    query, keys, values, _ = case()
    entries = entries_of(new, [40, 33], [[4, 0, 7], [1, 2, 3]], most_new=1)
    attend_varlen(query[: sum(new)], keys, values, entries, SCALING, window)
    assert seen[0]["window_size"] == given


# --------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("is_captured", [False, True])
def test_the_check_finds_a_kernel_that_differs_from_the_reference(is_captured):
    query, keys, _, _ = case()
    check_attention(attend_strips, query, keys, is_captured=is_captured)
    with pytest.raises(ValueError, match="differs from the reference by"):
        check_attention(lambda *args: 1.1 * attend_strips(*args), query, keys, is_captured=is_captured)


@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_check_allows_for_rounding(dtype, stored):
    """In shapes of a model of size."""
    query, keys = torch.zeros(1, 32, 128, dtype=dtype), torch.zeros(1, 256, 8, 128, dtype=stored or dtype)
    for has_window in (False, True):
        check_attention(attend_strips, query, keys, has_window=has_window)


def test_the_check_finds_a_kernel_that_reads_up_to_the_bounds():
    """There is room for more queries than there are, and for pages that must not be read."""
    query, keys, _, _ = case()

    def by_bounds(query, keys, values, entries, *how):
        entries.used = entries.used.clamp(min=entries.table.shape[1] * PAGE)
        return attend_gathered(query, keys, values, entries, *how)

    with pytest.raises(ValueError, match="differs from the reference by"):
        check_attention(by_bounds, query, keys)


def test_the_check_finds_a_kernel_that_ignores_the_window():
    query, keys, _, _ = case()
    windowless = lambda *args: attend_strips(*args[:5])  # noqa: E731
    check_attention(windowless, query, keys)
    with pytest.raises(ValueError, match="differs from the reference by"):
        check_attention(windowless, query, keys, has_window=True)


def test_the_first_kernel_that_is_correct_is_chosen_once(monkeypatch, caplog):
    query, keys, _, _ = case()
    calls = []

    def fails(*_):
        raise RuntimeError("no kernel image is available")

    def right(*args):
        calls.append(args)
        return attend_gathered(*args)

    found = [("wrong", lambda *args: 1.1 * attend_strips(*args)), ("fails", fails), ("right", right)]
    found.append(("never tried", None))
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(kernels, "installed_kernels", lambda *_: found)
    monkeypatch.setattr(kernels.logger, "propagate", True)
    with caplog.at_level("WARNING", logger=kernels.logger.name):
        assert choose_attention(query, keys) == ("right", right)
    assert "wrong is installed but failed its check" in caplog.text and "no kernel image is available" in caplog.text
    count = len(calls)
    assert choose_attention(query[:1], keys) == ("right", right) and len(calls) == count
    assert attention_in_use(torch.device("cpu")) == ["right"]
    # A layer with a window has a choice of its own. Without a correct kernel it is the reference.
    del found[2:]
    assert choose_attention(query, keys, window=4) == ("gathered pages", attend_gathered)


def test_which_kernels_a_gpu_can_have(monkeypatch):
    half, full, eight = torch.bfloat16, torch.float32, torch.float8_e4m3fn

    def names(*dtypes):
        return [name for name, _ in installed_kernels("cuda", *dtypes)]

    for name in ("varlen_attn", "flash_attn_varlen_func"):
        monkeypatch.setattr(kernels, name, lambda *_: None)
    assert names(half, half) == ["torch's varlen attention", "flash-attn", "compiled flex attention"]
    assert names(full, full) == ["compiled flex attention"]
    # No kernel is left to the reference, which masks all pages there is room for.
    copied = [f"{name} on copied pages" for name in names(half, half)]
    assert names(half, full) == copied and names(half, eight) == ["compiled flex attention", *copied]
    for name in ("varlen_attn", "flash_attn_varlen_func"):
        monkeypatch.setattr(kernels, name, None)
    assert names(half, half) == ["compiled flex attention"]


def test_a_cpu_reads_strips_in_place():
    query, keys, _, _ = case()
    assert choose_attention(query, keys) == ("strips of pages", attend_strips)
