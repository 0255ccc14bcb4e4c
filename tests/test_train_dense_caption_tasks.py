# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tasks of captions and moments: what a stream said becomes events and windows, and is scored."""

import json

import pytest
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.train.data.moments import ask_for_moment, to_moment_replies
from videollm_mod.train.tasks import choose_tasks, find_task
from videollm_mod.train.tasks.dense_captions import to_events
from videollm_mod.train.tasks.running import Runner


def replies(*said):
    return {"replies": [dict(zip(("time", "text", "score"), reply, strict=True)) for reply in said]}


def captions(*events, say_at="end", references=()):
    return {
        "duration": 10.0,
        "timestamps": [list(event[:2]) for event in events],
        "sentences": [event[2] for event in events],
        "references": list(references),
        "say_at": say_at,
    }


def test_an_event_begins_at_the_reply_before_or_ends_at_the_next():
    said = [{"time": 2.0, "text": "One."}, {"time": 5.0, "text": "Two."}]
    assert [tuple(event.values()) for event in to_events(said, {"say_at": "end", "duration": 10.0})] == [
        (0.0, 2.0, "One."),
        (2.0, 5.0, "Two."),
    ]
    assert [tuple(event.values()) for event in to_events(said, {"say_at": "start", "duration": 10.0})] == [
        (2.0, 5.0, "One."),
        (5.0, 10.0, "Two."),
    ]
    assert to_events([], {"say_at": "end", "duration": 10.0}) == []
    assert to_events([], {"say_at": "start", "duration": 10.0}) == []


@pytest.mark.parametrize("name", ["activitynet_captions", "youcook2_captions"])
def test_captions_told_as_the_data_tell_them_score_best(name, tmp_path):
    second = {"timestamps": [[6.0, 9.0]], "sentences": ["Another."]}
    truth = captions((0.0, 2.0, "A dog runs fast."), (2.0, 5.0, "It jumps over it."), references=[second])
    row = {"id": "v_a", "truth": truth}
    told = replies((2.0, "A dog runs fast.", 0.9), (5.0, "It jumps over it.", 0.9))
    task = find_task(name)
    scores = task.score([row], [told], {})
    assert (scores["precision"], scores["recall"], scores["cider"]) == (1.0, 1.0, pytest.approx(10.0))
    assert scores["soda_c_stem"] == pytest.approx(1 - 0.5 / 4**3)
    silent = task.score([row, row], [told, replies()], {}, official=True)
    assert silent["recall"] == 0.5 and silent["soda_c_stem"] == scores["soda_c_stem"]
    # The published scorers stop at a video with an empty list.
    (path,) = task.write_files(tmp_path, [row, {**row, "id": "v_b"}], [told, replies()], {})
    assert json.loads(path.read_text())["results"] == {
        "v_a": [
            {"sentence": "A dog runs fast.", "timestamp": [0.0, 2.0]},
            {"sentence": "It jumps over it.", "timestamp": [2.0, 5.0]},
        ]
    }


def test_windows_are_ranked_by_how_sure_the_model_was(tmp_path):
    truth = {"query": "A dog.", "vid": "a_0.0_10.0", "windows": [[0.0, 4.0]], "duration": 10.0}
    truth["saliency"] = {"clips": [0, 1, 9], "scores": [[4, 1], [2, 3], [4, 4]]}
    row = {"id": "12", "truth": truth}
    said = replies((0.0, "It starts.", 0.6), (4.0, "It ends.", 0.9), (6.0, "It starts.", 0.8))
    task = find_task("qvhighlights_moments")
    scores = task.score([row], [said], {})
    # The open window ends with the video, and is ranked first: it misses, and half of the precision is left.
    assert (scores["r1_0.3"], scores["map"], scores["miou"]) == (0.0, pytest.approx(0.5), 0.0)
    # The best clip is the fourth, no highlight. The first annotator's only highlight shares the third place.
    assert scores["hit1"] == 0.0 and scores["hl_map"] == pytest.approx((1 / 4 + 0) / 2)
    (path,) = task.write_files(tmp_path, [row], [said], {})
    assert json.loads(path.read_text()) == {
        "qid": 12,
        "query": "A dog.",
        "vid": "a_0.0_10.0",
        "pred_relevant_windows": [[6.0, 10.0, 0.8], [0.0, 4.0, 0.6]],
        "pred_saliency_scores": [0.6, 0.6, 0.0, 0.8, 0.8],
    }


def test_published_scorers_can_read_a_query_without_a_window(tmp_path):
    """QVHighlights' evaluation takes the first window of each query, and scores of clips only with true ones."""
    truth = {"query": "A dog.", "vid": "a", "windows": [[0.0, 4.0]], "duration": 4.0}
    rated = {**truth, "saliency": {"clips": [0], "scores": [[4]]}}
    rows = [{"id": "1", "truth": rated}, {"id": "2", "truth": truth}]
    task = find_task("qvhighlights_moments")
    for given, scores in ((rows, [0.0, 0.0]), (rows[1:], None)):
        (path,) = task.write_files(tmp_path, given, [replies()] * len(given), {})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["pred_relevant_windows"] for line in lines] == [[[0.0, 0.0, 0.0]]] * len(given)
        assert [line.get("pred_saliency_scores") for line in lines] == [scores] * len(given)
    assert task.score(rows, [replies()] * 2, {}, official=True)["map"] == 0.0


def test_rows_without_scores_of_clips_have_no_highlights():
    truth = {"query": "A dog.", "vid": "a", "windows": [[1.0, 3.0]], "duration": 10.0}
    said = replies((1.0, 'The video related to the query "A dog" starts.', 0.5), (3.0, "... ends.", 0.5))
    scores = find_task("charades_sta_moments").score([{"id": "a/0", "truth": truth}], [said], {})
    assert scores["r1_0.7"] == scores["miou"] == scores["map"] == 1.0 and "hit1" not in scores


def test_a_model_streams_rows_and_is_not_told_that_a_window_starts_at_once():
    """The question stands before the frames: only the model decides to speak at the first frame."""
    messages = [{"role": "user", "content": ask_for_moment("a dog", "a/0")}]
    messages += to_moment_replies("a dog", [(0.0, 2.0)], fps=2, last=9)
    row = {"id": "a/0", "task": "charades_sta_moments", "video": random_frames(10), "messages": messages}
    (task,) = choose_tasks("charades_sta", {"source": "charades_sta", "tasks": ["charades_sta_moments"]}, "test")
    runner = Runner(tiny_model(), tiny_processor(), interval_threshold=1.0, stream_options={"max_new_tokens": 3})
    spoken = task.predict(runner, row)["replies"]
    assert [reply["time"] for reply in spoken] == [index / 2 for index in range(10)]
    # An answer that the model had to give would have a score of 1.
    assert all(0 < reply["score"] < 1 for reply in spoken) and json.loads(json.dumps(spoken)) == spoken
