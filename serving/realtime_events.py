# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Objects of OpenAI's realtime protocol, with what this server adds to them in the field `videollm_mod`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .live_session import LiveSession
from .telling import Reply


def session_object(session: LiveSession, model: str, **added: Any) -> dict[str, Any]:
    """Return the session object. `added` goes into the extension field, except what is empty."""
    stream, sessions = session.stream.session, session.sessions
    extension = session.options.model_dump()
    extension |= {"max_frames": stream.max_frames, "max_text_tokens": stream.max_text_tokens}
    extension |= {"speak": session.options.speak or sessions.default_speak, "when_behind": sessions.when_behind}
    extension |= {"resume_token": session.token, "limits": asdict(session.limits)}
    extension |= {name: value for name, value in added.items() if value}
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session.session_id,
        "model": model,
        "output_modalities": ["text"],
        "instructions": session.instructions,
        "max_output_tokens": session.max_output_tokens,
        "videollm_mod": extension,
    }


def response_object(reply: Reply, output: list[dict[str, Any]], conversation: str, max_tokens: int) -> dict[str, Any]:
    """Return a response, with the items that it consists of so far."""
    status, details = _status(reply, max_tokens)
    return {
        "object": "realtime.response",
        "id": reply.reply_id,
        "status": status,
        "status_details": details,
        "output": output,
        "conversation_id": conversation,
        "output_modalities": ["text"],
        "max_output_tokens": max_tokens,
        "metadata": reply.metadata,
        "usage": None if status == "in_progress" else usage(reply),
    }


def _status(reply: Reply, max_tokens: int) -> tuple[str, dict[str, Any] | None]:
    if reply.is_cancelled and (reply.event is None or reply.event.interrupted):
        has_ended = reply.is_over or reply.is_failed
        return _because("cancelled", "client_cancelled") if has_ended else ("in_progress", None)
    if reply.is_failed:
        return "failed", {"type": "failed", "error": {"type": "server_error", "code": "session_failed"}}
    if reply.event is None:
        return "in_progress", None
    if reply.event.interrupted:
        return _because("cancelled", "turn_detected")
    if len(reply.event.token_ids) >= max_tokens:
        return _because("incomplete", "max_output_tokens")
    return "completed", None


def _because(status: str, reason: str) -> tuple[str, dict[str, Any]]:
    return status, {"type": status, "reason": reason}


def usage(reply: Reply) -> dict[str, Any]:
    """Return the tokens of a response. Its input is all that is in the cache; `cached` was there before."""
    written = len(reply.event.token_ids) if reply.event is not None else 0
    read, image, cached = reply.context, min(reply.image, reply.context), reply.cached
    details = {"text_tokens": read - image, "audio_tokens": 0, "image_tokens": image, "cached_tokens": cached}
    return {
        "total_tokens": read + written,
        "input_tokens": read,
        "output_tokens": written,
        "input_token_details": details,
        "output_token_details": {"text_tokens": written, "audio_tokens": 0},
    }


def response_end(reply: Reply, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events, with their fields, that end the item of a response."""
    named = {"response_id": reply.reply_id, "output_index": 0}
    part = {"item_id": item["id"], "content_index": 0}
    yield "response.output_text.done", {**named, **part, "text": reply.text}
    yield "response.content_part.done", {**named, **part, "part": {"type": "text", "text": reply.text}}
    yield "response.output_item.done", {**named, "item": item}


__all__ = ["response_end", "response_object", "session_object", "usage"]
