# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The engine: each stream says what it says alone, in the memory that it reserved, whatever others do."""

import gc
import threading
import weakref

import pytest
import torch
from engines import LIMITS, NARRATE, ROOT, embedded, said, tiny_engine
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.serving import EngineFullError, OutOfPagesError, StreamingEngine, TooLargeError


@pytest.fixture(scope="module")
def trained():
    return embedded()


def test_serves_a_model_loaded_as_remote_code(trained):
    """The model's classes are not the package's, and the events are those of `model.narrate`."""
    model, processor, frames = trained
    assert type(model).__module__.startswith("transformers_modules")
    video = ROOT / "samples" / "streamworld.mp4"
    expected = list(model.narrate(processor, str(video), query=NARRATE, fps=2))
    with StreamingEngine(model, processor, max_streams=1) as engine:
        stream = engine.open(fps=2)
        stream.ask(NARRATE, reply_now=False)
        stream.push(frames)
        stream.close()
        heard = list(stream)
    assert [(e.time, e.text) for e in heard if e.role == "assistant"] == [
        (e.time, e.text) for e in expected if e.role == "assistant"
    ]
    assert len(heard) > 3


def test_a_stream_that_could_not_evict_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(text_overrides={"rope_parameters": rope})
    engine = StreamingEngine(model, tiny_processor(), page_size=16, **LIMITS)
    with pytest.raises(ValueError, match="rotary positions of type 'dynamic' depend on the length"):
        engine.open()
    assert engine.streams == []


@pytest.mark.parametrize("capture", [False, True])
def test_streams_together_say_what_each_says_alone(trained, capture):
    """They differ in age, rate, state and questions. Some outgrow what they remember, some close early."""
    model, processor, frames = trained
    plans = [
        # (first frame, frames, fps, engine step at which it is opened, prompt, frame of its question)
        (0, 34, 2.0, 0, NARRATE, 9),
        (5, 17, 2.0, 0, NARRATE, None),
        (3, 30, 1.0, 4, None, 2),
        (8, 9, 2.0, 7, NARRATE, 8),
        (11, 20, 4.0, 9, NARRATE, 1),
    ]
    engine = StreamingEngine(model, processor, max_streams=len(plans), page_size=64, capture=capture, **LIMITS)
    alone, streams = [], {}
    for begin, count, fps, _, prompt, question in plans:
        session = model.stream(processor, fps=fps, **LIMITS)
        if prompt:
            session.ask(prompt, reply_now=False)
        for index in range(count):
            session.push(frames[(begin + index) % len(frames)])
            if index == question:
                session.ask("What do you see?")
        session.close()
        alone.append(session)
    shown = [0] * len(plans)
    while any(count < plan[1] for count, plan in zip(shown, plans, strict=True)):
        for index, (begin, count, fps, opened, prompt, question) in enumerate(plans):
            if engine.stats.steps < opened or shown[index] == count:
                continue
            if index not in streams:
                streams[index] = engine.open(fps=fps)
                if prompt:
                    streams[index].ask(prompt, reply_now=False)
            # The first stream's frames come two at a time.
            for _ in range(min(2 - min(index, 1), count - shown[index])):
                streams[index].push(frames[(begin + shown[index]) % len(frames)])
                if shown[index] == question:
                    streams[index].ask("What do you see?")
                shown[index] += 1
            if shown[index] == count:
                streams[index].close()
        engine.step()
    engine.run()
    for index, session in enumerate(alone):
        assert said(streams[index].events) == said(session.events), index
        assert streams[index].is_done and streams[index].session.num_frames == plans[index][1]
    assert sum(event.role == "assistant" for session in alone for event in session.events) > 15
    stats = engine.stats
    assert stats.shared_steps > 0.5 * stats.steps and stats.mixed_steps > 5
    assert (stats.captured_steps > 0) == capture
    # Long texts run uncaptured, and so does a stream that catches up while another speaks.
    assert not capture or stats.captured_steps > 0.75 * stats.steps
    assert stats.frames >= sum(plan[1] for plan in plans) and stats.tokens > 50
    # All memory is free again, except the pages of dummy streams.
    tables = engine._captured.spare.tables if capture else {}
    spare = {kind: len(tables[kind].pages) if capture else 0 for kind in engine.pool.num_pages}
    assert {kind: len(pages) + spare[kind] for kind, pages in engine.pool.free.items()} == engine.pool.num_pages


@pytest.mark.parametrize(
    ("text", "router", "capture"),
    [("llama", "learned", None), ("qwen3", "learned", None), ("llama", "change", None), ("llama", "change", True)],
)
def test_untrained_streams_with_different_thresholds(text, router, capture):
    """Models that babble, with a different interval threshold for each stream."""
    model, processor = tiny_model(text=text, mod_router=router), tiny_processor()
    thresholds = [0.0, 1.0, 0.5]
    options = {**LIMITS, "output_router_scores": True}
    engine = StreamingEngine(model, processor, max_streams=3, page_size=16, capture=capture, **options)
    streams = [engine.open(interval_threshold=x, max_new_tokens=3) for x in thresholds]
    for index, stream in enumerate(streams):
        stream.push(random_frames(6, seed=index))
    engine.run()
    for index, (stream, threshold) in enumerate(zip(streams, thresholds, strict=True)):
        session = model.stream(processor, interval_threshold=threshold, max_new_tokens=3, **options)
        session.push(random_frames(6, seed=index))
        assert said(stream.events) == said(session.events)
        assert set(stream.session.kept_tokens) == set(session.kept_tokens) == {1, 3}
        for layer, kept in session.kept_tokens.items():
            assert torch.equal(stream.session.kept_tokens[layer], kept)
    assert len(streams[1].events) == 6


def test_a_cache_in_eight_bits_has_a_quarter_of_the_size(trained):
    model, processor, frames = trained
    engines = [
        StreamingEngine(model, processor, max_streams=1, cache_dtype=x, **LIMITS) for x in (None, torch.float8_e4m3fn)
    ]
    for engine in engines:
        stream = engine.open()
        stream.ask(NARRATE, reply_now=False)
        stream.push(frames)
        assert len(list(stream)) > 1
    assert engines[0].pool.num_bytes == 4 * engines[1].pool.num_bytes


def test_the_stream_that_waited_longest_is_served_first():
    """With room for one stream per step, all are served in turn."""
    engine = tiny_engine(max_streams=3, max_batch_tokens=1)
    streams = [engine.open(chunk_frames=1, max_new_tokens=2) for _ in range(3)]
    for stream in streams:
        stream.push(random_frames(4))
    counts = []
    while any(stream.num_waiting for stream in streams):
        engine.step()
        counts.append([stream.session.num_frames for stream in streams])
    assert all(max(seen) - min(seen) <= 1 for seen in counts) and len(counts) >= 12


def test_a_stream_that_does_not_fit_is_refused_until_another_is_closed():
    engine = tiny_engine(max_streams=2)
    first, _ = engine.open(), engine.open()
    with pytest.raises(EngineFullError, match="No room for another stream of 12 frames.*beside the 2 that are open"):
        engine.open()
    assert engine.stats.refused == 1
    first.push(random_frames(1))
    first.close()
    with pytest.raises(ValueError, match="closed; open another with `engine.open"):
        first.push(random_frames(1))
    engine.run()
    assert first.is_done and first.session.num_frames == 1
    assert engine.open().session.num_frames == 0
    with pytest.raises(EngineFullError):
        engine.open(max_frames=4, max_text_tokens=16)


def test_opening_waits_for_the_memory_of_streams_that_were_closed_with_discard():
    """The engine's thread frees it after its step, also for a client that comes as soon as another has left."""
    with tiny_engine(max_streams=1) as engine:
        for _ in range(3):
            with engine.changed:  # the engine's thread cannot come between
                stream = engine.open()
                stream.push(random_frames(2))
                stream.close(discard=True)
                following = engine.open()
            assert stream.is_done and engine.streams == [following] and engine.stats.refused == 0
            following.close(discard=True)
        left = engine.open()
        left.pause()
        left.close(discard=True)
        with pytest.raises(EngineFullError, match="beside the 1 that are open"):
            engine.open()  # one that is paused does not end


def test_opening_fails_if_the_engine_dies_while_it_waits_for_memory(monkeypatch):
    engine, is_waiting = tiny_engine(max_streams=1), threading.Event()
    wait, found = engine.changed.wait, []

    def wait_and_tell(timeout=None):
        if threading.current_thread() is opener:
            is_waiting.set()
        return wait(timeout)

    def die(_):
        reached.set()
        assert is_waiting.wait(30)
        raise RuntimeError("the device has failed")

    def open_another():
        try:
            found.append(engine.open())
        except RuntimeError as error:
            found.append(error)

    reached, opener = threading.Event(), threading.Thread(target=open_another)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(engine.changed, "wait", wait_and_tell)
    monkeypatch.setattr(engine, "_run_batch", die)
    with engine:
        first = engine.open()
        first.push(random_frames(1))
        assert reached.wait(30)
        first.close(discard=True)
        opener.start()
        opener.join(30)
    assert "The engine has stopped: the device has failed" in str(found[0]), found
    assert not engine.streams
    assert {kind: len(pages) for kind, pages in engine.pool.free.items()} == engine.pool.num_pages


def test_a_stream_that_never_fits_is_refused_with_the_name_of_its_limit():
    engine = tiny_engine(max_streams=2)
    for limits in ({"max_frames": 150}, {"max_text_tokens": 5000}, {"max_frames": 150, "max_text_tokens": 1}):
        with pytest.raises(TooLargeError, match=f"^`{next(iter(limits))}` is too large"):
            engine.open(**limits)
    assert engine.stats.refused == 0
    assert engine.open(max_frames=16, max_text_tokens=200).session.max_frames == 16  # more than its share


def test_a_stream_that_outgrows_its_memory_ends_and_others_continue(trained):
    """Text after the last frame cannot be evicted, so a stream that only asks runs out of pages."""
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=2, page_size=16, max_frames=4, max_text_tokens=64)
    greedy, modest = engine.open(), engine.open()
    for stream in (greedy, modest):
        stream.push(frames[:2])
    for _ in range(60):
        greedy.ask("What do you see?")
    engine.run()
    assert isinstance(greedy.error, OutOfPagesError) and greedy.is_done and greedy.num_waiting == 0
    with pytest.raises(RuntimeError, match="outgrown the memory of 4 frames and 64 text tokens"):
        greedy.ask("And now?")
    with pytest.raises(RuntimeError, match="The stream was ended"):
        list(greedy)
    modest.push(frames[2:4])
    modest.ask("What do you see?")
    engine.run()
    session = model.stream(processor, max_frames=4, max_text_tokens=64)
    session.push(frames[:4])
    session.ask("What do you see?")
    assert said(modest.events) == said(session.events)


def test_a_stream_takes_at_most_twice_the_memory_that_it_has_reserved():
    """One that only asks leaves room for others. Text near the limit beside as much that is remembered still fits."""
    engine = tiny_engine(max_streams=4, max_new_tokens=1)
    greedy = engine.open(max_new_tokens=1)
    reserved = {kind: len(table.pages) for kind, table in greedy.session.cache.tables.items()}
    greedy.push(random_frames(1))
    for _ in range(60):
        if not greedy.is_done:
            assert all(len(table.pages) <= 2 * reserved[x] for x, table in greedy.session.cache.tables.items())
            greedy.ask("What do you see now, and what was there before?")
            engine.run()
    assert isinstance(greedy.error, OutOfPagesError) and "twice what it has reserved" in str(greedy.error)
    busy = [engine.open(max_new_tokens=1) for _ in range(2)]
    for index in range(4):
        busy[0].push(random_frames(2, seed=index), time=[2 * index, 2 * index + 1])
        busy[0].ask("word " * 30)
        engine.run()
    assert busy[0].error is None and busy[0].session.num_frames == 8


@pytest.mark.parametrize(
    "name", ["max_streams", "max_frames", "max_text_tokens", "max_batch_tokens", "max_waiting", "page_size"]
)
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number, at least 1, got 0"):
        StreamingEngine(tiny_model(), tiny_processor(), **{**LIMITS, name: 0})


def test_by_default_a_step_has_room_for_a_frame_of_every_stream():
    assert tiny_engine(max_streams=2).max_batch_tokens == 2048
    # A frame has ten tokens and a separator.
    assert tiny_engine(max_streams=200).max_batch_tokens == 2200


def test_by_default_a_stream_stays_within_the_context(trained):
    model, processor, _ = trained
    engine = StreamingEngine(model, processor, max_streams=1)
    # The checkpoint says what to remember of frames, and its model has 16384 positions, enough for the most text.
    assert (engine.max_frames, engine.max_text_tokens) == (60, 2048)
    session = engine.open().session
    assert (session.max_frames, session.sink_frames, session.max_text_tokens) == (60, 2, 128)
    # A tiny model says nothing: it has 2048 positions, and a frame has 11 tokens.
    engine = StreamingEngine(tiny_model(), tiny_processor(), max_streams=1)
    assert (engine.max_frames, engine.max_text_tokens) == (139, (2048 - 139 * 11) // 2)
    assert engine.open().session.max_text_tokens == engine.max_text_tokens


def test_refuses_an_unknown_policy():
    with pytest.raises(ValueError, match="'catch_up', 'drop_oldest', 'block'"):
        tiny_engine(when_behind="drop")
    with pytest.raises(ValueError, match="`when_behind` is 'wait'"):
        tiny_engine().open(when_behind="wait")
    with pytest.raises(ValueError, match="`max_waiting` must be a whole number, at least 1, got 0"):
        tiny_engine().open(max_waiting=0)


def test_a_running_engine_serves_several_threads(trained):
    model, processor, frames = trained
    expected = model.stream(processor, **LIMITS)
    expected.ask(NARRATE, reply_now=False)
    for frame in frames:
        expected.push(frame)
    expected.close()
    heard = {}
    with StreamingEngine(model, processor, max_streams=3, **LIMITS) as engine:

        def camera(name):
            stream = engine.open(when_behind="block", max_waiting=4)
            listener = threading.Thread(target=lambda: heard.update({name: list(stream)}))
            listener.start()
            stream.ask(NARRATE, reply_now=False)
            for frame in frames:
                stream.push(frame)
            stream.close()
            listener.join(timeout=120)

        cameras = [threading.Thread(target=camera, args=(name,)) for name in range(3)]
        for thread in cameras:
            thread.start()
        for thread in cameras:
            thread.join(timeout=120)
    assert not engine.is_running and set(heard) == {0, 1, 2}
    for events in heard.values():
        assert said(events) == said(expected.events)


def test_leaving_the_context_ends_open_streams():
    with tiny_engine(max_streams=1) as engine:
        stream = engine.open()
        stream.push(random_frames(1))
    assert list(stream) == stream.events and stream.is_done and not engine.streams


def broken(*_):
    raise ArithmeticError("no such word")


@pytest.mark.parametrize("is_running", [False, True])
def test_an_error_in_a_stream_ends_only_that_stream(trained, is_running):
    """A logits processor that raises during a step of several streams: the others get their results."""
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=3, **LIMITS)
    streams = [engine.open(), engine.open(logits_processor=broken), engine.open()]

    def show():
        for stream in streams:
            stream.push(frames[:4])
            stream.ask("What do you see?")
        for stream in (streams[0], streams[2]):
            stream.close()

    if is_running:
        with engine.changed:
            show()
        with engine:
            heard = [list(streams[0]), list(streams[2])]
    else:
        show()
        engine.run()
        heard = [streams[0].events, streams[2].events]
    alone = model.stream(processor, **LIMITS)
    alone.push(frames[:4])
    alone.ask("What do you see?")
    for events in heard:
        assert said(events) == said(alone.events)
    assert isinstance(streams[1].error, ArithmeticError) and not engine.streams
    with pytest.raises(RuntimeError, match="no such word"):
        streams[1].push(frames[:1])
    # Its events come before the error, however often it is iterated.
    rest = []
    with pytest.raises(RuntimeError, match="The stream was ended: no such word"):
        rest.extend(streams[1])
    with pytest.raises(RuntimeError, match="no such word"):
        list(streams[1])
    assert all(not stream.session.cache.tables[kind].pages for stream in streams for kind in engine.pool.num_pages)


def test_all_cache_memory_is_allocated_at_construction():
    engine = tiny_engine(max_streams=2)
    taken = engine.pool.num_bytes
    assert taken == sum(pages * 16 * 2 * 2 * 8 * 4 * 2 for pages in engine.pool.num_pages.values())
    engine.open(max_new_tokens=2).push(random_frames(3))
    engine.run()
    assert engine.pool.num_bytes == taken


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("how", ["closed", "open", "failed", "running"])
def test_an_engine_is_freed_with_its_last_reference(capture, how):
    """Memory on a device must not wait for garbage collection."""
    engine = tiny_engine(max_streams=2, capture=capture)
    if how == "running":
        with engine:
            stream = engine.open(max_new_tokens=2)
            stream.push(random_frames(2))
            stream.close()
            list(stream)
    else:
        stream = engine.open(max_new_tokens=2, logits_processor=broken if how == "failed" else None)
        stream.push(random_frames(2))
        stream.ask("What is there?")
        engine.run()
        assert isinstance(stream.error, ArithmeticError) == (how == "failed")
        if how == "closed":
            stream.close()
            engine.run()
    assert (engine.stats.captured_steps > 0) == capture
    references = [weakref.ref(x) for x in (engine, engine.pool, engine.pool.layers[0][0])]
    gc.disable()
    try:
        del engine
        assert references[0]() is None
        del stream
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


def test_a_stream_does_not_keep_its_engine():
    stream = tiny_engine(max_streams=1).open()
    with pytest.raises(RuntimeError, match="The engine of this stream is gone: keep a reference to it"):
        stream.push(random_frames(1))
