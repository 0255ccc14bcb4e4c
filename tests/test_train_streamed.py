# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Rows that are read while the model trains: their order, faults, and runs that resume."""

from itertools import islice

import pytest
import torch
from programs import losses_of, run_training
from safetensors.torch import save_file
from tiny import ROOT, random_frames, write_clip
from torch.utils.data import DataLoader

from videollm_mod.train import sft
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.faults import FaultyRowError, RowRecord
from videollm_mod.train.data.feature_files import _read_group
from videollm_mod.train.data.shards import write_shards
from videollm_mod.train.data.streamed import RowOrder, repeat_rows
from videollm_mod.train.data.timed_messages import find_faults, stream_timed_messages
from videollm_mod.train.data.windows import Windows


@pytest.fixture
def rows(tmp_path):
    """Twenty rows in several files."""
    messages = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "A.", "time": 0.0}]
    rows = [{"id": str(index), "video": "a.mp4", "messages": messages, "truth": {"n": index}} for index in range(20)]
    write_shards(rows, tmp_path, "train", max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.parquet"))) > 2
    return stream_timed_messages(tmp_path)


def batches(rows, count, **options):
    return read(repeat_rows(rows, RowOrder(batch_size=3, **options)), count, options.get("num_workers", 0))


def read(rows, count, num_workers):
    loaded = DataLoader(
        rows,
        batch_size=3,
        num_workers=num_workers,
        collate_fn=ids_and_epochs,
    )
    return [batch for batch, _ in zip(loaded, range(count), strict=False)]


def ids_and_epochs(some):
    return [(row["id"], row["epoch"]) for row in some]


@pytest.mark.parametrize("buffer_size", [0, 8])
def test_the_order_depends_on_neither_workers_nor_the_first_row(rows, buffer_size):
    expected = batches(rows, 14, buffer_size=buffer_size)
    assert sorted(int(name) for name, epoch in sum(expected, []) if epoch == 0) == list(range(20))
    names = [name for name, _ in sum(expected, [])]
    assert (names[:20] == names[20:40]) is (buffer_size == 0), "each pass has an order of its own"
    for first in (6, 27):
        assert batches(rows, 4, buffer_size=buffer_size, first_row=first) == expected[first // 3 :][:4]
    assert batches(rows, 5, buffer_size=buffer_size, first_row=27, num_workers=2) == expected[9:14]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_take_batches_in_turn(rows, num_workers):
    """As Accelerate shares a data set among processes."""
    order = RowOrder(batch_size=3, num_processes=2, num_workers=num_workers, buffer_size=8)
    shares = [repeat_rows(rows, order).shard(num_shards=2, index=index) for index in range(2)]
    made = [read(share, 4, num_workers) for share in shares]
    assert [made[index % 2][index // 2] for index in range(8)] == batches(rows, 8, buffer_size=8)


def test_rows_are_as_they_were_written(rows, tmp_path):
    first = next(iter(rows))
    assert first["truth"] == {"n": 0} and first["where"] == f"'{tmp_path}', 0"
    assert first["video"] == str(tmp_path / "a.mp4") and "time" not in first["messages"][0]


def test_rows_wait_without_their_features(tmp_path):
    """A shuffle buffer of 1,000 rows, in each worker, would hold tens of gigabytes."""
    features = torch.arange(8 * 6, dtype=torch.float32).view(8, 6, 1, 1)
    rows = []
    for index, frames in enumerate(features):
        path = tmp_path / f"{index}.safetensors"
        save_file({"frame_features": frames}, path, metadata={"fps": "2.0"})
        rows.append({"id": str(index), "frame_features": str(path), "end": 2.5, "messages": [said(2.5)]})
    write_shards(rows, tmp_path, "train", embed_features=True, max_shard_size="1KB")
    _read_group.cache_clear()
    stream = stream_timed_messages(tmp_path)
    order = RowOrder(batch_size=1, first_row=8, num_processes=3)
    made = list(islice(repeat_rows(stream, order, windows=Windows(fps=2, max_frames=4)).shard(3, 1), 4))
    assert {row["id"].partition("/")[2] for row in made} == {"window-1", "window-2"}
    assert _read_group.cache_info().misses == 0, "neither to split rows nor to pass over those of others"
    for row in made:
        of_row = features[int(row["id"][0])]
        shown = StreamCollator(None, fps=2).read_features(row)
        assert torch.equal(shown, of_row[:4] if row["id"].endswith("1") else of_row[4:])
    assert not list(find_faults(list(stream)))


def said(time, content="A ball.", role="assistant"):
    return {"role": role, "content": content, "time": time}


@pytest.fixture
def folder(tmp_path):
    """Eight rows about parts of a clip. The seventh says something after its end."""
    write_clip(tmp_path / "clip.mp4", random_frames(40), fps=10)
    rows = [
        {
            "id": str(index),
            "video": "clip.mp4",
            "start": index / 4,
            "end": index / 4 + 1,
            "messages": [said(index / 4)],
        }
        for index in range(8)
    ]
    rows[6]["messages"].append(said(9.0))
    write_shards(rows[:6] + rows[7:], tmp_path, "train")
    write_shards(rows, tmp_path, "faulty")
    return tmp_path


RUN = ["--checkpoint", ROOT, "--streaming", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
RUN += ["--lora_r", 4, "--report_to", "none", "--logging_steps", 1, "--augmentation", 0.5]


@pytest.fixture
def used(monkeypatch):
    """The batches that a run makes: ids of rows, with their labels."""
    used = []

    class Recording(StreamCollator):
        def __call__(self, examples):
            batch = super().__call__(examples)
            used.append(([example["id"] for example in examples], batch["labels"].tolist()))
            return batch

    monkeypatch.setattr(sft, "StreamCollator", Recording)
    return used


def test_a_resumed_run_goes_on_with_the_batches_of_an_uninterrupted_run(folder, used):
    options = ["--dataset", folder, *RUN, "--max_steps", 5, "--save_steps", 2, "--save_total_limit", 5]
    whole = run_training(folder / "out", *options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = used[:10]
    assert len({name for [name], _ in expected[:7]}) == 7, "a pass has each row once"
    used.clear()
    resumed = run_training(folder / "out", *options, "--resume_from_checkpoint", folder / "out" / "checkpoint-2")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert used[:6] == expected[4:], "the row and the epoch that corrupts its replies"
    assert losses_of(resumed.stdout) == losses_of(whole.stdout)[2:]


def test_faulty_rows_of_a_stream(folder, used):
    options = ["--dataset", folder, *RUN, "--max_steps", 4, "--train_split", "faulty", "--save_strategy", "no"]
    refused = run_training(folder / "out", *options)
    fault = f"'{folder}', 6, messages[1].time: is 9 s, beyond the end at 2.5 s"
    assert refused.returncode == 1 and f"1 fault in 1 row:\n{fault}" in refused.stderr
    done = run_training(folder / "out", *options, "--skip_faulty")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(used) >= 8 and f"'{folder}', 6: Message 1 is at 9.0 s" in done.stderr
    checked = run_training(folder / "out", *options, "--skip_faulty", "--validate_only")
    assert "7 rows to train on, 1 left out" in checked.stdout and fault in checked.stderr
    assert fault in run_training(folder / "out", *options, "--validate_only").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--streaming needs --max_steps, because the number of rows is unknown"),
        (["--max_steps", 1, "--dataset", "streamworld"], "this source makes its rows when they are used"),
        (["--max_steps", 1, "--train_split", "test"], "has no split 'test'"),
        (["--max_steps", 1, "--dataset", "lines"], "JSON lines are read when they are used: leave --streaming out"),
    ],
)
def test_what_cannot_be_streamed_ends_in_one_line(folder, options, message):
    (folder / "lines").mkdir()
    (folder / "lines" / "train.jsonl").write_text("{}\n")
    options = [folder / "lines" if option == "lines" else option for option in options]
    options = options if "--dataset" in options else ["--dataset", folder, *options]
    done = run_training(folder / "out", *RUN, *options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_long_rows_of_a_stream_are_split(tmp_path):
    write_clip(tmp_path / "clip.mp4", random_frames(40), fps=10)
    long = {"id": "long", "video": "clip.mp4", "messages": [said(1.0), said(3.0, "A box.")]}
    faulty = {"id": "faulty", "video": "gone.mp4", "messages": [said(1.0)]}
    write_shards([long, faulty], tmp_path, "train")
    rows, windows = stream_timed_messages(tmp_path), Windows(fps=2, max_frames=4)
    record = RowRecord(str(tmp_path))
    order = RowOrder(batch_size=1, buffer_size=0)
    made = repeat_rows(rows, order, windows=windows, left_out=record)
    assert [row["id"] for row in islice(made, 4)] == ["long/window-1", "long/window-2"] * 2
    assert len(record.left_out()) == 1 and "faulty" in record.left_out()[0]
    with pytest.raises(FaultyRowError, match="faulty: "):
        list(islice(repeat_rows(rows, order, windows=windows), 3))


@pytest.mark.parametrize("first_row", [0, 5])
def test_a_stream_without_a_window_ends(tmp_path, monkeypatch, first_row):
    monkeypatch.setattr("videollm_mod.train.data.streamed.count", lambda: range(3))
    rows = [{"id": name, "video": "gone.mp4", "messages": [said(1.0)]} for name in "ab"]
    write_shards(rows, tmp_path, "train")
    record, order = RowRecord(str(tmp_path)), RowOrder(batch_size=1, first_row=first_row)
    made = repeat_rows(stream_timed_messages(tmp_path), order, windows=Windows(fps=2, max_frames=4), left_out=record)
    with pytest.raises(FaultyRowError, match="no row is left: none has a window with anything to learn"):
        next(iter(made), None)
    assert len(record.left_out()) == 2
