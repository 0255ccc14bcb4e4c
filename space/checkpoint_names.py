# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Check the name of a checkpoint before torch is imported or the Hub is asked."""

import difflib
import re
from pathlib import Path


def check_checkpoint(name: str | Path) -> str:
    """
    Check the name of a checkpoint before anything is loaded.

    A Hub id, `owner/name`, passes without a look at the Hub.

    Args:
        name (`str` or `Path`): A folder with a configuration, or a Hub id.

    Returns:
        `str`: The same name, with the home folder in place of `~`.

    Raises:
        `FileNotFoundError`: If the folder does not exist. The message names a similar one if there is one:
            "There is no folder 'chekpoint'; did you mean 'checkpoint'?"
        `ValueError`: If the name is a file, or a folder without a configuration.
    """
    name, path = str(name), Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"'{name}' is a file: give the folder of a checkpoint, or a Hub id.")
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"The folder '{name}' has no config.json: give the folder of a checkpoint.")
        return str(path) if name.startswith("~") else name
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    similar = _similar_folder(path)
    if similar is not None:
        raise FileNotFoundError(f"There is no folder '{name}'; did you mean '{similar}'?")
    raise FileNotFoundError(f"There is no folder '{name}'. Give a folder, or a Hub id such as 'owner/name'.")


def _similar_folder(path: Path) -> Path | None:
    """Find an existing folder that differs from `path` in one misspelt part."""
    parent = next((folder for folder in path.parents if folder.is_dir()), None)
    if parent is None:
        return None
    wrong, *rest = path.relative_to(parent).parts
    folders = [folder.name for folder in parent.iterdir() if folder.is_dir()]
    for match in difflib.get_close_matches(wrong, folders):
        if parent.joinpath(match, *rest).is_dir():
            return parent.joinpath(match, *rest)
    return None
