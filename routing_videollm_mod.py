# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Routing on one page: where frames lie, which tokens a layer keeps, and how it runs on those only."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    and_masks,
    create_causal_mask,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from .routers_videollm_mod import GATES, ROUTERS, RouterLoss, VideoLLMMoDRouter


@dataclass
class RoutingPlan:
    """
    Which tokens a layer runs on if it keeps `keep_count` tokens per frame, as far as this does not depend on scores.

    Indices count tokens in the flattened batch. A *slot* is a place in the short sequences (batch * length).

    Attributes:
        length (`int`): Length of the short sequence of kept and text tokens in the longest row.
        size (`int`): `batch * length`.
        stand_in (`torch.LongTensor`): For each slot that is not filler, its text token or one of its frame's first.
        fixed (`torch.LongTensor`): Tokens that are always kept: text, and each frame's last if `mod_keep_last`.
        order (`torch.LongTensor` of shape `(frames, tokens)`): Frame tokens, in the order that decides equal scores.
        candidates (`torch.LongTensor` of shape `(frames, candidates)`): The part of `order` that scores decide on.
        num_chosen (`int`): How many of them are kept per frame.
        slot_frame (`torch.LongTensor` of shape `(batch * length,)`): Index of each slot's frame, 0 at text.
        gated (`torch.Tensor` of shape `(batch * length,)`): 1 at the slots of frame tokens, else 0.
        valid (`torch.LongTensor`, *optional*): The slots that are not filler, or `None` if all rows are equally long.
    """

    length: int
    size: int
    stand_in: torch.LongTensor
    fixed: torch.LongTensor
    order: torch.LongTensor
    candidates: torch.LongTensor
    num_chosen: int
    slot_frame: torch.LongTensor
    gated: torch.Tensor
    valid: torch.LongTensor | None

    def fill(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the slots that are not filler as values of all slots, 0 at filler."""
        return values if self.valid is None else values.new_zeros(self.size).index_copy(0, self.valid, values)


class FrameLayout:
    """
    Where the frames of a batch lie in its sequences. Each forward pass makes one, and layers only index it.

    Args:
        frame_token_mask (`torch.BoolTensor` of shape `(batch, sequence)`): True at frame tokens.
        num_frames (`Sequence[int]`): Number of frames of each row. The host knows it, so it knows all shapes.
        num_tokens (`int`): Number of tokens per frame.
        keep_last (`bool`, *optional*, defaults to `False`): Whether routed layers keep each frame's last token.

    Attributes:
        rank (`torch.LongTensor` of shape `(batch, sequence)`): Index of each frame token within its frame.
        token_index (`torch.LongTensor` of shape `(frames, tokens)`): Index of each frame token in the flattened batch.

    Raises:
        `ValueError`: On a CPU, if other tokens stand within a frame.
    """

    def __init__(
        self,
        frame_token_mask: torch.BoolTensor,
        num_frames: Sequence[int],
        num_tokens: int,
        *,
        keep_last: bool = False,
    ) -> None:
        self.frame_token_mask, self.num_frames, self.num_tokens = frame_token_mask, list(num_frames), num_tokens
        self.keep_last, self.total_frames = keep_last, sum(num_frames)
        self.batch_size, self.sequence_length = frame_token_mask.shape
        self._plans: dict[int, RoutingPlan] = {}
        self.rank = (frame_token_mask.cumsum(dim=1) - 1) % num_tokens
        index = torch.nonzero_static(frame_token_mask.flatten(), size=self.total_frames * num_tokens)
        self.token_index = index.view(self.total_frames, num_tokens)
        if self.total_frames > 0 and frame_token_mask.device.type == "cpu" and not torch.compiler.is_compiling():
            torn = (self.token_index[:, -1] - self.token_index[:, 0] != num_tokens - 1).nonzero()
            if len(torn):
                raise ValueError(f"Frame tokens must stand together; others are within frame {int(torn[0])}.")

    @property
    def inside_frame(self) -> torch.BoolTensor | None:
        """True at frame tokens that are not the last of their frame, (batch, sequence); `None` without frames."""
        return None if self.total_frames == 0 else self.frame_token_mask & (self.rank < self.num_tokens - 1)

    @property
    def speaking_index(self) -> torch.LongTensor:
        """Index in the flattened batch of the tokens after which the model may speak: text and each frame's last."""
        may_speak = ~self.frame_token_mask | (self.rank == self.num_tokens - 1)
        size = self.batch_size * self.sequence_length - self.total_frames * (self.num_tokens - 1)
        return torch.nonzero_static(may_speak.flatten(), size=size).squeeze(1)

    def plan(self, keep_count: int) -> RoutingPlan:
        """Return the plan of layers that keep `keep_count` tokens per frame, made once."""
        if keep_count not in self._plans:
            self._plans[keep_count] = self._new_plan(keep_count, int(self.keep_last and keep_count > 0))
        return self._plans[keep_count]

    def _new_plan(self, keep_count: int, num_last: int) -> RoutingPlan:
        is_frame, rank = self.frame_token_mask.flatten(), self.rank.flatten()
        num_tokens, device = self.num_tokens, is_frame.device
        lengths = [self.sequence_length - frames * (num_tokens - keep_count) for frames in self.num_frames]
        total, length, valid = sum(lengths), max(lengths), None
        is_fixed = ~is_frame | (rank >= num_tokens - num_last)
        fixed = torch.nonzero_static(is_fixed, size=total - self.total_frames * (keep_count - num_last)).squeeze(1)
        # Kept tokens keep their order, so a frame's first `keep_count` tokens can stand in for them.
        stand_in = torch.nonzero_static(~is_frame | (rank < keep_count), size=total).squeeze(1)
        gated = is_frame[stand_in]
        frame = torch.where(gated, (is_frame.cumsum(0)[stand_in] - 1) // num_tokens, 0)
        if min(lengths) < length:
            rows = [torch.arange(row * length, row * length + n, device=device) for row, n in enumerate(lengths)]
            valid = torch.cat(rows)
        order = preference(num_tokens - num_last, keep_count - num_last, device)
        order = self.token_index[:, torch.cat([order, torch.arange(num_tokens - num_last, num_tokens, device=device)])]
        plan = RoutingPlan(
            length=length,
            size=self.batch_size * length,
            stand_in=stand_in,
            fixed=fixed,
            order=order,
            candidates=order[:, : num_tokens - num_last],
            num_chosen=keep_count - num_last,
            slot_frame=frame,
            gated=gated.float(),
            valid=valid,
        )
        plan.slot_frame, plan.gated = plan.fill(frame), plan.fill(plan.gated)
        return plan


def find_frames(
    config: Any,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.Tensor | None,
    pixel_values_videos: torch.Tensor | None,
    frame_features: torch.Tensor | None,
    num_frames: Sequence[int] | torch.Tensor | None,
    frame_token_mask: torch.BoolTensor | None,
) -> FrameLayout:
    """
    Find the frames in the inputs of a forward pass; see [`VideoLLMMoDModel.forward`] for the arguments.

    Raises:
        `ValueError`: If frames and frame tokens do not match. On a GPU the check runs asynchronously.
    """
    frames = pixel_values_videos if frame_features is None else frame_features
    source = input_ids if inputs_embeds is None else inputs_embeds
    batch_size, sequence_length = source.shape[:2]
    num_tokens = config.frame_num_tokens
    _check_frames(config, pixel_values_videos, frame_features, batch_size)
    no_frames = frames is None and frame_token_mask is None
    if frame_token_mask is None and input_ids is not None:
        frame_token_mask = input_ids == config.frame_token_id
    elif frame_token_mask is None:
        frame_token_mask = torch.zeros(batch_size, sequence_length, dtype=torch.bool, device=source.device)
    if num_frames is not None:
        rows = num_frames.tolist() if isinstance(num_frames, torch.Tensor) else num_frames
        # A pipeline's batch is a list of lists.
        num_frames = [count for row in rows for count in (row if isinstance(row, (list, tuple)) else [row])]
    elif no_frames:
        num_frames = [0] * batch_size
    elif frames is not None and batch_size == 1:
        num_frames = [frames.shape[1]]
    else:
        num_frames = [count // num_tokens for count in frame_token_mask.sum(dim=1).tolist()]
    if len(num_frames) != batch_size or (frames is not None and max(num_frames) > frames.shape[1]):
        given = "none" if frames is None else f"{frames.shape[1]} per row"
        raise ValueError(f"`num_frames` is {num_frames} for a batch of {batch_size} rows; frames given: {given}.")
    if frames is None and inputs_embeds is None and max(num_frames) > 0:
        raise ValueError(f"Rows have {num_frames} frames, but neither `pixel_values_videos` nor `frame_features`.")
    expected = [count * num_tokens for count in num_frames]
    message = f"The rows have {num_frames} frames of {num_tokens} tokens, so they need {expected} frame tokens"
    check_on_device(frame_token_mask.sum(dim=1), expected, message)
    return FrameLayout(frame_token_mask, num_frames, num_tokens, keep_last=config.mod_keep_last)


def _check_frames(
    config: Any, pixel_values_videos: torch.Tensor | None, frame_features: torch.Tensor | None, batch_size: int
) -> None:
    if pixel_values_videos is not None and frame_features is not None:
        raise ValueError("Give `pixel_values_videos` or `frame_features`, not both.")
    shapes = {
        "pixel_values_videos": (pixel_values_videos, "(batch, frames, channels, height, width)"),
        "frame_features": (frame_features, "(batch, frames, features, width)"),
    }
    for name, (frames, shape) in shapes.items():
        if frames is not None and (frames.ndim != shape.count(",") + 1 or frames.shape[0] != batch_size):
            raise ValueError(f"`{name}` must be {shape} with a batch of {batch_size}, got {tuple(frames.shape)}.")
    expected = config.frame_feature_shape
    if frame_features is not None and tuple(frame_features.shape[2:]) != expected:
        raise ValueError(
            f"`frame_features` has {frame_features.shape[2]} features of width {frame_features.shape[3]} per frame; "
            f"this model's frames have {expected[0]} features of width {expected[1]}."
        )


def find_positions(
    position_ids: torch.LongTensor | None,
    layout: FrameLayout,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    num_seen: int | torch.Tensor,
    seq_idx: torch.Tensor | None,
    *,
    device: torch.device,
) -> torch.LongTensor:
    """Return rotary positions (batch or 1, sequence): the given ones after checks, or a count of each dialogue."""
    given = None if attention_mask is None or isinstance(num_seen, torch.Tensor) else attention_mask.shape[1]
    if given is not None and given != num_seen + layout.sequence_length:
        needed = f"{num_seen} + {layout.sequence_length}"
        raise ValueError(f"`attention_mask` is {given} wide; it must cover past and new tokens: {needed}.")
    if position_ids is not None:
        if attention_mask is None and seq_idx is None and getattr(cache, "needs_masks", True):
            check_on_device(
                (position_ids.diff(dim=-1) < 0).sum(dim=-1),
                [0] * position_ids.shape[0],
                "`position_ids` restart within a row: give `seq_idx` to keep its dialogues apart. Number of restarts",
            )
        return position_ids
    if seq_idx is not None:
        places = torch.arange(layout.sequence_length, device=device).expand(layout.batch_size, -1)
        begins = F.pad(seq_idx.to(device).diff(dim=1), (1, 0)) != 0
        return places - torch.where(begins, places, 0).cummax(dim=1).values
    if attention_mask is not None:
        positions = attention_mask.long().cumsum(dim=1) - 1
        positions = positions.clamp(min=0)[:, -layout.sequence_length :].to(device)
        return positions + getattr(cache, "position_offset", 0)
    return (torch.arange(layout.sequence_length, device=device) + getattr(cache, "next_position", num_seen))[None]


def compare_frames(
    config: Any,
    layout: FrameLayout,
    embeddings: torch.Tensor,
    cache: Cache | None,
    num_seen: int | torch.Tensor,
    seq_idx: torch.Tensor | None,
) -> torch.Tensor | None:
    """
    Return the scores of all tokens, (batch * sequence,), that layers share; `None` if routers do not compare frames.

    `embeddings` (batch, sequence, hidden) are the input of the first layer. The cache remembers the frames among them.
    """
    router = ROUTERS[config.mod_router]
    if not router.compares_frames or layout.total_frames == 0 or not config.router_layers:
        return None

    index, length = layout.token_index.to(embeddings.device), layout.sequence_length
    frames = embeddings.detach().flatten(0, 1)[index]
    begins = index[:, 0]
    if cache is not None:
        ends = begins % length + layout.num_tokens + num_seen
        previous = cache.remember_frames(frames, layout.num_frames, ends, num_seen)
    else:
        dialogues = begins // length if seq_idx is None else seq_idx.flatten().to(index.device)[begins]
        goes_on = (dialogues.diff() == 0) & ((begins // length).diff() == 0)
        previous = F.pad(frames[:-1] * goes_on[:, None, None], (0, 0, 0, 0, 1, 0))
    scores = router.score_frames(frames, previous)
    return scores.new_zeros(layout.batch_size * length).index_copy(0, index.flatten(), scores.flatten())


def choose(scores: torch.Tensor, plan: RoutingPlan) -> torch.LongTensor:
    """
    Return the tokens that a routed layer runs on, (batch * length,): fixed ones and each frame's highest scores.

    Among equal scores, evenly spaced tokens win: routers that start at zero do not all keep the top left corner.
    `scores` (frames, tokens) are those of the tokens in `plan.order`. Tokens stay in order.
    """
    # A stable sort, since `topk` breaks ties differently for one frame and for many.
    ranking = scores[:, : plan.candidates.shape[1]].argsort(dim=1, descending=True, stable=True)
    chosen = plan.candidates.gather(1, ranking[:, : plan.num_chosen])
    return plan.fill(torch.cat([plan.fixed, chosen.flatten()]).sort().values)


def preference(num_tokens: int, count: int, device: torch.device) -> torch.LongTensor:
    """Return the indices 0 to `num_tokens` - 1 in order of preference: first `count` evenly spaced ones."""
    first = (2 * torch.arange(count, device=device) + 1) * num_tokens // (2 * max(count, 1))
    is_first = torch.zeros(num_tokens, dtype=torch.long, device=device).index_fill(0, first, 1)
    return is_first.argsort(descending=True, stable=True)


class LayerRouting:
    """
    Runs the decoder layers of one forward pass, the routed ones on kept and text tokens only.

    Args:
        masks ([`LayerMasks`]): Attention masks, with the key/value cache.
        num_seen (`int` or `torch.Tensor`): Number of tokens in the cache.
        position_ids (`torch.LongTensor` of shape `(batch or 1, sequence)`): Positions of the full sequences.
        shared_scores (`torch.Tensor` of shape `(batch * sequence,)`, *optional*): See [`compare_frames`].
        collects (`bool`): Whether to collect scores and kept tokens.

    Attributes:
        scores, kept (`list[torch.Tensor]`): What was collected, (batch, frames, tokens) for each routed layer.
    """

    def __init__(
        self,
        config: Any,
        layout: FrameLayout,
        masks: "LayerMasks",
        num_seen: int | torch.Tensor,
        position_ids: torch.LongTensor,
        shared_scores: torch.Tensor | None = None,
        *,
        collects: bool,
    ) -> None:
        self.shared_scores = shared_scores
        self.config, self.layout, self.masks, self.cache = config, layout, masks, masks.cache
        self.num_seen, self.position_ids, self.collects = num_seen, position_ids, collects
        self.keep_counts = config.layer_keep_counts
        # Read once: attributes of a configuration take as long as a kernel launch.
        self.centers, self.on_update = config.mod_normalize_scores, config.mod_gate_on == "update"
        self.gate = GATES[config.mod_gate] if ROUTERS[config.mod_router].learns else None
        self.router_loss = config.mod_router_loss if torch.is_grad_enabled() else None
        self.scores: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []
        self._rotary: dict[torch.device, torch.Tensor] = {}

    def run(
        self,
        layer: nn.Module,
        run: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """
        Run a layer on hidden states (batch, sequence, hidden). Skipped tokens pass unchanged.

        `run` gets the hidden states, the position embeddings and the mask of the tokens that the layer runs on.
        """
        index, layout = layer.layer_index, self.layout
        keep_count = self.keep_counts[index]
        if keep_count >= layout.num_tokens or layout.total_frames == 0:
            if keep_count < layout.num_tokens:
                self._record_positions(index, None, None)
                self._collect(None, None, None, hidden_states)
            mask = self.masks.get(index, keep_count, hidden_states)
            # Routers learn at full compute too, and each process uses every weight.
            hidden_states = self._teach(layer, hidden_states, None, None)
            return run(hidden_states, position_embeddings=position_embeddings, attention_mask=mask)
        plan = layout.plan(keep_count)
        scores = self._score(layer, hidden_states) if keep_count > 0 else None
        ordered = None if scores is None else scores.take(plan.order)
        slots = plan.fill(plan.fixed) if scores is None else choose(ordered, plan)
        self._collect(scores, slots, plan, hidden_states)
        if plan.length == 0:
            return hidden_states
        self._record_positions(index, slots, plan)
        hidden_states = self._teach(layer, hidden_states, slots, plan)
        flat, here = hidden_states.flatten(0, 1), slots.to(hidden_states.device)
        short = flat.index_select(0, here).view(layout.batch_size, plan.length, -1)
        rotary = self._rotary_at(here, position_embeddings)
        mask = self.masks.get(index, keep_count, short)
        output = run(short, position_embeddings=rotary.unbind(), attention_mask=mask)
        if scores is not None and self.gate is not None:
            excess = self._gate_excess(layer, hidden_states, short, scores, slots, plan, ordered)
            output = apply_gate(output, short, excess, self.gate[1], on_update=self.on_update)
        return write_back(flat, output, here, plan).view_as(hidden_states)

    def _teach(
        self, layer: nn.Module, hidden_states: torch.Tensor, slots: torch.LongTensor | None, plan: RoutingPlan | None
    ) -> torch.Tensor:
        """Return a layer's input with its router's loss, if there is one, on the tokens in `slots`; `None` for all."""
        if self.router_loss is None or layer.router is None or not layer.training:
            return hidden_states
        if not ROUTERS[self.config.mod_router].learns:
            raise ValueError(
                f"`mod_router_loss={self.router_loss!r}` trains routers that learn, and {self.config.mod_router!r} "
                "does not: set `mod_router_loss=None`, or `mod_router='learned'`."
            )
        # Score again in the backward pass: a router may keep a float32 copy of all tokens.
        inputs = hidden_states.detach(), self.position_ids, self.layout.rank
        scores = checkpoint(layer.router, *inputs, use_reentrant=False, preserve_rng_state=False).flatten()
        num_candidates = self.layout.num_tokens - int(self.layout.keep_last)
        index = self.layout.token_index[:, :num_candidates].to(hidden_states.device)
        is_kept = torch.ones_like(index) if slots is None else self._find_kept(slots, plan)[:, :num_candidates]
        is_kept = is_kept.to(index.device, torch.bool)
        return RouterLoss.apply(hidden_states, scores[index], index, is_kept, self.config.mod_router_loss_weight)

    def _find_kept(self, slots: torch.LongTensor, plan: RoutingPlan) -> torch.Tensor:
        """Return 1 at the frame tokens (frames, tokens) in `slots`, else 0."""
        real = slots if plan.valid is None else slots[plan.valid]  # filler stands at token 0
        size = self.layout.batch_size * self.layout.sequence_length
        return torch.zeros(size, device=slots.device).index_fill(0, real, 1.0)[self.layout.token_index]

    def _score(self, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the scores of all tokens, (batch * sequence,), without gradient if the gate scores again."""
        router = layer.router
        if router is None:
            raise ValueError(
                f"Layer {layer.layer_index} is routed but has no router: the model was built without one there. "
                "Set `mod_layers` and `mod_keep_ratio` before building the model."
            )
        if self.shared_scores is not None:
            return self.shared_scores.to(self.layout.token_index.device)
        with torch.no_grad() if torch.is_grad_enabled() and router.is_pointwise else nullcontext():
            scores = router(hidden_states, self.position_ids, self.layout.rank)
        return scores.flatten().to(self.layout.token_index.device)

    def _gate_excess(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        short: torch.Tensor,
        scores: torch.Tensor,
        slots: torch.LongTensor,
        plan: RoutingPlan,
        ordered: torch.Tensor,
    ) -> torch.Tensor:
        """
        Return (g - 1) / factor of each slot, (batch * length,), 0 at text; see [`GATES`].

        `scores` (batch * sequence,) are those of all tokens, and `ordered` (frames, tokens) those of `plan.order`.
        """
        if not (torch.is_grad_enabled() and layer.router.is_pointwise):
            at_slots = scores.index_select(0, slots)
        else:
            # Score the kept tokens again, with gradient: the backward pass then needs these only.
            positions = self.position_ids.expand(self.layout.batch_size, -1).flatten()[slots].view(short.shape[:2])
            ranks = self.layout.rank.flatten()[slots].view(short.shape[:2])
            at_slots = layer.router(short, positions, ranks).flatten().to(slots.device)
        if self.centers:
            mean = layer.router.mean_scores(hidden_states, plan.order, ordered).to(slots.device).flatten()
            at_slots = at_slots - (mean if len(mean) == 1 else mean[plan.slot_frame])
        return self.gate[0](at_slots) * plan.gated

    def _rotary_at(self, slots: torch.LongTensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return cosines and sines of the tokens in slots: (2, batch, length, dim)."""
        if slots.device not in self._rotary:
            # One tensor, which each layer indexes at once.
            both = torch.stack([x.expand(self.layout.batch_size, -1, -1) for x in embeddings])
            self._rotary[slots.device] = both.flatten(1, 2)
        rotary = self._rotary[slots.device]
        return rotary.index_select(1, slots).view(2, self.layout.batch_size, -1, rotary.shape[2])

    def _record_positions(self, index: int, slots: torch.LongTensor | None, plan: RoutingPlan | None) -> None:
        """Record the positions of a routed layer's next entries: those of `slots`, or of all tokens if `None`."""
        if self.cache is None:
            return
        batch_size, length = self.layout.batch_size, self.layout.sequence_length
        if slots is None:
            positions = torch.arange(length, device=self.layout.rank.device).expand(batch_size, -1)
        else:
            positions = (slots if batch_size == 1 else slots % length).view(batch_size, -1)
        if plan is None or plan.valid is None:
            self.cache.record_positions(index, positions, self.num_seen)
        else:
            filler = torch.ones_like(slots, dtype=torch.bool).index_fill(0, plan.valid, False)
            positions = (positions + self.num_seen).masked_fill(filler.view_as(positions), -1)
            self.cache.record_positions(index, positions, has_filler=True)

    def _collect(
        self, scores: torch.Tensor | None, slots: torch.LongTensor | None, plan: RoutingPlan | None, like: torch.Tensor
    ) -> None:
        """Collect scores and kept tokens, on the device of `like`, if they are wanted."""
        if not self.collects:
            return
        kept = None
        if scores is not None:
            scores, kept = scores[self.layout.token_index], self._find_kept(slots, plan)
            if self.centers:
                scores = scores - scores.mean(dim=1, keepdim=True)
        self.scores.append(by_row(scores, self.layout, like.device))
        self.kept.append(by_row(kept, self.layout, like.device).bool())


class RoutedLayer:
    """
    Mixin that lets a decoder layer of the library route; see [`add_routing`].

    A layer that gets `routing=` runs by [`LayerRouting`]. Attributes: `layer_index`, and `router`, which is `None` in
    layers that never choose.
    """

    # In Transformers a decoder layer is checkpointed as a unit: up to 5.23 by `__call__`, since then by wrapping
    # `forward` of every subclass. A routed layer is checkpointed on its short sequence only, by `_run`.
    __call__ = nn.Module.__call__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        # Pickle would look for the class by its name, which is that of the library's class.
        return _new_layer, (type(self).__mro__[2],), self.__dict__

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        routing: LayerRouting | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        position_ids: torch.LongTensor | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the layer on hidden states (batch, sequence, hidden)."""
        run = partial(self._run, super().forward, **kwargs)
        if routing is None:
            return run(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask)
        # `position_ids` end here: a layer would read gaps in them as packed dialogues.
        return routing.run(self, run, hidden_states, position_embeddings)

    def _run(self, forward: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(partial(forward, **kwargs), hidden_states)
        return forward(hidden_states, **kwargs)


@lru_cache
def _routed_class(cls: type[nn.Module]) -> type[nn.Module]:
    # The same name: libraries find the blocks to shard and to place by the names of their classes.
    return type(cls.__name__, (RoutedLayer, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _new_layer(cls: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_routed_class(cls))


def add_routing(layer: nn.Module, index: int, router: VideoLLMMoDRouter | None) -> None:
    """Let a decoder layer route, in place. The names of its weights stay, and the router is its submodule `router`."""
    layer.__class__ = _routed_class(type(layer))
    layer.layer_index, layer.router = index, router


def apply_gate(
    output: torch.Tensor, short: torch.Tensor, excess: torch.Tensor, factor: float, *, on_update: bool
) -> torch.Tensor:
    """
    Return x + g * (f(x) - x) at kept frame tokens, or g * f(x) if not `on_update`, and exactly f(x) at text.

    `output` f(x) and `short` x are (batch, length, hidden); `excess` (batch * length,) is (g - 1) / `factor`.
    """
    # Written as f(x) + (g - 1) * (f(x) - x): g - 1 is 0 at text, and keeps its precision where g is near 1.
    excess = excess.to(output.device, output.dtype).view(*output.shape[:2], 1)
    # With layers on several devices, the input may still be on the previous layer's device.
    update = output - short.to(output.device) if on_update else output
    return torch.addcmul(output, excess, update, value=factor)


def write_back(flat: torch.Tensor, output: torch.Tensor, slots: torch.LongTensor, plan: RoutingPlan) -> torch.Tensor:
    """Return the full sequences (batch * sequence, hidden) with the layer's output at the tokens it ran on."""
    flat, output, slots = flat.to(output.device), output.flatten(0, 1), slots.to(output.device)
    if plan.valid is not None:
        valid = plan.valid.to(output.device)
        output, slots = output.index_select(0, valid), slots.index_select(0, valid)
    return flat.index_copy(0, slots, output)


def by_row(values: torch.Tensor | None, layout: FrameLayout, device: torch.device) -> torch.Tensor:
    """Return values (all frames, tokens) as (batch, frames, tokens), 0 where a row has fewer frames."""
    if values is None:
        return torch.zeros(layout.batch_size, max(layout.num_frames), layout.num_tokens, device=device)
    return nn.utils.rnn.pad_sequence(values.to(device, torch.float32).split(layout.num_frames), batch_first=True)


@dataclass
class LayerMasks:
    """
    Attention masks of one forward pass. Layers that keep the same number of tokens share a mask.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, seen + sequence)`, *optional*): 0 at padding.
        cache (`Cache`, *optional*): The key/value cache. If it has `needs_masks = False`, masks are `None`.
        seq_idx (`torch.Tensor` of shape `(batch, sequence)`, *optional*): Index of each token's dialogue.
    """

    text_config: Any
    layout: FrameLayout
    attention_mask: torch.Tensor | None
    cache: Cache | None
    seq_idx: torch.Tensor | None = None
    _masks: dict[tuple[int, int | None, torch.device], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Read once: attributes of a configuration take as long as a kernel launch.
        self._sliding = [getattr(self.text_config, name, None) for name in ("sliding_window", "layer_types")]

    def get(self, layer: int, keep_count: int, inputs: torch.Tensor) -> Any:
        """Return the mask for `inputs` (batch, length, hidden) of a layer. Record their positions first."""
        if not getattr(self.cache, "needs_masks", True):
            return None
        window, home = self._window(layer, inputs.shape[1]), self.layout.rank.device
        at_home, here = (keep_count, window, home), (keep_count, window, inputs.device)
        if at_home not in self._masks and getattr(self.cache, "is_grouped", False):
            self._masks[at_home] = self.cache.grouped_mask(layer, inputs, window, self.text_config)
        elif at_home not in self._masks:
            self._masks[at_home] = create_causal_mask(
                self.text_config,
                # Only its shape, dtype and device are read. All else that masks depend on is on the layout's device.
                inputs if inputs.device == home else inputs.new_empty(*inputs.shape[:2], 1, device=home),
                self._padding(layer, keep_count, inputs.shape[1]),
                self.cache,  # by position: its name differs between versions of Transformers
                layer_idx=layer,
                and_mask_function=self._overlay(layer, keep_count, window, inputs.shape[1]),
            )
        if here not in self._masks:
            mask = self._masks[at_home]
            self._masks[here] = None if mask is None else mask.to(inputs.device)
        return self._masks[here]

    def _overlay(self, layer: int, keep_count: int, window: int | None, length: int) -> Callable | None:
        """Return the mask function that hides what lies beyond the window and in other dialogues."""
        near = None if window is None else self._window_overlay(layer, keep_count, window)
        if self.seq_idx is None:
            return near
        same = packed_sequence_mask_function(self._by_slot(self.seq_idx, keep_count, length))
        return same if near is None else and_masks(near, same)

    def _window_overlay(self, layer: int, keep_count: int, window: int) -> Callable:
        if keep_count >= self.layout.num_tokens or self.cache is None or not self.cache.has_filler:
            return sliding_window_overlay(window)
        # Count real entries only: filler between them must not push older ones out of the window.
        count = (self.cache.get_positions(layer) >= 0).cumsum(dim=1)
        return lambda row, _head, query, key: count[row, query] - count[row, key] < window

    def _window(self, layer: int, length: int) -> int | None:
        """Return a layer's sliding window, in entries of its own sequence, or `None` while all entries fit."""
        window, types = self._sliding
        if window is None or (types is not None and types[layer] != "sliding_attention"):
            return None
        past = 0 if self.cache is None else self.cache.get_seq_length(layer)
        return None if isinstance(past, int) and past + length <= window else window

    def _padding(self, layer: int, keep_count: int, length: int) -> torch.Tensor | None:
        """Return which of a layer's entries are real, (batch, past + new), or `None` if all are."""
        if keep_count >= self.layout.num_tokens:
            return self.attention_mask
        # Without a cache, filler ends a row, so causal attention already hides it from every real token.
        if self.attention_mask is None and (self.cache is None or not self.cache.has_filler):
            return None
        if self.cache is None:
            seen = self.attention_mask.to(self.layout.frame_token_mask.device, torch.bool)
            return self._by_slot(seen, keep_count, length)
        positions = self.cache.get_positions(layer)
        real = positions >= 0
        if self.attention_mask is not None:
            seen = self.attention_mask.to(positions.device, torch.bool)
            real = real & seen.gather(1, positions.clamp(min=0, max=seen.shape[1] - 1))
        return real

    def _by_slot(self, values: torch.Tensor, keep_count: int, length: int) -> torch.Tensor:
        """Return values of tokens (batch, sequence) as values of a layer's slots (batch, length), 0 at filler."""
        if keep_count >= self.layout.num_tokens or self.layout.total_frames == 0:
            return values
        plan = self.layout.plan(keep_count)
        return plan.fill(values.flatten()[plan.stand_in]).view(self.layout.batch_size, length)


def check_on_device(found: torch.Tensor, expected: list[int], message: str) -> None:
    """Raise an error unless `found` is as expected. On a GPU it is raised there, without waiting for the device."""
    if torch.compiler.is_compiling() or found.device.type == "meta":
        return
    if found.device.type == "cpu":
        if found.tolist() != expected:
            raise ValueError(f"{message}; found {found.tolist()}.")
        return
    is_expected = [count == wanted for count, wanted in zip(found, expected, strict=True)]
    # The device accepts messages of up to 255 bytes.
    torch._assert_async(torch.stack(is_expected).all(), message[:250])
