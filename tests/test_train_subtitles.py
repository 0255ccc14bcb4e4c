# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Subtitles become timed messages: formats, encodings, markup, sentences, and what is left out."""

import io
import itertools
import json
import random
import re
import struct
import time as clock
from fractions import Fraction
from pathlib import Path
from unicodedata import normalize

import av
import pysubs2
import pytest
from tiny import random_frames, write_clip

from videollm_mod.train.data import subtitles
from videollm_mod.train.data.subtitle_formats.lines import Line, SubtitleReport
from videollm_mod.train.data.subtitle_formats.reading import read_subtitles
from videollm_mod.train.data.subtitles import to_sentences, to_timed_messages
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"
SRT = """1
00:00:00,500 --> 00:00:02,000
<i>Hello</i> there
my friend.

2
00:00:02,000 --> 00:00:04,000
[Door] It opens. ANNA: And

3
00:00:04,100 --> 00:00:05,100
ANNA: then it closes &amp; stays

4
00:00:09,000 --> 00:00:10,000
silent
"""


# What pysubs2 raises for a file in which one place is not as it expects.
_PARSERS = (KeyError, TypeError, ValueError, NotImplementedError)
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 49170 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


def srt(*cues):
    """Write cues (start, end, text) as SubRip."""
    clock = [[f"{time // 3600:02.0f}:{time // 60 % 60:02.0f}:{time % 60:06.3f}" for time in cue[:2]] for cue in cues]
    return "".join(f"{n}\n{a} --> {b}\n{cue[2]}\n\n" for n, ((a, b), cue) in enumerate(zip(clock, cues, strict=True)))


def ass(*texts, start=0):
    """Write an event of one second for each text."""
    head = "[Script Info]\nScriptType: v4.00+\n\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, Text\n"
    lines = [f"0,0:00:0{start + n}.00,0:00:0{start + n + 1}.00,Default,,0,0,0,,{text}" for n, text in enumerate(texts)]
    return head + "".join(f"Dialogue: {line}\n" for line in lines)


@pytest.fixture
def read(tmp_path):
    """Read a text or bytes as a subtitle file; return its lines, or its sentences."""

    def read(content, name="a.srt", *, report=None, sentences=False, **options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        lines = read_subtitles(path, report=report, **options)
        return [s.text for s in to_sentences(lines, report=report)] if sentences else lines

    return read


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Run the command; return the messages of the rows that it writes."""

    def convert(*arguments):
        out = tmp_path / "out.jsonl"
        monkeypatch.setattr("sys.argv", ["subtitles.py", *map(str, arguments), "--out", str(out)])
        subtitles.main()
        return [json.loads(line)["messages"][1:] for line in out.read_text(encoding="utf-8").splitlines()]

    return convert


def texts(lines):
    return [line.text for line in lines]


# ------------------------------------------------------------------------------------------------------------- formats

TWO = [Line(0.5, 1.5, "A red ball."), Line(2.0, 3.0, "It leaves.")]
TTML = 'xmlns="http://www.w3.org/ns/ttml"'
OLD_TTML = 'xmlns="http://www.w3.org/2006/10/ttaf1" xmlns:p="http://www.w3.org/2006/10/ttaf1#parameter"'
FORMATS = {
    "a.srt": "1\n00:00:00,500 --> 00:00:01,500\nA red ball.\n\n2\n00:00:02,000 --> 00:00:03,000\nIt leaves.\n",
    "crlf.srt": "1\r\n0:0:0,5 --> 0:0:1,50\r\nA red\r\nball.\r\n\r\n2\r\n0:0:2.0 -> 0:0:3.0\r\nIt leaves.\r\n",
    "cr.srt": "1\r00:00:00,500 --> 00:00:01,500\rA red ball.\r\r2\r00:00:02,000 --> 00:00:03,000\rIt leaves.",
    "no_index.srt": "00:00:00,500 --> 00:00:01,500\nA red ball.\n\n00:00:02,000 --> 00:00:03,000\nIt leaves.\n",
    "no_blank.srt": "1\n00:00:00,500 --> 00:00:01,500\nA red ball.\n2\n00:00:02,000 --> 00:00:03,000\nIt leaves.\n",
    "blank.srt": "1\n00:00:00,500 --> 00:00:01,500 X1:1\nA red\n\nball.\n\n2\n0:0:2,000 --> 0:0:3,00\nIt leaves.",
    "unsorted.srt": "1\n00:00:02,000 --> 00:00:03,000\nIt leaves.\n\n2\n00:00:00,500 --> 00:00:01,500\nA red\0 ball.",
    "text_mode.srt": "1\r\r\n0:0:0,5 -> 0:0:1,5\r\r\nA red ball.\r\r\n\r\r\n2\r\r\n0:0:2,0 -> 0:0:3,0\r\r\nIt leaves.",
    "double.srt": "1\n\n0:0:0,5 --> 0:0:1,5\n\nA red\n\nball.\n\n\n\n2\n\n0:0:2,0 --> 0:0:3,0\n\nIt leaves.\n\n",
    "extra_rows.srt": "1\n\n0:0:0,5 --> 0:0:1,5\n\nA red ball.\n\n\n2\n\n0:0:2,0 --> 0:0:3,0\n\nIt leaves.\n",
    "double.vtt": "WEBVTT\n\n\n\n0:0.500 --> 0:1.500\n\nA red ball.\n\n\n\n00:02.000 --> 00:03.000\n\nIt leaves.\n",
    "dots.srt": "1.\n0:0:0,5 --> 0:0:1,5\nA red ball.\n\n2.\n0:0:2,0 --> 0:0:3,0\nIt leaves.\n",
    "hashes.srt": "#1\n0:0:0,5 --> 0:0:1,5\nA red ball.\n\n#2\n0:0:2,0 --> 0:0:3,0\nIt leaves.\n",
    "brackets.srt": "[1]\n0:0:0,5 --> 0:0:1,5\nA red ball.\n\n[2]\n0:0:2,0 --> 0:0:3,0\nIt leaves.\n",
    "directions.srt": "\u202a1\u202c\n\u202a0:0:0,5 --> 0:0:1,5\u202c\nA red ball.\n\n"
    "\u200e2\u200f\n\u20670:0:2,0\u2069 --> 0:0:3,0\nIt leaves.\n",
    "some_directions.srt": "1\n0:0:0,5 --> 0:0:1,5\nA red ball.\n\n2\n\u200f0:0:2,0 --> 0:0:3,0\nIt leaves.\n",
    "a.vtt": """WEBVTT - x

NOTE a
b

id
00:00.500 --> 00:01.500 line:0
A red ball.

STYLE
::cue {}

id-2
00:02.000 --> 00:03.000
It leaves.

NOTE end""",
    "no_header.vtt": "00:00.500 --> 00:01.500\nA red ball.\n\n00:02.000 --> 00:03.000\nIt leaves.\n",
    "a.sbv": "0:00:00.500,0:00:01.500\nA red[br]ball.\n\n0:00:02.000,0:00:03.000\nIt leaves.\n",
    "a.ttml": f"""<?xml version="1.0"?><tt {TTML}><body><div>
        <p begin="0.5s" end="1.5s">A red<br/><span>ball.</span></p>
        <p begin="00:00:02.000" end="00:00:03.000">It leaves.</p></div></body></tt>""",
    "frames.ttml": f"""<tt {OLD_TTML} p:frameRate="10" p:tickRate="1000"><body><div>
        <p begin="00:00:00:05" dur="1s">A red ball.</p><p begin="2000t" end="30f">It leaves.</p></div></body></tt>""",
    "a.srv1": """<transcript><text start="0.5" dur="1">A red ball.</text>
        <text start="2" dur="1">It leaves.</text></transcript>""",
    "a.srv3": """<?xml version="1.0"?><timedtext format="3"><body>
        <p t="500" d="1000"><s>A</s><s t="9"> red ball.</s></p>
        <p t="2000" d="1000">It leaves.</p></body></timedtext>""",
    "a.json3": """{"events": [{"tStartMs": 500, "dDurationMs": 1000, "segs": [{"utf8": "A"}, {"utf8": " red ball."}]},
        {"tStartMs": 2000, "dDurationMs": 1000, "segs": [{"utf8": "It leaves."}]}]}""",
    "whisper.json": """{"segments": [{"start": 0.5, "end": 1.5, "text": " A red ball."},
        {"start": 2, "end": 3, "text": "It leaves."}, {"start": null, "end": 9, "text": "x"},
        {"start": NaN, "end": 9, "text": "y"}]}""",
    "words.json": """{"words": [{"word": "A", "start": 0.5, "end": 1}, {"word": "red", "start": 1, "end": 1.2},
        {"word": "ball.", "start": 1.2, "end": 1.5}, {"word": " It leaves.", "start": 2, "end": 3}]}""",
    "cpp.json": """{"transcription": [{"offsets": {"from": 500, "to": 1500}, "text": " A red ball."},
        {"offsets": {"from": 2000, "to": 3000}, "text": " It leaves."}]}""",
    "transformers.json": """{"chunks": [{"timestamp": [0.5, 1.5], "text": " A red ball."},
        {"timestamp": [2.0, 3.0], "text": " It leaves."}]}""",
    "whisper.tsv": "start\tend\ttext\n500\t1500\tA red ball.\n2000\t3000\tIt leaves.\n",
    "whisper.txt": "[00:00.500 --> 00:01.500]  A red ball.\n[00:00:02.000 --> 00:00:03.000]  It leaves.\n",
    "escaped.srt": "1\n00:00:00,500 --&gt; 00:00:01,500\nA red ball.\n\n2\n00:00:02,000 → 00:00:03,000\nIt leaves.\n",
    "marks.srt": "\ufeff1\n0:0:0,5 --> 0:0:1,5\nA red ball.\n\n\ufeff1\n0:0:2,0 --> 0:0:3,0\nIt leaves.\n",
    "jax.txt": "[00:00.500 -> 00:01.500]  A red ball.\n[00:02.000 -> 00:03.000]  It leaves.\n",
    "labels.txt": "0.500000\t1.500000\tA red ball.\n2.000000\t3.000000\tIt leaves.\n",
    "rate.sub": "{1}{1}10\n{5}{15}{y:i}A red|ball.\n{20}{30}It leaves.\n",
    "no_rate.sub": "{5}{15}A red ball.\n{20}{30}It leaves.\n",
    "mpl2.txt": "[5][15]/A red|ball.\n[20][30]It leaves.\n",
    "subviewer.sub": """[INFORMATION]
[END INFORMATION]
[SUBTITLE]
00:00:00.50,00:00:01.50
A red[br]ball.

00:00:02.00,00:00:03.00
It leaves.
""",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_alike(read, name):
    assert read(FORMATS[name], name, frame_rate=10.0) == TWO


YOUTUBE = """WEBVTT
Kind: captions

00:00:00.160 --> 00:00:01.430 align:start position:0%
 \nso<00:00:00.500><c> today</c><00:00:00.800><c> we</c>

00:00:01.430 --> 00:00:01.440 align:start position:0%
so today we
 \n
00:00:01.440 --> 00:00:02.750 align:start position:0%
so today we
look<00:00:01.700><c> at</c>

00:00:02.750 --> 00:00:02.760 align:start position:0%
look at
 \n
00:00:02.760 --> 00:00:04.000 align:start position:0%
look at
a<00:00:03.000><c> ball</c>
"""

# What libraries lose, so that our own code reads it: an input, the library and its name of the format, and what the
# library makes of it. `docs/reading-video.md` has this as a table.
NO_INDEX = "00:00:01,000 --> 00:00:02,000\nIt is\n42\n\n00:00:03,000 --> 00:00:04,000\nGo.\n"
STRAY = "WEBVTT\n\n00:01.000 --> 00:02.000\nA\n\nred ball.\n\n00:03.000 --> 00:04.000\nGo.\n"
WRAPPED = "[00:01.000 -> 00:02.000]  It\nis.\n[00:03.000 -> 00:04.000]  Go.\n"
SBV_NUMBER = "0:00:01.000,0:00:02.000\nIt is\n42\n\n0:00:03.000,0:00:04.000\nGo.\n"
SAMI_LESS = "<SAMI><BODY><SYNC Start=1000><P>if a<b and c>d<SYNC Start=9000><P>Go</BODY></SAMI>"
ASS_ORDER = (
    "[Script Info]\n[Events]\nFormat: Layer, Style, Start, End, Name, MarginL, MarginR, MarginV, Effect, Text\n"
)
ASS_ORDER += "Dialogue: 0,Default,0:00:01.00,0:00:02.00,Anna,0,0,0,,A ball.\n"
NESTED_TTML = '<p begin="1s" end="4s"><span end="1s">One.</span><span begin="1s" end="2s">Two.</span></p>'
NESTED_TTML = f"<tt {TTML}><body><div>{NESTED_TTML}</div></body></tt>"
SPOILT_TTML = NESTED_TTML.replace("<div>", '<div><p begin="wallclock(2010-01-01T00:00:00Z)">No.</p>')
LYRICS = "[offset:+500]\n[00:01.00]La\n[00:02.00]Lo\n"
LOSSES = [
    ("1\n0:0:0,5 --> 0:0:1,50\nA\n", "ffmpeg", "srt", [(0.005, 1.05, "A")]),
    ("1\n0:0:1.0 -> 0:0:2.0\nA\n", "ffmpeg", "srt", []),
    ("1\n00:01.000 --> 00:02.000\nA\n", "ffmpeg", "srt", []),
    (NO_INDEX, "ffmpeg", "srt", [(1, 2, "It is"), (3, 4, "Go.")]),
    (NO_INDEX, "pysubs2", "srt", [(1, 2, "It is"), (3, 4, "Go.")]),
    ("1\n00:00:01 --> 00:00:02\nA\n", "pysubs2", "srt", []),
    ("1\n100:00:01,000 --> 100:00:02,000\nA\n", "pysubs2", "srt", [(1, 2, "A")]),
    (STRAY, "ffmpeg", "webvtt", [(1, 2, "A")]),
    ("WEBVTT\n\n00:00:01,000 --> 00:00:02,000\nA\n", "ffmpeg", "webvtt", []),
    (f"{STRAY}\nNOTE draft\n", "pysubs2", "vtt", [(1, 2, "A\n\nred ball."), (3, 4, "Go.\n\nNOTE draft")]),
    (YOUTUBE.replace("</c>\n\n", "</c>\n", 1), "pysubs2", "vtt", [(0.16, 1.43, ""), (0.5, 0.8, "")]),
    (SBV_NUMBER, "pysubs2", None, [(1, 2, "It is"), (3, 4, "Go.")]),
    ("[00:01.000 --> 00:02.000]  It is.\n", "pysubs2", "whisper_jax", []),
    (WRAPPED, "pysubs2", "whisper_jax", [(1, 2, "It"), (3, 4, "Go.")]),
    (FORMATS["whisper.txt"], "ffmpeg", None, [(0, 0.5, "> 00:00:03.000]  It leaves.")]),
    *[(FORMATS[name], "ffmpeg", None, None) for name in ("a.srv1", "a.srv3", "a.json3", "whisper.tsv", "labels.txt")],
    *[(FORMATS[name], "pysubs2", None, None) for name in ("a.srv1", "a.srv3", "a.json3", "whisper.tsv", "labels.txt")],
    *[
        (FORMATS[name], "whisper", None, None)
        for name in ("words.json", "cpp.json", "transformers.json", "whisper.json")
    ],
    (FORMATS["frames.ttml"], "pysubs2", "ttml", []),
    (FORMATS["frames.ttml"].replace("2006/10/ttaf1", "ns/ttml"), "pysubs2", "ttml", None),
    (NESTED_TTML, "pysubs2", "ttml", [(1, 4, "One.Two.")]),
    (SPOILT_TTML, "pysubs2", "ttml", None),
    (SAMI_LESS, "pysubs2", "sami", [(1, 2.17, "if ad"), (9, 9.634, "Go")]),
    (SAMI_LESS, "ffmpeg", "sami", [(1, 9, "<SYNC Start=1000><P>if a<b and c>d")]),
    (ASS_ORDER, "pysubs2", "ass", None),
    ("00:00:01:A, a < b > c.\n", "pysubs2", "tmp", [(1, 3.041, "A, a  c.")]),
    ("[00:00:01.00]La\n[00:00:02.00]Lo\n", "ffmpeg", "lrc", [(0, 0, "La"), (0, 0, "Lo")]),
    ("[00:01.00] [00:03.00]La\n[00:02.00]Lo\n", "ffmpeg", "lrc", [(1, 2, "La"), (2, 2, "Lo")]),
    ("[00:01.00]La\n[00:75.00]Lo\n", "ffmpeg", "lrc", [(1, 1, "La")]),
    ("[00:01.00][sic] La\n", "ffmpeg", "lrc", [(1, 1, "sic] La")]),
    (LYRICS, "ffmpeg", "lrc", [(0.9995, 1.9995, "La"), (1.9995, 1.9995, "Lo")]),
]


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("if a <b and c> d", {}, "if a  d"),
        ("if a <b and c> d", "ffmpeg", "if a {\\b1} d"),
        ('<font color="red">A</font> <v Anna>ball', {"keep_unknown_html_tags": True}, None),
    ],
)
def test_what_libraries_make_of_markup(text, options, found, read):
    """They take text between < and > for markup, or leave markup in the text. So the packets' own text is used."""
    content = f"1\n00:00:01,000 --> 00:00:02,000\n{text}\n"
    if options == "ffmpeg":
        with av.open(io.BytesIO(content.encode()), format="srt") as container:
            stream = container.streams.subtitles[0]
            [event] = stream.codec_context.decode2(next(container.demux(stream)))
            made = event.dialogue.decode()
    else:
        [event] = pysubs2.SSAFile.from_string(content, "srt", **options)
        made = event.plaintext
    assert made == (text if found is None else found)
    assert texts(read(content)) == ["A ball" if found is None else text]


@pytest.mark.parametrize(("text", "library", "kind", "found"), LOSSES)
def test_what_libraries_lose_is_read_here(text, library, kind, found, read):
    """If a library reads more some day, this fails, and our own code for it can go."""
    try:
        if library == "ffmpeg":
            with av.open(io.BytesIO(text.encode()), format=kind) as container:
                packets = [packet for packet in container.demux(container.streams.subtitles[0]) if packet.size]
            spans = [(p.pts * p.time_base, (p.pts + max(0, p.duration or 0)) * p.time_base) for p in packets]
            cues = [(*map(float, span), bytes(p).decode().strip()) for span, p in zip(spans, packets, strict=True)]
        else:
            whisper = library == "whisper"
            options = {"keep_html_tags": True} if kind in ("srt", "vtt") else {}
            events = pysubs2.load_from_whisper(json.loads(text)) if whisper else None
            events = pysubs2.SSAFile.from_string(text, kind, **options) if events is None else events
            cues = [(event.start / 1000, event.end / 1000, event.plaintext.strip()) for event in events]
    except (av.error.FFmpegError, pysubs2.exceptions.Pysubs2Error, *_PARSERS) as error:
        assert found is None, error
    else:
        assert found is not None and cues[: max(1, len(found))] == found
    lines = [(line.start, line.end, line.text) for line in read(text)]
    assert lines and lines != found


def test_what_is_wrong_with_times_is_counted_once(read):
    report = SubtitleReport()
    lines = read(
        "1\n00:00:01,000 -->\nOdd.\n\n" + srt((2, 3, "Go.")) + "3\n00:00:05,000 --> -00:00:06,000\nB\n", report=report
    )
    assert lines == [Line(2, 3, "Go."), Line(5, 5, "B")]
    assert (report.spoilt_lines, report.mended_ends, report.repeated_lines) == (1, 1, 0)
    report = SubtitleReport()
    assert texts(read("00: 00: 01,000 --> 00: 00: 02,000\nA\n\n" + srt((3, 4, "B")), report=report)) == ["A", "B"]
    assert not report


def test_a_row_of_any_length_stays_whole(read):
    """FFmpeg cuts rows at 4,095 bytes."""
    words, letters = "red ball " * 1000, "红球进来" * 1500
    assert texts(read(srt((0, 1, words.strip()), (2, 3, letters)))) == [words.strip(), letters]


def test_cues_that_are_there_twice_or_empty_are_counted(read):
    """FFmpeg drops both in silence."""
    report = SubtitleReport()
    assert texts(read(srt((0, 1, "Go."), (0, 1, "Go."), (2, 3, ""), (4, 5, "<i></i>")), report=report)) == ["Go."]
    assert (report.repeated_lines, report.lines_without_text) == (1, 2)


def test_formats_without_ends(read):
    report = SubtitleReport()
    lyrics = "[ti:Song]\n[00:00.50][00:04.00]A red ball.\n[00:02.00]It <00:02.40>leaves.\n"
    lines = read(lyrics, "a.lrc", report=report)
    assert [line.start for line in lines] == [0.5, 2.0, 4.0]
    assert texts(lines) == ["A red ball.", "It leaves.", "A red ball."]
    assert lines[0].end == 1.9 and report.mended_ends == 1
    again = read("[offset:+250]\n[00:01.00]La la.\n[00:02.00]La la.\n[00:03.00]Hey.\n", "a.lrc")
    assert [(line.start, line.text) for line in again] == [(0.75, "La la."), (1.75, "La la."), (2.75, "Hey.")]
    assert texts(read("00:00:01:A red|ball, a < b > c.\n00:00:03:It leaves.\n", "tmp.txt")) == [
        "A red ball, a < b > c.",
        "It leaves.",
    ]
    sami = "<SAMI><BODY><SYNC Start=500><P>A <i>red</i> ball &lt; x<br>y.<SYNC Start=1500><P>&nbsp;</BODY></SAMI>"
    assert read(sami, "a.smi") == [Line(0.5, 1.5, "A red ball < x y.")]
    lines = read(
        srt((1.5, 0.5, "Back."), (2, 2, "Zero.")) + "9\n100:00:00,000 --> 100:00:01,000\nLate.\n", report=report
    )
    assert [(line.start, line.end) for line in lines] == [
        (1.5, 2),
        (2, 2),
        (360000, 360001),
    ] and report.mended_ends == 2


@pytest.mark.parametrize(
    ("tags", "starts"),
    [
        (("00:00:01.00", "00:00:03.50", "1:02:03.00"), [1, 3.5, 3723]),
        (("00:00:01", "00:00:20", "00:01:10"), [1, 20, 70]),
        (("00:01:50", "00:03:20", "00:07:80"), [1.5, 3.2, 7.8]),
        ((" 00:01,50 ", "00:61.00", "100:00"), [1.5, 61, 6000]),
    ],
)
def test_times_of_lyrics_may_have_hours_or_a_colon_before_the_fraction(read, tags, starts):
    content = "".join(f" [{tag}] La {n}.\n" for n, tag in enumerate(tags))
    assert [(line.start, line.text) for line in read(content)] == [(at, f"La {n}.") for n, at in enumerate(starts)]


def test_lines_of_lyrics_without_a_time_are_counted(read):
    report, head = SubtitleReport(), "My song\n[ti:Song]\n[Verse 1]\n"
    lines = read(f"{head}[00:01.00] [00:05.00][sic] La.\n[00:-3.00]No.\n[00:03.00]\n", report=report)
    assert [(line.start, line.text) for line in lines] == [(1, "[sic] La."), (5, "[sic] La.")]
    assert (report.spoilt_lines, report.lines_without_text) == (3, 1)


def test_a_cue_without_an_end_stays_until_the_next(read):
    assert read("{5}{}A ball.\n{20}{30}It leaves.\n", "a.sub", frame_rate=10.0) == [
        Line(0.5, 2, "A ball."),
        Line(2, 3, "It leaves."),
    ]
    report = SubtitleReport()
    assert read("00:00:01=A ball.\n00:00:03=It leaves.\n", report=report) == [
        Line(1, 3, "A ball."),
        Line(3, 3, "It leaves."),
    ]
    assert report.mended_ends == 1


def test_captions_of_television_have_their_own_times(read):
    code = "00:00:01:00\t9420 9420 9470 9470 c845 4c4c 4fae 942c 942c 942f 942f\n\n00:00:03:00\t942c 942c\n"
    assert read(f"Scenarist_SCC V1.0\n\n{code}", "a.scc") == [Line(1.0, 3.0, "HELLO.")]


def test_numbers_that_are_text_stay(read):
    assert texts(read(srt((0, 1, "The answer is\n42"), (2, 3, "7")))) == ["The answer is 42", "7"]
    assert texts(read("00:01.000 --> 00:02.000\nA\n42\n", "a.vtt")) == ["A 42"]
    assert texts(read("00:01.000 --> 00:02.000\nA\n#2\n00:03.000 --> 00:04.000\nB\n")) == ["A #2", "B"]


def test_a_cue_with_spoilt_times_is_left_out_and_counted(read):
    report = SubtitleReport()
    spoilt = "2\n00:00:-1,000 --> 00:00:02,000\nOdd.\n\n"
    assert texts(read(srt((0, 1, "A --> B: go.")) + spoilt + srt((3, 4, "It leaves.")), report=report)) == [
        "A --> B: go.",
        "It leaves.",
    ]
    assert report.spoilt_lines == 1


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Une balle rouge est entrée à gauche.\nLe café s’ouvre."),
        ("cp1251", "Красный мяч входит.\nОн уходит."),
        ("cp1250", "Czerwona piłka wpada.\nŻółw śpi."),
        ("iso8859_2", "Czerwona piłka też wpada.\nSą ślady źle widoczne."),
        ("iso8859_2", "Červený míč přichází zleva.\nPříliš žluťoučký kůň."),
        ("gb18030", "红球进来。\n它离开。"),
        ("big5", "紅球從左邊進來。\n它離開了。"),
        ("cp932", "赤いボールが左から入る。\nそして出ていく。"),
        ("cp949", "빨간 공이 들어옵니다.\n그것은 떠납니다."),
        ("cp1255", "כדור אדום נכנס.\nהוא עוזב."),
        ("cp1253", "Μια κόκκινη μπάλα μπαίνει.\nΦεύγει από εδώ."),
        ("cp1254", "Kırmızı top soldan giriyor.\nŞimdi ağaç yeşil."),
        ("cp1250", "A piros labda bejön.\nŐrült szép tűz."),
        ("cp866", "Красный мяч входит.\nПотом он уходит налево."),
        ("iso8859_5", "Красный мяч входит.\nПотом он уходит налево."),
        ("mac_roman", "Une balle rouge est entrée à gauche.\nLe café s’ouvre."),
        ("cp1252", "A bola vermelha não está à direita.\nEntão é só isso, irmão."),
        ("cp1252", "Punainen pallo tulee sisään.\nMitä täällä on? Älä mene."),
        ("cp1252", "Don’t go.\nIt’s £5."),
        ("cp1250", "Crvena lopta ulazi slijeva.\nŠto će žaba učiniti, možda đak."),
        ("iso8859_2", "Czerwona piłka wpada z lewej.\nŻółw śpi, a gęś źle widzi ślady."),
        ("cp1257", "Raudonas kamuolys įeina iš kairės.\nTada jis išeina, žinoma."),
        ("cp1254", "Kırmızı top.\nHayır, olmaz."),
        ("cp932", "何をしていますか？\n知りません。行きましょう。"),
        ("euc_jp", "何をしていますか？\n知りません。行きましょう。"),
        ("iso2022_kr", "빨간 공이 들어옵니다.\n그것은 떠납니다."),
        ("hz", "红球从左边进来。\nA ~ b，然后离开。"),
        ("iso2022_jp", "赤いボールが左から入る。\nそして出ていく。"),
        ("cp1252", "¿Qué?\nNo."),
        ("cp1252", "Köszönöm.\nIgen."),
        ("cp852", "Gdzie jest piłka?\nWłaśnie odeszła, źle się dzieje."),
        ("cp1258", "Qua\u0309 bo\u0301ng đo\u0309 đi vào tư\u0300 bên tra\u0301i.\nCa\u0309m ơn!"),
        ("cp1258", "Anh đang làm gi\u0300 vâ\u0323y?\nTôi không biê\u0301t."),
        ("iso8859_6", "أين الكرة الحمراء؟\nلقد ذهبت بالفعل."),
    ],
)
def test_encodings_are_guessed_and_named(read, encoding, text):
    report, content = SubtitleReport(), srt(*[(2 * n, 2 * n + 1, row) for n, row in enumerate(text.split("\n"))])
    # In cp1258, accents stand behind their letters.
    content, rows = content.encode(encoding), normalize("NFC", text).split("\n")
    assert texts(read(content, report=report)) == rows
    assert f"guessed encoding {encoding}" in str(report)
    report = SubtitleReport()
    assert texts(read(content, encoding=encoding, report=report)) == rows and not report


def test_the_encoding_that_xml_declares_is_taken(read):
    report, text = SubtitleReport(), FORMATS["a.ttml"].replace('"1.0"', '"1.0" encoding="mac_cyrillic"')
    assert texts(read(text.replace("A red", "Мяч").encode("mac_cyrillic"), "a.ttml", report=report))[0] == "Мяч ball."
    assert report.encoding == "mac_cyrillic"
    assert read(text.replace("mac_cyrillic", "UTF-16").encode("utf_16"), "a.ttml") == TWO
    for wrong in ("x-no", "utf-8"):
        spoilt = text.replace("mac_cyrillic", wrong).replace("A red", "é").encode("cp1252")
        assert texts(read(spoilt))[0] == "é ball."


@pytest.mark.parametrize("encoding", ["utf_8", "utf_8_sig", "utf_16", "utf_16_le", "utf_16_be", "utf_32"])
def test_unicode_needs_no_guess(read, encoding):
    report = SubtitleReport()
    text = "Schön — 👋 \u200eשלום."
    assert (
        texts(read(srt((0, 1, text)).encode(encoding), report=report)) == [text.replace("\u200e", "")] and not report
    )


@pytest.mark.parametrize("encoding", ["utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"])
def test_unicode_without_a_mark_may_be_chinese(read, encoding):
    report, text = SubtitleReport(), "红球从左边进来一点。它上一次也离开了，" * 12
    content = srt((0, 1, text), (2, 3, text)).encode(encoding)
    assert texts(read(content, report=report)) == [text, text] and not report


def test_waves_and_braces_are_not_hz(read):
    report, rows = SubtitleReport(), ["So ~{abcd~} it is.", "~{~} ~ ~{Hello~}"]
    assert texts(read(srt((0, 1, rows[0]), (2, 3, rows[1])), report=report)) == rows and not report


def test_spoilt_utf_8_stays_utf_8(read):
    report = SubtitleReport()
    content = srt((0, 1, "Красный мяч входит слева.")).encode().replace("й".encode(), b"\xff")
    assert (
        texts(read(content, report=report)) == ["Красны\ufffd мяч входит слева."] and report.unreadable_characters == 1
    )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "is empty"),
        (b"\n\n", {}, "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", {}, "is a web page, not subtitles"),
        (b"# VobSub index file, v7\nsize: 720x576\n", {}, "holds pictures, not text"),
        (b"Hello.\nNo times here.\n", {}, "is in no subtitle format that is known"),
        (random.Random(0).randbytes(3000), {}, "neither a text nor a video"),
        (b'{"segments": [{"start"', {}, "cannot be read as subtitles"),
        (b"{5}{15}A red ball.\n", {}, "Framerate was not specified"),
        (srt((0, 1, "é")).encode(), {"encoding": "ascii"}, "cannot be read as ascii"),
        (srt((0, 1, "é")).encode(), {"encoding": "klingon"}, "cannot be read as klingon"),
    ],
)
def test_unreadable_files_are_named_in_one_line(read, content, options, message):
    with pytest.raises(ValueError, match=message) as failed:
        read(content, **options)
    assert "a.srt" in str(failed.value) and "\n" not in str(failed.value)


def test_a_text_opens_no_address(read):
    began = clock.monotonic()
    for text in (SDP, "ffconcat version 1.0\nfile 'b.srt'\n", "#EXTM3U\n#EXTINF:1,\nb.ts\n"):
        with pytest.raises(ValueError, match="no subtitle format that is known|neither a text nor a video"):
            read(text.encode())
    assert clock.monotonic() - began < 5, "FFmpeg waits ten seconds for packets by UDP"


def test_a_text_names_no_further_files(read, tmp_path, monkeypatch):
    """FFmpeg would open a playlist, and the files of this folder that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.srt").write_text(srt((0, 1, "A secret.")))
    with pytest.raises(ValueError, match="is in no subtitle format that is known"):
        read(b"ffconcat version 1.0\nfile secret.srt\n")


@pytest.mark.parametrize("name", ["a.srt", "a.vtt", "a.ttml", "whisper.json", "rate.sub", "a.ass"])
def test_spoilt_bytes_give_lines_or_one_error(read, name):
    content = ass("A red ball.", "It leaves.").encode() if name == "a.ass" else FORMATS[name].encode()
    for at in range(0, len(content), 3):
        for spoilt in (b"\0\0\0", b"\xff\xfe\xfd", b"{<:", b""):
            try:
                for sentence in to_sentences(read(content[:at] + spoilt + content[at + 3 :], name)):
                    assert 0 <= sentence.start <= sentence.end and sentence.text.encode()
            except ValueError as error:
                assert name in str(error) and "\n" not in str(error)


# -------------------------------------------------------------------------------------------------------------- markup


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("If a < b and c > d then stop.", "If a < b and c > d then stop."),
        ("I <3 you -> see, a <b and c> d.", "I <3 you -> see, a <b and c> d."),
        ('<font color="#f00">A <b>red</b></font> <c.yellow>ball</c>{\\an8}', "A red ball"),
        ("<00:00:01.000><c> Now</c> &lt;i&gt; <i>x</i> AT&amp;T &copy that", "Now <i> x AT&T &copy that"),
        ("Press <Enter>, <unknown>.", "Press <Enter>, <unknown>."),
        ("<v Anna>Hello<br/>there.</v>", "Hello there."),
        ("<ruby>漢<rt>かん</rt>字</ruby>", "漢字"),
        ('<a href="x">A</a> <strike>red</strike> H<sub>2</sub>O, <a> < b', "A red H2O, <a> < b"),
    ],
)
def test_known_tags_go_then_entities(read, text, plain):
    for name in ("a.srt", "a.vtt"):
        assert texts(read(f"WEBVTT\n\n00:01.000 --> 00:02.000\n{text}\n"[8 * (name == "a.srt") :], name)) == [plain]


BACKSLASHES = r"In C:\New\names, \hbar and \nabla."
CUE = f"00:01.000 --> 00:02.000\n{BACKSLASHES}\n"


@pytest.mark.parametrize(
    "content",
    [
        f"1\n{CUE}",
        f"WEBVTT\n\n{CUE}",
        f"[00:01.000 --> 00:02.000]  {BACKSLASHES}\n",
        f"[INFORMATION]\n[END INFORMATION]\n[SUBTITLE]\n00:00:01.00,00:00:02.00\n{BACKSLASHES}\n",
        f"{{10}}{{20}}{BACKSLASHES}\n",
        f"[10][20]{BACKSLASHES}\n",
        f"00:00:01:{BACKSLASHES}\n",
        f"[00:01.00]{BACKSLASHES}\n",
        f"<SAMI><BODY><SYNC Start=1000><P>{BACKSLASHES}<SYNC Start=2000><P>&nbsp;</BODY></SAMI>",
        f'<tt {TTML}><body><div><p begin="1s" end="2s">{BACKSLASHES}</p></div></body></tt>',
        f'<transcript><text start="1" dur="1">{BACKSLASHES}</text></transcript>',
        json.dumps({"segments": [{"start": 1, "end": 2, "text": BACKSLASHES}]}),
    ],
)
def test_a_backslash_is_text_in_formats_other_than_ass(read, content):
    assert texts(read(content, frame_rate=10.0)) == [BACKSLASHES]


def test_a_title_that_ffmpeg_cuts_within_a_character_is_no_fault(read):
    text = f"[INFORMATION]\n[TITLE]{'é' * 100}\n[SUBTITLE]\n00:00:01.00,00:00:02.00\nA ball.\n"
    assert texts(read(text, "a.sub")) == ["A ball."]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"A red\Nball.", "A red ball."),
        (r"{\an7}\hA red\hball.", "A red ball."),
        (r"\h\hA\hRED\hBALL.\h", "A RED BALL."),
        (r"{\an8}Open D:\home\New now.\NGo.", r"Open D:\home\New now. Go."),
    ],
)
def test_signs_that_converters_from_ass_left_in_subrip_go(read, text, plain):
    assert texts(read(srt((0, 1, text)))) == [plain]


def test_drawings_overrides_and_comments_of_ass_go(read):
    report = SubtitleReport()
    content = ass(
        "{\\i1}A ball{\\i0} enters\\Nfrom the\\hleft, a < b.",
        "{\\p1}m 0 0 l 100 0{\\p0}",
        "{\\p1}m 0 0{\\p0}Sign{a note}\\ntext, with commas.",
        "{\\k20}ka{\\k30}ra{\\k20}oke \\{x\\}.",
    )
    content += (
        "Comment: 0,0:00:00.00,0:00:01.00,Default,,0,0,0,,no\nDialogue: 0,0:00:xx,0:00:01.00,Default,,0,0,0,,no\n"
    )
    assert texts(read(content, "a.ass", report=report)) == [
        "A ball enters from the left, a < b.",
        "Sign text, with commas.",
        "karaoke {x}.",
    ]
    assert (report.drawings, report.comments, report.spoilt_lines) == (2, 1, 1)
    assert str(report) == "left out spoilt lines: 1, drawings: 2, comments: 1"


def test_a_file_of_drawings_only_is_read_once(read):
    report = SubtitleReport()
    assert read(ass("{\\p1}m 0 0 l 100 0"), "a.ass", report=report) == [] and report.drawings == 1


def test_columns_of_ass_have_any_order(read):
    head, report = "[Script Info]\nScriptType: v4.00+\n\n[Events]\n", SubtitleReport()
    few = "Format: Start, End, Style, Text\nDialogue: 0:00:01.00,0:00:02.00,Default,A ball, {\\i1}red.\n"
    assert read(head + few, "few.ass", report=report) == [Line(1, 2, "A ball, red.")] and not report
    moved = "Format: Layer, Style, Start, End, Actor, MarginL, MarginR, MarginV, Effect, Text\n"
    moved += "Dialogue: 0,Default,0:00:01.00,0:00:02.00,Anna,0,0,0,,A ball.\nDialogue: 0,Default,x,y,,0,0,0,,No\n"
    assert read(head + moved, "moved.ass", report=report) == [Line(1, 2, "A ball.")] and report.spoilt_lines == 1


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ("Layer, Start, End, Style, Text", "0,0:00:01.00,0:00:02.00,Default"),
        ("Layer, Start, End, Style, Name, MarginL, MarginR, MarginT, MarginB, Effect, Text", "{},,0,0,0,0,"),
        ("Layer, Start, End, Style, Name, MarginL, Text", "{},,0,0,0,"),
        ("Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, MarginB, Effect, Text", "{},,0,0,0,"),
    ],
)
def test_events_of_ass_may_have_more_or_fewer_columns_than_their_format_line(read, columns, fields):
    report, head = SubtitleReport(), "[Script Info]\nScriptType: v4.00++\n\n[events]\nformat: "
    start = f"Dialogue: {fields.format('0,0:00:01.00,0:00:02.00,Default')},"
    content = f"{head}{columns}\n{start}One, 2, 3, 4, five, six, seven.\n"
    content += f"{start}A ball.\n".replace("0:00:02", "0:00:03").replace("0:00:01", "0:00:02")
    assert read(content, "a.ass", report=report) == [
        Line(1, 2, "One, 2, 3, 4, five, six, seven."),
        Line(2, 3, "A ball."),
    ]
    assert not report


def test_times_of_ass_with_a_comma(read):
    content = ass("Hi.").replace("0:00:00.00", "0:00:00,25").replace("0:00:01.00", "0:00:01,00")
    assert read(content + ass("Go.", start=2)[len(ass()) :], "a.ass") == [Line(0.25, 1, "Hi."), Line(2, 3, "Go.")]


def test_ticks_of_ttml_are_those_of_its_frames_or_seconds(read):
    for rate, seconds in (("", 1), ('xmlns:p="http://www.w3.org/ns/ttml#parameter" p:frameRate="2"', 0.5)):
        text = f'<tt {TTML} {rate}><body><div><p begin="1t" end="2t">A ball.</p></div></body></tt>'
        assert read(text, "a.ttml") == [Line(seconds, 2 * seconds, "A ball.")]


def test_times_of_ttml_may_stand_on_spans(read):
    rolling = '<span begin="00:00:03.5" dur="1s">It <span style="red">rolls</span> on.</span>'
    spans = f'<p xml:id="a"><span begin="1s" end="2s">A ball.</span>{rolling}</p><p begin="5s" end="6s">It stops.</p>'
    text = f'<?xml version="1.0" encoding="utf-8"?><tt xmlns="http://www.w3.org/ns/ttml"><body><div>{spans}</div></body></tt>'
    assert read(text, "a.ttml") == [
        Line(1, 2, "A ball."),
        Line(3.5, 4.5, "It rolls on."),
        Line(5, 6, "It stops."),
    ]


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (NESTED_TTML, [Line(1, 2, "One."), Line(2, 3, "Two.")]),
        ('<div begin="1s"><p begin="1s" dur="9s">A <span begin="2s">b.</span></p></div>', [Line(2, 11, "A b.")]),
        ('<div begin="1s" end="3s"><p>A</p><div><p begin="1s" end="9s">B</p></div></div>', ["A", Line(2, 3, "B")]),
        ('<div timeContainer="seq"><p dur="1s">A</p><p begin="1s" dur="2s">B</p></div>', ["A", Line(2, 4, "B")]),
        ('<p begin="1s" end="2s">Set begin="now"\n &lt;i&gt; {x}</p>', [Line(1, 2, 'Set begin="now" <i> {x}')]),
        ('<p begin="0:00:01,5" end="2.5">A<metadata>x</metadata><br/>B</p>', [Line(1.5, 2.5, "A B")]),
        ('<p begin="1s">A</p><p begin="3s" end="4s">B</p>', [Line(1, 3, "A"), Line(3, 4, "B")]),
    ],
)
def test_times_of_ttml_count_from_the_start_of_the_parent(read, body, lines):
    for root in (f"<tt {TTML}>", "<!-- a > b -->\n<!DOCTYPE tt>\n<tt>"):
        report, text = SubtitleReport(), body if body.startswith("<tt") else f"{root}<body>{body}</body></tt>"
        found = read(text.replace("<p", "<p xml:id='a'"), "a.ttml", report=report)
        assert len(found) == len(lines) and report.spoilt_lines == 0
        assert all(line in (one, one.text) for line, one in zip(lines, found, strict=True))


def test_spoilt_times_of_ttml_are_counted(read):
    report = SubtitleReport()
    bad = '<p begin="" end="1s">No</p><p begin="soon">No</p><p begin="4s">Go <span end="x">No</span> on</p>'
    text = SPOILT_TTML.replace("</div>", f'{bad}</div><div begin="x"><p>No</p><p>No</p></div>')
    assert texts(read(text, "a.ttml", report=report)) == ["One.", "Two.", "Go on"] and report.spoilt_lines == 6


def test_words_and_syllables_of_ttml_become_lines(read):
    """Apple counts the times of words from second 0, not from the start of their paragraph."""
    words = '<span begin="10s" end="11s">So</span> <span begin="11s" end="12s">to</span>'
    words += '<span begin="12s" end="12.5s">day.</span> <span begin="14s" end="15s">La</span> '
    words += '<span begin="15s" end="16s">la</span>'
    text = (
        f'<tt {TTML}><body begin="0s"><div begin="9s" end="20s"><p begin="10s" end="16s">{words}</p></div></body></tt>'
    )
    assert read(text, "a.ttml") == [Line(10, 12.5, "So today."), Line(14, 16, "La la")]


def test_a_text_of_sami_stays_until_the_next_and_keeps_what_is_no_tag(read):
    body = "<SYNC Start=1000><P Class=A>if a<b and c>d then &lt;i&gt; <b>stop</b><SYNC Start=9000><P>Go"
    assert read(f"<SAMI><BODY>{body}</BODY></SAMI>", "a.smi")[0] == Line(1, 9, "if a<b and c>d then <i> stop")


def test_the_first_of_several_languages_of_sami_is_read(read):
    head = "<SAMI><HEAD><STYLE><!-- .EN {lang: en-US;} .KO {lang: ko-KR;} --></STYLE></HEAD><BODY>"
    body = "<SYNC Start=1000><P Class=EN>A ball.<P Class=KO>공.<SYNC Start=2000><P Class=EN>&nbsp;<P Class=KO>&nbsp;"
    report = SubtitleReport()
    assert read(f"{head}{body}</BODY></SAMI>", "a.smi", report=report) == [Line(1, 2, "A ball.")]
    assert report.other_streams == 1


@pytest.mark.parametrize(
    "cue", ["<v Anna>Hello</v><v Bob>Hi</v>", "<v Anna> Hello</v> <v.loud Bob> Hi</v>", "<v Anna>Hello <v Bob>Hi"]
)
def test_voices_of_webvtt_come_one_by_one(read, cue):
    assert texts(read(f"WEBVTT\n\n00:01.000 --> 00:03.000\n{cue}\n", "a.vtt")) == ["- Hello", "- Hi"]


def test_drawings_that_converters_left_in_subrip_go(read):
    report = SubtitleReport()
    content = srt((0, 1, "{\\p1}m 0 0 l 100 0 100.5 -3{\\p0}"), (1, 2, "Sign\nm 0 0 b 1 2"), (2, 3, "m 5 is a car."))
    assert texts(read(content, report=report)) == ["Sign", "m 5 is a car."] and report.drawings == 2


# --------------------------------------------------------------------------------------------------------------- lines


def test_rolling_captions_come_once(read):
    report = SubtitleReport()
    lines = read(YOUTUBE, "a.vtt", report=report)
    assert [(line.start, line.text) for line in lines] == [(0.16, "so today we"), (1.44, "look at"), (2.76, "a ball")]
    assert report.repeated_lines == 4
    two = srt((0, 1, "first\nsecond"), (1, 2, "second\nthird"), (2, 3, "third\nfourth"), (3, 4, "fourth"))
    assert [(line.start, line.text) for line in read(two)] == [(0, "first second"), (1, "third"), (2, "fourth")]
    grown = srt(*[(n, n + 1, " ".join(["so", "today", "we", "look", "at"][: n + 1])) for n in range(5)])
    assert [(line.start, line.text) for line in read(grown)] == list(enumerate(["so", "today", "we", "look", "at"]))


def test_captions_that_roll_in_one_row_or_with_breaks_come_once(read):
    flat = srt(
        (0, 1, "so today we"), (1, 1.01, "so today we"), (1.01, 2, "so today we look at a"), (2, 2.01, "look at a")
    )
    assert texts(read(flat + srt((2.01, 3, "look at a ball that")))) == ["so today we", "look at a", "ball that"]
    unspaced = srt((0, 1, "今天我们看"), (1, 2, "今天我们看红球"), (2, 3, "红球进来了"), (3, 4, "进来了然后"))
    assert texts(read(unspaced)) == ["今天我们看", "红球", "进来了", "然后"]
    breaks = srt((0, 1, "first"), (1.1, 2, "first\nsecond"), (2.1, 3, "second\nthird"), (3.1, 4, "third"))
    assert [(line.start, line.text) for line in read(breaks)] == [
        (0, "first"),
        (1.1, "second"),
        (2.1, "third"),
        (3.1, "third"),
    ]
    said = srt((0, 1, "I saw the"), (1, 2, "the ball and"), (2, 3, "and it was red."))
    assert texts(read(said)) == ["I saw the", "the ball and", "and it was red."]


def test_captions_that_roll_from_the_top_come_once(read):
    """The new row stands above the former first row. Rows of one cue are said from the last one up."""
    report = SubtitleReport()
    two = srt((0, 1, "first"), (1, 2, "second\nfirst"), (2, 3, "third\nsecond"), (3, 4, "third"))
    assert [(line.start, line.text) for line in read(two, report=report)] == [
        (0, "first"),
        (1, "second"),
        (2, "third"),
    ]
    assert report.repeated_lines == 3
    three = srt((0, 1, "b\na"), (1, 2, "c\nb\na"), (2, 3, "e\nd\nc"), (3, 4, "f\ne\nd"))
    assert texts(read(three)) == ["a b", "c", "d e", "f"]
    words = ["so", "so today", "so today we", "look\nso today we", "look at\nso today we", "look at a\nso today we"]
    grown = srt(*[(n, n + 1, rows) for n, rows in enumerate([*words, "ball\nlook at a"])])
    assert texts(read(grown)) == ["so", "today", "we", "look", "at", "a", "ball"]
    apart = srt((0, 1, "Yes.\nNo."), (2, 3, "Why?\nYes."))
    assert texts(read(apart)) == ["Yes. No.", "Why? Yes."]
    once = srt((0, 1, "Yes.\nNo."), (1, 2, "Why?\nYes."), (2, 3, "So."), (3, 4, "Go."), (4, 5, "Run."), (5, 6, "Hm."))
    assert texts(read(once))[:2] == ["Yes. No.", "Why? Yes."]


def rolling(words, num_rows, *, by_word, gap=0.0, overlap=0.0, on_top=False, with_breaks=False):
    """Return cues of captions that roll: of a word or a row each, with the rows before it."""
    rng, rows, cues, time = random.Random(num_rows), [], [], 0.0
    while words:
        count = rng.randint(2, 6)
        rows, words = [*rows, words[:count]], words[count:]
    for index, row in enumerate(rows):
        before = [" ".join(words) for words in rows[max(0, index - num_rows + 1) : index]]
        for count in range(1, len(row) + 1) if by_word else [len(row)]:
            shown, seconds = [*before, " ".join(row[:count])], 0.4 if by_word else 0.4 * count
            cues.append((time, time + seconds - gap + overlap, "\n".join(shown[::-1] if on_top else shown)))
            time += seconds
        if with_breaks:  # YouTube shows the row alone for a moment
            cues.append((time, time + 0.01, " ".join(row)))
            time += 0.01
    return srt(*cues)


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@pytest.mark.parametrize("by_word", [False, True])
@pytest.mark.parametrize("on_top", [False, True])
@pytest.mark.parametrize("times", [{}, {"gap": 0.03}, {"gap": 0.2}, {"overlap": 0.15}, {"with_breaks": True}])
def test_each_word_of_rolling_captions_comes_once(read, num_rows, by_word, on_top, times):
    text = "so today we look at a ball that is red and then it rolls over the table until it falls down onto floor"
    lines = read(rolling(text.split(), num_rows, by_word=by_word, on_top=on_top, **times))
    assert " ".join(texts(lines)) == text and all(a.start < b.start for a, b in itertools.pairwise(lines))


def test_text_that_is_typed_comes_once(read):
    typed = srt(*[(n, n + 1, "Hello wor"[: n + 1]) for n in range(9)])
    assert [(line.start, line.text) for line in read(typed)] == [(0, "Hello"), (6, "wor")]
    assert texts(read(srt(*[(n, n + 1, "红球进来了"[: n + 1]) for n in range(5)]), sentences=False)) == list(
        "红球进来了"
    )


def test_repeated_lines_go_only_where_cues_touch(read):
    report = SubtitleReport()
    lines = read(srt((0.5, 1, "Jump!"), (1.5, 2, "Jump!"), (4, 4.5, "Jump!"), (4.5, 6, "Jump!")), report=report)
    assert lines == [Line(0.5, 1, "Jump!"), Line(1.5, 2, "Jump!"), Line(4, 6, "Jump!")] and report.repeated_lines == 1
    assert len(to_sentences(lines)) == 3
    layers = "".join(f"Dialogue: {n},0:00:01.00,0:00:02.00,Default,,0,0,0,,{text}\n" for n in (0, 1) for text in "AB")
    assert texts(read(ass() + layers, "a.ass")) == ["A", "B"]


def test_speakers_in_one_cue_come_one_by_one(read):
    lines = read(srt((0, 1, "- Who is\nthere?\n- Me."), (2, 3, "- Who is it? - Me."), (4, 5, "Well - yes\n- no.")))
    assert texts(lines) == ["- Who is there?", "- Me.", "- Who is it?", "- Me.", "Well - yes - no."]
    assert [line.start for line in lines[:2]] == [0, pytest.approx(16 / 21)] and lines[0].end == lines[1].start
    assert texts(read(srt((0, 1, "－你好　－再见"), (2, 3, "他说 -5度")))) == ["－你好", "－再见", "他说 -5度"]
    assert texts(read(srt((0, 1, "-你好。-再见。——好。")))) == ["-你好。", "-再见。——好。"]
    assert texts(read(srt((0, 1, "ANNA: Who is it? BOB: Me.\nANNA: Oh")))) == [
        "ANNA: Who is it?",
        "BOB: Me.",
        "ANNA: Oh",
    ]
    report = SubtitleReport()
    cues = [
        (0, 1, "ANNA: I was"),
        (1, 2, "ANNA: going."),
        (2, 3, "(sighs) BOB: Then"),
        (3, 4, "[laughs] - No"),
        (4, 5, "..."),
    ]
    assert read(srt(*cues), sentences=True, report=report) == ["I was going.", "Then", "No"]
    assert (report.speaker_names, report.asides, report.lines_without_text) == (3, 2, 1)
    assert read(srt((0, 1, "ANNA: I was"), (1, 2, "BOB: Come")), sentences=True) == ["I was", "Come"]


def test_lines_become_sentences(read):
    lines = read(SRT)
    assert lines[0] == Line(0.5, 2.0, "Hello there my friend.") and len(lines) == 5
    sentences = to_sentences(lines)
    assert texts(sentences) == ["Hello there my friend.", "It opens.", "And then it closes & stays", "silent"]
    # The third sentence begins within a line. Its time is interpolated by the length of the text before it.
    assert sentences[1].start == 2.0 and 2.5 < sentences[2].start < 3.5 and sentences[2].end == pytest.approx(5.1)
    assert "[Door]" in to_sentences(lines, keep_asides=True)[1].text
    assert len(to_sentences(lines, max_gap=10.0)) == 3
    assert texts(to_sentences(lines, max_words=1))[-2:] == ["then it closes & stays", "silent"]
    assert "ANNA: then" in to_sentences(lines, keep_speakers=True, max_words=1)[-2].text
    assert texts(to_sentences([Line(0, 9, "A sign"), Line(1, 2, "Hello."), Line(3, 4, "Bye.")])) == [
        "A sign",
        "Hello.",
        "Bye.",
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "Mr. Smith of the U.S. Navy weighs 3.5 kg. Really?!",
            ["Mr. Smith of the U.S. Navy weighs 3.5 kg.", "Really?!"],
        ),
        (
            "See No. 5 at 5 p.m. today, J. R. Smith. No. So do I. Yes.",
            ["See No. 5 at 5 p.m. today, J. R. Smith.", "No.", "So do I.", "Yes."],
        ),
        ("1. Open it. 2. There are 3. Go.", ["1. Open it.", "2. There are 3.", "Go."]),
        ("See Fig. 3 or No. 5. No.", ["See Fig. 3 or No. 5.", "No."]),
        ("Well... maybe. Wait… What?", ["Well... maybe.", "Wait…", "What?"]),
        ('He said "Stop." Then: "Really?" she asked.', ['He said "Stop."', 'Then: "Really?" she asked.']),
        (
            "红球进来。它变成蓝色！然后「离开。」好吗？！没有了",
            ["红球进来。", "它变成蓝色！", "然后「离开。」", "好吗？！", "没有了"],
        ),
        ("「ボールだ！」と言った。「はい。」", ["「ボールだ！」と言った。", "「はい。」"]),
        ("真的?好的!用Python写。", ["真的?", "好的!", "用Python写。"]),
        ("入る．そして出る‼なぜ⁉", ["入る．", "そして出る‼", "なぜ⁉"]),
        ("約翰．史密斯3．5元．", ["約翰．史密斯3．5元．"]),
        ("បាល់ក្រហម។ចូលមក។", ["បាល់ក្រហម។", "ចូលមក។"]),
        ("ဝင်လာသည်။ထွက်သည်။", ["ဝင်လာသည်။", "ထွက်သည်။"]),
        ("Կարմիր գնդակ։ Հետո։", ["Կարմիր գնդակ։", "Հետո։"]),
        ("བོད་ཡིག། ཀ་ཁ།", ["བོད་ཡིག།", "ཀ་ཁ།"]),
        ("Τι είναι; Μια μπάλα. Red; blue.", ["Τι είναι;", "Μια μπάλα.", "Red; blue."]),
    ],
)
def test_where_sentences_end(text, sentences):
    assert texts(to_sentences([Line(0, 1, text)])) == sentences


def test_scripts_without_spaces_are_joined_without(read):
    assert read(srt((0, 1, "红球\n进来"), (1, 2, "了。然后"), (2, 3, "离开。")), sentences=True) == [
        "红球进来了。",
        "然后离开。",
    ]
    assert read(srt((0, 1, "ลูกบอล\nสีแดง"), (1, 2, "เข้ามา")), sentences=True) == ["ลูกบอลสีแดงเข้ามา"]
    assert read(srt((0, 1, "빨간\n공이"), (1, 2, "와요.")), sentences=True) == ["빨간 공이 와요."]
    mixed = srt((0, 1, "我喜欢"), (1, 2, "iPhone"), (2, 3, "手机，要\n3个。"), (3, 4, "用 Python\n写 代码。"))
    assert read(mixed, sentences=True) == ["我喜欢iPhone手机，要3个。", "用 Python 写 代码。"]
    assert texts(read(srt((0, 1, "红球进来\nA red ball"), (2, 3, "한국\n漢字 입니다")))) == [
        "红球进来 A red ball",
        "한국 漢字 입니다",
    ]
    # Characters count for `max_words`.
    lines = [Line(n, n + 1, f"这是一个没有标点的句子{n}") for n in range(4)]
    assert len(to_sentences(lines, max_words=20)) == 2


def test_speakers_go_only_where_certain(read):
    report = SubtitleReport()
    cues = ["ANNA: Hi.", "DR. SMITH (V.O.): Come.", "Dr. Lee: No.", "MAN #2:\nGo.", ">> АННА: Да.", "- BOB: Well."]
    cues += ["Anna Smith: Once.", "NOTE: Important.", "I: the first person.", "It is 12:30 now.", "THE REASON: None."]
    cues += ["HTTP: a protocol.", "COVID-19: what we know.", "STEP 2: Open it.", "See http://a.b/c: it works."]
    cues += ["-5 degrees.", "5-10 people.", "-$5 each.", "– Dash."]
    spoken = read(srt(*[(n, n + 0.5, cue) for n, cue in enumerate(cues)]), sentences=True, report=report)
    assert spoken[:6] == ["Hi.", "Come.", "No.", "Go.", "Да.", "Well."] and report.speaker_names == 6
    assert spoken[6:] == [*cues[6:-1], "Dash."]
    twice = srt((0, 1, "Anna Smith: Once."), (2, 3, "Bob Lee: Hi."), (4, 5, "Anna Smith: Twice."))
    assert read(twice, sentences=True) == ["Once.", "Bob Lee: Hi.", "Twice."]
    assert read(srt((0, 1, "WE SAY: GO."), (2, 3, "JOHN: NO."), (4, 5, "JOHN: YES.")), sentences=True) == [
        "WE SAY: GO.",
        "NO.",
        "YES.",
    ]


def test_asides_go_and_parts_of_sentences_stay(read):
    report = SubtitleReport()
    cues = ["♪ La la ♪", "[door slams] Who's there?", "(sighs)", "Hello. (laughs) Bye.", "（笑）そう。"]
    cues += ["The function f(x) is g[0].", "Call 555 (home) now.", "(555) 123."]
    content = srt(*[(2 * n, 2 * n + 0.1, cue) for n, cue in enumerate(cues)])
    assert read(content, sentences=True, report=report) == ["Who's there?", "Hello.", "Bye.", "そう。", *cues[5:]]
    assert report.asides == 5
    unspaced = srt(
        (0, 1, "谢谢［掌声］"),
        (3, 4, "〔歎〕唉"),
        (6, 7, "(拍手)はい。(笑)そう"),
        (9, 10, "你好【音乐】"),
        (12, 13, "函数f(x)是"),
    )
    assert read(unspaced, sentences=True) == ["谢谢", "唉", "はい。", "そう", "你好", "函数f(x)是"]


# -------------------------------------------------------------------------------------------------------- the command


def test_sentences_become_messages():
    sentences = [Line(0.5, 2.0, "One."), Line(3.0, 6.0, "Two."), Line(9.0, 9.5, "Three.")]
    report = SubtitleReport()
    messages = to_timed_messages(sentences, end=5.0, report=report)
    assert [(m["role"], m["time"]) for m in messages] == [("user", 0.0), ("assistant", 0.5), ("assistant", 3.0)]
    assert report.sentences_after_the_end == 1
    assert [m["time"] for m in to_timed_messages(sentences, say_at="end", end=5.0)] == [0.0, 2.0, 5.0]
    nested = [Line(0.0, 4.0, "A sign."), Line(1.0, 2.0, "Hello.")]
    assert [m["content"] for m in to_timed_messages(nested, say_at="end")[1:]] == ["Hello.", "A sign."]
    with pytest.raises(ValueError, match="'start' or 'end'"):
        to_timed_messages(sentences, say_at="middle")


def test_a_video_becomes_rows_in_one_command(tmp_path, convert, capsys):
    convert(NASA)
    rows = load_timed_messages(tmp_path / "out.jsonl", video_root=[NASA.parent])
    assert rows[0]["video"] == str(NASA.resolve()) and list(find_faults(rows)) == []
    first = rows[0]["messages"][1]
    assert first["content"].startswith("This is the optical") and first["content"].endswith("Maryland.")
    assert f"{NASA}: left out other streams: 1, speaker names: 1" in capsys.readouterr().out
    (tmp_path / "a.srt").write_bytes(SRT.replace("friend", "été").encode("cp1252"))
    convert(NASA, NASA, "--subtitles", tmp_path / "a.srt", NASA, "--query", "Talk.")
    rows = load_timed_messages(tmp_path / "out.jsonl", video_root=[NASA.parent])
    assert len(rows) == 2 and rows[0]["messages"][0]["content"] == "Talk."
    said = capsys.readouterr().out
    assert "2 rows" in said and "a.srt: guessed encoding cp1252" in said


def test_an_empty_query_is_no_message(tmp_path, convert):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    (tmp_path / "a.srt").write_text(srt((0.5, 1, "Hello.")))
    convert(clip, "--subtitles", tmp_path / "a.srt", "--query", "")
    rows = load_timed_messages(tmp_path / "out.jsonl")
    assert [m["content"] for m in rows[0]["messages"]] == ["Hello."] and list(find_faults(rows)) == []


def test_further_pictures_of_a_video_are_named(tmp_path, convert, capsys):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        for _ in range(2):
            container.add_stream("mpeg4", rate=10).pix_fmt = "yuv420p"
        for stream in container.streams:
            for array in random_frames(20):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
    (tmp_path / "a.srt").write_text(srt((0, 1, "Hello.")))
    convert(tmp_path / "two.mkv", "--subtitles", tmp_path / "a.srt")
    assert "1 other video stream" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["mkv", "ts"])
def test_what_a_truncated_video_lacks_is_said(tmp_path, convert, capsys, ending):
    """No frame is decoded, so the file itself tells that its end is missing, or that its clock jumps."""
    path = write_clip(tmp_path / f"a.{ending}", random_frames(40), fps=10)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if ending == "mkv" else 2 * content)
    (tmp_path / "a.srt").write_text(srt((0, 1, "Hello.")))
    convert(path, "--subtitles", tmp_path / "a.srt")
    said = r"2(\.\d)? missing seconds" if ending == "mkv" else "1 mended time"
    assert re.search(rf"a\.{ending}: The source is not in order: {said}\.", capsys.readouterr().out)


def test_replies_of_overlapping_cues_are_in_order(tmp_path):
    """Of YouTube's captions, a row stays while the next one is said."""
    cues = [(0.16, 4.0, "hello there. I am"), (2.159, 6.0, "Bob. >> Hi Bob, how are")]
    cues += [(4.01, 9.0, "you doing today? >> I am"), (6.01, 11.0, "fine, thanks.")]
    (tmp_path / "a.srt").write_text(srt(*cues))
    said = [(line.start, line.text) for line in to_sentences(read_subtitles(tmp_path / "a.srt"))]
    assert [text for _, text in said] == [
        "hello there.",
        "I am Bob.",
        "Hi Bob, how are you doing today?",
        "I am fine, thanks.",
    ]
    assert [start for start, _ in said] == pytest.approx([0.16, 1.6, 2.6, 5.5], abs=0.4)


@pytest.mark.parametrize("between", ["", "\n"])
def test_headers_of_joined_parts_are_no_text(tmp_path, between):
    header, path = "WEBVTT\nX-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:900000\n\n", tmp_path / "a.vtt"
    cues = [
        f"00:0{second}.000 --> 00:0{second + 1}.000\nA {what}.\n"
        for second, what in ((1, "dog"), (3, "cat"), (5, "cow"))
    ]
    path.write_text(between.join(header + cue for cue in cues[:2]) + f"\nWEBVTT\n\n{cues[2]}")
    assert [line.text for line in read_subtitles(path)] == ["A dog.", "A cat.", "A cow."]


def write_subtitled(path, *, start=0, early=0, encoding="utf-8"):
    """Write a clip of 4 s with subtitles. The clock begins at `start` seconds, the subtitles `early` before."""
    cues = {0.5: "If a < b then é.", 2: "- Hi.\n- <i>Bye</i>."}
    clip = write_clip(path.with_name("clip.webm"), random_frames(40), fps=10, codec="libvpx")
    words = path.with_name("words.vtt" if path.suffix == ".webm" else "words.srt")
    words.write_text("WEBVTT\n\n" * (path.suffix == ".webm") + srt(*[(at, at + 1, cues[at]) for at in cues]))
    with av.open(str(clip)) as pictures, av.open(str(words)) as lines, av.open(str(path), "w") as container:
        sources = [pictures.streams.video[0], lines.streams.subtitles[0]]
        streams = [container.add_stream_from_template(source) for source in sources]
        for source, stream in zip(sources, streams, strict=True):
            for packet in [packet for packet in source.container.demux(source) if packet.pts is not None]:
                copy = av.Packet(bytes(packet).decode().encode(encoding) if source is sources[1] else bytes(packet))
                copy.time_base, copy.duration, copy.is_keyframe = packet.time_base, packet.duration, packet.is_keyframe
                copy.pts = copy.dts = packet.pts + round((start - early * (source is sources[1])) / packet.time_base)
                copy.stream = stream
                container.mux(copy)
    return path


@pytest.mark.parametrize(("suffix", "start"), [(".mkv", 0), (".mkv", 100), (".webm", 0)])
def test_streams_without_a_length_of_their_own(tmp_path, convert, suffix, start):
    video = write_subtitled(tmp_path / f"a{suffix}", start=start)
    [messages] = convert(video)
    assert [(m["time"], m["content"]) for m in messages] == [(0.5, "If a < b then é."), (2.0, "Hi."), (2.5, "Bye.")]
    assert json.loads((tmp_path / "out.jsonl").read_text())["end"] == 4.0


def test_subtitle_streams_of_mp4_keep_what_is_no_markup(tmp_path, convert, capsys):
    """The packets of an mp4 have the length of their text, the text, and its styles. Some have no text."""
    texts = [b"If {a} < b and c > d.", b"", "- Hi.\n- <i>Bye</i>.".encode("utf_16"), b"It leaves."]
    clip = write_clip(tmp_path / "clip.mp4", random_frames(50), fps=10)
    with (
        av.open(str(NASA)) as nasa,
        av.open(str(clip)) as pictures,
        av.open(str(tmp_path / "a.mp4"), "w") as container,
    ):
        sources = [pictures.streams.video[0], nasa.streams.subtitles[0]]
        video, words = [container.add_stream_from_template(source) for source in sources]
        for packet in [packet for packet in pictures.demux(sources[0]) if packet.pts is not None]:
            packet.stream = video
            container.mux(packet)
        for second, text in enumerate(texts):
            packet = av.Packet(struct.pack(">H", len(text)) + text + b"\0\0\0\x0chlit\0\0\0\1" * bool(text))
            packet.stream, packet.time_base, packet.duration = words, Fraction(1, 1000), 1000
            packet.pts = packet.dts = 1000 * second
            container.mux(packet)
    [messages] = convert(tmp_path / "a.mp4")
    said = [message["content"] for message in messages]
    assert said == ["If {a} < b and c > d.", "Hi.", "Bye.", "It leaves."]
    assert "left out" not in capsys.readouterr().out


def test_lines_before_the_video_are_left_out(tmp_path, convert, capsys):
    [messages] = convert(write_subtitled(tmp_path / "a.mkv", start=100, early=1.6))
    assert [(m["time"], m["content"]) for m in messages] == [(0.4, "Hi."), (0.9, "Bye.")]
    assert "lines before the start: 1" in capsys.readouterr().out


def test_subtitle_streams_that_are_not_utf_8(tmp_path, convert, capsys):
    [messages] = convert(write_subtitled(tmp_path / "a.mkv", encoding="cp1252"))
    assert messages[0]["content"] == "If a < b then é."
    assert "guessed encoding cp1252" in capsys.readouterr().out


def pgs():
    """Write the beginning of a stream of pictures."""
    state = struct.pack(">HHBHBBBB", 64, 48, 0x10, 0, 0x80, 0, 0, 0)
    return b"".join(
        b"PG" + struct.pack(">IIBH", 45000, 0, kind, len(data)) + data for kind, data in ((0x16, state), (0x80, b""))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.mp4"], "There is no video file 'gone.mp4'"),
        (["{nasa}", "--subtitles", "gone.srt"], "There is no file 'gone.srt'"),
        (["{nasa}", "--subtitles", "{folder}"], "is a folder: name a subtitle file"),
        (["{clip}"], "has no subtitle stream 0: it has 0"),
        (["{nasa}", "--stream", "7"], "has no subtitle stream 7: it has 2"),
        (["{nasa}", "--stream", "-1"], "has no subtitle stream -1: it has 2"),
        (["{nasa}", "--subtitles", "{late}"], "has no text within the 13.0 s"),
        (["{nasa}", "--subtitles", "{pictures}"], "holds pictures"),
        (["{nasa}", "--max_gap", "nan"], "`--max_gap` must be a finite number of seconds, at least 0, got nan"),
        (["{nasa}", "--max_words", "0"], "`--max_words` must be a whole number, at least 1, got 0"),
        (["{nasa}", "--query", "a\udcff"], "--query is not valid Unicode"),
    ],
)
def test_errors_are_one_line(tmp_path, convert, arguments, message):
    write_clip(tmp_path / "clip.mp4", random_frames(5), fps=10)
    (tmp_path / "late.srt").write_text(srt((3600, 3601, "Late.")))
    (tmp_path / "pictures.sup").write_bytes(pgs())
    names = {"folder": tmp_path, "clip": tmp_path / "clip.mp4", "nasa": NASA, "late": tmp_path / "late.srt"}
    names["pictures"] = tmp_path / "pictures.sup"
    with pytest.raises(SystemExit) as failed:
        convert(*(argument.format(**names) for argument in arguments))
    assert message in str(failed.value) and not (tmp_path / "out.jsonl").exists()


def test_an_input_is_not_overwritten(tmp_path, convert):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(10), fps=10)
    out = tmp_path / "out.jsonl"
    out.write_text(content := srt((0.2, 0.8, "A red ball.")))
    with pytest.raises(SystemExit, match="out.jsonl' is an input: write to another file"):
        convert(clip, "--subtitles", out)
    assert out.read_text() == content
