# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Moments become spoken starts and ends, and spoken starts and ends become moments."""

import pytest

from videollm_mod.train.data.moments import QUESTIONS, ask_for_moment, spoken_windows, to_moment_replies


def times(windows, *, fps=2, **options):
    """Return the frame of each reply and whether it says "starts"."""
    replies = to_moment_replies("a dog", windows, fps=fps, **options)
    assert all(reply["content"].startswith('The video related to the query "a dog" ') for reply in replies)
    return [(round(reply["time"] * fps), reply["content"].endswith("starts.")) for reply in replies]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([(1.2, 3.0)], [(3, True), (6, False)]),
        ([(5, 6), (1, 2)], [(2, True), (4, False), (10, True), (12, False)]),
        # Windows that overlap or touch are one.
        ([(1, 2), (1.5, 4), (4, 5)], [(2, True), (10, False)]),
        # A window within a frame still ends after it starts, also at the end of the video.
        ([(1.1, 1.3)], [(3, True), (4, False)]),
        ([(9.9, 12.0)], [(19, True), (20, False)]),
        ([(-1.0, 0.2)], [(0, True), (1, False)]),
    ],
)
def test_replies_say_when_windows_start_and_end(windows, expected):
    assert times(windows, last=20) == expected


def test_replies_stay_within_the_frames_of_the_row():
    assert times([(0, 50)], first=4, last=9) == [(4, True), (9, False)]
    assert times([(0, 50)], first=4, last=4) == []


def test_frames_are_counted_not_summed():
    """0.1 * 3 is more than 0.3 in floats, and the frame is still the third."""
    assert times([(0.1 * 3, 0.7)], fps=10, last=100) == [(3, True), (7, False)]


def test_spoken_windows_are_the_ones_that_were_told():
    windows = [(1.0, 2.0), (5.0, 9.5)]
    replies = [(r["time"], r["content"], 0.5) for r in to_moment_replies("a dog", windows, fps=2, last=40)]
    assert spoken_windows(replies, 20.0) == [{"start": start, "end": end, "score": 0.5} for start, end in windows]


def test_unfinished_and_repeated_words_count_once():
    replies = [(1.0, "It ends.", 0.9), (2.0, "The dog starts.", 0.2), (3.0, "It starts!", 0.9), (4.0, "It ends", 0.9)]
    replies += [(5.0, "A dog starts to bark at the ends of the road.", 0.9), (6.0, "It starts.", 0.7)]
    assert spoken_windows(replies, 8.0) == [
        {"start": 6.0, "end": 8.0, "score": 0.7},
        {"start": 2.0, "end": 4.0, "score": 0.2},
    ]


def test_wording_of_a_question_depends_on_the_id():
    asked = [ask_for_moment("a {dog}", f"video/{index}") for index in range(40)]
    assert len(set(asked)) == len(QUESTIONS) and all('"a {dog}"' in question for question in asked)
    assert asked == [ask_for_moment("a {dog}", f"video/{index}") for index in range(40)]
