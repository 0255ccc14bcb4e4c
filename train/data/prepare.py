# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Prepare a published data set: turn its annotations and videos into rows of timed messages.

```bash
python train/data/prepare.py coin --annotations COIN.json --videos videos --out prepared/coin --task step
python train/data/prepare.py coin --help
python train/data/prepare.py coin --annotations COIN.json --videos videos --out prepared/coin --format parquet
```

The folder of `--out` then is a `--dataset` of the other scripts. docs/data.md lists the sources.
"""

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from transformers import HfArgumentParser

from videollm_mod.outputs import path_from, write_json
from videollm_mod.train.data.converters import (
    CONVERTERS,
    SPLITS,
    Converter,
    Found,
    Notes,
    Videos,
    find_converter,
    read_json,
)
from videollm_mod.train.data.faults import counted
from videollm_mod.train.data.json_rows import LineWriter
from videollm_mod.train.data.shards import ShardWriter, shard_size, shards
from videollm_mod.train.data.windows import MAX_FRAMES


# Special tokens of common tokenizers: "<|im_end|>", "</s>", "[INST]".
_SPECIAL = re.compile(r"<\|[^<>|\s]+\|>|</?(?:s|bos|eos|pad|unk|image|video)>|\[/?(?:INST|SYS|PAD|UNK|CLS|SEP|MASK)\]")

# Half of a character, which no file can have, and the sign for a character that could not be read.
_HALF, _UNKNOWN = re.compile("[\ud800-\udfff]"), re.compile("\ufffd")
# A title that a converter puts before a text is no bracket of the annotation.
_TITLE = re.compile(r"^\[[^\[\]]*\] ")


@dataclass
class PrepareArguments:
    """
    What to prepare, and where to.

    Args:
        annotations (`Path`): The published file of annotations, or its folder.
        videos (`Path`): Folder of the videos.
        out (`Path`): Folder to write to.
        strict (`bool`, *optional*, defaults to `False`): Whether to stop at the first fault, such as a missing video.
        format (`str`, *optional*, defaults to `"jsonl"`): `"jsonl"`, or `"parquet"`, which `datasets` streams.
        max_shard_size (`str`, *optional*, defaults to `"500MB"`): Size of a Parquet file, before compression.
    """

    annotations: Path = field(metadata={"help": "The published file of annotations, or its folder."})
    videos: Path = field(metadata={"help": "Folder of the videos, with folders of any depth."})
    out: Path = field(metadata={"help": "Folder to write to."})
    strict: bool = field(
        default=False,
        metadata={"help": "Stop at the first fault, such as a missing video, and name its place."},
    )
    format: str = field(
        default="jsonl", metadata={"help": "Files to write. Parquet can be streamed.", "choices": ["jsonl", "parquet"]}
    )
    max_shard_size: str = field(default="500MB", metadata={"help": "Size of a Parquet file, before compression."})


def prepare(source: str, converter: Converter, arguments: PrepareArguments, command: str = "") -> dict[str, Any]:
    """
    Convert a source and write its splits and `OUT/about.json`. Files of an earlier run are replaced at the end, so
    that an interrupted run leaves them as they are. Splits that this run does not make stay. The lengths of videos are
    kept in `OUT/.durations.json`, so that a later run does not open them again.

    Args:
        source (`str`): Name of the source.
        converter ([`Converter`]): Its converter.
        arguments ([`PrepareArguments`]): Where everything is.
        command (`str`, *optional*): The command, for `about.json`.

    Returns:
        `dict`: What `about.json` says.

    Raises:
        `ValueError` or `OSError`: If the annotations cannot be used, if no row is left, or if splits stay that have
            another source or frame rate. With `strict`, also at the first fault.
    """
    notes = Notes(strict=arguments.strict)
    videos = Videos(arguments.videos, made_folder=arguments.out / "joined")
    shard_size(arguments.max_shard_size)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out '{arguments.out}' is a file: give a folder.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    earlier = _Earlier(arguments.out)
    if converter.split is not None:
        earlier.check(source, converter.fps, {converter.split})
    with videos.remembering(arguments.out / ".durations.json"):
        counts = _write_rows(source, converter, arguments, videos, notes, earlier)
    about = {
        "source": source,
        "tasks": [f"{source}_{task}" for task in converter.chosen],
        "license": converter.license,
        "may_be_shared": converter.may_be_shared,
        "fps": converter.fps,
        "labels": converter.labels,
        "splits": {split: describe_split(split, counts, notes) for split in _splits(counts, notes, converter)},
        "command": command,
    }
    if counts:
        kept = earlier.add_to(about, set(counts))
        write_json(arguments.out / "about.json", kept)
    print(describe_all(about, notes, arguments.out))
    if counts and not arguments.videos.resolve().is_relative_to(arguments.out.resolve()):
        print(f"The videos lie outside this folder: add --video_root {arguments.videos} where you use it.")
    if not counts:
        raise ValueError(f"no row is left of '{arguments.annotations}'; the table says why.")
    return about


def _write_rows(
    source: str,
    converter: Converter,
    arguments: PrepareArguments,
    videos: Videos,
    notes: Notes,
    earlier: "_Earlier",
) -> dict[str, Counter[str]]:
    """Write the files of all splits. Return the number of rows of each task in each split."""
    counts: dict[str, Counter[str]] = {}
    files: dict[str, LineWriter | ShardWriter] = {}
    with ExitStack() as stack:
        for split, row in _checked(converter.convert(arguments.annotations, videos, notes), converter, notes):
            if split not in files:
                files[split], counts[split] = stack.enter_context(_open(arguments, split)), Counter()
            name = "video" if "video" in row else "frame_features"
            row = {**row, name: path_from(arguments.out, row[name])}
            files[split].write(row)
            counts[split][row.get("task", "")] += 1
        if counts:
            earlier.check(source, converter.fps, set(counts))
            earlier.forget_others(source)
    for split in counts:
        # A folder has one kind of files of a split.
        others = [arguments.out / f"{split}.jsonl"] if arguments.format == "parquet" else shards(arguments.out, split)
        for other in others:
            other.unlink(missing_ok=True)
    return counts


def _open(arguments: PrepareArguments, split: str) -> LineWriter | ShardWriter:
    if arguments.format == "parquet":
        return ShardWriter(arguments.out, split, max_shard_size=arguments.max_shard_size)
    return LineWriter(arguments.out / f"{split}.jsonl")


class _Earlier:
    """What `about.json` says of the splits that earlier runs wrote into a folder."""

    def __init__(self, out: Path) -> None:
        path = out / "about.json"
        about = read_json(path) if path.exists() else {}
        self.out, self.about = out, about if isinstance(about, dict) else {}
        described = self.about.get("splits", {})
        there = [split for split in SPLITS if (out / f"{split}.jsonl").exists() or shards(out, split)]
        self.splits = {split: described[split] for split in there if split in described}

    def check(self, source: str, fps: float, made: set[str]) -> None:
        """Raise `ValueError` if splits stay beside those that are made, and have another source or frame rate."""
        stays = next((split for split in self.splits if split not in made), None)
        for name, now in (("source", source), ("fps", fps)) if stays else ():
            if (before := self.about.get(name, now)) != now:
                raise ValueError(
                    f"--out '{self.out}' holds the split {stays!r} with {name} {before}, and this run has {now}: "
                    "write to another folder."
                )

    def forget_others(self, source: str) -> None:
        """Remove `about.json` of another source: a program that is killed must not leave rows with its licence."""
        if self.about.get("source") != source:
            (self.out / "about.json").unlink(missing_ok=True)

    def add_to(self, about: dict[str, Any], made: set[str]) -> dict[str, Any]:
        """Return `about` with what is known of the splits that stay."""
        kept = {split: described for split, described in self.splits.items() if split not in made}
        if not kept:
            return about
        commands = [*self.about.get("command", "").splitlines(), about["command"]]
        return {
            **about,
            "tasks": list(dict.fromkeys([*self.about.get("tasks", ()), *about["tasks"]])),
            "labels": self.about.get("labels", {}) | about["labels"],
            "splits": about["splits"] | kept,
            "command": "\n".join(dict.fromkeys(commands)),
        }


def _checked(
    rows: Iterator[tuple[str, dict[str, Any]]], converter: Converter, notes: Notes
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows that were asked for, without those that nobody could use."""
    seen: dict[str, set[str]] = {}
    for split, row in rows:
        if not converter.accepts(split, row["id"], notes):
            continue
        notes.split = split
        texts = [message["content"] for message in row["messages"]]
        if row["id"] in seen.setdefault(split, set()):
            notes.leave_out(row["id"], "id", "there is another row with this id")
        elif place := _find_text(row, _HALF):
            notes.leave_out(row["id"].encode(errors="replace").decode(), place, "text that is not Unicode")
        elif not all(text.strip() for text in texts):
            notes.leave_out(row["id"], "messages", "a message has no text")
        elif split != "test" and not any(message["role"] == "assistant" for message in row["messages"]):
            notes.leave_out(row["id"], "messages", "no reply is left")
        else:
            seen[split].add(row["id"])
            _note_oddities(row, texts, converter.fps, notes)
            yield split, row


def _find_text(value: Any, pattern: re.Pattern[str], place: str = "") -> str | None:
    """Return the place of the first text of a row that has a pattern, such as "messages[1].content"."""
    if isinstance(value, str):
        return place if pattern.search(value) else None
    if isinstance(value, dict):
        parts = ((f"{place}.{name}".lstrip("."), part) for name, part in value.items())
    else:
        parts = ((f"{place}[{index}]", part) for index, part in enumerate(value if isinstance(value, list) else ()))
    return next((found for where, part in parts if (found := _find_text(part, pattern, where))), None)


def _note_oddities(row: dict[str, Any], texts: list[str], fps: float, notes: Notes) -> None:
    """
    Count what may surprise in rows that are kept. But for characters that are not whole, it is no fault: the processor
    never reads text as tokens.
    """
    if place := _find_text(row, _UNKNOWN):
        notes.mended(row["id"], place, "a character that is not whole or unknown: kept as U+FFFD")
    if any(_SPECIAL.search(text) for text in texts):
        notes.mended(row["id"], "messages", "text that looks like a special token: kept as text", by_rule=True)
    if any("[" in plain or "]" in plain for plain in (_TITLE.sub("", text) for text in texts)):
        notes.mended(row["id"], "messages", "brackets, as the stream format has: kept as text", by_rule=True)
    if not all(text.isascii() for text in texts):
        notes.mended(row["id"], "messages", "characters beyond ASCII, such as curly quotes: kept", by_rule=True)
    if row.get("end") is not None and (row["end"] - (row.get("start") or 0.0)) * fps >= MAX_FRAMES:
        notes.mended(row["id"], "end", f"more than {MAX_FRAMES:,} frames: kept, and split for training", by_rule=True)


def _splits(counts: dict[str, Counter[str]], notes: Notes, converter: Converter) -> list[str]:
    """Return the splits to describe. The last has no name: entries that belong to no split."""
    found = {*counts, *notes.left_out, *notes.mended_by}
    return [split for split in (*SPLITS, "") if split in found and (not split or converter.wants(split))]


def describe_split(split: str, counts: dict[str, Counter[str]], notes: Notes) -> dict[str, Any]:
    """Return what `about.json` says of a split: its rows, and what was left out or mended."""
    tasks = counts.get(split, Counter())
    return {
        "rows": tasks.total(),
        "tasks": dict(sorted(tasks.items())),
        "left_out": {reason: found.count for reason, found in notes.left_out.get(split, {}).items()},
        "mended": {what: found.count for what, found in notes.mended_by.get(split, {}).items()},
    }


def describe_all(about: dict[str, Any], notes: Notes, out: Path) -> str:
    """
    Return what was kept, what was left out and why, and what was mended, with the first places. The last line names
    the folder that was written to, if there is any row.
    """
    lines = []
    for split, of_split in about["splits"].items():
        tasks = [f"{count} {task}" for task, count in of_split["tasks"].items() if task]
        named = f"{split}: {counted(of_split['rows'], 'row')}" if split else "in no split"
        lines.append(named + (f" ({', '.join(tasks)})" if tasks else ""))
        for kind, found in (("left out", notes.left_out), ("mended", notes.mended_by)):
            lines += [f"  {kind} {line}" for line in _found_lines(found.get(split, {}))]
    has_rows = any(of_split["rows"] for of_split in about["splits"].values())
    return "\n".join([*lines, f"wrote {out}"] if has_rows else lines)


def _found_lines(found: dict[str, Found]) -> Iterator[str]:
    for reason, of_reason in sorted(found.items(), key=lambda item: -item[1].count):
        more = ", ..." if of_reason.count > len(of_reason.places) else ""
        yield f"{of_reason.count}: {reason} ({'; '.join(of_reason.places)}{more})"


def main() -> None:
    """Prepare the source that the first argument names."""
    usage = f"usage: prepare.py {{{','.join(sorted(CONVERTERS))}}} --annotations PATH --videos DIR --out DIR\n"
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(usage + "\nprepare.py SOURCE --help lists the options of a source.")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    source, *rest = sys.argv[1:]
    try:
        kinds = (PrepareArguments, find_converter(source))
        parser = HfArgumentParser(kinds, prog=f"prepare.py {source}", allow_abbrev=False)
        arguments, converter = parser.parse_args_into_dataclasses(rest)
        command = shlex.join(["python", "train/data/prepare.py", *sys.argv[1:]])
        # Names of files need not be Unicode, and `about.json` must be.
        prepare(source, converter, arguments, command.encode(errors="replace").decode())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    quiet()
    main()
