# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Open the stream of a session, and turn its errors into answers for the client."""

from typing import Any

from .limits import RequestError
from .memory import EngineFullError, TooLargeError
from .session_options import MEMORY, SessionOptions, check_fps, field_of
from .stream import EngineStream
from .telling import Teller


async def open_stream(session: Any) -> tuple[EngineStream, Teller]:
    """
    Open the stream of a [`LiveSession`] with its options.

    Raises:
        [`RequestError`]: If the server is full or its engine has stopped, or an option is wrong.
    """
    sessions, options, limits = session.sessions, session.options, session.limits
    check_fps(options.fps, limits, session.path)
    teller = Teller(sessions.engine.processor.tokenizer)
    given = options.memory() | options.speaking()
    given |= {"fps": options.fps, "interval_threshold": options.interval_threshold, "streamer": teller}
    given |= {"max_new_tokens": session.max_output_tokens, "when_behind": sessions.when_behind}
    given |= {"max_waiting": limits.max_waiting, **session.stream_options}
    try:
        stream = await sessions.run(lambda: sessions.engine.open(**given))
    except (ValueError, TooLargeError) as error:  # a client must not wait for room that there will never be
        raise _option_error(error, session.path) from None
    except EngineFullError:
        raise sessions.full() from None
    except RuntimeError as error:
        raise RequestError(str(error), status=503, code="engine_stopped") from None
    teller.session, stream.max_events = stream.session, limits.max_unsent
    stream.session.answers_early = True  # a client would wait in silence for the answer
    return stream, teller


async def open_again(session: Any, options: SessionOptions) -> None:
    """
    Open the stream of a [`LiveSession`] with other memory. If that fails, it is as before, or the session ends.

    Raises:
        [`RequestError`]: If that fails.
    """
    before, old, session.teller = session.options, session.stream, None
    await session.sessions.run(lambda: old.close(discard=True))
    await session.sessions.freed(old)
    session.refuse_if_over()
    try:
        session.options = options
        await session.open()
    except RequestError:
        session.options = before
        await _open_as_before(session)
        raise
    finally:
        if session.over is not None and session.stream is not old:  # it ended meanwhile
            await session.close()
    session.refuse_if_over()


async def _open_as_before(session: Any) -> None:
    try:
        await session.open()
    except RequestError as error:
        await session.close(f"its stream could not be opened again: {error}")


def _option_error(error: Exception, path: str) -> RequestError:
    """Return the error for a client whose option the engine does not take. It begins with the name of a limit."""
    name = next((name for name in MEMORY if str(error).startswith(f"`{name}`")), None)
    param = path or None if name is None else field_of(path, name)
    return RequestError(str(error), code="invalid_value", param=param)


__all__ = ["open_again", "open_stream"]
