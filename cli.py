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
"""The command line: shows what a stream says, and calls what the package does; computes nothing itself."""

import importlib
import json
import sys
import time as clock
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor, TextStreamer

from videollm_mod.mistakes import MISTAKES, in_one_line
from videollm_mod.space import captions
from videollm_mod.space.loading import CACHE_DTYPES, load_model
from videollm_mod.streaming_videollm_mod import within_context
from videollm_mod.video_reading_videollm_mod import WHEN_BEHIND, TooManyWaitingError, goes_on, is_complete, read_ahead


ROOT = Path(__file__).resolve().parent
EMBEDDED = ROOT
SAMPLE = ROOT / "samples" / "streamworld.mp4"
EMBEDDED_NOTICE = (
    "the embedded checkpoint was trained on StreamWorld, generated clips, and knows nothing else. What it says "
    "of this video means nothing; --model takes one that was trained on more."
)

Video = Annotated[str, typer.Argument(help="A file, a URL (also rtsp://), - for standard input, or camera:0.")]
Model = Annotated[str, typer.Option(help="A checkpoint: a folder or a Hub id.", show_default="the embedded one")]
Revision = Annotated[str | None, typer.Option(help="Of a Hub id: a branch, a tag or a commit, whose code is run.")]
Weights = Annotated[
    str | None, typer.Option(help="int8 or fp8: linear layers in eight bits, by torchao.", show_default="as saved")
]
CacheDtype = Annotated[
    str | None,
    typer.Option("--cache", help="fp8: keys and values in eight bits.", show_default="as the model computes"),
]
Fps = Annotated[float, typer.Option(help="Frames a second to watch.")]
Threshold = Annotated[
    float | None,
    typer.Option(help="Probability of silence below which the model speaks.", show_default="the model's"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, one object a line, for machines.")]

app = typer.Typer(help="Video models that watch live and talk.", no_args_is_help=True, add_completion=True)


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


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user got wrong is answered in one line, and the exit code is 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except MISTAKES as error:
        typer.echo(f"error: {in_one_line(error)}", err=True)
        raise typer.Exit(code=1) from None


# ------------------------------------------------------------------------------------------------------------ watching


@app.command()
def narrate(
    video: Video = str(SAMPLE),
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    query: Annotated[str, typer.Option(help="What the user says at the first frame.")] = (
        "Please narrate the video in real time."
    ),
    fps: Fps = 2.0,
    threshold: Threshold = None,
    max_frames: Annotated[
        int | None,
        typer.Option(help="Most frames to remember; the oldest are forgotten.", show_default="what fits the context"),
    ] = None,
    when_behind: Annotated[
        str | None,
        typer.Option(
            help="Where frames of a live source come too fast and --max-waiting wait: drop_oldest, block, which lets "
            "the source wait, or catch_up, which ends there.",
            show_default="drop_oldest of a camera or broadcast, else block",
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(min=1, help="Most frames of a live source that wait.", show_default="16, or 512 to catch up"),
    ] = None,
    weights: Weights = None,
    cache: CacheDtype = None,
    srt: Annotated[Path | None, typer.Option(help="Also write the narration as SubRip.")] = None,
    vtt: Annotated[Path | None, typer.Option(help="Also write it as WebVTT.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Also write it as lines of JSON.")] = None,
    burn_in: Annotated[
        Path | None, typer.Option(help="Also write the video with it burnt in, an mp4 without sound.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Narrates a video in the terminal as it plays."""
    outputs = {srt: captions.to_srt, vtt: captions.to_vtt, jsonl: captions.to_jsonl}
    with _one_line_errors():
        for path in filter(None, [*outputs, burn_in]):
            if not path.absolute().parent.is_dir():
                raise ValueError(f"There is no folder '{path.parent}' to write '{path.name}' to.")
            if path.is_dir():
                raise ValueError(f"'{path}' is a folder: name a file in it.")
            if path.resolve() == Path(video).resolve():
                raise ValueError(f"'{path}' is the video itself: write to another file.")
        if burn_in is not None and burn_in.suffix != ".mp4":
            raise ValueError(f"--burn-in writes an mp4: call it so, and not '{burn_in.name}'.")
        if burn_in is not None and not Path(video).is_file():
            raise ValueError("--burn-in needs a video file: a live source is not kept.")
        if cache is not None and cache not in CACHE_DTYPES:
            raise ValueError(f"--cache can be {' or '.join(CACHE_DTYPES)}, not {cache!r}.")
        options = {"fps": fps, "interval_threshold": threshold, "cache_dtype": CACHE_DTYPES.get(cache)}
        if when_behind is not None and when_behind not in WHEN_BEHIND:
            raise ValueError(f"--when-behind can be {', '.join(WHEN_BEHIND)}, not {when_behind!r}.")
        checkpoint, behind = (model, revision, weights), (when_behind, max_waiting)
        session, seconds, dropped = _watch(video, checkpoint, query, as_json, max_frames, behind, options)
        end = captions.video_seconds(video) if Path(video).is_file() else session.time + 1 / fps
        for path, write in outputs.items():
            if path is not None:
                options = {} if path is jsonl else {"end": end}
                path.write_text(write(session.events, **options), encoding="utf-8")
        if burn_in is not None:
            captions.burn_in(video, session.events, burn_in)
        _summary(session, seconds, dropped, as_json)


@app.command()
def ask(
    video: Video,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    at: Annotated[float | None, typer.Option(help="Second at which to ask.", show_default="the end")] = None,
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    fps: Fps = 2.0,
    as_json: AsJson = False,
) -> None:
    """Watches a video in silence up to a second, and answers a question there."""
    with _one_line_errors():
        processor, loaded = _load(model, revision, video)
        # At a threshold of 0 silence needs only to be likelier than anything else.
        session = loaded.stream(processor, fps=fps, interval_threshold=0.0, **within_context(loaded.config))
        for time, frame in _progress(processor.read_video(video, fps=fps, end=at), True):
            session.push(frame, time=time)
        question_and_answer = session.ask(question)
        answer = question_and_answer[-1]
        if as_json:
            typer.echo(json.dumps({"time": answer.time, "question": question, "answer": answer.text}))
        else:
            typer.echo(answer.text)


def _load_config(name: str, revision: str | None) -> Any:
    if Path(name).is_file():
        raise ValueError(f"'{name}' is a file: give the folder of a checkpoint, or a Hub id.")
    config = AutoConfig.from_pretrained(name, trust_remote_code=True, revision=revision)
    if config.model_type != "videollm_mod":
        raise ValueError(f"'{name}' is a {config.model_type} and no VideoLLM-MoD.")
    return config


def _load(name: str, revision: str | None, video: str, weights: str | None = None) -> tuple[Any, Any]:
    _load_config(name, revision)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, revision=revision)
    model = load_model(name, weights=weights, revision=revision)
    if Path(name).resolve() == EMBEDDED and Path(video).resolve().parent != SAMPLE.parent:
        typer.secho(f"Note: {EMBEDDED_NOTICE}", err=True, fg="yellow")
    return processor, model


def _progress(frames: Iterator[Any], is_silent: bool) -> Iterator[Any]:
    """The frames, with their count shown on a terminal if nothing else that it shows tells that time goes by."""
    return tqdm(frames, unit=" frames", file=sys.stderr, disable=None if is_silent else True)


def _watch(
    video: str,
    checkpoint: tuple[str, str | None, str | None],
    query: str,
    as_json: bool,
    max_frames: int | None,
    behind: tuple[str | None, int | None],
    options: dict[str, Any],
) -> tuple[Any, float, int]:
    """A session that has seen the video, how long that took, and how many frames were dropped."""
    (name, revision, weights), (when_behind, max_waiting) = checkpoint, behind
    processor, model = _load(name, revision, video, weights)
    line = None if as_json else _Line(processor.tokenizer)
    session = model.stream(processor, streamer=line, **options, **within_context(model.config, max_frames))
    fps = options["fps"]
    if line is not None:
        line.session = session
    begin, told, dropped = clock.perf_counter(), 0, 0

    def drop() -> None:
        nonlocal dropped
        dropped += 1
        if dropped == 1:
            typer.echo("frames come too fast: the oldest that wait are dropped", err=True)

    if query:
        session.ask(query, reply_now=False)
    try:
        frames = iter(_progress(processor.read_video(video, fps=fps), as_json))
        ahead = read_ahead(
            frames,
            session.chunk_frames,
            is_live=not is_complete(video),
            goes_on=goes_on(video),
            when_behind=when_behind,
            max_waiting=max_waiting,
            on_drop=drop,
        )
        with closing(ahead):
            for waiting in ahead:
                session.push([frame for _, frame in waiting], time=[time for time, _ in waiting])
                for event in session.events[told:] if as_json else ():
                    typer.echo(json.dumps({"time": event.time, "role": event.role, "text": event.text}))
                told = len(session.events)
    except (KeyboardInterrupt, TooManyWaitingError, ValueError) as error:
        # A live source ends when somebody stops it or when it breaks: what was said so far is kept.
        if session.num_frames == 0:
            raise
        typer.echo(f"\nstopped after {session.time:.1f} s" + (f": {error}" if str(error) else ""), err=True)
    session.close()
    return session, clock.perf_counter() - begin, dropped


def _summary(session: Any, seconds: float, dropped: int, as_json: bool) -> None:
    """Speed, cache entries by kind of layer, and what full compute would have cost."""
    config, cache = session.model.config, session.cache
    text_tokens = int(cache.get_seq_length()) - session.num_remembered * config.frame_num_tokens
    cost = session.model.estimate_cost(session.num_remembered, text_tokens)
    # What is stored may be of other bytes than the model computes with.
    full_cache_bytes = round(cost.full_cache_bytes * cache.num_bytes / cost.cache_bytes)
    lengths, routed = cache.lengths, set(config.routed_layers)
    if as_json:
        figures = {"frames": session.num_frames, "frames_dropped": dropped}
        figures |= {"frames_remembered": session.num_remembered}
        figures |= {"seconds": round(seconds, 3), "cache_entries": lengths}
        figures |= {"flops": cost.flops, "full_flops": cost.full_flops}
        figures |= {"cache_bytes": cache.num_bytes, "full_cache_bytes": full_cache_bytes}
        typer.echo(json.dumps({"summary": figures}))
        return
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
        f"({_device_name(session.model)})" + (f"; {dropped} more came too fast and were dropped" if dropped else "")
    )
    typer.echo(
        f"cache entries       {', '.join(kinds)}; {_size(cache.num_bytes)}, {_size(full_cache_bytes)} at full compute"
    )
    what = "language model" if session.num_remembered == session.num_frames else "what is remembered"
    typer.echo(
        f"{what:<20}{cost.flops / 1e9:.2f} GFLOP; {cost.full_flops / 1e9:.2f} at full compute "
        f"(routing saves {1 - cost.flops_ratio:.0%})"
    )


# --------------------------------------------------------------------------------------------------------- checkpoints


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder or a Hub id.")] = str(EMBEDDED),
    revision: Revision = None,
    seconds: Annotated[float, typer.Option(help="Length of a video to tell the cost of.")] = 600.0,
    fps: Fps = 2.0,
    text_tokens: Annotated[int, typer.Option(help="Tokens of text in it.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Says what a checkpoint is, how it routes, and what a video costs. Runs its code, and loads no weights."""
    with _one_line_errors():
        config = _load_config(checkpoint, revision)
        width = torch.tensor([], dtype=config.dtype).itemsize if config.dtype is not None else 2
        cost = config.estimate_cost(round(seconds * fps), text_tokens, bytes_per_value=width)
        counts, tokens = config.layer_keep_counts, config.frame_num_tokens
        text, vision = config.text_config, config.vision_config
        figures = {
            "language_model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}",
            "vision_encoder": f"{vision.model_type}, width {vision.hidden_size}",
            "frame_tokens": tokens,
            "routed_layers": config.routed_layers,
            "kept_tokens": counts,
            "gate": f"{config.mod_gate} on the {config.mod_gate_on}, {config.mod_router} router",
            "interval_threshold": config.interval_threshold,
            "seconds": seconds,
            "flops": cost.flops,
            "full_flops": cost.full_flops,
            "cache_bytes": cost.cache_bytes,
            "full_cache_bytes": cost.full_cache_bytes,
        }
    if as_json:
        typer.echo(json.dumps(figures))
        return
    typer.echo(f"language model      {figures['language_model']}")
    typer.echo(f"vision encoder      {figures['vision_encoder']}")
    typer.echo(
        f"frame               {tokens} tokens; speaks where silence is less likely than {config.interval_threshold}"
    )
    typer.echo(f"routing             {figures['gate']}")
    for layer, count in enumerate(counts):
        mark = "routed" if layer in config.routed_layers else "full"
        typer.echo(f"  layer {layer:<3}         {'#' * count}{'.' * (tokens - count)} {count:>3} of {tokens}  {mark}")
    typer.echo(f"{seconds:.0f} s at {fps:g} fps   {text_tokens} tokens of text, estimated:")
    typer.echo(
        f"  operations        {cost.flops / 1e12:.3g} TFLOP; {cost.full_flops / 1e12:.3g} at full compute "
        f"(saves {1 - cost.flops_ratio:.0%})"
    )
    typer.echo(
        f"  cache             {_size(cost.cache_bytes)}; {_size(cost.full_cache_bytes)} at full compute "
        f"(saves {1 - cost.cache_ratio:.0%})"
    )


PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=PASS_ON)
def convert(context: typer.Context) -> None:
    """Converts a VideoLLM-online checkpoint: BASE ADAPTER OUT, and options (--help)."""
    _pass_on(context, "videollm_mod.convert.videollm_online")


@app.command(context_settings=PASS_ON)
def convert_llava(context: typer.Context) -> None:
    """Converts a vision-language model of the LLaVA family: MODEL OUT, and options (--help)."""
    _pass_on(context, "videollm_mod.convert.llava")


@app.command(context_settings=PASS_ON)
def push(context: typer.Context) -> None:
    """Publishes a checkpoint on the Hub: CHECKPOINT REPO, and options (--help)."""
    _pass_on(context, "videollm_mod.train.push")


def _pass_on(context: typer.Context, script: str) -> None:
    sys.argv = [context.command_path, *context.args]
    try:
        main = importlib.import_module(script).main
    except ImportError as error:
        typer.echo(f'error: {error}. `pip install -e ".[train]"` in the checkout brings it.', err=True)
        raise typer.Exit(code=1) from None
    main()


def _device_name(model: Any) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:.1f} GB"


if __name__ == "__main__":
    app()
