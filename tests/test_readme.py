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
"""The README: its Python runs as it stands, and what it points at is there."""

import re
from pathlib import Path

import pytest
from tiny import random_frames


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(monkeypatch, capsys):
    """All blocks, in order, in one namespace, from the root of the checkout."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace = {"camera": list(random_frames(3))}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert re.search(r"\d+\.\ds  A \w+ \w+ enters from the \w+\.", printed)
    assert (
        "of the operations" in printed and namespace["batch"]["labels"].shape == namespace["batch"]["input_ids"].shape
    )


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_its_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_what_it_points_at_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    scripts = re.findall(r"python ((?:docs|benchmarks|train)/\S+\.py)", README)
    assert links and scripts
    for path in links + scripts:
        assert (ROOT / path).exists(), path
