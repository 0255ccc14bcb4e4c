# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A server for cameras, agents and scripts: OpenAI's realtime and chat protocols, and plain HTTP, on one engine."""

import asyncio
import logging as python_logging
import os
import socket
import time as clock
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers.utils import logging

from ..checks_videollm_mod import check_count
from .access import Access, check_keys, owner_of
from .bodies import Bodies
from .chat import Completion, answer, unless_gone
from .chat_messages import ChatRequest
from .connections import Concurrency, allow_open_files, uvicorn_options
from .engine import StreamingEngine
from .error_answers import add_error_answers, error_response, moved_response
from .event_fields import boolean_of, check_model
from .fetching import read_picture
from .limits import Limits, RequestError
from .live_session import LiveSession
from .live_sessions import LiveSessions
from .metrics import Metrics
from .realtime import Connection, Conversation
from .realtime_events import Audio
from .realtime_requests import handle_event, read_options
from .saved_sessions import SavedSessions
from .session_options import SessionOptions
from .speech_endpoints import Speaker, Transcriber
from .state_folder import StateFolder, check_saving
from .telling import Reply
from .wanted_sessions import SessionMovedError


logger = logging.get_logger(__name__)


class Server:
    """
    What the endpoints share.

    Args:
        engine ([`StreamingEngine`]): The engine. It runs while the application does.
        limits ([`Limits`]): Limits.
        name (`str`): The model's name for clients.
        allows_private_urls (`bool`): Whether URLs may lead into a private network.
        session_prefix (`str`): What ids and resume tokens of sessions begin with.
        state_folder ([`StateFolder`], *optional*): Where sessions are saved when the application ends.
        save_seconds (`float`, *optional*): Seconds after which a session that has news is saved before that.
        audio ([`Audio`]): How sessions hear and speak.

    Attributes:
        sessions ([`LiveSessions`]): All sessions, while the application runs.
        saved ([`SavedSessions`]): These and the saved ones.
        bodies ([`Bodies`]): Reads the bodies of requests.
        allowed_hosts (`set[str]`): Names of the server that clients may use if no key is needed, `"*"` for all.
        status (`str`): `"starting"`, `"ok"` once the model has answered, or what is wrong.
        when_ready (`Callable`): Called once the model has answered, or has failed to.
    """

    def __init__(
        self,
        engine: StreamingEngine,
        limits: Limits,
        name: str,
        allows_private_urls: bool,
        session_prefix: str,
        state_folder: StateFolder | None,
        save_seconds: float | None,
        audio: Audio,
    ) -> None:
        self.engine, self.limits, self.name, self.session_prefix = engine, limits, name, session_prefix
        self.allows_private_urls = allows_private_urls
        self.audio = audio
        self.metrics = Metrics(engine)
        self.state_folder, self.save_seconds = state_folder, save_seconds
        self.bodies = Bodies(limits)
        self.sessions: LiveSessions | None = None
        self.saved: SavedSessions | None = None
        self.created = int(clock.time())
        self.allowed_hosts: set[str] = set()
        self.when_ready: Callable[[], None] = lambda: None
        self._status = "starting"

    @asynccontextmanager
    async def run(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the engine in its thread, and ask the model something before the server is ready."""
        loop = asyncio.get_running_loop()
        given = (self.limits, self.metrics, self.session_prefix, self.save_seconds)
        self.sessions = LiveSessions(self.engine, *given)
        self.saved = SavedSessions(self.sessions, self.state_folder, self.name, self.audio)
        async with AsyncExitStack() as stack:
            for endpoint in filter(None, (self.audio.transcriber, self.audio.speaker)):
                await stack.enter_async_context(endpoint)
            await loop.run_in_executor(None, self.engine.__enter__)
            # At the end each of these runs, the last one first, also if another fails.
            if self.state_folder is not None:
                stack.callback(self.state_folder.release)
            stack.push_async_callback(loop.run_in_executor, None, self.engine.__exit__, None, None, None)
            stack.push_async_callback(self.sessions.close)
            stack.push_async_callback(self.saved.save_all)
            # The check has its seat before anybody is served: a full server would answer that it is full.
            seat = self.sessions.open(SessionOptions(unprompted=False), instructions="", max_output_tokens=1)
            (opened,) = await asyncio.gather(seat, return_exceptions=True)
            self.sessions.start(self._check_model(opened))
            yield

    @property
    def status(self) -> str:
        if self._status != "ok":
            return self._status
        if not self.engine.is_running:
            return "the engine has stopped"
        begin = self.engine.stats.busy_since
        is_stuck = begin is not None and clock.monotonic() - begin > self.limits.stall_seconds
        return f"the engine has made no step for {self.limits.stall_seconds:g} s" if is_stuck else "ok"

    async def _check_model(self, session: LiveSession | BaseException) -> None:
        """Ask about a black frame in a session, or tell why it could not be opened."""
        try:
            if isinstance(session, BaseException):
                raise session
            await session.push(session.new_frame(), np.zeros((64, 64, 3), np.uint8))
            reply = await session.ask(None)
            await session.until(lambda: reply.is_over)
            await session.close()
            self._status = "ok"
        except Exception as error:
            logger.exception("The model did not answer.")
            self._status = f"the model did not answer: {error}"
        self.when_ready()


def create_app(
    model: Any,
    processor: Any,
    *,
    name: str = "videollm-mod",
    api_keys: Sequence[str] = (),
    cors: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    allow_private_urls: bool = False,
    session_prefix: str = "",
    state_dir: str | os.PathLike | StateFolder | None = None,
    max_state_bytes: int = 10_000_000_000,
    save_seconds: float | None = None,
    transcriber: Transcriber | None = None,
    speaker: Speaker | None = None,
    engine_options: dict[str, Any] | None = None,
    **limits: Any,
) -> FastAPI:
    """
    Return the application that serves a model.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        name (`str`, *optional*, defaults to `"videollm-mod"`): The model's name for clients.
        api_keys (`Sequence[str]`, *optional*): Keys of which clients must have one. Without keys, everyone is served.
        cors (`Sequence[str]`, *optional*): Origins whose web pages may use the server, `"*"` for all.
        allowed_hosts (`Sequence[str]`, *optional*): Names of the server that clients may use without a key, `"*"` for
            all. IP addresses, `localhost` and names below it are always allowed. Other names could belong to a web
            page whose owner lets its name lead to this server.
        allow_private_urls (`bool`, *optional*, defaults to `False`): Whether requests may name URLs in a private
            network, such as `http://localhost`.
        session_prefix (`str`, *optional*): What ids and resume tokens of sessions begin with, for routers. It must end
            with a dot.
        state_dir (`str`, `Path` or [`StateFolder`], *optional*): Folder in which sessions are saved when the
            application ends, and from which clients resume them. Servers of one model may share it. By default,
            sessions end with the application.
        max_state_bytes (`int`, *optional*, defaults to 10,000,000,000): Most bytes of all saved sessions.
        save_seconds (`float`, *optional*): Seconds after which a session that has news is saved in `state_dir` while
            it goes on, so that clients also resume it if the server is killed. By default, no session is.
        transcriber ([`Transcriber`], *optional*): Makes texts of what clients say. Without it, audio is refused.
        speaker ([`Speaker`], *optional*): Reads replies aloud. Without it, all replies are texts.
        engine_options (`dict`, *optional*): Options of [`StreamingEngine`], such as `max_streams`.
        limits: Fields of [`Limits`].

    Raises:
        `ValueError`: If a limit or an option is out of range, or a key is empty or not printable ASCII.
    """
    check_keys(api_keys)
    if session_prefix and not session_prefix.endswith("."):
        raise ValueError(f"`session_prefix` must end with a dot, got {session_prefix!r}.")
    check_count("max_state_bytes", max_state_bytes)
    check_saving(save_seconds, state_dir)
    is_made = state_dir is None or isinstance(state_dir, StateFolder)
    folder = state_dir if is_made else StateFolder(state_dir, max_state_bytes)
    known, audio = Limits(**limits), Audio(transcriber, speaker)
    options = {"output_router_scores": True, "max_new_tokens": known.max_output_tokens, **(engine_options or {})}
    engine = StreamingEngine(model, processor, **options)
    server = Server(engine, known, name, allow_private_urls, session_prefix, folder, save_seconds, audio)
    app = FastAPI(title="VideoLLM-MoD", openapi_url=None, lifespan=server.run)
    app.state.server = server
    server.allowed_hosts.update(host.lower() for host in allowed_hosts)
    _add_access(app, server, api_keys, cors)
    add_error_answers(app)
    for add in (_add_basics, _add_sessions, _add_chat, _add_realtime):
        # FastAPI keeps every endpoint in a cache, which must not keep the memory of a server that has ended.
        add(app, weakref.proxy(server))
    return app


def run(app: FastAPI, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """
    Serve an application until Ctrl+C or SIGTERM.

    Args:
        app (`FastAPI`): What [`create_app`] returned.
        host (`str`), port (`int`): Where to listen; port 0 for a free one.
        say (`Callable`): Gets a line with the address when the server is ready.

    Raises:
        `OSError`: If it cannot listen there.
    """
    server = app.state.server
    allow_open_files(server.limits)
    server.allowed_hosts.add(host.lower())
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise OSError(f"The server cannot listen at {host}, port {port} ({why}): choose others.") from None
    shown = f"[{host}]" if ":" in host else host
    server.when_ready = lambda: say(f"{server.name}: http://{shown}:{listener.getsockname()[1]} ({server.status})")
    # uvicorn reports each WebSocket that was refused with a status as a fault.
    is_fault = "ASGI callable returned without completing handshake.".__ne__
    python_logging.getLogger("uvicorn.error").addFilter(lambda record: is_fault(record.getMessage()))
    uvicorn.Server(uvicorn.Config(app, **uvicorn_options(server.limits))).run([listener])


def _add_access(app: FastAPI, server: Server, api_keys: Sequence[str], cors: Sequence[str]) -> None:
    access = {"api_keys": tuple(api_keys), "origins": tuple(cors), "hosts": server.allowed_hosts}
    # The one added last comes first: requests without a key do not count.
    app.add_middleware(Concurrency, most=server.limits.max_connections, refusals=server.metrics.refusals)
    app.add_middleware(Access, **access, refusals=server.metrics.refusals)
    if cors:
        allowed = {"allow_origins": list(cors), "allow_methods": ["*"], "allow_headers": ["*"]}
        # A page sees no other headers than these and the usual ones.
        app.add_middleware(CORSMiddleware, **allowed, expose_headers=["Location", "Retry-After"])


# -------------------------------------------------------------------------------------------------------------- basics


def _add_basics(app: FastAPI, server: Server) -> None:
    model = {"id": server.name, "object": "model", "created": server.created, "owned_by": "videollm-mod"}

    @app.api_route("/health", methods=["GET", "HEAD"])  # load balancers may send HEAD
    async def health() -> JSONResponse:
        return JSONResponse({"status": server.status}, status_code=200 if server.status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.to_text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(server.name, name)
        return model


# ---------------------------------------------------------------------------------------------------------------- chat


def _add_chat(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        async with server.bodies.read_json(request, server.limits.max_body_bytes) as body:
            if body.get("model") is not None:
                check_model(server.name, body["model"])
            completion = Completion(server, ChatRequest(body, server.limits), owner_of(request))
            await completion.open()
            await unless_gone(request, completion.begin())
        return await answer(completion, request)


# ------------------------------------------------------------------------------------------------------------ sessions


def _add_sessions(app: FastAPI, server: Server) -> None:
    path = "/v1/streaming/sessions"

    @app.post(path, status_code=201)
    async def create(request: Request) -> dict[str, Any]:
        async with server.bodies.read_json(request, server.limits.max_json_bytes) as given:
            instructions = given.pop("instructions", None)
            if instructions is not None and not isinstance(instructions, str):
                raise RequestError("`instructions` must be a text.", code="invalid_type", param="instructions")
            named = {"instructions": instructions, "session_id": given.pop("id", None), "owner": owner_of(request)}
            session = await server.saved.open(read_options(given, path=""), path="", **named)
        if await request.is_disconnected():  # nobody knows its name
            await session.close()
        return _state_of(session)

    @app.get(path)
    async def list_all(request: Request) -> dict[str, Any]:
        owner = owner_of(request)
        return {"object": "list", "data": [_state_of(found) for found in server.sessions if found.owner == owner]}

    @app.get(path + "/{session_id}")
    async def show(session_id: str, request: Request) -> dict[str, Any]:
        return _state_of(await server.saved.find(session_id, owner_of(request)))

    @app.delete(path + "/{session_id}")
    async def close(session_id: str, request: Request) -> dict[str, Any]:
        if await server.saved.remove(session_id, owner_of(request)):
            return {"id": session_id, "object": "streaming.session", "deleted": True}
        session = await server.saved.find(session_id, owner_of(request))
        last = _state_of(session)
        await server.saved.close(session)
        return last | {"deleted": True}

    @app.post(path + "/{session_id}/frame")
    async def see(session_id: str, request: Request) -> dict[str, Any]:
        arrival = asyncio.get_running_loop().time()
        session = await server.saved.find(session_id, owner_of(request))
        async with server.bodies.read(request, server.limits.max_frame_bytes) as data:
            return await _see(session, data, _time(request), arrival)

    @app.post(path + "/{session_id}/ask")
    async def ask(session_id: str, request: Request) -> dict[str, Any]:
        session = await server.saved.find(session_id, owner_of(request))
        async with server.bodies.read_json(request, server.limits.max_json_bytes) as given:
            return await _ask(session, given)


def _state_of(session: LiveSession) -> dict[str, Any]:
    """Return the state of a session, for people and programs that ask for it."""
    stream = session.stream.session
    return {
        "id": session.session_id,
        "object": "streaming.session",
        "created": session.created,
        "instructions": session.instructions,
        "options": session.options.model_dump(exclude_none=True),
        "time": stream.time,
        "frames": stream.num_frames,
        "frames_received": session.num_received,
        "frames_skipped": session.num_skipped,
        "frames_dropped": stream.num_dropped,
        "frames_waiting": session.stream.num_waiting,
        "frames_remembered": stream.num_remembered,
        "cache_bytes": sum(stream.cache.num_bytes_by_kind.values()),
        "expires_in": session.expires_in,
    }


def _time(request: Request) -> float | None:
    try:
        return float(request.query_params["time"]) if "time" in request.query_params else None
    except ValueError:
        raise RequestError("`time` must be seconds.", code="invalid_type", param="time") from None


async def _see(session: LiveSession, data: bytearray, time: float | None, arrival: float) -> dict[str, Any]:
    """
    Show a session a frame, and wait until the model has seen it and has said what it says.

    Args:
        session ([`LiveSession`]): The session.
        data (`bytearray`): The picture file.
        time (`float`, *optional*): Seconds in the stream, by default those at its arrival.
        arrival (`float`): When it came, by the clock of the event loop.
    """
    said: list[dict[str, Any]] = []
    is_past = False
    with session.counted(), ExitStack() as stack:
        # Who waits for the model does not hold the lock: other requests may interrupt, and frames go on.
        async with session.lock:
            frame = session.new_frame(time=time, param="time", arrival=arrival)

            def listen(kind: str, *what: Any) -> None:
                nonlocal is_past
                if kind == "end" and not what[0].is_asked and what[0].event.time == frame.time:
                    said.append(_described(what[0]))
                # The model ends what it says at a frame before it sees the next one.
                is_past |= kind == "frame" and what[0].fate == "seen" and what[0].time > frame.time

            picture = None
            if frame.fate is None:
                picture = await session.sessions.run(lambda: read_picture(data, session.limits))
            session.listeners.append(listen)
            stack.callback(session.listeners.remove, listen)
            await session.push(frame, picture)
        await session.until(lambda: frame.fate == "fps" or (frame.fate is not None and (session.is_idle or is_past)))
    total = asyncio.get_running_loop().time() - arrival
    timings = {"lag": frame.lag, "total": round(total, 6)}
    return {"object": "streaming.frame", "frame": frame.to_dict(), "said": said, "timings": timings}


async def _ask(session: LiveSession, given: dict[str, Any]) -> dict[str, Any]:
    """Ask a session a question, and wait for the answer unless it may come later."""
    unknown = sorted(set(given) - {"text", "reply_now", "interrupt"})
    if unknown:
        raise RequestError(f"`{unknown[0]}` is unknown.", code="unknown_parameter", param=unknown[0])
    text, reply_now = given.get("text"), boolean_of(given, "reply_now", default=True)
    interrupt = boolean_of(given, "interrupt")
    if not isinstance(text, str) or not text.strip():
        raise RequestError("`text` must be a question.", code="invalid_value", param="text")
    if reply_now and session.last_time is None:
        raise RequestError("There is no frame to answer from yet: send one first.", code="no_frame")
    with session.counted():
        async with session.lock:
            reply = await session.ask(text, reply_now=reply_now, interrupt=interrupt, param="text")
        if reply is None:
            return {"object": "streaming.answer", "answer": None}
        await session.until(lambda: reply.is_over)
    return {"object": "streaming.answer", "answer": _described(reply)}


def _described(reply: Reply) -> dict[str, Any]:
    event = reply.event
    said = {"text": reply.text, "time": event.time, "frame": event.frame, "unprompted": not reply.is_asked}
    said |= {"lag": event.latency, "interval_probability": event.interval_probability}
    return {name: value for name, value in said.items() if value is not None}


# ------------------------------------------------------------------------------------------------------------ realtime


def _add_realtime(app: FastAPI, server: Server) -> None:
    path = "/v1/realtime"

    @app.websocket(path)
    async def realtime(socket: WebSocket) -> None:
        await _realtime(socket, server)

    @app.get(path)
    async def find(request: Request, response: Response) -> dict[str, Any]:
        response.headers["Cache-Control"] = "no-store"
        # A browser does not tell its page why a WebSocket was refused.
        session = await server.saved.find_token(request.query_params.get("resume_token", ""), owner_of(request))
        return {"id": session.session_id, "resume_token": session.token}


async def _realtime(socket: WebSocket, server: Server) -> None:
    """Connect a client with a new session, or with the one that its token resumes."""
    token = socket.query_params.get("resume_token")
    try:
        if (model := socket.query_params.get("model")) is not None:
            check_model(server.name, model)
        if token is None:
            session = await server.sessions.open(SessionOptions(), owner=owner_of(socket))
            conversation = Conversation(session, server.name, server.audio)
            conversation.emit("session.created", session=conversation.describe())
        else:
            conversation = (await server.saved.find_token(token, owner_of(socket))).conversation
    except SessionMovedError as error:
        await socket.send_denial_response(moved_response(socket, error))
        return
    except RequestError as error:
        await socket.send_denial_response(error_response(error))
        return
    offered = socket.scope.get("subprotocols", [])
    try:
        await socket.accept(subprotocol="realtime" if "realtime" in offered else None)
    except BaseException:
        if conversation.connection is None:
            await conversation.leave()
        raise
    connection = Connection(socket, conversation, lambda text: handle_event(conversation, text))
    if token is None:
        conversation.connect(connection)
        await connection.run()
    else:
        # There is no wait between the choice of the first event and the new connection, so that no event is lost.
        await connection.run(conversation.resume(connection, socket.query_params.get("last_event_id")))


__all__ = ["Server", "create_app", "run", "uvicorn_options"]
