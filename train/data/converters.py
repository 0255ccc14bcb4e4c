# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Converters: published annotations become rows of timed messages.

A converter is one file in this folder and one line in [`CONVERTERS`]; `coin.py` is an example. `prepare.py` runs it,
writes its rows, and prints what was left out.
"""

import json
import math
import mimetypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.outputs import write_text
from videollm_mod.train.data.child_processes import ChildProcesses, CrashError
from videollm_mod.train.data.dialogues import last_frame
from videollm_mod.train.data.faults import UNREADABLE, FaultyRowError, open_video
from videollm_mod.train.data.json_rows import mend_halves, parse_row


SPLITS = ("train", "validation", "test")
# Names of videos that Python does not know on every machine.
_VIDEO_NAMES = {".mkv", ".webm", ".ts", ".mts", ".m2ts", ".flv", ".mxf", ".vob", ".ogv", ".wmv", ".3gp", ".m4v"}
# Videos that are opened before their lengths are written.
_WRITE_AFTER = 100
# Places that the table names for each reason.
_MOST_PLACES = 3


# ---------------------------------------------------------------------------------------------------------- the class


@dataclass
class Converter:
    """
    Base class of converters. A subclass is a dataclass, and its fields are options of `prepare.py`.

    Class attributes:
        tasks (`tuple[str, ...]`): Names of tasks, such as "step". The rows of a task have `task="coin_step"`.
        license (`str`): Licence of the annotations, in words.
        may_be_shared (`bool`): Whether the licence lets anyone publish the rows.

    Attributes:
        labels (`dict[str, list[str]]`): Label dictionary of each task that has one, such as `{"coin_step": [...]}`.
            [`Converter.convert`] fills it from the full annotation, never from the videos that were found.

    Args:
        task (`str`, *optional*): Tasks to prepare, separated by commas. The default is all.
        split (`str`, *optional*): Split to prepare. The default is all.
        fps (`float`, *optional*, defaults to 2.0): Frames per second of the grid on which times are placed.
    """

    tasks: ClassVar[tuple[str, ...]] = ()
    license: ClassVar[str] = "unknown"
    may_be_shared: ClassVar[bool] = False

    task: str | None = field(default=None, metadata={"help": "Tasks to prepare, separated by commas. Default: all."})
    split: str | None = field(
        default=None, metadata={"help": f"Split to prepare: {', '.join(SPLITS)}. Default: all.", "choices": SPLITS}
    )
    fps: float = field(default=2.0, metadata={"help": "Frames per second of the grid on which times are placed."})

    def __post_init__(self) -> None:
        self.labels: dict[str, list[str]] = {}
        self.chosen = tuple(self.tasks if self.task is None else self.task.split(","))
        if unknown := [name for name in self.chosen if name not in self.tasks]:
            raise ValueError(f"--task {unknown[0]} is unknown. Tasks are {', '.join(self.tasks)}.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"--fps must be a positive number, got {self.fps:g}.")

    def convert(self, annotations: Path, videos: "Videos", notes: "Notes") -> Iterator[tuple[str, dict[str, Any]]]:
        """
        Yield rows with their split, "train", "validation" or "test".

        A row has `id`, `task`, `truth`, `video` (a path), `start` and `end` in seconds, and `messages`; docs/data.md
        describes them. `prepare.py` leaves out the rows of splits that were not asked for.

        Args:
            annotations (`Path`): The published file or folder.
            videos ([`Videos`]): Finds the video of an id.
            notes ([`Notes`]): Where to count what is left out or mended.

        Raises:
            `ValueError` or `OSError`: If the annotations as a whole cannot be used. A faulty entry is a note.
        """
        raise NotImplementedError

    def wants(self, split: str) -> bool:
        """Return whether the rows of a split were asked for."""
        return self.split in (None, split)

    def accepts(self, split: str, where: str, notes: "Notes") -> bool:
        """Return what [`~Converter.wants`] does. An entry of another split is counted in the one asked for."""
        if not self.wants(split):
            before, notes.split = notes.split, str(self.split)
            notes.leave_out(where, "", "of another split", by_rule=True)
            notes.split = before
        return self.wants(split)


# The class of each name that `prepare.py` accepts, as "module:class" so that only the chosen module is imported.
CONVERTERS: dict[str, str | type[Converter]] = {
    "activitynet": "videollm_mod.train.data.dense_captions:ActivityNet",
    "aqtc": "videollm_mod.train.data.aqtc:Aqtc",
    "charades_sta": "videollm_mod.train.data.moment_queries:CharadesSta",
    "coin": "videollm_mod.train.data.coin:Coin",
    "ego4d": "videollm_mod.train.data.ego4d.converter:Ego4D",
    "ego_exo4d": "videollm_mod.train.data.ego_exo4d:EgoExo4D",
    "ovo_bench": "videollm_mod.train.data.ovo_bench:OVOBench",
    "proactive_video_qa": "videollm_mod.train.data.proactive_video_qa:ProactiveVideoQA",
    "qvhighlights": "videollm_mod.train.data.moment_queries:QvHighlights",
    "streaming_bench": "videollm_mod.train.data.streaming_bench:StreamingBench",
    "vript_hard": "videollm_mod.train.data.vript_hard:VriptHard",
    "vript": "videollm_mod.train.data.vript:Vript",
    "youcook2": "videollm_mod.train.data.dense_captions:YouCook2",
}


def find_converter(name: str) -> type[Converter]:
    """
    Return the class that converts a source.

    Raises:
        `ValueError`: If there is none.
    """
    if name not in CONVERTERS:
        raise ValueError(f"there is no converter {name!r}. Sources are {', '.join(sorted(CONVERTERS))}.")
    converter = CONVERTERS[name]
    if isinstance(converter, str):
        module, name = converter.split(":")
        converter = getattr(import_module(module), name)
    return converter


# -------------------------------------------------------------------------------------------------------------- notes


@dataclass
class Found:
    """How often something was found, and the first places."""

    count: int = 0
    places: list[str] = field(default_factory=list)


class Notes:
    """
    What a converter left out and what it mended, counted by reason.

    Some of it has no fault: a rule, such as those of VideoLLM-online's code, leaves it out of good annotations too.

    Args:
        strict (`bool`, *optional*, defaults to `False`): Whether the first fault raises [`FaultyRowError`].

    Attributes:
        split (`str`): The split that the next notes concern. A converter sets it before it reads an entry.
        left_out (`dict[str, dict[str, Found]]`): What was left out of each split, by reason.
        mended_by (`dict[str, dict[str, Found]]`): What was used all the same, by what was done.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict, self.split = strict, ""
        self.left_out: dict[str, dict[str, Found]] = {}
        self.mended_by: dict[str, dict[str, Found]] = {}

    def leave_out(self, where: str, field: str, reason: str, *, by_rule: bool = False) -> None:
        """
        Count something that is left out.

        Args:
            where (`str`): The entry, such as "LtRSn-ntcLY".
            field (`str`): Its field, such as "annotation[3].segment".
            reason (`str`): One of few reasons, without numbers or names, such as "it ends before it starts".
            by_rule (`bool`, *optional*, defaults to `False`): Whether a rule leaves it out that is no fault of it.

        Raises:
            [`FaultyRowError`]: With `strict`, unless it is by a rule.
        """
        self._count(self.left_out, where, field, reason, by_rule=by_rule)

    def mended(self, where: str, field: str, what: str, *, by_rule: bool = False) -> None:
        """Count something that was used after a repair, such as "unsorted: sorted by time". See [`leave_out`]."""
        self._count(self.mended_by, where, field, what, by_rule=by_rule)

    def _count(
        self, counts: dict[str, dict[str, Found]], where: str, field: str, reason: str, *, by_rule: bool
    ) -> None:
        place = f"{where}, {field}" if field else where
        if self.strict and not by_rule:
            raise FaultyRowError(f"{place}: {reason}")
        found = counts.setdefault(self.split, {}).setdefault(reason, Found())
        found.count += 1
        if len(found.places) < _MOST_PLACES:
            found.places.append(place)


# ------------------------------------------------------------------------------------------------------------- videos


@dataclass(frozen=True)
class Video:
    """
    A video file.

    Args:
        path (`Path`): The file.
    """

    path: Path

    @cached_property
    def duration(self) -> float:
        """
        Length in seconds: the end of the last picture. The first use opens the file.

        Raises:
            `ValueError` or `OSError`: If the file cannot be read.
        """
        return _read_length(self.path)

    @property
    def is_measured(self) -> bool:
        """Whether the length is known without opening the file."""
        return "duration" in self.__dict__

    def last_frame(self, fps: float) -> int:
        """Return the index of the last frame at a frame rate. See [`Video.duration`]."""
        return last_frame(self.duration, fps)


class Videos:
    """
    The videos of a folder, found by name, or by the name of the folder that holds them and their own: in folders of
    any depth, and with the extension of any container.

    Args:
        folder (`Path`): The folder.
        made_folder (`Path`, *optional*): Where to write videos that are made of others. Without it, none are made.

    Raises:
        `FileNotFoundError`: If there is no such folder.
    """

    def __init__(self, folder: Path, *, made_folder: Path | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder '{folder}' of videos.")
        self.folder, self.made_folder = folder, made_folder
        self._found: dict[str, Video] = {}
        self._notebook: Path | None = None
        self._children: ChildProcesses | None = None
        self._faults: dict[Path, str] = {}
        self._num_new = 0
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders.sort()
            for path in (Path(parent, name) for name in sorted(names) if _is_video(name)):
                video = Video(path)
                self._found.setdefault(path.stem, video)
                self._found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), video)
        # A complete path comes before the end of another.
        for video in list(self._found.values()):
            parts = video.path.relative_to(folder).with_suffix("").parts
            self._found.setdefault("/".join(parts[-2:]), video)

    @contextmanager
    def remembering(self, path: Path) -> Iterator[None]:
        """
        Take the lengths of videos from a file of an earlier run, and write them there at the end, also after an error,
        and after each hundred new ones.

        A length is used if the size and the time of the video are as they were. Other videos are opened by a child
        process, which a spoilt video may crash.

        Args:
            path (`Path`): The file.
        """
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        for video in self._found.values():
            match known.get(str(video.path.absolute())):
                case [*state, float(seconds)] if state and state == _state(video.path):
                    video.__dict__["duration"] = seconds
        self._notebook = path
        try:
            with ChildProcesses() as self._children:
                yield
        finally:
            self._write_lengths()
            self._notebook = self._children = None

    def _write_lengths(self) -> None:
        measured = {str(video.path.absolute()): video for video in self._found.values() if video.is_measured}
        lengths = {name: [*_state(video.path), video.duration] for name, video in measured.items()}
        write_text(self._notebook, json.dumps(lengths) + "\n")

    def find(self, *names: str) -> Video | None:
        """
        Return the video of the first name that there is.

        Args:
            names (`str`): Names of files with or without extension, or paths in the folder.
        """
        for name in map(str, names):
            stem = os.path.splitext(name)[0] if _is_video(name) else name
            if video := self._found.get(stem):
                return video
        return None

    def open(self, notes: Notes, where: str, field: str, *names: str) -> Video | None:
        """
        Return a video that can be read, or note why there is none. See [`Videos.find`] and [`Notes.leave_out`].
        """
        video = self.find(*names)
        if video is None:
            notes.leave_out(where, field, "there is no video file")
            return None
        if video.is_measured:
            return video
        if video.path not in self._faults:
            self._measure(video)
        if fault := self._faults.get(video.path):
            notes.leave_out(where, field, fault)
            return None
        return video

    def add(self, name: str, path: Path) -> None:
        """Let [`Videos.find`] find a file under a name, which no other video has."""
        self._found.setdefault(name, Video(path))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """
        Call a function that opens videos: in a child process within [`Videos.remembering`], which they may crash.

        Raises:
            [`CrashError`]: If they do. Otherwise whatever the function raises.
        """
        return function(*args) if self._children is None else self._children.call(function, *args)

    def _measure(self, video: Video) -> None:
        """Read the length of a video, or remember why it cannot be read."""
        try:
            video.__dict__["duration"] = self.call(_read_length, video.path)
        except UNREADABLE:
            self._faults[video.path] = "the video cannot be read"
            return
        except CrashError:
            self._faults[video.path] = "the video crashes the program that reads it"
            return
        self._num_new += 1
        if self._notebook is not None and self._num_new % _WRITE_AFTER == 0:
            self._write_lengths()


def _read_length(path: Path) -> float:
    with open_video(path) as reader:
        return reader.seconds


def _state(path: Path) -> list[int]:
    """Return what changes with a file. A link that leads nowhere has nothing."""
    if not path.exists():
        return []
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _is_video(name: str) -> bool:
    guess = mimetypes.guess_type(name)[0] or ""
    return guess.startswith("video/") or os.path.splitext(name)[1].lower() in _VIDEO_NAMES


# -------------------------------------------------------------------------------------------------------- annotations


def read_json(path: Path) -> Any:
    """
    Read a JSON file into memory. A made-up file in COIN's layout, of 8 MB, took 39 MB. See [`mend_halves`] for
    characters that are not whole.

    Raises:
        `ValueError`: If it is not JSON in UTF-8. The message names the place.
        `OSError`: If it cannot be read.
    """
    try:
        return json.loads(mend_halves(path.read_bytes()).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}', byte {error.start}: not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from None
    except RecursionError:
        raise ValueError(f"'{path}': lists and objects are nested too deeply.") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """
    Yield the place and the row of each line of a file of JSON lines, `None` for a line that is no object.

    Raises:
        `OSError`: If the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    yield where, parse_row(mend_halves(line), where)
                except FaultyRowError:
                    yield where, None


def find_file(annotations: Path, *names: str) -> Path:
    """
    Return the annotation file: `annotations` if it is a file, or the first of these names in that folder.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    if annotations.is_file():
        return annotations
    if not annotations.is_dir():
        raise FileNotFoundError(f"There is no file or folder '{annotations}'.")
    for path in (annotations / name for name in names):
        if path.is_file():
            return path
    raise FileNotFoundError(f"The folder '{annotations}' has no {' and no '.join(names)}.")


def find_files(
    annotations: Path, files: Mapping[str, Mapping[str, Sequence[str]]], converter: Converter, *folders: str
) -> list[tuple[str, str, Path]]:
    """
    Return task, split and path of each annotation file that a converter is to read.

    Args:
        annotations (`Path`): A folder with files, or one file. Its name tells its task and split, unless only one is
            asked for.
        files (`Mapping`): Names of files by task and split. Of several names, the first that there is counts. The
            split "" is for files of all splits.
        converter ([`Converter`]): Its options say which tasks and splits are asked for.
        folders (`str`): Folders within `annotations` in which files may lie too.

    Raises:
        `FileNotFoundError`: If there is no such file or folder, or if a task of `--task` has no file in it.
        `ValueError`: If the name of a file does not tell its task.
    """
    wanted = [
        (task, split, names)
        for task in converter.chosen
        for split, names in files[task].items()
        if not split or converter.wants(split)
    ]
    listed = ", ".join(name for _, _, names in wanted for name in names)
    if annotations.is_file():
        found = [(task, split, annotations) for task, split, names in wanted if annotations.name in names]
        found = found or [(task, split, annotations) for task, split, _ in wanted if len(wanted) == 1]
        if not found:
            raise ValueError(f"--annotations {annotations} is none of the files asked for: {listed}.")
        return found
    if not annotations.is_dir():
        raise FileNotFoundError(f"There is no file or folder '{annotations}'.")
    there = [(task, split, find_below(annotations, names, ("", *folders))) for task, split, names in wanted]
    found = [(task, split, path) for task, split, path in there if path is not None]
    missing = set(converter.chosen if converter.task is not None else ()) - {task for task, _, _ in found}
    if missing or not found:
        lacks = f"no file of the task {' and '.join(sorted(missing))}" if missing else "none of the files"
        raise FileNotFoundError(f"The folder '{annotations}' has {lacks}. Those asked for are {listed}.")
    return found


def list_files(annotations: Path, endings: str) -> list[Path]:
    """
    Return the annotation file, or the files of a folder with one of these endings, such as ".json .jsonl".

    Sources whose files are known by their content use this; the others use [`find_files`].

    Raises:
        `FileNotFoundError`: If there is none.
    """
    if annotations.is_file():
        return [annotations]
    if not annotations.is_dir():
        raise FileNotFoundError(f"There is no file or folder '{annotations}'.")
    found = sorted(path for path in annotations.iterdir() if path.suffix.lower() in endings.split())
    if not found:
        raise FileNotFoundError(f"The folder '{annotations}' has no file that ends in {endings.replace(' ', ' or ')}.")
    return found


def split_of(path: Path, chosen: str | None) -> str:
    """
    Return the split that the name of a file tells, or the chosen one if it tells none.

    Raises:
        `ValueError`: If neither is known.
    """
    for part, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        if part in path.stem.lower():
            return split
    if chosen is None:
        raise ValueError(f"the name of '{path}' has no 'train', 'val' or 'test': name its split with --split.")
    return chosen


def find_below(root: Path, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path | None:
    """Return the first file of these names in folders of `root`, or `None`."""
    paths = (root / folder / name for name in names for folder in folders)
    return next((path for path in paths if path.is_file()), None)
