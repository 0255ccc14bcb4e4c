# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""TimeDiff: seconds between the frame at which the model would speak and the one at which it should."""

import datasets
import evaluate


_DESCRIPTION = """
LIVE's TimeDiff. For each turn, `speaks`: whether the model would speak at each frame before the reply; `is_decided`:
whether the reply comes at the last of them (an answer to a question comes after it); `late`: by how many frames it
speaks late if at none of these, 0 for a dialogue's last turn. `fps`: frames a second. Returns `time_diff`, the mean
over turns in seconds.
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
                # The reply is at the last frame, or, an answer, at the one after, whose decision is the user's.
                frames.append(len(turn) - int(decided) - turn.index(True))
            else:
                frames.append(lateness)
        return {"time_diff": sum(frames) / len(frames) / fps}
