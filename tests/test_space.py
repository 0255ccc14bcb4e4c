# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The page without a browser: streams, seats, limits, drawings, exports and deployment."""

import base64
import io
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import app as space_app
import av
import captions
import drawing
import gradio as gr
import httpx
import numpy as np
import pytest
from engines import said
from hub import Hub
from huggingface_hub import SpaceCard
from inputs import read_frame
from loading import load_checkpoint
from PIL import Image
from programs import run_main
from published import save_source
from room import Room, RoomIsFull, address_of
from serving_server import ROOMY, running
from serving_server import picture as picture_file
from starlette.requests import Request
from tiny import copy_embedded, embedded_files, random_frames, write_clip
from uploads import FORMATS, Limits
from viewer import Viewer, compare

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor
from videollm_mod.convert.vision_language import convert
from videollm_mod.video_reading_videollm_mod import VideoReader


ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"
SAMPLE = ROOT / "samples" / "streamworld.mp4"
STORY = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["events"]


@pytest.fixture(scope="module")
def parts():
    checkpoint = ROOT
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(checkpoint).eval()
    return model, VideoLLMMoDProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def event(time, text, role="assistant"):
    return SimpleNamespace(time=time, frame=int(2 * time), role=role, text=text)


def watch(viewer, until=60.0):
    """Watch all frames up to a second. A single call stops after half a second."""
    while viewer.waiting is not None and viewer.waiting <= until:
        viewer.watch_until(until)


def told(viewer):
    return [[e.time, e.text] for e in viewer.events if e.role == "assistant"]


# ------------------------------------------------------------------------------------------------------------ captions


def test_captions_do_not_overlap():
    said = [
        event(0.0, "Narrate.", "user"),
        event(1.0, "One."),
        event(3.0, "Two."),
        event(3.0, "Three."),
        event(20.0, ""),
    ]
    shown = list(captions.cues(said))
    assert shown == [(1.0, 3.0, "One."), (3.0, 3.5, "Two."), (3.5, 7.0 + 0.5, "Three.")]


def test_no_caption_lasts_longer_than_the_video():
    said = [event(1.0, "One."), event(7.5, "Two."), event(8.0, "Three."), event(8.0, "Four.")]
    assert list(captions.cues(said[:2], end=8.5)) == [(1.0, 5.0, "One."), (7.5, 8.5, "Two.")]
    assert list(captions.cues(said, end=9.5))[1:] == [(7.5, 8.0, "Two."), (8.0, 8.5, "Three."), (8.5, 9.5, "Four.")]
    # Replies at the last frame are shown early enough to be read.
    assert list(captions.cues(said, end=8.5))[1:] == [(7.0, 7.5, "Two."), (7.5, 8.0, "Three."), (8.0, 8.5, "Four.")]
    assert list(captions.cues([event(8.5, "At the end.")], end=8.5)) == [(8.0, 8.5, "At the end.")]
    assert list(captions.cues([event(0.0, "One frame.")], end=0.04)) == [(0.0, 0.04, "One frame.")]
    assert captions.to_srt(said[:2], end=8.5).splitlines()[5] == "00:00:07,500 --> 00:00:08,500"
    assert captions.to_vtt(said[:2], end=8.5).splitlines()[-2] == "00:00:07.500 --> 00:00:08.500"


def test_captions_that_crowd_stay_near_their_times():
    said = [event(index / 10, f"{index}.") for index in range(30)]
    shown = list(captions.cues(said, end=3.0))
    assert [begin for begin, _, _ in shown] == pytest.approx([index / 10 for index in range(30)])
    assert [until for _, until, _ in shown] == pytest.approx([index / 10 for index in range(1, 31)])
    at_once = list(captions.cues([event(0.0, "One."), event(0.0, "Two."), event(0.0, "Three.")], end=0.6))
    assert [begin for begin, _, _ in at_once] == pytest.approx([0.0, 0.2, 0.4]) and at_once[-1][1] == 0.6
    assert len(list(captions.cues(said, end=0.0))) == 30


def test_srt_vtt_and_jsonl_have_their_formats():
    said = [event(61.5, "A <b> & c.\n\nIts next line."), event(3600.25, "Two.")]
    assert captions.to_srt(said) == (
        "1\n00:01:01,500 --> 00:01:05,500\nA <b> & c. Its next line.\n\n2\n01:00:00,250 --> 01:00:04,250\nTwo.\n"
    )
    vtt = captions.to_vtt(said)
    assert vtt.startswith("WEBVTT\n\n00:01:01.500 --> 00:01:05.500\nA &lt;b&gt; &amp; c. Its next line.\n")
    assert [json.loads(line) for line in captions.to_jsonl([event(0.5, "é", "user")]).splitlines()] == [
        {"time": 0.5, "frame": 1, "role": "user", "text": "é"}
    ]
    assert captions.to_srt([]) == "" and captions.to_vtt([]) == "WEBVTT\n"


def test_burnt_in_captions_appear_at_their_times(tmp_path):
    write_clip(tmp_path / "clip.mp4", np.full((40, 64, 64, 3), 128, dtype=np.uint8), fps=10)
    captions.burn_in(
        tmp_path / "clip.mp4", [event(1.0, "A long caption that needs two lines at least.")], tmp_path / "out.mp4"
    )
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        pictures = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
    assert len(pictures) == 40 and min(pictures[0][1].shape[:2]) >= 360
    for time, picture in pictures:
        bottom, top = picture[-60:].astype(int), picture[:100].astype(int)
        assert (bottom.std() > 20) == (1.0 <= time < 5.0) and top.std() < 5, time
    with pytest.raises(ValueError, match=r"README\.md' cannot be read as video"):
        captions.burn_in(ROOT / "README.md", [], tmp_path / "no.mp4")


# ------------------------------------------------------------------------------------------------------------- streams


def test_a_file_is_watched_up_to_the_played_second(parts):
    viewer = Viewer(*parts)
    viewer.begin(video=SAMPLE)
    watch(viewer, 3.6)
    assert viewer.session.time == 3.5 and told(viewer) == [line for line in STORY if line[0] <= 3.5]
    viewer.watch_until(3.6)
    assert viewer.session.num_frames == 8, "no frame is watched twice"
    watch(viewer)
    assert viewer.ended and told(viewer) == STORY and len(viewer.moments) == viewer.session.num_frames
    assert [m.time for m in viewer.moments if m.spoke] == [time for time, _ in STORY]
    viewer.ask("How many things do you see?")
    assert viewer.session.events[-1].role == "assistant", "questions are answered after the end"

    with pytest.raises(ValueError, match="This video has no frames from 99.0 s on"):
        viewer.begin(video=SAMPLE, start=99.0)
    assert told(viewer)[:5] == STORY, "the previous stream goes on"
    viewer.begin(video=SAMPLE, start=4.0)
    watch(viewer)
    assert (
        viewer.moments[0].time == 4.0
        and viewer.session.events[0].role == "user"
        and not viewer.session.events[0].time > 4
    )


def test_camera_frames_and_settings(parts):
    viewer = Viewer(*parts, query=" ")
    frames = [(0.5 * index, frame) for index, frame in enumerate(random_frames(4))]
    viewer.see(frames, dropped=3)
    viewer.see(frames[2:], dropped=1)
    assert viewer.session.num_frames == 4 and viewer.dropped == 6 and viewer.shape == frames[0][1].shape[:2]
    assert not any(e.role == "user" for e in viewer.session.events), "a blank query is not asked"
    assert viewer.waiting is None and not viewer.ended
    viewer.set_interval_threshold(1.0)
    before = len(viewer.session.events)
    viewer.see([(9.0, random_frames(1, seed=9)[0])])
    assert len(viewer.session.events) > before, "at a threshold of 1 the model always speaks"
    viewer.close()
    assert viewer.session.closed and sum(viewer.session.cache.lengths) == 0


def test_the_page_and_the_server_run_the_same_sessions(parts):
    """The same frames, settings and question give the same events and probabilities."""
    frames = [frame for _, frame in parts[1].read_video(SAMPLE, fps=2, end=4.5)]
    viewer, path = Viewer(*parts, interval_threshold=0.6), "/v1/streaming/sessions"
    with running(*parts, engine_options=ROOMY) as (address, server), httpx.Client(timeout=60) as client:
        path = f"http://{address}{path}"
        path += "/" + client.post(path, json={"interval_threshold": 0.6}).json()["id"]
        for number, frame in enumerate(frames):
            viewer.see([(number / 2, frame)])
            seen = client.post(f"{path}/frame?time={number / 2}", content=picture_file(frame)).json()["frame"]
            assert seen["interval_probability"] == pytest.approx(viewer.session.interval_probability, abs=1e-4)
        viewer.ask("How many things do you see?")
        client.post(f"{path}/ask", json={"text": "How many things do you see?"})
        (session,) = (live.stream.session for live in server.sessions)
    assert type(session) is type(viewer.session)
    assert said(session.events) == said(viewer.session.events) and len(viewer.events) > 3
    viewer.close()


def test_nobody_waits_for_a_compilation(parts, monkeypatch):
    model, processor = parts
    asked, stream = [], model.stream
    monkeypatch.setattr(model, "stream", lambda *given, **options: asked.append(options) or stream(*given, **options))
    Viewer(model, processor)
    assert [options["compile"] for options in asked] == [False], "on a GPU it is the default"


def test_words_are_shown_as_they_come(parts):
    """The caption grows by each word of a reply that has not ended."""
    frames = [(number / 2, frame) for number, (_, frame) in enumerate(parts[1].read_video(SAMPLE, fps=2, end=2.0))]
    viewer, drawn, captions_of = Viewer(*parts), threading.Semaphore(0), {}

    def see():
        tell = viewer.on_words
        viewer.on_words = lambda: (tell(), drawn.acquire(timeout=30))
        viewer.see(frames)

    with ThreadPoolExecutor(1) as pool:
        for _ in viewer.while_speaking(see, pool):
            captions_of.setdefault(len(told(viewer)), []).append(drawing.caption(viewer))
            drawn.release()
    first = told(viewer)[0][1]
    assert len(captions_of[0]) == len(set(captions_of[0])) >= len(first.split()) > 2
    assert captions_of[0] == sorted(captions_of[0], key=len)
    assert first.split()[0] in captions_of[0][0] and first.rstrip(".") not in captions_of[0][0]
    viewer.close()


def test_a_new_session_replaces_one_that_fills_the_context(parts):
    viewer = Viewer(*parts)
    viewer.context = 400
    lengths = []
    for index, frame in enumerate(random_frames(60)):
        viewer.see([(0.5 * index, frame)])
        lengths.append(int(viewer.session.cache.get_seq_length()))
    assert max(lengths) < 400 and sum(b < a for a, b in zip(lengths, lengths[1:], strict=False)) >= 2
    asked = [e for e in viewer.events if e.role == "user"]
    assert len(asked) >= 3 and [e.time for e in viewer.events] == sorted(e.time for e in viewer.events)


def test_a_damaged_file_ends_the_stream_with_one_message(parts, monkeypatch):
    viewer = Viewer(*parts)
    viewer.begin(video=SAMPLE)

    def break_off():
        yield from [(0.5, random_frames(1)[0])]
        raise ValueError("/a/path/of/the/server is broken")

    monkeypatch.setattr(viewer, "_frames", break_off())
    with pytest.raises(ValueError, match=r"^This video is damaged after 0\.5 s\. The stream ends there\.$"):
        viewer.watch_until(5.0)
    assert viewer.ended and viewer.session.num_frames == 2
    viewer.watch_until(5.0)


def test_both_sides_of_a_comparison_watch_the_same_frames(parts):
    model, processor = parts
    full = VideoLLMMoDForConditionalGeneration.from_pretrained(ROOT, mod_keep_ratio=1.0).eval()
    steps = [
        [viewer.session.num_frames for viewer in viewers] for viewers in compare((model, full), processor, SAMPLE)
    ]
    assert steps == [[index, index] for index in range(1, 18)]
    *_, (routed, plain) = compare((model, full), processor, SAMPLE)
    assert told(routed) == STORY and sum(routed.session.cache.lengths) < sum(plain.session.cache.lengths)
    assert plain.cost().flops_ratio == 1 and routed.cost().flops_ratio < 1
    assert "GFLOP" in drawing.figures(routed) and drawing.figures(routed) != drawing.figures(plain)
    assert 0 < routed.session.frame_latency < routed.seconds
    *_, (cut, _) = compare((model, full), processor, SAMPLE, end=2.0)
    assert cut.session.time == 2.0 and cut.ended


def test_the_idlest_person_loses_the_seat_to_a_new_one(parts):
    left = []
    room = Room(2, patience=0.2, on_leave=left.append)
    one, two, again, three = (Viewer(*parts) for _ in range(4))
    one.begin(video=SAMPLE)
    room.enter("one", one)
    room.enter("two", two)
    assert room.find("one") is one and room.find("nobody") is None and room.watches(SAMPLE)
    with pytest.raises(RoomIsFull, match="All 2 seats are taken"):
        room.enter("three", three)
    room.enter("two", again)
    assert room.find("two") is again and two.session.closed and len(room) == 2
    threading.Event().wait(0.3)
    again.see([(0.0, random_frames(1)[0])])
    room.enter("three", three)
    assert one.session.closed and not one.folder.exists() and not room.watches(SAMPLE)
    assert not again.session.closed and again.folder.exists() and room.find("three") is three
    room.leave("three")
    room.leave("three")
    assert len(room) == 1 and left == [two, one, three]


def test_an_address_has_few_seats_and_loses_those_of_closed_pages(parts):
    room = Room(3, per_address=2)
    streams = {name: Viewer(*parts) for name in ("a", "b", "c", "d", "e")}
    for name in ("a", "b"):
        room.enter(name, streams[name], address="here")
    with pytest.raises(RoomIsFull, match="^Your address has 2 streams, the most. Close one, or try again"):
        room.enter("c", streams["c"], address="here")
    room.enter("d", streams["d"], address="there")
    with pytest.raises(RoomIsFull, match="All 3 seats are taken"):
        room.enter("e", streams["e"], address="elsewhere")
    room.absence = 0.0
    room.find("a")
    room.enter("c", streams["c"], address="here")
    assert streams["b"].session.closed and room.find("a") and room.find("c") and len(room) == 3
    with pytest.raises(RoomIsFull, match="All 3 seats are taken"):
        room.enter("e", streams["e"], address="elsewhere")
    room.enter("e", streams["e"], address="there")
    assert streams["d"].session.closed and not streams["a"].session.closed, "an address frees its own seats only"


@pytest.mark.parametrize(
    ("proxies", "told", "expected"),
    [
        (0, ["9.9.9.9"], "7.7.7.7"),
        (1, ["9.9.9.9, 1.2.3.4"], "1.2.3.4"),
        (1, ["9.9.9.9", "1.2.3.4:5678"], "1.2.3.4"),
        (2, ["9.9.9.9, 2001:db8::1, 10.0.0.1"], "2001:db8::1"),
        (2, ["9.9.9.9"], "7.7.7.7"),
        (1, [], "7.7.7.7"),
        (None, ["9.9.9.9"], None),
    ],
)
def test_nobody_can_forge_an_address(proxies, told, expected):
    headers = [(b"x-forwarded-for", line.encode()) for line in told]
    request = Request({"type": "http", "headers": headers, "client": ("7.7.7.7", 5000)})
    assert address_of(request, proxies) == expected


def test_videos_beyond_a_limit_are_refused_in_one_sentence(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    assert Limits().check(clip, VideoReader) == pytest.approx(2.0, abs=0.11)
    for limits, message in (
        (Limits(megabytes=0), "This file has 0 MB. The limit is 0 MB"),
        (Limits(seconds=1.0), r"lasts 0 min. The limit is 0 min"),
        (Limits(pixels=100), r"video has \d+x\d+ pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            limits.check(clip, VideoReader)
    # Playlists and lists of parts name other files to open. They are refused, whatever the file's name.
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'clip.mp4'\n")
    (tmp_path / "self.mp4").write_text("ffconcat version 1.0\nfile 'self.mp4'\n")
    (tmp_path / "hls.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n")
    for path in (ROOT / "README.md", *(tmp_path / f"{name}.mp4" for name in ("list", "self", "hls"))):
        with pytest.raises(ValueError, match="cannot be read as a video"):
            Limits().check(path, VideoReader)
        with pytest.raises(ValueError, match="cannot be read as video"):
            captions.burn_in(path, [], tmp_path / "out.mp4", open_video=partial(VideoReader, formats=FORMATS))


# ------------------------------------------------------------------------------------------------------------- drawing


def test_the_overlay_shows_the_kept_patches(parts):
    viewer = Viewer(*parts)
    assert drawing.overlay(viewer) == ""
    viewer.begin(video=SAMPLE)
    watch(viewer, 1.0)
    config = viewer.model.config
    assert drawing.overlay_choices(config) == ["share of layers", *(f"layer {i}" for i in config.routed_layers), "off"]
    for layer in config.routed_layers:
        drawn = ElementTree.fromstring(drawing.overlay(viewer, f"layer {layer}"))
        bright = [cell for cell in drawn if cell.get("fill") != "none" and float(cell.get("fill-opacity")) == 0]
        assert len(bright) == config.layer_keep_counts[layer] == len([c for c in drawn if c.get("fill") == "none"])
        grid = [float(cell.get("fill-opacity")) == 0 for cell in drawn if cell.get("fill") != "none"]
        assert grid == viewer.session.kept_tokens[layer].tolist()
    assert drawing.overlay(viewer, "off") == ""
    viewer.see([(9.0, np.zeros((60, 100, 3), dtype=np.uint8))])
    cells = [c for c in ElementTree.fromstring(drawing.overlay(viewer)) if c.get("fill") != "none"]
    # The encoder sees the picture centered in a square.
    assert (cells[0].get("x"), cells[0].get("y"), cells[0].get("width")) == ("0.0", "-20.0", "12.5")


@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        ("pad", (0, -20, 12.5, 12.5)),
        ("stretch", (0, 0, 12.5, 7.5)),
        ("crop", (20, 0, 7.5, 7.5)),
    ],
)
def test_the_overlay_lies_where_the_encoder_looks(parts, monkeypatch, fit, expected):
    monkeypatch.setattr(parts[1].video_processor, "fit", fit)
    viewer = Viewer(*parts)
    viewer.begin(video=SAMPLE)
    watch(viewer, 0.5)
    viewer.see([(9.0, np.zeros((60, 100, 3), dtype=np.uint8))])
    cell = ElementTree.fromstring(drawing.overlay(viewer))[0]
    assert tuple(float(cell.get(name)) for name in ("x", "y", "width", "height")) == expected


def test_plots_are_well_formed_and_described(parts):
    viewer = Viewer(*parts)
    assert "shown from the first frame on" in drawing.savings(viewer)
    for plot in (drawing.silence_plot, drawing.latency_plot):
        ElementTree.fromstring(plot(viewer))
    viewer.begin(video=SAMPLE)
    watch(viewer)
    plot = ElementTree.fromstring(drawing.silence_plot(viewer))
    assert len(plot.findall(".//circle")) == len(STORY)
    assert len(plot.find(".//polyline").get("points").split()) == viewer.session.num_frames
    assert len(ElementTree.fromstring(drawing.latency_plot(viewer)).findall(".//rect")) == viewer.session.num_frames
    cost = viewer.cost()
    assert drawing.savings(viewer).count(f"{1 - cost.flops_ratio:.0%} saved") >= 1
    assert "4 of 6 layers keep 13 of 64 tokens" in drawing.savings(viewer)


def test_a_converted_model_is_drawn(tmp_path):
    """It has no routed layer, no token of silence, and a policy."""
    save_source("smolvlm", tmp_path / "theirs")
    with pytest.raises(ValueError, match="its type is smolvlm. Convert it first: videollm-mod convert .*theirs OUT$"):
        space_app.App(str(tmp_path / "theirs"))
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    processor, model = load_checkpoint(str(tmp_path / "ours"))
    viewer = Viewer(model, processor)
    viewer.begin(video=SAMPLE)
    watch(viewer)
    assert "17 frames, no layer is routed" in drawing.savings(viewer) and drawing.overlay(viewer) == ""
    plot = drawing.silence_plot(viewer)
    assert "speaks by every" in plot and len(ElementTree.fromstring(plot).findall(".//circle")) > 1
    assert drawing.chat(viewer) and drawing.caption(viewer)
    ElementTree.fromstring(drawing.latency_plot(viewer))
    blocks = space_app.App(str(tmp_path / "ours")).build().blocks.values()
    parts = {getattr(block, "elem_id", None): block for block in blocks}
    assert parts["query"].value == "" and not parts["shown"].visible
    assert [block.visible for block in blocks if getattr(block, "label", None) == "Compare"] == [False]


def test_typed_text_is_escaped(parts):
    viewer = Viewer(*parts, query="<script>alert(1)</script>")
    viewer.begin(video=SAMPLE)
    viewer.watch_until(0.0)
    assert drawing.chat(viewer)[0]["content"] == "0.0 s   &lt;script&gt;alert(1)&lt;/script&gt;"
    viewer.session.events.append(event(1.0, "<img src=x>"))
    assert drawing.caption(viewer) == '<div class="live" aria-hidden="true"><span>&lt;img src=x&gt;</span></div>'
    assert [drawing.amount(n, "B") for n in (0, 999, 1500, 2.34e9)] == ["0 B", "999 B", "1.5 kB", "2.34 GB"]


# ---------------------------------------------------------------------------------------------------------- deployment


def test_sent_frames_must_be_pictures():
    for url in ("", "file:///etc/passwd", "data:image/png;base64,@@", "data:text/html;base64,aGk=", None):
        with pytest.raises(gr.Error, match="a data URL of a JPEG"):
            read_frame({"time": 1.0, "image": url})
    large = io.BytesIO()
    Image.new("RGB", (1025, 1024)).save(large, "PNG")
    with pytest.raises(gr.Error, match="at most 1 MP"):
        url = f"data:image/png;base64,{base64.b64encode(large.getvalue()).decode()}"
        read_frame({"time": 1.0, "image": url})
    picture = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    time, frame = read_frame({"time": "1.5", "image": url})
    assert time == 1.5 and frame.shape == (3, 4, 3) and frame[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(gr.Error, match="`time` must be a number from 0 to"):
        read_frame({"time": "soon", "image": url})


def test_the_folder_is_a_space(tmp_path):
    """It has front matter and requirements, and imports nothing outside the folder."""
    front = SpaceCard.load(SPACE / "README.md").data.to_dict()
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["license"] == "apache-2.0"
    assert len(front["short_description"]) <= 60 and gr.__version__.split(".")[0] == front["sdk_version"].split(".")[0]
    required, stated = (SPACE / "requirements.txt").read_text().split(), (ROOT / "pyproject.toml").read_text()
    assert [line for line in required if f'"{line}"' not in stated] == [], "the package has the same ranges"
    needed = {re.split(r"[<>=]", line)[0] for line in required}
    assert {"gradio", "torch", "torchvision", "transformers", "av", "accelerate"} <= needed
    text = "".join(path.read_text(encoding="utf-8") for path in SPACE.glob("*.py"))
    assert "import videollm_mod" not in text and "from videollm_mod" not in text
    assert sum(path.stat().st_size for path in SPACE.rglob("*") if path.is_file()) < 25e6
    page = space_app.App(str(copy_embedded(tmp_path / "copy")), seats=2)
    names = {function.api_name for function in page.build().fns.values()}
    assert {"open_video", "open_camera", "watch", "ask", "export", "compare", "reset"} <= names
    assert not page.is_toy and space_app.App(str(ROOT)).is_toy


def test_the_page_finds_a_checkpoint_around_it_or_beside_it(tmp_path, monkeypatch):
    assert space_app.embedded_checkpoint() == ROOT and space_app.sample_videos()[0] == SAMPLE
    monkeypatch.setattr(space_app, "HERE", tmp_path / "space")
    assert space_app.embedded_checkpoint() is None and space_app.sample_videos() == []
    for folder in (tmp_path / "space" / "checkpoint", tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "other"}')
        assert space_app.embedded_checkpoint() != folder
        (folder / "config.json").write_text('{"model_type": "videollm_mod"}')
        assert space_app.embedded_checkpoint() == folder, "the checkout comes first"


def test_a_space_without_a_checkpoint_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(space_app, "HERE", tmp_path / "space")
    monkeypatch.setenv("MODEL_ID", "")
    done = run_main(space_app.main)
    told = "error: there is no checkpoint here: set MODEL_ID to a Hub id or a folder, or pass --model.\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_a_private_model_by_its_name_in_the_environment(tmp_path):
    """As on a Space, `MODEL_ID` names the model and the secret `HF_TOKEN` opens it."""
    with Hub() as hub:
        repo, served = "somebody/private", []
        hub.repos[repo] = [embedded_files()]
        hub.private.add(repo)
        with hub.used_here(tmp_path / "open"), pytest.MonkeyPatch.context() as patch:
            patch.setenv("MODEL_ID", repo)
            patch.setattr(space_app.gr.Blocks, "launch", lambda *_, **__: served.append(True))
            done = run_main(space_app.main)
        assert done.returncode == 0 and served, done.stderr[-2000:]
        with hub.used_here(tmp_path / "closed"), pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", "")
            refused = run_main(space_app.main, "--model", repo)
        assert refused.returncode == 1 and "error: somebody/private is not" in refused.stderr


@pytest.mark.parametrize(
    ("name", "given", "least"),
    [("SEATS", "eight", 1), ("SEATS_PER_ADDRESS", "1.5", 1), ("PROXIES", "one", 0), ("SEATS", "0", 1)],
)
def test_a_wrong_number_in_the_environment_is_named(monkeypatch, name, given, least):
    monkeypatch.setenv(name, given)
    done = run_main(space_app.main)
    assert done.returncode == 1
    assert done.stderr == f"error: {name} must be a whole number from {least} to 10000, not '{given}'.\n"


def test_a_busy_port_is_named(monkeypatch):
    for name in ("SEATS", "SEATS_PER_ADDRESS", "PROXIES"):
        monkeypatch.setenv(name, "")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = run_main(space_app.main, "--port", port)
    assert done.returncode == 1
    told = f"error: Cannot find empty port in range: {port}-{port}. Choose a free one with --port.\n"
    assert done.stderr == "loading the embedded checkpoint ...\n" + told
