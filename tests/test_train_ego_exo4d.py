# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`train/data/ego_exo4d.py`: keysteps and atomic descriptions. Annotations are made up, in the published layouts."""

import pytest
from ego_annotations import (
    MAPPING,
    benchmark,
    convert,
    described,
    key,
    keysteps,
    pass_of,
    said,
    save,
    segment,
    take,
    write_ego_downloads,
)
from programs import run_main
from tiny import random_frames, write_clip

from videollm_mod.train.data import prepare
from videollm_mod.train.data.ego_exo4d import EgoExo4D, read_labels
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


# Seconds of the video.
SECONDS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A download: the views of take "t_1", the small version of another's, and a clip of one segment."""
    folder = tmp_path_factory.mktemp("egoexo")
    clip = write_clip(folder / "clip.mp4", random_frames(SECONDS), fps=1)
    for path in (
        "takes/t_1/frame_aligned_videos/aria02_214-1.mp4",
        "takes/t_1/frame_aligned_videos/cam01.mp4",
        "takes/t_2/frame_aligned_videos/downscaled/448/aria01_214-1.mp4",
        "takes/t_2/frame_aligned_videos/aria01_214-1.mp4",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(clip)
    write_clip(folder / "short.mp4", random_frames(2), fps=1)
    (folder / "train/t_9").mkdir(parents=True)
    (folder / "short.mp4").rename(folder / "train/t_9/start1.5_end3.5_aria01_214-1.mp4")
    return folder


TAKES = [take("u-1", "t_1"), take("u-2", "t_2", "aria01"), {"take_uid": None}, 3, {"take_uid": "u-3", "root_dir": "x"}]

# ----------------------------------------------------------------------------------------------------------- keysteps


def test_a_name_of_several_scenarios_has_the_scenario(tmp_path):
    labels = read_labels(save(tmp_path, "label_mapping.csv", "\ufeff" + MAPPING))
    assert [label.name for label in labels.values()] == [
        "unbox package",
        "get eggs (making cucumber salad)",
        "get eggs (making omelet)",
        "cut, or slice, tomato",
    ]
    assert [(label.id, set(label.steps)) for label in labels.values()] == [(0, {843}), (1, {12}), (2, {57}), (3, {60})]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,1,Stir,Making Tea", "line 6: needs label_id"),
        ("4,1,,Making Tea", "line 6: needs label_id"),
        ("1,13,Get an egg,Making Tea", "line 6: label_id 1 has two names"),
        ("4,61,Get Eggs,Making Omelet", "two classes have the same step_name and scenario_name"),
    ],
)
def test_a_mapping_that_is_ambiguous_is_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_labels(save(tmp_path, "label_mapping.csv", MAPPING + row))


def test_a_segment_asks_for_its_keystep(tmp_path, root):
    """The view is the one that the segment names, and the label is that of `label_id`."""
    benchmark(tmp_path, segment(1.2, 4.4, 2))
    save(tmp_path, "takes.json", [take("u-1", "t_2", "aria01")])
    ((split, row),), counts, converter = convert(EgoExo4D, tmp_path, root, task="keystep")
    assert (
        split == "validation" and counts == {} and row["id"] == "u-1/keystep-0" and row["task"] == "ego_exo4d_keystep"
    )
    assert row["video"] == str(root / "takes/t_1/frame_aligned_videos/aria02_214-1.mp4")
    assert (row["start"], row["end"]) == (1.5, 4.5)
    assert said(row)[0][:2] == (None, "u") and said(row)[1] == (4.5, "a", "Get eggs (making omelet).")
    assert row["truth"] == {"label_id": 2, "label": "get eggs (making omelet)"}
    assert len(converter.labels["ego_exo4d_keystep"]) == 4


def test_small_views_and_clips_come_first(tmp_path, root):
    """A clip of the segment is shown from its beginning to its end."""
    file = benchmark(
        tmp_path,
        segment(0.0, 2.0, 0, name="t_2", uid="u-2", camera="aria01"),
        segment(1.5, 3.5, 0, name="t_9", uid="u-9", camera="aria01"),
        split="train",
    )
    rows, counts, _ = convert(EgoExo4D, file, root)
    assert counts == {} and [(row["video"].removeprefix(f"{root}/"), row["start"], row["end"]) for _, row in rows] == [
        ("takes/t_2/frame_aligned_videos/downscaled/448/aria01_214-1.mp4", 0.0, 2.0),
        ("train/t_9/start1.5_end3.5_aria01_214-1.mp4", 0.0, 1.5),
    ]
    # The folder of videos may be that of the takes.
    rows, counts, _ = convert(EgoExo4D, file, root / "takes")
    assert len(rows) == 1 and counts == {"there is no video file": 1}


@pytest.mark.parametrize("place", ["clips/train/t_9", "t_9", "deep/below/t_9"])
def test_clips_of_segments_lie_at_any_depth(tmp_path, root, place):
    """The folder of the take tells clips with the same times apart."""
    clip = root / "train/t_9/start1.5_end3.5_aria01_214-1.mp4"
    for folder in ("a/t_0", place):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        (tmp_path / "videos" / folder / clip.name).symlink_to(clip)
    file = benchmark(tmp_path, segment(1.5, 3.5, 0, name="t_9", uid="u-9", camera="aria01"), split="train")
    ((_, row),), counts, _ = convert(EgoExo4D, file, tmp_path / "videos")
    assert counts == {} and row["video"] == str(tmp_path / "videos" / place / clip.name)


def test_what_begins_in_the_last_frame_is_shown_by_it(tmp_path, root):
    """The last frame, at 9.5 s, shows the video up to its end at 10 s."""
    benchmark(tmp_path, segment(9.7, 12, 2), segment(10.6, 12, 2))
    ((_, row),), counts, _ = convert(EgoExo4D, tmp_path, root, task="keystep")
    assert (row["start"], row["end"]) == (9.5, 9.5)
    assert counts == {"after the end of the video: cut there": 1, "after the end of the video": 1}
    steps = [key(4, 6, "Pour"), key(9.8, 10.5, "Drink"), key(10.6, 12, "Wash")]
    save(tmp_path, "annotations/keystep_train.json", {"annotations": keysteps(*steps)})
    ((_, row),), counts, _ = convert(EgoExo4D, tmp_path, root, task="keystep_stream")
    assert said(row)[1:] == [(4.0, "a", "Pour."), (9.5, "a", "Drink.")]
    assert row["truth"]["timeline"] == [[4, 6, "Pour"], [9.8, 10.0, "Drink"]]
    assert counts == {"a step after the end of the video": 1}


def test_keysteps_of_the_test_split_have_no_reply(tmp_path, root):
    asked = segment(1.2, 4.4, None)
    for name in ("label_id", "step_unique_id", "step_name"):
        del asked[name]
    ((split, row),), counts, _ = convert(EgoExo4D, benchmark(tmp_path, asked, split="test_unannotated"), root)
    assert split == "test" and row["truth"] == {} and len(row["messages"]) == 1 and counts == {}


def test_a_file_that_names_another_split_is_left_out(tmp_path, root):
    file = benchmark(tmp_path, segment(1.5, 4.5, 2), split="val")
    rows, counts, _ = convert(EgoExo4D, file.rename(file.with_name("keystep_segment_train.json")), root)
    assert rows == [] and counts == {"a file of another split": 1}


def test_faults_of_keysteps_are_counted(tmp_path, root):
    file = benchmark(
        tmp_path,
        segment(1, 2, 7),
        segment(1, 2, None),
        segment(1, 2, 1, step_unique_id=99),
        segment("1.0", 2, 3.0, ego_segment_name=None),
        segment(2, 2, 3),
        segment(3, 2, 3),
        segment(None, 2, 3),
        segment(9, 12, 3),
        segment(11, 12, 3),
        segment(1, 2, 3, name="t_gone"),
        segment(1, 2, 3, uid=None),
        "segment",
    )
    rows, counts, _ = convert(EgoExo4D, file, root)
    assert [(row["id"], row["truth"]["label_id"], row["end"]) for _, row in rows] == [
        ("u-1/keystep-2", 1, 2.0),
        ("u-1/keystep-3", 3, 2.0),
        ("u-1/keystep-7", 3, 9.5),
    ]
    assert counts == {
        "the label is not in label_mapping.csv": 2,
        "another step than in label_mapping.csv: label_id is used": 1,
        "a time written as text: read as a number": 1,
        "it ends where it starts": 1,
        "it ends before it starts": 1,
        "there is no time": 1,
        "after the end of the video: cut there": 1,
        "after the end of the video": 1,
        "there is no video file": 1,
        "the segment names no take": 2,
    }


def test_keysteps_are_told_when_they_begin(tmp_path, root):
    """The truth has the timeline, with the faults of the annotation mended."""
    steps = [key(4.1, 6, "Pour"), key(0.2, 4.5, "boil water"), key(6, 7, "Pour"), key(7, 8, None), key(9, 8, "x")]
    entries = {**keysteps(*steps), **keysteps(uid="u-2", name="t_2"), **keysteps(steps[0], uid="u-8", name="t_8")}
    entries["u-4"] = []
    content = {"annotations": entries, "taxonomy": {}, "vocabulary": {}}
    save(tmp_path, "annotations/keystep_train.json", content)
    save(tmp_path, "takes.json", TAKES)
    ((split, row),), counts, _ = convert(EgoExo4D, tmp_path, root, task="keystep_stream")
    assert split == "train" and row["id"] == "u-1/keysteps" and (row["start"], row["end"]) == (0.5, 7.0)
    assert said(row)[1:] == [(0.5, "a", "Boil water."), (4.5, "a", "Pour.")] and said(row)[0][:2] == (0.5, "u")
    timeline = [[0.2, 4.5, "boil water"], [4.1, 6, "Pour"], [6, 7, "Pour"]]
    assert row["truth"] == {"goal": "Making Tea", "timeline": timeline}
    assert counts == {
        "steps not in order of time: sorted": 1,
        "a step overlaps the step before: kept with its own times": 1,
        "there is no text": 1,
        "it ends before it starts": 1,
        "the take has no steps": 1,
        "there is no video file": 1,
        "the entry names no take": 1,
    }


# ------------------------------------------------------------------------------------------------- atomic descriptions


def test_visible_descriptions_are_narrated(tmp_path, root):
    """The truth values are partly texts. The first description that is kept begins the row."""
    first = pass_of(
        described("C moves his right hand.", 0.03, visible="0"),
        described("C touches the screw.", 3.2),
        described("C lifts the wheel.", 5.9, visible=True),
        described("C waits.", 6.1, visible=False),
    )
    second = pass_of(described("C walks", 1.0), rejected="0")
    rejected = [pass_of(described("C sits.", 1.0), rejected=flag) for flag in (True, "1")]
    save(tmp_path, "annotations/atomic_descriptions_val.json", {"annotations": {"u-1": [first, *rejected, second]}})
    save(tmp_path, "takes.json", TAKES)
    rows, counts, _ = convert(EgoExo4D, tmp_path / "annotations", root)
    assert [(split, row["id"], row["task"]) for split, row in rows] == [
        ("validation", "u-1/pass-0", "ego_exo4d_atomic"),
        ("validation", "u-1/pass-3", "ego_exo4d_atomic"),
    ]
    row = rows[0][1]
    assert said(row)[1:] == [(3.5, "a", "C touches the screw."), (6.0, "a", "C lifts the wheel.")]
    assert said(row)[0][:2] == (3.5, "u") and (row["start"], row["end"]) == (3.5, 6.0)
    assert row["video"] == str(root / "takes/t_1/frame_aligned_videos/aria02_214-1.mp4")
    assert counts == {
        "not visible in the ego view": 2,
        "the pass was rejected": 2,
        "a truth value written as text: read as one": 3,
        "several annotators: their passes stay apart": 1,
    }


def test_faults_of_descriptions_are_counted(tmp_path, root):
    faulty = pass_of(
        described(None, 1),
        described("C", 1),
        described("C sits.", None),
        described("C sits.", 1, visible="maybe"),
        "text",
    )
    content = {"u-1": [faulty, {"descriptions": None}, 3], "u-2": {}, "u-3": [pass_of(described("C sits.", 1))]}
    save(tmp_path, "takes.json", TAKES)
    file = save(tmp_path, "atomic_descriptions_train.json", {"annotations": content})
    rows, counts, _ = convert(EgoExo4D, file, root)
    assert not rows and counts == {
        "there is no text": 2,
        "fewer than two words": 1,
        "there is no time": 1,
        "neither true nor false": 1,
        "the pass has no list of descriptions": 2,
        "the passes are not a list": 1,
        "there is no video file": 1,
        "a truth value written as text: read as one": 2,
        "several annotators: their passes stay apart": 1,
    }


# ----------------------------------------------------------------------------------------------------------- all files


def test_the_command_prepares_all_files_of_a_download(tmp_path, root):
    """Every row can be read, and none is a fault, also a row without a reply."""
    write_ego_downloads(tmp_path, root / "clip.mp4")
    folder = tmp_path / "egoexo"
    benchmark(folder / "annotations", segment(1.2, 4.4, None), split="test_unannotated")
    done = run_main(prepare.main, "ego_exo4d", "--annotations", folder, "--videos", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "validation: 3 rows (1 ego_exo4d_atomic, 1 ego_exo4d_keystep, 1 ego_exo4d_keystep_stream)" in done.stdout
    for split, count in (("train", 3), ("validation", 3), ("test", 1)):
        rows = load_timed_messages(tmp_path / "out", split, video_root=[folder])
        assert len(rows) == count and not list(map(str, find_faults(rows)))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("other.json", {}, ValueError, r"is none of the files asked for: .*keystep_val\.json"),
        ("gone", {}, FileNotFoundError, "There is no file or folder"),
        ("", {"task": "atomic"}, FileNotFoundError, r"no file of the task atomic\. .*atomic_descriptions_train\.json"),
        ("only/keystep_segment_val.json", {}, FileNotFoundError, "keystep needs label_mapping.csv"),
        ("atomic_descriptions_val.json", {}, FileNotFoundError, "atomic needs takes.json"),
        ("keystep_benchmark/keystep_segment_val.json", {}, ValueError, "has no list `segments` with entries"),
        ("keystep_val.json", {}, ValueError, "has no object `annotations` with entries"),
    ],
)
def test_missing_files_are_named(tmp_path, root, name, options, error, message):
    benchmark(tmp_path)
    for file in ("other.json", "only/keystep_segment_val.json", "atomic_descriptions_val.json", "keystep_val.json"):
        save(tmp_path, file, {})
    (tmp_path / "atomic_descriptions_val.json").unlink() if not name else None
    with pytest.raises(error, match=message):
        convert(EgoExo4D, tmp_path / name, root, **options)
