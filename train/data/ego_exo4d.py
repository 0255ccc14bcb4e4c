# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ego-Exo4D (Grauman et al., CVPR 2024): keysteps and atomic descriptions, in the view of the person who acts.

```bash
python train/data/prepare.py ego_exo4d --annotations egoexo --videos egoexo --out OUT --task keystep
```

`--annotations` is the folder of the download: files are found in it, in `annotations` and in `keystep_benchmark`.
What the rows of each task have as `truth`:

- keystep: `label_id` (int) and `label` (an entry of the label dictionary). Rows of the test split have `{}`.
- keystep_stream: `goal` (text) and `timeline`, a list of `[start, end, text]` in seconds.
- atomic: nothing. The replies are the truth.

VideoLLM-online has no code for this data set. Keysteps are asked for as it asks for COIN's steps, and descriptions
follow its rules for narrations. The words of the questions are ours.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Video, Videos, find_below, find_files
from videollm_mod.train.data.dialogues import (
    as_sentence,
    begins_after,
    ceil_frame,
    clamp,
    clip,
    question_messages,
    to_flag,
    to_number,
    to_text,
)
from videollm_mod.train.data.ego4d.goalstep import Level, Timeline, read_segments, timeline_row
from videollm_mod.train.data.ego4d.narration import INSTRUCTION, SEVERAL_PASSES, clean_narration, narration_row
from videollm_mod.train.data.json_streams import read_pairs, read_values, take_span, take_time, told_split


QUESTION = "Which action does the video show? Answer with its name only."
KEYSTEP = Level("step", "step_name", ("is_essential",))
STEPS = "Tell me each step of what I do when it begins."
# Names of files by task and split.
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "keystep": {
        "train": ("keystep_segment_train.json",),
        "validation": ("keystep_segment_val.json",),
        "test": ("keystep_segment_test_unannotated.json",),
    },
    "keystep_stream": {"train": ("keystep_train.json",), "validation": ("keystep_val.json",)},
    "atomic": {"train": ("atomic_descriptions_train.json",), "validation": ("atomic_descriptions_val.json",)},
}
# Folders of the download in which the files lie.
_FOLDERS = ("annotations", "keystep_benchmark", "annotations/keystep_benchmark")
_CAMERA = re.compile(r"(aria\d+_214-1)(?:\.\w+)?$")


@dataclass(frozen=True)
class Label:
    """
    A class of keystep recognition.

    Args:
        id (`int`): Its `label_id`.
        steps (`frozenset[int]`): Its `step_unique_id`, or several.
        name (`str`): Its entry of the label dictionary.
    """

    id: int
    steps: frozenset[int]
    name: str


def read_labels(path: Path) -> dict[int, Label]:
    """
    Return the classes of `label_mapping.csv` by `label_id`.

    Some names belong to several classes, of different scenarios. These get the scenario in brackets, so that a name
    tells its class.

    Raises:
        `ValueError`: If a row of the file has no number or name, or if a `label_id` has two names.
    """
    names: dict[int, str] = {}
    steps: dict[int, set[int]] = {}
    scenarios: dict[int, set[str]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            values = [to_number(row.get(key)) for key in ("label_id", "step_unique_id")]
            name, scenario = to_text(row.get("step_name")), to_text(row.get("scenario_name"))
            if None in values or name is None or scenario is None:
                raise ValueError(f"'{path}', line {number}: needs label_id, step_unique_id, step_name, scenario_name.")
            label, step = map(int, values)
            if names.setdefault(label, name) != name:
                raise ValueError(f"'{path}', line {number}: label_id {label} has two names.")
            steps.setdefault(label, set()).add(step)
            scenarios.setdefault(label, set()).add(scenario)
    if not names:
        raise ValueError(f"'{path}' has no rows: give label_mapping.csv as it was published.")
    counts = Counter(name.lower() for name in names.values())
    labels = {}
    for label, name in sorted(names.items()):
        full = name if counts[name.lower()] == 1 else f"{name} ({', '.join(sorted(scenarios[label]))})"
        labels[label] = Label(label, frozenset(steps[label]), full.lower())
    if len({label.name for label in labels.values()}) < len(labels):
        raise ValueError(f"'{path}': two classes have the same step_name and scenario_name.")
    return labels


def read_takes(path: Path) -> dict[str, list[str]]:
    """Return the paths of the ego view of each take of `takes.json`, by `take_uid`. Takes are read one by one."""
    takes = {}
    for take in read_values(path, "item"):
        uid = to_text(take.get("take_uid")) if isinstance(take, dict) else None
        root = to_text(take.get("root_dir")) if uid else None
        cameras = take.get("frame_aligned_videos") if root else None
        views = [
            camera["rgb"].get("relative_path")
            for name, camera in (cameras.items() if isinstance(cameras, dict) else ())
            if name.startswith("aria") and isinstance(camera, dict) and isinstance(camera.get("rgb"), dict)
        ]
        if root:
            takes[uid] = [f"{root}/{view}" for view in views if isinstance(view, str)]
    return takes


def video_names(path: str) -> Iterator[str]:
    """
    Yield the names under which the view of a camera may lie in the folder of videos, the small version first.

    Args:
        path (`str`): Its path in the download: "takes/<take>/frame_aligned_videos/aria02_214-1.mp4".
    """
    folder, _, name = path.rpartition("/")
    for parent in (folder, folder.removeprefix("takes/")):
        yield from (f"{parent}/downscaled/448/{name}", f"{parent}/{name}")
    take = folder.split("/")[-2] if "/" in folder else folder
    yield from (f"takes/{take}/{name}", f"{take}/{name}")


@dataclass
class EgoExo4D(Converter):
    """Ego-Exo4D's annotation files."""

    tasks: ClassVar[tuple[str, ...]] = tuple(FILES)
    license: ClassVar[str] = "Ego-Exo4D's licence agreement"

    takes: Path | None = field(
        default=None, metadata={"help": "takes.json, with the names of the ego view. Default: looked for."}
    )

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of all chosen tasks that have files. See [`Converter.convert`]."""
        found = find_files(annotations, FILES, self, *_FOLDERS)
        root = annotations if annotations.is_dir() else annotations.parent
        # The file lies in the root of the download, above the folders of annotations.
        takes_file = self.takes or find_below(root, ["takes.json"], ("", "..", "../.."))
        if takes_file is None and any(task == "atomic" for task, _, _ in found):
            raise FileNotFoundError("The task atomic needs takes.json, which names the video of a take: --takes FILE.")
        self.views = {} if takes_file is None else read_takes(takes_file)
        labels = self._read_labels(root) if any(task == "keystep" for task, _, _ in found) else {}
        for task, split, path in found:
            notes.split = split
            if task == "keystep" and told_split(path, "splits") not in (None, split):
                notes.leave_out(path.name, "splits", "a file of another split")
                continue
            if task == "keystep":
                rows = self._keystep_rows(path, split, labels, videos, notes)
            elif task == "keystep_stream":
                rows = self._stream_rows(path, videos, notes)
            else:
                rows = self._atomic_rows(path, videos, notes)
            yield from ((split, row) for row in rows)

    def _read_labels(self, root: Path) -> dict[int, Label]:
        path = find_below(root, ["label_mapping.csv"], ("", *_FOLDERS))
        if path is None:
            raise FileNotFoundError(f"The task keystep needs label_mapping.csv beside its files in '{root}'.")
        labels = read_labels(path)
        self.labels["ego_exo4d_keystep"] = [label.name for label in labels.values()]
        return labels

    def _open(self, uid: str, take: str, videos: Videos, notes: Notes, camera: str | None = None) -> Video | None:
        """Return the ego view of a take, or note that there is none. The camera that a segment names comes first."""
        cameras = [camera] if camera else [f"aria{number:02}_214-1" for number in range(1, 10)]
        views = [f"takes/{take}/frame_aligned_videos/{name}.mp4" for name in cameras]
        known = self.views.get(uid, [])
        views = [*views, *known] if camera or not known else known
        names = [name for view in views for name in video_names(view)]
        return videos.open(notes, uid, "take_uid", *names, take, uid)

    # ------------------------------------------------------------------------------------------------- the benchmark

    def _keystep_rows(
        self, path: Path, split: str, labels: dict[int, Label], videos: Videos, notes: Notes
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each segment of a benchmark file: a question, its frames, and the name of the step."""
        count = 0
        for index, segment in enumerate(read_values(path, "segments.item")):
            count, where = count + 1, f"segments[{index}]"
            entry = segment if isinstance(segment, dict) else {}
            uids = [to_text(entry.get(key)) for key in ("take_uid", "take_name")]
            if None in uids:
                notes.leave_out(path.name, where, "the segment names no take")
                continue
            label = None if split == "test" else self._label(segment, labels, notes, path.name, where)
            found = self._segment(segment, uids, videos, notes, path.name, where)
            if found is None or (label is None and split != "test"):
                continue
            video, first, last = found
            truth = {} if label is None else {"label_id": label.id, "label": label.name}
            messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
            if label is not None:
                messages = question_messages(QUESTION, as_sentence(label.name), last, self.fps)
            row = {
                "id": f"{uids[0]}/keystep-{index}",
                "task": "ego_exo4d_keystep",
                "truth": truth,
                "video": str(video.path),
            }
            yield {**row, **clip(first, last, self.fps), "messages": messages}
        if not count:
            raise ValueError(f"'{path}' has no list `segments` with entries: give a file of the keystep benchmark.")

    def _label(
        self, segment: dict[str, Any], labels: dict[int, Label], notes: Notes, where: str, field: str
    ) -> Label | None:
        number, step = (to_number(segment.get(key)) for key in ("label_id", "step_unique_id"))
        label = None if number is None or number != int(number) else labels.get(int(number))
        if label is None:
            notes.leave_out(where, f"{field}.label_id", "the label is not in label_mapping.csv")
        elif step is not None and step not in label.steps:
            notes.mended(where, f"{field}.step_unique_id", "another step than in label_mapping.csv: label_id is used")
        return label

    def _segment(
        self, segment: dict[str, Any], uids: list[str], videos: Videos, notes: Notes, where: str, field: str
    ) -> tuple[Video, int, int] | None:
        """Return the video and the first and last frame of a segment. Prefer the benchmark's clip of the segment."""
        name = segment.get("ego_segment_name")
        # The folder of the split may be missing, or others may lie above it. Names of clips repeat between takes.
        names = (name, "/".join(name.split("/")[-2:])) if isinstance(name, str) else ()
        own = videos.find(*names)
        if own is not None:
            return None if videos.open(notes, where, field, *names) is None else (own, 0, own.last_frame(self.fps))
        span = take_span(segment, ("start_time", "end_time"), notes, where, field)
        camera = _CAMERA.search(name) if isinstance(name, str) else None
        video = self._open(*uids, videos, notes, camera[1] if camera else None) if span else None
        if span is None or video is None:
            return None
        last = video.last_frame(self.fps)
        first, end = (ceil_frame(time, self.fps) for time in span)
        if begins_after(span[0], last, self.fps):
            notes.leave_out(where, f"{field}.start_time", "after the end of the video")
            return None
        if span[1] * self.fps > last + 1:
            notes.mended(where, f"{field}.end_time", "after the end of the video: cut there")
        return video, clamp(first, last), clamp(end, last)

    # ------------------------------------------------------------------------------------------------------- streams

    def _takes(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield `take_uid` and entry of each take. One take is in memory at a time."""
        is_empty = True
        for pair in read_pairs(path, "annotations"):
            is_empty = False
            yield pair
        if is_empty:
            raise ValueError(f"'{path}' has no object `annotations` with entries: give a file of Ego-Exo4D.")

    def _stream_rows(self, path: Path, videos: Videos, notes: Notes) -> Iterator[dict[str, Any]]:
        """Yield a row for each take: its keysteps, each told when it begins."""
        for uid, entry in self._takes(path):
            take = to_text(entry.get("take_name")) if isinstance(entry, dict) else None
            if take is None:
                notes.leave_out(path.name, uid, "the entry names no take")
                continue
            found = read_segments(entry.get("segments"), KEYSTEP, "segments", notes, uid)
            if not found:
                notes.leave_out(uid, "segments", "the take has no steps")
                continue
            video = self._open(uid, take, videos, notes)
            if video is None:
                continue
            timeline = Timeline(
                f"{uid}/keysteps", to_text(entry.get("scenario")) or "", [step for _, step, _ in found], KEYSTEP
            )
            row = timeline_row(timeline, video, fps=self.fps, question=STEPS, notes=notes, where=uid)
            if row is not None:
                yield {"task": "ego_exo4d_keystep_stream", **row}

    def _atomic_rows(self, path: Path, videos: Videos, notes: Notes) -> Iterator[dict[str, Any]]:
        """Yield a row for each annotator's pass over a take. The first description that is kept begins the row."""
        for uid, passes in self._takes(path):
            if not isinstance(passes, list):
                notes.leave_out(path.name, uid, "the passes are not a list")
                continue
            video = self._open(uid, uid, videos, notes)
            if video and len(passes) > 1:
                notes.mended(uid, "", SEVERAL_PASSES, by_rule=True)
            for index, content in enumerate(passes if video else ()):
                where = f"{uid}/pass-{index}"
                replies = read_descriptions(content, notes, where)
                if not replies:
                    continue
                row = narration_row(replies, video, fps=self.fps, instruction=INSTRUCTION, notes=notes, where=where)
                if row is not None:
                    yield {"id": where, "task": "ego_exo4d_atomic", "truth": {}, **row}


def read_descriptions(content: Any, notes: Notes, where: str) -> list[tuple[float, str]]:
    """
    Return time and text of the descriptions of a pass that are visible in the ego view.

    The published truth values are partly texts, "0" and "1". A pass that was rejected gives none.
    """
    descriptions = content.get("descriptions") if isinstance(content, dict) else None
    if not isinstance(descriptions, list):
        notes.leave_out(where, "descriptions", "the pass has no list of descriptions")
        return []
    if to_flag(content.get("rejected")):
        notes.leave_out(where, "rejected", "the pass was rejected", by_rule=True)
        return []
    kept = []
    for index, item in enumerate(descriptions):
        field = f"descriptions[{index}]"
        text = item.get("text") if isinstance(item, dict) else None
        visible = to_flag(item.get("ego_visible")) if isinstance(text, str) else None
        if visible is not None and isinstance(item["ego_visible"], str):
            notes.mended(where, f"{field}.ego_visible", "a truth value written as text: read as one", by_rule=True)
        if not isinstance(text, str):
            notes.leave_out(where, f"{field}.text", "there is no text")
        elif visible is None:
            notes.leave_out(where, f"{field}.ego_visible", "neither true nor false")
        elif not visible:
            notes.leave_out(where, f"{field}.ego_visible", "not visible in the ego view", by_rule=True)
        elif len(clean_narration(text).split()) < 2:
            notes.leave_out(where, f"{field}.text", "fewer than two words", by_rule=True)
        elif (time := take_time(item, "timestamp", notes, where, field)) is not None:
            kept.append((time, clean_narration(text)))
    return kept
