# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Narration: LIVE's measures on the true history, and measures of narrations on the model's own history."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from videollm_mod.train.judging import check_judge
from videollm_mod.train.meteor import find_program
from videollm_mod.train.streaming_evaluation import spoken_unasked, unasked_replies
from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.teacher_forcing import Turn, evaluate_metric, score_turns


_LIVE = ("lm_ppl", "time_diff", "fluency", "lm_correctness")
# Tasks of which the rows of a video are passes of several annotators over it.
_HAVE_PASSES = ("ego4d_narration", "ego4d_refined", "ego_exo4d_atomic")
# Ego4D: VideoLLM-online (arXiv 2406.11816) and VideoLLM-MoD (arXiv 2408.16730). Ego-Exo4D: LION-FS, on models of 8B.
_PAPERS = {
    "ego4d_narration": {
        "VideoLLM-online 7B-v1": (2.43, 2.32, 0.426, 0.423),
        "VideoLLM-online 8B-v1+": (2.40, 2.05, 0.453, 0.490),
        "VideoLLM-MoD": (2.41, 2.04, 0.452, 0.489),
    },
    "ego_exo4d_atomic": {
        "no routing, by LION-FS": (2.25, 0.67, 0.381, 0.480),
        "interleaved, by LION-FS": (2.16, 0.74, 0.365, 0.470),
    },
}


class Narration(Task):
    """
    Narrations of a stream, with the replies of the row as truth.

    On the true history: LIVE's `lm_ppl`, `time_diff`, `fluency` and `lm_correctness`, and the two variants of
    [`score_turns`]. On the model's own history: `event_precision`, `event_recall`, `event_f1` and `event_delay` of the
    metric `stream_events`; FlowNar's `temporal_*` and text scores of `narration_segments`; and the rates and text
    scores of `dialogue_matching`, with the judge's similarity, or that of words if the judge is a language model. Such
    a judge also grades each dialogue, by the metric `dialogue_judge`.

    With `--official`, LIVE's measures have no interval threshold and look at the beginning of long dialogues only, and
    FlowNar's words are split at spaces, as in their code. What the model says in the stream does not depend on it.

    A reply that answers the user at once is left out of the latter, because the user chose its time. For FlowNar's
    measures, annotators of the same video share their narrations where the times of their rows overlap. These are the
    rows of `ego4d_narration`, `ego4d_refined` or `ego_exo4d_atomic` of that video.
    """

    official_note = (
        "LIVE's code has no interval threshold and cuts long dialogues, and FlowNar's splits words at spaces. "
        "ProAssist's has an encoder: --judge sentence."
    )
    streams = True
    predicts_officially = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        if missing := find_program():
            self.official_note = f"{type(self).official_note} {missing}"
        self.papers = {
            model: dict(zip(_LIVE, figures, strict=True)) for model, figures in _PAPERS.get(name, {}).items()
        }

    def check(self, about: dict[str, Any]) -> None:  # noqa: ARG002
        """Check that the similarity of texts can be computed, and that a language model as the judge replies."""
        check_judge(self.judge)

    @property
    def _similarity(self) -> str:
        return self.judge if isinstance(self.judge, str) else "token_f1"

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether a row belongs to this task. `narration` takes all rows."""
        return self.name in ("narration", row.get("task"))

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the turns on the true history, and what the model says in the stream."""
        return self.predict_all(runner, [row])[0]

    def predict_all(self, runner: Runner, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the predictions of several rows."""
        options = {"interval_threshold": 0.0, "official": True} if self.official else {}
        return [
            {
                "turns": [asdict(turn) for turn in runner.turns(row, **options)],
                "replies": [{"time": event.time, "text": event.text} for event in spoken_unasked(events)],
                "dialogue": [{"time": event.time, "role": event.role, "text": event.text} for event in events],
            }
            for row, events in zip(rows, runner.stream_all(rows), strict=True)
        ]

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
        official: bool = False,
    ) -> dict[str, float]:
        """Return all measures. Times are on the grid of `about["fps"]`."""
        fps = about["fps"]
        dialogues = [[Turn(**turn) for turn in prediction["turns"]] for prediction in predictions]
        told = [prediction["replies"] for prediction in predictions]
        true = [unasked_replies(row, fps=fps) for row in rows]
        starts = [row.get("start") or 0.0 for row in rows]
        passes = _passes(rows, true)
        scores = score_turns(dialogues, fps=fps)
        scores |= evaluate_metric("stream_events").compute(predictions=told, references=true)
        scores |= evaluate_metric("narration_segments").compute(
            predictions=told,
            references=passes,
            starts=starts,
            fps=fps,
            tokenize="spaces" if official else "words",
        )
        scores |= evaluate_metric("dialogue_matching").compute(
            predictions=told, references=true, similarity=self._similarity, fps=fps
        )
        if isinstance(self.judge, str):
            return scores
        if not all("dialogue" in prediction for prediction in predictions):
            raise ValueError("predictions of an earlier version have no dialogues to judge. Give another --out.")
        return scores | evaluate_metric("dialogue_judge").compute(
            predictions=[prediction["dialogue"] for prediction in predictions],
            references=[_dialogue(row) for row in rows],
            judge=self.judge,
        )


def _dialogue(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what user and assistant say in a row. A message without a time comes at its start."""
    start = row.get("start") or 0.0
    return [
        {"time": start if m.get("time") is None else float(m["time"]), "role": m["role"], "text": m["content"]}
        for m in row["messages"]
        if m["role"] != "system"
    ]


def _passes(rows: Sequence[dict[str, Any]], true: Sequence[list[dict[str, Any]]]) -> list[list[list[dict[str, Any]]]]:
    """Return the narrations of each row, then those of other annotators of its video that lie in it."""
    groups: dict[Any, list[int]] = {}
    names = [_annotated(row) or index for index, row in enumerate(rows)]
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    passes = []
    for index, row in enumerate(rows):
        start, end = row.get("start") or 0.0, math.inf if row.get("end") is None else row["end"]
        others = [other for other in groups[names[index]] if other != index]
        inside = [[told for told in true[other] if start <= told["time"] <= end] for other in others]
        passes.append([true[index], *inside])
    return passes


def _annotated(row: dict[str, Any]) -> tuple[str, str] | None:
    """Return task and file of a row that is one annotator's pass over a video, or `None` for other rows."""
    task, files = row.get("task"), [row.get(name) for name in ("video", "frame_features")]
    file = next((file for file in files if isinstance(file, str)), None)
    return None if file is None or task not in _HAVE_PASSES else (task, file)
