# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Timed messages from files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hub import Hub
from safetensors.torch import save_file
from tiny import random_features, random_frames, tiny_model, write_clip

from videollm_mod.train import sft
from videollm_mod.train.arguments import ScriptArguments
from videollm_mod.train.data.timed_messages import (
    TimedMessages,
    check_timed_messages,
    find_faults,
    load_timed_messages,
)


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b"\n" + GOOD[:-3] + b"\n" + GOOD, r"a.jsonl', line 3, column \d+: not JSON: Expecting"),
        ("a.jsonl", GOOD * 20_000 + GOOD[:9], "a.jsonl', line 20001, column 10: not JSON: Expecting"),
        (
            "a.jsonl",
            b"It is raining.\n",
            "a.jsonl', line 1, column 1: not JSON: Expecting value. Each line is one row",
        ),
        ("a.jsonl", GOOD + b"[7]\n", "a.jsonl', line 2: a row is an object with messages and a video, got list"),
        ("a.jsonl", NASA.read_bytes()[:5000], "a.jsonl', line 1: not text. The file should be JSON lines"),
        ("a.jsonl", b"", "a.jsonl' is empty"),
        ("a.parquet", GOOD, "a.parquet' is not Parquet: Parquet magic bytes not found"),
    ],
)
def test_a_file_of_another_format_is_named_with_its_line(tmp_path, name, content, message):
    """The error is the same if the file is in a folder with a correct file, and if the training script reads it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_timed_messages(tmp_path / name)
    kind = Path(name).suffix
    (tmp_path / name).rename(tmp_path / f"train-1{kind}")
    Dataset.from_list([json.loads(GOOD)]).to_parquet(tmp_path / "train-0.parquet")
    if kind == ".jsonl":
        (tmp_path / "train-0.parquet").unlink()
        (tmp_path / "train-0.jsonl").write_bytes(GOOD)
    if content:  # An empty file among others is allowed: it has no rows.
        with pytest.raises(SystemExit, match=f"--dataset {tmp_path}: '{tmp_path}/{message.replace('a.', 'train-1.')}"):
            sft.main(ScriptArguments(validate_only=True), TimedMessages(str(tmp_path)), None, None)


def test_files_with_different_columns_are_named(tmp_path):
    Dataset.from_list([{"video": "a.mp4"}]).to_parquet(tmp_path / "train-0.parquet")
    Dataset.from_list([{"video": [{"messages": 3}]}]).to_parquet(tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-0.parquet', '.*train-1.parquet' cannot be read as one table: "):
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
    load = """
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
for name, split in (("whole", "train"), ("whole", "validation"), ("whole", "test"), ("lacking", "train"),
                    ("broken", "train"), ("gone", "train")):
    try:
        rows = load_timed_messages(f"somebody/{name}", split)
        print([row["messages"][-1]["content"] for row in rows], list(find_faults(rows)))
    except (ValueError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}")
"""
    with Hub() as hub:
        hub.repos["datasets/somebody/whole"] = [files | {"clip.mp4": (folder / "clip.mp4").read_bytes()}]
        hub.repos["datasets/somebody/lacking"] = [files]
        hub.repos["datasets/somebody/broken"] = [files | {"train.jsonl": GOOD[:-3]}]
        environment = {**os.environ, **hub.environment(folder / "home")}
        done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train, validation, test, lacking, broken, gone = done.stdout.splitlines()
    assert train == "['A ball.', 'A box.'] []" and validation == "['A ball.'] []"
    assert test == "ValueError: The data set 'somebody/whole' has no split 'test': it has train, validation."
    assert lacking == "FileNotFoundError: The data set 'somebody/lacking' has no file 'clip.mp4', which a row names."
    assert broken.startswith("ValueError: The data set 'somebody/broken' cannot be read: JSON parse error")
    assert gone.startswith("DatasetNotFoundError: ")


FINE = [said(0.0, "Go.", "user"), said(1.0, "A ball.")]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"video": None}, "video", "either `video` or `frame_features`, this one has neither"),
        ({"frame_features": "clip.safetensors"}, "video", "this one has video and frame_features"),
        ({"video": "gone.mp4"}, "video", "there is no file"),
        ({"video": "train.jsonl"}, "video", "cannot be read as video"),
        ({"video": None, "frame_features": "train.jsonl"}, "frame_features", "holds no readable tensor"),
        ({"start": 3.0}, "start", "is 3.0, must be a time from 0 s to the video's end at 2 s"),
        ({"end": 9.0}, "end", "not after the video's end at 2 s"),
        ({"end": 0.0}, "end", "must be a time after 0 s"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": FINE[:1]}, "messages", "nothing to learn"),
        ({"messages": [*FINE, said(1.5, "x", "bot")]}, "messages[2].role", "is 'bot', known roles are"),
        ({"messages": [*FINE, said(1.5, "x", "system")]}, "messages[2].role", "only the first"),
        ({"messages": [*FINE, said(1.5, "  ")]}, "messages[2].content", "is empty"),
        ({"messages": [*FINE, said(1.5, 7)]}, "messages[2].content", "must be text, got int"),
        ({"messages": [*FINE, said(None, "x")]}, "messages[2].time", "is None, must be seconds"),
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
    with pytest.raises(ValueError, match="1 faults in 1 rows:\nrow 1, "):
        check_timed_messages([{"video": str(folder / "clip.mp4"), "messages": FINE}, row])


def test_times_are_checked_against_the_length_of_features(folder):
    row = {"frame_features": str(folder / "clip.safetensors"), "messages": [*FINE, said(2.5, "x")]}
    assert [str(fault) for fault in find_faults([row])] == ["row 0, messages[2].time: is 2.5 s, beyond the end at 2 s"]
