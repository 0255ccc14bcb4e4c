# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Vript-Hard: questions with options about a scene, the order of three scenes, descriptions (arXiv 2406.06040)."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from videollm_mod.train.content_words import check_content_words
from videollm_mod.train.data.vript_hard import SCENES
from videollm_mod.train.judging import check_judge, find_judge
from videollm_mod.train.tasks.choices import read_letter
from videollm_mod.train.tasks.replies import GreedyReply
from videollm_mod.train.teacher_forcing import evaluate_metric


# The best level that a judge gives.
_MOST = 4


class Choice(GreedyReply):
    """`accuracy`: the share of replies that choose the right option, by its letter or text (see [`read_letter`])."""

    no_reply: ClassVar[dict[str, Any] | None] = {"text": ""}
    official_note = 'The published scorer takes the first capital letter in brackets, "(B)", and nothing else.'
    scored_keys = ("options", "answer")

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return `accuracy`."""
        right = []
        for row, prediction in zip(rows, predictions, strict=True):
            if official:
                found = re.search(r"\(([A-Z])\)", prediction["text"])
                chosen = found[1] if found else None
            else:
                chosen = read_letter(prediction["text"], row["truth"]["options"])
            right.append(chosen == row["truth"]["answer"])
        return {"accuracy": sum(right) / len(right)}


class OpenAnswer(GreedyReply):
    """
    `grade_<judge>`: how well the replies answer a question without options, from 0 to 1. A judge gives each a level
    of 0 to 4. A reply that it cannot grade counts 0, and `ungraded_<judge>` is the share of these.

    The published judge is GPT-4-turbo with another prompt, so its grades do not compare with these.
    """

    no_reply: ClassVar[dict[str, Any] | None] = {"text": ""}
    has_published_scorer = False
    official_note = "The published scorer is GPT-4-turbo with a prompt of its own: these grades do not compare."
    scored_keys = ("question", "open_answer")

    def check(self, about: dict[str, Any]) -> None:  # noqa: ARG002
        """Check that the judge replies."""
        check_judge(self.judge)

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return the mean grade, and the share without one."""
        judge, pairs = find_judge(self.judge), zip(rows, predictions, strict=True)
        items = [(row["truth"]["question"], row["truth"]["open_answer"], said["text"]) for row, said in pairs]
        levels = judge.levels(items, _MOST)
        return {
            f"grade_{judge.name}": sum(level or 0 for level in levels) / len(levels) / _MOST,
            f"ungraded_{judge.name}": levels.count(None) / len(levels),
        }


class Order(GreedyReply):
    """
    `order@1`, `order@2` and `order@3`: the share of replies with at least 1, 2 or 3 of three scenes in their place.

    A reply has an order if each letter stands alone in it. Their first places count.
    """

    no_reply: ClassVar[dict[str, Any] | None] = {"text": ""}
    official_note = 'The published scorer takes any three capital letters if a reply has no "Scene (A)".'
    scored_keys = ("order",)

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the shares."""
        read = read_order_officially if official else read_order
        hits = [
            sum(one == two for one, two in zip(read(prediction["text"]), row["truth"]["order"], strict=False))
            for row, prediction in zip(rows, predictions, strict=True)
        ]
        return {f"order@{least}": sum(count >= least for count in hits) / len(hits) for least in (1, 2, 3)}


class Description(GreedyReply):
    """
    How much of a description is true, and how much of the truth it names: `precision`, `recall` and `f1` of the metric
    `described_words`. It needs spaCy with a large English model, and a sentence encoder.
    """

    no_reply: ClassVar[dict[str, Any] | None] = {"text": ""}
    official_note = "The published scorer also counts the reply's words for recall, which may pass 1."
    scored_keys = ("content",)

    def check(self, about: dict[str, Any]) -> None:  # noqa: ARG002
        """Check that both models are there."""
        check_content_words()

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the scores of the metric `described_words`."""
        return evaluate_metric("described_words").compute(
            predictions=[prediction["text"] for prediction in predictions],
            references=[row["truth"]["content"] for row in rows],
            rule="published" if official else "both",
        )


def read_order(reply: str) -> list[str]:
    """Return the scenes in the order of a reply, or an empty list if one of them is not named."""
    order = list(dict.fromkeys(re.findall(rf"(?<!\w)[{SCENES}](?![\w'])", reply)))
    return order if len(order) == len(SCENES) else []


def read_order_officially(reply: str) -> list[str]:
    """Return the scenes by the published rule: after "Scene (", or the first capital letters. Less than 3 are none."""
    order = re.findall(r"Scene \(([A-Z])\)", reply)[:3]
    order = order if len(order) == 3 else re.findall(r"[A-Z]", reply)[:3]
    return order if len(order) == 3 else []
