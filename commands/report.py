# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod report`: what happened in a video and when, as a page, Markdown or JSON."""

import base64
import hashlib
import importlib.metadata
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from videollm_mod.console import printable, visible

import typer

from videollm_mod.commands.watching import (
    CtrlC,
    describe_checkpoint,
    foreign_notice,
    is_read_once,
    new_report,
    read_frames,
    see_video,
    video_end,
)
from videollm_mod.outputs import check_outputs, write_text
from videollm_mod.space.checkpoint_faults import in_one_line


SUFFIXES = (".html", ".md", ".json")
DEFAULT_SUMMARY = "Summarize in one paragraph what happened in this video."
# Tokens of a summary. A paragraph is longer than what a model says of a moment.
MAX_SUMMARY_TOKENS = 300
# Largest side of a key frame and of a frame of the timeline, in pixels, and the quality of their JPEG.
KEY_FRAME_SIDE, STRIP_SIDE, QUALITY = 480, 160, 80
# Frames of the timeline, and key frames of a video about which nothing was said.
NUM_STRIP, NUM_SILENT = 8, 8
# Seconds between two key frames of a page from which on seeking may be faster than decoding what lies between.
SEEK_FROM = 5
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A frame as it is shown: upright, with square pixels."""

    jpeg: bytes
    width: int
    height: int

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


@dataclass(frozen=True)
class Moment:
    """Something that was said at a second of the video, or a frame about which nothing was said."""

    time: float
    text: str = ""
    picture: Picture | None = None


@dataclass
class Report:
    """
    What a report shows.

    Args:
        name (`str`): Name of the video.
        seconds (`float`): Its length.
        moments (`list[Moment]`): What was said, in order of time.
        summary (`str`): A paragraph about the video, or `""`.
        made_by (`dict[str, str]`): What made the report: names and values.
        notes (`list[str]`): What a reader must know before they believe it.
    """

    name: str
    seconds: float
    moments: list[Moment]
    summary: str = ""
    made_by: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_report(paths: Sequence[Path], video: str) -> None:
    """
    Check, before any work, that reports of a video can be made and written.

    Raises:
        `ValueError`: If a file has another suffix or cannot be written, or if the video can be read only once.
    """
    from videollm_mod.video_opening_videollm_mod import goes_on, without_secrets

    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"--out must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got '{path.name}'.")
    numbered = {"--out" if number == 1 else f"--out number {number}": path for number, path in enumerate(paths, 1)}
    check_outputs(numbered, video)
    if is_read_once(video) or goes_on(video):
        source = f"'{without_secrets(video)}'"
        raise ValueError(
            f"A report shows frames again, and {source} can be read only once. Record it to a file first."
        )


def report_video(
    processor: Any,
    video: str,
    session: Any,
    ctrl_c: CtrlC,
    *,
    out: Sequence[Path],
    summary: str,
    fps: float,
    timeout: float,
    model: str,
    revision: str | None,
    speaking: dict[str, Any],
) -> bool:
    """
    Watch a video and write reports of it.

    Args:
        out (`Sequence[Path]`): Files, in the format of each suffix.
        summary (`str`): What to ask at the end, or `""`.
        model, revision: The session's checkpoint, by name.
        speaking (`dict[str, Any]`): The session's options of when to speak, by name; `None` where not given.

    Returns:
        `bool`: Whether all were written.
    """
    from videollm_mod.video_opening_videollm_mod import without_secrets

    reading = new_report()
    live = {"fps": fps, "timeout": timeout, "reconnect": False, "report": reading, "shows_progress": False}
    # The name of a file may contain "#" and "?", and a password any sign.
    path = video if Path(video).is_file() else re.split("[?#]", without_secrets(video).partition("://")[2])[0]
    about, is_written = Report(printable(Path(path).name or without_secrets(video)), 0.0, []), True
    try:
        if end := see_video(session, read_frames(processor, video, session, **live), ctrl_c):
            about.notes = [f"Watching {end.rstrip('.')}."]
        about.moments = _moments(session)
        about.summary, notes = _summarize(session, about.moments, summary)
        about.notes += notes
    finally:
        # A fault of the program, such as a lack of memory, does not cost what was said before it.
        if session.num_frames > 0:
            about.moments, about.seconds = about.moments or _moments(session), video_end(video, session, fps)
            about.made_by = _made_by(session, model, revision, fps=fps, summary=summary, speaking=speaking)
            notice = foreign_notice(video, model)
            about.notes = [x for x in (notice[:1].upper() + notice[1:], *about.notes, str(reading)) if x]
            is_written = write_reports(out, about, video, timeout=timeout)
    if reading:
        typer.echo(reading, err=True)
    return is_written


def _moments(session: Any) -> list[Moment]:
    said = [event for event in session.events if event.role == "assistant" and event.text]
    return [Moment(event.time, printable(event.text)) for event in said]


def _summarize(session: Any, moments: Sequence[Moment], prompt: str) -> tuple[str, list[str]]:
    """Return a summary, and what a reader must know about it."""
    from videollm_mod.remembering_videollm_mod import within_context

    if not prompt.strip():
        return "", []
    session.streamer, session.max_new_tokens = None, max(session.max_new_tokens, MAX_SUMMARY_TOKENS)
    question, notes = prompt, []
    if session.num_remembered < session.num_frames:
        # Half of what the frames leave of the model's context is for new text.
        limits = within_context(session.model.config, session.processor.frame_text_tokens, session.max_frames)
        room = limits["max_text_tokens"] - MAX_SUMMARY_TOKENS
        question = with_notes(moments, prompt, room, lambda text: len(session.processor.tokenizer.tokenize(text)))
        frames = f"the last {session.num_remembered} of {session.num_frames} frames"
        others = "" if question == prompt else ", and reads what it said of the others"
        notes = [f"The model remembers {frames} when it writes the summary{others}."]
    text = printable(session.ask(question)[-1].text)
    typer.echo(f"\n{visible(text)}")
    return text, notes


def with_notes(moments: Sequence[Moment], prompt: str, room: int, count_tokens: Callable[[str], int]) -> str:
    """
    Put what was said before the question for a summary, for a model that has forgotten the frames.

    Args:
        moments (`Sequence[Moment]`): What was said.
        prompt (`str`): The question.
        room (`int`): Most tokens of the result. If there is more, every second note is left out, and so on.
        count_tokens (`Callable`): Counts the tokens of a text.
    """
    step = 1
    while step <= len(moments):
        notes = "\n".join(f"{stamp(moment.time, math.inf)} {moment.text}" for moment in moments[::step])
        text = f"Notes from the video:\n{notes}\n\n{prompt}"
        if count_tokens(text) <= room:
            return text
        step *= 2
    return prompt


def _made_by(
    session: Any, model: str, revision: str | None, *, fps: float, summary: str, speaking: dict[str, Any]
) -> dict[str, str]:
    """Return what made a report. A folder is named without its path, which says who made it and not what."""
    from videollm_mod.speaking_videollm_mod import DEFAULT_PROMPT

    asked = [event.text for event in session.events if event.role == "user"]
    # The question for the summary may have notes before it.
    asked = [f"“{summary if summary and text.endswith(summary) else text}”" for text in asked]
    prompt = speaking["prompt"]
    if prompt is None and session.speak != "learned":
        prompt = DEFAULT_PROMPT
    asked = [f"before each reply “{prompt}”", *asked] if prompt else asked
    name = describe_checkpoint(model)
    name = Path(name).resolve().name if Path(name).is_dir() else name
    return {
        "Checkpoint": name + (f" at {revision}" if revision else ""),
        "Speaks": _describe_speaking(session, speaking),
        "Asked": printable(", ".join(asked)) or "nothing",
        "Frames": f"{session.num_frames} at {fps:g} per second",
        "Made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Program": f"videollm-mod {importlib.metadata.version('videollm-mod')}",
    }


def _describe_speaking(session: Any, speaking: dict[str, Any]) -> str:
    """Return when the session spoke, such as "by the policy every (every 5, max words 20)"."""
    from videollm_mod.speaking_videollm_mod import EVERY

    if session.speak != "learned" and speaking["every"] is None:
        speaking = speaking | {"every": EVERY}
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in speaking.items()}
    given = [
        f"{name.replace('_', ' ')} {x}"
        for name, x in values.items()
        if x is not None and name not in ("speak", "prompt")
    ]
    if session.speak == "learned":
        threshold = session.interval_threshold
        threshold = session.model.config.interval_threshold if threshold is None else threshold
        rule = f"when the probability of silence is below {threshold:g}"
    else:
        rule = f"by the policy {session.speak}"
    return rule + (f" ({', '.join(given)})" if given else "")


def write_reports(paths: Sequence[Path], report: Report, video: str, *, timeout: float) -> bool:
    """
    Write a report in the format of each suffix. Key frames are read from the video again, for a page only.

    Returns:
        `bool`: Whether all were written. A file that cannot be written is named in a line, and stays as it is.
    """
    is_written = True
    for path in paths:
        try:
            match path.suffix.lower():
                case ".html":
                    write_text(path, to_html(report, video, timeout=timeout))
                case ".md":
                    write_text(path, to_markdown(report))
                case _:
                    write_text(path, to_json(report))
            typer.echo(f"wrote {path}", err=True)
        except (OSError, ValueError) as error:
            # The other files are still written.
            why = in_one_line(error)
            what = "" if why.startswith(f"'{path}' cannot be written: ") else f"'{path}' was not written: "
            typer.echo(f"error: {what}{why}", err=True)
            is_written = False
    return is_written


# -------------------------------------------------------------------------------------------------------------- frames


def pictures_at(
    video: str | Path, times: Sequence[float], *, side: int, timeout: float | None = 10.0
) -> list[Picture | None]:
    """
    Read the frames on screen at `times`, in seconds, in order. One frame is in memory at a time.

    Args:
        video (`str` or `Path`): A file or URL.
        times (`Sequence[float]`): Seconds that do not decrease.
        side (`int`): Most pixels of the longer side.
        timeout (`float`, *optional*, defaults to 10.0): See [`VideoReader`].

    Returns:
        `list[Picture | None]`: `None` where the video cannot be read again.
    """
    from videollm_mod.video_reading_videollm_mod import VideoReader

    found: list[Picture | None] = []
    try:
        with VideoReader(video, timeout=timeout) as reader:
            # A broadcast by HTTP is known when it is open, and shows other frames now.
            due = [] if reader.is_live else [Fraction(time).limit_denominator(1_000_000) for time in times]
            while due:
                found += _read_on(reader, due, side)
    except (OSError, ValueError):
        # The report without these frames is better than none.
        pass
    return found + [None] * (len(times) - len(found))


def _read_on(reader: Any, due: list[Fraction], side: int) -> Iterator[Picture]:
    """Take times from `due` and yield the frames on screen then, up to a gap over which seeking is faster."""
    shown, seek_from = None, Fraction(SEEK_FROM)
    with closing(reader.frames(float(due[0]))) as frames:
        for time, _, frame in frames:
            if shown is None:
                # The next seek, too, may land that far before its time. In some files all lead to the beginning.
                seek_from = max(seek_from, due[0] - time)
            while due[0] < time:
                yield _to_picture(reader.picture(frame if shown is None else shown), side)
                last = due.pop(0)
                if not due or due[0] - last >= seek_from:
                    return
            shown = frame
    while due:
        yield _to_picture(reader.picture(shown), side)
        due.pop(0)


def _to_picture(pixels: Any, side: int) -> Picture:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    return Picture(file.getvalue(), *image.size)


def _spread(seconds: float, count: int) -> list[float]:
    """Return times that divide a video into equal parts: the middle of each."""
    return [seconds * (index + 0.5) / count for index in range(count)]


# ------------------------------------------------------------------------------------------------------------- formats


def to_html(report: Report, video: str | Path, *, timeout: float | None = 10.0) -> str:
    """Return a report as one page that needs no other file, with key frames that are read from the video."""
    import jinja2

    silent = not report.moments
    times = _spread(report.seconds, NUM_SILENT) if silent else [moment.time for moment in report.moments]
    texts = [""] * len(times) if silent else [moment.text for moment in report.moments]
    pictures = pictures_at(video, times, side=KEY_FRAME_SIDE, timeout=timeout)
    strip = pictures_at(video, _spread(report.seconds, NUM_STRIP), side=STRIP_SIDE, timeout=timeout)
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        report=report,
        length=describe_length(report.seconds),
        silent=silent,
        moments=[Moment(*parts) for parts in zip(times, texts, pictures, strict=True)],
        strip=[picture for picture in strip if picture is not None],
        marks=[] if silent else place_marks(times, report.seconds),
        ticks=place_ticks(report.seconds),
        label=lambda seconds: stamp(seconds, math.inf),
        stamp=lambda seconds: stamp(seconds, report.seconds),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def to_markdown(report: Report) -> str:
    """Return a report as Markdown, without key frames."""
    parts = [f"# {_plain(report.name)}", *(f"> **Note:** {_plain(note)}" for note in report.notes)]
    parts += [_plain(report.summary)] if report.summary else []
    moments = [f"- **{stamp(moment.time, report.seconds)}** {_plain(moment.text)}" for moment in report.moments]
    parts += ["## What happened when", "\n".join(moments) or "The model said nothing."]
    parts += ["## How this was made", "\n".join(f"- {name}: {_plain(x)}" for name, x in report.made_by.items())]
    return "\n\n".join(parts) + "\n"


def to_json(report: Report) -> str:
    """Return a report as JSON, with times in seconds and without key frames."""
    moments = [{"time": moment.time, "text": moment.text} for moment in report.moments]
    said = {"video": report.name, "seconds": round(report.seconds, 3), "summary": report.summary}
    return (
        json.dumps(
            said | {"moments": moments, "made_by": report.made_by, "notes": report.notes}, ensure_ascii=False, indent=2
        )
        + "\n"
    )


def stamp(seconds: float, length: float) -> str:
    """Return a time such as 4:05 or 1:04:05, and 0:05.5 in a video of less than two minutes."""
    tenths = f".{math.floor(seconds * 10 + 1e-6) % 10}" if length < 120 else ""
    minutes, rest = divmod(math.floor(seconds + 1e-6), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}:{minutes:02d}" if hours else f"{minutes}") + f":{rest:02d}{tenths}"


def describe_length(seconds: float) -> str:
    """Return a length such as "8.5 seconds", "4 min 5 s" or "1 h 4 min"."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


@dataclass(frozen=True)
class Mark:
    """A mark of the timeline. Its numbers are percent of the timeline's width."""

    moment: int  # index of the moment that it leads to
    at: float
    begin: float  # from here to `end`, no mark is nearer
    end: float


def place_marks(times: Sequence[float], seconds: float) -> list[Mark]:
    """Place one mark for each different time. Each can be clicked wherever no other is nearer."""
    first = {time: index for index, time in reversed(list(enumerate(times)))}
    at = [100 * min(time / max(seconds, 1e-6), 1) for time in sorted(first)]
    edges = [0.0, *((left + right) / 2 for left, right in zip(at, at[1:], strict=False)), 100.0]
    return [
        Mark(first[time], *(round(x, 3) for x in (at[i], edges[i], edges[i + 1])))
        for i, time in enumerate(sorted(first))
    ]


def place_ticks(seconds: float) -> list[tuple[float, float]]:
    """Return times that label a timeline, at a round distance, and their places in percent."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200]
    step = next((step for step in steps if seconds / step <= 6), math.ceil(seconds / 6 / 3600) * 3600)
    # A label near the end would be cut off.
    times = [step * index for index in range(7) if step * index <= 0.97 * seconds]
    return [(float(time), round(100 * time / max(seconds, 1e-6), 3)) for time in times]


def _hash(text: str) -> str:
    """Return a hash by which a page allows one script or style and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(text.split()))
