# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ego4D: the annotation files of narrations, GoalStep, long-term anticipation and natural language queries.

```bash
python train/data/prepare.py ego4d --annotations v2/annotations --videos v2/full_scale --out OUT --task narration
```

`--annotations` is the folder of Ego4D's `v2/annotations`, or one of its files. The name of a file tells its task and
split. What the rows of each task have as `truth`:

- narration: nothing. The replies are the truth.
- goalstep: `goal` (text) and `timeline`, a list of `[start, end, text]` in seconds.
- lta: `clip_uid`, `last_visible_action_idx`, and four lists of 20: `verb`, `noun` (words), `verb_label`, `noun_label`.
- nlq: `query` (text), `windows`, a list of `[start, end]`, and `clip`, the `[start, end]` of the clip, in seconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Videos
from videollm_mod.train.data.ego4d.goalstep import convert_goalstep, read_groups
from videollm_mod.train.data.ego4d.lta import convert_lta, read_taxonomy
from videollm_mod.train.data.ego4d.narration import convert_narrations, read_splits
from videollm_mod.train.data.ego4d.nlq import convert_nlq


# Names of files by task and split. The first that there is gives the rows of its split. Narrations have no split.
FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "narration": {"": ("all_narrations_redacted.json", "narration.json")},
    "goalstep": {
        "train": ("goalstep_train.json",),
        "validation": ("goalstep_val.json", "goalstep_valid.json"),
        "test": ("goalstep_test_unannotated.json", "goalstep_test.json"),
    },
    "lta": {
        "train": ("fho_lta_train.json",),
        "validation": ("fho_lta_val.json",),
        "test": ("fho_lta_test_unannotated.json",),
    },
    "nlq": {
        "train": ("nlq_train.json",),
        "validation": ("nlq_val.json",),
        "test": ("nlq_test_unannotated.json",),
    },
}
TAXONOMY = "fho_lta_taxonomy.json"
GROUPS = "goalstep_video_groups.tsv"


@dataclass
class Ego4D(Converter):
    """
    Ego4D's annotation files.

    Args:
        splits (`Path`, *optional*): Folder with the validation and test files of all benchmarks, which tell the split
            of each narrated video. Without it, all narrations are for training.
        others (`bool`, *optional*, defaults to `True`): Whether to keep narrations of what other people do, as
            VideoLLM-online's code does.
    """

    tasks: ClassVar[tuple[str, ...]] = tuple(FILES)
    license: ClassVar[str] = "Ego4D's licence agreement; GoalStep's annotations: MIT"

    splits: Path | None = field(
        default=None,
        metadata={"help": "For narrations: folder of the val and test files of all benchmarks. Default: all train."},
    )
    others: bool = field(default=True, metadata={"help": "For narrations: keep what other people do (#O)."})

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of all chosen tasks that have files. See [`Converter.convert`]."""
        found = self.find_annotations(annotations)
        folder = annotations if annotations.is_dir() else annotations.parent
        kinds = {task for task, _, _ in found}
        splits = read_splits(self.splits) if "narration" in kinds and self.splits is not None else {}
        if kinds == {"narration"} and self.splits is None and self.split not in (None, "train"):
            raise ValueError(f"--split {self.split} of the narrations needs --splits FOLDER.")
        words = self._read_words(folder) if "lta" in kinds else ([], [])
        groups_file = folder / GROUPS
        groups = read_groups(groups_file, notes) if "goalstep" in kinds and groups_file.is_file() else {}
        for task, split, path in found:
            if task == "narration":
                options = {"others": self.others, "splits": splits, "wanted": self.split}
                yield from convert_narrations(path, videos, notes, fps=self.fps, **options)
            elif task == "goalstep":
                yield from convert_goalstep(path, split, videos, notes, fps=self.fps, groups=groups)
            elif task == "lta":
                yield from convert_lta(path, split, videos, notes, fps=self.fps, words=words)
            else:
                yield from convert_nlq(path, split, videos, notes, fps=self.fps)

    def find_annotations(self, annotations: Path) -> list[tuple[str, str, Path]]:
        """
        Return task, split and path of each file to read.

        Raises:
            `FileNotFoundError`: If there is no such file or folder, or if a task of `--task` has no file in it.
            `ValueError`: If the name of a file does not tell its task.
        """
        wanted = [
            (task, split, names)
            for task in self.chosen
            for split, names in FILES[task].items()
            if not split or self.wants(split)
        ]
        if annotations.is_file():
            found = [(task, split, annotations) for task, split, names in wanted if annotations.name in names]
            if not found and self.chosen == ("narration",):
                found = [("narration", "", annotations)]
            if not found:
                names = ", ".join(name for _, _, names in wanted for name in names)
                raise ValueError(f"--annotations {annotations} is none of the files asked for: {names}.")
            return found
        if not annotations.is_dir():
            raise FileNotFoundError(f"There is no file or folder '{annotations}'.")
        found = []
        for task, split, names in wanted:
            paths = [annotations / name for name in names if (annotations / name).is_file()]
            found += [(task, split, path) for path in paths[:1]]
        asked = self.chosen if self.task is not None else ()
        missing = [task for task in asked if task not in {task for task, _, _ in found}] or ([] if found else ["any"])
        if missing:
            names = ", ".join(name for task, _, names in wanted if missing[0] in (task, "any") for name in names)
            raise FileNotFoundError(f"The folder '{annotations}' has no file for {missing[0]} task: {names}.")
        return found

    def _read_words(self, folder: Path) -> tuple[list[str], list[str]]:
        path = folder / TAXONOMY
        if not path.is_file():
            raise FileNotFoundError(f"The task lta needs '{path}'. Ego4D's command downloads it with the annotations.")
        words = read_taxonomy(path)
        self.labels |= {"ego4d_lta_verb": words[0], "ego4d_lta_noun": words[1]}
        return words
