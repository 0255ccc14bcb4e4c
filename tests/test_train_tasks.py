# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks: how rows run, how predictions are saved and resumed, the table, and scores computed by hand."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from hub import Hub, commit_hash
from preloaded import launch
from programs import run_main
from safetensors.torch import save_file
from tiny import random_features, random_frames, tiny_model, tiny_processor, write_clip
from turns import turn_model, turn_processor

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor
from videollm_mod.train import evaluation
from videollm_mod.train.arguments import run
from videollm_mod.train.data import prepare
from videollm_mod.train.data.about import read_about
from videollm_mod.train.data.converters import CONVERTERS, find_converter
from videollm_mod.train.data.dialogues import question_messages
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.timed_messages import load_timed_messages
from videollm_mod.train.endpoint_judge import ASPECTS
from videollm_mod.train.streaming_evaluation import free_streaming
from videollm_mod.train.tasks import TASKS, Task, choose_tasks, find_task
from videollm_mod.train.tasks import command as task_command
from videollm_mod.train.tasks.evaluating import evaluate_tasks
from videollm_mod.train.tasks.lta import ActionFinder, edit_distances
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.tasks.table import make_table
from videollm_mod.train.teacher_forcing import Turn


QUESTION = "Which action is it?"


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model():
    return tiny_model(mod_layers="all", mod_keep_ratio=0.3)


@pytest.fixture(scope="module")
def runner(model, processor):
    return Runner(model, processor, stream_options={"max_new_tokens": 6})


def ask(count, *, at=0.0, question=QUESTION, seed=0, **keys):
    """A row of `count` frames with one question and its answer."""
    messages = [{"role": "user", "content": question, "time": at}]
    messages.append({"role": "assistant", "content": "A ball.", "time": (count - 1) / 2})
    return {"video": random_frames(count, seed=seed), "messages": messages, **keys}


# ------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("at", [0.0, 1.0, 2.0], ids=["first frame", "between frames", "last frame"])
def test_an_answer_is_what_generate_gives_for_the_dialogue(runner, model, processor, at):
    row = ask(5, at=at)
    before = {0.0: 1, 1.0: 3, 2.0: 5}[at]
    stream = [{"role": "stream", "num_frames": count} for count in (before, 5 - before)]
    turns = [stream[0], {"role": "user", "content": QUESTION}, *stream[1:]]
    inputs = processor(turns, row["video"], add_generation_prompt=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert runner.answer(row, max_new_tokens=12) == [text.strip()] and text.strip()


def test_rows_of_several_lengths_answer_in_a_batch_as_one_by_one(runner):
    rows = [ask(count, at=at, seed=count) for count, at in ((2, 0.0), (7, 3.0), (4, 1.0))]
    together = runner.answer_all(rows, max_new_tokens=10)
    assert together == [runner.answer(row, max_new_tokens=10) for row in rows]
    assert len({texts[0] for texts in together}) > 1


def test_beams_give_several_replies_and_encode_frames_once(runner, model, processor):
    row = ask(3)
    inputs = processor(
        [
            {"role": "stream", "num_frames": 1},
            {"role": "user", "content": QUESTION},
            {"role": "stream", "num_frames": 2},
        ],
        row["video"],
        add_generation_prompt=True,
    )
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=5, num_return_sequences=5)
    texts = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    encode = model.model.encode_frames
    with patch.object(model.model, "encode_frames", side_effect=encode) as encoder:
        assert runner.answer(row, max_new_tokens=8, num_beams=5, num_return=5) == [text.strip() for text in texts]
    assert [len(call.args[0]) for call in encoder.call_args_list] == [3]


def test_likelihoods_equal_a_forward_pass_of_each_candidate_and_read_the_prompt_once(runner, model, processor):
    row, candidates = ask(4, at=1.0), ["A ball.", "The blue square leaves.", "x", "A ball."]
    turns = processor.to_stream_turns(row["messages"][:1], 4)
    expected, lengths = [], []
    for text in candidates:
        inputs = processor([*turns, {"role": "assistant", "content": text}], row["video"])
        prompt = len(processor(turns, row["video"], add_generation_prompt=True)["input_ids"][0])
        with torch.no_grad():
            scores = model(**inputs).logits[0, prompt - 1 : -1].log_softmax(dim=-1)
        reply = inputs["input_ids"][0, prompt:]
        expected.append(float(scores.gather(1, reply[:, None]).sum()))
        lengths.append(len(reply))
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    found = runner.likelihoods(row, candidates)
    handle.remove()
    assert found == pytest.approx(expected, abs=1e-4)
    # The prompt, and each reply without its last token.
    assert seen == [prompt, *(length - 1 for length in lengths)]
    per_token = [total / length for total, length in zip(expected, lengths, strict=True)]
    assert runner.likelihoods(row, candidates, per_token=True) == pytest.approx(per_token, abs=1e-5)


def test_streams_run_together_as_one_by_one(runner):
    """They end in another order than they begin."""
    rows = [ask(count, question="Narrate.", seed=count) for count in (9, 2, 5)]
    spoken = [[(event.time, event.text) for event in events] for events in runner.stream_all(rows)]
    assert spoken == [[(event.time, event.text) for event in runner.stream(row)] for row in rows]
    assert len({str(said) for said in spoken}) == 3 and runner.stream_all([]) == []


@pytest.mark.parametrize("name", ["smolvlm", "llama3"])
def test_prompts_and_candidates_have_the_stream_format_of_the_processor(name):
    processor = turn_processor(name)
    model = turn_model(processor)
    runner, row = Runner(model, processor), ask(3)
    del row["messages"][0]["time"]
    turns = [row["messages"][0], {"role": "stream", "num_frames": 3}]
    inputs = processor(turns, row["video"], add_generation_prompt=True)
    prompt = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, prompt:]
    assert runner.answer(row, max_new_tokens=6) == [processor.tokenizer.decode(out, skip_special_tokens=True).strip()]
    inputs = processor([*turns, {"role": "assistant", "content": "A ball."}], row["video"])
    with torch.no_grad():
        scores = model(**inputs).logits[0, prompt - 1 : -1].log_softmax(dim=-1)
    expected = float(scores.gather(1, inputs["input_ids"][0, prompt:, None]).sum())
    assert runner.likelihoods(row, ["A ball.", "x"])[0] == pytest.approx(expected, abs=1e-4)


def test_frame_features_run_as_their_video_does(runner, model, tmp_path):
    row = ask(4)
    pixels = model.model.encode_frames(runner.processor.process_frames(row["video"]))
    save_file({"frame_features": pixels}, tmp_path / "a.safetensors", metadata={"fps": "2.0"})
    features = {"frame_features": str(tmp_path / "a.safetensors"), "messages": row["messages"]}
    assert runner.answer(features, max_new_tokens=8) == runner.answer(row, max_new_tokens=8)
    assert runner.likelihoods(features, ["A ball."]) == pytest.approx(runner.likelihoods(row, ["A ball."]))
    assert runner.turns(features) == runner.turns(row)
    for question in ({"time": 1.0}, {}):
        messages = [{"role": "user", "content": QUESTION, **question}, *row["messages"][1:]]
        one, two = runner.stream_all([{**features, "messages": messages}, {**row, "messages": messages}])
        assert [(e.time, e.role, e.text) for e in one] == [(e.time, e.role, e.text) for e in two]
        assert {e.role for e in one} == {"user", "assistant"}


def test_a_prompt_beyond_the_context_names_its_row(runner):
    row = {"frame_features": random_features(runner.model.config, 200)[0], "messages": ask(3)["messages"]}
    with pytest.raises(FaultyRowError, match=r"the prompt has 2,2\d\d tokens, and the model reads at most 2,048"):
        runner.answer({**row, "where": "'a.jsonl', line 3"})


# -------------------------------------------------------------------------------------------------------- evaluating


class Length(Task):
    """How many letters the question has: a task that needs no model."""

    papers = {"Somebody (paper)": {"letters": 20.0, "not_measured_here": 1.0}}

    def predict(self, runner, row):
        runner.append(row["id"])
        if row["id"] == "broken":
            raise FaultyRowError("'a.jsonl', line 2: no video")
        # A separator of lines, and half of a character.
        return {"letters": len(row["messages"][0]["content"]), "text": "a\u2028b\ud800"}

    def score(self, rows, predictions, about, official=False):
        assert [row["id"] for row in rows] and len(rows) == len(predictions)
        return {"letters": sum(p["letters"] for p in predictions) / len(rows) + about["more"] + official}


class Rows(list):
    batch_size = 2


@pytest.fixture(autouse=True)
def length():
    with patch.dict(TASKS, length=Length, other=Length):
        yield


def evaluate(rows, out, *, names="length", settings=None, **options):
    """Return the results and the ids that were predicted."""
    seen = Rows()
    about = {"more": 0.5, "source": "made", "tasks": ["length", "other"]}
    settings = settings or {"fps": 2.0}
    return evaluate_tasks(
        lambda: seen, rows, choose_tasks(names, about, "test"), about, out=out, settings=settings, **options
    ), list(seen)


def words(*texts, task="length"):
    return [
        {"id": f"r{index}", "task": task, "video": "a.mp4", "messages": [{"role": "user", "content": text}]}
        for index, text in enumerate(texts)
    ]


def test_a_rerun_predicts_only_what_is_missing_or_changed(tmp_path):
    rows = words("one", "three")
    results, seen = evaluate(rows, tmp_path)
    assert results["length"]["scores"] == {"letters": 4.5} and seen == ["r0", "r1"]
    results, seen = evaluate(rows, tmp_path, official=True)
    assert results["length"]["scores"] == {"letters": 5.5} and seen == []
    # A killed run leaves part of a line, and the data may change. The folder of the videos may not matter.
    saved = tmp_path / "predictions-0.jsonl"
    lines = saved.read_text().splitlines(keepends=True)
    saved.write_text(lines[0] + lines[1][:20])
    moved = [{**row, "video": f"elsewhere/{row['video']}"} for row in rows]
    results, seen = evaluate(moved, tmp_path)
    assert results["length"]["scores"] == {"letters": 4.5} and seen == ["r1"]
    results, seen = evaluate(words("one", "seven letters"), tmp_path)
    assert results["length"]["scores"] == {"letters": 8.5} and seen == ["r1"]
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["length"]["scores"] == {"letters": 8.5}


def test_predictions_of_other_settings_are_refused_in_one_line(tmp_path):
    evaluate(words("one"), tmp_path)
    with pytest.raises(
        ValueError, match=r"^'.*' has predictions of another run \(fps was 2.0, now 1.0\). Give another"
    ):
        evaluate(words("one"), tmp_path, settings={"fps": 1.0})


def test_the_longest_rows_of_a_task_come_first(tmp_path):
    spans = [(0.0, 1.0), (2.0, 9.0), (None, 3.0), (None, None)]
    rows = [{**row, "start": start, "end": end} for row, (start, end) in zip(words(*"abcd"), spans, strict=True)]
    assert evaluate(rows, tmp_path)[1] == ["r1", "r2", "r0", "r3"]


def test_a_source_names_all_its_tasks_and_the_table_shows_published_figures(tmp_path):
    rows = words("one", "three") + words("1234567", task="other")
    results, _ = evaluate(rows, tmp_path, names="made")
    table = make_table(results)
    assert table.splitlines() == [
        "| task   | measure           | this model | Somebody (paper) (published) |",
        "| ------ | ----------------- | ---------- | ---------------------------- |",
        "| length | letters           | 4.5        | 20                           |",
        "| length | not_measured_here |            | 1                            |",
        "| other  | letters           | 7.5        | 20                           |",
        "| other  | not_measured_here |            | 1                            |",
        "",
        "length: 2 rows, the default scorer.",
        "other: 1 row, the default scorer.",
        "Published figures are the papers' own, by the published scorers (--official), on the papers' videos.",
    ]


def test_a_row_that_cannot_be_read_is_left_out_alone(tmp_path):
    rows = words("one", "three")
    rows.insert(1, {**rows[0], "id": "broken"})
    with pytest.raises(FaultyRowError, match="line 2: no video"):
        evaluate(rows, tmp_path / "strict")
    faults = []
    results, _ = evaluate(rows, tmp_path / "left", left_out=SimpleNamespace(leave_out=faults.append))
    assert faults == ["'a.jsonl', line 2: no video"]
    assert (results["length"]["rows"], results["length"]["unread"]) == (2, 1)
    assert results["length"]["scores"] == {"letters": 4.5}
    line = "length: 2 rows, and 1 more that the scores do not cover because they cannot be read, the default scorer."
    assert line in make_table(results).splitlines()
    with patch.object(Length, "no_reply", {"letters": 0}):
        results, _ = evaluate(rows, tmp_path / "counted", left_out=SimpleNamespace(leave_out=faults.append))
    assert results["length"]["scores"] == {"letters": pytest.approx(8 / 3 + 0.5)}
    line = "length: 2 rows, and 1 more that count as rows without a reply because they cannot be read"
    assert any(found.startswith(line) for found in make_table(results).splitlines())


def test_rows_without_a_reply_are_wrong_in_every_task_that_counts_them():
    asked = [
        ("ovo_bench_epm", {"answer": "A", "options": ["a cat", "a dog"]}),
        ("ovo_bench_rec", {"answer": "0"}),
        ("ovo_bench_crr", {"answer": "No"}),
        ("streaming_bench_real", {"answer": "A", "options": ["a cat", "a dog"], "type": "Clips"}),
        ("streaming_bench_proactive", {"asked": 0.0, "time": 2.0, "output": "3"}),
        ("vript_hard_rr", {"answer": "A", "options": ["a cat", "a dog"]}),
        ("vript_hard_rr_open", {"question": "What is it?", "open_answer": "A cat."}),
        ("vript_hard_ero", {"order": ["A", "B", "C"]}),
    ]
    for name, truth in asked:
        for official in (False, True):
            found = score(name, [(truth, find_task(name).no_reply)], official=official)
            assert found and set(found.values()) == {0.0}, name


def test_predictions_depend_on_the_truth_that_they_read_and_on_no_other(tmp_path):
    class Chosen(Length):
        truth_keys = ("options",)

        def predict(self, runner, row):
            runner.append(row["truth"])
            return {"letters": len(row["truth"]["options"])}

    def asked(**truth):
        return [{**row, "truth": truth} for row in words("one", task="chosen")]

    with patch.dict(TASKS, chosen=Chosen):
        one = {"options": ["a", "b"]}
        assert evaluate(asked(answer="a", **one), tmp_path, names="chosen")[1] == [one]
        assert evaluate(asked(answer="b", **one), tmp_path, names="chosen")[1] == []
        results, seen = evaluate(asked(answer="b", options=["a"]), tmp_path, names="chosen")
        assert results["chosen"]["scores"] == {"letters": 1.5} and seen == [{"options": ["a"]}]


def test_what_a_score_lacks_shows_before_the_model_runs_and_scored_tasks_stay(tmp_path):
    row = words("one", task="coin_step") + words("one", task="ego4d_lta") + words("one", task="proactive_video_qa_tv")
    for name, error in (
        ("coin_step", "about.json has no label dictionary 'coin_step'"),
        ("ego4d_lta", "about.json has no label dictionary 'ego4d_lta_verb'"),
    ):
        with pytest.raises(ValueError, match=error):
            evaluate(row, tmp_path, names=name)
    with (
        patch.dict(sys.modules, sentence_transformers=None),
        pytest.raises(ImportError, match="needs an encoder"),
    ):
        task = find_task("proactive_video_qa_tv")
        task.judge = "sentence"
        evaluate_tasks(pytest.fail, row, [task], {}, out=tmp_path, settings={})
    assert list(tmp_path.glob("predictions*")) == []

    class Broken(Length):
        def score(self, *_arguments):
            raise OSError("the judge is gone")

    rows = words("one") + words("one", task="broken")
    with patch.dict(TASKS, broken=Broken), pytest.raises(OSError, match="is gone"):
        evaluate(rows, tmp_path, names="length,broken")
    assert list(json.loads((tmp_path / "results.json").read_text())["tasks"]) == ["length"]


def test_a_batch_that_does_not_fit_into_memory_runs_in_parts(tmp_path):
    sizes = []

    class Large(Length):
        def predict_all(self, runner, rows):
            sizes.append(len(rows))
            if len(rows) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().predict_all(runner, rows)

    rows = words(*"abcde", task="large")
    with patch.dict(TASKS, large=Large), patch.object(Rows, "batch_size", 4):
        most = 1
        assert evaluate(rows, tmp_path / "some", names="large")[1] == ["r0", "r1", "r2", "r3", "r4"]
        assert sizes == [4, 2, 1, 1, 2, 1, 1, 1]
        most = 0
        with pytest.raises(ValueError, match=r"^memory ran out at the row of 'a.mp4', with one row at a time"):
            evaluate(rows, tmp_path / "none", names="large")


def test_unknown_tasks_missing_rows_and_equal_ids_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no task 'step'. Tasks are .*coin_next, "):
        find_task("step")
    with pytest.raises(ValueError, match=r"^there is no row of the task other. It has length.$"):
        evaluate(words("one"), tmp_path, names="other")
    about = {"source": "made", "tasks": ["length", "other"], "splits": {"test": {"tasks": {"other": 2}}}}
    assert [task.name for task in choose_tasks("made", about, "test")] == ["other"], "the others have no rows"
    assert len(choose_tasks("made", about, "train")) == 2, "nothing is known of this split"
    with pytest.raises(ValueError, match=r"^test has no row of a task of made.$"):
        choose_tasks("made", {**about, "splits": {"test": {"tasks": {}}}}, "test")
    with pytest.raises(ValueError, match=r"^2 rows of the task length have the id 'r0'.$"):
        evaluate(words("one") * 2, tmp_path)


def test_about_is_read_beside_the_rows(tmp_path):
    assert read_about(str(tmp_path)) == {}
    (tmp_path / "about.json").write_text('{"source": "coin"}')
    assert read_about(str(tmp_path)) == read_about(str(tmp_path / "about.json")) == {"source": "coin"}
    for content, message in (
        ("[]", "is no object"),
        ('{"labels": []}', "`labels` is list, must be dict"),
        ('{"fps": "2"}', "`fps` is str, must be float"),
    ):
        (tmp_path / "about.json").write_text(content)
        with pytest.raises(ValueError, match=rf"^'.*about.json'.*{message}"):
            read_about(str(tmp_path))
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(ValueError, match=r"^'.*about.json' is not JSON"):
        read_about(str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- COIN


@pytest.mark.parametrize(
    ("name", "truth", "key"),
    [
        ("coin_procedure", {"label": "x"}, "labels"),
        ("coin_taskprocedure", None, "labels"),
        ("qvhighlights_moments", {"query": "x", "vid": "x"}, "windows"),
        ("vript_hard_rr", {"options": {}}, "answer"),
    ],
)
def test_a_row_without_what_the_score_reads_is_named_before_the_model_runs(tmp_path, name, truth, key):
    rows = [{**row, "truth": truth} for row in words("one", "two", "three", task=name)]
    about = {"labels": {name: ["x"]}}
    error = rf"^the row of 'a.mp4': `truth` has no `{key}`, which {name} is scored by, and 2 more rows like it. "
    with pytest.raises(ValueError, match=error):
        evaluate_tasks(pytest.fail, rows, [find_task(name)], about, out=tmp_path, settings={})


def score(name, pairs, about=None, **options):
    """Score replies (truth, text) of a task."""
    rows = [{"id": str(index), "task": name, "truth": truth} for index, (truth, _) in enumerate(pairs)]
    predictions = [{"text": text} if isinstance(text, str) else text for _, text in pairs]
    return find_task(name).score(rows, predictions, about or {}, **options)


STEPS = {"labels": {"coin_step": ["wash the car", "dry the car", "wax the car", "bag", "bat"]}}


def test_coin_takes_the_nearest_label_and_the_first_of_equals():
    pairs = [
        ({"label": "wash the car"}, "Wash the car."),
        # One letter is missing, so the strict score does not count it.
        ({"label": "dry the car"}, "Dry the ca."),
        # "bar" is one letter from "bag" and from "bat": the first in order counts.
        ({"label": "bag"}, "bar"),
        ({"label": "bat"}, "bar"),
    ]
    assert score("coin_step", pairs, STEPS) == {"accuracy": 3 / 4, "strict_accuracy": 1 / 4}
    assert find_task("coin_step").papers["VideoLLM-MoD"] == {"accuracy": 0.634}


def test_coin_procedures_count_missing_lines_and_lines_too_many():
    labels = {"labels": {"coin_procedure": STEPS["labels"]["coin_step"]}}
    pairs = [
        # Two steps of three: the published scorer compares two pairs, the default three steps.
        ({"labels": ["wash the car", "dry the car", "bag"]}, "1. Wash the car.\n2. Dry the car."),
        # A line too many, and a text that is near a label only.
        ({"labels": ["wax the car"]}, "1) Wax teh car\n\n2) Bat"),
        ({"labels": ["bat", "bag"]}, "1. Bag.\n2. Bag."),
    ]
    found = score("coin_procedure", pairs, labels)
    assert found == {"accuracy": (2 + 1 + 1) / 6, "strict_accuracy": (2 + 0 + 1) / (3 + 2 + 2)}
    # There, capitals and full stops are part of the distance: "Bag." is 2 from "bag" and 3 from "bat".
    assert score("coin_procedure", pairs, labels, official=True) == {"accuracy": (2 + 1 + 1) / (2 + 1 + 2)}
    assert find_task("coin_taskprocedure").papers["VideoLLM-MoD"] == {"accuracy": 0.533}


def test_official_coin_sees_nothing_of_clips_that_lives_code_cuts_away(tmp_path, monkeypatch):
    """VideoLLM-online's code ends a dialogue before a run of frames that is too long. A row of COIN has one run."""
    for module in ("videollm_mod.train.tasks.coin", "videollm_mod.train.teacher_forcing"):
        monkeypatch.setattr(f"{module}.MAX_FRAMES", 3)
    model, processor = tiny_model(mod_layers="all"), tiny_processor()
    model.lm_head.weight.data[processor.end_of_reply_id] *= 20  # so that replies end soon
    seen = []

    class Recorder(Runner):
        def answer_prompts(self, prompts, **options):
            seen.extend(len(features) for _, features in prompts)
            return super().answer_prompts(prompts, **options)

    write_clip(tmp_path / "a.mp4", random_frames(30))
    shown = {"video": str(tmp_path / "a.mp4"), "task": "coin_step", "truth": {"label": "bag"}, "start": 0.5}
    rows = [
        {**shown, "id": str(count), "end": count / 2, "messages": question_messages(QUESTION, "Bag.", count, 2.0)}
        for count in (3, 4)
    ]
    runner, [task] = Recorder(model, processor), choose_tasks("coin_step", {}, "test")

    def evaluate_both(official):
        seen.clear()
        about = {"fps": 2.0, **STEPS}
        evaluate_tasks(lambda: runner, rows, [task], about, out=tmp_path / "out", settings={}, official=official)
        return list(seen)

    assert evaluate_both(official=False) == [4, 3], "the longest first"
    assert evaluate_both(official=True) == [0], "other rows are not predicted again"
    assert evaluate_both(official=True) == evaluate_both(official=False) == []
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions-0.jsonl").read_text().splitlines()]
    question = {"role": "user", "content": QUESTION}
    [text] = runner.answer_prompts([runner.make_prompt([question], random_features(model.config, 0)[0])])
    assert [line["id"] for line in saved] == ["4", "3", "4"] and saved[-1]["prediction"] == {"text": text[0]}
    # With one token a frame, VideoLLM-online has 7200 frames.
    one = Recorder(tiny_model(frame_token_pooled=None), tiny_processor(frame_num_tokens=1))
    seen.clear()
    assert one.answer_all(rows[1:], max_new_tokens=1, official=True) and seen == [4]


def test_keysteps_are_named_and_a_test_split_has_no_score():
    labels = {"labels": {"ego_exo4d_keystep": ["cut onion", "wash hands (cooking)", "wash hands (covid)"]}}
    pairs = [
        ({"label_id": 7, "label": "wash hands (covid)"}, "Wash hands (Covid)."),
        ({"label_id": 5, "label": "wash hands (cooking)"}, "Wash hands (covid)."),
        ({}, "Cut onion."),
    ]
    assert score("ego_exo4d_keystep", pairs, labels) == {"accuracy": 0.5, "strict_accuracy": 0.5}
    assert score("ego_exo4d_keystep", pairs[2:], labels) == {}


# --------------------------------------------------------------------------------------------------------- Ego4D LTA

# "chips" is there twice: the later noun is the label of the words.
WORDS = {"labels": {"ego4d_lta_verb": ["take", "cut", "wash"], "ego4d_lta_noun": ["knife", "onion", "chips", "chips"]}}


def numbered(*actions):
    return {"texts": ["\n".join(f"{k}. {action}." for k, action in enumerate(texts, 1)) for texts in actions]}


def lta_truth(verbs, nouns, **more):
    return {"verb_label": verbs, "noun_label": nouns, "clip_uid": "c", "last_visible_action_idx": 7, **more}


def test_lta_takes_the_best_candidate_of_verbs_nouns_and_actions_each():
    truth = lta_truth([0] * 10 + [1] * 10, [1] * 20)
    verbs_right = ["Take knife"] * 10 + ["Cut knife"] * 10
    nouns_right = ["Wash onion"] * 20
    half = ["Take onion"] * 10  # repeated, so that ten verbs are wrong
    found = score("ego4d_lta", [(truth, numbered(verbs_right, nouns_right, half, half, half))], WORDS)
    assert (found["verb_ED@20"], found["noun_ED@20"], found["action_ED@20"]) == (0.0, 0.0, 0.5)
    # Of the first z actions, max(z - 10, 0) differ: the area of (z - 10) / z by the trapezoid rule.
    curve = [max(z - 10, 0) / z for z in range(1, 21)]
    assert found["action_AUED"] == pytest.approx((sum(curve) - curve[-1] / 2) / 19)
    # The printed ED_19 of the published code, whose arrays are (rows, symbols, candidates), is the same figure.
    assert find_task("ego4d_lta").papers["VideoLLM-MoD"]["action_ED@20"] == 0.884


def test_edit_distances_refuse_the_other_order_of_axes():
    candidates = [[1, 2, 3], [1, 3, 2]]
    assert edit_distances(candidates, [1, 3, 3]) == [0.0, 0.0, 1 / 3]
    with pytest.raises(ValueError, match="the order is \\(candidates, symbols\\)"):
        edit_distances(list(zip(*candidates, strict=True)), [1, 3, 3])


def test_lta_reads_lines_as_the_published_code_does():
    finder = ActionFinder(*WORDS["labels"].values())
    lines = "Sure!\n1. Take knive.\nAction 2. Cut the onion\nno number\n" + "\n".join(
        f"{k}. wash chips" for k in range(3, 30)
    )
    assert finder.read(lines, fallback=False) == [(0, 0), (1, 1)] + [(2, 3)] * 18
    assert finder.read("1. Cut onion", fallback=False) == [(1, 1)] * 20
    assert finder.read("I see an onion", fallback=True) == [(0, 0)] * 20
    assert finder.read("I see an onion", fallback=False) == [(-1, -1)] * 20


def test_lta_weaknesses_of_the_published_scorer_are_official_only():
    # A reply without a line is the taxonomy's first action, and one of two labels with the same words is always wrong.
    silent = (lta_truth([0] * 20, [0] * 20), {"texts": ["I do not know."] * 5})
    twins = (lta_truth([1] * 20, [2] * 20), numbered(["Cut chips"] * 20))
    assert score("ego4d_lta", [silent], WORDS, official=True)["action_ED@20"] == 0.0
    assert score("ego4d_lta", [silent], WORDS)["action_ED@20"] == 1.0
    assert score("ego4d_lta", [twins], WORDS, official=True)["noun_ED@20"] == 1.0
    assert score("ego4d_lta", [twins], WORDS)["noun_ED@20"] == 0.0


def test_lta_writes_the_submission_of_a_test_split(tmp_path):
    rows = [{"truth": {"clip_uid": "abc", "last_visible_action_idx": 7}}, {"truth": lta_truth([0] * 20, [0] * 20)}]
    predictions = [numbered(["Cut onion"] * 3, *[["Take chips"]] * 4)] * 2
    task = find_task("ego4d_lta")
    assert task.write_files(tmp_path, rows[1:], predictions[1:], WORDS) == []
    [path] = task.write_files(tmp_path, rows, predictions, WORDS)
    assert json.loads(path.read_text()) == {
        "abc_7": {"verb": [[1] * 20] + [[0] * 20] * 4, "noun": [[1] * 20] + [[3] * 20] * 4}
    }
    assert task.score(rows[:1], predictions[:1], WORDS) == {}


# --------------------------------------------------------------------------------------------------------- narration


def narrated(*replies, **keys):
    """A row with an instruction, and replies (time, text)."""
    asked = {"role": "user", "content": "Narrate.", "time": 0.0}
    told = [{"role": "assistant", "content": text, "time": time} for time, text in replies]
    return {"id": str(keys), "messages": [asked, *told], **keys}


def test_narration_has_lives_measures_and_those_of_its_own_history():
    turn = Turn(
        losses=[0.0, 0.0], labels=[5, 2], predictions=[5, 2], speaks=[False, True], is_decided=True, num_frames=2
    )
    video = {"task": "ego4d_narration", "video": "a.mp4"}
    rows = [
        narrated((0.0, "You sit."), (2.0, "You stand."), (4.0, "You walk."), end=5.0, **video),
        # Another annotator of the same video. The reply at 9 s is outside of the first row.
        narrated((3.0, "You jump."), (9.0, "You fall."), end=9.0, **video),
    ]
    predictions = [
        {"turns": [asdict(turn)], "replies": [{"time": 2.5, "text": "You stand."}]},
        {"turns": [], "replies": []},
    ]
    found = find_task("narration").score(rows, predictions, {"fps": 2.0})
    assert (found["lm_ppl"], found["time_diff"], found["fluency"], found["lm_correctness"]) == (1.0, 0.0, 1.0, 1.0)
    # The reply at 0 s answers the instruction, so that of 2 + 2 true events one is told, 0.5 s late.
    assert (found["event_precision"], found["event_recall"], found["event_delay"]) == (1.0, 1 / 4, 0.5)
    # Segments of the first row: told (0, 3); true (0, 2), (2, 4) and, by the other annotator, (0, 3). Its best IoU is
    # 1. Of the true ones (0, 2) and (0, 3) overlap it by 2/3 and 1, and (2, 4) by 1/4. The second row tells nothing.
    assert found["temporal_precision"] == pytest.approx((1 + 0) / 2)
    assert found["temporal_recall"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["redundant_rate_token_f1"] == 0.0 and found["missing_rate_token_f1"] == 3 / 4
    assert find_task("ego4d_narration").papers["VideoLLM-MoD"]["time_diff"] == 2.04


@pytest.mark.parametrize(
    ("tasks", "recall"),
    [
        (("ego4d_narration", "ego4d_narration"), 0.5),
        # A step and its substeps, two dialogues, rows of several tasks and rows of one's own are no passes.
        (("ego4d_goalstep", "ego4d_goalstep"), 1.0),
        (("ego4d_livechat", "ego4d_livechat"), 1.0),
        (("ego4d_narration", "ego4d_refined"), 1.0),
        ((None, None), 1.0),
    ],
)
def test_only_passes_of_annotators_are_true_for_one_another(tasks, recall):
    told = [((2.0, "You stand."),), ((6.0, "You fall."),)]
    rows = [narrated(*replies, video="a.mp4", task=task) for replies, task in zip(told, tasks, strict=True)]
    # Each row tells exactly what its own annotator says. A prediction is 1 / fps later than its frame.
    predictions = [{"turns": [], "replies": [{"time": r[0][0] - 0.5, "text": r[0][1]}]} for r in told]
    assert find_task("narration").score(rows, predictions, {"fps": 2.0})["temporal_recall"] == recall


def test_narration_predicts_turns_and_replies_of_any_row(runner):
    rows = [ask(5, question="Narrate.", seed=3), ask(8, at=1.0, question="Narrate.", seed=4)]
    task = find_task("narration")
    assert all(map(task.wants, rows)) and not find_task("ego4d_narration").wants(rows[0])
    predictions = json.loads(json.dumps(task.predict_all(runner, rows)))
    for row, prediction in zip(rows, predictions, strict=True):
        assert [Turn(**turn) for turn in prediction["turns"]] == runner.turns(row)
        spoken = [event for event in runner.stream(row) if event.interval_probability is not None]
        assert prediction["replies"] == [{"time": event.time, "text": event.text} for event in spoken] != []
        said = [(message["time"], message["role"], message["text"]) for message in prediction["dialogue"]]
        assert said == [(event.time, event.role, event.text) for event in runner.stream(row)]
        assert "user" in [role for _, role, _ in said]
    assert task.score(rows, predictions, {"fps": 2.0})["lm_ppl"] > 1


def test_official_narration_follows_lives_code_and_flownars(processor):
    """LIVE's measures have no interval threshold, and FlowNar's words are split at spaces."""
    model = tiny_model(mod_layers="all", interval_threshold=1.0)
    # Silence is the most likely token at every frame.
    likely = torch.nn.functional.one_hot(torch.tensor(model.config.frame_token_interval_id), len(model.lm_head.weight))
    model.lm_head.register_forward_hook(lambda _layer, _inputs, logits: logits + 8 * likely)
    runner = Runner(model, processor, stream_options={"max_new_tokens": 6})
    row = ask(6, question="Narrate.", seed=3, id="a", task="narration")
    task = find_task("narration")
    default = task.predict(runner, row)
    task.official = True
    official = task.predict(runner, row)
    assert official["replies"] == default["replies"]
    assert official["turns"] == [asdict(turn) for turn in runner.turns(row, interval_threshold=0.0)]
    assert official["turns"] != default["turns"]
    told = narrated((2.0, "You sit."))
    said = [{"turns": [], "replies": [{"time": 1.5, "text": "you sit"}]}]
    assert task.score([told], said, {"fps": 2.0})["rouge_l"] == 1.0
    assert task.score([told], said, {"fps": 2.0}, official=True)["rouge_l"] == 0.0


def test_official_predictions_of_narration_are_kept_apart(tmp_path):
    class Apart(Length):
        predicts_officially, has_published_scorer = True, False

    with patch.dict(TASKS, length=Apart):
        assert evaluate(words("one"), tmp_path)[1] == ["r0"]
        results, seen = evaluate(words("one"), tmp_path, official=True)
        assert seen == ["r0"] and results["length"]["official"] is False, "there is no published scorer"
        assert evaluate(words("one"), tmp_path)[1] == evaluate(words("one"), tmp_path, official=True)[1] == []
    assert "length: 1 row, the default scorer." in make_table(results)


def test_the_judge_is_the_similarity_of_narrations():
    told, said = narrated((2.0, "You sit.")), [{"turns": [], "replies": [{"time": 2.0, "text": "You stand."}]}]
    task = find_task("narration")
    task.judge = "exact"
    assert task.score([told], said, {"fps": 2.0})["match_f1_exact"] == 0.0
    seen = []

    def grade_dialogues(items):
        seen.extend(items)
        return [dict.fromkeys(ASPECTS, 4.0)]

    task.judge = SimpleNamespace(name="endpoint", grade_dialogues=grade_dialogues)
    with pytest.raises(ValueError, match="an earlier version have no dialogues to judge. Give another --out"):
        task.score([told], said, {"fps": 2.0})
    said[0]["dialogue"] = [{"time": 2.0, "role": "assistant", "text": "You stand."}]
    told["messages"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        *told["messages"],
    ]
    scores = task.score([{**told, "start": 1.0}], said, {"fps": 2.0})
    assert "match_f1_token_f1" in scores, "a language model is no similarity"
    assert scores["judge_overall"] == 4.0 and seen == [
        ("[0.0s] User: Narrate.\n[1.0s] User: Go.\n[2.0s] Assistant: You sit.\n", "[2.0s] Assistant: You stand.\n")
    ]


# --------------------------------------------------------------------------------------------- tasks that stream


@pytest.mark.parametrize("name", ["vript_scenes", "qvhighlights_moments", "ego4d_nlq", "proactive"])
def test_true_replies_do_not_tell_when_to_speak(runner, name):
    """Something is heard right before a true reply, as speech is at the end of a scene. The model stays silent."""
    row = ask(5, question="Describe it.", seed=3)
    heard = {"role": "user", "content": "Hello.", "time": 1.0}
    row["messages"] += [heard, {"role": "assistant", "content": "She greets.", "time": 1.0}]
    silent = Runner(runner.model, runner.processor, stream_options={"speak": lambda _frame: False})
    assert [event.role for event in silent.stream(row)].count("assistant") == 1, "a question with its answer"
    assert find_task(name).predict(silent, row) == {"replies": []}


# --------------------------------------------------------------------------------------------------------- Ego4D NLQ


def test_nlq_windows_are_those_that_the_model_spoke():
    said = [(2.0, "It starts.", 0.6), (6.0, "It ends.", 0.9), (10.0, "It starts.", 0.8), (12.0, "It ends.", 0.5)]
    spoken = {"replies": [dict(zip(("time", "text", "score"), reply, strict=True)) for reply in said]}
    silent = {"replies": []}
    truth = {"windows": [[2.0, 8.0]], "clip": [0.0, 20.0], "query": "where is it?"}
    # Ranked by score: (10, 12) has IoU 0, (2, 6) has 4 / 6. The second query has no window.
    found = score("ego4d_nlq", [(truth, spoken), (truth, silent)])
    assert found == {"r1_0.3": 0.0, "r1_0.5": 0.0, "r5_0.3": 0.5, "r5_0.5": 0.5, "miou": 0.0}
    assert score("ego4d_nlq", [(truth, spoken)], official=True)["miou"] == 0.0
    # The published recall needs more than the threshold, and each window of a query counts by itself.
    half = {"windows": [[2.0, 10.0], [30.0, 31.0]], "clip": [0.0, 40.0]}
    replies = {"replies": spoken["replies"][:2]}
    assert score("ego4d_nlq", [(half, replies)])["r1_0.5"] == 1.0
    assert score("ego4d_nlq", [(half, replies)], official=True) == {
        "r1_0.3": 0.5,
        "r1_0.5": 0.0,
        "r5_0.3": 0.5,
        "r5_0.5": 0.0,
        "miou": pytest.approx(0.25),
    }
    assert score("ego4d_nlq", [({"windows": [], "clip": [0.0, 9.0]}, spoken)]) == {}


def test_nlq_official_counts_each_annotated_window():
    """Two annotators gave windows that overlap. Ego4D's scorer, run on the submission once, has these figures."""
    names = {"clip_uid": "c", "annotation_uid": "a"}
    given = [
        {**names, "query_idx": index, "window": window} for index, window in enumerate([[0.0, 10.0], [5.0, 15.0]])
    ]
    truth = {"windows": [[0.0, 15.0]], "clip": [0.0, 20.0], "places": given}
    said = [{"time": 0.0, "text": "It starts.", "score": 0.9}, {"time": 10.0, "text": "It ends.", "score": 0.5}]
    found = score("ego4d_nlq", [(truth, {"replies": said})], official=True)
    assert (found["r1_0.3"], found["r1_0.5"], found["miou"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert score("ego4d_nlq", [(truth, {"replies": said})])["r1_0.5"] == 1.0
    # Rows of the test split, and rows that were prepared before places had windows.
    bare = [{name: value for name, value in place.items() if name != "window"} for place in given]
    assert score("ego4d_nlq", [(truth | {"places": bare}, {"replies": said})], official=True)["r1_0.5"] == 1.0
    assert score("ego4d_nlq", [(truth | {"places": bare, "windows": []}, {"replies": said})], official=True) == {}


def test_nlq_writes_a_submission_in_seconds_of_the_clip(tmp_path):
    said = [("It starts.", 12.0, 0.6), ("It ends.", 16.0, 0.9), ("It starts.", 20.0, 0.8)]
    replies = [dict(zip(("text", "time", "score"), reply, strict=True)) for reply in said]
    places = [{"clip_uid": "c", "annotation_uid": "a", "query_idx": index} for index in range(3)]
    asked = [[{**places[0], "window": [12.0, 16.0]}, places[1]], places[2:]]
    rows = [{"truth": {"windows": [], "clip": [10.0, 30.0], "places": some}} for some in asked]
    task = find_task("ego4d_nlq")
    [path] = task.write_files(tmp_path, rows, [{"replies": replies}, {"replies": []}], {})
    # The model was surer of the second window, which is open until the clip ends.
    best = [[10.0, 20.0], [2.0, 6.0]]
    assert json.loads(path.read_text()) == {
        "version": "1.0",
        "challenge": "ego4d_nlq_challenge",
        "results": [
            {**place, "predicted_times": times}
            for place, times in zip(places, (best, best, [[0.0, 0.0]]), strict=True)
        ],
    }


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A checkpoint, and an annotation file of our own in COIN's layout that `prepare.py` prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    model, processor = tiny_model(mod_layers="all"), tiny_processor()
    # So that replies end soon.
    model.lm_head.weight.data[processor.end_of_reply_id] *= 20
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    database = {}
    for index, steps in enumerate([STEPS["labels"]["coin_step"][:4], STEPS["labels"]["coin_step"][2:]]):
        write_clip(folder / f"v{index}.mp4", random_frames(50, seed=index))
        times = [{"id": "1", "segment": [k, k + 1.0], "label": label} for k, label in enumerate(steps)]
        about = {"duration": 5.0, "class": "WashCar", "start": 0.0, "end": 4.0, "subset": "testing"}
        database[f"v{index}"] = {**about, "annotation": times}
    # A video that nobody has is part of the dictionary.
    lost = [{"id": "1", "segment": [0, 1], "label": "drive home"}]
    database["lost"] = {"class": "DriveCar", "subset": "testing", "annotation": lost}
    (folder / "COIN.json").write_text(json.dumps({"database": database}))
    paths = ("--annotations", folder / "COIN.json", "--videos", folder, "--out", folder / "out")
    done = run_main(prepare.main, "coin", *paths, program="prepare.py")
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, *arguments):
    """Run `train/evaluation.py` on the prepared folder."""
    types = (DataSource, evaluation.EvaluationArguments)
    given = ("--checkpoint", folder / "model", "--dataset", folder / "out", "--video_root", folder, *arguments)
    return run_main(lambda: run(evaluation.main, *types), *given, folder=folder)


def test_prepared_annotations_are_evaluated_by_one_command(prepared, tmp_path):
    done = command(prepared, "--task", "coin", "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    line = next(
        line for line in done.stdout.splitlines() if line.startswith("| coin_step          | accuracy        |")
    )
    assert [cell.strip() for cell in line.split("|")[4:-1]] == ["0.598", "0.631", "0.634", "0.577"]
    gap = "The scores do not cover what prepare.py left out of test (1: there is no video file)."
    assert done.stdout.endswith(f"{gap}\nwrote {tmp_path / 'results'}\n")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    counts = {name: result["rows"] for name, result in results["tasks"].items()}
    # Four and three steps, all of them but the last of a video, and two videos.
    expected = {"step": 7, "task": 2, "next": 5, "procedure": 5, "taskprocedure": 5}
    assert counts == {f"coin_{name}": count for name, count in expected.items()}
    saved = [json.loads(line) for line in (tmp_path / "results" / "predictions-0.jsonl").read_text().splitlines()]
    assert Counter(line["task"] for line in saved) == counts
    # The reply is that of `generate` to the question before the frames, and the dictionary has all labels.
    row = load_timed_messages(prepared / "out", "test", video_root=[prepared])[0]
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(prepared / "model").eval()
    processor = VideoLLMMoDProcessor.from_pretrained(prepared / "model")
    question = {"role": "user", "content": row["messages"][0]["content"]}
    assert row["id"] == saved[0]["id"] == "v0/0/step" and "time" not in row["messages"][0]
    turns = [question, {"role": "stream", "num_frames": 3}]
    inputs = processor(turns, row["video"], end=1.0, add_generation_prompt=True)
    out = model.generate(**inputs, max_new_tokens=512, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert saved[0]["prediction"] == {"text": processor.tokenizer.decode(out, skip_special_tokens=True).strip()}
    about = json.loads((prepared / "out" / "about.json").read_text())
    assert "drive home" in about["labels"]["coin_step"] and about["labels"]["coin_task"] == ["drive car", "wash car"]


@pytest.mark.xdist_group("preloaded")
def test_two_processes_share_the_rows_and_score_as_one(prepared, tmp_path):
    names = "coin_step,coin_task"
    alone = command(prepared, "--task", names, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    given = ["--checkpoint", prepared / "model", "--dataset", prepared / "out", "--task", names]
    given += ["--out", tmp_path / "two", "--video_root", prepared]
    done = launch("ddp", "train/evaluation.py", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1, "the first process scores"
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("alone", "two"))
    assert {name: result["rows"] for name, result in two.items()} == {"coin_step": 7, "coin_task": 2}
    for name, result in one.items():
        assert two[name]["scores"] == pytest.approx(result["scores"], rel=1e-4), name
    saved = [path.read_text().splitlines() for path in sorted((tmp_path / "two").glob("predictions-*.jsonl"))]
    assert sorted(map(len, saved)) == [4, 5]
    # A later run of one process reads the files of both, without loading the model.
    with patch.object(task_command, "load_checkpoint", side_effect=AssertionError):
        again = command(prepared, "--task", names, "--out", tmp_path / "two")
    assert again.returncode == 0 and again.stdout == done.stdout


def test_another_run_of_the_command_scores_only_or_is_refused(prepared, tmp_path):
    (prepared / "model" / "README.md").write_text("# A model\n")
    assert command(prepared, "--task", "coin_task", "--out", tmp_path, "--card").returncode == 0
    assert re.search(r"\| coin_task accuracy *\| [\d.]+", (prepared / "model" / "README.md").read_text())
    # The model is not loaded if only the scorer differs.
    with patch.object(task_command, "load_checkpoint", side_effect=AssertionError):
        again = command(prepared, "--task", "coin_task", "--out", tmp_path, "--official")
    assert again.returncode == 0 and "the published scorer" in again.stdout
    other = command(prepared, "--task", "coin_task", "--out", tmp_path, "--weights", "int8")
    assert other.returncode == 1
    assert "(weights was None, now int8). Give another --out, or delete it." in other.stderr


def test_a_judge_without_a_task_compares_narrations(prepared):
    with patch.dict(sys.modules, sentence_transformers=None):
        error = command(prepared, "--judge", "sentence").stderr
    assert (
        error.startswith("error: --judge sentence: The similarity 'sentence' needs an encoder")
        and error.count("\n") == 1
    )
    model, processor = tiny_model(mod_layers="all"), tiny_processor()
    row = ask(4, question="Narrate.")
    scores = free_streaming(model, processor, [row], similarity="exact", progress=False, max_new_tokens=3)
    task = find_task("narration")
    task.judge = "exact"
    found = [task.predict(Runner(model, processor, stream_options={"max_new_tokens": 3}), row)]
    of_task = task.score([row], found, {"fps": 2.0})
    assert {"match_f1_exact", "temporal_f1", "event_f1"} <= scores.keys() & of_task.keys()
    assert {name: scores[name] for name in scores.keys() & of_task.keys()} == {
        name: pytest.approx(of_task[name]) for name in scores.keys() & of_task.keys()
    }, "both commands print the same figures"


def test_settings_name_the_commit_of_a_checkpoint_of_the_hub(prepared, tmp_path):
    with Hub() as hub, hub.used_here(tmp_path / "home"):
        hub.repos["somebody/tiny"] = [{"config.json": (prepared / "model" / "config.json").read_bytes()}]
        first, again = (task_command._commit("somebody/tiny") for _ in range(2))
        hub.repos["somebody/tiny"].append(dict(hub.repos["somebody/tiny"][0]))
        assert first == again == commit_hash("somebody/tiny", 0) != task_command._commit("somebody/tiny")


def test_every_prepared_task_can_be_evaluated():
    names = {f"{source}_{task}" for source in CONVERTERS for task in find_converter(source).tasks}
    tasks = [find_task(name) for name in TASKS if name != "narration"]
    assert [
        name for name in sorted(names) if not any(task.wants({"task": name, "messages": []}) for task in tasks)
    ] == []


def test_the_only_evaluation_split_takes_the_place_of_the_default(prepared, tmp_path, capsys, monkeypatch):
    """COIN's publisher calls the second split validation."""
    # Accelerate keeps the wait of the first state, and that of the tasks comes later.
    monkeypatch.setattr(PartialState, "__init__", None)
    folder, source = tmp_path / "out", DataSource(str(tmp_path / "out"))
    shutil.copytree(prepared / "out", folder)
    chosen = []
    for splits in (("train", "validation"), ("validation", "test"), ("train",), ()):
        about = {"splits": {split: {"rows": 3} for split in splits}}
        (folder / "about.json").write_text(json.dumps(about))
        arguments = evaluation.EvaluationArguments(checkpoint=str(prepared / "model"))
        evaluation._choose_split(source, arguments)
        chosen.append(arguments.split)
    assert chosen == ["validation", "test", "test", "test"]
    assert capsys.readouterr().err == "There is no split test: this evaluates on validation.\n"
    monkeypatch.setenv("RANK", "1")
    (folder / "about.json").write_text(json.dumps({"splits": {"validation": {"rows": 3}}}))
    evaluation._choose_split(source, evaluation.EvaluationArguments(checkpoint=str(prepared / "model")))
    assert capsys.readouterr().err == "", "only the first process says so"


def test_mistakes_of_the_command_are_one_line(prepared):
    assert command(prepared, "--official").stderr == "error: --official is for tasks: give --task too.\n"
    error = "error: --judge endpoint is for tasks: give --task too.\n"
    assert command(prepared, "--judge", "endpoint", "--judge_url", "http://a", "--judge_model", "b").stderr == error
    error = "error: --tolerance is not for tasks: leave out --task or --tolerance.\n"
    assert command(prepared, "--task", "coin_step", "--tolerance", 1).stderr == error
    error = "error: --task coin_step: --max_new_tokens is for tasks that stream, and none of these does.\n"
    assert command(prepared, "--task", "coin_step", "--max_new_tokens", 3).stderr == error
    assert command(prepared, "--task", "coin_steps").stderr.startswith("error: --task coin_steps: there is no task")
    other = command(prepared, "--task", "coin_step", "--fps", 1)
    assert other.stderr.endswith("the rows are prepared for 2 frames per second: give --fps 2.\n")
