# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of the training scripts."""

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

import datasets
import torch
import yaml
from accelerate import PartialState
from trl import SFTConfig, TrlParser

from videollm_mod.checks_videollm_mod import check_count, check_fps, check_number
from videollm_mod.outputs import FullDiskError
from videollm_mod.routers_videollm_mod import GATES, ROUTERS
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.train.callbacks import check_schedule
from videollm_mod.train.data.faults import RowRecord
from videollm_mod.train.data.sources import SOURCES, DataSource, find_source, option_names
from videollm_mod.train.data.windows import MAX_FRAMES, Windows
from videollm_mod.train.new_model import layers_of


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
    datasets.disable_progress_bars()
    try:
        main(*parse(*types, **defaults))
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


@dataclass
class ScriptArguments(RowArguments):
    """
    Which rows to train and evaluate on, and how; see also [`RowArguments`].

    Args:
        eval_split (`str`, *optional*): Split to evaluate on.
        num_eval_clips (`int`, *optional*, defaults to 64): Number of generated clips to evaluate on.
        num_streamed_clips (`int`, *optional*, defaults to 8): Number of rows of the evaluation split to stream at each
            evaluation, for LIVE's measures, event F1 and a printed sample.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read the training rows while the model trains,
            from Parquet files or the Hub. It needs `max_steps`.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Rows that a stream holds in memory, in each worker, to
            draw the next from. 0 keeps their order.
        augmentation (`float`, *optional*, defaults to 0.0): Share of replies to corrupt in training, so that the model
            does not copy from text.
        keep_ratio_warmup_steps (`int`, *optional*, defaults to 0): Number of steps during which the keep ratio falls
            from 1 to its final value.
        keep_ratio_hold_steps (`int`, *optional*, defaults to 0): Number of steps before that, in which routed layers
            keep all tokens of a frame but one.
        max_frames (`int`, *optional*, defaults to 1200): Most frames of a row, as in VideoLLM-online. Longer rows, and
            those with more tokens than `max_length`, are split into windows (see [`Windows`]).
        window_replies (`int`, *optional*, defaults to 0): Earlier replies that a window begins with, as text.
        dry_run (`bool`, *optional*, defaults to `False`): Check the data, print what training would cost, and stop. No
            weights are loaded.
        num_gpus (`int`, *optional*, defaults to 1): Number of GPUs that `dry_run` reckons with.
        utilization (`float`, *optional*, defaults to 0.4): Share of a GPU's peak that `dry_run` reckons with.
        zero_stage (`int`, *optional*, defaults to 0): Stage of DeepSpeed's ZeRO, from 0 to 3, that `dry_run` reckons
            with. The configuration of `accelerate launch` chooses the stage of a run.
    """

    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    num_eval_clips: int = field(default=64, metadata={"help": "Number of generated clips to evaluate on."})
    num_streamed_clips: int = field(default=8, metadata={"help": "Number of rows to stream at each evaluation."})
    streaming: bool = field(default=False, metadata={"help": "Read the rows while the model trains; set --max_steps."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream to draw the next from."})
    augmentation: float = field(default=0.0, metadata={"help": "Share of replies to corrupt in training."})
    keep_ratio_warmup_steps: int = field(default=0, metadata={"help": "Steps while the keep ratio falls from 1."})
    keep_ratio_hold_steps: int = field(default=0, metadata={"help": "Steps before the keep ratio falls."})
    max_frames: int = field(default=MAX_FRAMES, metadata={"help": "Most frames of a row; longer ones are split."})
    window_replies: int = field(default=0, metadata={"help": "Earlier replies that a window begins with, as text."})
    dry_run: bool = field(default=False, metadata={"help": "Check the data, print what training costs, and stop."})
    num_gpus: int = field(default=1, metadata={"help": "Number of GPUs, for --dry_run."})
    utilization: float = field(default=0.4, metadata={"help": "Share of a GPU's peak, for --dry_run."})
    zero_stage: int = field(
        default=0, metadata={"help": "Stage of DeepSpeed's ZeRO, for --dry_run.", "choices": [0, 1, 2, 3]}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        with naming_options():
            names = ("num_streamed_clips", "shuffle_buffer", "keep_ratio_warmup_steps", "keep_ratio_hold_steps")
            for name in (*names, "window_replies"):
                check_count(name, getattr(self, name), least=0)
            for name in ("num_eval_clips", "num_gpus"):
                check_count(name, getattr(self, name))
            check_number("augmentation", self.augmentation, least=0, most=1)
            check_number("utilization", self.utilization, above=0, most=1)

    def windows(self, config: Any, processor: Any, *, max_length: int | None = None) -> Windows:
        """
        Return what splits long rows for a model.

        Args:
            config ([`VideoLLMMoDConfig`], *optional*): The model's configuration.
            processor ([`VideoLLMMoDProcessor`], *optional*): Its processor. Without it, tokens are not counted.
            max_length (`int`, *optional*): Most tokens of a window. Defaults to the model's context.

        Raises:
            `SystemExit`: With a message, if a limit is wrong.
        """
        context = None if config is None else getattr(config.text_config, "max_position_embeddings", None)
        if max_length is not None and max_length < 1:
            raise SystemExit(f"error: --max_length must be at least 1, got {max_length}.")
        if context is not None and (max_length or 0) > context:
            raise SystemExit(f"error: --max_length {max_length} is more than the model's context, {context} tokens.")
        most = None if processor is None else max_length or context
        try:
            with naming_options():
                return Windows(processor, self.fps, self.max_frames, most, self.window_replies)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None


@dataclass
class ModelArguments:
    """
    Which model and which of its parts to train.

    Give `checkpoint`, or `model_config`, or `vision_model` and `language_model`.

    Args:
        checkpoint (`str`, *optional*): A VideoLLM-MoD checkpoint to continue from: a folder or a Hub id.
        model_config (`str`, *optional*): JSON file of a new small model with its own tokenizer.
        vision_model (`str`, *optional*): Image encoder of a new model: a folder or a Hub id.
        language_model (`str`, *optional*): Language model of a new model: a folder or a Hub id.
        mod_layers (`str`, *optional*): Routed layers: a scheme, or indices such as "1,3,5". The default is the
            checkpoint's.
        mod_keep_ratio (`float`, *optional*): Share of each frame's tokens that routed layers keep.
        mod_router (`str`, *optional*): Router type: "learned", "change", "uniform", "random", or a registered type.
        mod_gate (`str`, *optional*): Gate of the routers.
        mod_router_loss (`str`, *optional*): "gradient" also trains routers to keep what the loss is sensitive to, and
            "none" does not. The default is the checkpoint's, and "none" for a `mod_router` that does not learn.
        mod_router_loss_weight (`float`, *optional*): Weight of that loss.
        frame_token_pooled (`list[int]`, *optional*): Grid of pooled tokens per frame in a new model.
        stream_loss_weight (`float`, *optional*): Weight of the loss at frame tokens.
        tune_language_model (`str`, *optional*, defaults to `"lora"`): `"lora"`, `"full"` or `"frozen"`.
        tune_connector (`bool`, *optional*, defaults to `True`): Whether to train the connector.
        tune_routers (`bool`, *optional*, defaults to `True`): Whether to train the routers.
        tune_vision_encoder (`bool`, *optional*, defaults to `False`): Whether to train the vision encoder.
        lora_r (`int`, *optional*, defaults to 128): Rank of LoRA, as in VideoLLM-online.
        lora_alpha (`int`, *optional*, defaults to 256): Scale of LoRA, as in VideoLLM-online.
        lora_dropout (`float`, *optional*, defaults to 0.05): Dropout of LoRA, as in VideoLLM-online.
        merge_adapter (`bool`, *optional*, defaults to `True`): Merge the adapter into the weights at the end. `False`
            saves only the adapter.
        load_in_4bit (`bool`, *optional*, defaults to `False`): QLoRA: load the language model of a checkpoint in
            4 bits, by bitsandbytes.
        attn_implementation (`str`, *optional*): Attention implementation of the model.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
    """

    checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue from: a folder or a Hub id."}
    )
    model_config: str | None = field(default=None, metadata={"help": "JSON file of a new small model."})
    vision_model: str | None = field(default=None, metadata={"help": "Image encoder of a new model."})
    language_model: str | None = field(default=None, metadata={"help": "Language model of a new model."})
    mod_layers: str | None = field(default=None, metadata={"help": "Routed layers: a scheme, or 1,3,5."})
    mod_keep_ratio: float | None = field(default=None, metadata={"help": "Share of each frame's tokens to keep."})
    mod_router: str | None = field(default=None, metadata={"help": f"Router type: {', '.join(ROUTERS)}."})
    mod_gate: str | None = field(default=None, metadata={"help": f"Gate of the routers: {', '.join(GATES)}."})
    mod_router_loss: str | None = field(
        default=None, metadata={"help": "Loss of the routers, which needs no labels.", "choices": ["gradient", "none"]}
    )
    mod_router_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the routers' loss."})
    frame_token_pooled: list[int] | None = field(
        default=None, metadata={"help": "Grid of a new model's frame tokens."}
    )
    stream_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the loss at frame tokens."})
    tune_language_model: str = field(
        default="lora", metadata={"help": "How to train the language model.", "choices": ["lora", "full", "frozen"]}
    )
    tune_connector: bool = field(default=True, metadata={"help": "Whether to train the connector."})
    tune_routers: bool = field(default=True, metadata={"help": "Whether to train the routers."})
    tune_vision_encoder: bool = field(default=False, metadata={"help": "Whether to train the vision encoder."})
    lora_r: int = field(default=128, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    merge_adapter: bool = field(default=True, metadata={"help": "Merge the adapter into the weights at the end."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the language model in 4 bits."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights: auto, float32 or bfloat16."})

    def __post_init__(self) -> None:
        for option in ("checkpoint", "vision_model", "language_model"):
            if (name := getattr(self, option)) is not None:
                setattr(self, option, check_checkpoint(name))
        with naming_options():
            check_count("lora_r", self.lora_r)
            check_number("lora_alpha", self.lora_alpha, above=0)
            check_number("lora_dropout", self.lora_dropout, least=0, most=1)

    @property
    def is_given(self) -> bool:
        """Whether a model is named."""
        return any((self.checkpoint, self.model_config, self.vision_model, self.language_model))

    def base_models(self) -> list[str]:
        """Return the checkpoints that the model is made from."""
        given = (self.checkpoint, self.vision_model, self.language_model)
        return [name for name in given if name is not None]

    def grid(self) -> dict[str, Any]:
        """Return the grid of pooled tokens for a new model, if it was given."""
        return {} if self.frame_token_pooled is None else {"frame_token_pooled": self.frame_token_pooled}

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the model's configuration that were given."""
        names = ("mod_layers", "mod_keep_ratio", "mod_router", "mod_gate", "stream_loss_weight")
        names += ("mod_router_loss", "mod_router_loss_weight")
        fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        router = ROUTERS.get(self.mod_router)
        if self.mod_router_loss == "none" or (self.mod_router_loss is None and router and not router.learns):
            fields["mod_router_loss"] = None
        return fields | ({"mod_layers": layers_of(self.mod_layers)} if self.mod_layers is not None else {})


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


@dataclass
class StreamingSFTConfig(Resumable, SFTConfig):
    """
    TRL's [`SFTConfig`] with the defaults of VideoLLM-online (arXiv 2406.11816, section 4).

    Args:
        max_minutes (`float`, *optional*): Time for training. If it is too short for all steps, training has fewer
            steps, and the learning rate schedule is shortened to fit. It must depend on the number of steps.
        max_length (`int`, *optional*): Most tokens of a window (see [`ScriptArguments`]). Defaults to the model's
            context, and may not exceed it.
        router_learning_rate (`float`, *optional*): Initial learning rate of the routers. Defaults to `learning_rate`.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate."})
    router_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the routers."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Number of warm-up steps; below 1, their share."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs all columns."})
    max_minutes: float | None = field(default=None, metadata={"help": "Time for training, in minutes."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a window. Default: the context."})

    def __post_init__(self) -> None:
        with naming_options():
            if self.max_minutes is not None:
                check_number("max_minutes", self.max_minutes, above=0)
            if self.router_learning_rate is not None:
                check_number("router_learning_rate", self.router_learning_rate, least=0)
        if self.padding_free:
            raise ValueError(
                "--padding_free does not work, because the collator makes the batches: use --packing true."
            )
        if (strategy := self.train_sampling_strategy) not in ("random", "sequential"):
            raise ValueError(f"--train_sampling_strategy {strategy} needs lengths of rows: use random or sequential.")
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # Without an accelerator, Transformers accepts bf16 only together with `use_cpu`.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # Transformers hides the bar when it logs errors only.
        self.disable_tqdm = bool(self.disable_tqdm)
        # The collator tokenizes.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        if self.max_minutes is not None:
            check_schedule(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the Hub token, because the trainer saves and publishes its arguments."""
        return {**self.__dict__, "hub_token": None}
