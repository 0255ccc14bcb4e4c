# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Who may use a server: keys, and web pages by their origin."""

import hmac
from collections.abc import Sequence
from typing import Any

from fastapi import WebSocket
from fastapi.responses import JSONResponse
from starlette.requests import HTTPConnection

from .limits import RequestError


# Where a browser puts the key, since it cannot set headers of a WebSocket.
_SUBPROTOCOL = "openai-insecure-api-key."


class Access:
    """
    Middleware that answers 401 without a valid key, and 403 to web pages whose origin was not allowed.

    A browser sends requests of any page to any server, also to one on the visitor's own machine.

    Args:
        app: The application.
        api_keys (`Sequence[str]`): Valid keys. Without any, no key is needed.
        origins (`Sequence[str]`): Origins that are allowed, `"*"` for all.
        refusals (`Counter`): Counts refusals by reason.
    """

    def __init__(self, app: Any, *, api_keys: Sequence[str], origins: Sequence[str], refusals: Any) -> None:
        self.app, self.origins, self.refusals = app, set(origins), refusals
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        error = self._find_error(HTTPConnection(scope))
        if error is None:
            await self.app(scope, receive, send)
            return
        self.refusals.labels("key" if error.status == 401 else "origin").inc()
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        response = JSONResponse({"error": error.to_dict()}, status_code=error.status, headers=headers)
        if scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(response)

    def _find_error(self, request: HTTPConnection) -> RequestError | None:
        origin = request.headers.get("origin")
        if origin is not None and not {origin, "*"} & self.origins:
            wrong = f"Pages of {origin} may not use this server: start it with --cors {origin} to allow them."
            return RequestError(wrong, status=403, code="origin_not_allowed")
        if self.api_keys and not self._is_valid(_key_of(request)):
            wrong = "This server needs a valid key, in the header `Authorization: Bearer KEY`."
            return RequestError(wrong, status=401, code="invalid_api_key")
        return None

    def _is_valid(self, key: str) -> bool:
        # All keys are compared, so that the time tells nothing.
        return sum(hmac.compare_digest(known, key.encode()) for known in self.api_keys) > 0


def _key_of(request: HTTPConnection) -> str:
    """Return the key of a request, or an empty text."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    offered = request.scope.get("subprotocols", [])
    keys = [name.removeprefix(_SUBPROTOCOL) for name in offered if name.startswith(_SUBPROTOCOL)]
    return keys[0] if keys else request.headers.get("api-key", "")


__all__ = ["Access"]
