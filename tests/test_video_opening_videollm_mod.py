# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Opening video: what stands in its place, mistyped names, pipes, cameras. Time limits: `test_live_sources.py`."""

import io
import os
import subprocess
import sys
import threading
import time as clock
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_frames, write_clip

from videollm_mod import read_video
from videollm_mod.space.uploads import FORMATS
from videollm_mod.video_opening_videollm_mod import (
    HOST,
    count_torn,
    goes_on,
    is_complete,
    open_container,
    without_secrets,
)


NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"  # NASA SVS 13013, public domain


@pytest.mark.parametrize("length", [2**44, 2**62, 2**63, 2**64 - 16])
def test_lengths_beyond_any_file_are_no_fault_of_the_reader(tmp_path, length):
    box = (1).to_bytes(4, "big") + b"free" + length.to_bytes(8, "big")
    (tmp_path / "clip.mp4").write_bytes((24).to_bytes(4, "big") + b"ftypisom" + bytes(12) + box)
    with pytest.raises(ValueError, match="clip.mp4' cannot be read as video"):
        open_container(tmp_path / "clip.mp4")
    element = b"\xec\x01" + min(length, 2**56 - 2).to_bytes(7, "big")  # padding of Matroska
    (tmp_path / "clip.mkv").write_bytes(element)
    assert count_torn(str(tmp_path / "clip.mkv"), "matroska,webm") == (0, True)


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


@pytest.mark.parametrize("name", ["rtsp:cam 2024.mp4", "udp:1.mp4", "camera:0"])
def test_a_file_with_the_name_of_a_broadcast_waits(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert goes_on(name)
    (tmp_path / name).write_bytes(NASA.read_bytes())
    assert not goes_on(name) and is_complete(name)


def test_messages_hold_no_password_and_no_token(tmp_path, monkeypatch):
    assert without_secrets("rtsp://bob:secret@cam:554/a?token=1") == "rtsp://bob:***@cam:554/a?***"
    for plain in ("rtsp://bob@cam/a", "https://host/a@b", "http://[::1]:80/a"):
        assert without_secrets(plain) == plain
    for password in ("pa#ss", "pa/ss", "p@ss", "80/pass", "pa[ss", "p#a@s/s"):
        assert without_secrets(f"rtsp://bob:{password}@cam:554/1?token=1") == "rtsp://bob:***@cam:554/1?***"
    # A password or a query: both are left out.
    for source in ("rtsp://bob:pa?ss@cam/1", "rtsp://bob:pass@cam/1?token=a@b", "rtsp://bob:80?token=a@b"):
        assert without_secrets(source) == "rtsp://bob:***"
    assert without_secrets("https://host/v?token=a:b@c") == "https://host/v?***"
    monkeypatch.chdir(tmp_path)
    # Python's own parser refuses a bracket, and repeats a password with a sign of full width.
    for password in ("secret", "secret[", "]secret", "secret\uff1f"):
        for source in (
            f"http://bob:{password}@127.0.0.1:9/v.mp4?token=secret",
            f"rtsp://bob:{password}@127.0.0.1:9/1",
        ):
            with pytest.raises(ValueError, match=r"^'\w+://bob:\*\*\*@127.0.0.1:9/") as error:
                open_container(source, timeout=2)
            assert "secret" not in str(error.value)
    for source, host in (
        ("rtsp://bob:pa[ss@cam/1", "cam"),
        ("https://[::1]:80/a", "[::1]"),
        ("https://host/a@b", "host"),
    ):
        assert HOST.findall(without_secrets(source)) == [host]


# ----------------------------------------------------------------------------------------------- files in other files

SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 49170 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and playlists with their type."""

    extensions_map = {".m3u8": "application/vnd.apple.mpegurl"}  # noqa: RUF012

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder, and the address at which it is served. It holds a video, `part.ts`."""
    folder = tmp_path_factory.mktemp("web")
    write_clip(folder / "part.ts", random_frames(10), codec="mpeg2video", fps=25)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def playlist(entry, before=""):
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{before}#EXTINF:1,\n{entry}\n#EXT-X-ENDLIST\n"


def nested(folder):
    """Return texts that name a file of this machine in all the ways that FFmpeg knows."""
    file = folder / "part.ts"
    ways = [f"file:{file}", f"file://{file}", f"concat:{file}", f"subfile,,start,0,end,0,,:{file}", f"crypto:{file}"]
    texts = [playlist(way) for way in [*ways, f"crypto+file:{file}", "pipe:0", "data:video/mp2t;base64,RwAA"]]
    key = f'#EXT-X-KEY:METHOD=AES-128,URI="file://{file}",IV=0x{0:032}\n'
    master = f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nfile://{folder}/good.m3u8\n"
    return [*texts, playlist("part.ts", key), master, f"ffconcat version 1.0\nfile 'file:{file}'\n", SDP]


def test_a_playlist_on_the_web_is_read_and_opens_nothing_of_this_machine(web):
    folder, address = web
    (folder / "good.m3u8").write_text(playlist("part.ts"))
    assert len(list(read_video(f"{address}/good.m3u8", fps=25))) == 10
    for number, text in enumerate(nested(folder)):
        (folder / f"{number}.m3u8").write_text(text)
        began = clock.monotonic()
        with pytest.raises(ValueError, match="cannot be read as video"):
            next(read_video(f"{address}/{number}.m3u8", timeout=5))
        assert clock.monotonic() - began < 4, "nothing waits for packets of another protocol"


def test_an_upload_opens_nothing_else_whatever_its_name(web):
    folder, address = web
    texts = [
        *nested(folder),
        playlist("part.ts"),
        playlist(f"{address}/part.ts"),
        "ffconcat version 1.0\nfile part.ts\n",
    ]
    for name in ("clip.mp4", "clip.m3u8", "clip.ffconcat"):
        for text in texts:
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match="cannot be read as video"):
                open_container(folder / name, formats=FORMATS)


def test_standard_input_opens_nothing_else(web, monkeypatch):
    for text in nested(web[0]):
        pipe = io.BufferedReader(io.BytesIO(text.encode()))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        began = clock.monotonic()
        with pytest.raises(ValueError, match="'-' cannot be read as video"):
            open_container("-")
        assert clock.monotonic() - began < 4


def test_a_box_longer_than_any_file_is_no_index(tmp_path):
    box = b"\0\0\0\x18ftypisom" + bytes(12) + b"\0\0\0\1mdat" + b"\xff" * 8
    (tmp_path / "clip.mp4").write_bytes(box)
    with pytest.raises(ValueError, match=r"clip\.mp4' cannot be read as video"):
        open_container(str(tmp_path / "clip.mp4"), timeout=None)
