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
from pathlib import Path


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
        assert all((row[kind] == 1) == (row["scheme"] == "plain loop") and row[kind] > 0 for row in figures["rows"])
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
    assert len({row["cache_mb"] for row in rows}) == 1 and all(row["times_plain"] > 0 for row in rows)


def test_a_checkpoint_watches_a_clip_in_every_way(tmp_path):
    options = ["--checkpoint", "space/checkpoint", "--clip", "space/samples/streamworld.mp4"]
    run("streaming.py", *options, "--contexts", 2, "--steps", 2, "--streams", "--out", tmp_path)
    figures = json.loads((tmp_path / "streaming.json").read_text())
    assert [row["way"] for row in figures["clip"]] == ["session", "plain loop", "engine"]
    assert all(row["seconds"] > 0 and row["frames"] == 17 and row["words"] > 20 for row in figures["clip"])
    assert [row["scheme"] for row in figures["rows"]] == ["as saved", "full", "plain loop"]


def test_a_stream_without_end_in_an_engine():
    lines = run("endless.py", "--frames", 1000, "--max-frames", 8, "--engine").splitlines()
    assert lines[0].startswith("8 frames and 1024 tokens of text remembered") and lines[-1].startswith("| 1000 |")


def test_a_training_step_of_every_kind():
    table = run("training.py", "--frames", 4, "--steps", 1)
    assert table.count("| all_deep |") == table.count("| full |") == 4
