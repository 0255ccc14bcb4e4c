# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Rows as Parquet files, with frame features beside or within them."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from programs import run_main
from safetensors.torch import save_file
from tiny import random_features, random_frames, tiny_model, tiny_processor, write_clip

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.json_rows import LineWriter
from videollm_mod.train.data.shards import ShardWriter, main, write_shards
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


QUESTION = {"role": "user", "content": "What?"}


def answer(time, text="A ball.", **more):
    return {"role": "assistant", "content": text, "time": time, **more}


@pytest.fixture
def rows(tmp_path):
    """Two rows with features of 4 and 6 frames, whose truths and messages have different keys."""
    for count in (4, 6):
        features = {"frame_features": random_features(tiny_model().config, count, seed=count)[0]}
        save_file(features, tmp_path / f"{count}.safetensors", metadata={"fps": "2.0", "start": "0.0"})
    return [
        {
            "id": f"row {count}",
            "frame_features": str(tmp_path / f"{count}.safetensors"),
            "messages": [QUESTION, answer(1.0), answer(1.5, "It leaves.", learn=False)][: count // 2],
            "truth": {"label": "a"} if count == 4 else {"labels": ["a", "b"], "at": 1.5},
        }
        for count in (4, 6)
    ]


@pytest.mark.parametrize("embed", [False, True])
def test_rows_with_features_train_alike(rows, tmp_path, embed):
    out = tmp_path / "out"
    out.mkdir()
    assert write_shards(rows, out, "train", max_shard_size="1MB", embed_features=embed) == 2
    loaded = load_timed_messages(out, video_root=[tmp_path])
    kept = [{name: row[name] for name in ("id", "messages", "truth")} for row in loaded]
    assert kept == [{name: row[name] for name in ("id", "messages", "truth")} for row in rows]
    assert isinstance(loaded[0]["frame_features"], bytes if embed else str)
    assert not list(find_faults(loaded))
    collate = StreamCollator(tiny_processor(), frame_feature_shape=tiny_model().config.frame_feature_shape)
    for name, value in collate(rows).items():
        torch.testing.assert_close(collate([loaded[0], loaded[1]])[name], value, msg=name)


@pytest.mark.parametrize("embed", [False, True])
def test_a_folder_is_converted(rows, tmp_path, embed):
    folder = tmp_path / "deep" / "features"
    folder.mkdir(parents=True)
    lines = [{**row, "frame_features": f"../../{row['id'][4:]}.safetensors"} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "about.json").write_text('{"source": "x"}')
    refused = run_main(main, folder, tmp_path / "out", program="shards.py")
    assert refused.returncode == 1 and "which may name its own files only. If you trust" in refused.stderr
    options = ["--video_root", tmp_path, *(["--embed_features"] if embed else [])]
    done = run_main(main, folder, tmp_path / "out", *options, program="shards.py")
    assert (done.returncode, done.stdout) == (0, "train: 2 rows\n"), done.stderr
    loaded = load_timed_messages(tmp_path / "out", video_root=[tmp_path])
    assert (tmp_path / "out" / "about.json").exists() and not list(find_faults(loaded))
    assert isinstance(loaded[0]["frame_features"], bytes) is embed
    raw = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet").to_pylist()
    assert embed or raw[0]["frame_features"] == "../4.safetensors", "a path that the folder can take along"
    for wrong in ([tmp_path / "gone", tmp_path / "out"], [folder, folder]):
        assert "error: '" in run_main(main, *wrong, program="shards.py").stderr


def test_rows_without_features_have_none_to_embed(tmp_path):
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos" / "a.mp4", random_frames(4), fps=2)
    (tmp_path / "videos" / "train.jsonl").write_text(
        json.dumps({"video": "a.mp4", "messages": [QUESTION, answer(1.0)]})
    )
    done = run_main(main, tmp_path / "videos", tmp_path / "out", "--embed_features", program="shards.py")
    assert done.stderr == (
        "error: --embed_features: the rows of 'train' have no features. train/encode.py makes them.\n"
    )
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_faults_of_embedded_features_are_named(rows, tmp_path):
    write_shards(rows, tmp_path, "train", embed_features=True)
    good = load_timed_messages(tmp_path)[0]
    late = {**good, "messages": [answer(9.0)]}
    (damaged, beyond) = find_faults([good, {**good, "frame_features": b"12345678nothing"}, late])
    assert damaged.field == "frame_features" and "the row holds no readable tensor" in damaged.message
    assert beyond.row == 2 and "beyond the end at 2 s" in beyond.message
    collate = StreamCollator(tiny_processor(), fps=4)
    with pytest.raises(FaultyRowError, match="the row has features at 2 frames per second, but `fps` is 4"):
        collate([good])


def test_an_error_leaves_earlier_files(rows, tmp_path):
    write_shards(rows, tmp_path, "train", max_shard_size="1KB", embed_features=True)
    before = sorted(path.name for path in tmp_path.glob("train*"))
    assert before == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    with pytest.raises(ValueError, match="row 'row 4' has the key 'split'. Put it into `truth`."):
        write_shards([rows[1], {**rows[0], "split": 1}], tmp_path, "train")
    assert sorted(path.name for path in tmp_path.glob("train*")) == before
    write_shards(rows[:1], tmp_path, "train")
    assert [path.name for path in tmp_path.glob("train*")] == ["train-00000-of-00001.parquet"]
    with pytest.raises(ValueError, match="'0MB' is no size of a file"):
        ShardWriter(tmp_path, "train", max_shard_size="0MB")


def test_a_truth_that_is_no_json_is_a_fault_of_its_row(rows, tmp_path):
    write_shards(rows[:1], tmp_path, "train")
    loaded = load_timed_messages(tmp_path).with_format(None)
    loaded.map(lambda row: {**row, "truth": "{"}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    (fault,) = find_faults(load_timed_messages(tmp_path))
    assert "parquet', row 0, truth: not JSON" in str(fault)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_a_killed_run_leaves_is_not_read(rows, tmp_path, kind):
    folder = tmp_path / "out"
    folder.mkdir()

    def writer():
        return LineWriter(folder / "train.jsonl") if kind == "jsonl" else ShardWriter(folder, "train")

    row = {"id": "a", "video": "a.mp4", "messages": rows[0]["messages"]}
    with writer() as whole:
        whole.write(row)
    killed = writer().__enter__()
    killed.write(row | {"id": "b"})
    if kind == "parquet":
        killed._flush()
        killed._end_shard()
    else:
        killed.file.flush()
    assert len(list(folder.iterdir())) == 2
    found = load_dataset(str(folder), split="train", streaming=True)
    assert [row["id"] for row in found] == ["a"]
    with writer() as whole:
        whole.write(row)
    assert len(list(folder.iterdir())) == 1
