# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random configurations: a model of it runs a forward pass, or an error names the field."""

import copy
import json
import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from fuzzing import SEEDS, WRONG, check_error, run_case
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from tiny import TEXT_MODELS, VISION_MODELS, dialogue_ids, random_features, tiny_text_config, tiny_vision_config
from transformers import PreTrainedConfig

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration
from videollm_mod.space.checkpoint_faults import in_one_line


# Values that are often right, for each field of the configuration.
VALUES: dict[str, list[Any]] = {
    "frame_token_cls": [True, False],
    "frame_token_pooled": [(3, 3), [2, 2], [1, 1], [2, 1], None],
    "frame_size": [None, 32, 16],
    "vision_feature_layer": [None, -1, -2, 0, 1],
    "frame_token_id": [400, 300, 401, 7],
    "frame_token_interval_id": [None, 11, 390],
    "connector": ["mlp", "mlp_pool_after", "pixel_shuffle"],
    "connector_pooling": ["average", "bilinear"],
    "connector_hidden_act": ["gelu", None, "relu", "silu"],
    "mod_keep_ratio": [0.2, 0, 1, 0.0, 1.0, 0.28, [1.0, 0.5, 0.2, 0.0], (0.1, 0.2, 0.3, 1)],
    "mod_layers": [None, "interleaved", "interleaved_deep", "all", "all_deep", [], [0], (1,)],
    "mod_router": ["learned", "change", "uniform", "random"],
    "mod_gate": ["linear", "sigmoid", "tanh", "straight_through", "none"],
    "mod_gate_on": ["update", "output"],
    "mod_keep_last": [True, False],
    "mod_normalize_scores": [None, True, False],
    "mod_router_loss": [None, "gradient"],
    "mod_router_loss_weight": [0, 0.0, 1, 0.3],
    "stream_loss_weight": [0, 1.0, 2],
    "interval_threshold": [0, 1, 0.5, 0.725],
    "speak": ["learned", "every", "change", "probe"],
    "tie_word_embeddings": [True, False],
}
# Values that are nearly right.
CLOSE: list[Any] = [[5, 5], [0, 3], [3], [1, 2, 3], [2.5, 2], [-1, -1], 40, 7, 8, -9, "swish2", [1, 1], [None] * 4]
CLOSE += [[0, 2], [3, 3], [-1], ["1"], [0.5, float("nan"), 1, 1], [True, 1, 1, 1], "Interleaved", "mean"]
CLOSE += [[None], [8, None], [[8]], {"height": 8, "width": 8}]
# Without numbers that would fill the memory.
SMALL = [value for value in WRONG if not isinstance(value, (int, float)) or abs(value) < 100]
# Fields of the two models that decide whether ours fits around them.
TEXT = {
    "num_hidden_layers": [0, 1, -1],
    "hidden_size": [0, 31, 64],
    "intermediate_size": [0, 1],
    "num_attention_heads": [2, 0, 3, -4],
    "num_key_value_heads": [1, 0, 3, 4],
    "head_dim": [None, 0, 7],
    "vocab_size": [405, 0, 20],
    "max_position_embeddings": [0, 10],
    "eos_token_id": [None, [2, 3], 500],
    "pad_token_id": [None, 900, -1],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 100.0}, {}, {"rope_type": "none"}, {"rope_theta": 0.5}],
    "hidden_act": ["relu", "nothing"],
    "model_type": [*TEXT_MODELS, "gpt2", "gemma", "nothing"],
}
VISION = {
    "image_size": [8, 0, 31, [32, 32], [32], [None], [32, None], {"height": 32, "width": 32}],
    "patch_size": [16, 0, 7, 64, [8, 8], None, [None], [8, 8, 8], ["8"], [[8]]],
    "num_hidden_layers": [1, 0, [None], [2]],
    "hidden_size": [0, 15, [16], {}],
    "num_attention_heads": [0, 3, [None, 2]],
    "num_channels": [1, -1, None, [3]],
    "num_patches": [4, -1, 2, [None], "16"],
    "initializer_range": [0.1, -1, float("nan"), [None]],
    "hidden_act": ["relu", "nothing", 8],
    "model_type": [*VISION_MODELS, "resnet", "nothing"],
}
# The words by which an error names a field.
NAMES = [*VALUES, *TEXT, *VISION, "text_config", "vision_config", "hidden size", "model type", "model identifier"]
NAMES += ["embed_dim", "num_heads", "GPT2Model"]


def test_each_field_is_drawn():
    own, base = ({field.name for field in fields(kind)} for kind in (VideoLLMMoDConfig, PreTrainedConfig))
    assert own - base - {"text_config", "vision_config"} == set(VALUES)


def draw(chance: random.Random) -> dict[str, Any]:
    """Return the fields of a configuration, with none to a few of them wrong."""
    text = tiny_text_config(chance.choice(TEXT_MODELS), num_hidden_layers=chance.choice([2, 4, 4]))
    options = {"text_config": text, "vision_config": tiny_vision_config(chance.choice(VISION_MODELS))}
    options |= {"frame_token_id": 400, "frame_token_interval_id": 11}
    for name in chance.sample(sorted(VALUES), chance.randrange(7)):
        options[name] = copy.deepcopy(chance.choice(VALUES[name]))
    if chance.random() < 0.3:
        options[chance.choice(sorted(VALUES))] = copy.deepcopy(chance.choice(chance.choice([WRONG, CLOSE])))
    for part, known in (("text_config", TEXT), ("vision_config", VISION)):
        how = chance.random()
        if how < 0.15:
            name = chance.choice(sorted(known))
            options[part][name] = copy.deepcopy(chance.choice(known[name]))
        elif how < 0.2:
            options[part][chance.choice(sorted(known))] = copy.deepcopy(chance.choice([*SMALL, *CLOSE]))
        elif how < 0.22:
            options[part] = copy.deepcopy(
                chance.choice([x for x in WRONG if x is not None and not isinstance(x, dict)])
            )
    if chance.random() < 0.05:
        options[chance.choice(["mod_keep", "frame_tokens", "connectors"])] = 1
    return options


def try_configuration(chance: random.Random) -> None:
    options = draw(chance)
    try:
        config = VideoLLMMoDConfig(**copy.deepcopy(options))
        model = VideoLLMMoDForConditionalGeneration(config).eval()
    except (ValueError, TypeError, StrictDataclassError) as error:
        check_error(ValueError(in_one_line(error)), *NAMES)
        return
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{options}") from error
    ids, features = dialogue_ids(config, [2]), random_features(config, 2)
    vocabulary = config.text_config.vocab_size
    text = ids % vocabulary
    text = text.where(text != config.frame_token_id, (text + 1) % vocabulary)
    ids = ids.where(ids == config.frame_token_id, text)
    with torch.no_grad():
        logits = model(input_ids=ids, frame_features=features).logits
    assert logits.shape == (*ids.shape, config.text_config.vocab_size) and logits.isfinite().all()
    again = VideoLLMMoDConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.layer_keep_counts == config.layer_keep_counts and again.to_dict() == config.to_dict()


@given(seed=SEEDS)
def test_a_configuration_gives_a_model_or_an_error_that_names_the_field(request, seed):
    run_case(request, "configuration", seed, try_configuration)


@pytest.mark.parametrize("kind", VISION_MODELS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("image_size", value) for value in ([None], [32, None], {"height": 32, "width": 32}, {}, [[32]])),
        *(("patch_size", value) for value in (None, [None], ["8"], [8, None])),
        *(("num_patches", value) for value in (-1, [None])),
        *(("num_channels", value) for value in (-1, 1, [3])),
        *(("initializer_range", value) for value in (-1, float("nan"))),
        ("hidden_act", 8),
        ("hidden_size", [16]),
        ("num_attention_heads", [True, 1]),
    ],
)
def test_a_wrong_field_of_the_vision_encoder_is_named(kind, field, value):
    options = {"frame_token_id": 400, "frame_token_interval_id": 11, "text_config": tiny_text_config()}
    vision = tiny_vision_config(kind) | {field: value}
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        VideoLLMMoDForConditionalGeneration(VideoLLMMoDConfig(vision_config=vision, **options))
    check_error(ValueError(in_one_line(error.value)), field, "vision_config")


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"model_type": "resnet"}, "`hidden_size` of the vision encoder must be at least 1, got None."),
        ({"model_type": " "}, "config.json: ' ' is no model type that Transformers knows."),
    ],
)
def test_a_vision_encoder_of_a_wrong_kind_is_told_in_one_line(vision, said):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        VideoLLMMoDConfig(vision_config=vision, text_config=tiny_text_config(), frame_token_id=400)
    assert in_one_line(error.value) == said


def test_an_error_of_the_library_names_the_part():
    with pytest.raises(ValueError, match="`vision_config` makes no model: ValueError: cannot convert float NaN"):
        VideoLLMMoDForConditionalGeneration(
            VideoLLMMoDConfig(
                vision_config=tiny_vision_config("swin", mlp_ratio=float("nan")),
                text_config=tiny_text_config(),
                frame_token_id=400,
            )
        )
