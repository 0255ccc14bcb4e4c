# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The server over loopback, with the clients that people use: the `openai` client and curl."""

import asyncio

import httpx
import pytest
from engines import embedded
from openai import AsyncOpenAI
from serving_server import frame_event, running


@pytest.fixture(scope="module")
def address():
    model, processor, _ = embedded()
    options = {"max_streams": 34, "max_frames": 24, "max_text_tokens": 256}
    with running(model, processor, name="tiny", engine_options=options, allow_private_urls=True) as (at, app):
        while app.state.server.status == "starting":
            httpx.get(f"http://{at}/metrics")
        yield at


def narration(frames):
    """What a session says about frames at 2 per second, asked to narrate."""
    model, processor, _ = embedded()
    return [(event.time, event.text) for event in model.narrate(processor, frames, fps=2)]


async def connect(address, **query):
    client = AsyncOpenAI(api_key="-", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1")
    return await client.realtime.connect(model="tiny", extra_query=query).enter()


async def events_until(connection, kind, count=1):
    """Return the events up to the `count`-th of a kind."""
    found = []
    while sum(event.type == kind for event in found) < count:
        found.append(await asyncio.wait_for(connection.recv(), 20))
    return found


def test_ready_when_the_model_answers(address):
    assert httpx.get(f"http://{address}/health").json() == {"status": "ok"}
    assert [model["id"] for model in httpx.get(f"http://{address}/v1/models").json()["data"]] == ["tiny"]


def test_the_openai_client_hears_what_a_session_says(address):
    frames = embedded()[2]
    expected = narration(frames)

    async def watch():
        connection = await connect(address)
        assert (await connection.recv()).type == "session.created"
        for number, frame in enumerate(frames):
            await connection.send(frame_event(frame, number / 2, id=f"frame_{number}"))
        found = await events_until(connection, "response.done", len(expected))
        await connection.close()
        return found

    found = asyncio.run(watch())
    done = [event for event in found if event.type == "response.done"]
    assert [(event.videollm_mod["time"], event.response.output[0].content[0].text) for event in done] == expected
    seen = [event for event in found if event.type == "conversation.item.done" and event.item.role == "user"]
    assert [(event.item.id, event.videollm_mod["fate"]) for event in seen][:8] == [
        (f"frame_{n}", "seen") for n in range(8)
    ]
    texts = {}
    for event in found:
        if event.type == "response.output_text.delta":
            texts.setdefault(event.response_id, []).append(event.delta)
    assert ["".join(texts[e.response.id]) for e in done] == [e.response.output[0].content[0].text for e in done]
    assert all(len(deltas) > 2 for deltas in texts.values())
