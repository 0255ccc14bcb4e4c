# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Encoding before training: features match their encoder, files are complete, and none is written twice."""

import json
import re
import subprocess
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from preloaded import start
from safetensors.torch import load_file
from tiny import random_frames, tiny_model, tiny_processor, training_batch, write_clip

from videollm_mod.train import encode, encoding
from videollm_mod.train.arguments import RowArguments
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.faults import FaultyRowError, row_record
from videollm_mod.train.data.streamworld import StreamWorld
from videollm_mod.train.data.timed_messages import TimedMessages
from videollm_mod.train.encode import EncodeArguments
from videollm_mod.train.encoding import encode_rows


ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows(tmp_path):
    """Two clips of two seconds and of one second."""
    (tmp_path / "data").mkdir()
    say = [{"role": "assistant", "content": "A ball.", "time": 0.5}]
    for index, count in enumerate((20, 10)):
        write_clip(tmp_path / "data" / f"{index}.mp4", random_frames(count, seed=index), fps=10)
    lines = [json.dumps({"video": f"{index}.mp4", "messages": say}) + "\n" for index in range(2)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(lines))
    return TimedMessages(str(tmp_path / "data")).load("train", num_clips=0)


def features_of(made, folder):
    return [load_file(folder / row["frame_features"])["frame_features"] for row in made]


def test_different_encoders_write_different_files(rows, tmp_path):
    """In a shared folder, each encoder writes the same features as in its own folder."""
    wide = tiny_processor()
    wide.video_processor.image_std = (0.25, 0.25, 0.25)
    encoders = {
        "one": (tiny_model(), tiny_processor()),
        "other weights": (tiny_model(seed=1), tiny_processor()),
        "other dtype": (tiny_model().to(torch.bfloat16), tiny_processor()),
        "other pixels": (tiny_model(), wide),
        "other layer": (tiny_model(vision_feature_layer=-2), tiny_processor()),
        "other tokens": (tiny_model(frame_token_cls=False, frame_token_pooled=(2, 4)), tiny_processor()),
    }
    (tmp_path / "all").mkdir()
    made = {name: encode_rows(rows, tmp_path / "all", *encoder) for name, encoder in encoders.items()}
    files = {row["frame_features"] for some in made.values() for row in some}
    assert len(files) == 2 * len(encoders)
    for name, encoder in encoders.items():
        own = tmp_path / name
        own.mkdir()
        again = encode_rows(rows, own, *encoder)
        assert again == made[name], "the names depend on the encoder only"
        for one, other in zip(features_of(again, own), features_of(made[name], tmp_path / "all"), strict=True):
            assert torch.equal(one, other) and one.dtype == encoder[0].dtype, name


GRID = {"frame_token_cls": False, "frame_token_pooled": (2, 2)}
CONNECTED = (
    {"connector": "mlp"},
    {"connector": "mlp", "connector_pooling": "bilinear"},
    {"connector": "mlp_pool_after"},
    {"connector": "pixel_shuffle"},
)


def test_a_model_trains_on_the_features_that_its_connector_reads(rows, tmp_path):
    """Each connector has files of its own. A batch of files gives the loss of a batch of videos."""
    processor, names = tiny_processor(frame_num_tokens=4), []
    for options in CONNECTED:
        model = tiny_model(**options, **GRID, mod_keep_ratio=1.0)
        made = encode_rows(rows, tmp_path, model, processor)
        names += [row["frame_features"] for row in made]
        read = partial(training_batch, processor, frame_feature_shape=model.config.frame_feature_shape)
        encoded = read([made[0] | {"frame_features": str(tmp_path / made[0]["frame_features"])}])
        assert encoded["frame_features"].shape[2:] == model.config.frame_feature_shape
        torch.testing.assert_close(model(**encoded).loss, model(**read([rows[0]])).loss)
    assert len(set(names)) == 2 * len(CONNECTED)
    with pytest.raises(FaultyRowError, match="4 features of width 64 per frame, but the model reads 16 features"):
        StreamCollator(processor, frame_feature_shape=(16, 16))(
            [made[0] | {"frame_features": str(tmp_path / made[0]["frame_features"]), "where": "row 1"}]
        )


def test_file_names_do_not_depend_on_folder_or_language_model(rows, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    (tmp_path / "out").mkdir()
    made = encode_rows(rows, tmp_path / "out", model, processor)
    for name, weight in model.named_parameters():
        if "vision_encoder" not in name:
            weight.data.zero_()
    for name in ("here", "there"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        arguments = EncodeArguments(checkpoint=str(tmp_path / name), output_dir=str(tmp_path / "out"))
        encode.main(RowArguments(), TimedMessages(str(tmp_path / "data")), arguments)
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {row["frame_features"] for row in made}
    told = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [row["frame_features"] for row in told] == [row["frame_features"] for row in made]


def test_incomplete_files_of_a_killed_run_are_deleted(rows, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("0123.77.part", "train.jsonl.part"):
        (tmp_path / "out" / name).write_bytes(b"half")
    encode_rows(rows, tmp_path / "out", tiny_model(), tiny_processor())
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".safetensors"}


@pytest.mark.xdist_group("preloaded")
def test_a_killed_run_continues(tmp_path):
    """The next run encodes only the missing rows, and all files equal those of an uninterrupted run."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    options = {"dataset": "streamworld", "world": "tiny", "num_clips": 40, "frame_size": 32}
    options |= {"checkpoint": tmp_path / "model", "output_dir": tmp_path / "out"}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    running = start("train/encode.py", *given, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.safetensors")) and time.monotonic() < until and running.poll() is None:
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -9
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert 0 < len(before) < 40 and not (tmp_path / "out" / "train.jsonl").exists()

    source = StreamWorld("streamworld", world="tiny", frame_size=32)
    for name in ("out", "whole"):
        arguments = EncodeArguments(checkpoint=str(tmp_path / "model"), output_dir=str(tmp_path / name))
        encode.main(RowArguments(num_clips=40), source, arguments)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    one, other = ((tmp_path / name / "train.jsonl").read_text() for name in ("out", "whole"))
    assert one == other and len(one.splitlines()) == 40
    for path in (tmp_path / "whole").glob("*.safetensors"):
        one, other = (load_file(tmp_path / name / path.name)["frame_features"] for name in ("out", "whole"))
        assert torch.equal(one, other)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_a_process_waits_for_days_while_others_still_encode(tmp_path, monkeypatch):
    """By default it would give up after ten minutes. Here the group has one process."""
    for state in (PartialState, AcceleratorState):
        monkeypatch.setattr(state, "_shared_state", {})
    about = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in (about | {"ACCELERATE_USE_CPU": "true"}).items():
        monkeypatch.setenv(name, str(value))
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    arguments = EncodeArguments(checkpoint=str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    with patch.object(dist, "init_process_group", wraps=dist.init_process_group) as made:
        encode.main(RowArguments(num_clips=1), StreamWorld("streamworld", world="tiny", frame_size=32), arguments)
    try:
        assert made.call_args.kwargs["timeout"].days == 7
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert (tmp_path / "out" / "train.jsonl").exists()


def test_validate_only_reports_and_stops(tmp_path, capsys, monkeypatch):
    """`--validate_only` loads no model and writes no file."""
    source = StreamWorld("streamworld", world="tiny", frame_size=32)
    arguments = EncodeArguments(checkpoint=str(ROOT), output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(encoding, "load_checkpoint", None)
    encode.main(RowArguments(num_clips=2, validate_only=True), source, arguments)
    assert capsys.readouterr().out == "streamworld: 2 rows to encode, no fault found\n"
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_encoded_are_named_or_left_out(rows, tmp_path, capsys):
    """One row is faulty from the beginning, and the video of another is gone when its turn comes."""
    data, where = tmp_path / "data" / "train.jsonl", rows[1]["where"]
    (tmp_path / "data" / "1.mp4").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(FaultyRowError, match=f"^{re.escape(where)}: There is no video file"):
        encode_rows(rows, tmp_path / "out", tiny_model(), tiny_processor())
    with row_record() as record:
        made = encode_rows(rows, tmp_path / "out", tiny_model(), tiny_processor(), left_out=record)
    assert len(made) == 1 and made[0].keys() == {"frame_features", "messages"}
    assert f"left out 1 of 0 rows:\n{where}: There is no video file" in capsys.readouterr().err
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    data.write_text("null\n" + data.read_text())
    data.with_name("about.json").write_text("{}")
    arguments = EncodeArguments(checkpoint=str(tmp_path / "model"), output_dir=str(tmp_path / "new"))
    encode.main(RowArguments(skip_faulty=True), TimedMessages(str(tmp_path / "data")), arguments)
    shown = capsys.readouterr()
    assert shown.out == f"wrote {tmp_path / 'new' / 'train.jsonl'}: 1 row\n"
    assert (tmp_path / "new" / "about.json").exists(), "what was prepared stays known"
    assert "left out 2 of 3 rows:\n" in shown.err and "train.jsonl', line 1: a row is an object" in shown.err


@pytest.mark.usefixtures("rows")
def test_rows_that_have_features_already_are_named_or_left_out_before_a_model_is_loaded(tmp_path, capsys):
    data, folder = tmp_path / "data" / "train.jsonl", tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    arguments = EncodeArguments(checkpoint=str(folder), output_dir=str(tmp_path / "out"))
    encode.main(RowArguments(), TimedMessages(str(tmp_path / "data")), arguments)
    again = EncodeArguments(checkpoint=str(folder), output_dir=str(tmp_path / "again"))
    with patch.object(encoding, "load_checkpoint", None):
        for script in (RowArguments(), RowArguments(skip_faulty=True)):
            with pytest.raises(SystemExit, match="train.jsonl', line 1 has features already, as 2 of 2 rows have: gi"):
                encode.main(script, TimedMessages(str(tmp_path / "out")), again)
    encoded = (tmp_path / "out" / "train.jsonl").read_text().splitlines()[1]
    data.write_text(data.read_text() + encoded.replace('": "', '": "../out/', 1) + "\n")
    source = TimedMessages(str(tmp_path / "data"), video_root=[str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="line 3 has features already, as 1 of 3 rows have"):
        encode.main(RowArguments(), source, again)
    encode.main(RowArguments(skip_faulty=True), source, again)
    shown = capsys.readouterr()
    assert shown.out.endswith(f"wrote {tmp_path / 'again' / 'train.jsonl'}: 2 rows\n")
    assert "left out 1 of 3 rows:\n" in shown.err and "line 3: it has features already." in shown.err
