# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Find the label that a free text means, and score replies that name one label."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from videollm_mod.train.tasks.replies import GreedyReply


def read_labels(about: dict[str, Any], name: str) -> list[str]:
    """
    Return a label dictionary of prepared data.

    Raises:
        `ValueError`: If there is none.
    """
    labels = about.get("labels", {}).get(name)
    if not labels:
        raise ValueError(f"about.json has no label dictionary {name!r}: prepare the data with prepare.py.")
    return labels


class LabelFinder:
    """
    Finds the nearest of many labels by Levenshtein distance, and remembers what it found.

    Args:
        labels (sequence of `str`): At least one label.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = sorted(set(labels))
        self._found = {label: label for label in self.labels}

    def find(self, text: str) -> str:
        """
        Return the nearest label, and the first in order of characters of several.

        Args:
            text (`str`): The text. Letter case counts.
        """
        if text not in self._found:
            distances = cdist([text], self.labels, scorer=Levenshtein.distance, dtype=np.int32)[0]
            self._found[text] = self.labels[int(distances.argmin())]
        return self._found[text]


def clean_reply(text: str) -> str:
    """Return a reply as VideoLLM-online's code compares it: in small letters, without full stops at the end."""
    return text.lower().rstrip(".")


class LabelTask(GreedyReply):
    """
    A reply that names one label, given as `label` in the row's `truth`.

    The label that is nearest to the reply by Levenshtein distance is the model's answer, and the alphabetically first
    of several. `accuracy` is the share of right answers. `strict_accuracy` counts only replies that are the label.
    Rows without a truth, such as those of a test split, have predictions and no score.
    """

    def check(self, about: dict[str, Any]) -> None:
        """Check that there is a label dictionary."""
        read_labels(about, self.name)

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
        official: bool = False,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return `accuracy` and `strict_accuracy`."""
        finder = LabelFinder(read_labels(about, self.name))
        pairs = [
            (clean_reply(prediction["text"]), row["truth"]["label"].lower())
            for row, prediction in zip(rows, predictions, strict=True)
            if (row.get("truth") or {}).get("label") is not None
        ]
        if not pairs:
            return {}
        return {
            "accuracy": sum(label in (text, finder.find(text)) for text, label in pairs) / len(pairs),
            "strict_accuracy": sum(text == label for text, label in pairs) / len(pairs),
        }
