# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Hand-made annotations in the layouts of OVO-Bench and StreamingBench. No row is published.

[`write_streaming_downloads`] writes folders as the downloads have them, for the pages.
"""

import json


OVO = [
    {"id": 7, "task": "EPM", "video": "Ego/clips/a.mp4", "realtime": 2, "question": "Where is the cup?",
     "answer": "there", "options": ["on a shelf", "in the sink", "(E) nowhere"], "gt": 1},
    {"id": 8, "task": "OCR", "video": "Meta/7.mp4", "realtime": 1.2, "question": "Which name?", "answer": "Ann",
     "options": ["A. Ann", "C. Bea"], "gt": "0"},
    {"id": 9, "task": "REC", "video": "lonely.mp4", "activity": "jumping", "start_times": [0], "end_times": [1],
     "test_info": [{"realtime": 1, "count": 0}, {"realtime": 9.0, "count": 2}, {"realtime": None, "count": 1}]},
    {"id": 10, "task": "SSR", "video": "Ego/clips/a.mp4", "tutorial": "Tea", "all_steps": [], "start_time": [],
     "end_time": [], "test_info": [{"realtime": 1, "step": "boil water.", "type": 1}, {"realtime": 2, "step": None}]},
    {"id": 11, "task": "CRR", "video": "Ego/clips/a.mp4", "question": "What does she open?", "answer": "A box.",
     "ask_time": 1, "clue_time": 2, "test_info": [{"realtime": 1, "type": 0}, {"realtime": 2, "type": "1"}, 3]},
    {"id": 12, "task": "XYZ", "video": "a.mp4"}, {"task": "EPM"}, None,
    {"id": 13, "task": "ACR", "video": None, "realtime": 1, "question": "?", "options": ["a", "b"], "gt": 0},
    {"id": 14, "task": "ACR", "video": "a.mp4", "realtime": 1, "question": "?", "options": ["a", "b"], "gt": 2},
    {"id": 15, "task": "HLD", "video": "a.mp4", "realtime": 1, "question": " ", "options": ["a", 3], "gt": 0},
    {"id": 16, "task": "CRR", "video": "a.mp4", "question": "?", "test_info": []},
]  # fmt: skip


def asked(text, stamp, answer="B", **more):
    question = {"task_type": "Counting", "question": text, "time_stamp": stamp, "required_ability": "working memory"}
    return {**question, "answer": answer, "options": ["A. one", "B. two", "C. three", "D. four"], **more}


def entry(*questions, video="./videos/s_real.mp4"):
    return {"time": "[0:00:00 - 0:00:10]", "questions": list(questions), "video_path": video}


def proactive(stamp, moment, output="3"):
    """A question of StreamingBench that an output at a later moment answers."""
    about = {"ground_truth_time_stamp": moment, "ground_truth_output": output}
    return {"task_type": "Proactive Output", "question": 'At three points, output "3".', "time_stamp": stamp, **about}


def write_streaming_downloads(folder, video):
    """Write the folders of both and `ProactiveVideoQA`, with a video of at least 10 s under the names they use."""
    ovo, streaming = folder / "OVO-Bench" / "data", folder / "StreamingBench" / "src" / "data"
    options = {"options": ["red", "blue"], "gt": 0, "answer": "red"}
    items = [
        {"id": 0, "task": "EPM", "video": "Ego4D/a.mp4", "realtime": 2, "question": "Which color?", **options},
        {"id": 1, "task": "REC", "video": "Ego4D/a.mp4", "activity": "jumping", "start_times": [0], "end_times": [1],
         "test_info": [{"realtime": 1, "count": 0}, {"realtime": 2.0, "count": 1}]},
    ]  # fmt: skip
    contents = {
        ovo / "ovo_bench_new.json": items,
        streaming / "questions_real.json": [entry(asked("How many?", "00:00:02"))],
        streaming / "questions_omni.json": [entry(asked("Who speaks?", "00:00:02"))],
        streaming / "questions_sqa.json": [[entry(asked("Who?", "00:00:01")), entry(asked("Where?", "00:00:02"))]],
        streaming / "questions_proactive.json": [entry(proactive("00:00:01", "00:00:03"))],
    }
    conversation = [{"role": "user", "content": "What does she do?", "time": 0}]
    answers = [{"content": "She waves.", "reply_timespan": [1, 3], "related_timespan": [1, 2]}]
    web = {"video": "a.mp4", "question_id": "1", "duration": 13.0, "conversation": conversation, "answer": answers}
    contents[folder / "ProactiveVideoQA" / "WEB" / "anno.json"] = [web]
    names = (ovo / "chunked_videos" / "0.mp4", ovo / "src_videos" / "Ego4D" / "a.mp4", streaming / "videos/s_real.mp4")
    for path in (*names, folder / "ProactiveVideoQA" / "WEB" / "videos" / "a.mp4"):
        path.parent.mkdir(parents=True)
        path.symlink_to(video)
    for path, content in contents.items():
        path.write_text(json.dumps(content))
