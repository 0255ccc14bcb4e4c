# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Cues whose times stand in the text: SubRip, WebVTT, what Whisper prints, and tables."""

import re
from collections.abc import Iterator

from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport
from videollm_mod.train.data.subtitle_formats.markup import tidy


_CLOCK = r"(-?)(?:(\d+):)?(\d+):(\d+)(?:[.,:](\d{1,3}))?\d*"
_SPAN = rf"[ \t]*{_CLOCK}[^\S\n]*(?:[-–—]+ ?(?:>|&gt;)|→)[^\S\n]*{_CLOCK}"
# A number before the times of a cue. Behind a blank row only, it may be written "2.", "#2" or "[2]".
_NUMBER = r"(?:(?:[ \t]*\d+|(?<=\n\n)[ \t]*[#(\[]?\d+[.:)\]]?)[ \t]*\n)"
# The times of a cue, with the number or name in the line above.
SUBRIP = re.compile(rf"^{_NUMBER}?{_SPAN}(?:[ \t].*)?\n?", re.M)
WEBVTT = re.compile(rf"^(?:(?<=\n\n)(?!.*-->).+\n|{_NUMBER})?{_SPAN}(?:[ \t].*)?\n?", re.M)
# What the programs around Whisper print: "[00:01.000 --> 00:02.500]  A ball."
PRINTED = re.compile(rf"^\[{_CLOCK} --?> {_CLOCK}\][ \t]*", re.M)
# A cue whose times cannot be read, such as "00:00:-1,000 --> 00:00:02,000", up to the next cue as it is written here.
_SPOILT = rf"^{_NUMBER}?" + r"[ \t]*-?\d{1,3}:\S{1,20}[ \t]*-->[ \t]*(?:-?\d{1,3}:|$)(?:(?!\n1\n\v)[\s\S])*"
_SPOILT = re.compile(_SPOILT, re.M)
# Joined parts of HLS have a header each, also without a blank row before it.
_HEADER = r"(?<=\n)WEBVTT(?=[ \t\n]X-TIMESTAMP-MAP=)"
NOTE = re.compile(rf"(?:(?<=\n\n)(?:NOTE|STYLE|REGION|WEBVTT)(?=[ \t\n])|{_HEADER}).*?(?=\n\n|\Z)", re.S)
# FFmpeg cuts a row of 4,095 bytes, also within a character.
_LONG = re.compile(r"(.{900}\S{0,100})\s?")


def to_subrip(text: str, pattern: re.Pattern[str], report: SubtitleReport) -> str:
    """Write the times of a text as FFmpeg reads them, after "\\v" each. A cue with spoilt times is left out."""

    def write(match: re.Match[str]) -> str:
        start, end = _thousandths(*match.groups()[:5]), _thousandths(*match.groups()[5:])
        report.mended_ends += end < start
        # A cue without a number would take the last row of the one before if that is a number. FFmpeg skips "\v", and
        # drops a cue without a text, but not "\x1f", which goes with the markup.
        return f"\n1\n\v{_written(start)} --> {_written(end)}\n\x1f\n"

    text = pattern.sub(write, "\n\n" + text.replace("\v", " "))
    text, num_spoilt = _SPOILT.subn("", text)
    report.spoilt_lines += num_spoilt
    return _LONG.sub(r"\1\n", text)


def _thousandths(sign: str, hours: str | None, minutes: str, seconds: str, fraction: str | None) -> int:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    # FFmpeg reads numbers of 32 bits.
    return 0 if sign else min(10**12, 1000 * whole + int((fraction or "0").ljust(3, "0")))


def _written(time: int) -> str:
    return f"{time // 3_600_000:02}:{time // 60_000 % 60:02}:{time // 1000 % 60:02},{time % 1000:03}"


def read_tsv(text: str) -> Iterator[Line]:
    """Read Whisper's TSV, in milliseconds, and labels of Audacity, in seconds."""
    rows = [row.split("\t", 2) for row in text.split("\n") if re.match(r"-?\d+(?:\.\d+)?\t-?\d+(?:\.\d+)?\t", row)]
    unit = 1 if any("." in row[0] + row[1] for row in rows) else 1000
    for start, end, words in rows:
        yield Line(max(0.0, float(start) / unit), float(end) / unit, tidy(words))
