# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A scripted OpenAI-compatible endpoint on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def scripted_endpoint(
    *answers: str | int | bytes | dict[str, Any] | tuple[int, dict[str, str]] | Callable[[dict[str, Any]], Any],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """
    Serve chat completions. The first request gets the first answer, and so on; the last answer repeats.

    Args:
        answers: Each a reply's text, an HTTP status, a body (with status 400 if it has an "error"), a status with
            headers, or a function of the request that returns one of these.

    Yields:
        The address of the API, and the requests so far.
    """
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                answer = answers[min(len(asked), len(answers) - 1)]
                asked.append(request)
            if callable(answer):
                answer = answer(request)
            added = {}
            if isinstance(answer, tuple):
                answer, added = answer
            is_error = isinstance(answer, dict) and "error" in answer
            status = answer if isinstance(answer, int) else 400 if is_error else 200
            data = answer if isinstance(answer, bytes) else json.dumps(_body(answer, request)).encode()
            # A test waits no second before the next attempt.
            added = {"Content-Type": "application/json", "retry-after-ms": "1", **added}
            # A client may have given up waiting.
            with suppress(OSError):
                self._send(status, {**added, "Content-Length": str(len(data))}, data)

        def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()


def _body(answer: str | int | dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    if isinstance(answer, int):
        return {"error": {"message": "wrong"}}
    message = {"role": "assistant", "content": answer}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "1", "object": "chat.completion", "created": 0, "model": request.get("model"), "choices": choices}
