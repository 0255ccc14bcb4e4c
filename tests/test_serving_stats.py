# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of an engine."""

import torch

from videollm_mod.serving import EngineStats
from videollm_mod.streaming_videollm_mod import StreamEvent, StreamStep


def test_steps_and_replies_are_counted():
    stats = EngineStats()
    text, frames = StreamStep([5], [0]), StreamStep([6] * 4, [1, 3], torch.zeros(2, 2, 3))
    for steps in ([text], [text, text], [frames, text], [frames, frames]):
        stats.count(steps, is_captured=len(steps) == 1)
    assert (stats.steps, stats.shared_steps, stats.mixed_steps, stats.captured_steps) == (4, 3, 1, 1)
    assert stats.frames == 6
    stats.count_events(
        [StreamEvent(0.0, 0, "user", "Now?"), StreamEvent(0.5, 1, "assistant", "Yes.", (7, 8), latency=0.2)]
    )
    assert stats.tokens == 2 and list(stats.first_word_latencies) == [0.2]
