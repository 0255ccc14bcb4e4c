# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ego4D's natural language queries: windows that a model marks while it watches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from videollm_mod.outputs import write_text
from videollm_mod.train.data.moments import spoken_windows, window_iou
from videollm_mod.train.tasks.replies import Streamed


SUBMISSION = "ego4d_nlq_submission.json"
# How a submission names a query.
_NAMES = ("clip_uid", "annotation_uid", "query_idx")
_RANKS, _THRESHOLDS = (1, 5), (0.3, 0.5)


class Ego4DNlq(Streamed):
    """
    Windows from spoken replies that end in "starts" and "ends", best first by how sure the model was to speak.

    `r1_0.3` is the share of queries whose best window has an IoU of at least 0.3 with a true one, and `r5_0.3` that of
    queries with such a window among the best five. `miou` is the mean IoU of the best window. A query without a window
    scores 0.
    """

    official_note = (
        "The published scorer asks for an IoU above the threshold, and counts each annotated window by itself; the "
        "default merges windows of a query that overlap, and takes the nearest."
    )
    scored_keys = ("windows", "clip")

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return recalls at 1 and 5 and the mean IoU. Rows without windows, as in the test split, have none."""
        overlaps: list[list[float]] = []
        for row, prediction in zip(rows, predictions, strict=True):
            windows = _windows(row, prediction)
            true = [dict(zip(("start", "end"), window, strict=True)) for window in _true_windows(row, official)]
            table = [[window_iou(window, one) for one in true] for window in windows]
            if official:
                overlaps += [[line[k] for line in table] for k in range(len(true))]
            elif true:
                overlaps.append([max(line) for line in table])
        if not overlaps:
            return {}
        count = len(overlaps)
        scores = {
            f"r{rank}_{least}": sum(any(_passes(iou, least, official) for iou in ious[:rank]) for ious in overlaps)
            / count
            for rank in _RANKS
            for least in _THRESHOLDS
        }
        # The published code sorts for a mean of three, but along the axis of the one true window: the first is left.
        return {**scores, "miou": sum(ious[0] for ious in overlaps if ious) / count}

    def write_files(
        self,
        folder: Path,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
    ) -> list[Path]:
        """
        Write the submission of all rows: the five best windows of each query, in seconds of its clip.

        The published scorer fails on a query without a window. Such a query gets one without length, which scores 0.
        """
        results = []
        for row, prediction in zip(rows, predictions, strict=True):
            begin = row["truth"]["clip"][0]
            best = _windows(row, prediction)[: max(_RANKS)]
            times = [[window["start"] - begin, window["end"] - begin] for window in best] or [[0.0, 0.0]]
            asked = [{name: place[name] for name in _NAMES} for place in row["truth"].get("places", ())]
            results += [{**names, "predicted_times": times} for names in asked]
        if not results:
            return []  # rows that were prepared before they had places
        submission = {"version": "1.0", "challenge": "ego4d_nlq_challenge", "results": results}
        write_text(folder / SUBMISSION, json.dumps(submission) + "\n")
        return [folder / SUBMISSION]


def _windows(row: dict[str, Any], prediction: dict[str, Any]) -> list[dict[str, float]]:
    said = [(reply["time"], reply["text"], reply["score"]) for reply in prediction["replies"]]
    return spoken_windows(said, row["truth"]["clip"][1])


def _true_windows(row: dict[str, Any], official: bool) -> list[list[float]]:
    """Return the windows of a query, or, for the published scorer, those that annotators gave, before merging."""
    given = [place["window"] for place in row["truth"].get("places", ()) if place.get("window")] if official else []
    return given or row["truth"]["windows"]  # rows that were prepared before have merged windows only


def _passes(iou: float, least: float, official: bool) -> bool:
    return iou > least if official else iou >= least - 1e-9
