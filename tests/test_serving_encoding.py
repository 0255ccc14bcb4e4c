# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder on frames of several streams."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from engines import LIMITS, said, tiny_engine
from tiny import random_frames

from videollm_mod.serving import encoding


def test_the_encoder_gets_at_most_so_many_frames_at_once(monkeypatch):
    seen, found = [], []
    for most in (64, 3):
        monkeypatch.setattr(encoding, "MOST_FRAMES", most)
        engine = tiny_engine(max_streams=2)
        encode = engine.model.encode_frames
        monkeypatch.setattr(engine.model, "encode_frames", lambda x, encode=encode: seen.append(len(x)) or encode(x))
        streams = [engine.open(max_new_tokens=2) for _ in range(2)]
        for seed, stream in enumerate(streams):
            stream.push(random_frames(5, seed=seed))
        engine.run()
        found.append([said(stream.events) for stream in streams])
    assert seen[:1] == [10] and seen[1:] == [3, 3, 3, 1] and found[0] == found[1]


def test_each_stream_reuses_its_own_frames(monkeypatch):
    """Two streams of the same stills, with and without reuse; the third stream's frames differ."""
    still, other = random_frames(2)
    videos = [([still] * 4 + [other] * 3, 8), ([still] * 4 + [other] * 3, None), (random_frames(5, seed=3), 8)]
    options = {"max_new_tokens": 3, "interval_threshold": 0.004}
    engine, counts = tiny_engine(max_streams=3), []
    expected = []
    for frames, reuse_static in videos:
        session = engine.model.stream(engine.processor, reuse_static=reuse_static, **LIMITS, **options)
        session.push(frames)
        expected.append(said(session.events))
    encode = engine.model.encode_frames
    monkeypatch.setattr(engine.model, "encode_frames", lambda x: counts.append(len(x)) or encode(x))
    streams = [engine.open(reuse_static=reuse_static, **options) for _, reuse_static in videos]
    for stream, (frames, _) in zip(streams, videos, strict=True):
        stream.push(frames)
    engine.run()
    assert [said(stream.events) for stream in streams] == expected and all(expected)
    assert [stream.session.num_reused for stream in streams] == [5, 0, 0] and sum(counts) == 2 + 7 + 5


def test_a_stream_that_reuses_a_faulty_frame_ends_and_others_do_not(monkeypatch):
    engine = tiny_engine(max_streams=2)
    streams = [engine.open(reuse_static=8) for _ in range(2)]
    faulty, sound = random_frames(2)
    encode, marked = engine.model.encode_frames, engine.processor.normalize_frames(engine.take_in(faulty))
    poison = "this frame"

    def refuse(pixels):
        if any(torch.equal(frame, marked[0]) for frame in pixels):
            raise ValueError(poison)
        return encode(pixels)

    monkeypatch.setattr(engine.model, "encode_frames", refuse)
    streams[0].push([faulty, faulty])
    streams[1].push([sound, sound])
    engine.run()
    assert str(streams[0].error) == poison and streams[1].error is None
    assert streams[1].session.num_reused == 1 and streams[1].session.num_frames == 2


def test_frames_are_encoded_while_a_step_runs(monkeypatch):
    """
    As on CUDA, with stand-ins for its streams: the next frames are encoded between a step and its decisions. These and
    the kept tokens, which are told to clients, are read from copies that were begun before.
    """
    waits, empty, copies = [], torch.empty, []
    stream = SimpleNamespace(wait_stream=waits.append)
    used = set()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.add(stream) or nullcontext())
    # The current device of the engine's thread may be another.
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {torch.device("cpu"): stream}[device])
    order, recorded = [], []

    def record(on):
        recorded.append(on)
        order.append("record")

    event = SimpleNamespace(record=record, synchronize=lambda: order.append("decided"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)

    def allocate(*size, pin_memory=False, **how):
        made = empty(*size, **how)
        if pin_memory:
            assert order[-1] == "step"
            copies.append(made)
        return made

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    found = []
    for vision_stream in (None, "vision"):
        engine = tiny_engine(max_streams=2, output_router_scores=True)
        engine._encoder.cuda_stream = vision_stream
        engine._encoder._intake = vision_stream and "intake"
        encode, launch = engine.model.encode_frames, engine.runner.launch
        monkeypatch.setattr(engine.model, "encode_frames", lambda x: order.append("encode") or encode(x))  # noqa: B023
        monkeypatch.setattr(engine.runner, "launch", lambda *args: order.append("step") or launch(*args))  # noqa: B023
        streams = [engine.open(max_new_tokens=3) for _ in range(2)]
        order.clear()
        for index in range(4):
            for number, one in enumerate(streams):
                one.push(random_frames(3, seed=10 * number + index))
            for _ in range(2):
                engine.step()
        engine.run()
        kept = [list(one.session.kept_tokens.values()) for one in streams]
        found.append([(said(one.events), [x.tolist() for x in rows]) for one, rows in zip(streams, kept, strict=True)])
        pinned = {made.untyped_storage().data_ptr() for made in copies}
        assert {x.untyped_storage().data_ptr() in pinned for rows in kept for x in rows} == {vision_stream is not None}
    assert found[0] == found[1] and sum(len(events) for events, _ in found[0]) > 4
    assert waits and set(waits) == {"vision"} and used == {"vision", "intake"}
    text = " ".join(order)
    assert text.startswith("encode step record") and "step record encode decided" in text
    assert order.count("step") == order.count("decided") == len(recorded)
    assert all(on is stream for on in recorded)
