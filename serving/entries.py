# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Where the entries of several streams lie in pages during one step, as lists and on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from .pages import strip_of


# Numbers for the device, and their dtype there.
Numbers = tuple[Sequence[float], torch.dtype]


@dataclass(frozen=True)
class EntryPlan:
    """
    Where the entries of several streams lie in the layers of one kind during one step, as plain lists.

    Attributes:
        new (`list[int]`): Number of entries that each stream adds.
        lengths (`list[int]`): Number of entries of each stream, including those that it adds.
        pages (`list[list[int]]`): Pages of each stream, in order.
        is_padding (`list[bool]`): Whether each stream only pads a captured step. Its attention is never read.
        page_size (`int`): Entries per page.
    """

    new: list[int]
    lengths: list[int]
    pages: list[list[int]]
    is_padding: list[bool]
    page_size: int

    @cached_property
    def strips(self) -> list[int | None]:
        """For each stream, the slot of its first entry if its pages are consecutive, else `None`."""
        return [strip_of(own, self.page_size) for own in self.pages]

    @property
    def slots(self) -> list[int]:
        """Slot of each new entry in the flattened pages."""
        size = self.page_size
        return [
            own[place // size] * size + place % size
            for count, length, own in zip(self.new, self.lengths, self.pages, strict=True)
            for place in range(length - count, length)
        ]

    def numbers(self, num_columns: int | None = None) -> list[Numbers]:
        """
        Return the numbers that kernels need on the device, in the order of the tensors of [`PackedEntries`].

        Args:
            num_columns (`int`, *optional*): Width of the page table, by default the most pages of a stream.
        """
        width = num_columns or max((len(own) for own in self.pages), default=1)
        table = [page for own in self.pages for page in (*own, *[0] * (width - len(own)))]
        begins, key_begins = [0, *accumulate(self.new)], [0, *accumulate(self.lengths)]
        short = (begins, self.lengths, key_begins, table, self.is_padding)
        return [(self.slots, torch.long), *((numbers, torch.int32) for numbers in short)]


class PackedEntries:
    """
    An [`EntryPlan`] with its numbers on the device, for kernels.

    A captured step overwrites the tensors and keeps the rest. In such a step `plan` is therefore the plan of the step
    that was captured, and kernels must read the tensors.

    Args:
        plan ([`EntryPlan`]): The plan.
        tensors (`Sequence[torch.Tensor]`): Its `numbers`, on the device.
        most_new (`int`, *optional*): Upper bound of `plan.new`, also for later plans. By default the largest.
        is_captured (`bool`, *optional*, defaults to `False`): Whether the tensors are overwritten later.

    Attributes:
        slots (`torch.LongTensor` of shape `(all new,)`): Slot of each new entry in the flattened pages.
        begins (`torch.IntTensor` of shape `(streams + 1,)`): Cumulative `new`, from 0.
        used (`torch.IntTensor` of shape `(streams,)`): `lengths`.
        key_begins (`torch.IntTensor` of shape `(streams + 1,)`): Cumulative `lengths`, from 0.
        table (`torch.IntTensor` of shape `(streams, pages)`): `pages`, padded with zeros.
        is_padding (`torch.IntTensor` of shape `(streams,)`): `is_padding`.
    """

    def __init__(
        self,
        plan: EntryPlan,
        tensors: Sequence[torch.Tensor],
        *,
        most_new: int | None = None,
        is_captured: bool = False,
    ) -> None:
        self.plan, self.is_captured = plan, is_captured
        self.most_new = max(plan.new, default=0) if most_new is None else most_new
        self.slots, self.begins, self.used, self.key_begins, table, self.is_padding = tensors
        self.table = table.unflatten(0, (len(plan.pages), -1))

    def by_stream(self, query: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return new queries (all new, heads, dim) padded to (streams, length, heads, dim), and for each query the
        indices of its stream and of its place there.
        """
        streams, begins = self.table.shape[0], self.begins.long()
        index = torch.arange(query.shape[0], device=query.device)
        row = torch.bucketize(index, begins[1:], right=True).clamp(max=streams - 1)
        place = index - begins[row]
        return query.new_zeros(streams, length, *query.shape[1:]).index_put((row, place), query), row, place


__all__ = ["EntryPlan", "Numbers", "PackedEntries"]
