# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""When a session speaks without having learned it, and questions that leave no trace."""

import pytest
import torch
from engines import said, tiny_engine
from tiny import random_frames, tiny_model, tiny_processor, tiny_tokenizer
from torch.testing import assert_close

from videollm_mod.speaking_videollm_mod import Probe


ROUTED = {"mod_layers": "interleaved"}
WATCH = {"system_prompt": "Watch.", "max_new_tokens": 4, "interval_threshold": 0.004}
ASKED = "Is there a ball?"


# ------------------------------------------------------------------------------------------------------------- probes


def probability_by_one_forward(model, processor, frames, dialogue):
    """Return P(Yes) against P(No) after a dialogue, by one forward without a cache and by the words' first tokens."""
    tokenizer = processor.tokenizer
    ids = processor.apply_chat_template(dialogue, tokenize=True, add_generation_prompt=True)
    with torch.no_grad():
        features = model.encode_frames(processor.normalize_frames(processor.resize_frames(frames, model.device)))
        logits = model(input_ids=torch.tensor([ids]), frame_features=features[None]).logits[0, -1].double()
    first = [
        {tokenizer.encode(x)[0] for x in words}
        for words in (("Yes", " Yes", "yes", " yes"), ("No", " No", "no", " no"))
    ]
    yes, no = (logits[sorted(mine - other)].exp().sum() for mine, other in (first, first[::-1]))
    return float(yes / (yes + no))


@pytest.mark.parametrize("options", [{}, ROUTED, {"mod_keep_ratio": 1.0}])
def test_a_probe_equals_one_forward_over_the_dialogue(options):
    model, processor, frames = tiny_model(**options), tiny_processor(), random_frames(5)
    session = model.stream(processor, system_prompt="Watch.", interval_threshold=0.0, chunk_frames=2)
    model.should_speak = lambda logits, _: (torch.zeros(len(logits), dtype=torch.bool), torch.ones(len(logits)))
    session.push(frames[:3])
    watched = [{"role": "system", "content": "Watch."}, {"role": "stream", "num_frames": 3}]
    question = {"role": "user", "content": ASKED}
    expected = probability_by_one_forward(model, processor, frames[:3], [*watched, question])
    assert session.probe(ASKED) == pytest.approx(expected, abs=1e-5)
    assert session.probe(ASKED, answers=("No", "Yes")) == pytest.approx(1 - expected, abs=1e-5)
    # What the user said and the model has not read yet is part of the dialogue, and stays unread.
    session.ask("Look closely.", reply_now=False)
    told = {"role": "user", "content": "Look closely."}
    expected = probability_by_one_forward(model, processor, frames[:3], [*watched, told, question])
    assert session.probe(ASKED) == pytest.approx(expected, abs=1e-5)
    session.push(frames[3:])
    later = {"role": "stream", "num_frames": 2}
    expected = probability_by_one_forward(model, processor, frames, [*watched, told, later, question])
    assert session.probe(ASKED) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_frames": 6, "max_text_tokens": 40}])
def test_nothing_of_a_probe_stays(options):
    """The stream is evicted from, speaks and is asked; probes come between all frames, after replies and questions."""
    model, processor, frames = tiny_model(**ROUTED), tiny_processor(), random_frames(12)

    def watch(probes):
        session, lengths = model.stream(processor, **WATCH, **options), []
        for index, frame in enumerate(frames):
            session.push(frame)
            if index == 4:
                session.ask("What is it?")
            if index == 7:
                session.ask("Say more.", reply_now=False)
            before = session.cache.lengths, list(session.events), session.num_remembered
            values = {session.probe(ASKED) for _ in range(probes)}
            assert (session.cache.lengths, session.events, session.num_remembered) == before and len(values) <= 1
            lengths.append((before[0], int(session.cache.next_position)))
        return said(session.events), lengths, [layer.keys for layer in session.cache.layers]

    (events, lengths, keys), (probed_events, probed_lengths, probed_keys) = watch(0), watch(2)
    assert probed_events == events and len(events) > 4
    assert probed_lengths == lengths
    for mine, theirs in zip(probed_keys, keys, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("capture", [False, True])
def test_an_engine_probes_what_was_pushed_by_then(capture):
    """Streams of an engine share steps with probes, and give what sessions give."""
    engine, frames = tiny_engine(capture=capture), random_frames(6)
    streams = [engine.open(**WATCH) for _ in range(2)]
    found = []
    for stream, own in zip(streams, (frames, frames[::-1]), strict=True):
        stream.push(own[:3])
        stream.ask("What is it?")
    for stream in streams:
        found.append(stream.probe(ASKED))
    streams[0].push(frames[3:])
    with engine:
        found.append(streams[0].probe(ASKED))
    sessions = [engine.model.stream(engine.processor, max_frames=12, max_text_tokens=160, **WATCH) for _ in range(2)]
    expected = []
    for session, own in zip(sessions, (frames, frames[::-1]), strict=True):
        session.push(own[:3])
        session.ask("What is it?")
        expected.append(session.probe(ASKED))
    sessions[0].push(frames[3:])
    expected.append(sessions[0].probe(ASKED))
    assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)
    assert len(set(found)) == 3
    for stream, session in zip(streams, sessions, strict=True):
        assert said(stream.events) == said(session.events)


def test_a_stream_that_ends_before_the_answer_says_so():
    engine = tiny_engine()
    stream = engine.open()
    stream.push(random_frames(1))
    engine.execute = engine._run_steps = None  # every step fails
    with pytest.raises(RuntimeError, match="ended before the answer"):
        stream.probe(ASKED)


@pytest.mark.parametrize(
    ("question", "answers", "message"),
    [
        (" ", ("Yes", "No"), "not empty"),
        ("Is it?", ("Yes", "Yes"), "must begin with different tokens"),
        ("Is it?", "Yes", "two texts"),
        ("Is it?", ("Yes", 1), "must be a text"),
        ("Is it?", ("Yes", ""), "must begin with different tokens"),
    ],
)
def test_a_probe_refuses(question, answers, message):
    with pytest.raises(ValueError, match=message):
        Probe(tiny_tokenizer(), question, answers)


def test_a_probe_needs_a_frame_and_an_open_session():
    session = tiny_model().stream(tiny_processor())
    with pytest.raises(ValueError, match="no frame to answer from"):
        session.probe(ASKED)
    session.push(random_frames(1))
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.probe(ASKED)
