# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Router types: their scores, which of them are refused, and their loss. `test_routing_videollm_mod.py` runs them in
models.
"""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import dialogue_ids, gate_of, random_features, tiny_config, tiny_model
from torch.testing import assert_close
from transformers.utils.logging import warning_once

from videollm_mod.routers_videollm_mod import ChangeRouter, LearnedRouter, position_noise


def test_position_noise_is_even_and_differs_by_layer():
    noise = position_noise(torch.arange(100_000), 3)
    assert noise.min() >= 0 and noise.max() < 1
    assert_close(noise.mean(), torch.tensor(0.5), atol=0.01, rtol=0)
    assert_close(torch.histc(noise, 10, 0, 1) / 1e4, torch.ones(10), atol=0.05, rtol=0)
    assert torch.corrcoef(torch.stack([noise, position_noise(torch.arange(100_000), 4)]))[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1].abs() < 0.02


def test_position_noise_is_mulveys_mixer_in_32_bits():
    """The hash decides which tokens a checkpoint keeps, so it must never change."""
    with np.errstate(over="ignore"):
        for layer in (0, 1, 31):
            positions = torch.tensor([0, 1, 2, 1000, 2**16, 2**31 - 1])
            x = positions.numpy().astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(layer) * np.uint32(0x85EBCA6B)
            for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
                x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
            assert_close(position_noise(positions, layer).double(), torch.from_numpy(x / 2**32), atol=1e-7, rtol=0)


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


def test_a_learned_router_that_cannot_learn_is_refused_or_named(caplog):
    with pytest.raises(
        StrictDataclassError, match="cannot learn with `mod_gate='none'`: its gradient comes through the gate"
    ):
        tiny_config(mod_gate="none")
    tiny_config(mod_gate="none", mod_router="uniform")
    tiny_config(mod_gate="none", mod_router_loss="gradient")
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        tiny_config(mod_keep_ratio=0.1, mod_keep_last=False)
        assert not caplog.text
        tiny_config(mod_keep_ratio=0.1)
    assert "Routers have no choice in layers 1, 3: these keep 1 of 10 tokens per frame" in caplog.text


# -------------------------------------------------------------------------------------------------------- router loss


ROUTED = {"mod_layers": [0, 2, 3], "mod_keep_ratio": 0.5}
STRAIGHT = ({"mod_gate": "straight_through"}, {"mod_gate": "none", "mod_router_loss": "gradient"})


def rows(config):
    """Return two rows with three frames and one, with padding and a missing frame."""
    ids = torch.zeros(2, 60, dtype=torch.long)
    for row, runs in enumerate(([2, 1], [1])):
        tokens = dialogue_ids(config, runs, seed=row)[0]
        ids[row, : len(tokens)] = tokens
    labels = ids.masked_fill((ids == config.frame_token_id) | (ids == 0), -100)
    features = random_features(config, 3, batch=2)
    return {"input_ids": ids, "frame_features": features, "num_frames": [3, 1], "labels": labels, "use_cache": False}


def gradients_of(model, *, scale=1.0, **inputs):
    """Return the loss, and the gradient of each weight by name."""
    model.zero_grad()
    loss = model(**(rows(model.config) | inputs)).loss
    (scale * loss).backward()
    return loss, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_loss_reaches_routers_only(autocast):
    """The loss that is reported and all other gradients stay equal to the last bit; so does evaluation."""
    plain, taught = (tiny_model(**ROUTED, mod_router_loss=loss) for loss in (None, "gradient"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for mode in (False, True):
            (loss, expected), (same, found) = (gradients_of(model.train(mode)) for model in (plain, taught))
            assert torch.equal(loss, same) and expected.keys() == found.keys()
            for name, gradient in expected.items():
                assert torch.equal(gradient, found[name]) != (mode and "router" in name), name
                assert found[name].isfinite().all()


@pytest.mark.parametrize("keep_last, normalize", [(True, False), (False, True)])
def test_the_router_loss_is_cross_entropy_weighted_by_effects(keep_last, normalize):
    options = {"mod_gate": "none", "mod_keep_last": keep_last, "mod_normalize_scores": normalize}
    model = tiny_model(**ROUTED, **options, mod_router_loss="gradient", mod_router_loss_weight=0.3).double().train()
    entering = {}

    def remember(layer, inputs):
        inputs[0].retain_grad()
        entering[str(layer.layer_index)] = inputs[0]

    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(remember)
    inputs = rows(model.config)
    inputs["frame_features"] = inputs["frame_features"].double()
    outputs = model(**inputs, output_router_scores=True)
    outputs.loss.backward()
    for (layer, router), kept in zip(model.model.routers.items(), outputs.kept_tokens, strict=True):
        weight = router.weight.detach().requires_grad_()
        loss = 0.0
        for row, count in enumerate(inputs["num_frames"]):
            places = (inputs["input_ids"][row] == model.config.frame_token_id).nonzero().view(count, 10)
            for frame, index in enumerate(places):
                index = index[kept[row, frame]][: 4 if keep_last else None]
                x, gradient = entering[layer].detach()[row, index], entering[layer].grad[row, index]
                scores = (x / x.norm(dim=-1, keepdim=True) if normalize else x) @ weight[0]
                effects = gradient.norm(dim=-1) * x.norm(dim=-1)
                loss = loss - 0.3 * (effects * scores.log_softmax(dim=0)).sum()
        loss.backward()
        assert weight.grad.any()
        assert_close(router.weight.grad, weight.grad)


def test_the_router_loss_has_the_scale_of_the_loss():
    """So gradient accumulation and loss scaling treat both alike."""
    model = tiny_model(**ROUTED, mod_gate="none", mod_router_loss="gradient").double().train()
    features = random_features(model.config, 3, batch=2).double()
    _, once = gradients_of(model, frame_features=features)
    _, more = gradients_of(model, frame_features=features, scale=256.0)
    for name in model.router_names:
        assert_close(more[f"model.language_model.{name}.weight"], 256 * once[f"model.language_model.{name}.weight"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_the_router_loss_unchanged(reentrant):
    model = tiny_model(**ROUTED, mod_router_loss="gradient").train()
    _, expected = gradients_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, found = gradients_of(model)
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


def test_routers_learn_at_full_compute_and_have_gradients_without_frames():
    """So routers can watch a model at full compute, and data-parallel processes use every weight."""
    model = tiny_model(**ROUTED, mod_gate="none", mod_router_loss="gradient").train()
    routers = [router.weight for router in model.model.routers.values()]
    model.config.mod_keep_ratio = 1.0
    gradients_of(model)
    assert all(weight.grad.any() for weight in routers)
    text = torch.arange(5, 25)[None]
    gradients_of(model, input_ids=text, labels=text, frame_features=None, num_frames=None)
    assert all(weight.grad is not None and not weight.grad.any() for weight in routers)


@pytest.mark.parametrize("taught", [False, True])
def test_only_the_router_loss_teaches_which_token_matters(taught):
    """The loss depends on one token of each frame, and marks it. Its sign is random, so the gate learns nothing."""
    model = tiny_model(mod_layers=[1], mod_keep_ratio=0.5, mod_router_loss="gradient" if taught else None).train()
    model.requires_grad_(False)
    router = model.model.routers["1"]
    torch.nn.init.zeros_(router.weight.requires_grad_())
    optimizer = torch.optim.Adam([router.weight], lr=0.1)
    ids, mark, found = dialogue_ids(model.config, [8]), 3 * torch.randn(32), []
    places = (ids[0] == model.config.frame_token_id).nonzero().view(8, 10)
    for step in range(30):
        torch.manual_seed(step)
        marked = torch.randint(9, (8,))  # not the last, which is always kept
        embeddings = torch.randn(1, ids.shape[1], 32)
        embeddings[0, places[range(8), marked]] += mark
        outputs = model.model(
            inputs_embeds=embeddings,
            frame_token_mask=ids == model.config.frame_token_id,
            num_frames=[8],
            output_router_scores=True,
            use_cache=False,
        )
        found.append((outputs.router_scores[0][0, :, :9].argmax(dim=-1) == marked).float().mean())
        (outputs.last_hidden_state[0, places[range(8), marked]] * torch.randn(8, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (torch.stack(found[-5:]).mean() > 0.9) == taught


def test_a_router_loss_needs_routers_that_learn():
    model = tiny_model(mod_router="uniform", mod_router_loss="gradient")
    loss, _ = gradients_of(model)  # evaluation with other routers
    with pytest.raises(ValueError, match="`mod_router_loss='gradient'` trains routers that learn, and 'uniform' does"):
        gradients_of(model.train())


def test_straight_through_is_no_gate_with_the_gradient_of_the_sigmoid():
    scores = torch.linspace(-3, 3, 7).requires_grad_()
    gate = gate_of(scores, "straight_through")
    assert torch.equal(gate, torch.ones(7))
    gate.sum().backward()
    assert_close(scores.grad, scores.detach().sigmoid() * (1 - scores.detach().sigmoid()))
    losses = [gradients_of(tiny_model(**ROUTED, **options).train()) for options in STRAIGHT]
    assert torch.equal(losses[0][0], losses[1][0])
    routers = [name for name in losses[0][1] if "router" in name]
    assert len(routers) == 3 and all(losses[0][1][name].any() for name in routers)
