# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod find`: the moments of a video at which something is seen."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from videollm_mod.commands.watching import CtrlC, keep_what_was_seen, print_reading, read_frames
from videollm_mod.commands.windows import Window, WindowedSession, see_windows, to_question
from videollm_mod.space.checkpoint_faults import in_one_line


# Reading video loads Transformers, which `--help` does without.
if TYPE_CHECKING:
    from videollm_mod.commands.clips import ClipCutter


# Windows whose ends are so close are neighbours.
_NEAR = 1e-6


def open_cutter(video: str, folder: Path | None) -> "ClipCutter | None":
    """Return what cuts clips into a folder, if there is one; see [`ClipCutter`] for errors."""
    from videollm_mod.commands.clips import ClipCutter

    return None if folder is None else ClipCutter(video, folder)


@dataclass(frozen=True)
class Moment:
    """Seconds of a video between which something is seen, and the highest probability that it is."""

    start: float
    end: float
    probability: float


def find_moments(windows: Iterable[Window], threshold: float) -> list[Moment]:
    """
    Join neighbouring windows of at least the threshold, and rank the moments by their highest probability.

    Args:
        windows (`Iterable[Window]`): Windows in order of time, asked one question.
        threshold (`float`): Least probability.
    """
    moments: list[Moment] = []
    for window in windows:
        [probability] = window.probabilities
        if probability < threshold:
            continue
        moment = Moment(window.start, window.end, probability)
        if moments and window.start - moments[-1].end < _NEAR:
            before = moments.pop()
            moment = Moment(before.start, window.end, max(before.probability, probability))
        moments.append(moment)
    return sorted(moments, key=lambda moment: (-moment.probability, moment.start))


def find_in_video(
    processor: Any,
    video: str,
    session: Any,
    what: str,
    ctrl_c: CtrlC,
    *,
    window: float,
    threshold: float,
    top: int,
    cutter: "ClipCutter | None",
    as_json: bool,
    **reading: Any,
) -> bool:
    """
    Search a video, print the moments, and cut them out.

    Args:
        session ([`StreamingSession`]): A session that has seen nothing and does not speak.
        what (`str`): What to look for.
        window (`float`): Seconds that are asked about at once.
        threshold (`float`): Least probability of a moment.
        top (`int`): Most moments to print.
        cutter ([`ClipCutter`], *optional*): Writes the clips.
        reading: Options of [`read_frames`].

    Returns:
        `bool`: Whether all clips were written.
    """
    searcher, windows = WindowedSession(session, window, [to_question(what)]), []
    with keep_what_was_seen(searcher):
        for seen in see_windows(searcher, read_frames(processor, video, searcher, **reading), ctrl_c):
            windows.append(seen)
    moments = find_moments(windows, threshold)
    if not moments and windows:
        best = max(windows, key=lambda seen: seen.probabilities)
        where = f"{best.start:.1f} to {best.end:.1f} s, with {best.probabilities[0]:.2f}"
        typer.echo(f"No moment has a probability of {threshold:g} or more. The most likely: {where}.", err=True)
    # Shown one by one, also after one whose clip fails.
    shown = [_show(moment, cutter, as_json) for moment in moments[:top]]
    print_reading(reading["report"], searcher.num_dropped, as_json=as_json)
    return all(shown)


def _show(moment: Moment, cutter: "ClipCutter | None", as_json: bool) -> bool:
    """Print a moment and cut it out. Return whether that worked."""
    clip, fault = None, ""
    if cutter is not None:
        try:
            clip = cutter.cut(moment.start, moment.end)
        except (OSError, ValueError) as error:
            fault = in_one_line(error)
    if as_json:
        said = {"start": moment.start, "end": moment.end, "probability": round(moment.probability, 4)}
        if clip is not None:
            said |= {"clip": str(clip.path), "clip_start": round(clip.start, 3), "clip_end": round(clip.end, 3)}
        typer.echo(json.dumps(said))
    else:
        typer.echo(f"{moment.start:6.1f}s to {moment.end:6.1f}s  {moment.probability:.2f}" + _describe(moment, clip))
    if fault:
        typer.echo(f"error: the clip of {moment.start:.1f} to {moment.end:.1f} s was not written: {fault}", err=True)
    return not fault


def _describe(moment: Moment, clip: Any) -> str:
    if clip is None:
        return ""
    earlier = moment.start - clip.start
    return f"  {clip.path}" + (f", begins {earlier:.1f} s earlier, at a key frame" if earlier >= 0.05 else "")


__all__ = ["Moment", "find_in_video", "find_moments", "open_cutter"]
