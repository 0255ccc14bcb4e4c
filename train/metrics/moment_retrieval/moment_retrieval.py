# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Moment retrieval: recall at one, mean IoU and mean average precision of windows in time."""

from typing import Any

import datasets
import evaluate
import numpy as np

from videollm_mod.train.data.moments import window_iou


_DESCRIPTION = """
`predictions`: for each query the windows that were found, `{"start": seconds, "end": seconds, "score": number}`, in
any order. `references`: its true windows, `{"start", "end"}`, at least one. Returns, between 0 and 1:

- `r1_0.3`, `r1_0.5` and `r1_0.7`: share of queries whose best-scored window has at least that IoU with a true window;
- `miou`: mean IoU of the best-scored window with the nearest true window;
- `map_0.5`, `map_0.75` and `map`: mean over queries of the average precision at an IoU of 0.5, of 0.75, and averaged
  over 0.5, 0.55, ..., 0.95. Precision is interpolated, a true window counts once, and the ten best-scored windows
  count.

A query without a predicted window scores 0. These are the rules of QVHighlights' evaluation, which stops at such a
query. With one true window a query, `r1` and `miou` are those of Charades-STA.
"""
_CITATION = """Lei et al., QVHighlights: Detecting Moments and Highlights in Videos via Natural Language Queries,
arXiv 2107.09609. Gao et al., TALL: Temporal Activity Localization via Language Query, arXiv 1705.02101."""
THRESHOLDS = [round(0.5 + 0.05 * step, 2) for step in range(10)]
MOST_WINDOWS = 10
_WINDOW = {"start": datasets.Value("float64"), "end": datasets.Value("float64")}


class MomentRetrieval(evaluate.Metric):
    """Moment retrieval: recall at one, mean IoU and mean average precision of windows in time."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {"predictions": [{**_WINDOW, "score": datasets.Value("float64")}], "references": [_WINDOW]}
            ),
        )

    def _compute(
        self, predictions: list[list[dict[str, Any]]], references: list[list[dict[str, Any]]]
    ) -> dict[str, float]:
        overlaps = []
        for found, true in zip(predictions, references, strict=True):
            if not true:
                raise ValueError("A query of `references` has no window.")
            ranked = sorted(found, key=lambda window: -window["score"])[:MOST_WINDOWS]
            table = [[window_iou(one, two) for two in true] for one in ranked]
            overlaps.append(np.array(table).reshape(-1, len(true)))
        best = np.array([table[0].max() if len(table) else 0.0 for table in overlaps])
        precision = np.array([[_average_precision(table, at) for at in THRESHOLDS] for table in overlaps])
        by_threshold = dict(zip(THRESHOLDS, precision.mean(0), strict=True))
        return {
            **{f"r1_{at}": float(np.mean(best >= at - 1e-9)) for at in (0.3, 0.5, 0.7)},
            "miou": float(best.mean()),
            **{f"map_{at}": float(by_threshold[at]) for at in (0.5, 0.75)},
            "map": float(np.mean(list(by_threshold.values()))),
        }


def _average_precision(overlaps: np.ndarray, threshold: float) -> float:
    """Return the interpolated average precision of ranked windows by their IoU (windows, true windows)."""
    free, is_right = set(range(overlaps.shape[1])), []
    for row in overlaps:
        near = [index for index in free if row[index] >= threshold - 1e-9]
        is_right.append(bool(near))
        if near:
            free.remove(max(near, key=lambda index: row[index]))
    right = np.cumsum(is_right)
    precision = right / np.arange(1, len(is_right) + 1)
    # The precision at a recall is the best at this recall or a higher one.
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]
    return float(interpolated[np.array(is_right, dtype=bool)].sum() / overlaps.shape[1])
