# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Random schedules of an engine: streams open, watch, ask, are saved and restored, interrupted and closed in any order.

Each stream says what a session of its own says, and at the end all memory is free.
"""

import random
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import said
from fuzzing import SEEDS, run_case
from hypothesis import given
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.serving import EngineFullError, StreamingEngine


LIMITS = {"max_frames": 6, "max_text_tokens": 100}
FRAMES = random_frames(8)
TEXTS = ["What?", "Why is the ball red?", "x", "[,,]\n"]


@lru_cache
def shared() -> tuple[Any, Any]:
    """Return one tiny model for all cases, and its processor."""
    return tiny_model(text_overrides={"num_hidden_layers": 2}), tiny_processor()


@pytest.fixture(scope="module")
def engine():
    model, processor = shared()
    return StreamingEngine(model, processor, max_streams=3, page_size=16, **LIMITS)


class Plan:
    """What one stream is given, in order: frames and questions, each with the calls that must not change its text."""

    def __init__(self, chance: random.Random) -> None:
        self.options = {
            "interval_threshold": chance.choice([0.0, 0.5, 1.0]),
            "max_new_tokens": chance.choice([1, 1, 2]),
            "chunk_frames": chance.choice([1, 8]),
            "fps": chance.choice([1.0, 2.0]),
        }
        if chance.random() < 0.2:
            self.options["speak"] = chance.choice(["every", "change"])
        self.calls: list[tuple[str, Any]] = []
        for _ in range(chance.choice([1, 1, 2, 3])):
            kind = chance.choice(["push", "push", "push", "ask", "ask_later", "ask", "save", "wrong", "fork"])
            given = (chance.randrange(7), chance.choice([1, 1, 2]), chance.choice(TEXTS))
            # A question before the first frame cannot be answered yet.
            can_answer = any(earlier == "push" for earlier, _ in self.calls)
            self.calls.append(("ask_later" if kind == "ask" and not can_answer else kind, given))
        self.ending = chance.choice(["close", "close", "close", "interrupt", "discard", "leave"])

    @property
    def is_comparable(self) -> bool:
        """Whether the stream is not cut short, which depends on when that happens."""
        return self.ending in ("close",)

    def on_session(self) -> list[tuple]:
        """Return what a session of its own says."""
        model, processor = shared()
        session = model.stream(processor, **LIMITS, **self.options)
        for kind, (begin, count, text) in self.calls:
            if kind == "push":
                session.push(FRAMES[begin : begin + count])
            elif kind in ("ask", "ask_later"):
                session.ask(text, reply_now=kind == "ask")
            elif kind == "fork":
                session.fork().push(FRAMES[:1])
        session.close()
        return said(session.events)


class Player(threading.Thread):
    """A thread that plays a plan on an engine. A stream that is saved goes on from its copy."""

    def __init__(self, engine: StreamingEngine, plan: Plan, folder: Path, start: threading.Barrier | None) -> None:
        super().__init__(daemon=True)
        self.engine, self.plan, self.folder, self.start_together = engine, plan, folder, start
        self.stream: Any = None
        self.others: list[Any] = []
        self.error: BaseException | None = None
        self.is_refused = False

    def run(self) -> None:
        try:
            if self.start_together is not None:
                self.start_together.wait(30)
            self.play()
        except EngineFullError:
            self.is_refused = True
        except BaseException as error:
            self.error = error

    def play(self) -> None:
        """Play the plan."""
        self.stream = self.engine.open(**self.plan.options)
        for call in self.plan.calls:
            self.play_call(*call)
        if self.plan.ending == "interrupt":
            self.stream.interrupt()
        if self.plan.ending != "leave":
            self.stream.close(discard=self.plan.ending == "discard")

    def play_call(self, kind: str, given: tuple[int, int, str]) -> None:
        """Give the stream frames or a question, save it, or call it with what it refuses."""
        begin, count, text = given
        if kind == "push":
            self.stream.push(FRAMES[begin : begin + count])
        elif kind in ("ask", "ask_later"):
            self.stream.ask(text, reply_now=kind == "ask")
        elif kind == "save":
            self.stream.save(self.folder, close=begin % 2 == 0)
            if begin % 2 == 0:
                # Another stream may have taken its place meanwhile.
                self.stream = self.engine.restore(self.folder)
        elif kind == "fork":
            # A copy that nobody hears takes memory until it ends.
            self.stream.save(self.folder)
            try:
                self.others.append(self.engine.restore(self.folder))
            except EngineFullError:
                return
            self.others[-1].push(FRAMES[:1])
            self.others[-1].close(discard=count == 1)
        else:
            for wrong in (lambda: self.stream.push(np.zeros((2, 2))), lambda: self.stream.ask(" ")):
                with pytest.raises(ValueError):
                    wrong()


def free_pages(engine: StreamingEngine) -> dict[Any, int]:
    return {kind: len(pages) for kind, pages in engine.pool.free.items()}


def try_schedule(chance: random.Random, engine: StreamingEngine, folder: Path) -> None:
    plans = [Plan(chance) for _ in range(chance.choice([1, 1, 2, 2, 3]))]
    in_threads = chance.random() < 0.5
    start = threading.Barrier(len(plans)) if in_threads else None
    players = [Player(engine, plan, folder / str(index), start) for index, plan in enumerate(plans)]
    before = free_pages(engine)
    assert not engine.streams
    if in_threads:
        with engine:
            for player in players:
                player.start()
            for player in players:
                player.join(30)
                assert not player.is_alive(), "a thread waits for ever"
            for player in players:
                if player.plan.is_comparable and player.stream is not None and not player.is_refused:
                    list(player.stream) if player.stream.error is None else None
    else:
        play_in_turns(chance, engine, players)
        engine.run()
        for stream in list(engine.streams):
            stream.close(discard=True)
        engine.run()
    for player in players:
        if player.error is not None:
            raise player.error
        if not player.is_refused and player.plan.is_comparable:
            assert player.stream.is_done and player.stream.error is None
            assert said(player.stream.events) == player.plan.on_session(), player.plan.calls
    assert not engine.streams and free_pages(engine) == before == engine.pool.num_pages


def play_in_turns(chance: random.Random, engine: StreamingEngine, players: list[Player]) -> None:
    """Play plans in one thread, call by call in a random order, with steps between them."""
    waiting = [(player, list(player.plan.calls)) for player in players]
    for player in players:
        player.stream = engine.open(**player.plan.options)
    while waiting:
        index = chance.randrange(len(waiting))
        player, calls = waiting[index]
        if calls:
            try:
                player.play_call(*calls.pop(0))
            except EngineFullError:
                player.is_refused = True
                calls.clear()
        else:
            del waiting[index]
            player.stream.interrupt() if player.plan.ending == "interrupt" else None
            if player.plan.ending != "leave":
                player.stream.close(discard=player.plan.ending == "discard")
        for _ in range(chance.choice([0, 0, 1, 3])):
            engine.step()


@given(seed=SEEDS)
def test_streams_say_what_sessions_say_and_leave_no_memory(request, engine, tmp_path_factory, seed):
    run_case(request, "schedule", seed, try_schedule, engine, tmp_path_factory.getbasetemp() / "saved streams")
