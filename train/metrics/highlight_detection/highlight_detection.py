# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Highlight detection: whether the best-scored clip is a highlight, and the average precision of clip scores."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
`predictions`: for each query a score for each clip of the video. `references`: for each query the annotators' scores
of each clip, from 0 to 4. A clip is a highlight for an annotator who gives at least `least` (4, "very good", unless
given). Returns, between 0 and 1:

- `hit1`: share of queries whose best-scored clip is a highlight for an annotator;
- `hl_map`: average precision of the clip scores, averaged over annotators and queries. An annotator without a
  highlight counts 0, and one with highlights only counts 1.

Missing scores are 0, and scores after the last clip do not count. These are the rules of QVHighlights' evaluation.
"""
_CITATION = """Lei et al., QVHighlights: Detecting Moments and Highlights in Videos via Natural Language Queries,
arXiv 2107.09609."""


class HighlightDetection(evaluate.Metric):
    """Highlight detection: whether the best-scored clip is a highlight, and the average precision of clip scores."""

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": scores, "references": datasets.Sequence(scores)}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[list[float]]], least: float = 4.0
    ) -> dict[str, float]:
        hits, precisions = [], []
        for scores, rated in zip(predictions, references, strict=True):
            is_highlight = np.array(rated) >= least  # (clips, annotators)
            best = int(np.argmax(scores)) if scores else len(is_highlight)
            hits.append(best < len(is_highlight) and bool(is_highlight[best].any()))
            padded = np.zeros(len(is_highlight))
            padded[: len(scores)] = scores[: len(padded)]
            precisions.append([_average_precision(padded, column) for column in is_highlight.T])
        return {"hit1": float(np.mean(hits)), "hl_map": float(np.mean([np.mean(row) for row in precisions]))}


def _average_precision(scores: np.ndarray, is_right: np.ndarray) -> float:
    """
    Return the interpolated average precision of clips, averaged over the distinct recalls above 0.

    Clips with the same score are one step of the curve.
    """
    if is_right.all() or not is_right.any():
        return float(is_right.all())
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(is_right[order])
    is_step = np.append(np.diff(scores[order]) != 0, True)
    right, seen = right[is_step], np.arange(1, len(order) + 1)[is_step]
    interpolated = np.maximum.accumulate((right / seen)[::-1])[::-1]
    return float(interpolated[np.diff(right, prepend=0) > 0].mean())
