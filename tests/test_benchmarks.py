# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The benchmarks run and write what they say; how fast anything is, no test asks."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import streaming
import torch
import training


ROOT = Path(__file__).resolve().parents[1]


def run(script, *options):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_streaming_with_random_weights_beside_the_plain_loop(tmp_path):
    options = ["--tokens", 10, "--contexts", 2, 4, "--steps", 2, "--streams", 1, 2, "--stream-context", 2]
    printed = run("streaming.py", *options, "--schemes", "full", "all_deep", "--out", tmp_path)
    figures = json.loads((tmp_path / "streaming.json").read_text())
    assert [(row["scheme"], row["context"]) for row in figures["rows"]] == [
        (scheme, context) for context in (2, 4) for scheme in ("full", "plain loop", "all_deep")
    ]
    full, plain, routed = (row["cache_mb"] for row in figures["rows"][3:])
    assert full == plain > routed and all(row["floor"] < row["p50"] <= row["p99"] for row in figures["rows"])
    for kind in ("times_plain", "together_times_plain"):
        assert all((row[kind] == 1) == (row["scheme"] == "plain loop") for row in figures["rows"])
    assert [(row["scheme"], row["streams"]) for row in figures["streams"]] == [
        (scheme, streams) for streams in (1, 2) for scheme in ("full", "all_deep")
    ]
    assert printed.strip() == (tmp_path / "streaming.md").read_text().strip()
    assert {"latency.png", "streams.png"} <= {path.name for path in tmp_path.iterdir()}


def test_compiled_steps_are_measured_beside_the_others(tmp_path):
    options = ["--tokens", 10, "--contexts", 2, "--steps", 1, "--tries", 1, "--streams", "--schemes", "full"]
    run("streaming.py", *options, "--compile", "--out", tmp_path)
    rows = json.loads((tmp_path / "streaming.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["full", "full, compiled", "plain loop"]
    assert len({row["cache_mb"] for row in rows}) == 1 and None not in [row["times_plain"] for row in rows]


def test_figures_are_written_as_they_come(tmp_path, monkeypatch):
    measure = streaming.measure_context
    given = ["--tokens", "10", "--contexts", "2", "3", "--steps", "1", "--tries", "1", "--schemes", "full"]
    monkeypatch.setattr(sys, "argv", ["streaming.py", *given, "--streams", "--out", str(tmp_path)])

    def breaks(ways, context, *rest):
        if context == 3:
            raise KeyboardInterrupt
        return measure(ways, context, *rest)

    monkeypatch.setattr(streaming, "measure_context", breaks)
    with pytest.raises(KeyboardInterrupt):
        streaming.main()
    rows = json.loads((tmp_path / "streaming.json").read_text())["rows"]
    assert [(row["scheme"], row["context"]) for row in rows] == [("full", 2), ("plain loop", 2)]
    assert "| 10 | 2 | full |" in (tmp_path / "streaming.md").read_text()


def test_the_shape_of_siglip_l_needs_no_hub():
    options = Namespace(shape="tiny", schemes=["full"], weights=None, dtype=torch.bfloat16, device="meta")
    options.encoder = "siglip-l"
    vision = streaming.build_all(10, options)["full"].config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (1024, 24, 384)


def test_what_is_stored_in_eight_bits_is_counted_as_such(tmp_path):
    options = ["--tokens", 10, "--contexts", 2, "--steps", 1, "--tries", 1, "--streams", 1, "--stream-context", 2]
    options += ["--schemes", "full", "--dtype", "bfloat16"]
    figures = []
    for name, eight in (("sixteen", []), ("eight", ["--weights", "int8", "--cache", "fp8"])):
        printed = run("streaming.py", *options, *eight, "--out", tmp_path / name)
        figures.append(json.loads((tmp_path / name / "streaming.json").read_text()))
    assert "random weights in int8, keys and values in fp8, " in printed
    (full, plain), (eight_full, eight_plain) = ([row["cache_mb"] for row in x["rows"]] for x in figures)
    assert full == plain == eight_plain == 2 * eight_full
    assert figures[0]["streams"][0]["cache_mb"] == 2 * figures[1]["streams"][0]["cache_mb"]
    options = {"shape": "tiny", "encoder": None, "schemes": ["full"], "weights": None}
    model = streaming.build_all(10, Namespace(**options, dtype=torch.bfloat16, device="cpu"))["full"]
    linear = model.model.language_model.layers[0].mlp.up_proj
    before = streaming.stored_bytes(linear.weight)
    streaming.quantize(model, "int8")
    # A byte a number, and beside it a scale a row.
    assert before // 2 < streaming.stored_bytes(linear.weight) < 0.55 * before


def test_ways_take_turns_and_the_first_step_of_each_turn_does_not_count(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(streaming.clock, "perf_counter", lambda: now[0])

    def way(name, first, then, back):
        def step():
            now[0] += then if order and order[-1] == name else first
            order.append(name)
            return lambda: now.__setitem__(0, now[0] + back)

        return step

    taken = streaming.in_turns({"a": way("a", 9, 1, 5), "b": way("b", 7, 2, 3)}, 7, "cpu")
    assert taken == {"a": [1] * 7, "b": [2] * 7}
    assert "".join(order) == "aaaaaa" + "bbbbbb" + "aaa" + "bbb"


def test_a_way_is_compared_with_the_plain_loop_step_by_step():
    def measured(*seconds, is_beside_others=True):
        kinds = dict.fromkeys(("frame", "together", "encoded", "speak", "word"), list(seconds))
        return streaming.Measured(10, kinds, 0, None, 1.0, is_beside_others)

    found = {
        streaming.PLAIN: measured(4, 40, 8),
        "a": measured(2, 10, 2),
        "b": measured(1, 1, 1, is_beside_others=False),
    }
    row = streaming.make_row("a", 5, found)
    assert row.times_plain == row.together_times_plain == 4 and row.p50 == 2000 and row.p99 == 10000
    assert streaming.make_row("b", 5, found).times_plain is None
    found[streaming.PLAIN].is_beside_others = False
    assert streaming.make_row("a", 5, found).times_plain is None


@pytest.mark.parametrize("has_room_alone", [True, False])
def test_a_way_without_room_beside_the_others_is_measured_alone(has_room_alone, monkeypatch, capsys):
    options = {"shape": "tiny", "encoder": None, "schemes": ["full", "all_deep"], "weights": None, "cache": None}
    options = Namespace(**options, dtype=torch.float32, device="cpu")
    options.steps, options.tries, options.contexts, options.compile = 1, 2, [2], False
    models, make = streaming.build_all(10, options), streaming.make_engine
    assert models["full"].model.language_model is models["all_deep"].model.language_model
    made = []

    def with_little_room(model, *args, **how):
        made.append(model)
        if model is models["all_deep"] and (not has_room_alone or len(made) == 2):
            raise torch.OutOfMemoryError("no room")
        return make(model, *args, **how)

    monkeypatch.setattr(streaming, "make_engine", with_little_room)
    rows = {row.scheme: row for found in streaming.measure(models, (1e9, 1e9), options) for row in found}
    assert rows["plain loop"].times_plain == 1 and rows["full"].times_plain is not None
    assert ("all_deep" in rows) == has_room_alone == ("left out" not in capsys.readouterr().out)
    assert not has_room_alone or (rows["all_deep"].times_plain is None and rows["all_deep"].p50 > 0)


def test_a_checkpoint_watches_a_clip_in_every_way(tmp_path):
    options = ["--checkpoint", ".", "--clip", "samples/streamworld.mp4"]
    run("streaming.py", *options, "--contexts", 2, "--steps", 2, "--streams", "--out", tmp_path)
    figures = json.loads((tmp_path / "streaming.json").read_text())
    assert [row["way"] for row in figures["clip"]] == ["session", "plain loop", "engine"]
    assert all(row["seconds"] > 0 and row["frames"] == 17 and row["words"] > 20 for row in figures["clip"])
    assert [row["scheme"] for row in figures["rows"]] == ["as saved", "full", "plain loop"]


def test_a_stream_without_end_in_an_engine():
    lines = run("endless.py", "--frames", 1000, "--max-frames", 8, "--engine").splitlines()
    assert lines[0].startswith("8 frames and 1024 tokens of text remembered") and lines[-1].startswith("| 1000 |")


def test_a_training_step_of_every_kind(tmp_path):
    table = run("training.py", "--frames", 4, "--steps", 1, "--out", tmp_path)
    assert table.count("| all_deep |") == table.count("| full |") == 4
    assert table.strip() == (tmp_path / "training.md").read_text().strip()
    rows = [training.Row(**row) for row in json.loads((tmp_path / "training.json").read_text())]
    assert len(rows) == 12 and (tmp_path / "training.png").exists()
    assert [training.of_full(row, rows) for row in rows if row.scheme == "full"] == [(1, 1, 0)] * 4
    # Full compute had no memory: nothing is told of it, and not that all is the same.
    assert training.of_full(rows[1], rows[1:3]) is None and "| - |" in training.table(rows[1:3], "cpu")
