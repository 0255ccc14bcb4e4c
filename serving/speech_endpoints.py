# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Clients of the operator's endpoints for speech: OpenAI's `/v1/audio/transcriptions` and `/v1/audio/speech`."""

import asyncio
import io
import json
import wave
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from transformers.utils import logging

from .limits import RequestError


logger = logging.get_logger(__name__)

# The only format: samples of 16 bits, one channel.
AUDIO_FORMAT = {"type": "audio/pcm", "rate": 24_000}
BYTES_PER_SECOND = 2 * 24_000
_CHUNK = BYTES_PER_SECOND // 5
_MOST_ANSWER = 1_000_000  # bytes of a transcriber's answer
_LOGGED = 300  # characters of an endpoint's complaint

Result = TypeVar("Result")


class _Endpoint:
    """
    An endpoint of an OpenAI-compatible server that the operator chose, so its address may be private.

    Args:
        url (`str`): Address of the API, such as `http://localhost:9000/v1`.
        model (`str`): Name of the model there.
        key (`str`, *optional*): Key.

    Raises:
        `ValueError`: If the URL or the key cannot be used.
    """

    name = path = code = ""

    def __init__(self, url: str, model: str, *, key: str | None = None) -> None:
        self.url, self.model = _complete_url(url, self.path), model
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{self.name} has a key that is not printable ASCII.")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> "_Endpoint":
        # Each call has a time limit of its own.
        self._client = httpx.AsyncClient(headers=self.headers, timeout=None)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _post(self, patience: "_Patience", **content: Any) -> AsyncIterator[httpx.Response]:
        """Send a request. Gives the response, with its body to be read. Its faults become [`RequestError`]."""
        with self._telling_faults(patience):
            request = self._client.build_request("POST", self.url, **content)
            response = await patience.wait(self._client.send(request, stream=True))
            try:
                if response.status_code != 200:
                    raise await self._refused(response, patience)
                yield response
            finally:
                await response.aclose()

    @contextmanager
    def _telling_faults(self, patience: "_Patience") -> Iterator[None]:
        try:
            yield
        except (TimeoutError, asyncio.TimeoutError):
            raise self.error(f"took longer than {patience.seconds:g} s, which is the limit") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            logger.warning("%s at %s failed: %s", self.name, self.url, error)
            raise self.error(f"cannot be reached ({type(error).__name__})") from None

    async def _refused(self, response: httpx.Response, patience: "_Patience") -> RequestError:
        body = (await patience.wait(_read(response, _MOST_ANSWER))) or b""
        complaint = body[:_LOGGED].decode(errors="replace")
        logger.warning("%s at %s answered with status %s: %s", self.name, self.url, response.status_code, complaint)
        return self.error(f"answered with status {response.status_code}")

    def error(self, what: str) -> RequestError:
        """Return the error that tells a client what is wrong with the endpoint."""
        return RequestError(f"{self.name} {what}.", status=502, code=self.code)


class Transcriber(_Endpoint):
    """Writes down what was said: OpenAI's `/v1/audio/transcriptions`."""

    name, path, code = "The transcriber", "/audio/transcriptions", "transcription_failed"

    async def transcribe(self, audio: bytes, *, seconds: float, **options: str) -> str:
        """
        Return what is said in a recording.

        Args:
            audio (`bytes`): Samples of 16 bits, one channel, at 24 kHz.
            seconds (`float`): Time limit.
            options (`str`): `language` and `prompt`.

        Raises:
            [`RequestError`]: If the endpoint fails.
        """
        files = {"file": ("speech.wav", _wav(audio), "audio/wav")}
        fields = {"model": self.model, "response_format": "json", **options}
        patience = _Patience(seconds)
        async with self._post(patience, data=fields, files=files) as response:
            body = await patience.wait(_read(response, _MOST_ANSWER))
        try:
            text = json.loads(body or b"")["text"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise self.error("answered with something else than a transcript")
        return text.strip()


class Speaker(_Endpoint):
    """
    Reads a text aloud: OpenAI's `/v1/audio/speech`.

    Args:
        url (`str`), model (`str`), key (`str`, *optional*): As for [`Transcriber`].
        voice (`str`): Name of the voice.
    """

    name, path, code = "The speech endpoint", "/audio/speech", "speech_failed"

    def __init__(self, url: str, model: str, voice: str, *, key: str | None = None) -> None:
        super().__init__(url, model, key=key)
        self.voice = voice

    async def speak(self, text: str, *, seconds: float) -> AsyncIterator[bytes]:
        """
        Yield speech as it comes: samples of 16 bits, one channel, at 24 kHz.

        Args:
            text (`str`): What to say.
            seconds (`float`): Time limit. The time that the caller takes between chunks does not count.

        Raises:
            [`RequestError`]: If the endpoint fails.
        """
        asked = {"model": self.model, "input": text, "voice": self.voice, "response_format": "pcm"}
        patience = _Patience(seconds)
        async with self._post(patience, json=asked) as response:
            chunks = response.aiter_bytes(_CHUNK)
            is_first = True
            while chunk := await patience.wait(_next(chunks)):
                if is_first and chunk.startswith(b"RIFF"):
                    raise self.error("sends WAV files, but was asked for `pcm`")
                is_first = False
                yield chunk[: len(chunk) // 2 * 2]


class _Patience:
    """How long an endpoint may take. The time in which nobody waits for it does not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self._left = seconds

    async def wait(self, work: Awaitable[Result]) -> Result:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await asyncio.wait_for(work, max(self._left, 0.001))
        finally:
            self._left -= loop.time() - began


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    async for chunk in chunks:
        return chunk
    return b""


async def _read(response: httpx.Response, most: int) -> bytes | None:
    """Return the body of a response, `None` if it has more than `most` bytes."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > most:
            return None
    return bytes(body)


def _wav(audio: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, AUDIO_FORMAT["rate"], 0, "NONE", ""))
        written.writeframes(audio)
    return file.getvalue()


def _complete_url(url: str, path: str) -> str:
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.username or parts.query)
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        is_right = False
    if not is_right:
        # The address may hold a key, so it is not shown.
        wrong = f"The endpoint of {path} must be an address such as http://localhost:9000/v1, without login and query."
        raise ValueError(f"{wrong} Keys come from environment variables.")
    return url.rstrip("/").removesuffix(path) + path


__all__ = ["AUDIO_FORMAT", "BYTES_PER_SECOND", "Speaker", "Transcriber"]
