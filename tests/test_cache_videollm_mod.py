# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: lengths, positions, cutting, and every operation that moves rows."""

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from counting import CountOperations
from tiny import (
    SCHEMES,
    TEXT_MODELS,
    HostAndDevice,
    choose_kept,
    dialogue_ids,
    random_features,
    tiny_model,
    tiny_processor,
    token_runs,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videollm_mod import VideoLLMMoDCache, cache_videollm_mod
from videollm_mod.cache_videollm_mod import (
    MAX_OFFSET,
    SPARE_ROOM,
    PositionsMixin,
    RecentFrames,
    TokenRun,
    VideoLLMMoDDynamicLayer,
    _find_parts,
    grouped_attention_forward,
    use_grouped_attention,
)
from videollm_mod.serving import StreamingEngine


RUNS = [2, 1, 2]
FRAME = 10


def filled(scheme="all", *, static=False, batch=1, runs=RUNS):
    """Return a model, its cache after a dialogue, the dialogue and its features."""
    model = tiny_model(**SCHEMES[scheme])
    ids = torch.cat([dialogue_ids(model.config, runs, seed=row) for row in range(batch)])
    features = random_features(model.config, sum(runs), batch=batch)
    cache = model.new_cache(max_lengths=[200] * 4 if static else None)
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, num_frames=[sum(runs)] * batch, cache=cache)
    return model, cache, ids, features


def next_logits(model, cache, batch=1):
    with torch.no_grad():
        return model(input_ids=torch.full((batch, 1), 7), cache=copy.deepcopy(cache)).logits


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lengths_and_positions(scheme, static):
    model, cache, ids, _ = filled(scheme, static=static)
    text = ids.shape[1] - 5 * FRAME
    assert cache.lengths == [5 * count + text for count in model.config.layer_keep_counts]
    assert int(cache.get_seq_length()) == ids.shape[1]
    assert [int(cache.get_seq_length(layer)) for layer in range(4)] == cache.lengths
    is_frame = ids[0] == model.config.frame_token_id
    for layer in model.config.routed_layers:
        positions = cache.get_positions(layer)[0, : cache.lengths[layer]]
        assert (positions.diff() > 0).all()
        assert is_frame[positions].sum() == 5 * model.config.layer_keep_counts[layer]
        assert set((~is_frame).nonzero().squeeze(1).tolist()) <= set(positions.tolist())


def test_layers_of_a_static_cache_can_be_cropped_and_their_counts_are_tensors():
    """A compiled step would be specialised on numbers."""
    model = tiny_model(mod_layers="interleaved")
    static, growing = model.new_cache(max_lengths=[50] * 4), model.new_cache()
    for cache in (static, growing):
        assert [layer.is_croppable for layer in cache.layers] == [True] * 4
        assert [isinstance(layer, PositionsMixin) for layer in cache.layers] == [False, True, False, True]
        counts = cache.num_seen, cache.position_offset
        assert [isinstance(x, torch.Tensor) for x in counts] == [cache is static] * 2 and [*map(int, counts)] == [0, 0]


def test_a_layer_that_skips_one_token_of_a_frame_is_routed():
    model = tiny_model(mod_layers="all", mod_keep_ratio=0.9)
    assert model.config.layer_keep_counts == [9] * 4
    for cache in (model.new_cache(), model.new_cache(max_lengths=[50] * 4)):
        assert all(isinstance(layer, PositionsMixin) for layer in cache.layers)


def test_bytes_of_a_layer_that_counts_its_own():
    _, cache, _, _ = filled("interleaved")
    cache.layers[0].num_bytes = 5
    assert cache.num_bytes_by_kind == {"full": 5 + cache.lengths[2] * 128, "routed": sum(cache.lengths[1::2]) * 128}


def test_room_doubles_up_to_the_capacity(monkeypatch):
    monkeypatch.setattr(cache_videollm_mod, "_FIRST_ROOM", 4)
    layer, rooms, given = VideoLLMMoDDynamicLayer(), [], torch.randn(2, 1, 2, 41, 8)
    layer.capacity = 10
    for new in (3, 3, 3, 1, 1, 30):
        begin = layer.get_seq_length()
        found = layer.update(*given[..., begin : begin + new, :])
        assert all(torch.equal(x, y) for x, y in zip(found, given[..., : begin + new, :], strict=True))
        rooms.append(len(layer.buffers[0]) - SPARE_ROOM)
    # Beyond the capacity it doubles again. 30 more entries need more than that.
    assert rooms == [4, 8, 10, 10, 20, 41] and layer.get_seq_length() == 41


def test_rows_with_as_many_frames_get_no_filler_from_a_crop():
    model, cache, _, _ = filled(batch=2)
    cache.crop(-2, num_frames=0)
    assert not cache.has_filler


def test_recent_frames_know_where_they_end_after_evictions():
    recent = RecentFrames()
    recent.add(torch.arange(12.0).view(3, 4, 1), [3], torch.tensor([5, 9, 14]), 0)
    assert recent.last.flatten().tolist() == [8, 9, 10, 11] and recent.last.shape == (1, 4, 1)
    recent.evict([TokenRun(1), TokenRun(4, 1, stays=False), TokenRun(4, 1), TokenRun(1, stays=False), TokenRun(5, 1)])
    assert recent.ends[0].tolist() == [1, 5, 9] and recent.least == 0
    before = recent.add(torch.zeros(1, 4, 1), [1], torch.tensor([14]), 10)
    assert before.flatten().tolist() == [8, 9, 10, 11] and recent.least == 10
    recent.evict([TokenRun(1), TokenRun(4, 1, stays=False), TokenRun(9, 2)])
    assert recent.ends[0].tolist() == [10] and recent.least == 6


def test_a_static_cache_forgets_positions_and_keeps_its_counts_on_the_device():
    model, cache, ids, _ = filled(static=True)
    count = cache.num_seen
    recent = RecentFrames()
    for _ in range(2):
        recent.add(torch.zeros(1, 4, 1), [1], torch.tensor([9]), count)
    with torch.no_grad():
        model(input_ids=ids[:, :1], cache=cache)
    assert cache.num_seen is count and int(recent.least) == int(count) - 1
    cache.crop(-3, num_frames=0)
    for layer, length in enumerate(cache.lengths):
        assert (cache.get_positions(layer)[:, length:] == -1).all() and (
            cache.get_positions(layer) >= 0
        ).sum() == length
    cache.reset()
    assert cache.num_seen is count and int(count) == 0 and int(cache.position_offset) == 0


def test_only_keys_before_the_last_gap_are_kept_as_they_were():
    """Those of later entries do not move. A key has 2 heads of 8 numbers."""
    model, cache, ids, _ = filled("full")
    before = cache.num_bytes
    model.evict_tokens(cache, [TokenRun(5), TokenRun(10, 1, stays=False), TokenRun(ids.shape[1] - 15, 4)])
    entry = 4 * 2 * 8 * 4  # bytes of the keys of all layers
    assert cache.num_bytes == before - 10 * 2 * entry + 5 * entry


def test_positions_start_again_where_float32_is_as_coarse_as_bfloat16():
    assert np.spacing(np.float32(MAX_OFFSET - 1)) / 2 == 2**-9


def test_a_crop_may_end_at_the_first_frame_that_is_known():
    recent = RecentFrames()
    recent.add(torch.zeros(1, 4, 1), [1], torch.tensor([5]), 0)
    recent.add(torch.zeros(1, 4, 1), [1], torch.tensor([10]), 6)
    for length in (6, 0):
        recent.check_crop(length)
    with pytest.raises(ValueError, match="Cannot crop to 5 tokens.* at least 6"):
        recent.check_crop(5)


def test_all_tokens_can_be_evicted_at_once():
    model, cache, ids, _ = filled()
    everything = [TokenRun(ids.shape[1], 5, stays=False)]
    model.evict_tokens(cache, everything)
    assert cache.lengths == [0] * 4
    features = random_features(model.config, 1)
    given = {"input_ids": dialogue_ids(model.config, [1]), "frame_features": features}
    with torch.no_grad():
        assert_close(model(**given, cache=cache).logits, model(**given).logits, atol=1e-5, rtol=1e-4)


def test_only_a_single_token_and_a_first_step_need_no_grouped_mask():
    model = tiny_model()
    cache, config = with_room(model), model.config.text_config
    assert cache.grouped_mask(0, torch.empty(1, 2, 32), None, config) is None
    cache.layers[0].update(*torch.zeros(2, 1, 2, 6, 8))
    assert cache.grouped_mask(0, torch.empty(1, 1, 32), None, config) is None
    mask = cache.grouped_mask(0, torch.empty(1, 2, 32), None, config)
    assert mask.shape == (1, 1, 4, 8) and mask.isinf().sum(dim=-1).flatten().tolist() == [1, 0, 1, 0]


def test_bytes_count_keys_and_values():
    _, cache, _, _ = filled()
    assert cache.num_bytes == sum(cache.lengths) * 2 * 2 * 8 * 4
    _, static, _, _ = filled(static=True)
    assert static.num_bytes == 4 * 200 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cropped_tokens_leave_no_trace(scheme, static):
    """Crop to the end of a frame and into text; later logits equal those of a cache that never held the rest."""
    model, cache, ids, features = filled(scheme, static=static)
    frame_ends = [i + 1 for i in range(ids.shape[1] - 1) if ids[0, i] == model.config.frame_token_id]
    frame_ends = frame_ends[FRAME - 1 :: FRAME]
    for length, frames in ((ids.shape[1] - 2, 5), (frame_ends[3], 4), (frame_ends[1] + 2, 2), (3, 0)):
        cache.crop(length - int(cache.get_seq_length()))
        fresh = model.new_cache(max_lengths=[200] * 4 if static else None)
        with torch.no_grad():
            given = features[:, :frames] if frames else None
            model(input_ids=ids[:, :length], frame_features=given, cache=fresh)
        assert cache.lengths == fresh.lengths and int(cache.get_seq_length()) == length
        for layer in model.config.routed_layers:
            kept = slice(0, cache.lengths[layer])
            assert torch.equal(cache.get_positions(layer)[:, kept], fresh.get_positions(layer)[:, kept])
        assert_close(next_logits(model, cache), next_logits(model, fresh))


@pytest.mark.parametrize("scheme", ["full", "interleaved", "all", "early_exit"])
def test_cropped_rows_with_different_frames(scheme):
    """Rows of one length hold different numbers of entries in routed layers; shorter ones get filler."""
    model = tiny_model(**SCHEMES[scheme])
    rows = [dialogue_ids(model.config, [2, 1], seed=0), dialogue_ids(model.config, [1], seed=1)]
    longest = rows[0].shape[1]
    ids = torch.full((2, longest), 9)
    ids[0], ids[1, : rows[1].shape[1]] = rows[0][0], rows[1][0]
    features = random_features(model.config, 3, batch=2)
    cache = model.new_cache()
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, num_frames=[3, 1], cache=cache)
    # The first row ends with its second frame and then with its first, the other in text and then with its frame.
    for counts in ((2, 1), (1, 1)):
        shown = (ids[0] == model.config.frame_token_id).nonzero().flatten()
        length = int(shown[counts[0] * FRAME - 1]) + 1
        cache.crop(length - int(cache.num_seen))
        logits = next_logits(model, cache, batch=2)
        for row, count in enumerate(counts):
            with torch.no_grad():
                alone = model(input_ids=ids[row : row + 1, :length], frame_features=features[row : row + 1, :count])
            assert_close(logits[row : row + 1], next_logits(model, alone.cache), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_crop_refuses_to_split_a_frame(static):
    _, cache, ids, _ = filled(static=static)
    lengths = cache.lengths
    with pytest.raises(ValueError, match="would leave part of a frame"):
        cache.crop(-8)
    assert cache.lengths == lengths and int(cache.get_seq_length()) == ids.shape[1]
    for bad in (1, -ids.shape[1] - 1):
        with pytest.raises(ValueError, match="must be negative"):
            cache.crop(bad)
    with pytest.raises(ValueError, match="The last 7 tokens cannot include 1 frames"):
        cache.crop(-7, num_frames=1)
    assert cache.lengths == lengths
    cache.crop(0)
    cache.crop(-ids.shape[1])
    assert cache.lengths == [0] * 4


@pytest.mark.parametrize("static", [False, True])
def test_rows_are_reordered_repeated_and_selected(static):
    model, cache, ids, features = filled(batch=2, static=static)
    expected = next_logits(model, cache, batch=2)
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 0]))
    assert_close(next_logits(model, reordered, batch=2), expected[[1, 0]])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(3)
    assert_close(next_logits(model, repeated, batch=6), expected.repeat_interleave(3, dim=0))
    selected = copy.deepcopy(repeated)
    selected.batch_select_indices(torch.tensor([4, 0]))
    assert_close(next_logits(model, selected, batch=2), expected[[1, 0]])
    # Positions and the record of frames move with the rows, so crop still works.
    layer = model.config.routed_layers[0]
    assert torch.equal(selected.get_positions(layer), cache.get_positions(layer)[[1, 0]])
    with pytest.raises(ValueError, match="would leave part of a frame"):
        selected.crop(-8)
    selected.crop(-4)
    fresh = model.new_cache()
    with torch.no_grad():
        model(input_ids=ids[[1, 0], :-4], frame_features=features[[1, 0]], num_frames=[5, 5], cache=fresh)
    assert_close(next_logits(model, selected, batch=2), next_logits(model, fresh, batch=2))


@pytest.mark.parametrize("static", [False, True])
def test_reset_is_empty(static):
    model, cache, ids, features = filled(static=static)
    expected = next_logits(model, cache)
    cache.reset()
    assert cache.lengths == [0] * 4 and int(cache.get_seq_length()) == 0
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, cache=cache)
    assert_close(next_logits(model, cache), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="layers are moved on a stream of the accelerator")
def test_offloaded_layers_come_back():
    model = tiny_model().cuda()
    inputs = {"input_ids": dialogue_ids(model.config, RUNS).cuda()}
    features = random_features(model.config, 5).cuda()
    expected = model(**inputs, frame_features=features).logits
    cache = model.new_cache(offloading=True)
    assert_close(model(**inputs, frame_features=features, cache=cache).logits, expected)


def seen_next(model, cache, features):
    """Return the logits of one more frame, whose kept tokens depend on the frame before."""
    ids = dialogue_ids(model.config, [1], seed=9).expand(len(features), -1)
    with torch.no_grad():
        outputs = model(input_ids=ids, frame_features=features, num_frames=[1] * len(features), cache=cache)
    return outputs.logits


CHANGES = {
    "nothing": (lambda cache: cache, [0, 1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_previous_frame_moves_with_its_row(change, static):
    model, cache, ids, features = filled("change", batch=2, static=static)
    more = random_features(model.config, 1, batch=2, seed=3)
    function, rows = CHANGES[change]
    twin = copy.deepcopy(cache)
    function(cache)
    logits = seen_next(model, cache, more[rows])
    for row, got in zip(rows, logits, strict=True):
        alone = model.new_cache()
        with torch.no_grad():
            model(input_ids=ids[row : row + 1], frame_features=features[row : row + 1], cache=alone)
        assert_close(got[None], seen_next(model, alone, more[row : row + 1]), atol=1e-5, rtol=1e-4)
    twin.reset()
    with torch.no_grad():
        first = model(input_ids=ids, frame_features=features, num_frames=[5, 5], cache=twin).logits
        assert_close(first, model(input_ids=ids, frame_features=features, num_frames=[5, 5]).logits)


def test_after_a_crop_the_previous_frame_is_an_earlier_one():
    model, cache, ids, features = filled("change")
    more, places = random_features(model.config, 1, seed=3), ids[0].tolist()
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(places)) if b != a == model.config.frame_token_id]
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, cache=cache)
    for frames in (5, 4, 2, 1):  # in the second half, which also remembers the last frame of the first
        length = len(places) + (ends[frames - 1])
        fresh = model.new_cache()
        with torch.no_grad():
            both, shown = torch.cat([ids, ids], dim=1), torch.cat([features, features], dim=1)
            model(input_ids=both[:, :length], frame_features=shown[:, : 5 + frames], cache=fresh)
        cache.crop(length - int(cache.get_seq_length()))
        assert_close(seen_next(model, copy.deepcopy(cache), more), seen_next(model, fresh, more), atol=1e-5, rtol=1e-4)
    cache.crop(len(places) - length)  # to the end of the first half
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, cache=(fresh := model.new_cache()))
    assert_close(seen_next(model, copy.deepcopy(cache), more), seen_next(model, fresh, more), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"Crop to at least {len(places)} tokens, or reset the cache"):
        cache.crop(-5)
    cache.crop(-len(places))
    expected = seen_next(model, model.new_cache(), more)
    assert_close(seen_next(model, cache, more), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("goes", [False, True])
def test_after_an_eviction_the_previous_frame_is_the_last(goes):
    """Also if it is evicted itself."""
    model, cache, ids, features = filled("change")
    more, keep = random_features(model.config, 1, seed=3), torch.ones(ids.shape[1], dtype=torch.bool)
    keep[5:15] = False  # the first frame
    keep[44:65] = not goes  # the last two
    model.evict_tokens(cache, token_runs(model.config, ids, keep))
    cache.crop(-2, num_frames=0)
    last = model.model.connector(features[:, -1])
    ids = dialogue_ids(model.config, [1], seed=9)
    with torch.no_grad():
        embeddings = model.model.connector(more[:, 0])
        kept = model(input_ids=ids, frame_features=more, cache=cache, output_router_scores=True).kept_tokens[0]
    scores = (embeddings - last).norm(dim=-1)
    assert kept[0, 0].nonzero().flatten().tolist() == choose_kept(scores, 2, keep_last=True)[0].tolist()


@pytest.mark.parametrize("how", ["select", "reorder"])
def test_crop_after_the_longest_row_was_removed(how):
    """Columns that only the removed row used lie between real entries, which must stay."""
    model = tiny_model(mod_layers="all")
    rows = [dialogue_ids(model.config, [2, 1], seed=0), dialogue_ids(model.config, [1], seed=1)]
    ids = torch.full((2, rows[0].shape[1]), 9)
    for index, row in enumerate(rows):
        ids[index, : row.shape[1]] = row[0]
    features, tail = random_features(model.config, 3, batch=2), torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        cache, expected = model.new_cache(), model.new_cache()
        model(input_ids=ids, frame_features=features, num_frames=[3, 1], cache=cache)
        if how == "select":
            cache.batch_select_indices(torch.tensor([0]))
        else:
            cache.reorder_cache(torch.tensor([0, 0]))
            cache.batch_select_indices(torch.tensor([1]))
        model(input_ids=tail, cache=cache)
        cache.crop(-1)
        model(input_ids=ids[:1], frame_features=features[:1], cache=expected)
        model(input_ids=tail[:, :2], cache=expected)
        outputs = [model(input_ids=torch.tensor([[7]]), cache=c).logits for c in (cache, expected)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_crop_removes_all_or_none_of_a_compiled_steps_tokens():
    """Compiled steps keep no record of frames, so a crop inside one is refused with the possible lengths."""
    torch.compiler.reset()
    model = tiny_model(mod_layers="all").requires_grad_(False)
    text = model.config.text_config
    cache = model.new_cache(max_lengths=[100] * 4)
    shape = (1, text.num_key_value_heads, text.head_dim, torch.float32, torch.device("cpu"))
    cache.early_initialization(*shape)
    step = torch.compile(model, fullgraph=True, backend="eager")
    ids = dialogue_ids(model.config, [1])
    model(input_ids=ids[:, :5], cache=cache)
    step(input_ids=ids[:, 5:15], frame_features=random_features(model.config, 1), cache=cache)
    model(input_ids=ids[:, 15:18], cache=cache)
    with pytest.raises(ValueError, match="Crop to 5 or 15 tokens"):
        cache.crop(-7)
    assert int(cache.get_seq_length()) == 18
    cache.crop(-2)
    cache.crop(-1)
    assert int(cache.get_seq_length()) == 15
    cache.crop(-10)
    assert int(cache.get_seq_length()) == 5 and cache.lengths == [5] * 4


def test_refuses_a_wrong_number_of_lengths():
    with pytest.raises(ValueError, match="2 lengths for 3 layers"):
        VideoLLMMoDCache(3, max_lengths=[4, 4])


ONE_LAYER = {"full": {"mod_keep_ratio": 1.0}, "routed": {"mod_layers": "all"}, "evenly": {"mod_keep_ratio": [0.4]}}


def test_parts_are_the_entries_that_stay_and_how_far_they_move():
    draw = random.Random(0)
    for _ in range(300):
        runs = []
        for _ in range(draw.randint(1, 6)):
            frames = draw.randint(0, 2)
            runs.append(TokenRun(draw.randint(1, 3) + 3 * frames, frames, draw.random() < 0.5))
        skipped, back = draw.choice([0, 2]), draw.choice([0, 7])
        expected, entry, removed = [], 0, 0
        for run in runs:
            length = run.num_tokens - skipped * run.num_frames
            expected += [(entry + i, removed) for i in range(length) if run.stays]
            entry, removed = entry + length, removed + run.num_tokens * (not run.stays)
        parts = _find_parts(runs, skipped, back)
        assert [(i, part.removed) for part in parts for i in range(part.begin, part.end)] == expected
        if expected:
            assert all(part.by == removed - part.removed - back for part in parts)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scheme", ONE_LAYER)
@pytest.mark.parametrize("text", [*TEXT_MODELS, "smollm3 without positions", "llama yarn", "mistral window"])
def test_after_eviction_logits_equal_those_of_the_kept_tokens(text, scheme, static):
    """With one layer, where an entry depends only on its token and position; for several kinds of rotary embedding."""
    overrides = {"num_hidden_layers": 1, "no_rope_layers": [0 if "without" in text else 1]}
    if "yarn" in text:
        overrides["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    if "window" in text:
        overrides["sliding_window"] = 12
    model = tiny_model(text=text.split()[0], text_overrides=overrides, **ONE_LAYER[scheme])
    ids = dialogue_ids(model.config, [3, 2])
    features = random_features(model.config, 5)
    frames = (ids[0] == model.config.frame_token_id).nonzero().squeeze(1).view(5, FRAME)
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    keep[frames[1]] = keep[frames[1, 0] - 1] = False  # a frame in the middle of a run, and what stood before it
    keep[frames[4]] = keep[2] = False
    runs = token_runs(model.config, ids, keep)
    cache = model.new_cache(max_lengths=[200] if static else None)
    with torch.no_grad():
        model(input_ids=ids, frame_features=features, cache=cache)
        assert not torch.equal(next_logits(model, cache), next_logits(model, _evicted(model, cache, runs)))
        model.evict_tokens(cache, runs)
        expected = model.new_cache()
        model(input_ids=ids[:, keep], frame_features=features[:, [0, 2, 3]], cache=expected)
        assert int(cache.get_seq_length()) == int(keep.sum()) and cache.lengths == expected.lengths
        for layer in model.config.routed_layers:
            assert torch.equal(cache.get_positions(layer)[:, : cache.lengths[0]], expected.get_positions(layer))
        # Later tokens come, are cropped, and come again.
        more = {"input_ids": dialogue_ids(model.config, [2])[:, 5:], "frame_features": features[:, :2]}
        for _ in range(2):
            logits = model(**more, cache=cache).logits
            assert_close(logits, model(**more, cache=expected).logits, atol=1e-5, rtol=1e-4)
            cache.crop(-more["input_ids"].shape[1])
            expected.crop(-more["input_ids"].shape[1])


def _evicted(model, cache, runs):
    cache = copy.deepcopy(cache)
    model.evict_tokens(cache, runs)
    return cache


def test_crop_refuses_to_split_a_frame_after_eviction():
    model, cache, ids, _ = filled()
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    frames = (ids[0] == model.config.frame_token_id).nonzero().squeeze(1).view(5, FRAME)
    keep[frames[0]] = False
    model.evict_tokens(cache, token_runs(model.config, ids, keep))
    with pytest.raises(ValueError, match="would leave part of a frame"):
        cache.crop(int(frames[4, 3]) - ids.shape[1])
    cache.crop(int(frames[4, 9]) + 1 - ids.shape[1])
    assert int(cache.get_seq_length()) == int(frames[4, 9]) + 1 - FRAME


def test_eviction_refuses_several_rows_and_wrong_shapes():
    model, cache, ids, _ = filled(batch=2)
    with pytest.raises(ValueError, match="caches of one row; this one has 2"):
        model.evict_tokens(cache, token_runs(model.config, ids, torch.ones(ids.shape[1])))
    with pytest.raises(ValueError, match=f"`runs` have 3 tokens; the cache has seen {ids.shape[1]}"):
        model.evict_tokens(cache, [TokenRun(3)])
    model, cache, ids, _ = filled()
    with pytest.raises(ValueError, match="`runs` have 37 entries in layer 0; the cache has 29"):
        model.evict_tokens(cache, [TokenRun(ids.shape[1], 4)])
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(text_overrides={"rope_parameters": rope})
    with pytest.raises(ValueError, match="type 'dynamic' depend on the length"):
        model.evict_tokens(model.new_cache(), [])


def test_layers_on_another_device_than_the_embeddings_can_evict():
    """Positions of all layers lie beside the embeddings: those after an eviction, and those that come later."""
    cache = VideoLLMMoDCache(2, {0: 8, 1: 8})
    for layer, device in enumerate(("cpu", "meta")):
        cache.record_positions(layer, torch.tensor([[0, 1, 2, 5, 9, 14, 20, 23, 24]]))
        cache.update(*torch.zeros(2, 1, 1, 9, 4, device=device), layer)
    cache.advance(25)
    cache.evict([TokenRun(3), TokenRun(10, 1, stays=False), TokenRun(10, 1), TokenRun(2)])
    for layer, device in enumerate(("cpu", "meta")):
        cache.record_positions(layer, torch.tensor([[0]]), 15)
        cache.update(*torch.zeros(2, 1, 1, 1, 4, device=device), layer)
        assert cache.get_positions(layer).tolist() == [[0, 1, 2, 4, 10, 13, 14, 15]]
    cache.advance(1)
    cache.crop(-2)
    assert cache.lengths == [6, 6] and cache.layers[1].keys.is_meta


def exact_rotation(model, keys, positions):
    """Return keys (1, heads, length, dim) at rotary positions (length,), in float64."""
    angles = positions[:, None] * model.model.language_model.rotary_emb.inv_freq.double().repeat(2)
    turned = torch.cat([-keys[..., keys.shape[-1] // 2 :], keys[..., : keys.shape[-1] // 2]], dim=-1)
    return keys * angles.cos() + turned * angles.sin()


@pytest.mark.parametrize("most", [2**16, 500])
@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", None), ("float16", None), ("bfloat16", "float8_e4m3fn"), ("float32", None)]
)
def test_roundings_do_not_add_up_over_evictions(monkeypatch, dtype, stored, most):
    """Keys are compared with an exact rotation to where they are, also if positions start again from 0."""
    monkeypatch.setattr(cache_videollm_mod, "MAX_OFFSET", most)
    dtype, stored = getattr(torch, dtype), stored and getattr(torch, stored)
    model = tiny_model(mod_keep_ratio=1.0, text_overrides={"head_dim": 64, "num_hidden_layers": 1}).to(dtype)
    cache, held, errors, of_text = model.new_cache(dtype=stored), torch.zeros(1, 2, 0, 64).double(), [], []
    for _ in range(17):
        new = torch.randn(1, 2, 340 if held.shape[2] == 0 else 100, 64, dtype=torch.float64)
        at = torch.arange(new.shape[2]) + cache.next_position
        cache.update(exact_rotation(model, new, at).to(dtype), new.to(dtype), 0)
        cache.advance(new.shape[2])
        held = torch.cat([held, new], dim=2)
        exact = exact_rotation(model, held, torch.arange(held.shape[2]) + cache.position_offset)
        change = cache.layers[0].keys.double() - exact
        errors.append(float(change.norm() / exact.norm()))
        of_text.append(float(change[:, :, :40].norm() / exact[:, :, :40].norm()))
        model.evict_tokens(cache, [TokenRun(40), TokenRun(100, stays=False), TokenRun(held.shape[2] - 140)])
        held = torch.cat([held[:, :, :40], held[:, :, 140:]], dim=2)
    assert cache.position_offset == (1700 if most > 500 else 500)
    if dtype == torch.float32:
        assert max(errors) < 1e-4
    else:
        assert max(errors) < 1.3 * errors[0]
        # What moves is rounded twice, however often: two errors of one size make one of the root of 2 times that size.
        assert max(of_text) < 1.04 * 2**0.5 * errors[0]


def test_moved_entries_survive_crops_copies_and_a_reset():
    """With one layer, where an entry depends only on its token and position."""
    model = tiny_model(text_overrides={"num_hidden_layers": 1}, mod_layers="all")
    ids, features = dialogue_ids(model.config, [2, 2]), random_features(model.config, 4)
    cache, expected = model.new_cache(), model.new_cache()
    runs = [TokenRun(5), TokenRun(11, 1, stays=False), TokenRun(24, 2), TokenRun(11, 1, stays=False), TokenRun(4)]
    later = [TokenRun(2), TokenRun(2, stays=False), TokenRun(11, 1), TokenRun(3)]
    kept = torch.cat([ids[:, [0, 1, 4]], ids[:, 16:26], ids[:, :3]], dim=1)
    with torch.no_grad():
        model(input_ids=kept, frame_features=features[:, 1:2], cache=expected)
        for _ in range(2):
            model(input_ids=ids, frame_features=features, cache=cache)
            model.evict_tokens(cache, runs)
            cache = copy.deepcopy(cache)
            cache.crop(-18, num_frames=1)  # text and one frame are left of what has moved
            model(input_ids=ids[:, :3], cache=cache)
            model.evict_tokens(cache, later)
            assert cache.lengths == expected.lengths == [8]
            assert_close(next_logits(model, cache), next_logits(model, expected), atol=1e-5, rtol=1e-4)
            cache.reset()
            assert cache.next_position == cache.num_bytes == 0


@pytest.mark.parametrize("make", ["growing", "preallocated", "eight bits"])
def test_evictions_and_crops_launch_little_and_ask_the_device_nothing(make):
    model = tiny_model(mod_layers="all_deep", text_overrides={"num_hidden_layers": 32})
    dtype = torch.float8_e4m3fn if make == "eight bits" else None
    cache = with_room(model) if make == "preallocated" else model.new_cache(dtype=dtype)
    check_launches(model, cache, cache_videollm_mod)


def check_launches(model, cache, *modules):
    """Evict, and crop a frame, twice. Count launches, and look for waits in functions of these modules."""
    ids, features = dialogue_ids(model.config, [2, 2]), random_features(model.config, 4)
    for before, frames in ((0, 0), (40, 3)):
        with torch.no_grad():
            model(input_ids=ids, frame_features=features, cache=cache)
        runs = [TokenRun(before + 5, frames), TokenRun(11, 1, stays=False), TokenRun(39, 3)]
        with CountOperations() as evicting, HostAndDevice(*modules) as waiting:
            model.evict_tokens(cache, runs)
        with CountOperations() as cropping, waiting:
            cache.crop(-4, num_frames=0)
        assert sum(evicting.counts.values()) <= 10 * 32 and sum(cropping.counts.values()) <= 32
        assert not waiting.found


def test_a_growing_cache_in_eight_bits():
    model = tiny_model().to(torch.bfloat16)
    exact, rounded = model.new_cache(), model.new_cache(dtype=torch.float8_e4m3fn)
    for step in range(2):
        inputs = {"input_ids": dialogue_ids(model.config, [2], seed=step)}
        inputs["frame_features"] = random_features(model.config, 2, seed=step).to(torch.bfloat16)
        with torch.no_grad():
            for cache in (exact, rounded):
                model(**inputs, cache=cache)
    assert exact.lengths == rounded.lengths and exact.num_bytes == 2 * rounded.num_bytes
    assert torch.equal(rounded.layers[0].keys.float(), exact.layers[0].keys.to(torch.float8_e4m3fn).float())
    rounded.crop(-4)
    later = int(rounded.get_seq_length()) - 16
    model.evict_tokens(rounded, [TokenRun(5), TokenRun(11, 1, stays=False), TokenRun(later, 3)])
    assert rounded.layers[0].keys.dtype == torch.float8_e4m3fn and rounded.lengths[0] == later + 5
    with pytest.raises(ValueError, match="`dtype` needs layers that grow"):
        model.new_cache(max_lengths=[10] * 4, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, "fp8"])
def test_a_cache_of_whole_numbers_is_refused(dtype):
    model, processor = tiny_model(), tiny_processor()
    for make in (
        lambda: model.new_cache(dtype=dtype),
        lambda: model.stream(processor, cache_dtype=dtype),
        lambda: StreamingEngine(model, processor, max_streams=1, max_frames=12, cache_dtype=dtype),
    ):
        with pytest.raises(ValueError, match=f"cannot be stored as {dtype}: .*`torch.float8_e4m3fn`"):
            make()


# ------------------------------------------------------------------------------------------------ preallocated layers


def with_room(model, capacity=100, **options):
    """Return a preallocated cache of a session, and let the model attend to it by groups of heads."""
    cache = model.new_cache(**options)
    for layer in cache.layers:
        layer.capacity = capacity
    cache.is_grouped = use_grouped_attention(model.model.language_model)
    return cache


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_preallocated_cache_equals_a_growing_one(scheme, dtype):
    model = tiny_model(**SCHEMES[scheme])
    caches = model.new_cache(dtype=dtype), with_room(model, dtype=dtype)
    for step, runs in enumerate([[2, 1], [], [1]]):
        inputs = {"input_ids": dialogue_ids(model.config, runs, seed=step)}
        if runs:
            inputs["frame_features"] = random_features(model.config, sum(runs), seed=step)
        num_tokens, frames = int(caches[0].get_seq_length()) + inputs["input_ids"].shape[1], [3, 3, 4][step]
        runs = [TokenRun(1), TokenRun(1, stays=False), TokenRun(num_tokens - 2, frames)]
        with torch.no_grad():
            growing, preallocated = (model(**inputs, cache=cache).logits for cache in caches)
            assert_close(preallocated, growing, atol=1e-5, rtol=1e-4)
            for cache in caches:
                model.evict_tokens(cache, runs)
                cache.crop(-3, num_frames=0)
    assert caches[0].lengths == caches[1].lengths
    for grown, layer in zip(caches[0].layers, caches[1].layers, strict=True):
        if layer.is_initialized:
            # An error in an early layer may move a rounded value to the next one.
            assert_close(layer.keys.float(), grown.keys.float(), atol=1e-5, rtol=0.13 if dtype else 1e-4)


def test_preallocated_layers_keep_their_addresses_until_they_are_full():
    model = tiny_model()
    cache, ids = with_room(model, 70), dialogue_ids(model.config, [2, 1])
    buffers = []
    with torch.no_grad():
        for step in range(3):
            runs = [TokenRun(int(cache.get_seq_length()) + 5, step), TokenRun(21, 2, stays=False), TokenRun(18, 1)]
            model(input_ids=ids, frame_features=random_features(model.config, 3), cache=cache)
            buffers.append([layer.buffers for layer in cache.layers])
            model.evict_tokens(cache, runs)
            cache.crop(-4, num_frames=0)
    moved = sum(keys.nbytes for _, keys in cache._moved.values())  # as they were before evictions
    assert cache.num_bytes == moved + sum(2 * len(layer.buffers[0]) * 2 * 8 * 4 for layer in cache.layers)
    rooms = [[len(layer[0]) - SPARE_ROOM for layer in step] for step in buffers]
    assert rooms == [[70] * 4, [70] * 4, [4096, 70, 4096, 70]]  # the last step needs 82 entries in full layers
    for layer, before, after in zip(cache.layers, *buffers[1:], strict=True):
        assert layer.keys.data_ptr() == after[0].data_ptr() and buffers[0][0][0].shape[1:] == (1, 2, 8)
        assert (before[0] is after[0]) == (len(after[0]) - SPARE_ROOM == 70)


def test_a_copied_preallocated_cache_has_its_own_memory():
    model = tiny_model()
    cache, ids = with_room(model), dialogue_ids(model.config, [1])
    inputs = {"input_ids": ids, "frame_features": random_features(model.config, 1)}
    with torch.no_grad():
        model(**inputs, cache=cache)
        twin = copy.deepcopy(cache)
        expected = model(**inputs, cache=cache).logits
        assert (
            twin.lengths[0] == ids.shape[1] and twin.layers[0].buffers[0].data_ptr() == twin.layers[0].keys.data_ptr()
        )
        assert torch.equal(model(**inputs, cache=twin).logits, expected)


def test_a_step_copies_no_cache_and_makes_one_mask_per_kind_of_layer():
    model = tiny_model()
    caches = model.new_cache(), with_room(model)
    frame = {"input_ids": torch.tensor([[7, *[model.config.frame_token_id] * FRAME]])}
    frame["frame_features"] = random_features(model.config, 1)
    large, masks = [], []
    for cache in caches:
        with torch.no_grad():
            for _ in range(20):
                model(**frame, cache=cache)
            with NewTensors() as mode:
                model(**frame, cache=cache)
            kept = 2 * 8 * cache.lengths[1]  # elements of the shortest layer's keys
            large.append([name for name, tensor in mode.made if tensor.shape[-1:] == (8,) and tensor.numel() >= kept])
            masks.append([tuple(x.shape) for name, x in mode.made if name == "masked_fill" and x.is_floating_point()])
    assert large[0].count("cat") == 2 * 4 and large[1] == []
    assert sorted(masks[1]) == [(3, 63), (11, 231)]


class NewTensors(TorchDispatchMode):
    """Record the name of each operation that makes a tensor in new memory, and the tensor."""

    def __enter__(self):
        self.made = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in old:
                self.made.append((function.name().removeprefix("aten::").split(".")[0], x))
        return result


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_grouped_attention_leaves_other_steps_as_they_were(text, implementation):
    """Padded and packed rows, training, sliding windows, an empty static cache."""
    window = {"sliding_window": 9} if text == "mistral" else {}
    model = tiny_model(text=text, attn_implementation=implementation, text_overrides=window)
    ids = dialogue_ids(model.config, [2, 1]).repeat(2, 1)
    features = random_features(model.config, 3, batch=2)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    packed = (torch.arange(ids.shape[1]) >= 5).long().repeat(2, 1)

    def outputs():
        given = {"input_ids": ids, "frame_features": features, "num_frames": [3, 3]}
        one = {"input_ids": ids[:1], "frame_features": features[:1]}
        static, growing = model.new_cache(max_lengths=[99] * 4), model.new_cache()
        with torch.no_grad():
            yield model(**given, attention_mask=padding).logits
            yield model(**given, seq_idx=packed).logits
            for cache in (static, growing):
                yield model(**one, cache=cache).logits
                yield model(**one, cache=cache).logits
                yield model(input_ids=ids[:1, :1], cache=cache).logits

    before = list(outputs())
    assert len(before) == 8
    assert use_grouped_attention(model.model.language_model) == (implementation == "sdpa")
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))


def test_preallocated_layers_see_a_sliding_window():
    model = tiny_model(text="mistral", text_overrides={"sliding_window": 20})
    caches = model.new_cache(), with_room(model)
    with torch.no_grad():
        for step in range(3):
            inputs = {"input_ids": dialogue_ids(model.config, [2], seed=step)}
            inputs["frame_features"] = random_features(model.config, 2, seed=step)
            growing, preallocated = (model(**inputs, cache=cache).logits for cache in caches)
            assert_close(preallocated, growing, atol=1e-5, rtol=1e-4)


def test_half_precision_on_a_gpu_gets_the_causal_form_of_flash_attention():
    model = tiny_model()
    cache = with_room(model)
    inputs = torch.empty(1, 4, 32, device="cpu", dtype=torch.bfloat16)
    cache.layers[0].update(*torch.zeros(2, 1, 2, 6, 8))
    mask = cache.grouped_mask(0, inputs, None, model.config.text_config)
    assert mask.shape == (1, 1, 8, 10) and mask.dtype == torch.bfloat16
    with FakeTensorMode():
        on_gpu = torch.empty(1, 4, 32, device="cuda", dtype=torch.bfloat16)
    lower_right = cache.grouped_mask(0, on_gpu, None, model.config.text_config)
    assert isinstance(lower_right, CausalBias) and (lower_right.seq_len_q, lower_right.seq_len_kv) == (4, 10)
    query, key, value = torch.randn(1, 4, 4, 8), *torch.randn(2, 1, 2, 10, 8)
    module = model.model.language_model.layers[0].self_attn
    masks = (lower_right, mask.float())
    keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
    for scaling in (8**-0.5, 0.7):
        scores = (scaling * query @ keys.mT).masked_fill(torch.ones(4, 10).tril(6) == 0, -torch.inf)
        expected = (scores.softmax(dim=-1) @ values).transpose(1, 2)
        for m in masks:
            found, _ = grouped_attention_forward(module, query, key, value, m, scaling=scaling)
            assert_close(found, expected, atol=1e-6, rtol=1e-5)
        last, _ = grouped_attention_forward(module, query[:, :, -1:], key, value, None, scaling=scaling)
        assert_close(last, expected[:, -1:], atol=1e-6, rtol=1e-5)
