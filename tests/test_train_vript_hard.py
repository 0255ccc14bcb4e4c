# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Vript-Hard in its published layout: rows and scores; all samples are made up."""

import json

import pytest
from tiny import random_frames, tiny_model, tiny_processor, write_clip

from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.tasks import find_task
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.tasks.vript_hard import read_order, read_order_officially


CHOICE = {
    "video_id": "a-b",
    "clip_id": "a-b-Scene-002",
    "question": "What is on the table?",
    "hint": "The table is red.",
    "multiple_choice": ["A cup.", "A map.", "A hat.", "A dog."],
    "multiple_choice_answer": "A hat.",
    "open_answer": "It is a hat.",
    "scene_description": "A table.",
}
ORDER = {"video_id": "a-b", "question": "Scene (A): a dog. Scene (B): a cat. Scene (C): a cow.", "answer": "CAB"}


SCENE = {"video_id": "a-b", "clip_id": "a-b-Scene-002", "scene_title": ["A dog"], "content": ["A dog runs.", "It is."]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a-b", "a-b-Scene-002"):
        write_clip(tmp_path / f"{name}.mp4", random_frames(6), fps=2)
    return tmp_path


def convert(folder, *, choices=(CHOICE,), orders=(ORDER,), scenes=(), **options):
    for name, rows in (("RR", choices), ("ERO", orders), ("HAL", scenes)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}_annotations.jsonl").write_text("\n".join(lines))
    notes = Notes()
    rows = [row for _, row in find_converter("vript_hard")(**options).convert(folder, Videos(folder), notes)]
    return rows, {reason: found.count for reason, found in notes.left_out.get("test", {}).items()}


def test_questions_stand_before_the_video_or_the_scene(folder):
    rows, left = convert(folder, task="rr,rr_clip,ero,hal")
    assert [(row["id"], row["task"], row["video"].rsplit("/", 1)[1]) for row in rows] == [
        ("a-b/0/ero", "vript_hard_ero", "a-b.mp4"),
        ("a-b/0/rr", "vript_hard_rr", "a-b.mp4"),
        ("a-b-Scene-002/0/rr_clip", "vript_hard_rr_clip", "a-b-Scene-002.mp4"),
    ]
    order, choice, _ = rows
    assert order["truth"] == {"order": ["C", "A", "B"]} and order["messages"][1]["content"] == "C, A, B"
    assert choice["truth"] == {"options": ["A cup.", "A map.", "A hat.", "A dog."], "answer": "C"}
    assert choice["messages"][0]["content"].startswith(
        "What is on the table? Hint: The table is red.\nA. A cup.\nB. A map."
    )
    assert choice["messages"][1] == {"role": "assistant", "content": "C", "time": 2.5} and not left
    assert [row["task"] for row in convert(folder, task="rr_clip")[0]] == ["vript_hard_rr_clip"]


def test_open_answers_have_no_options_and_a_judge(folder):
    open_tasks = "rr_open,rr_open_clip"
    choices = [CHOICE, {**CHOICE, "open_answer": " "}, {**CHOICE, "hint": None, "multiple_choice": 3}]
    rows, left = convert(folder, choices=choices, task=open_tasks)
    names = ["vript_hard_rr_open", "vript_hard_rr_open_clip"]
    assert [row["task"] for row in rows] == names * 2 and left == {"there is no text": 1}
    first, clip, plain, _ = rows
    question, reply = first["messages"]
    assert (
        question["content"] == "What is on the table? Hint: The table is red." and reply["content"] == "It is a hat."
    )
    assert first["video"].endswith("a-b.mp4") and clip["video"].endswith("a-b-Scene-002.mp4")
    assert plain["messages"][0]["content"] == "What is on the table?"
    task, asked = find_task("vript_hard_rr_open"), []
    replies = [{"text": text} for text in ("It is a hat.", "A red hat.", "")]
    scores = task.score([first] * 3, replies, {})
    # Of "a red hat" and "it is a hat", two words of three and four are shared: 4/7, which is level 2.
    assert scores == {"grade_token_f1": (4 + 2 + 0) / 3 / 4, "ungraded_token_f1": 0.0}

    class Unsure:
        name = "unsure"

        def levels(self, items, most):
            asked.extend(items)
            return [most, None, 1]

    task.judge = Unsure()
    assert task.score([first] * 3, replies, {}, official=True) == {
        "grade_unsure": (4 + 0 + 1) / 3 / 4,
        "ungraded_unsure": 1 / 3,
    }
    assert asked[1] == ("What is on the table? Hint: The table is red.", "It is a hat.", "A red hat.")


def test_faulty_rows_are_counted(folder):
    choices = [
        {**CHOICE, "question": None},
        {**CHOICE, "multiple_choice_answer": "A cow."},
        {**CHOICE, "video_id": "x"},
    ]
    orders = [
        {**ORDER, "answer": ["A", "B", "B"]},
        {**ORDER, "question": " "},
        {**ORDER, "answer": ["(B)", "(A)", "(C)"]},
    ]
    choices += [{**CHOICE, "multiple_choice": 3}, "{"]
    rows, left = convert(folder, choices=choices, orders=orders, task="rr,rr_clip,ero,hal")
    assert [row["task"] for row in rows] == ["vript_hard_ero", "vript_hard_rr_clip"]
    assert rows[0]["truth"]["order"] == ["B", "A", "C"]
    assert left == {
        "there is no text": 2,
        "are no texts, or the answer is none of them": 2,
        "there is no video file": 1,
        "is no question of Vript-Hard": 1,
        "is no order of three scenes": 1,
    }
    with pytest.raises(ValueError, match="has no file in the format of Vript-Hard"):
        convert(folder, choices=[{"a": 1}], orders=[])


def test_a_scene_is_described(folder):
    scenes = [SCENE, {**SCENE, "content": "A cat."}, {**SCENE, "content": ["", None]}, {**SCENE, "clip_id": "x"}]
    rows, left = convert(folder, choices=[], orders=[], scenes=scenes)
    assert [row["task"] for row in rows] == ["vript_hard_hal"] * 2 and rows[0]["video"].endswith("a-b-Scene-002.mp4")
    question, reply = rows[0]["messages"]
    assert question["content"] == "Describe this video in detail." and reply["content"] == "A dog runs."
    assert [row["truth"] for row in rows] == [{"content": ["A dog runs.", "It is."]}, {"content": ["A cat."]}]
    assert left == {"there is no text": 1, "there is no video file": 1}
    assert find_task("vript_hard_hal").wants(rows[0])


@pytest.mark.parametrize(
    ("reply", "order", "official"),
    [
        ("B, A, C", "BAC", "BAC"),
        ("Scene (B), then scene (A), then Scene (C).", "BAC", "SBA"),
        ("Scene (B), Scene (A), Scene (C), so B.", "BAC", "BAC"),
        # The published rule takes the capitals of words.
        ("The order is: Before A come B and C.", "ABC", "TBA"),
        ("A, B", "", ""),
        ("", "", ""),
    ],
)
def test_the_order_is_read_from_letters_that_stand_alone(reply, order, official):
    assert "".join(read_order(reply)) == order and "".join(read_order_officially(reply)) == official


def test_scores_by_hand():
    truth = {"truth": {"options": ["A cup.", "A map."], "answer": "B"}}
    replies = [{"text": text} for text in ("B", "(B) A map.", "It is a map.", "(A), not (B)")]
    task = find_task("vript_hard_rr")
    assert task.score([truth] * 4, replies, {}) == {"accuracy": 0.75}
    assert task.score([truth] * 4, replies, {}, official=True) == {"accuracy": 0.25}
    truth = {"truth": {"order": ["B", "A", "C"]}}
    replies = [{"text": text} for text in ("B, A, C", "A, B, C", "B", "C, A, B")]
    scores = find_task("vript_hard_ero").score([truth] * 4, replies, {})
    assert scores == {"order@1": 0.75, "order@2": 0.25, "order@3": 0.25}


def test_a_model_replies_to_rows(folder):
    rows = convert(folder)[0]
    predictions = find_task("vript_hard_ero").predict_all(Runner(tiny_model(), tiny_processor()), rows[:1])
    assert predictions[0].keys() == {"text"} and isinstance(predictions[0]["text"], str)
