# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Vript-HAL's measure of hallucination: how many things and actions of a description are in the true ones."""

import datasets
import evaluate

from videollm_mod.train.arithmetic import mean
from videollm_mod.train.content_words import content_words
from videollm_mod.train.judging import cosine


_DESCRIPTION = """
The score of Vript-HAL (arXiv 2406.06040; `HallucinationScorer` in `vript-hard/verification_pipeline/bench_utils.py` of
mutonix/Vript). `predictions`: a description of each video. `references`: its true descriptions.

The words of a description are its verbs, nouns and proper nouns by spaCy's `en_core_web_lg`, in their base form and
without stop words, each once. Those of all true descriptions count together. A word is found if the embeddings of
`all-mpnet-base-v2` of it and of some word of the other side have a cosine above 0.5.

Returns `precision`, the share of the description's words that are found among the true ones; `recall`, the share of
the true words that are found in the description; and `f1`, 2 P R / (P + R). Each is a mean over videos. A
description without such words has 0.

Option: `rule`. "both" (default) is as above. "published" is that code's recall: the number of the description's words
that are found over the number of true words, which may pass 1.
"""
_CITATION = """"""
_NEAR = 0.5


class DescribedWords(evaluate.Metric):
    """Vript-HAL's measure of hallucination: how many things and actions of a description are in the true ones."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": [text]}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], rule: str = "both") -> dict[str, float]:
        if rule not in ("both", "published"):
            raise ValueError(f'`rule` is "both" or "published", got {rule!r}.')
        scores = [_score(said, true, rule) for said, true in zip(predictions, references, strict=True)]
        return {name: mean([score[name] for score in scores]) for name in ("precision", "recall", "f1")}


def _score(description: str, references: list[str], rule: str) -> dict[str, float]:
    said, true = content_words([description]), content_words(references)
    pairs = [(one, other) for one in said for other in true]
    near = [pair for pair, value in zip(pairs, cosine(pairs), strict=True) if value > _NEAR]
    found_said, found_true = {one for one, _ in near}, {other for _, other in near}
    precision = len(found_said) / max(len(said), 1)
    recall = len(found_said if rule == "published" else found_true) / max(len(true), 1)
    f1 = 2 * precision * recall / (precision + recall) if near else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
