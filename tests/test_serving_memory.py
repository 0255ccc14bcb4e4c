# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The cache memory of an engine: what streams reserve, and how many pages captured steps have room for."""

import pytest
import torch
from tiny import tiny_model

from videollm_mod.serving import EngineFullError, VideoLLMMoDPagedCache
from videollm_mod.serving.memory import Room, allocate_pool, most_pages, reserve


def test_a_pool_has_room_for_every_stream_and_the_spare_cache():
    """Frames have 10 tokens, of which routed layers keep 2."""
    room, spare = Room.for_stream(4, 20, max_new_tokens=5), Room(2, 7)
    assert room == (4, 20 + 4 + 5 + 16)
    pool = allocate_pool(tiny_model(), 3, room, spare, page_size=16, dtype=None)
    caches = [VideoLLMMoDPagedCache(pool) for _ in range(4)]
    for cache, own in zip(caches, (room, room, room, spare), strict=True):
        cache.reserve(*own)
    assert all(pages[0].device == torch.device("cpu") for pages in pool.layers)
    # 4 * 2 + 45 entries take 4 pages, and one more for a stream that says more.
    assert most_pages(pool, room, caches[3]) == {2: 5, 10: 7}
    assert most_pages(pool, Room(0, 1), caches[3]) == {2: 2, 10: 2}


def test_a_stream_without_enough_pages_takes_none():
    model = tiny_model()
    pool = allocate_pool(model, 1, Room(4, 40), Room(0, 0), page_size=16, dtype=None)
    free = {kind: list(pages) for kind, pages in pool.free.items()}
    session = model.stream(processor=_NoProcessor(), max_frames=40)
    session.max_text_tokens = 20
    with pytest.raises(EngineFullError, match="40 frames and 20 text tokens beside the 2 that are open"):
        reserve(VideoLLMMoDPagedCache(pool), session, 2)
    assert pool.free == free


class _NoProcessor:
    system_prompt = ""
