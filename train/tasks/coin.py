# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""COIN's tasks as VideoLLM-online evaluates them (arXiv 2406.11816, section 4.1, and its code)."""

from collections.abc import Sequence
from typing import Any

from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.labels import nearest_label
from videollm_mod.train.tasks.running import Runner


# Published figures: VideoLLM-online (arXiv 2406.11816) and VideoLLM-MoD (arXiv 2408.16730, table 3).
_MODELS = ("VideoLLM-online 7B-v1", "VideoLLM-online 8B-v1+", "VideoLLM-MoD")
_PAPERS = {
    "coin_step": (0.598, 0.631, 0.634),
    "coin_task": (0.921, 0.927, 0.928),
    "coin_next": (0.481, 0.491, 0.497),
    "coin_procedure": (0.479, 0.498, 0.498),
    "coin_taskprocedure": (0.529, 0.541, 0.533),
}


class CoinLabel(Task):
    """
    A reply that names one label: the step, the next step, or the task.

    The label that is nearest to the reply by Levenshtein distance is the model's answer, and the alphabetically first
    of several. `accuracy` is the share of right answers, as in VideoLLM-online's code. `strict_accuracy` counts only
    replies that are the label itself, as the paper says.
    """

    official_note = "The published scorer agrees, but its dictionary has only the labels of the videos at hand."

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.papers = {model: {"accuracy": figure} for model, figure in zip(_MODELS, _PAPERS[name], strict=True)}

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the greedy reply, of at most 512 tokens."""
        return self.predict_all(runner, [row])[0]

    def predict_all(self, runner: Runner, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the greedy replies to a batch."""
        return [{"text": texts[0]} for texts in runner.answer_all(rows)]

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
        official: bool = False,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return `accuracy` and `strict_accuracy`."""
        labels = about["labels"][self.name]
        pairs = [(_clean(p["text"]), row["truth"]["label"].lower()) for row, p in zip(rows, predictions, strict=True)]
        right = [text == label or nearest_label(text, labels) == label for text, label in pairs]
        return {
            "accuracy": sum(right) / len(pairs),
            "strict_accuracy": sum(text == label for text, label in pairs) / len(pairs),
        }


def _clean(text: str) -> str:
    return text.lower().rstrip(".")
