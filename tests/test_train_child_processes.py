# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Child processes: results and errors come back, and a crash ends one call only."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import random_frames, write_clip

from videollm_mod.train.data import converters, timed_messages
from videollm_mod.train.data.child_processes import ChildProcesses, CrashError
from videollm_mod.train.data.converters import Notes, Videos
from videollm_mod.train.data.timed_messages import find_faults


def crash(number):
    os.kill(os.getpid(), number)


@pytest.fixture
def sample_rows(tmp_path):
    """Three rows with a video each."""
    names = ["one.mp4", "bad.mp4", "two.mp4"]
    for name in names:
        write_clip(tmp_path / name, random_frames(10))
    messages = [{"role": "assistant", "content": "Hi.", "time": 0.5}]
    return [{"video": str(tmp_path / name), "messages": messages} for name in names]


def test_results_and_errors_come_back_from_another_process():
    with ChildProcesses() as children:
        there = children.call(os.getpid)
        assert there != os.getpid() and children.call(os.getpid) == there
        with pytest.raises(ZeroDivisionError):
            children.call(divmod, 1, 0)
        assert children.call(divmod, 7, 2) == (3, 1)


def test_a_crash_ends_one_call():
    with ChildProcesses() as children, ThreadPoolExecutor(3) as pool:
        calls = [(crash, signal.SIGKILL), (divmod, 7, 2), (crash, signal.SIGTERM), (os._exit, 3), (divmod, 9, 2)]
        done = [pool.submit(children.call, *call) for call in calls]
        errors = [str(call.exception()) for call in done if isinstance(call.exception(), CrashError)]
        assert errors == ["killed by SIGKILL", "killed by SIGTERM", "exit status 3"]
        assert [done[1].result(), done[4].result()] == [(3, 1), (4, 1)]


def test_a_crash_is_named_while_another_thread_looks_at_all_processes():
    """Only one of the threads gets the exit status from the system."""
    is_over = threading.Event()

    def look():
        while not is_over.is_set():
            multiprocessing.active_children()

    with ChildProcesses() as children, ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        try:
            for _ in range(40):
                with pytest.raises(CrashError, match="killed by SIGKILL"):
                    children.call(crash, signal.SIGKILL)
        finally:
            is_over.set()
    assert [look.result() for look in looking] == [None, None]


@pytest.mark.parametrize("full", [False, True])
def test_a_video_that_crashes_its_reader_is_a_fault_of_its_row(sample_rows, monkeypatch, full):
    """No known file crashes FFmpeg, so the function that reads it crashes at one name."""
    read = timed_messages.read_video

    def read_video(source, **options):
        if source.source.endswith("bad.mp4"):
            crash(signal.SIGKILL)
        return read(source, **options)

    monkeypatch.setattr(timed_messages, "read_video", read_video)
    [fault] = find_faults(sample_rows, full=full)
    assert fault.row == 1 and "bad.mp4' crashes the program that reads it (killed by SIGKILL)" in str(fault)


@pytest.mark.usefixtures("sample_rows")
def test_a_video_that_crashes_its_reader_is_left_out(tmp_path, monkeypatch):
    """It is opened once, however many queries are about it."""
    opened, calls, notes = converters.open_video, tmp_path / "calls", Notes()

    def open_video(path):
        with calls.open("a") as file:
            file.write(f"{path.name} ")
        if path.name == "bad.mp4":
            crash(signal.SIGKILL)
        return opened(path)

    monkeypatch.setattr(converters, "open_video", open_video)
    videos = Videos(tmp_path)
    with videos.remembering(tmp_path / "lengths.json"):
        found = [videos.open(notes, "row", "video", name) for name in ("bad", "one", "bad", "one")]
    assert [video is not None for video in found] == [False, True, False, True]
    assert notes.left_out[""]["the video crashes the program that reads it"].count == 2
    assert calls.read_text().split() == ["bad.mp4", "one.mp4"]
