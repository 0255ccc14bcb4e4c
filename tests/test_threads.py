# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Many threads at once on engines, streams, sessions and folders: short random schedules with invariants.

Threads switch every microsecond. If they wait for each other, the test ends and prints where each stands.
"""

import gc
import random
import shutil
import sys
import threading
import time as clock
import traceback
from contextlib import suppress
from itertools import count, takewhile

import pytest
from engines import said, tiny_engine
from tiny import random_frames, tiny_model, tiny_processor

from videollm_mod.reading_ahead_videollm_mod import TooManyWaitingError
from videollm_mod.serving import restore_session, stream
from videollm_mod.serving.state_folder import StateFolder


SECONDS = 120
FRAMES = random_frames(40)
# A full engine or queue, a stream that is closed, has ended or has no frame yet, and a folder that is still empty.
REFUSALS = (RuntimeError, TooManyWaitingError, ValueError, FileNotFoundError)
# A model that speaks now and then, a few words each time.
SPEAKS = {"max_new_tokens": 3, "interval_threshold": 0.004}


@pytest.fixture(autouse=True)
def many_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*works):
    """Run each work in a thread. Raise the first error of a work. If they do not end, print where all threads are."""
    errors = []

    def guard(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(work,), daemon=True) for work in works]
    end = clock.monotonic() + SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - clock.monotonic()))
    if any(thread.is_alive() for thread in threads):
        stacks = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            sys.stderr.write(f"{stacks.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}\n")
        pytest.fail(f"{sum(thread.is_alive() for thread in threads)} threads still wait after {SECONDS} s.")
    if errors:
        raise errors[0]


def test_threads_that_wait_for_each_other_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.2)
    never = threading.Event()
    with pytest.raises(pytest.fail.Exception, match="1 threads still wait after 0.2 s"):
        together(never.wait, lambda: None)
    assert "in wait" in capsys.readouterr().err
    never.set()
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0)


# ------------------------------------------------------------------------------------------------------------- engines


def show(session, begin, count):
    """Show frames to a stream or session, and ask after every fifth."""
    for index in range(begin, begin + count):
        session.push(FRAMES[index], time=index / 2)
        if index % 5 == 3:
            session.ask("What color is the ball?")


def go_on(session, count):
    """Show a restored session what comes after it was saved."""
    session._run()
    seen = 0 if session._received_time is None else round(2 * session._received_time) + 1
    asked = sum(event.role == "user" for event in session.events)
    if asked < sum(index % 5 == 3 for index in range(seen)):  # saved between a frame and its question
        session.ask("What color is the ball?")
    show(session, seen, count - seen)
    session.close()
    return said(session.events)


def check_all_free(engine):
    """All streams have ended, and each page is free once."""
    assert engine.streams == []
    gc.collect()
    assert engine.pool.free == {kind: list(range(count)) for kind, count in engine.pool.num_pages.items()}


@pytest.mark.parametrize("seed", range(3))
def test_streams_say_the_same_while_others_save_probe_and_read_them(seed, tmp_path):
    """One thread shows a stream its frames. Others do what leaves no trace in it."""
    chance, count = random.Random(seed), 10
    model, processor = tiny_model(mod_router="change"), tiny_processor()
    alone = model.stream(processor, max_frames=12, max_text_tokens=160, **SPEAKS)
    show(alone, 0, count)
    alone.close()
    expected = said(alone.events)
    engine = tiny_engine(router="change", max_streams=3)
    over, folders = threading.Event(), []

    def own(watched):
        show(watched, 0, count)
        watched.close()
        assert said(watched) == expected
        over.set()

    def disturb(watched, number):
        while not over.is_set():
            with suppress(ValueError, RuntimeError):  # before the first frame, and after the end
                folder = tmp_path / f"{number}-{len(folders)}"
                what = chance.choice(["save", "probe", "read", "withdraw"])
                if what == "save":
                    watched.save(folder)
                    folders.append(folder)
                elif what == "probe":
                    assert 0 <= watched.probe("Is it red?") <= 1
                elif what == "withdraw":
                    assert not watched.withdraw(object())
                else:
                    assert watched.num_waiting >= 0 and watched.session.num_remembered <= 12
            clock.sleep(chance.random() / 50)

    with engine:
        streams = [engine.open(when_behind="block", max_waiting=4, **SPEAKS) for _ in range(2)]
        works = [lambda watched=watched: own(watched) for watched in streams]
        works += [lambda number=number: disturb(streams[number % 2], number) for number in range(3)]
        together(*works)
        assert engine.is_running
        check_all_free(engine)
    for folder in chance.sample(folders, min(2, len(folders))):
        assert go_on(restore_session(model, processor, folder), count) == expected


@pytest.mark.parametrize("seed", range(10))
def test_random_schedules_of_threads_on_shared_streams(seed, tmp_path):
    """All threads do anything to all streams. Every frame is seen, dropped or refused, and the memory comes back."""
    engine, lock = tiny_engine(max_streams=3, max_waiting=5), threading.Lock()
    streams, accepted, discarded = [], {}, set()

    def do(chance):
        with lock:
            watched = chance.choice(streams) if streams and chance.random() < 0.9 else None
        if watched is None:
            how = {"when_behind": chance.choice(["catch_up", "drop_oldest", "block"]), **SPEAKS}
            watched = engine.open(**how, max_frames=chance.choice([4, 12]), reuse_static=chance.choice([None, 3]))
            with lock:
                streams.append(watched)
                accepted[watched] = 0
        rare = ["interrupt", "save", "probe", "restore", "set", "close"]
        what = chance.choice(["push"] * 6 + ["ask"] * 4 + rare)
        if what == "push":
            some = FRAMES[: chance.randint(1, 3)]
            watched.push(some)
            with lock:
                accepted[watched] += len(some)
        elif what == "ask":
            asked = watched.ask("What?", interrupt=chance.random() < 0.3, reply_now=chance.random() < 0.7)
            if chance.random() < 0.2:
                watched.withdraw(asked)
        elif what == "save":
            watched.save(tmp_path / str(chance.randrange(3)))
        elif what == "probe":
            watched.probe("Is it red?")
        elif what == "restore":
            engine.restore(tmp_path / str(chance.randrange(3))).close(discard=True)
        elif what == "set":
            watched.set_speaking(speak="every", every=chance.choice([1.0, 3.0]))
        elif what == "close":
            discard = chance.random() < 0.5
            if discard:
                discarded.add(watched)
            watched.close(discard=discard)
        else:
            watched.interrupt()

    def work(number):
        chance = random.Random(100 * seed + number)
        for _ in range(12):
            with suppress(*REFUSALS):
                do(chance)

    with engine:
        together(*(lambda number=number: work(number) for number in range(4)))
        for watched in streams:
            watched.close()
        together(*(lambda watched=watched: drain(watched) for watched in streams))
        assert engine.is_running
        check_all_free(engine)
    for watched in streams:
        frames = [event.frame for event in watched.events]
        assert watched.is_done and watched.num_waiting == 0 and frames == sorted(frames)
        seen = watched.session.num_frames + watched.num_dropped
        if watched.error is None:
            assert seen == accepted[watched] or watched in discarded and seen < accepted[watched]


def drain(watched):
    try:
        list(watched)
    except RuntimeError:
        # A schedule without new frames can outgrow its memory. Nothing else may go wrong.
        assert "outgrown" in str(watched.error), watched.error


def test_two_saves_at_once_leave_the_stream_where_each_saved_it(tmp_path, monkeypatch):
    """The first save ends while the second still writes: the stream must not go on before the second has ended."""
    engine, write, reached = tiny_engine(), stream.write, {"first": threading.Event(), "second": threading.Event()}
    watched = engine.open(**SPEAKS)
    show(watched, 0, 9)
    over = threading.Event()

    def write_slowly(saved, model, folder):
        reached[folder.name].set()
        # The first waits for the second to write, and the second for the end of the first.
        assert (reached["second"] if folder.name == "first" else over).wait(SECONDS)
        if folder.name == "second":
            engine.run()  # somebody else runs steps
        write(saved, model, folder)

    def save_first():
        watched.save(tmp_path / "first")
        over.set()

    def save_second():
        assert reached["first"].wait(SECONDS)
        watched.save(tmp_path / "second", close=True)

    monkeypatch.setattr(stream, "write", write_slowly)
    together(save_first, save_second)
    engine.run()
    heard = said(watched.events)
    restored = restore_session(engine.model, engine.processor, tmp_path / "second")
    assert said(restored.events) == heard and len(restored._waiting) == 9


def test_a_paused_stream_that_is_saved_stays_paused(tmp_path):
    engine = tiny_engine()
    watched = engine.open(**SPEAKS)
    show(watched, 0, 4)
    watched.save(tmp_path / "a")
    watched.close(discard=True)
    restored = engine.restore(tmp_path / "a", pause=True)
    restored.save(tmp_path / "b")
    assert engine.run() == [] and restored.num_waiting == 4
    restored.resume()
    assert len(engine.run()) > 0 and restored.num_waiting == 0


def test_threads_save_into_one_folder(tmp_path):
    """Each save replaces another, and the folder always holds a complete one in the end."""
    engine = tiny_engine(max_streams=4)
    streams = [engine.open(**SPEAKS) for _ in range(4)]
    for number, watched in enumerate(streams):
        show(watched, 0, number + 1)
    engine.run()

    def save(watched):
        for _ in range(4):
            watched.save(tmp_path / "saved")

    together(*(lambda watched=watched: save(watched) for watched in streams))
    restored = restore_session(engine.model, engine.processor, tmp_path / "saved")
    assert restored.num_frames in (1, 2, 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# ------------------------------------------------------------------------------------------------------------ sessions


def test_sessions_and_forks_of_one_model_in_threads():
    """Sessions share the model, the processor and the tokens that a fork has inherited."""
    model, processor = tiny_model(), tiny_processor()
    session = model.stream(processor, max_frames=8, max_text_tokens=100, **SPEAKS)
    show(session, 0, 5)
    alone = session.fork()
    show(alone, 5, 8)
    heard = {}

    def watch(number):
        fork = session.fork()
        show(fork, 5, 8)
        heard[number] = said(fork.events)

    together(*(lambda number=number: watch(number) for number in range(4)))
    assert len(session.events) < len(alone.events)
    assert heard == dict.fromkeys(range(4), said(alone.events))


# ------------------------------------------------------------------------------------------------------ saved sessions


def test_servers_that_share_a_folder_take_each_session_once_and_complete(tmp_path):
    """Some commit, some take, and one is always short of room. Each object stands for a server."""
    servers = [StateFolder(tmp_path, 40_000) for _ in range(4)]
    taken, lock, committing = [], threading.Lock(), {0, 1}

    def commit(server, number):
        try:
            for index in range(25):
                place = server.begin()
                for name in ("a", "b", "c"):
                    (place / name).write_bytes(bytes([number]) * 1000)
                server.commit(place, f"secret {index % 5}", clock.time() + 60)
        finally:
            committing.discard(number)

    def take(server):
        # On a busy machine, nothing is committed for a while.
        for index in takewhile(lambda index: index < 100 or committing, count()):
            place = server.take(f"secret {index % 5}")
            if place is None:
                continue
            with lock:
                taken.append(place)
            content = {(place / name).read_bytes() for name in ("a", "b", "c")}
            assert len(content) == 1 and len(content.pop()) == 1000
            server.discard(place)

    works = [lambda number=number: commit(servers[number], number) for number in range(2)]
    together(*works, *(lambda server=server: take(server) for server in servers[2:]))
    assert taken and len(set(taken)) == len(taken)
    # A file for each server shows that it lives.
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".server-")]
    assert len(left) <= 5 and not any(name.startswith(".") for name in left)


def test_a_session_is_removed_all_at_once(tmp_path, monkeypatch):
    """One server removes a session while another takes it: it is taken complete, or not at all."""
    folder = StateFolder(tmp_path, 10**6)
    place = folder.begin()
    (place / "a").write_bytes(b"a")
    folder.commit(place, "secret", clock.time() + 60)
    remove, found = shutil.rmtree, []

    def remove_slowly(path, **options):
        found.append(folder.take("secret"))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_slowly)
    folder.discard(folder._places_of("secret")[-1])
    assert found == [None] and list(tmp_path.iterdir()) == []
