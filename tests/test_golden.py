# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint computes is recorded beside it, and `videollm-mod verify` finds what changed since."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hub import Hub
from programs import run_command
from tiny import change_weights, copy_embedded, edit
from turns import turn_model, turn_processor

from videollm_mod.golden import FILE, make_frames, make_golden, verify_checkpoint, write_golden


ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path):
    return copy_embedded(tmp_path / "checkpoint")


def store_as(folder, dtype):
    change_weights(folder, lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    config = json.loads((folder / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    parts = {part: config[part] | {"dtype": name} for part in ("text_config", "vision_config")}
    edit(folder / "config.json", dtype=name, **parts)


def test_frames_are_the_same_on_every_machine():
    frames = make_frames(seed=0, count=3, height=20, width=33)
    assert frames.shape == (3, 20, 33, 3)
    assert hashlib.sha256(frames.tobytes()).hexdigest()[:16] == "95d8278f1c6bf2aa"
    assert (make_frames(seed=1, count=1, height=20, width=33) != frames[:1]).any()


def test_the_embedded_checkpoint_computes_what_its_record_says():
    """The record was made with the newest libraries, and the tests run with the oldest too."""
    done = run_command("verify", "--json")
    assert done.returncode == 0, done.stdout
    verdict = json.loads(done.stdout)
    assert verdict["equal"] and verdict["difference"] is None
    assert verdict["logits"] < 1e-3 and verdict["kept"] == 0, "far below the tolerance"


def scale_a_bias(weights):
    weights["model.connector.linear_1.bias"] *= 1.001
    return weights


def draw_anew(weights):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(weight.shape, generator=generator) * weight.float().std(correction=0)).to(weight.dtype)
        for name, weight in weights.items()
    }


def test_changes_are_found_and_named(checkpoint):
    config = checkpoint / "config.json"
    for change, said in (
        (
            lambda: change_weights(checkpoint, scale_a_bias),
            "1 of 142 weights differ; model.connector.linear_1.bias is",
        ),
        (lambda: change_weights(checkpoint, draw_anew), " of 142 weights differ; "),
        (lambda: edit(config, mod_keep_ratio=0.5), "in a session, routed layers keep other tokens"),
    ):
        change()
        done = run_command("verify", checkpoint)
        assert done.returncode == 1 and done.stdout.startswith("not equal: ") and said in done.stdout, done.stdout
        assert len(done.stdout.splitlines()) == 1
        copy_embedded(checkpoint)


def test_another_tokenizer_and_another_template_are_found(checkpoint):
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text().replace("User: ", "Somebody: "))
    difference = verify_checkpoint(str(checkpoint)).difference
    assert difference.startswith("the tokenizer or the chat template gives other tokens: number "), difference
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert verify_checkpoint(str(checkpoint)).difference == "the tokenizer has another vocabulary"


def test_other_settings_are_found(checkpoint):
    edit(checkpoint / "generation_config.json", max_frames=30)
    assert verify_checkpoint(str(checkpoint)).difference == "max_frames: 30, and it was 60"
    edit(checkpoint / "config.json", interval_threshold=0.6)
    assert verify_checkpoint(str(checkpoint)).difference == "interval_threshold: 0.6, and it was 0.5"


def test_another_dtype_has_its_own_tolerance(checkpoint):
    store_as(checkpoint, torch.bfloat16)
    verdict = verify_checkpoint(str(checkpoint))
    assert verdict.difference is None and verdict.tolerance.logits > 1e-2 and verdict.logits > 1e-3
    assert (verdict.made_with["dtype"], verdict.here["dtype"]) == ("float32", "bfloat16")
    edit(checkpoint / "config.json", mod_keep_ratio=20 / 64)
    assert "layer 2 keeps 20 of a frame and kept 13" in verify_checkpoint(str(checkpoint)).difference
    edit(checkpoint / "config.json", mod_keep_ratio=0.2)
    # Hashes of weights of another dtype say nothing, but outputs do.
    change_weights(checkpoint, draw_anew)
    assert "in a session, " in verify_checkpoint(str(checkpoint)).difference


def test_a_truncated_file_and_a_missing_record_have_one_line(checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[:-1000])
    done = run_command("verify", checkpoint)
    assert done.returncode == 1 and "model.safetensors is not a complete safetensors file" in done.stderr
    (checkpoint / FILE).unlink()
    done = run_command("verify", checkpoint)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1] == (
        f"error: '{checkpoint}' has no golden.json, which tells what it should compute. "
        f"`videollm-mod verify {checkpoint} --write` records what it computes now."
    )


def test_a_model_whose_passes_disagree_is_found(checkpoint, monkeypatch):
    """A session and one forward pass are checked separately."""
    from videollm_mod import golden

    forward = golden._forward

    def other(*arguments):
        seen = forward(*arguments)
        seen.logits[8] += torch.arange(seen.logits.shape[-1]) / 100
        return seen

    monkeypatch.setattr(golden, "_forward", other)
    difference = verify_checkpoint(str(checkpoint)).difference
    assert difference.startswith("in one forward pass, a log-probability at token 3 of the reply differs by"), (
        difference
    )


def test_a_format_with_text_around_frames(tmp_path):
    processor = turn_processor("internvl")
    turn_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_golden(make_golden(tmp_path), tmp_path / FILE)
    assert verify_checkpoint(str(tmp_path)).difference is None


def test_a_published_checkpoint_is_verified_on_the_hub(tmp_path, checkpoint):
    with Hub() as hub, hub.used_here(tmp_path / "home"):
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
        hub.repos["somebody/narrator"] = [files]
        done = run_command("verify", "somebody/narrator")
        assert done.returncode == 0 and done.stdout.startswith("equal: "), done.stderr
        done = run_command("verify", "somebody/narrator", "--write")
        assert done.returncode == 1 and "--write needs a folder" in done.stderr
        hub.repos["somebody/other"] = [{"config.json": (checkpoint / "config.json").read_bytes()}]
        done = run_command("verify", "somebody/other")
        assert done.returncode == 1 and "Publishing it again records what it computes now." in done.stderr
