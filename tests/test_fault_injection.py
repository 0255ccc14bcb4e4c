# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Every byte range of small files is spoilt in turn. Each file is read as far as it goes, or refused in one line.

One process reads all files, so that a crash or a hang names its case. To see what each case of a kind gives, run
`python tests/test_fault_injection.py mp4 SEED RANGES`.
"""

import bisect
import faulthandler
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time as clock
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest

from videollm_mod import StreamEvent, VideoReader, read_video
from videollm_mod.space.captions import burn_in
from videollm_mod.train.data.subtitles import read_subtitles, to_sentences
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages


SEED, RANGES = 0, 35
# Seconds of processor time that a case may take, and of waiting after which it counts as a hang.
LONGEST, LONGEST_WAIT = 10, 60
# Captions are burnt into one case of this many.
BURN_IN_EVERY = 50
SECONDS, FPS = 4, 10
# Frames by which a picture may be early or late beside a fault.
NEAR = 2.5
CODECS = {"mp4": "libx264", "ts": "libx264", "mkv": "libx264", "webm": "libvpx"}
SUBTITLES = ("srt", "vtt", "ass")
KINDS = (*CODECS, *SUBTITLES, "jsonl")


# ------------------------------------------------------------------------------------------------------------- sources


def write_video(path: Path) -> None:
    """Write a clip of about 30 kB with sound. Each frame is brighter by 4, and each second has a key frame."""
    kind = path.suffix[1:]
    noise = np.random.default_rng(0).integers(0, 60, (64, 96, 3))
    form = {"ts": "mpegts", "mkv": "matroska"}.get(kind, kind)
    options = {"movflags": "faststart"} if kind == "mp4" else {"cluster_time_limit": "1000"} if kind != "ts" else {}
    with av.open(str(path), "w", format=form, container_options=options) as container:
        stream = container.add_stream(CODECS[kind], rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.gop_size, stream.bit_rate = FPS, 50_000
        stream.options = {"deadline": "realtime"} if kind == "webm" else {"bf": "2", "sc_threshold": "0"}
        audio = container.add_stream("libopus" if kind == "webm" else "aac", rate=48000, layout="mono")
        audio.bit_rate = 8_000
        for index in range(FPS * SECONDS):
            picture = np.roll(noise, 3 * index, axis=1) + 4 * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
            samples = np.sin(np.arange(4800 * index, 4800 * (index + 1)) / 20).astype(np.float32)
            sound = av.AudioFrame.from_ndarray(
                samples[None], format="flt" if kind == "webm" else "fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 48000, 4800 * index
            container.mux(audio.encode(sound))
        container.mux(stream.encode() + audio.encode())


def stamp(seconds: float, mark: str) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds % 60:06.3f}".replace(".", mark)


def write_subtitles(path: Path) -> None:
    """Write 300 cues with markup and letters outside of ASCII, about 30 kB."""
    cues = [(2.0 * i, 2.0 * i + 1.5, f"<i>Der {i}. Ball rollt über die Straße bis ins Café.</i>") for i in range(300)]
    if path.suffix == ".ass":
        text = "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\nFormat: Name, Fontname, Fontsize\n"
        text += "Style: Default,Arial,20\n\n[Events]\n"
        text += "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        for begin, end, words in cues:
            words = words.replace("<i>", "{\\i1}").replace("</i>", "{\\i0}")
            text += f"Dialogue: 0,{stamp(begin, '.')[1:-1]},{stamp(end, '.')[1:-1]},Default,,0,0,0,,{words}\n"
    else:
        mark, parts = (",", []) if path.suffix == ".srt" else (".", ["WEBVTT\n"])
        parts += [f"{n}\n{stamp(a, mark)} --> {stamp(b, mark)}\n{words}\n" for n, (a, b, words) in enumerate(cues, 1)]
        text = "\n".join(parts)
    path.write_text(text, encoding="utf-8")


def write_rows(path: Path) -> None:
    """Write 40 rows of timed messages, about 30 kB."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Erzähle.", "time": 0.0}]
    for index in range(8):
        words = f"Der {index}. Ball rollt über die Straße."
        messages.append({"role": "assistant", "content": words, "time": index / 2})
    row = {"video": "clip.mp4", "start": 0.0, "end": 4.0, "messages": messages}
    path.write_text(40 * (json.dumps(row, ensure_ascii=False) + "\n"), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- faults

# What people's files contain where it does not belong.
SCRAPS = [
    b"\n\n",
    b"null\n",
    b"[]\n",
    b"{}",
    b"NaN",
    b"1e999",
    b"-->",
    b"<",
    b"&#0;",
    b"{\\p1}",
    b"\xff\xfe",
    b"\xff\xd8",
    b"\x00\x00\x01\xb7",
]


def zeroed(old: bytes, chance: random.Random) -> bytes:  # noqa: ARG001
    return bytes(len(old))


def randomized(old: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(len(old))


def flipped(old: bytes, chance: random.Random) -> bytes:
    """Change one bit."""
    at = chance.randrange(len(old))
    return old[:at] + bytes([old[at] ^ 1 << chance.randrange(8)]) + old[at + 1 :]


def deleted(old: bytes, chance: random.Random) -> bytes:  # noqa: ARG001
    return b""


def duplicated(old: bytes, chance: random.Random) -> bytes:  # noqa: ARG001
    return old + old


def inserted(old: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(old))
    return old[:at] + chance.choice(SCRAPS) + old[at:]


def truncated(old: bytes, chance: random.Random) -> bytes:
    return old[: chance.randrange(len(old))]


FAULTS = (zeroed, randomized, flipped, deleted, duplicated, inserted, truncated)


class Case(NamedTuple):
    """A spoilt file: bytes from `begin` to `end` of the unspoilt file are not what they were."""

    name: str
    content: bytes
    begin: int
    end: int


def cases(kind: str, content: bytes, seed: int, ranges: int) -> Iterator[Case]:
    """Yield each fault in each range."""
    edges = [round(index * len(content) / ranges) for index in range(ranges + 1)]
    for fault, (begin, end) in itertools.product(FAULTS, pairwise(edges)):
        name = f"{kind} {fault.__name__} {begin}:{end} seed {seed}"
        spoilt = content[:begin] + fault(content[begin:end], random.Random(name))
        end = len(content) if fault is truncated else end
        yield Case(name, spoilt + content[end:], begin, end)


# ------------------------------------------------------------------------------------------------------------- reading


class Original:
    """An unspoilt file, and what each part of it gives."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.path = kind, folder / f"clip.{kind}"
        write = write_video if kind in CODECS else write_rows if kind == "jsonl" else write_subtitles
        write(self.path)
        self.content = self.path.read_bytes()
        if kind in CODECS:
            with av.open(str(self.path)) as container:
                packets = [packet for packet in container.demux(video=0) if packet.size]
            first = min(packet.pts for packet in packets)
            self.positions = [packet.pos for packet in packets]
            self.seconds = [int((packet.pts - first) * packet.time_base) for packet in packets]
            self.levels = {
                round(time, 1): frame.mean() for time, frame in read_video(self.path, fps=5, end=SECONDS - 0.1)
            }
        elif kind in SUBTITLES:
            self.lines = read_subtitles(self.path)
            self.positions = [self.content.index(f"Der {i}. Ball".encode()) for i in range(len(self.lines))]
        else:
            self.positions = [0, *(at + 1 for at, byte in enumerate(self.content[:-1]) if byte == 10)]

    def spoils_all(self, case: Case) -> bool:
        """Whether the fault reaches what the rest of the file depends on."""
        # The index of an mp4 says at which byte each frame is.
        shifts = len(case.content) != len(self.content) and case.end < len(self.content)
        is_in_head = self.kind != "jsonl" and case.begin < self.positions[0]
        return (
            is_in_head or (self.kind == "mp4" and shifts) or case.begin < self.positions[min(3, self.kind in CODECS)]
        )

    def around(self, case: Case, margin: int) -> tuple[int, int]:
        """Return the indices of the first and the last part that the fault may touch."""
        first, last = (bisect.bisect_right(self.positions, at) - 1 for at in (case.begin, case.end + margin))
        return max(0, first), max(0, last)

    def lost_pictures(self, case: Case, shown: dict[float, float]) -> list[float]:
        """Return the times outside of the spoilt seconds at which the picture is missing or another."""
        first, last = self.around(case, 1000)
        begin, end = self.seconds[first], self.seconds[last] + 1
        wanted = {time: level for time, level in self.levels.items() if not begin <= time < end}
        return [time for time, level in wanted.items() if abs(shown.get(time, math.inf) - level) > NEAR * 4]

    def lost_lines(self, case: Case, lines: list[Any]) -> list[str]:
        """Return the cues that are missing although the fault is not beside them."""
        first, last = self.around(case, 0)
        wanted = {*self.lines[: max(0, first - 1)], *self.lines[last + 3 :]}
        return sorted(str(line) for line in wanted - {*lines})


def read(original: Original, path: Path, case: Case, burns: bool) -> str:
    """Return in one line what a file gives. It begins with "poor" if parts are missing that are not spoilt."""
    if original.kind in CODECS:
        said, lost = read_pictures(original, path, case)
        if burns:
            burn_in(path, [StreamEvent(0.5, 1, "assistant", "A ball.")], path.with_name("out.mp4"))
    elif original.kind in SUBTITLES:
        lines = read_subtitles(path)
        assert all(0 <= line.start < math.inf and math.isfinite(line.end) and line.text.strip() for line in lines)
        said, lost = f"{len(lines)} lines, {len(to_sentences(lines))} sentences", original.lost_lines(case, lines)
    else:
        rows = load_timed_messages(path)
        faults = list(find_faults(rows))
        assert not any("\n" in str(fault) or path.name not in str(fault) for fault in faults)
        good = len(rows) - len({fault.row for fault in faults})
        first, last = original.around(case, 0)
        wanted = first + len(original.positions) - 1 - last - 1
        said, lost = f"{len(rows)} rows, {len(faults)} faults", ["rows"] * (wanted - good)
    return f"{'poor' if lost and not original.spoils_all(case) else 'read'} {said}, lost {len(lost)} {lost[:3]}"


def read_pictures(original: Original, path: Path, case: Case) -> tuple[str, list[float]]:
    with VideoReader(path) as reader:
        seconds, last = reader.seconds, Fraction(0)
        assert 0 <= seconds < 1000, f"{seconds} s"
        for count, (time, duration, frame) in enumerate(reader.frames()):
            assert last <= time < 1000 and 0 < duration < 1000 and count < 1000, f"{last} {time} {duration} {count}"
            assert frame.width * frame.height < 10_000_000
            last = time
    shown = {}
    for time, frame in read_video(path, fps=5):
        assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        assert time >= max(shown, default=0.0) and len(shown) < 5000
        shown[round(time, 1)] = frame.mean()
    lost = original.lost_pictures(case, shown)
    if 2.0 in shown and 2.0 not in lost:
        for time, frame in read_video(path, fps=5, start=2.0, end=3.0):
            shown[round(time, 1)] = frame.mean()
        lost = original.lost_pictures(case, shown)
    return f"{len(shown)} frames in {seconds:.1f} s; {reader.report}", lost


def attempt(original: Original, path: Path, case: Case, burns: bool) -> str:
    """Return in one line what reading a file gives. It begins with read, poor, refused or WRONG."""
    try:
        result = read(original, path, case, burns)
    except (ValueError, OSError) as error:
        result = str(error)
        word = "refused" if original.spoils_all(case) else "poor refused"
        word = "WRONG" if "\n" in result or path.name not in result else word
        result = f"{word} {result}"
    except Exception as error:
        place = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        result = f"WRONG {type(error).__name__} in {place.tb_frame.f_code.co_name}, line {place.tb_lineno}: {error}"
    return result.replace("\n", "\\n")


def work(kinds: list[str], seed: int, ranges: int, done: int) -> None:
    """Read all cases but the first. Write the name of a case, then what reading it gave."""
    faulthandler.enable()
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        Original("mp4", Path(folder))
        for kind in kinds:
            original = Original(kind, Path(folder))
            path = Path(folder) / f"spoilt.{kind}"
            for case in cases(kind, original.content, seed, ranges):
                number += 1
                if number <= done:
                    continue
                path.write_bytes(case.content)
                sys.stdout.write(f"{case.name}\n")
                sys.stdout.flush()
                # It writes where the process waits, and ends it.
                faulthandler.dump_traceback_later(LONGEST_WAIT, exit=True)
                begin = clock.process_time()
                result = attempt(original, path, case, number % BURN_IN_EVERY == 0)
                took = clock.process_time() - begin
                faulthandler.cancel_dump_traceback_later()
                result = f"WRONG took {took:.1f} s: {result}" if took > LONGEST else result
                sys.stdout.write(f"    {result}\n")
                sys.stdout.flush()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what each case gave. A process that dies is followed by another, which begins with the next case."""
    folder = tmp_path_factory.mktemp("spoilt")
    found: dict[str, str] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder), "TMPDIR": str(folder)}
    while True:
        command = [sys.executable, __file__, ",".join(KINDS), str(SEED), str(RANGES), str(len(found))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        lines = done.stdout.splitlines()
        found |= dict(zip(lines[::2], map(str.strip, lines[1::2]), strict=False))
        if done.returncode == 0:
            return found
        assert len(lines) % 2, f"the process ends with {done.returncode} between cases:\n{done.stderr[-2000:]}"
        found[lines[-1]] = f"WRONG ended with {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.xdist_group("spoilt files")  # so that one process reads them all
@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_files_are_read_as_far_as_they_go_or_refused_in_one_line(results, kind):
    ours = {name: result for name, result in results.items() if name.startswith(f"{kind} ")}
    assert len(ours) == len(FAULTS) * RANGES
    wrong = [f"{name}: {result}" for name, result in ours.items() if result.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    # FFmpeg now and then gives up on a file, or a part of it, that could be read.
    poor = [f"{name}: {result}" for name, result in ours.items() if result.startswith("poor")]
    assert len(poor) <= 0.03 * len(ours), "\n".join(poor)


if __name__ == "__main__":
    work(sys.argv[1].split(","), *(int(number) for number in (*sys.argv[2:], 0)[:3]))
