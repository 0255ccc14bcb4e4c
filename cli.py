# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The command line: `videollm-mod narrate`, `ask`, `report`, `find`, `watch`, `serve`, `inspect`, `convert`, `push`
and `verify`.

It parses options and prints. The commands import torch and Transformers inside, so that `--help` answers at once.
"""

import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from videollm_mod.console import counted, describe_entries, describe_saving, device_name, visible

import typer
from typer.core import TyperGroup

from videollm_mod.checks_videollm_mod import check_number
from videollm_mod.commands.alert import Alert, Webhook, watch_for
from videollm_mod.commands.data_set import HUB, check_data_set, narrate_data_set
from videollm_mod.commands.find import find_in_video, open_cutter
from videollm_mod.commands.folder import check_file, check_folder, check_ray, narrate_folder
from videollm_mod.commands.options import (
    AsJson,
    CacheDtype,
    Compile,
    Every,
    Fps,
    FrameSize,
    IntervalThreshold,
    LiveFps,
    MaxFrames,
    MaxWords,
    MinSilence,
    Model,
    NoRepeat,
    Prompt,
    Query,
    Reconnect,
    ReuseStatic,
    Revision,
    Speak,
    SpeakThreshold,
    Threshold,
    Timeout,
    Video,
    Weights,
)
from videollm_mod.commands.serve import serve
from videollm_mod.commands.verify import verify
from videollm_mod.commands.watching import (
    EMBEDDED,
    CtrlC,
    ask_first,
    check_options,
    check_speaking,
    check_video,
    load_limits,
    new_report,
    open_session,
    print_reading,
    read_frames,
    see_video,
    too_late,
    video_end,
    watch_video,
)
from videollm_mod.commands.windows import ASKED_ONLY, check_window, to_question
from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import check_outputs, write_text
from videollm_mod.space.checkpoint_faults import in_one_line, load_config
from videollm_mod.space.checkpoint_names import check_checkpoint


ROOT = Path(__file__).resolve().parent
DEFAULT_FPS = 2.0
SAMPLE = ROOT / "samples" / "streamworld.mp4"


class _Commands(TyperGroup):
    """The commands. A wrong option or argument is answered in one line, as other mistakes are."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line_usage():
            return super().make_context(*args, **options)

    def invoke(self, context: typer.Context) -> Any:
        # Names of files need not be Unicode.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        with _one_line_usage():
            return super().invoke(context)


@contextmanager
def _one_line_usage() -> Iterator[None]:
    try:
        yield
    except typer.BadParameter.__base__ as error:
        # Without any argument, the message is the help.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        where = "videollm-mod" if error.ctx is None else error.ctx.command_path
        message = " ".join(error.format_message().split())
        message = message if message.endswith("?") else message.rstrip(".") + "."
        typer.echo(f"error: {message} `{where} --help` shows what there is.", err=True)
        raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    help="Streaming video language models: they watch a video as it plays, and speak when something happens.",
    no_args_is_help=True,
    add_completion=True,
    # --max_frames is --max-frames, as in the scripts.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)


# ------------------------------------------------------------------------------------------------------------ watching


@app.command()
def narrate(
    video: Annotated[
        str,
        typer.Argument(
            help="A file or a folder, a URL (also rtsp://), camera:0, - for standard input, or a data set on the Hub, "
            "hf://datasets/OWNER/NAME.",
            show_default="a sample clip",
        ),
    ] = str(SAMPLE),
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    query: Query = None,
    fps: LiveFps = None,
    speak: Speak = None,
    every: Every = None,
    speak_threshold: SpeakThreshold = None,
    prompt: Prompt = None,
    no_repeat: NoRepeat = None,
    max_words: MaxWords = None,
    min_silence: MinSilence = None,
    interval_threshold: IntervalThreshold = None,
    max_frames: MaxFrames = None,
    frame_size: FrameSize = None,
    reuse_static: ReuseStatic = None,
    when_behind: Annotated[
        str | None,
        typer.Option(
            help="What to do when frames of a live source come too fast. drop_oldest: skip the oldest. block: let the "
            "source wait. catch_up: keep all, and stop when --max-waiting are waiting.",
            show_default="drop_oldest for a camera or broadcast, else block",
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of frames of a live source that may wait, at the model's size.",
            show_default="16; for catch_up 512",
        ),
    ] = None,
    timeout: Timeout = 10.0,
    reconnect: Reconnect = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    compile: Compile = None,
    srt: Annotated[Path | None, typer.Option(help="Write the narration as SubRip subtitles.")] = None,
    vtt: Annotated[Path | None, typer.Option(help="Write the narration as WebVTT subtitles.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write the narration as JSON, one event per line.")] = None,
    burn_in: Annotated[
        Path | None, typer.Option(help="Write the video with the narration as captions, and its sound, as an mp4.")
    ] = None,
    font: Annotated[
        Path | None,
        typer.Option(help="Font file for --burn-in.", show_default="an installed one that has the letters"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="For a folder or data set: where to write an .srt for each video, at the same path.",
            show_default="beside each",
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1, help="For a folder or data set: videos at once.", show_default="2 to 4, by cores and memory"
        ),
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For a folder or data set: processes of a Ray cluster, or of this machine. They write Parquet files "
            "into --out, with a row for each video.",
            show_default="no Ray",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="For a data set, also one in a folder: the split.", show_default="the only one")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="For a data set, also one in a folder: the column with videos, or their paths or URLs.",
            show_default="the only one of videos, or video",
        ),
    ] = None,
    video_root: Annotated[
        list[str] | None,
        typer.Option(
            help="For a data set: a folder, or the beginning of URLs, outside it that its rows may name. Repeat it "
            "for several.",
            show_default="none",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Narrate a video as it plays, or all videos of a folder or data set.

    Each line starts with the time in the video. Ctrl+C stops a live source, and the files are still written. A second
    Ctrl+C ends the program at once. In a folder, videos that have an .srt already are skipped.
    """
    with one_line_errors(), CtrlC() as ctrl_c:
        written = {"srt": srt, "vtt": vtt, "jsonl": jsonl, "burn_in": burn_in}
        outputs = {kind: path for kind, path in written.items() if path is not None}
        may_slow, fps = fps is None, DEFAULT_FPS if fps is None else fps
        check_options(fps=fps, interval_threshold=interval_threshold, max_frames=max_frames, text=query)
        speaking: dict[str, Any] = {"speak": speak, "every": every, "speak_threshold": speak_threshold}
        speaking |= {"prompt": prompt, "no_repeat": no_repeat, "max_words": max_words, "min_silence": min_silence}
        check_speaking(**speaking)
        is_data_set = video.startswith(HUB) or split is not None or column is not None
        if not video:
            raise ValueError("The name of the video is empty.")
        if video_root and not is_data_set and Path(video).is_dir():
            raise ValueError(
                "--video-root is for a data set: choose the rows of this folder with --split or --column."
            )
        if is_data_set or Path(video).is_dir():
            others = {"font": font, "when_behind": when_behind, "max_waiting": max_waiting, "reconnect": reconnect}
            check_folder(video, out, written | others)
            options = {"weights": weights, "cache_dtype": cache_dtype, "max_frames": max_frames, "compile": compile}
            options |= {"frame_size": frame_size, "reuse_static": reuse_static}
            options |= {"interval_threshold": interval_threshold, **speaking}
            work = {"out": out, "streams": streams, "query": query, "fps": fps, "as_json": as_json}
            if ray is not None:
                check_ray(out)
            if is_data_set:
                check_data_set(video, out)
                work |= {"split": split, "column": column, "video_root": video_root or (), "workers": ray}
                raise typer.Exit(narrate_data_set(video, model, revision, **work, **options))
            if ray is not None:
                from videollm_mod.commands.ray_folder import narrate_with_ray

                raise typer.Exit(narrate_with_ray(video, model, revision, workers=ray, **work, **options))
            raise typer.Exit(narrate_folder(video, model, revision, **work, **options))
        check_file(video, out=out, streams=streams, ray=ray, **{"video-root": video_root})
        _check_outputs(outputs, video)
        _check_burn_in(burn_in, font, query)
        live = {"fps": fps, "may_slow": may_slow, "timeout": timeout, "reconnect": reconnect}
        check_video(video, fps=fps, when_behind=when_behind, timeout=timeout)
        processor, session = open_session(
            video,
            model,
            revision,
            prints=not as_json,
            weights=weights,
            cache_dtype=cache_dtype,
            max_frames=max_frames,
            frame_size=frame_size,
            reuse_static=reuse_static,
            fps=fps,
            interval_threshold=interval_threshold,
            compile=compile,
            **speaking,
        )
        ask_first(session, query)
        report, behind = new_report(), {"when_behind": when_behind, "max_waiting": max_waiting}
        try:
            seconds = watch_video(processor, video, session, ctrl_c, as_json=as_json, report=report, **live, **behind)
        except Exception:
            # A fault of the program, such as a lack of memory, does not cost what was said before it.
            if session.num_frames > 0:
                _write(outputs, video, session, fps=fps, font=font)
            raise
        is_written, burnt = _write(outputs, video, session, fps=fps, font=font)
        _print_summary(session, seconds, as_json, report, burnt)
    if not is_written:
        raise typer.Exit(1)


@app.command()
def ask(
    video: Video,
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    at: Annotated[
        float | None,
        typer.Option(min=0, help="Second of the video at which to ask.", show_default="the end of the video"),
    ] = None,
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    fps: Fps = DEFAULT_FPS,
    max_frames: MaxFrames = None,
    frame_size: FrameSize = None,
    reuse_static: ReuseStatic = None,
    timeout: Timeout = 10.0,
    reconnect: Reconnect = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    as_json: AsJson = False,
) -> None:
    """
    Ask a question about a video, at its end or at any second.

    Ctrl+C stops a live source, and the question is asked then. A second Ctrl+C ends the program at once.
    """
    with one_line_errors(), CtrlC() as ctrl_c:
        check_options(fps=fps, at=at, max_frames=max_frames, text=question)
        if not question.strip():
            raise ValueError("The question is empty.")
        live = {"fps": fps, "timeout": timeout, "reconnect": reconnect}
        check_video(video, fps=fps, at=at, timeout=timeout)
        # The model stays silent until it is asked. One answer is not worth minutes of compilation.
        options = {"fps": fps, "speak": lambda _: False, "max_frames": max_frames, "compile": False}
        options |= {"frame_size": frame_size, "reuse_static": reuse_static}
        stored = {"weights": weights, "cache_dtype": cache_dtype}
        processor, session = open_session(video, model, revision, **stored, **options)
        report = new_report()
        ahead = read_frames(processor, video, session, end=at, report=report, **live)
        see_video(session, ahead, ctrl_c)
        if at is not None and not ctrl_c.is_pressed and session.time + 1 / fps < at:
            raise too_late(at, session.time)
        answer = session.ask(question)[-1]
    if as_json:
        said = {"time": answer.time, "question": question, "answer": answer.text}
        said |= {"frames_dropped": session.num_dropped, "reading": report.to_dict()}
        typer.echo(json.dumps(said))
    else:
        typer.echo(visible(answer.text))
        print_reading(report, session.num_dropped)


@app.command()
def report(
    video: Annotated[
        str, typer.Argument(help="A file or a URL that can be read again.", show_default="a sample clip")
    ] = str(SAMPLE),
    out: Annotated[
        list[Path],
        typer.Option(help="The file to write: .html, .md or .json. Can be given again.", show_default=False),
    ] = ...,
    summary: Annotated[
        str | None,
        typer.Option(
            help='What to ask at the end, for the summary. Use "" for none.',
            show_default="Summarize in one paragraph what happened in this video.",
        ),
    ] = None,
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    query: Query = None,
    fps: Fps = DEFAULT_FPS,
    speak: Speak = None,
    every: Every = None,
    speak_threshold: SpeakThreshold = None,
    prompt: Prompt = None,
    no_repeat: NoRepeat = None,
    max_words: MaxWords = None,
    min_silence: MinSilence = None,
    interval_threshold: IntervalThreshold = None,
    max_frames: MaxFrames = None,
    frame_size: FrameSize = None,
    reuse_static: ReuseStatic = None,
    timeout: Timeout = 10.0,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    compile: Compile = None,
) -> None:
    """
    Write what happened in a video and when.

    A page (.html) needs no other file. It has a frame for each thing said, a timeline, a summary and a search. Ctrl+C
    stops early, and the report is about what was seen.
    """
    from videollm_mod.commands.report import DEFAULT_SUMMARY, check_report, report_video

    with one_line_errors(), CtrlC() as ctrl_c:
        summary = DEFAULT_SUMMARY if summary is None else summary
        check_options(fps=fps, interval_threshold=interval_threshold, max_frames=max_frames, text=query)
        check_options(fps=fps, text=summary)
        speaking: dict[str, Any] = {"speak": speak, "every": every, "speak_threshold": speak_threshold}
        speaking |= {"prompt": prompt, "no_repeat": no_repeat, "max_words": max_words, "min_silence": min_silence}
        check_speaking(**speaking)
        check_report(out, video)
        check_video(video, fps=fps, timeout=timeout)
        stored = {"weights": weights, "cache_dtype": cache_dtype, "compile": compile}
        stored |= {"frame_size": frame_size, "reuse_static": reuse_static}
        options = {"fps": fps, "interval_threshold": interval_threshold, "max_frames": max_frames}
        processor, session = open_session(video, model, revision, prints=True, **stored, **options, **speaking)
        ask_first(session, query)
        watched = {"summary": summary, "fps": fps, "timeout": timeout, "model": model, "revision": revision}
        watched |= {"speaking": speaking}
        is_written = report_video(processor, video, session, ctrl_c, out=out, **watched)
    if not is_written:
        raise typer.Exit(1)


@app.command()
def find(
    video: Video,
    what: Annotated[
        str, typer.Argument(help='What to look for, such as "a red car", or a yes/no question.', show_default=False)
    ],
    window: Annotated[float, typer.Option(help="Seconds that are asked about at once.")] = 2.0,
    threshold: Threshold = 0.5,
    top: Annotated[int, typer.Option(min=1, help="Most moments to print.")] = 10,
    clips: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a clip of each moment, cut at key frames without encoding.", show_default="none"
        ),
    ] = None,
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    fps: Fps = DEFAULT_FPS,
    frame_size: FrameSize = None,
    reuse_static: ReuseStatic = None,
    timeout: Timeout = 10.0,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    as_json: AsJson = False,
) -> None:
    """
    Find the moments of a video at which something is seen, the most probable first.

    The model is asked at each window, without memory of earlier ones. Ctrl+C stops the search and prints what was
    found.
    """
    with one_line_errors(), CtrlC() as ctrl_c:
        check_options(fps=fps, text=to_question(what))
        check_window("--window", window, fps)
        check_video(video, fps=fps, timeout=timeout)
        cutter = open_cutter(video, clips)
        stored = {"weights": weights, "cache_dtype": cache_dtype}
        stored |= {"frame_size": frame_size, "reuse_static": reuse_static}
        processor, session = open_session(video, model, revision, fps=fps, max_frames=None, **stored, **ASKED_ONLY)
        report = new_report()
        reading = {"fps": fps, "timeout": timeout, "reconnect": False, "report": report}
        choice = {"window": window, "threshold": threshold, "top": top, "cutter": cutter, "as_json": as_json}
        is_written = find_in_video(processor, video, session, what, ctrl_c, **choice, **reading)
    if not is_written:
        raise typer.Exit(1)


@app.command()
def watch(
    video: Video,
    alert: Annotated[
        list[str],
        typer.Option(
            help='What to look for, such as "someone at the door", or a yes/no question. Repeat it for more.',
            show_default=False,
        ),
    ],
    every: Annotated[float, typer.Option(help="Seconds between two checks.")] = 2.0,
    threshold: Threshold = 0.5,
    webhook: Annotated[
        str | None,
        typer.Option(
            envvar="VIDEOLLM_MOD_WEBHOOK", help="Web address to post each alert to, as JSON.", show_default="none"
        ),
    ] = None,
    model: Model = str(EMBEDDED),
    revision: Revision = None,
    fps: LiveFps = None,
    frame_size: FrameSize = None,
    reuse_static: ReuseStatic = None,
    timeout: Timeout = 10.0,
    reconnect: Reconnect = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    as_json: AsJson = False,
) -> None:
    """
    Watch a camera, broadcast or file, and print a line when something comes into view.

    An alert goes off when the answer turns to yes, and not again until it was no. Ctrl+C stops. The exit code is 1 if
    the source breaks off.
    """
    with one_line_errors(), CtrlC() as ctrl_c:
        may_slow, fps = fps is None, DEFAULT_FPS if fps is None else fps
        check_options(fps=fps, text=" ".join(map(to_question, alert)))
        check_window("--every", every, fps)
        hook = None if webhook is None else Webhook(webhook, partial(typer.echo, err=True))
        check_video(video, fps=fps, timeout=timeout)
        stored = {"weights": weights, "cache_dtype": cache_dtype}
        stored |= {"frame_size": frame_size, "reuse_static": reuse_static}
        processor, session = open_session(video, model, revision, fps=fps, max_frames=None, **stored, **ASKED_ONLY)
        report, alerts = new_report(), [Alert(what, threshold) for what in dict.fromkeys(alert)]
        reading = {"fps": fps, "timeout": timeout, "reconnect": reconnect, "report": report, "shows_progress": False}
        choice = {"every": every, "webhook": hook, "as_json": as_json, "may_slow": may_slow}
        has_broken_off = watch_for(processor, video, session, alerts, ctrl_c, **choice, **reading)
    if has_broken_off:
        raise typer.Exit(1)


def _check_outputs(outputs: dict[str, Path], video: str) -> None:
    """Raise `ValueError` if a file cannot be written, before the video is watched."""
    burn_in = outputs.get("burn_in")
    if burn_in is not None and burn_in.suffix.lower() != ".mp4":
        raise ValueError(f"--burn-in writes an mp4: the file name must end in .mp4, got '{burn_in.name}'.")
    if burn_in is not None and not Path(video).is_file():
        raise ValueError("--burn-in needs a video file, because the frames of a live source are not stored.")
    check_outputs({f"--{kind.replace('_', '-')}": path for kind, path in outputs.items()}, video)


def _check_burn_in(burn_in: Path | None, font: Path | None, query: str | None) -> None:
    """Raise `ValueError` if captions cannot be burnt in, and say so if they probably lack letters."""
    if burn_in is None:
        if font is not None:
            raise ValueError("--font is the font of --burn-in: give both.")
        return
    from videollm_mod.space.caption_drawing import Fonts, name_characters
    from videollm_mod.space.video_writing import check_encoder

    check_encoder()
    # The narration is likely to be in the language of the query.
    if missing := Fonts(font).missing(query or ""):
        note = f"No font here has {name_characters(missing)}. Install one such as Noto Sans, or give one with --font."
        typer.secho(f"Note: {note}", err=True, fg="yellow")


def _write(outputs: dict[str, Path], video: str, session: Any, *, fps: float, font: Path | None) -> tuple[bool, Any]:
    """Write the narration in each format. Return whether all were written, and the report of `--burn-in`."""
    from videollm_mod.space import captions

    end, is_written, burnt = video_end(video, session, fps), True, None
    for kind, path in outputs.items():
        try:
            if kind == "burn_in":
                say = partial(typer.echo, err=True)
                burnt = captions.burn_in(video, session.events, path, font=font, say=say)
            elif kind == "jsonl":
                write_text(path, captions.to_jsonl(session.events))
            else:
                to_text = captions.to_srt if kind == "srt" else captions.to_vtt
                write_text(path, to_text(session.events, end=end))
            typer.echo(f"wrote {path}", err=True)
        except (OSError, ValueError) as error:
            # The other files are still written.
            why = in_one_line(error)
            what = "" if why.startswith(f"'{path}' cannot be written: ") else f"'{path}' was not written: "
            typer.echo(f"error: {what}{why}", err=True)
            is_written = False
    return is_written, burnt


def _print_summary(session: Any, seconds: float, as_json: bool, report: Any, burnt: Any) -> None:
    """Print speed, compute and cache size, compared with full compute."""
    config, cache = session.model.config, session.cache
    # Ctrl+C may come after a frame is recorded and before it is in the cache.
    text_tokens = max(int(cache.get_seq_length()) - session.num_remembered * config.frame_num_tokens, 0)
    cost = session.model.estimate_cost(session.num_remembered, text_tokens)
    # The cache may store another type than the model computes with, and has room for more entries than it holds.
    cache_bytes = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)
    full_cache_bytes = round(cost.full_cache_bytes * cache_bytes / max(cost.cache_bytes, 1))
    if as_json:
        figures = {
            "frames": session.num_frames,
            "frames_dropped": session.num_dropped,
            "frames_reused": session.num_reused,
            "frames_remembered": session.num_remembered,
            "replies_suppressed": session.num_suppressed,
            "seconds": round(seconds, 3),
            "cache_entries": cache.lengths,
            "flops": cost.flops,
            "full_flops": cost.full_flops,
            "cache_bytes": cache_bytes,
            "full_cache_bytes": full_cache_bytes,
            "reading": report.to_dict(),
        }
        if burnt is not None:
            figures["burn_in"] = burnt.to_dict()
        typer.echo(json.dumps({"summary": figures}))
        return
    speed = f"{session.num_frames / seconds:.1f} frames/s ({device_name(session.model)})"
    forgotten = session.num_frames - session.num_remembered
    silenced, was = counted(session.num_suppressed, "reply"), "was" if session.num_suppressed == 1 else "were"
    typer.echo(
        f"\n{counted(session.num_frames, 'frame')} in {seconds:.1f} s, {speed}"
        + (f"; {session.num_reused} hardly changed and were not encoded" if session.num_reused else "")
        + (f"; {session.num_dropped} more came too fast and were dropped" if session.num_dropped else "")
        + (f"; {silenced} said nothing new and {was} not shown" if session.num_suppressed else "")
        + (f"; compute and cache are those of the newest {session.num_remembered}" if forgotten else "")
    )
    _print_savings(cost, cache_bytes, full_cache_bytes)
    typer.echo(f"          entries: {describe_entries(cache.lengths, set(config.routed_layers))}")
    print_reading(report)


def _print_savings(cost: Any, cache_bytes: int, full_cache_bytes: int) -> None:
    flops = describe_saving(cost.flops, cost.full_flops, "FLOP", " in the language model")
    typer.echo(f"compute   {flops}")
    typer.echo(f"cache     {describe_saving(cache_bytes, full_cache_bytes, 'B')}")


# --------------------------------------------------------------------------------------------------------- checkpoints


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="A folder or a Hub id.", show_default="the embedded checkpoint")
    ] = str(EMBEDDED),
    revision: Revision = None,
    seconds: Annotated[float, typer.Option(min=0, help="Length of the video to estimate costs for.")] = 600.0,
    fps: Fps = DEFAULT_FPS,
    text_tokens: Annotated[int, typer.Option(min=0, help="Text tokens in that video's stream.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's layers and routing, and estimate compute and memory for a video. Loads no weights."""
    with one_line_errors():
        check_options(fps=fps)
        check_number("seconds", seconds, least=0, most=1e9)
        checkpoint = check_checkpoint(checkpoint)
        config = load_config(checkpoint, revision)
        remembers = load_limits(checkpoint, revision)
        cost = config.estimate_cost(
            round(seconds * fps), text_tokens, bytes_per_value=config.dtype.itemsize if config.dtype is not None else 2
        )
    text, vision = config.text_config, config.vision_config
    figures = {
        "language_model": f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}",
        "vision_encoder": f"{vision.model_type}, width {vision.hidden_size}",
        "frame_tokens": config.frame_num_tokens,
        "routed_layers": config.routed_layers,
        "kept_tokens": config.layer_keep_counts,
        "gate": f"{config.mod_gate} on the {config.mod_gate_on}, {config.mod_router} router",
        "speak": config.speak,
        "interval_threshold": config.interval_threshold,
        "remembers": remembers,
        "seconds": seconds,
        "flops": cost.flops,
        "full_flops": cost.full_flops,
        "cache_bytes": cost.cache_bytes,
        "full_cache_bytes": cost.full_cache_bytes,
    }
    if as_json:
        typer.echo(json.dumps(figures))
        return
    tokens = figures["frame_tokens"]
    typer.echo(f"language model   {figures['language_model']}")
    typer.echo(f"vision encoder   {figures['vision_encoder']}")
    typer.echo(f"frame            {tokens} tokens")
    rule = f"by the policy {config.speak!r}: it has not learned when to speak"
    if config.speak == "learned":
        rule = f"when the probability of silence is below {config.interval_threshold}"
    typer.echo(f"speaks           {rule}")
    typer.echo(f"remembers        {_describe_memory(remembers)}")
    typer.echo(f"gate             {figures['gate']}")
    typer.echo("tokens kept per frame:")
    for layer, kept in enumerate(figures["kept_tokens"]):
        kind = "routed" if layer in config.routed_layers else "full"
        typer.echo(f"  layer {layer:<3} {'#' * kept}{'.' * (tokens - kept)} {kept:>3} of {tokens}  {kind}")
    typer.echo(f"estimate for {seconds:g} s at {fps:g} fps, with {text_tokens} text tokens:")
    _print_savings(cost, cost.cache_bytes, cost.full_cache_bytes)


def _describe_memory(limits: dict[str, int]) -> str:
    """Return what sessions remember by default, such as "the newest 20 frames and 128 tokens of text"."""
    parts = [f"the newest {counted(limits['max_frames'], 'frame')}"] if "max_frames" in limits else []
    parts += [f"the first {limits['sink_frames']}"] if parts and "sink_frames" in limits else []
    parts += [f"{limits['max_text_tokens']} tokens of text"] if parts and "max_text_tokens" in limits else []
    return ", ".join(parts) or "what fits the context"


app.command()(serve)


_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def convert(context: typer.Context) -> None:
    """Convert a published vision-language model to a streaming model: convert MODEL OUT."""
    _run_script(context, "videollm_mod.convert.command")


@app.command(context_settings=_PASS_ON)
def push(context: typer.Context) -> None:
    """Publish a checkpoint on the Hugging Face Hub: push CHECKPOINT REPO."""
    _run_script(context, "videollm_mod.train.push")


app.command()(verify)


def _run_script(context: typer.Context, script: str) -> None:
    """Run a script's `main` with the rest of the command line as its arguments."""
    sys.argv = [context.command_path, *context.args]
    with one_line_errors():
        importlib.import_module(script).main()


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SystemExit as end:
        if CtrlC.is_pressed:
            # Python would wait for threads and take torch apart, which takes seconds.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise


if __name__ == "__main__":
    main()
