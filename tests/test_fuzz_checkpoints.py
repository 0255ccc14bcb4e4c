# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random faults in the files of a checkpoint: it loads and watches a frame, or one line names the file or the part."""

import copy
import gc
import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fuzzing import SEEDS, WRONG, check_error, run_case, spoil_bytes
from hypothesis import given
from loading import load_checkpoint
from safetensors.torch import load, save
from tiny import random_frames, tiny_model, tiny_processor
from transformers import dynamic_module_utils
from transformers.utils import logging

from videollm_mod.space.checkpoint_faults import load_config, named_faults


WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Numbers of sizes are at most this, or a model would fill the memory.
MOST = 512
SMALL = [value for value in WRONG if not isinstance(value, (int, float)) or abs(value) < MOST]
JSON_WRONG = [value for value in SMALL if not isinstance(value, (tuple, bytes)) and value == value]
# Fields that a configuration may have, and that ours has not.
EXTRA: dict[str, list[Any]] = {
    "quantization_config": [{}, {"quant_method": "nothing"}, 1, {"bits": 4}],
    "dtype": ["float33", "float16", "int8", None, 1],
    "attn_implementation": ["nothing", 1],
    "tokenizer_class": ["Nothing", None, 1, "BertTokenizer"],
    "processor_class": ["Nothing", 1],
    "add_bos_token": [1, "no"],
    "transformers_version": ["9.9", 1, None],
}
# Other words by which an error names a file.
WORDS = {
    WEIGHTS: ["weights"],
    CONFIG: ["its type is", "weights are missing", "`"],
    "tokenizer.json": ["tokenizer"],
    "tokenizer_config.json": ["tokenizer"],
    "processor_config.json": ["processor"],
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@dataclass(repr=False)
class Sound:
    """A checkpoint on the disk, its files, and its weights."""

    folder: Path
    files: dict[str, bytes]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny checkpoint. Its code stays the same in all cases, so it is looked up once."""
    folder = tmp_path_factory.mktemp("checkpoint")
    # "all_deep" has a full layer, and the embeddings are not those of the head.
    model = tiny_model(text_overrides={"num_hidden_layers": 3}, mod_layers="all_deep")
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}
    find = lru_cache(dynamic_module_utils.get_cached_module_file)
    gc.freeze()  # what is there now need not be looked at after every tenth case
    with patch.object(dynamic_module_utils, "get_cached_module_file", find):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield Sound(folder, files, load(files[WEIGHTS]))
        logging.enable_progress_bar()
        logging.set_verbosity_warning()


# ---------------------------------------------------------------------------------------------------------- faults


def spoil_weights(chance: random.Random, weights: dict[str, torch.Tensor]) -> tuple[bytes, list[str]]:
    """Return a file of other weights, and the words of which an error may name one."""
    weights = dict(weights)
    name = chance.choice(sorted(weights))
    tensor, how = weights[name], chance.choice(["missing", "extra", "shape", "dtype", "value", "name", "none"])
    if how == "missing":
        for other in {name, *chance.sample(sorted(weights), chance.choice([0, 0, 3]))}:
            del weights[other]
    elif how == "extra":
        weights[chance.choice([f"{name}.extra", "model.nothing", "", "é", f"model.{name}"])] = tensor.clone()
    elif how == "shape":
        shapes = [lambda x: x[:-1], lambda x: x[None], lambda x: x.flatten()[:1], lambda x: x.new_zeros(0)]
        shapes += [lambda x: torch.cat([x, x]), lambda x: x.mT if x.dim() > 1 else x[0]]
        weights[name] = chance.choice(shapes)(tensor).clone().contiguous()
    elif how == "dtype":
        dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64]
        weights[name] = tensor.to(chance.choice([*dtypes, torch.float8_e4m3fn, torch.complex64]))
    elif how == "value":
        weights[name] = tensor.clone()
        weights[name].view(-1)[chance.randrange(tensor.numel())] = chance.choice([torch.nan, torch.inf, -torch.inf])
    elif how == "name":
        weights[chance.choice([name[:-1], name.upper(), name.replace(".", "/"), f"{name} "])] = weights.pop(name)
    else:
        weights = {}
    return save(weights, chance.choice([{"format": "pt"}, None, {"format": "tf"}, {"format": ""}])), [name]


def spoil_header(chance: random.Random, data: bytes) -> bytes:
    """Return a safetensors file with a wrong header, or a wrong size of the header."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if chance.random() < 0.3:
        wrong = [0, 1, size - 1, size + 1, 2**63, len(data), len(data) - 8]
        return chance.choice(wrong).to_bytes(8, "little") + data[8:]
    name = chance.choice(sorted(header))
    how = chance.choice(["dtype", "shape", "data_offsets", "name", "all"])
    if how == "all":
        header[name] = chance.choice(JSON_WRONG)
    elif how == "name":
        header[chance.choice(["", "x", "__metadata__"])] = header.pop(name)
    elif how == "shape":
        header[name]["shape"] = chance.choice([[], [-1], [2**62, 4], [2**63], ["1"], None, [0], 3, [1.5]])
    elif how == "data_offsets":
        header[name]["data_offsets"] = chance.choice(
            [[], [0, 0], [4, 0], [0, 2**62], [-4, 0], [0, len(body) + 4], "x"]
        )
    else:
        header[name]["dtype"] = chance.choice(["F32", "F99", "", None, 1, "BOOL", "F64"])
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + body


def spoil_json(chance: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """Return a JSON file with one to three wrong fields, and their names."""
    fields, names = json.loads(data), []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        place: Any = fields
        name = chance.choice(sorted(place)) if place else None
        names.append(str(name))
        while isinstance(place.get(name), dict) and place[name] and chance.random() < 0.8:
            place = place[name]
            name = chance.choice(sorted(place))
            names.append(str(name))
        how = chance.random()
        if how < 0.25:
            place.pop(name, None)
        elif how < 0.35:
            extra = chance.choice(sorted(EXTRA))
            names.append(extra)
            place[extra] = copy.deepcopy(chance.choice(EXTRA[extra]))
        elif how < 0.45 and isinstance(place.get(name), list) and place[name]:
            place[name].insert(chance.randrange(len(place[name])), copy.deepcopy(chance.choice(JSON_WRONG)))
        elif name is not None:
            place[name] = copy.deepcopy(chance.choice(JSON_WRONG))
    return json.dumps(fields).encode(errors="surrogatepass"), names


def is_small(data: bytes) -> bool:
    """Return whether a configuration is not JSON, or has no large numbers."""
    try:
        numbers: list[float] = []
        json.loads(data, parse_int=lambda x: numbers.append(abs(float(x))), parse_float=str)
    except (ValueError, RecursionError):
        return True
    return max(numbers, default=0) <= 10 * MOST


def spoil(chance: random.Random, sound: Sound) -> tuple[dict[str, bytes | None], list[str]]:
    """Return the files that change, `None` for those that go, and the words of which an error may name one."""
    name = chance.choice([WEIGHTS] * 4 + [CONFIG] * 3 + sorted(sound.files))
    data, how = sound.files[name], chance.random()
    if name == WEIGHTS and how < 0.5:
        data, words = spoil_weights(chance, sound.weights)
        return {name: data}, [*words, name]
    if name == WEIGHTS and how < 0.7:
        return {name: spoil_header(chance, data)}, [name]
    if name.endswith(".json") and how < 0.7:
        data, words = spoil_json(chance, data)
        return {name: data}, [*words, name]
    kind = chance.choice(["bytes", "bytes", "cut", "gone", "empty", "pointer", "other", "index"])
    if kind == "gone":
        return {name: None}, [name]
    if kind == "index":
        index = f"{WEIGHTS}.index.json"
        parts = chance.choice([{}, {"lm_head.weight": WEIGHTS}, {"lm_head.weight": "../x.safetensors"}, {"a": 1}, []])
        fields = chance.choice([{"weight_map": parts, "metadata": {}}, {"weight_map": parts}, {}, [], 1])
        return {index: json.dumps(fields).encode()} | chance.choice([{WEIGHTS: None}, {}]), [index, WEIGHTS]
    other = sound.files[chance.choice(sorted(sound.files))]
    size = chance.randrange(len(data))
    made = {"cut": data[:size], "empty": b"", "pointer": POINTER, "other": other}
    changed = made[kind] if kind in made else spoil_bytes(chance, data, [other])
    while name == CONFIG and not is_small(changed):
        changed = spoil_bytes(chance, data)
    return {name: changed}, [name]


# ----------------------------------------------------------------------------------------------------------- cases


def try_checkpoint(chance: random.Random, sound: Sound) -> None:
    changed, words = spoil(chance, sound)
    try:
        for name, data in changed.items():
            write(sound.folder / name, data)
        check_checkpoint(sound, changed, words)
    finally:
        for name in changed:
            write(sound.folder / name, sound.files.get(name))


def write(path: Path, data: bytes | None) -> None:
    """Write a new file, or none. Weights that are in use may lie in the old one."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


def check_checkpoint(sound: Sound, changed: dict[str, bytes | None], words: list[str]) -> None:
    try:
        load_config(str(sound.folder))
        with named_faults(str(sound.folder)):
            processor, model = load_checkpoint(str(sound.folder))
    except ValueError as error:
        check_error(error, f"'{sound.folder}'")
        words = [*words, *(word for name in changed for word in WORDS.get(name, ()))]
        check_error(ValueError(str(error).replace(str(sound.folder), "")), *words)
        return
    if not {WEIGHTS, CONFIG} & set(changed):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, sound.weights[name]), name
    try:
        session = model.stream(processor, max_new_tokens=2)
        session.push(random_frames(1)[0])
    except ValueError as error:
        check_error(error)


@given(seed=SEEDS)
def test_a_spoilt_checkpoint_watches_a_frame_or_one_line_says_what_is_wrong(request, sound, seed):
    run_case(request, "checkpoint", seed, try_checkpoint, sound)
