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
from collections.abc import Callable
from typing import Any

import torch
from trl import SFTTrainer


class StreamingSFTTrainer(SFTTrainer):
    """
    TRL's [`SFTTrainer`], one forward pass a step, for streaming dialogues.

    The loss is the model's own: cross-entropy on text plus `config.stream_loss_weight` times cross-entropy at each
    frame's last token, over the number of labels (LIVE, arXiv 2406.11816, section 3.2). Beside TRL's figures it logs
    `text_loss` and `stream_loss` (means a label, unweighted), `tokens_per_second`, `frames_per_second`,
    `peak_memory_gb`, `router_score_mean`, `router_score_std`, and `kept_share/layer_N` for each routed layer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = self.accelerator.unwrap_model(self.model).config
        self._router_scores: list[torch.Tensor] = []
        self._since, self._tokens, self._frames = clock.perf_counter(), 0, 0
        for module in self.model.modules():
            # By name: classes of remote code are not the ones imported here.
            if type(module).__name__ == "VideoLLMMoDRouter":
                module.register_forward_hook(self._keep_scores)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's, on log-probabilities in which those at frames carry their weight."""
        return super().compute_loss(_Weighted(model, self._weigh), inputs, *args, **kwargs)

    def _weigh(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        # TRL's log-probabilities stand where they were predicted: position i has that of token i + 1, or 0.
        is_frame = (inputs["input_ids"] == self._config.frame_token_id).to(outputs.log_probs.device)
        at_frame, log_probs = is_frame[:, :-1], outputs.log_probs
        with torch.no_grad():
            parts = [torch.full_like(is_frame, True), is_frame]
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


def peak_memory() -> int:
    """Most bytes held so far: of the GPU's memory, or without one of this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
