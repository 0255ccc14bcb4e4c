# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown, JSON and plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from videollm_mod.outputs import save_figure, write_json, write_text


class Point(NamedTuple):
    """One point of a plot with a panel for each number of tokens per frame and a line for each name."""

    tokens: int
    name: str
    x: float
    y: float


class Bar(NamedTuple):
    """One bar of a plot with a panel for each quantity, and in it a group of bars, one for each name."""

    quantity: str
    group: str
    name: str
    height: float


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    return "\n".join(map(markdown_row, (head, ["---"] * len(head), *rows)))


def markdown_row(cells: Sequence[Any]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def rate(value: float) -> str:
    """Format a rate: one decimal below 10, none above."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """Format a ratio with two decimals, or "-" if it was not measured."""
    return "-" if value is None else f"{value:.2f}"


def write_results(out: Path, name: str, figures: Any, text: str) -> None:
    """
    Write `name.json` and `name.md` into a folder.

    Benchmarks call this after each measurement, so that an interrupted run keeps what it has measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", figures)
    write_text(out / f"{name}.md", text)


def draw_panels(points: Sequence[Point], path: Path, x: str, y: str) -> None:
    """Draw points as lines, with a panel for each number of tokens per frame."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens = sorted({point.tokens for point in points})
    figure = Figure(figsize=(4.2 * len(tokens), 3.4), dpi=130)
    for axes, count in zip(figure.subplots(1, len(tokens), squeeze=False)[0], tokens, strict=True):
        for name in dict.fromkeys(point.name for point in points):
            line = [(point.x, point.y) for point in points if point.tokens == count and point.name == name]
            axes.plot(*zip(*line, strict=True), marker="o", label=name) if line else None
        axes.set(title=f"{count} tokens per frame", xlabel=x, ylabel=y, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend(fontsize=6, framealpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def draw_bars(bars: Sequence[Bar], path: Path) -> None:
    """Draw bars, with a panel for each quantity."""
    from matplotlib.figure import Figure

    quantities, groups, names = (list(dict.fromkeys(bar[column] for bar in bars)) for column in range(3))
    figure, width = Figure(figsize=(5.5 * len(quantities), 3.4), dpi=130), 0.8 / len(names)
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        for place, name in enumerate(names):
            own = {bar.group: bar.height for bar in bars if (bar.quantity, bar.name) == (quantity, name)}
            at = [groups.index(group) + width * (place - (len(names) - 1) / 2) for group in own]
            axes.bar(at, list(own.values()), width=0.93 * width, label=name)
        axes.set_xticks(range(len(groups)), groups, fontsize=8)
        axes.set(ylabel=quantity, ymargin=0.3)  # with room for the legend
        axes.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
