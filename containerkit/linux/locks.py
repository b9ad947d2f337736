"""Locks on files (``flock(2)``) that end with their holder, and the check that such a file is still the one at a path.

Whoever waited for a lock may find that its file was replaced or removed meanwhile: lock, then look, else begin again.
"""

from __future__ import annotations

import fcntl
import os


def locked(fd: int, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Take the lock of a file, by default exclusively and without waiting; False where another holds it."""
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        return False
    return True


def same_file(fd: int, path: str) -> bool:
    """Whether ``path`` is still the file or directory that was opened."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
