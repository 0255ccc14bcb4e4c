# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Spoilt videos, subtitles and rows of training data: each is read as far as it goes, or refused in a line that names it.
"""

import json
import math
import os
import random
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from fuzzing import SEEDS, WRONG, check_error, run_case, spoil_bytes
from hypothesis import given, settings
from test_fault_injection import write_subtitles
from tiny import tiny_processor

from videollm_mod import VideoReader, read_video
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.subtitles import read_subtitles, to_sentences, to_timed_messages
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


# Codec, pixels and format of each kind of video.
VIDEOS = {
    "mp4": ("libx264", "yuv420p", "mp4"),
    "mkv": ("libx264", "yuv420p", "matroska"),
    "webm": ("libvpx", "yuv420p", "webm"),
    "avi": ("mpeg4", "yuv420p", "avi"),
    "gif": ("gif", "rgb8", "gif"),
    "ts": ("mpeg2video", "yuv420p", "mpegts"),
    "mjpeg": ("mjpeg", "yuvj420p", "mjpeg"),
    "flv": ("flv", "yuv420p", "flv"),
    "mov": ("prores_ks", "yuv422p10le", "mov"),
    "png": ("apng", "rgb24", "apng"),
}
MOST_FRAMES = 40


# -------------------------------------------------------------------------------------------------------------- videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return small videos by their kind, and a folder to write in."""
    folder = tmp_path_factory.mktemp("videos")
    frames = np.random.default_rng(0).integers(0, 255, (8, 6, 8, 3)).repeat(6, axis=1).repeat(6, axis=2)
    made = {}
    for kind, (codec, pixels, form) in VIDEOS.items():
        path = folder / f"clip.{kind}"
        with av.open(str(path), "w", format=form) as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
            stream.codec_context.gop_size, stream.bit_rate = 4, 40_000
            stream.options = {"preset": "ultrafast"} if codec == "libx264" else {}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode())
        made[kind] = path.read_bytes()
    return made, folder


def boxes(data: bytes) -> list[tuple[int, int]]:
    """Return begin and end of the boxes of an mp4, also of those in others."""
    found, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if not name.isalnum() or size < 8 or at + size > len(data):
            at += 1
            continue
        found.append((at, at + size))
        at += 8 if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"stsd", b"udta", b"dinf") else size
    return found


def splice(chance: random.Random, data: bytes) -> bytes:
    """Return an mp4 in which a box is doubled, missing, of another size, or in another's place."""
    places = boxes(data)
    begin, end = chance.choice(places)
    start, stop = chance.choice(places)
    size = chance.choice([0, 1, 7, 8, end - begin + 1, 2**31 - 1, 2**32 - 1])
    return chance.choice(
        [
            data[:end] + data[begin:],
            data[:begin] + data[end:],
            data[:begin] + data[start:stop] + data[end:],
            data[:begin] + size.to_bytes(4, "big") + data[begin + 4 :],
            data[:begin] + data[begin : begin + 8] + data[end:],
        ]
    )


def try_video(chance: random.Random, made: dict[str, bytes], folder: Path) -> None:
    kind = chance.choice(sorted(made))
    data = made[kind]
    if kind in ("mp4", "mov") and chance.random() < 0.5:
        data = splice(chance, data)
    if chance.random() < 0.9:
        data = spoil_bytes(chance, data, list(made.values()))
    path = folder / f"spoilt.{kind}"
    path.write_bytes(data)
    limits = {"max_pixels": 100_000} if chance.random() < 0.5 else {}
    try:
        with VideoReader(path, **limits) as reader:
            assert 0 <= reader.seconds < math.inf
            last = Fraction(0)
            for time, duration, frame in islice(reader.frames(chance.choice([0.0, 0.0, 0.3, 5.0])), MOST_FRAMES):
                assert last <= time and duration > 0
                assert not limits or frame.width * frame.height <= limits["max_pixels"]
                picture, last = reader.picture(frame), time
                assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
            assert "\n" not in str(reader.report)
        times = [time for time, _ in islice(read_video(path, fps=5), MOST_FRAMES)]
        assert times == sorted(times)
    except (ValueError, OSError) as error:
        check_error(error, path.name)


@given(seed=SEEDS)
def test_a_spoilt_video_is_read_or_refused_by_name(request, videos, seed):
    run_case(request, "video", seed, try_video, *videos)


# ----------------------------------------------------------------------------------------------------------- subtitles

CUES = [
    (0.5, 1.5, "Der 1. Ball rollt."),
    (1.5, 3.0, "- Wer ist da?\n- Ich."),
    (4.0, 5.5, "ANNA: <i>Hello</i> & bye [Music]"),
]
OTHER_SUBTITLES = {
    "sub": "".join(f"{{{int(a * 25)}}}{{{int(b * 25)}}}{{y:i}}{x.replace(chr(10), '|')}\n" for a, b, x in CUES),
    "sbv": "".join(f"0:00:0{a:.3f},0:00:0{b:.3f}\n{x}\n\n" for a, b, x in CUES),
    "ttml": '<?xml version="1.0"?><tt xmlns="http://www.w3.org/ns/ttml"><body><div>'
    + "".join(f'<p begin="{a}s" end="00:00:0{b:.3f}">A<br/>ball &amp; a <span>box</span></p>' for a, b, _ in CUES)
    + "</div></body></tt>",
    "lrc": "[ti:Song]\n[offset:+100]\n" + "".join(f"[00:0{a:.2f}]{x.splitlines()[0]}\n" for a, _, x in CUES),
    "smi": "<SAMI><BODY>"
    + "".join(f"<SYNC Start={int(a * 1000)}><P Class=ENCC>{x}" for a, _, x in CUES)
    + "</BODY></SAMI>",
    "mpl": "".join(f"[{int(a * 10)}][{int(b * 10)}]/{x.splitlines()[0]}\n" for a, b, x in CUES),
    "txt": "".join(f"00:00:0{int(a)}:{x.splitlines()[0]}\n" for a, _, x in CUES),
    "tsv": "start\tend\ttext\n" + "".join(f"{int(a * 1000)}\t{int(b * 1000)}\t{x!r}\n" for a, b, x in CUES),
    "json": json.dumps({"text": "x", "segments": [{"id": 0, "start": a, "end": b, "text": x} for a, b, x in CUES]}),
    "json3": json.dumps(
        {"events": [{"tStartMs": 1000 * a, "dDurationMs": 900, "segs": [{"utf8": x}]} for a, _, x in CUES]}
    ),
    "xml": "<transcript>"
    + "".join(f'<text start="{a}" dur="1.0">A ball &amp;amp; x</text>' for a, _, _ in CUES)
    + "</transcript>",
    "srv3": '<timedtext format="3"><body><p t="500" d="900"><s>A</s><s t="9"> ball</s></p></body></timedtext>',
    "scc": "Scenarist_SCC V1.0\n\n00:00:01:00\t9420 9420 94f4 94f4 c8e5 ecec ef80 942f\n\n00:00:03:00\t942c\n",
    "sub2": "[INFORMATION]\n[TITLE]x\n[SUBTITLE]\n00:00:01.00,00:00:02.00\nA ball[br]rolls\n\n",
}
# Scraps that begin another format, or a number that is too large.
SCRAPS = [
    b"WEBVTT\n\n",
    b"[Script Info]\n",
    b"<SAMI>",
    b"[offset:99999999]",
    b"{1}{1}0",
    b"{0}{0}1e400",
    b"&#x110000;",
]
SCRAPS += [
    b"-->",
    b"9" * 400,
    b"00:00:01,000 --> 99:99:99,999",
    b"1e999",
    b"NaN",
    b"-",
    b"[[[[",
    b'{"',
    b"<!ENTITY a '&a;&a;'>",
]
SCRAPS += [
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\xed\xa0\x80",
    b"<?xml version='1.0' encoding='utf-7'?>",
    b"\n\n",
    b"(" * 200,
]


@pytest.fixture(scope="module")
def subtitles(tmp_path_factory):
    """Return small subtitles by their kind, and a folder to write in."""
    folder = tmp_path_factory.mktemp("subtitles")
    made = {kind: text.encode() for kind, text in OTHER_SUBTITLES.items()}
    for kind in ("srt", "vtt", "ass"):
        write_subtitles(folder / f"long.{kind}")
        made[kind] = (folder / f"long.{kind}").read_bytes()[:900]
    for kind, data in made.items():
        (folder / f"sound.{kind}").write_bytes(data)
        assert read_subtitles(folder / f"sound.{kind}", frame_rate=25), kind
    return made, folder


def try_subtitle(chance: random.Random, made: dict[str, bytes], folder: Path) -> None:
    kind = chance.choice(sorted(made))
    data = made[kind]
    for _ in range(chance.choice([0, 1, 1, 2])):
        at = chance.randrange(len(data) + 1)
        data = data[:at] + chance.choice([*SCRAPS, chance.choice(list(made.values()))]) + data[at:]
    data = spoil_bytes(chance, data, list(made.values()))
    if chance.random() < 0.1:
        data = data.decode(errors="replace").encode(chance.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-le"]))
    path = folder / f"spoilt.{kind}"
    path.write_bytes(data)
    encoding = chance.choice([None] * 8 + ["utf-8", "cp1252", "no such"])
    try:
        lines = read_subtitles(path, encoding=encoding, frame_rate=chance.choice([None, 25.0]))
    except (ValueError, OSError) as error:
        check_error(error, path.name)
        return
    assert all(0 <= line.start < math.inf and math.isfinite(line.end) and line.text.strip() for line in lines)
    messages = to_timed_messages(to_sentences(lines), end=10.0)
    times = [message["time"] for message in messages]
    assert times == sorted(times) and all(0 <= time <= 10 for time in times)
    json.dumps(messages, ensure_ascii=False).encode()


@given(seed=SEEDS)
def test_spoilt_subtitles_are_read_or_refused_by_name(request, subtitles, seed):
    run_case(request, "subtitle", seed, try_subtitle, *subtitles)


# ---------------------------------------------------------------------------------------------------------------- rows


def draw_row(chance: random.Random, names: list[str]) -> Any:
    """Return a row of timed messages, with none to a few faults."""
    start = chance.choice([0.0, 0.0, 0.2])
    messages, time = [], start
    for _ in range(chance.choice([1, 2, 3])):
        time += chance.choice([0.0, 0.1, 0.2])
        messages.append(
            {"role": chance.choice(["user", "assistant"]), "content": chance.choice(["A ball.", "é"]), "time": time}
        )
    row = {"video": chance.choice(names), "start": start, "end": 0.7, "messages": messages}
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        place = chance.choice([row, chance.choice(messages)])
        how = chance.random()
        name = chance.choice(
            [*sorted(place), "frame_features", "time", "learn", "truth", "task", "id", "where", "epoch"]
        )
        if how < 0.7:
            place[name] = chance.choice(WRONG[:-1])
        elif name in place:
            del place[name]
    return row if chance.random() < 0.97 else chance.choice(WRONG[:-1])


def as_line(chance: random.Random, row: Any) -> bytes:
    """Return a row as a line of JSON, now and then spoilt."""
    data = json.dumps(row, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    data = spoil_bytes(chance, data) if chance.random() < 0.15 else data
    data = b"[" * 5000 if chance.random() < 0.003 else data
    return data.replace(b"\n", b" ") or b"{}"


@pytest.fixture(scope="module")
def clips(videos):
    _, folder = videos
    return folder, ["clip.mp4", "clip.mp4", "clip.webm", "none.mp4"]


def try_rows(chance: random.Random, folder: Path, names: list[str], num_rows: int) -> None:
    """Check that rows are those that training can use: what has no fault is read, and faults are named."""
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(as_line(chance, draw_row(chance, names)) + b"\n" for _ in range(num_rows)))
    rows = load_timed_messages(path)
    assert len(rows) == num_rows
    faults: dict[int, list[Any]] = {}
    for fault in find_faults(rows, fps=5):
        check_error(ValueError(str(fault)), f"'{path}', line {fault.row + 1}")
        faults.setdefault(fault.row, []).append(fault)
    collator = StreamCollator(tiny_processor(), fps=5)
    for index in range(num_rows):
        try:
            batch = collator([rows[index]])
        except FaultyRowError as error:
            check_error(error, f"'{path}', line {index + 1}")
            assert index in faults, (index, error, path.read_bytes().splitlines()[index])
        except Exception as error:
            raise AssertionError(f"line {index + 1}: {error!r}: {path.read_bytes().splitlines()[index]}") from error
        else:
            assert batch["input_ids"].shape[0] == 1


def test_rows_are_used_in_training_if_they_have_no_fault(request, clips):
    # A case is a file of rows. Other seeds draw other files.
    first, count = 10_000 * int(os.environ.get("FUZZ_SEED", "0")), settings.default.max_examples
    for seed in range(first, first + max(1, count // 500)):
        run_case(request, "rows", seed, try_rows, *clips, min(count, 500))
