# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Videos with captions: every frame and packet of sound at its own time, sizes, colors, and damaged sources."""

import struct
from fractions import Fraction
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import av
import captions
import numpy as np
import pytest
import video_writing
from tiny import write_clip

from videollm_mod.video_reading_videollm_mod import VideoReader


# Seconds of the pictures, as a telephone and a recording of a screen write them.
PHONE = [index / 30 + 0.006 * np.sin(1.7 * index) * (index > 0) for index in range(60) if index % 17]
SCREEN = [burst + index / 30 for burst in (0, 5, 10) for index in range(8)]


def said(time=0.0, text="A red ball enters."):
    return SimpleNamespace(time=time, role="assistant", text=text)


def ramp(count, height=48, width=64):
    """Return pictures of which each is a little lighter than the one before."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 4 + 20, height * width * 3).reshape(count, height, width, 3)


def packed(array, time, ticks=90_000):
    frame = av.VideoFrame.from_ndarray(array, format="rgb24")
    frame.pts, frame.time_base = round(time * ticks), Fraction(1, ticks)
    return frame


def write(
    path,
    times,
    sound=(),
    *,
    format=None,
    codec="libx264",
    offset=0.0,
    size=(48, 64),
    end=None,
    rate=48_000,
    samples=1024,
):
    """Write pictures at `times`, and a tone from 0 to `end` for each codec in `sound`, all later by `offset`."""
    with av.open(str(path), "w", format=format, options={"muxpreload": "0", "muxdelay": "0"}) as target:
        stream = target.add_stream(codec, rate=30)
        # An AVI has no presentation times.
        stream.options = {"bf": "0"} if path.suffix == ".avi" else {}
        stream.height, stream.width = size
        stream.codec_context.time_base = Fraction(1, 90_000)
        tones = [target.add_stream(name, rate=rate) for name in sound]
        for tone in tones:
            tone.bit_rate = 128_000
        for index, time in enumerate(times):
            target.mux(stream.encode(packed(ramp(1, *size)[0] + 3 * (index % 60), time + offset)))
        target.mux(stream.encode())
        for tone in tones:
            target.mux(list(encode_tone(tone, offset, times[-1] if end is None else end, samples)))
    return path


def encode_tone(stream, offset, end, samples):
    wave = np.sin(np.arange(round(48_000 * end)) * 2 * np.pi * 440 / 48_000) * 8000
    for at in range(0, len(wave), samples):
        part = np.repeat(wave[None, at : at + samples].astype(np.int16), 2, axis=1)
        frame = av.AudioFrame.from_ndarray(part, format="s16", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), at + round(48_000 * offset)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def times_of(path):
    """Return the times of the pictures in a written file, in seconds of the file."""
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def packets_of(path):
    """Return time on the reader's clock and content of each packet of sound."""
    with VideoReader(path) as reader:
        heard = reader.container.streams.best("audio")
        origin = reader.origin
        return [(float(p.pts * p.time_base - origin), bytes(p)) for p in reader.container.demux(heard) if p.size]


def burn(path, tmp_path, events=(), **options):
    report = captions.burn_in(path, list(events), tmp_path / "out.mp4", **options)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "nothing temporary is left"
    return tmp_path / "out.mp4", report


def shown(path):
    with VideoReader(path) as reader:
        return [reader.picture(frame) for _, _, frame in reader.frames()]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "film.mp4").write_text("old")
    (tmp_path / "out.mp4").symlink_to("disk/film.mp4")
    out, _ = burn(write(tmp_path / "in.mp4", [0, 0.1]), tmp_path)
    assert out.is_symlink() and len(shown(tmp_path / "disk" / "film.mp4")) == 2
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["film.mp4"]


# --------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("times", [PHONE, SCREEN, [0, 0.1, 0.2, 3.0, 3.1, 4.9], [0, 10, 20]])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_every_frame_is_written_at_its_own_time(tmp_path, times, container):
    source = write(tmp_path / f"in.{container}", times)
    with VideoReader(source) as reader:
        read, seconds = [time for time, _, _ in reader.frames()], reader.seconds
    out, report = burn(source, tmp_path, [said()])
    assert times_of(out) == read and not report
    with VideoReader(out) as reader, av.open(str(out)) as opened:
        assert reader.seconds == pytest.approx(seconds, abs=0.02)
        assert opened.duration / 1e6 == pytest.approx(seconds, abs=0.02), "players show this length"


def test_a_source_that_begins_late_is_written_from_0(tmp_path):
    source = write(tmp_path / "in.ts", [index / 10 for index in range(20)], ("aac",), offset=36_000)
    out, report = burn(source, tmp_path)
    with VideoReader(source) as reader:
        assert times_of(out) == [time for time, _, _ in reader.frames()]
    assert max(times_of(out)) < 3 and not report
    with av.open(str(out)) as opened:
        assert opened.start_time == 0 and opened.duration < 3e6


def test_times_that_do_not_rise_are_moved_apart(tmp_path):
    class Equal(VideoReader):
        def frames(self, start=0.0):
            return ((Fraction(0), *rest) for _, *rest in super().frames(start))

    source = write(tmp_path / "in.mp4", [0, 0.1, 0.2, 0.3])
    out, _ = burn(source, tmp_path, open_video=Equal)
    assert len(times_of(out)) == 4 and all(a < b for a, b in pairwise(times_of(out)))


def test_one_frame_has_its_duration(tmp_path):
    out, _ = burn(write(tmp_path / "in.mp4", [0]), tmp_path, [said()])
    assert times_of(out) == [0]
    with av.open(str(out)) as opened:
        assert opened.duration > 0


def test_captions_between_two_frames_of_a_slide_show_are_shown(tmp_path):
    source = write(tmp_path / "in.mp4", [0, 10, 20])
    first, second, _ = shown(burn(source, tmp_path, [said(3.0), said(11.0)])[0])
    assert first[-60:].std() > 20 and second[-60:].std() > 20


# --------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "aac"), ("ts", "aac"), ("mkv", "aac"), ("mkv", "flac"), ("ts", "ac3"), ("mov", "alac")],
)
def test_packets_of_sound_are_copied_at_their_times(tmp_path, container, codec):
    source = write(tmp_path / f"in.{container}", SCREEN, (codec,), offset=5.0 if container == "ts" else 0.0)
    out, report = burn(source, tmp_path)
    before, after = packets_of(source), packets_of(out)
    assert len(before) == len(after) > 100 and not report
    # The header that a transport stream adds to each packet is not part of the sound.
    assert all(a.endswith(b) for (_, a), (_, b) in zip(before, after, strict=True))
    assert max(abs(a - b) for (a, _), (b, _) in zip(before, after, strict=True)) < 0.001


@pytest.mark.parametrize(("container", "codec"), [("mov", "pcm_s16le"), ("ts", "mp2"), ("avi", "pcm_s16le")])
def test_sound_that_an_mp4_does_not_hold_is_encoded(tmp_path, container, codec):
    source = write(tmp_path / f"in.{container}", [index / 30 for index in range(60)], (codec,))
    out, report = burn(source, tmp_path)
    assert report.encoded_audio == codec and f"does not hold {codec}" in str(report)
    with av.open(str(out)) as opened:
        assert opened.streams.audio[0].codec_context.name == "aac"
    before, after = packets_of(source), packets_of(out)
    assert after[-1][0] == pytest.approx(before[-1][0], abs=0.05)


def test_sound_whose_end_has_no_time_is_encoded(tmp_path):
    """The decoder returns the last frame of Windows Media Audio after the packets, without a time."""
    out, report = burn(write(tmp_path / "in.wmv", [index / 30 for index in range(60)], ("wmav2",)), tmp_path)
    sound = [time for time, _ in packets_of(out)]
    assert report.encoded_audio == "wmav2" and sound[-1] == pytest.approx(2.0, abs=0.05)
    assert max(b - a for a, b in pairwise(sound)) < 0.03


def test_short_packets_of_sound_stay(tmp_path):
    """Matroska rounds their times to milliseconds, so that two may have the same."""
    source = write(tmp_path / "in.mkv", [index / 30 for index in range(30)], ("pcm_s16le",), samples=32)
    out, report = burn(source, tmp_path)
    assert report.encoded_audio == "pcm_s16le" and report.cut_audio_packets == 0
    assert packets_of(out)[-1][0] == pytest.approx(packets_of(source)[-1][0], abs=0.05)


def test_sound_longer_than_the_picture_stays_and_further_streams_are_counted(tmp_path):
    source = write(tmp_path / "in.mkv", [0, 0.1, 0.2], ("aac", "aac"), end=4.0)
    out, report = burn(source, tmp_path)
    assert packets_of(out)[-1][0] == pytest.approx(4.0, abs=0.05)
    assert report.ignored_audio_streams == 1 and str(report) == "Further audio streams left out: 1."
    assert report.to_dict()["ignored_audio_streams"] == 1


def test_sound_before_the_first_picture_stays(tmp_path):
    source = write(tmp_path / "in.mkv", [2.0, 2.1, 2.2], ("aac",), end=2.2)
    out, _ = burn(source, tmp_path)
    with VideoReader(source) as reader, av.open(str(out)) as opened:
        assert times_of(out) == [time for time, _, _ in reader.frames()] and times_of(out)[0] > 1.9
        assert opened.streams.audio[0].start_time <= 0


@pytest.mark.parametrize("offsets", [(0, 0), (0, 7200, 0), (7200, 0)])
def test_sound_follows_a_clock_that_jumps(tmp_path, offsets):
    times, source = [index / 10 for index in range(20)], tmp_path / "joined.ts"
    parts = [write(tmp_path / f"{index}.ts", times, ("aac",), offset=at) for index, at in enumerate(offsets)]
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    out, report = burn(source, tmp_path)
    pictures, sound = times_of(out), [time for time, _ in packets_of(out)]
    with VideoReader(source) as reader:
        assert pictures == [time for time, _, _ in reader.frames()]
    assert len(pictures) == 20 * len(offsets) and max(pictures) < 2.1 * len(offsets)
    assert all(a < b for a, b in pairwise(sound)) and sound[-1] == pytest.approx(float(pictures[-1]), abs=0.2)
    assert max(b - a for a, b in pairwise(sound)) < 0.2, "there is sound in all parts"
    assert len(packets_of(source)) - len(sound) == report.cut_audio_packets < 4 * len(offsets)


@pytest.mark.parametrize("rates", [(24_000, 48_000), (48_000, 22_050, 44_100)])
def test_sound_that_changes_its_sample_rate_is_encoded_at_its_pitch(tmp_path, rates):
    """FFmpeg computes the times of packets of MPEG-TS by the first rate."""
    times, source = [index / 10 for index in range(20)], tmp_path / "joined.ts"
    parts = [write(tmp_path / f"{rate}.ts", times, ("aac",), end=2.0, rate=rate) for rate in rates]
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    out, report = burn(source, tmp_path)
    assert str(report) == "The sound was encoded as AAC, because its format changes."
    pitches = pitches_of(out)
    assert 0 <= len(pitches) - 20 * len(rates) < 3, "no sound is lost"
    # The filter of a resampler begins at the joins.
    assert sum(abs(pitch - 440) > 10 for pitch in pitches) <= len(rates)
    sound = [time for time, _ in packets_of(out)]
    assert max(b - a for a, b in pairwise(sound)) < 0.1


def pitches_of(path):
    """Return the loudest frequency in each tenth of a second of sound."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    parts = [sound[round(rate * at / 10) :][: round(rate / 10)] for at in range(round(10 * len(sound) / rate))]
    return [10 * np.abs(np.fft.rfft(part, round(rate / 10))).argmax() for part in parts]


def test_sound_at_a_wrong_speed_is_counted(tmp_path):
    """FFmpeg does not read the second header of joined Matroska files."""
    times, source = [index / 10 for index in range(20)], tmp_path / "joined.mkv"
    parts = [write(tmp_path / f"{rate}.mkv", times, ("aac",), end=2.0, rate=rate) for rate in (44_100, 48_000)]
    assert not burn(parts[0], tmp_path)[1]
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    report = burn(source, tmp_path)[1]
    assert report.stretched_audio_seconds == pytest.approx(1.6, abs=0.4)
    assert "Sound that plays at a wrong speed, because its sample rate changes" in str(report)


def copy_packets(source, target, *, speed=1, **options):
    """Copy the packets of a video into an mp4, and those of its sound with times as if it were faster."""
    with av.open(str(source), **options) as old, av.open(str(target), "w") as new:
        streams = [new.add_stream_from_template(stream) for stream in old.streams]
        for packet in (packet for packet in old.demux() if packet.size):
            if packet.stream.type == "audio":
                packet.pts, packet.dts = (round(packet.pts / speed) for _ in range(2))
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    return target


@pytest.mark.parametrize("rates", [(44_100, 48_000), (48_000, 24_000, 48_000)])
def test_sound_keeps_its_pitch_where_an_mp4_hides_that_its_sample_rate_changes(tmp_path, rates):
    """FFmpeg keeps the first configuration where it copies AAC of a broadcast. The durations of packets are right."""
    times, names = [index / 10 for index in range(20)], tmp_path / "names.txt"
    for rate in rates:
        write(tmp_path / f"{rate}.ts", times, ("aac",), end=2.0, rate=rate)
    names.write_text("".join(f"file '{tmp_path / f'{rate}.ts'}'\n" for rate in rates))
    source = copy_packets(names, tmp_path / "in.mp4", format="concat", options={"safe": "0"})
    out, report = burn(source, tmp_path)
    assert str(report) == "The sound was encoded as AAC, because its format changes."
    pitches = pitches_of(out)
    assert 0 <= len(pitches) - 20 * len(rates) < 3, "no sound is lost"
    assert sum(abs(pitch - 440) > 10 for pitch in pitches) <= len(rates)


def test_sound_that_was_made_faster_is_copied(tmp_path):
    """Its packets never had the durations of the file's sample rate, so its configuration may be right."""
    whole = write(tmp_path / "whole.ts", [index / 10 for index in range(20)], ("aac",), end=2.0, rate=44_100)
    source = copy_packets(whole, tmp_path / "in.mp4", speed=Fraction(48_000, 44_100))
    out, report = burn(source, tmp_path)
    assert [packet for _, packet in packets_of(out)] == [packet for _, packet in packets_of(source)]
    assert report.stretched_audio_seconds > 1 and not report.encoded_audio


def test_spoilt_packets_of_sound_are_left_out_and_counted(tmp_path):
    source = write(tmp_path / "in.mkv", [index / 30 for index in range(90)], ("flac",))
    data, spoilt = bytearray(source.read_bytes()), packets_of(source)[10:13]
    for _, packet in spoilt:
        at = data.index(packet)
        data[at : at + 40] = bytes(40)
    source.write_bytes(data)
    out, report = burn(source, tmp_path)
    assert report.spoilt_audio_packets == 3 and "Spoilt packets of sound left out: 3." in str(report)
    assert len(packets_of(source)) - len(packets_of(out)) == 3 and len(times_of(out)) == 90


# ---------------------------------------------------------------------------------------------------- sizes and colors


@pytest.mark.parametrize(
    ("size", "written"),
    [((48, 64), (480, 360)), ((46, 62), (486, 360)), ((2, 2), (360, 360)), ((16, 4096), (4096, 360))]
    + [((4096, 16), (160, 4096)), ((720, 1280), (1280, 720)), ((1080, 1920), (1920, 1080))],
)
def test_the_picture_has_its_size_or_one_in_which_captions_can_be_read(tmp_path, size, written):
    out, _ = burn(write(tmp_path / "in.mp4", [0, 0.1], size=size), tmp_path, [said()])
    assert {picture.shape[1::-1] for picture in shown(out)} == {written}


def test_large_pictures_are_shrunk_to_a_limit(tmp_path):
    source = write(tmp_path / "in.mp4", [0], size=(1080, 1920))
    out, _ = burn(source, tmp_path, most_pixels=1280 * 720)
    assert shown(out)[0].shape == (720, 1280, 3)


def test_pixels_are_written_square(tmp_path):
    with av.open(str(tmp_path / "in.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=10)
        stream.height, stream.width = 48, 64
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        target.mux([*stream.encode(packed(ramp(1)[0], 0)), *stream.encode()])
    out, _ = burn(tmp_path / "in.mp4", tmp_path)
    assert shown(out)[0].shape == (360, 698, 3)


# Mirrors and quarter turns, in the order of EXIF's orientations 1 to 8, with the moves that phones write.
_MATRICES = [(1, 0, 0, 1, 0, 0), (-1, 0, 0, 1, 64, 0), (-1, 0, 0, -1, 64, 48), (1, 0, 0, -1, 0, 48)]
_MATRICES += [(0, 1, 1, 0, 0, 0), (0, 1, -1, 0, 48, 0), (0, -1, -1, 0, 48, 64), (0, -1, 1, 0, 0, 64)]
_CORNERS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("matrix", _MATRICES)
def test_rotations_and_mirrors_are_applied_once(tmp_path, matrix):
    """A bright corner stays where a player shows it."""
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:16, :16] = 255
    source = write_clip(tmp_path / "in.mp4", np.stack([picture] * 3))
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d, x, y = matrix
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, x << 16, y << 16, 1 << 30)
    source.write_bytes(data)
    out, _ = burn(source, tmp_path)
    with av.open(str(out)) as opened:
        frame = next(opened.decode(video=0))
        assert not frame.rotation and "DISPLAYMATRIX" not in frame.side_data
    before, after = shown(source)[0], shown(out)[0]
    assert (before.shape[0] > before.shape[1]) == (after.shape[0] > after.shape[1])

    def corners(array):
        return [bool(array[y, x].mean() > 128) for y in (4, -4) for x in (4, -4)]

    # The corner at 0, 0 of the source goes to x, y, as FFmpeg and players show it.
    assert corners(after) == corners(before) == [(x > 0, y > 0) == corner for corner in _CORNERS]


def test_pictures_of_another_size_are_fitted_into_the_first_ones(tmp_path):
    source = tmp_path / "in.ts"
    for name, size, at in (("a", (48, 64), 0), ("b", (96, 64), 1)):
        write(tmp_path / f"{name}.ts", [0, 0.1, 0.2], size=size, offset=at)
    source.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    pictures = shown(burn(source, tmp_path)[0])
    assert [picture.shape for picture in pictures] == [(360, 480, 3)] * 6
    assert pictures[0][:, :60].mean() > 15 and pictures[-1][:, :60].mean() < 2, "bars at the sides"


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("full", [False, True])
def test_colors_are_those_of_the_source(tmp_path, matrix, full):
    color = (200, 40, 60)
    with av.open(str(tmp_path / "in.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuvj420p" if full else "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = packed(np.full((720, 1280, 3), color, dtype=np.uint8), 0)
        frame = frame.reformat(
            format=stream.pix_fmt, dst_colorspace={1: 1, 6: 5}[matrix], dst_color_range=2 if full else 1
        )
        target.mux([*stream.encode(frame), *stream.encode()])
    assert abs(shown(tmp_path / "in.mp4")[0][100, 100].astype(int) - color).max() <= 3, "the source is as intended"
    out, _ = burn(tmp_path / "in.mp4", tmp_path)
    # Eight bits of brightness and color, stored twice. Another matrix or range would be off by 12 or more.
    assert abs(shown(out)[0][100, 100].astype(int) - color).max() <= 6
    with av.open(str(out)) as opened:
        context = opened.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.color_primaries) == (1, 1, 1)


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.gif", "gif", "rgb8"),
        ("a.flv", "flv", "yuv420p"),
        ("a.apng", "apng", "rgb24"),
        ("a.avi", "mjpeg", "yuvj420p"),
    ]
    + [("a.vob", "mpeg2video", "yuv420p"), ("a.h264", "libx264", "yuv420p"), ("a:b.mp4", "libx264", "yuv420p")]
    + [("a.png", "png", "rgb24"), ("a%d.mkv", "libx264", "yuv420p10le"), ("a.mp4", "libx264", "gray")]
    + [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le")],
)
def test_sources_of_all_formats_are_written(tmp_path, name, codec, pixels):
    source, formats = tmp_path / name, {"vob": "vob", "png": "image2pipe", "apng": "apng"}
    with av.open(f"file:{source}", "w", format=formats.get(name.rsplit(".", 1)[1])) as target:
        stream = target.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        for index in range(1 if name == "a.png" else 10):
            frame = av.VideoFrame.from_ndarray(ramp(10)[index], format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = index, Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    out, _ = burn(source, tmp_path, [said()])
    with VideoReader(source) as reader:
        assert [float(time) for time in times_of(out)] == pytest.approx([float(t) for t, _, _ in reader.frames()])
    assert all(picture[-60:].std() > 20 for picture in shown(out))


def test_a_truncated_source_is_written_as_far_as_it_goes(tmp_path):
    source = write(tmp_path / "in.ts", [index / 10 for index in range(50)], ("aac",))
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 4])
    out, _ = burn(source, tmp_path)
    with VideoReader(source) as reader:
        assert times_of(out) == [time for time, _, _ in reader.frames()]


def test_a_source_that_breaks_is_written_up_to_there(tmp_path):
    class Breaks(VideoReader):
        def frames(self, start=0.0):
            for index, frame in enumerate(super().frames(start)):
                if index == 3:
                    raise ValueError("the disk is gone")
                yield frame

    out, report = burn(write(tmp_path / "in.mp4", [0, 0.1, 0.2, 0.3, 0.4]), tmp_path, open_video=Breaks)
    assert len(times_of(out)) == 3 and report.broken_after == pytest.approx(0.3, abs=0.05)
    assert "cannot be read after 0.3 s" in str(report)


def test_a_failure_leaves_the_existing_file(tmp_path):
    (tmp_path / "out.mp4").write_text("mine")
    (tmp_path / "in.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"in\.mp4' cannot be read as video"):
        burn(tmp_path / "in.mp4", tmp_path)
    source = write(tmp_path / "in.mp4", [0, 0.1])

    def fail(*_):
        raise KeyboardInterrupt

    with VideoReader(source) as reader, pytest.raises(KeyboardInterrupt):
        video_writing.write_video(reader, tmp_path / "out.mp4", draw=fail)
    assert (tmp_path / "out.mp4").read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {
        "in.mp4",
        "out.mp4",
    }


def test_without_an_encoder_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    with pytest.raises(ValueError, match="has no libx264"):
        burn(write_clip(tmp_path / "in.mp4", ramp(2), codec="mpeg4"), tmp_path)


def test_the_index_comes_first_so_that_players_begin_at_once(tmp_path):
    data = burn(write(tmp_path / "in.mp4", [0, 0.1]), tmp_path)[0].read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_video_may_be_written_over_itself(tmp_path):
    source = write(tmp_path / "out.mp4", [0, 0.1])
    assert burn(source, tmp_path)[0] == source and len(times_of(source)) == 2


def test_the_page_reads_only_formats_that_name_no_other_file(tmp_path):
    write(tmp_path / "in.mp4", [0, 0.1])
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'in.mp4'\n")
    with pytest.raises(ValueError, match="cannot be read as video"):
        burn(tmp_path / "list.mp4", tmp_path, open_video=partial(VideoReader, formats="mov,mp4"))
