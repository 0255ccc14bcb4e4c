# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run and write their results. No test looks at the speed of anything."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from contextlib import redirect_stdout, suppress
from pathlib import Path

import common
import endless
import frame_latency
import gpu
import memory
import numpy as np
import precisions
import pytest
import speed_page
import torch
import training
import untrained_routing
import watching
from counting import CountOperations
from preloaded import preloaded_python

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor
from videollm_mod.compiled_step_videollm_mod import CompiledSteps
from videollm_mod.serving import StreamingEngine


ROOT = Path(__file__).resolve().parents[1]


def run(script, *options):
    """Run a benchmark in this process and return what it prints: a fresh process takes seconds to import torch."""
    printed, given = io.StringIO(), [f"benchmarks/{script}", *map(str, options)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", given)
        # To measure the machine takes seconds.
        patch.setattr(frame_latency, "machine_rates", lambda *_: (1e10, 1e11))
        patch.chdir(ROOT)
        importlib.import_module(script.removesuffix(".py")).main()
    return printed.getvalue()


@pytest.mark.xdist_group("preloaded")
def test_a_benchmark_is_a_script(tmp_path):
    """The others run in this process."""
    command = [preloaded_python(), "benchmarks/preprocessing.py", "--sizes", "64x48", "--frames", "2"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "preprocessing.json").read_text())["rows"]
    # A frame that waits has one byte per value.
    assert row[0] == "64 x 48" and float(row[-1]) == round(3 * 384**2 / 1e6, 2)
    assert done.stdout.strip() == (tmp_path / "preprocessing.md").read_text().strip()


def model_options(**options):
    """Options of the tiny random models, as the command line gives them."""
    given = {"shape": "tiny", "encoder": None, "schemes": ["full"], "weights": None, "cache_dtype": None}
    return Namespace(**(given | {"dtype": torch.float32, "device": "cpu"} | options))


def test_frame_latency_of_random_models_and_the_plain_loop(tmp_path):
    options = ["--tokens", 10, "--contexts", 2, 4, "--steps", 2, "--tries", 1, "--schemes", "full", "all_deep"]
    printed = run("frame_latency.py", *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [(row["variant"], row["context"]) for row in rows] == [
        (variant, context)
        for context in (2, 4)
        for variant in (*("full, session", "full, engine"), "plain loop", *("all_deep, session", "all_deep, engine"))
    ]
    full, full_engine, plain, routed, routed_engine = (row["cache_mb"] for row in rows[5:])
    assert full == full_engine == plain > routed == routed_engine
    # A growing cache is copied in each step.
    assert rows[5]["moved_mb"] > rows[6]["moved_mb"] > rows[6]["least_mb"] == rows[5]["least_mb"] > rows[8]["least_mb"]
    assert all(row["floor"] < row["p50"] <= row["p99"] for row in rows)
    for kind in ("speedup", "together_speedup"):
        assert all((row[kind] == 1) == (row["variant"] == "plain loop") for row in rows)
    assert printed.strip() == (tmp_path / "latency.md").read_text().strip()
    assert (tmp_path / "latency.png").exists()


def test_many_streams_of_random_models(tmp_path):
    options = ["--tokens", 10, "--streams", 1, 2, "--context", 2, "--rounds", 2, "--schemes", "full", "all_deep"]
    printed = run("many_streams.py", *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "streams.json").read_text())["rows"]
    assert [(row["scheme"], row["streams"]) for row in rows] == [
        (scheme, streams) for streams in (1, 2) for scheme in ("full", "all_deep")
    ]
    assert rows[2]["cache_mb"] == 2 * rows[0]["cache_mb"]
    assert printed.strip() == (tmp_path / "streams.md").read_text().strip()
    assert (tmp_path / "streams.png").exists()


def test_compiled_steps_are_measured_beside_the_others(tmp_path):
    options = ["--tokens", 10, "--contexts", 2, "--steps", 1, "--tries", 1, "--schemes", "full", "--kinds", "word"]
    run("frame_latency.py", *options, "--runners", "engine", "engine-compiled", "--out", tmp_path)
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["full, engine", "full, engine, compiled", "plain loop"]
    assert all(row["together"] is row["encoded"] is None and row["tokens_per_second"] > 0 for row in rows)
    assert len({row["cache_mb"] for row in rows}) == 1 and None not in [row["speedup"] for row in rows]


def test_launches_are_counted_without_views_and_compared_with_full_compute(tmp_path):
    printed = run("launches.py", "--contexts", 2, "--steps", 1, "--schemes", "full", "all_deep", "--out", tmp_path)
    found = json.loads((tmp_path / "launches.json").read_text())
    for runner in ("session", "engine"):
        full, routed = (row for row in found["launches"] if row["runner"] == runner)
        # 30 of the 32 layers are routed.
        assert routed["launches"] == pytest.approx(full["launches"] + 30 * routed["per_routed_layer"])
        assert full["per_routed_layer"] is None and full["most_common"]["mm"] == 7 * 32 + 1
        # Not one more than in docs/speed.md.
        assert routed["per_routed_layer"] < 23
    assert [(row["scheme"], row["context"]) for row in found["times"]] == [("full", 2), ("all_deep", 2)]
    assert printed.strip() == (tmp_path / "launches.md").read_text().strip()


def test_evictions_are_counted_in_sessions_and_engines(tmp_path):
    printed = run("eviction.py", "--max-frames", 9, "--schemes", "all_deep", "--out", tmp_path)
    rows = json.loads((tmp_path / "eviction.json").read_text())["rows"]
    assert [row["runner"] for row in rows] == ["session", "engine"]
    assert all(row["bookkeeping"] >= 0 and row["eviction"] > 0 for row in rows)
    # At most eight launches for each of the 32 layers: those of 9 frames are those of 180.
    assert all(0 < row["eviction_launches"] <= 8 * 32 and row["crop_launches"] == 0 for row in rows)
    assert printed.strip() == (tmp_path / "eviction.md").read_text().strip()


def test_bytes_of_operations():
    cache, new, row = torch.zeros(4, 100), torch.ones(4, 5), torch.tensor([2])
    with CountOperations() as counted:
        (torch.ones(2, 3).t().reshape(6) + 1)[1:].view(5)
    assert counted.counts == {"ones": 1, "clone": 1, "add": 1} and counted.num_bytes == 4 * (6 + 12 + 12)
    for operation, values in (
        (lambda: torch.cat([cache, new], dim=1), 2 * 420),  # a growing cache: read and written
        (lambda: cache[:, 7:12].copy_(new), 2 * 20),  # a preallocated one
        (lambda: cache.index_copy_(0, row, torch.zeros(1, 100)), 100 + 2 * 100 + 2 * 2),
        (lambda: cache[:, None].expand(4, 3, 100).reshape(12, 100), 400 + 1200),
        (lambda: torch.nn.functional.embedding(row, cache), 2 * 100 + 2),
    ):
        with CountOperations() as counted:
            operation()
        assert counted.num_bytes == 4 * values


def test_an_interrupted_run_keeps_its_results(tmp_path, monkeypatch):
    measure = frame_latency.measure_context
    given = ["--tokens", "10", "--contexts", "2", "3", "--steps", "1", "--tries", "1", "--schemes", "full"]
    monkeypatch.setattr(sys, "argv", ["frame_latency.py", *given, "--out", str(tmp_path)])

    def breaks(variants, context, *rest):
        if context == 3:
            raise KeyboardInterrupt
        return measure(variants, context, *rest)

    monkeypatch.setattr(frame_latency, "measure_context", breaks)
    with pytest.raises(KeyboardInterrupt):
        frame_latency.main()
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [(row["variant"], row["context"]) for row in rows] == [
        (variant, 2) for variant in ("full, session", "full, engine", "plain loop")
    ]
    assert "| 10 | 2 | full, engine |" in (tmp_path / "latency.md").read_text()


def test_the_shape_of_siglip_l_needs_no_hub():
    options = model_options(dtype=torch.bfloat16, device="meta", encoder="siglip-l")
    vision = watching.random_models(10, options)["full"].config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (1024, 24, 384)


@pytest.mark.parametrize("tokens", ["1", "0", "-3", "12"])
def test_tokens_per_frame_that_form_no_grid_are_an_error(tokens):
    with pytest.raises(ArgumentTypeError, match=f"{tokens} is not 1 \\+ n x n"):
        common.num_frame_tokens(tokens)


def test_eight_bits_are_counted_as_eight_bits(tmp_path):
    options = ["--tokens", 10, "--schemes", "full", "--dtype", "bfloat16"]
    latency = ["--contexts", 2, "--steps", 1, "--tries", 1]
    streams = ["--streams", 1, "--context", 2, "--rounds", 1]
    caches = []
    for name, eight in (("sixteen", []), ("eight", ["--weights", "int8", "--cache-dtype", "fp8"])):
        out = ["--out", tmp_path / name]
        printed = run("frame_latency.py", *options, *latency, *eight, *out)
        run("many_streams.py", *options, *streams, *eight, *out)
        rows = [json.loads((tmp_path / name / file).read_text())["rows"] for file in ("latency.json", "streams.json")]
        caches.append([row["cache_mb"] for row in sum(rows, [])])
    assert "random weights in int8, keys and values in float8_e4m3fn, " in printed
    (session, engine, plain, round_), (eight_session, eight_engine, eight_plain, eight_round) = caches
    assert session == engine == plain == eight_plain == 2 * eight_session == 2 * eight_engine
    assert round_ == 2 * eight_round


def test_the_bytes_of_a_weight_in_eight_bits():
    model = watching.random_models(10, model_options(dtype=torch.bfloat16))["full"]
    linear = model.model.language_model.layers[0].mlp.up_proj
    before = memory.stored_bytes(linear.weight)
    watching.quantize(model, "int8")
    # One byte per number, plus one scale per row.
    assert before // 2 < memory.stored_bytes(linear.weight) < 0.55 * before


def test_variants_take_turns_and_the_first_step_of_a_turn_does_not_count(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(common.clock, "perf_counter", lambda: now[0])

    def variant(name, first, then, undo):
        def step():
            now[0] += then if order and order[-1] == name else first
            order.append(name)
            return lambda: now.__setitem__(0, now[0] + undo)

        return step

    taken = common.in_turns({"a": variant("a", 9, 1, 5), "b": variant("b", 7, 2, 3)}, 7, "cpu")
    assert taken == {"a": [1] * 7, "b": [2] * 7}
    assert "".join(order) == "aaaaaa" + "bbbbbb" + "aaa" + "bbb"


def test_a_variant_is_compared_with_the_plain_loop_step_by_step():
    def measured(*seconds, is_beside_others=True):
        kinds = dict.fromkeys(("frame", "together"), list(seconds))
        return frame_latency.Measured(10, kinds, 0, None, 1.0, None, 0, is_beside_others)

    found = {
        watching.PLAIN: measured(4, 40, 8),
        "a": measured(2, 10, 2),
        "b": measured(1, 1, 1, is_beside_others=False),
    }
    row = frame_latency.make_row("a", 5, found)
    assert row.speedup == row.together_speedup == 4 and row.p50 == 2000 and row.p99 == 10000
    assert row.encoded is row.moved_mb is None
    assert frame_latency.make_row("b", 5, found).speedup is None
    found[watching.PLAIN].is_beside_others = False
    assert frame_latency.make_row("a", 5, found).speedup is None


@pytest.mark.parametrize("fits_alone", [True, False])
def test_a_variant_without_memory_beside_the_others_is_measured_alone(fits_alone, monkeypatch, capsys):
    options = model_options(schemes=["full", "all_deep"], steps=1, tries=2, contexts=[2])
    options.runners, options.kinds = ["engine"], []
    models, make = watching.random_models(10, options), watching.make_engine
    assert models["full"].model.language_model is models["all_deep"].model.language_model
    made = []

    def with_little_memory(model, *args, **options):
        made.append(model)
        if model is models["all_deep"] and (not fits_alone or len(made) == 2):
            raise torch.OutOfMemoryError("out of memory")
        return make(model, *args, **options)

    monkeypatch.setattr(watching, "make_engine", with_little_memory)
    found = frame_latency.measure(models, (1e9, 1e9), options)
    rows = {row.variant: row for rows in found for row in rows}
    assert rows["plain loop"].speedup == 1 and rows["full, engine"].speedup is not None
    routed = rows.get("all_deep, engine")
    assert (routed is not None) == fits_alone == ("left out" not in capsys.readouterr().out)
    assert routed is None or (routed.speedup is None and routed.p50 > 0)


def test_a_checkpoint_is_measured_as_saved_and_at_full_compute(tmp_path):
    options = ["--contexts", 2, "--steps", 2, "--runners", "session-preallocated", "--out", tmp_path]
    run("frame_latency.py", "--checkpoint", ".", *options)
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [
        *("as saved, session, preallocated", "full, session, preallocated", "plain loop")
    ]


def test_a_checkpoint_watches_a_clip_in_every_variant(tmp_path):
    runners = ["--runners", "session", "session-preallocated", "engine"]
    printed = run("watch_clip.py", "--tries", 2, *runners, "--out", tmp_path)
    rows = json.loads((tmp_path / "clip.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["plain loop", "session", "session, preallocated", "engine"]
    assert all(row["seconds"] > 0 and row["frames"] == 17 and row["words"] > 20 for row in rows)
    assert printed.strip() == (tmp_path / "clip.md").read_text().strip()


def test_an_endless_stream_of_an_engine(monkeypatch):
    monkeypatch.setattr(endless, "EVERY", 100)
    lines = run("endless.py", "--frames", 100, "--max-frames", 8, "--engine").splitlines()
    assert lines[0].startswith("at most 8 frames and 1024 text tokens in the cache")
    assert lines[-1].startswith("| 100 |")


def test_a_gpu_with_a_number_is_a_gpu(monkeypatch):
    """Calls that name no device then refer to it."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert common.choose_device(name) == name
    assert chosen == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7e9)
    row = training.Row("full", "all", False, 1.0, 1.0, 1.0)
    for name in ("cuda", "cuda:1"):
        assert common.to_dtype(None, name) == torch.bfloat16 and memory.held_gb(name) == 7
        assert "peak, GB" in training.table([row], name)
    assert common.to_dtype(None, "cpu") == torch.float32
    with pytest.raises(ArgumentTypeError, match="gpu"):
        common.choose_device("gpu")


def test_counted_operations_and_cache_entries_equal_the_estimate():
    rows = run("cost.py", "--shape", "tiny", "--frames", 4, "--text-tokens", 10, "--repeats", 1).splitlines()[-3:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["full", "interleaved", "all_deep"]
    assert all(row[1] == row[2] and row[4] == row[5] for row in cells)


def test_a_training_step_of_every_kind(tmp_path):
    table = run("training.py", "--frames", 4, "--tokens", 10, "--text-tokens", 20, "--steps", 1, "--out", tmp_path)
    assert table.count("| all_deep |") == table.count("| full |") == 4
    assert table.strip() == (tmp_path / "training.md").read_text().strip()
    rows = [training.Row(**row) for row in json.loads((tmp_path / "training.json").read_text())]
    assert len(rows) == 12 and (tmp_path / "training.png").exists()
    assert [training.compared(row, rows) for row in rows if row.scheme == "full"] == [(1, 1, 0)] * 4
    # Without a measurement of full compute there is nothing to compare with.
    assert training.compared(rows[1], rows[1:3]) is None and "| - |" in training.table(rows[1:3], "cpu")


def test_the_processor_of_a_random_model_makes_the_frames_of_captured_and_compiled_steps():
    model = watching.random_models(10, model_options())["full"]
    watching.silence(model)
    processor, limits = watching.random_processor(model), {"max_frames": 8, "max_text_tokens": 64}
    assert model.stream(processor, compile=True, **limits)._compiled.frame_ids.count(1024) == 10
    engine = StreamingEngine(model, processor, max_streams=1, capture=True, **limits)
    stream = engine.open(system_prompt="")
    stream.push(np.zeros((2, 128, 128, 3), dtype=np.uint8))
    stream.close()
    engine.run()
    assert engine.stats.frames == 2 and engine.stats.captured_steps == engine.stats.steps > 0


@pytest.mark.parametrize("runner", ["session", "session-compiled"])
def test_the_encoder_is_measured_as_the_session_runs_it(monkeypatch, runner):
    compiled = []

    def encode(self, pixels):
        compiled.append(pixels.shape)
        return self.model.encode_frames(pixels)

    monkeypatch.setattr(CompiledSteps, "encode", encode)
    watcher = watching.RUNNERS[runner](watching.random_models(10, model_options())["full"], 2)
    monkeypatch.setattr(watcher, "watch", lambda features: compiled.append(features.shape))
    watcher.steps(torch.float32)["encoded"]()()
    frame = [(1, 3, 128, 128)] if runner == "session-compiled" else []
    assert compiled == [*frame, (1, 1, *watcher.config.frame_feature_shape)]


def test_everything_that_needs_a_gpu_is_measured_part_by_part(tmp_path, monkeypatch, capsys):
    def run_gpu(*parts, minutes=5):
        given = ["--device", "cpu", "--shape", "tiny", "--tokens", 10, "--minutes", minutes, "--out", tmp_path]
        given += ["--schemes", "all_deep", "full", "--parts", *parts]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, given)])
        monkeypatch.setattr(gpu, "STARTED", gpu.clock.monotonic())
        gpu.main()
        return json.loads((tmp_path / "gpu.json").read_text())["parts"], capsys.readouterr().out

    parts, _ = run_gpu("floors", "sessions", "streams-all_deep", "training")
    assert list(parts) == ["floors", "sessions", "streams-all_deep", "training"]
    assert all(part["is_complete"] for part in parts.values())
    assert {(row["scheme"], row["runner"], row["frames"]) for row in parts["sessions"]["rows"]} == {
        (scheme, runner, frames)
        for scheme, runner in (
            *(("all_deep", "session-preallocated"), ("full", "session-preallocated"), ("full", "plain loop")),
        )
        for frames in (2, 4)
    }
    assert all(0 < row["p50, ms"] <= row["p99, ms"] for row in parts["sessions"]["rows"])
    (live,) = parts["streams-all_deep"]["rows"]
    assert (live["streams"], live["frames seen"], live["dropped"]) == (3, 9, 0) and live["p50, ms"] > 0
    assert {row["frames"] for row in parts["training"]["rows"]} == {4}
    assert all((tmp_path / name).exists() for name in ("gpu.png", "gpu_streams.png", "gpu_training.png"))
    assert "| all_deep |" in (tmp_path / "gpu.md").read_text()

    # A run that was stopped measures what it had not.
    stopped = json.loads((tmp_path / "gpu.json").read_text())
    rows = stopped["parts"]["sessions"]["rows"]
    missing = rows.pop()
    stopped["parts"]["sessions"]["is_complete"] = False
    (tmp_path / "gpu.json").write_text(json.dumps(stopped))
    parts, printed = run_gpu("floors", "sessions")
    assert "floors: already measured" in printed and parts["sessions"]["rows"][:-1] == rows
    names = ("scheme", "runner", "frames")
    assert all(parts["sessions"]["rows"][-1][name] == missing[name] for name in names)
    assert "engine: left out" in run_gpu("engine", minutes=0.5)[1]


def test_plots_show_live_streams_and_training(tmp_path):
    """Rows are made up. Two kinds of training and two numbers of streams stand beside each other."""
    lab = gpu.Lab(Namespace(device="cpu", shape="tiny", tokens=10, out=tmp_path))
    gpu.draw(lab)
    assert list(tmp_path.iterdir()) == [], "nothing was measured"
    live = [{"scheme": "full", "streams": 64, "error": "not enough memory"}]
    live += [{"scheme": "full", "streams": 32, "p50, ms": 50.0, "p99, ms": 90.0}]
    routed = [{"scheme": "all_deep", "streams": 64, "p50, ms": 40.0, "p99, ms": 70.0}]
    row = {"scheme": "full", "frames": 120, "checkpointing": False, "s per step": 2.0, "memory, GB": 30.0}
    rows = {"streams-all_deep": routed, "streams-full": live, "training": [row]}
    rows["training-long"] = [row | {"frames": 600, "checkpointing": True, "memory, GB": None}]
    lab.parts = {name: {"rows": own, "is_complete": True} for name, own in rows.items()}
    assert gpu.bars_of(lab, "streams", ("p99, ms",)) == [
        ("p99, ms", "64 streams", "all_deep", 70.0),
        ("p99, ms", "32 streams", "full", 90.0),
    ]
    assert gpu.bars_of(lab, "training", ("s per step", "memory, GB")) == [
        ("s per step", "120 frames", "full", 2.0),
        ("s per step", "600 frames,\ncheckpointing", "full", 2.0),
        ("memory, GB", "120 frames", "full", 30.0),
    ]
    gpu.draw(lab)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_streams.png", "gpu_training.png"}


def test_a_part_that_fails_or_runs_out_of_time_leaves_the_others_their_figures(tmp_path, monkeypatch, capsys):
    def fails(_):
        monkeypatch.setattr(gpu, "STARTED", gpu.clock.monotonic())  # whatever it took so far
        raise ValueError("a fault")

    def lasts(lab):
        lab.record("long", row=1)
        for _ in range(20):
            with suppress(Exception):  # as the engine does with errors of a capture
                gpu.clock.sleep(1)

    short = {"floors": gpu.Part(lambda lab: lab.record("floors", row=0), 0), "fault": gpu.Part(fails, 0)}
    monkeypatch.setattr(gpu, "PARTS", {**short, "long": gpu.Part(lasts, 0), "never": gpu.Part(fails, 0)})
    monkeypatch.setattr(gpu.Lab, "rates", (1e9, 1e9))
    monkeypatch.setattr(gpu, "STARTED", gpu.clock.monotonic())
    given = ["--device", "cpu", "--shape", "tiny", "--minutes", (gpu.OTHER_SECONDS + 8) / 60, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, given)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="0"):
        gpu.main()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["is_complete"] for name, part in parts.items()} == {"floors": True, "long": False}
    printed = capsys.readouterr().out
    assert "fault: failed" in printed and "never" not in printed and "run this again to go on" in printed
    assert "a fault" in (tmp_path / "fault.error").read_text()


def test_a_run_out_of_time_waits_for_no_thread(tmp_path):
    """A compiled session compiles in a thread, which Python joins at its end."""
    lines = [
        "import sys, time, gpu",
        "from concurrent.futures import ThreadPoolExecutor",
        "def compiles(_): ThreadPoolExecutor(1).submit(time.sleep, 200).result()",
        "gpu.PARTS, gpu.Lab.rates = {'floors': gpu.Part(compiles, 0)}, (1e9, 1e9)",
        f"sys.argv += ['--device', 'cpu', '--minutes', '{(gpu.OTHER_SECONDS + 1) / 60}', '--out', {str(tmp_path)!r}]",
        "gpu.main()",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "minutes are over" in done.stdout and "s in all" in done.stdout, done.stderr


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak that Linux counts")
@pytest.mark.parametrize("part", ["sessions", "streams-full"])
def test_the_peak_of_a_part_is_without_the_models(tmp_path, monkeypatch, part):
    """The first part that reads the models makes them."""
    make = gpu.random_models

    def make_large(*given):
        models = make(*given)
        models["full"].register_buffer("large", torch.ones(200_000_000))
        return models

    monkeypatch.setattr(gpu, "random_models", make_large)
    monkeypatch.setattr(gpu, "SMALL", gpu.SMALL._replace(contexts=(2,), stream_seconds=1.0, streams=1))
    lab = gpu.Lab(Namespace(**vars(model_options()), tokens=10, out=tmp_path))
    lab.rates = (1e9, 1e9)
    monkeypatch.setattr(lab, "write", lambda: None)
    gpu.PARTS[part].run(lab)
    # The first step of a process reads libraries.
    assert all(0 <= row["peak, GB"] < 0.6 for row in lab.parts[part]["rows"])


@pytest.mark.parametrize("lasts", [False, True])
def test_tests_on_a_gpu_are_counted_also_if_they_take_too_long(tmp_path, monkeypatch, lasts):
    """Also without pytest-timeout, which pyproject.toml names, and where a file of tests lacks a library."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:timeout")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    lines = ["import pytest, time", "@pytest.mark.gpu", "@pytest.mark.parametrize('run', [int, lambda: 1 / 0])"]
    lines += ["def test_runs(run): run()", "@pytest.mark.gpu", f"def test_lasts(): time.sleep({100 * lasts})"]
    (tmp_path / "tests" / "test_slow.py").write_text("\n".join(lines))
    (tmp_path / "tests" / "test_broken.py").write_text("import no_such_library  # pytest.mark.gpu")
    for name, value in {"ROOT": tmp_path, "TEST_SECONDS": 10 if lasts else 100}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.Lab, "write", lambda _: None)
    lab = gpu.Lab(Namespace(device="cpu", shape="tiny", out=tmp_path))
    gpu.run_tests(lab)
    (row,) = lab.parts["tests"]["rows"]
    ended = {"exit_code": "stopped after 10 s", "passed": 1} if lasts else {"exit_code": 1, "passed": 2}
    broken = "" if lasts else ", test_broken.py"
    assert row == {**ended, "failed": 1, "names": f"test_slow.py::test_runs[<lambda>]{broken}"}
    assert "test_lasts" in (tmp_path / "tests.log").read_text()


def test_laptop_compares_a_session_with_sending_frames_again(tmp_path):
    """The benchmark itself fails if the two do not say the same word, or a scene reuses the wrong frames."""
    options = ["--models", "tiny", "--sizes", 128, 64, "--runners", "eager", "--frames", 1, "--tries", 1]
    printed = run("laptop.py", *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "laptop.json").read_text())["rows"]
    assert [(row["size"], row["tokens"]) for row in rows] == [(128, 4), (64, 1)]
    assert all(row[name] > 0 for row in rows for name in ("moving", "static", "first_word", "resent"))
    assert (tmp_path / "laptop.md").read_text().strip() == printed.strip()


def test_a_table_of_the_speed_page_is_made_again():
    page, commands = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), speed_page.COMMANDS
    assert set(re.findall(r"^<!-- (?!end -->)(\S+) -->$", page, re.MULTILINE)) == set(commands)
    once = speed_page.with_table(page, "cost", "A CPU,\ntwo threads\n\n| a |\n| --- |\n| 1 |\n")
    block = once.partition("<!-- cost -->")[2].partition("<!-- end -->")[0]
    assert block.startswith(f"\n\n```\n{commands['cost']}\n```\n\n")
    assert block.endswith(". A CPU, two threads\n\n| a |\n| --- |\n| 1 |\n\n")
    again = speed_page.with_table(once, "cost", "A CPU\n\n| b |")
    assert "| a |" not in again.partition("<!-- cost -->")[2] and again.count("<!-- end -->") == len(commands)
    with pytest.raises(ValueError, match="has no <!-- other -->"):
        speed_page.with_table(page, "other", "")


def test_untrained_routing_goes_on_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(untrained_routing, "GROUP", 2)
    options = [tmp_path, "--clips", 1, "--ratios", 0.2, "--layers", "all_deep"]
    first = run("untrained_routing.py", *options)
    assert "; 2 clips in 1 groups" in first, "clips are rounded up"
    path = tmp_path / "untrained_routing.json"
    found = json.loads(path.read_text())
    routers = ("change", "uniform", "random", "learned")
    assert set(found["results"]) == {"full", *(f"all_deep 0.2 {router}" for router in routers)}
    assert {len(groups) for groups in found["results"].values()} == {1}
    found["results"]["full"][0]["event_f1"] = 0.125  # not measured again
    path.write_text(json.dumps(found))
    assert "full compute: 0.12 / " in run("untrained_routing.py", *options) and "full compute: 0.12" not in first


def test_untrained_routing_refuses_the_results_of_other_options(tmp_path):
    """Variants have the same names there, and a model in the folder was trained for other steps."""
    first = Namespace(out=tmp_path, checkpoint=str(ROOT), first_clip=100_000, shake=0, steps=0, ratios=[], layers=[])
    groups = {"full": [{"event_f1": 0.5, "answer_accuracy": 0.5}]}
    assert untrained_routing.read_results(first) == {}
    untrained_routing.write(groups, first)
    assert untrained_routing.read_results(first) == groups
    (tmp_path / "full").mkdir()
    for changed in ({"shake": 4}, {"steps": 160}, {"checkpoint": "other"}):
        with pytest.raises(SystemExit, match="has results of a run with other options; give another folder"):
            untrained_routing.read_results(Namespace(**vars(first) | changed))
    (tmp_path / "untrained_routing.json").unlink()
    with pytest.raises(SystemExit, match="has results of a run with other options"):
        untrained_routing.read_results(first)


def test_untrained_routing_follows_the_checkpoint():
    shipped = VideoLLMMoDForConditionalGeneration.from_pretrained(ROOT)
    twin = untrained_routing.with_changes(shipped, {"mod_keep_ratio": 1.0})
    options = Namespace(layers=["all_deep"], ratios=[0.2])
    learned = "all_deep 0.2 learned"
    assert learned in dict(untrained_routing.all_variants(options, shipped))
    # Without trained routers there is nothing to compare with, whatever router the configuration names.
    assert twin.config.mod_router == "learned"
    assert learned not in dict(untrained_routing.all_variants(options, twin))
    processor = VideoLLMMoDProcessor.from_pretrained(ROOT)
    (row,) = untrained_routing.clips_for(processor).load("test", num_clips=1)
    assert row["video"].shape[1:] == (128, 128, 3)


def test_a_shaken_camera_moves_every_frame_by_its_own_distance():
    row = {"seed": 3, "video": np.arange(2 * 9 * 9 * 3, dtype=np.uint8).reshape(2, 9, 9, 3), "kind": "narrate"}
    moved = untrained_routing.shaken(row, 2)
    same = untrained_routing.shaken(row, 0)
    assert np.array_equal(same["video"], row["video"]) and moved["kind"] == "narrate"
    for before, after in zip(row["video"], moved["video"], strict=True):
        shifts = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
        assert any(np.array_equal(np.roll(before, shift, axis=(0, 1)), after) for shift in shifts)
    assert not np.array_equal(moved["video"], row["video"])


def test_the_interval_of_a_difference_between_variants():
    groups = [[{"event_f1": x} for x in row] for row in ([0.9, 0.8, 0.7], [0.8, 0.8, 0.6])]
    # A mean of 1/15 with a standard deviation of 0.0577 in three groups; Student's t is 4.30.
    assert untrained_routing.difference(*groups) == "+0.07 ± 0.14"


def test_dtypes_agree_over_an_endless_stream():
    """The tolerance is that of `docs/reliability.md`: 0.02 in the probability of silence, and no other decision."""
    processor = VideoLLMMoDProcessor.from_pretrained(ROOT)
    clip = [frame for _, frame in processor.read_video(ROOT / "samples" / "streamworld.mp4", fps=2.0)]
    seen = {}
    for name in precisions.DTYPES:
        model = VideoLLMMoDForConditionalGeneration.from_pretrained(ROOT, dtype=getattr(torch, name)).eval()
        seen[name] = precisions.watch(model, processor, clip, 40, every=10, max_frames=8, max_text_tokens=64)
        assert len(seen[name].silence) == 40 and len(seen[name].answers) == 4
        apart = precisions.compare(seen[name], seen["float32"], model.config.interval_threshold)
        assert apart["most"] < 0.02 and apart["mean"] < 0.002 and apart["decisions"] == apart["answers"] == 1
        assert (apart["mean"] > 0) == (name != "float32")
    assert min(seen["float32"].silence) < model.config.interval_threshold < max(seen["float32"].silence)
