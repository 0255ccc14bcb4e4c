# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How long does one frame take, for a given number of frames in the cache?

```bash
python benchmarks/frame_latency.py                                             # a small model on the CPU
python benchmarks/frame_latency.py --checkpoint . --contexts 10 60             # the embedded checkpoint
python benchmarks/frame_latency.py --shape llama3-8b --device cuda --tokens 50 --encoder siglip-l \\
    --contexts 10 300 600 1200 3600                                            # on a GPU
```

A step processes one new frame: its tokens go through all layers, and the model decides whether to speak. `--runners`
chooses what runs it: a session with a growing cache, with a preallocated one (`max_frames`) or compiled, or an engine
with one stream, which replays captured graphs on a GPU. Each routing scheme is compared with the plain loop: the same
language model at full compute, Transformers' `DynamicCache`, one frame at a time.

The variants are interleaved, five steps each, on the same weights. "Speedup" is the plain loop's time over the
variant's, the median over pairs of steps. Everything is measured twice (`--tries`) with newly allocated caches,
because the location of a cache in memory changes its speed. Medians are over both tries. p99 of fewer than 100 steps
is the slowest.

"Floor" is the least time that this machine needs for a step. It is the larger of two times: bytes of weights and cache
over the measured rate of a copy, and operations over the measured rate of a matrix product. "MB moved" is what the
operations of an uncompiled step read and write, and "least" is weights and cache, read once.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median

from videollm_mod.console import quiet

import torch
from common import Step, in_turns, machine_rates, p99
from counting import CountOperations
from memory import free, held_gb, peak_gb, reset_peak, stored_bytes
from report import Point, draw_panels, markdown_table, rate, ratio, write_results
from tqdm import tqdm
from watching import PLAIN, RUNNERS, TOGETHER, PlainLoop, Watcher, add_model_options, describe, model_sets, parse

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.space.command_line import CommandLineParser


# A variant is built from the number of frames in its cache.
Variant = Callable[[int], Watcher]
# Kinds of step that are measured besides a frame: see [`Row`].
KINDS = ("together", "encoded", "speak", "word")


@dataclass
class Row:
    """
    Results of one variant at one context.

    Args:
        variant (`str`): Routing scheme and what runs it, or the plain loop.
        tokens (`int`): Tokens per frame.
        context (`int`): Frames in the cache.
        p50, p99 (`float`): Milliseconds per frame step.
        speedup (`float`, *optional*): Over the plain loop, if both were measured together.
        together (`float`, *optional*): Milliseconds per frame in a step of eight frames.
        together_speedup (`float`, *optional*): Over the plain loop, which processes the eight frames one by one.
        encoded (`float`, *optional*): Frames per second including vision encoding.
        first_word (`float`, *optional*): Milliseconds from an encoded frame to the first token of a reply.
        tokens_per_second (`float`, *optional*): Reply tokens per second.
        cache_mb (`float`): Megabytes of the cache.
        peak_gb (`float`, *optional*): Peak memory while the variant ran one step of each kind, without what other
            variants held. On a GPU the memory of tensors, on Linux that of the process.
        floor (`float`): Least milliseconds per frame step on this machine.
        moved_mb (`float`, *optional*): Megabytes that the operations of a frame step read and write. Not known for
            compiled and captured steps.
        least_mb (`float`): Megabytes of the weights and the cache.
    """

    variant: str
    tokens: int
    context: int
    p50: float
    p99: float
    speedup: float | None
    together: float | None
    together_speedup: float | None
    encoded: float | None
    first_word: float | None
    tokens_per_second: float | None
    cache_mb: float
    peak_gb: float | None
    floor: float
    moved_mb: float | None
    least_mb: float


@dataclass
class Measured:
    """
    Raw measurements of one variant at one context.

    Args:
        tokens (`int`): Tokens per frame.
        seconds (`dict[str, list[float]]`): Seconds of each kind of step, in the order of measurement.
        cache_bytes (`int`): Bytes of the cache.
        peak_gb (`float`, *optional*): See [`Row`].
        floor (`float`): Least seconds per frame step.
        moved_bytes (`int`, *optional*), least_bytes (`int`): See [`Row`].
        is_beside_others (`bool`): Whether it took turns with other variants.
    """

    tokens: int
    seconds: dict[str, list[float]]
    cache_bytes: int
    peak_gb: float | None
    floor: float
    moved_bytes: int | None
    least_bytes: int
    is_beside_others: bool

    def joined(self, other: "Measured") -> "Measured":
        """Return both measurements as one: all seconds, and the smaller peak."""
        seconds = {kind: taken + other.seconds[kind] for kind, taken in self.seconds.items()}
        peak = None if self.peak_gb is None else min(self.peak_gb, other.peak_gb)
        return replace(other, seconds=seconds, peak_gb=peak)


def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure the latency of a frame, with routing and without.")
    add_model_options(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[10, 300, 600], help="frames in the cache")
    parser.add_argument(
        "--runners", nargs="+", choices=RUNNERS, default=["session", "engine"], help="what runs the steps"
    )
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of step besides a frame")
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind")
    parser.add_argument("--tries", type=int, default=2, help="repetitions with newly allocated caches")
    parser.add_argument("--out", type=Path, help="folder for latency.json, latency.md and latency.png")
    options = parse(parser)
    if options.steps < 1 or options.tries < 1:
        parser.error(f"--steps {options.steps} --tries {options.tries}: both must be at least 1")
    rates = machine_rates(options.device, options.dtype)
    rows: list[Row] = []
    text = ""
    for models in model_sets(options):
        for found in measure(models, rates, options):
            rows = sorted(rows + found, key=lambda row: (row.tokens, row.context))
            text = report(rows, rates, options)
        del models
        free(options.device)  # before the next models are built
    print(text)
    if options.out is not None and rows:
        points = [Point(row.tokens, row.variant, row.context, row.p50) for row in rows]
        draw_panels(points, options.out / "latency.png", "frames in the cache", "ms per frame")


def report(rows: list[Row], rates: tuple[float, float], options: argparse.Namespace) -> str:
    """Return all results so far as Markdown, and write them if asked."""
    machine = describe(rates, options)
    text = f"{machine}\n\n{table(rows)}\n"
    if options.out is not None:
        write_results(options.out, "latency", {"machine": machine, "rows": [asdict(row) for row in rows]}, text)
    return text


def measure(
    models: dict[str, VideoLLMMoDForConditionalGeneration], rates: tuple[float, float], options: argparse.Namespace
) -> Iterator[list[Row]]:
    """Yield the rows of each context: every scheme, and the plain loop on the weights of full compute."""
    variants = make_variants(models, options)
    for context in tqdm(sorted(options.contexts), desc="frames in the cache", leave=False):
        found = measure_context(variants, context, rates, options)
        for name in [name for name in variants if name not in found]:
            # There was no memory for it beside the others.
            found |= measure_context({name: variants[name]}, context, rates, options)
            if name not in found:
                print(f"{name}: not enough memory for {context} frames, left out")
                del variants[name]
        yield [make_row(name, context, found) for name in variants]


def make_variants(
    models: dict[str, VideoLLMMoDForConditionalGeneration], options: argparse.Namespace
) -> dict[str, Variant]:
    """Return the variants to compare, by name."""
    variants: dict[str, Variant] = {}
    for scheme, model in models.items():
        for runner in options.runners:
            name = f"{scheme}, {runner.replace('-', ', ')}"
            variants[name] = partial(RUNNERS[runner], model, cache_dtype=options.cache_dtype)
        if scheme == "full":
            variants[PLAIN] = partial(PlainLoop, model)
    return variants


def measure_context(
    variants: dict[str, Variant], context: int, rates: tuple[float, float], options: argparse.Namespace
) -> dict[str, Measured]:
    """Measure all variants at one context. Variants without memory beside the others are missing from the result."""
    found: dict[str, Measured] = {}
    for attempt in range(options.tries):
        free(options.device)
        new = measure_once(variants, context, rates, options)
        found = {name: found[name].joined(one) if attempt else one for name, one in new.items()}
        variants = {name: variants[name] for name in found}
    return found


def measure_once(
    variants: dict[str, Variant], context: int, rates: tuple[float, float], options: argparse.Namespace
) -> dict[str, Measured]:
    """Build all variants, let them take turns at each kind of step, and return what was measured."""
    started = start_all(variants, context, options)
    gc.collect()  # as `StreamingEngine.warm_up` does
    some = max(options.steps // 2, 3)
    counts = {"frame": options.steps} | dict.fromkeys(options.kinds, some)
    taken = {
        kind: in_turns({name: steps[kind] for name, (_, steps, _) in started.items()}, count, options.device)
        for kind, count in counts.items()
    }
    return {
        name: Measured(
            tokens=watcher.config.frame_num_tokens,
            seconds={kind: taken[kind][name] for kind in counts},
            cache_bytes=watcher.cache_bytes(),
            peak_gb=peak,
            floor=floor(watcher, context, rates),
            moved_bytes=moved_bytes(steps["frame"]) if "compiled" not in name else None,
            least_bytes=least_bytes(watcher),
            is_beside_others=len(started) > 1,
        )
        for name, (watcher, steps, peak) in started.items()
    }


def start_all(
    variants: dict[str, Variant], context: int, options: argparse.Namespace
) -> dict[str, tuple[Watcher, dict[str, Step], float | None]]:
    """Return each variant that fits in memory with its steps and its peak; each step has run once."""
    started: dict[str, tuple[Watcher, dict[str, Step], float | None]] = {}
    at_first = held_gb(options.device)
    for name, variant in variants.items():
        others = held_gb(options.device) - at_first
        reset_peak(options.device)
        try:
            watcher, steps = start(variant, context, options)
        except torch.OutOfMemoryError:
            free(options.device)
            continue
        peak = peak_gb(options.device)
        started[name] = watcher, steps, None if peak is None else peak - others
    return started


def start(variant: Variant, context: int, options: argparse.Namespace) -> tuple[Watcher, dict[str, Step]]:
    """Build a variant and run each of its steps once."""
    watcher = variant(context)
    steps = {kind: step for kind, step in watcher.steps(options.dtype).items() if kind in ("frame", *options.kinds)}
    for step in steps.values():
        step()()
    return watcher, steps


def floor(watcher: Watcher, context: int, rates: tuple[float, float]) -> float:
    """Return the least seconds per frame step, at the machine's rates of copies and of matrix products."""
    model = watcher.model
    cost = model.estimate_cost(1, 1, past_frames=context, past_text_tokens=context)
    return max(least_bytes(watcher) / rates[0], cost.flops / rates[1])


def least_bytes(watcher: Watcher) -> int:
    """Return the bytes that a frame step must read: the weights of all layers, the head and the cache."""
    read = [*watcher.model.model.language_model.layers.parameters(), watcher.model.lm_head.weight]
    return sum(map(stored_bytes, read)) + watcher.cache_bytes()


def moved_bytes(step: Step) -> int:
    """Return the bytes that the operations of a step read and write."""
    with CountOperations() as counted:
        undo = step()
    undo()
    return counted.num_bytes


def make_row(name: str, context: int, found: dict[str, Measured]) -> Row:
    """Return the results of one variant."""
    measured = found[name]
    seconds = {kind: median(taken) for kind, taken in measured.seconds.items()}
    is_paired = PLAIN in found and measured.is_beside_others and found[PLAIN].is_beside_others

    def speedup(kind: str) -> float | None:
        # Both steps of a pair ran within the same seconds, so a slower machine slows both.
        is_known = is_paired and kind in seconds
        return median(map(truediv, found[PLAIN].seconds[kind], measured.seconds[kind])) if is_known else None

    def milliseconds(kind: str, count: int = 1) -> float | None:
        return 1e3 * seconds[kind] / count if kind in seconds else None

    def per_second(kind: str) -> float | None:
        return 1 / seconds[kind] if kind in seconds else None

    return Row(
        name,
        measured.tokens,
        context,
        p50=1e3 * seconds["frame"],
        p99=1e3 * p99(measured.seconds["frame"]),
        speedup=speedup("frame"),
        together=milliseconds("together", TOGETHER),
        together_speedup=speedup("together"),
        encoded=per_second("encoded"),
        first_word=milliseconds("speak"),
        tokens_per_second=per_second("word"),
        cache_mb=measured.cache_bytes / 1e6,
        peak_gb=measured.peak_gb,
        floor=1e3 * measured.floor,
        moved_mb=None if measured.moved_bytes is None else measured.moved_bytes / 1e6,
        least_mb=measured.least_bytes / 1e6,
    )


def table(rows: list[Row]) -> str:
    """Return the results as a Markdown table, without columns of figures that no row has."""
    head = ["tokens per frame", "frames in cache", "variant", "p50, ms", "p99, ms", "p50 / floor", "speedup"]
    head += [f"ms per frame, {TOGETHER} together", "speedup, together", "frames/s with encoding"]
    head += ["first word, ms", "tokens/s", "cache, MB", "peak, GB", "MB moved", "least"]
    columns = [column for column in zip(head, *map(cells, rows), strict=True) if set(column[1:]) != {"-"}]
    head, *lines = zip(*columns, strict=True)
    return markdown_table(head, lines)


def cells(row: Row) -> list[str]:
    """Return one line of the table."""
    return [
        *map(str, (row.tokens, row.context, row.variant)),
        *(f"{row.p50:.2f}", f"{row.p99:.2f}", f"{row.p50 / row.floor:.1f}", shown(row.speedup)),
        *(shown(row.together), shown(row.together_speedup), shown(row.encoded, rate), shown(row.first_word)),
        *(shown(row.tokens_per_second, rate), f"{row.cache_mb:.1f}", shown(row.peak_gb)),
        *(shown(row.moved_mb, rate), rate(row.least_mb)),
    ]


def shown(value: float | None, form: Callable[[float], str] = ratio) -> str:
    """Format a figure, or return "-" if it was not measured."""
    return "-" if value is None else form(value)


if __name__ == "__main__":
    main()
