# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A step compiled by `torch.compile`, for inputs that always lie in the same tensors."""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from .step import StepOutputs


def compile_step(forward: Callable[[], StepOutputs]) -> Callable[[], StepOutputs]:
    """
    Return the compiled `forward` of a [`PackedStep`], which reads the step's own tensors at every call.

    Args:
        forward (bound method): It is called once before it is compiled, so that kernels are chosen outside the graph.
    """
    forward()
    compiler = _RecordingCompiler()
    given = torch.compile(_with_own_code(forward), fullgraph=True, dynamic=False, backend=compiler)()
    return forward if compiler.code is None else _replay(compiler, given)


def _with_own_code(forward: MethodType) -> MethodType:
    """
    Step 1: copy the method's code object.

    Dynamo stores compiled code with a code object and limits how often it compiles one. Steps of different shapes
    would share and exhaust that limit.
    """
    function = forward.__func__
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return MethodType(own, forward.__self__)


class _RecordingCompiler:
    """
    Step 2: a backend that compiles with Inductor and keeps the code, its inputs and its outputs.

    Attributes:
        code (`Callable`, *optional*): The compiled code, or `None` if Dynamo is switched off.
        inputs (`tuple[torch.Tensor, ...]`): All tensors that the step reads, weights included.
        outputs (`tuple[torch.Tensor, ...]`): What the code returned for them.
    """

    def __init__(self) -> None:
        self.code: Callable[..., tuple] | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.outputs: tuple[Any, ...] = ()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., tuple]:
        from torch._inductor.compile_fx import compile_fx  # importing it takes a second

        # The inputs are always the same tensors, so checking their sizes at every call is wasted time.
        code = compile_fx(graph, inputs, config_patches={"size_asserts": False})

        def run(*tensors: torch.Tensor) -> tuple:
            outputs = code(*tensors)
            self.code, self.inputs, self.outputs = code, tensors, outputs
            return outputs

        return run


def _replay(compiler: _RecordingCompiler, given: StepOutputs) -> Callable[[], StepOutputs]:
    """
    Step 3: return a function that calls the compiled code directly with the recorded inputs.

    Dynamo would gather and guard a hundred tensors at every call, which takes a tenth of a step.
    """
    code, inputs = compiler.code, compiler.inputs
    places = {id(x): place for place, x in enumerate(compiler.outputs)}
    order = [None if x is None else places[id(x)] for x in given]
    # Dynamo keeps every backend for ever, and with it what the backend keeps.
    compiler.code, compiler.inputs, compiler.outputs = None, (), ()

    def replay() -> StepOutputs:
        outputs = code(*inputs)
        return StepOutputs(*(None if place is None else outputs[place] for place in order))

    return replay


__all__ = ["compile_step"]
