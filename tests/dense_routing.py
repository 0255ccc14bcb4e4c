# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The routed language model once more, dense and plain, to compare the package with. It shares no code with the package.

Every layer runs on every token, in float64, with attention written out. Masks hide skipped tokens, and what a layer
computes for them is discarded. Sources: VideoLLM-MoD (arXiv 2408.16730, section 3), VideoLLM-online (arXiv 2406.11816,
section 3.2) for the loss, p-MoD (arXiv 2412.04449) for the tanh gate, and docs/routing.md for our additions.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from tiny import choose_kept
from torch.nn import functional as F


# Two scores that differ by less than this share of the largest may be ordered otherwise in float32.
CLOSE = 2e-5
GATES = {
    "linear": lambda score: score,
    "sigmoid": lambda score: 1 / (1 + math.exp(-score)),
    "tanh": lambda score: 1 + 0.2 * math.tanh(score),
    "straight_through": lambda score: 1.0,  # noqa: ARG005
    "none": lambda score: 1.0,  # noqa: ARG005
}


def keep_counts(num_layers: int, num_tokens: int, ratio: Any = 0.2, layers: Any = None) -> list[int]:
    """Return how many tokens of a frame each layer keeps: the least whole number that is at least ratio * tokens."""
    if isinstance(ratio, (list, tuple)):
        ratios = list(ratio)
    else:
        begin = {None: 1, "interleaved": 1, "interleaved_deep": 3, "all": 0, "all_deep": 2}
        if not isinstance(layers, (list, tuple)):
            layers = range(begin[layers], num_layers, 1 if layers in ("all", "all_deep") else 2)
        ratios = [ratio if layer in layers else 1 for layer in range(num_layers)]
    return [math.ceil(Fraction(str(x)) * num_tokens) for x in ratios]


class DenseModel:
    """
    A language model with routed layers, and one dialogue that it has read so far.

    Args:
        weights: Weights by the names of a checkpoint.
        text_config: The text model's configuration in Transformers, one of llama, mistral, qwen2, qwen3, smollm3.
        options: Those of `VideoLLMMoDConfig` that were given.
        frame_token_id, num_tokens: The frame token, and how many of them a frame has.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        text_config: Any,
        options: dict[str, Any],
        *,
        frame_token_id: int,
        num_tokens: int,
    ) -> None:
        self.text, self.frame_token_id, self.num_tokens = text_config, frame_token_id, num_tokens
        self.weights = {name.removeprefix("model."): value.double() for name, value in weights.items()}
        self.num_layers = text_config.num_hidden_layers
        ratio, layers = options.get("mod_keep_ratio", 0.2), options.get("mod_layers")
        self.counts = keep_counts(self.num_layers, num_tokens, ratio, layers)
        self.router, self.gate = options.get("mod_router", "learned"), options.get("mod_gate", "tanh")
        self.on_update = options.get("mod_gate_on", "update") == "update"
        self.keep_last = options.get("mod_keep_last", True)
        self.normalizes = options.get("mod_normalize_scores")
        self.normalizes = self.gate != "linear" if self.normalizes is None else self.normalizes
        self.pooled = options.get("frame_token_pooled", (3, 3))
        self.connector = options.get("connector", "mlp"), options.get("connector_hidden_act", "gelu")
        # All tokens so far: which frame they are of (-1 for text), whether they are still remembered, and for each
        # layer whether it kept them, their keys before rotation, and their values.
        self.frame_of: list[int] = []
        self.is_remembered = torch.zeros(0, dtype=torch.bool)
        self.kept = [torch.zeros(0, dtype=torch.bool) for _ in range(self.num_layers)]
        self.entries: list[tuple[torch.Tensor, ...]] = [()] * self.num_layers
        self.last_frame: torch.Tensor | None = None
        # What was seen of each frame: layer -> scores, layer -> kept tokens.
        self.scores: list[dict[int, torch.Tensor]] = []
        self.choices: list[dict[int, torch.Tensor]] = []
        self.closest = math.inf  # relative difference of the two scores that were hardest to tell apart

    # ------------------------------------------------------------------------------------------------ the dialogue

    def read(self, ids: Sequence[int], features: torch.Tensor | None = None) -> torch.Tensor:
        """Read tokens, with the features (frames, rows, width) of frames among them; return logits (tokens, vocab)."""
        hidden = self.weights["language_model.embed_tokens.weight"]
        ids, before = list(ids), len(self.frame_of)
        hidden = hidden[torch.tensor([0 if token == self.frame_token_id else token for token in ids])]
        places = torch.tensor([place for place, token in enumerate(ids) if token == self.frame_token_id])
        places = places.long().view(-1, self.num_tokens)
        first = len(self.scores)
        self.frame_of += [-1] * len(ids)
        for frame, row in enumerate(places.tolist()):
            assert row == list(range(row[0], row[0] + self.num_tokens))
            hidden[row] = self.connect(features[frame].double())
            self.scores.append({})
            self.choices.append({})
            for place in row:
                self.frame_of[before + place] = first + frame
        self.is_remembered = torch.cat([self.is_remembered, torch.ones(len(ids), dtype=torch.bool)])
        changes = [self._change(hidden[row]) for row in places]
        for layer in range(self.num_layers):
            hidden = self._run_layer(layer, hidden, places, first, changes)
        hidden = self._norm(hidden, "language_model.norm")
        head = "lm_head.weight" if "lm_head.weight" in self.weights else "language_model.embed_tokens.weight"
        return hidden @ self.weights[head].T

    def forget(self, stays: Sequence[bool]) -> None:
        """Forget remembered tokens: `stays` has one value for each."""
        remembered = self.is_remembered.nonzero().flatten()
        assert len(stays) == len(remembered)
        self.is_remembered[remembered] = torch.tensor(list(stays), dtype=torch.bool)

    def unread(self, count: int) -> None:
        """Undo the reading of the last tokens."""
        length = len(self.frame_of) - count
        num_frames = max([-1, *self.frame_of[:length]]) + 1
        assert num_frames == len(self.scores) or self.router != "change"
        self.frame_of = self.frame_of[:length]
        self.is_remembered, self.kept = self.is_remembered[:length], [x[:length] for x in self.kept]
        self.entries = [tuple(x[:length] for x in pair) for pair in self.entries]
        self.scores, self.choices = self.scores[:num_frames], self.choices[:num_frames]

    # -------------------------------------------------------------------------------------------------- the routing

    def _change(self, frame: torch.Tensor) -> torch.Tensor:
        """Return how much each token of a frame (tokens, hidden) differs from the frame before, which it replaces."""
        lengths = frame.norm(dim=-1)
        change = lengths if self.last_frame is None else (frame - self.last_frame).norm(dim=-1)
        self.last_frame = frame.clone()
        if self.router == "change":  # rounding decides whether it counts
            near = ((change / lengths / 1e-4).log().abs() < 0.5).any()
            self.closest = 0.0 if near else self.closest
        return torch.where(change > 1e-4 * lengths, change, 0.0)

    def _score(self, layer: int, token: torch.Tensor, place: int) -> float:
        if self.router == "random":
            return _hash(place, layer)
        if self.router == "uniform":
            return 0.0
        score = float(self.weights[f"language_model.layers.{layer}.router.weight"][0] @ token)
        return score / float(token.norm()) if self.normalizes else score

    def _route(
        self, layer: int, hidden: torch.Tensor, places: torch.Tensor, first: int, changes: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which new tokens the layer keeps, and their gates: two tensors (tokens,)."""
        runs, gates = torch.ones(len(hidden), dtype=torch.bool), torch.ones(len(hidden), dtype=torch.float64)
        count, begin = self.counts[layer], len(self.frame_of) - len(hidden)
        if count == self.num_tokens:
            return runs, gates
        for frame, row in enumerate(places):
            runs[row] = False
            if count == 0:
                continue
            scores = changes[frame]
            if self.router != "change":
                scores = torch.tensor([self._score(layer, hidden[x], begin + int(x)) for x in row]).double()
            self._watch_ties(scores, count)
            if self.normalizes:
                scores = scores - scores.mean()
            chosen = choose_kept(scores[None], count, self.keep_last)[0]
            runs[row[chosen]] = True
            self.scores[first + frame][layer], self.choices[first + frame][layer] = scores, runs[row]
            if self.router == "learned":
                gates[row] = torch.tensor([GATES[self.gate](float(score)) for score in scores]).double()
        return runs, gates

    def _watch_ties(self, scores: torch.Tensor, count: int) -> None:
        scores = scores[:-1] if self.keep_last else scores
        count -= self.keep_last
        if 0 < count < len(scores):
            ranked = scores.sort(descending=True).values
            last, next_one = float(ranked[count - 1]), float(ranked[count])
            # Scores of 0 are exactly 0 in any dtype: places decide between these.
            if not last == next_one == 0:
                self.closest = min(self.closest, (last - next_one) / float(scores.abs().max()))

    # --------------------------------------------------------------------------------------------------- the layers

    def _run_layer(
        self, layer: int, hidden: torch.Tensor, places: torch.Tensor, first: int, changes: list[torch.Tensor]
    ) -> torch.Tensor:
        runs, gates = self._route(layer, hidden, places, first, changes)
        self.kept[layer] = torch.cat([self.kept[layer], runs])
        name = f"language_model.layers.{layer}."
        output = hidden + self._attend(layer, self._norm(hidden, f"{name}input_layernorm"))
        inside = self._norm(output, f"{name}post_attention_layernorm")
        gate, up = self._linear(inside, f"{name}mlp.gate_proj"), self._linear(inside, f"{name}mlp.up_proj")
        output = output + self._linear(gate * torch.sigmoid(gate) * up, f"{name}mlp.down_proj")
        gates = gates[:, None]
        output = hidden + gates * (output - hidden) if self.on_update else gates * output
        return torch.where(runs[:, None], output, hidden)

    def _attend(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return attention of new tokens (tokens, hidden) to all that the layer kept and the stream remembers."""
        text, name = self.text, f"language_model.layers.{layer}.self_attn."
        queries, keys, values = (
            self._linear(hidden, f"{name}{part}_proj").unflatten(-1, (-1, text.head_dim)) for part in "qkv"
        )
        if text.model_type == "qwen3":
            queries, keys = self._norm(queries, f"{name}q_norm"), self._norm(keys, f"{name}k_norm")
        old_keys, old_values = self.entries[layer] or (keys[:0], values[:0])
        keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
        self.entries[layer] = keys, values
        positions = self.is_remembered.cumsum(0) - 1
        if not (text.model_type == "smollm3" and text.no_rope_layers[layer] == 0):
            queries, keys = self._rotate(queries, positions[-len(hidden) :]), self._rotate(keys, positions)
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(text.head_dim)
        shares = scores.masked_fill(~self._visible(layer, len(hidden)), -math.inf).softmax(dim=-1).nan_to_num(0.0)
        return self._linear(torch.einsum("hqk,khd->qhd", shares, values).flatten(1), f"{name}o_proj")

    def _visible(self, layer: int, num_new: int) -> torch.Tensor:
        """Return what each new token attends to, (new, all)."""
        is_entry, total = self.kept[layer] & self.is_remembered, len(self.frame_of)
        places = torch.arange(total)
        visible = is_entry[None] & (places[None] <= places[-num_new:, None])
        types = getattr(self.text, "layer_types", None)
        window = getattr(self.text, "sliding_window", None)
        if window is not None and (types is None or types[layer] == "sliding_attention"):
            number = is_entry.cumsum(0)  # a window counts what the layer holds
            visible &= number[-num_new:, None] - number[None] < window
        return visible

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate heads (tokens, heads, dim) by their positions (RoFormer, arXiv 2104.09864, section 3.4)."""
        half = self.text.head_dim // 2
        speed = self.text.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (positions.double()[:, None] * speed)[:, None]
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        length = (hidden.square().mean(dim=-1, keepdim=True) + self.text.rms_norm_eps).sqrt()
        return hidden / length * self.weights[f"{name}.weight"]

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weights.get(f"{name}.bias")
        output = hidden @ self.weights[f"{name}.weight"].T
        return output if bias is None else output + bias

    def connect(self, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (tokens, hidden) of one frame's features (rows, width)."""
        kind, act = self.connector
        if kind == "pixel_shuffle" and act is not None:
            features = features - features.mean(dim=-1, keepdim=True)
            spread = (features.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            features = features / spread * self.weights["connector.layer_norm.weight"]
            features = features + self.weights["connector.layer_norm.bias"]
        hidden = self._linear(features, "connector.linear_1")
        if act is not None:
            hidden = self._linear(F.gelu(hidden), "connector.linear_2")
        return hidden if kind != "mlp_pool_after" else average_grid(hidden, self.pooled)


def average_grid(patches: torch.Tensor, pooled: Sequence[int]) -> torch.Tensor:
    """Average a square grid of patches (patches, width), row by row, to a grid of tokens (tokens, width)."""
    side = math.isqrt(len(patches))
    grid, (height, width) = patches.view(side, side, -1), pooled
    tokens = []
    for row in range(height):
        for column in range(width):
            rows = slice(row * side // height, -(-(row + 1) * side // height))
            columns = slice(column * side // width, -(-(column + 1) * side // width))
            tokens.append(grid[rows, columns].flatten(0, 1).mean(dim=0))
    return torch.stack(tokens)


def stream_loss(
    logits: torch.Tensor, ids: Sequence[int], labels: Sequence[int], frame_token_id: int, weight: float
) -> tuple[float, int]:
    """Return the sum of a dialogue's losses, those at frames times `weight`, and the number of its labels."""
    total, count = 0.0, 0
    for place, label in enumerate(labels[1:]):
        if label != -100:
            loss = float(logits[place].logsumexp(0) - logits[place, label])
            total, count = total + (weight if ids[place] == frame_token_id else 1.0) * loss, count + 1
    return total, count


def _hash(position: int, layer: int) -> float:
    """Mulvey's 32-bit mixer "lowbias32" of position and layer, in [0, 1)."""
    x = (position * 0x9E3779B1 + layer * 0x85EBCA6B) % 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return (x ^ x >> 15) / 2**32
