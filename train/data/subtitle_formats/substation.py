# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""ASS and SSA, and the other formats that pysubs2 reads."""

import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pysubs2

from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport
from videollm_mod.train.data.subtitle_formats.markup import plain, plain_ass, tidy


_ASS_EVENT = re.compile(r"(?:Dialogue|Comment):[^,]*(?:,\s*-?\d\d?:\d\d:\d\d(?:[.,]\d{1,3})?\s*){2}(?:,[^,]*){6},")


def ass_events(text: str, report: SubtitleReport) -> Iterable[pysubs2.SSAEvent]:
    """Read the events of ASS and SSA; a spoilt one does not spoil the others."""
    lines = [line.strip() for line in text.split("\n")]
    begin = lines.index("[Events]") if "[Events]" in lines else 0
    columns = [line.partition(":")[2] for line in lines[begin:] if line.startswith("Format:")][:1]
    lines = [line for line in lines if line.startswith(("Dialogue:", "Comment:"))]
    # In some languages, programs write times with a comma.
    lines = [re.sub(r"(?<=\d:\d\d:\d\d),(?=\d{2,3}\s*,)", ".", line) for line in lines]
    # Some format lines name fewer columns than their events have.
    lines = [line if _ASS_EVENT.match(line) else _in_usual_order(line, *columns) for line in lines]
    events = [line for line in lines if _ASS_EVENT.match(line)]
    report.spoilt_lines += len(lines) - len(events)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pysubs2.SSAFile.from_string("\n".join(events), "ssa" if "Marked=" in text else "ass")


def _in_usual_order(line: str, columns: str = "") -> str:
    """Return an event of ASS with the columns that pysubs2 expects."""
    names = [name.strip() for name in columns.split(",")]
    if names[-1] != "Text":
        return line
    usual = {"Layer": "0", "Start": "", "End": "", "Style": "Default", "Name": ""}
    usual |= {"MarginL": "0", "MarginR": "0", "MarginV": "0", "Effect": "", "Text": ""}
    kind, _, fields = line.partition(":")
    found = usual | dict(zip(names, fields.strip().split(",", len(names) - 1), strict=False))
    return f"{kind}: {','.join(found[name] for name in usual)}"


def read_ass(events: Iterable[pysubs2.SSAEvent], report: SubtitleReport) -> Iterator[Line]:
    for event in events:
        if event.is_comment:
            report.comments += 1
        elif text := plain_ass(event.text, report):
            yield Line(max(0, event.start) / 1000, event.end / 1000, text)


def read_by_pysubs2(text: str, name: str | None, frame_rate: float | None) -> Iterator[Line]:
    try:
        events = pysubs2.SSAFile.from_string(text, name)
    except pysubs2.FormatAutodetectionError:
        return
    except pysubs2.UnknownFPSError:
        if frame_rate is None:
            raise
        events = pysubs2.SSAFile.from_string(text, name, fps=frame_rate)
    if name == "sami":
        # Each text stays until the next, which may be blank. pysubs2 guesses its end by its length.
        for event, following in pairwise(events):
            event.end = following.start
    for event in events:
        words = tidy(event.plaintext) if name else plain(event.plaintext.replace("\0", "<"))
        yield Line(max(0, event.start) / 1000, event.end / 1000, words)
