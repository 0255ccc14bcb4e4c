# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""StreamWorld: what is told is drawn, what is asked has one right answer, and no split knows another's clips."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from PIL import Image
from tiny import tiny_processor

from videollm_mod.train.data.sprites import COLORS, THINGS, draw_sprite
from videollm_mod.train.data.streamworld import (
    EVENTS,
    KINDS,
    QUESTIONS,
    SPLITS,
    STEP,
    WORLDS,
    make_clip,
    make_dialogue,
    questions_at,
    streamworld_dataset,
    write_split,
    write_video,
)
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


CLIPS = [make_clip(seed) for seed in range(120)]


def test_there_is_enough_to_see():
    assert len(THINGS) >= 20 and len(COLORS) == 8 and len(EVENTS) >= 12
    events = {event.kind for clip in CLIPS for event in clip.events}
    assert events == set(EVENTS)
    seen = {actor.name(actor.begin) for clip in CLIPS for actor in clip.actors}
    assert len({name.split()[1] for name in seen}) == len(THINGS) and len({name.split()[0] for name in seen}) == 8


@pytest.mark.parametrize("thing", THINGS)
def test_things_look_different(thing):
    """From each other in one colour, and in each colour from the others; drawn inside their square."""
    own = np.asarray(draw_sprite(thing, "red", 48)).astype(int)
    assert own[..., 3].max() == 255 and 0.1 < (own[..., 3] > 128).mean() < 0.9
    for other in THINGS:
        if other != thing:
            assert np.abs(own - np.asarray(draw_sprite(other, "red", 48))).mean() > 12, other
    for color in COLORS:
        if color != "red":
            assert np.abs(own - np.asarray(draw_sprite(thing, color, 48))).mean() > 2, color


def test_clips_are_decided_by_their_seed():
    for seed in range(10):
        clip, again = make_clip(seed), make_clip(seed)
        assert clip.story() == again.story() and np.array_equal(clip.draw(3.0), again.draw(3.0))
    assert len({tuple(clip.story()) for clip in CLIPS}) == len(CLIPS)
    assert all(10 <= clip.seconds <= 60 for clip in CLIPS)


def test_events_come_one_by_one_on_the_half_second():
    for clip in CLIPS:
        times = [event.time for event in clip.events]
        assert all(one < two for one, two in pairwise(times)) and all(time % STEP == 0 for time in times)
        assert all(0 < time < clip.seconds for time in times)
    gaps = [two.time - one.time for clip in CLIPS for one, two in pairwise(clip.events)]
    assert max(gaps) > 15, "long silences"


def things_drawn(clip, time, actor, size=96):
    """How much of the picture changes if the actor is taken out of it: 0 if it cannot be seen."""
    without = clip.__class__(**{**vars(clip), "actors": tuple(a for a in clip.actors if a is not actor)})
    difference = np.abs(clip.draw(time, size).astype(int) - without.draw(time, size).astype(int)).sum(-1)
    return int((difference > 60).sum())


def test_what_is_told_is_what_is_drawn():
    checked = set()
    for clip in CLIPS[:60]:
        for event in clip.events:
            actor, time = clip.actors[event.actor], event.time
            # Others may lie in front: what can hardly be seen because of them is not checked.
            if len(clip.visible(time)) > 2:
                continue
            before, now = actor.place(time - STEP), actor.place(time)
            moved = float(np.hypot(now[0] - before[0], now[1] - before[1]))
            match event.kind:
                case "enters":
                    assert things_drawn(clip, time - STEP, actor) == 0 and things_drawn(clip, time, actor) > 60
                case "leaves":
                    assert things_drawn(clip, time - STEP, actor) > 60 and things_drawn(clip, time, actor) == 0
                case "starts":
                    assert moved > 0.02
                case "stops":
                    assert moved == 0 and actor.place(time - 2 * STEP) != now
                case "turns":
                    earlier = actor.place(time - 2 * STEP)
                    assert np.dot(np.subtract(now, before), np.subtract(before, earlier)) < 0
                case "bumps":
                    there = clip.actors[event.other].place(time)
                    reach = clip.size * (actor.scale(time) + clip.actors[event.other].scale(time)) / 2
                    assert np.hypot(now[0] - there[0], now[1] - there[1]) < reach
                case "hides":
                    assert things_drawn(clip, time, actor) == 0
                case "reappears":
                    assert things_drawn(clip, time - STEP, actor) == 0 and things_drawn(clip, time, actor) > 60
                case "recolors":
                    assert actor.color(time) != actor.color(time - STEP) and event.text.endswith(
                        f"{actor.color(time)}."
                    )
                case "grows":
                    assert things_drawn(clip, time, actor) > things_drawn(clip, time - STEP, actor)
                case "shrinks":
                    assert things_drawn(clip, time, actor) < things_drawn(clip, time - STEP, actor)
                case "splits":
                    same = [a for a in clip.visible(time) if a.name(time) == actor.name(time)]
                    assert len(same) == 2
                case "picks_up" | "puts_down":
                    cargo = clip.actors[event.other].place(time)
                    above = cargo[1] < now[1] - 0.2 * clip.size and abs(cargo[0] - now[0]) < 1e-6
                    assert above == (event.kind == "picks_up")
            checked.add(event.kind)
    assert {"enters", "leaves", "starts", "stops", "hides", "reappears", "recolors", "shrinks"} <= checked


def test_nothing_goes_behind_the_wall_untold():
    """Whoever is on the scene and not told to hide can be seen."""
    for clip in [clip for clip in CLIPS if clip.wall is not None][:15]:
        for index in range(clip.num_frames(1 / STEP)):
            seen = clip.visible(index * STEP)
            if len(seen) == 1 and not any(abs(e.time - index * STEP) < 1.5 for e in clip.events):
                assert things_drawn(clip, index * STEP, seen[0]) > 40, (clip.seed, index * STEP)


def test_unseen_pairs_are_never_trained_on():
    trained = set(WORLDS["full"].pairs()) | set(WORLDS["small"].pairs())
    unseen = set(WORLDS["ood"].pairs())
    assert not trained & unseen and len(trained | unseen) == len(THINGS) * len(COLORS)
    for clip in (make_clip(SPLITS["ood"] + seed, WORLDS["ood"]) for seed in range(10)):
        for actor in clip.actors:
            assert {(color, actor.thing) for _, color in actor.colors} <= unseen
    for clip in CLIPS:
        for actor in clip.actors:
            assert {(color, actor.thing) for _, color in actor.colors} <= trained
    ood = [make_clip(SPLITS["ood"] + seed, WORLDS["ood"]) for seed in range(10)]
    assert max(len(clip.visible(t * 5.0)) for clip in ood for t in range(36)) > 4
    assert max(len(clip.visible(t * 5.0)) for clip in CLIPS for t in range(12)) <= 4
    assert all(60 <= clip.seconds <= 180 for clip in ood)


# ------------------------------------------------------------------------------------------------------ dialogues


def test_questions_of_every_kind_with_right_answers():
    kinds = set()
    for clip in CLIPS[:60]:
        for time in (5.0, 9.5, 20.0):
            if time >= clip.seconds:
                continue
            for question in questions_at(clip, time):
                kinds.add(question.kind)
                seen = clip.visible(time)
                match question.text.split():
                    case ["How", "many", "things", "do", *_]:
                        assert question.answer == ("None.", "One.", "Two.", "Three.", "Four.")[len(seen)]
                    case ["Which", "color", "is", "the", thing]:
                        (actor,) = [a for a in seen if a.thing == thing.rstrip("?")]
                        assert question.answer == f"{actor.color(time).capitalize()}."
                    case ["Which", "is", "further", *_, "the", one, "or", "the", other]:
                        places = {a.thing: a.place(time)[0] for a in seen}
                        left = min((one, other.rstrip("?")), key=lambda name: places[name])
                        assert question.answer == f"The {left}."
                if question.kind == "later":
                    assert question.answer_time >= time + 2 * STEP
                    assert any(e.time == question.answer_time for e in clip.events)
                else:
                    assert question.answer_time == time
    assert kinds == set(QUESTIONS)


def test_what_is_awaited_has_not_happened_in_between():
    for clip in CLIPS:
        for question in questions_at(clip, 3.0):
            if question.text == "What comes next?":
                first = next(e for e in clip.events if e.kind == "enters" and e.time > 3.0)
                assert question.answer_time == first.time


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues(kind):
    spoken, questions = 0, 0
    for clip in CLIPS[:40]:
        messages, asked = make_dialogue(clip, kind)
        assert (messages, asked) == make_dialogue(clip, kind)
        times = [message["time"] for message in messages]
        assert times == sorted(times) and all(0 <= time < clip.seconds for time in times)
        told = [(m["time"], m["content"]) for m in messages if m["role"] == "assistant"]
        spoken, questions = spoken + len(told), questions + len(asked)
        if kind == "narrate":
            assert set(clip.story()) <= set(told) and len(told) == len(clip.events) + len(asked)
        elif kind != "describe":
            assert told == sorted((q.answer_time, q.answer) for q in asked)
            assert all((q.kind == "later") == (kind == "wait") for q in asked)
    assert spoken > 20 and (questions > 5) == (kind != "describe")


def test_a_dialogue_without_a_reply_is_none():
    """Where nothing happens there is nothing to narrate or to wait for; such a row of a data set asks instead."""
    short = replace(WORLDS["small"], seconds=(2.0, 2.0))
    quiet = [clip for clip in (make_clip(seed, short) for seed in range(100)) if not clip.events]
    assert len(quiet) > 5
    assert all(make_dialogue(clip, "wait") == ([], []) for clip in quiet)
    rows = streamworld_dataset(num_clips=100, kinds={"narrate": 1, "wait": 1}, world=short, size=24)
    assert {row["kind"] for row in rows} == {"narrate", "ask"}
    assert all(any(message["role"] == "assistant" for message in row["messages"]) for row in rows)


# ------------------------------------------------------------------------------------------------------- data set


def test_rows_and_their_splits():
    rows = streamworld_dataset(num_clips=12, kinds={"describe": 1, "narrate": 1, "ask": 1, "wait": 1}, size=48)
    assert {row["kind"] for row in rows} == set(KINDS)
    for row in rows:
        assert row["video"].shape[1:] == (48, 48, 3) and row["video"].dtype == np.uint8 and row["messages"]
        assert row["messages"][-1]["time"] < len(row["video"]) * STEP
    seeds = {split: set(streamworld_dataset(split, num_clips=50)["seed"]) for split in ("train", "test")}
    assert not seeds["train"] & seeds["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "has no split 'dev'; it has train, validation, test, ood"),
        ({"kinds": {"sing": 1.0}}, "describe, narrate, ask, wait, got"),
        ({"kinds": {"ask": -1.0}}, "weights of at least 0"),
        ({"split": "test", "num_clips": 10**9}, "has 8333333 rows"),
    ],
)
def test_bad_data_sets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        streamworld_dataset(**{"num_clips": 1, **options})


def test_a_split_on_disk(tmp_path):
    write_split(tmp_path, "validation", num_clips=2, world=WORLDS["small"], size=64, fps=8)
    rows = load_timed_messages(tmp_path, "validation")
    assert list(find_faults(rows)) == [] and {"narrate", "ask"} <= set(rows["kind"])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()}
    assert len(written) == 2
    write_split(tmp_path, "validation", num_clips=3, world=WORLDS["small"], size=64, fps=8)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what is there is not written again"
    assert len({json.loads(line)["video"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()}) == 3


def test_written_clips_show_the_same(tmp_path):
    clip = make_clip(SPLITS["test"], WORLDS["small"])
    processor = tiny_processor()
    path = write_video(clip, tmp_path / "clip.mp4", size=128, fps=10)
    watched = torch.cat([processor.process_frames(frame) for _, frame in processor.read_video(path, fps=2)])
    drawn = processor.process_frames(clip.frames(size=128))
    assert watched.shape == drawn.shape and (watched - drawn).abs().mean() < 0.1


def test_a_single_clip_and_its_story(tmp_path, monkeypatch):
    from videollm_mod.train.data import streamworld

    arguments = ["streamworld.py", tmp_path, "--split", "test", "--world", "small", "--clip", 3, "--size", 64]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    streamworld.main()
    story = json.loads((tmp_path / "streamworld.json").read_text())
    clip = make_clip(SPLITS["test"] + 3, WORLDS["small"])
    assert story["seed"] == clip.seed and story["world"] == "small"
    assert [tuple(event) for event in story["events"]] == clip.story()
    assert {path.name for path in tmp_path.iterdir()} == {"streamworld.mp4", "streamworld.json"}


def test_the_command_writes_a_card_and_the_sheet_of_things(tmp_path, monkeypatch):
    from videollm_mod.train.data import sprites, streamworld

    arguments = ["streamworld.py", tmp_path / "out", "--num_clips", 1, "--world", "small", "--size", 64, "--fps", 4]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    streamworld.main()
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and "generated world" in card.text
    monkeypatch.setattr("sys.argv", ["sprites.py", str(tmp_path / "sheet.png"), "--size", "16"])
    sprites.main()
    assert Image.open(tmp_path / "sheet.png").size == (24 * len(THINGS), 24 * len(COLORS))
