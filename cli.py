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
"""The command line: shows what a stream says; computes nothing itself."""

import time as clock
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModel, AutoProcessor, TextStreamer


ROOT = Path(__file__).resolve().parent
EMBEDDED = ROOT / "space" / "checkpoint"
SAMPLE = ROOT / "space" / "samples" / "streamworld.mp4"
EMBEDDED_NOTICE = (
    "the embedded checkpoint was trained on StreamWorld, generated clips, and knows nothing else. What it says "
    "of this video means nothing; --model takes one that was trained on more."
)

app = typer.Typer(help="Video models that watch live and talk.", no_args_is_help=True, add_completion=True)


@app.callback()
def _main() -> None:
    """Keeps `narrate` a command of its own."""


class _Line(TextStreamer):
    """Prints a reply as it comes, behind the time of the stream."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.session: Any = None
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Gets each stretch of text that will not change any more."""
        if not self._begun:
            text = text.lstrip()
            if not text and not stream_end:
                return
            typer.echo(f"{self.session.time:6.1f}s  ", nl=False)
            self._begun = True
        typer.echo(text, nl=stream_end)
        if stream_end:
            self._begun = False


@app.command()
def narrate(
    video: Annotated[str, typer.Argument(help="A file or a URL.", show_default=False)] = str(SAMPLE),
    model: Annotated[str, typer.Option(help="A checkpoint: a folder or a Hub id.", show_default=False)] = str(
        EMBEDDED
    ),
    query: Annotated[str, typer.Option(help="What the user says at the first frame.")] = (
        "Please narrate the video in real time."
    ),
    fps: Annotated[float, typer.Option(help="Frames a second to watch.")] = 2.0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Probability of silence below which the model speaks.", show_default="the model's"),
    ] = None,
) -> None:
    """Narrates a video in the terminal as it plays."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        _narrate(video, model, query, fps, threshold)
    except (ValueError, OSError, ImportError) as error:
        # What the library says is a paragraph at times; its first line says what was wrong.
        typer.echo(f"error: {str(error).strip().splitlines()[0]}", err=True)
        raise typer.Exit(code=1) from None


def _narrate(video: str, name: str, query: str, fps: float, threshold: float | None) -> None:
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype="auto").to(device).eval()
    if Path(name).resolve() == EMBEDDED and Path(video).resolve().parent != SAMPLE.parent:
        typer.secho(f"Note: {EMBEDDED_NOTICE}", err=True, fg="yellow")

    line = _Line(processor.tokenizer)
    session = line.session = model.stream(processor, fps=fps, interval_threshold=threshold, streamer=line)
    begin = clock.perf_counter()
    if query:
        session.ask(query, reply_now=False)
    for time, frame in processor.read_video(video, fps=fps):
        session.push(frame, time=time)
    session.close()
    _summary(session, clock.perf_counter() - begin)


def _summary(session: Any, seconds: float) -> None:
    """Speed, cache entries by kind of layer, and what full compute would have cost."""
    config, cache = session.model.config, session.cache
    text_tokens = int(cache.get_seq_length()) - session.num_frames * config.frame_num_tokens
    cost = session.model.estimate_cost(session.num_frames, text_tokens)
    lengths, routed = cache.lengths, set(config.routed_layers)
    kinds = [
        (f"{kind}: {len(layers)} x {max(lengths[layer] for layer in layers)}")
        for kind, layers in (
            ("full layers", [layer for layer in range(len(lengths)) if layer not in routed]),
            ("routed layers", sorted(routed)),
        )
        if layers
    ]
    typer.echo("")
    typer.echo(
        f"{session.num_frames} frames in {seconds:.1f} s, {session.num_frames / seconds:.1f} frames/s "
        f"({_device_name(session.model)})"
    )
    typer.echo(
        f"cache entries       {', '.join(kinds)}; {_size(cost.cache_bytes)}, "
        f"{_size(cost.full_cache_bytes)} at full compute"
    )
    typer.echo(
        f"language model      {cost.flops / 1e9:.2f} GFLOP; {cost.full_flops / 1e9:.2f} at full compute "
        f"(routing saves {1 - cost.flops_ratio:.0%})"
    )


def _device_name(model: Any) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU, {torch.get_num_threads()} threads"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:.1f} GB"


if __name__ == "__main__":
    app()
