# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A server on loopback in a thread of the test process, and what its clients send."""

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import uvicorn
from engines import embedded
from openai import AsyncOpenAI
from PIL import Image

from videollm_mod.serving.server import create_app, uvicorn_options


ROOMY = {"max_streams": 34, "max_frames": 24, "max_text_tokens": 256, "page_size": 32}


@contextmanager
def running(model: Any, processor: Any, *, port: int = 0, **options: Any) -> Iterator[tuple[str, Any]]:
    """
    Serve a model at a port, by default a free one. Gives its address, such as `127.0.0.1:40001`, and what the
    endpoints share.
    """
    app = create_app(model, processor, **options)
    server, ready = app.state.server, threading.Event()
    server.when_ready = ready.set
    listener = socket.create_server(("127.0.0.1", port))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a slow reader fills it
    runner = uvicorn.Server(uvicorn.Config(app, **uvicorn_options(server.limits)))
    thread = threading.Thread(target=lambda: asyncio.run(runner.serve([listener])), daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        yield "{}:{}".format(*listener.getsockname()), server
    finally:
        runner.should_exit = True
        thread.join()


def picture(frame: Any, kind: str = "PNG") -> bytes:
    """Return a frame as a picture file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format=kind)
    return file.getvalue()


def data_uri(frame: Any, kind: str = "PNG") -> str:
    """Return a frame as a data URI."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture(frame, kind)).decode()}"


def frame_event(frame: Any, time: float | None = None, **item: Any) -> dict[str, Any]:
    """Return the event that sends a frame."""
    item |= {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": data_uri(frame)}]}
    event = {"type": "conversation.item.create", "item": item}
    return event | ({} if time is None else {"videollm_mod": {"time": time}})


def text_event(text: str, **item: Any) -> dict[str, Any]:
    """Return the event that sends a text."""
    item |= {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    return {"type": "conversation.item.create", "item": item}


def update_event(**options: Any) -> dict[str, Any]:
    """Return the event that sets options of a session, in the extension field."""
    return {"type": "session.update", "session": {"type": "realtime", "videollm_mod": options}}


@lru_cache
def narration() -> list[tuple[float, str]]:
    """What the embedded checkpoint says about its sample clip without a server."""
    model, processor, frames = embedded()
    return [(event.time, event.text) for event in model.narrate(processor, frames, fps=2)]


async def connect(address: str, *, model: str = "videollm-mod", **options: Any) -> Any:
    """Return a realtime connection of the `openai` client. Options are those of `connect`."""
    client = AsyncOpenAI(api_key="key", base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1")
    patience = {"open_timeout": 60}
    return await client.realtime.connect(model=model, websocket_connection_options=patience, **options).enter()


async def send(connection: Any, *events: dict[str, Any]) -> None:
    """Send events."""
    for event in events:
        await connection.send(event)


async def until(connection: Any, kind: str, count: int = 1) -> list[Any]:
    """Return the events up to the `count`-th of a kind."""
    found: list[Any] = []
    while sum(event.type == kind for event in found) < count:
        found.append(await asyncio.wait_for(connection.recv(), 120))
    return found


def said(events: list[Any]) -> list[tuple[float, str]]:
    """Return time and text of the responses that are done among events."""
    done = [event for event in events if event.type == "response.done"]
    return [(event.videollm_mod["time"], event.response.output[0].content[0].text) for event in done]
