# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Draw the animation of the README: a clip, the patches that routed layers keep, and the narration.

```bash
python docs/draw_narration.py docs/narration.gif
```
"""

import argparse
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]
FPS = 2
# Pixels: side of a picture, margin, and width of the narration.
SIZE, MARGIN, LOG = 232, 16, 372
INK, FAINT, PAPER, SPOKEN = (226, 232, 240), (122, 134, 154), (17, 22, 32), (134, 239, 172)


def main() -> None:
    """Stream the clip and write one picture per frame."""
    quiet()
    parser = argparse.ArgumentParser(description="Draw a clip that is narrated, with its routing.")
    parser.add_argument("out", type=Path, help="GIF to write")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--query", default="Please narrate the video in real time.")
    options = parser.parse_args()
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    pictures = narrate(model, processor, options.video, options.query)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    durations = [1000 // FPS] * (len(pictures) - 1) + [2500]
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    print(f"{options.out}: {len(pictures)} frames, {options.out.stat().st_size / 1e3:.0f} KB")


def narrate(model: Any, processor: Any, video: str, query: str) -> list[Image.Image]:
    """Watch the clip frame by frame and return a picture of each."""
    session = model.stream(processor, fps=FPS, output_router_scores=True)
    session.ask(query, reply_now=False)
    pictures, log, bars = [], [], []
    frames = list(processor.read_video(video, fps=FPS))
    for time, frame in frames:
        events = session.push(frame, time=time)
        log += [(event.time, event.role, event.text) for event in events]
        bars.append((1 - session.interval_probability, {event.role for event in events}))
        page = Image.new("RGB", (3 * MARGIN + 2 * SIZE + LOG, SIZE + 86), PAPER)
        draw_frame(page, frame, kept_share(session, model.config), has_spoken="assistant" in bars[-1][1])
        draw_bars(page, bars, len(frames))
        draw_log(page, log, time)
        pictures.append(page)
    return pictures


def kept_share(session: Any, config: Any) -> np.ndarray:
    """Return the share of routed layers that keep each patch of the last frame, (height, width)."""
    kept = torch.stack([kept.float() for kept in session.kept_tokens.values()]).mean(dim=0)
    return kept[int(config.frame_token_cls) :].view(*config.frame_token_pooled).numpy()


def draw_frame(page: Image.Image, frame: Any, share: np.ndarray, *, has_spoken: bool) -> None:
    """Draw the frame next to the patches that the routed layers keep, with a border if the model has spoken."""
    pen, small = ImageDraw.Draw(page), ImageFont.load_default(13)
    picture = Image.fromarray(np.asarray(frame)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    light = Image.fromarray(np.uint8(255 * (0.12 + 0.88 * share))).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    kept = Image.composite(picture, Image.new("RGB", picture.size, PAPER), light)
    for column, (title, image) in enumerate((("the video", picture), ("what the routed layers keep", kept))):
        left = MARGIN + column * (SIZE + MARGIN)
        pen.text((left, 12), title, FAINT, small)
        page.paste(image, (left, 34))
        if has_spoken:
            pen.rectangle((left - 2, 32, left + SIZE + 1, 35 + SIZE), outline=SPOKEN, width=2)


def draw_bars(page: Image.Image, bars: list[tuple[float, set[str]]], count: int) -> None:
    """Draw the probability of speaking at each frame: green where the model spoke, white where the user did."""
    pen = ImageDraw.Draw(page)
    left, bottom, height, width = MARGIN, page.height - 12, 30, 2 * SIZE + MARGIN
    pen.line((left, bottom, left + width, bottom), fill=FAINT)
    for index, (probability, roles) in enumerate(bars):
        x = left + width * (index + 0.5) / count
        color = SPOKEN if "assistant" in roles else INK if "user" in roles else FAINT
        pen.rectangle((x - 5, bottom - height * probability - 1, x + 5, bottom), fill=color)


def draw_log(page: Image.Image, log: list[tuple[float, str, str]], time: float) -> None:
    """Draw the time and the last ten events."""
    pen, small, normal = ImageDraw.Draw(page), ImageFont.load_default(13), ImageFont.load_default(16)
    left = 3 * MARGIN + 2 * SIZE
    pen.text((left, 12), f"{time:5.1f} s", INK, small)
    for row, (at, role, text) in enumerate(log[-10:]):
        top = 38 + 26 * row
        pen.text((left, top + 2), f"{at:4.1f}s", FAINT, small)
        pen.text((left + 44, top), text, INK if role == "assistant" else FAINT, normal)


if __name__ == "__main__":
    main()
