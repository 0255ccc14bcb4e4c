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
"""The command line, as a user meets it: run as a program."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub import Hub, commit_hash
from tiny import copy_embedded, embedded_files, random_frames, write_clip
from transformers import AutoConfig, LlamaConfig
from typer.testing import CliRunner

from videollm_mod import cli
from videollm_mod.video_reading_videollm_mod import read_video


ROOT = Path(__file__).parents[1]
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"


SAMPLE = ROOT / "samples" / "streamworld.mp4"
STORY = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["events"]


def run(*arguments, folder=ROOT, **options):
    # Where it takes itself to be in a colourful terminal, escape codes stand between the letters of the help.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )


def test_narrates_the_sample(tmp_path):
    done = run("narrate", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    story = json.loads((ROOT / "samples" / "streamworld.json").read_text(encoding="utf-8"))
    told = done.stdout.split("\n\n")[0].splitlines()
    assert told == [f"{time:6.1f}s  {text}" for time, text in story["events"]]
    assert "Note:" not in done.stderr
    assert re.search(r"\d+ frames in [\d.]+ s, [\d.]+ frames/s \(CPU, \d+ threads?\)", done.stdout)
    assert re.search(
        r"full layers: 2 x \d+, routed layers: 4 x \d+; [\d.]+ MB, [\d.]+ MB at full compute", done.stdout
    )
    assert re.search(r"[\d.]+ GFLOP; [\d.]+ at full compute \(routing saves \d+%\)", done.stdout)


def test_other_videos_run_through_and_are_called_out_of_domain():
    done = run("narrate", NASA)
    assert done.returncode == 0, done.stderr
    assert "StreamWorld, generated clips, and knows nothing else" in done.stderr and "27 frames in" in done.stdout


def test_options(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", random_frames(20), fps=10)
    done = run("narrate", clip, "--fps", 5, "--threshold", 0, "--query", "Describe every frame.")
    assert done.returncode == 0 and "10 frames in" in done.stdout


def test_the_narration_is_taken_away(tmp_path):
    outputs = {name: tmp_path / f"out.{name}" for name in ("srt", "vtt", "jsonl", "mp4")}
    options = [part for name, path in outputs.items() for part in (f"--{'burn-in' if name == 'mp4' else name}", path)]
    done = run("narrate", SAMPLE, *options)
    assert done.returncode == 0, done.stderr
    assert [line.split("s  ", 1)[1] for line in done.stdout.split("\n\n")[0].splitlines()] == [t for _, t in STORY]
    assert "--> 00:00:08,500\n" in outputs["srt"].read_text(), "the last subtitle ends with the video"
    assert outputs["srt"].read_text().count(" --> ") == len(STORY) and STORY[0][1] in outputs["vtt"].read_text()
    said = [json.loads(line) for line in outputs["jsonl"].read_text().splitlines()]
    assert [[e["time"], e["text"]] for e in said if e["role"] == "assistant"] == STORY
    assert [round(time, 1) for time, _ in read_video(outputs["mp4"], fps=1)] == [float(t) for t in range(9)]


def test_stopped_from_the_keyboard_it_leaves_what_was_said(tmp_path):
    """As a live source always ends. At this rate the clip would take long."""
    command = [sys.executable, str(ROOT / "cli.py"), "narrate", str(NASA), "--fps", "300"]
    running = subprocess.Popen(
        [*command, "--srt", str(tmp_path / "out.srt")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started in the background, tests ignore the keyboard, and so would what they start.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert "Note:" in next(line for line in running.stderr if "Note:" in line)
        time.sleep(3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 0 and "stopped after" in err and "frames in" in out, err
    assert (tmp_path / "out.srt").exists()


def test_json_for_machines():
    done = run("narrate", SAMPLE, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[e["time"], e["text"]] for e in lines[:-1] if e["role"] == "assistant"] == STORY
    assert lines[-1]["summary"]["frames"] == 17 and lines[-1]["summary"]["flops"] < lines[-1]["summary"]["full_flops"]


def test_a_question_is_answered_where_it_is_asked():
    things = [run("ask", SAMPLE, "How many things do you see?", "--at", at) for at in ("0", "2")]
    assert [done.stdout for done in things] == ["None.\n", "One.\n"], [done.stderr for done in things]
    asked = json.loads(run("ask", SAMPLE, "How many things do you see?", "--at", "2", "--json").stdout)
    assert asked == {"time": 2.0, "question": "How many things do you see?", "answer": "One."}


def test_standard_input_is_watched():
    with open(ROOT / "tests" / "data" / "nasa_13013.mp4", "rb") as file:
        done = run("narrate", "-", stdin=file)
    assert done.returncode == 0 and "27 frames in" in done.stdout and "dropped" not in done.stdout, done.stderr


@pytest.mark.parametrize("when_behind", ["drop_oldest", "catch_up"])
def test_what_comes_too_fast_is_dropped_or_ends_it_and_is_told(when_behind):
    path = ROOT / "tests" / "data" / "nasa_13013.mp4"
    frames = sum(1 for _ in read_video(path, fps=30))
    with open(path, "rb") as file:
        options = ("--when-behind", when_behind, "--max-waiting", 1, "--fps", 30, "--json")
        done = run("narrate", "-", *options, stdin=file)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    if when_behind == "drop_oldest":
        assert summary["frames"] + summary["frames_dropped"] == frames and summary["frames_dropped"] > 0
        assert done.stderr.count("frames come too fast: the oldest that wait are dropped") == 1
    else:
        assert 0 < summary["frames"] < frames and summary["frames_dropped"] == 0
        assert "1 wait, as many as may" in done.stderr


def test_inspect_says_what_a_checkpoint_is_without_its_weights(tmp_path):
    shown = run("inspect")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("4 of 16  routed") == 4 and shown.stdout.count("16 of 16  full") == 2
    figures = json.loads(run("inspect", "--json", "--seconds", "60", "--text-tokens", "100").stdout)
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    cost = config.estimate_cost(120, 100, bytes_per_value=4)
    assert (figures["flops"], figures["cache_bytes"]) == (cost.flops, cost.cache_bytes)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run("inspect", tmp_path).stdout == shown.stdout


def test_convert_and_push_are_the_scripts():
    scripts = {"convert": "--keep_adapter", "convert-llava": "--frame_token_pooled", "push": "--no_verify"}
    for command, option in scripts.items():
        shown = run(command, "--help")
        assert shown.returncode == 0 and option in shown.stdout and f"cli.py {command}" in shown.stdout, shown.stderr
    failed = run("push", ROOT / "docs", "somebody/model")
    assert failed.returncode == 1 and failed.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["narrate", "no_such_file.mp4"], "error: There is no video file 'no_such_file.mp4'."),
        (["narrate", "--fps", "0"], "error: `fps` must be"),
        (["narrate", "--threshold", "7"], "error: `interval_threshold` is a probability"),
        (["narrate", str(ROOT / "README.md")], "cannot be read as video"),
        (["narrate", "--model", "no/such-model"], "error: "),
        (["narrate", "--srt", "no/such/folder/out.srt"], "There is no folder 'no/such/folder'"),
        (["narrate", "camera:0", "--burn-in", "out.mp4"], "--burn-in needs a video file"),
        (["narrate", "camera:99"], "'camera:99' cannot be read as video"),
        (["inspect", "no/such-model"], "error: "),
        (["inspect", str(ROOT / "README.md")], "is a file: give the folder of a checkpoint"),
        (["narrate", "--srt", str(ROOT)], "is a folder: name a file in it"),
        (["narrate", "--when-behind", "wait"], "--when-behind can be catch_up, drop_oldest, block, not 'wait'"),
        (["narrate", "--burn-in", "out.txt"], "--burn-in writes an mp4: call it so, and not 'out.txt'"),
    ],
)
def test_mistakes_are_answered_in_one_line(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    failed = CliRunner().invoke(cli.app, arguments)
    assert failed.exit_code == 1 and message in failed.stderr
    assert isinstance(failed.exception, SystemExit)
    assert len([line for line in failed.stderr.splitlines() if line.startswith("error:")]) == 1


def test_of_a_stream_without_end_the_newest_frames_are_remembered():
    done = run("narrate", "--max-frames", 8, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    whole = json.loads(run("narrate", "--json").stdout.splitlines()[-1])["summary"]
    assert summary["frames"] == whole["frames"] == 17 and 1 <= summary["frames_remembered"] <= 8
    # At least nine frames less, of 16 tokens in full layers and 4 in routed ones, with what stood between them.
    fewer = [a - b for a, b in zip(whole["cache_entries"], summary["cache_entries"], strict=True)]
    assert min(fewer[:2]) > 9 * 16 and min(fewer[2:]) > 9 * 4


def test_a_video_is_not_written_onto_itself(tmp_path):
    video = tmp_path / "mine.mp4"
    video.write_bytes(SAMPLE.read_bytes())
    for option in ("--burn-in", "--srt"):
        failed = run("narrate", video, option, video)
        assert failed.returncode == 1 and "is the video itself: write to another file" in failed.stderr
        assert video.read_bytes() == SAMPLE.read_bytes()


def test_what_is_no_checkpoint_of_ours_is_said(tmp_path):
    LlamaConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "llama")
    for command in (["narrate", "--model", tmp_path / "llama"], ["inspect", tmp_path / "llama"]):
        failed = run(*command)
        assert failed.returncode == 1 and "is a llama and no VideoLLM-MoD." in failed.stderr
        assert "Traceback" not in failed.stderr
    broken = copy_embedded(tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    failed = run("narrate", "--model", broken)
    assert failed.returncode == 1 and "error: The weights are no whole safetensors file" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_of_a_checkpoint_on_the_hub_a_revision(tmp_path):
    files = embedded_files()
    config = json.loads(files["config.json"]) | {"interval_threshold": 0.25}
    later = {**files, "config.json": json.dumps(config).encode()}
    with Hub() as hub:
        hub.repos["somebody/toy"] = [files, later]
        for revision, threshold in ((commit_hash("somebody/toy", 0), 0.5), ("main", 0.25)):
            command = [sys.executable, str(ROOT / "cli.py"), "inspect", "somebody/toy"]
            command += ["--revision", revision, "--json"]
            environment = {**os.environ, **hub.environment(tmp_path / "home")}
            shown = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert shown.returncode == 0, shown.stderr
            assert json.loads(shown.stdout)["interval_threshold"] == threshold


def test_a_shell_completes_it():
    words = {"_VIDEOLLM_MOD_COMPLETE": "complete_bash", "COMP_WORDS": "videollm-mod conv", "COMP_CWORD": "1"}
    command = [Path(sys.executable).parent / "videollm-mod"]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["convert", "convert-llava"], done.stderr


def test_help_names_every_option():
    shown = run("narrate", "--help").stdout
    for option in ("--model", "--query", "--fps", "--threshold", "--burn-in", "--json", "A file, a URL"):
        assert option in shown


def test_narrate_in_eight_bits():
    plain, eight = run("narrate", "--json"), run("narrate", "--json", "--weights", "int8", "--cache", "fp8")
    assert plain.returncode == eight.returncode == 0, eight.stderr
    figures = [json.loads(done.stdout.splitlines()[-1])["summary"] for done in (plain, eight)]
    assert figures[0]["cache_bytes"] == 4 * figures[1]["cache_bytes"]
    assert figures[0]["full_cache_bytes"] == pytest.approx(4 * figures[1]["full_cache_bytes"], rel=1e-3)
    for option, message in (("--cache", "--cache can be fp8, not 'x'"), ("--weights", "can be int8 or fp8, not 'x'")):
        done = run("narrate", option, "x")
        assert done.returncode == 1 and message in done.stderr
