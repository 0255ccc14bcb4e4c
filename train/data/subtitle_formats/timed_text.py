# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Subtitles in XML: TTML and YouTube's."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport, ends_line, join
from videollm_mod.train.data.subtitle_formats.markup import keep_backslashes, plain, tidy


# The root of TTML in any namespace, or in none, behind comments and declarations.
TTML_ROOT = re.compile(r"\s*(?:<!--(?:(?!-->).)*-->\s*|<(?!!--)[?!][^>]*>\s*)*<(?:[\w.-]+:)?tt[\s>]", re.S)
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:[.,]\d+)?)(?::(\d+(?:\.\d+)?))?")
_OFFSET = re.compile(r"(\d+(?:\.\d+)?)(h|m|s|ms|f|t)")


def read_timedtext(text: str) -> Iterator[Line]:
    """Read YouTube's XML: srv1 in seconds, srv2 and srv3 in milliseconds."""
    for element in ElementTree.fromstring(text).iter():
        about, unit = element.attrib, 1000 if "t" in element.attrib else 1
        if element.tag in ("p", "text") and ("t" in about or "start" in about):
            start = float(about.get("t") or about["start"]) / unit
            end = start + float(about.get("d") or about.get("dur") or 0) / unit
            yield Line(start, end, plain(keep_backslashes("".join(element.itertext()))))


def read_ttml(text: str, report: SubtitleReport) -> Iterator[Line]:
    """
    Read the paragraphs of TTML, and their spans that have times of their own. An element without an end stays as long
    as its parent, or until the next line.
    """
    root = ElementTree.fromstring(text)
    for element in root.iter():
        # The oldest files have other namespaces, and some have none.
        element.tag = element.tag.rpartition("}")[2]
    yield from _paragraphs(root, 0.0, math.inf, _Clock(root, report))


class _Clock:
    """Times of the elements of a document, whose frames and ticks are in its root."""

    def __init__(self, root: Element, report: SubtitleReport) -> None:
        rates = {name.rpartition("}")[2]: value for name, value in root.attrib.items()}
        frames = float(rates.get("frameRate", 30))
        ticks = float(rates.get("tickRate", rates.get("frameRate", 1)))
        if scale := re.fullmatch(r"(\d+)[\s:](\d+)", rates.get("frameRateMultiplier", "")):
            frames *= int(scale[1]) / int(scale[2])
        self.units = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "f": 1 / frames, "t": 1 / ticks}
        self.report = report
        pairs = [(parent, child) for parent in root.iter() for child in parent]
        # Times count from the start of the parent. Lyrics of Apple count all of them from second 0.
        self.is_absolute = any(self._is_absolute(parent, child) for parent, child in pairs)

    def children(self, parent: Element, start: float, end: float) -> Iterator[tuple[Element, float, float]]:
        """Yield the children of an element with their start and end in seconds. Spoilt times cost a child its text."""
        is_sequence, origin = parent.get("timeContainer") == "seq", start
        for child in parent:
            try:
                first, last = self._times(child, 0.0 if self.is_absolute else origin, origin, end)
            except ValueError:
                self.report.spoilt_lines += max(1, sum(element.tag == "p" for element in child.iter()))
                tail, first, last = child.tail, start, end
                child.clear()
                child.tag, child.tail = "", tail
            yield child, first, last
            if is_sequence and child.tag in ("div", "p", "span"):
                origin = last

    def _times(self, element: Element, origin: float, start: float, limit: float) -> tuple[float, float]:
        if "begin" in element.attrib:
            start = origin + self._seconds(element.attrib["begin"])
        end = origin + self._seconds(element.attrib["end"]) if "end" in element.attrib else math.inf
        if "dur" in element.attrib:
            end = min(end, start + self._seconds(element.attrib["dur"]))
        return start, min(end, limit) if start < limit else end

    def _seconds(self, time: str) -> float:
        """Return an offset ("1.5s", "20f") or a clock ("00:00:01.5", "00:00:01:12") in seconds."""
        if offset := _OFFSET.fullmatch(time.strip()):
            return float(offset[1]) * self.units[offset[2]]
        if not (clock := _CLOCK.fullmatch(time.strip())):
            raise ValueError(f"unknown time {time!r}")
        hours, minutes, seconds, frames = (float((part or "0").replace(",", ".")) for part in clock.groups())
        return 3600 * hours + 60 * minutes + seconds + frames * self.units["f"]

    def _is_absolute(self, parent: Element, child: Element) -> bool:
        """Return whether a child would begin behind the end of its parent, unless its time counts from second 0."""
        try:
            [(first, last), (begin, _)] = [self._times(element, 0.0, 0.0, math.inf) for element in (parent, child)]
        except ValueError:
            return False
        return first > 0 and first <= begin <= last < first + begin


def _paragraphs(parent: Element, start: float, end: float, clock: _Clock) -> Iterator[Line]:
    for child, first, last in clock.children(parent, start, end):
        if child.tag == "p":
            yield from _lines(child, first, last, clock)
        elif child.tag in ("body", "div"):
            yield from _paragraphs(child, first, last, clock)


def _lines(paragraph: Element, start: float, end: float, clock: _Clock) -> Iterator[Line]:
    """Yield a paragraph as one line, or as several if its spans have times of their own."""
    lines: list[list[Line]] = [[]]
    for piece in _pieces(paragraph, start, end, clock):
        words, is_blank = lines[-1], not piece.text.strip()
        # Text without a time of its own goes with the one before.
        is_timed = not is_blank and (piece.start, piece.end) != (start, end)
        if words and not (is_timed and (piece.start, piece.end) != (words[-1].start, words[-1].end)):
            words[-1] = replace(words[-1], text=words[-1].text + piece.text)
        elif words and ends_line(words[-1], piece):
            lines.append([piece])
        elif not is_blank:
            words.append(piece)
    for words in lines:
        texts = [word.text for word in words]
        # Spans may be syllables. But if there is no space between any of them, they are words or rows.
        is_spaced = any(one[-1].isspace() or other[0].isspace() for one, other in pairwise(texts))
        first, last = min([word.start for word in words] or [start]), max([word.end for word in words] or [end])
        said = tidy("".join(texts) if is_spaced else join(texts))
        yield Line(first, last if math.isfinite(last) else first - 1, said)


def _pieces(element: Element, start: float, end: float, clock: _Clock) -> Iterator[Line]:
    """Yield the texts of an element and of its spans, in order."""
    yield Line(start, end, re.sub(r"\s+", " ", element.text or ""))
    for child, first, last in clock.children(element, start, end):
        if child.tag == "span":
            yield from _pieces(child, first, last, clock)
        yield Line(start, end, ("\n" if child.tag == "br" else "") + re.sub(r"\s+", " ", child.tail or ""))
