"""What an attempt to bring an image in has brought so far: notes that keep it for the next attempt.

A pull that fails or is killed has brought blobs and layers that are whole, and that no image reaches. Each was noted,
just before it got its name, in a file ``ROOT/ingest/partial-pull-RANDOM`` of lines ``KIND DIGEST``, under a lock
(flock(2)) that ends with its writer. A collection treats that file as the partial download that it is: while it is
young, what it names stays, and then both go together. An image that gets its row is struck out of everybody's notes,
so that nothing keeps its content once it is removed.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from containerkit.errors import InvalidImage, LayerError, LimitExceeded, PlatformMismatch, StateError
from containerkit.image.store.ingest import PARTIAL, is_full
from containerkit.image.store.inventory import Content, Inventory
from containerkit.image.store.leases import BLOB, LAYER
from containerkit.linux.locks import locked, same_file
from containerkit.linux.paths import write_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.state import State

NOTES = f"{PARTIAL}pull-"
_NS = 1_000_000_000
#: What was brought is right, and the image is not: the next attempt would fare no better.
_REFUSED = (InvalidImage, LayerError, LimitExceeded, PlatformMismatch)


class Attempt:
    """The notes of one attempt; threads may share it. There is no file before there is something to note."""

    def __init__(self, root: str) -> None:
        self._directory = os.path.join(root, "ingest")
        self._guard = threading.Lock()
        self._noted: set[tuple[str, str]] = set()
        self._fd = -1
        self._path = ""

    def note(self, kind: str, digest: str) -> None:
        """Note a blob or layer that is about to get its name. Where there is no room for notes, nothing is kept."""
        with self._guard, suppress(OSError):
            if (kind, digest) not in self._noted:
                if self._fd < 0:
                    self._fd, self._path = _open_new(self._directory)
                write_all(self._fd, f"{kind} {digest.rpartition(':')[2] if kind == LAYER else digest}\n".encode())
                self._noted.add((kind, digest))

    def end(self, error: BaseException | None = None) -> bool:
        """Whether what was brought is kept: where ``error`` ended the attempt, and another one may fare better.

        Not where the disk is full, as partial downloads are not, nor where the image itself was refused.
        """
        keep = error is not None and not isinstance(error, (*_REFUSED, StateError)) and not is_full(error)
        with self._guard:
            if self._fd >= 0:
                if not keep:
                    with suppress(FileNotFoundError):
                        os.unlink(self._path)
                _close(self._fd)
                self._fd = -1
        return keep


def kept(state: State, age: float) -> frozenset[Content]:
    """What the notes keep that are younger than ``age`` seconds; what is kept is there, or was."""
    found: set[Content] = set()
    for path in _notes(state):
        with suppress(FileNotFoundError):
            if time.time_ns() - os.lstat(path).st_mtime_ns < age * _NS:
                found |= _read(path)
    return frozenset(found)


def settle(state: State) -> None:
    """Strike out of all notes, but for those of running attempts, what an image reaches by now.

    Raises :class:`~containerkit.errors.StateError` and ``OSError``.
    """
    reached: frozenset[Content] | None = None
    for path in _notes(state):
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if locked(fd) and same_file(fd, path):
                    if reached is None:
                        reached = frozenset().union(*(image.content for image in Inventory(state).images()))
                    _strike(fd, path, reached)
            finally:
                _close(fd)


def _strike(fd: int, path: str, reached: frozenset[Content]) -> None:
    noted = _read(path)
    left = noted - reached
    if not left:
        os.unlink(path)
    elif left != noted:
        status = os.fstat(fd)
        os.ftruncate(fd, 0)
        write_all(fd, "".join(f"{kind} {key}\n" for kind, key in sorted(left)).encode())
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def _notes(state: State) -> Iterator[str]:
    return (state.path("ingest", name) for name in os.listdir(state.path("ingest")) if name.startswith(NOTES))


def _read(path: str) -> set[Content]:
    """What notes name. A power failure may have left anything in them."""
    with open(path, encoding="ascii", errors="replace") as file:
        rows = [line.split() for line in file]
    return {Content(*row) for row in rows if len(row) == len(Content._fields) and row[0] in (BLOB, LAYER)}


def _open_new(directory: str) -> tuple[int, str]:
    while True:
        fd, path = tempfile.mkstemp(prefix=NOTES, dir=directory)
        if locked(fd) and same_file(fd, path):
            return fd, path
        os.close(fd)  # a collection was faster


def _close(fd: int) -> None:
    with suppress(OSError):
        locked(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile shares the lock
    os.close(fd)
