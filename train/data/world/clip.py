# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What a StreamWorld clip is: the world that limits it, its things, its events, and its pictures.

Everything in a clip follows from its seed. Events happen at multiples of half a second, and always at the time at
which a viewer can see their result. For example, a thing "enters" when all of it is inside the picture, "leaves" when
nothing of it is left, and "stops" after it has stood still for half a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from videollm_mod.train.data.world.drawing import WALL_HEIGHT, WALL_WIDTH, Painter
from videollm_mod.train.data.world.masks import Patches
from videollm_mod.train.data.world.sprites import COLORS, THINGS


EVENTS = (
    "enters",
    "leaves",
    "starts",
    "stops",
    "turns",
    "bumps",
    "hides",
    "reappears",
    "recolors",
    "grows",
    "shrinks",
    "splits",
    "picks_up",
    "puts_down",
)
STEP = 0.5  # Seconds. All event times are multiples of it.
# The picture is 1 wide.
CLEARLY = 0.08  # Difference of distances that a viewer can see.
NEAR = 0.5  # Largest distance that a sentence calls near.


@dataclass(frozen=True)
class World:
    """
    The limits of what clips may show.

    Args:
        things (`tuple[str, ...]`): Kinds of things.
        colors (`tuple[str, ...]`): Colors of things.
        num_things (`tuple[int, int]`): Smallest and largest number of things in sight at once, at most 6.
        seconds (`tuple[float, float]`): Shortest and longest clip.
        gap (`float`): Mean seconds between the end of one event and the next event.
        unseen (`bool`): `True` shows only the pairs of thing and color that are held out of training; `False` shows
            only the others.
        events (`tuple[str, ...]`): Kinds of events.
        sizes (`tuple[float, float]`, *optional*): Smallest and largest width of things, as fractions of the picture's
            width. The default depends on the number of things.
        clutter (`tuple`, *optional*): Shapes that no dialogue mentions: smallest and largest number of still ones, and
            of drifting ones. With clutter, every ground moves.
        relations (`bool`): Whether narration and questions say what is near, and what is left of a thing.
        speed (`float`): Speed of things that move from place to place, in picture widths per second.
        at_start (`int`): Number of things in sight at second 0. A thing leaves only if as many stay.
    """

    things: tuple[str, ...] = THINGS
    colors: tuple[str, ...] = tuple(COLORS)
    num_things: tuple[int, int] = (1, 4)
    seconds: tuple[float, float] = (10.0, 60.0)
    gap: float = 3.0
    unseen: bool = False
    events: tuple[str, ...] = EVENTS
    sizes: tuple[float, float] | None = None
    clutter: tuple[tuple[int, int], tuple[int, int]] | None = None
    relations: bool = False
    speed: float = 0.25
    at_start: int = 0

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs (color, thing) that may appear. One pair in ten is held out of training."""
        return [
            (color, thing)
            for color in self.colors
            for thing in self.things
            if ((THINGS.index(thing) + 3 * list(COLORS).index(color)) % 10 == 0) == self.unseen
        ]


_EIGHT_THINGS = ("ball", "car", "cat", "fish", "house", "star", "tree", "umbrella")
WORLDS = {
    "full": World(),
    "small": World(things=_EIGHT_THINGS, num_things=(1, 2), seconds=(8.0, 14.0), gap=1.0),
    # A model learns this one in minutes on a CPU. Things move only to enter, to hide and to leave.
    "tiny": World(
        things=_EIGHT_THINGS,
        num_things=(1, 2),
        seconds=(6.0, 10.0),
        gap=1.0,
        events=("enters", "leaves", "hides", "reappears", "recolors"),
    ),
    # Small things among clutter: a model has to choose where to look.
    "hard": World(
        things=_EIGHT_THINGS,
        num_things=(3, 5),
        seconds=(6.0, 10.0),
        gap=0.1,
        events=("enters", "leaves", "bumps", "hides", "reappears", "recolors"),
        sizes=(0.13, 0.2),
        clutter=((8, 20), (2, 6)),
        relations=True,
        speed=0.4,
        at_start=2,
    ),
    # Held-out pairs, more things, longer clips.
    "ood": World(num_things=(5, 6), seconds=(60.0, 180.0), unseen=True),
}
# First seed of each split. A split ends where the next begins, so no two splits share a clip.
SPLITS = {"train": 0, "validation": 1_000_000_000, "test": 1_100_000_000, "ood": 1_200_000_000}
SEEDS_END = 1_300_000_000


@dataclass(frozen=True)
class Event:
    """
    One event.

    Args:
        time (`float`): Second at which its result can be seen.
        kind (`str`): One of [`EVENTS`].
        actor (`int`): Index of the acting thing in the clip's actors.
        text (`str`): The sentence that describes it.
        other (`int`, *optional*): Index of the thing that is acted on.
    """

    time: float
    kind: str
    actor: int
    text: str
    other: int | None = None


@dataclass
class Actor:
    """
    One thing and its state over time.

    Args:
        thing (`str`): Kind of thing.
        places (`list[tuple[float, float, float]]`): Key frames (second, x, y) of its center. The picture is 1 wide and
            1 high. Between key frames the thing moves in a straight line.
        scales (`list[tuple[float, float]]`): Key frames (second, scale), interpolated in the same way.
        colors (`list[tuple[float, str]]`): Times of color changes and the new colors.
        begin (`float`, *optional*, defaults to 0.0): Second at which it comes into being.
        end (`float`, *optional*): Second at which it is gone.
    """

    thing: str
    places: list[tuple[float, float, float]] = field(default_factory=list)
    scales: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 1.0)])
    colors: list[tuple[float, str]] = field(default_factory=list)
    begin: float = 0.0
    end: float = np.inf

    def place(self, time: float) -> tuple[float, float]:
        """Return its center at a time."""
        times, x, y = np.array(self.places).T
        return float(np.interp(time, times, x)), float(np.interp(time, times, y))

    def scale(self, time: float) -> float:
        """Return its size at a time, relative to the normal size of things in this clip."""
        times, scales = np.array(self.scales).T
        return float(np.interp(time, times, scales))

    def color(self, time: float) -> str:
        """Return its color at a time."""
        return next(color for since, color in reversed(self.colors) if since <= time or since == self.colors[0][0])

    def name(self, time: float) -> str:
        """Return its name at a time, for example "red car"."""
        return f"{self.color(time)} {self.thing}"

    def exists(self, time: float) -> bool:
        """Return whether it is in the scene at a time, in sight or hidden."""
        return self.begin <= time < self.end


@dataclass(frozen=True)
class Clutter:
    """
    A shape that no dialogue mentions.

    Args:
        shape (`str`): One of [`SHAPES`].
        color (`str`): One of [`COLORS`].
        width (`float`): Its width, as a fraction of the picture's.
        start (`tuple[float, float]`): x and y of its center at second 0. The picture is 1 wide and 1 high.
        drift (`tuple[float, float]`): Its movement per second. What drifts out comes back at the opposite side.
    """

    shape: str
    color: str
    width: float
    start: tuple[float, float]
    drift: tuple[float, float] = (0.0, 0.0)

    def place(self, time: float) -> tuple[float, float]:
        """Return its center at a time."""
        half = self.width / 2
        moved = np.array(self.start) + np.array(self.drift) * time
        x, y = (moved + half) % (1 + self.width) - half
        return float(x), float(y)


@dataclass(frozen=True)
class Clip:
    """
    A generated clip.

    Args:
        seed (`int`): The seed from which everything else follows.
        seconds (`float`): Length.
        actors (`tuple[Actor, ...]`): The things, in order of appearance.
        events (`tuple[Event, ...]`): The events in order of time. No two have the same time.
        size (`float`): Width of a thing of scale 1, as a fraction of the picture's width.
        wall (`float`, *optional*): Horizontal center of the wall, if there is a wall.
        hidden (`tuple`): Stays behind the wall: (actor, first second, last second).
        clutter (`tuple[Clutter, ...]`): Shapes that no dialogue mentions.
        ground_moves (`bool`): Whether the ground always moves. Otherwise half of all grounds move.
        relations (`bool`): Whether questions ask what is near, and what is left of a thing.
    """

    seed: int
    seconds: float
    actors: tuple[Actor, ...]
    events: tuple[Event, ...]
    size: float
    wall: float | None = None
    hidden: tuple[tuple[int, float, float], ...] = ()
    clutter: tuple[Clutter, ...] = ()
    ground_moves: bool = False
    relations: bool = False

    def visible(self, time: float) -> list[Actor]:
        """Return the things in sight at a time, from left to right."""
        behind = {actor for actor, since, until in self.hidden if since <= time < until}
        seen = [a for i, a in enumerate(self.actors) if a.exists(time) and i not in behind]
        return sorted(seen, key=lambda actor: actor.place(time))

    def behind_wall(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return which points the wall covers: bool, in the shape of `x` and `y`. Coordinates go from 0 to 1."""
        if self.wall is None:
            return np.zeros(np.shape(x), dtype=bool)
        return (abs(x - self.wall) < WALL_WIDTH / 2) & (y > 1 - WALL_HEIGHT)

    def coverage(self, time: float, grid: int = 8) -> np.ndarray:
        """
        Return how much of each patch the things in sight cover. Clutter and the wall count as nothing.

        Args:
            time (`float`): Second of the picture.
            grid (`int`, *optional*, defaults to 8): Number of patches per side.

        Returns:
            `np.ndarray` of shape `(grid * grid,)`: Shares of the patches' areas in float32, row by row.
        """
        return Patches(self, time, grid).coverage()

    def covered(self, time: float, grid: int = 8) -> np.ndarray:
        """
        Return which patches show a thing: at least a quarter of the patch is covered, or the patch shows at least a
        quarter of one thing.

        Args:
            time (`float`): Second of the picture.
            grid (`int`, *optional*, defaults to 8): Number of patches per side.

        Returns:
            `np.ndarray` of shape `(grid * grid,)`: bool, row by row.
        """
        return Patches(self, time, grid).covered()

    def draw(self, time: float, size: int = 96) -> np.ndarray:
        """Draw the picture at a time in seconds: uint8 (size, size, 3)."""
        return Painter(self, size).draw(time)

    def play(self, *, fps: float = 2.0, size: int = 96) -> Iterator[np.ndarray]:
        """Draw all pictures in order, uint8 (size, size, 3) each. Only one is in memory at a time."""
        painter = Painter(self, size)
        for index in range(self.num_frames(fps)):
            yield painter.draw(index / fps)

    def frames(self, *, fps: float = 2.0, size: int = 96) -> np.ndarray:
        """Draw all pictures: uint8 (frames, size, size, 3)."""
        return np.stack(list(self.play(fps=fps, size=size)))

    def num_frames(self, fps: float) -> int:
        """Return the number of pictures at a frame rate."""
        return round(self.seconds * fps)

    def description(self, time: float) -> str:
        """Describe the picture at a time, for example "A red car on the left and a blue cat in the middle."."""
        seen = [f"{with_article(actor.name(time))} {where(actor.place(time))}" for actor in self.visible(time)]
        return sentence(_join_names(seen) if seen else "nothing")

    def story(self) -> list[tuple[float, str]]:
        """Return the events as (time in seconds, sentence), in order of time."""
        return [(event.time, event.text) for event in self.events]


def with_article(name: str) -> str:
    """Put the indefinite article before a name: "red car" becomes "a red car"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def sentence(text: str, stop: str = ".") -> str:
    """Start a text with a capital letter and end it with a full stop."""
    return text[0].upper() + text[1:] + stop


def where(place: tuple[float, float]) -> str:
    """Say where in the picture a place is, for example "on the left"."""
    x, y = place[0] - 0.5, place[1] - 0.5
    if max(abs(x), abs(y)) < 0.17:
        return "in the middle"
    if abs(x) >= abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"


def nearest(place: tuple[float, float], things: list[Actor], time: float) -> Actor | None:
    """Return the thing in the nearest place at a time, or `None` if it is not [`CLEARLY`] nearer than all others."""
    if not things:
        return None
    far = [float(np.hypot(*np.subtract(thing.place(time), place))) for thing in things]
    first, *others = np.argsort(far)
    return things[first] if all(far[other] - far[first] > CLEARLY for other in others) else None


def next_left(actor: Actor, things: list[Actor], time: float) -> list[Actor] | None:
    """Return the next thing to the left at a time in a list, no thing if none is there, or `None` if it is unclear."""
    x = {id(thing): thing.place(time)[0] for thing in things}
    away = {i: x[id(actor)] - x[id(thing)] for i, thing in enumerate(things) if thing is not actor}
    if any(abs(far) < CLEARLY for far in away.values()):
        return None
    left = sorted((far, i) for i, far in away.items() if far > 0)
    if len(left) > 1 and left[1][0] - left[0][0] < CLEARLY:
        return None
    return [things[i] for _, i in left[:1]]


def _join_names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
