# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""One step of several streams: what it asks of the device, and whose results are whose."""

import torch
from engines import tiny_engine
from tiny import HostAndDevice, WithoutFloat64, random_frames

from videollm_mod import (
    cache_videollm_mod,
    generation_videollm_mod,
    modeling_videollm_mod,
    routers_videollm_mod,
    routing_videollm_mod,
    streaming_videollm_mod,
)
from videollm_mod.serving import VideoLLMMoDPagedCache, entries, kernels, packed_cache
from videollm_mod.serving import step as step_module
from videollm_mod.serving.packed_cache import StreamPart, lay_out
from videollm_mod.serving.step import PackedStep, StepOutputs, read_results
from videollm_mod.streaming_videollm_mod import StreamStep


def test_running_a_step_copies_nothing_and_asks_the_device_nothing(monkeypatch):
    """Except on a CPU: an order that a GPU computes, and checks that cost nothing there."""
    modules = (entries, kernels, packed_cache, step_module, cache_videollm_mod, generation_videollm_mod)
    modules += (modeling_videollm_mod, routers_videollm_mod, routing_videollm_mod, streaming_videollm_mod)
    found, forward = set(), PackedStep.forward

    def watched(step):
        with HostAndDevice(*modules) as mode:
            outputs = forward(step)
        found.update(mode.found)
        return outputs

    engine = tiny_engine(max_streams=2, capture=True)
    engine.runner.execute([VideoLLMMoDPagedCache(engine.pool)], [StreamStep([7], [0])])  # the kernel is chosen here
    monkeypatch.setattr(PackedStep, "forward", watched)
    streams = [engine.open(max_new_tokens=3) for _ in range(2)]
    for number, stream in enumerate(streams):
        stream.ask("What is there?", reply_now=False)
        stream.push(random_frames(6, seed=number))
    engine.run()
    for_a_cpu = {("__init__", "nonzero"), ("check_on_device", "tolist")}
    assert found == {(f"routing.{function}", name) for function, name in for_a_cpu}
    with HostAndDevice(step_module) as mode:
        engine.runner.execute([streams[0].session.cache], [StreamStep([7], [0])])
    assert ("step.read_results", "tolist") in mode.found


def test_a_step_runs_where_there_is_no_float64(monkeypatch):
    engine, forward = tiny_engine(max_streams=1), PackedStep.forward

    def watched(step):
        with WithoutFloat64():
            return forward(step)

    monkeypatch.setattr(PackedStep, "forward", watched)
    stream = engine.open(max_new_tokens=2)
    stream.push(random_frames(2))
    stream.ask("What is there?")
    engine.run()
    assert stream.events[-1].role == "assistant"


def test_results_are_those_of_each_stream_without_padding():
    """The row is in another order than the streams, and dummy streams lie between them."""

    def part(stream, num_frames, num_ends):
        return StreamPart(stream, [5] * 4, list(range(num_ends)), num_frames, 0.5, 0, 0, {2: 4}, {2: 4}, {2: [0]})

    plan = lay_out([part(1, 2, 2), part(None, 1, 1), part(0, 0, 1), part(2, 1, 1)], page_size=16)
    index = torch.arange(5.0)
    outputs = StepOutputs(
        decisions=torch.stack([torch.tensor([1.0, 0, 0, 1, 0]), index / 10, index.double()]),
        logits=index[:, None].expand(5, 3),
        scores=torch.arange(4.0)[None, :, None].expand(1, 4, 6),
        kept=torch.ones(1, 4, 6, dtype=torch.bool),
    )
    results = read_results(plan, outputs, routed_layers=[3])
    assert [result.tokens for result in results] == [[3], [0, 1], [4]]
    assert [result.speak for result in results] == [[True], [True, False], [False]]
    assert [result.logits[:, 0].tolist() for result in results] == [[3], [0, 1], [4]]
    assert results[0].router_scores == {}
    assert results[1].router_scores[3][:, 0].tolist() == [0, 1] and results[2].router_scores[3][:, 0].tolist() == [3]
