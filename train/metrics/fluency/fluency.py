# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fluency: share of a turn's learned tokens, silences and words, that are right in sequence."""

import datasets
import evaluate


_DESCRIPTION = """
LIVE's Fluency. `predictions` and `references` are the most likely and the true tokens of each reply under teacher
forcing. `speaks`, `is_decided` and `late` are those of `time_diff`. Returns `fluency`: the share of a turn's frames
and tokens that are right, averaged over turns. If the model speaks on time, all frames and the correct prefix of the
reply are right. If it is early, the frames before it speaks are right. If it is late, all frames except the last are.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class Fluency(evaluate.Metric):
    """Fluency: share of a turn's learned tokens, silences and words, that are right in sequence."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                    "speaks": datasets.Sequence(datasets.Value("bool")),
                    "is_decided": datasets.Value("bool"),
                    "late": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[int]],
        references: list[list[int]],
        speaks: list[list[bool]],
        is_decided: list[bool],
        late: list[int],
    ) -> dict[str, float]:
        del late  # `speaks` shows that the model is late. Fluency does not depend on the delay.
        shares = []
        for predicted, true, turn, decided in zip(predictions, references, speaks, is_decided, strict=True):
            # The token that opens a reply is both the last frame's decision and the first of the text.
            total = len(turn) + len(true) - int(decided)
            first = turn.index(True) if True in turn else None
            on_time = first == len(turn) - 1 if decided else first is None
            if on_time:
                wrong = [one != two for one, two in zip(predicted, true, strict=True)]
                prefix = wrong.index(True) if True in wrong else len(wrong)
                right = len(turn) - int(decided) + prefix
            else:
                right = len(turn) - 1 if first is None else first
            shares.append(right / total)
        return {"fluency": sum(shares) / len(shares)}
