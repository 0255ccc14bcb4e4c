# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Output of programs: the command line, the scripts in `train/` and `convert/`, and the benchmarks.

Import this module before torch and Transformers, because it silences what they log while they are imported. [`quiet`]
is defined in `space/`, because a published Space has only the files of that folder.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

from videollm_mod.space.console import quiet


def device_name(model: Any) -> str:
    """Return the GPU of a model, or the CPU with its number of threads."""
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def counted(number: int, word: str) -> str:
    """Return a number with its word, such as "1 row", "2 rows" or "2 replies"."""
    several = re.sub("(?<![aeiou])y$", "ie", word) + "s"
    return f"{number} {word if number == 1 else several}"


def visible(text: str) -> str:
    """Return text without control characters, which could change the terminal, except line breaks and tabs."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def printable(text: str) -> str:
    """Return text that can be written as UTF-8: names of files may hold other bytes, which become "\\udce9"."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def describe_saving(value: float, full: float, unit: str, where: str = "") -> str:
    """Compare a cost with full compute: "0.77 GFLOP, 1.31 at full compute (routing saves 42%)"."""
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))
    scale, prefix = next(((scale, prefix) for scale, prefix in scales if full >= scale), (1.0, ""))
    needed = f"{value / scale:.3g} {prefix}{unit}{where}"
    if value == full:
        # A model without routed layers has nothing to compare.
        return needed
    return f"{needed}, {full / scale:.3g} at full compute (routing saves {1 - value / full:.0%})"


def describe_entries(lengths: Sequence[int], routed: Collection[int]) -> str:
    """Describe cache lengths: "363 in each of 2 full layers, 159 in each of 4 routed layers"."""
    kinds: dict[str, list[int]] = {"full": [], "routed": []}
    for layer, length in enumerate(lengths):
        kinds["routed" if layer in routed else "full"].append(length)
    parts = [
        f"{'' if min(found) == max(found) else 'up to '}{max(found)} in "
        + (f"the {kind} layer" if len(found) == 1 else f"each of {len(found)} {kind} layers")
        for kind, found in kinds.items()
        if found
    ]
    return ", ".join(parts)


__all__ = ["counted", "describe_entries", "describe_saving", "device_name", "printable", "quiet", "visible"]
