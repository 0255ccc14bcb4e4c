# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
`train/data/ego4d`: narrations, GoalStep, long-term anticipation and queries.

All annotations are made up, in the published layouts. The one exception is GoalStep's validation file, which is real:
its licence, MIT, lies beside it.
"""

import json
import lzma
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ego_annotations import (
    PASSES,
    action,
    asked,
    convert,
    goal,
    goalstep,
    lta,
    nlq,
    redacted,
    said,
    save,
    step,
    write_ego_downloads,
)
from programs import run_main
from tiny import random_frames, write_clip, write_late_stream

from videollm_mod.train.data import prepare
from videollm_mod.train.data.converters import Notes, Videos
from videollm_mod.train.data.ego4d.converter import Ego4D
from videollm_mod.train.data.ego4d.goalstep import read_timelines
from videollm_mod.train.data.ego4d.lta import to_words
from videollm_mod.train.data.ego4d.narration import BENCHMARKS, clean_narration, is_of_others, read_videos
from videollm_mod.train.data.ego4d.nlq import merge_windows
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.joining import join_videos
from videollm_mod.train.data.json_streams import read_pairs, read_values
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.video_reading_videollm_mod import VideoReader


GOALSTEP = Path(__file__).parent / "data" / "goalstep" / "goalstep_valid.json.xz"
# Seconds of the video, and the index of its last frame at 2 fps.
SECONDS, LAST = 20, 39


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One video under the names that the annotations use. "v-gone" is missing."""
    folder = tmp_path_factory.mktemp("full_scale")
    clip = write_clip(folder / "v-1.mp4", random_frames(SECONDS), fps=1)
    for name in ("v-2", "v-3", "grp-v-8"):
        (folder / f"{name}.mp4").symlink_to(clip)
    return folder


# --------------------------------------------------------------------------------------------------------- narrations


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("#C C picks  a cup.,\n", "C picks a cup."),
        ("#c C looks around", "C looks around."),
        ("@c walks to #unsure", "Walks to."),
        ("#O A man X waves #Unsure .", "A man X waves."),
        ("#summary C cooks", "Summary C cooks."),
        ("#C", "."),
    ],
)
def test_narrations_are_cleaned_as_in_live(text, cleaned):
    assert clean_narration(text) == cleaned


def test_narrations_of_others_are_told_by_their_tag():
    assert is_of_others("#O A man X waves") and is_of_others(" #o X waves") and is_of_others("# O X waves")
    assert not is_of_others("#C C holds an #O ring") and not is_of_others("#other C waves")


DIALOGUE = [
    (1.5, "a", "C looks around."),
    (3.5, "a", "C takes a cup."),
    (10.0, "a", "A man X waves."),
]


def test_each_pass_of_an_annotator_is_a_dialogue(tmp_path, videos):
    """Two replies in one slot leave the later one, and a text is not told twice in a row."""
    file = save(tmp_path, "all_narrations_redacted.json", {"_map_errs": [], "videos": {"v-1": redacted(*PASSES)}})
    rows, counts, _ = convert(Ego4D, file, videos)
    assert [(split, row["id"], row["task"]) for split, row in rows] == [
        ("train", "v-1/p-1", "ego4d_narration"),
        ("train", "v-1/p-2", "ego4d_narration"),
    ]
    first, second = (row for _, row in rows)
    # The instruction follows the first frame, which is the frame of the first narration.
    assert first["start"] == 1.5 and said(first)[0][:2] == (1.5, "u") and "'C'" in said(first)[0][2]
    assert said(first)[1:] == DIALOGUE
    assert first["end"] == 10.0 and first["video"] == str(videos / "v-1.mp4")
    assert [time for time, *_ in said(second)] == [0.0, 0.0] and second["end"] == 0.0
    assert counts == {
        "not in order of time: sorted": 1,
        "another reply follows at the same frame": 1,
        "same text as the reply before": 1,
        "several annotators: their passes stay apart": 1,
    }


def test_the_other_published_file_gives_the_same_dialogues(tmp_path, videos):
    """`narration.json` has other keys, and separate passes. What it contains tells it apart, not its name."""
    entry = {"status": "complete"}
    for time, text, name in PASSES:
        narrations = entry.setdefault(f"narration_pass_{name[-1]}", {"narrations": [], "summaries": []})["narrations"]
        narrations.append({"timestamp_sec": time, "timestamp_frame": 0, "narration_text": text, "annotation_uid": "x"})
    file = save(tmp_path, "renamed.json", {"v-1": entry})
    rows, counts, _ = convert(Ego4D, file, videos, task="narration")
    other = save(tmp_path, "all_narrations_redacted.json", {"videos": {"v-1": redacted(*PASSES)}})
    expected, other_counts, _ = convert(Ego4D, other, videos)
    assert [row["id"] for _, row in rows] == ["v-1/narration_pass_1", "v-1/narration_pass_2"]
    assert [{**row, "id": ""} for _, row in rows] == [{**row, "id": ""} for _, row in expected]
    assert counts == other_counts


def test_faults_of_narrations_are_counted(tmp_path, videos):
    narrations = [
        (-0.5, "#C C starts", "p"),
        ("2.0", "#C C stirs", "p"),
        (None, "#C C waits", "p"),
        ("soon", "#C C waits", "p"),
        (True, "#C C waits", "p"),
        (4.0, None, "p"),
        (4.0, "#C", "p"),
        (4.0, "#C C hums", None),
        (SECONDS + 3.0, "#C C leaves", "p"),
        (SECONDS + 9.0, "#C C is away", "p"),
    ]
    entries = {
        "v-gone": redacted((0.0, "#C C sits", "p")),
        "v-1": redacted(*narrations),
        "v-2": {"narrations": ["#C C sits"]},
        "v-3": [],
    }
    rows, counts, _ = convert(Ego4D, save(tmp_path, "narration.json", {"videos": entries}), videos)
    assert [said(row)[1:] for _, row in rows] == [
        [(0.0, "a", "C starts."), (2.0, "a", "C stirs."), (LAST / 2, "a", "C leaves.")]
    ]
    assert counts == {
        "there is no video file": 1,
        "before the start of the video: moved to the first frame": 1,
        "a time written as text: read as a number": 1,
        "there is no time": 1,
        "the time is not a number": 2,
        "there is no text": 1,
        "fewer than two words": 1,
        "the narration belongs to no pass": 1,
        "after the end of the video: moved to the last frame": 1,
        "after the reply at the last frame": 1,
        "the entry is not an object": 1,
        "the video has no narrations": 1,
        "the entry of the video is not an object": 1,
    }


def test_narrations_of_others_can_be_left_out(tmp_path, videos):
    file = save(tmp_path, "narration.json", {"videos": {"v-1": redacted(*PASSES)}})
    rows, counts, _ = convert(Ego4D, file, videos, wearer_only=True)
    assert said(rows[0][1])[-1][2] == "C takes a cup." and counts["it tells what another person does"] == 1


@pytest.mark.parametrize("content", ['{"clips": []}', "{}", "[]"])
def test_another_file_is_no_narrations(tmp_path, videos, content):
    with pytest.raises(ValueError, match="has neither `videos`.* nor `narration_pass_1`"):
        convert(Ego4D, save(tmp_path, "narration.json", content), videos)


def test_a_broken_file_is_named(tmp_path, videos):
    broken = json.dumps({"videos": {"v-1": redacted(*PASSES), "v-2": redacted(*PASSES)}})[:-40]
    with pytest.raises(ValueError, match=r"narration\.json' is not JSON in UTF-8: "):
        convert(Ego4D, save(tmp_path, "narration.json", broken), videos)


def test_a_byte_order_mark_is_ignored(tmp_path, videos):
    text = "\ufeff" + json.dumps({"videos": {"v-1": redacted(*PASSES)}})
    assert len(convert(Ego4D, save(tmp_path, "narration.json", text), videos)[0]) == 2


def benchmark_files(folder, val, test):
    """Write the files of all benchmarks: their validation and test files list these videos."""
    for name, key in BENCHMARKS.items():
        for end, uids in (("val", val), ("test_unannotated", test)):
            save(folder, f"{name}_{end}.json", {"version": "1", key: [{"video_uid": uid, "x": [{}]} for uid in uids]})
    return folder


def test_benchmarks_tell_the_split_of_a_video(tmp_path, videos):
    """A video of both splits is for validation, and a video of no benchmark for training."""
    splits = benchmark_files(tmp_path / "splits", ["v-other"], ["v-2", "v-3"])
    save(splits, "nlq_val.json", {"videos": [{"video_uid": "v-2"}, {"video_uid": None}]})
    entries = {name: redacted(*PASSES) for name in ("v-1", "v-2", "v-3")}
    file = save(tmp_path, "all_narrations_redacted.json", {"videos": entries})
    rows, *_ = convert(Ego4D, file, videos, splits=splits)
    assert {row["id"][:3]: split for split, row in rows} == {"v-1": "train", "v-2": "validation", "v-3": "test"}
    rows, counts, _ = convert(Ego4D, file, videos, splits=splits, split="test")
    assert {row["id"] for _, row in rows} == {"v-3/p-1", "v-3/p-2"} and counts["of another split"] == 2


def test_a_file_that_names_another_split_is_left_out(tmp_path, videos):
    steps = save(tmp_path, "goalstep_train.json", goalstep(goal("v-1", step(1, 3, "a")), split="val"))
    actions = lta(tmp_path, action(0, 0.0), split="val").rename(tmp_path / "fho_lta_train.json")
    for file in (steps, actions):
        rows, counts, _ = convert(Ego4D, file, videos)
        assert rows == [] and counts == {"a file of another split": 1}


def test_the_annotations_tell_splits_if_they_can(tmp_path, videos, capsys):
    """Otherwise a model would be trained on the videos that it is evaluated on, without a word."""
    folder = benchmark_files(tmp_path / "annotations", ["v-2"], ["v-3"])
    save(folder, "narration.json", {"videos": {name: redacted(*PASSES) for name in ("v-1", "v-2")}})
    rows, *_ = convert(Ego4D, folder, videos, task="narration")
    assert {row["id"][:3]: split for split, row in rows} == {"v-1": "train", "v-2": "validation"}
    assert not capsys.readouterr().err
    (folder / "vq_val.json").unlink()
    rows, *_ = convert(Ego4D, folder, videos, task="narration")
    assert {split for split, _ in rows} == {"train"}
    assert "All narrations are for training, also those of videos" in (said := capsys.readouterr().err)
    assert said.endswith("lacks 1 of 16 files: vq_val.json.\n")


def test_missing_benchmarks_are_named(tmp_path, videos):
    splits = benchmark_files(tmp_path / "splits", ["v-2"], ["v-3"])
    (splits / "vq_test_unannotated.json").unlink()
    # GoalStep's repository has this name for the validation file.
    (splits / "goalstep_val.json").rename(splits / "goalstep_valid.json")
    file = save(tmp_path, "narration.json", {"videos": {"v-1": redacted(*PASSES)}})
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 16 files: vq_test_unannotated\.json\."):
        convert(Ego4D, file, videos, splits=splits)
    with pytest.raises(ValueError, match="--split test of the narrations needs --splits"):
        convert(Ego4D, file, videos, split="test")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file with eight times as many videos takes as much memory. One video is read at a time."""
    narrations = redacted(*((time / 10, f"#C C does the thing {time}", "pass") for time in range(100)))
    peaks = []
    for count in (50, 400):
        entries = ", ".join(f'"v-{number}": {json.dumps(narrations)}' for number in range(count))
        file = save(tmp_path, f"{count}.json", f'{{"videos": {{{entries}}}}}')
        del entries
        tracemalloc.start()
        assert sum(len(entry["narrations"]) for _, entry in read_videos(file)) == 100 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.parametrize("read", [lambda path: read_values(path, "videos.item"), lambda path: read_pairs(path, "")])
def test_a_file_of_brackets_ends_in_one_line(tmp_path, read):
    """The parser would take 25 GB for this file of 100 kB."""
    path = tmp_path / "goalstep_val.json"
    for content in ("[" * 100_000, '{"videos": ' + '[{"a": ' * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"goalstep_val\.json': lists and objects are nested too deeply\.$"):
            list(read(path))
    # Brackets in texts are none, also in a text that is longer than what is read at once, and after a quote in it.
    texts = ["[" * 70_000, '"[{' * 30_000, "\\" * 65_536 + "[", "]"]
    path.write_text(json.dumps({"videos": texts}))
    assert list(read_values(path, "videos.item")) == texts and list(read_pairs(path, "")) == [("videos", texts)]


# ----------------------------------------------------------------------------------------------------------- GoalStep


def test_the_faults_of_the_real_file_are_counted():
    """The counts of GoalStep's validation file, of 134 videos. None of its videos is there."""
    content = json.loads(lzma.decompress(GOALSTEP.read_bytes()))
    notes = Notes()
    timelines = [timeline for entry in content["videos"] for timeline in read_timelines(entry, notes)]
    assert Counter(timeline.level.name for timeline in timelines) == {"step": 134, "substep": 3349 - 2385}
    steps = Counter(timeline.level.name for timeline in timelines for _ in timeline.steps)
    assert steps == {"step": 3349, "substep": 4347}
    assert sum(timeline.id.startswith("grp-") for timeline in timelines if timeline.level.name == "step") == 33
    found = notes.mended_by[""]
    assert {what: each.count for what, each in found.items() if what.startswith(("a step", "steps"))} == {
        "a step lacks keys that are not used: kept": 1,
        "a step overlaps the step before: kept with its own times": 60,
        "a step has the text of the step before: told once": 126,
        "steps not in order of time: sorted": 2,
    }
    assert found["a substep reaches outside its step: kept with its own times"].count == 223
    assert found["a step lacks keys that are not used: kept"].places[0].startswith("46d00bf5-")
    assert not notes.left_out


def test_steps_and_substeps_are_told_when_they_begin(tmp_path, videos):
    substeps = [step(2.2, 3, "fill the kettle"), step(3, 4.9, "press the switch,")]
    for part in substeps:
        del part["segments"]
    entry = goal("v-1", step(2.1, 5.0, "boils water", *substeps), step(5, 6.2, "pours water"))
    rows, counts, _ = convert(Ego4D, save(tmp_path, "goalstep_val.json", goalstep(entry)), videos)
    (split, steps), (_, below) = rows
    assert split == "validation" and counts == {}
    assert said(steps) == [
        (2.5, "u", "I am doing this: Make tea. Tell me each step when it begins."),
        (2.5, "a", "Boils water."),
        (5.0, "a", "Pours water."),
    ]
    assert (steps["start"], steps["end"], steps["id"], below["id"]) == (2.5, 6.5, "v-1/steps", "v-1/step-0")
    assert steps["truth"] == {"goal": "Make tea.", "timeline": [[2.1, 5.0, "boils water"], [5.0, 6.2, "pours water"]]}
    assert said(below)[1:] == [(2.5, "a", "Fill the kettle."), (3.0, "a", "Press the switch.")]
    assert said(below)[0][2].startswith("I am at this step: boils water.")


def test_faults_of_goalstep_are_counted(tmp_path, videos):
    del (broken := step(1, 2, "x"))["is_relevant"]
    entries = [
        goal("v-gone", step(0, 1, "x")),
        goal("v-1", step(4, 5, "b"), step(1, 2, "a"), broken, step(4.5, 6, "B"), step(30, 40, "late")),
        goal("v-2", step(1, 1, "a"), step(2, 1, "a"), step(None, 1, "a"), step(1, 2, " "), step(1, 2, None), 7),
        goal("v-3", step("1.0", 3, "a", step(0, 2, "b", segments=None), step(1, 9, "c")), goal_description=None),
        goal(None),
        goal("v-1", segments=None),
        {"video_uid": "v-9", "step_segments": [{"step_description": "x", "segment_count": 2}]},
        "v-10",
    ]
    rows, counts, _ = convert(Ego4D, save(tmp_path, "goalstep_train.json", goalstep(*entries, split="train")), videos)
    assert [(split, row["id"]) for split, row in rows] == [
        ("train", "v-1/steps"),
        ("train", "v-3/steps"),
        ("train", "v-3/step-0"),
    ]
    # Two steps begin at one frame, and one has the text of the step before.
    assert said(rows[0][1])[1:] == [(1.0, "a", "X."), (4.0, "a", "B.")] and rows[0][1]["end"] == 6.0
    assert rows[0][1]["truth"]["timeline"][-1] == [4.5, 6, "B"]
    assert counts == {
        "there is no video file": 1,
        "steps not in order of time: sorted": 1,
        "a step lacks keys that are not used: kept": 1,
        "a step overlaps the step before: kept with its own times": 2,
        "a step after the end of the video": 1,
        "another reply follows at the same frame": 1,
        "it ends where it starts": 1,
        "it ends before it starts": 1,
        "there is no time": 1,
        "there is no text": 2,
        "the step is not an object": 1,
        "the video has no steps": 2,
        "the steps are not a list": 1,
        "a time written as text: read as a number": 1,
        "a substep overlaps the substep before: kept with its own times": 1,
        "a substep reaches outside its step: kept with its own times": 2,
        "the entry names no video": 2,
        "a test video: its steps have no times": 1,
    }


def save_groups(folder, *groups):
    rows = "".join(f"utokyo\t{list(members)}\n" for members in groups)
    (folder / "goalstep_video_groups.tsv").write_text(f"university\tvideo_group\n{rows}")


def test_a_joined_video_of_a_group_is_used(tmp_path, videos):
    """The table names the members of a group whose video is missing."""
    names = ("grp-v-8", "grp-v-7", "grp-v-6", "grp-v-gone")
    save(tmp_path, "goalstep_val.json", goalstep(*(goal(name, step(0, 1, "a")) for name in names)))
    save_groups(tmp_path, ("v-7", "v-1"), ("v-gone", "v-1"))
    with (tmp_path / "goalstep_video_groups.tsv").open("a") as file:
        file.write("utokyo\t['v-\n")
    notes = Notes()
    rows = list(Ego4D(task="goalstep").convert(tmp_path, Videos(videos), notes))
    assert [row["id"] for _, row in rows] == ["grp-v-8/steps"]
    found = notes.left_out["validation"]["a group without its joined video"]
    assert found.places[:2] == ["grp-v-7, video_uid (members: v-7, v-1)", "grp-v-6, video_uid"]
    assert notes.left_out[""]["not a list of videos"].count == 1


@pytest.fixture
def members(tmp_path):
    """Videos of 2, 1 and 3 s with pictures of their own, as Ego4D's camera splits a recording."""
    folder, frames = tmp_path / "videos", random_frames(60)
    folder.mkdir()
    # With pictures that are predicted from later ones, so that packets are not in the order of their times.
    options = {"fps": 10, "bf": "2", "g": "7", "tune": "animation", "preset": "veryfast"}
    for name, first, last in (("m-1", 0, 20), ("m-2", 20, 30), ("m-3", 30, 60)):
        write_clip(folder / f"{name}.mp4", frames[first:last], **options)
    write_clip(folder / "small.mp4", random_frames(5, size=(48, 64)), **options)
    write_clip(folder / "old.mp4", random_frames(5), fps=10, codec="mpeg4")
    (folder / "broken.mp4").write_bytes((folder / "m-1.mp4").read_bytes()[:900])
    return folder


def prepare_groups(folder, *groups, **options):
    """Prepare GoalStep with a step from 0.5 s and one from 3.5 s in each group. Return rows and what was printed."""
    annotations, out = folder / "annotations", folder / "out"
    goals = [goal(f"grp-{members[0]}", step(0.5, 2, "boils"), step(3.5, 9, "pours")) for members in groups]
    save(annotations, "goalstep_val.json", goalstep(*goals))
    save_groups(annotations, *groups)
    arguments = prepare.PrepareArguments(annotations=annotations, videos=folder / "videos", out=out, **options)
    prepare.prepare("ego4d", Ego4D(task="goalstep"), arguments)
    return [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]


def test_a_group_is_joined_from_its_members(tmp_path, members, capsys):
    [row] = prepare_groups(tmp_path, ("m-1", "m-2", "m-3"))
    printed = capsys.readouterr().out
    assert "mended 1: a group without its joined video: joined from its members (grp-m-1, video_uid" in printed
    joined = tmp_path / "out" / row["video"]
    assert row["video"] == "joined/grp-m-1.mp4" and (row["start"], row["end"]) == (0.5, 5.5)
    assert [message["time"] for message in row["messages"]] == [0.5, 0.5, 3.5]
    # Every picture is the member's own, at its time after the members before.
    with VideoReader(joined) as reader:
        shown = [(float(time), reader.picture(frame)) for time, _, frame in reader.frames()]
        assert reader.seconds == pytest.approx(6.0) and not reader.report
    own = []
    for name in ("m-1", "m-2", "m-3"):
        with VideoReader(members / f"{name}.mp4") as reader:
            own += [reader.picture(frame) for _, _, frame in reader.frames()]
    assert [time for time, _ in shown] == pytest.approx([index / 10 for index in range(60)])
    assert all(np.array_equal(one, two) for (_, one), two in zip(shown, own, strict=True))
    # It lies in the folder of the rows, so that they need no --video_root.
    [loaded] = load_timed_messages(tmp_path / "out" / "validation.jsonl")
    assert list(find_faults([loaded], fps=2.0)) == []


def test_a_group_is_joined_once(tmp_path, members):
    prepare_groups(tmp_path, ("m-1", "m-2"))
    joined = tmp_path / "out" / "joined" / "grp-m-1.mp4"
    before = joined.stat()
    prepare_groups(tmp_path, ("m-1", "m-2"))
    assert (joined.stat().st_mtime_ns, joined.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    write_clip(members / "m-2.mp4", random_frames(40), fps=10, bf="2", g="7", tune="animation", preset="veryfast")
    prepare_groups(tmp_path, ("m-1", "m-2"))
    with VideoReader(joined) as reader:
        assert reader.seconds == pytest.approx(6.0), "the second member is another file now"


def test_a_stream_that_begins_in_the_middle_of_a_member_is_no_fault(tmp_path):
    member = write_late_stream(tmp_path / "member.ts", random_frames(45))
    join_videos([member, member], tmp_path / "joined.mkv")
    with VideoReader(tmp_path / "joined.mkv") as reader:
        assert reader.seconds == pytest.approx(18.0, abs=0.01)


@pytest.mark.usefixtures("members")
def test_groups_that_cannot_be_joined_are_counted(tmp_path, capsys):
    groups = (("m-1", "m-2"), ("m-3", "small"), ("old", "m-1"), ("broken", "m-1"), ("m-gone", "m-1"), ("../up", "m-1"))
    assert [row["id"] for row in prepare_groups(tmp_path, *groups)] == ["grp-m-1/steps"]
    printed = capsys.readouterr().out
    none = "a group without its joined video"
    assert (
        f"left out 2: {none}: its members differ in codec, settings or size of pictures, and are not encoded again "
        "(grp-m-3, video_uid (members: m-3, small); grp-old, video_uid (members: old, m-1))"
    ) in printed
    assert f"left out 1: {none}: a member cannot be read (grp-broken" in printed
    assert f"left out 1: {none}: not all its members are there (grp-m-gone" in printed
    assert f"left out 1: {none} (grp-.., video_uid)" in printed
    assert sorted(path.name for path in (tmp_path / "out" / "joined").iterdir()) == [".joined.json", "grp-m-1.mp4"]
    with pytest.raises(FaultyRowError, match="grp-m-3"):
        prepare_groups(tmp_path, *groups[1:], strict=True)


# ---------------------------------------------------------------------------------------------- long-term anticipation


def test_words_keep_labels_apart():
    labels = ["turn_on_(switch_on,_start)", "pot_(planter)", "pot", "bat_(sports)", "chip_(food)", "nut_(food)"]
    assert [to_words(label) for label in labels] == ["turn on", "flowerpot", "pot", "sport bat", "snack", "nuts"]
    # These three are nouns of one vocabulary, which has the second in this spelling.
    chips = ["chip_(food)", "chip_(wood'_metal),", "chip_(wood,_metal)"]
    assert [to_words(label) for label in chips] == ["snack", "chips", "chip"]


def test_eight_actions_are_seen_and_twenty_predicted(tmp_path, videos):
    """Times of the clip become times of the video, and are rounded to the grid."""
    actions = [action(index, 0.5 * index, verb=index % 3, noun=index % 4) for index in range(29)]
    rows, counts, converter = convert(Ego4D, lta(tmp_path, *reversed(actions)), videos)
    assert counts == {} and [row["id"] for _, row in rows] == ["c-1_7", "c-1_8"]
    row = rows[0][1]
    # The eighth action ends at 2 + 3.5 + 0.4 = 5.9 s, which is nearest to frame 12.
    assert (row["start"], row["end"]) == (2.0, 6.0)
    (_, role, question), (time, _, answer) = said(row)
    assert role == "u" and "has 9 frames" in question and "next 20 actions" in question and time == 6.0
    lines = answer.split("\n")
    assert len(lines) == 20 and lines[0] == "1. Take flowerpot." and lines[1] == "2. Adjust bat."
    truth = row["truth"]
    assert (truth["clip_uid"], truth["last_visible_action_idx"]) == ("c-1", 7)
    assert truth["verb_label"][:3] == [2, 0, 1] and truth["noun_label"][:3] == [0, 1, 2]
    assert truth["verb"][:3] == ["take", "adjust", "turn on"] and truth["noun"][:3] == ["flowerpot", "bat", "cup"]
    assert {len(truth[name]) for name in ("verb", "noun", "verb_label", "noun_label")} == {20}
    assert converter.labels == {
        "ego4d_lta_verb": ["adjust", "turn on", "take"],
        "ego4d_lta_noun": ["flowerpot", "bat", "cup", "chip"],
    }


def test_rows_of_the_test_split_have_no_reply(tmp_path, videos):
    absent = dict.fromkeys(("verb", "noun", "verb_label", "noun_label"), "absent")
    file = lta(tmp_path, *(action(index, 0.5 * index, **absent) for index in range(28)), split="test_unannotated")
    ((split, row),), counts, _ = convert(Ego4D, file, videos)
    assert split == "test" and counts == {} and [message["role"] for message in row["messages"]] == ["user"]
    assert row["truth"] == {"clip_uid": "c-1", "last_visible_action_idx": 7}


def test_faults_of_anticipation_are_counted(tmp_path, videos):
    actions = [action(index, 0.5 * index, noun=99 if index == 28 else 2) for index in range(29)]
    actions += [action(3, 1.5), action("4", 1.5), action(40, None), action(41, 9.0, action_clip_end_sec=9.0)]
    actions += [action(42, 1.0, clip_parent_start_sec=None), action(43, 1.0, clip_uid=None), "action"]
    actions += [action(index, 0.5, clip="c-short") for index in range(5)]
    actions += [action(index, 0.5 * index, clip="c-gone", video="v-gone") for index in range(28)]
    actions += [action(2 * index, 19.0, clip="c-late") for index in range(28)]
    rows, counts, _ = convert(Ego4D, lta(tmp_path, *actions), videos)
    assert [row["id"] for _, row in rows] == ["c-1_7"]
    assert counts == {
        "another action of the clip has this number": 1,
        "the action has no number": 1,
        "there is no time": 2,
        "it ends where it starts": 1,
        "the action names no clip or no video": 2,
        "the label is not in the taxonomy": 1,
        "an action to predict has no label": 1,
        "a clip with fewer than 28 actions": 1,
        "there is no video file": 1,
        "numbers of actions have gaps: kept, in order": 1,
        "after the end of the video": 1,
    }


def test_anticipation_needs_the_taxonomy(tmp_path, videos):
    file = lta(tmp_path, action(0, 0.5))
    (tmp_path / "fho_lta_taxonomy.json").unlink()
    with pytest.raises(FileNotFoundError, match="fho_lta_taxonomy.json"):
        convert(Ego4D, file, videos)
    save(tmp_path, "fho_lta_taxonomy.json", {"verbs": ["take"], "nouns": []})
    with pytest.raises(ValueError, match="lists of texts `verbs` and `nouns`"):
        convert(Ego4D, file, videos)


# ------------------------------------------------------------------------------------------------------------- queries


def test_windows_that_overlap_are_merged():
    assert merge_windows([(8, 12), (1, 2), (5, 9), (12, 13)]) == [(1, 2), (5, 12), (12, 13)]


def test_the_start_and_the_end_of_a_window_are_told(tmp_path, videos):
    """Windows of the same query about the same clip are one dialogue, and those that overlap are one window."""
    queries = [asked("Where is the cup?", 8.1, 9.2), asked("where is the cup?", 4.0, 5.0), asked("Where is it?", 3, 4)]
    entry = nlq(*queries, asked("Where is the cup?", 9.0, 9.9))
    save(tmp_path, "nlq_val.json", {"version": "1", "videos": [entry]})
    save(tmp_path, "nlq_train.json", {"version": "1", "videos": [{**entry, "split": "train"}]})
    rows, counts, _ = convert(Ego4D, tmp_path, videos, task="nlq")
    assert counts == {"overlapping windows of one query: merged": 2}
    by_split = {(split, row["id"]): row for split, row in rows}
    assert list(by_split) == [(split, f"c-1/query-{k}") for split in ("train", "validation") for k in range(2)]
    row = by_split["validation", "c-1/query-0"]
    query = "where is the cup?"
    assert said(row)[0][:2] == (None, "u") and query in said(row)[0][2]
    assert said(row)[1:] == [
        (4.0, "a", f'The video related to the query "{query}" starts.'),
        (5.0, "a", f'The video related to the query "{query}" ends.'),
        (8.5, "a", f'The video related to the query "{query}" starts.'),
        (10.0, "a", f'The video related to the query "{query}" ends.'),
    ]
    # What annotators gave, for the published scorer.
    given = {0: [8.1, 9.2], 1: [4.0, 5.0], 3: [9.0, 9.9]}
    names = {"clip_uid": "c-1", "annotation_uid": "a"}
    places = [{**names, "query_idx": index, "window": window} for index, window in given.items()]
    assert row["truth"] == {
        "query": query,
        "windows": [[4.0, 5.0], [8.1, 9.9]],
        "clip": [2.0, 18.0],
        "places": places,
    }
    # The end of an evaluation row does not tell where the last window ends.
    assert (row["start"], row["end"], by_split["train", "c-1/query-0"]["end"]) == (2.0, 18.0, 10.0)


def test_queries_of_the_test_split_have_no_window(tmp_path, videos):
    entry = nlq(asked("Where?", 3, 3), asked("where?", 4, 4), asked("Who?"), split="test")
    rows, counts, _ = convert(Ego4D, save(tmp_path, "nlq_test_unannotated.json", {"videos": [entry]}), videos)
    assert [(split, row["truth"]["query"], row["truth"]["windows"]) for split, row in rows] == [
        ("test", "where?", []),
        ("test", "who?", []),
    ]
    assert all(len(row["messages"]) == 1 for _, row in rows)
    assert counts == {"the clip has this query already: both get the same row": 1}
    assert [[place["query_idx"] for place in row["truth"]["places"]] for _, row in rows] == [[0, 1], [2]]


def test_faults_of_queries_are_counted(tmp_path, videos):
    queries = [
        asked(None, 3, 4),
        asked("", 3, 4),
        asked("What did I put in the “box”? ", 3, 4),
        asked("equal?", 5, 5),
        asked("backwards?", 6, 5),
        asked("no time?", None, None),
        asked("outside?", 18.5, 19),
        asked("reaches out?", 1.0, 19.0),
        asked("too short?", 3.1, 3.2),
        7,
    ]
    entries = [
        nlq(*queries, start=-4e-7, end=18.0),
        nlq(asked("gone?", 3, 4), uid="v-gone"),
        nlq(asked("late?", 31, 34), uid="v-2", clip="c-2", start=30, end=40),
        nlq(
            asked("cut?", 3, 4),
            asked("cut?", 25, 26),
            asked("cut off?", 25, 26),
            uid="v-2",
            clip="c-3",
            start=0,
            end=30,
        ),
        nlq(asked("other?", 3, 4), split="train"),
        nlq(asked("Whose?", 3, 4), uid="v-3", clip=None),
        {"video_uid": "v-3"},
        {"video_uid": 3},
    ]
    rows, counts, _ = convert(Ego4D, save(tmp_path, "nlq_val.json", {"videos": entries}), videos)
    assert [row["truth"]["query"] for _, row in rows] == [
        "what did i put in the “box”?",
        "reaches out?",
        "too short?",
        "cut?",
    ]
    assert [(row["start"], row["end"]) for _, row in rows] == [*[(0.0, 18.0)] * 3, (0.0, LAST / 2)]
    # A window within a frame ends at the next.
    assert [time for time, *_ in said(rows[2][1])] == [None, 3.5, 4.0]
    assert counts == {
        "there is no query": 2,
        "spaces around or within the query: removed": 1,
        "it ends where it starts": 1,
        "it ends before it starts": 1,
        "there is no time": 2,
        "the window lies outside its clip": 1,
        "the window reaches outside its clip: cut": 1,
        "the entry is not an object": 1,
        "a window after the end of the video": 2,
        "there is no video file": 1,
        "after the end of the video": 1,
        "after the end of the video: cut there": 2,
        "a video of another split": 1,
        "the clip has no id": 1,
        "there is no list": 1,
        "the entry names no video": 1,
    }


def test_a_start_that_rounding_put_before_the_video_is_no_fault(tmp_path, videos):
    entries = [nlq(asked("Where?", 3, 4), start=start, clip=f"c-{start}") for start in (-4e-7, -0.1)]
    content = save(tmp_path, "nlq_val.json", {"videos": entries})
    rows, counts, _ = convert(Ego4D, content, videos)
    assert [(row["start"], row["truth"]["clip"]) for _, row in rows] == [(0.0, [0.0, 18.0])] * 2
    assert counts == {"it starts before the video: moved to its start": 1}


def test_a_window_that_begins_in_the_last_frame_is_told(tmp_path, videos):
    entry = nlq(asked("Where?", 19.8, 19.9), asked("Who?", 20.6, 21), end=30)
    rows, counts, _ = convert(Ego4D, save(tmp_path, "nlq_val.json", {"videos": [entry]}), videos)
    assert [(row["truth"]["query"], [time for time, *_ in said(row)]) for _, row in rows] == [
        ("where?", [None, 19.0, 19.5])
    ]
    assert counts == {"a window after the end of the video": 1, "after the end of the video: cut there": 2}


# ------------------------------------------------------------------------------------------------- what LIVE published


def test_refined_narrations_keep_their_words(tmp_path, videos):
    passes = {
        "p-1": [
            {"time": 1.2, "text": "You look at the TV #1."},
            {"time": 1.4, "text": "You sit."},
            {"time": None, "text": "You sit."},
            {"time": 2.0, "text": ""},
        ],
        "p-2": None,
    }
    file = save(tmp_path, "refined_narration_stream_val.json", {"v-1": passes, "v-2": 3, "v-gone": passes})
    ((split, row),), counts, _ = convert(Ego4D, file, videos)
    assert (split, row["id"], row["task"]) == ("validation", "v-1/p-1/refined", "ego4d_refined")
    assert said(row)[1:] == [(1.5, "a", "You sit.")] and row["start"] == row["end"] == 1.5
    assert counts == {
        "another reply follows at the same frame": 1,
        "there is no time": 1,
        "there is no text": 1,
        "the narration is not an object": 1,
        "no narration is left": 1,
        "the entry of the video is not an object": 1,
        "there is no video file": 1,
    }


def chat(*messages, uid="v-1"):
    """Messages as (role initial, second, text)."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    found = [{"role": roles[role], "content": text, "time": time} for role, time, text in messages]
    return {"video_uid": uid, "conversation": found, "duration": 9.0}


LIVECHAT = "goalstep_livechat_trainval_filtered_21k.json"


def test_dialogues_of_livechat_are_placed(tmp_path, videos):
    """Questions are floored and replies ceiled. Replies at one frame leave the last, also if their times differ."""
    entry = chat(("u", 5.3, "q"), ("a", 5.3, "one"), ("a", 5.31, "two"), ("a", 7.1, "three"), ("a", 7.2, "four"))
    entry["conversation"] += chat(("u", 7.4, "q2"), ("a", 7.45, "five"), ("u", 9.0, "q3"))["conversation"]
    rows, counts, _ = convert(Ego4D, save(tmp_path, LIVECHAT, [entry, entry]), videos)
    (split, row), (_, other) = rows
    assert counts == {} and split == "train" and row["task"] == "ego4d_livechat"
    assert said(row) == [
        (5.0, "u", "q"),
        (5.5, "a", "two"),
        (7.5, "a", "four"),
        (7.5, "u", "q2"),
        (7.5, "a", "five"),
        (9.0, "u", "q3"),
    ]
    # The id of a row says how many frames come before the question.
    assert 0.0 <= row["start"] <= 5.0 and row["start"] != other["start"] and row["end"] == 9.0


def test_faults_of_livechat_are_counted(tmp_path, videos):
    entries = [
        chat(("a", 1.0, "x"), ("u", 2.0, "q"), ("a", 3.0, "x")),
        chat(("u", 0.0, "q"), ("a", 3.0, "x")),
        chat(("u", 1.0, "q"), ("a", 3.0, "x"), ("a", 2.0, "back"), ("a", 4.0, "y")),
        chat(("u", 1.0, "q"), ("a", 3.0, "x"), ("a", 99.0, "late")),
        chat(("u", 1.0, "q"), ("a", 3.0, "x"), ("u", 3.0, "q")),
        chat(("u", 1.0, "q"), ("a", None, "x"), ("a", 3.0, None), ("s", 3.0, "x")),
        chat(("u", 1.0, "q"), uid="v-gone"),
        {"video_uid": "v-1"},
        None,
    ]
    rows, counts, _ = convert(Ego4D, save(tmp_path, LIVECHAT, entries), videos)
    assert [said(row) for _, row in rows] == [[(1.0, "u", "q"), (3.0, "a", "x")]] * 3
    assert counts == {
        "the dialogue does not begin with a question after second 0": 2,
        "before the message before: the dialogue ends": 1,
        "after the end of the video: the dialogue ends": 1,
        "a question at the time of the message before: the dialogue ends": 1,
        "there is no time": 1,
        "there is no text": 1,
        "neither a question nor a reply": 1,
        "no reply is left": 4,
        "there is no video file": 1,
        "the entry names no video": 1,
    }


# ----------------------------------------------------------------------------------------------------------- all files


def test_the_command_prepares_all_files_of_a_folder(tmp_path, videos):
    """Every row can be read, and none is a fault."""
    write_ego_downloads(tmp_path, videos / "v-1.mp4")
    folder = tmp_path / "ego4d" / "v2"
    paths = ("--annotations", folder / "annotations", "--videos", folder / "full_scale", "--out", tmp_path / "out")
    done = run_main(prepare.main, "ego4d", *paths, "--splits", folder / "annotations", program="prepare.py")
    assert done.returncode == 0, done.stderr
    assert "train: 4 rows (1 ego4d_goalstep, 1 ego4d_lta, 1 ego4d_narration, 1 ego4d_nlq)" in done.stdout
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert set(about["labels"]) == {"ego4d_lta_verb", "ego4d_lta_noun"}
    for split, count in (("train", 4), ("validation", 5)):
        rows = load_timed_messages(tmp_path / "out", split, video_root=[folder / "full_scale"])
        assert len(rows) == count and not list(map(str, find_faults(rows)))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("other.json", {}, ValueError, r"is none of the files asked for: .*nlq_val\.json"),
        ("nlq_val.json", {"task": "lta"}, ValueError, "is none of the files asked for"),
        ("nlq_val.json", {"split": "train"}, ValueError, "is none of the files asked for"),
        ("gone", {}, FileNotFoundError, "There is no file or folder"),
        ("", {"task": "nlq,lta"}, FileNotFoundError, r"has no file of the task lta\. .*fho_lta_train\.json"),
        ("", {"split": "test"}, FileNotFoundError, "has none of the files"),
        ("empty/nlq_val.json", {}, ValueError, "has no list `videos` with entries"),
        (f"empty/{LIVECHAT}", {}, ValueError, "is not a list with entries"),
        ("empty/refined_narration_stream_val.json", {}, ValueError, "has no entries"),
    ],
)
def test_missing_files_are_named(tmp_path, videos, name, options, error, message):
    save(tmp_path, "nlq_val.json", {"videos": [nlq(asked("Where?", 4.0, 5.0))]})
    save(tmp_path, "other.json", {})
    for file in ("nlq_val.json", LIVECHAT, "refined_narration_stream_val.json"):
        save(tmp_path, f"empty/{file}", {})
    with pytest.raises(error, match=message):
        convert(Ego4D, tmp_path / name, videos, **options)
