# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""TimeDiff: seconds between the frame at which the model would speak and the one at which it should."""

import datasets
import evaluate


_DESCRIPTION = """
LIVE's TimeDiff. Inputs for each turn: `speaks` says for each frame before the reply whether the model would speak.
`is_decided` says whether the reply comes at the last of these frames; an answer to a question comes after it. `late`
is the delay in frames if the model speaks at none of them, and 0 for the last turn of a dialogue. `fps` is the
frame rate. Returns `time_diff`, the mean over turns in seconds.
"""
_CITATION = """Chen et al., VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816"""


class TimeDiff(evaluate.Metric):
    """TimeDiff: seconds between the frame at which the model would speak and the one at which it should."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {
                    "speaks": datasets.Sequence(datasets.Value("bool")),
                    "is_decided": datasets.Value("bool"),
                    "late": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, speaks: list[list[bool]], is_decided: list[bool], late: list[int], fps: float = 2.0
    ) -> dict[str, float]:
        frames = []
        for turn, decided, lateness in zip(speaks, is_decided, late, strict=True):
            if True in turn:
                # A reply comes at the last frame. An answer comes one frame later, because the user decides its time.
                frames.append(len(turn) - int(decided) - turn.index(True))
            else:
                frames.append(lateness)
        return {"time_diff": sum(frames) / len(frames) / fps}
