# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Subtitles in JSON: of Whisper, of the programs around it, and of YouTube."""

from collections.abc import Iterator
from typing import Any

import pysubs2

from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport, ends_line, join
from videollm_mod.train.data.subtitle_formats.markup import tidy


def read_json(data: Any, report: SubtitleReport) -> Iterator[Line]:
    """Read the JSON of Whisper, of the programs around it, of YouTube and of pysubs2."""
    names = ("segments", "chunks", "transcription", "events", "words")
    parts = data if isinstance(data, list) else next((data[name] for name in names if data.get(name)), [])
    words = []
    for part in parts:
        try:
            line = _json_line(part)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            report.spoilt_lines += 1
            continue
        if "word" not in part:
            yield line
            continue
        if words and ends_line(words[-1], line):
            yield Line(words[0].start, words[-1].end, join([word.text for word in words]))
            words = []
        words.append(line)
    if words:
        yield Line(words[0].start, words[-1].end, join([word.text for word in words]))


def _json_line(part: dict[str, Any]) -> Line:
    """Read a part with pysubs2, which knows the names that Whisper itself gives."""
    text, unit = part.get("text", part.get("word")), 1
    if "tStartMs" in part:  # YouTube
        text, unit = "".join(piece["utf8"] for piece in part.get("segs", ())), 1000
        start, end = part["tStartMs"], part["tStartMs"] + part.get("dDurationMs", 0)
    elif "offsets" in part:  # whisper.cpp
        start, end, unit = part["offsets"]["from"], part["offsets"]["to"], 1000
    elif "timestamp" in part:  # Transformers
        start, end = part["timestamp"]
    else:
        start, end = part["start"], part.get("end")
    # In this order, a start that is NaN stays one, and pysubs2 refuses it.
    times = {"start": max(float(start) / unit, 0.0), "end": -1.0 if end is None else float(end) / unit}
    [event] = pysubs2.load_from_whisper([{**times, "text": text}])
    return Line(event.start / 1000, event.end / 1000, tidy(text))
