# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""FlowNar's measures: narrations as segments of time, and the text of the nearest ones."""

from typing import Any

import datasets
import evaluate
import numpy as np

from videollm_mod.train.text_scores import available_scores, score_corpus, split_words


_DESCRIPTION = """
The measures of FlowNar (`evaluate_metrics.py` of zeyun-zhong/FlowNar). `predictions`: for each video a list of
`{"time": seconds, "text": words}`. `references`: for each video a list of such lists, one for each annotator.

A narration stands for the segment from the time before it to its own, the first from the start of the video. A
prediction is right if it overlaps any true segment of any annotator with an IoU of at least `iou`, and a true segment
is found if any prediction overlaps it so. Returns `temporal_precision`, `temporal_recall` and `temporal_f1`: means
over videos. Each true segment is paired with the prediction of largest generalized IoU; `meteor_1.5_stem`, `rouge_l`,
`cider` and `meteor_stem` are of these pairs of all videos (`score_corpus` of `videollm_mod.train.text_scores`). So are
`meteor_1.5`, which is FlowNar's METEOR, if pycocoevalcap and Java are installed, and `meteor_1.5_wordnet` and
`meteor_wordnet` if NLTK finds WordNet.

Options: `starts`, the first second of each video (0 by default); `fps`: 1 / `fps` is added to the predicted times,
because FlowNar's code says (frame + 1) / fps + start; and `iou` (0.5).

Differences from that code: words are in lower case and without punctuation unless `tokenize="spaces"`; a video without
predictions counts 0, and its true narrations are paired with an empty text, where that code fails. A video without
true narrations is left out, as there. A test compares the two on random narrations.
"""
_CITATION = """"""
_TOKENIZERS = {"words": split_words, "spaces": str.split}


class NarrationSegments(evaluate.Metric):
    """FlowNar's measures: narrations as segments of time, and the text of the nearest ones."""

    def _info(self) -> evaluate.MetricInfo:
        narration = {"time": datasets.Value("float64"), "text": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": [narration], "references": [[narration]]}),
        )

    def _compute(
        self,
        predictions: list[list[dict[str, Any]]],
        references: list[list[list[dict[str, Any]]]],
        starts: list[float] | None = None,
        fps: float | None = None,
        iou: float = 0.5,
        tokenize: str = "words",
    ) -> dict[str, float]:
        starts = [0.0] * len(predictions) if starts is None else starts
        delay = 0.0 if fps is None else 1 / fps
        timing, pairs = [], []
        for said, annotators, start in zip(predictions, references, starts, strict=True):
            told = _segments(said, start, delay)
            true = np.concatenate([np.empty((0, 2)), *(_segments(texts, start) for texts in annotators)])
            if not len(true):
                continue
            timing.append(_score(told, true, iou))
            nearest = [""] * len(true)
            if len(told):
                nearest = [said[index]["text"] for index in _overlaps(true, told)[1].argmax(1)]
            pairs += zip(nearest, (entry["text"] for texts in annotators for entry in texts), strict=True)
        names = ("temporal_precision", "temporal_recall", "temporal_f1")
        scores = dict(zip(names, np.mean(timing or [(0, 0, 0)], axis=0).tolist(), strict=True))
        texts = score_corpus(
            [text for text, _ in pairs],
            [[true] for _, true in pairs],
            tokenize=_TOKENIZERS[tokenize],
            names=available_scores(),
        )
        return scores | texts


def _segments(entries: list[dict[str, Any]], start: float, delay: float = 0.0) -> np.ndarray:
    """Return the segments of narrations in seconds, of shape `(narrations, 2)`."""
    times = np.array([start, *(entry["time"] + delay for entry in entries)])
    return np.sort(np.stack([times[:-1], times[1:]], axis=1), axis=1)


def _overlaps(true: np.ndarray, told: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU and the generalized IoU of segments, each of shape `(true, told)`."""
    begin, end = true[:, None, 0], true[:, None, 1]
    shared = np.maximum(0, np.minimum(end, told[:, 1]) - np.maximum(begin, told[:, 0]))
    union = (end - begin) + (told[:, 1] - told[:, 0]) - shared
    hull = np.maximum(end, told[:, 1]) - np.minimum(begin, told[:, 0])
    ious = shared / np.clip(union, 1e-8, None)
    return ious, ious - (hull - union) / np.clip(hull, 1e-8, None)


def _score(told: np.ndarray, true: np.ndarray, iou: float) -> tuple[float, float, float]:
    """Return precision, recall and F1 of one video."""
    if not len(told):
        return 0.0, 0.0, 0.0
    matches = _overlaps(true, told)[0] >= iou
    precision, recall = matches.any(0).mean(), matches.any(1).mean()
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)
