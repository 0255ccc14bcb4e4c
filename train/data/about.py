# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The `about.json` of prepared data: where it comes from, its tasks, labels, splits and licence."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


# Types of what is read.
_KINDS = {"fps": float, "tasks": list, "labels": dict, "splits": dict}


def read_about(dataset: str) -> dict[str, Any]:
    """
    Return the `about.json` of prepared data, or an empty dictionary if there is none.

    Raises:
        `ValueError`: If it is not JSON, or not what `prepare.py` writes.
    """
    path = Path(dataset)
    if path.exists():
        about = (path if path.is_dir() else path.parent) / "about.json"
    elif dataset.count("/") == 1:
        try:
            about = Path(hf_hub_download(dataset, "about.json", repo_type="dataset"))
        except EntryNotFoundError:
            return {}
    else:
        return {}
    try:
        content = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise ValueError(f"'{about}' is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{about}' is no object: give the file that prepare.py wrote, or remove it.")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name, kind()), (int, float) if kind is float else kind):
            raise ValueError(f"'{about}': `{name}` is {type(content[name]).__name__}, must be {kind.__name__}.")
    return content
