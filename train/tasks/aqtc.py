# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""AQTC: the steps that a model would give, ranked by likelihood among the candidates (arXiv 2203.04203)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from videollm_mod.outputs import write_text
from videollm_mod.train.data.aqtc import take_step
from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.running import Runner


class Guidance(Task):
    """
    Rank the candidates of each step by their log-likelihood a token as the assistant's reply.

    The earlier steps in the dialogue are the model's own choices, as in the published baseline. Measures that end in
    "_true_history" have the right steps there. A step counts once, whatever its question. Candidates with equal scores
    have the worst of their ranks.

    - `recall@1`, `recall@3`: share of steps with the right candidate first, or among the first three;
    - `mean_rank`: mean rank of the right candidate, from 1;
    - `mrr`: what is published as mean reciprocal rank: the number of candidates over the rank, which may exceed 1;
    - `reciprocal_rank`: mean of 1 over the rank.
    """

    papers: ClassVar[dict[str, dict[str, float]]] = {
        # The README of showlab/Q2A has other figures of the baseline than the winner of 2022 gives.
        "Q2A, test of 2022, its README": {"recall@1": 0.218, "recall@3": 0.623, "mean_rank": 3.6, "mrr": 2.7},
        "Q2A, test of 2022, by its winner": {
            "recall@1": 0.302,
            "recall@3": 0.624,
            "mean_rank": 3.2,
            "mrr": 3.2,
        },
        "winner of 2022, its test": {"recall@1": 0.452, "recall@3": 0.754, "mean_rank": 2.6, "mrr": 3.87},
    }
    truth_keys = ("steps",)
    official_note = "The published scorer gives the last of candidates with equal scores the best rank."
    scored_keys = ("question", "folder", "steps")

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return `scores`, of each candidate of each step, and `true_history`, the same after the right steps."""
        steps = row["truth"]["steps"]
        replies = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        history = list(row["messages"][: replies[0]] if replies else row["messages"])
        scores: list[list[float]] = []
        true_scores: list[list[float]] = []
        true_history: list[dict[str, Any]] | None = list(history)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            given = {"role": "assistant", "content": step["candidates"][0], "time": row["end"]}
            scores.append(_rank(runner, row, [*history, given], step))
            if step["correct"] is None:
                true_history = None
            if true_history is not None:
                is_same = true_history == history
                true_scores.append(scores[-1] if is_same else _rank(runner, row, [*true_history, given], step))
                true_history += take_step(step["candidates"][step["correct"]], following, row["end"])
            chosen = int(np.argmax(scores[-1]))
            history += take_step(step["candidates"][chosen], following, row["end"])
        return {"scores": scores, "true_history": true_scores if true_history is not None else None}

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the measures of steps with a published answer. There are none if no answer is published."""
        own = list(_ranks(rows, [prediction["scores"] for prediction in predictions], official))
        true = list(_ranks(rows, [prediction["true_history"] for prediction in predictions], official))
        return {
            **rank_measures(own),
            **{f"{name}_true_history": value for name, value in rank_measures(true).items()},
        }

    def write_files(
        self,
        folder: Path,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
    ) -> list[Path]:
        """Write the scores in the form that the published scorers read."""
        submission: dict[str, list[dict[str, Any]]] = {}
        for row, prediction in zip(rows, predictions, strict=True):
            entry = {"question": row["truth"]["question"], "scores": prediction["scores"]}
            submission.setdefault(row["truth"]["folder"], []).append(entry)
        path = folder / f"{self.name}.json"
        write_text(path, json.dumps(submission, ensure_ascii=False) + "\n")
        return [path]


def _rank(runner: Runner, row: dict[str, Any], messages: list[dict[str, Any]], step: dict[str, Any]) -> list[float]:
    return runner.likelihoods({**row, "messages": messages}, step["candidates"], per_token=True)


def _ranks(rows: Sequence[dict[str, Any]], scores: Sequence[Any], official: bool) -> Iterator[tuple[int, int]]:
    """Yield the rank of the right candidate, from 1, and the number of candidates of each step with an answer."""
    for row, of_row in zip(rows, scores, strict=True):
        for step, of_step in zip(row["truth"]["steps"], of_row or (), strict=False):
            if (right := step["correct"]) is None:
                continue
            better = [score > of_step[right] for score in of_step]
            equal = [score == of_step[right] for score in of_step]
            ahead = sum(equal[right + 1 :]) if official else sum(equal) - 1
            yield 1 + sum(better) + ahead, len(of_step)


def rank_measures(ranks: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return the measures of [`Guidance`] of ranks, each with the number of candidates."""
    if not ranks:
        return {}
    return {
        "recall@1": sum(rank == 1 for rank, _ in ranks) / len(ranks),
        "recall@3": sum(rank <= 3 for rank, _ in ranks) / len(ranks),
        "mean_rank": sum(rank for rank, _ in ranks) / len(ranks),
        "mrr": sum(count / rank for rank, count in ranks) / len(ranks),
        "reciprocal_rank": sum(1 / rank for rank, _ in ranks) / len(ranks),
    }
