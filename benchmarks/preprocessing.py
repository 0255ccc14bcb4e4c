# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How long does a frame take before the vision encoder sees it, and how much memory does it take while it waits?

```bash
OMP_NUM_THREADS=1 python benchmarks/preprocessing.py
python benchmarks/preprocessing.py --device cuda --sizes 1920x1080
```

A session resizes each frame when it is pushed. Frames wait as uint8 at the model's size, and are normalised on the
model's device together with others of the same step.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from videollm_mod.console import quiet

import torch
from common import ROOT, choose_device, default_device, device_name, timed
from report import markdown_table, write_results

from videollm_mod import VideoLLMMoDProcessor
from videollm_mod.space.command_line import CommandLineParser


def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure what happens to a frame before the vision encoder.")
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1280x720", "1920x1080"], help="widths x heights")
    parser.add_argument("--model-size", type=int, default=384, help="side of the images that the encoder accepts")
    parser.add_argument("--device", type=choose_device, default=default_device(), help="where frames are normalised")
    parser.add_argument("--frames", type=int, default=50, help="measured frames of each size")
    parser.add_argument("--out", type=Path, help="folder for preprocessing.json and preprocessing.md")
    options = parser.parse_args()
    processor = VideoLLMMoDProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor.video_processor.size = {"height": options.model_size, "width": options.model_size}
    rows = [measure(processor, *map(int, size.split("x")), options) for size in options.sizes]
    machine = (
        f"To {options.model_size} x {options.model_size}, {device_name(options.device)}, torch {torch.__version__}"
    )
    head = ["frame", "resize, ms", "normalise, ms", "waiting, MB"]
    text = f"{machine}\n\n{markdown_table(head, rows)}\n"
    if options.out is not None:
        write_results(options.out, "preprocessing", {"machine": machine, "rows": rows}, text)
    print(text)


def measure(processor: Any, width: int, height: int, options: argparse.Namespace) -> list[str]:
    """Return the cells of one size."""
    frame = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
    waiting = processor.resize_frames(frame)
    resize = per_frame(lambda: processor.resize_frames(frame), options)
    normalise = per_frame(lambda: processor.normalize_frames(waiting.to(options.device)), options)
    return [f"{width} x {height}", f"{resize:.2f}", f"{normalise:.2f}", f"{waiting.nbytes / 1e6:.2f}"]


def per_frame(step: Callable[[], Any], options: argparse.Namespace) -> float:
    """Return the median milliseconds of a step, without the first ones."""
    taken = [timed(step, options.device)[0] for _ in range(options.frames + 3)]
    return 1e3 * median(taken[3:])


if __name__ == "__main__":
    main()
