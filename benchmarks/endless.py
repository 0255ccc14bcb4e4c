# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
A stream without end: latency and memory, thousand frames by thousand, with the oldest frames evicted.

```bash
python benchmarks/endless.py                         # 20,000 frames of the embedded checkpoint, on this machine
python benchmarks/endless.py --checkpoint folder-or-hub-id --frames 100000 --max-frames 600
```

The sample clip is shown over and over, to a session or with `--engine` to an engine's stream. Of each thousand frames
the latency is from a frame's arrival to the decision on it, vision encoding and evictions included and replies not.
"""

import argparse
import resource
from pathlib import Path

import torch
from cost import device_name, p99
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from videollm_mod.serving import StreamingEngine


ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Watches, prints a line each thousand frames, and how the last compares with the first full window."""
    parser = argparse.ArgumentParser(description="Measures a stream whose oldest frames are evicted.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--max-frames", type=int, default=60, help="frames remembered")
    parser.add_argument("--max-text-tokens", type=int, default=1024, help="tokens of text remembered")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--engine", action="store_true", help="a stream of an engine in place of a session")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(options.checkpoint, trust_remote_code=True, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    frames = [frame for _, frame in processor.read_video(options.video, fps=options.fps)]
    limits = {"max_frames": options.max_frames, "max_text_tokens": options.max_text_tokens}
    engine = StreamingEngine(model, processor, max_streams=1, **limits) if options.engine else None
    stream = model.stream(processor, fps=options.fps, **limits) if engine is None else engine.open(fps=options.fps)
    session = stream if engine is None else stream.session
    stream.ask("Please narrate the video in real time.", reply_now=False)
    remembered = f"{options.max_frames} frames and {options.max_text_tokens} tokens of text remembered"
    print(f"{remembered}, {device_name(device)}")
    print("| frames | p50, ms | p99, ms | cache, MB | process, MB | replies |\n|---|---|---|---|---|---|")
    latencies: list[float] = []
    p99s: list[float] = []
    for index in tqdm(range(options.frames), unit=" frames"):
        stream.push(frames[index % len(frames)])
        if engine is not None:
            engine.run()
        latencies.append(session.frame_latency or 0.0)
        if len(latencies) == 1000:
            latencies.sort()
            p99s.append(p99(latencies))
            cache = session.cache.num_bytes if engine is None else engine.pool.num_bytes
            tqdm.write(
                f"| {index + 1} | {1e3 * latencies[500]:.1f} | {1e3 * p99s[-1]:.1f} "
                f"| {cache / 1e6:.2f} | {process_bytes() / 1e6:.0f} | {len(session.events)} |"
            )
            latencies = []
    # In the first thousand the window fills up.
    if len(p99s) > 2:
        print(f"p99 of the last 1000 frames over that of the second: {p99s[-1] / p99s[1]:.2f}")


def process_bytes() -> int:
    """Bytes of memory that this process holds now, or, where the system does not tell, the most that it held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
