# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a benchmark: what is held now, the peak, and the bytes of a weight."""

import ctypes
import gc
import resource
from pathlib import Path

import torch
from common import is_gpu


# Writing "5" to this file resets the peak that Linux counts for the process.
_CLEAR = Path("/proc/self/clear_refs")


def free(device: str) -> None:
    """Release the memory of models that are no longer used. An engine and its captured steps form a cycle."""
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()


def held_gb(device: str) -> float:
    """Return the gigabytes held now: by tensors on a GPU, otherwise by the process (Linux only)."""
    if is_gpu(device):
        return torch.cuda.memory_allocated() / 1e9
    if not _CLEAR.exists():
        return 0.0
    # glibc keeps freed memory until it is asked to return it.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    return process_bytes() / 1e9


def reset_peak(device: str) -> None:
    """Start a new measurement of the peak."""
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")


def peak_gb(device: str) -> float | None:
    """Return the peak in gigabytes since `reset_peak`: of tensors on a GPU, otherwise of the process (Linux only)."""
    if is_gpu(device):
        return torch.cuda.max_memory_allocated() / 1e9
    if not _CLEAR.exists():
        return None
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) / 1e9 for line in lines if line.startswith("VmHWM:"))


def process_bytes(pid: int | None = None) -> int:
    """
    Return the bytes that a process holds now, by default this one.

    Where the system does not report it: the peak of this process, 0 for another one.
    """
    try:
        return (
            int(Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
        )
    except OSError:
        if pid is not None:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def own_bytes() -> int:
    """
    Return the bytes that this process holds now without pages of files, such as libraries, which the system may drop
    and read again. Where the system does not report it: all that the process holds.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return process_bytes()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), process_bytes())


class _MallocState(ctypes.Structure):
    """What glibc's `mallinfo2` returns, by its names."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ) + (("keepcost", ctypes.c_size_t),)


def used_bytes() -> int:
    """
    Return the bytes that malloc has given to this process and that were not freed. The rest of `own_bytes` is mostly
    freed memory, which malloc keeps. Where malloc does not report it: 0.
    """
    report = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if report is None:  # no glibc, or one before 2.33
        return 0
    report.restype = _MallocState
    state = report()
    return state.uordblks + state.hblkhd


def stored_bytes(weight: torch.Tensor) -> int:
    """Return the bytes of a weight in memory, including the scales of a weight in eight bits."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
