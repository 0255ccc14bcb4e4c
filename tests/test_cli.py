# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The command line, as a user meets it: run as a program."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import random_frames, write_clip


ROOT = Path(__file__).parents[1]
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"


def run(*arguments, folder=ROOT):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_narrates_the_sample(tmp_path):
    done = run("narrate", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    story = json.loads((ROOT / "space" / "samples" / "streamworld.json").read_text(encoding="utf-8"))
    told = done.stdout.split("\n\n")[0].splitlines()
    assert told == [f"{time:6.1f}s  {text}" for time, text in story["events"]]
    assert "Note:" not in done.stderr
    assert re.search(r"\d+ frames in [\d.]+ s, [\d.]+ frames/s \(CPU, \d+ threads\)", done.stdout)
    assert re.search(
        r"full layers: 2 x \d+, routed layers: 4 x \d+; [\d.]+ MB, [\d.]+ MB at full compute", done.stdout
    )
    assert re.search(r"[\d.]+ GFLOP; [\d.]+ at full compute \(routing saves \d+%\)", done.stdout)


def test_other_videos_run_through_and_are_called_out_of_domain():
    done = run("narrate", NASA)
    assert done.returncode == 0, done.stderr
    assert "StreamWorld, generated clips, and knows nothing else" in done.stderr and "27 frames in" in done.stdout


def test_options(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    done = run("narrate", clip, "--fps", 5, "--threshold", 0, "--query", "Describe every frame.")
    assert done.returncode == 0 and "10 frames in" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["narrate", "no_such_file.mp4"], "error: There is no video file 'no_such_file.mp4'."),
        (["narrate", "--fps", "0"], "error: `fps` must be"),
        (["narrate", "--threshold", "7"], "error: `interval_threshold` is a probability"),
        (["narrate", str(ROOT / "README.md")], "cannot be read as video"),
        (["narrate", "--model", "no/such-model"], "error: "),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message):
    failed = run(*arguments)
    assert failed.returncode == 1 and message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len([line for line in failed.stderr.splitlines() if line.startswith("error:")]) == 1


def test_help_names_every_option():
    shown = run("narrate", "--help").stdout
    for option in ("--model", "--query", "--fps", "--threshold", "A file or a URL."):
        assert option in shown
