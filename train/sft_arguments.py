# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of `train/sft.py`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from videollm_mod.checks_videollm_mod import check_count, check_number
from videollm_mod.routers_videollm_mod import GATES, ROUTERS
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.train.arguments import Resumable, RowArguments, naming_options
from videollm_mod.train.callbacks import check_schedule
from videollm_mod.train.data.windows import MAX_FRAMES, Windows
from videollm_mod.train.new_model import layers_of


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
            "none" does not. The default is the checkpoint's, "gradient" for new routers, and "none" for a `mod_router`
            that does not learn.
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
        default=None,
        metadata={
            "help": "Loss of the routers, which needs no labels. New routers have it.",
            "choices": ["gradient", "none"],
        },
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
