# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What a video is: the one reader that narration, training, validation, subtitles, burn-in and the page use.

[`VideoReader`] opens a file, a URL or a camera and yields its pictures with their times; [`read_video`] shows what is
on screen at each tick of a frame rate.
"""

import errno
import math
import os
import re
import threading
import time as clock
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from io import IOBase
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import is_av_available, logging

from .checks_videollm_mod import check_fps, check_number, check_seconds
from .video_opening_videollm_mod import (
    MAY_CHANGE_CLOCKS,
    NO_TIMESTAMPS,
    check_source,
    count_joined,
    count_torn,
    goes_on,
    has_flag,
    open_container,
    unreadable,
    without_secrets,
)


if is_av_available():
    import av

logger = logging.get_logger(__name__)

# FFmpeg's own limits, in seconds: a longer step of the clock is a new clock, in formats that may change clocks
# (`dts_delta_threshold`) and in all others (`dts_error_threshold`). A step back counts from a tenth of a second on.
_LONGEST_GAP, _LONGEST_STILL, _STEP_BACK = 10, 30 * 3600, Fraction(1, 10)
# Seconds without a frame that count as a gap, if three frames or more would fit.
_SHORTEST_GAP = Fraction(1, 2)
# Formats in which a place that was sought is not what FFmpeg says it is.
_SEEKS_WRONG = {"apng", "mpeg"}
# Formats with the end of the file only. FFmpeg may give it for the length of each stream.
_HAVE_ONE_END = {"matroska,webm", "mpeg", "nut"}
# Errors in a row after which a file counts as unreadable from there on, and scans of a JPEG picture.
_MOST_ERRORS, _MOST_SCANS = 100, 100
# Seconds before a live source is opened again, after the first failure and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0


@dataclass
class ReadingReport:
    """
    What a reader met and dealt with. True if there is anything to say; `str` says it in one line.

    Args:
        spoilt_packets (`int`): Packets that could not be read or decoded; torn places of Matroska. Reading went on.
        spoilt_frames (`int`): Frames that were decoded with visible damage.
        mended_times (`int`): Times that jumped, went back or were missing, and follow the previous frame instead.
        ignored_streams (`int`): Further video streams, joined files, and before PyAV 19 streams that begin later.
        missing_seconds (`float`): Seconds of picture that a cut file announces, or has before its first key frame.
        cut_ends (`int`): Files that break off, where less than a second is known to be missing.
        gap_seconds (`float`): Seconds of a file for which no frame is there, in gaps from half a second on.
        reconnections (`int`): Times that a live source was opened again.
    """

    spoilt_packets: int = 0
    spoilt_frames: int = 0
    mended_times: int = 0
    ignored_streams: int = 0
    missing_seconds: float = 0.0
    cut_ends: int = 0
    gap_seconds: float = 0.0
    reconnections: int = 0

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        counts = {name.replace("_", " "): value for name, value in asdict(self).items() if value}
        # These are no damage: many files have a second camera, and recordings of a screen have gaps.
        ignored, gaps = counts.pop("ignored streams", 0), counts.pop("gap seconds", 0)
        said = [f"{value:g} {name.removesuffix('s') if value == 1 else name}" for name, value in counts.items()]
        damage = [f"The source is not in order: {', '.join(said)}."] if said else []
        others = f"{ignored} other video stream{'s were' if ignored > 1 else ' was'} not read."
        still = f"In gaps of {gaps:.1f} s there is no frame, and the last one stays."
        return " ".join(damage + [still] * (gaps > 0) + [others] * (ignored > 0))

    def to_dict(self) -> dict[str, int | float]:
        """Return the counts by name."""
        return asdict(self)


class VideoReader(AbstractContextManager):
    """
    An open video. Where FFmpeg's command line has a convention, this class follows it:

    - **Stream**: a default one, then the largest; never a cover picture.
    - **Second 0**: the container's start, the earliest of its streams, even if the first pictures lack their key
      frame. Sound and subtitles share this clock. First packets without times come before those that have one.
    - **Time of a frame**: its presentation time, else its decoding time, else the end of the previous frame.
    - **A clock that jumps**, by more than 10 s in formats such as MPEG-TS and HLS and by 30 hours in others: time goes
      on from the end of the previous frame.
    - **A clock that goes back**: likewise from 0.1 s on. Clocks are compared between packets, in decoding order.
      A frame that the decoder returns late gets the time of the previous frame.
    - **Length**: the end of the last picture in the file. Headers and the length of the sound do not count.
    - **Rotation and mirror**: the display matrix is applied, to the nearest quarter turn.
    - **Pixels that are not square**: the width is scaled. Ratios beyond 1:10 count as errors and are ignored.
    - **Spoilt packets**: reading goes on with the next. Frames that the decoder repaired are shown.
    - **Live sources**: second 0 is the first frame. Formats without timestamps, such as multipart JPEG, get the
      time at which a frame arrives. A clock that jumps, and a source that is opened again, go on by the wall clock.
    - **Seeking**: to the key frame at or before the target, further back if the container lands behind it. A file
      whose clock changes is read from the beginning.

    Everything that was mended or left out is counted in `report`.

    Args:
        source (`str` or `Path`): A file, a URL (anything FFmpeg opens), `"-"` for standard input, or `"camera:0"`.
        timeout (`float`, *optional*, defaults to 10.0): Seconds that a camera or URL may take to open, and may be
            silent. `None` for no limit. Files and standard input have none. Named pipes have one.
        reconnect (`bool`, *optional*): Whether to open a live source again when it ends, breaks off or falls silent:
            after half a second, then ever more rarely. Defaults to `True` for cameras and broadcasts only. Standard
            input is never opened again.
        formats (`str`, *optional*): Container formats that may be opened, comma-separated names of FFmpeg. Playlists
            and the like name further files that FFmpeg opens, so uploads should be limited.
        max_pixels (`int`, *optional*): Largest picture, width times height. Larger ones count as spoilt packets.
        report ([`ReadingReport`], *optional*): Where to count; one report may serve several readers.
        stop (`threading.Event`, *optional*): Set it in another thread to end the source at its next packet, or at once
            while it waits to be opened again.

    Attributes:
        container, stream: PyAV's open container and the stream that is read.
        origin (`Fraction`): Second of the container's clock that is second 0 here.
        rate (`Fraction`, *optional*): Average frames per second.
        is_live (`bool`): Whether the source has no end and cannot be read again: a camera, a broadcast or a pipe.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`: If there is no such file.
        `ValueError`: If it cannot be read as video.
        `ImportError`: If PyAV is missing.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        timeout: float | None = 10.0,
        reconnect: bool | None = None,
        formats: str | None = None,
        max_pixels: int | None = None,
        report: ReadingReport | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        if timeout is not None:
            timeout = check_number("timeout", timeout, above=0, unit=" of seconds")
        self.source, self.formats, self.max_pixels = check_source(source), formats, max_pixels
        self.shown = without_secrets(self.source)
        # The end of standard input is final, and its writer may be slow.
        self.timeout = None if self.source == "-" else timeout
        self.reconnect = self.source != "-" and (goes_on(self.source) if reconnect is None else reconnect)
        self.report = ReadingReport() if report is None else report
        self.stop = threading.Event() if stop is None else stop
        self._timeline: _Timeline | None = None
        self._open()
        # One reformatter for all frames: its setup takes ten times as long as a conversion.
        self._reformatter = av.video.reformatter.VideoReformatter()
        self.report.ignored_streams += max(0, len(_pictures(self.container)) - 1)

    def _open(self) -> None:
        limits = {"formats": self.formats, "max_pixels": self.max_pixels}
        self.container = open_container(self.source, timeout=self.timeout, **limits)
        try:
            self.stream = _best_stream(self.container, self.source)
        except ValueError:
            self.container.close()
            raise
        if self.max_pixels is not None:
            self.stream.codec_context.options = {"max_pixels": str(self.max_pixels)}
        self._turn: tuple[int, tuple[int, int, int, int]] | None = None
        self._coded_aspect = self.stream.codec_context.sample_aspect_ratio
        self._aspect = self.stream.sample_aspect_ratio or self._coded_aspect or 1
        start = Fraction(self.container.start_time or 0, 1_000_000)
        # FFmpeg rounds the container's start to microseconds.
        starts = (s.start_time * s.time_base for s in self.container.streams if s.start_time is not None)
        self.origin = next((exact for exact in starts if abs(exact - start) < Fraction(1, 500_000)), start)
        self.rate = self.stream.average_rate or self.stream.guessed_rate or None
        has_end = self.source != "-" and ((self.container.size or 0) > 0 or self.container.duration is not None)
        self.is_live = not (os.path.isfile(self.source) or has_end)
        # Threads that decode frames side by side return them late.
        self.stream.thread_type = "SLICE" if self.is_live else "AUTO"
        # FFmpeg returns memory of such a camera, which goes when it is closed, and writes to it when it is freed.
        self._lends_memory = "v4l2" in self.container.format.name
        self._reading = self.container.demux(self.stream)
        # Why the source broke off, if it did.
        self._failure: ValueError | None = None

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the source."""
        self._reading.close()
        self.container.close()

    @property
    def seconds(self) -> float:
        """Length in seconds: the end of the last picture. `inf` for a live source."""
        if os.path.isfile(self.source):
            return float(self._measured()[0])
        ends = [self.stream.duration * self.stream.time_base] if self.stream.duration else []
        ends += [Fraction(self.container.duration, 1_000_000)] if self.container.duration and not ends else []
        return math.inf if self.is_live or not ends else float(ends[0])

    @property
    def clocks(self) -> list[tuple[Fraction, Fraction, Fraction]]:
        """The container's clocks so far: seconds added to the times of each, and its begin and end without them."""
        return [] if self._timeline is None else self._timeline.clocks

    def frames(self, start: float = 0.0) -> Iterator[tuple[Fraction, Fraction, Any]]:
        """
        Yield time, duration and picture of each frame, from the key frame at or before `start` on.

        Args:
            start (`float`, *optional*, defaults to 0.0): Second of the video. Live sources begin where they are.

        Yields:
            `tuple[Fraction, Fraction, av.VideoFrame]`: Seconds since second 0, which never fall, seconds that the
            frame stays, and the frame, which [`picture`] turns into an array.

        Raises:
            `ValueError`: If no frame can be decoded, or the source breaks off or falls silent; after the frames
            before that.
        """
        end, begin = None, Fraction(start).limit_denominator(1_000_000)
        try:
            for frame in self._decode_live() if self.is_live else self._decode_from(begin):
                self.report.spoilt_frames += bool(frame.is_corrupt)
                self._follow_aspect(frame)
                time, duration = self._timeline.place(frame)
                if end is None and self._timeline.before_key and not self.is_live:
                    self.report.missing_seconds += max(0.0, round(float(time - max(begin, self._timeline.begin)), 2))
                end = time + duration
                yield time, duration, frame
        except av.error.FFmpegError as error:
            raise unreadable(self.source, error) from error
        if self._failure is not None:
            raise self._failure
        if end is None:
            raise ValueError(f"'{self.shown}' has no picture that can be decoded.")
        self._count_missing(end, is_steady=self._timeline.shift == 0)

    def check_file(self) -> None:
        """
        Count in `report` what a file lacks, as [`frames`] does, for those who need no frames. At most one picture is
        decoded, so spoilt frames stay unknown. Packets are counted where only all of them tell the length.
        """
        if os.path.isfile(self.source):
            end, is_steady, found = self._measured()
            for name, count in found.to_dict().items():
                setattr(self.report, name, getattr(self.report, name) + count)
            self._count_missing(end, is_steady=is_steady)

    def _count_missing(self, end: Fraction, *, is_steady: bool) -> None:
        """Count what is missing behind the last picture, torn places, and files that are joined behind this one."""
        missing = self._announced() - end if not self.is_live and is_steady else 0
        self.report.missing_seconds += round(float(missing), 1) if missing > 1 else 0.0
        if os.path.isfile(self.source):
            num_torn, is_cut_off = count_torn(self.source, self.container.format.name)
            self.report.ignored_streams += count_joined(self.source, self.container.format.name)[1]
            self.report.spoilt_packets += num_torn
            self.report.cut_ends += missing <= 1 and is_cut_off

    def picture(self, frame: Any) -> np.ndarray:
        """Return a frame as it is shown: uint8 RGB (height, width, 3), upright, with square pixels."""
        width = max(1, round(frame.width * self._aspect)) if 0.1 <= self._aspect <= 10 else frame.width
        width = frame.width if self.max_pixels is not None and width * frame.height > self.max_pixels else width
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", width=width)
        except av.error.OSError:  # FFmpeg knows no such colours, as in a spoilt header
            frame.colorspace = 2  # unspecified
            rgb = self._reformatter.reformat(frame, format="rgb24", width=width)
        # PyAV's side data and its frame refer to each other, so asking every frame would let frames fill the memory.
        if self._turn is None or self._turn[0] != frame.rotation:
            self._turn = frame.rotation, _display_matrix(frame)
        return np.ascontiguousarray(_upright(rgb.to_ndarray(), *self._turn[1]))

    def _follow_aspect(self, frame: Any) -> None:
        """The container's pixel aspect holds until a key frame brings another one, as in broadcasts."""
        coded = self.stream.codec_context.sample_aspect_ratio
        if frame.key_frame and coded != self._coded_aspect:
            self._coded_aspect, self._aspect = coded, coded or 1

    def _announced(self) -> Fraction:
        """Return the length that the file announces for the picture, or 0."""
        if not os.path.isfile(self.source) and "mp4" not in self.container.format.name:
            # After its short look at a URL, FFmpeg may have guessed the length by the bit rate of the sound.
            return Fraction(0)
        if self.container.format.name == "avi" and self.rate:
            # FFmpeg shortens the length to that of the file. Programs that write to a pipe give 2**30 pictures.
            return self.stream.frames / self.rate if self.stream.frames < 2**30 else Fraction(0)
        length = Fraction(self.container.duration or 0, 1_000_000)
        if self.container.format.name in _HAVE_ONE_END:
            length -= self.origin
        elif self.stream.duration:
            return ((self.stream.start_time or 0) + self.stream.duration) * self.stream.time_base - self.origin
        # Programs that write Matroska and WebM leave a tag with the end of each stream.
        if end := re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,9})?)", self.stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(Fraction, end.groups())
            return min(length, 3600 * hours + 60 * minutes + seconds - self.origin)
        return length if len(self.container.streams) == 1 else Fraction(0)

    def _measured(self) -> tuple[Fraction, bool, ReadingReport]:
        about = os.stat(self.source)
        return _measure(self.source, self.formats, self.max_pixels, about.st_size, about.st_mtime_ns)

    def _decode_from(self, start: Fraction) -> Iterator[Any]:
        """Decode from the key frame at or before `start`, or from the beginning."""
        can_seek = start > 0 and not self.is_live and self.container.format.name not in _SEEKS_WRONG
        if can_seek and os.path.isfile(self.source):
            can_seek = self._measured()[1]
        elif can_seek and has_flag(self.container, MAY_CHANGE_CLOCKS):
            # FFmpeg finds the place in a playlist by the lengths of its parts.
            can_seek = self.container.format.name == "hls"
        for back in (0, 2, 10, 60) if can_seek else ():
            frames = self._seek(start - back)
            first = next(frames, None) if start > back else None
            time = None if first is None else self._timeline.time(first)
            if time is not None and time <= start:
                yield first
                yield from frames
                return
        if can_seek or (self._timeline is not None and not self.is_live):
            self.container.close()
            self._open()
        yield from self._decode()

    def _decode_live(self) -> Iterator[Any]:
        """Decode a live source. With `reconnect`, open it again when it ends, breaks off or falls silent."""
        wait = _FIRST_WAIT
        while not self.stop.is_set():
            try:
                for frame in self._decode():
                    yield frame
                    if self.stop.is_set():
                        return
                    wait = _FIRST_WAIT
            except av.error.FFmpegError as error:
                self._failure = unreadable(self.source, error)
            if not self.reconnect or self.stop.is_set():
                return
            logger.warning(f"{self._failure or f'{self.shown!r} ended.'} Opening it again.")
            self.container.close()
            while not self.stop.wait(wait):
                # Try ever more rarely.
                wait = min(2 * wait, _LONGEST_WAIT)
                with suppress(ValueError):
                    self._open()
                    self.report.reconnections += 1
                    break

    def _seek(self, time: Fraction) -> Iterator[Any]:
        """Decode from a place near `time` on, beginning with a key frame."""
        try:
            self.container.seek(int((time + self.origin) / self.stream.time_base), stream=self.stream)
            yield from dropwhile(lambda frame: not frame.key_frame, self._decode())
        except (av.error.FFmpegError, OverflowError):
            # There is no such place, or no frame from there on.
            return

    def _decode(self) -> Iterator[Any]:
        """Decode from here on, without spoilt packets, which are counted. Raise the last error if nothing is left."""
        is_empty, error, is_jpeg = True, None, "jpeg" in self.stream.codec_context.name
        for packet, failure in self._packets():
            # Part of a packet at the end of a file costs the decoder the frames around it. In the formats that
            # are made for broadcasting, the decoder repairs such packets.
            is_cut = packet is not None and packet.is_corrupt and not has_flag(self.container, MAY_CHANGE_CLOCKS)
            # A few bytes make another scan of a JPEG picture, and each takes as long to decode.
            is_cut |= is_jpeg and packet is not None and bytes(packet).count(b"\xff\xda") > _MOST_SCANS
            try:
                frames = () if packet is None or is_cut else packet.decode()
            except (av.error.FFmpegError, ValueError) as broken:  # PyAV 19 raises both if it cannot open a decoder
                # A traceback would keep the decoder and its threads alive, which a forked process cannot free.
                frames, failure = (), broken.with_traceback(None)
            self.report.spoilt_packets += failure is not None or is_cut
            error = failure if isinstance(failure, av.error.FFmpegError) else error
            is_empty = is_empty and not frames
            yield from frames
        held = ()
        with suppress(av.error.FFmpegError, ValueError):
            # After errors, the last packet did not come, which makes the decoder return what it holds.
            held = self.stream.codec_context.decode(None)
        yield from held
        if is_empty and not held and error is not None:
            raise error

    def _packets(self) -> Iterator[tuple[Any, Exception | None]]:
        """Yield packets, or the errors of those that cannot be read, until the source ends or breaks off."""
        errors, is_file = 0, os.path.isfile(self.source)
        self._timeline = _Timeline(self, self._timeline if self.is_live else None)
        limit, asked = math.inf if is_file or self.timeout is None else self.timeout, clock.monotonic()
        silent = ValueError(f"'{self.shown}' sent nothing for {limit:g} s.")
        while errors < _MOST_ERRORS:
            # Sound between rare pictures is no silence: the time limit is for all streams.
            packets, error = self.container.demux(*[self.stream] * is_file), None
            self._reading = packets
            try:
                while not self.stop.is_set() and self._failure is None and (packet := next(packets, None)) is not None:
                    errors, waited = 0, clock.monotonic() - asked
                    packet = _copied(packet) if self._lends_memory else packet
                    # FFmpeg returns headers of VP8 where another Ogg file is joined.
                    is_header = 0 < packet.size < 256 and bytes(packet)[:5] == b"OVP80"
                    if self._lends_memory and not packet.size:
                        # A decoder would take an empty picture for the end.
                        self.report.spoilt_packets += 1
                    elif packet.stream.index == self.stream.index and not is_header:
                        yield self._timeline.mend(packet), None
                    # FFmpeg returns what it has of a packet when the time is over.
                    self._failure = silent if waited >= limit else None
                    asked = clock.monotonic()
            except av.error.FFmpegError as raised:
                error = raised
            except IndexError:
                # PyAV does so at the end of a file in which further streams begin later.
                self.report.ignored_streams += 1
            # Opening took all the time, and FFmpeg gave up.
            waited = math.inf if isinstance(error, av.error.ExitError) else clock.monotonic() - asked
            self._failure = self._failure or (silent if waited >= limit else None)
            if error is None or self._failure is not None or self.stop.is_set():
                return
            if isinstance(error, BlockingIOError):
                # A camera has no picture yet.
                self.stop.wait(0.005)
                continue
            if not is_file and isinstance(error, OSError):
                # FFmpeg also reports the end of an answer without a length as `EIO`.
                if not (self.is_live and error.errno == errno.EIO):
                    self._failure = ValueError(f"'{self.shown}' ended early: {error.strerror}.")
                return
            errors += 1
            yield None, error
            asked = clock.monotonic()


class _Timeline:
    """
    Puts packets and frames on one clock, which never goes back.

    Only packets, in decoding order, show where a clock jumps: a decoder that meets errors changes the order of frames.
    """

    def __init__(self, reader: Any, before: "_Timeline | None" = None) -> None:
        self.report, self.origin, self.time_base = reader.report, reader.origin, reader.stream.time_base
        self.codec = reader.stream.codec_context
        rate = reader.stream.guessed_rate or reader.rate
        self.usual = 1 / rate if rate else Fraction(1, 25)
        changes = reader.is_live or has_flag(reader.container, MAY_CHANGE_CLOCKS)
        self.longest = _LONGEST_GAP if changes else _LONGEST_STILL
        # FFmpeg makes up the other times of AVI. Without them, frames come at the times of decoding, in order.
        self.has_only_decoding_times = reader.container.format.name == "avi"
        # FLV stores none, and after a seek FFmpeg returns a millisecond.
        self.has_durations = reader.container.format.name not in ("avi", "flv")
        # A live source goes on by the wall clock. Standard input may come faster.
        self.is_live = self.is_new = reader.is_live and reader.source != "-"
        self.has_stamps = not (self.is_live and has_flag(reader.container, NO_TIMESTAMPS))
        self.shift, self.clocks = 0, []
        self.decoded: tuple[Fraction, Fraction] | None = before and before.decoded
        self.shown, self.next = (before.shown, before.next) if before else (None, Fraction(0))
        # When the last picture so far is shown no longer.
        self.shown_until = Fraction(0)
        # By how much packets arrive after their time: some are held until the next one comes.
        self.delays: deque[Fraction] = before.delays if before else deque(maxlen=16)
        # Decoders repair damaged packets of these formats in silence. The second is the number of packets since one.
        self.repairs, self.since_damage = has_flag(reader.container, MAY_CHANGE_CLOCKS), None
        # When the first packet is shown. Seconds of packets before the first key frame, and before the first time.
        self.begin, self.before_key, self.untimed, self.has_key = None, Fraction(0), Fraction(0), False

    def mend(self, packet: Any) -> Any:
        """Move the times of a packet so that they go on from the previous packet's."""
        known = len(self.clocks)
        if self.has_only_decoding_times:
            packet.pts = None
        shown = self.time(packet)
        self.begin = (shown or Fraction(0)) if self.begin is None else self.begin
        self.has_key |= packet.is_keyframe
        self.before_key += 0 if self.has_key else self.duration(packet)
        if self.decoded is None and shown is None:
            self.untimed += self.duration(packet)
        elif self.decoded is None and self.untimed:
            # Second 0 is as long before the first time as there are packets before it.
            self.origin += min(Fraction(0), shown - self.untimed)
        now = Fraction(round(clock.monotonic() * 1e6), 1_000_000)
        if not self.has_stamps and packet.size:
            packet.pts, packet.dts = None, round(now / self.time_base)
        duration, resumed = self.duration(packet), self.decoded[1] if self.decoded else self.next
        if self.is_live and self.delays:
            resumed = max(resumed, now - min(self.delays))
        if packet.dts is None and self.is_new and packet.size:
            self.decoded, self.next = (resumed, resumed + duration), resumed
        if packet.dts is not None:
            time = (packet.dts + self.shift) * self.time_base - self.origin
            last, due = self.decoded or (max(time, -self.longest),) * 2
            # By how much the picture is shown after it is decoded.
            ahead = ((packet.dts if packet.pts is None else packet.pts) - packet.dts) * self.time_base
            # In a second part of Matroska, FFmpeg takes the times of B-frames, which go back, for those of decoding.
            is_reordered = packet.dts == packet.pts and self.codec.has_b_frames
            back = max(_STEP_BACK, 16 * self.usual) if is_reordered else _STEP_BACK
            if self.is_new or time - due > self.longest or last - time >= back:
                if packet.is_keyframe and 0 <= ahead < _STEP_BACK * 10 and not self.is_live:
                    # It is shown when the last picture before it ends, also if pictures are decoded in another order.
                    resumed = self.shown_until - ahead
                self.shift += round((resumed - time) / self.time_base)
                self.report.mended_times += not self.is_new
                time, self.is_new = resumed, False
            elif not self.is_live and time - due >= max(_SHORTEST_GAP, 3 * self.usual):
                self.report.gap_seconds += round(float(time - due), 3)
            self.decoded = time, time + duration
            self.shown_until = max(self.shown_until, time + ahead + duration)
            self.delays.append(now - time)
            shift = self.shift * self.time_base
            stamp = time + self.origin - shift
            if not self.clocks or self.clocks[-1][0] != shift:
                self.clocks.append((shift, stamp, stamp))
            self.clocks[-1] = *self.clocks[-1][:2], max(self.clocks[-1][2], stamp + duration)
            if packet.pts is not None and abs(packet.pts - packet.dts) * self.time_base > self.longest:
                packet.pts, self.report.mended_times = None, self.report.mended_times + 1
        if self.shift:
            packet.pts = None if packet.pts is None else packet.pts + self.shift
            packet.dts = None if packet.dts is None else packet.dts + self.shift
        self._count_damage(packet, is_new_clock=len(self.clocks) > known > 0)
        # FFmpeg hides packets of a second mp4 as their clock goes back.
        return _copied(packet) if packet.is_discard and self.shift else packet

    def _count_damage(self, packet: Any, *, is_new_clock: bool) -> None:
        """Count a damaged packet when four more have come. A new clock before that is where two videos were joined."""
        if self.since_damage is not None:
            self.since_damage = None if is_new_clock else self.since_damage + 1
        elif self.repairs and packet.is_corrupt:
            self.since_damage = 0
        if self.since_damage is not None and (self.since_damage == 4 or packet.size == 0):
            self.since_damage, self.report.spoilt_packets = None, self.report.spoilt_packets + 1

    def place(self, frame: Any) -> tuple[Fraction, Fraction]:
        """Return when a frame is shown and for how long, in seconds."""
        time, duration = self.time(frame), self.duration(frame)
        follows_lost = self.shown is None and frame.key_frame and not self.is_live
        time = max(self.next, self.before_key * follows_lost) if time is None else time
        if time < (least := self.shown or Fraction(0)):
            time, self.report.mended_times = least, self.report.mended_times + 1
        self.shown, self.next = time, time + duration
        return time, duration

    def time(self, item: Any) -> Fraction | None:
        stamp = item.dts if item.pts is None else item.pts
        return None if stamp is None else stamp * (item.time_base or self.time_base) - self.origin

    def duration(self, item: Any) -> Fraction:
        duration = (item.duration or 0) * (item.time_base or self.time_base)
        return duration if 0 < duration < _LONGEST_STILL and self.has_durations else self.usual


@lru_cache(maxsize=1024)
def _measure(
    source: str, formats: str | None, max_pixels: int | None, *_: int
) -> tuple[Fraction, bool, ReadingReport]:
    """
    Return the end of a file's last picture in seconds, whether places can be sought by their times, and what was met
    if all packets had to be read. Decodes only the first picture, of AVI and of a file without a key frame before it.
    """
    limits, late = {"formats": formats, "max_pixels": max_pixels}, Fraction(0)
    with VideoReader(source, **limits) as reader:
        first, timeline = next(reader._packets(), (None, None))[0], reader._timeline
        if first is not None and (timeline.has_only_decoding_times or timeline.before_key):
            with suppress(ValueError):
                # The pictures of AVI come as late as the first one.
                late = (next(reader.frames())[0] - timeline.begin) * (not timeline.before_key)
        lost = ReadingReport(missing_seconds=reader.report.missing_seconds)
        container, stream = reader.container, reader.stream
        announced = stream.duration and stream.duration + (stream.start_time or 0)
        announced = announced or (container.duration and int((container.duration / 1e6) / stream.time_base))
        changes = has_flag(container, MAY_CHANGE_CLOCKS) or count_joined(source, container.format.name)[0] > 0
        if announced and not changes and not timeline.untimed:
            with suppress(av.error.FFmpegError):
                container.seek(announced, stream=stream)
                if (end := _last_end(reader)[0]) > 0:
                    return end + late, True, lost
    with VideoReader(source, report=lost, **limits) as reader:
        lost.ignored_streams = 0
        end, is_steady = _last_end(reader)
        return end + late, is_steady, lost


def _last_end(reader: VideoReader) -> tuple[Fraction, bool]:
    """Read packets to the end; return the last end of a picture, and whether the clock never changed."""
    latest, end = Fraction(-1), Fraction(0)
    for packet, _ in reader._packets():
        if packet is None or packet.size == 0 or packet.is_discard or packet.is_corrupt:
            continue
        shown = reader._timeline.time(packet)
        shown = end if shown is None else shown
        # The duration of a packet holds in decoding order, so only the last picture's is used.
        if shown > latest:
            latest, end = shown, shown + reader._timeline.duration(packet)
    return end, reader._timeline.shift == 0 == reader._timeline.untimed


def read_video(
    video: Any,
    *,
    fps: float = 2.0,
    start: float = 0.0,
    end: float | None = None,
    timeout: float | None = 10.0,
    reconnect: bool | None = None,
    report: ReadingReport | None = None,
    stop: threading.Event | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """
    Play a video at a frame rate: yield the frame on screen at each tick.

    Files, URLs and cameras are decoded as they play, with one frame in memory at a time; see [`VideoReader`].

    Args:
        video (`str`, `Path`, [`VideoReader`], array, tensor or iterable): A file, a URL (anything FFmpeg opens), `"-"`
            for standard input, `"camera:0"` (on Linux and macOS), an open reader, which is closed at the end, an array
            (frames, height, width, 3), or an iterable of frames or of pairs (time, frame).
        fps (`float`, *optional*, defaults to 2.0): Ticks per second. Frames without a time are read at this rate.
        start (`float`, *optional*, defaults to 0.0): Second of the first tick.
        end (`float`, *optional*): Second after which to stop. Defaults to the end of the video.
        timeout, reconnect, report, stop (*optional*): See [`VideoReader`]. An open reader has its own.

    Yields:
        `tuple[float, np.ndarray]`: Seconds since the beginning of the video, and the frame. Frames of files and URLs
        are uint8 RGB arrays (height, width, 3); others stay as they are. If the picture begins later than the video,
        its first frame is shown until then. While a live source is away, nothing is on screen.

    Raises:
        `ValueError`: If `fps`, `start`, `end` or `timeout` is out of range, the video has no readable frame, or the
            source breaks off or falls silent; the frames before that are yielded first.
        `FileNotFoundError`, `IsADirectoryError`: If there is no such file.
        `ImportError`: If PyAV is missing and the video is not a sequence of frames.
        `TypeError`: If the video is an open file, or its bytes.
    """
    fps, start = check_fps(fps), check_seconds("start", start, least=0)
    if isinstance(video, (bytes, bytearray, IOBase)):
        raise TypeError(f"A video is a path, a URL, or frames, got {type(video).__name__}: give the file's path.")
    end = None if end is None else check_seconds("end", end, least=start)
    is_source, source = isinstance(video, (str, Path, VideoReader)), getattr(video, "source", video)
    options = {"timeout": timeout, "reconnect": reconnect, "report": report, "stop": stop}
    frames = _play(video, fps, start, **options) if is_source else _pace(video, fps, start)
    is_empty = True
    for time, frame in frames:
        if end is not None and time > end:
            break
        is_empty = False
        yield time, frame
    if is_empty:
        name = f"'{without_secrets(str(source))}'" if is_source else f"The {type(video).__name__} given as video"
        raise ValueError(f"{name} has no frame from {start} s on.")


def _pace(frames: Iterable[Any], fps: float, start: float) -> Iterator[tuple[float, Any]]:
    for index, item in enumerate(frames):
        time, frame = item if isinstance(item, tuple) and len(item) == 2 else (index / fps, item)
        time = check_seconds(f"video[{index}] time", time)
        if time >= start - 1e-9:
            yield time, frame


def _play(
    source: str | Path | VideoReader, fps: float, start: float, **options: Any
) -> Iterator[tuple[float, np.ndarray]]:
    # Ticks are exact: at 30000/1001 fps, rounding errors of floats would in time select a neighbouring frame.
    tick, index = 1 / (Fraction(fps).limit_denominator(100_000) or Fraction(fps)), 0
    begin = Fraction(start).limit_denominator(1_000_000)
    shown, shown_until = None, begin
    with source if isinstance(source, VideoReader) else VideoReader(source, **options) as reader:
        reconnections = reader.report.reconnections
        for time, duration, frame in reader.frames(start):
            was_away, reconnections = reader.report.reconnections > reconnections, reader.report.reconnections
            while begin + index * tick < (shown_until if was_away else time):
                yield float(begin + index * tick), reader.picture(frame if shown is None else shown)
                index += 1
            index = max(index, math.ceil((time - begin) / tick)) if was_away else index
            shown, shown_until = frame, time + duration
        while shown is not None and begin + index * tick < shown_until:
            yield float(begin + index * tick), reader.picture(shown)
            index += 1


def _copied(packet: Any) -> Any:
    copy = av.Packet(bytes(packet))
    for name in ("stream", "time_base", "pts", "dts", "duration", "is_keyframe", "is_corrupt"):
        setattr(copy, name, getattr(packet, name))
    return copy


def _pictures(container: Any) -> list[Any]:
    """Return the video streams that are not cover pictures and have a decoder."""
    cover = av.stream.Disposition.attached_pic
    return [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]


def _best_stream(container: Any, source: str) -> Any:
    """Return the video stream that a player would show."""
    default = av.stream.Disposition.default
    best = max(_pictures(container), key=lambda s: (bool(s.disposition & default), s.width * s.height), default=None)
    if best is None:
        cover = av.stream.Disposition.attached_pic
        unread = {s: "cover picture" if s.disposition & cover else "unknown codec" for s in container.streams.video}
        kinds = ", ".join(sorted({unread.get(s, s.type) for s in container.streams})) or "none"
        raise ValueError(f"'{without_secrets(source)}' has no video stream (streams: {kinds}).")
    return best


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return a, b, c and d of the display matrix: source x, y go to a x + c y, b x + d y."""
    try:
        side_data = frame.side_data
    except ValueError:
        side_data = _without_unknown_side_data(frame).side_data
    if "DISPLAYMATRIX" not in side_data:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)[:5].tolist()
    return a, b, c, d


def _upright(array: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Apply a display matrix to a picture (height, width, 3)."""
    if abs(b) > abs(a):
        array, a, d = array.swapaxes(0, 1), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _without_unknown_side_data(frame: Any) -> Any:
    """Remove side data that PyAV has no name for, such as the EXIF data of a photo: it cannot read the rest then."""
    known = {kind.value for kind in av.sidedata.sidedata.Type}
    graph = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height}
    source = graph.add_buffer(**size, format=frame.format.name, time_base=frame.time_base or Fraction(1))
    removals = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in range(64) if kind not in known]
    graph.link_nodes(source, *removals, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


__all__ = ["ReadingReport", "VideoReader", "read_video"]
