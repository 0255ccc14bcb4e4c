# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Run the fuzz tests with many new cases, one kind of input after the other.

```bash
make fuzz                        # 10,000 cases of each kind, in at most 90 minutes
python tests/fuzz.py --minutes 20 --cases 2000 --kinds videos rows
```

Finished kinds are remembered in `outputs/fuzz`, so a second run goes on with the next one. When all are finished, the
next run begins again with other cases. The log of a kind names its seed and, after a fault, how to repeat it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time as clock
from pathlib import Path


TESTS = Path(__file__).parent
# A template is code of its checkpoint, and one that is spoilt may write without end, until this many bytes are full.
MOST_MEMORY = 12 * 2**30
# For each kind of input: the file of its tests, and what its names contain.
KINDS = {
    "videos": ("test_fuzz_files.py", "video"),
    "subtitles": ("test_fuzz_files.py", "subtitles"),
    "rows": ("test_fuzz_files.py", "rows"),
    "dialogues": ("test_fuzz_dialogues.py", ""),
    "configurations": ("test_fuzz_configurations.py", ""),
    "schedules": ("test_fuzz_engine.py", ""),
    "events": ("test_serving_fuzz.py", "events"),
    "requests": ("test_serving_fuzz.py", "requests"),
    "checkpoints": ("test_fuzz_checkpoints.py", ""),  # the longest
}


def limit_memory() -> None:
    """Let this process reserve at most `MOST_MEMORY` bytes: an allocation beyond it raises `MemoryError`."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def run_kind(kind: str, seed: int, cases: int, folder: Path, seconds: float) -> str:
    """Run the tests of a kind and return its outcome in a word: passed, failed or unfinished."""
    file, words = KINDS[kind]
    given = {"HYPOTHESIS_PROFILE": "fuzz", "FUZZ_CASES": str(cases), "FUZZ_SEED": str(seed), "HF_HUB_OFFLINE": "1"}
    given |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "--timeout", "0"]
    command += ["-k", words] * bool(words) + ["--hypothesis-seed", str(seed)]
    with (folder / f"{kind}.log").open("w") as log:
        log.write(f"{kind}: seed {seed}, {cases} cases\n{' '.join(command)}\n")
        log.flush()
        try:
            options = {"stdout": log, "stderr": log, "timeout": seconds, "preexec_fn": limit_memory}
            done = subprocess.run(command, env=os.environ | given, **options)
        except subprocess.TimeoutExpired:
            return "unfinished"
    return "failed" if done.returncode else "passed"


def main() -> None:
    """Run each kind that is not finished, within the time."""
    parser = argparse.ArgumentParser(description="Run the fuzz tests with many new cases.")
    parser.add_argument("--minutes", type=float, default=90, help="most minutes of all kinds together")
    parser.add_argument("--cases", type=int, default=10_000, help="cases of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of input")
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz"), help="folder of logs and finished kinds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    state = options.out / "finished.json"
    seed, finished = json.loads(state.read_text()) if state.exists() else (1, [])
    if set(options.kinds) <= set(finished):
        seed, finished = seed + 1, [kind for kind in finished if kind not in options.kinds]
    end, outcomes = clock.monotonic() + 60 * options.minutes, {}
    waiting = [kind for kind in options.kinds if kind not in finished]
    for index, kind in enumerate(waiting):
        begin = clock.monotonic()
        # What a kind leaves of its share is for the later ones.
        share = (end - begin) / (len(waiting) - index)
        outcome = outcomes[kind] = run_kind(kind, seed, options.cases, options.out.resolve(), share)
        log = options.out / f"{kind}.log"
        took = clock.monotonic() - begin
        sys.stdout.write(f"{kind}: {outcome}, seed {seed}, {options.cases} cases, {took:.0f} s, {log}\n")
        if outcome == "failed":
            sys.stdout.write(log.read_text(errors="replace")[-3000:])
        sys.stdout.flush()
        if outcome == "passed":
            finished.append(kind)
            state.write_text(json.dumps([seed, finished]))
    raise SystemExit("failed" in outcomes.values())


if __name__ == "__main__":
    main()
