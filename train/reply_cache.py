# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Keep the replies of language models on disk, so that a second run asks nothing twice."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from videollm_mod.outputs import write_text


class Reply(NamedTuple):
    """
    A language model's reply.

    Attributes:
        text (`str`): The text.
        is_cut (`bool`): Whether the reply reached the longest length, so that its end is missing.
    """

    text: str
    is_cut: bool = False


def without_thoughts(text: str) -> str:
    """
    Return what a model says after it has thought aloud, or "" if the text ends within its thoughts.

    Some chat templates put `<think>` into the prompt, so that a reply has `</think>` only.
    """
    said = text.rpartition("</think>")[2]
    return "" if "<think>" in said else said.strip()


class ReplyCache:
    """
    A folder with one JSON file per reply, under a hash of its request. Threads and processes may share it.

    Args:
        folder (`str` or `Path`): The folder. The first reply creates it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def find(self, request: Mapping[str, Any]) -> Reply | None:
        """Return the reply to a request, a JSON object with the model, its messages and its options, if it is kept."""
        try:
            kept = json.loads(self._file(request).read_text(encoding="utf-8"))
            return Reply(kept["reply"], kept.get("is_cut", False))
        except (FileNotFoundError, ValueError, KeyError):  # not there, or spoilt
            return None

    def keep(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep the reply to a request."""
        file = self._file(request)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Several writers may write the same reply: each writes a file of its own, and renames it.
        write_text(file, json.dumps({"request": request, "reply": reply.text, "is_cut": reply.is_cut}))

    def _file(self, request: Mapping[str, Any]) -> Path:
        content = json.dumps(request, sort_keys=True).encode()
        return self.folder / f"{hashlib.sha256(content).hexdigest()}.json"
