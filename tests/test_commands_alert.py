# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Alerts: when they go off, and how a webhook learns of them, against servers on loopback."""

import importlib.util
import itertools
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from broadcast import encode, headers, http_server, paced
from scripted import BrightnessSession, write_brightness
from tiny import tiny_processor
from typer.testing import CliRunner

from videollm_mod import ReadingReport, cli, video_reading_videollm_mod
from videollm_mod.commands import alert, windows
from videollm_mod.commands.alert import Alert, Webhook, name_source, watch_for
from videollm_mod.commands.watching import CtrlC


HAS_SOCKS = importlib.util.find_spec("socksio") is not None
# Longer than any test may take, where a thread must not wait for it.
FOREVER = 60


@contextmanager
def webhook_server(*answers):
    """Serve these status codes one after the other, the last one for ever; yield the address and what was posted."""
    posted, codes, gone = [], list(answers), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, json.loads(body)))
            code = codes.pop(0) if len(codes) > 1 else codes[0]
            if code is None:
                gone.wait(FOREVER)
                return
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", posted
        gone.set()
        server.shutdown()


def test_an_alert_goes_off_once_until_the_answer_was_no():
    alert = Alert("a lamp", 0.5)
    probabilities = [0.2, 0.49, 0.5, 0.9, 0.45, 0.55, 0.4, 0.6, 0.39, 0.51, 0.1]
    assert [alert.turns_on(probability) for probability in probabilities] == [
        *(False, False, True, False),
        # 0.45 is below the threshold and no clear no.
        *(False, False, False, False),
        *(False, True, False),
    ]


# ------------------------------------------------------------------------------------------------------------- webhook


def test_a_server_that_fails_twice_gets_each_payload_in_order():
    said = []
    with webhook_server(503, 429, 200) as (url, posted):
        hook = Webhook(f"{url}/hook?key=SECRET", said.append, waits=(0.01, 0.01))
        hook.post({"alert": 1})
        hook.post({"alert": 2})
        hook.close(FOREVER)
    assert [body["alert"] for _, body in posted] == [1, 1, 1, 2] and said == []
    assert posted[0][0] == "/hook?key=SECRET"


@pytest.mark.parametrize(("code", "tries"), [(500, 3), (401, 1), (302, 1)])
def test_a_server_that_refuses_costs_one_line_without_secrets(code, tries):
    said = []
    with webhook_server(code) as (url, posted):
        hook = Webhook(url.replace("://", "://user:SECRET@") + "/SECRET", said.append, waits=(0.01, 0.01))
        hook.post({"alert": 1})
        hook.close(FOREVER)
    times = ", 3 times" if tries == 3 else ""
    assert said == [f"an alert was not sent to {url}: it answered {code}{times}"]
    assert len(posted) == tries


def test_a_server_that_is_not_there():
    said = []
    with webhook_server(200) as (url, _):
        pass
    hook = Webhook(f"{url}/SECRET", said.append, waits=(0.01,))
    hook.post({"alert": 1})
    hook.close(FOREVER)
    assert said == [f"an alert was not sent to {url}: the connection failed (ConnectError), 2 times"]


def test_a_server_that_does_not_answer_blocks_nobody():
    said = []
    with webhook_server(None) as (url, posted):
        hook = Webhook(url, said.append, timeout=FOREVER, most_waiting=2)
        hook.post({"alert": 0})
        while not posted:
            time.sleep(0.01)
        for number in (1, 2, 3):
            hook.post({"alert": number})
        assert said == [f"{url} is too slow: an alert was not sent"]
        hook.close(0.05)
        assert said[1:] == [f"3 alerts were not sent to {url}: there was no time left"]
        quick = Webhook(url, said.append, timeout=0.05, waits=())
        quick.post({"alert": 4})
        quick.close(FOREVER)
    assert said[2:] == [f"an alert was not sent to {url}: no answer within 0.05 s"]


@pytest.mark.parametrize("url", ["ftp://host/SECRET", "SECRET", "http://", "http://[SECRET", "http://host:SECRET/"])
def test_an_address_that_is_none_is_not_repeated(url):
    with pytest.raises(ValueError, match="--webhook must be an address") as caught:
        Webhook(url, print)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SSL_CERT_FILE", "/nowhere/SECRET.pem", "No such file"),
        ("ALL_PROXY", "ftp://me:SECRET@proxy", "Unknown scheme"),
        ("ALL_PROXY", "http://me:SECRET#1@proxy", "its address is wrong"),
        pytest.param("ALL_PROXY", "socks5://proxy", "socksio", marks=pytest.mark.skipif(HAS_SOCKS, reason="works")),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line_before_a_model_is_loaded(
    tmp_path, monkeypatch, name, value, reason
):
    monkeypatch.setattr(cli, "open_session", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setenv(name, value)
    video = write_brightness(tmp_path / "door.mp4", [0.1])
    options = ["--alert", "a lamp", "--webhook", "https://place.example/SECRET"]
    done = CliRunner().invoke(cli.app, ["watch", str(video), *options])
    assert done.exit_code == 1 and done.stderr.startswith("error: --webhook cannot use the proxy"), done.output
    assert reason in done.stderr and done.stderr.count("\n") == 1 and "SECRET" not in done.output


def test_a_source_is_named_without_secrets():
    assert name_source("rtsp://me:SECRET@cam.local:554/SECRET") == "rtsp://cam.local"
    for password in ("pa#SECRET", "SECRET/", "[SECRET", "SECRET]", "SECRET\uff1f", "S@SECRET"):
        assert name_source(f"rtsp://me:{password}@cam7/1") == "rtsp://cam7"
    assert name_source("http://[::1]:80/a") == "http://[::1]"
    assert name_source("/home/SECRET/door.mp4") == name_source("file:///home/SECRET/door.mp4") == "door.mp4"
    assert name_source("camera:0") == "camera:0"
    assert name_source(os.fsdecode(b"/home/caf\xe9.mp4")) == r"caf\udce9.mp4", "JSON for a webhook is Unicode"


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def bright(monkeypatch):
    monkeypatch.setattr(cli, "open_session", lambda *_, fps, **__: (tiny_processor(), BrightnessSession(fps)))


@pytest.mark.usefixtures("bright")
def test_watch_prints_and_posts_each_alert(tmp_path):
    video = write_brightness(tmp_path / "door.mp4", [0.1, 0.9, 0.8, 0.1, 0.9])
    options = ["watch", str(video), "--alert", "a lamp", "--alert", "Is it dark?", "--every", "1"]
    with webhook_server(200) as (url, posted):
        done = CliRunner().invoke(cli.app, [*options, "--webhook", f"{url}/SECRET"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "   1.0s  Is it dark? (0.90)",
        "   2.0s  a lamp (0.90)",
        "   4.0s  Is it dark? (0.90)",
        "   5.0s  a lamp (0.90)",
    ]
    bodies = [body for _, body in posted]
    assert [(body["time"], body["alert"]) for body in bodies] == [
        (1, "Is it dark?"),
        (2, "a lamp"),
        (4, "Is it dark?"),
        (5, "a lamp"),
    ]
    assert bodies[1]["text"] == "a lamp (door.mp4, 2.0 s)" and bodies[1]["source"] == "door.mp4"
    assert bodies[1]["probability"] == pytest.approx(0.9, abs=0.01) and "T" in bodies[1]["at"]
    assert "SECRET" not in done.output
    done = CliRunner().invoke(cli.app, [*options, "--json"])
    assert [json.loads(line)["alert"] for line in done.stdout.splitlines()] == ["Is it dark?", "a lamp"] * 2


@pytest.mark.parametrize(("frame", "question", "rate"), [(0.3, 0.1, 2), (0.5, 0.1, 1), (0.3, 1.0, 1), (0.3, 2.8, 0.5)])
def test_a_camera_is_watched_at_a_rate_that_keeps_up_with_frames_and_questions(
    monkeypatch, capsys, frame, question, rate
):
    """With a scripted clock; the camera waits for the model."""
    now, seen = [0.0], []

    class Slow(BrightnessSession):
        def __init__(self, fps):
            super().__init__(fps)
            self.chunk_frames = 1  # frames come one by one

        def fork(self):
            return Slow(self.fps)

        def push(self, frames, *, time):
            now[0] += frame * len(frames)
            seen.extend(time)
            super().push(frames, time=time)

        def probe(self, asked):
            now[0] += question
            return super().probe(asked)

    pictures = [(k / 2, np.full((8, 8, 3), 250 if k >= 32 else 10, np.uint8)) for k in range(40)]
    monkeypatch.setattr(windows, "clock", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(video_reading_videollm_mod, "read_video", lambda *_, **__: iter(pictures))
    reading = {"fps": 2.0, "timeout": None, "reconnect": None, "report": None, "shows_progress": False}
    options = {"every": 2.0, "webhook": None, "as_json": False, "may_slow": True, "when_behind": "block"}
    watch_for(tiny_processor(), "camera:0", Slow(2.0), [Alert("a lamp", 0.5)], CtrlC(), **options, **reading)
    out, told = capsys.readouterr()
    assert out == "  18.0s  a lamp (0.98)\n"
    # The first window shows how long a question takes, and two frames after it how long a frame does.
    assert seen[:6] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert {after - before for before, after in itertools.pairwise(seen[5:])} == {1 / rate}
    shown = "1 frame per second is" if rate == 1 else f"{rate:g} frames per second are"
    slowed = f"a frame takes {frame + question / 4:.2g} s here, so {shown} watched"
    assert told == ("" if rate == 2 else f"{slowed}; --fps chooses another rate\n")


def test_dropped_frames_are_counted_at_the_end(monkeypatch, capsys):
    def read(_, __, session, **___):
        for second in (0.0, 0.5):
            session.count_dropped()
            yield [(second, torch.zeros(8, 8, 3, dtype=torch.uint8))]

    monkeypatch.setattr(alert, "read_frames", read)
    options = {"every": 2.0, "webhook": None, "report": ReadingReport()}
    for as_json in (False, True):
        watch_for(
            None, "camera:0", BrightnessSession(2.0), [Alert("a lamp", 0.5)], CtrlC(), as_json=as_json, **options
        )
        out, told = capsys.readouterr()
        assert (
            json.loads(out)["summary"]["frames_dropped"] == 2
            if as_json
            else told == ("2 frames came too fast and were dropped.\n")
        )


@pytest.mark.usefixtures("bright")
@pytest.mark.parametrize(("given", "may_slow"), [([], True), (["--fps", "2"], False)])
def test_watch_chooses_the_rate_unless_it_is_given(tmp_path, monkeypatch, given, may_slow):
    asked = {}
    monkeypatch.setattr(cli, "watch_for", lambda *_, **options: asked.update(options))
    video = write_brightness(tmp_path / "door.mp4", [0.1])
    done = CliRunner().invoke(cli.app, ["watch", str(video), "--alert", "a lamp", *given])
    assert done.exit_code == 0, done.output
    assert (asked["fps"], asked["may_slow"]) == (2.0, may_slow)


@pytest.mark.usefixtures("bright", "heeds_ctrl_c")
def test_ctrl_c_ends_a_live_watch_while_the_webhook_hangs():
    """The program ends at once: it waits neither for the source nor for the webhook."""
    frames = np.stack([np.full((32, 32, 3), 250, np.uint8)] * 100)

    def answer(request, _):
        headers(request)
        paced(encode(frames, "mpegts"), request.wfile.write)

    with http_server(answer) as source, webhook_server(None) as (url, posted):
        stopped = []

        def stop():
            while not posted:
                time.sleep(0.01)
            stopped.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=stop, daemon=True).start()
        options = ["--alert", "a lamp", "--every", "0.5", "--webhook", url]
        done = CliRunner().invoke(cli.app, ["watch", f"{source}/live.ts", *options])
        assert time.monotonic() - stopped[0] < FOREVER / 10
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("   0.5s  a lamp (0.9")
    assert f"1 alert was not sent to {url}" in done.stderr and "stopped after" in done.stderr


@pytest.mark.usefixtures("bright")
def test_a_source_that_breaks_off_gets_its_last_alert_sent(tmp_path):
    """It breaks off within the second window. The server of the webhook takes longer than Ctrl+C would wait."""
    video = write_brightness(tmp_path / "lamp.ts", [0.1, 0.1, 0.9]).read_bytes()

    def answer(request, _):
        headers(request, length=2 * len(video))
        request.wfile.write(video)

    with http_server(answer) as source, webhook_server(503, 200) as (url, posted):
        options = ["--alert", "a lamp", "--every", "2", "--webhook", url]
        done = CliRunner().invoke(cli.app, ["watch", f"{source}/lamp.ts", *options])
    assert done.exit_code == 1 and "stopped after 2." in done.stderr, done.output
    assert [body["alert"] for _, body in posted] == ["a lamp"] * 2 and "not sent" not in done.stderr
    assert "s  a lamp (0.9" in done.stdout


def test_mistakes_are_reported_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "open_session", lambda *_, **__: pytest.fail("a model was loaded"))
    video = write_brightness(tmp_path / "door.mp4", [0.1])
    for options, error in (
        (["--alert", "a lamp", "--webhook", "SECRET"], "error: --webhook must be an address"),
        (["--alert", " "], "error: What to look for is empty"),
        (["--alert", "a lamp", "--every", "0.1"], "error: --every 0.1 is shorter than a frame"),
    ):
        done = CliRunner().invoke(cli.app, ["watch", str(video), *options])
        assert done.exit_code == 1 and error in done.stderr and "SECRET" not in done.output
    assert CliRunner().invoke(cli.app, ["watch", str(video)]).exit_code == 2
