# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Estimate what a training run costs, without loading weights: steps, tokens, operations, memory and hours.

The estimates are arithmetic, not measurements. Docstrings and printed lines say what they leave out.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import get_peft_model

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.train.data.faults import RowRecord, counted
from videollm_mod.train.data.windows import Survey, Windows, split_rows, survey
from videollm_mod.train.new_model import choose_parts, plan_model


# Importing the arguments loads TRL, which only training needs.
if TYPE_CHECKING:
    from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig


@dataclass(frozen=True)
class Device:
    """
    A GPU as its maker describes it.

    Args:
        tflops (`float`): Peak of dense bfloat16 matrix products with float32 sums, in 1e12 operations per second.
        gigabytes (`float`): Memory, in 1e9 bytes.
    """

    tflops: float
    gigabytes: float


# From NVIDIA's data sheets; the figures without sparsity.
DEVICES = {
    "A100": Device(312.0, 80.0),
    "H100": Device(989.4, 80.0),
    "H200": Device(989.4, 141.0),
    "L40S": Device(362.05, 48.0),
    "RTX 4090": Device(165.2, 24.0),
}


@dataclass(frozen=True)
class Memory:
    """
    Bytes on one GPU during a step.

    Not counted: the CUDA context, buffers of communication, logits, frames as pixels, what the vision encoder needs
    while it runs, and memory that fragments.

    Args:
        weights (`int`): All weights, in the type they are loaded in, the vision encoder's included.
        trained (`int`): The part of `weights` that is trained: the adapter, connector and routers, or all.
        gradients (`int`): One number per trained weight, in its type.
        optimizer (`int`): AdamW's two moments per trained weight, in its type. With ZeRO, in float32, with a float32
            copy of the weight.
        activations (`int`): What the backward pass keeps of the longest window, with 2 bytes a number. With
            checkpointing: the input of each layer, and the content of one layer, which is computed again.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them. `trained` is a part of `weights`."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Estimate:
    """
    Estimates for one model.

    Args:
        config ([`VideoLLMMoDConfig`]): The model's configuration.
        arguments ([`ModelArguments`]): What is trained.
        dtype (`torch.dtype`): Type of the weights.
        checkpointing (`bool`): Whether layers are computed again in the backward pass.
        has_features (`bool`): Whether frames come as features, so that the vision encoder does not run.
    """

    def __init__(
        self, config: Any, arguments: "ModelArguments", *, dtype: torch.dtype, checkpointing: bool, has_features: bool
    ) -> None:
        self.config, self.checkpointing, self.has_features = config, checkpointing, has_features
        self.is_full, self.tunes_vision = arguments.tune_language_model == "full", arguments.tune_vision_encoder
        # On this device tensors have a shape and no content.
        with torch.device("meta"):
            self.model = VideoLLMMoDForConditionalGeneration._from_config(config, dtype=dtype)
            adapter = choose_parts(self.model, arguments)
            self.trained = self.model if adapter is None else get_peft_model(self.model, adapter)
        sizes = {name: weight.numel() for name, weight in self.trained.named_parameters() if ".lora_" in name}
        layers = range(config.text_config.num_hidden_layers)
        self.adapter_sizes = [sum(n for name, n in sizes.items() if f".layers.{index}." in name) for index in layers]
        self.head_adapter_size = sum(sizes.values()) - sum(self.adapter_sizes)

    def training_flops(self, frames: int, text_tokens: int, *, is_causal: bool = True) -> float:
        """
        Return the operations of a forward and backward pass over one window.

        A matrix product of a trained weight costs three times its forward pass, of a frozen one two times, attention
        three times, and each of them once more if it is computed again.

        Args:
            frames (`int`): Number of frames.
            text_tokens (`int`): Number of other tokens.
            is_causal (`bool`, *optional*, defaults to `True`): Whether the kernel of attention does only the half that
                is not masked. `False` counts all, as `torch.utils.flop_counter` does.
        """
        text, cost = self.config.text_config, self.model.estimate_cost(frames, text_tokens)
        again = int(self.checkpointing)
        # Without a past, a layer's cache has the tokens that it runs on.
        tokens = cost.cache_entries
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        attention = sum(4 * count**2 * text.num_attention_heads * head_dim for count in tokens)
        positions = frames + text_tokens
        head = 2 * positions * text.hidden_size * text.vocab_size
        linear = cost.flops - attention - head
        adapter = sum(2 * count * size for count, size in zip(tokens, self.adapter_sizes, strict=True))
        total = linear * (2 + self.is_full + again) + adapter * (3 + again)
        total += attention * (3 + again) / (1 + is_causal)
        # The fused head of TRL keeps no logits: it computes them again. An adapter makes its weight a trained one.
        total += (head + 2 * positions * self.head_adapter_size) * (3 + bool(self.head_adapter_size or self.is_full))
        vision = 0 if self.has_features else cost.vision_flops * (3 if self.tunes_vision else 1)
        return total + vision

    def memory(self, frames: int, text_tokens: int, *, zero_stage: int = 0, num_gpus: int = 1) -> Memory:
        """
        Return the memory of a step on windows with together so many frames and other tokens.

        ZeRO shards the optimizer (stage 1), the gradients as well (2), and all weights as well (3): see
        arXiv 1910.02054, section 5. In stage 3 a GPU also holds the complete weights of the layer that it computes.

        Args:
            frames (`int`): Number of frames.
            text_tokens (`int`): Number of other tokens.
            zero_stage (`int`, *optional*, defaults to 0): Stage of ZeRO. 0 shards nothing, as DDP.
            num_gpus (`int`, *optional*, defaults to 1): Number of GPUs that share.
        """
        parameters = dict(self.trained.named_parameters())
        weights = {name: weight.numel() * weight.itemsize for name, weight in parameters.items()}
        learns = [name for name, weight in parameters.items() if weight.requires_grad]
        trained = gradients = sum(weights[name] for name in learns)
        total, optimizer = sum(weights.values()), 2 * trained
        if zero_stage >= 1:
            optimizer = 3 * 4 * sum(parameters[name].numel() for name in learns) // num_gpus
        if zero_stage >= 2:
            gradients //= num_gpus
        if zero_stage >= 3:
            layers = [f"language_model.layers.{index}." for index in range(self.config.text_config.num_hidden_layers)]
            whole = max(sum(size for name, size in weights.items() if layer in name) for layer in layers)
            total, trained = total // num_gpus + whole, trained // num_gpus
        text, entries = self.config.text_config, self.config.estimate_cost(frames, text_tokens).cache_entries
        contents = [2 * count * self._numbers_per_token for count in entries]
        if self.checkpointing:
            inputs = 2 * (frames * self.config.frame_num_tokens + text_tokens) * text.hidden_size
            activations = len(entries) * inputs + max(contents)
        else:
            activations = sum(contents)
        return Memory(total, trained, gradients, optimizer, activations)

    @property
    def _numbers_per_token(self) -> int:
        """How many numbers of 2 bytes the backward pass of a layer keeps per token, with a fused attention kernel."""
        text = self.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query = text.num_attention_heads * head_dim
        key_value = getattr(text, "num_key_value_heads", text.num_attention_heads) * head_dim
        # Residuals and normalised inputs; query, key, value and output of attention; gate, up, activation and product.
        plain = 6 * text.hidden_size + 2 * query + 2 * key_value + 4 * text.intermediate_size
        # LoRA keeps a copy of the input of each of its seven layers after dropout, and the mask in half a number.
        dropped = 5 * text.hidden_size + query + text.intermediate_size
        return plain + (3 * dropped // 2 if any(self.adapter_sizes) else 0)


def plan_run(
    rows: Dataset,
    script: "ScriptArguments",
    training: "StreamingSFTConfig",
    arguments: "ModelArguments",
    record: RowRecord,
) -> Iterator[str]:
    """
    Yield lines about what there is to train on, and with `script.dry_run` about what that costs.

    Tokens are counted if a model is named. No frame is decoded.

    Args:
        rows (`Dataset`): Rows of the training split.
        script ([`ScriptArguments`]), training ([`StreamingSFTConfig`]), arguments ([`ModelArguments`]): The run.
        record ([`RowRecord`]): Where to record rows that cannot be split, with `script.skip_faulty`.

    Raises:
        `SystemExit`: If `script.dry_run` has no model.
    """
    config, windows = plan_windows(script, training, arguments)
    rows = split_rows(rows, windows, left_out=record if script.skip_faulty else None)
    found = survey(rows, windows)
    yield from found.lines()
    if script.dry_run:
        has_features = rows[0].get("frame_features") is not None
        options = {name: getattr(script, name) for name in ("num_gpus", "utilization", "zero_stage")}
        yield from describe_run(found, config, arguments, training, **options, has_features=has_features)


def plan_windows(
    script: "ScriptArguments", training: "StreamingSFTConfig", arguments: "ModelArguments"
) -> tuple[Any, Windows]:
    """Return the model's configuration, `None` if no model is named, and the limits of its windows."""
    if script.dry_run and not arguments.is_given:
        raise SystemExit("error: --dry_run needs a model, such as --checkpoint.")
    config, processor = plan_model(arguments) if arguments.is_given else (None, None)
    return config, script.windows(config, processor, max_length=training.max_length)


def describe_run(
    found: Survey,
    config: Any,
    arguments: "ModelArguments",
    training: "StreamingSFTConfig",
    *,
    num_gpus: int,
    utilization: float,
    zero_stage: int,
    has_features: bool,
) -> Iterator[str]:
    """
    Yield lines about a run: steps, tokens, operations, memory and hours, at full compute and routed.

    Args:
        found ([`Survey`]): The windows, with their tokens.
        config ([`VideoLLMMoDConfig`]): The model's configuration.
        arguments ([`ModelArguments`]): What is trained.
        training ([`StreamingSFTConfig`]): Batches, epochs and steps.
        num_gpus (`int`): Number of GPUs.
        utilization (`float`): Share of a GPU's peak that training reaches.
        zero_stage (`int`): Stage of ZeRO, which shards among the GPUs.
        has_features (`bool`): Whether frames come as features.
    """
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    per_step = size * accumulated * num_gpus
    steps, epochs = count_steps(len(found.frames), per_step, training)
    windows = epochs * len(found.frames)
    yield (
        f"{counted(steps, 'step')} of up to {counted(per_step, 'window')} ({counted(num_gpus, 'GPU')} x {size} x "
        f"{accumulated} accumulated), {epochs:g} epochs"
    )
    yield f"{sum(found.tokens) * epochs / steps:,.0f} tokens a step on average"
    pairs = list(zip(found.frames, found.tokens, strict=True))
    places = [(frames, tokens - frames * config.frame_num_tokens) for frames, tokens in pairs]
    longest = places[found.tokens.index(max(found.tokens))]
    full = copy.deepcopy(config)
    full.mod_keep_ratio = 1.0
    options = {"dtype": dtype_of(arguments, config), "checkpointing": training.gradient_checkpointing}
    for name, variant in {"full compute": full, "routed": config}.items():
        estimate = Estimate(variant, arguments, **options, has_features=has_features)
        total = sum(estimate.training_flops(*place) for place in places) / len(places) * windows
        memory = estimate.memory(*(size * count for count in longest), zero_stage=zero_stage, num_gpus=num_gpus)
        yield f"{name}: {_short(total / steps / 1e12)} TFLOP a step, {_short(total / 1e18)} EFLOP in all"
        yield f"  memory of a GPU: {describe_memory(memory)}"
        yield f"  hours on {counted(num_gpus, 'GPU')}: {describe_hours(total / num_gpus / utilization, memory)}"
    held = f"with ZeRO-{zero_stage}" if zero_stage else "as with DDP, where each GPU holds everything"
    yield (
        f"These are estimates. Hours: at {utilization:.0%} of the published peak of dense bfloat16, without loading, "
        f"evaluation, saving, and waiting for data. Memory: {held}. The CUDA context, communication, logits, pixels, "
        "the vision encoder's work and fragmentation are not counted."
    )


def describe_hours(flops: float, memory: Memory) -> str:
    """Return the hours that each GPU takes at its peak, and which have too little memory."""
    times = []
    for name, device in DEVICES.items():
        is_small = memory.total > device.gigabytes * 1e9
        times.append(f"{name} {_short(flops / device.tflops / 1e12 / 3600)}{' (too small)' if is_small else ''}")
    return ", ".join(times)


def count_steps(num_windows: int, per_step: int, training: "StreamingSFTConfig") -> tuple[int, float]:
    """Return the number of optimizer steps and of epochs, as the trainer counts them."""
    per_epoch = max(1, math.ceil(num_windows / per_step))
    if training.max_steps > 0:
        return training.max_steps, training.max_steps / per_epoch
    return max(1, math.ceil(training.num_train_epochs * per_epoch)), training.num_train_epochs


def describe_memory(memory: Memory) -> str:
    """Return the parts of an estimate in words."""
    weights, trained, gradients, optimizer, activations = (
        _short(size / 1e9)
        for size in (memory.weights, memory.trained, memory.gradients, memory.optimizer, memory.activations)
    )
    return (
        f"{_short(memory.total / 1e9)} GB: weights {weights} ({trained} of them trained), gradients {gradients}, "
        f"optimizer {optimizer}, activations {activations}"
    )


def _short(number: float) -> str:
    return f"{number:,.2f}" if number >= 0.1 or number == 0 else f"{number:.2g}"


def dtype_of(arguments: "ModelArguments", config: Any) -> torch.dtype:
    """Return the type in which the weights are loaded."""
    if arguments.dtype != "auto":
        return getattr(torch, arguments.dtype)
    return config.dtype or config.text_config.dtype or torch.float32
