# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reading ahead in a thread, and sampling a live source by the clock."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from videollm_mod import TooManyWaitingError, reading_ahead_videollm_mod, sample_every
from videollm_mod.reading_ahead_videollm_mod import keep_up, read_ahead


@pytest.mark.parametrize("slow", [0.0, 0.1])
def test_sample_every_yields_the_newest_frame_by_the_clock(slow):
    """A camera at 50 fps, sampled every 0.1 s: about every fifth frame, or fewer where the caller is slower."""
    closed = []

    def camera():
        try:
            for index in itertools.count():
                yield index
                time.sleep(0.02)
        finally:
            closed.append(True)

    seen, begin = [], time.monotonic()
    samples = sample_every(camera(), 0.1)
    for at, frame in samples:
        now = time.monotonic() - begin
        assert at <= now < at + 0.5, "the frame is new"
        seen.append((at, frame))
        time.sleep(slow)
        if len(seen) == 6:
            break
    samples.close()
    times, frames = zip(*seen, strict=True)
    assert times[0] == 0.0 and all(b - a > 0.05 for a, b in itertools.pairwise(times))
    assert 0.4 < times[-1] < 2.0 and all(b > a for a, b in itertools.pairwise(frames)) and frames[-1] < 100
    with pytest.raises(OSError, match="unplugged"):
        list(sample_every(unplugged(), 0.01))
    with pytest.raises(TypeError, match="`read_video` opens that"):
        next(sample_every("camera:0", 0.5))
    with pytest.raises(ValueError, match="`seconds` must be a positive number, got 0"):
        next(sample_every([], 0))


def unplugged():
    yield 1
    raise OSError("unplugged")


def test_reading_ahead():
    """A thread reads in order, a limited number ahead; waiting items come together and errors in their place."""
    taken = []

    def source():
        for index in range(20):
            taken.append(index)
            yield index

    ahead = read_ahead(source(), 4, max_waiting=4)
    first = next(ahead)
    assert first[0] == 0
    deadline = time.monotonic() + 30
    while len(taken) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(taken) <= 1 + 4 + 4 + 1
    rest = list(ahead)
    assert [len(some) for some in read_ahead(iter(range(10)), 4, is_live=False)] == [4, 4, 2]
    assert all(len(some) <= 4 for some in rest) and any(len(some) > 1 for some in rest)
    assert [x for some in (first, *rest) for x in some] == list(range(20))

    def broken():
        yield 1
        raise OSError("the camera is gone")

    found = []
    with pytest.raises(OSError, match="camera is gone"):
        for some in read_ahead(broken(), 2):
            found += some
    assert found == [1]


def test_a_hanging_source_does_not_block_close():
    gone = threading.Event()

    def stalled():
        yield 1
        gone.wait(timeout=60)

    ahead = read_ahead(stalled(), 2)
    assert next(ahead) == [1]
    begin = time.monotonic()
    ahead.close()
    assert time.monotonic() - begin < 30
    gone.set()

    class Unclosable:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def close(self):
            raise OSError("cannot close")

    with pytest.raises(OSError, match="cannot close"):
        list(read_ahead(Unclosable(), 2))


def fast_source(count):
    """Return items, and an event that is set once all were read."""
    gone = threading.Event()

    def source():
        yield from range(count)
        gone.set()

    return source(), gone


@pytest.mark.parametrize("how", [{"when_behind": "drop_oldest"}, {"goes_on": True}])
def test_drop_oldest_drops_and_counts(how):
    dropped = []
    items, gone = fast_source(20)
    ahead = read_ahead(items, 4, **how, max_waiting=3, on_drop=lambda: dropped.append(1))
    taken = next(ahead)
    assert gone.wait(timeout=60)
    for some in ahead:
        taken += some
    assert taken[-3:] == [17, 18, 19] and taken == sorted(taken)
    assert len(taken) + len(dropped) == 20 and dropped
    # Files always wait.
    items, _ = fast_source(20)
    how = {**how, "max_waiting": 3, "on_drop": lambda: dropped.append(2)}
    assert list(read_ahead(items, 20, is_live=False, **how)) == [list(range(20))] and 2 not in dropped


def test_catch_up_fails_after_the_waiting_items():
    items, _ = fast_source(20)
    ahead = read_ahead(items, 4, when_behind="catch_up", max_waiting=5)
    taken = next(ahead)
    # Wait until the thread has filled the queue and failed.
    deadline = time.monotonic() + 60
    while items.gi_frame is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(TooManyWaitingError, match="5 frames wait, the most that may"):
        for some in ahead:
            taken += some
    assert taken == list(range(len(taken))) and 5 <= len(taken) < 20
    with pytest.raises(ValueError, match="`when_behind` is 'wait'"):
        next(read_ahead(iter([]), 4, when_behind="wait"))
    with pytest.raises(ValueError, match="`max_waiting` must be a whole number, at least 1, got 0"):
        next(read_ahead(iter([]), 4, max_waiting=0))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([0.7] * 6, 1), ([0.3] * 6, 0), ([0.7, 0.7, 0.3] * 2, 0), ([0.7] * 3 + [0.3, 0.7] * 3, 1)],
)
def test_sample_every_says_once_that_the_caller_falls_behind(monkeypatch, seconds, expected):
    """With a scripted clock. One long reply is no reason, and a slow camera is none either."""
    now, told = [0.0], []
    wait = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda left: now.__setitem__(0, now[0] + left))
    monkeypatch.setattr(reading_ahead_videollm_mod, "clock", wait)
    monkeypatch.setattr(reading_ahead_videollm_mod.logger, "warning", told.append)

    def lists(*_, **__):
        # The camera has a frame every two seconds.
        for index in range(len(seconds)):
            now[0] = max(now[0], 2.0 * index)
            yield [(now[0], index)]

    monkeypatch.setattr(reading_ahead_videollm_mod, "read_ahead", lists)
    for _, spent in zip(sample_every([], 0.5), seconds, strict=True):
        now[0] += spent
    assert told == expected * [
        "The last frame took 0.7 s, and one every 0.5 s was asked for: the frames that come meanwhile are not seen."
    ]


@pytest.mark.parametrize(
    ("seconds", "rate"), [(0.1, 2), (0.4, 2), (0.41, 1), (0.8, 1), (1.0, 0.5), (1.7, 0.25), (6.0, 0.125)]
)
def test_keep_up_chooses_the_largest_rate_that_the_session_keeps_up_with(seconds, rate):
    session, told, watched = SimpleNamespace(num_frames=0, num_reused=0), [], []
    lists = ([(index / 2, None)] for index in range(60))
    for chosen in keep_up(lists, session, fps=2, on_slow=lambda *slow: told.append(slow)):
        # The first frame compiles, and the second is followed by a reply.
        session.frame_latency = {0: 60.0, 1: seconds + 3}.get(session.num_frames, seconds)
        session.num_frames += 1
        watched += [time for time, _ in chosen]
    assert told == ([] if rate == 2 else [(rate, seconds)])
    apart = [after - before for before, after in itertools.pairwise(watched[2:])]
    assert watched[:3] == [0, 0.5, 1] and set(apart) == {1 / rate}


def test_keep_up_measures_frames_that_are_encoded_and_lists_by_the_frame():
    session, watched, told = SimpleNamespace(num_frames=0, num_reused=0), [], []
    lists = [[(4 * number + index / 2, None) for index in range(8)] for number in range(6)]
    for chosen in keep_up((some for some in lists), session, fps=2, on_slow=lambda *slow: told.append(slow)):
        is_static = session.num_frames == 8
        session.num_reused += 8 * is_static
        session.frame_latency = 0.01 if is_static else 0.9 * len(chosen)
        session.num_frames += len(chosen)
        watched.append(len(chosen))
    assert watched == [8, 8, 8, 8, 2, 2] and told == [(0.5, 0.9)]
