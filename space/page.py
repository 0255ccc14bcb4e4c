# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The layout of the page, its texts, and which handler of the [`App`] each button calls."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import drawing
import gradio as gr
from viewer import NARRATE


TICK = 0.5  # Seconds between two calls of `watch`.
FPS = (0.5, 10.0)  # Least and most frames per second to watch.
EVERY = (0.5, 60.0)  # Least and most seconds between two replies.
# Names of the policies by what the page calls them; those with a period and a prompt; thresholds with their defaults.
POLICIES = {
    "when silence is unlikely (learned)": "learned",
    "every few seconds": "every",
    "when the picture changes": "change",
    "when the model finds something new": "probe",
}
DEFAULT_PROMPT = "What is happening now? Answer in one short sentence."  # The model's.
NEEDS_EVERY = ("every", "change", "probe")
THRESHOLDS = {"change": 0.05, "probe": 0.5}
# What a file dialog offers. Systems take files of these suffixes for something else than video, or do not know them.
VIDEOS = ["video", ".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".mkv", ".m4v", ".flv", ".gif", ".ogg", ".ogv"]
VIDEOS += [".h264", ".264", ".hevc", ".ivf"]
FORMATS = {
    "SubRip (.srt)": "srt",
    "WebVTT (.vtt)": "vtt",
    "JSON lines (.jsonl)": "jsonl",
    "Video with captions (.mp4)": "mp4",
}
TITLE = "VideoLLM-MoD: watch it watch"
ABOUT = """
# Watch it watch
The model watches a video **as it plays**, decides at every frame whether to **speak**, and answers at any moment.
"""
ROUTING = """\
{routed} of its {layers} layers process only **{kept} of a frame's {tokens} tokens**. They skip the dark patches, which
then cost nothing.
"""
TOY = (
    "**A toy.** This checkpoint was trained on two generated worlds, moving things (StreamWorld) and a game that a "
    "player walks through (DoomWorld), and knows nothing else. On a camera or any other video, its words mean "
    "nothing. The routing, the speed and the savings are real."
)
OUT_OF_WORLD = "This video is from neither of the worlds that the toy knows, so its words mean nothing here."
# What the buttons of samples say. Each has the name of its file as its id.
SAMPLES = {"streamworld": "StreamWorld", "doomworld": "DoomWorld"}
SPEECH = "The browser reads and listens. Some browsers send what you say to their makers."
COMPARE = """
Both sides watch the same video. Each frame goes first to the routed model, then to the same weights at **full
compute**: every keep ratio is 1, which the weights were not trained for. If you choose no video, both watch the
first sample. They watch the first {seconds} seconds of a long video.
"""
OVERHEAD = " A model as small as this one spends most of its time on overhead, so the times hardly differ."
SCREEN = """
<video id="player" muted playsinline aria-label="The video that the model watches"></video>
<div id="waiting">Play a sample, choose a video, or start the camera.</div>
<div id="announced" role="status"></div>
"""
# Chats show plain text.
PLAIN: dict[str, Any] = {"render_markdown": False, "buttons": []}
QUIET: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
API = """
Every button is an endpoint of [`gradio_client`](https://www.gradio.app/docs/python-client). The options have the names
of the Python arguments:

```python
from gradio_client import Client, handle_file

client = Client("http://127.0.0.1:7860")
query = "Please narrate the video in real time."
client.predict(handle_file("clip.mp4"), fps=2, interval_threshold=0.5, query=query, api_name="/open_video")
client.predict(frames=[], until=30.0, jump=None, api_name="/watch")  # watches up to second 30, for half a second
*_, said = client.predict("What do you see?", when="now", api_name="/ask")  # all events so far
print(client.predict("SubRip (.srt)", api_name="/export"))  # a file
```
"""


def build(app: Any) -> gr.Blocks:
    """Build the page of an [`App`]."""
    config = app.model.config
    with gr.Blocks(title=TITLE, delete_cache=(600, 3600), analytics_enabled=False) as demo:
        gr.Markdown(ABOUT + _describe_routing(config))
        if app.is_toy:
            gr.Markdown(TOY)
        with gr.Tab("Watch"), gr.Row():
            with gr.Column(scale=3, min_width=300):
                left = _picture_side(config, list(app.samples))
            with gr.Column(scale=2, min_width=300):
                right = _talking_side(config)
        with gr.Tab("Compare", visible=bool(config.routed_layers)):
            _compare_tab(app, right.fps)
        with gr.Tab("From Python"):
            gr.Markdown(API)
        parts = SimpleNamespace(**vars(left), **vars(right))
        _wire_stream(app, parts)
        _wire_settings(app, parts, demo)
        demo.unload(app.leave)
    # Calls that bypass the queue belong to no session, so they are refused.
    return demo.queue(max_size=64, api_open=False)


def _describe_routing(config: Any) -> str:
    if not config.routed_layers:
        return ""
    counts = config.layer_keep_counts
    return ROUTING.format(
        routed=len(config.routed_layers), layers=len(counts), kept=min(counts), tokens=config.frame_num_tokens
    )


def _picture_side(config: Any, samples: list[str]) -> SimpleNamespace:
    with gr.Group(elem_id="stage"):
        gr.HTML(SCREEN, elem_id="screen")
        overlay, caption = gr.HTML(elem_id="overlay"), gr.HTML(elem_id="caption")
    gr.HTML('<div id="notice" role="alert"></div>', elem_id="notices", padding=False)
    with gr.Row():
        primary = {"variant": "primary", "min_width": 140}
        buttons = {
            "samples": [gr.Button(SAMPLES.get(name, name), elem_id=name, **primary) for name in samples],
            "upload": gr.UploadButton("Video", file_types=VIDEOS, elem_id="upload", min_width=90),
            "camera": gr.Button("Camera", elem_id="camera", min_width=90),
            "pause": gr.Button("Pause", elem_id="pause", min_width=90),
            "reset": gr.Button("Restart", elem_id="reset", min_width=90),
        }
    choices = drawing.overlay_choices(config)
    options = {"elem_id": "shown", "visible": bool(config.routed_layers)}
    shown = gr.Dropdown(choices, value=drawing.SHARE, label="Bright: kept by", **options)
    plots = {"silence": gr.HTML(elem_id="silence"), "latency": gr.HTML(elem_id="latency")}
    return SimpleNamespace(overlay=overlay, caption=caption, shown=shown, **buttons, **plots)


def _talking_side(config: Any) -> SimpleNamespace:
    savings = gr.HTML(elem_id="savings")
    chat = gr.Chatbot(label="What was said", height=340, elem_id="chat", **PLAIN)
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            label="Question, at any time", placeholder="What do you see?", scale=4, elem_id="question"
        )
        ask = gr.Button("Ask", elem_id="ask", min_width=70, scale=1)
        # page.css shows what uses speech only in browsers that have it.
        listen = gr.Button("Voice", elem_id="listen", min_width=70, scale=1)
    aloud = gr.Checkbox(False, label="Read the narration aloud", elem_id="aloud", container=False)
    when = gr.Radio(["now", "when it happens"], value="now", label="Answer it", elem_id="when")
    with gr.Accordion("Settings", open=False):
        fps = _slider(*FPS, value=2, step=0.5, label="fps: frames per second to watch", elem_id="fps")
        label, least = "interval_threshold: speak when silence is less likely", config.interval_threshold
        policy = config.speak
        choices = list(POLICIES.items())
        speak = gr.Dropdown(choices, value=policy, label="speak: when nobody has asked", elem_id="speak")
        shown = _used_by(policy)
        options = {"step": 0.005, "elem_id": "interval_threshold", "visible": shown[0]}
        threshold = _slider(0, 1, value=least, label=label, **options)
        label = "every: seconds from one reply to the next, or the least"
        every = _slider(*EVERY, value=2, step=0.5, label=label, elem_id="every", visible=shown[1])
        label = "speak_threshold: speak at a larger difference, or a more likely yes"
        options = {"step": 0.005, "elem_id": "speak_threshold", "visible": shown[2]}
        speak_threshold = _slider(0, 1, value=THRESHOLDS.get(policy, 0.5), label=label, **options)
        label = "prompt: what you are taken to say before each reply"
        prompt = gr.Textbox("", label=label, placeholder=DEFAULT_PROMPT, elem_id="prompt", visible=shown[1])
        first = NARRATE if policy == "learned" else ""
        query = gr.Textbox(first, label="query: what you say at the first frame", elem_id="query")
        language = gr.Textbox("en-US", label="language: of speech, read aloud or spoken", elem_id="language")
        # The color of a box's own `info` has too little contrast.
        gr.Markdown(SPEECH, elem_id="speech")
        gr.Markdown("`interval_threshold` takes effect at once, the other settings with the next stream.")
        link = gr.Textbox(label="Link with these settings", interactive=False, elem_id="link", buttons=["copy"])
    with gr.Accordion("Export", open=False):
        kind = gr.Radio(list(FORMATS), value=next(iter(FORMATS)), label="Format", elem_id="kind")
        take = gr.Button("Make the file", elem_id="take")
        file = gr.DownloadButton("Save it", elem_id="file")
    asking = {"question": question, "ask": ask, "when": when}
    speech = {"listen": listen, "aloud": aloud, "language": language}
    settings = {"fps": fps, "interval_threshold": threshold, "query": query, "link": link}
    settings |= {"speak": speak, "every": every, "speak_threshold": speak_threshold, "prompt": prompt}
    export = {"kind": kind, "take": take, "file": file}
    return SimpleNamespace(savings=savings, chat=chat, **asking, **speech, **settings, **export)


def _used_by(policy: str) -> list[bool]:
    """Return whether a policy uses `interval_threshold`, `every`, `speak_threshold` and `prompt`."""
    return [policy == "learned", policy in NEEDS_EVERY, policy in THRESHOLDS, policy in NEEDS_EVERY]


def _show_used(policy: str) -> list[Any]:
    return [gr.update(visible=is_shown) for is_shown in _used_by(policy)]


def _slider(least: float, most: float, **options: Any) -> gr.Slider:
    slider = gr.Slider(least, most, **options)
    # Gradio fails at a value that is no number. The handlers check all values, and name the option.
    slider.preprocess = lambda payload: payload
    return slider


def _compare_tab(app: Any, fps: gr.Slider) -> None:
    gr.Markdown(COMPARE.format(seconds=f"{app.limits.compared:.0f}") + (OVERHEAD if app.is_toy else ""))
    with gr.Row():
        video = gr.File(label="Video", file_types=VIDEOS, height=140)
        run = gr.Button("Compare", variant="primary", elem_id="compare")
    sides = []
    with gr.Row():
        for title, name in (("Routed", "routed"), ("Full compute", "full")):
            with gr.Column():
                sides.append(gr.Chatbot(label=title, height=320, elem_id=name, **PLAIN))
                sides.append(gr.HTML(elem_id=f"{name}_figures"))
    run.click(app.compare, [video, fps], sides, api_name="compare", concurrency_limit=1)


def _wire_stream(app: Any, parts: SimpleNamespace) -> None:
    # Hidden components carry what the browser sends with each tick, and what the server tells it.
    frames, dropped = gr.JSON([], visible=False), gr.Number(0, visible=False)
    until, jump = gr.Number(None, visible=False), gr.Number(None, visible=False)
    granted = gr.Checkbox(True, visible=False)
    source, said = gr.Textbox(visible=False), gr.JSON(visible=False)
    timer = gr.Timer(TICK, active=False)
    showing = [parts.chat, parts.caption, parts.overlay, parts.savings, parts.silence, parts.latency, said]
    options = [parts.fps, parts.interval_threshold, parts.query]
    speaking = [parts.speak, parts.every, parts.speak_threshold, parts.prompt]
    # The streams of all people advance at the same time.
    live = {"show_progress": "hidden", "concurrency_id": "live", "concurrency_limit": app.room.seats}

    opened, play = [source, timer, *showing], {"fn": None, "inputs": source, "js": "(url) => page.play(url)"}
    for (name, sample), button in zip(app.samples.items(), parts.samples, strict=True):
        given = [gr.State(sample), *options, *speaking]
        names = {"api_name": f"open_{name}", "api_visibility": "private"}
        button.click(app.open_video, given, opened, **names, **live).success(**play)
    given = [parts.upload, *options, *speaking]
    uploaded = parts.upload.upload(app.open_video, given, opened, api_name="open_video", **live)
    uploaded.success(**play)
    asked = parts.camera.click(None, parts.fps, granted, js="(fps) => page.camera(fps)")
    given = [*options, granted, *speaking]
    opened_camera = asked.then(app.open_camera, given, [timer, *showing], api_name="open_camera", **live)
    opened_camera.failure(None, js="() => page.stop()")
    parts.pause.click(None, js="() => page.pause()")
    now = "(fps, threshold, query, until, ...speaking) => [fps, threshold, query, page.now(fps), ...speaking]"
    parts.reset.click(app.reset, [*options, until, *speaking], [timer, *showing], api_name="reset", js=now, **live)
    watched = timer.tick(
        app.watch,
        [frames, dropped, until, jump, parts.shown],
        [timer, *showing],
        api_name="watch",
        js="(a, b, c, d, shown) => [...page.collect(), shown]",
        trigger_mode="once",
        **live,
    )
    asking, asked = [parts.question.submit, parts.ask.click], [parts.question, parts.when, parts.shown]
    # A question may wait for the one before, and does not keep the streams of others waiting.
    waits = {**live, "concurrency_id": "ask", "trigger_mode": "multiple"}
    answered = gr.on(asking, app.ask, asked, [parts.question, *showing], api_name="ask", **waits)
    heard = gr.Textbox("", visible=False)
    listened = parts.listen.click(None, None, heard, js="() => page.listen()", trigger_mode="multiple")
    given = [heard, parts.when, parts.shown]
    spoken = listened.success(
        app.ask, given, [heard, *showing], api_name="ask_aloud", api_visibility="private", **waits
    )
    for changed in (watched, answered, spoken):
        changed.then(None, said, None, js="(said) => page.tell(said)")
    parts.aloud.change(None, parts.aloud, None, js="(aloud) => page.readAloud(aloud)")
    parts.language.change(None, parts.language, None, js="(language) => { page.language = language; }")


def _wire_settings(app: Any, parts: SimpleNamespace, demo: gr.Blocks) -> None:
    drawn = {"show_progress": "hidden"}
    threshold = parts.interval_threshold
    threshold.change(app.set_interval_threshold, threshold, parts.silence, api_name="interval_threshold", **drawn)
    parts.shown.change(app.choose_overlay, parts.shown, parts.overlay, api_name="overlay", **drawn)
    parts.take.click(app.export, parts.kind, parts.file, api_name="export", concurrency_limit=4)
    used = [threshold, parts.every, parts.speak_threshold, parts.prompt]
    parts.speak.change(_show_used, parts.speak, used, **QUIET)
    # A link restores its own threshold, so only a person's choice brings the default.
    parts.speak.input(lambda policy: THRESHOLDS.get(policy, gr.skip()), parts.speak, parts.speak_threshold, **QUIET)
    here = "(part) => location.origin + location.pathname + part"
    options = [parts.fps, threshold, parts.query, parts.speak, parts.every, parts.speak_threshold, parts.prompt]
    restored = demo.load(app.restore, None, options, **QUIET)
    for changed in (restored.then, partial(gr.on, [option.change for option in options])):
        changed(app.settings, options, parts.link, **QUIET).then(None, parts.link, parts.link, js=here)
