# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Text of more tokens than a stream has memory for, and long text beside other streams."""

import asyncio
import json
import threading
import time as clock

import httpx
import numpy as np
import pytest
from engines import NARRATE, said, tiny_engine
from serving_server import connect, frame_event, picture, running, send, text_event, until, update_event
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.serving import StreamingEngine
from videollm_mod.serving import engine as serving_engine


SESSIONS, CHAT = "/v1/streaming/sessions", "/v1/chat/completions"
ENGINE = {"max_streams": 3, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
LONG = "☃" * 100  # 300 tokens


@pytest.fixture(scope="module")
def server():
    with running(tiny_model(), tiny_processor(), engine_options=ENGINE, max_output_tokens=3) as (address, server):
        server.address = address
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=f"http://{server.address}", timeout=60) as client:
        yield client


def is_too_long(answer, param):
    error = answer.json()["error"]
    found = (answer.status_code, error["code"], error["param"])
    assert found == (400, "context_length_exceeded", param), error
    return True


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_chat_request_that_does_not_fit_takes_no_seat_and_leaves_no_warning(server, client, monkeypatch):
    warned = []
    monkeypatch.setattr(serving_engine.logger, "warning", warned.append)
    opened = server.engine._num_opened
    short = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "No."}]
    for messages in (
        [{"role": "user", "content": LONG}],
        [{"role": "system", "content": LONG}, {"role": "user", "content": "Hi?"}],
        [*short * 30, {"role": "user", "content": "Hi?"}],
    ):
        answer = client.post(CHAT, json={"messages": messages})
        assert is_too_long(answer, "messages") and "more than 160 tokens" in answer.json()["error"]["message"]
    assert server.engine._num_opened == opened and not warned
    answer = client.post(CHAT, json={"messages": [*short * 3, {"role": "user", "content": "Hi?"}]})
    assert answer.status_code == 200, answer.text


def test_a_chat_request_that_just_fits_is_answered(server, client):
    def answer(count):
        return client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * count}]})

    most = next(count for count in range(160, 0, -1) if answer(count).status_code == 200)
    assert 80 < most < 160 and is_too_long(answer(most + 1), "messages")
    # A picture and a reply have room of their own.
    with httpx.Client(base_url=f"http://{server.address}", timeout=60) as other:
        shown = frame_event(np.zeros((32, 32, 3), np.uint8))["item"]["content"][0]["image_url"]
        content = [{"type": "image_url", "image_url": {"url": shown}}] * 4 + [{"type": "text", "text": "x" * most}]
        seen = other.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert seen.status_code == 200 and seen.json()["videollm_mod"]["frames"] == 4, seen.text


def test_a_question_over_plain_http_that_does_not_fit_is_refused(client):
    assert is_too_long(client.post(SESSIONS, json={"instructions": LONG}), "instructions")
    assert is_too_long(client.post(SESSIONS, json={"prompt": LONG, "speak": "every"}), "prompt")
    session = f"{SESSIONS}/{client.post(SESSIONS, json={'unprompted': False}).json()['id']}"
    client.post(f"{session}/frame", content=picture(random_frames(1)[0]))
    assert is_too_long(client.post(f"{session}/ask", json={"text": LONG}), "text")
    assert client.post(f"{session}/ask", json={"text": "What is there?"}).status_code == 200
    client.delete(session)


def test_texts_that_wait_are_counted_together(client):
    session = f"{SESSIONS}/{client.post(SESSIONS, json={'unprompted': False}).json()['id']}"
    answers = [client.post(f"{session}/ask", json={"text": "☃" * 20, "reply_now": False}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400] and is_too_long(answers[-1], "text")
    # When they are read, there is room again.
    for time in range(2):
        seen = client.post(f"{session}/frame?time={time}", content=picture(random_frames(1)[0]))
        assert seen.json()["frame"]["fate"] == "seen"
    assert client.post(f"{session}/ask", json={"text": "☃" * 20}).status_code == 200
    client.delete(session)


def test_realtime_texts_that_do_not_fit_get_an_error_and_the_session_goes_on(server):
    update = update_event(unprompted=False)
    instructs = {"type": "session.update", "session": {"type": "realtime", "instructions": LONG}}
    wrong = [
        (instructs, "session.instructions"),
        (update_event(prompt=LONG), "session.videollm_mod.prompt"),
        (text_event(LONG), "item.content"),
        ({"type": "response.create", "response": {"instructions": LONG}}, "response.instructions"),
    ]

    async def be_wrong():
        connection = await connect(server.address)
        await send(connection, update, frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        for event, param in wrong:
            await send(connection, event)
            events = await until(connection, "error")
            assert (events[-1].error.code, events[-1].error.param) == ("context_length_exceeded", param)
            assert "conversation.item.added" not in {event.type for event in events}
        await send(connection, text_event("What is there?"), {"type": "response.create"})
        await until(connection, "response.done")
        await connection.close()

    asyncio.run(be_wrong())


# ------------------------------------------------------------------------------------------------------------- reading


def ask_much(**options):
    """Two streams in one engine: one is asked something long, and one sees frames. Return them and the steps."""
    engine = tiny_engine(max_streams=3, max_text_tokens=600, **options)
    asked, other = (engine.open(speak=lambda _: False, max_new_tokens=4) for _ in range(2))
    asked.push(random_frames(1))
    engine.run()
    other.ask(NARRATE, reply_now=False)
    asked.ask("☃" * 150)
    other.push(random_frames(8), time=[float(time) for time in range(8)])
    lengths, launch = [], engine.runner.launch

    def note(caches, steps):
        lengths.append([len(step.ids) for step in steps])
        return launch(caches, steps)

    engine.runner.launch = note
    engine.run()
    return asked, other, lengths


def test_long_text_is_read_in_pieces_while_other_streams_go_on():
    whole, _, _ = ask_much()
    asked, other, lengths = ask_much(max_batch_tokens=100)
    assert said(asked.events) == said(whole.events) and asked.events[-1].role == "assistant"
    assert int(asked.session.cache.get_seq_length()) == int(whole.session.cache.get_seq_length())
    assert other.session.num_frames == 8 and max(sum(step) for step in lengths) <= 100
    pieces = [place for place, step in enumerate(lengths) if 100 in step]
    assert len(pieces) == 4 and pieces[-1] - pieces[0] > 3  # steps of the other stream lie between


def test_long_text_before_a_frame_is_read_in_pieces():
    found = []
    for most in (40, 2000):
        engine = tiny_engine(max_streams=1, max_text_tokens=600, max_batch_tokens=most)
        stream = engine.open(speak=lambda _: True, max_new_tokens=4)
        stream.ask("☃" * 50, reply_now=False)
        stream.push(random_frames(3))
        engine.run()
        found.append((said(stream.events), engine.stats.steps))
    assert found[0][0] == found[1][0] and found[0][1] > found[1][1] + 3


def test_a_stream_that_is_closed_reads_no_further_piece():
    engine = tiny_engine(max_streams=2, max_text_tokens=600, max_batch_tokens=40)
    stream = engine.open(max_new_tokens=4, speak=lambda _: False)
    stream.push(random_frames(1))
    engine.run()
    stream.ask("☃" * 100)
    engine.step()
    steps = engine.stats.steps
    stream.close(discard=True)
    engine.run()
    assert stream.is_done and engine.stats.steps == steps and not engine.streams


def test_a_stream_that_is_closed_while_frames_are_encoded_sees_none_of_them(monkeypatch):
    """Its next step was dropped, so later ones would evict what the cache does not have."""
    engine = tiny_engine(max_streams=1, max_frames=2)
    stream = engine.open(max_new_tokens=4, speak=lambda _: True)
    stream.push(random_frames(8))
    while stream._step is None or len(stream._step.ids) == 1 or stream.session.num_frames < 2:
        engine.step()
    encode = engine._encoder.encode

    def close_meanwhile(chosen):
        assert chosen
        stream.close(discard=True)
        return encode(chosen)

    monkeypatch.setattr(engine._encoder, "encode", close_meanwhile)
    seen = stream.session.num_frames
    engine.run()
    assert stream.is_done and stream.error is None and stream.session.num_frames == seen and not engine.streams


def test_a_client_that_leaves_during_long_text_frees_its_seat(monkeypatch):
    """Its stream is closed between two pieces."""
    options = {"max_text_tokens": 2000, "max_batch_tokens": 40}
    with running(tiny_model(), tiny_processor(), engine_options=ENGINE | options) as (address, server):
        run_steps = StreamingEngine._run_steps

        def slowly(engine, batch):
            clock.sleep(0.1)
            return run_steps(engine, batch)

        monkeypatch.setattr(StreamingEngine, "_run_steps", slowly)
        body = json.dumps({"messages": [{"role": "user", "content": "☃" * 600}]})  # 45 steps
        begin, before = clock.monotonic(), server.engine.stats.steps
        thread = threading.Thread(target=leave, args=(address, body))
        thread.start()
        thread.join()
        while server.engine.streams:
            assert clock.monotonic() < begin + 30
            clock.sleep(0.01)
        assert 1 <= server.engine.stats.steps - before < 30


def leave(address, body):
    """Send a chat request, and leave after half a second."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"http://{address}{CHAT}", content=body, timeout=0.5)


def test_a_stream_that_is_restored_has_as_much_memory_for_text(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.generation_config.max_text_tokens = 64  # less than the engine has room for
    engine = StreamingEngine(model, processor, max_streams=1, max_frames=12, page_size=16)
    stream = engine.open()
    stream.push(random_frames(1))
    engine.run()
    pages = {kind: len(table.pages) for kind, table in stream.session.cache.tables.items()}
    stream.save(tmp_path / "saved", close=True)
    engine.run()
    again = engine.restore(tmp_path / "saved")
    assert {kind: len(table.pages) for kind, table in again.session.cache.tables.items()} == pages
    assert again.session.max_text_tokens == 64
