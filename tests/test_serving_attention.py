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
"""Attention over pages: every kernel against plain attention, and packed streams against each stream alone."""

import copy
import importlib.util
import inspect
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import SCHEMES, TEXT_MODELS, dialogue_ids, random_features, tiny_model
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from videollm_mod.serving import attention
from videollm_mod.serving.attention import (
    PackedCaches,
    StepNumbers,
    _candidates,
    _fastest,
    attend_flash_attn,
    attend_flashinfer,
    attend_flex,
    attend_gathered,
    attend_strips,
    attend_varlen,
    check_attention,
    choose_attention,
    pack_entries,
    set_packed_attention,
)
from videollm_mod.serving.pages import VideoLLMMoDPagedCache, new_page_pool, write_pages


HEADS, KEY_HEADS, DIM, PAGE = 4, 2, 8, 16
# Streams with much, one entry, none that is new, and all that is new; pages that follow each other and not.
NEW, LENGTHS, PAGES = [5, 1, 0, 7], [40, 33, 3, 7], [[4, 0, 7], [1, 2, 3], [5], [6]]
SCALING = 0.3


def case(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(NEW), HEADS, DIM, generator=generator)
    pages = [torch.randn(8, PAGE, KEY_HEADS, DIM, generator=generator).to(dtype) for _ in range(2)]
    return query, *pages, pack_entries(NEW, LENGTHS, PAGES, PAGE, "cpu")


def plain(query, keys, values, window=None):
    """Stream by stream with torch's own attention, on keys and values cut out by hand."""
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


@pytest.mark.parametrize("attend", [attend_gathered, attend_strips])
def test_eight_bit_pages_are_read_as_what_they_hold(attend):
    query, keys, values, entries = case(dtype=torch.float8_e4m3fn)
    assert_close(attend(query, keys, values, entries, SCALING), plain(query, keys, values))


@pytest.mark.parametrize("heads", [HEADS, KEY_HEADS])
@pytest.mark.parametrize("window", [None, 4])
def test_strips_of_a_captured_step_are_those_of_its_tensors(window, heads):
    """
    Which are another step's by the time it runs: what the host knew when it was made says nothing any more. Streams
    that nobody reads attend to nothing.
    """
    query, keys, values, entries = case()
    query, bounds = query[:, :heads].contiguous(), {"most_new": 13, "most_pages": 3}
    made = pack_entries([4, 2, 1, 6], [39, 30, 9, 6], [[0, 1, 2], [3, 4], [5], [6]], PAGE, "cpu", **bounds)
    unread = [False, True, False, True]
    of_now = pack_entries(NEW, LENGTHS, PAGES, PAGE, "cpu", unread=unread, **bounds)
    for name in ("slots", "begins", "used", "key_begins", "table", "idle"):
        getattr(made, name).copy_(getattr(of_now, name))
    found = attend_strips(query, keys, values, made, SCALING, window)
    expected = attend_gathered(query, keys, values, entries, SCALING, window).split(NEW)
    for rows, wanted, is_unread in zip(found.split(NEW), expected, unread, strict=True):
        assert_close(rows, torch.zeros_like(wanted) if is_unread else wanted)
    # To `torch.compile` it is one operation, of which it knows the shape alone.
    args = (query, keys, values, made.begins, made.used, made.table, made.idle, SCALING, window)
    torch.library.opcheck(torch.ops.videollm_mod.attend_strips_v2.default, args)
    alone = pack_entries([5], [40], [[4, 0, 7]], PAGE, "cpu", **bounds)
    args = (query[:5], keys, values, alone.begins, alone.used, alone.table, alone.idle, SCALING, window)
    torch.library.opcheck(torch.ops.videollm_mod.attend_strips_v2.default, args)


def test_entries_say_where_everything_lies():
    entries = pack_entries([2, 1], [18, 3], [[3, 1], [0]], PAGE, "cpu", most_new=4, most_pages=3)
    assert entries.slots.tolist() == [1 * PAGE, 1 * PAGE + 1, 2]
    assert entries.begins.tolist() == [0, 2, 3] and entries.used.tolist() == [18, 3]
    assert entries.table.tolist() == [[3, 1, 0], [0, 0, 0]] and entries.strips == [None, 0] and entries.most_new == 4
    pages = torch.zeros(4, PAGE, 1)
    write_pages(pages, entries.slots, torch.tensor([[1.0], [2.0], [3.0]]))
    assert pages[1, :2, 0].tolist() == [1, 2] and pages[0, 2, 0] == 3 and pages.sum() == 6


# --------------------------------------------------------------------------------- kernels that only a GPU can run


def stand_in(query, keys, values, begins, used, table, scaling, window):
    """What the kernels' documentation says of their arguments."""
    left, right = window
    assert right == 0 and all(x.dtype == torch.int32 for x in (begins, used, table))
    entries = pack_entries(begins.diff().tolist(), used.tolist(), PAGES, PAGE, "cpu")
    return attend_gathered(query, keys, values, entries, scaling, None if left < 0 else left + 1)


# Of torch.nn.attention.varlen.varlen_attn from torch 2.13 on, as far as it is used.
VARLEN = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
VARLEN_OPTIONS = ["scale", "window_size", "enable_gqa", "seqused_k", "block_table"]


@pytest.mark.parametrize("window", [None, 4])
def test_torchs_varlen_attention_is_called_as_it_is_documented(monkeypatch, window):
    if attention.varlen_attn is not None:
        parameters = inspect.signature(attention.varlen_attn).parameters
        assert list(parameters)[: len(VARLEN)] == VARLEN and set(VARLEN_OPTIONS) <= set(parameters)

    def called(*args, **options):
        given = dict(zip(VARLEN, args, strict=True)) | options
        assert set(options) == set(VARLEN_OPTIONS)
        # Flash attention refuses queries' begins without keys'.
        assert given["cu_seq_k"].tolist() == [0, 40, 73, 76, 83] and given["cu_seq_k"].dtype == torch.int32
        assert given["enable_gqa"] and given["max_q"] == 7 and given["max_k"] == 3 * PAGE
        return stand_in(
            *(given[name] for name in ("query", "key", "value", "cu_seq_q", "seqused_k", "block_table", "scale")),
            given["window_size"],
        )

    monkeypatch.setattr(attention, "varlen_attn", called)
    query, keys, values, entries = case()
    assert_close(attend_varlen(query, keys, values, entries, SCALING, window), plain(query, keys, values, window))


def test_flash_attn_is_called_as_it_is_documented(monkeypatch):
    def called(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert options.pop("causal") and (max_seqlen_q, max_seqlen_k) == (7, 3 * PAGE)
        assert cu_seqlens_k.dtype == torch.int32
        table, scaling, window = (options.pop(x) for x in ("block_table", "softmax_scale", "window_size"))
        assert not options
        return stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), table, scaling, window)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", called)
    query, keys, values, entries = case()
    assert_close(attend_flash_attn(query, keys, values, entries, SCALING), plain(query, keys, values))


@pytest.mark.parametrize("window", [None, 4])
def test_flashinfer_plans_once_a_step_and_is_called_as_it_is_documented(monkeypatch, window):
    made, plans = [], []

    class Wrapper:
        def __init__(self, float_workspace_buffer, kv_layout):
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
            made.append(self)

        def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *sizes, **options):
            tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
            assert all(x.dtype == torch.int32 and x.device.type == "cpu" for x in tables)
            assert sizes == (HEADS, KEY_HEADS, DIM, PAGE) and options["q_data_type"] == torch.float32
            assert options["causal"] and set(options) == {"causal", "sm_scale", "window_left", "q_data_type"}
            self.begins, self.options = qo_indptr, options
            owns = [own.tolist() for own in paged_kv_indices.tensor_split(paged_kv_indptr[1:-1].long())]
            lasts = paged_kv_last_page_len.tolist()
            lengths = [max(len(own) - 1, 0) * PAGE + last for own, last in zip(owns, lasts, strict=True)]
            plans.append((owns, lengths))

        def run(self, q, paged_kv_cache):
            owns, lengths = plans[-1]
            entries = pack_entries(self.begins.diff().tolist(), lengths, owns, PAGE, "cpu")
            left = self.options["window_left"]
            scaling = self.options["sm_scale"]
            return attend_gathered(q, *paged_kv_cache, entries, scaling, None if left < 0 else left + 1)

    monkeypatch.setattr(attention, "_FLASHINFER_WORKSPACE", 16)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))
    query, keys, values, entries = case()
    expected = plain(query, keys, values, window)
    for _layer in range(2):
        assert_close(attend_flashinfer(query, keys, values, entries, SCALING, window), expected)
    assert plans == [(PAGES, LENGTHS)] and len(made) == 1
    # At the next step what was made is planned anew; a stream without entries has no page.
    following = pack_entries([1, 0], [PAGE + 1, 0], [[2, 6, 7], []], PAGE, "cpu", plans=entries.plans)
    found = attend_flashinfer(query[:1], keys, values, following, SCALING, window)
    assert plans[1] == ([[2, 6], []], [PAGE + 1, 0]) and len(made) == 1
    assert_close(found, attend_gathered(query[:1], keys, values, following, SCALING, window))


# --------------------------------------------------------------------------------------------------------- choosing


def test_a_kernel_that_differs_from_the_reference_is_found_out():
    query, keys, _, _ = case()
    assert check_attention(attend_strips, query, keys) > 0
    with pytest.raises(ValueError, match="differs from the reference by"):
        check_attention(lambda *args: 1.1 * attend_strips(*args), query, keys)


@pytest.mark.parametrize("is_captured", [False, True])
def test_kernels_are_compared_over_a_long_stream(is_captured, monkeypatch):
    query, keys, _, _ = case()
    seen = set()

    def attend(*args):
        seen.add(tuple(args[3].lengths))
        return attend_strips(*args)

    monkeypatch.setitem(attention._LONG, "cpu", 9)
    assert check_attention(attend, query, keys, is_captured=is_captured) > 0
    assert seen == {(9 * PAGE + PAGE // 2, 3 * PAGE, 5)}


def test_a_kernel_that_takes_bounds_for_numbers_is_found_out_where_steps_are_captured():
    """Within which there is room for more queries than there are, and for pages that nobody reads."""
    query, keys, _, _ = case()
    for attend in (attend_gathered, attend_strips):
        assert check_attention(attend, query, keys, is_captured=True) > 0

    def by_bounds(query, keys, values, entries, *how):
        last = entries.table.shape[1] * PAGE
        return attend_gathered(query, keys, values, replace(entries, used=entries.used.clamp(min=last)), *how)

    with pytest.raises(ValueError, match="differs from the reference by"):
        check_attention(by_bounds, query, keys, is_captured=True)


def test_a_kernel_that_knows_no_windows_is_found_out_where_there_is_one():
    query, keys, _, _ = case()
    windowless = lambda *args: attend_strips(*args[:5])  # noqa: E731
    assert check_attention(windowless, query, keys) > 0
    with pytest.raises(ValueError, match="differs from the reference by"):
        check_attention(windowless, query, keys, has_window=True)


def test_of_kernels_that_are_right_the_fastest_is_taken():
    query, keys, _, _ = case()

    def slow(*args):
        time.sleep(0.02)
        return attend_gathered(*args)

    def fails(*_):
        raise RuntimeError("no kernel image is available")

    wrong = lambda *args: 1.1 * attend_strips(*args)  # noqa: E731
    kernels = {"wrong": wrong, "slow": slow, "fails": fails, "fast": attend_gathered}
    for is_captured in (False, True):
        assert _fastest(list(kernels.items()), query, keys, True, is_captured) == ("fast", attend_gathered)
        useless = [("wrong", wrong), ("fails", fails)]
        assert _fastest(useless, query, keys, False, is_captured) == ("gathered pages", attend_gathered)


def test_which_kernels_a_gpu_may_have(monkeypatch):
    """Those that are installed, in half precision; none that plans on the host in a captured step."""
    for name in ("varlen_attn", "flash_attn_varlen_func"):
        monkeypatch.setattr(attention, name, lambda *_: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flashinfer")
    flash = ["torch's varlen attention", "torch's varlen attention", "flash-attn"]
    half, full, eight = torch.bfloat16, torch.float32, torch.float8_e4m3fn

    def names(*args):
        return [name for name, _ in _candidates(*args)]

    assert names(half, half, False) == [*flash, "FlashInfer", "compiled flex attention"]
    assert names(half, half, True) == [*flash, "compiled flex attention"]
    assert names(full, full, False) == ["compiled flex attention"] and names(half, eight, True) == []
    for name in ("varlen_attn", "flash_attn_varlen_func"):
        monkeypatch.setattr(attention, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert names(half, half, False) == ["compiled flex attention"]


def test_numbers_of_a_step_are_brought_together_and_over_those_before():
    lists = [([3, 1, 2], torch.long), ([7], torch.int32), ([0.5, 0.25], torch.float32), ([], torch.long)]
    numbers = StepNumbers(lists, "cpu")
    tensors = numbers.tensors
    # On another device they go there from memory of the host.
    away = copy.copy(numbers)
    away._is_here = False
    for writer, first in ((numbers, 3), (numbers, 5), (away, 9)):
        writer.write([([first, 1, 2], torch.long), *lists[1:]])
        expected = [torch.tensor([first, 1, 2]), torch.tensor([7], dtype=torch.int32), torch.tensor([0.5, 0.25])]
        assert all(torch.equal(a, b) for a, b in zip(tensors, [*expected, torch.zeros(0).long()], strict=True))
        assert [x.dtype for x in tensors] == [dtype for _, dtype in lists]
    assert all(x.data_ptr() % 64 == tensors[0].data_ptr() % 64 for x in tensors[:3])
    for other in ([([3, 1], torch.long), *lists[1:]], [([3, 1, 2], torch.int32), *lists[1:]], lists[:3]):
        with pytest.raises(ValueError, match="of a step of another shape"):
            numbers.write(other)


@torch.no_grad()
def test_flash_attention_is_told_the_name_that_it_knows(monkeypatch):
    """It reads it off the module's configuration, which names the packed one once streams have shared a step."""
    model = tiny_model()
    names = []

    def flash(module, query, key, value, attention_mask, **options):
        names.append((module.config._attn_implementation, module.layer_idx, module.is_causal))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model.config.text_config._attn_implementation = "flash_attention_2"
    set_packed_attention(model.model.language_model)
    model(input_ids=dialogue_ids(model.config, [1]), frame_features=random_features(model.config, 1))
    assert names == [("flash_attention_2", layer, True) for layer in range(4)]


def test_on_a_cpu_strips_are_read_in_place():
    query, keys, _, _ = case()
    assert choose_attention(query, keys) == ("strips of pages", attend_strips)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_where_streams_are_not_packed_nothing_changes(text, implementation):
    model = tiny_model(text=text, attn_implementation=implementation)
    ids, features = dialogue_ids(model.config, [2, 3]), random_features(model.config, 5)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with torch.no_grad():
        before = [model(input_ids=ids, frame_features=features, attention_mask=m).logits for m in (None, mask)]
        set_packed_attention(model.model.language_model)
        set_packed_attention(model.model.language_model)
        after = [model(input_ids=ids, frame_features=features, attention_mask=m).logits for m in (None, mask)]
    assert model.config.text_config._attn_implementation == f"packed_{implementation}"
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------------------------------------------------- packing


def streams_alone_and_packed(model, page_size=16):
    """Three streams, in steps of frames and of text; logits and caches of each alone, and of all in one row."""
    pool = new_page_pool(model, 60, 300, page_size=page_size)
    paged, plain = [VideoLLMMoDPagedCache(pool) for _ in range(3)], [model.new_cache() for _ in range(3)]
    steps = [
        [(0, [2]), (1, [1])],
        [(1, []), (2, [1, 2]), (0, [1])],
        [(0, []), (1, []), (2, [])],
        [(2, [3]), (1, [1])],
    ]
    pairs = []
    for number, step in enumerate(steps):
        ids, features, alone = [], [], []
        for stream, runs in step:
            ids.append(
                dialogue_ids(model.config, runs, seed=number * 7 + stream)[:, : 1 + stream if not runs else None]
            )
            inputs = {}
            if runs:
                features.append(random_features(model.config, sum(runs), seed=number + stream))
                inputs["frame_features"] = features[-1]
            alone.append(model(input_ids=ids[-1], cache=plain[stream], **inputs).logits[0])
        lengths, frames = [row.shape[1] for row in ids], [sum(runs) for _, runs in step]
        packed = PackedCaches([paged[stream] for stream, _ in step], lengths, frames, "cpu")
        inputs = {"frame_features": torch.cat(features, dim=1)} if features else {}
        together = model(input_ids=torch.cat(ids, dim=1), cache=packed, **inputs).logits[0]
        frame = model.config.frame_token_id
        packed.commit([None if not runs else (row == frame) for row, (_, runs) in zip(ids, step, strict=True)])
        pairs.append((together, torch.cat(alone)))
    return pairs, paged, plain


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_streams_are_each_stream_alone(scheme):
    pairs, paged, plain = streams_alone_and_packed(tiny_model(**SCHEMES[scheme]))
    for together, alone in pairs:
        assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(paged, plain, strict=True):
        assert mine.lengths == theirs.lengths and mine.get_seq_length() == theirs.get_seq_length()
        for layer, other in zip(mine.layers, theirs.layers, strict=True):
            if theirs.get_seq_length() and other.is_initialized:
                assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
            if getattr(other, "positions", None) is not None:
                assert torch.equal(layer.positions, other.positions)


@torch.no_grad()
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_packed_streams_of_every_text_model(text):
    overrides = {"sliding_window": 30} if text == "mistral" else {}
    pairs, _, _ = streams_alone_and_packed(tiny_model(text=text, text_overrides=overrides))
    for together, alone in pairs:
        assert_close(together, alone, rtol=1e-4, atol=1e-4)
