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
        names = {_dashed(name): name for action in self._actions for name in action.option_strings}
        for place, argument in enumerate(given[:end]):
            name, equals, value = argument.partition("=")
            given[place] = names.get(_dashed(name), name) + equals + value
        return super().parse_known_args(given, namespace)


def _dashed(name: str) -> str:
    """Return the name of an option with dashes between its words."""
    return name[:2] + name[2:].replace("_", "-")
