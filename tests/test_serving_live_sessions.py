# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sessions of a server in its event loop, without a network: what happens at the same time as something else."""

import asyncio
import base64
import json
import os
import socket
import threading
import time as clock
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from serving_server import picture
from starlette.requests import Request
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.serving import saved_sessions
from videollm_mod.serving.error_answers import moved_response
from videollm_mod.serving.limits import RequestError
from videollm_mod.serving.memory import SPARE_TEXT
from videollm_mod.serving.realtime import Conversation
from videollm_mod.serving.realtime_requests import handle_event
from videollm_mod.serving.saved_sessions import SavedSessions
from videollm_mod.serving.server import _see, create_app
from videollm_mod.serving.session_options import SessionOptions
from videollm_mod.serving.speech_endpoints import Transcriber
from videollm_mod.serving.wanted_sessions import SessionMovedError


TINY = {"max_streams": 2, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
SILENT = SessionOptions(unprompted=False)


def new_server(*, engine_options: dict[str, Any] | None = None, **options: Any) -> Any:
    given = {"engine_options": TINY | (engine_options or {}), "max_output_tokens": 8, **options}
    return create_app(tiny_model(), tiny_processor(), **given).state.server


@asynccontextmanager
async def serving(**options: Any) -> Any:
    """Run a server of a tiny model. Gives it when its model has answered."""
    server, ready = new_server(**options), asyncio.Event()
    server.when_ready = ready.set
    async with server.run(None):
        await asyncio.wait_for(ready.wait(), 60)
        assert server.status == "ok"
        yield server


async def show(session, *times):
    """Show a session frames. Returns what became of them so far."""
    frames = []
    for time in times:
        frames.append(session.new_frame(time=time))
        await session.push(frames[-1], random_frames(1)[0])
    await session.until(lambda: all(frame.fate is not None for frame in frames))
    return [frame.fate for frame in frames]


async def becomes_true(condition):
    """Wait for a condition, at most five seconds. Returns whether it has come."""
    end = clock.monotonic() + 5
    while not condition() and clock.monotonic() < end:
        await asyncio.sleep(0.01)
    return condition()


def test_a_saved_session_that_finds_the_memory_taken_waits_in_its_folder(tmp_path):
    """It has more text than it reserves. Another server, or this one later, may have room."""

    async def fill():
        async with serving(state_dir=tmp_path) as server:
            door = await server.saved.open(SILENT, session_id="door", instructions="")
            await show(door, 0.0)
            for _ in range(3):
                await door.ask("word " * 20, reply_now=True)
                await door.until(lambda: door.is_idle and not door.asked)

    async def find(max_streams):
        async with serving(state_dir=tmp_path, engine_options={"max_streams": max_streams}) as server:
            return (await server.saved.find("door")).num_received

    asyncio.run(fill())
    with pytest.raises(RequestError) as refused:
        asyncio.run(find(1))
    assert (refused.value.status, refused.value.code) == (503, "server_full")
    assert asyncio.run(find(2)) == 1


def test_a_session_does_not_expire_while_its_client_waits_for_other_restores(tmp_path):
    async def save():
        async with serving(state_dir=tmp_path) as server:
            await server.saved.open(SILENT, session_id="door", instructions="")

    async def find():
        async with serving(state_dir=tmp_path, resume_seconds=2.0) as server:
            folder = server.saved.folder
            async with server.saved._lock:  # another session is being restored
                os.utime(folder.peek("id door"), (clock.time() + 1.0,) * 2)
                finding = asyncio.ensure_future(server.saved.find("door"))
                await asyncio.sleep(3.0)
                folder.remove_expired()  # as servers do from time to time
            return (await finding).session_id

    asyncio.run(save())
    assert asyncio.run(find()) == "door"


def test_frames_that_come_at_once_get_what_was_said_at_each():
    async def show_all():
        async with serving() as server:
            options = SessionOptions(speak="every", every=0.5, no_repeat=0, min_silence=0)
            session = await server.sessions.open(options, instructions="")
            data, arrival = bytearray(picture(random_frames(1)[0])), asyncio.get_running_loop().time()
            return await asyncio.gather(*(_see(session, data, number / 2, arrival) for number in range(4)))

    seen = asyncio.run(show_all())
    assert [[event["time"] for event in each["said"]] for each in seen] == [[0.0], [0.5], [1.0], [1.5]]


def test_a_fault_that_ends_a_session_is_told_as_one_of_the_server():
    """Clients try again after 500, and not after 410, which they get when they have closed the session themselves."""

    def fail(*_):
        raise RuntimeError("The encoder broke.")

    async def ask(breaks):
        async with serving() as server:
            session = await server.sessions.open(SILENT, instructions="")
            hook = server.engine.model.model.vision_encoder.register_forward_pre_hook(fail) if breaks else None
            with pytest.raises(RequestError) as refused:
                if hook is None:
                    await session.close()
                await show(session, 0.0)
                # The frame has its fate by now.
                await session.until(lambda: False)
            if hook is not None:
                hook.remove()
            return refused.value.status, refused.value.code

    assert asyncio.run(ask(breaks=True)) == (500, "session_failed")
    assert asyncio.run(ask(breaks=False)) == (410, "session_over")


def test_a_reply_that_is_cancelled_at_its_end_does_not_cut_the_next_one():
    """All threads are busy, so the engine learns of it when the next reply has begun."""

    async def cancel():
        async with serving(max_output_tokens=30) as server:
            session, may_go = await server.sessions.open(SILENT, instructions=""), threading.Event()
            await show(session, 0.0)
            replies = [await session.ask("What is it?") for _ in range(2)]
            await session.until(lambda: session.reply is replies[0])
            for _ in range(server.engine.max_streams + 4):
                server.sessions._threads.submit(may_go.wait)
            cancelling = asyncio.ensure_future(session.cancel())
            await session.until(lambda: session.reply is replies[1])
            with server.engine._stepping:
                may_go.set()
                assert await cancelling is replies[0]
            await session.until(lambda: replies[1].is_over)
            return [reply.event.interrupted for reply in replies]

    assert asyncio.run(cancel()) == [False, False]


def test_a_chat_before_the_first_frame_ends_when_the_memory_for_text_is_full():
    async def chat(tokens, text):
        async with serving(engine_options={"max_text_tokens": tokens}, max_output_tokens=2) as server:
            session, done = await server.sessions.open(SILENT, instructions="Be brief."), []
            while len(done) < 40:
                try:
                    if text is not None:
                        await session.ask(text, reply_now=False)
                    done.append(await session.ask(None))
                    await session.until(lambda: done[-1].is_over)
                except RequestError as error:
                    return error.code, int(session.stream.session.cache.get_seq_length())
            return len(done), None

    assert asyncio.run(chat(1200, "Hi.")) == (40, None)
    for text in ("Hi.", None):
        code, length = asyncio.run(chat(160, text))
        assert code == "context_length_exceeded" and 140 < length < 160 + SPARE_TEXT + 12


def test_clients_are_told_when_the_model_speaks():
    async def told(**options):
        async with serving() as server:
            session = await server.sessions.open(SessionOptions())
            await session.update(SessionOptions(**options))
            described = Conversation(session, "m", server.audio).describe()["videollm_mod"]
            return described["speak"], described["every"]

    assert asyncio.run(told()) == ("learned", None)
    assert asyncio.run(told(every=2.0)) == ("every", 2.0)
    assert asyncio.run(told(unprompted=False)) == ("learned", None)


def test_times_of_a_clock_get_advice():
    async def show_late():
        async with serving() as server:
            session = await server.sessions.open(SILENT, instructions="")
            with pytest.raises(RequestError) as refused:
                session.new_frame(time=1764504000.0)
            return str(refused.value)

    assert "At most 1000000000 s: subtract the time of the first frame." in asyncio.run(show_late())


def test_more_frames_per_second_count_from_the_last_frame():
    async def change(before, after, *times):
        async with serving() as server:
            session = await server.sessions.open(SessionOptions(unprompted=False, fps=before), instructions="")
            fates = await show(session, 0.0)
            await session.update(SessionOptions(unprompted=False, fps=after))
            return fates + await show(session, *times)

    assert asyncio.run(change(0.01, 2.0, 0.25, 1.0, 1.25, 1.5)) == ["seen", "fps", "seen", "fps", "seen"]
    assert asyncio.run(change(2.0, 0.01, 1.0, 100.0)) == ["seen", "fps", "seen"]


@pytest.mark.parametrize(
    ("path", "query", "before", "now", "address"),
    [
        ("/v1/streaming/sessions/1/frame", "time=1", "1", "b.1", "/v1/streaming/sessions/b.1/frame?time=1"),
        ("/v1/streaming/sessions/v1", "", "v1", "b.v1", "/v1/streaming/sessions/b.v1"),
        ("/at/sessions/1/v1/streaming/sessions/1/ask", "", "1", "2", "/at/sessions/1/v1/streaming/sessions/2/ask"),
        (
            "/v1/realtime",
            "resume_token=a.t&last_event_id=a.t",
            "a.t",
            "b.t",
            "/v1/realtime?resume_token=b.t&last_event_id=a.t",
        ),
    ],
)
def test_only_the_name_changes_in_the_address_of_a_session_that_moved(path, query, before, now, address):
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
    scope |= {"server": ("localhost", 80), "scheme": "http", "root_path": ""}
    assert moved_response(Request(scope), SessionMovedError(before, now)).headers["Location"] == address


def test_an_id_that_is_no_name_is_refused_before_saved_sessions_are_looked_through(tmp_path):
    async def open_one():
        async with serving(state_dir=tmp_path) as server:
            place = server.state_folder.begin()
            server.state_folder.commit(place, "id door", clock.time() + 100)
            with pytest.raises(RequestError) as refused:
                await server.saved.open(SILENT, session_id="\ud800")
            return refused.value

    error = asyncio.run(open_one())
    assert (error.status, error.param) == (400, "id")


def test_a_session_that_is_watched_twice_ends_once(tmp_path):
    """A session that is restored is watched by who restores it, and by who looks for sessions that are due."""

    async def close():
        async with serving(state_dir=tmp_path, save_seconds=60.0) as server:
            door = await server.saved.open(SILENT, session_id="door", instructions="")
            assert server.saved._watch(door) is server.saved._watch(door)
            await server.saved.close(door)
            return door.over, list(server.sessions), server.saved._kept

    assert asyncio.run(close()) == ("closed", [], {})


def test_a_server_whose_sessions_cannot_be_saved_stops_its_engine(tmp_path, monkeypatch):
    async def fail(_):
        raise OSError("No space left on device")

    async def stop(server):
        async with server.run(None):
            assert server.engine.is_running

    monkeypatch.setattr(SavedSessions, "save_all", fail)
    server, released = new_server(state_dir=tmp_path), []
    monkeypatch.setattr(server.state_folder, "release", lambda: released.append(not server.engine.is_running))
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(stop(server))
    assert released == [True] and server.engine.on_step is None


def test_a_client_that_comes_first_does_not_take_the_seat_of_the_check():
    async def come_first():
        server, ready = new_server(engine_options={"max_streams": 1}), asyncio.Event()
        server.when_ready = ready.set
        async with server.run(None):
            with suppress(RequestError):
                await server.sessions.open(SILENT)
            await asyncio.wait_for(ready.wait(), 60)
            return server.status

    assert asyncio.run(come_first()) == "ok"


def test_a_check_that_gets_no_seat_says_why(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("the device is gone")

    async def start():
        server, ready = new_server(), asyncio.Event()
        server.when_ready = ready.set
        monkeypatch.setattr(server.engine, "open", refuse)
        async with server.run(None):
            await asyncio.wait_for(ready.wait(), 60)
            return server.status

    assert asyncio.run(start()) == "the model did not answer: the device is gone"


def test_a_session_that_waits_to_be_saved_is_on_its_way_until_then(tmp_path, monkeypatch):
    """The save of the one before it takes longer than other servers believe a server that has died."""
    monkeypatch.setattr(saved_sessions, "_MOST_SECONDS_AWAY", 4.0)

    async def stop():
        async with serving(state_dir=tmp_path) as server:
            folder, save, found = server.state_folder, server.saved._save, []
            for name in ("first", "second"):
                await show(await server.saved.open(SILENT, session_id=name, instructions=""), 0.0)

            async def save_slowly(session):
                if session.session_id == "first":
                    before = folder.peek("moved id second").stat().st_mtime
                    found.append(await becomes_true(lambda: folder.peek("moved id second").stat().st_mtime > before))
                await save(session)

            monkeypatch.setattr(server.saved, "_save", save_slowly)
            await server.saved.save_all()
            names = [
                folder.peek(f"{kind}id {name}") is not None for kind in ("", "moved ") for name in ("first", "second")
            ]
            return found, names

    assert asyncio.run(stop()) == ([True], [True, True, False, False])


@pytest.mark.parametrize(("has_frame", "most"), [(True, 31), (False, 30)])
def test_an_item_for_which_there_is_no_room_behind_a_recording_is_not_added(has_frame, most):
    """Before the first frame, a session has room for 32 questions: one is there, and the recording is another."""
    told = []

    def text(*texts):
        content = [{"type": "input_text", "text": text} for text in texts]
        item = {"type": "message", "role": "user", "content": content}
        return {"type": "conversation.item.create", "item": item}

    async def fill(transcriber):
        async with serving(transcriber=transcriber) as server:
            session = await server.sessions.open(SILENT, instructions="")
            conversation = Conversation(session, "m", server.audio)
            emit = conversation.emit
            conversation.emit = lambda kind, **fields: (told.append((kind, fields)), emit(kind, **fields))
            if has_frame:
                await show(session, 0.0)
            audio = base64.b64encode(bytes(9600)).decode()
            events = [{"type": "input_audio_buffer.append", "audio": audio}, {"type": "input_audio_buffer.commit"}]
            for event in [text("a"), *events, *[text("a")] * (most - 1), text("b", "c"), text("d"), text("e")]:
                await handle_event(conversation, json.dumps(event))
            await session.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the recording and never answers
        asyncio.run(fill(Transcriber(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "ear")))
    added = [fields["item"]["content"] for kind, fields in told if kind == "conversation.item.added"]
    errors = [fields["error"]["code"] for kind, fields in told if kind == "error"][:2]
    texts = [part.get("text") for content in added for part in content]
    assert texts == ["a", None, *["a"] * (most - 1), "d"]
    assert errors == ["conversation_already_has_active_response"] * 2
