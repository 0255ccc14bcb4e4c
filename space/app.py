# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The page: a model watches a camera or a video live, narrates it and answers questions, and shows its routing.

```bash
python space/app.py                             # the embedded checkpoint
python space/app.py --model FOLDER_OR_HUB_ID
```

This file connects the page with its streams. `page.py` lays the page out, `page.js` runs in the browser, `viewer.py`
holds a person's stream, `drawing.py` draws it, and `captions.py` exports it, with `caption_drawing.py` and
`video_writing.py` for video. `uploads.py` limits files, and `checkpoint_faults.py` explains broken checkpoints.
"""

import argparse
import json
import math
import os
import sys
import time as clock
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import console

import captions
import drawing
import gradio as gr
import page
from checkpoint_faults import in_one_line, load_config, named_faults
from checkpoint_names import check_checkpoint
from command_line import CommandLineParser
from gradio import processing_utils
from gradio.utils import get_upload_folder
from inputs import call, check_fps, check_number, check_text, read_frame, refusal
from loading import generated_world, load_checkpoint, load_model
from room import Room, RoomIsFull, address_of
from uploads import FORMATS, Limits
from viewer import MOST_TYPED, Viewer, compare


HERE = Path(__file__).resolve().parent
MOST_FRAMES = 16  # As in page.js, which drops the oldest frames beyond it.
RENEWAL = 60.0  # Least seconds between two renewals of an upload.


def embedded_checkpoint() -> Path | None:
    """Return the checkpoint of the checkout around this folder, else the one that a published Space brings."""
    for folder in (HERE.parent, HERE / "checkpoint"):
        config = folder / "config.json"
        if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "videollm_mod":
            return folder
    return None


def sample_videos() -> list[Path]:
    """Return the samples of the checkout, else those of a published Space. The one that is told best is the first."""
    found = [*(HERE.parent / "samples").glob("*.mp4")] or [*(HERE / "samples").glob("*.mp4")]
    return sorted(found, key=lambda path: (path.stem != "streamworld", path.name))


class App:
    """
    The page of a model: its streams and what its buttons do.

    Args:
        name (`str`): Checkpoint: a folder or a Hub id.
        seats (`int`, *optional*, defaults to 8): Largest number of people at once.
        seats_per_address (`int`, *optional*, defaults to 4): Largest number of them from one network address.
        proxies (`int`, *optional*, defaults to 0): Number of own proxies before the page, which tell the addresses of
            people. With `None` addresses are unknown, and `seats_per_address` has no effect.
        limits ([`Limits`], *optional*): Limits on videos.
    """

    def __init__(
        self,
        name: str,
        *,
        seats: int = 8,
        seats_per_address: int = 4,
        proxies: int | None = 0,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.limits, self.proxies = name, limits or Limits(), proxies
        load_config(name)
        with named_faults(name):
            self.processor, self.model = load_checkpoint(name)
        self._full: Any = None
        self._compared: list[str] = []
        self.room = Room(seats, per_address=seats_per_address, on_leave=self._clean_up)
        # Each person may have a question that waits for the frames before it.
        self._pool = ThreadPoolExecutor(max(2, 2 * seats), thread_name_prefix="viewer")
        self.is_toy = Path(name).resolve() == embedded_checkpoint()
        self.samples = {path.stem: str(path) for path in sample_videos()}

    # --------------------------------------------------------------------------------------------------- handlers

    def open_video(
        self,
        video: str | None,
        fps: float,
        interval_threshold: float,
        query: str,
        request: gr.Request,
        speak: str | None = None,
        every: float = 2.0,
        speak_threshold: float | None = None,
        prompt: str | None = None,
    ) -> Any:
        """Start a stream on a file, and let the browser play it."""
        if not isinstance(video, (str, Path)):
            raise refusal("Choose a video first.")
        call(self.limits.check, video, self.processor.open_video)
        viewer = self._viewer(fps, interval_threshold, query, speak, every, speak_threshold, prompt)
        call(viewer.begin, video=video)
        self._enter(viewer, request)
        self._name_world(video)
        return f"gradio_api/file={quote(video)}", gr.Timer(active=True), *self._show(viewer, drawing.SHARE)

    def open_camera(
        self,
        fps: float,
        interval_threshold: float,
        query: str,
        granted: bool,
        request: gr.Request,
        speak: str | None = None,
        every: float = 2.0,
        speak_threshold: float | None = None,
        prompt: str | None = None,
    ) -> Any:
        """Start a stream on frames that the browser will send, once the person has granted the camera."""
        if not granted:
            return [gr.skip()] * 8
        viewer = self._viewer(fps, interval_threshold, query, speak, every, speak_threshold, prompt)
        self._enter(viewer, request)
        return gr.Timer(active=True), *self._show(viewer, drawing.SHARE)

    def watch(
        self,
        frames: list[dict[str, Any]],
        dropped: int,
        until: float | None,
        jump: float | None,
        shown: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """
        Watch what has arrived since the last call, and show words of replies as they come.

        For a camera these are at most 16 frames, each with a `time` in seconds and an `image`, a data URL. For a file
        they are the frames up to second `until`, after a jump those from second `jump` on.
        """
        viewer = self._find(request)
        if viewer is None:
            gr.Warning("Your stream has ended: the connection broke or the seat went to another person.")
            yield gr.Timer(active=False), *[gr.skip()] * 6, {"over": True}
            return
        self._keep(viewer)
        frames = [] if frames is None else frames
        if not isinstance(frames, list) or len(frames) > MOST_FRAMES:
            raise refusal(f"A call accepts a list of at most {MOST_FRAMES} frames.")
        if viewer.is_busy:
            # The model is still speaking. A file waits for it, a camera does not. The browser tells a jump once only.
            viewer.dropped += len(frames) + int(check_number("dropped", dropped or 0, most=1e9))
            if jump is not None:
                viewer.jump = check_number("jump", jump)
            yield [gr.skip()] * 8
            return
        had_ended = viewer.ended
        watched = viewer.while_speaking(partial(self._watch, viewer, frames, dropped, until, jump, shown), self._pool)
        showing = yield from self._words(viewer, watched)
        if viewer.ended and not had_ended and viewer.report:
            gr.Info(str(viewer.report))
        if viewer.falls_behind():
            gr.Info(
                f"The model is slower than the camera: {viewer.dropped} frames were dropped. A lower fps may help."
            )
        yield gr.skip(), *showing

    def _watch(
        self, viewer: Viewer, frames: list[dict[str, Any]], dropped: Any, until: Any, jump: Any, shown: str
    ) -> Any:
        """Watch frames, and return what has changed."""
        before = len(viewer.events), viewer.session, viewer.session.num_frames
        if viewer.video is None:
            dropped = int(check_number("dropped", dropped or 0, most=1e9))
            call(viewer.see, map(read_frame, frames), dropped)
        elif until is not None:
            jump = viewer.jump if jump is None else check_number("jump", jump)
            if jump is not None:
                viewer.jump = None
                call(viewer.go_to, jump)
            call(viewer.watch_until, check_number("until", until))
        after = len(viewer.events), viewer.session, viewer.session.num_frames
        if after == before:
            return [gr.skip()] * 7
        showing = list(self._show(viewer, shown))
        if after[:2] == before[:2]:
            # Do not send unchanged text: a screen reader would read it again.
            showing[0] = showing[1] = gr.skip()
        return showing

    def ask(self, text: str, when: str, shown: str, request: gr.Request) -> Iterator[Any]:
        """Ask a question, to be answered now or when the event happens. Show words of the answer as they come."""
        viewer, text = self._watching(request), check_text("question", text)
        if not text.strip():
            yield "", *[gr.skip()] * 7
            return
        if len(text) > MOST_TYPED:
            raise refusal(f"A question may have at most {MOST_TYPED} characters.")

        def ask() -> Any:
            call(viewer.ask, text, now=when == "now")
            return self._show(viewer, shown)

        # The box is emptied at once, and left alone while the person types the next question.
        yield "", *[gr.skip()] * 7
        showing = yield from self._words(viewer, viewer.while_speaking(ask, self._pool))
        yield gr.skip(), *showing

    def _words(self, viewer: Viewer, speaking: Iterator[None]) -> Generator[Any, None, Any]:
        """Yield the outputs of a handler at each new word. Return what its work returned."""
        while True:
            try:
                next(speaking)
            except StopIteration as stop:
                return stop.value
            yield gr.skip(), drawing.chat(viewer), drawing.caption(viewer), *[gr.skip()] * 5

    def reset(
        self,
        fps: float,
        interval_threshold: float,
        query: str,
        until: float | None,
        request: gr.Request,
        speak: str | None = None,
        every: float = 2.0,
        speak_threshold: float | None = None,
        prompt: str | None = None,
    ) -> Any:
        """Start a new stream at this point of the same video or camera, with these settings."""
        viewer = self._watching(request)
        settings = self._settings(fps, interval_threshold, query, speak, every, speak_threshold, prompt)
        start = check_number("until", until or 0.0)
        with viewer.lock:
            before = {name: getattr(viewer, name) for name in settings}
            vars(viewer).update(settings)
            try:
                call(viewer.begin, video=viewer.video, start=start)
            except gr.Error:
                vars(viewer).update(before)
                raise
        return gr.Timer(active=True), *self._show(viewer, drawing.SHARE)

    def set_interval_threshold(self, interval_threshold: float, request: gr.Request) -> Any:
        """Set the threshold from the next frame on, and show it at once."""
        viewer = self._find(request)
        if viewer is None:
            return gr.skip()
        viewer.set_interval_threshold(check_number("interval_threshold", interval_threshold, most=1))
        return drawing.silence_plot(viewer)

    def choose_overlay(self, shown: str, request: gr.Request) -> str:
        """Draw another overlay over the last frame."""
        viewer = self._find(request)
        return "" if viewer is None else drawing.overlay(viewer, shown)

    def export(self, kind: str, request: gr.Request) -> str:
        """Write what was said so far to a file."""
        viewer = self._watching(request)
        if kind not in list(page.FORMATS):
            raise refusal(f"A format is one of {', '.join(page.FORMATS)}, not {kind!r:.40}.")
        if not viewer.events:
            raise refusal("Nothing has been said yet.")
        suffix = page.FORMATS[kind]
        out = viewer.folder / f"narration.{suffix}"
        if suffix == "mp4":
            if viewer.video is None:
                raise refusal("The page does not keep the camera's frames. Captions can be burnt into files only.")
            if call(self.limits.check, viewer.video, self.processor.open_video) > self.limits.burnt:
                raise refusal(f"Captions can be burnt into videos of at most {self.limits.burnt / 60:.0f} minutes.")
            checked = {"formats": FORMATS, "max_pixels": self.limits.pixels}
            open_video = partial(self.processor.open_video, **checked)
            options = {"open_video": open_video, "say": gr.Warning, "most_pixels": self.limits.burnt_pixels}
            call(captions.burn_in, viewer.video, viewer.events, out, **options)
        elif suffix == "jsonl":
            out.write_text(captions.to_jsonl(viewer.events), encoding="utf-8")
        else:
            write = {"srt": captions.to_srt, "vtt": captions.to_vtt}[suffix]
            out.write_text(write(viewer.events, end=call(getattr, viewer, "end")), encoding="utf-8")
        return str(out)

    def compare(self, video: str | None, fps: float) -> Iterator[Any]:
        """Show the same video, frame by frame and as fast as possible, to the routed model and at full compute."""
        video, fps = video or next(iter(self.samples.values()), None), check_fps(fps)
        if not isinstance(video, (str, Path)):
            raise refusal("Choose a video first.")
        call(self.limits.check, video, self.processor.open_video)
        if self._full is None:
            self._full = load_model(self.name, mod_keep_ratio=1.0)
        last, viewers, pair = clock.perf_counter(), [], (self.model, self._full)
        self._compared.append(video)
        try:
            for viewers in compare(pair, self.processor, video, fps=fps, end=self.limits.compared):
                if clock.perf_counter() - last > page.TICK:
                    last = clock.perf_counter()
                    yield self._side_by_side(viewers)
            yield self._side_by_side(viewers)
            if viewers and viewers[0].report:
                gr.Info(str(viewers[0].report))
        except ValueError as error:
            raise refusal(str(error)) from None
        finally:
            self._compared.remove(video)
            for viewer in viewers:
                viewer.close()

    def settings(
        self,
        fps: float,
        interval_threshold: float,
        query: str,
        speak: str | None = None,
        every: float = 2.0,
        speak_threshold: float | None = None,
        prompt: str | None = None,
    ) -> str:
        """Return the part of a link that restores these settings."""
        settings = {"fps": fps, "interval_threshold": interval_threshold, "query": query or ""}
        settings |= {} if speak is None else {"speak": speak}
        settings |= {"every": every} if speak in page.NEEDS_EVERY else {}
        settings |= {"speak_threshold": speak_threshold} if speak in list(page.THRESHOLDS) else {}
        settings |= {"prompt": prompt} if prompt and speak in page.NEEDS_EVERY else {}
        return "?" + urlencode(settings, errors="replace")

    def restore(self, request: gr.Request) -> Any:
        """Return the settings of a link."""
        asked, found = request.query_params, {}
        limits = {"fps": page.FPS, "interval_threshold": (0, 1), "every": page.EVERY, "speak_threshold": (0, 1)}
        for name, (least, most) in limits.items():
            try:
                found[name] = min(max(check_number(name, asked[name], least=-math.inf, most=math.inf), least), most)
            except (KeyError, gr.Error):
                found[name] = gr.skip()
        found |= {name: asked[name][:MOST_TYPED] if name in asked else gr.skip() for name in ("query", "prompt")}
        found["speak"] = asked["speak"] if asked.get("speak") in page.POLICIES.values() else gr.skip()
        names = ("fps", "interval_threshold", "query", "speak", "every", "speak_threshold", "prompt")
        return [found[name] for name in names]

    def leave(self, request: gr.Request) -> None:
        """Free the seat of a page that was closed."""
        self.room.leave(request.session_hash)

    # ---------------------------------------------------------------------------------------------------- helpers

    def _viewer(self, *settings: Any) -> Viewer:
        return call(Viewer, self.model, self.processor, **self._settings(*settings))

    def _settings(
        self, fps: Any, interval_threshold: Any, query: Any, speak: Any, every: Any, speak_threshold: Any, prompt: Any
    ) -> dict[str, Any]:
        """Return the options of a [`Viewer`]."""
        speak = speak or self.model.config.speak
        if speak not in page.POLICIES.values():
            raise refusal(f"`speak` is one of {', '.join(page.POLICIES.values())}, not {speak!r:.40}.")
        speaking = {"speak": speak}
        if speak in page.NEEDS_EVERY:
            speaking["every"] = check_number("every", every, least=page.EVERY[0], most=page.EVERY[1])
        if speak in page.THRESHOLDS and speak_threshold is not None:
            speaking["speak_threshold"] = check_number("speak_threshold", speak_threshold, most=1)
        if speak in page.NEEDS_EVERY and check_text("prompt", prompt).strip():
            speaking["prompt"] = prompt.strip()[:MOST_TYPED]
        return {
            "fps": check_fps(fps),
            "interval_threshold": check_number("interval_threshold", interval_threshold, most=1),
            "query": check_text("query", query),
            "speaking": speaking,
        }

    def _enter(self, viewer: Viewer, request: gr.Request) -> None:
        if not request.session_hash:
            raise refusal("A stream belongs to a session. Use the page, or `gradio_client`.")
        try:
            self.room.enter(request.session_hash, viewer, address=address_of(request, self.proxies))
        except RoomIsFull as error:
            self._clean_up(viewer)
            raise refusal(str(error)) from None

    def _find(self, request: gr.Request) -> Viewer | None:
        return self.room.find(request.session_hash)

    def _watching(self, request: gr.Request) -> Viewer:
        viewer = self._find(request)
        if viewer is None:
            raise refusal("No stream is open. Start the camera or a video first.")
        return viewer

    def _name_world(self, video: str | Path) -> None:
        """Say so if a video is from no world that the toy knows."""
        open_video = partial(self.processor.open_video, formats=FORMATS)
        if self.is_toy and generated_world(video, open_video) is None:
            gr.Warning(page.OUT_OF_WORLD)

    def _show(self, viewer: Viewer, shown: str) -> tuple[Any, ...]:
        with viewer.lock:
            return (
                drawing.chat(viewer),
                drawing.caption(viewer),
                drawing.overlay(viewer, shown),
                drawing.savings(viewer),
                drawing.silence_plot(viewer),
                drawing.latency_plot(viewer),
                [{"time": e.time, "role": e.role, "text": e.text, "stream": viewer.number} for e in viewer.events],
            )

    def _side_by_side(self, viewers: list[Viewer]) -> tuple[Any, ...]:
        return tuple(part for viewer in viewers for part in (drawing.chat(viewer), drawing.figures(viewer)))

    def _keep(self, viewer: Viewer) -> None:
        """Renew an upload as long as its page is open: Gradio deletes files that nothing has changed for an hour."""
        now = clock.monotonic()
        if viewer.video is not None and now - viewer.kept > RENEWAL:
            viewer.kept = now
            if _is_upload(viewer.video):
                with suppress(FileNotFoundError):
                    os.utime(viewer.video)

    def _clean_up(self, viewer: Viewer) -> None:
        """Close a stream, and delete its upload unless another stream uses it: equal files share one path."""
        viewer.close()
        video = viewer.video
        in_use = video is not None and (self.room.watches(video) or str(video) in self._compared)
        if video is not None and _is_upload(video) and not in_use:
            video.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------------- the page

    def build(self) -> gr.Blocks:
        """Build the page."""
        # Gradio would load what a client names by its address into the memory, of any size.
        processing_utils.async_ssrf_protected_download = _refuse_address
        return page.build(self)

    def launch_options(self) -> dict[str, Any]:
        """Return the options of `launch` except the address."""
        return {
            "js": (HERE / "page.js").read_text(encoding="utf-8"),
            "css": (HERE / "page.css").read_text(encoding="utf-8"),
            # Blue on white has enough contrast for WCAG AA; Gradio's orange does not.
            "theme": gr.themes.Default(primary_hue="blue"),
            "allowed_paths": sorted({str(Path(sample).parent) for sample in self.samples.values()}),
            "max_file_size": f"{self.limits.megabytes}mb",
            "show_error": False,
            "footer_links": ["api"],
        }


async def _refuse_address(url: str, cache_dir: str) -> str:  # noqa: ARG001
    raise refusal("The page fetches nothing from addresses. Upload the video itself.")


def _is_upload(path: Path) -> bool:
    """Return whether a file is in Gradio's upload folder."""
    return Path(get_upload_folder()).resolve() in path.resolve().parents


def _whole_number(text: str, *, least: int, most: int = 10_000) -> int:
    """Return a number of the command line or of the environment."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {text!r:.40}")
    return number


def _variable(name: str, default: int | None, *, least: int = 1) -> int | None:
    """Return a number of the environment. An empty variable means the default."""
    given = os.environ.get(name, "").strip()
    try:
        return _whole_number(given, least=least) if given else default
    except argparse.ArgumentTypeError as error:
        raise SystemExit(f"error: {name} {error}.") from None


def main() -> None:
    """Serve the page."""
    parser = CommandLineParser(description="A page on which a model watches a camera or a video and talks.")
    parser.add_argument("--model", help="checkpoint: a folder or a Hub id; default: MODEL_ID, else the embedded one")
    count = partial(_whole_number, least=1)
    parser.add_argument("--seats", type=count, default=_variable("SEATS", 8), help="most people at once")
    most = {"type": count, "default": _variable("SEATS_PER_ADDRESS", 4)}
    parser.add_argument("--seats-per-address", **most, help="most people from one network address")
    # On the Hub, a number of proxies that may change stands between people and the page.
    unknown = None if "SPACE_ID" in os.environ else 0
    proxies = {"type": partial(_whole_number, least=0), "default": _variable("PROXIES", unknown, least=0)}
    parser.add_argument("--proxies", **proxies, help="own proxies before the page, which tell addresses")
    port = partial(_whole_number, least=1, most=65_535)
    parser.add_argument("--port", type=port, help="port; default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio")
    options = parser.parse_args()
    console.quiet()
    model = options.model or os.environ.get("MODEL_ID") or embedded_checkpoint()
    if model is None:
        raise SystemExit("error: there is no checkpoint here: set MODEL_ID to a Hub id or a folder, or pass --model.")
    try:
        name = check_checkpoint(str(model))
        sys.stderr.write(f"loading {'the embedded checkpoint' if model == embedded_checkpoint() else name} ...\n")
        seats = {"seats": options.seats, "seats_per_address": options.seats_per_address}
        app = App(name, **seats, proxies=options.proxies)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: {in_one_line(error)}") from None
    # Otherwise the web server believes what a request from this machine says about its origin.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    try:
        app.build().launch(server_port=options.port, share=options.share, **app.launch_options())
    except OSError as error:
        # Gradio names its own options.
        told = in_one_line(error).split(" You can specify")[0]
        raise SystemExit(f"error: {told} Choose a free one with --port.") from None


if __name__ == "__main__":
    main()
