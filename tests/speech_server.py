# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A server on loopback with `/v1/audio/transcriptions` and `/v1/audio/speech`, which tests tell what to do."""

import json
import threading
import wave
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any


class Endpoints:
    """
    What the endpoints do, and what they were asked.

    Attributes:
        url (`str`): Base address of the API.
        transcripts (`list[str]`): Transcripts of the next recordings.
        status (`int`): Status of all answers. head (`bytes`): What speech begins with.
        breaks (`bool`): Whether connections break off in the middle of an answer.
        may_answer (`threading.Event`): Answers wait for it.
        may_go_on (`threading.Event`): Answers wait for it after their first half.
        heard (`list[tuple]`): Form fields and samples of each recording. keys (`list`): `Authorization` of requests.
        asked (`list[dict]`): Requests for speech.
    """

    def __init__(self) -> None:
        self.url = ""
        self.may_answer, self.may_go_on = threading.Event(), threading.Event()
        self.reset()

    def reset(self) -> None:
        """Answer all requests at once, and forget earlier ones."""
        self.transcripts, self.status, self.head, self.breaks = [], 200, b"", False
        self.heard, self.asked, self.keys = [], [], []
        self.may_answer.set()
        self.may_go_on.set()


def speech_of(text: str) -> bytes:
    """Return the samples that the endpoint sends for a text: half a second, different for each text."""
    return bytes([len(text) % 256, sum(text.encode()) % 256]) * 12_000


@contextmanager
def speech_server() -> Iterator[Endpoints]:
    """Run the endpoints at a free port."""
    endpoints = Endpoints()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            endpoints.keys.append(self.headers.get("authorization"))
            with suppress(BrokenPipeError, ConnectionResetError):
                answer = self._hear if self.path == "/v1/audio/transcriptions" else self._speak
                answer(body)

        def _hear(self, body: bytes) -> None:
            head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
            parts = {
                part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                for part in message_from_bytes(head + body).get_payload()
            }
            with wave.open(BytesIO(parts.pop("file"))) as file:
                form = file.getparams()[:3]
                samples = file.readframes(file.getnframes())
            endpoints.heard.append(({name: value.decode() for name, value in parts.items()}, form, samples))
            endpoints.may_answer.wait(30)
            self._answer(json.dumps({"text": endpoints.transcripts.pop(0) if endpoints.transcripts else ""}).encode())

        def _speak(self, body: bytes) -> None:
            asked = json.loads(body)
            endpoints.asked.append(asked)
            endpoints.may_answer.wait(30)
            self._answer(endpoints.head + speech_of(asked["input"]))

        def _answer(self, body: bytes) -> None:
            self.send_response(endpoints.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            if endpoints.breaks:
                self.close_connection = True
                return
            endpoints.may_go_on.wait(30)
            self.wfile.write(body[len(body) // 2 :])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoints.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield endpoints
    finally:
        endpoints.reset()
        server.shutdown()
        server.server_close()
