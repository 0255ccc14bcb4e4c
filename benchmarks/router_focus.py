# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What do routers look at? Count how many of the patches that things cover each routed layer keeps.

```bash
python benchmarks/router_focus.py --world tiny                    # the embedded checkpoint
python benchmarks/router_focus.py --checkpoint folder --world hard --clips 64 --out outputs/router_focus
python benchmarks/router_focus.py --checkpoint run --world hard --over run/checkpoint-500 run/checkpoint-1000
```

The model reads held-out narrations with their true history. The world says which patches things cover. A lift is the
share of these patches that a layer keeps, divided by the share of all patches that it keeps: chance is 1. Its interval
is 95% over clips (bootstrap). The ceiling is the largest share that the layer's keep ratio allows. "All layers" counts
a patch that at least one layer keeps. A scene moves if the mean color of patches without a thing changes by more than
one of 255 levels.

The other routers choose for the same weights and frames: `uniform`, `random`, `change`, and `oracle`, which keeps
covered patches first. With `--objectness FOLDER` there is one more, which keeps the patches that most probably show a
thing, by the patch labels that `train/pretrain_vision.py` left in the folder.

- Agreement: the share of its kept patches that a layer shares with another, on average over pairs.
- Overlap: the share of its kept patches that a layer also kept in the previous frame.
- At usual places: the share of its kept patches at the positions that a layer keeps most often, as many as it keeps in
  a frame. It is high if the picture hardly matters.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from added_routers import with_changes
from common import ROOT, device_name
from report import markdown_table, write_results
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import save_figure
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.data.sources import find_source, load_split, option_names
from videollm_mod.train.focus import SHARES, Choices, Clip, describe, figures, watch
from videollm_mod.train.objectness import load_patch_labels


OTHERS = ("uniform", "random", "change")


def main() -> None:
    """Measure and print tables; with `--out`, also write files."""
    quiet()
    options = parse()
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
        options.over = [check_checkpoint(name) for name in options.over]
        model, processor = load(options.checkpoint)
        rows = held_out_rows(options, processor)
    clips = [describe(row, model.config, options.fps) for row in rows]
    routers = measure(model, processor, rows, clips, options)
    found = {name: figures(choices, clips) for name, choices in routers.items()}
    training = {}
    for name in options.over:
        earlier = VideoLLMMoDForConditionalGeneration.from_pretrained(name).eval()
        training[Path(name).name] = figures(watch(earlier, processor, rows, options.fps), clips)
    own = model.config.mod_router
    text = "\n\n".join([headline(options, rows), *tables(found, own), *over_training(training, found[own], options)])
    if options.out is not None:
        data = {"checkpoint": options.checkpoint, "world": options.world, "clips": len(rows)}
        data |= {"covered": positions_covered(clips), "routers": found, "training": training}
        write_results(options.out, "router_focus", data, f"{text}\n")
        draw(found, own, data["covered"], model.config, options.out / "router_focus.png")
    print(text)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLineParser(description="Count which patches routers keep: those of things, or others.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id, default: the embedded checkpoint")
    parser.add_argument("--over", nargs="+", default=[], help="earlier checkpoints of the same training run")
    parser.add_argument("--dataset", default="streamworld", help="a generated data set that knows covered patches")
    parser.add_argument("--world", help="what clips may show; default: the data set's")
    parser.add_argument("--vocabulary", help="what things of DoomWorld are called; default: the data set's")
    parser.add_argument("--clips", type=int, default=64, help="test clips")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second that the model sees")
    parser.add_argument("--objectness", type=Path, help="folder with the encoder's patch_labels.safetensors")
    parser.add_argument("--out", type=Path, help="folder for router_focus.json, .md and .png")
    return parser.parse_args()


def load(checkpoint: str) -> tuple[VideoLLMMoDForConditionalGeneration, Any]:
    """
    Return a model and its processor.

    Raises:
        `ValueError`: If the model has no layers with routers.
    """
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(checkpoint).eval()
    if not model.config.router_layers:
        raise ValueError(f"'{checkpoint}' has no layers with routers: each layer keeps all tokens or none.")
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def held_out_rows(options: argparse.Namespace, processor: Any) -> list[dict[str, Any]]:
    """
    Return narrated test clips at the model's size.

    Raises:
        `ValueError`: If the data do not say which patches things cover.
    """
    kind, size = find_source(options.dataset), processor.video_processor.size["height"]
    given = {"world": options.world, "kinds": "narrate=1", "frame_size": size}
    # DoomWorld clips are recorded at the rate that the model reads, and use all frames.
    given |= {"vocabulary": options.vocabulary, "frame_rate": int(options.fps)}
    known = {name: value for name, value in given.items() if name in option_names(kind) and value is not None}
    rows = list(load_split(kind(options.dataset, **known), "test", options.clips, fps=options.fps))
    if "covered" not in rows[0]:
        raise ValueError(f"Rows of {options.dataset} have no `covered`, the patches that things cover.")
    return rows


def measure(
    model: VideoLLMMoDForConditionalGeneration,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    clips: Sequence[Clip],
    options: argparse.Namespace,
) -> dict[str, Choices]:
    """Return what the model's own router keeps, and what others would keep."""
    routers = {model.config.mod_router: watch(model, processor, rows, options.fps)}
    for name in OTHERS:
        if name not in routers:
            variant = with_changes(model, {"mod_router": name}).eval()
            routers[name] = watch(variant, processor, rows, options.fps)
    if options.objectness is not None:
        routers["objectness"] = choose(objectness(model, processor, rows, options.objectness), model.config)
    routers["oracle"] = choose([clip.covered.float() for clip in clips], model.config)
    return routers


@torch.no_grad()
def objectness(
    model: VideoLLMMoDForConditionalGeneration, processor: Any, rows: Sequence[dict[str, Any]], folder: Path
) -> Iterator[torch.Tensor]:
    """Yield for each row how probably each patch shows a thing, (frames, tokens)."""
    head, first = load_patch_labels(folder), int(model.config.frame_token_cls)
    for row in rows:
        yield head.objectness(model.encode_frames(processor.process_frames(row["video"])))[:, first:]


def choose(scores: Iterable[torch.Tensor], config: Any) -> Choices:
    """Return the choices of a router that has these scores (frames, tokens) in each layer, clip by clip."""
    found = Choices()
    for values in scores:
        values = values.clone()
        if config.mod_keep_last:
            values[:, -1] = torch.inf
        for layer in config.router_layers:
            highest = values.topk(config.layer_keep_counts[layer] - int(config.frame_token_cls), dim=1).indices
            found.add(layer, torch.zeros_like(values, dtype=torch.bool).scatter(1, highest, True))
    return found


def positions_covered(clips: Sequence[Clip]) -> list[float]:
    """Return how often a thing covers each position."""
    return torch.cat([clip.covered for clip in clips]).float().mean(dim=0).tolist()


def headline(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Return the line above the tables."""
    world = options.dataset if options.world is None else f"{options.dataset}, {options.world}"
    frames = sum(len(row["video"]) for row in rows)
    name = "embedded checkpoint" if Path(options.checkpoint).resolve() == ROOT else options.checkpoint
    return f"{name}, {world}: {len(rows)} test clips, {frames} frames. {device_name('cpu')}, torch {torch.__version__}"


def tables(found: dict[str, dict[str, Any]], own: str) -> Iterator[str]:
    """Yield the table of the model's own router by layer, and that of all routers."""
    head = ["covered patches kept", "background kept", "lift over chance", "ceiling", "covered, at events"]
    head += ["covered, in silence", "overlap, still scene", "overlap, moving scene"]
    best = found["oracle"]["layers"]
    rows = [[name, *cells(layer, percent(best[name]["covered"]))] for name, layer in found[own]["layers"].items()]
    rows.append(["mean of layers", *cells(found[own]["mean"], percent(found["oracle"]["mean"]["covered"]))])
    rows.append(["all layers", *cells(found[own]["together"], "")])
    yield markdown_table(["layer", *head], rows)
    head = ["router", "covered patches kept", "background kept", "lift over chance", "covered, all layers together"]
    head += ["agreement of layers", "overlap, still scene", "overlap, moving scene", "at usual places"]
    yield markdown_table(head, [router_cells(name, figures) for name, figures in found.items()])


def cells(found: dict[str, float], ceiling: str) -> list[str]:
    """Return a line of the table by layer, without its name."""
    covered, background, events, silence, still, moving = (percent(found[name]) for name in SHARES)
    return [covered, background, show_lift(found), ceiling, events, silence, still, moving]


def router_cells(name: str, found: dict[str, Any]) -> list[str]:
    """Return a line of the table of routers."""
    covered, background, _, _, still, moving = (percent(found["mean"][share]) for share in SHARES)
    agreement = "-" if found["agreement"] is None else percent(found["agreement"])
    together = percent(found["together"]["covered"])
    places = percent(found["usual_places"])
    return [name, covered, background, show_lift(found["mean"]), together, agreement, still, moving, places]


def over_training(
    training: dict[str, dict[str, Any]], last: dict[str, Any], options: argparse.Namespace
) -> Iterator[str]:
    """Yield the table over training, if earlier checkpoints are given."""
    if not training:
        return
    head = ["checkpoint", *(f"lift, layer {layer}" for layer in last["layers"]), "covered, mean of layers"]
    rows = [
        [name, *(f"{layer['lift']:.2f}" for layer in found["layers"].values())]
        + [percent(found["mean"]["covered"]), percent(found["together"]["covered"])]
        for name, found in {**training, Path(options.checkpoint).resolve().name: last}.items()
    ]
    yield markdown_table([*head, "covered, all layers"], rows)


def show_lift(found: dict[str, float]) -> str:
    """Format a lift with its interval."""
    return f"{found['lift']:.2f} ({found['lift_low']:.2f} to {found['lift_high']:.2f})"


def percent(share: float) -> str:
    """Format a share; "-" if there is none."""
    return "-" if np.isnan(share) else f"{share:.0%}"


def draw(found: dict[str, Any], own: str, covered: list[float], config: Any, path: Path) -> None:
    """Draw shares by layer, and how often each position is kept, beside how often a thing covers it."""
    from matplotlib.figure import Figure

    layers, shape = found[own]["layers"], tuple(config.frame_token_pooled)
    figure = Figure(figsize=(3.2 + 1.5 * (len(layers) + 1), 3.0), dpi=130)
    axes = figure.subplots(1, len(layers) + 2, width_ratios=[2.6, *[1] * (len(layers) + 1)])
    axes[0].bar(list(layers), [layer["covered"] for layer in layers.values()], color="#2563eb", label=own)
    axes[0].plot(list(layers), [layer["background"] for layer in layers.values()], "v", color="#94a3b8")
    axes[0].lines[-1].set_label("background")
    for index, (name, router) in enumerate(found.items()):
        if name != own:
            axes[0].axhline(router["mean"]["covered"], color=f"C{index}", linewidth=1, label=name)
    axes[0].set(xlabel="layer", ylabel="covered patches kept", ylim=(0, 1))
    axes[0].legend(fontsize=6, framealpha=0.4)
    pictures = {f"layer {layer}": values for layer, values in found[own]["positions"].items()}
    for place, (title, values) in zip(axes[1:], {**pictures, "things": covered}.items(), strict=True):
        place.imshow(np.reshape(values, shape), vmin=0, vmax=max(values), cmap="magma")
        place.set_title(f"{title}\nmost: {max(values):.0%}", fontsize=7)
        place.axis("off")
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
