# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Do latency and memory stay constant in an endless stream, which evicts its oldest frames?

```bash
python benchmarks/endless.py                         # the embedded checkpoint, 20,000 frames
python benchmarks/endless.py --checkpoint folder-or-hub-id --frames 100000 --max-frames 600
```

The sample clip repeats. A session watches it, or with `--engine` an engine's stream. Latency is the time from the
arrival of a frame to the decision on it: it includes vision encoding and evictions, but not replies.
"""

import argparse
from typing import Any

from videollm_mod.console import quiet

from common import PROMPT, ROOT, default_device, device_name, p99
from memory import process_bytes
from report import markdown_row, markdown_table
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import StreamingEngine
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser


# Frames between two lines of the table.
EVERY = 1000


def main() -> None:
    """Watch, print a line every 1,000 frames, and compare the last line with the second."""
    quiet()
    parser = CommandLineParser(description="Measure a stream that evicts its oldest frames.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--frames", type=int, default=20_000, help="frames to watch")
    parser.add_argument("--max-frames", type=int, default=60, help="frames in the cache")
    parser.add_argument("--max-text-tokens", type=int, default=1024, help="text tokens in the cache")
    parser.add_argument("--fps", type=float, default=2.0, help="frames watched per second of video")
    parser.add_argument("--engine", action="store_true", help="a stream of an engine instead of a session")
    options = parser.parse_args()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
    device = default_device()
    model = AutoModel.from_pretrained(options.checkpoint, trust_remote_code=True, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    limits = f"at most {options.max_frames} frames and {options.max_text_tokens} text tokens in the cache"
    print(f"{limits}, {device_name(device)}")
    print(markdown_table(["frames", "p50, ms", "p99, ms", "cache, MB", "process, MB", "replies"], []))
    p99s = watch(model, processor, options)
    # The cache fills up during the first 1,000 frames, so the second line is the reference.
    if len(p99s) > 2:
        print(f"p99 of the last {EVERY} frames over that of the second: {p99s[-1] / p99s[1]:.2f}")


def watch(model: Any, processor: Any, options: argparse.Namespace) -> list[float]:
    """Watch the clip over and over, print the lines, and return the p99 latencies."""
    frames = [frame for _, frame in processor.read_video(options.video, fps=options.fps)]
    limits = {"max_frames": options.max_frames, "max_text_tokens": options.max_text_tokens}
    engine = StreamingEngine(model, processor, max_streams=1, **limits) if options.engine else None
    stream = model.stream(processor, fps=options.fps, **limits) if engine is None else engine.open(fps=options.fps)
    session = stream if engine is None else stream.session
    stream.ask(PROMPT, reply_now=False)
    latencies: list[float] = []
    p99s: list[float] = []
    for index in tqdm(range(options.frames), unit=" frames"):
        stream.push(frames[index % len(frames)], time=index / options.fps)
        if engine is not None:
            engine.run()
        latencies.append(session.frame_latency or 0.0)
        if len(latencies) == EVERY:
            p99s.append(p99(latencies))
            p50, cache = sorted(latencies)[EVERY // 2], session.cache if engine is None else engine.pool
            cells = [index + 1, f"{1e3 * p50:.1f}", f"{1e3 * p99s[-1]:.1f}", f"{cache.num_bytes / 1e6:.2f}"]
            tqdm.write(markdown_row([*cells, f"{process_bytes() / 1e6:.0f}", len(session.events)]))
            latencies = []
    return p99s


if __name__ == "__main__":
    main()
