# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Measure again what docs/speed.md shows, and put the new tables and plots into the page.

```bash
python benchmarks/speed_page.py                      # everything, about 30 minutes on two quiet cores
python benchmarks/speed_page.py launches training    # some tables
```

A table stands between the comments `<!-- NAME -->` and `<!-- end -->`, where NAME is a name below. The text around the
tables is written by hand: read it again afterwards.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time as clock
from datetime import date
from pathlib import Path

from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import copy_file, write_text
from videollm_mod.space.command_line import CommandLineParser


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
# Benchmarks of small models run in one thread: with two, they mostly wait for each other.
COMMANDS = {
    "launches": "OMP_NUM_THREADS=1 python benchmarks/launches.py",
    "eviction": "OMP_NUM_THREADS=1 python benchmarks/eviction.py",
    "preprocessing": "OMP_NUM_THREADS=1 python benchmarks/preprocessing.py",
    "small": (
        "python benchmarks/frame_latency.py --contexts 10 300 1200 --runners session-preallocated engine"
        " --kinds together encoded --steps 15"
    ),
    "135m": (
        "python benchmarks/frame_latency.py --shape 135m --tokens 10 --contexts 300 --kinds together --steps 10"
        " --runners session session-preallocated session-compiled engine"
    ),
    "1b": (
        "python benchmarks/frame_latency.py --shape 1b --dtype bfloat16 --tokens 50 --contexts 300 --kinds together"
        " --runners session-preallocated engine --schemes full all_deep --steps 4 --tries 1"
    ),
    "laptop": "python benchmarks/laptop.py --models 256m --frames 3 --tries 1",
    "laptop-500m": "python benchmarks/laptop.py --models 500m --frames 2 --tries 1",
    "streams": "python benchmarks/many_streams.py --streams 1 4 16 --rounds 5",
    "clip": "python benchmarks/watch_clip.py --runners session session-preallocated session-compiled engine --tries 9",
    "endless": "OMP_NUM_THREADS=1 python benchmarks/endless.py --frames 5000",
    "endless-engine": "OMP_NUM_THREADS=1 python benchmarks/endless.py --frames 5000 --engine",
    "training": "python benchmarks/training.py --frames 60 --steps 3",
    "cost": "python benchmarks/cost.py --shape llama3-8b --device meta --frames 600 --text-tokens 700",
}
# Plots to copy into docs/, and the benchmark that draws each.
PLOTS = {"small": "latency.png", "streams": "streams.png"}


@one_line_errors()
def main() -> None:
    """Run the benchmarks and write the page after each."""
    parser = CommandLineParser(description="Measure again what docs/speed.md shows.")
    parser.add_argument("names", nargs="*", help=f"tables to make: {', '.join(COMMANDS)}; default: all")
    names = parser.parse_args().names or list(COMMANDS)
    if unknown := set(names) - set(COMMANDS):
        parser.error(f"there is no table {', '.join(sorted(unknown))}; choose from {', '.join(COMMANDS)}")
    for name in names:
        begin = clock.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            printed = run(name, Path(folder))
            if plot := PLOTS.get(name):
                copy_file(Path(folder) / plot, ROOT / "docs" / plot)
        write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), name, printed))
        print(f"{name}: {clock.monotonic() - begin:.0f} s", flush=True)


def run(name: str, folder: Path) -> str:
    """Run a benchmark and return what it prints."""
    words = shlex.split(COMMANDS[name])
    threads = dict(word.split("=") for word in words if word.startswith("OMP_"))
    command = [sys.executable, *words[words.index("python") + 1 :]]
    done = subprocess.run(
        [*command, *(["--out", str(folder)] if name in PLOTS else [])],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def with_table(page: str, name: str, printed: str) -> str:
    """Return the page with what a benchmark printed between its comments: one line on the machine, then its tables."""
    pattern = rf"<!-- {name} -->.*?<!-- end -->"
    if not re.search(pattern, page, re.DOTALL):
        raise ValueError(f"docs/speed.md has no <!-- {name} --> ... <!-- end -->.")
    machine, bar, tables = printed.strip().partition("|")
    head = f"{date.today():%-d %B %Y}. {' '.join(machine.split())}"
    block = f"<!-- {name} -->\n\n```\n{COMMANDS[name]}\n```\n\n{head}\n\n{bar}{tables}\n\n<!-- end -->"
    return re.sub(pattern, lambda _: block, page, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    main()
