# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""VideoLLM-MoD: streaming video language models whose routed layers run on a share of each frame's tokens."""

import importlib
from typing import Any


# Public names by module. Nothing is imported before it is asked for, and nothing is registered.
_PUBLIC = {
    "cache_videollm_mod": ["VideoLLMMoDCache"],
    "configuration_videollm_mod": ["CostEstimate", "VideoLLMMoDConfig"],
    "generation_videollm_mod": ["VideoLLMMoDGenerationMixin", "interval_rule"],
    "modeling_videollm_mod": [
        "VideoLLMMoDForConditionalGeneration",
        "VideoLLMMoDModel",
        "VideoLLMMoDPreTrainedModel",
    ],
    "processing_videollm_mod": ["VideoLLMMoDProcessor"],
    "speaking_videollm_mod": ["SeenFrame"],
    "stream_format_videollm_mod": ["STREAM_FORMATS"],
    "streaming_videollm_mod": ["StreamEvent", "StreamingSession"],
    "video_processing_videollm_mod": ["VideoLLMMoDVideoProcessor"],
    "reading_ahead_videollm_mod": ["TooManyWaitingError", "sample_every"],
    "video_reading_videollm_mod": ["ReadingReport", "VideoReader", "read_video"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
