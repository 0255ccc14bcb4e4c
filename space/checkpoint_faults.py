# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Say in one line why a checkpoint cannot be loaded, and in which of its files the fault is."""

import difflib
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


_MISSING = "model.safetensors is missing"


def load_weights(kind: Any, name: str, **options: Any) -> Any:
    """
    Load a model of Transformers from safetensors files only.

    Args:
        kind: The class, such as `AutoModelForCausalLM`.
        name (`str`): A folder or a Hub id.
        options: Options of `from_pretrained`.

    Raises:
        `ValueError`: If it has weights in other files only. The message says how to convert them.
        `OSError`: If it cannot be loaded.
    """
    try:
        return kind.from_pretrained(name, use_safetensors=True, **options)
    except OSError as error:
        if "model.safetensors" not in str(error) or (Path(name).is_dir() and not any(Path(name).glob("*.bin"))):
            raise
        raise ValueError(f"'{name}' cannot be loaded: {_pickled(name)}.") from error


def _pickled(name: str) -> str:
    """Return why weights are refused, and how to convert them."""
    return (
        f"{_MISSING}, and other files of weights are pickled: they may run code when they are read. If you trust "
        f"them, convert them with Transformers: `AutoModel.from_pretrained('{name}').save_pretrained('OUT')`"
    )


@contextmanager
def named_faults(name: str) -> Iterator[None]:
    """
    Load a checkpoint in this context, so that its faults are one line.

    Libraries report a broken file with many types of errors, often without the name of the file.

    Args:
        name (`str`): The checkpoint: a folder or a Hub id.

    Raises:
        `ValueError`: If it cannot be loaded. The message names the checkpoint, the file and the fault.
    """
    try:
        _check_parts(Path(name, "config.json"))
        yield
    except ImportError:
        raise  # a package that must be installed
    except BaseException as error:
        if not is_fault(error):
            raise
        is_folder = Path(name).is_dir()
        if not is_folder and isinstance(error, OSError):
            raise  # the Hub's own words
        fault = (find_fault(Path(name)) or _with_file(Path(name), error)) if is_folder else in_one_line(error)
        # Words go that do not fit, so a long name is cut first.
        fault = textwrap.shorten(re.sub(r"(\S{250})\S+", r"\1...", fault), 300, placeholder=" ...")
        raise ValueError(fault if f"'{name}'" in fault else f"'{name}' cannot be loaded: {fault}") from error


def load_config(name: str, revision: str | None = None) -> Any:
    """
    Load the configuration of a checkpoint, and no weights.

    Args:
        name (`str`): A folder or a Hub id. Its code is run.
        revision (`str`, *optional*): Branch, tag or commit of a Hub checkpoint.

    Raises:
        `ValueError`: If it cannot be loaded, or is a model of another type. The message names the command that
            converts it, if there is one.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    with named_faults(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=True, revision=revision)
    if config.model_type != "videollm_mod":
        command = shlex.join(["videollm-mod", "convert", name, "OUT"])
        is_convertible = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        hint = f" Convert it first: {command}" if is_convertible else ""
        raise ValueError(f"'{name}' is not a VideoLLM-MoD model: its type is {config.model_type}.{hint}")
    return config


def _check_parts(config: Path) -> None:
    """A configuration that names no language model means the default one, whose billions of weights take minutes."""
    try:
        fields = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # The loader says what is wrong with this file.
    if not isinstance(fields, dict):
        return
    if fields.get("model_type") == "videollm_mod" or "VideoLLMMoDConfig" in str(fields.get("auto_map")):
        for part in ("text_config", "vision_config"):
            if not isinstance(fields.get(part), dict):
                raise ValueError(f"config.json has no `{part}`. Copy or download it again.")


def find_fault(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint: "tokenizer.json is empty". `None` if they are in order."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".json", ".model", ".safetensors") and path.is_file() and (fault := _fault(path)):
            return f"{path.name} {fault}"
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    if index.is_file():
        written = json.loads(index.read_text(encoding="utf-8"))
        places = written.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
            return f"{index.name} must have a `weight_map` from names of weights to files."
        for part in sorted(set(places.values())):
            if not os.path.isfile(folder / part):  # names may be too long
                return f"{part} is missing, which {index.name} names as a part of the weights."
        if not isinstance(written.get("metadata"), dict):
            return f"{index.name} must have `metadata`."
    elif not any(path.is_file() for path in folder.glob("*.safetensors")):
        return f"{_pickled(str(folder))}." if any(folder.glob("*.bin")) else f"it has no weights: {_MISSING}."
    if config.is_file():
        code = json.loads(config.read_text(encoding="utf-8")).get("auto_map") or {}
        names = [name for name in code.values() if isinstance(name, str)] if isinstance(code, dict) else []
        for file in sorted({f"{name.split('.')[0]}.py" for name in names if "--" not in name}):
            if not os.path.isfile(folder / file):
                return f"{file} is missing, which config.json names as the model's code."
    return None if (folder / "chat_template.jinja").is_file() else "chat_template.jinja is missing."


def _with_file(folder: Path, error: BaseException) -> str:
    """Return what an error says, and which file of a checkpoint it is about. No file is broken by itself."""
    said = in_one_line(error)
    if any(path.name in said for path in folder.iterdir()):
        return said
    file = _failing_file(folder)
    if file is None and not isinstance(error, (ValueError, OSError)):
        file = "config.json, with the weights"
    return said if file is None else f"{file}: {said}"


def _failing_file(folder: Path) -> str | None:
    """Return the file of a checkpoint that does not load, if one does not."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

    template, tokenizer = folder / "chat_template.jinja", folder / "tokenizer.json"
    loads = {
        template.name: lambda: template.read_text(encoding="utf-8"),
        "config.json": lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True),
        "generation_config.json": lambda: GenerationConfig.from_pretrained(folder),
        tokenizer.name: lambda: Tokenizer.from_file(str(tokenizer)),
        "tokenizer_config.json": lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        "processor_config.json": lambda: AutoProcessor.from_pretrained(folder, trust_remote_code=True),
    }
    for name, load in loads.items():
        if (folder / name).is_file():
            try:
                load()
            except BaseException as error:
                if not is_fault(error):
                    raise
                return f"{name}, with the tokenizer" if name == "processor_config.json" else name
    return None


def _fault(path: Path) -> str | None:
    """Return what is wrong with a file, if anything is."""
    with open(path, "rb") as file:
        head = file.read(32)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer in place of the file. `git lfs pull` fetches the file."
    if not head:
        return "is empty. Copy or download it again."
    if path.suffix == ".json":
        try:
            is_object = isinstance(json.loads(path.read_bytes()), dict)
        except (ValueError, RecursionError) as error:
            return f"is not complete JSON: {error}."
        return None if is_object else "must hold a JSON object."
    if path.suffix == ".safetensors":
        import safetensors  # here, since the names of checkpoints are checked before libraries are imported

        try:
            safetensors.safe_open(path, "numpy")
        except (safetensors.SafetensorError, OSError) as error:
            return f"is not a complete safetensors file ({error}). Copy or download it again."
    return None


def is_fault(error: BaseException) -> bool:
    """Return whether a library has failed. An interrupt is no fault. A panic of Rust is one, but no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def in_one_line(error: BaseException) -> str:
    """Return the line of an error message that helps the user most."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ModuleNotFoundError):
        return f'{lines[0]}. `pip install -e ".[train]"` in the checkout installs what training and conversion need.'
    if is_a("huggingface_hub.errors", "StrictDataclassError", error):
        # The validator's name comes first, and the reason last, with what each type has against it.
        return lines[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ").split(". Errors: ")[0]
    if unknown := re.search(r"Unrecognized model identifier: (.*?)\. Should contain one of (.*)", lines[0]):
        close = difflib.get_close_matches(unknown[1], unknown[2].rstrip(".").split(", "))
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        return f"config.json: '{unknown[1]}' is no model type that Transformers knows{hint}"
    if is_a("safetensors", "SafetensorError", error):
        return f"The weights are not a complete safetensors file ({lines[0]}). Copy or download them again."
    # Libraries may write a paragraph. Its first line says what went wrong.
    return lines[0]


def is_a(module: str, name: str, error: BaseException) -> bool:
    """Return whether an error is of a library's class. If the library was never imported, it is not."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)
