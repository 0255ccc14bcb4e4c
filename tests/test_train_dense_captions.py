# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""ActivityNet Captions and YouCook2 in their published layouts become streams; all samples are made up."""

import json

import pytest
from programs import run_main
from tiny import random_frames, write_clip

from videollm_mod.train.data import prepare
from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


VIDEOS = ("v_aaaaaaaaaaa", "v_bbbbbbbbbbb", "ccccccccccc")


@pytest.fixture
def folder(tmp_path):
    """A folder of three videos of ten seconds."""
    (tmp_path / "videos").mkdir()
    for name in VIDEOS:
        write_clip(tmp_path / "videos" / f"{name}.mp4", random_frames(20), fps=2)
    (tmp_path / "annotations").mkdir()
    return tmp_path


def save(folder, **documents):
    for name, document in documents.items():
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(document))


def convert(source, folder, *, strict=False, **options):
    """Return the rows by id, with their splits, and what was left out or mended."""
    notes = Notes(strict=strict)
    rows = find_converter(source)(**options).convert(folder / "annotations", Videos(folder / "videos"), notes)
    rows = {row["id"]: (split, row) for split, row in rows}
    left = {reason: found.count for split in notes.left_out.values() for reason, found in split.items()}
    mended = {what: found.count for split in notes.mended_by.values() for what, found in split.items()}
    return rows, left, mended


def said(row):
    return [(message["time"], message["content"]) for message in row["messages"][1:]]


def test_captions_are_said_when_their_events_end(folder):
    """The events overlap and are not in order; replies are in order of their ends, then of their starts."""
    entry = {
        "duration": 10,
        "timestamps": [[0.0, 10.0], [4, 6.2], [0, 3.0]],
        "sentences": [" a dog plays.", " The dog  jumps", "It runs!"],
    }
    save(folder, train={"v_aaaaaaaaaaa": entry}, train_ids=["v_aaaaaaaaaaa"])
    rows, left, mended = convert("activitynet", folder)
    split, row = rows["v_aaaaaaaaaaa"]
    assert split == "train" and not left
    assert mended == {"not in order of time: sorted": 1, "overlaps the event before: kept": 1}
    assert row["messages"][0].keys() == {"role", "content"} and "when it is over" in row["messages"][0]["content"]
    assert said(row) == [(3.0, "It runs!"), (6.5, "The dog jumps."), (9.5, "A dog plays.")]
    assert (row["start"], row["end"], row["task"]) == (0.0, 9.5, "activitynet_captions")
    assert row["truth"] == {
        "duration": 10.0,
        "timestamps": [[0.0, 10.0], [4.0, 6.2], [0.0, 3.0]],
        "sentences": ["a dog plays.", "The dog jumps", "It runs!"],
        "references": [],
        "say_at": "end",
    }


def test_captions_are_said_when_their_events_start(folder):
    entry = {"duration": 10, "timestamps": [[5, 6], [1, 9]], "sentences": ["Two.", "One."]}
    save(folder, train={"v_aaaaaaaaaaa": entry})
    _, row = convert("activitynet", folder, say_at="start")[0]["v_aaaaaaaaaaa"]
    assert said(row) == [(1.0, "One."), (5.0, "Two.")] and row["truth"]["say_at"] == "start"
    assert "when it starts" in row["messages"][0]["content"]


def test_captions_at_one_frame_are_one_reply(folder):
    """Nothing that the annotators wrote is lost, and equal words are said once in a reply."""
    entry = {
        "duration": 10,
        "timestamps": [[6, 10], [0, 10], [8, 9.8], [1, 2], [2, 3]],
        "sentences": ["Later.", "All.", "Later.", "Same.", "Same."],
    }
    save(folder, train={"v_aaaaaaaaaaa": entry})
    rows, left, mended = convert("activitynet", folder)
    assert said(rows["v_aaaaaaaaaaa"][1]) == [(2.0, "Same."), (3.0, "Same."), (9.5, "Later. All.")]
    assert left == {}
    assert mended["is said at the same frame as another: one reply"] == 2


def test_second_annotator_is_a_reference(folder):
    """`val_2.json` adds no row and no reply."""
    first = {"duration": 10.0, "timestamps": [[0, 5]], "sentences": ["First."]}
    second = {"duration": 10.0, "timestamps": [[0, 4], [4, 9]], "sentences": ["Second.", "Third."]}
    save(
        folder,
        val_1={"v_aaaaaaaaaaa": first, "v_bbbbbbbbbbb": first},
        val_2={"v_aaaaaaaaaaa": second, "v_ddddddddddd": second},
    )
    rows, _, mended = convert("activitynet", folder)
    assert {name: split for name, (split, _) in rows.items()} == dict.fromkeys(VIDEOS[:2], "validation")
    assert mended == {"a second annotator: a reference": 1}
    truth = rows["v_aaaaaaaaaaa"][1]["truth"]
    assert truth["references"] == [{"timestamps": [[0.0, 4.0], [4.0, 9.0]], "sentences": ["Second.", "Third."]}]
    assert said(rows["v_aaaaaaaaaaa"][1]) == [(5.0, "First.")]
    assert rows["v_bbbbbbbbbbb"][1]["truth"]["references"] == []
    # Without the first annotator's file, the second is the truth.
    (folder / "annotations" / "val_1.json").unlink()
    rows, *_ = convert("activitynet", folder)
    assert rows["v_aaaaaaaaaaa"][1]["truth"]["sentences"] == ["Second.", "Third."]


def test_faulty_entries_are_counted(folder):
    times = [[5, 2], [3, 3], [4], None, ["a", 2], [1, 2], [3, 4], ["5", 6.5], [12, 13], [-1, 2], [8, 14], [True, 5]]
    texts = ["x"] * 5 + ["", None, "Text.", "Late.", "Early.", "Long.", "y", "one too many"]
    save(
        folder,
        train={
            "v_aaaaaaaaaaa": {"duration": "99", "timestamps": times, "sentences": texts},
            "v_bbbbbbbbbbb": None,
            "ccccccccccc": {"duration": None, "timestamps": 3, "sentences": "no"},
            "v_ddddddddddd": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["Gone."]},
        },
    )
    rows, left, mended = convert("activitynet", folder)
    assert said(rows["v_aaaaaaaaaaa"][1]) == [(2.0, "Early."), (6.5, "Text."), (9.5, "Long.")]
    assert rows.keys() == {"v_aaaaaaaaaaa"} and rows["v_aaaaaaaaaaa"][1]["truth"]["duration"] == 99.0
    assert [8.0, 10.0] in rows["v_aaaaaaaaaaa"][1]["truth"]["timestamps"], "cut at the end of the video"
    assert left == {
        "the numbers of timestamps and sentences differ: the rest": 1,
        "it ends before it starts": 1,
        "it ends where it starts": 1,
        "there are no two times": 2,
        "the time is not a number": 2,
        "there is no text": 2,
        "starts after the end of the video": 1,
        "no event is left": 2,
        "there is no video file": 1,
    }
    assert mended == {
        "a time written as text: read as a number": 1,
        "it starts before the video: moved to its start": 1,
        "ends after the video: cut": 1,
        "not in order of time: sorted": 1,
        "the video has another length than annotated: kept": 1,
    }


def test_youcook2_in_its_own_layout(folder):
    """`annotations` where COIN has `annotation`, ids as text, whole seconds."""

    def entry(subset, *items):
        items = [{"segment": time, "id": index, "sentence": text} for index, (time, text) in enumerate(items)]
        return {"duration": 9.99, "subset": subset, "recipe_type": "101", "video_url": "", "annotations": items}

    database = {
        "aaaaaaaaaaa": entry("training", ([1, 3], "cut an onion"), ([4, 6], "fry it")),
        "ccccccccccc": entry("validation", ([0, 4], "boil the water")),
        "bbbbbbbbbbb": entry(None, ([0, 4], "boil the water")),
        "ddddddddddd": None,
    }
    save(folder, youcookii_annotations_trainval={"database": database})
    rows, left, mended = convert("youcook2", folder)
    assert {name: split for name, (split, _) in rows.items()} == {"aaaaaaaaaaa": "train", "ccccccccccc": "validation"}
    assert said(rows["aaaaaaaaaaa"][1]) == [(3.0, "Cut an onion."), (6.0, "Fry it.")]
    assert "step of the recipe" in rows["aaaaaaaaaaa"][1]["messages"][0]["content"]
    assert left == {"is neither training nor validation nor testing": 2} and not mended


def test_youcook2_in_the_layout_of_activitynet(folder):
    """In this copy the ids begin with "v_", and its test split has no sentences."""
    entry = {"duration": 10.0, "timestamps": [[0, 1]], "sentences": ["None"]}
    steps = {"duration": 10.0, "timestamps": [[0, 4]], "sentences": ["boil the water"]}
    save(folder, yc2_val={"v_ccccccccccc": steps}, yc2_test={"v_aaaaaaaaaaa": entry})
    rows, left, _ = convert("youcook2", folder)
    assert rows.keys() == {"v_ccccccccccc"} and rows["v_ccccccccccc"][0] == "validation"
    assert left == {"there is no text": 1, "no event is left": 1}
    rows, left, _ = convert("youcook2", folder, split="test")
    assert rows == {} and left["of another split"] == 1


def test_the_command_writes_rows_without_faults(folder):
    entry = {"duration": 10, "timestamps": [[0, 5], [5, 10]], "sentences": ["One.", "Two."]}
    save(folder, anything={"v_aaaaaaaaaaa": entry})
    paths = ["--annotations", folder / "annotations", "--videos", folder / "videos", "--out", folder / "out"]
    done = run_main(prepare.main, "activitynet", *paths, program="prepare.py")
    assert done.returncode == 1 and "name its split with --split" in done.stderr
    done = run_main(prepare.main, "activitynet", *paths, "--split", "validation", program="prepare.py")
    assert done.returncode == 0 and "validation: 1 row (1 activitynet_captions)" in done.stdout, done.stderr
    rows = load_timed_messages(folder / "out", "validation", video_root=[folder])
    assert rows[0]["truth"]["sentences"] == ["One.", "Two."] and not list(find_faults(rows))


def test_files_of_other_data_sets_are_errors(folder):
    coin = {"database": {"aaaaaaaaaaa": {"duration": 1.0, "annotation": [], "subset": "training"}}}
    save(folder, train=coin)
    for source, title in (("activitynet", "ActivityNet Captions"), ("youcook2", "YouCook2")):
        with pytest.raises(ValueError, match=f"has no file in the format of {title}"):
            convert(source, folder)
    (folder / "annotations" / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file that ends in \.json"):
        convert("activitynet", folder)
