# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Commands accept names with spaces, in any script, and as long as the system allows, in any locale."""

import json
import os
import subprocess
import sys

import pytest
from hub import Hub
from programs import run_command, run_main
from published import save_source
from tiny import random_frames, tiny_model, tiny_processor, write_clip

from videollm_mod.convert import command as convert
from videollm_mod.serving import restore_session, save_session
from videollm_mod.train import push
from videollm_mod.train.data import prepare
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


# 254 and 255 bytes in UTF-8. Most systems allow 255.
VIDEO, FOLDER = "漢 " * 62 + "é.mp4", "ž" * 127 + "z"


@pytest.fixture
def folder(tmp_path):
    """A folder with a name of 255 bytes, and a video with a long name in it."""
    assert len(os.fsencode(VIDEO)) in (254, 255) and len(os.fsencode(FOLDER)) == 255
    folder = tmp_path / "späces and ☂" / FOLDER
    folder.mkdir(parents=True)
    write_clip(folder / VIDEO, random_frames(6))
    return folder


def test_a_video_is_narrated(folder):
    done = run_command("narrate", folder / VIDEO, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["role"] == "user"
    done = run_command("narrate", folder, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "out").glob("*.srt")] == [VIDEO.replace(".mp4", ".srt")]


def test_a_model_is_converted_and_loads(folder):
    save_source("smolvlm", folder / "theirs")
    done = run_main(convert.main, folder / "theirs", folder / FOLDER, program="convert")
    assert done.returncode == 0, done.stderr
    done = run_command("narrate", folder / VIDEO, "--model", folder / FOLDER, "--every", 2, "--max-words", 2)
    assert done.returncode == 0, done.stderr


def test_data_is_prepared_loaded_and_published(folder, tmp_path):
    step = {"id": "1", "segment": [0.0, 2.0], "label": "cut the brötchen"}
    entry = {"class": "Eat", "start": 0.0, "end": 3.0, "annotation": [step], "subset": "training"}
    (folder / "COIN.json").write_text(json.dumps({"database": {VIDEO.removesuffix(".mp4"): entry}}), encoding="utf-8")
    paths = ("--annotations", folder / "COIN.json", "--videos", folder, "--out", folder / FOLDER)
    done = run_main(prepare.main, "coin", *paths, "--task", "step", program="prepare.py")
    assert done.returncode == 0, done.stderr
    rows = load_timed_messages(folder / FOLDER, "train", video_root=[str(folder)])
    assert list(find_faults(rows)) == [] and rows[0]["video"] == str(folder / VIDEO)
    assert "brötchen" in rows[0]["messages"][-1]["content"]
    with Hub() as hub, hub.used_here(tmp_path / "home"):
        done = run_main(
            push.main, folder / FOLDER, "--dataset", "somebody/dialogues", "--video_root", folder, program="push.py"
        )
        assert done.returncode == 0, done.stderr
        assert any(name.endswith(".parquet") for name in hub.files("datasets/somebody/dialogues"))


def test_a_session_is_saved_and_restored(folder):
    model, processor = tiny_model(), tiny_processor()
    session = model.stream(processor)
    session.push(random_frames(1))
    save_session(session, folder / FOLDER)
    assert restore_session(model, processor, folder / FOLDER).num_frames == 1


IN_ASCII = """
import json, os, sys
from programs import run_command
assert sys.getfilesystemencoding() == "ascii"
done = run_command("narrate", sys.argv[1], "--json")
assert done.returncode == 0, done.stderr
os.write(1, json.loads(done.stdout.splitlines()[0])["text"].encode())
done = run_command("narrate", sys.argv[1][:-5])
os.write(1, done.stderr.encode("utf-8", "surrogateescape"))
"""


def test_a_video_is_narrated_in_a_locale_of_ascii(folder):
    """Names then hold bytes that Python cannot decode."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", IN_ASCII, folder / VIDEO]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(b"Please narrate the video in real time.")
    assert b"error: " in done.stdout and b"Traceback" not in done.stdout + done.stderr
