# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Make StreamWorld clips: decide from a seed which things appear and what happens to them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from videollm_mod.train.data.world.clip import (
    NEAR,
    STEP,
    WORLDS,
    Actor,
    Clip,
    Event,
    World,
    nearest,
    sentence,
    with_article,
)
from videollm_mod.train.data.world.clutter import make_clutter
from videollm_mod.train.data.world.drawing import WALL_HEIGHT, WALL_WIDTH


SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_WAYS = {"left": "to the left", "right": "to the right", "top": "up", "bottom": "down"}


def make_clip(seed: int, world: World = WORLDS["full"]) -> Clip:
    """
    Make a clip. The same seed and world always give the same clip.

    Args:
        seed (`int`): The seed.
        world ([`World`]): What may appear and happen.
    """
    return _Story(np.random.default_rng((seed, 0)), world).make(seed)


class _Story:
    """
    Lets things happen one after another until the clip is full.

    The order of the calls to the random generator decides every clip: do not change it.
    """

    def __init__(self, rng: np.random.Generator, world: World) -> None:
        self.rng, self.world = rng, world
        self.seconds = STEP * round(rng.uniform(*world.seconds) / STEP)
        low, high = world.num_things
        self.most = int(rng.integers(low, high + 1))
        if world.sizes is None:
            self.size = 0.3 if self.most <= 2 else 0.24 if self.most <= 4 else 0.19
        else:
            self.size = float(rng.uniform(*world.sizes))
        self.wall = float(rng.uniform(0.35, 0.65)) if "hides" in world.events and rng.random() < 0.3 else None
        self.actors: list[Actor] = []
        self.events: list[Event] = []
        self.hidden: list[tuple[int, float, float]] = []
        self.carries: dict[int, int] = {}
        self.retired: set[int] = set()
        self.time = 0.0

    def make(self, seed: int) -> Clip:
        """Make the complete clip."""
        happenings: list[tuple[float, Callable[[], bool]]] = [
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
        weights = np.array([weight for weight, _ in happenings])
        count = len(happenings)
        self.begin()
        self.wait(0.7)
        while self.time < self.seconds - STEP:
            for index in self.rng.choice(count, size=count, replace=False, p=weights / weights.sum()):
                if happenings[index][1]():
                    break
            self.wait(self.world.gap)
        events = tuple(event for event in self.events if event.time < self.seconds)
        return Clip(
            seed,
            self.seconds,
            tuple(self.actors),
            events,
            self.size,
            self.wall,
            tuple(self.hidden),
            make_clutter(seed, self.world, self.size),
            ground_moves=self.world.clutter is not None,
            relations=self.world.relations,
        )

    # Helpers

    def wait(self, mean: float) -> None:
        """Move on to a later half second. One wait in ten is five times as long on average."""
        mean = 5 * mean if self.rng.random() < 0.1 else mean
        self.time += STEP * (1 + round(self.rng.exponential(mean) / STEP))

    def add_event(self, kind: str, actor: int, text: str, other: int | None = None) -> None:
        """Add an event at the current time."""
        self.events.append(Event(self.time, kind, actor, text, other))

    def has_events(self, *kinds: str) -> bool:
        """Return whether this world has all these events."""
        return all(kind in self.world.events for kind in kinds)

    def present(self, *, free: bool = True) -> list[int]:
        """Return the things in the scene. `free` leaves out those that carry, are carried or have split."""
        busy = self.retired | set(self.carries) | set(self.carries.values()) if free else set()
        return [i for i, actor in enumerate(self.actors) if actor.exists(self.time) and i not in busy]

    def pick(self, choices: list[Any]) -> Any:
        """Return a random choice, or `None` if there are no choices."""
        return choices[int(self.rng.integers(len(choices)))] if choices else None

    def in_sight(self) -> list[Actor]:
        """Return the things in the scene that are not behind the wall."""
        behind = {actor for actor, since, until in self.hidden if since <= self.time < until}
        return [self.actors[i] for i in self.present(free=False) if i not in behind]

    def name(self, actor: int) -> str:
        """Return a thing's present name with its article, for example "The red car"."""
        return f"The {self.actors[actor].name(self.time)}"

    def reach(self, actor: int) -> float:
        """Return half a thing's width."""
        return 0.5 * self.size * self.actors[actor].scale(self.time)

    def touches_wall(self, x: Any, y: Any, reach: float) -> Any:
        """Return whether things of this reach would overlap the wall. Call it only if there is a wall."""
        return (abs(x - self.wall) < WALL_WIDTH / 2 + reach) & (y > 1 - WALL_HEIGHT - reach)

    def is_free(self, place: tuple[float, float], reach: float, *, ignoring: tuple[int, ...] = ()) -> bool:
        """Return whether a thing here would be inside the picture, apart from all others and clear of the wall."""
        x, y = place
        if not (reach < x < 1 - reach and reach < y < 1 - reach):
            return False
        if self.wall is not None and self.touches_wall(x, y, reach):
            return False
        return all(
            np.hypot(x - there[0], y - there[1]) > 1.1 * (reach + self.reach(i))
            for i in self.present(free=False)
            if i not in ignoring
            for there in [self.actors[i].place(self.time)]
        )

    def free_place(
        self, reach: float, *, ignoring: tuple[int, ...] = (), accept: Callable[..., bool] | None = None
    ) -> Any:
        """Return a random free place that `accept` accepts, or `None` if 40 tries find none."""
        for _ in range(40):
            place = tuple(float(v) for v in self.rng.uniform(reach, 1 - reach, 2))
            if (accept is None or accept(place)) and self.is_free(place, reach, ignoring=ignoring):
                return place
        return None

    def go(self, actor: int, begin: float, end: float, place: tuple[float, float]) -> None:
        """Move a thing, and what it carries, in a straight line."""
        for index in (actor, self.carries.get(actor)):
            if index is None:
                continue
            x, y = self.actors[index].place(begin)
            if index != actor:
                place = (place[0], place[1] - self.reach(actor) - 0.8 * self.reach(index))
            self.actors[index].places += [(begin, x, y), (end, *place)]

    def passes_wall(self, here: tuple[float, float], place: tuple[float, float], reach: float) -> bool:
        """Return whether the straight way between two places overlaps the wall."""
        if self.wall is None:
            return False
        x, y = np.linspace(here, place, 12).T
        return bool(self.touches_wall(x, y, reach).any())

    def set_off(self, actor: int, place: tuple[float, float], *, to_wall: bool = False) -> float | None:
        """
        Start a move, and add its event.

        Returns:
            `float` or `None`: The time of arrival, a multiple of half a second; `None` if the place is too near or
            behind the wall.
        """
        here = self.actors[actor].place(self.time)
        dx, dy = place[0] - here[0], place[1] - here[1]
        far = float(np.hypot(dx, dy))
        if far < 0.25:
            return None
        if not to_wall and self.passes_wall(here, place, self.reach(actor)):
            return None
        side = ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("top" if dy < 0 else "bottom")
        if self.has_events("starts"):
            self.add_event("starts", actor, f"{self.name(actor)} starts moving {_WAYS[side]}.")
        arrival = self.time + STEP * max(2, round(far / self.world.speed / STEP))
        self.go(actor, self.time - 0.4, arrival, place)
        return arrival

    def begin(self) -> None:
        """Place the things that are there at second 0."""
        for _ in range(self.world.at_start):
            place, taken = self.free_place(self.size / 2), {actor.thing for actor in self.actors}
            choice = self.pick([pair for pair in self.world.pairs() if pair[1] not in taken])
            if place is not None and choice is not None:
                color, thing = choice
                self.actors.append(Actor(thing, places=[(0.0, *place)], colors=[(0.0, color)]))

    def way_in(
        self, place: tuple[float, float] | None, reach: float
    ) -> tuple[tuple[float, float], str, Actor | None] | None:
        """
        Choose the side over which a thing of this reach comes to a place.

        Returns:
            `tuple` or `None`: The place, the side, and the thing in sight that is near the edge if sentences name it.
            `None` if the wall is in the way, or if it is not clear what is near.
        """
        if place is None:
            return None
        side = self.pick(list(SIDES))
        edge, _ = _edge(place, side, reach)
        if self.passes_wall(edge, place, reach):
            return None
        seen = self.in_sight() if self.world.relations else []
        if not seen:
            return place, side, None
        near = nearest(edge, seen, self.time)
        if near is None:
            return None
        # It must not enter on top of the other thing, either.
        far = np.hypot(*np.subtract(near.place(self.time), edge)) - reach
        return (place, side, near) if reach < far < NEAR - reach else None

    # One method per kind of event. It returns whether the event was possible, and sets the time to its last event.

    def enter(self) -> bool:
        """A new thing enters and comes to rest within a second. No event marks the rest."""
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
        way = self.way_in(place, reach)
        for _ in range(8 if self.world.relations else 0):
            way = way or self.way_in(self.free_place(reach), reach)
        if way is None:
            return False
        place, side, near = way
        edge, outside = _edge(place, side, reach)
        actor = Actor(thing, colors=[(self.time, color)], begin=self.time - 0.4)
        actor.places = [(self.time - 0.4, *outside), (self.time, *edge), (self.time + 0.9, *place)]
        self.actors.append(actor)
        text = f"{sentence(with_article(f'{color} {thing}'), '')} enters from the {side}"
        text += "." if near is None else f", near the {near.name(self.time)}."
        self.add_event("enters", len(self.actors) - 1, text)
        self.time += STEP
        return True

    def leave(self) -> bool:
        """A thing leaves over one side."""
        actor = self.pick(self.present())
        enough = len(self.present(free=False)) > self.world.at_start
        if actor is None or not enough or not self.has_events("leaves"):
            return False
        side, reach = self.pick(list(SIDES)), self.reach(actor)
        edge, outside = _edge(self.actors[actor].place(self.time), side, reach)
        arrival = self.set_off(actor, edge)
        if arrival is None:
            return False
        self.time = arrival + STEP
        self.go(actor, self.time - 0.4, self.time, outside)
        where = f"{'to' if side in ('left', 'right') else 'at'} the {side}"
        self.add_event("leaves", actor, f"{self.name(actor)} leaves {where}.")
        self.actors[actor].end = self.time
        return True

    def move(self) -> bool:
        """A thing, with what it carries, moves and stops. It may turn around on the way."""
        actor = self.pick([i for i in self.present(free=False) if i not in self.retired | set(self.carries.values())])
        if actor is None or not self.has_events("starts", "stops"):
            return False
        here, reach = self.actors[actor].place(self.time), self.reach(actor)
        place = self.free_place(reach, ignoring=(actor, self.carries.get(actor, actor)))
        arrival = None if place is None else self.set_off(actor, place)
        if arrival is None:
            return False
        self.time = arrival
        if actor not in self.carries and self.has_events("turns") and self.rng.random() < 0.35:
            half = tuple(float(v) for v in (np.array(here) + place) / 2)
            if self.is_free(half, reach, ignoring=(actor,)) and self.has_events("stops"):
                self.add_event("turns", actor, f"{self.name(actor)} turns around.")
                begin = self.time - 0.4
                self.actors[actor].places[-1] = (begin, *place)
                self.time += STEP * max(2, round(np.hypot(*(np.array(place) - half)) / self.world.speed / STEP))
                self.go(actor, begin, self.time, half)
        self.time += STEP
        self.add_event("stops", actor, f"{self.name(actor)} stops.")
        return True

    def meet(self, gap: float) -> tuple[int, int, tuple[float, float]] | None:
        """Choose a thing, another thing, and a free place beside the other one."""
        free = self.present()
        if len(free) < 2:
            return None
        first, second = (int(i) for i in self.rng.permutation(free)[:2])
        here, there = np.array(self.actors[first].place(self.time)), np.array(self.actors[second].place(self.time))
        away = here - there
        far = float(np.hypot(*away))
        beside = there + away / far * (gap * (self.reach(first) + self.reach(second)))
        place = (float(beside[0]), float(beside[1]))
        return (first, second, place) if self.is_free(place, self.reach(first), ignoring=(first, second)) else None

    def bump(self) -> bool:
        """A thing bumps into another thing and steps back if there is room."""
        met = self.meet(0.85) if self.has_events("bumps") else None
        arrival = None if met is None else self.set_off(met[0], met[2])
        if met is None or arrival is None:
            return False
        self.time = arrival
        other = self.actors[met[1]].name(self.time)
        self.add_event("bumps", met[0], f"{self.name(met[0])} bumps into the {other}.", met[1])
        # It steps back a little, so that the two do not keep touching.
        here, there = np.array(met[2]), np.array(self.actors[met[1]].place(self.time))
        back = here + 0.35 * (here - there)
        if self.is_free((float(back[0]), float(back[1])), self.reach(met[0]), ignoring=met[:1]):
            self.go(met[0], self.time, self.time + 0.4, (float(back[0]), float(back[1])))
            self.time += STEP
        return True

    def hide(self) -> bool:
        """A thing hides behind the wall and reappears if there is room."""
        fits = [i for i in self.present() if 2 * self.reach(i) < WALL_WIDTH - 0.02]
        actor = self.pick(fits) if self.wall is not None and self.has_events("hides", "reappears") else None
        if actor is None:
            return False
        reach = self.reach(actor)
        behind = (float(self.wall), 1 - WALL_HEIGHT / 2)
        arrival = self.set_off(actor, behind, to_wall=True)
        if arrival is None:
            return False
        self.time = arrival
        self.add_event("hides", actor, f"{self.name(actor)} hides behind the wall.")
        since = self.time
        self.wait(2.0)
        self.time += STEP
        out = self.free_place(reach, ignoring=(actor,), accept=lambda p: p[1] > 1 - WALL_HEIGHT)
        out = self.free_place(reach, ignoring=(actor,)) if out is None else out
        if out is None:
            # There is no room: it stays behind the wall for good.
            self.hidden.append((actor, since, np.inf))
            self.retired.add(actor)
            return True
        self.hidden.append((actor, since, self.time - 0.4))
        self.go(actor, self.time - 0.4, self.time, out)
        self.add_event("reappears", actor, f"{self.name(actor)} reappears.")
        return True

    def recolor(self) -> bool:
        """A thing changes its color."""
        actor = self.pick(self.present())
        if actor is None or not self.has_events("recolors"):
            return False
        thing, now = self.actors[actor].thing, self.actors[actor].color(self.time)
        names = {self.actors[i].name(self.time) for i in self.present(free=False)}
        color = self.pick([c for c, t in self.world.pairs() if t == thing and c != now and f"{c} {t}" not in names])
        if color is None:
            return False
        self.add_event("recolors", actor, f"{self.name(actor)} turns {color}.")
        self.actors[actor].colors.append((self.time, color))
        return True

    def resize(self, kind: str, factor: float) -> bool:
        """A thing grows or shrinks by a factor."""
        actor = self.pick(self.present())
        if actor is None or not self.has_events(kind):
            return False
        old = self.actors[actor].scale(self.time)
        reach = self.reach(actor) * factor
        if not 0.6 <= old * factor <= 1.5 or not self.is_free(
            self.actors[actor].place(self.time), reach, ignoring=(actor,)
        ):
            return False
        self.actors[actor].scales += [(self.time - 0.3, old), (self.time, old * factor)]
        self.add_event(kind, actor, f"{self.name(actor)} {kind}.")
        return True

    def grow(self) -> bool:
        """A thing grows."""
        return self.resize("grows", 1.45)

    def shrink(self) -> bool:
        """A thing shrinks."""
        return self.resize("shrinks", 1 / 1.45)

    def split(self) -> bool:
        """A thing splits into two halves, which do nothing more."""
        actor = self.pick(self.present())
        if actor is None or not self.has_events("splits") or len(self.present(free=False)) >= self.most:
            return False
        x, y = self.actors[actor].place(self.time)
        apart, old = 0.75 * self.reach(actor), self.actors[actor].scale(self.time)
        if not self.is_free((x, y), 1.5 * self.reach(actor), ignoring=(actor,)):
            return False
        self.add_event("splits", actor, f"{self.name(actor)} splits in two.")
        twin = Actor(self.actors[actor].thing, colors=[(self.time, self.actors[actor].color(self.time))])
        twin.begin = self.time - 0.3
        for side, half in ((-1, self.actors[actor]), (1, twin)):
            half.places += [(self.time - 0.3, x, y), (self.time, x + side * apart, y)]
            half.scales += [(self.time - 0.3, old), (self.time, 0.6 * old)]
        self.actors.append(twin)
        self.retired |= {actor, len(self.actors) - 1}
        return True

    def pick_up(self) -> bool:
        """A thing picks up another thing."""
        met = self.meet(1.0) if self.has_events("picks_up", "puts_down") else None
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
        self.add_event("picks_up", carrier, text, cargo)
        return True

    def put_down(self) -> bool:
        """A thing puts down what it carries."""
        carrier = self.pick(list(self.carries))
        if carrier is None:
            return False
        cargo, here = self.carries[carrier], self.actors[carrier].place(self.time)
        near = 1.2 * (self.reach(carrier) + self.reach(cargo))
        for side in self.rng.permutation([-1.0, 1.0]):
            place = (here[0] + float(side) * near, here[1])
            if self.is_free(place, self.reach(cargo), ignoring=(cargo, carrier)):
                del self.carries[carrier]
                self.go(cargo, self.time - 0.4, self.time, place)
                text = f"{self.name(carrier)} puts down the {self.actors[cargo].name(self.time)}."
                self.add_event("puts_down", carrier, text, cargo)
                return True
        return False


def _edge(place: tuple[float, float], side: str, reach: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the last place inside the picture and the first outside, on the straight way to a side."""
    dx, dy = SIDES[side]
    inside, outside = 0.5 - reach, 0.5 + reach
    x, y = place
    at = [(0.5 + dx * far if dx else x, 0.5 + dy * far if dy else y) for far in (inside, outside)]
    return at[0], at[1]
