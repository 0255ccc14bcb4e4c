# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The end of a server that is removed: its sessions are saved, or answer what they have accepted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from transformers.utils import logging


logger = logging.get_logger(__name__)

_PERIOD = 0.5  # seconds between two looks


def draining(
    application: FastAPI,
    seconds: float,
    is_removed: Callable[[], bool],
    goes_on_elsewhere: Callable[[], bool] = lambda: True,
) -> Any:
    """
    Return the lifespan of an application that ends its sessions in order, also while connections are still open.

    Args:
        application (`FastAPI`): What [`create_app`] returned.
        seconds (`float`): How long the sessions may take. What is left then is discarded.
        is_removed (`Callable`): Returns whether the server is about to be removed. Its connections may be open still.
        goes_on_elsewhere (`Callable`, *optional*): Returns whether another server can resume sessions that this one
            saves. Otherwise they are not saved, and say what they have to say.
    """
    run = application.router.lifespan_context

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with run(application):
            is_over = asyncio.Event()
            server = application.state.server
            task = asyncio.create_task(_drain(server, seconds, is_removed, goes_on_elsewhere, is_over))
            try:
                yield
            finally:
                is_over.set()
                await task  # to cancel it would lose a session that is being saved

    return lifespan


async def _drain(
    server: Any,
    seconds: float,
    is_removed: Callable[[], bool],
    goes_on_elsewhere: Callable[[], bool],
    is_over: asyncio.Event,
) -> None:
    while not (is_removed() or is_over.is_set()):
        await asyncio.sleep(_PERIOD)
    logger.info("The server is removed: its sessions are saved or end.")
    try:
        await asyncio.wait_for(_save_or_end(server, goes_on_elsewhere()), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        left = len(list(server.sessions))
        logger.warning(f"{left} sessions were neither saved nor answered within {seconds:g} s. They are lost.")
        await server.sessions.end_all()


async def _save_or_end(server: Any, saves: bool) -> None:
    if saves:
        await server.saved.save_all()
    await server.sessions.drain()


__all__ = ["draining"]
