# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Opening video: what stands in its place, mistyped names, pipes, cameras. Time limits: `test_live_sources.py`."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_frames, write_clip

from videollm_mod import read_video
from videollm_mod.video_opening_videollm_mod import goes_on, is_complete, open_container, without_secrets


NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"  # NASA SVS 13013, public domain


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "it is a web page"),
        (b"Just some text.\n" * 100, "Invalid data found"),
        (bytes(10_000), "Invalid data found"),
    ],
)
def test_says_what_is_in_place_of_a_video(tmp_path, content, reason):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^'{path}' cannot be read as video: {reason}"):
        next(read_video(path))


def test_a_named_pipe_is_a_source(tmp_path):
    write_clip(tmp_path / "clip.mkv", random_frames(6))
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(f"cat '{tmp_path}/clip.mkv' > '{tmp_path}/pipe'", shell=True):
        assert len(list(read_video(tmp_path / "pipe", fps=10))) == 6
    with pytest.raises(ValueError, match="'/dev/null' cannot be read as video"):
        next(read_video("/dev/null"))


def test_a_mistyped_path_suggests_a_file(tmp_path):
    write_clip(tmp_path / "cooking.mp4", random_frames(2))
    with pytest.raises(FileNotFoundError) as error:
        next(read_video(tmp_path / "coking.mp4"))
    path = tmp_path / "coking.mp4"
    assert str(error.value) == f"There is no video file '{path}'; did you mean '{tmp_path / 'cooking.mp4'}'?"
    for other in (tmp_path / "xyz.mkv", tmp_path / "nowhere" / "cooking.mp4"):
        with pytest.raises(FileNotFoundError, match=r"There is no video file '.*'\.$"):
            next(read_video(other))


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("camera:front", "named by its number, such as 'camera:0'"),
        ("camera:99", "'camera:99' cannot be read as video"),
    ],
)
def test_missing_cameras_are_refused(camera, message):
    with pytest.raises(ValueError, match=message):
        next(read_video(camera))


@pytest.mark.parametrize("video", [NASA, str(NASA), random_frames(2), torch.zeros(2, 8, 8, 3), [np.zeros((8, 8, 3))]])
def test_files_and_arrays_are_complete(video):
    assert is_complete(video)


@pytest.mark.parametrize("video", ["-", "camera:0", "rtsp://camera/stream", "https://host/" + 300 * "x", iter([])])
def test_live_sources_are_not_complete(video):
    assert not is_complete(video)


def test_cameras_and_broadcasts_go_on_unread():
    assert all(map(goes_on, ["camera:0", "rtsp://camera/stream", "udp://host:1"]))
    assert not any(map(goes_on, [NASA, str(NASA), "-", "https://host/clip.mp4", iter([]), np.zeros((1, 8, 8, 3))]))


def test_messages_hold_no_password_and_no_token(tmp_path, monkeypatch):
    assert without_secrets("rtsp://bob:secret@cam:554/a?token=1") == "rtsp://bob:***@cam:554/a?***"
    assert without_secrets("rtsp://bob@cam/a") == "rtsp://bob@cam/a"
    monkeypatch.chdir(tmp_path)
    for source in ("http://bob:secret@127.0.0.1:9/v.mp4?token=secret", "rtsp://bob:secret@127.0.0.1:9/live"):
        with pytest.raises(ValueError, match=r"'\w+://bob:\*\*\*@127.0.0.1:9/") as error:
            open_container(source, timeout=2)
        assert "secret" not in str(error.value)
