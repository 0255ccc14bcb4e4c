# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Private names of libraries that our code uses, and names that libraries do not export.

A release may change them without notice. A new use fails until it is listed here with a reason. If a release drops a
name, the failure names it, the releases that have the name, and the one after which it went.
"""

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path

import pytest
import tomllib
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import videollm_mod


ROOT = Path(videollm_mod.__file__).parent
FOLDERS = ("benchmarks", "commands", "convert", "docs", "serving", "space", "tests", "train")
# The releases in which the names of each library were looked up, first the lowest that pyproject.toml allows. A name
# is in all of them, or in all from the one that `SINCE` gives.
CHECKED = {
    "accelerate": "1.10.0, 1.12.0, 1.15.0",
    "datasets": "4.0.0, 5.2.0",
    "evaluate": "0.4.6",
    "gradio": "6.31.0",
    "huggingface_hub": "1.31.0, 2.4.0",
    "lmms_eval": "0.7.3",
    "openai": "2.14.0, 3.57.0",
    "peft": "0.19.0, 0.20.0, 0.21.0, 0.21.2",
    "prometheus_client": "0.20.0, 0.26.0",
    "ray": "2.60.0",
    "torch": "2.11.0, 2.14.1",
    "tqdm": "4.67.1, 4.70.1",
    "transformers": "5.17.0, 5.18.0, 5.19.0, 5.20.0, 5.21.0, 5.22.0, 5.23.0, 5.24.0",
    "trl": "1.16.0",
}
# Names that a later release brought. Releases before it do not need them.
SINCE = {"_mask_length": "5.18.0"}
# Each name, the modules that have it, and why there is no public way.
USED = {
    "_actions": ("argparse", "Which options a parser has. The parser of TRL asks in the same way."),
    "_attn_implementation": ("transformers.configuration_utils", "Model files of Transformers read it, as ours do."),
    "_connection": ("openai.resources.realtime.realtime", "Tests cut a connection."),
    "_cuda_clearCublasWorkspaces": ("torch._inductor.cudagraph_trees", "CUDA graphs with workspaces of their own."),
    "_from_config": ("transformers.modeling_utils", "`AutoModel.from_config` requires a registered class."),
    "_gradient_checkpointing_func": ("transformers.modeling_layers", "Checkpointed layers of Transformers call it."),
    "_hf_api": ("transformers.utils.hub", "Tests make Transformers ask their own Hub."),
    "_hf_hook": ("accelerate.hooks", "Accelerate names no other way to ask where a module runs."),
    "_initialize_weights": ("transformers.modeling_utils", "`initialize_weights` does not reach the routers."),
    "_instances": ("tqdm.std", "Open bars would stand in the way of an error's line."),
    "_internal_call": ("transformers.trainer", "The trainer passes it, so an override must accept it."),
    "_mask_length": ("transformers.generation.configuration_utils", "Generation without a mask."),
    "_prepare_generation_config": ("transformers.generation.utils", "A session draws tokens as `generate` does."),
    "_private": ("ray.__init__", "Serve does not say that it waits for connections to end."),
    "_raise_exceptions_for_missing_entries": ("transformers.utils.hub", "Errors do not tell what is missing."),
    "_replica_impl": ("ray.serve._private.replica", "As for `_private`."),
    "_resolve_system_prompt": ("lmms_eval.api.model", "Its models read the option by this method."),
    "_scaled_dot_product_flash_attention_for_cpu": ("torch._meta_registrations", "A test counts this operation."),
    "_shared_state": ("accelerate.state", "A test begins without the state of earlier ones."),
    "_shutting_down": ("ray.serve._private.replica", "As for `_private`."),
    "_temp_dir": ("ray._private.worker", "Tests keep the paths of Ray's sockets short."),
    "_value": ("prometheus_client.metrics", "Tests read a counter."),
    "torch._C": ("torch", "As for `_cuda_clearCublasWorkspaces`."),
    "torch._assert_async": ("torch", "A check on a GPU that does not wait for it."),
    "torch._dynamo": ("torch", "Marks of dynamic sizes and of static addresses. Tests count graphs."),
    "torch._inductor": ("torch", "CUDA graphs in a thread of their own, and compiled code without its wrapper."),
    "torch._subclasses": ("torch", "Tests run on tensors without content."),
    "torch.utils._python_dispatch": ("torch", "`TorchDispatchMode`, which PyTorch's own pages recommend."),
    "torch.utils._pytree": ("torch", "Tests and benchmarks walk nested arguments of operations."),
    "torch.utils._triton": ("torch", "Whether the GPU is new enough for Triton, not only whether it is installed."),
}
# Methods and fields of the library's classes that ours replace.
REPLACED = {
    "_auto_class": ("transformers.modeling_utils", "Saved checkpoints bring their code."),
    "_can_compile_fullgraph": ("transformers.modeling_utils", "A flag of each model."),
    "_compute": ("evaluate.module", "The page on new metrics asks for it."),
    "_expand_inputs_for_generation": ("transformers.generation.utils", "Frames are repeated for beams."),
    "_get_arguments_from_pretrained": ("transformers.processing_utils", "Checkpoints without an image processor."),
    "_get_candidate_generator": ("transformers.generation.utils", "Prompt lookup copies no frames."),
    "_get_logits_processor": ("transformers.generation.utils", "Frame tokens are never generated."),
    "_info": ("evaluate.module", "The page on new metrics asks for it."),
    "_init_weights": ("transformers.modeling_utils", "The page on new models asks for it."),
    "_prefill": ("transformers.generation.utils", "Chunks end at the ends of frames."),
    "_prepare_cache_for_generation": ("transformers.generation.utils", "The cache of routed layers."),
    "_prepare_inputs": ("transformers.trainer", "Pixels are normalised on the device."),
    "_prepare_position_ids_for_generation": ("transformers.generation.utils", "Positions follow evicted frames."),
    "_save": ("transformers.trainer", "A checkpoint that is complete, or not there."),
    "_save_checkpoint": ("transformers.trainer", "As for `_save`."),
    "_skip_keys_device_placement": ("transformers.modeling_utils", "A cache stays where it is."),
    "_supports_attention_backend": ("transformers.modeling_utils", "A flag of each model."),
    "_supports_flash_attn": ("transformers.modeling_utils", "A flag of each model."),
    "_supports_flex_attn": ("transformers.modeling_utils", "A flag of each model."),
    "_supports_sdpa": ("transformers.modeling_utils", "A flag of each model."),
    "_tied_weights_keys": ("transformers.modeling_utils", "A flag of each model."),
}
# Modules with names that the library's first page does not export. `DOCUMENTED` ones have a page of their own.
DOCUMENTED = {
    "accelerate.state",
    "accelerate.utils",
    "datasets.exceptions",
    "huggingface_hub.dataclasses",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "peft.utils",
    "transformers.activations",
    "transformers.image_utils",
    "transformers.modeling_outputs",
    "transformers.processing_utils",
    "transformers.utils",
    "transformers.utils.logging",
    "transformers.video_utils",
}
NOT_EXPORTED = {
    "accelerate.commands.config.config_args": "Tests read our launch configurations as `accelerate launch` does.",
    "accelerate.commands.launch": "As above.",
    "datasets.config": "The names of the files that describe a data set.",
    "datasets.utils.py_utils": "Sizes such as 500MB are read as in `save_to_disk`.",
    "gradio.route_utils": "Tests delete old uploads as Gradio does.",
    "gradio.utils": "The folder of uploads.",
    "huggingface_hub.utils.sha": "The digest that the Hub stores for a large file.",
    "peft.tuners.lora": "Adapters of the language model's head are joined for the fused loss.",
    "peft.tuners.tuners_utils": "As above.",
    "transformers.cli.serve": "A test narrates through the library's own server.",
    "transformers.dynamic_module_utils": "Which files a checkpoint with code needs.",
    "transformers.generation.configuration_utils": "The names of static caches and of ways to generate.",
    "transformers.generation.streamers": "The base of streamers, which the pages on generation describe.",
    "transformers.initialization": "Weights that were loaded keep their values.",
    "transformers.integrations.peft": "Whether the installed PEFT is new enough for this Transformers.",
    "transformers.integrations.sdpa_attention": "Grouped attention begins with the library's.",
    "transformers.masking_utils": "Masks of routed layers.",
    "transformers.modeling_utils": "Attention functions by name, which the page on attention describes.",
    "transformers.models.auto.modeling_auto": "Which kinds of models there are.",
    "transformers.models.smolvlm.processing_smolvlm": "Tests compare with the published template.",
    "transformers.trainer_callback": "State that a callback saves, which the pages on callbacks describe.",
    "transformers.utils.chat_template_utils": "Templates that are not of the tokenizer.",
    "trl.models": "Weights that are split among processes are gathered for generation.",
    "trl.trainer.utils": "As above, for the loss.",
}
# One process reads all files once.
pytestmark = pytest.mark.xdist_group("private names")
LIBRARIES = {"accelerate", "datasets", "evaluate", "gradio", "huggingface_hub", "peft", "transformers", "trl"}
# Names of Python itself that are public.
PUBLIC = {"_asdict", "_current_frames", "_exit", "_replace"}
BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "setitem"}


def is_private(name: str) -> bool:
    """Return whether a name is private by convention."""
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in PUBLIC


@cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax tree of each file of ours."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def names_in(body: list[ast.stmt]) -> set[str]:
    """Return the names that the statements of a module or a class define."""
    targets = [t for node in body for t in getattr(node, "targets", [getattr(node, "target", None)]) if t is not None]
    assigned = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return assigned | {node.name for node in body if hasattr(node, "name")}


@cache
def own_names() -> tuple[set[str], set[str]]:
    """Return the names that our modules define, and those that our classes or their methods do."""
    of_modules, of_objects = set(), set()
    for tree in sources().values():
        of_modules |= names_in(tree.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                of_objects |= names_in(node.body)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_objects |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return of_modules, of_objects


def used_in(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of others in a file: "torch._dynamo" of modules, "_hf_hook" of objects."""
    of_modules, of_objects = own_names()
    for node in ast.walk(tree):
        dotted, given = [], []
        if isinstance(node, ast.ImportFrom) and not is_ours(node):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            is_known = node.attr in of_objects or (isinstance(node.value, ast.Name) and node.attr in of_modules)
            base = ast.unparse(node.value)
            if re.fullmatch(r"torch(\.(?!ops)[a-z]+)*", base):
                dotted = [f"{base}.{node.attr}"]
            elif not is_known:
                given = [node.attr]
        elif isinstance(node, ast.Call):
            words = [word.arg for word in node.keywords if word.arg]
            if getattr(node.func, "id", getattr(node.func, "attr", None)) in BY_NAME:
                words += [part.value for part in node.args if isinstance(part, ast.Constant)]
            given = [word for word in words if isinstance(word, str) and word not in of_modules | of_objects]
        for parts in (name.split(".") for name in dotted):
            first = next((i for i, part in enumerate(parts) if is_private(part)), None)
            if first:  # `import _thread` is Python's own
                yield ".".join(parts[: first + 1])
        yield from filter(is_private, given)


@cache
def found() -> dict[str, list[str]]:
    """Return the private names of others with the files that use them."""
    uses: dict[str, list[str]] = {}
    for file, tree in sources().items():
        for name in set(used_in(tree)):
            uses.setdefault(name, []).append(file)
    return uses


def subclassing_modules() -> Iterator[str]:
    """Yield the modules of ours with a class that has private names and derives from a library's class."""
    for file, tree in sources().items():
        if file.startswith(("benchmarks/", "docs/", "space/", "tests/")):
            continue
        imports = [node for node in tree.body if isinstance(node, ast.Import)]
        imports += [node for node in tree.body if isinstance(node, ast.ImportFrom) and not is_ours(node)]
        known = {alias.asname or alias.name for node in imports for alias in node.names}
        known -= {"ABC", "Enum", "NamedTuple", "Protocol"}
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        with_private = [node for node in classes if any(map(is_private, names_in(node.body)))]
        if any(ast.unparse(base).split(".")[0] in known for node in with_private for base in node.bases):
            yield "videollm_mod." + file.removesuffix(".py").replace("/", ".")


def is_ours(node: ast.ImportFrom) -> bool:
    """Return whether a line imports from this repository."""
    return node.level > 0 or node.module.split(".")[0] == "videollm_mod"


def not_exported() -> Iterator[tuple[str, str]]:
    """Yield the modules and the names of libraries that their first page does not export and that we import."""
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not is_ours(node):
                library = node.module.split(".")[0]
                exported = source_of(library) if library in LIBRARIES and node.module not in DOCUMENTED else None
                for name in (alias.name for alias in node.names):
                    if exported is None or re.search(rf"\b{name}\b", exported):
                        continue
                    if node.module != library:
                        yield node.module, name
                    elif source_of(f"{library}.{name}"):
                        yield f"{library}.{name}", name


@cache
def source_of(module: str) -> str | None:
    """Return the source of a library's module without importing it, or `None` if the library is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec and (spec.origin or "").endswith(".py") else ""


def package_of(library: str) -> str:
    """Return the name under which a library is installed."""
    return packages_distributions().get(library, [library])[0]


def missing(name: str, module: str) -> str:
    """Say that the installed release lacks a name, which releases have it, and after which one it went."""
    library = module.split(".")[0]
    if library in sys.stdlib_module_names:
        return f"Python {sys.version.split()[0]} has no {name} in {module}"
    package, begin = package_of(library), Version(SINCE.get(name, "0"))
    has = [number for number in CHECKED.get(library, "").split(", ") if number and Version(number) >= begin]
    said = f"{package} {version(package)} has no {name} in {module}"
    if not has:
        return f"{said}; no release of {package} was looked at: see CHECKED"
    if Version(version(package)) > Version(has[-1]):
        return f"{said}; {', '.join(has)} have it, so a release after {has[-1]} dropped or moved it"
    return f"{said}; {', '.join(has)} have it, so this one lacks it: see SINCE"


def test_private_names_of_libraries_are_listed():
    new = {name: files for name, files in found().items() if name not in USED}
    assert not new, f"use a public name, or list these in USED with a reason: {new}"
    assert set(USED) <= set(found()), f"no longer used: {set(USED) - set(found())}"


def test_replaced_private_methods_are_listed():
    replaced: dict[str, set[str]] = {}
    for name in set(subclassing_modules()):
        module = importlib.import_module(name)
        for cls in (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name):
            ours = [base for base in cls.__mro__ if base.__module__.startswith("videollm_mod")]
            private = {key for own in ours for key in vars(own) if is_private(key)} - {"_abc_impl"}
            for base in set(cls.__mro__) - set(ours) - {object}:
                for key in private & set(vars(base)):
                    replaced.setdefault(key, set()).add(f"{base.__module__}.{base.__name__}")
    new = {name: bases for name, bases in replaced.items() if name not in REPLACED}
    assert not new, f"rename these, or list them in REPLACED with a reason: {new}"
    gone = [missing(name, REPLACED[name][0]) for name in sorted(set(REPLACED) - set(replaced))]
    assert not gone, f"a library does not have these, so it never calls ours: {gone}"


def test_names_that_libraries_do_not_export_are_listed_and_exist():
    modules = {module for module, _ in not_exported()}
    assert modules == set(NOT_EXPORTED), "list what is new in NOT_EXPORTED with a reason, and remove what is not used"
    for module, name in set(not_exported()):
        text = source_of(module)
        is_there = module.endswith(f".{name}") or text is None or re.search(rf"\b{name}\b", text)
        assert is_there, missing(name, module)


@pytest.mark.parametrize("name", USED)
def test_the_installed_release_has_a_private_name(name):
    if name.startswith("torch."):
        is_there = importlib.util.find_spec(name) is not None or hasattr(torch, name.rpartition(".")[2])
        assert is_there, missing(name, "torch")
        return
    module = USED[name][0]
    library, text = module.split(".")[0], source_of(module)
    # Without the library, nothing can be compared. `make test` installs no Ray.
    if text is None:
        pytest.skip(f"needs {library}")
    if name in SINCE and Version(version(package_of(library))) < Version(SINCE[name]):
        pytest.skip(f"{library} has {name} since {SINCE[name]}")
    assert re.search(rf"\b{name}\b", text), missing(name, module)


def test_a_missing_name_is_told_with_the_releases_that_have_it(monkeypatch):
    module = USED["_mask_length"][0]
    for installed, said in (
        ("5.25.0", "5.18.0, .*, 5.24.0 have it, so a release after 5.24.0 dropped or moved it"),
        ("5.19.1", "5.18.0, .*, 5.24.0 have it, so this one lacks it: see SINCE"),
    ):
        monkeypatch.setattr(sys.modules[__name__], "version", lambda _, installed=installed: installed)
        assert re.fullmatch(
            f"transformers {installed} has no _mask_length in {module}; {said}", missing("_mask_length", module)
        )
    assert "5.17.0, 5.18.0" in missing("_from_config", "transformers.modeling_utils")
    assert missing("_x", "nobody").endswith("no release of nobody was looked at: see CHECKED")


def test_names_were_looked_up_in_releases_of_the_stated_ranges():
    """Also in the lowest of each range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated: dict[str, SpecifierSet] = {}
    for line in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        stated[name] = stated.get(name, SpecifierSet()) & requirement.specifier
    libraries = {library for library, *_ in (module.split(".") for module, _ in [*USED.values(), *REPLACED.values()])}
    libraries -= sys.stdlib_module_names
    assert set(CHECKED) == (libraries | {module.split(".")[0] for module in NOT_EXPORTED})
    for library, numbers in CHECKED.items():
        allowed = stated.get(canonicalize_name(library), SpecifierSet())
        assert not [number for number in numbers.split(", ") if number not in allowed], (library, str(allowed))
        least = [Version(part.version) for part in allowed if part.operator == ">="]
        assert not least or Version(numbers.split(", ")[0]) == max(least), f"look names up in {library} {max(least)}"
