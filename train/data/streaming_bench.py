# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
StreamingBench (arXiv 2411.03628): questions with options at moments of a video, and outputs that it should trigger.

The clip of a question with options shows the minute before it, as in the benchmark's main table. The clip of a
proactive question runs from the question to four seconds after the moment of the output, as the benchmark's code polls
it. Its reply stands at that moment. The words around the questions are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from videollm_mod.train.data.choices import LETTERS, ask_choice, letter_of, read_options
from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, read_json
from videollm_mod.train.data.dialogues import ceil_frame, clamp, clip, last_frame, to_number, to_text


# Seconds after the right moment until which the benchmark's code polls.
PATIENCE = 4
# Seconds after the end of a video that still belong to it: lengths of containers are rounded.
_TOUCH = 1.0
_NUM_OPTIONS = 4
_IN_ORDER = list(LETTERS[:_NUM_OPTIONS])


@dataclass
class StreamingBench(Converter):
    """StreamingBench's files `questions_{real,omni,sqa,proactive}.json`: their folder, or one of them."""

    tasks: ClassVar[tuple[str, ...]] = ("real", "omni", "sqa", "proactive")
    license: ClassVar[str] = "MIT. Videos keep the terms of their sources."

    context: float = field(
        default=60.0,
        metadata={"help": "Seconds before a question with options that a clip shows. 0: all from the beginning."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 0:
            raise ValueError(f"--context must not be negative, got {self.context:g}.")

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the row of each question. See [`Converter.convert`]."""
        notes.split = "test"
        for task, path in self._files(annotations).items():
            content = read_json(path)
            if not isinstance(content, list):
                raise ValueError(f"'{path}' is no list: give it as it was published.")
            for index, entry in enumerate(content):
                where = f"{path.name}, entry {index}"
                # Questions of `sqa` about one video stand in a list of their own.
                entries = entry if isinstance(entry, list) else [entry]
                asked: list[str] = []
                for k, (video, question) in enumerate(_questions(entries, notes, where)):
                    place = _Place(f"{where}, question {k}", f"{task}/{index}/{k}", video)
                    row = self._row(task, place, question, asked, videos, notes)
                    if row is not None:
                        yield "test", row

    def _files(self, annotations: Path) -> dict[str, Path]:
        if annotations.is_file():
            named = [task for task in self.tasks if task in annotations.stem]
            chosen = [task for task in named or self.chosen if task in self.chosen]
            if len(chosen) != 1:
                raise ValueError(f"--task must say which of {', '.join(self.tasks)} '{annotations}' is.")
            return {chosen[0]: annotations}
        places = (annotations, annotations / "src" / "data")
        found = {
            task: folder / f"questions_{task}.json"
            for folder in reversed(places)
            for task in self.chosen
            if (folder / f"questions_{task}.json").is_file()
        }
        missing = [task for task in self.chosen if task not in found]
        if missing and (self.task is not None or not found):
            raise FileNotFoundError(f"The folder '{annotations}' has no questions_{missing[0]}.json.")
        return found

    def _row(
        self, task: str, place: "_Place", question: dict[str, Any], asked: list[str], videos: Videos, notes: Notes
    ) -> dict[str, Any] | None:
        text, time = to_text(question.get("question")), read_time(question.get("time_stamp"))
        if text is None or time is None:
            field = "question" if text is None else "time_stamp"
            notes.leave_out(place.where, field, f"there is no {'text' if text is None else 'time'}")
            return None
        if task == "proactive":
            made = self._proactive(place, question, text, time, notes)
        else:
            made = self._choice(place, question, text, time, asked if task == "sqa" else [], notes)
        if made is None:
            return None
        path = place.video if isinstance(place.video, str) else ""
        names = [path.removeprefix("./"), PurePosixPath(path).stem] if path else []
        video = videos.open(notes, place.where, "video_path", *names)
        shown = None if video is None else self._clip(task, place, time, made, video, notes)
        if video is None or shown is None:
            return None
        about = {"id": place.name, "task": f"streaming_bench_{task}", "video": str(video.path)}
        return {**about, **clip(*shown, self.fps), **_messages(made, shown, self.fps)}

    def _choice(
        self, place: "_Place", question: dict[str, Any], text: str, time: float, asked: list[str], notes: Notes
    ) -> dict[str, Any] | None:
        """Return the words and the truth of a question with options."""
        options = mend_options(question.get("options"))
        letter = (to_text(question.get("answer")) or "").upper()
        if options is None or letter not in LETTERS[: len(options)] or len(letter) != 1:
            notes.leave_out(place.where, "options", "are no texts, or `answer` is not one of their letters")
            return None
        if len(question["options"]) != _NUM_OPTIONS:
            notes.mended(place.where, "options", "in more than four pieces: joined, or cut after the fourth")
        elif sorted(letters := _letters_of(question["options"])) == _IN_ORDER != letters:
            notes.mended(place.where, "options", "letters out of order: sorted by them")
        asks = ask_choice(text, options)
        if asked:
            asks = "\n".join(
                ["Earlier questions about this video, with the right answers:", *asked, "Now answer:", asks]
            )
        asked.append(f"At {time:g} s: {text} Answer: {options[LETTERS.index(letter)]}")
        truth = {"answer": letter, "options": options, "type": to_text(question.get("task_type")) or "unknown"}
        return {"asks": asks, "answer": letter, "truth": truth}

    def _proactive(
        self, place: "_Place", question: dict[str, Any], text: str, time: float, notes: Notes
    ) -> dict[str, Any] | None:
        """Return the words and the truth of a question whose answer is an output at a later moment."""
        moment, output = (
            read_time(question.get("ground_truth_time_stamp")),
            to_text(question.get("ground_truth_output")),
        )
        if output is None:
            notes.leave_out(place.where, "ground_truth_output", "there is no text")
        elif moment is None or moment < time:
            notes.leave_out(place.where, "ground_truth_time_stamp", "there is no time after the question")
        else:
            truth = {"time": moment, "output": output, "asked": time}
            return {"asks": text, "answer": output, "truth": truth}
        return None

    def _clip(
        self, task: str, place: "_Place", time: float, made: dict[str, Any], video: Video, notes: Notes
    ) -> tuple[int, int] | None:
        """Return the first and the last frame of a row."""
        moment = made["truth"].get("time", time)
        if moment > video.duration + _TOUCH:
            notes.leave_out(place.where, "time_stamp", "after the end of the video")
            return None
        if task == "proactive":
            last = last_frame(min(moment + PATIENCE, video.duration), self.fps)
            return clamp(ceil_frame(time, self.fps), last), last
        # ffmpeg cuts the clip before the frame at `time`.
        last = min(last_frame(max(time, 1 / self.fps), self.fps), video.last_frame(self.fps))
        return (max(ceil_frame(time - self.context, self.fps), 0) if self.context else 0), last


@dataclass(frozen=True)
class _Place:
    """
    Where a question stands.

    Args:
        where (`str`): File, entry and number, for notes.
        name (`str`): The id of its row.
        video: The value of `video_path`.
    """

    where: str
    name: str
    video: Any


def read_time(value: Any) -> float | None:
    """Return the seconds of a stamp such as "00:03:10" or "03:10". Others, and negative parts, give `None`."""
    parts = [to_number(part) for part in value.split(":")] if isinstance(value, str) else [to_number(value)]
    if not 1 <= len(parts) <= 3 or any(part is None or part < 0 for part in parts):
        return None
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def mend_options(value: Any) -> list[str] | None:
    """
    Return the four options, without letters, or `None` if there are none.

    Some lists of the published file have five to seven pieces: an option was cut in two, or others follow the fourth.
    A piece without a letter belongs to the option before it. What comes after the fourth option with a letter is cut.

    The answer is the letter that an option carries, so that options with the letters "A", "C", "B" and "D" are sorted.
    If a letter is there twice, places count.
    """
    pieces = [to_text(piece) for piece in value] if isinstance(value, list) else []
    if len(pieces) > _NUM_OPTIONS:
        joined: list[str] = []
        for piece in filter(None, pieces):
            letter = letter_of(piece)
            if letter is None and joined:
                joined[-1] = f"{joined[-1]}, {piece}"
            elif letter is not None and len(joined) == _NUM_OPTIONS:
                break
            else:
                joined.append(piece)
        pieces = joined
    if len(pieces) != _NUM_OPTIONS:
        return None
    return read_options(sorted(pieces, key=letter_of) if sorted(_letters_of(pieces)) == _IN_ORDER else pieces)


def _letters_of(pieces: list[str | None]) -> list[str]:
    return [letter_of(piece or "") or "" for piece in pieces]


def _questions(entries: list[Any], notes: Notes, where: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the video and each question of some entries."""
    for entry in entries:
        questions = entry.get("questions") if isinstance(entry, dict) else None
        if not isinstance(questions, list) or not questions:
            notes.leave_out(where, "questions", "there is no question")
            continue
        for question in questions:
            if isinstance(question, dict):
                yield entry.get("video_path"), question
            else:
                notes.leave_out(where, "questions", "is no question")


def _messages(made: dict[str, Any], shown: tuple[int, int], fps: float) -> dict[str, Any]:
    """Return the messages and the truth of a row: a proactive question stands first, one with options last."""
    first, last = shown
    moment = made["truth"].get("time")
    asked, answered = (last, last) if moment is None else (first, clamp(ceil_frame(moment, fps), last))
    messages = [
        {"role": "user", "content": made["asks"], "time": asked / fps},
        {"role": "assistant", "content": made["answer"], "time": answered / fps},
    ]
    return {"messages": messages, "truth": made["truth"]}
