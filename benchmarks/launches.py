# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How many kernels does one frame launch, and does routing still save time where launches take most of it?

```bash
python benchmarks/launches.py
python benchmarks/launches.py --contexts 300 --schemes full all_deep     # fewer times
```

The model has 32 layers that are so narrow that an eager step takes as long as its launches. Operations that compute
something count, views do not. An engine's attention over pages counts as one kernel, as on a GPU.
"A routed layer adds" is the difference to full compute, divided by the number of routed layers.

Times are of eager sessions, which take turns. "Over full" is the median over pairs of steps.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path
from statistics import median

from videollm_mod.console import quiet

import torch
from common import SCHEMES, device_name, in_turns, num_frame_tokens
from counting import CountOperations
from report import markdown_table, ratio, write_results
from watching import EngineWatcher, SessionWatcher, Watcher, random_models

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import packed_cache
from videollm_mod.space.command_line import CommandLineParser


# Frames in the cache while launches are counted, which do not depend on it.
COUNTED_AT = 10


@dataclass
class Launches:
    """
    Launches of a frame step.

    Args:
        runner (`str`): `"session"` or `"engine"`.
        scheme (`str`): Routing scheme.
        launches (`int`): Operations that compute something.
        per_routed_layer (`float`, *optional*): What a routed layer adds to a full one.
        most_common (`dict[str, int]`): The most frequent operations.
    """

    runner: str
    scheme: str
    launches: int
    per_routed_layer: float | None
    most_common: dict[str, int]


@dataclass
class Time:
    """
    Time of a frame step.

    Args:
        context (`int`): Frames in the cache.
        scheme (`str`): Routing scheme.
        p50 (`float`): Milliseconds.
        over_full (`float`, *optional*): Time over that of full compute.
    """

    context: int
    scheme: str
    p50: float
    over_full: float | None


@one_line_errors()
def main() -> None:
    """Count and measure, and print two tables; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Count the kernel launches of a frame, and compare eager times.")
    parser.add_argument("--tokens", type=num_frame_tokens, default=10, help="tokens per frame, 1 + n x n")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="routing schemes")
    parser.add_argument("--contexts", type=int, nargs="*", default=[10, 300, 600], help="frames in the cache")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each kind")
    parser.add_argument("--out", type=Path, help="folder for launches.json and launches.md")
    options = parser.parse_args()
    models = random_models(
        options.tokens,
        argparse.Namespace(
            **{"shape": "narrow", "schemes": options.schemes, "encoder": None, "weights": None},
            **{"dtype": torch.float32, "device": "cpu"},
        ),
    )
    counts = list(count_all(models))
    times = [row for context in sorted(options.contexts) for row in measure(models, context, options.steps)]
    machine = f"32 narrow layers, {options.tokens} tokens per frame, {device_name('cpu')}, torch {torch.__version__}"
    text = f"{machine}\n\n{launches_table(counts)}\n\n{times_table(times)}\n"
    if options.out is not None:
        figures = {"launches": [asdict(row) for row in counts], "times": [asdict(row) for row in times]}
        write_results(options.out, "launches", {"machine": machine, **figures}, text)
    print(text)


def count_all(models: dict[str, VideoLLMMoDForConditionalGeneration]) -> Iterator[Launches]:
    """Yield the launches of each scheme, in a session and in an engine."""
    for runner, make in (("session", SessionWatcher), ("engine", EngineWatcher)):
        counts: dict[str, Counter[str]] = {}
        with attention_as_one_kernel():
            for scheme, model in models.items():
                counts[scheme] = count_launches(make(model, COUNTED_AT))
        for scheme, found in counts.items():
            routed = len(models[scheme].config.routed_layers)
            more = found.total() - counts["full"].total() if routed and "full" in counts else None
            extra = None if more is None else more / routed
            yield Launches(runner, scheme, found.total(), extra, dict(found.most_common(12)))


def count_launches(watcher: Watcher) -> Counter[str]:
    """Return the operations of one frame step by name, without its undoing."""
    step = watcher.steps(torch.float32)["frame"]
    for _ in range(2):
        step()()
    with CountOperations() as counted:
        undo = step()
    undo()
    return counted.counts


@contextmanager
def attention_as_one_kernel() -> Iterator[None]:
    """Let an engine's attention over pages be one operation, as a kernel on a GPU is."""
    chosen = packed_cache.choose_attention
    packed_cache.choose_attention = lambda *_, **__: ("one kernel", lambda rows, *_: rows.clone())
    try:
        yield
    finally:
        packed_cache.choose_attention = chosen


def measure(models: dict[str, VideoLLMMoDForConditionalGeneration], context: int, num_steps: int) -> Iterator[Time]:
    """Yield the time of each scheme's eager session."""
    steps = {scheme: SessionWatcher(model, context).steps(torch.float32)["frame"] for scheme, model in models.items()}
    taken = in_turns(steps, num_steps, "cpu")
    for scheme, seconds in taken.items():
        over = median(map(truediv, seconds, taken["full"])) if "full" in taken else None
        yield Time(context, scheme, 1e3 * median(seconds), over)


def launches_table(rows: list[Launches]) -> str:
    """Return the launches as a Markdown table."""
    cells = [[row.runner, row.scheme, row.launches, ratio(row.per_routed_layer)] for row in rows]
    return markdown_table(["runner", "scheme", "launches per frame", "a routed layer adds"], cells)


def times_table(rows: list[Time]) -> str:
    """Return the times as a Markdown table."""
    cells = [[row.context, row.scheme, f"{row.p50:.1f}", ratio(row.over_full)] for row in rows]
    return markdown_table(["frames in cache", "scheme, eager session", "p50, ms", "over full"], cells)


if __name__ == "__main__":
    main()
