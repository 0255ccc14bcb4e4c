# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of an engine."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..streaming_videollm_mod import StreamEvent, StreamStep


@dataclass
class EngineStats:
    """
    What an engine has done so far.

    Attributes:
        steps (`int`): Steps of the language model.
        shared_steps (`int`): Steps of several streams.
        mixed_steps (`int`): Steps in which some streams saw frames while others spoke.
        captured_steps (`int`): Steps that ran as captured ones, on CUDA as a graph.
        frames (`int`): Frames that the language model saw. A frame that it sees again after a reply counts twice.
        tokens (`int`): Tokens of replies.
        busy_since (`float`, *optional*): When the engine's thread began its step, by `time.monotonic()`. `None` while
            there is no work.
        dropped (`int`): Dropped frames.
        refused (`int`): Refused streams.
        frame_latencies (`deque[float]`): Seconds from a frame's arrival to the decision on it, for the last 10,000.
        first_word_latencies (`deque[float]`): Seconds from a frame's or question's arrival to the first token of the
            reply, for the last 10,000.
    """

    steps: int = 0
    shared_steps: int = 0
    mixed_steps: int = 0
    captured_steps: int = 0
    frames: int = 0
    tokens: int = 0
    busy_since: float | None = None
    dropped: int = 0
    refused: int = 0
    frame_latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    first_word_latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def count(self, steps: Sequence[StreamStep], *, is_captured: bool) -> None:
        """Count one step of the language model."""
        with_frames = sum(step.num_frames > 0 for step in steps)
        self.steps += 1
        self.captured_steps += is_captured
        self.shared_steps += len(steps) > 1
        self.mixed_steps += 0 < with_frames < len(steps)
        self.frames += sum(step.num_frames for step in steps)

    def count_events(self, events: Sequence[StreamEvent]) -> None:
        """Count the replies among events."""
        for event in events:
            if event.role == "assistant":
                self.first_word_latencies.append(event.latency)
                self.tokens += len(event.token_ids)


__all__ = ["EngineStats"]
