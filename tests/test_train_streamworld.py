# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamWorld: sentences match pictures, each question has one right answer, and no two splits share a clip."""

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from tiny import tiny_processor

from videollm_mod.train import recipe
from videollm_mod.train.data import streamworld
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.data.world import sprites
from videollm_mod.train.data.world.clip import EVENTS, SPLITS, STEP, WORLDS
from videollm_mod.train.data.world.dialogues import KINDS, NUMBERS, QUESTIONS, make_dialogue, questions_at
from videollm_mod.train.data.world.drawing import Painter, write_pictures, write_video
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.files import write_split
from videollm_mod.train.data.world.rows import SLIDE_FRAMES, streamworld_dataset
from videollm_mod.train.data.world.sprites import COLORS, THINGS, draw_sprite
from videollm_mod.train.recipe_sizes import SIZES


CLIPS = [make_clip(seed) for seed in range(120)]


def test_clips_show_all_things_colors_and_events():
    assert len(THINGS) >= 20 and len(COLORS) == 8 and len(EVENTS) >= 12
    events = {event.kind for clip in CLIPS for event in clip.events}
    assert events == set(EVENTS)
    seen = {actor.name(actor.begin) for clip in CLIPS for actor in clip.actors}
    assert len({name.split()[1] for name in seen}) == len(THINGS) and len({name.split()[0] for name in seen}) == 8


@pytest.mark.parametrize("thing", THINGS)
def test_things_look_different(thing):
    """Things of one color differ, each thing differs between colors, and all cover part of their square."""
    own = np.asarray(draw_sprite(thing, "red", 48)).astype(int)
    assert own[..., 3].max() == 255 and 0.1 < (own[..., 3] > 128).mean() < 0.9
    for other in THINGS:
        if other != thing:
            assert np.abs(own - np.asarray(draw_sprite(other, "red", 48))).mean() > 12, other
    for color in COLORS:
        if color != "red":
            assert np.abs(own - np.asarray(draw_sprite(thing, color, 48))).mean() > 2, color


def test_the_same_clip_makes_the_same_file(tmp_path):
    """A run that was killed goes on with the file that it would have written."""
    clip = make_clip(SPLITS["train"] + 4, WORLDS["tiny"])
    pictures, files = list(clip.play(fps=24, size=64))[:120], set()
    for index in range(16):
        # x264 may not depend on what memory held before.
        [np.random.default_rng(index).bytes(300_000) for _ in range(10)].clear()
        write_pictures(pictures, tmp_path / "clip.mp4", size=64, fps=24, seed=clip.seed)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


def test_the_same_seed_makes_the_same_clip():
    for seed in range(10):
        clip, again = make_clip(seed), make_clip(seed)
        assert clip.story() == again.story() and np.array_equal(clip.draw(3.0), again.draw(3.0))
    assert len({tuple(clip.story()) for clip in CLIPS}) == len(CLIPS)
    assert all(10 <= clip.seconds <= 60 for clip in CLIPS)


def test_events_have_distinct_times_on_half_seconds():
    for clip in CLIPS:
        times = [event.time for event in clip.events]
        assert all(one < two for one, two in pairwise(times)) and all(time % STEP == 0 for time in times)
        assert all(0 < time < clip.seconds for time in times)
    gaps = [two.time - one.time for clip in CLIPS for one, two in pairwise(clip.events)]
    assert max(gaps) > 15, "some silences are long"


def shown_pixels(clip, time, actor, size=96):
    """Count the pixels that change if the actor is removed. Return 0 if the actor cannot be seen."""
    without = clip.__class__(**{**vars(clip), "actors": tuple(a for a in clip.actors if a is not actor)})
    difference = np.abs(clip.draw(time, size).astype(int) - without.draw(time, size).astype(int)).sum(-1)
    return int((difference > 60).sum())


def test_sentences_match_the_pictures():
    checked = set()
    for clip in CLIPS[:60]:
        for event in clip.events:
            actor, time = clip.actors[event.actor], event.time
            # With more than two things, others may cover the actor.
            if len(clip.visible(time)) > 2:
                continue
            before, now = actor.place(time - STEP), actor.place(time)
            moved = float(np.hypot(now[0] - before[0], now[1] - before[1]))
            match event.kind:
                case "enters":
                    assert shown_pixels(clip, time - STEP, actor) == 0 and shown_pixels(clip, time, actor) > 60
                case "leaves":
                    assert shown_pixels(clip, time - STEP, actor) > 60 and shown_pixels(clip, time, actor) == 0
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
                    assert shown_pixels(clip, time, actor) == 0
                case "reappears":
                    assert shown_pixels(clip, time - STEP, actor) == 0 and shown_pixels(clip, time, actor) > 60
                case "recolors":
                    assert actor.color(time) != actor.color(time - STEP) and event.text.endswith(
                        f"{actor.color(time)}."
                    )
                case "grows":
                    assert shown_pixels(clip, time, actor) > shown_pixels(clip, time - STEP, actor)
                case "shrinks":
                    assert shown_pixels(clip, time, actor) < shown_pixels(clip, time - STEP, actor)
                case "splits":
                    same = [a for a in clip.visible(time) if a.name(time) == actor.name(time)]
                    assert len(same) == 2
                case "picks_up" | "puts_down":
                    cargo = clip.actors[event.other].place(time)
                    above = cargo[1] < now[1] - 0.2 * clip.size and abs(cargo[0] - now[0]) < 1e-6
                    assert above == (event.kind == "picks_up")
            checked.add(event.kind)
    assert checked == set(EVENTS)


def test_things_in_the_scene_are_visible_unless_they_hide():
    """In clips with a wall, a thing that is neither hidden nor in an event is drawn."""
    for clip in [clip for clip in CLIPS if clip.wall is not None][:15]:
        for index in range(clip.num_frames(1 / STEP)):
            seen = clip.visible(index * STEP)
            if len(seen) == 1 and not any(abs(e.time - index * STEP) < 1.5 for e in clip.events):
                assert shown_pixels(clip, index * STEP, seen[0]) > 40, (clip.seed, index * STEP)


def coarse(picture):
    """Average squares of 8 by 8 pixels, which removes most noise. The result has shape (12, 12, 3)."""
    return picture.astype(float).reshape(12, 8, 12, 8, 3).mean((1, 3))


def test_backgrounds_have_texture_and_half_of_them_move():
    empty = [replace(clip, actors=(), wall=None) for clip in CLIPS[:40]]
    first = [coarse(clip.draw(0.0)) for clip in empty]
    for clip, ground in zip(empty, first, strict=True):
        clean = Painter(clip, 96).ground.draw(0.0)
        assert clean.std((0, 1)).mean() > 3 and np.abs(ground - coarse(clean)).mean() < 3
    for index, ground in enumerate(first):
        assert all(np.abs(ground - other).mean() > 2 for other in first[:index]), "backgrounds differ between clips"
    moved = [np.abs(coarse(clip.draw(9.0)) - ground).mean() > 1.5 for clip, ground in zip(empty, first, strict=True)]
    assert 8 < sum(moved) < 32
    assert {Painter(clip, 96).ground.pattern for clip in empty} == {"gradient", "stripes", "checks", "clouds"}


def test_distractors_drift():
    counts = set()
    for clip in CLIPS[:40]:
        painter, without = Painter(clip, 96), Painter(clip, 96)
        without.specks = without.specks[:0]
        counts.add(len(painter.specks))
        places = [np.abs(painter.draw(t).astype(int) - without.draw(t).astype(int)).sum(-1) > 40 for t in (0.0, 20.0)]
        assert len(painter.specks) > 0 or not any(place.any() for place in places)
        if len(painter.specks) > 3:
            assert all(place.any() for place in places) and not np.array_equal(*places)
    assert counts == set(range(6))


def test_noise_and_compression_differ_between_clips():
    noise, seen, qualities = [], [], set()
    for clip in CLIPS[:40]:
        painter = Painter(clip, 96)
        noisy, again = painter.draw(3.0).astype(float), painter.draw(3.5)
        assert (noisy != again).mean() > 0.1, "noise differs between frames"
        noise.append(painter.noise)
        painter.noise = 0.0
        clear = painter.draw(3.0).astype(float)
        seen.append((noisy - clear).std())
        qualities.add(painter.quality)
        painter.quality = 100
        assert np.abs(clear - painter.draw(3.0)).mean() > 0.2, "compression changes the picture"
    assert np.corrcoef(noise, seen)[0, 1] > 0.5 and min(noise) < 1 and max(noise) > 4
    assert len(qualities) > 10 and max(qualities) - min(qualities) > 30


def test_video_compression_differs_between_clips(tmp_path):
    """The encoder writes its rate factor (CRF) into the file."""
    short = replace(WORLDS["tiny"], seconds=(2.0, 2.0))
    rates = []
    for seed in range(9):
        path = write_video(make_clip(seed, short), tmp_path / f"{seed}.mp4", size=32, fps=2)
        rates.append(float(re.search(rb"crf=([\d.]+)", path.read_bytes()).group(1)))
    assert rates == [20.0 + seed for seed in range(9)]


def test_held_out_pairs_are_not_in_training():
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


def first_match(clip, pattern, *, after=-1.0):
    """Return the time and sentence of the first event after `after` that matches the pattern, or `None`."""
    return next(((time, text) for time, text in clip.story() if time > after and re.match(pattern, text)), None)


def growth(clip, thing, time):
    """Return how often a thing grew until `time`, minus how often it shrank."""
    sentences = [text for since, text in clip.story() if since <= time and re.match(rf"The \w+ {thing} ", text)]
    return sum(text.endswith("grows.") for text in sentences) - sum(text.endswith("shrinks.") for text in sentences)


def center_at(clip, time, actor):
    """Return the center of the actor's pixels: x and y from -0.5 to 0.5."""
    without = replace(clip, actors=tuple(a for a in clip.actors if a is not actor))
    difference = np.abs(clip.draw(time).astype(int) - without.draw(time).astype(int)).sum(-1)
    rows, columns = np.nonzero(difference > 60)
    return (columns.min() + columns.max()) / 190 - 0.5, (rows.min() + rows.max()) / 190 - 0.5


def right_answer(clip, question):
    """
    Return the wording of a question, its answer, and the second of the answer.

    The answer follows from the clip's sentences and the visible things. It is `None` if it needs the picture.
    """
    time, seen = question.time, clip.visible(question.time)
    past = [(since, text) for since, text in clip.story() if since <= time]
    once = {actor.thing: actor for actor in seen}
    match re.split(r"[ ,?.]+", question.text)[:-1]:
        case ["What", "do", "you", "see"]:
            names = [f"{actor.color(time)} {actor.thing}" for actor in seen]
            assert re.findall(r"(?:a|an) (\w+ \w+) (?:in|on|at)", question.answer.lower()) == names
            return "see", None, time
        case ["Where", "is", "the", color, thing]:
            assert sum(actor.thing == thing and actor.color(time) == color for actor in seen) == 1
            return "where", None, time
        case ["Which", "color", "is", "the", thing]:
            return "color", f"{once[thing].color(time).capitalize()}.", time
        case ["Which", "color", "was", "the", thing, "at", "first"]:
            mine = [e for e in clip.events if e.kind == "enters" and clip.actors[e.actor] is once[thing]]
            return "color at first", f"{mine[0].text.split()[1].capitalize()}.", time
        case ["What", "happened", "last"]:
            return "last", past[-1][1], time
        case ["What", "entered", "first"]:
            return "entered first", first_match(clip, r".* enters from")[1].split(" enters")[0] + ".", time
        case ["How", "many", "things", "do", "you", "see"]:
            return "how many seen", NUMBERS[len(seen)] + ".", time
        case ["How", "many", "things", "have", "left"]:
            return "how many left", NUMBERS[sum(" leaves " in text for _, text in past)] + ".", time
        case ["Which", "came", "first", "the", one, "or", "the", other]:
            since = {name: first_match(clip, rf"\w+ \w+ {name} enters")[0] for name in (one, other)}
            return "came first", f"The {min(since, key=since.get)}.", time
        case ["Which", "is", "further", "left", "the", one, "or", "the", other]:
            places = {name: once[name].place(time)[0] for name in (one, other)}
            return "further left", f"The {min(places, key=places.get)}.", time
        case ["Which", "is", "bigger", "the", one, "or", "the", other]:
            sizes = {name: growth(clip, name, time) for name in (one, other)}
            assert len(set(sizes.values())) == 2
            return "bigger", f"The {max(sizes, key=sizes.get)}.", time
        case ["What", "comes", "next"]:
            when, text = first_match(clip, r".* enters from", after=time)
            return "next", text.split(" enters")[0] + ".", when
        case ["Which", "color", "will", "the", color, thing, "turn"]:
            when, text = first_match(clip, rf"The {color} {thing} turns (?!around)", after=time)
            return "which color will", text.split()[-1].capitalize(), when
        case ["Tell", "me", "when", "things", "meet"]:
            return "when things meet", *first_match(clip, ".* bumps into", after=time)[::-1]
        case ["Tell", "me", "when", "something", *does]:
            does = {"changes color": r"turns (?!around)"}.get(" ".join(does), does[0])
            return f"when something {does}", *first_match(clip, rf".* {does}", after=time)[::-1]
        case ["Tell", "me", "when", "the", color, thing, *does]:
            does = {"comes back": "reappears"}.get(" ".join(does), does[0])
            return f"when the one {does}", *first_match(clip, rf"The {color} {thing} {does}", after=time)[::-1]
    raise AssertionError(f"no check for the question {question.text!r}")


def test_questions_of_every_kind_with_right_answers():
    kinds, wordings = set(), set()
    for clip in CLIPS:
        for time in (5.0, 9.5, 20.0):
            if time >= clip.seconds:
                continue
            for question in questions_at(clip, time):
                wording, answer, when = right_answer(clip, question)
                kinds.add(question.kind)
                wordings.add(wording)
                assert question.time == time and question.answer_time == when, question
                assert answer is None or question.answer == answer, question
                assert (question.answer_time >= time + 2 * STEP) == (question.kind == "later")
    assert kinds == set(QUESTIONS) and len(wordings) == 20, wordings


def test_places_in_descriptions_match_the_pictures():
    answers = set()
    for clip in [clip for clip in CLIPS if clip.wall is None][:60]:
        for time in (5.0, 9.5):
            # Only one thing is visible, so nothing hides it.
            for question in questions_at(clip, time) if len(clip.visible(time)) == 1 else ():
                if question.text.startswith("Where is"):
                    x, y = center_at(clip, time, clip.visible(time)[0])
                    # Some things do not fill their square, so their center may be off by this much.
                    margin = 0.07
                    assert {
                        "In the middle.": max(abs(x), abs(y)) < 0.17 + margin,
                        "On the left.": x < margin - max(0.17, abs(y)),
                        "On the right.": x > max(0.17, abs(y)) - margin,
                        "At the top.": y < margin - max(0.17, abs(x)),
                        "At the bottom.": y > max(0.17, abs(x)) - margin,
                    }[question.answer], (question, x, y)
                    answers.add(question.answer)
    assert len(answers) == 5


def test_an_awaited_event_is_the_first_of_its_kind():
    for clip in CLIPS:
        for question in questions_at(clip, 3.0):
            if question.text == "What comes next?":
                first = next(e for e in clip.events if e.kind == "enters" and e.time > 3.0)
                assert question.answer_time == first.time


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_of_each_kind(kind):
    num_replies, num_questions = 0, 0
    for clip in CLIPS[:40]:
        messages, asked = make_dialogue(clip, kind)
        assert (messages, asked) == make_dialogue(clip, kind)
        times = [message["time"] for message in messages]
        assert times == sorted(times) and all(0 <= time < clip.seconds for time in times)
        replies = [(m["time"], m["content"]) for m in messages if m["role"] == "assistant"]
        num_replies, num_questions = num_replies + len(replies), num_questions + len(asked)
        if kind == "narrate":
            assert set(clip.story()) <= set(replies) and len(replies) == len(clip.events) + len(asked)
        elif kind != "describe":
            assert replies == sorted((q.answer_time, q.answer) for q in asked)
            assert all((q.kind == "later") == (kind == "wait") for q in asked)
    assert num_replies > 20 and (num_questions > 5) == (kind != "describe")


def test_a_dialogue_without_a_reply_is_empty():
    """A clip without events has nothing to narrate or to wait for, so its row asks questions instead."""
    short = replace(WORLDS["small"], seconds=(2.0, 2.0))
    quiet = [clip for clip in (make_clip(seed, short) for seed in range(100)) if not clip.events]
    assert len(quiet) > 5
    assert all(make_dialogue(clip, "wait") == ([], []) for clip in quiet)
    rows = streamworld_dataset(num_clips=100, kinds={"narrate": 1, "wait": 1}, world=short, size=24)
    assert {row["kind"] for row in rows} == {"narrate", "ask"}
    assert all(any(message["role"] == "assistant" for message in row["messages"]) for row in rows)


# ------------------------------------------------------------------------------------------------------- data set


def test_rows_have_a_kind_a_video_and_messages():
    rows = streamworld_dataset(num_clips=12, kinds={"describe": 1, "narrate": 1, "ask": 1, "wait": 1}, size=48)
    assert {row["kind"] for row in rows} == set(KINDS)
    for row in rows:
        assert row["video"].shape[1:] == (48, 48, 3) and row["video"].dtype == np.uint8 and row["messages"]
        assert row["messages"][-1]["time"] < len(row["video"]) * STEP


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


def seeds_of(split, num_rows, first_row=0):
    """Return all seeds that rows of a split may use: one per frame of a slide show."""
    rows = streamworld_dataset(split, num_clips=num_rows, first_clip=first_row).with_format(None)["seed"]
    return range(rows[0], rows[-1] + SLIDE_FRAMES)


@pytest.mark.parametrize("size", SIZES)
def test_no_two_parts_of_the_recipe_share_a_clip(size, tmp_path, monkeypatch):
    """The parts of each world are the rows for slide shows, narration, questions, long clips, and evaluation."""
    stages = []
    monkeypatch.setattr(recipe, "run_stage", lambda _, *stage, **__: stages.append(stage))
    monkeypatch.setattr(recipe, "join_rows", lambda *_, **__: None)
    recipe.see(SIZES[size], tmp_path)
    seeds, rows = {}, SIZES[size]
    for script, *options in stages:
        given = dict(zip(options[::2], options[1::2], strict=True))
        if script == "encode.py":
            first, count = given["--first_clip"], given["--num_clips"]
            seeds.setdefault(given["--dataset"], {}).setdefault(given["--kinds"], set()).add((first, count))
    for kinds in seeds.values():
        # All worlds of a data set read the same rows: what a seed shows depends on the world.
        parts = [
            seeds_of("train", count, first) for (first, count), *others in map(list, kinds.values()) if not others
        ]
        counts = [rows.slides, rows.clips, rows.questions, rows.long_clips]
        # A small size encodes all parts at once, so their order differs from run to run.
        assert sorted(len(some) // SLIDE_FRAMES for some in parts) == sorted(count for count in counts if count)
        parts += [seeds_of(split, max(rows.test_clips, 64)) for split in ("validation", "test", "ood")]
        for one, other in combinations(parts, 2):
            assert one.stop <= other.start or other.stop <= one.start, parts


def test_writing_a_split_again_keeps_its_videos(tmp_path):
    write_split(tmp_path, "validation", num_clips=2, world=WORLDS["small"], size=64, fps=8)
    rows = load_timed_messages(tmp_path, "validation")
    assert list(find_faults(rows)) == [] and {"narrate", "ask"} <= {row["kind"] for row in rows}
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").glob("*.mp4")}
    assert len(written) == 2
    write_split(tmp_path, "validation", num_clips=3, world=WORLDS["small"], size=64, fps=8)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "existing videos are not written again"
    assert len({json.loads(line)["video"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()}) == 3


def test_videos_of_other_options_are_not_kept_under_new_dialogues(tmp_path):
    options = {"num_clips": 1, "world": WORLDS["tiny"], "size": 32, "fps": 2}
    write_split(tmp_path, "validation", **options)
    videos, rows = tmp_path / "videos", (tmp_path / "validation.jsonl").read_bytes()
    written = {path: path.read_bytes() for path in videos.iterdir()}
    for other in ({"world": WORLDS["small"]}, {"size": 64}, {"fps": 4}):
        [name] = other
        message = f"'{videos}' has videos of the split validation, made with another value of {name}. Write to another"
        with pytest.raises(ValueError, match=re.escape(message)):
            write_split(tmp_path, "validation", **{**options, **other})
    assert {path: path.read_bytes() for path in videos.iterdir()} == written
    assert (tmp_path / "validation.jsonl").read_bytes() == rows
    write_split(tmp_path, "validation", **options, kinds=["ask"])
    write_split(tmp_path, "test", **{**options, "size": 64})
    # An earlier version wrote no record.
    (videos / ".validation.json").unlink()
    with pytest.raises(ValueError, match="has videos of the split validation, made with unknown options"):
        write_split(tmp_path, "validation", **options)
    for video in videos.glob("validation-*"):
        video.unlink()
    write_split(tmp_path, "validation", **{**options, "size": 64})
    with av.open(str(videos / "validation-000000.mp4")) as container:
        assert container.streams.video[0].width == 64


def test_written_clips_show_the_same_pictures(tmp_path):
    clip = make_clip(SPLITS["test"], WORLDS["small"])
    processor = tiny_processor()
    path = write_video(clip, tmp_path / "clip.mp4", size=128, fps=10)
    watched = torch.cat([processor.process_frames(frame) for _, frame in processor.read_video(path, fps=2)])
    drawn = processor.process_frames(clip.frames(size=128))
    assert watched.shape == drawn.shape and (watched - drawn).abs().mean() < 0.1


def test_the_command_writes_a_single_clip_with_its_events(tmp_path, monkeypatch):
    arguments = ["streamworld.py", tmp_path, "--split", "test", "--world", "small", "--clip", 3, "--frame_size", 64]
    arguments += ["--name", "one"]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    streamworld.main()
    facts = json.loads((tmp_path / "one.json").read_text())
    clip = make_clip(SPLITS["test"] + 3, WORLDS["small"])
    assert facts["seed"] == clip.seed and facts["world"] == "small"
    assert [tuple(event) for event in facts["events"]] == clip.story()
    assert {path.name for path in tmp_path.iterdir()} == {"one.mp4", "one.json"}


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["streamworld.py", *map(str, arguments)])
    streamworld.main()


def test_the_command_writes_splits_and_a_card_that_names_them(tmp_path, monkeypatch):
    """The folder loads with all its splits, in whichever order they were written."""
    small = ["--world", "small", "--frame-size", 64, "--fps", 4]
    run_command(monkeypatch, tmp_path / "out", "--num_clips", 1, "--kinds", "describe", *small)
    run_command(monkeypatch, tmp_path / "out", "--num_clips", 1, "--split", "ood", "--size", 64, "--fps", 2)
    run_command(monkeypatch, tmp_path / "out", "--num_clips", 1, "--split", "validation", *small)
    run_command(monkeypatch, tmp_path / "out", "--num_clips", 2, "--split", "validation", *small)
    splits = load_dataset(str(tmp_path / "out"))
    assert list(splits) == ["train", "validation", "ood"]
    for split, rows in splits.items():
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()]
        assert list(rows) == lines and {row["video"].split("/")[1].split("-")[0] for row in rows} == {split}
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0" and "generated world" in card.text
    command = "python train/data/streamworld.py out --split"
    assert [line for line in card.text.splitlines() if line.startswith("python")] == [
        f"{command} train --num_clips 1 --world small --frame_size 64 --fps 4 --kinds describe",
        f"{command} validation --num_clips 2 --world small --frame_size 64 --fps 4 --kinds narrate ask wait",
        f"{command} ood --num_clips 1 --world ood --frame_size 64 --fps 2 --kinds narrate ask wait",
    ]


def test_the_command_writes_slide_shows(tmp_path, monkeypatch):
    """Written slide shows equal those that are drawn during training."""
    slides = ["--world", "small", "--frame_size", 64, "--kinds", "describe"]
    run_command(monkeypatch, tmp_path, "--num_clips", 2, *slides)
    rows = load_timed_messages(tmp_path)
    assert list(find_faults(rows)) == [] and {row["kind"] for row in rows} == {"describe"}
    processor = tiny_processor()
    made = streamworld_dataset(num_clips=2, kinds={"describe": 1.0}, world=WORLDS["small"], size=64)
    for written, drawn in zip(rows, made, strict=True):
        assert written["messages"] == drawn["messages"] and written["seed"] == drawn["seed"]
        assert len(written["messages"]) == 1 + SLIDE_FRAMES
        frames = [frame for _, frame in processor.read_video(written["video"], fps=2)]
        watched = torch.cat([processor.process_frames(frame) for frame in frames])
        assert (watched - processor.process_frames(drawn["video"])).abs().mean() < 0.1


@pytest.mark.parametrize("fps", [1, 31])
def test_the_command_refuses_frame_rates_out_of_range(fps, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_command(monkeypatch, tmp_path, "--num_clips", 1, "--fps", fps)
    assert f"--fps must be from 2 to 30, got {fps}" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [15, 97, 4098])
def test_the_command_refuses_sizes_that_a_video_cannot_have(size, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_command(monkeypatch, tmp_path, "--size", str(size))
    message = f"--frame_size must be an even number from 16 to 4096, as H.264 requires, got {size}"
    assert message in capsys.readouterr().err


def test_clips_say_their_colors_and_may_lie_in_a_folder_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = np.full((2, 64, 64, 3), (200, 40, 60), dtype=np.uint8)
    write_pictures(pictures, Path("a:b.mp4"), size=64, fps=2, seed=0)
    with av.open("file:a:b.mp4") as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (6, 1)
        assert abs(frame.to_ndarray(format="rgb24")[32, 32].astype(int) - (200, 40, 60)).max() <= 6


def test_the_command_draws_a_sheet_of_all_things(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sprites.py", str(tmp_path / "sheet.png"), "--size", "16"])
    sprites.main()
    assert Image.open(tmp_path / "sheet.png").size == (24 * len(THINGS), 24 * len(COLORS))


def test_the_length_of_clips_can_be_chosen():
    source = streamworld.StreamWorld("streamworld", world="tiny", seconds="20,30")
    usual = streamworld.StreamWorld("streamworld", world="tiny")
    lengths = [[len(row["video"]) for row in each.load("test", num_clips=4)] for each in (source, usual)]
    assert all(40 <= count <= 60 for count in lengths[0]) and all(12 <= count <= 20 for count in lengths[1])
    assert source.title("test") == "StreamWorld, tiny, clips of 20 to 30 s"
    assert usual.title("test") == "StreamWorld, tiny"
    # Training reads the rows to split them unless the longest surely fits.
    assert (source.longest_row, usual.longest_row) == (30, 180)
    assert [usual.longest_row_of(split) for split in ("train", "ood")] == [10, 180]
    assert len(source.load("ood", num_clips=1)[0]["video"]) <= 60
    for wrong in ("30,20", "20", "a,b", "0,5", "5,inf", "nan,5"):
        with pytest.raises(ValueError, match="shortest and the longest clip"):
            streamworld.StreamWorld("streamworld", seconds=wrong)


def test_the_number_of_questions_can_follow_the_length():
    world = replace(WORLDS["tiny"], seconds=(60, 60))
    clip = make_clip(SPLITS["train"] + 5, world)
    for kind in ("narrate", "ask"):
        messages, questions = make_dialogue(clip, kind, 10.0)
        assert len(questions) == 10 and all(message["time"] < 60 for message in messages)
    assert len(make_dialogue(clip, "narrate", 0.0)[1]) == 0 and len(make_dialogue(clip, "ask")[1]) <= 4
    source = streamworld.StreamWorld("streamworld", world="tiny", seconds="30,30", questions_per_minute=8.0)
    asked = [message for message in source.load("test", num_clips=1)[0]["messages"] if message["role"] == "user"]
    assert len(asked) == 1 + 4
    with pytest.raises(ValueError, match="from 0 to 60"):
        streamworld.StreamWorld("streamworld", questions_per_minute=-1.0)


def test_things_happen_until_the_end_of_a_long_clip():
    world = replace(WORLDS["tiny"], seconds=(500, 500))
    for seed in range(4):
        times = [event.time for event in make_clip(SPLITS["test"] + seed, world).events]
        assert max(times) > 480 and max(two - one for one, two in pairwise(times)) < 60
