# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""PAUC of streamed replies, on any rows of timed replies."""

from collections.abc import Sequence
from typing import Any

from videollm_mod.train.tasks.dense_captions import Streamed
from videollm_mod.train.teacher_forcing import evaluate_metric


class Proactive(Streamed):
    """
    How early and how well the model answers within the spans in which it should, by the metric `pauc`.

    The spans of a row are `truth["spans"]`, each with `question`, `content`, `start` and `end`. Other rows get their
    spans from their replies: each lasts until the next reply, or until the end of the clip, and its question is what
    the user said last. The judge is that of `--judge`.

    Figures in papers are by language models as judges, on ProactiveVideoQA (arXiv 2507.09313) with spans of its own:
    they do not compare with those here.
    """

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row has a span."""
        return bool(find_spans(row))

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return the scores of the metric `pauc`, with its defaults of 5 grades and omega 0.5."""
        replies = [[{"time": r["time"], "text": r["text"]} for r in predicted["replies"]] for predicted in predictions]
        return evaluate_metric("pauc").compute(
            predictions=replies, references=[find_spans(row) for row in rows], judge=self.judge
        )


def find_spans(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the spans of a row. Replies without time after them have none."""
    given = (row.get("truth") or {}).get("spans")
    if given:
        return [{name: span[name] for name in ("question", "content", "start", "end")} for span in given]
    messages = row["messages"]
    replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    ends = [messages[k]["time"] for k in replies[1:]]
    last = row.get("end")
    ends.append(messages[replies[-1]]["time"] if last is None else last) if replies else None
    spans = []
    for k, end in zip(replies, ends, strict=True):
        asked = [message["content"] for message in messages[:k] if message["role"] == "user"]
        span = {"question": asked[-1] if asked else "", "content": messages[k]["content"]}
        if end > messages[k]["time"]:
            spans.append({**span, "start": float(messages[k]["time"]), "end": float(end)})
    return spans
