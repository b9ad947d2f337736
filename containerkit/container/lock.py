"""The lock on a container's directory: one start, removal or repair at a time, over all processes and threads."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.linux.locks import locked, same_file
from containerkit.linux.tree import make_directory

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def alone(directory: str) -> Iterator[int]:
    """Hold the lock; waits for it, and makes the directory where it is missing.

    Gives the fd that holds it: handed to a starter, it keeps the lock until the start is over, even if the caller dies.
    """
    while True:
        make_directory(directory, 0o710)
        with _held(directory, fcntl.LOCK_EX) as fd:
            if fd >= 0:
                yield fd
                return


@contextmanager
def if_alone(directory: str) -> Iterator[bool]:
    """Hold the lock if nobody does and the directory is there: whether it is held."""
    with _held(directory, fcntl.LOCK_EX | fcntl.LOCK_NB) as fd:
        yield fd >= 0


@contextmanager
def _held(directory: str, operation: int) -> Iterator[int]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield -1
        return
    try:
        yield fd if locked(fd, operation) and same_file(fd, directory) else -1
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that another thread forked meanwhile holds it, too
        os.close(fd)
