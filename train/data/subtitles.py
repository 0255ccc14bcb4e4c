# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert subtitles to timed messages, to train on your own video.

```bash
python train/data/subtitles.py lecture.mp4 --out lecture.jsonl                       # subtitles in the file
python train/data/subtitles.py a.mp4 b.mp4 --subtitles a.srt b.vtt --out train.jsonl
```

Lines are merged into sentences. Each sentence becomes a reply at the time when it begins (or ends).
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
    """A text with its start and end in seconds."""

    start: float
    end: float
    text: str


def read_subtitles(source: str | Path, stream: int = 0) -> list[Line]:
    """
    Read the lines of a subtitle file or of a video's subtitle stream, without markup, in order of time.

    Args:
        source (`str` or `Path`): An .srt or .vtt file, or any video that FFmpeg reads.
        stream (`int`, *optional*, defaults to 0): Index of the subtitle stream.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If it cannot be read, or does not have this subtitle stream.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"There is no file '{source}'.")
    lines = []
    try:
        with av.open(str(source)) as container:
            count = len(container.streams.subtitles)
            if stream >= count:
                raise ValueError(f"'{source}' has no subtitle stream {stream}: it has {count}.")
            # Times count from the video's first frame.
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
    Merge subtitle lines into sentences. If a sentence begins within a line, its time is interpolated.

    Args:
        lines (`list[Line]`): Lines in order of time. A line equal to the previous line is left out.
        max_gap (`float`, *optional*, defaults to 1.5): Seconds of silence that end a sentence.
        max_words (`int`, *optional*, defaults to 40): A sentence of this many words ends before the next line.
        keep_asides (`bool`, *optional*, defaults to `False`): Keep text in brackets, such as "[Music]".
        keep_speakers (`bool`, *optional*, defaults to `False`): Keep the name of a speaker, such as "ANNA:".
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
    """Split a line after each sentence, and yield the pieces with their start and end."""
    rate, cursor = (line.end - line.start) / len(text), 0
    for stop in [match.end() for match in _SENTENCE_END.finditer(text)] + [len(text)]:
        if stop > cursor:
            yield text[cursor:stop].strip(), line.start + cursor * rate, line.start + stop * rate
        cursor = stop


def to_timed_messages(
    sentences: list[Line], *, query: str = NARRATE, say_at: str = "start", end: float | None = None
) -> list[dict[str, Any]]:
    """
    Convert sentences to a dialogue: the query at second 0, then each sentence as a reply.

    Args:
        sentences (`list[Line]`): Sentences in order of time.
        query (`str`, *optional*): What the user says first.
        say_at (`str`, *optional*, defaults to `"start"`): Whether a reply comes when its sentence begins ("start") or
            ends ("end").
        end (`float`, *optional*): Length of the video in seconds. Sentences that begin later are left out.
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
    """Return the length of a video stream in seconds."""
    with av.open(str(video)) as container:
        streams = [s for s in container.streams.video if s.duration]
        if not streams:
            raise ValueError(f"'{video}' has no video stream of known length.")
        return float(max(s.duration * s.time_base for s in streams))


def main() -> None:
    """Write one row of timed messages for each video."""
    parser = argparse.ArgumentParser(description="Convert videos with subtitles to timed messages, one row per video.")
    parser.add_argument("videos", nargs="+", type=Path, help="video files")
    parser.add_argument(
        "--subtitles",
        nargs="+",
        type=Path,
        help=".srt or .vtt files, one per video; default: the streams in the videos",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--stream", type=int, default=0, help="index of the subtitle stream")
    parser.add_argument("--query", default=NARRATE, help="what the user says first")
    parser.add_argument(
        "--say_at", choices=("start", "end"), default="start", help="reply at the start or the end of a sentence"
    )
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
