# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pages of a pool: taking and returning them, and a paged cache compared with a growing one."""

import copy
import gc

import pytest
import torch
from counting import CountOperations
from tiny import SCHEMES, HostAndDevice, dialogue_ids, random_features, tiny_model
from torch.testing import assert_close

from videollm_mod import cache_videollm_mod
from videollm_mod.cache_videollm_mod import TokenRun
from videollm_mod.serving import pages
from videollm_mod.serving.pages import OutOfPagesError, VideoLLMMoDPagedCache, new_page_pool


def paged_cache(model, frames=40, text=200, page_size=16, **options):
    return VideoLLMMoDPagedCache(new_page_pool(model, frames, text, page_size=page_size, **options))


def test_consecutive_pages_are_taken_if_there_are_any():
    pool = new_page_pool(tiny_model(), 10, 28, page_size=16)
    assert pool.num_pages == {2: 3, 10: 8}
    first, second = pool.take(10, 3), pool.take(10, 2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pool.give_back(10, first)
    # The pages after page 4 are preferred to the free pages before it.
    assert pool.take(10, 2, after=4) == [5, 6] and pool.take(10, 4) == [0, 1, 2, 7]
    with pytest.raises(OutOfPagesError, match="keep 10 of 10 tokens per frame need 1 pages of 16 entries; 0 of 8"):
        pool.take(10, 1)


def test_a_refused_reservation_leaves_the_pool_unchanged():
    cache = paged_cache(tiny_model(), frames=4, text=40)
    free = {kind: list(pages) for kind, pages in cache.pool.free.items()}
    with pytest.raises(OutOfPagesError):
        cache.reserve(4, 80)
    assert cache.pool.free == free
    cache.reserve(4, 40)
    assert not any(cache.pool.free.values())
    cache.release()
    assert cache.pool.free == free


def test_nothing_is_copied_as_a_paged_cache_grows():
    model = tiny_model()
    cache = paged_cache(model)
    cache.reserve(20, 60)
    places = set()
    with torch.no_grad():
        for step in range(4):
            inputs = {"frame_features": random_features(model.config, 1, seed=step)}
            model(input_ids=dialogue_ids(model.config, [1], seed=step), cache=cache, **inputs)
            places |= {(i, layer.keys.data_ptr(), layer.values.data_ptr()) for i, layer in enumerate(cache.layers)}
    assert len(places) == len(cache.layers)
    # Layer by layer in the pages' own memory: heads and entries are strides.
    assert cache.layers[0].keys.stride(1) == cache.layers[0].keys.shape[-1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_growing_a_paged_cache_never_synchronises(scheme):
    model = tiny_model(**SCHEMES[scheme])
    pool = new_page_pool(model, 40, 200, page_size=16)
    caches = [VideoLLMMoDPagedCache(pool) for _ in range(2)]
    caches[0].reserve(20, 60)
    asked, between = [], []
    for step in range(3):
        for cache in caches:
            inputs = {"frame_features": random_features(model.config, 1, seed=step), "num_frames": [1]}
            with torch.no_grad(), HostAndDevice(cache_videollm_mod, pages) as mode:
                model(input_ids=dialogue_ids(model.config, [1], seed=step), cache=cache, **inputs)
            asked.append(mode.found)
        between.append(VideoLLMMoDPagedCache(pool))
        between[-1].reserve(1, 1)
    # In scattered pages the host sends the slots of entries, and does not wait for the copy.
    assert asked[::2] == [set()] * 3
    assert asked[-1] == {("pages.slots", "lift_fresh"), ("pages._read", "lift_fresh")}
    with HostAndDevice(cache_videollm_mod, pages) as mode:
        caches[0].crop(-1)
    assert mode.found  # cropping asks the device


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reserved", [True, False])
def test_a_paged_cache_works_like_a_growing_one(scheme, reserved):
    """With consecutive pages, and with the scattered pages of two streams that grow in turns."""
    model = tiny_model(**SCHEMES[scheme])
    pool = new_page_pool(model, 60, 400, page_size=16)
    caches, others = [VideoLLMMoDPagedCache(pool) for _ in range(2)], [model.new_cache() for _ in range(2)]
    if reserved:
        for cache in caches:
            cache.reserve(20, 100)
    with torch.no_grad():
        for step in range(4):
            for row, (cache, other) in enumerate(zip(caches, others, strict=True)):
                ids = dialogue_ids(model.config, [2], seed=10 * step + row)
                features = random_features(model.config, 2, seed=10 * step + row)
                logits, expected = (
                    model(input_ids=ids, frame_features=features, cache=x).logits for x in (cache, other)
                )
                assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for cache, other in zip(caches, others, strict=True):
            assert cache.lengths == other.lengths
            for x in (cache, other):
                x.crop(-4)
            runs = [TokenRun(5), TokenRun(21, 2, stays=False), TokenRun(int(other.get_seq_length()) - 26, 6)]
            for x in (cache, other):
                model.evict_tokens(x, runs)
            assert cache.lengths == other.lengths
            ids = dialogue_ids(model.config, [], seed=3)
            logits, expected = (model(input_ids=ids, cache=x).logits for x in (copy.deepcopy(cache), other))
            assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    is_strip = [table.strip is not None for cache in caches for table in cache.tables.values()]
    assert all(is_strip) if reserved else not all(is_strip)


@pytest.mark.parametrize("reserved", [True, False])
def test_evictions_and_crops_launch_little_and_ask_the_device_nothing(reserved):
    """
    With 30 of 32 layers routed, in consecutive and in scattered pages, for which the host sends the slots without
    waiting.
    """
    model = tiny_model(mod_layers="all_deep", text_overrides={"num_hidden_layers": 32})
    pool = new_page_pool(model, 40, 200, page_size=16)
    cache, other = VideoLLMMoDPagedCache(pool), VideoLLMMoDPagedCache(pool)
    ids, features = dialogue_ids(model.config, [2, 2]), random_features(model.config, 4)
    for index in range(2):
        cache.reserve(8 if reserved else 4 * index + 4, 60)
        other.reserve(2 * index + 2, 30)
        with torch.no_grad():
            model(input_ids=ids, frame_features=features, cache=cache)
        runs = [TokenRun(40 * index + 5, 3 * index), TokenRun(11, 1, stays=False), TokenRun(39, 3)]
        with CountOperations() as evicting, HostAndDevice(cache_videollm_mod, pages) as waiting:
            model.evict_tokens(cache, runs)
        with CountOperations() as cropping, waiting:
            cache.crop(-4, num_frames=0)
        assert sum(evicting.counts.values()) <= 10 * 32 and sum(cropping.counts.values()) == 0
        is_strip = all(table.strip is not None for table in cache.tables.values())
        sent = set() if is_strip else {("pages.slots", "lift_fresh"), ("pages._read", "lift_fresh")}
        assert waiting.found == sent and is_strip == (reserved or index == 0)


def test_generate_accepts_a_paged_cache():
    model = tiny_model()
    inputs = {"input_ids": dialogue_ids(model.config, [3]), "frame_features": random_features(model.config, 3)}
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    cache = paged_cache(model)
    assert torch.equal(model.generate(**inputs, **options, cache=cache), expected)
    mask = torch.ones_like(inputs["input_ids"])
    masked = model.generate(**inputs, **options, attention_mask=mask, cache=paged_cache(model))
    assert torch.equal(masked, expected)
    with pytest.raises(ValueError, match="one stream"):
        model.generate(**inputs, **options, num_beams=2, cache=paged_cache(model))


def test_positions_are_written_to_pages_on_another_device():
    """Steps and restored sessions record positions beside the embeddings."""
    cache = paged_cache(tiny_model())
    cache.pool.allocate(1, 2, 8, torch.float32, torch.device("meta"))
    for begin, new in ((0, 3), (3, 1)):
        cache.record_positions(1, torch.arange(new)[None], begin)
        assert cache.get_positions(1).shape == (1, begin + new)
        cache.update(*torch.zeros(2, 1, 2, new, 8, device="meta"), 1)
    assert cache.get_positions(1).is_meta and cache.get_positions(1).shape == (1, 4)


def test_bytes_by_kind_of_layer():
    model = tiny_model()
    cache, other = paged_cache(model), model.new_cache()
    for x in (cache, other):
        with torch.no_grad():
            model(
                input_ids=dialogue_ids(model.config, [3]),
                frame_features=random_features(model.config, 3),
                cache=x,
            )
    entry = 2 * 2 * 8 * 4  # keys and values, heads, dim, bytes
    assert other.lengths == [41, 17, 41, 17]
    assert other.num_bytes_by_kind == {"full": 2 * 41 * entry, "routed": 2 * 17 * entry}
    assert cache.num_bytes_by_kind == {"full": 2 * 48 * entry, "routed": 2 * 32 * entry}
    for x in (cache, other):
        assert x.num_bytes == sum(x.num_bytes_by_kind.values())
    assert cache.pool.num_bytes == entry * 16 * 2 * sum(cache.pool.num_pages.values())


def test_a_paged_cache_in_eight_bits_is_half_as_large_as_in_sixteen():
    model = tiny_model().to(torch.bfloat16)
    inputs = {"input_ids": dialogue_ids(model.config, [3])}
    inputs["frame_features"] = random_features(model.config, 3).to(torch.bfloat16)
    caches = [paged_cache(model), paged_cache(model, dtype=torch.float8_e4m3fn)]
    with torch.no_grad():
        logits = [model(**inputs, cache=cache).logits for cache in caches]
    assert caches[0].num_bytes == 2 * caches[1].num_bytes
    # The first layer's entries are those in sixteen bits, rounded.
    for exact, rounded in zip(*((x.layers[0].keys, x.layers[0].values) for x in caches), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, exact.to(torch.float8_e4m3fn).to(torch.bfloat16))
    assert not torch.equal(*logits)


def test_a_paged_cache_refuses_several_rows():
    model = tiny_model()
    cache = paged_cache(model)
    with pytest.raises(ValueError, match="got 2 rows"):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long), cache=cache)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(1)
    for call in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0, 0]))):
        with pytest.raises(ValueError, match="cannot have 2 rows"):
            call()


def test_garbage_collected_caches_give_their_pages_back():
    """A copy, a copy of an emptied cache, and a copy that runs out of pages."""
    model = tiny_model()
    cache = paged_cache(model, frames=8, text=48)
    with torch.no_grad():
        inputs = {"frame_features": random_features(model.config, 4)}
        model(input_ids=dialogue_ids(model.config, [4]), cache=cache, **inputs)
    left = {kind: len(pages) for kind, pages in cache.pool.free.items()}
    for _ in range(5):
        twin = copy.deepcopy(cache)
        assert twin.lengths == cache.lengths
        del twin
    assert {kind: len(pages) for kind, pages in cache.pool.free.items()} == left
    twins = []
    with pytest.raises(OutOfPagesError):
        twins.extend(copy.deepcopy(cache) for _ in range(5))
    twins.clear()
    gc.collect()
    assert {kind: len(pages) for kind, pages in cache.pool.free.items()} == left
    with pytest.raises(OutOfPagesError):
        cache.reserve(50, 50)
    assert cache.lengths[0] > 0 and {kind: len(pages) for kind, pages in cache.pool.free.items()} == left
    cache.reset()
    assert copy.deepcopy(cache).lengths == [0] * 4 and cache.get_positions(1).shape == (1, 0)
