# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""LM-Correctness: how far into a reply the model agrees."""

import datasets
import evaluate


_DESCRIPTION = """
LIVE's LM-Correctness. `predictions` and `references`: for each turn the most likely and the true tokens of its reply
under teacher forcing. Returns `lm_correctness`, the mean over turns of the length of the prefix that agrees over the
length of the reply.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class LmCorrectness(evaluate.Metric):
    """LM-Correctness: how far into a reply the model agrees."""

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
