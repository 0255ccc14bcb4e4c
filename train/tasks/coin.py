# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""COIN's five tasks, as VideoLLM-online evaluates them (arXiv 2406.11816, section 4.1, and its code)."""

import re
from collections.abc import Sequence
from typing import Any

from videollm_mod.train.data.dialogues import floor_frame
from videollm_mod.train.data.windows import MAX_FRAMES
from videollm_mod.train.tasks.labels import LabelFinder, LabelTask, clean_reply, read_labels
from videollm_mod.train.tasks.running import Runner


# Published figures of VideoLLM-online (arXiv 2406.11816) and VideoLLM-MoD (arXiv 2408.16730). The last are those of a
# later paper that trained VideoLLM-online's method on Llama-3.2-1B with 10 tokens a frame.
_MODELS = ("VideoLLM-online 7B-v1", "VideoLLM-online 8B-v1+", "VideoLLM-MoD", "VideoLLM-online on 1B")
_PAPERS = {
    "coin_step": (0.598, 0.631, 0.634, 0.577),
    "coin_task": (0.921, 0.927, 0.928, 0.921),
    "coin_next": (0.481, 0.491, 0.497, 0.474),
    "coin_procedure": (0.479, 0.498, 0.498, 0.481),
    "coin_taskprocedure": (0.529, 0.541, 0.533, 0.508),
}
_NUMBER = re.compile(r"^\s*\d+\s*[.):]\s*")


class CoinLabel(LabelTask):
    """
    The step, the next step, or the task.

    `accuracy` is that of VideoLLM-online's code, and `strict_accuracy` follows its paper, where a text that is not in
    the dictionary is wrong.

    VideoLLM-online's code shows nothing of a clip of more than 1200 frames, 7200 if a frame has one token: only the
    question is left. With `--official`, such rows are predicted in this way.
    """

    official_note = (
        "The published scorer agrees, but its dictionary has only the labels of the videos at hand. "
        "Its model sees nothing of clips of more than 1200 frames."
    )
    predicts_officially = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.papers = {model: {"accuracy": figure} for model, figure in zip(_MODELS, _PAPERS[name], strict=True)}

    def depends_on_official(self, row: dict[str, Any], fps: float) -> bool:
        """Return whether the clip may have more frames than VideoLLM-online's code shows. No file is opened."""
        end = row.get("end")
        return end is None or floor_frame(end - (row.get("start") or 0.0), fps) >= MAX_FRAMES

    def predict_all(self, runner: Runner, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the replies to a batch."""
        return [{"text": texts[0]} for texts in runner.answer_all(rows, official=self.official)]


class CoinProcedure(CoinLabel):
    """
    The next one to five steps, one a line, compared with `labels` of the row's `truth` position by position.

    `accuracy` is the share of true steps that the line at their position names, so a missing line is wrong.
    `strict_accuracy` also counts lines too many as wrong, and only lines that are the label as right. The published
    scorer compares pairs of a line and a step, so that missing lines cost nothing.
    """

    official_note = (
        "The published scorer leaves out steps without a line; the default counts them as wrong. "
        "Its model sees nothing of clips of more than 1200 frames."
    )
    scored_keys = ("labels",)

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
        official: bool = False,
    ) -> dict[str, float]:
        """Return `accuracy` and `strict_accuracy`, or the published `accuracy`."""
        finder = LabelFinder(read_labels(about, self.name))
        pairs = [
            (prediction["text"], [label.lower() for label in row["truth"]["labels"]])
            for row, prediction in zip(rows, predictions, strict=True)
        ]
        if official:
            steps = [
                (line.split(". ")[-1], label)
                for text, labels in pairs
                for line, label in zip(text.split("\n"), labels, strict=False)
            ]
            return {"accuracy": sum(label in (line, finder.find(line)) for line, label in steps) / len(steps)}
        near = exact = compared = 0
        for text, labels in pairs:
            lines = read_lines(text)
            near += sum(finder.find(line) == label for line, label in zip(lines, labels, strict=False))
            exact += sum(line == label for line, label in zip(lines, labels, strict=False))
            compared += max(len(lines), len(labels))
        return {"accuracy": near / sum(len(labels) for _, labels in pairs), "strict_accuracy": exact / compared}


def read_lines(text: str) -> list[str]:
    """Return the lines of a numbered list, without numbers and full stops, in small letters. Empty lines are none."""
    return [clean_reply(_NUMBER.sub("", line).strip()) for line in text.splitlines() if line.strip()]
