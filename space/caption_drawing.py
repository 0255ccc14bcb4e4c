# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draw captions into pictures, in fonts that have their characters."""

import os
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features


# Families to try first, and parts of names of fonts to try last. Pillow cannot draw the glyphs of color fonts.
PREFERRED = ("notosans", "dejavusans", "liberationsans", "arial", "segoeui", "helvetica")
STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "narrow", "light", "thin", "black", "emoji")
UNUSABLE = ("color", "lastresort", "adobeblank")
# Height of the probe that shows whether a font has a character, and the least height of text, in pixels.
PROBE, SMALLEST = 24, 8
# Code points that are no characters. Every font draws them as its missing glyph.
NO_CHARACTER = "\U0010fffe"
JOINER = "\u200d"
WHITE, BAND = (255, 255, 255, 255), (0, 0, 0, 150)


class Face:
    """
    One font at all sizes.

    Args:
        path (`Path`, *optional*): The font file; Pillow's own font by default.

    Raises:
        `OSError`: If FreeType cannot open the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        # Without shaping, each character that the font lacks is drawn as the missing glyph.
        self._probe = self.at(PROBE).font_variant(layout_engine=ImageFont.Layout.BASIC)
        self._missing = self._shape(NO_CHARACTER)
        self._has: dict[str, bool] = {}

    @lru_cache(maxsize=64)  # noqa: B019
    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the font at a size in pixels."""
        return ImageFont.load_default(size) if self.path is None else ImageFont.truetype(str(self.path), size)

    def has(self, character: str) -> bool:
        """Return whether the font has a glyph for a character."""
        if character not in self._has:
            self._has[character] = self._shape(character) != self._missing
        return self._has[character]

    def _shape(self, character: str) -> bytes:
        image = Image.new("L", (2 * PROBE, 2 * PROBE))
        ImageDraw.Draw(image).text((PROBE // 2, PROBE // 4), character, 255, self._probe)
        return image.tobytes()


def load_font(path: Path) -> Face:
    """
    Load a font file.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it is not a font.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no font file '{path}'.")
    try:
        return Face(path)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read as a font ({error}). Give a .ttf, .otf or .ttc file.") from None


@lru_cache(maxsize=1)
def installed_fonts() -> tuple[Path, ...]:
    """Return the font files in the system's and the user's folders, the best for captions first."""
    home = Path.home()
    if sys.platform == "darwin":
        folders = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    elif sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", home / "AppData/Local")
        folders = [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), Path(local, "Microsoft/Windows/Fonts")]
    else:
        data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        own = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
        folders = [home / ".fonts", *(Path(folder, "fonts") for folder in (own, *data.split(":")))]
    found = {path for folder in folders if folder.is_dir() for path in folder.rglob("*.[to]t[fc]")}
    return tuple(sorted((path for path in found if not any(word in _name(path) for word in UNUSABLE)), key=_rank))


def _name(path: Path) -> str:
    return "".join(character for character in path.stem.lower() if character.isalnum())


def _rank(path: Path) -> tuple[bool, int, int, str]:
    name = _name(path)
    family = next((index for index, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
    return any(style in name for style in STYLES), family, len(name), str(path)


class Fonts:
    """
    The fonts that captions are drawn in: a given one, Pillow's own, then the installed ones.

    Args:
        first (`Path`, *optional*): A font file to use wherever it has the characters.
    """

    def __init__(self, first: Path | None = None) -> None:
        self._faces = [load_font(first)] if first is not None else []
        self._faces.append(Face())
        self._others = iter(installed_fonts())
        self._chosen: dict[frozenset[str], list[Face]] = {}

    def choose(self, text: str) -> list[Face]:
        """Return the first font that has all of a text's characters, else the fonts that have most of them."""
        needed = frozenset(drawn(text))
        if needed not in self._chosen:
            self._chosen[needed] = self._choose(needed)
        return self._chosen[needed]

    def missing(self, text: str) -> list[str]:
        """Return the characters of a text that no font has, in order of code points."""
        faces = self.choose(text)
        return sorted(c for c in drawn(text) if not any(face.has(c) for face in faces))

    def _choose(self, needed: frozenset[str]) -> list[Face]:
        for face in self._all():
            if all(map(face.has, needed)):
                return [face]
        chosen, left = [], set(needed)
        while left:
            best = max(self._faces, key=lambda face: sum(map(face.has, left)))
            left, before = {character for character in left if not best.has(character)}, left
            if left == before:
                break
            chosen.append(best)
        return chosen or self._faces[:1]

    def _all(self) -> Iterator[Face]:
        yield from self._faces
        for path in self._others:
            try:
                face = Face(path)
            except OSError:
                continue
            self._faces.append(face)
            yield face


def drawn(text: str) -> set[str]:
    """Return the characters of a text that need a glyph: no spaces, controls, joiners or variation selectors."""
    return {
        character
        for character in text
        if not character.isspace()
        and unicodedata.category(character) not in ("Cc", "Cf")
        and not "\ufe00" <= character <= "\ufe0f"
    }


def name_characters(characters: Sequence[str]) -> str:
    """Name characters and their scripts, for example "红 球 (CJK)". At most ten characters are named."""
    letters = (character for character in characters if unicodedata.category(character)[0] in "LM")
    scripts = sorted({unicodedata.name(letter, "unknown").split()[0] for letter in letters}) or ["symbols"]
    return f"{' '.join(characters[:10])}{' ...' if len(characters) > 10 else ''} ({', '.join(scripts)})"


class CaptionDrawer:
    """
    Draws captions at the lower edge of pictures.

    Args:
        cues (iterable of `tuple[float, float, str]`): Begin and end in seconds, and text, in order; see `cues`.
        font (`Path`, *optional*): A font file to use wherever it has the characters.

    Attributes:
        missing (`list[str]`): Characters that no font has. They are drawn as boxes.
        num_missing (`int`): Number of captions with such characters.
        num_reversed (`int`): Number of captions that run from right to left, if Pillow draws them the other way.
        num_cut (`int`): Number of captions that were cut because they do not fit into the picture.

    Raises:
        `FileNotFoundError`: If there is no such font file.
        `ValueError`: If it is not a font.
    """

    def __init__(self, cues: Iterable[tuple[float, float, str]], *, font: Path | None = None) -> None:
        self.fonts = Fonts(font)
        self.cues = [(begin, end, _clean(text)) for begin, end, text in cues]
        self._begins = [begin for begin, _, _ in self.cues]
        missing = [self.fonts.missing(text) for _, _, text in self.cues]
        self.missing = sorted({character for some in missing for character in some})
        self.num_missing = sum(map(bool, missing))
        has_bidi = features.check("raqm")
        self.num_reversed = 0 if has_bidi else sum(_has_right_to_left(text) for _, _, text in self.cues)
        self._cut: set[str] = set()
        # The layer of the last caption: most pictures show the same one as the picture before.
        self._last: tuple[tuple[str, tuple[int, int]], Image.Image] | None = None

    @property
    def num_cut(self) -> int:
        return len(self._cut)

    def text(self, begin: float, end: float) -> str:
        """
        Return the text for a picture that is shown from one second to another.

        It is the caption at the picture's first moment, and those that begin and end before the next picture: a slide
        show would never show them.
        """
        last = bisect_right(self._begins, begin)
        shown = [text for _, until, text in self.cues[max(0, last - 1) : last] if begin < until]
        for since, until, text in self.cues[last:]:
            if since >= end:
                break
            if until <= end:
                shown.append(text)
        return " ".join(shown)

    def draw(self, picture: Image.Image, begin: float, end: float) -> Image.Image:
        """Draw what [`CaptionDrawer.text`] returns into an RGB picture, in place, and return it."""
        key = self.text(begin, end), picture.size
        if key[0]:
            if self._last is None or self._last[0] != key:
                self._last = key, self._layer(*key)
            layer = self._last[1]
            picture.paste(layer, (0, picture.height - layer.height), layer)
        return picture

    def _layer(self, text: str, size: tuple[int, int]) -> Image.Image:
        """Return the caption on a translucent band as wide as the picture: RGBA."""
        width, height = size
        lines, faces, font_size = self._fit(text, width, height)
        step = int(1.3 * font_size)
        layer = Image.new("RGBA", (width, min(height, step * len(lines) + font_size // 2 + font_size // 3)), BAND)
        pen = ImageDraw.Draw(layer)
        for row, line in enumerate(lines):
            self._draw_line(pen, line, faces, font_size, width / 2, font_size // 3 + row * step + font_size)
        return layer

    def _fit(self, text: str, width: int, height: int) -> tuple[list[str], list[Face], int]:
        """Break a text into lines, in the largest font size in which they fit into the picture."""
        faces, size = self.fonts.choose(text), max(14, min(height // 18, width // 16))
        while True:
            # Words repeat.
            measure = lru_cache(partial(_length, faces=faces, size=size))
            lines = _wrap(text, measure, 0.92 * width)
            rows = max(1, int((height - size) / int(1.3 * size)))
            if len(lines) <= rows:
                return lines, faces, size
            if size <= SMALLEST:
                self._cut.add(text)
                return [*lines[: rows - 1], lines[rows - 1][:-1] + "…"], faces, size
            size = max(SMALLEST, int(0.8 * size))

    def _draw_line(
        self, pen: ImageDraw.ImageDraw, line: str, faces: list[Face], size: int, center: float, baseline: float
    ) -> None:
        runs = _runs(line, faces)
        if _is_right_to_left(line):
            runs.reverse()
        x = center - _length(line, faces, size) / 2
        for run, face in runs:
            font = face.at(size)
            pen.text((x, baseline), run, WHITE, font, anchor="ls")
            x += font.getlength(run)


def _clean(text: str) -> str:
    """Put a text on one line, without controls and lone surrogates."""
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return "".join(character for character in text if unicodedata.category(character) != "Cc")


def _clusters(text: str) -> list[str]:
    """Split a text into letters with their marks. Lines and fonts never change within one."""
    clusters: list[str] = []
    for character in text:
        joins = unicodedata.category(character)[0] == "M" or character == JOINER
        if clusters and (joins or clusters[-1].endswith(JOINER)):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _runs(line: str, faces: list[Face]) -> list[tuple[str, Face]]:
    """Split a line into parts in one font each. Spaces and controls take the font of what is before them."""
    runs: list[tuple[str, Face]] = []
    for cluster in _clusters(line):
        needed = drawn(cluster)
        if not needed and runs:
            face = runs[-1][1]
        else:
            face = next((face for face in faces if all(map(face.has, needed))), faces[0])
        if runs and runs[-1][1] is face:
            runs[-1] = (runs[-1][0] + cluster, face)
        else:
            runs.append((cluster, face))
    return runs


def _length(line: str, faces: list[Face], size: int) -> float:
    return sum(face.at(size).getlength(run) for run, face in _runs(line, faces))


def _is_right_to_left(line: str) -> bool:
    """Return whether a line begins with a letter of a script that is written from right to left."""
    strong = (unicodedata.bidirectional(character) for character in line)
    return next((kind for kind in strong if kind in ("L", "R", "AL")), "L") != "L"


def _has_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)


def _pieces(text: str) -> Iterator[str]:
    """Split a text where a line may end: at spaces and around wide characters, but not between them and marks."""
    piece = ""
    for cluster in _clusters(text):
        # A line does not begin with a closing mark, nor end with an opening one.
        is_bound = unicodedata.category(cluster[0]) in ("Pe", "Pf", "Po")
        is_bound = is_bound or unicodedata.category(piece[-1:] or " ") in ("Ps", "Pi")
        if piece and not is_bound and (piece[-1] == " " or _is_wide(piece[-1]) or _is_wide(cluster[0])):
            yield piece
            piece = ""
        piece += cluster
    yield piece


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in ("W", "F")


def _wrap(text: str, width: Callable[[str], float], most: float) -> list[str]:
    """Break a text into lines of at most this width. A piece that is wider than a line is broken between letters."""
    lines, filled = [""], 0.0
    for piece in _pieces(text):
        for part in (piece,) if width(piece.rstrip()) <= most else _clusters(piece):
            if lines[-1] and filled + width(part.rstrip()) > most:
                lines.append("")
                filled = 0.0
            lines[-1] += part
            filled += width(part)
    return [line.strip() for line in lines]
