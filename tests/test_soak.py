# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Streams and clients that come and go leave nothing behind, and streams say what sessions say.

`benchmarks/soak.py` does the same for hours of video, with times.
"""

import gc
import json
import os
import pickle
import threading
import time as clock
from collections import Counter

import httpx
import soak
from counting import CountOperations
from serving_server import data_uri, frame_event, running, text_event, update_event
from tiny import random_frames, tiny_model, tiny_processor
from websockets.sync.client import connect

from videollm_mod.cache_videollm_mod import MAX_OFFSET
from videollm_mod.serving import StreamingEngine


POOLS = ("session_", "asyncio_")
LIMITS = {"max_frames": 8, "max_text_tokens": 100}
FRAME = random_frames(1)[0]


def our_objects():
    """Return how many objects of our classes there are, and tensors and generators, by type."""
    gc.collect()
    found = Counter(type(x) for x in gc.get_objects())
    ours = {kind: count for kind, count in found.items() if str(kind.__module__).startswith("videollm_mod")}
    named = {kind.__qualname__: count for kind, count in ours.items()}
    return named | {kind.__name__: count for kind, count in found.items() if kind.__name__ in ("Tensor", "generator")}


def test_an_engine_keeps_nothing_of_streams_that_have_ended(tmp_path, monkeypatch):
    """Three times 150 frames. The first time fills caches of libraries."""
    # All objects of the process are counted after each part: libraries have a million.
    monkeypatch.setattr(soak, "TENTHS", 2)
    model, processor, clip = tiny_model(), tiny_processor(), list(random_frames(20))
    options = {"max_new_tokens": 3, "interval_threshold": 0.004}
    held, left = [], []
    with StreamingEngine(model, processor, max_streams=4, page_size=16, **LIMITS) as engine:
        for _ in range(3):
            run = soak.Soak(engine, clip, 150, 4, 2.0, tmp_path, checked=1, mean=12, options=options)
            tenths = run.run()
            assert sum(tenth.frames for tenth in tenths) == 150 == sum(ended.plan.frames for ended in run.ended)
            assert sum(tenth.spent.user for tenth in tenths) > 0 and max(tenth.pause for tenth in tenths) < 60
            ended = pickle.dumps(run.ended)  # bytes hold no objects
            del run, tenths
            held.append(soak.holdings(tmp_path))
            left.append(our_objects())
        assert engine.pool.free == {kind: list(range(count)) for kind, count in engine.pool.num_pages.items()}
        assert not engine.streams and engine.stats.dropped == 0
    assert not {"EngineStream", "StreamingSession", "StreamEvent"} & set(left[2])
    assert left[1] == left[2]
    ended = pickle.loads(ended)
    # Ten or more streams have ended each time: a leak of one object per stream would show in `left`. The number of all
    # objects also has those of libraries, which come and go.
    assert len(ended) >= 10 and held[1].pop("objects") and held[2].pop("objects")
    assert held[1] == held[2] and held[2]["files"] == 0
    for stream in ended:
        expected = soak.replay(model, processor, clip, stream.plan, fps=2.0, **LIMITS, **options)
        assert soak.is_equal(stream, expected)
    assert sum(len(stream.said) for stream in ended) > 50
    assert {True, False} == {stream.plan.breaks_off for stream in ended}
    assert any(stream.plan.saves for stream in ended) and max(stream.plan.frames for stream in ended) > 8
    gc.freeze()  # again, as tests/conftest.py has left them


def test_positions_start_again_at_the_cost_of_another_eviction():
    """The offset of an endless stream's positions returns to 0 once it exceeds `MAX_OFFSET`."""
    engine = StreamingEngine(tiny_model(), tiny_processor(), page_size=16, **LIMITS)
    stream, offsets, costs = engine.open(max_new_tokens=1, interval_threshold=0.0), [], []
    for index, frame in enumerate(random_frames(40)):
        if index == 14:
            stream.session.cache.position_offset = MAX_OFFSET - 100
        stream.push(frame, time=index / 2)
        with CountOperations() as counted:
            engine.run()
        offsets.append(stream.session.cache.position_offset)
        costs.append((sum(counted.counts.values()), counted.num_bytes))
    again = offsets.index(0, 14)
    others = [costs[at] for at in range(14, 40) if offsets[at] > offsets[at - 1]]
    assert len(others) > 10 and max(offsets) > MAX_OFFSET - 50 and offsets[-1] > 50
    for cost, other in zip(costs[again], map(max, zip(*others, strict=True)), strict=True):
        assert cost < 1.5 * other


def test_a_stream_that_says_something_else_is_found():
    whole, broken = (soak.Plan(0, 2, {}, frozenset(), breaks_off=x) for x in (False, True))
    said = [(0.0, 0, "user", "Hi.", ()), (1.0, 2, "assistant", "a b", (7, 8))]
    other = [said[0], (1.0, 2, "assistant", "c", (9,))]
    for plan in (whole, broken):
        assert soak.is_equal(soak.Ended(plan, said), said) and not soak.is_equal(soak.Ended(plan, other), said)
        assert not soak.is_equal(soak.Ended(plan, said), said[:1])
    assert soak.is_equal(soak.Ended(broken, said[:1]), said) and not soak.is_equal(soak.Ended(whole, said[:1]), said)


def visit(address, number):
    """Be some clients: sessions over both protocols that are closed, forgotten or broken off, chats and mistakes."""
    with httpx.Client(base_url=f"http://{address}", timeout=60) as http:
        name = f"door-{number}-{threading.get_ident()}"
        assert http.post("/v1/streaming/sessions", json={"id": name, "unprompted": False}).status_code == 201
        http.post(f"/v1/streaming/sessions/{name}/frame", content=b"no picture")
        http.post(f"/v1/streaming/sessions/{name}/ask", json={"text": ""})
        http.get(f"/v1/streaming/sessions/nobody-{number}")
        content = [{"type": "image_url", "image_url": {"url": data_uri(FRAME)}}, {"type": "text", "text": "What?"}]
        chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": number % 2 == 0}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
        http.delete(f"/v1/streaming/sessions/{name}")
        http.get("/metrics")
    with connect(f"ws://{address}/v1/realtime", open_timeout=60) as socket:
        for event in (update_event(unprompted=False), frame_event(FRAME), text_event("What?"), {"type": f"x{number}"}):
            socket.send(json.dumps(event))
        socket.send('{"type": "response.create"}')
        while json.loads(socket.recv(60))["type"] != "response.done":
            pass
        socket.socket.close() if number % 3 == 0 else socket.close(code=1000 if number % 3 == 1 else 3000)


def test_a_server_keeps_nothing_of_clients_that_have_left(tmp_path):
    """Sessions that nobody resumes expire. Labels of figures come from us, not from clients."""
    options = {"engine_options": {"max_streams": 8, "page_size": 16, **LIMITS}, "state_dir": tmp_path}
    options |= {"max_output_tokens": 2, "idle_seconds": 2.0, "resume_seconds": 0.5}
    seen = []
    with running(tiny_model(), tiny_processor(), **options) as (address, server):
        for _ in range(3):
            clients = [
                threading.Thread(target=lambda first=first: [visit(address, first + index) for index in range(3)])
                for first in range(2)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            end = clock.monotonic() + 60
            while (server.engine.streams or list(server.sessions)) and clock.monotonic() < end:
                clock.sleep(0.1)
            clock.sleep(0.2)
            labels = sorted(line.rpartition(" ")[0] for line in server.metrics.to_text().decode().splitlines())
            tasks = len(server.sessions._tasks)
            files = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
            # A pool starts another thread whenever none of its threads is idle, up to its limit.
            names = [thread.name for thread in threading.enumerate()]
            others = sorted(name for name in names if not name.startswith(POOLS))
            assert len(names) - len(others) <= (8 + 4) + 32  # the sessions' and that of asyncio
            seen.append((our_objects(), labels, tasks, len(files), others, os.listdir(tmp_path)))
    assert seen[1] == seen[2]
    assert seen[2][-1] == []
