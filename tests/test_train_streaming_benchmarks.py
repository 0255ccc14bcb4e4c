# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""OVO-Bench and StreamingBench: their converters, on hand-made samples in the published layout, and their scores."""

import json

import pytest
from tiny import random_frames, write_clip

from videollm_mod.train.data.choices import read_options
from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.streaming_bench import mend_options, read_time
from videollm_mod.train.data.timed_messages import find_faults


def options(*texts):
    return list(texts)


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


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Source videos and one clip. The source video `Meta/7.mp4` has the name of a clip."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("Ego/clips/a", 8), ("Meta/7", 6), ("lonely", 6), ("chunked_videos/10_0", 2), ("s_real", 12)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(folder / f"{name}.mkv", random_frames(count), fps=2)
    return Videos(folder)


def convert(source, content, videos, tmp_path, name, *, strict=False, **fields):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    notes = Notes(strict=strict)
    rows = [row for split, row in find_converter(source)(**fields).convert(path, videos, notes) if split == "test"]
    assert not list(find_faults([{**row, "video": str(row["video"])} for row in rows], fps=fields.get("fps", 2.0)))
    return {row["id"]: row for row in rows}, notes


def found(counts):
    return {reason: reasons.count for reason, reasons in counts.get("test", {}).items()}


def test_ovo_bench_asks_after_the_clip(videos, tmp_path):
    rows, notes = convert("ovo_bench", OVO, videos, tmp_path, "ovo_bench_new.json")
    assert list(rows) == ["7", "8", "9_0", "9_1", "10_0", "11_0", "11_1"]
    first = rows["7"]
    assert (first["task"], first["start"], first["end"]) == ("ovo_bench_epm", 0.0, 1.5)
    asked, answered = first["messages"]
    assert asked["content"].split("\n")[:4] == [
        "Where is the cup?",
        "A. on a shelf",
        "B. in the sink",
        "C. (E) nowhere",
    ]
    assert (asked["time"], answered["time"], answered["content"]) == (1.5, 1.5, "B")
    assert first["truth"] == {"answer": "B", "options": ["on a shelf", "in the sink", "(E) nowhere"]}
    # 1.2 s is rounded up, and the letters that the options carry are not those of their places.
    assert rows["8"]["end"] == 1.5 and rows["8"]["truth"] == {"answer": "A", "options": ["Ann", "Bea"]}
    names = {name: row["video"].split("videos0/")[1] for name, row in rows.items()}
    assert (
        names["7"] == "Ego/clips/a.mkv" and names["8"] == "Meta/7.mkv" and names["10_0"] == "chunked_videos/10_0.mkv"
    )
    assert [rows[name]["messages"][1]["content"] for name in ("9_0", "9_1", "10_0", "11_0", "11_1")] == [
        "0", "2", "Yes", "No", "Yes"
    ]  # fmt: skip
    assert "jumping" in rows["9_0"]["messages"][0]["content"] and rows["9_1"]["end"] == 2.5
    assert "boil water. Is" in rows["10_0"]["messages"][0]["content"]
    assert found(notes.mended_by) == {
        "letters out of order: removed": 1,
        "after the end of the video: the clip ends with it": 1,
    }
    assert found(notes.left_out) == {
        "there is no time": 1,
        "there is no text": 1,
        "is none of the twelve tasks": 1,
        "there is no id": 2,
        "there is no video file": 1,
        "are no texts, or `gt` is not the place of one": 2,
        "there is no test point": 1,
        "there is no count or type": 1,
    }


def test_ovo_bench_with_options(videos, tmp_path):
    rows, _ = convert("ovo_bench", OVO, videos, tmp_path, "a.json", task="epm,ssr", context=1.0, fps=4.0)
    assert {name: (row["start"], row["end"]) for name, row in rows.items()} == {"7": (1.0, 1.75), "10_0": (0.0, 0.75)}
    with pytest.raises(FaultyRowError, match=r"id 8, options: letters out of order"):
        convert("ovo_bench", OVO, videos, tmp_path, "a.json", strict=True)
    with pytest.raises(ValueError, match="is no list"):
        convert("ovo_bench", {"a": 1}, videos, tmp_path, "a.json")
    with pytest.raises(ValueError, match="--context must not be negative"):
        find_converter("ovo_bench")(context=-1.0)


def asked(text, stamp, answer="B", **more):
    question = {"task_type": "Counting", "question": text, "time_stamp": stamp, "required_ability": "working memory"}
    return {**question, "answer": answer, "options": ["A. one", "B. two", "C. three", "D. four"], **more}


def entry(*questions, video="./videos/s_real.mp4"):
    return {"time": "[0:00:00 - 0:00:10]", "questions": list(questions), "video_path": video}


def test_streaming_bench_shows_the_minute_before_a_question(videos, tmp_path):
    content = [
        entry(asked("How many?", "00:00:04"), asked("And now?", "0:05", options=["one", "two", "three", "four"])),
        entry(asked("How many?", "00:12450"), asked("How many?", None), asked(None, "00:00:01"), 4),
        entry(asked("Too far?", "00:00:03", options=["A. a", "B. b", "and c", "C. c", "", "D. d", "E. .", "F. f"])),
        entry(asked("Which?", "00:00:03", answer="E"), asked("Which?", "00:00:03", options=["A. a"])),
        entry(asked("Where?", "00:00:01"), video="./videos/gone.mp4"), {"questions": None}, "nothing",
    ]  # fmt: skip
    rows, notes = convert("streaming_bench", content, videos, tmp_path, "questions_real.json", context=2.0)
    assert {name: (row["start"], row["end"]) for name, row in rows.items()} == {
        "real/0/0": (2.0, 3.5),
        "real/0/1": (3.0, 4.5),
        "real/2/0": (1.0, 2.5),
    }
    assert rows["real/0/1"]["truth"] == {"answer": "B", "options": ["one", "two", "three", "four"], "type": "Counting"}
    assert rows["real/0/1"]["messages"][0]["content"].startswith("And now?\nA. one\nB. two"), "no other questions"
    assert rows["real/2/0"]["truth"]["options"] == ["a", "b, and c", "c", "d"]
    assert found(notes.mended_by) == {"in more than four pieces: joined, or cut after the fourth": 1}
    assert found(notes.left_out) == {
        "after the end of the video": 1,
        "there is no time": 1,
        "there is no text": 1,
        "is no question": 1,
        "are no texts, or `answer` is not one of their letters": 2,
        "there is no video file": 1,
        "there is no question": 2,
    }


def test_sequential_questions_know_the_earlier_answers(videos, tmp_path):
    content = [[entry(asked("Who serves?", "00:00:01")), entry(asked("How many?", "00:00:05", "D"))]]
    rows, _ = convert("streaming_bench", content, videos, tmp_path, "questions_sqa.json", context=0.0)
    assert list(rows) == ["sqa/0/0", "sqa/0/1"] and rows["sqa/0/1"]["start"] == 0.0
    text = rows["sqa/0/1"]["messages"][0]["content"]
    assert "At 1 s: Who serves? Answer: two" in text and text.index("Who serves") < text.index("How many?")
    assert "Answer:" not in rows["sqa/0/0"]["messages"][0]["content"]


def test_proactive_questions_stand_first_and_the_output_at_its_moment(videos, tmp_path):
    def proactive(stamp, moment, output="3"):
        about = {"ground_truth_time_stamp": moment, "ground_truth_output": output}
        return {
            "task_type": "Proactive Output",
            "question": 'At three points, output "3".',
            "time_stamp": stamp,
            **about,
        }

    content = [entry(proactive("00:00:01", "00:00:03"), proactive("00:00:03", "00:00:01"), proactive("0", "1", None))]
    rows, notes = convert("streaming_bench", content, videos, tmp_path, "questions_proactive_50.json")
    (row,) = rows.values()
    assert (row["start"], row["end"]) == (1.0, 5.5), "four seconds after the moment, or the end of the video"
    assert [(m["role"], m["content"], m["time"]) for m in row["messages"]] == [
        ("user", 'At three points, output "3".', 1.0),
        ("assistant", "3", 3.0),
    ]
    assert row["truth"] == {"time": 3.0, "output": "3", "asked": 1.0}
    assert found(notes.left_out) == {"there is no time after the question": 1, "there is no text": 1}


def test_files_of_streaming_bench_are_found_by_name(videos, tmp_path):
    (tmp_path / "src" / "data").mkdir(parents=True)
    for task in ("real", "sqa"):
        (tmp_path / "src" / "data" / f"questions_{task}.json").write_text(json.dumps([entry(asked("?", "00:00:01"))]))
    converter = find_converter("streaming_bench")
    rows = [row["task"] for _, row in converter().convert(tmp_path, videos, Notes())]
    assert rows == ["streaming_bench_real", "streaming_bench_sqa"]
    with pytest.raises(FileNotFoundError, match="has no questions_omni.json"):
        list(converter(task="real,omni").convert(tmp_path, videos, Notes()))
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(ValueError, match="--task must say which of real, omni"):
        list(converter().convert(tmp_path / "mine.json", videos, Notes()))


def test_times_and_options():
    assert [read_time(text) for text in ("00:03:10", "1:02:03", "00:24", 5)] == [190, 3723, 24, 5]
    assert [read_time(text) for text in ("a:1", "-1:00", "1:2:3:4", None, [], True)] == [None] * 6
    assert read_options(["(A) red", "(B) blue"]) == ["red", "blue"] and read_options(["A. red", "blue"])[0] == "A. red"
    assert [read_options(value) for value in (["one"], "ab", [1, 2], ["a", ""], ["A. ", "B. "])] == [None] * 4 + [
        ["A.", "B."]
    ]
    assert mend_options(["A. a", "B. b", "C. c"]) is None and mend_options(None) is None
