# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""LM-Correctness: the share of a reply that the model predicts before its first error."""

import datasets
import evaluate

from videollm_mod.train.arithmetic import correct_prefix, mean


_DESCRIPTION = """
LIVE's LM-Correctness. `predictions` and `references` are, for each turn of each dialogue, the most likely and the true
tokens at its text positions under teacher forcing; see `lm_ppl`. Returns `lm_correctness`: the number of correct
tokens before the first error over the number of tokens, averaged over the turns of a dialogue that have text
positions, then over dialogues. A dialogue without any counts 1.
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
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
                }
            ),
        )

    def _compute(self, predictions: list[list[list[int]]], references: list[list[list[int]]]) -> dict[str, float]:
        dialogues = [
            mean([correct_prefix(*turn) / len(turn[1]) for turn in zip(*turns, strict=True) if turn[1]], 1.0)
            for turns in zip(predictions, references, strict=True)
        ]
        return {"lm_correctness": mean(dialogues, 1.0)}
