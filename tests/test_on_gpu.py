# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: kernels, captured and compiled steps, and transfers. `make gpu` runs these tests there."""

import copy
import inspect
import warnings

import pytest
import torch
from engines import LIMITS, said
from tiny import SCHEMES, dialogue_ids, random_features, random_frames, tiny_model, tiny_processor
from torch.nn import functional as F
from torch.testing import assert_close

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.serving import StreamingEngine, VideoLLMMoDPagedCache, attention_in_use, kernels
from videollm_mod.serving.captured_step import GraphCapture
from videollm_mod.serving.kernels import check_attention, choose_attention, installed_kernels
from videollm_mod.serving.step import StepOutputs
from videollm_mod.streaming_videollm_mod import StreamStep


DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CAN_COMPILE = "compile" in inspect.signature(VideoLLMMoDForConditionalGeneration.stream).parameters
EAGER = {"compile": False} if CAN_COMPILE else {}


def watch(stream, finish=lambda: None):
    """Push frames until evictions have happened, with a question, and return the stream's events."""
    for index, frame in enumerate(random_frames(30)):
        stream.push(frame)
        finish()
        if index == 4:
            stream.ask("What is this?")
            finish()
    stream.close()
    finish()
    return said(stream.events)


def model_on(device, **options):
    return tiny_model(**options).to(device)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_cpu(scheme):
    model = tiny_model(**SCHEMES[scheme])
    inputs = {"input_ids": dialogue_ids(model.config, [2, 3]), "frame_features": random_features(model.config, 5)}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model.to(DEVICE)(**{name: x.to(DEVICE) for name, x in inputs.items()}).logits
    assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scheme", ["full", "interleaved"])
def test_a_captured_engine_says_what_a_session_says(scheme):
    model, processor = model_on(DEVICE, **SCHEMES[scheme]), tiny_processor()
    expected = watch(model.stream(processor, **LIMITS, **EAGER))
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS)
    assert watch(engine.open(), engine.run) == expected and len(expected) > 2
    assert engine.stats.captured_steps > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_steps_attend_by_a_kernel_as_a_session_attends(monkeypatch, dtype):
    """The other tiny models have heads that no kernel takes."""
    monkeypatch.setattr(kernels, "_chosen", {})
    model = model_on(DEVICE, text_overrides={"head_dim": 64}, **SCHEMES["full"]).to(dtype)
    processor, features = tiny_processor(), random_features(model.config, 6)[0].to(DEVICE, dtype)
    session = model.stream(processor, **LIMITS, **EAGER)
    engine = StreamingEngine(model, processor, max_streams=1, capture=True, **LIMITS)
    cache = VideoLLMMoDPagedCache(engine.pool)
    cache.reserve(LIMITS["max_frames"], LIMITS["max_text_tokens"])
    frame = processor.encode_typical_frame()
    for step in (*(StreamStep(frame, [len(frame) - 1], one[None]) for one in features), StreamStep([7], [0])):
        expected, (found,) = session._execute(step), engine.runner.execute([cache], [step])
        allowed = 1e-3 if dtype == torch.float32 else 0.1
        assert_close(found.logits, expected.logits, atol=allowed, rtol=allowed)
    assert engine.stats.captured_steps == engine.stats.steps == 7
    assert "gathered pages" not in attention_in_use(model.device)


@pytest.mark.skipif(not CAN_COMPILE, reason="sessions have no option `compile`")
@pytest.mark.parametrize("scheme", ["full", "interleaved"])
def test_a_compiled_session_says_what_an_eager_one_says(scheme):
    model, processor = model_on(DEVICE, **SCHEMES[scheme]), tiny_processor()
    expected = watch(model.stream(processor, **LIMITS, compile=False))
    assert watch(model.stream(processor, **LIMITS, compile=True)) == expected and len(expected) > 2


@pytest.mark.parametrize("size", [(270, 480), (32, 32), (20, 24)])
def test_frames_are_resized_as_on_the_cpu(size):
    """Black and white frames are the hardest: a resize overshoots at each edge."""
    processor, frames = tiny_processor(), (random_frames(4, size=size) > 127).astype("uint8") * 255
    expected = processor.resize_frames(frames)
    engine = StreamingEngine(model_on(DEVICE), processor, max_streams=1, **LIMITS)
    for given in (frames, list(frames), torch.from_numpy(frames).to(DEVICE)):
        found, waiting = processor.resize_frames(given, DEVICE), engine.take_in(given)
        assert found.is_cuda and found.dtype == torch.uint8 and torch.equal(found.cpu(), waiting)
        differences = (waiting.int() - expected.int()).abs()
        assert differences.max() <= 2 and (differences > 0).float().mean() < 0.02
        assert_close(processor.normalize_frames(found).cpu(), processor.normalize_frames(waiting))


def replayed(attend):
    """Return a kernel that each call captures as a CUDA graph over other numbers, overwrites and replays."""

    def run(query, keys, values, entries, *how):
        own = copy.copy(entries)
        new = entries.begins.diff().flip(0)
        own.begins, own.key_begins = (F.pad(new.cumsum(0), (1, 0)).int() for _ in range(2))
        own.used, own.table = new, torch.zeros_like(entries.table)
        inputs = [torch.zeros_like(x) for x in (query, keys, values)]
        capture = GraphCapture(query.device)
        replay = capture(lambda: StepOutputs(attend(*inputs, own, *how), *[None] * 3))
        mine, given = ((x.begins, x.key_begins, x.used, x.table) for x in (own, entries))
        for buffer, value in zip((*inputs, *mine), (query, keys, values, *given), strict=True):
            buffer.copy_(value)
        return replay().decisions

    return run


@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_installed_kernel_attends_as_the_reference(dtype, is_captured, has_window):
    """The heads are those of Llama-3-8B."""
    query = torch.empty(0, 32, 128, dtype=dtype, device=DEVICE)
    pages = torch.empty(1, 256, 8, 128, dtype=dtype, device=DEVICE)
    installed = installed_kernels(DEVICE, dtype, dtype)
    assert installed
    for _, attend in installed:
        check_attention(replayed(attend) if is_captured else attend, query, pages, has_window=has_window)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float32])
def test_pages_of_another_dtype_are_not_left_to_the_reference(stored):
    query = torch.empty(0, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    name, _ = choose_attention(query, torch.empty(1, 256, 8, 128, dtype=stored, device=DEVICE))
    assert name != "gathered pages"


@pytest.mark.parametrize("scheme", ["full", "interleaved"])
def test_checkpointing_changes_no_gradient(scheme):
    gradients = []
    for checkpointing in (False, True):
        model = model_on(DEVICE, **SCHEMES[scheme]).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = dialogue_ids(model.config, [2, 3]).to(DEVICE)
        labels = ids.masked_fill(ids == model.config.frame_token_id, -100)
        features = random_features(model.config, 5).to(DEVICE)
        model(input_ids=ids, frame_features=features, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_routed_layers_wait_for_nothing():
    """A frame makes the host wait for its input and its decision only, in as many layers as there are."""

    def waits(scheme):
        model = model_on(DEVICE, **SCHEMES[scheme])
        # Nothing that a model says at random may add steps.
        model.should_speak = lambda logits, threshold=None: (logits[:, 0] > torch.inf, logits[:, 0])  # noqa: ARG005
        session = model.stream(tiny_processor(), **LIMITS, **EAGER)
        session.push(random_frames(2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                session.push(random_frames(1))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # Setting the mode warns too, once per process.
        return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)

    full = waits("full")
    assert waits("interleaved") == waits("all") == full <= 8
