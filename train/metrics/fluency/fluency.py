# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Fluency: share of a turn's learned tokens, silences and words, that are right in sequence."""

import datasets
import evaluate

from videollm_mod.train.arithmetic import correct_prefix, mean


_DESCRIPTION = """
LIVE's Fluency. Inputs for each turn of each dialogue: `predictions` and `references` are the most likely and the true
tokens at its text positions under teacher forcing; see `lm_ppl`. `num_stream_positions` is the number of its learned
decisions at frames, and `frame_diff` the frame difference; see `time_diff`. Returns `fluency`: the share of a turn's
stream and text positions that are right, averaged over the turns of a dialogue that have both, then over dialogues. A
dialogue without any counts 1. If the difference is 0, all stream positions and the correct prefix of the text are
right. If the model is early, all stream positions without the difference are. If it is late, all without the last are.
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
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
                    "num_stream_positions": datasets.Sequence(datasets.Value("int64")),
                    "frame_diff": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[list[int]]],
        references: list[list[list[int]]],
        num_stream_positions: list[list[int]],
        frame_diff: list[list[int]],
    ) -> dict[str, float]:
        dialogues = []
        for turns in zip(predictions, references, num_stream_positions, frame_diff, strict=True):
            shares = [_share(*turn) for turn in zip(*turns, strict=True) if turn[1] and turn[2]]
            dialogues.append(mean(shares, 1.0))
        return {"fluency": mean(dialogues, 1.0)}


def _share(predicted: list[int], true: list[int], num_stream: int, frame_diff: int) -> float:
    if frame_diff == 0:
        right = num_stream + correct_prefix(predicted, true)
    else:
        right = num_stream - (frame_diff if frame_diff > 0 else 1)
    return right / (num_stream + len(true))
