# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
COIN (Tang et al., CVPR 2019): five questions about the steps of instructional videos, as VideoLLM-online asks them.

The question stands before the frames of a segment, and the answer after them. What they ask, the clips and the answers
follow VideoLLM-online's code (LIVE). The words of the questions are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, find_file, read_json
from videollm_mod.train.data.dialogues import (
    as_sentence,
    begins_after,
    ceil_frame,
    clamp,
    clip,
    question_messages,
    reply_messages,
    to_text,
)
from videollm_mod.train.data.json_streams import take_pair, take_span


# The most steps that a procedure asks for, as in LIVE.
MOST_STEPS = 5
# LIVE's two repairs of labels.
_LABELS = {
    "process (crop, fold) paper": "crop and fold paper",
    "try to press gun head, spray residual old grease": "try to press gun head to spray residual old grease",
}
# LIVE's repairs of acronyms, after each capital letter became a space and a small letter.
_ACRONYMS = {" t v": " TV", " c d": " CD", "s i m": "SIM", "n b a": "NBA", "s s d": "SSD", "r j45": "RJ45"}
_SPLITS = {"train": "train", "test": "test", "val": "validation"}
_ONLY = "Answer with its name only."
_LIST = "Write one action a line, with a number before it, and nothing else."
QUESTIONS = {
    "step": f"Which action does the video show? {_ONLY}",
    "task": f"Which activity does the video show as a whole? {_ONLY}",
    "next": f"Which action comes next in the video? {_ONLY}",
    "procedure": f"Which {{count}} actions come next in the video? {_LIST}",
    "taskprocedure": f"The goal is to {{goal}}. Which {{count}} actions come next in the video? {_LIST}",
    # What `taskprocedure` asks if only one step is left.
    "tasknext": f"The goal is to {{goal}}. Which action comes next in the video? {_ONLY}",
    "streaming": "I want to {goal}. Tell me which step begins, what to try next, and when a step is done.",
}


@dataclass(frozen=True)
class Step:
    """
    A step of a video.

    Args:
        index (`int`): Its place in the file.
        label (`str`, *optional*): Its cleaned label, or `None` if the file has none.
        times (`tuple[float, float]`, *optional*): Its start and end in seconds, or `None` if they cannot be used.
    """

    index: int
    label: str | None
    times: tuple[float, float] | None

    @property
    def place(self) -> str:
        """Its place in the file, for notes."""
        return f"annotation[{self.index}]"


@dataclass
class Coin(Converter):
    """COIN's annotations, `COIN.json` (4 MB)."""

    tasks: ClassVar[tuple[str, ...]] = ("step", "task", "next", "procedure", "taskprocedure", "streaming")
    license: ClassVar[str] = "CC BY-NC 4.0"
    may_be_shared: ClassVar[bool] = True

    task: str | None = field(
        default="step,task,next,procedure,taskprocedure",
        metadata={"help": "Tasks to prepare, separated by commas. `streaming` is a sixth."},
    )
    taxonomy: Path | None = field(
        default=None, metadata={"help": "COIN's taxonomy.xlsx, for the label dictionaries. Default: all of COIN.json."}
    )

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of each video. See [`Converter.convert`]."""
        path = find_file(annotations, "COIN.json", "coin.json")
        content = read_json(path)
        entries = content.get("database") if isinstance(content, dict) else None
        if not isinstance(entries, dict):
            raise ValueError(f"'{path}' has no object `database`: give COIN.json as it was published.")
        goals, labels = _labels(entries) if self.taxonomy is None else read_taxonomy(self.taxonomy)
        asked = {f"coin_{task}": goals if task == "task" else labels for task in self.chosen if task != "streaming"}
        self.labels = {name: sorted(found) for name, found in asked.items()}
        for name, entry in entries.items():
            split = _split(entry, name, notes)
            if split is None or not self.accepts(split, name, notes):
                continue
            notes.split = split
            if video := videos.open(notes, name, "", name):
                yield from ((split, row) for row in self._rows(name, entry, video, notes))

    def _rows(self, name: str, entry: dict[str, Any], video: Video, notes: Notes) -> Iterator[dict[str, Any]]:
        goal = to_text(entry.get("class"))
        if goal is None:
            notes.leave_out(name, "class", "there is no text")
        lesson = Lesson(name, video, self.fps, clean_goal(goal or ""), read_steps(entry, name, notes))
        frames = {step.index: lesson.frames(step.times, f"{step.place}.segment", notes) for step in lesson.steps}
        for task in self.chosen:
            if task == "task" and goal is not None:
                yield from lesson.task_row(take_span(entry, ("start", "end"), notes, name, ""), notes)
            elif task == "streaming" and goal is not None:
                yield from lesson.streaming_row(frames)
            elif task == "step":
                yield from lesson.step_rows(frames)
            elif task == "next" or task == "procedure" or (task == "taskprocedure" and goal is not None):
                yield from lesson.next_rows(task, frames, 1 if task == "next" else MOST_STEPS)


@dataclass
class Lesson:
    """
    A video of COIN, and the rows made from it.

    Args:
        name (`str`): Its YouTube id.
        video ([`Video`]): The file.
        fps (`float`): Frames per second.
        goal (`str`): The cleaned task, empty if there is none.
        steps (`list[Step]`): Its steps, in order of time.
    """

    name: str
    video: Video
    fps: float
    goal: str
    steps: list[Step]

    def frames(self, times: tuple[float, float] | None, field: str, notes: Notes) -> tuple[int, int] | None:
        """Return the first frames at or after a start and an end, or `None` if there are no times or no frames."""
        if times is None:
            return None
        last, where = self.video.last_frame(self.fps), (self.name, field)
        first, end = (ceil_frame(time, self.fps) for time in times)
        if begins_after(times[0], last, self.fps):
            notes.leave_out(*where, "after the end of the video")
            return None
        if end > last + 1:
            notes.mended(*where, "ends after the video: cut")
        return clamp(first, last), clamp(end, last)

    def task_row(self, part: tuple[float, float] | None, notes: Notes) -> Iterator[dict[str, Any]]:
        """Yield the row that asks for the activity in the part of the video that shows it."""
        if shown := self.frames(part, "end", notes):
            yield self._row("task", shown, QUESTIONS["task"], as_sentence(self.goal), {"label": self.goal.lower()})

    def step_rows(self, frames: dict[int, tuple[int, int] | None]) -> Iterator[dict[str, Any]]:
        """Yield a row a step, which asks for its label."""
        for step in self.steps:
            if (shown := frames[step.index]) and step.label is not None:
                truth, answer = {"label": step.label.lower()}, as_sentence(step.label)
                yield self._row("step", shown, QUESTIONS["step"], answer, truth, step)

    def next_rows(self, task: str, frames: dict[int, tuple[int, int] | None], most: int) -> Iterator[dict[str, Any]]:
        """Yield a row for each step but the last, which asks for the next step or steps."""
        for place, step in enumerate(self.steps[:-1], 1):
            labels = [step.label for step in self.steps[place : place + most]]
            if (shown := frames[step.index]) is None or None in labels:
                continue
            # With one step left, LIVE asks for the next action.
            one = {"procedure": "next", "taskprocedure": "tasknext"}.get(task, task)
            question = QUESTIONS[task if len(labels) > 1 else one].format(goal=self.goal, count=len(labels))
            sentences = [as_sentence(label) for label in labels]
            numbered = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
            small = [label.lower() for label in labels]
            truth = {"label": small[0]} if task == "next" else {"labels": small}
            yield self._row(task, shown, question, numbered if len(labels) > 1 else sentences[0], truth, step)

    def streaming_row(self, frames: dict[int, tuple[int, int] | None]) -> Iterator[dict[str, Any]]:
        """
        Yield a row that guides through all steps, as the supplement of VideoLLM-MoD describes it.

        What is said at one frame is one reply: a step may end when the next begins.
        """
        known = [(step, shown) for step in self.steps if step.label and (shown := frames[step.index])]
        if not known:
            return
        said: dict[int, list[str]] = {}
        following = [step for step, _ in known[1:]] + [None]
        for (step, (first, last)), after in zip(known, following, strict=True):
            later = f" Try next: {after.label}." if after is not None else ""
            said.setdefault(first, []).append(f"Now begins: {step.label}.{later}")
            said.setdefault(last, []).append(f"Done: {step.label}.")
        first, last = min(said), max(said)
        truth = {"steps": [{"label": step.label.lower(), "frames": list(shown)} for step, shown in known]}
        messages = reply_messages([(frame, " ".join(said[frame])) for frame in sorted(said)], self.fps)
        question = {"role": "user", "content": QUESTIONS["streaming"].format(goal=self.goal)}
        yield self._describe("streaming", (first, last), [question, *messages], truth)

    def _row(
        self,
        task: str,
        shown: tuple[int, int],
        question: str,
        answer: str,
        truth: dict[str, Any],
        step: Step | None = None,
    ) -> dict[str, Any]:
        messages = question_messages(question, answer, shown[1], self.fps)
        return self._describe(task, shown, messages, truth, step)

    def _describe(
        self,
        task: str,
        shown: tuple[int, int],
        messages: list[dict[str, Any]],
        truth: dict[str, Any],
        step: Step | None = None,
    ) -> dict[str, Any]:
        name = f"{self.name}/{task}" if step is None else f"{self.name}/{step.index}/{task}"
        about = {"id": name, "task": f"coin_{task}", "video": str(self.video.path)}
        return {**about, **clip(*shown, self.fps), "messages": messages, "truth": truth}


def clean_label(text: str) -> str:
    """Return a label of a step, with LIVE's two repairs."""
    return _LABELS.get(text, text)


def clean_goal(text: str) -> str:
    """Return a task in words by LIVE's rules: "PutOnHairExtensions" is "put on hair extensions"."""
    words = "".join(f" {char.lower()}" if char.isupper() else char for char in text)
    for before, after in _ACRONYMS.items():
        words = words.replace(before, after)
    return words.strip()


def read_steps(entry: dict[str, Any], name: str, notes: Notes) -> list[Step]:
    """Return the steps of a video in order of time. A step without a label or time keeps its place."""
    found = entry.get("annotation")
    if not isinstance(found, list) or not found:
        notes.leave_out(name, "annotation", "there is no step")
        return []
    steps = [_read_step(item, index, name, notes) for index, item in enumerate(found)]
    # A step without times stays behind the step that the file has before it.
    starts = list(accumulate((step.times and step.times[0] for step in steps), _last_known, initial=0.0))[1:]
    ordered = [step for _, step in sorted(zip(starts, steps, strict=True), key=itemgetter(0))]
    if ordered != steps:
        notes.mended(name, "annotation", "steps not in order of time: sorted")
    for before, step in pairwise(step for step in ordered if step.times):
        if step.times[0] < before.times[1]:
            notes.mended(name, f"{step.place}.segment", "overlaps the step before: kept")
    return ordered


def _last_known(before: float, start: float | None) -> float:
    return before if start is None else start


def _read_step(item: Any, index: int, name: str, notes: Notes) -> Step:
    item, place = item if isinstance(item, dict) else {}, f"annotation[{index}]"
    label = to_text(item.get("label"))
    times = take_pair(item.get("segment"), notes, name, f"{place}.segment", may_be_empty=True)
    if label is None:
        notes.leave_out(name, f"{place}.label", "there is no text")
    if times is not None and times[0] == times[1]:
        notes.mended(name, f"{place}.segment", "zero length: one frame")
    return Step(index, None if label is None else clean_label(label), times)


def _split(entry: Any, name: str, notes: Notes) -> str | None:
    """Return the split of a video: LIVE looks for "train" and "test" within `subset`."""
    notes.split = ""
    subset = str(entry.get("subset")).lower() if isinstance(entry, dict) else ""
    split = next((split for part, split in _SPLITS.items() if part in subset), None)
    if split is None:
        notes.leave_out(name, "subset", "is neither training nor testing")
    return split


def _labels(entries: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Return the tasks and the labels of all entries, also of those without a video, in small letters."""
    entries = [entry for entry in entries.values() if isinstance(entry, dict)]
    goals = {clean_goal(text).lower() for entry in entries if (text := to_text(entry.get("class")))}
    steps = [step for entry in entries for step in read_steps(entry, "", Notes())]
    return goals, {step.label.lower() for step in steps if step.label is not None}


def read_taxonomy(path: Path) -> tuple[set[str], set[str]]:
    """
    Return the tasks and the labels of COIN's `taxonomy.xlsx`, in small letters.

    Raises:
        `ValueError`: If the file has no sheet `target_action_mapping` with the published columns.
        `OSError`: If it cannot be read.
    """
    from openpyxl import load_workbook

    with path.open("rb") as file:
        try:
            sheet = load_workbook(file, read_only=True)["target_action_mapping"]
            head, *rows = sheet.iter_rows(values_only=True)
            goal, label = head.index("Target Label"), head.index("Action Label")
        except Exception:  # openpyxl raises errors of zipfile, XML and its own
            raise ValueError(
                f"'{path}' is no taxonomy of COIN: it needs the sheet `target_action_mapping` with the columns "
                "'Target Label' and 'Action Label'."
            ) from None
    goals, labels = ({text for row in rows if (text := to_text(row[column]))} for column in (goal, label))
    return {clean_goal(text).lower() for text in goals}, {clean_label(text).lower() for text in labels}
