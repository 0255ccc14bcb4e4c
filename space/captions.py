# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Export what a model said: subtitles, JSON lines, or a video with the captions burnt in."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


# The page imports its files by their own names, the command line as parts of the package.
if __package__:
    from .caption_drawing import CaptionDrawer, name_characters
    from .video_writing import WritingReport, write_video
else:
    from caption_drawing import CaptionDrawer, name_characters
    from video_writing import WritingReport, write_video

logger = logging.getLogger(__name__)

# Seconds that a caption stays if no other follows, and the least that a caption stays if there is room for it.
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
    shortest = SHORTEST
    if end and said:
        # Captions that do not fit at half a second each are shown for less, near their times.
        shortest = min(SHORTEST, end / len(said))
        latest = [end - shortest * left for left in range(len(said), 0, -1)]
        begins = [max(0.0, min(times)) for times in zip(begins, latest, strict=True)]
    for index, (event, begin) in enumerate(zip(said, begins, strict=True)):
        following = begins[index + 1] if index + 1 < len(said) else float("inf")
        until = min(begin + LONGEST, following, end or float("inf"))
        if until <= begin:
            # Two replies at the same frame share its time.
            until = begin + shortest
            begins[index + 1] = max(following, until)
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


def burn_in(
    video: str | Path,
    events: Sequence[Any],
    out: Path,
    *,
    font: Path | None = None,
    open_video: Callable[..., Any] | None = None,
    say: Callable[[str], Any] = logger.warning,
    **options: Any,
) -> WritingReport:
    """
    Write a video as an mp4 with its captions drawn into the picture. Times of frames and sound are kept.

    Args:
        video (`str` or `Path`): The video that was watched.
        events (`Sequence[StreamEvent]`): What was said about it.
        out (`Path`): The mp4 to write. An existing one is replaced only when the new one is complete.
        font (`Path`, *optional*): A font file to use wherever it has the characters; by default an installed one.
        open_video (`Callable`, *optional*): Opens the video for reading, as `processor.open_video` does; by default
            the package's [`VideoReader`].
        say (`Callable`, *optional*): Gets a line about what the written video lacks, if anything. By default it is
            logged as a warning.
        options: Further options of [`write_video`].

    Returns:
        [`WritingReport`]: What the written video lacks.

    Raises:
        `ValueError`: If the video cannot be read or written, or the font cannot be read.
        `FileNotFoundError`: If the video or the font does not exist.
    """
    with (open_video or _package_reader())(video) as reader:
        drawer = CaptionDrawer(cues(events, end=reader.seconds), font=font)
        report = write_video(reader, out, draw=drawer.draw, **options)
    report.captions_with_boxes, report.captions_cut = drawer.num_missing, drawer.num_cut
    report.captions_reversed = drawer.num_reversed
    report.missing_characters = name_characters(drawer.missing) if drawer.missing else ""
    if report:
        say(str(report))
    return report


def _package_reader() -> Callable[..., Any]:
    # A published page has no package, and passes its processor's.
    return import_module("videollm_mod.video_reading_videollm_mod").VideoReader


def _stamp(seconds: float, mark: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def _one_line(text: str) -> str:
    """Join lines: an empty line would end the cue."""
    return " ".join(text.split())
