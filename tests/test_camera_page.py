# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`docs/camera.html` in a real browser: a camera's pictures go to a real server, and words come back."""

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, camera_flags, needs_chromium
from engines import embedded
from playwright.sync_api import expect, sync_playwright
from serving_server import ROOMY, running


ROOT = Path(__file__).parents[1]
SOON = 60_000  # Milliseconds, on a machine that is busy with other tests.

pytestmark = [needs_chromium, pytest.mark.xdist_group("browser")]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def pages():
    """Serve the folder of the page, and return its origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=ROOT / "docs")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_camera_is_narrated(pages, tmp_path):
    """The camera shows the sample clip. A page at another origin is refused, and says what to do."""
    model, processor, _ = embedded()
    flags = camera_flags(ROOT / "samples" / "streamworld.mp4", tmp_path / "camera.y4m")
    flags.append("--use-fake-ui-for-media-stream")
    with (
        running(model, processor, engine_options=ROOMY, cors=[pages]) as (address, server),
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = chromium.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{pages}/camera.html")
        page.get_by_label("Server").fill(f"ws://{address}/v1/realtime")
        page.get_by_role("button", name="Start").click()
        said = page.locator("#said li")
        expect(said.first).to_have_text(re.compile(r"^\w+ \w+.*\.$"), timeout=SOON)
        expect(page.get_by_role("status")).to_contain_text("Seen up to", timeout=SOON)
        (session,) = server.sessions
        assert session.options.fps == 2 and session.num_received >= 2
        page.get_by_label("Question").fill("How many things do you see?")
        page.get_by_role("button", name="Ask").click()
        answer = said.filter(has_text=re.compile(r"^(None|One|Two|Three|Four)\.$"))
        expect(answer.first).to_be_attached(timeout=SOON)
        page.goto(f"{pages.replace('127.0.0.1', 'localhost')}/camera.html")
        page.get_by_label("Server").fill(f"ws://{address}/v1/realtime")
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("status")).to_contain_text("--cors", timeout=SOON)
        chromium.close()
    assert errors == []
