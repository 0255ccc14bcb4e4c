# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The model in lmms-eval: tasks made here run offline through its evaluator, with the embedded checkpoint."""

import json
import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile


# It installs only without its dependencies, as `make test` does. In CI it is there, so the tests are never skipped.
if find_spec("lmms_eval") is None and not os.environ.get("CI"):
    pytest.skip("lmms-eval is not installed; run `make test`", allow_module_level=True)

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table
from loguru import logger

from videollm_mod.train import harness
from videollm_mod.train.harness import Part, VideoLLMMoD, VideoLLMMoDChat, as_parts, chat_parts


# Importing lmms-eval makes Pillow accept damaged pictures. Other tests in this process must see them refused.
ImageFile.LOAD_TRUNCATED_IMAGES = False
# All tests share one model and one run of each class.
pytestmark = pytest.mark.xdist_group("harness")
ROOT = Path(__file__).parents[1]
CLIP = str(ROOT / "samples" / "streamworld.mp4")
QUESTION = "What do you see?"
CODE = """
def doc_to_visual(doc):
    return [doc["video"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def doc_of_round(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    return [doc["video"]], f"Again: {doc['question']}", round_idx == 2, previous_output, None

def keep(doc, results):
    return {"kept": results[0] if isinstance(results[0], list) else list(results)}

def collect(results):
    return " | ".join(" / ".join(texts) for texts in results)
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function code.doc_to_visual
doc_to_text: !function code.{text}
doc_to_target: answer
process_results: !function code.keep
generation_kwargs: {{max_new_tokens: 20, until: ["\\n"]}}
metric_list: [{{metric: kept, aggregation: !function code.collect, higher_is_better: true}}]
metadata: {{version: 0.0}}
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function code.doc_to_visual
doc_to_text: !function code.doc_to_text
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0.0}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks about a sample clip, with an answer that the model gives and one that it does not."""
    folder = tmp_path_factory.mktemp("tasks")
    about = {"video": CLIP, "question": QUESTION, "answer": "x"}
    docs = [
        {**about, "choices": ["A pink car on the left.", "A teal boat at the top."], "label": label}
        for label in (0, 1)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "code.py").write_text(CODE)
    named = {"docs": folder / "docs.jsonl"}
    single = GENERATE.format(name="single", kind="generate_until", text="doc_to_text", **named)
    rounds = GENERATE.format(name="rounds", kind="generate_until_multi_round", text="doc_of_round", **named)
    for name, text in (("single", single), ("rounds", rounds), ("choice", CHOICE.format(**named))):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def simple():
    return VideoLLMMoD(str(ROOT), device="cpu")


@pytest.fixture(scope="module")
def chat(simple):
    model = VideoLLMMoDChat(str(ROOT), device="cpu", batch_size="2")
    model.runner = simple.runner
    return model


def evaluate(model, tasks, *names):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    assert names[0] in make_table(found), "the command line ends with this table"
    return found["results"]


def row(question=QUESTION, end=8.0):
    """Return the row that asks what the tasks ask: after the last frame."""
    return {"video": CLIP, "messages": [{"role": "user", "content": question, "time": end}]}


def test_the_plugin_is_found_by_its_entry_point():
    (entry,) = entry_points(group="lmms_eval.models", name="videollm_mod")
    assert entry.module == harness.__name__
    registry = ModelRegistryV2()
    registry.register_manifest(getattr(harness, entry.attr)())
    assert registry.get_model_class("videollm_mod") is VideoLLMMoDChat
    assert registry.get_model_class("videollm_mod", force_simple=True) is VideoLLMMoD


def test_both_classes_answer_a_task_as_the_runner_does(simple, chat, tasks):
    [text] = simple.runner.answer(row(), max_new_tokens=20)
    assert len(text.split()) > 3
    assert evaluate(simple, tasks, "single")["single"]["kept,none"] == f"{text} | {text}"
    assert evaluate(chat, tasks, "single")["single"]["kept,none"] == f"{text} | {text}"


def test_rounds_have_their_own_questions(simple, chat, tasks):
    texts = [
        simple.runner.answer(row(question), max_new_tokens=20)[0] for question in (QUESTION, f"Again: {QUESTION}")
    ]
    for model in (simple, chat):
        assert evaluate(model, tasks, "rounds")["rounds"]["kept,none"] == " | ".join([" / ".join(texts)] * 2)


def test_a_stream_may_speak_before_the_question(tasks):
    model = VideoLLMMoD(str(ROOT), device="cpu", mode="stream", interval_threshold=0.999)
    session = model.runner.model.stream(model.runner.processor, fps=2, interval_threshold=0.999, max_new_tokens=20)
    for time, frame in model.runner.processor.read_video(CLIP, fps=2):
        session.push(frame, time=time)
    assert session.events, "the model says nothing of its own accord: this threshold tests nothing"
    said = session.ask(QUESTION)[-1].text
    assert evaluate(model, tasks, "single")["single"]["kept,none"] == f"{said} | {said}"
    with pytest.raises(ValueError, match="mode=offline"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="shows nothing"):
        model._stream(as_parts([], QUESTION), {})
    with pytest.raises(ValueError, match="cannot have said"):
        model._stream([*as_parts([CLIP], QUESTION), Part("assistant", "A car.")], {})


def test_the_likelier_choice_counts(simple, chat, tasks):
    docs = [json.loads(line) for line in (tasks / "docs.jsonl").read_text().splitlines()]
    scores = simple.runner.likelihoods(row(), docs[0]["choices"])
    assert abs(scores[0] - scores[1]) > 1
    # Of two documents with the same choices, one has the likelier as its label.
    assert evaluate(simple, tasks, "choice")["choice"]["acc,none"] == 0.5
    best = scores.index(max(scores))
    (tasks / "docs.jsonl").write_text("".join(json.dumps({**doc, "label": best}) + "\n" for doc in docs))
    assert evaluate(simple, tasks, "choice")["choice"]["acc,none"] == 1.0
    with pytest.raises(ValueError, match="--force_simple"):
        chat.loglikelihood([])


# ------------------------------------------------------------------------------------------------------------- prompts


def features_of(model, *parts):
    turns, features = model._prompt(list(parts))
    return [(turn["role"], turn.get("num_frames", turn.get("content"))) for turn in turns[1:]], features


def test_a_prompt_has_media_of_all_kinds_in_order(simple, tmp_path):
    picture = Image.fromarray(np.full((64, 48), 200, dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "First"},
                {"type": "text", "text": "a picture."},
                {"type": "image", "url": picture},
                {"type": "image", "url": str(tmp_path / "picture.png")},
                {"type": "video", "url": CLIP, "start_time": 2.0, "end_time": 4.0},
                {"type": "text", "text": "What now?"},
            ],
        },
        {"role": "assistant", "content": "Nothing."},
        {"role": "user", "content": "And now?"},
    ]
    turns, features = simple._prompt(chat_parts(messages))
    assert [(turn["role"], turn.get("num_frames", turn.get("content"))) for turn in turns] == [
        ("system", "Be brief."),
        ("user", "First\na picture."),
        ("stream", 7),
        ("user", "What now?"),
        ("assistant", "Nothing."),
        ("user", "And now?"),
    ]
    assert len(features) == 7
    np.testing.assert_allclose(features[0], features[1])
    assert simple.runner.answer_prompts([(turns, features)], max_new_tokens=5)[0][0]


def test_media_may_come_with_times():
    given = {"type": "video", "url": CLIP, "video_start": 2.0, "video_end": 4.0}
    assert as_parts([given], "?")[0] == Part("stream", media=CLIP, start=2.0, end=4.0)
    assert chat_parts([{"role": "user", "content": [{"type": "video", "url": given}]}]) == as_parts(given, "?")[:1]
    with pytest.raises(TypeError, match="got 5"):
        as_parts([5], "?")
    with pytest.raises(TypeError, match="does not hear"):
        chat_parts([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])


def test_options_are_those_of_the_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    model = VideoLLMMoD(str(ROOT), device="cpu", fps=1.0, system_prompt=str(tmp_path / "prompt.txt"), dtype="bfloat16")
    turns, features = model._prompt(as_parts([CLIP], QUESTION))
    assert turns[0] == {"role": "system", "content": "Be brief."} and turns[1]["num_frames"] == len(features) == 9
    assert features.dtype == torch.bfloat16
    context, per_frame = 16384, model.runner.model.config.frame_num_tokens + model.runner.processor.frame_text_tokens
    assert model.max_frames == (context - 1024) // per_frame


def test_a_long_video_is_seen_to_its_end(simple, monkeypatch):
    every, features = features_of(simple, *as_parts([CLIP], QUESTION))
    assert every == [("stream", 17), ("user", QUESTION)]
    monkeypatch.setattr(simple, "max_frames", 4)
    few, sampled = features_of(simple, *as_parts(CLIP, f"<image>\n{QUESTION}"))
    assert few == [("stream", 4), ("user", QUESTION)]
    # 8.5 s at 4 frames: a frame each 2.125 s.
    np.testing.assert_allclose(sampled[0], features[0])
    assert not np.allclose(sampled[3], sampled[0])


def test_text_only_is_a_prompt_too(simple):
    for parts in (as_parts(None, "Hello."), as_parts([], "Hello.")):
        turns, features = simple._prompt(parts)
        assert [turn["role"] for turn in turns] == ["system", "user"] and len(features) == 0
        [[text]] = simple.runner.answer_prompts([(turns, features)], max_new_tokens=5)
        assert isinstance(text, str)
        assert simple.runner.score_prompt((turns, features), ["Yes."])[0].total < 0


def test_a_request_that_cannot_be_answered_does_not_end_the_run(simple):
    prompts = [
        ("a 1", lambda: as_parts(["missing.mp4"], "?"), {"max_new_tokens": 5}),
        ("a 2", lambda: as_parts([{"array": np.zeros(5), "sampling_rate": 16000}], "?"), {"max_new_tokens": 5}),
        ("a 3", lambda: as_parts([CLIP], "word " * 10000), {"max_new_tokens": 5}),
        ("a 4", lambda: as_parts([CLIP], QUESTION), {"max_new_tokens": 5, "until": "car"}),
    ]
    said = []
    sink = logger.add(lambda message: said.append(str(message)))
    answers = simple._answer_all(iter(prompts))
    logger.remove(sink)
    assert answers[:3] == [""] * 3 and answers[3] and "car" not in answers[3]
    for line, words in zip(said, ("a 1: There is no", "a 2: the model does not hear", "a 3: the prompt"), strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "live"}, "offline, stream"), ({"batch_size": "auto"}, "positive number"), ({"fps": 0}, "fps")],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        VideoLLMMoD(str(ROOT), device="cpu", **options)
