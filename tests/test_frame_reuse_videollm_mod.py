# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which frames are encoded, which reuse features, and that this does not depend on how frames are pushed."""

import json

import numpy as np
import pytest
import torch
from engines import NARRATE, embedded
from tiny import ROOT, random_frames, tiny_model, tiny_processor
from torch.testing import assert_close

from videollm_mod import read_video
from videollm_mod.frame_reuse_videollm_mod import FrameReuse


SAMPLES = ROOT / "samples"
LOUD = {"max_new_tokens": 3, "interval_threshold": 0.004}


def stack(*frames):
    """Frames (height, width, 3) as `choose` takes them."""
    return torch.stack([torch.from_numpy(frame) for frame in frames]).permute(0, 3, 1, 2)


def encoded(reuse, frames):
    """Which frames are encoded, given them one by one."""
    found = []
    for frame in frames:
        chosen = reuse.choose(stack(frame))
        found.append(chosen[0] is not None)
        reuse.spread(chosen, torch.zeros(sum(found[-1:]), 2, 3))
    return found


def hall(*, at=None, noise=0.0, light=0, seed=0):
    """A room of 512 x 512 with something of 12 x 12 in it, hardly brighter than the wall."""
    grid = np.linspace(60, 140, 512)
    room = np.repeat((grid[:, None] + grid[None])[..., None] / 2 + light, 3, axis=2)
    if at is not None:
        room[200:212, at : at + 12] += 60
    room += np.random.default_rng(seed).normal(0, noise, room.shape)
    return room.clip(0, 255).astype(np.uint8)


def scene():
    """Three views, each held for some frames with a little noise: 12 frames of the tiny model's size."""
    views = random_frames(3, seed=5).astype(int)
    held = [views[index] for index in (0, 0, 0, 0, 1, 1, 0, 2, 2, 2, 2, 2)]
    noise = np.random.default_rng(0).integers(-1, 2, (12, *views.shape[1:]))
    return (np.stack(held) + noise).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- the choice


def test_something_small_that_moves_is_noticed_and_noise_is_not():
    quiet = [hall(noise=8.0, seed=seed) for seed in range(4)]
    assert encoded(FrameReuse(3), quiet) == [True, False, False, False]
    moving = [hall(at=at) for at in (100, 140, 180)]
    assert encoded(FrameReuse(3), moving) == [True, True, True]
    assert np.abs(moving[1].astype(float) - moving[0]).mean() < 0.1


def test_a_slow_drift_adds_up_since_the_last_encoded_frame():
    dusk = [hall(light=-index) for index in range(9)]
    assert encoded(FrameReuse(3), dusk) == [True, False, False, False, True, False, False, False, True]


def test_colours_that_are_equally_bright_differ():
    red, green = (np.zeros((32, 32, 3), np.uint8) for _ in range(2))
    red[..., 0], green[..., 1] = 90, 90
    assert encoded(FrameReuse(3), [red, red, green]) == [True, False, True]


def test_a_distant_worker_who_hardly_moves_is_noticed():
    frames = [frame for _, frame in read_video(ROOT / "tests" / "data" / "nasa_13013.mp4", fps=2, end=4)]
    assert len(frames) > 7 and all(encoded(FrameReuse(3), frames))
    assert encoded(FrameReuse(3), [frames[0]] * 3) == [True, False, False]


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), True, "3"])
def test_a_threshold_that_is_not_positive_is_refused(threshold):
    with pytest.raises(ValueError, match="`reuse_static` must be a positive number"):
        tiny_model().stream(tiny_processor(), reuse_static=threshold)


# ------------------------------------------------------------------------------------------------------------ sessions


def watch(model, sizes, **options):
    """Push the scene in parts of these sizes. Return the session and how many frames each call encoded."""
    session, counts = model.stream(tiny_processor(), **LOUD, **options), []
    encode = model.encode_frames
    model.encode_frames = lambda pixels: counts.append(len(pixels)) or encode(pixels)
    try:
        parts = np.split(scene(), np.cumsum(sizes)[:-1])
        for part in parts:
            session.push(part)
    finally:
        model.encode_frames = encode
    return session, counts


def test_the_same_frames_reuse_features_however_frames_are_pushed():
    model = tiny_model(mod_layers="all")
    sessions = [watch(model, sizes, reuse_static=8) for sizes in ([1] * 12, [12], [2, 5, 3, 2])]
    assert [sum(counts) for _, counts in sessions] == [4, 4, 4] and sessions[0][1] == [1] * 4
    events = [[(e.time, e.text, e.token_ids) for e in session] for session, _ in sessions]
    assert events[0] == events[1] == events[2] and events[0]
    for session, _ in sessions:
        assert (session.num_reused, session.num_frames) == (8, 12)
        assert_close(session.cache.layers[0].keys, sessions[0][0].cache.layers[0].keys)


def test_a_reused_frame_is_the_last_encoded_one_to_the_model():
    model = tiny_model(mod_layers="all")
    frames = scene()
    session, _ = watch(model, [12], reuse_static=8)
    held = model.stream(tiny_processor(), **LOUD)
    held.push(frames[[0, 0, 0, 0, 4, 4, 6, 7, 7, 7, 7, 7]])
    assert_close(session.cache.layers[-1].values, held.cache.layers[-1].values)
    exact, counts = watch(model, [12])
    assert sum(counts) == 12 and exact.num_reused == 0
    assert not torch.allclose(exact.cache.layers[-1].values, held.cache.layers[-1].values)


# The camera and the ground stand still in samples of the world "tiny".
STILL = [path.stem for path in sorted(SAMPLES.glob("*.json")) if json.loads(path.read_text()).get("world") == "tiny"]


@pytest.mark.parametrize("clip", STILL)
def test_reuse_does_not_change_the_narration_of_the_samples(clip):
    model, processor, _ = embedded()
    told, reused = [], []
    for options in ({}, {"reuse_static": 3}):
        session = model.stream(processor, fps=4, **options)
        session.ask(NARRATE, reply_now=False)
        for time, frame in processor.read_video(SAMPLES / f"{clip}.mp4", fps=4):
            session.push(frame, time=time)
        told.append([(event.time, event.text) for event in session])
        reused.append(session.num_reused)
    assert told[0] == told[1] and len(told[0]) > 4
    assert reused[0] == 0 and reused[1] > 5


@pytest.mark.parametrize("sizes", [[1] * 6, [6], [2, 4]])
def test_reused_features_have_not_changed_to_the_change_router(sizes):
    """A still scene is the same to this router with and without reuse: nothing changed, so it keeps even spaces."""
    model, still = tiny_model(mod_layers="all", mod_router="change"), np.stack([scene()[0]] * 6)
    seen = []
    for options in ({}, {"reuse_static": 8}):
        session = model.stream(tiny_processor(), **LOUD, output_router_scores=True, **options)
        for part in np.split(still, np.cumsum(sizes)[:-1]):
            session.push(part)
        scores = torch.stack(list(session.router_scores.values()))
        assert session.num_reused == (5 if options else 0) and not scores.any()
        seen.append(([event.text for event in session.events], session.kept_tokens))
    assert seen[0][0] == seen[1][0] and all(torch.equal(kept, seen[1][1][layer]) for layer, kept in seen[0][1].items())


def test_a_fork_compares_with_its_own_frames():
    model = tiny_model()
    first, second = random_frames(2)
    session = model.stream(tiny_processor(), reuse_static=8)
    session.push(first)
    fork = session.fork()
    fork.push([second, second])
    session.push(first)
    assert (session.num_reused, fork.num_reused) == (1, 1)
    session.push(second)
    assert session.num_reused == 1


def test_a_frame_that_could_not_be_encoded_is_not_reused(monkeypatch):
    model = tiny_model()
    first, second = random_frames(2)
    session = model.stream(tiny_processor(), reuse_static=8)
    session.push(first)
    encode = model.encode_frames
    monkeypatch.setattr(model, "encode_frames", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        session.push(second)
    monkeypatch.setattr(model, "encode_frames", encode)
    session.push(second)
    assert (session.num_reused, session.num_frames) == (0, 2)
