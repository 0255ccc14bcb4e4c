# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Tables of the ablation, with 95% intervals by a bootstrap over seeds and clips.

A replicate draws seeds and clips with replacement. All seeds were measured on the same clips, so the drawn clips are
the same for each drawn seed. A difference of two variants uses the same draws for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from report import markdown_table


REPLICATES = 4000
# Each measure is a part over a whole, added up over clips: its name in tables, and the keys of both.
MEASURES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "event_f1": ("event F1", ("events_right", "events_right"), ("events_told", "events_true")),
    "answer_accuracy": ("answers", ("answers_right",), ("answers",)),
    "silent_frames_right": ("silence", ("silent_right",), ("silent",)),
    "lm_correctness": ("LM-Correctness", ("lm_correctness",), ()),
    "text_loss": ("text loss", ("text_loss",), ("texts",)),
    "stream_loss": ("stream loss", ("stream_loss",), ("streams",)),
}
# Fields in which all lines of a table agree.
SHARED = ("steps", "batch_size", "learning_rate", "test_clips", "initial")
Line = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over seeds, and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_separated(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Counts(NamedTuple):
    """Parts and wholes of a measure, each `(seeds, clips)`."""

    parts: np.ndarray
    wholes: np.ndarray


@dataclass
class Variant:
    """All runs of one variant, by seed."""

    name: str
    lines: dict[int, Line]

    @property
    def first(self) -> Line:
        """The line of the first seed."""
        return next(iter(self.lines.values()))

    def counts(self, measure: str, seeds: Sequence[int]) -> Counts | None:
        """Return the counts of a measure in [`MEASURES`], or of `"kept"`, or `None` if a clip does not have them."""
        parts, wholes = ("kept",), ("kept_of",)
        if measure != "kept":
            _, parts, wholes = MEASURES[measure]
        clips = [[_with_kept(clip) for clip in self.lines[seed]["clips"]] for seed in seeds]
        if any(name not in clip for row in clips for clip in row for name in (*parts, *wholes)):
            return None
        numerators = [[sum(clip[name] for name in parts) for clip in row] for row in clips]
        denominators = [[sum(clip[name] for name in wholes) if wholes else 1 for clip in row] for row in clips]
        return Counts(np.array(numerators, dtype=float), np.array(denominators, dtype=float))


def _with_kept(clip: dict[str, Any]) -> dict[str, Any]:
    """Return a clip with the covered tokens that routed layers keep, over all layers."""
    if "kept_covered" not in clip:
        return clip
    layers = clip["kept_covered"]
    return {**clip, "kept": sum(layers), "kept_of": len(layers) * clip["covered"]}


def bootstrap(first: Counts, second: Counts | None = None, *, seed: int = 0) -> Estimate:
    """
    Estimate a measure, or the difference of two, with its 95% interval.

    Args:
        first ([`Counts`]): Counts of a variant.
        second ([`Counts`], *optional*): Counts of the variant to subtract, of the same seeds and clips.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
    """
    generator, (num_seeds, num_clips) = np.random.default_rng(seed), first.parts.shape
    weights = generator.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=REPLICATES).T
    drawn = generator.integers(num_seeds, size=(num_seeds, REPLICATES))

    def values(clip_weights: np.ndarray) -> np.ndarray:
        found = _ratio(first, clip_weights)
        return found if second is None else found - _ratio(second, clip_weights)

    means = np.take_along_axis(values(weights), drawn, axis=0).mean(axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values(np.ones((num_clips, 1))).mean()), float(low), float(high))


def _ratio(counts: Counts, weights: np.ndarray) -> np.ndarray:
    """Return the measure of each seed under weights of clips (clips, replicates): `(seeds, replicates)`."""
    return (counts.parts @ weights) / np.maximum(counts.wholes @ weights, 1e-9)


def variants(lines: Sequence[Line]) -> dict[str, Variant]:
    """Group results by variant. Lines that do not agree with the last one in [`SHARED`] are left out."""
    shared = [lines[-1][name] for name in SHARED]
    found: dict[str, Variant] = {}
    for line in lines:
        if [line[name] for name in SHARED] == shared:
            found.setdefault(line["name"], Variant(line["name"], {})).lines[line["seed"]] = line
    return found


def estimate(variant: Variant, measure: str) -> Estimate | None:
    """Return a measure of a variant over all its seeds, or `None` if it has none."""
    counts = variant.counts(measure, list(variant.lines))
    return None if counts is None else bootstrap(counts)


def difference(first: Variant, second: Variant, measure: str) -> Estimate | None:
    """Return the difference of two variants on the seeds that both have, or `None` if one has no such measure."""
    seeds = [seed for seed in first.lines if seed in second.lines]
    counts = [variant.counts(measure, seeds) for variant in (first, second)] if seeds else [None]
    return None if None in counts else bootstrap(*counts)


def tables(lines: Sequence[Line]) -> str:
    """Return what was run, the table of measures, the table of differences and the table of kept tokens."""
    found = variants(lines)
    line = next(iter(found.values())).first
    used = sum(len(variant.lines) for variant in found.values())
    about = (
        f"World {line['world']}, {line['steps']} steps of {line['batch_size']} clips, {len(line['clips'])} held-out "
        f"clips, {line['hardware']}, {lines[-1]['date']}. Intervals of 95% over seeds and clips."
    )
    if used < len(lines):
        about += f" {len(lines) - used} results with other settings are left out."
    parts = [about, measure_table(found), difference_table(found), kept_table(found)]
    return "\n\n".join(part for part in parts if part)


def measure_table(found: dict[str, Variant]) -> str:
    """Return one row for each variant: seeds, cost, and every measure."""
    head = ["variant", "seeds", "GFLOPs per clip", "MFLOPs per frame", *(title for title, _, _ in MEASURES.values())]
    rows = []
    for variant in found.values():
        cost = [f"{variant.first['clip_flops'] / 1e9:.2f}", f"{variant.first['frame_flops'] / 1e6:.0f}"]
        cells = [estimate(variant, measure) or "" for measure in MEASURES]
        rows.append([variant.name, len(variant.lines), *cost, *cells])
    return markdown_table(head, rows)


def pairs(found: dict[str, Variant]) -> list[tuple[Variant, Variant]]:
    """
    Return the variants to subtract from each other.

    Learned routers are compared with routers that do not learn, in the same layers and with the same ratios. Full
    compute is compared with what it must beat, and all other variants with full compute.
    """
    chosen = []
    for variant in found.values():
        if is_learned(variant):
            others = [found[name] for name in found if name.split()[0] in ("uniform", "random", "change")]
            chosen += [(variant, other) for other in others if _layout(variant) == _layout(other)]
    if full := found.get("full"):
        must_beat = ("early_exit", "last_token", "pooled", "one_token")
        chosen += [(full, found[name]) for name in must_beat if name in found]
        chosen += [(variant, full) for name, variant in found.items() if name not in ("full", *must_beat)]
    return chosen


def is_learned(variant: Variant) -> bool:
    """Return whether a variant has learned routers."""
    return bool(variant.first["router_layers"]) and variant.first["changes"].get("mod_router") is None


def _layout(variant: Variant) -> tuple[Any, Any]:
    return variant.first["router_layers"], variant.first["chance"]


def difference_table(found: dict[str, Variant]) -> str:
    """Return one row for each pair of [`pairs`]. Differences with intervals that exclude 0 are bold."""
    head = ["difference", "seeds", *(title for title, _, _ in MEASURES.values())]
    rows = []
    for first, second in pairs(found):
        cells = []
        for measure in MEASURES:
            gap = difference(first, second, measure)
            text = "" if gap is None else f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            cells.append(f"**{text}**" if gap is not None and gap.is_separated else text)
        rows.append([f"{first.name} - {second.name}", len(first.lines.keys() & second.lines.keys()), *cells])
    return markdown_table(head, rows) if rows else ""


def kept_table(found: dict[str, Variant]) -> str:
    """Return what routed layers keep of the tokens on things, relative to chance, and by layer."""
    head = ["variant", "tokens on things kept", "times chance", "by layer", "background by layer", "by any layer"]
    rows = []
    for variant in found.values():
        counts = variant.counts("kept", list(variant.lines))
        if counts is None or not counts.wholes.sum():
            continue
        kept, chance = bootstrap(counts), float(np.mean(variant.first["chance"]))
        layers = [by_layer(variant, name) for name in ("kept_covered", "kept_background")]
        texts = [", ".join(f"{share:.2f}" for share in shares) for shares in layers]
        any_layer = np.mean([line["any_covered"] for line in variant.lines.values()])
        rows.append([variant.name, kept, f"{kept.value / chance:.2f}", *texts, f"{any_layer:.2f}"])
    return markdown_table(head, rows) if rows else ""


def by_layer(variant: Variant, name: str) -> list[float]:
    """Return `kept_covered` or `kept_background` by routed layer, the mean over seeds."""
    return np.mean([line[name] for line in variant.lines.values()], axis=0).tolist()
