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
"""The house rules that tools can check: who imports whom, what travels, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import videollm_mod


ROOT = Path(videollm_mod.__file__).parent
# What travels with a checkpoint, and which of its neighbours each file may import.
TRAVELLING = {
    "configuration_videollm_mod": {"routing_videollm_mod"},
    "cache_videollm_mod": set(),
    "routing_videollm_mod": set(),
    "streaming_videollm_mod": {"cache_videollm_mod"},
    "generation_videollm_mod": {"streaming_videollm_mod", "cache_videollm_mod"},
    "modeling_videollm_mod": {
        "configuration_videollm_mod",
        "cache_videollm_mod",
        "generation_videollm_mod",
        "routing_videollm_mod",
    },
    "video_reading_videollm_mod": set(),
    "video_processing_videollm_mod": set(),
    "processing_videollm_mod": {"video_processing_videollm_mod", "video_reading_videollm_mod"},
}
# What a user of the model has anyway. Anything else must stand in a `try` or under an `is_..._available()`.
ALLOWED = {"torch", "transformers", "huggingface_hub", "packaging", "numpy", "tokenizers"} | set(
    sys.stdlib_module_names
)


@pytest.mark.parametrize("module", TRAVELLING)
def test_arrows_point_one_way(module):
    path = ROOT / f"{module}.py"
    seen_by_the_scanner = set(get_relative_imports(path))
    assert seen_by_the_scanner <= TRAVELLING[module]
    # The scanner is two regular expressions; what Python would import must be no more than what it sees.
    tree = ast.parse(path.read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 0}
    assert imported == seen_by_the_scanner
    assert all(n.level <= 1 for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))


@pytest.mark.parametrize("module", TRAVELLING)
def test_nothing_unguarded_is_needed(module):
    assert set(get_imports(ROOT / f"{module}.py")) <= ALLOWED


def test_entry_files_bring_all_they_need_and_the_halves_never_meet():
    def brought(entry):
        return {Path(path).stem for path in get_relative_import_files(str(ROOT / f"{entry}.py"))}

    model_half, processor_half = brought("modeling_videollm_mod"), brought("processing_videollm_mod")
    assert not (model_half | {"modeling_videollm_mod"}) & (processor_half | {"processing_videollm_mod"})
    together = model_half | processor_half | {"modeling_videollm_mod", "processing_videollm_mod"}
    assert together == set(TRAVELLING)


def test_every_file_of_the_root_is_accounted_for():
    assert {path.stem for path in ROOT.glob("*_videollm_mod.py")} == set(TRAVELLING)
    for module in TRAVELLING:
        assert (ROOT / "tests" / f"test_{module}.py").exists(), f"no tests/test_{module}.py"


def test_importing_the_package_imports_and_registers_nothing():
    code = (
        "import sys, videollm_mod; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "assert 'VideoLLMMoDForConditionalGeneration' in dir(videollm_mod); "
        "from transformers import AutoConfig, AutoModel; videollm_mod.VideoLLMMoDForConditionalGeneration; "
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING; "
        "assert 'videollm_mod' not in CONFIG_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there():
    for name in videollm_mod.__all__:
        assert getattr(videollm_mod, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = videollm_mod.nonsense


@pytest.mark.parametrize("module", TRAVELLING)
def test_public_functions_are_annotated_and_described(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    assert ast.get_docstring(tree), f"{module} has no docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for parent in (tree, *classes) for node in parent.body if isinstance(node, ast.FunctionDef)]
    public = [c for c in classes if not c.name.startswith("_")]
    methods = [m for c in public for m in c.body if isinstance(m, ast.FunctionDef)]
    methods = [m for m in methods if not any(isinstance(d, ast.Attribute) for d in m.decorator_list)]  # no setters
    for node in public + methods + [f for f in tree.body if isinstance(f, ast.FunctionDef)]:
        if not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
    for function in functions:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not missing, f"{module}.{function.name} leaves {missing} unannotated"
