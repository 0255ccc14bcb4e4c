# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Draw the animation of the README: a clip, the patches that routed layers keep, the narration, and what it costs.

```bash
python docs/draw_narration.py docs/narration.gif
python docs/draw_narration.py out.gif --model folder --world hard --clip 12              # a generated test clip
python docs/draw_narration.py out.gif --model folder --dataset doomworld --clip 3 --fps 4 --seconds 15
```

Patches are clear if at least half of the routed layers keep them, dark and grey if none does.
"""

import argparse
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor

from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.space.loading import seen_area


ROOT = Path(__file__).resolve().parents[1]
# Pixels: side of the picture, margin, width of the column of text, and height of the plot of speaking.
SIZE, MARGIN, COLUMN, PLOT = 416, 18, 432, 44
TOP, LINE = 40, 25
INK, FAINT, PAPER, BAR = (226, 232, 240), (130, 141, 160), (17, 22, 32), (52, 61, 78)
SPOKEN, ROUTED = (134, 239, 172), (96, 165, 250)
# Brightness of a patch that no routed layer keeps, and the share of layers from which a patch is clear.
DARK, CLEAR = 0.28, 0.5
LINE_WIDTH = 42
COSTS = "estimated cost with the vision encoder: routed, of full compute"


@dataclass
class Moment:
    """
    What there is to draw at one frame.

    Args:
        time (`float`): Second in the video.
        frame (`np.ndarray` of shape `(height, width, 3)`): What the encoder sees of the frame.
        share (`np.ndarray` of shape `(height, width)`): Share of routed layers that keep each patch.
        speaking (`float`): Probability of speaking.
        new (`list`): Events of this frame.
        said (`list`): All events until now.
        cost (`CostEstimate`): Of the stream until now.
    """

    time: float
    frame: np.ndarray
    share: np.ndarray
    speaking: float
    new: list[Any]
    said: list[Any]
    cost: Any
    roles: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.roles = {event.role for event in self.new}


def main() -> None:
    """Stream the clip and write one picture per frame."""
    quiet()
    options = parse()
    with one_line_errors():
        options.model = check_checkpoint(options.model)
        model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype="auto").eval()
        if not model.config.routed_layers:
            raise ValueError(f"'{options.model}' has no routed layers: there is no routing to draw.")
        processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
        frames, questions = read(options, processor)
    moments = list(watch(model, processor, frames, questions, options))
    pictures = [draw(moments[: index + 1], moments, model.config) for index in range(len(moments))]
    # One palette for all pictures, without dithering: areas that stay the same take no space.
    palette = palette_of(pictures)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    durations = [round(1000 / options.fps)] * (len(pictures) - 1) + [2500]
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    print(f"{options.out}: {len(pictures)} frames, {options.out.stat().st_size / 1e3:.0f} KB")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLineParser(description="Draw a clip that is narrated, with its routing.")
    parser.add_argument("out", type=Path, help="GIF to write")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"), help="file to watch")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--query", default="Please narrate the video in real time.")
    parser.add_argument("--clip", type=int, help="instead of a file, this test clip of a generated data set")
    parser.add_argument("--dataset", default="streamworld", help="the data set of --clip")
    parser.add_argument("--world", help="what --clip may show; default: the data set's")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds to draw at most")
    return parser.parse_args()


def read(options: argparse.Namespace, processor: Any) -> tuple[list[np.ndarray], list[tuple[float, str]]]:
    """Return the frames, and what the user says with its times."""
    most = int(options.seconds * options.fps)
    if options.clip is None:
        frames = [np.asarray(frame) for _, frame in processor.read_video(options.video, fps=options.fps)]
        return frames[:most], [(0.0, options.query)]
    # Only generated clips need what training needs.
    from videollm_mod.train.data.sources import find_source, option_names

    kind, size = find_source(options.dataset), processor.video_processor.size["height"]
    given = {"world": options.world, "kinds": "narrate=1", "frame_size": size}
    known = {name: value for name, value in given.items() if name in option_names(kind) and value is not None}
    row = kind(options.dataset, **known).load("test", num_clips=1, first_clip=options.clip)[0]
    asked = [(message["time"], message["content"]) for message in row["messages"] if message["role"] == "user"]
    return list(np.asarray(row["video"])[:most]), asked


def watch(
    model: Any,
    processor: Any,
    frames: list[np.ndarray],
    questions: list[tuple[float, str]],
    options: argparse.Namespace,
) -> Iterator[Moment]:
    """Watch the clip frame by frame. The first question stands; later ones are answered at once."""
    session = model.stream(processor, fps=options.fps, output_router_scores=True)
    questions = list(questions)
    session.ask(questions.pop(0)[1], reply_now=False)
    for index, frame in enumerate(frames):
        time, before = index / options.fps, len(session.events)
        session.push(frame, time=time)
        while questions and questions[0][0] <= time:
            session.ask(questions.pop(0)[1])
        text_tokens = int(session.cache.get_seq_length()) - session.num_frames * model.config.frame_num_tokens
        yield Moment(
            time=time,
            frame=seen(frame, processor.video_processor),
            share=kept_share(session, model.config),
            speaking=1 - session.interval_probability,
            new=session.events[before:],
            said=list(session.events),
            cost=model.estimate_cost(session.num_frames, text_tokens),
        )


def seen(frame: np.ndarray, video_processor: Any) -> np.ndarray:
    """Return what the encoder sees of a frame, at the frame's own resolution. What is padded is black."""
    left, top, across, down = seen_area(video_processor, *frame.shape[:2])
    area = (round(left), round(top), round(left + across), round(top + down))
    return np.asarray(Image.fromarray(frame).crop(area))


def kept_share(session: Any, config: Any) -> np.ndarray:
    """Return the share of routed layers that keep each patch of the last frame, (height, width)."""
    kept = torch.stack([kept.float() for kept in session.kept_tokens.values()]).mean(dim=0)
    return kept[int(config.frame_token_cls) :].view(*config.frame_token_pooled).numpy()


def draw(moments: list[Moment], all_moments: list[Moment], config: Any) -> Image.Image:
    """Draw the last of some moments."""
    page = Image.new("RGB", (3 * MARGIN + SIZE + COLUMN, TOP + SIZE + PLOT + 2 * MARGIN), PAPER)
    draw_frame(page, moments[-1], config)
    draw_plot(page, moments, len(all_moments))
    draw_log(page, moments[-1])
    draw_costs(page, moments[-1].cost, all_moments[-1].cost)
    return page


def draw_frame(page: Image.Image, moment: Moment, config: Any) -> None:
    """Draw the frame with what routed layers skip darkened, and a border if the model has spoken."""
    pen = ImageDraw.Draw(page)
    kept = min(config.layer_keep_counts)
    title = f"clear: at least half of the routed layers keep it (each keeps {kept} of {config.frame_num_tokens})"
    pen.text((MARGIN, 14), title, FAINT, font(13))
    picture = Image.fromarray(moment.frame).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    light = np.uint8(255 * np.clip(moment.share / CLEAR, 0, 1))
    light = np.asarray(Image.fromarray(light).resize((SIZE, SIZE), Image.Resampling.NEAREST))[..., None] / 255
    skipped = DARK * (0.3 * pixels + 0.7 * grey)
    page.paste(Image.fromarray(np.uint8(light * pixels + (1 - light) * skipped)), (MARGIN, TOP))
    outline(pen, moment.share >= CLEAR)
    if "assistant" in moment.roles:
        pen.rectangle((MARGIN - 3, TOP - 3, MARGIN + SIZE + 2, TOP + SIZE + 2), outline=SPOKEN, width=3)


def outline(pen: ImageDraw.ImageDraw, clear: np.ndarray) -> None:
    """Draw a line around the clear patches."""
    rows, columns = clear.shape
    padded = np.pad(clear, 1)
    for row, column in np.argwhere(clear):
        left, right = (MARGIN + SIZE * x / columns for x in (column, column + 1))
        top, bottom = (TOP + SIZE * y / rows for y in (row, row + 1))
        sides = {
            (-1, 0): (left, top, right, top),
            (1, 0): (left, bottom - 1, right, bottom - 1),
            (0, -1): (left, top, left, bottom),
            (0, 1): (right - 1, top, right - 1, bottom),
        }
        for (down, across), line in sides.items():
            if not padded[row + 1 + down, column + 1 + across]:
                pen.line(line, fill=ROUTED, width=2)


def draw_plot(page: Image.Image, moments: list[Moment], count: int) -> None:
    """Draw the probability of speaking at each frame: green where the model spoke, white where the user did."""
    pen = ImageDraw.Draw(page)
    bottom, width = page.height - MARGIN, SIZE / count
    pen.text((MARGIN, bottom - PLOT - 1), "probability of speaking", FAINT, font(11))
    pen.line((MARGIN, bottom, MARGIN + SIZE, bottom), fill=BAR)
    for index, moment in enumerate(moments):
        x, height = MARGIN + width * index, (PLOT - 16) * moment.speaking
        color = SPOKEN if "assistant" in moment.roles else INK if "user" in moment.roles else FAINT
        pen.rectangle((x + 0.15 * width, bottom - height - 1, x + 0.85 * width, bottom), fill=color)


def draw_log(page: Image.Image, moment: Moment) -> None:
    """Draw the time, and as many of the last events as there is room for."""
    pen, left = ImageDraw.Draw(page), 2 * MARGIN + SIZE
    pen.text((left, 10), f"{moment.time:.1f} s", INK, font(18))
    lines = []
    for event in moment.said:
        color = SPOKEN if event in moment.new and event.role == "assistant" else INK
        color = FAINT if event.role == "user" else color
        for index, text in enumerate(textwrap.wrap(event.text, LINE_WIDTH) or [""]):
            lines.append((f"{event.time:.1f}" if index == 0 else "", text, color))
    room = (SIZE - 120) // LINE
    for row, (time, text, color) in enumerate(lines[-room:]):
        top = TOP + LINE * row
        pen.text((left + 34, top + 4), time, FAINT, font(13), anchor="ra")
        pen.text((left + 46, top), text, color, font(18))


def draw_costs(page: Image.Image, cost: Any, last: Any) -> None:
    """Draw compute and cache until now as bars: routed, in front of full compute."""
    pen, left = ImageDraw.Draw(page), 2 * MARGIN + SIZE
    bars = (
        ("compute", cost.flops, cost.full_flops, last.full_flops, 1e9, "GFLOP"),
        ("cache", cost.cache_bytes, cost.full_cache_bytes, last.full_cache_bytes, 1e6, "MB"),
    )
    pen.text((left, page.height - 168), COSTS, FAINT, font(13))
    for row, (name, routed, full, most, unit, unit_name) in enumerate(bars):
        top = page.height - 140 + 60 * row
        text = f"{routed / unit:.3g} of {full / unit:.3g} {unit_name} ({routed / full:.0%})"
        pen.text((left, top), name, INK, font(16))
        pen.text((left + COLUMN, top), text, INK, font(16), anchor="ra")
        for amount, color in ((most, BAR), (full, FAINT), (routed, ROUTED)):
            pen.rectangle((left, top + 25, left + COLUMN * amount / most, top + 37), fill=color)


def font(size: int) -> Any:
    """Return Pillow's own font, so that no font has to be installed."""
    return ImageFont.load_default(size)


def palette_of(pictures: list[Image.Image]) -> Image.Image:
    """Return a picture with the 255 colors that suit all pictures best."""
    some = pictures[:: max(1, len(pictures) // 6)]
    sheet = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for index, picture in enumerate(some):
        sheet.paste(picture, (0, index * picture.height))
    return sheet.quantize(255, method=Image.Quantize.MEDIANCUT)


if __name__ == "__main__":
    main()
