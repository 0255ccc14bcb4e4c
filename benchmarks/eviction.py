# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What does it cost to forget? Evictions, crops, and the bookkeeping of frames when nothing goes.

```bash
python benchmarks/eviction.py
python benchmarks/eviction.py --max-frames 60 --schemes all_deep
```

The model has 32 narrow layers and random weights. Before each frame a session asks what must be evicted. "Bookkeeping"
is the time of this question when the answer is nothing. An eviction comes once in `max_frames / 8` frames. A crop
removes the frames of a step that come after the one at which the model speaks. Launches are counted as
in `launches.py`.
"""

import argparse
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from videollm_mod.console import quiet

import torch
from common import SCHEMES, device_name, num_frame_tokens
from counting import CountOperations
from report import markdown_table, write_results
from watching import TOGETHER, image_size, random_models, random_processor, silence

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import StreamingEngine
from videollm_mod.space.command_line import CommandLineParser


@dataclass
class Row:
    """
    Costs of forgetting.

    Args:
        runner (`str`): `"session"` or `"engine"`.
        scheme (`str`): Routing scheme.
        max_frames (`int`): Frames that the session remembers.
        bookkeeping (`float`): Milliseconds per frame when nothing is evicted.
        eviction (`float`): Milliseconds of an eviction.
        eviction_launches (`int`): Its kernel launches.
        crop_launches (`int`): Kernel launches of a crop.
    """

    runner: str
    scheme: str
    max_frames: int
    bookkeeping: float
    eviction: float
    eviction_launches: int
    crop_launches: int


@one_line_errors()
def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure evictions, crops and the bookkeeping of frames.")
    parser.add_argument("--tokens", type=num_frame_tokens, default=10, help="tokens per frame, 1 + n x n")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["full", "all_deep"], help="routing schemes")
    parser.add_argument("--max-frames", type=int, nargs="+", default=[30, 180], help="frames to remember")
    parser.add_argument("--out", type=Path, help="folder for eviction.json and eviction.md")
    options = parser.parse_args()
    random = {"shape": "narrow", "schemes": options.schemes, "encoder": None, "weights": None}
    given = argparse.Namespace(**random, dtype=torch.float32, device="cpu")
    rows = list(measure_all(random_models(options.tokens, given), options.max_frames))
    machine = f"32 narrow layers, {options.tokens} tokens per frame, {device_name('cpu')}, torch {torch.__version__}"
    text = f"{machine}\n\n{table(rows)}\n"
    if options.out is not None:
        write_results(options.out, "eviction", {"machine": machine, "rows": [asdict(row) for row in rows]}, text)
    print(text)


def measure_all(models: dict[str, VideoLLMMoDForConditionalGeneration], max_frames: list[int]) -> Iterator[Row]:
    """Yield the costs of each number of frames to remember."""
    for model in models.values():
        silence(model)
    for most in max_frames:
        for runner in ("session", "engine"):
            for scheme, model in models.items():
                yield measure(model, runner, scheme, most)


def measure(model: VideoLLMMoDForConditionalGeneration, runner: str, scheme: str, max_frames: int) -> Row:
    """Watch until frames are evicted, and return what that took."""
    processor, limits = random_processor(model), {"max_frames": max_frames, "max_text_tokens": 256}
    if runner == "session":
        stream = session = model.stream(processor, **limits)
    else:
        engine = StreamingEngine(model, processor, max_streams=1, **limits)
        stream = engine.open()
        session = stream.session
    frame = torch.zeros(*image_size(model.config), 3, dtype=torch.uint8).numpy()

    def see(count: int) -> None:
        stream.push([frame] * count)
        if runner == "engine":
            engine.run()

    see(max_frames - 1)
    taken = [timed(lambda: session._make_room(0)) for _ in range(50)]
    see(1)
    counted, seconds = watched_eviction(model, lambda: see(1))
    see(TOGETHER)
    tokens = model.config.frame_num_tokens + 1
    with CountOperations() as cropped:
        session.cache.crop(-2 * tokens, num_frames=2)
    return Row(
        runner,
        scheme,
        max_frames,
        bookkeeping=1e3 * median(taken),
        eviction=1e3 * seconds,
        eviction_launches=counted.counts.total(),
        crop_launches=cropped.counts.total(),
    )


def watched_eviction(model: Any, see: Callable[[], None]) -> tuple[CountOperations, float]:
    """Return the operations and the seconds of the eviction that seeing a frame causes."""
    evict, seconds = model.evict_tokens, []
    counted = CountOperations()

    def watched(*args: Any) -> None:
        begin = clock.perf_counter()
        with counted:
            evict(*args)
        seconds.append(clock.perf_counter() - begin)

    model.evict_tokens = watched
    try:
        see()
    finally:
        del model.evict_tokens
    return counted, sum(seconds)


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds that a function takes."""
    begin = clock.perf_counter()
    function()
    return clock.perf_counter() - begin


def table(rows: list[Row]) -> str:
    """Return the results as a Markdown table."""
    head = ["runner", "scheme", "frames remembered", "bookkeeping, ms per frame", "one eviction, ms"]
    head += ["launches of an eviction", "of a crop"]
    return markdown_table(
        head,
        (
            [row.runner, row.scheme, row.max_frames, f"{row.bookkeeping:.3f}", f"{row.eviction:.1f}"]
            + [row.eviction_launches, row.crop_launches]
            for row in rows
        ),
    )


if __name__ == "__main__":
    main()
