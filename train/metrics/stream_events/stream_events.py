# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Events that free streaming narrates correctly and on time."""

from typing import Any

import datasets
import evaluate


_DESCRIPTION = """
`predictions` and `references` are lists of `{"time": seconds, "text": words}` for each stream: what the model said
unprompted, and what it should have said. An event is correct if its words match, apart from case and spaces, and its
time differs by at most `tolerance` seconds. Each event counts once, and as many as possible count. Returns
`event_precision`, `event_recall`, `event_f1` and `event_delay`. The delay is the mean number of seconds from the true
time to the time at which the model spoke, negative if it spoke early. It covers events with matching words at most
`delay_window` seconds apart, paired nearest in time first, and is 0 if there are none.
"""
_CITATION = """"""


class StreamEvents(evaluate.Metric):
    """Events that free streaming narrates correctly and on time."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": [{"time": datasets.Value("float64"), "text": datasets.Value("string")}],
                    "references": [{"time": datasets.Value("float64"), "text": datasets.Value("string")}],
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[dict[str, Any]]],
        references: list[list[dict[str, Any]]],
        tolerance: float = 0.5,
        delay_window: float = 5.0,
    ) -> dict[str, float]:
        right, delays, told, true = 0, [], 0, 0
        for said, happened in zip(predictions, references, strict=True):
            told, true = told + len(said), true + len(happened)
            delays += _delays(said, happened, delay_window)
            right += _count_right(said, happened, tolerance + 1e-6)
        precision, recall = right / max(told, 1), right / max(true, 1)
        return {
            "event_precision": precision,
            "event_recall": recall,
            "event_f1": 2 * precision * recall / max(precision + recall, 1e-9),
            "event_delay": sum(delays) / max(len(delays), 1),
        }


def _count_right(said: list[dict[str, Any]], happened: list[dict[str, Any]], tolerance: float) -> int:
    """
    Return the largest number of pairs with the same words that are near enough in time.

    Of two times that are too far apart, the earlier one is too far from all later ones too. So pairing in order of
    time finds as many pairs as there can be. The nearest pair first may leave two others without a partner.
    """
    right, true = 0, _by_words(happened)
    for words, times in _by_words(said).items():
        others, place = true.get(words, []), 0
        for time in times:
            while place < len(others) and others[place] < time - tolerance:
                place += 1
            if place < len(others) and others[place] <= time + tolerance:
                right, place = right + 1, place + 1
    return right


def _by_words(events: list[dict[str, Any]]) -> dict[tuple[str, ...], list[float]]:
    """Return the times of events with the same words, in order."""
    found: dict[tuple[str, ...], list[float]] = {}
    for event in sorted(events, key=lambda event: event["time"]):
        found.setdefault(tuple(_words(event["text"])), []).append(event["time"])
    return found


def _delays(said: list[dict[str, Any]], happened: list[dict[str, Any]], window: float) -> list[float]:
    """Return the seconds from each true event to its narration, for pairs within the window."""
    pairs = [
        (event["time"] - other["time"], i, j)
        for i, event in enumerate(said)
        for j, other in enumerate(happened)
        if _words(other["text"]) == _words(event["text"])
    ]
    delays, used_said, used_happened = [], set(), set()
    for delay, i, j in sorted(pairs, key=lambda pair: abs(pair[0])):
        if abs(delay) <= window + 1e-6 and i not in used_said and j not in used_happened:
            delays.append(delay)
            used_said.add(i)
            used_happened.add(j)
    return delays


def _words(text: str) -> list[str]:
    return text.lower().split()
