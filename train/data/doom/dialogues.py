# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld's dialogues: narration, questions with one right answer, and requests to wait for an event."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from videollm_mod.train.data.doom.clip import Clip, describe_sights
from videollm_mod.train.data.doom.events import WORDINGS, Event, tell
from videollm_mod.train.data.doom.things import MONSTER_NAMES, MONSTERS, WEAPONS, name_of, side_of
from videollm_mod.train.data.world.dialogues import (
    DESCRIBE_ALL,
    KINDS,
    NUMBERS,
    Question,
    choose_questions,
    with_questions,
)


# Requests to wait for the next event of a kind, and for the next one that happens to a kind of thing.
_AWAITED = {
    "comes_into_view": ("What comes into view next?", "Tell me when {name} comes into view."),
    "picks_up": ("Tell me when something is picked up.", None),
    "dies": ("Tell me when a monster dies.", "Tell me when {name} dies."),
    "hurt": ("Tell me when the player is hurt.", None),
    "opens": ("Tell me when a door opens.", None),
    "changes_weapon": ("Which weapon comes next?", None),
}


def questions_at(clip: Clip, time: float) -> list[Question]:
    """Return all questions of all kinds that can be asked at a time. Each has one right answer."""
    found = [("present", "What do you see?", clip.description(time))]
    found += [*_about_now(clip, time), *_about_the_past(clip, time), *_about_counts(clip, time)]
    return [Question(kind, time, text, answer, time) for kind, text, answer in found] + _about_later(clip, time)


def _about_now(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    """Places and distances of single things and the weapon, as (kind, question, answer)."""
    sights = clip.visible(time)
    kinds = [sight.kind for sight in sights]
    for sight in sights:
        if kinds.count(sight.kind) > 1:
            continue
        yield "present", f"Where is the {sight.kind}?", _sentence(side_of(sight.x))
        if sight.kind in MONSTERS:
            yield "present", f"Is the {sight.kind} near or far?", "Near." if sight.is_near else "Far."
    left_to_right = [sight for sight in sights if kinds.count(sight.kind) == 1]
    for one, other in zip(left_to_right, left_to_right[1:], strict=False):
        if other.x - one.x > 0.15:
            yield "comparison", f"Which is further left, the {one.kind} or the {other.kind}?", f"The {one.kind}."
    weapon = WEAPONS.get(clip.weapons[clip.index(time)])
    if weapon is not None and all(e.kind != "changes_weapon" or not time - 1 < e.time <= time for e in clip.events):
        yield "present", "Which weapon do you hold?", _sentence(f"the {weapon}")


def _about_the_past(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    past = [event for event in clip.events if event.time <= time]
    if not past:
        return
    yield "earlier", "What happened last?", past[-1].text
    for kind, question in (
        ("comes_into_view", "What came into view first?"),
        ("picks_up", "What was picked up first?"),
    ):
        first = next((event for event in past if event.kind == kind), None)
        if first is not None:
            yield "earlier", question, _sentence(name_of(first.thing, first.count))
    last = next((event for event in reversed(past) if event.kind == "picks_up"), None)
    if last is not None:
        yield "earlier", "What was picked up last?", _sentence(name_of(last.thing))
    seen = list(dict.fromkeys(event.thing for event in past if event.kind == "comes_into_view"))
    for one, other in zip(seen, seen[1:], strict=False):
        names = " or ".join(f"the {name}" for name in sorted((one, other)))
        yield "order", f"Which came into view first, {names}?", f"The {one}."


def _about_counts(clip: Clip, time: float) -> Iterator[tuple[str, str, str]]:
    now = sum(sight.kind in MONSTER_NAMES for sight in clip.visible(time))
    if now < len(NUMBERS):
        yield "count", "How many monsters do you see?", f"{NUMBERS[now]}."
    asked = {"dies": "How many monsters have died?", "picks_up": "How many things were picked up?"}
    for kind, question in asked.items():
        count = sum(event.kind == kind for event in clip.events if event.time <= time)
        if count < len(NUMBERS):
            yield "count", question, f"{NUMBERS[count]}."


def _about_later(clip: Clip, time: float) -> list[Question]:
    """Requests to wait for the next event of a kind, or for the next one that happens to a kind of thing."""
    found: list[Question] = []
    passed: set[Any] = set()
    for event in clip.events:
        if event.time <= time:
            continue
        by_anything, by_name = _AWAITED.get(event.kind, (None, None))
        for key, text in ((event.kind, by_anything), ((event.kind, event.thing), by_name)):
            if text is None or key in passed:
                continue
            passed.add(key)
            if event.time >= time + 2 / clip.fps:
                text = text.format(name=name_of(event.thing)) if event.thing else text
                # In the vocabulary "small" a monster is all that dies.
                if all(text != other.text for other in found):
                    found.append(Question("later", time, text, _answer(event, text), event.time))
    return found


def _answer(event: Event, question: str) -> str:
    if question.startswith("What comes"):
        return _sentence(name_of(event.thing, event.count))
    return _sentence(f"the {event.thing}") if question.startswith("Which") else event.text


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def make_dialogue(clip: Clip, kind: str, wording: str = "plain") -> tuple[list[dict[str, Any]], list[Question]]:
    """
    Make timed messages about a clip. The same clip, kind and wording always give the same messages.

    Args:
        clip ([`Clip`]): The clip.
        kind (`str`): "narrate": every event is told, with an occasional question. "ask": the model only answers
            questions. "wait": the model is asked to speak when something happens later. "describe": every frame is
            described.
        wording (`str`, *optional*, defaults to `"plain"`): How events are told, one of [`WORDINGS`]. The request of
            the user says which.

    Returns:
        `tuple`: The messages, and the questions among them. Both are empty if the model would have nothing to say.
    """
    rng = np.random.default_rng((clip.seed, 3, KINDS.index(kind)))
    if kind == "describe":
        return describe(clip), []
    messages: list[dict[str, Any]] = []
    if kind == "narrate":
        messages.append({"role": "user", "content": WORDINGS[wording], "time": 0.0})
        messages += [{"role": "assistant", "content": tell(e, wording), "time": e.time} for e in clip.events]
        count = int(rng.random() < 0.3)
    else:
        count = int(rng.integers(1, 5)) if kind == "ask" else int(rng.integers(1, 3))
    allowed = ("later",) if kind == "wait" else ("present", "earlier", "count", "order", "comparison")
    busy = {event.time for event in clip.events}
    quiet = [i / clip.fps for i in range(clip.fps, len(clip.pictures)) if i / clip.fps not in busy]
    questions = choose_questions(partial(questions_at, clip), quiet, rng, count, allowed)
    return with_questions(messages, questions)


def describe(clip: Clip) -> list[dict[str, Any]]:
    """Make timed messages with one description for each frame."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": DESCRIBE_ALL, "time": 0.0}]
    for index, sights in enumerate(clip.sights):
        messages.append({"role": "assistant", "content": describe_sights(sights), "time": index / clip.fps})
    return messages
