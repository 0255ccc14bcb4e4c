# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Figures of a server in the text format of Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """
    What a server has done. Each server has its own registry.

    Attributes:
        frames_received (`Counter`): Frames that clients sent.
        frames_dropped (`Counter`): Frames that the model did not see, by reason: `behind` if the model was slower than
            the stream, `fps` if the stream had more frames per second than it asked to be seen.
        lag (`Histogram`): Seconds from the arrival of a frame to the decision on it.
        first_word (`Histogram`): Seconds from the arrival of a frame or question to the first token of the reply.
        refusals (`Counter`): Requests and connections that were refused, by reason.
        disconnected (`Counter`): Connections that the server closed, by reason.
        speech_failures (`Counter`): Recordings without a transcript, and replies that were not spoken to their end, by
            the code of the error.
        save_faults (`Counter`): Sessions that were not saved while they go on, by reason: `late` once for each session
            until it is saved, `failed` for each try.
    """

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        named = {"namespace": "videollm_mod", "registry": self.registry}
        self.frames_received = Counter("frames_received", "Frames that clients sent.", **named)
        self.frames_dropped = Counter("frames_dropped", "Frames that were not seen.", ["reason"], **named)
        self.lag = Histogram(
            "frame_lag_seconds", "From arrival of a frame to its decision.", buckets=_SECONDS, **named
        )
        self.first_word = Histogram(
            "first_word_seconds", "From arrival of a frame or question to the reply.", buckets=_SECONDS, **named
        )
        self.refusals = Counter("refusals", "Requests and connections refused.", ["reason"], **named)
        self.disconnected = Counter("disconnected", "Connections that the server closed.", ["reason"], **named)
        self.speech_failures = Counter(
            "speech_failures", "Recordings not transcribed and replies not spoken.", ["code"], **named
        )
        self.save_faults = Counter("save_faults", "Sessions not saved while they go on.", ["reason"], **named)
        # A series that begins at its first count hides that count from `rate()`.
        for counter, reasons in (
            (self.frames_dropped, ("behind", "fps")),
            (self.refusals, ("full", "busy", "key", "origin", "host")),
            (self.disconnected, ("slow_reader",)),
            (self.save_faults, ("late", "failed")),
        ):
            for reason in reasons:
                counter.labels(reason)
        self.registry.register(_EngineFigures(engine))

    def to_text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)


class _EngineFigures:
    """Reads the figures of an engine when they are asked for."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        stats, pool, streams = self.engine.stats, self.engine.pool, list(self.engine.streams)
        yield GaugeMetricFamily("videollm_mod_streams", "Open streams.", len(streams))
        yield GaugeMetricFamily("videollm_mod_streams_limit", "Most streams.", self.engine.max_streams)
        waiting = sum(stream.num_waiting for stream in streams)
        yield GaugeMetricFamily("videollm_mod_frames_waiting", "Frames that wait to be seen.", waiting)
        cache = GaugeMetricFamily("videollm_mod_cache_bytes", "Memory of caches.", labels=["state"])
        cache.add_metric(["allocated"], pool.num_bytes)
        cache.add_metric(["reserved"], sum(sum(s.session.cache.num_bytes_by_kind.values()) for s in streams))
        yield cache
        yield CounterMetricFamily("videollm_mod_frames_seen", "Frames that the model saw.", stats.frames)
        yield CounterMetricFamily("videollm_mod_reply_tokens", "Tokens of replies.", stats.tokens)
        yield CounterMetricFamily("videollm_mod_steps", "Steps of the language model.", stats.steps)


__all__ = ["Metrics"]
