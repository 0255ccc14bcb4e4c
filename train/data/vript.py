# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Vript (Yang et al., arXiv 2406.06040): long captions of the scenes of a video, said when each scene is over.

The files of captions have no times. A scene's time is in `<id>_cut_meta.json`, or follows from the lengths of all
scenes before it in `<id>_asr.jsonl`, because scenes fill a video without gaps. The words of the user are ours.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, read_json, read_json_lines
from videollm_mod.train.data.dense_captions import SAME_LENGTH, as_caption
from videollm_mod.train.data.dialogues import (
    ceil_frame,
    clamp,
    clip,
    heard_message,
    join_events,
    reply_messages,
    to_number,
    to_text,
)


_ENDINGS = ("_caption.json", "_asr.jsonl", "_cut_meta.json")
_SCENE = re.compile(r"-Scene-(\d+)(?:\.\w+)?$")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
# Names under which a scene's start and end may be. The published names could not be looked up.
_CUT_TIMES = (("start", "end"), ("start_time", "end_time"))


@dataclass
class Vript(Converter):
    """
    Vript's folder, with `<id>_caption.json`, `<id>_asr.jsonl` and `<id>_cut_meta.json` in folders of any depth.

    The last two may also be in the folder of the videos. Videos are the untrimmed ones, `<id>.mp4`.

    Args:
        say_at (`str`, *optional*, defaults to `"end"`): When a scene is described: when it ends, or "start": one frame
            after it starts.
        titles (`bool`, *optional*, defaults to `False`): Whether to say only the titles of scenes.
        shots (`bool`, *optional*, defaults to `False`): Whether to say the shot type too.
        camera (`bool`, *optional*, defaults to `False`): Whether to say the movement of the camera too.
        speech (`bool`, *optional*, defaults to `False`): Whether to show what the video's speakers say.
    """

    tasks: ClassVar[tuple[str, ...]] = ("scenes",)
    license: ClassVar[str] = "academic use only, no distribution"

    say_at: str = field(
        default="end",
        metadata={"help": "Say a scene when it ends, or a frame after its start.", "choices": ["end", "start"]},
    )
    titles: bool = field(default=False, metadata={"help": "Say only the titles of scenes."})
    shots: bool = field(default=False, metadata={"help": "Say the shot type too."})
    camera: bool = field(default=False, metadata={"help": "Say the movement of the camera too."})
    speech: bool = field(default=False, metadata={"help": "Show what the video's speakers say."})

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a row for each video; all are for training. See [`Converter.convert`]."""
        given = find_scene_files(annotations)
        files = {**find_scene_files(videos.folder), **given}
        captions = sorted(name for name in given if name.endswith("_caption.json"))
        if annotations.is_file():
            captions = [name for name in captions if name == annotations.name]
        if not captions:
            raise ValueError(f"'{annotations}' has no file <id>_caption.json.")
        for name in captions:
            notes.split = "train"
            where = name.removesuffix("_caption.json")
            video = videos.open(notes, where, "", where)
            if video is not None and (row := self._to_row(where, files, name, video, notes)):
                yield "train", row

    def _to_row(
        self, where: str, files: dict[str, Path], name: str, video: Video, notes: Notes
    ) -> dict[str, Any] | None:
        scenes, asr = read_scenes(files[name], where, notes), files.get(f"{where}_asr.jsonl")
        speech = {} if asr is None else read_speech(asr, where, notes)
        cut = files.get(f"{where}_cut_meta.json")
        spans = scene_spans(
            {number: scene.seconds for number, scene in speech.items()},
            {} if cut is None else read_cuts(cut, where, notes),
        )
        last = video.last_frame(self.fps)
        events = self._events(where, scenes, spans, video, notes)
        if not events:
            notes.leave_out(where, "data", "no scene is left")
            return None
        if abs(max(end for _, end in spans.values()) - video.duration) > SAME_LENGTH:
            notes.mended(where, f"{where}_asr.jsonl", "the scenes do not fill the video: kept")
        says_end = self.say_at == "end"
        replies = [(end if says_end else start + 1 / self.fps, text, "data") for start, end, text in events]
        if any(time * self.fps > last + 1 for time, *_ in replies):
            notes.mended(where, "data", "after the end of the video: moved to the last frame")
        messages = reply_messages(join_events(replies, last, self.fps, notes, where), self.fps)
        if self.speech:
            messages = self._with_speech(messages, speech, spans, last, where, notes)
        truth = {
            "duration": video.duration,
            "timestamps": [[start, end] for start, end, _ in events],
            "sentences": [text for *_, text in events],
            "references": [],
            "say_at": self.say_at,
        }
        question = {"role": "user", "content": self.question()}
        about = {"id": where, "task": "vript_scenes", "video": str(video.path)}
        return {**about, **clip(0, last, self.fps), "messages": [question, *messages], "truth": truth}

    def question(self) -> str:
        """Return what the user asks for."""
        what = "Give each scene of the video a title" if self.titles else "Describe each scene of the video in detail"
        more = [name for name, chosen in (("shot type", self.shots), ("camera movement", self.camera)) if chosen]
        more = f", with its {' and '.join(more)}," if more else ""
        return f"{what}{more} when it {'is over' if self.say_at == 'end' else 'starts'}."

    def _events(
        self,
        where: str,
        scenes: dict[int, dict[str, Any]],
        spans: dict[int, tuple[float, float]],
        video: Video,
        notes: Notes,
    ) -> list[tuple[float, float, str]]:
        """Return start, end and text of each scene that has all of them, in order of time."""
        events = []
        for number, scene in sorted(scenes.items()):
            place, text = f"data[{number}]", self._text(scene)
            if text is None:
                notes.leave_out(where, f"{place}.caption", "there is no text")
            elif number not in spans:
                notes.leave_out(where, place, "has no time: a scene before it has no length")
            elif spans[number][0] >= video.duration:
                notes.leave_out(where, place, "starts after the end of the video")
            else:
                events.append((*spans[number], text))
        return sorted(events, key=lambda event: event[:2])

    def _text(self, scene: dict[str, Any]) -> str | None:
        """Return what is said about a scene, or `None` if a part of it is missing."""
        names = ["scene_title"] if self.titles else ["scene_title", "content"]
        names += ["shot_type"] * self.shots + ["camera_movement"] * self.camera
        parts = [to_text(scene.get(name)) for name in names]
        return None if None in parts else " ".join(map(as_caption, parts))

    def _with_speech(
        self,
        messages: list[dict[str, Any]],
        speech: dict[int, "Speech"],
        spans: dict[int, tuple[float, float]],
        last: int,
        where: str,
        notes: Notes,
    ) -> list[dict[str, Any]]:
        """Return messages with what is said in the video, as messages of the user. They come before replies."""
        said = []
        for number, scene in sorted(speech.items()):
            start, scene_end = spans.get(number, (0.0, 0.0))
            for end, text in scene.lines if number in spans else ():
                if start + end > scene_end:
                    notes.mended(where, f"{where}_asr.jsonl", "speech ends after its scene: cut")
                frame = clamp(ceil_frame(min(start + end, scene_end), self.fps), last)
                said.append(heard_message(text, frame, self.fps))
        return sorted([*said, *messages], key=lambda message: message["time"])


@dataclass(frozen=True)
class Speech:
    """
    What is said in a scene.

    Args:
        seconds (`float`): Length of the scene.
        lines (`list[tuple[float, str]]`): Ends in seconds of the scene, and texts.
    """

    seconds: float
    lines: list[tuple[float, str]]


def find_scene_files(place: Path) -> dict[str, Path]:
    """
    Return the files of scenes by name: in folders of any depth, or beside a file.

    Raises:
        `FileNotFoundError`: If there is no such file or folder.
    """
    if not place.exists():
        raise FileNotFoundError(f"There is no file or folder '{place}'.")
    paths = place.parent.iterdir() if place.is_file() else _walk(place)
    return {path.name: path for path in paths if path.name.endswith(_ENDINGS)}


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names)


def scene_spans(seconds: dict[int, float], cuts: dict[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """
    Return start and end of scenes in seconds, by their numbers from 1.

    Args:
        seconds (`dict[int, float]`): Lengths of scenes. The sum stops at the first that is missing.
        cuts (`dict[int, tuple[float, float]]`): Known starts and ends, which are taken first.
    """
    spans, number, start = {}, 1, 0.0
    while number in seconds:
        spans[number] = (start, start + seconds[number])
        number, start = number + 1, start + seconds[number]
    return {**spans, **cuts}


def scene_number(name: Any) -> int | None:
    """Return the number of a scene by its id, such as "0J7UPHL08fU-Scene-012", with or without an extension."""
    found = _SCENE.search(name) if isinstance(name, str) else None
    return int(found[1]) if found else None


def read_scenes(path: Path, where: str, notes: Notes) -> dict[int, dict[str, Any]]:
    """Return the captions of scenes by number, and note those without."""
    try:
        content = read_json(path)
    except ValueError:
        notes.leave_out(where, path.name, "is not JSON")
        return {}
    content = content if isinstance(content, dict) else {}
    meta, scenes = content.get("meta"), content.get("data")
    if isinstance(meta, dict) and meta.get("integrity") is False:
        notes.mended(where, "meta.integrity", "scenes are missing: the others are kept")
    found = {}
    for name, scene in scenes.items() if isinstance(scenes, dict) else ():
        number, caption = scene_number(name), scene.get("caption") if isinstance(scene, dict) else None
        if number is None or not isinstance(caption, dict):
            notes.leave_out(where, f"data.{name}", "is no scene with a caption")
        else:
            found[number] = caption
    return found


def read_speech(path: Path, where: str, notes: Notes) -> dict[int, Speech]:
    """Return the lengths of scenes and what is said in them, by number. The file has them in any order."""
    found = {}
    for place, row in read_json_lines(path):
        row = {} if row is None else row
        number, seconds = scene_number(row.get("clip_id")), to_number(row.get("duration"))
        if number is None or seconds is None or seconds <= 0:
            notes.mended(where, place, "has no scene and length: left out")
            continue
        lines = []
        for item in row["scene_text"] if isinstance(row.get("scene_text"), list) else ():
            span = item.get("span") if isinstance(item, dict) else None
            end = to_number(span[1]) if isinstance(span, list) and len(span) == 2 else None
            text = to_text(item.get("text")) if isinstance(item, dict) else None
            if end is not None and text is not None:
                lines.append((max(end, 0.0), text))
            else:
                notes.mended(where, f"{place}.scene_text", "speech without time or text: left out")
        found[number] = Speech(seconds, lines)
    return found


def read_cuts(path: Path, where: str, notes: Notes) -> dict[int, tuple[float, float]]:
    """Return start and end of scenes in seconds, by number, of those that have both."""
    try:
        content = read_json(path)
    except ValueError:
        notes.mended(where, path.name, "is not JSON: left out")
        return {}
    clips, found = content.get("clips") if isinstance(content, dict) else None, {}
    for index, item in enumerate(clips if isinstance(clips, list) else ()):
        item = item if isinstance(item, dict) else {}
        number = scene_number(item.get("clip_id"))
        pairs = [[_seconds(item.get(name)) for name in names] for names in _CUT_TIMES]
        start, end = next((pair for pair in pairs if None not in pair), (None, None))
        if number is None or start is None or not start < end:
            notes.mended(where, f"{path.name}, clips[{index}]", "has no scene and times: left out")
        else:
            found[number] = (start, end)
    return found


def _seconds(value: Any) -> float | None:
    """Return seconds, also from a clock such as "0:01:02.5"."""
    clock = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if clock:
        return 3600.0 * int(clock[1] or 0) + 60.0 * int(clock[2]) + float(clock[3])
    return to_number(value)
