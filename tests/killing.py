# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Kill a function wherever it changes files, in a copy of this process, and see what it leaves on the disk."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Python reports them before it does them.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.utime", "os.link"}


def killed_at_each_change(action: Callable[[], Any], folder: Path) -> Iterator[int]:
    """
    Run an action in a child process that ends at its first change of a file, then at its second, and so on. A file
    that is opened to be written counts twice: the child ends before, and after a few bytes. Nothing is flushed or
    cleaned up at its end, as after `kill -9`.

    Args:
        action (`Callable`): What to run. It must not depend on threads.
        folder (`Path`): Changes elsewhere do not count.

    Yields:
        `int`: The number of the change, after the child has ended. The iteration ends when the action does.
    """
    for last in range(1, 1000):
        child = os.fork()
        if child == 0:
            _run(action, str(folder), last)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        assert code == 9, f"the child ends with {code} before it is killed"
        yield last
    raise AssertionError("the action does not end")


def _run(action: Callable[[], Any], folder: str, last: int) -> None:
    left, is_over = last, False

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left, is_over
        is_writing = event == "open" and bool(given[2] & (os.O_WRONLY | os.O_RDWR))
        if is_over or not (is_writing or event in CHANGES) or not os.fsdecode(given[0]).startswith(folder):
            return
        left -= 1
        if left == 0:
            os._exit(9)
        left -= is_writing
        if is_writing and left == 0:
            is_over = True
            os.write(os.open(given[0], given[2], 0o600), b"half")
            os._exit(9)

    code = 1
    try:
        sys.addaudithook(count)
        action()
        code = 0
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by their names, without those of which only part was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.endswith(".part")}


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file get more bytes than this. A disk without space fails in the same calls."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
