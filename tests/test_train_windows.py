# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Windows of long rows: where they are cut, what they begin with, and that no frame is lost, read twice or kept."""

import json
import re
import resource
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from programs import ROOT, run_training
from safetensors.torch import save_file
from test_train_collator import Witness
from tiny import random_features, random_frames, tiny_config, tiny_model, tiny_processor, training_batch, write_clip
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from turns import turn_processor

from videollm_mod import VideoLLMMoDVideoProcessor
from videollm_mod.train.collator import EpochTeller, StreamCollator
from videollm_mod.train.data.faults import FaultyRowError, row_record
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.data.windows import (
    Windows,
    count_frames,
    count_tokens,
    cut_beginning,
    cut_row,
    parts_of,
    split_rows,
    survey,
)
from videollm_mod.train.sft_arguments import ScriptArguments
from videollm_mod.train.tasks import find_task
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.teacher_forcing import predict_all_turns, predict_turns


def asked(time, text="Narrate."):
    return {"role": "user", "content": text, "time": time}


def said(time, text="A ball."):
    return {"role": "assistant", "content": text, "time": time}


def row_of(*messages, frames=40, **more):
    """A row of so many frames, at 1 frame per second: a time is the number of a frame."""
    return {"video": random_frames(frames), "messages": list(messages), **more}


def places(row, **limits):
    return [(window.first, window.stop) for window in Windows(tiny_processor(), 1.0, **limits).find(row)]


def texts(row, *, max_frames, num_replies=0):
    """Return the messages of each window: texts of those before the first frame, then the others as time and text."""
    windows = Windows(tiny_processor(), 1.0, max_frames, num_replies=num_replies)
    cut = [cut_row(row, window, fps=1.0, num_replies=num_replies) for window in windows.find(row)]
    return [[m["content"] if "time" not in m else (m["time"], m["content"]) for m in part["messages"]] for part in cut]


# -------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # As late as possible after a reply. The frame of the reply belongs to the window before.
        ([asked(0), said(3), said(8), said(12), said(18), said(30)], [(0, 9), (9, 19), (19, 29), (29, 31), (31, 40)]),
        # Before a question, if this is later.
        ([asked(0), said(3), asked(8, "Q?"), said(11)], [(0, 8), (8, 12), (12, 22), (22, 32), (32, 40)]),
        # A question that waits for its reply keeps the reply with it.
        ([asked(0), said(2), asked(6, "Q?"), said(15)], [(0, 6), (6, 16), (16, 26), (26, 36), (36, 40)]),
        # Longer silence than a window is cut at its limit, and so is a wait that is longer than a window.
        ([asked(0), said(1), said(35)], [(0, 2), (2, 12), (12, 22), (22, 32), (32, 40)]),
        ([asked(0), said(25)], [(0, 10), (10, 20), (20, 26), (26, 36), (36, 40)]),
        # A reply and a question at one frame stay together, and with the reply to the question.
        ([asked(0), said(4), said(9), asked(9, "Q?"), said(14)], [(0, 9), (9, 15), (15, 25), (25, 35), (35, 40)]),
        # A reply between two frames follows the next one.
        ([asked(0), said(8.4), said(9.4)], [(0, 10), (10, 11), (11, 21), (21, 31), (31, 40)]),
        # A question without a time comes before the first frame.
        ([{"role": "user", "content": "Q?"}, said(8)], [(0, 9), (9, 19), (19, 29), (29, 39), (39, 40)]),
    ],
)
def test_windows_are_cut_after_replies_and_before_questions(messages, expected):
    row = row_of(*messages)
    # A last frame by itself has nothing to learn.
    assert places(row, max_frames=10) == [place for place in expected if place != (39, 40)]
    assert places(row, max_frames=40) == [(0, 40)]


@pytest.mark.parametrize("more", [{"task": "coin_step"}, {"truth": {"label": "cut"}}])
def test_a_window_does_not_have_the_score_of_its_row(more):
    row = row_of(asked(0), said(3), **more)
    [_, window, *_] = Windows(tiny_processor(), 1.0, max_frames=10).find(row)
    assert not more.keys() & cut_row(row, window, fps=1.0).keys()


def test_a_window_begins_with_the_prompt_and_the_standing_instruction():
    system = {"role": "system", "content": "Be brief."}
    row = row_of(system, asked(0), said(5, "A."), asked(8, "Q?"), said(8, "B."), said(12, "C."), asked(22, "Tell me."))
    row["messages"] += [said(30, "D.")]
    # "Q?" was answered at once, so that the instruction before it stays in force. "Tell me." waits for its reply.
    assert texts(row, max_frames=10) == [
        ["Be brief.", (0, "Narrate."), (5, "A."), (8, "Q?"), (8, "B.")],
        ["Be brief.", "Narrate.", (12, "C.")],
        ["Be brief.", "Narrate."],
        ["Be brief.", "Narrate.", (22, "Tell me."), (30, "D.")],
        ["Be brief.", "Tell me."],
    ]
    assert [part[:-1] for part in texts(row, max_frames=10, num_replies=2)][3:] == [
        ["Be brief.", "Narrate.", "B.", "C.", (22, "Tell me.")],
        ["Be brief.", "Tell me.", "C."],
    ]
    # With no other instruction, one that was answered at once and goes on.
    row = row_of(asked(0), said(0, "A."), said(9, "B."), said(19, "C."), frames=20)
    assert texts(row, max_frames=10)[1] == ["Narrate.", (19, "C.")]
    assert texts(row_of(asked(0), said(0), frames=14), max_frames=10)[1] == []


def test_earlier_replies_are_read_and_not_learned():
    row = row_of(asked(0), said(5, "A red ball."), said(12, "A blue ball."), frames=16)
    [_, window] = Windows(tiny_processor(), 1.0, 10).find(row)
    processor = tiny_processor()
    for count, learned in ((0, 1), (1, 1)):
        batch = StreamCollator(processor, 1.0)([cut_row(row, window, fps=1.0, num_replies=count)])
        read = processor.tokenizer.decode(batch["input_ids"][0])
        assert read.count("Assistant:") == 1 + count and ("red" in read) == bool(count)
        taught = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
        assert taught.count("Assistant:") == learned and "red" not in taught


def test_a_window_has_as_many_earlier_replies_as_there_are():
    row = row_of(asked(0), said(2, "A."), said(8, "B."), said(12, "C."))
    found = texts(row, max_frames=10, num_replies=3)
    assert found[1] == ["Narrate.", "A.", "B.", (12, "C.")] and found[2] == ["Narrate.", "A.", "B.", "C."]
    assert texts(row, max_frames=10, num_replies=2)[2] == ["Narrate.", "B.", "C."]


# -------------------------------------------------------------------------------------------------------------- tokens


def tokens_of(row, window, num_replies=0):
    """Return how many tokens the model reads of a window."""
    part = cut_row(row, window, fps=1.0, num_replies=num_replies)
    return StreamCollator(tiny_processor(), 1.0)([part])["input_ids"].shape[1]


@pytest.mark.parametrize("format_name", [None, "smolvlm", "internvl"])
def test_tokens_are_counted_exactly_and_without_pixels(format_name):
    processor = tiny_processor() if format_name is None else turn_processor(format_name)
    messages = [asked(0), *(said(3.0 * k, f"Ball {k}.") for k in range(1, 6)), asked(16, "Wo?"), said(18, "Là.")]
    for row in (row_of(*messages), row_of(*messages[1:], frames=19), row_of(said(39)), row_of(said(1), frames=2)):
        window = Windows(processor, 1.0, max_frames=40).find(row)[0]
        counted = count_tokens(processor, row["messages"], window.stop, fps=1.0)
        assert counted == StreamCollator(processor, 1.0)([row])["input_ids"].shape[1]


def test_a_window_has_at_most_so_many_tokens():
    processor = tiny_processor()
    row = row_of(asked(0), *(said(3.0 * k, f"Ball {k}. " * (k % 5)) for k in range(1, 13)))
    for most in (120, 170, 260):
        windows = Windows(processor, 1.0, max_tokens=most, num_replies=1)
        found = windows.find(row)
        counts = [tokens_of(row, window, 1) for window in found]
        assert max(counts) <= most and len(found) > 1
        assert [window.first for window in found[1:]] == [window.stop for window in found[:-1]]
        # A reply more would be too much.
        assert all(one + two > 0.8 * most for one, two in zip(counts, counts[1:], strict=False))
    # Special tokens in a message are plain text of several tokens.
    spelled = row_of(asked(0), *(said(3.0 * k, "<v></s>" * 3) for k in range(1, 13)))
    found = Windows(processor, 1.0, max_tokens=170).find(spelled)
    assert max(tokens_of(spelled, window) for window in found) <= 170
    with pytest.raises(FaultyRowError, match=r"a row: messages: the text at 3 s needs \d+ tokens with its frame, and"):
        Windows(processor, 1.0, max_tokens=90).find(row_of(asked(0), said(3, "Ball. " * 40)))


def test_max_length_limits_windows_and_may_not_exceed_the_context():
    config, processor = tiny_config(), tiny_processor()
    windows = ScriptArguments(fps=1.0).windows(config, processor, max_length=200)
    row = row_of(*(said(2.0 * k) for k in range(1, 19)))
    assert all(tokens_of(row, window) <= 200 for window in windows.find(row))
    # 2048 positions are a context of some 180 frames, far fewer than 1200.
    long = row_of(*(said(2.0 * k) for k in range(1, 500)), frames=1000)
    windows = ScriptArguments(fps=1.0).windows(config, processor)
    assert windows.max_frames == 1200 and all(window.stop - window.first < 186 for window in windows.find(long))
    with pytest.raises(SystemExit, match="error: --max_length 4096 is more than the model's context, 2048 tokens."):
        ScriptArguments().windows(config, processor, max_length=4096)
    with pytest.raises(SystemExit, match="error: --max_frames must be at least 1, got 0."):
        ScriptArguments(max_frames=0).windows(config, processor)


# -------------------------------------------------------------------------------------------------------------- frames


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data set of two long videos, one with `start` and `end`, and of a file of features."""
    folder = tmp_path_factory.mktemp("files")
    write_clip(folder / "long.mp4", random_frames(130), fps=10)
    features = random_features(tiny_config(), 26)[0]
    save_file({"frame_features": features}, folder / "long.safetensors", metadata={"fps": "2.0", "start": "1.0"})
    told = [asked(1.0), *(said(0.5 + k, f"Ball {k}.") for k in range(1, 11))]
    rows = [
        {"id": "whole", "video": "long.mp4", "messages": told},
        {"id": "part", "video": "long.mp4", "start": 0.7, "end": 12.1, "messages": told},
        {"id": "features", "frame_features": "long.safetensors", "start": 1.0, "end": 14.0, "messages": told},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_windows_have_the_frames_and_replies_of_their_row(files):
    """No frame is lost or read twice, in a video and in a file of features."""
    rows, processor = load_timed_messages(files), tiny_processor()
    assert list(find_faults(rows)) == []
    windows = Windows(processor, max_frames=7)
    parts = split_rows(rows, windows)
    assert [part["id"] for part in parts][:3] == ["whole/window-1", "whole/window-2", "whole/window-3"]
    assert parts[1]["where"] == f"'{files}/train.jsonl', line 1, window 2 of 5"
    collate = StreamCollator(processor)
    for row in rows:
        mine = [collate([part]) for part in parts if part["id"].startswith(row["id"])]
        whole = collate([row])
        name = "frame_features" if row.get("video") is None else "pixel_values_videos"
        assert torch.equal(torch.cat([batch[name][0] for batch in mine]), whole[name][0])
        assert whole["num_frames"][0] == count_frames(row, fps=2.0) == sum(int(b["num_frames"]) for b in mine)
        decoded = [processor.tokenizer.decode(batch["input_ids"][0]) for batch in (*mine, whole)]
        told = [[line for line in text.splitlines() if line.startswith("Assistant")] for text in decoded]
        assert sum(told[:-1], []) == told[-1]
    assert split_rows(rows, Windows(processor)) is rows


def test_a_row_that_ends_with_its_video_has_no_frame_at_the_end(tmp_path):
    """Ten seconds have 20 frames at 2 fps. Only a row that is too long by its times opens its file."""
    video, processor = write_clip(tmp_path / "clip.mp4", random_frames(100), fps=10), tiny_processor()
    row = {"video": str(video), "end": 10.0, "messages": [asked(0), said(3.5, "A."), said(10.0, "B.")]}
    collate = StreamCollator(processor, 2.0)
    for most in (20, 19, 12, 10, 1):
        parts = parts_of(row, Windows(processor, 2.0, most))
        counts = [int(collate([part])["num_frames"][0]) for part in parts]
        assert sum(counts) + (most == 1) * (20 - len(parts)) == 20 and max(counts) <= most
        assert counts == [count_frames(part, fps=2.0, most=most) for part in parts]
        assert [part["messages"][-1]["content"] for part in parts][-1] == "B."
    assert parts_of(row, Windows(processor, 2.0, 20)) == [row] and cut_beginning(row, 20, fps=2.0) is row
    fewer = {**row, "end": 7.0, "messages": row["messages"][:2]}
    assert [window.stop for window in Windows(processor, 2.0, 10).find(fewer)] == [8, 15]
    closed = {**row, "video": str(tmp_path / "missing.mp4")}
    assert Windows(processor, 2.0, 21).find(closed)[0].is_complete
    with pytest.raises(FaultyRowError, match="missing"):
        Windows(processor, 2.0, 20).find(closed)


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_window_may_begin_between_a_message_and_its_frame(tmp_path, start):
    """Every window of such a row can be read, and has the turns of the row."""
    video, processor = write_clip(tmp_path / "clip.mp4", random_frames(110), fps=10), tiny_processor()
    told = [asked(0), said(2.2, "A."), asked(3.7, "Q?"), said(3.9, "B."), said(6.6, "C."), asked(7.2, "R?"), said(7.4)]
    messages = [{**message, "time": start + message["time"]} for message in told]
    row = {"video": str(video), "start": start, "messages": messages}
    whole = processor.to_stream_turns(messages, count_frames(row, fps=2.0), fps=2.0, start=start)
    spoken = [turn["content"] for turn in whole if turn["role"] == "assistant"]
    for most in range(1, 9):
        parts, found = parts_of(row, Windows(processor, 2.0, most)), []
        for part in parts:
            batch = StreamCollator(processor, 2.0)([part])
            assert batch["num_frames"][0] <= most
            turns = processor.to_stream_turns(
                part["messages"], int(batch["num_frames"][0]), fps=2.0, start=part["start"]
            )
            found += [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert found == spoken


def test_the_survey_counts_windows_frames_tokens_and_hours(files):
    rows, windows = load_timed_messages(files), Windows(tiny_processor(), max_frames=7)
    parts = split_rows(rows, windows)
    found = survey(parts, windows)
    batches = [StreamCollator(tiny_processor())([part]) for part in parts]
    assert found.frames == [int(batch["num_frames"]) for batch in batches]
    assert found.tokens == [batch["input_ids"].shape[1] for batch in batches]
    first, *longest = found.lines()
    assert first == f"{len(parts)} windows, 75 frames, {sum(found.tokens):,} tokens, 0.01 hours of video"
    longest_names = [found.names[counts.index(max(counts))] for counts in (found.frames, found.tokens)]
    assert longest == [
        f"most frames: 7, in {longest_names[0]}",
        f"most tokens: {max(found.tokens)}, in {longest_names[1]}",
    ]
    [*_, hint] = survey(parts, Windows(max_frames=7)).lines()
    assert hint == "tokens are not counted: name the model, for example with --checkpoint"


def test_a_window_that_fails_in_training_is_replaced_by_another(tmp_path, capsys):
    """The file breaks off after the check, so that its last windows have no frames."""
    write_clip(tmp_path / "long.mp4", random_frames(100), fps=10)
    told = [said(0.5 + k, f"Ball {k}.") for k in range(9)]
    rows = [{"video": str(tmp_path / "long.mp4"), "end": end, "messages": told} for end in (9.4, None)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_timed_messages(tmp_path)
    parts = split_rows(rows, Windows(tiny_processor(), max_frames=6))
    write_clip(tmp_path / "long.mp4", random_frames(52), fps=10)
    with row_record() as record:
        collator = StreamCollator(tiny_processor(), record=record, replacements=parts)
        batches = list(DataLoader(parts, batch_size=2, collate_fn=collator, num_workers=1))
    assert sum(len(batch["num_frames"]) for batch in batches) == len(parts)
    err = capsys.readouterr().err
    assert "left out 3 of 0 rows" in err and "line 1, window 3 of 3: " in err


def test_a_row_that_cannot_be_split_is_left_out_by_name(files, capsys):
    rows = load_timed_messages(files)
    with pytest.raises(FaultyRowError, match="line 1: messages: the text at 0 s needs"):
        split_rows(rows, Windows(tiny_processor(), max_tokens=40))
    with pytest.raises(FaultyRowError, match=r"^3 rows cannot be split:\n.*line 1: .*\n.*line 2: .*\n.*line 3: "):
        split_rows(rows, Windows(tiny_processor(), max_tokens=40))
    with pytest.raises(SystemExit, match="error: no row is left"), row_record() as record:
        split_rows(rows, Windows(tiny_processor(), max_tokens=40), left_out=record)
    assert capsys.readouterr().err.startswith("left out 3 of 0 rows:")


def test_checks_list_all_texts_that_fit_into_no_window(tmp_path):
    """The line that counts faults counts these too. A checkpoint says how long a window is."""
    write_clip(tmp_path / "a.mp4", random_frames(4), fps=2)
    texts = ("A ball.", "x " * 9000, "It leaves.", "x " * 9500)
    rows = [{"video": "a.mp4", "messages": [asked(0), said(1, text)]} for text in texts]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--dataset", tmp_path, "--checkpoint", ROOT, "--validate_only")
    refused = run_training(tmp_path / "out", *options)
    assert refused.returncode == 1 and "no fault found" not in refused.stdout
    lines = refused.stderr.splitlines()
    assert lines[-3] == "error: 2 rows cannot be split:"
    for line, number in zip(lines[-2:], (2, 4), strict=True):
        assert line.startswith(f"'{tmp_path}/train.jsonl', line {number}: messages: the text at 1 s needs ")
    left = run_training(tmp_path / "out", *options, "--skip_faulty")
    assert left.returncode == 0 and f"{tmp_path}: 2 rows to train on, 2 left out\n" in left.stdout


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("packing", [False, True])
def test_training_resumes_in_the_middle_of_the_windows(tmp_path, files, packing):
    """The order of windows and the replies that are corrupted are those of an uninterrupted run."""
    rows = load_timed_messages(files).select([0, 1])
    parts = split_rows(rows, Windows(tiny_processor(), max_frames=9)).select(range(6))

    def train(folder, resume=None):
        collator = StreamCollator(tiny_processor(), augmentation=0.5, packing=packing)
        options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none"}
        options |= {"remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(str(folder), **options)
        model, teller = Witness(), EpochTeller(collator)
        Trainer(model, arguments, train_dataset=parts, data_collator=collator, callbacks=[teller]).train(resume)
        return model.shown

    shown = train(tmp_path)
    assert len(shown) == 6 and sorted(shown[:3]) != sorted(shown[3:])
    assert train(tmp_path / "resumed", str(tmp_path / "checkpoint-4")) == shown[4:]


def test_max_length_limits_what_training_reads(tmp_path):
    """400 frames have 26,000 tokens. Each step reads one window, of at most 512."""
    write_clip(tmp_path / "long.mp4", random_frames(40), fps=0.2)
    messages = [said(2.0 * k, "It moves.") for k in range(1, 100)]
    (tmp_path / "data.jsonl").write_text(json.dumps({"video": "long.mp4", "messages": messages}))
    options = ["--checkpoint", ROOT, "--max_length", 512, "--max_steps", 4, "--per_device_train_batch_size", 1]
    options += ["--logging_steps", 1, "--save_strategy", "no", "--tune_language_model", "frozen", "--bf16", "false"]
    done = run_training(tmp_path / "out", "--dataset", tmp_path / "data.jsonl", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    total = [int(count) for count in re.findall(r"'num_tokens': '?([\d.]+)", done.stdout)]
    steps = [one - other for one, other in zip(total, [0, *total], strict=False)]
    assert len(steps) == 4 and all(200 < count <= 512 for count in steps)


def test_pixels_are_bytes_until_the_model_normalises_them():
    rows = [row_of(said(1.0), frames=count) for count in (3, 5)]
    processor = tiny_processor()
    batch = StreamCollator(processor, 1.0)(rows)["pixel_values_videos"]
    expected = processor([row["messages"] for row in rows], [row["video"] for row in rows], fps=1.0)
    expected = expected["pixel_values_videos"]
    assert batch.dtype == torch.uint8 and batch.nbytes * 4 == expected.nbytes
    pixels = training_batch(processor, rows, fps=1.0)["pixel_values_videos"]
    assert torch.equal(pixels[0, :3], expected[0, :3]) and torch.equal(pixels[1], expected[1])


class Measured:
    """A collator that returns only its batch's bytes, and by how much its worker has grown."""

    def __init__(self, collator):
        self.collator, self.before = collator, None

    def __call__(self, rows):
        if self.before is None:
            # On Linux, a forked worker would begin with its parent's peak.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batch = self.collator(rows)["pixel_values_videos"].nbytes
        return batch, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) * 1024


def test_the_memory_of_a_worker_is_that_of_a_window(tmp_path, capsys):
    """Thirty minutes of video. Without windows, the worker holds all of its frames."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(1800, 64, 64)[..., None].expand(-1, -1, -1, 3).numpy()
    write_clip(tmp_path / "long.mp4", ramp, fps=1)
    row = {"video": str(tmp_path / "long.mp4"), "messages": [said(30.0 * k) for k in range(1, 60)]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    rows, processor = load_timed_messages(tmp_path), tiny_processor()
    processor.video_processor = VideoLLMMoDVideoProcessor(size={"height": 192, "width": 192})
    grown, largest = {}, {}
    for most in (180, 1800):
        parts = split_rows(rows, Windows(processor, 1.0, most))
        loader = DataLoader(parts, collate_fn=Measured(StreamCollator(processor, 1.0)), num_workers=1)
        batches, growth = zip(*loader, strict=True)
        grown[most], largest[most] = max(growth), max(batches)
        with capsys.disabled():
            line = f"batches of {largest[most] / 1e6:.0f} MB, and a worker grows by {grown[most] / 1e6:.0f} MB"
            sys.stdout.write(f"\n{most} frames: {line}\n")
        assert sum(batches) == 1800 * 3 * 192 * 192
    # Two batches, for the copy into one tensor, and what the decoder and the libraries need.
    bound = 2 * 180 * 3 * 192 * 192 + 96e6
    # The system may take pages back from a worker, so its growth is no lower bound. The frames it held are.
    assert grown[180] < bound < largest[1800]


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_teacher_forcing_predicts_a_long_row_in_windows():
    """The turns are those of the windows. A row that fits is one dialogue."""
    model, processor = tiny_model(text_overrides={"max_position_embeddings": 300}), tiny_processor()
    row = row_of(asked(0), *(said(3.0 * k, f"Ball {k}.") for k in range(1, 13)), task="ego4d_narration")
    [found] = predict_all_turns(model, processor, [row], fps=1.0, progress=False)
    windows = Windows(processor, 1.0, max_tokens=300)
    parts = parts_of(row, windows)
    expected = [turn for part in parts for turn in predict_turns(model, processor, part, fps=1.0)]
    assert len(parts) == 3 and len(found) == 12
    assert [replace(turn, late=0) for turn in found] == [replace(turn, late=0) for turn in expected]
    assert found == Runner(model, processor, fps=1.0).turns(row)
    short = row_of(asked(0), said(3), frames=9)
    assert parts_of(short, windows) == [short]


def clip_as_live(turns, most):
    """VideoLLM-online's rule on a dialogue of texts and runs of frames: it ends before the run that passes `most`."""
    kept, count = [], 0
    for turn in turns:
        count += turn.get("num_frames", 0)
        if count > most:
            break
        kept.append(turn)
    return kept


@pytest.mark.parametrize(
    ("messages", "frames"),
    [
        ([asked(0), said(3), said(8), said(12)], 9),
        # A question whose reply is lost stays, as in that code.
        ([asked(0), said(3), asked(8, "Q?"), said(12)], 9),
        ([asked(0), said(3), asked(9), said(9), said(10)], 10),
        # A run of 10 frames is not too long, one of 11 is. Frames after the last reply are one more run.
        ([said(9), said(19)], 10),
        ([said(2)], 3),
        ([asked(0), said(10)], 1),
        ([said(10)], 0),
        ([{"role": "user", "content": "Q?"}, said(39)], 0),
        ([{"role": "system", "content": "Be brief."}, said(3.4), said(30)], 5),
    ],
)
def test_a_dialogue_is_cut_as_lives_code_cuts_it(messages, frames):
    row, processor = row_of(*messages, start=5.0), tiny_processor()
    row["messages"] = [{**m, "time": m["time"] + 5} if "time" in m else m for m in messages]
    kept = clip_as_live(processor.to_stream_turns(row["messages"], 40, fps=1.0, start=5.0), 10)
    assert sum(turn.get("num_frames", 0) for turn in kept) == frames
    cut = cut_beginning(row, 10, fps=1.0)
    if not frames:
        assert cut is None
        return
    assert len(cut["video"]) == count_frames(cut, fps=1.0) == frames and (cut["video"] == row["video"][:frames]).all()
    assert processor.to_stream_turns(cut["messages"], frames, fps=1.0, start=cut["start"]) == kept
    assert cut_beginning(row, 40, fps=1.0) is row


def test_official_turns_are_those_of_the_beginning_in_one_piece(monkeypatch):
    model, processor = tiny_model(text_overrides={"max_position_embeddings": 150}), tiny_processor()
    monkeypatch.setattr("videollm_mod.train.teacher_forcing.MAX_FRAMES", 20)
    row = row_of(asked(0), *(said(3.0 * k, f"Ball {k}.") for k in range(1, 13)), task="ego4d_narration")
    # 7 x 3 frames are too many by one, with the frame at 0 s.
    beginning = {"video": row["video"][:19], "messages": row["messages"][:7]}
    found = Runner(model, processor, fps=1.0).turns(row, official=True)
    assert found == predict_turns(model, processor, beginning, fps=1.0) and len(found) == 6
    assert len(parts_of(beginning, Windows(processor, 1.0, max_tokens=150))) > 1, "longer than the context"
    task = find_task("ego4d_narration")
    task.official = True
    runner = Runner(model, processor, fps=1.0, stream_options={"max_new_tokens": 1})
    turns = task.predict(runner, {**row, "video": row["video"][:22]})["turns"]
    assert turns == [asdict(turn) for turn in found]
    assert predict_all_turns(model, processor, [row_of(said(30))], fps=1.0, official=True, progress=False) == [[]]
    # One token a frame: VideoLLM-online has 7200 frames.
    small, processor = tiny_model(frame_token_pooled=None), tiny_processor(frame_num_tokens=1)
    [turns] = predict_all_turns(small, processor, [row], fps=1.0, official=True, progress=False)
    assert len(turns) == 12


@pytest.mark.parametrize(
    ("times", "stops", "late"),
    [
        (range(3, 37, 3), [10, 19, 28, 40], [3] + [2] * 10 + [0]),
        # The reply after the first comes two windows later: 23 frames, of which the first turn may watch 9.
        ((9, 32), [10, 24, 33, 40], [9, 0]),
        # No reply comes after the first.
        ((9,), [10, 24, 38, 40], [0]),
    ],
)
def test_the_last_turn_of_a_window_watches_the_windows_after_it(monkeypatch, times, stops, late):
    """The first window sees what the complete row does, also after its end."""
    model, processor = tiny_model(mod_layers="interleaved"), tiny_processor()
    row, seen = row_of(*(said(float(time), "A ball.") for time in times)), []

    def stay_silent(_model, logits, _threshold):
        seen.append(logits)
        return [torch.zeros(len(logits), dtype=torch.bool)] * 2

    monkeypatch.setattr(type(model), "should_speak", stay_silent)
    predict_turns(model, processor, row, fps=1.0)
    complete, model.config.text_config.max_position_embeddings = seen[:], 210
    assert [window.stop for window in Windows(processor, 1.0, max_tokens=210).find(row)] == stops
    [turns] = predict_all_turns(model, processor, [row], fps=1.0, progress=False)
    assert [turn.late for turn in turns] == late
    # The last turn of the first window is watched before the others of this window.
    count = sum(time < stops[0] for time in times)
    if len(times) > 1:
        torch.testing.assert_close(seen[-count], complete[-count], rtol=1e-3, atol=1e-4)
