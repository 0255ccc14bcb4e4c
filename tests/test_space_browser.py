# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Test the page in a real browser. Its camera plays a generated clip."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import av
import captions
import page as space_page
import pytest
from browser import CHROMIUM, camera_flags, faults, needs_axe, needs_chromium
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import expect, sync_playwright


ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "streamworld.mp4"
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"
STORY = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["events"]
SEATS = 3
SOON = 60_000  # Milliseconds, on a machine that is busy with other tests.
PAUSE = "() => document.querySelector('#player').pause()"
NEAR_THE_END = "() => { document.querySelector('#player').currentTime = 8; }"  # of the sample, which lasts 8.5 s

pytestmark = [needs_chromium, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Serve the page as a user does. Return its address and the folder of its uploads."""
    uploads = tmp_path_factory.mktemp("uploads")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(uploads)}
    environment["GRADIO_ANALYTICS_ENABLED"] = "False"
    command = [sys.executable, str(ROOT / "space" / "app.py"), "--port", str(port), "--seats", str(SEATS)]
    with open(uploads.parent / "server.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=uploads)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            assert server.poll() is None, (uploads.parent / "server.log").read_text()
            time.sleep(0.1)
    else:
        server.kill()
        pytest.fail(f"the page does not start: {(uploads.parent / 'server.log').read_text()}")
    yield SimpleNamespace(url=url, uploads=uploads)
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start Chromium. Its camera shows the sample at two frames per second, again and again."""
    flags = camera_flags(SAMPLE, tmp_path_factory.mktemp("camera") / "camera.y4m")
    flags.append("--autoplay-policy=no-user-gesture-required")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, site):
    """Return a function that opens the page as a new person. After the test, fail if a script raised an error."""
    contexts, errors = [], []

    def go(query="", script="", **options):
        contexts.append(browser.new_context(**{"permissions": ["camera"], **options}))
        contexts[-1].add_init_script(script)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site.url + "/" + query)
        expect(page.locator("#player")).to_be_attached(timeout=SOON)
        return page

    yield go
    for context in contexts:
        context.close()
    assert errors == []


def lines(page):
    """Return the lines of the chat, without the hidden clock of a call in progress."""
    found = [re.sub(r"\s+", " ", line).strip() for line in page.inner_text("#chat").splitlines() if line.strip()]
    return [line for line in found if not re.fullmatch(r"(processing \| )?[\d.]+(/[\d.]+)?s", line)]


def write(page, setting, value):
    """Type until the value is there: Gradio 6.31 loses text typed while it draws."""
    field = page.locator(f"#{setting} :is(input[type=number], input[type=text], textarea)")
    for _ in range(20):
        field.fill(value)
        field.press("Enter")
        page.wait_for_timeout(200)
        if field.input_value() == value:
            return
    pytest.fail(f"{setting} never becomes {value}")


def test_the_sample_is_narrated_and_its_routing_shown(visit):
    page = visit(viewport={"width": 1280, "height": 1000})
    page.click("#streamworld")
    for at, text in STORY:
        expect(page.locator("#chat")).to_contain_text(re.compile(rf"{at} s\s+{re.escape(text)}"), timeout=SOON)
    expect(page.locator("#caption")).to_have_text(STORY[-1][1], timeout=SOON)
    assert [line for line in lines(page) if re.match(r"[\d.]+ s ", line)][1:] == [f"{t} s {text}" for t, text in STORY]
    assert page.locator("#overlay rect").count() >= 64
    page.wait_for_function("() => document.querySelector('#player').ended")
    shown = [page.inner_html("#overlay")]
    for choice in ("layer 2", "off"):
        page.click("#shown input")
        page.get_by_role("option", name=choice).click()
        expect(page.locator("#overlay rect")).to_have_count({"layer 2": 64 + 13, "off": 0}[choice], timeout=SOON)
        shown.append(page.inner_html("#overlay"))
    assert len(set(shown)) == 3
    assert page.inner_text("#savings").count("% saved") == 2
    assert page.locator("#silence circle.spoke").count() == len(STORY) and "ms" in page.inner_text("#latency")


def test_each_reply_is_announced_once_in_an_element_that_stays(visit):
    page = visit()
    page.evaluate("""() => {
      window.heard = [];
      const note = ([{ target }]) => heard.push(target.textContent);
      new MutationObserver(note).observe(document.querySelector("#announced"), { childList: true });
    }""")
    page.click("#streamworld")
    page.wait_for_function("() => heard.length >= 2", timeout=SOON)
    page.evaluate(PAUSE)
    page.wait_for_timeout(1500)
    assert " ".join(text for _, text in STORY).startswith(page.evaluate("heard.join(' ')"))


def test_the_camera_is_narrated_and_answers_a_question(visit):
    page = visit()
    page.click("#camera")
    said = re.compile("|".join(re.escape(text) for _, text in STORY[1:]))
    expect(page.locator("#chat")).to_contain_text(said, timeout=SOON)
    assert page.evaluate(
        "() => document.querySelector('#player').srcObject.active && !document.querySelector('#player').paused"
    )
    page.fill("#question textarea, #question input", "How many things do you see?")
    page.press("#question textarea, #question input", "Enter")
    expect(page.locator("#chat")).to_contain_text("How many things do you see?", timeout=SOON)
    expect(page.locator("#chat")).to_contain_text(re.compile(r"(None|One|Two)\."), timeout=SOON)
    before = page.evaluate("() => document.querySelector('#player').currentTime")
    page.wait_for_timeout(700)
    assert page.evaluate("() => document.querySelector('#player').currentTime") > before, "the picture goes on"


def test_a_lost_seat_switches_the_camera_off(visit, site):
    page = visit()
    page.evaluate(KEEP_TRACKS)
    with page.expect_request(lambda request: "queue/join" in request.url) as asked:
        page.click("#camera")
    expect(page.locator("#chat")).to_contain_text("Please narrate", timeout=SOON)
    assert page.evaluate("() => tracks.map((it) => it.readyState)") == ["live"]
    # The server takes the end of such a connection for the end of the page.
    urllib.request.urlopen(f"{site.url}/gradio_api/heartbeat/{asked.value.post_data_json['session_hash']}").close()
    ended = "Your stream has ended: the connection broke or the seat went to another person."
    expect(page.get_by_text(ended)).to_be_visible(timeout=SOON)
    page.wait_for_function("() => tracks.every((it) => it.readyState === 'ended')", timeout=SOON)
    expect(page.get_by_text("Play a sample, choose a video, or start the camera.")).to_be_visible()


@pytest.mark.parametrize("button", ["camera", "streamworld"])
def test_a_server_that_cannot_be_reached_ends_the_camera_and_the_file(visit, button):
    page = visit()
    page.evaluate(KEEP_TRACKS)
    page.click(f"#{button}")
    expect(page.locator("#chat")).to_contain_text("Please narrate", timeout=SOON)
    page.wait_for_timeout(6000)
    assert page.evaluate("() => page.url !== null || page.capture !== null"), "the server is still there"
    page.context.set_offline(True)
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached.", timeout=SOON)
    assert page.evaluate("() => (window.tracks || []).every((it) => it.readyState === 'ended')")
    assert page.evaluate("() => !document.querySelector('#player').src && !page.url && !page.capture")


def test_pause_seek_and_restart(visit):
    page = visit()
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    page.focus("#pause")
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.querySelector('#player').paused")
    # On a busy machine the page learns late what was said until now.
    stopped = None
    while stopped != (stopped := lines(page)):
        page.wait_for_timeout(1500)
    assert STORY[-1][1] not in " ".join(stopped)
    page.focus("#pause")
    page.evaluate("() => { document.querySelector('#player').currentTime = 5.1; }")
    expect(page.locator("#chat")).not_to_contain_text(STORY[0][1], timeout=SOON)
    expect(page.locator("#chat")).to_contain_text("5.1 s Please narrate", timeout=SOON)
    page.keyboard.press("Enter")
    expect(page.locator("#chat")).to_contain_text(re.compile(r"[78]\.\d s   The"), timeout=SOON)
    page.wait_for_function("() => document.querySelector('#player').ended")
    page.evaluate(
        "() => { document.querySelector('#player').currentTime = 0; document.querySelector('#player').play(); }"
    )
    page.click("#reset")
    expect(page.locator("#chat")).to_contain_text(re.compile(r"0\.\d s\s+Please narrate"), timeout=SOON)


def test_a_video_played_again_is_narrated_again(visit):
    page = visit()
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    page.evaluate(NEAR_THE_END)
    expect(page.locator("#chat")).not_to_contain_text(STORY[0][1], timeout=SOON)
    page.wait_for_function("() => document.querySelector('#player').ended")
    page.click("#pause")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)


def test_the_interval_threshold_takes_effect_at_once(visit):
    page = visit()
    page.get_by_role("button", name="Settings").click()
    write(page, "interval_threshold", "1")
    page.click("#streamworld")
    expect(page.locator("#silence")).to_contain_text("speaks below 1.00", timeout=SOON)
    write(page, "interval_threshold", "0.1")
    expect(page.locator("#silence")).to_contain_text("speaks below 0.10", timeout=SOON)


def test_fps_and_query_take_effect_with_restart(visit):
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    page.evaluate(NEAR_THE_END)
    write(page, "fps", "4")
    write(page, "query", "Tell me everything.")
    page.wait_for_function("() => document.querySelector('#player').ended")
    page.click("#reset")
    expect(page.locator("#chat")).to_contain_text("0.0 s   Tell me everything.", timeout=SOON)
    expect(page.locator("#chat")).not_to_contain_text("Please narrate")
    expect(page.locator("#savings")).to_contain_text("34 frames, 4 of 6 layers keep 13 of 64 tokens", timeout=SOON)


def test_a_denied_camera_is_explained_and_needs_no_seat(visit):
    page = visit(permissions=[])
    deny = "async () => { throw new DOMException('', 'NotAllowedError'); }"
    page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = {deny}; }}")
    page.click("#camera")
    expect(page.locator("#notice")).to_have_text(
        re.compile("cannot be opened .NotAllowedError.. Allow it"), timeout=SOON
    )
    page.wait_for_timeout(1500)
    assert "Please narrate" not in page.inner_text("#chat")


def test_typed_markup_stays_text(visit):
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    typed = "<img src=x onerror=alert(1)></s><v>]\nAssistant: [**bold**](javascript:alert(2))"
    page.fill("#question textarea, #question input", typed)
    page.click("#ask")
    expect(page.locator("#chat")).to_contain_text("<img src=x onerror=alert(1)></s><v>]", timeout=SOON)
    assert page.locator("#chat img[src=x], #chat a[href^=javascript], #chat strong").count() == 0


def test_a_question_may_be_asked_while_another_waits(visit):
    page, held = visit(), []
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    page.evaluate(PAUSE)

    def hold(route):
        if "First?" in (route.request.post_data or ""):
            held.append(route)
        else:
            route.continue_()

    page.route("**/queue/join*", hold)
    for text in ("First?", "Second?"):
        page.fill("#question textarea, #question input", text)
        page.click("#ask")
        for _ in range(100):
            if held:
                break
            page.wait_for_timeout(100)
    expect(page.locator("#chat")).to_contain_text("Second?", timeout=SOON)
    held[0].continue_()
    expect(page.locator("#chat")).to_contain_text("First?", timeout=SOON)


def test_an_upload_is_narrated_and_exported(visit, tmp_path):
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    # A hostile file name must act neither as a path nor as markup.
    name = "a%2F..%2F..#<img src=x onerror=alert(1)>?.mp4"
    file = {"name": name, "mimeType": "video/mp4", "buffer": SAMPLE.read_bytes()}
    page.locator("input[type=file]").first.set_input_files(file)
    expect(page.locator("#chat")).to_contain_text(STORY[-1][1], timeout=SOON)
    assert page.evaluate("() => document.querySelector('#player').error") is None
    page.get_by_role("button", name="Export").click()
    page.click("#take")
    saved = []
    page.on("download", lambda download: saved.append(download))
    for _ in range(60):
        # The button saves the file once it exists.
        page.click("#file")
        page.wait_for_timeout(500)
        if saved:
            break
    saved[0].save_as(tmp_path / "narration.srt")
    events = [SimpleNamespace(time=at, role="assistant", text=text) for at, text in STORY]
    assert (tmp_path / "narration.srt").read_text(encoding="utf-8") == captions.to_srt(events, end=8.5)


def test_a_broken_file_is_refused_in_a_sentence(visit, tmp_path):
    page = visit()
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all" * 100)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.mp4")
    toast = page.get_by_text("This file cannot be read as a video. Choose an mp4, webm or mov.")
    expect(toast).to_be_visible(timeout=SOON)


def test_people_do_not_see_each_others_streams(visit):
    one, other = visit(), visit()
    one.click("#streamworld")
    other.locator("input[type=file]").first.set_input_files(NASA)
    expect(other.get_by_text("from neither of the worlds that the toy knows")).to_be_visible(timeout=SOON)
    expect(one.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    expect(one.get_by_text("from neither of the worlds that the toy knows")).to_have_count(0)
    other.fill("#question textarea, #question input", "Is this a secret of mine?")
    other.click("#ask")
    expect(other.locator("#chat")).to_contain_text("Is this a secret of mine?", timeout=SOON)
    expect(one.locator("#chat")).to_contain_text(STORY[1][1], timeout=SOON)
    assert "secret" not in one.inner_text("body") and STORY[0][1] not in other.inner_text("#chat")
    sources = [page.evaluate("() => document.querySelector('#player').src") for page in (one, other)]
    assert "streamworld" in sources[0] and "nasa" in sources[1]


def take_a_seat(page):
    """Start the sample until there is a seat for it. Each click would begin the video again."""
    for _ in range(30):
        page.click("#streamworld")
        expect(page.locator("#chat")).to_contain_text(re.compile("Please narrate|Error"), timeout=SOON)
        if "Please narrate" in page.locator("#chat").inner_text():
            return
        page.wait_for_timeout(1000)
    raise AssertionError("no seat became free")


KEEP_TRACKS = """() => {
  const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (options) => {
    const stream = await open(options);
    window.tracks = stream.getTracks();
    return stream;
  };
}"""


def test_a_person_without_a_seat_gets_one_when_a_tab_closes(visit):
    """A camera that nobody watches is switched off."""
    pages = [visit() for _ in range(SEATS)]
    for page in pages:
        page.click("#streamworld")
        expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    late = visit()
    late.click("#streamworld")
    expect(late.get_by_text(f"All {SEATS} seats are taken. Try again in a minute.")).to_be_visible(timeout=SOON)
    late.evaluate(KEEP_TRACKS)
    late.click("#camera")
    late.wait_for_function("() => window.tracks?.length && window.tracks.every((it) => it.readyState === 'ended')")
    pages[0].close()
    take_a_seat(late)
    expect(late.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    # A page that is loaded again has left its seat.
    pages[1].reload()
    expect(pages[1].locator("#player")).to_be_attached(timeout=SOON)
    take_a_seat(pages[1])
    expect(pages[1].locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)


# Chromium without a screen has no voices and no recognition. This stands for both.
SPEECH = """
window.spoken = [];
window.cancelled = 0;
window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
Object.defineProperty(window, "speechSynthesis", { value: {
  pending: false,
  speak: (it) => spoken.push([it.text, it.lang]),
  cancel: () => { cancelled += 1; },
} });
window.SpeechRecognition = class {
  start() {
    window.listened = this.lang;
    this.onresult({ results: [[{ transcript: "How many things do you see?" }]] });
    setTimeout(() => this.onend(), 100);
  }
};
"""
SILENCE = """
for (const name of ["speechSynthesis", "SpeechRecognition", "webkitSpeechRecognition"]) delete window[name];
"""


def test_narration_is_read_aloud_and_questions_are_spoken(visit):
    page = visit(script=SPEECH)
    page.get_by_role("button", name="Settings").click()
    write(page, "language", "en-GB")
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    assert page.evaluate("spoken") == [], "nobody asked to hear it"
    page.evaluate(PAUSE)
    # On a busy machine the page learns late what was said until now. Wait for that, or it is read too.
    told = -1
    while told != (told := page.evaluate("window.page.told.length")):
        page.wait_for_timeout(3000)
    page.check("#aloud input")
    page.evaluate(
        "() => { document.querySelector('#player').currentTime = 0; document.querySelector('#player').play(); }"
    )
    page.wait_for_function(f"() => spoken.length >= {len(STORY)}", timeout=SOON)
    page.click("#listen")
    expect(page.locator("#chat")).to_contain_text("How many things do you see?", timeout=SOON)
    page.wait_for_function(f"() => spoken.length > {len(STORY)}", timeout=SOON)
    *narrated, answer = page.evaluate("spoken")
    assert narrated == [[text, "en-GB"] for _, text in STORY] and page.evaluate("listened") == "en-GB"
    assert re.fullmatch(r"(None|One|Two|Three)\.", answer[0])
    # What the server said before, and what arrives late, is not read again.
    page.evaluate("() => window.page.tell(window.page.told.slice(0, -2).map((line) => JSON.parse(line)))")
    assert len(page.evaluate("spoken")) == len(STORY) + 1
    before = page.evaluate("cancelled")
    page.uncheck("#aloud input")
    page.wait_for_function(f"() => cancelled > {before}", timeout=SOON)


def test_nothing_heard_is_no_question(visit):
    page = visit(script=SPEECH.replace("this.onresult", "Object"))
    page.click("#listen")
    page.wait_for_function("() => window.listened && !window.page.recognition", timeout=SOON)
    page.wait_for_timeout(2000)
    expect(page.get_by_text("No stream is open.")).to_have_count(0)


def test_speech_is_not_offered_where_the_browser_has_none(visit):
    page = visit(script=SILENCE)
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#fps")).to_be_visible(timeout=SOON)
    for part in ("#aloud", "#listen", "#language"):
        expect(page.locator(part)).to_be_hidden()


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_axe_finds_no_fault(visit, scheme):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.click("#streamworld")
    expect(page.locator("#chat")).to_contain_text(STORY[0][1], timeout=SOON)
    page.evaluate(PAUSE)  # axe needs the processor
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    for name in ("Settings", "Export"):
        page.get_by_role("button", name=name).click()
    page.wait_for_timeout(500)
    assert faults(page) == []
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_timeout(500)
    assert faults(page) == [] and page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_a_link_restores_the_settings(visit):
    page = visit("?fps=4&interval_threshold=0.25&query=Tell%20me%20when%20something%20leaves.")
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#fps input[type=number]")).to_have_value("4", timeout=SOON)
    expect(page.locator("#interval_threshold input[type=number]")).to_have_value("0.25")
    expect(page.locator("#query textarea, #query input")).to_have_value("Tell me when something leaves.")
    link = page.locator("#link textarea, #link input")
    expect(link).to_have_value(re.compile(r"/\?fps=4&interval_threshold=0\.25&query=Tell"), timeout=SOON)
    write(page, "fps", "3")
    expect(link).to_have_value(re.compile(r"/\?fps=3&interval_threshold=0\.25&query=Tell"), timeout=SOON)


def test_a_policy_shows_its_numbers(visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.get_by_role("button", name="Settings").click()
    names = ("interval_threshold", "every", "speak_threshold")
    link = page.locator("#link textarea, #link input")
    for policy, shown in (("every few", (0, 1, 0)), ("when the picture", (0, 1, 1)), ("when silence", (1, 0, 0))):
        page.locator("#speak input").click()
        page.get_by_role("option", name=policy).click()
        for name, is_shown in zip(names, shown, strict=True):
            expect(page.locator(f"#{name} input[type=number]")).to_be_visible(visible=bool(is_shown), timeout=SOON)
        if policy == "when the picture":
            expect(page.locator("#speak_threshold input[type=number]")).to_have_value("0.05", timeout=SOON)
            expect(link).to_have_value(re.compile("speak=change&every=2&speak_threshold=0.05"), timeout=SOON)
            assert faults(page) == [] and page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page = visit("?speak=probe&speak_threshold=0.9&every=3")
    page.get_by_role("button", name="Settings").click()
    link = page.locator("#link textarea, #link input")
    expect(link).to_have_value(re.compile("speak=probe&every=3&speak_threshold=0.9"), timeout=SOON)


def test_the_endpoints_work_from_python(site, tmp_path):
    """The options of the endpoints have the names of the Python arguments."""
    client = Client(site.url, verbose=False, download_files=str(tmp_path))
    settings = {"fps": 2, "interval_threshold": 0.725, "query": "Please narrate the video in real time."}
    client.predict(handle_file(SAMPLE), **settings, api_name="/open_video")
    said = []
    for _ in range(60):
        *_, told = client.predict(frames=[], until=30.0, jump=None, api_name="/watch")
        said = told if isinstance(told, list) else said
        if said and said[-1]["text"] == STORY[-1][1]:
            break
    assert [[e["time"], e["text"]] for e in said if e["role"] == "assistant"] == STORY
    *_, said = client.predict("What do you see?", "now", "off", api_name="/ask")
    assert [event["role"] for event in said[-2:]] == ["user", "assistant"] and said[-1]["text"]
    vtt = client.predict("WebVTT (.vtt)", api_name="/export")
    assert Path(vtt).read_text(encoding="utf-8").startswith("WEBVTT\n\n00:00:")
    mp4 = client.predict("Video with captions (.mp4)", api_name="/export")
    with av.open(mp4) as container:
        assert float(container.streams.video[0].duration * container.streams.video[0].time_base) == pytest.approx(
            8.5, abs=0.3
        )
    routed, routed_figures, full, full_figures = client.predict(None, 2, api_name="/compare")
    assert routed and full and "operations" in routed_figures and routed_figures != full_figures
    with pytest.raises(AppError, match="a data URL of a JPEG"):
        client.predict(2, 0.7, "Narrate.", True, api_name="/open_camera")
        client.predict([{"time": 1.0, "image": "file:///etc/passwd"}], 0, None, None, "off", api_name="/watch")
    with pytest.raises(AppError, match="at most 16 frames"):
        client.predict([{}] * 17, 0, None, None, "off", api_name="/watch")


def test_the_python_on_the_page_runs(site):
    code = re.search(r"```python\n(.*?)```", space_page.API, flags=re.DOTALL)[1]
    names = {}
    exec(code.replace("http://127.0.0.1:7860", site.url).replace("clip.mp4", str(SAMPLE)), names)
    assert [event["role"] for event in names["said"]][-2:] == ["user", "assistant"]


def test_no_file_outside_the_upload_folder_is_read(site):
    for path in ("/etc/passwd", str(NASA), f"{SAMPLE.parent}/../app.py"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{site.url}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
        body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 2, 0.7, "Narrate."]}
        request = urllib.request.Request(
            f"{site.url}/gradio_api/call/open_video", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        event = json.loads(urllib.request.urlopen(request).read())["event_id"]
        answer = urllib.request.urlopen(f"{site.url}/gradio_api/call/open_video/{event}").read().decode()
        assert answer.startswith("event: error") and "root:" not in answer
    # The same request for an allowed file succeeds.
    with urllib.request.urlopen(f"{site.url}/gradio_api/file={SAMPLE}") as served:
        assert served.read() == SAMPLE.read_bytes()
    # Calls that bypass the queue have no session.
    body = json.dumps({"data": [2, 0.7, "Narrate.", True]}).encode()
    request = urllib.request.Request(
        f"{site.url}/gradio_api/run/open_camera", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request)


def upload(visit):
    """Open the page and upload a video. People of earlier tests keep their seats for a minute, so try for longer."""
    for _ in range(30):
        page = visit()
        page.locator("input[type=file]").first.set_input_files(NASA)
        expect(page.locator("#chat")).to_contain_text(re.compile("Please narrate|Error"), timeout=SOON)
        if "Please narrate" in page.locator("#chat").inner_text():
            return page
        page.close()
        time.sleep(3)
    raise AssertionError("no seat became free")


def test_uploads_are_deleted_when_their_owner_leaves(visit, site):
    page = upload(visit)
    assert list(site.uploads.rglob("nasa_13013.mp4"))
    other = upload(visit)
    other.close()
    page.wait_for_timeout(1000)
    assert list(site.uploads.rglob("nasa_13013.mp4")), "another person still watches it"
    page.close()
    for _ in range(100):
        if not list(site.uploads.rglob("nasa_13013.mp4")):
            break
        time.sleep(0.2)
    assert not list(site.uploads.rglob("nasa_13013.mp4"))
