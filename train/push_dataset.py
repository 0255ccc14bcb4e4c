# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Publish prepared data as a data set on the Hub: `python train/push.py FOLDER --dataset REPO`.

Rows become Parquet files, which `datasets` streams. Frame features go into the rows. Videos are not published.
"""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, NamedSplit
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from videollm_mod.outputs import path_from
from videollm_mod.train.card import published_command, published_word
from videollm_mod.train.data.converters import SPLITS, read_json
from videollm_mod.train.data.faults import WHERE
from videollm_mod.train.data.shards import split_names, write_shards
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages, stream_timed_messages
from videollm_mod.train.push import commit_files, hub_errors, temporary_folder


# Licences with a name of their own on the Hub.
_LICENSES = {"cc by-nc 4.0": "cc-by-nc-4.0", "cc by-nc-sa 4.0": "cc-by-nc-sa-4.0", "mit": "mit", "cc0": "cc0-1.0"}
_LICENSES |= {"apache-2.0": "apache-2.0", "cc by 4.0": "cc-by-4.0"}


def push_dataset(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    force: bool = False,
    message: str = "Upload prepared data",
    max_shard_size: str = "500MB",
    verify: bool = True,
    video_root: Sequence[str | Path] = (),
) -> str:
    """
    Publish a folder of timed messages in one commit.

    Args:
        folder (`str` or `Path`): The folder, as `prepare.py` or `encode.py` wrote it.
        repo (`str`): Hub id. The data set is created if it does not exist.
        private (`bool`, *optional*): Whether only its owner may see it. Data that must not be published needs `True`.
        force (`bool`, *optional*, defaults to `False`): Whether to write into a data set with other files.
        message (`str`, *optional*): The commit message.
        max_shard_size (`str`, *optional*, defaults to `"500MB"`): Size of a Parquet file, before compression.
        verify (`bool`, *optional*, defaults to `True`): Whether to read the first row of each split from the Hub.
        video_root (sequence of `str`, *optional*): Folders, and beginnings of URLs, outside the folder that its rows
            may name.

    Returns:
        `str`: The commit's hash.

    Raises:
        `FileNotFoundError`: If there is no such folder.
        `ValueError`: If the folder has no rows or faulty ones, the data must not be published, the repository is
            public or holds other files, or the user is not logged in.
        `ConnectionError`: If the connection broke.
    """
    folder, api = Path(folder), HfApi()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    about = read_json(folder / "about.json") if (folder / "about.json").exists() else {}
    if not private and not about.get("may_be_shared"):
        raise ValueError(
            f"The licence of '{folder}' ({about.get('license', 'unknown')}) does not let anyone publish it. --private "
            "keeps it to you; check that your licence allows that."
        )
    splits = _split_names(folder)
    if not splits:
        raise ValueError(f"'{folder}' has no .jsonl and no .parquet file.")
    with temporary_folder() as place:
        loaded = {split: _load_split(folder, split, video_root) for split in splits}
        videos = _published_names(loaded.values(), folder)
        counts = {split: _write_split(rows, videos, split, place, max_shard_size) for split, rows in loaded.items()}
        about = _without_folders(about)
        (place / "about.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
        (place / "README.md").write_text(write_dataset_card(repo, about, counts), encoding="utf-8")
        files = {path.name: path for path in place.iterdir()}
        with hub_errors(repo):
            repo = _open(api, repo, private=private, force=force)
            there = set(api.list_repo_files(repo, repo_type="dataset"))
            stale = {name for name in there if name.endswith(".parquet")}
            commit = commit_files(api, repo, files, stale, message, repo_type="dataset")
    for split in splits if verify else ():
        with hub_errors(repo):
            if not list(islice(stream_timed_messages(repo, split), 1)):
                raise ValueError(f"'{repo}' was published, but its split {split!r} is empty.")
    return commit


def _open(api: HfApi, repo: str, *, private: bool | None, force: bool) -> str:
    """Create a data set, or check the one there is. Return its complete name."""
    try:
        known = api.dataset_info(repo)
    except RepositoryNotFoundError:
        return api.create_repo(repo, repo_type="dataset", private=private).repo_id
    if private and not known.private:
        raise ValueError(f"'{repo}' is public: publish under another name, or make it private first.")
    there = set(api.list_repo_files(repo, repo_type="dataset")) - {".gitattributes", "README.md"}
    if there and "about.json" not in there and not force:
        raise ValueError(f"'{repo}' holds other files: {', '.join(sorted(there)[:5])}. --force adds the data to them.")
    return repo


def _split_names(folder: Path) -> list[str]:
    """Return the splits of a folder, the usual ones first. Raise `ValueError` for a name that the Hub cannot have."""
    names = split_names(folder)
    for name in names:
        try:
            NamedSplit(name)
        except ValueError:
            raise ValueError(f"'{name}' is no name of a split on the Hub: rename its files in '{folder}'.") from None
    return sorted(names, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))


def _load_split(folder: Path, split: str, video_root: Sequence[str | Path]) -> Dataset:
    """Return the rows of a split, none of which may be faulty."""
    rows = load_timed_messages(folder, split, video_root=video_root)
    if fault := next(find_faults(rows), None):
        raise ValueError(f"{fault}. Faulty rows are not published; --validate_only of train/sft.py lists all faults.")
    return rows


def _published_names(splits: Iterable[Dataset], folder: Path) -> dict[str, str]:
    """
    Return the place beside the rows that each video takes. Videos outside the folder go to `videos`, with the folders
    that tell them apart: below the deepest one that holds all of them.
    """
    found = dict.fromkeys(row.get("video") for rows in splits for row in _each(rows))
    files = [video for video in found if isinstance(video, str) and "://" not in video]
    inside = {video: Path(path_from(folder, video)) for video in files}
    outside = [video for video in files if inside[video].parts[0] == ".."]
    above = os.path.commonpath([os.path.dirname(video) for video in outside]) if outside else ""
    names = {video: path.as_posix() for video, path in inside.items()}
    names |= {video: f"videos/{Path(video).relative_to(above).as_posix()}" for video in outside}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(f"two videos would be published as '{twice[0]}': rename one of them.")
    return names


def _each(rows: Dataset) -> Iterator[dict[str, Any]]:
    yield from (rows[index] for index in range(len(rows)))


def _write_split(rows: Dataset, videos: dict[str, str], split: str, place: Path, max_shard_size: str) -> int:
    """Write a split as Parquet files. Return its number of rows."""
    has_features = any(row.get("frame_features") is not None for row in _each(rows))
    published = (
        {name: videos.get(value, value) if name == "video" else value for name, value in row.items() if name != WHERE}
        for row in _each(rows)
    )
    options = {"max_shard_size": max_shard_size, "embed_features": has_features}
    return write_shards(published, place, split, **options)


def _without_folders(about: dict[str, Any]) -> dict[str, Any]:
    """Return what `about.json` says without folders of this machine and secrets. `command` has a command a line."""
    lines = [published_command(shlex.split(line)) for line in about.get("command", "").splitlines()]
    texts = {name: about[name] for name in ("source", "dataset") if isinstance(about.get(name), str)}
    cleaned = {name: " ".join(map(published_word, text.split(" "))) for name, text in texts.items()}
    return {**about, **cleaned, "command": "\n".join(lines)}


# --------------------------------------------------------------------------------------------------------------- card


def write_dataset_card(repo: str, about: dict[str, Any], counts: dict[str, int]) -> str:
    """
    Return the card of a data set.

    Args:
        repo (`str`): Hub id.
        about (`dict`): Content of `about.json`.
        counts (`dict[str, int]`): Number of rows of each split.
    """
    licence = about.get("license", "unknown")
    known = _LICENSES.get(licence.lower())
    data = DatasetCardData(
        license=known or "other",
        **({} if known else {"license_name": "see-below"}),
        task_categories=["video-text-to-text"],
        tags=["video", "streaming", "videollm-mod"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.parquet"} for split in counts],
            }
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_card_lines(repo, about, counts, licence)) + "\n"


def _card_lines(repo: str, about: dict[str, Any], counts: dict[str, int], licence: str) -> Iterator[str]:
    source = about.get("source")
    yield f"# {repo}\n\nDialogues about videos with times, for streaming video language models"
    yield (f"(VideoLLM-MoD), made from the annotations of `{source}`.\n" if source else "(VideoLLM-MoD).\n")
    yield f"The licence of the source applies: {licence}.\n"
    yield "| split | rows | tasks |\n|---|---|---|"
    for split, count in counts.items():
        tasks = about.get("splits", {}).get(split, {}).get("tasks", {})
        yield f"| {split} | {count} | {', '.join(f'{task} ({number})' for task, number in tasks.items())} |"
    yield (
        "\nVideos are not here: rows name their places, such as `videos/ID.mp4`. Put your own copies there, beside "
        "the rows. Frame features, if there are any, are within the rows.\n"
    )
    yield f"```bash\nhf download {repo} --repo-type dataset --local-dir data"
    yield "python train/sft.py --dataset data --checkpoint . --output_dir out --streaming --max_steps 1000\n```\n"
    yield f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("{repo}", streaming=True)\n```\n'
    if about.get("command"):
        yield f"Made with:\n\n```bash\n{about['command']}\n```\n"
    yield from _faults(about.get("splits", {}))


def _faults(splits: dict[str, Any]) -> Iterator[str]:
    kinds = (("left_out", "left out"), ("mended", "mended"))
    lines = [
        f"| {split or 'none'} | {words} | {reason} | {count} |"
        for split, of_split in splits.items()
        for kind, words in kinds
        for reason, count in of_split.get(kind, {}).items()
    ]
    if lines:
        yield "What was left out of the annotations, and what was mended:\n"
        yield "| split | what | reason | count |\n|---|---|---|---|"
        yield from lines
