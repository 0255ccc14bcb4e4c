# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the test process."""

import gc
import os


# With more than one thread, torch starts a pool of processes to compile, and each imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection() -> None:
    """Collect no garbage while modules are imported: a third of the time of imports, and hardly any is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave the million objects of imported modules out of every later collection of garbage."""
    gc.freeze()
    gc.enable()
