# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""BLEU, METEOR, ROUGE-L and CIDEr of captions. Only METEOR with synonyms or paraphrases needs more than Python."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import nltk
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU

from videollm_mod.train.meteor import find_program, read_synonyms, run_program, score_meteor, score_with_program


# Weight of recall in ROUGE-L, longest n-gram and width of the length penalty of CIDEr, as in COCO's captions code.
_BETA, _MAX_N, _SIGMA = 1.2, 4, 6.0
SCORES = ("meteor_stem", "meteor_1.5_stem", "rouge_l", "cider")
# WordNet is a download. Without it, words match if they or their stems are equal.
_NO_SYNONYMS = SimpleNamespace(synsets=lambda _word: [])
# Where `nltk.download("wordnet")` puts it.
_WORDNET = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")
# Its words by sense, and its irregular forms.
_SENSES = ("index.sense", "adj.exc", "adv.exc", "noun.exc", "verb.exc")
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
    Score captions one by one. [`score_corpus`] scores them together.

    - `meteor_1.5`: METEOR 1.5, which papers report, by its own Java program: words match if they, their stems,
      synonyms or paraphrases are equal. It needs the package pycocoevalcap and Java, see [`available_scores`].
    - `meteor_1.5_stem`: the rules of METEOR 1.5 without synonyms and paraphrases (`videollm_mod.train.meteor`). It
      does not compare with published figures, hence the name.
    - `meteor_1.5_wordnet`: the same with synonyms. It needs WordNet.
    - `meteor_stem`: METEOR of 2007 by NLTK: words match if they or their Porter stems are equal (alpha 0.9, beta 3,
      gamma 0.5).
    - `meteor_wordnet`: the same with synonyms, as NLTK computes it by default.
    - `rouge_l`: ROUGE-L with beta 1.2, precision and recall each the largest over the references, as in COCO's code.
    - `cider`: CIDEr-D as in COCO's code: 1- to 4-grams, clipped, with a penalty for length, times 10. The document
      frequencies come from the references given here, and a corpus of one caption scores 0.

    Args:
        predictions (sequence of `str`): A caption for each item.
        references (sequence of sequences of `str`): One or more true captions for each item.
        tokenize (`Callable`, *optional*): Returns the words of a text. `str.split` is what FlowNar's code does. METEOR
            1.5 splits these words again by its own rules.
        names (sequence of `str`, *optional*): The scores to compute. The default needs Python only; METEOR takes the
            longest.

    Returns:
        `dict[str, list[float]]`: A score for each item, under each name.

    Raises:
        `LookupError`: If a score with `wordnet` in its name is asked for, and NLTK finds no WordNet.
        `ImportError` or `RuntimeError`: If `meteor_1.5` is asked for, and the package or Java is missing, or its
            program stops.
    """
    return {name: each for name, (_, each) in _score(predictions, references, tokenize, names).items()}


def score_corpus(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Callable[[str], list[str]] = split_words,
    names: Sequence[str] = SCORES,
) -> dict[str, float]:
    """
    Score captions together: the mean over captions, and METEOR 1.5 from the sums of all words, matches and chunks, as
    its program and COCO's code have it. See [`score_captions`].
    """
    [scores] = score_corpora([(predictions, references)], tokenize=tokenize, names=names)
    return scores


def score_corpora(
    corpora: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    *,
    tokenize: Callable[[str], list[str]] = split_words,
    names: Sequence[str] = SCORES,
) -> list[dict[str, float]]:
    """Score each of several corpora as [`score_corpus`] does. The program of METEOR 1.5 starts once for all."""
    with run_program() if "meteor_1.5" in names else nullcontext(score_with_program) as program:
        found = [_score(*corpus, tokenize, names, program) for corpus in corpora]
    return [{name: score for name, (score, _) in scores.items()} for scores in found]


def _score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: Callable[[str], list[str]],
    names: Sequence[str],
    program: Callable[..., tuple[float, list[float]]] = score_with_program,
) -> dict[str, tuple[float, list[float]]]:
    """Return the score of all captions together and of each, under each name."""
    said = [tokenize(text) for text in predictions]
    true = [[tokenize(text) for text in texts] for texts in references]
    pairs = list(zip(said, true, strict=True))
    plain = [" ".join(words) for words in said], [[" ".join(words) for words in texts] for texts in true]
    together: dict[str, Callable[[], tuple[float, list[float]]]] = {
        "meteor_1.5": lambda: program(*plain),
        "meteor_1.5_stem": lambda: score_meteor(*plain),
        "meteor_1.5_wordnet": lambda: score_meteor(*plain, find_synsets=_read_synonyms()),
    }
    alone: dict[str, Callable[[], list[float]]] = {
        "meteor_stem": lambda: [_meteor(words, others, _NO_SYNONYMS) for words, others in pairs],
        "meteor_wordnet": lambda: [_meteor(words, others, _read_wordnet()) for words, others in pairs],
        "rouge_l": lambda: [_rouge_l(words, others) for words, others in pairs],
        "cider": lambda: _cider(said, true),
    }
    scores = {}
    for name in names:
        if name in together:
            scores[name] = together[name]()
        else:
            each = alone[name]()
            scores[name] = (sum(each) / max(len(each), 1), each)
    return scores


def available_scores(names: Sequence[str] = SCORES) -> tuple[str, ...]:
    """
    Return names of scores with those that this machine can compute beside them: after `meteor_stem` and
    `meteor_1.5_stem` the same with synonyms if NLTK finds WordNet (`python -m nltk.downloader wordnet` fetches it),
    and then `meteor_1.5` if pycocoevalcap and Java are installed.
    """
    more: dict[str, list[str]] = {name: [] for name in names}
    if _has_wordnet():
        for name in ("meteor_stem", "meteor_1.5_stem"):
            more.get(name, []).append(name.replace("stem", "wordnet"))
    if find_program() is None:
        more.get("meteor_1.5_stem", []).append("meteor_1.5")
    return tuple(found for name in names for found in (name, *more[name]))


def score_bleu(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """
    Return BLEU-1 to BLEU-4 of a corpus by sacrebleu: numbers of n-grams are summed over all captions.

    COCO's code gives the same, apart from a corpus without a caption of n words, for which this is 0.

    Args:
        predictions (sequence of `str`): A caption for each item.
        references (sequence of `str`): The true caption of each item.
    """
    said, true = ([" ".join(split_words(text)) for text in texts] for texts in (predictions, references))
    if not said:
        return [0.0] * _MAX_N
    options = {"tokenize": "none", "smooth_method": "floor", "smooth_value": _NO_MATCH, "force": True}
    scorers = [BLEU(max_ngram_order=n, **options) for n in range(1, _MAX_N + 1)]
    return [scorer.corpus_score(said, [true]).score / 100 for scorer in scorers]


def _has_wordnet() -> bool:
    try:
        _find_wordnet()
    except LookupError:
        return False
    return True


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


def _read_synonyms() -> Callable[[str], frozenset[int]]:
    name = _find_wordnet()
    return _read_senses(name, str(nltk.data.find(name)))


@cache
def _read_senses(name: str, path: str) -> Callable[[str], frozenset[int]]:
    reader = _read_corpus(name, path)
    with ExitStack() as stack:
        senses, *exceptions = (stack.enter_context(reader.open(file)) for file in _SENSES)
        return read_synonyms(senses, exceptions)


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
