# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`train/data/coin.py`, on an annotation file of our own in COIN's layout, with the faults of real ones."""

import json
import re

import pytest
from openpyxl import Workbook
from programs import run_main
from tiny import random_frames, tiny_processor, write_clip

from videollm_mod.train.data import prepare
from videollm_mod.train.data.coin import clean_goal, clean_label
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.video_reading_videollm_mod import read_video


def step(start, end, label, **changes):
    return {"id": "212", "segment": [start, end], "label": label} | changes


def entry(goal, subset, *steps, **changes):
    about = {"duration": 20.0, "class": goal, "video_url": "https://www.youtube.com/embed/x", "recipe_type": 1}
    return {**about, "start": 1.2, "end": 18.4, "subset": subset, "annotation": list(steps), **changes}


SIX = [step(2 * i, 2 * i + 1, f"do part {i}") for i in range(6)]
DATABASE = {
    # The end of the part and of the last step lie beyond the file, whose last frame is at 19.5 s.
    "aaaaaaaaaaa": entry(
        "ReplaceCDDriveWithSSD",
        "training",
        step(1.2, 4.0, "take out the laptop CD drive"),
        step(3.9, 9.0, "process (crop, fold) paper"),
        step(9.0, 9.0, "take out the laptop CD drive"),
        step(12.1, 25.0, "mix raw materials"),
        end=25.0,
    ),
    "bbbbbbbbbbb": entry("MakeSandwich", "testing", step(0.0, 3.0, "spread butter")),
    "ccccccccccc": entry("MakeSandwich", "testing", *SIX),
    # Nobody has this video any more. Its labels stay in the dictionaries.
    "ddddddddddd": entry("PutOnHairExtensions", "training", step(0.0, 3.0, "comb hair")),
    "eeeeeeeeeee": entry(
        None,
        "training",
        step(1.0, 2.0, None),
        step("3.0", "4.5", "cut bread"),
        {"id": "5", "label": "eat bread"},
        step(8.0, 7.0, "clean table"),
        step(40.0, 50.0, "go home"),
        "nonsense",
        start="?",
    ),
    "fffffffffff": entry("MakeSandwich", "training", annotation=None, start="?"),
    "iiiiiiiiiii": entry(
        None,
        "validation",
        step(6.0, 8.0, "eat it"),
        {"id": "5", "label": "wash up"},
        step(1.0, 3.0, "cook it"),
    ),
    "ggggggggggg": entry("MakeSandwich", None, *SIX),
    "hhhhhhhhhhh": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coin")
    (folder / "videos").mkdir()
    clip = write_clip(folder / "videos" / "aaaaaaaaaaa.mp4", random_frames(200), fps=10)
    for name in ("bbbbbbbbbbb", "ccccccccccc", "eeeeeeeeeee", "fffffffffff", "iiiiiiiiiii"):
        (folder / "videos" / f"{name}.mp4").symlink_to(clip)
    (folder / "COIN.json").write_text(json.dumps({"database": DATABASE}))
    return folder


def run(folder, out, *arguments):
    paths = ("--annotations", folder, "--videos", folder / "videos", "--out", out)
    return run_main(prepare.main, "coin", *paths, *arguments, program="prepare.py")


@pytest.fixture(scope="module")
def prepared(folder):
    tasks = "step,task,next,procedure,taskprocedure,streaming"
    done = run(folder, folder / "out", "--task", tasks)
    assert done.returncode == 0, done.stderr
    about = json.loads((folder / "out" / "about.json").read_text())
    rows = {
        row["id"]: row
        for split in ("train", "test")
        for row in load_timed_messages(folder / "out", split, video_root=[folder])
    }
    return rows, about, done.stdout


def asked(row):
    """Return what a row shows, asks and answers."""
    question, answer = row["messages"]
    assert "time" not in question and answer["time"] == row["end"]
    return row["start"], row["end"], question["content"], answer["content"]


def test_the_five_tasks_of_a_video(prepared):
    rows = prepared[0]
    assert asked(rows["aaaaaaaaaaa/0/step"]) == (
        1.5,
        4.0,
        "Which action does the video show? Answer with its name only.",
        "Take out the laptop cd drive.",
    )
    assert rows["aaaaaaaaaaa/0/step"]["truth"] == {"label": "take out the laptop cd drive"}
    assert asked(rows["aaaaaaaaaaa/1/step"])[::3] == (4.0, "Crop and fold paper.")
    assert asked(rows["aaaaaaaaaaa/task"])[:2] == (1.5, 19.5), "cut at the last frame"
    assert rows["aaaaaaaaaaa/task"]["truth"] == {"label": "replace cd drive with ssd"}
    assert asked(rows["aaaaaaaaaaa/0/next"])[3] == "Crop and fold paper."
    assert "aaaaaaaaaaa/3/next" not in rows and "bbbbbbbbbbb/0/next" not in rows, "nothing comes next"
    start, end, question, answer = asked(rows["ccccccccccc/0/procedure"])
    assert "Which 5 actions" in question and answer.splitlines()[::4] == ["1. Do part 1.", "5. Do part 5."]
    assert rows["ccccccccccc/0/procedure"]["truth"] == {"labels": [f"do part {i}" for i in range(1, 6)]}
    assert asked(rows["ccccccccccc/3/taskprocedure"])[2].startswith("The goal is to make sandwich. Which 2 actions")
    # With one step left, the question is that of the next step, and the answer has no number.
    assert asked(rows["ccccccccccc/4/procedure"])[2:] == asked(rows["ccccccccccc/4/next"])[2:]
    assert rows["ccccccccccc/4/procedure"]["truth"] == {"labels": ["do part 5"]}
    assert asked(rows["ccccccccccc/4/taskprocedure"])[2].startswith("The goal is to make sandwich. Which action comes")


def test_the_end_frame_is_part_of_a_clip(prepared):
    row = prepared[0]["aaaaaaaaaaa/0/step"]
    times = [time for time, _ in read_video(row["video"], fps=2, start=row["start"], end=row["end"])]
    assert times == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0], "1.2 s and 4.0 s, both moved to the grid"
    instant = prepared[0]["aaaaaaaaaaa/2/step"]
    assert (instant["start"], instant["end"]) == (9.0, 9.0), "a step of no length has one frame"
    text = tiny_processor().to_stream_turns(row["messages"], len(times), start=row["start"])
    assert [turn.get("num_frames", turn["role"]) for turn in text] == ["user", 6, "assistant"]


def test_guiding_through_a_video_as_a_stream(prepared):
    row = prepared[0]["aaaaaaaaaaa/streaming"]
    question, *replies = row["messages"]
    assert question == {
        "role": "user",
        "content": "I want to replace CD drive with SSD. Tell me which step begins, what to try next, and when a step "
        "is done.",
    }
    drive, fold, mix = "take out the laptop CD drive", "crop and fold paper", "mix raw materials"
    assert [(reply["time"], reply["content"]) for reply in replies] == [
        (1.5, f"Now begins: {drive}. Try next: {fold}."),
        (4.0, f"Done: {drive}. Now begins: {fold}. Try next: {drive}."),
        (9.0, f"Done: {fold}. Now begins: {drive}. Try next: {mix}. Done: {drive}."),
        (12.5, f"Now begins: {mix}."),
        (19.5, f"Done: {mix}."),
    ]
    assert row["truth"]["steps"][-1] == {"label": mix, "frames": [25, 39]}


def test_dictionaries_come_from_the_full_annotation(prepared):
    rows, about, _ = prepared
    labels = about["labels"]
    assert "comb hair" in labels["coin_step"] and "put on hair extensions" in labels["coin_task"]
    assert labels["coin_step"] == labels["coin_next"] == labels["coin_procedure"] == labels["coin_taskprocedure"]
    assert labels["coin_step"] == sorted(set(labels["coin_step"])) and "coin_streaming" not in labels
    for row in rows.values():
        truth = row["truth"]
        known = labels.get(row["task"], [])
        assert {truth["label"]} <= set(known) if "label" in truth else set(truth.get("labels", [])) <= set(known)
    assert about["license"] == "CC BY-NC 4.0" and about["splits"]["test"]["rows"] == 26


def test_faults_are_counted_with_row_and_field(prepared):
    rows, about, table = prepared
    train = about["splits"]["train"]
    assert train["left_out"] == {
        "there is no video file": 1,
        "there is no text": 3,
        "there are no two times": 2,
        "the time is not a number": 1,
        "it ends before it starts": 1,
        "after the end of the video": 1,
        "there is no step": 1,
    }
    assert train["mended"] == {
        "overlaps the step before: kept": 1,
        "zero length: one frame": 1,
        "a time written as text: read as a number": 2,
        "ends after the video: cut": 2,
    }
    assert about["splits"][""]["left_out"] == {"is neither training nor testing": 2}
    assert "left out 1: after the end of the video (eeeeeeeeeee, annotation[4].segment)" in table
    assert "left out 2: is neither training nor testing (ggggggggggg, subset; hhhhhhhhhhh, subset)" in table
    # A step without a time has no clip, and is still what comes next.
    assert {name for name in rows if name.startswith("eeeeeeeeeee")} == {
        "eeeeeeeeeee/0/next",
        "eeeeeeeeeee/1/step",
        "eeeeeeeeeee/1/next",
    }
    assert asked(rows["eeeeeeeeeee/1/step"])[:2] == (3.0, 4.5)
    assert asked(rows["eeeeeeeeeee/1/next"])[3] == "Eat bread."


def test_steps_are_sorted_around_those_without_times(prepared, folder):
    about = prepared[1]
    rows = {row["id"]: row for row in load_timed_messages(folder / "out", "validation", video_root=[folder])}
    assert asked(rows["iiiiiiiiiii/2/next"])[3] == "Eat it."
    assert asked(rows["iiiiiiiiiii/0/next"])[3] == "Wash up."
    assert about["splits"]["validation"]["mended"] == {"steps not in order of time: sorted": 1}


@pytest.mark.usefixtures("prepared")
def test_prepared_rows_have_no_fault(folder):
    for split in ("train", "test"):
        assert not list(find_faults(load_timed_messages(folder / "out", split, video_root=[folder])))


def test_labels_of_the_taxonomy(folder, tmp_path):
    book = Workbook()
    sheet = book.create_sheet("target_action_mapping")
    sheet.append(["Target Id", "Target Label", "Action Id", "Action Label"])
    sheet.append([1, "WashSIMCard", 7, "Wash SIM card"])
    sheet.append([2, "MakeSandwich", 8, "spread butter"])
    sheet.append([3, "MakeSandwich", 9, "Spread butter"])
    book.save(tmp_path / "taxonomy.xlsx")
    done = run(folder, tmp_path / "out", "--task", "task,step", "--taxonomy", tmp_path / "taxonomy.xlsx")
    assert done.returncode == 0, done.stderr
    labels = json.loads((tmp_path / "out" / "about.json").read_text())["labels"]
    assert labels == {"coin_step": ["spread butter", "wash sim card"], "coin_task": ["make sandwich", "wash sim card"]}
    other = run(folder, tmp_path / "out", "--taxonomy", folder / "COIN.json")
    assert other.returncode == 1 and "is no taxonomy of COIN: it needs the sheet" in other.stderr


def test_videos_of_another_split_are_counted(folder, tmp_path):
    shown = run(folder, tmp_path / "out", "--split", "test").stdout
    assert re.search(r"^test: .*\n(  .*\n)*  left out \d+: of another split \(", shown, flags=re.MULTILINE), shown


def test_strict_names_the_first_fault(folder, tmp_path):
    done = run(folder, tmp_path / "out", "--strict", "--split", "train")
    assert done.returncode == 1
    assert done.stderr == "error: aaaaaaaaaaa, annotation[2].segment: zero length: one frame\n"


@pytest.mark.parametrize("content", [[], {"database": []}, {"videos": {}}])
def test_another_file_is_refused(folder, tmp_path, content):
    (tmp_path / "COIN.json").write_text(json.dumps(content))
    done = run(folder, tmp_path / "out", "--annotations", tmp_path / "COIN.json")
    assert done.returncode == 1 and "has no object `database`: give COIN.json as it was published." in done.stderr


def test_words_are_cleaned_as_in_live():
    goals = {"PutOnHairExtensions": "put on hair extensions", "ReplaceSIMCard": "replace SIM card"}
    goals |= {
        "InstallTVOnWall": "install TV on wall",
        "MakeRJ45Cable": "make RJ45 cable",
        "PerformCPR": "perform c p r",
    }
    assert {goal: clean_goal(goal) for goal in goals} == goals
    long = "try to press gun head, spray residual old grease"
    assert clean_label(long) == "try to press gun head to spray residual old grease" and clean_label("SIM") == "SIM"
