# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Questions with lettered options, as benchmarks ask them."""

import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from videollm_mod.train.data.dialogues import to_text


# An option's own letter: "A. ", "A) " or "(A)".
_LETTER = re.compile(r"^(?:([A-Z])[.):]|\(([A-Z])\))\s*")


def letter_of(option: str) -> str | None:
    """Return the letter that an option begins with, such as "B" for "B. A map.", or `None`."""
    found = _LETTER.match(option)
    return (found[1] or found[2]) if found else None


def read_options(value: Any) -> list[str] | None:
    """
    Return the texts of options, without their letters if all have one. Return `None` if there are not 2 to 26 texts.

    The place of an option gives its letter. The letters in a list may be wrong: "A.", "B.", "D.", "C.".
    """
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        return None
    options = [to_text(option) for option in value]
    if None in options:
        return None
    bare = [_LETTER.sub("", option) for option in options]
    return bare if all(letter_of(option) for option in options) and all(bare) else options


def ask_choice(question: str, options: Sequence[str]) -> str:
    """Return a question with its lettered options. The wording is ours."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "Reply with the letter of the right option only."])
