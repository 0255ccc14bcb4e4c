# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A folder of saved sessions, which several servers may share: each is complete, private, and removed in time."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time as clock
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging

from ..checks_videollm_mod import check_number
from ..outputs import sync, sync_all
from .presence import Presence


logger = logging.get_logger(__name__)

_DIGESTS = "digests.json"
_HOLDER = "server.txt"  # names the server at which a session goes on
# The hash of a secret, and when it was kept, in nanoseconds.
_COMPLETE = re.compile(r"([0-9a-f]{64})(?:\.(\d+))?")
_OPEN = ".session-"  # what the names of folders begin with that are written or read
# Such a folder that was taken, with the hash, the time of that and the server.
_TAKEN = re.compile(re.escape(_OPEN) + r"([0-9a-f]{64})\.(\d+)(\.server-[0-9a-f]{16})")
_BLOCK = 2**20  # bytes
_ABANDONED = 600.0  # seconds after which such a folder belongs to no process


class StateFolder:
    """
    Saved sessions on disk, each a folder named by the hash of a secret and the time of saving. Its time of
    modification is when it expires. Files that others have put there are left alone.

    A session that goes on at its server after it was saved is held by this server, as long as the server lives.

    Args:
        folder (`str` or `Path`): Where the sessions lie. It is made if needed.
        max_bytes (`int`): Most bytes of all sessions. For a session whose server ends, saves of sessions that go on
            make room, and then those that expire first. Nothing makes room for the save of a session that goes on.
        must_be_own (`bool`, *optional*, defaults to `False`): Whether the folder must belong to this user and nobody
            else may enter it, since others may write where it lies.

    Raises:
        `ValueError`: If nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int, *, must_be_own: bool = False) -> None:
        self.folder, self.max_bytes, self.must_be_own = Path(folder).absolute(), max_bytes, must_be_own
        self._lock, self._presence = threading.Lock(), Presence(self.folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.discard(self.begin())
        except OSError as error:
            raise ValueError(f"Sessions cannot be saved in '{folder}': {error.strerror}.") from None
        self.remove_expired()

    def begin(self) -> Path:
        """Return an empty folder, which only this user can read, for the files of a session."""
        self._check()
        return Path(tempfile.mkdtemp(prefix=_OPEN, dir=self.folder))

    def _check(self) -> None:
        """Raise `PermissionError` if the folder must be this user's and is not. Make it if it is gone."""
        if self.must_be_own:
            self.folder.mkdir(mode=0o700, exist_ok=True)  # systems remove old folders of temporary files
            found = self.folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(errno.EPERM, "others may write or read there", str(self.folder))

    def discard(self, place: Path) -> None:
        """Remove the files of a session, all at once for others that look for it."""
        gone = self.folder / f"{_OPEN}{secrets.token_hex(8)}"
        try:
            os.rename(place, gone)
        except OSError:
            return  # another server has taken or removed it
        shutil.rmtree(gone, ignore_errors=True)

    def commit(self, place: Path, secret: str, expires: float, *, is_held: bool = False) -> None:
        """
        Keep what was written into a folder of `begin` until a time, by `time.time()`. It replaces what was kept under
        this secret before, when it is on the disk. With `is_held` the session goes on here.

        Raises:
            `OSError`: If the disk fails. What was kept before stays.
            `ValueError`: If there is no room for it, or another server has the session now.
        """
        files = sorted(path for path in place.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o600)
        digests = {str(path.relative_to(place)): _digest(path) for path in files}
        with open(place / _DIGESTS, "w", encoding="utf-8", opener=_open_private) as file:
            json.dump(digests, file)
        sync_all(place)
        with self._lock:
            before = self._places_of(secret)
            if any(map(self.is_held_elsewhere, before)):
                raise ValueError("Another server has this session now.")
            if is_held:
                self._hold(place)
            self._make_room(_size(place), before, is_held=is_held)
            os.utime(place, (expires, expires))
            sync(place)
            # A process that is killed here leaves the one before or both, and the newest counts.
            os.rename(place, self._new_place(secret))
            sync(self.folder)
            for old in before:
                self.discard(old)

    def take(self, secret: str) -> Path | None:
        """
        Return the folder of the session that is kept under a secret, or `None` if there is none, or another server
        holds it. Nobody else can take it meanwhile.

        Raises:
            `OSError`: If a file or the folder cannot be read now. The session stays.
            `ValueError`: If one of its files is damaged, and the session is removed.
        """
        while kept := self._places_of(secret):
            with self._lock:
                taker = self._presence.show() or f".{secrets.token_hex(8)}"
            # If this process is killed meanwhile, others find it under this name.
            taken = self.folder / f"{_OPEN}{_hash(secret)}.{clock.time_ns()}{taker}"
            # Another server may have replaced it since.
            with suppress(FileNotFoundError):
                os.rename(place := kept.pop(), taken)
                break
        else:
            return None
        if self.is_held_elsewhere(taken):  # by a server that has just resumed it
            os.rename(taken, place)
            return None
        for old in kept:
            self.discard(old)
        if _has_expired(taken):
            self.discard(taken)
            return None
        try:
            damaged = _find_damaged(taken)
        except OSError:
            os.rename(taken, place)
            raise
        if damaged is not None:
            self.discard(taken)
            raise ValueError(f"{damaged} of a saved session is damaged.")
        return taken

    def peek(self, secret: str) -> Path | None:
        """Return the folder that is kept under a secret, or `None`. It stays. Raise `OSError` if nobody can tell."""
        kept = self._places_of(secret)
        return kept[-1] if kept and not _has_expired(kept[-1]) else None

    def renew(self, until: Mapping[str, float]) -> None:
        """Keep what is kept under these secrets until these times, by `time.time()`, if it can be reached."""
        times = {_hash(secret): time for secret, time in until.items()}
        with suppress(OSError):
            for name in filter(None, map(_COMPLETE.fullmatch, os.listdir(self.folder))):
                if name[1] in times:
                    with suppress(OSError):
                        os.utime(self.folder / name[0], (times[name[1]],) * 2)

    def extend(self, secret: str, until: float) -> None:
        """Keep what is kept under a secret at least until a time, unless it has expired or cannot be reached."""
        with suppress(OSError):
            place = self.peek(secret)
            if place is not None and _expiry(place) < until:
                os.utime(place, (until, until))

    def remove(self, secret: str) -> None:
        """Remove what is kept under a secret, if it can be reached and no other server holds it."""
        with suppress(OSError):
            for place in self._places_of(secret):
                if not self.is_held_elsewhere(place):
                    self.discard(place)

    def put_back(self, taken: Path, secret: str, *, held_until: float | None = None) -> None:
        """Keep a session that `take` returned under its secret again. With a time it goes on here, until then."""
        if held_until is not None:
            with self._lock:
                self._hold(taken)
            os.utime(taken, (held_until, held_until))
            sync(taken)
        os.rename(taken, self._new_place(secret))
        sync(self.folder)

    def went_on(self, place: Path) -> bool:
        """Whether a session went on after it was saved, so that the files do not have what came then."""
        return (place / _HOLDER).is_file()

    def is_held_elsewhere(self, place: Path) -> bool:
        """Whether a session goes on at another server, which lives."""
        return self._is_held(place, self._presence.is_of_another)

    def release(self) -> None:
        """Hold no session any more, since this server ends."""
        with self._lock:
            self._presence.end()

    def remove_expired(self) -> None:
        """Remove sessions whose time is over, and what processes that ended in the middle have left."""
        self._check()
        self._presence.remove_dead()
        for place in self._places():
            if _has_expired(place, 0.0 if _COMPLETE.fullmatch(place.name) else _ABANDONED):
                self.discard(place)

    def _is_held(self, place: Path, lives: Callable[[str], bool]) -> bool:
        try:
            return lives((place / _HOLDER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        except OSError:  # nobody can tell
            return True

    def _hold(self, place: Path) -> None:
        with open(place / _HOLDER, "w", encoding="utf-8", opener=_open_private) as file:
            file.write(self._presence.show())
        sync(place / _HOLDER)

    def _new_place(self, secret: str) -> Path:
        return self.folder / f"{_hash(secret)}.{clock.time_ns()}"

    def _places_of(self, secret: str) -> list[Path]:
        """Return where a session is kept under a secret, the newest last. A process that was killed may leave two."""
        found = []
        for name in os.listdir(self.folder):
            complete, taken = _COMPLETE.fullmatch(name), _TAKEN.fullmatch(name)
            match = complete or taken
            if match and match[1] == _hash(secret) and (complete or not self._presence.lives(taken[3])):
                found.append((int(match[2] or 0), name))
        return [self.folder / name for _, name in sorted(found)]

    def _places(self) -> Iterator[Path]:
        for place in list(self.folder.iterdir()):
            if (_COMPLETE.fullmatch(place.name) or place.name.startswith(_OPEN)) and place.is_dir():
                yield place

    def _make_room(self, size: int, replaced: list[Path], *, is_held: bool) -> None:
        if size > self.max_bytes:
            raise ValueError(f"It has {size} bytes, and all saved sessions may have {self.max_bytes}.")
        kept = [place for place in self._places() if _COMPLETE.fullmatch(place.name) and place not in replaced]
        # A session that goes on has more than its save.
        order = sorted(kept, key=lambda place: (not self._is_held(place, self._presence.lives), _expiry(place)))
        sizes = {place: _size(place) for place in order}
        total, num_removed = sum(sizes.values()) + size, 0
        if is_held and total > self.max_bytes:
            raise ValueError(f"There is no room for its {size} bytes: all saved sessions may have {self.max_bytes}.")
        while total > self.max_bytes:
            self.discard(place := order.pop(0))
            total, num_removed = total - sizes[place], num_removed + 1
        if num_removed:
            logger.warning(f"Saved sessions removed: {num_removed}. All may have {self.max_bytes} bytes.")


def own_folder(server: str, max_bytes: int) -> StateFolder | None:
    """
    Return a folder for the sessions of a server that was given none, or `None` with a warning if there can be none. It
    lies among the temporary files of the system, and only this user can enter it.

    Args:
        server (`str`): What tells servers apart. The next one with the same text gets the same folder.
        max_bytes (`int`): Most bytes of all sessions.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"  # Windows has such a folder for each user
    start, shared = f"videollm-mod-{user}-", Path(tempfile.gettempdir())
    options = {"max_bytes": max_bytes, "must_be_own": hasattr(os, "getuid")}
    try:
        folder = StateFolder(shared / f"{start}{_hash(server)[:12]}", **options)
    except ValueError as error:
        logger.warning(f"{error} So sessions end with the server: name another folder with `--state-dir`.")
        return None
    # Of servers that were not started again.
    for other in set(shared.glob(f"{start}*")) - {folder.folder}:
        with suppress(ValueError, OSError):
            StateFolder(other, **options)
    return folder


def check_saving(save_seconds: float | None, state_dir: str | os.PathLike | None) -> None:
    """Raise `ValueError` if sessions are to be saved while they go on, and the interval is wrong or has no folder."""
    if save_seconds is not None:
        check_number("save_seconds", save_seconds, above=0)
        if state_dir is None:
            raise ValueError("`save_seconds` needs `state_dir`, the folder in which sessions are saved.")


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _find_damaged(place: Path) -> str | None:
    """Return the name of a file that is not as it was written, or `None`. Raise `OSError` if nobody can tell now."""
    name = _DIGESTS
    try:
        for name, digest in json.loads((place / _DIGESTS).read_text(encoding="utf-8")).items():
            if _digest(place / name) != digest:
                return name
    except (FileNotFoundError, ValueError, AttributeError):
        return name
    return None


# Another server may remove a session at any time.
def _size(place: Path) -> int:
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _expiry(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    except OSError:  # nobody can tell
        return math.inf


def _has_expired(place: Path, after: float = 0.0) -> bool:
    return _expiry(place) + after < clock.time()


__all__ = ["StateFolder", "check_saving", "own_folder"]
