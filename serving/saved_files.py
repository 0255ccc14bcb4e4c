# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A saved session in files: `session.json`, and `session.safetensors` for its tensors. Nothing is pickled."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time as clock
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..outputs import naming_full_disk, naming_target, sync, sync_all


# Another format is refused. Count it up when an attribute of a session, or of an object in it, gets another meaning.
FORMAT = 1
STATE, TENSORS = "session.json", "session.safetensors"
# Seconds after which what lies beside a saved session belongs to no program.
_ABANDONED = 600.0
# Fields of a configuration that do not change what a model says.
_OF_FILES = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}
_KINDS = {"float": float, "tuple": tuple, "deque": deque}


class Saved(NamedTuple):
    """
    A session as files hold it.

    Attributes:
        state (`dict`): What JSON holds. `{"tensor": name}` stands for a tensor, `{"deque": [...]}` for a value of a
            type that JSON does not have, and `{"StreamEvent": {...}}` for an object of a class.
        tensors (`dict[str, torch.Tensor]`): Its tensors, on the host.
    """

    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def pack(values: Mapping[str, Any]) -> Saved:
    """Return values as files hold them. Tensors are copied, so that later changes do not reach the copy."""
    tensors: dict[str, torch.Tensor] = {}

    def packed(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if isinstance(value, (list, tuple, deque)):
            items = [packed(item, f"{name}.{index}") for index, item in enumerate(value)]
            kind = next((kind for kind in (tuple, deque) if isinstance(value, kind)), None)
            return items if kind is None else {kind.__name__: items}
        if isinstance(value, Mapping):
            return {str(key): packed(item, f"{name}.{key}") for key, item in value.items()}
        if hasattr(value, "__dict__"):
            fields = packed({key: item for key, item in vars(value).items() if not callable(item)}, name)
            return {type(value).__name__: fields} if is_dataclass(value) else fields
        return value.item() if hasattr(value, "item") else value  # a number of NumPy

    return Saved({key: packed(value, key) for key, value in values.items()}, tensors)


def unpack(saved: Saved, name: str, classes: Mapping[str, type] | None = None) -> Any:
    """Return one of the values that were packed, with objects of these classes. Other objects become dictionaries."""
    classes = _KINDS | dict(classes or {})

    def unpacked(value: Any) -> Any:
        if isinstance(value, list):
            return [unpacked(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind, content = next(iter(value.items())) if len(value) == 1 else (None, None)
        if kind == "tensor":
            return saved.tensors[content]
        if kind in classes:
            made = unpacked(content)
            return classes[kind](**made) if isinstance(made, dict) else classes[kind](made)
        return {int(key) if key.isdigit() else key: unpacked(item) for key, item in value.items()}

    return unpacked(saved.state[name])


def check_folder(folder: str | os.PathLike) -> Path:
    """
    Return a folder as a path.

    Raises:
        `FileExistsError`: If it exists, is not empty and holds no saved session, which may be replaced.
    """
    folder = Path(folder)
    while folder.exists():
        with suppress(FileNotFoundError):
            before = folder.stat()
            if folder.is_dir() and (not (names := os.listdir(folder)) or STATE in names):
                break
            # Another thread may have put a saved session in its place, and may be removing this one's files.
            if os.path.samestat(before, folder.stat()):
                raise FileExistsError(f"'{folder}' exists and is no saved session: choose another folder.")
    return folder


def write(saved: Saved, model: Any, folder: str | os.PathLike) -> None:
    """
    Write a session into a folder. The files are written beside it, and the folder is renamed when they are complete
    and on the disk.

    Args:
        saved ([`Saved`]): The session.
        model ([`VideoLLMMoDForConditionalGeneration`]): Its model, which `read` compares with.
        folder (`str` or `Path`): The folder. A session saved there before is replaced.

    Raises:
        `FileExistsError`: If the folder holds something else.
        `OSError`: If the folder cannot be written.
    """
    folder = check_folder(folder).absolute()
    key = secrets.token_hex(8)
    state = {"format": FORMAT, "id": key, "model": digests(model), **saved.state}
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.parent / _prefix(folder)
    with naming_target(folder, hidden), TemporaryDirectory(dir=folder.parent, prefix=hidden.name) as beside:
        new = Path(beside, "new")
        with naming_full_disk(folder):
            new.mkdir()
            save_file(saved.tensors, new / TENSORS, metadata={"id": key})
            (new / STATE).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
            sync_all(new)
        rename_over(new, folder, Path(beside))
        sync(folder.parent)  # before the session before is removed
    # Of programs that were killed. Others may save at the same time.
    for left in folder.parent.glob(f"{_prefix(folder)}????????"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime < clock.time() - _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _prefix(folder: Path) -> str:
    """Return how names of temporary folders begin. They are short, because the folder's name may be the longest."""
    return f".session-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:16]}-"


def rename_over(new: Path, folder: Path, trash: Path) -> None:
    """Rename a folder to the name of another, which moves into `trash`. Others may do the same at the same time."""
    while True:
        with suppress(FileNotFoundError):
            os.rename(folder, trash / secrets.token_hex(8))
        try:
            os.rename(new, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def read(folder: str | os.PathLike, model: Any) -> Saved:
    """
    Read a saved session.

    Args:
        folder (`str` or `Path`): The folder.
        model ([`VideoLLMMoDForConditionalGeneration`]): The model that it must have been saved with.

    Raises:
        `FileNotFoundError`: If the folder holds no saved session.
        `ValueError`: If a file is damaged, has another format, or belongs to another save or model.
    """
    folder = Path(folder)
    if not folder.exists():
        # A program that was killed between the two renames of `write` leaves both sessions complete.
        left = folder.absolute().parent.glob(f"{_prefix(folder)}????????/new")
        folder = next((new for new in left if len(list(new.parent.iterdir())) > 1), folder)
    for name in (STATE, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' holds no saved session: it has no {name}.")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        form, key, known = (state[name] for name in ("format", "id", "model"))
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"'{folder / STATE}' is damaged, or not of a saved session: save the session again."
        ) from None
    if form != FORMAT:
        raise ValueError(f"'{folder / STATE}' has format {form}; this version reads format {FORMAT}.")
    for part, digest in digests(model).items():
        if known.get(part) != digest:
            raise ValueError(f"The session in '{folder}' was saved with a model of other {part}: load that model.")
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            twin = (file.metadata() or {}).get("id")
    except SafetensorError as error:
        raise ValueError(f"'{folder / TENSORS}' is damaged ({error}): save the session again.") from None
    if twin != key:
        raise ValueError(f"'{folder / TENSORS}' belongs to another save than {STATE}: save the session again.")
    return Saved(state, tensors)


def digests(model: Any) -> dict[str, str]:
    """Return digests of a model's weights, by eight values of each, and of its configuration."""
    weights = hashlib.sha256()
    for name, weight in model.named_parameters():
        # Accelerate keeps some weights elsewhere.
        few = "" if weight.is_meta else weight.detach().flatten()[:: max(1, weight.numel() // 8)].double().tolist()
        weights.update(f"{name} {tuple(weight.shape)} {weight.dtype} {few}".encode())
    text = model.config.to_json_string()
    own = json.loads(text, object_hook=lambda x: {k: x[k] for k in x if k not in _OF_FILES and k[0] != "_"})
    configuration = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    return {"weights": weights.hexdigest(), "configuration": configuration.hexdigest()}


__all__ = [
    "FORMAT",
    "STATE",
    "TENSORS",
    "Saved",
    "check_folder",
    "digests",
    "pack",
    "read",
    "rename_over",
    "unpack",
    "write",
]
