# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A server that is about to stop: what was accepted is answered, and nothing new is."""

import asyncio

import httpx
from engines import embedded
from serving_server import ROOMY, picture, running


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
