# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sessions that are saved while they go on: resumed when their server was killed, and the same in all else."""

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import time as clock
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
from engines import embedded
from serving_server import (
    ROOMY,
    connect,
    frame_event,
    narration,
    picture,
    running,
    said,
    send,
    text_event,
    until,
    update_event,
)
from test_serving_saved_sessions import TINY, accepted, numbers_of, on_loop, saved_in, send_frames
from test_serving_server import start
from tiny import random_frames, tiny_model, tiny_processor
from websockets.exceptions import ConnectionClosed

from videollm_mod.serving import presence, restore_session, save_session
from videollm_mod.serving.presence import Presence
from videollm_mod.serving.server import create_app
from videollm_mod.serving.session_state import news_of
from videollm_mod.serving.state_folder import StateFolder


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def small(state):
    """Return a function that serves a tiny model, whose words mean nothing. It saves sessions all the time."""
    given = {"state_dir": state, "engine_options": TINY, "max_output_tokens": 8, "save_seconds": 0.01}
    return partial(running, tiny_model(), tiny_processor(), **given)


def saved_states(folder):
    """Return what the clients of saved sessions have done, by `client.json`."""
    found = []
    for place in saved_in(folder):
        try:
            found.append(json.loads((place / "client.json").read_text(encoding="utf-8")))
        except FileNotFoundError:  # a note, or replaced meanwhile
            continue
    return found


async def until_true(condition):
    end = clock.monotonic() + 60
    while not condition():
        assert clock.monotonic() < end
        await asyncio.sleep(0.01)


def show(door, numbers):
    """Show frames to a session over plain HTTP. Return what it says."""
    heard = []
    for number in numbers:
        answer = httpx.post(f"{door}/frame?time={number / 2}", content=picture(embedded()[2][number]), timeout=60)
        assert answer.status_code == 200, answer.text
        heard += [(event["time"], event["text"]) for event in answer.json()["said"]]
    return heard


@pytest.mark.xdist_group("preloaded")
def test_sessions_of_a_killed_server_go_on_from_their_last_save(state, tmp_path):
    """Its folder is moved away after the saves, so that it cannot save what comes then. Clients send that again."""
    frames, kept, path = embedded()[2], tmp_path / "kept", "v1/streaming/sessions"
    process, address = start(0, "--state-dir", str(state), "--save-seconds", "0.2")
    httpx.post(f"http://{address}/{path}", json={"id": "door"})
    spoken = show(f"http://{address}/{path}/door", range(4))

    async def begin():
        connection = await connect(address)
        first = (await connection.recv()).session.videollm_mod
        await send_frames(connection, frames[:8])
        await until_true(lambda: sorted(each["num_received"] for each in saved_states(state)) == [4, 8])
        state.rename(kept)
        show(f"http://{address}/{path}/door", range(4, 6))
        await send_frames(connection, frames[8:11], start=8)
        heard = await accepted(connection, 11)
        heard += await until(connection, "conversation.item.done", 1)
        process.send_signal(signal.SIGKILL)
        with pytest.raises(ConnectionClosed):
            while True:
                heard.append(await asyncio.wait_for(connection.recv(), 30))
        return first, heard

    async def go_on(address):
        token, last = first["resume_token"], before[-1].event_id
        query = {"resume_token": token, "last_event_id": last}
        lost = await connect(address, extra_query=query)  # the client does not learn what it says
        await send(lost, {"type": "session.heartbeat"})
        await until(lost, "session.heartbeat_ack")
        lost._connection.transport.abort()
        connection = await connect(address, extra_query=query)
        created = (await connection.recv()).session.videollm_mod
        since = int(created["last_frame_time"] * 2) + 1
        await send_frames(connection, frames[since:], start=since)
        kept = [event.event_id for event in before].index(created["rewound_to"]) + 1
        kept_words = said(before[:kept])
        heard = await until(connection, "response.done", len(narration()) - len(kept_words))
        other = await connect(address, extra_query={"resume_token": token})
        again = (await other.recv()).session.videollm_mod
        await other.close()
        return created, heard, again, kept_words

    first, before = asyncio.run(begin())
    process.wait()
    model, processor, _ = embedded()
    serve = partial(running, model, processor, state_dir=kept, engine_options=ROOMY, save_seconds=60.0)
    with serve() as (other, _):
        created, after, again, kept_words = asyncio.run(go_on(other))
        door = f"http://{other}/{path}/door"
        assert httpx.get(door).json()["time"] == 1.5
        spoken += show(door, range(4, len(frames)))
        assert len(saved_in(kept)) == 1, "the one whose client left is removed, and the other one stays until it is"
        httpx.delete(door)
        assert saved_in(kept) == [] and httpx.post(f"http://{other}/{path}", json={"id": "door"}).status_code == 201
    assert first["save_seconds"] == 0.2 and created["save_seconds"] == 60.0
    assert created["resumed"] and created["last_frame_time"] == 3.5
    assert kept_words + said(after) == narration() == spoken
    numbers = numbers_of(before + after)
    assert numbers == list(range(2, 2 + len(numbers))), "no later event has the number of one that was lost"
    assert again["resumed"] and "rewound_to" not in again and again["last_frame_time"] == (len(frames) - 1) / 2


def test_a_session_that_was_closed_is_not_saved_any_more(small, state, monkeypatch):
    """A server that is killed when it has answered must not bring it back."""
    remove = StateFolder.remove
    monkeypatch.setattr(StateFolder, "remove", lambda self, secret: (clock.sleep(0.3), remove(self, secret)))
    with small(save_seconds=60.0) as (address, server):
        door = f"http://{address}/v1/streaming/sessions/door"
        httpx.post(os.path.dirname(door), json={"id": "door"})
        httpx.post(f"{door}/frame", content=picture(random_frames(1)[0]), timeout=60)
        [session] = server.sessions
        on_loop(server, server.saved._keep(session, server.saved._watch(session)))
        assert len(saved_in(state)) == 1
        httpx.delete(door, timeout=60)
        assert saved_in(state) == []


def test_streams_that_are_saved_all_the_time_say_the_same(state):
    model, processor, frames = embedded()
    names, most = set(), []

    async def watch(address):
        connection = await connect(address)
        await connection.recv()
        heard = []
        for number, frame in enumerate(frames):
            await send(connection, frame_event(frame, number / 2))
            heard += await until(connection, "conversation.item.done")
            if number < 4:
                await until_true(lambda: {path.name for path in saved_in(state)} - names)
            saved = [path.name for path in saved_in(state)]
            names.update(saved)
            most.append(len(saved))
        heard += await until(connection, "response.done", len(narration()) - len(said(heard)))
        await connection.close()
        return heard

    serve = partial(running, model, processor, state_dir=state, engine_options=ROOMY, save_seconds=0.001)
    with serve() as (address, server):
        heard = asyncio.run(watch(address))
        asyncio.run(until_true(lambda: not list(server.sessions) and not saved_in(state)))
    assert said(heard) == narration()
    assert numbers_of(heard) == list(range(2, 2 + len(heard)))
    assert len(names) > 3 and max(most) <= 2, "a session has one folder, and two while one replaces the other"
    assert list(state.iterdir()) == [], "the server that has ended leaves nothing"


def test_what_is_saved_goes_when_its_session_expires_and_stays_while_it_lives(small, state, caplog):
    """A heartbeat is no news, so that the files stay as they are. They also live while others are saved."""

    async def beat(address, server):
        connection = await connect(address)
        await send(connection, update_event(unprompted=False), frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        (session,) = server.sessions
        await until_true(lambda: session in server.saved._kept)
        await until_true(lambda: server.saved._kept[session].news == news_of(session))
        before = saved_in(state)
        expires = before[0].stat().st_mtime
        for _ in range(3):
            await send(connection, {"type": "session.heartbeat"})
            await until(connection, "session.heartbeat_ack")
        assert saved_in(state) == before
        on_loop(server, server.saved._saving.acquire())
        await send(connection, frame_event(random_frames(1)[0], 1.0))
        late = server.metrics.save_faults.labels("late")._value
        await until_true(lambda: before[0].stat().st_mtime > expires + 0.5 and late.get() == 1)
        assert f"The session {session.session_id} has not been saved for" in caplog.text and saved_in(state) == before
        server.sessions._loop.call_soon_threadsafe(server.saved._saving.release)
        await until_true(lambda: saved_in(state) != before)
        session.limits = replace(session.limits, resume_seconds=0.2)
        connection._connection.transport.abort()
        await until_true(lambda: not saved_in(state))

    with small() as (address, server):
        asyncio.run(beat(address, server))


def test_frames_that_waited_at_the_save_are_told_again_under_new_numbers(small, state, tmp_path):
    """The client has other events of the numbers that the next server gives at first."""
    frames = random_frames(4)

    async def begin(address, server):
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send(connection, update_event(unprompted=False), frame_event(frames[0], 0.0))
        heard = await until(connection, "conversation.item.done")
        (session,) = server.sessions
        session.stream.pause()
        await send_frames(connection, frames[1:], start=2)
        heard += await accepted(connection, 3)
        await until_true(lambda: [each["num_received"] for each in saved_states(state)] == [4])
        on_loop(server, server.saved._saving.acquire())  # the next save replaces the files that are copied
        shutil.copytree(state, tmp_path / "copy")
        server.sessions._loop.call_soon_threadsafe(server.saved._saving.release)
        session.stream.resume()
        heard += await until(connection, "conversation.item.done", 3)
        connection._connection.transport.abort()
        return token, heard

    async def go_on(address, server):
        assert httpx.get(f"http://{address}/v1/realtime?resume_token={token}").status_code == 200
        (session,) = server.sessions
        await until_true(lambda: session.conversation.number == numbers_of(heard)[-1])  # the same again
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": heard[-1].event_id})
        created = (await connection.recv()).session.videollm_mod
        again = await until(connection, "conversation.item.done", 3)
        await send(connection, {"type": "session.heartbeat"})
        again += await until(connection, "session.heartbeat_ack")
        assert server.metrics.disconnected.labels("slow_reader")._value.get() == 0
        await connection.close()
        return created, again

    with small() as (address, server):
        token, heard = asyncio.run(begin(address, server))
    with small(state_dir=tmp_path / "copy") as (address, server):
        created, again = asyncio.run(go_on(address, server))
    assert created["rewound_to"] == heard[-4].event_id and created["last_frame_time"] == 2.0
    assert [event.item.id for event in again[:-1]] == [event.item.id for event in heard[-3:]]
    assert numbers_of(heard + again) == list(range(2, 2 + len(heard + again)))


def test_a_reply_can_be_cancelled_while_a_save_waits_for_its_end(small):
    """The tiny model does not end a reply. Nothing that waits is lost either."""

    async def cancel(address, server):
        connection = await connect(address)
        await send(connection, update_event(unprompted=False), frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        (session,) = server.sessions
        await send(connection, {"type": "response.create"})
        await until(connection, "response.created")
        await send(connection, text_event("And now?"))
        await until_true(lambda: session.stream.session.is_paused)  # by a save
        await send(connection, {"type": "response.cancel"}, {"type": "response.create"})
        first = (await until(connection, "response.done"))[-1].response
        await until(connection, "response.created")  # the stream goes on
        await send(connection, {"type": "response.cancel"})
        await until(connection, "response.done")
        await connection.close()
        return first

    engine = TINY | {"max_text_tokens": 3000}
    with small(engine_options=engine, max_output_tokens=2000) as (address, server):
        assert asyncio.run(cancel(address, server)).status == "cancelled"


def test_a_request_that_waits_for_the_stream_is_answered_while_saves_wait_for_it(small):
    """It has the session's lock, and the stream pauses for the save."""

    async def ask(address, server):
        connection = await connect(address)
        await send(connection, update_event(unprompted=False), frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        (session,) = server.sessions
        await send(connection, {"type": "response.create"})
        await until(connection, "response.created")
        await until_true(lambda: session.stream.session.is_paused)  # by a save
        url = f"http://{address}/v1/streaming/sessions/{session.session_id}/ask"
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(url, json={"text": "And now?"})
        await connection.close()
        return answer

    engine = TINY | {"max_text_tokens": 3000}
    with small(engine_options=engine, max_output_tokens=80, reply_seconds=5.0) as (address, server):
        answer = asyncio.run(ask(address, server))
    assert answer.status_code == 200, answer.text


def test_a_session_that_a_fault_ends_goes_on_from_its_save(small):
    async def fail(address, server):
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send(connection, update_event(unprompted=False), frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        (session,) = server.sessions
        await until_true(lambda: session.is_kept)
        server.sessions._loop.call_soon_threadsafe(server.sessions._fail, session, ValueError("broken"))
        await until(connection, "error")
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
        again = await connect(address, extra_query={"resume_token": token})
        assert (await again.recv()).session.videollm_mod["resumed"]
        await again.close()
        return closed.value.rcvd.code

    with small() as (address, server):
        assert asyncio.run(fail(address, server)) == 1011


def test_saves_that_fail_are_counted_and_told_once(small, caplog):
    async def fail(address, server):
        connection = await connect(address)
        await send(connection, frame_event(random_frames(1)[0], 0.0))
        failed = server.metrics.save_faults.labels("failed")._value
        await until_true(lambda: failed.get() > 2)
        await connection.close()

    with small(max_state_bytes=1000) as (address, server):
        asyncio.run(fail(address, server))
    assert sum("could not be saved" in line for line in caplog.messages) == 1


def test_a_session_that_another_server_holds_is_not_resumed_from_its_save(small, state, caplog):
    """Servers with prefixes say where it is. When its server is gone, the next one that is asked resumes it."""
    sessions = "v1/streaming/sessions"

    async def begin(address):
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        await send_frames(connection, embedded()[2][:2])
        await until(connection, "conversation.item.done", 2)
        httpx.post(f"http://{address}/{sessions}", json={"id": "door"})
        await until_true(lambda: len(saved_states(state)) == 2)
        return token

    def ask(address, token):
        """Return the status of a handshake and where it leads to. Pages ask without one, and get the same answer."""
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        url = f"http://{address}/v1/realtime?resume_token={token}"
        told = [(answer.status_code, answer.headers) for answer in (httpx.get(url, headers=upgrade), httpx.get(url))]
        first, second = [(status, headers.get("Location", headers.get("Retry-After"))) for status, headers in told]
        assert first == second and all(headers["Cache-Control"] == "no-store" for _, headers in told)
        return first

    async def resume(address, token):
        connection = await connect(address, extra_query={"resume_token": token})
        created = (await connection.recv()).session.videollm_mod
        connection._connection.transport.abort()
        return created

    async def seem_gone(server):
        """Unlock the file, as the system does when a server is killed. Saves wait."""
        await server.saved._saving.acquire()
        server.state_folder.release()

    async def come_back(server):
        server.saved._saving.release()

    with ExitStack() as stack:
        (second, other), (first, server) = (stack.enter_context(small(session_prefix=name)) for name in ("b.", "a."))
        token = asyncio.run(begin(first))
        assert ask(second, token) == (503, "1")
        assert ask(second, token.replace("a.", "b.", 1)) == (308, f"/v1/realtime?resume_token={token}")
        assert httpx.get(f"http://{second}/{sessions}/a.door").status_code == 503
        assert ask(second, "nonsense") == (404, None)
        found = httpx.get(f"http://{first}/v1/realtime?resume_token={token}")
        assert found.json()["resume_token"] == token and found.headers["Cache-Control"] == "no-store"
        on_loop(server, seem_gone(server))
        created = asyncio.run(resume(second, token))
        assert created["resume_token"] == token.replace("a.", "b.", 1) and created["rewound_to"]
        assert httpx.get(f"http://{second}/{sessions}/a.door").headers["Location"] == f"/{sessions}/b.door"
        assert httpx.get(f"http://{second}/{sessions}/b.door").status_code == 200
        on_loop(server, come_back(server))
    assert "Another server has this session now" in caplog.text, "the first server saves it no more"


# --------------------------------------------------------------------------------------------------------- the folder


def keep(folder, secret, *, expires=4e9, is_held=False):
    place = folder.begin()
    (place / "data").write_bytes(bytes(10_000 if folder.max_bytes > 30_000 else 10))
    folder.commit(place, secret, expires, is_held=is_held)


def in_files(folder):
    """Save in a state folder, twice, and let a server resume and hold it."""
    kept = StateFolder(folder, 100_000)
    for _ in range(2):
        keep(kept, "secret", is_held=True)
    kept.put_back(kept.take("secret"), "secret", held_until=4.1e9)


def in_python(folder):
    """Save a session twice, in one folder."""
    session = tiny_model().stream(tiny_processor())
    session.push(random_frames(1))
    for _ in range(2):
        save_session(session, folder / "saved")
    assert restore_session(session.model, session.processor, folder / "saved").num_frames == 1


@pytest.mark.parametrize("save", [in_files, in_python])
def test_what_is_saved_is_on_the_disk_before_anything_counts_on_it(tmp_path, monkeypatch, save):
    """A power failure leaves what was written to the disk. A saved session gets its name after that."""
    on_disk, done, fsync, rename = set(), [], os.fsync, os.rename

    def mark(state):
        return state.st_ino, state.st_mtime_ns, state.st_size

    def spied_fsync(file):
        fsync(file)
        on_disk.add(mark(os.fstat(file)))
        done.append(("sync", os.fstat(file).st_ino))

    def spied_rename(old, new):
        missing = [path.name for path in (Path(old), *Path(old).rglob("*")) if mark(path.stat()) not in on_disk]
        rename(old, new)
        done.append(("rename", None if re.search(r"/\.(session|server)-", str(new)) else missing))

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "rename", spied_rename)
    save(tmp_path)
    named = [number for number, (kind, missing) in enumerate(done) if kind == "rename" and missing is not None]
    assert len(named) > 1 and [done[number][1] for number in named] == [[]] * len(named)
    # The new name is there before the session before is removed.
    assert [done[number + 1] for number in named] == [("sync", tmp_path.stat().st_ino)] * len(named)


def test_servers_see_which_others_live(tmp_path):
    one, other = Presence(tmp_path), Presence(tmp_path)
    assert list(tmp_path.iterdir()) == [] and not one.is_of_another("")
    name = one.show()
    assert one.show() == name and other.is_of_another(name) and not one.is_of_another(name)
    other.remove_dead()
    assert other.is_of_another(name)
    one.end()
    assert not other.is_of_another(name) and list(tmp_path.iterdir()) == []
    left = [tmp_path / f".server-{number:016x}{end}" for number, end in ((1, ""), (2, ".new"))]
    for path in left:
        path.touch()  # of processes that were killed
    assert not other.is_of_another(left[0].name)
    other.remove_dead()
    assert list(tmp_path.iterdir()) == []


def test_a_server_lives_unless_it_is_certain_that_it_does_not(tmp_path):
    """A process that may open no more files cannot tell."""
    folder, other = StateFolder(tmp_path, 10_000), StateFolder(tmp_path, 10_000)
    keep(other, "secret", is_held=True)
    place, most = folder.peek("secret"), resource.getrlimit(resource.RLIMIT_NOFILE)
    name = (place / "server.txt").read_text()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, most[1]))
    try:
        lives = folder._presence.is_of_another(name), folder.is_held_elsewhere(place)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert lives == (True, True)


def test_two_servers_do_not_take_one_session(tmp_path):
    """The other one may have resumed it since it was looked for. If it is killed before that, the session is there."""
    one, other = StateFolder(tmp_path, 10_000), StateFolder(tmp_path, 10_000)
    keep(one, "secret")
    taken = other.take("secret")
    assert one.take("secret") is None and one.peek("secret") is None
    other.put_back(taken, "secret", held_until=4e9)
    place = one.peek("secret")
    assert one.take("secret") is None and one.peek("secret") == place and one.is_held_elsewhere(place)
    other.take("secret")
    assert one.take("secret") is None
    other.release()  # as the system does when it is killed
    assert (one.take("secret") / "data").is_file()


def test_saves_of_sessions_that_go_on_take_no_room_of_others(tmp_path, caplog):
    folder, other = StateFolder(tmp_path, 35_000), StateFolder(tmp_path, 35_000)
    keep(folder, "ended", expires=3e9)
    keep(folder, "goes on", is_held=True)
    keep(other, "goes on elsewhere", expires=4.1e9, is_held=True)
    with pytest.raises(ValueError, match="There is no room for its 10"):
        keep(folder, "too much", is_held=True)
    assert not caplog.messages
    keep(folder, "ended too", expires=3e9)
    assert "Saved sessions removed: 1. All may have 35000 bytes." in caplog.text
    assert [folder.peek(name) is None for name in ("ended", "goes on", "goes on elsewhere")] == [False, True, False]


def test_a_folder_without_locks_is_used_without_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(presence, "fcntl", None)  # as on Windows
    folder = StateFolder(tmp_path / "state", 10_000)
    place = folder.begin()
    folder.commit(place, "secret", 4e9, is_held=True)
    assert "cannot be locked (this system has no such locks)" in caplog.text
    other = StateFolder(tmp_path / "state", 10_000)
    assert not other.is_held_elsewhere(other.peek("secret"))
    taken = other.take("secret")
    assert other.went_on(taken)
    other.put_back(taken, "secret", held_until=4.1e9)
    assert other.peek("secret").stat().st_mtime == 4.1e9


def test_a_session_that_is_saved_again_needs_no_room_for_the_save_before(tmp_path):
    folder = StateFolder(tmp_path, 25_000)
    for number in range(4):
        for secret in ("one", "other"):
            place = folder.begin()
            (place / "data").write_bytes(bytes([number]) * 10_000)
            folder.commit(place, secret, 4e9, is_held=True)
    assert [(folder.peek(secret) / "data").read_bytes()[0] for secret in ("one", "other")] == [3, 3]
    assert len(saved_in(tmp_path)) == 2


@pytest.mark.parametrize("given", [{"save_seconds": 1.0}, {"save_seconds": 0.0, "state_dir": "unused"}])
def test_an_interval_needs_a_folder_and_seconds(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`save_seconds` (needs `state_dir`|must be a positive number)"):
        create_app(None, None, **given)
    assert list(tmp_path.iterdir()) == []
