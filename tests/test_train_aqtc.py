# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""AQTC in its published layout: rows, candidates ranked by likelihood, measures by hand; all samples are made up."""

import json

import pytest
from programs import run_main
from tiny import random_frames, tiny_model, tiny_processor, write_clip

from videollm_mod.train.data import prepare
from videollm_mod.train.data.aqtc import NEXT, find_buttons
from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.tasks import find_task
from videollm_mod.train.tasks.running import Runner


SCRIPT = "0:00:00-0:00:02 This is a kettle.\n0:00:02-0:00:09 Press power.\nno stamp here\n\n"
BUTTONS = "button1,0,0,20,10,a.jpg,200,100\nbutton10,100,50,20,10,a.jpg,200,100\nbroken,1,2\nlid,0,0,x,1,a.jpg,1,1\n"
KETTLE = {
    "question": "How to boil water?",
    "answers": [["Press button1", "Press button10"], ["Wait", "Open  it", "Close it"]],
    "correct": [2, 3],
    "images": ["a.jpg", "b.jpg"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a kettle and that of a lamp, whose video has another container, and all files of annotations."""
    folder = tmp_path_factory.mktemp("aqtc")
    for part, name, container in (("train", "kettle", "mp4"), ("test", "lamp", "mov")):
        (folder / part / name).mkdir(parents=True)
        write_clip(folder / part / name / f"video.{container}", random_frames(10), fps=2)
    (folder / "train" / "kettle" / "script.txt").write_text(SCRIPT)
    (folder / "train" / "kettle" / "buttons.csv").write_text(BUTTONS)
    unanswered = {key: value for key, value in KETTLE.items() if key != "correct"}
    faulty = [
        None,
        {**KETTLE, "question": " "},
        {**KETTLE, "answers": []},
        {**KETTLE, "correct": [1]},
        {**KETTLE, "correct": [3, 1]},
        {**KETTLE, "correct": [0, "1"]},
        {**KETTLE, "answers": [["a"], ["b", None]], "correct": [1, 1]},
        {**KETTLE, "answers": 4},
    ]
    documents = {
        "train": {"kettle": [KETTLE, *faulty], "gone": [KETTLE], "none": None},
        "test_without_gt": {"lamp": [unanswered]},
        "test2023_without_gt": {"kettle": [unanswered]},
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def convert(folder, **options):
    notes = Notes()
    rows = {
        row["id"]: (split, row)
        for split, row in find_converter("aqtc")(**options).convert(folder, Videos(folder), notes)
    }
    left = {reason: found.count for split in notes.left_out.values() for reason, found in split.items()}
    mended = {what: found.count for split in notes.mended_by.values() for what, found in split.items()}
    return rows, left, mended


def test_rows_are_dialogues_after_the_video(folder):
    rows, left, mended = convert(folder)
    assert {name: split for name, (split, _) in rows.items()} == {
        "kettle/0": "train",
        "lamp/0": "test",
        "2023/kettle/0": "test",
    }
    row = rows["kettle/0"][1]
    assert [(m.get("time"), m["role"], m["content"]) for m in row["messages"]] == [
        (None, "user", "How to boil water? Guide me: give me one step at a time."),
        (2.0, "user", 'The speaker says: "This is a kettle."'),
        (4.5, "user", 'The speaker says: "Press power."'),
        (4.5, "assistant", "Press button10"),
        (4.5, "user", NEXT),
        (4.5, "assistant", "Close it"),
    ]
    assert (row["start"], row["end"], row["task"]) == (0.0, 4.5, "aqtc_guidance")
    truth = row["truth"]
    assert (truth["folder"], truth["question"]) == ("kettle", "How to boil water?")
    assert [(step["correct"], step["image"], step["candidates"][1]) for step in truth["steps"]] == [
        (1, "a.jpg", "Press button10"),
        (2, "b.jpg", "Open it"),
    ]
    # A question whose answers were not published ends with the user.
    lamp = rows["lamp/0"][1]
    assert [m["role"] for m in lamp["messages"]] == ["user"] and lamp["truth"]["steps"][0]["correct"] is None
    assert left == {
        "there is no text": 2,
        "there is no step": 3,
        "the numbers of steps and right answers differ": 1,
        "is no number of a candidate: all steps": 2,
        "a candidate has no text: all steps": 1,
        "there is no video file": 1,
        "is no list of questions": 1,
    }
    assert mended["there is no script: nothing is said"] == 1


def test_buttons_and_script_are_options(folder):
    row = convert(folder, script=False, buttons=True)[0]["kettle/0"][1]
    (first, *_, following, _) = row["messages"]
    assert len(row["messages"]) == 4 and following["content"] == NEXT
    assert first["content"].endswith(
        "In my picture: button1 is 5% from the left and 5% from the top; "
        "button10 is 55% from the left and 55% from the top."
    )


def test_published_answers_replace_the_file_without_them(folder, tmp_path):
    (tmp_path / "test_with_gt.json").write_text(json.dumps({"lamp": [KETTLE]}))
    (tmp_path / "test_without_gt.json").write_text((folder / "test_without_gt.json").read_text())
    notes = Notes()
    rows = list(find_converter("aqtc")().convert(tmp_path, Videos(folder), notes))
    assert [row["truth"]["steps"][0]["correct"] for _, row in rows] == [1] and not notes.left_out
    with pytest.raises(ValueError, match="has no file in the format of AQTC"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "train.json").write_text('{"a": [{"question": ""}]}')
        list(find_converter("aqtc")().convert(tmp_path / "other", Videos(folder), notes))


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("Press button10, then button1", ["button1", "button10"], ["button10", "button1"]),
        ("Press button10", ["button1", "button10"], ["button10"]),
        ("Turn knob 1 to 10 and on/off", ["knob 1", "knob 10", "on", "on/off", "1"], ["knob 1", "on/off"]),
        ("Press it", ["", "press"], []),
        ("Press it", [], []),
    ],
)
def test_names_of_buttons_do_not_collide(text, names, found):
    assert find_buttons(text, names) == found


def test_measures_by_hand():
    """Three steps of two questions: rank 1 of 2, rank 3 of 4, and rank 2 of 2, with equal scores in the second."""
    step = {"image": None, "ask": NEXT}
    first = [{**step, "candidates": ["a", "b"], "correct": 0}, {**step, "candidates": list("abcd"), "correct": 1}]
    second = [{**step, "candidates": ["a", "b"], "correct": 1}]
    hidden = [{**step, "candidates": ["a", "b"], "correct": None}]
    rows = [
        {"truth": {"folder": "x", "question": q, "steps": s}} for q, s in (("1", first), ("2", second), ("3", hidden))
    ]
    own = [[[-1.0, -2.0], [-1.0, -2.0, -2.0, -3.0]], [[-1.0, -2.0]], [[-1.0, -2.0]]]
    predictions = [
        {"scores": own[0], "true_history": [[-1.0, -2.0], [-2.0, -1.0, -2.0, -3.0]]},
        {"scores": own[1], "true_history": own[1]},
        {"scores": own[2], "true_history": None},
    ]
    task = find_task("aqtc_guidance")
    scores = task.score(rows, predictions, {})
    assert {name: value for name, value in scores.items() if "true" not in name} == pytest.approx(
        {
            "recall@1": 1 / 3,
            "recall@3": 1.0,
            "mean_rank": 2.0,
            "mrr": (2 / 1 + 4 / 3 + 2 / 2) / 3,
            "reciprocal_rank": (1 + 1 / 3 + 1 / 2) / 3,
        }
    )
    assert scores["recall@1_true_history"] == pytest.approx(2 / 3)
    # numpy's argsort, reversed, puts the last of equal candidates first.
    assert task.score(rows, predictions, {}, official=True)["mean_rank"] == 2.0
    first[1]["correct"] = 2
    assert task.score(rows, predictions, {}, official=True)["mean_rank"] == pytest.approx(5 / 3)
    assert task.score(rows[2:], predictions[2:], {}) == {}


def test_the_command_prepares_rows_that_a_model_ranks(folder, tmp_path):
    paths = ["--annotations", folder, "--videos", folder, "--out", tmp_path]
    done = run_main(prepare.main, "aqtc", *paths, program="prepare.py")
    assert done.returncode == 0 and "train: 1 row (1 aqtc_guidance)" in done.stdout, done.stderr
    rows = load_timed_messages(tmp_path, "train", video_root=[folder])
    assert not list(find_faults(rows))
    runner, task, row = Runner(tiny_model(), tiny_processor()), find_task("aqtc_guidance"), rows[0]
    prediction = json.loads(json.dumps(task.predict(runner, row)))
    first, second = prediction["scores"]
    # The first step follows the question and the script, and the second the model's own choice.
    before, said = row["messages"][:3], {"role": "assistant", "content": "", "time": 4.5}
    assert first == pytest.approx(
        runner.likelihoods({**row, "messages": [*before, said]}, ["Press button1", "Press button10"], per_token=True)
    )
    for index, (choice, scores) in enumerate(((first.index(max(first)), second), (1, prediction["true_history"][1]))):
        text = row["truth"]["steps"][0]["candidates"][choice]
        history = [*before, {**said, "content": text}, {"role": "user", "content": NEXT, "time": 4.5}]
        expected = runner.likelihoods(
            {**row, "messages": [*history, said]}, ["Wait", "Open it", "Close it"], per_token=True
        )
        assert scores == pytest.approx(expected), index
    (path,) = task.write_files(tmp_path, [row], [prediction], {})
    assert json.loads(path.read_text()) == {
        "kettle": [{"question": "How to boil water?", "scores": prediction["scores"]}]
    }
