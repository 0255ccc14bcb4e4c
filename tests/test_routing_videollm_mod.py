# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Routing: the choice of tokens, the layout of short sequences, gates and write-back."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from tiny import CheckIndices, choose_kept, dialogue_ids, gate_of, random_features, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.routers_videollm_mod import GATES, ROUTERS, LearnedRouter, VideoLLMMoDRouter
from videollm_mod.routing_videollm_mod import (
    FrameLayout,
    LayerMasks,
    apply_gate,
    by_row,
    check_on_device,
    choose,
    compare_frames,
    find_frames,
    find_positions,
    preference,
    write_back,
)


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("tokens", "count", "expected"), [(10, 2, [2, 7]), (9, 1, [4]), (10, 10, list(range(10)))])
def test_preference_begins_with_evenly_spaced_tokens(tokens, count, expected):
    order = preference(tokens, count, torch.device("cpu")).tolist()
    assert order[:count] == expected and sorted(order) == list(range(tokens))


def test_preference_is_evenly_spaced_for_every_count():
    for tokens in range(1, 60):
        for count in range(tokens + 1):
            order = preference(tokens, count, torch.device("cpu")).tolist()
            evenly = [(2 * i + 1) * tokens // (2 * count) for i in range(count)]
            assert order == evenly + [index for index in range(tokens) if index not in evenly]


def chosen(layout, scores, keep_count):
    """Return the kept tokens (frames, kept) that `choose` gives for scores (frames, tokens), as indices in a frame."""
    plan = layout.plan(keep_count)
    flat = torch.zeros(layout.batch_size * layout.sequence_length)
    flat[layout.token_index.flatten()] = scores.flatten()
    slots = choose(flat[plan.order], plan).tolist()
    return [[i for i, token in enumerate(frame) if token in slots] for frame in layout.token_index.tolist()]


@pytest.mark.parametrize("keep_last", [False, True])
def test_choose_keeps_the_highest_scores_of_each_frame(keep_last):
    torch.manual_seed(0)
    layout = layout_of(["..fffff.fffff.", "fffff........."], tokens=5, keep_last=keep_last)
    for ties in (False, True):
        scores = torch.randn(3, 5).round() if ties else torch.randn(3, 5)
        for count in range(1, 5):
            assert chosen(layout, scores, count) == choose_kept(scores, count, keep_last).tolist()


def test_the_oracle_keeps_the_highest_scores_in_order():
    scores = torch.tensor([[0.0, 5.0, 1.0, 4.0, -1.0], [9.0, 1.0, 2.0, 3.0, 0.0]])
    assert choose_kept(scores, 2, keep_last=False).tolist() == [[1, 3], [0, 3]]
    assert choose_kept(scores, 2, keep_last=True).tolist() == [[1, 4], [0, 4]]
    assert choose_kept(scores, 1, keep_last=True).tolist() == [[4], [4]]


def test_equal_scores_are_spread_over_the_frame():
    assert chosen(layout_of(["f" * 10], tokens=10), torch.zeros(1, 10), 2) == [[2, 7]]
    kept = chosen(layout_of(["f" * 50], tokens=50, keep_last=True), torch.zeros(1, 50), 10)
    assert torch.tensor(kept).diff().max() <= 6


def kept_of(model, frames, **inputs):
    """Return which tokens each layer keeps, (layers, frames, tokens), of embeddings (1, frames, tokens, hidden)."""
    mask = torch.ones(1, frames.shape[1] * frames.shape[2], dtype=torch.bool)
    inputs |= {"inputs_embeds": frames.flatten(1, 2), "frame_token_mask": mask}
    with torch.no_grad():
        return torch.stack(model(**inputs, output_router_scores=True).kept_tokens)[:, 0]


def test_tokens_that_changed_are_kept_by_all_layers_and_still_ones_skip():
    model = tiny_model(mod_router="change", mod_layers="all", mod_keep_ratio=0.3, mod_keep_last=False)
    frames = torch.randn(1, 1, 10, 32).repeat(1, 4, 1, 1)
    frames[0, 0, [1, 5, 6]] *= 10  # the largest of the first frame
    frames[0, 1:, [1, 5, 6]] = frames[0, :1, [1, 5, 6]]
    frames[0, 1:, [2, 8]] += 1  # two tokens change in the second frame, and stay so
    frames[0, 2, 4] += 1  # one changes in the third frame, and back in the fourth
    kept = kept_of(model, frames)
    assert all(torch.equal(layer, kept[0]) for layer in kept)
    found = [row.nonzero().flatten().tolist() for row in kept[0]]
    # Among the still ones, the evenly spaced tokens 1, 5 and 8 come first.
    assert found == [[1, 5, 6], [1, 2, 8], [1, 4, 5], [1, 4, 5]]


def test_scores_of_changes_cost_no_gradient_and_no_weights():
    model = tiny_model(mod_router="change", mod_layers="all").train()
    assert not [name for name, _ in model.named_parameters() if "router" in name] and not model.router_names
    frames = torch.randn(1, 3, 10, 32, requires_grad=True)
    scores = compare_frames(model.config, layout_of(["f" * 30], 10), frames.flatten(1, 2), None, 0, None)
    assert scores.shape == (30,) and not scores.requires_grad


def layout_of(rows, tokens=3, **options):
    """Return the layout of strings: "f" is a frame token and "." is text."""
    longest = max(len(row) for row in rows)
    mask = torch.tensor([[char == "f" for char in row.ljust(longest, ".")] for row in rows])
    return FrameLayout(mask, [row.count("f") // tokens for row in rows], tokens, **options)


def test_layout_finds_frames():
    layout = layout_of(["..fff.fff.", ".fff"])
    assert layout.token_index.tolist() == [[2, 3, 4], [6, 7, 8], [11, 12, 13]]
    inside = layout.inside_frame.int().tolist()
    assert inside == [[0, 0, 1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert layout.speaking_index.tolist() == [0, 1, 4, 5, 8, 9, 10, 13, 14, 15, 16, 17, 18, 19]
    assert layout_of(["...."]).inside_frame is None


def test_plan_of_even_rows_has_no_filler():
    plan = layout_of(["..fff.fff."]).plan(1)
    assert (plan.length, plan.size, plan.valid, plan.num_chosen) == (6, 6, None, 1)
    assert plan.stand_in.tolist() == [0, 1, 2, 5, 6, 9] and plan.fixed.tolist() == [0, 1, 5, 9]
    assert plan.gated.tolist() == [0, 0, 1, 0, 1, 0] and plan.slot_frame.tolist() == [0, 0, 0, 0, 1, 0]
    assert plan.order.tolist() == [[3, 2, 4], [7, 6, 8]] == plan.candidates.tolist()


def test_plan_that_keeps_the_last_token():
    plan = layout_of(["..fff.fff."], keep_last=True).plan(2)
    assert plan.fixed.tolist() == [0, 1, 4, 5, 8, 9] and plan.num_chosen == 1
    assert plan.candidates.tolist() == [[3, 2], [7, 6]] and plan.order[:, 2].tolist() == [4, 8]


def test_plan_of_uneven_rows_fills_the_longest():
    plan = layout_of(["..fff.fff.", ".fff......"]).plan(1)
    assert (plan.length, plan.size) == (8, 16)
    assert plan.stand_in[6:].tolist() == [10, 11, 14, 15, 16, 17, 18, 19]
    assert plan.valid.tolist() == [0, 1, 2, 3, 4, 5, *range(8, 16)]
    assert plan.gated.nonzero().flatten().tolist() == [2, 4, 9] and plan.slot_frame[9] == 2
    assert plan.fill(plan.stand_in)[6:8].tolist() == [0, 0]


def test_plan_without_any_kept_token():
    plan = layout_of(["fff", "fff"]).plan(0)
    assert plan.length == 0 and plan.fixed.numel() == plan.gated.numel() == 0


def test_plans_are_made_once():
    layout = layout_of(["..fff.fff."])
    assert layout.plan(2) is layout.plan(2) is not layout.plan(1)


def test_plans_and_positions_are_on_the_device_of_the_frames():
    with FakeTensorMode(), CheckIndices():
        on_gpu = {"device": torch.device("cuda")}
        layout = FrameLayout(torch.ones(2, 12, dtype=torch.bool, **on_gpu), [3, 1], 4, keep_last=True)
        plan = layout.plan(2)
        found = [*vars(plan).values(), preference(4, 2, **on_gpu), layout.speaking_index, layout.rank]
        tensors = [x for x in found if isinstance(x, torch.Tensor)]
        assert len(tensors) == 10 and {x.device.type for x in tensors} == {"cuda"}
        elsewhere = torch.zeros(2, 12, dtype=torch.long)
        seen = [find_positions(None, layout, None, None, 0, x, **on_gpu) for x in (elsewhere, None)]
        seen.append(find_positions(None, layout, elsewhere + 1, None, 0, None, **on_gpu))
        assert [(x.device.type, x.dtype) for x in seen] == [("cuda", torch.int64)] * 3


def test_a_gate_may_come_from_another_device():
    with FakeTensorMode():
        output = torch.zeros(1, 4, 8, device="cuda:1", dtype=torch.bfloat16)
        short, excess = torch.zeros(1, 4, 8, device="cuda:0", dtype=torch.bfloat16), torch.zeros(4, device="cuda:0")
        for on_update in (False, True):
            gated = apply_gate(output, short, excess, 2.0, on_update=on_update)
            assert gated.device == output.device and gated.dtype == torch.bfloat16


def test_the_host_knows_the_numbers_of_frames():
    """Tensors in their place would make it wait for the device."""
    config = tiny_config()
    ids, features = dialogue_ids(config, [2]), random_features(config, 2)
    for given in ([2], torch.tensor([2]), None):
        layout = find_frames(config, ids, None, None, features, given, None)
        assert layout.num_frames == [2] and type(layout.num_frames[0]) is int


def test_a_given_mask_says_which_tokens_are_frames():
    config = tiny_config()
    ids = dialogue_ids(config, [2])
    layout = find_frames(config, ids, None, None, None, None, torch.zeros_like(ids, dtype=torch.bool))
    assert layout.num_frames == [0] and not layout.frame_token_mask.any()


def test_positions_of_padded_rows_need_no_cache():
    layout = layout_of(["fff.", ".fff"])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    positions = find_positions(None, layout, mask, None, 0, None, device=torch.device("cpu"))
    assert positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    # Evictions have moved the positions of what follows.
    moved = find_positions(None, layout, mask, SimpleNamespace(position_offset=7), 0, None, device=mask.device)
    assert torch.equal(moved, positions + 7)


def test_write_back_puts_outputs_in_their_places():
    layout = layout_of(["..fff.fff.", ".fff......"])
    plan = layout.plan(2)
    hidden, slots = torch.arange(20.0)[:, None], plan.fill(plan.stand_in)
    written = write_back(hidden, (hidden[slots] + 100).view(2, plan.length, 1), slots, plan)
    moved = set(plan.stand_in.tolist())
    assert written.flatten().tolist() == [i + 100 if i in moved else i for i in range(20)]


@pytest.mark.parametrize("gate", ["linear", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_leaves_text_unchanged_to_the_last_bit(dtype, gate):
    plan = layout_of(["..fff.fff."]).plan(1)
    short, output = torch.randn(1, 6, 8, dtype=dtype), torch.randn(1, 6, 8, dtype=dtype)
    scores = torch.linspace(-2, 2, 6)
    excess = GATES[gate][0](scores) * plan.gated
    size = GATES[gate][1]
    gated = apply_gate(output, short, excess, size, on_update=True)
    text = [0, 1, 3, 5]
    assert torch.equal(gated[:, text], output[:, text])
    factor = gate_of(scores, gate)[2]
    atol = 0.05 if dtype == torch.bfloat16 else 1e-6
    expected = short[:, 2] + factor * (output[:, 2] - short[:, 2])
    assert_close(gated[:, 2], expected, atol=atol, rtol=0, check_dtype=False)
    scaled = apply_gate(output, short, excess, size, on_update=False)
    assert torch.equal(scaled[:, text], output[:, text])
    assert_close(scaled[:, 2], factor * output[:, 2], atol=atol, rtol=0, check_dtype=False)
    assert torch.equal(apply_gate(output, short, torch.zeros(6), size, on_update=True), output)


def test_by_row():
    rows = by_row(torch.ones(3, 3), layout_of(["..fff.fff.", ".fff......"]), torch.device("cpu"))
    assert rows.tolist() == [[[1.0] * 3] * 2, [[1.0] * 3, [0.0] * 3]]


def test_check_on_device_reports_the_values_found():
    check_on_device(torch.tensor([3, 4]), [3, 4], "fine")
    with pytest.raises(ValueError, match="two and two; found \\[3, 5\\]"):
        check_on_device(torch.tensor([3, 5]), [2, 2], "two and two")


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_counts_real_entries_only(window):
    """Also the first token of the sequence, which is at position 0."""
    positions = torch.tensor([[0, 1, -1, 3, 4, 7], [0, -1, -1, 3, 5, 6]])
    cache = SimpleNamespace(has_filler=True, get_positions=lambda _: positions)
    masks = LayerMasks(tiny_config().text_config, layout_of(["fff"]), None, cache)
    is_seen = masks._window_overlay(0, 1, window)
    for row, entries in enumerate(positions.tolist()):
        real = [place for place, position in enumerate(entries) if position >= 0]
        for query in real:
            seen = [key for key in real if key <= query and is_seen(row, 0, query, key)]
            assert seen == [key for key in real if key <= query][-window:]


# ------------------------------------------------------------------------------------------------- learning in a model


def training_step(model):
    """Return loss, gradients by name, and the bytes that the backward pass keeps."""
    config = model.config
    ids, features = dialogue_ids(config, [12]), random_features(config, 12).double()
    labels = ids.masked_fill(ids == config.frame_token_id, -100)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, frame_features=features, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.item(), gradients, sum(kept.values())


@pytest.mark.parametrize("normalize", [False, True])
def test_routers_keep_only_kept_tokens_for_the_backward_pass(normalize, monkeypatch):
    text = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 256}
    options = {"mod_layers": "all_deep", "frame_token_pooled": (4, 4), "mod_normalize_scores": normalize}
    model = tiny_model(text_overrides=text, **options).train().double()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients, num_bytes = training_step(model)
    # A router that may look at all tokens of a frame keeps them all.
    monkeypatch.setattr(LearnedRouter, "is_pointwise", False)
    monkeypatch.setattr(LearnedRouter, "mean_scores", VideoLLMMoDRouter.mean_scores)
    same_loss, same_gradients, more_bytes = training_step(model)
    assert loss == pytest.approx(same_loss, rel=1e-9)
    assert num_bytes < 0.75 * more_bytes, (num_bytes, more_bytes)
    assert gradients.keys() == same_gradients.keys() and sum("router" in name for name in gradients) == 10
    for name, gradient in gradients.items():
        # The mean of a frame's scores is a constant to the tokens, but not to the last router.
        if not normalize or name.endswith("layers.11.router.weight"):
            assert_close(gradient, same_gradients[name], atol=1e-9, rtol=1e-6)


def test_reported_scores_are_float32_whatever_the_models_dtype():
    model = tiny_model(mod_layers="all").double()
    inputs = {
        "input_ids": dialogue_ids(model.config, [2]),
        "frame_features": random_features(model.config, 2).double(),
    }
    with torch.no_grad():
        scores = model(**inputs, output_router_scores=True).router_scores
    assert [layer.dtype for layer in scores] == [torch.float32] * 4


def test_routers_score_once_without_a_gradient():
    """In training mode too: there is nothing that a router could learn from."""
    model = tiny_model(mod_layers="all", mod_router_loss="gradient").train()
    inputs = {"input_ids": dialogue_ids(model.config, [2]), "frame_features": random_features(model.config, 2)}
    calls = []
    for router in model.model.routers.values():
        router.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == len(model.model.routers)


def test_normalized_scores_are_those_of_tokens_of_length_one():
    """Tiny ones too: only tokens shorter than 1e-6 are not stretched to it."""
    router = LearnedRouter(tiny_config(), 0)
    torch.nn.init.normal_(router.weight)
    tokens = torch.randn(2, 3, 32) * torch.tensor([1e3, 1.0, 1e-3])[:, None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tokens, dim=-1) @ router.weight[0]
        assert_close(router(tokens).squeeze(-1), expected, atol=1e-5, rtol=1e-4)
        assert not router(torch.zeros(1, 1, 32)).any()


def test_slots_know_their_frame_if_all_tokens_but_one_are_kept():
    plan = layout_of(["ffff.ffff."], tokens=4).plan(3)
    assert plan.slot_frame.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("gate_on", ["update", "output"])
def test_a_gate_of_zero_removes_the_update_or_the_output(gate_on):
    model = tiny_model(mod_layers="all", mod_gate="linear", mod_gate_on=gate_on)
    layer, seen = model.model.language_model.layers[0], []
    torch.nn.init.zeros_(layer.router.weight)
    layer.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    ids = dialogue_ids(model.config, [2])
    with torch.no_grad():
        outputs = model(input_ids=ids, frame_features=random_features(model.config, 2), output_router_scores=True)
    is_frame = ids[0] == model.config.frame_token_id
    before, after = (states[0, is_frame].view(2, 10, -1) for states in seen)
    kept = outputs.kept_tokens[0][0]
    assert torch.equal(after[~kept], before[~kept]) and kept.sum() == 4
    assert_close(after[kept], before[kept] if gate_on == "update" else torch.zeros_like(after[kept]))


def test_flags_of_routers_are_truth_values():
    assert {type(x) for r in ROUTERS.values() for x in (r.learns, r.is_pointwise, r.compares_frames)} == {bool}


def test_masked_rows_without_a_cache_equal_single_rows():
    """Layers of kept tokens see neither filler nor padding, and packed dialogues do not see each other."""
    model = tiny_model(mod_layers="all")
    rows = [dialogue_ids(model.config, [2, 1], seed=0), dialogue_ids(model.config, [1], seed=1)]
    ids = torch.full((2, rows[0].shape[1]), 9)
    mask = torch.zeros_like(ids)
    for row, given in enumerate(rows):
        ids[row, : given.shape[1]], mask[row, : given.shape[1]] = given[0], 1
    features = random_features(model.config, 3, batch=2)
    with torch.no_grad():
        together = model(input_ids=ids, frame_features=features, num_frames=[3, 1], attention_mask=mask).logits
        for row, (given, count) in enumerate(zip(rows, (3, 1), strict=True)):
            alone = model(input_ids=given, frame_features=features[row : row + 1, :count]).logits
            assert_close(together[row, : given.shape[1]], alone[0])


@pytest.mark.parametrize("center", [False, True])
def test_a_pointwise_router_reads_places_and_ranks_in_training_too(center):
    """In training it scores the kept tokens once more."""

    class ByPlace(VideoLLMMoDRouter):
        learns = is_pointwise = True

        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.weight = torch.nn.Parameter(torch.tensor([0.3, 0.1]))

        def forward(self, hidden_states, position_ids, ranks):
            places = torch.stack([position_ids.expand(hidden_states.shape[:2]), ranks], dim=-1).float()
            return (places.sin() * self.weight.float()).sum(dim=-1, keepdim=True)

    with patch.dict(ROUTERS, place=ByPlace):
        model = tiny_model(mod_layers="all", mod_router="place", mod_normalize_scores=center).train()
        frames = random_features(model.config, 3)
        inputs = {"input_ids": dialogue_ids(model.config, [2, 1]), "frame_features": frames}
        with torch.no_grad():
            expected = model(**inputs).logits
        assert_close(model(**inputs).logits, expected)


def test_kept_tokens_of_rows_with_different_numbers_of_frames():
    """The second row is filled up. Filler must not count as the first token, which belongs to a frame here."""
    model = tiny_model(mod_layers="all", mod_keep_last=False)
    frame = torch.full((10,), model.config.frame_token_id)
    text = torch.full((20,), 5)
    ids = torch.stack([torch.cat([frame, text]), torch.cat([frame, frame, text[:10]])])
    features = torch.cat([random_features(model.config, 2, seed=seed) for seed in range(2)])
    with torch.no_grad():
        kept = model(input_ids=ids, frame_features=features, num_frames=[1, 2], output_router_scores=True).kept_tokens
    for layer in kept:
        assert layer.sum(dim=-1).tolist() == [[2, 0], [2, 2]]


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_normalized_scores_have_a_mean_of_zero_in_each_frame(gate):
    """Also where activations are huge; choices do not depend on the length of tokens' common part."""
    model = tiny_model(mod_layers="all", mod_gate=gate)
    ids, features = dialogue_ids(model.config, [3, 2]), 1000 * random_features(model.config, 5)
    with torch.no_grad():
        scores = model(input_ids=ids, frame_features=features, output_router_scores=True).router_scores
    assert all(layer.any() for layer in scores)
    for layer in scores:
        assert_close(layer.mean(dim=-1), torch.zeros(1, 5), atol=1e-6, rtol=0)


def test_device_maps_keep_a_router_with_its_layer():
    config = tiny_config(mod_layers="all", text_overrides={"num_hidden_layers": 12})
    with init_empty_weights():
        model = VideoLLMMoDForConditionalGeneration(config)
    size = sum(weight.nbytes for weight in model.parameters())
    memory = {0: size // 2, 1: size}
    blocks = list(model._no_split_modules)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    names = [name for name in device_map if "language_model.layers" in name]
    assert {device_map[name] for name in names} == {0, 1}
    # A layer is one entry of the map, or part of a larger one: its router is never apart.
    assert all(name.split("layers")[1].count(".") <= 1 for name in names), names


def logits_in(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("remote", [False, True])
def test_models_can_be_pickled_and_sent_to_other_processes(remote, tmp_path):
    """
    Also with remote code, which a new process finds by the path that `multiprocessing` hands on, and after a stream,
    which has named its attention in the configuration.
    """
    kind = AutoModel if remote else VideoLLMMoDForConditionalGeneration
    model = kind.from_pretrained(ROOT, trust_remote_code=True)
    model.stream(AutoProcessor.from_pretrained(ROOT, trust_remote_code=True))
    inputs = {"input_ids": dialogue_ids(model.config, [2]), "frame_features": random_features(model.config, 2)}
    expected = logits_in(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    for again in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(logits_in(again, inputs), expected)
    assert torch.equal(logits_in(copy.deepcopy(model), inputs), expected)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(logits_in, model, inputs).result(), expected)


@pytest.mark.parametrize("counts", [[2, 2], [[2], [2]], torch.tensor([2, 2]), torch.tensor([[2], [2]])])
def test_counts_of_frames_may_be_nested(counts):
    """`transformers.pipeline` makes them so."""
    model = tiny_model()
    inputs = {
        "input_ids": dialogue_ids(model.config, [2]).repeat(2, 1),
        "frame_features": random_features(model.config, 2).repeat(2, 1, 1, 1),
    }
    assert torch.equal(logits_in(model, inputs | {"num_frames": counts}), logits_in(model, inputs))
