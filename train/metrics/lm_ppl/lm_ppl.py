# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""LM-PPL: perplexity per turn, averaged over turns."""

import math

import datasets
import evaluate


_DESCRIPTION = """
LIVE's LM-PPL. `predictions`: for each turn the cross-entropies of its learned text tokens under teacher forcing.
Returns `lm_ppl`, the mean over turns of `exp(mean cross-entropy of the turn)`.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class LmPpl(evaluate.Metric):
    """LM-PPL: perplexity per turn, averaged over turns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        turns = [math.exp(sum(losses) / len(losses)) for losses in predictions]
        return {"lm_ppl": sum(turns) / len(turns)}
