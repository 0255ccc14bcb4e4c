# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of the ablation: quality against operations, and what routed layers keep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation_table import MEASURES, Variant, by_layer, estimate

from videollm_mod.outputs import save_figure


# Measures that are drawn, one row of panels each.
DRAWN = ("lm_correctness", "text_loss", "event_f1")


def draw_quality(worlds: Sequence[dict[str, Variant]], path: Path) -> None:
    """
    Draw quality against operations per clip, with 95% intervals and a column for each world.

    Variants of equal cost stand side by side, so that their intervals can be told apart.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(worlds), 3.6 * len(DRAWN)), dpi=130)
    panels = figure.subplots(len(DRAWN), len(worlds), squeeze=False)
    colors = _colors(worlds)
    for column, found in enumerate(worlds):
        for row, measure in enumerate(DRAWN):
            axes = panels[row][column]
            for name, flops in _places(found).items():
                if (value := estimate(found[name], measure)) is not None:
                    bars = [[max(value.value - value.low, 0)], [max(value.high - value.value, 0)]]
                    axes.errorbar([flops], [value.value], bars, fmt="o", capsize=3, color=colors[name], label=name)
            cost = "GFLOPs per clip, without the vision encoder\n(variants of equal cost stand side by side)"
            axes.set(xlabel=cost, ylabel=MEASURES[measure][0])
            axes.set_title(next(iter(found.values())).first["world"] if row == 0 else "")
            axes.grid(alpha=0.3)
        panels[0][column].legend(fontsize=7, framealpha=0.5)
    figure.tight_layout()
    save_figure(figure, path)


def _places(found: dict[str, Variant]) -> dict[str, float]:
    """Return where each variant stands, in GFLOPs per clip: beside its cost if others cost the same within 2%."""
    costs = {name: variant.first["clip_flops"] / 1e9 for name, variant in found.items()}
    step, places = 0.012 * max(costs.values()), {}
    for name, cost in costs.items():
        equal = [other for other in costs if abs(costs[other] - cost) < 0.02 * cost]
        places[name] = cost + step * (equal.index(name) - (len(equal) - 1) / 2)
    return places


def draw_kept(worlds: Sequence[dict[str, Variant]], path: Path) -> None:
    """Draw the share of tokens on things that each routed layer keeps, with a line at chance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure, colors = Figure(figsize=(5.2 * len(worlds), 3.6), dpi=130), _colors(worlds)
    for axes, found in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds, strict=True):
        routed = [variant for variant in found.values() if "kept_covered" in variant.first]
        for variant in routed:
            layers = [index + 1 for index in variant.first["router_layers"]]  # counted from 1, as on the page
            shares, color = by_layer(variant, "kept_covered"), colors[variant.name]
            axes.plot(layers, shares, marker="o", color=color, label=variant.name)
        for ratio in sorted({ratio for variant in routed for ratio in variant.first["chance"]}):
            axes.axhline(ratio, color="black", linestyle=":", linewidth=0.8)
        axes.set(xlabel="layer, from 1", ylabel="share of tokens on things kept", ylim=(0, 1))
        axes.set_title(next(iter(found.values())).first["world"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if routed:
            axes.legend(fontsize=7, framealpha=0.5)
    figure.tight_layout()
    save_figure(figure, path)


def _colors(worlds: Sequence[dict[str, Variant]]) -> dict[str, Any]:
    """Return one color for each variant of any world."""
    from matplotlib import colormaps

    names = dict.fromkeys(name for found in worlds for name in found)
    return dict(zip(names, colormaps["turbo"](np.linspace(0.05, 0.95, len(names))), strict=True))
