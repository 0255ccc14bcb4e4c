# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the events of a realtime client say about audio."""

import base64
import binascii
import json
import secrets
from dataclasses import replace
from typing import Any

from .event_fields import object_of, text_of
from .limits import Limits, RequestError
from .realtime import Conversation
from .realtime_events import Audio, modalities
from .speech_endpoints import AUDIO_FORMAT, BYTES_PER_SECOND


# Fields of OpenAI's session object.
_FIELDS = {
    "audio": ("input", "output"),
    "input": ("format", "noise_reduction", "transcription", "turn_detection"),
    "transcription": ("delay", "keywords", "language", "languages", "model", "prompt"),
    "output": ("format", "speed", "voice"),
}
_KIND = "conversation.item.input_audio_transcription"
_HINTS = ("language", "prompt")  # for the transcriber


def read_audio(asked: dict[str, Any], current: Audio, limits: Limits) -> tuple[Audio, list[str], list[RequestError]]:
    """
    Return how a session hears and speaks, as an event asks for it.

    Many clients ask for speech and turn detection by default, and some end at the first error. So speech without a
    speaker, and turn detection without a transcriber, are fields without effect. With a transcriber, turn detection
    gets an error, because nothing would end a turn, and the rest of the event counts.

    Returns:
        [`Audio`], the names of fields without effect, and what this server does not do.

    Raises:
        [`RequestError`]: If a value is wrong, or audio has another format.
    """
    given = _known(asked, "session", "audio")
    heard, spoken = _known(given, "session.audio", "input"), _known(given, "session.audio", "output")
    hints = _known(heard, "session.audio.input", "transcription")
    for path, part in (("session.audio.input.", heard), ("session.audio.output.", spoken)):
        _check_format(part, path)
    for name in _HINTS:
        path = "session.audio.input.transcription."
        limits.check_text(text_of(hints, name, path=path) or "", param=path + name)
    changes = {name: hints[name] for name in _HINTS if name in hints}
    wants_turns, errors = heard.get("turn_detection") is not None, []
    is_spoken, ignored = read_modalities(asked, "session.", current)
    if wants_turns and current.transcriber is not None:
        errors.append(_no_detection(heard))
    elif wants_turns:
        ignored.append("audio.input.turn_detection")
    changes |= {} if is_spoken is None else {"is_spoken": is_spoken}
    ignored += ["audio.input.noise_reduction"] if heard.get("noise_reduction") is not None else []
    ignored += [f"audio.input.transcription.{name}" for name in hints if name not in _HINTS]
    ignored += [f"audio.output.{name}" for name in spoken if name != "format"]
    return replace(current, **changes), ignored, errors


def _known(parent: dict[str, Any], path: str, name: str) -> dict[str, Any]:
    """Return an object of the session, which must have fields of the protocol only."""
    found = object_of(parent, name, path=f"{path}.")
    for field in found:
        if field not in _FIELDS[name]:
            param = f"{path}.{name}.{field}"
            raise RequestError(f"`{param}` is unknown.", code="unknown_parameter", param=param)
    return found


def _check_format(given: dict[str, Any], path: str) -> None:
    wanted = object_of(given, "format", path=path)
    if wanted and AUDIO_FORMAT | wanted != AUDIO_FORMAT:
        wrong = f"`{path}format` can be {json.dumps(AUDIO_FORMAT)} only: samples of 16 bits, one channel, at 24 kHz."
        raise RequestError(wrong, code="invalid_value", param=f"{path}format")


def _no_detection(heard: dict[str, Any]) -> RequestError:
    kind = heard["turn_detection"].get("type") if isinstance(heard["turn_detection"], dict) else None
    named = f" {kind!r}" if kind in ("server_vad", "semantic_vad") else ""
    wrong = f"Turn detection{named} is not supported, only manual commits: set it to null and send "
    wrong += "`input_audio_buffer.commit` at the end of each turn."
    return RequestError(wrong, code="unsupported_value", param="session.audio.input.turn_detection")


def read_modalities(asked: dict[str, Any], path: str, audio: Audio) -> tuple[bool | None, list[str]]:
    """
    Return whether replies are to be spoken, `None` if it is not said, and the names of fields without effect. Without
    a speaker, replies come as text.
    """
    wanted = asked.get("output_modalities")
    if wanted is not None and wanted not in (modalities(True), modalities(False)):
        wrong = f'`{path}output_modalities` can be ["text"] or ["audio"]. Audio always comes with its text.'
        raise RequestError(wrong, code="invalid_value", param=f"{path}output_modalities")
    if wanted == modalities(True) and audio.speaker is None:
        return False, ["output_modalities"]
    return None if wanted is None else wanted == modalities(True), []


async def append_audio(conversation: Conversation, event: dict[str, Any]) -> None:
    conversation.session.touch()
    given = text_of(event, "audio", needed=True)
    try:
        audio = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("`audio` is not valid base64.", code="invalid_value", param="audio") from None
    conversation.hearing.append(audio)


async def commit_audio(conversation: Conversation, _: dict[str, Any]) -> None:
    conversation.session.touch()
    audio = conversation.hearing.take()
    part = {"type": "input_audio", "transcript": None}
    item = {"id": f"item_{secrets.token_hex(10)}", "object": "realtime.item", "type": "message"}
    item |= {"status": "completed", "role": "user", "content": [part]}
    committed = {"previous_item_id": conversation.last_item, "item_id": item["id"]}
    conversation.emit("input_audio_buffer.committed", **committed)
    conversation.add_item(item, has_frame=False)
    named = {"item_id": item["id"], "content_index": 0}

    def fail(error: RequestError) -> None:
        conversation.session.sessions.metrics.speech_failures.labels(error.code).inc()
        conversation.emit(f"{_KIND}.failed", **named, error=error.to_dict())

    async def transcribe() -> None:
        try:
            part["transcript"] = await _hear(conversation, audio)
        except RequestError as error:
            conversation.hearing.has_failed = True
            fail(error)
            return
        conversation.hearing.has_failed = False
        usage = {"type": "duration", "seconds": round(len(audio) / BYTES_PER_SECOND, 3)}
        conversation.emit(f"{_KIND}.completed", **named, transcript=part["transcript"], usage=usage)

    conversation.hearing.record(audio, transcribe, fail)


async def _hear(conversation: Conversation, audio: bytes) -> str:
    """Ask what a client has said, and return it."""
    session = conversation.session
    options = {"seconds": session.limits.speech_seconds, **conversation.audio.hints}
    text = await conversation.hearing.transcriber.transcribe(audio, **options)
    if text:
        async with session.lock:
            await session.ask(text, reply_now=False)
    return text


async def clear_audio(conversation: Conversation, _: dict[str, Any]) -> None:
    # Clients clear the buffer before they cancel a response, also without a microphone.
    conversation.hearing.clear()
    conversation.emit("input_audio_buffer.cleared")


__all__ = ["append_audio", "clear_audio", "commit_audio", "read_audio", "read_modalities"]
