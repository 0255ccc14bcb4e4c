# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""One client's session on a server: from opening through frames, questions and replies to its end."""

import asyncio
import secrets
import time as clock
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..generation_videollm_mod import DEFAULT_QUERY
from .limits import RequestError
from .opening import open_again, open_stream
from .session_options import SessionOptions, check_fps, field_of
from .stream import EngineStream
from .telling import Frame, Progress, Reply, Teller
from .text_limits import check_live_text, check_settings


# A frame counts for its tick of `fps` if it comes at most this share of a tick too early.
_EARLY = 0.25
_MOST_ASKED = 32  # questions of a session that wait
_LATEST = 1e9  # seconds
SAVED, FINAL = "saved", ("closed", "expired")  # why a session is over that goes on elsewhere, and that does not


class LiveSession:
    """
    One client's stream. All methods run in the event loop; the engine's work goes to threads.

    Attributes:
        session_id (`str`), token (`str`): Its name, and what resumes it: the prefix of its server and a secret.
        owner (`str`, *optional*): To whom it belongs. `None` if the server needs no keys.
        path (`str`): Where options stand in its requests, for errors.
        options ([`SessionOptions`]), instructions (`str`), max_output_tokens (`int`): Its settings.
        stream ([`EngineStream`]): Its stream.
        has_begun (`bool`): Whether it has a frame or a question.
        last_time (`float`, *optional*): Time of the last frame that it has accepted, in seconds.
        lock (`asyncio.Lock`), num_requests (`int`): Held for what enters the stream. Requests that wait for the model.
        listeners (`list[Callable]`): Called with `"frame"`, `"begin"`, `"words"`, `"end"` or `"over"`, and the
            [`Frame`], the [`Reply`], the reply and its new words, the reply, or why the session is over.
        conversation: What a protocol keeps for the session while no client is connected.
        over (`str`, *optional*): Why it has ended: `"closed"`, `"expired"`, `"saved"` or a fault.
        is_kept (`bool`): Whether there is a save of it, from which its client can go on if a fault ends it.
        saved (`asyncio.Event`, *optional*): Set when the session is saved, or could not be. `None` if nobody tries to.
    """

    def __init__(
        self,
        sessions: Any,
        options: SessionOptions,
        instructions: str | None,
        stream_options: dict[str, Any] | None = None,
        owner: str | None = None,
        path: str = "session.videollm_mod",
    ) -> None:
        self.path = path
        self.sessions, self.options, self.limits, self.owner = sessions, options, sessions.limits, owner
        self.session_id = f"{sessions.prefix}sess_{secrets.token_hex(12)}"
        self.token = sessions.prefix + secrets.token_urlsafe(24)
        self.max_output_tokens = self.limits.max_output_tokens
        self.instructions, self.stream_options = instructions, stream_options or {}
        self.stream: EngineStream | None = None
        self.teller: Teller | None = None
        self.conversation: Any = None
        self.saved: asyncio.Event | None = None
        self.listeners: list[Callable[..., None]] = []
        self.created, self.over, self._last_words = int(clock.time()), None, "closed"
        self.has_begun = self.is_idle = self.is_kept = False
        self.num_received = self.num_skipped = self._context = 0
        self.reply: Reply | None = None
        self.asked: dict[int, Reply] = {}
        self.lock, self.num_requests = asyncio.Lock(), 0
        self._loop = asyncio.get_running_loop()
        self._frames: deque[Frame] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._zero: float | None = None  # the clock at stream time 0, for frames without a time
        self.last_time: float | None = None
        self._due = 0.0
        self._active = self._loop.time()
        self._left_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------------ opening and end

    async def open(self) -> None:
        """Open the stream. Raise [`RequestError`] if the server is full or an option is wrong."""
        await check_settings(self, self.options, self.instructions)
        self.stream, self.teller = await open_stream(self)
        if self.instructions is None:
            self.instructions = DEFAULT_QUERY if self.stream.session.speak == "learned" else ""
        self._check_life()

    async def finish(self, reason: str = "closed") -> None:
        """Accept nothing more. The session ends when what was accepted is seen and answered."""
        self._last_words = reason
        await self.work(self.stream.close)

    async def close(self, reason: str = "closed") -> None:
        """End the session now. What waits is discarded."""
        try:
            self._end(reason)
        finally:
            if self.stream is not None:
                # A caller that is cancelled must not leave the stream open, which holds memory.
                closing = self.sessions.run(lambda stream=self.stream: stream.close(discard=True))
                await asyncio.shield(self.sessions.start(closing))

    async def saving(self, save: Callable[[], None]) -> None:
        """Save and close the stream with the given call, then wait until its last events are delivered."""
        before, self._last_words = self._last_words, SAVED
        try:
            await self.sessions.run(save)
            await self.until(lambda: self.over == SAVED)
        finally:
            self._last_words = before

    def _end(self, reason: str) -> None:
        if self.over is not None:
            return
        self.over = reason
        self.sessions.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        for frame in self._frames:
            frame.fate = "behind"
        try:
            self._tell("over", reason)
        finally:
            self._wake()

    def touch(self) -> None:
        """Take note that the client is there."""
        self._active = self._loop.time()

    def leave(self) -> None:
        """Take note that the connection broke off. The session waits to be resumed."""
        self._left_at = self._loop.time()
        self._check_life()

    def come_back(self) -> None:
        """Take note that a client has resumed the session."""
        self._left_at = None
        self.touch()

    def wait_for_client(self, *, is_connected: bool) -> None:
        """Begin to live as a restored session, whose client is there or must resume it."""
        self._left_at = None if is_connected else self._loop.time()
        self._check_life()

    @property
    def can_be_resumed(self) -> bool:
        """Whether a client can find the session again. Others last for one request."""
        return not self.stream_options

    @property
    def seconds_left(self) -> float:
        """How long it waits for its client, if the connection breaks off now."""
        leaves = self._loop.time() if self.conversation is not None and self._left_at is None else self._left_at
        ends = self.ends_at if leaves is None else min(self.ends_at, leaves + self.limits.resume_seconds)
        return max(0.0, ends - self._loop.time())

    @property
    def ends_at(self) -> float:
        """When it ends without its client, by the clock of the event loop."""
        ends = self._active + self.limits.idle_seconds
        return ends if self._left_at is None else min(ends, self._left_at + self.limits.resume_seconds)

    @property
    def expires_in(self) -> float:
        """Seconds after which it ends without its client."""
        return round(max(0.0, self.ends_at - self._loop.time()), 1)

    def _check_life(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.over is not None:
            return
        left = self.ends_at - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_life)
        else:
            self.sessions.start(self.close("expired"))

    # -------------------------------------------------------------------------------------------- frames and questions

    def new_frame(
        self,
        *,
        time: float | None = None,
        item_id: str | None = None,
        param: str | None = None,
        arrival: float | None = None,
    ) -> Frame:
        """
        Return the place of a frame in the stream. Its `fate` is `"fps"` if it comes earlier than `fps` allows.

        Args:
            time (`float`, *optional*): Seconds in the stream. By default the time since the first frame.
            item_id (`str`, *optional*): Its name.
            param (`str`, *optional*): The field of the time, for errors.
            arrival (`float`, *optional*): When it came, by the clock of the event loop. By default now.

        Raises:
            [`RequestError`]: If the session is over, or the time is not later than that of the last frame.
        """
        self.refuse_if_over()
        self.touch()
        last, now = self.last_time, self._loop.time() if arrival is None else arrival
        if time is not None:
            if not 0 <= time <= _LATEST or (last is not None and time <= last):
                wrong = f"Frame times must be seconds and increase, got {time!s:.20} s"
                wrong += "." if last is None else f" after {last:g} s."
                wrong += f" At most {_LATEST:.0f} s: subtract the time of the first frame." if time > _LATEST else ""
                raise RequestError(wrong, code="invalid_value", param=param)
            self._zero = now - time
        elif self._zero is None:
            self._zero, time = now, 0.0
        else:
            # Two frames may arrive at once.
            time = max(now - self._zero, -1.0 if last is None else last + 1e-3)
        frame = Frame(item_id or f"item_{secrets.token_hex(10)}", time)
        if last is not None and time < self._due - _EARLY / self.options.fps:
            frame.fate = "fps"
        return frame

    async def push(self, frame: Frame, picture: Any) -> None:
        """
        Accept a frame that [`~LiveSession.new_frame`] returned.

        Args:
            frame ([`Frame`]): Its place in the stream.
            picture (PIL image): The picture. It is not used if the frame is skipped.

        Raises:
            [`RequestError`]: If the stream does not accept it.
        """
        self.num_received += 1
        self.sessions.metrics.frames_received.inc()
        if frame.fate is not None:
            self.num_skipped += 1
            self._settle(frame, frame.fate)
            return
        await self._begin()
        self._frames.append(frame)
        try:
            await self.work(lambda: self.stream.push(picture, time=frame.time))
        except RequestError:
            with suppress(ValueError):
                self._frames.remove(frame)
            raise
        self.last_time = frame.time
        self._due = max(self._due, frame.time) + 1 / self.options.fps

    async def show(self, pictures: list[Any], times: list[float]) -> None:
        """Accept frames that are all to be seen, at times in seconds. Raise [`RequestError`] if that fails."""
        self.refuse_if_over()
        await self._begin()
        await self.work(lambda: self.stream.push(pictures, time=times))

    async def ask(
        self,
        text: str | None,
        *,
        reply_now: bool = True,
        metadata: dict[str, Any] | None = None,
        interrupt: bool = False,
        role: str = "user",
        param: str | None = None,
        is_spoken: bool | None = None,
        ignored: Sequence[str] = (),
        instructs: bool = False,
    ) -> Reply | None:
        """
        Accept a question or an instruction; without a `text`, ask the model to speak now. `param` is the field of
        the text, for errors.

        Returns:
            [`Reply`]: The reply to come, or `None` without `reply_now`.
        """
        # A chat request has all its texts at once, and they were counted as a whole.
        if self.can_be_resumed:
            await self.check_text(text or "", role=role, param=param)
        self.refuse_if_over()
        self.touch()
        self._refuse_if_full()
        await self._begin()
        options = {"reply_now": reply_now, "interrupt": interrupt, "role": role, "instructs": instructs}
        given = {"metadata": metadata, "is_spoken": is_spoken, "ignored": list(ignored)}
        reply = Reply(is_asked=True, **given) if reply_now else None

        def ask() -> None:
            # The reply must not begin before it is on the list.
            with self.sessions.engine.changed:
                question = self.stream.ask(text, **options)
                if reply is not None:
                    reply.question = question
                    self.asked[id(question)] = reply

        await self.work(ask)
        return reply

    async def check_text(self, text: str, *, role: str = "user", param: str | None = None, count: int = 1) -> None:
        """Raise [`RequestError`] if the stream has no room for `count` texts of the client, with those that wait."""
        self._refuse_if_full(count)
        self.limits.check_text(text, param=param)
        begins = not self.has_begun and self.instructions.strip()
        turns = [("user", self.instructions)] * bool(begins) + [(role, text)] * bool(text)
        await self.work(lambda: check_live_text(self, turns, self.options.max_text_tokens, param))

    async def cancel(self) -> Reply | None:
        """Cut short the reply in progress, or withdraw the first that was asked for. Return it, if there is one."""
        self.touch()
        reply = self.reply
        if reply is None:
            reply = next((asked for asked in self.asked.values() if not asked.is_cancelled), None)
            if reply is not None and await self.work(lambda: self.stream.withdraw(reply.question)):
                del self.asked[id(reply.question)]
                reply.is_cancelled, reply.question = True, None
                self._tell("begin", reply)
                self._tell("end", reply)
                self._wake()
                return reply
        if reply is not None:
            # The engine may still be reading the question. The reply has no word then.
            reply.is_cancelled = True
            await self.work(lambda: self.stream.interrupt(reply.begun, question=reply.question))
        return reply

    async def update(
        self, options: SessionOptions, *, instructions: str | None = None, max_output_tokens: int | None = None
    ) -> str | None:
        """
        Change settings. Return how new instructions entered the stream, or `None` if they did not.

        Raises:
            [`RequestError`]: If a setting is wrong or cannot change any more. Nothing has changed then.
        """
        self.refuse_if_over()
        self.touch()
        await check_settings(self, options, None if instructions == self.instructions else instructions)
        check_fps(options.fps, self.limits, self.path)
        if is_turn := self.has_begun and (instructions or "").strip() not in ("", self.instructions.strip()):
            self._refuse_if_full()
        await self._change(options)
        if max_output_tokens is not None:
            self.max_output_tokens = min(max_output_tokens, self.limits.max_output_tokens)
            self.stream.session.max_new_tokens = self.max_output_tokens
        if instructions is None or (self.has_begun and not is_turn):
            return None  # what was said before cannot be unsaid
        if is_turn:
            await self.ask(instructions, reply_now=False, instructs=True)
        self.instructions = instructions
        return "as a turn" if is_turn else "at the start"

    async def _change(self, options: SessionOptions) -> None:
        if options.memory() != self.options.memory():
            if self.has_begun:
                fixed = "`max_frames` and `max_text_tokens` reserve memory: the first frame or text fixes them."
                raise RequestError(fixed, code="session_has_begun", param=field_of(self.path, "max_frames"))
            # A client that leaves now cancels this, and the stream would be lost.
            await asyncio.shield(self.sessions.start(open_again(self, options)))
        elif options.speaking() != self.options.speaking():
            try:
                await self.work(lambda: self.stream.set_speaking(**options.speaking()))
            except RequestError as error:
                error.param = self.path
                raise
        session = self.stream.session
        session.fps, session.interval_threshold = options.fps, options.interval_threshold
        if options.fps != self.options.fps and self.last_time is not None:
            self._due = self.last_time + 1 / options.fps
        self.options = options

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request that waits for the model."""
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
            self._wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds or the session is over, at most `reply_seconds`."""

        async def wait() -> None:
            while not condition() and self.over is None:
                waiter = self._loop.create_future()
                self._waiters.append(waiter)
                await waiter

        try:
            await asyncio.wait_for(wait(), self.limits.reply_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            late = f"The model has not answered within {self.limits.reply_seconds:g} s."
            raise RequestError(late, status=504, code="timeout") from None
        self.refuse_if_over(unless=condition)

    async def _begin(self) -> None:
        """Say the instructions before the first frame or question."""
        if not self.has_begun:
            self.has_begun = True
            if self.instructions.strip():
                await self.work(lambda: self.stream.ask(self.instructions, reply_now=False))

    async def work(self, work: Callable[[], Any]) -> Any:
        """Run a call to the stream in a thread. Its errors become [`RequestError`]."""
        try:
            return await self.sessions.run(work)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(str(error), code="invalid_value") from None
        except RuntimeError as error:
            raise RequestError(str(error), status=500, code="session_failed") from None

    def _refuse_if_full(self, count: int = 1) -> None:
        # Before the first frame, texts wait until there is a question. The instructions may be one of them.
        is_early = not self.num_received and self.can_be_resumed
        num_early = len(self.stream.session._questions) + count - bool(self.instructions.strip()) if is_early else 0
        if len(self.asked) >= _MOST_ASKED or num_early > _MOST_ASKED:
            full = f"{_MOST_ASKED} texts and questions wait: wait for the answers, ask for one, or send a frame."
            raise RequestError(full, status=429, code="conversation_already_has_active_response")

    def refuse_if_over(self, unless: Callable[[], bool] | None = None) -> None:
        """Raise [`RequestError`] if the session is over, unless a condition holds."""
        if self.over is not None and not (unless is not None and unless()):
            if self.over not in FINAL:
                self.sessions.refuse_if_draining()
            # Clients try again what a fault of the server has ended.
            status, code = (410, "session_over") if self.over in (SAVED, *FINAL) else (500, "session_failed")
            raise RequestError(f"The session is over: {self.over}.", status=status, code=code)

    # ------------------------------------------------------------------------------------------------------- progress

    def deliver(self, progress: Progress) -> None:
        """Take in what the engine did for the stream in one step."""
        self.is_idle = progress.is_idle
        if progress.latencies:
            self._count_frames(progress)
        if progress.has_begun:
            self.reply = self.asked.pop(id(progress.question), None) or Reply()
            self.reply.context, self.reply.image, self.reply.begun = progress.context, progress.image, progress.begun
            self.reply.cached, self._context = min(self._context, progress.context), progress.context
            self._tell("begin", self.reply)
            if self.reply.is_cancelled and progress.event is None:
                self.sessions.start(self.work(lambda: self.stream.interrupt(progress.begun)))
        if progress.words:
            self.reply.text += progress.words
            self._tell("words", self.reply, progress.words)
        if progress.event is not None:
            self._finish(progress)
        if progress.is_done:
            self._end(self._last_words if progress.error is None else progress.error)
        self._wake()

    def _count_frames(self, progress: Progress) -> None:
        """Settle the frames that were seen, and those before them that were dropped."""
        settled: list[Frame] = []
        while self._frames and self._frames[0].time <= progress.time:
            settled.append(self._frames.popleft())
        seen = len(progress.latencies)
        for frame in settled[:-seen]:
            self._settle(frame, "behind")
        for place, (frame, lag) in enumerate(zip(settled[-seen:], progress.latencies, strict=False), start=1):
            frame.index, frame.lag = progress.num_frames - seen + place - 1, lag
            if place == seen:
                frame.interval_probability, frame.kept_patches = progress.silence, progress.kept
            self.sessions.metrics.lag.observe(lag)
            self._settle(frame, "seen")

    def _settle(self, frame: Frame, fate: str) -> None:
        frame.fate = fate
        if fate != "seen":
            self.sessions.count_dropped(self, fate)
        self._tell("frame", frame)

    def _finish(self, progress: Progress) -> None:
        reply, self.reply = self.reply, None
        reply.event, reply.text = progress.event, progress.event.text
        self._context += len(progress.event.token_ids)
        self.sessions.metrics.first_word.observe(progress.event.latency)
        self._tell("end", reply)

    def _tell(self, kind: str, *what: Any) -> None:
        for listener in list(self.listeners):
            listener(kind, *what)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


__all__ = ["FINAL", "SAVED", "LiveSession"]
