# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The argument parser of all scripts. It is in this folder because a published Space has no other."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class CommandLineParser(argparse.ArgumentParser):
    """
    An [`argparse.ArgumentParser`] that accepts dashes and underscores in the names of options.

    `--max-frames 20`, `--max_frames 20` and `--max_frames=20` are the same, whichever of the names is declared. Values
    stay as they are.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        # What follows a bare `--` is no option.
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(self._as_declared, given[:end]), *given[end:]], namespace)

    def _as_declared(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        words = name.removeprefix("--")
        for declared in (name, "--" + words.replace("_", "-"), "--" + words.replace("-", "_")):
            if name.startswith("--") and declared in self._option_string_actions:
                return declared + equals + value
        return argument
