# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a chat request asks for."""

import json
from dataclasses import dataclass
from typing import Any

from .event_fields import boolean_of, extension_of, object_of
from .limits import Limits, RequestError


# Fields that have no effect: the model takes the most likely token, calls no tool, and the server keeps nothing.
_WITHOUT_EFFECT = {"temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "parallel_tool_calls"}
_WITHOUT_EFFECT |= {"user", "metadata", "store", "safety_identifier", "service_tier"}
_WITHOUT_EFFECT |= {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
# Fields that would change the answer, with the values that ask for nothing. `null` does too.
_ONLY: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "videollm_mod"}
_SYSTEM = ("system", "developer")
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
        seconds (`float`): The length of a video that was fetched.
    """

    kind: str
    url: str
    param: str
    seconds: float = 0.0


class ChatRequest:
    """
    A chat request, checked.

    Args:
        body (`dict`): The body of the request.
        limits ([`Limits`]): What is accepted.

    Attributes:
        parts (`list`): Pictures and videos as [`Media`], and texts as pairs of role and text, up to the question.
        question (`str`, *optional*): The text of the last message. `None` if it has only pictures and videos.
        system_prompt (`str`, *optional*): The text of the system messages at the beginning.
        max_tokens (`int`, *optional*): Most tokens of the answer.
        fps (`float`): Frames per second at which videos are seen.
        stream (`bool`), include_usage (`bool`): How the answer is sent.

    Raises:
        [`RequestError`]: If a field is wrong.
    """

    def __init__(self, body: dict[str, Any], limits: Limits) -> None:
        unknown = sorted(set(body) - _KNOWN - _WITHOUT_EFFECT - set(_ONLY))
        if unknown:
            raise RequestError(f"`{unknown[0]}` is not supported.", code="unknown_parameter", param=unknown[0])
        for name, allowed in _ONLY.items():
            _check_only(name, body.get(name), allowed)
        self.limits = limits
        self.stream = boolean_of(body, "stream")
        options = object_of(body, "stream_options")
        self.include_usage = boolean_of(options, "include_usage", path="stream_options.")
        name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
        self.max_tokens = body.get(name)
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise RequestError(f"`{name}` must be a positive number.", code="invalid_value", param=name)
        self.fps = self._check_fps(extension_of(body, "fps"))
        self.system_prompt: str | None = None
        self.parts: list[Media | tuple[str, str]] = []
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("`messages` must be a list of messages.", code="invalid_type", param="messages")
        for index, message in enumerate(messages):
            self._add_message(index, message)
        self._check_parts()
        last = self.parts[-1]
        self.question = None if isinstance(last, Media) else self.parts.pop()[1]

    def _check_fps(self, extension: dict[str, Any]) -> float:
        fps = 2.0 if extension.get("fps") is None else extension["fps"]
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
        if role == "assistant":
            _refuse_calls(message, path)
            if content is None:
                content = message.get("refusal") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            wrong = "`content` must be a text or a list of parts."
            raise RequestError(wrong, code="invalid_type", param=f"{path}.content")
        texts = []
        for number, part in enumerate(parts):
            field = f"{path}.content.{number}"
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif part.get("type") == "refusal" and isinstance(part.get("refusal"), str) and role == "assistant":
                texts.append(part["refusal"])
            elif part.get("type") in ("image_url", "video_url") and role == "user":
                self.parts.append(_media(part, field))
            else:
                wrong = "A part can be text, for users image_url or video_url, and for assistants refusal."
                raise RequestError(wrong, code="invalid_value", param=f"{field}.type")
        self._add_text(role, "\n".join(texts), path)

    def _add_text(self, role: str, text: str, path: str) -> None:
        self.limits.check_text(text, param=f"{path}.content")
        if role in _SYSTEM and not self.parts:
            # The prompt is read as a whole, so the limit holds for all messages that it consists of.
            prompt = text if self.system_prompt is None else f"{self.system_prompt}\n{text}"
            self.limits.check_text(prompt, param=f"{path}.content")
            self.system_prompt = prompt
        elif text.strip():
            # The model knows one system prompt, at the beginning. Later instructions are what the user says.
            self.parts.append(("user" if role in _SYSTEM else role, text))

    def _check_parts(self) -> None:
        last = self.parts[-1] if self.parts else None
        if last is None or (not isinstance(last, Media) and last[0] != "user"):
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


def _check_only(name: str, given: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value of a field that would change the answer."""
    # In Python, true is 1.
    if given is not None and not any(type(given) is type(value) and given == value for value in allowed):
        shown = " or ".join(json.dumps(value) for value in (*allowed, None))
        raise RequestError(f"`{name}` can only be {shown}.", code="unsupported_value", param=name)


def _refuse_calls(message: dict[str, Any], path: str) -> None:
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            wrong = f"`{name}` is not supported: the model calls no tool and has no voice."
            raise RequestError(wrong, code="unsupported_value", param=f"{path}.{name}")


__all__ = ["ChatRequest", "Media"]
