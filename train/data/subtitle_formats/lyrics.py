# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lyrics (LRC): their times are written as FFmpeg reads them, and moved by the offset of the file."""

import re
from collections.abc import Iterable, Iterator

from videollm_mod.train.data.subtitle_formats.lines import TOUCH, Line, SubtitleReport


# "[01:02.50]", also with hours, as "[1:02:03.50]", or with a colon before the fraction, as "[01:02:50]".
_TAG = r"\[[ \t]*(-?)(\d{1,6}):(\d{1,6})(?::(\d{1,3}))?(?:[.,](\d{0,6}))?[ \t]*\][ \t]*"
LYRICS = re.compile(rf"^[ \t]*(?:{_TAG})+\S", re.M)
_TAGS = re.compile(rf"(?:{_TAG})+")
_TAG = re.compile(_TAG)
_ABOUT = re.compile(r"\[[ \t]*[a-z#]+[ \t]*:", re.I)
# A line of a song or a talk lasts less than this on average, in seconds.
_LONG = 40


def plain_lyrics(text: str, report: SubtitleReport) -> str:
    """
    Write the times of lyrics as FFmpeg reads them: minutes and seconds. Elsewhere it reads "[00:00:01.00]" as 0 s, and
    leaves lines out where seconds are 60 or more, or spaces stand around a time. Lines without a time are counted.
    """
    tags = [tag for tag in _TAG.findall(text) if tag[3]]
    times = [3600 * int(tag[1]) + 60 * int(tag[2]) + int(tag[3]) for tag in tags]
    # "[00:01:50]" is 1.5 s in most songs, and 110 s in the text of a talk.
    has_hours = any(tag[4] for tag in tags) or (times and max(times) - min(times) < _LONG * (len(times) - 1))

    def write(match: re.Match[str]) -> str:
        sign, first, second, third, fraction = match.groups()
        if third and not has_hours:
            third, fraction = None, third
        parts = [first, second, third] if third else ["0", first, second]
        seconds = sum(int(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
        return f"[{sign}{seconds // 60:02}:{seconds % 60:02}.{fraction or 0}]"

    rows = []
    for row in map(str.strip, text.split("\n")):
        if match := _TAGS.match(row):
            # FFmpeg takes a bracket behind the times for another. A word joiner parts them.
            rows.append(f"{_TAG.sub(write, match[0])}\u2060{row[match.end() :]}")
        else:
            report.spoilt_lines += bool(row) and not _ABOUT.match(row)
    return "\n".join(rows)


def sung(cues: Iterable[Line], text: str) -> Iterator[Line]:
    """Move lyrics by the offset of their file. A line ends before the next, so that one sung again stays."""
    found = re.findall(r"^[ \t]*\[offset:[ \t]*([+-]?\d{1,9})[ \t]*\]", text, re.M | re.I)
    offset = int(found[-1]) / 1000 if found else 0.0
    for cue in cues:
        end = cue.end if cue.end < cue.start else max(cue.start, cue.end - 2 * TOUCH)
        start, end = (max(0.0, round(time - offset, 3)) for time in (cue.start, end))
        yield Line(start, end if cue.end >= cue.start else start - 1, cue.text)
