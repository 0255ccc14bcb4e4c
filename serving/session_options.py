# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a client may set for a session."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .limits import Limits, RequestError


# Options that are fixed when a stream is opened.
MEMORY = ("max_frames", "max_text_tokens")


class SessionOptions(BaseModel):
    """
    What a client may set for a session, besides its instructions. `None` means the default.

    `max_frames` and `max_text_tokens` cannot change after the first frame or question, because they reserve memory.
    `unprompted` switches off all speech that nobody asked for. The others are options of [`StreamingSession`].
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    fps: float = Field(2.0, gt=0)
    interval_threshold: float | None = Field(None, ge=0, le=1)
    unprompted: bool = True
    speak: Literal["learned", "every", "change", "probe"] | None = None
    every: float | None = Field(None, gt=0)
    speak_threshold: float | None = None
    prompt: str | None = Field(None, max_length=1000)
    no_repeat: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=0)
    min_silence: float | None = Field(None, ge=0)
    max_frames: int | None = Field(None, ge=1)
    max_text_tokens: int | None = Field(None, ge=1)

    def speaking(self) -> dict[str, Any]:
        """Return the options of [`~StreamingSession.set_speaking`]."""
        if not self.unprompted:
            return {"speak": lambda _: False}
        names = ("speak", "every", "speak_threshold", "prompt", "no_repeat", "max_words", "min_silence")
        return {name: getattr(self, name) for name in names}

    def memory(self) -> dict[str, int | None]:
        """Return the options that are fixed when a stream is opened."""
        return {name: getattr(self, name) for name in MEMORY}


def check_fps(fps: float, limits: Limits, path: str) -> None:
    """Raise [`RequestError`] if a stream asks for too many frames per second. `path` is where options stand."""
    if fps > limits.max_fps:
        wrong = f"`fps` may be at most {limits.max_fps:g}, got {fps:g}."
        raise RequestError(wrong, code="invalid_value", param=field_of(path, "fps"))


def field_of(path: str, name: str) -> str:
    """Return the field of a request in which an option stands."""
    return f"{path}.{name}" if path else name


__all__ = ["MEMORY", "SessionOptions", "check_fps", "field_of"]
