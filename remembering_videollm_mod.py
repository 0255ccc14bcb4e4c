# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What an endless stream remembers: its limits, and what to forget when they are reached."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .cache_videollm_mod import TokenRun, check_rotation
from .checks_videollm_mod import check_count


# The caller gave no limit: the session takes the checkpoint's.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class _Piece:
    """A run of tokens in the cache: text, or one frame with its own text and the separator before it."""

    is_frame: bool
    length: int  # tokens, including the separator
    separator: int = 0  # tokens, which a frame after text does not need
    is_beginning: bool = False  # text before the second frame, or newer instructions; it stays
    is_replaced: bool = False  # text that stayed until newer instructions came; it goes even from among sink frames


class StreamMemory:
    """Records what the cache holds, and chooses what to forget; limits are those of a session."""

    def __init__(self, max_frames: int | None, sink_frames: int, max_text_tokens: int | None) -> None:
        self.max_frames = math.inf if max_frames is None else max_frames
        self.sink_frames = sink_frames
        self.max_text_tokens = math.inf if max_text_tokens is None else max_text_tokens
        self.pieces: list[_Piece] = []
        self.num_frames = self.num_text_tokens = self._num_seen = 0
        self.is_crowded = False  # whether text that stays leaves so little room that all other text must go
        self.instructs = False  # whether the next text has instructions, which stay instead of earlier ones

    def add_text(self, length: int) -> None:
        """Record new text; it joins the text before it, unless that is the beginning and this is not."""
        self._count(_Piece(False, length))
        if self.instructs:
            # The first piece is the system prompt.
            old = [replace(x, is_beginning=False, is_replaced=True) if x.is_beginning else x for x in self.pieces[1:]]
            self.pieces[1:] = old
        last = self.pieces[-1] if self.pieces else None
        # What was said before the first frame is written after it: a session sees a frame before it hears.
        is_beginning, self.instructs = self.instructs or self._num_seen < 2, False
        if last is not None and not last.is_frame and (last.is_beginning, last.is_replaced) == (is_beginning, False):
            length += self.pieces.pop().length
        self.pieces.append(_Piece(False, length, is_beginning=is_beginning))

    def add_frame(self, length: int, separator: int) -> None:
        """Record a new frame of `length` tokens with its own text, and the separator before it."""
        self._num_seen += 1
        self.pieces.append(_Piece(True, length + separator, separator))
        self._count(self.pieces[-1])

    def remove_frames(self, count: int) -> int:
        """Remove the newest `count` frames, and return their number of tokens."""
        self.num_frames, self._num_seen = self.num_frames - count, self._num_seen - count
        return sum(self.pieces.pop().length for _ in range(count))

    def room(self, num_new_text: int) -> float:
        """Return how many frames may follow `num_new_text` tokens of text before `forget` must be called again."""
        return 1 if self._excess_text(num_new_text) else self.max_frames - self.num_frames

    def forget(self, num_new_text: int) -> list[TokenRun]:
        """Make room for a frame after `num_new_text` tokens; return what the cache must evict, if anything."""
        gone = self._choose(num_new_text)
        if not gone:
            return []
        kept, runs = [], []
        for index, piece in enumerate(self.pieces):
            if index in gone:
                self._count(piece, -1)
                runs.append(TokenRun(piece.length, int(piece.is_frame), stays=False))
                continue
            if piece.separator and not kept[-1].is_frame:
                runs.append(TokenRun(piece.separator, stays=False))
                piece = _Piece(True, piece.length - piece.separator)
            runs.append(TokenRun(piece.length, int(piece.is_frame)))
            kept.append(piece)
        self.pieces = kept
        return runs

    def _choose(self, num_new_text: int) -> set[int]:
        """Return the indices of the pieces to forget: the oldest, except sinks and text before the second frame."""
        # Text goes only together with the frames before it, and never after the last frame. An eighth more goes than
        # must, so that the cache moves once in a while and not at each frame.
        frames_due = 1 + self.max_frames // 8 if self.num_frames == self.max_frames else 0
        text_due = self._excess_text(num_new_text)
        old, num_seen, gone = [], 0, set()
        for index, piece in enumerate(self.pieces if frames_due or text_due else ()):
            is_old = not piece.is_beginning and (num_seen >= self.sink_frames or piece.is_replaced)
            num_seen += piece.is_frame
            if is_old:
                old.append((index, piece, num_seen < self.num_frames))
        # Texts that stay may exceed the limit by themselves. No frame goes for them.
        evictable = sum(piece.length for _, piece, has_frame_after in old if has_frame_after and not piece.is_frame)
        self.is_crowded, text_due = text_due > evictable > 0, min(text_due, evictable)
        for index, piece, has_frame_after in old:
            if (piece.is_frame and frames_due > 0) or (text_due > 0 and has_frame_after):
                gone.add(index)
                frames_due -= piece.is_frame
                text_due -= 0 if piece.is_frame else piece.length
        return gone

    def _excess_text(self, num_new_text: int) -> float:
        """Return by how much text must shrink: to seven eighths of the limit once it is exceeded."""
        text = self.num_text_tokens + num_new_text
        return text - self.max_text_tokens * 7 // 8 if text > self.max_text_tokens else 0

    def _count(self, piece: _Piece, sign: int = 1) -> None:
        self.num_frames += sign * piece.is_frame
        self.num_text_tokens += 0 if piece.is_frame else sign * piece.length


def checkpoint_limits(generation_config: Any) -> dict[str, int]:
    """
    Return what a checkpoint says to remember: `max_frames`, `sink_frames` and `max_text_tokens` of its generation
    configuration, those that it has.
    """
    said = {name: getattr(generation_config, name, None) for name in ("max_frames", "sink_frames", "max_text_tokens")}
    return {name: value for name, value in said.items() if value is not None}


def choose_limits(
    model: Any, max_frames: int | str | None, sink_frames: int | None, max_text_tokens: int | str | None
) -> tuple[int | None, int, int | None]:
    """Return the limits of a session: those given, and the checkpoint's for `"checkpoint"` and no `sink_frames`."""
    said = checkpoint_limits(model.generation_config)
    max_frames = said.get("max_frames") if max_frames == CHECKPOINT else max_frames
    if max_text_tokens == CHECKPOINT:
        max_text_tokens = None if max_frames is None else said.get("max_text_tokens")
    if sink_frames is None:
        # A caller may want less than the checkpoint.
        sink_frames = min(said.get("sink_frames", 0), max_frames - 1) if isinstance(max_frames, int) else 0
    return max_frames, sink_frames, max_text_tokens


def check_limits(
    config: Any, max_frames: int | None, sink_frames: int, max_text_tokens: int | None, frame_text_tokens: int
) -> None:
    """Raise `ValueError` if a session cannot remember so much; see [`StreamingSession`] for its limits."""
    context, num_tokens = config.text_config.max_position_embeddings, config.frame_num_tokens
    if max_frames is None:
        if sink_frames or max_text_tokens is not None:
            raise ValueError("`sink_frames` and `max_text_tokens` need `max_frames`: set it too.")
        return
    check_rotation(config.text_config)
    check_count("max_frames", max_frames)
    check_count("sink_frames", sink_frames, least=0)
    check_count("max_text_tokens", 0 if max_text_tokens is None else max_text_tokens, least=0)
    if sink_frames >= max_frames:
        raise ValueError(f"`sink_frames` is {sink_frames}; it must be less than `max_frames`, {max_frames}.")
    if max_frames * (num_tokens + frame_text_tokens) > context:
        frames = f"{max_frames}, with {num_tokens} tokens per frame"
        raise ValueError(f"`max_frames` is {frames}; the language model was trained for {context} tokens.")


def within_context(config: Any, frame_text_tokens: int, max_frames: int | None = None) -> dict[str, int]:
    """
    Return `max_frames` and `max_text_tokens` that keep an endless session within the language model's context, given
    the processor's `frame_text_tokens`.
    """
    # By default three quarters of the context are for frames. Half of the rest is for old text, half for new text.
    context, tokens = config.text_config.max_position_embeddings, config.frame_num_tokens + frame_text_tokens
    most = max(context * 3 // 4 // tokens, 1) if max_frames is None else max_frames
    return {"max_frames": most, "max_text_tokens": max((context - most * tokens) // 2, 1)}


__all__ = ["CHECKPOINT", "StreamMemory", "check_limits", "checkpoint_limits", "choose_limits", "within_context"]
