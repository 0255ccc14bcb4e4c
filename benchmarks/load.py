# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How many streams can a server serve over its protocols, and how many if clients send recent frames again?

```bash
python benchmarks/load.py                                   # start a server of the embedded checkpoint; 4 streams
python benchmarks/load.py --ramp --out outputs/load         # find the largest number of streams for each way
python benchmarks/load.py --url http://camera-host:8000     # a server that runs already
```

"streaming" clients send each frame once to `/v1/realtime`, and the model speaks when it decides to. "re-sending"
clients do what a chat server without streams needs: for each frame, and for each question, they send the last frames
again to `/v1/chat/completions`. Both follow the same plan of arrivals, frames and questions, one after the other.

A frame misses its deadline if its client knows the decision more than one frame interval after the frame was due, or
if the frame was dropped. A server keeps up with a number of streams if at most 1% of the frames miss their deadline,
it refuses nothing, and nothing fails.
"""

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import threading
import time as clock
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from videollm_mod.console import quiet

import httpx
from common import ROOT, device_name, p99
from load_clients import PATIENCE, ResendingClient, StreamingClient, Tally, encoded_frames, most_at_once, plan
from memory import process_bytes
from report import markdown_table, rate, write_results

from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser


WAYS = ("streaming", "re-sending")
# Share of frames that may miss their deadline: those beyond the 99th percentile.
MISSED = 0.01
NUM_CLIPS = 4
# Seconds between two looks at the memory of the server.
LOOK = 0.5


@dataclass
class Load:
    """
    Results of one measurement. Times are in milliseconds, `None` without a value.

    Args:
        way (`str`): A name in `WAYS`.
        streams (`int`), at_once (`int`): Streams at once: as asked for, and the most in the plan.
        frames_per_second (`float`): Frames that the model saw, of all streams together.
        lag_p50, lag_p99 (`float`, *optional*): From the time that a frame is due until its client knows the
            decision about it.
        missed (`float`): Share of the frames that missed their deadline.
        first_word_p50, first_word_p99 (`float`, *optional*): From a question to the first word of its answer.
        questions (`int`), unanswered (`int`): Questions, and those without an answer.
        dropped (`int`), refusals (`int`), resumed (`int`), errors (`dict`): See [`Tally`].
        late_send_p99 (`float`): By how much clients sent their frames too late.
        server_mb (`float`, *optional*): Largest memory of the server's process.
        cache_mb (`float`): Largest memory of caches that was seen reserved. Caches held for a moment may be missed.
    """

    way: str
    streams: int
    at_once: int
    frames_per_second: float
    lag_p50: float | None
    lag_p99: float | None
    missed: float
    first_word_p50: float | None
    first_word_p99: float | None
    questions: int
    unanswered: int
    dropped: int
    refusals: int
    resumed: int
    errors: dict[str, int]
    late_send_p99: float
    server_mb: float | None
    cache_mb: float

    @property
    def keeps_up(self) -> bool:
        """Whether the deadlines were met and nothing went wrong."""
        return self.missed <= MISSED and not self.refusals and not self.errors


@dataclass
class Server:
    """
    The server under load.

    Args:
        address (`str`), key (`str`, *optional*): Its address, and a key that it accepts.
        process (`subprocess.Popen`, *optional*): Its process, if this program has started it.
        peak (`dict[str, float]`): The most bytes of the process and of the caches in the last measurement.
    """

    address: str
    key: str | None = None
    process: "subprocess.Popen[str] | None" = None
    peak: dict[str, float] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    async def max_streams(self) -> int:
        """Return the most streams that it serves. Raise `ValueError` if it does not answer."""
        try:
            async with httpx.AsyncClient(headers=self.headers) as http:
                return int((await self.figures(http))["videollm_mod_streams_limit"])
        except (httpx.HTTPError, KeyError) as error:
            raise ValueError(f"{self.address}/metrics: no figures of a `videollm-mod serve`: {error}") from None

    async def figures(self, http: httpx.AsyncClient) -> dict[str, float]:
        """Return its figures by the names that Prometheus has for them."""
        text = (await http.get(f"{self.address}/metrics")).raise_for_status().text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async def look(self, http: httpx.AsyncClient) -> None:
        """Take note of its largest memory again and again, until this is cancelled."""
        self.peak = {"process": 0.0, "cache": 0.0}
        while True:
            cache = (await self.figures(http))['videollm_mod_cache_bytes{state="reserved"}']
            self.peak["cache"] = max(self.peak["cache"], cache)
            if self.process is not None:
                self.peak["process"] = max(self.peak["process"], process_bytes(self.process.pid))
            await asyncio.sleep(LOOK)

    async def rest(self, http: httpx.AsyncClient) -> None:
        """Wait until all streams have ended."""
        end = clock.perf_counter() + PATIENCE
        while (await self.figures(http))["videollm_mod_streams"] and clock.perf_counter() < end:
            await asyncio.sleep(0.05)


def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    options = read_options()
    with one_line_errors(), started(options) as server:
        loads = asyncio.run(measure_all(server, options))
    print(report(loads, options))


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandLineParser(description="Put a load on a server.")
    parser.add_argument("--url", help="address of a server that runs; without it, a server is started here")
    parser.add_argument("--api-key", help="a key of that server")
    parser.add_argument("--checkpoint", help="folder or Hub id for the server here (default: the embedded checkpoint)")
    parser.add_argument("--max-streams", type=int, help="most streams of the server here (default: 32)")
    parser.add_argument("--max-frames", type=int, help="frames that each stream remembers there (default: 60)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    numbers = parser.add_mutually_exclusive_group()
    numbers.add_argument("--streams", type=int, nargs="+", default=[4], help="numbers of streams at once")
    numbers.add_argument("--ramp", action="store_true", help="find the largest number of streams that is kept up with")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each measurement")
    parser.add_argument("--stay", type=float, help="mean seconds of a stream (default: 20; with --ramp, all the time)")
    parser.add_argument("--fps", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="frame rates, in turn")
    parser.add_argument("--questions", type=float, default=4.0, help="questions per minute and stream")
    parser.add_argument("--breaks", type=float, default=1.0, help="broken connections per minute and stream")
    parser.add_argument("--window", type=int, default=8, help="frames that re-sending clients send again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for load.json and load.md")
    options = parser.parse_args()
    here = (options.checkpoint, options.max_streams, options.max_frames)
    if options.url and any(value is not None for value in here):
        parser.error("--checkpoint, --max-streams and --max-frames are for a server here, not for --url")
    if options.api_key and not options.url:
        parser.error("--api-key is for the server of --url")
    if min(*options.streams, options.window) < 1 or min(options.seconds, *options.fps, options.stay or 1) <= 0:
        parser.error("--streams, --window, --seconds, --fps and --stay must be above 0")
    if min(options.questions, options.breaks) < 0:
        parser.error("--questions and --breaks must be at least 0")
    if options.stay is None and not options.ramp:
        options.stay = 20.0
    return options


@contextmanager
def started(options: argparse.Namespace) -> Iterator[Server]:
    """
    Give the server of `--url`, or start one in a new process.

    Raises:
        `ValueError`: If it does not start.
    """
    if options.url:
        yield Server(options.url.rstrip("/"), options.api_key)
        return
    model = check_checkpoint(options.checkpoint or ROOT)
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--model", model, "--port", "0"]
    command += ["--max-streams", str(options.max_streams or 32), "--max-frames", str(options.max_frames or 60)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield Server(_address_of(process), process=process)
    finally:
        process.terminate()
        process.wait()


def _address_of(process: "subprocess.Popen[str]") -> str:
    """Return the address that a server prints when it is ready."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"(http://\S+) \((.*)\)", line):
            if found[2] != "ok":
                break
            # The server would stop at a full pipe.
            threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
            return found[1]
    raise ValueError(f"the server did not start: {(lines or ['it printed nothing'])[-1].strip()}")


async def measure_all(server: Server, options: argparse.Namespace) -> list[Load]:
    """Measure each way with each number of streams, or with those that the ramp tries."""
    frames = {fps: [encoded_frames(seed, fps) for seed in range(NUM_CLIPS)] for fps in options.fps}
    loads: list[Load] = []
    most = await server.max_streams()

    async def fits(way: str, streams: int) -> bool:
        loads.append(await measure(server, way, streams, frames, options))
        text = report(loads, options)
        if options.out is not None:
            rows = [asdict(load) for load in loads]
            write_results(options.out, "load", {"machine": describe(options), "rows": rows}, text)
        return loads[-1].keeps_up

    for way in options.ways:
        if options.ramp:
            await find_most(lambda streams, way=way: fits(way, streams), most)
        else:
            for streams in options.streams:
                await fits(way, streams)
    return loads


async def find_most(fits: Callable[[int], Awaitable[bool]], most: int) -> int:
    """Return the largest number from 1 to `most` that fits, 0 if none does. It doubles, then halves the distance."""
    good, bad, number = 0, most + 1, 1
    while bad - good > 1:
        if await fits(number):
            good = number
        else:
            bad = number
        number = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


async def measure(
    server: Server, way: str, streams: int, frames: dict[float, list[list[str]]], options: argparse.Namespace
) -> Load:
    """Put one load on the server and return the results."""
    rates = {"fps": options.fps, "stay": options.stay, "questions": options.questions, "breaks": options.breaks}
    visits, tally = plan(streams, options.seconds, seed=options.seed, **rates), Tally()
    limits = httpx.Limits(max_connections=None)
    patience = options.seconds + PATIENCE
    async with httpx.AsyncClient(headers=server.headers, limits=limits, timeout=patience) as http:
        looking = asyncio.ensure_future(server.look(http))
        start, clients = clock.perf_counter() + 0.1, []
        for number, visit in enumerate(visits):
            given = (server, visit, frames[visit.fps][number % NUM_CLIPS], tally, start)
            if way == "streaming":
                clients.append(StreamingClient(*given).run())
            else:
                clients.append(ResendingClient(*given, window=options.window, http=http).run())
        await asyncio.gather(*clients)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await server.rest(http)
    return summarise(way, streams, most_at_once(visits), options.seconds, tally, server.peak)


def summarise(way: str, streams: int, at_once: int, seconds: float, tally: Tally, peak: dict[str, float]) -> Load:
    """Return the results of a measurement: percentiles of what clients have seen, and the peak memory in bytes."""
    return Load(
        way,
        streams,
        at_once,
        frames_per_second=len(tally.lags) / seconds,
        lag_p50=_milliseconds(median, tally.lags),
        lag_p99=_milliseconds(p99, tally.lags),
        missed=tally.missed,
        first_word_p50=_milliseconds(median, tally.first_words),
        first_word_p99=_milliseconds(p99, tally.first_words),
        questions=tally.asked,
        unanswered=tally.unanswered,
        dropped=tally.dropped,
        refusals=tally.refusals,
        resumed=tally.resumed,
        errors=dict(tally.errors),
        late_send_p99=_milliseconds(p99, tally.late_sends) or 0.0,
        server_mb=peak["process"] / 1e6 or None,
        cache_mb=peak["cache"] / 1e6,
    )


def _milliseconds(of: Callable[[list[float]], float], seconds: list[float]) -> float | None:
    return 1e3 * of(seconds) if seconds else None


def describe(options: argparse.Namespace) -> str:
    """Return what was measured on what, in one line."""
    rates = ", ".join(f"{fps:g}" for fps in options.fps)
    server = options.url or f"a server here with {options.checkpoint or 'the embedded checkpoint'}"
    stay = "all the time" if options.stay is None else f"for {options.stay:g} s on average"
    each = f"{options.questions:g} questions and {options.breaks:g} broken connections per minute and stream"
    text = f"{server}, {device_name('cpu')}; {options.seconds:g} s at {rates} fps; streams stay {stay}; {each}"
    return f"{text}; {options.window} frames sent again; seed {options.seed}."


def report(loads: Sequence[Load], options: argparse.Namespace) -> str:
    """Return all results so far as Markdown."""
    lines = [describe(options), "", table(loads)]
    for way in options.ways if options.ramp else ():
        kept = [load.streams for load in loads if load.way == way and load.keeps_up]
        lines.append(f"\n{way}: keeps up with {max(kept, default=0)} streams")
    for load in loads:
        if load.errors:
            errors = ", ".join(f"{count} x {name}" for name, count in load.errors.items())
            lines.append(f"\nerrors of {load.way}, {load.streams} streams: {errors}")
    return "\n".join(lines) + "\n"


def table(loads: Sequence[Load]) -> str:
    """Return the results as a Markdown table."""
    head = ["way", "streams", "most at once", "frames/s", "lag p50, ms", "lag p99, ms", "deadlines missed"]
    head += ["first word p50, ms", "first word p99, ms", "answers", "frames dropped", "refusals", "resumed"]
    head += ["clients late p99, ms", "server, MB", "caches, MB"]
    return markdown_table(head, map(_cells, loads))


def _cells(load: Load) -> list[str | int]:
    cells = [load.way, load.streams, load.at_once, rate(load.frames_per_second)]
    cells += [_number(load.lag_p50), _number(load.lag_p99), f"{load.missed:.1%}"]
    cells += [_number(load.first_word_p50), _number(load.first_word_p99)]
    cells += [f"{load.questions - load.unanswered} of {load.questions}", load.dropped, load.refusals, load.resumed]
    return [*cells, _number(load.late_send_p99), _number(load.server_mb), f"{load.cache_mb:.1f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    main()
