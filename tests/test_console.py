# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What programs print: counts, costs and the model's words."""

import json
import os
import subprocess
import sys
from pathlib import Path

from videollm_mod.console import counted, describe_entries, describe_saving, quiet, visible

import pytest
from programs import run_main, run_training
from published import save_source
from tiny import random_frames, tiny_model, tiny_processor, write_clip
from tqdm import tqdm

from videollm_mod.commands.folder import Narrated, Video, print_result
from videollm_mod.convert import command as convert
from videollm_mod.mistakes import one_line_errors
from videollm_mod.train import evaluation
from videollm_mod.train.arguments import run
from videollm_mod.train.data.sources import DataSource


ROOT = Path(__file__).parents[1]


def test_a_number_and_its_word_agree():
    assert [counted(number, "frame") for number in (0, 1, 2)] == ["0 frames", "1 frame", "2 frames"]
    assert [counted(number, "reply") for number in (1, 2)] == ["1 reply", "2 replies"] and counted(
        2, "day"
    ) == "2 days"
    assert (
        describe_entries([8, 3, 8, 3, 4], {1, 3, 4})
        == "8 in each of 2 full layers, up to 4 in each of 3 routed layers"
    )
    assert describe_entries([8, 3], {1}) == "8 in the full layer, 3 in the routed layer"


def test_a_model_without_routed_layers_is_not_compared_with_itself():
    assert describe_saving(6e8, 1e9, "FLOP", " here") == "0.6 GFLOP here, 1 at full compute (routing saves 40%)"
    assert describe_saving(1e9, 1e9, "FLOP", " here") == "1 GFLOP here"


def test_the_words_of_a_model_cannot_control_the_terminal():
    assert visible("a \x1b[31mred\x07 box\n\tand \u2764\ufe0f") == "a \ufffd[31mred\ufffd box\n\tand \u2764\ufe0f"


def test_a_file_name_cannot_control_the_terminal(capsys):
    name = "a\x1b]0;title\x07\nerror: b.mp4"
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError(f"'{name}' cannot be read.")
    video = Video(Path(name), name, Path("a.srt"))
    print_result(Narrated(video), as_json=False)
    print_result(Narrated(video, fault="It is empty."), as_json=False)
    out, err = capsys.readouterr()
    assert out == "a\ufffd]0;title\ufffd error: b.mp4: 0 captions in a.srt\n"
    assert err == "error: 'a\ufffd]0;title\ufffd\nerror: a\ufffd]0;title\ufffd error: b.mp4: It is empty.\n"


@pytest.fixture
def bars(monkeypatch):
    """The names of the bars that are drawn on stderr, those of libraries among them."""
    drawn, begin = [], tqdm.__init__

    def note(bar, *args, **options):
        begin(bar, *args, **options)
        if not bar.disable:
            assert options.get("file") is None, "a bar is drawn on stderr"
            drawn.append(bar.desc.removesuffix(": "))

    monkeypatch.setattr(tqdm, "__init__", note)
    return drawn


def test_each_stage_of_training_evaluation_and_conversion_draws_one_bar(tmp_path, bars):
    quiet()  # as these programs do when they start
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_processor().save_pretrained(model)
    write_clip(tmp_path / "clip.mp4", random_frames(20))
    row = {"video": "clip.mp4", "messages": [{"role": "assistant", "content": "A ball.", "time": 1.0}]}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    given = ["--checkpoint", model, "--dataset", tmp_path]
    how = ["--max_steps", 2, "--per_device_train_batch_size", 1, "--tune_language_model", "full"]
    how += ["--save_strategy", "no", "--report_to", "none", "--eval_split", "validation", "--eval_strategy", "steps"]
    trained = run_training(tmp_path / "out", *given, *how, "--eval_steps", 2)
    assert trained.returncode == 0, trained.stderr[-3000:]
    # One of the steps, and one of the rows that are evaluated after them.
    assert bars == ["", ""] and trained.stderr.count("100%|") >= 2
    bars.clear()
    options = [*given, "--split", "validation", "--max_new_tokens", 4]
    types = (DataSource, evaluation.EvaluationArguments)
    measured = run_main(lambda: run(evaluation.main, *types, dataset="streamworld"), *options, program="evaluation.py")
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert bars == ["teacher forcing", "streaming"]
    bars.clear()
    save_source("smolvlm", tmp_path / "theirs")
    converted = run_main(convert.main, tmp_path / "theirs", tmp_path / "ours", program="convert")
    # A line says what it loads. Files on the disk take seconds.
    assert converted.returncode == 0 and bars == [] and "loading " in converted.stderr


def test_a_script_without_the_training_packages_names_their_extra(tmp_path):
    """Its imports fail before `main` begins."""
    refuse = "import sys\nsys.modules |= dict.fromkeys(('datasets', 'pysubs2', 'trl'))\n"
    (tmp_path / "sitecustomize.py").write_text(refuse)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    scripts = [("sft.py", "trl"), ("data/subtitles.py", "pysubs2"), ("data/streamworld.py", "datasets")]
    for script, missing in [*scripts, ("data/shards.py", "datasets")]:
        done = subprocess.run(
            [sys.executable, ROOT / "train" / script, "--help"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        [line] = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("error: ") and missing in line
        assert line.endswith('`pip install -e ".[train]"` in the checkout installs what training and conversion need.')
