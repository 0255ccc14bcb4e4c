# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Speech at `/v1/realtime`: the `openai` client, and endpoints for transcripts and speech over loopback."""

import asyncio
import base64
import re

import pytest
from engines import ROOT, embedded
from programs import run_command
from serving_server import connect, frame_event, running, said, send, text_event, until, update_event
from speech_server import speech_of, speech_server
from tiny import tiny_model, tiny_processor

from videollm_mod.commands.serve import new_app
from videollm_mod.serving.hearing import Hearing
from videollm_mod.serving.limits import Limits, RequestError
from videollm_mod.serving.session_state import SessionBusyError, pack_session
from videollm_mod.serving.speech_endpoints import Speaker, Transcriber
from videollm_mod.serving.telling import Reply


ENGINE = {"max_streams": 2, "max_frames": 24, "max_text_tokens": 256, "page_size": 32}
QUESTION = "How many things do you see?"
RECORDING = bytes(range(256)) * 30  # 160 ms
COMMIT = {"type": "input_audio_buffer.commit"}
HINTS = {"transcription": {"prompt": "Names: Anna"}}
KIND = "conversation.item.input_audio_transcription"


@pytest.fixture(scope="module")
def loopback():
    """The endpoints, and the address of a server that uses them."""
    model, processor, _ = embedded()
    with speech_server() as endpoints:
        options = {
            "transcriber": Transcriber(endpoints.url, "ear", key="secret"),
            "speaker": Speaker(endpoints.url + "/audio/speech", "mouth", "alto"),
        }
        options |= {"engine_options": ENGINE, "max_audio_seconds": 1.0, "max_speech_seconds": 1.0}
        with running(model, processor, **options) as (address, server):
            endpoints.address, endpoints.server = address, server
            yield endpoints


@pytest.fixture
def endpoints(loopback):
    loopback.reset()
    return loopback


def audio_event(audio):
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(audio).decode()}


def session_event(**session):
    return {"type": "session.update", "session": {"type": "realtime", **session}}


def heard(events, response_id=None):
    """Return the audio of the responses among events."""
    deltas = [e for e in events if e.type == "response.output_audio.delta" and response_id in (None, e.response_id)]
    return b"".join(base64.b64decode(event.delta) for event in deltas)


def spoken(text):
    """Return what the endpoint makes of a reply."""
    return b"".join(map(speech_of, re.split(r"(?<=[.!?])\s+", text)))


def frames(count, begin=0):
    return [frame_event(embedded()[2][number], number / 2) for number in range(begin, begin + count)]


def errors(events):
    return [(event.error.code, event.error.param) for event in events if event.type == "error"]


# ------------------------------------------------------------------------------------------------------------- hearing


def test_a_spoken_question_is_one_in_writing(endpoints):
    """A response that is asked for at once waits for the transcript, and frames do not."""
    endpoints.transcripts = [f" {QUESTION}\n"]
    endpoints.may_answer.clear()

    async def ask(connection, *question):
        await send(connection, update_event(unprompted=False), *frames(6))
        await until(connection, "conversation.item.done", 6)
        await send(connection, *question, {"type": "response.create"})
        found = []
        if not endpoints.may_answer.is_set():
            await send(connection, *frames(1, 6))
            found = await until(connection, "conversation.item.done", 2)  # of the recording, and the frame
            endpoints.may_answer.set()
        found += await until(connection, "response.done")
        await connection.close()
        return found

    async def both():
        hints = {"input": {"transcription": {"model": "other", "language": "en"}, "turn_detection": None}}
        parts = [audio_event(RECORDING[:1001]), audio_event(RECORDING[1001:])]
        connection = await connect(endpoints.address)
        await send(connection, session_event(audio=hints))
        [*_, updated] = await until(connection, "session.updated")
        by_voice = await ask(
            connection, audio_event(b"0" * 9000), {"type": "input_audio_buffer.clear"}, *parts, COMMIT
        )
        in_writing = await ask(await connect(endpoints.address), *frames(1, 6), text_event(QUESTION))
        return updated, by_voice, in_writing

    updated, by_voice, in_writing = asyncio.run(both())
    assert updated.session.audio.input.transcription.model == "ear"
    assert updated.session.videollm_mod["ignored"] == ["audio.input.transcription.model"]
    assert said(by_voice) == said(in_writing) and said(by_voice)[0][0] == 3.0
    fields, form, samples = endpoints.heard[0]
    assert fields == {"model": "ear", "response_format": "json", "language": "en"}
    assert form == (1, 2, 24_000) and samples == RECORDING and endpoints.keys == ["Bearer secret"]
    kinds = [event.type for event in by_voice]
    assert kinds[:4] == [
        "input_audio_buffer.cleared",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    completed = next(event for event in by_voice if event.type == f"{KIND}.completed")
    assert completed.transcript == QUESTION and completed.usage.seconds == 0.16
    assert by_voice[1].item_id == by_voice[2].item.id == completed.item_id
    assert kinds.index("response.created") > kinds.index(f"{KIND}.completed")


def test_a_recording_without_transcript(endpoints):
    """It fails alone. What was asked for after it fails too, as it would have no question, and can be withdrawn."""
    endpoints.status = 500

    async def fail():
        connection = await connect(endpoints.address)
        response = {"type": "response.create", "event_id": "mine"}
        await send(connection, update_event(unprompted=False), audio_event(RECORDING), COMMIT, response)
        failed = await until(connection, "error")
        endpoints.status = 200
        endpoints.may_answer.clear()
        metadata = {"type": "response.create", "response": {"metadata": {"name": "second"}}}
        await send(connection, audio_event(RECORDING), COMMIT, metadata, {"type": "response.cancel"})
        withdrawn = await until(connection, "response.done")
        endpoints.may_answer.set()
        await until(connection, f"{KIND}.completed")  # of silence
        await connection.close()
        return failed, withdrawn[-1].response

    failed, withdrawn = asyncio.run(fail())
    first = next(event for event in failed if event.type == f"{KIND}.failed")
    assert first.error.code == "transcription_failed" and first.error.message.endswith("answered with status 500.")
    assert failed[-1].error.code == "transcription_failed" and failed[-1].error.event_id == "mine"
    assert withdrawn.status == "cancelled" and withdrawn.metadata == {"name": "second"}
    assert endpoints.server.metrics.speech_failures.labels("transcription_failed")._value.get() == 1


def test_a_request_is_withdrawn_until_it_takes_effect():
    """Also when its recording has a transcript, and another event takes effect first."""
    asked, reply = [], Reply(is_asked=True)

    async def nothing():
        pass

    async def ask():
        asked.append(True)

    async def withdraw():
        lock = asyncio.Lock()
        hearing = Hearing(None, Limits(), lock, None)
        hearing.record(RECORDING, nothing, None)
        await hearing.in_order(ask, None, reply)
        async with lock:
            await asyncio.sleep(0.01)
            withdrawn = hearing.withdraw()
        await asyncio.sleep(0.01)
        return withdrawn, hearing.is_busy

    assert asyncio.run(withdraw()) == (reply, False) and not asked


def test_endpoints_have_a_time_limit(endpoints):
    """The time in which nobody waits for the endpoint does not count."""
    endpoints.may_go_on.clear()
    audio = []

    async def hear():
        async with Transcriber(endpoints.url, "ear") as transcriber:
            await transcriber.transcribe(RECORDING, seconds=0.2)

    async def listen():
        async with Speaker(endpoints.url, "mouth", "alto") as speaker:
            async for chunk in speaker.speak("One.", seconds=0.5):
                audio.append(chunk)
                await asyncio.sleep(0 if endpoints.may_go_on.is_set() else 0.7)
                endpoints.may_go_on.set()

    with pytest.raises(RequestError, match="The transcriber took longer than 0.2 s"):
        asyncio.run(hear())
    asyncio.run(listen())
    assert b"".join(audio) == speech_of("One.")


def pcm(rate=24_000, kind="audio/pcm"):
    return {"format": {"type": kind, "rate": rate}}


WRONG = [
    (COMMIT, "input_audio_buffer_commit_empty", None),
    (audio_event(bytes(50_000)), "input_audio_buffer_full", "audio"),
    ({"type": "input_audio_buffer.append", "audio": "?"}, "invalid_value", "audio"),
    ({"type": "input_audio_buffer.append"}, "invalid_type", "audio"),
    (session_event(audio={"input": pcm(16_000)}), "invalid_value", "session.audio.input.format"),
    (session_event(audio={"output": pcm(kind="audio/pcmu")}), "invalid_value", "session.audio.output.format"),
    (session_event(audio={"microphone": {}}), "unknown_parameter", "session.audio.microphone"),
    (session_event(output_modalities=["audio", "text"]), "invalid_value", "session.output_modalities"),
    (
        session_event(audio={"input": {"transcription": {"prompt": "\ud800"}}}),
        "invalid_value",
        "session.audio.input.transcription.prompt",
    ),
    (
        session_event(instructions="Hello.", audio={"input": {"turn_detection": {"type": "server_vad"}}}),
        "unsupported_value",
        "session.audio.input.turn_detection",
    ),
]


def test_wrong_audio_gets_an_error(endpoints):
    async def be_wrong():
        connection = await connect(endpoints.address)
        await send(connection, *(event for event, _, _ in WRONG))
        found = await until(connection, "error", len(WRONG))
        await connection.close()
        return found

    found = asyncio.run(be_wrong())
    assert errors(found) == [(code, param) for _, code, param in WRONG]
    assert "only manual commits" in found[-1].error.message
    [updated] = [event for event in found if event.type == "session.updated"]
    assert updated.session.instructions == "Hello."  # turn detection is all that was refused


# ------------------------------------------------------------------------------------------------------------ speaking


def test_speech_that_its_client_has_stopped_is_truncated(endpoints):
    """Pipecat sends this at each interruption, and stops reading at an error. The model remembers all words."""

    def truncate(**fields):
        return {"type": "conversation.item.truncate", "content_index": 0, "audio_end_ms": 20, **fields}

    async def interrupt():
        connection = await connect(endpoints.address)
        await send(connection, session_event(output_modalities=["audio"], videollm_mod={"unprompted": False}))
        await send(connection, frames(1)[0] | {"item": frames(1)[0]["item"] | {"id": "frame"}}, ASK)
        found = await until(connection, "response.done")
        item_id = found[-1].response.output[0].id
        await send(connection, truncate(item_id=item_id), truncate(item_id="frame"), truncate(item_id="none"))
        await send(
            connection, truncate(item_id=item_id, audio_end_ms=-1), truncate(item_id=item_id, content_index="0")
        )
        found = await until(connection, "error", 4)
        await connection.close()
        return item_id, found

    item_id, found = asyncio.run(interrupt())
    [event] = [event for event in found if event.type == "conversation.item.truncated"]
    assert (event.item_id, event.content_index, event.audio_end_ms) == (item_id, 0, 20)
    assert event.videollm_mod == {"remembered": True}
    unknown = ("item_truncate_invalid_item_id", "item_id")
    assert errors(found) == [unknown, unknown, ("invalid_type", "audio_end_ms"), ("invalid_type", "content_index")]


def test_replies_are_spoken(endpoints):
    """Each reply is complete with its speech before the next one begins."""

    async def watch():
        connection = await connect(endpoints.address)
        await send(connection, session_event(output_modalities=["audio"], audio={"output": {"voice": "marin"}}))
        updated = (await until(connection, "session.updated"))[-1]
        await send(connection, *frames(len(embedded()[2])))
        found = await until(connection, "response.done", 2)
        await connection.close()
        return updated.session, found

    session, found = asyncio.run(watch())
    assert session.output_modalities == ["audio"] and session.audio.output.voice == "alto"
    assert session.videollm_mod["ignored"] == ["audio.output.voice"]
    replies = [event for event in found if event.type.startswith("response.")]
    first = [event for event in replies if getattr(event, "response_id", None) == replies[0].response.id]
    assert [event.type for event in replies if event.type in ("response.created", "response.done")] == [
        "response.created",
        "response.done",
    ] * 2
    response = next(event.response for event in replies if event.type == "response.done")
    [part] = response.output[0].content
    assert response.output_modalities == ["audio"] and part.type == "output_audio"
    assert heard(first) == spoken(part.transcript)
    deltas = [event.delta for event in first if event.type == "response.output_audio_transcript.delta"]
    done = next(event for event in first if event.type == "response.output_audio_transcript.done")
    assert "".join(deltas) == done.transcript == part.transcript and part.transcript
    assert [event.type for event in first if not event.type.endswith("delta")] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_audio_transcript.done",
        "response.output_audio.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    asked = endpoints.asked[0]
    assert asked["model"] == "mouth" and asked["voice"] == "alto" and asked["response_format"] == "pcm"
    assert endpoints.keys[0] is None


ASK = {"type": "response.create", "response": {"output_modalities": ["audio"], "instructions": QUESTION}}


async def ask_aloud(address):
    """Return a connection, of which a response in a session with text is to be spoken."""
    connection = await connect(address)
    await send(connection, update_event(unprompted=False), *frames(2))
    await until(connection, "conversation.item.done", 2)
    await send(connection, ASK)
    return connection


@pytest.mark.parametrize("fault", ["status", "wav", "broken", "long"])
def test_the_text_arrives_when_speech_fails(endpoints, fault):
    endpoints.status = 503 if fault == "status" else 200
    endpoints.head = {"wav": b"RIFF", "long": bytes(48_000)}.get(fault, b"")
    endpoints.breaks = fault == "broken"

    async def listen():
        connection = await ask_aloud(endpoints.address)
        found = await until(connection, "response.done")
        await connection.close()
        return found

    found = asyncio.run(listen())
    [error] = [event for event in found if event.type == "error"]
    done = found[-1].response
    assert error.error.code == "speech_failed" and error.videollm_mod == {"response_id": done.id}
    assert done.status == "completed" and done.output[0].content[0].transcript
    assert len(heard(found)) == {"broken": 9600, "long": 48_000}.get(fault, 0)


def test_cancelling_a_response_stops_its_speech(endpoints):
    """Neither the text nor frames wait for slow speech."""
    endpoints.may_go_on.clear()

    async def cancel():
        connection = await ask_aloud(endpoints.address)
        found = await until(connection, "response.output_audio_transcript.done")
        if not heard(found):
            found += await until(connection, "response.output_audio.delta")
        await send(connection, *frames(1, 2))
        found += await until(connection, "conversation.item.done")
        await send(connection, {"type": "response.cancel"})
        found += await until(connection, "response.done")
        endpoints.may_go_on.set()
        # A later response is spoken, and nothing more comes of the first.
        await send(connection, ASK)
        found += await until(connection, "response.done")
        await connection.close()
        return found

    found = asyncio.run(cancel())
    first, second = [event.response for event in found if event.type == "response.done"]
    assert first.status == "cancelled" and first.status_details.reason == "client_cancelled"
    assert len(heard(found, first.id)) == 9600 and second.status == "completed"
    assert heard(found, second.id) == spoken(second.output[0].content[0].transcript)


def test_replies_do_not_pile_up_behind_slow_speech(endpoints):
    """There is one response at a time, and those that would come late are not spoken."""
    endpoints.may_go_on.clear()

    async def watch():
        connection = await connect(endpoints.address)
        every = {"speak": "every", "every": 0.5, "no_repeat": 0, "max_words": 3}
        await send(connection, session_event(output_modalities=["audio"], videollm_mod=every), *frames(6))
        found = await until(connection, "conversation.item.done", 6)
        [session] = [session for session in endpoints.server.sessions if session.conversation is not None]
        while sum(kind == "end" for kind, _ in session.conversation._held) < 5:
            await asyncio.sleep(0.01)
        endpoints.may_go_on.set()
        found += await until(connection, "response.done", 6)
        await connection.close()
        return found

    found = asyncio.run(watch())
    bounds = [event.type for event in found if event.type in ("response.created", "response.done")]
    assert bounds == ["response.created", "response.done"] * 6
    done = [event.response for event in found if event.type == "response.done"]
    texts = [response.output[0].content[0].transcript for response in done]
    late = [event.videollm_mod["response_id"] for event in found if event.type == "error"]
    assert errors(found) == [("speech_behind", None)] * 3
    assert late == [response.id for response in done[1:4]] and all(texts)
    expected = [spoken(text) for text in texts]
    expected[1:4] = [b""] * 3
    assert [heard(found, response.id) for response in done] == expected


@pytest.mark.parametrize("has_first", [False, True])
def test_speech_waits_for_a_client_that_lost_its_connection(endpoints, has_first):
    """No more than one piece of audio waits on the server, and none is lost. The client may have it already."""

    async def lose():
        connection = await connect(endpoints.address)
        created = await connection.recv()
        await send(connection, update_event(unprompted=False), *frames(2))
        found = await until(connection, "conversation.item.done", 2)
        endpoints.may_answer.clear()
        await send(connection, ASK)
        found = await until(connection, "response.output_audio_transcript.done")
        connection._connection.transport.abort()
        token = created.session.videollm_mod["resume_token"]
        conversation = endpoints.server.sessions.find_token(token).conversation
        while conversation.connection is not None:
            await asyncio.sleep(0.01)
        before = conversation.number
        endpoints.may_answer.set()
        while conversation.number == before:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        waiting = conversation.number - before
        last = f"event_{conversation.number}" if has_first else found[-1].event_id
        again = await connect(endpoints.address, extra_query={"resume_token": token, "last_event_id": last})
        rest = await until(again, "response.done")
        await again.close()
        return waiting, rest

    waiting, rest = asyncio.run(lose())
    assert waiting == 1
    assert heard(rest) == spoken(rest[-1].response.output[0].content[0].transcript)[9600 * has_first :]


def test_a_saved_session_goes_on_to_speak(endpoints, tmp_path):
    """A recording that has no transcript when the server stops is not lost in silence, and the buffer is kept."""
    tiny = {"max_streams": 1, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
    options = {"engine_options": tiny, "state_dir": tmp_path, "max_output_tokens": 4}
    speaks = {"transcriber": Transcriber(endpoints.url, "ear"), "speaker": Speaker(endpoints.url, "mouth", "alto")}
    endpoints.may_answer.clear()

    async def begin(address):
        connection = await connect(address)
        created = await connection.recv()
        await send(connection, session_event(output_modalities=["audio"], audio={"input": HINTS}))
        await send(connection, audio_event(RECORDING), COMMIT)
        found = await until(connection, "conversation.item.done")
        await send(connection, audio_event(RECORDING[:5000]), {"type": "session.heartbeat"})
        await until(connection, "session.heartbeat_ack")
        return created.session.videollm_mod["resume_token"], found[-1].event_id

    async def go_on(address, token, last):
        connection = await connect(address, extra_query={"resume_token": token, "last_event_id": last})
        found = await until(connection, f"{KIND}.failed")
        endpoints.may_answer.set()
        await send(connection, audio_event(RECORDING[5000:]), COMMIT)
        await until(connection, f"{KIND}.completed")
        await connection.close()
        return found

    with running(tiny_model(), tiny_processor(), **options, **speaks) as (address, _):
        token, last = asyncio.run(begin(address))
    with running(tiny_model(), tiny_processor(), **options, **speaks) as (address, _):
        created, *_, failed = asyncio.run(go_on(address, token, last))
    assert created.session.output_modalities == ["audio"]
    assert created.session.audio.input.transcription.prompt == "Names: Anna"
    assert failed.error.code == "session_over" and endpoints.heard[-1][2] == RECORDING


def test_nothing_is_saved_while_something_is_heard_or_spoken(endpoints):
    """A save would have half of it. New audio of the same length is something to save."""

    async def use():
        connection = await connect(endpoints.address)
        await send(connection, update_event(unprompted=False), *frames(2), audio_event(RECORDING))
        await until(connection, "conversation.item.done", 2)
        (session,) = (found for found in endpoints.server.sessions if found.conversation is not None)

        async def pack():
            packing = asyncio.run_coroutine_threadsafe(pack_session(session), session._loop)
            return (await asyncio.wrap_future(packing))[0]

        before = await pack()
        await send(connection, {"type": "input_audio_buffer.clear"}, audio_event(RECORDING[::-1]))
        await send(connection, {"type": "session.heartbeat"})
        await until(connection, "session.heartbeat_ack")
        assert await pack() != before
        for event, first, last in (
            (COMMIT, "conversation.item.done", f"{KIND}.completed"),
            (ASK, "response.output_audio_transcript.done", "response.done"),
        ):
            endpoints.may_answer.clear()
            await send(connection, event)
            await until(connection, first)
            with pytest.raises(SessionBusyError):
                await pack()
            endpoints.may_answer.set()
            await until(connection, last)
            while session.conversation.is_busy:
                await asyncio.sleep(0.01)
            await pack()
        await connection.close()

    asyncio.run(use())


# ------------------------------------------------------------------------------------------------------ no endpoints


def test_a_server_without_endpoints_names_the_options():
    model, processor, _ = embedded()

    async def ask(address):
        connection = await connect(address)
        # LiveKit asks for both by default.
        wants = {"output_modalities": ["audio"], "audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}
        wants_audio = session_event(**wants, videollm_mod={"unprompted": False})
        await send(connection, audio_event(RECORDING), COMMIT, wants_audio, *frames(1), ASK)
        found = await until(connection, "error", 2)
        found += await until(connection, "response.done")
        await connection.close()
        return found

    with running(model, processor, engine_options=ENGINE | {"max_streams": 1}) as (address, _):
        found = asyncio.run(ask(address))
    messages = [event.error.message for event in found if event.type == "error"]
    assert ["--transcriber" in message for message in messages] == [True, True]
    # A reply comes as text then, which is no fault of its own.
    told = [event for event in found if event.type in ("session.updated", "response.created")]
    ignored = [getattr(event, "session", event).videollm_mod["ignored"] for event in told]
    assert ignored == [["audio.input.turn_detection", "output_modalities"], ["output_modalities"]]
    assert found[-1].response.output_modalities == ["text"] and said(found)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--speech", "http://localhost:9/v1"], "--speech-voice belong together"),
        (["--transcriber-model", "ear"], "needs --transcriber"),
        (["--transcriber", "localhost:9"], "such as http://localhost:9000/v1"),
        (["--transcriber", "http://user:word@localhost/v1"], "environment variables"),
    ],
)
def test_wrong_options_are_reported_before_the_model_is_loaded(options, wrong):
    done = run_command("serve", "--model", "does-not-exist", *options)
    assert done.returncode == 1 and wrong in done.stderr and "user:word" not in done.stderr


def test_keys_of_endpoints_come_from_variables(monkeypatch):
    monkeypatch.setenv("VIDEOLLM_MOD_SPEECH_KEY", "secret")
    memory = {"max_streams": 1, "max_frames": 4, "max_text_tokens": 64}
    stored = {"weights": None, "cache_dtype": None, "frame_size": None}
    speaks = {"speech": "http://localhost:9/v1/", "speech_model": "mouth", "speech_voice": "alto"}
    app = new_app(str(ROOT), None, name=None, **memory, **stored, transcriber="http://localhost:9/v1", **speaks)
    audio = app.state.server.audio
    assert audio.transcriber.url == "http://localhost:9/v1/audio/transcriptions"
    assert audio.transcriber.model == "whisper-1" and audio.transcriber.headers == {}
    assert audio.speaker.url == "http://localhost:9/v1/audio/speech" and audio.speaker.voice == "alto"
    assert audio.speaker.headers == {"Authorization": "Bearer secret"}
