# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The room in which people watch: so many seats, and nobody sees another's stream."""

import threading
import time as clock
from collections.abc import Callable
from pathlib import Path

from viewer import Viewer


class RoomIsFull(Exception):
    """Nobody more can be let in now."""


class Room:
    """
    Who watches, by the name of their page. Nobody sees another's stream.

    Args:
        seats (`int`): Most people at once.
        patience (`float`, *optional*, defaults to 60.0): Seconds in which nothing was seen or asked, after which the
            one who has done nothing for longest loses the seat to somebody who wants it.
        on_leave (`Callable`, *optional*): Called with the viewer of who leaves.
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
        Gives somebody a seat, in place of the one they had.

        Raises:
            [`RoomIsFull`]: If there is none; what they had is left as it is.
        """
        with self._lock:
            others = {key: other for key, other in self._viewers.items() if key != name}
            if len(others) >= self.seats:
                idlest = min(others, key=lambda key: others[key].last_active)
                if clock.monotonic() - others[idlest].last_active > self.patience:
                    del others[idlest]
            if len(others) >= self.seats:
                raise RoomIsFull(
                    f"{self.seats} people are watching, and there is no seat free. Try again in a minute."
                )
            gone = [other for key, other in self._viewers.items() if key not in others]
            self._viewers = {**others, name: viewer}
        for other in gone:
            self._let_go(other)

    def watches(self, video: Path) -> bool:
        """Whether anybody watches a file."""
        return any(viewer.video == video for viewer in list(self._viewers.values()))

    def find(self, name: str) -> Viewer | None:
        """Whose page it is, if they watch."""
        return self._viewers.get(name)

    def leave(self, name: str) -> None:
        """The page was closed."""
        with self._lock:
            viewer = self._viewers.pop(name, None)
        if viewer is not None:
            self._let_go(viewer)

    def _let_go(self, viewer: Viewer) -> None:
        viewer.close()
        if self.on_leave is not None:
            self.on_leave(viewer)
