# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Subtitles in XML: TTML and YouTube's."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from videollm_mod.train.data.subtitle_formats.lines import Line
from videollm_mod.train.data.subtitle_formats.markup import keep_backslashes, plain


_TTML_TIME = re.compile(r"""\b(begin|end|dur)\s*=\s*["']\s*([^"']*?)\s*["']""")
_TTML_SPAN = re.compile(r"<(?:\w+:)?span\b[^>]*\sbegin\s*=")
TTML_NAMESPACE = re.compile(r"http://www\.w3\.org/(?:ns/ttml|\d{4}/(?:\d\d/)?tt(?:af1|ml))(?=[#\"'])")


def read_timedtext(text: str) -> Iterator[Line]:
    """Read YouTube's XML: srv1 in seconds, srv2 and srv3 in milliseconds."""
    for element in ElementTree.fromstring(text).iter():
        about, unit = element.attrib, 1000 if "t" in element.attrib else 1
        if element.tag in ("p", "text") and ("t" in about or "start" in about):
            start = float(about.get("t") or about["start"]) / unit
            end = start + float(about.get("d") or about.get("dur") or 0) / unit
            yield Line(start, end, plain(keep_backslashes("".join(element.itertext()))))


def plain_ttml(text: str) -> str:
    """Rewrite what pysubs2 does not know of TTML: frames, ticks, `dur` and older namespaces."""
    rates = {name: float(value) for name, value in re.findall(r":(frameRate|tickRate)\s*=\s*[\"']([\d.]+)", text)}
    frames = rates.get("frameRate", 30.0)
    for scale in re.findall(r":frameRateMultiplier\s*=\s*[\"'](\d+)[\s:](\d+)", text):
        frames *= int(scale[0]) / int(scale[1])
    units = {
        "h": 3600,
        "m": 60,
        "s": 1,
        "ms": 1e-3,
        "f": 1 / frames,
        "t": 1 / rates.get("tickRate", rates.get("frameRate", 1.0)),
    }

    def plain(match: re.Match[str]) -> str:
        name = {"dur": "duration"}.get(match[1], match[1])
        if offset := re.fullmatch(r"([\d.]+)(h|ms|m|s|f|t)", match[2]):
            return f'{name}="{float(offset[1]) * units[offset[2]]:.3f}s"'
        *clock, last = match[2].split(":")
        if len(clock) == 3:
            clock, last = clock[:2], float(clock[2]) + float(last) / frames
        seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(clock), 1)) + float(last)
        return f'{name}="{seconds:.3f}s"'

    text = TTML_NAMESPACE.sub("http://www.w3.org/ns/ttml", text)
    text = _TTML_TIME.sub(plain, _timed_spans(text) if _TTML_SPAN.search(text) else text)
    return re.sub(r"(<(?:\w+:)?p\b)(?![^>]*\s(?:end|duration)=)", r'\1 duration="0s"', text)


def _timed_spans(text: str) -> str:
    """Turn the spans of paragraphs without times, which have the times in their place, into paragraphs."""
    root, name = ElementTree.fromstring(text), "{{http://www.w3.org/ns/ttml}}{}".format
    for parent in list(root.iter()):
        for index, paragraph in reversed(list(enumerate(parent))):
            spans = [span for span in paragraph.findall(name("span")) if "begin" in span.attrib]
            if paragraph.tag == name("p") and "begin" not in paragraph.attrib and spans:
                for span in spans:
                    span.tag, span.tail = name("p"), None
                parent[index : index + 1] = spans
    return ElementTree.tostring(root, encoding="unicode")
