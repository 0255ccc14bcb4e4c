# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Export what a model said: subtitles, JSON lines, or a video with the captions burnt in."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, ImageFont


# FFmpeg detects formats by content. Other formats, such as playlists, may name further files that FFmpeg opens.
SAFE = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"}
# Seconds that a caption stays if no other follows, and the least that a caption stays.
LONGEST, SHORTEST = 4.0, 0.5


def cues(events: Iterable[Any], *, end: float | None = None) -> Iterator[tuple[float, float, str]]:
    """
    Turn the events of a stream into captions that do not overlap.

    Args:
        events (iterable of [`StreamEvent`]): Events in order. Only the model's are captions.
        end (`float`, *optional*): Length of the video in seconds. No caption lasts longer. A reply in the last half
            second is shown early enough to be read.

    Yields:
        `tuple[float, float, str]`: Begin and end in seconds, and the text.
    """
    said = [event for event in events if event.role == "assistant" and event.text]
    begins = [event.time for event in said]
    if end is not None:
        latest = [end - SHORTEST * left for left in range(len(said), 0, -1)]
        begins = [max(0.0, min(times)) for times in zip(begins, latest, strict=True)]
    for index, (event, begin) in enumerate(zip(said, begins, strict=True)):
        following = begins[index + 1] if index + 1 < len(said) else float("inf")
        until = min(begin + LONGEST, following, float("inf") if end is None else end)
        if until <= begin:
            # Two replies at the same frame share its time.
            until = begin + SHORTEST
            begins[index + 1 : index + 2] = [max(following, until)]
        yield begin, until, event.text


def to_srt(events: Iterable[Any], *, end: float | None = None) -> str:
    """Return the captions as SubRip; see [`cues`]."""
    blocks = [
        f"{number}\n{_stamp(begin, ',')} --> {_stamp(until, ',')}\n{_one_line(text)}\n"
        for number, (begin, until, text) in enumerate(cues(events, end=end), start=1)
    ]
    return "\n".join(blocks)


def to_vtt(events: Iterable[Any], *, end: float | None = None) -> str:
    """Return the captions as WebVTT; see [`cues`]."""
    escaped = [
        (begin, until, _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        for begin, until, text in cues(events, end=end)
    ]
    blocks = [f"{_stamp(begin, '.')} --> {_stamp(until, '.')}\n{text}\n" for begin, until, text in escaped]
    return "\n".join(["WEBVTT\n", *blocks])


def to_jsonl(events: Iterable[Any]) -> str:
    """Return all events, the user's too, as JSON lines with `time`, `frame`, `role` and `text`."""
    lines = [{name: getattr(event, name) for name in ("time", "frame", "role", "text")} for event in events]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def video_seconds(video: str | Path) -> float:
    """
    Return the length of a video file in seconds.

    Raises:
        `ValueError`: If the file cannot be read as a video.
    """
    try:
        with av.open(str(video), options=SAFE) as container:
            return container_seconds(container)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"'{Path(video).name}' cannot be read as video: {error}.") from None


def container_seconds(container: av.container.InputContainer) -> float:
    """Return the length of an open video in seconds. Recordings of a browser do not state it: read their packets."""
    lengths = [float(s.duration * s.time_base) for s in container.streams.video if s.duration is not None]
    if lengths or container.duration is not None:
        return max([*lengths, (container.duration or 0) / av.time_base])
    ends = [float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.pts is not None]
    return max(ends, default=0.0)


def burn_in(video: str | Path, events: Sequence[Any], out: Path) -> None:
    """
    Write a video with its captions drawn into the picture: H.264, without sound, with the times of its frames.

    Args:
        video (`str` or `Path`): The video that was watched.
        events (`Sequence[StreamEvent]`): What was said about it.
        out (`Path`): The mp4 to write.

    Raises:
        `ValueError`: If the video cannot be read.
    """
    # An existing file is replaced only at the end. So a damaged video does not destroy it, and `out` may be `video`.
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        shown = list(cues(events, end=video_seconds(video)))
        with av.open(str(video), options=SAFE) as source, av.open(str(part), "w", format="mp4") as target:
            stream = source.streams.best("video")
            origin = (stream.start_time or 0) * stream.time_base
            written = None
            for frame in source.decode(stream):
                if frame.pts is None:
                    continue
                picture = _picture(frame)
                if written is None:
                    written = target.add_stream("libx264", rate=stream.average_rate or Fraction(25))
                    written.pix_fmt, written.time_base = "yuv420p", stream.time_base
                    written.width, written.height = picture.size
                time = float(frame.pts * frame.time_base - origin)
                text = next((text for begin, end, text in shown if begin <= time < end), "")
                painted = av.VideoFrame.from_image(_with_caption(picture, text))
                painted.pts, painted.time_base = frame.pts, frame.time_base
                target.mux(written.encode(painted))
            target.mux(written.encode() if written is not None else [])
        os.replace(part, out)
    except (av.error.FFmpegError, AttributeError) as error:
        raise ValueError(f"'{Path(video).name}' cannot be read as video: {error}.") from None
    finally:
        part.unlink(missing_ok=True)


def _picture(frame: av.VideoFrame) -> Image.Image:
    """Return a frame upright and large enough for readable words. Its sides are even, as H.264 requires."""
    picture = frame.to_image().rotate(frame.rotation, expand=True)
    height = min(max(picture.height, 360), 720)
    size = (2 * round(picture.width * height / picture.height / 2), 2 * (height // 2))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _with_caption(picture: Image.Image, text: str) -> Image.Image:
    if not text:
        return picture
    pen = ImageDraw.Draw(picture, "RGBA")
    font = ImageFont.load_default(max(14, picture.height // 18))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) > 0.92 * picture.width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    step = int(1.3 * font.size)
    top = picture.height - step * len(lines) - font.size // 2
    pen.rectangle((0, top - font.size // 3, picture.width, picture.height), fill=(0, 0, 0, 150))
    for row, line in enumerate(lines):
        pen.text((picture.width / 2, top + row * step), line, (255, 255, 255), font, anchor="ma")
    return picture


def _stamp(seconds: float, mark: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def _one_line(text: str) -> str:
    """Join lines: an empty line would end the cue."""
    return " ".join(text.split())
