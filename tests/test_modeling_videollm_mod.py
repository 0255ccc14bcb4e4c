# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The model: outputs, gates, loss, gradients, cost, dtypes, adapters, quantisation and compilation."""

import copy
import json
import logging
import math
import re
from functools import partial
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
from packaging import version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import (
    IMAGE_SIZE,
    ROOT,
    SCHEMES,
    TEXT_MODELS,
    VISION_MODELS,
    CheckIndices,
    dialogue_ids,
    gate_of,
    random_features,
    random_frames,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_vision_config,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, DynamicCache, TorchAoConfig
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.logging import warning_once

from videollm_mod import (
    VideoLLMMoDConfig,
    VideoLLMMoDForConditionalGeneration,
    VideoLLMMoDProcessor,
    cache_videollm_mod,
    modeling_videollm_mod,
    routing_videollm_mod,
)
from videollm_mod.cache_videollm_mod import CACHE_NAME, TokenRun
from videollm_mod.configuration_videollm_mod import CONNECTORS
from videollm_mod.routers_videollm_mod import ROUTERS, VideoLLMMoDRouter


RUNS = [3, 1, 2]
# Up to torch 2.11 the counter does not know the CPU's fused attention and counts it as 0.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
COUNTED_ATTENTION = ["eager", "sdpa"] if _CPU_ATTENTION in flop_counter.flop_registry else ["eager"]


def inputs_for(model, runs=RUNS, seed=0):
    ids = dialogue_ids(model.config, runs, seed=seed)
    return {"input_ids": ids, "frame_features": random_features(model.config, sum(runs), seed=seed)}


def learnable_labels(config, ids):
    """Return labels for all text, including the token after each frame."""
    return ids.masked_fill(ids == config.frame_token_id, -100)


# ---------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("router", ["learned", "uniform", "random", "change"])
@pytest.mark.parametrize("keep_last", [True, False])
def test_every_frame_keeps_the_same_number_of_tokens(router, keep_last):
    model = tiny_model(mod_keep_ratio=[1.0, 0.2, 0.45, 0.0], mod_router=router, mod_keep_last=keep_last)
    outputs = model(**inputs_for(model), output_router_scores=True)
    kept = torch.stack(outputs.kept_tokens)
    assert kept.shape == (3, 1, 6, 10) and kept.sum(-1).tolist() == [[[2] * 6], [[5] * 6], [[0] * 6]]
    if keep_last:
        assert kept[:2, ..., -1].all()
    if router == "learned":
        for scores, mask in zip(outputs.router_scores[:2], outputs.kept_tokens[:2], strict=True):
            candidates = slice(0, -1) if keep_last else slice(None)
            lowest = scores[..., candidates][mask[..., candidates]].view(6, -1).min(-1).values
            highest = scores[..., candidates][~mask[..., candidates]].view(6, -1).max(-1).values
            assert (lowest >= highest).all()
    if router == "random":
        assert len({tuple(row.tolist()) for row in kept[1, 0]}) > 1


def test_scores_of_a_batch_are_zero_where_a_row_has_fewer_frames():
    model = tiny_model(mod_layers="all")
    ids = torch.zeros(2, 60, dtype=torch.long)
    long, short = dialogue_ids(model.config, [3]), dialogue_ids(model.config, [1])
    ids[0, : long.shape[1]], ids[1, : short.shape[1]] = long[0], short[0]
    outputs = model(
        input_ids=ids,
        frame_features=random_features(model.config, 3, batch=2),
        num_frames=[3, 1],
        output_router_scores=True,
    )
    for scores, kept in zip(outputs.router_scores, outputs.kept_tokens, strict=True):
        assert scores.shape == kept.shape == (2, 3, 10)
        assert kept.sum(-1).tolist() == [[2, 2, 2], [2, 0, 0]] and not scores[1, 1:].any()


def test_gates():
    scores = torch.linspace(-3, 3, 7)
    expected = {
        "linear": scores,
        "sigmoid": scores.sigmoid(),
        "tanh": 1 + 0.2 * scores.tanh(),
        "straight_through": torch.ones(7),
        "none": torch.ones(7),
    }
    for gate, values in expected.items():
        assert_close(gate_of(scores, gate), values)


def test_new_tanh_routers_start_as_the_plain_layer():
    model = VideoLLMMoDForConditionalGeneration(tiny_config(mod_gate="tanh"))
    assert all(not router.weight.any() for router in model.model.routers.values())
    linear = VideoLLMMoDForConditionalGeneration(tiny_config(mod_gate="linear"))
    assert all(router.weight.std() > 0 for router in linear.model.routers.values())


@pytest.mark.parametrize(
    "changed",
    [
        {"mod_keep_ratio": 0.4},
        {"mod_layers": "all"},
        {"mod_router": "uniform"},
        {"mod_router": "random"},
        {"mod_gate": "linear"},
        {"mod_router": "uniform", "mod_gate": "none"},
        {"mod_gate_on": "output"},
        {"mod_keep_last": False},
        {"connector_hidden_act": "relu"},
    ],
)
def test_every_routing_field_changes_the_logits(changed):
    base = tiny_model()
    other = tiny_model(**changed)
    state = {k: v for k, v in base.state_dict().items() if k in other.state_dict()}
    other.load_state_dict(state, strict=False)
    inputs = inputs_for(base)
    assert not torch.allclose(base(**inputs).logits, other(**inputs).logits, atol=1e-3)


def test_patches_come_from_the_chosen_layer_of_the_encoder():
    seen = [tiny_model(vision_feature_layer=layer) for layer in (None, -1, -2)]
    pixels = torch.randn(1, 3, 3, IMAGE_SIZE, IMAGE_SIZE)
    features = [model.model.encode_frames(pixels) for model in seen]
    for part in features[1:]:
        assert_close(part[:, :, :1], features[0][:, :, :1])  # the pooled token
    grids = [part[:, :, 1:] for part in features]
    assert not torch.allclose(grids[0], grids[1], atol=1e-3) and not torch.allclose(grids[1], grids[2], atol=1e-3)
    encoder = seen[0].model.vision_encoder
    last = encoder(pixels[0], output_hidden_states=True).hidden_states[-1]
    assert_close(encoder.post_layernorm(last), encoder(pixels[0]).last_hidden_state)


# ---------------------------------------------------------------------------------------------- inputs and outputs


def test_hidden_states_are_full_sequences():
    model = tiny_model(mod_layers="all")
    inputs = inputs_for(model)
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    assert all(h.shape == (1, inputs["input_ids"].shape[1], 32) for h in outputs.hidden_states)
    assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    # A skipped token passes a layer unchanged, a kept one does not.
    before, after = outputs.hidden_states[:2]
    kept = model(**inputs, output_router_scores=True).kept_tokens[0].flatten()
    frame = (inputs["input_ids"][0] == model.config.frame_token_id).nonzero().squeeze(1)
    same = (before[0, frame] == after[0, frame]).all(-1)
    assert torch.equal(same, ~kept)


def test_attentions_have_the_length_of_each_layers_own_sequence():
    model = tiny_model(attn_implementation="eager")
    inputs = inputs_for(model)
    length = inputs["input_ids"].shape[1]
    outputs = model(**inputs, output_attentions=True)
    lengths = [6 * count + length - 60 for count in model.config.layer_keep_counts]
    assert [a.shape for a in outputs.attentions] == [(1, 4, n, n) for n in lengths]
    assert all(torch.allclose(a.sum(-1), torch.ones(())) for a in outputs.attentions)
    assert model(**inputs).attentions is None
    model.config.output_attentions = model.config.output_hidden_states = True
    configured = model(**inputs)
    assert len(configured.attentions) == 4 and len(configured.hidden_states) == 5


def test_inputs_embeds_give_the_same_logits_as_input_ids():
    model = tiny_model(mod_layers="all")
    inputs = inputs_for(model)
    expected = model(**inputs)
    ids = inputs["input_ids"]
    mask = ids == model.config.frame_token_id
    embeddings = model.get_input_embeddings()(ids.masked_fill(mask, 0))
    features = inputs["frame_features"]
    got = model(inputs_embeds=embeddings, frame_token_mask=mask, frame_features=features)
    assert_close(got.logits, expected.logits)
    # Embeddings that already contain the frames need the mask only.
    embeddings = embeddings.clone()
    embeddings[mask] = model.model.connector(features).flatten(0, 2)
    assert_close(model(inputs_embeds=embeddings, frame_token_mask=mask).logits, expected.logits)
    assert not torch.allclose(model(inputs_embeds=embeddings).logits, expected.logits)


def test_pixels_give_the_same_logits_as_their_features():
    model = tiny_model()
    ids, pixels = dialogue_ids(model.config, RUNS), torch.randn(1, 6, 3, 32, 32)
    features = model.encode_frames(pixels)
    assert features.shape == (1, 6, 10, 16)
    assert_close(
        model(input_ids=ids, pixel_values_videos=pixels).logits, model(input_ids=ids, frame_features=features).logits
    )
    found = model.get_video_features(pixels)
    assert_close(found.pooler_output, model.model.connector(features))
    # As Transformers' models do.
    assert isinstance(found, BaseModelOutputWithPooling) and torch.equal(found.last_hidden_state, features)
    plain = model.get_video_features(pixels, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[1], found.pooler_output)


@pytest.mark.parametrize("vision", VISION_MODELS)
def test_frame_features_equal_the_encoders_outputs(vision):
    model = tiny_model(vision=vision, frame_token_pooled=(2, 2))
    pixels = torch.randn(2, 3, 32, 32)
    features = model.encode_frames(pixels)
    if vision == "siglip2_vision_model":
        # The library's image processor lays out patches like this: rows of (height, width, channels).
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 192)
        outputs = model.model.vision_encoder(
            patches, pixel_attention_mask=torch.ones(2, 16), spatial_shapes=torch.tensor([[4, 4]] * 2)
        )
    else:
        outputs = model.model.vision_encoder(pixels)
    assert_close(features[:, 0], outputs.pooler_output)
    grid = outputs.last_hidden_state[:, -16:].view(2, 2, 2, 2, 2, 16).mean(dim=(2, 4)).flatten(1, 2)
    assert_close(features[:, 1:], grid)


@pytest.mark.parametrize(("name", "reach"), [("local_model", 1), ("doom_model", 3)])
def test_how_far_a_token_of_a_local_model_sees(name, reach):
    fields = json.loads((ROOT / "train" / "configs" / f"{name}.json").read_text())["model"]
    model = tiny_model(VideoLLMMoDConfig(**fields | {"text_config": tiny_text_config()}, frame_token_id=9))
    pixels = torch.randn(1, 3, 128, 128)
    features = model.encode_frames(pixels)
    assert features.shape == (1, 64, 128) == (1, *model.config.frame_feature_shape)
    for row, column in ((3, 4), (4, 3), (0, 7)):
        changed = pixels.clone()
        changed[:, :, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] += 1.0
        differs = (model.encode_frames(changed) != features).any(dim=-1).view(8, 8)
        near = torch.zeros(8, 8, dtype=torch.bool)
        near[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = True
        assert torch.equal(differs, near) if reach == 1 else (differs <= near).all() and differs.sum() >= 9
    with pytest.raises(ValueError, match="Frames have 128x120 pixels, but SwinModel needs multiples .* 16x16 pixels"):
        model.encode_frames(pixels[..., :120])


@pytest.mark.parametrize("pooling", ["average", "bilinear"])
def test_the_mlp_connector_pools_before_or_after(pooling):
    """Bilinear sampling of a grid of 4x4 at 3x3 places is the library's `interpolate`."""
    pool = {
        "average": lambda grid: torch.nn.functional.adaptive_avg_pool2d(grid, (3, 3)),
        "bilinear": lambda grid: torch.nn.functional.interpolate(grid, size=(3, 3), mode="bilinear"),
    }[pooling]

    def pooled(patches):
        return pool(patches.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)

    options = {"frame_token_cls": False, "connector_pooling": pooling}
    before, after = (tiny_model(connector=name, **options) for name in ("mlp", "mlp_pool_after"))
    pixels = torch.randn(2, 3, 3, 32, 32)
    patches = after.encode_frames(pixels)
    assert patches.shape == (2, 3, 16, 16) and before.encode_frames(pixels).shape == (2, 3, 9, 16)
    found = after.get_video_features(pixels).pooler_output
    assert found.shape == (2, 3, 9, 32)
    assert_close(
        found.flatten(0, 1),
        pooled(
            after.model.connector.linear_2(
                after.model.connector.act(after.model.connector.linear_1(patches.flatten(0, 1)))
            )
        ),
    )
    assert_close(before.encode_frames(pixels).flatten(0, 1), pooled(patches.flatten(0, 1)))
    assert not torch.allclose(before.get_video_features(pixels).pooler_output, found)


@pytest.mark.parametrize("act", ["gelu", None])
def test_pixel_shuffle_concatenates_squares_of_patches(act):
    options = {"frame_token_cls": False, "frame_token_pooled": (2, 2), "vision_feature_layer": -1}
    model = tiny_model(connector="pixel_shuffle", connector_hidden_act=act, **options)
    connector, pixels = model.model.connector, torch.randn(2, 3, 32, 32)
    features = model.encode_frames(pixels)
    assert features.shape == (2, 4, 64) == (2, *model.config.frame_feature_shape)
    patches = model.model.vision_encoder(pixels, output_hidden_states=True).hidden_states[-1].unflatten(1, (4, 4))
    # The second token is the square of patches at the top right, row by row.
    assert torch.equal(features[:, 1], patches[:, :2, 2:].flatten(1))
    if act is None:
        assert {name for name, _ in connector.named_parameters()} == {"linear_1.weight"}
        assert_close(model.get_video_features(pixels).pooler_output, features @ connector.linear_1.weight.T)
    else:
        normal = torch.nn.functional.layer_norm(features, (64,))
        expected = connector.linear_2(torch.nn.functional.gelu(connector.linear_1(normal)))
        assert_close(model.get_video_features(pixels).pooler_output, expected)
    with pytest.raises(ValueError, match="Frames have 2 x 4 patches, but 'pixel_shuffle' needs 4 x 4"):
        model._patch_features(patches[:, :2].flatten(1, 2), (2, 4))


RESIZABLE = ("siglip_vision_model", "clip_vision_model", "siglip2_vision_model", "dinov2", "swin")
RESIZABLE += ("smolvlm_vision", "idefics3_vision", "internvl_vision")


def resizable_model(kind, **options):
    """A tiny model with an encoder of 4x4 patches at 32 pixels."""
    sizes = {"image_size": [32, 32], "patch_size": [8, 8]} if kind == "internvl_vision" else {}
    vision = tiny_vision_config(kind, **sizes)
    return tiny_model(VideoLLMMoDConfig(**tiny_config(**options).to_dict() | {"vision_config": vision}))


@pytest.mark.parametrize("kind", RESIZABLE)
def test_frames_of_another_size_are_encoded_as_the_encoder_does(kind, tmp_path):
    """Grids of 3x3 and 6x6 patches in place of 4x4, pooled to 3x3."""
    model, processor = resizable_model(kind, frame_token_cls=False), tiny_processor(frame_num_tokens=9)
    encoder = model.model.vision_encoder
    for side in (24, 48):
        model.set_frame_size(processor, side)
        pixels = torch.randn(2, 3, side, side)
        features = model.encode_frames(pixels)
        assert features.shape == (2, 9, 16) == (2, *model.config.frame_feature_shape)
        if kind != "siglip2_vision_model":
            asked = {"interpolate_pos_encoding": True} if kind.startswith(("siglip", "clip", "swin")) else {}
            patches = encoder(pixels, **asked).last_hidden_state[:, -((side // 8) ** 2) :]
            grid = patches.transpose(1, 2).unflatten(2, (side // 8, side // 8))
            expected = torch.nn.functional.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)
            assert_close(features, expected)
    session = model.stream(processor, max_new_tokens=2)
    session.push(random_frames(2, size=(30, 40)))
    assert session.num_frames == 2 and model.frame_size == (48, 48)
    with pytest.raises(ValueError, match="must be 48 x 48 pixels"):
        session.sample(torch.zeros(1, 3, 32, 32), time=9.0)
    assert model.estimate_cost(1, 1).vision_flops > resizable_model(kind).estimate_cost(1, 1).vision_flops
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(loaded.encode_frames(pixels), features)
    again = VideoLLMMoDProcessor.from_pretrained(tmp_path)
    assert again.resize_frames(random_frames(1)).shape == (1, 3, 48, 48) and loaded.config.frame_size == 48


@pytest.mark.parametrize(
    ("connector", "side", "tokens"), [("pixel_shuffle", 48, 9), ("mlp_pool_after", 16, 4), ("mlp", 24, 9)]
)
def test_the_connector_says_how_many_tokens_a_frame_of_another_size_has(connector, side, tokens):
    pooled = {"pixel_shuffle": (2, 2), "mlp_pool_after": (3, 3), "mlp": (3, 3)}[connector]
    options = {"frame_token_cls": False, "frame_token_pooled": pooled, "connector": connector}
    model = resizable_model("smolvlm_vision", **options)
    processor = tiny_processor(frame_num_tokens=math.prod(pooled))
    session = model.stream(processor, max_new_tokens=2, interval_threshold=0.004)
    session.push(random_frames(1))
    model.set_frame_size(processor, side)
    assert processor.frame_num_tokens == model.config.frame_num_tokens == tokens
    session = model.stream(processor, max_new_tokens=2, interval_threshold=0.004)
    session.push(random_frames(3))
    text = [event for event in session if event.role == "assistant"]
    assert session.num_frames == 3 and text
    ids = processor.apply_chat_template([{"role": "stream", "num_frames": 3}], tokenize=True, return_dict=False)
    assert ids.count(processor.frame_token_id) == 3 * tokens
    fresh = tiny_model(VideoLLMMoDConfig(**model.config.to_dict()))
    fresh.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, side, side)
    assert_close(fresh.get_video_features(pixels).pooler_output, model.get_video_features(pixels).pooler_output)


@pytest.mark.parametrize(
    ("options", "side", "message"),
    [
        ({}, 20, "`frame_size` is 20; it must be a multiple of the encoder's patches, 8x8 pixels"),
        ({}, 16, "only 2x2 patches: choose a grid no larger"),
        ({}, 0, "`frame_size` must be a whole number, at least 1, got 0"),
        ({"connector": "pixel_shuffle", "frame_token_pooled": (2, 2)}, 24, "2x2 patches: choose a multiple of 16 pix"),
        (
            {"connector": "pixel_shuffle", "frame_token_pooled": (2, 2), "mod_keep_ratio": 0.9},
            64,
            r"layers \[1, 3\] would be routed too, and they have no router",
        ),
    ],
)
def test_a_frame_size_that_does_not_fit_changes_nothing(options, side, message):
    options = {"frame_token_cls": False, **options}
    model, processor = resizable_model("siglip_vision_model", **options), tiny_processor()
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.set_frame_size(processor, side)
    assert model.config.to_dict() == before and processor.resize_frames(random_frames(1)).shape[-1] == 32


def test_an_encoder_with_positions_of_one_size_is_refused():
    model = resizable_model("aimv2_vision_model", frame_token_cls=False)
    message = "Aimv2VisionModel is not known to encode frames of other sizes"
    with pytest.raises(ValueError, match=message):
        model.set_frame_size(tiny_processor(), 48)
    with pytest.raises(ValueError, match=message):
        VideoLLMMoDForConditionalGeneration(VideoLLMMoDConfig(**model.config.to_dict() | {"frame_size": 48}))


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector_streams_and_can_be_adapted(connector, tmp_path):
    """A session reads the features that a full forward pass reads, and an adapter trains and saves the connector."""
    options = {"connector": connector, "frame_token_cls": False, "frame_token_pooled": (2, 2), "mod_layers": "all"}
    model, processor = tiny_model(**options), tiny_processor(frame_num_tokens=4)
    session = model.stream(processor, interval_threshold=0.0)
    frames = random_frames(3)
    for frame in frames:
        session.push(frame)
    assert session.num_frames == 3
    pixels = processor.process_frames(frames)
    features = model.encode_frames(pixels)
    ids = dialogue_ids(model.config, [2, 1])
    expected = model(input_ids=ids, pixel_values_videos=pixels[None]).logits
    assert_close(model(input_ids=ids, frame_features=features[None]).logits, expected)
    adapted = get_peft_model(model, model.make_lora_config(r=4))
    assert any("connector" in name and weight.requires_grad for name, weight in adapted.named_parameters())
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("connector" in name for name in saved) == len(model.model.connector.state_dict()) // 2


def test_logits_to_keep():
    model = tiny_model()
    inputs = inputs_for(model)
    full = model(**inputs).logits
    assert_close(model(**inputs, logits_to_keep=3).logits, full[:, -3:])
    places = torch.tensor([4, 17])
    assert_close(model(**inputs, logits_to_keep=places).logits, full[:, places])


def test_return_dict_false_returns_a_tuple():
    model = tiny_model()
    outputs = model(**inputs_for(model), return_dict=False)
    assert isinstance(outputs, tuple) and outputs[0].shape[-1] == model.config.text_config.vocab_size


@pytest.mark.parametrize("scheme", ["full", "all", "uniform", "random", "change"])
@pytest.mark.parametrize("rotary", [0, 1])
def test_layers_on_two_devices(scheme, rotary, monkeypatch):
    """Run on fake tensors, placed as accelerate does: a block moves its inputs to its device."""
    model = tiny_model(**SCHEMES[scheme])
    ids, features = dialogue_ids(model.config, [2, 1]), random_features(model.config, 3)
    for module in (modeling_videollm_mod, routing_videollm_mod):
        monkeypatch.setattr(module, "check_on_device", lambda *_: None)  # fake tensors have no values
    # Nor can they be pinned.
    monkeypatch.setattr(cache_videollm_mod, "to_device", lambda numbers, device: numbers.to(device))

    def moved(value, device):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(moved(item, device) for item in value)
        return {k: moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value

    def place(module, index):
        device = torch.device("cuda", index)
        for part in module.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                empty = torch.empty(weight.shape, device=device, dtype=weight.dtype)
                setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(buffer.shape, device=device, dtype=buffer.dtype))
        module.register_forward_pre_hook(lambda _, a, k: (moved(a, device), moved(k, device)), with_kwargs=True)

    with FakeTensorMode(), CheckIndices(), torch.no_grad():
        text = model.model.language_model
        for index, layer in enumerate(text.layers):
            place(layer, index // 2)
        for name, router in model.model.routers.items():
            place(router, int(name) // 2)
        for part, index in ((text.embed_tokens, 0), (text.norm, 1), (text.rotary_emb, rotary), (model.lm_head, 1)):
            place(part, index)
        place(model.model.connector, 0)
        ids = torch.empty(ids.shape, dtype=torch.long, device="cuda:0")
        inputs = {"input_ids": ids, "frame_token_mask": torch.empty(ids.shape, dtype=torch.bool, device="cuda:0")}
        inputs |= {"frame_features": torch.empty(features.shape, device="cuda:0"), "num_frames": [3]}
        outputs = model(**inputs, use_cache=True, output_router_scores=True)
        later = TokenRun(ids.shape[1] - 15, 2)
        model.evict_tokens(outputs.cache, [TokenRun(5), TokenRun(10, 1, stays=False), later])
        outputs = model(input_ids=ids[:, :1], cache=outputs.cache)
        assert outputs.logits.device == torch.device("cuda", 1)
        static = model.new_cache(max_lengths=[64] * 4)
        for given in (inputs, {"input_ids": ids[:, :1]}, {"input_ids": ids[:, :2]}):
            assert model(**given, cache=static).logits.device == torch.device("cuda", 1)
        assert model(**inputs, attention_mask=torch.ones_like(ids), use_cache=True).logits.shape[1] == ids.shape[1]
        for options in ({}, {"logits_to_keep": 1}):
            assert model(**inputs, **options, labels=ids).loss.device == torch.device("cuda", 1)
        assert model.train()(**inputs, labels=ids).loss.device == torch.device("cuda", 1)
        # Rows of different numbers of frames, with the gradient of routers.
        batch = {name: x.expand(2, *x.shape[1:]) for name, x in inputs.items() if name != "num_frames"}
        batch |= {
            "num_frames": [3, 1],
            "labels": ids.expand(2, -1),
            "attention_mask": torch.ones_like(ids).expand(2, -1),
        }
        with torch.enable_grad():
            assert model(**batch).loss.device == torch.device("cuda", 1)
        cache = model.eval()(**batch, use_cache=True, output_router_scores=True).cache
        if scheme != "change":  # the host must know which frames to remember
            cache.batch_select_indices(torch.empty(1, dtype=torch.long, device="cuda:0"))
        assert model(
            input_ids=ids[:, :1].expand(cache.layers[0].keys.shape[0], 1), cache=cache
        ).logits.device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_features": None}, "rows have \\[0\\] frames of 10 tokens.*found \\[60\\]"),
        ({"frame_features": 5}, "rows have \\[5\\] frames"),
        ({"num_frames": [7]}, "`num_frames` is \\[7\\]"),
        ({"num_frames": [3, 3]}, "batch of 1"),
        (
            {"frame_features": torch.zeros(1, 6, 9, 16)},
            "9 features of width 16 per frame; .* have 10",
        ),
        ({"frame_features": torch.zeros(6, 10, 16)}, "must be \\(batch, frames, features, width\\)"),
        ({"pixel_values_videos": torch.zeros(1, 6, 3, 32, 32)}, "not both"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "exactly one of"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, "two dimensions"),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "Give only `cache`"),
        ({"cache": DynamicCache()}, "layers \\[1, 3\\] are routed"),
        ({"labels": "inside"}, "`labels` must be -100 inside frames"),
        ({"frame_features": None, "frame_token_mask": "mask"}, "6\\] frames, but neither `pixel_values_videos` nor"),
        ({"attention_mask": torch.ones(1, 7)}, "`attention_mask` is 7 wide; .* 0 \\+ "),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "Give `seq_idx`, the index of each"),
        ({"seq_idx": torch.zeros(1, 9), "use_cache": True}, "are for training and have no cache"),
        ({"position_ids": torch.tensor([[*range(50), *range(50)]])}, "`position_ids` restart within a row"),
        ({"input_ids": "torn"}, "must stand together; others are within frame 0"),
    ],
)
def test_refuses(change, message):
    model = tiny_model()
    inputs = inputs_for(model) | change
    if inputs["frame_features"] == 5 if isinstance(inputs["frame_features"], int) else False:
        inputs["frame_features"] = random_features(model.config, 5)
    if isinstance(inputs["input_ids"], str):
        inputs["input_ids"] = inputs_for(model)["input_ids"].clone()
        inputs["input_ids"][0, :7] = inputs["input_ids"][0, :7].flip(0)
    if isinstance(inputs.get("frame_token_mask"), str):
        inputs["frame_token_mask"] = inputs["input_ids"] == model.config.frame_token_id
    if inputs.get("labels") == "inside":
        inputs["labels"] = inputs["input_ids"].clone()
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_any_cache_works_without_routed_layers():
    model = tiny_model(mod_keep_ratio=1.0)
    inputs = inputs_for(model)
    cache = DynamicCache()
    first = model(**inputs, past_key_values=cache)  # the name up to Transformers 5.23
    assert first.cache is first[CACHE_NAME] is cache
    step = model(input_ids=torch.tensor([[7]]), cache=cache)
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([[7]])], dim=1)}
    assert_close(step.logits, model(**whole).logits[:, -1:])


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        ({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2}, "missing: embed_tokens, layers"),
        ({"model_type": "granite", "num_hidden_layers": 2, "embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"model_type": "gemma2", "num_hidden_layers": 2}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "num_hidden_layers": 2}, "rotates positions differently by layer type"),
        # Transformers 5.24 says so itself.
        ({"model_type": "llama", "num_hidden_layers": 2, "head_dim": 7}, "`head_dim` must be even|even rotary dim"),
    ],
)
def test_refuses_text_models_of_another_shape(text_config, message):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    text_config = text_config | ({} if text_config["model_type"] == "gpt2" else sizes) | {"vocab_size": 50}
    options = {"text_config": text_config, "vision_config": tiny_vision_config(), "mod_layers": [1]}
    with pytest.raises(ValueError, match=message):
        VideoLLMMoDForConditionalGeneration(VideoLLMMoDConfig(**options, frame_token_id=50, frame_token_interval_id=3))


# ------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_text_plus_weighted_stream_over_the_number_of_labels():
    model = tiny_model(stream_loss_weight=3.0)
    inputs = inputs_for(model)
    ids = inputs["input_ids"]
    labels = learnable_labels(model.config, ids)
    labels[:, :5] = -100
    logits = model(**inputs).logits
    losses = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none")
    at_frame = ids[0, :-1] == model.config.frame_token_id
    count = (labels[0, 1:] != -100).sum()
    expected = (losses[~at_frame].sum() + 3 * losses[at_frame].sum()) / count
    assert_close(model(**inputs, labels=labels).loss, expected)
    assert (at_frame & (labels[0, 1:] != -100)).sum() == 6
    divided = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    assert_close(divided, expected * count / 7)


def test_training_computes_logits_at_labelled_positions_only():
    model = tiny_model()
    inputs = inputs_for(model) | {"labels": learnable_labels(model.config, inputs_for(model)["input_ids"])}
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].numel() // 32))
    outputs = model.train()(**inputs)
    length = inputs["input_ids"].shape[1]
    assert outputs.logits is None and rows == [length - 6 * 9]  # a frame needs one row of logits, not ten
    rows.clear()
    evaluated = model.eval()(**inputs)
    # The loss takes its rows from the logits.
    assert evaluated.logits.shape[1] == length and rows == [length]
    assert_close(evaluated.loss, outputs.loss)
    rows.clear()
    few = model(**inputs, logits_to_keep=1)
    assert_close(few.logits, evaluated.logits[:, -1:])
    assert_close(few.loss, outputs.loss)
    assert rows == [1, length - 6 * 9]


def test_a_batch_without_labels_has_a_finite_loss():
    model = tiny_model()
    inputs = inputs_for(model)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    assert loss == 0


def test_models_without_interval_token_learn_the_end_of_sequence_for_silence():
    model = tiny_model(frame_token_interval_id=None)
    inputs = inputs_for(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    first_end = int((inputs["input_ids"][0] == model.config.frame_token_id).nonzero()[0]) + 10
    labels[0, first_end] = 2
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits[0, first_end - 1], torch.tensor(2))
    assert_close(model(**inputs, labels=labels).loss, expected)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("gate", ["linear", "sigmoid", "tanh"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter_and_router(gate, checkpointing):
    model = tiny_model(mod_layers="all", mod_gate=gate).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = dialogue_ids(model.config, RUNS)
    outputs = model(
        input_ids=ids, pixel_values_videos=torch.randn(1, 6, 3, 32, 32), labels=learnable_labels(model.config, ids)
    )
    outputs.loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without
    assert checkpointing == (outputs.cache is None)


def test_checkpointed_layers_refuse_a_cache():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Checkpointed layers ignore the cache that is given"):
        model(**inputs_for(model), cache=model.new_cache())


@pytest.mark.parametrize("scheme", ["interleaved", "all", "early_exit"])
def test_checkpointing_leaves_gradients_unchanged(scheme):
    model = tiny_model(**SCHEMES[scheme]).train()
    inputs = inputs_for(model) | {"labels": learnable_labels(model.config, inputs_for(model)["input_ids"])}
    model(**inputs, use_cache=False).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name])


def test_padding_and_other_rows_get_no_gradient():
    model = tiny_model(mod_layers="all").train()
    ids = torch.zeros(2, 60, dtype=torch.long)
    long, short = dialogue_ids(model.config, [3]), dialogue_ids(model.config, [1])
    ids[0, : long.shape[1]], ids[1, : short.shape[1]] = long[0], short[0]
    features = random_features(model.config, 3, batch=2).requires_grad_()
    labels = torch.full_like(ids, -100)
    labels[1, : short.shape[1]] = learnable_labels(model.config, short)[0]
    model(input_ids=ids, frame_features=features, num_frames=[3, 1], labels=labels).loss.backward()
    assert not features.grad[0].any() and not features.grad[1, 1:].any() and features.grad[1, 0].any()


def test_routers_added_to_a_trained_model_start_without_a_jump():
    """Train both models on the same dialogues; the routed one starts from the weights of the full one."""
    full = tiny_model(mod_keep_ratio=1.0, seed=3).train()
    inputs = inputs_for(full) | {"labels": learnable_labels(full.config, inputs_for(full)["input_ids"])}

    def train(model, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(steps):
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    before = train(full, 60)
    config = copy.deepcopy(full.config)
    config.mod_keep_ratio, config.mod_layers = 0.2, "interleaved"
    routed = VideoLLMMoDForConditionalGeneration(config).train()
    missing = routed.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert missing and all("router" in name for name in missing)
    after_full, after_routed = train(full, 50), train(routed, 50)
    # Skipping tokens raises the loss at first; the gate must not raise it further.
    assert after_routed[0] < before[0] / 2 and after_routed[-1] < after_routed[0]
    assert after_routed[-1] < after_full[0] * 1.5
    ungated = copy.deepcopy(config)
    ungated.mod_router, ungated.mod_gate = "uniform", "none"  # new learned routers choose alike
    plain = VideoLLMMoDForConditionalGeneration(ungated)
    plain.load_state_dict(full.state_dict(), strict=False)
    fresh = VideoLLMMoDForConditionalGeneration(config)
    fresh.load_state_dict(full.state_dict(), strict=False)
    assert_close(fresh.eval()(**inputs).loss, plain.eval()(**inputs).loss)


# ------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("attention", COUNTED_ATTENTION)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_counted_operations_match_the_estimate(scheme, attention):
    model = tiny_model(**SCHEMES[scheme], attn_implementation=attention).requires_grad_(False)
    inputs = inputs_for(model, [8, 5, 9])
    ids = inputs["input_ids"]
    text = ids.shape[1] - 22 * 10
    with FlopCounterMode(display=False) as counter:
        outputs = model.train()(**inputs, labels=learnable_labels(model.config, ids), use_cache=True)
    cost = model.estimate_cost(22, text)
    assert counter.get_total_flops() == pytest.approx(cost.flops, rel=0.02)
    assert outputs.cache.lengths == list(cost.cache_entries)
    assert outputs.cache.num_bytes == cost.cache_bytes


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_counted_operations_match_with_every_text_model(text):
    model = tiny_model(text=text, attn_implementation="eager").requires_grad_(False)
    inputs = inputs_for(model, [8])
    ids = inputs["input_ids"]
    with FlopCounterMode(display=False) as counter:
        model.train()(**inputs, labels=learnable_labels(model.config, ids))
    assert counter.get_total_flops() == pytest.approx(model.estimate_cost(8, ids.shape[1] - 80).flops, rel=0.02)


@pytest.mark.parametrize("act", ["gelu", None])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_counted_operations_match_with_every_connector(connector, act):
    options = {"connector_hidden_act": act, "frame_token_cls": False, "frame_token_pooled": (2, 2)}
    model = tiny_model(connector=connector, **options, attn_implementation="eager").requires_grad_(False)
    features = random_features(model.config, 8)
    ids = dialogue_ids(model.config, [8])
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, frame_features=features, labels=learnable_labels(model.config, ids))
    text = ids.shape[1] - 8 * model.config.frame_num_tokens
    assert counter.get_total_flops() == pytest.approx(model.estimate_cost(8, text).flops, rel=0.02)


def test_counted_operations_of_one_more_frame_match():
    model = tiny_model(mod_layers="all_deep", attn_implementation="eager").requires_grad_(False)
    inputs = inputs_for(model, [8])
    cache = model(**inputs).cache
    past_text = inputs["input_ids"].shape[1] - 80
    ids = torch.tensor([[9] + [model.config.frame_token_id] * 10])
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids,
            frame_features=random_features(model.config, 1),
            cache=cache,
            logits_to_keep=torch.tensor([0, 10]),
        )
    cost = model.estimate_cost(1, 1, past_frames=8, past_text_tokens=past_text)
    assert counter.get_total_flops() == pytest.approx(cost.flops, rel=0.02)
    assert cache.lengths == list(cost.cache_entries) and cache.num_bytes == cost.cache_bytes


@pytest.mark.parametrize("vision", [*VISION_MODELS, "smolvlm_vision", "idefics3_vision", "internvl_vision"])
def test_counted_operations_of_the_encoder_match(vision):
    has_pooled_token = vision in VISION_MODELS
    model = tiny_model(vision=vision, frame_token_cls=has_pooled_token, attn_implementation="eager")
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.encode_frames(torch.randn(5, 3, 32, 32))
    assert counter.get_total_flops() == pytest.approx(model.estimate_cost(5, 0).vision_flops, rel=0.02)


# ----------------------------------------------------------------------------------------- dtypes, devices, adapters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = tiny_model()
    expected = model(**inputs_for(model)).logits
    model.save_pretrained(tmp_path)
    half = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype and half.model.routers["1"].weight.dtype == dtype
    logits = half(**inputs_for(model)).logits
    assert (
        logits.dtype == dtype
        and torch.corrcoef(torch.stack([logits.float().flatten(), expected.flatten()]))[0, 1] > 0.98
    )


def test_checkpoints_with_routers_beside_the_language_model_load(tmp_path):
    """Version 0.1 saved them as `model.routers.N`, and its configuration had no normalised scores."""
    model = tiny_model(mod_normalize_scores=False)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {re.sub(r"language_model\.layers\.(\d+)\.router", r"routers.\1", name): w for name, w in weights.items()}
    assert {name for name in old if "router" in name} == {"model.routers.1.weight", "model.routers.3.weight"}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("mod_normalize_scores") is False
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.mod_normalize_scores is False and tiny_config().mod_normalize_scores is True
    assert torch.equal(loaded(**inputs_for(model)).logits, model(**inputs_for(model)).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**inputs_for(model)).logits, model(**inputs_for(model)).logits)


def test_autocast():
    model = tiny_model().train()
    inputs = inputs_for(model) | {"labels": learnable_labels(model.config, inputs_for(model)["input_ids"])}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss) and all(router.weight.grad.any() for router in model.model.routers.values())


def test_device_map_and_offload(tmp_path):
    model = tiny_model()
    expected = model(**inputs_for(model)).logits
    model.save_pretrained(tmp_path)
    placed = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    assert_close(placed(**inputs_for(model)).logits, expected)
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    halves = {name: "disk" if "layers.1." in name or "layers.3.router" in name else "cpu" for name in names}
    offloaded = VideoLLMMoDForConditionalGeneration.from_pretrained(
        tmp_path, device_map=halves, offload_folder=tmp_path / "offload"
    )
    assert_close(offloaded(**inputs_for(model)).logits, expected)


def test_sharded_and_tied_checkpoints_load(tmp_path):
    for name, options in {"plain": {}, "tied": {"text_overrides": {"tie_word_embeddings": True}}}.items():
        model = tiny_model(**options)
        expected = model(**inputs_for(model)).logits
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        loaded, report = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_close(loaded(**inputs_for(model)).logits, expected)
        tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert tied == (name == "tied")


def test_resize_token_embeddings():
    model = tiny_model()
    expected = model(**inputs_for(model)).logits
    rows = model.config.text_config.vocab_size
    model.resize_token_embeddings(rows + 8)
    assert model.config.text_config.vocab_size == rows + 8 and model.lm_head.out_features == rows + 8
    assert_close(model(**inputs_for(model)).logits[..., :rows], expected)


def test_lora_with_the_models_own_settings_trains_routers_and_connector():
    model = tiny_model(mod_layers="all")
    expected = model(**inputs_for(model)).logits
    config = model.make_lora_config(r=4, lora_alpha=8)
    adapted = get_peft_model(model, config)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    for layer in range(4):
        assert any(f"layers.{layer}.router." in name for name in trained), f"the router of layer {layer} is frozen"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            assert any(f"layers.{layer}." in name and part in name and "lora" in name for name in trained)
    assert any("lm_head" in name for name in trained) and any("connector" in name for name in trained)
    assert not any("vision_encoder" in name or "embed_tokens" in name for name in trained)
    inputs = inputs_for(model) | {"labels": learnable_labels(model.config, inputs_for(model)["input_ids"])}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first step changes only LoRA's B; then A has a gradient
        adapted.train()(**inputs).loss.backward()
        optimizer.step()
        still = {n for n, p in adapted.named_parameters() if p.requires_grad and not p.grad.any()}
        optimizer.zero_grad()
    assert not still
    trained_logits = adapted.eval()(**inputs_for(model)).logits
    merged = adapted.merge_and_unload()
    assert_close(merged(**inputs_for(model)).logits, trained_logits, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(trained_logits, expected)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in tiny_model(mod_layers="all").named_parameters()}


@pytest.mark.parametrize("saved", [["connector"], None])
def test_lora_leaves_out_routers_with_linear_layers(saved):
    """Their names are no part of the language model, so a frozen router stays frozen."""

    class TwoLayers(VideoLLMMoDRouter):
        learns = is_pointwise = True

        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.up_proj = nn.Linear(config.text_config.hidden_size, 4)
            self.score = nn.Linear(4, 1)

        def forward(self, hidden_states, *_):
            return self.score(self.up_proj(hidden_states).relu()).float()

    with patch.dict(ROUTERS, two=TwoLayers):
        model = tiny_model(mod_layers="all", mod_router="two")
        adapted = get_peft_model(model, model.make_lora_config(r=2, modules_to_save=saved))
        routers = [name for name, w in adapted.named_parameters() if w.requires_grad and ".router." in name]
        assert not routers and any("layers.3.mlp.up_proj.lora_A" in name for name, _ in adapted.named_parameters())
        own = get_peft_model(tiny_model(mod_layers="all", mod_router="two"), model.make_lora_config(r=2))
        names = [name for name, w in own.named_parameters() if w.requires_grad and ".router." in name]
        assert len(names) == 4 * 4 and not any("lora" in name for name in names)


SKIPPED = ["lm_head", "model.connector", "model.vision_encoder"]


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    ],
    ids=["4 bits", "8 bits", "4 bits stored as bfloat16"],
)
def test_lora_refuses_a_quantised_connector_and_names_what_to_skip(tmp_path, options):
    tiny_model(text_overrides={"tie_word_embeddings": False}).save_pretrained(tmp_path)
    load = partial(VideoLLMMoDForConditionalGeneration.from_pretrained, tmp_path, dtype=torch.bfloat16)
    model = load(quantization_config=BitsAndBytesConfig(**options))
    with pytest.raises(ValueError, match=f"load the model with llm_int8_skip_modules={re.escape(str(SKIPPED))}"):
        model.make_lora_config(r=2)
    model.make_lora_config(r=2, modules_to_save=None)
    model = load(quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=SKIPPED))
    adapted = get_peft_model(model, model.make_lora_config(r=2))
    assert any(w.requires_grad and "connector" in name for name, w in adapted.named_parameters())


def test_merging_lora_leaves_a_tied_head_unchanged():
    model = tiny_model(text_overrides={"tie_word_embeddings": True})
    adapted = get_peft_model(model, model.make_lora_config(r=4, lora_alpha=8))
    inputs = inputs_for(model) | {"labels": learnable_labels(model.config, inputs_for(model)["input_ids"])}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted.train()(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapted.eval()(**inputs_for(model)).logits
    merged = adapted.merge_and_unload()
    assert_close(merged(**inputs_for(model)).logits, expected, atol=2e-5, rtol=1e-4)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


def test_fields_set_after_construction_are_checked_too(tmp_path):
    tiny_model(mod_keep_ratio=1.0).save_pretrained(tmp_path / "full")
    tiny_model(mod_keep_ratio=[1.0, 0.5, 1.0, 0.5]).save_pretrained(tmp_path / "list")
    load = VideoLLMMoDForConditionalGeneration.from_pretrained
    assert load(tmp_path / "list", mod_keep_ratio=0.2).config.layer_keep_counts == [10, 2, 10, 2]
    with pytest.raises(ValueError, match="names layer 9"):
        load(tmp_path / "full", mod_layers=[9])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 7"):
        load(tmp_path / "full", mod_keep_ratio=7.0)
    model = tiny_model()
    model.config.mod_layers = "all"
    with pytest.raises(ValueError, match="Layer 0 is routed but has no router: the model was built without one there"):
        model(**inputs_for(model))


def test_add_adapter_always_trains_the_routers(monkeypatch):
    if version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION):
        # Transformers 5.24 refuses the installed PEFT. This test is about the choice of modules.
        monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(any(f"layers.{layer}.router." in name for name in trained) for layer in (1, 3))


CHOSEN = ["q_proj", "v_proj"]


@pytest.mark.parametrize("target", ["all-linear", ["q_proj"], CHOSEN])
def test_other_lora_configs_train_the_routers_or_warn(target, caplog):
    model = tiny_model(mod_layers="all")
    inputs = inputs_for(model) | {"labels": learnable_labels(model.config, inputs_for(model)["input_ids"])}
    saved = model.router_names if target == CHOSEN else None
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target, modules_to_save=saved)).train()
    warning_once.cache_clear()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad and "router" in n}
    with caplog.at_level(logging.WARNING):
        adapted(**inputs).loss.backward()
    assert bool(trained) == (target == CHOSEN)
    assert ("routers of layers 0, 1, 2, 3 are frozen" in caplog.text) == (target != CHOSEN)


def test_int8_weights(tmp_path):
    """Quantise at loading, except the routers; gates and connector still work."""
    model = tiny_model(mod_layers="all")
    expected = model(**inputs_for(model)).logits.flatten()
    model.save_pretrained(tmp_path)
    quantized = VideoLLMMoDForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    layer = quantized.model.language_model.layers[0]
    assert type(layer.mlp.up_proj.weight.data) is not torch.Tensor and type(layer.router.weight.data) is torch.Tensor
    logits = quantized(**inputs_for(model)).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), expected]))[0, 1] > 0.98
    ids = quantized.generate(**inputs_for(model), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    length = inputs_for(model)["input_ids"].shape[1]
    assert ids.shape[1] == length + 4 and ids[0, length] == logits[0, -1].argmax()


# ------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("scheme", ["full", "interleaved", "all", "early_exit"])
def test_compiled_steps_do_not_recompile_from_frame_to_frame(scheme):
    torch.compiler.reset()
    model = tiny_model(**SCHEMES[scheme]).requires_grad_(False)
    text = model.config.text_config
    frames = 6
    cache, eager = (model.new_cache(max_lengths=[100] * 4) for _ in range(2))
    for each in (cache, eager):
        each.early_initialization(1, text.num_key_value_heads, text.head_dim, torch.float32, torch.device("cpu"))
    compiles = []
    step = torch.compile(model, fullgraph=True, backend=lambda graph, _: compiles.append(1) or graph.forward)
    prompt = torch.tensor([[5, 6, 7]])
    for each in (cache, eager):
        model(input_ids=prompt, cache=each)
    for index in range(frames):
        frame = {
            "input_ids": torch.tensor([[9] + [model.config.frame_token_id] * 10]),
            "frame_features": random_features(model.config, 1, seed=index),
            "logits_to_keep": 1,
        }
        expected = model(**frame, cache=eager).logits
        assert_close(step(**frame, cache=cache).logits, expected, atol=2e-5, rtol=1e-4)
        if index % 2:
            token = {"input_ids": torch.tensor([[11 + index]])}
            expected = model(**token, cache=eager).logits
            assert_close(step(**token, cache=cache).logits, expected, atol=2e-5, rtol=1e-4)
        if index == 1:
            both = len(compiles)
    assert both == 2 and len(compiles) == 2, "a frame step and a token step compile once each"
    assert cache.lengths == eager.lengths and int(cache.get_seq_length()) == int(eager.get_seq_length())


def test_declared_support_matches_the_backbones():
    model = tiny_model()
    assert model.can_record_outputs == {} and "attentions" in model.model.language_model.can_record_outputs
    # Layers are never split between devices.
    headless = tiny_config(frame_token_cls=False)
    headless.vision_config.vision_use_head = False
    for each in (model, VideoLLMMoDForConditionalGeneration(headless)):
        present = {type(module).__name__ for module in each.modules()}
        assert {"LlamaDecoderLayer", "SiglipEncoderLayer"} <= set(each._no_split_modules) <= present
    assert model._can_compile_fullgraph and model._supports_sdpa and model._supports_flex_attn
    for text in TEXT_MODELS:
        for vision in VISION_MODELS:
            inner = tiny_model(text=text, vision=vision).model
            text_model, encoder = inner.language_model, inner.vision_encoder
            assert text_model._supports_flash_attn and text_model._supports_flex_attn and text_model._supports_sdpa
            assert text_model._can_compile_fullgraph and text_model._supports_attention_backend
            assert encoder._supports_sdpa and encoder._supports_attention_backend
            # Two encoders have no flash attention; they raise their own error.
            assert encoder._supports_flash_attn == (vision not in ("siglip2_vision_model", "swin"))


def test_untested_text_models_of_the_right_shape_cause_a_warning(caplog):
    config = VideoLLMMoDConfig(
        text_config=tiny_text_config("olmo2"),
        vision_config=tiny_vision_config(),
        frame_token_id=399,
        frame_token_interval_id=3,
    )
    with caplog.at_level(logging.WARNING):
        VideoLLMMoDForConditionalGeneration(config)
    assert "Olmo2Model has the shape that routing needs, but was not tested" in caplog.text


# ----------------------------------------------------------------------------------------------------------- sharding


@pytest.fixture
def mesh():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fsdp2(model, mesh, *, language_model=False, **options):
    language = model.model.language_model
    # Frames replace embeddings before the language model runs, so these are a unit of their own, as in accelerate.
    parts = [*language.layers, *([language.embed_tokens, language] if language_model else [])]
    for part in [*parts, model]:
        fully_shard(part, mesh=mesh, **options)
    return model


def fsdp1(model, _mesh):
    layer = {type(model.model.language_model.layers[0])}
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=layer)
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy
    )


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SHARDINGS = {
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fsdp2 mixed": partial(fsdp2, mp_policy=MIXED),
    "fsdp2 language model": partial(fsdp2, language_model=True),
}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("how", SHARDINGS)
def test_sharded_training_equals_plain_training(tmp_path, mesh, how, quantised):
    """From a checkpoint in bfloat16. A sharding unit has one dtype, routers included."""
    untied, taught = {"tie_word_embeddings": False}, {"mod_router_loss": "gradient", "mod_keep_ratio": 0.4}
    tiny_model(text_overrides=untied, **taught).save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16}
    if quantised:
        skipped = ["lm_head", "model.connector", "model.vision_encoder"]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype="bfloat16",
            bnb_4bit_quant_storage="bfloat16",
            llm_int8_skip_modules=skipped,
        )
    losses, gradients, calls = [], [], []
    for shard in (None, SHARDINGS[how]):
        model = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path, **options)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        model.model.vision_encoder.requires_grad_(False)
        if quantised:
            torch.manual_seed(0)
            get_peft_model(model, model.make_lora_config(r=4, lora_dropout=0.0), autocast_adapter_dtype=False)
        routers = [router for name, router in model.named_modules() if name.endswith("router")]
        model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
        run = model.train() if shard is None else shard(model.train(), mesh)
        inputs = inputs_for(model)
        loss = run(**inputs, labels=learnable_labels(model.config, inputs["input_ids"])).loss
        loss.backward()
        losses.append(loss)
        weights = [next(w for w in router.parameters() if w.requires_grad) for router in routers]
        gradients.append([w.grad.full_tensor() if isinstance(w.grad, DTensor) else w.grad for w in weights])
    assert len(calls) == 2 and torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert one.any() and torch.equal(one, other)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("router, gate", [("learned", "tanh"), ("learned", "linear"), ("random", "none")])
def test_data_parallel_training_uses_every_weight(router, gate):
    model = tiny_model(mod_router=router, mod_gate=gate).train()
    model.model.vision_encoder.requires_grad_(False)
    parallel, inputs = DistributedDataParallel(model), inputs_for(model)
    for _ in range(2):  # the second step finds weights that the first did not use
        parallel(**inputs, labels=learnable_labels(model.config, inputs["input_ids"])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("connector", ["mlp", "mlp_pool_after"])
def test_one_frame_needs_no_leading_dimension(connector):
    model, processor = tiny_model(connector=connector, frame_token_cls=False), tiny_processor()
    pixels = processor.normalize_frames(processor.resize_frames(random_frames(2), model.device))
    with torch.no_grad():
        assert_close(
            model.get_video_features(pixels[1]).pooler_output, model.get_video_features(pixels).pooler_output[1]
        )
