# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A server that is about to stop: what was accepted is answered, and nothing new is."""

import asyncio

import httpx
import pytest
from engines import embedded
from serving_server import ROOMY, picture, running
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.serving.draining import draining
from videollm_mod.serving.server import create_app
from videollm_mod.serving.session_options import SessionOptions


def test_draining_answers_what_was_accepted_and_opens_nothing():
    model, processor, frames = embedded()
    with running(model, processor, session_prefix="here.", engine_options=ROOMY) as (address, server):
        path, sessions = f"http://{address}/v1/streaming/sessions", server.sessions
        name = httpx.post(path).json()["id"]
        session = sessions.find(name)
        assert name.startswith("here.sess_") and session.token.startswith("here.")
        httpx.post(f"{path}/{name}/frame", content=picture(frames[0]))
        told = []
        session.listeners.append(lambda kind, *what: told.append((kind, *what)))

        async def ask_and_drain():
            reply = await session.ask("What do you see?")
            await asyncio.wait_for(sessions.drain(), 30)
            return reply

        reply = asyncio.run_coroutine_threadsafe(ask_and_drain(), session._loop).result()
        assert reply.text and ("end", reply) in told and told[-1] == ("over", "the server is shutting down")
        refused = httpx.post(path)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_draining"
        assert refused.headers["Retry-After"] == "1"


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_removed_server_saves_sessions_if_another_one_can_resume_them(tmp_path, goes_on):
    """Nothing is open then but sessions over plain HTTP, so that the application is asked to end at once."""
    engine = {"max_streams": 3, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
    app = create_app(tiny_model(), tiny_processor(), state_dir=tmp_path, engine_options=engine)
    sessions, replies, removed = [], [], []

    async def leave():
        async with draining(app, 30.0, lambda: bool(removed), lambda: goes_on)(app):
            live = app.state.server.sessions
            for name, frame in zip(("door", "gate"), random_frames(2), strict=True):
                sessions.append(await live.open(SessionOptions(), session_id=name))
                await sessions[-1].push(sessions[-1].new_frame(time=0.0), frame)
                replies.append(await sessions[-1].ask(None))
            removed.append(True)
            while not live.is_draining:
                await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert [session.over for session in sessions] == ["saved" if goes_on else "the server is shutting down"] * 2
    assert len([place for place in tmp_path.iterdir() if len(place.name) > 63]) == (2 if goes_on else 0)
    assert goes_on or all(reply.event is not None for reply in replies), "they say what they have to say"


def test_a_removed_server_ends_also_if_its_sessions_take_too_long(tmp_path):
    engine = {"max_streams": 3, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
    app = create_app(tiny_model(), tiny_processor(), state_dir=tmp_path, engine_options=engine)
    server, removed = app.state.server, []

    async def leave():
        async with draining(app, 0.1, lambda: bool(removed), lambda: False)(app):
            while server.status != "ok":
                await asyncio.sleep(0.01)
            session = await server.sessions.open(SessionOptions())
            with server.engine._stepping:
                await session.push(session.new_frame(), random_frames(1)[0])
                removed.append(True)
                await session.until(lambda: session.over is not None)
            return session

    assert asyncio.run(leave()).over == "the server is shutting down"
    assert not server.engine.is_running and not list(server.sessions)
