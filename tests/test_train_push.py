# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing to a loopback Hub."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gradio
import pytest
from gradio_client import Client, handle_file
from hub import TOKEN, Hub, commit_hash
from huggingface_hub import snapshot_download
from killing import small_disk
from programs import run_main
from safetensors.torch import load, load_file, save_file
from tiny import copy_embedded, embedded_files
from transformers import AutoModel, AutoProcessor

import videollm_mod.train.push
from videollm_mod.train.checkpoint_files import FACTS_PAGE, checkpoint_files, model_files
from videollm_mod.train.push import main


ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT
REPO, SPACE = "somebody/narrator", "somebody/watch"
QUERY = "Please narrate the video in real time."


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def push(hub, home, *arguments, **variables):
    with hub.used_here(home), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return run_main(main, *arguments, program="push.py")


def test_a_checkpoint_is_published_in_one_commit_and_loaded(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    (checkpoint / "checkpoint-500").mkdir()
    (checkpoint / "checkpoint-500" / "optimizer.pt").write_bytes(b"0" * 100)
    (checkpoint / "training_args.bin").write_bytes(b"0" * 100)
    done = push(hub, tmp_path / "home", checkpoint, REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{REPO}@{commit_hash(REPO, 1)}, loaded from there"
    assert len(hub.repos[REPO]) == 2, "one commit after the empty one"
    published, own = dict(hub.files(REPO)), embedded_files()
    assert published.keys() == own.keys()
    assert {name for name, data in published.items() if data != own[name]} <= {"README.md", FACTS_PAGE, "golden.json"}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(
        TOKEN in path.read_text(errors="ignore") for path in (tmp_path / "home").rglob("*") if path.is_file()
    )


def test_large_weights_are_split(hub, tmp_path):
    done = push(hub, tmp_path / "home", EMBEDDED, REPO, "--max_shard_size", "3MB", "--no_verify")
    assert done.returncode == 0, done.stderr
    shards = {name: data for name, data in hub.files(REPO).items() if name.endswith(".safetensors")}
    assert len(shards) >= 3 and all(len(data) < 3.1e6 for data in shards.values())
    assert "golden.json" in hub.files(REPO), "it is about tensors, not about files"
    whole = load((EMBEDDED / "model.safetensors").read_bytes())
    parts = {name: weight for data in shards.values() for name, weight in load(data).items()}
    assert parts.keys() == whole.keys() and all((parts[name] == whole[name]).all() for name in whole)
    assert "model.safetensors.index.json" in hub.files(REPO)
    # Published again in one file, the shards are gone.
    done = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify", "--force")
    assert [name for name in hub.files(REPO) if "safetensors" in name] == ["model.safetensors"], done.stderr


def test_another_model_is_not_overwritten_unless_forced(hub, tmp_path):
    assert push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify").returncode == 0
    other = copy_embedded(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "mod_keep_ratio": 0.5, "transformers_version": "9"}))
    refused = push(hub, tmp_path / "home", other, REPO, "--no_verify")
    assert refused.returncode == 1 and len(hub.repos[REPO]) == 2
    assert refused.stderr.strip().splitlines()[-1] == (
        f"error: '{REPO}' holds another model. It differs in: mod_keep_ratio. --force replaces it."
    )
    assert push(hub, tmp_path / "home", other, REPO, "--no_verify", "--force").returncode == 0
    assert json.loads(hub.files(REPO)["config.json"])["mod_keep_ratio"] == 0.5
    # The same model after more training needs no --force. The trainer has changed a few fields.
    config = json.loads((other / "config.json").read_text())
    config |= {"use_cache": False, "text_config": {**config["text_config"], "dtype": "bfloat16"}}
    (other / "config.json").write_text(json.dumps(config))
    again = push(hub, tmp_path / "home", other, REPO, "--no_verify")
    assert again.returncode == 0, again.stderr


def test_other_weights_of_the_same_configuration_are_another_model(hub, tmp_path):
    assert push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify").returncode == 0
    other = copy_embedded(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.connector.linear_1.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    refused = push(hub, tmp_path / "home", other, REPO, "--no_verify")
    assert refused.returncode == 1 and len(hub.repos[REPO]) == 2
    assert f"error: '{REPO}' holds other weights of the same configuration. --force" in refused.stderr
    same = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify", "--json")
    assert same.returncode == 0, "the same model can be published again"
    assert json.loads(same.stdout) == {"repo": REPO, "commit": commit_hash(REPO, 2), "loaded": False}
    assert push(hub, tmp_path / "home", other, REPO, "--no_verify", "--force").returncode == 0
    assert "golden.json" not in hub.files(REPO), "the folder has that of other weights"
    assert load(hub.files(REPO)["model.safetensors"])["model.connector.linear_1.bias"].equal(
        weights["model.connector.linear_1.bias"]
    )


def test_nothing_is_published_if_the_hub_refuses_the_card(hub, tmp_path):
    other = copy_embedded(tmp_path / "other")
    (other / "README.md").write_text("# other\n\nNo metadata.\n")
    refused = push(hub, tmp_path / "home", other, REPO, "--no_verify")
    assert refused.returncode == 1 and "error: Invalid metadata in README.md" in refused.stderr
    assert hub.repos[REPO] == [{}]


def test_a_repository_with_other_files_is_changed_only_with_force(hub, tmp_path):
    hub.repos[REPO] = [{}, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"0", "notes.txt": b"mine"}]
    refused = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert refused.returncode == 1 and "holds other files: adapter_config.json" in refused.stderr
    forced = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify", "--force")
    assert forced.returncode == 0, forced.stderr
    assert hub.files(REPO)["notes.txt"] == b"mine", "files that are not part of a model stay"
    assert not [name for name in hub.files(REPO) if "adapter" in name], "an adapter would be loaded on top"


def test_a_checkpoint_without_a_card_gets_a_plain_one(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    (checkpoint / "README.md").unlink()
    done = push(hub, tmp_path / "home", checkpoint, REPO, "--no_verify")
    assert done.returncode == 0, done.stderr
    card = hub.files(REPO)["README.md"].decode()
    assert f"# {REPO}" in card and f'AutoModel.from_pretrained("{REPO}", trust' in card and "What it costs" in card
    assert "Its training data is not documented." in card and "routing.png" in hub.files(REPO)


def test_model_and_processor_push_themselves(hub, tmp_path):
    """`push_to_hub` publishes a model that any user can load with its code."""
    with hub.used_here(tmp_path / "home"):
        AutoModel.from_pretrained(EMBEDDED, trust_remote_code=True).push_to_hub(REPO)
        AutoProcessor.from_pretrained(EMBEDDED, trust_remote_code=True).push_to_hub(REPO)
    assert {"config.json", "modeling_videollm_mod.py"} <= set(hub.files(REPO))
    look = f"""
from transformers import AutoModel, AutoProcessor
options = {{"trust_remote_code": True}}
model = AutoModel.from_pretrained({REPO!r}, **options)
processor = AutoProcessor.from_pretrained({REPO!r}, **options)
sample = {str(EMBEDDED / "samples" / "streamworld.mp4")!r}
print(sum(event.role == "assistant" for event in model.narrate(processor, sample, query="Narrate.")))
"""
    environment = {**os.environ, **hub.environment(tmp_path / "other")}
    seen = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert seen.returncode == 0 and int(seen.stdout) > 0, seen.stderr


def test_a_failed_check_does_not_count_as_an_empty_repository(hub, tmp_path):
    hub.repos[REPO] = [{}, {"config.json": b'{"model_type": "other"}', "model.safetensors": b"0"}]
    hub.failures += ["HEAD .*config.json"] * 20
    failed = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and len(hub.repos[REPO]) == 2, failed.stderr


def test_a_full_disk_is_no_interrupted_upload(hub, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, small_disk(2000):
        patch.setattr(tempfile, "tempdir", str(folder))
        done = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert done.returncode == 1
    assert f"error: '{folder}' or '" in done.stderr and "cannot be written: File too large. Free some" in done.stderr
    assert hub.repos[REPO] == [{}] and not list(folder.iterdir())


def test_a_model_without_some_of_its_weights_is_not_published(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "connector" not in name}, checkpoint / "model.safetensors")
    done = push(hub, tmp_path / "home", checkpoint, REPO)
    assert done.returncode == 1 and "of the model's weights are missing, such as model.connector" in done.stderr
    assert hub.repos[REPO] == [{}]


@pytest.mark.parametrize("where", ["PUT .*upload", "POST .*/commit/"])
def test_an_interrupted_upload_is_reported_and_resumed(hub, tmp_path, where):
    hub.failures += [where] * 20
    broken = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert "error: The upload was interrupted" in broken.stderr and "Run the same command again" in broken.stderr
    assert hub.repos[REPO] == [{}], "no partial commit is visible"
    hub.failures.clear()
    hub.requests.clear()
    done = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert done.returncode == 0, done.stderr
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert len(sent) == (1 if where.startswith("PUT") else 0), "files are not sent twice"


def test_mistakes_get_one_line_each(hub, tmp_path):
    for arguments, variables, message in (
        ((tmp_path, REPO), {}, "has no config.json: give the folder of a checkpoint"),
        ((ROOT / "sampels", REPO), {}, f"sampels'; did you mean '{ROOT / 'samples'}'?"),
        ((EMBEDDED, "no such name!"), {}, "is not a valid repository name"),
        ((EMBEDDED, REPO), {"HF_TOKEN": "hf_wrong"}, "The Hub does not know this user: run `hf auth login`"),
        ((EMBEDDED, REPO), {"HF_TOKEN": ""}, "run `hf auth login`, or set HF_TOKEN"),
    ):
        failed = push(hub, tmp_path / "home", *arguments, "--no_verify", **variables)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr[-2000:]
        assert message in failed.stderr, failed.stderr
    half = copy_embedded(tmp_path / "half")
    (half / "modeling_videollm_mod.py").unlink()
    failed = push(hub, tmp_path / "home", half, REPO)
    assert "it lacks modeling_videollm_mod.py" in failed.stderr and not hub.repos


# ------------------------------------------------------------------------------------------------------- a checkout


def test_a_checkout_publishes_its_checkpoint_and_card_only(hub, tmp_path):
    names = checkpoint_files(ROOT).keys()
    assert names >= {"README.md", "LICENSE", "config.json", "model.safetensors", "processing_videollm_mod.py"}
    assert {path.name for path in ROOT.glob("*_videollm_mod.py")} == {name for name in names if name.endswith(".py")}
    others = names - model_files(ROOT).keys() - {"README.md", FACTS_PAGE}
    assert all(name.startswith("docs/") and name.endswith((".png", ".gif")) for name in others), others
    done = push(hub, tmp_path / "home", ROOT, REPO, "--no_verify")
    assert done.returncode == 0, done.stderr
    assert hub.files(REPO).keys() == names


def test_other_files_of_the_owner_are_not_published(hub, tmp_path, monkeypatch):
    checkpoint, space = copy_embedded(tmp_path / "checkpoint"), tmp_path / "space"
    shutil.copytree(ROOT / "space", space, ignore=lambda *_: ["__pycache__"])
    page = {path.name for path in space.iterdir()} - {"__init__.py"}
    monkeypatch.setattr(videollm_mod.train.push, "SPACE", space)
    parts = {*model_files(checkpoint), "merges.txt", "tokenizer.model", "preprocessor_config.json", "NOTICE.md"}
    parts |= {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    parts |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    mine = {"notes.txt", "report.json", "trainer_state.json", "model_before.safetensors", "faces.model", ".env"}
    for name in (parts | mine | {"adapter/README.md"}) - model_files(checkpoint).keys():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}")
    for name in (".env", "nohup.out", "notes.txt", "report.json", "page.html"):
        (space / name).write_text("mine")
    assert model_files(checkpoint).keys() == parts
    for name in parts - model_files(ROOT).keys():
        (checkpoint / name).unlink()
    for arguments in ((checkpoint, REPO, "--no_verify"), ("--space", SPACE)):
        done = push(hub, tmp_path / "home", *arguments)
        assert done.returncode == 0, done.stderr
    assert hub.files(REPO).keys() == embedded_files().keys()
    assert {name for name in hub.files(f"spaces/{SPACE}") if "/" not in name} == page


def test_a_wheel_carries_the_checkpoint_and_the_page():
    """`make release-check` builds one and runs it."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, files in (("", model_files(ROOT).values()), (".space", (ROOT / "space").iterdir())):
        patterns = [*tables["package-data"][f"videollm_mod{package}"], "*.py", "LICENSE"]
        left = [path.name for path in files if path.is_file() and not any(map(path.match, patterns))]
        assert left == []


def test_links_of_a_published_card_lead_somewhere(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    (checkpoint / "docs" / "seen.png").write_bytes(b"0")
    (checkpoint / "docs" / "secret.md").write_text("# Not published\n")
    front = "---\nlicense: apache-2.0\n---\n\n# A model\n\n"
    load = '```python\nAutoModel.from_pretrained("{}", trust_remote_code=True)\n```\n'
    (checkpoint / "README.md").write_text(
        f"{front}![Seen](docs/seen.png) [paper](https://arxiv.org/abs/2408.16730), [facts]({FACTS_PAGE}#limits), "
        f"[more](docs/secret.md), [up](#a-model).\n\n{load.format('.')}"
    )
    done = push(hub, tmp_path / "home", checkpoint, REPO, "--no_verify")
    assert done.returncode == 0, done.stderr
    assert hub.files(REPO)["README.md"].decode() == (
        f"{front}![Seen](docs/seen.png) [paper](https://arxiv.org/abs/2408.16730), [facts]({FACTS_PAGE}#limits), "
        f"more, [up](#a-model).\n\n{load.format(REPO)}"
    )
    assert {"docs/seen.png", FACTS_PAGE} <= hub.files(REPO).keys() and "docs/secret.md" not in hub.files(REPO)


# ---------------------------------------------------------------------------------------------------------- a Space


def start(folder, home, **variables):
    """Run `python app.py` in a folder, in a process that cannot import the package; return it and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "refuse").mkdir(parents=True)
    (home / "refuse" / "sitecustomize.py").write_text(REFUSE)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    environment = {**os.environ, "PYTHONPATH": str(home / "refuse"), "GRADIO_TEMP_DIR": str(home / "uploads")}
    environment |= {**offline, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port)}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, "app.py"], cwd=folder, env=environment, **pipes
    ), f"http://127.0.0.1:{port}"


REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "videollm_mod":
            raise ImportError("this process must do without the package")

sys.meta_path.insert(0, Refuse())
"""


def narrate(process, url, folder):
    """Return what the page at an address narrates of the sample, then stop it."""
    try:
        for _ in range(600):
            try:
                client = Client(url, verbose=False, download_files=str(folder))
                break
            except Exception:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.2)
        sample = handle_file(ROOT / "samples" / "streamworld.mp4")
        client.predict(sample, fps=2, interval_threshold=0.5, query=QUERY, api_name="/open_video")
        for _ in range(60):
            *_, said = client.predict(frames=[], until=30.0, jump=None, api_name="/watch")
            if isinstance(said, list) and len(said) == 6:
                return [[e["time"], e["text"]] for e in said if e["role"] == "assistant"]
    finally:
        process.terminate()
        process.wait()
        printed = process.stdout.read().splitlines()
        assert not [line for line in printed if line and not line.startswith(("loading ", "* "))], "other output"


STORY = json.loads((ROOT / "samples" / "streamworld.json").read_text(encoding="utf-8"))["events"]


def test_a_published_space_runs_alone_with_the_embedded_checkpoint(hub, tmp_path):
    done = push(hub, tmp_path / "home", "--space", SPACE)
    repo = f"spaces/{SPACE}"
    assert done.returncode == 0 and done.stdout.strip() == f"{SPACE}@{commit_hash(repo, 1)}", done.stderr
    assert len(hub.repos[repo]) == 2 and hub.sdks[repo] == "gradio" and not hub.variables.get(repo)
    names = hub.files(repo).keys()
    assert {"README.md", "app.py", "page.js", "requirements.txt", "samples/streamworld.mp4"} <= names
    inside = {name.removeprefix("checkpoint/") for name in names if name.startswith("checkpoint/")}
    assert inside == model_files(ROOT).keys()
    front = hub.files(repo)["README.md"].decode().split("---")[1]
    assert "sdk: gradio" in front and "app_file: app.py" in front and gradio.__version__.split(".")[0] in front
    # Download it as a user would, and start it there.
    with hub.used_here(tmp_path / "other"):
        snapshot_download(SPACE, repo_type="space", local_dir=tmp_path / "alone")
    assert narrate(*start(tmp_path / "alone", tmp_path / "run", MODEL_ID=""), tmp_path) == STORY


def test_a_published_space_with_a_model_takes_it_from_the_hub(hub, tmp_path):
    hub.repos[REPO] = [embedded_files()]
    assert push(hub, tmp_path / "home", "--space", SPACE).returncode == 0
    done = push(hub, tmp_path / "home", "--space", SPACE, "--model", REPO, "--json")
    repo = f"spaces/{SPACE}"
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"repo": SPACE, "commit": commit_hash(repo, 2), "loaded": False}
    assert hub.variables[repo] == {"MODEL_ID": REPO}
    names = hub.files(repo).keys()
    assert not [name for name in names if name.startswith("checkpoint/")] and "samples/streamworld.mp4" in names
    for name, data in hub.files(repo).items():
        (tmp_path / "alone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "alone" / name).write_bytes(data)
    variables = {**hub.environment(tmp_path / "run"), **hub.variables[repo]}
    assert narrate(*start(tmp_path / "alone", tmp_path / "run", **variables), tmp_path) == STORY
    # Published again without a model, the variable must not hide the embedded checkpoint.
    assert push(hub, tmp_path / "home", "--space", SPACE).returncode == 0
    assert hub.variables[repo] == {} and "checkpoint/config.json" in hub.files(repo)


def test_mistakes_with_a_space_get_one_line_each(hub, tmp_path):
    hub.repos["spaces/somebody/other"] = [{}, {"README.md": b"", "app.py": b"", "game.py": b""}]
    for arguments, message in (
        (("--space", SPACE, "--model", "somebody/nothing"), "There is no model 'somebody/nothing' on the Hub"),
        (("--space", SPACE, "--model", ROOT), "is a folder. Publish it first, then give its Hub id."),
        (("--space", "somebody/other"), "'somebody/other' holds another app: README.md, app.py, game.py."),
        ((ROOT, REPO, "--model", REPO), "--model is an option of --space"),
        ((ROOT, "--space", SPACE), "--space publishes only the page"),
        ((ROOT,), "give CHECKPOINT and REPO, FOLDER --dataset REPO, or --space REPO"),
    ):
        failed = push(hub, tmp_path / "home", *arguments)
        assert failed.returncode and "Traceback" not in failed.stderr and message in failed.stderr, failed.stderr
    assert hub.repos.keys() == {"spaces/somebody/other"} and len(hub.repos["spaces/somebody/other"]) == 2
