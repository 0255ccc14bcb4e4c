# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Tell which servers that share a folder still run.

Each server locks a file there, and the system unlocks it when the server ends.
"""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

_START = ".server-"
_NAME = re.compile(_START.replace(".", r"\.") + "[0-9a-f]{16}")


class Presence:
    """
    Shows other servers that this one lives, also if it is ended by `kill -9`.

    Args:
        folder (`Path`): The folder that they share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._name, self._file = folder, None, None

    def show(self) -> str:
        """Return the name of this server in the folder, `""` if files cannot be locked there."""
        while self._name is None:
            name = f"{_START}{secrets.token_hex(8)}"
            new = self.folder / f"{name}.new"
            file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                _lock(file)
                os.rename(new, self.folder / name)  # nobody sees it without its lock under this name
                self._name, self._file = name, file
            except OSError as error:
                os.close(file)
                if isinstance(error, FileNotFoundError):
                    continue  # another server has removed it before it was locked
                with suppress(OSError):
                    new.unlink()
                self._name = ""
                logger.warning(
                    f"Files in '{self.folder}' cannot be locked ({error}). Other servers that share it do not see "
                    "that this one lives, and may resume its sessions meanwhile."
                )
        return self._name

    def lives(self, name: str) -> bool:
        """Whether a name is that of a server that lives, which may be this one."""
        return bool(name) and (name == self._name or self.is_of_another(name))

    def is_of_another(self, name: str) -> bool:
        """Whether a name is that of another server that lives."""
        if name == self._name or fcntl is None or not _NAME.fullmatch(name):
            return False
        return not _is_free(self.folder / name)

    def end(self) -> None:
        """Show that this server has no sessions any more."""
        if self._file is not None:
            with suppress(OSError):
                (self.folder / self._name).unlink()
            os.close(self._file)
        self._name = self._file = None

    def remove_dead(self) -> None:
        """Remove the files of servers that do not live."""
        for path in self.folder.glob(f"{_START}*"):
            if fcntl is not None and path.name != self._name and _is_free(path):
                with suppress(OSError):
                    path.unlink()


def _lock(file: int) -> None:
    if fcntl is None:
        raise OSError("this system has no such locks")
    fcntl.flock(file, fcntl.LOCK_EX)


def _is_free(path: Path) -> bool:
    """Return whether no process has locked a file, or it is gone. Any other error does not tell that."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # this process may have too many files open
        return False
    try:
        # Several servers may ask at once.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


__all__ = ["Presence"]
