# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""How much cache memory the streams of an engine reserve, and where it is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..remembering_videollm_mod import checkpoint_limits, within_context
from .pages import OutOfPagesError, VideoLLMMoDPagedCache, VideoLLMMoDPagePool, new_page_pool


SPARE_TEXT = 48  # tokens that a stream reserves beyond its limits, for the prompt of a reply and the like


class EngineFullError(RuntimeError):
    """The engine has too little memory left for another stream."""


class TooLargeError(EngineFullError):
    """The engine has too little memory for a stream with these limits, also when no other one is open."""


class Room(NamedTuple):
    """
    What a cache has pages for.

    Attributes:
        frames (`int`): Frames.
        text_tokens (`int`): Text tokens, including those around frames.
    """

    frames: int
    text_tokens: int

    @classmethod
    def for_stream(
        cls, max_frames: int, max_text_tokens: int, max_new_tokens: int = 100, frame_text_tokens: int = 1
    ) -> "Room":
        """Return what a stream with these limits reserves."""
        # Text includes that around frames, and a reply with its prompt: only a new frame evicts text.
        return cls(max_frames, max_text_tokens + max_frames * frame_text_tokens + max_new_tokens + SPARE_TEXT)


def default_limits(model: Any, processor: Any, max_frames: int | None, max_text: int | None) -> tuple[int, int, int]:
    """
    Return the frames and text tokens that a stream has memory for, and the text tokens that it remembers: those given,
    else the checkpoint's, else a default.
    """
    config, text, said = model.config, processor.frame_text_tokens, checkpoint_limits(model.generation_config)
    if max_frames is None:
        max_frames = said.get("max_frames", min(within_context(config, text)["max_frames"], 300))
    if max_text is not None:
        return max_frames, max_text, max_text
    # New text needs memory before old text goes, so there is more than the checkpoint remembers.
    most = min(within_context(config, text, max_frames)["max_text_tokens"], 2048)
    return max_frames, max(most, said.get("max_text_tokens", 0)), said.get("max_text_tokens", most)


def allocate_pool(
    model: Any, num_streams: int, room: Room, spare: Room, *, page_size: int, dtype: torch.dtype | None
) -> VideoLLMMoDPagePool:
    """Return a pool for so many streams and a spare cache, with its memory allocated."""
    # A stream does not share its last page, so each may leave almost one unused.
    num_text_tokens = num_streams * (room.text_tokens + page_size - 1) + spare.text_tokens + page_size - 1
    num_frames = num_streams * room.frames + spare.frames
    pool = new_page_pool(model, num_frames, num_text_tokens, page_size=page_size, dtype=dtype)
    config = model.config.text_config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    compute_dtype = model.get_input_embeddings().weight.dtype
    for layer, module in enumerate(model.model.language_model.layers):
        pool.allocate(layer, config.num_key_value_heads, dim, compute_dtype, device_of(module))
    return pool


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device that a module runs on. Accelerate moves weights there that it keeps elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        devices = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
        if (device := next((device for device in devices if device is not None), None)) is not None:
            return torch.empty(0, device=device).device  # with its index
    return next(module.parameters()).device


def devices_of(model: Any) -> list[str]:
    """Return the names of all devices that a model's weights are kept on or run on."""
    layers = model.model.language_model.layers
    return sorted({str(x) for x in (*map(device_of, layers), *(weight.device for weight in model.parameters()))})


def most_pages(pool: VideoLLMMoDPagePool, room: Room, spare: VideoLLMMoDPagedCache) -> dict[int, int]:
    """Return for each kind of layer the most pages that a stream of captured steps has."""
    tokens = room.frames * pool.num_tokens + room.text_tokens
    # One page more than a stream reserves, so that a stream that says more still runs captured.
    own = {kind: -(-pool.num_entries(kind, tokens, room.frames) // pool.page_size) + 1 for kind in spare.tables}
    return {kind: max(own[kind], len(table.pages)) for kind, table in spare.tables.items()}


def check_room(pool: VideoLLMMoDPagePool, num_pages: Mapping[int, int], room: Room, usual: Room) -> None:
    """
    Raise [`TooLargeError`] if `num_pages` pages of each kind of layer are too few for a room. `usual` is that of a
    stream with as many frames and the engine's own `max_text_tokens`.
    """

    def fits(frames: int, text_tokens: int) -> bool:
        tokens = frames * pool.num_tokens + text_tokens
        return all(pool.num_entries(kind, tokens, frames) <= most * pool.page_size for kind, most in num_pages.items())

    if fits(*room):
        return
    name = "max_text_tokens" if fits(*usual) else "max_frames"
    raise TooLargeError(
        f"`{name}` is too large: no stream of {room.frames} frames and {room.text_tokens} text tokens, with those "
        "around frames and of a reply, fits into the memory of this engine. Open it with less, or create the engine "
        f"with a larger `max_streams` or `{name}`."
    )


def reserve(engine: Any, cache: VideoLLMMoDPagedCache, session: Any, text: int) -> None:
    """
    Reserve the pages of a new stream for its frames and so many text tokens. This waits for streams that were closed
    with `discard`, since the engine's thread frees their memory after its step.

    Raises:
        `EngineFullError`: If the pool has too few beside those of the streams that are open.
    """
    frames = session.max_frames
    while True:
        try:
            return cache.reserve(*room_of(session, text))
        except OutOfPagesError as error:
            if engine.is_running and not engine.is_inside_step and any(each.is_ending for each in engine.streams):
                engine.changed.wait(1)
                continue
            engine.stats.refused += 1
            raise EngineFullError(
                f"No room for another stream of {frames} frames and {text} text tokens beside the "
                f"{len(engine.streams)} that are open: {error} Close a stream, open this one with a smaller "
                "`max_frames`, or create the engine with a larger `max_streams`."
            ) from None


def room_of(session: Any, text: int) -> Room:
    """Return what a session with memory for so many text tokens reserves."""
    return Room.for_stream(session.max_frames, text, session.max_new_tokens, session.processor.frame_text_tokens)


def outgrown(error: OutOfPagesError, session: Any) -> OutOfPagesError:
    """Return the error of a stream that needs more pages than it has reserved, with advice."""
    frames, text = session.max_frames, session.max_text_tokens
    return OutOfPagesError(
        f"it has outgrown the memory of {frames} frames and {text} text tokens. Text is only evicted together "
        f"with frames before it, and there were too few. {error} Open it with a larger `max_text_tokens`."
    )


__all__ = [
    "SPARE_TEXT",
    "EngineFullError",
    "Room",
    "TooLargeError",
    "allocate_pool",
    "check_room",
    "default_limits",
    "device_of",
    "devices_of",
    "most_pages",
    "outgrown",
    "reserve",
    "room_of",
]
