# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
AQTC (AssistQ, Wong et al., arXiv 2203.04203): after an instructional video, guide a user of a device step by step.

The question stands before the frames, and what the video's speaker says comes at its times. After the last frame the
assistant gives the first step, the user reports that it is done, and so on. Each step is one of some candidates. The
words of the user are ours. The layout is that of the loaders and scorers of showlab/Q2A, in its editions of 2022 and
2023, which have the same keys.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, list_files, read_json, split_of
from videollm_mod.train.data.dialogues import ceil_frame, clamp, clip, heard_message, to_number, to_text


QUESTION = "{} Guide me: give me one step at a time."
NEXT = "Done. What is the next step?"
BUTTONS = " In my picture: {}."
# A line of script.txt: "0:00:05-0:00:09 Press the power button."
_STAMP = re.compile(r"(\d+):(\d+):(\d+)-(\d+):(\d+):(\d+)\s+(.*)")
# Folders of the published archives, in which the folders of videos are. The test of 2023 asks about known videos.
_PARTS = ("train", "test", "test2023")


def find_buttons(text: str, names: Sequence[str]) -> list[str]:
    """
    Return the names of buttons in a text, in order. Of names that overlap, the longest counts.

    Example: in "Press button10, then button1", the names "button1" and "button10" are found once each. The published
    loaders look for substrings, so that they find "button1" twice.
    """
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest_first)
    return list(dict.fromkeys(re.findall(pattern, text))) if pattern else []


@dataclass
class Aqtc(Converter):
    """
    AQTC's `train.json`, `test_with_gt.json`, `test_without_gt.json` and their editions, or one of them.

    Args:
        script (`bool`, *optional*, defaults to `True`): Whether to show what the video's speaker says (`script.txt`).
        buttons (`bool`, *optional*, defaults to `False`): Whether the user says where the buttons of the candidates
            are in the picture of the own device (`buttons.csv`). The picture itself is not shown.
    """

    tasks: ClassVar[tuple[str, ...]] = ("guidance",)
    license: ClassVar[str] = "by agreement with the authors"

    script: bool = field(default=True, metadata={"help": "Show what the video's speaker says."})
    buttons: bool = field(default=False, metadata={"help": "Say where the candidates' buttons are in the picture."})

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a row for each question. Test questions without answers have no reply. See [`Converter.convert`]."""
        documents = {path: read_json(path) for path in list_files(annotations, ".json")}
        documents = {path: document for path, document in documents.items() if is_aqtc(document)}
        if not documents:
            raise ValueError(f"'{annotations}' has no file in the format of AQTC.")
        for path, document in documents.items():
            answered = path.with_name(path.name.replace("without_gt", "with_gt"))
            split = split_of(path, self.split)
            if not self.wants(split) or (answered != path and answered in documents):
                continue
            edition = "2023/" if "2023" in path.stem else ""
            for name, questions in document.items():
                notes.split = split
                if not isinstance(questions, list):
                    notes.leave_out(name, "", "is no list of questions")
                    continue
                video = find_video(name, videos, notes)
                for index, item in enumerate(questions) if video is not None else ():
                    row = self._to_row(f"{edition}{name}/{index}", name, item, video, annotations, notes)
                    if row is not None:
                        yield split, row

    def _to_row(
        self, where: str, name: str, item: Any, video: Video, annotations: Path, notes: Notes
    ) -> dict[str, Any] | None:
        item = item if isinstance(item, dict) else {}
        question, steps = to_text(item.get("question")), read_steps(item, where, notes)
        if question is None:
            notes.leave_out(where, "question", "there is no text")
        if question is None or not steps:
            return None
        folder, last = find_folder(name, video, annotations), video.last_frame(self.fps)
        places = read_buttons(folder / "buttons.csv", where, notes) if self.buttons else {}
        for index, step in enumerate(steps):
            ask = QUESTION.format(question) if index == 0 else NEXT
            step["ask"] = ask + describe_buttons(step, places.get(step["image"], {}))
        lines = read_script(folder / "script.txt", where, notes) if self.script else []
        said = [heard_message(text, clamp(ceil_frame(end, self.fps), last), self.fps) for end, text in lines]
        truth = {"folder": name, "question": question, "steps": steps}
        messages = [{"role": "user", "content": steps[0]["ask"]}, *said, *guide(steps, last / self.fps)]
        about = {"id": where, "task": "aqtc_guidance", "video": str(video.path)}
        return {**about, **clip(0, last, self.fps), "messages": messages, "truth": truth}


def is_aqtc(document: Any) -> bool:
    """Return whether a document has the layout `{folder: [{"question", "answers"}]}`."""
    lists = document.values() if isinstance(document, dict) else ()
    items = next((items for items in lists if isinstance(items, list) and items), [None])
    return isinstance(items[0], dict) and {"question", "answers"} <= items[0].keys()


def find_video(name: str, videos: Videos, notes: Notes) -> Video | None:
    """Return `video.mp4` or `video.mov` of a folder, in any of the archives' parts, or note why there is none."""
    places = [f"{name}/video", *(f"{part}/{name}/video" for part in _PARTS), name]
    return videos.open(notes, name, "", *places)


def find_folder(name: str, video: Video, annotations: Path) -> Path:
    """Return the folder of a video's script and buttons: the video's, or one beside the annotations."""
    root = annotations if annotations.is_dir() else annotations.parent
    folders = [video.path.parent, root / name, *(root / part / name for part in _PARTS)]
    return next((folder for folder in folders if (folder / "script.txt").is_file()), video.path.parent)


def read_steps(item: dict[str, Any], where: str, notes: Notes) -> list[dict[str, Any]]:
    """
    Return `candidates`, `correct` and `image` of each step, or note why there are none.

    `correct` is the index of the right candidate, from 0 (from 1 in the file), or `None` if it was not published.
    """
    answers, correct, images = (item.get(name) for name in ("answers", "correct", "images"))
    answers = answers if isinstance(answers, list) else []
    correct = [None] * len(answers) if correct is None else correct
    images = images if isinstance(images, list) else []
    if not answers:
        notes.leave_out(where, "answers", "there is no step")
        return []
    if not isinstance(correct, list) or len(correct) != len(answers):
        notes.leave_out(where, "correct", "the numbers of steps and right answers differ")
        return []
    steps = []
    for index, (candidates, right) in enumerate(zip(answers, correct, strict=True)):
        texts = [to_text(text) for text in candidates] if isinstance(candidates, list) else []
        number = None if right is None else to_number(right)
        if not texts or None in texts:
            notes.leave_out(where, f"answers[{index}]", "a candidate has no text: all steps")
            return []
        if right is not None and number not in range(1, len(texts) + 1):
            notes.leave_out(where, f"correct[{index}]", "is no number of a candidate: all steps")
            return []
        image = to_text(images[index]) if index < len(images) else None
        steps.append({"candidates": texts, "correct": None if number is None else int(number) - 1, "image": image})
    return steps


def guide(steps: Sequence[dict[str, Any]], time: float) -> list[dict[str, Any]]:
    """Return the dialogue after the video: the right steps, and the user's words between them. See [`take_step`]."""
    if any(step["correct"] is None for step in steps):
        return []
    messages: list[dict[str, Any]] = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        messages += take_step(step["candidates"][step["correct"]], following, time)
    return messages


def take_step(text: str, following: dict[str, Any] | None, time: float) -> list[dict[str, Any]]:
    """Return a step as the assistant gives it, and the user's question for the following step, if there is one."""
    said = [{"role": "assistant", "content": text, "time": time}]
    return said if following is None else [*said, {"role": "user", "content": following["ask"], "time": time}]


def read_script(path: Path, where: str, notes: Notes) -> list[tuple[float, str]]:
    """Return the end in seconds and the text of each line of a script, in order of time."""
    if not path.is_file():
        notes.mended(where, "script.txt", "there is no script: nothing is said")
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if found := _STAMP.fullmatch(line.strip()):
            hours, minutes, seconds = map(int, found.groups()[3:6])
            lines.append((3600.0 * hours + 60.0 * minutes + seconds, found[7]))
        elif line.strip():
            notes.mended(where, f"script.txt, line {number}", "has no time stamp and text: left out")
    return sorted(lines, key=lambda line: line[0])


def read_buttons(path: Path, where: str, notes: Notes) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the middle of each button in each picture, as shares of its width and height."""
    places: dict[str, dict[str, tuple[float, float]]] = {}
    if not path.is_file():
        notes.mended(where, "buttons.csv", "there are no buttons: none is named")
        return places
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            name, *box, image, width, height = cells if len(cells) == 8 else [""] * 8
            numbers = [to_number(cell) for cell in (*box, width, height)]
            if None in numbers or min(numbers[4:]) <= 0:
                notes.mended(where, f"buttons.csv, line {number}", "is no button: left out")
                continue
            x, y, w, h, whole_w, whole_h = numbers
            places.setdefault(image.strip(), {})[name.strip()] = ((x + w / 2) / whole_w, (y + h / 2) / whole_h)
    return places


def describe_buttons(step: dict[str, Any], places: dict[str, tuple[float, float]]) -> str:
    """Return a sentence that says where the buttons of a step's candidates are."""
    named = list(dict.fromkeys(name for text in step["candidates"] for name in find_buttons(text, list(places))))
    parts = [f"{name} is {places[name][0]:.0%} from the left and {places[name][1]:.0%} from the top" for name in named]
    return BUTTONS.format("; ".join(parts)) if parts else ""
