# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""OVO-Bench (arXiv 2501.05510): twelve tasks in three groups, all asked after the last frame of a clip."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from videollm_mod.train.arithmetic import mean
from videollm_mod.train.data.ovo_bench import GROUPS
from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.choices import letter_likelihoods, most_likely, read_letter, read_number, read_yes
from videollm_mod.train.tasks.running import Runner


_PREFIX = "ovo_bench_"
# Published figures: Gemini's are in the benchmark's README, the others in arXiv 2605.07897 and 2606.16353.
_PAPERS = {
    "Gemini": {
        **{"epm": 0.5859, "asi": 0.7635, "hld": 0.5269, "backward": 0.6254},
        **{"ocr": 0.8591, "acr": 0.6697, "atr": 0.7931, "stu": 0.5843, "fpd": 0.6337, "ojr": 0.6196},
        **{"realtime": 0.6932, "rec": 0.3553, "ssr": 0.7424, "crr": 0.6167, "forward": 0.5715, "total": 0.63},
    },
    "SAVEMem": {"total": 0.6269},
    "SelectStream": {"total": 0.6703},
}


class OVOBench(Task):
    """
    The share of right replies of each task that the data have; the mean over the tasks of each group that is complete;
    and `total`, the mean over groups if all are. `ovo_bench` is all tasks together, `ovo_bench_epm` is one of them.

    A reply chooses an option by its letter or by its text (see [`read_letter`]). A count is the reply's only number.
    The published scorer looks for the letter anywhere in the reply, so that "A" is in nearly every sentence. It joins
    all digits of the reply, and looks for "Yes" or "No" anywhere.

    `backward_by_likelihood` and `realtime_by_likelihood` take the most likely letter in place of the reply.
    """

    truth_keys = ("options",)
    no_reply: ClassVar[dict[str, Any] | None] = {"text": ""}
    official_note = "The published scorer looks for the letter, Yes or No anywhere in a reply, and joins its digits."
    scored_keys = ("answer",)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        asked = {name.removeprefix(_PREFIX)}
        kept = {
            model: {key: figure for key, figure in figures.items() if name == "ovo_bench" or key in asked}
            for model, figures in _PAPERS.items()
        }
        self.papers = {model: figures for model, figures in kept.items() if figures}

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row belongs to the task, or to one of the twelve."""
        return super().wants(row) or (self.name == "ovo_bench" and str(row.get("task")).startswith(_PREFIX))

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the greedy reply, and how likely each letter is."""
        (text,) = runner.answer(row, max_new_tokens=32)
        options = row["truth"].get("options")
        return (
            {"text": text}
            if options is None
            else {"text": text, "likelihoods": letter_likelihoods(runner, row, options)}
        )

    def predict_all(self, runner: Runner, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the predictions of rows. The longest clip of a video comes first, so that its frames serve others."""
        ends = [(str(row.get("video")), row.get("end") or 0.0) for row in rows]
        order = sorted(range(len(rows)), key=ends.__getitem__, reverse=True)
        found = {place: self.predict(runner, rows[place]) for place in order}
        return [found[place] for place in range(len(rows))]

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the scores of tasks, groups and all."""
        is_right = _is_right_officially if official else _is_right
        right: dict[str, list[bool]] = {}
        likely: dict[str, list[bool]] = {}
        for row, predicted in zip(rows, predictions, strict=True):
            task, truth = row["task"].removeprefix(_PREFIX), row["truth"]
            right.setdefault(task, []).append(is_right(task, predicted["text"], truth))
            if "options" in truth and not official:
                likely.setdefault(task, []).append(most_likely(predicted.get("likelihoods")) == truth["answer"])
        scores: dict[str, float] = {}
        for group, tasks in GROUPS.items():
            scores |= {task: mean(right[task]) for task in tasks if task in right}
            if all(task in right for task in tasks):
                scores[group] = mean([scores[task] for task in tasks])
        if all(group in scores for group in GROUPS):
            scores["total"] = mean([scores[group] for group in GROUPS])
        for group, tasks in GROUPS.items():
            if all(task in likely for task in tasks):
                scores[f"{group}_by_likelihood"] = mean([mean(likely[task]) for task in tasks])
        return scores


def _is_right(task: str, reply: str, truth: dict[str, Any]) -> bool:
    if "options" in truth:
        return read_letter(reply, truth["options"]) == truth["answer"]
    if task == "rec":
        return read_number(reply) == int(truth["answer"])
    return read_yes(reply) == (truth["answer"] == "Yes")


def _is_right_officially(task: str, reply: str, truth: dict[str, Any]) -> bool:
    """Score as `OVOBenchScore.py`, which also takes a bare "Y" or "N"."""
    if task == "rec":
        return "".join(re.findall(r"\d+", reply)) == truth["answer"]
    return truth["answer"] in reply or ("options" not in truth and reply == truth["answer"][0])
