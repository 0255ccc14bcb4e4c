# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Which small changes of the code does no test notice? Mutation testing of routing, cache, labels, session and interval.

```bash
python benchmarks/mutants.py survey                        # once: the time of each test, and the lines it runs
python benchmarks/mutants.py run --sample 100              # a second run continues the first
python benchmarks/mutants.py run --survivors --seconds 60  # try survivors again, with more tests
python benchmarks/mutants.py table                         # counts, and each survivor
python benchmarks/mutants.py run --skip 100 --sample 60    # 60 others, after tests were written for the first 100
```

mutmut's operators change one place at a time: a number, an operator, an argument, an assigned value, one arm of a
condition. mutmut itself skips decorated functions, so its operators are used here as a library. Left out are
annotations, the letter case of strings, texts of errors and warnings, and `strict=` of `zip`, which changes nothing
unless the code is wrong.

Each mutant has a forked process, which has imported the libraries already. It runs the tests that run the changed
line, up to the first that fails: first quick ones, and those that killed many mutants before. A mutant is killed if a
test fails or needs too much time.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import resource
import signal
import sys
import time as clock
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string
from report import markdown_row


ROOT = Path(__file__).resolve().parents[1]
# Files by subject. A name after the file is a function or class; the rest of that file is left out.
SUBJECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "routing": {"routing_videollm_mod": (), "routers_videollm_mod": ()},
    "cache": {"cache_videollm_mod": ()},
    "labels": {
        "processing_videollm_mod": (
            "to_stream_turns",
            "_render",
            "_tokenize",
            "_tokenize_piece",
            "_complete",
            "_with_times",
            "_tokenize_dialogue",
            "_labels",
            "_pad",
            "_put",
        ),
        "train.collator": (),
    },
    "session": {"streaming_videollm_mod": (), "remembering_videollm_mod": ()},
    "interval": {
        "speaking_videollm_mod": (),
        "generation_videollm_mod": ("interval_rule", "should_speak"),
        "compiled_step_videollm_mod": ("decide", "speakable"),
    },
}
# Tests that look at these files. Other tests reach them too, and take longer.
TESTS = (
    "routing",
    "routers",
    "cache",
    "remembering",
    "streaming",
    "speaking",
    "generation",
    "frame_reuse",
    "stream_format",
    "processing",
    "compiled_step",
    "modeling",
)
TESTS = (*(f"{name}_videollm_mod" for name in TESTS), "train_collator", "train_trainer", "invariants", "oracles")
# Seconds of the longest test to run.
LONGEST = 6.0
# Tests that a mutant runs first, in their own call of pytest: most mutants end here.
FIRST = 6


@dataclass(frozen=True)
class Mutant:
    """
    One change.

    Args:
        subject (`str`): What the code does.
        module (`str`): Module, without the package.
        line (`int`): First line of the changed expression.
        key (`str`): Place and number of the change, for one version of the file.
        first, last (`int`): Lines of the statement.
        before, after (`str`): The expression, and what takes its place.
        change (`Callable`): Returns the complete file with the change.
    """

    subject: str
    module: str
    line: int
    key: str
    first: int
    last: int
    before: str
    after: str
    change: Callable[[], str] = field(compare=False, repr=False)


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("```")[0])
    parser.add_argument("command", choices=["survey", "run", "table"])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "mutants", help="folder of the results")
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--sample", type=int, default=100, help="mutants per subject, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out so many of the draw: those that tests were written for"
    )
    parser.add_argument("--seconds", type=float, default=8, help="most time of a mutant's tests, by the survey")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no mutant after this time")
    parser.add_argument("--tests", nargs="+", help="add these files or tests to an earlier survey")
    parser.add_argument("--survivors", action="store_true", help="run only those that survived before")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"survey": survey, "run": run, "table": table}[options.command](options)


# ------------------------------------------------------------------------------------------------------------- mutants


def path_of(module: str) -> Path:
    """Return the file of a module."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def all_mutants(subject: str) -> list[Mutant]:
    """Return the mutants of a subject in the order of its code."""
    found = []
    for module, names in SUBJECTS[subject].items():
        found += mutants_of(path_of(module).read_text(encoding="utf-8"), subject, module, names)
    return found


def mutants_of(text: str, subject: str = "", module: str = "", names: Iterable[str] = ()) -> list[Mutant]:
    """Return the mutants of a source file, or of the functions and classes of these names in it."""
    wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    positions, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)
    digest, names = hashlib.sha256(text.encode()).hexdigest()[:8], set(names)
    wanted = []

    class Finder(cst.CSTVisitor):
        def on_visit(self, node: cst.CSTNode) -> bool:
            is_left_out = isinstance(node, (cst.Annotation, cst.ImportFrom, cst.Import)) or _is_message(node)
            if is_left_out or (isinstance(node, cst.Arg) and _name_of(node) == "strict"):
                return False
            wanted.append(node)
            return True

    wrapper.module.visit(Finder())
    mutants, seen = [], Counter()
    for node in wanted:
        above = list(_ancestors(node, parents))
        if names and not any(getattr(getattr(x, "name", None), "value", None) in names for x in (node, *above)):
            continue
        statement = next((x for x in (node, *above) if isinstance(x, cst.BaseSmallStatement)), node)
        span, whole = positions[node].start, positions[statement]
        for kind, operator in mutation_operators:
            if not isinstance(node, kind):
                continue
            changed = list(operator(node))
            if operator is operator_string:
                changed = changed[:1]  # not the letter case
            for other in changed:
                before, after = (wrapper.module.code_for_node(x).strip() for x in (node, other))
                if before == after or _strict_of(node) != _strict_of(other):
                    continue
                place = f"{module}:{span.line}:{span.column}:{operator.__name__.removeprefix('operator_')}"
                seen[place] += 1
                key = f"{place}:{seen[place]}:{digest}"
                lines = whole.start.line, whole.end.line
                change = partial(_with_change, wrapper.module, node, other)
                mutants.append(Mutant(subject, module, span.line, key, *lines, before, after, change))
    return mutants


def _ancestors(node: cst.CSTNode, parents: Any) -> Iterator[cst.CSTNode]:
    while (node := parents.get(node)) is not None:
        yield node


def _is_message(node: cst.CSTNode) -> bool:
    """Return whether a node is the text of an error or a warning, or a list of public names."""
    if isinstance(node, cst.Raise):
        return True
    if isinstance(node, (cst.Assign, cst.AugAssign)):
        targets = [node.target] if isinstance(node, cst.AugAssign) else [x.target for x in node.targets]
        return any(isinstance(x, cst.Name) and x.value in ("__all__", "logger") for x in targets)
    function = getattr(node, "func", None)
    return isinstance(function, cst.Attribute) and getattr(function.value, "value", None) in ("logger", "warnings")


def _name_of(argument: cst.Arg) -> str | None:
    return None if argument.keyword is None else argument.keyword.value


def _strict_of(node: cst.CSTNode) -> list[str]:
    """Return the value of a call's argument `strict`, if it has one."""
    arguments = node.args if isinstance(node, cst.Call) else ()
    return [getattr(x.value, "value", "") for x in arguments if _name_of(x) == "strict"]


def _with_change(tree: cst.Module, node: cst.CSTNode, other: cst.CSTNode) -> str:
    return tree.deep_replace(node, other).code


# -------------------------------------------------------------------------------------------------------------- survey


class Surveyor:
    """Plugin of pytest that notes the time of each test and the lines that it runs."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.begin, self.seconds = coverage, 0.0, {}
        self.failed: set[str] = set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Let following lines belong to this test."""
        self.coverage.switch_context(nodeid)
        self.begin = clock.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note the processor's time, since other programs may be running."""
        self.seconds[nodeid] = clock.process_time() - self.begin

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note tests that fail or are skipped."""
        if not report.passed:
            self.failed.add(report.nodeid)


def survey(options: argparse.Namespace) -> None:
    """Run the tests once, and write which lines each runs."""
    import coverage
    import pytest

    os.chdir(ROOT)
    files = options.tests or [f"tests/test_{name}.py" for name in TESTS]
    measured = [*ROOT.glob("*_videollm_mod.py"), *(path_of(module) for s in SUBJECTS.values() for module in s)]
    include = [str(path.resolve()) for path in measured]
    data_file = str(options.out / ".coverage")
    recorder = coverage.Coverage(data_file=data_file, branch=True, include=include, omit=["*/tests/*"])
    recorder.erase()
    surveyor = Surveyor(recorder)
    recorder.start()
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[surveyor])
    recorder.stop()
    recorder.save()
    data, lines = recorder.get_data(), {}
    for subject in SUBJECTS.values():
        for module in subject:
            found = data.contexts_by_lineno(str(path_of(module).resolve()))
            lines[module] = {line: sorted(set(tests) - {""}) for line, tests in found.items()}
    ours = ("videollm_mod", "tests", "test_", "conftest", "__main__", "__mp_main__")
    ours = (
        *ours,
        *(path.stem for folder in ("tests", "space", "benchmarks") for path in (ROOT / folder).glob("*.py")),
    )
    modules = [name for name in sys.modules if not name.startswith(ours)]
    tests = {name: round(seconds, 3) for name, seconds in surveyor.seconds.items() if name not in surveyor.failed}
    sources = {module: path_of(module).read_text(encoding="utf-8") for s in SUBJECTS.values() for module in s}
    path = options.out / "survey.json"
    if options.tests:
        known = json.loads(path.read_text(encoding="utf-8"))
        tests, modules = known["tests"] | tests, list(dict.fromkeys((*known["modules"], *modules)))
        for module, found in known["lines"].items():
            for line, old in found.items():
                lines[module][int(line)] = sorted({*old, *lines[module].get(int(line), ())})
    result = {"tests": tests, "lines": lines, "modules": modules, "sources": sources}
    path.write_text(json.dumps(result), encoding="utf-8")
    print(f"{len(tests)} tests, {sum(tests.values()):.0f} s; failed: {sorted(surveyor.failed) or 'none'}")


def tests_for(
    mutant: Mutant, known: dict[str, Any], most: float = math.inf, kills: Mapping[str, int] = MappingProxyType({})
) -> list[str]:
    """
    Return the tests that run the changed statement, the quickest first. If it runs at import only, these are the tests
    that run the function around it, else the class, else the file.

    Of `most` seconds, up to half are for tests in the test file of the module. Tests that killed more mutants before
    (`kills`) in less time come first.
    """
    lines = {int(line): tests for line, tests in known["lines"][mutant.module].items()}
    found = {test for line in range(mutant.first, mutant.last + 1) for test in lines.get(line, ())}
    own_file = f"tests/test_{mutant.module.replace('.', '_')}.py::"
    for scope in () if found else _enclosing(known["sources"][mutant.module], mutant.first):
        found = found or {test for line in scope for test in lines.get(line, ())}
        if scope[0] == 1:  # a test may read a constant and run no line of the file
            found |= {test for test in known["tests"] if test.startswith(own_file)}
    timed = [(known["tests"][test], test) for test in found if known["tests"].get(test, math.inf) < LONGEST]
    timed.sort(key=lambda x: (x[0] / (1 + kills.get(x[1], 0)), x[1]))
    chosen, total = [], 0.0
    for part, limit in (([x for x in timed if x[1].startswith(own_file)], most / 2), (timed, most)):
        for seconds, test in part:
            if (seconds, test) not in chosen and total + seconds <= limit:
                chosen.append((seconds, test))
                total += seconds
    chosen.sort(key=timed.index)
    return [test for _, test in chosen] or [test for _, test in timed[:1]]


def _enclosing(source: str, line: int) -> list[range]:
    """Return the lines of each function and class around a line, from inside out, and of the file."""
    found = [range(1, source.count("\n") + 2)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= node.end_lineno:
            found.append(range(node.lineno, node.end_lineno + 1))
    return sorted(found, key=len)


# ----------------------------------------------------------------------------------------------------------------- run


class MutatedLoader(importlib.machinery.SourceFileLoader):
    """Load a module from a changed source, under the name and path of the file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        """Compile the changed source."""
        return compile(self.source, self.get_filename(fullname), "exec")


class MutatedFinder:
    """Finds one module of the package, and no other."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.mutant = f"videollm_mod.{mutant.module}", mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002
        """Return the specification of the changed module."""
        if fullname != self.name:
            return None
        loader = MutatedLoader(fullname, str(path_of(self.mutant.module)), self.mutant.change())
        return importlib.util.spec_from_loader(fullname, loader)


def run(options: argparse.Namespace) -> None:
    """Run a sample of mutants of each subject, and append the results to `mutants.jsonl`."""
    known = json.loads((options.out / "survey.json").read_text(encoding="utf-8"))
    changed = [name for name, source in known["sources"].items() if path_of(name).read_text("utf-8") != source]
    if changed:
        raise SystemExit(f"{', '.join(changed)} changed since the survey: run `survey` again.")
    os.chdir(ROOT)
    for name in known["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "space")]
    done = read_results(options.out)
    todo = []
    for subject in options.subjects:
        drawn = draw(all_mutants(subject), options.skip + options.sample, options.seed)[options.skip :]
        survived = [x for x in drawn if done.get(x.key, {}).get("outcome") in ("survived", "not run")]
        todo += survived if options.survivors else [mutant for mutant in drawn if mutant.key not in done]
    random.Random(options.seed).shuffle(todo)
    print(f"{len(todo)} mutants to run", flush=True)
    kills = Counter(row["killer"] for row in done.values())
    begin, running = clock.monotonic(), {}
    while todo or running:
        while todo and len(running) < options.jobs and clock.monotonic() - begin < 60 * options.minutes:
            mutant = todo.pop()
            tests = tests_for(mutant, known, options.seconds, kills)
            if not _is_change(mutant):
                continue
            if not tests:
                _note(options.out, mutant, "not run", 0.0, 0, "")
                continue
            running[_start(mutant, tests, known, options.out)] = (mutant, clock.monotonic(), len(tests))
        if not running:
            break
        pid, status, usage = _wait(running)
        mutant, started, count = running.pop(pid)
        reason = options.out / f"{pid}.txt"
        killer = reason.read_text(encoding="utf-8") if reason.exists() else ""
        reason.unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(status)
        # A process that this one has ended has waited for other programs, so it says nothing about the mutant.
        outcome = {0: "survived", 1: "killed", 3: "broken", -signal.SIGKILL: "broken"}.get(code, "timeout")
        seconds = usage.ru_utime + usage.ru_stime
        _note(options.out, mutant, outcome, seconds, count, killer, wall=clock.monotonic() - started)
    table(options)


def draw(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Return a random sample. A larger one contains a smaller one."""
    return random.Random(seed).sample(mutants, len(mutants))[:count]


def _is_change(mutant: Mutant) -> bool:
    """Return whether the mutant is another program, and one that compiles."""
    try:
        changed = ast.dump(ast.parse(mutant.change()))
    except SyntaxError:
        return False
    return changed != ast.dump(ast.parse(path_of(mutant.module).read_text(encoding="utf-8")))


def _start(mutant: Mutant, tests: list[str], known: dict[str, Any], out: Path) -> int:
    """Run tests on a mutant in a forked process, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        # A mutant may loop, or fill the memory. Tests of other kinds need a tenth of this.
        seconds = 20 + 4 * math.ceil(sum(known["tests"][test] for test in tests))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.meta_path.insert(0, MutatedFinder(mutant))
        code, killer = _run_tests(tests)
        if killer:
            (out / f"{os.getpid()}.txt").write_text(killer, encoding="utf-8")
    finally:
        os._exit(code)


def _run_tests(tests: list[str]) -> tuple[int, str]:
    """Return 0 if all tests pass, else 1 and the name of the first that fails."""
    import pytest

    class FirstFailure:
        name = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed and not self.name:
                FirstFailure.name = report.nodeid

    options = ["-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    for part in (tests[:FIRST], tests[FIRST:]):
        code = int(pytest.main([*options, *part], plugins=[FirstFailure()])) if part else 0
        if code not in (0, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            return 3, f"pytest ends with {code}"  # the tests' fault, or the machine's
        if code:
            return 1, FirstFailure.name or "the tests cannot be collected"
    return 0, ""


def _wait(running: dict[int, Any]) -> tuple[int, int, Any]:
    """Wait for one of the processes, and end those that hang without using time."""
    while True:
        for pid, (_, started, _) in running.items():
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return ended, status, usage
            if clock.monotonic() - started > 900:
                os.kill(pid, signal.SIGKILL)
        clock.sleep(0.05)


def _note(out: Path, mutant: Mutant, outcome: str, seconds: float, tests: int, killer: str, wall: float = 0) -> None:
    row = {name: getattr(mutant, name) for name in ("subject", "module", "line", "key", "before", "after")}
    row |= {"outcome": outcome, "seconds": round(seconds, 2), "wall": round(wall, 1), "tests": tests, "killer": killer}
    with open(out / "mutants.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------------------------------- table


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each mutant."""
    path, rows = out / "mutants.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line that was cut off
            row = json.loads(line)
            rows[row["key"]] = row
    return {key: row for key, row in rows.items() if row["outcome"] != "broken"}


def interval(part: int, count: int) -> tuple[float, float]:
    """Return Wilson's interval of a share, which holds the true one in 95 of 100 samples."""
    if count == 0:
        return 0.0, 1.0
    z, share = 1.96, part / count
    centre, half = (
        share + z * z / (2 * count),
        z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)),
    )
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def table(options: argparse.Namespace) -> None:
    """Print the counts of each subject, and the survivors."""
    rows = read_results(options.out)
    known = {subject: all_mutants(subject) for subject in options.subjects}
    if options.skip:
        drawn = (draw(known[x], options.skip + options.sample, options.seed)[options.skip :] for x in options.subjects)
        chosen = {mutant.key for mutants in drawn for mutant in mutants}
        rows = {key: row for key, row in rows.items() if key in chosen}
    rows = list(rows.values())
    print(markdown_row(["code", "mutants", "drawn", "killed", "survived", "killed, 95% interval"]))
    print(markdown_row(["---"] * 6))
    for subject in options.subjects:
        total = len(known[subject])
        ours = [row for row in rows if row["subject"] == subject]
        survived = sum(row["outcome"] in ("survived", "not run") for row in ours)
        low, high = interval(len(ours) - survived, len(ours))
        shares = f"{(len(ours) - survived) / max(len(ours), 1):.1%} ({low:.0%} to {high:.0%})"
        print(markdown_row([subject, total, len(ours), len(ours) - survived, survived, shares]))
    print()
    for row in sorted(rows, key=lambda row: (row["module"], row["line"])):
        if row["outcome"] in ("survived", "not run") and row["subject"] in options.subjects:
            before, after = (" ".join(row[name].split()) for name in ("before", "after"))
            print(f"{row['outcome']} {row['module']}:{row['line']} ({row['tests']} tests)\n  {before}\n  {after}")


if __name__ == "__main__":
    main()
