# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The cache memory of an engine: what streams reserve, and how many pages captured steps have room for."""

import pytest
import torch
from accelerate import cpu_offload
from engines import LIMITS, said
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.serving import EngineFullError, StreamingEngine, VideoLLMMoDPagedCache
from videollm_mod.serving.memory import Room, allocate_pool, device_of, devices_of, most_pages, reserve


def test_a_pool_has_room_for_every_stream_and_the_spare_cache():
    """Frames have 10 tokens, of which routed layers keep 2."""
    room, spare = Room.for_stream(4, 20, max_new_tokens=5), Room(2, 7)
    assert room == (4, 20 + 4 + 5 + 48)
    pool = allocate_pool(tiny_model(), 3, room, spare, page_size=16, dtype=None)
    caches = [VideoLLMMoDPagedCache(pool) for _ in range(4)]
    for cache, own in zip(caches, (room, room, room, spare), strict=True):
        cache.reserve(*own)
    assert all(pages[0].device == torch.device("cpu") for pages in pool.layers)
    # 4 * 2 + 77 entries take 6 pages, and one more for a stream that says more.
    assert most_pages(pool, room, caches[3]) == {2: 7, 10: 9}
    assert most_pages(pool, Room(0, 1), caches[3]) == {2: 2, 10: 2}


def test_a_stream_without_enough_pages_takes_none():
    limits = {"max_streams": 2, "max_frames": 4, "max_text_tokens": 40, "page_size": 16}
    engine = StreamingEngine(tiny_model(), tiny_processor(), **limits)
    pool = engine.pool
    free = {kind: list(pages) for kind, pages in pool.free.items()}
    session = engine.model.stream(engine.processor, max_frames=100)
    with pytest.raises(EngineFullError, match="100 frames and 20 text tokens beside the 0 that are open"):
        reserve(engine, VideoLLMMoDPagedCache(pool), session, 20)
    assert pool.free == free and engine.stats.refused == 1


def test_weights_that_accelerate_keeps_elsewhere_serve_where_they_run():
    """On a GPU they would be on the host. Here they have no data between their calls."""
    found = []
    for is_offloaded in (False, True):
        model = tiny_model()
        if is_offloaded:
            cpu_offload(model.model.language_model, torch.device("cpu"))
            layer = model.model.language_model.layers[0]
            assert next(layer.parameters()).is_meta and device_of(layer) == torch.device("cpu")
            assert devices_of(model) == ["cpu", "meta"]
        engine = StreamingEngine(model, tiny_processor(), max_streams=1, **LIMITS)
        assert {pages[0].device.type for pages in engine.pool.layers} == {"cpu"}
        stream = engine.open(interval_threshold=1.0, max_new_tokens=3)
        stream.push(random_frames(3))
        engine.run()
        found.append(said(stream.events))
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize("how", [{"capture": True}, {"compile_steps": True}])
def test_steps_of_a_model_on_several_devices_are_not_captured(how):
    model = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="a model on several devices, here cpu, meta, cannot be captured"):
        StreamingEngine(model, tiny_processor(), **LIMITS, **how)
    assert StreamingEngine(model, tiny_processor(), **LIMITS)._captured is None
