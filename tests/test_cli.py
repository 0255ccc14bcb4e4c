# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Run the command line as a user does: as a program, with its output and its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from hub import Hub, commit_hash
from preloaded import start
from programs import run_command, run_main
from tiny import copy_embedded, embedded_files, random_frames, write_clip
from transformers import AutoConfig, LlamaConfig, SmolVLMConfig, TextStreamer
from typer.testing import CliRunner

from videollm_mod import cli
from videollm_mod.generation_videollm_mod import DEFAULT_QUERY
from videollm_mod.space import caption_drawing, captions
from videollm_mod.space.loading import generated_world
from videollm_mod.train.data import streamworld
from videollm_mod.video_reading_videollm_mod import VideoReader, read_video


ROOT = Path(__file__).parents[1]
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"
SAMPLE = ROOT / "samples" / "streamworld.mp4"
LOCKED = "rtsp://admin:SECRET@127.0.0.1:9/1"
STORY = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["events"]
LOADING = "loading the embedded checkpoint ...\n"


def run_process(*arguments, folder=ROOT):
    """Run the command line as a program. Most tests run it in this process, without seconds of imports."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_narrate_prints_events_and_costs(tmp_path):
    done = run_process("narrate", folder=tmp_path)
    assert done.returncode == 0 and done.stderr == LOADING, "libraries print nothing while they are imported"
    told = done.stdout.split("\n\n")[0].splitlines()
    assert told == [f"{time:6.1f}s  {text}" for time, text in STORY]
    assert re.search(r"\n17 frames in [\d.]+ s, [\d.]+ frames/s \(CPU, \d+ threads?\)\n", done.stdout)
    assert re.search(
        r"\ncompute +[\d.]+ GFLOP in the language model, [\d.]+ at full compute \(routing saves \d+%\)\n", done.stdout
    )
    assert re.search(r"\ncache +[\d.]+ MB, [\d.]+ at full compute \(routing saves \d+%\)\n", done.stdout)
    assert re.search(r"entries: \d+ in each of 2 full layers, \d+ in each of 4 routed layers\n$", done.stdout)


def test_help_imports_neither_torch_nor_transformers():
    code = """
import sys
from videollm_mod.cli import app

for command in ("", "narrate", "ask", "report", "find", "watch", "serve", "inspect", "convert", "push"):
    sys.argv = ["videollm-mod", *command.split(), "--help"]
    try:
        app()
    except SystemExit as end:
        assert not end.code, command
    heavy = {"torch", "transformers", "peft", "datasets", "fastapi"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.lower().count("usage: ") == 10, done.stderr


def test_help_of_scripts_imports_no_torch():
    """Two scripts list options of TRL and Transformers, which import torch to declare them."""
    code = """
import sys
from parsers import BEFORE, parser_of, scripts

for script in scripts():
    if script.startswith(("convert/", "train/")) and script not in ("train/sft.py", "train/pretrain_vision.py"):
        for before in BEFORE.get(script, [[]]):
            parser_of(script, *before)
            heavy = {"torch", "accelerate", "peft", "openai", "nltk"} & set(sys.modules)
            assert not heavy, (script, before, heavy)
        print(script)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"train/evaluation.py", "train/encode.py", "train/recipe.py"} <= set(done.stdout.splitlines())


def test_a_foreign_video_gets_a_note():
    done = run_command("narrate", NASA)
    assert done.returncode == 0, done.stderr
    loading, note, report = done.stderr.splitlines()
    assert report == "1 other video stream was not read."
    assert loading + "\n" == LOADING and note.startswith(
        "Note: the embedded checkpoint was trained on generated clips"
    )
    assert "27 frames in" in done.stdout


def test_a_video_is_known_by_its_origin_and_not_by_its_folder(tmp_path):
    for sample in SAMPLE.parent.glob("*.mp4"):
        copy = tmp_path / "copy.mp4"
        copy.write_bytes(sample.read_bytes())
        world = {"streamworld": "StreamWorld", "doomworld": "DoomWorld"}[sample.stem]
        assert {generated_world(video, VideoReader) for video in (sample, copy)} == {world}
    options = ("--split", "test", "--world", "tiny", "--clip", "117", "--fps", "12")
    assert run_main(streamworld.main, tmp_path / "new", *options).returncode == 0
    assert all(generated_world(video, VideoReader) == "StreamWorld" for video in (tmp_path / "new").glob("*.mp4"))
    assert list((tmp_path / "new").glob("*.mp4"))
    foreign = write_clip(tmp_path / "samples.mp4", random_frames(4))
    for video in (foreign, NASA, ROOT / "README.md", "no_such_file.mp4", "-", "camera:0"):
        assert generated_world(video, VideoReader) is None


def test_options(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    done = run_command("narrate", clip, "--fps", 5, "--interval-threshold", 0, "--query", "Describe every frame.")
    assert done.returncode == 0 and "10 frames in" in done.stdout
    assert "Describe every frame." not in done.stdout


def test_narrate_writes_files(tmp_path):
    outputs = {name: tmp_path / f"out.{name}" for name in ("srt", "vtt", "jsonl")} | {"mp4": tmp_path / "OUT.MP4"}
    options = [part for name, path in outputs.items() for part in (f"--{'burn-in' if name == 'mp4' else name}", path)]
    done = run_command("narrate", SAMPLE, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == LOADING + "".join(f"wrote {path}\n" for path in outputs.values())
    assert [line.split("s  ", 1)[1] for line in done.stdout.split("\n\n")[0].splitlines()] == [t for _, t in STORY]
    assert "--> 00:00:08,500\n" in outputs["srt"].read_text(), "the last subtitle ends with the video"
    assert outputs["srt"].read_text().count(" --> ") == len(STORY) and STORY[0][1] in outputs["vtt"].read_text()
    said = [json.loads(line) for line in outputs["jsonl"].read_text().splitlines()]
    assert [[e["time"], e["text"]] for e in said if e["role"] == "assistant"] == STORY
    assert [round(time, 1) for time, _ in read_video(outputs["mp4"], fps=1)] == [float(t) for t in range(9)]


@pytest.mark.xdist_group("preloaded")
def test_ctrl_c_keeps_the_narration_so_far(tmp_path):
    """A live source always ends so. At this frame rate the clip would take minutes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = start("cli.py", "narrate", NASA, "--fps", 300, "--srt", tmp_path / "out.srt", **pipes)
    try:
        assert "Note:" in next(line for line in running.stderr if "Note:" in line)
        time.sleep(3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 0 and "stopped after" in err and "frames in" in out, err
    assert (tmp_path / "out.srt").exists()


@pytest.mark.parametrize("step", [2, 4])
def test_ctrl_c_within_a_step_leaves_a_summary(step, monkeypatch, tmp_path):
    def open_session(*args, **kwargs):
        processor, session = opened(*args, **kwargs)
        forward, steps = session.model.forward, iter(range(1, 1000))

        def interrupted(*args, **kwargs):
            if next(steps) == step:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        session.model.forward = interrupted
        return processor, session

    opened = cli.open_session
    monkeypatch.setattr(cli, "open_session", open_session)
    jsonl = tmp_path / "out.jsonl"
    done = CliRunner().invoke(cli.app, ["narrate", str(SAMPLE), "--json", "--jsonl", str(jsonl)])
    *said, summary = (json.loads(line) for line in done.stdout.splitlines())
    summary = summary["summary"]
    written = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [(e["time"], e["text"]) for e in said] == [(e["time"], e["text"]) for e in written], "each is printed once"
    assert done.exit_code == 0 and "stopped after" in done.stderr and 0 < summary["frames"] < 17


def test_narrate_as_json():
    done = run_command("narrate", SAMPLE, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[e["time"], e["text"]] for e in lines[:-1] if e["role"] == "assistant"] == STORY
    assert lines[-1]["summary"]["frames"] == 17 and lines[-1]["summary"]["flops"] < lines[-1]["summary"]["full_flops"]


def test_narrate_speaks_as_its_options_say():
    """A model that has learned when to speak may be asked each three seconds too; its prompt is not its query."""
    options = ("--every", 3, "--prompt", "How many things do you see?")
    done = run_command("narrate", SAMPLE, *options, "--no-repeat", 0, "--json")
    *said, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["time"] for event in said] == [0.0, 3.0, 6.0] and said[0]["text"] == "None."
    assert {event["role"] for event in said} == {"assistant"} and summary["summary"]["replies_suppressed"] == 0
    unseen = ("--every", 0.5, "--prompt", "How many things do you see?", "--min-silence", 0)
    done = run_command("narrate", SAMPLE, *unseen)
    counts = [line.split("s  ")[1] for line in done.stdout.split("\n\n")[0].splitlines()]
    assert all(before != after for before, after in pairwise(counts))
    assert f"; {17 - len(counts)} replies said nothing new and were not shown\n" in done.stdout


def test_ask_answers_at_a_second_of_the_video():
    things = [run_command("ask", SAMPLE, "How many things do you see?", "--at", at) for at in ("0", "2")]
    assert [done.stdout for done in things] == ["None.\n", "One.\n"], [done.stderr for done in things]
    asked = json.loads(run_command("ask", SAMPLE, "How many things do you see?", "--at", "2", "--json").stdout)
    assert not any(asked.pop("reading").values())
    said = {"time": 2.0, "question": "How many things do you see?", "answer": "One.", "frames_dropped": 0}
    assert asked == said


def test_ask_after_the_end_is_an_error():
    done = run_command("ask", SAMPLE, "How many things do you see?", "--at", 100)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: The video ends at 8.5 s: choose an earlier second than --at 100.\n"


def test_ask_has_the_options_of_narrate():
    options = ("--max-frames", 4, "--weights", "int8", "--cache-dtype", "fp8", "--fps", 1)
    done = run_command("ask", SAMPLE, "How many things do you see?", "--at", 2, *options)
    assert done.returncode == 0 and done.stdout.endswith(".\n"), done.stderr


def test_a_reader_that_has_enough_ends_the_program_without_a_word():
    lines = "import videollm_mod.mistakes as m\nwith m.one_line_errors():\n    while True: print('a line', flush=True)"
    with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1 and process.stderr.read() == b""


def test_a_sample_is_piped_in():
    """The index of this mp4 is at its end, so it cannot be decoded as it arrives."""
    with subprocess.Popen(["cat", SAMPLE], stdout=subprocess.PIPE) as cat:
        done = run_command("narrate", "-", stdin=cat.stdout)
    assert done.returncode == 0, done.stderr
    assert [line.split("s  ", 1)[1] for line in done.stdout.split("\n\n")[0].splitlines()] == [t for _, t in STORY]


def test_narrate_reads_standard_input():
    with open(NASA, "rb") as file:
        done = run_command("narrate", "-", stdin=file)
    assert done.returncode == 0 and "27 frames in" in done.stdout and "dropped" not in done.stdout, done.stderr


@pytest.mark.parametrize("when_behind", ["drop_oldest", "catch_up"])
def test_frames_that_come_too_fast_are_dropped_or_stop_the_stream(when_behind):
    frames = sum(1 for _ in read_video(NASA, fps=30))
    with open(NASA, "rb") as file:
        options = ("--when-behind", when_behind, "--max-waiting", 1, "--fps", 30, "--json")
        done = run_command("narrate", "-", *options, stdin=file)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    if when_behind == "drop_oldest":
        assert summary["frames"] + summary["frames_dropped"] == frames and summary["frames_dropped"] > 0
        assert done.stderr.count("frames come too fast: the oldest that wait are dropped") == 1
    else:
        assert 0 < summary["frames"] < frames and summary["frames_dropped"] == 0
        assert "1 frames wait, the most that may" in done.stderr


def test_frames_that_hardly_change_are_not_encoded_if_that_is_asked_for(tmp_path):
    clip = write_clip(tmp_path / "still.mp4", np.repeat(random_frames(1, size=(64, 64)), 30, axis=0))
    reused = {}
    for options in ((), ("--reuse-static", "0"), ("--reuse-static", "3")):
        done = CliRunner().invoke(cli.app, ["narrate", str(clip), *options, "--json"])
        reused[options] = json.loads(done.stdout.splitlines()[-1])["summary"]["frames_reused"]
    assert list(reused.values()) == [0, 0, 5]
    said = CliRunner().invoke(cli.app, ["narrate", str(clip), "--reuse-static", "3"])
    assert "; 5 hardly changed and were not encoded" in said.stdout


def test_commands_encode_frames_at_the_size_that_is_asked_for():
    """What the toy says of larger frames is not tested: it learned on frames of one size."""
    done = CliRunner().invoke(cli.app, ["ask", str(SAMPLE), "How many things do you see?", "--frame-size", "256"])
    assert done.exit_code == 0 and done.stdout.strip(), done.stderr
    usual = CliRunner().invoke(cli.app, ["ask", str(SAMPLE), "How many things do you see?", "--frame-size", "128"])
    assert usual.stdout == CliRunner().invoke(cli.app, ["ask", str(SAMPLE), "How many things do you see?"]).stdout


def test_inspect_needs_no_weights(tmp_path):
    shown = run_command("inspect")
    assert shown.returncode == 0 and shown.stderr == ""
    assert shown.stdout.count("13 of 64  routed") == 4 and shown.stdout.count("64 of 64  full") == 2
    figures = json.loads(run_command("inspect", "--json", "--seconds", "60", "--text-tokens", "100").stdout)
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    cost = config.estimate_cost(120, 100, bytes_per_value=4)
    assert figures["speak"] == "learned"
    assert figures["remembers"] == {"max_frames": 60, "sink_frames": 2, "max_text_tokens": 128}
    assert "remembers        the newest 60 frames, the first 2, 128 tokens of text\n" in shown.stdout
    assert (figures["flops"], figures["cache_bytes"]) == (cost.flops, cost.cache_bytes)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run_command("inspect", tmp_path).stdout == shown.stdout
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"speak": "every"}), encoding="utf-8")
    assert "by the policy 'every': it has not learned when to speak" in run_command("inspect", tmp_path).stdout


def test_convert_and_push_run_the_scripts():
    scripts = {"convert": "--frame-token-pooled", "push": "--no-verify"}
    for command, option in scripts.items():
        shown = run_command(command, "--help")
        assert shown.returncode == 0 and option in shown.stdout and f" {command} " in shown.stdout, shown.stderr
    failed = run_command("push", ROOT / "docs", "somebody/model")
    assert failed.returncode == 1 and failed.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["narrate", "no_such_file.mp4"], "error: There is no video file 'no_such_file.mp4'."),
        (["narrate", "--fps", "0"], "error: `fps` must be"),
        (["narrate", "--interval-threshold", "7"], "error: `interval_threshold` must be a finite number, at least 0"),
        (["narrate", str(ROOT / "README.md")], "cannot be read as video"),
        (["narrate", "--model", "no/such-model"], "error: "),
        (["narrate", "--model", "sampels"], "error: There is no folder 'sampels'; did you mean 'samples'?"),
        (["inspect", "./sampels"], "error: There is no folder './sampels'; did you mean 'samples'?"),
        (["inspect", "nothing-like-it"], "There is no folder 'nothing-like-it'. Give a folder, or a Hub id"),
        (["convert", "bsae", "adapter", "out"], "error: There is no folder 'bsae'"),
        (["convert", "sampels", "out"], "error: There is no folder 'sampels'; did you mean 'samples'?"),
        (["inspect", "docs"], "The folder 'docs' has no config.json: give the folder of a checkpoint."),
        (["narrate", "--srt", "no/such/folder/out.srt"], "There is no folder 'no/such/folder'"),
        (["narrate", "camera:0", "--burn-in", "out.mp4"], "--burn-in needs a video file"),
        (["narrate", "camera:99"], "'camera:99' cannot be read as video"),
        (["inspect", "no/such-model"], "error: "),
        (["inspect", str(ROOT / "README.md")], "is a file: give the folder of a checkpoint"),
        (["narrate", "--srt", str(ROOT)], "is a folder: name a file in it"),
        (["narrate", "--when-behind", "wait"], "--when-behind can be catch_up, drop_oldest, block, not 'wait'"),
        (["narrate", "--font", "README.md"], "--font is the font of --burn-in: give both"),
        (["narrate", "--burn-in", "out.mp4", "--font", "README.md"], "'README.md' cannot be read as a font"),
        (["narrate", "--burn-in", "out.mp4", "--font", "none.ttf"], "There is no font file 'none.ttf'"),
        (["narrate", "--burn-in", "out.txt"], "the file name must end in .mp4, got 'out.txt'"),
        (["narrate", "--srt", "no.srt", "--vtt", "./samples/../no.srt"], "--srt and --vtt both name 'no.srt'"),
        (["narrate", "--srt", "/proc/out.srt"], "error: --srt cannot write '/proc/out.srt'"),
        (["ask", "samples", "What?"], "error: 'samples' is a folder: name a video file in it."),
        (["narrate", "train"], "error: There is no video in 'train'."),
        (["narrate", "samples", "--burn-in", "a.mp4"], "error: --burn-in is for one video, and 'samples' is a folder"),
        (["narrate", "samples", "--out", "/proc/out"], "error: --out cannot make the folder '/proc/out'"),
        (["narrate", "samples", "--video-root", "/data"], "error: --video-root is for a data set: choose the rows of"),
        (["narrate", "--out", "out"], "streamworld.mp4' is none: use --srt."),
        (["narrate", f"{LOCKED}?key=1", "--out", "out"], "and 'rtsp://admin:***@127.0.0.1:9/1?***' is none"),
        (["narrate", LOCKED, "--split", "a", "--srt", "a.srt"], "and 'rtsp://admin:***@127.0.0.1:9/1' is a data set"),
        (["narrate", LOCKED, "--split", "a"], "and 'rtsp://admin:***@127.0.0.1:9/1' is none: write hf://"),
        (["narrate", "--fps", "nan"], "error: `fps` must be a positive number of frames per second"),
        (["narrate", "--fps", "inf"], "error: `fps` must be a positive number of frames per second"),
        (["narrate", "--fps", "1e9"], "at most 1000, got 1000000000.0"),
        (["narrate", "--interval-threshold", "nan"], "error: `interval_threshold` must be a finite number"),
        (["narrate", "--max-frames", "0"], "error: `max_frames` must be a whole number, at least 1, got 0"),
        (
            ["narrate", "--speak", "often"],
            "error: `speak` is 'often'; it must be 'learned', 'every', 'change', 'probe'",
        ),
        (["narrate", "--every", "0"], "error: `every` must be a positive number of seconds"),
        (["narrate", "--speak", "every", "--speak-threshold", "0.5"], "error: `speak_threshold` belongs to 'change'"),
        (
            ["narrate", "--every", "2", "--interval-threshold", "0.5"],
            "error: --interval-threshold belongs to 'learned', and 'every' decides when to speak: leave it out.",
        ),
        (["narrate", "--speak", "change", "--interval-threshold", "0.5"], "and 'change' decides when to"),
        (["narrate", "--frame-size", "20"], "error: `frame_size` is 20; it must be a multiple of"),
        (["narrate", "--query", "a\udcff"], "error: What the user says is not valid Unicode"),
        (["ask", str(SAMPLE), "a\udcff"], "error: What the user says is not valid Unicode"),
        (["ask", str(SAMPLE), " "], "error: The question is empty."),
        (["ask", str(SAMPLE), "What?", "--at", "inf"], "error: `--at` must be a finite number of seconds"),
        (["inspect", "--seconds", "inf"], "error: `seconds` must be a finite number"),
        (["inspect", "--fps", "nan"], "error: `fps` must be"),
    ],
)
def test_mistakes_are_answered_in_one_line(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    failed = CliRunner().invoke(cli.app, arguments)
    assert failed.exit_code == 1 and message in failed.stderr and "SECRET" not in failed.stderr
    assert isinstance(failed.exception, SystemExit)
    assert len([line for line in failed.stderr.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["narrate", "--fsp", "2"], "error: No such option:? '?--fsp"),
        (["narrate", "--fps", "x"], "error: Invalid value for '--fps'"),
        (["ask", "clip.mp4"], "error: Missing argument"),
        (["nrrate"], r"error: No such command 'nrrate'. Did you mean 'narrate'\? `"),
    ],
)
def test_wrong_usage_is_answered_in_one_line(arguments, message):
    failed = run_command(*arguments)
    assert failed.returncode == 2 and failed.stdout == "" and re.match(message, failed.stderr), failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and "--help` shows what there is.\n" in failed.stderr


def test_few_frames_are_read_at_a_low_rate():
    done = CliRunner().invoke(cli.app, ["narrate", str(NASA), "--fps", "0.000001", "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["frames"] == 1, done.stderr


def test_a_fault_in_one_output_does_not_prevent_the_others(tmp_path):
    outputs = ("--srt", "/dev/full", "--vtt", str(tmp_path / "out.vtt"))
    done = CliRunner().invoke(cli.app, ["narrate", str(NASA), "--fps", "1", *outputs])
    assert done.exit_code == 1 and "frames in" in done.stdout, "the summary is still printed"
    assert done.stderr.splitlines()[-3:-1] == [
        "error: '/dev/full' cannot be written: No space left on device. Free some space or choose another folder, "
        "then run the same command again.",
        f"wrote {tmp_path / 'out.vtt'}",
    ]
    assert (tmp_path / "out.vtt").read_text().startswith("WEBVTT")


def test_a_missing_font_is_said_before_the_work_and_at_the_end(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(caption_drawing, "installed_fonts", lambda: ())
    out = tmp_path / "out.mp4"
    done = CliRunner().invoke(cli.app, ["narrate", "--burn-in", str(out), "--query", "红球"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith(
        "Note: No font here has 球 红 (CJK). Install one such as Noto Sans, or give one with"
    )
    assert "boxes" not in done.stderr, "the narration itself is in English"
    said = [SimpleNamespace(time=0.0, role="assistant", text=text) for text in ("红球。", "A ball.")]
    report = captions.burn_in(SAMPLE, said, out)
    assert "Captions with boxes for characters that no font here has: 1, characters 。 球 红 (CJK)." in caplog.text
    assert report.missing_characters == "。 球 红 (CJK)"


# Appended to a checkpoint's code: the third reply fails.
FAULT = """
_reply = StreamingSession._reply


def _fail(self, *arguments):
    if len(self.events) == 3:
        raise RuntimeError("out of memory")
    yield from _reply(self, *arguments)


StreamingSession._reply = _fail
"""


def test_a_fault_of_the_program_keeps_the_narration_so_far(tmp_path):
    folder = copy_embedded(tmp_path / "faulty")
    with open(folder / "streaming_videollm_mod.py", "a", encoding="utf-8") as code:
        code.write(FAULT)
    done = CliRunner().invoke(cli.app, ["narrate", "--model", str(folder), "--jsonl", str(tmp_path / "out.jsonl")])
    assert "out of memory" in str(done.exception)
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[e["time"], e["text"]] for e in said if e["role"] == "assistant"] == STORY[:2]


def test_a_reply_that_ctrl_c_cuts_off_is_written_as_far_as_it_is_printed(tmp_path, monkeypatch):
    put, count = TextStreamer.put, iter(range(1000))

    def press_ctrl_c(streamer, value):
        put(streamer, value)
        if next(count) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStreamer, "put", press_ctrl_c)
    done = run_command("narrate", "--jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 0 and "stopped after" in done.stderr, done.stderr
    printed = [line.split("s  ", 1)[1] for line in done.stdout.split("\n\n")[0].splitlines()]
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    said = [event for event in said if event["role"] == "assistant"]
    assert [event["text"] for event in said] == printed and printed[0] == STORY[0][1]
    assert STORY[1][1].startswith(printed[1]) and len(printed[1]) < len(STORY[1][1])


def test_max_frames_remembers_the_newest():
    done = run_command("narrate", "--max-frames", 8, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    complete = json.loads(run_command("narrate", "--json").stdout.splitlines()[-1])["summary"]
    assert summary["frames"] == complete["frames"] == 17 and 1 <= summary["frames_remembered"] <= 8
    # Nine frames or more are forgotten: 64 tokens each in full layers, 13 in routed ones, and the separators.
    fewer = [a - b for a, b in zip(complete["cache_entries"], summary["cache_entries"], strict=True)]
    assert min(fewer[:2]) > 9 * 64 and min(fewer[2:]) > 9 * 13


def test_a_video_is_not_overwritten(tmp_path):
    video = tmp_path / "mine.mp4"
    video.write_bytes(SAMPLE.read_bytes())
    for option in ("--burn-in", "--srt"):
        failed = run_command("narrate", video, option, video)
        assert failed.returncode == 1 and "is an input: write to another file" in failed.stderr
        assert video.read_bytes() == SAMPLE.read_bytes()


def test_other_and_broken_checkpoints_are_refused(tmp_path):
    LlamaConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "llama")
    for command in (["narrate", "--model", tmp_path / "llama"], ["inspect", tmp_path / "llama"]):
        failed = run_command(*command)
        assert failed.returncode == 1 and "is not a VideoLLM-MoD model: its type is llama.\n" in failed.stderr
        assert "Traceback" not in failed.stderr
    SmolVLMConfig().save_pretrained(tmp_path / "smol vlm")
    failed = run_command("inspect", tmp_path / "smol vlm")
    assert failed.returncode == 1
    assert failed.stderr.endswith(f"Convert it first: videollm-mod convert '{tmp_path / 'smol vlm'}' OUT\n")
    broken = copy_embedded(tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    failed = run_command("narrate", "--model", broken)
    assert failed.returncode == 1 and "model.safetensors is not a complete safetensors file" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_inspect_reads_a_revision_from_the_hub(tmp_path):
    files = embedded_files()
    config = json.loads(files["config.json"]) | {"interval_threshold": 0.25}
    with Hub() as hub:
        hub.repos["somebody/toy"] = [files, {**files, "config.json": json.dumps(config).encode()}]
        command = [sys.executable, str(ROOT / "cli.py"), "inspect", "somebody/toy", "--json"]
        command += ["--revision", commit_hash("somebody/toy", 0)]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["interval_threshold"] == 0.5, "the newest revision has 0.25"


def test_shell_completion():
    words = {"_VIDEOLLM_MOD_COMPLETE": "complete_bash", "COMP_WORDS": "videollm-mod conv", "COMP_CWORD": "1"}
    command = [Path(sys.executable).parent / "videollm-mod"]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["convert"], done.stderr


def test_help_shows_the_default_query():
    shown = " ".join(run_command("narrate", "--help").stdout.replace("│", " ").split())
    assert DEFAULT_QUERY in shown


def test_help_names_every_option():
    shown = run_command("narrate", "--help").stdout
    for option in ("--model", "--query", "--fps", "--interval-threshold", "--burn-in", "--json", "A file or a folder"):
        assert option in shown


def test_every_option_has_a_spelling_with_underscores():
    group = typer.main.get_command(cli.app)
    context = group.make_context("videollm-mod", [], resilient_parsing=True)
    for name, command in group.commands.items():
        of_command = command.make_context(name, [], parent=context, resilient_parsing=True)
        names = [(option, name) for option in command.params for name in (*option.opts, *option.secondary_opts)]
        for option, declared in [(option, name) for option, name in names if name.startswith("--")]:
            words, value = declared.removeprefix("--"), [] if option.is_flag else ["a_b-c"]
            for given in (f"--{words.replace('_', '-')}", f"--{words.replace('-', '_')}"):
                read, left, _ = command.make_parser(of_command).parse_args([given, *value])
                assert option.name in read and not left, (name, given)
                assert option.is_flag or read[option.name] in ("a_b-c", ["a_b-c"])
    assert json.loads(run_command("inspect", "--json", "--text_tokens=7").stdout)["flops"] > 0


def test_narrate_in_eight_bits():
    plain, eight = (
        run_command("narrate", "--json"),
        run_command("narrate", "--json", "--weights", "int8", "--cache-dtype", "fp8"),
    )
    assert plain.returncode == eight.returncode == 0, eight.stderr
    figures = [json.loads(done.stdout.splitlines()[-1])["summary"] for done in (plain, eight)]
    assert figures[0]["cache_bytes"] == 4 * figures[1]["cache_bytes"]
    assert figures[0]["full_cache_bytes"] == pytest.approx(4 * figures[1]["full_cache_bytes"], rel=1e-3)
    for option, message in (
        ("--cache-dtype", "--cache-dtype can be fp8, not 'x'"),
        ("--weights", "can be int8 or fp8, not 'x'"),
    ):
        done = run_command("narrate", option, "x")
        assert done.returncode == 1 and message in done.stderr
