# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a chat request asks for."""

from dataclasses import dataclass
from typing import Any

from .limits import Limits, RequestError


# Fields that have no effect: the model takes the most likely token, and gives one answer.
_WITHOUT_EFFECT = {
    "temperature",
    "top_p",
    "seed",
    "user",
    "metadata",
    "store",
    "frequency_penalty",
    "presence_penalty",
}
_WITHOUT_EFFECT |= {"safety_identifier", "prompt_cache_key"}
_KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "videollm_mod"}
_ROLES = ("system", "developer", "user", "assistant")
_MOST_URLS = 16


@dataclass(frozen=True)
class Media:
    """
    A picture or a video of a message.

    Attributes:
        kind (`str`): `"image_url"` or `"video_url"`.
        url (`str`): Its URL.
        param (`str`): The field of the request.
    """

    kind: str
    url: str
    param: str


class ChatRequest:
    """
    A chat request, checked.

    Args:
        body (`dict`): The body of the request.
        limits ([`Limits`]): What is accepted.

    Attributes:
        parts (`list`): Pictures and videos as [`Media`], and texts as pairs of role and text. The last one is the
            question.
        system_prompt (`str`, *optional*): The text of the system message.
        max_tokens (`int`, *optional*): Most tokens of the answer.
        fps (`float`): Frames per second at which videos are seen.
        stream (`bool`), include_usage (`bool`): How the answer is sent.

    Raises:
        [`RequestError`]: If a field is wrong.
    """

    def __init__(self, body: dict[str, Any], limits: Limits) -> None:
        unknown = sorted(set(body) - _KNOWN - _WITHOUT_EFFECT)
        if unknown:
            raise RequestError(f"`{unknown[0]}` is not supported.", code="unknown_parameter", param=unknown[0])
        if body.get("n") not in (None, 1):
            raise RequestError("`n` can only be 1.", code="invalid_value", param="n")
        self.limits = limits
        self.stream = _boolean(body, "stream")
        self.include_usage = _boolean(_dict(body, "stream_options"), "include_usage")
        name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
        self.max_tokens = body.get(name)
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise RequestError(f"`{name}` must be a positive number.", code="invalid_value", param=name)
        self.fps = self._check_fps(_dict(body, "videollm_mod"))
        self.system_prompt: str | None = None
        self.parts: list[Media | tuple[str, str]] = []
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("`messages` must be a list of messages.", code="invalid_type", param="messages")
        for index, message in enumerate(messages):
            self._add_message(index, message)
        self._check_parts()

    def _check_fps(self, extension: dict[str, Any]) -> float:
        fps = extension.get("fps", 2.0)
        is_number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
        if not is_number or not 0 < fps <= self.limits.max_fps:
            wrong = f"`videollm_mod.fps` must be above 0 and at most {self.limits.max_fps:g}."
            raise RequestError(wrong, code="invalid_value", param="videollm_mod.fps")
        return float(fps)

    def _add_message(self, index: int, message: Any) -> None:
        path = f"messages.{index}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise RequestError(f"A role can be {', '.join(_ROLES)}.", code="invalid_value", param=f"{path}.role")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            wrong = "`content` must be a text or a list of parts."
            raise RequestError(wrong, code="invalid_type", param=f"{path}.content")
        texts = []
        for number, part in enumerate(parts):
            field = f"{path}.content.{number}"
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif part.get("type") in ("image_url", "video_url") and role == "user":
                self.parts.append(_media(part, field))
            else:
                wrong = "A part can be text, and for users image_url or video_url."
                raise RequestError(wrong, code="invalid_value", param=f"{field}.type")
        self._add_text(role, "\n".join(texts), index, path)

    def _add_text(self, role: str, text: str, index: int, path: str) -> None:
        self.limits.check_text(text, param=f"{path}.content")
        if role in ("system", "developer"):
            if index > 0:
                wrong = "A system message can only be the first message."
                raise RequestError(wrong, code="invalid_value", param=f"{path}.role")
            self.system_prompt = text
        elif text.strip():
            self.parts.append((role, text))

    def _check_parts(self) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Media):
            wrong = "The last message needs a text: what to say about the picture or video."
            raise RequestError(wrong, code="invalid_value", param="messages")
        if last is None or last[0] != "user":
            raise RequestError("The last message must be the user's.", code="invalid_value", param="messages")
        if sum(isinstance(part, Media) for part in self.parts) > _MOST_URLS:
            wrong = f"A request may have at most {_MOST_URLS} pictures and videos."
            raise RequestError(wrong, code="invalid_value", param="messages")


def _media(part: dict[str, Any], path: str) -> Media:
    kind = part["type"]
    url = part[kind].get("url") if isinstance(part.get(kind), dict) else None
    if not isinstance(url, str):
        wrong = f"`{kind}` must be an object with a `url`."
        raise RequestError(wrong, code="invalid_type", param=f"{path}.{kind}")
    return Media(kind, url, f"{path}.{kind}.url")


def _dict(body: dict[str, Any], name: str) -> dict[str, Any]:
    found = body.get(name) or {}
    if not isinstance(found, dict):
        raise RequestError(f"`{name}` must be an object.", code="invalid_type", param=name)
    return found


def _boolean(body: dict[str, Any], name: str) -> bool:
    found = body.get(name) or False
    if not isinstance(found, bool):
        raise RequestError(f"`{name}` must be true or false.", code="invalid_type", param=name)
    return found


__all__ = ["ChatRequest", "Media"]
