# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
ProactiveVideoQA (arXiv 2507.09313): questions that the model answers in spans of a video, without being asked again.

The layout was read from programs that evaluate on it. The benchmark's own repository and files were not at hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, read_json
from videollm_mod.train.data.dialogues import ceil_frame, clamp, clip, to_number, to_text
from videollm_mod.train.data.json_streams import TOLERANCE, take_pair


_SILENT = "NO REPLY"


@dataclass
class ProactiveVideoQA(Converter):
    """The files `{WEB,EGO,TV,VAD}/anno.json`: the folder above them, or one of them."""

    tasks: ClassVar[tuple[str, ...]] = ("web", "ego", "tv", "vad")
    license: ClassVar[str] = "unknown (not verified). Videos keep the terms of their sources."

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the row of each question. See [`Converter.convert`]."""
        notes.split = "test"
        for task, path in self._files(annotations).items():
            content = read_json(path)
            if not isinstance(content, list):
                raise ValueError(f"'{path}' is no list: give anno.json as it was published.")
            for index, item in enumerate(content):
                where = f"{path.parent.name}/{path.name}, entry {index}"
                if not isinstance(item, dict):
                    notes.leave_out(where, "", "is no object")
                elif row := self._row(task, index, item, videos, notes, where):
                    yield "test", row

    def _files(self, annotations: Path) -> dict[str, Path]:
        if annotations.is_file():
            named = [task for task in self.chosen if task == annotations.parent.name.lower()] or list(self.chosen)
            if len(named) != 1:
                raise ValueError(f"--task must say which of {', '.join(self.tasks)} '{annotations}' is.")
            return {named[0]: annotations}
        found = {task: annotations / task.upper() / "anno.json" for task in self.chosen}
        found = {task: path for task, path in found.items() if path.is_file()}
        missing = [task for task in self.chosen if task not in found]
        if missing and (self.task is not None or not found):
            raise FileNotFoundError(f"The folder '{annotations}' has no {missing[0].upper()}/anno.json.")
        return found

    def _row(
        self, task: str, index: int, item: dict[str, Any], videos: Videos, notes: Notes, where: str
    ) -> dict[str, Any] | None:
        asked = _user_messages(item.get("conversation"), notes, where)
        if not asked:
            notes.leave_out(where, "conversation", "there is no question")
            return None
        spans = _spans(item.get("answer"), asked[0][1], notes, where)
        name = to_text(item.get("video"))
        if not spans:
            notes.leave_out(where, "answer", "no span is left")
            return None
        if name is None:
            notes.leave_out(where, "video", "there is no text")
            return None
        video = videos.open(notes, where, "video", f"{task.upper()}/videos/{name}", f"videos/{name}", name)
        spans = [] if video is None else _within(spans, video, notes, where)
        if not spans:
            return None
        last = clamp(ceil_frame(spans[-1]["end"], self.fps), video.last_frame(self.fps))
        about = {"id": f"{task}/{_name(item, index)}", "task": f"proactive_video_qa_{task}", "video": str(video.path)}
        messages = _messages(asked, spans, last, self.fps)
        return {**about, **clip(0, last, self.fps), "messages": messages, "truth": {"spans": spans}}


def _name(item: dict[str, Any], index: int) -> str:
    value = item.get("question_id")
    is_name = isinstance(value, (int, str)) and not isinstance(value, bool)
    return (to_text(str(value)) if is_name else None) or f"entry {index}"


def _user_messages(value: Any, notes: Notes, where: str) -> list[tuple[float, str]]:
    """Return times and texts of what the user says: the question, then perhaps subtitles."""
    found = []
    for k, turn in enumerate(value if isinstance(value, list) else []):
        turn = turn if isinstance(turn, dict) else {}
        text, time = to_text(turn.get("content")), to_number(turn.get("time", 0.0))
        if turn.get("role", "user") != "user":
            continue
        if text is None or time is None or time < 0:
            notes.leave_out(where, f"conversation[{k}]", "there is no text or no time")
        else:
            found.append((time, text))
    return found


def _spans(value: Any, question: str, notes: Notes, where: str) -> list[dict[str, Any]]:
    """Return the spans in which the model should reply, in order of time."""
    spans = []
    for k, answer in enumerate(value if isinstance(value, list) else []):
        answer, place = answer if isinstance(answer, dict) else {}, f"answer[{k}]"
        text = to_text(answer.get("content"))
        if text is None or text == _SILENT:
            notes.leave_out(where, place, "there is no text to say")
        elif times := take_pair(answer.get("reply_timespan"), notes, where, f"{place}.reply_timespan"):
            related = take_pair(answer.get("related_timespan"), Notes(), where, place) or times
            asks = to_text(answer.get("question")) or question
            about = {"question": asks, "content": text, "start": times[0], "end": times[1]}
            spans.append({**about, "related_end": related[1]})
    return sorted(spans, key=lambda span: (span["end"], span["start"]))


def _within(spans: list[dict[str, Any]], video: Video, notes: Notes, where: str) -> list[dict[str, Any]]:
    """Return the spans that begin before the end of the video, cut there."""
    kept = []
    for span in spans:
        if span["start"] >= video.duration:
            notes.leave_out(where, "answer", "after the end of the video")
            continue
        if span["end"] > video.duration + TOLERANCE:
            notes.mended(where, "answer", "ends after the end of the video: cut there")
        kept.append({**span, **{name: min(span[name], video.duration) for name in ("end", "related_end")}})
    return kept


def _messages(
    asked: list[tuple[float, str]], spans: list[dict[str, Any]], last: int, fps: float
) -> list[dict[str, Any]]:
    """Return what the user says, and each answer at the end of its span, where it is surely known."""
    said = [(min(ceil_frame(time, fps), last), 0, text) for time, text in asked if ceil_frame(time, fps) <= last]
    said += [(clamp(ceil_frame(span["end"], fps), last), 1, span["content"]) for span in spans]
    roles = ("user", "assistant")
    return [
        {"role": roles[kind], "content": text, "time": frame / fps}
        for frame, kind, text in sorted(said, key=lambda entry: entry[:2])
    ]
