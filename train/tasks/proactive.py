# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""PAUC of streamed replies, on any rows of timed replies."""

import math
from collections.abc import Sequence
from typing import Any

from videollm_mod.train.judging import check_judge
from videollm_mod.train.tasks.replies import Streamed
from videollm_mod.train.teacher_forcing import evaluate_metric


class Proactive(Streamed):
    """
    How early and how well the model answers within the spans in which it should, by the metric `pauc`.

    The spans of a row are `truth["spans"]`, each with `question`, `content`, `start` and `end`. Other rows get their
    spans from their replies: each lasts until just before the next reply, or until the end of the clip, and its
    question is what the user said last. The judge is that of `--judge`. With `--official`, the benchmark's rule and
    three grades apply.
    """

    official_note = "The published scorer grades all replies of a span together, in three grades."

    def check(self, about: dict[str, Any]) -> None:  # noqa: ARG002
        """Check that the judge replies."""
        check_judge(self.judge)

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row has a span."""
        return bool(find_spans(row))

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the scores of the metric `pauc`, with omega 0.5."""
        replies = [[{"time": r["time"], "text": r["text"]} for r in predicted["replies"]] for predicted in predictions]
        options = {"rule": "benchmark", "max_level": 2} if official else {"rule": "reward", "max_level": 4}
        return evaluate_metric("pauc").compute(
            predictions=replies, references=[find_spans(row) for row in rows], judge=self.judge, **options
        )


class ProactiveVideoQA(Proactive):
    """
    ProactiveVideoQA (arXiv 2507.09313). Published figures are by language models as judges.

    MMDuet2's are in arXiv 2512.06810. Compare with them by `--official --judge endpoint`, and by the same judge.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        figures = {"web": 0.533, "tv": 0.434, "vad": 0.289}
        figure = figures.get(name.rsplit("_", 1)[1])
        self.papers = {} if figure is None else {"MMDuet2": {"pauc_benchmark_endpoint": figure}}

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row belongs to this part."""
        return row.get("task") == self.name


def find_spans(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the spans of a row. Replies without time after them have none."""
    given = (row.get("truth") or {}).get("spans")
    if given:
        names = ("question", "content", "start", "end", "related_end")
        return [{name: span.get(name) for name in names} for span in given]
    messages = row["messages"]
    replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    # The metric counts a reply at the end of a span too, but the next reply belongs to the next span alone.
    ends = [math.nextafter(messages[k]["time"], -math.inf) for k in replies[1:]]
    last = row.get("end")
    if replies:
        ends.append(messages[replies[-1]]["time"] if last is None else last)
    spans = []
    for k, end in zip(replies, ends, strict=True):
        asked = [message["content"] for message in messages[:k] if message["role"] == "user"]
        span = {"question": asked[-1] if asked else "", "content": messages[k]["content"]}
        if end > messages[k]["time"]:
            spans.append({**span, "start": float(messages[k]["time"]), "end": float(end), "related_end": None})
    return spans
