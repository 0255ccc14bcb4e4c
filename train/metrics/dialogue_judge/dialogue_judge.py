# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""ProAssist's grades of complete dialogues by a language model."""

from typing import Any

import datasets
import evaluate

from videollm_mod.train.arithmetic import mean
from videollm_mod.train.endpoint_judge import ASPECTS, EndpointJudge


_DESCRIPTION = """
The language model as the judge in ProAssist's evaluation (`llm_eval` in `stream_evaluator.py` and `llm_eval.py` of
pro-assist/ProAssist). `predictions` and `references`: for each video a list of `{"time": seconds, "role": "user" or
"assistant", "text": words}`, with what the user says in both.

The judge reads the true dialogue and the model's, a line a message: "[12.0s] User: ...". It grades each aspect from 1
(very poor) to 5 (excellent), three times, with that code's prompt and sampling (temperature 0.5, top-p 0.95).

Returns `judge_correctness`, `judge_promptness`, `judge_efficiency` and `judge_overall`: the mean grade of a video,
then over videos, 0 if no video has one; and `judge_ungraded`, the number of videos without any grade, which are left
out.

Option: `judge`, a `videollm_mod.train.endpoint_judge.EndpointJudge`. The script `eval_llm.py` of that repository names
Llama-3.1-70B-Instruct in 8 bits. Figures of two judges do not compare.

Differences from that code: a reply has at most 2048 tokens instead of 128K; the last JSON object of a reply counts
instead of the first after "---"; and grades that are no numbers from 1 to 5 do not count.
"""
_CITATION = """"""


class DialogueJudge(evaluate.Metric):
    """ProAssist's grades of complete dialogues by a language model."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        message = {"time": datasets.Value("float64"), "role": text, "text": text}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": [message], "references": [message]}),
        )

    def _compute(
        self,
        predictions: list[list[dict[str, Any]]],
        references: list[list[dict[str, Any]]],
        judge: EndpointJudge,
    ) -> dict[str, float]:
        items = [(_write(true), _write(said)) for said, true in zip(predictions, references, strict=True)]
        grades = judge.grade_dialogues(items)
        scores = {f"judge_{name}": mean([g[name] for g in grades if g[name] is not None]) for name in ASPECTS}
        return scores | {"judge_ungraded": sum(all(value is None for value in g.values()) for g in grades)}


def _write(messages: list[dict[str, Any]]) -> str:
    """Return a dialogue as text, in order of time. Messages without words are left out."""
    ordered = sorted(messages, key=lambda message: message["time"])
    lines = [(round(m["time"], 2), m["role"].capitalize(), m["text"]) for m in ordered if m["text"].strip()]
    return "".join(f"[{time}s] {role}: {text}\n" for time, role, text in lines)
