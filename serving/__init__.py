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
"""Many live streams on one model."""

from .engine import EngineFullError, StreamingEngine
from .kernels import attention_in_use
from .pages import OutOfPagesError, VideoLLMMoDPagedCache, VideoLLMMoDPagePool, new_page_pool
from .stats import EngineStats
from .stream import EngineStream


__all__ = [
    "EngineFullError",
    "EngineStats",
    "EngineStream",
    "OutOfPagesError",
    "StreamingEngine",
    "VideoLLMMoDPagePool",
    "VideoLLMMoDPagedCache",
    "attention_in_use",
    "new_page_pool",
]
