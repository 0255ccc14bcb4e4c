# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Base classes of tasks whose prediction is a greedy reply, or what the model says in a stream."""

from collections.abc import Sequence
from typing import Any, ClassVar

from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.running import Runner


class GreedyReply(Task):
    """Base class of tasks whose prediction is a greedy reply."""

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a row."""
        return self.predict_all(runner, [row])[0]

    def predict_all(self, runner: Runner, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the replies to a batch."""
        return [{"text": texts[0]} for texts in runner.answer_all(rows)]


class Streamed(Task):
    """Base class of tasks whose prediction is what the model says in free streaming."""

    streams = True
    no_reply: ClassVar[dict[str, Any] | None] = {"replies": []}

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the replies of a row."""
        return self.predict_all(runner, [row])[0]

    def predict_all(self, runner: Runner, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return `replies`: `time` in seconds, `text`, and `score`, the probability with which the model spoke.

        The stream gets the system prompt and what the user says. The true replies must not tell when to speak.
        """
        asked = [{**row, "messages": [m for m in row["messages"] if m["role"] != "assistant"]} for row in rows]
        return [
            {"replies": [_reply(e) for e in events if e.role == "assistant"]} for events in runner.stream_all(asked)
        ]


def _reply(event: Any) -> dict[str, Any]:
    return {"time": event.time, "text": event.text, "score": 1 - (event.interval_probability or 0.0)}
