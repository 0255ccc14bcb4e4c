# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Small files that would take hours to decode, or fill the memory: pictures, and indexes of videos."""

import base64
import io
import struct
from fractions import Fraction

import av
import gradio as gr
import inputs
import pytest
from PIL import Image
from tiny import random_frames, write_clip, write_late_stream

from videollm_mod.serving.chat import Completion
from videollm_mod.serving.chat_messages import Media
from videollm_mod.serving.fetching import read_picture
from videollm_mod.serving.limits import Limits as ServerLimits
from videollm_mod.serving.limits import RequestError
from videollm_mod.space import uploads
from videollm_mod.space.uploads import Limits, announces_too_much
from videollm_mod.video_reading_videollm_mod import VideoReader


def jpeg(scans, size=(32, 32)):
    """Return a progressive picture with its last scan repeated."""
    packed = io.BytesIO()
    Image.new("RGB", size, "red").save(packed, "JPEG", progressive=True)
    data = packed.getvalue()
    own = data.count(b"\xff\xda")
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * (scans - own) + data[-2:]


def test_a_jpeg_picture_of_many_scans_is_refused_before_it_is_decoded():
    limits = ServerLimits()
    assert read_picture(jpeg(100), limits).size == (32, 32)
    with pytest.raises(RequestError, match="more than 100 scans: save it as") as error:
        read_picture(bytearray(jpeg(101)), limits, param="url")
    assert (error.value.status, error.value.param) == (413, "url")
    for scans in (100, 101):
        sent = {"time": 0.0, "image": f"data:image/jpeg;base64,{base64.b64encode(jpeg(scans)).decode()}"}
        if scans > 100:
            with pytest.raises(gr.Error):
                inputs.read_frame(sent)
        else:
            assert inputs.read_frame(sent)[1].shape == (32, 32, 3)


@pytest.mark.parametrize("suffix", ["avi", "mov", "mkv"])
def test_such_a_picture_in_a_video_is_a_spoilt_packet(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for number, scans in enumerate((10, 101, 10)):
            packet = av.Packet(jpeg(scans))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 5)
            container.mux(packet)
    with VideoReader(path) as reader:
        assert len(list(reader.frames())) == 2 and reader.report.spoilt_packets == 1


# -------------------------------------------------------------------------------------------------------- index of mp4


def box(name, *parts, large=False):
    body = b"".join(parts)
    if large:
        return struct.pack(">I4sQ", 1, name, 16 + len(body)) + body
    return struct.pack(">I4s", 8 + len(body), name) + body


def numbers(*values):
    return struct.pack(f">{len(values)}I", *values)


def track(samples, *, kind=b"vide", duration=2, edits=0, large=False):
    tables = box(b"stts", numbers(0, 1, samples, duration)) + box(b"stsz", numbers(0, 1, samples), large=large)
    hdlr = box(b"hdlr", numbers(0, 0), kind, bytes(13))
    edts = box(b"edts", box(b"elst", numbers(0, edits))) if edits else b""
    return box(b"trak", edts, box(b"mdia", hdlr, box(b"minf", box(b"stbl", tables))))


def mp4(*parts):
    return box(b"ftyp", b"isom", numbers(512)) + box(b"mdat", track(1 << 31)) + b"".join(parts)


FRAGMENT = box(b"moof", box(b"traf", box(b"trun", numbers(0, 4_000_000))))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (mp4(box(b"moov", track(400_000), track(80_000))), False),
        (mp4(box(b"moov", track(1_000_001))), True),
        (mp4(box(b"moov", track(1_000_001, large=True))), True),
        (mp4(box(b"moov", track(600_000), track(600_000))), True),
        (mp4(box(b"moov", track(80_000_000, kind=b"soun", duration=1))), False),  # half an hour of PCM sound
        (mp4(box(b"moov", track(80_000_000, kind=b"soun", duration=2))), True),
        (mp4(box(b"moov", track(80_000_000, kind=b"vide", duration=1))), True),
        (mp4(box(b"moov", track(1000, edits=10_000))), True),
        (mp4(FRAGMENT), True),
        (mp4(box(b"free", box(b"moov", track(1_000_001)))), True),
        (mp4(box(b"moov", box(b"cmov", bytes(20)))), True),
        (mp4(box(b"\x9f\x42\x86\x81", bytes(8)), FRAGMENT), True),  # FFmpeg skips a box that it does not know
        (mp4(box(b"stsz", numbers(0, 1, 4_000_000))), True),
        (box(b"free") * 3 + mp4(box(b"moov", track(10))), False),
        (b"", False),
        (b"\0\0\0", False),
        (numbers(1), False),
        (numbers(1, 0, 0, 0), False),
    ],
)
def test_an_index_that_would_fill_the_memory_is_found_before_ffmpeg_reads_it(tmp_path, content, expected):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    assert announces_too_much(path) is expected


def refusals(path):
    """Return how the page and the server refuse a video."""
    with pytest.raises(ValueError) as page:
        Limits().check(path, VideoReader)
    completion = Completion.__new__(Completion)
    completion.limits, completion._stop = ServerLimits(), None
    with pytest.raises(RequestError) as server:
        completion._measure(Media("video_url", str(path), "url"))
    return str(page.value), str(server.value)


def test_the_page_and_the_server_refuse_too_many_packets(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4(box(b"moov", track(80_000_000))))
    assert all("has too many frames, or too many in a second" in said for said in refusals(path))
    write_clip(path, random_frames(20), fps=10)
    assert Limits().check(path, VideoReader) == pytest.approx(2.0, abs=0.11)
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "MOST_PER_SECOND", 9)
        assert all("too many in a second" in said for said in refusals(path))
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "MOST_PACKETS", 19)
        assert all("has too many frames" in said for said in refusals(path))


@pytest.mark.parametrize("rate", [1_000_000, 30])
def test_a_rate_beyond_all_cameras_is_refused_whatever_the_header_says(tmp_path, rate):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for number in range(2100):
            packet = av.Packet(jpeg(10) if number == 0 else b"\xff\xd8")
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 4000)
            container.mux(packet)
    assert all("too many in a second" in said for said in refusals(path))


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.1003]])
def test_an_mpeg_ts_with_one_picture_or_uneven_times_is_accepted(tmp_path, times):
    path = write_clip(tmp_path / "clip.ts", random_frames(len(times)), times=times, tune="film")
    with VideoReader(path) as reader:
        assert reader.stream.guessed_rate > 2000
    assert Limits().check(path, VideoReader) >= times[-1]


def test_a_stream_that_begins_in_the_middle_is_no_fault(tmp_path):
    path = write_late_stream(tmp_path / "clip.ts", random_frames(45))
    assert Limits().check(path, VideoReader) == pytest.approx(9.0, abs=0.01)
