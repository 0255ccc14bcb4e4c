# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Charades-STA and QVHighlights: queries become replies that say when a moment starts and when it ends.

Files are known by their content, and splits by the names of files.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Videos, list_files, read_json_lines, split_of
from videollm_mod.train.data.dense_captions import annotated_length, shown_part
from videollm_mod.train.data.dialogues import clip, to_number, to_text
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.json_rows import mend_halves, parse_row
from videollm_mod.train.data.json_streams import take_pair
from videollm_mod.train.data.moments import ask_for_moment, to_moment_replies


# A line of Charades-STA: "3MSZA 24.3 30.4##person turn a light on."
_STA_LINE = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)\s*##(.*)")


@dataclass(frozen=True)
class Query:
    """
    A query for moments of a video.

    Args:
        id (`str`): Its id.
        video (`str`): Name of the video.
        text (`Any`): The query, as it is in the file.
        windows (`list`, *optional*): Its windows, as they are in the file, or `None` if there are none.
        length (`Any`): The annotated length of the video, or `None`.
        scores (`tuple[Any, Any]`, *optional*): Indices of clips of two seconds, and the annotators' scores of each.
        qid (`Any`): The id that a copy in the layout of QVHighlights gives it, or `None`.
    """

    id: str
    video: str
    text: Any
    windows: Any = None
    length: Any = None
    scores: tuple[Any, Any] = (None, None)
    qid: Any = None


@dataclass
class Moments(Converter):
    """
    Base class of data sets of queries for moments.

    Class attributes:
        source (`str`): Name of the source.
    """

    source: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ("moments",)

    def read(self, annotations: Path, notes: Notes) -> Iterator[tuple[str, Query]]:
        """
        Yield the queries of each split.

        Raises:
            `ValueError` or `OSError`: If there is no file of the source.
        """
        raise NotImplementedError

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a row for each query. See [`Converter.convert`]."""
        for split, query in self.read(annotations, notes):
            if self.accepts(split, query.id, notes) and (row := self._to_row(query, videos, notes)):
                yield split, row

    def _to_row(self, query: Query, videos: Videos, notes: Notes) -> dict[str, Any] | None:
        text = to_text(query.text)
        if text is None:
            notes.leave_out(query.id, "query", "there is no text")
            return None
        if query.windows is None:
            notes.leave_out(query.id, "relevant_windows", "published without its windows", by_rule=True)
            return None
        video = videos.open(notes, query.id, "vid", query.video)
        if video is None:
            return None
        windows = []
        for index, value in enumerate(query.windows if isinstance(query.windows, list) else []):
            place = (query.id, f"relevant_windows[{index}]")
            window = take_pair(value, notes, *place)
            if window is not None and (shown := shown_part(window, video.duration, *place, notes)):
                windows.append(shown)
        last, asked = video.last_frame(self.fps), text.rstrip(" .")
        replies = to_moment_replies(asked, windows, fps=self.fps, last=last)
        if not replies:
            # The reason of a query's only window is the reason of the query.
            if windows or not isinstance(query.windows, list) or len(query.windows) != 1:
                notes.leave_out(query.id, "relevant_windows", "no window is left")
            return None
        truth = {
            "query": text,
            "vid": query.video,
            "windows": [list(window) for window in windows],
            "duration": annotated_length(query.length, video, query.id, notes),
            **_read_scores(query, notes),
            **({} if query.qid is None else {"qid": query.qid}),
        }
        question = {"role": "user", "content": ask_for_moment(asked, query.id)}
        about = {"id": query.id, "task": f"{self.source}_moments", "video": str(video.path)}
        return {**about, **clip(0, last, self.fps), "messages": [question, *replies], "truth": truth}


def _read_scores(query: Query, notes: Notes) -> dict[str, Any]:
    """Return the annotators' scores of clips, if there are any."""
    clips, scores = query.scores
    if clips is None and scores is None:
        return {}
    clips, scores = (value if isinstance(value, list) else [None] for value in (clips, scores))
    numbers = [[to_number(score) for score in row] if isinstance(row, list) else [] for row in scores]
    has_clips = len(numbers) == len(clips) and all(isinstance(index, int) and index >= 0 for index in clips)
    if not has_clips or any(None in row or not row for row in numbers):
        notes.mended(query.id, "saliency_scores", "the scores of clips are unusable: left out")
        return {}
    return {"saliency": {"clips": clips, "scores": numbers}}


def _read_lines(path: Path, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file of JSON lines, and the place of each."""
    for where, row in read_json_lines(path):
        if row is None:
            notes.leave_out(where, "", "is no JSON object")
        else:
            yield where, row


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return next((line for line in file if line.strip()), "")


def _is_query_file(path: Path) -> bool:
    try:
        row = parse_row(mend_halves(_first_line(path).encode()), path.name)
    except FaultyRowError:
        return False
    return {"query", "vid"} <= row.keys()


def _read_query(row: dict[str, Any], name: str) -> Query:
    """Return a query in the layout of QVHighlights."""
    scores = (row.get("relevant_clip_ids"), row.get("saliency_scores"))
    return Query(name, str(row.get("vid")), row.get("query"), row.get("relevant_windows"), row.get("duration"), scores)


@dataclass
class QvHighlights(Moments):
    """QVHighlights: `highlight_{train,val}_release.jsonl` and `highlight_test_with_gt.jsonl`, or one of them."""

    source: ClassVar[str] = "qvhighlights"
    license: ClassVar[str] = "CC BY-NC-SA 4.0"

    def read(self, annotations: Path, notes: Notes) -> Iterator[tuple[str, Query]]:
        """Yield the queries of each split. See [`Moments.read`]."""
        files = [path for path in list_files(annotations, ".jsonl") if _is_query_file(path)]
        if not files:
            raise ValueError(f"'{annotations}' has no file in the format of QVHighlights.")
        # The test queries were published without and later with their windows.
        told: set[tuple[str, str]] = set()
        for path in sorted(files, key=lambda path: "relevant_windows" not in _first_line(path)):
            notes.split = split = split_of(path, self.split)
            for where, row in _read_lines(path, notes):
                query = _read_query(row, str(row.get("qid", where)))
                if query.windows is not None or (split, query.id) not in told:
                    told.add((split, query.id))
                    yield split, query


@dataclass
class CharadesSta(Moments):
    """
    Charades-STA: `charades_sta_{train,test}.txt`, and `Charades_v1_{train,test}.csv` for lengths if they are there.

    Copies in the layout of QVHighlights are read too.
    """

    source: ClassVar[str] = "charades_sta"
    license: ClassVar[str] = "Charades: non-commercial use only"

    def read(self, annotations: Path, notes: Notes) -> Iterator[tuple[str, Query]]:
        """Yield the queries of each split. See [`Moments.read`]."""
        files = list_files(annotations, ".txt .jsonl .csv")
        lengths = {name: length for path in files if path.suffix == ".csv" for name, length in _read_lengths(path)}
        files = [path for path in files if "##" in _first_line(path) or _is_query_file(path)]
        if not files:
            raise ValueError(f"'{annotations}' has no file in the format of Charades-STA.")
        for path in files:
            notes.split = split = split_of(path, self.split)
            is_text, counts = "##" in _first_line(path), Counter[str]()
            for query in _read_sta(path, notes) if is_text else _read_copy(path, notes):
                length = query.length or lengths.get(query.video)
                name = f"{query.video}/{counts[query.video]}"
                counts[query.video] += 1
                yield split, Query(name, query.video, query.text, query.windows, length, qid=query.qid)


def _read_sta(path: Path, notes: Notes) -> Iterator[Query]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if found := _STA_LINE.fullmatch(line.strip()):
                name, start, end, text = found.groups()
                yield Query("", name, text, [[to_number(start), to_number(end)]])
            elif line.strip():
                notes.leave_out(f"{path.name}, line {number}", "", "is not 'id start end##sentence'")


def _read_copy(path: Path, notes: Notes) -> Iterator[Query]:
    for _, row in _read_lines(path, notes):
        yield replace(_read_query(row, ""), qid=row.get("qid"))


def _read_lengths(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the ids and lengths of `Charades_v1_train.csv`."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            yield str(row.get("id")), row.get("length")
