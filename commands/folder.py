# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod narrate FOLDER`: subtitles for all videos of a folder, several videos at once in one engine."""

import errno
import json
import math
import mimetypes
import os
import sys
import threading
import time as clock
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from videollm_mod.console import counted, visible

import typer

from videollm_mod.commands.watching import first_query, foreign_notice, load
from videollm_mod.data_paths import VIDEO_FORMATS
from videollm_mod.outputs import FullDiskError, naming_full_disk, write_text
from videollm_mod.space.checkpoint_faults import in_one_line
from videollm_mod.space.uploads import demux


# Formats of videos; the last are those of security cameras and of television. FFmpeg opens as video also photos, text
# drawn as pictures, lists of other files, and much whose bytes look like some format by chance.
_FORMATS = {name for name in VIDEO_FORMATS.split(",") if not name.endswith("_pipe")} | {"dhav", "gxf", "mjpeg", "wtv"}
# Brands of an mp4 that is a photo.
_PHOTOS = {"avif", "avis", "heic", "heix", "mif1"}
# Where the sync byte of MPEG-TS stands. TypeScript has these suffixes too.
_SYNC = {".ts": 0, ".mts": 4}
# Names of videos that Python does not know on every machine.
_VIDEO_NAMES = {".mkv", ".webm", ".ts", ".mts", ".m2ts", ".flv", ".mxf", ".vob", ".ogv", ".wmv", ".3gp", ".m4v"}
# Frames of a video that wait for the engine, at the model's size.
_MAX_WAITING = 16


@dataclass
class Video:
    """
    A video of the folder.

    Args:
        path (`Path`): The video.
        name (`str`): Its path in the folder.
        srt (`Path`): Its subtitles.
        seconds (`float`): Its length.
        fault (`str`): Why it cannot be read, or `""`.
        formats (`str`, *optional*): Container formats in which it may be opened; see [`VideoReader`].
    """

    path: Path
    name: str
    srt: Path
    seconds: float = 0.0
    fault: str = ""
    formats: str | None = None


@dataclass
class Narrated:
    """What became of a video: its events, or why there are none. With Ray it has a row in `rows`, and no subtitles."""

    video: Video
    events: list[Any] = field(default_factory=list)
    num_frames: int = 0
    reading: Any = None
    fault: str = ""
    rows: Path | None = None

    def to_srt(self) -> str:
        """Return it as SubRip subtitles."""
        from videollm_mod.space.captions import to_srt

        return to_srt(self.events, end=self.video.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        if self.fault:
            return {"video": self.video.name, "error": self.fault}
        events = [{"time": e.time, "text": e.text} for e in self.events if e.role == "assistant"]
        about = {"seconds": round(self.video.seconds, 3), "frames": self.num_frames, "events": events}
        place = {"srt": str(self.video.srt)} if self.rows is None else {}
        return {"video": self.video.name, **place, **about, "reading": self.reading.to_dict()}

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __str__(self) -> str:
        if self.fault:
            return f"error: {self.fault if str(self.video.path) in self.fault else f'{self.video.name}: {self.fault}'}"
        count = sum(event.role == "assistant" and bool(event.text) for event in self.events)
        captions = f"{count} caption{'' if count == 1 else 's'}"
        place = self.rows or self.video.srt
        return f"{self.video.name}: {captions} in {place}" + (f". {self.reading}" if self.reading else "")


# ------------------------------------------------------------------------------------------------- which are narrated


def find_videos(folder: Path, out: Path | None, unread: list[str] | None = None) -> Iterator[Video]:
    """
    Yield the videos of a folder and its folders in order, and files that should be videos but cannot be read.

    A file is a video if it opens as one. Hidden files and folders are left out. Links to folders are followed after
    all other folders, and no folder is read twice. A folder that cannot be read is named in a line.

    Args:
        folder (`Path`): The folder.
        out (`Path`, *optional*): Folder for subtitles. Without it they lie beside each video.
        unread (`list[str]`, *optional*): Gets the folders that cannot be read.
    """
    for parent, names in _walk(folder, [] if unread is None else unread):
        found = []
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            is_video, fault = _look_at(path)
            if is_video or fault:
                found.append((path, fault))
        names = _name_subtitles([path for path, _ in found])
        for path, fault in found:
            beside = path.with_name(names[path])
            srt = beside if out is None else out / beside.relative_to(folder)
            yield Video(path, str(path.relative_to(folder)), srt, fault=fault)


def _walk(folder: Path, unread: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and the names of its files."""

    def on_error(error: OSError) -> None:
        unread.append(error.filename)
        line = f"error: the folder '{error.filename}' cannot be read: {error.strerror}"
        typer.echo(visible(" ".join(line.splitlines())), err=True)

    seen, left = set(), [str(folder)]
    while left:
        for parent, folders, names in os.walk(left.pop(0), onerror=on_error):
            real = os.path.realpath(parent)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            left += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            if real not in seen:
                seen.add(real)
                yield parent, names


def _name_subtitles(videos: Sequence[Path]) -> dict[Path, str]:
    """Return a name for the subtitles of each video of a folder: a.srt, or a.mp4.srt if another video has that one."""
    # In "1. Introduction" without a suffix, the dot ends a number.
    has_suffix = {path: len(path.suffix) <= 6 and " " not in path.suffix for path in videos}
    names = {path: f"{path.stem if has_suffix[path] else path.name}.srt" for path in videos}
    complete = {path: f"{path.name}.srt" for path in videos}
    while True:
        count = Counter(name.casefold() for name in names.values())
        shared = [path for path in videos if count[names[path].casefold()] > 1 and names[path] != complete[path]]
        if not shared:
            return names
        # A complete name may be the short one of another video: a.mov.srt of a.mov and of a.mov.mp4.
        names |= {path: complete[path] for path in shared}


def _look_at(path: Path) -> tuple[bool, str]:
    """Return whether a file is a video, and what is wrong with one that should be."""
    from videollm_mod.video_reading_videollm_mod import VideoReader

    guess = mimetypes.guess_type(path.name)[0] or ""
    suffix = path.suffix.lower()
    is_named_so = guess.startswith("video/") or suffix in _VIDEO_NAMES
    if not path.is_file():
        return False, ""
    try:
        with VideoReader(path) as reader:
            kind, brand = reader.container.format.name, reader.container.metadata.get("major_brand", "")
            is_photo = brand.strip() in _PHOTOS or (kind in ("apng", "gif") and _has_one_picture(reader))
    except (OSError, ValueError) as error:
        return False, in_one_line(error) if is_named_so and _may_be_video(path, _SYNC.get(suffix)) else ""
    return not is_photo and _FORMATS.issuperset(kind.split(",")), ""


def _has_one_picture(reader: Any) -> bool:
    packets = (packet for packet in demux(reader.container, reader.stream) if packet.size)
    return len(list(islice(packets, 2))) == 1


def _may_be_video(path: Path, sync: int | None) -> bool:
    """Return whether a file that cannot be opened may be a video: False for TypeScript."""
    try:
        with open(path, "rb") as file:
            return sync is None or file.read(5)[sync : sync + 1] == b"G"
    except OSError:
        return True


def check_folder(folder: str, out: Path | None, options: dict[str, Any]) -> None:
    """
    Check what can be checked before any work, and make the folder for subtitles.

    Args:
        options (`dict[str, Any]`): Options that a folder does not have, by name, `None` where they are not given.

    Raises:
        `ValueError`: If such an option is given, or the folder for subtitles cannot be made or written to.
    """
    from videollm_mod.video_opening_videollm_mod import without_secrets

    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        shown, kind = without_secrets(folder), "folder" if Path(folder).is_dir() else "data set"
        raise ValueError(f"{given[0]} is for one video, and '{shown}' is a {kind}: use --out, a folder for subtitles.")
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out cannot make the folder '{out}': {error.strerror}.") from None
    if out is not None:
        check_places([out])


def check_file(video: str, **options: Any) -> None:
    """Raise `ValueError` if an option of a folder, by name, is given for one video."""
    from videollm_mod.video_opening_videollm_mod import without_secrets

    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        shown, instead = without_secrets(video), ": use --srt" if given[0] == "--out" else ""
        raise ValueError(f"{given[0]} is for a folder or data set of videos, and '{shown}' is none{instead}.")


def check_ray(out: Path | None) -> None:
    """Raise an error with advice if Ray is missing, or a folder for its files."""
    if out is None:
        raise ValueError("--ray writes Parquet files: choose a folder for them with --out.")
    if find_spec("ray") is None:
        raise ImportError('--ray needs Ray: run `pip install -e ".[ray]"` in the checkout.')


def measure(videos: Sequence[Video]) -> None:
    """Set the lengths of videos, and the faults of those that have no frame."""
    from videollm_mod.video_reading_videollm_mod import VideoReader

    for video in videos:
        try:
            with VideoReader(video.path, formats=video.formats) as reader:
                video.seconds = reader.seconds
        except (OSError, ValueError) as error:
            video.fault = in_one_line(error)


def check_places(folders: Iterable[Path]) -> None:
    """Raise `ValueError` if nothing can be written to one of the folders, or to the nearest above that is there."""
    paths = (folder.absolute() for folder in folders)
    for place in dict.fromkeys(next(x for x in (path, *path.parents) if os.path.isdir(x)) for path in paths):
        try:
            with NamedTemporaryFile(dir=place, prefix=".") as file:
                file.write(bytes(4096))
        except OSError as error:
            advice = "Choose another folder with --out."
            raise ValueError(f"Nothing can be written to '{place}': {error.strerror}. {advice}") from None


# --------------------------------------------------------------------------------------------------------- the engine


def choose_streams(model: Any, room: tuple[int, int], num_videos: int) -> int:
    """
    Return how many videos to narrate at once: 4 on a GPU or 8 cores, else 2, as far as half of the memory goes.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        room (`tuple[int, int]`): Frames and text tokens that each remembers.
        num_videos (`int`): Videos that are left.
    """
    import torch

    streams = 4 if model.device.type == "cuda" or (os.cpu_count() or 1) >= 8 else 2
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            free = math.inf  # not every system says
    each = model.estimate_cost(*room).cache_bytes
    return max(1, min(streams, num_videos, int(min(free / 2 / each, streams))))


def open_engine(
    name: str,
    revision: str | None,
    videos: Sequence[Video],
    *,
    streams: int | None,
    fps: float,
    compile: bool | None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """
    Load a checkpoint. Return an engine with memory for several of the videos, and the options of its streams. Without
    `videos` it has memory for videos of any length.
    """
    from videollm_mod.serving import StreamingEngine

    processor, model, options = load(name, revision, **options)
    # A stream that sees all frames of its video forgets none, and needs no room for more.
    longest = [math.ceil(max(video.seconds for video in videos) * fps) + 2] if videos else []
    most_frames, most_streams = min([options.pop("max_frames"), *longest]), len(videos) or sys.maxsize
    limits = {"max_frames": most_frames, "max_text_tokens": options.pop("max_text_tokens")}
    streams = choose_streams(model, tuple(limits.values()), most_streams) if streams is None else streams
    limits |= {"max_streams": min(streams, most_streams), "cache_dtype": options.pop("cache_dtype")}
    return StreamingEngine(model, processor, compile_steps=bool(compile), **limits), options


class Folder:
    """
    The work on a folder: threads that read videos into an engine's streams, and save what was said.

    Args:
        engine ([`StreamingEngine`]): The engine, which runs in its thread.
        query (`str`, *optional*), fps (`float`), options: See [`narrate_folder`].
        stop (`threading.Event`): Set to end the work.
        progress: Its `update` is called with the number of new frames.
        save (`Callable`): Called with each [`Narrated`].
    """

    def __init__(
        self,
        engine: Any,
        query: str | None,
        *,
        fps: float,
        stop: threading.Event,
        progress: Any,
        save: Callable[[Narrated], None],
        **options: Any,
    ) -> None:
        self.engine, self.query, self.fps, self.options = engine, query, fps, options
        self.stop, self.progress, self.save = stop, progress, save

    def narrate(self, video: Video) -> Narrated | None:
        """Narrate a video and save what was said. Return `None` if the work was stopped before the end."""
        from videollm_mod.video_reading_videollm_mod import ReadingReport

        if self.stop.is_set():
            return None
        done = Narrated(video, reading=ReadingReport())
        try:
            self._watch(video, done)
            if self.stop.is_set():
                return None
            self._save(done)
        except Exception as error:
            # One faulty video does not end the others. A fault of the engine or of the disk ends them all.
            if self.stop.is_set() or not self.engine.is_running:
                self.stop.set()
                raise
            # An error of a stream has as its cause what was wrong with the video.
            cause = error.__cause__ if isinstance(error, RuntimeError) else None
            done.fault = in_one_line(cause or error)
        return done

    def _save(self, done: Narrated) -> None:
        try:
            self.save(done)
        except OSError as error:
            # Those of the other videos could not be saved either.
            if isinstance(error, (FullDiskError, PermissionError)) or error.errno == errno.EROFS:
                self.stop.set()
            if error.strerror is None:
                raise
            raise ValueError(f"'{done.video.srt}' cannot be written: {error.strerror}.") from error

    def _watch(self, video: Video, done: Narrated) -> None:
        from videollm_mod.video_reading_videollm_mod import VideoReader, read_video

        stream = self.engine.open(fps=self.fps, when_behind="block", max_waiting=_MAX_WAITING, **self.options)
        try:
            if query := first_query(stream.session, self.query):
                stream.ask(query, reply_now=False)
            reader = VideoReader(video.path, formats=video.formats, report=done.reading)
            with closing(read_video(reader, fps=self.fps)) as frames:
                for time, frame in frames:
                    if self.stop.is_set():
                        break
                    stream.push(frame, time=time)
                    self.progress.update(1)
        finally:
            stream.close()
            # The next video may have the stream's memory when its events have ended.
            done.events = list(stream)
        done.num_frames = stream.session.num_frames


def write_srt(done: Narrated) -> None:
    """Write the subtitles of a video to their place."""
    with naming_full_disk(done.video.srt):
        done.video.srt.parent.mkdir(parents=True, exist_ok=True)
    write_text(done.video.srt, done.to_srt())


def narrate_folder(
    folder: str,
    name: str,
    revision: str | None,
    *,
    out: Path | None,
    streams: int | None,
    query: str | None,
    fps: float,
    as_json: bool,
    **options: Any,
) -> int:
    """
    Narrate the videos of a folder that have no subtitles yet, several at once.

    Args:
        folder (`str`): The folder.
        name, revision: The checkpoint; see [`load`], also for `options`.
        out, query, fps, as_json: See `narrate`.
        streams (`int`, *optional*): Videos at once; see [`choose_streams`].

    Returns:
        `int`: The exit code: 0 if all were narrated, 1 if some failed or a folder could not be read, and 130 after
        Ctrl+C.

    Raises:
        `ValueError`: If the folder has no video, or subtitles cannot be written.
    """
    unread: list[str] = []
    videos = list(find_videos(Path(folder), out, unread))
    if not videos:
        raise ValueError(f"There is no video in '{folder}'.")
    left = [video for video in videos if not os.path.exists(video.srt)]
    check_places(video.srt.parent for video in left)
    given = {"streams": streams, "query": query, "fps": fps, **options}
    code = narrate_left(videos, left, "subtitles", lambda good: _run(good, name, revision, **given), as_json=as_json)
    return code or int(bool(unread))


def narrate_left(
    videos: Sequence[Video],
    left: Sequence[Video],
    have: str,
    work: Callable[[Sequence[Video]], Iterator[Narrated]],
    *,
    as_json: bool,
) -> int:
    """
    Narrate the videos that are left, and print what became of each.

    Args:
        videos (`Sequence[Video]`): All videos.
        left (`Sequence[Video]`): Those of them that are left.
        have (`str`): What the others have already, such as `"subtitles"`.
        work (`Callable`): Called with the videos that can be read. It returns a generator of what becomes of each.
        as_json (`bool`): See `narrate`.

    Returns:
        `int`: The exit code; see [`narrate_folder`].
    """
    measure(left)
    if len(left) < len(videos):
        typer.echo(f"{len(videos) - len(left)} of {len(videos)} videos have {have} already", err=True)
    results: list[Narrated] = []
    faulty = [Narrated(video, fault=video.fault) for video in left if video.fault]
    begin = clock.monotonic()
    try:
        with closing(work([video for video in left if not video.fault])) as narrated:
            for result in chain(faulty, narrated):
                results.append(result)
                print_result(result, as_json)
    except KeyboardInterrupt:
        count = len(left) - len(results)
        typer.echo(f"\nstopped with {count} of {len(videos)} videos left: the same command goes on", err=True)
        return 130
    if results:
        print_end(results, clock.monotonic() - begin)
    return int(any(result.fault for result in results))


def _run(
    videos: Sequence[Video],
    name: str,
    revision: str | None,
    *,
    streams: int | None,
    query: str | None,
    fps: float,
    compile: bool | None,
    **options: Any,
) -> Iterator[Narrated]:
    """Yield what became of each video as it ends."""
    from tqdm import tqdm

    if not videos:
        return
    engine, options = open_engine(name, revision, videos, streams=streams, fps=fps, compile=compile, **options)
    if notice := next(filter(None, (foreign_notice(str(video.path), name) for video in videos)), ""):
        typer.secho(f"Note: {notice}", err=True, fg="yellow")
    total, stop = sum(math.ceil(video.seconds * fps) for video in videos), threading.Event()
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit=" frames", file=sys.stderr, disable=None))
        threads = stack.enter_context(ThreadPoolExecutor(engine.max_streams, thread_name_prefix="narrate_folder"))
        stack.enter_context(engine)
        # However this ends, threads that still read must end too.
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        stack.callback(stop.set)
        work = Folder(engine, query, fps=fps, stop=stop, progress=bar, save=write_srt, **options)
        left: set[Future] = {threads.submit(work.narrate, video) for video in videos}
        while left:
            bar.set_description(f"{len(videos) - len(left)} of {len(videos)} videos")
            finished, left = wait(left, return_when=FIRST_COMPLETED)
            for done in finished:
                if (result := done.result()) is not None:
                    with bar.external_write_mode():
                        yield result


def print_result(result: Narrated, as_json: bool) -> None:
    # A name may hold line breaks and what controls a terminal.
    line = visible(" ".join(str(result).splitlines()))
    typer.echo(result.to_json() if as_json else line, err=bool(result.fault) and not as_json)


def print_end(results: Sequence[Narrated], seconds: float) -> None:
    failed, frames = sum(bool(result.fault) for result in results), sum(result.num_frames for result in results)
    speed = f"{counted(frames, 'frame')} in {seconds:.1f} s, {frames / max(seconds, 1e-6):.1f} frames/s"
    faulty = f", {failed} failed" if failed else ""
    typer.echo(f"{len(results) - failed} narrated{faulty}; {speed}", err=True)
