# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Write the cards of checkpoints: what a model costs, how it was trained, what it reaches, and its limits.

As a script, update the page about the embedded checkpoint from the card of the training that made it, and from the
figures that `train/recipe.py` wrote:

```bash
python train/card.py outputs/streamworld_cpu/trained page.md --measures outputs/streamworld_cpu/measures.json
```
"""

import importlib.metadata
import json
import os
import re
import shlex
from collections.abc import Sequence
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import copy_file, save_figure, write_text
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.checkpoint_files import FACTS_PAGE


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
# Figures in the front matter of a README that has a page for all of them.
HEADLINES = ("event_f1", "answer_accuracy", "lm_ppl")
_FPS, _TEXT_TOKENS = 2, 200  # Frames per second and text tokens per minute of the streams in the cost table.
_USAGE = """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
for event in model.narrate(processor, "video.mp4"):
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
    Write `README.md`, `routing.png` and `loss.png` into the folder of a trained checkpoint.

    Args:
        folder (`str` or `Path`): The checkpoint.
        name (`str`): Its name: a folder's name or a Hub id.
        config ([`VideoLLMMoDConfig`]): Its configuration.
        training (`TrainingArguments`): The training arguments.
        log_history (`Sequence[dict]`): The trainer's log.
        dataset (`str`, *optional*): The training data.
        base_models (`Sequence[str]`, *optional*): The models it was made from. Folders are listed without their path.
    """
    import torch
    import transformers

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
        "A streaming video language model (VideoLLM-MoD, arXiv 2408.16730). It watches a video as it plays, decides "
        "at every frame whether to speak, and answers questions at any moment.",
        _USAGE.format(name=name),
        *describe_cost(config),
        "## Training",
        f"Data: {_shown(dataset)}. Made from: {', '.join(Path(base).name for base in base_models) or 'nothing'}.",
        _table(["setting", "value"], [[key, _value(getattr(training, key))] for key in _SETTINGS]),
        "![Loss over steps](loss.png)",
        f"Trained on {_where_and_when(training.world_size)}, with Transformers {transformers.__version__}, "
        f"TRL {importlib.metadata.version('trl')}, torch {torch.__version__}.",
    ]
    if metrics:
        rows = [[key.removeprefix("eval_"), f"{value:.4g}"] for key, value in sorted(metrics.items())]
        parts += [
            "## Evaluation",
            "Measured by the last evaluation during training.",
            _table(["figure", "value"], rows),
        ]
    parts += _describe_limits(config, f"Trained on {_shown(dataset)} only. Nothing was measured on other video.")
    return _save(folder, data, parts)


def write_plain_card(
    folder: str | Path,
    *,
    name: str,
    config: Any,
    text: str,
    base_models: Sequence[str] = (),
    has_adapter: bool = False,
    caveat: str = "Nothing was measured after the conversion. The licences of its parts apply.",
) -> Path:
    """
    Write `README.md` and `routing.png` into the folder of a checkpoint with unknown training.

    Args:
        folder (`str` or `Path`): The checkpoint.
        name (`str`): Its name: a folder's name or a Hub id.
        config ([`VideoLLMMoDConfig`]): Its configuration.
        text (`str`): What it is.
        base_models (`Sequence[str]`, *optional*): The models it was made from. Folders are not listed.
        has_adapter (`bool`, *optional*, defaults to `False`): Whether its folder `adapter` holds a PEFT adapter.
        caveat (`str`, *optional*): What is not known about it. It opens the section on limits.
    """
    draw_routing(config, Path(folder) / "routing.png")
    usage = _USAGE.format(name=name)
    if has_adapter:
        usage = usage.replace("for event in", f"{_WITH_ADAPTER.format(name=name)}\nfor event in")
        usage = usage.replace("from transformers", "from peft import PeftModel\nfrom transformers")
    parts = [f"# {name}", text, usage, *describe_cost(config)]
    parts += _describe_limits(config, caveat)
    return _save(Path(folder), _metadata(base_models, None, []), parts)


def published_command(command: Sequence[str]) -> str:
    """Return a command as a published page may show it (see [`published_word`])."""
    return shlex.join(map(published_word, command))


def published_word(word: str) -> str:
    """
    Return a word of a command without the folders of this machine, and without the secrets of a URL.

    For example, `--out=/home/me/data` becomes `--out=data`, and a folder within the current one stays.
    """
    # Imported here, because it imports Transformers, which `push --help` does without.
    from videollm_mod.video_opening_videollm_mod import without_secrets

    option, equals, value = word.rpartition("=")
    is_path = os.path.isabs(value) or value.startswith(("~", ".."))
    return f"{option}{equals}{Path(value).name}" if is_path else without_secrets(word)


def add_results(folder: str | Path, scores: dict[str, float], *, dataset: str, split: str, command: str) -> None:
    """
    Add figures to the card of a checkpoint.

    The figures go into the front matter of `README.md` as the Hub's `model-index`, and into a section that names the
    command, the hardware and the date. The section is part of `README.md`. If the folder has the page
    `docs/embedded-checkpoint.md`, the section goes there, and the front matter keeps the headline figures only. New
    figures replace earlier ones of the same data set and split.

    Args:
        folder (`str` or `Path`): The checkpoint.
        scores (`dict[str, float]`): Figures by name.
        dataset (`str`): The data they were measured on.
        split (`str`): The split of the data.
        command (`str`): The command that prints them.

    Raises:
        `FileNotFoundError`: If there is no card.
    """
    path, page = Path(folder) / "README.md", Path(folder) / FACTS_PAGE
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' has no README.md to add figures to.")
    card = ModelCard.load(path)
    results = card.data.eval_results or []
    others = [result for result in results if (result.dataset_name, result.dataset_split) != (dataset, split)]
    common = {
        "task_type": "video-text-to-text",
        "dataset_type": dataset.split(",")[0].lower(),
        "dataset_name": dataset,
        "dataset_split": split,
        "dataset_args": {"command": command},
    }
    card.data.model_name = card.data.model_name or next(line for line in card.text.splitlines() if line)[2:]
    scores = {name: round(float(score), 4) for name, score in scores.items()}
    card.data.eval_results = others + [
        EvalResult(**common, metric_type=name, metric_name=name, metric_value=score)
        for name, score in scores.items()
        if name in HEADLINES or not page.is_file()
    ]
    table = _table(["figure", "value"], [[name, score] for name, score in scores.items()])
    section = f"## Evaluation on {dataset}, {split}\n\n{table}\n\nMeasured on {_where_and_when()}, with `{command}`."
    if page.is_file():
        write_text(page, _with_section(page.read_text(encoding="utf-8"), section))
    else:
        card.text = "\n" + _with_section(card.text, section)
    write_text(path, str(card))


def copy_training(folder: str | Path, page: str | Path) -> None:
    """
    Replace the sections on cost and training of a page with those of a checkpoint's card, and copy their pictures.

    Args:
        folder (`str` or `Path`): The checkpoint, with a card written by [`write_card`].
        page (`str` or `Path`): The page, a Markdown file.
    """
    folder, page = Path(folder), Path(page)
    text = page.read_text(encoding="utf-8")
    for section in _sections(ModelCard.load(folder / "README.md").text):
        if section.startswith(("## What it costs\n", "## Training\n")):
            for picture in re.findall(r"\]\((\w+\.png)\)", section):
                copy_file(folder / picture, page.with_name(f"{page.stem}-{picture}"))
                section = section.replace(f"]({picture})", f"]({page.stem}-{picture})")
            text = _with_section(text, section)
    write_text(page, text)


def write_measures(measures: dict[str, Any], page: str | Path) -> None:
    """
    Write the figures of the recipe into the section "Compared with full compute" of a page.

    Args:
        measures (`dict`): What `train/recipe.py` wrote as `measures.json`. "before" is left out.
        page (`str` or `Path`): The page, a Markdown file.
    """
    page, labels = Path(page), measures["labels"]
    parts = [
        "## Compared with full compute",
        "The same recipe trained a second model at full compute: every keep ratio is 1, and encoder and data are the "
        'same. "After" is the model in this repository. A second table has, for each routed layer, the share of the '
        "patches that things cover, and of the background, that its router keeps. The lift is how much more often it "
        "keeps a covered patch than any patch, with a 95% interval over clips.",
    ]
    for world, columns in measures["worlds"].items():
        shown = {name: scores for name, scores in columns.items() if name != "before"}
        rows = [[label, *(_number(scores.get(key)) for scores in shown.values())] for key, label in labels.items()]
        parts += [f"### {world}", _table(["figure", *shown], rows)]
        for routers in (scores["routers"] for scores in shown.values() if "routers" in scores):
            layers = {**routers["layers"], "mean": routers["mean"], "together": routers["together"]}
            rows = [[layer, *_router_cells(found)] for layer, found in layers.items()]
            parts.append(_table(["layer", "covered patches kept", "background kept", "lift over chance"], rows))
    parts.append(f"Measured on {measures['hardware']}, {measures['date']}, with `{measures['command']}`.")
    text = _with_section(page.read_text(encoding="utf-8"), "\n\n".join(parts))
    write_text(page, text)


def _router_cells(found: dict[str, float | None]) -> list[str]:
    shares = [_percent(found[name]) for name in ("covered", "background")]
    lift, low, high = (_number(found[name], 3) for name in ("lift", "lift_low", "lift_high"))
    return [*shares, f"{lift} ({low} to {high})"]


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def draw_routing(config: Any, path: str | Path) -> None:
    """Draw how many of a frame's tokens each layer of a [`VideoLLMMoDConfig`] keeps, if any is routed."""
    # The card shows no picture then, and Matplotlib may not be installed.
    if not config.routed_layers:
        return
    from matplotlib.figure import Figure

    counts, tokens = config.layer_keep_counts, config.frame_num_tokens
    figure = Figure(figsize=(6.5, 2.2), dpi=130)
    axes = figure.subplots()
    axes.bar(range(len(counts)), [tokens] * len(counts), color="#d8d8d8", label="skip the layer")
    axes.bar(range(len(counts)), counts, color="#2563eb", label="kept")
    axes.set(xlabel="layer", ylabel="tokens per frame", ylim=(0, tokens * 1.25), xlim=(-0.7, len(counts) - 0.3))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=2, loc="upper right", frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def describe_cost(config: Any) -> list[str]:
    """Return the card's section on the cost of a [`VideoLLMMoDConfig`], as parts. It shows `routing.png`."""
    import torch

    counts, tokens = config.layer_keep_counts, config.frame_num_tokens
    parts = ["## What it costs", "The model runs at full compute: no layer is routed."]
    if config.routed_layers:
        kept = " or ".join(map(str, sorted({counts[layer] for layer in config.routed_layers})))
        parts[1] = (
            f"{len(config.routed_layers)} of {len(counts)} layers are routed. They keep {kept} of a frame's {tokens} "
            "tokens.\n\n![Tokens that each layer keeps](routing.png)"
        )
    # The cache is counted in the dtype of the weights, as `videollm-mod inspect` does.
    dtype = getattr(torch, str(config.dtype).removeprefix("torch.")) if config.dtype is not None else torch.bfloat16
    width = dtype.itemsize
    rows, unit = [], ("TFLOP", 1e12) if config.text_config.hidden_size >= 1024 else ("GFLOP", 1e9)
    try:
        for minutes in [m for m in (0.5, 1, 2, 5, 10, 20, 30, 60) if m <= max(_minutes(config), 0.5)][-3:]:
            cost = config.estimate_cost(int(60 * _FPS * minutes), int(_TEXT_TOKENS * minutes), bytes_per_value=width)
            flops = [f"{count / unit[1]:.3g}" for count in (cost.flops, cost.full_flops)]
            rows.append([minutes, *flops, *(f"{b / 1e6:.3g}" for b in (cost.cache_bytes, cost.full_cache_bytes))])
    except ValueError:
        return parts  # The cost of this language model has no closed form.
    head = ["minutes", unit[0], "at full compute", "cache, MB", "at full compute"]
    note = (
        f"These are closed-form estimates for the language model, not measurements. They assume {_FPS} frames per "
        f"second, {_TEXT_TOKENS} text tokens per minute and a cache of {8 * width}-bit values. `videollm-mod inspect` "
        "prints them for any length."
    )
    return [*parts, _table(head, rows), note]


def _metadata(base_models: Sequence[str], dataset: str | None, tags: list[str]) -> ModelCardData:
    ids = [base for base in base_models if base.count("/") == 1 and not Path(base).exists()]
    is_public = dataset is not None and dataset.count("/") == 1 and not Path(dataset).exists()
    return ModelCardData(
        # The licences of the base models apply, and this code does not know them.
        license=None if base_models else "apache-2.0",
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        base_model=ids or None,
        datasets=[dataset] if is_public else None,
        tags=["video", "streaming", "mixture-of-depths", *tags],
    )


def _minutes(config: Any) -> float:
    """Return the minutes of video, at `_FPS` frames per second, that fit into the context."""
    tokens = config.frame_num_tokens + (config.frame_token_interval_id is not None)
    return config.text_config.max_position_embeddings / tokens / (60 * _FPS)


def _describe_limits(config: Any, first: str) -> list[str]:
    context = config.text_config.max_position_embeddings
    text = f"{first} What the model says can be wrong. Its context of {context} tokens holds about "
    return ["## Limits", f"{text}{_minutes(config):.2g} minutes of video at {_FPS} frames per second."]


def _sections(text: str) -> list[str]:
    """Split Markdown at its second-level headings."""
    return [part.strip() for part in re.split(r"(?m)^(?=## )", text) if part.strip()]


def _with_section(text: str, section: str) -> str:
    """Return Markdown with a section in place of the one with its heading, or else before the section on limits."""
    heading, parts = section.splitlines()[0], _sections(text)
    headings = [part.splitlines()[0] for part in parts]
    if heading in headings:
        parts[headings.index(heading)] = section
    else:
        parts.insert(headings.index("## Limits") if "## Limits" in headings else len(parts), section)
    return "\n\n".join(parts) + "\n"


def _save(folder: Path, data: ModelCardData, parts: list[str]) -> Path:
    ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")
    return folder / "README.md"


def _where_and_when(processes: int = 1) -> str:
    """Return the hardware of this machine and today's date."""
    import torch

    today = date.today()
    machine = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        machine = f"{processes} x {torch.cuda.get_device_name()}"
    return f"{machine}, {today.day} {today:%B %Y}"


def _value(setting: Any) -> Any:
    return setting.value if isinstance(setting, Enum) else setting


def _shown(dataset: str | None) -> str:
    """Return a data set's name. A path is private: only its last part is shown."""
    if dataset is None:
        return "not named"
    return Path(dataset).name if Path(dataset).exists() else dataset


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _draw(losses: list[tuple[int, float]], evaluations: list[tuple[int, float]], path: Path) -> None:
    # Imported here because it is slow. `Figure` needs no display.
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
    save_figure(figure, path)


@one_line_errors()
def main() -> None:
    """Copy the facts and the figures of a training into a page."""
    parser = CommandLineParser(description="Copy cost, training and figures of a checkpoint into a page.")
    parser.add_argument("checkpoint", type=Path, help="folder of the trained checkpoint")
    parser.add_argument("page", type=Path, help="Markdown file to update")
    parser.add_argument("--measures", type=Path, help="figures of train/recipe.py, a JSON file")
    options = parser.parse_args()
    copy_training(options.checkpoint, options.page)
    if options.measures is not None:
        write_measures(json.loads(options.measures.read_text(encoding="utf-8")), options.page)
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
