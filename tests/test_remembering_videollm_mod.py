# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What an endless stream forgets. Tests of sessions check what the cache holds then."""

import math
import random

import pytest
import torch
from engines import embedded, said, tiny_engine
from tiny import random_frames, tiny_config, tiny_model, tiny_processor
from transformers import GenerationConfig

from videollm_mod import streaming_videollm_mod
from videollm_mod.remembering_videollm_mod import StreamMemory, check_limits, within_context
from videollm_mod.serving import StreamingEngine
from videollm_mod.train.data.sources import find_source, load_split
from videollm_mod.train.streaming_evaluation import spoken_unasked, stream_example, unasked_replies
from videollm_mod.train.teacher_forcing import evaluate_metric


ENDLESS = {"max_frames": 6, "max_text_tokens": 60, "max_new_tokens": 2, "sink_frames": 0}


def kept_slowly(pieces, num_new_text, most, sinks, limit):
    """
    Return which pieces (kind, tokens) stay: one rule after the other, counting everything again each time. A piece of
    the kind "beginning" is text before the second frame.

    Unlike in a session, an interval is a piece of its own.
    """
    frames = [index for index, (kind, _) in enumerate(pieces) if kind == "frame"]
    texts = [index for index, (kind, _) in enumerate(pieces) if kind == "text"]
    beginning = sum(length for kind, length in pieces if kind == "beginning")
    gone = set(frames[sinks:][: 1 + most // 8]) if len(frames) == most else set()

    def text():
        return num_new_text + beginning + sum(pieces[index][1] for index in texts if index not in gone)

    if limit is not None and text() > limit:
        fixed = frames[sinks - 1] if 0 < sinks <= len(frames) else 0
        for frame in frames[sinks:]:
            for index in texts:
                if fixed < index < frame and text() > limit * 7 // 8:
                    gone.add(index)
            may_go = any(fixed < index < frames[-1] and index not in gone for index in texts)
            if text() <= limit * 7 // 8 or frame == frames[-1] or not may_go:
                break
            gone.add(frame)
    if not gone:
        return [True] * len(pieces)
    stays, before = [], None
    for index, (kind, _) in enumerate(pieces):
        is_kept = (index + 1 not in gone and before == "frame") if kind == "interval" else index not in gone
        stays.append(is_kept)
        before = kind if is_kept else before
    return stays


@pytest.mark.parametrize(("most", "sinks"), [(1, 0), (3, 2), (8, 6)])
def test_text_has_its_limit_also_where_every_frame_goes_at_once(most, sinks):
    memory = StreamMemory(most, sinks, 100)
    for _ in range(100):
        memory.forget(10)
        memory.add_text(10)
        assert memory.num_text_tokens <= 100
        memory.add_frame(10, 0)


@pytest.mark.parametrize("interval", [0, 1])
def test_evictions_equal_a_slow_reference(interval):
    draw, evictions = random.Random(0), 0
    for _ in range(300):
        most = draw.choice([1, 2, 3, 6, 9, 17])
        sinks, limit = draw.randrange(most), draw.choice([None, 1, 10, 40, 90])
        memory, pieces, num_new_text, num_seen = StreamMemory(most, sinks, limit), [], draw.randint(1, 20), 0
        for _ in range(60):
            runs = memory.forget(num_new_text)
            stays = kept_slowly(pieces, num_new_text, most, sinks, limit)
            expected = [kept for kept, (_, length) in zip(stays, pieces, strict=True) for _ in range(length)]
            keep = [run.stays for run in runs for _ in range(run.num_tokens)]
            assert (keep or [True] * len(expected)) == expected
            assert sum(run.num_frames for run in runs) in (0, sum(kind == "frame" for kind, _ in pieces))
            evictions += bool(runs)
            pieces = [piece for piece, kept in zip(pieces, stays, strict=True) if kept]
            room = memory.room(num_new_text)
            text = num_new_text + sum(length for kind, length in pieces if kind in ("text", "beginning"))
            assert room == (1 if text > (limit or 1e9) else most - memory.num_frames)
            separator = 0 if num_new_text else interval
            if num_new_text:
                memory.add_text(num_new_text)
                kind = "beginning" if num_seen < 2 else "text"
                if pieces and pieces[-1][0] == kind:
                    num_new_text += pieces.pop()[1]
                pieces.append((kind, num_new_text))
            count = draw.randint(1, min(room, 4))
            for _ in range(count):
                memory.add_frame(10, separator)
                pieces += [("interval", separator)] * bool(separator) + [("frame", 10)]
                separator = interval
            back = draw.randrange(count)
            assert memory.remove_frames(back) == back * (10 + interval)
            del pieces[len(pieces) - back * (1 + interval) :]
            num_seen += count - back
            assert memory.num_frames == sum(kind == "frame" for kind, _ in pieces)
            assert sum(piece.length for piece in memory.pieces) == sum(length for _, length in pieces)
            num_new_text = draw.choice([0, 0, 1, 5, 30])
    assert evictions > 1000


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_frames_that_follow_each_other_bring_no_text(chunk_frames):
    session = tiny_model().stream(tiny_processor(), **ENDLESS, speak=lambda _: False, chunk_frames=chunk_frames)
    for frame in random_frames(9):
        session.push(frame)
        [system, *shown] = session._memory.pieces
        assert session._memory.num_text_tokens == system.length and all(piece.is_frame for piece in shown)
        assert session.cache.get_seq_length() == system.length + sum(piece.length for piece in shown)


# ----------------------------------------------------------------------------------------------- what is said at first


@pytest.mark.parametrize("is_growing", [False, True])
def test_what_is_said_at_the_start_stays_in_every_layer(is_growing):
    """Values hold no positions: they are the same when the frame before them is gone."""
    model, processor, frames = tiny_model(), tiny_processor(), random_frames(40)
    options = ENDLESS | ({"cache": model.new_cache()} if is_growing else {})
    session = model.stream(processor, **options)
    session.ask("Say what happens.", reply_now=False)
    session.push(frames[:1])
    begin = session.cache.lengths
    session.push(frames[1:2])
    [system, _, asked, *_] = session._memory.pieces
    layers = session.cache.layers
    before = [layer.values[:, :, at : at + asked.length].clone() for layer, at in zip(layers, begin, strict=True)]
    session.push(frames[2:])
    assert session.num_remembered <= 6 and session._memory.pieces[1] == asked
    after = [layer.values[:, :, system.length : system.length + asked.length] for layer in layers]
    assert all(map(torch.equal, before, after))
    assert len(session.events) > 20 and session._memory.num_text_tokens < 100


def test_a_long_instruction_leaves_room_for_frames():
    """It exceeds the limit of text alone. Nothing else can go then, and frames do not go for it."""
    session = tiny_model().stream(tiny_processor(), **ENDLESS | {"speak": lambda _: False})
    session.ask("Say what happens. " * 20, reply_now=False)
    session.push(random_frames(20))
    assert session._memory.num_text_tokens > 60 and session.num_remembered >= 5


@pytest.mark.parametrize(("limit", "is_told"), [(300, False), (100, True)])
def test_text_that_stays_and_fills_the_limit_is_told(limit, is_told, monkeypatch):
    told = []
    monkeypatch.setattr(streaming_videollm_mod.logger, "warning_once", told.append)
    options = {"max_text_tokens": limit, "max_frames": 20, "speak": lambda frame: frame.frame % 8 == 7}
    session = tiny_model().stream(tiny_processor(), **ENDLESS | options)
    session.ask("Say what happens. " * 5, reply_now=False)
    session.push(random_frames(60))
    assert any("so frames are forgotten" in line for line in told) is is_told
    assert (session.num_remembered > 16) is not is_told


@pytest.mark.parametrize(("is_answered", "sinks"), [(False, 0), (True, 3)])
def test_newer_instructions_stay_in_place_of_the_first(is_answered, sinks):
    """The newer ones stay in the cache, without what is said with them. The first go, also from among sink frames."""
    model, processor, frames = tiny_model(), tiny_processor(), random_frames(40)
    session = model.stream(processor, **ENDLESS | {"sink_frames": sinks, "speak": lambda _: False})
    session.ask("Say what happens.", reply_now=False)
    session.push(frames[:10])
    system, first = (piece for piece in session._memory.pieces if piece.is_beginning)
    session.ask("Tell me about dogs only.", reply_now=False, instructs=True)
    if is_answered:
        session.ask("Is there a dog?")
    [layer, *_] = session.cache.layers
    session.push(frames[10:11])
    newer = next(piece for piece in session._memory.pieces[1:] if piece.is_beginning)

    def values():
        before = session._memory.pieces[: session._memory.pieces.index(newer)]
        begin = sum(piece.length for piece in before)
        return layer.values[:, :, begin : begin + newer.length].clone()

    held = values()
    for number, frame in enumerate(frames[11:]):
        session.push(frame)
        if number % 3 == 0:
            session.ask("What else?")
    assert [piece for piece in session._memory.pieces if piece.is_beginning] == [system, newer]
    assert not any(piece.is_replaced for piece in session._memory.pieces) and first.length > 1
    assert torch.equal(values(), held) and session.num_remembered > 2
    assert int(session.cache.get_seq_length()) == sum(piece.length for piece in session._memory.pieces)


def test_a_new_memory_is_empty():
    memory = StreamMemory(None, 0, None)
    assert (memory.is_crowded, memory.instructs, memory.pieces) == (False, False, [])
    assert memory.room(10**9) == math.inf and memory.forget(10**9) == []
    memory.add_text(3)
    memory.add_frame(10, 1)
    assert [(piece.length, piece.separator, piece.is_beginning) for piece in memory.pieces] == [
        (3, 0, True),
        (11, 1, False),
    ]


def test_memory_is_crowded_only_while_other_text_goes_for_text_that_stays():
    memory = StreamMemory(4, 0, 8)
    memory.add_text(20)  # the beginning, which stays
    for _ in range(3):
        memory.add_frame(10, 1)
    memory.forget(1)
    assert not memory.is_crowded, "there is no other text"
    memory.add_text(3)
    memory.add_frame(10, 1)
    gone = memory.forget(1)
    assert memory.is_crowded and sum(run.num_tokens for run in gone if not run.stays) > 3


def test_frames_with_their_text_must_fit_into_the_context():
    """2,048 tokens hold 186 frames of 10 tokens and one of text, but not 187."""
    config = tiny_config()
    check_limits(config, 186, 0, None, 1)
    check_limits(config, 128, 0, None, 6)  # exactly
    with pytest.raises(ValueError, match="`max_frames` is 187, with 10 tokens per frame; .* for 2048 tokens"):
        check_limits(config, 187, 0, None, 1)
    with pytest.raises(ValueError, match="`max_text_tokens` must be a whole number"):
        check_limits(config, 20, 0, -1, 1)
    assert within_context(config, 3000) == {"max_frames": 1, "max_text_tokens": 1}
    assert within_context(config, 1) == {"max_frames": 139, "max_text_tokens": 259}
    assert within_context(config, 1, max_frames=20) == {"max_frames": 20, "max_text_tokens": 914}


def test_a_stream_of_an_engine_remembers_what_a_session_does():
    engine, frames = (
        tiny_engine(**{name: ENDLESS[name] for name in ("max_frames", "max_text_tokens")}),
        random_frames(40),
    )
    stream = engine.open(max_new_tokens=ENDLESS["max_new_tokens"])
    session = engine.model.stream(engine.processor, **ENDLESS)
    for each in (stream, session):
        each.ask("Say what happens.", reply_now=False)
        each.push(frames)
    engine.run()
    assert said(stream.events) == said(session.events) and stream.session.num_remembered <= 6
    assert stream.session._memory.pieces == session._memory.pieces
    assert stream.session.cache.lengths == session.cache.lengths


# -------------------------------------------------------------------------------------------- what a checkpoint says


def test_a_checkpoint_says_what_its_sessions_remember(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    assert limits_of(model.stream(processor)) == (None, 0, None)
    model.generation_config = GenerationConfig(max_frames=8, sink_frames=2, max_text_tokens=50)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    assert limits_of(model.stream(processor)) == (8, 2, 50)
    assert limits_of(model.stream(processor, max_frames=None)) == (None, 0, None)
    assert limits_of(model.stream(processor, max_frames=6, sink_frames=0, max_text_tokens=None)) == (6, 0, None)
    assert limits_of(model.stream(processor, max_frames=1)) == (1, 0, 50)
    with pytest.raises(ValueError, match="`max_frames` must be a whole number, at least 1, got 'all'"):
        model.stream(processor, max_frames="all")
    assert limits_of(StreamingEngine(model, processor, max_streams=1).open().session) == (8, 2, 50)
    engine = StreamingEngine(model, processor, max_streams=1, max_frames=6, max_text_tokens=70)
    assert limits_of(engine.open().session) == (6, 2, 70)
    model.generation_config.max_frames = 0
    with pytest.raises(ValueError, match="`max_frames` must be a whole number, at least 1, got 0"):
        model.stream(processor)


def limits_of(session):
    return session.max_frames, session.sink_frames, session.max_text_tokens


def test_the_embedded_checkpoint_narrates_late_without_sink_frames():
    """A clip of a minute, six times as long as in training. If the instruction is forgotten, F1 is 0.06."""
    model, processor, _ = embedded()
    options = {"world": "tiny", "kinds": "narrate=1", "frame_size": 96, "seconds": "60,60", "questions_per_minute": 0}
    [_, row] = load_split(find_source("streamworld")("streamworld", **options), "test", 2)
    events, _ = stream_example(model, processor, row, max_frames=20, sink_frames=0, max_text_tokens=128)
    told = [{"time": event.time, "text": event.text} for event in spoken_unasked(events) if event.time > 25]
    true = [event for event in unasked_replies(row, fps=2.0) if event["time"] > 25]
    scores = evaluate_metric("stream_events").compute(
        predictions=[told], references=[true], tolerance=0.5, delay_window=5.0
    )
    assert len(true) == 11 and scores["event_f1"] > 0.6
