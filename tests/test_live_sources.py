# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Live sources that stall, break off, drop and return, and Ctrl+C at any time, against servers on loopback."""

import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np
import pytest
from broadcast import FPS, broadcast, encode, free_udp_port, headers, http_server, paced, rtsp_server
from preloaded import start
from scripted import BrightnessSession, write_brightness
from tiny import random_frames, tiny_model, tiny_processor
from typer.testing import CliRunner

from videollm_mod import ReadingReport, VideoReader, cli, read_video
from videollm_mod.commands import watching
from videollm_mod.reading_ahead_videollm_mod import read_ahead


ROOT = Path(__file__).parents[1]
# A fast sender and receiver share two cores with the tests: times are right to this many seconds.
NEAR = 0.35


def numbered(count, first=0):
    """Return frames with their number as brightness."""
    return np.stack([np.full((96, 128, 3), 4 * index, np.uint8) for index in range(first, first + count)])


def numbers(frames):
    return [round(float(frame.mean()) / 4) for _, frame in frames]


def in_thread(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()


def read_all(url, timeout=1, **options):
    """Read frames until the source ends or fails; return times, numbers, the report and the failure."""
    times, found, report = [], [], ReadingReport()
    try:
        with VideoReader(url, timeout=timeout, report=report, **options) as reader:
            for time_, _, frame in reader.frames():
                times.append(float(time_))
                found.append(round(float(reader.picture(frame).mean()) / 4))
    except ValueError as error:
        return times, found, report, str(error)
    return times, found, report, None


# ------------------------------------------------------------------------------------------------------------- cameras


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="plays a camera of Linux, written in C")
def test_a_camera_of_linux(tmp_path):
    """FFmpeg's own code reads a camera that a library plays to it: one that goes on, or ends as cameras do."""
    library = tmp_path / "camera.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("camera.c"), "-ldl"], check=True)
    code = """
import json, os, sys
from videollm_mod import ReadingReport, read_video
def watch(source, what, **options):
    os.environ["CAMERA"], report, seen, error = what, ReadingReport(), [], None
    try:
        for time, frame in read_video(source, fps=20, timeout=0.6, report=report, **options):
            seen.append((time, round((frame.mean() * 219 / 255 - 4) / 5)))
    except ValueError as failure:
        error = str(failure)
    print(json.dumps([seen, frame.shape if seen else None, report.reconnections, error, report.spoilt_packets]))
watch("camera:0", "denied")
watch("/dev/video0", "busy")
watch("camera:0", "spoilt", end=0.8)
watch("/dev/video0", "silent", reconnect=False)
watch("camera:0", "unplugged", reconnect=False)
watch("camera:0", "unplugged", end=1.2)
"""
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    denied, busy, spoilt, silent, unplugged, again = map(json.loads, done.stdout.splitlines())
    assert denied[3] == "'camera:0' cannot be read as video: Permission denied."
    assert busy[3] == "'/dev/video0' cannot be read as video: Device or resource busy."
    times, found = zip(*spoilt[0], strict=True)
    assert spoilt[1] == [48, 64, 3] and spoilt[3:] == [None, 1]
    assert times == pytest.approx(np.arange(len(times)) / 20) and len(times) > 15 and max(found) > 10
    assert silent[3] == "'/dev/video0' sent nothing for 0.6 s." and len(silent[0]) > 5
    assert unplugged[3] == "'camera:0' ended early: No such device." and len(unplugged[0]) > 5
    assert again[2] > 0 and again[3] is None and again[0][-1][0] >= 1.0, "it is opened again, and time goes on"


# --------------------------------------------------------------------------------------------------------- time limits


@pytest.mark.parametrize("scheme", ["http", "rtsp", "tcp"])
def test_a_source_that_accepts_and_says_nothing(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, begin = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/video.ts", time.monotonic()
        with pytest.raises(ValueError, match="sent no video within 1 s"):
            next(read_video(url, timeout=1))
        assert time.monotonic() - begin < 5


def test_the_time_limit_is_for_all_steps_of_opening():
    """The format is known within the limit, and the streams are not."""

    def answer(request, _):
        time.sleep(1)
        headers(request)
        request.wfile.write(b"".join(encode(numbered(1), "mpegts"))[:1000])
        time.sleep(2)

    with http_server(answer) as url:
        begin = time.monotonic()
        with pytest.raises(ValueError, match="sent no video within 1.5 s"):
            next(read_video(f"{url}/live.ts", timeout=1.5))
        assert time.monotonic() - begin < 2.3, "a limit for each step would end after 2.5 s"


def test_a_named_pipe_that_nobody_writes_is_a_silent_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"'{tmp_path}/pipe' sent no video within 0.2 s"):
        next(read_video(tmp_path / "pipe", timeout=0.2))
    clip = b"".join(encode(numbered(10), "mpegts"))
    writer = threading.Thread(target=_write_and_wait, args=(tmp_path / "pipe", clip))
    writer.start()
    _, found, _, failure = read_all(tmp_path / "pipe")
    writer.join()
    assert found[:9] == list(range(9)) and failure == f"'{tmp_path}/pipe' sent nothing for 1 s."


def _serve_once(kind, folder, data):
    """Give a source to one reader. Return its name."""
    if kind == "named pipe":
        os.mkfifo(folder / "pipe")
        in_thread((folder / "pipe").write_bytes, data)
        return str(folder / "pipe")
    if kind == "descriptor":
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        return f"/dev/fd/{reader}"
    listener = socket.create_server(("127.0.0.1", 0))

    def send():
        with listener:
            connection = listener.accept()[0]
        with connection:
            connection.sendall(data)

    in_thread(send)
    return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["named pipe", "descriptor", "tcp"])
def test_commands_open_a_source_once_that_has_one_reader(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cli, "open_session", lambda *_, fps, **__: (tiny_processor(), BrightnessSession(fps)))
    video = _serve_once(kind, tmp_path, write_brightness(tmp_path / "lamp.mkv", [0.1, 0.9, 0.1]).read_bytes())
    refused = CliRunner().invoke(cli.app, ["report", video, "--out", str(tmp_path / "out.md")])
    assert refused.exit_code == 1 and f"'{video}' can be read only once. Record it to a file first." in refused.stderr
    done = CliRunner().invoke(cli.app, ["watch", video, "--alert", "a lamp", "--every", "1", "--timeout", "3"])
    assert done.exit_code == 0 and done.stdout == "   2.0s  a lamp (0.90)\n", done.output


def _write_and_wait(path, data):
    with open(path, "wb") as pipe, suppress(BrokenPipeError):
        pipe.write(data)
        pipe.flush()
        time.sleep(1.5)


def test_the_model_and_the_processor_pass_the_time_limit_on():
    model, processor = tiny_model(), tiny_processor()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/video.ts"
        for read in (
            lambda: next(model.narrate(processor, url, timeout=0.5)),
            lambda: next(processor.read_video(url, timeout=0.5)),
            lambda: processor.open_video(url, timeout=0.5),
        ):
            with pytest.raises(ValueError, match="sent no video within 0.5 s"):
                read()


def test_the_model_opens_a_source_again_on_request():
    model, processor, opened = tiny_model(), tiny_processor(), threading.Semaphore(0)

    def answer(request, _):
        opened.release()
        headers(request)
        paced(encode(numbered(10), "mpegts"), request.wfile.write)

    with http_server(answer) as url:
        events = model.narrate(processor, f"{url}/live.ts", None, end=2, reconnect=True, interval_threshold=0.0)
        list(events)
    assert all(opened.acquire(timeout=0) for _ in range(2))


def test_nobody_broadcasts():
    with pytest.raises(ValueError, match="'udp://127.0.0.1:[0-9]+' sent no video within 0.5 s"):
        next(read_video(f"udp://127.0.0.1:{free_udp_port()}", timeout=0.5))


@pytest.mark.parametrize("length", [None, 10**6])
def test_a_source_that_falls_silent(length):
    """What came before is shown."""
    gone = threading.Event()

    def answer(request, _):
        headers(request, length=length)
        request.wfile.write(b"".join(encode(numbered(30), "mpegts")))
        gone.wait(60)

    with http_server(answer) as url:
        times, found, _, failure = read_all(f"{url}/live.ts")
        gone.set()
    # The end of the last frame did not come.
    assert found == list(range(29)) and times == pytest.approx(np.arange(29) / FPS)
    assert failure == f"'{url}/live.ts' sent nothing for 1 s."


def test_an_answer_that_ends_before_its_length():
    video = b"".join(encode(numbered(30), "mpegts"))

    def answer(request, _):
        headers(request, length=2 * len(video))
        request.wfile.write(video)

    with http_server(answer) as url:
        _, found, _, failure = read_all(f"{url}/video.ts")
    assert found == list(range(30)) and failure.startswith(f"'{url}/video.ts' ended early")


def test_slow_sources_are_not_silent():
    """Slow headers and half the speed are within the time limit."""

    def answer(request, _):
        time.sleep(0.6)
        headers(request)
        paced(encode(numbered(20), "mpegts"), request.wfile.write, FPS / 2)

    with http_server(answer) as url:
        times, found, _, failure = read_all(f"{url}/live.ts", timeout=2)
    assert found == list(range(20)) and times == pytest.approx(np.arange(20) / FPS) and failure is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://nobody.invalid/video.mp4", "there is no host 'nobody.invalid'"),
        ("rtsp://nobody.invalid/camera", "there is no host 'nobody.invalid'"),
        ("http://127.0.0.1:9/video.mp4", "Connection refused"),
        ("rtsp://127.0.0.1:9/camera", "Connection refused"),
    ],
)
def test_a_source_that_cannot_be_reached(url, message):
    with pytest.raises(ValueError, match=message) as error:
        next(read_video(url, timeout=5))
    assert url in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "401 Unauthorized"), (404, "404 Not Found"), (200, "Invalid data")]
)
def test_an_answer_that_is_no_video(status, message):
    page = b"<html>Sign in</html>"

    def answer(request, _):
        request.send_response(status)
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)

    with http_server(answer) as url, pytest.raises(ValueError, match=message):
        next(read_video(f"{url}/video.mp4", timeout=5))


def test_time_limits_are_positive():
    with pytest.raises(ValueError, match="`timeout` must be a positive number of seconds"):
        next(read_video("udp://127.0.0.1:1", timeout=0))


# ------------------------------------------------------------------------------------------------------- arrival times


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [
        ("mpjpeg", "multipart/x-mixed-replace; boundary=ffmpeg"),
        ("mjpeg", "video/x-mjpeg"),
        ("h264", "video/h264"),
    ],
)
def test_frames_without_timestamps_get_the_time_of_their_arrival(kind, content_type):
    """FFmpeg takes such a source for 25 frames per second; this one sends 8."""
    pieces = encode(random_frames(16, size=(240, 320)), kind)

    def answer(request, _):
        headers(request, content_type)
        paced(pieces, request.wfile.write, 8)

    with http_server(answer) as url:
        times, _, _, failure = read_all(f"{url}/camera")
    assert failure is None and len(times) == 16 and times == sorted(times)
    assert np.diff(times[:15]) == pytest.approx(np.full(14, 1 / 8), abs=0.1), "those that FFmpeg looks at too"


def test_a_length_that_ffmpeg_guesses_is_none_to_miss(tmp_path):
    """A recorder that writes no length: FFmpeg divides the size by the bit rate of the sound."""
    pictures, path = iter(random_frames(50, size=(240, 320))), tmp_path / "clip.mkv"
    with av.open(str(path), "w", options={"live": "1"}) as target:
        streams = (
            target.add_stream("libx264", rate=10, options={"tune": "zerolatency"}),
            target.add_stream("libmp3lame", rate=48_000),
        )
        streams[0].width, streams[0].height, streams[0].pix_fmt = 320, 240, "yuv420p"
        streams[1].layout, streams[1].bit_rate = "stereo", 64_000
        for index in range(50):
            target.mux(streams[0].encode(av.VideoFrame.from_ndarray(next(pictures), format="rgb24")))
            sound = av.AudioFrame.from_ndarray(np.zeros((2, 4800), np.float32), format="fltp", layout="stereo")
            sound.sample_rate, sound.pts = 48_000, 4800 * index
            target.mux(streams[1].encode(sound))
        for stream in streams:
            target.mux(stream.encode())

    def answer(request, _):
        headers(request, "video/x-matroska", path.stat().st_size)
        request.wfile.write(path.read_bytes())

    with http_server(answer) as url:
        times, _, report, failure = read_all(f"{url}/clip.mkv")
    assert len(times) == 50 and failure is None and not report, report


def test_a_recording_without_timestamps_keeps_its_rate():
    video = b"".join(encode(random_frames(30, size=(96, 128)), "mjpeg"))

    def answer(request, _):
        headers(request, "video/x-mjpeg", len(video))
        request.wfile.write(video)

    with http_server(answer) as url:
        times, *_ = read_all(f"{url}/video.mjpeg")
    assert times == pytest.approx(np.arange(30) / 25)


# -------------------------------------------------------------------------------------------------------- reconnection


def test_a_camera_that_drops_and_returns():
    """Time goes on by the wall clock, and nothing is on screen meanwhile."""
    away = []

    def answer(send, number):
        if number == 1:
            return  # the camera is still starting
        paced(encode(numbered(20, first=20 * number), "rtp", packetsize="1200", payload_type="96"), send)
        away.append(time.monotonic())

    report, begin = ReadingReport(), time.monotonic()
    frames = []
    with rtsp_server(answer) as url:
        for at, frame in read_video(url, fps=10, timeout=1, report=report):
            frames.append((at, frame, time.monotonic() - begin))
            if round(float(frame.mean()) / 4) >= 50:
                break
    times, shown = [at for at, *_ in frames], [round(float(frame.mean()) / 4) for _, frame, _ in frames]
    assert report.reconnections >= 1 and report.mended_times == 0, report
    before = sum(number < 20 for number in shown)
    assert before in (9, 10, 11) and min(shown[before:]) >= 40, shown
    gap = times[before] - times[before - 1]
    assert gap > 0.5 and gap == pytest.approx(frames[before][2] - frames[before - 1][2], abs=NEAR), "the wall clock"
    assert np.diff(times[before:]) == pytest.approx(np.full(len(times) - before - 1, 0.1)), "ticks go on"


def test_a_broadcast_that_stops_and_returns():
    port, report = free_udp_port(), ReadingReport()

    def send():
        broadcast(port, encode(numbered(20), "mpegts", start=3600))
        time.sleep(2.5)
        broadcast(port, encode(numbered(30, first=20), "mpegts"))

    in_thread(send)
    times, shown = [], []
    with VideoReader(f"udp://127.0.0.1:{port}", timeout=1, report=report) as reader:
        for at, _, frame in reader.frames():
            times.append(float(at))
            shown.append(round(float(reader.picture(frame).mean()) / 4))
            if shown[-1] >= 45:
                break
    first = next(index for index, number in enumerate(shown) if number >= 20)
    assert report.reconnections >= 1 and times[0] == 0 and first > 10
    assert times[first] == pytest.approx(times[shown.index(15)] + (shown[first] - 15) / FPS + 2.5, abs=NEAR)
    assert times[-1] == pytest.approx(times[first] + (shown[-1] - shown[first]) / FPS)


def test_a_sender_that_restarts_within_the_time_limit():
    """Its clock jumps back by an hour; time goes on by the wall clock."""
    port, report = free_udp_port(), ReadingReport()

    def send():
        broadcast(port, encode(numbered(20), "mpegts", start=3600))
        time.sleep(0.7)
        broadcast(port, encode(numbered(20, first=20), "mpegts"))

    in_thread(send)
    times, found, report, failure = read_all(f"udp://127.0.0.1:{port}", reconnect=False)
    assert found[-1] >= 38 and len(found) > 30 and failure.endswith("sent nothing for 1 s.")
    assert report.mended_times == 1 and report.reconnections == 0
    assert times[-1] - times[0] == pytest.approx((found[-1] - found[0]) / FPS + 0.7, abs=NEAR)


def test_an_endless_answer_is_opened_again_on_request():
    def answer(request, number):
        headers(request)
        paced(encode(numbered(10, first=10 * number), "mpegts"), request.wfile.write)

    with http_server(answer) as url:
        assert read_all(f"{url}/live.ts")[1] == list(range(10)), "not by default: it may be a recording"
        frames = read_video(f"{url}/live.ts", fps=FPS, timeout=1, reconnect=True)
        shown = numbers(frame for frame, _ in zip(frames, range(25), strict=False))
    assert shown[:10] == list(range(10, 20)) and shown[-1] >= 30


def test_waiting_for_a_source_ends_with_the_reader():
    """A closed reader does not open the source again."""
    opened = []

    def answer(request, number):
        opened.append(number)
        headers(request)
        request.wfile.write(b"".join(encode(numbered(10), "mpegts")))

    with http_server(answer) as url:
        stop = threading.Event()
        frames = read_video(f"{url}/live.ts", fps=FPS, timeout=1, reconnect=True, stop=stop)
        ahead = read_ahead(frames, 1, stop=stop)
        for _ in range(5):
            next(ahead)
        while frames.gi_running is False:
            time.sleep(0.01)
        begin = time.monotonic()
        ahead.close()
        assert time.monotonic() - begin < 5
        count = len(opened)
        time.sleep(1.5)
        assert len(opened) <= count + 1


# -------------------------------------------------------------------------------------------------------------- Ctrl+C


@contextmanager
def command(*arguments):
    """Run the command line; Ctrl+C must end it long before its time limit for the source."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = start("cli.py", *arguments, "--timeout", 600, **pipes)
    try:
        yield running
    finally:
        running.kill()


def press_ctrl_c(running, number=signal.SIGINT):
    running.send_signal(number)
    return running.communicate(timeout=60)


@pytest.mark.xdist_group("preloaded")
def test_ctrl_c_while_a_source_opens():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/camera"
        with command("narrate", url) as running, silent.accept()[0]:
            assert press_ctrl_c(running) == ("", "stopped\n") and running.returncode == 130


@pytest.mark.xdist_group("preloaded")
def test_ctrl_c_while_a_named_pipe_is_silent(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with command("ask", tmp_path / "pipe", "What?") as running:
        writer = None
        while writer is None and running.poll() is None:
            time.sleep(0.05)
            with suppress(OSError):  # until the program has opened the pipe
                writer = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)
        begin = time.monotonic()
        printed, err = press_ctrl_c(running)
        assert printed == "" and err.endswith("\nstopped\n") and running.returncode == 130, err
        assert time.monotonic() - begin < 5
        os.close(writer)


@contextmanager
def stalling_server():
    """Send 2 s of video, then nothing; yield the URL and an event that is set when a second client has it."""
    gone, sent = threading.Event(), threading.Event()

    def answer(request, number):
        headers(request)
        request.wfile.write(b"".join(encode(numbered(40), "mpegts")))
        if number > 0:
            sent.set()
        gone.wait(600)

    with http_server(answer) as url:
        yield f"{url}/live.ts", sent
        gone.set()


@pytest.mark.xdist_group("preloaded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_while_a_source_stalls_writes_the_narration(tmp_path, number):
    out = tmp_path / "out.jsonl"
    with stalling_server() as (url, _), command("narrate", url, "--json", "--jsonl", out) as running:
        assert json.loads(next(running.stdout))["role"] == "user", "the query stands before the first frame"
        printed, err = press_ctrl_c(running, number)
    assert running.returncode == 0 and "stopped after" in err and f"wrote {out}" in err, err
    assert json.loads(printed.splitlines()[-1])["summary"]["frames"] > 0
    assert json.loads(out.read_text().splitlines()[0])["role"] == "user"


def test_a_terminal_that_closes_keeps_the_narration(tmp_path):
    """The program cannot write to its terminal any more, and may be told twice."""
    out, (ours, theirs) = tmp_path / "out.jsonl", os.openpty()

    def begin():
        # Tests that run in the background ignore signals, and a child inherits that.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with stalling_server() as (url, _):
        running = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), "narrate", url, "--json", "--jsonl", str(out), "--timeout", "600"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
            start_new_session=True,
            preexec_fn=begin,
        )
        os.close(theirs)
        try:
            shown = b""
            while b'"role"' not in shown:
                shown += os.read(ours, 4096)
            os.close(ours)
            with suppress(ProcessLookupError):
                running.send_signal(signal.SIGHUP)
            assert running.wait(60) == 0
        finally:
            running.kill()
    assert json.loads(out.read_text().splitlines()[0])["role"] == "user"


@pytest.mark.xdist_group("preloaded")
def test_ctrl_c_while_a_source_stalls_asks_the_question():
    with stalling_server() as (url, sent), command("ask", url, "What?", "--json") as running:
        assert sent.wait(120)
        time.sleep(5)
        printed, err = press_ctrl_c(running)
    assert running.returncode == 0 and "stopped after" in err, err
    assert json.loads(printed)["question"] == "What?"


@pytest.mark.xdist_group("preloaded")
def test_a_narration_goes_on_when_the_sender_restarts():
    """The first sender's clock is near an hour, the second's at 0. No frame is invented for the difference."""
    port, restarts = free_udp_port(), threading.Event()
    first = encode(np.tile(numbered(60), (5, 1, 1, 1)), "mpegts", start=3590, fps=5)
    begin = time.monotonic()
    in_thread(broadcast, port, itertools.takewhile(lambda _: not restarts.is_set(), first), 5)
    with command("narrate", f"udp://127.0.0.1:{port}", "--json") as running:
        assert json.loads(next(running.stdout))["role"] == "user", "the query stands before the first frame"
        time.sleep(1)
        restarts.set()
        time.sleep(0.5)
        broadcast(port, encode(numbered(10), "mpegts", fps=5), 5)
        time.sleep(0.5)
        printed, err = press_ctrl_c(running)
    assert running.returncode == 0 and "stopped after" in err, err
    summary = json.loads(printed.splitlines()[-1])["summary"]
    # Frames come at 2 per second of the wall clock, from the opening of the source on.
    assert 6 <= summary["frames"] + summary["frames_dropped"] <= 2 * (time.monotonic() - begin) + 2, summary
    assert summary["reading"]["mended_times"] >= 1 and summary["reading"]["reconnections"] == 0, summary


def test_a_second_ctrl_c_ends_the_program_at_once():
    code = """
import os, signal, time
from videollm_mod.commands import watching
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and a child inherits that
with watching.CtrlC() as ctrl_c:
    try:
        with ctrl_c.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            print("the step ends", flush=True)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.stdout == "the step ends\n" and done.returncode == -signal.SIGINT


def test_an_earlier_ctrl_c_does_not_stop_the_next_command(monkeypatch):
    monkeypatch.setattr(watching.CtrlC, "is_pressed", True)
    with watching.CtrlC() as ctrl_c:
        assert not ctrl_c.is_pressed
