# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compare vision-language models before and after conversion: the embeddings and the logits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published import save_llava
from tiny import tiny_vision_config
from transformers import (
    AutoModel,
    AutoProcessor,
    LlavaConfig,
    LlavaOnevisionConfig,
    VipLlavaConfig,
)

from videollm_mod.convert.llava import convert, main


ROOT = Path(__file__).parents[1]
KINDS = {
    "onevision": (LlavaOnevisionConfig, "siglip_vision_model", "qwen2", -1, "full"),
    "llava": (LlavaConfig, "clip_vision_model", "llama", -2, "default"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_logits_stay_the_same(tmp_path, kind):
    config_class, vision, text, layer, strategy = KINDS[kind]
    fields = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    theirs = save_llava(tmp_path / "theirs", config_class, tiny_vision_config(vision), text, **fields)
    size = theirs.config.vision_config.image_size
    grid = size // theirs.config.vision_config.patch_size
    left_out = convert(str(tmp_path / "theirs"), tmp_path / "ours", frame_token_pooled=(grid, grid))
    assert left_out == (["model.image_newline"] if kind == "onevision" else [])
    ours = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    picture = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    pixels = processor.video_processor(videos=[picture], return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(
        pixels[0, 0],
        (torch.tensor(picture[0]).permute(2, 0, 1) / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        / torch.tensor([0.2, 0.3, 0.4])[:, None, None],
    )
    with torch.no_grad():
        # With one token per patch, these are the embeddings before the newline token.
        outputs = theirs.model.vision_tower(pixels[0], output_hidden_states=True)
        features = outputs.hidden_states[layer][:, 1 if strategy == "default" else 0 :]
        expected = theirs.model.multi_modal_projector(features)
        torch.testing.assert_close(ours.model.get_video_features(pixels)[0], expected, rtol=1e-5, atol=1e-5)
        ids = torch.tensor([[5, 6, 7, *[ours.config.frame_token_id] * grid * grid, 8, 9]])
        table = theirs.get_input_embeddings()
        embeds = torch.cat([table(ids[:, :3]), expected, table(ids[:, -2:])], dim=1)
        logits = ours(input_ids=ids, pixel_values_videos=pixels).logits
        torch.testing.assert_close(logits, theirs(inputs_embeds=embeds).logits, rtol=1e-4, atol=1e-4)


def test_the_command_makes_a_routed_model_that_streams(tmp_path, monkeypatch, capsys):
    config_class, vision, text, _, _ = KINDS["onevision"]
    save_llava(tmp_path / "theirs", config_class, tiny_vision_config(vision), text, multimodal_projector_bias=False)
    command = [sys.executable, "convert/llava.py", tmp_path / "theirs", tmp_path / "ours"]
    options = ["--mod_layers", "interleaved", "--mod_keep_ratio", "0.5", "--frame_token_pooled", "2", "2"]
    done = subprocess.run([*map(str, command), *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not converted: model.image_newline, image pooling" in done.stdout
    assert f"wrote {tmp_path / 'ours'}." in done.stdout
    assert done.stderr == f"loading {tmp_path / 'theirs'} ...\n"
    monkeypatch.setattr(sys, "argv", [*map(str, command[1:3]), str(tmp_path / "again"), "--json"])
    main()
    told = {"folder": str(tmp_path / "again"), "not_converted": ["model.image_newline"]}
    assert json.loads(capsys.readouterr().out) == told
    model = AutoModel.from_pretrained(tmp_path / "ours", trust_remote_code=True).eval()
    assert model.config.layer_keep_counts == [4, 2, 4, 2] and not model.model.connector.linear_1.bias.any()
    session = model.stream(AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True), max_new_tokens=4)
    for seed in range(3):
        session.push(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    session.ask("What is this?")
    assert session.num_frames == 3 and session.events[-1].role == "assistant"
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "A frame is 2x2 tokens" in card and "2 of 4 layers are routed. They keep 2 of a frame's 4 tokens" in card


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (VipLlavaConfig, {}, "it also has projector_layernorm.bias"),
        (LlavaConfig, {"vision_feature_layer": [-1, -2]}, "Supported is one layer, counted"),
    ],
)
def test_unsupported_models_are_refused_and_nothing_is_written(tmp_path, config_class, fields, message):
    save_llava(tmp_path / "theirs", config_class, tiny_vision_config("clip_vision_model"), "llama", **fields)
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
