# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Streaming: every branch of the loop with scripted logits, and the real model however frames are pushed."""

import inspect
import itertools
import json
import threading
import time
import weakref
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import (
    ROOT,
    SCHEMES,
    WithoutFloat64,
    choose_kept,
    gate_of,
    random_frames,
    tiny_config,
    tiny_model,
    tiny_processor,
    write_clip,
    write_noisy_clip,
)
from torch.testing import assert_close
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor, TextIteratorStreamer, TorchAoConfig
from transformers.generation.streamers import BaseStreamer

from videollm_mod import (
    StreamEvent,
    StreamingSession,
    VideoLLMMoDForConditionalGeneration,
    VideoLLMMoDProcessor,
    cache_videollm_mod,
    generation_videollm_mod,
    processing_videollm_mod,
    read_video,
    streaming_videollm_mod,
)
from videollm_mod.generation_videollm_mod import DEFAULT_QUERY
from videollm_mod.serving import StreamingEngine
from videollm_mod.train.data.timed_messages import NARRATE


SYSTEM = "Watch."
FRAME = "<v>" * 10


class Scripted(VideoLLMMoDForConditionalGeneration):
    """
    The real model with its real cache, but with scripted logits.

    `silence` is the interval token's probability at each frame, and the token `instead` has the rest. `replies` are
    said in order in the assistant's turns. `fed` holds the tokens that the model was fed.
    """

    def script(self, processor, silence, replies, instead="]\n"):
        self.tokenizer = processor.tokenizer
        self.silence, self.replies, self.fed = silence, replies, []
        self.instead = self.tokenizer.encode(instead, add_special_tokens=False)[0]
        return self

    def forward(self, input_ids=None, cache=None, logits_to_keep=0, **kwargs):
        self.fed = self.fed[: cache.get_seq_length()] + input_ids[0].tolist()
        outputs = super().forward(input_ids=input_ids, cache=cache, **kwargs)
        keep = range(input_ids.shape[1]) if logits_to_keep is None else logits_to_keep
        places = [input_ids.shape[1] - 1] if isinstance(keep, int) else [int(place) for place in keep]
        begin = len(self.fed) - input_ids.shape[1]
        rows = [self._scores(self.fed[: begin + place + 1]) for place in places]
        outputs.logits = torch.stack(rows)[None]
        return outputs

    def _scores(self, history):
        scores = torch.full((self.config.text_config.vocab_size,), -30.0)
        frame = self.config.frame_token_id
        if history[-1] == frame:
            index = history.count(frame) // self.config.frame_num_tokens - 1
            quiet = self.config.frame_token_interval_id
            quiet = self.tokenizer.eos_token_id if quiet is None else quiet
            scores[self.instead] = torch.tensor(1 - self.silence(index)).log()
            scores[quiet] = torch.tensor(self.silence(index)).log()
            return scores
        said = self.tokenizer.decode(history).split("\nAssistant:")
        reply = self.tokenizer.encode(self.replies[len(said) - 2], add_special_tokens=False)
        done = self.tokenizer.encode(said[-1], add_special_tokens=False) if said[-1] else []
        scores[(reply + [self.tokenizer.eos_token_id])[len(done)]] = 0.0
        return scores

    @property
    def text(self):
        return self.tokenizer.decode(self.fed).replace(FRAME, "F")


def scripted(speaks_at=(), replies=(), *, processor=None, probability=0.01, instead="]\n", **options):
    processor = tiny_processor() if processor is None else processor
    options = {
        "frame_token_id": processor.frame_token_id,
        "frame_token_interval_id": processor.frame_token_interval_id,
        "text_overrides": {"vocab_size": len(processor.tokenizer) - 1},
    } | options
    torch.manual_seed(0)
    model = Scripted(tiny_config(**options)).eval()
    silence = speaks_at if callable(speaks_at) else lambda index: probability if index in speaks_at else 0.9
    return model.script(processor, silence, [f" {reply}" for reply in replies], instead), processor


def said(events):
    return [(event.time, event.role, event.text) for event in events]


def beginning():
    return f"<s>{SYSTEM}\n\n["


# ------------------------------------------------------------------------------------------------- silence and speech


@pytest.mark.parametrize("close_is_one_token", [True, False])
def test_silence(close_is_one_token):
    model, processor = scripted(processor=tiny_processor(close_is_one_token=close_is_one_token))
    session = model.stream(processor, system_prompt=SYSTEM)
    assert session.push(random_frames(3)) == []
    assert model.text == beginning() + "F,F,F"
    assert session.num_frames == 3 and session.time == 1.0
    assert session.interval_probability == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("close_is_one_token", [True, False])
@pytest.mark.parametrize("chunk_frames", [1, 2, 8])
def test_speaking_closes_the_stream_and_reopens_it(chunk_frames, close_is_one_token):
    processor = tiny_processor(close_is_one_token=close_is_one_token)
    model, processor = scripted([1, 3], ["A red ball.", "It leaves."], processor=processor)
    session = model.stream(processor, system_prompt=SYSTEM, chunk_frames=chunk_frames)
    events = session.push(random_frames(6))
    assert said(events) == [(0.5, "assistant", "A red ball."), (1.5, "assistant", "It leaves.")]
    assert model.text == beginning() + ("F,F]\nAssistant: A red ball.</s>\n[F,F]\nAssistant: It leaves.</s>\n[F,F")
    first = events[0]
    assert first.frame == 1 and first.interval_probability == pytest.approx(0.01, abs=1e-4)
    assert processor.tokenizer.decode(first.token_ids) == " A red ball."
    assert 0 < first.latency < 60 and session.frame_latency > 0


def test_the_session_feeds_the_processors_tokens():
    for close_is_one_token in (True, False):
        processor = tiny_processor(close_is_one_token=close_is_one_token)
        model, processor = scripted([1, 2], ["A red ball.", "It leaves."], processor=processor)
        session = model.stream(processor, system_prompt=SYSTEM)
        session.ask("Narrate.", reply_now=False)
        session.push(random_frames(4))
        dialogue = [
            {"role": "system", "content": SYSTEM},
            {"role": "stream", "num_frames": 1},
            {"role": "user", "content": "Narrate."},
            {"role": "stream", "num_frames": 1},
            {"role": "assistant", "content": "A red ball."},
            {"role": "stream", "num_frames": 1},
            {"role": "assistant", "content": "It leaves."},
            {"role": "stream", "num_frames": 1},
        ]
        expected = processor.apply_chat_template(dialogue, tokenize=True)
        assert model.fed == expected[: len(model.fed)]  # which ends with the bracket that is still open here
        assert processor.tokenizer.decode(expected[len(model.fed) :]) == "]"


@pytest.mark.parametrize(
    ("silence", "threshold", "speaks"), [(0.8, None, False), (0.6, None, True), (0.6, 0.5, False), (0.3, 0.2, True)]
)
def test_threshold(silence, threshold, speaks):
    model, processor = scripted(lambda _: silence, ["Yes."])
    session = model.stream(processor, system_prompt=SYSTEM, interval_threshold=threshold)
    assert bool(session.push(random_frames(1))) == speaks


@pytest.mark.parametrize("instead", ["]\n", "A", " ball", "</s>"])
def test_any_other_likely_token_opens_a_reply(instead):
    """VideoLLM-online's loop fails unless the most likely token is "]\\n" here."""
    model, processor = scripted([0], ["A red ball."], instead=instead)
    session = model.stream(processor, system_prompt=SYSTEM)
    assert said(session.push(random_frames(2))) == [(0.0, "assistant", "A red ball.")]
    assert model.text == beginning() + "F]\nAssistant: A red ball.</s>\n[F"


@pytest.mark.parametrize("limit", [1, 3])
def test_a_reply_cut_at_the_limit_still_ends_its_turn(limit):
    """VideoLLM-online's loop continues inside the unfinished turn."""
    model, processor = scripted([0], ["A red ball enters from the left."])
    whole = processor.tokenizer.encode(" A red ball enters from the left.", add_special_tokens=False)
    session = model.stream(processor, system_prompt=SYSTEM, max_new_tokens=limit)
    (event,) = session.push(random_frames(2))
    cut = processor.tokenizer.decode(whole[:limit])
    assert event.token_ids == tuple(whole[:limit]) and event.text == cut.strip()
    assert model.text == beginning() + f"F]\nAssistant:{cut}</s>\n[F"


def test_an_empty_reply_is_an_event():
    model, processor = scripted([0], [""])
    model.replies = [""]
    session = model.stream(processor, system_prompt=SYSTEM)
    (event,) = session.push(random_frames(2))
    assert event.text == "" and event.token_ids == ()
    assert model.text == beginning() + "F]\nAssistant:</s>\n[F"


def test_models_without_interval_token():
    """Frames follow each other directly, and end-of-sequence is silence."""
    processor = tiny_processor(frame_token_interval=None)
    model, processor = scripted([1], ["A ball."], processor=processor)
    session = model.stream(processor, system_prompt=SYSTEM)
    events = session.push(random_frames(4))
    assert said(events) == [(0.5, "assistant", "A ball.")]
    assert model.text == beginning() + "FF]\nAssistant: A ball.</s>\n[FF"


# ---------------------------------------------------------------------------------------------------------- questions


def test_a_question_before_a_frame_comes_before_it():
    model, processor = scripted([], ["Red."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(2))
    assert session.ask("What color?", time=0.7) == []
    events = session.push(random_frames(1))
    assert said(events) == [(0.7, "user", "What color?"), (0.7, "assistant", "Red.")]
    assert model.text == beginning() + "F,F]\nUser: What color?\nAssistant: Red.</s>\n[F"
    assert events[1].frame == 1 and events[1].interval_probability is None


def test_a_question_with_a_frames_time_replaces_what_the_model_would_say():
    model, processor = scripted([1], ["Red."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(1))
    session.ask("What color?", time=0.5)
    assert said(session.push(random_frames(2))) == [(0.5, "user", "What color?"), (0.5, "assistant", "Red.")]
    assert model.text == beginning() + "F,F]\nUser: What color?\nAssistant: Red.</s>\n[F"


def test_a_question_now_is_answered_now():
    model, processor = scripted([], ["Red."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(2))
    assert said(session.ask("What color?")) == [(0.5, "user", "What color?"), (0.5, "assistant", "Red.")]
    session.push(random_frames(1))
    assert model.text == beginning() + "F,F]\nUser: What color?\nAssistant: Red.</s>\n[F"


def test_two_questions_between_two_frames():
    """VideoLLM-online's loop loses an end-of-sequence and leaves a stray bracket."""
    model, processor = scripted([], ["Red.", "Left."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(1))
    session.ask("What color?", time=0.2)
    session.ask("Where?", time=0.3)
    events = session.push(random_frames(1))
    assert [event.text for event in events] == ["What color?", "Red.", "Where?", "Left."]
    assert model.text == beginning() + (
        "F]\nUser: What color?\nAssistant: Red.</s>\nUser: Where?\nAssistant: Left.</s>\n[F"
    )


def test_a_question_after_a_reply_cut_at_the_limit():
    model, processor = scripted([0], ["A red ball.", "Red."])
    session = model.stream(processor, system_prompt=SYSTEM, max_new_tokens=2)
    session.push(random_frames(1))
    session.ask("What color?")
    cut = processor.tokenizer.decode(processor.tokenizer.encode(" A red ball.", add_special_tokens=False)[:2])
    assert f"Assistant:{cut}</s>\nUser: What color?\nAssistant:" in model.text


def test_an_instruction_waits_for_the_model():
    model, processor = scripted([2], ["A ball."])
    session = model.stream(processor, system_prompt=SYSTEM)
    assert session.ask("Narrate.", reply_now=False) == []
    events = session.push(random_frames(4))
    assert said(events) == [(0.0, "user", "Narrate."), (1.0, "assistant", "A ball.")]
    assert model.text == beginning() + "F]\nUser: Narrate.\n[F,F]\nAssistant: A ball.</s>\n[F"


def test_questions_before_the_first_frame_belong_to_it():
    model, processor = scripted([0], ["A ball."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.hear("What?")
    events = session.push(random_frames(1), time=12.5)
    assert said(events) == [(12.5, "user", "What?"), (12.5, "assistant", "A ball.")]
    early, processor = scripted([], ["Nothing yet."])
    session = early.stream(processor, system_prompt=SYSTEM)
    session.ask("What?", time=0.0)
    assert said(session.push(random_frames(1), time=1.0)) == [
        (0.0, "user", "What?"),
        (0.0, "assistant", "Nothing yet."),
    ]
    assert early.text == f"<s>{SYSTEM}\n\nUser: What?\nAssistant: Nothing yet.</s>\n[F"


def test_close_answers_what_is_left():
    model, processor = scripted([], ["Bye."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(1))
    session.ask("Anything else?", time=99.0)
    assert said(session.close()) == [(99.0, "user", "Anything else?"), (99.0, "assistant", "Bye.")]
    assert session.close() == [] and session.closed
    for call in (lambda: session.push(random_frames(1)), lambda: session.ask("Hello?")):
        with pytest.raises(ValueError, match="session is closed"):
            call()
    without_video, processor = scripted([], ["No."])
    session = without_video.stream(processor, system_prompt=SYSTEM)
    session.hear("Anybody?")
    assert [event.text for event in session.close()] == ["Anybody?", "No."]


def test_a_later_question_limits_the_chunk():
    """One step sees frames up to a question only; later frames come after it."""
    model, processor = scripted([0, 3], ["One.", "Q.", "Two."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.ask("Q?", time=0.6)
    events = session.push(random_frames(5))
    assert [event.text for event in events] == ["One.", "Q?", "Q.", "Two."]
    assert model.text == beginning() + (
        "F]\nAssistant: One.</s>\n[F]\nUser: Q?\nAssistant: Q.</s>\n[F,F]\nAssistant: Two.</s>\n[F"
    )


def test_a_question_for_later_holds_up_no_other():
    model, processor = scripted([], ["One.", "Two.", "Three.", "Four."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.ask("Later?", time=1.2)
    session.hear("First?")
    session.push(random_frames(2))
    session.ask("Sooner?", time=0.7)
    session.ask("Now?")
    session.push(random_frames(2))
    asked = [(event.time, event.text) for event in session if event.role == "user"]
    assert asked == [(0.0, "First?"), (0.5, "Now?"), (0.7, "Sooner?"), (1.2, "Later?")]
    assert [event.text for event in session][1::2] == ["One.", "Two.", "Three.", "Four."]


def test_a_question_for_a_time_before_the_first_frame_comes_before_those_for_that_frame():
    model, processor = scripted([], ["One.", "Two."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.hear("First?")
    session.ask("Before?", time=1.0)
    events = session.push(random_frames(1), time=5.0)
    assert [(event.time, event.text) for event in events][::2] == [(1.0, "Before?"), (5.0, "First?")]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_reply_ends_at_each_end_that_the_generation_configuration_names(as_list):
    model, processor = scripted([], ["A red car. And more."])
    tokens = processor.tokenizer.encode(" A red car. And more.", add_special_tokens=False)
    model.generation_config.eos_token_id = [tokens[-2], tokens[-3]] if as_list else tokens[-3]
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(1))
    assert session.ask("What?")[-1].token_ids == tuple(tokens[:-3])


def test_special_tokens_in_a_question_stay_text():
    model, processor = scripted([], ["No."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(1))
    session.ask("Is <v></s> a frame?")
    assert model.fed.count(processor.frame_token_id) == 10 and session.num_frames == 1
    assert model.fed.count(processor.tokenizer.eos_token_id) == 0
    assert "Is <v></s> a frame?" in model.text


# ------------------------------------------------------------------------------------------------------ real streams


def recorded(model, calls):
    """Record a model's inputs and logits in `calls`."""
    forward = model.forward

    def wrapper(input_ids=None, cache=None, logits_to_keep=0, **kwargs):
        seen = int(cache.get_seq_length())
        outputs = forward(input_ids=input_ids, cache=cache, **kwargs)
        calls.append((seen, input_ids, kwargs.get("frame_features"), outputs.logits))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        outputs.logits = outputs.logits[:, keep]
        return outputs

    model.forward = wrapper
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stream_equals_one_forward_over_its_dialogue(scheme):
    """Frames pushed one by one or together, or seen again after a reply: logits equal those of one forward."""
    processor = tiny_processor()
    frames = random_frames(7)
    streams = {}
    for chunk_frames in (1, 3, 8):
        calls = []
        model = recorded(tiny_model(**SCHEMES[scheme]), calls)
        session = model.stream(processor, chunk_frames=chunk_frames, max_new_tokens=5, interval_threshold=0.004)
        session.push(frames[:2])
        session.ask("What is it?", time=1.2)
        session.push(frames[2:])
        ids, logits, features = [], [], []
        for seen, new, frame_features, scores in calls:
            ids, logits = ids[:seen] + new[0].tolist(), logits[:seen] + list(scores[0])
            kept = ids[:seen].count(model.config.frame_token_id) // 10
            features = features[:kept] + ([] if frame_features is None else list(frame_features[0]))
        streams[chunk_frames] = (ids, session.events)
        assert session.num_frames == 7 and len(features) == 7
        assert session.cache.lengths == [len(ids) - 7 * (10 - count) for count in model.config.layer_keep_counts]
        with torch.no_grad():
            model.forward = type(model).forward.__get__(model)
            whole = model(input_ids=torch.tensor([ids]), frame_features=torch.stack(features)[None]).logits[0]
        assert_close(torch.stack(logits), whole, atol=2e-5, rtol=1e-4)
    texts = [[(e.time, e.frame, e.role, e.text, e.token_ids) for e in events] for _, events in streams.values()]
    assert texts[0] == texts[1] == texts[2] and streams[1][0] == streams[3][0] == streams[8][0]


ENDLESS = {"max_frames": 6, "chunk_frames": 2, "max_new_tokens": 2}


class Held(NamedTuple):
    """A token in a cache."""

    token: int
    of_frame: tuple[torch.Tensor, int] | None  # The features of its frame, and its place there.
    number: int
    evictions: int  # How many there were before it came.


def watch_endless_stream(num_frames, *, model=None, **options):
    """
    Watch a stream with questions, by default with one layer. Return the model, the session, the tokens that its cache
    should hold, and the tokens that it should have held before each eviction.
    """
    model = model or tiny_model(text_overrides={"num_hidden_layers": 1}, mod_layers="all")
    held, before, number = [], [], itertools.count()
    forward, evict = model.forward, model.evict_tokens

    def fed(input_ids=None, cache=None, frame_features=None, **kwargs):
        del held[int(cache.get_seq_length()) :]
        features = iter([] if frame_features is None else frame_features[0])
        inside = 0
        for token in input_ids[0].tolist():
            is_frame = token == model.config.frame_token_id
            if is_frame and inside % 10 == 0:
                frame = next(features)
            held.append(Held(token, (frame, inside % 10) if is_frame else None, next(number), len(before)))
            inside = inside + 1 if is_frame else 0
        return forward(input_ids, cache=cache, frame_features=frame_features, **kwargs)

    def evicted(cache, runs):
        del held[int(cache.get_seq_length()) :]
        before.append(list(held))
        keep = [run.stays for run in runs for _ in range(run.num_tokens)]
        held[:] = [token for token, stays in zip(held, keep, strict=True) if stays]
        evict(cache, runs)

    model.forward, model.evict_tokens = fed, evicted
    # An untrained model would speak at every frame.
    model.should_speak = lambda logits, _: (torch.zeros(len(logits), dtype=torch.bool), torch.ones(len(logits)))
    session = model.stream(tiny_processor(), system_prompt=SYSTEM, **ENDLESS, **options)
    for index, frame in enumerate(random_frames(num_frames)):
        session.push(frame)
        if index % 7 == 3:
            session.ask("What?")
    model.forward = forward
    return model, session, held, before


def ids_and_features(held):
    """Return held tokens as the model's inputs."""
    features = [token.of_frame[0] for token in held if token.of_frame is not None and token.of_frame[1] == 0]
    return torch.tensor([[token.token for token in held]]), torch.stack(features)[None]


def layer_by_layer(model, times):
    """
    Return the logits after the last token, computed layer by layer without a cache. For each period between evictions
    the layer runs on all tokens held then, and the period's new tokens take its output.
    """
    inner, config = model.model, model.config
    tokens = {token.number: token for held in times for token in held}
    place = {number: index for index, number in enumerate(tokens)}
    embed = inner.get_input_embeddings()
    hidden = torch.stack(
        [
            embed(torch.tensor(token.token)) if token.of_frame is None else inner.connector(token.of_frame[0])[inside]
            for token in tokens.values()
            for inside in [token.of_frame and token.of_frame[1]]
        ]
    )
    frames = torch.tensor([place[number] for number, token in tokens.items() if token.of_frame is not None])
    frames = frames.view(-1, config.frame_num_tokens)
    for index, layer in enumerate(inner.language_model.layers):
        outputs = hidden.clone()
        runs, gate = torch.ones(len(hidden), dtype=torch.bool), torch.ones(len(hidden))
        if index in config.routed_layers:
            scores = inner.routers[str(index)](hidden[frames]).squeeze(-1)
            if config.mod_normalize_scores:
                scores = scores - scores.mean(dim=1, keepdim=True)
            kept = choose_kept(scores, config.layer_keep_counts[index], config.mod_keep_last)
            runs[frames] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
            gate[frames] = gate_of(scores, config.mod_gate)
        for evictions, held in enumerate(times):
            here = torch.tensor([place[token.number] for token in held])
            position = torch.arange(len(here))[runs[here]]
            is_new = torch.tensor([token.evictions == evictions for token in held])[runs[here]]
            here = here[runs[here]]
            turns = inner.language_model.rotary_emb(hidden, position[None])
            output = layer(hidden[here][None], attention_mask=None, position_embeddings=turns)[0]
            change = gate[here, None] * (output - hidden[here])
            outputs[here[is_new]] = (hidden[here] + change)[is_new]
        hidden = outputs
    last = hidden[place[times[-1][-1].number]]
    return model.lm_head(inner.language_model.norm(last))


EVERY_DEPTH = {
    "full": {"mod_keep_ratio": 1.0},
    "interleaved": {"mod_layers": "interleaved"},
    "all_deep": {"mod_layers": "all_deep"},
    "all": {"mod_layers": "all", "mod_gate": "sigmoid"},
}


@pytest.mark.parametrize("text", ["llama", "qwen3", "smollm3"])
@pytest.mark.parametrize("scheme", EVERY_DEPTH)
def test_after_evictions_each_layer_attends_to_kept_tokens_only(monkeypatch, scheme, text):
    monkeypatch.setattr(cache_videollm_mod, "MAX_OFFSET", 100)
    overrides = {"no_rope_layers": [1, 0, 1, 0]} if text == "smollm3" else {}
    model = tiny_model(text=text, text_overrides=overrides, **EVERY_DEPTH[scheme])
    model, session, held, before = watch_endless_stream(20, model=model, sink_frames=1)
    assert len(before) > 5 and session.cache.position_offset < 100  # positions have started again from 0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7]]), cache=session.cache).logits[0, -1]
        times = [*before, [*held, Held(7, None, -1, len(before))]]
        assert_close(logits, layer_by_layer(model, times), atol=1e-5, rtol=1e-4)
        # Logits differ from those of a model that never saw the evicted tokens: kept tokens attended to them.
        ids, features = ids_and_features(held)
        anew = model(input_ids=torch.cat([ids, torch.tensor([[7]])], dim=1), frame_features=features).logits[0, -1]
        assert not torch.allclose(logits, anew, atol=1e-2)


@pytest.mark.parametrize("most", [2**16, 70])
@pytest.mark.parametrize("sink_frames", [0, 2])
def test_after_evictions_the_cache_equals_one_of_the_kept_tokens(monkeypatch, sink_frames, most):
    monkeypatch.setattr(cache_videollm_mod, "MAX_OFFSET", most)
    model, session, held, _ = watch_endless_stream(40, sink_frames=sink_frames)
    assert session.num_frames == 40 and (session.cache.position_offset > 200) == (most > 200)
    ids, features = ids_and_features(held)
    assert features.shape[1] <= 6 and int(session.cache.get_seq_length()) == ids.shape[1]
    with torch.no_grad():
        expected = model.new_cache()
        model(input_ids=ids, frame_features=features, cache=expected)
        assert session.cache.lengths == expected.lengths
        logits = [model(input_ids=torch.tensor([[7]]), cache=c).logits for c in (session.cache, expected)]
    assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)
    text = session.processor.tokenizer.decode(ids[0]).replace(FRAME, "F")
    # All text stays and stream turns are well-formed, though some have no frames left.
    assert text.startswith("<s>Watch.") and text.count("\nUser: What?") == 6 == text.count("\nAssistant:")
    runs = [run.partition("]")[0] for run in text.split("\n[")[1:]]
    assert [len(run) for run in runs] and all(run == ",".join("F" * ((len(run) + 1) // 2)) for run in runs)
    first = torch.equal(features[0, 0], model.encode_frames(session.processor.process_frames(random_frames(40)[0]))[0])
    assert first == (sink_frames > 0)


def test_max_text_tokens_evicts_old_turns():
    _, session, held, _ = watch_endless_stream(90, max_text_tokens=60)
    texts = [piece.length for piece in session._memory.pieces if not piece.is_frame]
    _, without, _, _ = watch_endless_stream(90)
    assert sum(texts) <= 60 + max(texts) < without.cache.lengths[0]
    assert session.processor.tokenizer.decode([token.token for token in held]).startswith("<s>Watch.")
    difference = without._memory.num_text_tokens - sum(texts)
    assert session.cache.lengths[0] == without.cache.lengths[0] - difference


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic"}, {"rope_type": "longrope"}])
def test_a_session_that_could_not_evict_is_refused(rope):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 512}
    parameters = {"rope_theta": 1e4, "factor": 2.0, **rope, **(factors if rope["rope_type"] == "longrope" else {})}
    model = tiny_model(text_overrides={"rope_parameters": parameters})
    with pytest.raises(ValueError, match="leave `max_frames` out: rotary positions of type"):
        model.stream(tiny_processor(), max_frames=8)
    model.stream(tiny_processor()).push(random_frames(1))


@pytest.mark.parametrize("router", ["learned", "change"])
def test_a_session_runs_where_there_is_no_float64(router):
    session = tiny_model(mod_router=router).stream(tiny_processor(), max_frames=4, max_new_tokens=2)
    with WithoutFloat64():
        session.push(random_frames(9))
        session.ask("What?")
    assert session.num_remembered < session.num_frames == 9 and session.events[-1].role == "assistant"


def test_max_frames_changes_nothing_before_it_is_reached():
    model, processor = tiny_model(), tiny_processor()
    said = []
    for options in ({}, {"max_frames": 8, "sink_frames": 1}):
        session = model.stream(processor, max_new_tokens=3, interval_threshold=0.004, **options)
        session.push(random_frames(8))
        said.append([(e.time, e.text) for e in session])
    assert said[0] == said[1]


def test_sessions_on_one_model_are_independent():
    model, processor = tiny_model(mod_layers="all"), tiny_processor()
    videos = [random_frames(5, seed=seed) for seed in range(3)]
    options = {"max_new_tokens": 4, "interval_threshold": 0.004}
    alone = []
    for video in videos:
        session = model.stream(processor, **options)
        session.push(video)
        alone.append([(e.time, e.text) for e in session])
    sessions = [model.stream(processor, **options) for _ in videos]
    for index in range(5):
        for session, video in zip(sessions, videos, strict=True):
            session.push(video[index])
    assert [[(e.time, e.text) for e in session] for session in sessions] == alone


@pytest.mark.parametrize("router", ["learned", "change"])
def test_a_fork_is_independent(router):
    model, processor = tiny_model(mod_layers="all", mod_router=router), tiny_processor()
    frames = random_frames(6)
    session = model.stream(processor, max_new_tokens=4, interval_threshold=0.004)
    session.push(frames[:3])
    fork = session.fork()
    fork.push(random_frames(2, seed=9))
    session.push(frames[3:])
    straight = model.stream(processor, max_new_tokens=4, interval_threshold=0.004)
    straight.push(frames)
    assert [(e.time, e.text) for e in session] == [(e.time, e.text) for e in straight]
    assert session.cache.lengths == straight.cache.lengths != fork.cache.lengths
    assert fork.num_frames == 5 and fork.model is model


def test_the_model_holds_no_stream_state():
    model, processor = tiny_model(), tiny_processor()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    session = model.stream(processor, max_new_tokens=3)
    session.push(random_frames(2))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not [m for m in model.modules() if any(isinstance(v, StreamEvent) for v in vars(m).values())]


def test_narrate_yields_the_replies_of_a_stream():
    model, processor = scripted([2], ["A ball."])
    frames = random_frames(4)
    collected = list(model.narrate(processor, iter(frames), "Narrate.", fps=4, system_prompt=SYSTEM))
    assert said(collected) == [(0.5, "assistant", "A ball.")]
    assert model.text == beginning() + "F]\nUser: Narrate.\n[F,F]\nAssistant: A ball.</s>\n[F"
    forced, processor = scripted([], ["Sure."])
    events = list(forced.narrate(processor, frames, "Narrate.", reply_now=True, system_prompt=SYSTEM))
    assert said(events) == [(0.0, "assistant", "Sure.")]


def test_narrate_yields_while_the_video_plays():
    model, processor = scripted([0], ["Now."])
    said, ended = threading.Event(), threading.Event()

    def camera():
        try:
            for index, frame in enumerate(random_frames(5)):
                assert index == 0 or said.wait(timeout=60)
                yield frame
        finally:
            ended.set()

    events = model.narrate(processor, camera(), query=None, system_prompt=SYSTEM)
    assert next(events).text == "Now."
    said.set()
    events.close()
    assert ended.is_set()


@pytest.mark.parametrize("when_behind", [None, "drop_oldest"])
def test_narrate_drops_frames_if_it_may_and_warns(monkeypatch, when_behind):
    model, processor = scripted([], [])
    first = "Frames come faster than the model can watch them: the oldest are dropped. Watch fewer per second with a "
    first += "lower `fps`, or encode fewer with `reuse_static=3`."
    told, gone, encode = [], threading.Event(), model.encode_frames
    monkeypatch.setattr(generation_videollm_mod.logger, "warning", told.append)

    def camera():
        yield from random_frames(20)
        gone.set()

    def late(pixel_values):
        # By default the source waits, so its last frame would never come.
        if when_behind is not None:
            assert gone.wait(timeout=60) and told == [first]
        return encode(pixel_values)

    monkeypatch.setattr(model, "encode_frames", late)
    list(model.narrate(processor, camera(), when_behind=when_behind, max_waiting=2, system_prompt=SYSTEM))
    seen = model.text.count("F")
    if when_behind is None:
        assert (seen, told) == (20, [])
    else:
        assert seen < 20 and told == [first, f"{seen} frames were watched and {20 - seen} dropped."]


@pytest.mark.parametrize(("fps", "seconds", "expected"), [(None, 0.7, 1), (None, 0.3, 2), (2, 0.7, 2)])
def test_narrate_watches_a_camera_at_a_rate_that_the_model_keeps_up_with(monkeypatch, fps, seconds, expected):
    """With a scripted clock, which an encoder of `seconds` per frame turns; the camera waits for the model."""
    model, processor = scripted([0.99] * 24, [])
    now, told, encode = [0.0], [], model.encode_frames
    monkeypatch.setattr(streaming_videollm_mod, "clock", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(generation_videollm_mod.logger, "warning", told.append)
    frames = [(index / 2, frame) for index, frame in enumerate(random_frames(24))]
    monkeypatch.setattr(processing_videollm_mod, "read_video", lambda *_, fps, **__: iter(frames[:: int(2 / fps)]))

    def slow(pixel_values):
        now[0] += seconds * len(pixel_values)
        return encode(pixel_values)

    monkeypatch.setattr(model, "encode_frames", slow)
    options = {"fps": fps, "when_behind": "block", "max_waiting": 1, "chunk_frames": 1}
    list(model.narrate(processor, "camera:0", **options, system_prompt=SYSTEM))
    assert model.text.count("F") == (24 if expected == 2 else 3 + 10)
    slowed = "A frame takes the model 0.7 s: it watches 1 frame per second of this source. "
    assert told == ([] if expected == 2 else [slowed + "Set `fps` to choose another rate."])


def test_narrate_warns_of_what_was_spoilt_once_at_the_end(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(generation_videollm_mod.logger, "warning", warnings.append)
    video = write_noisy_clip(tmp_path / "noisy.mp4", 40, noise_from=20)
    list(tiny_model().narrate(tiny_processor(), video, max_new_tokens=1))
    assert len(warnings) == 1 and "spoilt" in warnings[0]
    list(
        tiny_model().narrate(tiny_processor(), write_clip(tmp_path / "good.mp4", random_frames(20)), max_new_tokens=1)
    )
    assert len(warnings) == 1


def test_narrate_watches_a_camera_through_sample_every():
    model, processor = scripted([], [])
    camera = itertools.chain(random_frames(3), (time.sleep(0.3) or frame for frame in random_frames(2)))
    assert list(model.narrate(processor, processor.sample_every(camera, 0.1), system_prompt=SYSTEM)) == []
    assert 3 <= model.text.count("F") <= 5


def test_narrate_respects_start_and_end():
    model, processor = scripted([], [])
    list(model.narrate(processor, random_frames(10), query="", fps=2, start=1.0, end=3.0, system_prompt=SYSTEM))
    assert model.text == beginning() + "F,F,F,F,F"


# ------------------------------------------------------------------------------------------- figures, text, refusals


def test_figures():
    model, processor = tiny_model(mod_layers="all"), tiny_processor()
    session = model.stream(processor, max_new_tokens=4, output_router_scores=True)
    assert session.router_scores == session.kept_tokens == {}
    assert session.tokens_per_second is None and session.frame_latency is None and session.num_waiting == 0
    session.push(random_frames(3))
    assert session.num_frames == 3 and session.keep_ratio == pytest.approx(0.2)
    assert session.tokens_per_second > 0 and session.frame_latency > 0 and session.num_waiting == 0
    assert set(session.router_scores) == {0, 1, 2, 3}
    for layer in range(4):
        assert session.router_scores[layer].shape == (10,) and session.kept_tokens[layer].sum() == 2
    assert session.cache.num_bytes == sum(session.cache.lengths) * 2 * 2 * 8 * 4
    assert tiny_model().stream(processor).keep_ratio == pytest.approx(0.6)
    for second in (9.0, 9.5):
        session.receive(torch.zeros(model.config.frame_feature_shape), second, 0.0)
    with pytest.raises(FrozenInstanceError):
        session.events[0].text = "Sessions share events with their forks."
    step = session.work()
    next(step)
    assert session.num_waiting == 2, "frames wait until the step that sees them is done"


def test_waiting_frames_are_counted_while_the_model_speaks():
    model, processor = scripted([1], ["A red ball."])
    waiting = []

    class Watcher(BaseStreamer):
        def put(self, value):
            waiting.extend([session.num_waiting] * value.numel())

        def end(self):
            pass

    session = model.stream(processor, system_prompt=SYSTEM, streamer=Watcher())
    session.push(random_frames(5))
    assert set(waiting) == {3} and session.num_waiting == 0


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_partial_text_comes_through_a_streamer(skip_prompt):
    """A session gives a streamer no prompt, so there is none to skip, in any reply."""
    model, processor = scripted([0, 1], ["A red ball enters.", "It leaves."])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=skip_prompt, timeout=60)
    session = model.stream(processor, system_prompt=SYSTEM, streamer=streamer)
    thread = threading.Thread(target=session.push, args=(random_frames(2),))
    thread.start()
    first, second = list(streamer), list(streamer)
    thread.join()
    assert len(first) > 2 and "".join(first) == " A red ball enters." and "".join(second) == " It leaves."


def test_logits_processors_and_sampling_apply_to_replies():
    processor = tiny_processor()
    model = tiny_model()
    plain = model.stream(processor, max_new_tokens=3)
    (event,) = plain.push(random_frames(1))
    banned = LogitsProcessorList([SuppressTokensLogitsProcessor(list(event.token_ids), device="cpu")])
    other = model.stream(processor, max_new_tokens=3, logits_processor=banned)
    (changed,) = other.push(random_frames(1))
    assert not set(changed.token_ids) & set(event.token_ids)
    torch.manual_seed(0)
    drawn = {
        model.stream(processor, max_new_tokens=3, do_sample=True).push(random_frames(1))[0].text for _ in range(5)
    }
    assert len(drawn) > 1


@pytest.mark.parametrize("options", [{"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}, {}])
def test_a_session_and_an_engine_draw_tokens_as_generate_does(options):
    model, processor, frames = tiny_model(), tiny_processor(), random_frames(1)
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    prompt = processor([{"role": "user", "content": "What?"}], frames, add_generation_prompt=True)
    given = {"do_sample": True, "speak": lambda _: False, "max_new_tokens": 12, "no_repeat": 0, "max_words": 0}

    torch.manual_seed(0)
    drawn = model.generate(**prompt, do_sample=True, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :].tolist()
    drawn = drawn[: drawn.index(processor.end_of_reply_id)] if processor.end_of_reply_id in drawn else drawn
    engine = StreamingEngine(model, processor, max_streams=1, max_frames=4, max_text_tokens=400, page_size=16)
    for session in (model.stream(processor, **given), engine.open(**given)):
        torch.manual_seed(0)
        session.push(frames)
        session.ask("What?")
        engine.run()
        assert list(session.events[-1].token_ids) == drawn


def test_times_of_frames():
    model, processor = scripted([], [])
    session = model.stream(processor, fps=4, system_prompt=SYSTEM)
    session.push(random_frames(3))
    assert session.time == 0.5
    session.push(random_frames(2), time=[3.0, 3.5])
    session.push(random_frames(1))
    assert session.time == 3.75
    for times in (np.array([4.0, 4.5]), torch.tensor([5.0, 5.5]), np.float64(6.0)):
        session.push(random_frames(len(np.atleast_1d(times))), time=times)
    assert session.time == 6.0 and session.num_frames == 11


def test_latencies_are_seconds_since_a_frame_or_question_came():
    model, processor = scripted([1], ["A ball.", "Red."])
    session = model.stream(processor, system_prompt=SYSTEM)
    begin = time.perf_counter()
    session.push(random_frames(3))
    session.ask("What?")
    most = time.perf_counter() - begin
    latencies = [*session.frame_latencies, *(event.latency for event in session if event.role == "assistant")]
    assert len(latencies) > 2 and all(0 < latency < most for latency in latencies)
    assert 0 < session._reply_seconds < most


def test_figures_count_the_tokens_of_all_replies_and_the_frames_up_to_the_reply():
    model, processor = scripted([1], ["A ball.", "Red."])
    session = model.stream(processor, system_prompt=SYSTEM, chunk_frames=5)
    session.push(random_frames(4))
    assert session.num_frames == 4 and [event.frame for event in session] == [1]
    session.ask("What?")
    replies = [event for event in session if event.role == "assistant"]
    assert session._reply_tokens == sum(len(event.token_ids) for event in replies) > len(replies[-1].token_ids)
    assert len(session.frame_latencies) == 2, "of the step after the reply"


def test_what_an_event_says_if_nothing_else_is_known():
    event = StreamEvent(1.0, 2, "user", "Hi.")
    assert vars(event) == {
        "time": 1.0,
        "frame": 2,
        "role": "user",
        "text": "Hi.",
        "token_ids": (),
        "interval_probability": None,
        "latency": 0.0,
        "interrupted": False,
    }


def test_the_oldest_waiting_frame_can_be_dropped():
    model, processor = scripted([], [])
    session = model.stream(processor, system_prompt=SYSTEM)
    assert session.frame_latencies == [] and not session.drop_oldest() and session.num_dropped == 0
    session.is_paused = True
    session.push(random_frames(3))
    assert session.drop_oldest() and session.num_dropped == 1
    session.is_paused = False
    session.push(random_frames(1))
    assert session.num_frames == 3 and session.time == 1.5


def test_only_instructions_stay():
    for instructs in (False, True):
        model, processor = scripted([], [])
        session = model.stream(processor, max_frames=4, max_text_tokens=50)
        session.push(random_frames(3))
        session.hear("Red things.", reply_now=False, **({"instructs": True} if instructs else {}))
        session.push(random_frames(1))
        assert any(piece.is_beginning for piece in session._memory.pieces[2:]) == instructs


def test_no_step_has_more_frames_than_the_session_may_forget():
    model, processor = tiny_model(), tiny_processor()
    for options, most in (({}, 8), ({"max_frames": 6}, 6), ({"max_frames": 6, "sink_frames": 2}, 4)):
        assert model.stream(processor, chunk_frames=8, **options).chunk_frames == most


@pytest.mark.parametrize(("max_text_tokens", "text"), [(None, 4 * 10 // 8), (30, 30)])
def test_layers_have_room_for_what_a_session_remembers(max_text_tokens, text):
    """Frames, their text, old text, a reply, and 256 tokens of new text."""
    model, processor = tiny_model(mod_layers="interleaved"), tiny_processor()
    session = model.stream(processor, max_frames=4, max_text_tokens=max_text_tokens, max_new_tokens=20)
    text += 4 * processor.frame_text_tokens + 20 + 256
    counts = model.config.layer_keep_counts
    assert [layer.capacity for layer in session.cache.layers] == [4 * count + text for count in counts]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.push(random_frames(1), time=0.5), "must increase, got 0.5 s after 0.5 s"),
        (lambda s: s.push(random_frames(2), time=[2.0, 1.0]), "must increase"),
        (lambda s: s.push(random_frames(2), time=[2.0]), "1 times for 2 frames"),
        (lambda s: s.push(random_frames(2), time=[2.0, "soon"]), "time\\[1\\]"),
        (lambda s: s.push(random_frames(1).transpose(0, 3, 1, 2)), "Channels seem to come first"),
        (lambda s: s.ask("  "), "empty"),
        (lambda s: s.hear(None, reply_now=False), "no text needs `reply_now=True`"),
        (lambda s: s.hear("What?", role="system"), "role='system'.* a role is user or assistant"),
        (lambda s: s.hear("What?", time=9.0, interrupt=True), "leave `time` out"),
        (lambda s: s.ask("What?", time=0.1), "at 0.5 s already"),
    ],
)
def test_refuses(call, message):
    model, processor = scripted([], ["A."])
    session = model.stream(processor, system_prompt=SYSTEM)
    session.push(random_frames(2))
    with pytest.raises(ValueError, match=message):
        call(session)


def test_a_frame_that_the_encoder_cannot_take_is_refused_before_it():
    model, processor = scripted([], [])
    processor.video_processor.do_resize = False  # the camera has the model's size
    session = model.stream(processor, system_prompt=SYSTEM)
    for _ in range(2):
        with pytest.raises(ValueError, match="must be 32 x 32 pixels, got 40 x 36"):
            session.push(random_frames(2, size=(40, 36)))
        session.push(random_frames(2))
    assert model.text == beginning() + "F,F,F,F" and session.time == 1.5


@pytest.mark.parametrize("vision", ["dinov2", "siglip2_vision_model"])
def test_the_first_frame_gives_the_size_if_the_encoder_takes_several(vision):
    processor = tiny_processor()
    processor.video_processor.do_resize = False
    model = tiny_model(vision=vision, frame_token_cls=vision == "dinov2")
    for size, other in (((32, 32), (40, 48)), ((40, 48), (32, 32))):
        session = model.stream(processor, max_new_tokens=1)
        session.push(random_frames(2, size=size))
        with pytest.raises(ValueError, match="must be {} x {} pixels, got {} x {}".format(*size, *other)):
            session.push(random_frames(1, size=other))
        session.push(random_frames(1, size=size))
        assert session.num_frames == 3


def test_push_keeps_no_pixels_while_the_model_speaks(monkeypatch):
    model, processor = scripted([1], ["A ball."])
    kept, at_work, resize, run = [], [], processor.resize_frames, StreamingSession._run

    def resized(*args):
        pixels = resize(*args)
        kept.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(processor, "resize_frames", resized)
    monkeypatch.setattr(StreamingSession, "_run", lambda s: at_work.append(kept[-1]()) or run(s))
    assert len(model.stream(processor).push(random_frames(20))) == 1 and at_work == [None]


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 0},
        {"interval_threshold": 2.0},
        {"max_new_tokens": 0},
        {"chunk_frames": 0},
        {"max_frames": 0},
        {"sink_frames": 4, "max_frames": 4},
        {"max_frames": 1000},
        {"max_text_tokens": 9},
    ],
)
def test_refuses_options(options):
    with pytest.raises(ValueError, match=f"^`{next(iter(options))}`|`max_text_tokens` need"):
        tiny_model().stream(tiny_processor(), **options)


def test_a_question_before_any_frame_is_refused():
    model, processor = scripted([], ["A ball."])
    session = model.stream(processor, system_prompt=SYSTEM)
    for options in ({}, {"interrupt": True}):
        with pytest.raises(ValueError, match="no frame to answer from yet: push one first, or .*reply_now=False"):
            session.ask("What?", **options)
    assert session.ask("Narrate.", reply_now=False) == []
    session.push(random_frames(1))
    assert [event.text for event in session.ask("What?")] == ["What?", "A ball."]


def test_stream_and_narrate_list_every_option_of_a_session():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        return {p.name: (p.default, p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}

    session, model = options(StreamingSession), VideoLLMMoDForConditionalGeneration
    assert options(model.stream) == session
    # The frames of a video have times, so narration needs no `source_fps`; it yields text, so it needs no scores.
    own = {"start", "end", "timeout", "reconnect", "reply_now", "when_behind", "max_waiting"}
    narrate = options(model.narrate)
    # Narration may choose the rate.
    assert narrate.pop("fps") == (None, float | None) and session.pop("fps") == (2.0, float)
    assert {name: narrate[name] for name in narrate.keys() - own} == {
        name: session[name] for name in session.keys() - {"source_fps", "output_router_scores"}
    }
    assert own <= narrate.keys()


def test_options_reach_the_session(monkeypatch):
    """Each option is passed on under its own name."""
    given = {}
    monkeypatch.setattr(generation_videollm_mod, "StreamingSession", lambda *_, **options: given.update(options))
    names = [p.name for p in inspect.signature(StreamingSession).parameters.values() if p.kind is p.KEYWORD_ONLY]
    VideoLLMMoDForConditionalGeneration.stream(None, None, **{name: name for name in names})
    assert given == {name: name for name in names}
    given.clear()
    model = tiny_model()
    options = {name: name for name in names if name not in ("source_fps", "output_router_scores")}
    with pytest.raises(AttributeError):
        next(model.narrate(None, None, **options))
    assert given == {**options, "source_fps": None, "output_router_scores": False}


def test_narration_has_a_default_query():
    model, processor = scripted([1], ["A ball."])
    assert DEFAULT_QUERY == NARRATE
    assert said(model.narrate(processor, random_frames(2), system_prompt=SYSTEM)) == [(0.5, "assistant", "A ball.")]
    assert model.text.startswith(beginning() + f"F]\nUser: {DEFAULT_QUERY}\n[F]\nAssistant: A ball.")
    silent, processor = scripted([1], ["A ball."])
    for query in (None, ""):
        silent.fed = []
        list(silent.narrate(processor, random_frames(2), query, system_prompt=SYSTEM))
        assert "User:" not in silent.text


# ------------------------------------------------------------------------------------------------------ frame rates


def numbered(begin, end):
    """Frames (frames, channels, height, width) that show their number."""
    return torch.arange(begin, end)[:, None, None, None].expand(-1, 3, 32, 32)


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [
        (12, 2, {0: 0.0, 6: 0.5, 12: 1.0, 18: 1.5}),
        (10, 4, {0: 0.0, 2: 0.25, 5: 0.5, 7: 0.75, 10: 1.0, 12: 1.25, 15: 1.5, 17: 1.75}),
        (30000 / 1001, 10, {0: 0.0, 2: 0.1, 5: 0.2, 8: 0.3, 11: 0.4, 14: 0.5, 17: 0.6}),
        (0.3, 0.1, {0: 0.0, 3: 10.0, 6: 20.0, 9: 30.0, 12: 40.0, 15: 50.0, 18: 60.0}),  # inexact in binary
        (2, 2, {index: index / 2 for index in range(20)}),
    ],
)
@pytest.mark.parametrize("together", [1, 3, 20])
def test_frames_at_the_rate_of_their_source(source_fps, fps, expected, together):
    """At each tick the session sees the frame on screen, as `read_video` shows it, however frames are pushed."""
    session = tiny_model().stream(tiny_processor(), fps=fps, source_fps=source_fps)
    seen = []
    for begin in range(0, 20, together):
        frames, times = session.sample(numbered(begin, min(begin + together, 20)), None)
        seen += zip(frames[:, 0, 0, 0].tolist(), times, strict=True)
    assert [index for index, _ in seen] == list(expected)
    assert [time for _, time in seen] == pytest.approx(list(expected.values()))


def test_a_slow_source_shows_a_frame_at_several_ticks():
    session = tiny_model().stream(tiny_processor(), fps=4, source_fps=2)
    frames, times = session.sample(numbered(0, 2), None)
    assert (frames[:, 0, 0, 0].tolist(), times) == ([0, 0, 1, 1], [0.0, 0.25, 0.5, 0.75])


def test_frames_with_a_time_are_all_seen():
    model, processor = scripted([], [])
    session = model.stream(processor, fps=2, source_fps=10, system_prompt=SYSTEM)
    for index in range(6):
        session.push(random_frames(1), time=index / 10)
    assert session.num_frames == 6
    session.push(random_frames(6))  # from 0.6 s on, again at two of ten frames per second
    assert (session.num_frames, session.time) == (8, pytest.approx(1.1))


def test_a_clip_pushed_at_its_own_rate_is_narrated_as_the_file():
    """The embedded checkpoint watches its 12 fps sample as a camera would show it."""
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(ROOT).eval()
    processor = VideoLLMMoDProcessor.from_pretrained(ROOT)
    clip = ROOT / "samples" / "streamworld.mp4"
    expected = said(model.narrate(processor, clip))
    events = json.loads(clip.with_suffix(".json").read_text(encoding="utf-8"))["events"]
    assert [[time, text] for time, _, text in expected] == events
    session = model.stream(processor, fps=2, source_fps=12)
    session.ask(DEFAULT_QUERY, reply_now=False)
    asked = []
    for index, (_, frame) in enumerate(read_video(clip, fps=12)):
        session.push(frame)
        if index == 5 * 12:
            asked = session.fork().ask("How many things do you see?")
    assert [event for event in said(session.events) if event[1] == "assistant"] == expected
    assert [event.time for event in asked] == [5.0, 5.0]


def test_frames_that_come_too_fast_by_the_clock_are_reported(monkeypatch):
    model, processor = scripted([], [])
    now, warned = [1000.0], []
    monkeypatch.setattr(streaming_videollm_mod.clock, "perf_counter", lambda: now[0])
    monkeypatch.setattr(streaming_videollm_mod.logger, "warning_once", warned.append)

    def watch(rate, **options):
        warned.clear()
        session = model.stream(processor, fps=2, system_prompt=SYSTEM, **options)
        for frame in random_frames(25):
            now[0] += 1 / rate
            session.push(frame)
        return list(warned)

    (warning,) = watch(12)
    assert "source_fps=30" in warning and "sample_every(camera, 0.5)" in warning and "source_fps=2" in warning
    assert watch(2) == watch(3) == watch(12, source_fps=12) == watch(12, source_fps=2) == []
    session = model.stream(processor, fps=2, system_prompt=SYSTEM)
    for index, frame in enumerate(random_frames(25)):
        session.push(frame, time=index / 12)
    session = model.stream(processor, fps=2, system_prompt=SYSTEM)
    session.push(random_frames(25))  # A recording, not a camera.
    assert warned == []


# ----------------------------------------------------------------------------------------------------------- evictions


# ------------------------------------------------------------------------------------------------------- eight bits


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Float8WeightOnlyConfig])
def test_a_stream_in_eight_bits(tmp_path, config):
    """Weights are quantised by torchao, keys and values by the session; pushing frames together changes nothing."""
    tiny_model(mod_layers="all").save_pretrained(tmp_path)
    quantized = {"quantization_config": TorchAoConfig(config())}
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path, **quantized).eval()
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__ in ("Int8Tensor", "Float8Tensor")
    assert all(type(router.weight) is torch.nn.Parameter for router in model.model.routers.values())
    frames, processor = random_frames(6), tiny_processor()
    options = {"max_new_tokens": 3, "cache_dtype": torch.float8_e4m3fn}
    one, several = (model.stream(processor, **options) for _ in range(2))
    for frame in frames:
        one.push(frame)
    several.push(frames)
    assert said(one.events) == said(several.events) and one.cache.lengths == several.cache.lengths
    assert one.cache.num_bytes == sum(one.cache.lengths) * 2 * 2 * 8
    with pytest.raises(ValueError, match="Give `cache` or `cache_dtype`, not both"):
        model.stream(processor, cache=model.new_cache(), **options)


@pytest.mark.parametrize(("chunk_frames", "router"), [(2, "learned"), (3, "change"), (8, "learned"), (8, "change")])
def test_evictions_do_not_depend_on_chunk_frames(chunk_frames, router):
    """An untrained model speaks at nearly every frame, so text is evicted too."""
    model, processor = tiny_model(mod_layers="all", mod_router=router), tiny_processor()
    limits = {"max_frames": 6, "sink_frames": 1, "max_text_tokens": 60, "max_new_tokens": 5}
    sessions = [model.stream(processor, chunk_frames=count, **limits) for count in (1, chunk_frames)]
    for session in sessions:
        session.push(random_frames(30))
        assert session.num_remembered <= 6
        assert session._memory.num_text_tokens <= 60 + 5 + 16
    one, several = sessions
    assert len(one.events) > 10 and said(one.events) == said(several.events)
    assert one.cache.lengths == several.cache.lengths


# ----------------------------------------------------------------------------------------------------- failed sessions


def test_a_session_that_failed_refuses_more_input():
    """The content of its cache is unknown."""

    class Failing:
        def put(self, _tokens):
            raise OSError("nobody listens")

        def end(self):
            pass

    model, processor = scripted([0], ["Now."])
    session = model.stream(processor, streamer=Failing())
    with pytest.raises(OSError, match="nobody listens"):
        session.push(random_frames(1))
    with pytest.raises(ValueError, match="failed during a step; open another"):
        session.push(random_frames(1))
    assert session.close() == [] and session.num_waiting == 0


def test_fork_is_refused_during_a_reply():
    model, processor = scripted([0], ["Now."])
    refused = []

    class Forking:
        def put(self, _tokens):
            with pytest.raises(ValueError, match="cannot be forked during a reply") as error:
                session.fork()
            refused.append(error)

        def end(self):
            pass

    session = model.stream(processor, streamer=Forking())
    session.push(random_frames(1))
    assert refused


def test_questions_before_any_frame_get_the_first_frames_time():
    model, processor = scripted([], ["One.", "Two."])
    session = model.stream(processor)
    for text in ("First?", "Second?"):
        session.hear(text)
    events = session.push(random_frames(1))
    assert said(events) == [
        (0.0, "user", "First?"),
        (0.0, "assistant", "One."),
        (0.0, "user", "Second?"),
        (0.0, "assistant", "Two."),
    ]


def test_frames_that_could_not_be_encoded_may_be_pushed_again():
    model, frames = tiny_model(), random_frames(6)
    expected = model.stream(tiny_processor(), source_fps=4, chunk_frames=2, speak=lambda _: False)
    expected.push(frames)
    session = model.stream(tiny_processor(), source_fps=4, chunk_frames=2, speak=lambda _: False)
    encode, calls = model.encode_frames, iter(range(9))

    def short_of_memory(pixels):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return encode(pixels)

    model.encode_frames = short_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        session.push(frames)
    assert session.num_waiting == 0
    session.push(frames)
    assert (session.num_frames, session.time) == (expected.num_frames, expected.time) == (3, 1.0)


def test_a_question_that_interrupts_a_step_has_the_time_of_the_frames_seen_since():
    model, frames = tiny_model(), random_frames(5)
    session = model.stream(tiny_processor(), speak=lambda _: False)
    session.push(frames[:1])
    pixels, times = session.sample(session.processor.resize_frames(frames[1:], model.device), None)
    for at, features in zip(times, model.encode_frames(session.processor.normalize_frames(pixels)), strict=True):
        session.receive(features, at, 0.0)
    work = session.work()
    step = next(work)
    session.hear("What?", interrupt=True, reply_now=False)
    with pytest.raises(StopIteration):
        while True:
            step = work.send(session._execute(step))
    assert [(event.time, event.frame) for event in session.events] == [(2.0, 4)]


def test_a_session_goes_on_outside_of_inference_mode():
    model, frames = tiny_model(), random_frames(4)
    sessions = [model.stream(tiny_processor(), max_frames=8, max_text_tokens=64) for _ in range(2)]
    with torch.inference_mode():
        sessions[0].push(frames[:2])
    sessions[1].push(frames[:2])
    for session in sessions:
        session.push(frames[2:])
    for layer, other in zip(sessions[0].cache.layers, sessions[1].cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
