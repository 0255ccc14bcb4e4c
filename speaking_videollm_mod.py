# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""When to speak: questions that are answered by a probability."""

from collections.abc import Sequence
from typing import Any

import torch

from .checks_videollm_mod import check_text


class Probe:
    """
    A question about what was seen, answered by the probability of one answer against another.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        question (`str`): What the user asks.
        answers (`Sequence[str]`): The two answers.

    Attributes:
        probability (`float`, *optional*): That of the first answer. `None` until the model was asked.

    Raises:
        `ValueError`: If a text is empty, or the answers begin with the same token.
    """

    def __init__(self, tokenizer: Any, question: str, answers: Sequence[str]) -> None:
        if not check_text("A question", question).strip():
            raise ValueError(f"A question must be a text that is not empty, got {question!r}.")
        if isinstance(answers, str) or len(answers) != 2:
            raise ValueError(f"`answers` must be two texts, such as ('Yes', 'No'), got {answers!r}.")
        self.question, self.probability = question, None
        yes, no = (_first_tokens(tokenizer, answer) for answer in answers)
        # A tokenizer may make one token of the space before any word.
        self._tokens = sorted(yes - no), sorted(no - yes)
        if not all(self._tokens):
            raise ValueError(
                f"`answers` are {answers[0]!r} and {answers[1]!r}: they must begin with different tokens."
            )

    def read(self, logits: torch.Tensor) -> float:
        """Store and return the probability, from the scores (vocabulary,) of the reply's first token."""
        yes, no = (logits[tokens].float().logsumexp(dim=-1) for tokens in self._tokens)
        self.probability = float((yes - no).sigmoid())
        return self.probability


def _first_tokens(tokenizer: Any, answer: str) -> set[int]:
    """Return the first tokens of the usual spellings of an answer."""
    words = {check_text("An answer", answer).strip(), answer.strip().lower()}
    spellings = [space + word for word in words for space in ("", " ")]
    return {ids[0] for ids in (tokenizer.encode(text, add_special_tokens=False) for text in spellings) if ids}


__all__ = ["Probe"]
