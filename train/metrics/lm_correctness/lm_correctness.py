# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""LM-Correctness: the share of a reply that the model predicts before its first error."""

import datasets
import evaluate


_DESCRIPTION = """
LIVE's LM-Correctness. `predictions` and `references` are the most likely and the true tokens of each reply under
teacher forcing. Returns `lm_correctness`: the number of correct tokens before the first error over the number of
tokens, averaged over replies.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class LmCorrectness(evaluate.Metric):
    """LM-Correctness: the share of a reply that the model predicts before its first error."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        shares = []
        for predicted, true in zip(predictions, references, strict=True):
            wrong = [one != two for one, two in zip(predicted, true, strict=True)]
            shares.append((wrong.index(True) if True in wrong else len(wrong)) / len(wrong))
        return {"lm_correctness": sum(shares) / len(shares)}
