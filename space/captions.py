# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What was said, to take away: subtitles, lines of JSON, and a video with the captions burnt in."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, ImageFont


# FFmpeg chooses by content, and knows formats that name other files to open: playlists, lists of parts.
SAFE = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts"}
# Seconds: how long a caption stays if nothing follows, and how long one that is followed at once.
LONGEST, SHORTEST = 4.0, 0.5


def cues(events: Iterable[Any]) -> Iterator[tuple[float, float, str]]:
    """
    Captions of a stream.

    Args:
        events (iterable of [`StreamEvent`]): What was said, in order; what the user said is no caption.

    Yields:
        `tuple[float, float, str]`: Seconds from and to which a text is shown, the next beginning no sooner.
    """
    said = [event for event in events if event.role == "assistant" and event.text]
    begins = [event.time for event in said]
    for index, (event, begin) in enumerate(zip(said, begins, strict=True)):
        following = begins[index + 1] if index + 1 < len(said) else float("inf")
        end = min(begin + LONGEST, following)
        if end <= begin:
            # Two replies at the same frame share its time.
            end = begin + SHORTEST
            begins[index + 1] = max(following, end)
        yield begin, end, event.text


def to_srt(events: Iterable[Any]) -> str:
    """The captions as SubRip."""
    blocks = [
        f"{number}\n{_stamp(begin, ',')} --> {_stamp(end, ',')}\n{_one_line(text)}\n"
        for number, (begin, end, text) in enumerate(cues(events), start=1)
    ]
    return "\n".join(blocks)


def to_vtt(events: Iterable[Any]) -> str:
    """The captions as WebVTT."""
    escaped = [
        (begin, end, _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        for begin, end, text in cues(events)
    ]
    blocks = [f"{_stamp(begin, '.')} --> {_stamp(end, '.')}\n{text}\n" for begin, end, text in escaped]
    return "\n".join(["WEBVTT\n", *blocks])


def to_jsonl(events: Iterable[Any]) -> str:
    """Everything that was said, by the user too, one line each: `time`, `frame`, `role`, `text`."""
    lines = [{name: getattr(event, name) for name in ("time", "frame", "role", "text")} for event in events]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def burn_in(video: str | Path, events: Sequence[Any], out: Path) -> None:
    """
    Writes a video with its captions drawn into the picture, H.264 without sound, every frame at its time.

    Args:
        video (`str` or `Path`): The video that was watched.
        events (`Sequence[StreamEvent]`): What was said about it.
        out (`Path`): Where to, an mp4.

    Raises:
        `ValueError`: If the video cannot be read.
    """
    shown = list(cues(events))
    # Nothing that was there is lost to a video that breaks off, nor to one that is to be written onto itself.
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
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
    """A frame as it is to be shown, with a height on which words can be read, and even sides as H.264 wants them."""
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
    """An empty line would end the cue."""
    return " ".join(text.split())
