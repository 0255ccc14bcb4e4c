# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
StreamWorld's pictures: things that a person recognises at a glance, and backgrounds.

```bash
python train/data/world/sprites.py sheet.png      # every thing in every color
```
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from videollm_mod.space.command_line import CommandLineParser


COLORS = {
    "red": (214, 48, 49),
    "orange": (243, 134, 48),
    "yellow": (246, 211, 57),
    "green": (52, 168, 83),
    "blue": (58, 110, 230),
    "purple": (148, 70, 190),
    "pink": (247, 143, 190),
    "white": (240, 240, 240),
}

# Strokes in a square from (-1, -1), top left, to (1, 1): (kind, fill, coordinates). The fill "main" is the color of
# the thing, "dark" and "light" are shades of it, and the others are fixed. Coordinates are the box of an ellipse, the
# corners of a polygon or the ends of a line. Lines and arcs also have a width.
SPRITES: dict[str, list[tuple]] = {
    "apple": [
        ("line", "ink", (0.0, -0.4, 0.15, -0.9), 0.14),
        ("ellipse", "main", (-0.85, -0.6, 0.15, 0.85)),
        ("ellipse", "main", (-0.15, -0.6, 0.85, 0.85)),
        ("ellipse", "light", (-0.6, -0.35, -0.3, 0.1)),
        ("ellipse", "leaf", (0.15, -0.95, 0.65, -0.65)),
    ],
    "ball": [
        ("ellipse", "main", (-0.85, -0.85, 0.85, 0.85)),
        ("line", "dark", (-0.8, 0.0, 0.8, 0.0), 0.1),
        ("arc", "dark", (-1.5, -0.9, -0.1, 0.9, -55, 55), 0.1),
        ("arc", "dark", (0.1, -0.9, 1.5, 0.9, 125, 235), 0.1),
        ("ellipse", "light", (-0.5, -0.6, -0.15, -0.3)),
    ],
    "bell": [
        ("ellipse", "ink", (-0.22, 0.5, 0.22, 0.95)),
        ("ellipse", "main", (-0.5, -0.8, 0.5, 0.2)),
        ("polygon", "main", (-0.5, -0.3, 0.5, -0.3, 0.6, 0.35, 0.85, 0.65, -0.85, 0.65, -0.6, 0.35)),
        ("line", "dark", (-0.85, 0.65, 0.85, 0.65), 0.14),
        ("ellipse", "dark", (-0.15, -0.98, 0.15, -0.7)),
    ],
    "bird": [
        ("polygon", "dark", (-0.5, 0.1, -1.0, -0.25, -0.95, 0.35)),
        ("ellipse", "main", (-0.7, -0.3, 0.5, 0.55)),
        ("ellipse", "main", (0.05, -0.7, 0.75, 0.0)),
        ("polygon", "beak", (0.7, -0.45, 1.0, -0.3, 0.68, -0.2)),
        ("ellipse", "ink", (0.4, -0.5, 0.54, -0.36)),
        ("polygon", "dark", (-0.35, 0.0, 0.2, 0.0, -0.35, 0.42)),
        ("line", "beak", (-0.15, 0.5, -0.15, 0.9), 0.08),
        ("line", "beak", (0.1, 0.5, 0.1, 0.9), 0.08),
    ],
    "boat": [
        ("line", "ink", (0.0, -0.95, 0.0, 0.4), 0.1),
        ("polygon", "light", (0.08, -0.9, 0.75, 0.2, 0.08, 0.2)),
        ("polygon", "light", (-0.08, -0.6, -0.08, 0.2, -0.6, 0.2)),
        ("polygon", "main", (-0.95, 0.35, 0.95, 0.35, 0.55, 0.85, -0.6, 0.85)),
    ],
    "book": [
        ("polygon", "dark", (-0.95, -0.6, 0.0, -0.4, 0.95, -0.6, 0.95, 0.75, 0.0, 0.9, -0.95, 0.75)),
        ("polygon", "page", (-0.85, -0.7, -0.04, -0.45, -0.04, 0.7, -0.85, 0.55)),
        ("polygon", "page", (0.85, -0.7, 0.04, -0.45, 0.04, 0.7, 0.85, 0.55)),
        ("polygon", "main", (-0.7, -0.4, -0.2, -0.25, -0.2, 0.35, -0.7, 0.25)),
        ("polygon", "main", (0.7, -0.4, 0.2, -0.25, 0.2, 0.35, 0.7, 0.25)),
    ],
    "box": [
        ("polygon", "main", (-0.8, -0.3, 0.3, -0.3, 0.3, 0.85, -0.8, 0.85)),
        ("polygon", "light", (-0.8, -0.3, -0.3, -0.8, 0.8, -0.8, 0.3, -0.3)),
        ("polygon", "dark", (0.3, -0.3, 0.8, -0.8, 0.8, 0.35, 0.3, 0.85)),
        ("line", "dark", (-0.25, -0.3, -0.25, 0.85), 0.12),
    ],
    "car": [
        ("polygon", "main", (-0.55, -0.1, -0.35, -0.55, 0.3, -0.55, 0.6, -0.1)),
        ("polygon", "main", (-0.98, -0.1, 0.98, -0.1, 0.98, 0.45, -0.98, 0.45)),
        ("polygon", "glass", (-0.4, -0.12, -0.27, -0.43, -0.05, -0.43, -0.05, -0.12)),
        ("polygon", "glass", (0.06, -0.12, 0.06, -0.43, 0.24, -0.43, 0.43, -0.12)),
        ("ellipse", "ink", (-0.75, 0.15, -0.2, 0.7)),
        ("ellipse", "ink", (0.2, 0.15, 0.75, 0.7)),
        ("ellipse", "page", (-0.57, 0.33, -0.38, 0.52)),
        ("ellipse", "page", (0.38, 0.33, 0.57, 0.52)),
    ],
    "cat": [
        ("polygon", "main", (-0.8, -0.95, -0.1, -0.5, -0.7, -0.05)),
        ("polygon", "main", (0.8, -0.95, 0.1, -0.5, 0.7, -0.05)),
        ("ellipse", "main", (-0.85, -0.65, 0.85, 0.8)),
        ("ellipse", "page", (-0.55, -0.2, -0.15, 0.2)),
        ("ellipse", "page", (0.15, -0.2, 0.55, 0.2)),
        ("ellipse", "ink", (-0.42, -0.15, -0.24, 0.15)),
        ("ellipse", "ink", (0.24, -0.15, 0.42, 0.15)),
        ("polygon", "ink", (-0.13, 0.28, 0.13, 0.28, 0.0, 0.43)),
        ("line", "ink", (-0.95, 0.25, -0.35, 0.38), 0.05),
        ("line", "ink", (0.95, 0.25, 0.35, 0.38), 0.05),
    ],
    "clock": [
        ("ellipse", "main", (-0.9, -0.9, 0.9, 0.9)),
        ("ellipse", "page", (-0.68, -0.68, 0.68, 0.68)),
        ("line", "ink", (0.0, 0.05, 0.0, -0.5), 0.12),
        ("line", "ink", (0.0, 0.0, 0.38, 0.2), 0.12),
    ],
    "cup": [
        ("arc", "main", (0.2, -0.4, 0.98, 0.4, -100, 100), 0.18),
        ("polygon", "main", (-0.85, -0.65, 0.55, -0.65, 0.4, 0.8, -0.7, 0.8)),
        ("ellipse", "dark", (-0.85, -0.85, 0.55, -0.45)),
        ("polygon", "light", (-0.65, -0.35, -0.45, -0.35, -0.42, 0.55, -0.55, 0.55)),
    ],
    "fish": [
        ("polygon", "dark", (0.4, 0.0, 0.98, -0.6, 0.98, 0.6)),
        ("polygon", "dark", (-0.3, -0.4, 0.25, -0.8, 0.3, -0.3)),
        ("ellipse", "main", (-0.98, -0.5, 0.6, 0.5)),
        ("ellipse", "page", (-0.75, -0.25, -0.45, 0.05)),
        ("ellipse", "ink", (-0.7, -0.18, -0.54, -0.02)),
        ("arc", "dark", (-0.6, -0.45, -0.1, 0.45, -60, 60), 0.08),
    ],
    "flower": [
        ("line", "leaf", (0.0, 0.0, 0.0, 0.98), 0.14),
        ("ellipse", "leaf", (0.0, 0.45, 0.55, 0.75)),
        ("ellipse", "main", (-0.3, -0.98, 0.3, -0.4)),
        ("ellipse", "main", (-0.3, -0.15, 0.3, 0.45)),
        ("ellipse", "main", (-0.72, -0.57, -0.1, 0.03)),
        ("ellipse", "main", (0.1, -0.57, 0.72, 0.03)),
        ("ellipse", "ink", (-0.23, -0.5, 0.23, -0.04)),
    ],
    "hat": [
        ("polygon", "main", (-0.5, -0.75, 0.5, -0.75, 0.58, 0.4, -0.58, 0.4)),
        ("polygon", "ink", (-0.55, 0.1, 0.55, 0.1, 0.58, 0.4, -0.58, 0.4)),
        ("ellipse", "main", (-0.98, 0.3, 0.98, 0.7)),
    ],
    "heart": [
        ("ellipse", "main", (-0.9, -0.8, 0.05, 0.15)),
        ("ellipse", "main", (-0.05, -0.8, 0.9, 0.15)),
        ("polygon", "main", (-0.83, -0.1, 0.83, -0.1, 0.0, 0.9)),
        ("polygon", "main", (-0.4, -0.4, 0.4, -0.4, 0.4, 0.1, -0.4, 0.1)),
        ("ellipse", "light", (-0.65, -0.6, -0.35, -0.25)),
    ],
    "house": [
        ("polygon", "page", (-0.7, -0.15, 0.7, -0.15, 0.7, 0.9, -0.7, 0.9)),
        ("polygon", "main", (-0.98, -0.1, 0.0, -0.95, 0.98, -0.1)),
        ("polygon", "main", (-0.2, 0.3, 0.2, 0.3, 0.2, 0.9, -0.2, 0.9)),
        ("polygon", "glass", (0.33, 0.1, 0.6, 0.1, 0.6, 0.4, 0.33, 0.4)),
        ("polygon", "glass", (-0.6, 0.1, -0.33, 0.1, -0.33, 0.4, -0.6, 0.4)),
    ],
    "key": [
        ("ellipse", "main", (-0.98, -0.45, -0.08, 0.45)),
        ("ellipse", "ink", (-0.74, -0.21, -0.32, 0.21)),
        ("line", "main", (-0.15, 0.0, 0.98, 0.0), 0.24),
        ("line", "main", (0.85, 0.0, 0.85, 0.45), 0.22),
        ("line", "main", (0.45, 0.0, 0.45, 0.35), 0.22),
    ],
    "moon": [
        ("moon", "main", (-0.85, -0.9, 0.95, 0.9)),
    ],
    "mushroom": [
        ("polygon", "page", (-0.28, 0.0, 0.28, 0.0, 0.36, 0.9, -0.36, 0.9)),
        ("pie", "main", (-0.95, -0.85, 0.95, 1.05, 180, 360)),
        ("ellipse", "page", (-0.6, -0.4, -0.25, -0.08)),
        ("ellipse", "page", (-0.12, -0.75, 0.2, -0.45)),
        ("ellipse", "page", (0.35, -0.4, 0.65, -0.12)),
    ],
    "rocket": [
        ("polygon", "dark", (-0.25, 0.3, -0.7, 0.85, -0.2, 0.65)),
        ("polygon", "dark", (0.25, 0.3, 0.7, 0.85, 0.2, 0.65)),
        ("polygon", "beak", (-0.18, 0.65, 0.18, 0.65, 0.0, 1.0)),
        ("polygon", "main", (0.0, -0.98, 0.3, -0.45, 0.32, 0.65, -0.32, 0.65, -0.3, -0.45)),
        ("ellipse", "glass", (-0.17, -0.35, 0.17, 0.0)),
    ],
    "star": [
        (
            "polygon",
            "main",
            (0, -0.98, 0.24, -0.3, 0.95, -0.28, 0.38, 0.14, 0.58, 0.83, 0, 0.42)
            + (-0.58, 0.83, -0.38, 0.14, -0.95, -0.28, -0.24, -0.3),
        ),
    ],
    "tree": [
        ("polygon", "wood", (-0.14, 0.3, 0.14, 0.3, 0.2, 0.98, -0.2, 0.98)),
        ("ellipse", "main", (-0.85, -0.45, 0.1, 0.45)),
        ("ellipse", "main", (-0.1, -0.45, 0.85, 0.45)),
        ("ellipse", "main", (-0.5, -0.95, 0.5, 0.1)),
    ],
    "umbrella": [
        ("line", "ink", (0.0, -0.9, 0.0, 0.75), 0.1),
        ("arc", "ink", (0.0, 0.5, 0.4, 0.95, 0, 180), 0.1),
        ("pie", "main", (-0.95, -0.8, 0.95, 1.0, 180, 360)),
        ("line", "dark", (0.0, -0.75, -0.35, 0.1), 0.06),
        ("line", "dark", (0.0, -0.75, 0.35, 0.1), 0.06),
    ],
}
THINGS = tuple(SPRITES)
# Shapes of clutter, which no dialogue mentions. They have the colors and the rim of things: only the shape differs.
SHAPES: dict[str, list[tuple]] = {
    "square": [("polygon", "main", (-0.8, -0.8, 0.8, -0.8, 0.8, 0.8, -0.8, 0.8))],
    "disc": [("ellipse", "main", (-0.9, -0.9, 0.9, 0.9))],
    "triangle": [("polygon", "main", (0.0, -0.85, 0.95, 0.75, -0.95, 0.75))],
    "wedge": [("polygon", "main", (0.0, 0.85, 0.95, -0.75, -0.95, -0.75))],
    "bar": [("polygon", "main", (-0.95, -0.35, 0.95, -0.35, 0.95, 0.35, -0.95, 0.35))],
    "post": [("polygon", "main", (-0.35, -0.95, 0.35, -0.95, 0.35, 0.95, -0.35, 0.95))],
}

_FIXED = {
    "ink": (38, 38, 46),
    "page": (250, 247, 236),
    "leaf": (70, 140, 60),
    "beak": (240, 150, 40),
    "glass": (168, 212, 238),
    "wood": (122, 84, 54),
}
_FINE = 4  # Sprites are drawn this many times larger and scaled down, for smooth edges.


@lru_cache(maxsize=4096)
def draw_sprite(thing: str, color: str, size: int) -> Image.Image:
    """
    Draw a thing or a shape of clutter on a transparent background.

    Args:
        thing (`str`): One of [`THINGS`] or [`SHAPES`].
        color (`str`): One of [`COLORS`].
        size (`int`): Width and height in pixels.
    """
    fine = _FINE * max(size, 16)
    picture = Image.new("RGBA", (fine, fine), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)

    def pixels(values: tuple[float, ...]) -> list[float]:
        return [(0.5 + 0.48 * value) * fine for value in values]

    for kind, fill, place, *width in SPRITES.get(thing) or SHAPES[thing]:
        ink = (*_shade(color, fill), 255)
        wide = max(1, round(0.48 * fine * width[0])) if width else 0
        if kind == "polygon":
            pen.polygon(pixels(place), ink)
        elif kind == "ellipse":
            pen.ellipse(pixels(place), ink)
        elif kind == "line":
            pen.line(pixels(place), ink, wide)
        elif kind == "arc":
            pen.arc(pixels(place[:4]), place[4], place[5], ink, wide)
        elif kind == "pie":
            pen.pieslice(pixels(place[:4]), place[4], place[5], ink)
        else:  # A moon is a disc with another disc cut out.
            pen.ellipse(pixels(place), ink)
            left, top, right, bottom = place
            pen.ellipse(pixels((left + 0.6, top - 0.2, right + 0.5, bottom - 0.25)), (0, 0, 0, 0))
    # A dark rim separates every color from every background.
    rim = Image.new("RGBA", picture.size, (*_FIXED["ink"], 255))
    rim.putalpha(picture.getchannel("A").filter(ImageFilter.MaxFilter(2 * (fine // 64) + 1)))
    return Image.alpha_composite(rim, picture).resize((size, size), Image.Resampling.LANCZOS)


def _shade(color: str, fill: str) -> tuple[int, int, int]:
    if fill in _FIXED:
        return _FIXED[fill]
    base = np.array(COLORS[color], dtype=float)
    if fill == "dark":
        base *= 0.68
    elif fill == "light":
        base += 0.55 * (255 - base)
    return tuple(int(value) for value in base)


class Ground:
    """
    A background: a gradient, stripes, checks or clouds in muted colors, still or drifting.

    Args:
        rng (`np.random.Generator`): Chooses the pattern, the colors and the drift.
        size (`int`): Width and height in pixels.
        moves (`bool`, *optional*, defaults to `False`): Whether it always drifts, and faster. Otherwise half of
            all grounds drift.
    """

    PATTERNS = ("gradient", "stripes", "checks", "clouds")

    def __init__(self, rng: np.random.Generator, size: int, *, moves: bool = False) -> None:
        self.size = size
        self.pattern = str(rng.choice(self.PATTERNS))
        gray = rng.uniform(60, 150)
        tint = rng.uniform(-18, 18, 3)
        contrast = rng.uniform(8, 26)
        self.colors = np.stack([gray + tint - contrast, gray + tint + contrast])
        self.angle = rng.uniform(0, np.pi)
        self.period = rng.uniform(0.12, 0.4)
        drifts = rng.random() < 0.5
        if moves:
            self.drift = rng.choice([-1.0, 1.0], 2) * rng.uniform(0.04, 0.1, 2)
        else:
            self.drift = rng.uniform(-0.08, 0.08, 2) if drifts else np.zeros(2)
        clouds = Image.fromarray(np.uint8(rng.uniform(0, 255, (6, 6)))).resize((size, size), Image.Resampling.BICUBIC)
        self.clouds = np.asarray(clouds, dtype=np.float32) / 255

    def draw(self, time: float) -> np.ndarray:
        """Draw the background at a time in seconds: float32 (size, size, 3)."""
        if self.pattern == "clouds":
            shift = tuple(np.round(self.drift * time * self.size).astype(int))
            share = np.roll(self.clouds, shift, axis=(0, 1))
        else:
            y, x = (np.mgrid[: self.size, : self.size] + 0.5) / self.size
            x, y = x + self.drift[0] * time, y + self.drift[1] * time
            along = np.cos(self.angle) * x + np.sin(self.angle) * y
            across = np.cos(self.angle) * y - np.sin(self.angle) * x
            if self.pattern == "gradient":
                share = 0.5 + 0.5 * np.sin(np.pi * (along - 0.5))
            elif self.pattern == "stripes":
                share = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * along / self.period))
            else:
                share = 0.5 + 0.5 * np.sign(
                    np.sin(2 * np.pi * along / self.period) * np.sin(2 * np.pi * across / self.period)
                )
        low, high = self.colors
        return (low + share[..., None] * (high - low)).astype(np.float32)


def main() -> None:
    """Draw every thing in every color."""
    parser = CommandLineParser(description="Draw every thing of StreamWorld in every color.")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--size", type=int, default=56, help="width and height of a thing in pixels")
    options = parser.parse_args()
    step = options.size + 8
    sheet = Image.new("RGB", (step * len(THINGS), step * len(COLORS)), (105, 110, 118))
    for column, thing in enumerate(THINGS):
        for row, color in enumerate(COLORS):
            sprite = draw_sprite(thing, color, options.size)
            sheet.paste(sprite, (column * step + 4, row * step + 4), sprite)
    sheet.save(options.out)


if __name__ == "__main__":
    main()
