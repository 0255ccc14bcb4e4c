# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: free streaming, the command, and the results on model cards."""

import json
import random
import re
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import random_frames, tiny_model, tiny_processor, write_clip, write_noisy_clip
from transformers import AutoConfig

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor
from videollm_mod.serving import StreamingEngine
from videollm_mod.train import evaluation, recipe_measures, sft, streaming_evaluation
from videollm_mod.train.arguments import parse
from videollm_mod.train.card import HEADLINES, add_results, copy_training, describe_cost, write_measures
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.timed_messages import NARRATE, TimedMessages
from videollm_mod.train.data.world.clip import WORLDS
from videollm_mod.train.data.world.rows import streamworld_dataset
from videollm_mod.train.evaluation import EvaluationArguments
from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig
from videollm_mod.train.streaming_evaluation import free_streaming, stream_example, stream_examples
from videollm_mod.train.teacher_forcing import evaluate_metric, teacher_forced


ROOT = Path(__file__).parents[1]


def dialogue(frames, *replies, questions=()):
    messages = [{"role": "assistant", "content": text, "time": time} for time, text in replies]
    messages += [{"role": "user", "content": text, "time": time} for time, text in questions]
    order = {"user": 0, "assistant": 1}
    messages.sort(key=lambda message: (message["time"], order[message["role"]]))
    return {"video": random_frames(frames, seed=frames), "messages": messages}


# --------------------------------------------------------------------------------------------------- free streaming


def said(*events):
    return [{"time": time, "text": text} for time, text in events]


def test_each_event_matches_once_and_within_the_tolerance():
    metric = evaluate_metric("stream_events")
    scores = metric.compute(
        predictions=[said((1.0, "A ball enters."), (1.5, "a  Ball enters."), (5.0, "It leaves.")), said()],
        references=[said((1.5, "A ball enters."), (4.0, "It leaves.")), said((2.0, "A box."))],
        tolerance=0.5,
    )
    assert scores["event_precision"] == pytest.approx(1 / 3) and scores["event_recall"] == pytest.approx(1 / 3)
    assert scores["event_f1"] == pytest.approx(1 / 3)
    wide = metric.compute(
        predictions=[said((5.0, "It leaves."))], references=[said((4.0, "It leaves."))], tolerance=1.0
    )
    assert wide["event_f1"] == 1.0 and wide["event_delay"] == 1.0


def test_the_nearest_event_does_not_take_the_partner_of_another():
    metric = evaluate_metric("stream_events")
    predictions, references = (
        said((1.0, "It blinks."), (1.8, "It blinks.")),
        said((0.55, "It blinks."), (1.4, "It blinks.")),
    )
    assert metric.compute(predictions=[predictions], references=[references], tolerance=0.5)["event_f1"] == 1.0


def test_as_many_events_are_right_as_there_can_be():
    """Random events: the score has the count of the best pairing, found by trying all."""
    rng, metric = random.Random(0), evaluate_metric("stream_events")

    def best(told, true):
        if not told:
            return 0
        first, *others = told
        near = [one for one in true if one["text"] == first["text"] and abs(one["time"] - first["time"]) <= 0.5 + 1e-6]
        return max(
            best(others, true), *(1 + best(others, [other for other in true if other is not one]) for one in near), 0
        )

    for _ in range(60):
        told, true = (
            said(*((rng.randrange(30) / 10, rng.choice("AAB")) for _ in range(rng.randrange(1, 6)))) for _ in range(2)
        )
        precision = metric.compute(predictions=[told], references=[true])["event_precision"]
        assert round(precision * len(told)) == best(told, true), (told, true)


def test_the_delay_includes_events_beyond_the_tolerance():
    metric = evaluate_metric("stream_events")
    predictions = [said((4.0, "A ball enters."), (9.0, "It  leaves."), (1.0, "A box.")), said((2.0, "Nothing."))]
    references = [said((1.0, "A ball enters."), (9.5, "It leaves."), (1.0, "A car.")), said((2.0, "A box."))]
    scores = metric.compute(predictions=predictions, references=references, tolerance=0.5)
    # One event is 3 s late and one is 0.5 s early. The other texts are wrong.
    assert scores["event_delay"] == pytest.approx((3.0 - 0.5) / 2) and scores["event_precision"] == 1 / 4
    narrow = metric.compute(predictions=predictions, references=references, tolerance=0.5, delay_window=2.0)
    assert narrow["event_delay"] == -0.5 and narrow["event_f1"] == scores["event_f1"]
    assert metric.compute(predictions=[said()], references=[said((2.0, "A box."))])["event_delay"] == 0.0


def test_each_event_has_one_delay_and_the_nearest_matches_first():
    metric = evaluate_metric("stream_events")
    texts = said((3.0, "It moves."), (3.4, "It moves."), (7.0, "It moves."))
    references = [said((1.0, "It moves."), (3.5, "It moves."))]
    scores = metric.compute(predictions=[texts], references=references)
    # The text at 3.4 s matches the second event. The text at 3.0 s matches the first, 2 s late. The last matches none.
    assert scores["event_delay"] == pytest.approx((2.0 - 0.1) / 2)
    fewer = metric.compute(predictions=[texts[1:]], references=references)
    assert fewer["event_delay"] == pytest.approx(-0.1), "the text at 7.0 s is too far from the event at 1.0 s"


def test_answer_accuracy_ignores_case_spaces_and_final_dots():
    metric = evaluate_metric("answer_accuracy")
    assert metric.compute(predictions=["Red", "", "The  car."], references=["red.", "Two.", "The car."]) == {
        "answer_accuracy": pytest.approx(2 / 3)
    }


class ScriptedModel:
    """A model that speaks given texts at given times, and gives one answer to every question or a list of answers."""

    def __init__(self, script, answer):
        self.script, self.answer = script, answer

    def stream(self, _processor, fps):
        model, events = self, []

        class Session(SimpleNamespace):
            def push(self, _frame, time):
                self.time, self.num_frames = time, self.num_frames + 1
                if time in model.script and not self.waiting:
                    events.append(event(time, "assistant", model.script[time], 0.1))
                for question in self.waiting:
                    self.ask(**question)
                self.waiting = []

            def ask(self, text, reply_now, time=None):
                if time is not None:
                    self.waiting.append({"text": text, "reply_now": reply_now})
                    return
                events.append(event(self.time, "user", text, None))
                self.asked.append((self.time, reply_now))
                if reply_now:
                    text = model.answer if isinstance(model.answer, str) else model.answer.pop(0)
                    events.append(event(self.time, "assistant", text, None))

            def close(self):
                model.asked = self.asked

        return Session(events=events, num_frames=0, time=None, asked=[], waiting=[], fps=fps)


def event(time, role, text, probability):
    return SimpleNamespace(time=time, role=role, text=text, interval_probability=probability, latency=0.25)


def test_free_streaming_scores_equal_values_computed_by_hand():
    processor = tiny_processor()
    example = dialogue(
        12,
        (1.0, "A ball."),
        (2.0, "Red."),
        (4.0, "It leaves."),
        questions=[(0.0, "Narrate."), (2.0, "Which color?")],
    )
    # "Hm." is never said: at 0.0 s and 2.0 s the user speaks.
    model = ScriptedModel({0.0: "Hm.", 2.0: "Hm.", 1.0: "A ball.", 3.0: "Nonsense here.", 4.5: "It leaves."}, "red")
    scores = free_streaming(model, processor, [example], batch_size=1, progress=False)
    assert model.asked == [(0.0, False), (2.0, True)], "only the second has an immediate answer in the data"
    assert scores["event_precision"] == pytest.approx(2 / 3) and scores["event_recall"] == 1.0
    assert scores["event_delay"] == pytest.approx(0.25) and scores["answer_accuracy"] == 1.0
    # Ten of twelve frames should be silent. The model speaks at two of these, 3.0 s and 4.5 s.
    assert scores["silent_frames_right"] == pytest.approx(8 / 10)
    assert scores["words_per_minute"] == pytest.approx(60 * 7 / 6) and scores["first_word_latency"] == 0.25
    # A segment ends a frame after its words: 0-1.5, 1.5-3.5 and 3.5-5, beside 0-1 and 1-4.
    assert scores["temporal_precision"] == pytest.approx(2 / 3) and scores["temporal_recall"] == 1.0
    assert scores["rouge_l"] == pytest.approx(1 / 2), "the second event is nearest to the nonsense"
    assert scores["missing_rate_token_f1"] == 0.0 and scores["redundant_rate_token_f1"] == pytest.approx(1 / 3)
    assert scores["match_f1_token_f1"] == pytest.approx(2 * (2 / 3) / (5 / 3))


def test_the_same_question_asked_again_has_its_own_answer():
    processor = tiny_processor()
    times = (2.0, 3.0, 4.0)
    answers = [(time, answer) for time, answer in zip(times, ("None.", "One.", "One."), strict=True)]
    example = dialogue(12, *answers, questions=[(time, "How many?") for time in times])

    model = ScriptedModel({}, ["None.", "One.", "Two."])
    scores = free_streaming(model, processor, [example], batch_size=1, progress=False)
    assert scores["answer_accuracy"] == pytest.approx(2 / 3)


def test_both_evaluations_run_on_a_real_model():
    processor, model = tiny_processor(), tiny_model()
    examples = list(streamworld_dataset("validation", num_clips=2, world=WORLDS["small"], size=24))
    events, frames = stream_example(model, processor, examples[0], max_new_tokens=5)
    assert frames == len(examples[0]["video"]) and events[0].role == "user"
    forced = teacher_forced(model, processor, examples, progress=False)
    live = {"lm_ppl", "lm_correctness", "time_diff", "fluency"}
    assert forced["lm_ppl"] > 1 and set(forced) == live | {"reply_delay", "reply_fluency"}
    free = free_streaming(model, processor, examples, progress=False, max_new_tokens=5)
    assert 0 <= free["event_f1"] <= 1 and free["words_per_minute"] >= 0
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("\n## Run published benchmarks")[0]
    # Those with --task only are computed by the tasks.
    rows = re.findall(r"^\| (`[^|]*) \| (?!.*, with `--task`)", page, flags=re.MULTILINE)
    defined = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    need_more = {"meteor_1.5", "meteor_1.5_wordnet", "meteor_wordnet"}  # Java or WordNet
    assert defined - need_more == {*forced, *free, "answer_accuracy"} - need_more, "these rows have no questions"


def spoken(events):
    return [(e.time, e.frame, e.role, e.text, e.token_ids, e.interrupted) for e in events]


@pytest.fixture
def engines(monkeypatch):
    """Collect all engines that a test creates."""
    created = []

    def create(*args, **options):
        created.append(StreamingEngine(*args, **options))
        return created[-1]

    monkeypatch.setattr(streaming_evaluation, "StreamingEngine", create)
    return created


@pytest.fixture(scope="module")
def trained():
    """Return the embedded model, its processor, and rows of all kinds and different lengths. The last is a file."""
    checkpoint = ROOT
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(checkpoint).eval()
    kinds = {"narrate": 1.0, "ask": 1.0, "wait": 1.0}
    rows = list(streamworld_dataset("test", num_clips=7, world=WORLDS["tiny"], kinds=kinds))
    assert {row["kind"] for row in rows} == set(kinds)
    for row, count in ((rows[0], 12), (rows[3], 9)):
        row["video"] = row["video"][:count]
    messages = [{"role": "user", "content": NARRATE, "time": 1.0}]
    file = {"video": str(ROOT / "samples" / "streamworld.mp4"), "messages": messages, "start": 1.0}
    return model, VideoLLMMoDProcessor.from_pretrained(checkpoint), [*rows, file]


@pytest.mark.parametrize("options", [{}, {"cache_dtype": torch.float8_e4m3fn, "interval_threshold": 0.9}])
def test_clips_streamed_together_give_the_same_events_as_one_by_one(trained, engines, options):
    model, processor, rows = trained
    read_rows = []

    def read():
        for row in rows:
            read_rows.append(row)
            yield row

    expected = {id(row): stream_example(model, processor, row, **options) for row in rows}
    ended = []
    for row, events, count in stream_examples(model, processor, read(), batch_size=3, **options):
        expected_events, expected_count = expected[id(row)]
        assert (spoken(events), count) == (spoken(expected_events), expected_count)
        ended.append(row)
        assert len(read_rows) <= len(ended) + 4, "rows are read only when needed"
    assert len(ended) == len(rows) and any(event.role == "assistant" for event in expected[id(rows[-1])][0])
    # The first clip is short, so longer clips need a larger engine. No clip is streamed in a separate session.
    assert len(engines) > 1 and max(len(row["video"]) for row in rows[:-1]) <= engines[-1].max_frames
    assert sum(engine.stats.shared_steps for engine in engines) > 20
    assert sum(engine._num_opened for engine in engines) == len(rows)


def test_clips_that_exceed_an_engine_get_separate_sessions(engines, monkeypatch):
    """A clip longer than the context, a clip of unknown length, and a clip with too much text."""
    processor, model = tiny_processor(), tiny_model(text_overrides={"max_position_embeddings": 11 * 14})
    rows = [dialogue(count, (1.0, "It moves."), questions=[(2.0, "Where?"), (2.5, "Why?")]) for count in (6, 20, 10)]
    rows.append({**rows[0], "video": OfUnknownLength(rows[0]["video"])})

    def check(**options):
        ended = list(stream_examples(model, processor, rows, batch_size=3, max_new_tokens=2, **options))
        for row, events, count in ended:
            expected_events, expected_count = stream_example(model, processor, row, max_new_tokens=2, **options)
            assert (spoken(events), count) == (spoken(expected_events), expected_count)
        assert len(ended) == len(rows)

    check()
    assert sum(engine._num_opened for engine in engines) == 2
    monkeypatch.setattr(streaming_evaluation, "_TEXT_TOKENS", 20)
    engines.clear()
    check()
    assert sum(engine._num_opened for engine in engines) == 2
    # With `max_frames`, every clip gets a session of its own, which forgets as the option says.
    engines.clear()
    check(max_frames=4)
    assert not engines
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        free_streaming(model, processor, rows, batch_size=0)


class OfUnknownLength:
    """Frames without a length."""

    def __init__(self, frames):
        self.frames = frames

    def __iter__(self):
        return iter(self.frames)


def test_the_card_of_a_training_run_has_its_results(tmp_path, monkeypatch):
    command = ["--dataset", "streamworld", "--world", "tiny", "--checkpoint", ROOT]
    command += ["--num_clips", 4, "--max_steps", 1, "--logging_steps", 1, "--report_to", "none", "--lora_r", 4]
    command += ["--per_device_train_batch_size", 1, "--eval_split", "validation", "--num_eval_clips", 2]
    command += ["--num_streamed_clips", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "no"]
    command += ["--gradient_checkpointing", "false", "--use_cpu", "true", "--output_dir", tmp_path]
    monkeypatch.setattr("sys.argv", ["sft.py", *map(str, command)])
    sft.main(*parse(ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments))
    card = ModelCard.load(tmp_path / "README.md").text
    training, measured = card.split("## Training\n")[1].split("## Evaluation\n")
    assert "| lr_scheduler_type | " in training and "SchedulerType" not in training
    assert (
        re.search(r"\nTrained on .+, \d+ \w+ \d{4}, with Transformers ", training)
        and (tmp_path / "loss.png").is_file()
    )
    found = dict(re.findall(r"\| (\w+) \| ([-+\d.e]+) \|", measured))
    assert {"loss", "lm_ppl", "time_diff", "event_f1", "event_delay", "first_word_latency"} <= found.keys()
    assert float(found["lm_ppl"]) > 1 and 0 < float(found["first_word_latency"]) < 60


FACTS = ROOT / "docs" / "embedded-checkpoint.md"
WORLD_TITLES = ("StreamWorld, tiny", "DoomWorld, clips of 8 to 15 s")


def test_the_embedded_checkpoint_page_states_the_cost_of_its_configuration():
    text = FACTS.read_text(encoding="utf-8").replace(f"({FACTS.stem}-routing.png)", "(routing.png)")
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert all(part in text for part in describe_cost(config)) and "| 1 | 79.6 | 210 |" in text


def test_the_embedded_checkpoint_page_states_training_and_results():
    card, text = ModelCard.load(ROOT / "README.md"), FACTS.read_text(encoding="utf-8")
    training = text.split("## Training\n")[1].split("\n## ")[0]
    settings = yaml.safe_load((ROOT / "train" / "configs" / "streamworld_questions.yaml").read_text())
    shown = dict(re.findall(r"\| (\w+) \| (\S+) \|", training))
    # The size of the run and the machine decide the rows of a step, epochs and dtype. The page has its own seed.
    common = settings.keys() & shown.keys() - {"per_device_train_batch_size", "num_train_epochs", "bf16", "seed"}
    assert {"learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"} <= common
    assert {name: str(settings[name]) for name in common} == {name: shown[name] for name in common}
    assert f"![Loss over steps]({FACTS.stem}-loss.png)" in training and "\nData: " in training
    assert 5_000 < FACTS.with_name(f"{FACTS.stem}-loss.png").stat().st_size < 60_000
    # The page and the README's model index agree, and `make checkpoint` runs the commands that they name.
    parts = {name: [r for r in card.data.eval_results if r.dataset_name == name] for name in WORLD_TITLES}
    assert sum(map(len, parts.values())) == len(card.data.eval_results)
    for name, results in parts.items():
        measured = text.split(f"## Evaluation on {name}, test\n")[1].split("\n## ")[0]
        found = {name: float(value) for name, value in re.findall(r"\| (\w+) \| ([-\d.]+) \|", measured)}
        assert {r.metric_type: r.metric_value for r in results} == {name: found[name] for name in HEADLINES}
        (command,) = {r.dataset_args["command"] for r in results}
        assert f"with `{command}`." in measured
        assert f"/{command} --card\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(r"\nMeasured on .+, \d{1,2} [A-Z][a-z]+ \d{4}, ", measured), "hardware and date"
    assert re.search(r"\nTrained on .+, \d{1,2} [A-Z][a-z]+ \d{4}, ", training), "hardware and date"


def test_training_facts_are_copied_into_a_page(tmp_path):
    (tmp_path / "made").mkdir()
    for name in ("routing.png", "loss.png"):
        (tmp_path / "made" / name).write_bytes(name.encode())
    (tmp_path / "made" / "README.md").write_text(
        "---\nlicense: mit\n---\n# made\n\n## What it costs\n\n![Kept](routing.png)\n\n"
        "## Training\n\nNew.\n\n![Loss](loss.png)\n\n## Limits\n\nOthers.\n"
    )
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Training\n\nOld.\n\n## Limits\n\nIts own.\n")
    copy_training(tmp_path / "made", page)
    assert page.read_text() == (
        "# Page\n\n## Training\n\nNew.\n\n![Loss](page-loss.png)\n\n"
        "## What it costs\n\n![Kept](page-routing.png)\n\n## Limits\n\nIts own.\n"
    )
    assert (tmp_path / "page-loss.png").read_bytes() == b"loss.png" and (tmp_path / "page-routing.png").is_file()


def test_figures_of_the_recipe_are_written_into_a_page(tmp_path):
    """Missing shares are shown as such, and a model without routers has no table of them."""
    found = {"covered": 0.75, "background": None, "lift": 2.5, "lift_low": 2.0, "lift_high": 3.0}
    after = {"event_f1": 0.875, "routers": {"layers": {"2": found}, "mean": found, "together": found}}
    measures = {"labels": {"event_f1": "F1"}, "hardware": "2 CPU cores", "date": "1 May 2026", "command": "make it"}
    columns = {"before": {"event_f1": 0.0}, "after": after, "full compute": {"event_f1": 0.5}}
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Compared with full compute\n\nOld.\n\n## Limits\n\nIts own.\n")
    write_measures(measures | {"worlds": {"StreamWorld, hard": columns}}, page)
    text = page.read_text()
    assert text.startswith("# Page\n\n## Compared with full compute\n\nThe same") and text.endswith("Its own.\n")
    assert (
        "### StreamWorld, hard\n\n| figure | after | full compute |\n| --- | --- | --- |\n| F1 | 0.875 | 0.5 |" in text
    )
    assert text.count("| 75% | - | 2.5 (2 to 3) |") == 3 and "Old" not in text
    assert "Measured on 2 CPU cores, 1 May 2026, with `make it`." in text


def test_all_measures_are_of_the_rows_that_can_be_read(tmp_path, capsys):
    """A video that ends early only when it is decoded is left out of both groups of measures, or named."""
    write_clip(tmp_path / "good.mp4", random_frames(20))
    write_noisy_clip(tmp_path / "noisy.mp4", 40, noise_from=20)
    clips = {"good.mp4": 1.5, "noisy.mp4": 3.5}
    told = [[{"role": "assistant", "content": "A ball.", "time": time}] for time in clips.values()]
    rows = [{"video": name, "messages": messages} for name, messages in zip(clips, told, strict=True)]
    lines = [json.dumps(row) + "\n" for row in rows]
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    options = {"checkpoint": str(tmp_path / "model"), "split": "train", "max_new_tokens": 4}

    def measure(data, **more):
        (tmp_path / "train.jsonl").write_text("".join(data))
        evaluation.main(TimedMessages(str(tmp_path)), evaluation.EvaluationArguments(**options, **more))
        return json.loads(capsys.readouterr().out)

    expected = {k: v for k, v in measure(lines[:1]).items() if k != "first_word_latency"}
    assert measure([*lines, "null"], skip_faulty=True).items() >= expected.items()
    with pytest.raises(SystemExit, match=f"error: '{tmp_path}/train.jsonl', line 2: Message 0 is at 3.5 s"):
        measure(lines)


def test_a_card_shows_no_folders_and_secrets_of_the_command(tmp_path, monkeypatch):
    """A card is published, and names of folders often have the name of a person."""
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A narrator\n")
    (tmp_path / "config.json").write_text("{}")
    given = ["--checkpoint", str(tmp_path), "--dataset=/home/joe/my talks.jsonl", "--task", "coin", "--card"]
    given += ["--judge", "endpoint", "--judge_model", "m", "--judge_url", "https://joe:secret@host/v1?key=token"]
    monkeypatch.setattr("sys.argv", ["evaluation.py", *given])
    source, arguments = parse(DataSource, EvaluationArguments)
    evaluation._write_card(source, arguments, {"event_f1": 0.5})
    card = ModelCard.load(tmp_path / "README.md")
    expected = f"python train/evaluation.py --checkpoint {tmp_path.name} '--dataset=my talks.jsonl' --task coin "
    expected += "--judge endpoint --judge_model m --judge_url 'https://joe:***@host/v1?***'"
    assert {result.dataset_args["command"] for result in card.data.eval_results} == {expected}
    monkeypatch.setattr("sys.argv", ["recipe.py", "--begin", "/home/joe/checkpoint", "--size", "quick"])
    recipe_measures.write_measures({}, tmp_path / "measures.json")
    written = json.loads((tmp_path / "measures.json").read_text())
    assert written["command"] == "python train/recipe.py --begin checkpoint --size quick"


def test_results_are_written_into_the_card(tmp_path):
    """They are a Hub model index with their command, and new results replace old ones."""
    text = "# A narrator\n\nIts text.\n\n## Limits\n\nIt can be wrong.\n"
    (tmp_path / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n\n{text}")
    for score in (0.5, 0.75):
        add_results(
            tmp_path, {"event_f1": score, "time_diff": 0.1}, dataset="StreamWorld, tiny", split="test", command="c"
        )
    add_results(tmp_path, {"lm_ppl": 2.0}, dataset="talks.jsonl", split="test", command="d")
    card = ModelCard.load(tmp_path / "README.md")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("StreamWorld, tiny", "event_f1"): 0.75,
        ("StreamWorld, tiny", "time_diff"): 0.1,
        ("talks.jsonl", "lm_ppl"): 2.0,
    }
    assert card.data.model_name == "A narrator"
    # The text has a section per data set before the limits. It names the hardware, the date and the command.
    begin, first, second, limits = card.text.split("\n\n## ")
    assert begin.strip() == "# A narrator\n\nIts text." and limits.strip() == "Limits\n\nIt can be wrong."
    assert first.startswith("Evaluation on StreamWorld, tiny, test\n") and "| event_f1 | 0.75 |" in first
    today = date.today()
    assert (
        re.search(rf"\nMeasured on .+, {today.day} {today:%B %Y}, with `d`\.$", second)
        and "| lm_ppl | 2.0 |" in second
    )
    assert {r.dataset_args["command"] for r in card.data.eval_results} == {"c", "d"}
    # In a checkout, the section goes to a page in docs/, and the README gets only the figures.
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "embedded-checkpoint.md").write_text("# Facts\n\n## Limits\n\nMany.\n")
    add_results(tmp_path, {"lm_ppl": 3.0}, dataset="talks.jsonl", split="test", command="e")
    facts = (tmp_path / "docs" / "embedded-checkpoint.md").read_text()
    assert "| lm_ppl | 3.0 |" in facts and facts.endswith("with `e`.\n\n## Limits\n\nMany.\n")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[-1].metric_value == 3.0 and "| lm_ppl | 2.0 |" in card.text
    with pytest.raises(FileNotFoundError, match="has no README.md"):
        add_results(tmp_path / "nowhere", {}, dataset="x", split="test", command="c")
