# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Frames and replies of a session, and a report to another thread of what its stream did in a step of the engine."""

import math
import secrets
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..streaming_videollm_mod import StreamEvent
from .stream import EngineStream


@dataclass(eq=False)
class Frame:
    """
    A frame that a client sent.

    Attributes:
        item_id (`str`): Its name.
        time (`float`): Seconds in the stream.
        fate (`str`, *optional*): `"seen"`, or why it was not: `"behind"` or `"fps"`. `None` while it waits.
        index (`int`, *optional*): Its number among the frames seen.
        interval_probability (`float`, *optional*): Probability of silence after it, for the last frame of a step.
        lag (`float`, *optional*): Seconds from its arrival to the decision.
        kept_patches (`list[float]`, *optional*): For each token of the frame the share of routed layers that keep it.
    """

    item_id: str
    time: float
    fate: str | None = None
    index: int | None = None
    interval_probability: float | None = None
    lag: float | None = None
    kept_patches: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what clients get to know."""
        names = ("time", "fate", "index", "interval_probability", "lag", "kept_patches")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(eq=False)
class Reply:
    """
    Something that the model says, or was asked to say.

    Attributes:
        reply_id (`str`): Its name.
        is_asked (`bool`): Whether a client asked for it.
        metadata (`dict`, *optional*): What the client gave with its request.
        is_spoken (`bool`, *optional*): Whether the client wants to hear it, by default what the session says.
        ignored (`list[str]`): Fields of its request that have no effect.
        text (`str`): The words so far.
        event ([`StreamEvent`], *optional*): The reply at its end.
        is_cancelled (`bool`), is_failed (`bool`): Whether a client cancelled it, and whether its session ended first.
        is_silenced (`bool`): Whether a client cancelled it when its text was complete, but not its speech.
        context (`int`), cached (`int`), image (`int`): Tokens in the cache at its beginning, those that were there
            at the end of the reply before, and those of frames.
        begun (`float`): A time at which it had begun and later replies had not, by `time.perf_counter()`.
    """

    reply_id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(10)}")
    is_asked: bool = False
    metadata: dict[str, Any] | None = None
    is_spoken: bool | None = None
    ignored: list[str] = field(default_factory=list)
    question: Any = None
    text: str = ""
    event: StreamEvent | None = None
    is_cancelled: bool = False
    is_failed: bool = False
    is_silenced: bool = False
    context: int = 0
    cached: int = 0
    image: int = 0
    begun: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or was cancelled before it began."""
        return self.event is not None or (self.is_cancelled and self.question is None)


@dataclass
class Progress:
    """
    What a stream did in a step.

    Attributes:
        time (`float`, *optional*), num_frames (`int`): Time of the last frame seen, and how many were seen so far.
        latencies (`list[float]`): For each new frame the seconds from its arrival to the decision.
        silence (`float`, *optional*): Probability of silence after the last frame.
        kept (`list[float]`, *optional*): For each of its tokens the share of routed layers that keep it.
        has_begun (`bool`): Whether a reply has begun.
        question (*optional*): The question that it answers, as `ask` returned it.
        words (`str`): New words of the reply.
        event ([`StreamEvent`], *optional*): The reply, if it has ended.
        context (`int`), image (`int`): Tokens in the cache when the reply began, and those of frames.
        begun (`float`): When its first token was there, by `time.perf_counter()`.
        is_idle (`bool`): Whether the stream has nothing left to do.
        is_done (`bool`), error (`str`, *optional*): Whether it has ended, and by what fault.
    """

    time: float | None = None
    num_frames: int = 0
    latencies: list[float] = field(default_factory=list)
    silence: float | None = None
    kept: list[float] | None = None
    has_begun: bool = False
    question: Any = None
    words: str = ""
    event: StreamEvent | None = None
    context: int = 0
    image: int = 0
    begun: float = math.inf
    is_idle: bool = False
    is_done: bool = False
    error: str | None = None


class Teller(BaseStreamer):
    """
    Collects what a stream does. It is the stream's streamer, and runs in the engine's thread.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes replies.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.session: Any = None
        self._tokens: list[int] = []
        self._told = ""
        self._is_new, self._context, self._image, self._begun = True, 0, 0, math.inf
        self._num_frames, self._was_idle, self._was_done = 0, None, False
        self._begin_step()

    def go_on(self, session: Any) -> None:
        """Collect what a restored session does from now on."""
        self.session, self._num_frames = session, session.num_frames

    def _begin_step(self) -> None:
        self._has_begun = self._has_ended = False
        self._words, self._question = "", None

    def put(self, value: torch.Tensor) -> None:
        """Take in tokens of a reply, (tokens,)."""
        self._note_beginning()
        self._tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True).strip()
        # A character of several tokens is not complete yet.
        if text.startswith(self._told) and not text.endswith("\ufffd"):
            self._words += text[len(self._told) :]
            self._told = text

    def end(self) -> None:
        """Take note of the end of a reply."""
        self._note_beginning()
        self._has_ended = True

    def _note_beginning(self) -> None:
        if not self._is_new:
            return
        session = self.session
        self._is_new, self._has_begun, self._question = False, True, session.answering
        self._begun, self._context = clock.perf_counter(), int(session.cache.get_seq_length())
        self._image = session.num_remembered * session.model.config.frame_num_tokens

    def take(self, stream: EngineStream, said: Sequence[StreamEvent]) -> Progress | None:
        """
        Return what the stream did since the last call, or `None` if nothing.

        Args:
            stream ([`EngineStream`]): The stream.
            said (`Sequence[StreamEvent]`): Its new events.
        """
        session = stream.session
        num_new, self._num_frames = session.num_frames - self._num_frames, session.num_frames
        is_idle, is_done = stream.is_idle, stream.is_done
        changes = (is_idle, is_done) != (self._was_idle, self._was_done)
        self._was_idle, self._was_done = is_idle, is_done
        if not (num_new or self._has_begun or self._words or self._has_ended or changes):
            return None
        progress = Progress(session.time, session.num_frames, is_idle=is_idle, is_done=is_done)
        progress.error = None if stream.error is None else str(stream.error)
        if num_new:
            progress.latencies, progress.silence = session.frame_latencies[-num_new:], session.interval_probability
            progress.kept = kept_share(session.kept_tokens)
        progress.has_begun, progress.question, progress.words = self._has_begun, self._question, self._words
        progress.context, progress.image, progress.begun = self._context, self._image, self._begun
        if self._has_ended:
            self._add_end(progress, said)
        self._begin_step()
        return progress

    def _add_end(self, progress: Progress, said: Sequence[StreamEvent]) -> None:
        progress.event = next(event for event in reversed(said) if event.role == "assistant")
        if progress.event.text.startswith(self._told):
            progress.words += progress.event.text[len(self._told) :]
        self._tokens, self._told, self._is_new = [], "", True


def kept_share(kept_tokens: dict[int, torch.Tensor]) -> list[float] | None:
    """Return for each token of a frame the share of routed layers that keep it."""
    if not kept_tokens:
        return None
    layers = list(kept_tokens.values())
    return [round(share, 3) for share in (sum(x.float() for x in layers) / len(layers)).tolist()]


__all__ = ["Frame", "Progress", "Reply", "Teller", "kept_share"]
