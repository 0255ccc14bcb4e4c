# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""TimeDiff: seconds between the frame at which the model would speak and the one at which it should."""

import datasets
import evaluate

from videollm_mod.train.arithmetic import mean


_DESCRIPTION = """
LIVE's TimeDiff. `predictions`: for each dialogue the frame differences of its turns that have stream positions, which
are the learned decisions at frames. The difference is the number of stream positions after the first at which the
model speaks. If the model speaks at none of them, it is minus the number of further frames until it speaks. `fps` is
the frame rate. Returns `time_diff` in seconds: the mean absolute difference over turns, averaged over dialogues, over
`fps`. A dialogue without any counts 0.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class TimeDiff(evaluate.Metric):
    """TimeDiff: seconds between the frame at which the model would speak and the one at which it should."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions: list[list[int]], fps: float = 2.0) -> dict[str, float]:
        dialogues = [mean([abs(frames) for frames in turns], 0.0) for turns in predictions]
        return {"time_diff": mean(dialogues, 0.0) / fps}
