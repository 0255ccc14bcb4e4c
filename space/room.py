# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The seats of the page: who watches what, up to a largest number of people."""

import threading
import time as clock
from collections.abc import Callable
from pathlib import Path

from viewer import Viewer


class RoomIsFull(Exception):
    """Raised when there is no free seat."""


class Room:
    """
    The streams of all open pages, by session. People do not see each other's streams.

    Args:
        seats (`int`): Largest number of people at once.
        patience (`float`, *optional*, defaults to 60.0): Seconds without a frame or a question after which a person
            can lose the seat. If all seats are taken, the person idle for longest loses it to a new one.
        on_leave (`Callable`, *optional*): Called with the [`Viewer`] of a person who leaves.
    """

    def __init__(
        self, seats: int, *, patience: float = 60.0, on_leave: Callable[[Viewer], None] | None = None
    ) -> None:
        self.seats, self.patience, self.on_leave = seats, patience, on_leave
        self._viewers: dict[str, Viewer] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._viewers)

    def enter(self, name: str, viewer: Viewer) -> None:
        """
        Give a session a seat. A session that has one keeps it, and its earlier stream ends.

        Raises:
            [`RoomIsFull`]: If there is no seat. An earlier stream then goes on.
        """
        with self._lock:
            others = {key: other for key, other in self._viewers.items() if key != name}
            if len(others) >= self.seats:
                idlest = min(others, key=lambda key: others[key].last_active)
                if clock.monotonic() - others[idlest].last_active > self.patience:
                    del others[idlest]
            if len(others) >= self.seats:
                raise RoomIsFull(f"All {self.seats} seats are taken. Try again in a minute.")
            gone = [other for key, other in self._viewers.items() if key not in others]
            self._viewers = {**others, name: viewer}
        for other in gone:
            self._let_go(other)

    def watches(self, video: Path) -> bool:
        """Return whether any stream reads a file."""
        return any(viewer.video == video for viewer in list(self._viewers.values()))

    def find(self, name: str) -> Viewer | None:
        """Return the viewer of a session, if it has one."""
        return self._viewers.get(name)

    def leave(self, name: str) -> None:
        """Free the seat of a session."""
        with self._lock:
            viewer = self._viewers.pop(name, None)
        if viewer is not None:
            self._let_go(viewer)

    def _let_go(self, viewer: Viewer) -> None:
        viewer.close()
        if self.on_leave is not None:
            self.on_leave(viewer)
