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
How well a checkpoint narrates the generated world of shapes: streams held-out clips and compares with what happened.

```bash
python benchmarks/shapes_narration.py --clips 200
```
"""

import argparse
from pathlib import Path

import transformers
from transformers import AutoModel, AutoProcessor

from videollm_mod.train.data.shapes import DESCRIBE, FPS, HELD_OUT, NARRATE, make_clip


def main() -> None:
    """Streams the clips and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "space" / "checkpoint"))
    parser.add_argument("--clips", type=int, default=200)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

    happened = told = right = frames = quiet = quiet_right = answers_right = 0
    wrong = []
    for seed in range(HELD_OUT, HELD_OUT + options.clips):
        clip = make_clip(seed)
        events = {(event.time, event.text) for event in narrate(model, processor, clip) if event.role == "assistant"}
        truth = set(clip.events())
        happened, told, right = happened + len(truth), told + len(events), right + len(truth & events)
        wrong += [(seed, *item) for item in sorted(truth ^ events)]
        loud, heard = {time for time, _ in truth}, {time for time, _ in events}
        silent = {index / FPS for index in range(clip.num_frames)} - loud
        session = model.stream(processor, fps=FPS)
        session.ask(NARRATE, reply_now=False)
        session.push(clip.frames()[:8])
        answers_right += session.ask(DESCRIBE)[-1].text == clip.description(7 / FPS)
        frames, quiet, quiet_right = frames + clip.num_frames, quiet + len(silent), quiet_right + len(silent - heard)
    precision, recall = right / max(told, 1), right / happened
    print(f"clips {options.clips}, frames {frames}, events {happened}")
    print(f"events told with the right words at the right frame: precision {precision:.3f}, recall {recall:.3f}")
    print(f"silent frames right: {quiet_right / quiet:.4f}")
    print(f"asked at the eighth frame what it sees, things and places right: {answers_right / options.clips:.3f}")
    for seed, time, text in wrong[:10]:
        print(f"  differs: clip {seed}, {time:.1f} s, {text!r}")


def narrate(model, processor, clip):
    """Events of one clip, frame by frame."""
    return model.narrate(processor, clip.frames(), NARRATE, fps=FPS)


if __name__ == "__main__":
    main()
