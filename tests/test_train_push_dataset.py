# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing prepared data to a loopback Hub."""

import json

import pytest
import torch
from datasets import load_dataset
from hub import Hub, commit_hash
from huggingface_hub import DatasetCard
from programs import run_main, run_training
from safetensors.torch import save_file
from tiny import ROOT, random_frames, write_clip

from videollm_mod import VideoLLMMoDConfig
from videollm_mod.train.data import prepare
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.push import main
from videollm_mod.train.push_dataset import _published_names, _without_folders


REPO = "somebody/dialogues"
STORED = f"datasets/{REPO}"


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def push(hub, tmp_path, *arguments):
    with hub.used_here(tmp_path / "home"):
        return run_main(main, *arguments, program="push.py")


@pytest.fixture
def prepared(tmp_path):
    """A prepared folder of COIN: one video found, and one missing."""
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos" / "aaa.mp4", random_frames(60), fps=10)
    steps = [
        {"id": "1", "segment": [0.0, 2.0], "label": "cut bread"},
        {"id": "2", "segment": [3.0, 5.0], "label": "eat"},
    ]
    entry = {"class": "EatBread", "start": 0.0, "end": 5.0, "annotation": steps}
    database = {"aaa": {**entry, "subset": "training"}, "bbb": {**entry, "subset": "testing"}}
    database["ccc"] = {**database["aaa"]}
    (tmp_path / "videos" / "bbb.mp4").symlink_to(tmp_path / "videos" / "aaa.mp4")
    (tmp_path / "COIN.json").write_text(json.dumps({"database": database}))
    paths = ("--annotations", tmp_path / "COIN.json", "--videos", tmp_path / "videos", "--out", tmp_path / "coin")
    done = run_main(prepare.main, "coin", *paths, "--task", "step,next", program="prepare.py")
    assert done.returncode == 0, done.stderr
    return tmp_path / "coin"


def test_prepared_data_is_published_with_a_card_and_streams(hub, prepared, tmp_path):
    options = ("--video_root", tmp_path / "videos")
    done = push(hub, tmp_path, prepared, "--dataset", REPO, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{REPO}@{commit_hash(STORED, 1)}, loaded from there"
    files = hub.files(STORED)
    assert sorted(files) == [
        "README.md",
        "about.json",
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and card.data.configs[0]["data_files"][0]["split"] == "train"
    assert "| train | 3 | coin_next (1), coin_step (2) |" in card.text
    assert "| train | left out | there is no video file | 1 |" in card.text
    assert "--task step,next" in card.text and str(tmp_path) not in card.text + files["about.json"].decode()
    with hub.used_here(tmp_path / "home"):
        rows = list(load_dataset(REPO, split="train", streaming=True))
    assert [row["id"] for row in rows] == ["aaa/0/step", "aaa/1/step", "aaa/0/next"]
    assert rows[0]["video"] == "videos/aaa.mp4" and json.loads(rows[0]["truth"]) == {"label": "cut bread"}
    # A copy with the videos beside the rows is a data set like the first.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    (copy / "videos").symlink_to(tmp_path / "videos")
    assert not list(find_faults(load_timed_messages(copy, "test", video_root=[tmp_path / "videos"])))
    files["train-00001-of-00002.parquet"] = b"from an earlier version"
    again = push(hub, tmp_path, prepared, "--dataset", REPO, "--no_verify", *options)
    assert again.returncode == 0 and "train-00001-of-00002.parquet" not in hub.files(STORED)


def test_videos_of_one_name_keep_their_folders(tmp_path):
    """Each take of Ego-Exo4D has its video `aria01_214-1.mp4`."""
    (tmp_path / "out").mkdir()
    names = ["takes/a/video.mp4", "takes/b/deep/video.mp4", "out/videos/own.mp4", "cache/blob"]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(tmp_path / "clip.mp4", random_frames(10, seed=index)).rename(tmp_path / name)
    (tmp_path / "takes" / "linked.mp4").symlink_to(tmp_path / "cache" / "blob")
    said = [{"role": "assistant", "content": "A.", "time": 0.5}]
    row = {"messages": said}
    videos = ["../takes/a/video.mp4", "../takes/b/deep/video.mp4", "videos/own.mp4", "../takes/linked.mp4"]
    rows = [{"id": name, "video": name, **row} for name in videos]
    (tmp_path / "out" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_timed_messages(tmp_path / "out", video_root=[tmp_path])
    assert loaded[3]["video"] == str(tmp_path / "takes" / "linked.mp4"), "a link keeps its name"
    published = _published_names([loaded], tmp_path / "out")
    expected = ["videos/a/video.mp4", "videos/b/deep/video.mp4", "videos/own.mp4", "videos/linked.mp4"]
    assert list(published.values()) == expected
    (tmp_path / "takes" / "own.mp4").symlink_to(tmp_path / "cache" / "blob")
    with (tmp_path / "out" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "own", "video": "../takes/own.mp4", **row}) + "\n")
    with pytest.raises(ValueError, match="two videos would be published as 'videos/own.mp4'"):
        _published_names([load_timed_messages(tmp_path / "out", video_root=[tmp_path])], tmp_path / "out")


def test_folders_of_this_machine_are_not_published():
    """Their names often have the name of a person."""
    made = "python train/data/generate.py --dataset=/home/joe/goalstep --out ~/joe/out --model ../joe/Llama --fps=2"
    made += " --endpoint https://joe:secret@host/v1"
    about = {"command": f"{made}\npython train/data/prepare.py coin", "dataset": "/home/joe/goalstep", "fps": 2.0}
    assert _without_folders({**about, "source": "dialogues by /home/joe/models/Llama-3"}) == {
        "command": "python train/data/generate.py --dataset=goalstep --out out --model Llama --fps=2 "
        "--endpoint 'https://joe:***@host/v1'\n"
        "python train/data/prepare.py coin",
        "dataset": "goalstep",
        "fps": 2.0,
        "source": "dialogues by Llama-3",
    }


def test_features_travel_within_the_rows(hub, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    features = torch.randn(4, *VideoLLMMoDConfig.from_pretrained(ROOT).frame_feature_shape)
    save_file({"frame_features": features}, folder / "a.safetensors", metadata={"fps": "2.0"})
    row = {
        "id": "a",
        "frame_features": "a.safetensors",
        "messages": [{"role": "assistant", "content": "A.", "time": 1}],
    }
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    refused = push(hub, tmp_path, folder, "--dataset", REPO)
    assert refused.returncode == 1 and "(unknown) does not let anyone publish it. --private keeps it" in refused.stderr
    assert STORED not in hub.repos
    done = push(hub, tmp_path, folder, "--dataset", REPO, "--private")
    assert done.returncode == 0 and STORED in hub.private, done.stderr
    with hub.used_here(tmp_path / "home"):
        rows = load_timed_messages(REPO)
        assert rows[0]["frame_features"] == (folder / "a.safetensors").read_bytes()
        assert not list(find_faults(rows))
        options = ["--max_steps", 1, "--lora_r", 4, "--save_strategy", "no", "--report_to", "none"]
        options += ["--checkpoint", ROOT, "--per_device_train_batch_size", 2, "--logging_steps", 1]
        trained = run_training(tmp_path / "out", "--dataset", REPO, "--streaming", *options)
    assert trained.returncode == 0 and "'frames_per_second'" in trained.stdout, trained.stderr[-2000:]


def test_splits_of_all_names_are_published(hub, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_clip(folder / "a.mp4", random_frames(10))
    row = {"video": "a.mp4", "messages": [{"role": "assistant", "content": "A.", "time": 0.5}]}
    for name in ("dev", "talk", "train"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    done = push(hub, tmp_path, folder, "--dataset", REPO, "--private")
    assert done.returncode == 0, done.stderr
    (configuration,) = DatasetCard(hub.files(STORED)["README.md"].decode()).data.configs
    assert [file["split"] for file in configuration["data_files"]] == ["train", "dev", "talk"]
    with hub.used_here(tmp_path / "home"):
        assert len(load_dataset(REPO, split="dev")) == 1
    (folder / "my talk.jsonl").write_text(json.dumps(row) + "\n")
    refused = push(hub, tmp_path, folder, "--dataset", "somebody/other", "--private")
    assert refused.returncode == 1 and "'my talk' is no name of a split on the Hub: rename its" in refused.stderr
    assert "datasets/somebody/other" not in hub.repos


def test_mistakes_end_in_one_line_and_publish_nothing(hub, prepared, tmp_path):
    options = ("--video_root", tmp_path / "videos")
    about = json.loads((prepared / "about.json").read_text())
    (prepared / "about.json").write_text(json.dumps({**about, "may_be_shared": False, "license": "Ego4D"}))
    hub.repos[STORED] = [{"about.json": b"{}"}]
    for arguments, message in (
        ((prepared, "--dataset", REPO), "(Ego4D) does not let anyone publish it"),
        ((prepared, "--dataset", REPO, "--private", *options), f"'{REPO}' is public: publish under another name"),
        ((tmp_path / "gone", "--dataset", REPO), "There is no folder"),
        ((tmp_path / "videos", "--dataset", REPO, "--private"), "has no .jsonl and no .parquet file"),
        (("--dataset", REPO), "give FOLDER --dataset REPO"),
    ):
        done = push(hub, tmp_path, *arguments)
        assert done.returncode and message in done.stderr and "Traceback" not in done.stderr, arguments
    (prepared / "about.json").write_text(json.dumps(about))
    hub.repos[STORED] = [{"data.csv": b""}]
    assert (
        "holds other files: data.csv. --force adds"
        in push(hub, tmp_path, prepared, "--dataset", REPO, *options).stderr
    )
    (tmp_path / "videos" / "aaa.mp4").unlink()
    faulty = push(hub, tmp_path, prepared, "--dataset", "somebody/other", *options)
    assert (
        faulty.returncode == 1
        and "There is no video file" in faulty.stderr
        and "datasets/somebody/other" not in hub.repos
    )
