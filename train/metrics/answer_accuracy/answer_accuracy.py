# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Share of questions answered right, word for word."""

import datasets
import evaluate


_DESCRIPTION = """
`predictions` and `references`: answers given (empty where none came) and right answers. Returns `answer_accuracy`, the
share that agree but for case, spaces and a full stop.
"""
_CITATION = """"""


class AnswerAccuracy(evaluate.Metric):
    """Share of questions answered right, word for word."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right = [_words(one) == _words(two) for one, two in zip(predictions, references, strict=True)]
        return {"answer_accuracy": sum(right) / len(right)}


def _words(text: str) -> list[str]:
    return text.lower().rstrip(". ").split()
