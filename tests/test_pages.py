# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""README and pages: their Python runs as it stands, their commands exist, and what they point at is there."""

import dataclasses
import functools
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny import random_frames

from videollm_mod import VideoLLMMoDConfig


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """The code blocks of a page, also those in lists."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(block) for _, block in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_python_runs(monkeypatch, capsys, page):
    """All blocks, in order, in one namespace, from the root of the checkout."""
    monkeypatch.chdir(ROOT)
    namespace = {"camera": list(random_frames(3))}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)
    printed = capsys.readouterr().out
    if page == PAGES[0]:
        assert re.search(r"\d+\.\ds  A \w+ \w+ enters from the \w+\.", printed)
        assert "of the operations" in printed
        assert namespace["batch"]["labels"].shape == namespace["batch"]["input_ids"].shape
    expected = {"stream-format.md": "[#,#", "configuration.md": "Did you mean `mod_keep_ratio`?"}
    assert expected.get(page.name, "") in printed


def commands():
    """Each command of a page that runs a script of ours: page, script and options."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                script = next((word for word in words if word.endswith(".py")), None)
                if script is not None:
                    # TRL's parser takes --config and does not list it.
                    options = {w for w in words[words.index(script) :] if w.startswith("--")} - {"--config"}
                    yield pytest.param(script, options, id=f"{page.name}:{script}")


@functools.cache
def help_of(script):
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize(("script", "options"), commands())
def test_its_commands_exist_with_their_options(script, options):
    shown = help_of(script)
    assert shown.startswith("usage:"), script
    for option in options:
        assert re.search(rf"{option}\b", shown), f"{script} has no {option}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_its_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_points_at_is_there(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"python ((?:docs|benchmarks|train|space)/\S+\.py)", text):
        assert (ROOT / path).exists(), path


def test_every_field_has_its_line():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    ours = {f.name for f in dataclasses.fields(VideoLLMMoDConfig) if f.name in VideoLLMMoDConfig.__annotations__}
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == ours
