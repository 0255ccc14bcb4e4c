# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which files a data set may name: its own, and those that the user allows."""

import json
import re
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset
from hub import Hub
from tiny import random_frames, tiny_processor, write_clip

from videollm_mod.commands.data_set import DataSet, fetched
from videollm_mod.data_paths import HUB, NamedFiles, load_builder
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages, stream_timed_messages


FINE = [{"role": "user", "content": "Go.", "time": 0.0}, {"role": "assistant", "content": "A ball.", "time": 1.0}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_clip(path, random_frames(20), fps=10)
    return path


@pytest.fixture
def places(tmp_path, clip):
    """A data set with a clip, a folder beside it with another, and links from the first to the second."""
    data, other = tmp_path / "data", tmp_path / "other"
    for folder in (data / "videos", other):
        folder.mkdir(parents=True)
        shutil.copy(clip, folder / "a.mp4")
    (data / "inside.mp4").symlink_to("videos/a.mp4")
    (data / "outside.mp4").symlink_to(other / "a.mp4")
    (data / "folder").symlink_to(other)
    return data, other


@pytest.mark.parametrize(
    ("name", "is_inside"),
    [
        ("videos/a.mp4", True),
        ("videos/../videos/a.mp4", True),
        ("{data}/videos/a.mp4", True),
        ("inside.mp4", True),
        ("gone.mp4", True),
        ("concat:videos/a.mp4", True),  # a name of a file in this folder, which is not there
        ("../other/a.mp4", False),
        ("videos/../../other/a.mp4", False),
        ("{data}/../other/a.mp4", False),
        ("{other}/a.mp4", False),
        ("{data}-more/a.mp4", False),
        ("outside.mp4", False),
        ("folder/a.mp4", False),
        ("folder/../other/a.mp4", False),
        ("/etc/passwd", False),
        ("/dev/video0", False),
        ("file:///etc/passwd", False),
        ("http://127.0.0.1/a.mp4", False),
        ("rtsp://camera/a", False),
        ("hf://datasets/somebody/other/a.mp4", False),
        ("zip://a.mp4::/etc/a.zip", False),
        ("..", False),
        ("", False),
    ],
)
def test_a_folder_names_its_own_files(places, name, is_inside):
    data, other = places
    name = name.format(data=data, other=other)
    files = NamedFiles(data)
    if is_inside:
        assert Path(files.locate(name)).parent.resolve().is_relative_to(data)
        return
    with pytest.raises(ValueError, match="is outside the data set|is no path") as error:
        files.locate(name)
    assert "\n" not in str(error.value)


def test_the_user_can_allow_other_places(places):
    data, other = places
    files = NamedFiles(data, [other, "https://videos.example/talks/", "http://10.0.0.1:80"])
    for name in (f"{other}/a.mp4", "../other/a.mp4", "outside.mp4", "folder/a.mp4"):
        assert Path(files.locate(name)).resolve() == other / "a.mp4"
    (other / "link.mp4").symlink_to(data / "videos" / "a.mp4")
    (other / "linked").symlink_to(data / "videos")
    for name, path in (("../../other/link.mp4", "link.mp4"), (f"{other}/linked/a.mp4", "linked/a.mp4")):
        assert NamedFiles(data / "none", [other]).locate(name) == str(other / path)
    # The link is not followed before "..", so this is no file of a third folder.
    assert files.locate(f"{other}/linked/../a.mp4") == str(other / "a.mp4")
    for url in (
        "https://videos.example/talks/a.mp4?x=1",
        "HTTPS://videos.example/talks/b/a.mp4",
        "http://10.0.0.1:80/a",
    ):
        assert files.locate(url) == url
    for url in (
        "https://videos.example/talksmore/a.mp4",
        "https://videos.example/talks/../a.mp4",
        "https://videos.example/talks/%2e%2e/a.mp4",
        "https://videos.example@evil.example/talks/a.mp4",
        "https://videos.example.evil/talks/a.mp4",
        "http://videos.example/talks/a.mp4",
        "http://10.0.0.1:81/a",
        "https://videos.example/talks/a.zip::file:///etc/passwd",
    ):
        with pytest.raises(ValueError, match="is outside the data set"):
            files.locate(url)


def test_a_data_set_of_the_hub_names_its_own_files():
    files = NamedFiles("somebody/talks")
    for name in ("videos/a.mp4", "hf://datasets/somebody/talks@main/a.mp4", "hf://datasets/somebody/talks/a.mp4"):
        assert files.locate(name) == name
    for name in (
        "../other/a.mp4",
        "videos/../../a.mp4",
        "/etc/passwd",
        "~/a.mp4",
        "..\\a.mp4",
        "hf://datasets/somebody/talks2/a.mp4",
        "hf://datasets/somebody/talks@main/../../other/a.mp4",
        "hf://datasets/somebody/other@main/a.mp4",
        "hf://datasets/somebody/talks@main/a.zip::file:///etc/passwd",
        "https://huggingface.co/datasets/somebody/talks/resolve/main/a.mp4",
    ):
        with pytest.raises(ValueError, match="is outside the data set 'somebody/talks'"):
            files.locate(name)


def test_links_into_the_contents_of_the_hubs_cache(tmp_path, clip):
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "12ab", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(clip, blobs / "34cd")
    (snapshot / "a.mp4").symlink_to("../../blobs/34cd")
    assert NamedFiles(snapshot).locate("a.mp4") == str(snapshot / "a.mp4")
    # A link in place of the contents does not open another folder.
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is outside the data set"):
        NamedFiles(snapshot).locate("a.mp4")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream"])
def test_rows_of_timed_messages_stay_in_their_folder(places, kind):
    data, other = places
    rows = [{"video": name, "messages": FINE} for name in ("inside.mp4", "../other/a.mp4", "outside.mp4")]
    if kind == "jsonl":
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(data / "train.parquet")

    def load(**options):
        if kind != "stream":
            return load_timed_messages(data, **options)
        return list(stream_timed_messages(data, **options))

    rows = load()
    faults = [str(fault) for fault in find_faults(rows)]
    assert len(faults) == 2 and all(f"video_root {other}" in fault and "\n" not in fault for fault in faults)
    assert "'../other/a.mp4' is outside" in faults[0] and "'outside.mp4' is outside" in faults[1]
    for index in (1, 2):
        with pytest.raises(FaultyRowError, match=r"a\.mp4' is outside the data set .*--video_root |'outside\.mp4' is"):
            StreamCollator(tiny_processor())([rows[index]])
    loaded = load(video_root=[other])
    assert not list(find_faults(loaded)) and [Path(row["video"]).name for row in loaded] == [
        "inside.mp4",
        "a.mp4",
        "outside.mp4",
    ]


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:{port}/a.mp4", "rtsp://127.0.0.1:{port}/a", "tcp://127.0.0.1:{port}"]
)
def test_a_row_opens_no_connection(tmp_path, name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        name = name.format(port=server.getsockname()[1])
        (tmp_path / "train.jsonl").write_text(json.dumps({"video": name, "messages": FINE}))
        [fault] = find_faults(load_timed_messages(tmp_path))
        assert f"'{name}' is outside the data set" in str(fault)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_playlist_is_no_video_of_a_row(places):
    data, other = places
    (data / "list.mp4").write_text("ffconcat version 1.0\nfile videos/a.mp4\n")
    (data / "train.jsonl").write_text(json.dumps({"video": "list.mp4", "messages": FINE}))
    [fault] = find_faults(load_timed_messages(data))
    assert "list.mp4' cannot be read as video" in str(fault)


# -------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize(
    "subset",
    [
        "data_files: /etc/passwd",
        "data_files: {other}/secret.jsonl",
        "data_files: ../other/secret.jsonl",
        "data_files: http://127.0.0.1:{port}/secret.jsonl",
        "data_files: hf://datasets/somebody/other/secret.jsonl",
        "data_files: zip://*.jsonl::{other}/secret.zip",
        "data_files: [{{split: train, path: [a.jsonl, {other}/secret.jsonl]}}]",
        "data_dir: ../other",
        "data_files: link.jsonl",
    ],
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_chooses_files_of_its_data_set(places, name, subset):
    data, other = places
    (data / "a.jsonl").write_text('{"video": "a.mp4"}\n')
    (other / "secret.jsonl").write_text('{"video": "secret"}\n')
    (data / "link.jsonl").symlink_to(other / "secret.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        subset = subset.format(other=other, port=server.getsockname()[1])
        text = f"configs:\n- config_name: default\n  {subset}\n"
        (data / name).write_text(f"---\n{text}---\n" if name == "README.md" else text)
        with pytest.raises(ValueError, match="is outside the data set"):
            load_builder(str(data), NamedFiles(data))
        with pytest.raises(BlockingIOError):
            server.accept()
    if "/other/secret.jsonl" in subset and "hf:" not in subset and "[" not in subset:
        builder = load_builder(str(data), NamedFiles(data, [other]))
        assert next(iter(builder.as_streaming_dataset("train"))) == {"video": "secret"}


# A list of the list before, twice: texts would be 2 ** 59 if each were read where it stands.
BOMB = "".join(f", &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_files: &a [*a, /etc/passwd]", "'/etc/passwd' is outside"),
        (f"data_files: [&a0 [/etc/passwd]{BOMB}]", "'/etc/passwd' is outside"),
        ("data_files: !!python/object/apply:os.system ['touch made']", "is not a card in YAML: could not determine"),
        ("data_files: " + "[" * 3000, "is not a card in YAML"),
        ("data_files: [", "is not a card in YAML"),
    ],
)
def test_a_card_that_is_no_plain_yaml(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {text}\n---\n")
    with pytest.raises(ValueError, match=message) as error:
        load_builder(str(tmp_path), NamedFiles(tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


def test_a_card_of_the_data_set_itself(places):
    data, _ = places
    (data / "rows.jsonl").write_text('{"video": "videos/a.mp4"}\n')
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    [row] = DataSet(str(data), None, None).rows()
    assert row.address == str(data / "videos" / "a.mp4") and not row.fault


def test_a_data_set_on_the_hub(tmp_path):
    with Hub() as hub, hub.used_here(tmp_path / "home"):
        names = ["../other/a.mp4", "/etc/hosts", "hf://datasets/somebody/other@main/a.mp4", f"{hub.endpoint}/a.mp4"]
        rows = "".join(json.dumps({"video": name, "messages": FINE}) + "\n" for name in names).encode()
        card = b"---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"
        hub.repos["datasets/somebody/card"] = [{"README.md": card, "train.jsonl": rows}]
        hub.repos["datasets/somebody/rows"] = [{"train.jsonl": rows}]
        hub.repos["datasets/somebody/other"] = [{"a.mp4": b"secret"}]
        for load in (load_timed_messages, stream_timed_messages, lambda source: DataSet(f"{HUB}{source}", None, None)):
            with pytest.raises(ValueError, match="'/etc/passwd' is outside the data set 'somebody/card'"):
                load("somebody/card")
        faults = list(map(str, find_faults(load_timed_messages("somebody/rows"))))
        assert [fault.split(" is outside")[0].split(": ")[-1] for fault in faults] == [repr(name) for name in names]
        *refused, private = DataSet(f"{HUB}somebody/rows", None, None).rows()
        assert all(row.fault and not row.address for row in refused) and len(refused) == 3
        with pytest.raises(ValueError, match="is at a private address"), fetched(private):
            pass
        assert not any("a.mp4" in request or "other" in request for request in hub.requests)


# ------------------------------------------------------------------------------------------------------------ narrate


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a video")

    def log_message(self, *_):
        pass


def test_the_password_of_a_row_is_in_no_name_and_no_message(tmp_path):
    rows = (
        ("bob:SECRET@127.0.0.1:9/a.mp4", r"127\.0\.0\.1:9/a\.mp4", "password"),
        ("127.0.0.1:9/a.mp4?key=SECRET", r"127\.0\.0\.1:9/a-[0-9a-f]{8}\.mp4", "private"),
    )
    for url, name, wrong in rows:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"video": f"http://{url}"}))
        [row] = DataSet(str(tmp_path), None, None).rows()
        assert re.fullmatch(name, row.name)
        with pytest.raises(ValueError, match=wrong) as caught, fetched(row):
            pass
        assert "SECRET" not in str(caught.value)


def test_a_row_of_narrate_asks_no_private_server(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "rows.jsonl").write_text(json.dumps({"video": f"{url}/a.mp4"}))
        [row] = DataSet(str(tmp_path), None, None).rows()
        with pytest.raises(ValueError, match=f"is at a private address.* add --video-root {url}/"), fetched(row):
            pass
        assert not server.asked
        [row] = DataSet(str(tmp_path), None, None, video_root=[url]).rows()
        with fetched(row) as path:
            assert path.read_bytes() == b"a video"
        assert server.asked == ["/a.mp4"]
        server.shutdown()


@pytest.mark.parametrize(
    "name", ["../other/a.mp4", "outside.mp4", "folder/a.mp4", "/etc/passwd", "hf://datasets/a/b/c.mp4"]
)
def test_rows_of_narrate_stay_in_their_folder(places, name):
    data, other = places
    (data / "rows.jsonl").write_text(json.dumps({"video": name}))
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.jsonl\n---\n")
    [row] = DataSet(str(data), None, None).rows()
    with pytest.raises(ValueError, match="is outside the data set .*video-root"), fetched(row):
        pass
    if name.endswith("a.mp4"):
        [row] = DataSet(str(data), None, None, video_root=[str(other)]).rows()
        # Subtitles stay in the folder for them.
        assert ".." not in Path(row.name).parts and not Path(row.name).is_absolute()
        with fetched(row) as path:
            assert path.resolve() == other / "a.mp4"


def test_a_copy_of_a_row_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("videollm_mod.commands.data_set._MOST_BYTES", 5)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "rows.jsonl").write_text(json.dumps({"video": f"{url}/a.mp4"}))
        [row] = DataSet(str(tmp_path), None, None, video_root=[url]).rows()
        with pytest.raises(ValueError, match="more than 5 bytes"), fetched(row):
            pass
        server.shutdown()
