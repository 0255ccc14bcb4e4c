# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What clients send to the page: nothing in any place of any endpoint ends in more than one line."""

import base64
import io
import math
import os
import re
import shutil
import threading
import time as clock
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import app as space_app
import drawing
import gradio as gr
import page as space_page
import pytest
from gradio.data_classes import FileData
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from starlette.datastructures import Headers
from tiny import random_frames, write_clip
from viewer import NARRATE, Viewer

from videollm_mod.speaking_videollm_mod import DEFAULT_PROMPT, POLICIES
from videollm_mod.train.data.world.drawing import open_video


ROOT = Path(__file__).parents[1]
SAMPLE = str(ROOT / "samples" / "streamworld.mp4")
WRONG = (None, "inf", "nan", math.inf, math.nan, -1, 1e18, 10**400, "x", [], {}, True, 1j, "\ud800", b"x")


def data_url():
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


IMAGE = data_url()


@pytest.fixture(scope="module")
def page():
    return space_app.App(str(ROOT))


@pytest.fixture
def request_(page, monkeypatch):
    monkeypatch.setattr(gr, "Warning", lambda *_: None)
    yield SimpleNamespace(session_hash="one", query_params={}, client=None, headers=Headers())
    page.room.leave("one")


def tried(function, *arguments):
    """Call a handler, and return the line of its error, if it has one."""
    try:
        made = function(*arguments)
        _ = list(made) if hasattr(made, "__next__") else None
    except gr.Error as error:
        assert error.message and "\n" not in error.message and not error.print_exception
        return error.message
    return None


def test_every_argument_of_every_handler_may_be_anything(page, request_):
    camera, file = (2.0, 0.5, "Hi", True), (SAMPLE, 2.0, 0.5, "Hi")
    watch, ask, reset = ([], 0, 1.0, None, "off"), ("What?", "now", "off"), (2.0, 0.5, "Hi", 0.0)
    for wrong in WRONG:
        for before, handler, good in (
            ((), page.open_video, file),
            ((), page.open_camera, camera),
            ((page.open_camera, camera), page.watch, ([{"time": 0.5, "image": IMAGE}], *watch[1:])),
            ((page.open_camera, camera), page.ask, ask),
            ((page.open_camera, camera), page.reset, reset),
            ((page.open_video, file), page.watch, watch),
            ((page.open_video, file), page.reset, reset),
            ((page.open_video, file), page.set_interval_threshold, (0.5,)),
            ((page.open_video, file), page.choose_overlay, ("off",)),
            ((page.open_video, file), page.export, ("SubRip (.srt)",)),
        ):
            if before:
                before[0](*before[1], request_)
            for place in range(len(good)):
                tried(handler, *good[:place], wrong, *good[place + 1 :], request_)
        page.settings(wrong, wrong, wrong, wrong, wrong, wrong, wrong)
        for name in ("speak", "every", "speak_threshold", "prompt"):
            speaking = {"speak": "probe", name: wrong}
            tried(lambda *given, speaking=speaking: page.open_video(*given, **speaking), *file, request_)


@pytest.mark.parametrize("time", ["inf", "nan", math.inf, math.nan, -1, 1e18, 10**400, "soon", None, True, []])
def test_a_wrong_time_does_not_end_the_stream(page, request_, time):
    page.open_camera(2.0, 0.5, "", True, request_)
    said = tried(page.watch, [{"time": time, "image": IMAGE}], 0, None, None, "off", request_)
    assert said.startswith("`time` must be a number from 0 to 1e+06, not ")
    assert "A frame is a `time`" in tried(page.watch, [{"image": IMAGE}], 0, None, None, "off", request_)
    list(page.watch([{"time": "0.5", "image": IMAGE}, {"time": 1, "image": IMAGE}], 0, None, None, "off", request_))
    assert page.room.find("one").session.time == 1.0 and page.room.find("one").session.num_frames == 2


def test_nothing_stands_for_the_default(page, request_):
    page.open_camera(2.0, 0.5, None, True, request_)
    viewer = page.room.find("one")
    list(page.watch([{"time": 0.5, "image": IMAGE}], None, None, None, None, request_))
    assert viewer.query == "" and viewer.session.num_frames == 1 and viewer.dropped == 0
    list(page.watch(None, None, None, None, None, request_))
    assert "is not valid Unicode" in tried(page.ask, "a \ud800 b", "now", "off", request_)
    page.reset(1.0, 0.25, None, None, request_)
    assert (viewer.fps, viewer.interval_threshold, viewer.query) == (1.0, 0.25, "")
    assert tried(page.reset, None, 0.5, "Hi", 0.0, request_) == "`fps` must be a number from 0.5 to 10, not None."
    page.open_video(SAMPLE, 2.0, 0.5, None, request_)
    viewer = page.room.find("one")
    assert "no frames from 99.0 s on" in tried(page.reset, 4.0, 0.25, "x", 99.0, request_)
    assert (viewer.fps, viewer.interval_threshold, viewer.query) == (2.0, 0.5, ""), "the stream goes on as it was"
    settings = SimpleNamespace(query_params={"fps": "nan", "interval_threshold": "inf"})
    assert not any(isinstance(found, (int, float)) for found in page.restore(settings))


def test_when_to_speak_is_a_setting(page, request_):
    page.open_video(SAMPLE, 2.0, 0.5, "", request_, speak="every", every=4.0)
    viewer = page.room.find("one")
    list(page.watch([], 0, 100.0, None, "off", request_))
    assert [event.time for event in viewer.events] == [0.0, 4.0, 8.0][: len(viewer.events)] != []
    assert [moment.spoke for moment in viewer.moments][0]
    assert "speaks by every" in drawing.silence_plot(viewer)
    assert 'class="threshold"' not in drawing.silence_plot(viewer)
    link = page.settings(2.0, 0.5, "Hi", "change", 4.0, 0.2, "What is new?")
    assert link.endswith("&speak=change&every=4.0&speak_threshold=0.2&prompt=What+is+new%3F")
    restored = page.restore(SimpleNamespace(query_params=dict(parse_qsl(link[1:]))))
    assert restored == [2.0, 0.5, "Hi", "change", 4.0, 0.2, "What is new?"]
    assert page.settings(2.0, 0.5, "Hi", "learned", 4.0, 0.2, "unused").endswith("query=Hi&speak=learned")
    page.reset(2.0, 0.5, "", 0.0, request_, "probe", 3.0, 0.9, " ")
    assert viewer.speaking == {"speak": "probe", "every": 3.0, "speak_threshold": 0.9}, (
        "an empty box means the default"
    )
    assert viewer.session.speak == "probe"
    page.reset(2.0, 0.5, "", 0.0, request_, "every", 2.0, None, "What do you see?")
    list(page.watch([], 0, 1.0, None, "off", request_))
    assert viewer.speaking["prompt"] == "What do you see?" and viewer.events
    wrong = tried(lambda *given: page.open_video(*given, speak="often"), SAMPLE, 2.0, 0.5, "", request_)
    assert wrong == "`speak` is one of learned, every, change, probe, not 'often'."
    wrong = tried(lambda *given: page.open_video(*given, speak="every", every=0), SAMPLE, 2.0, 0.5, "", request_)
    assert wrong == "`every` must be a number from 0.5 to 60, not 0."
    assert space_page.DEFAULT_PROMPT == DEFAULT_PROMPT
    assert set(POLICIES) == set(space_page.POLICIES.values())
    assert {name: POLICIES[name].default_threshold for name in space_page.THRESHOLDS} == space_page.THRESHOLDS


def test_frames_that_come_late_are_counted(page, request_):
    page.open_camera(2.0, 0.5, "", True, request_)
    frames = [{"time": time, "image": IMAGE} for time in (0.5, 1.0, 1.0, 0.2, 1.5)]
    list(page.watch(frames, 1, None, None, "off", request_))
    viewer = page.room.find("one")
    assert viewer.session.num_frames == 3 and viewer.dropped == 3
    assert "3 frames dropped" in drawing.latency_plot(viewer)


def test_the_page_says_once_that_the_model_falls_behind(page, request_, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Info", said.append)
    for stream in (1, 2):
        page.open_camera(2.0, 0.5, "", True, request_)
        for second, dropped in enumerate((1, 0, 4, 4)):
            list(page.watch([{"time": second + 0.5, "image": IMAGE}], dropped, None, None, "off", request_))
            assert len(said) == stream - (second < 2), "one frame of two is no reason"
    assert said[0] == "The model is slower than the camera: 5 frames were dropped. A lower fps may help."


def test_the_page_says_what_was_mended(page, request_, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Info", said.append)
    video = tmp_path / "spoilt.mkv"
    video.write_bytes(spoilt_video())
    page.open_video(str(video), 2.0, 0.5, "", request_)
    for _ in range(100):
        list(page.watch([], 0, 100.0, None, "off", request_))
        if page.room.find("one").ended:
            break
    list(page.watch([], 0, 100.0, None, "off", request_))
    assert len(said) == 1 and "spoilt" in said[0]


def test_words_are_shown_as_they_come(page, request_):
    page.open_camera(2.0, 0.5, "", True, request_)
    list(page.watch([{"time": 0.5, "image": IMAGE}], 0, None, None, "off", request_))
    viewer, seen = page.room.find("one"), [""]

    def wait(_, scores):
        # The model takes its next step when the person has seen the words so far.
        for _ in range(20_000):
            if viewer.words == seen[-1]:
                return scores
            clock.sleep(0.001)
        pytest.fail(f"nobody saw {viewer.words!r}")

    viewer.session.logits_processor = wait
    asked = page.ask("What do you see?", "now", "off", request_)
    assert next(asked)[0] == "", "the box is empty before the answer"
    for made in asked:
        _, chat, shown, *_, said = made
        if not isinstance(said, list):
            shown = unescape(re.search(r"<span>(.+)</span>", shown, flags=re.DOTALL)[1])
            assert viewer.is_busy and unescape(chat[-1]["content"]).endswith(shown)
            seen.append(shown)
    answer = viewer.events[-1].text
    assert len(seen) > 2 and all(answer.startswith(words.strip()) for words in seen) and seen == sorted(seen, key=len)
    assert said[-1]["text"] == answer and f">{answer}</span>" in unescape(shown) and len(chat) == len(viewer.events)
    assert viewer.words == "" and type(viewer.session).__name__ == "StreamingSession"


def test_a_jump_to_the_end_ends_the_stream(page, request_):
    page.open_video(SAMPLE, 2.0, 0.5, NARRATE, request_)
    viewer = page.room.find("one")
    list(page.watch([], 0, 0.1, None, "off", request_))
    for jump in (8.5, None, None):  # as the browser tells it at the end of this file
        assert tried(page.watch, [], 0, 9.5, jump, "off", request_) is None
    assert viewer.session.num_frames == 1 and viewer.ended, "what was skipped is not watched"
    list(page.watch([], 0, 5.0, 5.0, "off", request_))
    assert viewer.session.time == 5.0 and not viewer.ended


def test_a_jump_while_the_stream_is_busy_is_kept(page, request_):
    def watch():
        list(page.watch([], 0, 3.0, None, "off", request_))
        while viewer.waiting <= 3.0:  # A call watches for half a second at most.
            list(page.watch([], 0, 3.0, None, "off", request_))

    page.open_video(SAMPLE, 2.0, 0.5, NARRATE, request_)
    viewer = page.room.find("one")
    watch()
    said, session = [event.text for event in viewer.events], viewer.session
    assert len(said) > 0
    is_held, may_end = threading.Event(), threading.Event()

    def hold():
        with viewer.lock:
            is_held.set()
            may_end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    list(page.watch([], 0, 0.1, 0.0, "off", request_))
    held = viewer.session, viewer.dropped
    list(page.watch([{}] * 3, 4, None, None, "off", request_))  # as a camera's browser reports them
    may_end.set()
    holder.join()
    assert held == (session, 0) and viewer.dropped == 7
    watch()
    assert viewer.session is not session and viewer.jump is None
    assert [event.text for event in viewer.events] == said
    session = viewer.session
    watch()
    assert viewer.session is session, "it jumps once"


def test_a_video_of_no_generated_world_is_named(page, request_, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    with open_video(tmp_path / "doom.mp4", size=64, fps=4, seed=0, world="DoomWorld") as write:
        for picture in random_frames(4, size=(64, 64)):
            write(picture)
    for video in (SAMPLE, tmp_path / "doom.mp4"):
        page.open_video(str(video), 2.0, 0.5, "", request_)
    assert said == []
    other = write_clip(tmp_path / "other.mp4", random_frames(4, size=(64, 64)))
    page.open_video(str(other), 2.0, 0.5, "", request_)
    assert len(said) == 1 and said[0].startswith("This video is from neither of the worlds that the toy knows")


def spoilt_video():
    """Return the sample with a stretch of zeros in its middle."""
    content = bytearray(Path(SAMPLE).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    return bytes(content)


@pytest.fixture(scope="module")
def client(page):
    blocks = page.build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **page.launch_options())
    yield Client(url, verbose=False)
    blocks.close()


def test_clients_are_answered_in_one_line(client, capfd):
    def refused(*arguments, api_name, **options):
        with pytest.raises(AppError) as caught:
            client.predict(*arguments, api_name=api_name, **options)
        return str(caught.value)

    client.predict(2, 0.7, "Narrate.", True, api_name="/open_camera")
    for time in ("inf", "nan", -1, 1e300, None, [], {}):
        said = refused([{"time": time, "image": IMAGE}], 0, None, None, "off", api_name="/watch")
        assert "`time` must be a number from 0 to 1e+06" in said
    for frames in ([{}], [None], [1], ["x"], {"time": 0.0}, "x"):
        said = refused(frames, 0, None, None, "off", api_name="/watch")
        assert "A frame is a `time`" in said or "a list of at most 16 frames" in said
    assert "`fps` must be" in refused(None, 0.7, "Narrate.", True, api_name="/open_camera")
    assert "`interval_threshold` must be" in refused(2, None, "Narrate.", True, api_name="/open_camera")
    client.predict(2, 0.7, None, True, api_name="/open_camera")
    client.predict(None, None, None, None, None, api_name="/watch")
    client.predict(None, None, None, api_name="/ask")
    assert "A format is one of" in refused(None, api_name="/export")
    assert "Choose a video first" in refused(None, 2, 0.7, "Narrate.", api_name="/open_video")
    # Gradio itself would fetch it, of any size. This address is nobody's.
    address = {"path": "http://192.0.2.1/clip.mp4", "meta": {"_type": "gradio.FileData"}}
    assert "fetches nothing from addresses" in refused(address, 2, 0.7, "Narrate.", api_name="/open_video")
    assert "fetches nothing from addresses" in refused(address, 2, api_name="/compare")
    client.predict(handle_file(SAMPLE), 2, 0.7, None, api_name="/open_video")
    assert "Traceback" not in capfd.readouterr().err


def test_a_video_that_is_gone_is_named(page, request_, tmp_path):
    assert tried(page.open_video, str(tmp_path / "gone.mp4"), 2.0, 0.5, "", request_) == (
        "The video is no longer here. Choose it again."
    )
    assert isinstance(page.room.find("one"), Viewer | None)


def test_an_upload_stays_as_long_as_its_page_is_open(page, request_, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    upload = tmp_path / "clip.mp4"
    shutil.copyfile(SAMPLE, upload)
    page.open_video(str(upload), 2.0, 0.5, "", request_)
    clock.sleep(2.1)

    def watch():
        list(page.watch([], 0, 0.0, None, "off", request_))
        return upload.stat().st_mtime

    watch()
    delete_files_created_by_app(SimpleNamespace(blocks={}, temp_file_sets=[{str(upload)}]), age=2)
    os.utime(upload, (1, 1))
    assert watch() == 1, "once a minute is enough"
    page.room.find("one").kept -= 61
    assert watch() > 1
    upload.unlink()
    gone = "The video is no longer here. Choose it again."
    assert tried(page.reset, 2.0, 0.5, "", 1.0, request_) == gone
    assert tried(page.watch, [], 0, 1.0, 1.0, "off", request_) == gone
    before = Path(SAMPLE).stat()
    page.open_video(SAMPLE, 2.0, 0.5, "", request_)
    list(page.watch([], 0, 0.0, None, "off", request_))
    assert Path(SAMPLE).stat().st_mtime == before.st_mtime, "it is no upload"


def test_files_that_no_system_takes_for_videos_may_be_uploaded(page, tmp_path):
    boxes = [block for block in page.build().blocks.values() if getattr(block, "file_types", None)]
    assert {type(box) for box in boxes} == {gr.UploadButton, gr.File}, "to watch, and to compare"
    suffixes = {
        ".mp4",
        ".MOV",
        ".webm",
        ".avi",
        ".mpg",
        ".3gp",
        ".3g2",
        ".TS",
        ".mts",
        ".m2ts",
        ".mkv",
        ".m4v",
        ".flv",
    }
    for suffix in suffixes | {".gif", ".ogg", ".ogv", ".h264", ".264", ".hevc", ".ivf"}:
        name = f"clip{suffix}"
        (tmp_path / name).touch()
        for box in boxes:
            assert Path(box.preprocess(FileData(path=str(tmp_path / name)))).name == name
    for box in boxes:
        with pytest.raises(gr.Error, match="Invalid file type"):
            box.preprocess(FileData(path=str(tmp_path / "notes.txt")))
