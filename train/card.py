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

import os
import re
from collections.abc import Sequence
from datetime import date
from enum import Enum
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
_FPS, _TEXT_TOKENS = 2, 200  # Frames a second and tokens of text a minute, for what a stream costs.
_USAGE = """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
for event in model.narrate(processor, "video.mp4", query="Please narrate the video in real time."):
    print(f"{{event.time:6.1f}}s  {{event.text}}")
```"""


_WITH_ADAPTER = 'model = PeftModel.from_pretrained(model, "{name}", subfolder="adapter")'


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
    draw_routing(config, folder / "routing.png")
    losses = [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    _draw(losses, [(log["step"], log["eval_loss"]) for log in log_history if "eval_loss" in log], folder / "loss.png")
    data = _metadata(base_models, dataset, ["trl", "sft"])
    metrics: dict[str, float] = {}
    for log in log_history:
        metrics |= {key: value for key, value in log.items() if key.startswith("eval_") and "runtime" not in key}
    parts = [
        f"# {name}",
        "A streaming video language model (VideoLLM-MoD, arXiv 2408.16730): it watches a video as it plays, decides "
        "at every frame whether to speak, and answers questions at any moment.",
        _USAGE.format(name=name),
        *describe_cost(config),
        "## Training",
        f"Data: {_shown(dataset)}. Made of: {', '.join(Path(base).name for base in base_models) or 'nothing'}.",
        _table(["setting", "value"], [[key, _value(getattr(training, key))] for key in _SETTINGS]),
        "![Loss over steps](loss.png)",
        f"{_where_and_when(training.world_size)}, with Transformers {transformers.__version__}, "
        f"TRL {trl.__version__}, torch {torch.__version__}.",
    ]
    if metrics:
        rows = [[key.removeprefix("eval_"), f"{value:.4g}"] for key, value in sorted(metrics.items())]
        parts += ["## Evaluation", "At the last evaluation of the training.", _table(["figure", "value"], rows)]
    parts += _describe_limits(config, f"It was trained on {_shown(dataset)}; on other video nothing was measured.")
    return _save(folder, data, parts)


def write_plain_card(
    folder: str | Path,
    *,
    name: str,
    config: Any,
    text: str,
    base_models: Sequence[str] = (),
    has_adapter: bool = False,
    caveat: str = "Nothing was measured after the conversion. Its licence is that of its parts.",
) -> Path:
    """
    Writes `README.md` and `routing.png` into the folder of a checkpoint whose training is not known.

    Args:
        folder (`str` or `Path`): The checkpoint.
        name (`str`): What it is called, a folder's name or a Hub id.
        config ([`VideoLLMMoDConfig`]): Its configuration.
        text (`str`): What it is.
        base_models (`Sequence[str]`, *optional*): The same as names; folders are not listed.
        has_adapter (`bool`, *optional*, defaults to `False`): Whether its folder `adapter` has a PEFT adapter to it.
        caveat (`str`, *optional*): What is not known of it.
    """
    draw_routing(config, Path(folder) / "routing.png")
    usage = _USAGE.format(name=name)
    if has_adapter:
        usage = usage.replace("for event in", f"{_WITH_ADAPTER.format(name=name)}\nfor event in")
        usage = usage.replace("from transformers", "from peft import PeftModel\nfrom transformers")
    parts = [f"# {name}", text, usage, *describe_cost(config)]
    parts += _describe_limits(config, caveat)
    return _save(Path(folder), _metadata(base_models, None, []), parts)


def add_results(folder: str | Path, scores: dict[str, float], *, dataset: str, split: str, command: str) -> None:
    """
    Puts figures into the card of a checkpoint, as the Hub's `model-index` and as a section that says with which
    command, on what and when they were measured, in place of those it had of that split.

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
    results = card.data.eval_results or []
    others = [result for result in results if (result.dataset_name, result.dataset_split) != (dataset, split)]
    common = {
        "task_type": "video-text-to-text",
        "dataset_type": dataset.split(",")[0].lower(),
        "dataset_name": dataset,
    }
    common |= {"dataset_split": split, "dataset_args": {"command": command}}
    card.data.model_name = card.data.model_name or next(line for line in card.text.splitlines() if line)[2:]
    scores = {name: round(float(score), 4) for name, score in scores.items()}
    card.data.eval_results = others + [
        EvalResult(**common, metric_type=name, metric_name=name, metric_value=score) for name, score in scores.items()
    ]
    heading = f"## Evaluation on {dataset}, {split}"
    parts = [part.strip() for part in re.split(r"(?m)^(?=## )", card.text)]
    parts = [part for part in parts if part and not part.startswith(f"{heading}\n")]
    table = _table(["figure", "value"], [[name, score] for name, score in scores.items()])
    # What it cannot do is said last.
    place = next((at for at, part in enumerate(parts) if part.startswith("## Limits\n")), len(parts))
    parts.insert(place, f"{heading}\n\n{table}\n\n{_where_and_when()}, by `{command}`.")
    card.text = "\n" + "\n\n".join(parts) + "\n"
    card.save(path)


def draw_routing(config: Any, path: str | Path) -> None:
    """Draws how many of a frame's tokens each layer keeps ([`VideoLLMMoDConfig`]), as a picture in a file."""
    from matplotlib.figure import Figure

    counts, tokens = config.layer_keep_counts, config.frame_num_tokens
    figure = Figure(figsize=(6.5, 2.2), dpi=130)
    axes = figure.subplots()
    axes.bar(range(len(counts)), [tokens] * len(counts), color="#d8d8d8", label="skip the layer")
    axes.bar(range(len(counts)), counts, color="#2563eb", label="kept")
    axes.set(xlabel="layer", ylabel="tokens of a frame", ylim=(0, tokens * 1.25), xlim=(-0.7, len(counts) - 0.3))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=2, loc="upper right", frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def _metadata(base_models: Sequence[str], dataset: str | None, tags: list[str]) -> ModelCardData:
    ids = [base for base in base_models if base.count("/") == 1 and not Path(base).exists()]
    is_public = dataset is not None and dataset.count("/") == 1 and not Path(dataset).exists()
    return ModelCardData(
        # What was made of others' parts has their licence, which this cannot know.
        license=None if base_models else "apache-2.0",
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        base_model=ids or None,
        datasets=[dataset] if is_public else None,
        tags=["video", "streaming", "mixture-of-depths", *tags],
    )


def _minutes(config: Any) -> float:
    """How long a stream of two frames a second fits the context."""
    tokens = config.frame_num_tokens + (config.frame_token_interval_id is not None)
    return config.text_config.max_position_embeddings / tokens / (60 * _FPS)


def describe_cost(config: Any) -> list[str]:
    """What a checkpoint's routing saves ([`VideoLLMMoDConfig`]), as parts of a card beside `routing.png`."""
    counts, tokens = config.layer_keep_counts, config.frame_num_tokens
    parts = ["## What it costs", "It runs at full compute: no layer is routed."]
    if config.routed_layers:
        kept = sorted({counts[layer] for layer in config.routed_layers})
        parts[1] = (
            f"{len(config.routed_layers)} of {len(counts)} layers are routed: of a frame's {tokens} tokens they "
        )
        parts[1] += f"keep {' or '.join(map(str, kept))}.\n\n![Tokens that each layer keeps](routing.png)"
    # As many bytes a value as `videollm-mod inspect` takes, those of the weights.
    dtype = getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype is not None else torch.bfloat16
    width = dtype.itemsize
    rows, unit = [], ("TFLOP", 1e12) if config.text_config.hidden_size >= 1024 else ("GFLOP", 1e9)
    try:
        for minutes in [m for m in (0.5, 1, 2, 5, 10, 20, 30, 60) if m <= max(_minutes(config), 0.5)][-3:]:
            cost = config.estimate_cost(int(60 * _FPS * minutes), int(_TEXT_TOKENS * minutes), bytes_per_value=width)
            flops = [f"{count / unit[1]:.3g}" for count in (cost.flops, cost.full_flops)]
            rows.append([minutes, *flops, *(f"{b / 1e6:.3g}" for b in (cost.cache_bytes, cost.full_cache_bytes))])
    except ValueError:
        return parts  # Of a language model whose cost is not known in closed form.
    head = ["minutes", unit[0], "at full compute", "cache, MB", "at full compute"]
    note = f"Estimates in closed form for the language model, its cache in {8 * width} bits, at {_FPS} frames a "
    note += f"second and {_TEXT_TOKENS} tokens of text a minute, and not measurements; `videollm-mod inspect` prints "
    note += "them for any length."
    return [*parts, _table(head, rows), note]


def _describe_limits(config: Any, first: str) -> list[str]:
    text = f"{first} What it says can be wrong. Its context of {config.text_config.max_position_embeddings} tokens "
    text += f"lasts about {_minutes(config):.2g} minutes at {_FPS} frames a second."
    return ["## Limits", text]


def _save(folder: Path, data: ModelCardData, parts: list[str]) -> Path:
    ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")
    return folder / "README.md"


def _where_and_when(processes: int = 1) -> str:
    """The machine that this runs on, and today."""
    today = date.today()
    machine = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        machine = f"{processes} x {torch.cuda.get_device_name()}"
    return f"On {machine}, {today.day} {today:%B %Y}"


def _value(setting: Any) -> Any:
    return setting.value if isinstance(setting, Enum) else setting


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
