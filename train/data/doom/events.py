# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
DoomWorld's events: what happens between the frames of a clip, and the sentences that tell it.

- A monster comes into view at the second frame in a row that shows it, if no frame of the two seconds before showed
  it. The same holds for other things, but things of one kind count as one.
- A frame tells one event. If two happen at once, the one that comes later in [`EVENTS`] waits for at most two frames,
  and is left out if those are taken too.
- Being hurt, hitting the same monster and picking up things of one kind is told again only after two seconds.
"""

import math
from dataclasses import dataclass
from typing import Any

from videollm_mod.train.data.doom.game import FPS, Moment, Sight
from videollm_mod.train.data.doom.things import ITEM_NAMES, MONSTER_NAMES, MONSTERS, WEAPONS, name_of, side_of
from videollm_mod.train.data.timed_messages import NARRATE


EVENTS = ("hurt", "picks_up", "dies", "explodes", "opens", "changes_weapon", "comes_into_view", "is_hit")
# Requests to narrate, and the wording that each asks for.
WORDINGS = {
    "plain": NARRATE,
    "brief": "Please narrate the video in a few words.",
    "player": "Please narrate the video as the player.",
}
_AGAIN = 2  # Seconds.
_LATE = 2  # Frames that an event may wait.
# Points of health that the player loses between two of 4 frames a second. The game shows less hardly, or briefly.
_PAIN = 8
# Map units within which the player picks things up. It moves up to 70 of them between two of 4 frames a second.
_REACH = 100.0


@dataclass(frozen=True)
class Event:
    """
    One event.

    Args:
        time (`float`): Second of the frame that first shows its result.
        kind (`str`): One of [`EVENTS`].
        thing (`str`, *optional*): Kind of the thing that it happens to, or name of the new weapon.
        count (`int`, *optional*, defaults to 1): Number of things that come into view together.
        side (`str`, *optional*): Where a thing comes into view.
        near (`bool`, *optional*): Whether a monster that comes into view is near, in the vocabulary "full".
    """

    time: float
    kind: str
    thing: str = ""
    count: int = 1
    side: str = ""
    near: bool | None = None

    @property
    def text(self) -> str:
        """The sentence that tells it."""
        return tell(self)


def tell(event: Event, wording: str = "plain") -> str:
    """Return the sentence that tells an event, in one of [`WORDINGS`]."""
    name, far = name_of(event.thing, event.count) if event.thing else "", ""
    if event.near is not None:
        far = ", near" if event.near else ", far"
    place = f"{event.side}{far}"
    short = place.removeprefix("on the ")
    come = "comes" if event.count == 1 else "come"
    bare = event.thing if event.count == 1 else name
    plain, brief, player = {
        "hurt": ("The player is hurt", "Hurt", "I am hurt"),
        "picks_up": (f"{name} is picked up", f"{event.thing} picked up", f"I pick up {name}"),
        "dies": (f"{name} dies", f"{event.thing} dead", f"I see {name} die"),
        "explodes": (f"{name} explodes", "explosion", f"I see {name} explode"),
        "opens": ("A door opens", "Door open", "I see a door open"),
        "changes_weapon": (f"The weapon is now the {event.thing}", event.thing, f"I take the {event.thing}"),
        "comes_into_view": (f"{name} {come} into view {place}", f"{bare} {short}", f"I see {name} {place}"),
        "is_hit": (f"{name} is hit", f"{event.thing} hit", f"I hit {name}"),
    }[event.kind]
    text = {"plain": plain, "brief": brief, "player": player}[wording].strip()
    return text[0].upper() + text[1:] + "."


class Narrator:
    """
    Finds the events of a clip.

    Args:
        moments (`list[Moment]`): The frames.
        cuts (`set[int]`): Frames at which the player is suddenly elsewhere. Nothing of before counts there.
        fps (`int`, *optional*, defaults to 4): Frames per second.
    """

    def __init__(self, moments: list[Moment], cuts: set[int], fps: int = FPS) -> None:
        self.moments, self.cuts, self.fps = moments, cuts, fps
        self.again, self.reach, self.pain = _AGAIN * fps, _REACH * FPS / fps, _PAIN * FPS / fps
        self.last_seen: dict[int | str, int] = {}
        self.awaited: set[int | str] = set()
        self.told: dict[int | str, int] = {}
        self.killed: set[int] = set()
        self.found: list[tuple[int, dict[str, Any]]] = []

    def events(self) -> tuple[Event, ...]:
        """Return the events in order of time, each at a time of its own."""
        for index, now in enumerate(self.moments):
            if index in self.cuts:
                self.last_seen.clear()
                self.awaited.clear()
            elif index > 0:
                self._find_changes(index, self.moments[index - 1], now)
            self._find_new(index, now)
        return self._place()

    def _add(self, index: int, kind: str, **facts: Any) -> None:
        self.found.append((index, {"kind": kind, **facts}))

    def _is_due(self, key: int | str, index: int) -> bool:
        """Return whether what goes on is told, and remember that it is."""
        due = index - self.told.get(key, -self.again) >= self.again
        if due:
            self.told[key] = index
        return due

    def _was_seen(self, thing: int, index: int, frames: int) -> bool:
        return index - self.last_seen.get(thing, -100) <= frames

    def _find_changes(self, index: int, before: Moment, now: Moment) -> None:
        pain = now.values["DAMAGE_TAKEN"] - before.values["DAMAGE_TAKEN"]
        if pain >= self.pain and self._is_due("hurt", index):
            self._add(index, "hurt")
        place = now.values["POSITION_X"], now.values["POSITION_Y"]
        taken = set()
        for thing, (kind, x, y, _) in before.things.items():
            after = now.things.get(thing, ("",))[0]
            if after == kind:
                continue
            is_near = math.dist(place, (x, y)) < self.reach
            if kind in ITEM_NAMES and is_near and self._was_seen(thing, index, 2 * self.again):
                taken.add(kind)
            elif kind in MONSTER_NAMES and after in ("corpse", ""):
                self.killed.add(thing)
                if self._was_seen(thing, index, 2):
                    self._add(index, "dies", thing=kind)
            elif kind == "barrel" and self._was_seen(thing, index, 2):
                self._add(index, "explodes", thing=kind)
        for kind in sorted(taken):
            if self._is_due(f"picks up {kind}", index):
                self._add(index, "picks_up", thing=kind)
        for door in now.open_doors - before.open_doors:
            if door.is_seen(now.values):
                self._add(index, "opens")
        weapon = int(now.values["SELECTED_WEAPON"])
        if weapon != int(before.values["SELECTED_WEAPON"]) and weapon in WEAPONS:
            # The hands rise from below the picture, and are in it a frame later.
            self._add(index + 1, "changes_weapon", thing=WEAPONS[weapon])
        targets = [sight for sight in now.sights if sight.kind in MONSTER_NAMES and abs(sight.bearing) < 12]
        if now.values["HITCOUNT"] > before.values["HITCOUNT"] and targets:
            target = min(targets, key=lambda sight: abs(sight.bearing))
            if self._is_due(target.id, index):
                self._add(index, "is_hit", thing=target.kind)

    def _find_new(self, index: int, now: Moment) -> None:
        new: dict[str, list[Sight]] = {}
        for sight in now.sights:
            key = sight.id if sight.kind in MONSTER_NAMES else sight.kind
            seen = self.last_seen.get(key, -100)
            if seen == index:
                continue
            if index - seen > self.again and not (sight.kind == "corpse" and sight.id in self.killed):
                self.awaited.add(key)
            elif seen == index - 1 and key in self.awaited:
                self.awaited.remove(key)
                new.setdefault(sight.kind, []).append(sight)
        for sight in now.sights:
            self.last_seen[sight.id] = self.last_seen[sight.kind] = index
        for kind, sights in new.items():
            self._add(index, "comes_into_view", thing=kind, ids={sight.id for sight in sights})

    def _place(self) -> tuple[Event, ...]:
        """Give every event a frame of its own."""
        placed, waiting = [], []
        for index, moment in enumerate(self.moments):
            waiting += [(EVENTS.index(facts["kind"]), since, facts) for since, facts in self.found if since == index]
            waiting = [
                entry
                for entry in waiting
                if index - entry[1] <= _LATE and (entry[2]["kind"] != "comes_into_view" or _arrived(entry[2], moment))
            ]
            if index in self.cuts:
                waiting = [entry for entry in waiting if entry[1] == index]
            if waiting:
                first = min(waiting, key=lambda entry: entry[:2])
                waiting.remove(first)
                placed.append(_event_at(index / self.fps, first[2], moment))
        return tuple(placed)


def _arrived(facts: dict[str, Any], moment: Moment) -> list[Sight]:
    """Return the things in sight that came into view: certain monsters, or all things of another kind."""
    kind, ids = facts["thing"], facts["ids"]
    return [sight for sight in moment.sights if sight.kind == kind and (kind not in MONSTER_NAMES or sight.id in ids)]


def _event_at(time: float, facts: dict[str, Any], moment: Moment) -> Event:
    """Return an event. What comes into view has the side and the distance that it has at this moment."""
    if facts["kind"] != "comes_into_view":
        return Event(time, **facts)
    kind, sights = facts["thing"], _arrived(facts, moment)
    if kind in MONSTER_NAMES and len(sights) > 1:
        return Event(time, "comes_into_view", kind, count=len(sights))
    largest = max(sights, key=lambda sight: sight.share)
    near = largest.is_near if kind in MONSTERS else None
    return Event(time, "comes_into_view", kind, side=side_of(largest.x), near=near)
