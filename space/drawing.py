# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draw a stream as HTML and SVG in the page's colors, light or dark. All typed and generated text is escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

from loading import seen_area
from viewer import Moment, Viewer


SHARE = "share of layers"
OFF = "off"
# Size of the plots, position of their axes, and the time they show.
WIDTH, HEIGHT = 600, 120
LEFT, RIGHT, TOP, BOTTOM = 34, WIDTH - 10, 10, HEIGHT - 24
PLOT_SECONDS = 30.0


def overlay_choices(config: Any) -> list[str]:
    """Return the choices of overlay: the share of routed layers that keep a patch, one layer's patches, or none."""
    return [SHARE, *(f"layer {layer}" for layer in config.routed_layers), OFF]


def overlay(viewer: Viewer, shown: str = SHARE) -> str:
    """Darken the skipped patches of the last frame. The drawing has the picture's size."""
    session, config = viewer.session, viewer.model.config
    if shown not in overlay_choices(config) or shown == OFF or not session.kept_tokens:
        return ""
    layers = session.kept_tokens if shown == SHARE else {int(shown.split()[-1]): None}
    kept = [session.kept_tokens[layer].float() for layer in layers if layer in session.kept_tokens]
    if not kept:
        return ""
    share = (sum(kept) / len(kept))[int(config.frame_token_cls) :].tolist()
    rows, columns = config.frame_token_pooled
    height, width = viewer.shape
    left, top, across, down = seen_area(viewer.processor.video_processor, height, width)
    side = max(across, down)
    cells = []
    for index, part in enumerate(share):
        row, column = divmod(index, columns)
        x, y = left + across * column / columns, top + down * row / rows
        cells.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{across / columns:.1f}" height="{down / rows:.1f}" '
            f'fill="#0b1020" fill-opacity="{0.6 * (1 - part):.2f}"/>'
        )
        if part > 0:
            cells.append(
                f'<rect x="{x + 0.02 * across / columns:.1f}" y="{y + 0.02 * down / rows:.1f}" '
                f'width="{0.96 * across / columns:.1f}" height="{0.96 * down / rows:.1f}" fill="none" '
                f'stroke="#ffd166" stroke-opacity="{part:.2f}" stroke-width="{0.008 * side:.2f}"/>'
            )
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="Patches that routed layers keep">{"".join(cells)}</svg>'
    )


def caption(viewer: Viewer) -> str:
    """Return the words of the reply in progress, else the last reply. page.js lets screen readers announce replies."""
    said = [event.text for event in viewer.events if event.role == "assistant" and event.text]
    words = viewer.words or (said[-1] if said else "")
    return f'<div class="live" aria-hidden="true">{words and f"<span>{escape(words)}</span>"}</div>'


def chat(viewer: Viewer) -> list[dict[str, str]]:
    """
    Return all events, and the words of the reply in progress, as chat messages with their second. They are escaped
    because `gr.Chatbot` always renders HTML.
    """
    words = viewer.words
    said = [(event.role, event.time, event.text) for event in viewer.events]
    said += [("assistant", viewer.session.time or 0.0, words)] if words else []
    return [{"role": role, "content": f"{time:.1f} s   {escape(text)}"} for role, time, text in said]


def silence_plot(viewer: Viewer) -> str:
    """
    Plot the probability of silence over the last half minute, where the model spoke, and if it speaks by the interval
    rule the threshold.
    """
    end, seen = _last_moments(viewer)
    is_learned = viewer.session.speak == "learned"
    threshold = viewer.session.interval_threshold
    threshold = viewer.model.config.interval_threshold if threshold is None else threshold
    line = " ".join(f"{_x(m.time, end):.1f},{_y(m.silence):.1f}" for m in seen)
    spoke = [m for m in seen if m.spoke]
    marks = "".join(
        f'<circle cx="{_x(m.time, end):.1f}" cy="{_y(m.silence):.1f}" r="6" class="spoke"/>' for m in spoke
    )
    level = f"{_y(threshold):.1f}"
    cut = f'<line x1="{LEFT}" x2="{RIGHT}" y1="{level}" y2="{level}" class="threshold"/>' if is_learned else ""
    note = f"speaks below {threshold:.2f}" if is_learned else f"speaks by {viewer.session.speak}"
    words = f"Probability of silence per frame. The model {note}, and spoke {len(spoke)} times."
    drawing = f'{cut}<polyline points="{line}" class="line"/>{marks}'
    return _figure("Probability of silence", note, _plot(words, drawing, end, "1"))


def latency_plot(viewer: Viewer) -> str:
    """Plot the seconds from a frame's arrival to the decision whether to speak, over the last half minute."""
    end, seen = _last_moments(viewer)
    most = max([m.latency for m in seen], default=0.0) or 1e-3
    bars = "".join(
        f'<rect x="{_x(m.time, end) - 3:.1f}" y="{_y(m.latency / most):.1f}" width="6" '
        f'height="{BOTTOM - _y(m.latency / most):.1f}" class="bar"/>'
        for m in seen
    )
    last = 1000 * seen[-1].latency if seen else 0.0
    words = f"Frame latency, last {last:.0f} ms"
    note = f"{last:.0f} ms, {viewer.dropped} frames dropped"
    return _figure("Frame latency", note, _plot(words, bars, end, f"{1000 * most:.0f}"))


def savings(viewer: Viewer) -> str:
    """Draw operations and cache of what this stream remembers, and what routing saves of full compute."""
    cost, frames = viewer.cost(), viewer.session.num_remembered
    if not frames:
        return _figure("What routing saves", "shown from the first frame on", "")
    bars = "".join(
        _bar(name, part, whole, unit)
        for name, part, whole, unit in (
            ("Language model, operations", cost.flops, cost.full_flops, "FLOP"),
            ("Cache", cost.cache_bytes, cost.full_cache_bytes, "B"),
        )
    )
    config = viewer.model.config
    counts = [count for count in config.layer_keep_counts if count < config.frame_num_tokens]
    note = "no layer is routed"
    if counts:
        layers, tokens = len(config.layer_keep_counts), config.frame_num_tokens
        note = f"{len(counts)} of {layers} layers keep {_span(counts)} of {tokens} tokens per frame"
    seen = "" if frames == viewer.session.num_frames else f" remembered of {viewer.session.num_frames}"
    return _figure("What routing saves", f"{frames} frames{seen}, {note}", bars)


def figures(viewer: Viewer) -> str:
    """Return the table of one side of a comparison: speed, memory and operations."""
    cost, session = viewer.cost(), viewer.session
    latencies = sorted(moment.latency for moment in viewer.moments)
    middle = latencies[len(latencies) // 2] if latencies else 0.0
    rows = (
        ("frames per second, with replies", f"{session.num_frames / max(viewer.seconds, 1e-9):.1f}"),
        ("frame latency, median", f"{1000 * middle:.1f} ms"),
        ("operations", amount(cost.flops, "FLOP")),
        ("cache", amount(cost.cache_bytes, "B")),
        ("cache entries", f"{sum(session.cache.lengths)}"),
    )
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return f'<table class="figures">{cells}</table>'


def amount(count: float, unit: str) -> str:
    """Format a count with a unit prefix, such as "1.5 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 1000 or prefix == "T":
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    raise AssertionError


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _bar(name: str, part: float, whole: float, unit: str) -> str:
    share = part / max(whole, 1e-9)
    words = f"{name}: {amount(part, unit)} of {amount(whole, unit)}, {1 - share:.0%} saved"
    return (
        f'<div class="saving" role="img" aria-label="{words}"><div class="names"><span>{name}</span>'
        f"<strong>{1 - share:.0%} saved</strong></div>"
        f'<div class="whole"><div class="part" style="width:{100 * min(share, 1):.1f}%"></div></div>'
        f'<div class="names"><span>{amount(part, unit)}</span><span>{amount(whole, unit)} at full compute</span></div>'
        "</div>"
    )


def _figure(title: str, note: str, drawing: str) -> str:
    return (
        f'<figure class="plot"><figcaption><strong>{title}</strong><span>{note}</span></figcaption>{drawing}</figure>'
    )


def _last_moments(viewer: Viewer) -> tuple[float, list[Moment]]:
    """Return the second at which a plot ends, and its frames."""
    moments = list(viewer.moments)
    end = max(moments[-1].time if moments else 0.0, PLOT_SECONDS)
    return end, [moment for moment in moments if moment.time >= end - PLOT_SECONDS]


def _x(time: float, end: float) -> float:
    return LEFT + (RIGHT - LEFT) * (time - end + PLOT_SECONDS) / PLOT_SECONDS


def _y(share: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * share


def _plot(words: str, drawing: str, end: float, most: str) -> str:
    """Frame a drawing of the last half minute with axes, from 0 to `most`, and describe it in words."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{drawing}'
        f'<line x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}" class="axis"/>'
        f'<text x="{LEFT - 6}" y="20" text-anchor="end">{most}</text>'
        f'<text x="{LEFT - 6}" y="{BOTTOM}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">{end - PLOT_SECONDS:.0f} s</text>'
        f'<text x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{end:.0f} s</text></svg>'
    )
