# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Read subtitles in any format and encoding as lines of plain text with their times.

pysubs2 reads ASS, SSA, TTML, SAMI, MicroDVD, MPL2 and TMP. FFmpeg reads LRC, SubViewer and the streams of videos. The
other formats are split here. pysubs2 would read word times of WebVTT as cues, its notes as text, and a number at the
end of a SubRip text as an index. Neither library reads YouTube's XML and JSON, or everything that the programs around
Whisper write.
"""

import codecs
import html
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import category
from xml.etree import ElementTree

import av
import pysubs2
from charset_normalizer import from_bytes
from pysubs2.formats.substation import parse_tags

from videollm_mod.video_reading_videollm_mod import VideoReader, open_container


@dataclass(frozen=True)
class Line:
    """A text with its start and end in seconds."""

    start: float
    end: float
    text: str


@dataclass
class SubtitleReport:
    """
    What was guessed, mended and left out on the way from subtitles to sentences. `str` says it in one line.

    Args:
        encoding (`str`): Encoding that was guessed; empty if it was known.
        unreadable_characters (`int`): Characters that are spoilt in the file, and became "�".
        spoilt_lines (`int`): Lines or packets that could not be read.
        mended_ends (`int`): Lines without an end, or with one before the start. They end when the next begins.
        other_streams (`int`): Further subtitle streams of the video.
        repeated_lines (`int`): Lines left out because they were still on screen.
        drawings, comments, asides, speaker_names (`int`): Parts left out because nobody says them.
        lines_without_text (`int`): Lines left out because nothing remained of them.
        lines_before_the_start (`int`): Lines left out because they end before the video's second 0.
        sentences_after_the_end (`int`): Sentences left out because they begin after the video's end.
    """

    encoding: str = ""
    unreadable_characters: int = 0
    spoilt_lines: int = 0
    mended_ends: int = 0
    other_streams: int = 0
    repeated_lines: int = 0
    drawings: int = 0
    comments: int = 0
    asides: int = 0
    speaker_names: int = 0
    lines_without_text: int = 0
    lines_before_the_start: int = 0
    sentences_after_the_end: int = 0

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        counts = {name.replace("_", " "): value for name, value in asdict(self).items() if name != "encoding"}
        kept = ("unreadable characters", "mended ends")
        parts = [f"guessed encoding {self.encoding} (`--encoding` sets it)"] if self.encoding else []
        parts += [f"{name}: {counts[name]}" for name in kept if counts[name]]
        left_out = [f"{name}: {value}" for name, value in counts.items() if value and name not in kept]
        return "; ".join(parts + ([f"left out {', '.join(left_out)}"] if left_out else []))


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
    text = _read_text(path, encoding, report)
    if text is None:
        cues = list(_packets(path, _container(path), stream, encoding, report))
    else:
        cues = list(_cues(path, text, frame_rate, report))
    return [turn for line in _each_once(_in_order(cues, report), report) for turn in _turns(line)]


# ----------------------------------------------------------------------------------------------------------- encodings

_MARKS = (
    (codecs.BOM_UTF8, "utf_8"),
    (codecs.BOM_UTF32_LE, "utf_32"),
    (codecs.BOM_UTF32_BE, "utf_32"),
    (codecs.BOM_UTF16_LE, "utf_16"),
    (codecs.BOM_UTF16_BE, "utf_16"),
)
# What subtitles are written in if not in Unicode, the commonest first: a short text often fits several equally well.
_ENCODINGS = ["cp1252", "cp1251", "cp1250", "gb18030", "big5", "cp932", "cp949", "euc_jp"]
_ENCODINGS += ["iso8859_2", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "tis_620"]


def _read_text(path: Path, encoding: str | None, report: SubtitleReport) -> str | None:
    """Return the text of a file, or `None` if it is not a text but a container."""
    with path.open("rb") as file:
        head = file.read(4096)
        if not _is_text(head):
            return None
        text = _decode(path, head + file.read(), encoding, report)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").lstrip("\ufeff")


def _is_text(head: bytes) -> bool:
    if head.startswith(b"#EXTM3U"):
        return False
    if head.startswith(tuple(mark for mark, _ in _MARKS)) or _unmarked_utf16(head):
        return True
    if b"-->" in head or b"\nDialogue:" in head:
        return True
    return b"\0\0" not in head and sum(byte < 9 or 13 < byte < 27 for byte in head) < 0.04 * len(head) + 1


def _unmarked_utf16(data: bytes) -> str | None:
    for name, high in (("utf_16_le", 1), ("utf_16_be", 0)):
        few, many = data[1 - high :: 2], data[high::2]
        if many and many.count(0) > 0.3 * len(many) and few.count(0) < 0.05 * len(many):
            return name
    return None


def _decode(path: Path, data: bytes, encoding: str | None, report: SubtitleReport) -> str:
    if encoding is not None:
        try:
            return data.decode(encoding)
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"'{path}' cannot be read as {encoding}: {error}.") from None
    known = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _unmarked_utf16(data[:4096])
    text = data.decode(known or "utf_8", "replace")
    spoilt = text.count("\ufffd") - data.count("\ufffd".encode())
    foreign = sum(character > "\x7f" for character in text) if spoilt > 0 else 0
    if not known and foreign < 2 * spoilt:
        known = report.encoding = _guess_encoding(data)
        text = data.decode(known, "replace")
    report.unreadable_characters += text.count("\ufffd")
    return text


def _guess_encoding(data: bytes) -> str:
    # Numbers and times tell nothing, and would outweigh the letters of a short file.
    letters = b"\n".join([line for line in data.splitlines() if not line.isascii()][:2000])
    fits = [
        (round(match.chaos, 2), _count_odd(str(match)), -match.coherence, _ENCODINGS.index(name))
        for match in from_bytes(letters, cp_isolation=_ENCODINGS)
        for name in match.could_be_from_charset
        if name in _ENCODINGS
    ]
    return _ENCODINGS[min(fits)[3]] if fits else _ENCODINGS[0]


def _count_odd(text: str) -> int:
    """Count what speaks against an encoding: signs in words, as in "pi³ka", and letters that are all small."""
    letters = [character for character in text if character.isalpha()]
    # Hebrew read as Cyrillic has no capitals. In French, most letters with accents are small.
    foreign = [letter for letter in letters if letter > "\x7f"]
    is_small = len(foreign) > len(letters) / 2 and all(letter.islower() for letter in foreign)
    is_small += len(re.findall(r"(?<=[^\W\d_])[«»ºªµ](?=[^\W\d_])", text))
    return is_small + sum(character > "\x7f" and category(character)[0] not in "LMPZ" for character in text)


# ------------------------------------------------------------------------------------------------------------- formats

_CLOCK = r"(-?)(?:(\d+):)?(\d+):(\d+)(?:[.,:](\d{1,3}))?\d*"
_SPAN = rf"[ \t]*{_CLOCK}[ \t]*[-–—]+ ?>[ \t]*{_CLOCK}"
# The times of a cue, with the number or name in the line above.
_SUBRIP = re.compile(rf"^(?:[ \t]*\d+[ \t]*\n)?{_SPAN}(?:[ \t].*)?\n?", re.M)
_WEBVTT = re.compile(rf"^(?:(?<=\n\n)(?!.*-->).+\n|[ \t]*\d+[ \t]*\n)?{_SPAN}(?:[ \t].*)?\n?", re.M)
_SBV = re.compile(rf"^{_CLOCK},{_CLOCK}[ \t]*\n", re.M)
# What the programs around Whisper print: "[00:01.000 --> 00:02.500]  A ball."
_PRINTED = re.compile(rf"^\[({_CLOCK}) --?> ({_CLOCK})\][ \t]*", re.M)
# The times of a cue that cannot be read, such as "00:00:-1,000 --> 00:00:02,000".
_SPOILT = re.compile(r"^(?:[ \t]*\d+[ \t]*\n)?[ \t]*-?\d{1,3}:\S{1,20}[ \t]*-->[ \t]*-?\d{1,3}:.*\n?", re.M)
_NOTE = re.compile(r"(?<=\n\n)(?:NOTE|STYLE|REGION)(?=[ \t\n]).*?(?=\n\n|\Z)", re.S)
_ASS_EVENT = re.compile(r"(?:Dialogue|Comment):[^,]*(?:,\s*-?\d\d?:\d\d:\d\d(?:[.,]\d{1,3})?\s*){2}(?:,[^,]*){6},")
# What FFmpeg writes where a subtitle stays until the next.
_NO_END = 0xFFFFFFFF
_TEXT_CODECS = ("srt", "subrip", "webvtt", "text")
_TTML_TIME = re.compile(r"""\b(begin|end|dur)\s*=\s*["']\s*([^"']*?)\s*["']""")
_TTML_SPAN = re.compile(r"<(?:\w+:)?span\b[^>]*\sbegin\s*=")
_TTML_NAMESPACE = re.compile(r"http://www\.w3\.org/(?:ns/ttml|\d{4}/(?:\d\d/)?tt(?:af1|ml))(?=[#\"'])")


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
        cues = list(_known(text, head, frame_rate, report))
    except Exception as error:  # Parsers raise many kinds of errors for spoilt text.
        raise ValueError(f"'{path}' cannot be read as subtitles: {error}.") from error
    if not cues:
        try:
            container = av.open(io.BytesIO(text.encode("utf-8", "replace")))
        except av.error.FFmpegError:
            raise ValueError(f"'{path}' is in no subtitle format that is known.") from None
        cues = _packets(path, container, 0, None, report)
        cues = _sung(cues, text) if container.format.name == "lrc" else cues
    yield from cues


def _sung(cues: Iterable[Line], text: str) -> Iterator[Line]:
    """Move lyrics by the offset of their file. A line ends before the next, so that one sung again stays."""
    # FFmpeg takes the milliseconds of the offset for microseconds.
    found = re.findall(r"^\[offset:[ \t]*([+-]?\d{1,9})[ \t]*\]", text, re.M | re.I)
    offset = 0.999 * int(found[-1]) / 1000 if found else 0.0
    for cue in cues:
        end = cue.end if cue.end < cue.start else max(cue.start, cue.end - 2 * TOUCH)
        start, end = (max(0.0, round(time - offset, 3)) for time in (cue.start, end))
        yield Line(start, end if cue.end >= cue.start else start - 1, cue.text)


def _known(text: str, head: str, frame_rate: float | None, report: SubtitleReport) -> Iterable[Line]:
    """Return the cues of a text. There are none if only FFmpeg knows its format."""
    if re.match(r"\{\s*\"|\[\s*[{\]]", head):
        data = json.loads(text)
        return _ass(pysubs2.SSAFile.from_string(text, "json"), report) if "styles" in data else _json(data, report)
    if re.search(r"^(?:\[Script Info\]|Dialogue:[^,\n]*,\s*\d+:)", text, re.M):
        return _ass(_ass_events(text, report), report)
    if re.match(r"<sami", head, re.I):
        return _pysubs2(text, "sami", frame_rate)
    if _TTML_NAMESPACE.search(text):
        return _pysubs2(_plain_ttml(text), "ttml", frame_rate)
    if re.match(r"(?:<\?xml[^>]*>\s*)?<(?:timedtext|transcript)\b", head):
        return _timedtext(text)
    text = _PRINTED.sub(lambda match: f"\n{match[1]} --> {match[7]}\n", text)
    report.comments += len(re.findall(r"\n\nNOTE[ \t\n]", text)) if head.startswith("WEBVTT") else 0
    is_webvtt = head.startswith("WEBVTT")
    cues = list(_split(_NOTE.sub("", text), _WEBVTT, report) if is_webvtt else _split(text, _SUBRIP, report))
    cues = cues or list(_split(text.replace("[br]", "\n"), _SBV, report)) or list(_tsv(text))
    # Times with frames are SCC's or STL's, which FFmpeg reads and pysubs2 takes for TMP.
    has_frames = re.search(r"^\d\d:\d\d:\d\d[:;]\d\d[\s,]", text, re.M)
    return cues or ([] if has_frames else _pysubs2(text.replace("<", "\0"), None, frame_rate))


def _split(text: str, pattern: re.Pattern[str], report: SubtitleReport) -> Iterator[Line]:
    """Split a text at its cues' times. A cue with times that cannot be read is left out."""
    text = f"\n\n{text}"
    spans = list(pattern.finditer(text))
    ends = [*(span.start() for span in spans), len(text)][1:]
    for span, end in zip(spans, ends, strict=True):
        said, *spoilt = _SPOILT.split(text[span.end() : end])
        report.spoilt_lines += len(spoilt)
        yield Line(_clock(*span.groups()[:5]), _clock(*span.groups()[5:]), _plain(said))


def _clock(sign: str, hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return 0.0 if sign else whole + int((fraction or "0").ljust(3, "0")) / 1000


def _tsv(text: str) -> Iterator[Line]:
    """Read Whisper's TSV, in milliseconds, and labels of Audacity, in seconds."""
    rows = [row.split("\t", 2) for row in text.split("\n") if re.match(r"-?\d+(?:\.\d+)?\t-?\d+(?:\.\d+)?\t", row)]
    unit = 1 if any("." in row[0] + row[1] for row in rows) else 1000
    for start, end, words in rows:
        yield Line(max(0.0, float(start) / unit), float(end) / unit, _tidy(words))


def _json(data: Any, report: SubtitleReport) -> Iterator[Line]:
    """Read the JSON of Whisper, of the programs around it, of YouTube and of pysubs2."""
    names = ("segments", "chunks", "transcription", "events", "words")
    parts = data if isinstance(data, list) else next((data[name] for name in names if data.get(name)), [])
    words = []
    for part in parts:
        try:
            line = _json_line(part)
        except (KeyError, TypeError, ValueError, AttributeError):
            report.spoilt_lines += 1
            continue
        if "word" not in part:
            yield line
            continue
        # Words become a line that ends with a sentence or at a pause.
        if words and (line.start - words[-1].end > 1 or re.search(r"[.!?…。！？]\W*$", words[-1].text)):
            yield Line(words[0].start, words[-1].end, join([word.text for word in words]))
            words = []
        words.append(line)
    if words:
        yield Line(words[0].start, words[-1].end, join([word.text for word in words]))


def _json_line(part: dict[str, Any]) -> Line:
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
    return Line(max(0.0, float(start) / unit), -1.0 if end is None else float(end) / unit, _tidy(text))


def _timedtext(text: str) -> Iterator[Line]:
    """Read YouTube's XML: srv1 in seconds, srv2 and srv3 in milliseconds."""
    for element in ElementTree.fromstring(text).iter():
        about, unit = element.attrib, 1000 if "t" in element.attrib else 1
        if element.tag in ("p", "text") and ("t" in about or "start" in about):
            start = float(about.get("t") or about["start"]) / unit
            end = start + float(about.get("d") or about.get("dur") or 0) / unit
            yield Line(start, end, _plain("".join(element.itertext())))


def _plain_ttml(text: str) -> str:
    """Rewrite what pysubs2 does not know of TTML: frames, ticks, `dur` and older namespaces."""
    rates = {name: float(value) for name, value in re.findall(r":(frameRate|tickRate)\s*=\s*[\"']([\d.]+)", text)}
    frames = rates.get("frameRate", 30.0)
    for scale in re.findall(r":frameRateMultiplier\s*=\s*[\"'](\d+)[\s:](\d+)", text):
        frames *= int(scale[0]) / int(scale[1])
    units = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "f": 1 / frames, "t": 1 / rates.get("tickRate", frames)}

    def plain(match: re.Match[str]) -> str:
        name = {"dur": "duration"}.get(match[1], match[1])
        if offset := re.fullmatch(r"([\d.]+)(h|ms|m|s|f|t)", match[2]):
            return f'{name}="{float(offset[1]) * units[offset[2]]:.3f}s"'
        *clock, last = match[2].split(":")
        if len(clock) == 3:
            clock, last = clock[:2], float(clock[2]) + float(last) / frames
        seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(clock), 1)) + float(last)
        return f'{name}="{seconds:.3f}s"'

    text = _TTML_NAMESPACE.sub("http://www.w3.org/ns/ttml", text)
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


def _ass_events(text: str, report: SubtitleReport) -> Iterable[pysubs2.SSAEvent]:
    """Read the events of ASS and SSA; a spoilt one does not spoil the others."""
    lines = [line.strip() for line in text.split("\n")]
    begin = lines.index("[Events]") if "[Events]" in lines else 0
    columns = [line.partition(":")[2] for line in lines[begin:] if line.startswith("Format:")][:1]
    lines = [line for line in lines if line.startswith(("Dialogue:", "Comment:"))]
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


def _ass(events: Iterable[pysubs2.SSAEvent], report: SubtitleReport) -> Iterator[Line]:
    for event in events:
        if event.is_comment:
            report.comments += 1
        elif text := _plain_ass(event.text, report):
            yield Line(max(0, event.start) / 1000, event.end / 1000, text)


def _pysubs2(text: str, name: str | None, frame_rate: float | None) -> Iterator[Line]:
    try:
        events = pysubs2.SSAFile.from_string(text, name)
    except pysubs2.FormatAutodetectionError:
        return
    except pysubs2.UnknownFPSError:
        if frame_rate is None:
            raise
        events = pysubs2.SSAFile.from_string(text, name, fps=frame_rate)
    for event in events:
        words = _tidy(event.plaintext) if name else _plain(event.plaintext.replace("\0", "<"))
        yield Line(max(0, event.start) / 1000, event.end / 1000, words)


def _packets(path: Path, container: Any, index: int, encoding: str | None, report: SubtitleReport) -> Iterator[Line]:
    """Read a subtitle stream of a video with FFmpeg, or a text in a format that only FFmpeg knows."""
    with container:
        stream, codec = _text_stream(path, container, index)
        report.other_streams += len(container.streams.subtitles) - 1
        origin = float(_origin(path)) if container.streams.video else 0.0
        found = list(_stream_texts(container, stream, codec, report))
    # All are decoded together, so that there is enough text to guess an encoding.
    payloads = b"\x1e".join(payload.replace(b"\0", b"").replace(b"\x1e", b"") for _, _, payload in found)
    texts = _decode(path, payloads, encoding, report).split("\x1e")
    for (start, end, _), text in zip(found, texts, strict=False):
        is_ass = codec not in _TEXT_CODECS
        words = _plain_ass(text.split(",", 8)[-1], report) if is_ass else _plain(text)
        if max(start, end) < origin:
            report.lines_before_the_start += 1
        elif words or not is_ass:
            yield Line(max(0.0, start - origin), end - origin, words)


def _container(path: Path) -> Any:
    try:
        return open_container(path)
    except ValueError as error:
        raise ValueError(f"'{path}' is neither a text nor a video that can be read.") from error


def _text_stream(path: Path, container: Any, index: int) -> tuple[Any, str]:
    """Return a subtitle stream and the name of its codec. Raise `ValueError` if it holds pictures."""
    streams = container.streams.subtitles
    if not 0 <= index < len(streams):
        raise ValueError(f"'{path}' has no subtitle stream {index}: it has {len(streams)}.")
    found = [getattr(stream.codec_context, "codec", None) for stream in streams]
    names = [None if codec is None or codec.bitmap_sub else codec.name for codec in found]
    if names[index] is None:
        what = "holds pictures, not text" if found[index] else "is in a codec that FFmpeg cannot read"
        others = ", ".join(str(other) for other, name in enumerate(names) if name) or "none"
        raise ValueError(f"Subtitle stream {index} of '{path}' {what} (streams of text: {others}).")
    return streams[index], names[index]


def _origin(path: Path) -> Any:
    """Return the second of the container's clock that is second 0 of the video."""
    try:
        with VideoReader(path) as reader:
            return reader.origin
    except ValueError:
        return 0


def _stream_texts(
    container: Any, stream: Any, codec: str, report: SubtitleReport
) -> Iterator[tuple[float, float, bytes]]:
    """Yield start and end in seconds of the container's clock, and texts: as they are, or as events of ASS."""
    for packet in _all_packets(container, stream, report):
        if codec in (*_TEXT_CODECS, "ass", "ssa"):
            # FFmpeg's decoders of these codecs lose text between < and >.
            if packet.pts is not None:
                start, seconds = float(packet.pts * packet.time_base), float((packet.duration or 0) * packet.time_base)
                yield start, start + seconds, bytes(packet)
            continue
        try:
            event = stream.codec_context.decode2(packet)
        except av.error.FFmpegError:
            report.spoilt_lines += 1
            continue
        if event is not None and event.pts is not None:
            start, until = event.pts / 1e6, event.end_display_time
            end = start - 1 if until == _NO_END else start + until / 1000
            yield from ((start + event.start_display_time / 1000, end, part.ass) for part in event)


def _all_packets(container: Any, stream: Any, report: SubtitleReport) -> Iterator[Any]:
    for _ in range(100):
        try:
            yield from container.demux(stream)
            return
        except IndexError:
            # PyAV does so at the end of a file in which further streams begin later.
            return
        except av.error.FFmpegError:
            report.spoilt_lines += 1


# -------------------------------------------------------------------------------------------------------------- markup

_NAMES = "b|big|c|center|div|em|font|i|lang|p|rp|rt|ruby|s|small|span|strong|tt|u|v"
_TAG = re.compile(
    rf"</?(?:{_NAMES})(?:\.[^\s<>]*)?(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>"
    r"|<lang(?:\.[^\s<>]*)?\s+[\w-]+>|<\d+:[\d:.]+>|\{\\[^{}]*\}|\{[cCfFhHpPsSyY]:[^{}]*\}",
    re.I,
)
_VOICE = r"<v(?:\.[^\s<>]*)?[ \t]+([^<>=\n]+)>"
_VOICE = re.compile(rf"^[ \t]*{_VOICE}|(?:</v>[ \t]*){_VOICE}|{_VOICE}(?=\S)", re.M)
_RUBY = re.compile(r"<rt(?:\.[^\s<>]*)?>.*?(?:</rt>|(?=</ruby>))", re.S)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|\w{2,31});")
# Marks of direction and width, control characters, and halves of characters.
_INVISIBLE = "\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff"
_INVISIBLE = re.compile(f"[{_INVISIBLE}]")


def _plain(text: str) -> str:
    """Take the markup of SubRip and WebVTT away: known tags first, then entities, so that "&lt;i&gt;" stays "<i>"."""
    text = re.sub(r"<br\s*/?>|\\N", "\n", text, flags=re.I)
    text = _RUBY.sub("", text)
    names = {"".join(found).strip() for found in _VOICE.findall(text)}
    text = _TAG.sub("", _VOICE.sub("\n- " if len(names) > 1 else "\n", text))
    return _tidy(_ENTITY.sub(lambda match: html.unescape(match[0]), text).replace("\\h", " "))


def _plain_ass(text: str, report: SubtitleReport) -> str:
    """Take the overrides and drawings of ASS away."""
    fragments = parse_tags(text.replace("\\{", "\1").replace("\\}", "\2"))
    is_drawing = any(style.drawing and part.strip() for part, style in fragments)
    text = "".join(part for part, style in fragments if not style.drawing)
    report.drawings += is_drawing
    report.lines_without_text += not is_drawing and not text.strip()
    return _tidy(re.sub(r"\\[nh]", " ", text.replace("\\N", "\n")).replace("\1", "{").replace("\2", "}"))


def _tidy(text: str) -> str:
    rows = [" ".join(row.split()) for row in _INVISIBLE.sub("", text).split("\n")]
    return "\n".join(row for row in rows if row)


# --------------------------------------------------------------------------------------------------------------- lines

# Cues that follow each other within this time touch, in seconds.
TOUCH = 0.05
_DRAWING = re.compile(r"m(?: -?\d+(?:\.\d+)?){2}(?: (?:[bclmnps]|-?\d+(?:\.\d+)?))+")
# A speaker begins: "- Hello." or ">> Hello.", but not "-5 degrees".
DASH = re.compile(r"(?:[-‐‑–—－](?![-‐‑–—－]|[.,]?\d|[$€£¥])|>{2,3}(?!>))\s*")
# Not in "DR. SMITH: Hello."
_NAME = r"(?<=[^A-Z][.!?…] )(?=[A-Z][A-Z .'-]*[A-Z]: )"
_NEXT_SPEAKER = re.compile(rf"(?<=[.!?…。！？])\s+(?:(?={DASH.pattern}\S)|{_NAME})")
# Scripts that put no spaces between words, and the full-width signs.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
UNSPACED = re.compile(f"[{UNSPACED}\U00020000-\U0003ffff]")
_SIGN = re.compile("[\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")


def join(texts: Iterable[str]) -> str:
    """Join texts with spaces, or without them in scripts that have none."""
    joined = ""
    for text in texts:
        edge = joined[-1:] + text[:1]
        is_unspaced = len(UNSPACED.findall(edge)) == 2 or _SIGN.search(edge)
        joined += text if not joined or not text or is_unspaced else f" {text}"
    return joined


def count_words(text: str) -> int:
    """Count words, and characters in scripts without spaces between words."""
    return len(UNSPACED.findall(text)) + len(UNSPACED.sub(" ", text).split())


def split_line(line: Line, stops: Iterable[int]) -> Iterator[Line]:
    """Split a line at these places of its text. Times are interpolated."""
    rate, cursor = (line.end - line.start) / max(1, len(line.text)), 0
    for stop in [*stops, len(line.text)]:
        if text := line.text[cursor:stop].strip():
            yield Line(line.start + cursor * rate, line.start + stop * rate, text)
        cursor = stop


def _in_order(cues: list[Line], report: SubtitleReport) -> Iterator[Line]:
    """Yield cues in order of time, with an end that is not before the start."""
    finite = [cue for cue in cues if math.isfinite(cue.start) and math.isfinite(cue.end)]
    report.spoilt_lines += len(cues) - len(finite)
    cues = sorted(finite, key=lambda cue: cue.start)
    for cue, following in zip(cues, [*cues[1:], None], strict=False):
        # Converters from ASS leave drawings behind, as text.
        text = "\n".join(row for row in cue.text.split("\n") if not _DRAWING.fullmatch(row))
        is_drawing, cue = text != cue.text, replace(cue, text=text)
        report.drawings += is_drawing
        if cue.end < cue.start:
            report.mended_ends += 1
            cue = replace(cue, end=following.start if following else cue.start)
        if cue.text:
            yield cue
        else:
            report.lines_without_text += not is_drawing


def _each_once(cues: Iterable[Line], report: SubtitleReport) -> list[Line]:
    """Leave out the rows that are still on screen from a cue before."""
    cues, kept = list(cues), []
    grown = [after.text != before.text and after.text.startswith(before.text) for before, after in pairwise(cues)]
    grows = sum(grown) > max(2, len(grown) / 2)
    shown: list[tuple[float, list[str], int]] = []
    for cue in cues:
        rows = cue.text.split("\n")
        shown = [(end, other, index) for end, other, index in shown if end >= cue.start - TOUCH]
        found = [(*_carried(other, rows, grows), index) for _, other, index in shown]
        carried, new, index = max(found, key=lambda item: item[0], default=(0, rows, 0))
        report.repeated_lines += carried
        if new:
            index = len(kept)
            kept.append(replace(cue, text="\n".join(new)))
        else:
            kept[index] = replace(kept[index], end=max(kept[index].end, cue.end))
        shown.append((cue.end, rows, index))
    return kept


def _carried(before: list[str], rows: list[str], grows: bool) -> tuple[int, list[str]]:
    """Return how many rows end the previous cue and begin this one, and the text that is new. A row may have grown."""
    for count in range(min(len(before), len(rows)), 0, -1):
        last = rows[count - 1]
        if before[-count:-1] == rows[: count - 1] and (last == before[-1] or grows and last.startswith(before[-1])):
            rest = last[len(before[-1]) :].strip()
            return count, [rest, *rows[count:]] if rest else rows[count:]
    return 0, rows


def _turns(line: Line) -> Iterator[Line]:
    """Split a cue into what its speakers say, if it marks them with dashes or names, and join the rows of each."""
    turns: list[list[str]] = []
    for row in line.text.split("\n"):
        # Speakers may share a row: "- Who is it? - Me."
        first, *others = _NEXT_SPEAKER.split(row)
        if turns and not _begins_turn(first, turns[-1][-1], turns[0][0]):
            turns[-1].append(first)
        else:
            turns.append([first])
        turns += [[other] for other in others]
    texts = [join(turn) for turn in turns]
    stops = [sum(len(text) + 1 for text in texts[: count + 1]) for count in range(len(texts) - 1)]
    yield from split_line(replace(line, text=" ".join(texts)), stops)


def _begins_turn(row: str, before: str, first: str) -> bool:
    """Return whether another speaker says this row, in view of the row before and the first row of the cue."""
    if DASH.match(row):
        return bool(DASH.match(first)) or before[-1] in '.!?…。！？"”'
    return ": " in row and row.split(":")[0].isupper()
