# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ask a language model behind an OpenAI-compatible endpoint, with retries and a cache."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, BadRequestError, OpenAI

from videollm_mod.train.reply_cache import Reply, ReplyCache


# Options that a model may refuse.
_OPTIONS = {"max_tokens", "temperature", "top_p", "seed"}


class EndpointError(OSError):
    """The endpoint gave no reply. The message says why in one line."""


class NoReplyError(EndpointError):
    """The endpoint gave no reply to this request. It may have one to other requests."""


class Endpoint:
    """
    A language model behind an OpenAI-compatible endpoint, such as that of vLLM, SGLang, Ollama or OpenAI.

    OpenAI's reasoning models refuse some options. The request is then sent again with `max_completion_tokens` for
    `max_tokens`, and without a `temperature` or another refused option.

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
        self.cache = None if cache is None else ReplyCache(cache)
        # The client refuses to start without a key.
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        # Options that the model has refused. Several threads may ask.
        self._refused: set[str] = set()
        self._client = OpenAI(base_url=self.base_url, api_key=key, max_retries=max_retries, timeout=timeout)

    def reply(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Reply:
        """
        Return the model's reply to a conversation, and whether it was cut.

        Args:
            messages (sequence of `dict`): Messages with `role` and `content`.
            max_tokens (`int`, *optional*, defaults to 512): Length of the longest reply in tokens.
            temperature (`float`, *optional*, defaults to 0.0): Sampling temperature. 0 is greedy.
            top_p (`float`, *optional*): Share of probability to sample from. The default is the endpoint's.
            seed (`int`, *optional*): Seed of sampling. It also tells several replies to one conversation apart in the
                cache.

        Raises:
            [`NoReplyError`]: If this request fails after all retries.
            [`EndpointError`]: If the endpoint cannot be reached, or if the address, the key or the model is wrong.
        """
        request = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens}
        given = {"temperature": temperature, "top_p": top_p, "seed": seed}
        request |= {name: value for name, value in given.items() if value is not None}
        named = {"endpoint": self.base_url, **request}
        reply = None if self.cache is None else self.cache.find(named)
        if reply is None:
            reply = self._send(request)
            if self.cache is not None:
                self.cache.keep(named, reply)
        return reply

    def _create(self, request: dict[str, Any]) -> Any:
        """Return the completion of a request, with the options that the model accepts."""
        while True:
            sent = {name: value for name, value in request.items() if name not in self._refused}
            if "max_tokens" in self._refused:
                sent["max_completion_tokens"] = request["max_tokens"]
            try:
                return self._client.chat.completions.create(**sent)
            except BadRequestError as error:
                is_refusal = error.code in ("unsupported_parameter", "unsupported_value")
                if not is_refusal or error.param not in set(sent) & _OPTIONS:
                    raise
                self._refused.add(error.param)

    def _send(self, request: dict[str, Any]) -> Reply:
        try:
            completion = self._create(request)
            choice = completion.choices[0]
            return Reply(choice.message.content or "", choice.finish_reason == "length")
        except APITimeoutError:
            raise NoReplyError(f"{self.base_url} did not answer within {self._client.timeout} s.") from None
        except APIConnectionError as error:
            raise EndpointError(f"{self.base_url} cannot be reached: {error.__cause__ or error}.") from None
        except APIStatusError as error:
            # Older clients write the whole body into their message.
            told = error.body.get("message") if isinstance(error.body, dict) else None
            reason = _first_line(str(told or error.message)).removeprefix(f"Error code: {error.status_code} - ")
            # Later requests with the same address, key and model would end in the same way.
            kind = EndpointError if error.status_code in (401, 403, 404) else NoReplyError
            raise kind(f"{self.base_url} answered {error.status_code}: {reason}") from None
        except APIError as error:
            raise NoReplyError(f"{self.base_url}: {_first_line(error.message)}") from None
        except (AttributeError, IndexError, TypeError, ValueError):
            # The client passes on what is no chat completion.
            raise NoReplyError(
                f"{self.base_url} answered without a reply. Is this the address of a chat API?"
            ) from None


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:300]
