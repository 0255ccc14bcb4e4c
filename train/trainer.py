# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer for streams: it weights the loss at each frame, and logs routing and streaming figures."""

import re
import resource
import sys
import time as clock
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset, Subset
from trl import SFTTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import maybe_gather_lm_head_ctx

from videollm_mod.train.card import write_card
from videollm_mod.train.checkpoint_files import WholeCheckpoints
from videollm_mod.train.collator import normalize_pixels
from videollm_mod.train.streaming_evaluation import free_streaming, stream_example
from videollm_mod.train.teacher_forcing import Turn, predict_all_turns, score_turns


class StreamingSFTTrainer(WholeCheckpoints, SFTTrainer):
    """
    TRL's [`SFTTrainer`] for streaming dialogues, with one forward pass per step.

    The loss is the model's own: cross-entropy on text plus `config.stream_loss_weight` times cross-entropy at each
    frame's last token, over the number of labels (LIVE, arXiv 2406.11816, section 3.2). It logs TRL's
    figures and these, each over all processes and steps since the last log:

    - `text_loss` and `stream_loss`: unweighted means per label.
    - `tokens_per_second`, which counts padding too, and `frames_per_second`.
    - `peak_memory_gb` of the main process.
    - `router_score_mean` and `router_score_std`, of the scores of all positions of a batch, also of each routed layer,
      `.../layer_N`, and `kept_share/layer_N`, the share of frame tokens that it keeps.

    At each evaluation the rows of `eval_dataset` are measured by [`score_turns`]: LIVE's four measures and two more.

    Args:
        args, kwargs: As of [`SFTTrainer`].
        stream_examples (sequence of `dict`, *optional*): Rows with `messages` and `video`. At each evaluation they are
            streamed freely, and what was said of the first is printed.
        fps (`float`, *optional*, defaults to 2.0): Frames a second to stream them at.
        router_learning_rate (`float`, *optional*): Initial learning rate of routers. Defaults to that of all weights.
        about (`dict`, *optional*): `dataset` and `base_models`, for the card (see [`write_card`]).

    Raises:
        `ValueError`: If `config.stream_loss_weight` is not 1 and the loss is another one: `label_smoothing_factor`,
            `compute_loss_func` or `loss_type="dft"`.
    """

    def __init__(
        self,
        *args: Any,
        stream_examples: Sequence[dict[str, Any]] = (),
        fps: float = 2.0,
        router_learning_rate: float | None = None,
        about: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        model = args[0] if args else kwargs["model"]
        with _fused_head(model):
            super().__init__(*args, **kwargs)
        self.stream_examples, self.fps, self.about = stream_examples, fps, about or {}
        self.router_learning_rate = router_learning_rate
        self._config = self.accelerator.unwrap_model(self.model).config
        self._check_loss()
        # Counts stay on the device until they are logged, so that no step waits for them.
        self._sums: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._router_scores: dict[str, list[torch.Tensor]] = {}
        self._since = clock.perf_counter()
        for name, module in self.model.named_modules():
            # Check an attribute: classes of remote code differ from the ones imported here.
            if getattr(type(module), "learns", False):
                layer = re.search(r"layers\.(\d+)\.router", name).group(1)
                module.register_forward_hook(partial(self._keep_scores, layer))

    def _check_loss(self) -> None:
        """Refuse losses that TRL computes from logits, which have no weights, or from powers of weighted ones."""
        others = {
            "label_smoothing_factor": self.args.label_smoothing_factor > 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "loss_type='dft'": self.args.loss_type == "dft",
        }
        weight = self._config.stream_loss_weight
        if weight != 1 and any(others.values()):
            other = next(name for name, is_used in others.items() if is_used)
            raise ValueError(f"`stream_loss_weight` {weight} does not work with `{other}`: set it to 1, or use 'nll'.")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Normalise frames where the model is: they come as uint8."""
        inputs, model = super()._prepare_inputs(inputs), self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if is_peft_model(model) else model
        return normalize_pixels(inputs, self.processing_class, dtype=model.model.vision_encoder.dtype)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss with weighted log-probabilities at frames."""
        return super().compute_loss(_Weighted(model, self._call_fused), inputs, *args, **kwargs)

    def _call_fused(self, model: Any, inputs: dict[str, Any]) -> Any:
        with _fused_head(self.accelerator.unwrap_model(model)):
            return self._weigh(model(**inputs), inputs)

    def _weigh(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        # TRL stores the log-probability of token i + 1 at position i, and 0 where there is none.
        is_frame = (inputs["input_ids"] == self._config.frame_token_id).to(outputs.log_probs.device)
        # The model decides at the last token of a frame, or of the text after it.
        suffix, log_probs = len(self.processing_class.frame_suffix_ids), outputs.log_probs
        at_frame = torch.nn.functional.pad(is_frame, (suffix, 0))[:, : log_probs.shape[1]]
        with torch.no_grad():
            mask = inputs.get("attention_mask")
            parts = [torch.ones_like(is_frame) if mask is None else mask.to(is_frame.device), is_frame]
            for place in (~at_frame, at_frame):
                parts += [-log_probs * place, outputs.label_mask * place]
            self._sums[self._mode].append(torch.stack([part.sum().float() for part in parts]))
        outputs.log_probs = torch.where(at_frame, self._config.stream_loss_weight * log_probs, log_probs)
        return outputs

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _keep_scores(self, layer: str, module: Any, _inputs: Any, scores: torch.Tensor) -> None:
        # A pointwise router scores all tokens without gradient, then the kept ones again.
        if self.model.training and not (module.is_pointwise and scores.requires_grad):
            scores = scores.detach().float()
            self._router_scores.setdefault(layer, []).append(torch.stack([scores.mean(), scores.std()]))

    def _gather(self, numbers: torch.Tensor) -> torch.Tensor:
        """Gather numbers (count,) from every process as (processes, count) on the host."""
        return self.accelerator.gather(numbers[None]).cpu()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as Transformers does, and give routers their own learning rate if there is one."""
        is_new, rate = self.optimizer is None, self.router_learning_rate
        optimizer = super().create_optimizer(*args, **kwargs)
        if not is_new or rate is None:
            return optimizer
        learners = [module for module in self.model.modules() if getattr(type(module), "learns", False)]
        routers = {id(weight) for module in learners for weight in module.parameters()}
        for group in list(optimizer.param_groups):
            both = {False: [], True: []}
            for weight in group["params"]:
                both[id(weight) in routers].append(weight)
            if both[True]:
                group["params"] = both[False]
                optimizer.add_param_group({**group, "params": both[True], "lr": rate})
        return optimizer

    def get_train_dataloader(self) -> Any:
        """Return TRL's loader. For a stream it has a generator, so that it draws nothing from the global one."""
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, IterableDataset):
            # A resumed run restores the global generator before the loader draws the seed of its workers.
            inner = getattr(loader, "base_dataloader", loader)
            inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loader without augmentation and replaced rows, which are for training only."""
        training_collator, self.data_collator = self.data_collator, copy(self.data_collator)
        self.data_collator.augmentation, self.data_collator.replacements = 0.0, None
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training_collator

    def evaluate(
        self, eval_dataset: Any = None, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate as TRL does, and add LIVE's measures and streaming (`eval_lm_ppl`, `eval_event_f1`, ...)."""
        started = clock.perf_counter()
        metrics = super().evaluate(eval_dataset, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        # With several data sets, this method runs once for each.
        metrics |= {} if isinstance(rows, dict) else self._stream(rows, metric_key_prefix)
        # Evaluation does not count towards the training speed.
        self._since += clock.perf_counter() - started
        return metrics

    def _stream(self, rows: Any, metric_key_prefix: str) -> dict[str, float]:
        processor, show = self.processing_class, {"fps": self.fps, "progress": False}
        with self._whole_model() as model:
            was_training, use_cache = model.training, model.config.text_config.use_cache
            model.eval()
            dialogues = self._predict_turns(model, rows)
            scores = score_turns(dialogues, fps=self.fps) if dialogues else {}
            if self.stream_examples:
                # Stream clips one by one: an engine would have to capture its steps again for a few clips.
                scores |= free_streaming(model, processor, self.stream_examples, batch_size=1, **show)
                events, _ = stream_example(model, processor, self.stream_examples[0], fps=self.fps)
            model.config.text_config.use_cache = use_cache
            model.train(was_training)
        if self.stream_examples and self.is_world_process_zero():
            said = "\n".join(f"{event.time:6.1f}s  {event.role:9s}  {event.text}" for event in events)
            print(f"Step {self.state.global_step}, the first clip of the evaluation as the model streams it:\n{said}")
        scores = {f"{metric_key_prefix}_{name}": float(value) for name, value in scores.items()}
        if scores:
            self.log(dict(scores))
        return scores

    def _predict_turns(self, model: Any, rows: Any) -> list[list[Turn]]:
        """Predict every turn under teacher forcing, with the rows shared among processes."""
        mine = Subset(rows, range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))
        return gather_object(predict_all_turns(model, self.processing_class, mine, fps=self.fps, progress=False))

    @contextmanager
    def _whole_model(self) -> Iterator[Any]:
        """Return the unwrapped model with all weights in each process: a stream calls parts that sharding hides."""
        checkpointing = self.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gradient_checkpointing_kwargs=checkpointing
        ) as model:
            shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
            for module in shards:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            try:
                yield model.get_base_model() if is_peft_model(model) else model
            finally:
                for module in shards:
                    reshard = self.accelerator.state.fsdp_plugin.reshard_after_forward
                    module.set_reshard_after_forward(reshard, recurse=False)
                    module.reshard()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: ARG002
        """Save without pushing, and wait until the folder is complete."""
        # The parent would upload a folder without a card. An upload can also outlast `--ddp_timeout`, which limits how
        # long other processes wait.
        super().save_model(output_dir, _internal_call=True)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, model_name: str | None = None, **_: Any) -> None:
        """Write the card (see [`write_card`]) into the output folder, in place of TRL's."""
        if self.is_world_process_zero():
            write_card(
                self.args.output_dir,
                name=self.args.hub_model_id or model_name or Path(self.args.output_dir).name,
                config=self._config,
                training=self.args,
                log_history=self.state.log_history,
                **self.about,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's figures with speed, memory and routing since the last log."""
        mode, per_frame = self._mode, self._config.frame_num_tokens
        prefix = "eval_" if mode == "eval" else ""
        if f"{prefix}loss" in logs and self._sums[mode]:
            sums = self._gather(torch.stack(self._sums[mode]).sum(dim=0)).sum(dim=0).tolist()
            tokens, frame_tokens, text, num_text, stream, num_stream = sums
            logs = {**logs, f"{prefix}text_loss": text / max(num_text, 1)}
            logs[f"{prefix}stream_loss"] = stream / max(num_stream, 1)
            self._sums[mode] = []
        if mode == "train" and "loss" in logs:
            seconds, self._since = clock.perf_counter() - self._since, clock.perf_counter()
            logs["tokens_per_second"], logs["frames_per_second"] = tokens / seconds, frame_tokens / per_frame / seconds
            logs["peak_memory_gb"] = peak_memory() / 1e9
            means = {
                layer: self._gather(torch.stack(scores).mean(dim=0)).mean(dim=0)
                for layer, scores in self._router_scores.items()
            }
            named = {f"/layer_{layer}": values for layer, values in means.items()}
            if means:
                named[""] = torch.stack(list(means.values())).mean(dim=0)
            for name, (mean, std) in named.items():
                logs |= {f"router_score_mean{name}": float(mean), f"router_score_std{name}": float(std)}
            counts = self._config.layer_keep_counts
            logs |= {f"kept_share/layer_{layer}": counts[layer] / per_frame for layer in self._config.routed_layers}
            self._router_scores = {}
        super().log(logs, start_time)


class _Weighted:
    """A model with another way to call its fused head; all else is the model's."""

    def __init__(self, model: Any, call_fused: Callable[[Any, dict[str, Any]], Any]) -> None:
        self._model, self._call_fused = model, call_fused

    def __call__(self, **inputs: Any) -> Any:
        return self._call_fused(self._model, inputs) if inputs.get("fused_lm_head") else self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def _fused_head(model: Any) -> Iterator[None]:
    """Let TRL's fused head, which reads one weight and refuses adapters, run a head with LoRA (see [`_join_lora`])."""
    model, joined = model.get_base_model() if is_peft_model(model) else model, SimpleNamespace(weight=None, bias=None)

    def get_output_embeddings() -> Any:
        head = model.lm_head
        if not isinstance(head, BaseTunerLayer):
            return head
        if not isinstance(head, LoraLayer) or head.lora_variant:
            raise ValueError(
                "The adapter of `lm_head` must be plain LoRA, not DoRA or another kind. Or train the head completely: "
                "move it from `target_modules` to `modules_to_save`."
            )
        return joined

    def join(_module: Any, _inputs: Any, outputs: Any) -> None:
        head = model.lm_head
        if isinstance(head, BaseTunerLayer):
            # A call of the head gathers its weights if they are sharded.
            head.forward = partial(_join_lora, head)
            try:
                outputs.last_hidden_state, joined.weight = head(outputs.last_hidden_state)
            finally:
                del head.forward

    hook = model.base_model.register_forward_hook(join)
    model.get_output_embeddings = get_output_embeddings
    try:
        yield
    finally:
        hook.remove()
        del model.get_output_embeddings


def _join_lora(head: LoraLayer, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return [h, s A h] (batch, sequence, hidden + rank) and [W, B] (vocabulary, hidden + rank): their product is the
    head's output, W h + s B A h. A sum W + s B A in bfloat16 would round most of a young adapter away.
    """
    base = head.base_layer.weight
    with maybe_gather_lm_head_ctx(base):
        base = base.full_tensor() if isinstance(base, DTensor) else base
        left, right = [hidden_states.to(base.device)], [base]
        for name in head.active_adapters:
            down, up = head.lora_A[name], head.lora_B[name]
            low = down(head.lora_dropout[name](left[0].to(down.weight.dtype)))
            left.append((head.scaling[name] * low).to(hidden_states.dtype))
            # Called on unit vectors, not read, for the same reason as the head.
            unit = torch.eye(head.r[name], dtype=up.weight.dtype, device=base.device)
            right.append(up(unit).T.to(base.dtype))
        return torch.cat(left, dim=-1), torch.cat(right, dim=1)


def peak_memory() -> int:
    """Return the peak memory of the GPU in bytes. Without a GPU, return the peak memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
