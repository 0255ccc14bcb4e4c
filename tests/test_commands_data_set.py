# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Narrating a data set: the subtitles of a folder of the same files, from the Hub, a folder or a table."""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import datasets
import pytest
from broadcast import headers, http_server
from hub import Hub
from typer.testing import CliRunner

from videollm_mod import cli
from videollm_mod.commands import ray_folder
from videollm_mod.commands.data_set import DataSet, Row, StoppedError, fetched
from videollm_mod.commands.folder import Narrated, Video


ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "streamworld.mp4"
FILES = {"train/b.mp4": SAMPLE, "train/trip/a.mp4": ROOT / "samples" / "doomworld.mp4"}


def narrate(*arguments):
    return CliRunner().invoke(cli.app, ["narrate", *map(str, arguments)])


def written(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.srt")}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for name, source in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    return folder


@pytest.fixture
def hub(tmp_path):
    with Hub() as server, server.used_here(tmp_path / "home"):
        yield server


def test_a_data_set_on_the_hub_gets_the_subtitles_of_a_folder(films, hub, tmp_path):
    assert narrate(films, "--out", tmp_path / "expected").exit_code == 0
    expected = {name.replace(".srt", ".mp4.srt"): text for name, text in written(tmp_path / "expected").items()}
    hub.repos["datasets/somebody/films"] = [{name: (films / name).read_bytes() for name in FILES}]
    command = ["hf://datasets/somebody/films", "--out", tmp_path / "out", "--json"]
    done = narrate(*command)
    assert done.exit_code == 0, done.output
    assert written(tmp_path / "out") == expected and len(expected) == 2
    assert {json.loads(line)["video"] for line in done.stdout.splitlines()} == set(FILES)
    (tmp_path / "out" / "train" / "b.mp4.srt").unlink()
    again = narrate(*command)
    assert [json.loads(line)["video"] for line in again.stdout.splitlines()] == ["train/b.mp4"]
    assert "1 video narrated before" in again.stderr and written(tmp_path / "out") == expected


def test_videos_within_a_table_and_their_faults(films, tmp_path):
    good, cut = (films / "train" / "b.mp4").read_bytes(), (films / "train" / "b.mp4").read_bytes()[:3000]
    rows = [{"bytes": good, "path": "one.mp4"}, {"bytes": good, "path": "one.mp4"}, {"bytes": cut, "path": None}]
    table = datasets.Dataset.from_dict(
        {"clip": rows, "label": [1, 2, 3]},
        features=datasets.Features({"clip": datasets.Video(decode=False), "label": datasets.Value("int64")}),
    )
    table.to_parquet(tmp_path / "table" / "train-00000-of-00001.parquet")
    found = list(DataSet(str(tmp_path / "table"), "train", None).rows())
    assert [row.name for row in found] == [f"train-00000/00000{name}" for name in ("0-one.mp4", "1-one.mp4", "2")]
    with fetched(found[0]) as path:
        assert path.read_bytes() == good
    done = narrate(tmp_path / "table", "--split", "train", "--out", tmp_path / "out", "--streams", 1)
    assert done.exit_code == 1 and "2 narrated, 1 failed" in done.stderr
    assert "error: 'train-00000/000002' cannot be read as video: its index is missing" in done.stderr
    assert len(set(written(tmp_path / "out").values())) == 1


def test_a_video_that_rows_name_again_is_narrated_once(films, tmp_path):
    (tmp_path / "list").mkdir()
    shutil.copy(films / "train" / "b.mp4", tmp_path / "list" / "b.mp4")
    (tmp_path / "list" / "rows.jsonl").write_text('{"film": "b.mp4"}\n' * 3)
    command = [tmp_path / "list", "--column", "film", "--out", tmp_path / "out", "--streams", 1]
    done = narrate(*command)
    assert done.exit_code == 0 and done.stdout.count("\n") == 1, done.output
    assert "\n2 rows named a video again\n1 narrated; " in done.stderr and "before" not in done.stderr
    assert narrate(*command).stderr == "1 video narrated before\n2 rows named a video again\n"
    data_set = DataSet(str(tmp_path / "list"), None, "film")
    assert [table["name"].to_pylist() for table in ray_folder._read(data_set, range(1), set())] == [["b.mp4"]]
    assert list(ray_folder._read(data_set, range(1), {"b.mp4"})) == []
    twice = [Narrated(Video(Path("b.mp4"), "b.mp4", Path("b.srt")), num_frames=count) for count in (1, 2)]
    batches = (batch for batch in (twice[:1], twice[1:]))
    assert list(ray_folder._first(batches)) == [twice[:1], []]


def test_a_name_that_is_too_long_is_a_fault_of_its_row(films, tmp_path):
    folder = tmp_path / "list"
    folder.mkdir()
    for name in ("x" * 248 + ".mp4", "b.mp4"):
        shutil.copy(films / "train" / "b.mp4", folder / name)
    done = narrate(folder, "--split", "train", "--out", tmp_path / "out", "--streams", 1)
    assert done.exit_code == 1 and "1 narrated, 1 failed" in done.stderr, done.output
    assert "File name too long" in done.stderr and set(written(tmp_path / "out")) == {"b.mp4.srt"}


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_does_not_wait_for_a_server_that_is_silent(tmp_path):
    gone, pressed = threading.Event(), []

    def answer(request, _):
        headers(request, "video/mp4")
        request.wfile.write(b"x" * 1000)
        time.sleep(0.5)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
        gone.wait(60)

    (tmp_path / "list").mkdir()
    with http_server(answer) as url:
        (tmp_path / "list" / "rows.jsonl").write_text(json.dumps({"video": f"{url}/a.mp4"}))
        done = narrate(tmp_path / "list", "--split", "train", "--video-root", f"{url}/", "--out", tmp_path / "out")
        assert time.monotonic() - pressed[0] < 10
        gone.set()
    assert done.exit_code == 130 and "stopped: the same command goes on" in done.stderr, done.output


def test_a_copy_from_the_hub_ends_when_the_work_is_stopped(films, hub):
    hub.repos["datasets/somebody/films"] = [{"b.mp4": (films / "train" / "b.mp4").read_bytes()}]
    row, stop = Row("b.mp4", "hf://datasets/somebody/films@main/b.mp4"), threading.Event()
    with fetched(row, stop) as path:
        assert path.read_bytes() == (films / "train" / "b.mp4").read_bytes()
    stop.set()
    with pytest.raises(StoppedError), fetched(row, stop):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="files have names elsewhere")
def test_a_program_that_is_killed_leaves_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with fetched(Row("a.mp4", data=b"film")) as path:
        assert path.read_bytes() == b"film" and list(tmp_path.iterdir()) == []


def test_columns_of_paths(tmp_path):
    (tmp_path / "list").mkdir()
    shutil.copy(SAMPLE, tmp_path / "list" / "a.mp4")
    urls = ["https://place.example/x/b.mp4?key=1", "https://place.example/x/b.mp4?key=2", "https://me:a/b@c.d/e?f=g"]
    # What stands between ":" and "@" may be a password, or a port and folders.
    urls += ["http://nas:8080/cam1@2026.mp4", "http://nas:8080/cam2@2026.mp4", "http://nas:8080/cam1/2026.mp4"]
    lines = [{"film": "a.mp4", "id": 1}, *({"film": url, "id": 2} for url in urls)]
    (tmp_path / "list" / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data_set = DataSet(str(tmp_path / "list"), None, "film")
    assert [(row.name, row.address) for row in data_set.rows()] == [
        ("a.mp4", str(tmp_path / "list" / "a.mp4")),
        ("place.example/x/b-5d5a2f99.mp4", urls[0]),
        ("place.example/x/b-47564524.mp4", urls[1]),
        ("c.d/e-7c189400", urls[2]),
        ("2026-23acfee9.mp4", urls[3]),
        ("2026-08e54fe1.mp4", urls[4]),
        ("nas:8080/cam1/2026.mp4", urls[5]),
    ]
    # A file outside the data set is not read, and the other rows count.
    (tmp_path / "list" / "rows.jsonl").write_text('{"film": "/etc/passwd"}\n{"film": "../a.mp4"}\n{"film": "a.mp4"}')
    outside, above, inside = DataSet(str(tmp_path / "list"), None, "film").rows()
    for row, path in ((outside, "/etc/passwd"), (above, "../a.mp4")):
        with (
            pytest.raises(ValueError, match=f"'{path}' is outside the data set .*--video-root /"),
            fetched(row),
        ):
            pass
        assert not row.address and row.name.startswith("train-00000/")
    with fetched(inside) as path:
        assert path == tmp_path / "list" / "a.mp4"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["hf://datasets/films", "--out", "{out}"],
            "'hf://datasets/films' names no data set: write hf://datasets/OWNER/NAME.",
        ),
        ([SAMPLE, "--column", "clip"], "--split and --column are for a data set, and "),
        (["{films}", "--split", "train"], "A data set needs --out, a folder for subtitles."),
        (["{films}", "--split", "test", "--out", "{out}"], "There is no split 'test': there are train."),
        (["{films}", "--column", "clip", "--out", "{out}"], "There is no column 'clip': there are video"),
        (["hf://datasets/somebody/films", "--srt", "a.srt"], "--srt is for one video"),
    ],
)
def test_wrong_data_sets_get_one_line(films, tmp_path, arguments, said):
    done = narrate(*(str(x).format(films=films, out=tmp_path / "out") for x in arguments))
    assert done.exit_code == 1 and done.stderr.startswith(f"error: {said}"), done.output
    assert done.stderr.count("\n") == 1
