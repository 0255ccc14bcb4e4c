# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""ProAssist's measures: replies matched with true ones, those that are missing, and those too many."""

import math
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
from scipy.optimize import linear_sum_assignment

from videollm_mod.train.arithmetic import mean
from videollm_mod.train.judging import find_similarity
from videollm_mod.train.text_scores import available_scores, score_bleu, score_corpus, split_words


_DESCRIPTION = """
The measures of ProAssist's streaming evaluation (`pred_match.py` and `stream_evaluator.py` of pro-assist/ProAssist).
`predictions` and `references`: for each video a list of `{"time": seconds, "text": words}`.

Times are rounded to frames at `fps`. Each reply is matched with one frame from `before` seconds earlier to `after`
seconds later, at the least total cost: 1 - |similarity| at a frame with a true reply and 1 at a silent one, plus 0.3
(distance / window)^1.5, where the window is the larger of `before` and `after`. A reply at a silent frame is
redundant, a true reply that no reply took is missing, and a match is right if its similarity is above 0.5.

Returns, over all videos together and with the name of the similarity appended (`missing_rate_token_f1`):
`missing_rate` = missing / (matched + missing), `redundant_rate` = redundant / (matched + redundant), `match_precision`
= right / (matched + redundant), `match_recall` = right / (matched + missing), `match_f1`, `jaccard_index` = right /
(matched + missing + redundant), `match_cost`, the mean over matched replies, and `match_delay`, the mean distance in
seconds of right ones. `match_bleu_1` to `match_bleu_4`, `match_meteor_stem`, `match_meteor_1.5_stem` and `match_cider`
compare the texts of right matches, over all videos together; without any they are 0. That code also prints each of
these times `jaccard_index`.

Options: `similarity`: "sentence" (the published one), "token_f1" or "exact"; `before` and `after` (2.5 and 2.5 s,
which is published for narration; for dialogues the paper's code has about a quarter and a half of the mean time
between replies); `fps` (2.0).

Differences from that code: replies at one frame are one reply; and a match may cost exactly 0, which its sparse solver
takes for no match. A test compares the two on random dialogues. Words are those of `split_words`, where that code
calls Stanford's tokenizer. METEOR of that code is `match_meteor_1.5`, which is there if pycocoevalcap and Java are
installed. With WordNet among NLTK's data there are also `match_meteor_wordnet` and `match_meteor_1.5_wordnet`.

ProAssist's language model as the judge is the metric `dialogue_judge`.
"""
_CITATION = """"""
_FACTOR, _POWER, _RIGHT = 0.3, 1.5, 0.5


class _Matched(NamedTuple):
    """A reply that is matched with a true one: its cost, their similarity, distance in frames, and both texts."""

    cost: float
    similarity: float
    distance: int
    said: str
    true: str


class DialogueMatching(evaluate.Metric):
    """ProAssist's measures: replies matched with true ones, those that are missing, and those too many."""

    def _info(self) -> evaluate.MetricInfo:
        reply = {"time": datasets.Value("float64"), "text": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": [reply], "references": [reply]}),
        )

    def _compute(
        self,
        predictions: list[list[dict[str, Any]]],
        references: list[list[dict[str, Any]]],
        similarity: str = "sentence",
        before: float = 2.5,
        after: float = 2.5,
        fps: float = 2.0,
    ) -> dict[str, float]:
        window = (int(before * fps), int(after * fps))
        if min(window) < 0 or max(window) < 1:
            raise ValueError(f"The window must reach at least a frame, got {before} s before and {after} s after.")
        videos = [
            (_by_frame(said, fps), _by_frame(true, fps)) for said, true in zip(predictions, references, strict=True)
        ]
        nearby = [_nearby(said, true, window) for said, true in videos]
        texts = [(said[i], true[j]) for (said, true), pairs in zip(videos, nearby, strict=True) for i, j in pairs]
        alike = dict(zip(texts, find_similarity(similarity)(texts), strict=True))
        matched, missing, redundant = [], 0, 0
        for (said, true), pairs in zip(videos, nearby, strict=True):
            similar = {(i, j): abs(alike[said[i], true[j]]) for i, j in pairs}
            found = _match(said, true, similar, window)
            matched += found
            missing, redundant = missing + len(true) - len(found), redundant + len(said) - len(found)
        return {f"{name}_{similarity}": value for name, value in _rates(matched, missing, redundant, fps).items()}


def _by_frame(replies: list[dict[str, Any]], fps: float) -> dict[int, str]:
    """Return the text at each frame that has one, in order."""
    texts: dict[int, str] = {}
    for reply in sorted(replies, key=lambda reply: reply["time"]):
        frame = max(math.floor(reply["time"] * fps + 0.5), 0)
        if reply["text"].strip():
            texts[frame] = f"{texts[frame]} {reply['text']}" if frame in texts else reply["text"]
    return texts


def _nearby(said: dict[int, str], true: dict[int, str], window: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the frames of replies and of true replies in their window."""
    return [(i, j) for i in said for j in true if -window[0] <= j - i <= window[1]]


def _match(
    said: dict[int, str], true: dict[int, str], similar: dict[tuple[int, int], float], window: tuple[int, int]
) -> list[_Matched]:
    """Return each reply that is matched with a true one."""
    if not said:
        return []
    frames = sorted({j for i in said for j in range(max(i - window[0], 0), i + window[1] + 1)})
    rows, column = np.array(list(said)), {frame: index for index, frame in enumerate(frames)}
    distance = np.array(frames)[None, :] - rows[:, None]
    cost = 1 + _FACTOR * (np.abs(distance) / max(window)) ** _POWER
    for row, i in enumerate(said):
        for j in (j for j in true if (i, j) in similar):
            cost[row, column[j]] -= similar[i, j]
    cost[(distance < -window[0]) | (distance > window[1])] = np.inf
    found = []
    for row, index in zip(*linear_sum_assignment(cost), strict=True):
        pair = (int(rows[row]), frames[index])
        if pair in similar:
            texts = said[pair[0]], true[pair[1]]
            found.append(_Matched(float(cost[row, index]), similar[pair], abs(pair[1] - pair[0]), *texts))
    return found


def _rates(matched: list[_Matched], missing: int, redundant: int, fps: float) -> dict[str, float]:
    right = [match for match in matched if match.similarity > _RIGHT]
    total = len(matched)
    precision, recall = len(right) / max(total + redundant, 1), len(right) / max(total + missing, 1)
    return {
        "missing_rate": missing / max(total + missing, 1),
        "redundant_rate": redundant / max(total + redundant, 1),
        "match_precision": precision,
        "match_recall": recall,
        "match_f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "jaccard_index": len(right) / max(total + missing + redundant, 1),
        "match_cost": mean([match.cost for match in matched]),
        "match_delay": mean([match.distance / fps for match in right]),
        **_texts(right),
    }


def _texts(right: list[_Matched]) -> dict[str, float]:
    """Compare the texts of right matches. True texts without a word are left out, as in that code."""
    compared = [match for match in right if split_words(match.true)]
    said, true = [match.said for match in compared], [match.true for match in compared]
    bleu = {f"match_bleu_{n}": score for n, score in enumerate(score_bleu(said, true), 1)}
    names = available_scores(("meteor_stem", "meteor_1.5_stem", "cider"))
    captions = score_corpus(said, [[text] for text in true], names=names)
    return bleu | {f"match_{name}": score for name, score in captions.items()}
