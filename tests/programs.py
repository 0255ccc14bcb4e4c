# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Run the command line and the scripts in the test process.

A fresh process takes 5 s of CPU to import torch and Transformers. Use one where that process is the subject: signals,
remote code, what libraries print while they are imported, and what a run leaves for the next one.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest.mock import patch as mock

import pytest

from videollm_mod import cli


ROOT = Path(__file__).parents[1]


@dataclass
class Done:
    """What `subprocess.run` returns: the exit code and the output."""

    returncode: int
    stdout: str
    stderr: str


def run_main(main: Callable[[], Any], *arguments: Any, program: str = "program", folder: Path = ROOT) -> Done:
    """
    Run `main` in a folder with these arguments on its command line. Its uncaught exceptions pass through.

    Variables that it sets do not stay: the trainer leaves its precision there, for instance.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, mock.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.chdir(folder)
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(f"{end.code}\n")
    return Done(code, out.getvalue(), err.getvalue())


def run_command(*arguments: Any, folder: Path = ROOT, stdin: BinaryIO | None = None) -> Done:
    """Run the command line in a folder, with a file or a pipe on standard input."""
    with pytest.MonkeyPatch.context() as patch:
        # In a terminal with colours, escape codes would stand between the letters of the help.
        patch.setenv("COLUMNS", "100")
        patch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
        if stdin is not None:
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
        return run_main(cli.main, *arguments, program="cli.py", folder=folder)


def run_training(folder: Path, *arguments: Any) -> Done:
    """Run `train/sft.py` and save in a folder."""
    # Imported here, since a process that runs the command line only would wait for it.
    from videollm_mod.train import sft
    from videollm_mod.train.arguments import run
    from videollm_mod.train.data.sources import DataSource
    from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig

    types = (ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments)
    return run_main(lambda: run(sft.main, *types), *arguments, "--output_dir", folder, program="sft.py")


def without_leaks(text: str) -> str:
    """Return what a program has printed, without the leaks that the triton of torch 2.15 reports of itself."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("nanobind: ", " - ", "See https://nanobind.")))


def losses_of(text: str) -> list[float]:
    """Return the losses that training has printed."""
    return [float(part.split("'")[0]) for part in text.split("{'loss': '")[1:]]
