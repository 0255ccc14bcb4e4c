# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""PAUC: how early and how well a model answers within the time spans in which it should."""

from typing import Any

import datasets
import evaluate

from videollm_mod.train.arithmetic import mean
from videollm_mod.train.judging import Judge, find_judge


_DESCRIPTION = """
The measure of ProactiveVideoQA (arXiv 2507.09313). `predictions`: for each video a list of `{"time": seconds, "text":
words}`; empty texts and "NO REPLY" are skipped. `references`: for each video a list of spans `{"question", "content":
the true answer, "start", "end", "related_end"}`. What the answer tells has ended at `related_end`, which may be
`None`.

In each span, a judge gives each reply a level from 0 to `max_level` (M). A text that was said before in the span
counts once. The height begins at 0.5, and jumps at t - start, times 1 - `omega`, to the level of the reply at t. The
score of the span is the area under it over (end - start) M; without a reply it is 0.5 / M.

Options: `judge` ("exact", "token_f1", "sentence" or an object with `name`, `levels` and `repeats`, such as
`videollm_mod.train.endpoint_judge.EndpointJudge`); `max_level` (4 for five grades, 2 for three); `omega` (0.5 as
published; 0 weighs timing most, 1 ignores it); and `rule`. Videos without a span are left out. The rules are:

- "reward" (default) follows the reward of MMDuet2 (arXiv 2512.06810): the judge reads each reply by itself, and the
  score of a video is the mean over its spans.
- "benchmark" follows the benchmark's scorer, as programs that evaluate on it have copied it: the judge reads all
  replies of the span so far, a reply after `related_end` with a lower level than the last one before it is ignored,
  and all spans count the same. Its published figures have three grades.

Returns `pauc_<judge>`, or `pauc_benchmark_<judge>`; `duplicate_share_<judge>`, the share of all replies whose
information was given before in the video; and, as they define the number, `pauc_omega`, `pauc_max_level` and
`pauc_silent`, the score of a silent model. `pauc_unjudged` counts the replies for which the judge gave no level or no
answer. They are left out.
"""
_CITATION = """"""
_NO_REPLY = "NO REPLY"


class PAUC(evaluate.Metric):
    """PAUC: how early and how well a model answers within the time spans in which it should."""

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": [{"time": number, "text": text}],
                    "references": [
                        {"question": text, "content": text, "start": number, "end": number, "related_end": number}
                    ],
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[dict[str, Any]]],
        references: list[list[dict[str, Any]]],
        judge: str | Judge = "token_f1",
        max_level: int = 4,
        omega: float = 0.5,
        rule: str = "reward",
    ) -> dict[str, float]:
        if max_level < 1 or not 0 <= omega <= 1:
            raise ValueError(f"`max_level` is at least 1 and `omega` in [0, 1], got {max_level} and {omega}.")
        if rule not in ("reward", "benchmark"):
            raise ValueError(f'`rule` is "reward" or "benchmark", got {rule!r}.')
        judge, is_benchmark = find_judge(judge), rule == "benchmark"
        said = [_spoken(replies) for replies in predictions]
        videos = [
            [_Span(truth, replies, is_benchmark) for truth in truths]
            for replies, truths in zip(said, references, strict=True)
        ]
        asked = list(dict.fromkeys(item for spans in videos for span in spans for item in span.items))
        level = dict(zip(asked, judge.levels(asked, max_level), strict=True))
        scores = [[span.score(level, max_level, omega) for span in spans] for spans in videos if spans]
        together = sum(scores, []) if is_benchmark else [mean(spans) for spans in scores]
        repeated, unclear = _repeated(said, judge)
        return {
            f"pauc_{'benchmark_' if is_benchmark else ''}{judge.name}": mean(together),
            f"duplicate_share_{judge.name}": mean(repeated),
            "pauc_omega": omega,
            "pauc_max_level": max_level,
            "pauc_silent": 0.5 / max_level,
            "pauc_unjudged": unclear + sum(value is None for value in level.values()),
        }


class _Span:
    """
    A time span, and the replies in it: each text once.

    Attributes:
        items (`list[tuple[str, str, str]]`): What the judge reads for each reply: question, truth and words.
        times (`list[float]`): Seconds from the start of the span to each reply.
    """

    def __init__(self, truth: dict[str, Any], said: list[dict[str, Any]], is_benchmark: bool) -> None:
        self.length = truth["end"] - truth["start"]
        if self.length <= 0:
            raise ValueError(f"A span must end after its start, got {truth['start']} to {truth['end']} s.")
        replies: dict[str, float] = {}
        for reply in said:
            if truth["start"] <= reply["time"] <= truth["end"]:
                replies.setdefault(reply["text"], reply["time"] - truth["start"])
        texts = list(replies)
        if is_benchmark:
            texts = [" ".join(texts[: k + 1]) for k in range(len(texts))]
        self.items = [(truth["question"], truth["content"], text) for text in texts]
        self.times = list(replies.values())
        related_end = truth.get("related_end")
        is_limited = is_benchmark and related_end is not None
        self.related = related_end - truth["start"] if is_limited else self.length

    def score(self, level: dict[tuple[str, str, str], int | None], max_level: int, omega: float) -> float:
        """Return the area under the levels over time, as a share of the largest."""
        judged = [
            (time, level[item]) for time, item in zip(self.times, self.items, strict=True) if level[item] is not None
        ]
        if not judged:
            return 0.5 / max_level
        least = next((value for time, value in reversed(judged) if time <= self.related), 0)
        steps = [(time, value) for time, value in judged if time <= self.related or value >= least]
        area, at, height = 0.0, 0.0, 0.5
        for time, value in [*((time * (1 - omega), value) for time, value in steps), (self.length, 0)]:
            area, at, height = area + (time - at) * height, time, value
        return area / (self.length * max_level)


def _spoken(replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the replies in order of time, with stripped texts and without silence."""
    stripped = [{"time": reply["time"], "text": reply["text"].strip()} for reply in replies]
    return sorted((r for r in stripped if r["text"] not in ("", _NO_REPLY)), key=lambda reply: reply["time"])


def _repeated(said: list[list[dict[str, Any]]], judge: Judge) -> tuple[list[bool], int]:
    """Return for each reply whether it repeats, and the number of replies about which the judge is unclear."""
    found, asked = [], []
    for replies in said:
        earlier: list[str] = []
        for text in (reply["text"] for reply in replies):
            if text in earlier:
                found.append(True)
                continue
            if earlier:
                asked.append((tuple(earlier), text))
            else:
                found.append(False)
            earlier.append(text)
    judged = judge.repeats(asked)
    return found + [answer for answer in judged if answer is not None], sum(answer is None for answer in judged)
