# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which files and URLs a data set may name: those in its own folder or repository, and those that the user allows."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from videollm_mod.space.uploads import FORMATS


HUB = "hf://datasets/"
# Formats in which FFmpeg opens a video of a data set: those of uploads, older ones that name no further files, and
# pictures.
VIDEO_FORMATS = f"{FORMATS},av1,obu,asf,mxf,nut,dv,rm,yuv4mpegpipe,bmp_pipe,jpeg_pipe,png_pipe,webp_pipe"


# The two names of a folder: as it is written, and without links.
_NAMES = (os.path.abspath, os.path.realpath)


class NamedFiles:
    """
    The files that a data set may name in its rows and in its card.

    Args:
        root (`str` or `Path`): Folder of the data set, or a Hub data set as "OWNER/NAME".
        allowed (sequence of `str`, *optional*): Folders, and beginnings of URLs, that it may name too.
        option (`str`, *optional*, defaults to `"--video_root"`): The option of `allowed`, for messages.

    Example:

        NamedFiles("talks").locate("videos/a.mp4")            # "/home/me/talks/videos/a.mp4"
        NamedFiles("talks").locate("../private/a.mp4")        # raises ValueError
        NamedFiles("talks", ["/data"]).locate("/data/a.mp4")  # "/data/a.mp4"
    """

    def __init__(self, root: str | Path, allowed: Sequence[str | Path] = (), *, option: str = "--video_root") -> None:
        self.root, self.is_local, self.option = root, isinstance(root, Path), option
        self._urls = [str(place) for place in allowed if "://" in str(place)]
        folders = [place for place in allowed if "://" not in str(place)]
        self._allowed = list(dict.fromkeys(name(place) for place in folders for name in _NAMES))
        self._folders = self._allowed + (_places_of(root) if isinstance(root, Path) else [])

    def allows_url(self, url: str) -> bool:
        """Return whether a URL begins with one that the user allows."""
        return any(_is_below(url, start) for start in self._urls)

    def locate(self, name: Any) -> str:
        """
        Return the absolute path of a file, its URL, or its path in a Hub data set.

        Links are followed to see where a file lies, except those in a folder that the user allows. The path that is
        returned keeps the name of a link.

        Args:
            name (`Any`): What a row has as the name of a file.

        Raises:
            `ValueError`: If it is no name, or leads out of the data set.
        """
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{name!r} is no path.")
        if "://" in name:
            if self.allows_url(name) or self._is_in_hub(name):
                return name
        elif self.is_local or os.path.isabs(name):
            # Without "..", which leads elsewhere after a link: the path that is checked is the path that is opened.
            for root in dict.fromkeys(place(self.root) if self.is_local else "" for place in _NAMES):
                path = os.path.normpath(os.path.join(root, name))
                if any(_is_in(path, place) for place in self._allowed):
                    return path
            # A video that is a link keeps its name, as in a cache of the Hub.
            folder, file = os.path.split(os.path.join(self.root if self.is_local else "", name))
            path = os.path.join(os.path.realpath(folder), file)
            if file not in ("", ".", "..") and any(_is_in(os.path.realpath(path), place) for place in self._folders):
                return path
        elif not re.search(r"(^|[/\\])\.\.([/\\]|$)|^~", name):
            return name
        raise ValueError(self._refusal(name))

    def _is_in_hub(self, url: str) -> bool:
        """Return whether an address is one of this Hub data set, at any of its revisions."""
        start = None if self.is_local else re.match(rf"{HUB}{re.escape(str(self.root))}(?:@[^/]*)?/", url)
        return start is not None and "::" not in url and ".." not in PurePosixPath(unquote(url[start.end() :])).parts

    def _refusal(self, name: str) -> str:
        local = os.path.realpath(os.path.join(self.root if self.is_local else "", name))
        place = f"{name.rpartition('/')[0]}/" if "://" in name else os.path.dirname(local)
        is_place = self.is_local or "://" in name or os.path.isabs(name)
        hint = f" If you trust the data set, add {self.option} {place}" if is_place else ""
        return f"'{name}' is outside the data set '{self.root}', which may name its own files only.{hint}"


def _places_of(root: Path) -> list[str]:
    """Return the folders that hold the files of a folder: itself, and in a cache of the Hub also their contents."""
    folder = Path(os.path.realpath(root))
    snapshots = next((place for place in (folder, *folder.parents) if place.parent.name == "snapshots"), None)
    contents = None if snapshots is None else snapshots.parent.parent / "blobs"
    # A link in place of this folder could lead anywhere.
    is_there = contents is not None and os.path.realpath(contents) == str(contents)
    return [str(folder), *([str(contents)] if is_there else [])]


def _is_in(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _is_below(url: str, start: str) -> bool:
    """Return whether a URL names something below another one, on the same host."""
    if "::" in url:
        return False  # fsspec would open a second place
    try:
        one, other = urlsplit(url), urlsplit(start)
    except ValueError:
        return False
    parts, above = (PurePosixPath(unquote(place.path)).parts for place in (one, other))
    is_same_host = (one.scheme.lower(), one.netloc.lower()) == (other.scheme.lower(), other.netloc.lower())
    return is_same_host and ".." not in parts and parts[: len(above)] == above


# -------------------------------------------------------------------------------------------------------------- cards


def load_builder(source: str, files: NamedFiles, *, revision: str | None = None) -> Any:
    """
    Return the builder of a data set. Its card may choose only files of the data set, and files that the user allows.

    Args:
        source (`str`): A folder, or a Hub data set as "OWNER/NAME".
        files ([`NamedFiles`]): What the data set may name.
        revision (`str`, *optional*): Branch, tag or commit of a Hub data set.

    Returns:
        `datasets.DatasetBuilder`: The builder.

    Raises:
        `ValueError`: If its card names other files.
    """
    from datasets import load_dataset_builder

    # `datasets` opens what a card names, absolute paths and URLs too. Links are found after it has listed the files.
    for name in _card_names(source, revision):
        _check_pattern(name, files)
    builder = load_dataset_builder(source, revision=revision)
    for file in (name for names in (builder.config.data_files or {}).values() for name in names):
        files.locate(str(file).rpartition("::")[2])
    return builder


def _check_pattern(pattern: str, files: NamedFiles) -> None:
    is_plain = not os.path.isabs(pattern) and not re.search(r"(^|[/\\])\.\.([/\\]|$)|^~|://|::", pattern)
    if not is_plain:
        try:
            files.locate(pattern)
        except ValueError as error:
            raise ValueError(f"Its card names {error}") from None


def _card_names(source: str, revision: str | None) -> Iterator[str]:
    """Yield the patterns of files and the folders that a data set's card names."""
    import yaml
    from datasets.config import REPOCARD_FILENAME, REPOYAML_FILENAME
    from huggingface_hub.repocard import metadata_load

    for name in (REPOCARD_FILENAME, REPOYAML_FILENAME):
        path = _file_of(source, name, revision)
        if path is None:
            continue
        try:
            about = metadata_load(path) if name == REPOCARD_FILENAME else yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{name} of the data set '{source}' is not a card in YAML: {reason}") from None
        subsets = about.get("configs") if isinstance(about, dict) else None
        for subset in subsets if isinstance(subsets, list) else ():
            if isinstance(subset, dict):
                yield from _texts([subset.get("data_files"), subset.get("data_dir")])


def _file_of(source: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    if os.path.isdir(source):
        return path if (path := Path(source, name)).is_file() else None
    try:
        return Path(hf_hub_download(source, name, repo_type="dataset", revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None  # `datasets` says what is missing


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in lists and objects. YAML may repeat one in another, or in itself, so each is read once."""
    left, seen = [value], set()
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, (dict, list)) and id(part) not in seen:
            seen.add(id(part))
            left += part.values() if isinstance(part, dict) else part


__all__ = ["HUB", "VIDEO_FORMATS", "NamedFiles", "load_builder"]
