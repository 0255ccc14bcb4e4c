# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Who may use a server: keys, web pages by their origin, and names of the server."""

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Sequence
from typing import Any

from starlette.requests import HTTPConnection

from .error_answers import refuse
from .limits import RequestError


# Where a browser puts the key, since it cannot set headers of a WebSocket.
_SUBPROTOCOL = "openai-insecure-api-key."
_OWNER = "videollm_mod.owner"  # in a scope


class Access:
    """
    Middleware that answers 401 without a valid key, 403 to web pages whose origin was not allowed, and 421 to requests
    for another server.

    A browser sends requests of any page to any server, also to one on the visitor's own machine. The owner of a page
    can let its name lead to that machine, so that the page and the server have the same origin. Only the name that
    the browser asked for then tells that the request is a stranger's. A page has no key, so names count only where no
    key is needed.

    Args:
        app: The application.
        api_keys (`Sequence[str]`): Valid keys. Without any, no key is needed.
        origins (`Sequence[str]`): Origins that are allowed, `"*"` for all.
        hosts (`Collection[str]`): Names that are allowed besides IP addresses and `localhost`, `"*"` for all.
        refusals (`Counter`): Counts refusals by reason.
    """

    def __init__(
        self, app: Any, *, api_keys: Sequence[str], origins: Sequence[str], hosts: Collection[str], refusals: Any
    ) -> None:
        self.app, self.origins, self.hosts, self.refusals = app, set(origins), hosts, refusals
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        error = self._find_error(request)
        if error is None:
            owner = _digest(_key_of(request)) if self.api_keys else None
            await self.app({**scope, _OWNER: owner}, receive, send)
            return
        self.refusals.labels({401: "key", 403: "origin"}.get(error.status, "host")).inc()
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        await refuse(scope, receive, send, error, **headers)

    def _find_error(self, request: HTTPConnection) -> RequestError | None:
        origin = request.headers.get("origin")
        if origin is not None and not {origin, "*"} & self.origins:
            wrong = f"Pages of {origin} may not use this server: start it with --cors {origin} to allow them."
            return RequestError(wrong, status=403, code="origin_not_allowed")
        host = _host_of(request)
        if not self.api_keys and not self._is_own(host):
            wrong = f"This server does not know the name {host!r}: start it with --allowed-host {host}, or with a key."
            return RequestError(wrong, status=421, code="host_not_allowed")
        if self.api_keys and not self._is_valid(_key_of(request)):
            wrong = "This server needs a valid key, in the header `Authorization: Bearer KEY`."
            return RequestError(wrong, status=401, code="invalid_api_key")
        return None

    def _is_own(self, host: str) -> bool:
        if host == "localhost" or host.endswith(".localhost") or {host, "*"} & set(self.hosts):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True  # nobody can let an address lead elsewhere

    def _is_valid(self, key: str) -> bool:
        # All keys are compared, so that the time tells nothing.
        return sum(hmac.compare_digest(known, key.encode()) for known in self.api_keys) > 0


def check_keys(api_keys: Sequence[str]) -> None:
    """Raise `ValueError` if a key is empty, which lets everyone in, or if no header can have it."""
    if not all(api_keys):
        raise ValueError("A key of clients is empty: clients without a key would be served.")
    if not all(key.isascii() and key.isprintable() and key == key.strip() for key in api_keys):
        wrong = "A key of clients has a character that requests cannot have, or a space at its end: "
        raise ValueError(wrong + "choose printable ASCII, such as what `openssl rand -hex 32` prints.")


def owner_of(request: HTTPConnection) -> str | None:
    """Return to whom the sessions of a request belong: all requests with the same key. `None` if no key is needed."""
    return request.scope.get(_OWNER)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _host_of(request: HTTPConnection) -> str:
    """Return the name or address that a client asked for, without the port."""
    host = request.headers.get("host", "").strip().lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].rstrip(".")


def _key_of(request: HTTPConnection) -> str:
    """Return the key of a request, or an empty text."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    offered = request.scope.get("subprotocols", [])
    keys = [name.removeprefix(_SUBPROTOCOL) for name in offered if name.startswith(_SUBPROTOCOL)]
    return keys[0] if keys else request.headers.get("api-key", "")


__all__ = ["Access", "check_keys", "owner_of"]
