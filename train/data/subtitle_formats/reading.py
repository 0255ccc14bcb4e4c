# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Read subtitles in any format and encoding as lines of plain text with their times.

pysubs2 reads ASS, SSA, SAMI, MicroDVD, MPL2, TMP and Whisper's JSON. FFmpeg reads SubRip, WebVTT, SubViewer, LRC and
the streams of videos. What both lose is mended before or after, and what neither reads is read here: TTML, YouTube's
XML and JSON, and tables. `docs/reading-video.md` lists it, and a test gives the libraries an input for each loss.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pysubs2

from videollm_mod.train.data.subtitle_formats.cues import NOTE, PRINTED, SUBRIP, WEBVTT, read_tsv, to_subrip
from videollm_mod.train.data.subtitle_formats.encodings import read_text
from videollm_mod.train.data.subtitle_formats.lines import (
    Line,
    SubtitleReport,
    cut_overlaps,
    each_once,
    in_order,
    to_turns,
)
from videollm_mod.train.data.subtitle_formats.lyrics import LYRICS, plain_lyrics, sung
from videollm_mod.train.data.subtitle_formats.markup import keep_backslashes, plain_sami
from videollm_mod.train.data.subtitle_formats.objects import read_json
from videollm_mod.train.data.subtitle_formats.streams import open_as_video, read_stream
from videollm_mod.train.data.subtitle_formats.substation import ass_events, read_ass, read_by_pysubs2
from videollm_mod.train.data.subtitle_formats.timed_text import TTML_ROOT, read_timedtext, read_ttml
from videollm_mod.video_opening_videollm_mod import open_input


# Formats of texts that only FFmpeg reads. In others, such as SDP, a text names addresses that FFmpeg opens.
_TEXTS = "aqtitle,ass,jacosub,lrc,mcc,microdvd,mpl2,mpsub,pjs,realtext,sami,scc,srt,stl,subviewer,subviewer1"
_TEXTS += ",tedcaptions,vplayer,webvtt"
_XML = re.compile(r"\A\s*<\?xml[^>]*>\s*")


def read_subtitles(
    source: str | Path,
    stream: int = 0,
    *,
    encoding: str | None = None,
    frame_rate: float | None = None,
    report: SubtitleReport | None = None,
) -> list[Line]:
    """
    Read the lines of a subtitle file or of a video's subtitle stream, without markup, in order of time.

    A line that stays on screen over several cues, as in rolling captions, comes once, when it first appears. What
    several speakers say in one cue comes as several lines, which begin with a dash.

    Args:
        source (`str` or `Path`): A subtitle file, or a video. The format follows from the content.
        stream (`int`, *optional*, defaults to 0): Index of the subtitle stream of a video.
        encoding (`str`, *optional*): Encoding of a text file. By default a byte order mark decides, then UTF-8 is
            tried, then the encoding is guessed.
        frame_rate (`float`, *optional*): Frames per second, for formats that count frames.
        report ([`SubtitleReport`], *optional*): Where to count what was guessed, mended and left out.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`: If there is no such file.
        `ValueError`: If it cannot be read, or does not have this subtitle stream.
    """
    path, report = Path(source), SubtitleReport() if report is None else report
    if path.is_dir():
        raise IsADirectoryError(f"'{source}' is a folder: name a subtitle file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{source}'.")
    text = read_text(path, encoding, report)
    if text is None:
        cues = list(read_stream(path, open_as_video(path), stream, encoding, report))
    else:
        cues = list(_cues(path, text, frame_rate, report))
    return [turn for line in cut_overlaps(each_once(in_order(cues, report), report)) for turn in to_turns(line)]


def _cues(path: Path, text: str, frame_rate: float | None, report: SubtitleReport) -> Iterator[Line]:
    """Yield the cues of a text in the order of the file, without markup."""
    head = text[:1000].lstrip()
    if not head:
        raise ValueError(f"'{path}' is empty.")
    if re.match(r"<!doctype html|<html", head, re.I):
        raise ValueError(f"'{path}' is a web page, not subtitles.")
    if head.startswith("# VobSub"):
        raise ValueError(f"'{path}' holds pictures, not text.")
    try:
        found = _known(text, head, frame_rate, report)
        cues = None if found is None else list(found)
    except Exception as error:  # Parsers raise many kinds of errors for spoilt text.
        raise ValueError(f"'{path}' cannot be read as subtitles: {str(error).rstrip('.')}.") from error
    if cues is None:
        try:
            is_lyrics = bool(LYRICS.search(text))
            written = plain_lyrics(text, report) if is_lyrics else text
            container = _open_text(keep_backslashes(written), "lrc" if is_lyrics else None)
            if container.format.name == "jacosub":  # It has signs with backslashes.
                container = _open_text(text)
        except av.error.FFmpegError:
            raise ValueError(f"'{path}' is in no subtitle format that is known.") from None
        cues = read_stream(path, container, 0, None, report)
        cues = sung(cues, text) if is_lyrics else cues
    yield from cues


def _open_text(text: str, name: str | None = None) -> Any:
    # FFmpeg cuts long titles in the middle of a character.
    data, options = io.BytesIO(text.encode("utf-8", "replace")), {"format_whitelist": _TEXTS}
    return open_input(data, format=name, options=options)


def _known(text: str, head: str, frame_rate: float | None, report: SubtitleReport) -> Iterable[Line] | None:
    """Return the cues of a text, or `None` if only FFmpeg may know its format."""
    # The text is decoded already, and parsers of XML would decode it once more.
    text, head = _XML.sub("", text), _XML.sub("", head)
    if re.match(r"\{\s*\"|\[\s*[{\]]", head):
        data = json.loads(text)
        if "styles" in data:
            return read_ass(pysubs2.SSAFile.from_string(text, "json"), report)
        return list(read_json(data, report)) or None
    if re.search(r"^(?:\[Script Info\]|Dialogue:[^,\n]*,\s*\d+:)", text, re.M):
        return read_ass(ass_events(text, report), report)
    if re.match(r"<sami", head, re.I):
        return read_by_pysubs2(plain_sami(text, report), "sami", frame_rate)
    if TTML_ROOT.match(text):
        return read_ttml(text, report)
    if re.match(r"<(?:timedtext|transcript)\b", head):
        return read_timedtext(text)
    is_webvtt = head.startswith("WEBVTT")
    if is_webvtt:
        report.comments += len(re.findall(r"\n\nNOTE[ \t\n]", text))
        text = NOTE.sub("", text)
    for pattern in (WEBVTT if is_webvtt else SUBRIP, PRINTED):
        if pattern.search(f"\n\n{text}"):
            text = text if pattern is SUBRIP else keep_backslashes(text)
            return _read_subrip(to_subrip(text, pattern, report), report)
    # FFmpeg reads SubViewer, also YouTube's, and the times with frames of SCC and STL. pysubs2 takes them for others.
    is_read_by_ffmpeg = re.search(r"^\d+:\d\d:\d\d(?:[:;]\d\d[\s,]|\.\d+,\d+:\d\d:\d\d\.\d)", text, re.M)
    cues = list(read_tsv(text))
    if not cues and not is_read_by_ffmpeg:
        # In MicroDVD, a cue without an end stays until the next.
        text = re.sub(r"^(\{\d+\}\{)(?=\})", r"\g<1>0", text, flags=re.M)
        cues = list(read_by_pysubs2(text.replace("<", "\0"), None, frame_rate))
    return cues or None


def _read_subrip(text: str, report: SubtitleReport) -> list[Line]:
    container = open_input(io.BytesIO(text.encode("utf-8", "replace")), format="srt")
    cues = list(read_stream(Path("."), container, 0, "utf_8", report))
    # FFmpeg drops a cue that is there twice.
    report.repeated_lines += max(0, text.count("\v") - len(cues))
    # Ends before the start are counted already.
    return [replace(cue, end=max(cue.start, cue.end)) for cue in cues]
