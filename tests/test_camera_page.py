# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`docs/camera.html` in a real browser: a camera's pictures go to a real server, and words come back."""

import os
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, camera_flags, needs_chromium
from engines import embedded
from playwright.sync_api import expect, sync_playwright
from serving_server import ROOMY, running
from test_serving_saved_sessions import saved_in


ROOT = Path(__file__).parents[1]
ASKS = re.compile(r"^http.*/v1/realtime")
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


@pytest.fixture
def open_page(pages, tmp_path):
    """Return a function that opens the page. Its camera shows the sample clip. No script of it may fail."""
    flags = camera_flags(ROOT / "samples" / "streamworld.mp4", tmp_path / "camera.y4m")
    flags.append("--use-fake-ui-for-media-stream")
    errors = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)

        def open_it(address, origin=pages):
            page = chromium.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.clock.install()
            page.add_init_script(RECORD)
            page.goto(f"{origin}/camera.html")
            page.get_by_label("Server").fill(f"ws://{address}/v1/realtime")
            page.get_by_role("button", name="Start").click()
            return page

        yield open_it
        chromium.close()
    assert errors == []


# The times of the frames that a page sends, by connection, what its status and progress say, and the lines of replies
# that change while a screen reader hears them.
RECORD = """
window.sent = [];
window.statuses = [];
window.changed = [];
document.addEventListener("DOMContentLoaded", () => {
  const note = (changes) => changes.forEach(({ addedNodes: [text] }) => window.statuses.push(text?.data ?? ""));
  const observer = new MutationObserver(note);
  for (const id of ["status", "progress"]) observer.observe(document.getElementById(id), { childList: true });
  const check = (changes) => {
    const lines = changes.map(({ target }) => target).filter((it) => it.matches("li:not(.note, [aria-hidden=true])"));
    window.changed.push(...lines.map((line) => line.textContent));
  };
  new MutationObserver(check).observe(document.getElementById("said"), { childList: true, subtree: true });
});
const { send } = WebSocket.prototype;
WebSocket.prototype.send = function (data) {
  this.times ??= (window.sent.push([]), window.sent.at(-1));
  const { videollm_mod, item } = JSON.parse(data);
  if (item?.content[0].type === "input_image") this.times.push(videollm_mod.time);
  send.call(this, data);
};
"""


def test_a_camera_is_narrated(pages, open_page):
    """A page at another origin is refused, and says what to do."""
    model, processor, _ = embedded()
    with running(model, processor, engine_options=ROOMY, cors=[pages]) as (address, server):
        page = open_page(address)
        said = page.locator("#said li")
        expect(said.first).to_have_text(re.compile(r"^\w+ \w+.*\.$"), timeout=SOON)
        expect(page.locator("#progress")).to_contain_text("Seen up to", timeout=SOON)
        (session,) = server.sessions
        assert session.options.fps == 2 and session.num_received >= 2
        page.get_by_label("Question").fill("How many things do you see?")
        page.get_by_role("button", name="Ask").click()
        answer = said.filter(has_text=re.compile(r"^(None|One|Two|Three|Four)\.$"))
        expect(answer.first).to_be_attached(timeout=SOON)
        expect(answer.first).not_to_have_attribute("aria-hidden", "true", timeout=SOON)
        assert page.evaluate("changed") == [], "a screen reader hears complete replies"
        page.evaluate("() => { send({ type: 'no_such_event' }); statuses.length = 0; }")
        page.wait_for_function(
            "() => statuses.filter((said) => said.startsWith('Seen up to')).length > 2", timeout=SOON
        )
        expect(page.get_by_role("status")).to_contain_text("no_such_event")
        assert page.locator("#progress").evaluate("(it) => it.closest('[role], [aria-live]')") is None
        page = open_page(address, pages.replace("127.0.0.1", "localhost"))
        expect(page.get_by_role("status")).to_contain_text("--cors", timeout=SOON)


def test_an_address_without_its_beginning_is_named(open_page):
    """It is not taken for a missing camera."""
    page = open_page("127.0.0.1:9")
    status = page.get_by_role("status")
    expect(status).to_contain_text("The connection has ended", timeout=SOON)
    for wrong in ("localhost:8000/v1/realtime", "127.0.0.1:8000", ""):
        page.get_by_label("Server").fill(wrong)
        page.get_by_role("button", name="Start").click()
        expect(status).to_contain_text("must begin with ws:// or wss://", timeout=SOON)


def test_a_page_that_loses_its_server_goes_on_with_its_session(pages, open_page, tmp_path):
    """
    The server falls silent. Then it is restarted with a save like those of a killed server, and then without one. No
    frame is sent twice. At last someone presses Start while the page asks for its session.
    """
    model, processor, _ = embedded()
    given = {"engine_options": ROOMY, "cors": [pages], "state_dir": tmp_path / "state", "resume_seconds": 300.0}

    def watch(server, count):
        """Wait until the only session of a server has some frames more. Return it."""
        seen = page.evaluate("() => window.sent.flat().length")
        page.wait_for_function(f"() => window.sent.flat().length >= {seen + count}", timeout=SOON)
        (session,) = server.sessions
        return session

    def wait_until_told(text):
        """Wait until the status says a text, or has said it since the last call."""
        find = "(text) => statuses.splice(0, statuses.findIndex((said) => said.includes(text)) + 1).length"
        page.wait_for_function(find, arg=text, timeout=SOON)

    with running(model, processor, **given) as (address, server):
        page = open_page(address)
        notes = page.locator("#said li.note")
        wait_until_told("Seen up to")
        first = watch(server, 2)
        page.clock.fast_forward(21_000)
        wait_until_told("the server is silent. Connecting again.")
        wait_until_told("Seen up to")
        assert watch(server, 2) is first and first.last_time > 21
    page.route(ASKS, lambda route: route.fulfill(status=404, json={"detail": "no server behind this proxy"}))
    wait_until_told("status 404. Connecting again.")
    page.unroute(ASKS)
    (saved,) = saved_in(tmp_path / "state")
    (saved / "server.txt").write_text("")
    os.utime(saved, (2e9, 2e9))
    serve = partial(running, model, processor, port=int(address.rpartition(":")[2]), **given)
    with serve() as (_, server):
        wait_until_told("Seen up to")
        second = watch(server, 2)
        assert second.token == first.token and second.last_time > first.last_time
        seen = page.evaluate(f"() => ({first.last_time!r}).toFixed(1)")
        expect(notes).to_have_text([f"The server has forgotten what came after {seen} s."])
    wait_until_told("Connecting again.")
    shutil.rmtree(tmp_path / "state")
    with serve() as (_, server):
        expect(notes).to_have_count(2, timeout=SOON)
        expect(notes.last).to_have_text("A new session begins here: the one before has expired.")
        third = watch(server, 2)
        assert third.token != first.token and third.options.fps == 2
        *resumed, new = page.evaluate("() => window.sent.filter((times) => times.length)")
        asked = []
        page.route(ASKS, lambda route: asked.append(route), times=1)
        with page.expect_request(ASKS, timeout=SOON):
            page.clock.fast_forward(21_000)
        page.get_by_role("button", name="Start").click()
        page.wait_for_function("() => socket?.readyState === 1 && hasBegun", timeout=SOON)
        count = page.evaluate("() => window.sent.length")
        asked[0].abort()
        page.clock.fast_forward(2000)  # longer than it would wait
        page.wait_for_timeout(1000)
        assert page.evaluate("() => window.sent.length") == count, "Start has made the only connection"
    page.evaluate("() => { server = 'https://camera.example/v1/realtime'; }")
    assert page.evaluate("() => ['ws', 'http'].map((scheme) => address(scheme).protocol)") == ["wss:", "https:"]
    times = [time for connection in resumed for time in connection]
    assert len(resumed) == 3 and times == sorted(set(times)) and new == sorted(set(new))
    assert new[0] < times[-1]
    assert first.num_received < second.num_received <= len(times), "some were on their way when a connection broke"
