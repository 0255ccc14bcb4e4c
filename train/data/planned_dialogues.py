# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Dialogues that a language model writes: questions at random times, and what becomes of the written answers.

The rules are those of VideoLLM-online's second source of data (arXiv 2406.11816, section 3.2, and its code): a
language model sees the true timeline of a video, and completes a dialogue with a line for each moment at which the
timeline changes. A later question cancels what would still be said about an earlier one.
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from videollm_mod.train.data.converters import Notes
from videollm_mod.train.data.dialogues import ceil_frame, floor_frame, to_number, to_text
from videollm_mod.train.data.questions import QUESTIONS
from videollm_mod.train.reply_cache import without_thoughts


# The user's line that the language model writes.
FOLLOW_UP = "..."
# What the planned kinds of questions are: equally likely, but the first question follows up nothing.
KINDS = (*QUESTIONS, "follow_up")
# Frames that may come before the first question, as in VideoLLM-online's code.
MOST_FRAMES_BEFORE = 20
# Decimals of times in a prompt, and how much later than meant a written time may be by them, in seconds.
_DECIMALS = 2
_ROUNDING = 0.5 / 10**_DECIMALS
_LINE = re.compile(
    r"\W*(?P<time>\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?\b\W*?(?P<role>user|assistant)\W*?:\**\s*(?P<text>.*)", re.I
)
_ROLE = re.compile(r"\W*(?:[\d.]+\s*s?\W*)?(?:user|assistant)\W*?:", re.I)
# Times that only the writer of the dialogue knows, such as "12.5 s", "at 90 seconds" or "1:05".
_SECONDS = re.compile(
    r"\b\d+(?:\.\d+)?\s*-?\s*(?:s|secs?|seconds?)\b|\bseconds?\s+\d|\[\d+(?:\.\d+)?\]|\b\d{1,2}:\d{2}\b", re.I
)
_QUOTES = ('""', "''", "“”", "‘’", "``")
_INSTRUCTION = """\
This is what happens in a video, with times in seconds:

{timeline}

A user watches the video while it plays, together with an assistant that sees the same pictures. Complete their
dialogue: write the lines below with their times, replace each "..." with what is said then, and write nothing else.

{lines}

Follow these rules:
- At its time, the assistant knows what has happened so far. It answers a question about the future with what happens
next in the video.
- The first line of the assistant after a question answers it. The lines after that say what has become of the answer
by then, in new words. Leave out such a line if there is nothing to add.
- A line of the user that is "..." is a short question that follows up the dialogue.
- The assistant answers in one or two short sentences. If a question has nothing to do with the video, it says so.
- Nobody mentions times, seconds, or the list above."""


class RejectedError(ValueError):
    """A dialogue cannot be used. The message is one of few reasons, and has no numbers or names."""


# ----------------------------------------------------------------------------------------------------------- timelines


@dataclass(frozen=True)
class Event:
    """
    Something that happens in a video.

    Args:
        start (`float`): Second at which it begins.
        end (`float`, *optional*): Second at which it ends, if that is known.
        text (`str`): What happens.
    """

    start: float
    end: float | None
    text: str

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds at which the timeline changes."""
        return (self.start,) if self.end is None else (self.start, self.end)


def find_timeline(row: Mapping[str, Any]) -> list[Event]:
    """
    Return the timeline of a prepared row, in order of time.

    It is `truth["timeline"]`, a list of `[start, end, text]`, or else the row's replies with times.

    Raises:
        [`RejectedError`]: If nothing changes after its first moment.
    """
    truth = row.get("truth")
    given = truth.get("timeline") if isinstance(truth, Mapping) else None
    if isinstance(given, list):
        found = [_event(*x) for x in given if isinstance(x, Sequence) and len(x) == 3]
    else:
        messages = row.get("messages") if isinstance(row.get("messages"), list) else []
        replies = [x for x in messages if isinstance(x, Mapping) and x.get("role") == "assistant"]
        found = [_event(x.get("time"), None, x.get("content")) for x in replies]
    events = sorted(filter(None, found), key=lambda event: event.start)
    if len({time for event in events for time in event.times}) < 2:
        raise RejectedError("no timeline of two moments or more")
    return events


def _event(start: Any, end: Any, text: Any) -> Event | None:
    begin, stop, content = to_number(start), to_number(end), to_text(text)
    if content is None or begin is None or begin < 0:
        return None
    return Event(begin, stop if stop is not None and stop > begin else None, content)


# --------------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Plan:
    """
    A dialogue to be written.

    Args:
        events (`tuple[Event, ...]`): The timeline.
        slots (`tuple[int, ...]`): Frames at which the timeline changes, which rise.
        questions (`tuple[tuple[int, str], ...]`): Frames and texts of the questions. A follow-up is "...".
        start (`int`): First frame of the row.
        fps (`float`): Frames per second.
    """

    events: tuple[Event, ...]
    slots: tuple[int, ...]
    questions: tuple[tuple[int, str], ...]
    start: int
    fps: float

    def prompt(self) -> list[dict[str, str]]:
        """Return the conversation that makes a language model write the dialogue."""
        timeline = "\n".join(_describe(event) for event in self.events)
        lines = "\n".join(f"[{_short(frame / self.fps)}] {role}: {text}" for frame, role, text in self._lines())
        # There is no system message, because some chat templates refuse one.
        return [{"role": "user", "content": _INSTRUCTION.format(timeline=timeline, lines=lines)}]

    def _lines(self) -> Iterator[tuple[int, str, str]]:
        ends = [frame for frame, _ in self.questions[1:]] + [self.slots[-1] + 1]
        for (frame, text), end in zip(self.questions, ends, strict=True):
            yield frame, "User", text
            for slot in (frame, *(slot for slot in self.slots if frame < slot < end)):
                yield slot, "Assistant", "..."


def _describe(event: Event) -> str:
    until = "" if event.end is None else f" to {_short(event.end)}"
    return f"{_short(event.start)}{until}: {event.text}"


def _short(seconds: float) -> str:
    # Without a precision, times from 10,000 s on would lose decimals.
    return f"{round(seconds, _DECIMALS):.12g}"


def plan_dialogue(
    events: Sequence[Event],
    *,
    name: str,
    fps: float = 2.0,
    first: float = 0.0,
    last: float | None = None,
    most_questions: int = 3,
    most_events: int = 64,
) -> Plan:
    """
    Choose questions and their times at random, but always the same for a name.

    Args:
        events (sequence of [`Event`]): The timeline, in order of time.
        name (`str`): Name of the dialogue, from which the random numbers come.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        first (`float`, *optional*, defaults to 0.0): Second at which the source's row starts.
        last (`float`, *optional*): Second at which it ends. Defaults to the end of the timeline.
        most_questions (`int`, *optional*, defaults to 3): Number of questions. A short timeline has fewer.
        most_events (`int`, *optional*, defaults to 64): Number of events after which to cut a longer timeline, at a
            random place. Each event adds lines to the prompt.
    """
    chance = random.Random(name)
    begin = chance.randrange(max(len(events) - most_events, 0) + 1)
    chosen = tuple(events[begin : begin + most_events])
    end = math.inf if last is None else floor_frame(last, fps)
    slots = sorted({min(ceil_frame(time, fps), end) for event in chosen for time in event.times})
    frames = range(slots[0], max(slots[-1], slots[0] + 1))
    times = sorted(chance.sample(frames, min(most_questions, len(frames))))
    questions = []
    for frame in times:
        kind = chance.choice(KINDS if questions else tuple(QUESTIONS))
        questions.append((frame, FOLLOW_UP if kind == "follow_up" else chance.choice(QUESTIONS[kind])))
    start = max(times[0] - chance.randint(0, MOST_FRAMES_BEFORE), ceil_frame(first, fps), 0)
    return Plan(chosen, tuple(slots), tuple(questions), min(start, times[0]), fps)


# ------------------------------------------------------------------------------------------------------------- answers


def read_dialogue(plan: Plan, text: str, *, is_cut: bool, notes: Notes, where: str) -> list[tuple[int, str, str]]:
    """
    Read the dialogue that a language model wrote.

    Args:
        plan ([`Plan`]): What was to be written.
        text (`str`): What was written.
        is_cut (`bool`): Whether the end is missing.
        notes ([`Notes`]): Where to count lines that are not used.
        where (`str`): Name of the dialogue, for notes.

    Returns:
        `list[tuple[int, str, str]]`: Frames, roles and texts, with a reply to each question.

    Raises:
        [`RejectedError`]: If the dialogue cannot be used.
    """
    lines = without_thoughts(text).splitlines()
    if not lines:
        raise RejectedError("empty reply")
    if is_cut:
        notes.mended(where, "", "reply was cut: its last line dropped")
        lines.pop()
    answers: list[list[tuple[int, str]]] = [[] for _ in plan.questions]
    questions = list(plan.questions)
    current = -1
    for time, role, content in _read_lines(lines, notes, where):
        frame = max(ceil_frame(time - _ROUNDING, plan.fps), 0)
        if role == "user":
            current = _match_question(plan, time, current)
            if questions[current][1] == FOLLOW_UP:
                questions[current] = (questions[current][0], content)
        elif current < 0:
            notes.mended(where, "", "reply before the first question: dropped")
        elif frame > plan.slots[-1]:
            raise RejectedError("a time outside the video")
        elif frame < max([questions[current][0], *(frame for frame, _ in answers[current][-1:])]):
            raise RejectedError("times out of order")
        else:
            answers[current].append((frame, content))
    return list(_merge(questions, answers, notes, where))


def _read_lines(lines: Sequence[str], notes: Notes, where: str) -> Iterator[tuple[float, str, str]]:
    """Yield times, roles and texts of lines."""
    for line in lines:
        found = _LINE.match(line)
        if found is None and _ROLE.match(line):
            raise RejectedError("a line without a time")
        if found is None:
            if line.strip("`*-_# \t"):
                notes.mended(where, "", "line of no speaker: dropped")
            continue
        content = _clean(found["text"])
        if not content.strip(". …"):
            notes.mended(where, "", "line without a text: dropped")
        elif _SECONDS.search(content):
            raise RejectedError("mentions seconds")
        else:
            yield float(found["time"]), found["role"].lower(), content


def _clean(text: str) -> str:
    text = " ".join(text.split()).strip("* ")
    if len(text) > 1 and text[0] + text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return text


def _match_question(plan: Plan, time: float, before: int) -> int:
    """Return the index of the planned question at a time, which must come after the question `before`."""
    frames = [frame for frame, _ in plan.questions]
    index = bisect_right(frames, floor_frame(time + 0.5 / plan.fps, plan.fps)) - 1
    if index < 0 or abs(frames[index] / plan.fps - time) > 0.5 / plan.fps + 1e-6:
        raise RejectedError("a question at another time")
    if index <= before:
        raise RejectedError("times out of order")
    return index


def _merge(
    questions: Sequence[tuple[int, str]], answers: Sequence[Sequence[tuple[int, str]]], notes: Notes, where: str
) -> Iterator[tuple[int, str, str]]:
    """Yield questions with the replies that are left of their answers."""
    for index, (frame, text) in enumerate(questions):
        kept: list[tuple[int, str]] = []
        for time, said in answers[index]:
            if index + 1 < len(questions) and time >= questions[index + 1][0]:
                notes.mended(where, "", "reply after the next question: dropped")
            elif kept and said == kept[-1][1]:
                notes.mended(where, "", "same text as the reply before: dropped")
            elif kept and time == kept[-1][0]:
                notes.mended(where, "", "two replies at one frame: kept the later one")
                kept[-1] = (time, said)
            else:
                kept.append((time, said))
        if text == FOLLOW_UP:
            notes.mended(where, "", "follow-up that was not written: dropped with its replies")
        elif not kept:
            notes.mended(where, "", "question without a reply: dropped")
        else:
            yield frame, "user", text
            yield from ((time, "assistant", said) for time, said in kept)


def to_messages(plan: Plan, dialogue: Sequence[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """Return a dialogue as timed messages."""
    return [{"role": role, "content": text, "time": frame / plan.fps} for frame, role, text in dialogue]
