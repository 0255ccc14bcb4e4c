# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""LM-PPL: perplexity of the text of a turn, averaged over turns, then over dialogues."""

import math

import datasets
import evaluate

from videollm_mod.train.arithmetic import mean


_DESCRIPTION = """
LIVE's LM-PPL. `predictions`: for each turn of each dialogue the cross-entropies at its text positions under teacher
forcing. These are the learned tokens of replies that are not predicted at a frame. Returns `lm_ppl`: `exp(mean
cross-entropy of the turn)`, averaged over the turns of a dialogue that have text positions, then over dialogues. A
dialogue without any counts 1.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class LmPpl(evaluate.Metric):
    """LM-PPL: perplexity of the text of a turn, averaged over turns, then over dialogues."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32")))}
            ),
        )

    def _compute(self, predictions: list[list[list[float]]]) -> dict[str, float]:
        dialogues = [
            mean([math.exp(sum(losses) / len(losses)) for losses in turns if losses], 1.0) for turns in predictions
        ]
        return {"lm_ppl": mean(dialogues, 1.0)}
