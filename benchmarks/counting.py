# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Counts what a step does: kernel launches, and the bytes that its operations read and write."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# Operations that only describe memory in another way, or allocate it.
VIEWS = {
    *("view", "_unsafe_view", "reshape", "as_strided", "alias", "detach", "lift_fresh", "expand", "permute"),
    *("transpose", "t", "unsqueeze", "squeeze", "flatten", "unflatten", "unfold", "select", "slice", "narrow"),
    *("split", "split_with_sizes", "chunk", "unbind", "empty", "empty_like", "new_empty", "empty_strided"),
    "_local_scalar_dense",
}
# Operations that read only some rows of their first argument, and as many bytes as they return.
READ_ROWS = {"embedding", "index_select", "index", "gather"}
# Operations that write rows into their first argument, and leave the rest of it alone.
WRITE_ROWS = {"index_copy_", "index_put_", "scatter_"}


class CountOperations(TorchDispatchMode):
    """
    Count the operations that compute something, and the bytes that they read and write.

    An operation reads each element of its arguments once, and writes each element of its result once.

    Attributes:
        counts (`Counter[str]`): Operations by name.
        num_bytes (`int`): Bytes read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name not in VIEWS:
            self.counts[name] += 1
            self.num_bytes += _moved(name, [*args, *(kwargs or {}).values()], result)
        return result


def _moved(name: str, args: list[Any], result: Any) -> int:
    """Return the bytes that an operation reads and writes."""
    given = {id(x): x for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
    written = sum(map(_bytes, {id(x): x for x in tree_leaves(result) if isinstance(x, torch.Tensor)}.values()))
    read = sum(map(_bytes, given.values()))
    first = _bytes(args[0]) if args and isinstance(args[0], torch.Tensor) else 0
    if name in READ_ROWS:
        return read - first + 2 * written
    if name in WRITE_ROWS:
        return 2 * (read - first)
    return read + written - (first if name == "copy_" else 0)


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the different elements of a tensor: an expanded dimension counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return 0 if tensor.numel() == 0 else torch.Size(sizes).numel() * tensor.element_size()
