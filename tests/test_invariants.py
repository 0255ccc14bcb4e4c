# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Invariants for every routing scheme and backbone: any path through a stream gives the same logits."""

import pytest
import torch
from dense_routing import DenseModel
from tiny import (
    SCHEMES,
    TEXT_MODELS,
    VISION_MODELS,
    dialogue_ids,
    random_features,
    tiny_config,
    tiny_model,
)
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.routers_videollm_mod import ROUTERS, VideoLLMMoDRouter
from videollm_mod.routing_videollm_mod import find_frames


RUNS = [3, 1, 2]
ROUTED = [scheme for scheme in SCHEMES if scheme != "full"]


def one_forward(model, ids, features, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, frame_features=features, use_cache=False, **kwargs).logits


def in_pieces(model, ids, features, cuts, cache=None):
    """Return the logits of a dialogue that is fed in pieces; cuts must lie between frames."""
    cache = model.new_cache() if cache is None else cache
    config, logits, seen = model.config, [], 0
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        piece = ids[:, begin:end]
        count = int((piece == config.frame_token_id).sum()) // config.frame_num_tokens
        frames = features[:, seen : seen + count] if count else None
        seen += count
        with torch.no_grad():
            logits.append(model(input_ids=piece, frame_features=frames, cache=cache).logits)
    return torch.cat(logits, dim=1), cache


def frame_cuts(config, ids):
    """Return the positions after each frame's last token."""
    places = (ids[0] == config.frame_token_id).nonzero().squeeze(1).tolist()
    return [place + 1 for place in places[config.frame_num_tokens - 1 :: config.frame_num_tokens]]


def check_any_path(model):
    ids = dialogue_ids(model.config, RUNS)
    features = random_features(model.config, sum(RUNS))
    expected = one_forward(model, ids, features)
    cuts = frame_cuts(model.config, ids)
    for pieces in (cuts, cuts[1::2], [3, *cuts[:2], cuts[2] + 1, cuts[2] + 2]):
        logits, cache = in_pieces(model, ids, features, pieces)
        assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        text = ids.shape[1] - sum(RUNS) * model.config.frame_num_tokens
        assert cache.lengths == [sum(RUNS) * count + text for count in model.config.layer_keep_counts]
        assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_frame_by_frame_in_chunks_and_at_once(scheme):
    check_any_path(tiny_model(**SCHEMES[scheme], mod_gate="linear", seed=1))


def test_a_still_scene_is_routed_alike_on_any_path():
    """Steps of different shapes round differently. What stands still must not be chosen by that."""
    model = tiny_model(**SCHEMES["change"])
    ids, features = dialogue_ids(model.config, RUNS), random_features(model.config, 1).repeat(1, sum(RUNS), 1, 1)
    features[0, 1, 3] += 1  # one token changes in the second frame, and back in the third
    rounded = features * (1 + 1e-6 * torch.randn(features.shape))
    logits, _ = in_pieces(model, ids, rounded, frame_cuts(model.config, ids))
    assert_close(logits, one_forward(model, ids, features), atol=1e-4, rtol=1e-3)


class FrameMeans(VideoLLMMoDRouter):
    """Score tokens by how much brighter they are than the previous frame."""

    compares_frames = True

    @classmethod
    def score_frames(cls, frames, previous):
        return frames.float().mean(dim=-1) - previous.float().mean(dim=(1, 2))[:, None]


class LargestNorm(VideoLLMMoDRouter):
    """Score tokens by their norm."""

    def forward(self, hidden_states, *_):
        return hidden_states.float().norm(dim=-1, keepdim=True)


class SmallNetwork(VideoLLMMoDRouter):
    """Score tokens by a network with one hidden layer."""

    learns = True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        width = config.text_config.hidden_size
        self.hidden, self.score = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, 1, bias=False)
        self.score.starts_at_zero = True

    def forward(self, hidden_states, *_):
        return self.score(self.hidden(hidden_states.to(self.hidden.weight.dtype)).relu()).float()

    @classmethod
    def flops_per_token(cls, config):
        return 2 * (config.text_config.hidden_size + 1) * 2 * config.text_config.hidden_size


@pytest.mark.parametrize("router", [LargestNorm, SmallNetwork, FrameMeans])
def test_a_new_router_type_streams_trains_saves_and_has_a_cost(router, monkeypatch, tmp_path):
    monkeypatch.setitem(ROUTERS, "new", router)
    check_any_path(tiny_model(mod_router="new", mod_layers="all"))
    untrained = VideoLLMMoDForConditionalGeneration(tiny_config(mod_router="new", mod_layers="all"))
    ids, features = dialogue_ids(untrained.config, RUNS), random_features(untrained.config, sum(RUNS))
    scores = untrained(input_ids=ids, frame_features=features, output_router_scores=True).router_scores
    assert router.learns != any(layer.any() for layer in scores)  # new routers that learn start at zero

    model = tiny_model(mod_router="new", mod_layers="all", attn_implementation="eager").train()
    labels = ids.masked_fill(ids == model.config.frame_token_id, -100)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, frame_features=features, labels=labels)
    cost = model.estimate_cost(sum(RUNS), ids.shape[1] - 10 * sum(RUNS))
    assert counter.get_total_flops() == pytest.approx(cost.flops, rel=0.02)
    assert (router.flops_per_token(model.config) > 0.02 * cost.flops / ids.shape[1]) == router.learns

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: weight.clone() for name, weight in model.named_parameters() if "router" in name}
    losses = []
    for _ in range(5):
        losses.append(model(input_ids=ids, frame_features=features, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and bool(before) == router.learns == bool(model.router_names)
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)

    model.eval().save_pretrained(tmp_path)
    loaded = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(one_forward(loaded, ids, features), one_forward(model, ids, features))


@pytest.mark.parametrize("scheme", ["interleaved", "all", "early_exit"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_any_path_with_every_text_model(text, scheme):
    check_any_path(tiny_model(text=text, **SCHEMES[scheme]))


@pytest.mark.parametrize("vision", VISION_MODELS)
def test_any_path_with_every_encoder(vision):
    model = tiny_model(vision=vision, mod_layers="all")
    ids = dialogue_ids(model.config, RUNS)
    pixels = torch.randn(1, sum(RUNS), 3, 32, 32)
    with torch.no_grad():
        features = model.encode_frames(pixels)
        one_by_one = torch.cat([model.encode_frames(pixels[:, i : i + 1]) for i in range(sum(RUNS))], dim=1)
        assert_close(features, one_by_one)
        whole = model(input_ids=ids, pixel_values_videos=pixels, use_cache=False).logits
    logits, _ = in_pieces(model, ids, one_by_one, frame_cuts(model.config, ids))
    assert_close(logits, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"frame_token_cls": True, "frame_token_pooled": None, "frame_token_interval_id": None},  # VideoLLM-online, v1
        {"frame_token_pooled": (4, 4)},
        {"frame_token_cls": False, "frame_token_pooled": (2, 3)},
        {"mod_keep_last": False},
        {"mod_gate_on": "output", "mod_gate": "sigmoid"},
        {"mod_router": "uniform", "mod_gate": "none"},
        {"mod_router": "change", "mod_keep_last": False},
    ],
)
def test_any_path_with_every_frame_layout_and_gate(options):
    check_any_path(tiny_model(mod_layers="all", **options))


# One process compiles flex attention for all schemes.
FLEX = pytest.param("flex_attention", marks=pytest.mark.xdist_group("flex attention"))


@pytest.mark.parametrize("attention", ["eager", "sdpa", FLEX])
@pytest.mark.parametrize("scheme", ["full", "all", "interleaved"])
def test_any_path_with_every_attention(attention, scheme):
    model = tiny_model(**SCHEMES[scheme])
    expected = one_forward(
        model, ids := dialogue_ids(model.config, RUNS), features := random_features(model.config, 6)
    )
    twin = tiny_model(**SCHEMES[scheme], attn_implementation=attention)
    twin.load_state_dict(model.state_dict())
    assert_close(one_forward(twin, ids, features), expected, atol=2e-5, rtol=1e-4)
    check_any_path(twin)


def varlen_like(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """
    What a flash attention kernel computes, from what Transformers hands it: a two-dimensional mask or none, queries
    aligned with the end of the keys. The kernels themselves need a GPU.
    """
    assert dropout == 0.0 and (attention_mask is None or attention_mask.ndim == 2)
    assert kwargs.get("position_ids") is None  # gapped ones would be read as packed sequences
    queries, keys = query.shape[2], key.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, -keys:].bool()
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("varlen_like", varlen_like)
AttentionMaskInterface.register("varlen_like", flash_attention_mask)


def with_varlen_text(model):
    model.model.language_model.set_attn_implementation("varlen_like")
    return model


@pytest.mark.parametrize("scheme", ["full", "interleaved", "all", "early_exit"])
def test_any_path_with_the_interface_of_flash_attention(scheme):
    model = tiny_model(**SCHEMES[scheme])
    ids, features = dialogue_ids(model.config, RUNS), random_features(model.config, sum(RUNS))
    expected = one_forward(model, ids, features)
    flash = with_varlen_text(model)
    assert_close(one_forward(flash, ids, features), expected, atol=2e-5, rtol=1e-4)
    check_any_path(flash)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_full_keep_ratio_equals_the_plain_backbone_to_the_last_bit(text, attention):
    model = tiny_model(text=text, mod_keep_ratio=1.0, attn_implementation=attention)
    plain = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation=attention).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = dialogue_ids(model.config, RUNS)
    features = random_features(model.config, sum(RUNS))
    with torch.no_grad():
        layout = find_frames(model.config, ids, None, None, features, None, None)
        embeddings = model.model._embed(ids, None, features, True, layout)
        expected = plain(inputs_embeds=embeddings, use_cache=False).logits
    assert torch.equal(one_forward(model, ids, features), expected)


def dense_logits(model, options, ids, features):
    """Return the logits (1, sequence, vocabulary) of the dense model of `dense_routing.py`."""
    config = model.config
    frame = {"frame_token_id": config.frame_token_id, "num_tokens": config.frame_num_tokens}
    dense = DenseModel(model.state_dict(), config.text_config, options, **frame)
    return dense.read(ids[0].tolist(), features[0])[None].float()


@pytest.mark.parametrize("gate", ["linear", "tanh"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_skipping_tokens_equals_hiding_them_from_attention(scheme, gate):
    # No padding, no cache, batch 1: where gapped positions would be read as packed sequences, a kept token would
    # see nothing before the gap, and this would differ.
    options = {**SCHEMES[scheme], "mod_gate": gate}
    model = tiny_model(**options, attn_implementation="eager")
    ids = dialogue_ids(model.config, RUNS)
    features = random_features(model.config, sum(RUNS))
    expected = dense_logits(model, options, ids, features)
    assert_close(one_forward(model, ids, features), expected, atol=2e-5, rtol=1e-4)
    fast = tiny_model(model.config, attn_implementation="sdpa")
    fast.load_state_dict(model.state_dict())
    assert_close(one_forward(fast, ids, features), expected, atol=2e-5, rtol=1e-4)


def batch_of(config, rows, side):
    """Return a padded batch: dialogues, ids, mask, features, and the slice of each row's tokens."""
    dialogues = [dialogue_ids(config, runs, seed=seed) for seed, runs in enumerate(rows)]
    longest = max(d.shape[1] for d in dialogues)
    most = max(sum(runs) for runs in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    features = torch.zeros(len(rows), most, *config.frame_feature_shape)
    places = []
    for row, (dialogue, runs) in enumerate(zip(dialogues, rows, strict=True)):
        begin = longest - dialogue.shape[1] if side == "left" else 0
        places.append(slice(begin, begin + dialogue.shape[1]))
        ids[row, places[-1]], mask[row, places[-1]] = dialogue[0], 1
        features[row, : sum(runs)] = random_features(config, sum(runs), seed=row)[0]
    return dialogues, ids, mask, features, places


ROWS = [[3, 1], [1], [2, 2, 1], []]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen_like"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_leaves_logits_unchanged(scheme, attention, side):
    if attention == "varlen_like":
        model = with_varlen_text(tiny_model(**SCHEMES[scheme]))
    else:
        model = tiny_model(**SCHEMES[scheme], attn_implementation=attention)
    dialogues, ids, mask, features, places = batch_of(model.config, ROWS, side)
    counts = [sum(runs) for runs in ROWS]
    singles = [
        one_forward(model, dialogue, features[row : row + 1, : counts[row]] if counts[row] else None)
        for row, dialogue in enumerate(dialogues)
    ]
    for num_frames in (counts, None, torch.tensor(counts)):
        logits = one_forward(model, ids, features, attention_mask=mask, num_frames=num_frames)
        for row, single in enumerate(singles):
            assert_close(logits[row : row + 1, places[row]], single, atol=2e-5, rtol=1e-4)
    if side == "right":
        # Causal attention hides padding on the right from every real token, so no mask is needed.
        logits = one_forward(model, ids, features, num_frames=counts)
        for row, single in enumerate(singles):
            assert_close(logits[row : row + 1, places[row]], single, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_beside_a_single_frame_leaves_logits_unchanged(side):
    model = tiny_model(mod_layers="all")
    dialogues, ids, mask, features, places = batch_of(model.config, [[1], []], side)
    logits = one_forward(model, ids, features, attention_mask=mask, num_frames=[1, 0])
    for row, shown in enumerate((features[:1], None)):
        expected = one_forward(model, dialogues[row], shown)
        assert_close(logits[row : row + 1, places[row]], expected, atol=2e-5, rtol=1e-4)
    # A row alone may be padded too.
    ids, mask = (torch.nn.functional.pad(x[:1], (30, 30)) for x in (ids, mask))
    begin = 30 + places[0].start
    alone = one_forward(model, ids, features[:1], attention_mask=mask)[:, begin : begin + dialogues[0].shape[1]]
    assert_close(alone, one_forward(model, dialogues[0], features[:1]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scheme", ["full", "interleaved", "all", "early_exit", "random", "change"])
def test_padded_rows_continue_as_they_would_unpadded(scheme, side):
    model = tiny_model(**SCHEMES[scheme])
    dialogues, ids, mask, features, places = batch_of(model.config, ROWS, side)
    counts = [sum(runs) for runs in ROWS]
    more_ids = torch.cat([dialogue_ids(model.config, [1], seed=9)] * len(ROWS))
    more_features = random_features(model.config, 1, batch=len(ROWS), seed=9)
    cache = model.new_cache()
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, num_frames=counts, attention_mask=mask, cache=cache)
        mask = torch.cat([mask, torch.ones_like(more_ids)], dim=1)
        logits = model(
            input_ids=more_ids,
            frame_features=more_features,
            attention_mask=mask,
            cache=cache,
            position_ids=(mask.cumsum(1) - 1)[:, -more_ids.shape[1] :],
        ).logits
    for row, dialogue in enumerate(dialogues):
        whole = torch.cat([dialogue, more_ids[:1]], dim=1)
        frames = torch.cat([features[row : row + 1, : counts[row]], more_features[row : row + 1]], dim=1)
        expected = one_forward(model, whole, frames)[:, -more_ids.shape[1] :]
        assert_close(logits[row : row + 1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "attention"),
    [
        *((options, "sdpa") for options in SCHEMES.values()),
        (SCHEMES["interleaved"], "eager"),
        (SCHEMES["interleaved"], "flex_attention"),
        ({"mod_router": "random"}, "sdpa"),
        ({"text": "mistral", "text_overrides": {"sliding_window": 16}}, "sdpa"),
    ],
)
def test_packed_dialogues_give_the_same_logits_as_separate_ones(options, attention):
    """Pack three dialogues into one row and two into another."""
    if attention == "flex_attention":
        # Graphs from other tests would recompile with dynamic lengths, which inductor cannot compile to C++ yet.
        torch.compiler.reset()
    model = tiny_model(**options, attn_implementation=attention)
    packed = [[[3, 1, 2], [1], [2, 2]], [[4, 1], [1, 1, 2]]]
    ids = [[dialogue_ids(model.config, runs, seed=i) for i, runs in enumerate(row)] for row in packed]
    features = [[random_features(model.config, sum(runs), seed=i) for i, runs in enumerate(row)] for row in packed]
    alone = [
        [one_forward(model, i, f) for i, f in zip(*pair, strict=True)] for pair in zip(ids, features, strict=True)
    ]
    rows = [torch.cat([x.flatten() for x in row]) for row in ids]
    width = max(len(row) for row in rows)
    batch = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    seq_idx = [torch.cat([torch.full((x.numel(),), i) for i, x in enumerate(row)]) for row in ids]
    seq_idx = torch.stack([torch.nn.functional.pad(x, (0, width - len(x)), value=9) for x in seq_idx])
    frames = [torch.cat([f[0] for f in row]) for row in features]
    most = max(len(f) for f in frames)
    shown = torch.stack([torch.nn.functional.pad(f, (0, 0, 0, 0, 0, most - len(f))) for f in frames])
    logits = one_forward(model, batch, shown, seq_idx=seq_idx)
    for row, expected in zip(logits, alone, strict=True):
        expected = torch.cat([x[0] for x in expected])
        assert_close(row[: len(expected)], expected, atol=2e-5, rtol=1e-4)
    # Without `seq_idx`, the second dialogue sees the first.
    assert not torch.allclose(one_forward(model, batch, shown)[0], logits[0], atol=1e-2)


# 40 is more than the width of the model.
@pytest.mark.parametrize(("text", "window"), [("mistral", 16), ("mistral", 40), ("qwen2", 16), ("smollm3", 16)])
def test_sliding_window_counts_entries_of_a_layers_own_sequence(text, window):
    overrides = {"sliding_window": window}
    if text == "qwen2":
        overrides |= {"use_sliding_window": True, "max_window_layers": 2}
    if text == "smollm3":
        overrides |= {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
    full = tiny_model(text=text, text_overrides=overrides, mod_keep_ratio=1.0)
    plain = AutoModelForCausalLM.from_config(full.config.text_config).eval()
    plain.model.load_state_dict(full.model.language_model.state_dict())
    plain.lm_head.load_state_dict(full.lm_head.state_dict())
    ids, features = dialogue_ids(full.config, RUNS), random_features(full.config, sum(RUNS))
    with torch.no_grad():
        layout = find_frames(full.config, ids, None, None, features, None, None)
        embeddings = full.model._embed(ids, None, features, True, layout)
        expected = plain(inputs_embeds=embeddings, use_cache=False).logits
    assert_close(one_forward(full, ids, features), expected, atol=2e-5, rtol=1e-4)
    check_any_path(tiny_model(text=text, text_overrides=overrides, mod_layers="all"))


def test_a_cache_of_the_library_works_with_a_sliding_window():
    model = tiny_model(text="mistral", text_overrides={"sliding_window": 8}, mod_keep_ratio=1.0)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert_close(model(input_ids=ids, cache=DynamicCache()).logits, expected)


@pytest.mark.parametrize("cached", [False, True])
def test_sliding_window_counts_real_entries_only(cached):
    """Rows with fewer frames have filler between entries, which must not push older entries out of the window."""
    model = tiny_model(text="mistral", text_overrides={"sliding_window": 16}, mod_layers="all")
    rows = [dialogue_ids(model.config, [3], seed=0), dialogue_ids(model.config, [1], seed=1)]
    length, features = rows[0].shape[1], random_features(model.config, 3, batch=2)
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[1] :], mask[index, length - row.shape[1] :] = row[0], 1
    inputs = {"input_ids": ids, "frame_features": features, "num_frames": [3, 1], "attention_mask": mask}
    more, more_features = dialogue_ids(model.config, [1], seed=9), random_features(model.config, 1, seed=9)
    with torch.no_grad():
        if cached:
            cache = model.new_cache()
            model(**inputs, cache=cache)
            mask = torch.cat([mask, torch.ones(2, more.shape[1], dtype=torch.long)], dim=1)
            inputs = {"input_ids": more.repeat(2, 1), "frame_features": more_features.repeat(2, 1, 1, 1)}
            logits = model(**inputs, attention_mask=mask, cache=cache).logits
        else:
            logits = model(**inputs, use_cache=False).logits
        for row, frames in ((0, 3), (1, 1)):
            whole, shown = rows[row], features[row : row + 1, :frames]
            if cached:
                whole, shown = torch.cat([whole, more], dim=1), torch.cat([shown, more_features], dim=1)
            count = more.shape[1] if cached else rows[row].shape[1]
            expected = one_forward(model, whole, shown)[:, -count:]
            assert_close(logits[row : row + 1, -count:], expected, atol=2e-5, rtol=1e-4)


def test_stale_or_unwritten_cache_is_never_read():
    model = tiny_model(mod_layers="all")
    ids, features = dialogue_ids(model.config, RUNS), random_features(model.config, sum(RUNS))
    cache = model.new_cache(max_lengths=[150] * 4)
    text = model.config.text_config
    heads, size = text.num_key_value_heads, text.head_dim
    cache.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        # Large numbers show any leak. NaN would spread through masked products.
        layer.keys.fill_(1e4)
        layer.values.fill_(1e4)
    logits, cache = in_pieces(model, ids, features, frame_cuts(model.config, ids), cache)
    assert_close(logits, one_forward(model, ids, features), atol=2e-5, rtol=1e-4)


def test_tiny_config_routes():
    assert tiny_config().routed_layers == [1, 3]
