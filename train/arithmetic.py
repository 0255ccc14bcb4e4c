# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Small calculations that several measures share."""

from collections.abc import Sequence


def mean(values: Sequence[float], empty: float = 0.0) -> float:
    """Return the mean, or `empty` if there are no values."""
    return sum(values) / len(values) if values else empty


def correct_prefix(predicted: Sequence[int], true: Sequence[int]) -> int:
    """Return the number of tokens before the first wrong one."""
    wrong = [one != two for one, two in zip(predicted, true, strict=True)]
    return wrong.index(True) if True in wrong else len(wrong)
