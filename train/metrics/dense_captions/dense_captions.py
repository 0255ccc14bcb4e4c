# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dense captions: which events were found, and how well their captions fit."""

from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np

from videollm_mod.train.arithmetic import mean
from videollm_mod.train.data.moments import window_iou
from videollm_mod.train.text_scores import available_scores, score_captions, score_corpora


_DESCRIPTION = """
`predictions`: for each video its captions, `{"start": seconds, "end": seconds, "text": words}`. `references`: for each
video the true captions of each annotator, in the same form, at least one. Returns:

- `precision`, `recall`: share of predicted captions that have an IoU above t with a true one, and of true captions
  that have one with a predicted one, for t = 0.3, 0.5, 0.7, 0.9 (`precision_0.3`, ...) and averaged. The better
  annotator counts, for each of the two. `f1` is of the averages.
- `meteor_1.5_stem`, `meteor_stem`, `cider`: a predicted caption is compared with each true one, of all annotators,
  with an IoU of at least t, or with a made-up word if there is none. METEOR 1.5 scores a video from the sums over its
  pairs, as densevid_eval does, and the other two are means over its pairs. Both are averaged over videos, then over t.
  The scores are those of `videollm_mod.train.text_scores`. Document frequencies of CIDEr are those of all pairs at t.
- `soda_c_stem`: F1 of IoU times METEOR under the best assignment that keeps the order of time, for the better
  annotator, averaged over videos. SODA takes the better annotator with `--multi_reference` only. By default, it merges
  the captions of all annotators, and PDVC's code averages the scores of annotators.

A video without predictions scores 0. The rules are those of densevid_eval and SODA. With `official=True` three of
their weaknesses are kept: CIDEr takes its document frequencies from one video, so that a single pair scores 0; SODA
leaves out videos without predictions, and gives METEOR the true caption for the predicted one. Published figures use
METEOR 1.5, a Java program, so that `meteor_stem`, `meteor_1.5_stem` and `soda_c_stem` do not compare with them. If
pycocoevalcap and Java are installed, `meteor_1.5` is that program's score. If NLTK finds WordNet, `meteor_wordnet` and
`meteor_1.5_wordnet` have synonyms.
"""
_CITATION = """Krishna et al., Dense-Captioning Events in Videos, arXiv 1705.00754. Fujita et al., SODA: Story Oriented
Dense Video Captioning Evaluation Framework, ECCV 2020."""
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
# What densevid_eval compares a caption with that has no true one.
_NO_CAPTION = "abc123!@#"


class DenseCaptions(evaluate.Metric):
    """Dense captions: which events were found, and how well their captions fit."""

    def _info(self) -> evaluate.MetricInfo:
        caption = {
            "start": datasets.Value("float64"),
            "end": datasets.Value("float64"),
            "text": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_DESCRIPTION,
            features=datasets.Features({"predictions": [caption], "references": [[caption]]}),
        )

    def _compute(
        self,
        predictions: list[list[dict[str, Any]]],
        references: list[list[list[dict[str, Any]]]],
        official: bool = False,
    ) -> dict[str, float]:
        if any(not any(annotators) for annotators in references):
            raise ValueError("A video of `references` has no caption.")
        videos = _pair_captions(predictions, references, official)
        scores = _detection(videos) | _meteors(videos)
        scores["cider"] = _cider(videos, official)
        scores["soda_c_stem"] = _soda(videos, official)
        return scores


class _Pair(NamedTuple):
    """A predicted and a true caption that are compared."""

    annotator: int
    predicted: int
    true: int
    iou: float
    words: tuple[str, str]
    soda_meteor: float


class _Video(NamedTuple):
    """A video's pairs of captions that overlap, each predicted caption with no true one, and the true ones' number."""

    pairs: list[_Pair]
    alone: list[_Pair]
    num_true: list[int]  # by annotator


def _pair_captions(predictions: list[Any], references: list[Any], official: bool) -> list[_Video]:
    found, videos = [], []
    for said, annotators in zip(predictions, references, strict=True):
        said = sorted(said, key=lambda caption: caption["start"])
        annotators = [sorted(true, key=lambda caption: caption["start"]) for true in annotators if true]
        alone = [_Pair(-1, i, -1, 0.0, (one["text"], _NO_CAPTION), 0.0) for i, one in enumerate(said)]
        for annotator, true in enumerate(annotators):
            for i, one in enumerate(said):
                for j, two in enumerate(true):
                    if iou := window_iou(one, two):
                        found.append((len(videos), annotator, i, j, iou, (one["text"], two["text"])))
        videos.append(_Video([], alone, [len(true) for true in annotators]))
    texts = [(two, one) if official else (one, two) for *_, (one, two) in found]
    for (video, *pair), meteor in zip(found, _score("meteor_stem", texts), strict=True):
        videos[video].pairs.append(_Pair(*pair, meteor))
    return videos


def _detection(videos: list[_Video]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for at in THRESHOLDS:
        precision, recall = [], []
        for video in videos:
            by_annotator = [
                [pair for pair in video.pairs if pair.annotator == annotator and pair.iou > at]
                for annotator in range(len(video.num_true))
            ]
            found = [len({pair.predicted for pair in pairs}) for pairs in by_annotator]
            covered = [len({pair.true for pair in pairs}) for pairs in by_annotator]
            precision.append(max(found) / max(len(video.alone), 1))
            recall.append(max(count / total for count, total in zip(covered, video.num_true, strict=True)))
        scores |= {f"precision_{at}": float(np.mean(precision)), f"recall_{at}": float(np.mean(recall))}
    for name in ("precision", "recall"):
        scores[name] = float(np.mean([scores[f"{name}_{at}"] for at in THRESHOLDS]))
    both = scores["precision"] + scores["recall"]
    scores["f1"] = 2 * scores["precision"] * scores["recall"] / both if both else 0.0
    return scores


def _compared(video: _Video, at: float) -> list[_Pair]:
    """Return the pairs with an IoU of at least `at`, and each predicted caption that is in none with no true one."""
    pairs = [pair for pair in video.pairs if pair.iou >= at]
    taken = {pair.predicted for pair in pairs}
    return [*pairs, *(pair for pair in video.alone if pair.predicted not in taken)]


def _meteors(videos: list[_Video]) -> dict[str, float]:
    names = available_scores(["meteor_stem", "meteor_1.5_stem"])
    compared = [_compared(video, at) for at in THRESHOLDS for video in videos]
    texts = [([pair.words[0] for pair in pairs], [[pair.words[1]] for pair in pairs]) for pairs in compared]
    scores = score_corpora(texts, names=names)
    return {name: float(np.mean([score[name] for score in scores])) for name in names}


def _cider(videos: list[_Video], official: bool) -> float:
    means = []
    for at in THRESHOLDS:
        texts = [[pair.words for pair in _compared(video, at)] for video in videos]
        if official:
            scores = [_score("cider", video) for video in texts]
        else:
            left = iter(_score("cider", [words for video in texts for words in video]))
            scores = [[next(left) for _ in video] for video in texts]
        means += [mean(video) for video in scores]
    return float(np.mean(means))


def _score(name: str, texts: list[tuple[str, str]]) -> list[float]:
    """Return a score of each predicted caption against a true one."""
    return score_captions([one for one, _ in texts], [[two] for _, two in texts], names=[name])[name]


def _soda(videos: list[_Video], official: bool) -> float:
    scores = []
    for video in videos:
        if not video.alone:
            scores += [] if official else [0.0]
            continue
        best = 0.0
        for annotator, num_true in enumerate(video.num_true):
            table = np.zeros((len(video.alone), num_true))
            for pair in video.pairs:
                if pair.annotator == annotator:
                    table[pair.predicted, pair.true] = pair.iou * pair.soda_meteor
            total = _best_in_order(table)
            best = max(best, 2 * total / (len(video.alone) + num_true))
        scores.append(best)
    return float(np.mean(scores)) if scores else 0.0


def _best_in_order(table: np.ndarray) -> float:
    """Return the largest sum of entries of which each is in a later row and a later column than the one before."""
    best = np.zeros(table.shape[1] + 1)
    for row in table:
        taken = best[:-1] + row
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], taken))
    return float(best[-1])
