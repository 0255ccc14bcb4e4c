# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Open a video: a file, a URL, a camera, a pipe or standard input, within a time limit."""

import difflib
import errno
import io
import os
import platform
import re
import select
import shutil
import socket
import sys
import tempfile
import time as clock
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from transformers.utils import is_av_available


if is_av_available():
    import av

    # PyAV 19 always accepts metadata that is not Unicode. Older versions need an option.
    open_input = partial(av.open, **({"metadata_errors": "replace"} if int(av.__version__[:2]) < 19 else {}))
_CAMERA_NAMES = ("/dev/video", "camera:")
_BROADCASTS = (*_CAMERA_NAMES, "rtmp:", "rtmps:", "rtp:", "rtsp:", "rtsps:", "srt:", "udp:")
# FFmpeg's input format and name of a numbered camera.
_CAMERAS = {"Linux": ("v4l2", "/dev/video{}"), "Darwin": ("avfoundation", "{}")}
# Protocols of a web address. A playlist names further addresses, and FFmpeg itself limits local ones to local files.
_WEB = "crypto,data,http,https,httpproxy,tcp,tls"
_FLV = re.compile(rb"FLV[\x01-\x04].\0\0\0\t", re.DOTALL)
# An element of Matroska: its name, one of four bytes around clusters or one of those in a cluster, and its length.
_ELEMENT = re.compile(rb"([\x10-\x1f]...|[\xa0\xa3\xa7\xab\xaf\xbf\xe7\xec]|XT)([^\0].*)", re.DOTALL)
_CLUSTER, _SEGMENT = re.compile(rb"\x1fC\xb6u"), b"\x18S\x80g"
# A password may have any sign, also "@". Behind a "?" it could be a password or a query, and none of that is shown.
_SECRETS = re.compile(r"(?<=:)(?:.*\?.*@.*|.*(?=@))|(?<=\?).+", re.DOTALL)
HOST = re.compile(r"^\w+://(?:[^/@]*@)?(\[[^]]+\]|[^/:?#]+)")  # of a source without its password
# Bits of `AVInputFormat.flags`; PyAV names them differently from version to version.
NO_TIMESTAMPS, MAY_CHANGE_CLOCKS = 0x80, 0x200
# FFmpeg would wait for 20 frames to find a rate, for 50 without a time, and for a megabyte of JPEG pictures. It would
# ask a camera for packets by UDP first, which many networks lose.
_LIVE_OPTIONS = {"fpsprobesize": "2", "max_ts_probe": "1", "formatprobesize": "65536", "rtsp_flags": "prefer_tcp"}


def is_complete(video: Any) -> bool:
    """Return whether all of a video can be read now: True for files and arrays, False for cameras, URLs and pipes."""
    return os.path.isfile(video) if isinstance(video, (str, Path)) else isinstance(video, Sized)


def goes_on(video: Any) -> bool:
    """Return whether the source produces frames even when nothing reads them, as cameras and broadcasts do."""
    return isinstance(video, str) and video.startswith(_BROADCASTS) and not os.path.isfile(video)


def open_container(
    source: str | Path, *, timeout: float | None = 10.0, formats: str | None = None, max_pixels: int | None = None
) -> Any:
    """
    Open a source with PyAV; see [`VideoReader`] for the arguments.

    Returns:
        `av.container.InputContainer`: The open container. The caller closes it.

    Raises:
        `ValueError`: If it cannot be opened.
    """
    source, asked = str(source), clock.monotonic()
    is_file, left = os.path.isfile(source), None if timeout is None else _TimeLeft(asked + timeout)
    is_web = not is_file and source.partition(":")[0].lower() in ("http", "https")
    allowed = _WEB if is_web else "crypto,data" if source == "-" else "file" if is_file and formats else None
    # FFmpeg also decodes frames when it opens a file.
    given = {"format_whitelist": formats, "protocol_whitelist": allowed, "max_pixels": max_pixels and str(max_pixels)}
    options = {name: value for name, value in given.items() if value is not None}
    limits = None if is_file or source == "-" else (left, timeout)
    options |= {} if limits is None else _LIVE_OPTIONS
    try:
        if source == "-":
            return open_input(_standard_input(), options=options)
        if source.startswith(_CAMERA_NAMES) and not is_file:
            name, system = _camera(source)
            # 4 is FFmpeg's flag not to wait: a camera that says nothing would hold it for ever.
            return open_input(name, format=system, timeout=limits, options=options | {"fflags": "+4"})
        if Path(source).is_fifo():
            with _named_pipe(source, left) as name:
                return open_input(name, options=options, timeout=limits)
        # The prefix keeps FFmpeg from taking a colon in a name for a protocol, and a sign for a pattern.
        name, pattern = (f"file:{source}", {"pattern_type": "none"}) if is_file else (source, {})
        container = open_input(name, options=options | pattern, timeout=limits)
        if is_web and (container.size or 0) <= 0 and has_flag(container, NO_TIMESTAMPS):
            # FFmpeg took several frames to know the format. They have arrived already, and their times are lost.
            container.close()
            options |= {"fpsprobesize": "0"}
            return open_input(name, format=container.format.name, options=options, timeout=limits)
        return container
    except (av.error.FFmpegError, TimeoutError) as error:
        shown = without_secrets(source)
        if limits is not None and timeout is not None and clock.monotonic() - asked >= timeout:
            raise ValueError(f"'{shown}' sent no video within {timeout:g} s.") from error
        host = "".join(HOST.findall(shown)).strip("[]")
        if limits is not None and host and error.errno == errno.EIO:
            try:
                socket.getaddrinfo(host, None)
            except (OSError, UnicodeError):
                raise ValueError(f"'{shown}' cannot be opened: there is no host '{host}'.") from error
        raise unreadable(source, error) from error


class _TimeLeft:
    """Seconds until a time limit. PyAV asks for them at each step of opening, and would begin from the full limit."""

    def __init__(self, until: float) -> None:
        self.until = until

    def __float__(self) -> float:
        return max(0.0, self.until - clock.monotonic())


@contextmanager
def _named_pipe(path: str, left: _TimeLeft | None) -> Iterator[str]:
    """Give FFmpeg's name of a named pipe that has data. To open one that nobody writes would wait without a limit."""
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        if not waiting.poll(None if left is None else 1000 * float(left)):
            raise TimeoutError
        # FFmpeg keeps a copy of the descriptor.
        yield f"pipe:{pipe}"
    finally:
        os.close(pipe)


def unreadable(source: str, error: Exception) -> ValueError:
    """Return the error for a source that FFmpeg cannot read, with a reason that helps."""
    reason = _content(source) or getattr(error, "strerror", None) or error
    return ValueError(f"'{without_secrets(source)}' cannot be read as video: {reason}.")


def without_secrets(source: str) -> str:
    """Return a source for messages: a URL without its password and its query, which may hold a token."""
    scheme, mark, rest = source.partition("://")
    return source if os.path.exists(source) else scheme + mark + _SECRETS.sub("***", rest)


def _content(source: str) -> str | None:
    """Return what a file is that is often found in place of a video."""
    if not os.path.isfile(source) or not os.access(source, os.R_OK):
        return None
    with open(source, "rb") as file:
        head = file.read(64).lstrip().lower()
        boxes = b"".join(name for name, _ in _boxes(file)) if head[4:8] == b"ftyp" else b"moov"
    if b"moov" not in boxes and b"moof" not in boxes:
        return "its index is missing, as in a recording that was cut off"
    if 0 < boxes.find(b"ftyp", 4) < boxes.find(b"moof"):
        return "a fragmented mp4 is joined behind a plain one, and FFmpeg reads neither"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, and `git lfs pull` fetches the video"
    return "it is a web page" if head.startswith((b"<!doctype html", b"<html")) else None if head else "it is empty"


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the names of the boxes of an mp4, and the byte at which each ends."""
    at, size, end = 0, 8, file.seek(0, os.SEEK_END)
    while size >= 8:
        file.seek(min(at, end))  # far behind it, seeking fails
        box = file.read(16)
        size = int.from_bytes(box[8:] if box[:4] == b"\0\0\0\1" else box[:4], "big")
        at += size
        yield box[4:8], at


def count_joined(source: str, kind: str) -> tuple[int, int]:
    """Return how many videos lie behind the first in an mp4 or flv: those that FFmpeg reads, and those it does not."""
    with open(source, "rb") as file:
        if kind == "flv":
            return 0, max(0, sum(1 for _ in _places(file, _FLV)) - 1)
        parts = b"".join(name for name, _ in _boxes(file)).split(b"ftyp")[2:] if "mp4" in kind else []
    # FFmpeg reads the fragments of all, and one index.
    num_read = sum(b"moof" in part for part in parts)
    return num_read, sum(b"moov" in part for part in parts) - num_read


def _places(file: BinaryIO, pattern: re.Pattern[bytes], at: int = 0) -> Iterator[int]:
    """Yield the bytes at which a pattern of 9 bytes or fewer is found, from one on."""
    before, _ = b"", file.seek(at)
    while chunk := file.read(2**20):
        yield from (at - len(before) + match.start() for match in pattern.finditer(before + chunk))
        at, before = at + len(chunk), chunk[-8:]


def count_torn(source: str, kind: str) -> tuple[int, bool]:
    """Return in how many places a Matroska or WebM is torn, and whether its end or that of an Ogg, GIF or mp4 is."""
    size = os.path.getsize(source)
    with open(source, "rb") as file:
        if "matroska" in kind:
            return _follow_elements(file, size)
        if "mp4" in kind:
            names, ends = zip(*_boxes(file), strict=True)
            # Fragments fill their file. Behind a hole, what looks like a box ends elsewhere.
            is_torn = b"moof" in names and names[-1] != b"mdat" and ends[-1] != size
            return 0, is_torn or any(name == b"mdat" and end > size for name, end in zip(names, ends, strict=True))
        is_gif_torn = kind == "gif" and not _is_gif_whole(file.read(2**27))
        file.seek(max(0, size - 2**24))
        tail = file.read()
    if kind == "gif":
        return 0, is_gif_torn or not tail.rstrip(b"\0\r\n").endswith(b"\0;")
    at = tail.rfind(b"OggS", 0, -23)  # a header has 27 bytes, and then the lengths of parts
    is_whole = at >= 0 and tail[at + 5] & 4 and len(tail) >= at + 27 + sum(tail[at + 26 : at + 27 + tail[at + 26]])
    return 0, kind == "ogg" and not is_whole


def _is_gif_whole(content: bytes) -> bool:
    """Follow the blocks of a GIF to its end mark, or as far as it was read."""
    at = 13 + 3 * (2 << (content[10] & 7)) * (content[10] >> 7)  # behind the table of colors
    while (kind := content[at : at + 1]) in (b"!", b",", b"\0"):
        flags = content[at + 9] if kind == b"," and at + 9 < len(content) else 0
        # Some programs leave zeros between blocks.
        at += {b"!": 2, b",": 11 + 3 * (2 << (flags & 7)) * (flags >> 7), b"\0": 0}[kind]
        while at < len(content) and content[at]:
            at += content[at] + 1
        at += 1
    return kind == b";" or at >= 2**27


def _follow_elements(file: BinaryIO, size: int) -> tuple[int, bool]:
    """Follow the elements of Matroska. Behind a torn one, go on with the next cluster, as FFmpeg does."""
    num_torn, last, at, is_end_torn = 0, 0, 0, False
    # Files have fewer elements in a day, and a file made to take long ends here.
    for _ in range(2**23):
        if at == size or num_torn == 1000:
            break
        file.seek(min(at, size))
        if element := _ELEMENT.match(file.read(12)):
            name, rest = element.groups()
            # Leading zero bits say how many bytes a length has. A length of ones means that it is unknown.
            width = 9 - rest[0].bit_length()
            length = int.from_bytes(rest[:width], "big") % 2 ** (7 * width)
            is_entered = name == _SEGMENT or _CLUSTER.match(name) or length == 2 ** (7 * width) - 1
            last, at = at, at + len(name) + width + (0 if is_entered else length)
        else:
            last = at = next(_places(file, _CLUSTER, last + 1), size)
            num_torn, is_end_torn = num_torn + (at < size), at == size
    return num_torn, is_end_torn


def check_source(video: str | Path) -> str:
    """
    Return the name of a source.

    Raises:
        `ImportError`, `FileNotFoundError`, `IsADirectoryError`: If PyAV or the file is missing, or it is a folder.
    """
    if not is_av_available():
        raise ImportError("Reading video files needs PyAV: `pip install av`.")
    source, path = str(video), Path(video)
    if not source:
        raise FileNotFoundError("The name of the video is empty.")
    if path.is_dir():
        raise IsADirectoryError(f"'{source}' is a folder: name a video file in it.")
    if source != "-" and not source.startswith(_CAMERA_NAMES) and "://" not in source and not path.exists():
        # A link that leads nowhere is there by its name.
        names = [other.name for other in path.parent.iterdir() if other.exists()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean '{path.with_name(close[0])}'?" if close else "."
        raise FileNotFoundError(f"There is no video file '{source}'{hint}")
    return source


def _camera(source: str) -> tuple[str, str]:
    """Return FFmpeg's name and input format of a numbered camera."""
    number = source.removeprefix("/dev/video").removeprefix("camera:")
    if not number.isdecimal():
        raise ValueError(f"A camera is named by its number, such as 'camera:0', got '{source}'.")
    if platform.system() not in _CAMERAS:
        raise ValueError(f"Cameras can be opened by number on {' and '.join(_CAMERAS)} only; give a URL.")
    system, name = _CAMERAS[platform.system()]
    return name.format(number), system


def _standard_input() -> Any:
    """Return standard input as a file for FFmpeg; a piped mp4 with its index at the end goes through the disk."""
    pipe = sys.stdin.buffer
    if pipe.seekable():
        return pipe
    head, at, size, name = bytearray(), 0, 0, b"free"
    # Writers put boxes of any name before the index and the media data. Other formats are read as they come.
    while name not in (b"moov", b"moof", b"mdat", b"") and (at := at + size) < 2**24:
        head += pipe.read(at + 8 - len(head))
        name, size = bytes(head[at + 4 : at + 8]), max(int.from_bytes(head[at : at + 4], "big"), 8)
        name = name if at or name in (b"ftyp", b"free", b"skip", b"wide", b"mdat", b"moof") else b"moov"
    begin, stream = io.BytesIO(head), SimpleNamespace(read=lambda size: begin.read(size) or pipe.read1(size))
    if name in (b"moov", b"moof"):
        return stream
    # The media data comes first: FFmpeg must seek to the index and back.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stream, file)
    file.seek(0)
    return file


def has_flag(container: Any, flag: int) -> bool:
    """Return whether the format of a container has a flag of FFmpeg's."""
    return bool(container.format.flags & flag)


__all__ = ["HOST", "MAY_CHANGE_CLOCKS", "NO_TIMESTAMPS", "check_source", "count_joined", "count_torn", "goes_on"]
__all__ += ["has_flag", "is_complete", "open_container", "open_input", "unreadable", "without_secrets"]
