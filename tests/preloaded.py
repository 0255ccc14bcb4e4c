# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
A Python that has already imported the libraries, for tests that start processes.

[`preloaded_python`] takes the place of `sys.executable`. Each program is a process of its own, with its own arguments,
environment, folder and output, but it is a copy of one that imported what training and the command line need: it saves
5 s to 9 s of CPU. What libraries read from the environment while they are imported is that of the test process.

Tests that use it are one group of pytest-xdist, so that one process imports for all of them.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
# What `sft.py` imports, and what `encode.py`, `evaluation.py` and `serve` import when they have read their options.
MODULES = ("videollm_mod.train.sft", "videollm_mod.train.encoding", "videollm_mod.train.tasks.command")
MODULES += ("accelerate.commands.utils", "torch.distributed.run", "matplotlib.figure", "videollm_mod.serving.server")
ENDED: list[list[str]] = []  # has a program's command line when it ran to its end
NOTE = "PRELOADED_NUMBER"  # names a file for the number of a program's process


@lru_cache
def preloaded_python() -> str:
    """Return a program that runs `[-u] script.py ...` and `-m module ...` as Python does. The first call imports."""
    folder = tempfile.TemporaryDirectory()
    address = Path(folder.name) / "socket"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", address],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None

    def end() -> None:
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    assert server.stdout.readline() == b"ready\n", "the libraries cannot be imported"
    program = Path(folder.name) / "python"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", __file__, str(address)])} "$@"\n')
    program.chmod(0o700)
    return str(program)


def launch(config: str, *command: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """
    Run a script with `accelerate launch` and a file of `train/configs`, on the CPU.

    Options change only the precision and the number of processes, and the environment selects the CPU.
    """
    options = ["--config_file", f"train/configs/{config}.yaml", "--num_processes", processes]
    options += ["--mixed_precision", "no", "--main_process_port", 0]
    return subprocess.run(
        [preloaded_python(), "-m", "accelerate.commands.launch", *map(str, [*options, *command])],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )


class Program(subprocess.Popen):
    """A process that ends as a program does, and hands it all signals. `number` is that of the program's process."""

    number = 0

    def send_signal(self, sig: int) -> None:
        """Send a signal to the program, if it has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.number, sig)


def start(script: str, *arguments: Any, environment: dict[str, str] | None = None, **options: Any) -> Program:
    """Start a script that signals will reach. The options are those of `Popen`."""
    with tempfile.TemporaryDirectory() as folder:
        note, command = Path(folder) / "number", [preloaded_python(), script, *map(str, arguments)]
        given = {**os.environ, **(environment or {}), NOTE: str(note)}
        program = Program(command, cwd=ROOT, env=given, **options)
        while not (note.exists() and note.read_text()):
            assert program.poll() is None, f"{script} does not start"
            time.sleep(0.005)
        program.number = int(note.read_text())
        return program


def ask(address: str, arguments: list[str]) -> None:
    """Have the server run a program with this process's environment, folder and files, and end as it does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        server.sendall(json.dumps(wanted).encode() + b"\n")
        code = int(server.makefile().readline())
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def leave() -> None:
    """End a program that ran to its end. Python would take half a second to take so many modules apart."""
    if ENDED:
        sys.stdout.flush()
        os._exit(0)


def serve(address: str) -> list[str]:
    """Serve until standard input ends. Returns in each program's process only, with its command line."""
    atexit.register(leave)  # before the libraries register theirs, so it is called after them
    for name in MODULES:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        keepers: set[int] = set()
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if (keeper := os.fork()) == 0:
                listener.close()
                return keep(connection)
            connection.close()
            keepers = {other for other in keepers | {keeper} if os.waitpid(other, os.WNOHANG) == (0, 0)}
    for keeper in keepers:
        os.waitpid(keeper, 0)
    os._exit(0)


def keep(connection: socket.socket) -> list[str]:
    """Start a program, kill it if who asked for it ends, and tell its exit code. Returns in the program's process."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    wanted = json.loads(connection.makefile().readline())
    if (program := os.fork()) == 0:
        connection.close()
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        os.environ.clear()
        os.environ.update(wanted["environment"])
        os.chdir(wanted["folder"])
        # As in a new process. Tests that run in the background ignore signals, and a child inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        tempfile.tempdir = None
        if (note := os.environ.pop(NOTE, None)) is not None:
            Path(note).write_text(str(os.getpid()))
        return wanted["arguments"]
    for file in (0, 1, 2, *files):
        os.close(file)

    def watch() -> None:
        if not connection.recv(1):
            os.kill(program, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        connection.sendall(b"%d\n" % code)
    finally:
        os._exit(0)


def run_program(arguments: list[str]) -> None:
    """Run a command line without the name of Python."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        ask(sys.argv[1], sys.argv[2:])
    command = serve(sys.argv[2])
    # What the program starts has the libraries, too.
    sys.executable = str(Path(sys.argv[2]).with_name("python"))
    run_program(command)
    ENDED.append(command)
