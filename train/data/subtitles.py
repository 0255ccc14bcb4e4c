# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Timed messages from subtitles: your own video becomes something to train on.

```bash
python train/data/subtitles.py lecture.mp4 --out lecture.jsonl                       # its own subtitle stream
python train/data/subtitles.py a.mp4 b.mp4 --subtitles a.srt b.vtt --out train.jsonl
```

Lines are merged into sentences; each becomes a reply at the second at which it begins (or ends) to be said.
"""

import argparse
import html
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from videollm_mod.train.data.timed_messages import NARRATE


_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+")
_MARKUP = re.compile(r"\{\\[^}]*\}|<[^>]*>")
_ASIDE = re.compile(r"[\[(♪][^\])♪]*[\])♪]")
_SPEAKER = re.compile(r"^(?:-\s*)?(?:[A-Z][A-Z .'-]*:\s+)?")


@dataclass(frozen=True)
class Line:
    """A stretch of text and the seconds in which it is said."""

    start: float
    end: float
    text: str


def read_subtitles(source: str | Path, stream: int = 0) -> list[Line]:
    """
    Lines of a subtitle file or of a video's own subtitle stream, without markup, in order of time.

    Args:
        source (`str` or `Path`): An .srt or .vtt file, or a video (whatever FFmpeg reads).
        stream (`int`, *optional*, defaults to 0): Which of its subtitle streams.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it cannot be read or has no such stream of text.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no file '{source}'.")
    lines = []
    try:
        with av.open(str(source)) as container:
            count = len(container.streams.subtitles)
            if stream >= count:
                raise ValueError(f"'{source}' has no subtitle stream {stream}: it has {count}.")
            # In a video the picture's first moment counts as 0, as everywhere here.
            pictures = [s for s in container.streams.video if s.start_time is not None]
            origin = float(pictures[0].start_time * pictures[0].time_base) if pictures else 0.0
            for packet in container.demux(container.streams.subtitles[stream]):
                if packet.pts is None:
                    continue
                start = float(packet.pts * packet.time_base) - origin
                end = start + float((packet.duration or 0) * packet.time_base)
                for part in packet.decode():
                    text = _plain(getattr(part, "dialogue", b"").decode("utf-8", "replace"))
                    if text:
                        lines.append(Line(max(0.0, start), max(0.0, end), text))
    except av.error.FFmpegError as error:
        raise ValueError(f"'{source}' cannot be read as subtitles: {error.strerror or error}.") from error
    return sorted(lines, key=lambda line: line.start)


def _plain(text: str) -> str:
    return " ".join(html.unescape(_MARKUP.sub("", text).replace("\\N", " ").replace("\\h", " ")).split())


def to_sentences(
    lines: list[Line],
    *,
    max_gap: float = 1.5,
    max_words: int = 40,
    keep_asides: bool = False,
    keep_speakers: bool = False,
) -> list[Line]:
    """
    Sentences of subtitle lines. The time of a sentence that begins within a line is read off its place in the line.

    Args:
        lines (`list[Line]`): Lines in order of time. A line that repeats the one before it is left out.
        max_gap (`float`, *optional*, defaults to 1.5): Seconds of silence that end a sentence, finished or not.
        max_words (`int`, *optional*, defaults to 40): A sentence longer than this is ended at the next line.
        keep_asides (`bool`, *optional*, defaults to `False`): Keep what stands in brackets or notes: "[Music]".
        keep_speakers (`bool`, *optional*, defaults to `False`): Keep a name in capitals with a colon before a line.
    """
    sentences: list[Line] = []
    open_text, open_start, open_end, last_text = "", 0.0, 0.0, ""
    for line in lines:
        text = line.text if keep_speakers else _SPEAKER.sub("", line.text)
        text = text if keep_asides else " ".join(_ASIDE.sub(" ", text).split())
        if not text or text == last_text:
            continue
        last_text = text
        too_late, too_long = line.start - open_end > max_gap, len(open_text.split()) >= max_words
        if open_text and (too_late or too_long):
            sentences.append(Line(open_start, open_end, open_text))
            open_text = ""
        for piece, begin, end in _pieces(line, text):
            if not open_text:
                open_start = begin
            open_text, open_end = f"{open_text} {piece}".strip(), end
            if _SENTENCE_END.search(piece + " "):
                sentences.append(Line(open_start, open_end, open_text))
                open_text = ""
    return [*sentences, Line(open_start, open_end, open_text)] if open_text else sentences


def _pieces(line: Line, text: str) -> Iterator[tuple[str, float, float]]:
    """The line cut after each end of a sentence, with the seconds of each piece."""
    rate, cursor = (line.end - line.start) / len(text), 0
    for stop in [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]:
        if stop > cursor:
            yield text[cursor:stop].strip(), line.start + cursor * rate, line.start + stop * rate
        cursor = stop


def to_timed_messages(
    sentences: list[Line], *, query: str = NARRATE, say_at: str = "start", end: float | None = None
) -> list[dict[str, Any]]:
    """
    Sentences as a dialogue: the query at second 0, then each sentence as a reply.

    Args:
        sentences (`list[Line]`): Sentences in order of time.
        query (`str`, *optional*): What the user says first.
        say_at (`str`, *optional*, defaults to `"start"`): Whether a reply comes when its sentence begins or when it
            ends ("end").
        end (`float`, *optional*): Length of the video in seconds; sentences that begin later are left out, and an end
            past it is its end.
    """
    if say_at not in ("start", "end"):
        raise ValueError(f"`say_at` is 'start' or 'end', got {say_at!r}.")
    messages = [{"role": "user", "content": query, "time": 0.0}]
    for sentence in sentences:
        if end is not None and sentence.start > end:
            break
        time = sentence.start if say_at == "start" else sentence.end
        time = time if end is None else min(time, end)
        messages.append({"role": "assistant", "content": sentence.text, "time": round(time, 3)})
    return messages


def video_seconds(video: str | Path) -> float:
    """Length of a video's picture in seconds."""
    with av.open(str(video)) as container:
        streams = [s for s in container.streams.video if s.duration]
        if not streams:
            raise ValueError(f"'{video}' has no video stream of known length.")
        return float(max(s.duration * s.time_base for s in streams))


def main() -> None:
    """Writes one row of timed messages for each video."""
    parser = argparse.ArgumentParser(description="Turns videos with subtitles into timed messages, one row a video.")
    parser.add_argument("videos", nargs="+", type=Path, help="video files")
    parser.add_argument("--subtitles", nargs="+", type=Path, help=".srt or .vtt, one a video; default: their own")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--stream", type=int, default=0, help="which of the subtitle streams")
    parser.add_argument("--query", default=NARRATE, help="what the user says first")
    parser.add_argument("--say_at", choices=("start", "end"), default="start", help="of the sentence")
    parser.add_argument("--max_gap", type=float, default=1.5, help="seconds of silence that end a sentence")
    parser.add_argument("--max_words", type=int, default=40, help="end a longer sentence at the next line")
    parser.add_argument("--keep_asides", action="store_true", help='keep "[Music]" and the like')
    parser.add_argument("--keep_speakers", action="store_true", help='keep "ANNA:" before a line')
    options = parser.parse_args()
    if options.subtitles is not None and len(options.subtitles) != len(options.videos):
        parser.error(f"got {len(options.subtitles)} subtitle files for {len(options.videos)} videos")
    rows = []
    for video, source in zip(options.videos, options.subtitles or options.videos, strict=True):
        try:
            lines, seconds = read_subtitles(source, options.stream), video_seconds(video)
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from None
        sentences = to_sentences(
            lines,
            max_gap=options.max_gap,
            max_words=options.max_words,
            keep_asides=options.keep_asides,
            keep_speakers=options.keep_speakers,
        )
        messages = to_timed_messages(sentences, query=options.query, say_at=options.say_at, end=seconds)
        if len(messages) == 1:
            raise SystemExit(f"error: '{source}' has no text within the {seconds:.1f} s of '{video}'.")
        name = os.path.relpath(video.resolve(), options.out.resolve().parent)
        rows.append({"video": name, "start": 0.0, "end": round(seconds, 3), "messages": messages})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.out}: {len(rows)} rows, {sum(len(row['messages']) - 1 for row in rows)} replies")


if __name__ == "__main__":
    main()
