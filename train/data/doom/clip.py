# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What a DoomWorld clip is, and how one is recorded.

Everything in a clip follows from its split, its seed, its length and its frame rate, on one version of ViZDoom. The
player decides 4 times a second. A clip has 4 frames a second, or fewer. An event has the time of the frame that first
shows its result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from videollm_mod.train.data.doom.events import Event, Narrator
from videollm_mod.train.data.doom.game import FPS, TICS, Game, Moment, Sight, shared_game
from videollm_mod.train.data.doom.player import Player
from videollm_mod.train.data.doom.things import VOCABULARIES, name_of, side_of


STEP = 1 / FPS  # Seconds between the frames of a clip with 4 frames a second.
RATES = (4, 2)
SECONDS = (8.0, 15.0)
SLIDE_FRAMES = 16
# First seed of each split. A split ends where the next begins, so no two splits share a clip.
SPLITS = {"train": 0, "validation": 1_000_000_000, "test": 1_100_000_000, "ood": 1_200_000_000}
SEEDS_END = 1_300_000_000
_TRAINED = (1, 2, 3, 5, 6, 7, 8, 10, 13, 16, 17, 18, 21, 22, 23, 25, 26, 29)
# The file of maps of each split, and its maps. No two splits share a map, and "ood" has another game's.
MAPS = {
    "train": ("freedoom2", tuple(f"MAP{number:02d}" for number in _TRAINED)),
    "validation": ("freedoom2", ("MAP04", "MAP14", "MAP24")),
    "test": ("freedoom2", ("MAP09", "MAP19", "MAP20")),
    "ood": ("freedoom1", ("E1M2", "E2M1", "E2M3", "E3M1")),
}


@dataclass(frozen=True)
class Clip:
    """
    A recorded clip.

    Args:
        split (`str`): One of [`SPLITS`].
        seed (`int`): The seed from which everything else follows.
        map (`str`): Name of the map.
        pictures (`np.ndarray` of shape `(frames, size, size, 3)`, uint8): The frames.
        sights (`tuple[tuple[Sight, ...], ...]`): The things in sight in each frame, from left to right.
        masks (`np.ndarray` of shape `(frames, height, width)`, uint8): Which thing each pixel of the game's pictures
            shows, counted from 1 in the order of `sights`, or 0.
        events (`tuple[Event, ...]`): The events in order of time. No two have the same time.
        weapons (`tuple[int, ...]`): Slot of the player's weapon in each frame.
        fps (`int`, *optional*, defaults to 4): Frames per second. Every event has the time of a frame.
    """

    split: str
    seed: int
    map: str
    pictures: np.ndarray
    sights: tuple[tuple[Sight, ...], ...]
    masks: np.ndarray
    events: tuple[Event, ...]
    weapons: tuple[int, ...]
    fps: int = FPS

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.pictures) / self.fps

    def index(self, time: float) -> int:
        """Return the index of the last frame at or before a time."""
        return min(int(time * self.fps + 1e-6), len(self.pictures) - 1)

    def visible(self, time: float) -> tuple[Sight, ...]:
        """Return the things in sight at a time, from left to right."""
        return self.sights[self.index(time)]

    def coverage(self, time: float, grid: int = 8) -> np.ndarray:
        """Return the share of each patch that things in sight cover: float32 (grid * grid,), row by row."""
        return _area(self.masks[self.index(time)] > 0, grid).ravel()

    def covered(self, time: float, grid: int = 8) -> np.ndarray:
        """
        Return the patches that show things: bool (grid * grid,), row by row.

        Things cover at least a quarter of such a patch, or it holds at least a quarter of one thing.
        """
        found, parts = self.coverage(time, grid) >= 0.25, self.parts(time, grid)
        return found | (parts >= 0.25 * parts.sum(axis=1, keepdims=True)).any(axis=0)

    def parts(self, time: float, grid: int = 8) -> np.ndarray:
        """Return the share of each patch that each thing in sight covers: float32 (things, grid * grid)."""
        index = self.index(time)
        numbers = range(1, len(self.sights[index]) + 1)
        parts = [_area(self.masks[index] == number, grid).ravel() for number in numbers]
        return np.stack(parts) if parts else np.zeros((0, grid * grid), dtype=np.float32)

    def description(self, time: float) -> str:
        """Describe the picture at a time, for example "A zombie on the left and two imps ahead."."""
        return describe_sights(self.visible(time))

    def story(self) -> list[tuple[float, str]]:
        """Return the events as (time in seconds, sentence), in order of time."""
        return [(event.time, event.text) for event in self.events]


def describe_sights(sights: tuple[Sight, ...]) -> str:
    """Name the kinds of things from left to right, each with the place of its largest thing."""
    groups: dict[str, list[Sight]] = {}
    for sight in sights:
        groups.setdefault(sight.kind, []).append(sight)
    largest = {kind: max(group, key=lambda sight: sight.share) for kind, group in groups.items()}
    kinds = sorted(groups, key=lambda kind: largest[kind].x)
    names = [f"{name_of(kind, len(groups[kind]))} {side_of(largest[kind].x)}" for kind in kinds] or ["nothing"]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return text[0].upper() + text[1:] + "."


def _area(mask: np.ndarray, grid: int) -> np.ndarray:
    """Return the share of each patch that a mask covers: float32 (grid, grid)."""
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize((grid, grid), Image.Resampling.BOX))


def shrink(picture: np.ndarray, size: int) -> np.ndarray:
    """Scale a picture of the game to a square: uint8 (size, size, 3)."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def map_of(split: str, seed: int) -> tuple[str, str]:
    """Return the file of maps and the map of a clip."""
    wad, maps = MAPS[split]
    return wad, maps[int(np.random.default_rng((seed, 1)).integers(len(maps)))]


def record_clip(
    split: str,
    seed: int,
    *,
    size: int = 128,
    seconds: tuple[float, float] = SECONDS,
    fps: int = FPS,
    vocabulary: str = "full",
    sink: Callable[[np.ndarray], None] | None = None,
) -> Clip:
    """
    Record a clip. The same split, seed, length and frame rate always give the same clip.

    Args:
        split (`str`): One of [`SPLITS`]. It gives the maps.
        seed (`int`): The seed.
        size (`int`, *optional*, defaults to 128): Width and height of the pictures.
        seconds (`tuple[float, float]`, *optional*, defaults to 8 to 15): Shortest and longest clip.
        fps (`int`, *optional*, defaults to 4): Frames per second, one of [`RATES`]. The player does the same at each.
        vocabulary (`str`, *optional*, defaults to `"full"`): What things are called, one of [`VOCABULARIES`].
        sink (callable, *optional*): Receives the game's picture of every tic, 35 a second, uint8 (192, 256, 3).

    Raises:
        `ImportError`: If ViZDoom is not installed.
    """
    rng = np.random.default_rng((seed, 0))
    count = round(float(rng.uniform(*seconds)) * FPS)
    wad, name = map_of(split, seed)
    recorder = _Recorder(shared_game(wad), name, seed, rng, sink)
    moments = [recorder.next(index) for index in range(count)]
    if sink is not None:
        for _ in range(TICS * (count - 1) // FPS + 1, TICS * count // FPS):
            sink(moments[-1].picture)
    # Events are those that can be seen in the frames that are left.
    moments, cuts = _rename(moments[:: FPS // fps], vocabulary), {-(-cut * fps // FPS) for cut in recorder.cuts}
    return _to_clip(split, seed, name, size, moments, Narrator(moments, cuts, fps).events(), fps)


def record_slides(
    split: str,
    seed: int,
    *,
    size: int = 128,
    count: int = SLIDE_FRAMES,
    fps: int = FPS,
    vocabulary: str = "full",
) -> Clip:
    """
    Record a slide show: every frame shows another place of the map. It has no events.

    Args:
        split (`str`): One of [`SPLITS`].
        seed (`int`): The seed.
        size (`int`, *optional*, defaults to 128): Width and height of the pictures.
        count (`int`, *optional*, defaults to 16): Number of frames.
        fps (`int`, *optional*, defaults to 4): Frames per second.
        vocabulary (`str`, *optional*, defaults to `"full"`): What things are called, one of [`VOCABULARIES`].
    """
    wad, name = map_of(split, seed)
    recorder = _Recorder(shared_game(wad), name, seed, np.random.default_rng((seed, 5)), None)
    moments = [recorder.next(index, elsewhere=True) for index in range(count)]
    return _to_clip(split, seed, name, size, _rename(moments, vocabulary), (), fps)


def _rename(moments: list[Moment], vocabulary: str) -> list[Moment]:
    names = VOCABULARIES[vocabulary]
    return [
        replace(
            moment,
            sights=tuple(replace(sight, kind=names.get(sight.kind, sight.kind)) for sight in moment.sights),
            things={number: (names.get(kind, kind), *place) for number, (kind, *place) in moment.things.items()},
        )
        for moment in moments
    ]


def _to_clip(
    split: str, seed: int, name: str, size: int, moments: list[Moment], events: tuple[Event, ...], fps: int
) -> Clip:
    return Clip(
        split,
        seed,
        name,
        np.stack([shrink(moment.picture, size) for moment in moments]),
        tuple(moment.sights for moment in moments),
        np.stack([moment.mask for moment in moments]),
        events,
        tuple(int(moment.values["SELECTED_WEAPON"]) for moment in moments),
        fps,
    )


class _Recorder:
    """Plays, and returns one moment for each frame."""

    def __init__(
        self,
        game: Game,
        name: str,
        seed: int,
        rng: np.random.Generator,
        sink: Callable[[np.ndarray], None] | None,
    ) -> None:
        self.game, self.name, self.seed, self.rng, self.sink = game, name, seed, rng, sink
        self.player = Player(rng, game)
        # Frames at which the player is suddenly elsewhere.
        self.cuts: set[int] = set()
        self.moment: Moment | None = None
        self.start()

    def start(self) -> None:
        """Begin the map from its start."""
        self.game.start_map(self.name, self.seed)
        self.player.equip()

    def change_scene(self) -> None:
        """Go elsewhere. If the player is dead, or dies on arrival, the map begins again."""
        while self.game.is_over or not self.player.begin_scene(self.game.look()):
            self.seed += 1
            self.start()

    def next(self, index: int, *, elsewhere: bool = False) -> Moment:
        """Return the moment of frame `index`, in another place if asked. Frames are asked for in order."""
        alive, tics = True, 1
        shown: list[np.ndarray] = []
        if index > 0:
            tics = TICS * index // FPS - TICS * (index - 1) // FPS
            alive = self.game.step(self.player.decide(self.moment), tics, None if self.sink is None else shown.append)
        if index == 0 or not alive or elsewhere or self.player.frames_left <= 0:
            self.change_scene()
            self.cuts.add(index)
        self.moment = self.game.look()
        if self.moment.values["HEALTH"] < 40:
            self.game.command("give health 30")
        if self.sink is not None:
            # A scene that ends early is filled with the first picture of the next.
            for picture in [*shown, *[self.moment.picture] * (tics - len(shown))]:
                self.sink(picture)
        return self.moment
