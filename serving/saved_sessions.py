# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sessions that outlive their server: it saves them at its end or also before, and the next one resumes them."""

import asyncio
import json
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .live_session import FINAL, LiveSession
from .live_sessions import LiveSessions, id_taken, secret_of
from .memory import EngineFullError, TooLargeError
from .pages import OutOfPagesError
from .realtime import Conversation
from .realtime_events import Audio
from .saved_files import write
from .session_options import SessionOptions, check_fps
from .session_state import (
    FORMAT,
    SessionBusyError,
    fill_session,
    lock_alone,
    news_of,
    pack_session,
    questions_of,
    state_of_session,
)
from .state_folder import StateFolder
from .telling import Teller
from .wanted_sessions import SessionMovedError, Wanted, lost, moving, saved_as, unreadable


logger = logging.get_logger(__name__)

_CLIENT, _STREAM, _MOVED = "client.json", "stream", "moved.txt"
_SWEEP_SECONDS = 10.0
_DISCONNECT_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # between two looks for sessions that are due to be saved
_MOST_SECONDS_AWAY = 60.0  # after which a session is lost whose server has died while it was on its way to another


@dataclass(eq=False)
class _Kept:
    """
    The last save of a session that goes on.

    Attributes:
        time (`float`): When it was due last, by the clock of the event loop.
        since (`float`): Since when there may be something that is not saved.
        news (*optional*): What `news_of` was in the last save.
        is_late (`bool`), has_failed (`bool`): Whether the log says so since then.
    """

    time: float
    since: float
    news: tuple[Any, ...] | None = None
    is_late: bool = False
    has_failed: bool = False


class SavedSessions:
    """
    Finds sessions of a server, also those that a server has saved.

    Args:
        sessions ([`LiveSessions`]): Its sessions.
        folder ([`StateFolder`], *optional*): Where sessions are saved when the server ends, and before if `sessions`
            says so. Without it they end with their server.
        name (`str`): The model's name for clients.
        audio ([`Audio`]): How sessions hear and speak.
    """

    def __init__(self, sessions: LiveSessions, folder: StateFolder | None, name: str, audio: Audio) -> None:
        self.sessions, self.folder, self.name, self.audio = sessions, folder, name, audio
        self._lock = asyncio.Lock()
        self._moved: dict[str, LiveSession] = {}  # sessions from other servers, by their notes
        self._saving = asyncio.Lock()  # one at a time, while sessions go on
        self._kept: dict[LiveSession, _Kept] = {}
        if folder is not None:
            sessions.start(self._sweep())
            if sessions.save_seconds is not None:
                sessions.start(self._keep_all())
                sessions.start(self._renew_all())

    async def find(self, session_id: str, owner: str | None = None) -> LiveSession:
        """
        Return a session of an owner by its name.

        Raises:
            [`RequestError`]: If there is none, or it cannot be resumed. It is a [`SessionMovedError`] if the session
                has another name now.
        """
        wanted = Wanted(owner, session_id=session_id)
        session = None if self._is_here(wanted) else await self._restore(wanted)
        if session is None:
            await self._refuse_if_moved(wanted)
        elif session.session_id != session_id:
            raise SessionMovedError(session_id, session.session_id)
        return self.sessions.find(session_id, owner)

    async def find_token(self, token: str, owner: str | None = None) -> LiveSession:
        """
        Return the session of an owner that a resume token belongs to, also a token of a server that had it before.

        Raises:
            [`RequestError`]: If there is none, or it cannot be resumed. It is a [`SessionMovedError`] if another
                server that shares the folder has the session.
        """
        wanted = Wanted(owner, token=token)
        session = None if self._is_here(wanted) else await self._restore(wanted)
        if session is None:
            await self._refuse_if_moved(wanted)
        return self.sessions.find_token(token, owner) if session is None else session

    async def open(
        self, options: SessionOptions, *, session_id: Any = None, owner: str | None = None, **given: Any
    ) -> LiveSession:
        """Open a session as [`~LiveSessions.open`] does. The name of a saved session is taken."""
        if self.folder is not None and session_id is not None:
            wanted = Wanted(owner, session_id=self.sessions.check_id(session_id))
            async with self._lock:  # a session that is being restored has its name soon
                is_taken = await self.sessions.run(lambda: self._peek(wanted.secret)) is not None
            if is_taken:
                raise id_taken(wanted.session_id)
        return await self.sessions.open(options, session_id=session_id, owner=owner, **given)

    async def close(self, session: LiveSession) -> None:
        """End a session, and remove what was saved of it: it is gone when this returns."""
        await session.close()
        if self.folder is not None:
            await self._remove(session)

    async def remove(self, session_id: str, owner: str | None = None) -> bool:
        """
        Remove a saved session of an owner by its name, without restoring it: a full server has no room for it.

        Returns:
            `bool`: Whether there was one. A session that goes on here is none.

        Raises:
            [`RequestError`]: If the session is damaged, cannot be reached, or goes on at another server.
        """
        wanted = Wanted(owner, session_id=session_id)
        if self._is_here(wanted):
            return False
        self.sessions.refuse_if_draining()
        async with self._lock:
            taken = None if self._is_here(wanted) else await self._take(wanted)
            if taken is not None:
                await self.sessions.run(lambda: self.folder.discard(taken))
            return taken is not None

    async def save_all(self) -> None:
        """Open no more sessions, and save those that clients can resume. They end here."""
        self.sessions.is_draining = True
        if self.folder is None:
            return
        async with self._saving, self._lock:  # a session that is being restored is saved again
            sessions = [found for found in self.sessions if found.can_be_resumed and found.over is None]
        # A client that is away may ask another server before its session is saved.
        run, wanted = self.sessions.run, [saved_as(session) for session in sessions]
        await run(lambda: [self._note(one, "") for one in wanted])
        renewing = self.sessions.start(self._renew_notes([one.note for one in wanted]))
        try:
            for session, one in zip(sessions, wanted, strict=True):
                try:
                    if session.over is None:
                        await self._save(session)
                except Exception as error:
                    logger.warning(f"The session {session.session_id} could not be saved: {error}")
                finally:
                    await run(lambda note=one.note: self.folder.remove(note))
        finally:
            renewing.cancel()

    async def _renew_notes(self, notes: Sequence[str]) -> None:
        """Let notes of sessions that wait to be saved, or are being saved, expire later. Those removed stay away."""
        while True:
            await asyncio.sleep(_MOST_SECONDS_AWAY / 4)
            until = dict.fromkeys(notes, clock.time() + _MOST_SECONDS_AWAY)
            await self.sessions.run(lambda until=until: self.folder.renew(until))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._moved = {note: session for note, session in self._moved.items() if session.over is None}
            try:
                notes = dict.fromkeys(self._moved, self._notes_expire)
                await self.sessions.run(lambda notes=notes: self.folder.renew(notes))
                await self.sessions.run(self.folder.remove_expired)
            except OSError as error:
                logger.warning(f"Expired sessions could not be removed: {error}")

    # ------------------------------------------------------------------------------------------------------------ save

    async def _save(self, session: LiveSession) -> None:
        run, stream = self.sessions.run, session.stream
        place = await run(self.folder.begin)
        saved = session.saved = asyncio.Event()
        try:
            await lock_alone(session)  # an answer that a request waits for is not said on the next server
            try:
                conversation = session.conversation
                if conversation is not None:
                    await conversation.disconnect(_DISCONNECT_SECONDS)
                expires = clock.time() + session.seconds_left
                waiting = await run(lambda: questions_of(session))
                await session.saving(lambda: stream.save(place / _STREAM, close=True))
                state = json.dumps(state_of_session(session, waiting), allow_nan=False)
                await run(lambda: (place / _CLIENT).write_text(state, encoding="utf-8"))
            finally:
                session.lock.release()
            await run(lambda: self.folder.commit(place, saved_as(session).secret, expires))
        finally:
            await run(lambda: self.folder.discard(place))
            saved.set()

    # ------------------------------------------------------------------------------------------------ save and go on

    async def _keep_all(self) -> None:
        """Save each session that is due, one after the other. They go on."""
        while True:
            await asyncio.sleep(min(self.sessions.save_seconds, _LOOK_SECONDS))
            for session in filter(lambda found: found.can_be_resumed, self.sessions):
                kept = self._watch(session)
                async with self._saving:
                    is_due = session._loop.time() >= kept.time + self.sessions.save_seconds
                    if is_due and session.over is None and not self.sessions.is_draining:
                        await self._keep(session, kept)

    async def _renew_all(self) -> None:
        """Let the saves of sessions that go on expire later, and tell which sessions are not saved in time."""
        while not self.sessions.is_draining:  # the last saves come then
            until = {saved_as(session).secret: self._kept_until(session) for session in self._kept}
            await self.sessions.run(lambda until=until: self.folder.renew(until))
            for session, kept in self._kept.items():
                seconds = session._loop.time() - kept.since
                is_late = seconds > 2 * self.sessions.save_seconds + _LOOK_SECONDS and kept.news != news_of(session)
                if is_late and not kept.is_late:
                    kept.is_late = True
                    self.sessions.metrics.save_faults.labels("late").inc()
                    logger.warning(f"The session {session.session_id} has not been saved for {seconds:.0f} s.")
            await asyncio.sleep(min(self.sessions.save_seconds, _LOOK_SECONDS))

    def _watch(self, session: LiveSession) -> _Kept:
        """Take note of a session that will be due, and of its end. One that is watched already stays as it is."""
        if session in self._kept:
            return self._kept[session]

        def listen(kind: str, *what: Any) -> None:
            if kind == "over":
                self._kept.pop(session, None)
                if what[0] in FINAL:
                    self.sessions.start(self._remove(session))

        kept = _Kept(session._loop.time(), session._loop.time())
        if session.over is None:
            session.listeners.append(listen)
            self._kept[session] = kept
        return kept

    async def _keep(self, session: LiveSession, kept: _Kept) -> None:
        """Save a session if it has news. One that cannot be saved now is due again at the next look."""
        run, folder, secret = self.sessions.run, self.folder, saved_as(session).secret
        now, place = session._loop.time(), None
        try:
            has_news = await run(lambda: folder.peek(secret)) is None or kept.news != news_of(session)
            if has_news:
                if session.conversation is not None and session.conversation.is_busy:
                    return  # its stream need not pause
                news, state, stream = await pack_session(session)
                place = await run(folder.begin)
                await run(lambda: write(stream, self.sessions.engine.model, place / _STREAM))
                await run(lambda: (place / _CLIENT).write_text(state, encoding="utf-8"))
                expires = self._kept_until(session)
                await run(lambda: folder.commit(place, secret, expires, is_held=True))
                kept.news, kept.is_late, kept.has_failed, session.is_kept = news, False, False, True
            kept.time = kept.since = now
        except SessionBusyError:
            pass
        except Exception as error:
            kept.time = now
            if session.over is None:
                self.sessions.metrics.save_faults.labels("failed").inc()
                if not kept.has_failed:
                    logger.warning(f"The session {session.session_id} could not be saved: {error}")
                kept.has_failed = True
        finally:
            if place is not None:
                await run(lambda: folder.discard(place))
        if session.over in FINAL:
            await self._remove(session)

    async def _remove(self, session: LiveSession) -> None:
        """Remove what was saved of a session that is over."""
        async with self._lock:  # a session of the same name is opened after that
            await self.sessions.run(lambda: self.folder.remove(saved_as(session).secret))

    def _kept_until(self, session: LiveSession) -> float:
        """Return until when a session that goes on is kept, if this is its last save."""
        return clock.time() + session.seconds_left + 2 * self.sessions.save_seconds

    # --------------------------------------------------------------------------------------------------------- restore

    def _is_here(self, wanted: Wanted) -> bool:
        """Whether a session need not be looked for in the folder."""
        if self.folder is None:
            return True
        if wanted.token is not None:
            return self.sessions.has_token(wanted.token)
        return self.sessions.is_of(wanted.session_id, wanted.owner)

    async def _restore(self, wanted: Wanted) -> LiveSession | None:
        """Resume a saved session, and return it, or `None` if there is none or another request has done it."""
        self.sessions.refuse_if_draining()
        # A client that leaves now cancels this, and the stream would be lost.
        return await asyncio.shield(self.sessions.start(self._restore_in_turn(wanted)))

    async def _restore_in_turn(self, wanted: Wanted) -> LiveSession | None:
        """Resume a saved session after those before it. It does not expire meanwhile, since its client is there."""
        seconds = self.sessions.limits.resume_seconds

        async def extend() -> None:
            until = clock.time() + seconds
            await self.sessions.run(lambda: self.folder.extend(wanted.secret, until))

        async def extend_again() -> None:
            while True:
                await asyncio.sleep(seconds / 4)
                await extend()

        await extend()
        extending = self.sessions.start(extend_again())
        try:
            async with self._lock:
                return await self._restore_now(wanted)
        finally:
            extending.cancel()

    async def _restore_now(self, wanted: Wanted) -> LiveSession | None:
        run, folder = self.sessions.run, self.folder
        if self._is_here(wanted):
            return None
        self.sessions.refuse_if_draining()
        taken = await self._take(wanted)
        if taken is None:
            return None
        await run(lambda: self._note(wanted, ""))
        try:
            session, before = await self._open(taken, wanted)
        except BaseException as error:
            # Another server that shares the folder may have room, or the right model.
            folder.put_back(taken, wanted.secret)
            folder.remove(wanted.note)
            if isinstance(error, OSError):
                raise unreadable(error) from None
            if isinstance(error, (ValueError, KeyError, TypeError, TooLargeError)):
                raise lost(error, taken / _STREAM) from None
            if isinstance(error, (EngineFullError, OutOfPagesError)):  # others took the memory meanwhile
                raise self.sessions.full() from None
            raise
        await self._let_go(taken, session)
        if session.session_id == before:
            await run(lambda: folder.remove(wanted.note))
        else:
            await run(lambda: self._note(wanted, session.session_id))
            self._moved[wanted.note] = session
        return session

    async def _take(self, wanted: Wanted) -> Path | None:
        """Take a session out of the folder, or return `None`. Raise [`RequestError`] if it cannot be had."""
        await self.sessions.run(lambda: self._refuse_if_held(wanted))
        try:
            taken = await self.sessions.run(lambda: self.folder.take(wanted.secret))
        except OSError as error:
            raise unreadable(error) from None
        except ValueError as error:
            raise lost(error) from None
        if taken is None:
            await self.sessions.run(lambda: self._refuse_if_held(wanted))  # another server was faster
        return taken

    async def _let_go(self, taken: Path, session: LiveSession) -> None:
        """Remove the files of a session that goes on here, or keep them until it is saved again."""
        if self.sessions.save_seconds is None:
            await self.sessions.run(lambda: self.folder.discard(taken))
            return
        self._watch(session)
        secret, until = saved_as(session).secret, self._kept_until(session)
        try:
            await self.sessions.run(lambda: self.folder.put_back(taken, secret, held_until=until))
            session.is_kept = True
        except OSError as error:
            logger.warning(f"The files of the session {session.session_id} could not be kept: {error}")

    def _peek(self, secret: str) -> Path | None:
        try:
            return self.folder.peek(secret)
        except OSError as error:
            raise unreadable(error) from None

    def _refuse_if_held(self, wanted: Wanted) -> None:
        """Raise [`RequestError`] if a session was saved and goes on at another server, which lives."""
        place = self._peek(wanted.secret)
        if place is None or not self.folder.is_held_elsewhere(place):
            return
        try:
            name = json.loads((place / _CLIENT).read_text(encoding="utf-8"))["session_id"]
        except (OSError, ValueError, KeyError, TypeError):  # it is replaced just now
            name = None
        before, now = wanted.names(name or "")
        if name is None or before == now:
            raise moving("Another server has the session: try again.")
        raise SessionMovedError(before, now)

    def _note(self, wanted: Wanted, now: str) -> None:
        """Let all servers that share the folder know the new name of a session, `""` while it is on its way."""
        try:
            place = self.folder.begin()
            (place / _MOVED).write_text(now, encoding="utf-8")
            expires = self._notes_expire if now else clock.time() + _MOST_SECONDS_AWAY
            self.folder.commit(place, wanted.note, expires)
        except (OSError, ValueError) as error:
            logger.warning(f"Other servers cannot be told where a session is: {error}")

    async def _refuse_if_moved(self, wanted: Wanted) -> None:
        """Raise [`RequestError`] if a session is at another server, or on its way there."""
        if self._is_here(wanted):
            return
        place = await self.sessions.run(lambda: self._peek(wanted.note))
        try:
            name = None if place is None else (place / _MOVED).read_text(encoding="utf-8")
        except FileNotFoundError:  # another server has removed it
            return
        except OSError as error:
            raise unreadable(error) from None
        if name == "":
            raise moving("The session moves to another server: try again.")
        if name is None:
            return
        before, now = wanted.names(name)
        if now != before:
            await self.sessions.run(lambda: self.folder.renew({wanted.note: self._notes_expire}))
            raise SessionMovedError(before, now)

    @property
    def _notes_expire(self) -> float:
        return clock.time() + self.sessions.limits.idle_seconds

    async def _open(self, taken: Path, wanted: Wanted) -> tuple[LiveSession, str]:
        """Open a saved session. Return it, and the name that it had."""
        sessions, engine = self.sessions, self.sessions.engine
        state = json.loads((taken / _CLIENT).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"It has format {state['format']}; this version reads format {FORMAT}.")
        options = SessionOptions.model_validate(state["options"])
        check_fps(options.fps, sessions.limits, "session.videollm_mod")
        session = LiveSession(sessions, options, state["instructions"], owner=wanted.owner)
        teller = Teller(engine.processor.tokenizer)
        given = {"streamer": teller, "speak": None if options.unprompted else options.speaking()["speak"]}
        stream = await sessions.run(lambda: engine.restore(taken / _STREAM, pause=True, **given))
        try:
            teller.go_on(stream.session)
            session.stream, session.teller, stream.max_events = stream, teller, sessions.limits.max_unsent
            fill_session(session, state)
            if wanted.token is not None:
                session.token = sessions.prefix + secret_of(wanted.token)
            if state["conversation"] is not None:
                went_on = self.folder.went_on(taken)
                Conversation(session, self.name, self.audio).go_on(state["conversation"], went_on=went_on)
        except BaseException:
            stream.close(discard=True)
            raise
        else:
            sessions.add(session)
            session.wait_for_client(is_connected=state["conversation"] is None)
        finally:
            await sessions.run(stream.resume)
        return session, state["session_id"]


__all__ = ["SavedSessions"]
