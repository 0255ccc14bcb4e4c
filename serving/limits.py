# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a server accepts, and the error that says so."""

from dataclasses import dataclass, fields
from typing import Any

from ..checks_videollm_mod import check_count, check_number


# Characters of a message or a field name in an error. Both may repeat what a client sent, and sessions keep events.
_MOST_TOLD = 1000


@dataclass(frozen=True)
class Limits:
    """
    Limits of a server.

    Args:
        max_event_bytes (`int`): Largest event of a WebSocket. A larger one closes the connection with code 1009.
        max_body_bytes (`int`): Largest body of a chat request, which may hold pictures and videos.
        max_json_bytes (`int`): Largest body of other requests with JSON.
        max_held_bytes (`int`): Most bytes of bodies that are held at once. Beyond it requests get 503.
        max_connections (`int`): Most requests and WebSockets at once. Beyond it further ones get 503, except
            `/health`. Of so many more connections without a request, the oldest is closed.
        max_frame_bytes (`int`): Largest JPEG or PNG file of a frame.
        max_frame_pixels (`int`): Largest picture, width times height.
        max_video_bytes (`int`): Most bytes of all pictures and videos of a chat request.
        max_video_seconds (`float`): Longest video of a chat request.
        max_fps (`float`): Most frames per second that a stream may ask to be seen.
        max_output_tokens (`int`): Most tokens of a reply.
        max_text (`int`): Most characters of a question, an instruction or a system prompt.
        max_waiting (`int`): Frames of a stream that may wait. Beyond it the oldest is dropped.
        max_unsent (`int`): Events that a client may leave unread. A slower client is disconnected with code 1013,
            which it may not get, and its session waits to be resumed.
        idle_seconds (`float`): A session without events from its client ends after so many seconds.
        resume_seconds (`float`): A session whose connection broke off waits so many seconds to be resumed.
        fetch_seconds (`float`): Seconds that a URL may take.
        show_seconds (`float`): Seconds in which the pictures and videos of a chat request must be fetched and seen.
        head_seconds (`float`): Seconds from the beginning of a connection, or from an answer, in which the head of a
            request must come. Then the connection is closed.
        body_seconds (`float`): Seconds that the body of a request may take. A client that leaves an answer or an event
            unread for so long is disconnected.
        stall_seconds (`float`): A step of the engine that takes longer makes `/health` answer 503.
        reply_seconds (`float`): Seconds that an HTTP request may wait for the model.
        max_audio_seconds (`float`): Seconds of audio of a session that wait to be committed or transcribed.
        max_speech_seconds (`float`): Longest speech of a reply.
        speech_seconds (`float`): Seconds that a transcript, or the speech of a sentence, may take.
    """

    max_event_bytes: int = 15_000_000
    max_body_bytes: int = 64_000_000
    max_json_bytes: int = 200_000
    max_held_bytes: int = 256_000_000
    max_connections: int = 1000
    max_frame_bytes: int = 4_000_000
    max_frame_pixels: int = 4096 * 2304
    max_video_bytes: int = 200_000_000
    max_video_seconds: float = 1800.0
    max_fps: float = 30.0
    max_output_tokens: int = 100
    max_text: int = 8000
    max_waiting: int = 16
    max_unsent: int = 1000
    idle_seconds: float = 300.0
    resume_seconds: float = 60.0
    fetch_seconds: float = 30.0
    head_seconds: float = 10.0
    body_seconds: float = 120.0
    show_seconds: float = 300.0
    stall_seconds: float = 60.0
    reply_seconds: float = 120.0
    max_audio_seconds: float = 60.0
    max_speech_seconds: float = 60.0
    speech_seconds: float = 15.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int"):
                check_count(field.name, value)
            else:
                check_number(field.name, value, above=0)

    def check_text(self, text: str, *, param: str | None = None) -> None:
        """Raise [`RequestError`] if a text of a client is too long, or holds half of a surrogate pair."""
        if len(text) > self.max_text:
            wrong = f"The text has {len(text)} characters, and the limit is {self.max_text}."
            raise RequestError(wrong, code="text_too_long", param=param)
        try:
            text.encode()
        except UnicodeEncodeError:
            wrong = "The text is not Unicode: it holds half of a surrogate pair."
            raise RequestError(wrong, code="invalid_value", param=param) from None


class RequestError(ValueError):
    """
    A request or an event that the server does not accept, in the form that OpenAI's API gives errors.

    Args:
        message (`str`): What is wrong, and what to do.
        status (`int`, *optional*, defaults to 400): Status of an HTTP response.
        code (`str`, *optional*): Short name of the error.
        param (`str`, *optional*): The field that is wrong.
        retry_after (`float`, *optional*): Seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of an HTTP response."""
        headers = {"Cache-Control": "no-store"}  # it may be another one soon, and addresses may have tokens
        return headers if self.retry_after is None else headers | {"Retry-After": str(max(1, round(self.retry_after)))}

    def to_dict(self) -> dict[str, Any]:
        """Return the `error` object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        param = None if self.param is None else _told(self.param)
        return {"type": kind, "code": self.code, "message": _told(str(self)), "param": param}


def _told(text: str) -> str:
    """Return a text that may repeat what a client sent, as every JSON encoder takes it."""
    return text[:_MOST_TOLD].encode("utf-8", "backslashreplace").decode()


__all__ = ["Limits", "RequestError"]
