# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What do routers look at? Count how many of the patches that things cover each routed layer keeps.

The rows of generated worlds say which patches things cover (`covered`). A lift is the share of these patches that a
layer keeps, divided by the share of all patches that it keeps: chance is 1. Its interval is 95% over clips
(bootstrap).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from videollm_mod.train.collator import StreamCollator, normalize_pixels
from videollm_mod.train.data.dialogues import ceil_frame
from videollm_mod.train.streaming_evaluation import unasked_replies


# Side of the grid of patches in rows' `covered`.
COVERED_GRID = 8
BATCH = 8
# Which patches, or pairs of patch and previous frame, a share is of.
SHARES = ("covered", "background", "covered at events", "covered in silence", "again, still", "again, moving")
# Levels of 255 by which the background of a scene that moves changes from frame to frame.
MOVES = 1.0


@dataclass
class Clip:
    """
    What a clip shows.

    Args:
        covered (`torch.Tensor` of shape `(frames, tokens)`): True where a thing covers a patch.
        has_event (`torch.Tensor` of shape `(frames,)`): True at frames at which something is narrated.
        moves (`torch.Tensor` of shape `(frames,)`): True where the background differs from the previous frame.
    """

    covered: torch.Tensor
    has_event: torch.Tensor
    moves: torch.Tensor


@dataclass
class Choices:
    """
    What one router keeps.

    Args:
        kept (`dict[int, list[torch.Tensor]]`): By layer, for each clip: True at kept patches, (frames, tokens).
    """

    kept: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, layer: int, kept: torch.Tensor) -> None:
        """Add a clip."""
        self.kept.setdefault(layer, []).append(kept)

    def union(self) -> list[torch.Tensor]:
        """Return for each clip the patches that at least one layer keeps."""
        return [torch.stack(layers).any(dim=0) for layers in zip(*self.kept.values(), strict=True)]

    def agreement(self) -> float | None:
        """Return the share of kept patches that two layers share, averaged over pairs; `None` with one layer."""
        layers = [torch.cat(clips).float() for clips in self.kept.values()]
        pairs = [(one * two).sum() / min(one.sum(), two.sum()) for one, two in combinations(layers, 2)]
        return float(sum(pairs) / len(pairs)) if pairs else None

    def usual_places(self) -> float:
        """Return the share of kept patches at the positions that a layer keeps most often, averaged over layers."""
        shares = []
        for clips in self.kept.values():
            often = torch.cat(clips).float().mean(dim=0).sort(descending=True).values
            shares.append(often[: round(float(often.sum()))].sum() / often.sum())
        return float(sum(shares) / len(shares))

    def positions(self) -> dict[int, list[float]]:
        """Return by layer how often it keeps each position."""
        return {layer: torch.cat(clips).float().mean(dim=0).tolist() for layer, clips in self.kept.items()}


def covered_tokens(covered: Sequence[Sequence[int]], grid: Sequence[int]) -> torch.Tensor:
    """
    Return which tokens of each frame show a thing. A larger token shows one if one of its patches does.

    Args:
        covered (sequence of sequences of `int`): The field `covered` of a row: indices of the covered patches of each
            frame, in a grid of 8x8.
        grid (`Sequence[int]`): Height and width of the tokens' grid.

    Returns:
        `torch.BoolTensor` of shape `(frames, tokens)`: Row by row, without a pooled token.
    """
    patches = torch.zeros(len(covered), COVERED_GRID**2)
    for frame, indices in zip(patches, covered, strict=True):
        frame[list(indices)] = 1.0
    squares = patches.view(-1, 1, COVERED_GRID, COVERED_GRID)
    return F.adaptive_max_pool2d(squares, tuple(grid)).flatten(1) > 0


def describe(row: dict[str, Any], config: Any, fps: float) -> Clip:
    """Return what a row shows, on the model's grid of tokens."""
    covered = covered_tokens(row["covered"], config.frame_token_pooled)
    has_event = torch.zeros(len(covered), dtype=torch.bool)
    for reply in unasked_replies(row, fps=fps, num_frames=len(covered)):
        has_event[min(ceil_frame(reply["time"], fps), len(covered) - 1)] = True
    patches = covered_tokens(row["covered"], (COVERED_GRID, COVERED_GRID))
    return Clip(covered, has_event, background_moves(np.asarray(row["video"]), patches))


def background_moves(video: np.ndarray, covered: torch.Tensor) -> torch.Tensor:
    """Return whether the background of each frame differs from the previous frame's; False for the first."""
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    means = F.adaptive_avg_pool2d(pixels, (COVERED_GRID, COVERED_GRID)).flatten(2)
    change = (means[1:] - means[:-1]).abs().mean(dim=1)
    free = ~(covered[1:] | covered[:-1])
    moves = (change * free).sum(dim=1) / free.sum(dim=1).clamp_min(1) > MOVES
    return torch.cat([torch.zeros(1, dtype=torch.bool), moves])


@torch.no_grad()
def watch(model: Any, processor: Any, rows: Sequence[dict[str, Any]], fps: float) -> Choices:
    """Read rows with their true history, and return what the routed layers of a model in evaluation mode keep."""
    collator, found, first = StreamCollator(processor, fps), Choices(), int(model.config.frame_token_cls)
    for begin in tqdm(range(0, len(rows), BATCH), desc=model.config.mod_router, unit=f" x {BATCH} clips"):
        batch = normalize_pixels(collator(list(rows[begin : begin + BATCH])), processor)
        outputs = model(**{**batch, "labels": None}, output_router_scores=True, use_cache=False)
        for layer, kept in zip(model.config.routed_layers, outputs.kept_tokens, strict=True):
            if layer not in model.config.router_layers:
                continue
            for row, count in zip(kept, batch["num_frames"].tolist(), strict=True):
                found.add(layer, row[:count, first:])
    return found


def figures(choices: Choices, clips: Sequence[Clip]) -> dict[str, Any]:
    """Return all figures of a router: by layer, averaged over layers, and of all layers together."""
    counts = {layer: count_all(kept, clips) for layer, kept in choices.kept.items()}
    return {
        "layers": {str(layer): shares(found) for layer, found in counts.items()},
        "mean": shares(sum(counts.values())),
        "together": shares(count_all(choices.union(), clips)),
        "agreement": choices.agreement(),
        "usual_places": choices.usual_places(),
        "positions": choices.positions(),
    }


def shares(counts: np.ndarray) -> dict[str, float]:
    """Return each of [`SHARES`], the lift, and the bounds of its interval, from counts (clips, shares, 2)."""
    found = {name: _share(counts[:, index].sum(axis=0)) for index, name in enumerate(SHARES)}
    # Clips are drawn with replacement.
    drawn = np.random.default_rng(0).integers(len(counts), size=(1000, len(counts)))
    lifts = [lift(counts[sample].sum(axis=0)) for sample in drawn]
    low, high = np.nanquantile(lifts, (0.025, 0.975))
    return found | {"lift": lift(counts.sum(axis=0)), "lift_low": float(low), "lift_high": float(high)}


def count_all(kept: Sequence[torch.Tensor], clips: Sequence[Clip]) -> np.ndarray:
    """Return the numbers of [`count`] for all clips, (clips, shares, 2)."""
    return np.array([list(count(*pair)) for pair in zip(kept, clips, strict=True)], dtype=float)


def count(kept: torch.Tensor, clip: Clip) -> Iterator[tuple[int, int]]:
    """Yield for each of [`SHARES`] the number of patches that are kept, and that of all patches it is about."""
    covered, again = clip.covered, kept[1:] & kept[:-1]
    for among in (covered, ~covered, covered & clip.has_event[:, None], covered & ~clip.has_event[:, None]):
        yield int((kept & among).sum()), int(among.sum())
    for when in (~clip.moves[1:], clip.moves[1:]):
        yield int(again[when].sum()), int(kept[1:][when].sum())


def lift(counts: np.ndarray) -> float:
    """Return how much more often covered patches are kept than all patches, from counts (shares, 2)."""
    return _share(counts[0]) / max(_share(counts[0] + counts[1]), 1e-9)


def _share(count: np.ndarray) -> float:
    """Return part / all; NaN if there is nothing."""
    return float(count[0] / count[1]) if count[1] else float("nan")
