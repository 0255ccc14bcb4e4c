# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The arms of the ablation: what each changes in the model and in its training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


# Routing of every arm, unless it says otherwise. The routed layers come from the option `--insertion`.
ROUTED = {
    "mod_keep_ratio": 0.2,
    "mod_router": "learned",
    "mod_gate": "tanh",
    "mod_gate_on": "update",
    "mod_keep_last": True,
    "mod_normalize_scores": True,
    "mod_router_loss": None,
}


@dataclass(frozen=True)
class Arm:
    """
    What one arm changes.

    Args:
        about (`str`): What it is, for the table's legend.
        changes (`dict[str, Any]`): Fields of the configuration that differ from [`ROUTED`].
        ratios (`Callable[[int], list[float]]`, *optional*): Keep ratio of each layer, given their number. Such an arm
            ignores `--insertion`.
        router_rate (`float`): Learning rate of routers, relative to that of all other weights.
        warm_up (`float`): Share of the steps in which the keep ratio falls from 1.
        watching (`float`): Share of the steps in which routed layers keep all tokens but one.
        tokens (`str`): Tokens of a frame: `"all"`; `"fewer"`, pooled to a grid at which full compute costs as much as
            learned routing; or `"one"`, the maximum over all tokens.
        single_frames (`bool`): Whether the model sees each frame alone.
    """

    about: str
    changes: dict[str, Any] = field(default_factory=dict)
    ratios: Callable[[int], list[float]] | None = None
    router_rate: float = 1.0
    warm_up: float = 0.0
    watching: float = 0.0
    tokens: str = "all"
    single_frames: bool = False

    @property
    def takes_insertion(self) -> bool:
        """Whether the result depends on `--insertion`."""
        return self.tokens == "fewer" or (self.ratios is None and "mod_layers" not in self.changes)

    @property
    def own_fields(self) -> set[str]:
        """Names of the fields of the configuration that make this arm what it is."""
        own = set(self.changes) | ({"mod_keep_ratio", "mod_layers"} if self.ratios is not None else set())
        return own | ({"frame_token_pooled", "connector"} if self.tokens != "all" else set())

    def fields(self, num_layers: int, insertion: str) -> dict[str, Any]:
        """Return the fields of the configuration, for a number of layers and a choice of routed layers."""
        if self.ratios is None:
            return {**ROUTED, "mod_layers": insertion, **self.changes}
        return {**ROUTED, "mod_layers": None, **self.changes, "mod_keep_ratio": self.ratios(num_layers)}


def full(num_layers: int) -> list[float]:
    """Return the ratios of full compute."""
    return [1.0] * num_layers


def early_exit(num_layers: int) -> list[float]:
    """Return the paper's baseline in which frames leave the model after its first two layers."""
    return [1.0] * 2 + [0.0] * (num_layers - 2)


def last_token(num_layers: int) -> list[float]:
    """Return the ratios of EarlyExit, with one token of each frame in all layers."""
    return [1.0] * 2 + [1e-6] * (num_layers - 2)


def layer_skip(num_layers: int) -> list[float]:
    """Return the paper's baseline in which frames skip every second layer."""
    return [1.0 - layer % 2 for layer in range(num_layers)]


def decaying(num_layers: int) -> list[float]:
    """Return p-MoD's schedule: 0.5 + 0.5 cos(pi l / (L - 1)), at least 0.15, and 1 above 0.85 (arXiv 2412.04449)."""
    ratios = [0.5 + 0.5 * math.cos(math.pi * layer / max(num_layers - 1, 1)) for layer in range(num_layers)]
    return [1.0 if ratio > 0.85 else max(round(ratio, 4), 0.15) for ratio in ratios]


ARMS: dict[str, Arm] = {
    "full": Arm("every token in every layer", ratios=full),
    "learned": Arm("learned routers, keep ratio 0.2"),
    "uniform": Arm("evenly spaced tokens, keep ratio 0.2", {"mod_router": "uniform"}),
    "random": Arm("random tokens, keep ratio 0.2", {"mod_router": "random"}),
    "change": Arm("the tokens that changed most, keep ratio 0.2", {"mod_router": "change"}),
    "early_exit": Arm("frames leave after layer 2", ratios=early_exit),
    "last_token": Arm(
        "early_exit, but each frame's last token, which decides when to speak, stays",
        {"mod_router": "uniform"},
        ratios=last_token,
    ),
    "layer_skip": Arm("frames skip every second layer", ratios=layer_skip),
    "equal_flops": Arm("full compute on fewer tokens, at the cost of learned", ratios=full, tokens="fewer"),
    "pooled": Arm(
        "single frames: each alone, as one token, the maximum over its tokens",
        ratios=full,
        tokens="one",
        single_frames=True,
    ),
    "single_frames": Arm("full compute on each frame alone", ratios=full, single_frames=True),
    "one_token": Arm("full compute on one token a frame, the maximum over its tokens", ratios=full, tokens="one"),
    "p_mod": Arm("learned routers, p-MoD's decaying ratios", ratios=decaying),
    "learned_0.1": Arm("learned routers, keep ratio 0.1", {"mod_keep_ratio": 0.1}),
    "learned_0.3": Arm("learned routers, keep ratio 0.3", {"mod_keep_ratio": 0.3}),
    "learned_0.5": Arm("learned routers, keep ratio 0.5", {"mod_keep_ratio": 0.5}),
    "all": Arm("learned routers in all layers", {"mod_layers": "all"}),
    "all_deep": Arm("learned routers from layer 3 on", {"mod_layers": "all_deep"}),
    "interleaved": Arm("learned routers in every second layer", {"mod_layers": "interleaved"}),
    "interleaved_deep": Arm(
        "learned routers in every second layer from layer 4 on", {"mod_layers": "interleaved_deep"}
    ),
    "gate_linear": Arm("the paper's gate and scores", {"mod_gate": "linear", "mod_normalize_scores": False}),
    "gate_sigmoid": Arm("sigmoid gate", {"mod_gate": "sigmoid"}),
    "straight_through": Arm("no gate: the sigmoid's gradient, straight through", {"mod_gate": "straight_through"}),
    "authors_gate": Arm(
        "the authors' code: sigmoid of the raw score on the output",
        {"mod_gate": "sigmoid", "mod_gate_on": "output", "mod_normalize_scores": False, "mod_keep_last": False},
    ),
    "raw_scores": Arm("without normalised scores", {"mod_normalize_scores": False}),
    "free_last": Arm("without always keeping the last token", {"mod_keep_last": False}),
    "warm_up": Arm("the keep ratio falls from 1 in the first third", warm_up=1 / 3),
    "watching": Arm("routers watch for the first third: layers keep all tokens but one", watching=1 / 3),
    "router_loss": Arm("routers learn from the loss's gradient too", {"mod_router_loss": "gradient"}),
    "router_loss_0.1": Arm(
        "the same with a weight of 0.1", {"mod_router_loss": "gradient", "mod_router_loss_weight": 0.1}
    ),
    "router_loss_only": Arm(
        "routers learn from the loss's gradient only, no gate", {"mod_router_loss": "gradient", "mod_gate": "none"}
    ),
    "router_loss_watching": Arm(
        "the same as router_loss, after watching for the first third",
        {"mod_router_loss": "gradient"},
        watching=1 / 3,
    ),
    "router_rate_10": Arm("routers with ten times the learning rate", router_rate=10.0),
}
# The main comparison.
MAIN = ("full", "learned", "router_loss", "uniform", "random")
MAIN += ("early_exit", "last_token", "layer_skip", "equal_flops", "pooled")
