# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Share of questions answered right, word for word."""

import datasets
import evaluate


_DESCRIPTION = """
`predictions`: the model's answers, empty if there was none. `references`: the right answers. Returns
`answer_accuracy`, the share that agree, ignoring case, spaces and a final full stop.
"""
_CITATION = """"""


class AnswerAccuracy(evaluate.Metric):
    """Share of questions answered right, word for word."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right = [_words(one) == _words(two) for one, two in zip(predictions, references, strict=True)]
        return {"answer_accuracy": sum(right) / len(right)}


def _words(text: str) -> list[str]:
    return text.lower().rstrip(". ").split()
