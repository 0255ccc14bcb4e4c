# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The layout of the repository: what travels with a checkpoint, who imports whom, and how long files may be."""

import ast
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import videollm_mod


ROOT = Path(videollm_mod.__file__).parent
# The files that travel with a checkpoint, and the travelling files that each may import.
TRAVELLING = {
    "configuration_videollm_mod": {"routers_videollm_mod"},
    "cache_videollm_mod": set(),
    "checks_videollm_mod": set(),
    "routers_videollm_mod": set(),
    "routing_videollm_mod": {"routers_videollm_mod"},
    "compiled_step_videollm_mod": {"cache_videollm_mod"},
    "remembering_videollm_mod": {"cache_videollm_mod", "checks_videollm_mod"},
    "speaking_videollm_mod": {"checks_videollm_mod"},
    "frame_reuse_videollm_mod": {"checks_videollm_mod"},
    "streaming_videollm_mod": {
        "cache_videollm_mod",
        "checks_videollm_mod",
        "compiled_step_videollm_mod",
        "speaking_videollm_mod",
        "frame_reuse_videollm_mod",
        "remembering_videollm_mod",
    },
    "generation_videollm_mod": {
        "cache_videollm_mod",
        "remembering_videollm_mod",
        "speaking_videollm_mod",
        "streaming_videollm_mod",
    },
    "modeling_videollm_mod": {
        "configuration_videollm_mod",
        "cache_videollm_mod",
        "checks_videollm_mod",
        "generation_videollm_mod",
        "routers_videollm_mod",
        "routing_videollm_mod",
    },
    "video_opening_videollm_mod": set(),
    "video_reading_videollm_mod": {"checks_videollm_mod", "video_opening_videollm_mod"},
    "reading_ahead_videollm_mod": {"checks_videollm_mod"},
    "video_processing_videollm_mod": set(),
    "stream_format_videollm_mod": set(),
    "processing_videollm_mod": {
        "checks_videollm_mod",
        "video_opening_videollm_mod",
        "video_processing_videollm_mod",
        "video_reading_videollm_mod",
        "reading_ahead_videollm_mod",
        "stream_format_videollm_mod",
    },
}
# Every user of the model has these. Other imports must stand in a `try` or under an `is_..._available()`.
ALLOWED = {"torch", "transformers", "huggingface_hub", "packaging", "numpy", "safetensors", "tokenizers"} | set(
    sys.stdlib_module_names
)
# Packages that a file imports in a `try`, or for type checkers only.
GUARDED = {
    "av": {"video_opening_videollm_mod", "video_reading_videollm_mod"},
    "PIL": {"processing_videollm_mod"},
    "peft": {"modeling_videollm_mod"},
}
# Modules of Python that reach files, the network, other programs or code. One travelling file opens videos with some.
SYSTEM = {"ctypes", "http", "importlib", "marshal", "multiprocessing", "pickle", "runpy", "shelve", "shutil", "socket"}
SYSTEM |= {"ssl", "subprocess", "tempfile", "urllib", "zipfile"}
FOLDERS = {"benchmarks", "commands", "convert", "docs", "samples", "serving", "space", "tests", "train"}
# The files of `serving/` from the bottom up: each imports files above it in this list only.
SERVING = ("faults", "pages", "memory", "entries", "kernels", "packed_cache", "step", "saved_files", "saving")
SERVING += ("stream", "stats", "compiled_step", "encoding", "captured_step", "step_runner", "engine")
# The server, which `__init__` does not import: it needs the extra `serve`.
SERVING += ("presence", "state_folder", "limits", "bodies", "fetching", "metrics")
SERVING += ("session_options", "telling", "opening", "text_limits", "live_session", "live_sessions")
SERVING += ("speech_endpoints", "realtime_events", "hearing", "speaking")
SERVING += ("realtime", "event_fields", "realtime_audio", "realtime_requests")
SERVING += ("session_state", "wanted_sessions", "saved_sessions")
SERVING += ("error_answers", "access", "connections", "chat_messages", "chat", "server", "draining", "ray_app")
SERVING += ("__init__",)


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def modules_imported(path, *, everywhere):
    """Return the absolute names of imported modules: at the top of a file, or everywhere in it."""
    package = ["videollm_mod", *path.parent.relative_to(ROOT).parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def file_of(module):
    """Return the file of a module of ours, or `None`."""
    path = ROOT.joinpath(*module.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py") if module.startswith("videollm_mod.") else ()
    return next((path for path in candidates if path.exists()), None)


def reached_from(path):
    """Return the files of ours that importing this file imports, by the imports at the top of each."""
    seen, todo = set(), [path]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += filter(None, map(file_of, modules_imported(current, everywhere=False)))
    return seen


# -------------------------------------------------------------------------------------------------------- the tree


def test_every_file_of_the_root_is_accounted_for():
    assert {path.stem for path in ROOT.glob("*_videollm_mod.py")} == set(TRAVELLING)
    for module in TRAVELLING:
        assert (ROOT / "tests" / f"test_{module}.py").exists(), f"no tests/test_{module}.py"
    for name in ("config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        assert (ROOT / name).exists(), f"the root is a checkpoint, but has no {name}"


def test_the_folders_are_those_of_the_design():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        # Without git nothing tells the project's folders from those that tools have made beside them.
        pytest.skip("an archive of the sources does not list its files")
    folders = {name.split("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert {folder for folder in folders if not folder.startswith(".")} == FOLDERS
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_model_file_has_under_700_lines():
    assert lines(ROOT / "modeling_videollm_mod.py") < 700


def test_travelling_files_have_under_7620_lines_together():
    counts = {module: lines(ROOT / f"{module}.py") for module in TRAVELLING}
    assert sum(counts.values()) < 7620, counts


def test_files_of_serving_have_at_most_500_lines():
    counts = {path.name: lines(path) for path in (ROOT / "serving").glob("*.py")}
    assert max(counts.values()) <= 500, counts


# ---------------------------------------------------------------------------------------------------- who imports whom


@pytest.mark.parametrize("module", TRAVELLING)
def test_a_travelling_file_imports_what_its_row_allows(module):
    path = ROOT / f"{module}.py"
    seen_by_the_scanner = set(get_relative_imports(path))
    assert seen_by_the_scanner <= TRAVELLING[module]
    # The library's scanner is two regular expressions: Python must not import more than it sees.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 0}
    assert imported == seen_by_the_scanner
    assert all(n.level <= 1 for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))
    assert not any(
        name.startswith("videollm_mod") and ".serving" in name for name in modules_imported(path, everywhere=True)
    )


@pytest.mark.parametrize("module", TRAVELLING)
def test_a_travelling_file_needs_only_what_every_user_has(module):
    assert set(get_imports(ROOT / f"{module}.py")) <= ALLOWED


@pytest.mark.parametrize("module", TRAVELLING)
def test_a_travelling_file_imports_no_other_package_anywhere(module):
    """Transformers' scanner does not look into a `try`, nor below `if is_..._available()`."""
    path = ROOT / f"{module}.py"
    found = {name.split(".")[0] for name in modules_imported(path, everywhere=True)} - {"videollm_mod", ""}
    assert found - ALLOWED == {package for package, files in GUARDED.items() if module in files}
    assert not found & SYSTEM or module == "video_opening_videollm_mod", found & SYSTEM
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)}
    assert not calls & {"__import__", "eval", "exec", "import_module", "importlib.import_module", "torch.load"}


def test_every_user_of_transformers_has_the_packages_that_travelling_files_import():
    needed = {Requirement(line) for line in metadata.requires("transformers")}
    names = {each.name.replace("-", "_") for each in needed if not each.marker or "extra" not in str(each.marker)}
    assert ALLOWED - set(sys.stdlib_module_names) - {"torch", "transformers"} <= names


def test_entry_files_bring_all_they_need_and_the_halves_share_only_the_checks():
    def brought(entry):
        return {Path(path).stem for path in get_relative_import_files(str(ROOT / f"{entry}.py"))}

    model_half, processor_half = brought("modeling_videollm_mod"), brought("processing_videollm_mod")
    shared = (model_half | {"modeling_videollm_mod"}) & (processor_half | {"processing_videollm_mod"})
    assert shared == {"checks_videollm_mod"}
    together = model_half | processor_half | {"modeling_videollm_mod", "processing_videollm_mod"}
    assert together == set(TRAVELLING)


def test_servers_and_posts_live_where_the_design_puts_them():
    """Reading video and the Hub's client open connections too, in libraries."""
    files = [path for folder in (".", "commands", "convert", "train") for path in (ROOT / folder).glob("*.py")]
    network = {"http", "httpx", "openai", "requests", "socketserver", "urllib.request"}
    found = {path.relative_to(ROOT).as_posix() for path in files if network & modules_imported(path, everywhere=True)}
    assert found == {"commands/alert.py", "train/endpoint.py"}


@pytest.mark.parametrize("entry", ["cli", "__init__", "modeling_videollm_mod", "processing_videollm_mod"])
def test_importing_an_entry_file_does_not_import_serving(entry):
    assert not {path.name for path in reached_from(ROOT / f"{entry}.py") if path.parent.name == "serving"}


def test_files_of_serving_import_downwards():
    assert {path.stem for path in (ROOT / "serving").glob("*.py")} == set(SERVING)
    for index, name in enumerate(SERVING):
        found = filter(None, map(file_of, modules_imported(ROOT / "serving" / f"{name}.py", everywhere=True)))
        assert {path.stem for path in found if path.parent.name == "serving"} <= set(SERVING[:index]), name


# ------------------------------------------------------------------------------------------------- what importing does


def test_importing_the_package_imports_and_registers_nothing_and_narrating_does_not_import_serving():
    code = """
import sys, videollm_mod
assert 'torch' not in sys.modules and 'transformers' not in sys.modules
assert 'VideoLLMMoDForConditionalGeneration' in dir(videollm_mod)
from transformers import AutoConfig, AutoModel
videollm_mod.VideoLLMMoDForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert 'videollm_mod' not in CONFIG_MAPPING

from videollm_mod.cli import app
try:
    app(['narrate', 'samples/streamworld.mp4'])
except SystemExit as end:
    assert not end.code, end.code
found = [name for name in sys.modules if name.startswith('videollm_mod.serving')]
assert 'torch' in sys.modules and not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "enters from the" in done.stdout


def test_public_names_exist():
    for name in videollm_mod.__all__:
        assert getattr(getattr(videollm_mod, name), "__name__", name) == name
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


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_warning_of_what_a_release_removes_is_an_error_in_our_lines_only(category):
    with pytest.raises(category, match="use another name"):
        warnings.warn("use another name", category, stacklevel=1)
    with pytest.warns(category):
        warnings.warn_explicit("use another name", category, "torch/nn.py", 1, module="torch.nn")
