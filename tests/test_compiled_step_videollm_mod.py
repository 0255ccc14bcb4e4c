# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiled sessions: the events of eager ones, one compilation for all sessions, and no wait for the device."""

import logging
from functools import partial

import pytest
import torch
from tiny import random_features, random_frames, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from turns import turn_model, turn_processor

from videollm_mod import VideoLLMMoDConfig
from videollm_mod.cache_videollm_mod import use_grouped_attention
from videollm_mod.compiled_step_videollm_mod import (
    _COMPILED,
    CompiledModel,
    StepCache,
    _forward,
    compiled_model,
    decide,
    kinds_of,
    speakable,
)


LIMITS = {"max_frames": 24, "sink_frames": 1, "max_text_tokens": 80, "max_new_tokens": 3}
LIMITS |= {"output_router_scores": True}
NUM_FRAMES = 500
FRAME = 10
# Compiling takes a minute on an idle machine, and several on a busy one.
pytestmark = pytest.mark.timeout(1200)
one_process = pytest.mark.xdist_group("compiled session")  # for the tests that share one


def quiet_model(**options):
    """A model of two layers, one of them routed, that is silent at most frames."""
    config = tiny_config(text_overrides={"num_hidden_layers": 2}, **options).to_dict()
    config |= {"vision_config": tiny_vision_config(num_hidden_layers=1)}
    model, seen = tiny_model(VideoLLMMoDConfig(**config)), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    model.stream(tiny_processor(), max_new_tokens=1).push(random_frames(30))
    hook.remove()
    mean = torch.stack(seen).mean(dim=0)
    with torch.no_grad():
        model.lm_head.weight[model.config.frame_token_interval_id] = 20 * mean / mean.norm() ** 2
    return model


def watch(model, *, num_frames=NUM_FRAMES, fork_at=None, **options):
    """Watch random frames, mostly one by one, with questions; return the session."""
    session = model.stream(tiny_processor(), **LIMITS, **options)
    for index, frame in enumerate(random_frames(num_frames)):
        if index % 100 == 50:
            session.ask("What is this?")
        if index % 70 == 20:
            session.push([frame] * 3)
        if index == fork_at:
            session = session.fork()
        session.push(frame)
    return session


def told(session):
    return [(event.time, event.role, event.token_ids) for event in session]


@pytest.fixture(scope="module")
def model():
    return quiet_model()


@pytest.fixture(scope="module")
def eager(model):
    return watch(model)


@pytest.fixture(scope="module")
def compiled(model):
    """A compiled session, and how often torch compiled."""
    counters.clear()
    session = watch(model, compile=True)
    return session, counters["stats"]["unique_graphs"], len(counters["recompiles"])


@one_process
def test_a_compiled_session_reuses_the_features_of_equal_frames(model, compiled):
    session = watch(model, num_frames=60, compile=True, reuse_static=1)
    assert told(session) == told(compiled[0])[: len(session.events)] and session.num_reused == 3
    assert session.num_frames == 63


@one_process
def test_a_compiled_session_says_what_an_eager_one_says(model, eager, compiled):
    session, _, _ = compiled
    frames_with_replies = {event.frame for event in session if event.role == "assistant"}
    assert 20 < len(frames_with_replies) < NUM_FRAMES / 2 and session.num_frames > NUM_FRAMES
    assert told(session) == told(eager) and session.cache.lengths == eager.cache.lengths
    assert session.interval_probability == pytest.approx(eager.interval_probability, rel=1e-3)
    for layer in model.config.routed_layers:
        assert_close(session.router_scores[layer], eager.router_scores[layer], atol=1e-4, rtol=1e-3)
        assert torch.equal(session.kept_tokens[layer], eager.kept_tokens[layer])
        assert torch.equal(session.cache.get_positions(layer), eager.cache.get_positions(layer))


@one_process
def test_each_step_is_compiled_once_for_all_sessions_of_a_model(model, compiled):
    _, num_graphs, num_recompiled = compiled
    assert num_graphs == 3 and num_recompiled == 0  # the encoder, the step of a frame and that of a token
    with torch.compiler.set_stance("fail_on_recompile"):
        for options in ({}, {"fork_at": 40}):
            assert told(watch(model, num_frames=60, compile=True, **options)) == told(watch(model, num_frames=60))
        options = {**LIMITS, "max_frames": 40, "interval_threshold": 0.5}
        larger = model.stream(tiny_processor(), compile=True, **options)
        larger.push(random_frames(3))
        larger.push(random_frames(1))
    assert len(_COMPILED) == 1


@one_process
def test_weights_may_change_in_place(compiled):
    model = compiled[0].model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.v_proj.weight.mul_(-1)
        try:
            sessions = [watch(model, num_frames=30, compile=c) for c in (True, False)]
        finally:
            model.load_state_dict(before)
    assert told(sessions[0]) == told(sessions[1])
    probabilities = [session.interval_probability for session in sessions]
    assert probabilities[0] == pytest.approx(probabilities[1], rel=1e-3)


def test_a_compiled_session_compares_frames_as_an_eager_one_does(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what is traced, run quickly
    model = quiet_model(mod_router="change")
    sessions = [watch(model, num_frames=80, fork_at=40, compile=c) for c in (True, False)]
    assert told(sessions[0]) == told(sessions[1]) and sessions[0].cache.lengths == sessions[1].cache.lengths
    compiled, eager = sessions
    assert torch.equal(compiled.kept_tokens[1], eager.kept_tokens[1]) and len(compiled.events) > 3
    assert_close(compiled.router_scores[1], eager.router_scores[1], atol=1e-4, rtol=1e-3)
    for layer in model.config.routed_layers:
        assert torch.equal(compiled.cache.get_positions(layer), eager.cache.get_positions(layer))


@pytest.mark.parametrize(
    "options",
    [{}, {"mod_layers": "all"}, {"mod_router": "change"}, {"mod_keep_ratio": [1.0, 0.0]}, {"mod_keep_ratio": 1.0}],
)
def test_what_is_compiled_equals_a_session_for_each_routing(options, monkeypatch):
    """Nothing is compiled here, so that it is quick."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = quiet_model(**options)
    compiled, plain = (watch(model, num_frames=90, compile=c) for c in (True, False))
    assert compiled._compiled is not None and plain._compiled is None
    assert told(compiled) == told(plain) and compiled.cache.lengths == plain.cache.lengths
    assert compiled.interval_probability == pytest.approx(plain.interval_probability, rel=1e-3)
    assert int(compiled.cache.num_seen) == int(plain.cache.num_seen)
    assert int(compiled.cache.position_offset) == int(plain.cache.position_offset) > 0
    for layer in model.config.routed_layers:
        assert_close(compiled.router_scores[layer], plain.router_scores[layer], atol=1e-4, rtol=1e-3)
        assert torch.equal(compiled.kept_tokens[layer], plain.kept_tokens[layer])
        assert torch.equal(compiled.cache.get_positions(layer), plain.cache.get_positions(layer))


def test_frames_with_numbers_are_compiled_for_any_number_of_digits(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, without generated code
    processor = turn_processor("internvl")
    model = turn_model(processor, text_overrides={"num_hidden_layers": 1}, mod_layers="all")
    counters.clear()
    sessions = [model.stream(processor, **LIMITS, compile=compile) for compile in (False, True)]
    for session in sessions:
        for frame in random_frames(12):
            session.push(frame)
    assert told(sessions[0]) == told(sessions[1]) and sessions[0].cache.lengths == sessions[1].cache.lengths
    # Frames 2 to 12 run compiled, and the step is compiled once for "Frame9" and "Frame10".
    counts = counters["stats"]
    assert sessions[1]._compiled is not None and counts["unique_graphs"] <= 3 and not counters["recompiles"]
    steps = [[13, *processor.encode_typical_frame()[1:]], processor.encode_typical_frame()[:-1]]
    assert [sessions[1]._compiled.fits(ids, 1) for ids in steps] == [True, False]


class Step(torch.nn.Module):
    """The step that is compiled, uncompiled."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *inputs):
        return _forward(self.inner, *inputs)


def step_on_a_gpu(model, *, sees):
    """Run a step on tensors of a GPU without values."""
    config, step = model.config, Step(model)
    use_grouped_attention(model.model.language_model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        weights = {
            name: torch.empty(x.shape, dtype=x.dtype) for name, x in (*step.named_parameters(), *step.named_buffers())
        }
        numbers = torch.zeros(5 + (1 + FRAME if sees else 1), dtype=torch.float64)
        entries = [torch.arange(128) for _ in range(2)]
        buffers = [[torch.zeros(128, 1, 2, 8) for _ in range(2)] for _ in range(config.text_config.num_hidden_layers)]
        features = torch.zeros(1, 1, FRAME, config.vision_config.hidden_size)
        return torch.func.functional_call(step, weights, (numbers, features if sees else None, entries, buffers, sees))


@pytest.mark.parametrize("sees", [True, False])
def test_a_step_does_not_wait_for_the_device(sees, monkeypatch):
    model = tiny_model()
    decisions, logits, *_ = step_on_a_gpu(model, sees=sees)
    assert decisions.shape == (3, 1) and logits.device.type == "cuda"
    # Without values, a question that the host asks the device has no answer.
    norm = type(model.model.language_model.norm)
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x * x.sum().item()))
    with pytest.raises(DataDependentOutputException):
        step_on_a_gpu(model, sees=sees)


def test_scores_of_any_shape_leave_out_what_may_not_be_said():
    model = tiny_model(frame_token_id=5)
    model.generation_config.suppress_tokens = [2, 1000]
    for shape in ((7,), (3, 7), (1, 3, 7)):
        logits = torch.zeros(shape, dtype=torch.bfloat16)
        scores = speakable(model, logits)
        assert scores.dtype == torch.float32 and not logits.isinf().any()
        assert scores.isinf().reshape(-1, 7).any(dim=0).tolist() == [index in (2, 5) for index in range(7)]


def test_unwritten_entries_are_not_seen():
    model = tiny_model()
    config = model.config
    use_grouped_attention(model.model.language_model)
    sizes = [64 + 8 * kind for kind in range(2)]
    results = []
    for filling in (0.0, 1e4):
        buffers = [[torch.full((sizes[kind], 1, 2, 8), filling) for _ in range(2)] for kind in kinds_of(config)]
        for pair in buffers:
            for tensor in pair:
                tensor[:5] = 0.5
        numbers = torch.tensor([0.5, 5, 5, 5, 5, 7, *[config.frame_token_id] * 10], dtype=torch.float64)
        entries = [torch.arange(size) for size in sizes]
        with torch.no_grad():
            results.append(_forward(model, numbers, random_features(config, 1), entries, buffers, True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [x.shape[-1] for x in results[0][2:4]] == [10, 10]
    assert isinstance(StepCache([0], *torch.zeros(2, 1).long(), entries, buffers).get_seq_length(), torch.Tensor)
    assert decide(model, results[0][1], 0.0)[2].shape == (1,)


def test_a_session_goes_on_uncompiled_if_the_default_fails(monkeypatch, caplog):
    """On CUDA sessions are compiled by default, where torch may lack a compiler."""
    model, told_by = quiet_model(), []

    def fail(*_):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(CompiledModel, "run", fail)
    for must in (True, False):
        session = model.stream(tiny_processor(), compile=True, **LIMITS)
        session._must_compile = must
        if must:
            with pytest.raises(RuntimeError, match="no compiler"):
                session.push(random_frames(1))
        else:
            with caplog.at_level(logging.WARNING):
                for frame in random_frames(12):
                    session.push(frame)
            told_by.append(told(session))
    assert caplog.text.count("run uncompiled from now on, because a compiled one failed: no compiler found") == 1
    eager = model.stream(tiny_processor(), **LIMITS)
    for frame in random_frames(12):
        eager.push(frame)
    assert told_by == [told(eager)]


@pytest.mark.parametrize(
    "options",
    [
        {"compile": True},
        {"compile": True, "max_frames": 8, "attn_implementation": "eager"},
        {"compile": True, "max_frames": 8, "cache": True},
    ],
)
def test_refuses_what_cannot_be_compiled(options):
    model = tiny_model(attn_implementation=options.pop("attn_implementation", "sdpa"))
    if "cache" in options:
        options["cache"] = model.new_cache()
    with pytest.raises(ValueError, match="`compile=True` needs `max_frames`"):
        model.stream(tiny_processor(), **options)


def test_a_model_that_moves_to_another_device_is_compiled_again():
    model = tiny_model()
    on_the_host = compiled_model(model)
    assert compiled_model(model) is on_the_host
    moved = compiled_model(model.to("meta"))
    assert moved is not on_the_host and moved.device == model.device == torch.device("meta")
    assert compiled_model(model) is moved
    del _COMPILED[model]  # another test counts these


def test_sessions_on_a_cpu_are_not_compiled_by_default():
    assert tiny_model().stream(tiny_processor(), max_frames=8)._compiled is None


def test_scores_of_what_may_be_said_are_a_float32_copy():
    model = tiny_model()
    model.generation_config.suppress_tokens = [3]
    logits = torch.ones(2, model.config.frame_token_id + 2, dtype=torch.bfloat16)
    for given in (logits, logits.float()):
        scores = speakable(model, given)
        assert scores.dtype == torch.float32 and given.min() == 1
        assert scores.isinf().all(dim=0).nonzero().flatten().tolist() == [3, model.config.frame_token_id]
        assert torch.equal(speakable(model, given[:, :3]), torch.ones(2, 3)), "an id may lie past the vocabulary"
