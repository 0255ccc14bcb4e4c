# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How well does a model narrate and answer late in a stream? Stream long clips, and count by the time since the start.

```bash
python benchmarks/long_context.py --world tiny --seconds 100 --clips 8 --out outputs/long    # embedded checkpoint
python benchmarks/long_context.py --checkpoint routed --full twin --world hard --seconds 500 --memory last
```

The model streams each clip routed and at full compute, and remembers everything or the last `--max-frames` frames.
Full compute is the same checkpoint with every keep ratio 1, or a second checkpoint (`--full`). A cell is event F1 with
95% intervals over clips (bootstrap), and answer accuracy. A second run with the same folder continues. `--memory last`
leaves out the streams that remember everything: a model has only so many positions.

The second table tells why a model falls silent. It reads the first `--seconds-read` seconds with the true history, so
its own silence cannot cause more silence. A cell is the mean probability of speaking at events, and at silent frames.
With `--rope-theta` it is also measured with another base of the rotary embedding: a larger base makes distances look
shorter. If that moves the point at which the model falls silent, the cause is distances that training did not show.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from common import ROOT, device_name
from report import markdown_table, write_results
from tqdm.auto import tqdm
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import save_figure
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.collator import StreamCollator, normalize_pixels
from videollm_mod.train.data.dialogues import ceil_frame
from videollm_mod.train.data.sources import find_source, load_split, option_names
from videollm_mod.train.data.windows import Window, cut_row
from videollm_mod.train.streaming_evaluation import (
    answered_questions,
    spoken_unasked,
    stream_example,
    unasked_replies,
)
from videollm_mod.train.teacher_forcing import evaluate_metric


# What is counted of a clip in each interval of frames: events told rightly, told, and true; right answers, questions.
Counts = list[list[float]]
# What streams remember: everything, or the last `--max-frames` frames.
MEMORIES = ("all", "last")


def main() -> None:
    """Measure and print tables; with `--out`, also write files."""
    quiet()
    options = parse()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
        options.full = options.full and check_checkpoint(options.full)
        processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
        rows = long_rows(options, processor)
    edges = edges_of(options, max(len(row["video"]) for row in rows))
    found = read_results(options)
    for name, changes, limits in variants(options):
        measured = found["streamed"].setdefault(name, [])
        if len(measured) >= len(rows):
            continue
        model = load(options, **changes)
        for row in tqdm(rows[len(measured) :], desc=name, unit=" clips"):
            events, _ = stream_example(model, processor, row, fps=options.fps, **limits)
            measured.append(count(row, events, edges, options.fps))
            write(found, edges, options)
    for name, changes in readers(options):
        name = f"{name}, {len(rows)} clips"
        if name not in found["read"]:
            found["read"][name] = read_all(load(options, **changes), processor, rows, edges, options)
            write(found, edges, options)
    print(text_of(found, edges, options))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLineParser(description="Measure narration and answers by the time since a stream's start.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id, default: the embedded checkpoint")
    parser.add_argument("--full", help="a checkpoint trained at full compute; default: the same, every keep ratio 1")
    parser.add_argument("--dataset", default="streamworld", help="a generated data set")
    parser.add_argument("--world", help="what clips may show; default: the data set's")
    parser.add_argument("--vocabulary", help="what things of DoomWorld are called; default: the data set's")
    parser.add_argument("--seconds", type=float, default=500.0, help="length of the clips")
    parser.add_argument("--clips", type=int, default=8, help="test clips")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second that the model sees")
    parser.add_argument("--questions", type=float, default=6.0, help="questions per minute, if the data set has them")
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[20, 50, 100, 200, 500, 1000],
        help="ends of intervals before the clips' end",
    )
    parser.add_argument(
        "--memory", nargs="+", choices=MEMORIES, default=list(MEMORIES), help="remember all, or evict all but the last"
    )
    parser.add_argument("--max-frames", type=int, default=20, help="frames to remember with eviction")
    parser.add_argument("--sink-frames", type=int, default=2, help="first frames that are never evicted")
    parser.add_argument("--max-text-tokens", type=int, default=128, help="text tokens to remember with eviction")
    parser.add_argument("--seconds-read", type=float, default=60.0, help="seconds to read with the true history, or 0")
    parser.add_argument("--rope-theta", type=float, nargs="+", default=[], help="other bases of the rotary embedding")
    parser.add_argument("--out", type=Path, help="folder for long_context.json, .md and .png")
    return parser.parse_args()


def long_rows(options: argparse.Namespace, processor: Any) -> list[dict[str, Any]]:
    """Return narrated test clips of one length, with questions."""
    kind, length = find_source(options.dataset), f"{options.seconds:g},{options.seconds:g}"
    given = {"world": options.world, "kinds": "narrate=1", "frame_size": processor.video_processor.size["height"]}
    given |= {"seconds": length, "questions_per_minute": options.questions}
    # DoomWorld clips are recorded at the rate that the model reads, and use all frames.
    given |= {"vocabulary": options.vocabulary, "frame_rate": int(options.fps)}
    known = {name: value for name, value in given.items() if name in option_names(kind) and value is not None}
    return list(load_split(kind(options.dataset, **known), "test", options.clips, fps=options.fps))


def edges_of(options: argparse.Namespace, count: int) -> list[int]:
    """Return the ends of intervals in clips of `count` frames, from 0 to `count`."""
    return [0, *(frame for frame in sorted(set(options.frames)) if 0 < frame < count), count]


def variants(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], dict[str, int | None]]]:
    """Yield the name of each variant, its options of [`load`], and the limits of its memory."""
    evicting = {"max_frames": options.max_frames, "sink_frames": options.sink_frames}
    evicting["max_text_tokens"] = options.max_text_tokens
    limits = {"all": ("remembers all", {"max_frames": None}), "last": (f"last {options.max_frames} frames", evicting)}
    for name in ("routed", "full compute"):
        for memory in options.memory:
            told, limit = limits[memory]
            yield f"{name}, {told}", {"full": name != "routed"}, limit


def readers(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each model that reads the true history, and its options of [`load`]."""
    if options.seconds_read <= 0:
        return
    for name in ("routed", "full compute"):
        yield name, {"full": name != "routed"}
    for theta in options.rope_theta:
        yield f"routed, rotary base {theta:g}", {"rope_theta": theta}


def load(
    options: argparse.Namespace, *, full: bool = False, rope_theta: float | None = None
) -> VideoLLMMoDForConditionalGeneration:
    """Load a model for inference, with changes to its configuration."""
    name = options.full if full and options.full else options.checkpoint
    config = VideoLLMMoDConfig.from_pretrained(name)
    if full and not options.full:
        config.mod_keep_ratio = 1.0
    if rope_theta is not None:
        config.text_config.rope_parameters = {**config.text_config.rope_parameters, "rope_theta": rope_theta}
    return VideoLLMMoDForConditionalGeneration.from_pretrained(name, config=config).eval()


def count(row: dict[str, Any], events: Sequence[Any], edges: Sequence[int], fps: float) -> Counts:
    """Return [`Counts`] of a streamed clip for the intervals between edges."""
    told = [{"time": event.time, "text": event.text} for event in spoken_unasked(events)]
    true, answers = unasked_replies(row, fps=fps), list(answered_questions(row, events, fps=fps))
    metric, accuracy, found = evaluate_metric("stream_events"), evaluate_metric("answer_accuracy"), []
    for begin, end in pairwise(edge / fps for edge in edges):
        said, happened = ([event for event in each if begin <= event["time"] < end] for each in (told, true))
        scores = metric.compute(predictions=[said], references=[happened], tolerance=0.5, delay_window=5.0)
        inside = [(answer, given) for time, answer, given in answers if begin <= time < end]
        right = 0.0
        if inside:
            references, predictions = zip(*inside, strict=True)
            right = accuracy.compute(predictions=predictions, references=references)["answer_accuracy"] * len(inside)
        found.append([scores["event_recall"] * len(happened), len(said), len(happened), right, len(inside)])
    return found


@torch.no_grad()
def read_all(
    model: VideoLLMMoDForConditionalGeneration,
    processor: Any,
    rows: Iterable[dict[str, Any]],
    edges: Sequence[int],
    options: argparse.Namespace,
) -> list[list[float | None]]:
    """Return for each interval the mean probability of speaking at events, and at silent frames."""
    collator, config = StreamCollator(processor, options.fps), model.config
    speaking: list[list[list[float]]] = [[[], []] for _ in edges[1:]]
    for row in tqdm(rows, desc="reading", unit=" clips"):
        count = len(row["video"])
        row = cut_row(row, Window(0, min(count, int(options.seconds_read * options.fps)), count), fps=options.fps)
        batch = normalize_pixels(collator([row]), processor)
        loud = {ceil_frame(reply["time"], options.fps) for reply in unasked_replies(row, fps=options.fps)}
        is_frame = batch["input_ids"][0] == config.frame_token_id
        # The model decides after the text that follows a frame.
        last = is_frame.nonzero().view(-1, config.frame_num_tokens)[:, -1] + len(processor.frame_suffix_ids)
        logits = model(**{**batch, "labels": None}, use_cache=False).logits[0, last]
        silence = logits.float().softmax(dim=-1)[:, config.frame_token_interval_id].tolist()
        for index, probability in enumerate(silence):
            place = next((i for i, end in enumerate(edges[1:]) if index < end), None)
            if place is not None:
                speaking[place][index not in loud].append(1 - probability)
    return [[float(np.mean(values)) if values else None for values in pair] for pair in speaking]


def read_results(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what an earlier run with the same options measured."""
    path = None if options.out is None else options.out / "long_context.json"
    found = json.loads(path.read_text()) if path is not None and path.exists() else {}
    given = options_of(options)
    if found and found["options"] != given:
        raise SystemExit(f"error: '{path}' was measured with other options; give another --out.")
    return {"streamed": {}, "read": {}, **found, "options": given}


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that change results, as JSON stores them."""
    names = set(vars(options)) - {"out", "clips", "rope_theta", "memory"}
    return {name: getattr(options, name) for name in sorted(names)}


def write(found: dict[str, Any], edges: Sequence[int], options: argparse.Namespace) -> None:
    """Write the results until now, if there is a folder for them."""
    if options.out is not None:
        write_results(options.out, "long_context", found, f"{text_of(found, edges, options)}\n")
        draw(found["streamed"], edges, options.out / "long_context.png")


def text_of(found: dict[str, Any], edges: Sequence[int], options: argparse.Namespace) -> str:
    """Return what was measured as text with tables."""
    world = options.dataset if options.world is None else f"{options.dataset}, {options.world}"
    clips = max(map(len, found["streamed"].values()), default=0)
    name = "embedded checkpoint" if Path(options.checkpoint).resolve() == ROOT else options.checkpoint
    memory = f"{options.sink_frames} first frames and {options.max_text_tokens} text tokens"
    head = f"{name}, {world}: {clips} test clips of {options.seconds:g} s, {options.fps:g} frames a second.\n"
    head += f"With the last {options.max_frames} frames it also remembers {memory}.\n"
    head += f"{device_name('cpu')}, torch {torch.__version__}"
    columns = [f"frames {begin} to {end}" for begin, end in pairwise(edges)]
    streamed = [[name, *map(cell, totals(clips))] for name, clips in found["streamed"].items()]
    parts = [head, markdown_table(["event F1; answers", *columns], streamed)]
    if found["read"]:
        read = [[name, *(read_cell(*pair) for pair in pairs)] for name, pairs in found["read"].items()]
        parts.append(markdown_table(["probability of speaking at events; in silence", *columns], read))
    return "\n\n".join(parts)


def totals(clips: list[Counts]) -> np.ndarray:
    """Return the counts by interval and clip, (intervals, clips, counts)."""
    return np.array(clips).swapaxes(0, 1)


def cell(counts: np.ndarray) -> str:
    """Return F1 with its interval, and answer accuracy, of one interval (clips, counts)."""
    if counts[:, 2].sum() == 0:
        return "-"
    low, high = bounds(counts)
    right, asked = counts[:, 3:].sum(axis=0)
    return f"{f1(counts):.2f} ({low:.2f} to {high:.2f}); {f'{right / asked:.2f}' if asked else '-'}"


def f1(counts: np.ndarray) -> float:
    """Return event F1 of counts (clips, counts)."""
    right, told, true = counts[:, :3].sum(axis=0)
    return float(2 * right / max(told + true, 1))


def bounds(counts: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of F1 if clips are drawn with replacement."""
    drawn = np.random.default_rng(0).integers(len(counts), size=(1000, len(counts)))
    low, high = np.quantile([f1(counts[sample]) for sample in drawn], (0.025, 0.975))
    return float(low), float(high)


def read_cell(at_events: float | None, in_silence: float | None) -> str:
    """Return two probabilities as a cell; "-" where nothing was read."""
    return "; ".join("-" if value is None else f"{value:.2f}" for value in (at_events, in_silence))


def draw(streamed: dict[str, list[Counts]], edges: Sequence[int], path: Path) -> None:
    """Draw event F1 and answer accuracy against the frames seen, a line for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=130)
    axes = figure.subplots(1, 2, sharey=True)
    for name, clips in streamed.items():
        counts = totals(clips)
        sums = counts.sum(axis=1)
        low, high = np.array([bounds(interval) for interval in counts]).T
        (line,) = axes[0].plot(edges[1:], [f1(interval) for interval in counts], marker="o", label=name)
        axes[0].fill_between(edges[1:], low, high, color=line.get_color(), alpha=0.12)
        axes[1].plot(edges[1:], sums[:, 3] / np.maximum(sums[:, 4], 1), marker="o")
    for place, title in zip(axes, ("event F1", "answers, word for word"), strict=True):
        place.set(xscale="log", xlabel="frames since the start, up to", title=title, ylim=(-0.02, 1.02))
        place.set_xticks(edges[1:], edges[1:])
        place.minorticks_off()
    axes[0].legend(fontsize=6, framealpha=0.4)
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
