# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
A small generated world: coloured shapes that enter, change colour and leave, with what there is to say of them.

```bash
python train/data/shapes.py clip.mp4 --seed 1000003      # writes the clip and, in clip.json, what happens in it
```
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from datasets import Dataset


COLORS = {
    "red": (220, 50, 47),
    "green": (60, 170, 60),
    "blue": (50, 90, 220),
    "yellow": (230, 200, 50),
    "purple": (160, 60, 190),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle")
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
DATASETS = ("shapes_alignment", "shapes_narration", "shapes_mixed", "shapes_pairs")
FPS = 2
HELD_OUT = 1_000_000
NARRATE = "Please narrate the video in real time."
DESCRIBE = "What do you see?"
DESCRIBE_ALL = "Describe every frame."

_RADIUS = 0.17
# A shape is outside half a second before it enters and at the moment it has left; at a frame's time it is well inside.
_OUTSIDE, _INSIDE = 0.5 + _RADIUS + 0.01, 0.4
_STEP, _TRAVEL = 1 / FPS, 1.0


@dataclass(frozen=True)
class Shape:
    """One shape's life, in seconds and in pictures of width and height 1."""

    shape: str
    colors: tuple[str, ...]
    enters: float
    enters_from: str
    place: tuple[float, float]
    changes: float | None
    leaves: float | None
    leaves_to: str

    def color(self, time: float) -> str:
        """Name of its colour at a time."""
        return self.colors[1] if self.changes is not None and time >= self.changes else self.colors[0]

    def position(self, time: float) -> tuple[float, float] | None:
        """Its centre (x, y) at a time, or `None` while it is outside."""
        end = np.inf if self.leaves is None else self.leaves
        if not self.enters - _STEP < time < end:
            return None
        here = np.array(self.place)
        if time < self.enters + _TRAVEL:
            return _along(time - self.enters, np.array(SIDES[self.enters_from]), here)
        if time > end - _STEP - _TRAVEL:
            return _along(end - _STEP - time, np.array(SIDES[self.leaves_to]), here)
        return self.place


def _along(since: float, side: np.ndarray, place: np.ndarray) -> tuple[float, float]:
    """Between outside (`since` = -1 step), just inside (0) and its place (1 s), for a shape that came from `side`."""
    lane = 0.5 + (place - 0.5) * (side == 0)
    inside = lane + _INSIDE * side
    if since < 0:
        point = inside + (_OUTSIDE - _INSIDE) * side * min(1.0, -since / _STEP)
    else:
        point = inside + (place - inside) * min(1.0, since / _TRAVEL)
    return float(point[0]), float(point[1])


@dataclass(frozen=True)
class Clip:
    """A generated clip: its shapes, its length in frames at 2 fps, and the seed of its background."""

    seed: int
    num_frames: int
    shapes: tuple[Shape, ...]

    def draw(self, time: float, size: int = 64) -> np.ndarray:
        """The picture at a time in seconds, uint8 (size, size, 3), edges smoothed over a pixel."""
        rng = np.random.default_rng(self.seed)
        low, high = np.sort(rng.uniform(15, 70, 2))
        tint = rng.uniform(0.8, 1.0, 3)
        angle = rng.uniform(0, 2 * np.pi)
        y, x = (np.mgrid[:size, :size] + 0.5) / size
        slope = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) / 1.5 + 0.5
        picture = (low + (high - low) * slope)[..., None] * tint
        noise = np.random.default_rng((self.seed, round(time * 1000)))
        for shape in self.shapes:
            center = shape.position(time)
            if center is not None:
                alpha = np.clip(0.5 - size * _distance(shape.shape, x - center[0], y - center[1]), 0, 1)[..., None]
                picture = picture * (1 - alpha) + alpha * np.array(COLORS[shape.color(time)])
        picture = picture + noise.normal(0, 3, (size, size, 1))
        return np.clip(picture, 0, 255).astype(np.uint8)

    def frames(self, size: int = 64) -> np.ndarray:
        """All frames at 2 fps, uint8 (frames, size, size, 3)."""
        return np.stack([self.draw(index / FPS, size) for index in range(self.num_frames)])

    def events(self) -> list[tuple[float, str]]:
        """What happens: (time in seconds, sentence), in order."""
        events = []
        for shape in self.shapes:
            first = shape.colors[0]
            events.append((shape.enters, f"A {first} {shape.shape} enters from the {shape.enters_from}."))
            if shape.changes is not None:
                events.append((shape.changes, f"The {first} {shape.shape} turns {shape.colors[1]}."))
            if shape.leaves is not None:
                last = shape.color(shape.leaves)
                where = f"{'to' if shape.leaves_to in ('left', 'right') else 'at'} the {shape.leaves_to}"
                events.append((shape.leaves, f"The {last} {shape.shape} leaves {where}."))
        return sorted(events)

    def description(self, time: float) -> str:
        """What there is to see at a time."""
        seen = []
        # By kind, an order that one can see.
        for shape in sorted(self.shapes, key=lambda shape: SHAPES.index(shape.shape)):
            center = shape.position(time)
            if center is not None and max(abs(center[0] - 0.5), abs(center[1] - 0.5)) < 0.5:
                seen.append(f"a {shape.color(time)} {shape.shape} {_where(center)}")
        text = " and ".join(seen) if seen else "nothing"
        return text[0].upper() + text[1:] + "."


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of points from a shape's edge, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - _RADIUS
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.87 * _RADIUS
    # A triangle that points up, between its base and its two equal sides.
    return np.maximum((1.75 * abs(x) - 0.87 * (y + _RADIUS)) / 1.954, y - 0.75 * _RADIUS)


def _where(center: tuple[float, float]) -> str:
    x, y = center[0] - 0.5, center[1] - 0.5
    if max(abs(x), abs(y)) < 0.17:
        return "in the middle"
    if abs(x) >= abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"


def make_clip(seed: int, *, min_frames: int = 8, max_frames: int = 24, pair: bool = False) -> Clip:
    """
    A clip, the same for the same arguments: one or two shapes of different kinds, no two events at one frame.

    Args:
        seed (`int`): Decides everything.
        min_frames (`int`, *optional*, defaults to 8): Fewest frames at 2 fps.
        max_frames (`int`, *optional*, defaults to 24): Most frames.
        pair (`bool`, *optional*, defaults to `False`): Two shapes, of which otherwise about one clip in eight has two.
    """
    rng = np.random.default_rng(seed)
    num_frames = int(rng.integers(max(min_frames, 11) if pair else min_frames, max_frames + 1))
    while True:
        kinds = rng.permutation(SHAPES)[: 2 if pair else 1 + int(num_frames > 10 and rng.random() < 0.5)]
        shapes = tuple(_make_shape(rng, str(kind), num_frames) for kind in kinds)
        clip = Clip(seed, num_frames, shapes)
        times = [time for time, _ in clip.events()]
        apart = len(shapes) < 2 or np.abs(np.subtract(shapes[0].place, shapes[1].place)).max() > 0.3
        if len(set(times)) == len(times) and apart:
            return clip


def _make_shape(rng: np.random.Generator, shape: str, num_frames: int) -> Shape:
    colors = [str(color) for color in rng.permutation(list(COLORS))[:2]]
    enters = int(rng.integers(1, max(2, num_frames - 6)))
    leaves = int(rng.integers(enters + 6, num_frames)) if enters + 6 < num_frames and rng.random() < 0.7 else None
    last = (num_frames if leaves is None else leaves) - 2
    changes = int(rng.integers(enters + 2, last + 1)) if last >= enters + 2 and rng.random() < 0.6 else None
    place = rng.uniform(0.25, 0.75, 2)
    return Shape(
        shape=shape,
        colors=tuple(colors),
        enters=enters / FPS,
        enters_from=str(rng.choice(list(SIDES))),
        place=(float(place[0]), float(place[1])),
        changes=None if changes is None else changes / FPS,
        leaves=None if leaves is None else leaves / FPS,
        leaves_to=str(rng.choice(list(SIDES))),
    )


@dataclass(frozen=True)
class Slides:
    """
    Frames that have nothing to do with each other, each of a clip of its own. In a described video the kind and
    colour of a shape could be copied from the description of the frame before, and seeing would hardly be taught.
    """

    clips: tuple[Clip, ...]
    times: tuple[float, ...]

    def frames(self, size: int = 64) -> np.ndarray:
        """All frames, uint8 (frames, size, size, 3)."""
        return np.stack([clip.draw(time, size) for clip, time in zip(self.clips, self.times, strict=True)])


def make_slides(seed: int, *, num_frames: int = 12, pair: bool = False) -> Slides:
    """Frames of different clips, none of them held out, the same for the same seed; often something just enters."""
    rng = np.random.default_rng((seed, 2))
    clips = tuple(make_clip((seed * num_frames + index) % HELD_OUT, pair=pair) for index in range(num_frames))
    times = []
    for clip in clips:
        chance = rng.random()
        every = [index / FPS for index in range(clip.num_frames)]
        if chance < 0.3:
            times.append(float(rng.choice([shape.enters for shape in clip.shapes])))
        elif chance < 0.9:
            times.append(float(rng.choice([time for time in every if clip.description(time) != "Nothing."])))
        else:
            times.append(float(rng.choice(every)))
    return Slides(clips, tuple(times))


def alignment_messages(slides: Slides) -> list[dict[str, Any]]:
    """Timed messages in which every frame is described: what teaches a model from scratch to see."""
    messages = [{"role": "user", "content": DESCRIBE_ALL, "time": 0.0}]
    for index, (clip, time) in enumerate(zip(slides.clips, slides.times, strict=True)):
        messages.append({"role": "assistant", "content": clip.description(time), "time": index / FPS})
    return messages


def narration_messages(clip: Clip) -> list[dict[str, Any]]:
    """Timed messages in which events are narrated when they happen, and now and then a question is asked as well."""
    messages = [{"role": "user", "content": NARRATE, "time": 0.0}]
    messages += [{"role": "assistant", "content": text, "time": time} for time, text in clip.events()]
    rng = np.random.default_rng((clip.seed, 1))
    if rng.random() < 0.3:
        time = int(rng.integers(1, clip.num_frames)) / FPS
        messages.append({"role": "user", "content": DESCRIBE, "time": time})
        messages.append({"role": "assistant", "content": clip.description(time), "time": time})
    return sorted(messages, key=lambda message: message["time"])


def write_video(clip: Clip, path: Path, *, size: int = 256, fps: int = 24) -> Path:
    """Writes a clip as H.264 video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23"}
        for index in range(round(clip.num_frames / FPS * fps)):
            frame = av.VideoFrame.from_ndarray(clip.draw(index / fps, size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shapes_dataset(name: str, *, num_clips: int, first_seed: int = 0) -> Dataset:
    """
    Clips that are drawn when they are read: rows `{"messages": ..., "video": uint8 (frames, 64, 64, 3)}`.

    Args:
        name (`str`): `"shapes_alignment"`, `"shapes_narration"`, `"shapes_mixed"`, in which the two alternate, or
            `"shapes_pairs"`, in which they do and two thirds of all clips have two shapes.
        num_clips (`int`): Number of clips.
        first_seed (`int`, *optional*, defaults to 0): Seed of the first; seeds from `HELD_OUT` on are for evaluation.

    Raises:
        `ValueError`: If the name is unknown or held-out seeds would be trained on.
    """
    if name not in DATASETS:
        raise ValueError(f"There is no generated data set {name!r}; known are {', '.join(DATASETS)}.")
    if first_seed + num_clips > HELD_OUT:
        raise ValueError(f"Seeds from {HELD_OUT} on are held out; asked for seeds to {first_seed + num_clips - 1}.")

    def row(seed: int) -> tuple[list[dict[str, Any]], np.ndarray]:
        pair = name == "shapes_pairs" and bool(seed % 3)
        if name == "shapes_alignment" or (name in ("shapes_mixed", "shapes_pairs") and seed % 2):
            slides = make_slides(seed, pair=pair)
            return alignment_messages(slides), slides.frames()
        clip = make_clip(seed, pair=pair)
        return narration_messages(clip), clip.frames()

    def draw(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        messages, videos = zip(*map(row, batch["seed"]), strict=True)
        return {"messages": list(messages), "video": list(videos)}

    return Dataset.from_dict({"seed": range(first_seed, first_seed + num_clips)}).with_transform(draw)


def main() -> None:
    """Writes one clip as video and its events beside it."""
    parser = argparse.ArgumentParser(description="Writes a generated clip as video, and what happens in it as JSON.")
    parser.add_argument("path", type=Path, help="video file to write")
    parser.add_argument("--seed", type=int, default=HELD_OUT, help=f"seeds from {HELD_OUT} on are never trained on")
    options = parser.parse_args()
    clip = make_clip(options.seed)
    write_video(clip, options.path)
    story = json.dumps({"seed": clip.seed, "events": clip.events()}, indent=1)
    options.path.with_suffix(".json").write_text(story + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
