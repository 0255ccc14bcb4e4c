# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Moment retrieval and highlight detection: figures computed by hand."""

import pytest

from videollm_mod.train.teacher_forcing import evaluate_metric


def windows(*times):
    return [dict(zip(("start", "end", "score"), window, strict=False)) for window in times]


def test_moment_retrieval_by_hand():
    """Two windows of which the second-best fits exactly, a window that overlaps by a third, and no window."""
    predictions = [windows((0, 9, 0.5), (20, 28, 0.9), (0, 10, 0.8)), windows((2, 6, 1.0)), []]
    references = [windows((0, 10), (20, 30)), windows((0, 4)), windows((1, 2))]
    scores = evaluate_metric("moment_retrieval").compute(predictions=predictions, references=references)
    # The first query's best window has an IoU of 0.8. Below that, its precision is 1, and above it half of the windows
    # are found at a precision of 1/2. The third window finds a true window that is taken.
    first = (7 * 1 + 3 * 0.25) / 10
    assert scores == pytest.approx(
        {
            "r1_0.3": 2 / 3,
            "r1_0.5": 1 / 3,
            "r1_0.7": 1 / 3,
            "miou": (0.8 + 1 / 3) / 3,
            "map_0.5": 1 / 3,
            "map_0.75": 1 / 3,
            "map": first / 3,
        }
    )


def test_moment_retrieval_counts_ten_windows():
    late = windows(*[(50, 51, 1.0)] * 10, (0, 10, 0.5))
    scores = evaluate_metric("moment_retrieval").compute(predictions=[late], references=[windows((0, 10))])
    assert scores["map"] == 0
    scores = evaluate_metric("moment_retrieval").compute(predictions=[late[1:]], references=[windows((0, 10))])
    assert scores["map"] == pytest.approx(0.1)


def test_query_without_truth_is_an_error():
    with pytest.raises(ValueError, match="has no window"):
        evaluate_metric("moment_retrieval").compute(predictions=[[]], references=[[]])


def test_highlight_detection_by_hand():
    """Two annotators who find other clips good, and a video with more clips than scores."""
    predictions = [[0.2, 0.9, 0.5], [1.0]]
    references = [[[4, 0], [0, 4], [1, 0]], [[0, 3], [4, 3]]]
    metric = evaluate_metric("highlight_detection")
    # The first annotator's highlight comes third, and the second's first. In the second video it comes second, and the
    # second annotator has none.
    precision = ((1 / 3 + 1) / 2 + (1 / 2 + 0) / 2) / 2
    scores = metric.compute(predictions=predictions, references=references)
    assert scores == pytest.approx({"hit1": 0.5, "hl_map": precision})
    # At least 3: the second annotator finds all clips of the second video good.
    scores = metric.compute(predictions=predictions, references=references, least=3)
    assert scores == pytest.approx({"hit1": 1.0, "hl_map": ((1 / 3 + 1) / 2 + (1 / 2 + 1) / 2) / 2})


def test_clips_with_equal_scores_are_one_step():
    """All clips have the same score, so that precision is the share of highlights, whatever their order."""
    for rated in ([[4], [0]], [[0], [4]]):
        scores = evaluate_metric("highlight_detection").compute(predictions=[[1.0, 1.0]], references=[rated])
        assert scores["hl_map"] == pytest.approx(0.5)
