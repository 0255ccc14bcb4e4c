# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""README and docs: the Python and the commands run as written, and every link leads somewhere."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from ego_annotations import write_ego_downloads
from endpoints import scripted_endpoint
from engines import embedded
from hub import Hub
from page_samples import save_aqtc, save_captions_and_moments, save_coin, save_vript
from programs import run_main
from published import save_live, save_source
from serving_server import ROOMY, picture, running
from streaming_annotations import write_streaming_downloads
from tiny import embedded_files
from transformers import GenerationConfig

from videollm_mod import VideoLLMMoDConfig, cli, read_video
from videollm_mod.remembering_videollm_mod import checkpoint_limits
from videollm_mod.routers_videollm_mod import ROUTERS
from videollm_mod.serving.limits import Limits
from videollm_mod.train.data.converters import CONVERTERS, find_converter
from videollm_mod.train.data.sources import SOURCES
from videollm_mod.train.tasks import TASKS


ROOT = Path(__file__).parents[1]
LOCAL = "localhost:8000"  # where pages have their server
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("benchmarks", "commands", "convert", "docs", "samples", "serving", "space", "train")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    """Return the code blocks of a page, including those in lists."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(block) for _, block in found]


class Camera:
    """Shows the first four seconds of the sample, two frames per second. Each reader sees them from the beginning."""

    def __iter__(self):
        for _, frame in read_video(ROOT / "samples" / "streamworld.mp4", fps=2, end=4.0):
            yield frame
            time.sleep(0.5)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_page_runs(monkeypatch, capsys, tmp_path, page):
    """All blocks run in order, in one namespace, from the root of the checkout."""
    namespace, found = {"camera": Camera()}, blocks(page, "python")
    is_client = any(LOCAL in block for block in found)
    if any('"smol"' in block for block in found):
        save_source("smolvlm", tmp_path / "source")
        assert run("videollm-mod convert source smol", tmp_path).returncode == 0
        found = [block.replace('"smol"', repr(str(tmp_path / "smol"))) for block in found]
    monkeypatch.chdir(ROOT)
    # A page may register routers, data sources and tasks; other tests must not see them.
    with patch.dict(ROUTERS), patch.dict(SOURCES), patch.dict(CONVERTERS), patch.dict(TASKS), ExitStack() as stack:
        address = stack.enter_context(server_of_pages()) if is_client else LOCAL
        for block in found:
            exec(compile(block.replace(LOCAL, address), page.name, "exec"), namespace)
    printed = capsys.readouterr().out
    if page == PAGES[0]:
        # "narrate" and the session say when, and the engine says what.
        assert len(re.findall(r"^ +\d+\.\ds  A red tree enters from the left\.$", printed, flags=re.MULTILINE)) == 2
        assert "\nA red tree enters from the left.\n" in printed and "of the operations" in printed
    expected = {
        "stream-format.md": "[#,#",
        "configuration.md": "Did you mean `mod_keep_ratio`?",
        "extending.md": "(10, 96, 96, 3)",
        "laptop.md": "(256, 256) ",
        "serving.md": "The red tree hides behind the wall.\nOne. ",
    }
    assert expected.get(page.name, "") in printed
    if page.name == "from-videollm-online.md":
        weights, *rows = printed.strip().splitlines()
        text = page.read_text(encoding="utf-8")
        assert weights == "weights: 16.7 GB, encoding a frame: 0.384 TFLOP" and "0.384 TFLOP per frame" in text
        assert rows == [line.strip() for line in text.splitlines() if re.match(r" *\| \d", line)]
    if page.name == "evaluation.md":
        assert printed == "".join(blocks(page, "text"))
    if page.name == "models.md":
        text = page.read_text(encoding="utf-8")
        assert printed.splitlines() == re.findall(r"^\| [^|`]*\d+[BM] \| \d.*\|$", text, flags=re.MULTILINE)


# Not run here: "make" runs these tests, and its recipe and page have tests of their own.
# "accelerate launch" needs eight GPUs; tests/test_train_sft.py runs it on two processes.
# "docker" needs a daemon; tests/test_dockerfile.py checks the files. tests/test_generic_server.py runs "transformers".
# tests/test_serving_ray_app.py does what the commands of Ray do, tests/test_commands_data_set.py those of data sets.
ELSEWHERE = ("make ", "accelerate launch", "docker ", "transformers serve", "serve run ")
ELSEWHERE += ("videollm-mod narrate videos/ --ray", "videollm-mod narrate hf://", "python train/recipe.py")


def commands(page):
    """Return the commands of a page, in order."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [line for line in found if line and not line.startswith(ELSEWHERE)]


def run(command, folder):
    """Run a command in a folder: in this process, without seconds of imports, if it loads no code from the Hub."""
    program, *arguments = shlex.split(command)
    if program == "python":
        script, *arguments = arguments
        return run_main(lambda: runpy.run_path(script, run_name="__main__"), *arguments, folder=folder)
    if program == "videollm-mod" and not {"somebody/checkpoint", "somebody/narrator"} & set(arguments):
        return run_main(cli.main, *arguments, folder=folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CURL_HOME": str(folder)}
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)


@contextmanager
def server_of_pages():
    """Serve the embedded checkpoint; gives the address."""
    model, processor, _ = embedded()
    with running(model, processor, engine_options=ROOMY) as (address, _):
        yield address


def serve(command, folder, stack):
    """Serve for the commands that follow, and return the address. The options of the command are checked, not used."""
    assert run(f"{command} --help", folder).returncode == 0, command
    return stack.enter_context(server_of_pages())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Serve tiny models under the names that the pages use."""
    folder = tmp_path_factory.mktemp("published")
    save_live(folder / "language", folder / "vision", folder / "adapter")
    save_source("smolvlm", folder / "smolvlm")
    names = {
        "meta-llama/Meta-Llama-3-8B-Instruct": folder / "language",
        "google/siglip-large-patch16-384": folder / "vision",
        "chenjoya/videollm-online-8b-v1plus": folder / "adapter",
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": folder / "smolvlm",
    }
    with Hub() as server:
        for name, path in names.items():
            server.repos[name] = [{file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}]
        server.repos["somebody/checkpoint"] = [embedded_files()]
        yield SimpleNamespace(server=server, folder=folder)


def complete_lines(request):
    """Return the lines of a dialogue that a prompt asks for."""
    lines = re.findall(r"^\[.*?\] (?:User|Assistant): .*", request["messages"][-1]["content"], flags=re.MULTILINE)
    return "\n".join(line.replace("...", f"Words {number}.") for number, line in enumerate(lines))


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_of_page_run(page, hub, tmp_path):
    """The commands run as written, in order, in a folder that looks like a checkout and has the files they name."""
    for path in ROOT.iterdir():
        if path.name in FOLDERS or path.suffix in (".py", ".json", ".jinja", ".safetensors"):
            (tmp_path / path.name).symlink_to(path)
    for name in ("talk.mp4", "video.mp4", "holiday.mp4"):
        shutil.copy(ROOT / "tests" / "data" / "nasa_13013.mp4", tmp_path / name)
    (tmp_path / "talk.srt").write_text("1\n00:00:01,000 --> 00:00:02,500\nA sentence of a talk.\n")
    messages = [{"role": "assistant", "content": "It is dark.", "time": 1.0}]
    (tmp_path / "your.jsonl").write_text(json.dumps({"video": "talk.mp4", "messages": messages}) + "\n")
    steps = [{"role": "assistant", "content": text, "time": time} for time, text in enumerate(("Wait.", "Look up."))]
    (tmp_path / "steps.jsonl").write_text(json.dumps({"video": "talk.mp4", "messages": steps}) + "\n")
    write_ego_downloads(tmp_path, tmp_path / "video.mp4")
    write_streaming_downloads(tmp_path, tmp_path / "video.mp4")
    for name, part in (("BASE", "language"), ("ADAPTER", "adapter")):
        (tmp_path / name).symlink_to(hub.folder / part)
    if page.name == "data.md":
        for save_sample in (save_coin, save_captions_and_moments, save_vript, save_aqtc):
            save_sample(tmp_path)
    (tmp_path / ".curlrc").write_text("fail\n")  # a status of 400 and more is an error
    (tmp_path / "frame.jpg").write_bytes(picture(embedded()[2][0], "JPEG"))
    with hub.server.used_here(tmp_path / "home"), ExitStack() as stack:
        endpoint, _ = stack.enter_context(scripted_endpoint(complete_lines))
        address = endpoint.split("/")[2]
        for command in commands(page):
            if command.startswith("videollm-mod serve"):
                address = serve(command, tmp_path, stack)
                continue
            done = run(command.replace(LOCAL, address), tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def test_nothing_is_installed_by_a_name_that_is_not_published():
    """No registry has this project yet, so its extras are installed from the checkout."""
    sources = [path for folder in (ROOT, *map(ROOT.joinpath, FOLDERS)) for path in folder.glob("*.py")]
    sources += [path for folder in ("train", "convert") for path in (ROOT / folder).glob("*/**/*.py")]
    for path in {*PAGES, *sources, ROOT / "CHANGELOG.md"}:
        assert not re.search(r"pip install [^`\n]*videollm-mod", path.read_text(encoding="utf-8")), path


def test_the_readme_is_short():
    text = README.split("\n---\n", 1)[1]
    assert README.startswith("---\n") and len(text.splitlines()) < 200


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_make_targets_of_readme_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"python ((?:docs|benchmarks|train|space|convert)/\S+\.py)", text):
        assert (ROOT / path).exists(), path


def test_every_configuration_field_is_documented():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    ours = {f.name for f in dataclasses.fields(VideoLLMMoDConfig) if f.name in VideoLLMMoDConfig.__annotations__}
    limits = checkpoint_limits(GenerationConfig.from_pretrained(ROOT))
    assert len(limits) == 3 and set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == ours | set(limits)


@pytest.mark.parametrize("source", sorted(CONVERTERS))
def test_every_source_of_data_says_what_a_reader_needs(source):
    """A table with licence, place, size, tasks, measures and what was never run, and the command."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    listed = ""
    for section in re.split(r"^#{2,3} ", page, flags=re.MULTILINE):
        rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", section, flags=re.MULTILINE))
        if re.search(rf"\b{source}_", tasks := rows.get("tasks", "")):
            assert rows.keys() >= {"licence", "where to get it", "size", "tasks", "measures", "never run on"}
            assert "python train/data/prepare.py " in section or "commands are at the top of this page" in section
            listed += tasks
    names = [name for name in TASKS if name in {f"{source}_{task}" for task in find_converter(source).tasks}]
    # Of OVO-Bench's twelve, one is named.
    missing = [name for name in names if f"`{name}`" not in listed and f"`{name.removeprefix(source)}`" not in listed]
    assert listed and (not missing or source == "ovo_bench"), missing


def test_every_limit_of_the_server_is_documented():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", page, flags=re.MULTILINE)
    known = {name for row in rows for name in re.findall(r"\w+", row)}
    known |= {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)", page)}
    assert {field.name for field in dataclasses.fields(Limits)} <= known
