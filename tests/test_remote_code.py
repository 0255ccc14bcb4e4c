# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints load in a new process that cannot import this package: folders, the checkout itself, Hub revisions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from hub import Hub, commit_hash
from tiny import (
    SCHEMES,
    dialogue_ids,
    random_features,
    random_frames,
    tiny_config,
    tiny_model,
    tiny_processor,
    write_clip,
)

from videollm_mod.train.checkpoint_files import model_files


ROOT = Path(__file__).parents[1]
_PREAMBLE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "videollm_mod":
            raise ImportError("this process must do without the package")

sys.meta_path.insert(0, Refuse())
try:
    import videollm_mod
except ImportError:
    pass
else:
    raise SystemExit("the package is importable")

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoVideoProcessor

transformers.logging.set_verbosity_error()
trusted = {"trust_remote_code": True}
"""

# Each part runs in a process that has imported Transformers, and no remote code.
_IN_TURN = """
import os
for part in parts:
    if (child := os.fork()) == 0:
        exec(part, globals())
        raise SystemExit
    assert os.waitpid(child, 0)[1] == 0
"""

_LOAD = """
def load(scheme):
    kept = torch.load(f"{scheme}.pt")
    config = AutoConfig.from_pretrained(scheme, **trusted)
    assert type(config).__name__ == "VideoLLMMoDConfig" and config.routed_layers == kept["routed"]
    assert AutoVideoProcessor.from_pretrained(scheme, **trusted).size["height"] == 32
    processor = AutoProcessor.from_pretrained(scheme, **trusted)
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, name).from_pretrained(scheme, dtype="auto", **trusted).eval()
        assert type(model).__name__ == "VideoLLMMoDForConditionalGeneration", type(model)
        with torch.no_grad():
            outputs = model(input_ids=kept["ids"], frame_features=kept["features"])
        assert torch.equal(outputs.logits, kept["logits"]), (scheme, name)
        assert outputs.cache.lengths == kept["lengths"]
    events = [(e.time, e.text) for e in model.narrate(processor, "clip.mp4", "Narrate.", **kept["options"])]
    assert events == kept["events"], (scheme, events, kept["events"])
    session = model.stream(processor, fps=2)
    session.push(kept["frames"])
    assert session.num_frames == len(kept["frames"])
    inputs = {"input_ids": kept["ids"], "frame_features": kept["features"]}
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), kept["generated"]), scheme
    return model, processor
"""


def run(*parts, folder, cwd=None, **variables):
    """Run parts of code in a new process each, in a folder, or in another with their caches in that folder."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "TOKENIZERS_PARALLELISM": "false",
        **variables,
    }
    environment.pop("PYTHONPATH", None)
    code = f"{_PREAMBLE}parts = {parts}{_IN_TURN}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd or folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def checkpoint(folder: Path, scheme: str) -> None:
    """Write a checkpoint with the name of its scheme, a clip, and what the model computes for them in this process."""
    processor = tiny_processor()
    model = tiny_model(tiny_config(**SCHEMES[scheme]))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    model.save_pretrained(folder / scheme)
    processor.save_pretrained(folder / scheme)
    clip = write_clip(folder / "clip.mp4", random_frames(30, size=(48, 64)), fps=10)
    ids, features = dialogue_ids(model.config, [2, 1]), random_features(model.config, 3)
    options = {"max_new_tokens": 4, "interval_threshold": 0.004}
    with torch.no_grad():
        outputs = model(input_ids=ids, frame_features=features)
    expected = {
        "routed": model.config.routed_layers,
        "ids": ids,
        "features": features,
        "logits": outputs.logits,
        "lengths": outputs.cache.lengths,
        "options": options,
        "events": [(e.time, e.text) for e in model.narrate(processor, clip, "Narrate.", **options)],
        "frames": list(torch.from_numpy(random_frames(3))),
        "generated": model.generate(input_ids=ids, frame_features=features, max_new_tokens=3, do_sample=False),
    }
    torch.save(expected, folder / f"{scheme}.pt")


def test_checkpoint_folders_load_alone_and_save_themselves(tmp_path):
    """One process loads them and saves them in shards. Another loads what it saved, without the first folders."""
    schemes = ("full", "interleaved", "all")
    for scheme in schemes:
        checkpoint(tmp_path, scheme)
    save = f"""
for scheme in {schemes}:
    model, processor = load(scheme)
    model.save_pretrained(f"again/{{scheme}}", max_shard_size="60KB")
    processor.save_pretrained(f"again/{{scheme}}")
"""
    move = f"""
import shutil
from pathlib import Path
shutil.rmtree("modules")
for scheme in {schemes}:
    assert len(list(Path("again", scheme).glob("*.safetensors"))) > 1
    shutil.rmtree(scheme)
    Path("again", scheme).rename(scheme)
"""
    again = f"for scheme in {schemes}: load(scheme)"
    run(_LOAD + save, move + _LOAD + again, folder=tmp_path)


_STORY = f"""
story = {json.loads((ROOT / "samples" / "streamworld.json").read_text(encoding="utf-8"))["events"]}
def narrate(where):
    config = AutoConfig.from_pretrained(where, **trusted)
    model = transformers.AutoModel.from_pretrained(where, **trusted)
    processor = AutoProcessor.from_pretrained(where, **trusted)
    assert type(model.config) is type(config) and model.config.routed_layers
    query = "Please narrate the video in real time."
    events = list(model.narrate(processor, {str(ROOT / "samples" / "streamworld.mp4")!r}, query))
    assert [[e.time, e.text] for e in events if e.role == "assistant"] == story, events
    return model, processor
"""


def test_the_checkout_is_a_checkpoint(tmp_path):
    """It loads from within and by its path, and what it saves is complete and loads elsewhere."""
    again, more = tmp_path / "again", tmp_path / "more"
    save = "for part in narrate({!r}): part.save_pretrained({!r})"
    within = save.format(".", str(again))
    (tmp_path / "elsewhere").mkdir()
    by_path = f"os.chdir({str(tmp_path / 'elsewhere')!r})\nnarrate({str(again)!r})\n" + save.format(
        str(ROOT), str(more)
    )
    run(_STORY + within, _STORY + by_path, folder=tmp_path, cwd=ROOT)
    for folder in (again, more):
        saved = {path.name for path in folder.iterdir()}
        assert saved == model_files(ROOT).keys() - {"LICENSE", "golden.json"} == model_files(folder).keys()


def test_remote_code_needs_trust_and_a_transformers_that_it_supports(tmp_path):
    """Code that is not trusted is refused, an old Transformers is refused, and a future one gets a warning."""
    checkpoint(tmp_path, "interleaved")
    for name in ("untrusted", "old", "future"):
        shutil.copytree(tmp_path / "interleaved", tmp_path / name)
    code = """
import logging
try:
    transformers.AutoModel.from_pretrained("untrusted", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise SystemExit("remote code ran without trust")

warned = []
class Keep(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("transformers").addHandler(Keep())
transformers.logging.set_verbosity_warning()
logging.getLogger("transformers_modules").addHandler(Keep())
sys.modules["transformers"].__version__ = "6.1.0"
AutoConfig.from_pretrained("future", **trusted)
assert any(">= 5.17.0 and < 6.0.0, found 6.1.0" in text for text in warned), warned

sys.modules["transformers"].__version__ = "5.3.0"
try:
    AutoConfig.from_pretrained("old", **trusted)
except ImportError as error:
    assert "needs transformers >= 5.17.0, found 5.3.0" in str(error)
else:
    raise SystemExit("an old version was accepted")
"""
    run(code, folder=tmp_path)


def test_revisions_of_model_and_code_load_from_the_hub_and_from_the_cache(tmp_path):
    """Of three commits, the second changes the threshold and the third changes the code."""
    checkpoint(tmp_path, "interleaved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "interleaved").iterdir()}
    config = json.loads(files["config.json"]) | {"interval_threshold": 0.25}
    code = files["configuration_videollm_mod.py"] + b"\nVideoLLMMoDConfig.marker = 'third'\n"
    second = {**files, "config.json": json.dumps(config).encode()}
    with Hub() as hub:
        hub.repos["somebody/tiny"] = [files, second, {**second, "configuration_videollm_mod.py": code}]
        first, newest = commit_hash("somebody/tiny", 0), commit_hash("somebody/tiny", 2)
        load = f"""
def look(**revisions):
    config = AutoConfig.from_pretrained("somebody/tiny", **trusted, **revisions)
    model = transformers.AutoModel.from_pretrained("somebody/tiny", **trusted, **revisions)
    assert AutoProcessor.from_pretrained("somebody/tiny", **trusted, **revisions).frame_num_tokens == 10
    assert config.interval_threshold == model.config.interval_threshold
    return config.interval_threshold, getattr(type(model.config), "marker", None)

assert look(revision="{first}") == (0.725, None)
assert look(revision="{first}", code_revision="{newest}") == (0.725, "third")
assert look() == (0.25, "third")
"""
        run(load, folder=tmp_path, **hub.environment(tmp_path / "hf"))
    # Without the Hub, the cache serves them.
    run(load, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
