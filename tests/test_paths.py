# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Commands accept names with spaces, in any script, and as long as the system allows, in any locale."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
from hub import Hub
from programs import run_command, run_main
from published import save_source
from tiny import copy_embedded, random_frames, tiny_model, tiny_processor, write_clip

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


# Of Linux: the option of `prctl` that takes a right from all later programs, and root's right to write everywhere.
DROP, WRITE_EVERYWHERE = 24, 1
IN_READ_ONLY = """
import os, sys
from pathlib import Path
from programs import run_command, run_main, run_training
from videollm_mod.convert import command as convert
from videollm_mod.serving import save_session
from tiny import random_frames, tiny_model, tiny_processor

folder, out = map(Path, sys.argv[1:])
if os.access(folder, os.W_OK):
    sys.exit(77)
watch = ("narrate", "clip.mp4", "--model", "model")
done = run_command(*watch, folder=folder)
assert done.returncode == 0 and "entries: " in done.stdout, done
done = run_command(*watch, "--srt", out / "clip.srt", folder=folder)
assert done.returncode == 0 and (out / "clip.srt").stat().st_size, done
rows = ("--dataset", "streamworld", "--world", "small", "--num_clips", 1, "--max_steps", 1, "--report_to", "none")
for named, done in (
    ("clip.srt", run_command(*watch, "--srt", "clip.srt", folder=folder)),
    ("", run_command("narrate", ".", folder=folder)),
    ("subtitles", run_command("narrate", ".", "--out", "subtitles", folder=folder)),
    ("report.html", run_command("report", "clip.mp4", "--out", "report.html", folder=folder)),
    ("model/golden.json", run_command("verify", "model", "--write", folder=folder)),
    ("ours", run_main(convert.main, "theirs", "ours", program="convert", folder=folder)),
    (str(folder / "run"), run_training(folder / "run", "--checkpoint", folder / "model", *rows)),
):
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and line.startswith("error: ") and "Permission denied" in line, done
    assert named in line and "/." not in line, done
session = tiny_model().stream(tiny_processor())
session.push(random_frames(1))
try:
    save_session(session, folder / "session")
except PermissionError as error:
    assert str(error).startswith(f"'{folder / 'session'}' cannot be written: Permission denied. Allow writing there")
else:
    raise AssertionError("a session was saved in a folder without permission")
"""


def test_in_folders_without_permission_to_write_models_run_and_files_are_refused_in_one_line(tmp_path):
    """As the working directory, and as the folder of the model, of the video and of what is written."""
    folder, out = tmp_path / "read only", tmp_path / "out"
    out.mkdir()
    copy_embedded(folder / "model")
    write_clip(folder / "clip.mp4", random_frames(6))
    save_source("smolvlm", folder / "theirs")
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    before = sorted(folder.rglob("*"))

    def give_up_rights():
        # For others than root this fails, and is not needed.
        ctypes.CDLL(None).prctl(DROP, WRITE_EVERYWHERE, 0, 0, 0)

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", IN_READ_ONLY, folder, out]
    for place in places:
        place.chmod(0o555)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=give_up_rights)
    finally:
        for place in places:
            place.chmod(0o755)
    if done.returncode == 77:
        pytest.skip("this process may write everywhere, and cannot give that up")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(folder.rglob("*")) == before
