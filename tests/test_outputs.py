# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Output files: faults are found before any work, and files are replaced only when the new ones are complete."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from videollm_mod.outputs import check_outputs, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_that_can_be_written_stay_as_they_are(tmp_path):
    old, new, link = tmp_path / "old.srt", tmp_path / "new.vtt", tmp_path / "link.srt"
    old.write_text("OLD")
    link.symlink_to("to_come.srt")
    before = old.stat().st_mtime_ns
    check_outputs({"--srt": old, "--vtt": new, "--jsonl": link}, tmp_path / "video.mp4", "rtsp://camera/1")
    assert names(tmp_path) == ["link.srt", "old.srt"] and old.read_text() == "OLD"
    assert old.stat().st_mtime_ns == before and link.is_symlink()


def test_what_cannot_be_written_is_named(tmp_path):
    file, loop = tmp_path / "file", tmp_path / "loop"
    file.write_text("OLD")
    loop.symlink_to("loop")
    for path, message in (
        (tmp_path / "no" / "out.srt", f"There is no folder '{tmp_path}/no' to write 'out.srt' to."),
        (file / "out.srt", f"There is no folder '{file}' to write 'out.srt' to."),
        (tmp_path, f"'{tmp_path}' is a folder: name a file in it."),
        (tmp_path / ("x" * 300), "--srt cannot write .*: File name too long."),
        (loop, "--srt cannot write .*: Symlink loop from"),
        (Path("/proc/out.srt"), "--srt cannot write '/proc/out.srt': "),
    ):
        with pytest.raises(ValueError, match=message):
            check_outputs({"--srt": path})
    advice = "Allow writing there or choose another folder."
    with pytest.raises(
        FileNotFoundError, match=f"^'/proc/out.srt' cannot be written: No such file or directory. {advice}$"
    ):
        write_text("/proc/out.srt", "NEW")
    assert names(tmp_path) == ["file", "loop"] and file.read_text() == "OLD"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_files_and_folders_without_permission_are_named(tmp_path):
    (tmp_path / "out.srt").write_text("OLD")
    (tmp_path / "out.srt").chmod(0o444)
    with pytest.raises(ValueError, match="Permission denied"):
        check_outputs({"--srt": tmp_path / "out.srt"})


def test_one_file_may_not_be_named_twice(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.srt").write_text("OLD")
    (tmp_path / "link.srt").symlink_to("old.srt")
    os.link(tmp_path / "old.srt", tmp_path / "hard.srt")
    monkeypatch.chdir(tmp_path)
    for first, second in (
        ("x.srt", "x.srt"),
        ("x.srt", f"{tmp_path}/folder/../x.srt"),
        ("old.srt", "link.srt"),
        ("old.srt", "hard.srt"),
    ):
        outputs = {"--srt": tmp_path / first, "--vtt": Path(second)}
        with pytest.raises(ValueError, match="^--srt and --vtt both name '.*': write to two files.$"):
            check_outputs(outputs)
        with pytest.raises(ValueError, match="is an input: write to another file"):
            check_outputs({"--srt": tmp_path / first}, second)


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path, link = tmp_path / "out.srt", tmp_path / "link.srt"
    write_text(path, "Où?\n")
    assert path.read_text(encoding="utf-8") == "Où?\n"
    path.chmod(0o640)
    link.symlink_to("out.srt")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800" * 10_000)
    assert path.read_text(encoding="utf-8") == "Où?\n" and names(tmp_path) == ["link.srt", "out.srt"]
    write_text(link, "New.\n")
    assert path.read_text() == "New.\n" and link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("/dev/full"), "x")


def test_threads_write_to_one_folder_at_once(tmp_path, monkeypatch):
    both = threading.Barrier(2)

    def sync(descriptor, sync=os.fsync):
        both.wait(timeout=60)  # both files are half written now
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(write_text, tmp_path / name, name) for name in ("a.srt", "b.srt")]
        assert [each.result() for each in done] == [None, None]
    assert names(tmp_path) == ["a.srt", "b.srt"] and (tmp_path / "b.srt").read_text() == "b.srt"
