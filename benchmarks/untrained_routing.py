# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What does a model lose when it is routed without training? Compare the routers that have no weights.

A model runs at full compute, and with each router, keep ratio and choice of layers. Nothing is trained. The same test
clips of StreamWorld are streamed each time, and events and answers are counted as `train/evaluation.py` does.

```bash
python benchmarks/untrained_routing.py outputs/untrained_routing            # the embedded checkpoint
# Its twin at full compute, see `train/recipe.py --twin`:
python benchmarks/untrained_routing.py outputs/untrained_twin --checkpoint outputs/streamworld_cpu/trained_1
python benchmarks/untrained_routing.py outputs/untrained_full --steps 160   # the same after training at full compute
python benchmarks/untrained_routing.py outputs/untrained_shaken --shake 4 --layers all_deep   # with a shaken camera
```

The embedded checkpoint was trained with routed layers. With `--steps` its weights first train on at full compute, on
new clips. With `--shake` every frame is shifted by a random distance, so that every patch changes. Results are kept in
the folder by group of clips, and a second run with the same options continues there. With both cores busy with other
work, 96 clips take 27 minutes.

A cell is event F1, its difference from full compute on the same clips, and answer accuracy. Intervals are those of
Student's t over the groups, 95%: a smaller difference is noise. The last column compares two routers in the same way.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from added_routers import train, with_changes
from common import ROOT, device_name
from report import markdown_table, write_results
from tqdm.auto import tqdm
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.collator import StreamCollator, normalize_pixels
from videollm_mod.train.data.streamworld import StreamWorld
from videollm_mod.train.streaming_evaluation import free_streaming


KINDS = "narrate=2,ask=1,wait=1"
ROUTERS = ("change", "uniform", "random")
FULL = {"mod_layers": None, "mod_keep_ratio": 1.0}
# Clips per group. An engine streams a group at a time.
GROUP = 16
# Half of Student's 95% interval in standard errors, by degrees of freedom.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 11: 2.20}
# Measures of one variant by group of clips.
Groups = list[dict[str, float]]


def main() -> None:
    """Measure all variants and print the table."""
    quiet()
    parser = CommandLineParser(description="Measure routing without training on clips of StreamWorld.")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--checkpoint", default=str(ROOT), help="the model, default: the embedded checkpoint")
    parser.add_argument("--clips", type=int, default=96, help=f"test clips, rounded up to groups of {GROUP}")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1], help="keep ratios")
    parser.add_argument("--layers", nargs="+", default=["all_deep", "interleaved"], help="choices of routed layers")
    parser.add_argument("--shake", type=int, default=0, help="pixels by which frames are shifted at most")
    parser.add_argument("--steps", type=int, default=0, help="steps of training at full compute before")
    parser.add_argument("--first-clip", type=int, default=100_000, help="number of the first clip to train on")
    options = parser.parse_args()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    shipped = VideoLLMMoDForConditionalGeneration.from_pretrained(options.checkpoint)
    results = read_results(options)
    full = at_full_compute(shipped, processor, options)
    variants = dict(all_variants(options, shipped))
    rows = clips_for(processor).load("test", num_clips=math.ceil(options.clips / GROUP) * GROUP)
    rows = [shaken(row, options.shake) for row in rows]
    groups = [rows[begin : begin + GROUP] for begin in range(0, len(rows), GROUP)]
    for name, changes in tqdm(variants.items(), desc="variants"):
        # Routers that were trained belong to the weights that were trained with them.
        model = with_changes(shipped if changes.get("mod_router") == "learned" else full, changes).eval()
        measured = results.setdefault(name, [])
        for group in groups[len(measured) :]:
            measured.append(free_streaming(model, processor, group, batch_size=8, progress=False))
            write(results, options)
    print(f"{device_name('cpu')}, torch {torch.__version__}; {len(rows)} clips in {len(groups)} groups\n")
    print(table(results, options))
    print(
        f"\nThe median token of a frame changes {spread(full, processor, groups[0]):.0%} as much as the first tenth."
    )


def read_results(options: argparse.Namespace) -> dict[str, Groups]:
    """
    Return what an earlier run with the same options measured, and note the options of this one.

    Raises:
        `SystemExit`: If the folder has results, or a model, of a run with other options.
    """
    path = options.out / "untrained_routing.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    begun = path.exists() or (options.out / "full").exists()
    if begun and found.get("options") != options_of(options):
        raise SystemExit(f"error: '{options.out}' has results of a run with other options; give another folder.")
    results = found.get("results", {})
    write(results, options)
    return results


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that change the results of a variant, as JSON stores them."""
    return {name: getattr(options, name) for name in ("checkpoint", "first_clip", "shake", "steps")}


def write(results: dict[str, Groups], options: argparse.Namespace) -> None:
    """Write the results until now, with their options."""
    found = {"options": options_of(options), "results": results}
    write_results(options.out, "untrained_routing", found, table(results, options) if results else "")


def clips_for(processor: Any) -> StreamWorld:
    """Return clips of the size that the checkpoint was trained on, so that frames are not scaled."""
    return StreamWorld("streamworld", world="tiny", kinds=KINDS, frame_size=processor.video_processor.size.height)


def all_variants(
    options: argparse.Namespace, shipped: VideoLLMMoDForConditionalGeneration
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each variant, and its changes to the configuration."""
    yield "full", FULL
    for layers in options.layers:
        for ratio in options.ratios:
            # The embedded checkpoint has learned routers in its own layers only, and its twin has none.
            learned = ["learned"] if shipped.router_names and layers == "all_deep" else []
            for router in (*ROUTERS, *learned):
                changes = {"mod_layers": layers, "mod_keep_ratio": ratio, "mod_router": router}
                yield f"{layers} {ratio:g} {router}", changes


def shaken(row: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a row with each frame of its video shifted by up to `most` pixels. What leaves comes back opposite."""
    generator = np.random.default_rng(row["seed"])
    shifts = generator.integers(-most, most + 1, (len(row["video"]), 2))
    video = [np.roll(frame, shift, axis=(0, 1)) for frame, shift in zip(row["video"], shifts, strict=True)]
    return {**row, "video": np.stack(video)}


def at_full_compute(
    model: VideoLLMMoDForConditionalGeneration, processor: Any, options: argparse.Namespace
) -> VideoLLMMoDForConditionalGeneration:
    """Return the model with every keep ratio 1, trained so for `options.steps` steps, or as it was saved before."""
    saved = options.out / "full"
    if (saved / "config.json").exists():
        return VideoLLMMoDForConditionalGeneration.from_pretrained(saved)
    full = with_changes(model, FULL)
    collator, source = StreamCollator(processor), clips_for(processor)
    losses: list[float] = []
    for begin in tqdm(range(0, options.steps, 20), desc="training", unit=" x 20 steps"):
        count = 8 * min(20, options.steps - begin)
        clips = source.load("train", num_clips=count, first_clip=options.first_clip + 8 * begin)
        batches = [collator([clips[i] for i in range(k, k + 8)]) for k in range(0, count, 8)]
        batches = [normalize_pixels(batch, processor) for batch in batches]
        losses += train(full, batches, learning_rate=2e-4)
    if losses:
        print(f"loss of the last steps: {statistics.mean(losses[-20:]):.3f}, of the first: {losses[0]:.3f}")
        full.save_pretrained(saved)
    return full


def table(results: dict[str, Groups], options: argparse.Namespace) -> str:
    """Return the results as a Markdown table."""
    head, full = ["layers", "keep ratio", *ROUTERS, "learned", "change - uniform, F1"], results["full"]
    rows = [["none", "1", f"full compute: {mean(full, 'event_f1')} / {mean(full, 'answer_accuracy')}", *[""] * 4]]
    for layers in options.layers:
        for ratio in options.ratios:
            found = [results.get(f"{layers} {ratio:g} {router}", []) for router in (*ROUTERS, "learned")]
            cells = [cell(groups, full) for groups in found]
            rows.append([layers, f"{ratio:g}", *cells, difference(found[0], found[1])])
    return markdown_table(head, rows)


def cell(groups: Groups, full: Groups) -> str:
    """Return event F1, its difference from full compute, and answer accuracy."""
    if not groups:
        return ""
    return f"{mean(groups, 'event_f1')} ({difference(groups, full)}) / {mean(groups, 'answer_accuracy')}"


def mean(groups: Groups, name: str) -> str:
    """Return the mean of a measure."""
    return f"{statistics.mean(group[name] for group in groups):.2f}"


def difference(first: Groups, second: Groups) -> str:
    """Return the mean difference of event F1 in the groups that both have, and half of its interval."""
    values = [a["event_f1"] - b["event_f1"] for a, b in zip(first, second, strict=False)]
    if len(values) < 2:
        return f"{values[0]:+.2f}" if values else ""
    half = STUDENT.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{round(statistics.mean(values), 2) + 0.0:+.2f} ± {half:.2f}"


@torch.no_grad()
def spread(model: VideoLLMMoDForConditionalGeneration, processor: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Return the change of the median token of a frame, relative to the tenth that changes most, on average."""
    shares = []
    for row in rows:
        frames = model.get_video_features(processor.process_frames(row["video"])).pooler_output.float()
        change = (frames[1:] - frames[:-1]).norm(dim=-1).sort(dim=-1, descending=True).values
        most = change[:, : max(change.shape[1] // 10, 1)].mean(dim=-1)
        shares.append((change.median(dim=-1).values / most.clamp_min(1e-9)).mean().item())
    return statistics.mean(shares)


if __name__ == "__main__":
    main()
