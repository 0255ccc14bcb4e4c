# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The encoding of a text file: by its byte order mark, as UTF-8, or guessed."""

import codecs
import re
from pathlib import Path
from unicodedata import category

from charset_normalizer import from_bytes

from videollm_mod.train.data.subtitle_formats.lines import SubtitleReport


_MARKS = (
    (codecs.BOM_UTF8, "utf_8"),
    (codecs.BOM_UTF32_LE, "utf_32"),
    (codecs.BOM_UTF32_BE, "utf_32"),
    (codecs.BOM_UTF16_LE, "utf_16"),
    (codecs.BOM_UTF16_BE, "utf_16"),
)
# What subtitles are written in if not in Unicode, the commonest first: a short text often fits several equally well.
_ENCODINGS = ["cp1252", "cp1251", "cp1250", "gb18030", "big5", "cp932", "cp949", "euc_jp"]
_ENCODINGS += ["iso8859_2", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "tis_620"]
# Those of old systems.
_ENCODINGS += ["cp866", "iso8859_5", "mac_roman", "mac_cyrillic", "cp850", "koi8_u"]
# What Turkish and Hungarian become in cp1252: letters of Icelandic without its accents, and ones of two languages.
_MISREAD = re.compile(r"(?=.*[ðýþÐÝÞ])(?!.*[áæéíóúÁÆÉÍÓÚ])|(?=.*[õûÕÛ])(?=.*[öüÖÜ])(?!.*[äãçèêÄÃÇÈÊ])", re.S)
# A sign within a word.
_SIGN_IN_WORD = re.compile(r"(?<=[^\W\d_])[^\w\s\x00-\x7f’–—·\xad](?=[^\W\d_])")


def read_text(path: Path, encoding: str | None, report: SubtitleReport) -> str | None:
    """Return the text of a file, or `None` if it is not a text but a container."""
    with path.open("rb") as file:
        head = file.read(4096)
        if not _is_text(head):
            return None
        text = decode_text(path, head + file.read(), encoding, report)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").lstrip("\ufeff")


def _is_text(head: bytes) -> bool:
    if head.startswith(b"#EXTM3U"):
        return False
    if head.startswith(tuple(mark for mark, _ in _MARKS)) or _unmarked_utf16(head):
        return True
    if b"-->" in head or b"\nDialogue:" in head:
        return True
    return b"\0\0" not in head and sum(byte < 9 or 13 < byte < 27 for byte in head) < 0.04 * len(head) + 1


def _unmarked_utf16(data: bytes) -> str | None:
    for name, high in (("utf_16_le", 1), ("utf_16_be", 0)):
        few, many = data[1 - high :: 2], data[high::2]
        if many and many.count(0) > 0.3 * len(many) and few.count(0) < 0.05 * len(many):
            return name
    return None


def decode_text(path: Path, data: bytes, encoding: str | None, report: SubtitleReport) -> str:
    if encoding is not None:
        try:
            return data.decode(encoding)
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"'{path}' cannot be read as {encoding}: {error}.") from None
    known = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _unmarked_utf16(data[:4096])
    text = data.decode(known or "utf_8", "replace")
    spoilt = text.count("\ufffd") - data.count("\ufffd".encode())
    foreign = sum(character > "\x7f" for character in text) if spoilt > 0 else 0
    if not known and foreign < 2 * spoilt:
        known = report.encoding = _guess_encoding(data)
        text = data.decode(known, "replace")
    report.unreadable_characters += text.count("\ufffd")
    return text


def _guess_encoding(data: bytes) -> str:
    # Numbers and times tell nothing, and would outweigh the letters of a short file.
    letters = b"\n".join([line for line in data.splitlines() if not line.isascii()][:2000])
    fits = [
        (round(match.chaos, 2), _count_odd(str(match)), -match.coherence, _ENCODINGS.index(name))
        for match in from_bytes(letters, cp_isolation=_ENCODINGS)
        for name in match.could_be_from_charset
        if name in _ENCODINGS
    ]
    return _ENCODINGS[min(fits)[3]] if fits else _ENCODINGS[0]


def _count_odd(text: str) -> int:
    """Count what speaks against an encoding: signs in words, as in "pi³ka", and letters that are all small."""
    letters = [character for character in text if character.isalpha()]
    # Hebrew read as Cyrillic has no capitals. In French, most letters with accents are small.
    foreign = [letter for letter in letters if letter > "\x7f"]
    is_small = len(foreign) > len(letters) / 2 and all(letter.islower() for letter in foreign)
    is_small += len(re.findall(r"(?<=[^\W\d_])[«»ºªµ](?=[^\W\d_])", text)) + bool(_MISREAD.match(text))
    is_small += len(_SIGN_IN_WORD.findall(text))
    return is_small + sum(character > "\x7f" and category(character)[0] not in "LMPZ" for character in text)
