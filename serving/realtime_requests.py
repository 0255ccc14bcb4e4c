# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the events of a realtime client ask for."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from pydantic import ValidationError
from transformers.utils import logging

from .event_fields import boolean_of, check_model, event_id_of, extension_of, object_of, parse_event, text_of
from .fetching import read_data_uri, read_picture
from .limits import RequestError
from .live_session import LiveSession
from .realtime import Conversation
from .realtime_audio import append_audio, clear_audio, commit_audio, read_audio, read_modalities
from .session_options import SessionOptions
from .telling import Reply


logger = logging.get_logger(__name__)

# Fields of OpenAI's session object that have no effect here. `session.updated` lists those that were given.
_IGNORED = ("include", "parallel_tool_calls", "prompt", "reasoning", "tool_choice", "tools", "tracing")
_IGNORED += ("truncation",)
_KNOWN = {"type", "object", "id", "expires_at", "model", "instructions", "max_output_tokens", "output_modalities"}
_KNOWN |= {"audio", "videollm_mod"}
# The same for fields of its response object. `response.created` lists them.
_IGNORED_OF_RESPONSE = {*_IGNORED, "audio", "max_output_tokens"}
_KNOWN_OF_RESPONSE = {"conversation", "input", "instructions", "metadata", "output_modalities"}
# Limits of OpenAI's protocol: entries of metadata, characters of its names and values.
_MOST_METADATA, _MOST_NAME, _MOST_VALUE = 16, 64, 512
_ROLES = {"user": "input_text", "system": "input_text", "assistant": "output_text"}


async def handle_event(conversation: Conversation, text: str | None) -> None:
    """Do what an event of a client says. If that is not possible, the client gets an `error` event."""
    event: Any = None
    try:
        event = parse_event(text)
        if event["type"] not in _HANDLERS:
            known = ", ".join(sorted(_HANDLERS))
            wrong = f"The event type {event['type']!r} is unknown. Known types are {known}."
            raise RequestError(wrong, code="invalid_value", param="type")
    except Exception as error:
        _tell_fault(conversation, event, error)
        return
    await conversation.session.lock.acquire()
    # A connection that ends cancels this call. The event goes on, since the client may have its confirmation already.
    await asyncio.shield(conversation.session.sessions.start(_take_effect(conversation, event)))


async def _take_effect(conversation: Conversation, event: dict[str, Any]) -> None:
    """Do what an event says, and release the lock of its session."""
    try:
        await _HANDLERS[event["type"]](conversation, event)
    except Exception as error:
        _tell_fault(conversation, event, error)
    finally:
        conversation.session.lock.release()


def _tell_fault(conversation: Conversation, event: Any, error: Exception) -> None:
    if not isinstance(error, RequestError):
        logger.error("An event failed.", exc_info=error)
        error = RequestError("The server failed at this event.", status=500, code="server_error")
    conversation.fail(error, event_id_of(event))


# ------------------------------------------------------------------------------------------------------------- session


async def _update_session(conversation: Conversation, event: dict[str, Any]) -> None:
    asked, session = object_of(event, "session", needed=True), conversation.session
    unknown = sorted(set(asked) - _KNOWN - set(_IGNORED))
    if unknown:
        name = f"session.{unknown[0]}"
        raise RequestError(f"`{name}` is unknown.", code="unknown_parameter", param=name)
    for name in ("object", "id"):
        text_of(asked, name, path="session.")
    if text_of(asked, "type", path="session.") not in (None, "realtime"):
        raise RequestError("`session.type` can be 'realtime' only.", code="invalid_value", param="session.type")
    if (model := text_of(asked, "model", path="session.")) is not None:
        check_model(conversation.model, model, param="session.model")
    instructions = text_of(asked, "instructions", path="session.")
    options = read_options(object_of(asked, "videollm_mod", path="session."), session.options)
    most = _most_tokens(asked.get("max_output_tokens"), session)
    audio, ignored, errors = read_audio(asked, conversation.audio, session.limits)
    entered = await session.update(options, instructions=instructions, max_output_tokens=most)
    conversation.audio = audio
    # The model remembers instructions that it has heard.
    stays = instructions is not None and entered is None and instructions.strip() != session.instructions.strip()
    ignored = sorted([*(name for name in asked if name in _IGNORED), *ignored, *(["instructions"] if stays else [])])
    described = conversation.describe(ignored=ignored or None, instructions_entered=entered)
    conversation.emit("session.updated", session=described)
    for error in errors:
        conversation.fail(error, event_id_of(event))


def read_options(
    given: dict[str, Any], current: SessionOptions | None = None, *, path: str = "session.videollm_mod"
) -> SessionOptions:
    """
    Return session options with changes.

    Args:
        given (`dict`): The changes.
        current ([`SessionOptions`], *optional*): The options so far, by default the defaults.
        path (`str`, *optional*): Where the changes stand, for errors.

    Raises:
        [`RequestError`]: If a name is unknown, or a value is wrong.
    """
    try:
        return SessionOptions.model_validate({**(current.model_dump() if current else {}), **given})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join([path, *map(str, first["loc"])]).lstrip(".")
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise RequestError(f"`{name}`: {first['msg']}.", code=code, param=name) from None


def _most_tokens(given: Any, session: LiveSession) -> int | None:
    if given == "inf":
        return session.limits.max_output_tokens
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        wrong = "`session.max_output_tokens` must be a positive number or 'inf'."
        raise RequestError(wrong, code="invalid_value", param="session.max_output_tokens")
    return given


async def _heartbeat(conversation: Conversation, _: dict[str, Any]) -> None:
    conversation.session.touch()
    conversation.emit("session.heartbeat_ack")


async def _close_session(conversation: Conversation, _: dict[str, Any]) -> None:
    await conversation.session.close()


# --------------------------------------------------------------------------------------------------------------- items


async def _create_item(conversation: Conversation, event: dict[str, Any]) -> None:
    item, session = object_of(event, "item", needed=True), conversation.session
    parts, role = _check_item(conversation, item)
    told = _check_place(conversation, event)
    time = extension_of(event, "time").get("time")
    if time is not None and (isinstance(time, bool) or not isinstance(time, (int, float))):
        raise RequestError("`videollm_mod.time` must be seconds.", code="invalid_type", param="videollm_mod.time")
    as_whom = "assistant" if role == "assistant" else "user"  # later instructions are what the user says
    if texts := [part["text"] for part in parts if part["type"] != "input_image"]:
        if conversation.hearing.is_busy:
            conversation.hearing.check_room(len(texts))
        count = conversation.hearing.num_waiting + len(texts)
        await session.check_text("\n".join(texts), role=as_whom, param="item.content", count=count)
    item_id = item.get("id") or f"item_{secrets.token_hex(10)}"
    frame = picture = None
    for index, part in enumerate(parts):
        if part["type"] == "input_image":
            frame = session.new_frame(time=time, item_id=item_id, param="videollm_mod.time")
            param = f"item.content.{index}.image_url"
            if frame.fate is None:
                picture = await session.sessions.run(lambda url=part["image_url"], p=param: _read(url, session, p))
    shown = [{name: part[name] for name in _shown_of(part)} for part in parts]
    kept = {"id": item_id, "object": "realtime.item", "type": "message", "status": "completed", "role": role}
    conversation.add_item(kept | {"content": shown}, has_frame=frame is not None, **told)
    for part in parts:
        if part["type"] == "input_image":
            await session.push(frame, picture)
        else:
            say = partial(session.ask, part["text"], reply_now=False, role=as_whom)
            await conversation.hearing.in_order(say, event_id_of(event))


def _check_item(conversation: Conversation, item: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the parts of an item that a client creates, and its role."""
    if item.get("type") != "message":
        wrong = f"Only items of type 'message' are supported, got {item.get('type')!r}."
        raise RequestError(wrong, code="invalid_value", param="item.type")
    role, parts = text_of(item, "role", path="item."), item.get("content")
    item_id = text_of(item, "id", path="item.")
    if item_id in conversation.items or (item_id is not None and not 0 < len(item_id) <= 64):
        raise RequestError("`item.id` must be new, of 1 to 64 characters.", code="invalid_value", param="item.id")
    if role not in _ROLES:
        raise RequestError(f"`item.role` can be {', '.join(_ROLES)}.", code="invalid_value", param="item.role")
    if role == "assistant" and conversation.session.num_received:
        wrong = "Earlier replies can be added before the first frame only."
        raise RequestError(wrong, code="invalid_value", param="item.role")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise RequestError("`item.content` must be a list of parts.", code="invalid_type", param="item.content")
    allowed = (_ROLES[role], "text") + (("input_image",) if role == "user" else ())
    for index, part in enumerate(parts):
        path = f"item.content.{index}."
        if part.get("type") not in allowed:
            wrong = f"A part of a message of the {role} can be {', '.join(allowed)}, not {part.get('type')!r}."
            raise RequestError(wrong, code="invalid_value", param=f"{path}type")
        text = text_of(part, "image_url" if part["type"] == "input_image" else "text", path=path, needed=True)
        if not text.strip():
            raise RequestError("A text must not be empty.", code="invalid_value", param=f"{path}text")
    if sum(part["type"] == "input_image" for part in parts) > 1:
        raise RequestError("Send one frame per item.", code="invalid_value", param="item.content")
    return parts, role


def _check_place(conversation: Conversation, event: dict[str, Any]) -> dict[str, Any]:
    """Check after which item a new one is to come. Return what its event says about that."""
    wanted = text_of(event, "previous_item_id")
    if wanted is None or wanted == (conversation.last_item or "root"):
        return {}
    if wanted != "root" and wanted not in conversation.items:
        wrong = f"There is no item {wanted!r}, or it is too old: without `previous_item_id` an item comes last."
        raise RequestError(wrong, code="item_create_invalid_previous_item_id", param="previous_item_id")
    # A stream only grows at its end, so the item comes last. This is no error, because LiveKit sends older ids.
    return {"videollm_mod": {"ignored": ["previous_item_id"]}}


def _shown_of(part: dict[str, Any]) -> tuple[str, ...]:
    """Return the fields of a part that its item keeps."""
    return ("type",) if part["type"] == "input_image" else ("type", "text")


def _read(url: str, session: LiveSession, param: str) -> Any:
    data = read_data_uri(url, most_bytes=session.limits.max_frame_bytes, param=param)
    return read_picture(data, session.limits, param=param)


async def _retrieve_item(conversation: Conversation, event: dict[str, Any]) -> None:
    item_id = text_of(event, "item_id", needed=True)
    if item_id not in conversation.items:
        wrong = f"There is no item {item_id!r}, or it is too old."
        raise RequestError(wrong, code="item_retrieve_invalid_item_id", param="item_id")
    conversation.emit("conversation.item.retrieved", item=conversation.shown(item_id))


async def _truncate_item(conversation: Conversation, event: dict[str, Any]) -> None:
    """
    Take note that a client has stopped the speech of a reply. Agents send this at each interruption, and some end at
    an error. What the model has said stays in its memory, and the answer says so.
    """
    item_id, index = text_of(event, "item_id", needed=True), event.get("content_index")
    item, milliseconds = conversation.items.get(item_id), event.get("audio_end_ms")
    parts = [] if item is None or item["role"] != "assistant" else item["content"] or [{"type": "output_audio"}]
    if "output_audio" not in {part["type"] for part in parts}:
        wrong = f"There is no reply {item_id!r} that was spoken, or it is too old."
        raise RequestError(wrong, code="item_truncate_invalid_item_id", param="item_id")
    for name, value in (("content_index", index), ("audio_end_ms", milliseconds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"`{name}` must be a number from 0 on.", code="invalid_type", param=name)
    told = {"item_id": item_id, "content_index": index, "audio_end_ms": milliseconds}
    conversation.emit("conversation.item.truncated", **told, videollm_mod={"remembered": True})


async def _refuse_change(_: Conversation, event: dict[str, Any]) -> None:
    wrong = f"{event['type']} is not supported: what the model has seen and said stays in its memory."
    raise RequestError(wrong, code="unsupported_event", param="type")


# ----------------------------------------------------------------------------------------------------------- responses


async def _create_response(conversation: Conversation, event: dict[str, Any]) -> None:
    asked = object_of(event, "response")
    if unknown := sorted(set(asked) - _KNOWN_OF_RESPONSE - _IGNORED_OF_RESPONSE):
        wrong = f"`response.{unknown[0]}` is unknown."
        raise RequestError(wrong, code="unknown_parameter", param=f"response.{unknown[0]}")
    for name in ("input", "conversation"):
        if asked.get(name) not in (None, "auto"):
            wrong = f"`response.{name}` is not supported: a response belongs to the stream."
            raise RequestError(wrong, code="invalid_value", param=f"response.{name}")
    instructions = text_of(asked, "instructions", path="response.")
    metadata = _metadata(asked)
    interrupt = boolean_of(extension_of(event, "interrupt"), "interrupt", path="videollm_mod.")
    text = instructions if instructions and instructions.strip() else None
    if text is not None:
        await conversation.session.check_text(text, param="response.instructions")
    is_spoken, ignored = read_modalities(asked, "response.", conversation.audio)
    ignored = sorted([*(name for name in _IGNORED_OF_RESPONSE if asked.get(name) is not None), *ignored])
    options = {"metadata": metadata, "is_spoken": is_spoken, "ignored": ignored}
    if interrupt:
        conversation.silence()
    waits = conversation.hearing.is_busy

    async def ask() -> None:
        if waits and conversation.hearing.has_failed:
            wrong = "There is no transcript of the question, so there is no response to it."
            raise RequestError(wrong, code="transcription_failed")
        await conversation.session.ask(text, interrupt=interrupt, **options)

    reply = Reply(is_asked=True, is_cancelled=True, **options)
    await conversation.hearing.in_order(ask, event_id_of(event), reply)


def _metadata(asked: dict[str, Any]) -> dict[str, str] | None:
    """Return the metadata of a response, which its events repeat."""
    given = object_of(asked, "metadata", path="response.")
    are_short = all(
        len(name) <= _MOST_NAME and isinstance(value, str) and len(value) <= _MOST_VALUE
        for name, value in given.items()
    )
    if len(given) > _MOST_METADATA or not are_short:
        wrong = f"`response.metadata` may have {_MOST_METADATA} texts of at most {_MOST_VALUE} characters, with names "
        wrong += f"of at most {_MOST_NAME}."
        raise RequestError(wrong, code="invalid_value", param="response.metadata")
    return given or None


async def _cancel_response(conversation: Conversation, event: dict[str, Any]) -> None:
    wanted, session = text_of(event, "response_id"), conversation.session
    session.touch()
    reply = conversation.silence(wanted)
    if reply is None and (wanted is None or (session.reply is not None and session.reply.reply_id == wanted)):
        reply = await conversation.cancel()
    if reply is None:
        wrong = "Cancellation failed: no active response found."
        raise RequestError(wrong, code="response_cancel_not_active", param="response_id")


_HANDLERS: dict[str, Callable[[Conversation, dict[str, Any]], Awaitable[None]]] = {
    "session.update": _update_session,
    "session.heartbeat": _heartbeat,
    "session.close": _close_session,
    "conversation.item.create": _create_item,
    "conversation.item.retrieve": _retrieve_item,
    "conversation.item.delete": _refuse_change,
    "conversation.item.truncate": _truncate_item,
    "response.create": _create_response,
    "response.cancel": _cancel_response,
    "input_audio_buffer.append": append_audio,
    "input_audio_buffer.commit": commit_audio,
    "input_audio_buffer.clear": clear_audio,
}


__all__ = ["handle_event", "read_options"]
