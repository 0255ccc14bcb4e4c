# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A fault ends the stream that it belongs to. The other streams say what they say in an engine without it."""

import gc
import threading
import weakref

import pytest
import torch
from engines import said, tiny_engine
from tiny import random_frames

from videollm_mod.serving import VideoLLMMoDPagedCache
from videollm_mod.serving.faults import run_in_parts
from videollm_mod.streaming_videollm_mod import StreamStep


CPU = torch.device("cpu")
# The interval threshold by which the language model recognises the stream that it fails for.
FAILING = 0.125
WHITE = 255


def events_of_good_streams(monkeypatch, break_model=None, *, with_bad_stream=True, **options):
    """Run two good streams, and a bad one between them that has a white frame. Return the engine and all streams."""
    engine = tiny_engine(max_streams=4, **options)
    if break_model is not None:
        break_model(monkeypatch, engine.model)
    streams = [engine.open(max_new_tokens=3, interval_threshold=0.9, chunk_frames=2)]
    bad = engine.open(max_new_tokens=3, interval_threshold=FAILING) if with_bad_stream else None
    streams.append(engine.open(max_new_tokens=3, interval_threshold=0.5))
    for index in range(3):
        for number, stream in enumerate(streams):
            stream.push(random_frames(3, seed=10 * number + index))
        if with_bad_stream and not bad.is_done:
            bad.push(random_frames(2, seed=index))
            bad.push(random_frames(1, seed=index) if index == 0 else random_frames(1) * 0 + WHITE)
        engine.run()
    return engine, streams, bad


def fails_at_a_white_frame(monkeypatch, model):
    encode = model.encode_frames

    def broken(pixel_values):
        if (pixel_values.amin(dim=(1, 2, 3)) == pixel_values.amax(dim=(1, 2, 3))).any():
            raise ArithmeticError("a white frame")
        return encode(pixel_values)

    monkeypatch.setattr(model, "encode_frames", broken)


def features_of_a_white_frame_have_another_shape(monkeypatch, model):
    encode = model.encode_frames

    def broken(pixel_values):
        is_white = pixel_values.amin() == pixel_values.amax()
        return encode(pixel_values)[:, :4] if is_white else encode(pixel_values)

    monkeypatch.setattr(model, "encode_frames", broken)
    monkeypatch.setattr("videollm_mod.serving.encoding.MOST_FRAMES", 1)


def the_step_fails_for_one_stream(error):
    def break_model(_monkeypatch, model):
        def broken(_model, _args, inputs):
            if (inputs["packed_caches"].thresholds == FAILING).any():
                raise error

        model.register_forward_pre_hook(broken, with_kwargs=True)

    return break_model


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    ("break_model", "kind"),
    [
        (fails_at_a_white_frame, ArithmeticError),
        (features_of_a_white_frame_have_another_shape, Exception),
        (the_step_fails_for_one_stream(ArithmeticError("a bad step")), ArithmeticError),
        (the_step_fails_for_one_stream(torch.OutOfMemoryError("too large a step")), torch.OutOfMemoryError),
    ],
)
def test_a_fault_ends_its_own_stream(monkeypatch, break_model, kind, capture):
    _, alone, _ = events_of_good_streams(monkeypatch, with_bad_stream=False, capture=capture)
    engine, streams, bad = events_of_good_streams(monkeypatch, break_model, capture=capture)
    assert isinstance(bad.error, kind) and bad.is_done
    with pytest.raises(RuntimeError, match="The stream was ended") as raised:
        bad.push(random_frames(1))
    assert raised.value.__cause__ is bad.error
    assert [said(stream.events) for stream in streams] == [said(stream.events) for stream in alone]
    assert all(len(stream.events) > 3 and stream.session.num_frames == 9 for stream in streams)
    assert not any(table.pages for table in bad.session.cache.tables.values()) and bad not in engine.streams
    another = engine.open(max_new_tokens=2)
    another.push(random_frames(2))
    engine.run()
    assert another.session.num_frames == 2


def encodes_two_frames_at_most(monkeypatch, model):
    encode = model.encode_frames

    def small(pixel_values):
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("too many frames")
        return encode(pixel_values)

    monkeypatch.setattr(model, "encode_frames", small)


def encodes_at_the_second_try(monkeypatch, model):
    encode, counts = model.encode_frames, []

    def flaky(pixel_values):
        counts.append(len(pixel_values))
        if len(counts) % 2:
            raise torch.OutOfMemoryError("once")
        return encode(pixel_values)

    monkeypatch.setattr(model, "encode_frames", flaky)
    monkeypatch.setattr("videollm_mod.serving.encoding.MOST_FRAMES", 1)


def has_memory_for_one_stream(_monkeypatch, model):
    def small(_model, _args, inputs):
        if len(inputs["packed_caches"].on(CPU).entries[10].plan.new) > 1:
            raise torch.OutOfMemoryError("too many streams")

    model.register_forward_pre_hook(small, with_kwargs=True)


@pytest.mark.parametrize(
    "break_model", [encodes_two_frames_at_most, encodes_at_the_second_try, has_memory_for_one_stream]
)
def test_too_little_memory_for_all_ends_none(monkeypatch, break_model):
    _, expected, other = events_of_good_streams(monkeypatch)
    monkeypatch.undo()
    _, streams, bad = events_of_good_streams(monkeypatch, break_model)
    assert [said(s.events) for s in (*streams, bad)] == [said(s.events) for s in (*expected, other)]
    assert bad.error is None and bad.session.num_frames == 9


def test_a_step_that_fails_is_not_counted():
    engine = tiny_engine(max_streams=1)
    cache = VideoLLMMoDPagedCache(engine.pool)
    engine.runner.execute([cache], [StreamStep([7, 8], [1])])
    expected = engine.runner.execute([cache], [StreamStep([9], [0])])[0].logits
    twin = VideoLLMMoDPagedCache(engine.pool)
    engine.runner.execute([twin], [StreamStep([7, 8], [1])])
    layer = engine.model.model.language_model.layers[-1]
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.runner.execute([twin], [StreamStep([11], [0])])
    hook.remove()
    assert twin.lengths == [2] * 4 and engine.stats.steps == 3
    assert torch.equal(engine.runner.execute([twin], [StreamStep([9], [0])])[0].logits, expected)


def test_steps_that_cannot_be_captured_run_uncaptured(monkeypatch, caplog):
    _, expected, _ = events_of_good_streams(monkeypatch)

    def no_memory(_run):
        raise torch.OutOfMemoryError("no memory for a graph")

    engine = tiny_engine(max_streams=1, capture=True)
    engine._captured._capture = no_memory
    monkeypatch.setattr("videollm_mod.serving.captured_step.logger.propagate", True)
    stream = engine.open(max_new_tokens=3, interval_threshold=0.9, chunk_frames=2)
    for index in range(3):
        stream.push(random_frames(3, seed=index))
        engine.run()
    assert said(stream.events) == said(expected[0].events) and engine.stats.captured_steps == 0
    assert caplog.text.count("StepShape(seeing=1, frames=1, speaking=0, reading=0) run uncaptured: no memory") <= 1


def test_an_error_of_the_engine_reaches_listeners(monkeypatch):
    engine = tiny_engine(max_streams=1)
    monkeypatch.setattr(engine, "_choose_batch", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    with engine:
        stream = engine.open()
        stream.push(random_frames(1))
        with pytest.raises(RuntimeError, match="The stream was ended: division by zero"):
            list(stream)
    with pytest.raises(RuntimeError, match="The engine has stopped: division by zero"):
        engine.open()


def test_items_run_in_halves_until_the_failing_one_is_found():
    calls = []

    def run(items):
        calls.append(list(items))
        if 5 in items:
            raise ValueError("five")
        return [10 * item for item in items]

    results = run_in_parts(run, range(8), CPU)
    assert results[:5] + results[6:] == [0, 10, 20, 30, 40, 60, 70] and str(results[5]) == "five"
    assert calls == [[*range(8)], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [4], [5], [6, 7]]
    assert run_in_parts(run, [], CPU) == []


def test_a_single_item_is_tried_again_if_memory_ran_out():
    calls = []

    def run(items):
        calls.append(list(items))
        raise MemoryError if len(calls) % 2 else ValueError

    assert [type(x) for x in run_in_parts(run, [3], CPU)] == [ValueError]
    assert [type(x) for x in run_in_parts(lambda _: [][0], [3], CPU)] == [IndexError]
    assert calls == [[3], [3]]


def test_an_attempt_that_failed_keeps_no_memory():
    references, attempts = [], []

    def run(items):
        assert all(reference() is None for reference in references)
        tensor = torch.zeros(3)
        references.append(weakref.ref(tensor))
        attempts.append(len(items))
        raise torch.OutOfMemoryError("none left")

    gc.disable()
    try:
        errors = run_in_parts(run, [0, 1], CPU)
        # Each item was tried again.
        assert attempts == [2, 1, 1, 1, 1] and [str(error) for error in errors] == ["none left"] * 2
    finally:
        gc.enable()


def test_the_log_shows_where_a_stream_failed(monkeypatch, caplog):
    monkeypatch.setattr("videollm_mod.serving.engine.logger.propagate", True)
    _, _, bad = events_of_good_streams(monkeypatch, fails_at_a_white_frame)
    assert "Stream 1 was ended: a white frame" in caplog.text and "in broken" in caplog.text
    assert bad.error.__traceback__ is None
