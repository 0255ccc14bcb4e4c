# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Evaluation tasks: what `train/evaluation.py --task` may name.

A task is a class in a file of this folder and one line in [`TASKS`]; docs/extending.md has a complete example.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from videollm_mod.train.data.faults import counted, name_row


if TYPE_CHECKING:
    from videollm_mod.train.judging import Judge
    from videollm_mod.train.tasks.running import Runner


class Task:
    """
    Base class of tasks.

    Class attributes:
        papers (`dict[str, dict[str, float]]`): Published figures of a task by model, under the names and in the units
            of [`Task.score`]. They are printed beside the scores.
        official_note (`str`): One sentence that says how the published scorer differs from the default. It is empty
            if they agree.
        has_published_scorer (`bool`): Whether `official` changes anything, or the published scorer agrees with the
            default.
        streams (`bool`): Whether predictions depend on the options of streams.
        predicts_officially (`bool`): Whether predictions also depend on `official`. Then those of the rows of
            [`Task.depends_on_official`] are made for each.
        truth_keys (`tuple[str, ...]`): The keys of a row's `truth` that predictions depend on, such as options. A
            prediction gets no others. It is made anew if one of them changes.
        scored_keys (`tuple[str, ...]`): The keys that the `truth` of each row must have for [`Task.score`].
        no_reply (`dict`, *optional*): The prediction that stands for a row that cannot be read, if such a row counts
            as one without a reply. Otherwise the scores do not cover it.

    Attributes:
        judge (`str` or [`Judge`]): Judge of free text, for the tasks that need one.
        official (`bool`): Whether [`Task.predict`] follows the published code, if `predicts_officially`.

    Args:
        name (`str`): The name in [`TASKS`]. One class may score several tasks.
    """

    papers: ClassVar[dict[str, dict[str, float]]] = {}
    official_note: ClassVar[str] = ""
    has_published_scorer: ClassVar[bool] = True
    streams: ClassVar[bool] = False
    predicts_officially: ClassVar[bool] = False
    truth_keys: ClassVar[tuple[str, ...]] = ()
    scored_keys: ClassVar[tuple[str, ...]] = ()
    no_reply: ClassVar[dict[str, Any] | None] = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.judge: str | Judge = "token_f1"
        self.official = False

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row belongs to this task."""
        return row.get("task") == self.name

    def depends_on_official(self, row: dict[str, Any], fps: float) -> bool:  # noqa: ARG002
        """Return whether the prediction of a row depends on `official`, if `predicts_officially`."""
        return True

    def check(self, about: dict[str, Any]) -> None:
        """
        Check what the score will need, before rows are predicted.

        Args:
            about (`dict`): See [`Task.score`].

        Raises:
            `ValueError`, `OSError` or `ImportError`: If something is missing.
        """

    def check_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """
        Check that the rows have the `scored_keys`, before they are predicted.

        Raises:
            `ValueError`: With the first row that lacks one, and how many there are.
        """
        lacking = []
        for row in rows:
            truth = row.get("truth") if isinstance(row.get("truth"), dict) else {}
            lacking += [(row, key) for key in self.scored_keys if truth.get(key) is None][:1]
        if lacking:
            (row, key), *others = lacking
            more = f", and {counted(len(others), 'more row')} like it" if others else ""
            raise ValueError(
                f"{name_row(row)}: `truth` has no `{key}`, which {self.name} is scored by{more}. Prepare the data "
                "with prepare.py."
            )

    def predict(self, runner: "Runner", row: dict[str, Any]) -> dict[str, Any]:
        """
        Return what the model makes of a row, as JSON values. It is saved, so that another run can score it again.

        Args:
            runner ([`Runner`]): Runs the model on rows.
            row (`dict`): A row of timed messages with `id` and `task`. Its `truth` has the keys `truth_keys` only.
        """
        raise NotImplementedError

    def predict_all(self, runner: "Runner", rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the predictions of at most `runner.batch_size` rows. Override it to run them as one batch."""
        return [self.predict(runner, row) for row in rows]

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
        official: bool = False,
    ) -> dict[str, float]:
        """
        Return the scores by name.

        Args:
            rows (sequence of `dict`): The rows that have a prediction, at least one. Arrays of frames are left out.
            predictions (sequence of `dict`): The prediction of each row.
            about (`dict`): The folder's `about.json`, with the label dictionaries in `labels`, and `fps`, which is the
                frame rate of the run if the folder names none.
            official (`bool`, *optional*, defaults to `False`): Whether to score as the published scorer does, with its
                weaknesses.

        Returns:
            `dict[str, float]`: Shares are from 0 to 1, times are in seconds.
        """
        raise NotImplementedError

    def write_files(
        self,
        folder: Path,  # noqa: ARG002
        rows: Sequence[dict[str, Any]],  # noqa: ARG002
        predictions: Sequence[dict[str, Any]],  # noqa: ARG002
        about: dict[str, Any],  # noqa: ARG002
    ) -> list[Path]:
        """
        Write further files of results, such as a submission, into a folder. There are none by default.

        Returns:
            `list[Path]`: The files.
        """
        return []


# The class of each task, as "module:class" so that only the chosen modules are imported.
TASKS: dict[str, str | type[Task]] = {
    "activitynet_captions": "videollm_mod.train.tasks.dense_captions:DenseCaptionTask",
    "aqtc_guidance": "videollm_mod.train.tasks.aqtc:Guidance",
    "charades_sta_moments": "videollm_mod.train.tasks.dense_captions:MomentTask",
    "coin_next": "videollm_mod.train.tasks.coin:CoinLabel",
    "coin_procedure": "videollm_mod.train.tasks.coin:CoinProcedure",
    "coin_step": "videollm_mod.train.tasks.coin:CoinLabel",
    "coin_streaming": "videollm_mod.train.tasks.narration:Narration",
    "coin_task": "videollm_mod.train.tasks.coin:CoinLabel",
    "coin_taskprocedure": "videollm_mod.train.tasks.coin:CoinProcedure",
    "ego4d_goalstep": "videollm_mod.train.tasks.narration:Narration",
    "ego4d_livechat": "videollm_mod.train.tasks.narration:Narration",
    "ego4d_lta": "videollm_mod.train.tasks.lta:Ego4DLta",
    "ego4d_narration": "videollm_mod.train.tasks.narration:Narration",
    "ego4d_nlq": "videollm_mod.train.tasks.nlq:Ego4DNlq",
    "ego4d_refined": "videollm_mod.train.tasks.narration:Narration",
    "ego_exo4d_atomic": "videollm_mod.train.tasks.narration:Narration",
    "ego_exo4d_keystep": "videollm_mod.train.tasks.keystep:EgoExo4DKeystep",
    "ego_exo4d_keystep_stream": "videollm_mod.train.tasks.narration:Narration",
    "narration": "videollm_mod.train.tasks.narration:Narration",
    "ovo_bench": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_acr": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_asi": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_atr": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_crr": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_epm": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_fpd": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_hld": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_ocr": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_ojr": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_rec": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_ssr": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "ovo_bench_stu": "videollm_mod.train.tasks.ovo_bench:OVOBench",
    "proactive": "videollm_mod.train.tasks.proactive:Proactive",
    "proactive_video_qa_ego": "videollm_mod.train.tasks.proactive:ProactiveVideoQA",
    "proactive_video_qa_tv": "videollm_mod.train.tasks.proactive:ProactiveVideoQA",
    "proactive_video_qa_vad": "videollm_mod.train.tasks.proactive:ProactiveVideoQA",
    "proactive_video_qa_web": "videollm_mod.train.tasks.proactive:ProactiveVideoQA",
    "qvhighlights_moments": "videollm_mod.train.tasks.dense_captions:MomentTask",
    "streaming_bench_omni": "videollm_mod.train.tasks.streaming_bench:Choices",
    "streaming_bench_proactive": "videollm_mod.train.tasks.streaming_bench:PolledOutput",
    "streaming_bench_proactive_native": "videollm_mod.train.tasks.streaming_bench:NativeOutput",
    "streaming_bench_real": "videollm_mod.train.tasks.streaming_bench:Choices",
    "streaming_bench_sqa": "videollm_mod.train.tasks.streaming_bench:Choices",
    "vript_hard_ero": "videollm_mod.train.tasks.vript_hard:Order",
    "vript_hard_hal": "videollm_mod.train.tasks.vript_hard:Description",
    "vript_hard_rr": "videollm_mod.train.tasks.vript_hard:Choice",
    "vript_hard_rr_clip": "videollm_mod.train.tasks.vript_hard:Choice",
    "vript_hard_rr_open": "videollm_mod.train.tasks.vript_hard:OpenAnswer",
    "vript_hard_rr_open_clip": "videollm_mod.train.tasks.vript_hard:OpenAnswer",
    "vript_scenes": "videollm_mod.train.tasks.dense_captions:DenseCaptionTask",
    "youcook2_captions": "videollm_mod.train.tasks.dense_captions:DenseCaptionTask",
}


def find_task(name: str) -> Task:
    """
    Return the task of a name.

    Raises:
        `ValueError`: If there is none.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}. Tasks are {', '.join(sorted(TASKS))}.")
    task = TASKS[name]
    if isinstance(task, str):
        module, kind = task.split(":")
        task = getattr(import_module(module), kind)
    return task(name)


def choose_tasks(names: str, about: dict[str, Any], split: str) -> list[Task]:
    """
    Return the tasks of a comma-separated list. The name of the data's source stands for all its tasks with rows.

    Args:
        names (`str`): Names, such as "coin_step,coin_task" or "coin".
        about (`dict`): The folder's `about.json`. Its `source`, `tasks` and `splits` say what the source's name
            stands for.
        split (`str`): Name of the split.

    Raises:
        `ValueError`: If a name is unknown, or if the source has no rows in the split.
    """
    # Data without counts of rows may have rows of every task.
    counts = about.get("splits", {}).get(split, {}).get("tasks")
    there = [task for task in about.get("tasks", []) if counts is None or counts.get(task)]
    found: dict[str, Task] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        is_source = name not in TASKS and name == about.get("source")
        if is_source and not there:
            raise ValueError(f"{split} has no row of a task of {name}.")
        for each in there if is_source else [name]:
            found.setdefault(each, find_task(each))
    if not found:
        raise ValueError("names no task.")
    return list(found.values())
