# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Draw event F1 against operations for the variants that README shows, from the tables of docs/evidence.md.

```bash
python docs/draw_quality.py docs/quality.png
```
"""

import argparse
import re
from pathlib import Path

from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import save_figure


PAGE = Path(__file__).parent / "evidence.md"
# Name of a variant in the tables, name in the picture, and color.
VARIANTS = {
    "full": ("full compute", "black"),
    "router_loss": ("learned, with the routers' own loss", "tab:green"),
    "learned": ("learned", "tab:blue"),
    "uniform": ("evenly spaced", "tab:orange"),
    "random": ("random", "tab:red"),
}
# Heading of the section that has the table of a world, and the world's title.
WORLDS = {"## What came out": "StreamWorld, hard", "## DoomWorld": "DoomWorld"}


def read_table(heading: str) -> dict[str, tuple[float, float, float, float]]:
    """
    Return operations in GFLOPs per clip, event F1, and the ends of its interval, by variant.

    Raises `ValueError` if the section has no such row for one of the variants.
    """
    section = PAGE.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    number = r"(\d+\.\d+)"
    row = re.compile(rf"^\| (\w+) \| \d+ \| {number} \| \d+ \| {number} \[{number}, {number}\]", re.MULTILINE)
    found = {match[1]: tuple(map(float, match.groups()[1:])) for match in row.finditer(section)}
    if missing := VARIANTS.keys() - found:
        raise ValueError(f"The section {heading!r} of {PAGE.name} has no row for {', '.join(sorted(missing))}.")
    return {name: found[name] for name in VARIANTS}


@one_line_errors()
def main() -> None:
    """Draw the picture."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description="Draw quality against operations for README.")
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    figure = Figure(figsize=(9, 3.4), dpi=110)
    for axes, (heading, title) in zip(figure.subplots(1, 2), WORLDS.items(), strict=True):
        rows = read_table(heading)
        most = max(cost for cost, *_ in rows.values())
        routed = [name for name in rows if name != "full"]
        for name, (cost, value, low, high) in rows.items():
            label, color = VARIANTS[name]
            # Variants of equal cost stand side by side, so that their intervals can be told apart.
            place = cost if name == "full" else cost + 0.03 * most * (routed.index(name) - (len(routed) - 1) / 2)
            axes.errorbar(
                [place], [value], [[value - low], [high - value]], fmt="o", capsize=3, color=color, label=label
            )
        axes.set(
            title=title, xlabel="GFLOPs per clip (equal costs side by side)", xlim=(0, 1.1 * most), ylim=(0, 0.16)
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("event F1, 95% intervals")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, ncol=len(VARIANTS), loc="lower center")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save_figure(figure, picture)


if __name__ == "__main__":
    main()
