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
"""TRL's trainer for streams: weights the decision at each frame, and logs what routing and streaming need."""

import resource
import sys
import time as clock
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FSDPModule
from trl import SFTTrainer
from trl.models import unwrap_model_for_generation

from videollm_mod.train.card import write_card
from videollm_mod.train.evaluation import free_streaming, stream_example, teacher_forced


class StreamingSFTTrainer(SFTTrainer):
    """
    TRL's [`SFTTrainer`], one forward pass a step, for streaming dialogues.

    The loss is the model's own: cross-entropy on text plus `config.stream_loss_weight` times cross-entropy at each
    frame's last token, over the number of labels (LIVE, arXiv 2406.11816, section 3.2). Beside TRL's figures it logs
    `text_loss` and `stream_loss` (means a label, unweighted), `tokens_per_second`, `frames_per_second`,
    `peak_memory_gb`, `router_score_mean`, `router_score_std`, and `kept_share/layer_N` for each routed layer.

    Args:
        args, kwargs: As of [`SFTTrainer`].
        stream_examples (sequence of `dict`, *optional*): Rows with `messages` and `video`. At each evaluation LIVE's
            four measures are taken on them, they are streamed freely, and what was said of the first is printed.
        fps (`float`, *optional*, defaults to 2.0): Frames a second to stream them at.
        about (`dict`, *optional*): `dataset` and `base_models`, for the card (see [`write_card`]).
    """

    def __init__(
        self,
        *args: Any,
        stream_examples: Sequence[dict[str, Any]] = (),
        fps: float = 2.0,
        about: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        model = args[0] if args else kwargs["model"]
        with _readable_head(model):
            super().__init__(*args, **kwargs)
        self.stream_examples, self.fps, self.about = stream_examples, fps, about or {}
        self._config = self.accelerator.unwrap_model(self.model).config
        self._router_scores: list[torch.Tensor] = []
        self._since, self._tokens, self._frames = clock.perf_counter(), 0, 0
        for module in self.model.modules():
            # By name: classes of remote code are not the ones imported here.
            if type(module).__name__ == "VideoLLMMoDRouter":
                module.register_forward_hook(self._keep_scores)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's, on log-probabilities in which those at frames carry their weight."""
        with _readable_head(self.accelerator.unwrap_model(model)):
            return super().compute_loss(_Weighted(model, self._weigh), inputs, *args, **kwargs)

    def _weigh(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        # TRL's log-probabilities stand where they were predicted: position i has that of token i + 1, or 0.
        is_frame = (inputs["input_ids"] == self._config.frame_token_id).to(outputs.log_probs.device)
        at_frame, log_probs = is_frame[:, :-1], outputs.log_probs
        with torch.no_grad():
            mask = inputs.get("attention_mask")
            parts = [torch.ones_like(is_frame) if mask is None else mask.to(is_frame.device), is_frame]
            for place in (~at_frame, at_frame):
                parts += [-log_probs * place, outputs.label_mask * place]
            sums = torch.stack([part.sum().float() for part in parts])
            tokens, frame_tokens, text, num_text, stream, num_stream = (
                self.accelerator.gather_for_metrics(sums[None]).sum(dim=0).tolist()
            )
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["text_loss"].append(text / max(num_text, 1))
        metrics["stream_loss"].append(stream / max(num_stream, 1))
        if self.model.training:
            self._tokens += int(tokens)
            self._frames += int(frame_tokens) // self._config.frame_num_tokens
        outputs.log_probs = torch.where(at_frame, self._config.stream_loss_weight * log_probs, log_probs)
        return outputs

    def _keep_scores(self, _module: Any, _inputs: Any, scores: torch.Tensor) -> None:
        if self.model.training:
            scores = scores.detach().float()
            self._router_scores.append(torch.stack([scores.mean(), scores.std()]))

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, on replies as they are: only training spoils them."""
        spoiling, self.data_collator = self.data_collator, copy(self.data_collator)
        self.data_collator.augmentation = 0.0
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = spoiling

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """As TRL's, and streams: `eval_lm_ppl`, `eval_time_diff`, `eval_event_f1` and so on (see `evaluation.py`)."""
        begun = clock.perf_counter()
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if len(self.stream_examples) > 0:
            metrics |= self._stream(metric_key_prefix)
        # No training is done meanwhile: speed is that of training alone.
        self._since += clock.perf_counter() - begun
        return metrics

    def _stream(self, metric_key_prefix: str) -> dict[str, float]:
        processor, show = self.processing_class, {"fps": self.fps, "progress": False}
        with self._whole_model() as model:
            was_training, use_cache = model.training, model.config.text_config.use_cache
            model.eval()
            scores = teacher_forced(model, processor, self.stream_examples, **show)
            scores |= free_streaming(model, processor, self.stream_examples, **show)
            events, _ = stream_example(model, processor, self.stream_examples[0], fps=self.fps)
            model.config.text_config.use_cache = use_cache
            model.train(was_training)
        if self.is_world_process_zero():
            said = "\n".join(f"{event.time:6.1f}s  {event.role:9s}  {event.text}" for event in events)
            print(f"Step {self.state.global_step}, the first clip of the evaluation as the model streams it:\n{said}")
        scores = {f"{metric_key_prefix}_{name}": float(value) for name, value in scores.items()}
        self.log(dict(scores))
        return scores

    @contextmanager
    def _whole_model(self) -> Iterator[Any]:
        """The model by itself, each process with all its weights: a stream calls parts of it, which sharding hides."""
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

    def create_model_card(self, model_name: str | None = None, **_: Any) -> None:
        """Writes the card (see [`write_card`]) into the output folder, in place of TRL's."""
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
        """As TRL's, with speed, memory and routing since the last time."""
        if self.model.training and "loss" in logs:
            seconds = clock.perf_counter() - self._since
            logs = {**logs, "tokens_per_second": self._tokens / seconds, "frames_per_second": self._frames / seconds}
            logs["peak_memory_gb"] = peak_memory() / 1e9
            if self._router_scores:
                mean, std = torch.stack(self._router_scores).mean(dim=0).tolist()
                logs |= {"router_score_mean": mean, "router_score_std": std}
            counts, tokens = self._config.layer_keep_counts, self._config.frame_num_tokens
            logs |= {f"kept_share/layer_{layer}": counts[layer] / tokens for layer in self._config.routed_layers}
            self._router_scores, self._since, self._tokens, self._frames = [], clock.perf_counter(), 0, 0
        super().log(logs, start_time)


class _Weighted:
    """The model as a function, with its outputs passed on; all else is the model's."""

    def __init__(self, model: Any, change: Callable[[Any, dict[str, Any]], Any]) -> None:
        self._model, self._change = model, change

    def __call__(self, **inputs: Any) -> Any:
        return self._change(self._model(**inputs), inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@contextmanager
def _readable_head(model: Any) -> Iterator[None]:
    """
    Has a head with an adapter read as one without: TRL's fused head takes a head's weight for all of it, and refuses
    an adapter. What an adapted head makes of the unit vectors is the weight with the adapter in it, whatever the
    adapter and however it is sharded. Its dropout drops the same features for all tokens of a step.
    """
    model = model.get_base_model() if is_peft_model(model) else model

    def get_output_embeddings() -> Any:
        head = model.lm_head
        if not isinstance(head, BaseTunerLayer):
            return head
        units = torch.eye(head.in_features, dtype=head.weight.dtype, device=head.weight.device)
        return SimpleNamespace(weight=head(units).T, bias=None)

    model.get_output_embeddings = get_output_embeddings
    try:
        yield
    finally:
        del model.get_output_embeddings


def peak_memory() -> int:
    """Most bytes held so far: of the GPU's memory, or without one of this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
