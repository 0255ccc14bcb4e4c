# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The command `videollm-mod convert`: what it prints, and which options go together."""

import json
import sys
from pathlib import Path

import pytest
from published import save_source

from videollm_mod.convert import new_folder
from videollm_mod.convert.command import main


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["videollm-mod convert", *map(str, arguments)])
        main()
        return capsys.readouterr()

    return run


def test_a_model_is_converted_and_the_next_command_is_printed(tmp_path, run):
    save_source("llava_next_video", tmp_path / "theirs")
    options = ["--mod_layers", "1", "--mod_keep_ratio", "0.5", "--frame_token_pooled", "2", "2"]
    options += ["--mod_router", "change"]
    shown = run(tmp_path / "theirs", tmp_path / "ours", *options)
    lines = shown.out.splitlines()
    assert lines[0] == "not converted: model.image_newline, tiling of pictures"
    assert lines[1].startswith(f"wrote {tmp_path / 'ours'}. The model has not learned when to speak")
    assert lines[2] == f"videollm-mod narrate video.mp4 --model {tmp_path / 'ours'} --every 2"
    assert shown.err.endswith(f"loading {tmp_path / 'theirs'} ...\n")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["mod_layers"], config["mod_router"]) == ([1], "change")
    told = json.loads(run(tmp_path / "theirs", tmp_path / "again", "--json").out)
    assert told == {
        "folder": str(tmp_path / "again"),
        "not_converted": ["model.image_newline", "tiling of pictures"],
    }


def test_full_compute_needs_no_training_packages(tmp_path, run, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "trl", "datasets", "evaluate", "pysubs2"):
        monkeypatch.setitem(sys.modules, name, None)
    save_source("smolvlm", tmp_path / "theirs")
    lines = run(tmp_path / "theirs", tmp_path / "two words").out.splitlines()
    assert lines[-1] == f"videollm-mod narrate video.mp4 --model '{tmp_path / 'two words'}' --every 2"
    assert not (tmp_path / "two words" / "routing.png").exists()
    assert "--model 'two words' --every 2\n" in (tmp_path / "two words" / "README.md").read_text()


def test_the_working_directory_is_filled_and_named(tmp_path, run, monkeypatch):
    save_source("llava_next_video", tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    shown = run(tmp_path / "theirs", ".").out.splitlines()
    assert shown[-1] == f"videollm-mod narrate video.mp4 --model {tmp_path / 'ours'} --every 2"
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "videollm_mod"
    assert "--model ours --every 2\n" in (tmp_path / "ours" / "README.md").read_text()
    assert not list(tmp_path.glob("ours/.*")) and Path.cwd() == tmp_path / "ours"


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_link_to_a_folder_stays_and_the_folder_is_filled(tmp_path, has_folder):
    """As with a mount point, the folder itself is never removed."""
    disk, link = tmp_path / "disk" / "models", tmp_path / "out"
    link.symlink_to(disk)
    if has_folder:
        disk.mkdir(parents=True)
        number = disk.stat().st_ino
        with pytest.raises(ZeroDivisionError), new_folder(link) as folder:
            folder.mkdir()
            raise ZeroDivisionError
        assert not list(disk.iterdir())
    with new_folder(link) as folder:
        (folder / "adapter").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert link.is_symlink() and sorted(path.name for path in disk.iterdir()) == ["adapter", "config.json"]
    assert not has_folder or disk.stat().st_ino == number
    with pytest.raises(FileExistsError, match="out' is not empty"), new_folder(link):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_a_folder_that_cannot_be_written_is_named():
    message = (
        "^'/proc/out' cannot be written: No such file or directory. Allow writing there or choose another folder.$"
    )
    with pytest.raises(FileNotFoundError, match=message), new_folder(Path("/proc/out")):
        raise AssertionError("it is found before the work")


def test_a_file_in_the_place_of_the_new_folder_is_named(tmp_path, run, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for out in (file, file / "ours", file / "deep" / "ours"):
        with pytest.raises(SystemExit, match="1"):
            run("samples", out)
        assert f"error: '{file}' is a file. Choose another folder.\n" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "give MODEL and OUT, or BASE, ADAPTER and OUT"),
        (["model", "out", "--keep-adapter"], "--keep-adapter is for BASE ADAPTER OUT"),
        (["base", "adapter", "out", "--frame_token_pooled", "2", "2"], "--frame-token-pooled is for MODEL OUT"),
    ],
)
def test_options_of_the_other_form_are_refused(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as failed:
        run(*arguments)
    assert failed.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_named(run, capsys):
    with pytest.raises(SystemExit, match="1"):
        run("sampels", "out")
    assert "error: There is no folder 'sampels'; did you mean 'samples'?" in capsys.readouterr().err
