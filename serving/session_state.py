# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What files hold of a client's session besides its stream, and how it is copied while the session goes on."""

import asyncio
import json
import time as clock
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from .live_session import LiveSession
from .saved_files import Saved
from .telling import Frame, Reply


# Another format is refused.
FORMAT = 3
# Attributes of a session that are saved as they are.
_KEPT = ("instructions", "max_output_tokens", "created", "has_begun", "num_received", "num_skipped")
_KEPT += ("_context", "last_time", "_due")
_LOCK_SECONDS = 1.0  # for which a save waits for a request in progress
_KEPT_OF_REPLY = ("reply_id", "is_asked", "metadata", "is_spoken", "ignored")


def questions_of(session: LiveSession) -> list[Reply]:
    """Return the replies that clients wait for, in the order in which the stream will answer."""
    with session.sessions.engine.changed:
        questions = session.stream.session._questions
        return [session.asked[id(question)] for question in questions if id(question) in session.asked]


def state_of_session(session: LiveSession, waiting: list[Reply]) -> dict[str, Any]:
    """Return what is saved of a session besides its stream."""
    state: dict[str, Any] = {name: getattr(session, name) for name in _KEPT}
    still = set(map(id, session.asked.values()))
    asked = [{name: getattr(reply, name) for name in _KEPT_OF_REPLY} for reply in waiting if id(reply) in still]
    zero = session._zero
    return state | {
        "format": FORMAT,
        "prefix": session.sessions.prefix,
        "session_id": session.session_id,
        "options": session.options.model_dump(),
        # The clock of another process begins elsewhere.
        "zero": None if zero is None else clock.time() - (session._loop.time() - zero),
        "frames": [[frame.item_id, frame.time] for frame in session._frames],
        "asked": asked,
        "conversation": None if session.conversation is None else session.conversation.to_dict(),
    }


def fill_session(session: LiveSession, state: dict[str, Any]) -> None:
    """Give a new session what was saved of it. Its stream was restored already."""
    for name in _KEPT:
        setattr(session, name, state[name])
    name = session.sessions.prefix + state["session_id"].removeprefix(state["prefix"])
    # The next server may have other limits.
    session.max_output_tokens = min(session.max_output_tokens, session.limits.max_output_tokens)
    session.stream.session.max_new_tokens = session.max_output_tokens
    session.stream.max_waiting = session.limits.max_waiting
    session.session_id = session.session_id if session.sessions.has(name) else name
    if state["zero"] is not None:
        session._zero = session._loop.time() - (clock.time() - state["zero"])
    session._frames = deque(Frame(item_id, time) for item_id, time in state["frames"])
    questions = [question for question in session.stream.session._questions if question.reply_now]
    for question, reply in zip(questions, state["asked"], strict=True):
        session.asked[id(question)] = Reply(question=question, **reply)


# --------------------------------------------------------------------------------------------- sessions that go on


class SessionBusyError(Exception):
    """A session cannot be saved now, but later."""


async def lock_alone(session: LiveSession) -> None:
    """Lock a session when no request waits for its stream."""
    while True:
        await session.until(lambda: session.num_requests == 0)
        await session.lock.acquire()
        if session.num_requests == 0:
            return
        session.lock.release()


async def _lock(session: LiveSession) -> None:
    """Lock a session. Raise [`SessionBusyError`] if requests wait for its stream, or have the lock, for too long."""
    try:
        await asyncio.wait_for(lock_alone(session), _LOCK_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):
        raise SessionBusyError from None


@asynccontextmanager
async def _resting(session: LiveSession) -> AsyncIterator[None]:
    """Let the stream of a session rest, and events of its client wait, when all that it has done was told."""
    run = session.sessions.run
    # Before the first frame, an event of the client may replace the stream: then events wait.
    may_wait = session.conversation is None or not session.has_begun
    async with AsyncExitStack() as stack:
        await _lock(session)
        if may_wait:
            stack.callback(session.lock.release)
        else:
            session.lock.release()
        stream = session.stream
        await run(stream.pause)
        stack.push_async_callback(run, stream.resume)
        await run(stream.wait_for_rest)  # a client may cancel the reply that is finished here
        if not may_wait:
            await _lock(session)  # a request over plain HTTP may have come, and waits until the stream goes on
            stack.callback(session.lock.release)
        await run(lambda: session.sessions.tell(session))
        yield


async def pack_session(session: LiveSession) -> tuple[tuple[Any, ...], str, Saved]:
    """
    Return what is saved of a session that goes on: its news, its state as JSON, and its stream.

    Raises:
        [`SessionBusyError`]: If a request waits for the stream, or something is heard or spoken, which is not saved.
    """
    run = session.sessions.run
    async with _resting(session):
        if session.conversation is not None and session.conversation.is_busy:
            raise SessionBusyError
        waiting = await run(lambda: questions_of(session))
        state = json.dumps(state_of_session(session, waiting), allow_nan=False)
        return news_of(session), state, await run(session.stream.pack)


def news_of(session: LiveSession) -> tuple[Any, ...]:
    """Return what changes when there is something to save. A heartbeat changes nothing."""
    stream, conversation = session.stream.session, session.conversation
    # Its cache may have the same length after a reply, for which it has forgotten something.
    news = (stream.num_frames, int(stream.cache.num_seen), stream.events[-1:], len(stream._questions))
    news += (session.num_received, session.options)
    news += (session.instructions, session.max_output_tokens)
    if conversation is None:
        return news
    return (*news, conversation.last_item, conversation.audio.settings(), conversation.hearing.num_changes)


__all__ = [
    "FORMAT",
    "SessionBusyError",
    "fill_session",
    "lock_alone",
    "news_of",
    "pack_session",
    "questions_of",
    "state_of_session",
]
