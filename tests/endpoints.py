# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A scripted OpenAI-compatible endpoint on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def scripted_endpoint(
    *answers: str | int | dict[str, Any] | Callable[[dict[str, Any]], str],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """
    Serve chat completions. The first request gets the first answer, and so on; the last answer repeats.

    Args:
        answers: Each a reply's text, an HTTP status, a body, or a function of the request that returns the text.

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
            status = answer if isinstance(answer, int) else 200
            message = {"role": "assistant", "content": answer}
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request.get("model"),
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
            body = answer if isinstance(answer, dict) else body if status == 200 else {"error": {"message": "wrong"}}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            # A test waits no second before the next attempt.
            self.send_header("retry-after-ms", "1")
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
