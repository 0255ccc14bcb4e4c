# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Read what a free reply chose: an option, a number, or yes or no."""

import re
from collections.abc import Sequence
from typing import Any

from videollm_mod.train.data.choices import LETTERS, letter_of
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.text_scores import split_words


_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# A capital letter that stands alone. "A" before another word is the article.
_ALONE = re.compile(r"(?<![\w'])(?:A(?!\s+(?!(?:or|and|is|because|since)\b)[a-z])|[B-Z])(?![\w'])")


def read_letter(reply: str, options: Sequence[str]) -> str | None:
    """
    Return the letter of the option that a reply chose, or `None` if it is unclear.

    The reply may be a letter and nothing else, or an option's text, with or without its letter. Otherwise it may have
    one capital letter that stands alone, such as "The answer is B."; the article in "A red car" is none. Otherwise it
    may contain the text of one option.

    Args:
        reply (`str`): What the model said.
        options (sequence of `str`): Texts of the options, without letters.
    """
    letters = list(LETTERS[: len(options)])
    words, texts = split_words(reply), [split_words(option) for option in options]
    if len(words) == 1 and words[0].upper() in letters:
        return words[0].upper()
    # "(D) A map." is the letter and the text of one option, although "A" is a letter too.
    own = letter_of(reply)
    if own in letters and words == [own.lower(), *texts[letters.index(own)]]:
        return own
    equal = [letter for letter, text in zip(letters, texts, strict=True) if text and text == words]
    named = sorted(set(_ALONE.findall(reply)) & set(letters))
    within = [letter for letter, text in zip(letters, texts, strict=True) if text and contains(words, text)]
    for found in (equal, named, within):
        if found:
            return found[0] if len(found) == 1 else None
    return None


def contains(words: Sequence[str], part: Sequence[str]) -> bool:
    """Return whether words contain others one after another."""
    return any(list(words[k : k + len(part)]) == list(part) for k in range(len(words) - len(part) + 1))


def read_number(reply: str) -> int | None:
    """Return the only number in a reply, in digits or as a word up to twelve, or `None`."""
    found = {int(number) for number in re.findall(r"\d+", reply)}
    found |= {_NUMBERS.index(word) for word in split_words(reply) if word in _NUMBERS}
    return found.pop() if len(found) == 1 else None


def read_yes(reply: str) -> bool | None:
    """Return whether a reply says yes, or `None` if it says neither or both of yes and no."""
    found = {word for word in split_words(reply) if word in ("yes", "no")}
    return found == {"yes"} if len(found) == 1 else None


def letter_likelihoods(runner: Runner, row: dict[str, Any], options: Sequence[str]) -> list[float]:
    """Return the log-probability of each option's letter as the reply."""
    return runner.likelihoods(row, list(LETTERS[: len(options)]))


def most_likely(values: Sequence[float] | None) -> str | None:
    """Return the letter of the largest value, the first of several, or `None` without values."""
    if values is None:
        return None
    return LETTERS[max(range(len(values)), key=values.__getitem__)]
