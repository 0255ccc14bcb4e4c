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
"""
Publishes a checkpoint: one commit with all that a stranger needs, looked at from a stranger's place afterwards.

```bash
python train/push.py outputs/streamworld_cpu/narration somebody/narrator
```

Whoever is logged in (`hf auth login`, or `HF_TOKEN`) publishes; no token is taken as an argument, printed or stored.
If the line breaks, the same command goes on: what has arrived is not sent again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, save_torch_state_dict
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils.sha import sha_fileobj
from safetensors.torch import load_file
from transformers import AutoConfig

from videollm_mod.train.card import write_plain_card


# What training leaves beside a checkpoint, and a stranger does not need.
_LEFT_OUT = ("checkpoint-", "runs", "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", ".")
# Fields in which two configurations may differ and still be of the same model.
_INCIDENTAL = {"transformers_version", "dtype", "_name_or_path", "interval_threshold", "auto_map", "architectures"}
_INCIDENTAL |= {"use_cache"}
_WEIGHTS = re.compile(
    r"(adapter_)?(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
_LOOK = """
import sys
from transformers import AutoModel, AutoProcessor, logging
logging.set_verbosity_error()
where = {"pretrained_model_name_or_path": sys.argv[1], "revision": sys.argv[2], "trust_remote_code": True}
model, info = AutoModel.from_pretrained(**where, dtype="auto", output_loading_info=True)
faults = {name: sorted(keys) for name, keys in info.items() if keys}
assert not faults, f"weights do not fit: {faults}"
processor = AutoProcessor.from_pretrained(**where)
assert processor.frame_num_tokens == model.config.frame_num_tokens
print(model.num_parameters())
"""


def push(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    force: bool = False,
    message: str = "Upload VideoLLM-MoD checkpoint",
    max_shard_size: str = "5GB",
    verify: bool = True,
) -> str:
    """
    Publishes a checkpoint in one commit.

    Args:
        checkpoint (`str` or `Path`): Its folder, with configuration, weights, code, processor and card.
        repo (`str`): Where to: a Hub id, made if it is not there.
        private (`bool`, *optional*): Of a new repository; by default what its owner's are.
        force (`bool`, *optional*, defaults to `False`): Whether to put it in the place of another model.
        message (`str`, *optional*): Of the commit.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Largest file of weights; larger ones are cut.
        verify (`bool`, *optional*, defaults to `True`): Whether to load what was published, in a process of its own.

    Returns:
        `str`: The commit's hash.

    Raises:
        `ValueError`: If the folder is not whole, its card is refused, another model is there, nobody is logged in, or
            what was published does not load.
        `ConnectionError`: If the line broke.
    """
    folder = Path(checkpoint)
    _refuse_what_is_not_whole(folder)
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        there = set(api.list_repo_files(repo))
        with tempfile.TemporaryDirectory() as place:
            files = dict(_files(folder, Path(place), max_shard_size))
            files |= _card_of(repo, folder, Path(place))
            if not force:
                _refuse_another_model(api, repo, folder, there, files)
            operations: list[Any] = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            # Weights of before, cut otherwise or an adapter, would be loaded in place of these.
            stale = {name for name in there if _WEIGHTS.fullmatch(name)}
            operations += [CommitOperationDelete(name) for name in sorted(stale - set(files))]
            commit = api.create_commit(repo, operations, commit_message=message)
    except LocalTokenNotFoundError:
        raise ValueError("Nobody is logged in: run `hf auth login`, or set HF_TOKEN.") from None
    except HFValidationError as error:
        raise ValueError(f"'{repo}' is no name of a repository: {error}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise ValueError("The Hub knows no such user: run `hf auth login`, or set HF_TOKEN.") from None
        if status == 403:
            raise ValueError(f"This user may not write to '{repo}'. Check the name and the token's rights.") from None
        raise ConnectionError(f"The Hub answered {status}: {error}. Run the same command again.") from None
    except Exception as error:
        # huggingface_hub has changed its HTTP library before, and passes that one's errors on.
        if not isinstance(error, (OSError, RuntimeError)) and not type(error).__module__.startswith("httpx"):
            raise
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise ConnectionError(
            f"The upload broke off ({reason}). Run the same command again: what has arrived is not sent again."
        ) from None
    if verify:
        _look(repo, commit.oid)
    return commit.oid


def _refuse_what_is_not_whole(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json: give the folder of a checkpoint.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = {reference.split("--")[-1].split(".")[0] + ".py" for reference in config.get("auto_map", {}).values()}
    needed = {*code, "processor_config.json", "tokenizer.json", "chat_template.jinja"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing or not code:
        missing = missing or ["auto_map in config.json"]
        raise ValueError(f"'{folder}' is not whole; it lacks {', '.join(missing)}.")


def _card_of(repo: str, folder: Path, place: Path) -> dict[str, Path]:
    """The card with the name it has there, which its example loads; a plain one with its picture if there is none."""
    if not (folder / "README.md").is_file():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        text = "A streaming video language model (VideoLLM-MoD, arXiv 2408.16730)."
        write_plain_card(place, name=repo, config=config, text=text, caveat="What it was trained on is not told here.")
        return {name: place / name for name in ("README.md", "routing.png")}
    text = (folder / "README.md").read_text(encoding="utf-8")
    text = re.sub(rf"^# {re.escape(folder.resolve().name)}$", f"# {repo}", text, count=1, flags=re.MULTILINE)
    text = re.sub(
        r'(\.from_pretrained\((?:model, )?)"[^"\n]+"(, (?:trust_remote_code|subfolder))', rf'\1"{repo}"\2', text
    )
    (place / "README.md").write_text(text, encoding="utf-8")
    return {"README.md": place / "README.md"}


def _refuse_another_model(api: HfApi, repo: str, folder: Path, there: set[str], files: dict[str, Path]) -> None:
    if not there - {".gitattributes", "README.md"}:
        return
    if "config.json" not in there:
        raise ValueError(
            f"'{repo}' holds something else: {', '.join(sorted(there)[:5])}. --force puts this beside it."
        )
    with tempfile.TemporaryDirectory() as place:
        theirs = json.loads(Path(api.hf_hub_download(repo, "config.json", local_dir=place)).read_text("utf-8"))
    ours = _essence(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    theirs = _essence(theirs)
    other = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if other:
        raise ValueError(f"'{repo}' holds another model: {', '.join(other)} differ. --force puts this in its place.")
    # Of one configuration there may be many models. Weights are told apart without being read from there.
    mine = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    theirs = {file.path: file for file in api.list_repo_tree(repo) if file.path.endswith(".safetensors")}
    if theirs and not (mine.keys() == theirs.keys() and all(_is_same(mine[name], theirs[name]) for name in mine)):
        raise ValueError(
            f"'{repo}' holds other weights of the same configuration. --force puts these in their place; those of "
            "before stay in its history."
        )


def _is_same(ours: Path, theirs: Any) -> bool:
    if theirs.lfs is None or theirs.size != ours.stat().st_size:
        return False
    with open(ours, "rb") as file:
        return sha_fileobj(file).hex() == theirs.lfs.sha256


def _essence(config: Any) -> Any:
    """A configuration without what may differ in the same model, at any depth."""
    if not isinstance(config, dict):
        return config
    return {name: _essence(value) for name, value in config.items() if name not in _INCIDENTAL}


def _files(folder: Path, cut: Path, max_shard_size: str) -> Iterator[tuple[str, Path]]:
    """Name on the Hub and path of all that is published."""
    weights = sorted(folder.glob("*.safetensors"))
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_weights = path in weights or name.endswith(".safetensors.index.json")
        if path.is_file() and not name.startswith(_LEFT_OUT) and "__pycache__" not in name and not is_weights:
            yield name, path
    if len(weights) > 1 or weights[0].stat().st_size <= _bytes(max_shard_size):
        # As they are: the files themselves and not copies of them.
        yield from ((path.name, path) for path in weights + sorted(folder.glob("*.safetensors.index.json")))
    else:
        save_torch_state_dict(load_file(weights[0]), cut, max_shard_size=max_shard_size)
        yield from ((shard.name, shard) for shard in cut.iterdir())


def _bytes(size: str) -> float:
    """ "5GB" as a number."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
    match = re.fullmatch(r"([\d.]+) ?([KMG]B)", size.upper())
    if match is None:
        raise ValueError(f"`max_shard_size` looks like '5GB', got {size!r}.")
    return float(match[1]) * units[match[2]]


def _look(repo: str, revision: str) -> None:
    """Loads what was published as anybody would."""
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK, repo, revision],
            cwd=elsewhere,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"'{repo}' was published, but does not load: {reason}")


def main() -> None:
    """Publishes and says where it is."""
    parser = argparse.ArgumentParser(description="Publishes a checkpoint on the Hub and loads it from there.")
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("repo", help="Hub id, such as somebody/narrator")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--force", action="store_true", help="put it in the place of another model")
    parser.add_argument("--message", default="Upload VideoLLM-MoD checkpoint", help="of the commit")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of weights")
    parser.add_argument("--no_verify", action="store_true", help="do not load it from the Hub afterwards")
    parser.add_argument("--json", action="store_true", help="print what was done for machines")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    verify = not options.pop("no_verify")
    try:
        commit = push(**options, verify=verify)
    except (ValueError, ConnectionError) as error:
        raise SystemExit(f"error: {error}") from None
    if as_json:
        print(json.dumps({"repo": options["repo"], "commit": commit, "loaded": verify}))
    else:
        print(f"{options['repo']}@{commit}" + (", loaded from there" if verify else ""))


if __name__ == "__main__":
    main()
