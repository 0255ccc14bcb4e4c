# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What the fuzz tests share: cases by number, limits of time, and what a good error is.

`make fuzz` runs all of them for longer. A case that fails names its number, such as `seed=17`.
"""

import faulthandler
import random
import time as clock
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any

import pytest
from hypothesis import strategies as st


with suppress(ImportError):  # pytest keeps the stream that it does not capture
    from _pytest.faulthandler import fault_handler_stderr_fd_key

# Seconds of processor time that a case may take, and seconds after which the process ends with the stacks of its
# threads.
LONGEST, LONGEST_WAIT = 10, 120
# Longest error message.
LONGEST_MESSAGE = 1200
# Numbers of cases. Each draws all its choices from a generator with that seed.
SEEDS = st.integers(0, 2**32 - 1)
# Values that belong nowhere.
WRONG: list[Any] = [None, True, False, 0, -1, 1, 2, 10**30, 2**63, 0.5, -0.1, 1.5, 1e308, 1e-320]
WRONG += [float("nan"), float("inf"), float("-inf"), "", " ", "1", "\x00", "\ud800", "é" * 50, "x" * 300]
WRONG += [[], [[]], [None], [1, 2], {}, {"": ""}, {"a": [1]}, (), "none", "learned", b"x"]


def run_case(request: pytest.FixtureRequest, kind: str, seed: int, work: Callable[..., Any], *given: Any) -> Any:
    """
    Run `work(chance, *given)` with the generator of a case, within its limits of time.

    A crash or a hang prints the stacks of all threads to stderr. The function that is called there has the name of the
    case, such as `video_case_17`, since no other code runs after a crash.
    """

    def call() -> Any:
        return work(random.Random(f"{kind} {seed}"), *given)

    name = f"{kind}_case_{seed}"
    named = FunctionType(
        call.__code__.replace(co_name=name, co_qualname=name), globals(), name, None, call.__closure__
    )
    faulthandler.dump_traceback_later(LONGEST_WAIT, exit=True, file=_stderr(request))
    begin = clock.process_time()
    try:
        return named()
    finally:
        faulthandler.cancel_dump_traceback_later()
        took = clock.process_time() - begin
        assert took < LONGEST, f"{name} took {took:.1f} s"


def _stderr(request: pytest.FixtureRequest) -> int:
    return request.config.stash.get(fault_handler_stderr_fd_key, 2)


def check_error(error: BaseException, *names: str) -> None:
    """Fail if a message is empty, long or of several lines, or if it names none of these."""
    said = str(error)
    assert said.strip() and len(said) < LONGEST_MESSAGE, repr(error)[:3000]
    assert len(said.splitlines()) == 1, repr(said)
    assert not names or any(name in said for name in names), f"names none of {', '.join(names)}: {said}"


def spoil_bytes(chance: random.Random, data: bytes, others: list[bytes] | None = None) -> bytes:
    """Return bytes with one to six faults: flips, cuts, and chunks that are doubled, removed, swapped or of others."""
    for _ in range(chance.choice([1, 1, 2, 3, 6])):
        data = _spoil_once(chance, data, others or [data]) if data else data
    return data


def _spoil_once(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = chance.randrange(len(data))
    size = min(len(data) - at, chance.choice([1, 2, 4, 16, 100, 1000]))
    before, old, after = data[:at], data[at : at + size], data[at + size :]
    kinds = ("flip", "random", "fill", "size", "cut", "remove", "repeat", "move", "insert")
    how = chance.choice(kinds)
    if how == "flip":
        return before + bytes([old[0] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if how == "random":
        return before + chance.randbytes(size) + after
    if how == "fill":
        return before + chance.choice([b"\0", b"\xff"]) * size + after
    if how == "size":
        return before + chance.choice(SIZES) + data[at + 4 :]
    if how == "cut":
        return before
    if how == "repeat":
        return before + old * chance.choice([2, 3, 50]) + after
    if how == "move":
        to = chance.randrange(len(before) + 1)
        return before[:to] + old + before[to:] + after
    if how == "insert":
        return before + _piece(chance, chance.choice(others)) + after
    return before + after


# Numbers at which sizes overflow.
SIZES = [b"\0\0\0\0", b"\0\0\0\1", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\xf0"]


def _piece(chance: random.Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) or 1)
    return data[at : at + chance.choice([4, 30, 300])]
