# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draw StreamWorld clips as pictures, and write them as video files."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image, ImageDraw

from videollm_mod.train.data.world.sprites import Ground, draw_sprite


if TYPE_CHECKING:
    from videollm_mod.train.data.world.clip import Actor, Clip


# The wall's size, as a fraction of the picture's. It stands on the lower edge.
WALL_WIDTH, WALL_HEIGHT = 0.34, 0.42
# FFmpeg's numbers for the colors of BT.601 and for limited range.
BT601, LIMITED = 6, 1


def place_sprite(clip: "Clip", actor: "Actor", time: float, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Return a thing's picture at a time, and the left and top pixel at which it lies in a picture of this size."""
    width = max(2, round(clip.size * actor.scale(time) * size))
    x, y = actor.place(time)
    corner = round(x * size - width / 2), round(y * size - width / 2)
    return draw_sprite(actor.thing, actor.color(time), width), corner


def wall_box(center: float, size: int) -> tuple[int, int, int]:
    """Return the left, top and right pixel of a wall in a picture of this size. All three belong to the wall."""
    left, right = (round((center + side * WALL_WIDTH / 2) * size) for side in (-1, 1))
    return left, round((1 - WALL_HEIGHT) * size), right


class Painter:
    """
    Draws one clip at one size.

    Args:
        clip ([`Clip`]): The clip.
        size (`int`): Width and height of the pictures in pixels.
    """

    def __init__(self, clip: "Clip", size: int) -> None:
        rng = np.random.default_rng((clip.seed, 1))
        self.clip, self.size = clip, size
        self.ground = Ground(rng, size, moves=clip.ground_moves)
        self.noise, self.quality = rng.uniform(0, 5), int(rng.integers(55, 96))
        # Distractors: drifting specks that no dialogue mentions.
        self.specks = rng.uniform(0, 1, (int(rng.integers(0, 6)), 5))

    def draw(self, time: float) -> np.ndarray:
        """Draw the picture at a time in seconds: uint8 (size, size, 3)."""
        picture = Image.fromarray(np.clip(self.ground.draw(time), 0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        self._draw_specks(pen, time)
        self._draw_clutter(picture, time)
        self._draw_things(picture, time)
        if self.clip.wall is not None:
            self._draw_wall(pen, self.clip.wall)
        return self._compress(self._add_noise(picture, time))

    def _draw_specks(self, pen: ImageDraw.ImageDraw, time: float) -> None:
        size = self.size
        for x, y, dx, dy, gray in self.specks:
            x, y = (size * ((x + 0.1 * (dx - 0.5) * time) % 1)), (size * ((y + 0.1 * (dy - 0.5) * time) % 1))
            reach = max(1.0, 0.012 * size)
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), (int(60 + 120 * gray),) * 3)

    def _draw_clutter(self, picture: Image.Image, time: float) -> None:
        for shape in self.clip.clutter:
            width = max(2, round(shape.width * self.size))
            sprite = draw_sprite(shape.shape, shape.color, width)
            picture.paste(sprite, tuple(round(v * self.size - width / 2) for v in shape.place(time)), sprite)

    def _draw_things(self, picture: Image.Image, time: float) -> None:
        for actor in self.clip.actors:
            if actor.exists(time):
                sprite, corner = place_sprite(self.clip, actor, time, self.size)
                picture.paste(sprite, corner, sprite)

    def _draw_wall(self, pen: ImageDraw.ImageDraw, center: float) -> None:
        size = self.size
        left, top, right = wall_box(center, size)
        rows = 6
        pen.rectangle((left, top, right, size), (128, 92, 78))
        for row in range(rows):
            y = top + row * (size - top) / rows
            pen.line((left, y, right, y), (170, 150, 138), max(1, size // 96))
            for brick in range(3):
                x = left + (brick + 0.5 * (row % 2)) * (right - left) / 2.5
                if x < right:
                    pen.line((x, y, x, y + (size - top) / rows), (170, 150, 138), max(1, size // 96))

    def _add_noise(self, picture: Image.Image, time: float) -> np.ndarray:
        rng = np.random.default_rng((self.clip.seed, round(time * 1000), 2))
        noise = rng.normal(0, self.noise, (self.size, self.size, 1))
        return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)

    def _compress(self, pixels: np.ndarray) -> np.ndarray:
        """Save the picture as JPEG and read it back."""
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "JPEG", quality=self.quality)
        return np.asarray(Image.open(packed).convert("RGB"))


def write_video(clip: "Clip", path: Path, *, size: int = 256, fps: int = 24) -> Path:
    """Write a clip as H.264 video, with one picture in memory at a time. The compression depends on the seed."""
    return write_pictures(clip.play(fps=fps, size=size), path, size=size, fps=fps, seed=clip.seed)


def write_pictures(pictures: Iterable[np.ndarray], path: Path, *, size: int, fps: int, seed: int) -> Path:
    """Write pictures as H.264 video (see [`open_video`])."""
    with open_video(path, size=size, fps=fps, seed=seed) as write:
        for picture in pictures:
            write(picture)
    return path


@contextmanager
def open_video(
    path: Path, *, size: int, fps: int, seed: int, world: str = "StreamWorld"
) -> Iterator[Callable[[np.ndarray], None]]:
    """
    Write H.264 video: the context is a function that appends a picture, uint8 (size, size, 3).

    Args:
        path (`Path`): The file.
        size (`int`): Width and height of the video.
        fps (`int`): Frame rate.
        seed (`int`): Sets how strongly the video is compressed: its CRF is from 20 to 28.
        world (`str`, *optional*, defaults to `"StreamWorld"`): Name of the world, for the comment of the file.
    """
    # The prefix keeps FFmpeg from taking a colon in a name for a protocol.
    with av.open(f"file:{path}", "w", format="mp4") as container:
        # `generated_world` in space/loading.py reads it.
        container.metadata["comment"] = world
        stream = container.add_stream("libx264", rate=fps)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        # FFmpeg converts colors by BT.601 in limited range. Players guess otherwise for large pictures.
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
        # The macroblock tree of x264 reads memory that it did not write: one video in four gets other bytes.
        stream.options = {"crf": str(20 + seed % 9), "x264-params": "mbtree=0"}
        yield lambda picture: container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
