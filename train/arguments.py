# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How scripts parse their arguments, and arguments that several have.

This file imports no torch, so that `--help` answers soon. Those of `train/sft.py` are in `sft_arguments.py`.
"""

import argparse
import errno
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from videollm_mod.checks_videollm_mod import check_count, check_fps
from videollm_mod.outputs import FullDiskError
from videollm_mod.train.data.faults import RowRecord
from videollm_mod.train.data.sources import SOURCES, DataSource, find_source, option_names


def parse(*types: type, **defaults: Any) -> tuple[Any, ...]:
    """
    Parse a script's arguments from the command line and from the YAML file of `--config`.

    Args:
        types: Dataclasses of arguments. The class that loads `--dataset` takes the place of [`DataSource`].
        defaults: Defaults that differ from those of the dataclasses.

    Returns:
        `tuple`: One object of each type.

    Raises:
        `SystemExit`: With a message, if an argument is unknown or a value is wrong.
    """
    try:
        given = defaults | _read_given()
        if DataSource in types and "dataset" in given:
            source = find_source(given["dataset"])
            types = tuple(source if kind is DataSource else kind for kind in types)
            _refuse_options_of_others(given, types)
        # The data set has to be known before the options are, so none may be abbreviated.
        parser = TrlParser(types, allow_abbrev=False)
        parser.set_defaults_with_config(**defaults)
        parsed = parser.parse_args_and_config()
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
    if "fps" not in given:
        _take_frame_rate(parsed)
    return parsed


def _take_frame_rate(parsed: tuple[Any, ...]) -> None:
    """Give `fps` of all arguments the frame rate of the source, if it makes its clips."""
    rate = next((each.frame_rate for each in parsed if isinstance(each, DataSource)), None)
    for each in parsed if rate is not None else ():
        if any(option.name == "fps" for option in fields(each)):
            each.fps = float(rate)


@contextmanager
def naming_options() -> Iterator[None]:
    """Name an option as the command line does in an error of a check: `num_gpus` becomes --num_gpus."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("`", "--", 1).replace("`", "", 1)) from None


def _read_given() -> dict[str, Any]:
    """Return the value of `--dataset`, and the names of all other arguments with values that do not matter."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dataset", default=argparse.SUPPRESS)
    known, others = parser.parse_known_args()
    names = {name.removeprefix("--").split("=")[0].replace("-", "_"): None for name in others if name.startswith("--")}
    config = None
    if known.config is not None:
        with open(known.config, encoding="utf-8") as file:  # the parser names a file in its errors, and no text
            config = yaml.safe_load(file)
    found = {name: value for name, value in vars(known).items() if name != "config"}
    return (config if isinstance(config, dict) else {}) | names | found


def _refuse_options_of_others(given: Iterable[str], types: tuple[type, ...]) -> None:
    """Raise an error for an option of a data source that was not chosen."""
    unknown = set(given) - {option.name for kind in types for option in fields(kind)}
    for name in SOURCES if unknown else ():
        for option in sorted(unknown & option_names(find_source(name))):
            raise ValueError(f"--{option} is an option of --dataset {name}; leave it out for other data.")


def run(main: Callable[..., None], *types: type, **defaults: Any) -> None:
    """
    Run a script with its arguments (see [`parse`]), and end its process group. A full disk, and a folder that it must
    not write or read, end it in one line.
    """
    parsed = parse(*types, **defaults)
    # Imported here, because `--help` does without.
    from accelerate import PartialState
    from datasets import disable_progress_bars

    disable_progress_bars()
    try:
        main(*parsed)
    except OSError as error:
        # Others may be faults of the program.
        if not isinstance(error, FullDiskError) and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise SystemExit(f"error: {error}") from None
    # If a process exits before its group ends, gloo's threads may free tensors too late and abort it.
    PartialState().destroy_process_group()


@dataclass
class RowArguments:
    """
    Which rows of the data to use. The data set and its options are those of a [`DataSource`].

    Args:
        train_split (`str`, *optional*, defaults to `"train"`): Split to use.
        num_clips (`int`, *optional*, defaults to 1000): Number of generated clips.
        first_clip (`int`, *optional*, defaults to 0): Index of the first generated clip.
        fps (`float`, *optional*): Frames per second that the model sees. Generated clips have one rate, which is the
            default and the only value. Otherwise defaults to 2.0.
        validate_only (`str`, *optional*): Check the data, report faults, and stop. `"quick"`, the value of the bare
            option, decodes a frame of each row, and `"full"` decodes all.
        skip_faulty (`bool`, *optional*, defaults to `False`): Leave out faulty rows, and list them at the end. If a
            video fails only during training, another row takes the place of its row.
    """

    train_split: str = field(default="train", metadata={"help": "Split to use."})
    num_clips: int = field(default=1000, metadata={"help": "Number of generated clips."})
    first_clip: int = field(default=0, metadata={"help": "Index of the first generated clip."})
    fps: float = field(
        default=2.0, metadata={"help": "Frames per second that the model sees. Generated clips have one rate."}
    )
    validate_only: str | None = field(
        default=None,
        metadata={"help": "Check the data and stop; full decodes all frames.", "nargs": "?", "const": "quick"},
    )
    skip_faulty: bool = field(default=False, metadata={"help": "Leave out faulty rows, and list them at the end."})

    def __post_init__(self) -> None:
        # A YAML file gives truth values.
        known = {"quick": "quick", "full": "full", "true": "quick", "false": None, "none": None}
        asked = str(self.validate_only).lower()
        if asked not in known:
            raise ValueError(f"--validate_only is quick or full, got {self.validate_only!r}.")
        self.validate_only = known[asked]
        with naming_options():
            check_count("num_clips", self.num_clips)
            check_count("first_clip", self.first_clip, least=0)
            check_fps(self.fps)

    def checks(self, record: RowRecord, *, decode: bool = False) -> dict[str, Any]:
        """
        Return the options of [`load_split`].

        Args:
            record ([`RowRecord`]): Where to record rows that are left out.
            decode (`bool`, *optional*, defaults to `False`): Whether to decode all frames if faulty rows are left out.
        """
        full = self.validate_only == "full" or (decode and self.skip_faulty)
        return {"fps": self.fps, "full": full, "left_out": record if self.skip_faulty else None}


class Resumable:
    """Training arguments that find the last complete checkpoint of an interrupted run."""

    def last_checkpoint(self) -> str | None:
        """
        Return the checkpoint to resume from: the named one, or the last complete one for `true`.

        A checkpoint from another number of processes is accepted, but data order and random states then differ.

        Raises:
            `SystemExit`: If the named checkpoint is incomplete, or has pickled files and is not in the output folder,
                or if the last ones may come from fewer processes.
        """
        asked = self.resume_from_checkpoint
        if asked is None or str(asked).lower() == "false":
            return None
        if str(asked).lower() != "true":
            if (fault := self._find_fault(Path(asked))) is not None:
                raise SystemExit(
                    f"--resume_from_checkpoint {asked}: {fault}. Name a complete checkpoint, "
                    "or give true for the last one."
                )
            self._refuse_pickles_of_others(Path(asked))
            return self._announced(Path(asked))
        found = [path for path in Path(self.output_dir).glob("*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        doubtful = None
        for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
            fault, count = self._find_fault(path), self._count_random_states(path)
            if fault is None and 1 < count < self.world_size:
                # Either fewer processes wrote it, or some processes were killed before they wrote their states.
                fault, doubtful = f"it has random states of {count} processes, not {self.world_size}", doubtful or path
            if fault is None:
                return self._announced(path)
            print(f"skipping '{path}', which is incomplete: {fault}")
        if doubtful is not None:
            raise SystemExit(
                f"No checkpoint in '{self.output_dir}' has random states of {self.world_size} processes. To resume "
                f"with more processes than before, give --resume_from_checkpoint {doubtful}. To start at step 0, "
                "leave --resume_from_checkpoint out."
            )
        print(f"'{self.output_dir}' has no complete checkpoint: training starts at step 0")
        return None

    def _find_fault(self, checkpoint: Path) -> str | None:
        """Return why a checkpoint is incomplete, or `None` if it is complete."""
        try:
            # The trainer writes this file last.
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "its trainer_state.json is missing or truncated"
        for name in ("model", "adapter_model"):
            pickled = "pytorch_model.bin" if name == "model" else f"{name}.bin"
            if (checkpoint / pickled).is_file() and not any(checkpoint.glob(f"{name}*.safetensors")):
                return f"its weights are pickled ({pickled}), which may run code: save them as {name}.safetensors"
        # Only the first process writes that file. The others may have been killed earlier.
        if self._count_random_states(checkpoint) == 0:
            name = "rng_state.pth" if self.world_size == 1 else "rng_state_N.pth of a process N"
            return f"its {name} is missing or truncated"
        return None

    def _refuse_pickles_of_others(self, checkpoint: Path) -> None:
        """Raise `SystemExit` if a checkpoint of another run has files that DeepSpeed or sharded FSDP unpickle."""
        own = Path(self.output_dir).resolve() in checkpoint.resolve().parents
        pickled = [] if own else sorted([*checkpoint.glob("*/**/*.pt"), *checkpoint.glob("*/.metadata")])
        if pickled:
            raise SystemExit(
                f"--resume_from_checkpoint {checkpoint}: {pickled[0].relative_to(checkpoint)} is unpickled, which may "
                f"run code, and the checkpoint is not in --output_dir '{self.output_dir}'. Move the checkpoint there "
                "if you trust it."
            )

    def _count_random_states(self, checkpoint: Path) -> int:
        """Return how many processes saved their random states, or 0 if the state of one is missing."""
        # torch writes a zip file, and its directory is at the end, which a truncated file lacks.
        names = {path.name for path in checkpoint.glob("rng_state*.pth") if zipfile.is_zipfile(path)}
        numbered = names - {"rng_state.pth"}
        if numbered != names and (self.world_size == 1 or not numbered):
            return 1
        # A single process does not number its file.
        is_whole = len(numbered) > 1 and numbered == {f"rng_state_{index}.pth" for index in range(len(numbered))}
        return len(numbered) if is_whole else 0

    def _announced(self, checkpoint: Path) -> str:
        count = self._count_random_states(checkpoint)
        if count != self.world_size:
            print(
                f"'{checkpoint}' comes from {count} processes, and this run has {self.world_size}: training continues "
                "from its weights and step, but the order of the data and the random states differ"
            )
        return str(checkpoint)
