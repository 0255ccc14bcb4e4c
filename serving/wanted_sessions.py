# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which saved session a client asks for, and the errors for those that it cannot have."""

from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from .limits import RequestError
from .live_session import LiveSession
from .live_sessions import secret_of


logger = logging.get_logger(__name__)


class SessionMovedError(RequestError):
    """
    A session was resumed under another name, because its server is another one.

    Args:
        before (`str`), now (`str`): Its names, or its resume tokens.
    """

    def __init__(self, before: str, now: str) -> None:
        super().__init__("The session goes on at another address.", status=308, code="session_moved")
        self.before, self.now = before, now


class Wanted(NamedTuple):
    """Which session an owner asks for: the one of a name, or the one of a resume token."""

    owner: str | None
    session_id: str | None = None
    token: str | None = None

    @property
    def secret(self) -> str:
        """Under what it is saved. It includes the owner, so that other owners cannot find the session."""
        secret = f"id {self.session_id}" if self.token is None else f"token {secret_of(self.token)}"
        return secret if self.owner is None else f"{secret} of {self.owner}"

    @property
    def note(self) -> str:
        """Under what its new name is kept."""
        return f"moved {self.secret}"

    def names(self, session_id: str) -> tuple[str, str]:
        """Return what was asked for, and how to ask the server for it that has the session under this name."""
        if self.token is None:
            return self.session_id, session_id
        prefix, dot, _ = session_id.rpartition(".")
        return self.token, prefix + dot + secret_of(self.token)


def lost(error: Exception, folder: Path | None = None) -> RequestError:
    """Log why a session cannot be resumed, and return the error for its client, which does not learn the folder."""
    logger.warning(f"A saved session was not resumed: {error}")
    why = str(error).replace(f" in '{folder}'", "").replace(f"{folder}/", "")
    return RequestError(f"The session cannot be resumed: {why}", status=410, code="session_lost")


def moving(why: str) -> RequestError:
    """Return the error for a client that should try again soon."""
    return RequestError(why, status=503, code="session_moving", retry_after=1)


def unreadable(error: OSError) -> RequestError:
    """Log why saved sessions cannot be read, and return the error for a client, whose session may be among them."""
    logger.warning(f"Saved sessions cannot be read now: {error}")
    return moving("Saved sessions cannot be read now: try again.")


def saved_as(session: LiveSession) -> Wanted:
    """Return under what a session is saved: a client of the realtime protocol resumes it with its token."""
    if session.conversation is None:
        return Wanted(session.owner, session_id=session.session_id)
    return Wanted(session.owner, token=session.token)


__all__ = ["SessionMovedError", "Wanted", "lost", "moving", "saved_as", "unreadable"]
