# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Cues whose times stand in the text: SubRip, WebVTT, SubViewer of YouTube, and tables."""

import re
from collections.abc import Iterator

from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport
from videollm_mod.train.data.subtitle_formats.markup import plain, tidy


_CLOCK = r"(-?)(?:(\d+):)?(\d+):(\d+)(?:[.,:](\d{1,3}))?\d*"
_SPAN = rf"[ \t]*{_CLOCK}[ \t]*[-–—]+ ?>[ \t]*{_CLOCK}"
# The times of a cue, with the number or name in the line above.
SUBRIP = re.compile(rf"^(?:[ \t]*\d+[ \t]*\n)?{_SPAN}(?:[ \t].*)?\n?", re.M)
WEBVTT = re.compile(rf"^(?:(?<=\n\n)(?!.*-->).+\n|[ \t]*\d+[ \t]*\n)?{_SPAN}(?:[ \t].*)?\n?", re.M)
SBV = re.compile(rf"^{_CLOCK},{_CLOCK}[ \t]*\n", re.M)
# What the programs around Whisper print: "[00:01.000 --> 00:02.500]  A ball."
PRINTED = re.compile(rf"^\[({_CLOCK}) --?> ({_CLOCK})\][ \t]*", re.M)
# The times of a cue that cannot be read, such as "00:00:-1,000 --> 00:00:02,000".
_SPOILT = re.compile(r"^(?:[ \t]*\d+[ \t]*\n)?[ \t]*-?\d{1,3}:\S{1,20}[ \t]*-->[ \t]*-?\d{1,3}:.*\n?", re.M)
NOTE = re.compile(r"(?<=\n\n)(?:NOTE|STYLE|REGION)(?=[ \t\n]).*?(?=\n\n|\Z)", re.S)


def split_cues(text: str, pattern: re.Pattern[str], report: SubtitleReport) -> Iterator[Line]:
    """Split a text at its cues' times. A cue with times that cannot be read is left out."""
    text = f"\n\n{text}"
    spans = list(pattern.finditer(text))
    ends = [*(span.start() for span in spans), len(text)][1:]
    for span, end in zip(spans, ends, strict=True):
        said, *spoilt = _SPOILT.split(text[span.end() : end])
        report.spoilt_lines += len(spoilt)
        yield Line(_clock(*span.groups()[:5]), _clock(*span.groups()[5:]), plain(said))


def _clock(sign: str, hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return 0.0 if sign else whole + int((fraction or "0").ljust(3, "0")) / 1000


def read_tsv(text: str) -> Iterator[Line]:
    """Read Whisper's TSV, in milliseconds, and labels of Audacity, in seconds."""
    rows = [row.split("\t", 2) for row in text.split("\n") if re.match(r"-?\d+(?:\.\d+)?\t-?\d+(?:\.\d+)?\t", row)]
    unit = 1 if any("." in row[0] + row[1] for row in rows) else 1000
    for start, end, words in rows:
        yield Line(max(0.0, float(start) / unit), float(end) / unit, tidy(words))
