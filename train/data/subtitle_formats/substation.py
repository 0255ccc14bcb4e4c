# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""ASS and SSA, and the other formats that pysubs2 reads."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pysubs2

from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport
from videollm_mod.train.data.subtitle_formats.markup import keep_backslashes, plain, plain_ass, tidy


_TIME = re.compile(r"\s*-?\d\d?:\d\d:\d\d(?:[.,]\d{1,3})?\s*")
_USUAL = ["layer", "start", "end", "style", "name", "marginl", "marginr", "marginv", "effect", "text"]


def ass_events(text: str, report: SubtitleReport) -> Iterable[pysubs2.SSAEvent]:
    """Read the events of ASS and SSA; a spoilt one does not spoil the others."""
    lines = [line.strip() for line in text.split("\n")]
    heads = [line.lower() for line in lines]
    begin = heads.index("[events]") if "[events]" in heads else 0
    formats = [line.partition(":")[2] for line in heads[begin:] if line.startswith("format:")][:1]
    orders = [[name.strip() for name in names.split(",")] for names in formats]
    lines = [line for line in lines if line.lower().startswith(("dialogue:", "comment:"))]
    # In some languages, programs write times with a comma.
    lines = [re.sub(r"(?<=\d:\d\d:\d\d),(?=\d{2,3}\s*,)", ".", line) for line in lines]
    # Some format lines name fewer columns than their events have. The longer order is tried first, as its margins must
    # be numbers, while any event fits a shorter one.
    orders = sorted([order for order in orders if order[-1] == "text"] + [_USUAL], key=len, reverse=True)
    best = max(orders, key=lambda order: sum(_has_margins(_fields(line, order)) for line in lines))
    fields = [next(filter(None, (_fields(line, order) for order in (best, *orders))), {}) for line in lines]
    report.spoilt_lines += sum(not found for found in fields)
    events = "\n".join("{kind}: 0,{start},{end},Default,,0,0,0,,{text}".format(**found) for found in fields if found)
    return pysubs2.SSAFile.from_string(events, "ass")


def _fields(line: str, order: list[str]) -> dict[str, str]:
    """Return the fields of an event by the names of their columns, or nothing if its times are not in their places."""
    kind, _, fields = line.partition(":")
    found = dict(zip(order, fields.strip().split(",", len(order) - 1), strict=False))
    is_whole = "text" in found and all(_TIME.fullmatch(found.get(name, "")) for name in ("start", "end"))
    return {**found, "kind": kind.capitalize()} if is_whole else {}


def _has_margins(fields: dict[str, str]) -> bool:
    margins = [value.strip() for name, value in fields.items() if name.startswith("margin")]
    return bool(fields) and all(margin.isdigit() for margin in margins if margin)


def read_ass(events: Iterable[pysubs2.SSAEvent], report: SubtitleReport) -> Iterator[Line]:
    for event in events:
        if event.is_comment:
            report.comments += 1
        elif text := plain_ass(event.text, report):
            yield Line(max(0, event.start) / 1000, event.end / 1000, text)


def read_by_pysubs2(text: str, name: str | None, frame_rate: float | None) -> Iterator[Line]:
    text = keep_backslashes(text)
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
