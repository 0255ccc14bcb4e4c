# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Vript in its published layout: scenes get their times and become replies; all samples are made up."""

import json

import pytest
from programs import run_main
from tiny import random_frames, write_clip

from videollm_mod.train.data import prepare
from videollm_mod.train.data.converters import Notes, Videos, find_converter
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.data.vript import scene_spans


NAME = "aB-Scene-x_1"  # an id may look like a scene's


@pytest.fixture
def folder(tmp_path):
    """Vript's folders, with a video of ten seconds."""
    for part in ("vript_captions/long", "vript_long_videos", f"vript_long_videos_clips/{NAME}"):
        (tmp_path / part).mkdir(parents=True)
    write_clip(tmp_path / "vript_long_videos" / f"{NAME}.mp4", random_frames(20), fps=2)
    return tmp_path


def save(folder, captions, asr=None, cuts=None, *, integrity=True):
    """Write the captions of scenes, by number, and the lines of their speech."""
    keys = ("scene_title", "content", "shot_type", "camera_movement")
    data = {
        f"{NAME}-Scene-{number:03d}": {
            "video_id": NAME,
            "clip_id": f"{NAME}-Scene-{number:03d}",
            "video_title": "A title",
            "caption": dict(zip(keys, texts, strict=True)) if isinstance(texts, tuple) else texts,
            "voiceover": [""],
        }
        for number, texts in captions.items()
    }
    meta = {"video_id": NAME, "video_title": "A title", "num_clips": len(data), "integrity": integrity}
    path = folder / "vript_captions" / "long" / f"{NAME}_caption.json"
    path.write_text(json.dumps({"meta": meta, "data": data}))
    clips = folder / "vript_long_videos_clips" / NAME
    if asr is not None:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in asr]
        (clips / f"{NAME}_asr.jsonl").write_text("\n".join(lines))
    if cuts is not None:
        (clips / f"{NAME}_cut_meta.json").write_text(json.dumps(cuts))
    return path


def heard(number, seconds, *lines):
    text = [{"span": [start, end], "text": f" {said}"} for start, end, said in lines]
    return {
        "clip_id": f"{NAME}-Scene-{number:03d}",
        "duration": seconds,
        "lang": "en",
        "scene_text": text,
        "full_text": "",
    }


def convert(folder, *, annotations=None, **options):
    """Return the row, or `None`, and what was left out or mended."""
    notes = Notes()
    rows = list(find_converter("vript")(**options).convert(annotations or folder, Videos(folder), notes))
    assert len(rows) <= 1 and all(split == "train" for split, _ in rows)
    left, mended = (
        {reason: found.count for split in counts.values() for reason, found in split.items()}
        for counts in (notes.left_out, notes.mended_by)
    )
    return rows[0][1] if rows else None, left, mended


def said(row):
    return [(m["time"], m["content"]) for m in row["messages"] if m["role"] == "assistant"]


CAPTIONS = {
    2: ("the dog", "A dog sits.", "Close-up.", "Static"),
    1: ("The cat", "A cat runs", "Wide", "Pans left."),
    3: ("End", "It is dark.", "Wide.", "Static."),
}
# The published files have the scenes in reverse order.
ASR = [heard(3, 3.0), heard(2, 3.1, (0.0, 1.0, "Hello."), (1.0, 4.0, "This is long.")), heard(1, 3.9)]


def test_scenes_are_described_when_they_end(folder):
    save(folder, CAPTIONS, ASR)
    row, left, mended = convert(folder)
    assert said(row) == [(4.0, "The cat. A cat runs."), (7.0, "The dog. A dog sits."), (9.5, "End. It is dark.")]
    assert row["messages"][0] == {
        "role": "user",
        "content": "Describe each scene of the video in detail when it is over.",
    }
    assert row["truth"]["timestamps"] == [pytest.approx(pair) for pair in ([0, 3.9], [3.9, 7.0], [7.0, 10.0])]
    assert row["task"] == "vript_scenes" and row["id"] == NAME and (row["start"], row["end"]) == (0.0, 9.5)
    assert not left and not mended


def test_every_scene_of_the_truth_is_described(folder):
    """Scenes with equal words are told each, and scenes that end at one frame are one reply."""
    captions = {1: CAPTIONS[1], 2: CAPTIONS[1], 3: CAPTIONS[2], 4: CAPTIONS[3]}
    save(folder, captions, [heard(1, 2.0), heard(2, 2.1), heard(3, 0.3), heard(4, 5.6)])
    row, left, mended = convert(folder, titles=True)
    assert said(row) == [(2.0, "The cat."), (4.5, "The cat. The dog."), (9.5, "End.")]
    assert row["truth"]["sentences"] == ["The cat.", "The cat.", "The dog.", "End."] and not left
    assert mended == {"is said at the same frame as another: one reply": 1}


def test_titles_shots_and_cameras_are_options(folder):
    path = save(folder, CAPTIONS, ASR)
    row, *_ = convert(folder, annotations=path, say_at="start", titles=True, shots=True, camera=True)
    # A frame after the start, so that the scene has been seen.
    assert said(row) == [
        (0.5, "The cat. Wide. Pans left."),
        (4.5, "The dog. Close-up. Static."),
        (7.5, "End. Wide. Static."),
    ]
    assert row["messages"][0]["content"] == (
        "Give each scene of the video a title, with its shot type and camera movement, when it starts."
    )
    assert row["truth"]["say_at"] == "start"


def test_speech_stands_at_its_time_in_the_video(folder):
    save(folder, CAPTIONS, ASR)
    row, _, mended = convert(folder, speech=True)
    heard = [(m["time"], m["content"]) for m in row["messages"][1:] if m["role"] == "user"]
    # 3.9 + 1.0 s, and the end of a scene that a line exceeds.
    assert heard == [(5.0, 'The speaker says: "Hello."'), (7.0, 'The speaker says: "This is long."')]
    assert [m["role"] for m in row["messages"] if m.get("time") == 7.0] == ["user", "assistant"]
    assert mended == {"speech ends after its scene: cut": 1} and len(said(row)) == 3


def test_scenes_after_a_missing_one_have_no_time(folder):
    save(folder, CAPTIONS, [ASR[0], ASR[2]], integrity=False)
    row, left, mended = convert(folder)
    assert said(row) == [(4.0, "The cat. A cat runs.")]
    assert left == {"has no time: a scene before it has no length": 2}
    assert mended == {"scenes are missing: the others are kept": 1, "the scenes do not fill the video: kept": 1}
    assert scene_spans({2: 1.0}, {}) == {} and scene_spans({}, {}) == {}


@pytest.mark.parametrize("names", [("start", "end"), ("start_time", "end_time")])
@pytest.mark.parametrize("clock", [False, True])
def test_times_of_cuts_come_first(folder, names, clock):
    times = {1: (0.0, 4.0), 3: (6.5, 10.0)}
    clips = [
        {"clip_id": f"{NAME}-Scene-{number:03d}.mp4"}
        | {key: f"00:{time:05.2f}" if clock else time for key, time in zip(names, pair, strict=True)}
        for number, pair in times.items()
    ]
    save(folder, CAPTIONS, None, {"clips": [*clips, {"clip_id": "x"}, None]})
    row, left, mended = convert(folder)
    assert row["truth"]["timestamps"] == [[0.0, 4.0], [6.5, 10.0]]
    assert left == {"has no time: a scene before it has no length": 1}
    assert mended == {"has no scene and times: left out": 2}


def test_faulty_entries_are_counted(folder):
    captions = {**CAPTIONS, 4: None, 5: ("Title", " ", "a", "b"), 6: ("Late", "It is late.", "a", "b")}
    asr = [*ASR, "{", "[]", heard(4, -1), {"clip_id": 3, "duration": 1}, heard(4, "3.0"), heard(5, 2), heard(6, 2)]
    asr[0] = {**ASR[0], "scene_text": [None, {"span": [1], "text": "a"}, {"span": [0, 1], "text": ""}]}
    path = save(folder, captions, asr)
    (folder / "vript_captions" / "gone_caption.json").write_text("{}")
    row, left, mended = convert(folder)
    assert len(said(row)) == 3
    assert left == {
        "there is no video file": 1,
        "is no scene with a caption": 1,
        "there is no text": 1,
        "starts after the end of the video": 1,
    }
    assert mended == {
        "has no scene and length: left out": 4,
        "speech without time or text: left out": 3,
        "the scenes do not fill the video: kept": 1,
    }
    path.write_text("no JSON")
    row, left, _ = convert(folder)
    assert row is None and left["is not JSON"] == 1 and left["no scene is left"] == 1
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="has no file <id>_caption.json"):
        convert(folder, annotations=folder / "empty")
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        convert(folder, annotations=folder / "nowhere")


def test_the_command_writes_rows_without_faults(folder):
    save(folder, CAPTIONS, ASR)
    paths = ["--annotations", folder, "--videos", folder, "--out", folder / "out"]
    done = run_main(prepare.main, "vript", *paths, "--speech", program="prepare.py")
    assert done.returncode == 0 and "train: 1 row (1 vript_scenes)" in done.stdout, done.stderr
    rows = load_timed_messages(folder / "out", "train", video_root=[folder])
    assert rows[0]["truth"]["sentences"][2] == "End. It is dark." and not list(find_faults(rows))
