# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Text without the markup of SubRip, WebVTT and ASS."""

import html
import re

from pysubs2.formats.substation import parse_tags

from videollm_mod.train.data.subtitle_formats.lines import SubtitleReport


_NAMES = "b|big|c|center|div|em|font|i|lang|p|rp|rt|ruby|s|small|span|strike|strong|sub|sup|tt|u|v"
_TAG = re.compile(
    rf"</?(?:{_NAMES})(?:\.[^\s<>]*)?(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>"
    r"|<a\s+[\w:-]+\s*=[^<>]*>|</a>|<lang(?:\.[^\s<>]*)?\s+[\w-]+>|<\d+:[\d:.]+>|\{\\[^{}]*\}|\{[cCfFhHpPsSyY]:[^{}]*\}",
    re.I,
)
_SAMI = "sami|samiparam|head|title|style|body|sync|br|table|tr|td|a|img|h\\d"
_NO_SAMI = re.compile(rf"<(?!!|/?(?:{_SAMI}|{_NAMES})(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>)", re.I)
_VOICE = r"<v(?:\.[^\s<>]*)?[ \t]+([^<>=\n]+)>"
_VOICE = re.compile(rf"^[ \t]*{_VOICE}|(?:</v>[ \t]*){_VOICE}|{_VOICE}(?=\S)", re.M)
_RUBY = re.compile(r"<rt(?:\.[^\s<>]*)?>.*?(?:</rt>|(?=</ruby>))", re.S)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|\w{2,31});")
# Marks of direction and byte order, which may also stand before times.
_MARKS = "\x00\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
INVISIBLE = re.compile(f"[{_MARKS}]")
# Beside them marks of width, control characters, and halves of characters.
_UNWANTED = re.compile(f"[{_MARKS}\x01-\x08\x0b-\x1f\x7f\u200b\u2060\ud800-\udfff]")
# Breaks and spaces that converters from ASS left in SubRip, and paths of Windows, which only look like them.
_PATH = r"(\b[C-H]:\\\S*)"
_LEFT = rf"{_PATH}|\\N|\\h"


def plain(text: str) -> str:
    """Take the markup of SubRip and WebVTT away: known tags first, then entities, so that "&lt;i&gt;" stays "<i>"."""
    # Without other signs of ASS, "\h" before a small letter may begin "\hbar".
    is_ass = re.search(r"\{\\|\\N", re.sub(_PATH, "", text))
    left = _LEFT if is_ass else f"{_LEFT}(?![a-z])"
    text = re.sub(left, lambda match: match[1] or {"\\N": "\n"}.get(match[0], " "), text)
    text = re.sub(r"<br\s*/?>", "\n", text, flags=re.I)
    text = _RUBY.sub("", text)
    names = {"".join(found).strip() for found in _VOICE.findall(text)}
    text = _TAG.sub("", _VOICE.sub("\n- " if len(names) > 1 else "\n", text))
    return tidy(_ENTITY.sub(lambda match: html.unescape(match[0]), text))


def keep_backslashes(text: str) -> str:
    r"""
    Keep "\N" and "\h" from being read as signs of ASS, in formats that have none. libass keeps them apart in the same
    way, and `tidy` takes the word joiners away.
    """
    return text.replace("\\", "\\\u2060")


def plain_sami(text: str, report: SubtitleReport) -> str:
    """
    Keep what stands between < and > in SAMI and is no tag, as pysubs2 would take "a<b and c>d" for one, and keep the
    first of several languages.
    """
    languages = re.findall(r"\.([\w-]+)\s*\{[^{}]*\blang\s*:", text, re.I)
    used = [name for name in dict.fromkeys(languages) if re.search(rf"<p\s[^>]*class\s*=\W?{name}\b", text, re.I)]
    report.other_streams += max(0, len(used) - 1)
    for name in used[1:]:
        text = re.sub(rf"<p\s[^>]*class\s*=\W?{name}\b.*?(?=<p\b|<sync\b|</body|\Z)", "", text, flags=re.I | re.S)
    return _NO_SAMI.sub("&lt;", text)


def plain_ass(text: str, report: SubtitleReport) -> str:
    """Take the overrides and drawings of ASS away."""
    fragments = parse_tags(text.replace("\\{", "\1").replace("\\}", "\2"))
    is_drawing = any(style.drawing and part.strip() for part, style in fragments)
    text = "".join(part for part, style in fragments if not style.drawing)
    report.drawings += is_drawing
    report.lines_without_text += not is_drawing and not text.strip()
    return tidy(re.sub(r"\\[nh]", " ", text.replace("\\N", "\n")).replace("\1", "{").replace("\2", "}"))


def tidy(text: str) -> str:
    rows = [" ".join(row.split()) for row in _UNWANTED.sub("", text).split("\n")]
    return "\n".join(row for row in rows if row)
