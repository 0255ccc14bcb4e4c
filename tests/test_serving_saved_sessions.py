# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sessions that outlive their server: saved when it stops, and resumed on the next as if it had not."""

import asyncio
import signal
from contextlib import suppress
from functools import partial

import httpx
import pytest
from engines import embedded
from serving_server import ROOMY, connect, frame_event, narration, picture, running, said, send, until
from test_serving_server import start
from tiny import tiny_model, tiny_processor


TINY = {"max_streams": 2, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}


def saved_in(folder):
    return [path for path in folder.iterdir() if len(path.name) == 64]


def numbers_of(events):
    return [int(event.event_id.removeprefix("event_")) for event in events]


async def send_frames(connection, frames, start=0):
    await send(connection, *(frame_event(frame, number / 2) for number, frame in enumerate(frames, start=start)))


async def accepted(connection, count):
    """Return the events until the server has accepted `count` items of the client."""
    found = []
    while sum(event.type == "conversation.item.added" and event.item.role == "user" for event in found) < count:
        found += await until(connection, "conversation.item.added")
    return found


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def small(state):
    """Return a function that serves a tiny model, whose words mean nothing."""
    return partial(running, tiny_model(), tiny_processor(), state_dir=state, engine_options=TINY, max_output_tokens=8)


def test_a_session_of_a_stopped_process_goes_on_in_another(state):
    frames = embedded()[2]
    process, address = start(0, "--state-dir", str(state))

    async def begin():
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send_frames(connection, frames[:14])
        heard = await accepted(connection, 14)  # the client does not read what comes later
        process.send_signal(signal.SIGTERM)
        with suppress(Exception):
            while True:
                await asyncio.wait_for(connection.recv(), 30)
        return token, heard

    async def go_on(address, token, last):
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": last})
        created = await connection.recv()
        await send_frames(connection, frames[14:], start=14)
        heard = await until(connection, "response.done", len(narration()) - len(said(before)))
        await connection.close()
        return created.session, heard

    token, before = asyncio.run(begin())
    assert process.wait(30) in (0, -signal.SIGTERM)
    (folder,) = saved_in(state)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4 and all(path.stat().st_mode & 0o077 == 0 for path in [state, folder, *files])
    assert not any(token.encode() in path.read_bytes() for path in files)
    model, processor, _ = embedded()
    with running(model, processor, state_dir=state, engine_options=ROOMY) as (other, _):
        created, after = asyncio.run(go_on(other, token, before[-1].event_id))
        assert saved_in(state) == []
    assert created.videollm_mod["resumed"] and created.videollm_mod["resume_token"] == token
    numbers = numbers_of(before + after)
    assert numbers == list(range(2, 2 + len(numbers)))  # each event once, in order
    assert said(before + after) == narration()


def test_what_waits_is_seen_and_answered_after_the_restart(small):
    """Also a session that speaks only when it is asked to, and a question that comes before others."""
    frames = embedded()[2][:5]
    update = {"type": "session.update", "session": {"type": "realtime", "videollm_mod": {"unprompted": False}}}
    questions = [{"type": "response.create", "response": {"metadata": {"number": str(i)}}} for i in range(3)]
    questions[2]["videollm_mod"] = {"interrupt": True}

    async def ask(address, server, *, stops):
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send(connection, update)
        await send_frames(connection, frames[:2])
        before = await until(connection, "conversation.item.done", 2)
        (session,) = server.sessions
        with server.engine.changed:
            session.stream.session.is_paused = stops
        await send_frames(connection, frames[2:], start=2)
        before += await accepted(connection, 3)
        await send(connection, *questions, {"type": "session.heartbeat"})
        while stops and len(session.asked) < 3:
            await asyncio.sleep(0.01)
        return connection, token, before

    async def undisturbed(address, server):
        connection, _, before = await ask(address, server, stops=False)
        found = before + await until(connection, "response.done", 3)
        await connection.close()
        return found

    async def rest(address, token, last):
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": last})
        created = await connection.recv()
        return created, await until(connection, "response.done", 3)

    with small() as (address, server):
        _, token, before = asyncio.run(ask(address, server, stops=True))
    with small() as (address, _):
        created, after = asyncio.run(rest(address, token, before[-1].event_id))
    fates = [event.videollm_mod["fate"] for event in after if getattr(event, "videollm_mod", {}).get("fate")]
    assert fates == ["seen"] * 3
    done = [event.response.metadata["number"] for event in after if event.type == "response.done"]
    assert done == ["2", "0", "1"]


def test_sessions_over_http_go_on_by_their_name(state):
    model, processor, frames = embedded()
    serve = partial(running, model, processor, state_dir=state, engine_options=ROOMY, api_keys=["first", "second"])
    client, heard = httpx.Client(headers={"api-key": "first"}, timeout=60), []

    def show(address, numbers):
        for number in numbers:
            path = f"http://{address}/v1/streaming/sessions/door/frame?time={number / 2}"
            answer = client.post(path, content=picture(frames[number]))
            assert answer.status_code == 200, answer.text
            heard.extend((event["time"], event["text"]) for event in answer.json()["said"])

    with serve() as (address, _):
        client.post(f"http://{address}/v1/streaming/sessions", json={"id": "door"})
        show(address, range(8))
    with serve() as (address, _):
        path = f"http://{address}/v1/streaming/sessions/door"
        assert httpx.get(path, headers={"api-key": "second"}).status_code == 404  # it belongs to the other key
        shown = client.get(path).json()
        assert (shown["frames"], shown["frames_received"]) == (8, 8)
        show(address, range(8, len(frames)))
    assert heard == narration()
