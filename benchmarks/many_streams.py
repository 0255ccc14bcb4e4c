# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How many streams can one model serve?

```bash
python benchmarks/many_streams.py                                              # a small model on the CPU
python benchmarks/many_streams.py --checkpoint . --context 24 --streams 1 8    # the embedded checkpoint
python benchmarks/many_streams.py --shape llama3-8b --device cuda --tokens 50 --encoder siglip-l \\
    --streams 1 8 16 32 64 --context 300                                       # on a GPU
```

In a round, every stream sends one frame at the same moment. The time of a round covers vision encoding, all layers and
the speak/stay-silent decisions. At 2 frames per second per stream, a round of more than half a second misses its
deadline. The schemes are measured one after another. p99 of fewer than 100 rounds is the slowest.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from videollm_mod.console import quiet

import torch
from common import in_turns, p99
from memory import free
from report import Point, draw_panels, markdown_table, rate, write_results
from tqdm import tqdm
from watching import add_model_options, describe, frame_step, image_size, make_engine, model_sets, parse

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import StreamingEngine, VideoLLMMoDPagedCache
from videollm_mod.space.command_line import CommandLineParser


# Seconds between the frames of a stream.
DEADLINE = 0.5


@dataclass
class Round:
    """
    Results for a number of streams.

    Args:
        scheme (`str`): Routing scheme.
        tokens (`int`): Tokens per frame.
        streams (`int`): Number of streams.
        p50, p99 (`float`): Milliseconds per round.
        frames_per_second (`float`): Of all streams together.
        missed (`int`): Measured rounds that missed the deadline.
        cache_mb (`float`): Megabytes of all caches.
    """

    scheme: str
    tokens: int
    streams: int
    p50: float
    p99: float
    frames_per_second: float
    missed: int
    cache_mb: float


@one_line_errors()
def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure many streams on one model.")
    add_model_options(parser)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of streams")
    parser.add_argument("--context", type=int, default=60, help="frames in the cache of each stream")
    parser.add_argument("--rounds", type=int, default=25, help="measured rounds")
    parser.add_argument("--out", type=Path, help="folder for streams.json, streams.md and streams.png")
    options = parse(parser)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    rounds: list[Round] = []
    text = ""
    for models in model_sets(options):
        for scheme, model in models.items():
            for one in measure(model, scheme, options):
                rounds = sorted([*rounds, one], key=lambda row: (row.tokens, row.streams))
                text = report(rounds, options)
        del models, model
        free(options.device)  # before the next models are built
    print(text)
    if options.out is not None and rounds:
        points = [Point(row.tokens, row.scheme, row.streams, row.frames_per_second) for row in rounds]
        draw_panels(points, options.out / "streams.png", "streams", "frames/s, all streams together")


def report(rounds: list[Round], options: argparse.Namespace) -> str:
    """Return all results so far as Markdown, and write them if asked."""
    machine = f"{describe(None, options)} {options.context} frames in the cache of each stream."
    text = f"{machine}\n\n{table(rounds)}\n"
    if options.out is not None:
        write_results(options.out, "streams", {"machine": machine, "rows": [asdict(row) for row in rounds]}, text)
    return text


def measure(model: VideoLLMMoDForConditionalGeneration, scheme: str, options: argparse.Namespace) -> Iterator[Round]:
    """Yield the results for each number of streams that fits in memory."""
    for streams in tqdm(sorted(options.streams), desc=f"{scheme}, streams", leave=False):
        free(options.device)
        try:
            yield measure_rounds(model, scheme, streams, options)
        except torch.OutOfMemoryError:
            tokens = model.config.frame_num_tokens
            print(f"{scheme}, {tokens} tokens per frame: not enough memory for {streams} streams, left out")
            break


def measure_rounds(
    model: VideoLLMMoDForConditionalGeneration, scheme: str, streams: int, options: argparse.Namespace
) -> Round:
    """Measure rounds of one number of streams."""
    engine, caches = make_engine(model, streams, options.context, cache_dtype=options.cache_dtype)
    pixels = torch.randn(streams, 3, *image_size(model.config), device=options.device, dtype=options.dtype)
    step = partial(watch_all, engine, caches, pixels)
    seconds = in_turns({scheme: step}, options.rounds, options.device)[scheme]
    p50 = median(seconds)
    return Round(
        scheme,
        model.config.frame_num_tokens,
        streams,
        p50=1e3 * p50,
        p99=1e3 * p99(seconds),
        frames_per_second=streams / p50,
        missed=sum(taken > DEADLINE for taken in seconds),
        cache_mb=sum(cache.num_bytes for cache in caches) / 1e6,
    )


def watch_all(
    engine: StreamingEngine, caches: list[VideoLLMMoDPagedCache], pixels: torch.Tensor
) -> Callable[[], None]:
    """Process one frame of each stream and return the undo function."""
    before = int(caches[0].get_seq_length())
    with torch.no_grad():
        features = engine.model.encode_frames(pixels)
    engine.runner.execute(caches, [frame_step(engine.model.config, frames) for frames in features[:, None]])

    def undo() -> None:
        for cache in caches:
            cache.crop(before - int(cache.get_seq_length()))

    return undo


def table(rounds: list[Round]) -> str:
    """Return the results as a Markdown table."""
    head = ["tokens per frame", "streams", "scheme", "p50, ms", "p99, ms", "frames/s, all streams"]
    head += ["deadlines missed at 2 fps", "caches, MB"]
    return markdown_table(
        head,
        (
            [row.tokens, row.streams, row.scheme, f"{row.p50:.1f}", f"{row.p99:.1f}"]
            + [rate(row.frames_per_second), row.missed, f"{row.cache_mb:.1f}"]
            for row in rounds
        ),
    )


if __name__ == "__main__":
    main()
