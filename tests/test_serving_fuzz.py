# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Random events and requests for a server. Each gets its answer or an error that says what is wrong, and nothing breaks.

`FUZZ_CASES=2000 FUZZ_SEED=1 pytest tests/test_serving_fuzz.py` runs more cases, or others.
"""

import copy
import json
import logging
import os
import random
import time
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pytest
from serving_server import data_uri, frame_event, picture, running, text_event, update_event
from tiny import tiny_model, tiny_processor
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


CASES, SEED = int(os.environ.get("FUZZ_CASES", "500")), int(os.environ.get("FUZZ_SEED", "0"))
SESSIONS, CHAT = "/v1/streaming/sessions", "/v1/chat/completions"
FRAME = np.zeros((32, 32, 3), np.uint8)
URI, FILE = data_uri(FRAME), picture(FRAME)
AUDIO = {"input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None}, "output": {"voice": "a"}}
SESSION = {"type": "realtime", "instructions": "Watch.", "max_output_tokens": 5, "output_modalities": ["text"]}
SESSION |= {"audio": AUDIO, "tools": [], "videollm_mod": {"fps": 2.0, "speak": "every", "every": 1.0, "prompt": "x"}}
EVENTS = [
    {"type": "session.update", "event_id": "e", "session": SESSION},
    update_event(unprompted=False),
    update_event(max_frames=8, max_text_tokens=100, no_repeat=2, max_words=3, min_silence=0.5, interval_threshold=0.5),
    {"type": "session.heartbeat"},
    {"type": "session.close"},
    frame_event(FRAME),
    frame_event(FRAME, 3.0, id="frame"),
    text_event("What is it?", id="text"),
    {"type": "conversation.item.retrieve", "item_id": "frame"},
    {"type": "conversation.item.delete", "item_id": "frame"},
    {"type": "conversation.item.truncate", "item_id": "frame", "content_index": 0, "audio_end_ms": 0},
    {"type": "response.create", "response": {"instructions": "Why?", "metadata": {"a": "b"}, "conversation": "auto"}},
    {"type": "response.create", "videollm_mod": {"interrupt": True}},
    {"type": "response.cancel", "response_id": "resp"},
    {"type": "input_audio_buffer.append", "audio": "AAAA"},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
]
MESSAGE = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "x"}],
}
REQUESTS = [
    ("POST", SESSIONS, {"id": "door", "instructions": "Watch.", "fps": 1.0, "max_frames": 8, "unprompted": False}),
    ("POST", f"{SESSIONS}/here/ask", {"text": "What?", "reply_now": False, "interrupt": True}),
    ("POST", f"{SESSIONS}/here/frame", None),
    ("POST", f"{SESSIONS}/here/frame?time=1", None),
    ("GET", f"{SESSIONS}/here", None),
    ("DELETE", f"{SESSIONS}/door", None),
    (
        "POST",
        CHAT,
        {"messages": [{"role": "system", "content": "s"}, MESSAGE], "max_tokens": 2, "model": "videollm-mod"},
    ),
    (
        "POST",
        CHAT,
        {"messages": [MESSAGE], "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}},
    ),
    ("POST", CHAT, {"messages": [MESSAGE], "max_tokens": 1, "videollm_mod": {"fps": 2}, "temperature": 0, "n": 1}),
]
WRONG = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("-inf"),
    10**30,
    "",
    " ",
    "\ud800",
    "\x00",
    "é" * 50,
    "x" * 9000,
]
WRONG += ["1", "inf", URI, "data:image/png;base64,AAAA", "http://localhost/x", "<|im_end|>[,]", [], [[]], {}, {"": ""}]
WRONG += [[None] * 50, {"type": "text"}, {"a" * 2000: {"b": [1]}}, ["text", "audio"], 2**63, 1e-320]


@pytest.fixture(scope="module")
def server():
    engine = {"max_streams": 6, "max_frames": 12, "max_text_tokens": 160, "page_size": 16}
    with running(tiny_model(), tiny_processor(), engine_options=engine, max_output_tokens=4) as (address, server):
        server.address = address
        yield server


@contextmanager
def no_fault_logged():
    """Fail if the server logs a fault of its own."""
    records = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: records.append(handler.format(record))
    loggers = [logging.getLogger(name) for name in ("videollm_mod", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not records, records[0]


def spoil(chance, value, depth=0):
    """Return a JSON value with random changes: other types, missing and unknown fields, deep nesting."""
    if chance.random() < 0.06 + 0.1 * (depth > 2):
        wrong = copy.deepcopy(chance.choice(WRONG))
        for _ in range(chance.choice([0, 0, 0, 3, 2000])):
            wrong = [wrong]
        return wrong
    if isinstance(value, dict):
        kept = {name: spoil(chance, part, depth + 1) for name, part in value.items() if chance.random() > 0.04}
        if chance.random() < 0.08:
            kept[chance.choice([*value, "unknown", "\ud800", "x" * 3000, "__class__", "self"])] = chance.choice(WRONG)
        return kept
    if isinstance(value, list):
        return [spoil(chance, part, depth + 1) for part in value for _ in range(chance.choice([1, 1, 1, 1, 0, 2, 40]))]
    return value


def as_text(chance, value):
    """Return JSON, or something that is hardly JSON."""
    text = dump(value)
    if chance.random() < 0.9:
        return text
    at = chance.randrange(len(text) + 1)
    return chance.choice(
        [text[:at], text[:at] + chance.choice('{}[]",:\\\0é') + text[at:], text * 2, "", "null", "[" * 90_000]
    )


def dump(value):
    """Return JSON, also of values that are nested too deeply for the `json` module."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    if isinstance(value, dict):
        inner = "{" + ", ".join(f"{json.dumps(name)}: {dump(part)}" for name, part in value.items()) + "}"
    elif isinstance(value, list):
        inner = "[" + ", ".join(map(dump, value)) + "]"
    else:
        inner = json.dumps(value)
    return "[" * depth + inner + "]" * depth


def test_random_events(server):
    socket = None
    with no_fault_logged(), ExitStack() as stack:
        for number in range(CASES):
            chance = random.Random(f"{SEED} event {number}")
            if socket is None:
                stack.close()
                wait_for_room(server.engine)
                socket = stack.enter_context(connect(f"ws://{server.address}/v1/realtime", open_timeout=60))
            text = as_text(chance, spoil(chance, chance.choice(EVENTS)))
            try:
                socket.send(text.encode() if chance.random() < 0.02 else text)
                if number % 10 == 9:  # it still answers
                    socket.send('{"type": "session.heartbeat"}')
                    check_answers(socket)
                if chance.random() < 0.01:
                    socket.close(code=chance.choice([1000, 1001, 3000]))
                    socket = None
            except ConnectionClosed as error:
                assert error.rcvd.code == 1000, (number, text[:500], error)  # `session.close`
                socket = None


def wait_for_room(engine):
    """Wait until the streams of connections that are over have ended."""
    end = time.monotonic() + 60
    while len(engine.streams) >= engine.max_streams:
        assert time.monotonic() < end, "streams of closed connections stay"
        time.sleep(0.05)


def check_answers(socket):
    """Read to the answer to a heartbeat. No event may say that the server failed."""
    while True:
        event = json.loads(socket.recv(60))
        assert event["type"] != "error" or event["error"]["code"] not in ("server_error", "session_failed"), event
        if event["type"] == "session.heartbeat_ack":
            return


def test_random_requests(server):
    statuses = set()
    with no_fault_logged(), httpx.Client(base_url=f"http://{server.address}", timeout=60) as client:
        for number in range(CASES):
            chance = random.Random(f"{SEED} request {number}")
            client.post(SESSIONS, json={"id": "here", "unprompted": False})
            method, path, given = chance.choice(REQUESTS)
            path, method = spoil_path(chance, path), chance.choice([method] * 20 + ["PUT", "GET", "POST", "DELETE"])
            if given is None:
                at = chance.randrange(len(FILE))
                content = chance.choice(
                    [FILE, FILE[:at], FILE[:at] + bytes([chance.randrange(256)]) + FILE[at + 1 :], b""]
                )
            else:
                content = as_text(chance, spoil(chance, given)).encode("utf-8", "surrogatepass")
            answer = client.request(method, path, content=content)
            statuses.add(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 503, (
                number,
                method,
                path,
                content[:500],
                answer.text,
            )
            if answer.status_code >= 400 and method != "HEAD":
                assert set(answer.json()["error"]) == {"type", "code", "message", "param"}
        assert {200, 201, 400, 404} <= statuses
        for session in client.get(SESSIONS).json()["data"]:
            client.delete(f"{SESSIONS}/{session['id']}")
        assert client.get("/health").status_code == 200


def spoil_path(chance, path):
    """Return a path, now and then with another session or another time."""
    if chance.random() < 0.1:
        path = path.replace("here", chance.choice(["nobody", "%00", "..", "x" * 5000, "%ff", "a/b", ""]))
    if "time=" in path:
        path = path.replace(
            "=1", "=" + chance.choice(["1", "1e9", "nan", "-inf", "", "0x1", "9" * 400, "%00", "1&time=2"])
        )
    return path
