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
Draws the moving picture of the README: a clip, what routed layers look at, and what is said.

```bash
python docs/draw_narration.py docs/narration.gif
```
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]
SIZE, MARGIN, LOG = 232, 16, 372
INK, FAINT, PAPER, SAID = (226, 232, 240), (122, 134, 154), (17, 22, 32), (134, 239, 172)


def main() -> None:
    """Streams the clip and writes one picture a frame."""
    parser = argparse.ArgumentParser(description="Draws a clip being narrated, with the routing visible.")
    parser.add_argument("out", type=Path, help="GIF to write")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument("--query", default="Please narrate the video in real time.")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)

    session = model.stream(processor, fps=2)
    session.ask(options.query, reply_now=False)
    pictures, log, bars = [], [], []
    frames = list(processor.read_video(options.video, fps=2))
    for time, frame in frames:
        said = session.push(frame, time=time)
        log += [(event.time, event.role, event.text) for event in said]
        bars.append((1 - session.interval_probability, {event.role for event in said}))
        pictures.append(draw(frame, kept_share(session, model.config), log, bars, time, len(frames)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    durations = [500] * (len(pictures) - 1) + [2500]
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    print(f"{options.out}: {len(pictures)} frames, {options.out.stat().st_size / 1e3:.0f} KB")


def kept_share(session, config) -> np.ndarray:
    """Share of routed layers that keep each patch of the last frame, (height, width)."""
    kept = torch.stack([kept.float() for kept in session.kept_tokens.values()]).mean(dim=0)
    return kept[int(config.frame_token_cls) :].view(*config.frame_token_pooled).numpy()


def draw(frame, share, log, bars, time, count) -> Image.Image:
    """One picture: the frame, the frame as routed layers see it, the wish to speak at each frame, the conversation."""
    width, height = 3 * MARGIN + 2 * SIZE + LOG, SIZE + 86
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    small, normal = ImageFont.load_default(13), ImageFont.load_default(16)

    picture = Image.fromarray(np.asarray(frame)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    light = Image.fromarray(np.uint8(255 * (0.12 + 0.88 * share))).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    looked = Image.composite(picture, Image.new("RGB", picture.size, PAPER), light)
    for column, (title, image) in enumerate((("the video", picture), ("what the routed layers keep", looked))):
        left = MARGIN + column * (SIZE + MARGIN)
        pen.text((left, 12), title, FAINT, small)
        page.paste(image, (left, 34))
        if "assistant" in bars[-1][1]:
            pen.rectangle((left - 2, 32, left + SIZE + 1, 35 + SIZE), outline=SAID, width=2)

    # Probability of ending the silence at each frame; green where the model spoke, white where the user did.
    left, bottom, high = MARGIN, height - 12, 30
    span = 2 * SIZE + MARGIN
    pen.line((left, bottom, left + span, bottom), fill=FAINT)
    for index, (probability, roles) in enumerate(bars):
        x = left + span * (index + 0.5) / count
        color = SAID if "assistant" in roles else INK if "user" in roles else FAINT
        pen.rectangle((x - 5, bottom - high * probability - 1, x + 5, bottom), fill=color)

    left = 3 * MARGIN + 2 * SIZE
    pen.text((left, 12), f"{time:5.1f} s", INK, small)
    for row, (at, role, text) in enumerate(log[-10:]):
        y = 38 + 26 * row
        pen.text((left, y + 2), f"{at:4.1f}s", FAINT, small)
        pen.text((left + 44, y), text, INK if role == "assistant" else FAINT, normal)
    return page


if __name__ == "__main__":
    main()
