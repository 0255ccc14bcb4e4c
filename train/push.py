# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Publish a checkpoint, prepared data or the page on the Hub, each in one commit.

```bash
python train/push.py outputs/streamworld_cpu/narration somebody/narrator    # a model; it is then loaded from the Hub
python train/push.py prepared/coin --dataset somebody/coin-dialogues         # data; see train/push_dataset.py
python train/push.py --space somebody/watch                                 # the page, with the embedded checkpoint
python train/push.py --space somebody/watch --model somebody/narrator       # the page, with a published model
```

Log in with `hf auth login`, or set `HF_TOKEN`. The script neither accepts, prints nor stores a token. If the
connection breaks, run the same command again: it does not send files twice.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.sha import sha_fileobj

from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import FullDiskError, naming_full_disk, why_full
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.card import write_plain_card
from videollm_mod.train.checkpoint_files import FACTS_PAGE, LINK, checkpoint_files, entry_files, model_files


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "space"
GOLDEN = "golden.json"
# Fields that may differ between two configurations of the same model.
_INCIDENTAL = {"transformers_version", "dtype", "_name_or_path", "interval_threshold", "auto_map", "architectures"}
_INCIDENTAL |= {"use_cache"}
_WEIGHTS = re.compile(
    r"(adapter_)?(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
# Files of the page, by name: others in its folder may be private.
_SPACE = ("*.py", "page.js", "page.css", "README.md", "requirements.txt", "packages.txt")
# Files that show that a Space was published from here, and the folders that only this script writes there.
_PAGE, _INSIDE = {"app.py", "viewer.py", "drawing.py"}, ("checkpoint/", "samples/")
_VERIFY = """
import sys
from videollm_mod.golden import verify_checkpoint
difference = verify_checkpoint(sys.argv[1], sys.argv[2]).difference
assert difference is None, difference
"""


# ------------------------------------------------------------------------------------------------------- publishing


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
    Publish a checkpoint in one commit.

    Args:
        checkpoint (`str` or `Path`): Its folder, with configuration, weights, code, processor and card. It may be a
            checkout: only the files of [`checkpoint_files`] are published.
        repo (`str`): Hub id. The repository is created if it does not exist.
        private (`bool`, *optional*): Visibility of a new repository; by default the owner's setting.
        force (`bool`, *optional*, defaults to `False`): Whether to replace another model.
        message (`str`, *optional*): The commit message.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Largest weights file. A larger one is split.
        verify (`bool`, *optional*, defaults to `True`): Whether to record in `golden.json` what the model computes,
            and to check in a new process that the published one computes the same. Otherwise a `golden.json` of the
            folder is published if it has the hashes of these weights.

    Returns:
        `str`: The commit's hash.

    Raises:
        `FileNotFoundError`: If there is no such folder.
        `ValueError`: If the folder is incomplete, the Hub refuses its card, the repository holds another model, the
            user is not logged in, the model does not load, or the published one computes something else.
        `ConnectionError`: If the connection broke.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        check_checkpoint(folder)
    _refuse_an_incomplete_folder(folder)
    api = HfApi()
    with temporary_folder() as place:
        files = _with_weights_split(checkpoint_files(folder), place, max_shard_size)
        with hub_errors(repo):
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            there = set(api.list_repo_files(repo))
            files |= _card_for(repo, folder, files, place)
            if not force:
                _refuse_another_model(api, repo, folder, there, files)
        files = _with_golden(files, folder, place, verify)
        # Transformers would prefer earlier weights in other files, or an adapter, to these.
        stale = {name for name in there if _WEIGHTS.fullmatch(name) or name == GOLDEN}
        with hub_errors(repo):
            commit = commit_files(api, repo, files, stale, message)
    if verify:
        _verify(repo, commit)
    return commit


def push_space(
    repo: str,
    *,
    model: str | None = None,
    private: bool | None = None,
    force: bool = False,
    message: str = "Upload VideoLLM-MoD Space",
) -> str:
    """
    Publish the page as a Space in one commit.

    Args:
        repo (`str`): Hub id of the Space. It is created if it does not exist.
        model (`str`, *optional*): Hub id of the model to show, set as the Space's variable `MODEL_ID`. Without it, the
            commit contains the embedded checkpoint.
        private (`bool`, *optional*): Visibility of a new Space; by default the owner's setting.
        force (`bool`, *optional*, defaults to `False`): Whether to write into a Space with another app.
        message (`str`, *optional*): The commit message.

    Returns:
        `str`: The commit's hash.

    Raises:
        `ValueError`: If the model is not on the Hub, the Space holds another app, or the user is not logged in.
        `ConnectionError`: If the connection broke.
    """
    api = HfApi()
    files = {path.name: path for name in _SPACE for path in SPACE.glob(name) if path.name != "__init__.py"}
    files |= {f"samples/{path.name}": path for path in (ROOT / "samples").glob("*.mp4")}
    if model is None:
        files |= {f"checkpoint/{name}": path for name, path in model_files(ROOT).items()}
    with hub_errors(repo):
        if model is not None:
            _refuse_an_unknown_model(api, model)
        repo = api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True).repo_id
        there = set(api.list_repo_files(repo, repo_type="space"))
        if there - {".gitattributes", "README.md"} and not there >= _PAGE and not force:
            raise ValueError(f"'{repo}' holds another app: {', '.join(sorted(there)[:5])}. --force writes into it.")
        if model is not None:
            # Set it before the commit, so that the first build finds it.
            api.add_space_variable(repo, "MODEL_ID", model)
        stale = {name for name in there if name.startswith(_INSIDE)}
        commit = commit_files(api, repo, files, stale, message, repo_type="space")
        if model is None and "MODEL_ID" in api.get_space_variables(repo):
            api.delete_space_variable(repo, "MODEL_ID")
    return commit


def commit_files(
    api: HfApi, repo: str, files: dict[str, Path], stale: set[str], message: str, *, repo_type: str = "model"
) -> str:
    """Add files and delete the stale ones that are not among them, in one commit. Return its hash."""
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in sorted(stale - files.keys())]
    return api.create_commit(repo, operations, commit_message=message, repo_type=repo_type).oid


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a temporary folder. If the disk is full, name the folder that it lies in."""
    with tempfile.TemporaryDirectory() as place, naming_full_disk(tempfile.gettempdir()):
        yield Path(place)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """
    Translate errors of the Hub's library to one line.

    Args:
        repo (`str`): Hub id of the repository.

    Raises:
        `ValueError`: For a user's mistake.
        [`FullDiskError`]: If temporary files or the library's cache do not fit on the disk.
        `ConnectionError`: For a failure that a retry may fix.
    """
    try:
        yield
    except FullDiskError:
        raise
    except LocalTokenNotFoundError:
        raise ValueError("You are not logged in: run `hf auth login`, or set HF_TOKEN.") from None
    except HFValidationError as error:
        raise ValueError(f"'{repo}' is not a valid repository name: {error}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise ValueError("The Hub does not know this user: run `hf auth login`, or set HF_TOKEN.") from None
        if status == 403:
            raise ValueError(f"This user may not write to '{repo}'. Check the name and the token's rights.") from None
        raise ConnectionError(f"The Hub answered {status}: {error}. Run the same command again.") from None
    except Exception as error:
        # huggingface_hub has changed its HTTP library before, and lets that library's errors through.
        if full := why_full(error):
            raise FullDiskError(
                f"'{tempfile.gettempdir()}' or '{constants.HF_HOME}' cannot be written: {full}. Free some space, then "
                "run the same command again."
            ) from error
        if not isinstance(error, (OSError, RuntimeError)) and not type(error).__module__.startswith("httpx"):
            raise
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise ConnectionError(
            f"The upload was interrupted ({reason}). Run the same command again: it does not send files twice."
        ) from None


# ----------------------------------------------------------------------------------------------------------- checks


def _refuse_an_incomplete_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json: give the folder of a checkpoint.")
    code = entry_files(folder)
    needed = {*code, "processor_config.json", "tokenizer.json", "chat_template.jinja"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if not list(folder.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing or not code:
        missing = missing or ["auto_map in config.json"]
        raise ValueError(f"'{folder}' is incomplete: it lacks {', '.join(missing)}.")


def _refuse_an_unknown_model(api: HfApi, model: str) -> None:
    if Path(model).exists():
        raise ValueError(f"'{model}' is a folder. Publish it first, then give its Hub id.")
    try:
        api.model_info(model)
    except RepositoryNotFoundError:
        raise ValueError(f"There is no model '{model}' on the Hub, or this user may not read it.") from None


def _refuse_another_model(api: HfApi, repo: str, folder: Path, there: set[str], files: dict[str, Path]) -> None:
    if not there - {".gitattributes", "README.md"}:
        return
    if "config.json" not in there:
        raise ValueError(
            f"'{repo}' holds other files: {', '.join(sorted(there)[:5])}. --force adds the checkpoint to them."
        )
    with tempfile.TemporaryDirectory() as place:
        theirs = json.loads(Path(api.hf_hub_download(repo, "config.json", local_dir=place)).read_text("utf-8"))
    ours = _essence(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    theirs = _essence(theirs)
    other = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if other:
        raise ValueError(f"'{repo}' holds another model. It differs in: {', '.join(other)}. --force replaces it.")
    # Models of the same configuration differ in their weights. Hashes tell, without a download.
    mine = {name: path for name, path in files.items() if name.endswith(".safetensors")}
    theirs = {file.path: file for file in api.list_repo_tree(repo) if file.path.endswith(".safetensors")}
    if theirs and not (mine.keys() == theirs.keys() and all(_is_same(mine[name], theirs[name]) for name in mine)):
        raise ValueError(
            f"'{repo}' holds other weights of the same configuration. --force replaces them. They stay in its history."
        )


def _is_same(ours: Path, theirs: Any) -> bool:
    if theirs.lfs is None or theirs.size != ours.stat().st_size:
        return False
    with open(ours, "rb") as file:
        return sha_fileobj(file).hex() == theirs.lfs.sha256


def _essence(config: Any) -> Any:
    """Return a configuration without the fields that may differ for the same model, at any depth."""
    if not isinstance(config, dict):
        return config
    return {name: _essence(value) for name, value in config.items() if name not in _INCIDENTAL}


def _verify(repo: str, revision: str) -> None:
    """Load the published model as any user would, in a new process, and compare it with its record."""
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", _VERIFY, repo, revision],
            cwd=elsewhere,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"'{repo}' was published, but not as it was here: {reason.removeprefix('AssertionError: ')}")


# ------------------------------------------------------------------------------------------------- what is published


def _card_for(repo: str, folder: Path, files: dict[str, Path], place: Path) -> dict[str, Path]:
    """Write the card, and its page of facts if there is one, with the repository's name as title."""
    if "README.md" not in files:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        text = "A streaming video language model (VideoLLM-MoD, arXiv 2408.16730)."
        write_plain_card(place, name=repo, config=config, text=text, caveat="Its training data is not documented.")
        return {name: place / name for name in ("README.md", "routing.png") if (place / name).is_file()}
    pages = {page: place / Path(page).name for page in ("README.md", FACTS_PAGE) if page in files}
    for page, path in pages.items():
        text = (folder / page).read_text(encoding="utf-8")
        text = re.sub(rf"^# {re.escape(folder.resolve().name)}$", f"# {repo}", text, count=1, flags=re.MULTILINE)
        text = re.sub(
            r'(\.from_pretrained\((?:model, )?)"[^"\n]+"(, (?:trust_remote_code|subfolder))', rf'\1"{repo}"\2', text
        )
        text = re.sub(r'^repo = "\."', f'repo = "{repo}"', text, flags=re.MULTILINE)
        path.write_text(_without_dead_links(text, Path(page).parent, files), encoding="utf-8")
    return pages


def _without_dead_links(text: str, base: Path, files: dict[str, Path]) -> str:
    """Return Markdown in which links to files that are not published are plain text."""

    def keep(link: re.Match) -> str:
        mark, words, target = link.groups()
        name = os.path.normpath(base / target.partition("#")[0])
        is_elsewhere = re.match(r"[a-z]+:|#", target)
        return link[0] if mark or is_elsewhere or name in files else words

    return LINK.sub(keep, text)


def _with_weights_split(files: dict[str, Path], place: Path, max_shard_size: str) -> dict[str, Path]:
    """Return the files of a checkpoint; if the weights file is too large, its shards in `place` replace it."""
    weights = [path for name, path in files.items() if re.fullmatch(r"[^/]+\.safetensors", name)]
    if len(weights) > 1 or weights[0].stat().st_size <= _bytes(max_shard_size):
        return files
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    shards = place / "shards"
    shards.mkdir()
    save_torch_state_dict(load_file(weights[0]), shards, max_shard_size=max_shard_size)
    others = {name: path for name, path in files.items() if path != weights[0]}
    return others | {shard.name: shard for shard in shards.iterdir()}


def _with_golden(files: dict[str, Path], folder: Path, place: Path, verify: bool) -> dict[str, Path]:
    """Return the files with a record of what the model computes, or without one that is not about these weights."""
    # Loads torch, which refusing a folder does without.
    from videollm_mod.golden import WEIGHTS, hash_weights, make_golden, read_golden, write_golden

    weights = [path for name, path in files.items() if "/" not in name and fnmatch(name, WEIGHTS)]
    if verify:
        write_golden(make_golden(folder, weights), place / GOLDEN)
        return files | {GOLDEN: place / GOLDEN}
    if GOLDEN in files and read_golden(str(folder))[0]["weights"] != hash_weights(weights):
        return {name: path for name, path in files.items() if name != GOLDEN}
    return files


def _bytes(size: str) -> float:
    """Parse a size such as "5GB"."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
    match = re.fullmatch(r"([\d.]+) ?([KMG]B)", size.upper())
    if match is None:
        raise ValueError(f"`max_shard_size` must look like '5GB', got {size!r}.")
    return float(match[1]) * units[match[2]]


def _parse() -> argparse.Namespace:
    parser = CommandLineParser(description="Publish a checkpoint, or the page as a Space, on the Hub.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder of the checkpoint, or of prepared data")
    parser.add_argument("repo", nargs="?", help="Hub id, such as somebody/narrator")
    parser.add_argument("--space", metavar="REPO", help="publish the page as this Space instead of a checkpoint")
    parser.add_argument("--dataset", metavar="REPO", help="publish a folder of prepared data as this data set")
    parser.add_argument("--model", help="with --space: Hub id of the model; default: the embedded checkpoint")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private; data may need it"
    )
    parser.add_argument("--force", action="store_true", help="replace another model, or write into another app")
    parser.add_argument("--message", help="commit message")
    parser.add_argument(
        "--video-root",
        nargs="+",
        metavar="PLACE",
        help="with --dataset: folders, and beginnings of URLs, outside the folder that its rows may name",
    )
    parser.add_argument("--max-shard-size", help="largest file of weights (5GB) or rows (500MB)")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not record what the model computes, and do not check it afterwards",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if options.dataset is not None and (options.checkpoint is None or options.repo or options.space):
        parser.error("give FOLDER --dataset REPO")
    if options.space is None and options.dataset is None and options.repo is None:
        parser.error("give CHECKPOINT and REPO, FOLDER --dataset REPO, or --space REPO")
    if options.space is not None and options.checkpoint is not None:
        parser.error("--space publishes only the page: name a published model with --model")
    if options.video_root is not None and options.dataset is None:
        parser.error("--video-root is an option of --dataset")
    if options.model is not None and options.space is None:
        parser.error("--model is an option of --space")
    return options


def main() -> None:
    """Publish and print where."""
    options = _parse()
    common: dict[str, Any] = {"private": options.private, "force": options.force}
    if options.message is not None:
        common["message"] = options.message
    repo = options.space or options.dataset or options.repo
    verify = options.space is None and not options.no_verify
    with one_line_errors():
        quiet()
        if options.space is not None:
            commit = push_space(repo, model=options.model, **common)
        else:
            from videollm_mod.train.push_dataset import push_dataset

            publish = push if options.dataset is None else push_dataset
            common |= {"max_shard_size": options.max_shard_size} if options.max_shard_size else {}
            common |= {"video_root": options.video_root} if options.video_root else {}
            commit = publish(options.checkpoint, repo, verify=verify, **common)
    if options.json:
        print(json.dumps({"repo": repo, "commit": commit, "loaded": verify}))
    else:
        print(f"{repo}@{commit}" + (", loaded from there" if verify else ""))


if __name__ == "__main__":
    main()
