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
    "streaming_videollm_mod": ["StreamEvent", "StreamingSession"],
    "video_processing_videollm_mod": ["VideoLLMMoDVideoProcessor"],
    "video_reading_videollm_mod": ["TooManyWaitingError", "read_video", "sample_every"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
