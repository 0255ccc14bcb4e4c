# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Made-up samples in published layouts, under the names that docs/data.md uses."""

import json
from pathlib import Path
from typing import Any

from tiny import random_frames, write_clip


def save(path: Path, *rows: Any) -> None:
    """Write rows as JSON, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )


def clip(path: Path) -> None:
    """Write a video of three seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, random_frames(6), fps=2)


def save_coin(folder: Path) -> None:
    """Write a sample of COIN: a video of two steps in each split."""
    segments = {"cut bread": [0.0, 1.0], "eat": [1.5, 2.5]}
    steps = [{"id": "1", "segment": segment, "label": label} for label, segment in segments.items()]
    entry = {"duration": 3.0, "class": "EatBread", "start": 0.0, "end": 2.5, "annotation": steps}
    for name in ("aaaaaaaaaaa", "bbbbbbbbbbb"):
        clip(folder / "videos" / f"{name}.mp4")
    database = {"aaaaaaaaaaa": {**entry, "subset": "training"}, "bbbbbbbbbbb": {**entry, "subset": "testing"}}
    save(folder / "COIN.json", {"database": database})


def save_captions_and_moments(folder: Path) -> None:
    """Write samples of ActivityNet Captions and QVHighlights."""
    for name in ("v_aaaaaaaaaaa", "bbbbbbbbbbb_0.0_150.0"):
        clip(folder / "videos" / f"{name}.mp4")
    entry = {"duration": 3.0, "timestamps": [[0, 2], [1.5, 3]], "sentences": ["A dog runs.", "It sits."]}
    for name in ("train", "val_1", "val_2"):
        save(folder / "activitynet" / f"{name}.json", {"v_aaaaaaaaaaa": entry})
    row = {"qid": 1, "query": "A dog", "duration": 3, "vid": "bbbbbbbbbbb_0.0_150.0", "relevant_windows": [[0, 2]]}
    save(
        folder / "qvhighlights" / "highlight_val_release.jsonl",
        {**row, "relevant_clip_ids": [0], "saliency_scores": [[4, 3, 2]]},
    )


def save_vript(folder: Path) -> None:
    """Write a sample of Vript: two scenes of a video."""
    name = "aaaaaaaaaaa"
    clip(folder / "vript" / "vript_long_videos" / f"{name}.mp4")
    caption = {"shot_type": "Wide.", "camera_movement": "Static.", "content": "A dog runs.", "scene_title": "Dog"}
    scenes = [f"{name}-Scene-00{number}" for number in (1, 2)]
    data = {scene: {"video_id": name, "clip_id": scene, "caption": caption, "voiceover": [""]} for scene in scenes}
    meta = {"video_id": name, "video_title": "", "num_clips": 2, "integrity": True}
    save(folder / "vript" / "vript_captions" / f"{name}_caption.json", {"meta": meta, "data": data})
    heard = [{"span": [0.0, 1.0], "text": " Hello."}]
    rows = [{"clip_id": scene, "duration": 1.5, "scene_text": heard, "full_text": " Hello."} for scene in scenes]
    save(folder / "vript" / "vript_long_videos_clips" / name / f"{name}_asr.jsonl", *reversed(rows))


def save_aqtc(folder: Path) -> None:
    """Write a sample of AQTC: a question of two steps."""
    clip(folder / "aqtc" / "test" / "kettle" / "video.mp4")
    save(folder / "aqtc" / "test" / "kettle" / "script.txt", "0:00:00-0:00:02 Press button1.")
    steps = [["Press button1", "Press button10"], ["Wait", "Open it"]]
    question = {"question": "How to boil water?", "answers": steps, "correct": [1, 2], "images": ["a.jpg", "a.jpg"]}
    save(folder / "aqtc" / "test_with_gt.json", {"kettle": [question]})
