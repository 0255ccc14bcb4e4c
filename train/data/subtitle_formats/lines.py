# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lines of subtitles: in order of time, each once, and one for each speaker."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, zip_longest


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
        other_streams (`int`): Further subtitle streams of the video, and further languages of SAMI.
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


# Cues that follow each other within this time touch, in seconds.
TOUCH = 0.05
_DRAWING = re.compile(r"m(?: -?\d+(?:\.\d+)?){2}(?: (?:[bclmnps]|-?\d+(?:\.\d+)?))+")
# A speaker begins: "- Hello." or ">> Hello.", but not "-5 degrees".
DASH = re.compile(r"(?:[-‐‑–—－](?![-‐‑–—－]|[.,]?\d|[$€£¥])|>{2,3}(?!>))\s*")
# Scripts that put no spaces between words, and the full-width signs.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_UNSPACED = f"[{_UNSPACED}\U00020000-\U0003ffff]"
UNSPACED = re.compile(_UNSPACED)
# Not in "DR. SMITH: Hello."
_NAME = r"(?<=[^A-Z][.!?…] )(?=[A-Z][A-Z .'-]*[A-Z]: )"
_NEXT_SPEAKER = re.compile(
    rf"(?<=[.!?…。！？])\s+(?:(?={DASH.pattern}\S)|{_NAME})|(?<=[。！？])(?={DASH.pattern}{_UNSPACED})"
)
_WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S)+")
# Chinese speakers share a row without signs at its end: "－你好 －再见".
_NEXT_DASH = re.compile(rf"{_NEXT_SPEAKER.pattern}|(?<={UNSPACED.pattern})\s+(?={DASH.pattern}\S)")
_SIGN = re.compile("[\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
# Chinese and Japanese: words of Latin letters stand between them without spaces, except where an author puts some.
_IDEOGRAM = "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_SPACED = re.compile(rf"{_IDEOGRAM} [A-Za-z\d]|[A-Za-z\d] {_IDEOGRAM}")
_IDEOGRAM = re.compile(_IDEOGRAM)
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")
# Seconds between the cues of rolling captions.
_ROLL = 0.5


def join(texts: Iterable[str]) -> str:
    """Join texts with spaces, or without them in scripts that have none."""
    texts, joined = list(texts), ""
    is_spaced = any(_SPACED.search(text) or _is_translation(text) for text in texts)
    for text in texts:
        edge = joined[-1:] + text[:1]
        is_unspaced = len(UNSPACED.findall(edge)) == 2 or bool(_SIGN.search(edge))
        is_unspaced |= not is_spaced and bool(_IDEOGRAM.search(edge)) and not _HANGUL.search(edge)
        joined += text if not joined or not text or is_unspaced else f" {text}"
    return joined


def ends_line(word: Line, following: Line) -> bool:
    """Return whether the line of words with times of their own ends between two: with a sentence, or at a pause."""
    return following.start - word.end > 1 or bool(re.search(r"[.!?…。！？]\W*$", word.text))


def _is_translation(text: str) -> bool:
    """Return whether a text is a sentence in another script, and not a word within Chinese or Japanese."""
    return not UNSPACED.search(text) and len(text.split()) > 2


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


def in_order(cues: list[Line], report: SubtitleReport) -> Iterator[Line]:
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


def each_once(cues: Iterable[Line], report: SubtitleReport) -> list[Line]:
    """Leave out the rows, or in rolling captions the words, that are still on screen from a cue before."""
    cues, kept = list(cues), []
    turned = [replace(cue, text="\n".join(reversed(cue.text.split("\n")))) for cue in cues]
    (num_carried, grows, rolls), on_top = _habits(cues), _habits(turned)
    if on_top[0] > max(num_carried, len(cues) / 2 - 1):
        # New rows come on top. Turned round, the rows of each cue are in the order in which they are said.
        cues, (_, grows, rolls) = turned, on_top
    shown: list[tuple[float, list[str], int]] = []
    for cue in cues:
        rows = cue.text.split("\n")
        shown = [(end, other, index) for end, other, index in shown if end >= cue.start - (_ROLL if rolls else TOUCH)]
        found = [(*_carried(other, rows, grows, rolls), index, end) for end, other, index in shown]
        # The same cue again after a break is said again.
        found = [(*parts, index) for *parts, index, end in found if parts[1] or end >= cue.start - TOUCH]
        # The cue that leaves the least text is the one that this cue goes on from, and the last of several such.
        least = min(reversed(found), key=lambda item: (-item[0], sum(map(len, item[1]))), default=(0, rows, False, 0))
        carried, new, is_part, index = least
        report.repeated_lines += carried
        if is_part:
            part, _, rest = new[0].partition(" ")
            kept[index] = replace(kept[index], end=max(kept[index].end, cue.end), text=kept[index].text + part)
            new = [rest, *new[1:]] if rest else new[1:]
        if new:
            index = len(kept)
            kept.append(replace(cue, text="\n".join(new)))
        else:
            kept[index] = replace(kept[index], end=max(kept[index].end, cue.end))
        shown.append((cue.end, rows, index))
    return kept


def _habits(cues: list[Line]) -> tuple[int, bool, bool]:
    """Return how many cues go on from the one before, and whether most of them grow, or roll."""
    pairs = [(one.text, other.text) for one, other in pairwise(cues)]
    grown = [after != before and after.startswith(before) for before, after in pairs]
    grows = sum(grown) > max(2, len(grown) / 2)
    carried = sum(
        other.start - one.end <= _ROLL and _carried(one.text.split("\n"), other.text.split("\n"), grows, True)[0] > 0
        for one, other in pairwise(cues)
        if one.text != other.text
    )
    return carried, grows, carried > max(1, sum(before != after for before, after in pairs) / 2)


def _carried(before: list[str], rows: list[str], grows: bool, rolls: bool) -> tuple[int, list[str], bool]:
    """
    Compare a cue with one before.

    Returns:
        `tuple`: How many rows end the previous cue and begin this one, the text that is new, and whether it goes on
        within a word. A row may have grown, or begin with the last words of the previous one.
    """
    for count in range(min(len(before), len(rows)), 0, -1):
        last = rows[count - 1]
        if before[-count:-1] == rows[: count - 1] and (last == before[-1] or grows and last.startswith(before[-1])):
            rest = last[len(before[-1]) :]
            is_part = bool(re.fullmatch(r"\w\w", last[len(before[-1]) - 1 :][:2])) and not UNSPACED.match(rest)
            return count, [rest.strip(), *rows[count:]] if rest.strip() else rows[count:], is_part
    if rolls and (shared := _count_shared(before[-1], rows[0])):
        words = [match.start() for match in _WORD.finditer(rows[0])]
        rest = rows[0][words[shared] :] if shared < len(words) else ""
        return 1, [rest, *rows[1:]] if rest else rows[1:], False
    return 0, rows, False


def _count_shared(before: str, after: str) -> int:
    """Count the words, or unspaced characters, that end one row and begin another: two or more, or all of one."""
    before, after = _WORD.findall(before)[-100:], _WORD.findall(after)[:100]
    for count in range(min(len(before), len(after)), 0, -1):
        if before[-count:] == after[:count]:
            return count if count > 1 or 1 in (len(before), len(after)) else 0
    return 0


def cut_overlaps(cues: list[Line]) -> Iterator[Line]:
    """
    End a cue when the next one begins, if the next one stays longer. On YouTube, a row stays while the next one is
    said, and times within a cue would lie before the end of the cue before. A cue within another one stays as it is.
    """
    for cue, following in zip_longest(cues, cues[1:]):
        is_overlap = following is not None and cue.start < following.start < cue.end <= following.end
        yield replace(cue, end=following.start) if is_overlap else cue


def to_turns(line: Line) -> Iterator[Line]:
    """Split a cue into what its speakers say, if it marks them with dashes or names, and join the rows of each."""
    turns: list[list[str]] = []
    for row in line.text.split("\n"):
        # Speakers may share a row: "- Who is it? - Me."
        first, *others = (_NEXT_DASH if DASH.match(row) else _NEXT_SPEAKER).split(row)
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
