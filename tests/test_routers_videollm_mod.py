# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Router types: their scores, and which of them are refused. `test_routing_videollm_mod.py` runs them in models."""

import logging
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config
from torch.testing import assert_close
from transformers.utils.logging import warning_once

from videollm_mod.routers_videollm_mod import ROUTERS, ChangeRouter, LearnedRouter, position_noise
from videollm_mod.train.arguments import ModelArguments


def test_position_noise_is_even_and_differs_by_layer():
    noise = position_noise(torch.arange(100_000), 3)
    assert noise.min() >= 0 and noise.max() < 1
    assert_close(noise.mean(), torch.tensor(0.5), atol=0.01, rtol=0)
    assert_close(torch.histc(noise, 10, 0, 1) / 1e4, torch.ones(10), atol=0.05, rtol=0)
    assert torch.corrcoef(torch.stack([noise, position_noise(torch.arange(100_000), 4)]))[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1].abs() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_that_rounding_explains_is_none(dtype):
    x = torch.randn(1, 2, 10, 32).to(dtype)
    noise = torch.randint(-1, 2, x.shape) * x * torch.finfo(dtype).eps
    scores = ChangeRouter.score_frames(x, x + noise)
    assert not torch.equal(x, x + noise) and scores.dtype == torch.float32 and not scores.any()
    assert ChangeRouter.score_frames(x, x * 0.95).all()
    assert_close(ChangeRouter.score_frames(x, torch.zeros_like(x)), x.float().norm(dim=-1))


def test_router_scores_of_bfloat16_are_float32():
    """Products are not rounded either: with large activations, as Llama has, that would change choices."""
    config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=256), mod_normalize_scores=False)
    router = LearnedRouter(config, 0)
    torch.nn.init.normal_(router.weight, std=0.005)
    router.to(torch.bfloat16)
    hidden = torch.randn(1, 50, 256, dtype=torch.bfloat16)
    hidden[..., 7] = 300.0
    scores = router(hidden)
    assert scores.shape == (1, 50, 1) and scores.dtype == torch.float32 and len(scores.unique()) == 50
    assert_close(scores.double(), hidden.double() @ router.weight.double().T, atol=1e-6, rtol=1e-5)
    assert router.double()(hidden.double()).dtype == torch.float64
    router.normalizes = True
    length = hidden.double().norm(dim=-1, keepdim=True)
    assert_close(router(hidden.double()), (hidden.double() / length) @ router.weight.double().T)


def test_the_training_script_accepts_router_types():
    fields = ModelArguments(checkpoint=".", mod_router="uniform").config_fields()
    assert fields == {"mod_router": "uniform"}
    assert all(name in ModelArguments.__dataclass_fields__["mod_router"].metadata["help"] for name in ROUTERS)


def test_a_learned_router_that_cannot_learn_is_refused_or_named(caplog):
    with pytest.raises(
        StrictDataclassError, match="cannot learn with `mod_gate='none'`: its gradient comes through the gate"
    ):
        tiny_config(mod_gate="none")
    tiny_config(mod_gate="none", mod_router="uniform")
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        tiny_config(mod_keep_ratio=0.1, mod_keep_last=False)
        assert not caplog.text
        tiny_config(mod_keep_ratio=0.1)
    assert "Routers have no choice in layers 1, 3: these keep 1 of 10 tokens per frame" in caplog.text
