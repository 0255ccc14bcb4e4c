# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Subtitle streams of videos, and texts in formats that only FFmpeg knows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from videollm_mod.data_paths import VIDEO_FORMATS
from videollm_mod.space.uploads import demux
from videollm_mod.train.data.subtitle_formats.encodings import decode_text
from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport
from videollm_mod.train.data.subtitle_formats.markup import keep_backslashes, plain, plain_ass
from videollm_mod.video_opening_videollm_mod import open_container
from videollm_mod.video_reading_videollm_mod import VideoReader


# What FFmpeg writes where a subtitle stays until the next is 0xFFFFFFFF milliseconds, or a little less.
_NO_END = 0x7FFFFFFF
_TEXT_CODECS = ("srt", "subrip", "webvtt", "text", "mov_text")


def read_stream(
    path: Path, container: Any, index: int, encoding: str | None, report: SubtitleReport
) -> Iterator[Line]:
    """Read a subtitle stream of a video with FFmpeg, or a text in a format that only FFmpeg knows."""
    with container:
        stream, codec = _text_stream(path, container, index)
        report.other_streams += len(container.streams.subtitles) - 1
        origin = float(_origin(path)) if container.streams.video else 0.0
        found = list(_stream_texts(container, stream, codec, report))
    # All are decoded together, so that there is enough text to guess an encoding.
    payloads = b"\x1e".join(payload.replace(b"\0", b"").replace(b"\x1e", b"") for _, _, payload in found)
    texts = decode_text(path, payloads, encoding, report).split("\x1e")
    for (start, end, _), text in zip(found, texts, strict=False):
        is_ass = codec not in _TEXT_CODECS
        text = text if is_ass or codec in ("srt", "subrip") else keep_backslashes(text)
        words = plain_ass(text.split(",", 8)[-1], report) if is_ass else plain(text)
        if max(start, end) < origin:
            report.lines_before_the_start += 1
        elif words or not is_ass:
            yield Line(max(0.0, start - origin), end - origin, words)


def open_as_video(path: Path) -> Any:
    try:
        return open_container(path, formats=f"{VIDEO_FORMATS},sup")
    except ValueError as error:
        raise ValueError(f"'{path}' is neither a text nor a video that can be read.") from error


def _text_stream(path: Path, container: Any, index: int) -> tuple[Any, str]:
    """Return a subtitle stream and the name of its codec. Raise `ValueError` if it holds pictures."""
    streams = container.streams.subtitles
    if not 0 <= index < len(streams):
        raise ValueError(f"'{path}' has no subtitle stream {index}: it has {len(streams)}.")
    found = [getattr(stream.codec_context, "codec", None) for stream in streams]
    names = [None if codec is None or codec.bitmap_sub else codec.name for codec in found]
    if names[index] is None:
        what = "holds pictures, not text" if found[index] else "is in a codec that FFmpeg cannot read"
        others = ", ".join(str(other) for other, name in enumerate(names) if name) or "none"
        raise ValueError(f"Subtitle stream {index} of '{path}' {what} (streams of text: {others}).")
    return streams[index], names[index]


def _origin(path: Path) -> Any:
    """Return the second of the container's clock that is second 0 of the video."""
    try:
        with VideoReader(path, formats=VIDEO_FORMATS) as reader:
            return reader.origin
    except ValueError:
        return 0


def _stream_texts(
    container: Any, stream: Any, codec: str, report: SubtitleReport
) -> Iterator[tuple[float, float, bytes]]:
    """Yield start and end in seconds of the container's clock, and texts: as they are, or as events of ASS."""
    for packet in _all_packets(container, stream, report):
        if codec in (*_TEXT_CODECS, "ass", "ssa"):
            # FFmpeg's decoders of these codecs lose text between < and >, or { and }.
            payload = bytes(packet) if codec != "mov_text" else _text_of_mp4(bytes(packet))
            # An mp4 has a packet without a text wherever nothing is shown.
            if packet.pts is not None and (payload or codec != "mov_text"):
                start, seconds = float(packet.pts * packet.time_base), float((packet.duration or 0) * packet.time_base)
                yield start, start + seconds, payload
            continue
        try:
            event = stream.codec_context.decode2(packet)
        except av.error.FFmpegError:
            report.spoilt_lines += 1
            continue
        if event is not None and event.pts is not None:
            start, until = event.pts / 1e6, event.end_display_time
            end = start - 1 if until > _NO_END else start + until / 1000
            yield from ((start + event.start_display_time / 1000, end, part.ass) for part in event)


def _text_of_mp4(packet: bytes) -> bytes:
    """Return the text of a packet as UTF-8: two bytes give its length, and its styles follow."""
    text = packet[2 : 2 + int.from_bytes(packet[:2], "big")]
    return text.decode("utf_16", "replace").encode() if text[:2] in (b"\xfe\xff", b"\xff\xfe") else text


def _all_packets(container: Any, stream: Any, report: SubtitleReport) -> Iterator[Any]:
    for _ in range(100):
        try:
            yield from demux(container, stream)
            return
        except av.error.FFmpegError:
            report.spoilt_lines += 1
