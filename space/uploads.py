# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on uploaded videos and pictures, checked before anything else reads them."""

import io
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


# FFmpeg detects formats by content. Other formats, such as playlists, may name further files that FFmpeg opens.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv,gif,apng,ogg,mpeg,mpegvideo,m4v,h264,hevc,ivf"
PICTURES = ("JPEG", "PNG", "WEBP")
# Cameras write a dozen scans of a JPEG picture at most. A dozen bytes make another one, which takes as long to decode.
MOST_SCANS = 100
# Half an hour at 240 frames a second, with sound, has about half as many packets. FFmpeg needs 24 bytes for each.
MOST_PACKETS = 1_000_000
# High-speed cameras save up to 1000 pictures a second. A file times each picture, and its header may be wrong.
MOST_PER_SECOND = 2000
# FFmpeg's flag of a format without times.
NO_TIMESTAMPS = 0x80
# Tables in the index of an mp4 that can announce any number of packets in a few bytes, and what belongs to them.
_TABLES = re.compile(rb"trak|hdlr|stts|stsz|stz2|elst|trun|cmov")


class TooMuchError(ValueError):
    """A file that would take too long to read."""


def open_picture(data: bytes | bytearray) -> Image.Image:
    """
    Open a JPEG, PNG or WebP file, without decoding it.

    Raises:
        [`TooMuchError`]: If it is a JPEG picture of so many scans that it would take minutes to decode.
        `PIL.UnidentifiedImageError` and others of Pillow: If it is not such a file.
    """
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MOST_SCANS:
        raise TooMuchError(f"The picture has more than {MOST_SCANS} scans: save it as a baseline JPEG file.")
    return Image.open(io.BytesIO(data), formats=PICTURES)


def announces_too_much(path: str | Path) -> bool:
    """Return whether the index of an mp4 announces more packets than a video has. FFmpeg would fill the memory."""
    if Path(path).stat().st_size == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        num_packets, tracks = 0, [_Track()]
        for number, (begin, end) in enumerate(_boxes(content)):
            for kind, at in _tables(content, begin, end):
                if kind == b"trak":
                    tracks.append(_Track())
                elif kind == b"trun":
                    num_packets += _number(content, at + 4)
                else:
                    tracks[-1].read(kind, content, at)
            total = num_packets + sum(track.num_entries for track in tracks)
            # `cmov` is an index that is compressed itself. No program has written it for twenty years.
            if number > MOST_PACKETS or total > MOST_PACKETS or tracks[-1].is_hidden:
                return True
    return False


class _Track:
    """What a track of an mp4 announces."""

    def __init__(self) -> None:
        self.num_samples, self.num_edits, self.kinds, self.is_pcm, self.is_hidden = 0, 1, set(), None, False

    def read(self, kind: bytes, content: mmap.mmap, at: int) -> None:
        """Read a table. It begins with four bytes of version and flags."""
        if kind == b"hdlr":
            self.kinds.add(content[at + 8 : at + 12])
        elif kind == b"stts":
            # One sample of each is a number of sound, and FFmpeg reads a thousand at once.
            is_pcm = _number(content, at + 4) == 1 == _number(content, at + 12)
            self.is_pcm = is_pcm and self.is_pcm is not False
        elif kind == b"elst":
            self.num_edits += _number(content, at + 4)
        elif kind == b"cmov":
            self.is_hidden = True
        else:
            self.num_samples += _number(content, at + 8)

    @property
    def num_entries(self) -> int:
        """Entries of FFmpeg's index. Each edit may show all samples."""
        is_pcm = self.is_pcm and self.kinds == {b"soun"}
        return self.num_edits * (self.num_samples // 1000 if is_pcm else self.num_samples)


def _boxes(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield begin and end of what FFmpeg may read as boxes of an mp4, without the media data."""
    at, size = 0, 8
    while size >= 8 and at + 8 <= len(content):
        size, kind, begin = _number(content, at), content[at + 4 : at + 8], at + 8
        if size == 1:
            size, begin = int.from_bytes(content[begin : begin + 8], "big"), begin + 8
        size = size or len(content) - at
        if kind != b"mdat" and kind.isascii() and kind.decode().isprintable():
            # The name belongs to the box: a table may stand outside all others.
            yield at, min(at + size, len(content))
        else:
            yield begin, begin
        at += size


def _tables(content: mmap.mmap, begin: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Yield the names of tables and the places of their content."""
    for found in _TABLES.finditer(content, begin, end):
        at = found.start()
        size = _number(content, at - 4) if at >= 4 else 8
        if size < 2 or 8 <= size <= end - at + 4:
            yield found[0], found.end() + 8 * (size == 1)


def _number(content: mmap.mmap, at: int) -> int:
    return int.from_bytes(content[at : at + 4], "big")


def demux(container: Any, *streams: Any) -> Iterator[Any]:
    """
    Yield the packets of an open file, of all streams or of those that are given.

    Args:
        container (`av.container.InputContainer`): The file.
    """
    # PyAV raises it at the end of a file in which further streams begin later.
    with suppress(IndexError):
        yield from container.demux(*streams)


def has_too_much(reader: Any) -> bool:
    """Return whether an open video has too many packets, or too many pictures in a second. Decodes nothing."""
    # Where a file has times, FFmpeg guesses the rate of its clock for one picture, or for pictures at uneven times.
    if reader.container.format.flags & NO_TIMESTAMPS and (reader.stream.guessed_rate or 0) > MOST_PER_SECOND:
        return True
    seconds = Counter()
    for number, packet in enumerate(demux(reader.container)):
        if packet.stream.index == reader.stream.index and packet.dts is not None:
            seconds[packet.dts * packet.time_base // 1] += 1
        if number > MOST_PACKETS:
            return True
    return max(seconds.values(), default=0) > MOST_PER_SECOND


@dataclass(frozen=True)
class Limits:
    """
    Limits on a video.

    Args:
        megabytes (`int`): Largest file.
        seconds (`float`): Longest video.
        pixels (`int`): Largest picture, width times height.
        compared (`float`): Seconds of a video that the comparison shows.
        burnt (`float`): Longest video for burnt-in captions, in seconds.
        burnt_pixels (`int`): Largest picture with burnt-in captions, width times height. Larger ones are shrunk.
    """

    megabytes: int = 200
    seconds: float = 1800.0
    pixels: int = 4096 * 2304
    compared: float = 60.0
    burnt: float = 300.0
    burnt_pixels: int = 1280 * 720

    def check(self, path: str | Path, open_video: Callable[..., Any]) -> float:
        """
        Return the length of a video in seconds.

        Args:
            path (`str` or `Path`): The file.
            open_video (`Callable`): Opens it, as `processor.open_video` does.

        Raises:
            `ValueError`: If the file is not a video or exceeds a limit. The message is for the person who uploaded it.
        """
        size = Path(path).stat().st_size
        if size > self.megabytes * 1_000_000:
            raise ValueError(f"This file has {size / 1e6:.0f} MB. The limit is {self.megabytes} MB: cut or shrink it.")
        checked = {"formats": FORMATS, "max_pixels": self.pixels}
        is_too_much = announces_too_much(path)
        try:
            if not is_too_much:
                with open_video(path, **checked) as reader:
                    is_too_much = has_too_much(reader)
            if is_too_much:
                raise TooMuchError("This video has too many frames, or too many in a second. Save it again.")
            with open_video(path, **checked) as reader:
                largest = max(reader.container.streams.video, key=lambda stream: stream.width * stream.height)
                is_small = largest.width * largest.height <= self.pixels
                seconds = reader.seconds if is_small and next(reader.frames(), None) else 0.0
        except TooMuchError:
            raise
        except ValueError as error:
            if "has no video stream" in str(error):
                raise ValueError("This file has no video stream. Choose a video.") from None
            raise ValueError("This file cannot be read as a video. Choose an mp4, webm or mov.") from None
        if is_small and not seconds:
            raise ValueError("This file has no readable frame. Choose another one.")
        if not is_small:
            raise ValueError(f"This video has {largest.width}x{largest.height} pixels. Choose a smaller one.")
        if seconds > self.seconds:
            raise ValueError(f"This video lasts {seconds / 60:.0f} min. The limit is {self.seconds / 60:.0f} min.")
        return seconds
