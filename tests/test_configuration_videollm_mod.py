# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The configuration: derived layout, validation, saving and cost."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import SCHEMES, tiny_config
from transformers import AutoConfig, LlamaConfig, SiglipConfig, SiglipVisionConfig

from videollm_mod import VideoLLMMoDConfig


REFUSED = (ValueError, StrictDataclassError)


PIXEL_SHUFFLE = {"connector": "pixel_shuffle", "frame_token_cls": False, "frame_token_pooled": (2, 2)}


def test_defaults_are_the_papers():
    config = VideoLLMMoDConfig()
    assert config.frame_num_tokens == 10
    assert config.routed_layers == list(range(1, 32, 2))
    assert config.layer_keep_counts == [10, 2] * 16
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (4096, 1024)
    assert (config.frame_token_id, config.frame_token_interval_id, config.interval_threshold) == (128256, 11, 0.725)


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        ({"mod_layers": "interleaved"}, [1, 3]),
        ({"mod_layers": "interleaved_deep"}, [3]),
        ({"mod_layers": "all"}, [0, 1, 2, 3]),
        ({"mod_layers": "all_deep"}, [2, 3]),
        ({"mod_layers": [2, 0]}, [0, 2]),
        ({"mod_keep_ratio": [1, 0.5, 1.0, 0]}, [1, 3]),
        ({"mod_keep_ratio": 1.0, "mod_layers": "all"}, []),
        ({"mod_keep_ratio": 0.95, "mod_layers": "all"}, []),  # ceil(9.5) of 10 tokens is all of them
    ],
)
def test_routed_layers(options, routed):
    assert tiny_config(**options).routed_layers == routed


@pytest.mark.parametrize(
    ("ratio", "grid", "kept"),
    [(0.2, (3, 3), 2), (0.21, (3, 3), 3), (0.28, (4, 4), 5), (0.0, (3, 3), 0), (0.1, None, 1)],
)
def test_keep_count_rounds_up_without_binary_noise(ratio, grid, kept):
    config = tiny_config(mod_keep_ratio=[ratio] * 4, frame_token_pooled=grid)
    assert config.layer_keep_counts == [kept] * 4
    # 0.28 * 25 is 7.000000000000001 in floating point.
    square = VideoLLMMoDConfig(mod_keep_ratio=[0.28] * 32, frame_token_cls=False, frame_token_pooled=(5, 5))
    assert square.layer_keep_counts == [7] * 32


def test_only_layers_that_choose_have_a_router():
    assert tiny_config(mod_keep_ratio=[0.0, 0.5, 1.0, 0.2]).router_layers == [1, 3]
    assert tiny_config(mod_layers="all", mod_router="uniform").router_layers == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mod_keep_ratio": 1.5}, r"\[0, 1\], got 1.5"),
        ({"mod_keep_ratio": [0.2, 0.2]}, "2 ratios, but there are 4 layers"),
        ({"mod_keep_ratio": [0.2] * 4, "mod_layers": "all"}, "already gives one ratio per layer"),
        ({"mod_layers": "every_other"}, "known schemes are interleaved"),
        ({"mod_layers": [1, 4]}, "layer 4, but the decoder has layers 0 to 3"),
        ({"mod_layers": [-1]}, "layer -1"),
        ({"mod_router": "oracle"}, "`mod_router` is 'oracle'; known names are learned, uniform, random, change"),
        ({"mod_gate": "relu"}, "`mod_gate` is 'relu'; known names are linear, sigmoid, tanh, straight_through, none"),
        ({"mod_gate_on": "input"}, "mod_gate_on"),
        ({"mod_router_loss": "labels"}, "mod_router_loss"),
        ({"mod_router_loss_weight": -0.1}, "`mod_router_loss_weight` must be finite and not negative, got -0.1"),
        ({"mod_keep_ration": 0.2}, "Did you mean `mod_keep_ratio`"),
        ({"frame_tokens_cls": False}, "Did you mean `frame_token_cls`"),
        ({"frame_token_pooled": (5, 3)}, "5x3, but the vision encoder has only 4x4"),
        ({"frame_token_pooled": (3,)}, "two positive numbers"),
        ({"connector": "resampler"}, "known names are mlp, mlp_pool_after, pixel_shuffle"),
        ({"connector": "mlp_pool_after"}, "reads patches only: set `frame_token_cls=False`"),
        ({"connector": "pixel_shuffle", "frame_token_cls": False}, "4x4 patches must be .* is 3x3"),
        ({"connector": "pixel_shuffle", "frame_token_cls": False, "frame_token_pooled": (2, 1)}, "is 2x1"),
        (
            PIXEL_SHUFFLE | {"connector_pooling": "bilinear"},
            "does not pool patches: leave `connector_pooling` out",
        ),
        ({"connector_pooling": "max"}, "connector_pooling"),
        ({"connector_pool": "average"}, "Did you mean `connector_pooling`"),
        ({"vision_feature_layer": 0}, "layers from the end, -1 to -2, got 0"),
        ({"vision_feature_layer": -3}, "got -3"),
        ({"frame_token_cls": False, "frame_token_pooled": None}, "A frame needs tokens"),
        ({"frame_token_id": None}, "`frame_token_id` must be the id"),
        ({"frame_token_id": 2**63}, "`frame_token_id` must be the id"),
        ({"frame_token_interval_id": 100_000}, "outside the vocabulary"),
        ({"frame_token_interval_id": 1, "frame_token_id": 1}, "must differ"),
        ({"frame_token_interval_id": None, "text_overrides": {"eos_token_id": None}}, "target of silence"),
        ({"interval_threshold": 1.2}, "probability in"),
        ({"stream_loss_weight": -1.0}, "must be finite and not negative"),
        ({"stream_loss_weight": float("nan")}, "must be finite and not negative"),
        ({"mod_router_loss_weight": float("inf")}, "must be finite and not negative"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(REFUSED, match=message):
        tiny_config(**options)


def test_refuses_a_pooled_token_that_the_encoder_lacks():
    vision = SiglipVisionConfig(vision_use_head=False)
    with pytest.raises(REFUSED, match="vision_use_head"):
        VideoLLMMoDConfig(vision_config=vision)
    assert VideoLLMMoDConfig(vision_config=vision, frame_token_cls=False).frame_num_tokens == 9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saving_and_loading_keeps_all_fields(scheme, tmp_path):
    config = tiny_config(**SCHEMES[scheme])
    config.save_pretrained(tmp_path)
    loaded = VideoLLMMoDConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.layer_keep_counts == config.layer_keep_counts
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "videollm_mod"


def test_saving_checks_changed_fields(tmp_path):
    config = tiny_config()
    config.mod_layers = [9]
    with pytest.raises(REFUSED, match="layer 9"):
        config.save_pretrained(tmp_path)


def test_nested_configurations_come_as_objects_or_dicts():
    text, vision = LlamaConfig(num_hidden_layers=6), SiglipVisionConfig(image_size=64, patch_size=8)
    config = VideoLLMMoDConfig(text_config=text, vision_config=vision, frame_token_pooled=(8, 8), frame_token_id=9)
    assert config.text_config is text and config.vision_grid == (8, 8) and config.frame_num_tokens == 65
    assert config.get_text_config() is text
    assert VideoLLMMoDConfig(text_config={"num_hidden_layers": 3}).text_config.model_type == "llama"
    with pytest.raises(REFUSED):
        VideoLLMMoDConfig(text_config={"model_type": "no_such_model"})


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_stages_of_a_hierarchical_encoder_double_its_patches(kind):
    vision = {"model_type": kind, "image_size": 128, "patch_size": 4, "embed_dim": 32, "depths": [1, 2, 1]}
    config = VideoLLMMoDConfig(vision_config=vision, frame_token_cls=False, frame_token_pooled=(8, 8))
    assert config.vision_grid == (8, 8) and config.frame_feature_shape == (64, 128)
    assert config.with_frame_size(144).vision_grid == (9, 9)
    with pytest.raises(ValueError, match="`frame_size` is 132; it must be a multiple of .* patches, 16x16 pixels"):
        config.with_frame_size(132)
    with pytest.raises(REFUSED, match="`vision_config.image_size` is 132; it must be a multiple .* 16x16 pixels"):
        VideoLLMMoDConfig(**config.to_dict() | {"vision_config": vision | {"image_size": 132}})
    with pytest.raises(REFUSED, match="counts layers from the end, -1 to -1, got -2"):
        VideoLLMMoDConfig(**config.to_dict() | {"vision_feature_layer": -2})


def test_features_of_a_frame_depend_on_the_connector():
    options = {"frame_token_cls": False, "frame_token_pooled": (2, 2)}
    assert tiny_config(**options).frame_feature_shape == (4, 16)
    assert tiny_config(connector="mlp_pool_after", **options).frame_feature_shape == (16, 16)
    assert tiny_config(connector="pixel_shuffle", **options).frame_feature_shape == (4, 64)
    assert tiny_config(frame_token_pooled=(2, 2)).frame_feature_shape == (5, 16)
    tall = {"image_size": (64, 32), "patch_size": (8, 8)}
    config = VideoLLMMoDConfig(vision_config=tall, **PIXEL_SHUFFLE | {"frame_token_pooled": (4, 2)})
    assert config.pixel_shuffle_factor == 2 and config.frame_num_tokens == 8


def test_connectors_need_a_known_patch_grid():
    with pytest.raises(REFUSED, match="needs the patch grid, but `vision_config` .resnet. gives no `image_size`"):
        VideoLLMMoDConfig(vision_config={"model_type": "resnet", "hidden_size": 16}, **PIXEL_SHUFFLE)


@pytest.mark.parametrize("connector", ["mlp_pool_after", "pixel_shuffle"])
@pytest.mark.parametrize(("pooled", "said"), [(None, "A frame needs tokens"), ([2], "`frame_token_pooled`")])
def test_connectors_need_a_grid_of_tokens(connector, pooled, said):
    with pytest.raises(REFUSED, match=said):
        tiny_config(connector=connector, frame_token_cls=False, frame_token_pooled=pooled)


def test_an_image_text_configuration_provides_its_vision_part():
    assert VideoLLMMoDConfig(vision_config=SiglipConfig()).vision_config.model_type == "siglip_vision_model"


def test_tied_embeddings_follow_the_text_model():
    assert tiny_config(text_overrides={"tie_word_embeddings": True}).tie_word_embeddings


def test_auto_config_needs_no_registration_of_ours():
    with pytest.raises(ValueError, match="videollm_mod"):
        AutoConfig.for_model("videollm_mod")


@pytest.mark.parametrize("scheme", ["full", "interleaved", "all_deep", "early_exit"])
def test_estimate_adds_up(scheme):
    config = tiny_config(**SCHEMES[scheme])
    cost = config.estimate_cost(20, 50, bytes_per_value=4)
    assert cost.cache_entries == tuple(20 * count + 50 for count in config.layer_keep_counts)
    assert cost.cache_bytes == sum(cost.cache_entries) * 2 * 2 * 8 * 4  # keys and values, heads, head size, bytes
    assert cost.flops_ratio == cost.flops / cost.full_flops and (cost.flops_ratio == 1) == (scheme == "full")
    assert cost.cache_ratio <= 1
    # Two steps store as much as one and save the attention of the first step to the second.
    first = config.estimate_cost(12, 30, bytes_per_value=4)
    second = config.estimate_cost(8, 20, past_frames=12, past_text_tokens=30, bytes_per_value=4)
    assert second.cache_bytes == cost.cache_bytes and first.flops + second.flops < cost.flops


def test_estimate_matches_the_papers_arithmetic():
    # PAPERS: Interleaved at r = .2 costs .59 of the operations and .61 of the cache, All-Deep .24, All .19.
    for layers, flops, cache in (("interleaved", 0.59, 0.61), ("all_deep", 0.24, None), ("all", 0.19, None)):
        cost = VideoLLMMoDConfig(mod_layers=layers).estimate_cost(600, 0)
        assert cost.flops_ratio == pytest.approx(flops, abs=0.02)
        assert cache is None or cost.cache_ratio == pytest.approx(cache, abs=0.02)


def test_estimate_refuses_negative_counts_and_experts():
    with pytest.raises(ValueError, match="must not be negative"):
        tiny_config().estimate_cost(-1, 0)
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="experts"):
        VideoLLMMoDConfig(text_config=experts, mod_layers="all").estimate_cost(1, 1)
