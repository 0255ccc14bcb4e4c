# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Packed rows: the plan of a step, its numbers on the device, and each stream as if alone."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from tiny import (
    SCHEMES,
    TEXT_MODELS,
    CheckIndices,
    dialogue_ids,
    random_features,
    random_frames,
    tiny_model,
    tiny_processor,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from videollm_mod.cache_videollm_mod import use_grouped_attention
from videollm_mod.serving import OutOfPagesError, StreamingEngine, VideoLLMMoDPagedCache, new_page_pool, packed_cache
from videollm_mod.serving.kernels import attend_gathered
from videollm_mod.serving.memory import Room, allocate_pool
from videollm_mod.serving.packed_cache import DeviceNumbers, PackedCaches, commit, plan_step, set_packed_attention
from videollm_mod.serving.step import PackedStep
from videollm_mod.streaming_videollm_mod import StreamStep


def test_a_plan_is_made_of_lists_and_changes_nothing():
    """One stream has a frame of 10 tokens (routed layers keep 2), the other one token of text."""
    model = tiny_model()
    pool = new_page_pool(model, 20, 100, page_size=16)
    caches = [VideoLLMMoDPagedCache(pool) for _ in range(2)]
    frame, features = [8] * 10, random_features(model.config, 1)[0]
    steps = [StreamStep([5, 6, *frame], [11], features, 0.3), StreamStep([7], [0])]
    for cache, step in zip(caches, steps, strict=True):
        cache.make_room(len(step.ids), step.num_frames)
    free = {kind: list(pages) for kind, pages in pool.free.items()}
    plan = plan_step(caches, steps, 0.7)
    assert plan == plan_step(caches, steps, 0.7)
    assert free == pool.free and [cache.lengths for cache in caches] == [[0] * 4] * 2 and pool.layers == [None] * 4
    assert plan.ids == [5, 6, *frame, 7] and plan.ends == [11, 12] and plan.thresholds == [0.3, 0.7]
    assert plan.positions == [*range(12), 0]
    assert plan.entries[10].new == [12, 1] and plan.entries[2].new == [4, 1]
    assert plan.entries[2].slots == [0, 1, 2, 3, 16] and plan.entries[2].pages == [[0], [1]]
    shapes = [x.shape for x in PackedCaches(pool, plan, "cpu").on(torch.device("cpu")).numbers.tensors]
    assert shapes == [(len(numbers),) for numbers, _ in plan.numbers()]
    commit(plan, caches, frame_token_id=8)
    assert [cache.lengths for cache in caches] == [[12, 4, 12, 4], [1] * 4]
    with pytest.raises(ValueError, match="part of a frame"):
        caches[0].crop(-1)
    following = plan_step(caches, [steps[1]] * 2, 0.7)
    assert following.positions == [12, 1] and following.entries[2].lengths == [5, 2]


def test_pages_are_reserved_before_a_step_and_not_by_its_plan():
    model = tiny_model()
    cache = VideoLLMMoDPagedCache(new_page_pool(model, 1, 16, page_size=16))
    with pytest.raises(OutOfPagesError):
        cache.make_room(100, 0)
    plan = plan_step([cache], [StreamStep([5], [0])], 0.7)
    assert plan.entries[10].pages == [[]]


def test_numbers_of_a_step_are_brought_together_and_overwritten_in_place():
    lists = [([3, 1, 2], torch.long), ([7], torch.int32), ([0.5, 0.25], torch.float32), ([], torch.long)]
    numbers = DeviceNumbers(lists, "cpu")
    tensors = numbers.tensors
    for first in (3, 5):
        numbers.overwrite([([first, 1, 2], torch.long), *lists[1:]])
        expected = [torch.tensor([first, 1, 2]), torch.tensor([7], dtype=torch.int32), torch.tensor([0.5, 0.25])]
        assert all(torch.equal(a, b) for a, b in zip(tensors, [*expected, torch.zeros(0).long()], strict=True))
        assert [x.dtype for x in tensors] == [dtype for _, dtype in lists]
    assert all(x.data_ptr() % 64 == tensors[0].data_ptr() % 64 for x in tensors[:3])
    for other in ([([3, 1], torch.long), *lists[1:]], [([3, 1, 2], torch.int32), *lists[1:]], lists[:3]):
        with pytest.raises(ValueError, match="a step of another shape"):
            numbers.overwrite(other)


@torch.no_grad()
def test_flash_attention_gets_its_own_name(monkeypatch):
    """It reads the name from the module's configuration, which names the packed implementation."""
    model = tiny_model()
    names = []

    def flash(module, query, key, value, attention_mask, **options):
        names.append((module.config._attn_implementation, module.layer_idx, module.is_causal))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config.text_config._attn_implementation = "flash_attention_2"
    set_packed_attention(model.model.language_model)
    model(input_ids=dialogue_ids(model.config, [1]), frame_features=random_features(model.config, 1))
    assert names == [("flash_attention_2", layer, True) for layer in range(4)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_rows_that_are_not_packed_do_not_change(text, implementation):
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


@torch.no_grad()
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_an_engine_uses_can_be_pickled_for_another_process(duplicate, is_grouped):
    """Only processes with an engine know the engine's attention."""
    model = tiny_model()
    text = model.model.language_model
    if is_grouped:
        use_grouped_attention(text)
    StreamingEngine(model, tiny_processor(), page_size=16, max_frames=12, max_text_tokens=160)
    twin, name = duplicate(model), "grouped_sdpa" if is_grouped else "sdpa"
    assert (
        twin.config.text_config._attn_implementation == twin.model.language_model.config._attn_implementation == name
    )
    assert text.config._attn_implementation == f"packed_{name}", "the engine goes on"
    ids, features = dialogue_ids(model.config, [2]), random_features(model.config, 2)
    assert torch.equal(*(x(input_ids=ids, frame_features=features).logits for x in (model, twin)))


def streams_alone_and_packed(model, page_size=16):
    """Three streams, in steps of frames and of text: logits and caches of each alone, and of all in one row."""
    set_packed_attention(model.model.language_model)
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
        parts = []
        for row, (stream, runs) in zip(ids, step, strict=True):
            frame_features = random_features(model.config, sum(runs), seed=number + stream)[0] if runs else None
            last = [i for i in range(row.shape[1]) if row[0, i] == model.config.frame_token_id][9::10]
            parts.append(StreamStep(row[0].tolist(), last, frame_features))
            paged[stream].make_room(row.shape[1], sum(runs))
        caches = [paged[stream] for stream, _ in step]
        plan = plan_step(caches, parts, 0.7)
        packed = PackedCaches(pool, plan, "cpu")
        inputs = {"frame_features": torch.cat(features, dim=1)} if features else {}
        inputs |= {"cache": packed, "packed_caches": packed, "position_ids": packed.positions[None]}
        together = model(input_ids=packed.ids[None], **inputs).logits[0]
        commit(plan, caches, model.config.frame_token_id, packed.frames)
        pairs.append((together, torch.cat(alone)))
    return pairs, paged, plain


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_streams_equal_each_stream_alone(scheme):
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


@pytest.mark.parametrize("engine_first", [True, False])
def test_sessions_attend_by_groups_beside_an_engine(engine_first):
    model = tiny_model()
    text = model.model.language_model
    for use in (set_packed_attention, use_grouped_attention)[:: 1 if engine_first else -1]:
        use(text)
    assert use_grouped_attention(text) and text.config._attn_implementation == "packed_grouped_sdpa"
    processor, frames = tiny_processor(), random_frames(6)
    options = {"interval_threshold": 1.0, "max_new_tokens": 2, "max_frames": 12}
    expected = tiny_model().stream(processor, cache=tiny_model().new_cache(), **options)
    expected.push(frames)
    session = model.stream(processor, **options)
    session.push(frames)
    assert session.cache.is_grouped and not expected.cache.is_grouped
    with StreamingEngine(model, processor, page_size=16, max_frames=12, max_text_tokens=160) as engine:
        stream = engine.open(interval_threshold=1.0, max_new_tokens=2)
        stream.push(frames)
        stream.close()
        said = [[(event.time, event.token_ids) for event in events] for events in (expected, session, stream)]
    assert len(said[0]) == 6 and said[0] == said[1] == said[2]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("scheme", ["full", "interleaved", "all"])
def test_layers_on_two_gpus_meet_only_numbers_on_their_own(monkeypatch, scheme):
    """Fake tensors know their device, and operations refuse those of another. Numbers are copied once a device."""
    copied = []
    monkeypatch.setattr(DeviceNumbers, "overwrite", lambda self, _: copied.append(self._memory.device.index))
    monkeypatch.setattr(packed_cache, "choose_attention", lambda *_: ("", attend_gathered))
    model = tiny_model(**SCHEMES[scheme])
    parts = {"model": model.model, "model.language_model": model.model.language_model}
    parts["model.language_model.layers"] = model.model.language_model.layers
    names = [f"{name}.{child}" for name, part in parts.items() for child, _ in part.named_children()]
    places = {name: "cuda:0" for name in names if name not in parts} | {"lm_head": "cuda:1"}
    places |= {f"model.language_model.{name}": "cuda:1" for name in ("layers.2", "layers.3", "norm")}
    with FakeTensorMode(allow_non_fake_inputs=True), CheckIndices():
        model = dispatch_model(model, places, main_device="cuda:0", skip_keys=["cache", "past_key_values"])
        set_packed_attention(model.model.language_model)
        pool = allocate_pool(model, 2, Room(4, 40), Room(0, 0), page_size=16, dtype=None)
        assert [str(pages[0].device) for pages in pool.layers] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
        caches = [VideoLLMMoDPagedCache(pool) for _ in range(2)]
        features = random_features(model.config, 1)[0].to("cuda:0")
        steps = [StreamStep([5, *[model.config.frame_token_id] * 10], [10], features), StreamStep([7], [0])]
        for cache, step in zip(caches, steps, strict=True):
            cache.make_room(len(step.ids), step.num_frames)
        plan = plan_step(caches, steps, 0.5)
        outputs = PackedStep(model, pool, plan, features[None], torch.device("cuda:0")).forward()
    assert outputs.logits.shape[0] == 2 and sorted(copied) == [0, 1]
