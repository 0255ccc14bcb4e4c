# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Count the text tokens that a client sends, and refuse text that a stream has no memory for."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from .limits import RequestError
from .memory import SPARE_TEXT
from .session_options import SessionOptions, field_of


def most_text(engine: Any, asked: int | None = None) -> int:
    """Return how many text tokens a stream has memory for that is opened with this `max_text_tokens`."""
    context = engine.model.config.text_config.max_position_embeddings
    return min(engine.max_text_tokens if asked is None else asked, context)


def has_more_than(most: int, turns: Sequence[tuple[str, str]], engine: Any) -> bool:
    """Return whether turns, as pairs of role and text, have more than so many tokens with those between them."""
    if not turns:
        return most < 0
    processor, total = engine.processor, 0
    with engine.changed:  # the engine uses the same tokenizer, which is not made for several threads
        for _, text in turns:  # of a very long request, only the beginning is read
            ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            total += len(ids["input_ids"])
            if total > most:
                return True
        messages = [{"role": role, "content": text} for role, text in turns]
        return len(processor.encode_turns(messages, stream_open=False, then="assistant")) > most


def check_history(engine: Any, system_prompt: str | None, turns: Sequence[tuple[str, str]]) -> None:
    """Raise [`RequestError`] if the texts of a chat request do not fit into the stream that will answer it."""
    most = most_text(engine)
    prompt = engine.processor.system_prompt if system_prompt is None else system_prompt
    # The spare text stays free for what stands around pictures.
    if has_more_than(most, [("system", prompt), *turns], engine):
        wrong = f"The texts of the messages have more than {most} tokens, which is the most that this server reads "
        wrong += "in a request. Shorten them, or leave out the oldest messages."
        raise RequestError(wrong, code="context_length_exceeded", param="messages")


def check_live_text(session: Any, turns: Sequence[tuple[str, str]], asked: int | None, param: str | None) -> None:
    """
    Raise [`RequestError`] if texts of a client do not fit into its stream, with those that wait to be read.

    Args:
        session ([`LiveSession`]): The session. Its stream may not be open yet.
        turns (`Sequence[tuple[str, str]]`): Pairs of role and text.
        asked (`int`, *optional*): The `max_text_tokens` that its client has set.
        param (`str`, *optional*): The field of the text, for errors.
    """
    engine = session.sessions.engine
    most = most_text(engine, asked)
    with engine.changed:
        waiting = [] if session.stream is None else session.stream.unread_turns
        # What was said before the first frame stays.
        cached = 0 if session.num_received else session._context
        if has_more_than(most + SPARE_TEXT - cached, [*waiting, *turns], engine):
            wrong = f"The text does not fit into the {most} tokens of text that this session remembers"
            wrong += ", with what was said before the first frame" if cached else ""
            wrong += ", with what was said before it and waits to be read. " if waiting else ". "
            wrong += "Send less text, or open a session with a larger `max_text_tokens`."
            raise RequestError(wrong, code="context_length_exceeded", param=param)


async def check_settings(session: Any, options: SessionOptions, instructions: str | None) -> None:
    """Raise [`RequestError`] if a text of new settings is too long: one that is said without the client."""
    texts = {"session.instructions" if session.path else "instructions": instructions}
    texts[field_of(session.path, "prompt")] = options.prompt
    for param, text in texts.items():
        if text is not None:
            session.limits.check_text(text, param=param)
            await session.work(partial(check_live_text, session, [("user", text)], options.max_text_tokens, param))


__all__ = ["check_history", "check_live_text", "check_settings", "has_more_than", "most_text"]
