# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Cut clips out of a video file without encoding it again."""

import os
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av

from videollm_mod.outputs import replacing
from videollm_mod.space.uploads import demux
from videollm_mod.video_reading_videollm_mod import VideoReader


# Seconds between which sound may be stored away from its picture.
_APART = 2
# FFmpeg's format by the suffix of a clip. Other sources become Matroska, which holds nearly everything.
_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".ts": "mpegts", ".mkv": "matroska"}
_MP4 = (".mp4", ".m4v", ".mov")


@dataclass(frozen=True)
class Clip:
    """A clip that was written, and the seconds of the video between which it lies."""

    path: Path
    start: float
    end: float


@dataclass(frozen=True)
class _Picture:
    """A packet of a picture: its time and its end, in seconds of the video. A hidden one is there for others."""

    time: Fraction
    end: Fraction
    is_key: bool
    is_shown: bool


class ClipCutter:
    """
    Copies packets of a video file, so that a clip has exactly the pictures and the sound of the source.

    A clip begins at the key frame at or before its start, because later pictures need that one. It ends at the first
    place from its end on where no earlier picture is still to come. Its times start at 0.

    Args:
        video (`str` or `Path`): The file.
        folder (`Path`): Where to write. It is made if it is missing.

    Raises:
        `ValueError`: If the file cannot be cut, or the folder cannot be written.
    """

    def __init__(self, video: str | Path, folder: Path) -> None:
        if not os.path.isfile(video):
            raise ValueError("--clips needs a video file, because the frames of a live source are not stored.")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--clips needs a folder to write to, and '{folder}' is a file.")
        self.video, self.folder = Path(video), folder
        self.suffix = self.video.suffix.lower() if self.video.suffix.lower() in _FORMATS else ".mkv"
        self.pictures = _list_pictures(self.video)
        self.first_shown = min((picture.time for picture in self.pictures if picture.is_shown), default=Fraction(0))
        if not all(picture.is_shown for picture in self.pictures) and self.suffix not in _MP4:
            self.suffix = ".mov"  # other containers would show what is trimmed away
        # For each packet, the time of the earliest picture from it on.
        self.earliest_left = [*accumulate((picture.time for picture in reversed(self.pictures)), min)][::-1]
        self.key_frames = [index for index, picture in enumerate(self.pictures) if picture.is_key]
        if not self.key_frames:
            raise ValueError(f"--clips cannot cut '{video}': it has no key frame.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".") as trial:
                self._write(*self._choose(0, 0), Path(trial, "part"))
        except OSError as error:
            raise ValueError(f"--clips cannot write to '{folder}': {error.strerror or error}.") from None

    def cut(self, start: float, end: float) -> Clip:
        """
        Write the clip of a moment. An earlier clip of the same seconds of the same file is replaced.

        Raises:
            `OSError`, `ValueError`: If it cannot be written.
        """
        first, last = self._choose(start, end)
        # Videos of several folders may have one name.
        source = sha256(os.fsencode(self.video.resolve())).hexdigest()[:8]
        path = self.folder / f"{self.video.stem}-{source}_{start:g}s-{end:g}s{self.suffix}"
        with replacing(path) as part:
            self._write(first, last, part)
        return Clip(path, float(self._begin(first)), float(self._end(first, last)))

    def _choose(self, start: float, end: float) -> tuple[int, int]:
        """Return the indices of the first picture of a clip, and of the last one in decoding order."""
        pictures = self.pictures
        first = max((i for i in self.key_frames if pictures[i].time <= start), default=self.key_frames[0])
        latest = pictures[first].time
        for last in range(first, len(pictures) - 1):
            latest = max(latest, pictures[last].time)
            if self.earliest_left[last + 1] >= max(latest, end) and latest >= self._begin(first):
                return first, last
        return first, len(pictures) - 1

    def _begin(self, first: int) -> Fraction:
        return max(self.pictures[first].time, self.first_shown)

    def _end(self, first: int, last: int) -> Fraction:
        return max(picture.end for picture in self.pictures[first : last + 1] if picture.is_shown)

    def _write(self, first: int, last: int, part: Path) -> None:
        try:
            for seeks in (True, False):
                options = {"movflags": "+faststart"} if self.suffix in _MP4 else {}
                with (
                    VideoReader(self.video) as reader,
                    av.open(f"file:{part}", "w", format=_FORMATS[self.suffix], options=options) as target,
                ):
                    if self._copy(reader, target, first, last, seeks=seeks):
                        return
        except OSError:
            raise  # The disk is full, or the file is gone.
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{self._cannot}: {reason}. Convert it to an mp4 first.") from error
        raise ValueError(f"{self._cannot}: it has changed.")

    @property
    def _cannot(self) -> str:
        return f"--clips cannot cut '{self.video}' without encoding it again"

    def _copy(self, reader: Any, target: Any, first: int, last: int, *, seeks: bool) -> bool:
        """Copy the packets. Return False if the container does not find the first one."""
        source, picture = reader.container, reader.stream
        sound = source.streams.best("audio", related=picture)
        streams = [picture] if sound is None else [picture, sound]
        copies = {stream.index: target.add_stream_from_template(stream, opaque=True) for stream in streams}
        if self.suffix in _MP4 and picture.codec_context.codec_tag == "hvc1":
            # FFmpeg's own choice is hev1, which QuickTime and Safari do not play.
            copies[picture.index].codec_context.codec_tag = "hvc1"
        key, begin, end = self.pictures[first].time, self._begin(first), self._end(first, last)
        missing = last - first + 1
        if seeks:
            with suppress(av.error.FFmpegError):
                source.seek(int((begin - _APART + reader.origin) / picture.time_base), stream=picture)
        for packet in demux(source, *streams):
            if not packet.size:
                continue
            time = _time(packet, reader)
            if packet.stream.index == picture.index:
                is_begin = packet.is_keyframe and time == key
                is_inside = missing > 0 and (is_begin or missing <= last - first)
                missing -= is_inside
                # Pictures shown before the first one need those before it.
                is_inside = is_inside and time >= key
            else:
                is_inside = begin <= time < end
            if is_inside:
                for name in ("pts", "dts"):
                    if (stamp := getattr(packet, name)) is not None:
                        setattr(packet, name, stamp - round((begin + reader.origin) / packet.time_base))
                packet.stream = copies[packet.stream.index]
                target.mux(packet)
            elif missing == 0 and (sound is None or time >= end + _APART):
                break
        return missing == 0


def _time(packet: Any, reader: Any) -> Fraction:
    """Return the time of a packet in seconds of the video."""
    stamp = packet.dts if packet.pts is None else packet.pts
    return (0 if stamp is None else stamp) * packet.time_base - reader.origin


def _list_pictures(video: Path) -> list[_Picture]:
    """List the packets of the pictures in decoding order. Decodes nothing."""
    pictures: list[_Picture] = []
    with VideoReader(video) as reader:
        usual = 1 / reader.rate if reader.rate else Fraction(1, 25)
        try:
            for packet in demux(reader.container, reader.stream):
                if packet.size:
                    time, duration = _time(packet, reader), (packet.duration or 0) * packet.time_base or usual
                    pictures.append(_Picture(time, time + duration, packet.is_keyframe, not packet.is_discard))
        except av.error.FFmpegError:
            pass  # The reader decides below whether it reads further.
        while pictures and not pictures[-1].is_shown:
            pictures.pop()  # none needs it
        shown = [picture for picture in pictures if picture.is_shown]
        start, end = min((x.time for x in shown), default=0), max((x.time for x in shown), default=0)
        is_joined = any(start < picture.time < end for picture in pictures if not picture.is_shown)
        # The reader closes gaps and mends times. Packets cannot be found by such times.
        if is_joined or abs(max((x.end for x in shown), default=0) - Fraction(reader.seconds)) > 1:
            raise ValueError(f"--clips cannot cut '{video}': its clock changes, or it is damaged.")
    return pictures


__all__ = ["Clip", "ClipCutter"]
