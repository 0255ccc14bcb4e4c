# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sessions that outlive their server: saved when it stops, and resumed on the next as if it had not."""

import asyncio
import json
import os
import shutil
import signal
import socket
import tempfile
import tracemalloc
from contextlib import ExitStack, suppress
from functools import partial

import httpx
import pytest
from engines import embedded
from programs import run_command
from serving_server import ROOMY, connect, frame_event, narration, picture, running, said, send, until
from test_serving_limits import until as until_true
from test_serving_server import start
from tiny import tiny_model, tiny_processor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_websocket

from videollm_mod.serving.limits import RequestError
from videollm_mod.serving.realtime import Connection
from videollm_mod.serving.session_options import SessionOptions
from videollm_mod.serving.speech_endpoints import Speaker
from videollm_mod.serving.state_folder import StateFolder, own_folder


TINY = {"max_streams": 2, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}


def saved_in(folder):
    return [path for path in folder.iterdir() if len(path.name.split(".")[0]) == 64]


def numbers_of(events):
    return [int(event.event_id.removeprefix("event_")) for event in events]


def on_loop(server, work):
    return asyncio.run_coroutine_threadsafe(work, server.sessions._loop).result(60)


async def send_frames(connection, frames, start=0):
    await send(connection, *(frame_event(frame, number / 2) for number, frame in enumerate(frames, start=start)))


async def accepted(connection, count):
    """Return the events until the server has accepted `count` items of the client."""
    found = []
    while sum(event.type == "conversation.item.added" and event.item.role == "user" for event in found) < count:
        found += await until(connection, "conversation.item.added")
    return found


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def small(state):
    """Return a function that serves a tiny model, whose words mean nothing."""
    return partial(running, tiny_model(), tiny_processor(), state_dir=state, engine_options=TINY, max_output_tokens=8)


@pytest.mark.xdist_group("preloaded")
def test_a_session_of_a_stopped_process_goes_on_in_another(state):
    frames = embedded()[2]
    process, address = start(0, "--state-dir", str(state))

    async def begin():
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send_frames(connection, frames[:14])
        heard = await accepted(connection, 14)  # the client does not read what comes later
        process.send_signal(signal.SIGTERM)
        with suppress(Exception):
            while True:
                await asyncio.wait_for(connection.recv(), 30)
        return token, heard

    async def go_on(address, token, last):
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": last})
        created = await connection.recv()
        await send_frames(connection, frames[14:], start=14)
        heard = await until(connection, "response.done", len(narration()) - len(said(before)))
        await connection.close()
        return created.session, heard

    token, before = asyncio.run(begin())
    assert process.wait(30) in (0, -signal.SIGTERM)
    (folder,) = saved_in(state)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4 and all(path.stat().st_mode & 0o077 == 0 for path in [state, folder, *files])
    assert not any(token.encode() in path.read_bytes() for path in files)
    model, processor, _ = embedded()
    with running(model, processor, state_dir=state, engine_options=ROOMY) as (other, _):
        created, after = asyncio.run(go_on(other, token, before[-1].event_id))
        assert saved_in(state) == []
    assert created.videollm_mod["resumed"] and created.videollm_mod["resume_token"] == token
    numbers = numbers_of(before + after)
    assert numbers == list(range(2, 2 + len(numbers)))  # each event once, in order
    assert said(before + after) == narration()


@pytest.mark.xdist_group("preloaded")
def test_a_client_that_is_away_loses_nothing_when_the_server_is_restarted(tmp_path):
    """The server was told nothing about saving. The client hears what was said meanwhile, and what waited."""
    frames = embedded()[2]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def leave(address):
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send_frames(connection, frames)
        heard = await accepted(connection, len(frames))
        connection._connection.transport.abort()
        return token, heard

    async def come_back(address, token, last):
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": last})
        heard = await until(connection, "response.done", len(narration()) - len(said(before)))
        await connection.close()
        return heard

    process, address = start(port, temporary=tmp_path)
    token, before = asyncio.run(leave(address))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)
    (folder,) = tmp_path.glob("videollm-mod-*")
    assert len(saved_in(folder)) == 1 and folder.stat().st_mode & 0o077 == 0
    process, same = start(port, "--save-seconds", "60", temporary=tmp_path)
    try:
        after = asyncio.run(come_back(same, token, before[-1].event_id))
        assert len(said(before)) < len(narration()) and said(before + after) == narration()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert saved_in(folder) == []


def test_what_waits_is_seen_and_answered_after_the_restart(small):
    """
    Also a session that speaks only when it is asked to, and a question that comes before others. The next server has
    no speech endpoint, and smaller limits.
    """
    frames = embedded()[2][:5]
    update = {"type": "session.update", "session": {"type": "realtime", "videollm_mod": {"unprompted": False}}}
    questions = [{"type": "response.create", "response": {"metadata": {"number": str(i)}}} for i in range(3)]
    questions[2]["videollm_mod"] = {"interrupt": True}
    questions[1]["response"]["output_modalities"] = ["audio"]
    speaker = Speaker("http://localhost:9/v1", "mouth", "alto")

    async def ask(address, server):
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send(connection, update)
        await send_frames(connection, frames[:2])
        await until(connection, "conversation.item.done", 2)
        (session,) = server.sessions
        with server.engine.changed:
            session.stream.session.is_paused = True
        await send_frames(connection, frames[2:], start=2)
        before = await accepted(connection, 3)
        await send(connection, *questions)
        while len(session.asked) < 3:
            await asyncio.sleep(0.01)
        return token, before[-1].event_id

    async def rest(address, token, last):
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": last})
        found = await until(connection, "response.done", 3)
        await connection.close()
        return found

    with small(speaker=speaker) as (address, server):
        token, last = asyncio.run(ask(address, server))
    with small(max_output_tokens=3) as (address, _):
        after = asyncio.run(rest(address, token, last))
    fates = [event.videollm_mod["fate"] for event in after if getattr(event, "videollm_mod", {}).get("fate")]
    assert fates == ["seen"] * 3
    done = [event.response.metadata["number"] for event in after if event.type == "response.done"]
    assert done == ["2", "0", "1"] and not any(event.type == "error" for event in after)
    responses = [event.response for event in after if event.type == "response.done"]
    assert [response.output_modalities for response in responses] == [["text"]] * 3
    assert all(response.usage.output_tokens <= 3 for response in responses)


def test_sessions_over_http_go_on_by_their_name(state):
    model, processor, frames = embedded()
    serve = partial(running, model, processor, state_dir=state, engine_options=ROOMY, api_keys=["first", "second"])
    client, heard = httpx.Client(headers={"api-key": "first"}, timeout=60), []

    def show(address, numbers):
        for number in numbers:
            path = f"http://{address}/v1/streaming/sessions/door/frame?time={number / 2}"
            answer = client.post(path, content=picture(frames[number]))
            assert answer.status_code == 200, answer.text
            heard.extend((event["time"], event["text"]) for event in answer.json()["said"])

    with serve() as (address, _):
        client.post(f"http://{address}/v1/streaming/sessions", json={"id": "door"})
        show(address, range(8))
    with serve() as (address, _):
        path = f"http://{address}/v1/streaming/sessions/door"
        assert httpx.get(path, headers={"api-key": "second"}).status_code == 404  # it belongs to the other key
        taken = client.post(path.removesuffix("/door"), json={"id": "door"})
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "id_taken")
        shown = client.get(path).json()
        assert (shown["frames"], shown["frames_received"]) == (8, 8)
        show(address, range(8, len(frames)))
    assert heard == narration()


def test_sessions_of_a_drained_server_go_on_at_another(small):
    """It still has its connections, as a replica that is removed does."""
    frames, conversations = embedded()[2], []
    sessions = "v1/streaming/sessions"

    async def move(first, second, server):
        connection = await connect(first)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send_frames(connection, frames[:2])
        heard = await until(connection, "conversation.item.done", 2)
        conversations.append(server.sessions.find_token(token).conversation)
        draining = asyncio.run_coroutine_threadsafe(server.saved.save_all(), server.sessions._loop)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                heard.append(await asyncio.wait_for(connection.recv(), 60))
        query = {"resume_token": token, "last_event_id": heard[-1].event_id}
        lost = await connect(second, extra_query=query)  # at once
        lost._connection.transport.abort()  # the client has not seen its new token
        again = await connect(second, extra_query=query)
        created = (await again.recv()).session
        await send_frames(again, frames[2:4], start=2)
        heard += await until(again, "conversation.item.done", 2)
        await again.close()
        draining.result(60)
        return token, closed.value.rcvd.code, created, heard

    async def come_too_late(door, conversation):
        """Use sessions that are being saved."""
        connection = Connection(None, conversation, None)
        conversation.connect(connection)
        with pytest.raises(RequestError) as refused:
            await door.ask("What do you see?")
        return connection._end.result()[0], refused.value

    def new_address(address):
        moved = httpx.get(f"http://{address}/{sessions}/a.door")
        assert (moved.status_code, moved.json()["error"]["code"]) == (308, "session_moved")
        return moved.headers["Location"]

    with ExitStack() as stack:
        servers = [stack.enter_context(small(session_prefix=prefix)) for prefix in ("a.", "b.", "c.")]
        (first, server), (second, _), (third, _) = servers
        httpx.post(f"http://{first}/{sessions}", json={"id": "door"})
        door = server.sessions.find("a.door")
        token, code, created, heard = asyncio.run(move(first, second, server))
        late = come_too_late(door, conversations[0])
        late_code, refused = asyncio.run_coroutine_threadsafe(late, server.sessions._loop).result(60)
        assert late_code == 1012 and (refused.status, refused.code) == (503, "server_draining")
        assert httpx.post(f"http://{first}/{sessions}").json()["error"]["code"] == "server_draining"
        # Each server knows the new address, as often as it is asked. A proxy with TLS may stand before it.
        assert [new_address(asked) for asked in (second, third, second)] == [f"/{sessions}/b.door"] * 3
        assert httpx.get(f"http://{second}/{sessions}/b.door").json()["id"] == "b.door"
    assert code == 1012 and token.startswith("a.") and created.id.startswith("b.")
    assert created.videollm_mod["resume_token"].startswith("b.")
    assert numbers_of(heard) == list(range(2, 2 + len(heard)))


def test_the_first_token_leads_to_a_session_wherever_it_is(small):
    """A client that is away while servers are removed may know no other token."""
    frames = embedded()[2]

    def status(address, token):
        """Return the status of a handshake, which is not followed to another address."""
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        answer = httpx.get(f"http://{address}/v1/realtime?last_event_id=event_2&resume_token={token}", headers=upgrade)
        return answer.status_code, answer.headers.get("Location")

    async def begin(address):
        connections = [await connect(address) for _ in range(2)]
        tokens = [(await connection.recv()).session.videollm_mod["resume_token"] for connection in connections]
        await send_frames(connections[1], frames[:2])
        await until(connections[1], "conversation.item.done", 2)
        for connection in connections:
            connection._connection.transport.abort()
        return tokens

    async def remove(server, other, slow, token):
        """Save the sessions of a server, and ask the other one for a token meanwhile."""
        async with slow.lock:
            saving = asyncio.ensure_future(server.saved.save_all())
            while not server.saved.folder.peek(f"moved token {token.removeprefix('a.')}"):
                await asyncio.sleep(0.01)
            meanwhile = await asyncio.to_thread(status, other, token)
        await saving
        return meanwhile

    async def resume(address, token):
        connection = await connect(address, extra_query={"resume_token": token})
        session = (await connection.recv()).session
        connection._connection.transport.abort()
        return session

    with ExitStack() as stack:
        servers = [stack.enter_context(small(session_prefix=prefix)) for prefix in ("a.", "b.", "c.")]
        (first, leaving), (second, next_to_leave), (third, _) = servers
        slow, token = asyncio.run(begin(first))
        slow = leaving.sessions.find_token(slow)
        assert on_loop(leaving, remove(leaving, second, slow, token)) == (503, None)
        assert asyncio.run(resume(second, token)).id.startswith("b.")
        now = f"/v1/realtime?last_event_id=event_2&resume_token={token.replace('a.', 'b.', 1)}"
        assert status(third, token) == (308, now)
        on_loop(next_to_leave, next_to_leave.saved.save_all())
        moved = asyncio.run(resume(third, token))
        assert moved.id.startswith("c.") and moved.videollm_mod["resume_token"] == token.replace("a.", "c.", 1)
        assert status(third, token + "x") == (404, None)
        assert httpx.get(f"http://{third}/v1/streaming/sessions").json()["data"][0]["frames"] == 2


def test_a_session_gives_way_to_another_key_that_has_its_name_meanwhile(small):
    first, second = ({"api-key": key} for key in ("first", "second"))
    serve = partial(small, api_keys=["first", "second"])
    with serve() as (address, _):
        httpx.post(f"http://{address}/v1/streaming/sessions", json={"id": "door", "fps": 3}, headers=first)
    with serve() as (address, _):
        path = f"http://{address}/v1/streaming/sessions"
        assert httpx.post(path, json={"id": "door"}, headers=second).status_code == 201
        shown = [httpx.get(f"{path}/door", headers=first, follow_redirects=True).json() for _ in range(2)]
        assert shown[0]["id"] == shown[1]["id"] != "door" and shown[0]["options"]["fps"] == 3
        assert httpx.get(f"{path}/door", headers=second).json()["options"]["fps"] != 3


def test_sessions_that_come_while_their_server_stops(small, state):
    """A session that is being resumed is saved again, and one that is being opened is refused."""

    async def begin(address):
        connection = await connect(address)
        return (await connection.recv()).session.videollm_mod["resume_token"]

    async def resume_and_stop(server):
        resuming = asyncio.ensure_future(server.saved.find_token(token))
        while not server.saved._lock.locked():
            await asyncio.sleep(0)
        opening = asyncio.ensure_future(server.sessions.open(SessionOptions()))
        await asyncio.sleep(0)
        await server.saved.save_all()
        with pytest.raises(RequestError, match="shutting down"):
            await opening
        return await resuming

    with small() as (address, _):
        token = asyncio.run(begin(address))
    with small(engine_options=TINY | {"max_streams": 4}) as (_, server):  # room for both
        asyncio.run_coroutine_threadsafe(resume_and_stop(server), server.sessions._loop).result(60)
        assert len(saved_in(state)) == 1 and list(server.sessions) == []


def test_files_that_cannot_be_resumed_are_refused_by_name(state, small, tmp_path, caplog):
    async def begin(address):
        connection = await connect(address)
        return (await connection.recv()).session.videollm_mod["resume_token"]

    def refused(address):
        with pytest.raises(InvalidStatus) as error:
            connect_websocket(f"ws://{address}/v1/realtime?resume_token={token}")
        body = error.value.response.body.decode()
        assert str(state) not in body
        return error.value.response.status_code, json.loads(body)["error"]

    with small() as (address, _):
        token = asyncio.run(begin(address))
    (folder,) = saved_in(state)
    shutil.copytree(folder, tmp_path / "copy")
    other = partial(running, tiny_model(seed=1), tiny_processor(), state_dir=state, engine_options=TINY)
    with other() as (address, _):
        status, error = refused(address)
        assert status == 410 and error["code"] == "session_lost"
        assert "was saved with a model of other weights" in error["message"]
    with small(engine_options=TINY | {"max_streams": 1, "max_frames": 4, "max_text_tokens": 40}) as (address, _):
        status, error = refused(address)  # it would never have room, so nobody is told to try again
        assert (status, error["code"]) == (410, "session_lost") and "is too large: no stream" in error["message"]
    (folder,) = saved_in(state)
    with small() as (address, server):
        tensors = folder / "stream" / "session.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\1")
        os.utime(folder, (2e9, 2e9))
        status, error = refused(address)
        assert status == 410 and "stream/session.safetensors of a saved session is damaged" in error["message"]
        until_true(lambda: not server.engine.streams)  # the engine ends the stream after the answer
        assert saved_in(state) == [] and list(server.sessions) == []
        shutil.copytree(tmp_path / "copy", folder)
        os.utime(folder, (1.0, 1.0))
        assert refused(address)[0] == 404 and saved_in(state) == []
        shutil.copytree(tmp_path / "copy", folder)
        os.utime(folder, (2e9, 2e9))
        with connect_websocket(f"ws://{address}/v1/realtime?resume_token={token}") as socket:
            assert json.loads(socket.recv())["session"]["videollm_mod"]["resumed"]
    assert sum("is damaged" in line for line in caplog.messages) == 1


# ----------------------------------------------------------------------------------------------------------- a folder


def keep(folder, secret, *, expires=2e9, size=1000):
    place = folder.begin()
    (place / "stream").mkdir()
    (place / "stream" / "data").write_bytes(b"x" * size)
    folder.commit(place, secret, expires)


def test_a_folder_keeps_what_expires_last(state):
    folder = StateFolder(state, 35_000_000)
    for number, expires in enumerate((2e9, 1.9e9, 2.1e9)):
        keep(folder, f"secret {number}", expires=expires, size=10_000_000)
    keep(folder, "secret 3", size=10_000_000)
    with pytest.raises(ValueError, match="and all saved sessions may have 35000000"):
        keep(folder, "secret 4", size=40_000_000)
    assert folder.take("secret 1") is None
    tracemalloc.start()
    taken = folder.take("secret 0")
    assert tracemalloc.get_traced_memory()[1] < 4e6  # files of many gigabytes are not read at once
    tracemalloc.stop()
    assert (taken / "stream" / "data").stat().st_size == 10_000_000 and folder.take("secret 0") is None
    folder.put_back(taken, "secret 0")
    assert all(folder.take(f"secret {number}") for number in (0, 2, 3))


def test_a_folder_removes_what_is_over_and_nothing_of_others(state):
    folder = StateFolder(state, 10_000)
    keep(folder, "over", expires=1.0)
    keep(folder, "there")
    folder.begin()  # by a process that goes on
    os.utime(folder.begin(), (1.0, 1.0))  # by one that is gone
    (state / "notes").mkdir()
    os.utime(state / "notes", (1.0, 1.0))
    StateFolder(state, 10_000)
    assert len(saved_in(state)) == 1 and (state / "notes").is_dir() and len(list(state.iterdir())) == 3


@pytest.mark.parametrize("name", ["stream/data", "digests.json"])
def test_a_damaged_file_is_named_and_goes(state, name):
    folder = StateFolder(state, 10_000)
    keep(folder, "secret")
    (place,) = saved_in(state)
    (place / name).write_bytes((place / name).read_bytes()[:-1])
    os.utime(place, (2e9, 2e9))
    with pytest.raises(ValueError, match=f"{name} of a saved session is damaged"):
        folder.take("secret")
    folder.release()
    assert list(state.iterdir()) == []


def test_a_folder_that_cannot_be_written_has_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="Sessions cannot be saved in '.*file': File exists."):
        StateFolder(tmp_path / "file", 10_000)


def test_a_server_has_a_folder_of_its_own_among_temporary_files(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, other = (own_folder(server, 10_000) for server in ("one", "other"))
    assert own_folder("one", 10_000).folder == one.folder != other.folder
    assert [folder.folder.stat().st_mode & 0o777 for folder in (one, other)] == [0o700] * 2
    keep(other, "over", expires=1e9)
    keep(other, "not over")
    assert own_folder("one", 10_000) is not None and len(saved_in(other.folder)) == 1
    # Systems remove temporary files that are old.
    shutil.rmtree(one.folder)
    one.remove_expired()
    assert one.peek("any") is None and one.take("any") is None
    shutil.rmtree(one.folder)
    keep(one, "any")
    assert one.peek("any") is not None
    # Someone else may have made it, and could read the files or change them.
    one.folder.chmod(0o755)
    with pytest.raises(PermissionError, match="others may write or read there"):
        one.begin()
    assert own_folder("one", 10_000) is None
    link = tmp_path / other.folder.name
    shutil.move(other.folder, tmp_path / "moved")
    link.symlink_to(tmp_path / "moved")
    assert own_folder("other", 10_000) is None
    assert sum("name another folder with `--state-dir`" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("given", [("--state-dir", "here"), ("--save-seconds", "10")])
def test_a_folder_and_none_are_not_given_together(given):
    done = run_command("serve", "--model", "does-not-exist", *given, "--no-state-dir")
    assert done.returncode == 1 and "contradict each other" in done.stderr


def test_a_folder_that_cannot_be_read_is_no_missing_session(state):
    folder = StateFolder(state, 10_000)
    assert folder.take("one") is None
    state.rmdir()
    with pytest.raises(FileNotFoundError):
        folder.begin()  # a disk that is not there any more is not replaced by another one
    state.write_text("")
    for look in (folder.take, folder.peek):
        with pytest.raises(NotADirectoryError):
            look("one")
    folder.remove("one")  # a server that stops goes on with its other sessions


def test_a_session_that_cannot_be_read_now_stays(state, small):
    """Its client is told to try again, and finds it when the disk answers again."""
    sessions = "v1/streaming/sessions"
    with small() as (address, _):
        httpx.post(f"http://{address}/{sessions}", json={"id": "door"})
    (folder,) = saved_in(state)
    tensors, kept = folder / "stream" / "session.safetensors", state.parent / "kept"
    with small() as (address, _):

        def refused():
            answer = httpx.get(f"http://{address}/{sessions}/door")
            assert str(state) not in answer.text
            return answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]

        shutil.move(tensors, kept)
        tensors.symlink_to("/proc/self/mem")  # to read it is an input/output error
        assert refused() == (503, "session_moving", "1") and saved_in(state) == [folder]
        tensors.unlink()
        shutil.move(kept, tensors)
        shutil.move(state, state.parent / "away")
        state.write_text("")
        assert refused() == (503, "session_moving", "1")
        state.unlink()
        shutil.move(state.parent / "away", state)
        assert httpx.get(f"http://{address}/{sessions}/door").json()["id"] == "door"


def test_a_saved_session_is_deleted_on_a_full_server(state, small):
    sessions = "v1/streaming/sessions"
    serve = partial(small, api_keys=["first", "second"])
    client, other = (httpx.Client(headers={"api-key": key}, timeout=60) for key in ("first", "second"))
    with serve() as (address, _):
        client.post(f"http://{address}/{sessions}", json={"id": "door"})
    with serve() as (address, _):
        door = f"http://{address}/{sessions}/door"
        for name in ("one", "two"):
            assert other.post(f"http://{address}/{sessions}", json={"id": name}).status_code == 201
        assert client.get(door).status_code == 503 and len(saved_in(state)) == 1
        assert other.delete(door).status_code == 404 and len(saved_in(state)) == 1
        assert client.delete(door).json() == {"id": "door", "object": "streaming.session", "deleted": True}
        assert saved_in(state) == [] and client.delete(door).status_code == 404


def test_a_session_whose_expiry_cannot_be_read_has_not_expired(state):
    folder = StateFolder(state, 10_000)
    keep(folder, "secret")
    (place,) = saved_in(state)
    shutil.rmtree(place)
    place.symlink_to(place)  # to follow it is an error
    assert folder.peek("secret") == place
