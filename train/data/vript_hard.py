# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Vript-Hard (arXiv 2406.06040): find a scene and reason (RR), put scenes in the order of their events (ERO), and
describe a scene without inventing things (HAL).

The question stands before the frames. The words around the published questions of RR and ERO are ours.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.choices import LETTERS, ask_choice, read_options
from videollm_mod.train.data.converters import Converter, Notes, Videos, list_files, read_json_lines
from videollm_mod.train.data.dialogues import clip, question_messages, to_text


ORDER = "{} Reply with the letters of the scenes in the order in which the video shows them, such as B, A, C."
SCENES = "ABC"
DESCRIBE = "Describe this video in detail."
# The tasks of open answers, and which field names the video.
_OPEN = {"rr_open": "video_id", "rr_open_clip": "clip_id"}


@dataclass
class VriptHard(Converter):
    """
    Vript-Hard's `RR_annotations.jsonl`, `ERO_annotations.jsonl` and `HAL_annotations.jsonl`, in one folder, or some of
    them.

    The task "rr" shows the complete video, and "rr_clip" the scene that the question is about, `<clip_id>.mp4`. "hal"
    shows such a scene too. "rr_open" and "rr_open_clip" ask without options.
    """

    tasks: ClassVar[tuple[str, ...]] = ("rr", "rr_clip", "rr_open", "rr_open_clip", "ero", "hal")
    license: ClassVar[str] = "academic use only, no distribution"

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of each question; all are for tests. See [`Converter.convert`]."""
        notes.split, known = "test", False
        for path in list_files(annotations, ".jsonl .json"):
            for index, (where, row) in enumerate(read_json_lines(path)):
                row = {} if row is None else row
                known = known or {"video_id", "question"} <= row.keys() or {"clip_id", "content"} <= row.keys()
                if "multiple_choice" in row:
                    yield from self._open_rows(row, where, index, videos, notes)
                    kinds = [("rr", "video_id"), ("rr_clip", "clip_id")]
                    is_asked = any(task in self.chosen for task, _ in kinds)
                    asked = read_choice(row, where, notes) if is_asked else None
                elif "question" in row:
                    asked, kinds = read_order(row, where, notes), [("ero", "video_id")]
                elif "content" in row:
                    asked, kinds = read_description(row, where, notes), [("hal", "clip_id")]
                else:
                    notes.leave_out(where, "", "is no question of Vript-Hard")
                    continue
                for task, field in kinds if asked is not None else ():
                    if task in self.chosen:
                        yield from self._row(task, str(row.get(field)), index, asked, videos, notes)
        if not known:
            raise ValueError(f"'{annotations}' has no file in the format of Vript-Hard.")

    def _open_rows(
        self, row: dict[str, Any], where: str, index: int, videos: Videos, notes: Notes
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        tasks = [(task, field) for task, field in _OPEN.items() if task in self.chosen]
        asked = read_open(row, where, notes) if tasks else None
        for task, field in tasks if asked is not None else ():
            yield from self._row(task, str(row.get(field)), index, asked, videos, notes)

    def _row(
        self, task: str, name: str, index: int, asked: tuple[str, dict[str, Any]], videos: Videos, notes: Notes
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        (question, truth), where = asked, f"{name}/{index}/{task}"
        video = videos.open(notes, where, "video_id", name)
        if video is not None:
            last = video.last_frame(self.fps)
            answers = {"order": ", ".join, "content": itemgetter(0), "answer": str, "open_answer": str}
            answer = next(make(truth[name]) for name, make in answers.items() if name in truth)
            about = {"id": where, "task": f"vript_hard_{task}", "video": str(video.path), "truth": truth}
            messages = question_messages(question, answer, last, self.fps)
            yield "test", {**about, **clip(0, last, self.fps), "messages": messages}


def read_choice(row: dict[str, Any], where: str, notes: Notes) -> tuple[str, dict[str, Any]] | None:
    """Return the question with its options and its truth, `options` and `answer` (a letter), or note what is wrong."""
    question, hint, options = to_text(row.get("question")), to_text(row.get("hint")), row.get("multiple_choice")
    texts, answer = read_options(options), row.get("multiple_choice_answer")
    if question is None:
        notes.leave_out(where, "question", "there is no text")
    elif texts is None or answer not in options:
        notes.leave_out(where, "multiple_choice", "are no texts, or the answer is none of them")
    else:
        return ask_choice(_hinted(question, hint), texts), {"options": texts, "answer": LETTERS[options.index(answer)]}
    return None


def read_open(row: dict[str, Any], where: str, notes: Notes) -> tuple[str, dict[str, Any]] | None:
    """Return the question without options and its truth, `question` and `open_answer`, or note what is wrong."""
    question, answer = to_text(row.get("question")), to_text(row.get("open_answer"))
    if question is None or answer is None:
        notes.leave_out(where, "question" if question is None else "open_answer", "there is no text")
        return None
    asked = _hinted(question, to_text(row.get("hint")))
    return asked, {"question": asked, "open_answer": answer}


def _hinted(question: str, hint: str | None) -> str:
    return question if hint is None else f"{question} Hint: {hint}"


def read_order(row: dict[str, Any], where: str, notes: Notes) -> tuple[str, dict[str, Any]] | None:
    """Return the question and its truth, `order` (three letters), or note what is wrong."""
    question, answer = to_text(row.get("question")), row.get("answer")
    text = " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    order = re.findall(rf"[{SCENES}]", text)
    if question is None:
        notes.leave_out(where, "question", "there is no text")
    elif sorted(order) != list(SCENES):
        notes.leave_out(where, "answer", "is no order of three scenes")
    else:
        return ORDER.format(question), {"order": order}
    return None


def read_description(row: dict[str, Any], where: str, notes: Notes) -> tuple[str, dict[str, Any]] | None:
    """Return the question and its truth, `content` (descriptions of the scene), or note what is wrong."""
    content = row["content"] if isinstance(row["content"], list) else [row["content"]]
    texts = [text for text in map(to_text, content) if text is not None]
    if texts:
        return DESCRIBE, {"content": texts}
    notes.leave_out(where, "content", "there is no text")
    return None
