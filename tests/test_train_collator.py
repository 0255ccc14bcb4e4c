# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The collator in training: the choice of corrupted replies depends on the epoch, and survives a resume."""

import ctypes
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import slice_tensors
from datasets import Dataset
from safetensors.torch import save_file
from tiny import (
    random_features,
    random_frames,
    tiny_config,
    tiny_model,
    tiny_processor,
    write_clip,
    write_noisy_clip,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import scatter_gather
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from videollm_mod.train.collator import EpochTeller, StreamCollator, augment_replies, normalize_pixels
from videollm_mod.train.data import faults
from videollm_mod.train.data.faults import row_record
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.encoding import encode_rows
from videollm_mod.train.streaming_evaluation import stream_examples
from videollm_mod.video_reading_videollm_mod import read_video


class Witness(torch.nn.Module):
    """Learn nothing, and record the dialogues of each step without their padding."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown = []

    def forward(self, input_ids, **_):
        self.shown.append([tuple(row[row != 0].tolist()) for row in input_ids])
        return {"loss": self.weight**2}


def train(folder, resume=None, *, workers=0, persistent=False):
    """Return the inputs of three epochs over six dialogues of nine replies each, two dialogues per step."""
    config = tiny_config()
    rows = [
        {
            "frame_features": random_features(config, 20, seed=row)[0],
            "messages": [{"role": "assistant", "content": f"Ball {row}{k}.", "time": 1.0 * k} for k in range(1, 10)],
        }
        for row in range(6)
    ]
    collator = StreamCollator(tiny_processor(), augmentation=0.5)
    options = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none"}
    options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
    arguments = TrainingArguments(str(folder), remove_unused_columns=False, use_cpu=True, disable_tqdm=True, **options)
    model = Witness()
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[EpochTeller(collator)])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model.shown


def test_each_epoch_corrupts_other_replies_and_a_resumed_one_the_same(tmp_path):
    whole = train(tmp_path)
    assert len(whole) == 9
    epochs = [{ids for step in whole[begin : begin + 3] for ids in step} for begin in (0, 3, 6)]
    assert [len(epoch) for epoch in epochs] == [6, 6, 6] and not epochs[0] & epochs[1] | epochs[1] & epochs[2]
    # In the middle of an epoch, and between two.
    for step in (4, 6):
        assert train(tmp_path / "resumed", tmp_path / f"checkpoint-{step}") == whole[step:]


def test_the_epoch_of_a_streamed_row_comes_before_the_collators():
    messages = [{"role": "assistant", "content": f"Ball {k}.", "time": 1.0 * k} for k in range(1, 10)]
    row = {"frame_features": random_features(tiny_config(), 20)[0], "messages": messages}
    collator = StreamCollator(tiny_processor(), augmentation=0.5)

    def batch(own, **more):
        collator.epoch.fill_(own)
        return collator([row | more])["labels"][0].tolist()

    for stated, of_collator in ((0, 0), (1, 1), (None, 2), (-1, 2), ("0", 2)):
        assert batch(2, epoch=stated) == batch(of_collator)
    assert batch(0) != batch(1) != batch(2)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_corrupt_the_same_replies(tmp_path, persistent):
    assert train(tmp_path / "workers", workers=1, persistent=persistent) == train(tmp_path / "none")


def clips(*lengths):
    """Rows with features of so many frames each, and one reply."""
    message = {"role": "assistant", "content": "A ball.", "time": 0.5}
    return [{"messages": [message], "frame_features": random_features(tiny_config(), n)[0]} for n in lengths]


def test_a_batch_can_be_split_by_rows(monkeypatch):
    """As accelerate's dispatcher and `nn.DataParallel` split it, with another number of frames in each row."""
    batch = StreamCollator(tiny_processor())(clips(2, 3, 4, 5))
    # Without GPUs, stand in for the copies to them.
    monkeypatch.setattr(scatter_gather.Scatter, "apply", lambda gpus, _sizes, dim, x: x.chunk(len(gpus), dim))
    replicas = scatter_gather.scatter_kwargs((), batch, [0, 1])[1]
    assert len(replicas) == 2
    model = tiny_model()
    whole = model(**batch).logits
    for rows, replica in zip((slice(0, 2), slice(2, 4)), replicas, strict=True):
        part = slice_tensors(batch, rows)
        assert part.keys() == replica.keys() == batch.keys()
        assert all(torch.equal(replica[name], part[name]) for name in part)
        torch.testing.assert_close(model(**part).logits, whole[rows], rtol=1e-4, atol=1e-5)


def test_replies_are_corrupted_only_if_asked_for():
    message = {"role": "assistant", "content": "A ball.", "time": 0.5}
    rows = [row | {"messages": [message | {"time": 0.5 * at} for at in range(1, 9)]} for row in clips(9)]
    by_default, never, often = (
        StreamCollator(tiny_processor(), **options)(rows)
        for options in ({}, {"augmentation": 0.0}, {"augmentation": 1.0})
    )
    assert by_default.keys() == never.keys() and all(torch.equal(by_default[name], never[name]) for name in never)
    assert not torch.equal(by_default["labels"], often["labels"])


def test_other_dialogues_have_other_replies_corrupted():
    def corrupted(text):
        messages = [{"role": "assistant", "content": f"{text} {at}.", "time": 0.5 * at} for at in range(1, 20)]
        row = {"messages": messages, "frame_features": random_features(tiny_config(), 20)[0]}
        turns, _ = StreamCollator(tiny_processor(), augmentation=0.5)._read(row)
        return {turn["content"][-3:] for turn in turns if turn["role"] == "assistant" and turn.get("learn", True)}

    found = [corrupted(text) for text in ("A ball", "A cube", "A ball")]
    assert found[0] == found[2] != found[1]


def test_packed_rows_have_the_features_of_each():
    rows = clips(2, 3)
    batch = StreamCollator(tiny_processor(), packing=True)(rows)
    assert torch.equal(batch["frame_features"][0], torch.cat([row["frame_features"] for row in rows]))
    assert batch["num_frames"].tolist() == [5] and batch["seq_idx"].diff().sum() == 1


def test_a_video_without_frames_is_refused_by_name():
    row = {"messages": [{"role": "assistant", "content": "A ball.", "time": 0.5}], "video": iter(())}
    with pytest.raises(ValueError, match="The video is empty: there is no frame"):
        StreamCollator(tiny_processor())([row])


def test_frames_of_two_sizes_are_refused():
    processor = tiny_processor()
    processor.video_processor.do_resize = False
    row = {"messages": [{"role": "assistant", "content": "A ball.", "time": 0.5}]}
    row["video"] = [*random_frames(64), *random_frames(2, size=(16, 32))]
    with pytest.raises(ValueError, match="must have one size, got 16 x 32 and 32 x 32"):
        StreamCollator(processor)([row])


def test_a_reply_is_corrected_at_the_next_frame_unless_another_comes_there():
    """With a frame between the two replies, the correction comes first. With none, there is none."""
    for between, corrects in ((2, True), (1, False)):
        turns = [
            {"role": "stream", "num_frames": 1},
            {"role": "assistant", "content": "A."},
            {"role": "stream", "num_frames": between},
            {"role": "assistant", "content": "B."},
        ]
        late = [
            {"role": "stream", "num_frames": 2, "learn": [False, True]},
            {"role": "assistant", "content": "A."},
            {"role": "stream", "num_frames": 1, "learn": [True]},
            {"role": "assistant", "content": "B."},
        ]
        found = [augment_replies(turns, np.random.default_rng(seed), 0.5) for seed in range(200)]
        assert (late in found) == corrects


def test_features_of_another_shape_are_refused(tmp_path):
    """They are read from a file; those of the model's shape make a batch."""
    message = {"role": "assistant", "content": "A ball.", "time": 0.5}
    path = tmp_path / "clip.safetensors"
    save_file({"frame_features": torch.zeros(6, 4, 16)}, path, metadata={"fps": "2"})
    row = {"messages": [message], "frame_features": str(path)}
    for shape in (None, (4, 16)):
        batch = StreamCollator(tiny_processor(frame_num_tokens=4), frame_feature_shape=shape)([row])
        assert batch["frame_features"].shape == (1, 6, 4, 16)
    for shape in ((5, 16), (4, 8)):
        message = f"4 features of width 16 per frame, but the model reads {shape[0]} features of width {shape[1]}"
        with pytest.raises(ValueError, match=message):
            StreamCollator(tiny_processor(), frame_feature_shape=shape)([row])


def test_normalized_pixels_are_on_the_device_of_the_batch():
    with FakeTensorMode():
        pixels = torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8, device="cuda")
        processor = SimpleNamespace(normalize_frames=lambda frames: frames.float())
        for dtype in (None, torch.bfloat16):
            made = normalize_pixels({"pixel_values_videos": pixels}, processor, dtype=dtype)["pixel_values_videos"]
            assert made.device.type == "cuda" and made.dtype == (dtype or torch.float32)


def test_times_of_messages_count_from_the_start_of_a_row():
    row = clips(4)[0]
    later = row | {"start": 10.0, "messages": [row["messages"][0] | {"time": 10.5}]}
    batches = [StreamCollator(tiny_processor())([x]) for x in (row, later)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


@pytest.mark.parametrize("packing", [False, True])
def test_videos_of_every_type_make_the_same_batch(packing):
    """Also with more frames than are resized together, and with rows of different lengths."""
    message = {"role": "assistant", "content": "A ball.", "time": 0.5}
    videos = [random_frames(count, seed=count) for count in (2, 70, 3)]
    batches = []
    for kind in (np.asarray, torch.as_tensor, list, iter):
        rows = [{"messages": [message], "video": kind(np.asarray(video))} for video in videos]
        batches.append(StreamCollator(tiny_processor(), packing=packing)(rows))
    pixels = batches[0]["pixel_values_videos"]
    assert (batches[0]["labels"] >= 0).sum() > 3 * len(["A", "ball."])
    assert pixels.shape[:2] == ((1, 75) if packing else (3, 70))
    shown = (
        pixels[0].split([2, 70, 3])
        if packing
        else [row[:count] for row, count in zip(pixels, [2, 70, 3], strict=True)]
    )
    for row, video in zip(shown, videos, strict=True):
        assert torch.equal(row, tiny_processor().resize_frames(video))
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch)


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def rows(tmp_path):
    """Rows of a JSON Lines file: the second and the fourth pass the quick check and fail in training."""
    write_clip(tmp_path / "good.mp4", random_frames(40))
    write_noisy_clip(tmp_path / "noisy.mp4", 40, noise_from=20)
    told = [{"role": "assistant", "content": "A ball.", "time": 3.5}]
    names = ("good.mp4", "noisy.mp4", "good.mp4", "noisy.mp4")
    lines = [json.dumps({"video": name, "messages": [told[0] | {"content": f"{n}."}]}) for n, name in enumerate(names)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    found = load_timed_messages(tmp_path)
    assert list(find_faults(found)) == []
    return found


def load(rows, collator, workers):
    return list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=workers))


def test_workers_that_inherit_nothing_load_the_same_batches(rows):
    """Spawned processes, as on other systems. Newer Pythons on Linux start workers in a similar way."""
    with row_record() as record:
        collator = StreamCollator(tiny_processor(), record=record, replacements=rows)
        expected = load(rows, collator, 0)
        spawned = DataLoader(rows, 2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
        loaded = list(spawned)
        assert len(record.left_out()) == 2
    assert len(loaded) == 2 and [batch.keys() for batch in loaded] == [batch.keys() for batch in expected]
    for batch, other in zip(loaded, expected, strict=True):
        for name, value in batch.items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_fails_is_named(rows, workers):
    with pytest.raises(SystemExit) as failed, row_record() as record:
        load(rows, StreamCollator(tiny_processor(), record=record), workers)
    reason = "Message 0 is at 3.5 s, after the last frame at 1.5 s."
    assert str(failed.value) == f"error: {rows[1]['where']}: {reason}" and "line 2" in rows[1]["where"]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_row_takes_the_place_of_one_that_fails(rows, workers, capsys):
    """Batches keep their size. Each row is listed once, at the end, however often it was met."""
    with row_record() as record:
        record.num_rows = 4
        collator = StreamCollator(tiny_processor(), record=record, replacements=rows)
        first, second = (load(rows, collator, workers) for _ in range(2))
        assert not capsys.readouterr().err
    assert all(len(batch["input_ids"]) == 2 for batch in first)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, second, strict=True))
    expected = [tuple(StreamCollator(tiny_processor())([rows[n]])["input_ids"][0].tolist()) for n in (0, 2)]
    assert {tuple(ids.tolist()) for batch in first for ids in batch["input_ids"]} == set(expected)
    head, *lines = capsys.readouterr().err.splitlines()
    assert head == "left out 2 of 4 rows:"
    assert sorted(line.partition(": ")[0] for line in lines[:2]) == [rows[1]["where"], rows[3]["where"]]


def test_rows_that_all_fail_end_the_run(rows):
    with pytest.raises(SystemExit, match="error: none of the 2 rows can be read"), row_record() as record:
        bad = rows.select([1, 3])
        load(bad, StreamCollator(tiny_processor(), record=record, replacements=bad), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_that_are_used_in_part_are_listed_at_the_end(tmp_path, workers, capsys):
    write_clip(tmp_path / "good.mp4", random_frames(40))
    write_noisy_clip(tmp_path / "noisy.mp4", 40, noise_from=20)
    told = [{"role": "assistant", "content": "A ball.", "time": 1.0}]
    rows = [{"video": str(tmp_path / name), "messages": told} for name in ("good.mp4", "noisy.mp4")]
    with row_record() as record:
        for _ in range(2):
            load(rows, StreamCollator(tiny_processor(), record=record), workers)
        list(stream_examples(tiny_model(), tiny_processor(), rows, max_new_tokens=1))
        encode_rows(Dataset.from_list(rows), tmp_path, tiny_model(), tiny_processor())
    head, *lines = capsys.readouterr().err.splitlines()[-2:]
    assert head == "mended or read in part: 1 video:"
    assert len(lines) == 1 and lines[0].startswith(f"'{tmp_path}/noisy.mp4': ") and "spoilt" in lines[0]


@pytest.mark.parametrize("how", ["kill", "segfault", "exit"])
def test_the_row_of_a_worker_that_dies_is_named(rows, how, monkeypatch):
    """A worker dies when a fault in a decoder or lack of memory ends its process."""
    ways = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segfault": lambda: ctypes.string_at(0),
        "exit": lambda: os._exit(3),
    }

    def read_or_die(video, **options):
        return ways[how]() if "noisy" in video.source else read_video(video, **options)

    monkeypatch.setattr(faults, "read_video", read_or_die)
    with pytest.raises(SystemExit) as failed, row_record() as record:
        load(rows, StreamCollator(tiny_processor(), record=record, replacements=rows), 1)
    assert re.match(r"error: a worker of the data loader (was killed \([\w ]+\)|died) at ", str(failed.value))
    assert f" at {rows[1]['where']}. If memory ran out" in str(failed.value)
