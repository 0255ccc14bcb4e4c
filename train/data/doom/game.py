# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The game behind DoomWorld: one process of ViZDoom for each process of Python, and what a frame of it shows."""

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from videollm_mod.train.data.doom.things import KIND_OF, NEAR


TICS = 35  # The game advances 35 times a second.
FPS = 4  # Frames of a clip per second.
WIDTH, HEIGHT = 256, 192  # The game's own pictures, which are 4 wide and 3 high.
# A thing is in sight if it covers this share of the picture or more: 33 of 128x128 pixels.
SMALLEST = 0.002
_SELF = 255  # The label of the player's own weapon.
_VARIABLES = (
    "POSITION_X",
    "POSITION_Y",
    "POSITION_Z",
    "ANGLE",
    "HEALTH",
    "HITCOUNT",
    "DAMAGE_TAKEN",
    "SELECTED_WEAPON",
)
_BUTTONS = (
    "ATTACK",
    "USE",
    "MOVE_FORWARD",
    "MOVE_LEFT_RIGHT_DELTA",
    "TURN_LEFT_RIGHT_DELTA",
    "SELECT_WEAPON1",
    "SELECT_WEAPON2",
    "SELECT_WEAPON3",
    "SELECT_WEAPON4",
    "SELECT_WEAPON6",
)


def bearing_of(x: float, y: float, values: dict[str, float]) -> float:
    """Return where a place of the map is for the player, in degrees to the right, from -180 to 180."""
    angle = math.degrees(math.atan2(y - values["POSITION_Y"], x - values["POSITION_X"]))
    return (values["ANGLE"] - angle + 180) % 360 - 180


@dataclass(frozen=True)
class Action:
    """
    What the player does for the time of one frame.

    Args:
        attack, use (`bool`): Whether it shoots, and whether it opens what is in front of it.
        forward (`bool`): Whether it walks.
        strafe (`float`): Speed to the right; negative to the left.
        turn (`float`): Degrees to the right, spread over the frame; negative to the left.
        weapon (`int`): Slot of the weapon to take; 0 keeps the present one.
    """

    attack: bool = False
    use: bool = False
    forward: bool = False
    strafe: float = 0.0
    turn: float = 0.0
    weapon: int = 0

    def buttons(self, tics: int) -> list[float]:
        """Return the values of the game's buttons."""
        slots = [float(self.weapon == int(name[-1])) for name in _BUTTONS[5:]]
        return [self.attack, self.use, self.forward, self.strafe, self.turn / tics, *slots]


@dataclass(frozen=True)
class Sight:
    """
    A thing in sight.

    Args:
        id (`int`): The game's number of the thing. It stays the same when a monster becomes a corpse.
        kind (`str`): One of [`THINGS`].
        x, y (`float`): Center of the visible part, from 0 to 1.
        width (`float`): Width of the visible part, as a share of the picture's width.
        share (`float`): Share of the picture that the visible part covers.
        distance (`float`): Distance from the player in map units.
        bearing (`float`): Degrees to the right of the middle of the picture.
    """

    id: int
    kind: str
    x: float
    y: float
    width: float
    share: float
    distance: float
    bearing: float

    @property
    def is_near(self) -> bool:
        """Whether it is near."""
        return self.distance < NEAR


@dataclass(frozen=True)
class Moment:
    """
    The game at the time of one frame.

    Args:
        sights (`tuple[Sight, ...]`): The things in sight, from left to right.
        mask (`np.ndarray` of shape `(height, width)`, uint8): The number of the thing that each pixel shows, counted
            from 1 in the order of `sights`, or 0.
        things (`dict[int, tuple[str, float, float, float]]`): Kind and place of all things on the map, by id.
        depth (`np.ndarray` of shape `(width,)`): Distance to the walls at eye level in map units, roughly.
        values (`dict[str, float]`): The game's variables.
        open_doors (`frozenset[Door]`): The doors that were closed at first and are open.
        picture (`np.ndarray` of shape `(height, width, 3)`, uint8): The picture.
    """

    sights: tuple[Sight, ...]
    mask: np.ndarray
    things: dict[int, tuple[str, float, float, float]]
    depth: np.ndarray
    values: dict[str, float]
    open_doors: "frozenset[Door]"
    picture: np.ndarray


@dataclass(frozen=True)
class Door:
    """A sector that is closed at first, and the middle and direction of its longest line in map units and degrees."""

    sector: int
    x: float
    y: float
    angle: float

    def bearing(self, values: dict[str, float]) -> float:
        """Return where it is for the player, in degrees to the right."""
        return bearing_of(self.x, self.y, values)

    def distance(self, values: dict[str, float]) -> float:
        """Return how far it is from the player."""
        return math.hypot(self.x - values["POSITION_X"], self.y - values["POSITION_Y"])

    def is_seen(self, values: dict[str, float]) -> bool:
        """Return whether it is before the player and near, so that nothing but the player's weapon can hide it."""
        return self.distance(values) < 180 and abs(self.bearing(values)) < 30


class Game:
    """
    One process of ViZDoom. Use [`shared_game`], which starts it once.

    Args:
        wad (`str`): File of maps, "freedoom1" or "freedoom2".
    """

    def __init__(self, wad: str) -> None:
        self.vizdoom = find_vizdoom()
        self.variables = [(name, getattr(self.vizdoom.GameVariable, name)) for name in _VARIABLES]
        self.folder = tempfile.mkdtemp(prefix="doomworld-")
        self.game = self._start(wad)
        self.doors: list[Door] = []

    def _start(self, wad: str) -> Any:
        vd, game = self.vizdoom, self.vizdoom.DoomGame()
        game.set_doom_game_path(str(Path(vd.root_path, f"{wad}.wad")))
        if sys.platform == "linux":
            game.set_vizdoom_path(_launcher(Path(self.folder, "launch"), vd.exe_path))
        game.set_doom_config_path(str(Path(self.folder, "settings.ini")))
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        # OpenAL without a device aborts when it looks for effects. Commands such as `warp` need cheats.
        game.add_game_args("-nosound +snd_efx 0 +sv_cheats 1 +con_midtime 0.03 +cl_showsecretmessage 0 +Gamma 1.4")
        game.set_mode(vd.Mode.PLAYER)
        # Damage is half, and the screen less red.
        game.set_doom_skill(1)
        game.set_episode_timeout(0)
        game.set_screen_format(vd.ScreenFormat.RGB24)
        game.set_screen_resolution(getattr(vd.ScreenResolution, f"RES_{WIDTH}X{HEIGHT}"))
        for part in ("hud", "crosshair", "messages", "particles", "decals"):
            getattr(game, f"set_render_{part}")(False)
        game.set_render_screen_flashes(True)
        for part in ("labels_buffer", "depth_buffer", "objects_info", "sectors_info"):
            getattr(game, f"set_{part}_enabled")(True)
        game.set_available_buttons([getattr(vd.Button, name) for name in _BUTTONS])
        working = os.getcwd()
        try:
            # The game leaves a folder for saved games where it is started.
            os.chdir(self.folder)
            game.init()
        finally:
            os.chdir(working)
        return game

    def close(self) -> None:
        """End the process."""
        self.game.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_map(self, name: str, seed: int) -> None:
        """Start a map from its beginning. The same seed and actions always give the same pictures."""
        self.game.set_doom_map(name)
        self.game.set_seed(seed % 2**31)
        self.game.new_episode()
        closed = [sector for sector in self.game.get_state().sectors if _is_closed(sector)]
        self.doors = [_door(sector) for sector in closed if 3 < len(sector.lines) < 9]

    @property
    def is_over(self) -> bool:
        """Whether the player is dead or has left the map."""
        return self.game.is_episode_finished() or self.game.is_player_dead()

    def command(self, *commands: str) -> None:
        """Send console commands, which the game follows in the next tic."""
        for command in commands:
            self.game.send_game_command(command)

    def step(self, action: Action, tics: int, sink: Callable[[np.ndarray], None] | None = None) -> bool:
        """
        Advance the game, and return whether the player is still alive and in the map.

        `sink` receives the picture of every tic but the last.
        """
        buttons = action.buttons(tics)
        for left in [0] if sink is None else reversed(range(tics)):
            self.game.make_action(buttons, tics if sink is None else 1)
            if self.is_over:
                return False
            if sink is not None and left:
                sink(self.game.get_state().screen_buffer)
        return True

    def warp(self, x: float, y: float, angle: float) -> bool:
        """Put the player at a place of the map, looking at an angle. Return whether there is room."""
        if self.is_over:
            return False
        self.command(f"warp {x:.0f} {y:.0f}")
        turn = (self.game.get_game_variable(self.vizdoom.GameVariable.ANGLE) - angle + 180) % 360 - 180
        alive, values = self.step(Action(turn=turn), 1), self.values()
        return alive and math.hypot(values["POSITION_X"] - x, values["POSITION_Y"] - y) < 8

    def shows(self, thing: int) -> bool:
        """Return whether the present picture shows a thing, however little."""
        return any(label.object_id == thing for label in self.game.get_state().labels)

    def values(self) -> dict[str, float]:
        """Return the game's variables."""
        return {name: self.game.get_game_variable(variable) for name, variable in self.variables}

    def look(self) -> Moment:
        """Return what the present frame shows."""
        state, values = self.game.get_state(), self.values()
        sights, mask = _find_sights(state, values)
        things = {}
        for thing in state.objects:
            kind = KIND_OF.get(thing.name)
            if kind is not None:
                things[thing.id] = (kind, thing.position_x, thing.position_y, thing.position_z)
        open_sectors = {s.id for s in state.sectors if s.ceiling_height - s.floor_height > 40} if self.doors else set()
        open_doors = frozenset(door for door in self.doors if door.sector in open_sectors)
        rows = state.depth_buffer[HEIGHT // 2 - 4 : HEIGHT // 2 + 4]
        return Moment(sights, mask, things, rows.min(axis=0) * 7.7, values, open_doors, state.screen_buffer)


def _find_sights(state: Any, values: dict[str, float]) -> tuple[tuple[Sight, ...], np.ndarray]:
    """Return the things in sight, and the mask of [`Moment`]."""
    labels = state.labels_buffer
    counts = np.bincount(labels.ravel(), minlength=256)
    found = []
    for label in state.labels:
        kind = KIND_OF.get(label.object_name)
        share = counts[label.value] / labels.size
        if kind is None or label.value == _SELF or share < SMALLEST:
            continue
        y, x = np.nonzero(labels[label.y : label.y + label.height, label.x : label.x + label.width] == label.value)
        place = label.object_position_x, label.object_position_y
        distance = math.dist(place, (values["POSITION_X"], values["POSITION_Y"]))
        center = (label.x + x.mean() + 0.5) / WIDTH, (label.y + y.mean() + 0.5) / HEIGHT
        width = (x.max() - x.min() + 1) / WIDTH
        sight = Sight(
            label.object_id, kind, *map(float, center), float(width), share, distance, bearing_of(*place, values)
        )
        found.append((sight, label.value))
    found.sort(key=lambda pair: (pair[0].x, pair[0].id))
    numbers = np.zeros(256, dtype=np.uint8)
    for number, (_, value) in enumerate(found, start=1):
        numbers[value] = number
    return tuple(sight for sight, _ in found), numbers[labels]


def _is_closed(sector: Any) -> bool:
    return sector.ceiling_height - sector.floor_height < 1


def _door(sector: Any) -> Door:
    longest = max(sector.lines, key=lambda line: math.hypot(line.x2 - line.x1, line.y2 - line.y1))
    angle = math.degrees(math.atan2(longest.y2 - longest.y1, longest.x2 - longest.x1))
    return Door(sector.id, (longest.x1 + longest.x2) / 2, (longest.y1 + longest.y2) / 2, angle)


def _launcher(path: Path, program: str) -> str:
    """Write a script that starts a program and has the system end it with this process, even if that is killed."""
    path.write_text(
        f"#!{sys.executable} -IS\nimport ctypes, os, signal, sys\n"
        "ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG\n"
        f"os.execv({program!r}, [{program!r}, *sys.argv[1:]])\n",
        encoding="utf-8",
    )
    path.chmod(0o700)
    return str(path)


def find_vizdoom() -> Any:
    """
    Return the module `vizdoom`.

    Raises:
        `ImportError`: If it is not installed.
    """
    try:
        import vizdoom
    except ImportError:
        raise ImportError('DoomWorld needs ViZDoom: run `pip install -e ".[doom]"` in the checkout.') from None
    return vizdoom


# The game of this process: its process id, its maps, the game. A forked process must not use its parent's game, nor
# collect it as garbage, which would end it: so replaced games stay in the list.
_GAMES: list[tuple[int, str, Game]] = []


def shared_game(wad: str) -> Game:
    """
    Return the running game of this process. It starts at the first call and ends with the process.

    Raises:
        `ImportError`: If ViZDoom is not installed.
    """
    if _GAMES and _GAMES[-1][:2] == (os.getpid(), wad):
        return _GAMES[-1][2]
    if _GAMES and _GAMES[-1][0] == os.getpid():
        _GAMES.pop()[2].close()
    game = Game(wad)
    _GAMES.append((os.getpid(), wad, game))
    # Unlike `atexit`, it also runs at the end of a worker.
    Finalize(None, close_game, exitpriority=10)
    return game


def close_game() -> None:
    """End the game of this process, if there is one. The next use starts a new one."""
    if _GAMES and _GAMES[-1][0] == os.getpid():
        _GAMES.pop()[2].close()
