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
"""The card of a trained checkpoint: what it was trained on and how, what it reaches, and its loss as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from huggingface_hub import EvalResult, ModelCard, ModelCardData


_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "bf16",
    "weight_decay",
    "seed",
)
_USAGE = """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
for event in model.narrate(processor, "video.mp4", query="Please narrate the video in real time."):
    print(f"{{event.time:6.1f}}s  {{event.text}}")
```"""


def write_card(
    folder: str | Path,
    *,
    name: str,
    config: Any,
    training: Any,
    log_history: Sequence[dict[str, float]],
    dataset: str | None = None,
    base_models: Sequence[str] = (),
) -> Path:
    """
    Writes `README.md` and `loss.png` into a checkpoint's folder.

    Args:
        folder (`str` or `Path`): The checkpoint.
        name (`str`): What it is called, a folder's name or a Hub id.
        config ([`VideoLLMMoDConfig`]): Its configuration.
        training (`TrainingArguments`): How it was trained.
        log_history (`Sequence[dict]`): The trainer's log.
        dataset (`str`, *optional*): What it was trained on.
        base_models (`Sequence[str]`, *optional*): What it was made of; folders are named without their path.
    """
    folder = Path(folder)
    losses = [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    _draw(losses, [(log["step"], log["eval_loss"]) for log in log_history if "eval_loss" in log], folder / "loss.png")
    ids = [base for base in base_models if base.count("/") == 1 and not Path(base).exists()]
    data = ModelCardData(
        # What was made of others' parts has their licence, which this cannot know.
        license=None if ids else "apache-2.0",
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        base_model=ids or None,
        tags=["video", "streaming", "mixture-of-depths", "trl", "sft"],
    )
    ratios = config.layer_keep_ratios
    routing = (
        f"{len(config.routed_layers)} of {len(ratios)} layers are routed; of a frame's {config.frame_num_tokens} "
    )
    routing += f"tokens, layers keep {', '.join(map(str, config.layer_keep_counts))}."
    metrics: dict[str, float] = {}
    for log in log_history:
        metrics |= {key: value for key, value in log.items() if key.startswith("eval_") and "runtime" not in key}
    parts = [
        f"# {name}",
        "A streaming video language model (VideoLLM-MoD, arXiv 2408.16730): it watches a video as it plays, decides "
        f"at every frame whether to speak, and answers questions at any moment. {routing}",
        _USAGE.format(name=name),
        "## Training",
        f"Data: {_shown(dataset)}. Made of: {', '.join(Path(base).name for base in base_models) or 'nothing'}.",
        _table(["setting", "value"], [[key, getattr(training, key)] for key in _SETTINGS]),
        "![Loss over steps](loss.png)",
        f"Transformers {transformers.__version__}, TRL {trl.__version__}, torch {torch.__version__}.",
    ]
    if metrics:
        rows = [[key.removeprefix("eval_"), f"{value:.4g}"] for key, value in sorted(metrics.items())]
        parts += ["## Evaluation", "At the last evaluation of the training.", _table(["figure", "value"], rows)]
    card = ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n")
    card.save(folder / "README.md")
    return folder / "README.md"


def add_results(folder: str | Path, scores: dict[str, float], *, dataset: str, split: str, command: str) -> None:
    """
    Puts figures into the card of a checkpoint, as the Hub's `model-index`, in place of those it had of that data set.

    Args:
        folder (`str` or `Path`): The checkpoint; its `README.md` is written anew.
        scores (`dict[str, float]`): Figures by name.
        dataset (`str`): What they were measured on.
        split (`str`): Which part of it.
        command (`str`): What prints them.

    Raises:
        `FileNotFoundError`: If there is no card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' has no README.md to put figures into.")
    card = ModelCard.load(path)
    others = [result for result in card.data.eval_results or [] if result.dataset_name != dataset]
    common = {
        "task_type": "video-text-to-text",
        "dataset_type": dataset.split(",")[0].lower(),
        "dataset_name": dataset,
    }
    common |= {"dataset_split": split, "dataset_args": {"command": command}}
    card.data.model_name = card.data.model_name or next(line for line in card.text.splitlines() if line)[2:]
    card.data.eval_results = others + [
        EvalResult(**common, metric_type=name, metric_name=name, metric_value=round(float(score), 4))
        for name, score in scores.items()
    ]
    card.save(path)


def _shown(dataset: str | None) -> str:
    """A data set's name; of a folder or file only the last part, for the rest is nobody's business."""
    if dataset is None:
        return "not named"
    return Path(dataset).name if Path(dataset).exists() else dataset


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _draw(losses: list[tuple[int, float]], evaluations: list[tuple[int, float]], path: Path) -> None:
    # Here, so that a run that fails at its first step has not waited for it; and without a window on any machine.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.2), dpi=130)
    axes = figure.subplots()
    for points, label in ((losses, "training"), (evaluations, "evaluation")):
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    if losses:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
