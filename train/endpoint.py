# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ask a language model behind an OpenAI-compatible endpoint, with retries and a cache."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, OpenAI


class EndpointError(RuntimeError):
    """The endpoint gave no reply. The message says why in one line."""


class Endpoint:
    """
    A language model behind an OpenAI-compatible endpoint, such as that of vLLM, SGLang, Ollama or OpenAI.

    Args:
        base_url (`str`): Address of the API, such as `http://localhost:8000/v1`.
        model (`str`): Name of the model at this endpoint.
        api_key (`str`, *optional*): Key. Defaults to the variable `OPENAI_API_KEY`; a local server needs none.
        cache (`str` or `Path`, *optional*): Folder that keeps each reply under a hash of its request, so that a second
            run asks nothing twice.
        max_retries (`int`, *optional*, defaults to 4): How often a request is sent again after a lost connection, a
            timeout, or the status 408, 409, 429 or 5xx.
        timeout (`float`, *optional*, defaults to 120): Seconds to wait for a reply.

    Raises:
        `ValueError`: If `base_url` is no HTTP address.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        cache: str | Path | None = None,
        max_retries: int = 4,
        timeout: float = 120.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The endpoint must be an address such as http://localhost:8000/v1, got {base_url!r}.")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.cache = None if cache is None else Path(cache)
        # The client refuses to start without a key.
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = OpenAI(base_url=self.base_url, api_key=key, max_retries=max_retries, timeout=timeout)

    def complete(self, messages: Sequence[dict[str, Any]], *, max_tokens: int = 512, temperature: float = 0.0) -> str:
        """
        Return the model's reply to a conversation.

        Args:
            messages (sequence of `dict`): Messages with `role` and `content`.
            max_tokens (`int`, *optional*, defaults to 512): Length of the longest reply in tokens.
            temperature (`float`, *optional*, defaults to 0.0): Sampling temperature. 0 is greedy.

        Raises:
            [`EndpointError`]: If the endpoint cannot be reached or refuses the request after all retries.
        """
        request = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens}
        request["temperature"] = temperature
        kept = self._kept(request)
        if kept is not None and kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))["reply"]
        reply = self._send(request)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may write the same reply: each writes a file of its own, and renames it.
            part = kept.with_name(f"{kept.name}.{os.getpid()}")
            part.write_text(json.dumps({"request": request, "reply": reply}), encoding="utf-8")
            part.replace(kept)
        return reply

    def _kept(self, request: dict[str, Any]) -> Path | None:
        """Return the file that holds or will hold the reply to a request."""
        if self.cache is None:
            return None
        content = json.dumps([self.base_url, request], sort_keys=True).encode()
        return self.cache / f"{hashlib.sha256(content).hexdigest()}.json"

    def _send(self, request: dict[str, Any]) -> str:
        try:
            completion = self._client.chat.completions.create(**request)
        except APITimeoutError:
            raise EndpointError(f"{self.base_url} did not answer within {self._client.timeout} s.") from None
        except APIConnectionError as error:
            raise EndpointError(f"{self.base_url} cannot be reached: {error.__cause__ or error}") from None
        except APIStatusError as error:
            reason = _first_line(error.message).removeprefix(f"Error code: {error.status_code} - ")
            raise EndpointError(f"{self.base_url} answered {error.status_code}: {reason}") from None
        except APIError as error:
            raise EndpointError(f"{self.base_url}: {_first_line(error.message)}") from None
        if not getattr(completion, "choices", None):
            raise EndpointError(f"{self.base_url} answered without a reply. Is this the address of a chat API?")
        return completion.choices[0].message.content or ""


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:300]
