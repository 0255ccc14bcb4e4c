# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Broken checkpoints: the command line, the page and `AutoModel` name the folder, the file and the fault."""

import json
import math

import app
import pytest
import torch
from loading import load_checkpoint, load_model
from programs import run_command, run_main
from published import save_live, save_source
from safetensors.torch import load_file, save_file
from tiny import change_weights, copy_embedded, edit
from typer.testing import CliRunner

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor, cli
from videollm_mod.convert.videollm_online import convert as convert_live
from videollm_mod.convert.vision_language import convert as convert_vision_language
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.train.language_model import LocalWriter
from videollm_mod.train.new_model import load_model as train_model
from videollm_mod.train.sft_arguments import ModelArguments


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def replace_in(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def point_to_parts(folder, parts=None):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": parts or {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_language_model(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=config["text_config"] | fields)


def edit_video_processor(folder, **fields):
    processor = json.loads((folder / "processor_config.json").read_text())
    edit(folder / "processor_config.json", video_processor=processor["video_processor"] | fields)


def change_tokenizer(folder, **fields):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    edit(folder / "tokenizer.json", model=tokenizer["model"] | fields)


def pickle_weights(folder, name="model.safetensors", pickled="pytorch_model.bin"):
    """Replace a safetensors file by a pickled one that Transformers and PEFT would read."""
    torch.save(load_file(folder / name), folder / pickled)
    (folder / name).unlink()


def cut(folder, name, size=200):
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


# How a checkpoint is broken, and what is said about it; the last if the configuration is sound, so `inspect` works.
FAULTS = {
    "pointer": (lambda f: (f / "model.safetensors").write_bytes(POINTER), "model.safetensors is a Git LFS pointer", 1),
    "weights cut": (lambda f: cut(f, "model.safetensors", 100_000), "model.safetensors is not a complete safetens", 1),
    "weights empty": (lambda f: cut(f, "model.safetensors", 0), "model.safetensors is empty", 1),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no weights: model.safetensors is missing", 1),
    "pickled weights": (pickle_weights, "other files of weights are pickled: they may run code when they are read", 1),
    "no part": (point_to_parts, "model-00001-of-00002.safetensors is missing, which model.safetensors.index.json", 1),
    "other shapes": (widen, "is (128,) in the checkpoint and (256,) in the model", 1),
    "too few weights": (
        lambda f: change_weights(f, lambda w: {k: v for k, v in w.items() if "connector" not in k}),
        "4 of the model's weights are missing, such as model.connector.linear_1.bias",
        1,
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer that loads: tokenizer.json", 1),
    "tokenizer cut": (lambda f: cut(f, "tokenizer.json"), "tokenizer.json is not complete JSON", 1),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "has no video processor that loads", 1),
    "other processor": (
        lambda f: edit(f / "processor_config.json", frame_num_tokens=9),
        "`frame_num_tokens` is 9 by processor_config.json and the tokenizer, and 64 by config.json",
        1,
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja is missing", 1),
    "bad template": (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), "Expected an expression", 1),
    "no code": (lambda f: (f / "modeling_videollm_mod.py").unlink(), "modeling_videollm_mod.py is missing", 1),
    "long name of code": (
        lambda f: edit(f / "config.json", auto_map={"AutoConfig": "x" * 300}),
        "xxx... is missing",
        0,
    ),
    "config cut": (lambda f: cut(f, "config.json"), "config.json is not complete JSON", 0),
    "config empty": (
        lambda f: (f / "config.json").write_text("{}"),
        "Should have a `model_type` key",
        0,
    ),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a JSON object", 0),
    "bad layers": (lambda f: edit(f / "config.json", mod_layers=[1, 99]), "`mod_layers` names layer 99", 0),
    "bad ratio": (
        lambda f: edit(f / "config.json", mod_keep_ratio=1.5),
        "`mod_keep_ratio` must lie in [0, 1]",
        0,
    ),
    "bad type": (
        lambda f: edit(f / "config.json", mod_keep_ratio="0.5"),
        "'mod_keep_ratio' with value '0.5'",
        0,
    ),
    "no dtype": (lambda f: edit(f / "config.json", dtype="float33"), "no attribute 'float33'", 0),
    "no language model": (
        lambda f: edit(f / "config.json", text_config=None),
        "config.json has no `text_config`",
        0,
    ),
    "no type and no language model": (
        lambda f: edit(f / "config.json", model_type=None, text_config=None),
        "config.json has no `text_config`",
        0,
    ),
    "no layers": (
        lambda f: change_language_model(f, num_hidden_layers=0),
        "`num_hidden_layers` of the language model must be at least 1, got 0",
        0,
    ),
    "parts of nothing": (
        lambda f: point_to_parts(f, [1]),
        "model.safetensors.index.json must have a `weight_map` from names",
        1,
    ),
    "no padding": (
        lambda f: edit(f / "tokenizer.json", padding=1),
        "tokenizer.json: invalid type: integer `1`",
        1,
    ),
    "template in Latin 1": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template.jinja: 'utf-8' codec can't decode byte 0xff",
        1,
    ),
    "nothing before a reply": (
        lambda f: replace_in(f / "chat_template.jinja", "add_stream_generation_prompt", "nothing"),
        "chat_template.jinja, with the tokenizer and the processor: no text begins a reply",
        1,
    ),
    "billions of tokens": (  # a text of one frame would take gigabytes
        lambda f: edit(f / "processor_config.json", frame_num_tokens=10**10),
        "processor_config.json: `frame_num_tokens` must be a whole number from 1 to 100,000, got 10000000000",
        1,
    ),
    "no class of the processor": (
        lambda f: edit(f / "processor_config.json", auto_map={}),
        "processor_config.json: `frame_num_tokens` must be a whole number from 1 to 100,000, got None",
        1,
    ),
    "long prefix of words": (  # the library tokenizers panics
        lambda f: change_tokenizer(f, continuing_subword_prefix="x" * 300),
        "tokenizer.json: ",
        1,
    ),
    "no end of replies": (
        lambda f: edit(f / "tokenizer_config.json", eos_token=""),
        "tokenizer_config.json: `eos_token` is no token: ''",
        1,
    ),
    "other token": (
        lambda f: edit(f / "processor_config.json", frame_token_interval=7),
        "processor_config.json, with the tokenizer: ",
        1,
    ),
    "other resampling": (
        lambda f: edit_video_processor(f, resample={}),
        "processor_config.json: Argument interpolation should be",
        1,
    ),
    "other ends": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[[2]]),
        "generation_config.json: `eos_token_id` must be a number or several, got [[2]]",
        1,
    ),
    "other attention": (
        lambda f: edit(f / "config.json", attn_implementation=1),
        "config.json, with the weights: 'int' object has no attribute 'startswith'",
        1,
    ),
    "typo": (lambda f: edit(f / "config.json", mod_keep_ration=0.5), "Did you mean `mod_keep_ratio`?", 0),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return copy_embedded(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def broken(request, sound, tmp_path):
    """A copy of the embedded checkpoint with one fault."""
    for path in sound.rglob("*"):
        if path.is_file() and path.parent == sound:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    FAULTS[request.param][0](tmp_path)
    return tmp_path


@pytest.mark.parametrize(("broken", "fault"), [(name, name) for name in FAULTS], indirect=["broken"])
def test_a_broken_checkpoint_is_named_in_one_line(broken, fault):
    _, message, inspects = FAULTS[fault]
    for command in (["narrate", "--model", str(broken)], ["inspect", str(broken)]):
        done = CliRunner().invoke(cli.app, command)
        assert isinstance(done.exception, SystemExit) or done.exception is None, done.exception
        if command[0] == "inspect" and inspects:
            assert done.exit_code == 0
            continue
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.exit_code == 1 and len(said) == 1 and done.stdout == "", done.stderr
        assert f"'{broken}'" in said[0] and message in said[0], said


def test_pickled_weights_of_any_model_are_refused(tmp_path):
    """The model itself, the parts of a new model, a model to convert, an adapter, and a language model that writes."""
    folder = copy_embedded(tmp_path / "copy")
    pickle_weights(folder)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        VideoLLMMoDForConditionalGeneration.from_pretrained(folder)
    assert VideoLLMMoDForConditionalGeneration.from_pretrained(folder, use_safetensors=False).num_parameters() > 0
    with pytest.raises(
        SystemExit, match=f"'{folder}' cannot be loaded: model.safetensors is missing, and other files"
    ):
        train_model(ModelArguments(checkpoint=str(folder)), seed=0)

    base, vision, adapter = (tmp_path / name for name in ("base", "vision", "adapter"))
    save_live(base, vision, adapter)
    parts = {"vision_model": str(vision), "language_model": str(base)}
    for part in (vision, base):
        pickle_weights(part)
        with pytest.raises(SystemExit, match=f"'{part}' cannot be loaded: .* `AutoModel.from_pretrained"):
            train_model(ModelArguments(**parts), seed=0)
        with pytest.raises(ValueError, match=f"'{part}' cannot be loaded: model.safetensors is missing"):
            convert_live(str(base), str(adapter), tmp_path / "out", vision_model=str(vision))
        if part == vision:
            save_file(
                torch.load(part / "pytorch_model.bin", weights_only=True), part / "model.safetensors", {"format": "pt"}
            )
    with pytest.raises(ValueError, match=f"language model '{base}' cannot be loaded: .* are pickled"):
        LocalWriter(str(base))
    pickle_weights(adapter, "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(
        ValueError, match=f"'{adapter}' has no adapter_model.safetensors. An adapter_model.bin is pickled"
    ):
        convert_live(str(base), str(adapter), tmp_path / "out", vision_model=str(vision))

    source = tmp_path / "llava"
    save_source("llava", source)
    pickle_weights(source)
    with pytest.raises(ValueError, match=f"'{source}' cannot be loaded: .* are pickled"):
        convert_vision_language(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_name_the_folder(tmp_path):
    folder = copy_embedded(tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"^'{folder}' has no tokenizer that loads"):
        VideoLLMMoDProcessor.from_pretrained(folder)
    widen(folder)
    with pytest.raises(ValueError, match=f"weights of '{folder}' have other shapes than its configuration says"):
        VideoLLMMoDForConditionalGeneration.from_pretrained(folder)
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.config.text_config.hidden_size == 256
    cut(folder, "model.safetensors", 1000)
    with pytest.raises(ValueError, match=f"A safetensors file of '{folder}' is not complete"):
        VideoLLMMoDForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    folder = copy_embedded(tmp_path / "copy")

    def spoil(weights):
        weights["model.connector.linear_1.bias"][3] = value
        return weights

    change_weights(folder, spoil)
    with pytest.raises(ValueError, match="1 of [0-9]+ weights hold NaN or infinity, such as model.connector.linear_1"):
        load_checkpoint(str(folder))


def test_a_wrong_model_type_is_answered_with_the_closest_ones(tmp_path):
    folder = copy_embedded(tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=config["text_config"] | {"model_type": "lama"})
    failed = run_command("inspect", folder)
    fault = "config.json: 'lama' is no model type that Transformers knows; did you mean "
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: '{folder}' cannot be loaded: {fault}")
    assert "llama" in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_weights_that_are_not_used_are_said(sound, tmp_path, caplog):
    load_model(str(sound), mod_keep_ratio=1.0)
    assert not [r for r in caplog.records if r.name == "loading"], "full compute needs no routers"
    folder = copy_embedded(tmp_path / "copy")
    change_weights(folder, lambda weights: weights | {"extra.weight": torch.zeros(2)})
    load_checkpoint(str(folder))
    said = [record.message for record in caplog.records if record.name == "loading"]
    assert said == ["1 of the checkpoint's weights are not used, such as extra.weight."]


def test_the_page_names_the_fault(tmp_path):
    folder = copy_embedded(tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(POINTER)
    done = run_main(app.main, "--model", folder, program="app.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: '{folder}' cannot be loaded: model.safetensors is a Git LFS pointer" in done.stderr


def test_the_home_folder_stands_in_place_of_its_sign(tmp_path, monkeypatch):
    """A shell leaves it in `--model=~/smol`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "config.json").write_text("{}")
    assert check_checkpoint("~/smol") == str(tmp_path / "smol")
