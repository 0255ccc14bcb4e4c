# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Mutants of the code: which changes are made, and which tests are run on them."""

import importlib.util
import inspect
import re
from pathlib import Path

import mutants
import pytest
import tomllib

from videollm_mod import checks_videollm_mod


SOURCE = '''
"""A page."""

def half(count: int | None = 2) -> float:
    """Return half."""
    if count is None:
        raise ValueError("`count` is 3 + 4.")
    return round(count / 2, 1)

def other(x):
    return x + 1

__all__ = ["half"]
__all__ += ["other"]
'''


def test_mutants_change_one_place_and_no_annotation_or_message():
    found = mutants.mutants_of(SOURCE, module="page")
    changes = {(mutant.before, mutant.after) for mutant in found}
    assert {("count / 2", "count * 2"), ("2", "3"), ("is", "is not"), ("x + 1", "x - 1")} <= changes
    assert all("|" not in before and "`count`" not in before for before, _ in changes)
    assert len({mutant.key for mutant in found}) == len(found)
    for mutant in found:
        namespace = {}
        exec(mutant.change(), namespace)
        lines = zip(SOURCE.splitlines(), mutant.change().splitlines(), strict=True)
        assert [number for number, (a, b) in enumerate(lines, 1) if a != b] == [mutant.line]
    assert {mutant.line for mutant in mutants.mutants_of(SOURCE, names=["other"])} == {11}
    assert max(mutant.line for mutant in found) == 11


def test_strict_is_not_changed():
    found = mutants.mutants_of("pairs = zip(a, b, strict=True)\n", module="page")
    assert {mutant.after for mutant in found} == {
        "pairs = None",
        "zip(None, b, strict=True)",
        "zip(a, None, strict=True)",
        "zip(b, strict=True)",
        "zip(a, strict=True)",
    }


def test_a_mutated_module_takes_the_place_of_the_file():
    source = inspect.getsource(checks_videollm_mod)
    all_mutants = mutants.mutants_of(source, module="checks_videollm_mod", names=["check_count"])
    mutant = next(mutant for mutant in all_mutants if mutant.before == "1")
    finder = mutants.MutatedFinder(mutant)
    assert finder.find_spec("videollm_mod.cache_videollm_mod") is None
    spec = finder.find_spec("videollm_mod.checks_videollm_mod")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checks_videollm_mod.check_count("count", 1)
    with pytest.raises(ValueError, match="count"):
        module.check_count("count", 1)


def test_quick_tests_of_the_changed_lines_run_first():
    mutant = next(mutant for mutant in mutants.mutants_of(SOURCE, module="page") if mutant.before == "count / 2")
    known = {
        "tests": {"slow": 2.0, "quick": 0.1, "never": mutants.LONGEST + 1, "elsewhere": 0.1},
        "lines": {"page": {"8": ["slow", "quick", "never", "failed"], "11": ["elsewhere"]}},
        "sources": {"page": SOURCE},
    }
    assert mutants.tests_for(mutant, known) == ["quick", "slow"]
    assert mutants.tests_for(mutant, known, kills={"slow": 30}) == ["slow", "quick"]
    assert mutants.tests_for(mutant, known, 1.0) == ["quick"]
    # Defaults are set when the file is imported: tests that run the function know them.
    default = next(mutant for mutant in mutants.mutants_of(SOURCE, module="page") if mutant.line == 4)
    assert mutants.tests_for(default, known) == ["quick", "slow"]
    # A class that has only fields runs no line in a test.
    source = SOURCE + "class Pair:\n    first = 5\n"
    known["tests"]["tests/test_page.py::test_constants"] = 0.0
    field = next(mutant for mutant in mutants.mutants_of(source, module="page") if mutant.before == "5")
    assert mutants.tests_for(field, known | {"sources": {"page": source}}) == [
        "tests/test_page.py::test_constants",
        "elsewhere",
        "quick",
        "slow",
    ]


def test_wilsons_interval():
    low, high = mutants.interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
    assert mutants.interval(0, 0) == (0.0, 1.0)
    assert mutants.interval(10, 10)[1] == pytest.approx(1)


def test_marks_of_tests_are_known_without_the_plugin_that_adds_them():
    files = Path(__file__).parent.glob("test_*.py")
    used = {mark for file in files for mark in re.findall(r"pytest\.mark\.(\w+)", file.read_text(encoding="utf-8"))}
    options = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    stated = {line.partition(":")[0] for line in options["tool"]["pytest"]["ini_options"]["markers"]}
    # The survey of tests runs without xdist. Pytest itself and pytest-timeout add the others.
    assert used - stated <= {"filterwarnings", "parametrize", "skipif", "timeout", "usefixtures"}
