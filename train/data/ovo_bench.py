# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
OVO-Bench (arXiv 2501.05510): questions about the past, the present and the future of a video that is still running.

The clip of a question runs from the beginning of the video to the second of the question, rounded up, as the
benchmark's code cuts it. The question stands after the last frame. Tasks about the future are asked at several test
points, and each of them is a row. The words of the questions are ours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from videollm_mod.train.data.choices import LETTERS, ask_choice, letter_of, read_options
from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, find_file, read_json
from videollm_mod.train.data.dialogues import ceil_frame, clip, last_frame, to_flag, to_number, to_text


GROUPS = {
    "backward": ("epm", "asi", "hld"),
    "realtime": ("ocr", "acr", "atr", "stu", "fpd", "ojr"),
    "forward": ("rec", "ssr", "crr"),
}
_TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
_QUESTIONS = {
    "rec": "In the video, people do this, perhaps several times: {text}. How many times have they completed it so "
    "far, all people together? Reply with one number only.",
    "ssr": "One step of a procedure is: {text}. Is someone in the video doing this step right now? "
    "Reply Yes or No only.",
    "crr": "A question about the latest part of the video is: {text} Has the video shown enough by now to answer it? "
    "Reply Yes or No only.",
}


@dataclass
class OVOBench(Converter):
    """OVO-Bench's annotations, `ovo_bench_new.json` (0.9 MB), and its source videos or its clips."""

    tasks: ClassVar[tuple[str, ...]] = _TASKS
    license: ClassVar[str] = (
        "CC BY-NC-SA 4.0 (README; the LICENSE file says MIT). Videos keep the terms of their sources."
    )

    context: float = field(
        default=0.0,
        metadata={"help": "Seconds before the question that a clip shows. 0, as published: all from the beginning."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 0:
            raise ValueError(f"--context must not be negative, got {self.context:g}.")

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of each item. See [`Converter.convert`]."""
        path = find_file(annotations, "ovo_bench_new.json", "data/ovo_bench_new.json")
        items = read_json(path)
        if not isinstance(items, list):
            raise ValueError(f"'{path}' is no list: give ovo_bench_new.json as it was published.")
        notes.split, sources = "test", _source_folders(items)
        for index, item in enumerate(items):
            where = f"item {index}"
            name = _name(item)
            if name is None:
                notes.leave_out(where, "id", "there is no id")
            elif (task := str(item.get("task")).lower()) not in _TASKS:
                notes.leave_out(f"id {name}", "task", "is none of the twelve tasks")
            elif task in self.chosen:
                asked = self._future(item, task) if task in GROUPS["forward"] else self._present(item, notes)
                for question in asked:
                    yield from self._row(name, item, task, question, videos, sources, notes)

    def _present(self, item: dict[str, Any], notes: Notes) -> Iterator["Question"]:
        """Yield the question of an item with options."""
        text, options = to_text(item.get("question")), read_options(item.get("options"))
        right = to_number(item.get("gt"))
        asks = truth = None
        place, fault = "question", "there is no text"
        if options is None or right not in range(len(options)):
            place, fault = "options", "are no texts, or `gt` is not the place of one"
        elif text is not None:
            letters = [letter_of(option) for option in item["options"]]
            if None not in letters and letters != list(LETTERS[: len(letters)]):
                notes.mended(f"id {item['id']}", "options", "letters out of order: removed")
            asks, truth = ask_choice(text, options), {"options": options, "answer": LETTERS[int(right)]}
        yield Question("", item.get("realtime"), asks, truth, place, fault)

    def _future(self, item: dict[str, Any], task: str) -> Iterator["Question"]:
        """Yield the question of an item about the future at each test point."""
        points = item.get("test_info")
        if not isinstance(points, list) or not points:
            yield Question("", 0, None, None, "test_info", "there is no test point")
            return
        for index, point in enumerate(points):
            point, place = point if isinstance(point, dict) else {}, f"test_info[{index}]"
            text = {"rec": item.get("activity"), "ssr": point.get("step"), "crr": item.get("question")}[task]
            count, flag = to_number(point.get("count")), to_flag(point.get("type"))
            truth = None if flag is None else {"answer": "Yes" if flag else "No"}
            if task == "rec":
                truth = {"answer": str(int(count))} if count is not None and count >= 0 else None
            text = to_text(text)
            asks = None if text is None else _QUESTIONS[task].format(text=text.rstrip(".") if task != "crr" else text)
            fault = "there is no text" if text is None else "there is no count or type"
            yield Question(f"_{index}", point.get("realtime"), asks, truth, place, fault)

    def _row(
        self,
        name: str,
        item: dict[str, Any],
        task: str,
        question: "Question",
        videos: Videos,
        sources: set[str],
        notes: Notes,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        where, time = f"id {name}", to_number(question.time)
        if question.asks is None or question.truth is None:
            notes.leave_out(where, question.place, question.fault)
            return
        if time is None or time < 0:
            notes.leave_out(where, "realtime", "there is no time")
            return
        video = _find_video(f"{name}{question.suffix}", item.get("video"), videos, sources, notes, where)
        if video is None:
            return
        if video.duration < time - 1:
            notes.mended(where, "realtime", "after the end of the video: the clip ends with it")
        last = last_frame(min(math.ceil(time) or 1, video.duration), self.fps)
        first = max(last + 1 - ceil_frame(self.context, self.fps), 0) if self.context else 0
        asked = {"role": "user", "content": question.asks, "time": last / self.fps}
        answered = {"role": "assistant", "content": question.truth["answer"], "time": last / self.fps}
        about = {"id": f"{name}{question.suffix}", "task": f"ovo_bench_{task}", "video": str(video.path)}
        yield "test", {**about, **clip(first, last, self.fps), "messages": [asked, answered], "truth": question.truth}


@dataclass(frozen=True)
class Question:
    """
    A question of an item.

    Args:
        suffix (`str`): What follows the item's id: nothing, or the number of the test point.
        time: The value of `realtime`.
        asks (`str`, *optional*): The words, or `None` if the item has none.
        truth (`dict`, *optional*): What the score needs, or `None` if the item has none.
        place, fault (`str`): Field and reason, if words or truth are missing.
    """

    suffix: str
    time: Any
    asks: str | None
    truth: dict[str, Any] | None
    place: str
    fault: str


def _name(item: Any) -> str | None:
    value = item.get("id") if isinstance(item, dict) else None
    is_name = isinstance(value, (int, str)) and not isinstance(value, bool)
    return to_text(str(value)) if is_name else None


def _source_folders(items: list[Any]) -> set[str]:
    """Return the names of the folders of source videos, such as "AutoEvalMetaData"."""
    paths = [item.get("video") for item in items if isinstance(item, dict)]
    return {PurePosixPath(path).parent.name for path in paths if isinstance(path, str)} - {""}


def _find_video(name: str, source: Any, videos: Videos, sources: set[str], notes: Notes, where: str) -> Video | None:
    """
    Return the clip of a question, such as `12_0.mp4`, or the source video, such as `COIN/abc.mp4`.

    Names of source videos may be numbers too: `AutoEvalMetaData/106.mp4` is not the clip of the item 106.
    """
    clips = (videos.find(f"{folder}{name}.mp4") for folder in ("", "chunked_videos/", "data/chunked_videos/"))
    found = next((video for video in clips if video is not None and video.path.parent.name not in sources), None)
    if found is not None:
        return videos.open(notes, where, "id", found.path.relative_to(videos.folder).as_posix())
    path = source if isinstance(source, str) else ""
    names = [f"{folder}{path}" for folder in ("", "src_videos/", "data/src_videos/")] if path else []
    stem = PurePosixPath(path).stem
    return videos.open(notes, where, "video", *names, *([] if stem.isdigit() or not stem else [stem]))
