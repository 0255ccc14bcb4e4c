# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dense captions and moments of a model that streams: what it said and when, against events and windows."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from videollm_mod.outputs import write_text
from videollm_mod.train.data.moments import spoken_windows
from videollm_mod.train.tasks.replies import Streamed
from videollm_mod.train.teacher_forcing import evaluate_metric


# Seconds of a clip in QVHighlights.
_CLIP = 2.0


class DenseCaptionTask(Streamed):
    """
    Captions of events (ActivityNet Captions, YouCook2), by the metric `dense_captions`.

    A reply has one time, and an event has two. If captions are said at the end of events, an event begins at the reply
    before, and the first at 0. If they are said at the start, an event ends at the next reply, and the last at the end
    of the video. Events that overlap cannot be told in this form, so that recall of ActivityNet Captions has a limit.
    """

    official_note = (
        "scores that end in _stem do not compare with published figures, which use METEOR 1.5 in Java: "
        "score the written file with densevid_eval for them."
    )
    scored_keys = ("timestamps", "sentences", "duration", "say_at")

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the scores of the metric `dense_captions`."""
        return evaluate_metric("dense_captions").compute(
            predictions=[to_events(p["replies"], row["truth"]) for row, p in zip(rows, predictions, strict=True)],
            references=[
                [_true_events(one) for one in (row["truth"], *row["truth"].get("references", ()))] for row in rows
            ],
            official=official,
        )

    def write_files(
        self,
        folder: Path,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
    ) -> list[Path]:
        """
        Write the captions in the form that densevid_eval and SODA read.

        Both stop at a video with an empty list, so a video without captions is not in the file. Then densevid_eval
        counts it as 0, and SODA leaves it out.
        """
        results = {
            row["id"]: [
                {"sentence": event["text"], "timestamp": [event["start"], event["end"]]}
                for event in to_events(p["replies"], row["truth"])
            ]
            for row, p in zip(rows, predictions, strict=True)
            if p["replies"]
        }
        path = folder / f"{self.name}.json"
        external = {"used": False, "details": ""}
        write_text(path, json.dumps({"version": "VERSION 1.0", "results": results, "external_data": external}) + "\n")
        return [path]


def to_events(replies: Sequence[dict[str, Any]], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return the events that replies tell. See [`DenseCaptionTask`].

    Args:
        replies (sequence of `dict`): `time` in seconds and `text`, in order of time.
        truth (`dict`): The row's `say_at`, "end" or "start", and `duration` in seconds.

    Returns:
        `list[dict]`: `start` and `end` in seconds, and `text`.
    """
    times = [reply["time"] for reply in replies]
    says_start = truth["say_at"] == "start"
    limits = [*times, max([truth["duration"], *times])] if says_start else [0.0, *times]
    return [
        {"start": start, "end": end, "text": reply["text"]}
        for reply, (start, end) in zip(replies, pairwise(limits), strict=True)
    ]


def _true_events(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"start": start, "end": end, "text": text}
        for (start, end), text in zip(truth["timestamps"], truth["sentences"], strict=True)
    ]


class MomentTask(Streamed):
    """
    Windows of a query (Charades-STA, QVHighlights), by the metrics `moment_retrieval` and `highlight_detection`.

    A window opens at a reply that ends in "starts" and closes at one that ends in "ends". The probability with which
    the model spoke when it opened a window ranks the windows. A clip of two seconds has the score of the window that
    holds its middle, or 0. There is one interval threshold for all rows, and no threshold is chosen on test rows.
    """

    official_note = (
        "The published scorer stops at a query without a window: the written file gives it one without length, which "
        "scores 0."
    )
    scored_keys = ("query", "vid", "windows", "duration")

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return the scores of `moment_retrieval`, and those of `highlight_detection` if rows have scores of clips."""
        windows = [_windows(row, p) for row, p in zip(rows, predictions, strict=True)]
        true = [[{"start": start, "end": end} for start, end in row["truth"]["windows"]] for row in rows]
        scores = evaluate_metric("moment_retrieval").compute(predictions=windows, references=true)
        rated = [index for index, row in enumerate(rows) if "saliency" in row["truth"]]
        if rated:
            scores |= evaluate_metric("highlight_detection").compute(
                predictions=[_clip_scores(rows[index], windows[index]) for index in rated],
                references=[_true_clip_scores(rows[index]) for index in rated],
            )
        return scores

    def write_files(
        self,
        folder: Path,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
    ) -> list[Path]:
        """
        Write the windows in the form that QVHighlights' evaluation reads.

        It stops at a query without a window, which gets one without length, and at scores of clips if the annotations
        have none, as those of Charades-STA.
        """
        lines = []
        are_rated = any("saliency" in row["truth"] for row in rows)
        for row, prediction in zip(rows, predictions, strict=True):
            windows = _windows(row, prediction)
            found = [[window["start"], window["end"], window["score"]] for window in windows] or [[0.0, 0.0, 0.0]]
            qid = row["truth"].get("qid")
            line = {"qid": _as_number(row["id"]) if qid is None else qid}
            line |= {"query": row["truth"]["query"], "vid": row["truth"]["vid"]}
            line |= {"pred_relevant_windows": found}
            line |= {"pred_saliency_scores": _clip_scores(row, windows)} if are_rated else {}
            lines.append(json.dumps(line) + "\n")
        path = folder / f"{self.name}.jsonl"
        write_text(path, "".join(lines))
        return [path]


def _as_number(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


def _windows(row: dict[str, Any], prediction: dict[str, Any]) -> list[dict[str, float]]:
    replies = [(reply["time"], reply["text"], reply["score"]) for reply in prediction["replies"]]
    return spoken_windows(replies, row["truth"]["duration"])


def _num_clips(row: dict[str, Any]) -> int:
    return int(row["truth"]["duration"] / _CLIP)


def _clip_scores(row: dict[str, Any], windows: list[dict[str, float]]) -> list[float]:
    middles = [(index + 0.5) * _CLIP for index in range(_num_clips(row))]
    return [
        max((window["score"] for window in windows if window["start"] <= middle < window["end"]), default=0.0)
        for middle in middles
    ]


def _true_clip_scores(row: dict[str, Any]) -> list[list[float]]:
    """Return the annotators' scores of each clip. Clips that they did not see have 0."""
    clips, scores = row["truth"]["saliency"]["clips"], row["truth"]["saliency"]["scores"]
    true = [[0.0] * len(scores[0]) if scores else [0.0] for _ in range(_num_clips(row))]
    for index, rated in zip(clips, scores, strict=True):
        if index < len(true):
            true[index] = rated
    return true
