# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reports of a video: what was said with its key frames, in three formats, and the page in a real browser."""

import base64
import io
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from broadcast import headers, http_server
from browser import CHROMIUM, faults, needs_axe, needs_chromium
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tiny import copy_embedded, random_frames, write_clip
from typer.testing import CliRunner

from videollm_mod import cli
from videollm_mod.commands.report import (
    Moment,
    Report,
    pictures_at,
    place_marks,
    place_ticks,
    stamp,
    to_html,
    to_json,
    to_markdown,
    with_notes,
)
from videollm_mod.speaking_videollm_mod import DEFAULT_PROMPT
from videollm_mod.video_reading_videollm_mod import VideoReader, read_video


ROOT = Path(__file__).parents[1]
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"
SAMPLE = ROOT / "samples" / "streamworld.mp4"
STORY = json.loads(SAMPLE.with_suffix(".json").read_text(encoding="utf-8"))["events"]
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'n' {{ 7 * 7 }} [a](javascript:x) **b**"

# Appended to a checkpoint's code: questions that need an answer fail.
FAULT = """
_ask = StreamingSession.ask


def _fail(self, text, *, reply_now=True, **options):
    if reply_now:
        raise RuntimeError("out of memory")
    return _ask(self, text, reply_now=False, **options)


StreamingSession.ask = _fail
"""


class Page(HTMLParser):
    """The elements of a page, and the text of its moments."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.moments, self.place = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "li":
            self.moments.append({"time": "", "text": "", "image": None})
        if tag == "img":
            self.moments[-1]["image"] = attrs
        self.place = {"time": "time", "p": "text" if attrs.get("class") == "text" else None}.get(tag)

    def handle_endtag(self, _):
        self.place = None

    def handle_data(self, data):
        if self.place is not None:
            self.moments[-1][self.place] += data


def decode(url):
    kind, data = url.split(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def frame_at(video, time):
    return next(read_video(video, start=time))[1]


def is_same(picture, frame):
    """Whether a JPEG shows a frame that was not larger."""
    return picture.shape == frame.shape and np.abs(picture.astype(int) - frame).mean() < 4


def report(*arguments):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


one_process = pytest.mark.xdist_group("reports")  # for the tests of the same reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of the sample in the three formats, by suffix."""
    paths = [tmp_path_factory.mktemp("reports") / f"report.{kind}" for kind in ("html", "md", "json")]
    done = report(SAMPLE, *[part for path in paths for part in ("--out", path)])
    assert done.exit_code == 0, done.stderr
    assert [f"{time:6.1f}s  {text}" for time, text in STORY] == done.stdout.splitlines()[: len(STORY)]
    assert done.stderr.splitlines()[1:] == [f"wrote {path}" for path in paths]
    return {path.suffix: path.read_text(encoding="utf-8") for path in paths}


@one_process
def test_the_formats_tell_the_same_story(reports):
    told = json.loads(reports[".json"])
    assert [[moment["time"], moment["text"]] for moment in told["moments"]] == STORY
    assert told["video"] == "streamworld.mp4" and told["seconds"] == 8.5 and told["summary"] and told["notes"] == []
    assert told["made_by"]["Checkpoint"] == "the embedded checkpoint" and "0.5" in told["made_by"]["Speaks"]
    lines = reports[".md"].splitlines()
    assert [line for line in lines if line.startswith("- **0")] == [
        f"- **{stamp(time, 8.5)}** {text}" for time, text in STORY
    ]
    assert told["summary"] in lines and told["summary"] not in dict(STORY).values()
    moments = Page(reports[".html"]).moments
    assert [(moment["time"], moment["text"]) for moment in moments] == [(stamp(t, 8.5), text) for t, text in STORY]
    assert told["summary"] in reports[".html"]


@one_process
def test_a_page_shows_the_frames_at_which_things_were_said(reports):
    pictures = [decode(moment["image"]["src"]) for moment in Page(reports[".html"]).moments]
    for index, (time, _) in enumerate(STORY):
        assert is_same(pictures[index], frame_at(SAMPLE, time))
        assert index == 0 or not np.array_equal(pictures[index], pictures[index - 1])


@one_process
def test_a_page_needs_nothing_else_and_allows_no_other_script(reports):
    tags = Page(reports[".html"]).tags
    links = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert len(links) > 10 and all(link.startswith(("data:", "#")) for link in links)
    [policy] = [attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert not any(name.startswith("on") or name == "style" for _, attrs in tags for name in attrs)


def test_pictures_are_those_on_screen_after_any_gap():
    times = [0.0, 0.4, 6.1, 6.1, 12.4, 13.0]
    pictures = pictures_at(NASA, times, side=10_000)
    for time, picture in zip(times, pictures, strict=True):
        assert is_same(np.asarray(Image.open(io.BytesIO(picture.jpeg))), frame_at(NASA, time)), time
    small = pictures_at(NASA, [1.0], side=100)[0]
    assert (small.width, small.height) == (100, 56)


@pytest.mark.parametrize(
    ("ending", "options"), [("apng", {"codec": "apng", "pix_fmt": "rgb24"}), ("mp4", {"g": "100"})]
)
def test_a_file_in_which_every_seek_leads_to_the_beginning_is_decoded_in_order(monkeypatch, tmp_path, ending, options):
    pictures = np.broadcast_to(np.arange(0, 240, 6, np.uint8)[:, None, None, None], (40, 32, 32, 3))
    path = write_clip(tmp_path / f"clip.{ending}", np.ascontiguousarray(pictures), fps=1, **options)
    decoded, frames_of = [], VideoReader.frames

    def frames(reader, start=0.0):
        for found in frames_of(reader, start):
            decoded.append(found[0])
            yield found

    monkeypatch.setattr(VideoReader, "frames", frames)
    pictures = pictures_at(path, times := range(2, 40, 6), side=480)
    shown = [np.asarray(Image.open(io.BytesIO(picture.jpeg))).mean() for picture in pictures]
    assert shown == pytest.approx([6 * time for time in times], abs=2.5)
    assert len(decoded) < 50, "the clip has 40 frames"


def test_pictures_are_upright(tmp_path):
    stored = np.zeros((4, 32, 48, 3), np.uint8)
    stored[:, :16, :24] = 255
    path = write_clip(tmp_path / "clip.mp4", stored)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + turn + content[at + 36 :])
    [picture] = pictures_at(path, [0.1], side=480)
    assert (picture.width, picture.height) == (32, 48)
    assert np.asarray(Image.open(io.BytesIO(picture.jpeg)))[:24, 16:].mean() > 245, "white is at the top right"


def test_a_video_that_is_gone_leaves_out_the_pictures(tmp_path):
    moments = [Moment(time, "It moves.") for time in (0.0, 0.5)]
    assert pictures_at(tmp_path / "gone.mp4", [0.0, 0.5], side=100) == [None, None]
    page = Page(to_html(Report("gone.mp4", 1.0, moments), tmp_path / "gone.mp4"))
    assert [moment["text"] for moment in page.moments] == ["It moves."] * 2 and page.moments[0]["image"] is None


def test_names_and_texts_stay_text():
    told = Report(HOSTILE, 13.0, [Moment(1.0, HOSTILE)], HOSTILE, {"Checkpoint": HOSTILE}, [HOSTILE])
    page = Page(to_html(told, NASA))
    assert page.moments[0]["text"] == HOSTILE and [tag for tag, _ in page.tags].count("script") == 1
    assert not any(attrs.get("href", "").startswith("javascript") for _, attrs in page.tags)
    assert json.loads(to_json(told))["moments"] == [{"time": 1.0, "text": HOSTILE}]
    markdown = to_markdown(told)
    assert markdown.count(r"\<script\>alert(1)\</script\> \& ") == markdown.count("alert(1)") == 5
    assert r"\[a\](javascript:x) \*\*b\*\*" in markdown


def test_a_video_about_which_nothing_was_said_shows_its_frames(tmp_path):
    out = tmp_path / "report.html"
    done = report(SAMPLE, "--out", out, "--interval-threshold", 0, "--fps", 0.1, "--query", "", "--summary", "")
    assert done.exit_code == 0, done.stderr
    html = out.read_text(encoding="utf-8")
    assert "The model said nothing about this video." in html and '"summary"' not in html and "<form" not in html
    moments = Page(html).moments
    assert [moment["time"] for moment in moments] == [stamp(8.5 * (i + 0.5) / 8, 8.5) for i in range(8)]
    assert is_same(decode(moments[4]["image"]["src"]), frame_at(SAMPLE, 8.5 * 4.5 / 8))
    assert "The model said nothing." in to_markdown(Report("a.mp4", 8.5, []))


def test_a_report_says_when_the_model_spoke(tmp_path):
    video, out = tmp_path / "#1 what?.mp4", tmp_path / "report.json"
    video.write_bytes(SAMPLE.read_bytes())
    done = report(video, "--out", out, "--every", 4, "--no-repeat", 0, "--summary", "")
    assert done.exit_code == 0, done.stderr
    told = json.loads(out.read_text())
    assert [moment["time"] for moment in told["moments"]] == [0.0, 4.0, 8.0] and told["summary"] == ""
    assert told["video"] == "#1 what?.mp4"
    assert told["made_by"]["Speaks"] == "by the policy every (every 4, no repeat 0)"
    assert told["made_by"]["Asked"] == f"before each reply “{DEFAULT_PROMPT}”"


def test_a_report_names_the_default_seconds_and_the_prompt(tmp_path):
    out = tmp_path / "report.json"
    done = report(SAMPLE, "--out", out, "--speak", "every", "--fps", 0.5, "--prompt", "Who?", "--summary", "")
    assert done.exit_code == 0, done.stderr
    made_by = json.loads(out.read_text())["made_by"]
    assert made_by["Speaks"] == "by the policy every (every 2)" and made_by["Asked"] == "before each reply “Who?”"


def test_a_report_of_a_source_that_breaks_off_says_so(tmp_path):
    data, out = write_clip(tmp_path / "clip.ts", random_frames(60)).read_bytes(), tmp_path / "report.json"

    def answer(request, _):
        headers(request, length=2 * len(data))
        request.wfile.write(data)

    with http_server(answer) as url:
        done = report(f"{url}/clip.ts", "--out", out, "--summary", "")
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.stderr.splitlines() if line.startswith("stopped after ")]
    assert f"Watching {line}" in json.loads(out.read_text())["notes"], done.output


def test_a_report_says_what_it_cannot_know(tmp_path):
    out = tmp_path / "report.json"
    done = report(NASA, "--out", out, "--max-frames", 4, "--fps", 1)
    assert done.exit_code == 0, done.stderr
    notes = json.loads(out.read_text())["notes"]
    assert len(notes) == 3 and notes[0].startswith("The embedded checkpoint was trained on generated clips")
    others = r"The model remembers the last [1-4] of 14 frames when it writes the summary(, and reads .* others)?\."
    assert re.fullmatch(others, notes[1])
    assert notes[2] == "1 other video stream was not read."


def test_a_summary_of_a_long_video_uses_what_was_said(tmp_path):
    out = tmp_path / "report.json"
    done = report(SAMPLE, "--out", out, "--max-frames", 6, "--summary", "What do you see?")
    assert done.exit_code == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["notes"][0].endswith("of 17 frames when it writes the summary, and reads what it said of the others.")
    assert told["made_by"]["Asked"].endswith(", “What do you see?”") and told["summary"]


def test_notes_before_the_question_fit_in_their_room():
    moments = [Moment(60.0 * index, f"Thing {index}.") for index in range(5)]

    def notes(room):
        return with_notes(moments, "What?", room, lambda text: len(text.split()))

    assert notes(100) == (
        "Notes from the video:\n0:00 Thing 0.\n1:00 Thing 1.\n2:00 Thing 2.\n3:00 Thing 3.\n4:00 Thing 4.\n\nWhat?"
    )
    assert notes(19) == "Notes from the video:\n0:00 Thing 0.\n2:00 Thing 2.\n4:00 Thing 4.\n\nWhat?"
    assert notes(11) == "Notes from the video:\n0:00 Thing 0.\n4:00 Thing 4.\n\nWhat?"
    assert notes(10) == notes(-300) == "What?"


def test_a_fault_of_the_program_keeps_what_was_said(tmp_path):
    folder = copy_embedded(tmp_path / "unanswering")
    with open(folder / "streaming_videollm_mod.py", "a", encoding="utf-8") as code:
        code.write(FAULT)
    out = tmp_path / "report.json"
    done = report(SAMPLE, "--out", out, "--model", folder)
    assert "out of memory" in str(done.exception)
    told = json.loads(out.read_text())
    assert len(told["moments"]) == len(STORY) and told["summary"] == ""
    assert told["made_by"]["Checkpoint"] == "unanswering"


def test_a_file_that_cannot_be_written_does_not_cost_the_others(tmp_path):
    (tmp_path / "full.md").symlink_to("/dev/full")
    done = report(SAMPLE, "--out", tmp_path / "full.md", "--out", tmp_path / "out.json", "--fps", 1, "--summary", "")
    error = f"error: '{tmp_path}/full.md' cannot be written: No space left on device. Free some space"
    assert done.exit_code == 1 and error in done.stderr, done.output
    assert done.stderr.endswith(f"\nwrote {tmp_path}/out.json\n")
    assert json.loads((tmp_path / "out.json").read_text())["video"] == "streamworld.mp4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "report.pdf"], "--out must end in .html, .md or .json, got 'report.pdf'"),
        (["--out", "no/such/report.md"], "There is no folder 'no/such' to write 'report.md' to."),
        (["--out", "a.md", "--out", "./a.md"], "--out and --out number 2 both name 'a.md': write to two files."),
        (["--out", "a.md", "--summary", "a\udcff"], "What the user says is not valid Unicode"),
        (["-", "--out", "a.md"], "A report shows frames again, and '-' can be read only once."),
        (["rtsp://nowhere/a", "--out", "a.md"], "'rtsp://nowhere/a' can be read only once."),
        (["gone.mp4", "--out", "a.md"], "There is no video file 'gone.mp4'"),
        (["--out", "a.md", "--fps", "0"], "`fps` must be"),
    ],
)
def test_mistakes_are_found_before_the_work(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = report(*arguments)
    assert done.exit_code == 1 and message in done.stderr and "loading" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_marks_share_the_timeline():
    marks = place_marks([0.0, 2.0, 2.0, 3.0, 10.5], 10.0)
    assert [mark.moment for mark in marks] == [0, 1, 3, 4] and [mark.at for mark in marks] == [0, 20, 30, 100]
    assert [mark.begin for mark in marks] == [0, 10, 25, 65] and [mark.end for mark in marks] == [10, 25, 65, 100]
    assert place_ticks(8.5) == [(0.0, 0.0), (2.0, 23.529), (4.0, 47.059), (6.0, 70.588), (8.0, 94.118)]
    for seconds in (0, 0.5, 61, 3600, 86_400, 1e6):
        assert 1 <= len(place_ticks(seconds)) <= 7
    assert [stamp(5.5, 60), stamp(65.5, 200), stamp(3665, 4000)] == ["0:05.5", "1:05", "1:01:05"]


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    """The address of a page with moments that can be told apart by their words."""
    texts = ["A dog runs into the water.", "Two children build a castle.", "The DOG comes back.", HOSTILE]
    clip = write_clip(tmp_path_factory.mktemp("page") / "clip.mp4", random_frames(40, size=(90, 160)))
    moments = [Moment(float(index), text) for index, text in enumerate(texts * 4)]
    notes = ["The embedded checkpoint knows nothing of this."]
    html = to_html(Report("clip.mp4", 16.0, moments, "A day out.", {"Checkpoint": "smol"}, notes), clip)
    path = clip.with_name("report.html")
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(page_url):
    """Return a function that opens the page. After the test, fail if it logged anything or asked for anything."""
    seen = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def go(**options):
            page = browser.new_page(**options)
            page.on("console", lambda message: seen.append(message.text))
            page.on("pageerror", lambda error: seen.append(str(error)))
            page.on("dialog", lambda dialog: seen.append(dialog.message))
            page.on("request", lambda request: seen.append(request.url))
            page.goto(page_url)
            return page

        yield go
        browser.close()
    assert {url for url in seen if not url.startswith("data:image/jpeg")} <= {page_url, "data:,"}


@needs_chromium
@pytest.mark.xdist_group("browser")
def test_search_and_timeline_work_by_mouse_and_keyboard(visit):
    page = visit(viewport={"width": 1200, "height": 800})
    shown, marks = page.locator("ol > li:visible"), page.locator(".timeline a")
    expect(shown).to_have_count(16)
    assert marks.count() == 16
    # A click between two marks leads to the nearer one.
    box = page.locator(".timeline svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 5.4 / 16, box["y"] + 40)
    expect(page).to_have_url(re.compile("#moment-6$"))
    expect(page.locator("#moment-6")).to_be_in_viewport(ratio=0.9)
    expect(marks.nth(5)).to_have_attribute("aria-current", "true")
    page.keyboard.press("/")
    page.keyboard.type("dog WATER")
    expect(shown).to_have_count(4)
    expect(page.locator("#found")).to_have_text("4 of 16")
    assert page.locator("#moment-1 mark").all_inner_texts() == ["dog", "water"]
    assert page.locator(".timeline a.missed").count() == 12
    # A mark leads to its moment, although the search has hidden it.
    marks.nth(5).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#moment-6")).to_be_in_viewport()
    expect(page.locator("#search")).to_have_value("")
    page.fill("#search", "<script>alert(1)</script>")
    expect(shown).to_have_count(4)
    assert page.locator("#moment-4 .text").inner_text() == HOSTILE
    page.press("#search", "Escape")
    expect(shown).to_have_count(16)
    page.fill("#search", "nothing like it")
    expect(page.locator("#found")).to_have_text("0 of 16")


@needs_chromium
@needs_axe
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_phone_and_axe_finds_no_fault(visit, scheme):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.fill("#search", "dog")
    assert faults(page) == []
    light = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(x => x > 128)")
    assert light == (scheme == "light")
    page.emulate_media(media="print")
    expect(page.locator("form")).to_be_hidden()
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
