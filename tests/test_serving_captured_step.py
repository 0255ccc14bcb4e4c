# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Steps of fixed shapes: padding, warming up, and replaying a graph."""

import gc
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from engines import tiny_engine
from tiny import random_frames
from torch.testing import assert_close
from transformers.utils import logging

from videollm_mod.serving import VideoLLMMoDPagedCache, captured_step
from videollm_mod.serving.captured_step import (
    CapturedSteps,
    GraphCapture,
    Padding,
    StepShape,
    left_over,
    pad,
    shape_for,
)
from videollm_mod.serving.packed_cache import StreamPart, lay_out
from videollm_mod.streaming_videollm_mod import StreamStep


def test_a_padded_plan_has_the_numbers_of_its_shape():
    """Two streams that see and one that speaks, in a shape for two of each."""
    padding = Padding([9, 8, 8], {1: [0], 2: [0]}, page_size=16, frame_tokens=2)

    def part(stream, ids, ends, num_frames):
        new = {kind: len(ids) - num_frames * (2 - kind) for kind in (1, 2)}
        return StreamPart(stream, ids, ends, num_frames, 0.5, 0, 0, new, new, {1: [1], 2: [1]})

    plan = lay_out([part(0, [5], [0], 0), part(1, [9, 8, 8], [2], 1), part(2, [6, 8, 8, 9, 8, 8], [2, 5], 2)], 16)
    shape = StepShape(seeing=2, frames=2, speaking=2, reading=4)
    padded = pad(plan, shape, padding, {1: 3, 2: 3})
    assert [part.stream for part in padded.parts] == [1, 2, 0, None, None]
    # The last dummy stream has the frame that is left over, all text, and one token more.
    assert [part.ids for part in padded.parts[3:]] == [[0], [9, 8, 8, 0, 0, 0, 0, 0]]
    assert len(padded.ids) == shape.num_tokens(3) == 2 * 2 * 3 + 2 + 4 + 1
    assert padded.ends == [2, 5, 8, 9, 10, 13]
    assert padded.bounds.most_new == 2 * 3 + 4 + 1 and padded.entries[1].is_padding == [False] * 3 + [True] * 2
    assert padded.entries[1].new == [2, 4, 1, 1, 7] and padded.entries[2].new == [3, 6, 1, 1, 8]
    sizes = [(len(numbers), dtype) for numbers, dtype in padded.numbers()]
    full = pad(lay_out([padding.frames(2)] * 2 + [padding.token()] * 2, 16), shape, padding, {1: 3, 2: 3})
    assert sizes == [(len(numbers), dtype) for numbers, dtype in full.numbers()]
    assert [part.stream for part in plan.parts] == [0, 1, 2] and plan.bounds is None


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        # (text tokens before the first frame, frames, text tokens of a stream that sees none)
        ([(0, 0, 1)], (0, 0, 1, 0)),
        ([(0, 0, 3)], (0, 0, 1, 4)),
        ([(0, 0, 20)], (0, 0, 1, 32)),
        ([(0, 0, 40)], None),
        ([(0, 1, 0)], (1, 1, 0, 0)),
        ([(4, 1, 0)], (1, 1, 1, 4)),
        ([(0, 3, 0)], (1, 4, 0, 4)),
        ([(20, 7, 0)], (1, 8, 0, 32)),
        ([(20, 3, 0)], (1, 8, 0, 32)),
        ([(0, 9, 0)], None),
        ([(0, 1, 0), (0, 0, 1)], (1, 1, 1, 4)),
        ([(3, 1, 0), (0, 0, 1), (0, 0, 5), (0, 0, 1)], (4, 1, 4, 32)),
        ([(0, 0, 1), (0, 0, 7)], (0, 0, 2, 32)),
        ([(0, 2, 0), (0, 1, 0)], (2, 2, 0, 32)),
        ([(0, 8, 0), (0, 1, 0), (0, 1, 0)], None),
        ([(0, 2, 0), (0, 0, 1)], None),
        ([(0, 0, 1), (2, 1, 0), (0, 0, 4), (0, 1, 0)], (2, 1, 2, 32)),
    ],
)
@pytest.mark.parametrize("router", ["learned", "change"])
def test_a_captured_step_gives_what_a_plain_one_gives(monkeypatch, rows, shape, router):
    """Dummy streams change nothing, wherever in the row a stream lies. Every plan fits within the step's bounds."""
    is_within = set()

    def pad_and_look(*args):
        padded = pad(*args)
        for entries in padded.entries.values():
            is_within.add(padded.bounds.most_new >= max(entries.new) and min(entries.new) > 0)
        return padded

    monkeypatch.setattr(captured_step, "pad", pad_and_look)
    found = []
    for capture in (True, False):
        engine = tiny_engine(router=router, max_streams=4, capture=capture, output_router_scores=True)
        config = engine.model.config
        frame = [config.frame_token_interval_id] + [config.frame_token_id] * config.frame_num_tokens
        caches = [VideoLLMMoDPagedCache(engine.pool) for _ in rows]
        for turn in range(2):
            steps = []
            for index, (before, frames, text) in enumerate(rows):
                size = (frames, config.frame_num_tokens, config.vision_config.hidden_size)
                features = torch.randn(size, generator=torch.Generator().manual_seed(10 * index + turn))
                # Text before a frame replaces the separator.
                ids = [5 + turn] * before + (frame * frames)[bool(before) :] + [7 + turn] * text
                ends = [len(ids) - 1 - len(frame) * k for k in reversed(range(frames))] or [len(ids) - 1]
                steps.append(StreamStep(ids, ends, features if frames else None, 0.2 * index))
            found.append((engine.runner.execute(caches, steps), [cache.lengths for cache in caches]))
        if capture:
            assert list(engine._captured.steps) == ([shape] if shape else [])
            assert engine._captured.spare.get_seq_length() == 0
    assert is_within == ({True} if shape else set())
    for (mine, lengths), (theirs, plain_lengths) in zip(found[:2], found[2:], strict=True):
        assert lengths == plain_lengths
        for one, other in zip(mine, theirs, strict=True):
            assert one.speak == other.speak and one.tokens == other.tokens
            assert_close(one.logits, other.logits)
            assert_close(one.router_scores, other.router_scores)
            assert_close(one.kept_tokens, other.kept_tokens)


def test_a_captured_step_has_room_for_dummy_streams():
    """Dummy streams hold more than a stream of few frames ever does."""
    engine = tiny_engine(max_streams=1, max_frames=1, max_text_tokens=1, capture=True)
    engine.warm_up()
    stream = engine.open(max_new_tokens=2)
    stream.push(random_frames(1))
    engine.run()
    assert engine.stats.captured_steps > 0


def test_warm_up_makes_the_steps_and_shows_the_attention_kernel(capfd):
    logging.enable_progress_bar()  # an earlier test may have disabled it
    engine = tiny_engine(max_streams=4, capture=True)
    engine.warm_up(max_streams=3)
    assert gc.get_count()[2] == 0  # garbage was collected, so it will not be during a step
    alone = {(0, 0, 1, 0), (0, 0, 1, 4), (0, 0, 1, 32), (1, 1, 0, 0), (1, 1, 1, 4), (1, 1, 1, 32)}
    alone |= {(1, 2, 0, 4), (1, 4, 0, 4), (1, 8, 0, 4), (1, 8, 0, 32)}
    kinds = [((0, 0, size, 0), (0, 0, size, 32), (size, 1, 0, 0), (size, 1, size, 32)) for size in (2, 4)]
    assert set(engine._captured.steps) == alone.union(*kinds)
    streams = [engine.open() for _ in range(3)]
    for _ in range(2):
        for stream in streams:
            stream.push(random_frames(1))
        engine.run()
    assert engine.stats.captured_steps > 0 and engine._captured.spare.get_seq_length() == 0
    engine.warm_up(max_streams=3)
    assert "attention by strips of pages" in capfd.readouterr().err
    plain = tiny_engine()
    plain.warm_up()
    assert plain._captured is None


def test_after_warm_up_no_step_is_made_while_streams_wait():
    engine = tiny_engine(max_streams=2, capture=True)
    engine.warm_up(max_streams=2)
    made = set(engine._captured.steps)
    streams = [engine.open(max_new_tokens=2) for _ in range(2)]
    for stream in streams:
        stream.push(random_frames(2))
    engine.run()
    assert set(engine._captured.steps) == made and 0 < engine.stats.captured_steps < engine.stats.steps


class _Graph:
    """A stand-in for a CUDA graph: it runs the step again and writes into the outputs of the capture."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        for mine, new in zip(self.outputs, self.step(), strict=True):
            if mine is not None:
                mine.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for what captures call. Returns, in order, the graphs and the times when workspaces were cleared."""
    found, stream = [], SimpleNamespace(wait_stream=lambda _: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: found.append(graph) or nullcontext())
    clear = "_cuda_clearCublasWorkspaces"  # builds without CUDA do not have it
    monkeypatch.setattr(torch._C, clear, lambda: found.append("clear"), raising=False)
    return found


def test_a_capture_allocates_its_workspaces_itself(graphs):
    """Those of the warm-up and of the capture before are cleared."""
    GraphCapture(torch.device("cpu"))(lambda: graphs.append("run"))
    assert [type(x) if isinstance(x, _Graph) else x for x in graphs] == ["run"] * 3 + ["clear", _Graph, "run", "clear"]


class _Invalid:
    """A stand-in for a CUDA graph with a capture that becomes invalid."""

    def capture_begin(self, *_, **__):
        pass

    def capture_end(self):
        raise RuntimeError("the capture is invalid")


def test_an_invalid_capture_leaves_the_thread_on_its_stream_and_is_the_last(monkeypatch):
    """`torch.cuda.graph` is torch's own here."""
    current = [SimpleNamespace(wait_stream=lambda _: None)]
    engine, own = current[0], SimpleNamespace(wait_stream=lambda _: None)

    class OnStream:
        """As `torch.cuda.StreamContext`."""

        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *_):
            current[0] = self.before

    stand_ins = {
        **{"device": lambda _: nullcontext(), "stream": OnStream, "Stream": lambda _: own, "CUDAGraph": _Invalid},
        **{"current_stream": lambda: current[0], "set_stream": lambda stream: current.__setitem__(0, stream)},
        **{"graph_pool_handle": lambda: None, "synchronize": lambda: None, "empty_cache": lambda: None},
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):
        monkeypatch.setattr(torch._C, name, lambda: None, raising=False)
    capture = GraphCapture(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="is invalid"):
        capture(lambda: None)
    assert current == [engine]
    with pytest.raises(RuntimeError, match="an earlier capture failed"):
        capture(lambda: None)


def test_a_graph_is_fed_and_read_through_its_own_tensors(graphs):
    """A replay sees only what was copied into the inputs, and its outputs are copies."""
    plain, captured = (tiny_engine(max_streams=2, capture=True) for _ in range(2))
    capture = GraphCapture(torch.device("cpu"))

    def capture_and_tell_the_graph(run):
        given = []
        replay = capture(lambda: given.append(run()) or given[-1])
        assert len(given) == 4  # three to warm up
        graph = next(x for x in reversed(graphs) if isinstance(x, _Graph))
        graph.step, graph.outputs = run, given[-1]
        return replay

    captured._captured._capture = capture_and_tell_the_graph
    found = []
    for engine in (plain, captured):
        streams = [engine.open(max_new_tokens=4) for _ in range(2)]
        for index in range(5):
            for number, one in enumerate(streams):
                one.push(random_frames(1, seed=10 * number + index))
            engine.run()
        found.append([[(e.frame, e.token_ids, e.interval_probability) for e in one.events] for one in streams])
    assert found[0] == found[1] and sum(map(len, found[0])) > 4
    assert sum(graph.replays for graph in graphs if isinstance(graph, _Graph)) == captured.stats.captured_steps > 4


def test_a_step_that_cannot_be_captured_does_not_stop_the_start(monkeypatch, caplog):
    engine, new = tiny_engine(max_streams=2, capture=True), CapturedSteps._new

    def fail_at_two(self, shape):
        if shape.seeing == 2:
            raise RuntimeError("too little memory is left")
        return new(self, shape)

    monkeypatch.setattr(CapturedSteps, "_new", fail_at_two)
    monkeypatch.setattr(captured_step.logger, "propagate", True)
    with engine:
        streams = [engine.open(max_new_tokens=2) for _ in range(2)]
        with engine.changed:
            for stream in streams:
                stream.push(random_frames(2))
                stream.close()
        frames = [list(stream) and stream.session.num_frames for stream in streams]
    assert frames == [2, 2] and 0 < engine.stats.captured_steps < engine.stats.steps
    assert {shape.seeing for shape in engine._captured.steps} == {0, 1}
    for shape in (StepShape(2, 1, 0), StepShape(2, 1, 2, 32)):
        assert caplog.text.count(f"{shape} run uncaptured: too little memory is left") == 1


@pytest.mark.parametrize(("tokens", "kept", "around", "missing"), [(16, 2, 5, 2), (64, 1, 1, 1)])
def test_no_dummy_stream_is_longer_than_its_shape_says(tokens, kept, around, missing):
    """Frames may have less text than expected, as numbered ones do. On a GPU a longer stream would have no index."""
    chance, kinds, length, found = random.Random(0), (tokens, kept), tokens + around, 0
    pages = {kind: list(range(1000, 1000 + -(-(8 * kind + 8 * around + 33) // 16))) for kind in kinds}
    padding = Padding([1] * length, pages, page_size=16, frame_tokens=tokens)

    def part(stream, num_frames, less):
        text = (0 if chance.random() < 0.95 else 3) - less * num_frames
        count = max(1, length * num_frames + text)
        new = {kind: count - num_frames * (tokens - kind) for kind in kinds}
        own = {kind: [0] * -(-new[kind] // 16) for kind in kinds}
        return StreamPart(stream, [1] * count, [count - 1], num_frames, 0.5, 0, 0, new, new, own)

    for _ in range(600):
        count, least = chance.choice([1, 2, 3, 5, 8, 20, 64]), chance.choice([0, 1])
        less, most = chance.choice([0, missing]), 8 if count == 1 else 1
        plan = lay_out([part(i, chance.randint(least, most), less) for i in range(count)], 16)
        shape = shape_for(plan, length)
        if shape is not None and padding.has_room(*left_over(plan.parts, shape, length)):
            padded = pad(plan, shape, padding, dict.fromkeys(kinds, 50))
            assert len(padded.ids) == shape.num_tokens(length)
            assert max(len(part.ids) for part in padded.parts) <= padded.bounds.most_new
            assert all(each.new[kind] <= 16 * len(each.pages[kind]) for each in padded.parts for kind in kinds)
            found += 1
    assert found > 300
