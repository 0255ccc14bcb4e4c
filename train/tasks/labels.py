# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Find the label that a free text means."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist


def nearest_label(text: str, labels: Sequence[str]) -> str:
    """
    Return the label with the smallest Levenshtein distance to a text, and the first in order of characters of several.

    Args:
        text (`str`): The text. Letter case counts.
        labels (sequence of `str`): At least one label.
    """
    return LabelFinder.of(tuple(labels)).find(text)


class LabelFinder:
    """
    Finds the nearest of many labels, and remembers what it found.

    Args:
        labels (sequence of `str`): At least one label.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = sorted(set(labels))
        self.known = set(self.labels)
        self._found: dict[str, str] = {}

    @staticmethod
    @lru_cache(maxsize=8)
    def of(labels: tuple[str, ...]) -> "LabelFinder":
        """Return the finder of these labels. A few are kept."""
        return LabelFinder(labels)

    def find(self, text: str) -> str:
        """Return the nearest label. See [`nearest_label`]."""
        if text in self.known:
            return text
        if text not in self._found:
            distances = cdist([text], self.labels, scorer=Levenshtein.distance, dtype=np.int32)[0]
            self._found[text] = self.labels[int(distances.argmin())]
        return self._found[text]
