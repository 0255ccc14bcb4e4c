# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Charades-STA and QVHighlights in their published layouts become streams; all samples are made up."""

import json

import pytest
from tiny import random_frames, write_clip

from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.tasks import find_task


@pytest.fixture
def folder(tmp_path):
    """A folder of two videos of ten seconds."""
    (tmp_path / "videos").mkdir()
    for name in ("AB12C", "xyz_60.0_210.0"):
        write_clip(tmp_path / "videos" / f"{name}.mp4", random_frames(20), fps=2)
    (tmp_path / "annotations").mkdir()
    return tmp_path


def save(folder, name, *lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "annotations" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def convert(source, folder, **options):
    """Return the rows by split and id, and what was left out or mended."""
    notes = Notes()
    rows = find_converter(source)(**options).convert(folder / "annotations", Videos(folder / "videos"), notes)
    rows = {(split, row["id"]): row for split, row in rows}
    left = {reason: found.count for split in notes.left_out.values() for reason, found in split.items()}
    mended = {what: found.count for split in notes.mended_by.values() for what, found in split.items()}
    return rows, left, mended


def said(row):
    return [(message["time"], message["content"].rsplit(" ", 1)[1]) for message in row["messages"][1:]]


def test_charades_sta_lines(folder):
    save(
        folder,
        "charades_sta_train.txt",
        "AB12C 1.2 4.0##person opens a door.",
        "AB12C 0.0 30.4##person turns.",
        "ZZZZZ 0.0 3.0##person runs.",
        "AB12C 5.0 4.0##person sits.",
        "",
        "AB12C 24.3 30.4##person sleeps.",
        "no line of this file",
        "AB12C x 3##person eats.",
        "AB12C 2.0 3.0##",
    )
    save(folder, "charades_sta_test.txt", "AB12C 1.0 2.0##person laughs.")
    save(folder, "Charades_v1_train.csv", "id,subject,length", "AB12C,S1,30.96")
    rows, left, mended = convert("charades_sta", folder)
    assert list(rows) == [("test", "AB12C/0"), ("train", "AB12C/0"), ("train", "AB12C/1")]
    row = rows["train", "AB12C/0"]
    assert said(row) == [(1.5, "starts."), (4.0, "ends.")] and row["task"] == "charades_sta_moments"
    assert row["messages"][1]["content"] == 'The video related to the query "person opens a door" starts.'
    question = row["messages"][0]
    assert '"person opens a door"' in question["content"] and "time" not in question
    assert row["truth"] == {
        "query": "person opens a door.",
        "vid": "AB12C",
        "windows": [[1.2, 4.0]],
        "duration": 30.96,
    }
    assert said(rows["train", "AB12C/1"]) == [(0.0, "starts."), (9.5, "ends.")]
    assert rows["train", "AB12C/1"]["truth"]["windows"] == [[0.0, 10.0]], "cut at the end of the video"
    assert left == {
        "there is no video file": 1,
        "it ends before it starts": 1,
        "starts after the end of the video": 1,
        "is not 'id start end##sentence'": 1,
        "there is no time": 1,
        "there is no text": 1,
    }, "a query with one window is counted once"
    assert mended["ends after the video: cut"] == 1
    # The ids of rows do not depend on which split was asked for.
    some, left, _ = convert("charades_sta", folder, split="train")
    assert some.keys() == {("train", "AB12C/0"), ("train", "AB12C/1")} and left["of another split"] > 0


def test_qvhighlights_rows(folder):
    """Several windows, scores of three annotators, and test queries that were published twice."""
    row = {"qid": 7, "query": "A dog is seen", "duration": 10, "vid": "xyz_60.0_210.0"}
    told = {
        "relevant_windows": [[6, 8], [0, 2]],
        "relevant_clip_ids": [0, 3],
        "saliency_scores": [[1, 4, 2], [0, 0, 3]],
    }
    save(
        folder, "highlight_train_release.jsonl", {**row, **told}, "{", "[]", {**row, "qid": 8, "relevant_windows": []}
    )
    save(folder, "highlight_test_release.jsonl", row, {**row, "qid": 9})
    save(folder, "highlight_test_with_gt.jsonl", {**row, **told})
    rows, left, mended = convert("qvhighlights", folder)
    assert rows.keys() == {("train", "7"), ("test", "7")} and not mended
    assert said(rows["train", "7"]) == [(0.0, "starts."), (2.0, "ends."), (6.0, "starts."), (8.0, "ends.")]
    assert rows["test", "7"]["truth"] == {
        "query": "A dog is seen",
        "vid": "xyz_60.0_210.0",
        "windows": [[6.0, 8.0], [0.0, 2.0]],
        "duration": 10.0,
        "saliency": {"clips": [0, 3], "scores": [[1.0, 4.0, 2.0], [0.0, 0.0, 3.0]]},
    }
    assert left == {"is no JSON object": 2, "no window is left": 1, "published without its windows": 1}


@pytest.mark.parametrize(
    ("clips", "scores"), [(3, [[1]]), ([0], None), ([0], [[1], [2]]), ([-1], [[1]]), ([0], [["x"]]), ([0], [[]])]
)
def test_unusable_scores_of_clips_are_left_out(folder, clips, scores):
    row = {"qid": 7, "query": "A dog", "duration": 10, "vid": "xyz_60.0_210.0", "relevant_windows": [[0, 2]]}
    save(folder, "highlight_val_release.jsonl", {**row, "relevant_clip_ids": clips, "saliency_scores": scores})
    rows, _, mended = convert("qvhighlights", folder)
    assert "saliency" not in rows["validation", "7"]["truth"]
    assert mended == {"the scores of clips are unusable: left out": 1}


def test_charades_sta_in_the_layout_of_qvhighlights(folder):
    row = {"qid": 12404, "query": "person opens a door.", "duration": 30.96, "vid": "AB12C"}
    save(folder, "charades_sta_test_tvr_format.jsonl", {**row, "relevant_windows": [[1.2, 4.0]]})
    rows, *_ = convert("charades_sta", folder)
    row = rows["test", "AB12C/0"]
    assert said(row) == [(1.5, "starts."), (4.0, "ends.")]
    # The scorer that reads the copy knows its queries by `qid`.
    (path,) = find_task("charades_sta_moments").write_files(folder, [row], [{"replies": []}], {})
    assert json.loads(path.read_text())["qid"] == 12404


def test_files_of_other_data_sets_are_errors(folder):
    save(folder, "train.jsonl", {"a": 1})
    save(folder, "train.txt", "nothing")
    for source, title in (("qvhighlights", "QVHighlights"), ("charades_sta", "Charades-STA")):
        with pytest.raises(ValueError, match=f"has no file in the format of {title}"):
            convert(source, folder)
