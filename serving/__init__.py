# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Many live streams on one model."""

from .engine import StreamingEngine
from .kernels import attention_in_use
from .memory import EngineFullError, TooLargeError
from .pages import OutOfPagesError, VideoLLMMoDPagedCache, VideoLLMMoDPagePool, new_page_pool
from .saving import restore_session, save_session
from .stats import EngineStats
from .stream import EngineStream


__all__ = [
    "EngineFullError",
    "EngineStats",
    "EngineStream",
    "OutOfPagesError",
    "StreamingEngine",
    "TooLargeError",
    "VideoLLMMoDPagePool",
    "VideoLLMMoDPagedCache",
    "attention_in_use",
    "new_page_pool",
    "restore_session",
    "save_session",
]
