# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What clients of a server could do to each other and to its memory, over loopback."""

import asyncio
import base64
import gc
import json
import socket
import threading
import time as clock
import weakref
from contextlib import ExitStack, contextmanager

import av
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter
from serving_server import picture, running
from tiny import tiny_model, tiny_processor
from websockets.sync.client import connect as connect_websocket

from videollm_mod.serving import chat, connections
from videollm_mod.serving.bodies import load_json
from videollm_mod.serving.chat import FORMATS
from videollm_mod.serving.connections import Concurrency
from videollm_mod.serving.fetching import read_data_uri
from videollm_mod.serving.limits import RequestError
from videollm_mod.serving.session_options import SessionOptions
from videollm_mod.video_reading_videollm_mod import VideoReader, read_video


SESSIONS, CHAT = "/v1/streaming/sessions", "/v1/chat/completions"
ENGINE = {"max_streams": 4, "max_frames": 24, "max_text_tokens": 160, "page_size": 16}
FRAME = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def server():
    limits = {"max_held_bytes": 500_000, "body_seconds": 1.0, "max_connections": 20, "stall_seconds": 0.2}
    limits["head_seconds"] = 3.0
    options = {"engine_options": ENGINE, "allowed_hosts": ["gpu-box"], **limits}
    with running(tiny_model(), tiny_processor(), **options) as (address, server):
        server.address = address
        yield server


@pytest.fixture
def client(server):
    # Connections that stay open would be the oldest of too many, which the server closes.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=f"http://{server.address}", timeout=60, limits=limits) as client:
        yield client


def until(condition):
    """Wait until a condition holds, at most half a minute."""
    end = clock.monotonic() + 30
    while not condition():
        assert clock.monotonic() < end
        clock.sleep(0.01)


def run(server, coroutine):
    """Return what a coroutine returns in the event loop of a server."""
    return asyncio.run_coroutine_threadsafe(coroutine, server.sessions._loop).result(30)


@contextmanager
def begun(server, path, length):
    """A connection that has sent the head of a request."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n".encode())
        yield connection


# -------------------------------------------------------------------------------------------------------------- bodies


def test_bodies_have_a_limit_for_their_route(server, client):
    name = client.post(SESSIONS).json()["id"]
    for path, length in ((SESSIONS, 200_001), (f"{SESSIONS}/{name}/ask", 200_001), (CHAT, 64_000_001)):
        with begun(server, path, length) as connection:  # nothing of the body is sent
            answer = connection.makefile().read(300)
        assert answer.startswith("HTTP/1.1 413 ") and "request_too_large" in answer, path

    def chunks():
        yield b" " * 200_001

    assert client.post(SESSIONS, content=chunks()).status_code == 413
    client.delete(f"{SESSIONS}/{name}")


def test_many_slow_bodies_do_not_fill_the_memory(server, client):
    with begun(server, CHAT, 1_000_000) as slow:
        slow.sendall(b" " * 450_000)
        until(lambda: server.bodies.num_bytes == 450_000)
        busy = client.post(SESSIONS, content=b" " * 100_000)
        assert busy.status_code == 503 and busy.json()["error"]["code"] == "server_busy"
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    until(lambda: server.bodies.num_bytes == 0)


def test_too_many_requests_are_refused_and_health_is_answered(server, client):
    answers = []

    def is_refused():
        # On a busy machine the first of these bodies may be too late before the last begins.
        with ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(begun(server, CHAT, 10))
            answers.append(client.get("/v1/models"))
            assert client.get("/health").status_code == 200
        return answers[-1].status_code == 503

    until(is_refused)
    assert answers[-1].json()["error"]["code"] == "server_busy" and answers[-1].headers["retry-after"] == "5"
    until(lambda: client.get("/v1/models").status_code == 200)
    assert 'refusals_total{reason="busy"}' in client.get("/metrics").text


def test_a_websocket_too_many_is_refused():
    refusals, sent = Counter("refusals", "", ["reason"], registry=CollectorRegistry()), []
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "extensions": {"websocket.http.response": {}}}

    async def send(event):
        sent.append(event)

    asyncio.run(Concurrency(None, most=0, refusals=refusals)(scope, None, send))
    assert sent[0]["status"] == 503 and b"server_busy" in sent[1]["body"]


def test_connections_that_send_no_head_shut_nobody_out(server, client):
    def connection(sent=b""):
        opened = socket.create_connection(tuple(server.address.split(":")), timeout=30)
        opened.sendall(sent)
        return opened

    held = [connection(b"GET /health HTTP/1.1\r\nHost: x\r\n" if number % 2 else b"") for number in range(21)]
    try:
        assert client.get("/v1/models").status_code == client.get("/health").status_code == 200
        assert is_closed(held[0])  # one too many, so the oldest was closed at once
        assert all(map(is_closed, held))
    finally:
        for other in held:
            other.close()
    with connect_websocket(f"ws://{server.address}/v1/realtime") as socket_:
        socket_.recv()
        clock.sleep(3.2)  # a WebSocket has sent its head
        socket_.ping().wait(30)


def test_connections_that_stay_open_after_an_answer_are_limited_in_number(server, client):
    with ExitStack() as stack:
        held = []
        for _ in range(21):
            held.append(stack.enter_context(socket.create_connection(server.address.split(":"), timeout=2)))
            ask_for_health(held[-1])
        assert is_closed(held[0]) and client.get("/health").status_code == 200


@pytest.mark.parametrize("count", [6, 30], ids=["a little", "much"])
def test_a_client_that_reads_no_answer_keeps_no_connection(server, count):
    host, port = server.address.split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)  # 7 kB each
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            until(lambda: connection.sendall(b"\r\n"))


@contextmanager
def unread(address):
    """A WebSocket whose client has read its first event and reads nothing more."""
    with socket.socket() as raw:
        # Smaller before connecting: Linux drops what arrives, also acknowledgements, if a window shrinks later.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((address.split(":")[0], int(address.split(":")[1])))
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        raw.sendall(
            f"GET /v1/realtime HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 101 ")
        yield raw


def is_cut(connection):
    """Whether the server has cut a connection, which then takes nothing more."""
    try:
        connection.send(b"\x8a\x80\0\0\0\0")  # a pong
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def test_a_websocket_that_is_not_read_is_cut_and_its_session_waits(server):
    with unread(server.address) as connection:
        session = [*server.sessions][-1]
        conversation = session.conversation

        async def tell():
            for _ in range(100):
                conversation.emit("note", text="x" * 1000)

        run(server, tell())
        until(lambda: is_cut(connection))
        until(lambda: conversation.connection is None)
    assert session.over is None and conversation.sent < conversation.number
    run(server, session.close())


def test_a_websocket_that_is_not_read_is_cut_after_the_end_of_its_session(monkeypatch):
    """What is left is less than uvicorn lets wait."""
    monkeypatch.setattr(connections, "_CLOSE_SECONDS", 0.5)
    with running(tiny_model(), tiny_processor(), engine_options=ENGINE) as (address, server), unread(address) as raw:
        session = [*server.sessions][-1]

        async def tell_and_end():
            for _ in range(50):
                session.conversation.emit("note", text="x" * 1000)
            await session.close()

        run(server, tell_and_end())
        until(lambda: is_cut(raw))


def ask_for_health(connection):
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        received = connection.recv(4096)
        assert received
        answer += received
    assert answer.startswith(b"HTTP/1.1 200 ")


def is_closed(connection):
    """Wait until the server closes a connection, of which it need not have read everything."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_head_has_a_limit_of_size(server, client):
    known = client.get("/health", headers={"x-long": "x" * 60_000})
    assert known.status_code == 200
    with socket.create_connection(tuple(server.address.split(":")), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for number in range(9):
            connection.sendall(f"X-{number}: {'x' * 8000}\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")  # and does not wait for the rest


def test_a_head_after_an_answer_has_the_same_limit(server):
    with socket.create_connection(tuple(server.address.split(":")), timeout=30) as connection:
        for _ in range(2):
            ask_for_health(connection)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert is_closed(connection)


def test_small_values_in_large_numbers_are_refused():
    for text in ("[" + "[]," * 60_000 + "0]", b'{"a": [' + b"0," * 100_000 + b"0]}"):
        with pytest.raises(RequestError, match="more than 100000 values"):
            load_json(text)
    assert load_json('["' + "x" * 1_000_000 + '"]')


# --------------------------------------------------------------------------------------------------- hosts and owners


def test_names_that_could_lead_here_from_elsewhere_are_refused(server, client):
    port = server.address.split(":")[1]
    for host in ("page.example", f"page.example:{port}", "localhost.page.example", "127.0.0.1.page.example", ""):
        for path in (SESSIONS, "/metrics", "/v1/models"):
            refused = client.get(path, headers={"host": host})
            assert refused.status_code == 421 and refused.json()["error"]["code"] == "host_not_allowed", host
    for host in ("localhost", f"LOCALHOST:{port}", "a.localhost", f"[::1]:{port}", "10.0.0.7", f"GPU-box.:{port}"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
    with (
        pytest.raises(Exception, match="421"),
        connect_websocket(
            f"ws://page.example:{port}/v1/realtime", sock=socket.create_connection(("127.0.0.1", int(port)))
        ),
    ):
        pass


def test_sessions_belong_to_the_key_that_opened_them():
    options = {"api_keys": ["first", "second"], "engine_options": ENGINE}
    with running(tiny_model(), tiny_processor(), **options) as (address, server):
        ours, other = (
            httpx.Client(base_url=f"http://{address}", headers={"authorization": f"Bearer {key}", "host": "any"})
            for key in ("first", "second")
        )
        assert ours.post(SESSIONS, json={"id": "door"}).status_code == 201
        frame = {"content": picture(FRAME)}
        calls = [
            ("GET", "", {}),
            ("POST", "/frame", frame),
            ("POST", "/ask", {"json": {"text": "x"}}),
            ("DELETE", "", {}),
        ]
        for method, path, sent in calls:
            answer = other.request(method, f"{SESSIONS}/door{path}", **sent)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_session"
        assert other.get(SESSIONS).json()["data"] == []
        assert [found["id"] for found in ours.get(SESSIONS).json()["data"]] == ["door"]
        url = f"ws://{address}/v1/realtime"
        with connect_websocket(url, additional_headers={"api-key": "first"}) as socket_:
            token = json.loads(socket_.recv())["session"]["videollm_mod"]["resume_token"]
        theirs = {"uri": f"{url}?resume_token={token}", "additional_headers": {"api-key": "second"}}
        with pytest.raises(Exception, match="404"), connect_websocket(**theirs):
            pass
        assert ours.post(f"{SESSIONS}/door/frame", **frame).json()["frame"]["fate"] == "seen"
        assert ours.delete(f"{SESSIONS}/door").status_code == 200


# --------------------------------------------------------------------------------------------------------------- chats


def encoded(size, count=4):
    """Return pictures of a size as a part of an H.264 stream."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width = encoder.height = size
    encoder.pix_fmt, encoder.framerate = "yuv420p", 10
    encoder.options = {"tune": "zerolatency"}
    frames = [
        av.VideoFrame.from_ndarray(np.full((size, size, 3), 40 * index % 256, np.uint8)) for index in range(count)
    ]
    return b"".join(bytes(packet) for frame in [*frames, None] for packet in encoder.encode(frame))


def test_pictures_that_grow_in_a_video_are_not_decoded(tmp_path):
    (tmp_path / "a.h264").write_bytes(encoded(64) + encoded(512) + encoded(64))
    checked = {"formats": FORMATS, "max_pixels": 64 * 64}
    with VideoReader(tmp_path / "a.h264", **checked) as reader:
        sizes = [frame.width for _, _, frame in reader.frames()]
        assert set(sizes) == {64} and len(sizes) >= 6 and reader.report.spoilt_packets
    (tmp_path / "b.h264").write_bytes(encoded(512))
    with pytest.raises(ValueError, match="cannot be read|no picture"):
        list(read_video(VideoReader(tmp_path / "b.h264", **checked)))


def test_a_client_that_leaves_while_a_video_is_shown_frees_its_seat(server):
    video = {"type": "video_url", "video_url": {"url": video_uri(seconds=4)}}
    content = [video, {"type": "text", "text": "What is it?"}]
    sent = {"messages": [{"role": "user", "content": content}], "videollm_mod": {"fps": 10}}
    body = json.dumps(sent).encode()
    with server.engine._stepping:  # nothing is seen meanwhile, and more frames come than may wait
        with begun(server, CHAT, len(body)) as connection:
            connection.sendall(body)
            until(lambda: any(stream.num_waiting > 16 for stream in list(server.engine.streams)))
        until(lambda: not list(server.sessions))
    until(lambda: not server.engine.streams)


def test_files_in_a_request_are_written_beside_the_event_loop(client, monkeypatch):
    threads = []

    def note(*given, **options):
        threads.append(threading.current_thread().name)
        return read_data_uri(*given, **options)

    monkeypatch.setattr(chat, "read_data_uri", note)
    content = [{"type": "video_url", "video_url": {"url": video_uri(seconds=1)}}]
    assert client.post(CHAT, json={"messages": [{"role": "user", "content": content}]}).status_code == 200
    assert [name.partition("_")[0] for name in threads] == ["session"]


def video_uri(*, seconds):
    """Return a video of 10 frames per second."""
    data = base64.b64encode(encoded(32, count=10 * seconds)).decode()
    return f"data:video/h264;base64,{data}"


# ------------------------------------------------------------------------------------------------ faults of the server


def test_health_says_when_the_engine_makes_no_step(server, client):
    name = client.post(SESSIONS, json={"unprompted": False}).json()["id"]
    send = {"url": f"{SESSIONS}/{name}/frame", "content": picture(FRAME)}
    assert client.get("/health").status_code == 200
    with server.engine._stepping:
        thread = threading.Thread(
            target=lambda: httpx.post(f"http://{server.address}{send['url']}", content=send["content"])
        )
        thread.start()
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json() == {"status": "the engine has made no step for 0.2 s"}
    thread.join()
    until(lambda: client.get("/health").status_code == 200)
    client.delete(f"{SESSIONS}/{name}")


def test_a_fault_is_answered_as_an_error(server, client, monkeypatch):
    monkeypatch.setattr(server.saved, "open", None)
    answer = client.post(SESSIONS)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "server_error"


def test_a_server_that_has_ended_keeps_no_memory():
    model = tiny_model()
    with running(model, tiny_processor(), engine_options=ENGINE) as (address, server):
        assert httpx.get(f"http://{address}/v1/models").status_code == 200
    references = [weakref.ref(kept) for kept in (model, server, server.engine.pool)]
    del model, server
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize("breaks", ["teller", "listener"])
def test_a_fault_in_one_session_costs_the_others_nothing(server, client, breaks):
    names = [client.post(SESSIONS, json={"unprompted": False}).json()["id"] for _ in range(2)]
    broken, other = (server.sessions.find(name) for name in names)

    def fail(*_):
        raise KeyError("broken")

    async def show_both():
        # Both are seen in one step.
        with server.engine._stepping:
            for session in (broken, other):
                await session.push(session.new_frame(), FRAME)
            if breaks == "teller":
                broken.teller.take = fail
            else:
                broken.listeners.append(fail)
        await other.until(lambda: other.is_idle)

    run(server, show_both())
    until(lambda: broken.over is not None)
    assert broken.over == "the server failed" and other.over is None and other.stream.session.num_frames == 1
    assert client.delete(f"{SESSIONS}/{names[1]}").status_code == 200
    until(lambda: not server.engine.streams)


def test_a_client_that_leaves_while_its_stream_opens_keeps_no_memory(server, monkeypatch):
    """Ray Serve then cancels the request. The engine opens the stream later, in a thread."""
    begun, open_stream, opened = threading.Event(), server.engine.open, server.engine._num_opened

    def note(**given):
        begun.set()
        return open_stream(**given)

    monkeypatch.setattr(server.engine, "open", note)
    with server.engine.changed:
        opening = asyncio.run_coroutine_threadsafe(server.sessions.open(SessionOptions()), server.sessions._loop)
        assert begun.wait(30)
        opening.cancel()
        run(server, asyncio.sleep(0))
    until(lambda: server.engine._num_opened == opened + 1)
    until(lambda: not server.engine.streams)
    assert not list(server.sessions)


@pytest.mark.parametrize("ends", ["closed", "cancelled"])
def test_a_session_that_ends_while_its_stream_is_opened_again_keeps_no_memory(server, ends):
    async def change():
        session = await server.sessions.open(SessionOptions())
        task = asyncio.ensure_future(session.update(SessionOptions(max_frames=8)))
        while session.teller is not None:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        if ends == "cancelled":
            task.cancel()
        else:
            session._end("expired")
        with pytest.raises((RequestError, asyncio.CancelledError)):
            await task
        while session.teller is None and ends == "cancelled":
            await asyncio.sleep(0.01)
        if ends == "cancelled":
            assert session.stream.session.max_frames == 8
            await session.close()

    run(server, change())
    until(lambda: not server.engine.streams)


def test_a_session_whose_stream_cannot_be_opened_again_ends(server, monkeypatch):
    async def change():
        session = await server.sessions.open(SessionOptions())

        def refuse(**_):
            raise ValueError("no")

        monkeypatch.setattr(server.engine, "open", refuse)
        with pytest.raises(RequestError, match="no"):
            await session.update(SessionOptions(max_frames=8))
        return session

    session = run(server, change())
    assert session.over.startswith("its stream could not be opened again")
    with pytest.raises(RequestError, match="no such session"):
        server.sessions.find(session.session_id)


def test_long_replies_leave_room_for_all_streams():
    options = {"engine_options": ENGINE, "max_output_tokens": 1000}
    with running(tiny_model(), tiny_processor(), **options) as (address, _):
        answers = [httpx.post(f"http://{address}{SESSIONS}") for _ in range(ENGINE["max_streams"])]
    assert [answer.status_code for answer in answers] == [201] * ENGINE["max_streams"]


def test_an_item_that_may_not_wait_is_not_added(server):
    content = [{"type": "input_text", "text": "x"}]
    event = {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": content}}
    with connect_websocket(f"ws://{server.address}/v1/realtime") as socket_:
        for _ in range(33):
            socket_.send(json.dumps(event))
        events = []
        while not events or events[-1]["type"] != "error":
            events.append(json.loads(socket_.recv(30)))
    assert events[-1]["error"]["code"] == "conversation_already_has_active_response"
    assert sum(event["type"] == "conversation.item.added" for event in events) == 32


def test_settings_with_instructions_that_may_not_wait_change_nothing(server):
    async def update():
        session = await server.sessions.open(SessionOptions(unprompted=False))
        for _ in range(32):
            await session.ask("x", reply_now=False)
        with pytest.raises(RequestError) as error:
            await session.update(SessionOptions(fps=5.0), instructions="y", max_output_tokens=7)
        assert error.value.status == 429
        assert session.options == SessionOptions(unprompted=False) and session.max_output_tokens != 7
        await session.close()

    run(server, update())


def test_a_stream_without_an_end_keeps_its_last_events():
    from engines import tiny_engine

    engine = tiny_engine()
    stream = engine.open(speak=lambda _: False)
    stream.max_events = 3
    for number in range(8):
        stream.ask(f"a {number}", reply_now=False)
        stream.push(FRAME)
        engine.run()
    assert [event.text for event in stream.events] == ["a 5", "a 6", "a 7"]
    stream.close()
    engine.run()
    assert [event.text for event in stream] == ["a 5", "a 6", "a 7"]
