# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The encoding of a text file: by its byte order mark, as UTF-8, or guessed."""

import codecs
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from unicodedata import category, normalize

from charset_normalizer import from_bytes

from videollm_mod.train.data.subtitle_formats.lines import SubtitleReport
from videollm_mod.train.data.subtitle_formats.markup import INVISIBLE


_MARKS = (
    (codecs.BOM_UTF8, "utf_8"),
    (codecs.BOM_UTF32_LE, "utf_32"),
    (codecs.BOM_UTF32_BE, "utf_32"),
    (codecs.BOM_UTF16_LE, "utf_16"),
    (codecs.BOM_UTF16_BE, "utf_16"),
)
# In text mode, Windows writes "\r\n" as "\r\r\n".
_LINE_END = re.compile(r"\r*\n|\r")
_LONE_END = re.compile(r"[^\n]\n[^\n]")
# What subtitles are written in if not in Unicode, in an order that decides where several fit equally well.
_ENCODINGS = ["cp1252", "cp1251", "cp1250", "cp949", "gb18030", "euc_jp", "big5", "cp932", "iso8859_2", "cp1253"]
_ENCODINGS += ["cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "tis_620"]
_OLD = ["cp866", "iso8859_5", "mac_roman", "mac_cyrillic", "cp850", "koi8_u", "cp852", "iso8859_6", "cp1258"]
# Letters of Latin scripts by language: a wrong encoding mixes those of several.
_ALPHABETS = """
    áéíóúýþæöð àâæçéèêëîïôœùûüÿ áéíñóúü áâãàçéêíóôõúü àèéìíîòóù àçèéíïòóúü áéëïóöüèçê åäöæøéü äöüßé ąćęłńóśźż
    áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîșțşţ čćđšž çğıöşüâîû äöõüšž āčēģīķļņšūžō ąčęėįšųūž ëç
    ăâđêôơưàáãèéìíòóõùúý
"""
_ALPHABETS = [frozenset(letters) for letters in _ALPHABETS.split()]
# Of how many languages' letters a text consists does not show that ğ, ı and ş became ð, ý and þ of Icelandic.
_MISREAD = re.compile(r"(?=.*[ðýþÐÝÞ])(?!.*[áæéíóúÁÆÉÍÓÚ])", re.S)
_SIGN = r"[^\w\s\x00-\x7f‘’“”„‚«»‹›…–—·\xad\u3000-\u303f\uff00-\uffef¿¡♪♫]+"
# Signs at a letter, as in "‡ droite", quotes and raised digits within a word, two scripts in a word, and "Ł5".
_ODD = re.compile(
    rf"(?<=[^\W\d_]){_SIGN}|{_SIGN}(?=[^\W\d_])|(?<=[^\W\d_])[«»ºªµ‹›„‚¹²³](?=[^\W\d_])"
    r"|(?<=[A-Za-z])(?=\w)[\u0370-\u06ff]|(?=\w)[\u0370-\u06ff](?=[A-Za-z])|(?=[^\W\d_])[\x80-\u04ff](?=\d)"
)
# Standards of East Asian encodings, and the first bytes of their common characters.
_COMMON = {"gb18030": ("gb2312", 0xB0, 0xD7), "big5": ("big5", 0xA4, 0xC6), "cp949": ("euc_kr", 0xB0, 0xC8)}
_COMMON |= dict.fromkeys(("cp932", "euc_jp"), ("euc_jp", 0xB0, 0xCF))
# What English has beyond ASCII fits all of Windows' encodings.
_LETTERS = re.compile("[^\x00-\x7f‘’“”„‚«»‹›…–—·¿¡£€°©®]")
# Encodings that are ASCII except for their escape sequences, and the encoding that XML declares.
_ESCAPES = {
    "iso2022_jp": re.compile(rb"\x1b\$[@B]"),
    "iso2022_kr": re.compile(rb"\x1b\$\)C"),
    "hz": re.compile(rb"~\{(?:[!-#0-W][!-~])+~\}"),
}
_DECLARED = re.compile(rb"\s*<\?xml[^>]{1,99}encoding\s*=\s*[\"']([\w.-]{1,30})[\"']")


def read_text(path: Path, encoding: str | None, report: SubtitleReport) -> str | None:
    """Return the text of a file, or `None` if it is not a text but a container."""
    with path.open("rb") as file:
        head = file.read(4096)
        if not _is_text(head):
            return None
        text = decode_text(path, head + file.read(), encoding, report)
    text = INVISIBLE.sub("", _LINE_END.sub("\n", text))
    # Some programs write each line end twice.
    return text if _LONE_END.search(text) else re.sub("\n\n?", "\n", text)


def _is_text(head: bytes) -> bool:
    if head.startswith(b"#EXTM3U"):
        return False
    if head.startswith(tuple(mark for mark, _ in _MARKS)) or _unmarked_unicode(head):
        return True
    if b"-->" in head or b"\nDialogue:" in head:
        return True
    # ISO-2022-KR shifts with 14 and 15.
    return b"\0\0" not in head and sum(byte < 9 or 15 < byte < 27 for byte in head) < 0.04 * len(head) + 1


def _unmarked_unicode(data: bytes) -> str | None:
    """Return the form of UTF-16 or UTF-32 without a byte order mark: the one in which most characters are ASCII."""
    found, names = [], {"utf_32_le": 4, "utf_32_be": 4, "utf_16_le": 2, "utf_16_be": 2}
    for name, size in names.items() if b"\0" in data else ():
        text = data[: len(data) // size * size].decode(name, "replace")
        num_ascii = sum(" " <= sign <= "~" for sign in text) + text.count("\n")
        num_odd = sum(sign not in "\r\n\t" and category(sign) in ("Cc", "Cn", "Co", "Cs") for sign in text)
        # Texts in Chinese have signs of ASCII in their times only. Videos have zeros and halves of characters.
        if num_ascii > 0.02 * len(text) and num_odd + text.count("\ufffd") < 0.05 * len(text):
            found.append((num_ascii / len(text), name))
    return max(found, default=(0, None))[1]


def decode_text(path: Path, data: bytes, encoding: str | None, report: SubtitleReport) -> str:
    if encoding is not None:
        try:
            return _decode(data, encoding, "strict")
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"'{path}' cannot be read as {encoding}: {error}.") from None
    known = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _unmarked_unicode(data[:4096])
    text = data.decode(known or "utf_8", "replace")
    spoilt = text.count("\ufffd") - data.count("\ufffd".encode())
    foreign = sum(character > "\x7f" for character in text) if spoilt > 0 else 0
    escaped = None if known else _escaped_encoding(data)
    if not known and (escaped or foreign < 2 * spoilt):
        known = report.encoding = escaped or _guess_encoding(data)
        text = _decode(data, known)
    report.unreadable_characters += text.count("\ufffd")
    return text


def _decode(data: bytes, encoding: str, errors: str = "replace") -> str:
    text = data.decode(encoding, errors)
    # In the Vietnamese encoding, accents stand behind their letters.
    return normalize("NFC", text) if codecs.lookup(encoding).name == "cp1258" else text


def _escaped_encoding(data: bytes) -> str | None:
    for name, pattern in _ESCAPES.items():
        # A text may have "~{" and "~}" by chance. So as HZ, it must be without a fault.
        if pattern.search(data) and (name != "hz" or "\ufffd" not in data.decode(name, "replace")):
            return name
    return None


def _guess_encoding(data: bytes) -> str:
    if declared := _DECLARED.match(data):
        with suppress(LookupError, UnicodeError):
            data.decode(name := declared[1].decode())
            return name
    # Numbers and times tell nothing, and would outweigh the letters of a short file.
    letters = b"\n".join([line for line in data.splitlines() if not line.isascii()][:2000])
    if not _LETTERS.search(letters.decode("cp1252", "replace")):
        return "cp1252"
    names = _ENCODINGS + _OLD
    fits = [
        (
            round(match.chaos / 4 + _count_odd(_decode(letters, name), name) + 0.03 * (name in _OLD), 2),
            names.index(name),
        )
        for match in from_bytes(letters, cp_isolation=names, threshold=0.6)
        for name in match.could_be_from_charset
        if name in names
    ]
    return names[min(fits)[1]] if fits else names[0]


def _count_odd(text: str, encoding: str) -> float:
    """Count what speaks against an encoding, for each character beyond ASCII."""
    latin = [
        letter for letter in text.lower() if "\x7f" < letter < "\u0250" and letter.isalpha() and letter not in "ªºµ"
    ]
    count = min(sum(letter not in letters for letter in latin) for letters in _ALPHABETS)
    count += sum(map(len, _ODD.findall(text))) + _count_rare(text, encoding)
    # A capital within a word, where one of the two letters is foreign.
    count += sum(max(pair) > "\x7f" and pair[0].islower() and pair[1].isupper() for pair in pairwise(text))
    count += sum(category(sign)[0] not in "LMPZ" for sign in re.sub("[\x00-\x7f£€¥°©®™×÷½¼¾²³♪♫]", "", text))
    count += sum("\u02b0" <= accent <= "\u02ff" for accent in text)
    # Hebrew read as Cyrillic has no capitals. In French, most letters with accents are small.
    letters = [character for character in text if character.isalpha()]
    foreign = [letter for letter in letters if letter > "\x7f"]
    is_small = len(foreign) > len(letters) / 2 and all(letter.islower() for letter in foreign)
    rate = count / max(1, sum(character > "\x7f" for character in text))
    return rate + 0.1 * is_small + 0.1 * bool(_MISREAD.match(text))


def _count_rare(text: str, encoding: str) -> int:
    """Count the letters of an East Asian text that are rare in its language, or not of it."""
    codec, first, last = _COMMON.get(encoding, ("", 0, 0))
    letters = [letter for letter in text if codec and letter > "\u0370" and letter.isalpha()]
    if codec == "euc_jp":
        letters = [letter for letter in letters if not "\u3000" <= letter <= "\u30ff"]
    return sum(not first <= (letter.encode(codec, "replace"))[0] <= last for letter in letters)
