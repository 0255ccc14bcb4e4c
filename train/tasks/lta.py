# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ego4D's long-term anticipation: the next 20 actions, in five candidates."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rapidfuzz.distance import Levenshtein

from videollm_mod.outputs import write_text
from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.labels import LabelFinder, read_labels
from videollm_mod.train.tasks.running import Runner


NUM_CANDIDATES, NUM_ACTIONS = 5, 20
SUBMISSION = "ego4d_lta_submission.json"
# A line that names an action, by the rule of VideoLLM-online's code: text after "3." or "Action 3.".
_LINE = re.compile(r"(?:\d+\.|[^\s]+\s\d+\.)\s*(.*)")
_NAMES = ("verb", "noun", "action")
_PAPERS = {
    "VideoLLM-online 7B-v1": (0.697, 0.698, 0.897),
    "VideoLLM-online 8B-v1+": (0.689, 0.671, 0.884),
    "VideoLLM-MoD": (0.689, 0.676, 0.884),
}
Action = tuple[int, int]


class Ego4DLta(Task):
    """
    Edit distances of 20 predicted actions from the true ones, for verbs, nouns and actions.

    Five beams give five candidates. Each line of a candidate is mapped to the nearest "verb noun" of the taxonomy.
    Lines beyond the 20th are cut, and a shorter candidate repeats its last action. `verb_ED@20` is the Levenshtein
    distance divided by 20, the least of the five candidates, and a mean over rows; verbs, nouns and actions each take
    their own best candidate. `verb_AUED` is the area under the distances of the first 1 to 20 actions.
    """

    papers = {
        model: {f"{name}_ED@20": figure for name, figure in zip(_NAMES, figures, strict=True)}
        for model, figures in _PAPERS.items()
    }
    no_reply: ClassVar[dict[str, Any] | None] = {"texts": [""] * NUM_CANDIDATES}
    official_note = (
        "The published scorer takes the taxonomy's first action for a reply without a line, and tells labels with the "
        "same words apart; the default counts the former as wrong. Its printed ED_19 is ED@20."
    )

    def check(self, about: dict[str, Any]) -> None:
        """Check that there is a taxonomy."""
        _finder(about)

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the replies of five beams."""
        return {"texts": runner.answer(row, num_beams=NUM_CANDIDATES, num_return=NUM_CANDIDATES)}

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
        official: bool = False,
    ) -> dict[str, float]:
        """Return `ED@20` and `AUED` of verb, noun and action. Rows without labels, as in the test split, have none."""
        finder = _finder(about)
        curves: dict[str, list[list[float]]] = {name: [] for name in _NAMES}
        for row, prediction in zip(rows, predictions, strict=True):
            truth = row["truth"]
            if truth.get("verb_label") is None:
                continue
            true = list(zip(truth["verb_label"], truth["noun_label"], strict=True))
            candidates = [finder.read(text, fallback=official) for text in prediction["texts"]]
            if not official:
                true = [finder.same(action) for action in true]
            for name, part in zip(_NAMES, (0, 1, None), strict=True):
                curves[name].append(edit_distances(_part(candidates, part), _part([true], part)[0]))
        means = {
            name: [sum(column) / len(column) for column in zip(*curve, strict=True)]
            for name, curve in curves.items()
            if curve
        }
        return {
            **{f"{name}_ED@{len(mean)}": mean[-1] for name, mean in means.items()},
            **{f"{name}_AUED": area_under(mean) for name, mean in means.items()},
        }

    def write_files(
        self,
        folder: Path,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],
    ) -> list[Path]:
        """Write the submission of rows without labels: five lists of 20 verbs and nouns for each."""
        finder = _finder(about)
        entries = {}
        for row, prediction in zip(rows, predictions, strict=True):
            truth = row["truth"]
            if truth.get("verb_label") is None:
                candidates = [finder.read(text, fallback=True) for text in prediction["texts"]]
                lists = {name: _part(candidates, part) for name, part in (("verb", 0), ("noun", 1))}
                entries[f"{truth['clip_uid']}_{truth['last_visible_action_idx']}"] = lists
        if not entries:
            return []
        write_text(folder / SUBMISSION, json.dumps(entries) + "\n")
        return [folder / SUBMISSION]


class ActionFinder:
    """
    Reads actions from replies.

    Args:
        verbs, nouns (sequence of `str`): Words of the taxonomy. The index of a word is its label.
    """

    def __init__(self, verbs: Sequence[str], nouns: Sequence[str]) -> None:
        # Of labels with the same words the last counts, as in VideoLLM-online's code.
        self.actions = {f"{verb} {noun}": (v, n) for v, verb in enumerate(verbs) for n, noun in enumerate(nouns)}
        self.first = self.actions[f"{verbs[0]} {nouns[0]}"]
        self.verbs, self.nouns = verbs, nouns
        self._finder = LabelFinder(list(self.actions))

    def read(self, text: str, *, fallback: bool) -> list[Action]:
        """
        Return the 20 actions of a reply as labels of verb and noun.

        Args:
            text (`str`): The reply, with an action a line after a number.
            fallback (`bool`): What a reply without such a line gives: the first verb with the first noun, or labels
                that are none.
        """
        lines = [
            found[1].lower().rstrip(".") for line in text.strip(" \n").split("\n") if (found := _LINE.search(line))
        ]
        actions = [self.actions[self._finder.find(line)] for line in lines[:NUM_ACTIONS]]
        last = actions[-1] if actions else self.first if fallback else (-1, -1)
        return actions + [last] * (NUM_ACTIONS - len(actions))

    def same(self, action: Action) -> Action:
        """Return the action that a reply with the words of `action` gives."""
        return self.actions[f"{self.verbs[action[0]]} {self.nouns[action[1]]}"]


def _finder(about: dict[str, Any]) -> ActionFinder:
    return ActionFinder(read_labels(about, "ego4d_lta_verb"), read_labels(about, "ego4d_lta_noun"))


def _part(candidates: Sequence[Sequence[Action]], part: int | None) -> list[list[Any]]:
    """Return the verbs (0), the nouns (1) or the actions of candidates."""
    return [[action if part is None else action[part] for action in actions] for actions in candidates]


def edit_distances(candidates: Sequence[Sequence[Any]], truth: Sequence[Any]) -> list[float]:
    """
    Return the edit distances of the first 1, 2, ... symbols, divided by their number: the least of the candidates.

    Args:
        candidates (sequence of sequences): Shape `(candidates, symbols)`. The published code has symbols first.
        truth (sequence): The true symbols, as many.

    Raises:
        `ValueError`: If a candidate has another length.
    """
    if any(len(candidate) != len(truth) for candidate in candidates):
        lengths = sorted({len(candidate) for candidate in candidates})
        raise ValueError(
            f"Candidates have {lengths} symbols, the truth {len(truth)}: the order is (candidates, symbols)."
        )
    return [
        min(Levenshtein.distance(candidate[:count], truth[:count]) for candidate in candidates) / count
        for count in range(1, len(truth) + 1)
    ]


def area_under(distances: Sequence[float]) -> float:
    """Return the area under edit distances at 1, 2, ... by the trapezoid rule, divided by the number of steps."""
    steps = [(one + two) / 2 for one, two in zip(distances, distances[1:], strict=False)]
    return sum(steps) / len(steps)
