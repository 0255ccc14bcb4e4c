# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How long does one CPU core take to prepare a camera's frame for the vision encoder?

```bash
python benchmarks/preprocessing.py                    # 1920 x 1080 to SigLIP-L's 384 x 384
python benchmarks/preprocessing.py --size 720 1280
```

The time is that of one thread, the median over frames, so other processes disturb it little.
"""

import argparse
import time as clock
from statistics import median
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from common import ROOT
from PIL import Image
from report import markdown_table
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDVideoProcessor


def main() -> None:
    """Measure and print a table."""
    quiet()
    parser = argparse.ArgumentParser(description="Measure the preprocessing of one frame on one core.")
    parser.add_argument("--size", type=int, nargs=2, default=[1080, 1920], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=100, help="frames to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor.video_processor = VideoLLMMoDVideoProcessor()
    np.ones(30 << 20, np.uint8)  # As after loading a model, the allocator then reuses the memory of frames.
    frame = np.random.default_rng(0).integers(0, 256, (*options.size, 3), dtype=np.uint8)
    kinds = {"array": frame, "PIL image": Image.fromarray(frame), "tensor": torch.from_numpy(frame)}
    rows = []
    for kind, given in kinds.items():
        seconds = [measure(processor, given) for _ in range(options.frames)]
        rows.append([kind, f"{1000 * median(seconds):.2f}", f"{1000 * min(seconds):.2f}"])
    print(markdown_table(["frame", "median, ms", "least, ms"], rows))


def measure(processor: Any, frame: Any) -> float:
    """Return the seconds of this thread that one frame takes."""
    begin = clock.thread_time()
    processor.process_frames(frame)
    return clock.thread_time() - begin


if __name__ == "__main__":
    main()
