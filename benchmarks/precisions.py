# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Does a model decide and answer the same in float32, bfloat16 and float16, also after thousands of frames?

```bash
python benchmarks/precisions.py                                    # the embedded checkpoint, 2,000 frames
python benchmarks/precisions.py --checkpoint folder-or-hub-id --frames 500
```

A session for each dtype sees the sample clip over and over, and evicts its oldest frames. It is asked to narrate but
never speaks, so that all sessions see the same tokens. The table compares the probability of silence at each frame
with that of float32, and the decision that it leads to. Every 100 frames a copy of each session answers a question.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from videollm_mod.console import quiet

import torch
from common import PROMPT, ROOT, default_device, device_name
from report import markdown_table
from transformers import AutoModel, AutoProcessor

from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser


DTYPES = ("float32", "bfloat16", "float16")
QUESTION = "What do you see?"
EVERY = 100  # frames between two questions


class Watched(NamedTuple):
    """What a session has said: the probability of silence at each frame, and its answers."""

    silence: list[float]
    answers: list[str]


def watch(model: Any, processor: Any, clip: Sequence[Any], frames: int, every: int = EVERY, **limits: int) -> Watched:
    """Return what a session of a model says about so many frames of a clip that repeats."""
    seen = Watched([], [])
    session = model.stream(processor, interval_threshold=0.0, **limits)
    session.ask(PROMPT, reply_now=False)
    for index in range(frames):
        session.push(clip[index % len(clip)], time=index / session.fps)
        seen.silence.append(session.interval_probability)
        if index % every == every - 1:
            seen.answers.append(session.fork().ask(QUESTION)[-1].text)
    return seen


def compare(seen: Watched, reference: Watched, threshold: float) -> dict[str, float]:
    """Return how far what a session said is from a reference."""
    apart = [abs(one - other) for one, other in zip(seen.silence, reference.silence, strict=True)]
    half = apart[len(apart) // 2 :]
    decided = [(one < threshold) == (x < threshold) for one, x in zip(seen.silence, reference.silence, strict=True)]
    answered = [one == other for one, other in zip(seen.answers, reference.answers, strict=True)]
    return {
        "mean": sum(apart) / len(apart),
        "mean of the second half": sum(half) / len(half),
        "most": max(apart),
        "decisions": sum(decided) / len(decided),
        "answers": sum(answered) / max(1, len(answered)),
    }


def main() -> None:
    """Watch with each dtype and print a table."""
    quiet()
    parser = CommandLineParser(description="Compare dtypes over a long stream.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--frames", type=int, default=2000, help="frames to watch")
    parser.add_argument("--max-frames", type=int, default=20, help="frames in the cache")
    parser.add_argument("--max-text-tokens", type=int, default=128, help="text tokens in the cache")
    options = parser.parse_args()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
    device = default_device()
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    clip = [frame for _, frame in processor.read_video(options.video, fps=2.0)]
    limits = {"max_frames": options.max_frames, "max_text_tokens": options.max_text_tokens}
    seen = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        model = AutoModel.from_pretrained(options.checkpoint, trust_remote_code=True, dtype=dtype).to(device).eval()
        seen[name] = watch(model, processor, clip, options.frames, **limits)
    threshold = model.config.interval_threshold
    rows = [compare(seen[name], seen["float32"], threshold) for name in DTYPES[1:]]
    print(f"{options.frames} frames, {len(seen['float32'].answers)} answers, {device_name(device)}\n")
    cells = [[f"{row[x]:.1%}" if x in ("decisions", "answers") else f"{row[x]:.5f}" for x in row] for row in rows]
    head = ["against float32", "silence, mean difference", "in the second half", "most"]
    head += ["decisions equal", "answers equal"]
    print(markdown_table(head, [[name, *line] for name, line in zip(DTYPES[1:], cells, strict=True)]))


if __name__ == "__main__":
    main()
