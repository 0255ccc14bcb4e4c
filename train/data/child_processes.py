# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Call functions in child processes: a spoilt video can crash the decoder, and with it the process that decodes."""

import multiprocessing
import signal
import threading
import time as clock
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any


class CrashError(Exception):
    """The child process died during a call. The message says how."""


class ChildProcesses:
    """
    One child process for each thread that calls, so that calls of several threads run at the same time.

    A child that dies ends its call only: the next call of the thread gets a new child. Leave the context in the thread
    that entered it, after all calls have ended.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._children: list[tuple[Any, Any]] = []
        # Forking in two threads at once could give one child the other's pipe, which would then never close.
        self._starting = threading.Lock()

    def __enter__(self) -> "ChildProcesses":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, pipe in self._children:
            pipe.close()
            process.terminate()
            process.join()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """
        Return what a function returns in the child process of this thread.

        Args:
            function (`Callable`): A function of a module. It, its arguments and its result are pickled.

        Raises:
            [`CrashError`]: If the child dies. Otherwise whatever the function raises.
        """
        process, pipe = getattr(self._of_thread, "child", None) or self._start()
        try:
            pipe.send((function, args))
            is_result, value = pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            while process.exitcode is None:  # another thread that starts a process has waited for this one too
                clock.sleep(0.001)
            self._of_thread.child = None
            raise CrashError(_how_it_died(process.exitcode)) from None
        if is_result:
            return value
        raise value

    def _start(self) -> tuple[Any, Any]:
        with self._starting:
            pipe, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._of_thread.child = process, pipe
            self._children.append(self._of_thread.child)
        return process, pipe


def _serve(pipe: Any) -> None:
    """Answer calls until the other end closes."""
    # Ctrl+C goes to all processes of a terminal. The parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        while True:
            function, args = pipe.recv()
            try:
                answer = True, function(*args)
            except Exception as error:  # the caller raises it
                answer = False, error
            pipe.send(answer)


def _how_it_died(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
