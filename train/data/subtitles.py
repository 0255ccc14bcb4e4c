# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert subtitles to timed messages, to train on your own video.

```bash
python train/data/subtitles.py lecture.mp4 --out lecture.jsonl                       # subtitles in the file
python train/data/subtitles.py a.mp4 b.mp4 --subtitles a.srt b.vtt --out train.jsonl
```

Lines are merged into sentences. Each sentence becomes a reply at the time when it begins (or ends).
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from videollm_mod.checks_videollm_mod import check_count, check_number, check_text
from videollm_mod.outputs import check_outputs, path_from, write_text
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.data.faults import counted
from videollm_mod.train.data.subtitle_formats.lines import (
    DASH,
    TOUCH,
    UNSPACED,
    Line,
    SubtitleReport,
    count_words,
    join,
    split_line,
)
from videollm_mod.train.data.subtitle_formats.reading import read_subtitles
from videollm_mod.train.data.timed_messages import NARRATE
from videollm_mod.video_reading_videollm_mod import VideoReader


_CLOSERS = r"[\"'”’»)\]」』）】》〉]*"
# Latin, East Asian, Indian, Arabic, Tibetan, Ethiopic, Khmer, Burmese and Armenian marks, and the Greek question mark.
_GREEK = "(?<=[\u0370-\u03ff\u1f00-\u1fff])[;\u037e]"
_SENTENCE_END = re.compile(rf"(?:[.!?…。！？．｡‼⁇⁈⁉।॥؟۔།༎።។။։]|{_GREEK}){_CLOSERS}$")
# Places where a sentence may end: before a space, and in scripts without spaces after their own marks. In Japanese, a
# full-width period after hiragana is one. After other letters it separates names.
_STOP = re.compile(
    rf"(?:[.!?…।॥؟۔།༎։‼⁇⁈⁉]+|{_GREEK}){_CLOSERS}\s+|[!?‼⁇⁈⁉]+{_CLOSERS}(?={UNSPACED.pattern})"
    rf"|(?:[。！？｡।॥።។။]+|(?<=[\u3041-\u309f])．)[!?！？]*{_CLOSERS}\s*"
)
_TITLES = (
    "Mr Mrs Ms Mx Dr Prof Sr Sra Srta St Gen Col Lt Sgt Capt Cmdr Maj Rev Hon Pres Gov Sen Rep Mme Mlle Hr Fr Mt Ft"
)
_TITLES = frozenset(f"{_TITLES} vs e.g i.e z.B d.h".lower().split())
# Before a number only: "No. 5", but also the answer "No."
_BEFORE_NUMBERS = frozenset(("no", "nos", "nr", "fig", "p", "pp", "vol", "ch", "sec", "approx", "ca"))
_BEFORE_SMALL_LETTERS = frozenset(("approx", "co", "corp", "dept", "est", "etc", "inc", "jr", "ltd"))

_MUSIC = re.compile("[♪♫🎵🎶]+[^♪♫🎵🎶]*(?:[♪♫🎵🎶]+|$)")
_BRACKETS = re.compile(r"(?:(?<!\w)\[|[【［〔])(?=[^\]】］〕]*[^\W\d])[^\[\]【】［］〔〕]*[\]】］〕]:?")
# Words in parentheses are an aside between sentences only: not in "call 555 (home) now" or "f(x)".
_PARENTHESES = re.compile(
    r"(?:^|(?<=[.!?…。！？])\s*)(?:\((?=[^()]*[^\W\d])[^()]*\)(?:(?!\w)[.,:]?(?=\s|$)"
    rf"|(?={UNSPACED.pattern}))|（[^（）]*）)"
)
_SPEAKER = re.compile(r"((?:[^\W\d_][\w.'’&-]*)(?: [\w.'’&#-]+){0,3})(?: ?[(\[][^)\]]*[)\]])? ?:(?:\s+|$)")
_NO_WORDS = re.compile(r"[\s.,:;…*#~'\"“”‘’_–—-]+")
# Parts of names: not "COVID-19", but "MAN #2"; and not "HTTP" or "I".
_NAME_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[.'’&-])*|#?\d+|&")
_SYLLABLE = re.compile(r"[aeiouy][a-z]|[a-z][aeiouy]|[^\x00-\x7f]", re.I)
# Words in capitals before a colon that name no speaker.
_NO_SPEAKERS = """
    A AFTER AGENDA AI ALERT ALSO AN AND ANSWER API ARE ATTENTION BEFORE BONUS BREAKING BUT BY CASE CAUTION CHAPTER
    CONCLUSION CONS CPU CREDITS DANGER DATE DAY DEFINITION DISCLAIMER EPISODE ERROR EU EXAMPLE EXERCISE FACT FAQ
    FIGURE FINALLY FIRST FYI GOAL GPU HE HERE HINT HOW I IMPORTANT IN INTRO INTRODUCTION IS IT LAST LATER LEMMA
    LESSON LEVEL LIVE LOCATION MEANWHILE MODULE MONTH MUSIC MY NB NEWS NEXT NO NOTE NOTES OF OK OKAY ON OPTION OR
    OVERVIEW PART PHASE PLACE POINT PRICE PROOF PROS PS QUESTION QUIZ REASON RECAP REMEMBER RESULT ROUND RULE SCENE
    SCORE SECOND SECTION SHE SO SOURCE SPOILER STAGE STATUS STEP SUBJECT SUMMARY TABLE TASK THAT THE THEOREM THERE
    THEY THIRD THIS TIME TIP TIPS TITLE TO TODAY TODO TOMORROW TONIGHT TOPIC TOTAL UK UN UNIT UPDATE URL USA VERSION
    WARNING WE WEEK WHAT WHEN WHERE WHO WHY YEAR YES YESTERDAY YOU
"""
_NO_SPEAKERS = frozenset(_NO_SPEAKERS.split())


def to_sentences(
    lines: list[Line],
    *,
    max_gap: float = 1.5,
    max_words: int = 40,
    keep_asides: bool = False,
    keep_speakers: bool = False,
    report: SubtitleReport | None = None,
) -> list[Line]:
    """
    Merge subtitle lines into sentences. If a sentence begins within a line, its time is interpolated.

    Args:
        lines (`list[Line]`): Lines in order of time. A line with a dash begins a sentence.
        max_gap (`float`, *optional*, defaults to 1.5): Seconds of silence that end a sentence.
        max_words (`int`, *optional*, defaults to 40): A sentence of this many words ends before the next line. In
            scripts without spaces between words, characters count.
        keep_asides (`bool`, *optional*, defaults to `False`): Keep text that nobody says, such as "[Music]".
        keep_speakers (`bool`, *optional*, defaults to `False`): Keep the dash or the name of a speaker, such as
            "ANNA:".
        report ([`SubtitleReport`], *optional*): Where to count what was left out.

    Returns:
        `list[Line]`: Sentences in order of time.
    """
    report = SubtitleReport() if report is None else report
    spoken = lines if keep_asides else [replace(line, text=_without_asides(line.text, report)) for line in lines]
    names = set() if keep_speakers else _speaker_names(spoken)
    sentences: list[Line] = []
    speaker = ""
    for line in spoken:
        name, text = ("", line.text) if keep_speakers else _without_speaker(line.text, names)
        text = text if keep_asides else _without_asides(text, report)
        report.speaker_names += bool(name)
        report.lines_without_text += bool(_NO_WORDS.fullmatch(text))
        is_turn = bool(DASH.match(line.text)) or bool(speaker and name and name != speaker)
        speaker = name or speaker
        begins = is_turn or not sentences or _is_apart(sentences[-1], line, max_gap, max_words)
        pieces = [] if _NO_WORDS.fullmatch(text) else split_line(replace(line, text=text), _stops(text))
        for index, piece in enumerate(pieces):
            if (begins and index == 0) or _ends(sentences[-1].text, piece.text, is_new_line=index == 0):
                sentences.append(piece)
            else:
                last = sentences[-1]
                sentences[-1] = Line(last.start, max(last.end, piece.end), join([last.text, piece.text]))
    return sorted(sentences, key=lambda sentence: sentence.start)


def _is_apart(sentence: Line, line: Line, max_gap: float, max_words: int) -> bool:
    """Return whether a line begins a sentence, even if the previous sentence has no end mark."""
    # A line that comes and goes while another stays does not continue it.
    is_nested = line.end < sentence.end - TOUCH
    return is_nested or line.start - sentence.end > max_gap or count_words(sentence.text) >= max_words


def _stops(text: str) -> Iterator[int]:
    """Yield the places in a line where a sentence ends and another begins."""
    for match in _STOP.finditer(text):
        if _ends(text[: match.end()].rstrip(), text[match.end() :], is_new_line=False):
            yield match.end()


def _ends(before: str, after: str, *, is_new_line: bool) -> bool:
    """Return whether a sentence ends between two texts: not in "Dr. Smith", "5 p.m. today" or "well... maybe"."""
    if not _SENTENCE_END.search(before):
        return False
    first = after.lstrip("\"'“‘«([¿¡")
    if before[-1] in "」』" and first.startswith(("と", "って")):
        # The Japanese particle of a quotation: 「はい。」と言った。
        return False
    goes_on, is_small = before.endswith(("...", "…")), first[:1].islower()
    if goes_on or before[-1] in "\"'”’»":
        return not (is_small or (goes_on and first.startswith(("...", "…"))))
    word = before.rsplit(None, 1)[-1].lstrip("\"'“‘«([")
    if not word.endswith("."):
        return True
    name = word[:-1].lower()
    is_initial = re.fullmatch(r"(?:[^\W\d_]\.)+", word) and word != "I." and (is_small or not is_new_line)
    # "1. Open the box.", but also "There are 3."
    *_, earlier = ["", *before[: -len(word)].split()]
    is_item = name.isdigit() and earlier[:-1].lower() not in _BEFORE_NUMBERS
    is_item = is_item and bool(not earlier or _SENTENCE_END.search(earlier))
    is_short = name in _BEFORE_NUMBERS and first[:1].isdigit() or name in _BEFORE_SMALL_LETTERS and is_small
    return not (is_initial or is_item or is_short or name in _TITLES)


def _without_asides(text: str, report: SubtitleReport) -> str:
    for pattern in (_MUSIC, _BRACKETS, _PARENTHESES):
        text, count = pattern.subn(" ", text)
        text, report.asides = " ".join(text.split()), report.asides + count
    return text


def _without_speaker(text: str, names: set[str]) -> tuple[str, str]:
    """Return the name of the speaker, or an empty text, and what the speaker says."""
    text = DASH.sub("", text, count=1) if DASH.match(text) else text
    match = _SPEAKER.match(text)
    return (match[1], text[match.end() :]) if match and match[1] in names else ("", text)


def _speaker_names(lines: list[Line]) -> set[str]:
    """Return what stands before colons and certainly names speakers: "ANNA", "DR. SMITH", or "Anna Smith" twice."""
    texts = [DASH.sub("", line.text, count=1) if DASH.match(line.text) else line.text for line in lines]
    found = [(match[1], text[match.end() :]) for text in texts if (match := _SPEAKER.match(text))]
    counts = Counter(name for name, _ in found)
    return {name for name, rest in found if _is_speaker(name, rest, counts[name])}


def _is_speaker(name: str, said: str, count: int) -> bool:
    words = name.split()
    has_title = words[0].strip(".").lower() in _TITLES
    if not _NO_SPEAKERS.isdisjoint(word.strip(".").upper() for word in words):
        return False
    if not (all(_NAME_WORD.fullmatch(word) for word in words) and (has_title or _SYLLABLE.search(name))):
        return False
    if name.isupper():
        # In a text that is all in capitals, "THE REASON IS:" looks like a name.
        return count > 1 or (len(words) < 4 and any(letter.islower() for letter in said)) or not said
    is_name = len(words) > 1 and all(word[0].isupper() or not word[0].isalpha() for word in words)
    return is_name and (count > 1 or has_title)


def to_timed_messages(
    sentences: list[Line],
    *,
    query: str = NARRATE,
    say_at: str = "start",
    end: float | None = None,
    report: SubtitleReport | None = None,
) -> list[dict[str, Any]]:
    """
    Convert sentences to a dialogue: the query at second 0, if there is one, then each sentence as a reply.

    Args:
        sentences (`list[Line]`): Sentences in order of time.
        query (`str`, *optional*): What the user says first.
        say_at (`str`, *optional*, defaults to `"start"`): Whether a reply comes when its sentence begins ("start") or
            ends ("end").
        end (`float`, *optional*): Length of the video in seconds. Sentences that begin later are left out.
        report ([`SubtitleReport`], *optional*): Where to count what was left out.
    """
    if say_at not in ("start", "end"):
        raise ValueError(f"`say_at` is 'start' or 'end', got {say_at!r}.")
    end = math.inf if end is None else end
    said = [sentence for sentence in sentences if sentence.start <= end]
    if report is not None:
        report.sentences_after_the_end += len(sentences) - len(said)
    times = [min(sentence.start if say_at == "start" else sentence.end, end) for sentence in said]
    messages = [
        {"role": "assistant", "content": sentence.text, "time": round(time, 3)}
        for time, sentence in sorted(zip(times, said, strict=True), key=lambda item: item[0])
    ]
    return [{"role": "user", "content": query, "time": 0.0}, *messages] if query.strip() else messages


def to_row(video: Path, subtitles: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """
    Convert a video and its subtitles to a row of timed messages.

    Returns:
        The row, and one line for each of the two files that was not in order.

    Raises:
        `ValueError`: If one of them cannot be read, or there is no text.
    """
    with VideoReader(video) as reader:
        # Rounded down, so that no time lies behind the last picture.
        seconds, rate = math.floor(reader.seconds * 1000) / 1000, reader.rate
        # No frame is decoded, so what is missing must be asked for.
        reader.check_file()
    report = SubtitleReport()
    lines = read_subtitles(
        subtitles,
        options.stream,
        encoding=options.encoding,
        frame_rate=None if rate is None else float(rate),
        report=report,
    )
    sentences = to_sentences(
        lines,
        max_gap=options.max_gap,
        max_words=options.max_words,
        keep_asides=options.keep_asides,
        keep_speakers=options.keep_speakers,
        report=report,
    )
    messages = to_timed_messages(sentences, query=options.query, say_at=options.say_at, end=seconds, report=report)
    if not _count_replies(messages):
        found = f" ({report})" if report else ""
        raise ValueError(f"'{subtitles}' has no text within the {seconds:.1f} s of '{video}'{found}.")
    name = path_from(options.out.resolve().parent, video)
    notes = [f"{file}: {found}" for file, found in ((video, reader.report), (subtitles, report)) if found]
    return {"video": name, "start": 0.0, "end": seconds, "messages": messages}, notes


def _count_replies(messages: list[dict[str, Any]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def main() -> None:
    """Write one row of timed messages for each video."""
    parser = CommandLineParser(description="Convert videos with subtitles to timed messages, one row per video.")
    parser.add_argument("videos", nargs="+", type=Path, help="video files")
    parser.add_argument(
        "--subtitles",
        nargs="+",
        type=Path,
        help="subtitle files of any format, one per video; default: the streams in the videos",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--stream", type=int, default=0, help="index of the subtitle stream")
    parser.add_argument("--encoding", help="encoding of subtitle files, such as cp1252; default: UTF-8, else a guess")
    parser.add_argument("--query", default=NARRATE, help="what the user says first; empty for nothing")
    parser.add_argument(
        "--say_at", choices=("start", "end"), default="start", help="reply at the start or the end of a sentence"
    )
    parser.add_argument("--max_gap", type=float, default=1.5, help="seconds of silence that end a sentence")
    parser.add_argument("--max_words", type=int, default=40, help="end a longer sentence at the next line")
    parser.add_argument("--keep_asides", action="store_true", help='keep "[Music]" and the like')
    parser.add_argument("--keep_speakers", action="store_true", help='keep "ANNA:" or a dash before a line')
    options = parser.parse_args()
    if options.subtitles is not None and len(options.subtitles) != len(options.videos):
        parser.error(f"got {len(options.subtitles)} subtitle files for {len(options.videos)} videos")
    rows, notes = [], []
    try:
        check_number("--max_gap", options.max_gap, least=0, unit=" of seconds")
        check_count("--max_words", options.max_words)
        check_text("--query", options.query)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        check_outputs({"--out": options.out}, *options.videos, *(options.subtitles or ()))
        for video, source in zip(options.videos, options.subtitles or options.videos, strict=True):
            row, found = to_row(video, source, options)
            rows.append(row)
            notes += found
        write_text(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(*notes, sep="\n", end="\n" if notes else "")
    replies = sum(_count_replies(row["messages"]) for row in rows)
    print(f"{options.out}: {counted(len(rows), 'row')}, {replies} {'reply' if replies == 1 else 'replies'}")


if __name__ == "__main__":
    main()
