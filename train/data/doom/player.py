# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld's scripted player: it looks around, explores, fights, collects and opens doors. A seed decides how."""

import math

import numpy as np

from videollm_mod.train.data.doom.game import Action, Door, Game, Moment, Sight, bearing_of
from videollm_mod.train.data.doom.things import ITEMS, MONSTERS


# What a scene of a busy clip, and of a calm one, may be, with weights.
_MOODS = {
    False: {"fight": 0.55, "collect": 0.25, "watch": 0.08, "door": 0.12},
    True: {"fight": 0.1, "collect": 0.2, "watch": 0.5, "door": 0.2},
}
# What each mood warps to, with weights.
_TARGETS = {
    "fight": {"zombie": 4, "imp": 3, "demon": 3, "beast": 1, "barrel": 1},
    "collect": {"health": 3, "ammunition": 3, "armor": 2, "weapon": 3, "key": 2, "barrel": 1},
    "watch": {"zombie": 2, "imp": 2, "demon": 2, "corpse": 2, "barrel": 1, "key": 1},
}


class Player:
    """
    Decides what to do for each frame.

    The order of the calls to the random generator decides every clip: do not change it.
    """

    def __init__(self, rng: np.random.Generator, game: Game) -> None:
        self.rng, self.game = rng, game
        self.calm = bool(rng.random() < 0.35)
        self.mood = "fight"
        self.frames_left = 0
        self.way = 1.0
        self.given_up: set[int] = set()
        self.chased: dict[int, int] = {}
        self.before: tuple[float, float] | None = None
        self.target: int | None = None
        self.sought: int | None = None
        self.blocked = False
        self.patience = 0

    def equip(self) -> None:
        """Give the player a random set of weapons, enough ammunition, and some extra health."""
        self.game.command("take health 30", "give clip 100")
        for weapon, chance in (("shotgun", 0.7), ("chaingun", 0.5)):
            if self.rng.random() < chance:
                self.game.command(f"give {weapon}")
        self.game.step(Action(weapon=int(self.rng.choice((1, 2, 3, 4), p=(0.05, 0.3, 0.4, 0.25)))), 4)

    def begin_scene(self, moment: Moment) -> bool:
        """
        Choose a mood, and warp near something that suits it. It stays where it is if no place is found.

        Returns whether it survives.
        """
        moods = _MOODS[self.calm]
        self.mood = str(self.rng.choice(list(moods), p=list(moods.values())))
        self.frames_left = int(self.rng.integers(24, 48) if self.calm else self.rng.integers(14, 36))
        self.way = float(self.rng.choice((-1.0, 1.0)))
        self.before = self.target = self.sought = None
        self.patience = 10
        # A locked door would show a message. Outside such scenes, the player picks up keys, so it must not have them.
        self.game.command("give keys" if self.mood == "door" else "take keys")
        if self.mood == "door" and not self._warp_to_door():
            self.mood = "fight"
            self.game.command("take keys")
        if self.mood != "door":
            self._warp_to_thing(moment)
        return not self.game.is_over

    def _warp_to_thing(self, moment: Moment) -> bool:
        wanted = _TARGETS[self.mood]
        kinds = [kind for kind in wanted if any(thing[0] == kind for thing in moment.things.values())]
        for _ in range(6 if kinds else 0):
            weights = np.array([wanted[kind] for kind in kinds], dtype=float)
            kind = self.rng.choice(kinds, p=weights / weights.sum())
            places = [(key, thing) for key, thing in moment.things.items() if thing[0] == kind]
            key, (_, x, y, z) = places[int(self.rng.integers(len(places)))]
            first = float(self.rng.uniform(0, 360))
            far = float(self.rng.uniform(90, 330 if kind in MONSTERS else 190))
            for turn in range(0, 360, 60):
                angle = math.radians(first + turn)
                there = x + far * math.cos(angle), y + far * math.sin(angle)
                if self.game.warp(*there, first + turn + 180) and self.game.shows(key):
                    moment = self.game.look()
                    level = abs(moment.values["POSITION_Z"] - z) < 25 or kind in MONSTERS
                    if level and any(sight.id == key for sight in moment.sights):
                        self.sought = key
                        return self.game.step(Action(turn=float(self.rng.uniform(-70, 70))), 1)
        return False

    def _warp_to_door(self) -> bool:
        for _ in range(min(6, 2 * len(self.game.doors))):
            door = self.game.doors[int(self.rng.integers(len(self.game.doors)))]
            side = float(self.rng.choice((-90.0, 90.0)))
            angle, far = math.radians(door.angle + side), float(self.rng.uniform(110, 160))
            x, y = door.x + far * math.cos(angle), door.y + far * math.sin(angle)
            if self.game.warp(x, y, door.angle + side + 180) and self._sees_wall(far):
                self.door: Door = door
                return True
        return False

    def _sees_wall(self, far: float) -> bool:
        ahead = self.game.look().depth[118:138].mean()
        return bool(abs(ahead - far) < 40)

    def decide(self, moment: Moment) -> Action:
        """Return what to do until the next frame."""
        self.frames_left -= 1
        place = moment.values["POSITION_X"], moment.values["POSITION_Y"]
        stuck = self.before is not None and math.dist(place, self.before) < 6
        self.before = None
        if stuck and self.target is not None:
            self.given_up.add(self.target)
        if stuck:
            self.target, self.patience = None, 0
        weapon = int(self.rng.choice((2, 3, 4))) if self.rng.random() < 0.02 else 0
        sights = [sight for sight in moment.sights if sight.id not in self.given_up]
        monsters = [sight for sight in sights if sight.kind in MONSTERS]
        items = [sight for sight in sights if sight.kind in ITEMS]
        barrels = [sight for sight in sights if sight.kind == "barrel" and sight.distance > 130]
        if self.mood == "watch":
            self.way = -self.way if self.rng.random() < 0.05 else self.way
            return Action(turn=self.way * float(self.rng.choice((0.0, 8.0, 20.0))), weapon=weapon)
        if self.mood == "door" and self.patience > 0 and self.door not in moment.open_doors:
            return self._open(moment, place)
        if self.mood == "fight" and (monsters or barrels):
            return self._fight(monsters or barrels, weapon)
        if items:
            return self._collect(min(items, key=lambda sight: sight.distance), place, weapon)
        turn = self._turn_to_sought(moment)
        return self._explore(moment, place, stuck, weapon) if turn is None else Action(turn=turn, weapon=weapon)

    def _turn_to_sought(self, moment: Moment) -> float | None:
        """Return how far to turn to the thing of this scene, or `None` if it is gone or was before the player."""
        if self.sought not in moment.things:
            return None
        _, x, y, _ = moment.things[self.sought]
        bearing = bearing_of(x, y, moment.values)
        if abs(bearing) < 30:
            self.sought = None
            return None
        return float(np.clip(bearing, -45, 45))

    def _fight(self, sights: list[Sight], weapon: int) -> Action:
        sight = max(sights, key=lambda sight: (sight.id == self.target, sight.share))
        self.target = sight.id
        self.chased[sight.id] = self.chased.get(sight.id, 0) + 1
        if self.chased[sight.id] > 16:
            self.given_up.add(sight.id)
        aimed = abs(sight.bearing) < 6
        strafe = float(self.rng.choice((-5.0, 0.0, 5.0), p=(0.2, 0.6, 0.2)))
        turn = float(np.clip(sight.bearing, -60, 60))
        return Action(attack=aimed, strafe=strafe, turn=turn, weapon=weapon)

    def _collect(self, sight: Sight, place: tuple[float, float], weapon: int) -> Action:
        self.target = sight.id
        self.chased[sight.id] = self.chased.get(sight.id, 0) + 1
        if self.chased[sight.id] > 10:
            self.given_up.add(sight.id)
        self.before = place
        turn = float(np.clip(sight.bearing, -45, 45))
        return Action(forward=abs(sight.bearing) < 40, turn=turn, weapon=weapon)

    def _open(self, moment: Moment, place: tuple[float, float]) -> Action:
        near = self.door.distance(moment.values) < 75
        self.patience -= near
        self.before = None if near else place
        turn = float(np.clip(self.door.bearing(moment.values), -45, 45))
        # A second push soon after the first would close it again.
        return Action(use=near and self.patience in (9, 4), forward=not near, turn=turn)

    def _explore(self, moment: Moment, place: tuple[float, float], stuck: bool, weapon: int) -> Action:
        left, ahead, right = (float(part.mean()) for part in np.split(moment.depth[32:224], 3))
        if stuck or ahead < 70:
            # It turns on in the same direction until the way is free.
            if not self.blocked:
                self.way = 1.0 if right > left else -1.0
            self.blocked = True
            return Action(turn=self.way * float(self.rng.uniform(30, 60)))
        self.blocked = False
        self.before = place
        turn = float(self.rng.normal(0, 8)) + (12 if right > 1.5 * left else -12 if left > 1.5 * right else 0)
        return Action(forward=True, turn=turn, weapon=weapon)
