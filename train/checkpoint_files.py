# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""List the files that make up a checkpoint, in its own folder or in a checkout."""

import json
import re
from pathlib import Path
from typing import Any


# In a checkout the README introduces the project, and this page describes the checkpoint.
FACTS_PAGE = "docs/embedded-checkpoint.md"
# Files of a checkpoint other than its code and its card: configuration, tokenizer, weights and licence.
_PARTS = ("*.json", "chat_template.jinja", "*.safetensors", "*.model", "*.txt", "LICENSE*", "NOTICE*", "adapter/*")
_PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
# Links of Markdown, `[text](target)`, with their exclamation mark if they show a picture.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def model_files(folder: str | Path) -> dict[str, Path]:
    """
    List the files that load as a model and its processor: configuration, code, tokenizer, weights, adapter, licence.

    Args:
        folder (`str` or `Path`): A checkpoint, which may also be a checkout with many other files.

    Returns:
        `dict[str, Path]`: Paths by their name in the checkpoint.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    folder = Path(folder)
    found = {path for pattern in _PARTS for path in folder.glob(pattern) if path.is_file()}
    for entry in entry_files(folder):
        if (folder / entry).is_file():
            found |= {folder / entry, *map(Path, get_relative_import_files(str(folder / entry)))}
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in sorted(names.items()) if not name.startswith("trainer_state")}


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """
    List the files that are published: those of [`model_files`], the card, and the pictures that the card shows.

    Args:
        folder (`str` or `Path`): A checkpoint, which may also be a checkout with many other files.

    Returns:
        `dict[str, Path]`: Paths by their name in the checkpoint.
    """
    folder = Path(folder)
    files = model_files(folder)
    for page in ("README.md", FACTS_PAGE):
        path = folder / page
        if path.is_file():
            files[page] = path
            text = path.read_text(encoding="utf-8")
            for target in [*(link[2] for link in LINK.findall(text)), *re.findall(r'src="([^"]+)"', text)]:
                picture = (path.parent / target).resolve()
                if picture.suffix in _PICTURES and picture.is_file() and folder.resolve() in picture.parents:
                    files[picture.relative_to(folder.resolve()).as_posix()] = picture
    return files


def entry_files(folder: Path) -> set[str]:
    """Return the code files that the configurations of a model and its processor name in their `auto_map`."""
    found: set[str] = set()

    def search(config: Any) -> None:
        if isinstance(config, dict):
            names = [name for name in (config.get("auto_map") or {}).values() if isinstance(name, str)]
            found.update(name.split("--")[-1].split(".")[0] + ".py" for name in names)
            for value in config.values():
                search(value)

    for name in ("config.json", "processor_config.json"):
        if (folder / name).is_file():
            search(json.loads((folder / name).read_text(encoding="utf-8")))
    return found
