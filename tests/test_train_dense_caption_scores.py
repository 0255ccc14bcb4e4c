# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dense captions: figures computed by hand."""

import pytest

from videollm_mod.train.teacher_forcing import evaluate_metric


# METEOR of a caption of two words that is said word for word: one chunk of two matches.
SAME = 1 - 0.5 * (1 / 2) ** 3


def captions(*events):
    return [dict(zip(("start", "end", "text"), event, strict=True)) for event in events]


def test_dense_captions_by_hand():
    """Two annotators and a caption too many; half of an event; and a video without predictions."""
    predictions = [
        captions((50, 60, "it ends"), (21, 30, "blue moon"), (0, 10, "a cat")),
        captions((0, 4, "red car")),
        [],
    ]
    references = [
        [captions((0, 10, "a cat"), (20, 30, "green sun")), captions((0, 10, "a cat"))],
        [captions((0, 8, "red car"))],
        [captions((0, 5, "a tree"))],
    ]
    metric = evaluate_metric("dense_captions")
    scores = metric.compute(predictions=predictions, references=references)
    # The second caption has an IoU of 0.9, and the one of the second video 0.5: not above 0.9 and 0.5.
    precision = [(2 / 3 + 1) / 3, (2 / 3) / 3, (2 / 3) / 3, (1 / 3) / 3]
    recall = [2 / 3, 1 / 3, 1 / 3, 1 / 3]  # the second annotator's only caption is found
    for at, p, r in zip((0.3, 0.5, 0.7, 0.9), precision, recall, strict=True):
        assert (scores[f"precision_{at}"], scores[f"recall_{at}"]) == pytest.approx((p, r))
    p, r = sum(precision) / 4, sum(recall) / 4
    assert (scores["precision"], scores["recall"]) == pytest.approx((p, r))
    assert scores["f1"] == pytest.approx(2 * p * r / (p + r))
    # First video: two pairs are the same words, one pair differs, and one caption is alone.
    first = 2 * SAME / 4
    assert scores["meteor_stem"] == pytest.approx((first + (SAME + SAME + 0 + 0) / 4) / 3)
    # METEOR 1.5 has one score for the sums of a video: of weights of 4.5 that were said, and 4.25 true ones with the
    # made-up word, 2 match, as four words in two chunks. The second video is right at two of four t.
    together = 1 / (0.15 / (2 / 4.5) + 0.85 / (2 / 4.25)) * (1 - 0.6 * (2 / 4) ** 0.2)
    assert scores["meteor_1.5_stem"] == pytest.approx((together + 2 / 4 + 0) / 3)
    # The 1- and 2-grams agree, and there are no longer ones: 10 * 2/4.
    assert scores["cider"] == pytest.approx((2 * 5 / 4 + (5 + 5 + 0 + 0) / 4) / 3)
    # The second annotator's caption and three predicted ones; and half of an event in the second video.
    assert scores["soda_c_stem"] == pytest.approx((2 * SAME / (3 + 1) + 0.5 * SAME) / 3)
    official = metric.compute(predictions=predictions, references=references, official=True)
    # One pair in a corpus of one has no weight, and SODA does not count the video without predictions.
    assert official["cider"] == pytest.approx((2 * 5 / 4) / 3)
    assert official["soda_c_stem"] == pytest.approx((2 * SAME / (3 + 1) + 0.5 * SAME) / 2)
    assert official["meteor_stem"] == scores["meteor_stem"] and official["f1"] == scores["f1"]


def test_soda_keeps_the_order_of_time():
    """Two captions that overlap both events, in the wrong order: only one of them counts."""
    metric = evaluate_metric("dense_captions")
    true = [[captions((0, 10, "a cat"), (1, 11, "red sun"))]]
    scores = metric.compute(predictions=[captions((0, 10, "red sun"), (1, 11, "a cat"))], references=true)
    assert scores["soda_c_stem"] == pytest.approx(2 * SAME * (9 / 11) / 4)
    # Starts, not places in the list, give the order.
    scores = metric.compute(predictions=[captions((1, 11, "red sun"), (0, 10, "a cat"))], references=true)
    assert scores["soda_c_stem"] == pytest.approx(SAME)


def test_official_soda_swaps_the_captions():
    """METEOR weighs recall more, so that a word too many costs less than a missing one."""
    metric = evaluate_metric("dense_captions")
    given = {"predictions": [captions((0, 1, "a cat sat"))], "references": [[captions((0, 1, "a cat"))]]}
    more, missing = (p * r / (0.9 * p + 0.1 * r) * SAME for p, r in ((2 / 3, 1), (1, 2 / 3)))
    assert metric.compute(**given)["soda_c_stem"] == pytest.approx(more)
    assert metric.compute(**given, official=True)["soda_c_stem"] == pytest.approx(missing)
    assert metric.compute(**given, official=True)["meteor_stem"] == pytest.approx(more)


def test_video_without_truth_is_an_error():
    with pytest.raises(ValueError, match="has no caption"):
        evaluate_metric("dense_captions").compute(predictions=[[]], references=[[[]]])
