# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The seats of the page: who watches what, up to a largest number of people."""

import threading
import time as clock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from viewer import Viewer


def address_of(request: Request, proxies: int | None) -> str | None:
    """
    Return where a person's browser is, `None` if that is not known.

    Each proxy adds the address that it serves at the end of `X-Forwarded-For`. What stands before that came with the
    request, and anybody can write it.

    Args:
        request (`Request`): The request.
        proxies (`int`, *optional*): Number of own proxies before the page, `None` if nobody knows.
    """
    if proxies is None:
        return None
    told = ",".join(request.headers.getlist("x-forwarded-for")).split(",")
    if 0 < proxies <= len(told) and (address := told[-proxies].strip()):
        return address.partition(":")[0] if address.count(":") == 1 else address  # without a port
    return request.client and request.client.host


class RoomIsFull(Exception):
    """Raised when there is no free seat."""


@dataclass
class Seat:
    """
    A taken seat.

    Args:
        viewer ([`Viewer`]): The person's stream.
        address (`str`, *optional*): Where the person's browser is.
        last_call (`float`): When the page last called, by the monotonic clock. An open page calls twice a second.
    """

    viewer: Viewer
    address: str | None
    last_call: float


class Room:
    """
    The streams of all open pages, by session. People do not see each other's streams.

    Args:
        seats (`int`): Largest number of people at once.
        per_address (`int`, *optional*): Largest number of them from one network address. There is no limit by default.
        patience (`float`, *optional*, defaults to 60.0): Seconds without a frame or a question after which a person
            can lose the seat. If all seats are taken, the person idle for longest loses it to a new one.
        absence (`float`, *optional*, defaults to 5.0): Seconds without a call after which a page is taken to be
            closed or reloaded. It then loses its seat if a person from the same address needs one.
        on_leave (`Callable`, *optional*): Called with the [`Viewer`] of a person who leaves.
    """

    def __init__(
        self,
        seats: int,
        *,
        per_address: int | None = None,
        patience: float = 60.0,
        absence: float = 5.0,
        on_leave: Callable[[Viewer], None] | None = None,
    ) -> None:
        self.seats, self.per_address = seats, per_address
        self.patience, self.absence, self.on_leave = patience, absence, on_leave
        self._taken: dict[str, Seat] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._taken)

    def enter(self, name: str, viewer: Viewer, *, address: str | None = None) -> None:
        """
        Give a session a seat. A session that has one keeps it, and its earlier stream ends.

        Raises:
            [`RoomIsFull`]: If there is no seat. An earlier stream then goes on.
        """
        with self._lock:
            others = {key: seat for key, seat in self._taken.items() if key != name}
            self._free(others, address)
            gone = [seat.viewer for key, seat in self._taken.items() if key not in others]
            self._taken = {**others, name: Seat(viewer, address, clock.monotonic())}
        for other in gone:
            self._let_go(other)

    def _free(self, others: dict[str, Seat], address: str | None) -> None:
        """Remove at most one of the taken seats so that one more may enter from an address, or raise."""
        now = clock.monotonic()
        near = {key: seat for key, seat in others.items() if address is not None and seat.address == address}
        is_crowded = self.per_address is not None and len(near) >= self.per_address
        if not is_crowded and len(others) < self.seats:
            return
        absent = min(near, key=lambda key: near[key].last_call, default=None)
        if absent is not None and now - near[absent].last_call > self.absence:
            del others[absent]
        elif is_crowded:
            raise RoomIsFull(f"Your address has {len(near)} streams, the most. Close one, or try again in a minute.")
        else:
            idlest = min(others, key=lambda key: others[key].viewer.last_active, default=None)
            if idlest is None or now - others[idlest].viewer.last_active <= self.patience:
                raise RoomIsFull(f"All {self.seats} seats are taken. Try again in a minute.")
            del others[idlest]

    def watches(self, video: Path) -> bool:
        """Return whether any stream reads a file."""
        return any(seat.viewer.video == video for seat in list(self._taken.values()))

    def find(self, name: str) -> Viewer | None:
        """Return the viewer of a session that calls, if it has one."""
        seat = self._taken.get(name)
        if seat is None:
            return None
        seat.last_call = clock.monotonic()
        return seat.viewer

    def leave(self, name: str) -> None:
        """Free the seat of a session."""
        with self._lock:
            seat = self._taken.pop(name, None)
        if seat is not None:
            self._let_go(seat.viewer)

    def _let_go(self, viewer: Viewer) -> None:
        viewer.close()
        if self.on_leave is not None:
            self.on_leave(viewer)
