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
"""Many streams on one model: each says what it says alone, whatever the others do."""

import gc
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import HostAndDevice, random_frames, tiny_model, tiny_processor
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, AutoProcessor, TorchAoConfig
from transformers.utils import logging

from videollm_mod import (
    TooManyWaitingError,
    VideoLLMMoDForConditionalGeneration,
    cache_videollm_mod,
    generation_videollm_mod,
    modeling_videollm_mod,
    routing_videollm_mod,
    streaming_videollm_mod,
)
from videollm_mod.serving import EngineFullError, StreamingEngine, attention
from videollm_mod.serving import engine as engine_module
from videollm_mod.serving.pages import VideoLLMMoDPagedCache
from videollm_mod.streaming_videollm_mod import StreamStep


ROOT = Path(__file__).resolve().parents[1]
NARRATE = "Please narrate the video in real time."
LIMITS = {"max_frames": 12, "max_text_tokens": 160}


@pytest.fixture(scope="module")
def trained():
    """The embedded checkpoint, which has something to say, and the frames of its sample."""
    checkpoint = ROOT
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    video = processor.read_video(ROOT / "samples" / "streamworld.mp4", fps=2)
    return model, processor, [frame for _, frame in video]


def tiny_engine(**options):
    return StreamingEngine(tiny_model(), tiny_processor(), page_size=16, **{**LIMITS, **options})


def said(events):
    return [(event.time, event.frame, event.role, event.text, event.token_ids) for event in events]


def of_stream(events, stream):
    return [event for other, event in events if other is stream]


# ------------------------------------------------------------------------------------------- the same as each alone


@pytest.mark.parametrize("capture", [False, True])
def test_streams_together_say_what_each_says_alone(trained, capture):
    """Of other ages, rates, states and questions, some longer than what they remember, some closed before others."""
    model, processor, frames = trained
    plans = [
        # (first frame, frames, fps, step of the engine at which it is opened, prompt, question at its frame)
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
    # All but long texts, and where one catches up while another speaks.
    assert not capture or stats.captured_steps > 0.75 * stats.steps
    assert stats.frames >= sum(plan[1] for plan in plans) and stats.tokens > 50
    # All memory is free again, but what fills captured steps up.
    spare = {kind: len(table.pages) for kind, table in engine._spare.tables.items()}
    assert {kind: len(pages) + spare[kind] for kind, pages in engine.pool.free.items()} == engine.pool.num_pages


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_untrained_streams_too(text):
    """Models that babble, with an interval threshold of each stream's own."""
    model, processor = tiny_model(text=text), tiny_processor()
    thresholds = [0.0, 1.0, 0.5]
    engine = StreamingEngine(model, processor, max_streams=3, page_size=16, **LIMITS)
    streams = [engine.open(interval_threshold=x, max_new_tokens=3) for x in thresholds]
    for index, stream in enumerate(streams):
        stream.push(random_frames(6, seed=index))
    engine.run()
    for index, (stream, threshold) in enumerate(zip(streams, thresholds, strict=True)):
        session = model.stream(processor, interval_threshold=threshold, max_new_tokens=3, **LIMITS)
        session.push(random_frames(6, seed=index))
        assert said(stream.events) == said(session.events)
        assert set(stream.session.kept_tokens) == set(session.kept_tokens)
        for layer, kept in session.kept_tokens.items():
            assert torch.equal(stream.session.kept_tokens[layer], kept)
    assert len(streams[1].events) == 6


def test_a_stream_whose_memory_is_in_eight_bits(trained):
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


# ------------------------------------------------------------------------------------------ speaking while watching


def test_frames_and_words_share_steps_and_a_question_interrupts(trained):
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=2, **LIMITS)
    speaking, watching = engine.open(), engine.open()
    speaking.push(frames[:4])
    speaking.ask("What do you see?")
    watching.ask(NARRATE, reply_now=False)
    while not speaking.session.events:
        engine.step()
    for _ in range(3):
        engine.step()
    speaking.push(frames[4:8])
    before = engine.stats.mixed_steps
    watching.push(frames[:2])
    engine.step()
    assert engine.stats.mixed_steps == before + 1
    speaking.ask("How many things do you see?", interrupt=True)
    engine.run()
    question, cut, second, answer = speaking.events[:4]
    # The latency of each frame is told, of those too that were seen together.
    assert len(engine.stats.frame_latencies) == 4 + 2 + 4
    whole = model.stream(processor, **LIMITS)
    whole.push(frames[:4])
    whole_answer = whole.ask("What do you see?")[1]
    assert cut.interrupted and not answer.interrupted and not question.interrupted
    assert 0 < len(cut.token_ids) < len(whole_answer.token_ids)
    assert whole_answer.token_ids[: len(cut.token_ids)] == cut.token_ids
    # It came before the frames that waited, and these are seen after all.
    assert (second.text, second.frame, second.time) == ("How many things do you see?", 3, 1.5)
    assert (answer.role, answer.frame) == ("assistant", 3) and speaking.session.num_frames == 8
    assert len(engine.stats.first_word_latencies) == sum(
        event.role == "assistant" for stream in (speaking, watching) for event in stream.events
    )
    assert min(engine.stats.first_word_latencies) > 0 and len(engine.stats.frame_latencies) > 0


def test_a_streamer_may_interrupt_a_session(trained):
    """Without an engine: asked amid `push`, the question has its place once the reply is cut."""
    model, processor, frames = trained

    class Impatient:
        count = 0

        def put(self, _tokens):
            self.count += 1
            if self.count == 2:
                assert session.ask("How many things do you see?", interrupt=True) == []

        def end(self):
            pass

    session = model.stream(processor, streamer=Impatient())
    session.push(frames[:4])
    events = session.ask("What do you see?")
    assert [event.role for event in events] == ["user", "assistant"] * 2
    assert events[1].interrupted and len(events[1].token_ids) == 2 and not events[3].interrupted
    with pytest.raises(ValueError, match="leave `time` out"):
        session.ask("Now?", time=2.0, interrupt=True)


def test_questions_that_interrupt_are_answered_in_their_order(trained):
    """The first is not cut short by the second, which was there before its answer began."""
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS)
    stream = engine.open()
    stream.push(frames[:4])
    engine.run()
    for text in ("What do you see?", "How many things do you see?"):
        stream.ask(text, interrupt=True)
    engine.run()
    assert [event.text for event in stream.events if event.role == "user"][-2:] == [
        "What do you see?",
        "How many things do you see?",
    ]
    assert [event.role for event in stream.events[-4:]] == ["user", "assistant"] * 2
    assert not any(event.interrupted for event in stream.events)


def test_a_reply_that_would_be_cut_at_once_is_not_begun(trained):
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS)
    stream = engine.open(interval_threshold=1.0)  # speaks at every frame
    stream.push(frames[:1])
    batch = engine._choose_batch() or (engine._encode(), engine._choose_batch())[1]
    stream.ask("What do you see?", interrupt=True)
    row, outputs = engine._launch([stream.session.cache], [batch[0][1]])
    engine._give(stream, row.results(outputs)[0])
    engine.run()
    assert [event.role for event in stream.events] == ["user", "assistant"]


# ------------------------------------------------------------------------------------------------------------ behind


def test_frames_that_come_too_fast_wait_or_are_dropped_and_counted():
    engine = tiny_engine(max_streams=2)
    patient, hasty = engine.open(max_new_tokens=2), engine.open(when_behind="drop_oldest", max_waiting=3)
    for stream in (patient, hasty):
        stream.push(random_frames(10), time=range(10))
    assert (patient.num_waiting, patient.num_dropped) == (10, 0)
    assert (hasty.num_waiting, hasty.num_dropped, engine.stats.dropped) == (3, 7, 7)
    engine.run()
    assert (patient.session.num_frames, patient.session.time) == (10, 9)
    assert (hasty.session.num_frames, hasty.session.time) == (3, 9)


def test_more_than_may_wait_are_refused_and_nothing_is_lost():
    engine = tiny_engine(max_streams=2)
    stream, other = engine.open(max_new_tokens=2, max_waiting=8), engine.open()
    assert (stream.max_waiting, other.max_waiting) == (8, 512)
    with pytest.raises(TooManyWaitingError, match="9 frames at once are more than may wait, 8"):
        stream.push(random_frames(9))
    assert stream.num_waiting == 0
    stream.push(random_frames(8))
    with pytest.raises(TooManyWaitingError, match="8 frames of this stream wait, and its `max_waiting` is 8"):
        stream.push(random_frames(1))
    # One of many must not keep the memory of all.
    frames = [received.pixel_values for received in stream._received]
    assert all(frame.untyped_storage().nbytes() == frame.nbytes for frame in frames)
    other.push(random_frames(9))
    engine.run()
    stream.push(random_frames(1))
    engine.run()
    # As if nothing had been refused: its time is that of nine frames at two a second, and it is not ended.
    assert (stream.session.num_frames, stream.session.time, stream.num_dropped) == (9, 4.0, 0)
    assert [tiny_engine(when_behind=kind).open().max_waiting for kind in ("drop_oldest", "block")] == [16, 16]


def test_who_pushes_too_fast_may_be_made_to_wait():
    engine = tiny_engine(max_streams=1, when_behind="block", max_waiting=2)
    stream = engine.open(max_new_tokens=2)
    stream.push(random_frames(9))
    assert stream.num_waiting <= 2 and stream.session.num_frames >= 7 and stream.num_dropped == 0
    engine.run()
    assert stream.session.num_frames == 9


def test_who_waited_is_served_first():
    """With room for one stream a step, all are served in turn."""
    engine = tiny_engine(max_streams=3, max_batch_tokens=1)
    streams = [engine.open(chunk_frames=1, max_new_tokens=2) for _ in range(3)]
    for stream in streams:
        stream.push(random_frames(4))
    counts = []
    while any(stream.num_waiting for stream in streams):
        engine.step()
        counts.append([stream.session.num_frames for stream in streams])
    assert all(max(seen) - min(seen) <= 1 for seen in counts) and len(counts) >= 12


# ------------------------------------------------------------------------------------------------------------ memory


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


def test_a_stream_that_outgrows_its_memory_ends_alone(trained):
    """Text between remembered frames cannot be forgotten: whoever asks on and on without frames runs out."""
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=2, page_size=16, max_frames=4, max_text_tokens=64)
    greedy, modest = engine.open(), engine.open()
    for stream in (greedy, modest):
        stream.push(frames[:2])
    for _ in range(60):
        greedy.ask("What do you see?")
    engine.run()
    # Code that came with a checkpoint has classes of its own.
    assert type(greedy.error).__name__ == "OutOfPagesError" and greedy.is_done and greedy.num_waiting == 0
    with pytest.raises(RuntimeError, match="outgrown the memory of 4 frames and 64 tokens of text"):
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


@pytest.mark.parametrize(
    "name", ["max_streams", "max_frames", "max_text_tokens", "max_batch_tokens", "max_waiting", "page_size"]
)
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        StreamingEngine(tiny_model(), tiny_processor(), **{**LIMITS, name: 0})


def test_by_default_a_step_has_room_for_a_frame_of_every_stream():
    assert tiny_engine(max_streams=2).max_batch_tokens == 2048
    # Of ten tokens and a separator.
    assert tiny_engine(max_streams=200).max_batch_tokens == 2200


def test_by_default_a_stream_stays_within_the_context(trained):
    model, processor, _ = trained
    engine = StreamingEngine(model, processor, max_streams=1)
    # 4096 positions, and 17 tokens a frame with its separator.
    assert (engine.max_frames, engine.max_text_tokens) == (180, (4096 - 180 * 17) // 2)
    assert engine.open().session.max_frames == 180


def test_policies_are_known_ones():
    with pytest.raises(ValueError, match="'catch_up', 'drop_oldest', 'block'"):
        tiny_engine(when_behind="drop")
    with pytest.raises(ValueError, match="`when_behind` is 'wait'"):
        tiny_engine().open(when_behind="wait")
    with pytest.raises(ValueError, match="`max_waiting` must be at least 1, got 0"):
        tiny_engine().open(max_waiting=0)


# ----------------------------------------------------------------------------------------------------------- threads


def test_by_itself_it_serves_whoever_listens(trained):
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


def test_frames_and_questions_are_taken_in_amid_a_step(monkeypatch):
    amid, go_on, forward = threading.Event(), threading.Event(), engine_module._Row.forward

    def slow(row):
        amid.set()
        assert go_on.wait(timeout=60)
        return forward(row)

    monkeypatch.setattr(engine_module._Row, "forward", slow)
    with tiny_engine(max_streams=2) as engine:
        first, second = (engine.open(max_new_tokens=2) for _ in range(2))
        first.push(random_frames(1))
        assert amid.wait(timeout=60)

        def more():
            for stream in (first, second):
                stream.push(random_frames(3))
                stream.ask("What is there?")

        pushing = threading.Thread(target=more)
        pushing.start()
        pushing.join(timeout=60)
        has_returned = not pushing.is_alive()
        waiting = (first.num_waiting, second.num_waiting)
        go_on.set()
        for stream in (first, second):
            stream.close()
        for stream in (first, second):
            list(stream)
    assert has_returned and waiting == (4, 3)
    assert (first.session.num_frames, second.session.num_frames) == (4, 3)


def test_leaving_ends_what_is_open():
    with tiny_engine(max_streams=1) as engine:
        stream = engine.open()
        stream.push(random_frames(1))
    assert list(stream) == stream.events and stream.is_done and not engine.streams


def broken(*_):
    raise ArithmeticError("no such word")


@pytest.mark.parametrize("by_itself", [False, True])
def test_what_a_stream_breaks_it_breaks_for_itself(trained, by_itself):
    """A logits processor that raises amid a step of several streams, whose others have what they were given."""
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=3, **LIMITS)
    streams = [engine.open(), engine.open(logits_processor=broken), engine.open()]

    def show():
        for stream in streams:
            stream.push(frames[:4])
            stream.ask("What do you see?")
        for stream in (streams[0], streams[2]):
            stream.close()

    if by_itself:
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
    # What it had heard comes before its end, however often it is asked for.
    rest = []
    with pytest.raises(RuntimeError, match="The stream was ended: no such word"):
        rest.extend(streams[1])
    with pytest.raises(RuntimeError, match="no such word"):
        list(streams[1])
    assert all(not stream.session.cache.tables[kind].pages for stream in streams for kind in engine.pool.num_pages)


def test_all_memory_is_taken_when_the_engine_is_made():
    engine = tiny_engine(max_streams=2)
    taken = engine.pool.num_bytes
    assert taken == sum(pages * 16 * 2 * 2 * 8 * 4 * 2 for pages in engine.pool.num_pages.values())
    engine.open(max_new_tokens=2).push(random_frames(3))
    engine.run()
    assert engine.pool.num_bytes == taken


def test_the_vision_encoder_sees_no_more_at_once_than_its_bound(monkeypatch):
    seen, said = [], []
    for most in (64, 3):
        monkeypatch.setattr(engine_module, "_ENCODED", most)
        engine = tiny_engine(max_streams=2)
        encode = engine.model.encode_frames
        monkeypatch.setattr(engine.model, "encode_frames", lambda x, encode=encode: seen.append(len(x)) or encode(x))
        streams = [engine.open(max_new_tokens=2) for _ in range(2)]
        for seed, stream in enumerate(streams):
            stream.push(random_frames(5, seed=seed))
        engine.run()
        said.append([[(e.frame, e.token_ids) for e in stream.events] for stream in streams])
    assert seen[:1] == [10] and seen[1:] == [3, 3, 3, 1] and said[0] == said[1]


def test_an_error_reaches_who_listens(monkeypatch):
    engine = tiny_engine(max_streams=1)
    monkeypatch.setattr(engine.model, "encode_frames", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    with engine:
        stream = engine.open()
        stream.push(random_frames(1))
        with pytest.raises(RuntimeError, match="The stream was ended: division by zero"):
            list(stream)
    with pytest.raises(RuntimeError, match="The engine has stopped: division by zero"):
        engine.open()


def test_compiled_steps_say_the_same(trained, monkeypatch):
    """Each its own code, which reads the numbers of every step anew: of one stream after another, at other ages."""
    model, processor, frames = trained
    shapes = [engine_module._Shape(0, 0, 1), engine_module._Shape(1, 1, 0, reading=4)]
    monkeypatch.setattr(engine_module, "_shapes", lambda _: shapes)
    made, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: made.append(step) or compiler(step, **how))

    def events(compile_steps):
        engine = StreamingEngine(model, processor, max_streams=1, page_size=64, compile_steps=compile_steps, **LIMITS)
        engine.warm_up()
        for first in (0, 3):
            stream = engine.open()
            stream.ask(NARRATE, reply_now=False)
            for index, frame in enumerate(frames[first:]):
                stream.push(frame)
                if index == 6:
                    stream.ask("What do you see?")
                engine.run()
            stream.close()
            engine.run()
            kept = {layer: rows.tolist() for layer, rows in stream.session.kept_tokens.items()}
            yield [(event.frame, event.text, event.token_ids) for event in stream.events], kept
        if compile_steps:
            assert len({id(step.__code__) for step in made}) == len(made) == 2
            assert all(step._step is not None for step in engine._captured.values())
            assert engine.stats.captured_steps > 0.5 * engine.stats.steps

    plain, compiled = list(events(False)), list(events(True))
    assert plain == compiled and all(len(said) > 3 and len(kept) == 4 for said, kept in plain)


def test_a_compiled_step_of_grouped_queries_reads_attention_as_it_is_laid_out(monkeypatch):
    """Of one stream alone in the row, whose attention is not copied together with another's."""
    monkeypatch.setattr(engine_module, "_shapes", lambda _: [engine_module._Shape(1, 1, 0)])
    found = []
    for how in ({"capture": False}, {"compile_steps": True}):
        engine = tiny_engine(max_streams=1, **how)
        config = engine.model.config
        assert config.text_config.num_attention_heads > config.text_config.num_key_value_heads
        frame = [config.frame_token_interval_id] + [config.frame_token_id] * config.frame_num_tokens
        cache = VideoLLMMoDPagedCache(engine.pool)
        for turn in range(2):
            size = (1, config.frame_num_tokens, config.vision_config.hidden_size)
            features = torch.randn(size, generator=torch.Generator().manual_seed(turn))
            found += engine.execute([cache], [StreamStep(frame, [len(frame) - 1], features)])
        assert engine.stats.captured_steps == (2 if "compile_steps" in how else 0)
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        assert_close(plain.logits, compiled.logits, rtol=1e-4, atol=1e-4)
        assert_close(plain.router_scores, compiled.router_scores, rtol=1e-4, atol=1e-4)


def test_a_compiled_token_step_multiplies_by_itself(monkeypatch):
    """A row's products are sums of the compiled code, on a CPU; a library is not called once."""
    monkeypatch.setattr(engine_module, "_shapes", lambda _: [engine_module._Shape(0, 0, 1)])
    called = {}
    for name, how in (("plain", {"capture": False}), ("compiled", {"compile_steps": True})):
        engine = tiny_engine(max_streams=1, **how)
        cache = VideoLLMMoDPagedCache(engine.pool)
        engine.execute([cache], [StreamStep([5], [0])])
        with torch.profiler.profile() as profile:
            engine.execute([cache], [StreamStep([6], [0])])
        names = ("aten::mm", "aten::addmm", "aten::mv", "mkldnn::_linear")
        called[name] = sum(e.count for e in profile.key_averages() if e.key.startswith(names))
    assert called["plain"] > 10 and called["compiled"] == 0


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 128), (torch.bfloat16, 64), (torch.float64, 128)])
def test_small_compiled_products_are_sums(dtype, most):
    """As near as a library's; with more rows, or factors, they are left to it."""
    torch.compiler.reset()  # All cases share one function's code, and that is compiled eight times at most.
    torch.manual_seed(0)
    right, bias = torch.randn(64, 128, dtype=dtype), torch.randn(128, dtype=dtype)
    options = {"post_grad_custom_pre_pass": engine_module._summed_products()}

    @partial(torch.compile, dynamic=False, options=options)
    def products(left, alpha):
        return left @ right, torch.addmm(bias, left, right, alpha=alpha)

    for rows, alpha, called in ((1, 1, 0), (most, 1, 0), (most, 2, 1), (most + 1, 1, 2)):
        left = torch.randn(rows, 64, dtype=dtype)
        products(left, alpha)
        with torch.profiler.profile() as profile:
            plain, biased = products(left, alpha)
        counts = [e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
        assert sum(counts) == called
        exact = left.double() @ right.double()
        near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}  # sums of 64 products of about 1
        assert_close(plain, exact.to(dtype), **near)
        assert_close(biased, (bias.double() + alpha * exact).to(dtype), **near)


@pytest.mark.parametrize("how", [{"capture": True}, {"compile_steps": True}])
def test_weights_in_eight_bits_say_the_same_in_captured_steps(monkeypatch, how):
    checkpoint = ROOT
    quantized = TorchAoConfig(Int8WeightOnlyConfig())
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(checkpoint, quantization_config=quantized).eval()
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight.data).__name__ != "Tensor"
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    video = processor.read_video(ROOT / "samples" / "streamworld.mp4", fps=2)
    frames = [frame for _, frame in video][:8]
    shapes = [engine_module._Shape(0, 0, 1)]
    if "capture" in how:  # a second one takes long to compile
        shapes.append(engine_module._Shape(1, 1, 0, reading=4))
    monkeypatch.setattr(engine_module, "_shapes", lambda _: shapes)
    session = model.stream(processor)
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS, **how)
    stream = engine.open()
    for watcher in (session, stream):
        watcher.ask(NARRATE, reply_now=False)
        for frame in frames:
            watcher.push(frame)
            engine.run()
        watcher.close()
    engine.run()
    assert said(stream.events) == said(session.events) and len(stream.events) > 1
    assert engine.stats.captured_steps > engine.stats.steps / 3


class _Graph:
    """A stand-in for a CUDA graph: runs the same step again, into the tensors that it gave when it was captured."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        for mine, new in zip(self.outputs, self.step(), strict=True):
            if mine is not None:
                mine.copy_(new)


def test_a_captured_step_is_fed_and_read_through_its_own_tensors(monkeypatch):
    """What is replayed sees only what was copied in, and what it gave is no longer its own."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    graphs = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graphs.append(graph) or nullcontext())
    plain, captured = (tiny_engine(max_streams=2, capture=True) for _ in range(2))
    captured._capture_stream = stream

    def make_and_capture(self, *args, **options):
        make(self, *args, **options)
        if self.engine is captured:
            given = []
            self._step = self._capture(lambda: given.append(self._inputs.forward()) or given[-1])
            assert len(given) == 4  # three for warming up
            graphs[-1].step, graphs[-1].outputs = self._inputs.forward, given[-1]

    make = engine_module._CapturedStep.__init__
    monkeypatch.setattr(engine_module._CapturedStep, "__init__", make_and_capture)
    found = []
    for engine in (plain, captured):
        streams = [engine.open(max_new_tokens=4) for _ in range(2)]
        for index in range(5):
            for number, one in enumerate(streams):
                one.push(random_frames(1, seed=10 * number + index))
            engine.run()
        found.append([[(e.frame, e.token_ids, e.interval_probability) for e in one.events] for one in streams])
    assert found[0] == found[1] and sum(map(len, found[0])) > 4
    assert sum(graph.replays for graph in graphs) == captured.stats.captured_steps > 4


def test_frames_are_encoded_while_a_step_runs(monkeypatch):
    """As on CUDA, with stand-ins for its streams: what is seen next is encoded between a step and its decisions."""
    waits, empty = [], torch.empty
    stream = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    order = []
    event = SimpleNamespace(record=lambda: order.append("record"), synchronize=lambda: order.append("decided"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))  # noqa: ARG005
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    found = []
    for vision_stream in (None, "a stream of its own"):
        engine = tiny_engine(max_streams=2)
        engine._vision_stream = vision_stream
        encode, launch = engine.model.encode_frames, engine._launch
        monkeypatch.setattr(engine.model, "encode_frames", lambda x: order.append("encode") or encode(x))  # noqa: B023
        monkeypatch.setattr(engine, "_launch", lambda *args: order.append("step") or launch(*args))  # noqa: B023
        streams = [engine.open(max_new_tokens=3) for _ in range(2)]
        order.clear()
        for index in range(4):
            for number, one in enumerate(streams):
                one.push(random_frames(3, seed=10 * number + index))
            for _ in range(2):
                engine.step()
        engine.run()
        found.append([said(one.events) for one in streams])
    assert found[0] == found[1] and sum(map(len, found[0])) > 4
    assert waits and set(waits) == {"a stream of its own"}
    text = " ".join(order)
    assert text.startswith("encode step record") and "step record encode decided" in text
    assert order.count("step") == order.count("decided")


def test_what_is_captured_of_a_step_brings_nothing_from_the_host_and_asks_nothing(monkeypatch):
    """But for what is for a CPU alone: an order that a GPU computes, and checks that cost nothing there."""
    modules = (attention, cache_videollm_mod, engine_module, generation_videollm_mod)
    modules += (modeling_videollm_mod, routing_videollm_mod, streaming_videollm_mod)
    found, steps, forward = set(), [], engine_module._Row.forward

    def watched(row):
        with HostAndDevice(*modules) as mode:
            outputs = forward(row)
        found.update(mode.found)
        steps.append([step.num_frames for step in row.steps])
        return outputs

    monkeypatch.setattr(engine_module._Row, "forward", watched)
    engine = tiny_engine(max_streams=2, capture=True)
    streams = [engine.open(max_new_tokens=3) for _ in range(2)]
    for number, stream in enumerate(streams):
        stream.ask("What is there?", reply_now=False)
        stream.push(random_frames(6, seed=number))
    engine.run()
    for_a_cpu = {("__init__", "nonzero"), ("check_on_device", "tolist")}
    assert found == {(f"routing.{function}", name) for function, name in for_a_cpu}
    assert any(0 in frames and sum(frames) > 0 for frames in steps)
    with HostAndDevice(engine_module) as mode:
        engine.execute([streams[0].session.cache], [StreamStep([7], [0])])
    assert ("engine.results", "tolist") in mode.found


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="`compile_steps` is for captured steps"):
        tiny_engine(compile_steps=True, capture=False)


def test_warming_up_makes_the_steps_that_are_captured_and_tells_what_attention_runs_on(capfd):
    logging.enable_progress_bar()  # whatever ran before, such as a command that shows its own
    engine = tiny_engine(max_streams=4, capture=True)
    engine.warm_up(max_streams=3)
    assert gc.get_count()[2] == 0  # All garbage was searched for: it will not be amid a step.
    alone = {(0, 0, 1, 0), (0, 0, 1, 4), (0, 0, 1, 32), (1, 1, 0, 0), (1, 1, 1, 4), (1, 1, 1, 32)}
    alone |= {(1, 2, 0, 4), (1, 4, 0, 4), (1, 8, 0, 4), (1, 8, 0, 32)}
    kinds = [((0, 0, size, 0), (0, 0, size, 32), (size, 1, 0, 0), (size, 1, size, 32)) for size in (2, 4)]
    assert set(engine._captured) == alone.union(*kinds)
    before = [cache.get_seq_length() for cache in (engine._spare,)]
    streams = [engine.open() for _ in range(3)]
    for _ in range(2):
        for stream in streams:
            stream.push(random_frames(1))
        engine.run()
    assert engine.stats.captured_steps > 0 and before == [0] == [engine._spare.get_seq_length()]
    engine.warm_up(max_streams=3)
    assert "attention by strips of pages" in capfd.readouterr().err
    plain = tiny_engine()
    plain.warm_up()
    assert plain._captured is None


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        # Tokens of text before the first frame, frames, and of a stream that sees none, text alone.
        ([(0, 0, 1)], (0, 0, 1, 0)),
        ([(0, 0, 3)], (0, 0, 1, 4)),
        ([(0, 0, 20)], (0, 0, 1, 32)),
        ([(0, 0, 40)], None),
        ([(0, 1, 0)], (1, 1, 0, 0)),
        ([(4, 1, 0)], (1, 1, 1, 4)),
        ([(0, 3, 0)], (1, 4, 0, 4)),
        ([(20, 7, 0)], (1, 8, 0, 32)),
        ([(20, 3, 0)], (1, 8, 0, 32)),
        ([(0, 9, 0)], None),
        ([(0, 1, 0), (0, 0, 1)], (1, 1, 1, 4)),
        ([(3, 1, 0), (0, 0, 1), (0, 0, 5), (0, 0, 1)], (4, 1, 4, 32)),
        ([(0, 0, 1), (0, 0, 7)], (0, 0, 2, 32)),
        ([(0, 2, 0), (0, 1, 0)], (2, 2, 0, 32)),
        ([(0, 8, 0), (0, 1, 0), (0, 1, 0)], None),
        ([(0, 2, 0), (0, 0, 1)], None),
        ([(0, 0, 1), (2, 1, 0), (0, 0, 4), (0, 1, 0)], (2, 1, 2, 32)),
    ],
)
def test_the_captured_step_of_every_mixture_gives_what_a_plain_one_gives(monkeypatch, rows, shape):
    """
    Filled up with frames and text of nobody's, wherever in the row each stream begins; each stream as if alone. Its
    tensors are those that it was made with, into which the next are copied.
    """
    forms = set()

    def form(row):
        tensors = [row.ids, row.ends, row.thresholds, row.packed.positions]
        tensors += [] if row.features is None else [row.features]
        for entries in row.packed.entries.values():
            tensors += [entries.slots, entries.begins, entries.used, entries.key_begins, entries.table, entries.idle]
            forms.add((entries.most_new >= max(entries.new), min(entries.new) > 0))
        return tuple((x.shape, x.dtype) for x in tensors)

    def make_and_replay(self, *args, **options):
        make(self, *args, **options)
        self._step = self._inputs.forward
        made[self] = form(self._inputs)

    def fill_and_compare(self, *args):
        row, places = fill(self, *args)
        assert self not in made or form(row) == made[self]
        return row, places

    made, make, fill = {}, engine_module._CapturedStep.__init__, engine_module._CapturedStep._fill
    monkeypatch.setattr(engine_module._CapturedStep, "__init__", make_and_replay)
    monkeypatch.setattr(engine_module._CapturedStep, "_fill", fill_and_compare)
    found = []
    for capture in (True, False):
        engine = tiny_engine(max_streams=4, capture=capture)
        config = engine.model.config
        frame = [config.frame_token_interval_id] + [config.frame_token_id] * config.frame_num_tokens
        caches = [VideoLLMMoDPagedCache(engine.pool) for _ in rows]
        for turn in range(2):
            steps = []
            for index, (before, frames, text) in enumerate(rows):
                size = (frames, config.frame_num_tokens, config.vision_config.hidden_size)
                features = torch.randn(size, generator=torch.Generator().manual_seed(10 * index + turn))
                # What is said before a frame stands in place of what parts it from the one before.
                ids = [5 + turn] * before + (frame * frames)[bool(before) :] + [7 + turn] * text
                ends = [len(ids) - 1 - len(frame) * k for k in reversed(range(frames))] or [len(ids) - 1]
                steps.append(StreamStep(ids, ends, features if frames else None, 0.2 * index))
            found.append((engine.execute(caches, steps), [cache.lengths for cache in caches]))
        assert list(engine._captured or ()) == ([shape] if capture and shape else [])
        assert engine._spare.get_seq_length() == 0
    assert forms == ({(True, True)} if shape else set()) and len(made) == bool(shape)
    for (mine, lengths), (theirs, plain_lengths) in zip(found[:2], found[2:], strict=True):
        assert lengths == plain_lengths
        for one, other in zip(mine, theirs, strict=True):
            assert one.speak == other.speak and one.tokens == other.tokens
            assert_close(one.logits, other.logits)
            assert_close(one.router_scores, other.router_scores)
            assert_close(one.kept_tokens, other.kept_tokens)


def test_a_captured_step_has_room_for_what_fills_it_up():
    """Which is more than a stream of few frames ever holds."""
    engine = tiny_engine(max_streams=1, max_frames=1, max_text_tokens=1, capture=True)
    engine.warm_up()
    stream = engine.open(max_new_tokens=2)
    stream.push(random_frames(1))
    engine.run()
    assert engine.stats.captured_steps > 0


def test_what_was_not_warmed_up_is_not_made_while_streams_wait():
    engine = tiny_engine(max_streams=2, capture=True)
    engine.warm_up(max_streams=2)
    made = set(engine._captured)
    streams = [engine.open(max_new_tokens=2) for _ in range(2)]
    for stream in streams:
        stream.push(random_frames(2))
    engine.run()
    assert set(engine._captured) == made and 0 < engine.stats.captured_steps < engine.stats.steps
