# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers and texts of users: every type of number is accepted, and every mistake is named in one line."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.checks_videollm_mod import check_count, check_fps, check_number, check_seconds, check_text


TWOS = (2, 2.0, Fraction(2), np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0))
NOT_NUMBERS = (None, "2", b"2", True, np.bool_(True), torch.tensor(True), math.nan, math.inf, -math.inf, [2.0], {}, 1j)
NOT_NUMBERS += (np.array([1.0, 2.0]), torch.ones(2), torch.tensor(math.nan), 10**400, Decimal(2))


@pytest.mark.parametrize("two", TWOS, ids=repr)
def test_numbers_of_all_types_are_floats(two):
    for found in (check_number("x", two), check_seconds("x", two, least=2), check_fps(two)):
        assert type(found) is float and found == 2.0


@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_named_in_one_line(wrong):
    with pytest.raises(ValueError, match=r"^`start` must be a finite number of seconds, got [^\n]+\.$"):
        check_seconds("start", wrong)


@pytest.mark.parametrize("wrong", [None, "2", True, math.nan, 2.0, 0, -1, Fraction(2), np.zeros(2, int)], ids=repr)
def test_what_is_no_whole_number_is_named_in_one_line(wrong):
    with pytest.raises(ValueError, match=r"^`max_frames` must be a whole number, at least 1, got [^\n]+\.$"):
        check_count("max_frames", wrong)


def test_ranges_are_named():
    for value in (0, -1.0, 1e9, 1000.5):
        with pytest.raises(ValueError, match=rf"^`fps` must be a positive number of frames per second, .*got {value}"):
            check_fps(value)
    with pytest.raises(ValueError, match=r"^`x` must be a finite number, at least 0 and at most 1, got 1\.5\.$"):
        check_number("x", 1.5, least=0, most=1)
    assert check_number("x", 1, least=0, most=1) == 1 and check_count("x", np.int64(3)) == 3
    assert check_fps(1e-6) == 1e-6 and check_fps(1000) == 1000


def test_half_a_surrogate_pair_is_no_text():
    assert check_text("A question", "Où? 🎈 \0") == "Où? 🎈 \0"
    with pytest.raises(ValueError, match=r"^A question is not valid Unicode: .*, '\\udcff' at position 2\.$"):
        check_text("A question", "ab\udcffc")
    for wrong in (None, b"text", 3):
        with pytest.raises(ValueError, match="^A question must be a text, got "):
            check_text("A question", wrong)


@pytest.fixture(scope="module")
def parts():
    return tiny_model(), tiny_processor()


@pytest.mark.parametrize("two", TWOS, ids=repr)
def test_every_call_takes_every_type_of_number(parts, two):
    model, processor = parts
    frames = random_frames(4)
    session = model.stream(processor, fps=two, source_fps=two, max_new_tokens=2)
    session.push(frames[0], time=two)
    assert [time for time, _ in processor.read_video(frames, fps=two, start=two - 2, end=two)] == [0.0, 0.5, 1.0, 1.5]
    session.hear("What?", time=two)
    session.push(frames[1:], time=[two + 1, two + 2, two + 3])
    assert session.time == 5.0 and session.num_frames == 4
    events = list(model.narrate(processor, frames, fps=two, start=two - 2, end=two, max_new_tokens=1))
    assert all(type(event.time) is float for event in events)
    dialogue = [{"role": "user", "content": "What?", "time": two - 2}]
    inputs = processor(dialogue, frames, fps=two, start=two - 2, end=two)
    assert inputs["num_frames"] == [4]
    assert processor([dialogue] * 2, [frames] * 2, fps=two, start=two - 2)["num_frames"] == [4, 4]


@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=repr)
def test_every_call_refuses_what_is_no_number(parts, wrong):
    model, processor = parts
    frames, dialogue = random_frames(3), [{"role": "user", "content": "What?"}]
    session = model.stream(processor)
    session.push(frames[0], time=0.0)
    calls = [
        lambda: model.stream(processor, fps=wrong),
        lambda: list(model.narrate(processor, frames, start=wrong)),
        lambda: list(processor.read_video(frames, fps=wrong)),
        lambda: list(processor.sample_every(frames, wrong)),
        lambda: processor(dialogue, frames, fps=wrong),
        lambda: session.push(frames[:1], time=[wrong]),
        lambda: list(model.narrate(processor, [(0.0, frames[0]), (wrong, frames[1])])),
    ]
    if wrong is not None:
        calls += [
            lambda: model.stream(processor, source_fps=wrong),
            lambda: list(model.narrate(processor, frames, fps=wrong)),
            lambda: session.push(frames, time=wrong),
            lambda: session.hear("What?", time=wrong),
            lambda: session.ask("What?", time=wrong),
            lambda: list(model.narrate(processor, frames, end=wrong)),
            lambda: list(processor.read_video(frames, end=wrong)),
            lambda: processor(dialogue, frames, end=wrong),
            lambda: processor([{**dialogue[0], "time": wrong}, {**dialogue[0], "time": 0.5}], frames),
        ]
    for index, call in enumerate(calls):
        with pytest.raises(ValueError) as caught:
            call()
        assert "\n" not in str(caught.value), index
    session.push(frames[1], time=1.0)
    assert session.num_frames == 2, "the session goes on"


def test_times_of_pairs_must_not_go_back(parts):
    model, processor = parts
    frames = random_frames(3)
    for times in ([0.0, 1.0, 0.5], [0.0, 0.0, 0.5]):
        with pytest.raises(ValueError, match="must increase"):
            list(model.narrate(processor, list(zip(times, frames, strict=True))))


def test_half_surrogates_are_refused_wherever_text_goes(parts):
    model, processor = parts
    frames, wrong = random_frames(2), "a \ud800 b"
    session = model.stream(processor)
    session.push(frames[0])
    calls = (
        lambda: session.ask(wrong),
        lambda: session.hear(wrong),
        lambda: model.stream(processor, system_prompt=wrong),
        lambda: list(model.narrate(processor, frames, wrong)),
        lambda: processor([{"role": "user", "content": wrong}], frames),
        lambda: processor([{"role": "system", "content": wrong}], frames),
        lambda: processor(text=wrong),
        lambda: processor.apply_chat_template([{"role": "user", "content": wrong}]),
        lambda: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": wrong}]}], tokenize=True, return_dict=True
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match="is not valid Unicode"):
            call()
