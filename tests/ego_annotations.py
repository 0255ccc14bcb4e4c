# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Made-up annotations of Ego4D and Ego-Exo4D, in the published layouts.

[`write_ego_downloads`] writes folders as the downloads have them, for the pages.
"""

import json
from collections import Counter

from videollm_mod.train.data.converters import Notes, Videos
from videollm_mod.train.data.ego4d.narration import BENCHMARKS


def save(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def said(row):
    """Return time, role initial and text of the messages of a row."""
    return [(message.get("time"), message["role"][0], message["content"]) for message in row["messages"]]


def redacted(*narrations, **more):
    keys = ("time", "text", "_annotation_uid")
    return {"narrations": [dict(zip(keys, values, strict=False)) for values in narrations], "summaries": [], **more}


# The narrations of two passes, out of order, with two in one slot and two with the same text.
PASSES = (
    (3.1, "#C C opens a shelf", "p-1"),
    (1.2, "#C C looks around", "p-1"),
    (3.4, "#C C takes a cup", "p-1"),
    (8.0, "#C C takes a cup.", "p-1"),
    (9.9, "#O A man X waves", "p-1"),
    (0.0, "#C C walks", "p-2"),
)


def step(start, end, text, *substeps, **more):
    flags = {"is_continued": False, "is_procedural": True, "is_relevant": "essential", "summary": []}
    found = {"start_time": start, "end_time": end, "step_category": f"Cook: {text}", "step_description": text, **flags}
    return {**found, "segments": list(substeps), **more}


def goalstep(*videos, split="val"):
    return {"version": "1.0", "date": "231129", "description": "", "split": split, "videos": list(videos)}


def goal(uid, *steps, **more):
    about = {"start_time": 0.0, "end_time": 20.0, "goal_category": "COOKING:X", "goal_description": "Make tea."}
    return {"video_uid": uid, **about, "goal_wikihow_url": "", "summary": [], "segments": list(steps), **more}


TAXONOMY = {
    "verbs": ["adjust_(regulate,_increase/reduce,_change)", "turn_on_(switch_on)", "take"],
    "nouns": ["pot_(planter)", "bat_(tool)", "cup", "chip_(wood,_metal)"],
}


def action(index, start, *, clip="c-1", video="v-1", verb=0, noun=2, **more):
    """An action of 0.4 s. The clip begins at second 2 of the video."""
    times = {"action_clip_start_sec": start, "action_clip_end_sec": (start or 0) + 0.4, "action_idx": index}
    clips = {"clip_parent_start_sec": 2.0, "clip_parent_end_sec": 18.0, "interval_start_sec": 2.0}
    labels = {"verb": "x", "noun": "y", "verb_label": verb, "noun_label": noun}
    entry = {"video_uid": video, "clip_uid": clip, **clips, **labels, **times, **more}
    return {key: value for key, value in entry.items() if value != "absent"}


def lta(folder, *actions, split="val"):
    save(folder, "fho_lta_taxonomy.json", TAXONOMY)
    return save(folder, f"fho_lta_{split}.json", {"version": "1", "split": split, "clips": list(actions)})


def asked(query, start=None, end=None, **more):
    times = {} if start is None else {"video_start_sec": start, "video_end_sec": end}
    return {"template": "Objects: Where is X?", "query": query, "slot_x": "cup", "verb_x": None, **times, **more}


def nlq(*queries, uid="v-1", clip="c-1", start=2.0, end=18.0, split="val"):
    annotations = [{"annotation_uid": "a", "language_queries": list(queries)}]
    clips = [{"clip_uid": clip, "video_start_sec": start, "video_end_sec": end, "annotations": annotations}]
    return {"video_uid": uid, "split": split, "clips": clips}


MAPPING = """label_id,step_unique_id,step_name,scenario_name
0,843,Unbox package,Covid-19 Rapid Antigen Test
1,12,Get eggs,Making Cucumber Salad
2,57,get eggs,Making Omelet
3,60,"Cut, or slice, tomato",Making Omelet
"""


def take(uid, name, camera="aria02"):
    views = {
        camera: {
            "slam-left": {"relative_path": f"frame_aligned_videos/{camera}_1201-1.mp4"},
            "rgb": {"cam_id": camera, "relative_path": f"frame_aligned_videos/{camera}_214-1.mp4"},
        },
        "cam01": {"0": {"relative_path": "frame_aligned_videos/cam01.mp4"}},
        "best_exo": {"0": {"relative_path": None}},
    }
    about = {"root_dir": f"takes/{name}", "take_name": name, "take_uid": uid, "capture": {"cameras": []}}
    return {**about, "frame_aligned_videos": views}


def segment(start, end, label, *, name="t_1", uid="u-1", camera="aria02", **more):
    clip = f"train/{name}/start{start}_end{end}_{camera}_214-1.mp4"
    files = {"segment_name_list": [clip, clip.replace(camera, "cam01")], "ego_segment_name": clip}
    about = {"take_uid": uid, "take_name": name, "start_time": start, "end_time": end, "step_name": "x"}
    step = {0: 843, 1: 12, 2: 57, 3: 60}.get(label)
    return {**files, **about, "step_unique_id": step, "label_id": label, **more}


def benchmark(folder, *segments, split="val"):
    save(folder, "keystep_benchmark/label_mapping.csv", MAPPING)
    content = {"date": "x", "description": "x", "splits": split, "segments": list(segments)}
    return save(folder, f"keystep_benchmark/keystep_segment_{split}.json", content)


def keysteps(*segments, uid="u-1", name="t_1"):
    return {uid: {"take_uid": uid, "take_name": name, "scenario": "Making Tea", "segments": list(segments)}}


def key(start, end, name, **more):
    ids = {"step_id": 1, "step_unique_id": 2, "step_description": "own words", "is_essential": True}
    return {"start_time": start, "end_time": end, "step_name": name, **ids, **more}


def described(text, time, *, visible="1", **more):
    camera = {"best_exo": {"raw_cam_id": "1", "cam_id": "cam01"}, "unsure": "0", "narration_subject": "C"}
    return {"text": text, "timestamp": time, "ego_visible": visible, **camera, **more}


def pass_of(*descriptions, rejected=False):
    about = {"annotation_uid": "a", "annotator_id": "1", "rejected": rejected, "reject_reason": None}
    return {**about, "descriptions": list(descriptions)}


def convert(kind, annotations, videos, **options):
    """Return the rows of a converter with their split, what was noted, as counts by reason, and the converter."""
    notes, converter = Notes(), kind(**options)
    rows = list(converter.convert(annotations, Videos(videos), notes))
    counts = Counter()
    for found in (*notes.left_out.values(), *notes.mended_by.values()):
        counts.update({reason: each.count for reason, each in found.items()})
    return rows, dict(counts), converter


def write_ego_downloads(folder, video):
    """Write the folders `ego4d/v2` and `egoexo`, with a video of at least 10 s under the names that they use."""
    ego4d, egoexo = folder / "ego4d" / "v2", folder / "egoexo"
    for path in (
        ego4d / "full_scale" / "v-1.mp4",
        ego4d / "full_scale" / "v-2.mp4",
        egoexo / "takes" / "t_1" / "frame_aligned_videos" / "downscaled" / "448" / "aria02_214-1.mp4",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(video)
    annotations = ego4d / "annotations"
    videos = {"v-1": redacted(*PASSES), "v-2": redacted((0.0, "#C C walks", "p-1"), (2.0, "#C C stops", "p-1"))}
    save(annotations, "all_narrations_redacted.json", {"videos": videos})
    # The benchmarks evaluate on the first video, and train on the second.
    for name, key_of_videos in BENCHMARKS.items():
        for end in ("val", "test_unannotated"):
            uids = ["v-1"] if end == "val" else ["v-3"]
            save(annotations, f"{name}_{end}.json", {key_of_videos: [{"video_uid": uid} for uid in uids]})
    for split in ("train", "val"):
        steps = goal("v-1", step(2.1, 5.0, "boils"), step(5, 6.2, "pours"))
        save(annotations, f"goalstep_{split}.json", goalstep(steps, split=split))
        save(annotations, f"nlq_{split}.json", {"videos": [nlq(asked("Where?", 4.0, 5.0), end=8.0, split=split)]})
        lta(annotations, *(action(index, 0.1 * index) for index in range(28)), split=split)
        benchmark(egoexo / "annotations", segment(1.2, 4.4, 2), split=split)
        content = {"annotations": keysteps(key(0, 2, "Stir"), key(2, 4, "Pour"))}
        save(egoexo / "annotations", f"keystep_{split}.json", content)
        content = {"annotations": {"u-1": [pass_of(described("C sits.", 1.0), described("C stands.", 2.0))]}}
        save(egoexo / "annotations", f"atomic_descriptions_{split}.json", content)
    save(egoexo, "takes.json", [take("u-1", "t_1")])
