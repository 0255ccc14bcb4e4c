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
The page: a camera or a video is watched live, narrated, asked about, with the routing visible.

```bash
python space/app.py                       # the embedded checkpoint
python space/app.py --model folder-or-hub-id
```

Wiring only: people and their streams are in `viewer.py`, what is shown in `drawing.py`, what is taken away in
`captions.py`, and what the browser does in `page.js`.
"""

import argparse
import base64
import io
import os
import time as clock
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode

import captions
import drawing
import gradio as gr
import numpy as np
import transformers
from gradio.utils import get_upload_folder
from loading import load_model
from PIL import Image
from room import Room, RoomIsFull
from transformers import AutoProcessor
from uploads import Limits
from viewer import MOST_TYPED, NARRATE, Viewer, compare


HERE = Path(__file__).resolve().parent
EMBEDDED = HERE.parent
SAMPLES = EMBEDDED / "samples"
TICK = 0.5
MOST_FRAMES = 16  # As in page.js: more are dropped there.
FORMATS = {
    "SubRip (.srt)": "srt",
    "WebVTT (.vtt)": "vtt",
    "JSON lines (.jsonl)": "jsonl",
    "Video with captions (.mp4)": "mp4",
}
TITLE = "VideoLLM-MoD: watch it watch"
ABOUT = """
# Watch it watch
It looks at a video **as it plays**, decides at every frame whether to **speak**, and answers at any moment.
Most of its layers look at only **{kept} of a frame's {tokens} tokens**: there the dark patches are skipped, and cost
nothing.
"""
TOY = (
    "**A toy.** This checkpoint was trained on generated clips of moving things and knows nothing else. On a camera "
    "or any other video what it says means nothing; the routing, the speed and the savings are real."
)
COMPARE = """
The same video, each frame first to the routed model and then to the same weights at **full compute**, with every keep
ratio at 1, which they were not trained for: of a long video its first {seconds} seconds, and if none is chosen the
sample.
"""
SCREEN = """
<video id="player" muted playsinline aria-label="The video that is watched"></video>
<div id="waiting">Play a sample, choose a video, or start the camera.</div>
"""
# A chat of plain text, and an event that nobody waits for.
PLAIN: dict[str, Any] = {"render_markdown": False, "buttons": []}
QUIET: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
API = """
Every button is an endpoint of [`gradio_client`](https://www.gradio.app/docs/python-client):

```python
from gradio_client import Client, handle_file

client = Client("http://127.0.0.1:7860")
client.predict(handle_file("clip.mp4"), 2, 0.5, "Please narrate the video in real time.", api_name="/open_video")
client.predict([], 0, 30.0, None, "share of layers", api_name="/watch")  # up to second 30, at most 16 frames a call
print(client.predict("What do you see?", "now", "share of layers", api_name="/ask")[0])  # all that was said
print(client.predict("SubRip (.srt)", api_name="/export"))  # a file
```
"""


class App:
    """
    The page of a model.

    Args:
        name (`str`): Checkpoint: a folder or a Hub id.
        seats (`int`, *optional*, defaults to 8): Most people at once.
        limits ([`Limits`], *optional*): What a video may be.
    """

    def __init__(self, name: str, *, seats: int = 8, limits: Limits | None = None) -> None:
        self.name, self.limits = name, limits or Limits()
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        self.model = load_model(name)
        self._full: Any = None
        self._compared: list[str] = []
        self.room = Room(seats, on_leave=self._gone)
        self.is_toy = Path(name).resolve() == EMBEDDED
        self.sample = str(min(SAMPLES.glob("*.mp4")))

    # --------------------------------------------------------------------------------------------------- handlers

    def open_video(self, path: str | None, fps: float, threshold: float, instruction: str, request: gr.Request) -> Any:
        """Begins a stream on a file and has the browser play it."""
        if path is None:
            raise _error("Choose a video first.")
        _told(self.limits.check, path)
        viewer = self._viewer(fps, threshold, instruction)
        _told(viewer.begin, video=path)
        self._enter(viewer, request)
        return f"gradio_api/file={quote(path)}", gr.Timer(active=True), *self._show(viewer, drawing.SHARE)

    def open_camera(self, fps: float, threshold: float, instruction: str, granted: bool, request: gr.Request) -> Any:
        """Begins a stream on frames that will be sent, once the person has granted the camera."""
        if not granted:
            return [gr.skip()] * 8
        viewer = self._viewer(fps, threshold, instruction)
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
    ) -> Any:
        """
        Sees what there is to see by now: at most 16 frames sent (`time` in seconds, `image` a data URL), or those of
        the file up to a second; after a jump from the second jumped to.
        """
        viewer = self._find(request)
        if viewer is None:
            gr.Warning("Your place was given to somebody else. Begin again.")
            return gr.Timer(active=False), *[gr.skip()] * 7
        if not viewer.lock.acquire(blocking=False):
            # It is still speaking. A file waits for it, a camera does not.
            viewer.dropped += len(frames)
            return [gr.skip()] * 8
        try:
            before = len(viewer.events), viewer.session, viewer.session.num_frames
            if viewer.video is None:
                if len(frames) > MOST_FRAMES:
                    raise _error(f"At most {MOST_FRAMES} frames are seen at a call.")
                _told(viewer.see, map(_frame, frames), int(dropped))
            elif until is not None:
                if jump is not None:
                    _told(viewer.begin, video=viewer.video, start=max(0.0, float(jump)))
                _told(viewer.watch_until, float(until))
            after = len(viewer.events), viewer.session, viewer.session.num_frames
            if after == before:
                return [gr.skip()] * 8
            showing = list(self._show(viewer, shown))
            if after[:2] == before[:2]:
                # What has not changed is not sent: a screen reader would read it again.
                showing[0] = showing[1] = gr.skip()
            return gr.skip(), *showing
        finally:
            viewer.lock.release()

    def ask(self, text: str, when: str, shown: str, request: gr.Request) -> Any:
        """Asks, to be answered now or when it happens."""
        viewer = self._watching(request)
        if not text.strip():
            return "", *[gr.skip()] * 7
        if len(text) > MOST_TYPED:
            raise _error(f"A question may have {MOST_TYPED} characters.")
        _told(viewer.ask, text, now=when == "now")
        return "", *self._show(viewer, shown)

    def reset(self, fps: float, threshold: float, instruction: str, until: float | None, request: gr.Request) -> Any:
        """Begins a new stream at this point of the same video or camera, with these settings."""
        viewer = self._watching(request)
        with viewer.lock:
            viewer.fps, viewer.threshold, viewer.instruction = float(fps), float(threshold), instruction
            _told(viewer.begin, video=viewer.video, start=max(0.0, float(until or 0.0)))
        return gr.Timer(active=True), *self._show(viewer, drawing.SHARE)

    def set_threshold(self, threshold: float, request: gr.Request) -> Any:
        """From the next frame on; shown at once, also where no frame follows."""
        viewer = self._find(request)
        if viewer is None:
            return gr.skip()
        viewer.set_threshold(min(max(float(threshold), 0.0), 1.0))
        return drawing.silence_plot(viewer)

    def choose_overlay(self, shown: str, request: gr.Request) -> str:
        """The overlay of the last frame."""
        viewer = self._find(request)
        return "" if viewer is None else drawing.overlay(viewer, shown)

    def export(self, kind: str, request: gr.Request) -> str:
        """A file with what was said so far."""
        viewer = self._watching(request)
        if not viewer.events:
            raise _error("Nothing has been said yet.")
        out = viewer.folder / f"narration.{FORMATS[kind]}"
        if FORMATS[kind] == "mp4":
            if viewer.video is None:
                raise _error("The camera's pictures are not kept. Captions can be burnt into a file.")
            if _told(self.limits.check, viewer.video) > self.limits.burnt:
                raise _error(f"Captions are burnt into videos of at most {self.limits.burnt / 60:.0f} minutes.")
            _told(captions.burn_in, viewer.video, viewer.events, out)
        else:
            write = {"srt": captions.to_srt, "vtt": captions.to_vtt, "jsonl": captions.to_jsonl}[FORMATS[kind]]
            options = {} if FORMATS[kind] == "jsonl" else {"end": viewer.end}
            out.write_text(write(viewer.events, **options), encoding="utf-8")
        return str(out)

    def compare(self, path: str | None, fps: float) -> Iterator[Any]:
        """Routed and full compute over the same video, each frame to both, as fast as they can."""
        path = path or self.sample
        _told(self.limits.check, path)
        if self._full is None:
            self._full = load_model(self.name, mod_keep_ratio=1.0)
        last, viewers, pair = clock.perf_counter(), [], (self.model, self._full)
        self._compared.append(path)
        try:
            for viewers in compare(pair, self.processor, path, fps=float(fps), end=self.limits.compared):
                if clock.perf_counter() - last > TICK:
                    last = clock.perf_counter()
                    yield self._side_by_side(viewers)
            yield self._side_by_side(viewers)
        except ValueError as error:
            raise _error(str(error)) from None
        finally:
            self._compared.remove(path)
            for viewer in viewers:
                viewer.close()

    def settings(self, fps: float, threshold: float, instruction: str) -> str:
        """The part of a link that brings these settings back."""
        return "?" + urlencode({"fps": fps, "threshold": threshold, "instruction": instruction})

    def restore(self, request: gr.Request) -> Any:
        """The settings of a link."""
        asked, found = request.query_params, []
        for name, least, most in (("fps", 0.5, 10.0), ("threshold", 0.0, 1.0)):
            try:
                found.append(min(max(float(asked[name]), least), most))
            except (KeyError, ValueError):
                found.append(gr.skip())
        return *found, asked["instruction"][:MOST_TYPED] if "instruction" in asked else gr.skip()

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.room.leave(request.session_hash)

    # ---------------------------------------------------------------------------------------------------- helpers

    def _viewer(self, fps: float, threshold: float, instruction: str) -> Viewer:
        options = {"fps": float(fps), "threshold": float(threshold), "instruction": instruction}
        return _told(Viewer, self.model, self.processor, **options)

    def _enter(self, viewer: Viewer, request: gr.Request) -> None:
        if not request.session_hash:
            raise _error("A stream belongs to a session. Use the page, or `gradio_client`.")
        try:
            self.room.enter(request.session_hash, viewer)
        except RoomIsFull as error:
            self._gone(viewer)
            raise _error(str(error)) from None

    def _find(self, request: gr.Request) -> Viewer | None:
        return self.room.find(request.session_hash)

    def _watching(self, request: gr.Request) -> Viewer:
        viewer = self._find(request)
        if viewer is None:
            raise _error("Nothing is being watched. Start the camera or a video first.")
        return viewer

    def _show(self, viewer: Viewer, shown: str) -> tuple[Any, ...]:
        with viewer.lock:
            return (
                drawing.chat(viewer),
                f'<div class="live" role="status" aria-live="polite">{drawing.caption(viewer)}</div>',
                drawing.overlay(viewer, shown),
                drawing.savings(viewer),
                drawing.silence_plot(viewer),
                drawing.latency_plot(viewer),
                [{"time": e.time, "role": e.role, "text": e.text} for e in viewer.events],
            )

    def _side_by_side(self, viewers: list[Viewer]) -> tuple[Any, ...]:
        return tuple(part for viewer in viewers for part in (drawing.chat(viewer), drawing.figures(viewer)))

    def _gone(self, viewer: Viewer) -> None:
        """Who is gone leaves nothing: an upload is deleted once nobody uses it. The same file has the same path."""
        viewer.close()
        video = viewer.video
        in_use = video is not None and (self.room.watches(video) or str(video) in self._compared)
        if video is not None and _is_upload(video) and not in_use:
            video.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------------- the page

    def build(self) -> gr.Blocks:
        """The page."""
        config = self.model.config
        with gr.Blocks(title=TITLE, delete_cache=(600, 3600), analytics_enabled=False) as demo:
            gr.Markdown(ABOUT.format(kept=min(config.layer_keep_counts), tokens=config.frame_num_tokens))
            if self.is_toy:
                gr.Markdown(TOY)
            with gr.Tab("Watch"), gr.Row():
                with gr.Column(scale=3, min_width=300):
                    left = self._picture_side()
                with gr.Column(scale=2, min_width=300):
                    right = self._talking_side()
            with gr.Tab("Compare"):
                self._compare_tab(right.fps)
            with gr.Tab("From Python"):
                gr.Markdown(API)
            self._wire(demo, SimpleNamespace(**vars(left), **vars(right)))
            demo.unload(self.leave)
        # Closed to calls past the queue, which belong to no session.
        return demo.queue(max_size=64, api_open=False)

    def _picture_side(self) -> SimpleNamespace:
        with gr.Group(elem_id="stage"):
            gr.HTML(SCREEN, elem_id="screen")
            overlay, caption = gr.HTML(elem_id="overlay"), gr.HTML(elem_id="caption")
        gr.HTML('<div id="notice" role="alert"></div>', elem_id="notices", padding=False)
        with gr.Row():
            sample = gr.Button("Sample", variant="primary", elem_id="sample", min_width=90)
            upload = gr.UploadButton("Video", file_types=["video"], elem_id="upload", min_width=90)
            camera = gr.Button("Camera", elem_id="camera", min_width=90)
            pause = gr.Button("Pause", elem_id="pause", min_width=90)
            reset = gr.Button("Restart", elem_id="reset", min_width=90)
        choices = drawing.overlay_choices(self.model.config)
        shown = gr.Dropdown(choices, value=drawing.SHARE, label="Bright: kept by", elem_id="shown")
        silence, latency = gr.HTML(elem_id="silence"), gr.HTML(elem_id="latency")
        return SimpleNamespace(
            overlay=overlay,
            caption=caption,
            sample=sample,
            upload=upload,
            camera=camera,
            pause=pause,
            reset=reset,
            shown=shown,
            silence=silence,
            latency=latency,
        )

    def _talking_side(self) -> SimpleNamespace:
        savings = gr.HTML(elem_id="savings")
        chat = gr.Chatbot(label="What was said", height=340, elem_id="chat", **PLAIN)
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                label="Ask, at any time", placeholder="What do you see?", scale=4, elem_id="question"
            )
            ask = gr.Button("Ask", elem_id="ask", min_width=70, scale=1)
        when = gr.Radio(["now", "when it happens"], value="now", label="To be answered", elem_id="when")
        with gr.Accordion("Settings", open=False):
            fps = gr.Slider(0.5, 10, value=2, step=0.5, label="Frames a second", elem_id="fps")
            label, least = "Speak when silence is less likely than", self.model.config.interval_threshold
            threshold = gr.Slider(0, 1, value=least, step=0.005, label=label, elem_id="threshold")
            instruction = gr.Textbox(NARRATE, label="Instruction at the first frame", elem_id="instruction")
            gr.Markdown("Frame rate and instruction take effect with the next stream, the threshold at once.")
            link = gr.Textbox(label="Link with these settings", interactive=False, elem_id="link", buttons=["copy"])
        with gr.Accordion("Take away", open=False):
            kind = gr.Radio(list(FORMATS), value=next(iter(FORMATS)), label="As", elem_id="kind")
            take = gr.Button("Make the file", elem_id="take")
            file = gr.DownloadButton("Save it", elem_id="file")
        return SimpleNamespace(
            savings=savings,
            chat=chat,
            question=question,
            ask=ask,
            when=when,
            fps=fps,
            threshold=threshold,
            instruction=instruction,
            link=link,
            kind=kind,
            take=take,
            file=file,
        )

    def _compare_tab(self, fps: gr.Slider) -> None:
        note = COMPARE.format(seconds=f"{self.limits.compared:.0f}")
        gr.Markdown(note + (" A model as small as this one spends its time on overhead." if self.is_toy else ""))
        with gr.Row():
            video = gr.File(label="Video", file_types=["video"], height=140)
            run = gr.Button("Compare", variant="primary", elem_id="compare")
        sides = []
        with gr.Row():
            for title, name in (("Routed", "routed"), ("Full compute", "full")):
                with gr.Column():
                    sides.append(gr.Chatbot(label=title, height=320, elem_id=name, **PLAIN))
                    sides.append(gr.HTML(elem_id=f"{name}_figures"))
        run.click(self.compare, [video, fps], sides, api_name="compare", concurrency_limit=1)

    def _wire(self, demo: gr.Blocks, page: SimpleNamespace) -> None:
        # What the browser sends, and what is told to it, beside what is seen.
        frames, dropped = gr.JSON([], visible=False), gr.Number(0, visible=False)
        until, jump = gr.Number(None, visible=False), gr.Number(None, visible=False)
        granted = gr.Checkbox(True, visible=False)
        source, said = gr.Textbox(visible=False), gr.JSON(visible=False)
        sample_path = gr.State(self.sample)
        timer = gr.Timer(TICK, active=False)
        showing = [page.chat, page.caption, page.overlay, page.savings, page.silence, page.latency, said]
        options = [page.fps, page.threshold, page.instruction]
        # Everybody's streams advance at once.
        live = {"show_progress": "hidden", "concurrency_id": "live", "concurrency_limit": self.room.seats}

        opened, play = [source, timer, *showing], {"fn": None, "inputs": source, "js": "(url) => page.play(url)"}
        names = {"api_name": "open_sample", "api_visibility": "private"}
        page.sample.click(self.open_video, [sample_path, *options], opened, **names, **live).success(**play)
        page.upload.upload(self.open_video, [page.upload, *options], opened, api_name="open_video", **live).success(
            **play
        )
        page.camera.click(None, page.fps, granted, js="(fps) => page.camera(fps)").then(
            self.open_camera, [*options, granted], [timer, *showing], api_name="open_camera", **live
        )
        page.pause.click(None, js="() => page.pause()")
        now = "(fps, threshold, instruction) => [fps, threshold, instruction, page.now(fps)]"
        page.reset.click(self.reset, [*options, until], [timer, *showing], api_name="reset", js=now, **live)
        timer.tick(
            self.watch,
            [frames, dropped, until, jump, page.shown],
            [timer, *showing],
            api_name="watch",
            js="(a, b, c, d, shown) => [...page.collect(), shown]",
            trigger_mode="once",
            **live,
        )
        asking = [page.question.submit, page.ask.click]
        gr.on(
            asking, self.ask, [page.question, page.when, page.shown], [page.question, *showing], api_name="ask", **live
        )
        page.threshold.change(
            self.set_threshold, page.threshold, page.silence, api_name="threshold", show_progress="hidden"
        )
        page.shown.change(self.choose_overlay, page.shown, page.overlay, api_name="overlay", show_progress="hidden")
        page.take.click(self.export, page.kind, page.file, api_name="export", concurrency_limit=4)
        here = "(part) => location.origin + location.pathname + part"
        restored = demo.load(self.restore, None, options, **QUIET)
        for changed in (restored.then, partial(gr.on, [option.change for option in options])):
            changed(self.settings, options, page.link, **QUIET).then(None, page.link, page.link, js=here)

    def launch_options(self) -> dict[str, Any]:
        """What `launch` needs beside an address."""
        return {
            "js": (HERE / "page.js").read_text(encoding="utf-8"),
            "css": (HERE / "page.css").read_text(encoding="utf-8"),
            # Blue on white has the contrast that orange lacks.
            "theme": gr.themes.Default(primary_hue="blue"),
            "allowed_paths": [str(SAMPLES)],
            "max_file_size": f"{self.limits.megabytes}mb",
            "show_error": False,
            "footer_links": ["api"],
        }


def _error(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def _told(verb: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose complaint is shown to the person."""
    try:
        return verb(*args, **kwargs)
    except ValueError as error:
        raise _error(str(error)) from None


def _is_upload(path: Path) -> bool:
    """Whether a file lies where Gradio keeps uploads."""
    return Path(get_upload_folder()).resolve() in path.resolve().parents


def _frame(sent: dict[str, Any]) -> tuple[float, np.ndarray]:
    """A frame that the browser sent: its second, and its picture as uint8 (height, width, 3)."""
    try:
        kind, data = sent["image"].split(",", 1)
        if not kind.startswith("data:image/") or len(data) > 2_000_000:
            raise ValueError
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["JPEG", "PNG", "WEBP"]) as image:
            if image.width * image.height > 1024 * 1024:
                raise ValueError
            return float(sent["time"]), np.asarray(image.convert("RGB"))
    except (ValueError, OSError, AttributeError, KeyError, TypeError, SyntaxError, Image.DecompressionBombError):
        message = "A frame is a `time` in seconds and an `image`: a data URL of a JPEG, PNG or WebP of at most 1 MP."
        raise _error(message) from None


def main() -> None:
    """Opens the page."""
    parser = argparse.ArgumentParser(description="A page on which a model watches a camera or a video and talks.")
    parser.add_argument(
        "--model", default=os.environ.get("MODEL_ID") or str(EMBEDDED), help="checkpoint: a folder or a Hub id"
    )
    parser.add_argument("--seats", type=int, default=int(os.environ.get("SEATS", "8")), help="most people at once")
    parser.add_argument("--port", type=int, help="port; by default the first that is free from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    try:
        app = App(options.model, seats=options.seats)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: {str(error).strip().splitlines()[0]}") from None
    app.build().launch(server_port=options.port, share=options.share, **app.launch_options())


if __name__ == "__main__":
    main()
