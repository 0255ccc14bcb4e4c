# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reading video: ticks, rotation, streams, memory, standard input, unreadable files."""

import functools
import gc
import http.server
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from tiny import random_frames, write_clip, write_late_stream

from videollm_mod import ReadingReport, VideoReader, read_video
from videollm_mod.video_opening_videollm_mod import count_torn


NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"  # NASA SVS 13013, public domain


def numbered(count, size=(32, 48)):
    """Return frames with their number as brightness."""
    return np.stack([np.full((*size, 3), 5 * index, np.uint8) for index in range(count)])


def numbers(frames):
    return [round(float(frame.mean()) / 5) for _, frame in frames]


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [
        (10, 2, [0, 5, 10, 15]),
        (10, 10, list(range(20))),
        (10, 20, [i // 2 for i in range(40)]),  # faster than the source: a frame stays until the next
        (10, 4, [0, 2, 5, 7, 10, 12, 15, 17]),
        (25, 2, [0, 12]),
        (Fraction(30000, 1001), 10, [0, 2, 5, 8, 11, 14, 17]),  # what is on the screen, not what comes next
    ],
)
def test_each_tick_shows_the_frame_on_screen(tmp_path, source_fps, fps, expected):
    path = write_clip(tmp_path / "clip.mp4", numbered(20), fps=source_fps)
    frames = list(read_video(path, fps=fps))
    assert numbers(frames) == expected
    assert [time for time, _ in frames] == pytest.approx([index / fps for index in range(len(expected))])
    assert all(frame.shape == (32, 48, 3) and frame.dtype == np.uint8 for _, frame in frames)


def test_variable_frame_rate(tmp_path):
    times = [0.0, 0.1, 0.2, 1.5, 1.6, 3.0]
    path = write_clip(tmp_path / "clip.mkv", numbered(6), times=times)
    assert numbers(read_video(path, fps=2))[:6] == [0, 2, 2, 3, 4, 4]
    assert numbers(read_video(path, fps=2))[6] == 5


def test_window(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(40), fps=10)
    frames = list(read_video(path, fps=2, start=1.0, end=2.5))
    assert [time for time, _ in frames] == [1.0, 1.5, 2.0, 2.5] and numbers(frames) == [10, 15, 20, 25]
    assert numbers(read_video(path, fps=2, start=3.0)) == [30, 35]
    everything = dict(read_video(path, fps=2))
    for at, frame in read_video(path, fps=2, start=1.5):
        assert np.array_equal(frame, everything[at])


def test_decoded_frames_do_not_wait_for_the_garbage_collector(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(40), fps=10)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
        assert len(list(read_video(path, fps=10))) == 40
        after = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert after - before <= 2


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_containers_and_codecs(tmp_path, codec, ending):
    path = write_clip(tmp_path / f"clip.{ending}", numbered(20), fps=10, codec=codec)
    assert np.abs(np.array(numbers(read_video(path, fps=2))) - [0, 5, 10, 15]).max() <= 1


def matrix(a, b, c, d):
    """Return the 36 bytes of a display matrix in an mp4's track header: x, y go to a x + c y, b x + d y."""
    numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    return b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)


# Display matrices, and what they do to a picture, in the order of EXIF's orientations 1 to 8.
ORIENTATIONS = {
    (1, 0, 0, 1): lambda picture: picture,
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],
    (-1, 0, 0, -1): lambda picture: picture[::-1, ::-1],
    (1, 0, 0, -1): lambda picture: picture[::-1],
    (0, 1, 1, 0): lambda picture: picture.swapaxes(0, 1),
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),
    (0, -1, -1, 0): lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
    (0, -1, 1, 0): lambda picture: np.rot90(picture),
}


@pytest.mark.parametrize("ending", ["mp4", "mov"])
@pytest.mark.parametrize("numbers", ORIENTATIONS)
def test_rotation_and_mirror_in_the_metadata_are_applied(tmp_path, numbers, ending):
    stored = np.zeros((4, 32, 48, 3), np.uint8)
    stored[:, :16, :24] = 255  # white in the top left corner
    stored[:, 16:, :24] = 128
    path = write_clip(tmp_path / f"clip.{ending}", stored)
    content = path.read_bytes()
    header = content.index(b"tkhd") + 4 + 40
    assert content[header : header + 36] == matrix(1, 0, 0, 1)
    path.write_bytes(content[:header] + matrix(*numbers) + content[header + 36 :])
    _, frame = next(read_video(path))
    upright = ORIENTATIONS[numbers](stored[0])
    assert frame.shape == upright.shape and np.abs(frame.astype(int) - upright).mean() < 5


@pytest.mark.parametrize("ending", ["jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_shown_upright(tmp_path, orientation, ending):
    """PyAV has no name for EXIF data, beside which FFmpeg gives the display matrix."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24], stored[16:, :24] = 255, 128
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(tmp_path / f"photo.{ending}", exif=exif)
    [(_, frame)] = read_video(tmp_path / f"photo.{ending}", fps=2)
    upright = list(ORIENTATIONS.values())[orientation - 1](stored)
    assert frame.shape == upright.shape and np.abs(frame.astype(int) - upright).mean() < 5


def test_pixels_change_their_shape_in_a_broadcast(tmp_path):
    parts = []
    for index, aspect in enumerate(("1/1", "16/11")):
        sar = {"x264opts": f"sar={aspect}:bframes=2"}
        times = [index + i / 10 for i in range(10)]
        parts.append(write_clip(tmp_path / f"{index}.ts", numbered(10, (48, 64)), times=times, **sar).read_bytes())
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    with VideoReader(path) as reader:
        assert [reader.picture(frame).shape[1] for *_, frame in reader.frames()] == [64] * 10 + [93] * 10


def test_the_best_of_several_video_streams(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((32, 48), (64, 96)):
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            stream.disposition = Disposition.default
            streams.append(stream)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 960, 960, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(random_frames(1, size=(960, 960))[0], format="rgb24")))
        for index in range(20):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(numbered(20, (stream.height, stream.width))[index], format="rgb24")
                frame.pts = index
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    frames = list(read_video(path, fps=2))
    assert frames[0][1].shape == (64, 96, 3) and numbers(frames) == [0, 5, 10, 15]


def test_a_real_clip():
    frames = list(read_video(NASA, fps=2))
    assert len(frames) == 27 and frames[0][1].shape == (270, 480, 3)  # 13 s; the larger of its two video streams
    assert frames[-1][0] == 13.0 and frames[12][1].std() > 20  # it fades to black at the end
    assert not np.array_equal(frames[0][1], frames[-1][1])


def test_urls(tmp_path):
    write_clip(tmp_path / "clip.mp4", numbered(20), fps=10)
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/clip.mp4"
        assert numbers(read_video(url, fps=2)) == [0, 5, 10, 15]
        with pytest.raises(ValueError, match="missing.mp4' cannot be read as video"):
            list(read_video(url.replace("clip", "missing")))
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        assert args


def test_frames_from_arrays_and_iterators():
    frames = random_frames(6)
    for video in (frames, torch.from_numpy(frames), list(frames), iter(frames)):
        got = list(read_video(video, fps=2))
        assert [time for time, _ in got] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
        assert all(np.array_equal(frame, expected) for (_, frame), expected in zip(got, frames, strict=True))
    camera = ((0.3 * index, frame) for index, frame in enumerate(frames))
    assert [time for time, _ in read_video(camera, start=0.5, end=1.3)] == pytest.approx([0.6, 0.9, 1.2])


def test_an_iterable_is_read_lazily():
    taken = []

    def camera():
        for frame in random_frames(5):
            taken.append(1)
            yield frame

    frames = read_video(camera(), fps=2)
    next(frames)
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "positive number of frames per second, got 0"),
        ({"fps": -2.0}, "got -2.0"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": "2"}, "got '2'"),
        ({"start": -1.0}, "`start` must be a finite number of seconds, at least 0, got -1.0"),
        ({"start": 2.0, "end": 1.0}, "`end` must be a finite number of seconds, at least 2, got 1.0"),
        ({"start": 99.0}, "has no frame from 99.0 s on"),
        ({"start": 1e300}, "has no frame from 1e\\+300 s on"),
    ],
)
def test_refuses_options(tmp_path, options, message):
    path = write_clip(tmp_path / "clip.mp4", numbered(4))
    with pytest.raises(ValueError, match=message):
        list(read_video(path, **options))


def test_refuses_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no video file"):
        next(read_video(tmp_path / "missing.mp4"))
    with pytest.raises(FileNotFoundError, match="The name of the video is empty"):
        next(read_video(""))
    with (tmp_path / "open.mp4").open("wb") as file, pytest.raises(TypeError, match="got BufferedWriter"):
        next(read_video(file))
    with pytest.raises(TypeError, match="got bytes: give the file's path"):
        next(read_video(b"abc"))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is no video at all" * 100)
    with pytest.raises(ValueError, match="broken.mp4' cannot be read as video: Invalid data"):
        next(read_video(broken))
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(ValueError, match="empty.mp4' cannot be read"):
        next(read_video(str(empty)))
    with pytest.raises(ValueError, match="ndarray given as video has no frame"):
        next(read_video(random_frames(0)))
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="has no video stream \\(streams: audio\\)"):
        next(read_video(sound))


_MEASURE = """
import resource, sys
from videollm_mod import VideoReader, read_video
count, peak = 0, []
for time, frame in read_video(sys.argv[1], fps=1):
    count += 1
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(count, peak[60], peak[-1])
"""


def test_a_long_video_is_read_in_constant_memory(tmp_path):
    """A frame of 640x360 takes 0.7 MB: 20 minutes at 1 fps would hold 800 MB."""
    path = tmp_path / "long.mp4"
    picture = random_frames(1, size=(360, 640))[0]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width, stream.pix_fmt = 360, 640, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "40", "g": "600"}
        for index in range(1200):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, index // 600, axis=1), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    result = subprocess.run([sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True, check=True)
    count, early, late = map(int, result.stdout.split())
    scale = 1 if sys.platform == "linux" else 1024
    assert count == 1200 and (late - early) / scale < 20 * 1024, f"grew from {early} to {late} KiB"


def mp4_boxes(path):
    """Return the names of an mp4's boxes, in order."""
    content, at, names = path.read_bytes(), 0, []
    while at < len(content):
        names.append(content[at + 4 : at + 8].decode())
        at += int.from_bytes(content[at : at + 4], "big")
    return names


@pytest.mark.parametrize(
    "kind", ["mkv", "mp4", "mp4 with its index first", "mp4 as standard input", "mp4 of a camera"]
)
def test_standard_input_is_a_video(tmp_path, monkeypatch, kind):
    """A pipe cannot seek, as in `cat clip.mp4 | videollm-mod narrate -`."""
    clip = write_clip(tmp_path / f"clip.{kind[:3]}", random_frames(20), fps=10)
    if kind == "mp4 with its index first":
        with (
            av.open(str(clip)) as source,
            av.open(str(tmp_path / "first.mp4"), "w", options={"movflags": "faststart"}) as to,
        ):
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                packet.stream = stream
                if packet.dts is not None:
                    to.mux(packet)
        clip = tmp_path / "first.mp4"
    if kind.startswith("mp4"):
        if kind == "mp4 of a camera":
            # A box before the media data moves it, and the index says where it lies.
            content, extra = bytearray(clip.read_bytes()), (100_008).to_bytes(4, "big") + b"uuid" + bytes(100_000)
            table = content.index(b"stco") + 8
            for place in range(table + 4, table + 4 + 4 * int.from_bytes(content[table : table + 4], "big"), 4):
                offset = int.from_bytes(content[place : place + 4], "big") + len(extra)
                content[place : place + 4] = offset.to_bytes(4, "big")
            at = content.index(b"mdat") - 4
            clip.write_bytes(content[:at] + extra + content[at:])
        boxes = mp4_boxes(clip)
        assert (boxes.index("moov") < boxes.index("mdat")) == (kind == "mp4 with its index first")
    for start, expected in ((0.0, [0.0, 0.5, 1.0, 1.5]), (0.75, [0.75, 1.25, 1.75])):
        with subprocess.Popen(["cat", str(clip)], stdout=subprocess.PIPE) as cat, clip.open("rb") as file:
            given = file if kind == "mp4 as standard input" else cat.stdout
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=given))
            assert [time for time, _ in read_video("-", fps=2, start=start)] == expected


def test_a_live_mp4_on_standard_input_is_shown_as_it_comes(tmp_path, monkeypatch):
    """Its writer sends the first box alone, and does not end."""
    path = tmp_path / "clip.mp4"
    options = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
    clip = write_clip(tmp_path / "source.mp4", random_frames(40), fps=10)
    with av.open(str(clip)) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size]:
            packet.stream = stream
            target.mux(packet)
    content = path.read_bytes()
    at = content.index(b"moov") - 4
    read, write = os.pipe()
    with open(read, "rb") as pipe, open(write, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        writer.write(content[:at])
        thread = threading.Timer(0.3, writer.write, (content[at:],))
        thread.start()
        guard = threading.Timer(20, writer.close)
        guard.start()
        assert next(iter(read_video("-", fps=2)))[0] == 0.0
        assert not writer.closed
        guard.cancel()
        thread.join()
        writer.close()


def test_metadata_of_standard_input_need_not_be_unicode(tmp_path, monkeypatch):
    clip = tmp_path / "clip.mkv"
    with av.open(str(clip), "w") as container:
        container.metadata["title"] = "a title"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for picture in random_frames(5)[:, :32, :32]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
        container.mux(stream.encode())
    content = clip.read_bytes()
    assert b"a title" in content
    clip.write_bytes(content.replace(b"a title", b"a t\xfftle"))
    with subprocess.Popen(["cat", str(clip)], stdout=subprocess.PIPE) as cat:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=cat.stdout))
        assert len(list(read_video("-", fps=10))) == 5


def test_a_live_pipe_is_not_spooled_and_lasts_until_its_writer_ends(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", random_frames(60), fps=10)
    content = clip.read_bytes()
    code = "from videollm_mod import read_video\n"
    code += "for time, _ in read_video('-', fps=2, timeout=0.2, reconnect=True): print(time, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        reader.stdin.write(content[: len(content) // 2])
        reader.stdin.flush()
        assert reader.stdout.readline() == b"0.0\n"  # half of the video is still to come
        time.sleep(0.5)  # longer than the time limit, which standard input does not have
        reader.stdin.write(content[len(content) // 2 :])
        reader.stdin.close()
        assert len(reader.stdout.read().split()) == 11


# ------------------------------------------------------------------------------------------------ what a video is


def ts_part(path, frames, offset=0.0):
    """Write an MPEG-TS at 10 fps whose clock begins at `offset` seconds."""
    return write_clip(path, frames, times=[offset + index / 10 for index in range(len(frames))])


@pytest.mark.parametrize("bit", [0b1000, 0b10])
def test_a_first_time_of_decoding_that_is_hours_before_its_picture(tmp_path, bit):
    """The clock of MPEG-TS has 33 bits, which are 26 hours. One of its highest three is wrong."""
    path = write_clip(tmp_path / "clip.ts", numbered(15), times=[3600 + index / 10 for index in range(15)], bf="1")
    data = bytearray(path.read_bytes())
    first = data.index(b"\0\0\1\xe0")
    assert data[first + 7] >> 6 == 3  # the packet has two times of five bytes: when it is shown and decoded
    data[first + 14] ^= bit
    path.write_bytes(data)
    frames, seconds, report = read_numbers(path)
    assert frames == [(pytest.approx(0.1 + index / 10, abs=1e-4), index) for index in range(15)]
    assert seconds == pytest.approx(1.6, abs=1e-4) and report.mended_times


def test_colours_of_an_unknown_kind_are_shown_as_usual(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(2))
    with VideoReader(path) as reader:
        for *_, frame in reader.frames():
            usual = reader.picture(frame)
            frame.colorspace = 232
            assert (reader.picture(frame) == usual).all()


def test_a_first_picture_before_the_first_second_is_shown_at_0(tmp_path):
    """The source says that it begins at its second picture."""
    with VideoReader(write_clip(tmp_path / "clip.ts", numbered(5))) as reader:
        reader.origin += Fraction(1, 10)
        times = [float(time) for time, _, _ in reader.frames()]
    assert times == pytest.approx([0, 0, 0.1, 0.2, 0.3], abs=1e-4) and reader.report.mended_times == 1


def read_numbers(path):
    with VideoReader(path) as reader:
        frames = [(float(time), round(reader.picture(frame).mean() / 5)) for time, _, frame in reader.frames()]
        return frames, reader.seconds, reader.report


@pytest.mark.parametrize("offsets", [(0.0, 36000.0), (0.0, 0.0), (36000.0, 0.0), (0.0, 36000.0, 0.0)])
def test_time_goes_on_where_the_clock_of_a_broadcast_jumps_or_restarts(tmp_path, offsets):
    parts = [ts_part(tmp_path / f"{i}.ts", numbered(45)[15 * i :][:15], at) for i, at in enumerate(offsets)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, seconds, report = read_numbers(path)
    count = 15 * len(offsets)
    assert [number for _, number in frames] == list(range(count))
    assert [time for time, _ in frames] == pytest.approx([index / 10 for index in range(count)], abs=1e-4)
    assert seconds == pytest.approx(count / 10, abs=1e-4)
    assert report.mended_times == len(offsets) - 1 and "mended time" in str(report)
    assert numbers(read_video(path, fps=2, start=2.0)) == list(range(20, count, 5))


def test_streams_that_begin_in_the_middle_are_counted(tmp_path):
    """Two channels of a broadcast, one recorded after the other."""
    path = write_late_stream(tmp_path / "joined.ts", numbered(45))
    frames, seconds, report = read_numbers(path)
    assert [number for _, number in frames] == list(range(45)) and seconds == pytest.approx(9.0, abs=1e-4)
    # PyAV 19 does not tell of them.
    assert report.ignored_streams == (int(av.__version__.split(".")[0]) < 19)


def test_lost_packets_of_a_broadcast_are_counted_and_joins_are_not(tmp_path):
    parts = [
        ts_part(tmp_path / f"{i}.ts", random_frames(20, size=(64, 96)), at).read_bytes() for i, at in ((0, 0), (1, 60))
    ]
    path = tmp_path / "clip.ts"
    for content, spoilt in ((parts[0], 0), (b"".join(parts), 0), (parts[0][: 188 * 600] + parts[0][188 * 605 :], 1)):
        path.write_bytes(content)
        *_, report = read_numbers(path)
        assert report.spoilt_packets == spoilt


@pytest.mark.parametrize("ending", ["ts", "mkv", "mp4"])
def test_a_spoilt_key_frame_does_not_move_the_frames_after_it(tmp_path, ending):
    """The decoder returns frames in another order for a while, as no B-frame finds its key frame."""
    pictures = np.clip(numbered(40, (64, 96)) + random_frames(1, size=(64, 96)) // 8, 0, 255).astype(np.uint8)
    path = write_clip(tmp_path / f"clip.{ending}", pictures, fps=10, g="10", bf="2", sc_threshold="0", crf="20")
    unspoilt = dict(read_numbers(path)[0])
    with av.open(str(path)) as container:
        key = [packet for packet in container.demux(video=0) if packet.is_keyframe][1]
    content = bytearray(path.read_bytes())
    content[key.pos - 300 : key.pos + 300] = bytes(600)
    path.write_bytes(content)
    frames, seconds, report = read_numbers(path)
    assert len(frames) > 25 and all(abs(number - unspoilt[time]) < 2 for time, number in frames if time >= 2.1)
    assert frames[-1][0] == pytest.approx(3.9, abs=0.01) and seconds == pytest.approx(4.0, abs=0.01) and report


@pytest.mark.parametrize(
    ("ending", "codec", "options"),
    [
        ("ts", "libx264", {"g": "13", "bf": "2"}),
        ("ts", "libx264", {"g": "250"}),
        ("mkv", "libx264", {"x264opts": "open-gop=1:keyint=13:bframes=3"}),
        ("flv", "flv", {"g": "13"}),
        ("avi", "mpeg4", {"g": "13", "bf": "2"}),
        ("mpg", "mpeg2video", {"g": "15", "bf": "2"}),
        ("vob", "mpeg2video", {"g": "15", "bf": "2"}),
        ("apng", "apng", {"pix_fmt": "rgb24"}),
        ("gif", "gif", {"pix_fmt": "rgb8"}),
        ("h264", "libx264", {"g": "13"}),
    ],
)
def test_a_window_holds_the_frames_of_the_video(tmp_path, ending, codec, options):
    """Formats without an index land elsewhere than asked when they seek, or say another time."""
    noise = random_frames(1, size=(32, 96))[0]
    pictures = np.repeat(numbered(50, (64, 96)), 6, axis=0)
    for index, picture in enumerate(pictures):
        picture[:32, : index // 3] = noise[:, : index // 3]
    path = write_clip(tmp_path / f"clip.{ending}", pictures, fps=25, codec=codec, **options)
    with VideoReader(path) as reader:
        frames = [(time, reader.picture(frame)) for time, _, frame in reader.frames()]
    assert len(frames) == 300
    for start in (0.1, 1.0, 1.9, 3.7, 5.5, 6.4, 8.2, 10.0, 11.8, 11.9):
        with VideoReader(path) as reader:
            window = [(time, reader.picture(frame)) for time, _, frame in reader.frames(start)]
        rest = frames[-len(window) :]
        assert window[0][0] <= start and [time for time, _ in window] == [time for time, _ in rest]
        assert all(np.array_equal(a, b) for (time, a), (_, b) in zip(window, rest, strict=True) if time >= start)


def test_a_window_that_begins_at_a_spoilt_key_frame(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", numbered(40), fps=10, g="10")
    with av.open(str(path)) as container:
        key = [packet for packet in container.demux(video=0) if packet.is_keyframe][3]
    content = bytearray(path.read_bytes())
    content[key.pos : key.pos + key.size] = bytes(key.size)
    path.write_bytes(content)
    assert numbers(read_video(path, fps=10, start=2.5))[:5] == [25, 26, 27, 28, 29]


def test_a_reader_reads_again(tmp_path):
    with VideoReader(write_clip(tmp_path / "clip.mkv", numbered(4))) as reader:
        assert len(list(reader.frames())) == len(list(reader.frames())) == 4


def test_refuses_a_video_without_a_decoder_or_without_pictures(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(4))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"avc1", b"xyz1").replace(b"avcC", b"xyzC"))
    with pytest.raises(ValueError, match="clip.mp4' has no video stream \\(streams: unknown codec\\)"):
        VideoReader(path)
    path.write_bytes(content[: content.index(b"moov") - 4])
    with pytest.raises(ValueError, match="clip.mp4' cannot be read as video: its index is missing"):
        VideoReader(path)
    path = write_clip(tmp_path / "clip.mkv", numbered(4))
    with av.open(str(path)) as container:
        path.write_bytes(path.read_bytes()[: next(container.demux()).pos])
    with VideoReader(path) as reader, pytest.raises(ValueError, match="clip.mkv' has no picture"):
        next(reader.frames())


def test_a_slow_video_with_b_frames_is_in_order(tmp_path):
    """A B-frame of a video at 0.1 fps is shown 20 s after it is decoded."""
    path = write_clip(tmp_path / "clip.mp4", numbered(8), fps=0.1, bf="2")
    frames, seconds, report = read_numbers(path)
    assert frames == [(10.0 * index, index) for index in range(8)] and seconds == 80.0 and not report


def remux(source, target, *, dts_only=False, **options):
    """Copy the packets of a video, with another container's options, or without presentation times."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if dts_only:
                packet.time_base, packet.pts, packet.dts, packet.duration = Fraction(1, 10), index, index, 1
            packet.stream = stream
            new.mux(packet)
    return target


def test_b_frames_without_presentation_times_are_evenly_spaced(tmp_path):
    """AVI stores no presentation times."""
    clip = write_clip(tmp_path / "clip.ts", numbered(30), bf="3")
    frames, _, report = read_numbers(remux(clip, tmp_path / "clip.avi", dts_only=True))
    assert [number for _, number in frames] == list(range(30)) and not report
    assert np.diff([time for time, _ in frames]) == pytest.approx(np.full(29, 0.1), abs=1e-3)


@pytest.mark.parametrize(
    ("ending", "codec"), [("mkv", "libx264"), ("webm", "libvpx"), ("mp4", "libx264"), ("avi", "libx264")]
)
def test_what_a_truncated_file_lacks_is_counted(tmp_path, ending, codec):
    pictures = np.concatenate([random_frames(1, size=(64, 96), seed=index) for index in range(40)])
    clip = write_clip(tmp_path / f"clip.{ending}", pictures, codec=codec)
    path = remux(clip, tmp_path / f"index_first.{ending}", movflags="faststart") if ending == "mp4" else clip
    assert not read_numbers(path)[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, seconds, report = read_numbers(path)
    assert 15 < len(frames) < 25 and seconds == pytest.approx(frames[-1][0] + 0.1, abs=0.11)
    assert report.missing_seconds == pytest.approx(4.0 - seconds, abs=0.2)
    assert checked(path).missing_seconds == pytest.approx(report.missing_seconds, abs=0.2)


@pytest.mark.parametrize("count", [0, 2**30])
def test_an_avi_whose_program_did_not_know_its_length_lacks_nothing(tmp_path, count):
    path = write_clip(tmp_path / "clip.avi", numbered(20), codec="mpeg4")
    content = bytearray(path.read_bytes())
    at = content.index(b"strh") + 8 + 32
    assert content[at : at + 4] == (20).to_bytes(4, "little")
    content[at : at + 4] = count.to_bytes(4, "little")
    path.write_bytes(content)
    frames, _, report = read_numbers(path)
    assert len(frames) == 20 and not report and not checked(path)


def checked(path):
    """Return what a check without frames counts."""
    with VideoReader(path) as reader:
        reader.check_file()
        return reader.report


def without_first(source, target, count, *, delay=0, **options):
    """Copy a video without its first packets, with times that are `delay` seconds later."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.size][count:]:
            packet.stream = stream
            if delay:
                packet.pts += int(delay / packet.time_base)
                packet.dts = None
            new.mux(packet)
    return target


@pytest.mark.parametrize(
    ("ending", "codec"), [*((ending, "libx264") for ending in ("ts", "mkv", "mp4", "flv", "h264")), ("webm", "libvpx")]
)
def test_seconds_before_the_first_key_frame_are_missing(tmp_path, ending, codec):
    """A recording of a broadcast begins anywhere in a group of pictures."""
    fps = 25 if ending == "h264" else 10
    options = {"g": "20", "sc_threshold": "0", "bf": "2" if ending in ("ts", "mkv") else "0"}
    whole = write_clip(tmp_path / f"whole.{ending}", numbered(40), fps=fps, codec=codec, **options)
    assert not read_numbers(whole)[2] and not checked(whole)
    path = without_first(whole, tmp_path / f"clip.{ending}", 5)
    frames, seconds, report = read_numbers(path)
    assert [number for _, number in frames] == list(range(20, 40))
    lost = frames[0][0]
    assert lost == pytest.approx(15 / fps, abs=1.01 / fps) and seconds == pytest.approx(lost + 20 / fps, abs=0.002)
    assert report.missing_seconds == checked(path).missing_seconds == pytest.approx(lost, abs=0.006)
    report = ReadingReport()
    assert numbers(read_video(path, fps=fps, start=10 / fps, report=report))[:5] == [20] * 5
    assert report.missing_seconds == pytest.approx(lost - 10 / fps, abs=0.006)
    report = ReadingReport()
    assert numbers(read_video(path, fps=fps, start=24 / fps, report=report))[0] in (28, 29, 30)
    assert report.missing_seconds == 0


def test_what_is_decoded_before_the_first_key_frame_or_rightly_left_out_is_not_missing(tmp_path, monkeypatch):
    quick = {"sc_threshold": "0", "keyint_min": "10"}
    # B-frames behind the first key frame, which follow a picture before it.
    opened = write_clip(tmp_path / "open.ts", numbered(40), tune="grain", **{"x264-params": "open-gop=1:keyint=10"})
    with av.open(str(opened)) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    paths = [without_first(opened, tmp_path / "cut.ts", keys[1])]
    # Columns of the picture are renewed in turn.
    paths += [write_clip(tmp_path / "columns.ts", numbered(40), **{"x264-params": "intra-refresh=1:keyint=10"})]
    # The decoder shows what it has.
    whole = write_clip(tmp_path / "whole.mp4", numbered(40), codec="mpeg4", g="10", **quick)
    paths += [without_first(whole, tmp_path / "cut.mp4", 5)]
    for path in paths:
        assert len(read_numbers(path)[0]) > 25 and not read_numbers(path)[2] and not checked(path)
    # A camera or a broadcast is joined anywhere.
    whole = write_clip(tmp_path / "whole.ts", numbered(40), g="20", sc_threshold="0")
    with without_first(whole, tmp_path / "live.ts", 5).open("rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        assert not read_numbers("-")[2]


@pytest.mark.parametrize(("count", "delay"), [(1, 0), (3, 0), (20, 5)])
@pytest.mark.parametrize("kind", ["mkv", "mkv without lengths of streams", "nut"])
def test_the_length_of_a_file_is_not_that_of_its_picture(tmp_path, kind, count, delay):
    """A still picture beside sound, and a video with a clock that begins late."""
    path = tmp_path / f"clip.{kind[:3]}"
    with av.open(str(path), "w") as container:
        stream, sound = container.add_stream("libx264", rate=10), container.add_stream("pcm_s16le", rate=8000)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        sound.layout = "mono"
        for index, picture in enumerate(numbered(count)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index + 10 * delay
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for second in range(delay, delay + 4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, 8000 * second
            container.mux(sound.encode(frame))
    if "without" in kind:
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"SOMETAGS"))
    frames, seconds, report = read_numbers(path)
    assert len(frames) == count and seconds == pytest.approx(count / 10, abs=0.01)
    assert not report and not checked(path)


def test_a_matroska_file_with_a_clock_that_begins_late_lacks_nothing(tmp_path):
    times = [5 + index / 10 for index in range(20)]
    path = write_clip(tmp_path / "clip.mkv", numbered(20), times=times)
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"SOMETAGS"))
    assert len(read_numbers(path)[0]) == 20 and not read_numbers(path)[2] and not checked(path)


@pytest.mark.parametrize("bf", ["0", "2"])
def test_first_packets_without_times_come_before_the_others(tmp_path, bf):
    """FFmpeg reads no negative times of Matroska."""
    whole = write_clip(tmp_path / "whole.mkv", numbered(40), g="10", bf=bf, sc_threshold="0")
    path = without_first(whole, tmp_path / "clip.mkv", 0, delay=-1, avoid_negative_ts="disabled")
    frames, seconds, report = read_numbers(path)
    assert frames == [(pytest.approx(number / 10, abs=0.002), number) for number in range(40)]
    assert seconds == pytest.approx(4.0, abs=0.002) and not report and not checked(path)
    for start in (0.1, 0.8, 1.3, 2.5):
        assert numbers(read_video(path, fps=10, start=start))[0] == round(10 * start)


@pytest.mark.parametrize(("codec", "bf"), [("libx264", "0"), ("libx264", "2"), ("mpeg4", "2")])
def test_the_length_of_an_avi_is_the_end_of_its_last_frame(tmp_path, codec, bf):
    """Frames come later by those that the decoder holds."""
    path = write_clip(tmp_path / "clip.avi", numbered(20), codec=codec, bf=bf)
    frames, seconds, report = read_numbers(path)
    assert len(frames) == 20 and seconds == pytest.approx(frames[-1][0] + 0.1) and not report and not checked(path)
    assert len(list(read_video(path, fps=10))) == round(10 * seconds)


@pytest.mark.parametrize(("ending", "codec"), [("mkv", "libx264"), ("webm", "libvpx"), ("ts", "libx264")])
def test_gaps_between_frames_are_counted(tmp_path, ending, codec):
    """Frames 10 to 19 are not there, as where a cluster is missing. A frame that is shown for long is no gap."""
    options = {"keyint_min": "10", "g": "10"}
    source = write_clip(tmp_path / f"source.{ending}", numbered(40), codec=codec, **options)
    path = tmp_path / f"gap.{ending}"
    assert not read_numbers(source)[2]
    with av.open(str(source)) as container, av.open(str(path), "w") as target:
        first = container.streams.video[0]
        stream = target.add_stream_from_template(first)
        for packet in container.demux(first):
            at = 0 if packet.pts is None else packet.pts * packet.time_base - (first.start_time or 0) * first.time_base
            packet.stream = stream
            target.mux([packet] if packet.size and not 0.95 < at < 1.95 else [])
    frames, seconds, report = read_numbers(path)
    assert len(frames) == 30 and seconds == pytest.approx(4.0, abs=0.05)
    assert report.to_dict()["gap_seconds"] == pytest.approx(1.0, abs=0.05)
    assert str(report) == "In gaps of 1.0 s there is no frame, and the last one stays."
    # Matroska tells its length at its end, so not all packets are read.
    assert checked(path).gap_seconds == (report.gap_seconds if ending == "ts" else 0)


@pytest.mark.parametrize(("num_empty", "gap"), [(1, 0.0), (4, 0.0), (8, 0.8)])
def test_an_empty_chunk_of_an_avi_is_the_frame_before(tmp_path, num_empty, gap):
    """FFmpeg writes empty chunks where a video has a variable frame rate, as other programs do at dropped frames."""
    path = tmp_path / "gap.avi"
    source = write_clip(tmp_path / "full.avi", numbered(30), codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            packet.stream = stream
            new.mux([] if 10 <= index < 10 + num_empty else [packet])
    content = path.read_bytes()
    assert content.count(b"00dc\0\0\0\0", content.index(b"movi"), content.rindex(b"idx1")) == num_empty
    frames, seconds, report = read_numbers(path)
    left = [*range(10), *range(10 + num_empty, 30)]
    assert frames == [(pytest.approx(number / 10), number) for number in left] and seconds == pytest.approx(3.0)
    assert report.gap_seconds == pytest.approx(gap) and bool(report) == (gap > 0)


def test_frames_that_are_shown_for_long_are_no_gap(tmp_path):
    times = [0.0, 0.1, 3.0, 3.1, 5.0, 5.1, 9.0, 9.1]
    for bf in ("0", "2"):
        path = write_clip(tmp_path / "clip.mp4", numbered(8), times=times, bf=bf, tune="animation")
        assert not read_numbers(path)[2]


BREAKING_OFF = {
    "gif": ("gif", {"codec": "gif", "pix_fmt": "rgb8"}, {}),
    "ogg": ("ogv", {"codec": "libvpx"}, {}),
    "as browsers record": ("webm", {"codec": "libvpx"}, {"live": "1"}),
    "without a length": ("mkv", {}, {"live": "1", "cluster_time_limit": "500"}),
    "a short part is missing": ("webm", {"codec": "libvpx"}, {}),
    "a short part of an mp4 is missing": ("mp4", {}, {"movflags": "faststart"}),
}


def without_lengths(content):
    """Return a WebM file in which the lengths of clusters are unknown, as browsers record it."""
    name, (head, *clusters) = b"\x1f\x43\xb6\x75", content.split(b"\x1f\x43\xb6\x75")
    widths = [9 - cluster[0].bit_length() for cluster in clusters]
    unknown = [(2 ** (7 * width + 1) - 1).to_bytes(width, "big") for width in widths]
    parts = zip(unknown, clusters, widths, strict=True)
    return name.join([head, *(ones + cluster[width:] for ones, cluster, width in parts)])


@pytest.mark.parametrize("kind", BREAKING_OFF)
def test_files_that_break_off_without_saying_how_much_is_missing_are_counted(tmp_path, kind):
    ending, codec, options = BREAKING_OFF[kind]
    pictures = np.concatenate([random_frames(1, size=(64, 96), seed=index) for index in range(40)])
    path = remux(write_clip(tmp_path / f"clip.{ending}", pictures, **codec), tmp_path / f"a.{ending}", **options)
    content, share = path.read_bytes(), 0.8 if "short" in kind else 0.6
    content = without_lengths(content) if "browsers" in kind else content
    path.write_bytes(content)
    assert len(read_numbers(path)[0]) == 40 and not read_numbers(path)[2]
    path.write_bytes(content + content)
    assert read_numbers(path)[2].cut_ends == 0
    path.write_bytes(content[: int(share * len(content))])
    frames, _, report = read_numbers(path)
    assert 20 < len(frames) < 36 and report.cut_ends == 1 and "1 cut end." in str(report)
    assert report.missing_seconds == report.gap_seconds == 0


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_hole_behind_which_nothing_is_read_is_a_cut_end(tmp_path, ending):
    codec = {"codec": "gif", "pix_fmt": "rgb8"} if ending == "gif" else {"g": "10"}
    pictures = np.concatenate([random_frames(1, size=(64, 96), seed=index) for index in range(40)])
    path = write_clip(tmp_path / f"clip.{ending}", pictures, **codec)
    options = {"movflags": "frag_keyframe+empty_moov"} if ending == "mp4" else {}
    path = remux(path, tmp_path / f"a.{ending}", **options)
    content = path.read_bytes()
    assert len(read_numbers(path)[0]) == 40 and not read_numbers(path)[2]
    if ending == "gif":
        path.write_bytes(content[:-1] + bytes(3) + content[-1:])  # zeros between blocks
        assert len(read_numbers(path)[0]) == 40 and not read_numbers(path)[2]
    middle = len(content) // 2
    path.write_bytes(content[:middle] + content[middle + 100 :])
    frames, _, report = read_numbers(path)
    assert 5 < len(frames) < 30 and report.cut_ends == 1


def test_damage_that_ends_the_last_cluster_is_a_cut_end(tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", random_frames(20, size=(64, 96)))
    content = clip.read_bytes()
    path = tmp_path / "spoilt.mkv"
    path.write_bytes(content[: len(content) * 2 // 3] + bytes(1000) + content[len(content) * 2 // 3 + 1500 :])
    assert len(read_numbers(path)[0]) < 20 and read_numbers(path)[2].cut_ends == 1
    path.write_bytes(content[:-1])
    assert read_numbers(path)[2].cut_ends == 1


def write_with_sound(path, codecs, *, cluster_seconds, has_lengths=True):
    """Write 40 frames in 4 s with sound."""
    options = {"g": str(10 * cluster_seconds), "keyint_min": "10", "crf": "20", "bf": "0", "sc_threshold": "0"}
    options |= {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}
    live = {"cluster_time_limit": str(1000 * cluster_seconds)} | ({} if has_lengths else {"live": "1"})
    with av.open(str(path), "w", options=live) as container:
        stream, sound = container.add_stream(codecs[0], rate=10), container.add_stream(codecs[1], rate=48000)
        stream.height, stream.width, stream.pix_fmt, stream.options = 64, 96, "yuv420p", options
        sound.layout, sound.options = "stereo", {"strict": "-2"}
        for index in range(40):
            picture = random_frames(1, size=(64, 96), seed=index)[0]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.int16), format="s16", layout="stereo")
            samples.sample_rate, samples.pts = 48000, 4800 * index
            container.mux(sound.encode(samples))
        container.mux(stream.encode() + sound.encode())
    path.write_bytes(path.read_bytes() if has_lengths else without_lengths(path.read_bytes()))
    return path


SOUNDS = [("webm", "libvpx", "libopus"), ("webm", "libvpx-vp9", "vorbis"), ("mkv", "libx264", "aac")]


@pytest.mark.parametrize("has_lengths", [True, False])
@pytest.mark.parametrize("kind", SOUNDS)
def test_a_torn_cluster_beside_sound_is_counted_however_short_the_gap(tmp_path, kind, has_lengths):
    """FFmpeg goes on with the next cluster, so that frames are lost from the damage to there."""
    path = write_with_sound(tmp_path / f"clip.{kind[0]}", kind[1:], cluster_seconds=1, has_lengths=has_lengths)
    content = path.read_bytes()
    whole, _, report = read_numbers(path)
    assert len(whole) == 40 and not report
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    for index in (6, 8, 17, 27):
        # From the middle of one frame's packet to behind the header of the next.
        begin = (positions[index] + positions[index + 1]) // 2
        path.write_bytes(
            content[:begin] + bytes(positions[index + 1] + 8 - begin) + content[positions[index + 1] + 8 :]
        )
        frames, _, report = read_numbers(path)
        assert 30 <= len(frames) < 40 and report.spoilt_packets >= 1 and report.cut_ends == report.missing_seconds == 0


@pytest.mark.parametrize("kind", SOUNDS)
def test_seconds_that_a_torn_last_cluster_lacks_beside_sound_are_counted(tmp_path, kind):
    path = write_with_sound(tmp_path / f"clip.{kind[0]}", kind[1:], cluster_seconds=2)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    begin = (positions[22] + positions[23]) // 2
    content[begin : positions[23] + 8] = bytes(positions[23] + 8 - begin)
    path.write_bytes(content)
    frames, _, report = read_numbers(path)
    assert 20 <= len(frames) <= 24 and report.cut_ends == 0
    assert report.missing_seconds == pytest.approx(3.9 - frames[-1][0], abs=0.11)


def test_torn_places_of_a_file_that_is_made_to_take_long_are_not_all_looked_for(tmp_path):
    path = tmp_path / "clip.mkv"
    path.write_bytes(b"\x1f\x43\xb6\x75\0" * 20_000)
    assert count_torn(str(path), "matroska,webm") == (1000, False)


def test_a_fragmented_mp4_behind_a_plain_one_is_refused_by_name(tmp_path):
    plain = write_clip(tmp_path / "plain.mp4", numbered(10))
    fragmented = remux(plain, tmp_path / "fragmented.mp4", movflags="cmaf")
    path = tmp_path / "joined.mp4"
    path.write_bytes(plain.read_bytes() + fragmented.read_bytes())
    with pytest.raises(ValueError, match="as video: a fragmented mp4 is joined behind a plain one"):
        VideoReader(path)


def test_a_recording_of_a_browser_that_ends_between_two_pictures_is_complete(tmp_path):
    clip = write_clip(tmp_path / "clip.webm", numbered(20), codec="libvpx")
    path = remux(clip, tmp_path / "live.webm", live="1")
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    # Before the bytes of a block stand its name, 0xa3, and its length.
    path.write_bytes(without_lengths(content)[: content.rindex(b"\xa3", 0, positions[10])])
    frames, _, report = read_numbers(path)
    assert len(frames) == 10 and not report


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("mov", "libx264"), ("flv", "flv")])
def test_files_that_are_joined_behind_a_file_are_counted(tmp_path, ending, codec):
    parts = [write_clip(tmp_path / f"{i}.{ending}", numbered(30)[15 * i :][:15], codec=codec) for i in range(2)]
    assert not read_numbers(parts[0])[2]
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, _, report = read_numbers(path)
    assert len(frames) == 15 and str(report) == "1 other video stream was not read."
    path.write_bytes(path.read_bytes() + parts[0].read_bytes())
    assert read_numbers(path)[2].ignored_streams == 2


@pytest.mark.parametrize("counts", [(20, 30), (30, 20), (10, 20, 20)])
@pytest.mark.parametrize("movflags", ["cmaf", "frag_keyframe+empty_moov+default_base_moof"])
def test_all_of_joined_fragmented_files_is_read(tmp_path, counts, movflags):
    """FFmpeg hides frames of later files, and seeks to a place in the last one, as their clocks begin again."""
    parts, pictures = [], iter(numbered(50))
    for index, count in enumerate(counts):
        clip = write_clip(tmp_path / f"{index}.mp4", np.stack([*islice(pictures, count)]), g="10", sc_threshold="0")
        parts.append(remux(clip, tmp_path / f"f{index}.mp4", movflags=movflags).read_bytes())
    path = tmp_path / "joined.mp4"
    path.write_bytes(b"".join(parts))
    frames, seconds, report = read_numbers(path)
    assert frames == [(pytest.approx(number / 10), number) for number in range(50)] and seconds == pytest.approx(5.0)
    assert str(report) == f"The source is not in order: {len(counts) - 1} mended time{'s' * (len(counts) > 2)}."
    for start in (0.5, 1.5, 2.5, 4.5):
        assert numbers(read_video(path, fps=10, start=start)) == list(range(round(10 * start), 50))


def test_time_goes_on_in_joined_matroska_files_with_b_frames(tmp_path):
    pictures = numbered(40)
    parts = [write_clip(tmp_path / f"{i}.mkv", pictures[20 * i :][:20], bf="2").read_bytes() for i in range(2)]
    path = tmp_path / "joined.mkv"
    path.write_bytes(b"".join(parts))
    frames, seconds, _ = read_numbers(path)
    assert [number for _, number in frames] == list(range(40))
    assert all(abs(10 * time - number) < 3 for time, number in frames) and seconds == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize(
    ("ending", "reordered"), [("ts", (2, 2)), ("ts", (2, 0)), ("ts", (0, 2)), ("mkv", (2, 2)), ("mkv", (0, 0))]
)
def test_joined_videos_go_on_where_the_last_picture_ends(tmp_path, ending, reordered):
    """The parts are encoded with and without pictures that are decoded before those that they follow."""
    parts = []
    for index, count in enumerate(reordered):
        options = {"x264-params": f"bframes={count}:b-adapt=0:rc-lookahead=4:keyint=10"}
        path = write_clip(tmp_path / f"{index}.{ending}", numbered(40)[20 * index :][:20], tune="grain", **options)
        parts.append(path.read_bytes())
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(b"".join(parts))
    frames, seconds, report = read_numbers(path)
    assert [number for _, number in frames] == list(range(40)) and report.to_dict()["mended_times"] == 1
    assert [time for time, _ in frames] == pytest.approx([number / 10 for number in range(40)], abs=0.002)
    assert seconds == pytest.approx(4.0, abs=0.002)


def test_headers_of_joined_ogg_files_are_no_spoilt_packets(tmp_path):
    path = write_clip(tmp_path / "one.ogv", numbered(20), codec="libvpx", deadline="realtime")
    path.write_bytes(2 * path.read_bytes())
    frames, seconds, report = read_numbers(path)
    assert [time for time, _ in frames] == pytest.approx([index / 10 for index in range(40)], abs=0.002)
    assert seconds == pytest.approx(4.0) and (report.spoilt_packets, report.mended_times) == (0, 1)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "2024-01-26T20:57:04.mp4",
            "camera:0.mp4",
            "http:x.mp4",
            "file:x.mp4",
            "rtsp:x.mp4",
            "concat:a|b.mp4",
            "-dash.mp4",
            "%d.mp4",
        ),
        *(
            "100%.mp4",
            "img%03d.png",
            "name[1].mp4",
            "*.png",
            "a b'c\"d.mp4",
            "видео.mp4",
            "new\nline.mp4",
            "UPPER.MP4",
        ),
    ],
)
def test_any_name_is_a_file(tmp_path, monkeypatch, name):
    """FFmpeg takes a colon for a protocol, and a sign for a pattern of names."""
    monkeypatch.chdir(tmp_path)
    if name.endswith("png"):
        Image.fromarray(numbered(1)[0]).save("still.png")
        Path("still.png").rename(name)
    else:
        write_clip(Path("clip.mp4"), numbered(4)).rename(name)
    for video in (name, Path(name), tmp_path / name):
        assert len(list(read_video(video, fps=10))) == (1 if name.endswith("png") else 4)


@pytest.mark.parametrize("audio_seconds", [1, 9])
@pytest.mark.parametrize(
    ("ending", "codecs"), [("mkv", "libx264 aac"), ("webm", "libvpx libopus"), ("mp4", "libx264 aac")]
)
def test_the_length_is_that_of_the_picture(tmp_path, ending, codecs, audio_seconds):
    """Matroska states one length for all streams, and a recording of a browser none."""
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w", options={"live": "1"} if ending == "webm" else {}) as container:
        stream = container.add_stream(codecs.split()[0], rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream(codecs.split()[1], rate=48000, layout="mono")
        for picture in numbered(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        silence = np.zeros((1, 48000), np.float32)
        for second in range(audio_seconds):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp" if ending != "webm" else "flt", layout="mono")
            frame.sample_rate, frame.pts = 48000, 48000 * second
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    frames, seconds, report = read_numbers(path)
    assert len(frames) == 30 and seconds == pytest.approx(3.0, abs=0.05) and not report
    assert len(list(read_video(path, fps=2))) == 6


@pytest.mark.parametrize("ending", ["mkv", "mp4", "ts"])
def test_a_picture_that_begins_later_than_the_sound(tmp_path, ending):
    """The container's clock counts, so that sound and captions stay in step."""
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=48000, layout="mono")
        for second in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, 48000 * second
            container.mux(sound.encode(frame))
        for index, picture in enumerate(numbered(20)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = 20 + index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode() + sound.encode())
    frames, seconds, report = read_numbers(path)
    assert frames[0] == (pytest.approx(2.0, abs=0.05), 0) and seconds == pytest.approx(4.0, abs=0.05) and not report
    assert numbers(read_video(path, fps=2, end=3.9)) == pytest.approx([0, 0, 0, 0, 0, 5, 10, 15], abs=1)


# FFmpeg's number, and the weights of red and blue, of BT.709, BT.601 and BT.2020.
@pytest.mark.parametrize(
    "space,red,blue", [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593)], ids=["bt709", "bt601", "bt2020"]
)
@pytest.mark.parametrize("full", [False, True])
def test_colors_follow_the_tags_of_the_stream(tmp_path, space, red, blue, full):
    """The standards' formulas write the file: PyAV 17 does not write BT.2020."""
    path, color = tmp_path / "clip.mp4", np.array([200, 40, 60])
    luma = np.array([red, 1 - red - blue, blue]) @ color
    coded = np.array([luma, (color[2] - luma) / (2 - 2 * blue), (color[0] - luma) / (2 - 2 * red)])
    coded = coded * (1 if full else np.array([219, 224, 224]) / 255) + np.array([0 if full else 16, 128, 128])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1
        for index in range(4):
            planes = np.full((3, 64, 64), coded.round()[:, None, None], np.uint8)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            frame.colorspace, frame.color_range = space, 2 if full else 1
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, picture = next(read_video(path))
    assert np.abs(picture.astype(int) - color).max() <= 3


class RangeHandler(QuietHandler):
    """Answers requests for a part of a file, as servers of video do."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        content = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        try:
            self.wfile.write(content[begin:])
        except OSError:
            self.close_connection = True  # the reader seeks elsewhere


def test_a_window_of_a_broadcast_behind_a_url(tmp_path):
    """Its length cannot be measured, so that it may hold several clocks."""
    parts = [write_clip(tmp_path / f"{i}.ts", numbered(48)[24 * i :][:24], g="8").read_bytes() for i in range(2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    handler = functools.partial(RangeHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/joined.ts"
        for start in (0.5, 2.5, 3.2, 4.5):
            assert numbers(read_video(url, fps=10, start=start, end=start + 0.4))[0] == 10 * start
        server.shutdown()
