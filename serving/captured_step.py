# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Steps of fixed shapes: which shapes there are, padding a plan to one, and replaying it as a CUDA graph."""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .compiled_step import compile_step
from .faults import forget
from .kernels import attention_in_use
from .memory import devices_of
from .packed_cache import StepBounds, StepPlan, StreamPart, lay_out
from .pages import VideoLLMMoDPagedCache, VideoLLMMoDPagePool
from .step import PackedStep, StepOutputs


logger = logging.get_logger(__name__)

# Captured steps exist for these numbers of streams, and for these numbers of frames of one stream.
NUM_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128)
NUM_FRAMES = (1, 2, 4, 8)
# Text tokens that a captured step has room for: what opens and closes a reply, or a question.
_SHORT_TEXT, LONG_TEXT = 4, 32
# A process can capture one graph at a time.
_CAPTURING = threading.Lock()


# ------------------------------------------------------------------------------------------------------------ shapes


class StepShape(NamedTuple):
    """
    What a captured step has room for.

    Attributes:
        seeing (`int`): Streams that see frames.
        frames (`int`): Frames of each of them.
        speaking (`int`): Streams that add one text token.
        reading (`int`): Further text tokens of any of these streams, such as a question before a frame.
    """

    seeing: int
    frames: int
    speaking: int
    reading: int = 0

    @property
    def has_rest(self) -> bool:
        """Whether frames or text may be left over. They go to one more stream, which has at least one token."""
        return self.reading > 0 or self.frames > 1

    def num_tokens(self, frame_length: int) -> int:
        """Return the length of the row."""
        frames = self.seeing * self.frames
        return frames * frame_length + self.speaking + self.reading + self.has_rest

    def bounds(self, frame_length: int, most_pages: dict[int, int]) -> StepBounds:
        """Return the upper bounds of one stream's part."""
        most_new = max(self.frames * frame_length, 1) + self.reading + self.has_rest
        return StepBounds(most_new, most_pages)

    def fits(self, need: "StepShape") -> bool:
        """Return whether a step of shape `need` fits. A shape with frames never fits a step without any."""
        return bool(self.frames) == bool(need.frames) and all(a >= b for a, b in zip(self, need, strict=True))


@lru_cache
def shapes_of(size: int) -> tuple[StepShape, ...]:
    """Return the shapes for up to `size` streams. The first that fits a step is the smallest that does."""
    texts = (_SHORT_TEXT, LONG_TEXT) if size == 1 else (LONG_TEXT,)
    return (
        StepShape(0, 0, size),
        *(StepShape(0, 0, size, text) for text in texts),
        StepShape(size, 1, 0),
        # Live streams come in all mixtures. One shape with as many seeing as speaking streams covers them all.
        *(StepShape(size, 1, size, text) for text in texts),
        *(StepShape(size, frames, 0, texts[0]) for frames in NUM_FRAMES[1:]),
        # A stream's first step has the system prompt and as many frames as a step may have.
        *([StepShape(1, NUM_FRAMES[-1], 0, LONG_TEXT)] if size == 1 else []),
    )


def size_for(count: int) -> int:
    """Return the number of streams that captured steps for `count` streams are made for."""
    return next((size for size in (0, *NUM_STREAMS) if size >= count), NUM_STREAMS[-1])


def shape_for(plan: StepPlan, frame_length: int) -> StepShape | None:
    """
    Return the smallest shape that a step fits in.

    `None` if there is none: for long text, for streams with very different numbers of frames, for many frames with
    less text than expected, and if one stream catches up while another speaks.
    """
    counts = [part.num_frames for part in plan.parts if part.num_frames]
    text = [len(part.ids) - max(part.num_frames * frame_length, 1) for part in plan.parts]
    # The text of a frame may be shorter than expected. A dummy stream then reads the rest.
    reading = sum(count for count in text if count > 0) or int(min(text) < 0)
    need = StepShape(len(counts), max(counts, default=0), len(plan.parts) - len(counts), reading)
    size = size_for(max(need.seeing, need.speaking))
    shape = next((shape for shape in shapes_of(size) if shape.fits(need)), None)
    if shape is None:
        return None
    frames, text = left_over(plan.parts, shape, frame_length)
    bounds = shape.bounds(frame_length, {})
    return shape if frames <= shape.frames and frames * frame_length + text <= bounds.most_new else None


def left_over(parts: Sequence[StreamPart], shape: StepShape, frame_length: int) -> tuple[int, int]:
    """Return the frames and the text tokens that streams leave free in a shape. One dummy stream has all of them."""
    frames = sum(shape.frames - part.num_frames for part in parts if part.num_frames)
    text = sum(len(part.ids) - max(part.num_frames * frame_length, 1) for part in parts)
    return frames, shape.reading + shape.has_rest - text


# ----------------------------------------------------------------------------------------------------------- padding


@dataclass(frozen=True)
class Padding:
    """
    Makes dummy streams, which write into pages that nothing reads.

    Attributes:
        frame_ids (`list[int]`): Tokens of a frame and the text around it.
        pages (`dict[int, list[int]]`): For each kind of layer, the pages to write to.
        page_size (`int`): Entries per page.
        frame_tokens (`int`): Tokens per frame, without text.
    """

    frame_ids: list[int]
    pages: dict[int, list[int]]
    page_size: int
    frame_tokens: int

    def token(self) -> StreamPart:
        """Return a dummy stream that adds one text token and needs a decision."""
        return self._part([0], [0], 0)

    def frames(self, num_frames: int, num_text: int = 0) -> StreamPart:
        """Return a dummy stream that sees frames, with a decision after each, and then reads text."""
        ids = self.frame_ids * num_frames + [0] * num_text
        ends = [len(self.frame_ids) * (index + 1) - 1 for index in range(num_frames)]
        return self._part(ids, ends, num_frames)

    def has_room(self, num_frames: int, num_text: int) -> bool:
        """Return whether there are pages for a dummy stream that sees frames and then reads text."""
        around = len(self.frame_ids) - self.frame_tokens
        entries = {kind: num_frames * (kind + around) + num_text for kind in self.pages}
        return all(entries[kind] <= len(own) * self.page_size for kind, own in self.pages.items())

    def _part(self, ids: list[int], ends: list[int], num_frames: int) -> StreamPart:
        new = {kind: len(ids) - num_frames * (self.frame_tokens - kind) for kind in self.pages}
        pages = {kind: own[: -(-new[kind] // self.page_size)] for kind, own in self.pages.items()}
        return StreamPart(None, ids, ends, num_frames, 0.0, 0, 0, new, new, pages)


def pad(plan: StepPlan, shape: StepShape, padding: Padding, most_pages: dict[int, int]) -> StepPlan:
    """
    Return the plan of a step that is padded with dummy streams to a shape.

    Streams that see frames come first, then streams that speak, then one dummy stream with the frames and the text
    that are left over. All plans of a shape have lists of the same lengths.
    """
    length = len(padding.frame_ids)
    seeing = [part for part in plan.parts if part.num_frames]
    speaking = [part for part in plan.parts if not part.num_frames]
    seeing += [padding.frames(shape.frames)] * (shape.seeing - len(seeing))
    speaking += [padding.token()] * (shape.speaking - len(speaking))
    parts = seeing + speaking
    if shape.has_rest:
        parts.append(padding.frames(*left_over(plan.parts, shape, length)))
    return lay_out(parts, padding.page_size, shape.bounds(length, most_pages))


# --------------------------------------------------------------------------------------------------------------- run


def whether_to_capture(model: Any, capture: bool | None, compile_steps: bool) -> bool:
    """
    Return whether to capture steps: by default if they are to be compiled, or if the model is on one GPU.

    Raises:
        `ValueError`: If steps of a model on several devices are to be captured, or uncaptured ones compiled.
    """
    if compile_steps and capture is False:
        raise ValueError("`compile_steps` requires captured steps: leave `capture` out, or set it to `True`.")
    devices = devices_of(model)
    if len(devices) == 1:
        return devices[0].startswith("cuda") or compile_steps if capture is None else capture
    if capture or compile_steps:
        raise ValueError(
            f"Steps of a model on several devices, here {', '.join(devices)}, cannot be captured or compiled: leave "
            'out `capture` and `compile_steps`, or load the model on one device, such as `device_map="cuda:0"`.'
        )
    logger.warning(f"The model lies on {', '.join(devices)}: steps are not captured, and are slower on a GPU.")
    return False


class CapturedStep:
    """
    A step of one shape: on CUDA a graph that is replayed on its own tensors, elsewhere the same code.

    Args:
        step ([`PackedStep`]): A step of that shape. Other steps overwrite its inputs.
        shape ([`StepShape`]): The shape.
        padding ([`Padding`]): Makes dummy streams.
        most_pages (`dict[int, int]`): For each kind of layer, the most pages of a stream.
        run (`Callable`): Runs the step on its inputs.
    """

    def __init__(
        self,
        step: PackedStep,
        shape: StepShape,
        padding: Padding,
        most_pages: dict[int, int],
        run: Callable[[], StepOutputs],
    ) -> None:
        self.step, self.shape = step, shape
        self._padding, self._most_pages, self._run = padding, most_pages, run

    @torch.no_grad()
    def run(self, plan: StepPlan, features: torch.Tensor | None) -> tuple[StepPlan, StepOutputs]:
        """Run a step that fits the shape. Returns the padded plan and its outputs."""
        padded = pad(plan, self.shape, self._padding, self._most_pages)
        self.step.overwrite(padded, features)
        return padded, self._run()


class GraphCapture:
    """Captures functions as CUDA graphs on one stream and in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # Graphs can share memory, because the outputs of one are copied before another runs.
        self.pool = torch.cuda.graph_pool_handle()
        self._is_broken = False

    @torch.no_grad()
    def __call__(self, run: Callable[[], StepOutputs]) -> Callable[[], StepOutputs]:
        """
        Return a function that replays `run` as a graph and returns copies of its outputs.

        Raises:
            `RuntimeError`: If an earlier capture failed, except for lack of memory.
        """
        if self._is_broken:
            raise RuntimeError("an earlier capture failed, so nothing is captured any more")
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile, for example to copy frames.
            options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
            # torch does not return to the stream before if a capture becomes invalid, and its pool may then stay in
            # the middle of the capture.
            before = torch.cuda.current_stream()
            try:
                with _CAPTURING, _own_workspaces(), torch.cuda.graph(graph, **options):
                    outputs = run()
            except Exception as error:
                self._is_broken = not isinstance(error, torch.OutOfMemoryError)
                raise
            finally:
                torch.cuda.set_stream(before)

        def replay() -> StepOutputs:
            graph.replay()
            return StepOutputs(*(None if x is None else x.clone() for x in outputs))

        return replay


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """
    Let a capture allocate its cuBLAS workspaces in its own memory pool.

    torch keeps one workspace per stream, and a graph writes to its address. One that the warm-up allocated lies
    outside the pool, and torch frees it when other graphs are captured or deleted: a replay would write into foreign
    memory.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class CapturedSteps:
    """
    The captured steps of an engine, by shape. They are made by `warm_up`, or when first needed.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        pool ([`VideoLLMMoDPagePool`]): The pool of the streams' caches.
        spare ([`VideoLLMMoDPagedCache`]): An empty cache. Dummy streams write into its pages.
        most_pages (`dict[int, int]`): For each kind of layer, the most pages of a stream.
        device (`torch.device`): The model's device.
        frame_ids (`list[int]`): Tokens of a frame and the text around it.
        is_compiled (`bool`): Whether to compile the steps.
        output_router_scores (`bool`, *optional*, defaults to `False`): Whether steps return scores and kept tokens.
    """

    def __init__(
        self,
        model: Any,
        pool: VideoLLMMoDPagePool,
        spare: VideoLLMMoDPagedCache,
        most_pages: dict[int, int],
        device: torch.device,
        *,
        frame_ids: list[int],
        is_compiled: bool,
        output_router_scores: bool = False,
    ) -> None:
        self._output_router_scores = output_router_scores
        self._model, self._pool, self.spare, self._device = model, pool, spare, device
        self._most_pages, self._is_compiled = most_pages, is_compiled
        self._padding = Padding(
            frame_ids=frame_ids,
            pages={kind: table.pages for kind, table in spare.tables.items()},
            page_size=pool.page_size,
            frame_tokens=model.config.frame_num_tokens,
        )
        self.steps: dict[StepShape, CapturedStep] = {}
        self._capture = GraphCapture(device) if device.type == "cuda" else None
        self._failed: set[StepShape] = set()
        # `warm_up` has made the steps for up to this many streams. Other shapes of that size run uncaptured, so that
        # no stream waits for a capture.
        self._warm_size = 0

    def find(self, plan: StepPlan) -> CapturedStep | None:
        """
        Return the captured step for a plan, or `None` if it must run uncaptured.

        A step runs uncaptured if no shape fits, if a stream has more pages than captured steps have room for, if
        `warm_up` made other shapes for as many streams and left this one out, or if it could not be captured.
        """
        if any(len(own) > self._most_pages[kind] for part in plan.parts for kind, own in part.pages.items()):
            return None
        length = len(self._padding.frame_ids)
        shape = shape_for(plan, length)
        if shape is None or not self._padding.has_room(*left_over(plan.parts, shape, length)):
            return None
        was_left_out = size_for(max(shape.seeing, shape.speaking)) <= self._warm_size
        if shape in self.steps:
            return self.steps[shape]
        return None if was_left_out else self._make(shape)

    def _make(self, shape: StepShape) -> CapturedStep | None:
        """Return the captured step of a shape, made now if it does not exist, or `None` if it cannot be captured."""
        if shape not in self.steps and shape not in self._failed:
            try:
                self.steps[shape] = self._new(shape)
            except Exception as error:  # for example, too little memory is left for a graph
                self._failed.add(shape)
                logger.warning(f"Steps of {shape} run uncaptured: {error}{forget(error)}")
        return self.steps.get(shape)

    def warm_up(self, max_streams: int, stepping: Any) -> None:
        """
        Make the steps that up to `max_streams` live streams need most. Those that cannot be captured run uncaptured.

        Args:
            max_streams (`int`): Number of streams.
            stepping: A lock, held while a step is made.
        """
        sizes = [size for size in NUM_STREAMS if size <= size_for(max_streams)]
        shapes = [shape for size in sizes for shape in shapes_of(size) if size == 1 or shape.frames <= 1]
        progress = logging.tqdm(shapes, desc="warming up", unit=" steps")
        for shape in progress:
            with stepping:
                self._make(shape)
            if names := attention_in_use(self._device):
                progress.set_postfix_str(f"attention by {' and '.join(names)}")
        self._warm_size = max(self._warm_size, size_for(max_streams))
        # Compilation leaves hundreds of thousands of objects. Python would search them for garbage during a step,
        # which takes half a second.
        gc.collect()

    def _new(self, shape: StepShape) -> CapturedStep:
        parts = [self._padding.frames(shape.frames)] * shape.seeing + [self._padding.token()] * shape.speaking
        plan = pad(lay_out(parts, self._pool.page_size), shape, self._padding, self._most_pages)
        features, scores = self._no_features(shape.seeing * shape.frames), self._output_router_scores
        step = PackedStep(self._model, self._pool, plan, features, self._device, output_router_scores=scores)
        run = compile_step(step.forward) if self._is_compiled else step.forward
        run = run if self._capture is None else self._capture(run)
        return CapturedStep(step, shape, self._padding, self._most_pages, run)

    def _no_features(self, num_frames: int) -> torch.Tensor | None:
        """Return features of zeros, (1, frames, features, width), in the connector's dtype."""
        if num_frames == 0:
            return None
        config, weights = self._model.config, self._model.model.connector.parameters()
        dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)
        size = (1, num_frames, *config.frame_feature_shape)
        return torch.zeros(size, device=self._device, dtype=dtype)


__all__ = [
    "CapturedStep",
    "CapturedSteps",
    "GraphCapture",
    "Padding",
    "StepShape",
    "left_over",
    "pad",
    "shape_for",
    "shapes_of",
    "whether_to_capture",
]
