# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of serving share: the embedded checkpoint, tiny engines, and what streams said."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from tiny import tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor

from videollm_mod.serving import StreamingEngine
from videollm_mod.streaming_videollm_mod import StreamEvent


ROOT = Path(__file__).resolve().parents[1]
NARRATE = "Please narrate the video in real time."
LIMITS = {"max_frames": 12, "max_text_tokens": 160}


@lru_cache
def embedded() -> tuple[Any, Any, list[Any]]:
    """The embedded checkpoint, loaded as remote code, its processor, and the frames of its sample clip."""
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    video = processor.read_video(ROOT / "samples" / "streamworld.mp4", fps=2)
    return model, processor, [frame for _, frame in video]


def tiny_engine(*, router: str = "learned", **options: Any) -> StreamingEngine:
    """An engine of a tiny model, with small limits and pages."""
    return StreamingEngine(tiny_model(mod_router=router), tiny_processor(), page_size=16, **{**LIMITS, **options})


def said(events: list[StreamEvent]) -> list[tuple]:
    """What must not depend on who runs the stream, for each event."""
    return [(event.time, event.frame, event.role, event.text, event.token_ids) for event in events]
