# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sessions that agents of Pipecat and LiveKit had with the server, sent again as they were recorded."""

import asyncio
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, get_args

import pytest
from engines import embedded
from openai.types.realtime import RealtimeServerEvent
from pydantic import Field, TypeAdapter
from serving_server import running
from speech_server import speech_server
from websockets.asyncio.client import connect

from videollm_mod.serving.speech_endpoints import Speaker, Transcriber


RECORDINGS = ("pipecat", "pipecat_speech", "livekit", "livekit_speech")
OPTIONS = {"max_streams": 2, "max_frames": 24, "max_text_tokens": 256, "page_size": 32}
SERVER_EVENT = TypeAdapter(Annotated[get_args(RealtimeServerEvent)[0], Field(discriminator="type")])

pytestmark = pytest.mark.xdist_group("recordings")  # one process sends them


def recording(name):
    """Return the address of a recording, and its messages."""
    path = Path(__file__).parent / "data" / f"realtime_{name}.jsonl"
    first, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return first["path"], rows


async def replay(address, name):
    """Send the messages of a recording at their pace, after what had come before them. Return the server's events."""
    path, rows = recording(name)
    found, loop = [], asyncio.get_running_loop()
    async with connect(f"ws://{address}{path}", max_size=None) as client:
        begin = loop.time()

        async def listen():
            async for message in client:
                found.append(json.loads(message))

        async def until(condition):
            ends = loop.time() + 60
            while not condition():
                assert loop.time() < ends and not listener.done(), [event["type"] for event in found]
                await asyncio.sleep(0.01)

        def has_come(kind, count):
            return sum(event["type"] == kind for event in found) >= count

        def made(number):
            items = [event["item"]["id"] for event in found if event["type"] == "response.output_item.added"]
            return items[number - 1]

        listener = asyncio.create_task(listen())
        for row in rows:
            await asyncio.sleep(begin + row["at"] - loop.time())
            if row["after"] is not None:
                await until(lambda row=row: has_come(*row["after"]))
            event = row["event"]
            for name in ("item_id", "previous_item_id"):
                if event.get(name, "").startswith("item of response "):
                    event = event | {name: made(int(event[name].split()[-1]))}
            await client.send(json.dumps(event))
        items = sum(row["event"]["type"] == "conversation.item.create" for row in rows)
        await until(lambda: sum(is_done_item(event) for event in found) >= items)
        await until(lambda: Counter(kinds(found))["response.created"] == Counter(kinds(found))["response.done"])
    await asyncio.wait([listener])
    return found


def is_done_item(event):
    """Whether an event says that an item of the client is done, a recording not counted."""
    if event["type"] != "conversation.item.done" or event["item"]["role"] != "user":
        return False
    return event["item"]["content"][0]["type"] != "input_audio"


def kinds(events):
    return [event["type"] for event in events]


@pytest.fixture(scope="module")
def answers():
    """The server's events, by recording."""
    model, processor, _ = embedded()
    with ExitStack() as stack:
        endpoints = stack.enter_context(speech_server())
        endpoints.transcripts = ["What do you see?"] * 2
        speech = {"transcriber": Transcriber(endpoints.url, "ear"), "speaker": Speaker(endpoints.url, "mouth", "alto")}
        served = [
            stack.enter_context(running(model, processor, engine_options=OPTIONS, **given))[0]
            for given in ({}, speech)
        ]

        async def replay_all():
            return await asyncio.gather(*(replay(served["speech" in name], name) for name in RECORDINGS))

        return dict(zip(RECORDINGS, asyncio.run(replay_all()), strict=True))


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_session_gets_what_its_client_waits_for(answers, name):
    found, sent = answers[name], [row["event"] for row in recording(name)[1]]
    came, asked = Counter(kinds(found)), Counter(kinds(sent))
    assert kinds(found)[0] == "session.created" and came["session.updated"] == asked["session.update"]
    # LiveKit waits for its items by their ids.
    ids = [event["item"]["id"] for event in sent if "id" in event.get("item", {})]
    assert set(ids) <= {event["item"]["id"] for event in found if event["type"] == "conversation.item.added"}
    assert came["conversation.item.truncated"] == asked["conversation.item.truncate"]
    assert came["input_audio_buffer.committed"] == asked["input_audio_buffer.commit"]
    assert came["conversation.item.input_audio_transcription.completed"] == asked["input_audio_buffer.commit"]
    # LiveKit finds the response that it asked for by its metadata.
    tags = [event["response"]["metadata"] for event in sent if "metadata" in event.get("response", {})]
    made = [event for event in found if event["type"] == "response.created"]
    assert all(tag in [event["response"]["metadata"] for event in made] for tag in tags)
    assert sum(not event["videollm_mod"]["unprompted"] for event in made) == asked["response.create"]
    assert any(event["videollm_mod"]["unprompted"] for event in made), "the model narrates too"
    for event in found:
        SERVER_EVENT.validate_python(event)


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_session_gets_no_error_that_ends_its_client(answers, name):
    """Pipecat ends at any error, except where there is nothing to cancel. LiveKit also goes on where an item stays."""
    deleted = [row["event"]["event_id"] for row in recording(name)[1] if row["event"]["type"].endswith("item.delete")]
    errors = [event["error"] for event in answers[name] if event["type"] == "error"]
    assert {error["code"] for error in errors} <= {"response_cancel_not_active", "unsupported_event"}
    assert [error["event_id"] for error in errors if error["code"] == "unsupported_event"] == deleted
    assert len(deleted) == (name == "livekit")


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_session_gets_its_responses_in_the_order_of_the_protocol(answers, name):
    is_spoken, found = "speech" in name, answers[name]
    text = "output_audio_transcript" if is_spoken else "output_text"
    ends = [f"response.{text}.done", *(["response.output_audio.done"] if is_spoken else [])]
    expected = ["response.created", "response.output_item.added", "response.content_part.added", *ends]
    expected += ["response.content_part.done", "response.output_item.done", "response.done"]
    for response in [event["response"] for event in found if event["type"] == "response.done"]:
        own = [
            event
            for event in found
            if response["id"] in (event.get("response_id"), event.get("response", {}).get("id"))
        ]
        deltas = [event for event in own if event["type"].endswith(".delta")]
        assert kinds(event for event in own if event not in deltas) == expected
        assert [kind for kind in kinds(own) if kind == f"response.{text}.delta"], response
        assert all(2 < own.index(delta) < own.index(own[-3]) for delta in deltas)
        words = "".join(event["delta"] for event in deltas if event["type"] == f"response.{text}.delta")
        [part] = response["output"][0]["content"]
        assert words == part["transcript" if is_spoken else "text"]
        if is_spoken and response["status"] == "completed":
            assert "response.output_audio.delta" in kinds(deltas)
