# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the test process."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


with suppress(ImportError):  # tests on a GPU run without it
    from hypothesis import HealthCheck, settings

    # `suite` draws the same cases each time. `HYPOTHESIS_PROFILE=fuzz` draws 20 times as many, new ones each time,
    # or `FUZZ_CASES`.
    common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
    settings.register_profile("suite", max_examples=500, derandomize=True, database=None, **common)
    settings.register_profile("fuzz", max_examples=int(os.environ.get("FUZZ_CASES", "10000")), **common)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# With more than one thread, torch starts a pool of processes to compile, and each imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Turn warnings of what a later release removes into errors, if a line of ours causes them."""
    root = Path(__file__).parents[1]
    alone = [path.stem for folder in ("benchmarks", "space", "tests") for path in (root / folder).glob("*.py")]
    own = "|".join(["videollm_mod", "transformers_modules", "tests", *alone])
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:({own})(\.|$)")


def pytest_collection() -> None:
    """Collect no garbage while modules are imported: a third of the time of imports, and hardly any is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave the million objects of imported modules out of every later collection of garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Tests that run in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
