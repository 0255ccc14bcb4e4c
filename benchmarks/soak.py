# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Does an engine stay as fast, as small and as right as it was, through hours of streams that come and go?

```bash
python benchmarks/soak.py                            # the embedded checkpoint, 8 hours of video at 2 fps
python benchmarks/soak.py --hours 0.5 --streams 4
```

Threads play clients, each one stream after the other. A stream sees frames, asks questions, is saved and restored, and
is closed or breaks off in the middle. One stream stays from the first frame to the last. All see more frames than they
remember. Frames come as fast as the engine sees them, so hours of video take minutes.

A table has a line for each tenth of the frames: latencies, the longest pause, processor time, memory, and what the
process holds. If a pause has much time in the kernel, and pages that are read again, the machine was short of memory.
Then new sessions see the frames of some streams again, and must say the same. The stream that stayed has forgotten
most of what it saw: sessions that see only its last frames before a question are asked the same.
"""

import argparse
import gc
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time as clock
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from videollm_mod.console import quiet

from common import PROMPT, ROOT, default_device, device_name, p99
from memory import own_bytes, process_bytes, used_bytes
from report import markdown_row, markdown_table
from transformers import AutoModel, AutoProcessor

from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import StreamingEngine
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.command_line import CommandLineParser


QUESTIONS = ("What do you see?", "How many things do you see?", "What happened last?")
TENTHS = 10
# Frames of a stream that may wait. Its client then waits too.
MOST_WAITING = 8
_PERIOD = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Plan:
    """
    What a client does with one stream. All of it follows from the number of the stream.

    Args:
        begin (`int`), frames (`int`): First frame of the clip, and how many the stream sees.
        questions (`dict[int, str]`): Questions by the number of frames before them.
        saves (`frozenset[int]`): Numbers of frames after which the stream is saved, closed and restored.
        breaks_off (`bool`): Whether the client goes away without waiting for the rest.
    """

    begin: int
    frames: int
    questions: dict[int, str]
    saves: frozenset[int]
    breaks_off: bool

    @classmethod
    def of(cls, number: int, most: int, *, mean: int = 120) -> "Plan":
        """Return the plan of a stream of at most so many frames. It has between 0.2 and 1.8 times `mean` frames."""
        chance = random.Random(number)
        frames = min(most, max(1, round(mean * chance.uniform(0.2, 1.8))))
        asked = {chance.randrange(frames): chance.choice(QUESTIONS) for _ in range(round(frames / 20))}
        saves = frozenset(chance.sample(range(frames), int(chance.random() < 0.2)))
        return cls(chance.randrange(1000), frames, asked, saves, breaks_off=chance.random() < 0.2)


@dataclass
class Ended:
    """A stream that has ended: its plan, and the gist of its events, up to where it broke off."""

    plan: Plan
    said: list[str]


@dataclass
class Tenth:
    """
    What is known of a tenth of the frames.

    Args:
        frames (`int`): Frames pushed.
        latencies (`array`): Seconds from arrival to decision.
        spent ([`Spent`]): What the process spent on it.
        pause (`float`): Longest time without a new frame, in seconds.
        most_bytes (`int`), own_bytes (`int`): Most memory, with and without pages of files.
        used_bytes (`float`): Mean of the memory in use: without what malloc keeps of freed memory.
        holds (`dict[str, int]`): What the process held at the end.
    """

    frames: int
    latencies: array
    spent: "Spent"
    pause: float
    most_bytes: int
    own_bytes: int
    used_bytes: float
    holds: dict[str, int]


class Spent(NamedTuple):
    """
    What the process has spent: seconds of processor time in programs and in the kernel, and pages of files that it
    needed again after the system had dropped them. A machine that runs out of memory spends the last two.
    """

    user: float
    kernel: float
    pages: int

    @classmethod
    def so_far(cls) -> "Spent":
        """Return what was spent since the process began."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_utime, usage.ru_stime, usage.ru_majflt)

    def since(self, before: "Spent") -> "Spent":
        """Return what was spent since an earlier time."""
        return Spent(*(now - then for now, then in zip(self, before, strict=True)))


@dataclass
class Soak:
    """
    A soak of an engine.

    Args:
        engine ([`StreamingEngine`]): The engine. It must run in a thread.
        clip (`Sequence`): Frames that repeat.
        total (`int`): Frames of all streams.
        clients (`int`): Streams at once.
        fps (`float`): Frames per second of every stream.
        folder (`Path`): Where streams are saved.
        checked (`int`): Of every so many streams, one is kept for a comparison.
        mean (`int`): Mean frames of a stream.
        options (`dict`): Other options of every stream.
    """

    engine: StreamingEngine
    clip: Sequence[Any]
    total: int
    clients: int
    fps: float
    folder: Path
    checked: int = 10
    mean: int = 120
    options: dict[str, Any] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("opened", "saved", "broken", "asked"), 0))
    pushed: int = 0
    faults: list[BaseException] = field(default_factory=list)
    _number: int = 0
    _left: int = 0
    _seen: tuple[int, Spent] = (0, Spent(0, 0, 0))
    _lock: Any = field(default_factory=threading.Lock)

    def run(self, told: Callable[[Tenth], None] = lambda _: None) -> list[Tenth]:
        """Let the clients work, and return what was seen in each tenth. The first error of a client is raised."""
        self._left, self._seen = self.total, (self.pushed, Spent.so_far())
        works = [self._stay] + [self._come_and_go] * (self.clients - 1)
        threads = [threading.Thread(target=self._guard, args=(work,), daemon=True) for work in works]
        tenths: list[Tenth] = []
        for thread in threads:
            thread.start()
        for number in range(1, TENTHS + 1):
            tenths.append(self._watch(self.total * number // TENTHS, threads))
            told(tenths[-1])
        for thread in threads:
            thread.join()
        if self.faults:
            raise self.faults[0]
        return tenths

    def _watch(self, until: int, threads: Sequence[threading.Thread]) -> Tenth:
        """Return what is seen until so many frames were pushed."""
        most = own = 0
        used: list[int] = []
        pause, pushed, since = 0.0, self.pushed, clock.monotonic()
        with self.engine.changed:
            self.engine.stats.frame_latencies.clear()
        while self.pushed < until and any(thread.is_alive() for thread in threads):
            clock.sleep(_PERIOD)
            most, own = max(most, process_bytes()), max(own, own_bytes())
            used.append(used_bytes())
            if self.pushed != pushed:
                pushed, since = self.pushed, clock.monotonic()
            pause = max(pause, clock.monotonic() - since)
        with self.engine.changed:
            latencies = array("f", self.engine.stats.frame_latencies)
        (frames, before), self._seen = self._seen, (self.pushed, Spent.so_far())
        spent = self._seen[1].since(before)
        memory = most, own, sum(used) / max(1, len(used))
        return Tenth(self._seen[0] - frames, latencies, spent, pause, *memory, holdings(self.folder))

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.faults.append(error)
            self._left = 0

    def _take(self, frames: int) -> int:
        """Return how many of these frames may still be shown."""
        with self._lock:
            taken = min(frames, self._left)
            self._left -= taken
            return taken

    def _come_and_go(self) -> None:
        while True:
            with self._lock:
                number = self._number = self._number + 1
            plan = Plan.of(number, self.total, mean=self.mean)
            frames = self._take(plan.frames)
            if not frames:
                return
            self._show(Plan.of(number, frames, mean=self.mean), number)

    def _show(self, plan: Plan, number: int) -> None:
        """Be the client of one stream from start to end."""
        stream = self._open()
        stream.ask(PROMPT, reply_now=False)
        for index in range(plan.frames):
            self._push(stream, plan.begin, index)
            if index in plan.questions:
                stream.ask(plan.questions[index])
            if index in plan.saves:
                place = self.folder / str(number)
                stream.save(place, close=True)
                for _ in stream:  # until its memory is free
                    pass
                stream = self.engine.restore(place)
                for file in place.iterdir():
                    file.unlink()
                place.rmdir()
        before = stream.events
        stream.close(discard=plan.breaks_off)
        for _ in stream:
            pass
        with self._lock:
            done = {"opened": 1, "saved": len(plan.saves), "asked": len(plan.questions), "broken": plan.breaks_off}
            for name, count in done.items():
                self.counts[name] += count
            if number % self.checked == 0:
                self.ended.append(Ended(plan, [*map(gist, before if plan.breaks_off else stream.events)]))

    def _stay(self) -> None:
        """Be the client of the stream that is there all the time, and ask it a question now and then."""
        stream = self._open()
        stream.max_events = 100
        heard: list[str] = []
        listener = threading.Thread(target=lambda: heard.extend(map(gist, stream)))
        listener.start()
        stream.ask(PROMPT, reply_now=False)
        frames, questions = 0, {}
        while self._take(1):
            self._push(stream, 0, frames)
            if frames % 50 == 49:
                questions[frames] = QUESTIONS[frames // 50 % len(QUESTIONS)]
                stream.ask(questions[frames])
            frames += 1
        stream.close()
        listener.join()
        self.ended.insert(0, Ended(Plan(0, frames, questions, frozenset(), False), heard))

    def _open(self) -> Any:
        return self.engine.open(fps=self.fps, when_behind="block", max_waiting=MOST_WAITING, **self.options)

    def _push(self, stream: Any, begin: int, index: int) -> None:
        stream.push(self.clip[(begin + index) % len(self.clip)], time=index / self.fps)
        with self._lock:
            self.pushed += 1


def gist(event: Any) -> str:
    """Return the parts of an event that a session must repeat: time, frame, role, text and tokens. JSON is small."""
    return json.dumps([event.time, event.frame, event.role, event.text, event.token_ids])


def holdings(folder: Path) -> dict[str, int]:
    """Return how many threads, open files, files in a folder and Python objects the process holds."""
    gc.collect()
    # `gc.get_objects()` would do, but it refers to tuples that other threads are building, and Python then raises
    # SystemError in those threads. Freezing counts objects and refers to none.
    gc.freeze()
    objects = gc.get_freeze_count()
    gc.unfreeze()
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    # Unlike `rglob`, this passes over folders that a client removes meanwhile.
    files = sum(len(folders) + len(names) for _, folders, names in os.walk(folder))
    return {
        "threads": threading.active_count(),
        "open files": open_files,
        "files": files,
        "objects": objects,
    }


def replay(model: Any, processor: Any, clip: Sequence[Any], plan: Plan, **options: Any) -> list[str]:
    """Return what a new session says that is shown what a stream was shown."""
    session = model.stream(processor, **options)
    session.ask(PROMPT, reply_now=False)
    for index in range(plan.frames):
        session.push(clip[(plan.begin + index) % len(clip)], time=index / session.fps)
        if index in plan.questions:
            session.ask(plan.questions[index])
    session.close()
    return [*map(gist, session.events)]


def answers_of_windows(
    model: Any, processor: Any, clip: Sequence[Any], ended: Ended, **options: Any
) -> list[tuple[str, str]]:
    """Return for each question of a stream its answer, and that of a new session with the last frames before it."""
    events = [*map(json.loads, ended.said)]
    told = zip(events, events[1:], strict=False)
    given = [after[3] for before, after in told if before[2] == "user" and before[3] in QUESTIONS]
    found = []
    for (index, question), answer in zip(ended.plan.questions.items(), given, strict=True):
        begin = max(0, index + 1 - options["max_frames"])
        plan = Plan(ended.plan.begin + begin, index + 1 - begin, {index - begin: question}, frozenset(), False)
        found.append((answer, json.loads(replay(model, processor, clip, plan, **options)[-1])[3]))
    return found


def is_equal(ended: Ended, expected: Sequence[str]) -> bool:
    """Whether a stream has said what a session says, or if it broke off, the first of it."""
    return ended.said == list(expected)[: len(ended.said) if ended.plan.breaks_off else None]


def main() -> None:
    """Soak, print a line for each tenth, and compare."""
    quiet()
    parser = CommandLineParser(description="Run an engine for hours of video.")
    parser.add_argument("--checkpoint", default=str(ROOT), help="folder or Hub id")
    parser.add_argument("--video", default=str(ROOT / "samples" / "streamworld.mp4"))
    parser.add_argument("--hours", type=float, default=8.0, help="hours of video of all streams together")
    parser.add_argument("--fps", type=float, default=2.0, help="frames watched per second of video")
    parser.add_argument("--streams", type=int, default=8, help="streams at once")
    parser.add_argument("--max-frames", type=int, default=20, help="frames that a stream remembers")
    parser.add_argument("--max-text-tokens", type=int, default=128, help="text tokens that a stream remembers")
    parser.add_argument("--check", type=int, default=10, help="compare every such stream with a session")
    options = parser.parse_args()
    if min(options.hours, options.fps) <= 0 or min(options.streams, options.check) < 1:
        parser.error("--hours, --fps, --streams and --check must be above 0")
    with one_line_errors():
        options.checkpoint = check_checkpoint(options.checkpoint)
        soak_and_compare(options)


def soak_and_compare(options: argparse.Namespace) -> None:
    """Run the soak of the command line and print what it shows."""
    device = default_device()
    model = AutoModel.from_pretrained(options.checkpoint, trust_remote_code=True, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    clip = [frame for _, frame in processor.read_video(options.video, fps=options.fps)]
    limits = {"max_frames": options.max_frames, "max_text_tokens": options.max_text_tokens}
    total = round(options.hours * 3600 * options.fps)
    print(f"{total} frames of {options.streams} streams at once, {options.fps:g} fps, {device_name(device)}")
    head = ["frames", "p50, ms", "p99, ms", "pause, s", "program, ms per frame", "kernel, ms per frame"]
    head += [
        "pages read again",
        "process, MB",
        "without files, MB",
        "in use, MB",
        "threads",
        "open files",
        "files",
        "objects",
    ]
    print(markdown_table(head, []))
    begin = clock.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        StreamingEngine(model, processor, max_streams=options.streams, **limits) as engine,
    ):
        soak = Soak(engine, clip, total, options.streams, options.fps, Path(folder), options.check)
        tenths = soak.run(lambda tenth: print(markdown_row(cells(tenth)), flush=True))
        dropped, free, all_pages = engine.stats.dropped, engine.pool.free, engine.pool.num_pages
        all_free = all(len(free[kind]) == count for kind, count in all_pages.items())
    seconds = clock.perf_counter() - begin
    print(f"\n{total / options.fps / 3600:g} hours of video in {seconds / 60:.1f} minutes. " + summary(soak, tenths))
    print(f"Dropped frames: {dropped}. Cache pages that are not free at the end: {'none' if all_free else 'some'}.")
    given = {"fps": options.fps, **limits}
    wrong = [
        number
        for number, ended in enumerate(soak.ended)
        if not is_equal(ended, replay(model, processor, clip, ended.plan, **given))
    ]
    frames, said = sum(x.plan.frames for x in soak.ended), sum(len(x.said) for x in soak.ended)
    print(f"Equal to a new session: {len(soak.ended) - len(wrong)} of {len(soak.ended)} streams,", end=" ")
    print(f"with {frames} frames and {said} events. The first stream was there all the time: ", end="")
    print(f"{soak.ended[0].plan.frames} frames.")
    same = [answer == other for answer, other in answers_of_windows(model, processor, clip, soak.ended[0], **given)]
    halves = same[: len(same) // 2], same[len(same) // 2 :]
    print(f"Its answers are those of a session that saw only the last {options.max_frames} frames:", end=" ")
    print(
        ", ".join(
            f"{sum(half)} of {len(half)} in the {name} half"
            for name, half in zip(("first", "second"), halves, strict=True)
        )
    )
    if wrong:
        sys.exit(f"streams that said something else: {wrong}")


def cells(tenth: Tenth) -> list[str | int]:
    """Return the cells of a tenth's line."""
    times = sorted(tenth.latencies)
    ms = [f"{1e3 * times[len(times) // 2]:.1f}", f"{1e3 * p99(times):.1f}"] if times else ["-", "-"]
    user, kernel = (f"{1e3 * seconds / max(1, tenth.frames):.2f}" for seconds in tenth.spent[:2])
    return [
        tenth.frames,
        *ms,
        f"{tenth.pause:.1f}",
        user,
        kernel,
        tenth.spent.pages,
        f"{tenth.most_bytes / 1e6:.1f}",
        f"{tenth.own_bytes / 1e6:.1f}",
        f"{tenth.used_bytes / 1e6:.1f}",
        *tenth.holds.values(),
    ]


def summary(soak: Soak, tenths: Sequence[Tenth]) -> str:
    """Return what the streams did, and by how much memory has grown since the second tenth."""
    done = "{opened} streams came and went, {broken} of them broke off. They were asked {asked} questions, and saved"
    done = f"{done} and restored {{saved}} times.".format(**soak.counts)
    grown, own, used = (
        max(sizes[2:]) / max(1, sizes[1]) - 1
        for sizes in zip(*((tenth.most_bytes, tenth.own_bytes, tenth.used_bytes) for tenth in tenths), strict=True)
    )
    grown = f"at most {grown:+.1%}, without files {own:+.1%}, in use {used:+.1%}"
    return f"{done}\nMemory of tenths 3 to 10 against the second: {grown}."


if __name__ == "__main__":
    main()
