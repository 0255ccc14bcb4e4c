# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Programs that are killed, and disks that are full: what was there before stays, and nothing half-written is read.

`benchmarks/killed.py` kills whole commands at random times. Here a child process ends wherever a writer changes files.
"""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from killing import contents, killed_at_each_change, small_disk
from programs import run_main
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from videollm_mod.convert import new_folder
from videollm_mod.outputs import FullDiskError, append_line, complete_lines, copy_file, replacing, write_text
from videollm_mod.serving import saved_files
from videollm_mod.serving.state_folder import StateFolder
from videollm_mod.train.checkpoint_files import WholeCheckpoints, new_checkpoint
from videollm_mod.train.data import streamworld
from videollm_mod.train.data.faults import naming
from videollm_mod.train.data.json_rows import LineWriter
from videollm_mod.train.data.shards import describing, write_shards
from videollm_mod.train.data.timed_messages import load_timed_messages
from videollm_mod.train.data.world.drawing import write_pictures
from videollm_mod.train.data.world.files import write_once


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


def test_a_folder_that_was_there_has_a_configuration_when_it_is_complete(tmp_path):
    """A mount point cannot be replaced by another folder."""

    def convert():
        with new_folder(tmp_path / "out") as folder:
            folder.mkdir()
            for name in ("config.json", "a", "z"):
                (folder / name).write_text(name)

    (tmp_path / "out").mkdir()
    for _ in killed_at_each_change(convert, tmp_path):
        if (tmp_path / "out" / "config.json").exists():
            assert {"a", "z"} <= {path.name for path in (tmp_path / "out").iterdir()}
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()


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


# ---------------------------------------------------------------------------------------------------------- full disks


def save_weights(folder, value):
    with new_checkpoint(folder) as place:
        (place / "config.json").write_text(str(value))
        save_file({"weight": torch.full((9999,), float(value))}, place / "model.safetensors")


def save_state(folder, value):
    """Save as torch does, which does not say why it fails."""
    with new_checkpoint(folder) as place:
        (place / "config.json").write_text(str(value))
        torch.save(torch.full((9999,), float(value)), place / "state.pt")


def convert_to(folder):
    with new_folder(folder) as place:
        place.mkdir()
        save_file({"weight": torch.zeros(9999)}, place / "model.safetensors")


def save_session(folder, value):
    model = torch.nn.Linear(1, 1)
    model.config = type("Config", (), {"to_json_string": lambda _: "{}"})()
    saved_files.write(saved_files.pack({"value": torch.full((9999,), value)}), model, folder)


def film(path):
    pictures = torch.randint(0, 255, (20, 64, 64, 3), dtype=torch.uint8).numpy()
    write_once(path, lambda part: write_pictures(pictures, part, size=64, fps=20, seed=0))


def write_many(folder, source):
    write_shards((row(index, source) for index in range(40)), folder, "train")


FULL = {
    "text": (lambda at: write_text(at / "out.txt", "old"), lambda at: write_text(at / "out.txt", "new" * 9999)),
    "copy": (lambda _: None, lambda at: copy_file(Path(torch.__file__), at / "copy.py")),
    "rows": (lambda at: write_rows(at, "a", 2), lambda at: write_rows(at, "b", 40)),
    "shards": (lambda at: write_many(at, "a"), lambda at: write_many(at, "b" * 9999)),
    "weights": (lambda at: save_weights(at, 1), lambda at: save_weights(at, 2)),
    "state": (lambda at: save_state(at, 1), lambda at: save_state(at, 2)),
    "convert": (lambda _: None, lambda at: convert_to(at / "model")),
    "session": (lambda at: save_session(at / "session", 1), lambda at: save_session(at / "session", 2)),
    "video": (lambda _: None, lambda at: film(at / "video.mp4")),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path, kind):
    before, now = FULL[kind]
    folder = tmp_path / "folder"
    folder.mkdir()
    before(folder)
    files = contents(folder)
    # A row is not to blame for the disk.
    with pytest.raises(FullDiskError) as error, small_disk(9000), naming({"video": "v.mp4"}):
        now(folder)
    message = str(error.value)
    assert message.startswith(f"'{folder}") and "\n" not in message
    assert "cannot be written: File too large. Free" in message or "the disk may be full. Free" in message
    assert contents(folder) == files and not [path.name for path in folder.rglob(".*")]
    now(folder)
    assert contents(folder) != files


def test_a_line_that_does_not_fit_is_not_read(tmp_path):
    append_line(tmp_path / "lines.jsonl", '{"a": 1}')
    with pytest.raises(FullDiskError, match="lines.jsonl' cannot be written"), small_disk(20):
        append_line(tmp_path / "lines.jsonl", '{"a": "%s"}' % ("b" * 99))
    append_line(tmp_path / "lines.jsonl", '{"a": 3}')
    assert list(complete_lines(tmp_path / "lines.jsonl")) == [{"a": 1}, {"a": 3}]


def test_a_command_on_a_full_disk_ends_in_one_line(tmp_path):
    with small_disk(4000):
        done = run_main(streamworld.main, tmp_path, "--num_clips", 1, "--world", "tiny", "--size", 64)
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert told.startswith(f"error: '{tmp_path}/videos/train-000000.mp4' cannot be written: File too large. Free some")
    assert list(contents(tmp_path)) == ["videos/.train.json"], "the options of videos to come"


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(9999))

    def forward(self, x):
        return {"loss": (self.weight * x).sum()}


class StoppedError(Exception):
    """Stands for the end of a program in the middle of a checkpoint."""


def test_a_checkpoint_of_training_is_not_mixed_with_an_earlier_one(tmp_path):
    """A run without `--resume_from_checkpoint` writes over the checkpoints of an earlier one."""

    class Small(WholeCheckpoints, Trainer):
        stops = False

        def _save_optimizer_and_scheduler(self, output_dir):
            if self.stops:
                raise StoppedError
            super()._save_optimizer_and_scheduler(output_dir)

    def train(stops=False):
        options = {"save_strategy": "steps", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, save_steps=1, **options)
        trainer = Small(model=Weight(), args=arguments, train_dataset=[{"x": torch.ones(1)}])
        trainer.stops = stops
        trainer.train()

    train()
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    assert state.exists()
    with pytest.raises(StoppedError):
        train(stops=True)
    assert not state.exists(), "the checkpoint is half the earlier one"
    train()
    with pytest.raises(FullDiskError, match="checkpoint-1' cannot be written: .* Free some space"), small_disk(9000):
        train()
    assert not state.exists()


# -------------------------------------------------------------------------------------------------------- all writers

# Functions that write without the contexts below, and why nothing half-written is read.
ALONE = {
    "outputs.py": "the shared writers themselves",
    "benchmarks/gpu.py run_tests": "a log for people, which shows how far the tests came when they were stopped",
    "benchmarks/killed.py": "input of its own runs, in a temporary folder",
    "benchmarks/memory.py": "a file of the kernel",
    "benchmarks/mutants.py": "source text of its own runs, and lines that are added",
    "benchmarks/untrained_routing.py": "a temporary folder",
    "commands/clips.py ClipCutter._write": "gets the part of a file from `cut`",
    "modeling_videollm_mod.py VideoLLMMoDPreTrainedModel.save_pretrained": "as in Transformers; see `new_checkpoint`",
    "serving/presence.py": "an empty file",
    "serving/saved_files.py rename_over": "renames a complete folder",
    "serving/saved_sessions.py": "into a folder that `StateFolder.commit` renames",
    "serving/speech_endpoints.py _wav": "memory",
    "serving/state_folder.py": "a folder is renamed when it is complete, and each file has its digest",
    "space/app.py App.export": "a temporary file of the page",
    "space/video_writing.py _start": "gets the part of a file; a published Space has only its own folder",
    "train/checkpoint_files.py new_checkpoint": "renames complete files, the configuration last",
    "train/data/doom/game.py _launcher": "a temporary folder",
    "train/data/faults.py": "a temporary folder",
    "train/data/json_rows.py LineWriter": "tested above",
    "train/data/shards.py ShardWriter": "tested above",
    "train/data/world/drawing.py open_video": "gets the part of a file from `write_once`",
    "train/push.py _card_for": "a temporary folder",
    "video_opening_videollm_mod.py _standard_input": "a temporary file",
}
CONTEXTS = {"replacing", "new_checkpoint", "new_folder", "TemporaryDirectory", "temporary_folder"}
CALLS = {"write_bytes", "savefig", "save_pretrained", "save_file", "copy2", "copyfile", "copytree", "copyfileobj"}
CALLS |= {"rename", "write_table", "ParquetWriter", "savez", "savetxt"}


def is_writing(call):
    """Return whether a call writes a file, or gives one its name."""
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if of else getattr(call.func, "id", "")
    module = getattr(of, "id", None)
    texts = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
    match name:
        case "open":
            return any(isinstance(x, str) and x and set(x) <= set("rwaxbt+") and set(x) & set("wax+") for x in texts)
        case "replace":  # text is replaced by another: two arguments
            return module == "os" or (len(call.args) == 1 and not call.keywords)
        case "write_text":
            return of is not None
        case "copy" | "move":
            return module == "shutil"
        case "dump" | "save":
            return module in ("json", "yaml", "torch", "np")
    return name in CALLS


def find_writers(node, where="", is_safe=False):
    """Yield the functions that write outside of the contexts that make a file complete."""
    for child in ast.iter_child_nodes(node):
        inner, safe = where, is_safe
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{where}.{child.name}".lstrip(".")
        if isinstance(child, ast.With):
            calls = [call for item in child.items for call in ast.walk(item) if isinstance(call, ast.Call)]
            safe |= any(ast.unparse(call.func).split(".")[-1] in CONTEXTS for call in calls)
        if isinstance(child, ast.Call) and not safe and is_writing(child):
            yield where
        yield from find_writers(child, inner, safe)


def test_all_results_are_written_by_writers_that_survive_a_kill():
    root, found = Path(__file__).parents[1], set()
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not name.startswith(("tests/", "docs/", "build/", "outputs/", ".")):
            for where in find_writers(ast.parse(path.read_text(encoding="utf-8"))):
                known = [key for key in ALONE if f"{name} {where}".startswith(key)]
                found.update(known or [f"{name} {where}"])
    assert found == set(ALONE), "a new writer: use those of outputs.py, or add the reason here"
