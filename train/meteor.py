# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""METEOR 1.5 (Denkowski and Lavie, 2014) for English: the published Java program, and its rules in Python."""

import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from nltk.stem.snowball import SnowballStemmer


# Weight of recall, power and weight of the fragments, weight of content words: the program's defaults for English.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
EXACT, STEM, SYNONYM = 1.0, 0.6, 0.8
_BEAM = 40
# Words that carry little meaning, as the program lists them. Punctuation is among them.
_LITTLE = (
    "the , . to of and a in that for \" is on 's it with was as said at he by be from have has are his but an this "
    "not i will ’ they ) -rrb- ( -lrb- who their had we which were been more or s its would about new one after "
    "you : also up when there than $ all out her people she year two - can if last first “ over other ” into some "
    "what so -- no time years could ? 't — '"
)
_FUNCTION_WORDS = frozenset(_LITTLE.split())
# What may end in a full stop within a sentence. The second list does so before a number only.
_SHORT = (
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z Adj Adm Adv Asst Bart Bldg Brig Bros Capt Cmdr Col Comdr Con "
    "Corp Cpl DR Dr Drs Ens Gen Gov Hon Hr Hosp Insp Lt MM MR MRS MS Maj Messrs Mlle Mme Mr Mrs Ms Msgr Op Ord Pfc Ph "
    "Prof Pvt Rep Reps Res Rev Rt Sen Sens Sfc Sgt Sr St Supt Surg v vs i.e rev e.g Nos Nr"
)
_ABBREVIATIONS = frozenset(_SHORT.split())
_BEFORE_NUMBERS = frozenset({"No", "Art", "pp"})
_ALPHA = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ӿԀ-ԧꙀ-ꙮꙿ-ꚗᴀ-ᵿ"
_SPACES = re.compile("[\t\n\r\f \u2000-\u200a\u202f\u205f\u3000\u00a0]+")


# ------------------------------------------------------------------------------------------------------- the program


def find_program() -> str | None:
    """
    Return what is missing to run METEOR 1.5 itself, in one line, or `None` if nothing is.

    The program is a jar with a table of paraphrases. The package pycocoevalcap brings both.
    """
    if not _has_module("pycocoevalcap.meteor.meteor"):
        return 'METEOR 1.5 needs the package pycocoevalcap: run `pip install -e ".[meteor]"` in the checkout.'
    if shutil.which("java") is None:
        return "METEOR 1.5 is a Java program, and there is no `java` on the path: install a Java runtime."
    return None


def score_with_program(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """
    Score texts by the published program, as pycocoevalcap runs it (`-l en -norm`): with stems, synonyms and
    paraphrases. Each call starts the program, which first reads its paraphrases: seconds, and up to 2 GB of memory.

    Args:
        predictions (sequence of `str`): A text for each item.
        references (sequence of sequences of `str`): One or more true texts for each item.

    Returns:
        `tuple[float, list[float]]`: The score of all texts together, from their sums of words, matches and chunks, and
        the score of each text.

    Raises:
        `ImportError`: If the package or Java is missing. The message says which.
        `RuntimeError`: If the program stops, for example because memory is short.
    """
    with run_program() as score:
        return score(predictions, references)


@contextmanager
def run_program() -> Iterator[Callable[[Sequence[str], Sequence[Sequence[str]]], tuple[float, list[float]]]]:
    """Yield a function that does what [`score_with_program`] does, as often as it is called, by one start."""
    if missing := find_program():
        raise ImportError(missing)
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        if not predictions:
            return 0.0, []
        true = {index: [_one_line(text) for text in texts] for index, texts in enumerate(references)}
        said = {index: [_one_line(text)] for index, text in enumerate(predictions)}
        try:
            return program.compute_score(true, said)
        except (OSError, ValueError):
            program.meteor_p.kill()
            told = program.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"METEOR's program stopped: {told[0] if told else 'it said nothing'}.") from None

    try:
        yield score
    finally:
        if program.lock.locked():
            # The package locks and does not unlock if an error comes between, and its own clean-up would wait.
            program.lock.release()


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _one_line(text: str) -> str:
    """Return a text that the program's line of `|||` can hold."""
    return " ".join(text.replace("|||", " ").split())


# ----------------------------------------------------------------------------------------------------------- its rules


@dataclass(frozen=True)
class Counts:
    """
    What METEOR counts in a text and its true text. Counts of several texts add up to those of all of them.

    Args:
        words (`tuple[int, int]`): Words of the text and of the true text.
        weights (`tuple[float, float]`): Their sums of weights: content words weigh more than function words.
        matched (`tuple[float, float]`): The same of words that match, times the weight of the match.
        matches (`int`): Words that match.
        chunks (`int`): Runs of matches in the order of both texts.
    """

    words: tuple[int, int] = (0, 0)
    weights: tuple[float, float] = (0.0, 0.0)
    matched: tuple[float, float] = (0.0, 0.0)
    matches: int = 0
    chunks: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = ((self.words, other.words), (self.weights, other.weights), (self.matched, other.matched))
        sums = ((one[0] + two[0], one[1] + two[1]) for one, two in pairs)
        return Counts(*sums, self.matches + other.matches, self.chunks + other.chunks)

    @property
    def score(self) -> float:
        """METEOR: the weighted mean of precision and recall, less a penalty for fragments."""
        if not self.matches:
            return 0.0
        precision, recall = (part / whole for part, whole in zip(self.matched, self.weights, strict=True))
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        if self.words == (self.matches, self.matches) and self.chunks == 1:
            return mean
        return mean * (1 - GAMMA * (self.chunks / self.matches) ** BETA)


def score_meteor(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    find_synsets: Callable[[str], frozenset[int]] | None = None,
) -> tuple[float, list[float]]:
    """
    Score texts by the rules of METEOR 1.5 without its paraphrases: its words, function words, stems, weights,
    fragments and search for the best alignment. Without `find_synsets` there are no synonyms either.

    The program limited to the same matchers (`-m "exact stem"`, or with "synonym") gave the same scores. NLTK's
    stemmer differs in 16 of the 83,556 words that were compared, such as "realization".

    Args:
        predictions (sequence of `str`): A text for each item.
        references (sequence of sequences of `str`): True texts for each item. The one with the best score counts.
        find_synsets (`Callable`, *optional*): Returns the sets of synonyms of a word. See [`read_synonyms`].

    Returns:
        `tuple[float, list[float]]`: As of [`score_with_program`].
    """
    best = []
    for text, others in zip(predictions, references, strict=True):
        said = split_meteor(text)
        counts = (_count(said, split_meteor(other), find_synsets) for other in others)
        best.append(max(counts, key=lambda one: one.score, default=Counts()))
    return sum(best, Counts()).score, [counts.score for counts in best]


def split_meteor(text: str) -> list[str]:
    """
    Return the words of a text as the program splits them with `-norm`, in lower case. Punctuation stays.

    A word with a hyphen becomes two, "don't" becomes "don 't", and "U.S." becomes "us".
    """
    text = re.sub(rf"([^0-9{_ALPHA}\s.'`,\-‘’])", r" \1 ", f" {text} ", flags=re.ASCII)
    text = re.sub(r"\.(\.+)", r" DOTMULTI\1", text)
    while "DOTMULTI." in text:
        text = re.sub(r"DOTMULTI\.([^.])", r"DOTDOTMULTI \1", text).replace("DOTMULTI.", "DOTDOTMULTI")
    for before, after in (("[^0-9]", "[^0-9]"), ("[0-9]", "[^0-9]"), ("[^0-9]", "[0-9]")):
        text = re.sub(f"({before}),({after})", r"\1 , \2", text)
    text = re.sub("[“”]|''", ' " ', re.sub("[`‘’]", "'", text)).replace("–", "-").replace("--", "-")
    text = re.sub(rf"([0-9{_ALPHA}.])-([0-9{_ALPHA}])", r"\1 \2", text)
    for before, after, apart in (
        (f"[^{_ALPHA}]", f"[^{_ALPHA}]", r"\1 ' \2"),
        (f"[^{_ALPHA}0-9]", f"[{_ALPHA}]", r"\1 ' \2"),
        (f"[{_ALPHA}]", f"[^{_ALPHA}]", r"\1 ' \2"),
        (f"[{_ALPHA}]", f"[{_ALPHA}]", r"\1 '\2"),
        ("[0-9]", "s", r"\1 '\2"),
    ):
        text = re.sub(f"({before})'({after})", apart, text)
    words = re.split("[ \t\n\r\f]+", text.strip(" \t\n\r\f"))
    text = " ".join(_split_stop(word, after) for word, after in zip(words, [*words[1:], ""], strict=True))
    while "DOTDOTMULTI" in text:
        text = text.replace("DOTDOTMULTI", "DOTMULTI.")
    return _SPACES.sub(" ", text.replace("DOTMULTI", ".")).lower().split()


def read_synonyms(senses: Iterable[str], exceptions: Iterable[Iterable[str]]) -> Callable[[str], frozenset[int]]:
    """
    Return a function that finds the sets of synonyms of a word and of its base form, as the program does.

    Args:
        senses (iterable of `str`): The lines of WordNet's `index.sense`.
        exceptions (iterable of iterables of `str`): The lines of `adj.exc`, `adv.exc`, `noun.exc` and `verb.exc`.
    """
    sets: dict[str, set[int]] = {}
    for line in senses:
        key, number, *_ = line.split()
        sets.setdefault(key.partition("%")[0], set()).add(int(number))
    bases: dict[str, list[str]] = {}
    for line in (line for lines in exceptions for line in lines):
        form, *words = line.split()
        bases.setdefault(form, []).extend(words)

    @cache
    def find(word: str) -> frozenset[int]:
        forms = bases[word] if word in bases else [_base(word, sets)]
        return frozenset().union(*(sets.get(form, ()) for form in (word, *forms)))

    return find


# A suffix, and what takes its place: of nouns, of verbs and of adjectives.
_SUFFIXES = (
    *(("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z")),
    *(("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    *(("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    *(("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
)


def _base(word: str, known: Mapping[str, Any]) -> str:
    if word.endswith("ss") or len(word) <= 2:
        return word
    forms = (word.removesuffix(suffix) + instead for suffix, instead in _SUFFIXES if word.endswith(suffix))
    return next((form for form in forms if form in known), "")


def _split_stop(word: str, after: str) -> str:
    """Return a word with its full stop apart, unless the stop belongs to it."""
    if len(word) < 2 or not word.endswith("."):
        return word
    stem = word[:-1]
    if "." in stem and re.search(f"[{_ALPHA}]", stem):
        return word.replace(".", "")
    stays = stem in _ABBREVIATIONS or re.match("[a-z]", after) or (stem in _BEFORE_NUMBERS and after[:1].isdigit())
    return word if stays else f"{stem} ."


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@cache
def _stemmer() -> SnowballStemmer:
    return SnowballStemmer("english")


@dataclass
class _Path:
    """
    A part of an alignment, from the first true word on.

    Args:
        matches (`dict[int, tuple[int, float]]`): The word of the prediction, and the weight, by true word.
        used (`frozenset[int]`): Words of the prediction that are taken.
        exact (`int`): Number of exact matches. Only these count in the program's search, which rounds 0.5 down.
        chunks (`int`): Runs of matches that are complete.
        last (`int`): The word after the last match, or -1 after a gap.
        distance (`int`): How far apart matches are, as the program sums it.
    """

    matches: dict[int, tuple[int, float]] = field(default_factory=dict)
    used: frozenset[int] = frozenset()
    exact: int = 0
    chunks: int = 0
    last: int = -1
    distance: int = 0

    def take(self, said: int, weight: float) -> None:
        self.exact += weight == EXACT
        self.chunks += self.last not in (-1, said)
        self.last = said + 1

    def skip(self) -> None:
        self.chunks += self.last != -1
        self.last = -1

    def rank(self) -> tuple[int, int, int]:
        return -self.exact, self.chunks, self.distance


def _find_matches(
    said: list[str], true: list[str], find_synsets: Callable[[str], frozenset[int]] | None
) -> list[list[tuple[int, float]]]:
    """Return the possible matches of each true word, by matcher: the word of the prediction, and the weight."""
    kinds: list[tuple[float, Callable[[str, str], bool]]] = [(EXACT, lambda one, two: one == two)]
    if said != true:
        kinds.append((STEM, lambda one, two: one != two and _stem(one) == _stem(two)))
    if said != true and find_synsets is not None:
        kinds.append((SYNONYM, lambda one, two: one != two and not find_synsets(one).isdisjoint(find_synsets(two))))
    return [
        [(index, weight) for weight, same in kinds for index, other in enumerate(said) if same(other, word)]
        for word in true
    ]


def _align(
    said: list[str], true: list[str], find_synsets: Callable[[str], frozenset[int]] | None
) -> dict[int, tuple[int, float]]:
    """Return the best alignment by the program's beam search: for each true word that matches, word and weight."""
    found = _find_matches(said, true, find_synsets)
    rivals = Counter(index for matches in found for index, _ in matches)
    # A match with no other at either word is certain.
    alone = {place: matches[0] for place, matches in enumerate(found) if len(matches) == 1}
    certain = {place: match for place, match in alone.items() if rivals[match[0]] == 1}
    paths = [_Path(dict(certain), frozenset(index for index, _ in certain.values()))]
    for place, matches in enumerate(found):
        following = []
        for path in sorted(paths, key=_Path.rank)[:_BEAM]:
            if place in certain:
                index, weight = certain[place]
                path.take(index, weight)
                path.distance += abs(place - index)
                following.append(path)
                continue
            for index, weight in matches:
                if index not in path.used:
                    other = copy(path)
                    other.matches, other.used = {**path.matches, place: (index, weight)}, path.used | {index}
                    other.take(index, weight)
                    following.append(other)
                    # The program adds the distance to the paths that come after, not to this one.
                    path.distance += abs(place - index)
            path.skip()
            following.append(path)
        paths = following
    for path in paths:
        path.skip()
    return min(paths, key=_Path.rank).matches


def _count(said: list[str], true: list[str], find_synsets: Callable[[str], frozenset[int]] | None) -> Counts:
    matches = _align(said, true, find_synsets)
    weights = [[1 - DELTA if word in _FUNCTION_WORDS else DELTA for word in words] for words in (said, true)]
    matched = (
        sum(weights[0][index] * weight for index, weight in matches.values()),
        sum(weights[1][place] * weight for place, (_, weight) in matches.items()),
    )
    follows = (place - 1 in matches and matches[place - 1][0] == index - 1 for place, (index, _) in matches.items())
    chunks = sum(not after for after in follows)
    return Counts((len(said), len(true)), (sum(weights[0]), sum(weights[1])), matched, len(matches), chunks)
