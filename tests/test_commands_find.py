# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Moments that are found by a question at each window, as the command prints and cuts them."""

import json

import pytest
from scripted import BrightnessSession, write_brightness
from tiny import tiny_processor
from typer.testing import CliRunner

from videollm_mod import VideoReader, cli
from videollm_mod.commands.find import Moment, find_moments
from videollm_mod.commands.windows import Window


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Run the command on a video of these brightnesses."""
    monkeypatch.setattr(cli, "open_session", lambda *_, fps, **__: (tiny_processor(), BrightnessSession(fps)))

    def run(levels, *options, **writing):
        video = write_brightness(tmp_path / "video.mp4", levels, **writing)
        return CliRunner().invoke(cli.app, ["find", str(video), "a lamp", *map(str, options)])

    return run


def test_neighbouring_windows_are_one_moment_and_moments_are_ranked():
    values = [0.2, 0.6, 0.7, 0.4, 0.9, 0.5, 0.1, 0.6]
    windows = [Window(start, start + 1, [value]) for start, value in enumerate(values)]
    assert find_moments(windows, 0.5) == [Moment(4, 6, 0.9), Moment(1, 3, 0.7), Moment(7, 8, 0.6)]
    # Between these, frames of a live source are missing.
    assert find_moments([Window(0, 1, [0.8]), Window(2, 3, [0.8])], 0.5) == [Moment(0, 1, 0.8), Moment(2, 3, 0.8)]
    assert find_moments([], 0.5) == []


def test_moments_are_printed_the_most_probable_first(find):
    done = find([0.1, 0.7, 0.6, 0.1, 0.9, 0.2], "--window", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["   4.0s to    5.0s  0.90", "   1.0s to    3.0s  0.70"]
    assert find([0.1, 0.7, 0.6, 0.1, 0.9, 0.2], "--window", 1, "--top", 1).stdout.count("\n") == 1
    done = find([0.1, 0.7, 0.1, 0.9, 0.1], "--window", 1, "--json", "--threshold", 0.8)
    [moment] = map(json.loads, done.stdout.splitlines())
    assert moment.pop("probability") == pytest.approx(0.9, abs=0.02) and moment == {"start": 3.0, "end": 4.0}


def test_what_was_left_out_is_counted_in_json_too(find, tmp_path):
    find([0.1])
    video = write_brightness(tmp_path / "cut.mkv", [0.1, 0.9] * 30)
    video.write_bytes(video.read_bytes()[:-1500])
    for arguments in (["find", str(video), "a lamp"], ["watch", str(video), "--alert", "a lamp"]):
        done = CliRunner().invoke(cli.app, [*arguments, "--json"])
        assert done.exit_code == 0 and "not in order" not in done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])["summary"]
        assert summary["reading"]["missing_seconds"] > 1 and summary["frames_dropped"] == 0
        assert "missing seconds" in CliRunner().invoke(cli.app, arguments).stderr


def test_without_a_moment_the_most_likely_one_is_named(find):
    done = find([0.1, 0.3, 0.2], "--window", 1)
    assert done.exit_code == 0 and done.stdout == ""
    message = "No moment has a probability of 0.5 or more. The most likely: 1.0 to 2.0 s, with 0."
    assert message in done.stderr


def test_clips_are_cut_and_say_where_they_begin(find, tmp_path):
    done = find([0.1, 0.1, 0.9, 0.1, 0.1, 0.8], "--window", 1, "--clips", tmp_path / "new" / "clips", "--json", g="4")
    assert done.exit_code == 0, done.output
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["clip_start"], first["clip_end"]) == (2.0, 3.0)
    assert (second["start"], second["clip_start"], second["clip_end"]) == (5.0, 4.0, 6.0)
    with VideoReader(first["clip"]) as reader:
        assert reader.seconds == pytest.approx(1.0)
        assert [reader.picture(frame).mean() > 200 for _, _, frame in reader.frames()] == [True, True]
    done = find([0.1, 0.1, 0.9, 0.1, 0.1, 0.8], "--window", 1, "--clips", tmp_path / "new" / "clips", g="4")
    assert done.stdout.splitlines()[1].endswith("_5s-6s.mp4, begins 1.0 s earlier, at a key frame")
    assert "earlier" not in done.stdout.splitlines()[0]


def test_a_clip_that_fails_costs_nothing_else(find, tmp_path):
    folder, search = tmp_path / "clips", ([0.1, 0.1, 0.9, 0.1, 0.8], "--window", 1, "--clips", tmp_path / "clips")
    find(*search, g="1")
    first, second = sorted(folder.iterdir())
    first.unlink()
    second.unlink()
    first.mkdir()
    done = find(*search, g="1")
    assert done.exit_code == 1
    assert "error: the clip of 2.0 to 3.0 s was not written: " in done.stderr
    assert len(done.stdout.splitlines()) == 2 and second.is_file() and "_4s-5s" in second.name


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--window", 0.1], "--window 0.1 is shorter than a frame: at --fps 2 choose at least 0.5."),
        (["--clips", __file__], f"--clips needs a folder to write to, and '{__file__}' is a file."),
        (["--clips", "/proc/clips"], "--clips cannot write to '/proc/clips': No such file or directory."),
        (["--fps", 0], "`fps` must be"),
    ],
)
def test_mistakes_are_reported_before_a_model_is_loaded(find, monkeypatch, options, error):
    monkeypatch.setattr(cli, "open_session", lambda *_, **__: pytest.fail("a model was loaded"))
    done = find([0.1], *options)
    assert done.exit_code == 1 and f"error: {error}" in done.stderr
    assert CliRunner().invoke(cli.app, ["find", "nowhere.mp4", " "]).stderr.startswith("error: What to look for is")
