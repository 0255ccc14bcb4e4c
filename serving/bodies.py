# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests and JSON of clients, read within limits of size, time and memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from .limits import Limits, RequestError


# Brackets and commas of a JSON text. Each may become an object of a hundred bytes.
_MOST_VALUES = 100_000


class Bodies:
    """
    Reads the bodies of requests.

    Args:
        limits ([`Limits`]): Its `max_held_bytes` and `body_seconds` hold for all bodies.

    Attributes:
        num_bytes (`int`): Bytes of the bodies that are held now.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.num_bytes = limits, 0

    @asynccontextmanager
    async def read(self, request: Request, most: int) -> AsyncIterator[bytearray]:
        """
        Give the body of a request. It counts among those that are held until the context ends.

        Raises:
            [`RequestError`]: If it has more than `most` bytes, comes too slowly, or the server holds too many bodies.
        """
        # The length is checked first, so that nothing of a large body is read.
        if float(request.headers.get("content-length", 0)) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            await self._fill(body, request, most)
            yield body
        finally:
            self.num_bytes -= len(body)

    @asynccontextmanager
    async def read_json(self, request: Request, most: int) -> AsyncIterator[dict[str, Any]]:
        """Give the JSON object of a request, which may be empty. Raise [`RequestError`] if it is something else."""
        async with self.read(request, most) as body:
            found = load_json(body) if body.strip() else {}
            if not isinstance(found, dict):
                raise RequestError("The body of the request must be a JSON object.", code="invalid_type")
            yield found

    async def _fill(self, body: bytearray, request: Request, most: int) -> None:
        async def fill() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                self.num_bytes += len(chunk)
                if len(body) > most:
                    raise _too_large(most)
                if self.num_bytes > self.limits.max_held_bytes:
                    busy = "The server reads too many large requests at once: try again later."
                    raise RequestError(busy, status=503, code="server_busy", retry_after=5)

        try:
            await asyncio.wait_for(fill(), self.limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            slow = f"The body of the request took longer than {self.limits.body_seconds:g} s, which is the limit."
            raise RequestError(slow, status=408, code="request_timeout") from None
        except ClientDisconnect:
            raise RequestError("The client left before the end of its request.", code="client_left") from None


def load_json(text: str | bytes | bytearray) -> Any:
    """Return what a JSON text of a client says. Raise [`RequestError`] if it is not JSON, or has too many values."""
    marks = "[{," if isinstance(text, str) else (b"[", b"{", b",")
    if sum(text.count(mark) for mark in marks) > _MOST_VALUES:
        raise RequestError(f"The JSON has more than {_MOST_VALUES} values.", status=413, code="request_too_large")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("This is not valid JSON.", code="invalid_json") from None


def _too_large(most: int) -> RequestError:
    wrong = f"The body of the request has more than {most} bytes, which is the limit."
    return RequestError(wrong, status=413, code="request_too_large")


__all__ = ["Bodies", "load_json"]
