# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""OVO-Bench and StreamingBench: their converters, on hand-made samples in the published layout, and their scores."""

import json
import math
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from endpoints import scripted_endpoint
from programs import ROOT, run_main
from safetensors.torch import save_file
from streaming_annotations import OVO, asked, entry, proactive
from tiny import random_frames, tiny_model, tiny_processor, write_clip

from videollm_mod.train import evaluation
from videollm_mod.train.arguments import run
from videollm_mod.train.data.choices import read_options
from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.ovo_bench import GROUPS
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.streaming_bench import mend_options, read_time
from videollm_mod.train.data.timed_messages import NARRATE, find_faults
from videollm_mod.train.encoding import encode_clip
from videollm_mod.train.endpoint_judge import ASPECTS
from videollm_mod.train.tasks import find_task
from videollm_mod.train.tasks.choices import read_letter, read_number, read_yes
from videollm_mod.train.tasks.proactive import find_spans
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.tasks.streaming_bench import POLL


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
    names = {name: re.split(r"/videos\d+/", row["video"])[1] for name, row in rows.items()}
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


def test_streaming_bench_shows_the_minute_before_a_question(videos, tmp_path):
    content = [
        entry(asked("How many?", "00:00:04"), asked("And now?", "0:05", options=["one", "two", "three", "four"]),
              asked("At the end?", "0:06.4")),
        entry(asked("How many?", "00:12450"), asked("How many?", None), asked(None, "00:00:01"), 4),
        entry(asked("Too far?", "00:00:03", options=["A. a", "B. b", "and c", "C. c", "", "D. d", "E. .", "F. f"])),
        entry(asked("Which?", "00:00:03", answer="E"), asked("Which?", "00:00:03", options=["A. a"])),
        entry(asked("Where?", "00:00:01"), video="./videos/gone.mp4"), {"questions": None}, "nothing",
    ]  # fmt: skip
    rows, notes = convert("streaming_bench", content, videos, tmp_path, "questions_real.json", context=2.0)
    assert {name: (row["start"], row["end"]) for name, row in rows.items()} == {
        "real/0/0": (2.0, 3.5),
        "real/0/1": (3.0, 4.5),
        "real/0/2": (4.5, 5.5),
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
    assert mend_options([None, "B. b", "C. c", "D. d"]) is None


def test_an_answer_is_the_option_that_carries_its_letter(videos, tmp_path):
    lists = [
        ["A. a", "C. c", "B. b", "D. d"],
        ["A. a", "C. c", "B. b", "or d", "D. d"],
        ["A. a", "B. b", "B. c", "D. d"],
    ]
    content = [entry(asked("Who speaks?", "00:00:02", options=options)) for options in lists]
    rows, notes = convert("streaming_bench", content, videos, tmp_path, "questions_omni.json")
    truths = [row["truth"] for row in rows.values()]
    assert found(notes.mended_by) == {
        "in more than four pieces: joined, or cut after the fourth": 1,
        "letters out of order: sorted by them": 1,
    }
    assert [truth["options"][1] for truth in truths] == ["b", "b, or d", "b"]
    assert [len(truth["options"]) for truth in truths] == [4] * 3 and {truth["answer"] for truth in truths} == {"B"}
    # With a letter that is there twice, the place counts.
    assert truths[2]["options"] == ["a", "b", "c", "d"]


# -------------------------------------------------------------------------------------------------------------- scores


def test_replies_choose_options_numbers_and_yes_or_no():
    choices = ["a red car", "a blue car", "no car"]
    chosen = {
        "B": "B",
        "(C)": "C",
        "a.": "A",
        "The answer is B.": "B",
        "A red car.": "A",
        "A. a red car": "A",
        "A dog": None,
        "A because it waits": "A",
        "B shows it": "B",
        "I see that a blue car waits": "B",
        "A or B": None,
        "D": None,
        "": None,
        "There is no car": "C",
    }
    assert {reply: read_letter(reply, choices) for reply in chosen} == chosen
    makes = ["A Ford.", "A Jeep."]
    assert [read_letter(reply, makes) for reply in ("(B) A Jeep.", "B. A Ford.")] == ["B", None]
    assert read_letter("B", ["B", "A"]) == "B", "the letter was asked for, not the text"
    numbers = {"3": 3, "Three times.": 3, "1 of 2": None, "none": None, "10 times": 10}
    assert {reply: read_number(reply) for reply in numbers} == numbers
    assert [read_yes(reply) for reply in ("Yes.", "no, not yet", "Yes and no", "Noted", "eyes")] == [
        True, False, None, None, None
    ]  # fmt: skip


def scored(name, pairs, **options):
    rows = [{"task": task, "truth": truth} for task, truth, _ in pairs]
    return find_task(name).score(rows, [prediction for _, _, prediction in pairs], {}, **options)


def test_ovo_bench_scores_by_task_group_and_likelihood():
    def choice(task, answer, text, *likely):
        truth = {"answer": answer, "options": ["a red car", "a blue car"]}
        return f"ovo_bench_{task}", truth, {"text": text, "likelihoods": list(likely)}

    def reply(task, answer, text):
        return f"ovo_bench_{task}", {"answer": answer}, {"text": text}

    pairs = [
        choice("epm", "A", "A blue car", -1.0, -2.0),
        choice("epm", "B", "A blue car", -1.0, -2.0),
        choice("asi", "B", "B", -3.0, -1.0),
        choice("hld", "A", "(A)", -2.0, -1.0),
        choice("ocr", "A", "(A)", -1.0, -1.0),
        reply("rec", "12", "1 and then 2"),
        reply("rec", "2", "two"),
        reply("ssr", "No", "Not sure, Nobody"),
        reply("ssr", "Yes", "Y"),
    ]
    fixed = {
        "epm": 1 / 2,
        "asi": 1.0,
        "hld": 1.0,
        "backward": (1 / 2 + 1 + 1) / 3,
        "ocr": 1.0,
        "rec": 1 / 2,
        "ssr": 0.0,
    }
    assert scored("ovo_bench", pairs) == {**fixed, "backward_by_likelihood": (1 / 2 + 1 + 0) / 3}
    # "A" is in "A blue car", "B" is not. Digits are joined, "No" is in "Nobody", and a bare "Y" counts.
    assert scored("ovo_bench", pairs, official=True) == {**fixed, "ssr": 1.0}
    every = [choice(task, "A", "A", -1.0) for task in (*GROUPS["backward"], *GROUPS["realtime"])]
    every += [reply("rec", "1", "1"), reply("ssr", "Yes", "No"), reply("crr", "No", "No.")]
    scores = scored("ovo_bench", every)
    assert scores["forward"] == pytest.approx(2 / 3) and scores["realtime_by_likelihood"] == 1.0
    assert scores["total"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    (gemini, *_) = find_task("ovo_bench").papers.values()
    groups = [sum(gemini[task] for task in tasks) / len(tasks) for tasks in GROUPS.values()]
    assert groups == pytest.approx([gemini[group] for group in GROUPS], abs=1e-3), "figures copied right"


def test_streaming_bench_scores_options_by_type():
    truth = {"answer": "A", "options": ["one", "two"], "type": "Clips Summarize"}
    pairs = [
        ("", truth, {"text": "A man walks", "likelihoods": [-1.0, -2.0]}),
        ("", truth, {"text": "The answer is A", "likelihoods": [-2.0, -1.0]}),
        ("", {**truth, "type": "Counting"}, {"text": "", "likelihoods": [-1.0, -2.0]}),
    ]
    assert scored("streaming_bench_real", pairs) == pytest.approx(
        {"clips_summarize": 1 / 2, "counting": 0.0, "accuracy": 1 / 3, "accuracy_by_likelihood": 2 / 3}
    )
    assert scored("streaming_bench_real", pairs, official=True) == pytest.approx(
        {"clips_summarize": 1 / 2, "counting": 0.0, "accuracy": 1 / 3}
    )


def test_polled_and_native_outputs_are_scored_apart():
    truth = {"time": 9.0, "output": "Goal", "asked": 2.0}

    def polled(*polls, word=None, official=None):
        outputs = {name: text for name, text in (("word", word), ("official", official)) if text is not None}
        return "", truth, {"polls": [{"time": time, "text": text} for time, text in polls], "outputs": outputs}

    pairs = [
        polled((3.0, "no"), (7.0, "Yes."), word="A goal!", official="A goal!"),
        polled((5.0, "My eyes!"), (8.0, "yes"), word="goalkeeper", official="Goal"),
        polled((3.0, "no"), (13.0, "no")),
    ]
    expected = {"time_accuracy": 2 / 3, "accuracy": 1 / 3, "answered": 2 / 3}
    assert scored("streaming_bench_proactive", pairs) == expected
    # The first has "goal", not "Goal". In the second, "eyes" has "yes" four seconds early.
    expected = {"time_accuracy": 1 / 3, "accuracy": 0.0, "answered": 2 / 3}
    assert scored("streaming_bench_proactive", pairs, official=True) == expected
    native = [
        ("", truth, {"replies": [{"time": 11.0, "text": "Goal"}, {"time": 12.0, "text": "x"}]}),
        ("", truth, {"replies": [{"time": 3.0, "text": "Hm."}, {"time": 9.0, "text": "Goal"}]}),
    ]
    expected = {"time_accuracy": 1 / 2, "accuracy": 1 / 2, "answered": 1.0}
    assert scored("streaming_bench_proactive_native", native) == expected
    assert not find_task("streaming_bench_proactive_native").papers, "published figures are polled"


class Scripted:
    """A model whose stream answers polls with yes from a number of frames on."""

    def __init__(self, yes_from):
        self.yes_from, self.asked = yes_from, []

    def stream(self, _processor, **options):
        model = self

        class Session(SimpleNamespace):
            def push(self, _picture, time):
                self.num_frames += 1
                self.time = time

            def fork(self):
                return Session(**vars(self))

            def ask(self, text):
                model.asked.append((self.num_frames, text))
                is_poll = "Is it now time" in text
                said = ("yes" if self.num_frames >= model.yes_from else "no") if is_poll else "3"
                return [SimpleNamespace(role="user", text=text), SimpleNamespace(role="assistant", text=said)]

        assert not options["speak"](None)
        return Session(num_frames=0, num_waiting=0, time=None, fps=options["fps"])


def test_polls_see_the_clip_up_to_their_moment_and_no_other_poll(videos, tmp_path):
    content = [entry(proactive("00:00:01", "00:00:03"))]
    rows, _ = convert("streaming_bench", content, videos, tmp_path, "questions_proactive.json")
    (row,) = rows.values()
    task = find_task("streaming_bench_proactive")
    model = Scripted(6)
    found = task.predict(SimpleNamespace(model=model, processor=None, fps=2.0), row)
    # A second after the question the clip has two frames.
    assert [count for count, _ in model.asked] == [2, 4, 6, 6] and model.asked[-1][1] == 'At three points, output "3".'
    assert [poll["time"] for poll in found["polls"]] == [2.0, 3.0, 4.0]
    assert task.score([row], [found], {}) == {"time_accuracy": 1.0, "accuracy": 1.0, "answered": 1.0}
    model = Scripted(99)
    found = task.predict(SimpleNamespace(model=model, processor=None, fps=2.0), row)
    # The video ends at 6 s, and so do the polls at 7 s.
    assert [poll["time"] for poll in found["polls"]] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [count for count, _ in model.asked] == [2, 4, 6, 8, 10, 10] and not found["outputs"]


def test_spans_come_from_truth_or_from_replies():
    messages = [
        {"role": "user", "content": "Tell me when it rains."},
        {"role": "assistant", "content": "It rains.", "time": 2.0},
        {"role": "user", "content": "And the sun?", "time": 4.0},
        {"role": "assistant", "content": "It shines.", "time": 6.0},
    ]
    row = {"messages": messages, "end": 9.0}
    assert [(s["question"], s["content"], s["start"], s["end"]) for s in find_spans(row)] == [
        ("Tell me when it rains.", "It rains.", 2.0, math.nextafter(6.0, 0.0)),
        ("And the sun?", "It shines.", 6.0, 9.0),
    ]
    assert len(find_spans({"messages": messages})) == 1, "the last reply has no time after it"
    spans = [{"question": "q", "content": "c", "start": 1.0, "end": 2.0, "related_end": None}]
    assert find_spans({"messages": messages, "truth": {"spans": spans}}) == spans
    task = find_task("proactive")
    assert task.wants(row) and not task.wants({"messages": messages[:1]})
    task.judge = "exact"
    scores = task.score([row], [{"replies": [{"time": 6.0, "text": "It shines.", "score": 1.0}]}], {})
    # The reply belongs to the second span alone. In the first the model is silent.
    assert scores["pauc_exact"] == pytest.approx((scores["pauc_silent"] + 1.0) / 2)
    right = [{"time": time, "text": text, "score": 1.0} for time, text in ((2.0, "It rains."), (6.0, "It shines."))]
    assert task.score([row], [{"replies": right}], {})["pauc_exact"] == pytest.approx(1.0)
    assert task.score([row], [{"replies": right}], {}, official=True)["pauc_benchmark_exact"] == pytest.approx(1.0)
    # Spans of a benchmark have their end.
    closed = {"messages": messages, "truth": {"spans": [{**spans[0], "content": "It rains."}]}}
    assert task.score([closed], [{"replies": right[:1]}], {})["pauc_exact"] > 0.125


def test_proactive_video_qa_has_spans(videos, tmp_path):
    def answer(content, *times):
        return {"content": content, "reply_timespan": list(times), "related_timespan": [0, 4.0]}

    def item(*answers, video="s_real.mp4", **more):
        conversation = [
            {"role": "user", "content": "What does she do?", "time": 0},
            {"role": "user", "content": "[subtitle] Hi.", "time": 2.2},
            {"role": "assistant", "content": "x", "time": 1},
            {"role": "user", "content": None, "time": 1},
        ]
        about = {"video": video, "question_id": "q1", "duration": 6.0, "conversation": conversation}
        return {**about, "answer": list(answers), **more}

    content = [
        item(answer("She waves.", 3.0, 4.1), answer("She sits.", 1, 3), answer("She leaves.", 9, 12)),
        item(answer("NO REPLY", 0, 1), answer("She waves.", 3, 3), answer("She waves.", None, 3)),
        item(answer("She waves.", 0, 9), question_id=None),
        item(answer("She waves.", 0, 1), conversation=[]), item(answer("x", 0, 1), video=None), "nothing",
    ]  # fmt: skip
    rows, notes = convert("proactive_video_qa", content, videos, tmp_path, "anno.json", task="web")
    assert list(rows) == ["web/q1", "web/entry 2"]
    row = rows["web/q1"]
    assert [(m["role"], m["content"], m["time"]) for m in row["messages"]] == [
        ("user", "What does she do?", 0.0),
        ("user", "[subtitle] Hi.", 2.5),
        ("assistant", "She sits.", 3.0),
        ("assistant", "She waves.", 4.5),
    ]
    assert (row["start"], row["end"]) == (0.0, 4.5) and rows["web/entry 2"]["end"] == 5.5
    sits, waves = find_spans(row)
    assert sits["question"] == "What does she do?" and (waves["start"], waves["end"], waves["related_end"]) == (
        3.0,
        4.1,
        4.0,
    )
    # A span that ends after the video is cut, also in the truth.
    assert [(span["start"], span["end"]) for span in rows["web/entry 2"]["truth"]["spans"]] == [(0.0, 6.0)]
    assert found(notes.mended_by) == {"ends after the end of the video: cut there": 1}
    assert found(notes.left_out) == {
        "after the end of the video": 1,
        "there is no text to say": 1,
        "it ends where it starts": 1,
        "there is no time": 1,
        "no span is left": 1,
        "there is no text or no time": 4,
        "there is no question": 1,
        "there is no text": 1,
        "is no object": 1,
    }
    task = find_task("proactive_video_qa_web")
    assert task.wants(row) and not find_task("proactive_video_qa_tv").wants(row)
    task.judge = "exact"
    predicted = [{"replies": [{"time": 1.0, "text": "She sits.", "score": 1.0}]}]
    assert task.score([row], predicted, {})["pauc_exact"] == pytest.approx((1 + 0.125) / 2)
    assert task.score([row], predicted, {}, official=True)["pauc_benchmark_exact"] == pytest.approx((1 + 0.25) / 2)
    (tmp_path / "WEB").mkdir()
    (tmp_path / "WEB" / "anno.json").write_text(json.dumps(content[2:3]))
    converter = find_converter("proactive_video_qa")
    assert [row["id"] for _, row in converter().convert(tmp_path, videos, Notes())] == ["web/entry 0"]
    with pytest.raises(FileNotFoundError, match="has no TV/anno.json"):
        list(converter(task="tv").convert(tmp_path, videos, Notes()))


def test_a_tiny_model_runs_all_of_them(videos, tmp_path):
    content = [entry(proactive("00:00:01", "00:00:02"))]
    rows, _ = convert("streaming_bench", content, videos, tmp_path, "questions_proactive.json")
    runner = Runner(tiny_model(mod_layers="all"), tiny_processor(), stream_options={"max_new_tokens": 3})
    (row,) = rows.values()
    for name in ("streaming_bench_proactive", "streaming_bench_proactive_native", "proactive"):
        task = find_task(name)
        assert task.wants(row)
        (found,) = task.predict_all(runner, [row])
        scores = task.score([row], [json.loads(json.dumps(found))], {})
        assert scores and all(value >= 0 for value in scores.values())
        if name == "streaming_bench_proactive":
            polls = {poll["time"]: poll["text"] for poll in found["polls"]}
    # A poll of the stream is a question after the clip up to its moment.
    asks = POLL.format(question='At three points, output "3".', output="3")
    for time in (2.0, 4.0):
        messages = [{"role": role, "content": asks, "time": time - 0.5} for role in ("user", "assistant")]
        assert runner.answer({**row, "end": time - 0.5, "messages": messages}, max_new_tokens=32) == [
            polls[time].strip()
        ]
    # Features of the same frames give the same polls.
    task, video = find_task("streaming_bench_proactive"), {"video": row["video"]}
    features = encode_clip(runner.model, runner.processor, video, fps=2.0)
    save_file({"frame_features": features}, tmp_path / "row.safetensors", metadata={"fps": "2.0"})
    encoded = {**row, "video": None, "frame_features": str(tmp_path / "row.safetensors")}
    assert task.predict(runner, encoded) == task.predict(runner, row)
    rows, _ = convert("ovo_bench", OVO, videos, tmp_path, "ovo_bench_new.json")
    task, rows = find_task("ovo_bench"), [rows["7"], rows["9_0"]]
    found = task.predict_all(runner, rows)
    assert len(found[0]["likelihoods"]) == 3 and "likelihoods" not in found[1]
    assert task.score(rows, found, {}).keys() == {"epm", "rec"}, "no group is complete"
    one = find_task("ovo_bench_rec")
    assert [one.wants(row) for row in rows] == [False, True] and one.papers == {"Gemini": {"rec": 0.3553}}


def test_test_points_of_one_video_share_its_frames(videos, tmp_path):
    rows, _ = convert("ovo_bench", OVO, videos, tmp_path, "ovo_bench_new.json", task="epm,crr")
    rows, task, model = list(rows.values()), find_task("ovo_bench"), tiny_model(mod_layers="all")
    alone = [task.predict(Runner(model, tiny_processor()), row) for row in rows]
    encode = model.model.encode_frames
    with patch.object(model.model, "encode_frames", side_effect=encode) as encoder:
        together = task.predict_all(Runner(model, tiny_processor()), rows)
    assert [len(call.args[0]) for call in encoder.call_args_list] == [4], "of 4, 2 and 4 frames"
    assert [found["text"] for found in together] == [found["text"] for found in alone]
    assert together[0]["likelihoods"] == pytest.approx(alone[0]["likelihoods"], abs=1e-4)


def test_the_command_asks_a_judge_once(tmp_path):
    """The embedded checkpoint narrates a sample. The judge gives every reply the best of five grades."""
    sample = str(ROOT / "samples" / "streamworld.mp4")
    messages = [{"role": "user", "content": NARRATE, "time": 0.0}]
    messages += [{"role": "assistant", "content": "Anything.", "time": 0.5}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"video": sample, "end": 8.5, "messages": messages}) + "\n")

    def run_command(*options):
        given = ("--checkpoint", ROOT, "--dataset", tmp_path / "rows.jsonl", "--task", "proactive,narration", *options)
        given += ("--video_root", ROOT / "samples")
        types = (DataSource, evaluation.EvaluationArguments)
        return run_main(lambda: run(evaluation.main, *types), *given, folder=tmp_path)

    def judge(request):
        system = request["messages"][0]["content"]
        if "user-assistant dialogues" in system:
            return '---\n{"correctness": 5, "promptness": 2, "efficiency": 3, "overall": 4}'
        return "5" if "Grades run" in system else "yes"

    with scripted_endpoint(judge) as (url, asked):
        options = ("--judge", "endpoint", "--judge_url", url, "--judge_model", "judge")
        tables = [run_command(*options) for _ in range(2)]
        assert [table.returncode for table in tables] == [0, 0], tables[0].stderr
        assert tables[0].stdout == tables[1].stdout and len(asked) > 1
    cells = [[cell.strip() for cell in line.split("|")] for line in tables[0].stdout.splitlines()]
    scores = {line[2]: line[3] for line in cells if len(line) > 3}
    assert 0.9 < float(scores["pauc_endpoint"]) <= 1.0 and scores["pauc_unjudged"] == "0"
    assert [float(scores[f"judge_{name}"]) for name in ASPECTS] == [5, 2, 3, 4] and scores["judge_ungraded"] == "0"
    assert len({str(request) for request in asked}) == len(asked), "the second run asks nothing"
    for status in (401, 422):
        with scripted_endpoint(status) as (url, _):
            refused = run_command(*options[:2], "--judge_url", url, "--judge_model", "judge")
        assert refused.returncode == 1 and f"answered {status}: wrong" in refused.stderr.splitlines()[-1]
    assert run_command("--judge", "endpoint").stderr.endswith("--judge_url and --judge_model go together.\n")
