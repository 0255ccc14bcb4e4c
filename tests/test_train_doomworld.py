# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld: a clip follows from its seed, what is told can be seen, and no two splits share a map."""

import json
import re
import sys
from itertools import combinations, pairwise

import av
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from torch.utils.data import DataLoader

from videollm_mod.train.data import doomworld
from videollm_mod.train.data.doom.clip import MAPS, SPLITS, STEP, record_clip
from videollm_mod.train.data.doom.dialogues import make_dialogue, questions_at
from videollm_mod.train.data.doom.events import EVENTS, WORDINGS, tell
from videollm_mod.train.data.doom.patches import LabelledPatches
from videollm_mod.train.data.doom.rows import doomworld_dataset
from videollm_mod.train.data.doom.things import ITEMS, MONSTERS, THINGS, side_of
from videollm_mod.train.data.sources import find_source, load_split
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.data.world.dialogues import KINDS
from videollm_mod.train.new_model import new_tokenizer


pytest.importorskip("vizdoom", reason="DoomWorld needs vizdoom, which is not installed")
pytestmark = pytest.mark.xdist_group("doomworld")  # one process plays the clips


@pytest.fixture(scope="module")
def clips():
    return [record_clip("train", seed) for seed in range(6)]


def same(one, other):
    return np.array_equal(one.pictures, other.pictures) and one.story() == other.story() and one.sights == other.sights


def test_a_clip_follows_from_its_seed_and_not_from_what_was_played_before(clips):
    """Also if every tic is drawn, as for a video file."""
    shown = []
    again = record_clip("train", 3, sink=lambda picture: shown.append(picture.copy()))
    assert same(clips[3], again) and not same(clips[3], clips[4])
    assert len(shown) == 35 * len(again.pictures) // 4


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_reads_the_same_row_with_a_game_of_its_own(start):
    """A forked worker inherits the game of this process, and must not play it. A spawned one inherits nothing."""
    rows = doomworld_dataset(num_clips=1, first_clip=1, seconds=(3.0, 3.0))
    mine = rows[0]
    (row,) = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=120)
    assert np.array_equal(row["video"].numpy(), mine["video"]) and row["messages"] == mine["messages"]
    assert np.array_equal(rows[0]["video"], mine["video"]), "the game of this process goes on"


def test_events_have_times_of_their_own_on_frames(clips):
    for clip in clips:
        times = [event.time for event in clip.events]
        assert all(one < two for one, two in pairwise(times))
        assert all(time % STEP == 0 and 0 < time < clip.seconds for time in times)
    kinds = {event.kind for clip in clips for event in clip.events}
    assert kinds >= {"comes_into_view", "hurt", "picks_up", "dies", "is_hit"} and kinds <= set(EVENTS)


def test_what_comes_into_view_is_in_the_picture_and_was_not(clips):
    told = 0
    for clip in clips:
        for event in clip.events:
            if event.kind != "comes_into_view":
                continue
            told += 1
            index = clip.index(event.time)
            seen = [sight for sight in clip.sights[index] if sight.kind == event.thing]
            assert len(seen) >= (1 if event.count == 1 else 2), event
            assert any(sight.kind == event.thing for sight in clip.sights[index - 1]), "two frames show it"
            shown = {(side_of(sight.x), sight.is_near) for sight in seen}
            near = (True, False) if event.near is None else (event.near,)
            assert not event.side or shown & {(event.side, is_near) for is_near in near}, event
    assert told > 15


def test_at_half_the_frame_rate_a_clip_tells_what_its_own_frames_show(clips):
    """The player does the same, and every event is one of the frames that are left."""
    told = []
    for seed in (1, 2):
        clip = record_clip("train", seed, fps=2)
        assert np.array_equal(clip.pictures, clips[seed].pictures[::2]) and clip.sights == clips[seed].sights[::2]
        assert len(clip.pictures) / 2 == clip.seconds
        for event in clip.events:
            index = clip.index(event.time)
            assert index / 2 == event.time
            if event.kind == "comes_into_view":
                told.append(event)
                assert all(event.thing in {sight.kind for sight in clip.sights[i]} for i in (index - 1, index))
    assert len(told) > 4
    row = find_source("doomworld")("doomworld", seconds="4,4", frame_rate=2, kinds="describe=1").load(
        "test", num_clips=1
    )[0]
    assert [message["time"] for message in row["messages"][1:]] == [index / 2 for index in range(len(row["video"]))]


def test_sides_and_masks_agree(clips):
    sides = set()
    for clip in clips:
        for sights, mask in zip(clip.sights, clip.masks, strict=True):
            assert mask.max() == len(sights)
            for number, sight in enumerate(sights, start=1):
                shown = np.nonzero(mask == number)
                assert len(shown[0]) >= 0.002 * mask.size and abs(shown[1].mean() / mask.shape[1] - sight.x) < 0.01
        for event in clip.events:
            if event.side:
                sides.add(event.side)
    assert sides == {"on the left", "ahead", "on the right"}


def test_covered_patches_are_those_of_the_masks(clips):
    for clip in clips:
        for index in range(0, len(clip.masks), 7):
            time, mask = index * STEP, clip.masks[index]
            height, width = (size // 8 for size in mask.shape)
            patches = mask.reshape(8, height, 8, width).swapaxes(1, 2).reshape(64, -1)
            coverage = clip.coverage(time)
            assert coverage.dtype == np.float32 and np.allclose(coverage, (patches > 0).mean(-1), atol=1e-5)
            expected = (patches > 0).mean(-1) >= 0.25
            for number in range(1, mask.max() + 1):
                expected |= (patches == number).sum(-1) >= 0.25 * (mask == number).sum()
            assert np.array_equal(clip.covered(time), expected)


def test_the_same_event_in_every_wording(clips):
    for clip in clips:
        for event in clip.events:
            texts = [tell(event, wording) for wording in WORDINGS]
            assert len(set(texts)) >= 2 and texts[0] == event.text
            assert all(text[0].isupper() and text.endswith(".") and "  " not in text for text in texts), texts


def test_the_small_vocabulary_tells_the_same_clip_and_no_kinds(clips):
    told = 0
    for seed, full in enumerate(clips):
        small = record_clip("train", seed, vocabulary="small")
        assert np.array_equal(small.pictures, full.pictures) and np.array_equal(small.masks, full.masks)
        texts = [event.text for event in small.events]
        texts += [message["content"] for kind in KINDS for message in make_dialogue(small, kind)[0]]
        words = {word.strip(".,?").lower() for text in texts for word in text.split()}
        told_apart = {*MONSTERS, *ITEMS, "zombies", "imps", "near", "far"} - {"weapon"}  # which the player holds
        assert not words & told_apart, words & told_apart
        for event in small.events:
            if event.kind in ("picks_up", "dies"):
                assert event.thing == {"picks_up": "item", "dies": "monster"}[event.kind]
                told += 1
        for event in full.events:
            if event.kind == "dies":  # other events may have another frame, since fewer come into view
                assert any(other.kind == "dies" and abs(other.time - event.time) <= 1 for other in small.events)
        questions = [question.text for question in questions_at(small, 2.0)]
        assert len(set(questions)) == len(questions)
    assert told > 5


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_of_each_kind(clips, kind):
    num_replies = 0
    for clip in clips:
        messages, asked = make_dialogue(clip, kind)
        times = [message["time"] for message in messages]
        assert times == sorted(times) and all(0 <= time < clip.seconds for time in times)
        replies = [(m["time"], m["content"]) for m in messages if m["role"] == "assistant"]
        num_replies += len(replies)
        if kind == "narrate":
            assert set(clip.story()) <= set(replies) and len(replies) == len(clip.events) + len(asked)
        elif kind != "describe":
            assert replies == sorted((q.answer_time, q.answer) for q in asked)
            assert all((q.kind == "later") == (kind == "wait") for q in asked)
    assert num_replies >= len(clips) // 2, "most clips have something to say"


def test_questions_have_one_right_answer(clips):
    kinds = set()
    for clip in clips:
        for time in (2.0, 5.0, 7.5):
            questions = questions_at(clip, time)
            kinds |= {question.kind for question in questions}
            assert len({question.text for question in questions}) == len(questions)
            for question in questions:
                if question.kind == "later":
                    told = {event.time: event for event in clip.events}
                    assert question.answer_time >= time + 2 * STEP and question.answer_time in told
                elif question.text == "How many monsters do you see?":
                    count = sum(sight.kind in MONSTERS for sight in clip.visible(time))
                    assert (
                        question.answer == (["None", "One", "Two", "Three", "Four", "Five"] + ["?"] * 9)[count] + "."
                    )
    assert kinds == {"present", "earlier", "count", "order", "comparison", "later"}


def test_a_new_tokenizer_has_a_token_for_each_word(clips):
    tokenizer = new_tokenizer(1024, "Watch the world.")
    for clip in clips:
        for kind in KINDS:
            text = " ".join(message["content"] for message in make_dialogue(clip, kind)[0])
            assert all(
                len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1 for word in re.findall(r"\w+", text)
            )


def test_no_two_splits_share_a_map_or_a_seed():
    for one, other in combinations(MAPS, 2):
        assert not {(MAPS[one][0], name) for name in MAPS[one][1]} & {
            (MAPS[other][0], name) for name in MAPS[other][1]
        }
    first = {split: doomworld_dataset(split, num_clips=1).with_format(None)[0]["seed"] for split in SPLITS}
    assert first == SPLITS
    with pytest.raises(ValueError, match="has 100000000 rows"):
        doomworld_dataset("test", num_clips=1, first_clip=100_000_000)


def test_a_row_with_a_slide_show_of_the_split_ood():
    rows = doomworld_dataset("ood", num_clips=1, kinds={"describe": 1}, size=64)
    row = rows[0]
    assert row["video"].shape == (16, 64, 64, 3) and row["kind"] == "describe"
    assert len(row["messages"]) == 17 and len(row["covered"]) == 16 and any(row["covered"])
    assert all(0 <= patch < 64 for frame in row["covered"] for patch in frame)


def test_labels_of_patches_are_the_covered_ones():
    labelled = LabelledPatches("train", 8, 128, range(100, 102), count=6)
    assert len(labelled) == 2
    example = labelled[0]
    assert example["frames"].shape == (6, 128, 128, 3) and example["things"].shape == (6, 64)
    assert example["places"].shape == (6, 64, 3) and (example["colors"] == -100).all()
    shown = example["things"] < len(THINGS)
    assert 0 < shown.mean() < 0.5 and (example["places"][~shown] == 0).all()
    assert (example["places"][shown][:, :2] <= 8).all() and (example["places"][shown] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "has no split 'dev'"),
        ({"kinds": {"sing": 1.0}}, "describe, narrate, ask, wait, got"),
        ({"wordings": {"loud": 1.0}}, "plain, brief, player, got"),
        ({"seconds": (9.0, 5.0)}, "the shortest comes first"),
        ({"fps": 3}, "4 or 2 frames a second, got 3"),
        ({"vocabulary": "tiny"}, "no vocabulary 'tiny'; it has full, small"),
    ],
)
def test_bad_data_sets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        doomworld_dataset(**{"num_clips": 1, **options})


def test_without_vizdoom_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    source = find_source("doomworld")("doomworld")
    with pytest.raises(SystemExit, match=r'pip install -e "\.\[doom\]"'):
        load_split(source, "train", 1)


def test_the_command_writes_videos_messages_and_a_card(tmp_path, monkeypatch, capsys):
    command = ["doomworld.py", tmp_path, "--split", "validation", "--num_clips", 1, "--frame_size", 64]
    command += ["--wordings", "brief=1", "--seconds", "3,3"]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    doomworld.main()
    rows = load_timed_messages(tmp_path, "validation")
    assert list(find_faults(rows)) == [] and rows[0]["kind"] == "narrate"
    clip = record_clip("validation", SPLITS["validation"], seconds=(3.0, 3.0), size=64)
    assert rows[0]["messages"] == make_dialogue(clip, "narrate", "brief")[0]
    with av.open(rows[0]["video"]) as container:
        assert container.metadata["comment"] == "DoomWorld"
        frames = {float(frame.time): frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    for index, picture in enumerate(clip.pictures):
        latest = max(time for time in frames if time <= index * STEP + 1e-6)
        assert np.abs(frames[latest].astype(int) - picture).mean() < 12, index
    monkeypatch.setattr("sys.argv", [str(part) for part in [*command[:-1], "4,4"]])
    with pytest.raises(SystemExit):
        doomworld.main()
    assert (
        "has videos of the split validation, made with another value of seconds. Write to" in capsys.readouterr().err
    )
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "bsd-3-clause" and "ViZDoom" in card.text and "MIT" in card.text
    assert json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[0])["seed"] == SPLITS["validation"]
