# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Judges of free text: how similar two texts are, how well a reply covers a truth, and whether it repeats earlier ones.

Scores by different judges do not compare, so each measure that uses one carries its name.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol


# The encoder of ProAssist's evaluation.
ENCODER = "sentence-transformers/all-mpnet-base-v2"
# Similarity to an earlier reply from which on a reply repeats it. This is our choice.
REPEATS = 0.8
# A question, the true answer and a reply, by which judges are checked.
EXAMPLE = ("What is it?", "A ball.", "A ball.")


def exact(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return 1 for texts with the same words, apart from case and punctuation, and 0 for others."""
    return [float(_split(one) == _split(other)) for one, other in pairs]


def token_f1(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the F1 of the words that two texts share, as SQuAD's evaluation does, but with articles."""
    return [_token_f1(_split(one), _split(other)) for one, other in pairs]


def _split(text: str) -> list[str]:
    # nltk, which other scores need, takes a second to import.
    from videollm_mod.train.text_scores import split_words

    return split_words(text)


def _token_f1(one: list[str], other: list[str]) -> float:
    shared = (Counter(one) & Counter(other)).total()
    if not one or not other:
        return float(one == other)
    return 2 * shared / (len(one) + len(other))


def sentence(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the absolute value of [`cosine`], as ProAssist's evaluation does."""
    return [abs(value) for value in cosine(pairs)]


def cosine(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """
    Return the cosine of the texts' embeddings by `all-mpnet-base-v2`.

    Raises:
        `ImportError`: If sentence-transformers is not installed.
    """
    if not pairs:
        return []
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors = _load_encoder().encode(texts, normalize_embeddings=True, show_progress_bar=False)
    place = {text: index for index, text in enumerate(texts)}
    return [float(vectors[place[one]] @ vectors[place[other]]) for one, other in pairs]


@cache
def _load_encoder() -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            "The similarity 'sentence' needs an encoder: pip install sentence-transformers. 'token_f1' needs none."
        ) from None
    return SentenceTransformer(ENCODER, model_kwargs={"use_safetensors": True})


# Functions of pairs of texts. Each returns a number in [0, 1] for each pair.
SIMILARITIES: dict[str, Callable[[Sequence[tuple[str, str]]], list[float]]] = {
    "exact": exact,
    "token_f1": token_f1,
    "sentence": sentence,
}


def find_similarity(name: str) -> Callable[[Sequence[tuple[str, str]]], list[float]]:
    """Return the similarity of a name in [`SIMILARITIES`]."""
    if name not in SIMILARITIES:
        raise ValueError(f"There is no similarity {name!r}: choose one of {', '.join(SIMILARITIES)}.")
    return SIMILARITIES[name]


class Judge(Protocol):
    """
    What [`PAUC`] and [`check_judge`] ask of a judge.

    Attributes:
        name (`str`): Name for the measures.
    """

    name: str

    def levels(self, items: Sequence[tuple[str, str, str]], max_level: int) -> list[int | None]:
        """Return how well each (question, truth, reply) covers the truth, from 0 to `max_level`; `None` if unclear."""
        ...

    def repeats(self, items: Sequence[tuple[Sequence[str], str]]) -> list[bool | None]:
        """Return for each (earlier replies, reply) whether all its information was given before."""
        ...

    def check(self) -> None:
        """Judge one pair of texts, and raise `ImportError` or `OSError` if that fails."""
        ...


class SimilarityJudge:
    """
    A judge without a language model: the level is the similarity of reply and truth times `max_level`, rounded.

    A reply repeats an earlier one from a similarity of 0.8 on. Both rules are ours.

    Args:
        name (`str`): `"exact"`, `"token_f1"` or `"sentence"`.
    """

    def __init__(self, name: str) -> None:
        self.name, self._similarity = name, find_similarity(name)

    def levels(self, items: Sequence[tuple[str, str, str]], max_level: int) -> list[int | None]:
        """Return a level for each (question, truth, reply)."""
        similar = self._similarity([(reply, truth) for _, truth, reply in items])
        return [int(min(value, 1.0) * max_level + 0.5) for value in similar]

    def repeats(self, items: Sequence[tuple[Sequence[str], str]]) -> list[bool | None]:
        """Return for each (earlier replies, reply) whether the reply is similar to one of them."""
        similar = iter(self._similarity([(reply, other) for others, reply in items for other in others]))
        return [max((next(similar) for _ in others), default=0.0) >= REPEATS for others, _ in items]

    def check(self) -> None:
        """Compare one pair of texts, so that an encoder that is missing shows."""
        self.levels([EXAMPLE], 4)


def find_judge(judge: str | Judge) -> Judge:
    """Return a judge by its name in [`SIMILARITIES`], or the judge itself."""
    return SimilarityJudge(judge) if isinstance(judge, str) else judge


def check_judge(judge: str | Judge) -> None:
    """
    Let a judge compare one pair of texts, so that what it lacks shows before a long run.

    Raises:
        `ImportError` or `OSError`: If its encoder or its endpoint is not there, or if the endpoint does not reply.
    """
    find_judge(judge).check()
