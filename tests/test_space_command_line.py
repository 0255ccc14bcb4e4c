# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Names of options: dashes and underscores are the same, in all scripts."""

import json
import subprocess

import pytest
from parsers import ROOT, scripts
from preloaded import preloaded_python

from videollm_mod.space.command_line import CommandLineParser


@pytest.mark.parametrize("declared", ["--max-frames", "--max_frames"])
@pytest.mark.parametrize(
    ("given", "frames", "rest"),
    [
        (["--max-frames", "5"], "5", []),
        (["--max_frames", "5"], "5", []),
        (["--max_frames=a_b-c"], "a_b-c", []),
        (["--max-frames=--x_y-z"], "--x_y-z", []),
        (["--max-frames", "my_file-1", "out_dir", "in-dir"], "my_file-1", ["out_dir", "in-dir"]),
        (["--max_frames", "-a_b c"], "-a_b c", []),
        (["--max_frames", "5", "--", "--max_frames", "--other_one"], "5", ["--max_frames", "--other_one"]),
        (["__max_frames", "--max_frames", ""], "", ["__max_frames"]),
    ],
)
def test_dashes_and_underscores_are_the_same_in_names_and_stay_in_values(declared, given, frames, rest):
    parser = CommandLineParser()
    parser.add_argument_group("of a group").add_argument(declared)
    parser.add_argument("rest", nargs="*")
    read = parser.parse_args(given)
    assert read.max_frames == frames and read.rest == rest


def test_an_unknown_option_is_named_as_it_was_given(capsys):
    parser = CommandLineParser()
    parser.add_argument("--max-frames")
    with pytest.raises(SystemExit):
        parser.parse_args(["--most_frames-ever", "5"])
    assert "unrecognized arguments: --most_frames-ever 5" in capsys.readouterr().err


@pytest.mark.xdist_group("preloaded")
def test_every_script_knows_both_spellings_of_every_option():
    """A process of its own, because scripts change settings of libraries for their process."""
    command = [preloaded_python(), str(ROOT / "tests" / "parsers.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert not {script: names for script, names in told.items() if names}
    assert {"train/sft.py", "train/push.py", "convert/command.py", "benchmarks/watch_clip.py"} <= set(told)
    assert len(scripts()) - len(told) <= 3, set(scripts()) - set(told)
