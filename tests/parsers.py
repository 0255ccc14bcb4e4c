# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The parsers of all scripts, and the spellings of options that they do not know. As a program, print both as JSON.

A script is run with `--help`, and its parser is kept instead of its help.
"""

import argparse
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import videollm_mod
from videollm_mod.train.data.converters import CONVERTERS
from videollm_mod.train.data.sources import SOURCES


ROOT = Path(videollm_mod.__file__).parent
# What comes before `--help` to get all parsers of a script.
BEFORE = {
    "train/data/prepare.py": [[name] for name in CONVERTERS],
    "train/encode.py": [["--dataset", name] for name in (*SOURCES, "data.jsonl")],
}


def scripts() -> list[str]:
    """Return the files that parse options and are run as programs."""
    parses = re.compile(r"(?<!class )\b\w*Parser\(|^    run\(main", re.MULTILINE)
    folders = (ROOT / folder for folder in ("benchmarks", "convert", "docs", "space", "tests", "train"))
    texts = {path: path.read_text("utf-8") for folder in folders for path in sorted(folder.rglob("*.py"))}
    main = 'if __name__ == "__main__":\n'
    return [str(path.relative_to(ROOT)) for path, text in texts.items() if main in text and parses.search(text)]


def parser_of(script: str, *before: str) -> argparse.ArgumentParser:
    """Run a script with `--help`, and return the parser that would have printed it."""
    found: list[argparse.ArgumentParser] = []
    path, argv = [str((ROOT / script).parent), *sys.path], [script, *before, "--help"]
    keep = patch.object(argparse.ArgumentParser, "print_help", lambda parser: found.append(parser))
    with keep, patch.object(sys, "path", path), patch.object(sys, "argv", argv):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{script} --help: {end}") from None
    return found[0]


def spellings(option: str) -> set[str]:
    """Return an option with dashes, and with underscores."""
    words = option.removeprefix("--")
    return {"--" + words.replace("_", "-"), "--" + words.replace("-", "_")}


def unknown_spellings(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the spellings of options that a parser does not know."""

    def fail(message: str) -> None:
        raise ValueError(message)

    for action in parser._actions:
        action.required = False
    parser.error = fail
    for action in [action for action in parser._actions if action.dest != "help"]:
        names = {name for option in action.option_strings if option.startswith("--") for name in spellings(option)}
        for name in sorted(names):
            values = [str(next(iter(action.choices or ["1"])))] * (
                action.nargs if isinstance(action.nargs, int) else 1
            )
            ways = [[name, *values]] + ([[f"{name}={values[0]}"]] if len(values) == 1 else [])
            for way in ways:
                try:
                    left = parser.parse_known_args(way)[1]
                except (ValueError, argparse.ArgumentError) as error:
                    # The option is known if it is the value that is refused.
                    left = way if "ambiguous" in str(error) else []
                if left:
                    yield way[0]


def main() -> None:
    """Print the unknown spellings of each script. A script without its libraries has none."""
    told = {}
    for script in scripts():
        try:
            parsers = [parser_of(script, *before) for before in BEFORE.get(script, [[]])]
            told[script] = [name for parser in parsers for name in unknown_spellings(parser)]
        except ModuleNotFoundError as error:
            if str(error.name).startswith("videollm_mod"):
                raise
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
