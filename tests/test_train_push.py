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
"""Publishing, against a loopback Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import TOKEN, Hub, commit_hash
from safetensors.torch import load, load_file, save_file
from tiny import copy_embedded, embedded_files


ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT
REPO = "somebody/narrator"


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def push(hub, home, *arguments, **variables):
    return subprocess.run(
        [sys.executable, str(ROOT / "train" / "push.py"), *map(str, arguments)],
        env={**os.environ, **hub.environment(home), **variables},
        capture_output=True,
        text=True,
    )


def test_everything_in_one_commit_and_loaded_from_there(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    (checkpoint / "checkpoint-500").mkdir()
    (checkpoint / "checkpoint-500" / "optimizer.pt").write_bytes(b"0" * 100)
    (checkpoint / "training_args.bin").write_bytes(b"0" * 100)
    done = push(hub, tmp_path / "home", checkpoint, REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{REPO}@{commit_hash(REPO, 1)}, loaded from there"
    assert len(hub.repos[REPO]) == 2, "one commit after the empty one"
    published, card = dict(hub.files(REPO)), (EMBEDDED / "README.md").read_text()
    assert published.pop("README.md").decode() == card.replace('(".", trust', f'("{REPO}", trust')
    assert published == {name: data for name, data in embedded_files().items() if name != "README.md"}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(
        TOKEN in path.read_text(errors="ignore") for path in (tmp_path / "home").rglob("*") if path.is_file()
    )


def test_large_weights_are_cut(hub, tmp_path):
    done = push(hub, tmp_path / "home", EMBEDDED, REPO, "--max_shard_size", "3MB")
    assert done.returncode == 0, done.stderr
    shards = {name: data for name, data in hub.files(REPO).items() if name.endswith(".safetensors")}
    assert len(shards) >= 3 and all(len(data) < 3.1e6 for data in shards.values())
    whole = load((EMBEDDED / "model.safetensors").read_bytes())
    parts = {name: weight for data in shards.values() for name, weight in load(data).items()}
    assert parts.keys() == whole.keys() and all((parts[name] == whole[name]).all() for name in whole)
    assert "model.safetensors.index.json" in hub.files(REPO)
    # Cut otherwise, the pieces of before are gone.
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
        f"error: '{REPO}' holds another model: mod_keep_ratio differ. --force puts this in its place."
    )
    assert push(hub, tmp_path / "home", other, REPO, "--force").returncode == 0
    assert json.loads(hub.files(REPO)["config.json"])["mod_keep_ratio"] == 0.5
    # The same model, trained on, needs no force: the trainer has written a few fields otherwise.
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
    assert same.returncode == 0, "the same, once more"
    assert json.loads(same.stdout) == {"repo": REPO, "commit": commit_hash(REPO, 2), "loaded": False}
    assert push(hub, tmp_path / "home", other, REPO, "--no_verify", "--force").returncode == 0
    assert load(hub.files(REPO)["model.safetensors"])["model.connector.linear_1.bias"].equal(
        weights["model.connector.linear_1.bias"]
    )


def test_a_card_that_the_hub_refuses_is_not_published(hub, tmp_path):
    other = copy_embedded(tmp_path / "other")
    (other / "README.md").write_text("# other\n\nNo metadata.\n")
    refused = push(hub, tmp_path / "home", other, REPO, "--no_verify")
    assert refused.returncode == 1 and "error: Invalid metadata in README.md" in refused.stderr
    assert hub.repos[REPO] == [{}]


def test_what_is_no_model_of_ours_is_left_alone(hub, tmp_path):
    hub.repos[REPO] = [{}, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"0", "notes.txt": b"mine"}]
    refused = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert refused.returncode == 1 and "holds something else: adapter_config.json" in refused.stderr
    forced = push(hub, tmp_path / "home", EMBEDDED, REPO, "--force")
    assert forced.returncode == 0 and "loaded from there" in forced.stdout, forced.stderr
    assert hub.files(REPO)["notes.txt"] == b"mine", "what is not of the model stays"
    assert not [name for name in hub.files(REPO) if "adapter" in name], "an adapter would be loaded in its place"


def test_without_a_card_it_gets_a_plain_one(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    (checkpoint / "README.md").unlink()
    done = push(hub, tmp_path / "home", checkpoint, REPO, "--no_verify")
    assert done.returncode == 0, done.stderr
    card = hub.files(REPO)["README.md"].decode()
    assert f"# {REPO}" in card and f'AutoModel.from_pretrained("{REPO}", trust' in card and "What it costs" in card
    assert "What it was trained on is not told here." in card and "routing.png" in hub.files(REPO)


def test_model_and_processor_push_themselves(hub, tmp_path):
    """As every Transformers model does; a stranger then loads code and weights from there."""
    code = f"""
from transformers import AutoModel, AutoProcessor
options = {{"trust_remote_code": True}}
AutoModel.from_pretrained({str(EMBEDDED)!r}, **options).push_to_hub({REPO!r})
AutoProcessor.from_pretrained({str(EMBEDDED)!r}, **options).push_to_hub({REPO!r})
"""
    look = f"""
from transformers import AutoModel, AutoProcessor
options = {{"trust_remote_code": True}}
model = AutoModel.from_pretrained({REPO!r}, **options)
processor = AutoProcessor.from_pretrained({REPO!r}, **options)
sample = {str(EMBEDDED / "samples" / "streamworld.mp4")!r}
print(sum(event.role == "assistant" for event in model.narrate(processor, sample, query="Narrate.")))
"""
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0 and {"config.json", "modeling_videollm_mod.py"} <= set(hub.files(REPO)), done.stderr
    seen = subprocess.run([sys.executable, "-c", look], **options)
    assert seen.returncode == 0 and int(seen.stdout) > 0, seen.stderr


def test_a_look_that_fails_is_not_taken_for_an_empty_place(hub, tmp_path):
    hub.repos[REPO] = [{}, {"config.json": b'{"model_type": "other"}', "model.safetensors": b"0"}]
    hub.failures += ["HEAD .*config.json"] * 20
    failed = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and len(hub.repos[REPO]) == 2, failed.stderr


def test_weights_that_are_missing_are_found_by_looking(hub, tmp_path):
    checkpoint = copy_embedded(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "connector" not in name}, checkpoint / "model.safetensors")
    done = push(hub, tmp_path / "home", checkpoint, REPO)
    assert done.returncode == 1 and "does not load: AssertionError: weights do not fit" in done.stderr, done.stderr


@pytest.mark.parametrize("where", ["PUT .*upload", "POST .*/commit/"])
def test_a_broken_line_is_told_and_gone_on_with(hub, tmp_path, where):
    hub.failures += [where] * 20
    broken = push(hub, tmp_path / "home", EMBEDDED, REPO, "--no_verify")
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert "error: The upload broke off" in broken.stderr and "Run the same command again" in broken.stderr
    assert hub.repos[REPO] == [{}], "nothing half-written is to be seen"
    hub.failures.clear()
    hub.requests.clear()
    done = push(hub, tmp_path / "home", EMBEDDED, REPO)
    assert done.returncode == 0, done.stderr
    sent = [request for request in hub.requests if request.startswith("PUT")]
    assert len(sent) == (1 if where.startswith("PUT") else 0), "what has arrived is not sent again"


def test_mistakes_are_answered_in_one_line(hub, tmp_path):
    for arguments, variables, message in (
        ((tmp_path, REPO), {}, "has no config.json: give the folder of a checkpoint"),
        ((EMBEDDED, "no such name!"), {}, "is no name of a repository"),
        ((EMBEDDED, REPO), {"HF_TOKEN": "hf_wrong"}, "The Hub knows no such user: run `hf auth login`"),
        ((EMBEDDED, REPO), {"HF_TOKEN": ""}, "run `hf auth login`, or set HF_TOKEN"),
    ):
        failed = push(hub, tmp_path / "home", *arguments, "--no_verify", **variables)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr[-2000:]
        assert message in failed.stderr, failed.stderr
    half = copy_embedded(tmp_path / "half")
    (half / "modeling_videollm_mod.py").unlink()
    failed = push(hub, tmp_path / "home", half, REPO)
    assert "it lacks modeling_videollm_mod.py" in failed.stderr and not hub.repos
