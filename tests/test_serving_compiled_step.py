# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiled steps say what plain ones say."""

import gc
import weakref

import pytest
import torch
from engines import LIMITS, NARRATE, ROOT, embedded, said, tiny_engine
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoProcessor, TorchAoConfig

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.serving import StreamingEngine, VideoLLMMoDPagedCache, captured_step
from videollm_mod.serving.captured_step import StepShape
from videollm_mod.streaming_videollm_mod import StreamStep


@pytest.fixture(scope="module")
def trained():
    return embedded()


def test_compiled_steps_say_the_same(trained, monkeypatch):
    """Each step has code of its own, which reads new numbers every time: here for two streams of different ages."""
    model, processor, frames = trained
    shapes = [StepShape(0, 0, 1), StepShape(1, 1, 0, reading=4)]
    monkeypatch.setattr(captured_step, "shapes_of", lambda _: shapes)
    made, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: made.append(step) or compiler(step, **how))

    def events(compile_steps):
        options = {"compile_steps": compile_steps, "output_router_scores": True, **LIMITS}
        engine = StreamingEngine(model, processor, max_streams=1, page_size=64, **options)
        engine.warm_up()
        for first in (0, 3):
            stream = engine.open()
            stream.ask(NARRATE, reply_now=False)
            for index, frame in enumerate(frames[first:]):
                stream.push(frame)
                if index == 6:
                    stream.ask("What do you see?")
                engine.run()
            stream.close()
            engine.run()
            kept = {layer: rows.tolist() for layer, rows in stream.session.kept_tokens.items()}
            yield [(event.frame, event.text, event.token_ids) for event in stream.events], kept
        if compile_steps:
            assert len({id(step.__code__) for step in made}) == len(made) == 2
            assert len(engine._captured.steps) == 2
            assert engine.stats.captured_steps > 0.5 * engine.stats.steps

    plain, compiled = list(events(False)), list(events(True))
    assert plain == compiled and all(len(said) > 3 and len(kept) == 4 for said, kept in plain)


def test_a_compiled_step_relies_on_contiguous_attention(monkeypatch):
    """The row has one stream, so that its attention is not copied together with another's."""
    monkeypatch.setattr(captured_step, "shapes_of", lambda _: [StepShape(1, 1, 0)])
    found = []
    for how in ({"capture": False}, {"compile_steps": True}):
        engine = tiny_engine(max_streams=1, output_router_scores=True, **how)
        config = engine.model.config
        assert config.text_config.num_attention_heads > config.text_config.num_key_value_heads
        frame = [config.frame_token_interval_id] + [config.frame_token_id] * config.frame_num_tokens
        cache = VideoLLMMoDPagedCache(engine.pool)
        for turn in range(2):
            size = (1, config.frame_num_tokens, config.vision_config.hidden_size)
            features = torch.randn(size, generator=torch.Generator().manual_seed(turn))
            found += engine.runner.execute([cache], [StreamStep(frame, [len(frame) - 1], features)])
        assert engine.stats.captured_steps == (2 if "compile_steps" in how else 0)
        # Dynamo keeps compilers for ever, but not the pages and the weights of their steps.
        references = [weakref.ref(x) for x in (engine.pool.layers[0][0], engine.model)]
        gc.collect()
        gc.disable()
        try:
            del engine, cache, config
            assert [reference() for reference in references] == [None, None]
        finally:
            gc.enable()
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        assert_close(plain.logits, compiled.logits, rtol=1e-4, atol=1e-4)
        assert_close(plain.router_scores, compiled.router_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"capture": True}, {"compile_steps": True}])
def test_weights_in_eight_bits_say_the_same_in_captured_steps(monkeypatch, how):
    quantized = TorchAoConfig(Int8WeightOnlyConfig())
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(ROOT, quantization_config=quantized).eval()
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight.data).__name__ != "Tensor"
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    video = processor.read_video(ROOT / "samples" / "streamworld.mp4", fps=2)
    frames = [frame for _, frame in video][:8]
    shapes = [StepShape(0, 0, 1)]
    if "capture" in how:  # a second one takes long to compile
        shapes.append(StepShape(1, 1, 0, reading=4))
    monkeypatch.setattr(captured_step, "shapes_of", lambda _: shapes)
    session = model.stream(processor)
    engine = StreamingEngine(model, processor, max_streams=1, **LIMITS, **how)
    stream = engine.open()
    for watcher in (session, stream):
        watcher.ask(NARRATE, reply_now=False)
        for frame in frames:
            watcher.push(frame)
            engine.run()
        watcher.close()
    engine.run()
    assert said(stream.events) == said(session.events) and len(stream.events) > 1
    assert engine.stats.captured_steps > engine.stats.steps / 3


def test_refuses_to_compile_uncaptured_steps():
    with pytest.raises(ValueError, match="`compile_steps` requires captured steps"):
        tiny_engine(compile_steps=True, capture=False)
