# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Everything that only a GPU can tell, in at most nine minutes: the tests that need one, streaming, 64 streams, training.

```bash
make gpu                                                   # the shape of Llama-3-8B, 50 tokens per frame
python benchmarks/gpu.py --parts engine streams            # a part of it
python benchmarks/gpu.py --device cpu --shape tiny         # try the script: about a minute on a CPU
```

Parts run in the order of `--parts`, the most valuable first. A part that does not fit into the time left is left out.
Each figure is printed and written as it comes, to `gpu.json` and `gpu.md` in the folder `--out`. A second run with the
same folder keeps these figures and goes on where the first one stopped. Plots are drawn at the end. Nothing is
downloaded: weights, frames and cache entries are random, and time and memory do not depend on them.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time as clock
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from videollm_mod.console import quiet

import torch
import training
import transformers
from common import (
    ROOT,
    SCHEMES,
    SHAPES,
    Step,
    choose_device,
    default_device,
    in_turns,
    is_gpu,
    machine_rates,
    num_frame_tokens,
    p99,
    to_dtype,
)
from frame_latency import floor
from memory import free, held_gb, peak_gb, reset_peak
from report import Bar, Point, draw_bars, draw_panels, markdown_table, write_results
from watching import (
    PLAIN,
    RUNNERS,
    SIGLIP_L,
    TOGETHER,
    PlainLoop,
    Watcher,
    describe,
    fill_cache,
    image_size,
    random_models,
    random_processor,
    silence,
)

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import write_text
from videollm_mod.serving import EngineStream, StreamingEngine
from videollm_mod.space.command_line import CommandLineParser


STARTED = clock.monotonic()
# Seconds for imports before `STARTED`, and for drawing at the end.
OTHER_SECONDS = 30
# Most seconds of the tests. Those that a GPU does not end within them would leave no time for figures.
TEST_SECONDS = 150
# Frames per second of each live stream.
FPS = 2


class OutOfTimeError(BaseException):
    """The time of the run is over. No handler of ordinary errors, such as one of a failed capture, catches it."""


class Sizes(NamedTuple):
    """How much each part measures."""

    contexts: tuple[int, ...]  # frames in the cache, the most telling first
    steps: int  # measured steps of each kind
    streams: int  # live streams
    stream_context: int  # frames in the cache of each
    stream_seconds: float
    training: tuple[tuple[int, bool], ...]  # frames, and whether the backward pass computes activations again


LARGE = Sizes((300, 10, 600, 1200), 40, 64, 300, 15.0, ((120, False), (600, True)))
SMALL = Sizes((4, 2), 2, 3, 2, 1.5, ((4, False), (8, True)))


class Part(NamedTuple):
    """A part of the run: what to run, and its seconds on an H100, as far as they are known."""

    run: Callable[["Lab"], None]
    seconds: float


class Lab:
    """
    What the parts share: options, models, figures and the time left.

    Args:
        options (`argparse.Namespace`): Options of the command line.

    Attributes:
        parts (`dict[str, dict]`): For each part that has begun: its rows, and whether it `is_complete`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device: str = options.device
        self.sizes = SMALL if options.shape == "tiny" else LARGE
        self.path = options.out / "gpu.json"
        options.out.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.parts = json.loads(self.path.read_text(encoding="utf-8"))["parts"]

    @cached_property
    def models(self) -> dict[str, VideoLLMMoDForConditionalGeneration]:
        """Random models of each scheme on the same weights."""
        self.options.encoder = SIGLIP_L if self.sizes is LARGE else None
        models = random_models(self.options.tokens, self.options)
        for model in models.values():
            silence(model)
        return models

    @cached_property
    def rates(self) -> tuple[float, float]:
        """Bytes per second of a copy, and operations per second of a matrix product."""
        rows = self.parts.get("floors", {}).get("rows")
        if rows:
            return 1e9 * rows[0]["copy, GB/s"], 1e12 * rows[0]["matrix product, TFLOP/s"]
        return machine_rates(self.device, self.options.dtype)

    @property
    def seconds_left(self) -> float:
        """Seconds left for measuring."""
        return 60 * self.options.minutes - OTHER_SECONDS - (clock.monotonic() - STARTED)

    def has(self, part: str, **cells: Any) -> bool:
        """Whether a row with these cells was measured, also in an earlier run."""
        return any(cells.items() <= row.items() for row in self.parts.get(part, {}).get("rows", []))

    def record(self, part: str, **row: Any) -> None:
        """Print a row and write all figures."""
        self.parts.setdefault(part, {"rows": [], "is_complete": False})["rows"].append(row)
        print(f"{part}: " + "; ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)
        self.write()

    def write(self) -> None:
        """Write all figures."""
        machine = f"{describe(self.rates, self.options)} Transformers {transformers.__version__}."
        machine = f"{machine} {self.options.tokens} tokens per frame. {date.today():%d %B %Y}."
        tables = [f"## {name}\n\n{table(part['rows'])}" for name, part in self.parts.items() if part["rows"]]
        text = "\n\n".join([machine, *tables]) + "\n"
        write_results(self.options.out, "gpu", {"machine": machine, "parts": self.parts}, text)

    def forget_models(self) -> None:
        """Release the memory of the models."""
        self.__dict__.pop("models", None)
        free(self.device)


@one_line_errors()
def main() -> None:
    """Run the parts that fit, and draw."""
    quiet()
    parser = CommandLineParser(description="Measure everything that needs a GPU, within a number of minutes.")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="shape of the language model")
    parser.add_argument("--tokens", type=num_frame_tokens, default=50, help="tokens per frame, 1 + n x n")
    schemes = ["all_deep", "full", "interleaved"]
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=schemes, help="routing schemes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="minutes that the run may take")
    parser.add_argument("--device", type=choose_device, default=default_device())
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder for gpu.json and gpu.md")
    options = parser.parse_args()
    options.dtype = to_dtype(None, options.device)
    for name in ("weights", "cache_dtype", "checkpoint", "encoder"):
        setattr(options, name, None)
    lab, is_over = Lab(options), False
    try:
        with stop_after(lab.seconds_left):
            for name in options.parts:
                if name.partition("-")[2] in ("", "long", *options.schemes):
                    run_part(lab, name)
    except OutOfTimeError:
        is_over = True
        print(f"{options.minutes:g} minutes are over: run this again to go on", flush=True)
    draw(lab)
    print(f"{options.out / 'gpu.md'}: {clock.monotonic() - STARTED:.0f} s in all", flush=True)
    if is_over:
        # At its end Python waits for the thread of compiled sessions, which may be compiling for minutes.
        sys.stderr.flush()
        os._exit(0)


def run_part(lab: Lab, name: str) -> None:
    """Run a part, or say why not. If it fails, the next one still runs."""
    part = PARTS[name]
    seconds = part.seconds if is_gpu(lab.device) else min(part.seconds, 1)
    if lab.parts.get(name, {}).get("is_complete"):
        print(f"{name}: already measured", flush=True)
        return
    if lab.seconds_left < seconds:
        print(f"{name}: left out, since it takes about {seconds:.0f} s: run this again to go on", flush=True)
        return
    begin = clock.monotonic()
    try:
        part.run(lab)
    except Exception:
        write_text(lab.options.out / f"{name}.error", traceback.format_exc())
        print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
    else:
        lab.parts[name]["is_complete"] = True
        lab.write()
        print(f"{name}: {clock.monotonic() - begin:.0f} s", flush=True)
    free(lab.device)


@contextmanager
def stop_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` after a number of seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------------------- parts


def measure_floors(lab: Lab) -> None:
    """Measure copies and matrix products, for the least times of all other parts."""
    copies, products = lab.rates
    lab.record("floors", **{"copy, GB/s": copies / 1e9, "matrix product, TFLOP/s": products / 1e12})


def run_tests(lab: Lab) -> None:
    """Run the tests that need a GPU, for at most `TEST_SECONDS`. Without a GPU, pytest skips them."""
    marked = [path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    # Without `--strict-config`: plugins and libraries that are not installed there must not stop the other tests.
    command += ["-o", "addopts=--import-mode=importlib", "--continue-on-collection-errors"]
    log, env = lab.options.out / "tests.log", os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            ended = subprocess.run(
                [*command, *map(str, sorted(marked))], cwd=ROOT, env=env, timeout=TEST_SECONDS, **streams
            ).returncode
        except subprocess.TimeoutExpired:
            ended = f"stopped after {TEST_SECONDS} s"
    text = log.read_text("utf-8")
    results = re.findall(r"^\S*?(test_\S+) (PASSED|FAILED|SKIPPED|ERROR)\b", text, re.MULTILINE)
    counts = Counter(result.lower() for _, result in results)
    failed = [name for name, result in results if result in ("FAILED", "ERROR")]
    failed += re.findall(r"^ERROR \S*?(test_\S+\.py)(?= |$)", text, re.MULTILINE)  # files without a library
    lab.record("tests", exit_code=ended, **counts, names=", ".join(failed) or "none failed")


def measure_engine(lab: Lab) -> None:
    """Measure a stream of an engine; on a GPU its steps are captured."""
    measure_streaming(lab, "engine", {scheme: ["engine"] for scheme in lab.options.schemes})


def measure_sessions(lab: Lab) -> None:
    """Measure eager sessions and the plain loop."""
    runners = {
        scheme: ["session-preallocated", *([PLAIN] if scheme == "full" else [])] for scheme in lab.options.schemes
    }
    measure_streaming(lab, "sessions", runners)


def measure_compiled(lab: Lab, scheme: str) -> None:
    """Measure compiled sessions of one scheme. The first step of each kind compiles."""
    if "session-compiled" not in RUNNERS:
        raise ValueError("Sessions have no option `compile`.")
    measure_streaming(lab, f"compiled-{scheme}", {scheme: ["session-compiled"]})


def measure_streaming(lab: Lab, part: str, runners: dict[str, list[str]]) -> None:
    """Measure a frame step, without and with vision encoding, for each number of frames in the cache."""
    most = max(lab.sizes.contexts) + TOGETHER
    for context in lab.sizes.contexts:
        for scheme, runner in ((scheme, runner) for scheme, own in runners.items() for runner in own):
            cells = {"scheme": scheme, "runner": runner, "frames": context}
            if lab.has(part, **cells):
                continue
            # A compiled session that remembers more frames would be another program.
            limit = {"max_frames": most} if runner in ("session-preallocated", "session-compiled") else {}
            variant = PlainLoop if runner == PLAIN else partial(RUNNERS[runner], **limit)
            model = lab.models[scheme]  # made before memory is measured
            free(lab.device)
            before = held_gb(lab.device)
            reset_peak(lab.device)
            try:
                watcher = variant(model, context)
                row = measure_watcher(lab, watcher, context)
            except torch.OutOfMemoryError:
                lab.record(part, **cells, error="not enough memory")
                continue
            lab.record(part, **cells, **row, **{"peak, GB": peak_above(before, lab.device)})
            del watcher


def peak_above(before: float, device: str) -> float | None:
    """Return the peak in gigabytes since `reset_peak`, without what was held before."""
    peak = peak_gb(device)
    return None if peak is None else peak - before


def measure_watcher(lab: Lab, watcher: Watcher, context: int) -> dict[str, Any]:
    """Return the figures of one variant at one context."""
    steps, seconds = watcher.steps(lab.options.dtype), {}
    for kind in ("frame", "encoded"):
        for _ in range(3):  # a compiled step compiles, records a graph, and replays it
            steps[kind]()()
        seconds[kind] = in_turns({kind: steps[kind]}, lab.sizes.steps, lab.device)[kind]
    least = floor(watcher, context, lab.rates)
    return {
        "p50, ms": 1e3 * median(seconds["frame"]),
        "p99, ms": 1e3 * p99(seconds["frame"]),
        "floor, ms": 1e3 * least,
        "over floor": median(seconds["frame"]) / least,
        "with encoding, p50": 1e3 * median(seconds["encoded"]),
        "with encoding, p99": 1e3 * p99(seconds["encoded"]),
        "cache, MB": watcher.cache_bytes() / 1e6,
        **(count_on_gpu(steps["frame"]) if is_gpu(lab.device) else {}),
    }


def count_on_gpu(step: Step) -> dict[str, int]:
    """Return how many kernels one step runs, with how many calls, and how often it waits for the GPU."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        undo = step()
    undo()
    names = [event.name for event in profile.events()]
    on_gpu = [event.name for event in profile.events() if str(event.device_type).endswith("CUDA")]
    return {
        "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu),
        "launches": sum(name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for name in names),
        "waits": sum(name in ("cudaStreamSynchronize", "cudaEventSynchronize") for name in names),
    }


def measure_live_streams(lab: Lab, scheme: str) -> None:
    """Let many live streams send frames to one engine, and see whether it keeps up."""
    part, streams, context = f"streams-{scheme}", lab.sizes.streams, lab.sizes.stream_context
    while streams >= 1:
        if not lab.has(part, streams=streams):
            try:
                lab.record(part, scheme=scheme, streams=streams, frames=context, **watch_live(lab, scheme, streams))
                return
            except torch.OutOfMemoryError:
                pass
            free(lab.device)
            lab.record(part, scheme=scheme, streams=streams, frames=context, error="not enough memory")
        elif lab.has(part, streams=streams, keeps_up=True) or lab.has(part, streams=streams, keeps_up=False):
            return
        streams //= 2


def watch_live(lab: Lab, scheme: str, streams: int) -> dict[str, Any]:
    """Return the figures of an engine with this number of live streams."""
    model, context, seconds = lab.models[scheme], lab.sizes.stream_context, lab.sizes.stream_seconds
    ticks = math.ceil(seconds * FPS)
    limits = {"max_frames": context + ticks + TOGETHER, "max_text_tokens": 512}
    free(lab.device)
    before = held_gb(lab.device)
    reset_peak(lab.device)
    engine = StreamingEngine(model, random_processor(model), max_streams=streams, when_behind="drop_oldest", **limits)
    with engine:
        opened = [engine.open(fps=FPS) for _ in range(streams)]
        for stream in opened:
            fill_cache(stream.session.cache, model, context)
        frame = torch.randint(0, 256, (*image_size(model.config), 3), dtype=torch.uint8).numpy()
        late = feed(opened, frame, ticks)
        waited = clock.monotonic()
        while any(stream.num_waiting for stream in opened) and clock.monotonic() < waited + 5:
            clock.sleep(0.05)
        # The first frame of each stream comes with the system prompt.
        latencies = list(engine.stats.frame_latencies)[streams:]
        error = next((stream.error for stream in opened if stream.error), None)
    if error is not None:
        raise error
    stats = engine.stats
    return {
        "p50, ms": 1e3 * median(latencies),
        "p99, ms": 1e3 * p99(latencies),
        "frames seen": stats.frames,
        "dropped": stats.dropped,
        "captured steps": f"{stats.captured_steps} of {stats.steps}",
        "feeder late, ms": 1e3 * late,
        "peak, GB": peak_above(before, lab.device),
        "keeps_up": stats.dropped == 0 and p99(latencies) < 1 / FPS,
    }


def feed(streams: list[EngineStream], frame: Any, ticks: int) -> float:
    """Push a frame per tick into each stream, evenly spread over time. Returns the seconds of the latest delay."""
    begin, late = clock.monotonic() + 0.1, 0.0
    for number in range(ticks * len(streams)):
        due = begin + number / (FPS * len(streams))
        clock.sleep(max(due - clock.monotonic(), 0))
        late = max(late, clock.monotonic() - due)
        streams[number % len(streams)].push(frame, time=number // len(streams) / FPS)
    return late


def measure_training(lab: Lab, kind: int) -> None:
    """Measure LoRA steps over one number of frames."""
    lab.forget_models()
    frames, checkpointing = lab.sizes.training[kind]
    part = PART_OF_TRAINING[kind]
    steps = 3 if lab.sizes is LARGE else 1
    options = {"shape": lab.options.shape, "device": lab.device, "tokens": lab.options.tokens, "frames": frames}
    for scheme in lab.options.schemes:
        cells = {"scheme": scheme, "frames": frames, "checkpointing": checkpointing}
        if lab.has(part, **cells):
            continue
        free(lab.device)
        given = argparse.Namespace(**options, text_tokens=200, steps=steps)
        try:
            row = training.measure(scheme, "lora", checkpointing, given)
        except torch.OutOfMemoryError:
            lab.record(part, **cells, error="not enough memory")
            continue
        lab.record(part, **cells, **{"s per step": row.seconds, "memory, GB": row.memory, "loss": row.loss})


PART_OF_TRAINING = ("training", "training-long")
PARTS: dict[str, Part] = {
    "floors": Part(measure_floors, 5),
    "engine": Part(measure_engine, 90),
    "tests": Part(run_tests, TEST_SECONDS),
    "sessions": Part(measure_sessions, 60),
    "compiled-all_deep": Part(partial(measure_compiled, scheme="all_deep"), 70),
    "streams-all_deep": Part(partial(measure_live_streams, scheme="all_deep"), 50),
    "training": Part(partial(measure_training, kind=0), 40),
    "compiled-full": Part(partial(measure_compiled, scheme="full"), 70),
    "training-long": Part(partial(measure_training, kind=1), 60),
    "compiled-interleaved": Part(partial(measure_compiled, scheme="interleaved"), 70),
    "streams-interleaved": Part(partial(measure_live_streams, scheme="interleaved"), 50),
    "streams-full": Part(partial(measure_live_streams, scheme="full"), 50),
}


# ------------------------------------------------------------------------------------------------------------- report


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table, with a column for each name that a row has."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(head, ([shown(row.get(name)) for name in head] for row in rows))


def shown(value: Any) -> str:
    """Format a figure: three digits, and all digits of whole numbers."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def draw(lab: Lab) -> None:
    """
    Draw the latency of a frame step against frames in the cache (`gpu.png`), and as bars the latency of live streams
    (`gpu_streams.png`) and the time and memory of training (`gpu_training.png`), as far as they were measured.
    """
    for part, cells in (("streams", ("p50, ms", "p99, ms")), ("training", ("s per step", "memory, GB"))):
        if bars := bars_of(lab, part, cells):
            draw_bars(bars, lab.options.out / f"gpu_{part}.png")
    rows = [row for part in lab.parts.values() for row in part["rows"] if "runner" in row and "p50, ms" in row]
    names = {(row["scheme"], row["runner"]) for row in rows}
    points = [
        Point(lab.options.tokens, f"{scheme}, {runner}", row["frames"], row["p50, ms"])
        for scheme, runner in sorted(names, key=lambda name: (name[1], name[0]))
        for row in sorted(rows, key=lambda row: row["frames"])
        if (row["scheme"], row["runner"]) == (scheme, runner)
    ]
    if points:
        draw_panels(points, lab.options.out / "gpu.png", "frames in the cache", "ms per frame")


def bars_of(lab: Lab, part: str, cells: tuple[str, ...]) -> list[Bar]:
    """Return the figures of live streams or of training as bars. Rows without figures did not fit into memory."""
    rows = [row for name, own in lab.parts.items() if name.partition("-")[0] == part for row in own["rows"]]
    bars = []
    for cell, row in ((cell, row) for cell in cells for row in rows if row.get(cell) is not None):
        group = f"{row['streams']} streams" if part == "streams" else f"{row['frames']} frames"
        group += ",\ncheckpointing" if row.get("checkpointing") else ""
        bars.append(Bar(cell, group, row["scheme"], row[cell]))
    return bars


if __name__ == "__main__":
    main()
