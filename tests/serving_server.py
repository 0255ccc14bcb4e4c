# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A server on loopback, in a thread of the test process."""

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image

from videollm_mod.serving.server import create_app


@contextmanager
def running(model: Any, processor: Any, **options: Any) -> Iterator[tuple[str, Any]]:
    """Serve a model at a free port. Gives its address, such as `127.0.0.1:40001`, and the application."""
    app = create_app(model, processor, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a slow reader fills it
    config = uvicorn.Config(app, log_level="warning", ws_max_size=app.state.server.limits.max_event_bytes)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield "{}:{}".format(*listener.getsockname()), app
    finally:
        server.should_exit = True
        thread.join()


def jpeg(frame: Any) -> bytes:
    """Return a frame as a JPEG file without visible loss."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=100, subsampling=0)
    return file.getvalue()


def png(frame: Any) -> bytes:
    """Return a frame as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return file.getvalue()


def frame_event(frame: Any, time: float | None = None, **item: Any) -> dict[str, Any]:
    """Return the event that sends a frame."""
    url = f"data:image/png;base64,{base64.b64encode(png(frame)).decode()}"
    item |= {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": url}]}
    event = {"type": "conversation.item.create", "item": item}
    return event | ({} if time is None else {"videollm_mod": {"time": time}})
