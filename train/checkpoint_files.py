# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The files that make up a checkpoint, in its own folder or in a checkout: list them, and replace them together."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from videollm_mod.outputs import naming_full_disk, naming_target


# In a checkout the README introduces the project, and this page describes the checkpoint.
FACTS_PAGE = "docs/embedded-checkpoint.md"
# Files of a checkpoint other than its code, card and weights, by name: others in the folder may be private.
_PARTS = (
    *("config.json", "generation_config.json", "adapter_config.json", "golden.json", "LICENSE*", "NOTICE*"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
_PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
# Links of Markdown, `[text](target)`, with their exclamation mark if they show a picture.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

# Without these a folder is no checkpoint. The last one is the last file that a checkpoint gets.
_MARKS = ("adapter_config.json", "config.json", "processor_config.json")
LAST_WRITTEN = _MARKS[-1]
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def new_checkpoint(folder: str | Path) -> Iterator[Path]:
    """
    Give an empty folder to save a checkpoint in. When the block ends, its files replace those of `folder`. After an
    error, an earlier checkpoint stays as it is.

    The configuration is removed first and put in place last. If the program is killed in between, no mix of two
    checkpoints can be loaded.

    Args:
        folder (`str` or `Path`): Folder of the checkpoint. Other files in it stay, and so does its `README.md`.

    Raises:
        [`FullDiskError`]: If the disk is full.
        `OSError`: If the folder cannot be written.
    """
    folder = Path(folder)
    place = folder / ".saving"
    shutil.rmtree(place, ignore_errors=True)  # of a program that was killed
    try:
        with naming_target(folder, place), naming_full_disk(folder):
            place.mkdir(parents=True)
            yield place
            names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
            for name in reversed(_MARKS):
                (folder / name).unlink(missing_ok=True)
            if any(_WEIGHTS.fullmatch(name) for name in names):
                for old in [path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)]:
                    old.unlink()
            for name in sorted(names, key=lambda name: (_MARKS.index(name) if name in _MARKS else -1, name)):
                if name == "README.md" and (folder / name).exists():
                    continue
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(place / name, folder / name)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class WholeCheckpoints:
    """A trainer of Transformers that never mixes two checkpoints, and that names the folder if the disk is full."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # An earlier run may have left a checkpoint of this name.
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with naming_full_disk(folder):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        with new_checkpoint(folder) if self.args.should_save else nullcontext(folder) as place:
            super()._save(str(place), state_dict)


def model_files(folder: str | Path) -> dict[str, Path]:
    """
    List the files that load as a model and its processor: configuration, code, tokenizer, weights, adapter, licence.
    Other names than the usual ones of these files are left out.

    Args:
        folder (`str` or `Path`): A checkpoint, which may also be a checkout with many other files.

    Returns:
        `dict[str, Path]`: Paths by their name in the checkpoint.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    folder = Path(folder)
    found = set()
    for place in (folder, folder / "adapter"):
        found |= {path for pattern in _PARTS for path in place.glob(pattern) if path.is_file()}
        found |= {path for path in place.glob("*model*") if _WEIGHTS.fullmatch(path.name)}
    for entry in entry_files(folder):
        if (folder / entry).is_file():
            found |= {folder / entry, *map(Path, get_relative_import_files(str(folder / entry)))}
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in found))


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
