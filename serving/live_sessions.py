# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""All sessions of a server, on one engine."""

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from transformers.utils import logging

from ..streaming_videollm_mod import StreamEvent
from .engine import StreamingEngine
from .faults import forget
from .limits import Limits, RequestError
from .live_session import LiveSession
from .metrics import Metrics
from .session_options import SessionOptions
from .stream import EngineStream
from .telling import Progress, Teller


logger = logging.get_logger(__name__)

_CLOSING = "the server is shutting down"
_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


class LiveSessions:
    """
    All sessions of a server, on one engine that runs in its thread.

    Args:
        engine ([`StreamingEngine`]): The engine.
        limits ([`Limits`]): What sessions may do.
        metrics ([`Metrics`]): Where to count.
        prefix (`str`, *optional*): What ids and resume tokens begin with. It ends with a dot.
        save_seconds (`float`, *optional*): Seconds after which [`SavedSessions`] saves a session with news.
    """

    when_behind = "drop_oldest"

    def __init__(
        self,
        engine: StreamingEngine,
        limits: Limits,
        metrics: Metrics,
        prefix: str = "",
        save_seconds: float | None = None,
    ) -> None:
        self.default_speak, self.save_seconds = engine.model.config.speak, save_seconds
        self.engine, self.limits, self.metrics, self.prefix = engine, limits, metrics, prefix
        self.is_draining = self._was_behind = False
        self._by_id: dict[str, LiveSession] = {}
        self._by_secret: dict[str, LiveSession] = {}
        self._threads = ThreadPoolExecutor(max_workers=engine.max_streams + 4, thread_name_prefix="session")
        self._telling = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        engine.on_step = self._on_step

    async def open(
        self,
        options: SessionOptions,
        *,
        instructions: str | None = None,
        max_output_tokens: int | None = None,
        stream_options: dict[str, Any] | None = None,
        session_id: str | None = None,
        owner: str | None = None,
        path: str = "session.videollm_mod",
    ) -> LiveSession:
        """
        Open a session.

        Args:
            options ([`SessionOptions`]): What its client has set.
            instructions (`str`, *optional*): What the user says at first, by default the model's usual query.
            max_output_tokens (`int`, *optional*): Most tokens of a reply, by default the limit.
            stream_options (`dict`, *optional*): Further options of [`~StreamingEngine.open`].
            session_id (`str`, *optional*): Its name after the prefix, by default a new one that nobody can guess.
            owner (`str`, *optional*): To whom it belongs; see [`owner_of`].
            path (`str`, *optional*): Where its options stand in requests, for errors.

        Raises:
            [`RequestError`]: If the server is full or shuts down, or an option or the name is wrong.
        """
        self.refuse_if_draining()
        session = LiveSession(self, options, instructions, stream_options, owner, path)
        if max_output_tokens is not None:
            session.max_output_tokens = min(max_output_tokens, self.limits.max_output_tokens)
        if session_id is not None:
            session.session_id = self.check_id(session_id)
        opening = self.start(self._open(session, session_id))
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:  # the client has left, and nobody else knows the session
            opening.add_done_callback(lambda _: self.start(session.close()))
            raise
        return session

    async def _open(self, session: LiveSession, session_id: str | None) -> None:
        await session.open()
        # Another client may take the name while the stream opens. The server may also begin to stop.
        if self.is_draining or session.session_id in self._by_id:
            await session.close()
            self.refuse_if_draining()
            self.check_id(session_id)
        self.add(session)

    def add(self, session: LiveSession) -> None:
        """Put an open session on the lists."""
        self._by_id[session.session_id] = self._by_secret[secret_of(session.token)] = session

    def count_dropped(self, session: LiveSession, reason: str) -> None:
        """Count a frame that the model did not see. The log tells the first that it was too slow for."""
        self.metrics.frames_dropped.labels(reason).inc()
        if reason == "behind" and not self._was_behind:
            self._was_behind = True
            logger.warning(
                f"The model is slower than the frames that come: session {session.session_id} drops some. The metric "
                "videollm_mod_frames_dropped_total counts them, and this line comes once. Fewer frames per second, "
                "fewer sessions or a smaller --frame-size may help."
            )

    def refuse_if_draining(self) -> None:
        """Raise [`RequestError`] if the server opens no more sessions."""
        if self.is_draining:
            leaving = "This server is shutting down: connect again."
            raise RequestError(leaving, status=503, code="server_draining", retry_after=1)

    def full(self) -> RequestError:
        """Count a refusal, and return the error that says that all streams are taken."""
        self.metrics.refusals.labels("full").inc()
        full = "All streams of this server are taken: try again later."
        return RequestError(full, status=503, code="server_full", retry_after=self.seconds_to_a_seat())

    def has(self, session_id: str) -> bool:
        """Whether there is a session of this name."""
        return session_id in self._by_id

    def is_of(self, session_id: str, owner: str | None) -> bool:
        """Whether there is a session of this name, which belongs to this owner."""
        return self.has(session_id) and self._by_id[session_id].owner == owner

    def has_token(self, token: str) -> bool:
        """Whether there is a session with this resume token, also if another server gave it."""
        return secret_of(token) in self._by_secret

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._by_id.values()))

    def check_id(self, session_id: Any) -> str:
        """Return the name of a session that is opened with this id. Raise [`RequestError`] if it is wrong or taken."""
        if not isinstance(session_id, str) or not _NAME.fullmatch(session_id):
            wrong = "`id` must have 1 to 64 letters, digits, dashes and underscores."
            raise RequestError(wrong, code="invalid_value", param="id")
        named = self.prefix + session_id
        if named in self._by_id:
            raise id_taken(named)
        return named

    def find(self, session_id: str, owner: str | None = None) -> LiveSession:
        """Return a session of an owner by its name. Raise [`RequestError`] if there is none."""
        session = self._by_id.get(session_id)
        if session is None or session.owner != owner:
            gone = "There is no such session: it was closed, or it expired."
            raise RequestError(gone, status=404, code="no_session")
        return session

    def find_token(self, token: str, owner: str | None = None) -> LiveSession:
        """Return the session of an owner that a resume token belongs to. Raise [`RequestError`] if there is none."""
        session = self._by_secret.get(secret_of(token))
        if session is None or session.owner != owner:
            gone = "There is no session to resume with this token: it was closed, or it expired."
            raise RequestError(gone, status=404, code="no_session")
        return session

    def forget(self, session: LiveSession) -> None:
        """Take a session that is over off the lists."""
        if self._by_secret.pop(secret_of(session.token), None) is not None:
            del self._by_id[session.session_id]

    async def drain(self) -> None:
        """Open no more sessions, and end each one when what it has accepted is seen and answered."""
        self.is_draining = True
        for session in self:
            await session.finish(_CLOSING)
        while self._by_id:
            await asyncio.sleep(0.1)

    async def end_all(self) -> None:
        """End all sessions now. What waits is discarded."""
        for session in self:
            await session.close(_CLOSING)

    async def close(self) -> None:
        """End all sessions, and the threads that work for them."""
        await self.end_all()
        self.engine.on_step = None
        self._threads.shutdown(wait=False)

    async def run(self, work: Callable[[], Any]) -> Any:
        """Run a call in a thread, since it may wait for the engine."""
        return await self._loop.run_in_executor(self._threads, work)

    async def freed(self, stream: EngineStream) -> None:
        """Wait until a stream that was closed has given back its memory."""
        with suppress(RuntimeError):  # the stream was ended by a fault
            await self.run(lambda: list(stream))

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run a coroutine in the background, also if the caller is cancelled."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def seconds_to_a_seat(self) -> float:
        """Return after how many seconds a seat may be free."""
        ends = [session.ends_at - self._loop.time() for session in self._by_id.values()]
        return min([5.0, *ends])

    def tell(self, session: LiveSession) -> None:
        """Pass on what a session has done, before its stream came to rest; called in a thread."""
        with self._telling:
            self._tell([session], {session.stream: session.stream.events})

    def _on_step(self, said: Sequence[tuple[EngineStream, StreamEvent]]) -> None:
        """Pass on what a step of the engine did; called in the engine's thread."""
        events: dict[EngineStream, list[StreamEvent]] = {}
        for stream, event in said:
            events.setdefault(stream, []).append(event)
        with self._telling:
            self._tell(list(self._by_id.values()), events)

    def _tell(self, sessions: Sequence[LiveSession], events: dict[EngineStream, list[StreamEvent]]) -> None:
        found: list[tuple[LiveSession, Teller, Progress]] = []
        for session in sessions:
            stream, teller = session.stream, session.teller
            try:
                progress = None if teller is None else teller.take(stream, events.get(stream, ()))
            except Exception as error:  # the engine's thread must go on for the other sessions
                self._call(self._fail, session, error)
                continue
            if progress is not None:
                found.append((session, teller, progress))
        if found:
            self._call(self._deliver, found)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed at the end of the server
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, found: Sequence[tuple[LiveSession, Teller, Progress]]) -> None:
        for session, teller, progress in found:
            # A stream that was opened again has another teller.
            if session.over is None and session.teller is teller:
                try:
                    session.deliver(progress)
                except Exception as error:  # the others get theirs
                    self._fail(session, error)

    def _fail(self, session: LiveSession, error: Exception) -> None:
        """End a session in which the server has failed."""
        logger.error(f"Session {session.session_id} was ended: {error!r}{forget(error)}")
        self.start(session.close("the server failed"))


def secret_of(token: str) -> str:
    """Return a resume token without the prefix of its server. It stays when a session goes on at another server."""
    return token.rpartition(".")[2]


def id_taken(session_id: str) -> RequestError:
    """Return the error for a client that opens a session under the name of another one."""
    return RequestError(f"There is a session {session_id!r} already.", status=409, code="id_taken", param="id")


__all__ = ["LiveSessions", "id_taken", "secret_of"]
