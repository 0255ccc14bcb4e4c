# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""How a server answers requests that it does not accept."""

from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Match

from .limits import RequestError
from .wanted_sessions import SessionMovedError


def add_error_answers(app: FastAPI) -> None:
    """Let an application answer errors as OpenAI's API does."""
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)


def error_response(error: RequestError) -> JSONResponse:
    """Return an error as OpenAI's API answers it."""
    return JSONResponse({"error": error.to_dict()}, status_code=error.status, headers=error.headers)


async def refuse(scope: Any, receive: Any, send: Any, error: RequestError, **headers: str) -> None:
    """Answer a request, or a WebSocket that is not accepted yet, with an error and further headers."""
    response = error_response(error)
    response.headers.update(headers)
    if scope["type"] == "http":
        await response(scope, receive, send)
    else:
        await WebSocket(scope, receive, send).send_denial_response(response)


def moved_response(request: HTTPConnection, error: SessionMovedError) -> JSONResponse:
    """Return the address at which a session goes on."""
    response = error_response(error)
    # An id may be any word, such as "v1".
    before, place, after = request.url.path.rpartition(f"/sessions/{error.before}")
    path = f"{before}/sessions/{error.now}{after}" if place else after
    given = [
        (name, error.now if name == "resume_token" else value) for name, value in request.query_params.multi_items()
    ]
    query = urlencode(given)
    # A proxy with TLS may stand before the server, so the address is a relative one.
    response.headers["Location"] = f"{path}?{query}" if query else path
    return response


async def _answer_error(request: Request, error: RequestError) -> JSONResponse:
    return moved_response(request, error) if isinstance(error, SessionMovedError) else error_response(error)


async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Answer what the routing refuses."""
    wrong, code = str(error.detail), f"http_{error.status_code}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        wrong, code = f"There is no {request.url.path} here.", "not_found"
    elif error.status_code == 405:
        # The routing names the methods of the first route only, and a path may have several.
        headers["Allow"] = ", ".join(sorted(_methods(request)))
        wrong = f"{request.url.path} takes {headers['Allow']}, not {request.method}."
        code = "method_not_allowed"
    response = error_response(RequestError(wrong, status=error.status_code, code=code))
    response.headers.update(headers)
    return response


async def _answer_fault(_: Request, __: Exception) -> JSONResponse:
    """Answer after a fault of the server, which the log tells."""
    return error_response(RequestError("The server failed at this request.", status=500, code="server_error"))


def _methods(request: Request) -> set[str]:
    """Return the methods that the path of a request takes."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}


__all__ = ["add_error_answers", "error_response", "moved_response", "refuse"]
