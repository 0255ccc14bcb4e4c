# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Rewriting of narrations: from "C looks around." to "You look around.".

VideoLLM-online's code does the same to Ego4D narrations. The prompt is this project's own.
"""

import re

from videollm_mod.train.data.planned_dialogues import RejectedError
from videollm_mod.train.reply_cache import Reply, without_thoughts


_INSTRUCTION = """\
Rewrite a note about a video that someone films with a camera on the head. In notes, C is this person, and other
letters are other people. Speak to C as "you", and call the others "someone", "a man" or "a woman". Change nothing
else. Write one sentence and nothing else.

Note: C looks around.
Sentence: You look around.
Note: C picks a cup with his left hand.
Sentence: You pick a cup with your left hand.
Note: Man X passes a spoon to C.
Sentence: A man passes a spoon to you.
Note: {text}
Sentence:"""
_C = re.compile(r"(?<![\w'’.-])#?C(?![\w.-])")


def ask_for_rewrite(text: str) -> list[dict[str, str]]:
    """Return the conversation that makes a language model rewrite a narration."""
    return [{"role": "user", "content": _INSTRUCTION.format(text=text)}]


def read_rewrite(text: str, reply: Reply | str) -> str:
    """
    Return the rewritten narration.

    Args:
        text (`str`): The narration.
        reply ([`Reply`] or `str`): What was written, or the reason why nothing was.

    Raises:
        [`RejectedError`]: If it cannot be used.
    """
    if isinstance(reply, str):
        raise RejectedError(reply)
    lines = [line.strip() for line in without_thoughts(reply.text).splitlines() if line.strip()]
    if not lines:
        raise RejectedError("empty reply")
    said = " ".join(re.sub(r"^\W*sentence\s*:", "", lines[0], flags=re.I).strip('"“”*` ').split())
    if not said:
        raise RejectedError("empty reply")
    if len(lines) == 1 and reply.is_cut:
        raise RejectedError("reply was cut")
    if _C.search(said):
        raise RejectedError("still speaks of C")
    if len(said.split()) > 2 * len(text.split()) + 4:
        raise RejectedError("much longer than the narration")
    return said
