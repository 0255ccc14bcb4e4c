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
- refined, livechat: nothing. These are the files that VideoLLM-online's authors made of narrations and of GoalStep.
- nlq: `query` (text), `windows`, a list of `[start, end]`, and `clip`, the `[start, end]` of the clip, in seconds;
  `places`, a list of `clip_uid`, `annotation_uid` and `query_idx`, which name the query in a submission.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from videollm_mod.train.data.converters import Converter, Notes, Videos, find_files
from videollm_mod.train.data.ego4d.goalstep import convert_goalstep, read_groups
from videollm_mod.train.data.ego4d.live_files import convert_livechat, convert_refined
from videollm_mod.train.data.ego4d.lta import convert_lta, read_taxonomy
from videollm_mod.train.data.ego4d.narration import convert_narrations, read_splits
from videollm_mod.train.data.ego4d.nlq import convert_nlq
from videollm_mod.train.data.json_streams import told_split


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
    "refined": {
        "train": ("refined_narration_stream_train.json",),
        "validation": ("refined_narration_stream_val.json",),
    },
    "livechat": {"train": ("goalstep_livechat_trainval_filtered_21k.json",)},
}
_CONVERT = {"nlq": convert_nlq, "refined": convert_refined}
TAXONOMY = "fho_lta_taxonomy.json"
GROUPS = "goalstep_video_groups.tsv"


@dataclass
class Ego4D(Converter):
    """
    Ego4D's annotation files.

    Args:
        splits (`Path`, *optional*): Folder with the validation and test files of all benchmarks, which tell the split
            of each narrated video. Defaults to the folder of the annotations. If it lacks files, all narrations are
            for training, and a line says so.
        wearer_only (`bool`, *optional*, defaults to `False`): Whether to leave out narrations of what other people do.
            VideoLLM-online's code keeps them.
    """

    tasks: ClassVar[tuple[str, ...]] = tuple(FILES)
    license: ClassVar[str] = "Ego4D's licence agreement; GoalStep's annotations: MIT"

    splits: Path | None = field(
        default=None,
        metadata={"help": "For narrations: folder of all benchmarks' val and test files. Default: the annotations'."},
    )
    wearer_only: bool = field(default=False, metadata={"help": "For narrations: leave out what other people do (#O)."})

    def convert(self, annotations: Path, videos: Videos, notes: Notes) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of all chosen tasks that have files. See [`Converter.convert`]."""
        found = find_files(annotations, FILES, self)
        folder = annotations if annotations.is_dir() else annotations.parent
        kinds = {task for task, _, _ in found}
        splits = self._read_splits(folder) if "narration" in kinds else {}
        if kinds == {"narration"} and not splits and self.split not in (None, "train"):
            raise ValueError(f"--split {self.split} of the narrations needs --splits FOLDER.")
        words = self._read_words(folder) if "lta" in kinds else ([], [])
        groups_file = folder / GROUPS
        groups = read_groups(groups_file, notes) if kinds & {"goalstep", "livechat"} and groups_file.is_file() else {}
        for task, split, path in found:
            if task in ("goalstep", "lta") and told_split(path, "split") not in (None, split):
                notes.split = split
                notes.leave_out(path.name, "split", "a file of another split")
            elif task == "narration":
                options = {"wearer_only": self.wearer_only, "splits": splits, "wanted": self.split}
                yield from convert_narrations(path, videos, notes, fps=self.fps, **options)
            elif task == "goalstep":
                yield from convert_goalstep(path, split, videos, notes, fps=self.fps, groups=groups)
            elif task == "lta":
                yield from convert_lta(path, split, videos, notes, fps=self.fps, words=words)
            elif task == "livechat":
                yield from convert_livechat(path, split, videos, notes, fps=self.fps, groups=groups)
            else:
                yield from _CONVERT[task](path, split, videos, notes, fps=self.fps)

    def _read_splits(self, folder: Path) -> dict[str, str]:
        if self.splits is not None:
            return read_splits(self.splits)
        try:
            return read_splits(folder)
        except (FileNotFoundError, ValueError) as error:
            sys.stderr.write(
                "All narrations are for training, also those of videos on which Ego4D's benchmarks evaluate: no "
                f"--splits is given. {error}\n"
            )
            return {}

    def _read_words(self, folder: Path) -> tuple[list[str], list[str]]:
        path = folder / TAXONOMY
        if not path.is_file():
            raise FileNotFoundError(f"The task lta needs '{path}'. Ego4D's command downloads it with the annotations.")
        words = read_taxonomy(path)
        self.labels |= {"ego4d_lta_verb": words[0], "ego4d_lta_noun": words[1]}
        return words
