# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A stream of an engine: frames that arrive too fast, questions that interrupt, and calls during a step."""

import sys
import threading
import time as clock

import pytest
import torch
from engines import LIMITS, NARRATE, embedded, tiny_engine
from tiny import random_frames
from transformers.generation.streamers import BaseStreamer

from videollm_mod import TooManyWaitingError
from videollm_mod.serving import StreamingEngine
from videollm_mod.serving.step import PackedStep
from videollm_mod.serving.telling import Teller


@pytest.fixture(scope="module")
def trained():
    return embedded()


def test_frames_and_words_share_steps_and_a_question_interrupts(trained):
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=2, **LIMITS)
    speaking, watching = engine.open(), engine.open()
    speaking.push(frames[:4])
    speaking.ask("What do you see?")
    watching.ask(NARRATE, reply_now=False)
    while not speaking.session.events:
        engine.step()
    for _ in range(3):
        engine.step()
    speaking.push(frames[4:8])
    before = engine.stats.mixed_steps
    watching.push(frames[:2])
    engine.step()
    assert engine.stats.mixed_steps == before + 1
    speaking.ask("How many things do you see?", interrupt=True)
    engine.run()
    question, cut, second, answer = speaking.events[:4]
    # There is a latency for each frame, also for frames that were seen together.
    assert len(engine.stats.frame_latencies) == 4 + 2 + 4
    whole = model.stream(processor, **LIMITS)
    whole.push(frames[:4])
    whole_answer = whole.ask("What do you see?")[1]
    assert cut.interrupted and not answer.interrupted and not question.interrupted
    assert 0 < len(cut.token_ids) < len(whole_answer.token_ids)
    assert whole_answer.token_ids[: len(cut.token_ids)] == cut.token_ids
    # The question came before the frames that waited, and these are seen later.
    assert (second.text, second.frame, second.time) == ("How many things do you see?", 3, 1.5)
    assert (answer.role, answer.frame) == ("assistant", 3) and speaking.session.num_frames == 8
    assert len(engine.stats.first_word_latencies) == sum(
        event.role == "assistant" for stream in (speaking, watching) for event in stream.events
    )
    assert min(engine.stats.first_word_latencies) > 0 and len(engine.stats.frame_latencies) > 0


@pytest.mark.parametrize("cut", [0, 1])
def test_the_answer_to_one_question_is_cut_short_and_no_other(cut):
    engine = tiny_engine()
    stream = engine.open(speak=lambda _: False)
    stream.push(random_frames(1))
    questions = [stream.ask("a"), stream.ask("b")]
    while stream.session.answering is not questions[1]:
        engine.step()
    stream.interrupt(question=questions[cut])
    engine.run()
    replies = [event for event in stream.events if event.role == "assistant"]
    assert [reply.interrupted for reply in replies] == [False, cut == 1]


def test_a_streamer_may_interrupt_a_session(trained):
    """Without an engine: a question asked during `push` comes when the reply is cut."""
    model, processor, frames = trained

    class Impatient:
        count = 0

        def put(self, _tokens):
            self.count += 1
            if self.count == 2:
                assert session.ask("How many things do you see?", interrupt=True) == []

        def end(self):
            pass

    session = model.stream(processor, streamer=Impatient())
    session.push(frames[:4])
    events = session.ask("What do you see?")
    assert [event.role for event in events] == ["user", "assistant"] * 2
    assert events[1].interrupted and len(events[1].token_ids) == 2 and not events[3].interrupted
    with pytest.raises(ValueError, match="leave `time` out"):
        session.ask("Now?", time=2.0, interrupt=True)


def test_questions_that_interrupt_are_answered_in_their_order(trained):
    """The second does not cut the first answer short, because it was asked before that answer began."""
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS)
    stream = engine.open()
    stream.push(frames[:4])
    engine.run()
    for text in ("What do you see?", "How many things do you see?"):
        stream.ask(text, interrupt=True)
    engine.run()
    assert [event.text for event in stream.events if event.role == "user"][-2:] == [
        "What do you see?",
        "How many things do you see?",
    ]
    assert [event.role for event in stream.events[-4:]] == ["user", "assistant"] * 2
    assert not any(event.interrupted for event in stream.events)


def test_a_reply_that_would_be_cut_at_once_does_not_start(trained):
    model, processor, frames = trained
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS)
    stream = engine.open(interval_threshold=1.0)  # speaks at every frame
    stream.push(frames[:1])
    batch = engine._choose_batch() or (engine._encode(), engine._choose_batch())[1]
    stream.ask("What do you see?", interrupt=True)
    engine._give(stream, engine.runner.execute([stream.session.cache], [batch[0][1]])[0])
    engine.run()
    assert [event.role for event in stream.events] == ["user", "assistant"]


def test_frames_that_come_too_fast_wait_or_are_dropped_and_counted():
    engine = tiny_engine(max_streams=2)
    patient, hasty = engine.open(max_new_tokens=2), engine.open(when_behind="drop_oldest", max_waiting=3)
    for stream in (patient, hasty):
        stream.push(random_frames(10), time=range(10))
    assert (patient.num_waiting, patient.num_dropped) == (10, 0)
    assert (hasty.num_waiting, hasty.num_dropped, engine.stats.dropped) == (3, 7, 7)
    engine.run()
    assert (patient.session.num_frames, patient.session.time) == (10, 9)
    assert (hasty.session.num_frames, hasty.session.time) == (3, 9)


def test_frames_beyond_max_waiting_are_refused_and_nothing_is_lost():
    engine = tiny_engine(max_streams=2)
    stream, other = engine.open(max_new_tokens=2, max_waiting=8), engine.open()
    assert (stream.max_waiting, other.max_waiting) == (8, 512)
    with pytest.raises(TooManyWaitingError, match="9 frames at once, but `max_waiting` is 8"):
        stream.push(random_frames(9))
    assert stream.num_waiting == 0
    stream.push(random_frames(8))
    with pytest.raises(TooManyWaitingError, match="8 frames of this stream wait, and its `max_waiting` is 8"):
        stream.push(random_frames(1))
    # A frame must not keep the memory of all frames of its call.
    frames = [received.pixels for received in stream._received]
    assert all(frame.untyped_storage().nbytes() == frame.nbytes for frame in frames)
    other.push(random_frames(9))
    engine.run()
    stream.push(random_frames(1))
    engine.run()
    # Refused frames leave no trace: nine frames at 2 fps end at 4 s.
    assert (stream.session.num_frames, stream.session.time, stream.num_dropped) == (9, 4.0, 0)
    assert [tiny_engine(when_behind=kind).open().max_waiting for kind in ("drop_oldest", "block")] == [16, 16]


@pytest.mark.parametrize("size", [(32, 32), (270, 480)])
def test_a_waiting_frame_takes_one_byte_per_channel_and_pixel(size):
    engine = tiny_engine(max_streams=1)
    stream = engine.open()
    stream.push(random_frames(4, size=size))
    stream.push(list(random_frames(4, size=size)))
    for received in stream._received:
        assert received.pixels.dtype == torch.uint8 and received.pixels.shape == (3, 32, 32)
        assert received.pixels.untyped_storage().nbytes() == 32 * 32 * 3


def test_a_frame_that_the_model_cannot_take_ends_no_stream():
    with tiny_engine(max_streams=2) as engine:
        engine.processor.video_processor.do_resize = False  # the cameras have the model's size
        good, bad = (engine.open(max_new_tokens=2) for _ in range(2))
        good.push(random_frames(2))
        for size, message in (((40, 40), "must be 32 x 32 pixels, got 40 x 40"), ((32, 32, 1), "must be .* RGB")):
            with pytest.raises(ValueError, match=message):
                bad.push(random_frames(1, size=size))
        for stream in (good, bad):
            stream.push(random_frames(1))
            stream.close()
            list(stream)
        assert [stream.session.num_frames for stream in (good, bad)] == [3, 1]
        engine.open()


def test_push_waits_if_the_policy_is_block():
    engine = tiny_engine(max_streams=1, when_behind="block", max_waiting=2)
    stream = engine.open(max_new_tokens=2)
    stream.push(random_frames(9))
    assert stream.num_waiting <= 2 and stream.session.num_frames >= 7 and stream.num_dropped == 0
    engine.run()
    assert stream.session.num_frames == 9


def test_frames_and_questions_are_accepted_during_a_step(monkeypatch):
    during, resume, forward = threading.Event(), threading.Event(), PackedStep.forward

    def slow(step):
        during.set()
        assert resume.wait(timeout=60)
        return forward(step)

    monkeypatch.setattr(PackedStep, "forward", slow)
    with tiny_engine(max_streams=2) as engine:
        first, second = (engine.open(max_new_tokens=2) for _ in range(2))
        first.push(random_frames(1))
        assert during.wait(timeout=60)

        def more():
            for stream in (first, second):
                stream.push(random_frames(3))
                stream.ask("What is there?")

        pushing = threading.Thread(target=more)
        pushing.start()
        pushing.join(timeout=60)
        has_returned = not pushing.is_alive()
        waiting = (first.num_waiting, second.num_waiting)
        resume.set()
        for stream in (first, second):
            stream.close()
        for stream in (first, second):
            list(stream)
    assert has_returned and waiting == (4, 3)
    assert (first.session.num_frames, second.session.num_frames) == (4, 3)


class Calls:
    """A streamer that calls a function at the second token."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def put(self, _tokens):
        self.count += 1
        if self.count == 2:
            self.function()

    def end(self):
        pass


@pytest.mark.parametrize("policy", ["catch_up", "drop_oldest", "block"])
def test_a_streamer_may_push_while_other_threads_push(policy):
    """The engine's thread holds its lock while it calls the streamer."""
    pushed = []

    def push():
        try:
            stream.push(random_frames(1))
        except TooManyWaitingError as error:
            assert policy != "drop_oldest"
            pushed.append(error)
        else:
            pushed.append(None)

    def camera():
        while not pushed:
            try:
                stream.push(random_frames(1))
            except TooManyWaitingError:
                assert policy == "catch_up"

    with tiny_engine(max_streams=1, when_behind=policy, max_waiting=4) as engine:
        stream = engine.open(streamer=Calls(push), interval_threshold=1.0, max_new_tokens=30)
        cameras = [threading.Thread(target=camera, daemon=True) for _ in range(4)]
        for thread in cameras:
            thread.start()
        for thread in cameras:
            thread.join(timeout=60)
        assert len(pushed) == 1 and not any(thread.is_alive() for thread in cameras)
        assert stream.error is None


@pytest.mark.parametrize("is_running", [False, True])
def test_a_streamer_may_ask_close_and_open(is_running):
    opened = []

    def call():
        stream.ask("What is there?")
        stream.close()
        opened.append(engine.open(max_new_tokens=2))
        opened[0].push(random_frames(1))

    engine = tiny_engine(max_streams=2)
    stream = engine.open(streamer=Calls(call), interval_threshold=1.0, max_new_tokens=3)
    if is_running:
        with engine:
            stream.push(random_frames(1))
            events = list(stream)
            opened[0].close()
            list(opened[0])
    else:
        stream.push(random_frames(1))
        events = list(stream)
        engine.run()
    assert [event.role for event in events] == ["assistant", "user", "assistant"]
    assert stream.error is None and opened[0].session.num_frames == 1


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _engine, stream: list(stream), "cannot (wait for events|run a step) of the engine that calls it"),
        (lambda engine, _stream: engine.step(), "cannot run a step of the engine that calls it"),
        (lambda _engine, stream: stream.push(random_frames(3)), "A streamer cannot wait for the engine"),
    ],
)
def test_a_streamer_cannot_wait_for_its_engine(call, message, is_running):
    engine = tiny_engine(max_streams=1, when_behind="block", max_waiting=2)
    stream = engine.open(streamer=Calls(lambda: call(engine, stream)), interval_threshold=1.0, max_new_tokens=4)
    if is_running:
        with engine, pytest.raises(RuntimeError, match=message):
            stream.push(random_frames(1))
            list(stream)
    else:
        stream.push(random_frames(1))
        with pytest.raises(RuntimeError, match=message):
            list(stream)
    assert stream.error is not None


def test_the_time_of_a_question_is_a_number():
    stream = tiny_engine(max_streams=1).open()
    with pytest.raises(ValueError, match="could not convert"):
        stream.ask("What is there?", time="now")


def test_a_question_can_be_withdrawn_and_a_reply_asked_for_without_one():
    """Without a text the model says what it would answer if the text had been heard before."""
    model, processor, frames = embedded()
    session = model.stream(processor, speak=lambda _: False)
    session.push(frames[:4])
    expected = session.fork().ask("How many things do you see?")[-1]
    session.ask("How many things do you see?", reply_now=False)
    question = session.hear(None)
    assert session.withdraw(question) and not session.withdraw(question)
    session.hear(None)
    assert session.close()[-1].token_ids == expected.token_ids
    with pytest.raises(ValueError, match="closed"):
        session.hear(None)


def test_a_reply_is_cut_short_and_speaking_changes():
    model, processor, frames = embedded()
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS)

    class Interrupting(BaseStreamer):
        def put(self, _):
            stream.interrupt()

        def end(self):
            pass

    stream = engine.open(streamer=Interrupting())
    stream.ask(NARRATE, reply_now=False)
    stream.push(frames[:2])
    event = engine.run()[-1][1]
    assert event.interrupted and event.text == "A" and len(event.token_ids) == 1
    stream.set_speaking(speak="every", every=1.0, max_words=2)
    stream.push(frames[2:4])
    assert [(event.time, event.role) for _, event in engine.run()] == [(1.5, "assistant")]  # a second of silence
    with pytest.raises(ValueError, match="`speak` is"):
        stream.set_speaking(speak="loudly")
    assert stream.session.speak == "every"


def test_closing_can_discard_what_waits():
    engine = tiny_engine(max_streams=1)
    stream = engine.open(speak=lambda _: False)
    stream.push(random_frames(4))
    stream.ask("Why?")
    stream.close(discard=True)
    assert engine.run() == [] and stream.is_done and stream.session.num_frames == 0
    engine.open()


def test_a_function_that_discards_its_stream_ends_it():
    engine = tiny_engine(max_streams=1)
    seen = []

    def speak(frame):
        seen.append(frame.time)
        stream.close(discard=True)
        return True

    stream = engine.open(speak=speak)
    stream.push(random_frames(3))
    engine.run()
    assert seen == [0.0] and stream.is_done and stream.error is None and stream.session.num_waiting == 0


def test_frames_that_no_tick_sees_do_not_wait():
    engine = tiny_engine(max_streams=2)
    stream = engine.open(fps=2, source_fps=30, max_waiting=2, when_behind="catch_up")
    stream.push(random_frames(30))
    assert stream.num_waiting == 2
    with pytest.raises(TooManyWaitingError, match="2 frames of this stream wait"):
        stream.push(random_frames(1))
    slow = engine.open(fps=30, source_fps=2, max_waiting=16)
    with pytest.raises(TooManyWaitingError, match="Got 30 frames at once"):
        slow.push(random_frames(2))
    assert slow.num_waiting == 0


def test_frames_may_come_as_an_iterator():
    engine = tiny_engine(max_streams=1)
    stream = engine.open()
    stream.push(iter(random_frames(3)))
    assert stream.num_waiting == 3


def test_what_is_told_of_a_step_cannot_wait_for_the_next():
    """`on_step` runs in the engine's thread, so a full stream would never get room."""
    errors = []

    def on_step(_said):
        if not errors:
            for call in (lambda: list(stream), lambda: [stream.push(random_frames(1)) for _ in range(4)]):
                with pytest.raises((RuntimeError, TooManyWaitingError)) as error:
                    call()
                errors.append(str(error.value))
            told.set()

    engine, told = tiny_engine(max_streams=1, when_behind="block", max_waiting=2), threading.Event()
    engine.on_step = on_step
    stream = engine.open(speak=lambda _: False)
    with engine:
        stream.push(random_frames(1))
        assert told.wait(30)
    assert "cannot wait for events" in errors[0] and "A streamer cannot wait" in errors[1]


def test_what_a_stream_did_is_told_while_a_client_asks():
    """A client takes its questions back as fast as it can. The thread that tells must not fail."""
    engine, before = tiny_engine(max_streams=1), sys.getswitchinterval()
    teller, is_over = Teller(engine.processor.tokenizer), threading.Event()
    stream = engine.open(streamer=teller, speak=lambda _: False)
    stream.session.answers_early, teller.session = True, stream.session

    def ask():
        while not is_over.is_set():
            for question in [stream.ask("Why?", reply_now=False) for _ in range(3)]:
                stream.withdraw(question)

    client = threading.Thread(target=ask)
    sys.setswitchinterval(1e-6)
    try:
        client.start()
        end = clock.monotonic() + 1
        while clock.monotonic() < end:
            teller.take(stream, ())
    finally:
        is_over.set()
        client.join()
        sys.setswitchinterval(before)
