# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`/v1/realtime` over loopback: the `openai` client, and events as Pipecat and LiveKit send them."""

import asyncio
import base64
import json
import socket
import struct
import threading
import time as clock
from types import SimpleNamespace
from typing import Annotated, get_args

import httpx
import pytest
from engines import embedded
from openai.types.realtime import RealtimeServerEvent
from pydantic import BaseModel, Field, TypeAdapter
from serving_server import (
    ROOMY,
    connect,
    data_uri,
    frame_event,
    narration,
    running,
    said,
    send,
    text_event,
    until,
    update_event,
)
from tiny import random_frames, tiny_model, tiny_processor
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

from videollm_mod.serving.realtime import Connection
from videollm_mod.serving.realtime_events import response_object
from videollm_mod.serving.telling import Reply


@pytest.fixture(scope="module")
def server():
    model, processor, _ = embedded()
    with running(model, processor, engine_options=ROOMY, max_unsent=100) as (address, server):
        server.address = address
        yield server


TINY = {"max_streams": 2, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}


@pytest.fixture(scope="module")
def small():
    """A server of a tiny model, whose words mean nothing."""
    limits = {"max_frame_pixels": 4096, "max_output_tokens": 8}
    with running(tiny_model(), tiny_processor(), engine_options=TINY, **limits) as (address, server):
        server.address = address
        yield server


def frames():
    return embedded()[2]


# ------------------------------------------------------------------------------------------------------------ watching


def test_the_client_hears_what_a_session_says(server):
    async def watch():
        connection = await connect(server.address)
        created = await connection.recv()
        assert (
            created.type == "session.created"
            and created.session.instructions == "Please narrate the video in real time."
        )
        for number, frame in enumerate(frames()):
            await send(connection, frame_event(frame, number / 2, id=f"frame_{number}"))
        found = await until(connection, "response.done", len(narration()))
        await connection.close()
        return found

    found = asyncio.run(watch())
    assert said(found) == narration()
    assert all(event.videollm_mod["unprompted"] for event in found if event.type == "response.done")
    first = [event for event in found if getattr(event, "response_id", None) == found_response(found).id]
    kinds = [event.type for event in first if event.type != "response.output_text.delta"]
    assert kinds == [
        f"response.{kind}"
        for kind in (
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
        )
    ]
    deltas = [event.delta for event in first if event.type == "response.output_text.delta"]
    assert "".join(deltas) == narration()[0][1] and len(deltas) > 2
    usage = found_response(found).usage
    assert usage.output_tokens == 8 and usage.input_token_details.image_tokens == 2 * 64
    seen = [event for event in found if event.type == "conversation.item.done" and event.item.role == "user"]
    assert [event.item.id for event in seen[:8]] == [f"frame_{number}" for number in range(8)]
    about = seen[1].videollm_mod
    assert about["fate"] == "seen" and about["index"] == 1 and about["lag"] > 0 and about["interval_probability"] < 0.5
    assert len(about["kept_patches"]) == 64


def found_response(events):
    return next(event.response for event in events if event.type == "response.done")


def test_a_question_waits_for_response_create(server):
    """The answer is that of a session which is asked the same."""
    model, processor, _ = embedded()
    session = model.stream(processor, speak=lambda _: False)
    session.hear("Please narrate the video in real time.", reply_now=False)
    session.push(frames()[:6], time=[number / 2 for number in range(6)])
    expected = session.ask("How many things do you see?")[-1].text

    async def ask():
        connection = await connect(server.address)
        await send(connection, update_event(unprompted=False))
        for number, frame in enumerate(frames()[:6]):
            await send(connection, frame_event(frame, number / 2))
        await send(connection, text_event("How many things do you see?"))
        seen = await until(connection, "conversation.item.done", 7)
        asked = {"metadata": {"client_event_id": "mine"}, "tools": [], "max_output_tokens": 9}
        await send(connection, {"type": "response.create", "response": asked})
        answered = await until(connection, "response.done")
        await connection.close()
        return seen, answered

    seen, answered = asyncio.run(ask())
    assert not [event for event in seen if event.type.startswith("response.")]
    assert said(answered) == [(2.5, expected)]
    created = next(event for event in answered if event.type == "response.created")
    assert created.response.metadata == {"client_event_id": "mine"} and not created.videollm_mod["unprompted"]
    assert created.videollm_mod["ignored"] == ["max_output_tokens", "tools"]
    assert "ignored" not in answered[-1].videollm_mod


def test_text_alone_is_answered_as_in_a_chat(server):
    """Without a frame nothing is waited for. Later frames are seen as usual."""
    chat = {"messages": [{"role": "user", "content": "Hello."}], "model": "videollm-mod"}
    answer = httpx.post(f"http://{server.address}/v1/chat/completions", json=chat, timeout=60).json()

    async def talk():
        connection = await connect(server.address)
        await send(connection, {"type": "session.update", "session": {"instructions": ""}})
        await send(connection, update_event(unprompted=False))
        await send(connection, text_event("Hello."), {"type": "response.create"})
        [*_, alone] = await until(connection, "response.done")
        await send(connection, frame_event(frames()[0], 0.0), text_event("How many things do you see?"))
        await until(connection, "conversation.item.done", 2)
        await send(connection, {"type": "response.create"})
        [*_, seen] = await until(connection, "response.done")
        await connection.close()
        return alone, seen

    alone, seen = asyncio.run(talk())
    assert alone.response.status == seen.response.status == "completed"
    assert alone.response.output[0].content[0].text == answer["choices"][0]["message"]["content"]
    assert alone.response.usage.input_token_details.image_tokens == 0
    assert seen.response.usage.input_token_details.image_tokens == 64


def test_instructions_are_not_unsaid(server):
    """Before the first frame they change. The model remembers those that it has heard."""

    async def change():
        connection, told = await connect(server.address), []
        for instructions in ("Look.", "Look."):
            await send(connection, {"type": "session.update", "session": {"instructions": instructions}})
            told += (await until(connection, "session.updated"))[-1:]
        await send(connection, frame_event(frames()[0], 0.0))
        await until(connection, "conversation.item.done")
        for instructions in ("", "  ", "Look.", "Listen."):
            await send(connection, {"type": "session.update", "session": {"instructions": instructions}})
            told += (await until(connection, "session.updated"))[-1:]
        await connection.close()
        return [event.session for event in told]

    told = asyncio.run(change())
    assert [session.videollm_mod.get("instructions_entered") for session in told] == [
        *["at the start"] * 2,
        *[None] * 3,
        "as a turn",
    ]
    assert [session.instructions for session in told] == [*["Look."] * 5, "Listen."]
    assert [session.videollm_mod.get("ignored", []) for session in told] == [
        *[[]] * 2,
        *[["instructions"]] * 2,
        *[[]] * 2,
    ]


def test_an_item_comes_last(small):
    """A stream cannot insert anything before what the model has seen. An unknown place is refused in `WRONG`."""
    wanted = [("root", None), ("a", "a"), (None, "b"), ("root", "c"), ("a", "d")]

    async def add():
        connection, found = await connect(small.address), []
        for name, (place, _) in zip("abcde", wanted, strict=True):
            await send(connection, text_event("Look.", id=name) | {"previous_item_id": place})
            found += (await until(connection, "conversation.item.added"))[-1:]
            await until(connection, "conversation.item.done")
        await connection.close()
        return found

    found = asyncio.run(add())
    assert [event.previous_item_id for event in found] == [previous for _, previous in wanted]
    ignored = [getattr(event, "videollm_mod", {}).get("ignored") for event in found]
    assert ignored == [None, None, None, ["previous_item_id"], ["previous_item_id"]]


def test_another_model_is_not_found(small):
    with pytest.raises(Exception, match="404"):
        asyncio.run(connect(small.address, model="other"))


def test_settings_change(server):
    async def change():
        connection = await connect(server.address)
        await send(connection, update_event(max_frames=8, fps=1.0))
        [_, first] = await until(connection, "session.updated")
        for time in (0.0, 0.5, 1.0):
            await send(connection, frame_event(frames()[0], time))
        found = await until(connection, "conversation.item.done", 3)
        await send(connection, {"type": "session.update", "session": {"instructions": "What is this?", "tools": []}})
        turn = (await until(connection, "session.updated"))[-1]
        await send(connection, update_event(max_frames=4))
        refused = (await until(connection, "error"))[-1]
        await send(connection, update_event(every=1.0, speak="every", max_words=3, no_repeat=0))
        speaks = (await until(connection, "session.updated"))[-1]
        await send(connection, frame_event(frames()[1], 2.0), frame_event(frames()[2], 3.0))
        replies = said(await until(connection, "response.done", 2))
        memory = server.sessions.find(turn.session.id).stream.session._memory
        replaced = [piece.is_replaced for piece in memory.pieces if not piece.is_frame]
        await connection.close()
        return first, found, turn, refused, speaks, replies, replaced

    first, found, turn, refused, speaks, replies, replaced = asyncio.run(change())
    assert first.session.videollm_mod["max_frames"] == 8 and first.session.videollm_mod["speak"] == "learned"
    fates = {event.videollm_mod["time"]: event.videollm_mod["fate"] for event in found if event.type.endswith("done")}
    assert fates == {0.0: "seen", 0.5: "fps", 1.0: "seen"}
    assert turn.session.instructions == "What is this?"
    assert turn.session.videollm_mod["instructions_entered"] == "as a turn"
    assert replaced[:2] == [False, True] and not any(replaced[2:])  # the system prompt, and the first instructions
    assert turn.session.videollm_mod["ignored"] == ["tools"]
    assert refused.error.code == "session_has_begun"
    assert speaks.session.videollm_mod["speak"] == "every"
    assert [time for time, _ in replies] == [2.0, 3.0] and all(len(text.split()) <= 3 for _, text in replies)


def test_a_response_can_be_cancelled(server):
    async def cancel():
        connection = await connect(server.address)
        await send(connection, {"type": "response.cancel", "event_id": "early"})
        created, *_, none = await until(connection, "error")
        server.sessions.find(created.session.id).stream.pause()  # the request waits
        await send(
            connection, update_event(unprompted=False), {"type": "response.create"}, {"type": "response.cancel"}
        )
        events = await until(connection, "response.done")
        await connection.close()
        return none, next(event for event in events if event.type == "response.created"), events[-1]

    none, created, withdrawn = asyncio.run(cancel())
    assert (created.response.status, created.response.status_details) == ("in_progress", None)
    assert (none.error.code, none.error.event_id) == ("response_cancel_not_active", "early")
    assert none.error.message.startswith("Cancellation failed")
    assert withdrawn.response.status == "cancelled"
    assert withdrawn.response.status_details.reason == "client_cancelled"


def test_a_response_can_be_cancelled_as_soon_as_it_is_asked_for(small):
    """The engine takes the question at once, and the reply has not begun when the client cancels it."""

    async def cancel():
        connection, events = await connect(small.address), []
        await send(connection, update_event(unprompted=False), frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        for _ in range(5):
            await send(connection, text_event("What is it?"), {"type": "response.create"}, {"type": "response.cancel"})
            events += await until(connection, "response.done")
        await connection.close()
        return events

    events = asyncio.run(cancel())
    assert not [event.error.message for event in events if event.type == "error"]
    done = [event.response for event in events if event.type == "response.done"]
    assert [response.status for response in done] == ["cancelled"] * 5
    assert {item.status for response in done for item in response.output} == {"incomplete"}


def test_cancelling_ends_the_engines_work(small):
    """The tiny model never ends a reply, so only the interruption does."""

    async def cancel():
        connection = await connect(small.address)
        await send(connection, update_event(unprompted=False), frame_event(random_frames(1)[0], 0.0))
        await until(connection, "conversation.item.done")
        await send(connection, {"type": "response.create"}, {"type": "response.create"})
        await until(connection, "response.created")
        await send(connection, {"type": "response.cancel"})
        done = [event for event in await until(connection, "response.done", 2) if event.type == "response.done"]
        await connection.close()
        return done

    statuses = [event.response.status for event in asyncio.run(cancel())]
    assert "cancelled" in statuses and set(statuses) <= {"cancelled", "incomplete"}


# ------------------------------------------------------------------------------------------------------------ mistakes

WRONG = [
    ("{", "invalid_json", None),
    ('["session.update"]', "missing_required_parameter", "type"),
    ({"type": "nonsense"}, "invalid_value", "type"),
    ({"type": "session.update"}, "invalid_type", "session"),
    ({"type": "session.update", "session": {"colour": 1}}, "unknown_parameter", "session.colour"),
    ({"type": "session.update", "session": {"model": "other"}}, "model_not_found", "session.model"),
    ({"type": "session.update", "session": {"model": 5}}, "invalid_type", "session.model"),
    ({"type": "session.update", "session": {"type": 7}}, "invalid_type", "session.type"),
    ({"type": "session.update", "session": {"type": "transcription"}}, "invalid_value", "session.type"),
    (update_event(fps="fast"), "invalid_value", "session.videollm_mod.fps"),
    (update_event(fps=1000), "invalid_value", "session.videollm_mod.fps"),
    (update_event(colour=1), "unknown_parameter", "session.videollm_mod.colour"),
    (update_event(speak="learned", every=2.0), "invalid_value", "session.videollm_mod"),
    (update_event(max_frames=100_000), "invalid_value", "session.videollm_mod.max_frames"),
    (update_event(max_frames=150), "invalid_value", "session.videollm_mod.max_frames"),
    (update_event(max_text_tokens=5000), "invalid_value", "session.videollm_mod.max_text_tokens"),
    (frame_event(random_frames(1, size=(65, 64))[0], 0.0), "frame_too_large", "item.content.0.image_url"),
    (frame_event(random_frames(1)[0], -1.0), "invalid_value", "videollm_mod.time"),
    (frame_event(random_frames(1)[0], 10**400), "invalid_value", "videollm_mod.time"),
    (text_event("x") | {"videollm_mod": {"interrupt": True}}, "unknown_parameter", "videollm_mod.interrupt"),
    ({"type": "response.create", "videollm_mod": {"tim": 1}}, "unknown_parameter", "videollm_mod.tim"),
    (text_event(" "), "invalid_value", "item.content.0.text"),
    (text_event("x") | {"previous_item_id": "x"}, "item_create_invalid_previous_item_id", "previous_item_id"),
    (text_event("x") | {"previous_item_id": 5}, "invalid_type", "previous_item_id"),
    ({"type": "response.create", "videollm_mod": {"interrupt": "no"}}, "invalid_type", "videollm_mod.interrupt"),
    (text_event("x" * 8001), "text_too_long", "item.content"),
    (text_event("\ud800"), "invalid_value", "item.content"),
    ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "invalid_value", "item.type"),
    ({"type": "conversation.item.delete", "item_id": "x"}, "unsupported_event", "type"),
    ({"type": "conversation.item.retrieve", "item_id": "x"}, "item_retrieve_invalid_item_id", "item_id"),
    ({"type": "response.create", "response": {"conversation": "none"}}, "invalid_value", "response.conversation"),
    ({"type": "response.create", "response": {"colour": 1}}, "unknown_parameter", "response.colour"),
    ({"type": "response.create", "response": {"metadata": {"a": "x" * 513}}}, "invalid_value", "response.metadata"),
    ({"type": "input_audio_buffer.append", "audio": ""}, "audio_not_supported", "type"),
]


def test_wrong_events_get_an_error_and_the_connection_stays(small):
    async def be_wrong():
        connection = await connect(small.address)
        for event, _, _ in WRONG:
            await connection._connection.send(event if isinstance(event, str) else json.dumps(event))
        image = {"type": "input_image", "image_url": f"data:image/png;base64,{base64.b64encode(b'text').decode()}"}
        item = {"type": "message", "role": "user", "content": [image]}
        await send(connection, {"type": "conversation.item.create", "event_id": "mine", "item": item})
        errors = [event.error for event in await until(connection, "error", len(WRONG) + 1) if event.type == "error"]
        await send(connection, {"type": "session.heartbeat"}, {"type": "input_audio_buffer.clear"})
        await until(connection, "input_audio_buffer.cleared")
        await connection.close()
        return errors

    *errors, last = asyncio.run(be_wrong())
    assert [(error.code, error.param) for error in errors] == [(code, param) for _, code, param in WRONG]
    assert all(error.type in ("invalid_request_error", "server_error") and error.message for error in errors)
    assert (last.code, last.event_id) == ("invalid_image", "mine")


def test_events_repeat_little_of_what_a_client_sends(small):
    """The server keeps events, and a client may send many large ones."""
    junk = "x" * 100_000
    wrong = {"type": junk, "event_id": junk}
    unknown = {"type": "session.update", "session": {junk: 1}}
    frame = frame_event(random_frames(1)[0], 0.0)
    frame["item"]["content"][0] |= {"detail": junk, "text": junk}

    async def talk():
        async with connect_websocket(f"ws://{small.address}/v1/realtime") as client:
            for event in (wrong, unknown, frame):
                await client.send(json.dumps(event))
            found = [await client.recv() for _ in range(4)]
            while json.loads(found[-1])["type"] != "conversation.item.done":
                found.append(await client.recv())
            return found

    found = asyncio.run(talk())
    assert {"error", "conversation.item.added"} <= {json.loads(event)["type"] for event in found}
    assert max(map(len, found)) < 10_000


# --------------------------------------------------------------------------------------------------- the protocol

# Events of this server that the protocol does not have, and fields that the protocol has and its types leave out.
OWN_EVENTS = {"session.heartbeat_ack", "session.expired"}
UNTYPED = {("session", "object"), ("session", "id")}


def unknown_fields(model, path=""):
    """Return the fields of an event, and of the objects in it, that the client's types do not have."""
    if isinstance(model, list):
        return [found for item in model for found in unknown_fields(item, path)]
    if not isinstance(model, BaseModel):
        return []
    inner = [found for name in type(model).model_fields for found in unknown_fields(getattr(model, name), name)]
    return [(path, name) for name in model.model_extra or ()] + inner


def test_events_add_fields_in_one_place(small):
    """Each event is valid by the types of the `openai` client. All else is in the field `videollm_mod`."""
    response = {"type": "response.create", "response": {"metadata": {"a": "b"}, "tools": []}}

    async def talk():
        found = []
        async with connect_websocket(f"ws://{small.address}/v1/realtime") as client:

            async def hear(kind):
                while not found or found[-1]["type"] != kind:
                    found.append(json.loads(await asyncio.wait_for(client.recv(), 60)))

            await hear("session.created")
            update = update_event(unprompted=False)
            update["session"] |= {"instructions": "Look.", "max_output_tokens": 4, "tools": []}
            for event in (
                update,
                frame_event(random_frames(1)[0], 0.0, id="frame"),
                text_event("What is it?"),
                {"type": "conversation.item.retrieve", "item_id": "frame"},
                response,
                response,
                {"type": "response.cancel"},
                {"type": "session.heartbeat"},
                {"type": "nonsense", "event_id": "mine"},
            ):
                await client.send(json.dumps(event))
            await hear("error")
            while sum(event["type"] == "response.done" for event in found) < 2:
                found.append(json.loads(await asyncio.wait_for(client.recv(), 60)))
        return found

    found = asyncio.run(talk())
    kinds = {event["type"] for event in found}
    assert kinds >= {"session.updated", "conversation.item.retrieved", "response.output_text.delta", "error"}
    adapter = TypeAdapter(Annotated[get_args(RealtimeServerEvent)[0], Field(discriminator="type")])
    own = [event for event in found if event["type"] in OWN_EVENTS]
    assert own and all(event.keys() <= {"type", "event_id", "videollm_mod"} for event in own)
    rest = [adapter.validate_python(event) for event in found if event not in own]
    added = {(event.type, *field) for event in rest for field in unknown_fields(event)}
    assert {field[1:] for field in added} - UNTYPED == {("", "videollm_mod"), ("session", "videollm_mod")}, added


# ------------------------------------------------------------------------------------------------------ other clients


@pytest.mark.parametrize("modalities", [["text"], ["audio"]])
def test_events_as_pipecat_sends_them(server, modalities):
    """
    Events have an id. Settings come after `session.created`, then context, a response, and frames. By default it asks
    for speech, and it ends at the first error.
    """
    images = [
        {"type": "input_image", "image_url": data_uri(frame, "JPEG"), "detail": "auto"} for frame in frames()[:2]
    ]
    item = {"object": "realtime.item", "type": "message", "role": "user"}

    async def talk():
        async with connect_websocket(f"ws://{server.address}/v1/realtime?model=videollm-mod") as client:
            assert json.loads(await client.recv())["type"] == "session.created"
            audio = {"input": {"turn_detection": None}}
            session = {"type": "realtime", "instructions": "Please narrate.", "audio": audio, "tools": []}
            session |= {"output_modalities": modalities}
            greeting = {**item, "id": "a1", "content": [{"type": "input_text", "text": "Hello."}]}
            for event in (
                {"event_id": "1", "type": "session.update", "session": session},
                {"event_id": "2", "type": "conversation.item.create", "item": greeting},
                {"event_id": "3", "type": "session.update", "session": session},
                {"event_id": "4", "type": "response.create", "response": {"output_modalities": modalities}},
                {
                    "event_id": "5",
                    "type": "conversation.item.create",
                    "item": {**item, "id": "b1", "content": images[:1]},
                },
                {"event_id": "6", "type": "input_audio_buffer.clear"},
            ):
                await client.send(json.dumps(event))
            found = []
            while not found or found[-1]["type"] != "response.done":
                found.append(json.loads(await client.recv()))
            return found

    found = asyncio.run(talk())
    assert "error" not in {event["type"] for event in found}
    # Its parser knows these types only, and needs these fields.
    assert {event["type"] for event in found} <= {
        "session.updated",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "response.done",
        "response.output_item.added",
        "response.output_item.done",
        "response.content_part.added",
        "response.content_part.done",
        "response.output_text.delta",
        "response.output_text.done",
        "input_audio_buffer.cleared",
    }
    ignored = [] if modalities == ["text"] else ["output_modalities"]
    created = next(event for event in found if event["type"] == "response.created")
    assert created["response"]["output_modalities"] == ["text"]
    assert created["videollm_mod"].get("ignored", []) == ignored
    updated = next(event["session"] for event in found if event["type"] == "session.updated")
    assert updated["output_modalities"] == ["text"]
    assert set(ignored) <= set(updated["videollm_mod"]["ignored"])
    assert found[-1]["response"].keys() >= {"id", "object", "status", "status_details", "output", "usage"}
    assert found[-1]["response"]["usage"].keys() >= {"input_token_details", "output_token_details", "total_tokens"}


def test_events_as_livekit_sends_them(server):
    """It waits for `conversation.item.added` with its item's id, and for its metadata in `response.created`."""
    message = {"id": "item_1", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi."}]}
    image = {"type": "input_image", "image_url": data_uri(frames()[0], "JPEG")}
    video = {"type": "message", "role": "user", "content": [image]}
    audio = {
        "input": {"format": {"rate": 24000, "type": "audio/pcm"}, "noise_reduction": None, "turn_detection": None}
    }

    async def talk():
        connection = await connect(server.address)
        session = {"type": "realtime", "model": "videollm-mod", "output_modalities": ["audio"], "audio": audio}
        session |= {"max_output_tokens": "inf", "tool_choice": "auto", "tracing": None}
        response = {"instructions": "What color is the thing?", "metadata": {"client_event_id": "response_create_1"}}
        await send(
            connection,
            {"type": "session.update", "event_id": "session_update_1", "session": session},
            {"type": "session.update", "event_id": "tools_1", "session": {"type": "realtime", "tools": []}},
            {"type": "conversation.item.create", "event_id": "c1", "item": message, "previous_item_id": "root"},
            {"type": "conversation.item.create", "event_id": "video_1", "item": video},
            {"type": "response.create", "event_id": "response_create_1", "response": response},
        )
        found = await until(connection, "response.done", 1)
        while not any(e.type == "response.created" and e.response.metadata for e in found):
            found += await until(connection, "response.done", 1)
        await send(connection, {"type": "response.cancel", "response_id": "resp_old"})
        found += await until(connection, "error")
        await connection.close()
        return found

    found = asyncio.run(talk())
    assert "item_1" in [event.item.id for event in found if event.type == "conversation.item.added"]
    metadata = [event.response.metadata for event in found if event.type == "response.created"]
    assert {"client_event_id": "response_create_1"} in metadata
    updated = next(event for event in found if event.type == "session.updated")
    assert updated.session.output_modalities == ["text"]
    assert updated.session.audio.input.turn_detection is None
    # It asks for speech by default. Replies come as text then.
    assert {"tool_choice", "output_modalities"} <= set(updated.session.videollm_mod["ignored"])
    errors = [event.error for event in found if event.type == "error"]
    assert [error.code for error in errors] == ["response_cancel_not_active"]
    assert errors[0].message.startswith("Cancellation failed")


# --------------------------------------------------------------------------------------------------- life of a session


def test_many_connections_with_one_slow_reader(server):
    """The slow one is disconnected, and its session can be resumed. The others hear all of it."""

    async def watch():
        connection = await connect(server.address)
        await send(connection, *(frame_event(frame, index / 2) for index, frame in enumerate(frames()[:2])))
        found = await until(connection, "response.done")
        await connection.close()
        return said(found)

    async def stall():
        # Smaller before connecting: Linux drops what arrives, also acknowledgements, if a window shrinks later.
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((server.address.split(":")[0], int(server.address.split(":")[1])))
        slow = await connect_websocket(f"ws://{server.address}/v1/realtime", sock=raw, open_timeout=60)
        token = json.loads(await slow.recv())["session"]["videollm_mod"]["resume_token"]
        slow.transport.pause_reading()
        update = json.dumps({"type": "session.update", "session": {"instructions": "x" * 200}})
        while not server.metrics.disconnected.labels("slow_reader")._value.get():
            await slow.send(update)
            await asyncio.sleep(0)
        slow.transport.abort()
        query = {"resume_token": token, "last_event_id": "event_1"}
        again = await connect(server.address, extra_query=query)
        created = await again.recv()
        await again.close()
        return created.session.videollm_mod

    async def all_at_once():
        return await asyncio.gather(stall(), *(watch() for _ in range(31)))

    resumed, *heard = asyncio.run(all_at_once())
    assert heard == [narration()[:1]] * 31
    assert resumed["resumed"] and resumed["missed_events"] > 0


def test_a_slow_reader_is_counted_once():
    async def notice():
        counted = []
        counter = SimpleNamespace(labels=lambda reason: SimpleNamespace(inc=lambda: counted.append(reason)))
        sessions = SimpleNamespace(metrics=SimpleNamespace(disconnected=counter))
        conversation = SimpleNamespace(session=SimpleNamespace(sessions=sessions), num_missed=0)
        connection = Connection(None, conversation, None)
        for conversation.num_missed in (0, 1, 2, 3):
            connection.notice()
        return counted

    assert asyncio.run(notice()) == ["slow_reader"]


def test_a_lost_connection_is_resumed(server):
    async def lose():
        connection = await connect(server.address)
        created = await connection.recv()
        for number, frame in enumerate(frames()[:4]):
            await send(connection, frame_event(frame, number / 2))
        before = await until(connection, "conversation.item.done", 2)
        connection._connection.transport.abort()
        query = {"resume_token": created.session.videollm_mod["resume_token"], "last_event_id": before[-1].event_id}
        again = await connect(server.address, extra_query=query)
        first = await again.recv()
        for number, frame in enumerate(frames()[4:], start=4):
            await send(again, frame_event(frame, number / 2))
        after = await until(again, "response.done", len(narration()) - len(said(before)))
        await again.close()
        return created.session, before, first.session, after

    created, before, resumed, after = asyncio.run(lose())
    assert resumed.id == created.id and resumed.videollm_mod["resumed"]
    numbers = [int(event.event_id.removeprefix("event_")) for event in before + after]
    assert numbers == list(range(2, 2 + len(numbers)))  # each event once, in order
    assert said(before + after) == narration()


UPGRADE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {}\r\n"


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("GET /v1/realtime", UPGRADE.format(base64.b64encode(bytes(16)).decode()), ""),
        ("POST /v1/streaming/sessions", "Content-Length: 2\r\n", "{}"),
    ],
    ids=["websocket", "http"],
)
def test_a_client_that_leaves_before_it_has_an_answer_frees_its_seat(small, path, headers, body):
    """Nobody else knows the token or the name of the session."""
    engine, before = small.engine, small.engine._num_opened
    request = f"{path} HTTP/1.1\r\nHost: {small.address}\r\n{headers}\r\n{body}"
    host, port = small.address.split(":")
    with engine.changed:  # the stream is not opened meanwhile
        client = socket.create_connection((host, int(port)))
        client.sendall(request.encode())
        clock.sleep(0.3)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it breaks off
        client.close()
        clock.sleep(0.1)
    end = clock.monotonic() + 30
    while engine._num_opened == before or list(small.sessions) or engine.streams:
        assert clock.monotonic() < end
        clock.sleep(0.01)


def test_a_connection_that_still_lives_is_replaced(small):
    """What is said while the new one connects goes to the new one."""

    async def replace():
        old = await connect(small.address)
        token = (await old.recv()).session.videollm_mod["resume_token"]

        async def beat():
            while True:
                await send(old, {"type": "session.heartbeat"})
                await asyncio.sleep(0.001)

        beating = asyncio.create_task(beat())
        await until(old, "session.heartbeat_ack")
        reading = asyncio.create_task(until(old, "error"))  # to the end
        new = await connect(small.address, extra_query={"resume_token": token, "last_event_id": "event_1"})
        found = [await new.recv()]
        with pytest.raises(ConnectionClosed) as closed:
            await reading
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await send(new, {"type": "session.close"})
        with pytest.raises(ConnectionClosed):
            while True:
                found.append(await new.recv())
        return closed.value.rcvd.code, found

    code, (created, *found) = asyncio.run(replace())
    assert code == 4000 and created.session.videollm_mod["resumed"]
    numbers = [int(event.event_id.removeprefix("event_")) for event in found]
    assert numbers and numbers == list(range(2, 2 + len(numbers)))


def test_an_item_that_was_added_enters_the_stream_also_if_its_connection_is_replaced(small):
    reached, may_go = threading.Event(), threading.Event()

    async def replace():
        old = await connect(small.address)
        token = (await old.recv()).session.videollm_mod["resume_token"]
        session = small.sessions.find_token(token)
        work = session.work

        async def hold(call):
            if session.has_begun and not reached.is_set():  # the item is added
                reached.set()
                await small.sessions.run(lambda: may_go.wait(30))
            return await work(call)

        session.work = hold
        await send(old, update_event(unprompted=False), text_event("Why?"))
        told = await until(old, "conversation.item.done")
        assert await asyncio.to_thread(reached.wait, 30)
        new = await connect(small.address, extra_query={"resume_token": token})
        await new.recv()
        with pytest.raises(ConnectionClosed):
            await until(old, "error")
        may_go.set()
        await send(new, text_event("When?"))
        await until(new, "conversation.item.done")
        await send(new, {"type": "session.heartbeat"})
        await until(new, "session.heartbeat_ack")
        with small.engine.changed:
            turns = session.stream.unread_turns
        await send(new, {"type": "session.close"})
        return [event.type for event in told], turns

    told, turns = asyncio.run(replace())
    assert "conversation.item.added" in told and [text for _, text in turns][-2:] == ["Why?", "When?"], turns


def test_a_cancelled_reply_is_cancelled_when_its_session_ends_first():
    reply = Reply(is_asked=True, question=object(), is_cancelled=True, is_failed=True)
    assert response_object(reply, [], "conv_1", 8)["status"] == "cancelled"


def test_sessions_expire():
    async def beat(connection):
        while True:
            await send(connection, {"type": "session.heartbeat"})
            await asyncio.sleep(0.5)

    async def idle(address, engine):
        alive = await connect(address)  # it would expire before the other one
        beating = asyncio.ensure_future(beat(alive))
        connection = await connect(address)
        token = (await connection.recv()).session.videollm_mod["resume_token"]
        found = await until(connection, "session.expired")
        beating.cancel()
        await send(alive, {"type": "session.close"})
        with pytest.raises(ConnectionClosed):
            while True:
                assert (await alive.recv()).type in ("session.created", "session.heartbeat_ack")
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        lost = await connect(address)
        lost_token = (await lost.recv()).session.videollm_mod["resume_token"]
        lost._connection.transport.abort()
        while engine.streams:  # for a tenth of a second
            await asyncio.sleep(0.01)
        for gone in (token, lost_token):
            with pytest.raises(Exception, match="404"):
                await connect(address, extra_query={"resume_token": gone})
        return found

    limits = {"idle_seconds": 2.0, "resume_seconds": 0.1}
    with running(tiny_model(), tiny_processor(), engine_options=TINY, **limits) as (address, server):
        assert "2 s" in asyncio.run(idle(address, server.engine))[-1].videollm_mod["reason"]
