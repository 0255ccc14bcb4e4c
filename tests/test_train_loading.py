# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Loading the checkpoint of a script: what it returns, and one line for a broken one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_processor

from videollm_mod.train.loading import load_checkpoint


def test_a_checkpoint_is_loaded_or_its_fault_is_one_line(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    loaded, processor = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert not loaded.training and loaded.dtype == torch.bfloat16
    assert processor.frame_num_tokens == model.config.frame_num_tokens
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .* weights hold NaN or infinity, such as lm_head.weight\.") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"error: .*model.safetensors"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_whose_parts_do_not_fit_is_refused(tmp_path):
    """Transformers would draw missing weights at random, and their figures would count."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[:-1]}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=rf"error: .* 1 of the model's weights are missing, such as {max(weights)}\."):
        load_checkpoint(tmp_path)
    model.config.frame_token_interval_id = 5
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="error: .* of different checkpoints: `frame_token_interval_id` is"):
        load_checkpoint(tmp_path)
