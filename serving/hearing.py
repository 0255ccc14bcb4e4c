# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a client says: audio that is not committed yet, recordings without a transcript, and what waits for them."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from transformers.utils import logging

from .limits import Limits, RequestError
from .speech_endpoints import BYTES_PER_SECOND, Transcriber
from .telling import Reply


logger = logging.get_logger(__name__)

_LEAST_SECONDS = 0.1  # of a recording, as in OpenAI's protocol
_MOST_WAITING = 32  # recordings, and what was sent after them

Work = Callable[[], Awaitable[None]]


@dataclass(eq=False)
class _Waiting:
    work: Work
    give_up: Callable[[RequestError], None]
    event_id: str | None = None
    reply: Reply | None = None


class Hearing:
    """
    The microphone of one session. Texts and requests that come after a recording wait until it is transcribed, so that
    the model gets everything in the order in which it was sent. Frames do not wait.

    Args:
        transcriber ([`Transcriber`], *optional*): Writes down what is said.
        limits ([`Limits`]): Its `max_audio_seconds` limits how much audio a session may keep here.
        lock (`asyncio.Lock`): Held while an event takes effect.
        fail (`Callable`): Called with the error of something that waited, and the id of its event.

    Attributes:
        has_failed (`bool`): Whether the last recording has no transcript.
        buffer (`bytearray`): Audio that is not committed yet.
        num_changes (`int`): How often it has changed.
    """

    def __init__(
        self,
        transcriber: Transcriber | None,
        limits: Limits,
        lock: asyncio.Lock,
        fail: Callable[[RequestError, str | None], None],
    ) -> None:
        self.transcriber, self.limits, self.has_failed = transcriber, limits, False
        self._lock, self._fail = lock, fail
        self.buffer, self.num_changes, self._num_recorded = bytearray(), 0, 0
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a recording waits for its transcript."""
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Number of recordings that wait for their transcripts, and of what waits for these."""
        return len(self._waiting)

    def append(self, audio: bytes) -> None:
        """Add audio to the buffer. Raise [`RequestError`] if there is too much of it."""
        self._check_transcriber()
        most = self.limits.max_audio_seconds
        if len(self.buffer) + self._num_recorded + len(audio) > most * BYTES_PER_SECOND:
            full = f"A session may have {most:g} s of audio that is not transcribed yet: commit or clear the buffer."
            raise RequestError(full, status=413, code="input_audio_buffer_full", param="audio")
        self.buffer += audio
        self.num_changes += 1

    def clear(self) -> None:
        """Discard the buffer."""
        self.buffer.clear()
        self.num_changes += 1

    def take(self) -> bytes:
        """Return the audio of the buffer, and empty it. Raise [`RequestError`] if there is too little of it."""
        self._check_transcriber()
        seconds = len(self.buffer) / BYTES_PER_SECOND
        if seconds < _LEAST_SECONDS:
            short = f"The buffer has {1000 * seconds:.0f} ms of audio. A commit needs {1000 * _LEAST_SECONDS:g} ms."
            raise RequestError(short, code="input_audio_buffer_commit_empty")
        self.check_room()
        audio = bytes(self.buffer[: len(self.buffer) // 2 * 2])
        self.clear()
        return audio

    def record(self, audio: bytes, transcribe: Work, give_up: Callable[[RequestError], None]) -> None:
        """
        Transcribe a recording in the background, after those before it.

        Args:
            audio (`bytes`): The recording.
            transcribe (`Callable`): Does it.
            give_up (`Callable`): Called with an error if the session ends before it is done.
        """

        async def work() -> None:
            try:
                await transcribe()
            finally:
                self._num_recorded -= len(audio)

        self._num_recorded += len(audio)
        self._put(_Waiting(work, give_up))

    async def in_order(self, work: Work, event_id: str | None, reply: Reply | None = None) -> None:
        """
        Do something now, or after the recordings that came before it.

        Args:
            work (`Callable`): Does it.
            event_id (`str`, *optional*): The event that asks for it, for errors.
            reply ([`Reply`], *optional*): What stands for it if it is withdrawn.
        """
        if not self.is_busy:
            await work()
            return

        async def locked() -> None:
            async with self._lock:
                if waiting in self._waiting:  # not withdrawn meanwhile
                    await work()

        self.check_room()
        waiting = _Waiting(locked, lambda error: self._fail(error, event_id), event_id, reply)
        self._put(waiting)

    def withdraw(self) -> Reply | None:
        """Withdraw the first request that waits, and return what stands for it. The lock must be held."""
        for waiting in list(self._waiting):
            if waiting.reply is not None:
                self._waiting.remove(waiting)
                return waiting.reply
        return None

    def close(self) -> None:
        """Give up what waits, since the session ends."""
        if self._task is not None:
            self._task.cancel()
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            one.give_up(
                RequestError("The session ended before this was transcribed.", status=503, code="session_over")
            )

    def _put(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            waiting = self._waiting[0]
            try:
                await waiting.work()
            except RequestError as error:
                self._fail(error, waiting.event_id)
            except Exception:
                logger.exception("An event that waited for a transcript failed.")
                wrong = RequestError("The server failed at this event.", status=500, code="server_error")
                self._fail(wrong, waiting.event_id)
            if waiting in self._waiting:  # neither closed nor withdrawn meanwhile
                self._waiting.popleft()

    def _check_transcriber(self) -> None:
        if self.transcriber is None:
            wrong = "This server has no transcriber. Start it with --transcriber URL, or send text as `input_text`."
            raise RequestError(wrong, code="audio_not_supported", param="type")

    def check_room(self, count: int = 1) -> None:
        """Raise [`RequestError`] if so many recordings or later events may not wait with the others."""
        if self.num_waiting + count > _MOST_WAITING:
            full = f"{_MOST_WAITING} recordings and later events wait to be transcribed: wait for the transcripts."
            raise RequestError(full, status=429, code="conversation_already_has_active_response")


__all__ = ["Hearing"]
