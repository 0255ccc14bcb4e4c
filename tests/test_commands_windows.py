# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Questions about each window of a video, answered without memory of earlier windows."""

import pytest
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.commands.windows import ASKED_ONLY, WindowedSession, check_window, to_question


def pairs(times):
    return list(zip(times, random_frames(len(times)), strict=True))


def windows_of(session, times, *, step=1):
    """Return the windows, pushing `step` frames at once, and the number of frames seen when each was yielded."""
    windows, seen, frames = [], [], pairs(times)
    for begin in range(0, len(times), step):
        for window in session.push(frames[begin : begin + step]):
            windows.append(window)
            seen.append(session.num_frames)
    windows += session.end()
    return windows, seen


def test_a_window_is_answered_as_if_nothing_came_before():
    model, processor = tiny_model(mod_layers="all"), tiny_processor()
    options = {"fps": 2.0, **ASKED_ONLY}
    questions = ["Do you see a ball?", "Is it red?"]
    times = [number / 2 for number in range(11)]
    session = WindowedSession(model.stream(processor, **options), 2.0, questions)
    windows, _ = windows_of(session, times, step=4)
    assert [(window.start, window.end) for window in windows] == [(0, 2), (2, 4), (4, 5.5)]
    remembering = model.stream(processor, **options)
    for number, window in enumerate(windows):
        frames = pairs(times)[4 * number : 4 * number + 4]
        fresh = model.stream(processor, **options)
        for each in (fresh, remembering):
            each.push([frame for _, frame in frames], time=[time for time, _ in frames])
        assert window.probabilities == pytest.approx([fresh.probe(question) for question in questions], abs=1e-6)
        # A session that remembers answers otherwise, so the equality above says something.
        if number:
            assert window.probabilities != pytest.approx([remembering.probe(q) for q in questions], abs=1e-6)
    assert session.num_frames == 11 and session.time == 5.0


def test_a_live_source_gets_its_answer_at_the_last_frame_of_a_window():
    model, processor = tiny_model(), tiny_processor()

    def windowed():
        return WindowedSession(model.stream(processor, fps=2.0, **ASKED_ONLY), 1.0, ["Is it dark?"])

    windows, seen = windows_of(windowed(), [0.0, 0.5, 1.0, 1.5])
    assert seen == [2, 4] and len(windows) == 2
    # With fewer frames a second, an earlier one is the last.
    slower = windowed()
    assert slower.frame_latency is None
    slower.fps = 1.0
    windows, seen = windows_of(slower, [0.0, 1.0, 2.0])
    assert seen == [1, 2, 3] and slower.frame_latency > 0
    # Frames that were dropped leave windows without their last frame, or without any.
    windows, seen = windows_of(windowed(), [0.0, 1.0, 4.2, 4.4])
    assert [(window.start, window.end) for window in windows] == [(0, 1), (1, 2), (4, 4.9)]
    # A time that is rounded down belongs to the window that begins.
    windows, _ = windows_of(windowed(), [0.0, 0.5, 1 - 1e-9, 1.5])
    assert [window.start for window in windows] == [0, 1]


def test_a_still_picture_is_encoded_once_for_all_windows():
    model, processor = tiny_model(), tiny_processor()
    session = WindowedSession(model.stream(processor, reuse_static=3.0, **ASKED_ONLY), 1.0, ["Is it dark?"])
    still = random_frames(1)[0]
    windows = [window for number in range(6) for window in session.push([(number / 2, still)])]
    assert len(windows) == 3 and session.session.num_reused == session.num_reused == 5


def test_questions_and_windows_that_make_no_sense():
    assert to_question(" a red car ") == "Do you see a red car? Answer yes or no."
    assert to_question("Is the door open?") == "Is the door open? Answer yes or no."
    with pytest.raises(ValueError, match="What to look for is empty"):
        to_question("  ")
    check_window("--window", 0.5, 2.0)
    with pytest.raises(ValueError, match="--every 0.4 is shorter than a frame: at --fps 2 choose at least 0.5"):
        check_window("--every", 0.4, 2.0)
    with pytest.raises(ValueError, match="--window"):
        check_window("--window", float("nan"), 2.0)
    session = tiny_model().stream(tiny_processor(), max_frames=10)
    with pytest.raises(ValueError, match="6 s at 2 fps are 12 frames, and the model remembers 10"):
        WindowedSession(session, 6.0, [])
