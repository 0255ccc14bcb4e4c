# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
ActivityNet Captions and YouCook2: the captions of events become replies at the end, or the start, of their events.

The words of the questions are ours. Files are known by their content, and splits by the names of files.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, list_files, read_json, split_of
from videollm_mod.train.data.dialogues import clip, join_events, reply_messages, to_number, to_text
from videollm_mod.train.data.json_streams import take_pair


# Seconds by which a video may differ from its annotated length.
SAME_LENGTH = 1.0
# What PDVC's copy of YouCook2 has for the sentences of its test split.
_NO_SENTENCE = "None"
_SUBSETS = {"training": "train", "validation": "validation", "testing": "test"}
_QUESTIONS = {
    ("activitynet", "end"): "Please describe each event of the video when it is over.",
    ("activitynet", "start"): "Please describe each event of the video when it starts.",
    ("youcook2", "end"): "Please tell me each step of the recipe when it is done.",
    ("youcook2", "start"): "Please tell me each step of the recipe when it starts.",
}


# -------------------------------------------------------------------------------------------------------------- files


def _read_documents(annotations: Path, is_known: Callable[[Any], bool], title: str) -> dict[Path, dict[str, Any]]:
    """Return the JSON files of a known format, and no others of their folder."""
    documents = {path: read_json(path) for path in list_files(annotations, ".json")}
    known = {path: document for path, document in documents.items() if is_known(document)}
    if not known:
        raise ValueError(f"'{annotations}' has no file in the format of {title}.")
    return known


def _some_entry(document: Any) -> dict[str, Any]:
    """Return the first entry that is an object, to know the format by."""
    entries = document.values() if isinstance(document, dict) else ()
    return next((entry for entry in entries if isinstance(entry, dict)), {})


def is_activitynet(document: Any) -> bool:
    """Return whether a document has the layout `{id: {"duration", "timestamps", "sentences"}}`."""
    return {"timestamps", "sentences"} <= _some_entry(document).keys()


def is_youcook2(document: Any) -> bool:
    """Return whether a document has the layout `{"database": {id: {"subset", "annotations"}}}`, or the copy's."""
    if not isinstance(document, dict):
        return False
    return "annotations" in _some_entry(document.get("database")) or is_activitynet(document)


def _by_annotator(
    documents: dict[Path, dict[str, Any]], chosen: str | None
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield split, entries and a second annotator's entries: `val_2.json` belongs to the rows of `val_1.json`."""
    second = {path: entries for path, entries in documents.items() if re.search(r"val_?2", path.stem.lower())}
    first = {path: entries for path, entries in documents.items() if path not in second}
    splits = {path: split_of(path, chosen) for path in first}
    if "validation" not in splits.values():
        first, second = {**first, **second}, {}
        splits = {path: split_of(path, chosen) for path in first}
    others = {name: entry for entries in second.values() for name, entry in entries.items()}
    for path, entries in first.items():
        yield splits[path], entries, others if splits[path] == "validation" else {}


# -------------------------------------------------------------------------------------------------------------- times


def shown_part(
    window: tuple[float, float], duration: float, where: str, field: str, notes: Notes
) -> tuple[float, float] | None:
    """Return the part of a window that the video shows, or note that it starts later. Note an end that is later."""
    start, end = window
    if start >= duration:
        notes.leave_out(where, field, "starts after the end of the video")
        return None
    if end > duration + SAME_LENGTH:
        notes.mended(where, field, "ends after the video: cut")
        return start, duration
    return window


def annotated_length(value: Any, video: Video, where: str, notes: Notes) -> float:
    """Return the annotated length in seconds, or the video's if there is none, and note where they differ."""
    annotated = to_number(value)
    if annotated is None or annotated <= 0:
        return video.duration
    if abs(annotated - video.duration) > SAME_LENGTH:
        notes.mended(where, "duration", "the video has another length than annotated: kept")
    return annotated


# ------------------------------------------------------------------------------------------------------------ captions


@dataclass(frozen=True)
class Event:
    """
    A caption and its time.

    Args:
        start, end (`float`): Seconds of the video.
        text (`str`): The caption, with single spaces.
        place (`str`): Its field in the annotation.
    """

    start: float
    end: float
    text: str
    place: str


def read_events(entry: Any, where: str, notes: Notes) -> list[Event]:
    """Return the captions of a video in the order of the file, from either layout, and note what is unusable."""
    entry = entry if isinstance(entry, dict) else {}
    events = []
    for place, times, text in _read_items(entry, where, notes):
        window, text = take_pair(times, notes, where, place), to_text(text)
        if text is None or text == _NO_SENTENCE:
            notes.leave_out(where, place, "there is no text")
        elif window is not None:
            events.append(Event(*window, text, place))
    return events


def _read_items(entry: dict[str, Any], where: str, notes: Notes) -> Iterator[tuple[str, Any, Any]]:
    """Yield field, times and text of each caption."""
    if isinstance(items := entry.get("annotations"), list):
        for index, item in enumerate(items):
            item = item if isinstance(item, dict) else {}
            yield f"annotations[{index}]", item.get("segment"), item.get("sentence")
        return
    times, texts = (entry[name] if isinstance(entry.get(name), list) else [] for name in ("timestamps", "sentences"))
    if len(times) != len(texts):
        notes.leave_out(where, "sentences", "the numbers of timestamps and sentences differ: the rest")
    for index, (time, text) in enumerate(zip(times, texts, strict=False)):
        yield f"timestamps[{index}]", time, text


def as_caption(text: str) -> str:
    """Return a caption with a capital first letter and a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _as_truth(events: list[Event]) -> dict[str, Any]:
    return {
        "timestamps": [[event.start, event.end] for event in events],
        "sentences": [event.text for event in events],
    }


def _note_order(events: list[Event], where: str, notes: Notes) -> None:
    if any(before.start > event.start for before, event in pairwise(events)):
        notes.mended(where, "timestamps", "not in order of time: sorted")
    ordered = sorted(events, key=lambda event: event.start)
    for before, event in pairwise(ordered):
        if event.start < before.end:
            notes.mended(where, event.place, "overlaps the event before: kept")


@dataclass
class DenseCaptions(Converter):
    """
    Base class of data sets of events with captions.

    Class attributes:
        source (`str`): Name of the source.

    Args:
        say_at (`str`, *optional*, defaults to `"end"`): Whether a caption is said when its event ends or starts.
    """

    source: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ("captions",)

    say_at: str = field(
        default="end",
        metadata={"help": "Say a caption at the end or the start of its event.", "choices": ["end", "start"]},
    )

    def read(self, annotations: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """
        Yield the entries of each split by name of the video, and those of a second annotator. Entries that belong to
        no split have the split "".

        Raises:
            `ValueError` or `OSError`: If there is no file of the source.
        """
        raise NotImplementedError

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a row for each video. See [`Converter.convert`]."""
        for split, entries, others in self.read(annotations):
            for name, entry in entries.items():
                if split and not self.accepts(split, name, notes):
                    continue
                notes.split = split
                if not split:
                    notes.leave_out(name, "subset", "is neither training nor validation nor testing")
                    continue
                video = videos.open(notes, name, "", name, name.removeprefix("v_"), f"v_{name}")
                if video is not None and (row := self._to_row(name, entry, others.get(name), video, notes)):
                    yield split, row

    def _to_row(self, name: str, entry: Any, other: Any, video: Video, notes: Notes) -> dict[str, Any] | None:
        events = [
            replace(event, end=shown[1])
            for event in read_events(entry, name, notes)
            if (shown := shown_part((event.start, event.end), video.duration, name, event.place, notes))
        ]
        if not events:
            notes.leave_out(name, "", "no event is left")
            return None
        _note_order(events, name, notes)
        duration, last = annotated_length(entry.get("duration"), video, name, notes), video.last_frame(self.fps)
        question = {"role": "user", "content": _QUESTIONS[self.source, self.say_at]}
        replies = reply_messages(self._place(events, last, name, notes), self.fps)
        if other is not None:
            notes.mended(name, "", "a second annotator: a reference", by_rule=True)
        references = [] if other is None else [read_events(other, f"{name} of the second annotator", notes)]
        truth = {
            "duration": duration,
            **_as_truth(events),
            "references": [_as_truth(second) for second in references if second],
            "say_at": self.say_at,
        }
        about = {"id": name, "task": f"{self.source}_captions", "video": str(video.path)}
        return {**about, **clip(0, last, self.fps), "messages": [question, *replies], "truth": truth}

    def _place(self, events: list[Event], last: int, name: str, notes: Notes) -> list[tuple[int, str]]:
        """Place captions on frames in order of reply time, then of starts."""
        ordered = sorted(events, key=lambda event: (getattr(event, self.say_at), event.start))
        told = ((getattr(event, self.say_at), as_caption(event.text), event.place) for event in ordered)
        return join_events(told, last, self.fps, notes, name)


@dataclass
class ActivityNet(DenseCaptions):
    """ActivityNet Captions: `train.json`, `val_1.json` and `val_2.json`, or one of them."""

    source: ClassVar[str] = "activitynet"
    license: ClassVar[str] = "none stated for the annotations"

    def read(self, annotations: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield the entries of each split. See [`DenseCaptions.read`]."""
        yield from _by_annotator(_read_documents(annotations, is_activitynet, "ActivityNet Captions"), self.split)


@dataclass
class YouCook2(DenseCaptions):
    """YouCook2: `youcookii_annotations_trainval.json`, or its copy in the layout of ActivityNet Captions."""

    source: ClassVar[str] = "youcook2"
    license: ClassVar[str] = "none stated for the annotations"

    def read(self, annotations: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield the entries of each split. See [`DenseCaptions.read`]."""
        documents = _read_documents(annotations, is_youcook2, "YouCook2")
        originals = [document for document in documents.values() if "database" in document]
        for document in originals:
            by_split: dict[str, dict[str, Any]] = {split: {} for split in ("", *_SUBSETS.values())}
            for name, entry in document["database"].items():
                subset = entry.get("subset") if isinstance(entry, dict) else None
                by_split[_SUBSETS.get(str(subset), "")][name] = entry
            yield from ((split, entries, {}) for split, entries in by_split.items())
        if not originals:
            yield from _by_annotator(documents, self.split)
