# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fields of the events and requests of clients."""

from typing import Any

from .bodies import load_json
from .limits import RequestError


_MOST_EVENT_ID = 512  # characters, as in OpenAI's protocol


def event_id_of(event: Any) -> str | None:
    """Return the id that a client gave its event, to be repeated."""
    given = event.get("event_id") if isinstance(event, dict) else None
    return given[:_MOST_EVENT_ID] if isinstance(given, str) else None


def parse_event(text: str | None) -> dict[str, Any]:
    """Return the event in a message, `None` for a message that is not a text. It has a `type`."""
    try:
        event = load_json(text or "")
    except RequestError as error:
        raise RequestError(f"An event must be a text message with JSON. {error}", code=error.code) from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise RequestError(
            "An event must be an object with a `type`.", code="missing_required_parameter", param="type"
        )
    return event


def object_of(parent: dict[str, Any], name: str, *, path: str = "", needed: bool = False) -> dict[str, Any]:
    """Return a field of an event that must be an object; without it an empty one."""
    found = parent.get(name)
    if found is None and not needed:
        return {}
    if not isinstance(found, dict):
        raise RequestError(f"`{path}{name}` must be an object.", code="invalid_type", param=f"{path}{name}")
    return found


def extension_of(parent: dict[str, Any], known: str) -> dict[str, Any]:
    """Return the field `videollm_mod` of an event or a request, which has one known name."""
    found = object_of(parent, "videollm_mod")
    if unknown := sorted(set(found) - {known}):
        name = f"videollm_mod.{unknown[0]}"
        raise RequestError(f"`{name}` is unknown: only `{known}` is.", code="unknown_parameter", param=name)
    return found


def text_of(parent: dict[str, Any], name: str, *, path: str = "", needed: bool = False) -> str | None:
    """Return a field of an event that must be a text, `None` without it."""
    found = parent.get(name)
    if not (isinstance(found, str) or (found is None and not needed)):
        raise RequestError(f"`{path}{name}` must be a text.", code="invalid_type", param=f"{path}{name}")
    return found


def boolean_of(parent: dict[str, Any], name: str, *, path: str = "", default: bool = False) -> bool:
    """Return a field of an event or a request that must be true or false, without it the default."""
    found = parent.get(name)
    if not (found is None or isinstance(found, bool)):
        raise RequestError(f"`{path}{name}` must be true or false.", code="invalid_type", param=f"{path}{name}")
    return default if found is None else found


def check_model(known: str, name: Any, *, param: str = "model") -> None:
    """Raise [`RequestError`] if a client asks for another model than the `known` one."""
    if name != known:
        wrong = f"There is no model {name!r} here; this server has {known!r}."
        raise RequestError(wrong, status=404, code="model_not_found", param=param)


__all__ = ["boolean_of", "check_model", "event_id_of", "extension_of", "object_of", "parse_event", "text_of"]
