# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write the pictures and the sound of an open video as an mp4, each at its own time."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps


# The picture is enlarged to this height, so that captions can be read, and shrunk to what level 5.1 of H.264 holds.
LEAST_HEIGHT, LEAST_WIDTH = 360, 160
MOST_PIXELS, LONGEST_SIDE = 4096 * 2304, 4096
# Codecs of sound that players expect in an mp4. Packets of these are copied, others are encoded as AAC.
COPIED = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus", "libopus")
# Sample rates of AAC.
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
# Ticks per second of the times in the file, at least.
TICKS = 90_000
# Seconds: a step of the clock back, one forward, and how far sound may reach beyond the picture at such a step.
STEP_BACK, STEP_FORWARD, MARGIN = Fraction(1, 10), 1, 1
# FFmpeg's numbers for BT.709, limited range and an unknown color property.
BT709, LIMITED, UNKNOWN = 1, 1, 2
MOST_ERRORS = 100


@dataclass
class WritingReport:
    """
    What a written video lacks. True if there is anything to say; `str` says it in one line.

    Args:
        encoded_audio (`str`): Codec of the sound, if an mp4 does not hold it and it was encoded as AAC.
        left_out_audio (`str`): Codec of the sound, if it cannot be written.
        ignored_audio_streams (`int`): Further audio streams, which are not written.
        spoilt_audio_packets (`int`): Audio packets that cannot be decoded, and are not written.
        cut_audio_packets (`int`): Audio packets that are not written because the source's clock changes there.
        broken_after (`float`): Second after which the source cannot be read. 0 if all of it was.
        missing_characters (`str`): Characters in captions that no font has, with their scripts.
        captions_with_boxes (`int`): Captions with such characters, which are drawn as boxes.
        captions_cut (`int`): Captions that are too long for the picture.
    """

    encoded_audio: str = ""
    left_out_audio: str = ""
    ignored_audio_streams: int = 0
    spoilt_audio_packets: int = 0
    cut_audio_packets: int = 0
    broken_after: float = 0.0
    missing_characters: str = ""
    captions_with_boxes: int = 0
    captions_cut: int = 0

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        sentences = {
            "encoded_audio": "The sound was encoded as AAC, because an mp4 does not hold {}.",
            "left_out_audio": "The sound is left out, because its {} cannot be read.",
            "ignored_audio_streams": "Only one audio stream is written: {} more are left out.",
            "spoilt_audio_packets": "{} spoilt packets of sound are left out.",
            "cut_audio_packets": "{} packets of sound are left out where the source's clock changes.",
            "broken_after": "The source cannot be read after {:.1f} s, and the written video ends there.",
            "captions_with_boxes": "{} captions have characters that no font here has, drawn as boxes: "
            f"{self.missing_characters}. Install a font that has them, such as Noto Sans, or give its file as `font`.",
            "captions_cut": "{} captions are too long for the picture, and are cut.",
        }
        return " ".join(text.format(value) for name, text in sentences.items() if (value := getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def check_encoder() -> None:
    """Raise `ValueError` if this build of PyAV cannot write H.264."""
    if "libx264" not in av.codecs_available:
        raise ValueError("This build of PyAV has no libx264, so it cannot write H.264: `pip install --force av`.")


def write_video(
    reader: Any,
    out: Path,
    *,
    draw: Callable[[Image.Image, float, float], Image.Image] | None = None,
    most_pixels: int = MOST_PIXELS,
) -> WritingReport:
    """
    Write a video as an mp4 with H.264, with the times of its frames, its sound, and its size as shown.

    Small pictures are enlarged to a height of 360. A picture whose size changes is fitted into the first one's.

    Args:
        reader ([`VideoReader`]): The open video. Sound is read through a second one of its type.
        out (`Path`): The file. An existing one is replaced only when the new one is complete, so it may be the source.
        draw (`Callable`, *optional*): Gets each RGB picture and the seconds from which and until which it is shown,
            and returns the picture to write.
        most_pixels (`int`, *optional*, defaults to 4096 * 2304): Larger pictures are shrunk to this many pixels.

    Raises:
        `ValueError`: If the video has no readable frame, or cannot be written.
    """
    check_encoder()
    report, frames = WritingReport(), reader.frames()
    first = next(frames, None)
    if first is None:
        raise ValueError(f"'{reader.source}' has no readable frame.")
    height, width = reader.picture(first[2]).shape[:2]
    size = _size(width, height, most_pixels)
    with (
        TemporaryDirectory(dir=out.absolute().parent, prefix=".", ignore_cleanup_errors=True) as folder,
        type(reader)(reader.source, timeout=reader.timeout, formats=reader.formats) as beside,
    ):
        part = Path(folder, "part.mp4")
        clock = _Clock(reader)
        try:
            target, stream, sound = _start(part, reader, first, size, beside.container, clock, report)
            with target:
                pictures = _Pictures(target, stream, reader, size, draw)
                for shown in _until_broken(first, frames, report):
                    pictures.write(*shown)
                    if sound is not None:
                        sound.write(shown[0])
                pictures.end()
                if sound is not None:
                    clock.has_ended = True
                    sound.end()
        except av.error.FFmpegError as error:
            raise ValueError(f"'{out}' cannot be written: {error.strerror or error}.") from error
        os.replace(part, out)
    return report


def _until_broken(
    first: Any, frames: Iterator[Any], report: WritingReport
) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Yield begin, end and picture of frames. Each is shown until the next one. Note where the source breaks."""
    time, duration, frame = first
    while True:
        try:
            following = next(frames, None)
        except ValueError:
            following, report.broken_after = None, float(time + duration)
        if following is None:
            break
        yield time, max(time, following[0]), frame
        time, duration, frame = following
    yield time, time + duration, frame


def _size(width: int, height: int, most_pixels: int) -> tuple[int, int]:
    """Return the size of the written picture. H.264 requires even sides, captions some room."""
    scale = max(1.0, LEAST_HEIGHT / height)
    scale = min(scale, LONGEST_SIDE / max(width, height), math.sqrt(most_pixels / (width * height)))
    return max(LEAST_WIDTH, 2 * round(width * scale / 2)), max(LEAST_HEIGHT, 2 * int(height * scale / 2 + 1e-6))


def _start(
    part: Path, reader: Any, first: Any, size: tuple[int, int], source: Any, clock: "_Clock", report: WritingReport
) -> tuple[Any, Any, "_Sound | None"]:
    """Begin the file: with the packets of the sound, else with the sound encoded, else without sound."""
    heard = source.streams.best("audio", related=source.streams.best("video"))
    codec = None if heard is None else heard.codec_context.name
    report.ignored_audio_streams = max(0, len(source.streams.audio) - 1)
    # Each time in the source, and second 0, is a number of ticks.
    ticks = math.lcm(first[2].time_base.denominator, reader.origin.denominator)
    ticks = TICKS if ticks > 100 * TICKS else ticks * math.ceil(TICKS / ticks)
    for way in (*([True] if codec in COPIED else []), *([False] if heard is not None else []), None):
        # The movie's own time scale is that of a late beginning of the picture. By default it is 1/1000 s.
        options = {"movflags": "+faststart", "movie_timescale": str(ticks)}
        target = av.open(f"file:{part}", "w", format="mp4", options=options)
        try:
            stream = _add_picture(target, reader, size, ticks)
            sound = None if way is None else _Sound(source, heard, target, way, clock, report)
            target.start_encoding()
        except (av.error.FFmpegError, ValueError):
            target.close()
            if way is None:
                raise
            continue
        report.encoded_audio = codec if way is False else ""
        report.left_out_audio = codec if way is None and codec else ""
        return target, stream, sound
    raise AssertionError


def _add_picture(target: Any, reader: Any, size: tuple[int, int], ticks: int) -> Any:
    rate = min(max(reader.rate or Fraction(25), Fraction(1)), Fraction(240))
    # With B-frames, decoding times run behind, and the file's length is that of the decoding times.
    stream = target.add_stream("libx264", rate=rate, options={"bf": "0"})
    # The encoder rounds times to its own time base, which by default is one frame.
    context, source = stream.codec_context, reader.stream.codec_context
    context.time_base = stream.time_base = Fraction(1, ticks)
    context.pix_fmt, (context.width, context.height) = "yuv420p", size
    context.colorspace, context.color_range = BT709, LIMITED
    context.color_primaries = BT709 if source.color_primaries == UNKNOWN else source.color_primaries
    context.color_trc = BT709 if source.color_trc == UNKNOWN else source.color_trc
    return stream


class _Pictures:
    """Encodes pictures."""

    def __init__(self, target: Any, stream: Any, reader: Any, size: tuple[int, int], draw: Any) -> None:
        self.target, self.stream, self.reader, self.size, self.draw = target, stream, reader, size, draw
        self.time_base = stream.codec_context.time_base
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._last = -1
        self._durations: dict[int, int] = {}

    def write(self, begin: Fraction, end: Fraction, frame: Any) -> None:
        picture = Image.fromarray(self.reader.picture(frame))
        if picture.size != self.size:
            picture = ImageOps.pad(picture, self.size, Image.Resampling.BICUBIC, color=(0, 0, 0))
        if self.draw is not None:
            picture = self.draw(picture, float(begin), float(end))
        packed = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24"),
            format="yuv420p",
            dst_colorspace=BT709,
            dst_color_range=LIMITED,
        )
        # Times must rise. Those of some sources do not.
        packed.pts = self._last = max(round(begin / self.time_base), self._last + 1)
        packed.time_base = self.time_base
        self._durations[packed.pts] = max(1, round(end / self.time_base) - packed.pts)
        self._mux(packed)

    def end(self) -> None:
        self._mux(None)

    def _mux(self, frame: Any | None) -> None:
        for packet in self.stream.encode(frame):
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self.target.mux(packet)


class _Clock:
    """
    Turns times of the sound into seconds of the reader, whose clock may jump.

    Args:
        reader ([`VideoReader`]): Its `clocks` grow as frames are read.
    """

    def __init__(self, reader: Any) -> None:
        self.reader, self.has_ended, self.part = reader, False, 0

    @property
    def parts(self) -> list[tuple[Fraction, Fraction | float, Fraction | float]]:
        """What is added to the container's seconds, begin and end of each part of the video."""
        clocks = self.reader.clocks or [(Fraction(0), -math.inf, math.inf)]
        return [(shift - self.reader.origin, begin, end) for shift, begin, end in clocks]

    def offset(self, at: Fraction, expected: Fraction | None) -> Fraction | None:
        """
        Return what is added to the time of a packet of sound, and `None` if frames must come first.

        Args:
            at (`Fraction`): The packet's time on the container's clock.
            expected (`Fraction`, *optional*): The end of the packet before.
        """
        parts = self.parts
        offset, _, end = parts[self.part]
        is_back = expected is not None and expected - at >= STEP_BACK
        is_step = is_back or (expected is not None and at - expected > STEP_FORWARD)
        is_last = self.has_ended and self.part + 1 == len(parts)
        if not is_step or is_last or (not is_back and at <= end + MARGIN):
            return offset
        for index in range(self.part + 1, len(parts)):
            if parts[index][1] - MARGIN <= at <= parts[index][2] + MARGIN:
                self.part = index
                return parts[index][0]
        return offset if self.has_ended else None

    def is_over(self, at: Fraction) -> bool:
        """Return whether a part of the video has ended long before this time of the sound."""
        parts = self.parts
        return self.part + 1 < len(parts) and at > parts[self.part][2] + MARGIN


class _Sound:
    """
    Writes the sound of a video, up to the time of the picture.

    Args:
        source, heard: The open container, and its audio stream.
        target: The container to write.
        copies (`bool`): Whether packets are copied; else the sound is encoded as AAC.
        clock ([`_Clock`]): Offsets from the source's times to the written ones.
        report ([`WritingReport`]): Where to count.
    """

    def __init__(
        self, source: Any, heard: Any, target: Any, copies: bool, clock: _Clock, report: WritingReport
    ) -> None:
        self.source, self.heard, self.target, self.clock, self.report = source, heard, target, clock, report
        self._packets, self._waiting = self._read(), None
        self._expected: Fraction | None = None
        self._last: int | None = None
        if copies:
            self.stream, self._resampler = target.add_stream_from_template(heard), None
            return
        rate = heard.codec_context.sample_rate
        self.stream = target.add_stream("aac", rate=rate if rate in RATES else 48_000)
        layout = {1: "mono", 6: "5.1"}.get(heard.codec_context.channels, "stereo")
        self.stream.codec_context.layout = layout
        self.stream.codec_context.bit_rate = 64_000 * self.stream.codec_context.channels
        self._resampler = self._new_resampler()

    def write(self, until: Fraction | None) -> None:
        """Write what is heard up to a second, or all of it."""
        while (packet := self._waiting or next(self._packets, None)) is not None:
            self._waiting = None
            stamp = packet.dts if packet.pts is None else packet.pts
            at = (self._expected or Fraction(0)) if stamp is None else stamp * packet.time_base
            offset = self.clock.offset(at, self._expected)
            if offset is None or (until is not None and at + offset > until):
                self._waiting = packet
                return
            self._expected = at + (packet.duration or 0) * packet.time_base
            if self.clock.is_over(at):
                self.report.cut_audio_packets += 1
                continue
            self._place(packet, at, offset)

    def end(self) -> None:
        """Write the rest."""
        self.write(None)
        if self._resampler is not None:
            for frame in self._decode(None):
                self._encode(frame)
            for frame in (*self._resampler.resample(None), None):
                self.target.mux(self.stream.encode(frame))

    def _read(self) -> Iterator[Any]:
        errors = 0
        while errors < MOST_ERRORS:
            try:
                for packet in self.source.demux(self.heard):
                    errors = 0
                    if packet.size:
                        yield packet
                return
            except av.error.FFmpegError:
                errors += 1
                self.report.spoilt_audio_packets += 1

    def _place(self, packet: Any, at: Fraction, offset: Fraction) -> None:
        """Write a packet at its time."""
        delay = 0 if packet.dts is None or packet.pts is None else packet.pts - packet.dts
        packet.pts = round((at + offset) / packet.time_base)
        packet.dts = packet.pts - delay
        # A copied packet is decoded too: this shows whether it is spoilt.
        frames = None if packet.is_corrupt else self._decode(packet)
        if frames is None:
            self.report.spoilt_audio_packets += 1
        elif self._last is not None and packet.dts <= self._last:
            self.report.cut_audio_packets += 1
        elif self._resampler is None:
            self._last = packet.dts
            packet.stream = self.stream
            self.target.mux(packet)
        else:
            self._last = packet.dts
            for frame in frames:
                self._encode(frame)

    def _decode(self, packet: Any | None) -> list[Any] | None:
        try:
            return self.heard.codec_context.decode(packet)
        except av.error.FFmpegError:
            return None

    def _encode(self, frame: Any) -> None:
        try:
            frames = self._resampler.resample(frame)
        except ValueError:
            # The format of the sound changes.
            self._resampler = self._new_resampler()
            frames = self._resampler.resample(frame)
        for some in frames:
            self.target.mux(self.stream.encode(some))

    def _new_resampler(self) -> Any:
        context = self.stream.codec_context
        return av.AudioResampler(format="fltp", layout=context.layout.name, rate=context.sample_rate)
