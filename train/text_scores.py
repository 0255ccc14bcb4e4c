# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""BLEU, METEOR, ROUGE-L and CIDEr of captions, without Java and without downloads."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import nltk
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU


# Weight of recall in ROUGE-L, longest n-gram and width of the length penalty of CIDEr, as in COCO's captions code.
_BETA, _MAX_N, _SIGMA = 1.2, 4, 6.0
SCORES = ("meteor_stem", "rouge_l", "cider")
# WordNet is a download. Without it, words match if they or their stems are equal.
_NO_SYNONYMS = SimpleNamespace(synsets=lambda _word: [])
# Where `nltk.download("wordnet")` puts it.
_WORDNET = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")
_STEMMER = PorterStemmer()
# COCO's code adds this to the number of n-grams that match.
_NO_MATCH = 1e-15


def split_words(text: str) -> list[str]:
    """
    Return the words of a text in lower case, without punctuation.

    COCO's code calls Stanford's tokenizer, a Java program, which also splits contractions such as "don't" in two.
    """
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Callable[[str], list[str]] = split_words,
    names: Sequence[str] = SCORES,
) -> dict[str, list[float]]:
    """
    Score captions one by one. The score of a corpus is the mean of each list.

    - `meteor_stem`: METEOR of 2007 by NLTK: words match if they or their Porter stems are equal (alpha 0.9, beta 3,
      gamma 0.5). Papers report METEOR 1.5, a Java program with synonyms, paraphrases and other parameters. The two do
      not compare, hence the name.
    - `meteor_wordnet`: the same with synonyms, as NLTK computes it by default. It needs WordNet, see
      [`available_scores`], and is not METEOR 1.5 either.
    - `rouge_l`: ROUGE-L with beta 1.2, precision and recall each the largest over the references, as in COCO's code.
    - `cider`: CIDEr-D as in COCO's code: 1- to 4-grams, clipped, with a penalty for length, times 10. The document
      frequencies come from the references given here, and a corpus of one caption scores 0.

    Args:
        predictions (sequence of `str`): A caption for each item.
        references (sequence of sequences of `str`): One or more true captions for each item.
        tokenize (`Callable`, *optional*): Returns the words of a text. `str.split` is what FlowNar's code does.
        names (sequence of `str`, *optional*): The scores to compute. The default is all; METEOR takes the longest.

    Returns:
        `dict[str, list[float]]`: A score for each item, under each name.

    Raises:
        `LookupError`: If `meteor_wordnet` is asked for, and NLTK finds no WordNet.
    """
    said = [tokenize(text) for text in predictions]
    true = [[tokenize(text) for text in texts] for texts in references]
    pairs = list(zip(said, true, strict=True))
    compute: dict[str, Callable[[], list[float]]] = {
        "meteor_stem": lambda: [_meteor(words, others, _NO_SYNONYMS) for words, others in pairs],
        "meteor_wordnet": lambda: [_meteor(words, others, _read_wordnet()) for words, others in pairs],
        "rouge_l": lambda: [_rouge_l(words, others) for words, others in pairs],
        "cider": lambda: _cider(said, true),
    }
    return {name: compute[name]() for name in names}


def available_scores(names: Sequence[str] = SCORES) -> tuple[str, ...]:
    """
    Return names of scores, with `meteor_wordnet` after `meteor_stem` if NLTK finds WordNet on this machine:
    `python -m nltk.downloader wordnet` fetches it.
    """
    try:
        _find_wordnet()
    except LookupError:
        return tuple(names)
    return tuple(more for name in names for more in ((name, "meteor_wordnet") if name == "meteor_stem" else (name,)))


def score_bleu(
    predictions: Sequence[str], references: Sequence[str], *, tokenize: Callable[[str], list[str]] = split_words
) -> list[float]:
    """
    Return BLEU-1 to BLEU-4 of a corpus by sacrebleu: numbers of n-grams are summed over all captions.

    COCO's code gives the same, apart from a corpus without a caption of n words, for which this is 0.

    Args:
        predictions (sequence of `str`): A caption for each item.
        references (sequence of `str`): The true caption of each item.
        tokenize (`Callable`, *optional*): Returns the words of a text.
    """
    said, true = ([" ".join(tokenize(text)) for text in texts] for texts in (predictions, references))
    if not said:
        return [0.0] * _MAX_N
    options = {"tokenize": "none", "smooth_method": "floor", "smooth_value": _NO_MATCH, "force": True}
    scorers = [BLEU(max_ngram_order=n, **options) for n in range(1, _MAX_N + 1)]
    return [scorer.corpus_score(said, [true]).score / 100 for scorer in scorers]


def _find_wordnet() -> str:
    """Return the name of WordNet among NLTK's data, of the folder or of the archive."""
    try:
        nltk.data.find(_WORDNET[0])
    except LookupError:
        nltk.data.find(_WORDNET[1])
        return _WORDNET[1]
    return _WORDNET[0]


def _read_wordnet() -> WordNetCorpusReader:
    name = _find_wordnet()
    return _read_corpus(name, str(nltk.data.find(name)))


@cache
def _read_corpus(name: str, _path: str) -> WordNetCorpusReader:
    with warnings.catch_warnings():
        # It warns that it knows no language but English.
        warnings.simplefilter("ignore")
        return WordNetCorpusReader(nltk.data.find(name), None)


def _meteor(words: list[str], references: list[list[str]], synonyms: Any) -> float:
    options = {"stemmer": _STEMMER, "wordnet": synonyms}
    return max((single_meteor_score(other, words, **options) for other in references), default=0.0)


def _rouge_l(words: list[str], references: list[list[str]]) -> float:
    common = [(LCSseq.similarity(words, other), len(other)) for other in references]
    precision = max((count / max(len(words), 1) for count, _ in common), default=0.0)
    recall = max((count / max(length, 1) for count, length in common), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _cider(said: list[list[str]], true: list[list[list[str]]]) -> list[float]:
    grams = [[_count_grams(words) for words in texts] for texts in true]
    frequency = Counter(gram for texts in grams for gram in set().union(*texts))
    log_items = math.log(max(len(said), 1))

    def weigh(counts: Counter[tuple[str, ...]]) -> list[dict[tuple[str, ...], float]]:
        """Return TF-IDF weights by length of the n-gram."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_MAX_N)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (log_items - math.log(max(frequency[gram], 1)))
        return vectors

    scores = []
    for words, texts in zip(said, grams, strict=True):
        vectors = weigh(_count_grams(words))
        similar = [_similarity(vectors, weigh(text), _bigrams(words), text) for text in texts]
        scores.append(10 * sum(similar) / max(len(similar), 1))
    return scores


def _similarity(
    one: list[dict[tuple[str, ...], float]],
    other: list[dict[tuple[str, ...], float]],
    length: int,
    text: Counter[tuple[str, ...]],
) -> float:
    """Return the mean over n of the clipped cosine of two weighted texts, times the penalty for their lengths."""
    other_length = sum(count for gram, count in text.items() if len(gram) == 2)
    penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for mine, theirs in zip(one, other, strict=True):
        norm = math.hypot(*mine.values()) * math.hypot(*theirs.values())
        if norm:
            shared = mine.keys() & theirs.keys()
            total += sum(min(mine[gram], theirs[gram]) * theirs[gram] for gram in shared) / norm
    return penalty * total / _MAX_N


def _bigrams(words: list[str]) -> int:
    """Return the number of bigrams, which COCO's code takes for the length of a text."""
    return max(len(words) - 1, 0)


def _count_grams(words: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[begin : begin + n]) for n in range(1, _MAX_N + 1) for begin in range(len(words) - n + 1)
    )
