# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Programs that are killed, and disks that are full: what was there before stays, and nothing half-written is read.

`benchmarks/killed.py` kills whole commands at random times. Here a child process ends wherever a writer changes files.
"""

import json
import os
import shutil

import pytest
import torch
from killing import contents, killed_at_each_change
from safetensors.torch import load_file, save_file

from videollm_mod.convert import new_folder
from videollm_mod.outputs import append_line, complete_lines, copy_file, replacing, write_text
from videollm_mod.serving import saved_files
from videollm_mod.serving.state_folder import StateFolder
from videollm_mod.train.checkpoint_files import new_checkpoint
from videollm_mod.train.data.json_rows import LineWriter
from videollm_mod.train.data.shards import describing, write_shards
from videollm_mod.train.data.timed_messages import load_timed_messages


def row(index, source="a"):
    return {
        "id": f"{source}{index}",
        "video": "v.mp4",
        "messages": [{"role": "user", "content": "?" * 999, "time": 0.0}],
    }


def write_rows(folder, source, count):
    with LineWriter(folder / "train.jsonl") as file:
        for index in range(count):
            file.write(row(index, source))


WRITERS = {
    "text": lambda folder, words: write_text(folder / "out.txt", words * 3000),
    "link": lambda folder, words: write_text(folder / "link.txt", words * 3000),
    "copy": lambda folder, words: copy_file(folder.parent / f"{words}.txt", folder / "out.txt"),
    "rows": lambda folder, words: write_rows(folder, words * 3000, 2),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, kind):
    folder, write, seen = tmp_path / "folder", WRITERS[kind], set()
    for words in ("old", "new"):
        (tmp_path / f"{words}.txt").write_text(words * 5000)
    folder.mkdir()
    (folder / "link.txt").symlink_to("target.txt")
    write(folder, "old")
    old = contents(folder)
    shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    write(tmp_path / "whole", "new")
    new = contents(tmp_path / "whole")
    for _ in killed_at_each_change(lambda: write(folder, "new"), folder):
        found = contents(folder)
        assert found in (old, new)
        seen.add(found == new)
        write(folder, "new")
        assert contents(folder) == new, "a second run gives the same"
        write(folder, "old")
    assert False in seen and old != new


def test_a_part_of_a_line_gets_its_own_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, '{"a": 1}')
    with open(path, "ab") as file:
        file.write(b'{"a": 2, "b')
    assert list(complete_lines(path)) == [{"a": 1}]
    append_line(path, '{"a": 3}')
    assert list(complete_lines(path)) == [{"a": 1}, {"a": 3}]
    for _ in killed_at_each_change(lambda: append_line(path, '{"a": 4}'), tmp_path):
        assert all(line in ({"a": 1}, {"a": 3}, {"a": 4}) for line in complete_lines(path))


def test_a_split_of_several_files_is_old_or_new_or_refused(tmp_path):
    """Parquet files get their names one after the other."""
    files = {"a": 2, "b": 3}

    def write(source):
        write_shards((row(index, source) for index in range(files[source])), tmp_path, "train", max_shard_size="1KB")

    write("a")
    assert len(list(tmp_path.glob("train-*.parquet"))) == 2
    seen = set()
    for _ in killed_at_each_change(lambda: write("b"), tmp_path):
        try:
            rows = load_timed_messages(tmp_path)
            assert (kept := [each["id"] for each in rows]) in (["a0", "a1"], ["b0", "b1", "b2"])
            seen.add(kept[0])
        except (ValueError, FileNotFoundError) as error:
            assert "write or copy it again" in str(error) or "has no" in str(error)
            seen.add(str(error).split(" Parquet")[0][-8:])
        write("a")
    assert {"a0", "b0", "s 1 of 3", "s 2 of 3"} <= seen
    assert not list(tmp_path.glob(".*"))


def test_rows_never_lie_beside_the_licence_of_others(tmp_path):
    """A folder with data that may be published gets data that may not."""
    sources = {name: tmp_path / name for name in ("open", "closed")}
    for name, source in sources.items():
        source.mkdir()
        (source / "about.json").write_text(json.dumps({"may_be_shared": name == "open"}))
    out, seen = tmp_path / "out", set()
    out.mkdir()

    def write(name):
        with describing(sources[name], out):
            write_rows(out, name, 1)

    write("open")
    for _ in killed_at_each_change(lambda: write("closed"), out):
        (kept,) = map(json.loads, (out / "train.jsonl").read_text().splitlines())
        about = json.loads((out / "about.json").read_text()) if (out / "about.json").exists() else {}
        assert kept["id"] == "open0" or not about.get("may_be_shared")
        seen.add((kept["id"], *about.values()))
        write("open")
    assert {("open0", True), ("closed0",), ("closed0", False)} <= seen


def save_checkpoint(folder, value, weights="model.safetensors"):
    with new_checkpoint(folder) as place:
        for name in ("config.json", "tokenizer.json", "processor_config.json"):
            (place / name).write_text(json.dumps({"value": value}))
        save_file({"weight": torch.full((3,), float(value))}, place / weights)


def test_a_checkpoint_is_never_a_mix_of_two(tmp_path):
    folder = tmp_path / "out"
    save_checkpoint(folder, 1)
    (folder / "loss.png").write_bytes(b"stays")
    seen = set()
    for _ in killed_at_each_change(lambda: save_checkpoint(folder, 2), tmp_path):
        if (folder / "config.json").exists():
            values = {json.loads((folder / name).read_text())["value"] for name in ("config.json", "tokenizer.json")}
            values |= {load_file(folder / "model.safetensors")["weight"][0].item()}
            assert values in ({1}, {2})
            seen |= values
        if (folder / "processor_config.json").exists():
            assert (folder / "config.json").exists(), "the last file marks a complete checkpoint"
        save_checkpoint(folder, 1)
    assert seen == {1, 2} and (folder / "loss.png").read_bytes() == b"stays"
    # Weights with other names would be loaded in place of the new ones.
    save_checkpoint(folder, 3, "model-00001-of-00001.safetensors")
    assert [path.name for path in folder.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    with pytest.raises(ZeroDivisionError), new_checkpoint(folder) as place:
        (place / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert json.loads((folder / "config.json").read_text()) == {"value": 3} and not (folder / ".saving").exists()


def test_a_converted_folder_is_there_when_it_is_complete(tmp_path):
    def convert():
        with new_folder(tmp_path / "out") as folder:
            folder.mkdir()
            for name in "abc":
                (folder / name).write_text(name)

    for _ in killed_at_each_change(convert, tmp_path):
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") in ({}, {name: name.encode() for name in "abc"})
            shutil.rmtree(tmp_path / "out")
        convert()
        shutil.rmtree(tmp_path / "out")


def test_a_session_that_is_saved_again_is_there(tmp_path):
    """At every moment a server that takes over finds the session as it was before, or as it is now."""
    folder = StateFolder(tmp_path, 100_000)

    def keep(content):
        place = folder.begin()
        (place / "data").write_bytes(content)
        folder.commit(place, "secret", 2e9)

    seen = set()
    keep(b"old")
    for _ in killed_at_each_change(lambda: keep(b"new"), tmp_path):
        taken = folder.take("secret")
        seen.add((taken / "data").read_bytes())
        assert folder.take("secret") is None
        shutil.rmtree(taken)
        keep(b"old")
    assert seen == {b"old", b"new"}
    # Names of earlier versions have no time.
    keep(b"old")
    (kept,) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    kept.rename(tmp_path / kept.name.split(".")[0])
    assert (folder.peek("secret") / "data").read_bytes() == b"old"
    keep(b"new")
    assert (folder.take("secret") / "data").read_bytes() == b"new" and folder.take("secret") is None


def test_a_session_in_a_folder_is_there_when_it_is_saved_again(tmp_path):
    model = torch.nn.Linear(1, 1)
    model.config = type("Config", (), {"to_json_string": lambda _: "{}"})()
    folder = tmp_path / "session"

    def save(value):
        saved_files.write(saved_files.pack({"value": torch.tensor([value])}), model, folder)

    seen = set()
    save(1)
    for _ in killed_at_each_change(lambda: save(2), tmp_path):
        saved = saved_files.read(folder, model)
        seen.add(saved_files.unpack(saved, "value").item())
        for left in set(tmp_path.iterdir()) - {folder}:
            os.utime(left, (1.0, 1.0))
        save(1)
        assert [path.name for path in tmp_path.iterdir()] == ["session"], "nothing is left of the killed program"
    assert seen == {1, 2}


def test_replacing_leaves_no_part_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
