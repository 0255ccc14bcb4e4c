# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The words of a text that name things and actions, as Vript-Hard's scorer finds them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from videollm_mod.train.judging import cosine


TAGGER = "en_core_web_lg"
_KINDS = ("VERB", "NOUN", "PROPN")


def content_words(texts: Sequence[str]) -> set[str]:
    """
    Return the verbs, nouns and proper nouns of texts by spaCy: each word's base form, without stop words.

    Raises:
        `ImportError`: If spaCy or its model `en_core_web_lg` is not installed.
    """
    tagger = _load_tagger()
    words = {_base(token.text) for text in texts for token in tagger(text) if token.pos_ in _KINDS}
    return {_base(word) for word in words if word not in tagger.Defaults.stop_words}


def check_content_words() -> None:
    """
    Find and compare the words of a short text, so that a missing model shows before a long run.

    Raises:
        `ImportError` or `OSError`: If spaCy, its model or the sentence encoder is not there.
    """
    content_words(["A dog runs."])
    cosine([("dog", "dogs")])


@cache
def _base(word: str) -> str:
    return _load_tagger()(word)[0].lemma_


@cache
def _load_tagger() -> Any:
    try:
        import spacy

        return spacy.load(TAGGER)
    except (ImportError, OSError):
        raise ImportError(
            f"The words of descriptions need spaCy: pip install spacy, then python -m spacy download {TAGGER}. To "
            "leave this task out, name the others in --task."
        ) from None
