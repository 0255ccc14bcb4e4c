# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What commands that watch a video share: checks before any work, loading, reading, Ctrl+C and what is printed."""

import json
import os
import signal
import stat
import sys
import threading
import time as clock
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet, visible

import typer

from videollm_mod.checks_videollm_mod import check_count, check_fps, check_number, check_seconds, check_text
from videollm_mod.space.checkpoint_faults import load_config, named_faults
from videollm_mod.space.checkpoint_names import check_checkpoint


EMBEDDED = Path(__file__).resolve().parents[1]
# More than the noise of a camera changes, and less than something small that moves.
REUSE_STATIC = 3.0
EMBEDDED_NOTICE = (
    "the embedded checkpoint was trained on generated clips (StreamWorld and DoomWorld) and knows nothing else. What "
    "it says about this video means nothing. `videollm-mod convert` makes a checkpoint of a published model, and "
    "--model chooses it."
)


def check_options(
    *,
    fps: float,
    at: float | None = None,
    interval_threshold: float | None = None,
    max_frames: int | None = None,
    text: str | None = None,
) -> None:
    """Raise `ValueError` if a number or a text is out of range, before any work."""
    check_fps(fps)
    if at is not None:
        check_seconds("--at", at, least=0)
    if interval_threshold is not None:
        check_number("interval_threshold", interval_threshold, least=0, most=1)
    if max_frames is not None:
        check_count("max_frames", max_frames)
    check_text("What the user says", text or "")


def check_speaking(*, speak: str | None, every: float | None, speak_threshold: float | None, **guards: Any) -> None:
    """Raise `ValueError` if an option of when to speak is out of range or does not fit the others."""
    from videollm_mod.speaking_videollm_mod import Speaking, new_policy

    # Without a name, the policy may be one of a checkpoint that is not loaded yet.
    threshold = None if speak is None else speak_threshold
    Speaking(new_policy(speak, every, threshold, "learned"), **guards)


# What asks a program to end, and what that does the second time. A terminal that closes may say so twice.
_ENDS = {"SIGINT": signal.SIG_DFL, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_IGN}


class CtrlC:
    """
    Ctrl+C raises `KeyboardInterrupt` once, so that what is done can be written. The second one ends the program.
    SIGTERM and a terminal that closes count as Ctrl+C.
    """

    is_pressed = False
    is_deferred = False

    def __enter__(self) -> "CtrlC":
        CtrlC.is_pressed = False
        self.before: dict[int, Any] = {}
        for name in _ENDS if threading.current_thread() is threading.main_thread() else ():
            number = getattr(signal, name, signal.SIGINT)  # Windows has no SIGHUP
            # A program in the background ignores Ctrl+C.
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                self.before[number] = signal.signal(number, self.press)
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        for number, before in self.before.items():
            # After the first Ctrl+C, the next one ends the program at once to its very end.
            if number != signal.SIGINT or signal.getsignal(number) == self.press:
                signal.signal(number, before)
        if kind is KeyboardInterrupt:
            typer.echo("stopped", err=True)

    def press(self, number: int, *_: Any) -> None:
        CtrlC.is_pressed = True
        for other in self.before:
            signal.signal(other, _ENDS[signal.Signals(other).name])
        if signal.Signals(number).name == "SIGHUP":
            _leave_terminal()
        if not self.is_deferred:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the work in this context end before Ctrl+C stops the program."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.is_pressed:
            raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Write to nothing what would go to a terminal that is closed, where it is an error."""
    for output in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def is_read_once(video: str) -> bool:
    """Return whether a source has its frames for the first reader only: standard input, a pipe, a TCP connection."""
    if video == "-" or video.startswith("tcp://"):
        return True
    try:
        # Also what a shell makes of <(...), such as /dev/fd/63.
        return stat.S_ISFIFO(os.stat(video).st_mode)
    except (OSError, ValueError):
        return False


def check_video(
    video: str, *, fps: float, timeout: float, at: float | None = None, when_behind: str | None = None
) -> None:
    """Read one frame, so that a wrong video or option is reported before a model is loaded; see [`is_read_once`]."""
    from videollm_mod.reading_ahead_videollm_mod import WHEN_BEHIND, read_ahead
    from videollm_mod.video_reading_videollm_mod import VideoReader, read_video

    if when_behind is not None and when_behind not in WHEN_BEHIND:
        raise ValueError(f"--when-behind can be {', '.join(WHEN_BEHIND)}, not {when_behind!r}.")
    if is_read_once(video):
        return
    stop = threading.Event()
    frames = read_video(video, fps=fps, timeout=timeout, reconnect=False, stop=stop)
    with closing(read_ahead(frames, 1, max_waiting=1, stop=stop)) as ahead:
        next(ahead)
    if at is not None and Path(video).is_file():
        with VideoReader(video) as reader:
            if at > reader.seconds:
                raise too_late(at, reader.seconds)


def too_late(at: float, end: float) -> ValueError:
    return ValueError(f"The video ends at {end:.1f} s: choose an earlier second than --at {at:g}.")


def open_session(
    video: str,
    name: str,
    revision: str | None,
    *,
    weights: str | None,
    prints: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a checkpoint and start a session, which prints replies as they are generated if `prints`."""
    processor, model, options = load(name, revision, weights=weights, **options)
    if notice := foreign_notice(video, name):
        typer.secho(f"Note: {notice}", err=True, fg="yellow")
    printer = _line_printer(processor.tokenizer) if prints else None
    session = model.stream(processor, streamer=printer, **options)
    if printer is not None:
        printer.session = session
    return processor, session


def load(
    name: str,
    revision: str | None,
    *,
    weights: str | None,
    cache_dtype: str | None,
    max_frames: int | None,
    reuse_static: float | None = None,
    frame_size: int | None = None,
    **options: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """
    Load a checkpoint. Return its processor, the model and the options of its sessions.

    A `reuse_static` of `None` means the commands' default, and 0 that all frames are encoded.
    """
    name = check_checkpoint(name)
    typer.echo(f"loading {describe_checkpoint(name)} ...", err=True)
    quiet()
    from videollm_mod.remembering_videollm_mod import checkpoint_limits, within_context
    from videollm_mod.space.loading import CACHE_DTYPES, load_checkpoint

    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"--cache-dtype can be {' or '.join(CACHE_DTYPES)}, not {cache_dtype!r}.")
    _check_threshold(load_config(name, revision).speak, **options)
    with named_faults(name):
        processor, model = load_checkpoint(name, weights=weights, revision=revision)
    if frame_size is not None:
        model.set_frame_size(processor, frame_size)
    said = checkpoint_limits(model.generation_config)
    max_frames = said.get("max_frames") if max_frames is None else max_frames
    limits = within_context(model.config, processor.frame_text_tokens, max_frames)
    limits["max_text_tokens"] = said.get("max_text_tokens", limits["max_text_tokens"])
    reuse_static = _default_reuse(model.config.speak) if reuse_static is None else reuse_static
    stored = {"cache_dtype": CACHE_DTYPES.get(cache_dtype), "reuse_static": reuse_static or None}
    return processor, model, options | limits | stored


def _check_threshold(
    learned: str, *, interval_threshold: float | None = None, speak: Any = None, every: float | None = None, **_: Any
) -> None:
    """Raise `ValueError` if a threshold of silence is given, and another policy than the learned one decides."""
    policy = speak or ("every" if learned == "learned" and every is not None else learned)
    if interval_threshold is not None and policy != "learned":
        raise ValueError(
            f"--interval-threshold belongs to 'learned', and {policy!r} decides when to speak: leave it out."
        )


def load_limits(name: str, revision: str | None = None) -> dict[str, int]:
    """Return what a checkpoint says to remember in its generation configuration; see [`checkpoint_limits`]."""
    from transformers import GenerationConfig

    from videollm_mod.remembering_videollm_mod import checkpoint_limits

    if Path(name).is_dir() and not Path(name, "generation_config.json").exists():
        return {}
    with suppress(OSError), named_faults(name):  # not every checkpoint of the Hub has one
        return checkpoint_limits(GenerationConfig.from_pretrained(name, revision=revision))
    return {}


def _default_reuse(speak: str) -> float:
    """Return the grey levels up to which commands reuse features."""
    # A model that learned when to speak was trained and measured on the features of each frame.
    return 0.0 if speak == "learned" else REUSE_STATIC


def describe_checkpoint(name: str) -> str:
    return "the embedded checkpoint" if Path(name).resolve() == EMBEDDED else name


def foreign_notice(video: str, name: str) -> str:
    """Return what to say about a video that the embedded checkpoint knows nothing of, or `""`."""
    from videollm_mod.space.loading import generated_world
    from videollm_mod.video_reading_videollm_mod import VideoReader

    is_foreign = Path(name).resolve() == EMBEDDED and generated_world(video, VideoReader) is None
    return EMBEDDED_NOTICE if is_foreign else ""


def ask_first(session: Any, query: str | None) -> None:
    if text := first_query(session, query):
        session.ask(text, reply_now=False)


def first_query(session: Any, query: str | None) -> str:
    """Return what the user says before the first frame, or `""`."""
    from videollm_mod.generation_videollm_mod import DEFAULT_QUERY

    return (DEFAULT_QUERY if session.speak == "learned" else "") if query is None else query


def new_report() -> Any:
    # The package's own: a published checkpoint may have code that is older than the report.
    from videollm_mod.video_reading_videollm_mod import ReadingReport

    return ReadingReport()


def _show_progress(frames: Iterator[Any]) -> Iterator[Any]:
    """Count frames on stderr if it is a terminal."""
    from tqdm.auto import tqdm

    return tqdm(frames, unit=" frames", file=sys.stderr, disable=None)


def watch_video(processor: Any, video: str, session: Any, ctrl_c: CtrlC, *, as_json: bool, **options: Any) -> float:
    """Push a video into a session and print what it says. Return the seconds it took."""
    start, printed = clock.perf_counter(), 0

    def print_new() -> None:
        nonlocal printed
        for event in session.events[printed:] if as_json else ():
            typer.echo(json.dumps({"time": event.time, "role": event.role, "text": event.text}))
        printed = len(session.events)

    ahead = read_frames(processor, video, session, shows_progress=as_json, **options)
    try:
        with keep_what_was_seen(session), closing(ahead):
            for waiting in ahead:
                session.push([frame for _, frame in waiting], time=[time for time, _ in waiting])
                print_new()
                # A library may have swallowed the exception.
                if ctrl_c.is_pressed:
                    raise KeyboardInterrupt
        if session.streamer is not None:
            session.streamer.keep_cut_reply()
        session.close()
    finally:
        # Ctrl+C and faults come within a push, and files are written of all that was said before.
        if session.num_frames > 0:
            print_new()
    return clock.perf_counter() - start


def see_video(session: Any, ahead: Iterator[list[tuple[float, Any]]], ctrl_c: CtrlC) -> str:
    """
    Push what was read. The session can answer afterwards, also if Ctrl+C stopped it. Return when and why the watching
    ended before the video, or `""`.
    """
    with keep_what_was_seen(session) as ends, closing(ahead):
        for waiting in ahead:
            with ctrl_c.deferred():
                session.push([frame for _, frame in waiting], time=[time for time, _ in waiting])
    return "".join(ends)


def read_frames(
    processor: Any,
    video: str,
    session: Any,
    *,
    fps: float,
    timeout: float,
    reconnect: bool | None,
    report: Any,
    end: float | None = None,
    shows_progress: bool = True,
    may_slow: bool = False,
    on_slower: Callable[[float], None] | None = None,
    **behind: Any,
) -> Iterator[list[tuple[float, Any]]]:
    """
    Read a video in a thread, at the model's size: FFmpeg may wait for long, and Ctrl+C would wait with it. With
    `may_slow` a camera or broadcast is watched at a lower rate than `fps` if the model is slower, and `on_slower` is
    called with this rate.
    """
    from videollm_mod.reading_ahead_videollm_mod import keep_up, read_ahead
    from videollm_mod.video_opening_videollm_mod import goes_on, is_complete
    from videollm_mod.video_reading_videollm_mod import read_video

    def on_drop() -> None:
        session.count_dropped()
        if session.num_dropped == 1:
            advice = f"a lower --fps than {fps:g}, a smaller --frame-size or --reuse-static {REUSE_STATIC:g}"
            typer.echo(f"frames come too fast: the oldest that wait are dropped; {advice} may help", err=True)

    def on_slow(slower: float, seconds: float) -> None:
        rate = f"{slower:g} frame per second is" if slower == 1 else f"{slower:g} frames per second are"
        reason = f"a frame takes {seconds:.2g} s here, so {rate} watched"
        typer.echo(f"{reason}; --fps chooses another rate", err=True)
        if on_slower is not None:
            on_slower(slower)

    stop, device = threading.Event(), session.model.device
    options = {"timeout": timeout, "reconnect": reconnect, "report": report, "stop": stop}
    frames = read_video(video, fps=fps, end=end, **options)
    frames = _show_progress(frames) if shows_progress else frames
    small = ((time, processor.resize_frames(frame, device)[0].permute(1, 2, 0).cpu()) for time, frame in frames)
    behind |= {"is_live": not is_complete(video), "goes_on": goes_on(video), "on_drop": on_drop}
    ahead = read_ahead(small, session.chunk_frames, stop=stop, **behind)
    return keep_up(ahead, session, fps=fps, on_slow=on_slow) if may_slow and goes_on(video) else ahead


def video_end(video: str, session: Any, fps: float) -> float:
    """Return the length of a video that was watched, in seconds, or of what was seen of it."""
    from videollm_mod.video_reading_videollm_mod import VideoReader

    # The file may be gone by now.
    with suppress(OSError, ValueError):
        if Path(video).is_file():
            with VideoReader(video) as reader:
                return reader.seconds
    return session.time + 1 / fps


@contextmanager
def keep_what_was_seen(session: Any) -> Iterator[list[str]]:
    """
    End the watching, with one line, when a live source is stopped or breaks off after its first frame. The line is
    added to the list that this gives.
    """
    from videollm_mod.reading_ahead_videollm_mod import TooManyWaitingError

    ends: list[str] = []
    try:
        yield ends
    except (KeyboardInterrupt, TooManyWaitingError, ValueError) as error:
        if session.num_frames == 0:
            raise
        ends.append(f"stopped after {session.time:.1f} s" + (f": {error}" if str(error) else ""))
        typer.echo(f"\n{ends[0]}", err=True)


def _line_printer(tokenizer: Any) -> Any:
    """Make a streamer that prints each reply as it is generated, after the time in the video."""
    from transformers import TextStreamer

    from videollm_mod.streaming_videollm_mod import StreamEvent

    class LinePrinter(TextStreamer):
        session: Any = None
        is_in_line = False
        line = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if not self.is_in_line:
                text, self.line = text.lstrip(), ""
                if not text and not stream_end:
                    return
                typer.echo(f"{self.session.time:6.1f}s  ", nl=False)
            typer.echo(visible(text), nl=stream_end)
            self.line, self.is_in_line = self.line + text, not stream_end

        def keep_cut_reply(self) -> None:
            """Add a reply that Ctrl+C cut off to the events: it is on the screen."""
            if self.is_in_line:
                self.end()
                place = self.session.time, self.session.num_frames - 1
                cut = StreamEvent(*place, "assistant", self.line.strip(), interrupted=True)
                self.session.events.append(cut)

    return LinePrinter(tokenizer, skip_special_tokens=True)


def print_reading(report: Any, num_dropped: int = 0, *, as_json: bool = False) -> None:
    """Say what was mended and left out on the way, and how many frames were dropped, if there is anything to say."""
    if as_json and (report or num_dropped):
        typer.echo(json.dumps({"summary": {"frames_dropped": num_dropped, "reading": report.to_dict()}}))
        return
    if num_dropped:
        were = "1 frame came too fast and was" if num_dropped == 1 else f"{num_dropped} frames came too fast and were"
        typer.echo(f"{were} dropped.", err=True)
    if report:
        typer.echo(report, err=True)


__all__ = [
    "CtrlC",
    "EMBEDDED",
    "ask_first",
    "check_options",
    "check_speaking",
    "check_video",
    "describe_checkpoint",
    "first_query",
    "foreign_notice",
    "is_read_once",
    "keep_what_was_seen",
    "load",
    "new_report",
    "open_session",
    "print_reading",
    "read_frames",
    "see_video",
    "too_late",
    "video_end",
    "watch_video",
]
