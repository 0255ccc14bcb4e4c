# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The speech of a reply, sentence by sentence while the model writes it."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from transformers.utils import logging

from .limits import Limits, RequestError
from .speech_endpoints import BYTES_PER_SECOND, Speaker


logger = logging.get_logger(__name__)

# The end of a sentence is only known when the next one begins: "3.5" has none.
_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|\n+|[。！？]+")


class Speech:
    """
    Has a reply read aloud. It runs in the background until its text is complete and spoken, or until it fails.

    Args:
        speaker ([`Speaker`]): Reads a text aloud.
        limits ([`Limits`]): Its `speech_seconds` limits the time of a sentence, `max_speech_seconds` the audio.
        send (`Callable`): Sends a piece of audio, and returns when the next one may come.
        end (`Callable`): Called at the end, with the error if there was one.

    Attributes:
        is_over (`bool`): Whether no more audio comes.
    """

    def __init__(
        self,
        speaker: Speaker,
        limits: Limits,
        send: Callable[[bytes], Awaitable[None]],
        end: Callable[[RequestError | None], None],
    ) -> None:
        self.speaker, self.limits, self.is_over = speaker, limits, False
        self._send, self._end = send, end
        self._text, self._num_bytes = "", 0
        self._sentences: asyncio.Queue[str | None] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, words: str) -> None:
        """Add words of the reply."""
        self._text += words
        while found := _END.search(self._text):
            self._put(self._text[: found.end()])
            self._text = self._text[found.end() :]

    def finish(self) -> None:
        """Take note that the reply is complete."""
        self._put(self._text)
        self._sentences.put_nowait(None)

    def stop(self) -> None:
        """End the speech now, without a call of `end`."""
        self.is_over = True
        self._task.cancel()

    def _put(self, sentence: str) -> None:
        if any(character.isalnum() for character in sentence):
            self._sentences.put_nowait(sentence.strip())

    async def _run(self) -> None:
        error: RequestError | None = None
        try:
            while not self.is_over and (sentence := await self._sentences.get()) is not None:
                await self._speak(sentence)
        except RequestError as caught:
            error = caught
        except Exception:
            logger.exception("The speech of a reply failed.")
            error = RequestError("The server failed at the speech of this reply.", status=500, code="server_error")
        if not self.is_over:
            self.is_over = True
            self._end(error)

    async def _speak(self, sentence: str) -> None:
        most = self.limits.max_speech_seconds
        async with aclosing(self.speaker.speak(sentence, seconds=self.limits.speech_seconds)) as chunks:
            async for chunk in chunks:
                # A cancellation can get lost in a wait with a time limit.
                if self.is_over:
                    return
                self._num_bytes += len(chunk)
                if self._num_bytes > most * BYTES_PER_SECOND:
                    raise self.speaker.error(f"sent more than {most:g} s of audio for a reply, which is the limit")
                await self._send(chunk)


__all__ = ["Speech"]
