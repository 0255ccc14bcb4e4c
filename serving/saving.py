# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Save a session and restore it, also in another process: it then says what it would have said."""

import os
import sys
import time as clock
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch

from .memory import device_of
from .saved_files import Saved, check_folder, pack, read, unpack, write


# Attributes of a session that belong to the process.
_OF_PROCESS = {"model", "processor", "streamer", "logits_processor", "_warpers", "cache", "answering", "is_paused"}
_OF_PROCESS |= {"_compiled", "_must_compile", "_bare_turns", "_is_working", "_is_broken"}
# Times of the process's clock, by `time.perf_counter()`.
_CLOCKS = ("_untimed_arrival", "_interrupted")
# Options of a session that its constructor needs; the others are attributes of the same name.
_OPTIONS = ("max_frames", "sink_frames", "max_text_tokens", "max_new_tokens", "speak")


def save_session(session: Any, folder: str | os.PathLike) -> None:
    """
    Save a session in a folder: its cache, and the frames and questions that wait. The session goes on.

    The streamer, the logits processor and a function given as `speak` are not saved. Nothing is pickled.

    Args:
        session ([`StreamingSession`]): The session. A stream of an engine has [`~EngineStream.save`].
        folder (`str` or `Path`): Where to write `session.json` and `session.safetensors`. A session saved there
            before is replaced when the new files are complete.

    Raises:
        `FileExistsError`: If the folder holds something else.
        `ValueError`: If a reply is in progress, a step of the session has failed, or its cache is an offloading one.
    """
    check_folder(folder)
    write(state_of(session), session.model, folder)


def restore_session(
    model: Any,
    processor: Any,
    folder: str | os.PathLike,
    *,
    speak: Callable[..., bool | str | None] | None = None,
    streamer: Any | None = None,
    logits_processor: Any | None = None,
    compile: bool | None = None,
) -> Any:
    """
    Return a saved session, on the model that it was saved with. It goes on where it was saved: frames that come next
    give the events that they would have given. The time between does not count in latencies.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        folder (`str` or `Path`): Where [`save_session`] or [`~EngineStream.save`] has written.
        speak (`Callable`, *optional*): The function that chooses when to speak, for a session that had one.
        streamer, logits_processor, compile (*optional*): As for [`StreamingSession`]. If the session samples replies,
            torch's global random generator of the device goes on where it was saved, too.

    Returns:
        [`StreamingSession`]: The session.

    Raises:
        `FileNotFoundError`: If the folder holds no saved session.
        `ValueError`: If a file is damaged, has another format, or belongs to another save or model, or if `speak`
            is missing or not needed.
    """
    saved = read(folder, model)
    options = options_of(saved, speak) | {"streamer": streamer, "logits_processor": logits_processor}
    dtype, given = saved.state["cache_dtype"], saved.state["new_cache"]
    dtype = None if dtype is None else getattr(torch, dtype)
    options |= {"cache_dtype": dtype} if given is None else {"cache": model.new_cache(dtype=dtype, **given)}
    session = model.stream(processor, compile=compile, **options)
    for time, pixels, arrival in fill_session(session, saved):
        session.receive(session._encode(pixels[None].to(model.device))[0], time, arrival)
    return session


def state_of(session: Any, **more: Any) -> Saved:
    """Return a session as files hold it, with what else its stream holds."""
    if session._is_working:
        raise ValueError("A session cannot be saved during a reply: save it when `push` or `ask` has returned.")
    if session._is_broken:
        raise ValueError("This session failed during a step, so it cannot be saved: open another.")
    if session.cache.offloading:
        raise ValueError("A session with an offloading cache cannot be saved: open it with another `cache`.")
    state = {name: value for name, value in vars(session).items() if name not in _OF_PROCESS}
    # Who waits for a probe waits in this process.
    state["_questions"] = deque(question for question in session._questions if question.probe is None)
    values = {
        "options": {name: getattr(session, name) for name in _OPTIONS},
        "clock": clock.perf_counter(),
        "session": state,
        "random": _generator(session.model.device).get_state() if session.do_sample else None,
        "received": (),
    }
    return pack(values | _state_of_cache(session.cache) | more)


def options_of(saved: Saved, speak: Callable[..., Any] | None) -> dict[str, Any]:
    """Return the options to open a session with that a saved one can fill."""
    options = dict(saved.state["options"])
    reuse = saved.state["session"]["reuse"]
    if options["speak"] == "function":
        if speak is None:
            raise ValueError("This session speaks by a function, which files do not hold: give it as `speak`.")
        options["speak"] = speak
    elif speak is not None:
        raise ValueError(f"This session speaks by {options['speak']!r}: leave `speak` out.")
    return options | {"reuse_static": None if reuse is None else reuse["threshold"]}


def fill_session(session: Any, saved: Saved) -> list[tuple[float, torch.Tensor, float]]:
    """
    Give a new session, opened with `options_of`, the state of a saved one. Returns the frames that waited to be
    encoded: their times, pixels (channels, height, width) and arrivals.
    """
    sources = [sys.modules[type(part).__module__] for part in (session, session._memory)]
    known = (x for source in sources for x in vars(source).values() if isinstance(x, type) and is_dataclass(x))
    classes = {x.__name__: x for x in known}
    _fill(session, unpack(saved, "session", classes), session.model.device)
    if session.reuse is not None and session.reuse._thumbnail is not None:
        session.reuse._thumbnail = session.reuse._thumbnail.cpu()  # frames are compared on the host
    waited = clock.perf_counter() - saved.state["clock"]
    for name in _CLOCKS:
        setattr(session, name, getattr(session, name) + waited)
    for waiting in (*session._waiting, *session._questions):
        waiting.arrival += waited
    for frame in session._waiting:
        frame.features = frame.features.to(session.model.device)
    _fill_cache(session.cache, session.model, saved)
    random = unpack(saved, "random")
    if random is not None:
        _generator(session.model.device).set_state(random)
    return [(time, pixels, arrival + waited) for time, pixels, arrival in unpack(saved, "received")]


def _fill(target: Any, values: Mapping[str, Any], device: torch.device) -> None:
    """Set attributes of an object, and of the objects in it."""
    for name, value in values.items():
        inner = getattr(target, name)
        if isinstance(value, dict) and hasattr(inner, "__dict__"):
            _fill(inner, value, device)
        else:
            setattr(target, name, _on(value, device))


def _on(value: Any, device: torch.device) -> Any:
    """Return a tensor, or those of a list or dictionary, on a device, and other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    return [_on(item, device) for item in value] if isinstance(value, list) else value


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return getattr(torch, device.type).default_generators[device.index or 0]


# --------------------------------------------------------------------------------------------------------------- cache


def _state_of_cache(cache: Any) -> dict[str, Any]:
    layers = []
    for layer in cache.layers:
        length, positions = int(layer.get_seq_length()), getattr(layer, "positions", None)
        entries = {"keys": layer.keys, "values": layer.values} if layer.is_initialized and length else {}
        entries = {name: x[:, :, :length] for name, x in entries.items()}
        layers.append(entries | ({} if positions is None or not length else {"positions": positions[:, :length]}))
    # Sessions make caches that attend grouped, and engines take pages. Others were given, and are made the same way.
    is_given = not (cache.is_grouped or hasattr(cache, "pool"))
    lengths = [getattr(layer, "max_cache_len", None) for layer in cache.layers]
    dtype = getattr(cache.layers[0], "stored_dtype", None)
    recent = cache.recent_frames
    return {
        "new_cache": {"max_lengths": lengths if lengths[0] else None} if is_given else None,
        "cache_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "layers": layers,
        "num_seen": int(cache.num_seen),
        "position_offset": int(cache.position_offset),
        "moved": [_moved_of(cache, group) for group in cache._moved],
        "recent_frames": {"rows": recent.rows, "ends": recent.ends, "least": int(recent.least)},
    }


def _moved_of(cache: Any, group: tuple) -> dict[str, Any]:
    """Return what evictions have set aside for a group of layers, with the index of one of them for its device."""
    skipped, is_rotated, device = group
    kinds = enumerate(zip(cache.skipped, cache.layers, strict=True))
    layer = next(i for i, (own, x) in kinds if own == skipped and x.is_initialized and x.device == device)
    by, keys = cache._moved[group]
    return {"layer": layer, "is_rotated": is_rotated, "by": by, "keys": keys}


def _fill_cache(cache: Any, model: Any, saved: Saved) -> None:
    """Give an empty cache the entries of a saved one, which may lie in layers of another kind."""
    # Layers that store another dtype convert, and what they return is exact in the model's.
    embeddings = model.get_input_embeddings()
    home, dtype = device_of(embeddings), embeddings.weight.dtype
    modules = model.base_model.language_model.layers
    for layer, module, entries in zip(cache.layers, modules, unpack(saved, "layers"), strict=True):
        if entries:
            device = device_of(module)
            if "positions" in entries:
                # Steps count positions beside the embeddings, wherever the layer is.
                layer.record_positions(entries["positions"].to(home), 0)
            layer.update(*(entries[name].to(device, dtype) for name in ("keys", "values")))
    for name in ("num_seen", "position_offset"):
        cache._set(name, saved.state[name])
    for moved in unpack(saved, "moved"):
        layer = moved["layer"]
        group = cache.skipped[layer], moved["is_rotated"], cache.layers[layer].device
        cache._moved[group] = moved["by"], moved["keys"].to(group[-1])
    _fill(cache.recent_frames, unpack(saved, "recent_frames"), home)


__all__ = ["fill_session", "options_of", "restore_session", "save_session", "state_of"]
