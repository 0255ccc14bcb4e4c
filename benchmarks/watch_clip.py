# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How long does a checkpoint take to watch a video file, from opening it to the last word?

```bash
python benchmarks/watch_clip.py                                  # the embedded checkpoint and its sample
python benchmarks/watch_clip.py --checkpoint folder-or-hub-id --video clip.mp4 --runners session engine-compiled
```

Sessions, engines with one stream (`--runners`) and the plain loop watch the clip in turns, 15 times each. The median
counts. The plain loop is given the words to say, so that all variants do the same work. "Speedup" is the plain loop's
time over the variant's, the median over rounds.
"""

import argparse
import time as clock
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

from videollm_mod.console import quiet

import torch
from common import PROMPT, ROOT
from report import markdown_table, write_results
from tqdm import tqdm
from transformers import AutoProcessor
from watching import (
    AS_SAVED,
    PLAIN,
    REPLY_OPENING,
    RUNNERS,
    PlainLoop,
    add_run_options,
    describe,
    load,
    parse,
    session_options,
)

from videollm_mod.mistakes import one_line_errors
from videollm_mod.reading_ahead_videollm_mod import read_ahead
from videollm_mod.serving import StreamingEngine
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.streaming_videollm_mod import StreamEvent


# Each variant watches the clip and returns what was said.
Watch = Callable[[], list[StreamEvent]]


@dataclass
class Clip:
    """
    Results of one variant.

    Args:
        variant (`str`): Kind of session or engine, or plain loop.
        frames (`int`): Frames watched.
        words (`int`): Tokens of replies.
        seconds (`float`): From opening the file to the last word.
        speedup (`float`): Over the plain loop.
    """

    variant: str
    frames: int
    words: int
    seconds: float
    speedup: float


@one_line_errors()
def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure how long a checkpoint takes to watch a video file.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--fps", type=float, default=2.0, help="frames watched per second of video")
    add_run_options(parser)
    parser.add_argument(
        "--runners", nargs="+", choices=RUNNERS, default=["session", "engine"], help="what watches the clip"
    )
    parser.add_argument("--tries", type=int, default=15, help="times that each variant watches the clip")
    parser.add_argument("--out", type=Path, help="folder for clip.json and clip.md")
    options = parse(parser)
    if options.tries < 1:
        parser.error(f"--tries {options.tries}: must be at least 1")
    clips = measure(options)
    machine = describe(None, options)
    text = f"{machine} Clip: {Path(options.video).name}.\n\n{table(clips, options.fps)}\n"
    if options.out is not None:
        write_results(options.out, "clip", {"machine": machine, "rows": [asdict(row) for row in clips]}, text)
    print(text)


def measure(options: argparse.Namespace) -> list[Clip]:
    """Let every variant watch the clip in turn."""
    variants, spoken, frames = make_variants(options)
    for name, watch in variants.items():
        # The first run warms up. All variants must say the same; the plain loop is given the words.
        said = watch()
        if name != PLAIN and texts(said) != texts(spoken):
            raise RuntimeError(f"{name} said something else than the session: {texts(said)}, not {texts(spoken)}")
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(options.tries), desc="rounds"):
        for name, watch in variants.items():
            begin = clock.perf_counter()
            watch()
            taken[name].append(clock.perf_counter() - begin)
    words = sum(len(event.token_ids) for event in spoken)
    # A round is compared with itself, so a slower machine slows all of its variants.
    return [
        Clip(name, frames, words, median(seconds), median(map(truediv, taken[PLAIN], seconds)))
        for name, seconds in taken.items()
    ]


def make_variants(options: argparse.Namespace) -> tuple[dict[str, Watch], list[StreamEvent], int]:
    """Return the variants by name, the replies of the session, and the number of frames."""
    model = load(AS_SAVED, options)
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    frames = sum(1 for _ in processor.read_video(options.video, fps=options.fps))
    by_session = partial(watch_by_session, model, processor, options)
    spoken = [event for event in by_session(session_options("session")) if event.role == "assistant"]
    variants: dict[str, Watch] = {
        PLAIN: partial(watch_by_plain_loop, load("full", options), processor, spoken, options)
    }
    most = max(frames, 8)
    for runner in options.runners:
        if runner.startswith("session"):
            watch = partial(by_session, session_options(runner, max_frames=most, max_text_tokens=256))
        else:
            limits = {"max_streams": 1, "max_frames": most, "cache_dtype": options.cache_dtype}
            engine = StreamingEngine(model, processor, compile_steps=runner == "engine-compiled", **limits)
            engine.warm_up()
            watch = partial(watch_by_engine, engine, processor, options)
        variants[runner.replace("-", ", ")] = watch
    return variants, spoken, frames


def make_engine(
    model: Any, processor: Any, frames: int, compiled: bool, options: argparse.Namespace
) -> StreamingEngine:
    """Return an engine for one stream that is ready."""
    limits = {"max_streams": 1, "max_frames": frames, "cache_dtype": options.cache_dtype}
    engine = StreamingEngine(model, processor, compile_steps=compiled, **limits)
    engine.warm_up()
    return engine


def watch_by_session(
    model: Any, processor: Any, options: argparse.Namespace, session: dict[str, Any]
) -> list[StreamEvent]:
    """Watch with `model.narrate` and the options of a kind of session."""
    session = {"fps": options.fps, "cache_dtype": options.cache_dtype, **session}
    return list(model.narrate(processor, options.video, PROMPT, **session))


def watch_by_engine(engine: StreamingEngine, processor: Any, options: argparse.Namespace) -> list[StreamEvent]:
    """Watch with one stream of an engine."""
    stream = engine.open(fps=options.fps)
    stream.ask(PROMPT, reply_now=False)
    frames = processor.read_video(options.video, fps=options.fps)
    for waiting in read_ahead(frames, stream.session.chunk_frames, is_live=False):
        stream.push([frame for _, frame in waiting], time=[time for time, _ in waiting])
        engine.run()
    stream.close()
    engine.run()
    return stream.events


def watch_by_plain_loop(
    model: Any, processor: Any, spoken: list[StreamEvent], options: argparse.Namespace
) -> list[StreamEvent]:
    """Watch with the plain loop, which repeats the replies of the session token by token."""
    loop = PlainLoop(model, 0)
    loop.talk(len(processor.tokenizer(PROMPT)["input_ids"]))
    for index, (_, frame) in enumerate(processor.read_video(options.video, fps=options.fps)):
        pixel_values = processor.process_frames([frame]).to(options.device)
        with torch.no_grad():
            loop.watch(model.encode_frames(pixel_values)[None])
        for event in [event for event in spoken if event.frame == index]:
            loop.talk(REPLY_OPENING)
            for _ in event.token_ids:
                loop.talk(1)
    return spoken


def texts(events: list[StreamEvent]) -> list[str]:
    """Return the texts of the replies."""
    return [event.text for event in events if event.role == "assistant"]


def table(clips: list[Clip], fps: float) -> str:
    """Return the results as a Markdown table."""
    head = ["variant", "seconds", "frames/s", "times real time", "speedup"]
    rates = [(row, row.frames / row.seconds) for row in clips]
    return markdown_table(
        head,
        (
            [row.variant, f"{row.seconds:.3f}", f"{rate:.0f}", f"{rate / fps:.0f}", f"{row.speedup:.2f}"]
            for row, rate in rates
        ),
    )


if __name__ == "__main__":
    main()
