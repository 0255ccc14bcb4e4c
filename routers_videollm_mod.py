# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Router types: how a routed layer scores the tokens of frames, the gate of its update, and the router loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


# What `mod_gate` computes from a router score s: the gate is g = 1 + factor * function(s), and `None` leaves it at 1.
# "linear" is the paper's g = s (arXiv 2408.16730), "tanh" is p-MoD's (arXiv 2412.04449): it is 1 at a score of 0.
# "straight_through" is 1 too, and has the sigmoid's gradient (Bengio et al., arXiv 1308.3432, section 4).
GATES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float] | None] = {
    "linear": (lambda scores: scores - 1, 1.0),
    "sigmoid": (lambda scores: -torch.sigmoid(-scores), 1.0),
    "tanh": (torch.tanh, 0.2),
    "straight_through": (lambda scores: torch.sigmoid(scores) - torch.sigmoid(scores).detach(), 1.0),
    "none": None,
}


class VideoLLMMoDRouter(nn.Module):
    """
    Base class of router types. A routed layer has one router and keeps each frame's highest scores.

    To add a type, subclass this class and add it to [`ROUTERS`]; `mod_router` then accepts its name. Class attributes:

    - `learns`: whether the router has weights to train, and so whether `mod_gate` applies.
    - `is_pointwise`: whether a token's score depends on that token only. Training then keeps only the kept tokens for
      the backward pass.
    - `compares_frames`: whether scores come from a frame and the frame before it. All layers then share the scores of
      `score_frames`, and `forward` is not called. Such a router has no weights.

    Weights of modules that set `starts_at_zero` are initialised to 0 if the gate of a score of 0 is 1, as it is with
    `"tanh"`, `"straight_through"` and `"none"`: kept tokens are first updated as without routing.
    """

    learns = is_pointwise = compares_frames = False

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor, ranks: torch.LongTensor
    ) -> torch.Tensor:
        """
        Score every token. The model reads the scores of frame tokens and ignores those of text.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden)`): Input of the routed layer.
            position_ids (`torch.LongTensor` of shape `(batch or 1, sequence)`): Positions in the stream. The score of
                a frame must not depend on other frames, else streaming and training choose differently.
            ranks (`torch.LongTensor` of shape `(batch, sequence)`): Index of each frame token within its frame.

        Returns:
            `torch.Tensor` of shape `(batch, sequence, 1)`: Scores in float32 or better.
        """
        raise NotImplementedError

    @classmethod
    def score_frames(cls, frames: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """
        Score the tokens of frames for all layers, once per forward pass, if `compares_frames`.

        Args:
            frames (`torch.Tensor` of shape `(frames, tokens, hidden)`): Embeddings that the first layer gets.
            previous (`torch.Tensor`, same shape): The frame before each frame in its stream; 0 if there is none.

        Returns:
            `torch.Tensor` of shape `(frames, tokens)`: Scores in float32 or better.
        """
        raise NotImplementedError

    def mean_scores(self, hidden_states: torch.Tensor, tokens: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return each frame's mean score (frames, 1), given the scores (frames, tokens) of the tokens at `tokens`."""
        return scores.mean(dim=1, keepdim=True)

    @classmethod
    def flops_per_token(cls, config: Any) -> int:  # noqa: ARG003
        """Return the matrix-product operations of one token's score, a multiply-add counted as two."""
        return 0


class LearnedRouter(VideoLLMMoDRouter):
    """
    Score tokens by a learned direction: mu = w . x (VideoLLM-MoD, arXiv 2408.16730, equation 2).

    With `mod_normalize_scores` x is divided by its length first: mu = w . x / |x|. The residual stream grows with
    depth, and a few of its dimensions are huge.
    """

    learns = is_pointwise = starts_at_zero = True

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.weight = nn.Parameter(torch.empty(1, config.text_config.hidden_size))
        self.normalizes = config.mod_normalize_scores

    def forward(self, hidden_states: torch.Tensor, *_: Any, is_normalized: bool = False) -> torch.Tensor:
        """Return the scores, computed in float32. In bfloat16, with 8 bits, many tokens would have equal scores."""
        # An elementwise product, since a matrix product may use TF32 and gives equal tokens unequal scores.
        x = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        scores = (x * self.weight[0].to(x.dtype)).sum(dim=-1, keepdim=True)
        if self.normalizes and not is_normalized:
            scores = scores / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6)
        return scores

    def mean_scores(self, hidden_states: torch.Tensor, tokens: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Return each frame's mean score (frames, 1). In training, its gradient reaches the weight only."""
        if not torch.is_grad_enabled():
            return super().mean_scores(hidden_states, tokens, scores)
        # The score is linear in the normalised token: a frame keeps its mean token for the backward pass, not all.
        with torch.no_grad():
            x = hidden_states.flatten(0, 1)[tokens.to(hidden_states.device)].to(scores.dtype)
            x = F.normalize(x, dim=-1, eps=1e-6).mean(dim=1)
        return self(x, is_normalized=True)


class UniformRouter(VideoLLMMoDRouter):
    """Score all tokens alike, so that evenly spaced ones are kept."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden_states[..., :1], dtype=torch.float32)


class RandomRouter(VideoLLMMoDRouter):
    """Score tokens by a hash of layer and position, so that streaming and one forward pass choose alike."""

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor, *_: Any) -> torch.Tensor:
        """Return numbers in [0, 1) that look random."""
        return position_noise(position_ids, self.layer).expand(hidden_states.shape[:2])[..., None]


class ChangeRouter(VideoLLMMoDRouter):
    """
    Score tokens by the length of their change since the previous frame, |x - x'|; in the first frame by |x|.

    A change that rounding explains counts as none: steps of different shapes must choose alike in a still scene.
    """

    compares_frames = True

    @classmethod
    def score_frames(cls, frames: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return the lengths, computed in float32 or better."""
        dtype = torch.promote_types(frames.dtype, torch.float32)
        change = torch.linalg.vector_norm(frames.to(dtype) - previous, dim=-1)
        rounding = max(1e-4, 2 * torch.finfo(frames.dtype).eps)
        return torch.where(change > rounding * torch.linalg.vector_norm(frames, dim=-1, dtype=dtype), change, 0.0)


ROUTERS: dict[str, type[VideoLLMMoDRouter]] = {
    "learned": LearnedRouter,
    "uniform": UniformRouter,
    "random": RandomRouter,
    "change": ChangeRouter,
}


class RouterLoss(torch.autograd.Function):
    r"""
    Return hidden states unchanged. In the backward pass, give router scores the gradient of the router loss.

    The *effect* of a kept token is \\(e_i = |\\partial L / \\partial h_i| |h_i|\\), with h the input of the layer: how
    much the loss L could change, to first order, if the token changed by its own length. (The product of both vectors
    would be near 0, because layers normalise their input.) A frame adds \\(-w \\sum_i e_i \\log p_i\\) to what routers
    minimise, with p the softmax of the scores. Effects are constants. The sum and the softmax are over kept tokens:
    what the layer would do with a skipped one is unknown.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, hidden)`): Input of the layer.
        scores (`torch.Tensor` of shape `(frames, tokens)`): Scores of tokens that compete, with gradient.
        index (`torch.LongTensor` of shape `(frames, tokens)`): Their indices in the flattened batch.
        kept (`torch.BoolTensor` of shape `(frames, tokens)`): True at kept tokens.
        weight (`float`): The weight w of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        scores: torch.Tensor,
        index: torch.LongTensor,
        kept: torch.BoolTensor,
        weight: float,
    ) -> torch.Tensor:
        """Return the hidden states."""
        lengths = torch.linalg.vector_norm(hidden_states.flatten(0, 1)[index], dim=-1, dtype=scores.dtype)
        ctx.save_for_backward(scores, lengths, index, kept)
        ctx.weight = weight
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the hidden states, which pass unchanged, and of the scores."""
        scores, lengths, index, kept = ctx.saved_tensors
        effects = torch.linalg.vector_norm(gradient.flatten(0, 1)[index], dim=-1, dtype=scores.dtype) * lengths
        effects = torch.where(kept, effects, 0.0)
        shares = scores.masked_fill(~kept, -torch.inf).softmax(dim=-1)
        pull = torch.where(kept, effects.sum(dim=-1, keepdim=True) * shares - effects, 0.0)
        return gradient, ctx.weight * pull, None, None, None


def position_noise(positions: torch.LongTensor, layer: int) -> torch.Tensor:
    """Return float32 numbers in [0, 1), same shape, from layer and position by Mulvey's 32-bit mixer "lowbias32"."""
    mask = 0xFFFFFFFF
    x = (positions * 0x9E3779B1 + layer * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
    x = ((x ^ (x >> 15)) * 0x735A2D97) & mask
    return (x ^ (x >> 15)).float() / 2**32


__all__ = ["GATES", "ROUTERS", "ChangeRouter", "LearnedRouter", "RandomRouter", "RouterLoss", "UniformRouter"]
__all__ += ["VideoLLMMoDRouter"]
