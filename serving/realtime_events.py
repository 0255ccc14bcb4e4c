# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Objects of OpenAI's realtime protocol, with what this server adds to them in the field `videollm_mod`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from .live_session import LiveSession
from .speech_endpoints import AUDIO_FORMAT, Speaker, Transcriber
from .telling import Reply


@dataclass(frozen=True)
class Audio:
    """
    How a session hears and speaks.

    Args:
        transcriber ([`Transcriber`], *optional*), speaker ([`Speaker`], *optional*): The operator's endpoints.
        is_spoken (`bool`): Whether replies are spoken, unless their client asks otherwise.
        language (`str`, *optional*), prompt (`str`, *optional*): What the transcriber gets to know.
    """

    transcriber: Transcriber | None = None
    speaker: Speaker | None = None
    is_spoken: bool = False
    language: str | None = None
    prompt: str | None = None

    @property
    def hints(self) -> dict[str, str]:
        """What the transcriber gets to know."""
        given = {"language": self.language, "prompt": self.prompt}
        return {name: value for name, value in given.items() if value}

    def settings(self) -> dict[str, Any]:
        """Return what the client has set."""
        return {name: getattr(self, name) for name in ("is_spoken", "language", "prompt")}

    def with_settings(self, settings: dict[str, Any]) -> "Audio":
        """Return this with what a client has set, also on another server, which may have had a speaker."""
        return replace(self, **settings | {"is_spoken": settings["is_spoken"] and self.speaker is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the field `audio` of the session object."""
        transcription = None if self.transcriber is None else {"model": self.transcriber.model, **self.hints}
        heard = {"format": AUDIO_FORMAT, "noise_reduction": None, "transcription": transcription}
        voice = {} if self.speaker is None else {"voice": self.speaker.voice}
        return {"input": heard | {"turn_detection": None}, "output": {"format": AUDIO_FORMAT, **voice}}


def session_object(session: LiveSession, model: str, audio: Audio, **added: Any) -> dict[str, Any]:
    """Return the session object. `added` goes into the extension field, except what is `None`."""
    stream, sessions = session.stream.session, session.sessions
    extension = session.options.model_dump()
    extension |= {"max_frames": stream.max_frames, "max_text_tokens": stream.max_text_tokens}
    # A session that says nothing by itself follows a function.
    speak = stream.speak if session.options.unprompted else session.options.speak or sessions.default_speak
    extension |= {"speak": speak, "when_behind": sessions.when_behind}
    extension |= {"resume_token": session.token, "limits": asdict(session.limits)}
    extension |= {} if sessions.save_seconds is None else {"save_seconds": sessions.save_seconds}
    extension |= {name: value for name, value in added.items() if value is not None}
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session.session_id,
        "model": model,
        "audio": audio.to_dict(),
        "output_modalities": modalities(audio.is_spoken),
        "instructions": session.instructions,
        "max_output_tokens": session.max_output_tokens,
        "videollm_mod": extension,
    }


def modalities(is_spoken: bool | None) -> list[str]:
    """Return what the protocol calls the output modalities. Speech always comes with its text."""
    return ["audio"] if is_spoken else ["text"]


def response_object(
    reply: Reply, output: list[dict[str, Any]], conversation: str, max_tokens: int, *, begins: bool = False
) -> dict[str, Any]:
    """Return a response, with the items that it consists of so far. One that `begins` is in progress."""
    # It may have been cancelled before it began. The protocol says so at its end.
    status, details = ("in_progress", None) if begins else _status(reply, max_tokens)
    return {
        "object": "realtime.response",
        "id": reply.reply_id,
        "status": status,
        "status_details": details,
        "output": output,
        "conversation_id": conversation,
        "output_modalities": modalities(reply.is_spoken),
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
    if reply.is_silenced:
        return _because("cancelled", "client_cancelled")
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


def content_part(reply: Reply) -> dict[str, Any]:
    """Return the part that holds the text of a response so far, in its events."""
    return {"type": "audio", "transcript": reply.text} if reply.is_spoken else {"type": "text", "text": reply.text}


def item_content(reply: Reply) -> list[dict[str, Any]]:
    """Return the content of the item of a response."""
    if reply.is_spoken:
        return [{"type": "output_audio", "transcript": reply.text}]
    return [{"type": "output_text", "text": reply.text}]


def text_event(reply: Reply, words: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the event, with its fields, that tells new words of a response, or without them its complete text."""
    kind = "output_audio_transcript" if reply.is_spoken else "output_text"
    if words is not None:
        return f"response.{kind}.delta", {"delta": words}
    return f"response.{kind}.done", {"transcript" if reply.is_spoken else "text": reply.text}


def response_end(reply: Reply, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events, with their fields, that end the item of a response after its text."""
    named = {"response_id": reply.reply_id, "output_index": 0}
    part = {"item_id": item["id"], "content_index": 0}
    if reply.is_spoken:
        yield "response.output_audio.done", {**named, **part}
    yield "response.content_part.done", {**named, **part, "part": content_part(reply)}
    yield "response.output_item.done", {**named, "item": item}


__all__ = [
    "Audio",
    "content_part",
    "item_content",
    "modalities",
    "response_end",
    "response_object",
    "session_object",
    "text_event",
    "usage",
]
