# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiled steps of a session over its preallocated cache: a frame, a token of a reply, and the vision encoder."""

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .cache_videollm_mod import SPARE_ROOM, causal_mask


class StepCache:
    """
    What the model gets as `cache` in a compiled step. All that varies is in tensors, so that it is compiled once.

    Args:
        kinds (`list[int]`): For each layer, the index of its kind. Layers of a kind are equally long.
        num_seen (`torch.LongTensor` of shape `()`): Number of tokens in the cache.
        lengths (`torch.LongTensor` of shape `(kinds,)`): Entries of each kind's layers before the step.
        entries (`list[torch.LongTensor]`): For each kind, the numbers from 0 to the size of its buffers.
        buffers (`list[list[torch.Tensor]]`): For each layer, keys and values (size, 1, heads, dim).
        previous (`torch.Tensor` of shape `(1, tokens, hidden)`, *optional*): The frame before, if routers compare.

    Attributes:
        frame (`torch.Tensor` of shape `(1, tokens, hidden)`, *optional*): The frame that the step sees.
    """

    needs_masks = is_grouped = True
    has_filler = False

    def __init__(
        self,
        kinds: list[int],
        num_seen: torch.Tensor,
        lengths: torch.Tensor,
        entries: list[torch.Tensor],
        buffers: list[list[torch.Tensor]],
        previous: torch.Tensor | None = None,
    ) -> None:
        self.previous, self.frame = previous, None
        self.kinds, self.num_seen, self.lengths = kinds, num_seen, lengths
        self.entries, self.buffers = entries, buffers
        self.positions: list[torch.Tensor] = []

    def get_seq_length(self, layer_idx: int | None = None) -> torch.Tensor:
        """Return the number of tokens seen, or with `layer_idx` the number of entries in that layer."""
        return self.num_seen if layer_idx is None else self.lengths[self.kinds[layer_idx]]

    def record_positions(self, _layer_idx: int, positions: torch.Tensor, begin: torch.Tensor) -> None:
        """Remember the positions (1, new), counted from `begin`, of a routed layer's next entries."""
        self.positions.append(positions + begin)

    def remember_frames(self, frames: torch.Tensor, *_: Any) -> torch.Tensor:
        """Remember the step's frame (1, tokens, hidden), and return the frame before it."""
        self.frame = frames
        return self.previous

    def grouped_mask(self, layer_idx: int, inputs: torch.Tensor, window: int | None, text_config: Any) -> torch.Tensor:
        """Return the mask of a layer's `inputs` (1, new, hidden)."""
        entries = self.entries[self.kinds[layer_idx]]
        return causal_mask(self._slots(layer_idx, inputs.shape[1]), entries, window, text_config, inputs.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Write entries (1, heads, new, dim) into the buffers, and return these as (1, heads, size, dim)."""
        slots = self._slots(layer_idx, key_states.shape[2])
        for buffer, states in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            buffer.index_copy_(0, slots, states.permute(2, 0, 1, 3).to(buffer.dtype))
        return tuple(x.permute(1, 2, 0, 3).to(key_states.dtype) for x in self.buffers[layer_idx])

    def advance(self, *_: Any) -> None:
        """Do nothing: the session counts the step."""

    def _slots(self, layer_idx: int, new: int) -> torch.Tensor:
        return self.get_seq_length(layer_idx) + torch.arange(new, device=self.lengths.device)


def kept_counts(config: Any) -> list[int]:
    """Return how many of a frame's tokens layers keep, once for each kind of layer."""
    return sorted({min(count, config.frame_num_tokens) for count in config.layer_keep_counts})


def kinds_of(config: Any) -> list[int]:
    """Return the index of each layer's kind in [`kept_counts`]."""
    kinds, num_tokens = kept_counts(config), config.frame_num_tokens
    return [kinds.index(min(count, num_tokens)) for count in config.layer_keep_counts]


def _forward(
    model: Any,
    numbers: torch.Tensor,
    features: torch.Tensor | None,
    entries: list[torch.Tensor],
    buffers: list[list[torch.Tensor]],
    collects: bool,
    previous: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """
    Run one step. Returns decisions (3, 1), logits (1, vocabulary), with `collects` router scores and kept tokens, then
    positions if any layer is routed, and the embeddings of the frame if routers compare frames.
    """
    counts, ids = numbers[1 : 3 + len(entries)].long(), numbers[3 + len(entries) :].long()
    cache = StepCache(kinds_of(model.config), counts[0], counts[2:], entries, buffers, previous)
    outputs = model(
        input_ids=ids[None],
        frame_features=features,
        position_ids=(counts[1] + torch.arange(len(ids), device=ids.device))[None],
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
        output_router_scores=collects,
    )
    decisions = decide(model, outputs.logits[0], numbers[0].float())
    seen = [rows for rows in (outputs.router_scores, outputs.kept_tokens) if rows]
    positions = [torch.cat(cache.positions, dim=1)] if cache.positions else []
    frame = [] if cache.frame is None else [cache.frame]
    seen = (torch.stack(rows)[:, 0] for rows in seen)
    return [decisions, outputs.logits[0], *seen, *positions, *frame]


def _encode(model: Any, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    return [model.encode_frames(pixel_values)]


class CompiledModel:
    """The compiled functions of one model, which its sessions share. On CUDA they are replayed as CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"

        def compiled(function: FunctionType) -> Callable[..., list[torch.Tensor]]:
            # torch keeps compiled code with a code object, and limits how much of it one may have.
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            return torch.compile(own, fullgraph=True, mode="reduce-overhead" if is_cuda else None)

        self.device, self._lock = device, threading.Lock()
        self.frame, self.token, self.encode = compiled(_forward), compiled(_forward), compiled(_encode)
        # CUDA graphs belong to the thread that recorded them, so one thread runs them for all sessions.
        self._thread = ThreadPoolExecutor(1, initializer=_prepare_thread, initargs=(device,)) if is_cuda else None

    def run(self, function: Callable[..., list[torch.Tensor]], *inputs: Any) -> list[torch.Tensor]:
        """Run one of the functions and return its outputs, which later calls do not overwrite."""
        if self._thread is not None:
            stream = torch.cuda.current_stream(self.device)  # the caller's, after what made the inputs
            return self._thread.submit(self._replay, stream, function, *inputs).result()
        with self._lock, torch.no_grad():
            return function(*inputs)

    @staticmethod
    @torch.no_grad()
    def _replay(stream: Any, function: Callable[..., list[torch.Tensor]], *inputs: Any) -> list[torch.Tensor]:
        with torch.cuda.stream(stream):
            torch.compiler.cudagraph_mark_step_begin()
            return [x.clone() for x in function(*inputs)]


def _prepare_thread(device: torch.device) -> None:
    from torch._inductor import cudagraph_trees

    torch.cuda.set_device(device)
    # torch before 2.12 does this in the thread that imports the module only.
    for name, kind in (("containers", dict), ("locks", partial(defaultdict, threading.Lock))):
        if not hasattr(cudagraph_trees.local, f"tree_manager_{name}"):
            setattr(cudagraph_trees.local, f"tree_manager_{name}", kind())


_COMPILED: WeakKeyDictionary[Any, CompiledModel] = WeakKeyDictionary()
_MAKING = threading.Lock()


def compiled_model(model: Any) -> CompiledModel:
    """Return the compiled functions of a model, made once for each device that it moves to."""
    with _MAKING:
        if model not in _COMPILED or _COMPILED[model].device != model.device:
            _COMPILED[model] = CompiledModel(model.device)
        return _COMPILED[model]


class CompiledSteps:
    """
    Compiled steps of one session.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model. Its weights may change in place.
        cache ([`VideoLLMMoDCache`]): The session's cache. All its layers have a `capacity`.
        frame_ids (`list[int]`): Tokens of a step that sees one frame: frame tokens with the text around them. Steps
            may have other text of the same length in its place.
        most_text (`int`, *optional*): Most tokens of text around a frame, if their number varies. The step is then
            compiled for any number.
    """

    def __init__(self, model: Any, cache: Any, frame_ids: list[int], most_text: int | None = None) -> None:
        self.model, self.cache, self.frame_ids, self.compiled = model, cache, frame_ids, compiled_model(model)
        self.most_text, self.kinds = most_text, kinds_of(model.config)
        self._views: tuple[list[int], list[torch.Tensor], list[list[torch.Tensor]]] = ([], [], [])
        self._after = len(frame_ids) - frame_ids.index(model.config.frame_token_id) - model.config.frame_num_tokens
        self._inside: dict[int, torch.Tensor] = {}

    def fits(self, ids: list[int], num_frames: int) -> bool:
        """Return whether a step is one frame with as much text as expected, or one token, and the cache has some."""
        is_known = len(ids) == 1
        if num_frames:
            config = self.model.config
            most = len(self.frame_ids) if self.most_text is None else config.frame_num_tokens + self.most_text
            has_length = len(ids) == most or (self.most_text is not None and len(ids) < most)
            last = ids.index(config.frame_token_id) + config.frame_num_tokens
            is_known = num_frames == 1 and has_length and last == len(ids) - self._after
        return is_known and all(layer.is_initialized for layer in self.cache.layers)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features of frames (frames, channels, height, width). A single frame runs compiled."""
        if len(pixel_values) > 1:
            return self.model.encode_frames(pixel_values)
        return self.compiled.run(self.compiled.encode, self.model, pixel_values)[0]

    def run(
        self, ids: list[int], features: torch.Tensor | None, threshold: float, collects: bool
    ) -> list[torch.Tensor]:
        """Run a step that `fits`, and count it in the cache. Returns what [`_forward`] does, up to kept tokens."""
        cache, config = self.cache, self.model.config
        lengths = [cache.get_seq_length(self.kinds.index(kind)) for kind in sorted(set(self.kinds))]
        skipped = [config.frame_num_tokens - count if features is not None else 0 for count in kept_counts(config)]
        new = [len(ids) - count for count in skipped]
        entries, buffers = self._make_room([length + more for length, more in zip(lengths, new, strict=True)])
        # float64 holds all these integers exactly. One copy takes them to the device.
        numbers = torch.tensor([threshold, cache.num_seen, cache.next_position, *lengths, *ids], dtype=torch.float64)
        if self.compiled.device.type == "cuda":
            numbers = numbers.pin_memory().to(self.compiled.device, non_blocking=True)
        if features is not None and self.most_text is not None:
            torch._dynamo.mark_dynamic(numbers, 0)
        function = self.compiled.token if features is None else self.compiled.frame
        previous = None if features is None else cache.recent_frames.last
        outputs = self.compiled.run(function, self.model, numbers, features, entries, buffers, collects, previous)
        if previous is not None:
            ends = torch.tensor([cache.num_seen + len(ids) - self._after])
            cache.remember_frames(outputs.pop(), [1], ends, cache.num_seen)
        for layer, kind in zip(cache.layers, self.kinds, strict=True):
            layer.resize(lengths[kind] + new[kind])
        routed = [layer for layer, kind in enumerate(self.kinds) if layer in config.routed_layers and new[kind] > 0]
        if routed:
            sizes = [new[self.kinds[layer]] for layer in routed]
            for layer, positions in zip(routed, outputs.pop().split(sizes, dim=1), strict=True):
                cache.record_positions(layer, positions)
        cache.advance(len(ids), None if features is None else self._inside_frame(ids))
        return outputs

    def _inside_frame(self, ids: list[int]) -> torch.Tensor:
        """Return where the tokens (1, new) of a frame lie, except its last."""
        if len(ids) not in self._inside:
            last = len(ids) - self._after - 1
            places = torch.arange(len(ids), device=self.compiled.device)[None]
            self._inside[len(ids)] = (places > last - self.model.config.frame_num_tokens) & (places < last)
        return self._inside[len(ids)]

    def _make_room(self, lengths: list[int]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Return the parts of the buffers that attention reads, for layers that will have these lengths by kind."""
        layers = self.cache.layers
        for layer, kind in zip(layers, self.kinds, strict=True):
            layer.make_room(lengths[kind] - layer.get_seq_length(), layer.keys, layer.values)
        rooms = [len(layers[self.kinds.index(kind)].buffers[0]) - SPARE_ROOM for kind in range(len(lengths))]
        # Attention reads as many eighths of the room as the fullest kind needs, so that there are few sizes.
        eighths = max(-(-8 * length // room) for length, room in zip(lengths, rooms, strict=True))
        # No two kinds have the same size: torch would take both for one, and compile again when they differ.
        sizes = [-(-room * eighths // 512) * 64 + 8 * (kind % 8) for kind, room in enumerate(rooms)]
        form = [*sizes, *(layer.buffers[0].data_ptr() for layer in layers)]
        if form != self._views[0]:
            entries = [torch.arange(size, device=self.compiled.device) for size in sizes]
            views = [[x[: sizes[kind]] for x in layer.buffers] for layer, kind in zip(layers, self.kinds, strict=True)]
            for tensor in (*entries, *(x for pair in views for x in pair)):
                torch._dynamo.mark_dynamic(tensor, 0)
                torch._dynamo.mark_static_address(tensor, guard=False)
            self._views = form, entries, views
        return self._views[1:]


def decide(model: Any, logits: torch.Tensor, interval_threshold: float | torch.Tensor | None) -> torch.Tensor:
    """
    Return whether to speak, the probability of silence and the most likely token, (3, rows), for logits (rows,
    vocabulary). They are float32, which holds ids up to 2**24 exactly: Apple's GPUs have no float64.
    """
    speak, silence = model.should_speak(logits, interval_threshold)
    return torch.stack([speak.float(), silence, speakable(model, logits).argmax(dim=-1).float()])


def speakable(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """Return the scores as float32, -inf for the frame token and those of `generation_config.suppress_tokens`."""
    # A reply must not contain the frame token: no frame would belong to it. Its id may lie past the vocabulary.
    scores = logits.to(torch.float32, copy=True)
    for token in (model.config.frame_token_id, *(model.generation_config.suppress_tokens or ())):
        if token < scores.shape[-1]:
            scores[..., token] = -torch.inf
    return scores


__all__ = ["CompiledSteps", "decide", "speakable"]
