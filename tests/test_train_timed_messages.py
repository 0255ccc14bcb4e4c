# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Timed messages from files."""

import json
import math
import os
import re
import time
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import Dataset
from hub import Hub
from safetensors.torch import save_file
from tiny import random_features, random_frames, tiny_model, tiny_processor, write_clip, write_noisy_clip

from videollm_mod.train import sft
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data import timed_messages
from videollm_mod.train.data.faults import (
    Fault,
    FaultyRowError,
    describe_faults,
    lines_of_rows,
    name_row,
    row_record,
)
from videollm_mod.train.data.sources import load_split
from videollm_mod.train.data.streamed import check_stream
from videollm_mod.train.data.timed_messages import (
    SOURCES,
    TimedMessages,
    find_faults,
    load_timed_messages,
)
from videollm_mod.train.sft_arguments import ScriptArguments


NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"


def said(time, content, role="assistant"):
    return {"role": role, "content": content, "time": time}


@pytest.fixture
def folder(tmp_path):
    """A folder with a clip of 2 s, its features, and two splits."""
    write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    save_file({"frame_features": random_features(tiny_model().config, 4)[0]}, tmp_path / "clip.safetensors")
    rows = [
        {"video": "clip.mp4", "start": 0.0, "end": 2.0, "messages": [said(0, "Go.", "user"), said(1.5, "A ball.")]},
        {"video": "clip.mp4", "messages": [said(0.5, "A box.")]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows[:1]).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    return tmp_path


def test_files_and_folders(folder, monkeypatch):
    for source, split, count in (
        (folder, "train", 2),
        (folder, "validation", 1),
        (folder / "train.jsonl", "train", 2),
        (folder / "validation-00000-of-00001.parquet", "train", 1),
    ):
        rows = load_timed_messages(source, split)
        assert len(rows) == count and rows[0]["video"] == str(folder / "clip.mp4")
        assert rows[0]["messages"][1]["content"] == "A ball." and list(find_faults(rows)) == []
        assert rows[0]["where"].endswith(".jsonl', line 1" if split == "train" and count == 2 else ".parquet', row 0")
    monkeypatch.chdir(folder)
    assert load_timed_messages("train.jsonl")[0]["video"] == str(folder / "clip.mp4")


@pytest.mark.parametrize(
    ("source", "split", "error", "message"),
    [
        (".", "test", ValueError, r"no split 'test': it has train.jsonl, validation-00000"),
        ("empty", "train", FileNotFoundError, "has no .jsonl and no .parquet"),
        ("nothing.jsonl", "train", FileNotFoundError, "There is no file or folder"),
        ("clip.mp4", "train", ValueError, "neither .jsonl nor .parquet"),
    ],
)
def test_missing_files_and_splits_are_named(folder, source, split, error, message):
    (folder / "empty").mkdir()
    with pytest.raises(error, match=message):
        load_timed_messages(folder / source, split)


GOOD = b'{"video": "clip.mp4", "messages": [{"role": "assistant", "content": "A ball.", "time": 1.0}]}\n'


DEEP = b'{"video": "clip.mp4", "messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"\n" + GOOD[:-3] + b"\n" + GOOD, r", line 3, column \d+: not JSON: Expecting"),
        (GOOD * 2000 + GOOD[:9], ", line 2001, column 10: not JSON: Expecting"),
        (b"It is raining.\n", ", line 1, column 1: not JSON: Expecting value. Each line is one row"),
        (GOOD + b"[7]\n", ", line 2: a row is an object with messages and a video, got list"),
        (b"[7]\n" + GOOD, ", line 1: a row is an object with messages and a video, got list"),
        (GOOD + b"null\n", ", line 2: a row is an object with messages and a video, got null"),
        (b"null\n", ", line 1: a row is an object with messages and a video, got null"),
        (b"7\n" + GOOD, ", line 1: a row is an object with messages and a video, got int"),
        (b'"text"\n', ", line 1: a row is an object with messages and a video, got str"),
        (GOOD + GOOD[:-2] + b', "video": "other.mp4"}\n', r", line 2: the key 'video' is there 2 times in one object"),
        (GOOD + GOOD.replace(b'"role"', b'"time": 0, "role"'), ", line 2: the key 'time' is there 2 times"),
        (GOOD + GOOD.replace(b"A ball", rb"A \ud83d ball"), r", line 2: '\\ud83d' is half of a character"),
        (GOOD + GOOD.replace(b"1.0", b"1" * 5000), ", line 2: .*digits"),
        (
            GOOD + "caf\u00e9".join(GOOD.decode().split("A ball")).encode("latin-1"),
            r", line 2, byte 73: not UTF-8 \(0xe9\)",
        ),
        (
            GOOD.decode().encode("utf-16"),
            r", line 1, byte 1: not UTF-8 \(0xff\). Save the file as JSON lines in UTF-8",
        ),
        (NASA.read_bytes()[:5000], r", line 1, byte \d+: not UTF-8"),
        (GOOD + b'{"time": ' + b"9" * 5000 + b"}", ", line 2: a number has too many digits"),
        (GOOD + DEEP, ", line 2: lists and objects are nested too deeply"),
        (GOOD + b'{"video": "' + b"x" * (1 << 26) + b'"}\n', ", line 2: has 67,108,878 bytes. A row has at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_line_that_is_no_row_is_named(folder, content, message):
    """The other lines stay rows, and the training script says the same."""
    (folder / "train.jsonl").write_bytes(content)
    fault = str(next(find_faults(load_timed_messages(folder))))
    assert re.match(f"'{folder}/train.jsonl'{message}", fault) and "\n" not in fault
    with pytest.raises(SystemExit, match=rf"--dataset {folder}: \d+ faults? in \d+ rows?:\n{re.escape(fault)}"):
        sft.main(ScriptArguments(validate_only="quick"), TimedMessages(str(folder)), None, None)


def test_lines_of_any_kind_are_rows(folder):
    """Blank lines, both line ends, byte order marks, numbers of both types, and other keys in other rows."""
    lines = [b"\xef\xbb\xbf" + GOOD, b"\r\n", GOOD.replace(b"\n", b"\r\n"), b"  \n", GOOD.replace(b"1.0", b"1")]
    lines += [GOOD[:-2] + b', "id": 3, "score": NaN}\n', GOOD[:-2] + b', "id": "three", "start": 0}']
    (folder / "train.jsonl").write_bytes(b"".join(lines))
    rows = load_timed_messages(folder)
    assert list(find_faults(rows)) == [] and [row.get("id") for row in rows] == [None, None, None, 3, "three"]
    assert [row["where"].rpartition("line ")[2] for row in rows] == ["1", "3", "5", "6", "7"]
    assert type(rows[2]["messages"][0]["time"]) is int
    assert rows[2:5]["id"] == [None, 3, "three"]


def test_mixed_types_are_faults_of_their_rows(folder):
    parts = b'[{"type": "text", "text": "A ball."}]'
    lines = [
        GOOD,
        GOOD.replace(b"1.0", b'"00:00:01"'),
        GOOD.replace(b'"A ball."', parts),
        GOOD.replace(b"1.0", b"Infinity"),
    ]
    (folder / "train.jsonl").write_bytes(b"".join(lines))
    where = f"'{folder}/train.jsonl', line"
    assert [str(fault) for fault in find_faults(load_timed_messages(folder))] == [
        f"{where} 2, messages[0].time: is '00:00:01', must be seconds since the video's beginning",
        f"{where} 3, messages[0].content: must be text, got list",
        f"{where} 4, messages[0].time: is inf, must be seconds since the video's beginning",
    ]


def test_endings_may_be_in_capitals(folder):
    (folder / "other-1.JSONL").write_bytes(GOOD)
    assert len(load_timed_messages(folder / "other-1.JSONL")) == len(load_timed_messages(folder, "other")) == 1


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_one_array_of_rows(folder, name):
    row = json.loads(GOOD) | {"note": "\u00e9\u4e2d"}
    (folder / name).write_text(json.dumps([row, 7, row], indent=1, ensure_ascii=False), encoding="utf-8")
    rows = load_timed_messages(folder / name)
    assert len(rows) == 3 and rows[2]["note"] == "\u00e9\u4e2d" and rows[2]["where"] == f"'{folder / name}', line 14"
    faults = [str(fault) for fault in find_faults(rows)]
    assert faults == [f"'{folder / name}', line 13: a row is an object with messages and a video, got int."]
    (folder / name).write_text('[\n{"video": "clip.mp4"}\n{"video": "clip.mp4"}]')
    with pytest.raises(ValueError, match=f"{name}', line 3, column 1: not JSON: Expecting ',' delimiter"):
        load_timed_messages(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl' is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl' is empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "a.jsonl' is empty"),
        ("a.json", b"[]", "a.json' is empty"),
        ("a.parquet", GOOD, "a.parquet' is not Parquet: Parquet magic bytes not found"),
    ],
)
def test_a_file_without_rows_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_timed_messages(tmp_path / name)


def test_a_file_that_changes_is_named(folder):
    rows = load_timed_messages(folder)
    (folder / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(FaultyRowError, match="train.jsonl' was changed while it was in use"):
        rows[0]


def test_files_with_different_columns_are_named(tmp_path):
    Dataset.from_list([{"video": "a.mp4"}]).to_parquet(tmp_path / "train-0.parquet")
    Dataset.from_list([{"video": [{"messages": 3}]}]).to_parquet(tmp_path / "train-1.parquet")
    message = r"train-0.parquet', '.*train-1.parquet' cannot be read as one table: "
    with pytest.raises(ValueError, match=message) as failed:
        load_timed_messages(tmp_path)
    assert len(str(failed.value).splitlines()) == 1


def test_a_table_without_rows_is_empty(tmp_path):
    Dataset.from_dict({"video": []}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet' is empty"):
        load_timed_messages(tmp_path)


def test_hub_data_sets(folder):
    """Splits load by name, paths are relative to the root, and errors are those of a folder."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation")) + "---\n"
    files = {
        "README.md": card.encode(),
        "train.jsonl": (folder / "train.jsonl").read_bytes(),
        "validation.jsonl": GOOD,
    }

    def load(name, split="train"):
        try:
            rows = load_timed_messages(f"somebody/{name}", split)
            return str([str(fault) for fault in find_faults(rows)] or [row["messages"][-1]["content"] for row in rows])
        except (ValueError, FileNotFoundError) as error:
            return f"{type(error).__name__}: {error}"

    with Hub() as hub:
        hub.repos["datasets/somebody/whole"] = [files | {"clip.mp4": (folder / "clip.mp4").read_bytes()}]
        hub.repos["datasets/somebody/lacking"] = [files]
        hub.repos["datasets/somebody/broken"] = [files | {"train.jsonl": GOOD[:-3] + b"\nnull"}]
        outside = json.dumps({"video": str(folder / "clip.mp4"), "messages": [said(99, "Late.")]}).encode()
        hub.repos["datasets/somebody/outside"] = [files | {"train.jsonl": outside}]
        with hub.used_here(folder / "home"):
            assert load("whole") == "['A ball.', 'A box.']" and load("whole", "validation") == "['A ball.']"
            test, lacking, broken, gone = load("whole", "test"), load("lacking"), load("broken"), load("gone")
            refused = load("outside")
    assert test == "ValueError: The data set 'somebody/whole' has no split 'test': it has train, validation."
    assert lacking.count("train.jsonl', line 1, video: There is no video file 'somebody/lacking/clip.mp4'") == 1
    # The row of somebody else's data set is refused, and nothing is said of what lies at that place.
    assert "is outside the data set 'somebody/outside'" in refused and "99 s" not in refused
    assert "train.jsonl', line 1, column " in broken and "train.jsonl', line 2: a row is an" in broken
    assert gone.startswith("DatasetNotFoundError: ")


FINE = [said(0.0, "Go.", "user"), said(1.0, "A ball.")]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"video": None}, "video", "either `video` or `frame_features`, this one has neither"),
        ({"frame_features": "clip.safetensors"}, "video", "this one has video and frame_features"),
        ({"video": "gone.mp4"}, "video", "There is no video file"),
        ({"video": "train.jsonl"}, "video", "cannot be read as video"),
        ({"video": None, "frame_features": "train.jsonl"}, "frame_features", "holds no readable tensor"),
        ({"start": 3.0}, "start", "is 3.0, must be a time from 0 s to the video's end at 2 s"),
        ({"end": 9.0}, "end", "must be a time from 0 s to the video's end at 2 s"),
        ({"start": 0.5, "end": 0.0, "messages": FINE[1:]}, "end", "must be a time from 0.5 s"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": FINE[:1]}, "messages", "nothing to learn"),
        ({"messages": [*FINE, said(1.5, "x", "bot")]}, "messages[2].role", "is 'bot', known roles are"),
        ({"messages": [*FINE, said(1.5, "x", "system")]}, "messages[2].role", "only the first"),
        ({"messages": [*FINE, said(1.5, "  ")]}, "messages[2].content", "is empty"),
        ({"messages": [*FINE, said(1.5, 7)]}, "messages[2].content", "must be text, got int"),
        ({"messages": [*FINE, said(None, "x")]}, "messages[2].time", "is None, must be seconds"),
        ({"messages": [*FINE, said(None, "x", "user")]}, "messages[2].time", "is None, must be seconds"),
        ({"messages": [*FINE, said(float("nan"), "x")]}, "messages[2].time", "is nan"),
        ({"messages": [*FINE, said(0.5, "x")]}, "messages[2].time", "before the previous message at 1 s"),
        ({"messages": [*FINE, said(2.5, "x")]}, "messages[2].time", "is 2.5 s, beyond the end at 2 s"),
        ({"end": 1.2, "messages": [*FINE, said(1.5, "x")]}, "messages[2].time", "beyond the end at 1.2 s"),
        ({"start": 0.5}, "messages[0].time", "before the beginning at 0.5 s"),
    ],
)
def test_faults_are_named_by_row_and_field(folder, change, field, message):
    row = {"video": "clip.mp4", "messages": FINE} | change
    row = {k: str(folder / v) if k in ("video", "frame_features") and v else v for k, v in row.items()}
    faults = list(find_faults([{"video": str(folder / "clip.mp4"), "messages": FINE}, row]))
    assert [(fault.row, fault.field) for fault in faults] == [(1, field)] and message in faults[0].message
    assert describe_faults(faults).startswith("1 fault in 1 row:\nrow 1, ")


def test_a_question_before_the_frames_is_no_fault(folder):
    asked = [said(None, "Watch.", "system"), said(None, "What?", "user"), said(0.5, "A ball.")]
    row = {"video": str(folder / "clip.mp4"), "start": 0.5, "end": 0.5, "messages": asked}
    assert not list(find_faults([row], full=True)), "a clip of one frame with a question before it"


def write_sound(path, seconds, *, picture=None, cover=None):
    """Write a file with sound of so many seconds, and with a video of 2 s or a cover picture."""
    with av.open(path, "w") as file:
        sound = file.add_stream("aac", rate=16000, layout="mono")
        video = file.add_stream("png" if cover else "mpeg4", rate=10) if picture or cover else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 32, 32, "rgb24" if cover else "yuv420p"
        if cover:
            video.disposition = av.stream.Disposition.attached_pic
        for frame in random_frames(20 if picture else 1)[:, :32, :32] if video is not None else ():
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * seconds)), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        file.mux(sound.encode(silence))
        for stream in (sound, *([video] if video is not None else [])):
            file.mux(stream.encode(None))


def test_times_are_checked_against_the_picture(folder):
    """Neither the length of the sound nor the length in the header of a truncated file counts."""
    write_sound(folder / "long.mp4", 6, picture=True)
    write_clip(folder / "whole.mkv", random_frames(40), fps=10)
    (folder / "cut.mkv").write_bytes((folder / "whole.mkv").read_bytes()[: (folder / "whole.mkv").stat().st_size // 2])
    for name in ("long.mp4", "cut.mkv"):
        row = {"video": str(folder / name), "messages": [said(3.5, "A ball.")]}
        [fault] = find_faults([row])
        assert re.fullmatch(r"row 0, messages\[0\].time: is 3.5 s, beyond the end at [12][.\d]* s", str(fault))
        end = float(str(fault).split()[-2])
        for full in (False, True):
            assert list(find_faults([row | {"messages": [said(end, "A ball.")]}], full=full)) == []
        batch = StreamCollator(tiny_processor())([row | {"messages": [said(end, "A ball.")]}])
        assert batch["num_frames"].item() == math.ceil(2 * end)


@pytest.mark.parametrize(
    ("ending", "full"), [("jsonl", False), ("jsonl", True), ("parquet", False), ("parquet", True), ("stream", False)]
)
def test_a_row_whose_video_lies_outside_is_checked_all_the_same(tmp_path, ending, full, capsys):
    """The refusal comes first, then what is wrong with the row and its video. What is no regular file stays closed."""
    clip = write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    save_file({"frame_features": random_features(tiny_model().config, 4)[0]}, tmp_path / "clip.safetensors")
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    os.mkfifo(tmp_path / "pipe.mp4")
    places = ["../clip.mp4", str(clip), "../page.mp4", "../pipe.mp4", "../gone.mp4", "http://127.0.0.1:9/a.mp4"]
    rows = [{"video": place, "messages": [said(0.5, "A box."), said(12, " ")]} for place in places]
    rows += [{"frame_features": "../clip.safetensors", "messages": [said(12, "A box.")]}]
    data = tmp_path / "data"
    data.mkdir()
    if ending == "jsonl":
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list([dict.fromkeys(SOURCES) | row for row in rows]).to_parquet(data / "train.parquet")
    source = TimedMessages(str(data))
    found = {}
    rows_read = list(source.stream("train")) if ending == "stream" else source.load("train", num_clips=1)
    for fault in source.find_faults(rows_read, full=full):
        found.setdefault(fault.row, []).append(str(fault))
    for index, place in enumerate([*places, "../clip.safetensors"]):
        refusal, *others = found[index]
        assert f"'{place}' is outside the data set" in refusal and "--video_root " in refusal
        late, blank = "messages[1].time: is 12 s, beyond the end at 2 s", "messages[1].content: is empty"
        late = late.replace("[1]", "[0]") if "safetensors" in place else late
        expected = [blank, late] if index < 2 else [late] if "safetensors" in place else [blank]
        expected = ["it is a web page", *expected] if "page" in place else expected
        assert len(others) == len(expected) and all(b in a for a, b in zip(others, expected, strict=True)), others
    with row_record() as record:
        if ending == "stream":
            assert check_stream(source, "train", full=full, left_out=record) == 0
        else:
            with pytest.raises(SystemExit, match="no row is left"):
                load_split(source, "train", 1, full=full, left_out=record)
        left_out = record.left_out()
    assert len(left_out) == len(rows)
    refusal, *others = left_out[0].split("; ")
    assert "video: '../clip.mp4' is outside" in refusal and refusal.endswith(f"--video_root {tmp_path}")
    assert others == [f"messages[1].{what}" for what in ("content: is empty", "time: is 12 s, beyond the end at 2 s")]
    assert f"left out 7 of 7 rows:\n{left_out[0]}\n" in capsys.readouterr().err
    with pytest.raises(FaultyRowError, match="is outside the data set"):
        StreamCollator(tiny_processor())([rows_read[0]])


def test_a_line_about_a_row_has_three_faults_at_most():
    faults = [Fault(1, "", "Odd."), *(Fault(0, f"messages[{n}]", "is odd", "'a', line 1") for n in range(5))]
    three = "'a', line 1, messages[0]: is odd; messages[1]: is odd; messages[2]: is odd; and 2 more"
    assert lines_of_rows(faults) == {0: three, 1: "Odd."}


def test_a_check_says_what_files_lack(folder, capsys):
    """Without decoding all frames. What reading tells of the frames stands in its place."""
    whole = write_clip(folder / "whole.mkv", random_frames(40), fps=10)
    (folder / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    row = {"video": str(folder / "cut.mkv"), "messages": [said(0.5, "A box.")]}
    with row_record() as record:
        assert list(find_faults([row, row])) == []
        [line] = record.damaged()
        assert re.fullmatch(r"'.*cut\.mkv': The source is not in order: [12](\.\d)? missing seconds\.", line)
        record.note_damage(row["video"], "read in part")
        record.note_damage(row["video"], "mended")
        assert record.damaged() == [f"'{row['video']}': {what}" for what in ("read in part", "mended")]
    assert capsys.readouterr().err.startswith("mended or read in part: 1 video:\n")


def test_a_row_is_named_without_the_password_of_its_video():
    video = "http://bob:SECRET@films/a.mp4?key=SECRET"
    assert name_row({"video": video}) == "the row of 'http://bob:***@films/a.mp4?***'"
    with row_record() as record:
        record.note_damage(video, "mended")
        assert record.damaged() == ["'http://bob:***@films/a.mp4?***': mended"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.mp4", "is a folder: name a video file in it"),
        ("pointer.mp4", "it is a Git LFS pointer, and `git lfs pull` fetches the video"),
        ("cover.mp4", "has no video stream (streams: audio, cover picture)"),
        ("sound.m4a", "has no video stream (streams: audio)"),
        ("empty.mp4", "cannot be read as video: "),
        ("page.mp4", "cannot be read as video: "),
        ("half.mp4", "cannot be read as video: "),
        ("nul\0.mp4", "There is no video file"),
        ("x" * 300 + ".mp4", "File name too long"),
        ("pipe.mp4", "is a pipe or a device, which cannot be read again in each epoch"),
        ("link.mp4", "There is no video file"),
    ],
)
def test_files_that_are_no_videos_are_faults_of_one_line(folder, name, message):
    (folder / "folder.mp4").mkdir()
    (folder / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "empty.mp4").touch()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "link.mp4").symlink_to("link.mp4")
    (folder / "page.mp4").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    (folder / "half.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:2000])
    if name in ("cover.mp4", "sound.m4a"):
        write_sound(folder / name, 1, cover=name == "cover.mp4")
    (folder / "train.jsonl").write_text(json.dumps({"video": name, "messages": FINE}) + "\n")
    [fault] = find_faults(load_timed_messages(folder))
    assert fault.field == "video" and message in str(fault) and len(str(fault).splitlines()) == 1
    assert f"did you mean '{folder / name}'" not in str(fault)
    assert str(fault).startswith(f"'{folder}/train.jsonl', line 1, video: ")


def test_a_full_check_decodes_all_frames(folder):
    """The packets of the second half are noise, so training finds no frame for a message there."""
    write_noisy_clip(folder / "noisy.mp4", 40, noise_from=20)
    row = {"video": str(folder / "noisy.mp4"), "messages": [said(3.5, "A ball.")]}
    with row_record() as record:
        assert list(find_faults([row])) == [] and record.damaged() == []
        faults = [str(fault) for fault in find_faults([row], full=True)]
        [damage] = record.damaged()
    assert faults == ["row 0, messages[0].time: is 3.5 s, beyond the end at 2 s"]
    assert re.match(rf"'{row['video']}': .*\d spoilt packets?", damage)
    with pytest.raises(FaultyRowError, match="^the row of '.*noisy.mp4': Message 0 is at 3.5 s, after the last frame"):
        StreamCollator(tiny_processor())([row])
    assert list(find_faults([row | {"end": 1.5, "messages": [said(1.5, "A ball.")]}], full=True)) == []


def test_times_are_checked_against_the_length_of_features(folder):
    row = {"frame_features": str(folder / "clip.safetensors"), "messages": [*FINE, said(2.5, "x")]}
    assert [str(fault) for fault in find_faults([row])] == ["row 0, messages[2].time: is 2.5 s, beyond the end at 2 s"]


def test_a_file_that_takes_long_is_named(tmp_path, monkeypatch, capsys):
    """A decoder that hangs cannot be stopped, but the user sees at which file."""
    write_clip(tmp_path / "slow.mp4", random_frames(4))
    (tmp_path / "train.jsonl").write_text(json.dumps({"video": "slow.mp4", "messages": []}) + "\n")
    read_video = timed_messages.read_video

    def slow(*args, **options):
        time.sleep(0.5)
        yield from read_video(*args, **options)

    monkeypatch.setattr(timed_messages, "read_video", slow)
    monkeypatch.setattr(timed_messages, "_PATIENCE", 0.1)
    list(find_faults(load_timed_messages(tmp_path)))
    assert f"still reading '{tmp_path}/slow.mp4' after 0.1 s\n" in capsys.readouterr().err
