# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Clips hold exactly the pictures and the sound of the source, from a key frame on."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from tiny import random_frames, write_clip, write_late_stream

from videollm_mod import VideoReader
from videollm_mod.commands.clips import ClipCutter


NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"
B_FRAMES = {"g": "12", "bf": "2", "preset": "medium", "tune": "psnr", "x264-params": "scenecut=0"}


def shown(path):
    """Return times and pictures as a player shows them."""
    with VideoReader(path) as reader:
        return [(float(time), reader.picture(frame)) for time, _, frame in reader.frames()]


def heard(path):
    """Return times and samples of the sound, in seconds of the video."""
    with VideoReader(path) as reader:
        sound = reader.container.streams.best("audio", related=reader.stream)
        frames = reader.container.decode(sound)
        return [(float(frame.time - reader.origin), frame.to_ndarray()) for frame in frames]


def assert_is_part(clip, source):
    """The pictures of a clip are those of the source between its seconds, in order and without a gap."""
    ours, theirs = shown(clip.path), shown(source)
    expected = [(time, picture) for time, picture in theirs if clip.start - 1e-6 <= time < clip.end - 1e-6]
    assert len(ours) == len(expected) > 0
    for (time, picture), (their_time, their_picture) in zip(ours, expected, strict=True):
        assert time == pytest.approx(their_time - clip.start, abs=2e-3)
        np.testing.assert_array_equal(picture, their_picture)
    assert ours[0][0] == 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
@pytest.mark.parametrize("gop", ["closed", "open"])
def test_a_clip_has_the_pictures_of_the_source(tmp_path, suffix, gop):
    options = B_FRAMES | ({"x264-params": "scenecut=0:open-gop=1"} if gop == "open" else {})
    source = write_clip(tmp_path / f"source.{suffix}", random_frames(60), fps=10, **options)
    cutter = ClipCutter(source, tmp_path / "clips")
    keys = [float(cutter.pictures[index].time) for index in cutter.key_frames]
    assert len(keys) >= 4
    for start, end in ((2.0, 3.6), (0.0, 0.5), (4.9, 6.0)):
        clip = cutter.cut(start, end)
        assert clip.path.parent == tmp_path / "clips"
        assert re.fullmatch(rf"source-[0-9a-f]{{8}}_{start:g}s-{end:g}s\.{suffix}", clip.path.name)
        assert clip.start == max(key for key in keys if key <= start + 1e-9)
        assert end - 1e-3 <= clip.end <= end + 0.3
        assert_is_part(clip, source)
    assert [path.name for path in (tmp_path / "clips").iterdir() if path.name.startswith(".")] == []


def test_a_clip_of_another_video_with_the_same_name_stays(tmp_path):
    paths = []
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        source = write_clip(tmp_path / folder / "door.mp4", random_frames(4))
        paths += [ClipCutter(source, tmp_path / "clips").cut(0, 0.4).path for _ in range(2)]
    assert paths[0] == paths[1] and paths[2] == paths[3] != paths[0]
    assert sorted((tmp_path / "clips").iterdir()) == sorted({*paths})


def test_a_clip_has_the_sound_of_the_source(tmp_path):
    cutter = ClipCutter(NASA, tmp_path)
    clip = cutter.cut(6.0, 8.0)
    assert_is_part(clip, NASA)
    whole, part = heard(NASA), heard(clip.path)
    assert 0 <= part[0][0] < 0.07 and clip.end - clip.start - 0.1 < part[-1][0] < clip.end - clip.start
    # It is heard where it was heard. A decoder needs two packets before its samples are those of the source.
    times = {samples.tobytes(): time for time, samples in whole}
    assert len(part) > 60
    for time, samples in part[2:]:
        assert times[samples.tobytes()] - clip.start == pytest.approx(time, abs=2e-3)


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="needs an encoder of HEVC")
@pytest.mark.parametrize("tag", ["hvc1", "hev1"])
def test_a_clip_of_hevc_keeps_its_tag(tmp_path, tag):
    """QuickTime and Safari play hvc1 only."""
    source = tmp_path / "a.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx265", rate=10, options={"x265-params": "log-level=none:keyint=5"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.codec_tag = tag
        for picture in random_frames(10, size=(64, 64)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture))))
        container.mux(stream.encode())
    clip = ClipCutter(source, tmp_path / "clips").cut(0.5, 0.9)
    assert_is_part(clip, source)
    for path in (source, clip.path):
        with VideoReader(path) as reader:
            assert reader.stream.codec_context.codec_tag == tag


def test_what_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--clips needs a video file"):
        ClipCutter("camera:0", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--clips needs a folder to write to, and '.*file' is a file"):
        ClipCutter(NASA, tmp_path / "file")
    clip = write_clip(tmp_path / "clip.webm", random_frames(4), codec="libvpx")
    # A wrong suffix: WebM does not hold this codec.
    wrong = write_clip(tmp_path / "wrong.mp4", random_frames(4)).rename(tmp_path / "wrong.webm")
    with pytest.raises(ValueError, match="--clips cannot cut '.*wrong.webm' without encoding it again"):
        ClipCutter(wrong, tmp_path / "clips")
    assert_is_part(ClipCutter(clip, tmp_path / "clips").cut(0, 0.4), clip)
    assert len(list((tmp_path / "clips").iterdir())) == 1
    twice = tmp_path / "twice.ts"
    part = write_clip(tmp_path / "part.ts", random_frames(20)).read_bytes()
    twice.write_bytes(part + part)
    with pytest.raises(ValueError, match="--clips cannot cut '.*twice.ts': its clock changes"):
        ClipCutter(twice, tmp_path / "clips")


def test_a_rotated_video_stays_upright(tmp_path):
    source = tmp_path / "turned.mp4"
    write_clip(tmp_path / "plain.mp4", random_frames(10, size=(32, 64)))
    with av.open(str(tmp_path / "plain.mp4")) as plain, av.open(str(source), "w") as target:
        stream = target.add_stream_from_template(plain.streams.video[0])
        # The reader's tests turn pictures without this method, so another PyAV still proves that videos are upright.
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a rotation")
        stream.set_display_rotation(90)
        for packet in plain.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    clip = ClipCutter(source, tmp_path / "clips").cut(0, 0.5)
    assert shown(clip.path)[0][1].shape == shown(source)[0][1].shape == (64, 32, 3)


@pytest.mark.parametrize("options", [{"g": "10", "bf": "0", "x264-params": "scenecut=0"}, B_FRAMES], ids=["P", "B"])
@pytest.mark.parametrize("suffix", ["mp4", "qt"])
def test_what_was_trimmed_away_is_not_shown(tmp_path, suffix, options):
    """As after `ffmpeg -ss 0.5 -i source.mp4 -c copy`: pictures before second 0 are there for those that need them."""
    source, trimmed = (
        write_clip(tmp_path / "source.mp4", random_frames(40), fps=10, **options),
        tmp_path / f"a.{suffix}",
    )
    with av.open(str(source)) as whole, av.open(str(trimmed), "w", format="mov") as target:
        stream = target.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                for name in ("pts", "dts"):
                    setattr(packet, name, getattr(packet, name) - round(0.5 / packet.time_base))
                packet.stream = stream
                target.mux(packet)
    cutter = ClipCutter(trimmed, tmp_path / "clips")
    for start, end in ((0.0, 0.1), (0.0, 1.2), (0.9, 2.0), (3.0, 3.5)):
        clip = cutter.cut(start, end)
        assert 0 <= clip.start <= start and clip.end >= end - 1e-3
        assert_is_part(clip, trimmed)


def test_a_stream_that_begins_in_the_middle_is_no_fault(tmp_path):
    """Only the pictures that a player shows are cut, and the other stream begins when they end."""
    source = write_late_stream(tmp_path / "source.ts", random_frames(45))
    assert_is_part(ClipCutter(source, tmp_path / "clips").cut(0.0, 9.0), source)
