# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`train/data/prepare.py`: the command, its table, and what converters share."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch as mock

import pytest
from datasets import load_dataset
from programs import run_main
from tiny import random_frames, write_clip

from videollm_mod.train.data import converters, prepare
from videollm_mod.train.data.converters import CONVERTERS, Converter, Notes, Videos, read_json, read_json_lines
from videollm_mod.train.data.dialogues import (
    ceil_frame,
    clip,
    floor_frame,
    last_frame,
    place_replies,
    question_messages,
    reply_messages,
    round_frame,
    to_flag,
    to_number,
    to_text,
)
from videollm_mod.train.data.faults import WHERE, FaultyRowError
from videollm_mod.train.data.json_rows import mend_halves
from videollm_mod.train.data.json_streams import _Shallow, read_values
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.video_reading_videollm_mod import read_video


@dataclass
class Lights(Converter):
    """A list of `{"video", "split", "on": second}`."""

    tasks: ClassVar[tuple[str, ...]] = ("when", "what")
    license: ClassVar[str] = "CC0"

    colour: str = field(default="red", metadata={"help": "Colour of the light."})

    def convert(self, annotations, videos, notes) -> Iterator[tuple[str, dict[str, Any]]]:
        self.labels = {"lights_what": ["a light"]}
        for index, item in enumerate(read_json(annotations)):
            notes.split, where = item["split"], f"row {index}"
            video, second = videos.open(notes, where, "video", item["video"]), to_number(item["on"])
            if video is None or second is None:
                notes.leave_out(where, "on", "there is no time") if second is None else None
                continue
            last = video.last_frame(self.fps)
            placed = place_replies([(second, f"A {self.colour} light.")], last, self.fps, notes, where, "on")
            for task in self.chosen:
                messages = reply_messages(placed, self.fps)
                messages = messages if task == "when" else question_messages("What?", "A light.", last, self.fps)
                about = {"id": f"{item.get('id', index)}/{task}", "task": f"lights_{task}", "truth": {"on": second}}
                yield (
                    item["split"],
                    {**about, "video": str(video.path), **clip(0, last, self.fps), "messages": messages},
                )


@pytest.fixture
def lights(tmp_path):
    """A folder of two videos and a file that is none, and annotations with every fault."""
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    write_clip(tmp_path / "videos" / "a.mkv", random_frames(30))
    write_clip(tmp_path / "videos" / "deep" / "b.c.mp4", random_frames(20))
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "videos" / "a.json").write_text("{}")
    rows = [
        {"video": "a", "split": "train", "on": 1},
        {"video": "b.c", "split": "validation", "on": "0.7"},
        {"video": "gone", "split": "train", "on": 1},
        {"video": "broken", "split": "train", "on": 1},
        {"video": "a", "split": "train", "on": None},
        {"video": "a", "split": "train", "on": 99.0},
        {"video": "a", "split": "train", "on": 2, "id": 0},
    ]
    (tmp_path / "lights.json").write_text(json.dumps(rows))
    with mock.dict(CONVERTERS, {"lights": Lights}):
        yield tmp_path


def run(folder, *arguments):
    paths = ("--annotations", folder / "lights.json", "--videos", folder / "videos", "--out", folder / "out")
    return run_main(prepare.main, "lights", *paths, *arguments, program="prepare.py")


def drop(row):
    return {name: value for name, value in row.items() if name != WHERE and value is not None}


def test_the_command_writes_rows_that_load(lights):
    done = run(lights, "--task", "when", "--colour", "green")
    assert done.returncode == 0, done.stderr
    rows = load_timed_messages(lights / "out", "train", video_root=[lights])
    assert [(row["id"], row["task"], row["truth"]) for row in rows] == [
        ("0/when", "lights_when", {"on": 1.0}),
        ("5/when", "lights_when", {"on": 99.0}),
    ]
    assert [row["messages"][0]["time"] for row in rows] == [1.0, 2.5]
    assert rows[0]["messages"][0]["content"] == "A green light."
    assert rows[0]["video"] == str(lights / "videos" / "a.mkv")
    assert not list(find_faults(rows))
    about = json.loads((lights / "out" / "about.json").read_text())
    assert about["source"] == "lights" and about["tasks"] == ["lights_when"] and about["license"] == "CC0"
    assert about["splits"]["train"] == {
        "rows": 2,
        "tasks": {"lights_when": 2},
        "left_out": {
            "there is no video file": 1,
            "the video cannot be read": 1,
            "there is no time": 1,
            "there is another row with this id": 1,
        },
        "mended": {"after the end of the video: moved to the last frame": 1},
    }
    assert about["splits"]["validation"]["rows"] == 1 and about["labels"] == {"lights_what": ["a light"]}
    assert "--colour green" in about["command"]


def test_a_video_that_is_a_link_keeps_its_name(lights):
    """As the videos of a Hub data set in its cache."""
    (lights / "videos" / "a.mkv").rename(lights / "blob")
    (lights / "videos" / "a.mkv").symlink_to(lights / "blob")
    run(lights)
    row = json.loads((lights / "out" / "train.jsonl").read_text().splitlines()[0])
    assert row["video"] == "../videos/a.mkv"
    assert load_timed_messages(lights / "out", "train", video_root=[lights])[0]["video"] == str(
        lights / "videos" / "a.mkv"
    )


def test_rows_that_may_surprise_are_counted_and_kept(lights, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_FRAMES", 6)
    rows = [{"video": "a", "split": "train", "on": 1}, {"video": "b.c", "split": "train", "on": 1}]
    (lights / "lights.json").write_text(json.dumps(rows))
    done = run(lights, "--task", "when", "--strict", "--colour", "<|im_end|> [INST] [red] <s")
    assert done.returncode == 0 and "train: 2 rows" in done.stdout
    assert "mended 2: text that looks like a special token: kept as text (0/when, messages" in done.stdout
    assert "more than 6 frames" not in done.stdout, "6 frames of 3 s"
    assert "mended 1: more than 6 frames" in run(lights, "--task", "what", "--fps", "3").stdout
    assert "special token" not in run(lights, "--task", "when", "--colour", "[red] </b> <3 |").stdout
    assert "characters beyond ASCII" not in done.stdout
    done = run(lights, "--task", "when", "--strict", "--colour", "the “red” [left")
    assert "mended 2: characters beyond ASCII, such as curly quotes: kept (0/when, messages" in done.stdout
    assert "mended 2: brackets, as the stream format has: kept as text (0/when, messages" in done.stdout


HALVES = (
    rb'["a\ud83d b", "\udc00\uDC01", "\ud83d\ude00\uD83D\uDE00", "\\ud83d", "\\\ud83d", "\u00e9\ud83d\ud83d\ude00"]'
)
MENDED = ["a\ufffd b", "\ufffd\ufffd", "\U0001f600" * 2, "\\ud83d", "\\\ufffd", "\xe9\ufffd\U0001f600"]


@pytest.mark.parametrize("size", range(1, 40))
def test_pieces_of_a_stream_are_mended_as_the_whole(size):
    assert json.loads(mend_halves(HALVES)) == MENDED and len(mend_halves(HALVES)) == len(HALVES)
    file = _Shallow(io.BytesIO(HALVES))
    assert b"".join(iter(lambda: file.read(size), b"")) == mend_halves(HALVES)


def test_every_reader_of_annotations_mends_halves_of_characters(tmp_path):
    (tmp_path / "a.json").write_bytes(HALVES)
    assert read_json(tmp_path / "a.json") == list(read_values(tmp_path / "a.json", "item")) == MENDED
    (tmp_path / "a.jsonl").write_bytes(b'{"a": ' + HALVES + b"}")
    assert [row for _, row in read_json_lines(tmp_path / "a.jsonl")] == [{"a": MENDED}]


def test_half_of_a_character_is_mended_with_row_and_field(lights):
    """No run ends without `about.json`, and the other rows stay."""
    path = lights / "lights.json"
    path.write_text(path.read_text().replace('"id": 0', r'"id": "x\ud83d"'))
    done = run(lights, "--task", "when", "--colour", "green")
    assert done.returncode == 0, done.stderr
    about = json.loads((lights / "out" / "about.json").read_text())
    what = "a character that is not whole or unknown: kept as U+FFFD"
    assert about["splits"]["train"]["rows"] == 3 and about["splits"]["train"]["mended"][what] == 1
    assert f"mended 1: {what} (x\ufffd/when, id)" in done.stdout
    # Names on a disk and of options may have halves too, and no file can have these rows.
    lost = run(lights, "--task", "when", "--colour", "gr\udcffn")
    assert lost.returncode == 1 and "text that is not Unicode (0/when, messages[0].content" in lost.stdout
    assert list((lights / "out").glob("*.jsonl")), "the files of the first run stay"


def test_the_table_names_what_was_left_out(lights):
    out = run(lights, "--split", "train").stdout
    assert "train: 4 rows (2 lights_what, 2 lights_when)" in out and "validation" not in out
    assert "left out 1: there is no video file (row 2, video)" in out
    assert "left out 2: there is another row with this id (0/when, id; 0/what, id)" in out
    assert "mended 1: after the end of the video: moved to the last frame (row 5, on)" in out


def test_strict_stops_at_the_first_fault_and_keeps_earlier_files(lights):
    run(lights)
    before = (lights / "out" / "train.jsonl").read_text()
    done = run(lights, "--strict")
    assert done.returncode == 1 and done.stderr == "error: row 2, video: there is no video file\n"
    assert (lights / "out" / "train.jsonl").read_text() == before


def test_parquet_has_the_rows_of_json_lines(lights):
    run(lights, "--colour", 100 * "blue")
    lines = list(load_timed_messages(lights / "out", "train", video_root=[lights]))
    done = run(lights, "--colour", 100 * "blue", "--format", "parquet", "--max_shard_size", "1KB")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (lights / "out").iterdir() if path.name != ".durations.json")
    assert names == [
        "about.json",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "validation-00000-of-00001.parquet",
    ], "the JSON lines are gone"
    rows = list(load_timed_messages(lights / "out", "train", video_root=[lights]))
    assert [drop(row) for row in rows] == [drop(row) for row in lines] and len(rows) == 4
    assert not list(find_faults(load_timed_messages(lights / "out", "validation", video_root=[lights])))
    streamed = load_dataset(str(lights / "out"), split="train", streaming=True)
    assert [json.loads(row["truth"]) for row in streamed] == [row["truth"] for row in lines]
    run(lights)
    assert sorted(path.suffix for path in (lights / "out").glob("*.*l*")) == [".jsonl", ".jsonl"]


def test_a_later_run_keeps_other_splits_and_opens_no_video_again(lights):
    run(lights, "--split", "train")
    for path in (lights / "videos").rglob("*.mkv"):
        # The same size and time: only the length that was kept tells that this was a video.
        times = path.stat()
        path.write_bytes(bytes(times.st_size))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(lights).returncode == 0
    about = json.loads((lights / "out" / "about.json").read_text())
    assert about["splits"]["train"]["rows"] == 4 and about["splits"]["validation"]["rows"] == 2
    done = run(lights, "--split", "validation", "--task", "when")
    kept = json.loads((lights / "out" / "about.json").read_text())
    assert done.stdout.startswith("validation: 1 row") and kept["splits"]["train"] == about["splits"]["train"]
    assert kept["tasks"] == about["tasks"], "the training rows still have both"
    first, second = kept["command"].splitlines()
    assert "--split" not in first and second.endswith("--split validation --task when")
    os.utime(lights / "videos" / "a.mkv")
    assert "left out 5: the video cannot be read" in run(lights).stdout


def test_splits_of_one_folder_have_one_frame_rate(lights):
    run(lights)
    before = (lights / "out" / "validation.jsonl").read_text()
    done = run(lights, "--split", "validation", "--fps", "4")
    message = "holds the split 'train' with fps 2.0, and this run has 4.0: write to another folder."
    assert done.returncode == 1 and message in done.stderr
    (lights / "lights.json").write_text(json.dumps([{"video": "b.c", "split": "validation", "on": 1}]))
    assert message in run(lights, "--fps", "4").stderr, "the annotations have no training rows"
    assert (lights / "out" / "validation.jsonl").read_text() == before
    (lights / "out" / "train.jsonl").unlink()
    assert run(lights, "--fps", "4").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max_shard_size", "much"), "'much' is no size of a file, such as 500MB."),
        (("--task", "who"), "--task who is unknown. Tasks are when, what."),
        (("--fps", "0"), "--fps must be a positive number, got 0."),
        (("--videos", "nowhere"), "There is no folder 'nowhere' of videos."),
        (("--annotations", "nowhere"), "No such file or directory: 'nowhere'"),
    ],
)
def test_mistakes_end_with_one_line(lights, arguments, message):
    done = run(lights, *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.usefixtures("lights")
def test_the_command_lists_sources_and_options():
    listed = run_main(prepare.main, "--help", program="prepare.py")
    assert listed.returncode == 0 and "coin" in listed.stdout and "lights" in listed.stdout
    assert "--colour" in run_main(prepare.main, "lights", "--help", program="prepare.py").stdout
    unknown = run_main(prepare.main, "coyn", program="prepare.py")
    assert unknown.returncode == 1 and "there is no converter 'coyn'. Sources are " in unknown.stderr


def test_videos_are_found_by_name_path_and_any_extension(lights):
    videos = Videos(lights / "videos")
    assert videos.find("gone") is None
    assert videos.find("a").path.name == videos.find("gone", "a.mp4").path.name == "a.mkv"
    assert videos.find("b.c").path == videos.find("deep/b.c").path == videos.find("deep/b.c.mp4").path
    assert videos.find("a").duration == 3.0 and videos.find("a").last_frame(2) == 5


def test_lengths_are_written_while_videos_are_opened(lights, monkeypatch):
    """A process that is killed has written most of them."""
    monkeypatch.setattr(converters, "_WRITE_AFTER", 1)
    notebook, notes = lights / "lengths.json", Notes()
    notebook.write_text('{"broken": 1')
    videos = Videos(lights / "videos")
    with videos.remembering(notebook):
        for name, count in (("a", 1), ("a", 1), ("broken", 1), ("b.c", 2)):
            videos.open(notes, "row", "video", name)
            assert len(json.loads(notebook.read_text())) == count
    again = Videos(lights / "videos")
    with again.remembering(notebook):
        assert again.find("a").is_measured and not again.find("broken").is_measured


@pytest.mark.parametrize("fps", [2, 10, 30, 30000 / 1001])
def test_the_grid_has_the_frames_that_the_reader_shows(tmp_path, fps):
    video = write_clip(tmp_path / "a.mp4", random_frames(30), fps=10)
    last = last_frame(3.0, fps)
    assert last == len(list(read_video(video, fps=fps))) - 1
    for first, end in ((0, last), (1, 1), (2, 4)):
        assert len(list(read_video(video, fps=fps, **clip(first, end, fps)))) == end - first + 1
    # The time of a frame is the frame, whatever the rounding of its float.
    frames = range(2000)
    for place in (ceil_frame, floor_frame, round_frame):
        assert [place(frame / fps, fps) for frame in frames] == list(frames)
    assert (ceil_frame(3.1 / fps, fps), floor_frame(2.9 / fps, fps), round_frame(2.6 / fps, fps)) == (4, 2, 3)


def test_replies_are_placed_by_lives_rules():
    notes, last = Notes(), 10
    replies = [(1.2, "A."), (0.2, "B."), (1.4, "C."), (2.0, "C."), (2.6, "A."), (9.0, "D."), (4.9, "E."), (9.5, "F.")]
    placed = place_replies(replies, last, 2, notes, "video", "narrations")
    assert placed == [(1, "B."), (3, "C."), (6, "A."), (10, "E.")]
    assert {reason: found.count for reason, found in notes.left_out[""].items()} == {
        "another reply follows at the same frame": 1,
        "same text as the reply before": 1,
        "after the reply at the last frame": 2,
    }
    assert notes.mended_by[""]["not in order of time: sorted"].places == ["video, narrations"]
    with pytest.raises(FaultyRowError, match="video, narrations: not in order of time: sorted"):
        place_replies(replies, last, 2, Notes(strict=True), "video", "narrations")
    rules = place_replies([(0.0, "A."), (1.0, "A."), (1.2, "B."), (1.4, "C.")], last, 2, Notes(strict=True), "", "")
    assert rules == [(0, "A."), (3, "C.")], "a rule is no fault"


def test_values_of_wrong_types_are_none():
    values = [1, 2.5, " 3 ", "x", None, True, [1], float("nan"), 10**400]
    assert [to_number(value) for value in values] == [1.0, 2.5, 3.0, None, None, None, None, None, None]
    assert [to_text(value) for value in (" a\n b ", "  ", None, 3)] == ["a b", None, None, None]
    flags = [True, False, "1", "0", "False", 1, "maybe", None, []]
    assert [to_flag(value) for value in flags] == [True, False, True, False, False, True, None, None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "byte 0: not UTF-8"),
        (b'{"a": }', "line 1, column 7: not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json'.*{message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_frame_rate_is_a_positive_number(fps):
    with pytest.raises(ValueError, match="--fps must be a positive number, got"):
        Lights(fps=fps)


def test_a_folder_to_write_to_may_be_no_file(lights):
    (lights / "out").write_text("mine")
    assert run(lights).stderr.splitlines()[-1] == f"error: --out '{lights / 'out'}' is a file: give a folder."
    assert (lights / "out").read_text() == "mine"
