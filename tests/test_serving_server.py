# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The server's HTTP over loopback: sessions by curl, keys and origins, limits, figures, and a crash."""

import asyncio
import json
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from engines import embedded
from preloaded import start as start_program
from programs import run_command, without_leaks
from serving_server import ROOMY, connect, frame_event, narration, picture, running, send, until
from tiny import tiny_model, tiny_processor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_websocket

from videollm_mod.serving import live_sessions
from videollm_mod.serving.connections import allow_open_files
from videollm_mod.serving.limits import Limits
from videollm_mod.serving.server import create_app, run


ROOT = Path(__file__).parents[1]
SESSIONS = "/v1/streaming/sessions"


@pytest.fixture(scope="module")
def address():
    model, processor, _ = embedded()
    with running(model, processor, name="tiny", engine_options=ROOMY) as (at, _):
        yield at


@pytest.fixture(scope="module")
def strict():
    """A server with keys, room for one stream, and small limits. Its words mean nothing."""
    engine = {"max_streams": 1, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
    limits = {"max_frame_bytes": 20_000, "max_event_bytes": 40_000, "max_output_tokens": 4}
    options = {"api_keys": ["first", "second"], "cors": ["https://page.example"], "engine_options": engine}
    with running(tiny_model(), tiny_processor(), **options, **limits) as (at, _):
        yield at


def curl(*arguments):
    """Run curl and return what the server answers."""
    done = subprocess.run(["curl", "--silent", *map(str, arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_it_is_ready_when_the_model_answers(address):
    assert httpx.get(f"http://{address}/health").json() == {"status": "ok"}
    probed = httpx.head(f"http://{address}/health")
    assert (probed.status_code, probed.text) == (200, "")
    assert [model["id"] for model in httpx.get(f"http://{address}/v1/models").json()["data"]] == ["tiny"]
    assert httpx.get(f"http://{address}/v1/models/tiny").json()["object"] == "model"
    assert httpx.get(f"http://{address}/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_curl_shows_frames_and_asks(address, tmp_path):
    path = f"http://{address}{SESSIONS}"
    session = curl("-d", '{"id": "door"}', path)["id"]
    assert session == "door" and curl("-d", '{"id": "door"}', path)["error"]["code"] == "id_taken"
    said = []
    for number, frame in enumerate(embedded()[2][:8]):
        (tmp_path / "frame.png").write_bytes(picture(frame))
        seen = curl("--data-binary", f"@{tmp_path}/frame.png", f"{path}/{session}/frame?time={number / 2}")
        assert seen["frame"]["fate"] == "seen" and 0 < seen["timings"]["lag"] < seen["timings"]["total"]
        said += [(event["time"], event["text"]) for event in seen["said"]]
    assert said == [event for event in narration() if event[0] < 4]
    answer = curl("-d", '{"text": "How many things do you see?"}', f"{path}/{session}/ask")["answer"]
    assert answer["text"] == "None." and answer["time"] == 3.5 and not answer["unprompted"]  # it hides
    assert curl("-d", '{"text": "Wait.", "reply_now": false}', f"{path}/{session}/ask")["answer"] is None
    assert curl(f"{path}/{session}")["frames"] == 8
    assert curl("-X", "DELETE", f"{path}/{session}")["deleted"]
    assert curl(f"{path}/{session}")["error"]["code"] == "no_session"


def test_a_request_cuts_a_reply_short_and_frames_keep_the_time_of_their_arrival():
    """The tiny model does not end a reply: its requests wait for each other no longer than they must."""

    async def talk(client, server):
        async def show(**query):
            answer = await client.post(f"{door}/frame", params=query, content=frame)
            return answer.json()["frame"]

        frame, door = picture(embedded()[2][0]), f"{SESSIONS}/door"
        await client.post(SESSIONS, json={"id": "door", "unprompted": False, "instructions": "", "fps": 10})
        (session,) = server.sessions
        await show()
        first = asyncio.create_task(client.post(f"{door}/ask", json={"text": "What is it?"}))
        while session.reply is None:
            await asyncio.sleep(0.01)
        heard = await client.post(f"{door}/ask", json={"text": "Look.", "reply_now": False})
        frames = []
        for _ in range(3):
            await asyncio.sleep(0.5)
            frames.append(asyncio.create_task(show()))
        await asyncio.sleep(0.1)
        waited = not first.done() and not any(task.done() for task in frames)
        await client.post(f"{door}/ask", json={"text": "Stop.", "reply_now": False, "interrupt": True})
        reply = (await first).json()["answer"]
        return heard.json()["answer"], waited, reply, session.stream.events, await asyncio.gather(*frames)

    async def run_client(at, server):
        async with httpx.AsyncClient(base_url=f"http://{at}", timeout=60) as client:
            return await talk(client, server)

    engine = {"max_streams": 1, "max_frames": 12, "max_text_tokens": 9000, "page_size": 16}
    with running(tiny_model(), tiny_processor(), engine_options=engine, max_output_tokens=8000) as (at, server):
        heard, waited, reply, events, seen = asyncio.run(run_client(at, server))
    assert heard is None and waited and reply["text"]
    assert [event.interrupted for event in events if event.role == "assistant"] == [True]
    assert [each["fate"] for each in seen] == ["seen"] * 3
    gaps = [later["time"] - earlier["time"] for earlier, later in zip(seen, seen[1:], strict=False)]
    assert all(0.4 < gap < 5 for gap in gaps)


def test_http_mistakes_are_answered(address):
    with httpx.Client(base_url=f"http://{address}") as client:
        assert client.post(SESSIONS, json={"colour": 1}).json()["error"]["param"] == "colour"
        assert client.post(SESSIONS, content=b"{").json()["error"]["code"] == "invalid_json"
        long = client.post(SESSIONS, json={"instructions": "x" * 8001}).json()["error"]
        assert (long["code"], long["param"]) == ("text_too_long", "instructions")
        half = client.post(SESSIONS, content=b'{"instructions": "\\ud800"}').json()["error"]
        assert (half["code"], half["param"]) == ("invalid_value", "instructions")
        session = f"{SESSIONS}/{client.post(SESSIONS, json={'unprompted': False}).json()['id']}"
        assert client.post(f"{session}/ask", json={"text": "Why?"}).json()["error"]["code"] == "no_frame"
        assert client.post(f"{session}/ask", json={"text": "Look.", "reply_now": False}).json()["answer"] is None
        # The model has something to think of now, and still nothing to look at.
        assert client.post(f"{session}/ask", json={"text": "Why?"}).json()["error"]["code"] == "no_frame"
        for name, value in (("reply_now", "false"), ("reply_now", 0), ("interrupt", "no"), ("interrupt", [])):
            wrong = client.post(f"{session}/ask", json={"text": "Why?", name: value})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, name), (name, value)
        for content in (b"text", png_bomb()):
            assert client.post(f"{session}/frame", content=content).json()["error"]["code"] == "invalid_image"
        assert client.post(f"{session}/frame?time=x", content=b"").json()["error"]["param"] == "time"
        frame = picture(embedded()[2][0], "JPEG")
        assert client.post(f"{session}/frame?time=1", content=frame).json()["frame"]["fate"] == "seen"
        assert client.post(f"{session}/frame?time=1.1", content=frame).json()["frame"]["fate"] == "fps"
        assert "increase" in client.post(f"{session}/frame?time=1", content=frame).json()["error"]["message"]
        assert client.delete(session).status_code == 200
        assert client.get("/nothing").json()["error"]["code"] == "not_found"
        for method, path, allowed in (
            ("PUT", SESSIONS, "GET, POST"),
            ("PATCH", session, "DELETE, GET"),
            ("GET", "/v1/chat/completions", "POST"),
            ("POST", "/health", "GET, HEAD"),
        ):
            refused = client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed), path
            assert refused.json()["error"]["code"] == "method_not_allowed"


def png_bomb():
    """Return a PNG with a text that is 2 MB when it is unpacked."""
    whole, text = picture(embedded()[2][0]), b"zTXtk\0\0" + zlib.compress(bytes(2_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return whole[:33] + chunk + whole[33:]  # behind the header


def test_one_of_two_sessions_gets_a_name(address):
    async def ask_at_once():
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            answers = await asyncio.gather(*(client.post(SESSIONS, json={"id": "gate"}) for _ in range(6)))
            seen = await client.get(f"{SESSIONS}/gate")
            await client.delete(f"{SESSIONS}/gate")
        return sorted(answer.status_code for answer in answers), seen.status_code

    assert asyncio.run(ask_at_once()) == ([201] + [409] * 5, 200)


def test_the_log_says_once_that_the_model_falls_behind(monkeypatch):
    """The encoder holds the first frame until all have come. The newest one waits, and those between are dropped."""
    model, may_go, told = tiny_model(), threading.Event(), []
    may_go.set()
    model.model.vision_encoder.register_forward_pre_hook(lambda *_: None if may_go.wait(60) else None)
    monkeypatch.setattr(live_sessions.logger, "warning", told.append)

    async def send_six(at, received):
        connection = await connect(at)
        may_go.clear()
        await send(connection, *(frame_event(embedded()[2][index], index / 2) for index in range(6)))
        while f"videollm_mod_frames_received_total {received}.0" not in httpx.get(f"http://{at}/metrics").text:
            await asyncio.sleep(0.02)
        may_go.set()
        fates = []
        while len(fates) < 6:
            [*_, done] = await until(connection, "conversation.item.done")
            fates += [done.videollm_mod["fate"]] if "fate" in getattr(done, "videollm_mod", {}) else []
        await connection.close()
        return fates

    engine = {"max_streams": 2, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
    with running(model, tiny_processor(), engine_options=engine, max_output_tokens=2, max_waiting=1) as (at, _):
        before = float(re.search(r"frames_received_total ([\d.]+)", httpx.get(f"http://{at}/metrics").text)[1])
        for turn in (1, 2):
            assert asyncio.run(send_six(at, int(before) + 6 * turn)) == ["seen", *["behind"] * 4, "seen"]
    assert [line.partition(":")[0] for line in told] == ["The model is slower than the frames that come"]


def test_figures_count_what_happened(address):
    def figures():
        lines = httpx.get(f"http://{address}/metrics").text.splitlines()
        return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}

    before = figures()
    known = {"frames_dropped": ("behind", "fps"), "refusals": ("full", "key", "origin", "host")}
    known |= {"disconnected": ("slow_reader",)}
    for name, reasons in known.items():
        assert {f'videollm_mod_{name}_total{{reason="{reason}"}}' for reason in reasons} <= before.keys()
    with httpx.Client(base_url=f"http://{address}") as client:
        session = f"{SESSIONS}/{client.post(SESSIONS).json()['id']}"
        for time, frame in zip((0, 0.5, 0.6), embedded()[2], strict=False):
            client.post(f"{session}/frame?time={time}", content=picture(frame))
        now = figures()
        client.delete(session)
    grown = {name: value - before.get(name, 0) for name, value in now.items()}
    assert grown["videollm_mod_frames_received_total"] == 3 and grown["videollm_mod_frames_seen_total"] == 2
    assert grown['videollm_mod_frames_dropped_total{reason="fps"}'] == 1
    assert grown["videollm_mod_frame_lag_seconds_count"] == 2 and grown["videollm_mod_first_word_seconds_count"] == 1
    assert grown["videollm_mod_reply_tokens_total"] == 8 and grown["videollm_mod_streams"] == 1
    assert grown['videollm_mod_cache_bytes{state="reserved"}'] > 0


def test_a_port_that_is_taken_is_named():
    app = create_app(tiny_model(), tiny_processor(), engine_options={"max_streams": 1, "max_frames": 4})
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"at 127.0.0.1, port {port} .Address already in use.: choose others"):
            run(app, host="127.0.0.1", port=port, say=print)


def test_a_server_may_open_the_files_that_its_connections_need(caplog):
    app = create_app(tiny_model(), tiny_processor(), engine_options={"max_streams": 1, "max_frames": 4})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0)) as other:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="choose others"):
                run(app, host="127.0.0.1", port=other.getsockname()[1], say=print)
            raised, warnings = resource.getrlimit(resource.RLIMIT_NOFILE)[0], list(caplog.messages)
            allow_open_files(Limits(max_connections=before[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert raised == 2200 and not warnings
    assert f"{before[1]} connections may need {2 * before[1] + 200}: allow more" in caplog.text


# ---------------------------------------------------------------------------------------------------- keys and limits


def test_a_key_is_needed(strict):
    def status(**headers):
        return httpx.get(f"http://{strict}/v1/models", headers=headers).status_code

    assert httpx.get(f"http://{strict}/health").status_code == 200
    assert status() == status(authorization="Bearer third") == status(authorization="first") == 401
    assert status(authorization="Bearer first") == status(authorization="bearer second") == 200
    assert status(**{"api-key": "second"}) == 200
    with pytest.raises(Exception, match="401"), connect_websocket(f"ws://{strict}/v1/realtime"):
        pass
    names = ["realtime", "openai-insecure-api-key.second", "openai-beta.realtime-v1"]
    with connect_websocket(f"ws://{strict}/v1/realtime", subprotocols=names) as socket:
        assert socket.subprotocol == "realtime" and json.loads(socket.recv())["type"] == "session.created"


def test_empty_keys_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="clients without a key would be served"):
        create_app(tiny_model(), tiny_processor(), api_keys=[""])
    done = run_command("serve", "--api-key", "")
    assert done.returncode == 1 and "VIDEOLLM_MOD_API_KEYS is empty" in done.stderr
    monkeypatch.setenv("VIDEOLLM_MOD_API_KEYS", " ")
    assert run_command("serve").returncode == 1


@pytest.mark.parametrize("key", ["schl\u00fcssel", "tab\tkey", "line\n", " lead"])
def test_keys_that_no_request_can_have_are_refused(key):
    with pytest.raises(ValueError, match="a character that requests cannot have") as error:
        create_app(tiny_model(), tiny_processor(), api_keys=["good", key])
    assert key not in str(error.value) and "\n" not in str(error.value)
    if key.isprintable() and key == key.strip():  # the command takes them apart at spaces
        done = run_command("serve", "--model", "does-not-exist", "--api-key", key)
        assert done.returncode == 1 and "a character that requests cannot have" in done.stderr


def test_pages_of_other_origins_are_refused(strict):
    def answer(origin):
        headers = {"authorization": "Bearer first", "origin": origin}
        return httpx.get(f"http://{strict}/v1/models", headers=headers)

    assert answer("https://other.example").json()["error"]["code"] == "origin_not_allowed"
    assert answer(f"http://{strict}").status_code == 403  # a name that an attacker lets point here
    allowed = answer("https://page.example")
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert allowed.headers["access-control-expose-headers"] == "Location, Retry-After"


def test_a_full_server_says_when_to_try_again(strict):
    with httpx.Client(base_url=f"http://{strict}", headers={"authorization": "Bearer first"}) as client:
        while (first := client.post(SESSIONS)).status_code == 503:  # the stream of another test is not closed yet
            pass
        full = client.post(SESSIONS)
        assert full.status_code == 503 and full.json()["error"]["code"] == "server_full"
        assert 1 <= int(full.headers["retry-after"]) <= 5
        url = {"type": "image_url", "image_url": {"url": "http://localhost/not-fetched.png"}}
        messages = [{"role": "user", "content": [url, {"type": "text", "text": "What is this?"}]}]
        assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 503
        names = ["openai-insecure-api-key.first"]
        with (
            pytest.raises(Exception, match="503"),
            connect_websocket(f"ws://{strict}/v1/realtime", subprotocols=names),
        ):
            pass
        large = client.post(f"{SESSIONS}/{first.json()['id']}/frame", content=bytes(20_001))
        assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
        client.delete(f"{SESSIONS}/{first.json()['id']}")


def test_limits_that_never_fit_are_named_as_the_request_has_them(strict):
    def refusals():
        lines = httpx.get(f"http://{strict}/metrics", headers=headers).text.splitlines()
        return [line for line in lines if line.startswith('videollm_mod_refusals_total{reason="full"}')]

    headers = {"authorization": "Bearer first"}
    before = refusals()
    for name, value in (
        ("max_frames", 100),  # more than the memory of this server
        ("max_frames", 100_000),  # more than the model's context
        ("max_text_tokens", 5000),
        ("fps", 1000),
        ("fps", "fast"),
    ):
        refused = httpx.post(f"http://{strict}{SESSIONS}", headers=headers, json={name: value})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_value", name), error
        assert "retry-after" not in refused.headers
    assert refusals() == before and len(before) == 1


def test_a_large_event_ends_the_connection(strict):
    names = ["openai-insecure-api-key.first"]
    with connect_websocket(f"ws://{strict}/v1/realtime", subprotocols=names, close_timeout=1) as socket:
        socket.recv()
        socket.send("x" * 40_001)
        with pytest.raises(Exception, match="1009"):
            socket.recv()


# ------------------------------------------------------------------------------------------------------------- a crash


def start(port, *options, temporary=None):
    """Start the command, and return it when it is ready, with its address. It saves sessions if told where."""
    given = ("--port", port, "--max-streams", 2, "--max-frames", 24, *options)
    if temporary is None and "--state-dir" not in options:
        given += ("--no-state-dir",)
    environment = {} if temporary is None else {"TMPDIR": str(temporary)}
    process = start_program("cli.py", "serve", *given, environment=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"http://(\S+) \(ok\)", line):
            return process, found[1]
    raise AssertionError(f"the command ended with {process.wait()}")


@pytest.mark.xdist_group("preloaded")
def test_clients_of_a_killed_server_get_an_error_and_it_starts_again():
    """Ctrl+C ends the second one, while a client is connected."""
    process, address = start(0)

    async def watch():
        connection = await connect(address)
        assert not connection._connection.protocol.extensions, "small messages cannot unpack to large ones"
        await send(connection, frame_event(np.zeros((96, 96, 3), np.uint8), 0.0))
        await until(connection, "conversation.item.done")
        process.send_signal(signal.SIGKILL)
        await connection.recv()

    with pytest.raises(Exception, match="close frame|ConnectionClosed"):
        asyncio.run(watch())
    process.wait()
    again, same = start(address.rpartition(":")[2])
    try:
        assert same == address and httpx.get(f"http://{same}/health").json() == {"status": "ok"}
        with connect_websocket(f"ws://{same}/v1/realtime") as socket:
            assert json.loads(socket.recv())["type"] == "session.created"
            again.send_signal(signal.SIGINT)
            with pytest.raises(ConnectionClosed, match="1012"):
                socket.recv(timeout=60)
        assert (again.wait(60), without_leaks(again.stderr.read())) == (130, "")
    finally:
        again.kill()
