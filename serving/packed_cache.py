# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lay out one step of several streams in a single row, and give the model a cache for it."""

import copy
import copyreg
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..streaming_videollm_mod import StreamStep
from .entries import EntryPlan, Numbers, PackedEntries
from .kernels import choose_attention
from .pages import VideoLLMMoDPagedCache, VideoLLMMoDPagePool, write_pages


# The attention implementation "packed_sdpa" is "sdpa" for ordinary rows, and attention over pages for packed ones.
PREFIX = "packed_"


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class StreamPart:
    """
    One stream's part of a step.

    Attributes:
        stream (`int`, *optional*): Index of the stream among those of the step, or `None` for padding.
        ids (`list[int]`): New tokens, including frame tokens.
        ends (`list[int]`): Indices of the tokens after which the stream needs a decision.
        num_frames (`int`): Number of new frames.
        threshold (`float`): Interval threshold.
        num_seen (`int`): Number of tokens in the stream's cache.
        next_position (`int`): Rotary position of the first new token.
        new (`dict[int, int]`): For each kind of layer, the number of new entries.
        lengths (`dict[int, int]`): For each kind, the number of entries, including the new ones.
        pages (`dict[int, list[int]]`): For each kind, the pages of these entries.
        previous (`torch.Tensor` of shape `(1, tokens, hidden)`, *optional*): The stream's last frame, for routers that
            compare frames.
    """

    stream: int | None
    ids: list[int]
    ends: list[int]
    num_frames: int
    threshold: float
    num_seen: int
    next_position: int
    new: dict[int, int]
    lengths: dict[int, int]
    pages: dict[int, list[int]]
    previous: torch.Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StepBounds:
    """
    Upper bounds that a captured step is made for.

    Attributes:
        most_new (`int`): Most new tokens of a stream.
        most_pages (`Mapping[int, int]`): For each kind of layer, the most pages of a stream.
    """

    most_new: int
    most_pages: Mapping[int, int]


@dataclass(frozen=True)
class StepPlan:
    """
    All numbers of one step of several streams, laid one after the other in one row, as plain lists.

    The plan determines every tensor shape, so it can be built before any kernel runs.

    Attributes:
        parts (`list[StreamPart]`): The streams' parts, in the order of the row.
        ids (`list[int]`): Tokens of the row.
        ends (`list[int]`): Indices in the row of the tokens after which a stream needs a decision.
        thresholds (`list[float]`): Interval threshold of each of `ends`.
        positions (`list[int]`): Rotary position of each token in its own stream.
        places (`list[int]`): Index of each token among those in its stream's cache.
        before (`list[int]`): For each frame, the index of the frame before it in its stream: among all frames of the
            row, followed by the streams' previous frames.
        entries (`dict[int, EntryPlan]`): For each kind of layer, where the streams' entries lie.
        bounds ([`StepBounds`], *optional*): Bounds of a captured step.
    """

    parts: list[StreamPart]
    ids: list[int]
    ends: list[int]
    thresholds: list[float]
    positions: list[int]
    places: list[int]
    before: list[int]
    entries: dict[int, EntryPlan]
    bounds: StepBounds | None = None

    def numbers(self) -> list[Numbers]:
        """Return the numbers that the device needs: the lists in their order, then entries."""
        row = [(self.ids, torch.long), (self.ends, torch.long), (self.thresholds, torch.float32)]
        row += [(x, torch.long) for x in (self.positions, self.places, self.before)]
        columns = {} if self.bounds is None else self.bounds.most_pages
        entries = [numbers for kind, entry in self.entries.items() for numbers in entry.numbers(columns.get(kind))]
        return [*row, *entries]


def plan_step(
    caches: Sequence[VideoLLMMoDPagedCache], steps: Sequence[StreamStep], default_threshold: float
) -> StepPlan:
    """
    Return the plan of one step of several streams. It has no side effects: the caches must already have their pages.

    Args:
        caches (`Sequence[VideoLLMMoDPagedCache]`): One per stream, of one pool.
        steps (`Sequence[StreamStep]`): One per stream.
        default_threshold (`float`): Interval threshold of streams that have none of their own.
    """
    parts = []
    for index, (cache, step) in enumerate(zip(caches, steps, strict=True)):
        pool, threshold = cache.pool, step.interval_threshold
        new = {kind: pool.num_entries(kind, len(step.ids), step.num_frames) for kind in pool.num_pages}
        lengths = {kind: cache.length_of(kind) + count for kind, count in new.items()}
        parts.append(
            StreamPart(
                stream=index,
                ids=step.ids,
                ends=step.ends,
                num_frames=step.num_frames,
                threshold=default_threshold if threshold is None else threshold,
                num_seen=cache.get_seq_length(),
                next_position=cache.next_position,
                new=new,
                lengths=lengths,
                pages={k: cache.tables[k].pages[: -(-length // pool.page_size)] for k, length in lengths.items()},
                previous=cache.recent_frames.last,
            )
        )
    return lay_out(parts, caches[0].pool.page_size)


def lay_out(parts: list[StreamPart], page_size: int, bounds: StepBounds | None = None) -> StepPlan:
    """Return the plan of a row with these parts, one after the other."""
    begins = accumulate((len(part.ids) for part in parts), initial=0)
    counts = [part.num_frames for part in parts if part.num_frames]
    firsts = enumerate(accumulate(counts, initial=0), start=sum(counts))
    return StepPlan(
        parts=parts,
        ids=[token for part in parts for token in part.ids],
        ends=[begin + end for begin, part in zip(begins, parts, strict=False) for end in part.ends],
        thresholds=[part.threshold for part in parts for _ in part.ends],
        positions=[part.next_position + index for part in parts for index in range(len(part.ids))],
        places=[part.num_seen + index for part in parts for index in range(len(part.ids))],
        before=[
            index
            for (last, first), count in zip(firsts, counts, strict=False)
            for index in (last, *range(first, first + count - 1))
        ],
        entries={
            kind: EntryPlan(
                new=[part.new[kind] for part in parts],
                lengths=[part.lengths[kind] for part in parts],
                pages=[part.pages[kind] for part in parts],
                is_padding=[part.stream is None for part in parts],
                page_size=page_size,
            )
            for kind in parts[0].new
        },
        bounds=bounds,
    )


def commit(
    plan: StepPlan,
    caches: Sequence[VideoLLMMoDPagedCache],
    frame_token_id: int,
    frames: torch.Tensor | None = None,
) -> None:
    """
    Count a step's new entries in the streams' caches, after the step was launched. If routers compare frames, `frames`
    (all frames, tokens, hidden) are those of the row.
    """
    begins = accumulate((part.num_frames for part in plan.parts), initial=0)
    for begin, part in zip(begins, plan.parts, strict=False):
        if part.stream is None:
            continue
        cache = caches[part.stream]
        if frames is not None and part.num_frames:
            ends = [part.num_seen + index + 1 for index, token in enumerate(part.ids) if token == frame_token_id]
            ends = torch.tensor(ends[cache.pool.num_tokens - 1 :: cache.pool.num_tokens])
            new = frames[begin : begin + part.num_frames]
            cache.remember_frames(new, [part.num_frames], ends, part.num_seen)
        for layer, kind in zip(cache.layers, cache.pool.kinds, strict=True):
            layer.extend(part.new[kind])
        inside = [token == frame_token_id and index not in part.ends for index, token in enumerate(part.ids)]
        cache.advance(len(part.ids), torch.tensor([inside]) if part.num_frames else None)


# ------------------------------------------------------------------------------------------------------------ cache


class DeviceNumbers:
    """
    Lists of numbers in one block of device memory, so that one asynchronous copy brings them all.

    Args:
        lists (`Sequence[tuple[Sequence, torch.dtype]]`): Numbers, and their dtype on the device.
        device (`torch.device`): The device.

    Attributes:
        tensors (`list[torch.Tensor]`): One tensor of one dimension per list.
    """

    def __init__(self, lists: Sequence[Numbers], device: torch.device | str) -> None:
        self._form = [(len(numbers), dtype) for numbers, dtype in lists]
        # Kernels read several numbers at once, from aligned addresses.
        sizes = [-(-count * dtype.itemsize // 64) * 64 for count, dtype in self._form]
        self._begins = [0, *accumulate(sizes)]
        self._memory = torch.empty(self._begins[-1], dtype=torch.uint8, device=device)
        self.tensors = self._views(self._memory)
        self.overwrite(lists)

    def overwrite(self, lists: Sequence[Numbers]) -> None:
        """
        Replace all numbers by as many others.

        Raises:
            `ValueError`: If a list has another length or dtype than before.
        """
        if [(len(numbers), dtype) for numbers, dtype in lists] != self._form:
            raise ValueError("These numbers belong to a step of another shape.")
        is_cuda = self._memory.device.type == "cuda"
        # torch reuses pinned memory only after it was copied.
        host = torch.empty_like(self._memory, device="cpu", pin_memory=is_cuda)
        for tensor, (numbers, _) in zip(self._views(host), lists, strict=True):
            tensor.numpy()[:] = numbers
        self._memory.copy_(host, non_blocking=is_cuda)

    def _views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[begin : begin + count * dtype.itemsize].view(dtype)
            for begin, (count, dtype) in zip(self._begins, self._form, strict=False)
        ]


class PlacedPlan:
    """
    A [`StepPlan`] with its numbers on one device.

    Args:
        plan ([`StepPlan`]): The plan.
        device (`torch.device`): The device.

    Attributes:
        numbers ([`DeviceNumbers`]): All numbers of the plan.
        ids, ends, thresholds, positions, places, before (`torch.Tensor`): The lists of the plan.
        entries (`dict[int, PackedEntries]`): For each kind of layer, where the streams' entries lie.
    """

    def __init__(self, plan: StepPlan, device: torch.device | str) -> None:
        self.numbers = DeviceNumbers(plan.numbers(), device)
        tensors = iter(self.numbers.tensors)
        self.ids, self.ends, self.thresholds, self.positions, self.places, self.before = islice(tensors, 6)
        bounds = {} if plan.bounds is None else {"most_new": plan.bounds.most_new, "is_captured": True}
        self.entries = {
            kind: PackedEntries(entry, list(islice(tensors, 6)), **bounds) for kind, entry in plan.entries.items()
        }


class PackedCaches:
    """
    What a model gets as `cache` for one step of several streams in one row.

    Each token enters the cache of its own stream, and sees only that. The model must also get the object as
    `packed_caches=`, which it passes on to [`packed_attention_forward`].

    Args:
        pool ([`VideoLLMMoDPagePool`]): The pool of the streams' caches. Its layers may lie on several devices.
        plan ([`StepPlan`]): The step.
        device (`torch.device`): The device of the row.

    Attributes:
        ids, ends, thresholds, positions (`torch.Tensor`): The lists of the plan, on the device of the row.
        frames (`torch.Tensor` of shape `(frames, tokens, hidden)`, *optional*): Embeddings of the row's frames, if
            routers compare frames.
    """

    # The entries say which stream a token belongs to.
    needs_masks = False

    def __init__(self, pool: VideoLLMMoDPagePool, plan: StepPlan, device: torch.device | str) -> None:
        self.pool, self._plan = pool, plan
        self.frames: torch.Tensor | None = None
        self._previous: torch.Tensor | None = None
        self._early: dict[int, torch.Tensor] = {}
        self._placed: dict[torch.device, PlacedPlan] = {}
        row = self.on(torch.device(device))
        self.ids, self.ends, self.thresholds, self.positions = row.ids, row.ends, row.thresholds, row.positions

    def on(self, device: torch.device) -> PlacedPlan:
        """Return the numbers on a device. They are copied there once a step, when a layer first needs them."""
        if device not in self._placed:
            self._placed[device] = PlacedPlan(self._plan, device)
        return self._placed[device]

    def overwrite(self, plan: StepPlan) -> None:
        """
        Replace the numbers by those of another step of the same shape, in the same memory.

        Raises:
            `ValueError`: If the step has another shape.
        """
        self._plan = plan
        for placed in self._placed.values():
            placed.numbers.overwrite(plan.numbers())
        if self._previous is not None:
            self._write_previous()

    def get_seq_length(self, _layer_idx: int | None = None) -> int:
        """Return 0: what the streams have seen before is not part of the row."""
        return 0

    def record_positions(self, layer_idx: int, positions: torch.Tensor, *_: int, **__: bool) -> None:
        """Remember which tokens of the row, (1, new), routed layer `layer_idx` is about to add."""
        self._early[layer_idx] = positions

    def remember_frames(self, frames: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return the frame before each of the row's `frames` (frames, tokens, hidden) in its own stream."""
        if self._previous is None:
            self._previous = torch.zeros_like(frames)  # at most one for each frame
            self._write_previous()
        self.frames = frames
        return torch.cat([frames, self._previous])[self.on(frames.device).before]

    def _write_previous(self) -> None:
        before = [part.previous for part in self._plan.parts if part.num_frames and part.stream is not None]
        if before:
            none = torch.zeros_like(self._previous[:1])
            self._previous[: len(before)] = torch.cat([none if frame is None else frame for frame in before])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple:
        """Write entries (1, heads, all new, dim) into their streams' pages, and return them unchanged."""
        pages = self.pool.pages_of(layer_idx, key_states)
        here = self.on(pages[0].device)
        slots = here.entries[self.pool.kinds[layer_idx]].slots
        new = [key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)]
        if pages[2] is not None:
            new.append(here.places[self._early.pop(layer_idx)[0].to(slots.device)])
        for stored, state in zip(pages, new, strict=False):
            write_pages(stored, slots, state)
        return key_states, value_states

    def attend(
        self, layer_idx: int, query: torch.Tensor, scaling: float | None = None, window: int | None = None
    ) -> torch.Tensor:
        """Return the attention (1, all new, heads, dim) of queries (1, heads, all new, dim) to their own streams."""
        keys, values, _ = self.pool.layers[layer_idx]
        rows = query[0].transpose(0, 1)
        _, kernel = choose_attention(rows, keys, window)
        scaling = rows.shape[-1] ** -0.5 if scaling is None else scaling
        entries = self.on(keys.device).entries[self.pool.kinds[layer_idx]]
        return kernel(rows.contiguous(), keys, values, entries, scaling, window)[None]

    def advance(self, num_tokens: int, inside_frame: torch.Tensor | None = None) -> None:  # noqa: ARG002
        """Do nothing: [`commit`] counts the step in the streams' caches."""


# -------------------------------------------------------------------------------------------------------- attention


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_caches: PackedCaches | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attend to pages if `packed_caches` is given, else as the text model did before [`set_packed_attention`].

    It is an attention function of Transformers (`AttentionInterface`). Queries are (1, heads, all new, dim);
    `packed_caches.update` has just stored `key` and `value`.
    """
    if packed_caches is not None:
        return packed_caches.attend(module.layer_idx, query, scaling, sliding_window), None
    name = module.config._attn_implementation.removeprefix(PREFIX)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    base = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if "flash" in name:
        module = _WithImplementation(module, name)
    options = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
    return base(module, query, key, value, attention_mask, *args, **options)


class _WithImplementation:
    """An attention module whose configuration names another implementation: flash attention reads it there."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def set_packed_attention(language_model: Any) -> None:
    """Let a text model attend by [`packed_attention_forward`]. This changes nothing for rows that are not packed."""
    base = language_model.config._attn_implementation
    if base.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + base, packed_attention_forward)
    masks = AttentionMaskInterface()
    if base in masks:
        AttentionMaskInterface.register(PREFIX + base, masks[base])
    # A process that loads a pickled model may not know the name.
    copyreg.pickle(type(language_model.config), _reduce_unpacked)
    language_model.config._attn_implementation = PREFIX + base


def _reduce_unpacked(config: Any) -> tuple[Any, ...]:
    """Reduce a configuration for `pickle` and `copy`, with the attention that it named before an engine used it."""
    new, arguments, state, *rest = config.__reduce_ex__(2)
    name = config._attn_implementation
    if isinstance(name, str) and name.startswith(PREFIX):  # a faulty checkpoint may name anything
        state = {key: name.removeprefix(PREFIX) if value == name else value for key, value in state.items()}
    return new, arguments, state, *rest


__all__ = [
    "DeviceNumbers",
    "PackedCaches",
    "PlacedPlan",
    "StepBounds",
    "StepPlan",
    "StreamPart",
    "commit",
    "lay_out",
    "packed_attention_forward",
    "plan_step",
    "set_packed_attention",
]
