# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Captions in pictures: fonts that have the letters, lines that fit, and what is said if no font has them."""

import caption_drawing
import pytest
from caption_drawing import CaptionDrawer, Fonts, load_font, name_characters
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image


CHINESE, RUSSIAN, HEBREW = "红球从左边进来，停在中间。", "Красный мяч", "שלום"


def make_font(path, characters):
    """Write a font that has these characters: squares of different heights."""
    names = {ord(character): f"glyph{index}" for index, character in enumerate(characters)}
    order = [".notdef", "space", *names.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({32: "space", **names})
    squares = {name: square(100 + 40 * index) for index, name in enumerate(order)}
    builder.setupGlyf(squares | {"space": TTGlyphPen(None).glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def square(height):
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, height), (900, height), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Return a function that makes these fonts the installed ones: name and characters."""

    def install(**fonts):
        paths = [make_font(tmp_path / f"{name}.ttf", characters) for name, characters in fonts.items()]
        monkeypatch.setattr(caption_drawing, "installed_fonts", lambda: tuple(paths))
        return paths

    return install


def drawn_picture(text, size=(640, 360), begin=0.0, end=0.1, **options):
    drawer = CaptionDrawer([(0.0, 5.0, text)], **options)
    return drawer.draw(Image.new("RGB", size, (90, 140, 90)), begin, end), drawer


# --------------------------------------------------------------------------------------------------------------- fonts


def test_the_font_is_one_that_has_the_letters(install):
    russian, both = install(russian=RUSSIAN, both=RUSSIAN + CHINESE)
    fonts = Fonts()
    assert [face.path for face in fonts.choose("A ball.")] == [None], "Pillow's own font"
    assert [face.path for face in fonts.choose(RUSSIAN)] == [russian]
    assert [face.path for face in fonts.choose(RUSSIAN + CHINESE)] == [both], "one font for all of a caption"
    assert fonts.missing(RUSSIAN + CHINESE) == [] and fonts.missing(HEBREW) == sorted(HEBREW)


def test_captions_in_several_scripts_use_several_fonts(install):
    russian, chinese = install(russian=RUSSIAN, chinese=CHINESE)
    fonts = Fonts()
    text = f"A ball. {CHINESE} {RUSSIAN}"
    assert {face.path for face in fonts.choose(text)} == {None, russian, chinese} and not fonts.missing(text)
    runs = [(run.strip(), face.path) for run, face in caption_drawing._runs(text, fonts.choose(text))]
    assert runs == [("A ball.", None), (CHINESE, chinese), (RUSSIAN, russian)]


def test_letters_are_drawn_and_not_boxes(install, tmp_path):
    with_boxes, drawer = drawn_picture(CHINESE)
    install(chinese=CHINESE)
    with_letters, other = drawn_picture(CHINESE)
    if drawer.missing:
        assert with_boxes != with_letters
    assert other.missing == [] and other.num_missing == 0
    given, last = drawn_picture(CHINESE, font=tmp_path / "chinese.ttf")
    assert given == with_letters and last.missing == []


def test_a_given_font_comes_first_and_others_fill_its_gaps(install, tmp_path):
    (chinese,) = install(chinese=CHINESE)
    given = make_font(tmp_path / "given.ttf", "Abal.")
    fonts = Fonts(given)
    assert [face.path for face in fonts.choose("A ball.")] == [given]
    assert {face.path for face in fonts.choose("A ball. " + CHINESE)} == {given, chinese}


def test_missing_characters_are_named_with_their_script_and_counted(install):
    install(russian=RUSSIAN)
    drawer = CaptionDrawer([(0, 1, CHINESE), (1, 2, "A ball."), (2, 3, HEBREW)])
    assert drawer.num_missing == 2 and set(drawer.missing) >= set(HEBREW)
    assert name_characters(["红", "球"]) == "红 球 (CJK)" and name_characters(["ש"]) == "ש (HEBREW)"
    assert name_characters(list(CHINESE[:5] * 3)).endswith("... (CJK)") and name_characters(["👍"]) == "👍 (symbols)"


def test_characters_without_a_glyph_are_not_missing(install):
    install()
    assert Fonts().missing("A\u200d \ufe0f\u200e\tball\n") == []


def test_fonts_that_cannot_be_read_are_refused_or_passed_over(monkeypatch, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"broken\.ttf' cannot be read as a font"):
        load_font(broken)
    with pytest.raises(FileNotFoundError, match=r"There is no font file '.*nothing\.ttf'"):
        CaptionDrawer([], font=tmp_path / "nothing.ttf")
    monkeypatch.setattr(caption_drawing, "installed_fonts", lambda: (broken,))
    assert Fonts().missing(HEBREW) == sorted(HEBREW)


def test_installed_fonts_are_found_with_plain_ones_first(monkeypatch, tmp_path):
    for name in (
        "Zebra.ttf",
        "NotoSansBold.otf",
        "NotoSans-Regular.ttf",
        "NotoColorEmoji.ttf",
        "sub/Song.ttc",
        "a.txt",
    ):
        path = tmp_path / "fonts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.setattr(caption_drawing.sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [path.name for path in caption_drawing.installed_fonts.__wrapped__()]
    assert names == ["NotoSans-Regular.ttf", "Song.ttc", "Zebra.ttf", "NotoSansBold.otf"]


# --------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize("text", ["A red ball. " * 100, "x" * 2000, CHINESE * 40, "word", "两 " * 200])
def test_all_lines_lie_inside_the_picture(install, text):
    install(chinese=CHINESE + "两")
    for size in ((640, 360), (160, 360), (4096, 360)):
        drawer = CaptionDrawer([(0, 1, text)])
        lines, faces, font_size = drawer._fit(drawer.cues[0][2], *size)
        assert all(caption_drawing._length(line, faces, font_size) <= size[0] for line in lines)
        assert int(1.3 * font_size) * len(lines) <= size[1]
        kept = "".join(lines).replace(" ", "")
        assert drawer.num_cut or kept == text.replace(" ", ""), "no letter is lost"


def test_a_caption_that_fits_in_no_size_is_cut_and_counted():
    picture, drawer = drawn_picture("A red ball enters. " * 2000)
    assert drawer.num_cut == 1 and picture.size == (640, 360)
    drawer.draw(picture, 0.0, 0.1)
    assert drawer.num_cut == 1


def test_lines_end_between_wide_characters_but_not_before_punctuation():
    lines = caption_drawing._wrap("红球从左边，停在中间。", len, 5)
    assert "".join(lines) == "红球从左边，停在中间。" and not any(line[0] in "，。" for line in lines)
    assert caption_drawing._wrap("次「は」と", len, 3) == ["次", "「は」", "と"]
    assert caption_drawing._wrap("A red ball", len, 5) == ["A red", "ball"]
    assert caption_drawing._wrap("e\u0301e\u0301e\u0301", len, 2) == ["e\u0301"] * 3


@pytest.mark.parametrize("has_bidi", [True, False])
def test_captions_that_pillow_draws_backwards_are_counted(monkeypatch, has_bidi):
    monkeypatch.setattr(caption_drawing.features, "check", lambda _: has_bidi)
    drawer = CaptionDrawer([(0, 1, HEBREW), (1, 2, "A ball.")])
    assert drawer.num_reversed == (0 if has_bidi else 1)


def test_controls_and_lone_surrogates_are_no_letters():
    _, drawer = drawn_picture("A\x00 red\n\nball \ud800.")
    assert drawer.cues[0][2] == "A red ball ?."


# --------------------------------------------------------------------------------------------------------------- times


def test_each_picture_shows_the_caption_of_its_time():
    drawer = CaptionDrawer([(1.0, 2.0, "One."), (2.0, 3.0, "Two."), (7.0, 7.5, "Three."), (7.5, 8.0, "Four.")])
    assert [drawer.text(at, at + 0.1) for at in (0.5, 1.0, 1.95, 2.0, 3.0)] == ["", "One.", "One.", "Two.", ""]
    assert drawer.text(5.0, 10.0) == "Three. Four.", "the next picture would be too late"
    assert drawer.text(2.5, 7.2) == "Two." and drawer.text(7.2, 7.3) == "Three."
