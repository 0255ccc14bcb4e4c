# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""How many requests and connections a server has at once, and how long a client may let it wait."""

import asyncio
from typing import Any

from transformers.utils import logging
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol

from .error_answers import refuse
from .limits import Limits, RequestError


logger = logging.get_logger(__name__)

_HEAD_BYTES = 65_536  # of a request
_OWN_FILES = 200  # that a server has open besides those of its connections
_CLOSE_SECONDS = 10.0  # for which a WebSocket may take to close after its last event


class Concurrency:
    """
    Middleware that answers 503 while the server has as many requests and WebSockets as it may have. `/health` is
    answered always, since who watches a server must not take a busy one for a dead one.

    Args:
        app: The application.
        most (`int`): How many it may have.
        refusals (`Counter`): Counts refusals by reason.
    """

    def __init__(self, app: Any, *, most: int, refusals: Any) -> None:
        self.app, self.most, self.refusals = app, most, refusals
        self.num_open = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif self.num_open < self.most:
            self.num_open += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.num_open -= 1
        else:
            self.refusals.labels("busy").inc()
            busy = f"The server has {self.most} requests and connections, which is the most: try again later."
            error = RequestError(busy, status=503, code="server_busy", retry_after=5)
            await refuse(scope, receive, send, error)


class _ReadInTime:
    """
    Part of a protocol: it ends connections whose client does not read what it is sent, within a limit of time. The
    operating system takes some of it, and a connection whose end waits for the rest would wait for ever.
    """

    limits: Limits
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take note of a new connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called when a byte has to wait

    def pause_writing(self) -> None:
        """Take note that a client does not read."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Take note that it has read everything."""
        super().resume_writing()
        self._forget_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note of the end of the connection."""
        super().connection_lost(exc)
        self._forget_unread()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()


class _LimitedWebSocket(_ReadInTime, AutoWebSocketsProtocol):
    """The WebSocket protocol of uvicorn, with limits of time for clients that do not read."""

    async def run_asgi(self) -> None:
        """Run the application. A client has some time to read the last events after its end."""
        await super().run_asgi()
        self.loop.call_later(_CLOSE_SECONDS, self.transport.abort)


class _LimitedProtocol(_ReadInTime, H11Protocol):
    """
    The HTTP protocol of uvicorn, with limits for connections, which hold a file descriptor and need no key. There is a
    limit of time and number for those without a request, which are those before the end of its head and those after an
    answer, and a limit of time for those whose client does not read its answer. h11 limits the size of a head, which
    httptools would not.
    """

    idle: dict["_LimitedProtocol", None]  # connections without a request, the oldest first
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take note of a new connection."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in what a client has sent."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Take note of the end of an answer."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note of the end of the connection."""
        super().connection_lost(exc)
        self._watch()

    def _watch(self) -> None:
        # uvicorn takes a connection off this list when it is lost or becomes a WebSocket.
        is_idle = self in self.connections and (self.cycle is None or self.cycle.response_complete)
        if is_idle and self._late is None:
            self._late = self.loop.call_later(self.limits.head_seconds, self.transport.close)
            self.idle[self] = None
            if len(self.idle) > self.limits.max_connections:
                oldest = next(iter(self.idle))
                del self.idle[oldest]
                oldest.transport.close()
        elif not is_idle and self._late is not None:
            self._late.cancel()
            self._late = None
            self.idle.pop(self, None)


def allow_open_files(limits: Limits) -> None:
    """Let this process open as many files as a server needs, or warn that the system allows fewer."""
    try:
        import resource
    except ImportError:  # Windows
        return
    # Each request may open a file or a connection of its own.
    needed = 2 * limits.max_connections + _OWN_FILES
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY and now < needed:
        now = needed if most == resource.RLIM_INFINITY else min(needed, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, most))
        if now < needed:
            logger.warning(
                f"The system allows {now} open files, and {limits.max_connections} connections may need {needed}: "
                f"allow more, such as with `ulimit -n {needed}`, or lower `max_connections`."
            )


def uvicorn_options(limits: Limits) -> dict[str, Any]:
    """Return the options of `uvicorn.Config` that keep the limits of a server."""
    # `limit_concurrency` would count connections that send nothing, and refuse `/health` too.
    protocol = type("LimitedProtocol", (_LimitedProtocol,), {"limits": limits, "idle": {}})
    sockets = type("LimitedWebSocket", (_LimitedWebSocket,), {"limits": limits})
    options = {"http": protocol, "h11_max_incomplete_event_size": _HEAD_BYTES}
    options |= {"ws": sockets, "ws_max_size": limits.max_event_bytes}
    # Pictures do not get smaller, and a few kilobytes could unpack to many megabytes.
    options |= {"ws_per_message_deflate": False, "timeout_graceful_shutdown": 5}
    # Paths of WebSockets have resume tokens, which do not belong into a log.
    return options | {"access_log": False, "log_level": "warning"}


__all__ = ["Concurrency", "allow_open_files", "uvicorn_options"]
