# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write the pictures and the sound of an open video as an mp4, each at its own time."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps


# The page imports its files by their own names, the command line as parts of the package.
if __package__:
    from .uploads import demux
else:
    from uploads import demux

# The picture is enlarged to this height, so that captions can be read, and shrunk to what level 5.1 of H.264 holds.
LEAST_HEIGHT, LEAST_WIDTH = 360, 160
MOST_PIXELS, LONGEST_SIDE = 4096 * 2304, 4096
# Codecs of sound that players expect in an mp4. Packets of these are copied, others are encoded as AAC.
CODECS = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus", "libopus")
# What happens to the sound.
COPIED, ENCODED, LEFT_OUT = "copied", "encoded", "left out"
# Sample rates of AAC.
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
# Samples in a packet of AAC, and packets in a row that show by their durations that the sample rate is another one.
SAMPLES, RUN = 1024, 16
# Ticks per second of the times in the file, at least.
TICKS = 90_000
# Seconds: a step of the clock back, one forward, and how far sound may reach beyond the picture at such a step.
STEP_BACK, STEP_FORWARD, MARGIN = Fraction(1, 10), 1, 1
# Where the sample rate changes, FFmpeg computes times within a packet of MPEG-TS by the old one: they are wrong by up
# to this many seconds, and sound goes on from the sound before.
INEXACT = Fraction(1, 2)
# FFmpeg's numbers for BT.709, limited range and an unknown color property.
BT709, LIMITED, UNKNOWN = 1, 1, 2
MOST_ERRORS = 100


@dataclass
class WritingReport:
    """
    What a written video lacks. True if there is anything to say; `str` says it in one line.

    Args:
        encoded_audio (`str`): Codec of the sound, if it was encoded as AAC.
        audio_changes (`bool`): Whether it was encoded because its format changes in the middle.
        left_out_audio (`str`): Codec of the sound, if it cannot be written.
        ignored_audio_streams (`int`): Further audio streams, which are not written.
        spoilt_audio_packets (`int`): Audio packets that cannot be decoded, and are not written.
        cut_audio_packets (`int`): Audio packets that are not written because the source's clock changes there.
        stretched_audio_seconds (`float`): Seconds of sound whose times are those of another sample rate than the
            file announces, as in joined files. It plays faster or slower than it was recorded.
        broken_after (`float`): Second after which the source cannot be read. 0 if all of it was.
        missing_characters (`str`): Characters in captions that no font has, with their scripts.
        captions_with_boxes (`int`): Captions with such characters, which are drawn as boxes.
        captions_reversed (`int`): Captions from right to left that are drawn from left to right.
        captions_cut (`int`): Captions that are too long for the picture.
    """

    encoded_audio: str = ""
    audio_changes: bool = False
    left_out_audio: str = ""
    ignored_audio_streams: int = 0
    spoilt_audio_packets: int = 0
    cut_audio_packets: int = 0
    stretched_audio_seconds: float = 0.0
    broken_after: float = 0.0
    missing_characters: str = ""
    captions_with_boxes: int = 0
    captions_reversed: int = 0
    captions_cut: int = 0

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        sentences = {
            "encoded_audio": "The sound was encoded as AAC, because "
            + ("its format changes." if self.audio_changes else "an mp4 does not hold {}."),
            "left_out_audio": "The sound is left out, because its {} cannot be read.",
            "ignored_audio_streams": "Further audio streams left out: {}.",
            "spoilt_audio_packets": "Spoilt packets of sound left out: {}.",
            "cut_audio_packets": "Packets of sound left out where the source's clock changes: {}.",
            "stretched_audio_seconds": "Sound that plays at a wrong speed, because its sample rate changes and the "
            "file does not say so: {:.1f} s.",
            "broken_after": "The source cannot be read after {:.1f} s, and the written video ends there.",
            "captions_with_boxes": "Captions with boxes for characters that no font here has: {}, characters "
            f"{self.missing_characters}. Install a font that has them, such as Noto Sans, or give its file as `font`.",
            "captions_reversed": "Captions from right to left that are drawn from left to right, because Pillow "
            "lacks libraqm: {}.",
            "captions_cut": "Captions cut because they are too long for the picture: {}.",
        }
        return " ".join(text.format(value) for name, text in sentences.items() if (value := getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def check_encoder() -> None:
    """Raise `ValueError` if this build of PyAV cannot write H.264."""
    if "libx264" not in av.codecs_available:
        raise ValueError(
            "This build of PyAV has no libx264, so it cannot write H.264: `pip install --force-reinstall av`."
        )


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
    # A link stays, and the file that it leads to is replaced.
    target = out.resolve()
    with TemporaryDirectory(dir=target.parent, prefix=".", ignore_cleanup_errors=True) as folder:
        part = Path(folder, "part.mp4")
        try:
            try:
                report = _write(reader, part, draw, most_pixels, copies=True)
            except _SoundChanges:
                report = _write(reader, part, draw, most_pixels, copies=False)
        except av.error.FFmpegError as error:
            raise ValueError(f"'{out}' cannot be written: {error.strerror or error}.") from error
        os.replace(part, target)
    return report


class _SoundChanges(Exception):
    """The format of the sound changes in the middle, which copied packets cannot express."""


def _write(reader: Any, part: Path, draw: Any, most_pixels: int, *, copies: bool) -> WritingReport:
    report, frames = WritingReport(), reader.frames()
    first = next(frames, None)
    if first is None:
        raise ValueError(f"'{reader.source}' has no readable frame.")
    pictures = _Pictures(reader, first[2], draw, most_pixels)
    with type(reader)(reader.source, timeout=reader.timeout, formats=reader.formats) as beside:
        sound = _Sound(beside, _Clock(reader), report, copies=copies)
        with _start(part, pictures, sound):
            for begin, end, frame in _until_broken(first, frames, report):
                pictures.write(begin, end, frame)
                sound.write(begin)
            pictures.end()
            sound.end()
    return report


def _start(part: Path, pictures: "_Pictures", sound: "_Sound") -> Any:
    """Begin the file: with the packets of the sound, else with the sound encoded, else without sound."""
    for way in sound.ways:
        # The movie's time scale is that of the second at which the pictures begin. By default it is 1/1000 s.
        options = {"movflags": "+faststart", "movie_timescale": str(pictures.ticks)}
        target = av.open(f"file:{part}", "w", format="mp4", options=options)
        try:
            pictures.attach(target)
            sound.attach(target, way)
            target.start_encoding()
            return target
        except (av.error.FFmpegError, ValueError):
            target.close()
            if way == LEFT_OUT:
                raise


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


class _Pictures:
    """
    Encodes pictures.

    Args:
        reader ([`VideoReader`]): The open video.
        first (`av.VideoFrame`): Its first frame, which sets the size and the ticks.
        draw, most_pixels: See [`write_video`].

    Attributes:
        ticks (`int`): Ticks per second: each time in the source, and second 0, is a number of ticks.
    """

    def __init__(self, reader: Any, first: Any, draw: Any, most_pixels: int) -> None:
        self.reader, self.draw = reader, draw
        height, width = reader.picture(first).shape[:2]
        self.size = _size(width, height, most_pixels)
        ticks = math.lcm(first.time_base.denominator, reader.origin.denominator)
        self.ticks = TICKS if ticks > 100 * TICKS else ticks * math.ceil(TICKS / ticks)
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._last = -1
        self._durations: dict[int, int] = {}

    def attach(self, target: Any) -> None:
        """Add the stream of the pictures to the file."""
        rate = min(max(self.reader.rate or Fraction(25), Fraction(1)), Fraction(240))
        # With B-frames, decoding times run behind, and the file's length is that of the decoding times.
        self.target, self.stream = target, target.add_stream("libx264", rate=rate, options={"bf": "0"})
        context, source = self.stream.codec_context, self.reader.stream.codec_context
        # The encoder rounds times to its own time base, which by default is one frame.
        context.time_base = self.stream.time_base = Fraction(1, self.ticks)
        context.pix_fmt, (context.width, context.height) = "yuv420p", self.size
        context.colorspace, context.color_range = BT709, LIMITED
        context.color_primaries = BT709 if source.color_primaries == UNKNOWN else source.color_primaries
        context.color_trc = BT709 if source.color_trc == UNKNOWN else source.color_trc

    def write(self, begin: Fraction, end: Fraction, frame: Any) -> None:
        """Write a frame that is shown from one second to another."""
        picture = _fit(Image.fromarray(self.reader.picture(frame)), self.size)
        if self.draw is not None:
            picture = self.draw(picture, float(begin), float(end))
        packed = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24"),
            format="yuv420p",
            dst_colorspace=BT709,
            dst_color_range=LIMITED,
        )
        # Times must rise. Those of some sources do not.
        packed.pts = self._last = max(round(begin * self.ticks), self._last + 1)
        packed.time_base = Fraction(1, self.ticks)
        self._durations[packed.pts] = max(1, round(end * self.ticks) - packed.pts)
        self._mux(packed)

    def end(self) -> None:
        """Write the rest."""
        self._mux(None)

    def _mux(self, frame: Any | None) -> None:
        for packet in self.stream.encode(frame):
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self.target.mux(packet)


def _size(width: int, height: int, most_pixels: int) -> tuple[int, int]:
    """Return the size of the written picture. H.264 requires even sides, captions some room."""
    scale = max(1.0, LEAST_HEIGHT / height)
    scale = min(scale, LONGEST_SIDE / max(width, height), math.sqrt(most_pixels / (width * height)))
    return max(LEAST_WIDTH, 2 * round(width * scale / 2)), max(LEAST_HEIGHT, 2 * int(height * scale / 2 + 1e-6))


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a picture to a size, with bars if its shape is another one by more than the rounding to even sides."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    if picture.size == size:
        return picture
    if size[0] - picture.width * scale <= 2 and size[1] - picture.height * scale <= 2:
        return picture.resize(size, Image.Resampling.BICUBIC)
    return ImageOps.pad(picture, size, Image.Resampling.BICUBIC, color=(0, 0, 0))


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
        beside ([`VideoReader`]): The open video, from which nothing else reads.
        clock ([`_Clock`]): Turns the times of the sound into those of the reader.
        report ([`WritingReport`]): Where to count.
        copies (`bool`): Whether packets may be copied. Else the sound is encoded as AAC.
    """

    def __init__(self, beside: Any, clock: _Clock, report: WritingReport, *, copies: bool) -> None:
        self.source, self.clock, self.report = beside.container, clock, report
        self.audio = self.source.streams.best("audio", related=beside.stream)
        report.audio_changes, self._inexact = not copies, INEXACT * (not copies)
        report.ignored_audio_streams = len(self.source.streams.audio) - (self.audio is not None)
        self.codec = None if self.audio is None else getattr(self.audio.codec_context, "name", "unknown codec")
        self.ways = [LEFT_OUT]
        if self.audio is not None and self.audio.codec_context is not None:
            self.ways = [*([COPIED] if copies and self.codec in CODECS else []), ENCODED, LEFT_OUT]
        self._packets, self._waiting = self._with_hidden_changes(), None
        # The stream's decoder, and those of configurations that the file hides.
        self._decoders = {None: self.audio and self.audio.codec_context}
        self._expected: Fraction | None = None
        # Last decoding times that were read, and those that the encoder returned.
        self._last: int | None = None
        self._written: int | None = None
        # Number of the sample after those that were given to the encoder.
        self._next = 0
        # Time and seconds of sound of the packet before, and by how much newest steps to the next packet are longer.
        self._before: tuple[Fraction, Fraction] | None = None
        self._steps: deque[Fraction] = deque(maxlen=31)
        # Format of the decoded sound so far.
        self._audio_format: tuple[Any, ...] | None = None
        self._resampler: Any = None

    def attach(self, target: Any, way: str) -> None:
        """Add the stream of the sound to the file, in one of [`_Sound.ways`]."""
        self.target, self.way = target, way
        self.report.encoded_audio = self.codec if way == ENCODED else ""
        self.report.left_out_audio = self.codec if way == LEFT_OUT and self.codec else ""
        if way == COPIED:
            self.stream = target.add_stream_from_template(self.audio)
        if way == ENCODED:
            context = self.audio.codec_context
            rate = context.sample_rate if context.sample_rate in RATES else 48_000
            self.stream = target.add_stream("aac", rate=rate)
            self.stream.codec_context.layout = {1: "mono", 6: "5.1"}.get(context.channels, "stereo")
            self.stream.codec_context.bit_rate = 64_000 * self.stream.codec_context.channels

    def write(self, until: Fraction | None) -> None:
        """Write what is heard up to a second, or all of it."""
        while self.way != LEFT_OUT and (waiting := self._waiting or next(self._packets, None)) is not None:
            (packet, configuration), self._waiting = waiting, None
            stamp = packet.dts if packet.pts is None else packet.pts
            at = (self._expected or Fraction(0)) if stamp is None else stamp * packet.time_base
            offset = self.clock.offset(at, self._expected)
            if offset is None or (until is not None and at + offset > until):
                self._waiting = waiting
                return
            self._expected = at + (packet.duration or 0) * packet.time_base
            if self.clock.is_over(at):
                self.report.cut_audio_packets += 1
                continue
            self._place(packet, configuration, at, offset)

    def end(self) -> None:
        """Write the rest."""
        self.clock.has_ended = True
        self.write(None)
        if self.way == ENCODED:
            for frame in (*(self._decode(None) or ()), None):
                self._encode(frame)

    def _read(self) -> Iterator[Any]:
        errors = 0
        while errors < MOST_ERRORS:
            try:
                for packet in demux(self.source, self.audio):
                    errors = 0
                    if packet.size:
                        yield packet
                return
            except av.error.FFmpegError:
                errors += 1
                self.report.spoilt_audio_packets += 1

    def _with_hidden_changes(self) -> Iterator[tuple[Any, bytes | None]]:
        """
        Yield packets, each with its AAC configuration if the file hides it. FFmpeg keeps the first configuration where
        a broadcast that changes its sample rate is copied into an mp4, but packets keep the durations of their own.
        """
        own = bytes(getattr(self.audio.codec_context, "extradata", None) or b"") if self.codec == "aac" else b""
        rate, num_own, hidden = _aac_rate(own), 0, None
        waiting: list[Any] = []  # packets in a row that seem to have the rate `other`
        other = None
        for packet in self._read():
            if self.codec == "aac" and packet.has_sidedata("new_extradata"):
                yield from zip(waiting, repeat(hidden), strict=False)
                own, waiting = bytes(packet.get_sidedata("new_extradata")), []
                rate, num_own, hidden = _aac_rate(own), 0, None
            said = _rate_by_duration(packet.duration or 0, packet.time_base)
            num_own += said == _aac_rate(own)
            # The last packet before a join, and those around a gap, have any duration.
            if said not in (None, other):
                yield from zip(waiting, repeat(hidden), strict=False)
                waiting, other = [], said
            if rate is None or other == rate or num_own < RUN or (said is None and not waiting):
                yield packet, hidden
                continue
            waiting.append(packet)
            if len(waiting) == RUN:
                rate, hidden = other, None if other == _aac_rate(own) else _with_rate(own, other)
                yield from zip(waiting, repeat(hidden), strict=False)
                waiting = []
        yield from zip(waiting, repeat(hidden), strict=False)

    def _place(self, packet: Any, configuration: bytes | None, at: Fraction, offset: Fraction) -> None:
        """Write a packet at its time."""
        delay = 0 if packet.dts is None or packet.pts is None else packet.pts - packet.dts
        packet.pts = round((at + offset) / packet.time_base)
        packet.dts = packet.pts - delay
        # A copied packet is decoded too: this shows whether it is spoilt.
        frames = None if packet.is_corrupt else self._decode(packet, configuration)
        if frames is None:
            self.report.spoilt_audio_packets += 1
        elif (
            self._last is not None
            and packet.dts < self._last + (self.way == COPIED) - self._inexact / packet.time_base
        ):
            # Times in a file are rounded, so those of short packets may be equal.
            self.report.cut_audio_packets += 1
        elif self.way == COPIED:
            formats = {(frame.sample_rate, frame.layout.name) for frame in frames}
            self._audio_format = self._audio_format or next(iter(formats), None)
            if formats - {self._audio_format}:
                raise _SoundChanges
            self._last = packet.dts
            self._count_stretched(at, frames)
            packet.stream = self.stream
            self.target.mux(packet)
        else:
            self._last = packet.dts
            for frame in frames:
                self._encode(frame)

    def _count_stretched(self, at: Fraction, frames: list[Any]) -> None:
        """Count sound that is longer or shorter than the time until the next packet, for many packets in a row."""
        if self._before is not None:
            begin, held = self._before
            step = at - begin - held
            # Others are gaps and joins.
            self._steps.extend([step] if -held < step < 3 * held else [])
            steps = sorted(self._steps) or [Fraction(0)]
            middle, mean = steps[len(steps) // 2], sum(steps) / len(steps)
            # Times are often rounded to 1/1000 s.
            wrong = max(middle, -mean) > max(held / 20, Fraction(3, 2000))
            self.report.stretched_audio_seconds += round(float(held), 3) * (wrong and len(steps) > 15)
        held = sum((Fraction(frame.samples, frame.sample_rate) for frame in frames), Fraction(0))
        self._before = (at, held) if held else None

    def _decode(self, packet: Any | None, configuration: bytes | None = None) -> list[Any] | None:
        if configuration not in self._decoders:
            self._decoders[configuration] = av.CodecContext.create("aac", "r")
            self._decoders[configuration].extradata = configuration
        try:
            return self._decoders[configuration].decode(packet)
        except av.error.FFmpegError:
            return None

    def _encode(self, frame: Any | None) -> None:
        """Encode a decoded frame, or the rest."""
        audio_format = None if frame is None else (frame.format.name, frame.layout.name, frame.sample_rate)
        frames, inexact = [], self._inexact
        if self._resampler is not None and audio_format != self._audio_format:
            frames, self._resampler = self._resampler.resample(None), None
        if self._resampler is None and frame is not None:
            context, self._audio_format, inexact = self.stream.codec_context, audio_format, 0
            self._resampler = av.AudioResampler(format="fltp", layout=context.layout.name, rate=context.sample_rate)
        frames += [None] if frame is None else self._resampler.resample(frame)
        for some in frames:
            if some is not None:
                # The encoder takes the time base of the first frame for that of all. Some decoders give no times.
                at = self._next if some.pts is None else round(some.pts * some.time_base * some.sample_rate)
                at = self._next if abs(at - self._next) < inexact * some.sample_rate else at
                some.pts, some.time_base = at, Fraction(1, some.sample_rate)
                self._next = at + some.samples
        for packet in (packet for some in frames for packet in self.stream.encode(some)):
            # Where the clock or the format changes, the sound before it may reach into the sound after it.
            if self._written is None or packet.dts > self._written:
                self._written = packet.dts
                self.target.mux(packet)


def _aac_rate(configuration: bytes) -> int | None:
    """Return the sample rate in a configuration of AAC-LC with packets of 1024 samples, `None` for others."""
    # From the left: 5 bits for the kind, 4 for the rate, 4 for channels, and one for shorter packets.
    fields = int.from_bytes(configuration[:2].rjust(2, b"\0"), "big")
    is_usual = fields >> 11 == 2 and fields >> 3 & 15 > 0 and not fields >> 2 & 1
    return RATES[-1 - (fields >> 7 & 15)] if is_usual and fields >> 7 & 15 < len(RATES) else None


def _with_rate(configuration: bytes, rate: int) -> bytes:
    """Return an AAC configuration with another sample rate."""
    fields = int.from_bytes(configuration[:2], "big") & ~(15 << 7) | (len(RATES) - 1 - RATES.index(rate)) << 7
    return fields.to_bytes(2, "big")


@lru_cache
def _rate_by_duration(duration: int, time_base: Fraction) -> int | None:
    """Return the sample rate at which a packet of AAC lasts so many ticks, if ticks are short enough to tell."""
    times = {rate: abs(Fraction(SAMPLES, rate) - duration * time_base) for rate in RATES}
    return next((rate for rate in RATES if times[rate] <= time_base <= Fraction(1, RATES[0])), None)
