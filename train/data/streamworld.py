# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
StreamWorld: a generated world of things that come, move, meet, change and go, of which everything is known.

A clip is decided by its seed. Things happen at multiples of half a second, when they can be seen to have happened: at
an event's time the thing that enters is wholly inside, the one that leaves is gone, the one that stops has stood still
for half a second. Who enters comes to rest within a second, which is not told; every other move begins with "starts
moving", where a world tells that, and ends with an event.

```bash
python train/data/streamworld.py out --split validation --num_clips 20     # mp4 and timed messages
```
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from videollm_mod.train.data.sprites import COLORS, THINGS, Ground, draw_sprite
from videollm_mod.train.data.timed_messages import NARRATE


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
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_WAYS = {"left": "to the left", "right": "to the right", "top": "up", "bottom": "down"}
STEP = 0.5  # Seconds: everything happens at a multiple of it.


@dataclass(frozen=True)
class World:
    """
    What clips may show.

    Args:
        things (`tuple[str, ...]`): Kinds of things.
        colors (`tuple[str, ...]`): Their colours.
        num_things (`tuple[int, int]`): Fewest and most that are seen at a time, at most 6.
        seconds (`tuple[float, float]`): Shortest and longest clip.
        gap (`float`): Mean seconds between the end of what one thing does and what happens next.
        unseen (`bool`): Only pairs of thing and colour that are kept out of training, or only the others.
        events (`tuple[str, ...]`): Kinds of events.
    """

    things: tuple[str, ...] = THINGS
    colors: tuple[str, ...] = tuple(COLORS)
    num_things: tuple[int, int] = (1, 4)
    seconds: tuple[float, float] = (10.0, 60.0)
    gap: float = 3.0
    unseen: bool = False
    events: tuple[str, ...] = EVENTS

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs (colour, thing) that may appear: one in ten of all is never trained on."""
        return [
            (color, thing)
            for color in self.colors
            for thing in self.things
            if ((THINGS.index(thing) + 3 * list(COLORS).index(color)) % 10 == 0) == self.unseen
        ]


WORLDS = {
    "full": World(),
    "small": World(
        things=("ball", "car", "cat", "fish", "house", "star", "tree", "umbrella"),
        num_things=(1, 2),
        seconds=(8.0, 14.0),
        gap=1.0,
    ),
    # For a few minutes of a CPU: as many pairs of thing and colour, and nobody moves but to come, to hide and to go.
    "tiny": World(
        things=("ball", "car", "cat", "fish", "house", "star", "tree", "umbrella"),
        num_things=(1, 2),
        seconds=(6.0, 10.0),
        gap=1.0,
        events=("enters", "leaves", "hides", "reappears", "recolors"),
    ),
    # Unseen pairs, more things, longer clips.
    "ood": World(num_things=(5, 6), seconds=(60.0, 180.0), unseen=True),
}
# First seed of each split, and the end of the last. A clip of one split is in no other.
SPLITS = {"train": 0, "validation": 1_000_000_000, "test": 1_100_000_000, "ood": 1_200_000_000}
_SEEDS_END = 1_300_000_000
# Clips of which a row of slides shows one frame each.
SLIDE_FRAMES = 12


@dataclass(frozen=True)
class Event:
    """
    What happens.

    Args:
        time (`float`): Second at which it can be seen to have happened.
        kind (`str`): One of [`EVENTS`].
        actor (`int`): Who does it, an index of the clip's actors.
        other (`int`, *optional*): To whom.
        text (`str`): The sentence that tells it.
    """

    time: float
    kind: str
    actor: int
    text: str
    other: int | None = None


@dataclass
class Actor:
    """One thing's life: values at key times, between which places and sizes go in straight lines."""

    thing: str
    places: list[tuple[float, float, float]] = field(default_factory=list)  # (second, x, y), in pictures
    scales: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 1.0)])
    colors: list[tuple[float, str]] = field(default_factory=list)
    begin: float = 0.0
    end: float = np.inf

    def place(self, time: float) -> tuple[float, float]:
        """Its centre at a time."""
        times, x, y = np.array(self.places).T
        return float(np.interp(time, times, x)), float(np.interp(time, times, y))

    def scale(self, time: float) -> float:
        """Its size at a time, relative to the size of things in this clip."""
        times, scales = np.array(self.scales).T
        return float(np.interp(time, times, scales))

    def color(self, time: float) -> str:
        """Its colour at a time."""
        return next(color for since, color in reversed(self.colors) if since <= time or since == self.colors[0][0])

    def name(self, time: float) -> str:
        """What it is called at a time, such as "red car"."""
        return f"{self.color(time)} {self.thing}"

    def exists(self, time: float) -> bool:
        """Whether it is on the scene, hidden or not."""
        return self.begin <= time < self.end


@dataclass(frozen=True)
class Clip:
    """
    A generated clip.

    Args:
        seed (`int`): Decides everything.
        seconds (`float`): Length.
        actors (`tuple[Actor, ...]`): The things, in order of appearance.
        events (`tuple[Event, ...]`): What happens, in order of time, never two things at once.
        size (`float`): Width of a thing of scale 1, in pictures.
        wall (`float`, *optional*): Where the middle of the wall is, if there is one.
        hidden (`tuple`): (actor, from, to) seconds behind the wall.
    """

    seed: int
    seconds: float
    actors: tuple[Actor, ...]
    events: tuple[Event, ...]
    size: float
    wall: float | None = None
    hidden: tuple[tuple[int, float, float], ...] = ()

    def visible(self, time: float) -> list[Actor]:
        """Things that can be seen at a time, from left to right."""
        behind = {actor for actor, since, until in self.hidden if since <= time < until}
        seen = [a for i, a in enumerate(self.actors) if a.exists(time) and i not in behind]
        return sorted(seen, key=lambda actor: actor.place(time))

    def behind_wall(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which of some points the wall covers: bool, of the shape of `x` and `y`, which are in pictures, 0 to 1."""
        if self.wall is None:
            return np.zeros(np.shape(x), dtype=bool)
        return (abs(x - self.wall) < _Story.WALL_WIDTH / 2) & (y > 1 - _Story.WALL_HEIGHT)

    def draw(self, time: float, size: int = 96) -> np.ndarray:
        """The picture at a time in seconds, uint8 (size, size, 3)."""
        return _Painter(self, size).draw(time)

    def play(self, *, fps: float = 2.0, size: int = 96) -> Iterator[np.ndarray]:
        """The pictures one after another, uint8 (size, size, 3), one in memory at a time."""
        painter = _Painter(self, size)
        for index in range(self.num_frames(fps)):
            yield painter.draw(index / fps)

    def frames(self, *, fps: float = 2.0, size: int = 96) -> np.ndarray:
        """All pictures, uint8 (frames, size, size, 3)."""
        return np.stack(list(self.play(fps=fps, size=size)))

    def num_frames(self, fps: float) -> int:
        """How many pictures there are at a frame rate."""
        return round(self.seconds * fps)

    def description(self, time: float) -> str:
        """What there is to see at a time."""
        seen = [f"{_article(actor.name(time))} {_where(actor.place(time))}" for actor in self.visible(time)]
        return _sentence(_list(seen) if seen else "nothing")

    def story(self) -> list[tuple[float, str]]:
        """What happens: (time in seconds, sentence), in order."""
        return [(event.time, event.text) for event in self.events]


# --------------------------------------------------------------------------------------------------- what happens


def make_clip(seed: int, world: World = WORLDS["full"]) -> Clip:
    """
    A clip, the same for the same seed and world.

    Args:
        seed (`int`): Decides everything.
        world ([`World`]): What may be seen and may happen.
    """
    return _Story(np.random.default_rng((seed, 0)), world).tell(seed)


class _Story:
    """Makes things happen one after another until the clip is full."""

    WALL_WIDTH, WALL_HEIGHT = 0.34, 0.42

    def __init__(self, rng: np.random.Generator, world: World) -> None:
        self.rng, self.world = rng, world
        self.seconds = STEP * round(rng.uniform(*world.seconds) / STEP)
        low, high = world.num_things
        self.most = int(rng.integers(low, high + 1))
        self.size = 0.3 if self.most <= 2 else 0.24 if self.most <= 4 else 0.19
        self.wall = float(rng.uniform(0.35, 0.65)) if "hides" in world.events and rng.random() < 0.3 else None
        self.actors: list[Actor] = []
        self.events: list[Event] = []
        self.hidden: list[tuple[int, float, float]] = []
        self.carries: dict[int, int] = {}
        self.retired: set[int] = set()
        self.time = 0.0

    def tell(self, seed: int) -> Clip:
        """The whole clip."""
        acts: list[tuple[float, Callable[[], bool]]] = [
            (4.0, self.enter),
            (1.5, self.leave),
            (2.0, self.move),
            (1.5, self.bump),
            (2.5, self.hide),
            (1.5, self.recolor),
            (0.7, self.grow),
            (0.7, self.shrink),
            (0.5, self.split),
            (1.2, self.pick_up),
            (2.5, self.put_down),
        ]
        weights = np.array([weight for weight, _ in acts])
        self.wait(0.7)
        while self.time < self.seconds - STEP:
            for index in self.rng.choice(len(acts), size=len(acts), replace=False, p=weights / weights.sum()):
                if acts[index][1]():
                    break
            self.wait(self.world.gap)
        events = tuple(event for event in self.events if event.time < self.seconds)
        return Clip(seed, self.seconds, tuple(self.actors), events, self.size, self.wall, tuple(self.hidden))

    # Helpers

    def wait(self, mean: float) -> None:
        """Goes on to a later half second, now and then after a long silence."""
        mean = 5 * mean if self.rng.random() < 0.1 else mean
        self.time += STEP * (1 + round(self.rng.exponential(mean) / STEP))

    def told(self, kind: str, actor: int, text: str, other: int | None = None, time: float | None = None) -> None:
        """Notes an event, now unless told otherwise."""
        self.events.append(Event(self.time if time is None else time, kind, actor, text, other))

    def allows(self, *kinds: str) -> bool:
        """Whether all these events may happen in this world."""
        return all(kind in self.world.events for kind in kinds)

    def present(self, *, free: bool = True) -> list[int]:
        """Things on the scene; `free` ones neither are carried nor carry nor have been split."""
        busy = self.retired | set(self.carries) | set(self.carries.values()) if free else set()
        return [i for i, actor in enumerate(self.actors) if actor.exists(self.time) and i not in busy]

    def pick(self, choices: list[Any]) -> Any:
        """One of them, or `None` of none."""
        return choices[int(self.rng.integers(len(choices)))] if choices else None

    def name(self, actor: int) -> str:
        """ "The red car", now."""
        return f"The {self.actors[actor].name(self.time)}"

    def reach(self, actor: int) -> float:
        """Half a thing's width."""
        return 0.5 * self.size * self.actors[actor].scale(self.time)

    def is_free(self, place: tuple[float, float], reach: float, *, but: tuple[int, ...] = ()) -> bool:
        """Whether a thing would stand here inside the picture, apart from all others and not behind the wall."""
        x, y = place
        if not (reach < x < 1 - reach and reach < y < 1 - reach):
            return False
        if (
            self.wall is not None
            and abs(x - self.wall) < self.WALL_WIDTH / 2 + reach
            and y > 1 - self.WALL_HEIGHT - reach
        ):
            return False
        return all(
            np.hypot(x - there[0], y - there[1]) > 1.1 * (reach + self.reach(i))
            for i in self.present(free=False)
            if i not in but
            for there in [self.actors[i].place(self.time)]
        )

    def free_place(self, reach: float, *, but: tuple[int, ...] = (), like: Callable[..., bool] | None = None) -> Any:
        """A random free place, or `None`."""
        for _ in range(40):
            place = tuple(float(v) for v in self.rng.uniform(reach, 1 - reach, 2))
            if (like is None or like(place)) and self.is_free(place, reach, but=but):
                return place
        return None

    def go(self, actor: int, begin: float, end: float, place: tuple[float, float]) -> None:
        """Moves a thing, and what it carries, in a straight line."""
        for index in (actor, self.carries.get(actor)):
            if index is None:
                continue
            x, y = self.actors[index].place(begin)
            if index != actor:
                place = (place[0], place[1] - self.reach(actor) - 0.8 * self.reach(index))
            self.actors[index].places += [(begin, x, y), (end, *place)]

    def passes_wall(self, here: tuple[float, float], place: tuple[float, float], reach: float) -> bool:
        """Whether something on its way would be seen to go behind the wall."""
        if self.wall is None:
            return False
        x, y = np.linspace(here, place, 12).T
        return bool(((abs(x - self.wall) < self.WALL_WIDTH / 2 + reach) & (y > 1 - self.WALL_HEIGHT - reach)).any())

    def set_off(self, actor: int, place: tuple[float, float], *, to_wall: bool = False) -> float | None:
        """Starts a move that takes as long as it is far, tells it, and returns when it arrives, at a half second."""
        here = self.actors[actor].place(self.time)
        dx, dy = place[0] - here[0], place[1] - here[1]
        far = float(np.hypot(dx, dy))
        if far < 0.25:
            return None
        if not to_wall and self.passes_wall(here, place, self.reach(actor)):
            return None
        side = ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("top" if dy < 0 else "bottom")
        if self.allows("starts"):
            self.told("starts", actor, f"{self.name(actor)} starts moving {_WAYS[side]}.")
        arrival = self.time + STEP * max(2, round(far / 0.25 / STEP))
        self.go(actor, self.time - 0.4, arrival, place)
        return arrival

    # What can happen. Each returns whether it did, and leaves the time at its last event.

    def enter(self) -> bool:
        pairs = self.world.pairs()
        present = self.present(free=False)
        taken = {self.actors[i].thing for i in present}
        names = {self.actors[i].name(self.time) for i in present}
        pairs = [pair for pair in pairs if pair[1] not in taken and " ".join(pair) not in names]
        reach = self.size / 2
        place = self.free_place(reach)
        if len(present) >= self.most or not pairs or place is None:
            return False
        color, thing = self.pick(pairs)
        side = self.pick(list(SIDES))
        edge, outside = _edge(place, side, reach)
        if self.passes_wall(edge, place, reach):
            return False
        actor = Actor(thing, colors=[(self.time, color)], begin=self.time - 0.4)
        actor.places = [(self.time - 0.4, *outside), (self.time, *edge), (self.time + 0.9, *place)]
        self.actors.append(actor)
        self.told(
            "enters", len(self.actors) - 1, f"{_sentence(_article(f'{color} {thing}'), '')} enters from the {side}."
        )
        self.time += STEP
        return True

    def leave(self) -> bool:
        actor = self.pick(self.present())
        if actor is None or not self.allows("leaves"):
            return False
        side, reach = self.pick(list(SIDES)), self.reach(actor)
        edge, outside = _edge(self.actors[actor].place(self.time), side, reach)
        arrival = self.set_off(actor, edge)
        if arrival is None:
            return False
        self.time = arrival + STEP
        self.go(actor, self.time - 0.4, self.time, outside)
        where = f"{'to' if side in ('left', 'right') else 'at'} the {side}"
        self.told("leaves", actor, f"{self.name(actor)} leaves {where}.")
        self.actors[actor].end = self.time
        return True

    def move(self) -> bool:
        actor = self.pick([i for i in self.present(free=False) if i not in self.retired | set(self.carries.values())])
        if actor is None or not self.allows("starts", "stops"):
            return False
        here, reach = self.actors[actor].place(self.time), self.reach(actor)
        place = self.free_place(reach, but=(actor, self.carries.get(actor, actor)))
        arrival = None if place is None else self.set_off(actor, place)
        if arrival is None:
            return False
        self.time = arrival
        if actor not in self.carries and self.allows("turns") and self.rng.random() < 0.35:
            half = tuple(float(v) for v in (np.array(here) + place) / 2)
            if self.is_free(half, reach, but=(actor,)) and self.allows("stops"):
                self.told("turns", actor, f"{self.name(actor)} turns around.")
                begin = self.time - 0.4
                self.actors[actor].places[-1] = (begin, *place)
                self.time += STEP * max(2, round(np.hypot(*(np.array(place) - half)) / 0.25 / STEP))
                self.go(actor, begin, self.time, half)
        self.time += STEP
        self.told("stops", actor, f"{self.name(actor)} stops.")
        return True

    def meet(self, gap: float) -> tuple[int, int, tuple[float, float]] | None:
        """Somebody, somebody else, and a free place beside the latter."""
        free = self.present()
        if len(free) < 2:
            return None
        first, second = (int(i) for i in self.rng.permutation(free)[:2])
        here, there = np.array(self.actors[first].place(self.time)), np.array(self.actors[second].place(self.time))
        away = here - there
        far = float(np.hypot(*away))
        beside = there + away / far * (gap * (self.reach(first) + self.reach(second)))
        place = (float(beside[0]), float(beside[1]))
        return (first, second, place) if self.is_free(place, self.reach(first), but=(first, second)) else None

    def bump(self) -> bool:
        met = self.meet(0.85) if self.allows("bumps") else None
        arrival = None if met is None else self.set_off(met[0], met[2])
        if met is None or arrival is None:
            return False
        self.time = arrival
        other = self.actors[met[1]].name(self.time)
        self.told("bumps", met[0], f"{self.name(met[0])} bumps into the {other}.", met[1])
        # Steps back a little, so that the two do not stay in touch.
        here, there = np.array(met[2]), np.array(self.actors[met[1]].place(self.time))
        back = here + 0.35 * (here - there)
        if self.is_free((float(back[0]), float(back[1])), self.reach(met[0]), but=met[:1]):
            self.go(met[0], self.time, self.time + 0.4, (float(back[0]), float(back[1])))
            self.time += STEP
        return True

    def hide(self) -> bool:
        fits = [i for i in self.present() if 2 * self.reach(i) < self.WALL_WIDTH - 0.02]
        actor = self.pick(fits) if self.wall is not None and self.allows("hides", "reappears") else None
        if actor is None:
            return False
        reach = self.reach(actor)
        behind = (float(self.wall), 1 - self.WALL_HEIGHT / 2)
        arrival = self.set_off(actor, behind, to_wall=True)
        if arrival is None:
            return False
        self.time = arrival
        self.told("hides", actor, f"{self.name(actor)} hides behind the wall.")
        since = self.time
        self.wait(2.0)
        self.time += STEP
        out = self.free_place(reach, but=(actor,), like=lambda p: p[1] > 1 - self.WALL_HEIGHT)
        out = self.free_place(reach, but=(actor,)) if out is None else out
        if out is None:
            # No room: it stays behind the wall for good.
            self.hidden.append((actor, since, np.inf))
            self.retired.add(actor)
            return True
        self.hidden.append((actor, since, self.time - 0.4))
        self.go(actor, self.time - 0.4, self.time, out)
        self.told("reappears", actor, f"{self.name(actor)} reappears.")
        return True

    def recolor(self) -> bool:
        actor = self.pick(self.present())
        if actor is None or not self.allows("recolors"):
            return False
        thing, now = self.actors[actor].thing, self.actors[actor].color(self.time)
        names = {self.actors[i].name(self.time) for i in self.present(free=False)}
        color = self.pick([c for c, t in self.world.pairs() if t == thing and c != now and f"{c} {t}" not in names])
        if color is None:
            return False
        self.told("recolors", actor, f"{self.name(actor)} turns {color}.")
        self.actors[actor].colors.append((self.time, color))
        return True

    def resize(self, kind: str, factor: float) -> bool:
        """Makes somebody larger or smaller."""
        actor = self.pick(self.present())
        if actor is None or not self.allows(kind):
            return False
        old = self.actors[actor].scale(self.time)
        reach = self.reach(actor) * factor
        if not 0.6 <= old * factor <= 1.5 or not self.is_free(
            self.actors[actor].place(self.time), reach, but=(actor,)
        ):
            return False
        self.actors[actor].scales += [(self.time - 0.3, old), (self.time, old * factor)]
        self.told(kind, actor, f"{self.name(actor)} {kind}.")
        return True

    def grow(self) -> bool:
        return self.resize("grows", 1.45)

    def shrink(self) -> bool:
        return self.resize("shrinks", 1 / 1.45)

    def split(self) -> bool:
        actor = self.pick(self.present())
        if actor is None or not self.allows("splits") or len(self.present(free=False)) >= self.most:
            return False
        x, y = self.actors[actor].place(self.time)
        apart, old = 0.75 * self.reach(actor), self.actors[actor].scale(self.time)
        if not self.is_free((x, y), 1.5 * self.reach(actor), but=(actor,)):
            return False
        self.told("splits", actor, f"{self.name(actor)} splits in two.")
        twin = Actor(self.actors[actor].thing, colors=[(self.time, self.actors[actor].color(self.time))])
        twin.begin = self.time - 0.3
        for side, half in ((-1, self.actors[actor]), (1, twin)):
            half.places += [(self.time - 0.3, x, y), (self.time, x + side * apart, y)]
            half.scales += [(self.time - 0.3, old), (self.time, 0.6 * old)]
        self.actors.append(twin)
        self.retired |= {actor, len(self.actors) - 1}
        return True

    def pick_up(self) -> bool:
        met = self.meet(1.0) if self.allows("picks_up", "puts_down") else None
        if met is None:
            return False
        carrier, cargo, place = met
        above = place[1] - self.reach(carrier) - 0.8 * self.reach(cargo)
        arrival = self.set_off(carrier, place) if above > self.reach(cargo) else None
        if arrival is None:
            return False
        self.time = arrival
        self.go(cargo, self.time - 0.4, self.time, (place[0], above))
        self.carries[carrier] = cargo
        text = f"{self.name(carrier)} picks up the {self.actors[cargo].name(self.time)}."
        self.told("picks_up", carrier, text, cargo)
        return True

    def put_down(self) -> bool:
        carrier = self.pick(list(self.carries))
        if carrier is None:
            return False
        cargo, here = self.carries[carrier], self.actors[carrier].place(self.time)
        near = 1.2 * (self.reach(carrier) + self.reach(cargo))
        for side in self.rng.permutation([-1.0, 1.0]):
            place = (here[0] + float(side) * near, here[1])
            if self.is_free(place, self.reach(cargo), but=(cargo, carrier)):
                del self.carries[carrier]
                self.go(cargo, self.time - 0.4, self.time, place)
                text = f"{self.name(carrier)} puts down the {self.actors[cargo].name(self.time)}."
                self.told("puts_down", carrier, text, cargo)
                return True
        return False


def _edge(place: tuple[float, float], side: str, reach: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a thing that goes straight to a side is just inside, and where just outside."""
    dx, dy = SIDES[side]
    inside, outside = 0.5 - reach, 0.5 + reach
    x, y = place
    at = [(0.5 + dx * far if dx else x, 0.5 + dy * far if dy else y) for far in (inside, outside)]
    return at[0], at[1]


# ------------------------------------------------------------------------------------------------------- pictures


class _Painter:
    """Draws one clip at one size."""

    def __init__(self, clip: Clip, size: int) -> None:
        rng = np.random.default_rng((clip.seed, 1))
        self.clip, self.size = clip, size
        self.ground = Ground(rng, size)
        self.noise, self.quality = rng.uniform(0, 5), int(rng.integers(55, 96))
        # Distractors: specks that drift and of which nobody speaks.
        self.specks = rng.uniform(0, 1, (int(rng.integers(0, 6)), 5))

    def draw(self, time: float) -> np.ndarray:
        """The picture at a time, uint8 (size, size, 3)."""
        clip, size = self.clip, self.size
        picture = Image.fromarray(np.clip(self.ground.draw(time), 0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for x, y, dx, dy, gray in self.specks:
            x, y = (size * ((x + 0.1 * (dx - 0.5) * time) % 1)), (size * ((y + 0.1 * (dy - 0.5) * time) % 1))
            reach = max(1.0, 0.012 * size)
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), (int(60 + 120 * gray),) * 3)
        for actor in clip.actors:
            if actor.exists(time):
                width = max(2, round(clip.size * actor.scale(time) * size))
                sprite = draw_sprite(actor.thing, actor.color(time), width)
                x, y = actor.place(time)
                picture.paste(sprite, (round(x * size - width / 2), round(y * size - width / 2)), sprite)
        if clip.wall is not None:
            self._wall(pen, clip.wall)
        noise = np.random.default_rng((clip.seed, round(time * 1000), 2)).normal(0, self.noise, (size, size, 1))
        noisy = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        packed = io.BytesIO()
        Image.fromarray(noisy).save(packed, "JPEG", quality=self.quality)
        return np.asarray(Image.open(packed).convert("RGB"))

    def _wall(self, pen: ImageDraw.ImageDraw, middle: float) -> None:
        size, width, height = self.size, _Story.WALL_WIDTH, _Story.WALL_HEIGHT
        left, top = round((middle - width / 2) * size), round((1 - height) * size)
        right, rows = round((middle + width / 2) * size), 6
        pen.rectangle((left, top, right, size), (128, 92, 78))
        for row in range(rows):
            y = top + row * (size - top) / rows
            pen.line((left, y, right, y), (170, 150, 138), max(1, size // 96))
            for brick in range(3):
                x = left + (brick + 0.5 * (row % 2)) * (right - left) / 2.5
                if x < right:
                    pen.line((x, y, x, y + (size - top) / rows), (170, 150, 138), max(1, size // 96))


def write_video(clip: Clip, path: Path, *, size: int = 256, fps: int = 24) -> Path:
    """Writes a clip as H.264 video, one picture in memory at a time; how strongly it is compressed varies."""
    return _write_pictures(clip.play(fps=fps, size=size), path, size=size, fps=fps, crf=20 + clip.seed % 9)


def _write_pictures(pictures: Iterable[np.ndarray], path: Path, *, size: int, fps: int, crf: int) -> Path:
    with av.open(str(path), "w") as container:
        # `is_streamworld` in space/loading.py reads it.
        container.metadata["comment"] = "StreamWorld"
        stream = container.add_stream("libx264", rate=fps)
        stream.height = stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


# ---------------------------------------------------------------------------------------------------------- words


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _sentence(text: str, stop: str = ".") -> str:
    return text[0].upper() + text[1:] + stop


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _where(place: tuple[float, float]) -> str:
    x, y = place[0] - 0.5, place[1] - 0.5
    if max(abs(x), abs(y)) < 0.17:
        return "in the middle"
    if abs(x) >= abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"


# ------------------------------------------------------------------------------------------------------ dialogues


DESCRIBE_ALL = "Describe every frame."
NUMBERS = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
KINDS = ("describe", "narrate", "ask", "wait")
QUESTIONS = ("present", "earlier", "count", "order", "comparison", "later")


@dataclass(frozen=True)
class Question:
    """
    A question and its answer.

    Args:
        kind (`str`): One of [`QUESTIONS`]: what the answer needs. "later" is asked before its answer can be seen.
        time (`float`): Second at which it is asked.
        text (`str`): The question.
        answer (`str`): The answer.
        answer_time (`float`): Second at which it is answered, `time` unless the kind is "later".
    """

    kind: str
    time: float
    text: str
    answer: str
    answer_time: float


def questions_at(clip: Clip, time: float) -> list[Question]:
    """All questions that make sense at a time, of all kinds, each with one right answer."""
    found: list[tuple[str, str, str, float]] = []
    seen = clip.visible(time)
    past = [event for event in clip.events if event.time <= time]
    things = [actor.thing for actor in clip.actors]
    names = [actor.name(time) for actor in seen]
    alone = [actor for actor in seen if names.count(actor.name(time)) == 1]

    found.append(("present", "What do you see?", clip.description(time), time))
    for actor in alone:
        found.append(("present", f"Where is the {actor.name(time)}?", _sentence(_where(actor.place(time))), time))
        if [a.thing for a in seen].count(actor.thing) == 1:
            found.append(("present", f"Which color is the {actor.thing}?", _sentence(actor.color(time)), time))
            if actor.color(time) != actor.colors[0][1]:
                question = f"Which color was the {actor.thing} at first?"
                found.append(("earlier", question, _sentence(actor.colors[0][1]), time))
    if past:
        found.append(("earlier", "What happened last?", past[-1].text, time))
        first = next(event for event in past if event.kind == "enters")
        name = clip.actors[first.actor].name(first.time)
        found.append(("earlier", "What entered first?", _sentence(_article(name)), time))
    found.append(("count", "How many things do you see?", f"{NUMBERS[len(seen)]}.", time))
    gone = sum(event.kind == "leaves" for event in past)
    if gone < len(NUMBERS):
        found.append(("count", "How many things have left?", f"{NUMBERS[gone]}.", time))
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            if things.count(one.thing) > 1 or things.count(other.thing) > 1:
                continue
            pair = f"the {one.thing} or the {other.thing}?"
            earlier = one if one.begin < other.begin else other
            found.append(("order", f"Which came first, {pair}", f"The {earlier.thing}.", time))
            if other.place(time)[0] - one.place(time)[0] > 0.15:
                found.append(("comparison", f"Which is further left, {pair}", f"The {one.thing}.", time))
            ratio = one.scale(time) / other.scale(time)
            if max(ratio, 1 / ratio) > 1.3:
                found.append(
                    ("comparison", f"Which is bigger, {pair}", f"The {(one if ratio > 1 else other).thing}.", time)
                )
    found += _later(clip, time)
    return [Question(kind, time, text, answer, when) for kind, text, answer, when in found]


def _later(clip: Clip, time: float) -> list[tuple[str, str, str, float]]:
    """Questions whose answer comes with the next event of a kind, or of a kind and an actor."""
    asks = {
        "enters": ("What comes next?", None),
        "leaves": ("Tell me when something leaves.", "Tell me when the {name} leaves."),
        "stops": ("Tell me when something stops.", "Tell me when the {name} stops."),
        "recolors": ("Tell me when something changes color.", "Which color will the {name} turn?"),
        "bumps": ("Tell me when things meet.", None),
        "reappears": (None, "Tell me when the {name} comes back."),
    }
    found, told = [], set()
    for event in clip.events:
        if event.time < time + 2 * STEP:
            if event.time > time:
                told |= {event.kind, (event.kind, event.actor)}
            continue
        actor = clip.actors[event.actor]
        anybody, somebody = asks.get(event.kind, (None, None))
        if anybody is not None and event.kind not in told:
            answer = _sentence(_article(actor.name(event.time))) if event.kind == "enters" else event.text
            found.append(("later", anybody, answer, event.time))
        known = actor.begin <= time and actor.name(time) == actor.name(event.time - 0.01)
        only = sum(a.exists(time) and a.name(time) == actor.name(time) for a in clip.actors) == 1
        if somebody is not None and known and only and (event.kind, event.actor) not in told:
            answer = _sentence(actor.color(event.time)) if event.kind == "recolors" else event.text
            found.append(("later", somebody.format(name=actor.name(time)), answer, event.time))
        told |= {event.kind, (event.kind, event.actor)}
    return found


def make_dialogue(clip: Clip, kind: str) -> tuple[list[dict[str, Any]], list[Question]]:
    """
    Timed messages of a clip, the same for the same clip and kind, and the questions among them.

    Args:
        clip ([`Clip`]): What is seen.
        kind (`str`): "narrate", in which every event is told, and now and then a question is asked; "ask", in which
            the model is silent but for its answers; "wait", in which it has been asked for something yet to come; or
            "describe", in which each frame at 2 fps is described.

    Returns:
        The messages and the questions; none of either if this clip gives this kind of dialogue nothing to say.
    """
    rng = np.random.default_rng((clip.seed, 3, KINDS.index(kind)))
    if kind == "describe":
        return describe([clip.description(index * STEP) for index in range(clip.num_frames(1 / STEP))]), []
    busy = {event.time for event in clip.events}
    quiet = [i * STEP for i in range(2, clip.num_frames(1 / STEP)) if i * STEP not in busy]
    messages: list[dict[str, Any]] = []
    questions: list[Question] = []
    if kind == "narrate":
        messages.append({"role": "user", "content": NARRATE, "time": 0.0})
        messages += [{"role": "assistant", "content": text, "time": time} for time, text in clip.story()]
        count = int(rng.random() < 0.3)
    else:
        count = int(rng.integers(1, 5)) if kind == "ask" else int(rng.integers(1, 3))
    until = 0.0
    for time in (
        sorted(float(t) for t in rng.choice(quiet, size=min(count, len(quiet)), replace=False)) if quiet else []
    ):
        # While something is awaited nothing else is asked: a question cancels the one before it.
        allowed = ("later",) if kind == "wait" else QUESTIONS[:-1]
        choices = [question for question in questions_at(clip, time) if question.kind in allowed]
        if not choices or time <= until:
            continue
        kinds = sorted({question.kind for question in choices})
        chosen = kinds[int(rng.integers(len(kinds)))]
        choices = [question for question in choices if question.kind == chosen]
        question = choices[int(rng.integers(len(choices)))]
        questions.append(question)
        messages.append({"role": "user", "content": question.text, "time": question.time})
        messages.append({"role": "assistant", "content": question.answer, "time": question.answer_time})
        until = question.answer_time
    if all(message["role"] == "user" for message in messages):
        return [], []  # Nothing happens, and nothing is asked: there is nothing to say.
    return sorted(messages, key=lambda message: message["time"]), questions


def describe(descriptions: list[str]) -> list[dict[str, Any]]:
    """Timed messages in which every frame at 2 fps is described."""
    messages = [{"role": "user", "content": DESCRIBE_ALL, "time": 0.0}]
    return messages + [
        {"role": "assistant", "content": text, "time": index * STEP} for index, text in enumerate(descriptions)
    ]


# ------------------------------------------------------------------------------------------------------- data set


def streamworld_dataset(
    split: str = "train",
    *,
    num_clips: int,
    first_clip: int = 0,
    kinds: dict[str, float] | None = None,
    world: World | None = None,
    size: int = 96,
    slide_frames: int = SLIDE_FRAMES,
) -> Dataset:
    """
    Clips that are made when they are read: rows `{"messages", "video", "kind", "seed"}`.

    Rows of kind "describe" are slides: frames of as many clips, since in a described video a thing could be copied
    from the description of the frame before, and seeing would hardly be taught.

    Args:
        split (`str`, *optional*, defaults to `"train"`): One of [`SPLITS`]; no two share a clip.
        num_clips (`int`): Number of rows.
        first_clip (`int`, *optional*, defaults to 0): Rows of the split to leave out.
        kinds (`dict[str, float]`, *optional*): Weight of each kind of dialogue (see [`make_dialogue`]); by default
            narration alone.
        world ([`World`], *optional*): What may be seen; by default all, and for "ood" what is never trained on.
        size (`int`, *optional*, defaults to 96): Width and height of the pictures.
        slide_frames (`int`, *optional*, defaults to 12): Frames of a row of kind "describe".

    Raises:
        `ValueError`: If the split or a kind is unknown, a weight is negative, or the split has too few clips.
    """
    if split not in SPLITS:
        raise ValueError(f"StreamWorld has no split {split!r}; it has {', '.join(SPLITS)}.")
    kinds = kinds or {"narrate": 1.0}
    if set(kinds) - set(KINDS) or min(kinds.values()) < 0 or sum(kinds.values()) <= 0:
        raise ValueError(f"`kinds` gives weights of at least 0 to some of {', '.join(KINDS)}, got {kinds}.")
    world = world or WORLDS["ood" if split == "ood" else "full"]
    ends = [*list(SPLITS.values())[1:], _SEEDS_END]
    begin, end = SPLITS[split], ends[list(SPLITS).index(split)]
    if not 0 <= begin + first_clip * slide_frames <= end - num_clips * slide_frames:
        raise ValueError(f"The split {split!r} has {(end - begin) // slide_frames} rows.")
    names, weights = list(kinds), np.array(list(kinds.values())) / sum(kinds.values())

    def row(seed: int) -> dict[str, Any]:
        kind = names[np.random.default_rng((seed, 4)).choice(len(names), p=weights)]
        if kind == "describe":
            slides = _slides(seed, world, slide_frames)
            messages = describe([clip.description(time) for clip, time in slides])
            video = np.stack([clip.draw(time, size) for clip, time in slides])
        else:
            clip = make_clip(seed, world)
            messages, _ = make_dialogue(clip, kind)
            if not messages:
                kind = "ask"
                messages, _ = make_dialogue(clip, kind)
            video = clip.frames(fps=1 / STEP, size=size)
        return {"messages": messages, "video": video, "kind": kind, "seed": seed}

    def make(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [row(seed) for seed in batch["seed"]]
        return {name: [one[name] for one in rows] for name in rows[0]}

    first = begin + first_clip * slide_frames
    seeds = range(first, first + num_clips * slide_frames, slide_frames)
    return Dataset.from_dict({"seed": seeds}).with_transform(make)


def _slides(seed: int, world: World, count: int) -> list[tuple[Clip, float]]:
    """Clips of as many seeds from one on, and of each the time of a frame."""
    clips = [make_clip(seed + index, world) for index in range(count)]
    return [(clip, float(np.random.default_rng((clip.seed, 5)).choice(_telling_times(clip)))) for clip in clips]


def _telling_times(clip: Clip) -> list[float]:
    """Times worth a description: when something has just happened, and others at which there is something to see."""
    times = [index * STEP for index in range(clip.num_frames(1 / STEP))]
    return [event.time for event in clip.events] + [t for t in times if clip.visible(t)] or times


def write_split(
    folder: Path,
    split: str,
    *,
    num_clips: int,
    world: World,
    size: int,
    fps: int,
    kinds: Sequence[str] = KINDS[1:],
) -> None:
    """
    Writes clips as video files, and their dialogues as JSON lines of timed messages, one of each kind a clip.

    A video that is there already is not written again, so that an interrupted run goes on where it was.

    Args:
        folder (`Path`): Where to; made if it is not there.
        split (`str`): One of [`SPLITS`].
        num_clips (`int`): Number of clips, and with "describe" of videos of slides (see [`streamworld_dataset`]).
        world ([`World`]): What may be seen.
        size (`int`): Width and height of the videos.
        fps (`int`): Their frames a second; slides have two.
        kinds (`Sequence[str]`, *optional*, defaults to all but "describe"): Some of [`KINDS`].
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def add(video: str, end: float, kind: str, seed: int, messages: list[Any], questions: list[Question]) -> None:
        row = {"video": video, "start": 0.0, "end": end, "messages": messages, "kind": kind, "seed": seed}
        row["questions"] = [{"kind": q.kind, "time": q.time} for q in questions]
        lines.append(json.dumps(row))

    for index in tqdm(range(num_clips), desc=split, unit="clip"):
        clip, name = make_clip(SPLITS[split] + index, world), f"videos/{split}-{index:06d}"
        dialogues = [(kind, *make_dialogue(clip, kind)) for kind in kinds if kind != "describe"]
        if dialogues:
            _write_once(folder / f"{name}.mp4", partial(write_video, clip, size=size, fps=fps))
        for kind, messages, questions in dialogues:
            if messages:
                add(f"{name}.mp4", clip.seconds, kind, clip.seed, messages, questions)
        if "describe" in kinds:
            slides = _slides(SPLITS[split] + index * SLIDE_FRAMES, world, SLIDE_FRAMES)
            pictures, seed = (shown.draw(time, size) for shown, time in slides), slides[0][0].seed
            write = partial(_write_pictures, pictures, size=size, fps=round(1 / STEP), crf=20 + seed % 9)
            _write_once(folder / f"{name}-slides.mp4", write)
            messages = describe([shown.description(time) for shown, time in slides])
            add(f"{name}-slides.mp4", SLIDE_FRAMES * STEP, "describe", seed, messages, [])
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a video that is not there yet; it has its name only when it is whole."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part.mp4")
        write(part)
        part.rename(path)


def write_sample(folder: Path, clip: Clip, world: str, *, size: int, fps: int, name: str = "streamworld") -> None:
    """
    Writes one clip, `<name>.mp4`, and what happens in it, `<name>.json`.

    Args:
        folder (`Path`): Where to; made if it is not there.
        clip ([`Clip`]): The clip.
        world (`str`): Name of its world, for the file.
        size (`int`): Width and height of the video.
        fps (`int`): Its frames a second.
        name (`str`, *optional*, defaults to `"streamworld"`): Name of both files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_video(clip, folder / f"{name}.mp4", size=size, fps=fps)
    story = {"seed": clip.seed, "world": world, "events": clip.story()}
    (folder / f"{name}.json").write_text(json.dumps(story, indent=1) + "\n", encoding="utf-8")


COMMAND = "python train/data/streamworld.py"
# For the card: what `questions` holds cannot be told from a split in which nothing is asked.
FEATURES = [
    {"name": "video", "dtype": "string"},
    {"name": "start", "dtype": "float64"},
    {"name": "end", "dtype": "float64"},
    {
        "name": "messages",
        "list": [
            {"name": "role", "dtype": "string"},
            {"name": "content", "dtype": "string"},
            {"name": "time", "dtype": "float64"},
        ],
    },
    {"name": "kind", "dtype": "string"},
    {"name": "seed", "dtype": "int64"},
    {"name": "questions", "list": [{"name": "kind", "dtype": "string"}, {"name": "time", "dtype": "float64"}]},
]
CARD = """
# StreamWorld

A generated world for streaming video models: {things} kinds of things in {colors} colors that enter, move, meet,
hide, change and go, before textured and moving grounds with distractors and compression noise. Of everything it is
known when it happens.

Each line of `<split>.jsonl` is a dialogue in timed messages (seconds since the video's beginning):

- `narrate`: every event is told when it can be seen, and now and then a question is asked;
- `ask`: silence, and questions about the present frame, an earlier one, a count, an order or a comparison;
- `wait`: questions whose answer is yet to come, so that the model must wait and speak when it happens;
- `describe`, where asked for: slides, each a frame of another clip, and each described.

No two splits share a clip; `ood` has pairs of thing and color that the others never have, more things and longer
clips. The events are {events}.

Made with these commands; the same seeds give the same clips. Pictures are drawn, not filmed: what is learned here says
nothing about natural video.

```bash
{commands}
```
"""


def write_card(folder: Path, split: str, options: str) -> None:
    """
    Writes the card of a folder of splits, `README.md`. The command that made another split stays in it.

    Args:
        folder (`Path`): Where the splits are.
        split (`str`): The one that was written last.
        options (`str`): The rest of the command that wrote it.
    """
    path, told = folder / "README.md", []
    if path.exists():
        told = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"{COMMAND} ")]
    commands = {line.split("--split ")[1].split()[0]: line for line in told}
    commands[split] = f"{COMMAND} {folder.resolve().name} --split {split} {options}"
    there = [name for name in SPLITS if (folder / f"{name}.jsonl").exists()]
    data = DatasetCardData(
        license="apache-2.0",
        language="en",
        pretty_name="StreamWorld",
        task_categories=["video-text-to-text"],
        tags=["video", "streaming", "synthetic"],
        dataset_info={"features": FEATURES},
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}.jsonl"} for name in there],
            }
        ],
    )
    words = {"things": len(THINGS), "colors": len(COLORS), "events": ", ".join(EVENTS)}
    words["commands"] = "\n".join(commands[name] for name in there if name in commands)
    DatasetCard(f"---\n{data}\n---\n{CARD.format(**words)}").save(path)


def main() -> None:
    """Writes a split."""
    parser = argparse.ArgumentParser(description="Writes StreamWorld as mp4 files and JSON lines of timed messages.")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num_clips", type=int, default=100)
    parser.add_argument("--clip", type=int, help="number of a clip, to write it and its story alone")
    parser.add_argument("--name", default="streamworld", help="name of the files of --clip")
    parser.add_argument("--world", choices=WORLDS, help="what may be seen; default: full, for ood: ood")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--fps", type=int, default=24, help="frames a second of the files, 2 to 30")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS[1:], help="kinds of dialogue; describe is of slides"
    )
    options = parser.parse_args()
    if not 2 <= options.fps <= 30:
        parser.error(f"--fps must be from 2 to 30, got {options.fps}")
    name = options.world or ("ood" if options.split == "ood" else "full")
    world, video = WORLDS[name], {"size": options.size, "fps": options.fps}
    if options.clip is not None:
        clip = make_clip(SPLITS[options.split] + options.clip, world)
        write_sample(options.folder, clip, name, **video, name=options.name)
        return
    write_split(options.folder, options.split, num_clips=options.num_clips, world=world, kinds=options.kinds, **video)
    given = f"--num_clips {options.num_clips} --world {name} --size {options.size} --fps {options.fps}"
    write_card(options.folder, options.split, f"{given} --kinds {' '.join(options.kinds)}")


if __name__ == "__main__":
    main()
