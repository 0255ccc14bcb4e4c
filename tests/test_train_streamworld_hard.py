# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamWorld's masks show where things are, and its hard world has clutter, relations and small things."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_processor

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.world.clip import STEP, WORLDS, Actor, Clip
from videollm_mod.train.data.world.dialogues import KINDS, make_dialogue, questions_at
from videollm_mod.train.data.world.drawing import Painter
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.rows import streamworld_dataset
from videollm_mod.train.data.world.sprites import SHAPES, THINGS
from videollm_mod.train.encoding import encode_rows
from videollm_mod.train.pretrain_vision import LabelledPatches, make_scenes


HARD = WORLDS["hard"]
CLIPS = [make_clip(seed, HARD) for seed in range(150)]
# Digests of the dialogues, and the means of pictures, of the worlds before there was a hard world.
BEFORE = {
    "tiny": ("b16ba72b55500d9e", [114.9, 120.1, 134.4, 94.3, 92.7, 122.1]),
    "small": ("5f5b2bc7c9d0845b", [114.8, 120.1, 134.4, 91.2, 92.7, 122.0]),
    "full": ("e26a3789a11a0259", [114.5, 118.5, 136.4, 91.5, 92.6, 120.6]),
}


@pytest.mark.parametrize("name", BEFORE)
def test_older_worlds_are_as_before(name):
    """Pictures are compared by their means, because other versions of the JPEG library change single pixels."""
    dialogues, means = digest(name)
    assert dialogues == BEFORE[name][0] and np.abs(np.subtract(means, BEFORE[name][1])).max() <= 0.3


def digest(name):
    clips = [make_clip(seed, WORLDS[name]) for seed in range(6)]
    said = [[*(make_dialogue(clip, kind) for kind in KINDS), questions_at(clip, clip.seconds / 2)] for clip in clips]
    pictures = np.stack([clip.draw(4.5, 48) for clip in clips])
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16], pictures.mean((1, 2, 3)).round(1).tolist()


# ---------------------------------------------------------------------------------------------------------- masks


def changed_share(clip, time):
    """Return the share of each of 8 x 8 patches that changes if all things are removed."""
    pictures = []
    for shown in (clip, replace(clip, actors=())):
        painter = Painter(shown, 128)
        painter.noise, painter.quality = 0.0, 100
        pictures.append(painter.draw(time).astype(int))
    changed = np.abs(pictures[0] - pictures[1]).sum(-1) > 60
    return changed.reshape(8, 16, 8, 16).mean((1, 3)).ravel()


@pytest.mark.parametrize("name", ["hard", "small"])
def test_coverage_matches_the_pictures(name):
    shown = [(make_clip(seed, WORLDS[name]), time) for seed in range(12) for time in (2.5, 5.0)]
    coverage, changed = (
        np.concatenate([f(clip, time) for clip, time in shown]) for f in (Clip.coverage, changed_share)
    )
    assert coverage.dtype == np.float32 and coverage.min() >= 0 and coverage.max() <= 1
    # A soft rim may change outside, and a thing may have the color of what lies behind it.
    assert (changed <= coverage + 0.08).all() and changed.sum() > 0.8 * coverage.sum() > 10
    assert np.abs(coverage - changed).mean() < 0.01
    covered = np.concatenate([clip.covered(time) for clip, time in shown])
    assert covered.dtype == bool and changed[covered].sum() > 0.7 * changed.sum()


def lone_thing(width, x, y, **rest):
    return Clip(0, 4.0, (Actor("ball", [(0.0, x, y)], colors=[(0.0, "red")]),), (), width, **rest)


def test_patches_are_covered_by_a_quarter_or_hold_a_quarter_of_a_thing():
    # The disc has 0.82 of its width, and a thin rim.
    area = np.pi / 4 * (0.82 + 0.02) ** 2
    for width in (0.2, 0.7):
        clip = lone_thing(width, 0.5 + 1 / 16, 0.5 + 1 / 16)
        assert np.isclose(clip.coverage(0.0).sum() / 64, area * width**2, rtol=0.12)
        assert np.isclose(clip.coverage(0.0, grid=4).sum() / 16, area * width**2, rtol=0.12)
    # The small ball covers less than a quarter of its patch, which holds all of it.
    small = lone_thing(0.06, 0.5 + 1 / 16, 0.5 + 1 / 16)
    assert 0 < small.coverage(0.0).max() < 0.25 and np.flatnonzero(small.covered(0.0)).tolist() == [4 * 8 + 4]
    # On a corner, each of four patches holds a quarter, give or take a pixel; a little lower, two hold more.
    assert set(np.flatnonzero(lone_thing(0.06, 0.5, 0.51).covered(0.0))) == {4 * 8 + 3, 4 * 8 + 4}
    large = lone_thing(0.7, 0.5, 0.5)
    assert np.array_equal(large.covered(0.0), large.coverage(0.0) >= 0.25)
    assert not lone_thing(0.2, -0.2, 0.5).coverage(0.0).any(), "it is outside"


def test_the_wall_and_what_is_behind_it_cover_nothing():
    half = lone_thing(0.2, 0.5 - 0.17, 0.8, wall=0.5)
    alone = replace(half, wall=None)
    assert half.coverage(0.0).sum() == pytest.approx(alone.coverage(0.0).sum() / 2, rel=0.1)
    assert not replace(alone, hidden=((0, 0.0, 9.0),)).coverage(0.0).any()
    assert not lone_thing(0.2, 0.5, 0.8, wall=0.5).covered(0.0).any()


def test_a_patch_counts_two_things():
    """Two things that touch cover more together, and no pixel counts twice."""
    one, other = (lone_thing(0.12, x, 0.5625) for x in (0.53, 0.595))
    both = replace(one, actors=one.actors + other.actors)
    separate = one.coverage(0.0) + other.coverage(0.0)
    assert (both.coverage(0.0) <= np.minimum(separate, 1)).all() and both.coverage(0.0).sum() < separate.sum()
    assert both.coverage(0.0).sum() > 1.4 * one.coverage(0.0).sum()


def test_rows_carry_the_covered_patches(tmp_path):
    """They are there for each frame of both kinds of video, survive encoding, and change no batch."""
    short = replace(HARD, seconds=(4.0, 5.0))
    rows = streamworld_dataset(num_clips=6, kinds={"describe": 1.0, "narrate": 1.0}, world=short, size=24)
    assert {row["kind"] for row in rows} == {"describe", "narrate"}
    for row in rows:
        assert len(row["covered"]) == len(row["video"])
        assert all(patches == sorted(set(patches)) and set(patches) <= set(range(64)) for patches in row["covered"])
    narrated = next(row for row in rows if row["kind"] == "narrate")
    clip = make_clip(narrated["seed"], short)
    assert narrated["covered"][2] == np.flatnonzero(clip.covered(2 * STEP)).tolist() != []

    made = encode_rows(rows.select([0]), tmp_path, tiny_model(), tiny_processor())
    assert json.loads(json.dumps(made))[0]["covered"] == rows[0]["covered"]
    collator = StreamCollator(tiny_processor())
    batch, bare = collator([narrated]), collator([{k: v for k, v in narrated.items() if k != "covered"}])
    assert batch.keys() == bare.keys() and all(torch.equal(batch[name], bare[name]) for name in batch)


# ----------------------------------------------------------------------------------------------------- hard world


def test_the_hard_world_shows_few_small_things_and_often_something_happens():
    seen = [len(clip.visible(index * STEP)) for clip in CLIPS for index in range(clip.num_frames(1 / STEP))]
    # One of the two that are there at first may hide.
    assert set(seen) == {1, 2, 3, 4, 5} and np.mean(np.array(seen) == 1) < 0.1
    assert all(6 <= clip.seconds <= 10 and 0.13 <= clip.size <= 0.2 for clip in CLIPS)
    events = [event.kind for clip in CLIPS for event in clip.events]
    assert set(events) == set(HARD.events) and len(events) / sum(clip.seconds for clip in CLIPS) > 0.5
    assert HARD.things == WORLDS["tiny"].things and HARD.pairs() == WORLDS["tiny"].pairs()


def test_clutter_has_the_colors_of_things_and_no_dialogue_mentions_it():
    for clip in CLIPS:
        moving = [shape for shape in clip.clutter if shape.drift != (0.0, 0.0)]
        assert 8 <= len(clip.clutter) - len(moving) <= 20 and 2 <= len(moving) <= 6
        assert all(shape.width <= clip.size and shape.color in HARD.colors for shape in clip.clutter)
        said = " ".join(m["content"] for kind in KINDS for m in make_dialogue(clip, kind)[0])
        assert not set(re.findall(r"\w+", said)) & set(SHAPES)
    assert {shape.shape for clip in CLIPS for shape in clip.clutter} == set(SHAPES) and not set(SHAPES) & set(THINGS)


def test_clutter_changes_the_picture_and_nothing_else():
    """Without clutter a clip has the same things and events. Things lie over clutter."""
    for clip in CLIPS[:6]:
        clean = make_clip(clip.seed, replace(HARD, clutter=None))
        assert clean == replace(clip, clutter=(), ground_moves=False)
        assert np.array_equal(clip.coverage(3.0), clean.coverage(3.0))
        drawn = [replace(clip, clutter=clutter, ground_moves=False).draw(3.0, 128) for clutter in (clip.clutter, ())]
        changed = np.abs(np.subtract(*drawn, dtype=int)).sum(-1).reshape(8, 16, 8, 16).mean((1, 3)).ravel()
        full = clip.coverage(3.0) > 0.95
        assert (changed > 60).sum() > 5 and (changed[full] < 25).all()


def test_some_clutter_drifts_and_comes_back():
    for clip in CLIPS[:10]:
        for shape in clip.clutter:
            places = np.array([shape.place(time) for time in np.arange(0, 40, 0.1)])
            moved = np.abs(np.diff(places, axis=0)).max(1)
            if not any(shape.drift):
                assert not moved.any() and (places >= 0).all() and (places <= 1).all()
                continue
            # It leaves completely before it comes back, so that nothing appears inside the picture.
            outside = np.abs(places - 0.5).max(1) > 0.5 + shape.width / 2 - 0.02
            jumps = np.flatnonzero(moved > 0.5)
            assert len(jumps) and outside[jumps].all() and outside[jumps + 1].all()
            assert 0.004 <= np.median(moved) <= 0.015


def test_every_ground_of_the_hard_world_moves():
    for clip in CLIPS[:12]:
        first, later = (Painter(clip, 64).ground.draw(time) for time in (0.0, 4.0))
        assert np.abs(first - later).mean() > 1


def middle(actor, time):
    return np.array(actor.place(time))


def test_who_enters_is_near_the_named_thing():
    """The named thing is clearly nearest. Only who enters with nothing in sight has no neighbor."""
    named = 0
    for clip in CLIPS:
        for event in (event for event in clip.events if event.kind == "enters"):
            actor, others = clip.actors[event.actor], clip.visible(event.time)
            others.remove(actor)
            match = re.fullmatch(r"An? (\w+ \w+) enters from the \w+(?:, near the (\w+ \w+))?\.", event.text)
            assert match[1] == actor.name(event.time) and (match[2] is None) == (not others)
            far = {o.name(event.time): np.hypot(*(middle(o, event.time) - middle(actor, event.time))) for o in others}
            if others:
                named += 1
                assert 0.5 > far.pop(match[2]) < min(far.values(), default=1) - 0.07
    assert named > 150
    assert not any(", near" in text for seed in range(20) for _, text in make_clip(seed, WORLDS["tiny"]).story())


def test_questions_about_neighbors_have_one_right_answer():
    answers = {"nearest": 0, "left": 0, "Nothing.": 0}
    for clip in CLIPS[:60]:
        for time in (2.0, 4.5):
            things = {actor.name(time): middle(actor, time) for actor in clip.visible(time)}
            asked = [question for question in questions_at(clip, time) if question.kind == "comparison"]
            assert len({question.text for question in asked}) == len(asked)
            for question in asked:
                if match := re.fullmatch(r"What is nearest to the (\w+ \w+)\?", question.text):
                    far = {name: np.hypot(*(at - things[match[1]])) for name, at in things.items() if name != match[1]}
                    best, *others = sorted(far, key=far.get)
                    assert question.answer == f"The {best}." and all(far[o] - far[best] > 0.07 for o in others)
                    answers["nearest"] += 1
                elif match := re.fullmatch(r"What is left of the (\w+ \w+)\?", question.text):
                    left = {name: at[0] for name, at in things.items() if at[0] < things[match[1]][0]}
                    best = max(left, key=left.get, default=None)
                    assert question.answer == ("Nothing." if best is None else f"The {best}.")
                    answers["Nothing." if best is None else "left"] += 1
    assert min(answers.values()) > 20, answers


def test_unclear_neighbors_are_not_asked_for():
    """The cat is as far from the ball as from the car, and the fish is below the ball."""
    places = {"ball": (0.2, 0.5), "cat": (0.5, 0.5), "car": (0.8, 0.5), "fish": (0.22, 0.9)}
    actors = [Actor(thing, [(0.0, *at)], colors=[(0.0, "red")]) for thing, at in places.items()]
    clip = Clip(0, 4.0, tuple(actors), (), 0.15, relations=True)
    asked = {q.text: q.answer for q in questions_at(clip, 1.0) if q.text.startswith("What is")}
    assert asked == {
        "What is nearest to the red ball?": "The red cat.",
        "What is nearest to the red car?": "The red cat.",
        "What is nearest to the red fish?": "The red ball.",
        "What is left of the red car?": "The red cat.",
    }
    assert not any("What is" in question.text for question in questions_at(replace(clip, relations=False), 1.0))


def test_what_was_there_at_first_came_before_what_entered():
    checked = 0
    for clip in CLIPS:
        entered = {clip.actors[event.actor].thing: event.time for event in clip.events if event.kind == "enters"}
        for question in questions_at(clip, clip.seconds - STEP):
            if match := re.fullmatch(r"Which came first, the (\w+) or the (\w+)\?", question.text):
                times = {thing: entered.get(thing, 0.0) for thing in match.groups()}
                assert len(set(times.values())) == 2 and question.answer == f"The {min(times, key=times.get)}."
                checked += 1
    assert checked > 50


# ---------------------------------------------------------------------------------------------------------- scenes


def test_scenes_of_the_hard_world_have_its_sizes_clutter_and_labels():
    patches = LabelledPatches(HARD, grid=8, size=128, seeds=range(4))
    for seed in patches.seeds:
        clip = make_scenes(seed, HARD)
        sizes = [clip.size * actor.scale(0.0) for actor in clip.actors]
        assert 0.13 <= min(sizes) < max(sizes) <= 0.2 and len(clip.visible(1.0)) > 5
        assert clip.clutter and clip.ground_moves
        for time in (0.0, 5.0):
            things, colors, _ = patches.labels(clip, time)
            covered = clip.covered(time)
            assert np.array_equal(things < len(HARD.things), covered) and np.array_equal(colors >= 0, covered)
            shown = {(HARD.things[thing]) for thing in things[covered]}
            assert shown <= {actor.thing for actor in clip.visible(time)}
    assert not make_scenes(0, WORLDS["small"]).clutter
