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
"""
What a training step costs routed and at full compute: time, memory and whether the losses agree.

```bash
python benchmarks/training.py                                                                # small, on the CPU
python benchmarks/training.py --shape llama3-8b --device cuda --frames 600 --tokens 50       # on a GPU
```

Weights and frames are random. Every scheme takes the same step on the same dialogue, with all weights trained or LoRA
of rank 128, with and without gradient checkpointing. "Loss" is that of the first step: with routers that begin at zero
a routed model skips work and starts near full compute's loss.
"""

import argparse
import json
import math
import statistics
import time as clock
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cost import SCHEMES, SHAPES, device_name, free, wait, write
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoConfig

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration


@dataclass
class Row:
    """
    Figures of one way of training.

    Args:
        scheme (`str`): Routing.
        trained (`str`): `"all"` weights or `"lora"`.
        checkpointing (`bool`): Whether activations are computed again in the backward pass.
        seconds (`float`): Of a step, the median.
        memory (`float`): Gigabytes held at most on a GPU; on a CPU, of tensors kept for the backward pass.
        loss (`float`): Of the first step.
    """

    scheme: str
    trained: str
    checkpointing: bool
    seconds: float
    memory: float
    loss: float


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Measures a training step, routed and not.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=50, help="tokens a frame, 1 + n x n")
    parser.add_argument("--text-tokens", type=int, default=200)
    parser.add_argument("--trained", nargs="+", choices=("all", "lora"), default=["all", "lora"])
    parser.add_argument("--steps", type=int, default=5, help="steps measured of each kind")
    parser.add_argument(
        "--out", type=Path, help="folder for training.json and training.md, written as figures come, and training.png"
    )
    options = parser.parse_args()
    kinds = [(trained, again) for trained in options.trained for again in (False, True)]
    rows: list[Row] = []
    text = ""
    for trained, again in tqdm(kinds, desc="ways"):
        for scheme in SCHEMES:
            free(options.device)
            try:
                rows.append(measure(scheme, trained, again, options))
            except torch.OutOfMemoryError:
                print(f"{scheme}, {trained}, {'with' if again else 'without'} checkpointing: no memory, left out")
            text = report(rows, options)
    print(f"\n{text}")
    if options.out is not None:
        draw(rows, options.out / "training.png")


def report(rows: list[Row], options: argparse.Namespace) -> str:
    """All figures so far as Markdown; written with them as JSON, so that a run that is broken off loses none."""
    text = (
        f"{options.shape}, {options.frames} frames of {options.tokens} tokens, {options.text_tokens} of text, "
        f"random weights, {device_name(options.device)}, torch {torch.__version__}\n\n{table(rows, options.device)}\n"
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        figures = json.dumps([asdict(row) for row in rows], indent=1)
        write(options.out / "training.json", figures)
        write(options.out / "training.md", text)
    return text


def of_full(row: Row, rows: list[Row]) -> tuple[float, float, float] | None:
    """Seconds and memory over those of full compute, and how much more loss; `None` if that had no memory."""
    ways = [(other, (other.trained, other.checkpointing, other.scheme)) for other in rows]
    full = next((other for other, way in ways if way == (row.trained, row.checkpointing, "full")), None)
    return None if full is None else (row.seconds / full.seconds, row.memory / full.memory, row.loss - full.loss)


def table(rows: list[Row], device: str) -> str:
    """The figures as Markdown."""
    memory = "peak, GB" if device == "cuda" else "kept for the backward pass, GB"
    lines = [f"| trained | checkpointing | | seconds | of full | {memory} | of full | loss | less full's |"]
    lines.append("|" + "---|" * 9)
    for row in rows:
        share = of_full(row, rows)
        seconds, held, loss = ("-", "-", "-") if share is None else (f"{x:.2f}" for x in share)
        lines.append(
            f"| {row.trained} | {'yes' if row.checkpointing else 'no'} | {row.scheme} | {row.seconds:.3f} | {seconds} "
            f"| {row.memory:.3f} | {held} | {row.loss:.4f} | {loss} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Seconds and memory of each way, a panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=130)
    ways = list(dict.fromkeys((row.trained, row.checkpointing) for row in rows))
    names = [f"{trained},\n{'' if again else 'no '}checkpointing" for trained, again in ways]
    for axes, kind, label in zip(figure.subplots(1, 2), ("seconds", "memory"), ("seconds", "GB"), strict=True):
        for place, scheme in enumerate(SCHEMES):
            found = {(row.trained, row.checkpointing): getattr(row, kind) for row in rows if row.scheme == scheme}
            at = [index + 0.27 * (place - 1) for index, way in enumerate(ways) if way in found]
            axes.bar(at, [found[way] for way in ways if way in found], width=0.25, label=scheme)
        axes.set_xticks(range(len(ways)), names, fontsize=8)
        axes.set(ylabel=label)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def measure(scheme: str, trained: str, checkpointing: bool, options: argparse.Namespace) -> Row:
    """One way of training, from the same weights and on the same dialogue as every other."""
    model = build(scheme, options)
    config, device = model.config, options.device
    model.model.vision_encoder.requires_grad_(False)
    if trained == "lora":
        model = get_peft_model(model, model.make_lora_config(lora_dropout=0.0))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    frame = [config.frame_token_id] * config.frame_num_tokens + [config.frame_token_interval_id]
    ids = torch.tensor([frame * options.frames + [7] * options.text_tokens], device=device)
    shape = (1, options.frames, config.frame_num_tokens, config.vision_config.hidden_size)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, _dtype(device))
    batch = {"input_ids": ids, "frame_features": features, "use_cache": False}
    batch["labels"] = ids.masked_fill(ids == config.frame_token_id, -100)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    losses, seconds, kept = [], [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps + 2):
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        wait(device)
        begin = clock.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        seconds.append(clock.perf_counter() - begin)
        losses.append(loss.item())
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept.append(sum(size for place, size in held.items() if place not in own))
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else kept[-1]
    # The first two steps are for warming up, and for the optimizer's memory.
    return Row(scheme, trained, checkpointing, statistics.median(seconds[2:]), memory / 1e9, losses[0])


def build(scheme: str, options: argparse.Namespace) -> VideoLLMMoDForConditionalGeneration:
    """A random model, the same for every scheme but for its routers."""
    side = math.isqrt(options.tokens - 1)
    if side < 1 or 1 + side**2 != options.tokens:
        raise SystemExit(f"error: --tokens {options.tokens}: a frame has 1 + n x n tokens, such as 10 or 50")
    text = {"vocab_size": 1024, "max_position_embeddings": 2**17, **SHAPES[options.shape]}
    config = VideoLLMMoDConfig(
        text_config=AutoConfig.for_model("llama", **text),
        vision_config={"num_hidden_layers": 1},
        frame_token_pooled=(side, side),
        frame_token_id=text["vocab_size"],
        **SCHEMES[scheme],
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return VideoLLMMoDForConditionalGeneration._from_config(config, dtype=_dtype(options.device))


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


if __name__ == "__main__":
    main()
