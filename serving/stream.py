# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""One stream of an engine: it takes frames and questions, and the engine does the work."""

import math
import os
import queue
import time as clock
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..reading_ahead_videollm_mod import TooManyWaitingError
from ..streaming_videollm_mod import StepResult, StreamEvent, StreamingSession, StreamStep, Work
from .saved_files import Saved, check_folder, write
from .saving import fill_session, state_of


class ReceivedFrame(NamedTuple):
    """
    A frame that waits to be encoded.

    Attributes:
        time (`float`): Seconds in the stream.
        pixels (`torch.Tensor` of shape `(channels, height, width)`): The frame at the model's size, uint8, on the
            host. Frames of several streams go to the device together.
        arrival (`float`): When it was pushed, by `time.perf_counter()`.
    """

    time: float
    pixels: torch.Tensor
    arrival: float


class EngineStream:
    """
    One stream of a [`StreamingEngine`]. It has the verbs of a [`StreamingSession`], but the engine does the work.

    `push` and `ask` return immediately. Iterate over the stream to get its events, or call the engine's `step`.

    Attributes:
        session ([`StreamingSession`]): The stream's state and its figures.
        error (`Exception`, *optional*): The error that ended the stream, if any.
        max_events (`int`, *optional*): How many of its last events are kept. Set it for a stream without an end.
    """

    def __init__(
        self, engine: Any, session: StreamingSession, when_behind: str, max_waiting: int, number: int
    ) -> None:
        self.session = session
        self.when_behind, self.max_waiting, self.number = when_behind, max_waiting, number
        self.error: BaseException | None = None
        self.max_events: int | None = None
        # The engine holds its open streams. A strong reference back would keep its memory until garbage collection.
        self._engine_reference = weakref.ref(engine)
        self._received: deque[ReceivedFrame] = deque()
        self._work: Work | None = None
        self._step: StreamStep | None = None
        self._said: queue.SimpleQueue[StreamEvent | None] = queue.SimpleQueue()
        self._num_said = 0
        self._num_encoding = self._num_pauses = 0
        self._is_closing = self._is_discarded = False
        self._is_done = False

    # ------------------------------------------------------------------------------------------------- for users

    @property
    def events(self) -> list[StreamEvent]:
        """All events so far, or the last `max_events` of them."""
        return list(self.session.events)

    @property
    def num_dropped(self) -> int:
        """Number of frames dropped because the engine was behind."""
        return self.session.num_dropped

    @property
    def num_waiting(self) -> int:
        """Number of frames received but not seen yet."""
        return 0 if self._is_done else len(self._received) + self._num_encoding + self.session.num_waiting

    @property
    def is_done(self) -> bool:
        """Whether the stream has ended: closed, with everything seen and answered, or ended by an error."""
        return self._is_done

    def push(self, frames: Any, *, time: float | Sequence[float] | None = None) -> None:
        """
        Accept frames. The arguments are those of [`~StreamingSession.push`].

        Frames that arrive faster than the engine sees them wait, and the engine sees several per step. If more than
        `max_waiting` would wait, `when_behind` decides: `"catch_up"` refuses all frames of this call,
        `"drop_oldest"` drops and counts the oldest frame, and `"block"` accepts them and waits until the engine has
        seen enough. A streamer may push too. It cannot wait, so `"block"` then refuses as `"catch_up"` does.

        Raises:
            `TooManyWaitingError`: If the frames are refused. The stream's time does not advance: give the next
                frame's `time` if these are left out.
            `ValueError`: If the frames have another form or size, times do not increase, or the stream is closed.
            `RuntimeError`: If an error has ended the stream; it is the cause.
        """
        self._refuse_if_closed()
        arrival = clock.perf_counter()
        engine = self._engine
        with engine.changed:
            self._refuse_too_many()  # before any work on them
        pixels = engine.take_in(frames)
        # The lock is held for all frames of a call, so that those of two calls do not mix.
        with engine.changed:
            self._refuse_if_closed()
            self._refuse_too_many(self.session.count_seen(len(pixels)) if time is None else len(pixels))
            pixels, times = self.session.sample(pixels, time)
            for at, frame in zip(times, pixels, strict=True):
                # A view would keep the memory of all frames of this call.
                own = frame.clone() if frame.untyped_storage().nbytes() > frame.nbytes else frame
                self._drop_too_many()
                self._received.append(ReceivedFrame(at, own, arrival))
            engine.changed.notify_all()
        while self.when_behind == "block" and not self._has_room() and not engine.is_inside_step:
            engine.make_progress(self._has_room)
        if self.error is not None:
            self._refuse_if_closed()

    def ask(
        self,
        text: str | None,
        *,
        time: float | None = None,
        reply_now: bool = True,
        interrupt: bool = False,
        role: str = "user",
        instructs: bool = False,
    ) -> Any:
        """
        Accept a question, and return it as it waits. The arguments are those of [`~StreamingSession.hear`]. With
        `interrupt` it cuts short a reply that is being generated, and comes before the frames that wait.

        Raises:
            `ValueError`: If the text is empty, the time lies before an earlier frame or question, or the stream is
                closed.
            `RuntimeError`: If an error has ended the stream; it is the cause.
        """
        self._refuse_if_closed()
        time = None if time is None else float(time)
        with self._engine.changed:
            given = {"reply_now": reply_now, "interrupt": interrupt, "role": role, "instructs": instructs}
            question = self.session.hear(text, time=time, **given)
            self._engine.changed.notify_all()
            return question

    def withdraw(self, question: Any) -> bool:
        """Remove a question that [`~EngineStream.ask`] returned. Return whether it still waited."""
        with self._engine.changed:
            return self.session.withdraw(question)

    def interrupt(self, begun: float = math.inf, *, question: Any = None) -> None:
        """
        Cut short the reply in progress, if there is one. Which one it is may have changed since the caller has looked.

        Args:
            begun (`float`, *optional*): Only if it had begun by then, by `time.perf_counter()`.
            question (*optional*): Only if it answers this question, as [`~EngineStream.ask`] returned it.
        """
        with self._engine.changed:
            if question is None or self.session.answering is question:
                self.session.interrupt(begun)

    def set_speaking(self, **options: Any) -> None:
        """Change when to speak without being asked; see [`~StreamingSession.set_speaking`]."""
        with self._engine.changed:
            self.session.set_speaking(**options)

    def probe(self, question: str, *, answers: Sequence[str] = ("Yes", "No")) -> float:
        """
        Return the probability of an answer about the frames pushed so far, as [`~StreamingSession.probe`] does. This
        waits until the engine has seen them.

        Raises:
            `ValueError`: If a text is empty, both answers begin with the same token, no frame was pushed, or the
                stream is closed.
            `RuntimeError`: If an error has ended the stream, if it ends before the answer, or if a streamer asks.
        """
        self._refuse_if_closed()
        engine = self._engine
        if engine.is_inside_step:
            raise RuntimeError("A streamer cannot wait for the engine that calls it: probe from another thread.")
        with engine.changed:
            probe = self.session.hear_probe(question, answers)
            engine.changed.notify_all()
        while probe.probability is None and not self._is_done:
            engine.make_progress(lambda: probe.probability is not None or self._is_done)
        if probe.probability is None:
            raise RuntimeError("The stream has ended before the answer.") from self.error
        return probe.probability

    def save(self, folder: str | os.PathLike, *, close: bool = False) -> None:
        """
        Save the stream in a folder: its cache, and the frames and questions that wait. [`~StreamingEngine.restore`]
        opens it again, also in another process.

        A reply in progress is finished first. Frames and questions that come later wait. Other streams go on. The
        streamer, the logits processor and a function given as `speak` are not saved. Nothing is pickled.

        Args:
            folder (`str` or `Path`): Where to write `session.json` and `session.safetensors`. A session saved there
                before is replaced when the new files are complete.
            close (`bool`, *optional*, defaults to `False`): Whether to end the stream where it is saved. Otherwise it
                goes on.

        Raises:
            `FileExistsError`: If the folder holds something else.
            `RuntimeError`: If an error has ended the stream, or a streamer calls this.
            `ValueError`: If the stream is closed.
        """
        check_folder(folder)
        self._refuse_if_closed()
        if self._engine.is_inside_step:
            raise RuntimeError("A streamer cannot wait for the engine that calls it: save from another thread.")
        self.pause()
        try:
            self.wait_for_rest()
            with self._engine.changed:
                saved = self.pack()
                self._is_closing = close  # what comes from now on is not in the files, so it is refused
            try:
                write(saved, self.session.model, folder)
            except BaseException:
                self._is_closing = self._is_closing and not close
                raise
            if close:
                self.close(discard=True)
        finally:
            self.resume()

    def wait_for_rest(self) -> None:
        """Wait until the step and the reply in progress of a stream that was paused are finished."""
        while not self.is_at_rest:
            self._engine.make_progress(lambda: self.is_at_rest)

    def pack(self) -> Saved:
        """Return what [`~EngineStream.save`] writes. The stream must be paused and at rest, and may then go on."""
        with self._engine.changed:
            self._refuse_if_closed()
            own = {"received": list(self._received), "when_behind": self.when_behind, "max_waiting": self.max_waiting}
            return state_of(self.session, **own)

    def pause(self) -> None:
        """Let the engine finish the step and reply in progress, and then leave the stream as it is."""
        with self._engine.changed:
            self._num_pauses += 1
            self.session.is_paused = True

    def resume(self) -> None:
        """Let the stream go on when each `pause` has had its `resume`. Saving pauses it too."""
        with self._engine.changed:
            self._num_pauses -= 1
            self.session.is_paused = self._num_pauses > 0
            self._engine.changed.notify_all()

    def close(self, *, discard: bool = False) -> None:
        """
        Accept nothing more. The engine still sees and answers what was accepted, then frees the memory. With
        `discard` it drops what waits and cuts short the reply in progress.
        """
        with self._engine.changed:
            if discard:
                self._received.clear()
                self.session.discard()
                self._is_discarded = True
            self._is_closing = True
            self._engine.changed.notify_all()

    def __iter__(self) -> Iterator[StreamEvent]:
        """
        Yield events as they are said, until the stream is done. If the engine does not run in a thread, this runs its
        steps, and ends when there is no more work.
        """
        while True:
            while self._said.empty() and not self._engine.is_running:
                if not self._engine.has_work:
                    return
                self._engine.step()
            if self._said.empty() and self._engine.is_inside_step:
                raise RuntimeError("A streamer cannot wait for events of the engine that calls it.")
            event = self._said.get()
            if event is None:
                self._said.put(None)  # for other listeners
                break
            yield event
        if self.error is not None:
            raise RuntimeError(f"The stream was ended: {self.error}") from self.error

    @property
    def _engine(self) -> Any:
        engine = self._engine_reference()
        if engine is None:
            raise RuntimeError("The engine of this stream is gone: keep a reference to it while you use its streams.")
        return engine

    def _refuse_too_many(self, new: int = 1) -> None:
        if self.when_behind == "drop_oldest" or self.num_waiting + new <= self.max_waiting:
            return
        if self.when_behind == "block":
            if self._engine.is_inside_step:
                raise TooManyWaitingError(
                    f"{self.num_waiting} frames of this stream wait, and its `max_waiting` is {self.max_waiting}. A "
                    "streamer cannot wait for the engine that calls it: push these frames from another thread."
                )
            return
        if new > self.max_waiting:
            raise TooManyWaitingError(
                f"Got {new} frames at once, but `max_waiting` is {self.max_waiting}. Push fewer at a time, or open "
                'the stream with a larger `max_waiting` or with `when_behind="block"`, which waits.'
            )
        raise TooManyWaitingError(
            f"{self.num_waiting} frames of this stream wait, and its `max_waiting` is {self.max_waiting}. Push these "
            'later, or open the stream with `when_behind="block"`, which waits, or `"drop_oldest"`.'
        )

    def _drop_too_many(self) -> None:
        while self.when_behind == "drop_oldest" and self.num_waiting >= self.max_waiting and self._drop_oldest():
            self._engine.stats.dropped += 1

    def _has_room(self) -> bool:
        return self._is_done or self.num_waiting <= self.max_waiting

    def _drop_oldest(self) -> bool:
        # Frames that are already encoded are older than those that are not.
        if self.session.drop_oldest():
            return True
        if self._received:
            self._received.popleft()
            self.session.count_dropped()
            return True
        return False

    def _refuse_if_closed(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"The stream was ended: {self.error}") from self.error
        if self._is_closing:
            raise ValueError("This stream is closed; open another with `engine.open()`.")

    # ----------------------------------------------------------------------------- for the engine, under its lock

    @property
    def has_work(self) -> bool:
        """Whether a step is unfinished, an encoded frame waits or a question is due."""
        return self._work is not None or self.session.has_work(to_the_end=self._is_closing)

    @property
    def is_pending(self) -> bool:
        """Whether the engine must still do something for the stream, which includes ending it."""
        return self.has_work or (not self.session.is_paused and (bool(self._received) or self._is_closing))

    @property
    def is_idle(self) -> bool:
        """Whether the stream has nothing left to do. Any thread may ask; others may push and ask meanwhile."""
        with self._engine.changed:
            return self.num_waiting == 0 and not self.is_pending

    @property
    def is_ending(self) -> bool:
        """Whether the engine ends the stream and frees its memory soon, because it was closed with `discard`."""
        return self._is_discarded and not self._is_done and not self.session.is_paused

    @property
    def is_at_rest(self) -> bool:
        """Whether no step is unfinished and no frame is being encoded."""
        return self._is_done or (self._work is None and not self._num_encoding)

    def go_on(self, saved: Saved, *, pause: bool) -> None:
        """Continue a saved stream, or `pause` it there. Listeners do not get its earlier events again."""
        most = self.session.chunk_frames
        try:
            received = fill_session(self.session, saved)
        except BaseException:
            self.close(discard=True)
            raise
        self.session.chunk_frames = min(most, self.session.chunk_frames)
        self._received.extend(ReceivedFrame(*frame) for frame in received)
        self._num_said = len(self.session.events)
        if pause:
            self.pause()
        self._engine.changed.notify_all()

    def take_received(self) -> list[ReceivedFrame]:
        """Remove and return the frames to encode next: as many as the session sees in one step."""
        if self._is_done or self.session.is_paused:
            return []
        room = self.session.chunk_frames - self.session.num_waiting
        self._num_encoding = max(0, min(room, len(self._received)))
        return [self._received.popleft() for _ in range(self._num_encoding)]

    def receive(self, features: torch.Tensor, frame: ReceivedFrame) -> None:
        """Give the session an encoded frame, with features (features, width)."""
        if not self._is_done:
            self._num_encoding -= 1
            if not self._is_discarded:  # it was closed meanwhile
                self.session.receive(features, frame.time, frame.arrival)

    @property
    def unread_turns(self) -> list[tuple[str, str]]:
        """Role and text of what was said and waits for a step that reads it, without the system prompt."""
        said = [(turn["role"], turn["content"]) for turn in self.session._unfed_turns if turn["role"] != "system"]
        return said + [(x.role, x.text) for x in self.session._questions if x.text is not None and x.probe is None]

    def next_step(self) -> StreamStep | None:
        """
        Return what the stream needs from the model next, or `None` if it has nothing to do. Text of more than
        `max_batch_tokens` tokens is read in several steps, so that other streams go on between them.
        """
        # A discarded stream drops text that it has not read. A step of one token is part of a reply, which goes on.
        # Nothing may follow a dropped step: the stream remembers tokens of it that the cache lacks.
        if self._is_discarded and self._step is not None and len(self._step.ids) > 1:
            self._work.close()
            self.session.discard()  # a streamer may have closed the stream before frames of its step were put back
            self._step = self._work = None
        while self._step is None:
            to_the_end = self._is_closing and not self._received
            if self._work is None and self.session.has_work(to_the_end=to_the_end):
                self._work = self.session.work(to_the_end=to_the_end)
                self._step = next(self._work, None)
                self._work = None if self._step is None else self._work
            elif self._work is None:
                return None
        most = self._engine.max_batch_tokens
        return StreamStep(self._step.ids[:most], [most - 1]) if self._has_long_text else self._step

    @property
    def _has_long_text(self) -> bool:
        """Whether the text of the next step, or that before its frames, must be read in several steps."""
        step, most = self._step, self._engine.max_batch_tokens
        if len(step.ids) <= most:
            return False
        frame = self.session.model.config.frame_token_id
        return (step.ids.index(frame) if step.num_frames else len(step.ids)) > most

    def give(self, result: StepResult) -> None:
        """Continue with the result of the stream's step."""
        if self._has_long_text:  # a part of it was read
            step, most = self._step, self._engine.max_batch_tokens
            self._step = replace(step, ids=step.ids[most:], ends=[end - most for end in step.ends])
            return
        try:
            self._step = self._work.send(result)
        except StopIteration:
            self._step = self._work = None

    def collect(self) -> list[StreamEvent]:
        """Return the events since the last call, and pass them to listeners."""
        events = self.session.events
        new = events[self._num_said :]
        for event in new:
            self._said.put(event)
        if self.max_events is not None:
            del events[: -self.max_events]
            with suppress(queue.Empty):  # a listener may take them meanwhile
                while self._said.qsize() > self.max_events:
                    self._said.get_nowait()
        self._num_said = len(events)
        return new

    def end_if_finished(self) -> None:
        """End the stream if it is closed and everything was seen and answered."""
        is_over = self._is_closing and not self._received and not self.has_work
        if is_over and not self._is_done and not self.session.is_paused:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """End the stream and free its memory."""
        self.error, self._is_done, self._is_closing = error, True, True
        self._received.clear()
        self._step = self._work = None
        self.session.closed = True
        self.session.cache.release()

    def stop_listeners(self) -> None:
        """Let iteration over the stream end after the last event."""
        self._said.put(None)


__all__ = ["EngineStream", "ReceivedFrame"]
