# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamWorld's dialogues: narration, questions with one right answer, and requests to wait for an event."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from videollm_mod.train.data.timed_messages import NARRATE
from videollm_mod.train.data.world.clip import STEP, Actor, Clip, nearest, next_left, sentence, where, with_article


DESCRIBE_ALL = "Describe every frame."
NUMBERS = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
KINDS = ("describe", "narrate", "ask", "wait")
QUESTIONS = ("present", "earlier", "count", "order", "comparison", "later")
# Requests to wait for the next event of a kind: by any thing, and by a thing with a name.
_AWAITED = {
    "enters": ("What comes next?", None),
    "leaves": ("Tell me when something leaves.", "Tell me when the {name} leaves."),
    "stops": ("Tell me when something stops.", "Tell me when the {name} stops."),
    "recolors": ("Tell me when something changes color.", "Which color will the {name} turn?"),
    "bumps": ("Tell me when things meet.", None),
    "reappears": (None, "Tell me when the {name} comes back."),
}


@dataclass(frozen=True)
class Question:
    """
    A question and its answer.

    Args:
        kind (`str`): What the answer depends on, one of [`QUESTIONS`]. The answer to "later" is not yet known when the
            question is asked.
        time (`float`): Second of the question.
        text (`str`): The question.
        answer (`str`): The answer.
        answer_time (`float`): Second of the answer. It differs from `time` only if the kind is "later".
    """

    kind: str
    time: float
    text: str
    answer: str
    answer_time: float


def questions_at(clip: Clip, time: float) -> list[Question]:
    """Return all questions of all kinds that can be asked at a time. Each has one right answer."""
    found = [("present", "What do you see?", clip.description(time))]
    found += [*_about_one(clip, time), *_about_the_past(clip, time), *_about_counts(clip, time)]
    found += [*_about_two(clip, time), *_about_neighbors(clip, time)]
    return [Question(kind, time, text, answer, time) for kind, text, answer in found] + _about_later(clip, time)


def _about_one(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    """Places and colors of single things, as (kind, question, answer)."""
    seen = clip.visible(time)
    names, things = [actor.name(time) for actor in seen], [actor.thing for actor in seen]
    for actor in seen:
        if names.count(actor.name(time)) > 1:
            continue
        yield "present", f"Where is the {actor.name(time)}?", sentence(where(actor.place(time)))
        if things.count(actor.thing) > 1:
            continue
        yield "present", f"Which color is the {actor.thing}?", sentence(actor.color(time))
        if actor.color(time) != actor.colors[0][1]:
            yield "earlier", f"Which color was the {actor.thing} at first?", sentence(actor.colors[0][1])


def _about_the_past(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    past = [event for event in clip.events if event.time <= time]
    if past:
        yield "earlier", "What happened last?", past[-1].text
    for first in [event for event in past if event.kind == "enters"][:1]:
        yield "earlier", "What entered first?", sentence(with_article(clip.actors[first.actor].name(first.time)))


def _about_counts(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    yield "count", "How many things do you see?", f"{NUMBERS[len(clip.visible(time))]}."
    gone = sum(event.kind == "leaves" for event in clip.events if event.time <= time)
    if gone < len(NUMBERS):
        yield "count", "How many things have left?", f"{NUMBERS[gone]}."


def _about_two(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    """Comparisons of two things in sight. Each must be the only one of its kind in the clip."""
    things = [actor.thing for actor in clip.actors]
    seen = clip.visible(time)
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            if things.count(one.thing) == things.count(other.thing) == 1:
                yield from _compare(one, other, time)


def _compare(one: Actor, other: Actor, time: float) -> Iterator[tuple[str, str, str]]:
    pair = f"the {one.thing} or the {other.thing}?"
    if one.begin != other.begin:
        earlier = one if one.begin < other.begin else other
        yield "order", f"Which came first, {pair}", f"The {earlier.thing}."
    if other.place(time)[0] - one.place(time)[0] > 0.15:
        yield "comparison", f"Which is further left, {pair}", f"The {one.thing}."
    ratio = one.scale(time) / other.scale(time)
    if max(ratio, 1 / ratio) > 1.3:
        yield "comparison", f"Which is bigger, {pair}", f"The {(one if ratio > 1 else other).thing}."


def _about_neighbors(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    """Which thing is near another one, and which is left of it. Unclear cases are left out."""
    seen = clip.visible(time) if clip.relations else []
    names = [actor.name(time) for actor in seen]
    for actor, name in zip(seen, names, strict=True):
        if names.count(name) > 1:
            continue
        near = nearest(actor.place(time), [other for other in seen if other is not actor], time)
        if near is not None:
            yield "comparison", f"What is nearest to the {name}?", f"The {near.name(time)}."
        left = next_left(actor, seen, time)
        if left is not None:
            yield "comparison", f"What is left of the {name}?", f"The {left[0].name(time)}." if left else "Nothing."


def _about_later(clip: Clip, time: float) -> list[Question]:
    """Requests to wait for the next event of a kind, or for the next event of a kind by one thing."""
    found, passed = [], set()
    for event in clip.events:
        if event.time < time + 2 * STEP:
            if event.time > time:
                passed |= {event.kind, (event.kind, event.actor)}
            continue
        actor = clip.actors[event.actor]
        by_anything, by_name = _AWAITED.get(event.kind, (None, None))
        if by_anything is not None and event.kind not in passed:
            answer = sentence(with_article(actor.name(event.time))) if event.kind == "enters" else event.text
            found.append(Question("later", time, by_anything, answer, event.time))
        known = actor.begin <= time and actor.name(time) == actor.name(event.time - 0.01)
        only = sum(a.exists(time) and a.name(time) == actor.name(time) for a in clip.actors) == 1
        if by_name is not None and known and only and (event.kind, event.actor) not in passed:
            answer = sentence(actor.color(event.time)) if event.kind == "recolors" else event.text
            found.append(Question("later", time, by_name.format(name=actor.name(time)), answer, event.time))
        passed |= {event.kind, (event.kind, event.actor)}
    return found


def make_dialogue(
    clip: Clip, kind: str, questions_per_minute: float | None = None
) -> tuple[list[dict[str, Any]], list[Question]]:
    """
    Make timed messages about a clip. The same clip and kind always give the same messages.

    Args:
        clip ([`Clip`]): The clip.
        kind (`str`): "narrate": every event is described, with an occasional question. "ask": the model only answers
            questions. "wait": the model is asked to speak when something happens later. "describe": every frame at
            2 fps is described.
        questions_per_minute (`float`, *optional*): How often the user asks, if there is something to ask about. The
            default is up to one question in narration and up to four elsewhere, however long the clip is.

    Returns:
        `tuple`: The messages, and the questions among them. Both are empty if the model would have nothing to say.
    """
    rng = np.random.default_rng((clip.seed, 3, KINDS.index(kind)))
    if kind == "describe":
        return describe([clip.description(index * STEP) for index in range(clip.num_frames(1 / STEP))]), []
    messages: list[dict[str, Any]] = []
    if kind == "narrate":
        messages.append({"role": "user", "content": NARRATE, "time": 0.0})
        messages += [{"role": "assistant", "content": text, "time": time} for time, text in clip.story()]
        count = int(rng.random() < 0.3)
    else:
        count = int(rng.integers(1, 5)) if kind == "ask" else int(rng.integers(1, 3))
    if questions_per_minute is not None:
        count = round(questions_per_minute * clip.seconds / 60)
    busy = {event.time for event in clip.events}
    quiet = [i * STEP for i in range(2, clip.num_frames(1 / STEP)) if i * STEP not in busy]
    allowed = ("later",) if kind == "wait" else QUESTIONS[:-1]
    questions = choose_questions(partial(questions_at, clip), quiet, rng, count, allowed)
    return with_questions(messages, questions)


def choose_questions(
    find: Callable[[float], Sequence[Any]],
    quiet: Sequence[float],
    rng: np.random.Generator,
    count: int,
    allowed: Sequence[str],
) -> list[Any]:
    """
    Choose up to `count` questions of the allowed kinds.

    Args:
        find (`Callable`): Returns the questions that can be asked at a second of the clip. Each has `kind` and
            `answer_time`.
        quiet (`Sequence[float]`): The seconds at which nothing happens.
        rng (`np.random.Generator`): Makes the choices.
        count (`int`): Most questions.
        allowed (`Sequence[str]`): Kinds of questions.
    """
    times = rng.choice(quiet, size=min(count, len(quiet)), replace=False) if quiet else ()
    questions: list[Any] = []
    until = 0.0
    for time in sorted(float(t) for t in times):
        choices = [question for question in find(time) if question.kind in allowed]
        # A question cancels the one before it: while an answer is awaited, nothing else is asked.
        if not choices or time <= until:
            continue
        kinds = sorted({question.kind for question in choices})
        chosen = kinds[int(rng.integers(len(kinds)))]
        choices = [question for question in choices if question.kind == chosen]
        questions.append(choices[int(rng.integers(len(choices)))])
        until = questions[-1].answer_time
    return questions


def with_questions(messages: list[dict[str, Any]], questions: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return messages in order of time, with questions and answers. Without any answer or narration it is nothing."""
    for question in questions:
        messages.append({"role": "user", "content": question.text, "time": question.time})
        messages.append({"role": "assistant", "content": question.answer, "time": question.answer_time})
    if all(message["role"] == "user" for message in messages):
        return [], []
    return sorted(messages, key=lambda message: message["time"]), questions


def describe(descriptions: list[str]) -> list[dict[str, Any]]:
    """Make timed messages with one description per frame at 2 fps."""
    messages = [{"role": "user", "content": DESCRIBE_ALL, "time": 0.0}]
    return messages + [
        {"role": "assistant", "content": text, "time": index * STEP} for index, text in enumerate(descriptions)
    ]
