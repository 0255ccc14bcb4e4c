# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A language model behind an endpoint as the judge of replies."""

import re
from collections.abc import Sequence

from videollm_mod.train.endpoint import Endpoint, NoReplyError


_LEVEL_PROMPT = """You grade a model's answer to a question about a video against the true answer.
Grades run from 1 (wrong, off the question, or nearly all of the true answer is missing) to {most} (everything in the \
true answer is there). Wording does not matter.
Reply with the grade, one digit, and nothing else."""
_REPEAT_PROMPT = """A model comments on a video while it watches. You see its earlier replies and its new reply.
Does the new reply add any information to the earlier ones?
Reply "no" if everything in it was said before, otherwise "yes", and nothing else."""


class EndpointJudge:
    """
    A language model as the judge. The prompts are ours.

    Args:
        endpoint ([`Endpoint`]): The language model. With a cache, a second run asks nothing twice.
    """

    name = "endpoint"

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def levels(self, items: Sequence[tuple[str, str, str]], max_level: int) -> list[int | None]:
        """Return a level for each (question, truth, reply), or `None` if the model gives no grade or no reply."""
        prompt = _LEVEL_PROMPT.format(most=max_level + 1)
        found = []
        for question, truth, reply in items:
            text = self._ask(prompt, f"Question: {question}\nTrue answer: {truth}\nModel's answer: {reply}")
            grade = re.search(r"\d+", text)
            level = int(grade[0]) - 1 if grade else -1
            found.append(level if 0 <= level <= max_level else None)
        return found

    def repeats(self, items: Sequence[tuple[Sequence[str], str]]) -> list[bool | None]:
        """Return for each (earlier replies, reply) whether the reply adds nothing; `None` if the model is unclear."""
        answers = {"no": True, "yes": False}
        found = []
        for others, reply in items:
            earlier = "\n".join(f"- {other}" for other in others)
            text = self._ask(_REPEAT_PROMPT, f"Earlier replies:\n{earlier}\nNew reply: {reply}")
            found.append(answers.get(re.sub(r"\W", "", text).lower()))
        return found

    def _ask(self, system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        # Room for a model that thinks before it answers.
        try:
            text = self.endpoint.complete(messages, max_tokens=2048, temperature=0.0)
        except NoReplyError:
            return ""
        return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
