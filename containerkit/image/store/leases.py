"""What keeps content from being collected while somebody works with it: leases. And when an image was last used.

A lease is a set of locks on bytes of the file ``ROOT/ingest.lock`` (open file description locks, fcntl(2)), one byte
for each blob and layer, at an offset that its digest gives. Whoever looks for content under a lease first takes a
shared lock on its byte; whoever collects takes it exclusively, without waiting, or leaves the content alone. So:

- what a lease has looked for stays, from that moment on, whether it was there already or comes later;
- nobody waits for anybody's work: a collection removes all else while pulls go on;
- a lease ends with its process, for the kernel drops the locks; nothing is written, not even an inode.

One more byte says when the lease began. A file in ``ROOT/ingest`` that is older than every lease has no owner.

A lease with a name outlives its process: at its end, what it holds is written to the database.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.database import Database
    from containerkit.image.store.attempts import Attempt
    from containerkit.state import State

BLOB, LAYER = "blob", "layer"
_PLACES = {BLOB: 0, LAYER: 1 << 56}
_HEX_DIGITS = 14  # of a digest: 56 bits; two of one place would only spare each other
_BEGINNINGS = 1 << 62
_FLOCK = "=hhxxxxqqixxxx"  # struct flock of 64-bit Linux: type, whence, start, length, pid (which must be 0)
#: The kernel stamps files with a clock that ticks coarsely, so a file may look older than the lease that made it.
_COARSE_US = 1_000_000
_US = 1000
_NS = 1_000_000_000
MINUTE = 60.0


class Lease:
    """What one lease holds. Made by :func:`lease`; threads may share it."""

    def __init__(self, root: str, attempt: Attempt | None = None) -> None:
        self.held: set[tuple[str, str]] = set()
        #: Told of what is brought in meanwhile.
        self.attempt = attempt
        self._fd = open_locks(root, looking=True)
        if self._fd >= 0:
            place(self._fd, fcntl.F_RDLCK, _BEGINNINGS + time.time_ns() // _US, wait=True)

    def hold(self, kind: str, digest: str) -> None:
        """Keep the blob or layer ``digest``, there or not. Waits while it is just being collected."""
        if (kind, digest) not in self.held and self._fd >= 0:
            place(self._fd, fcntl.F_RDLCK, place_of(kind, digest), wait=True)
            self.held.add((kind, digest))

    def close(self) -> None:
        """Let go of everything."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            place(fd, fcntl.F_UNLCK, 0, length=0)  # a child that was forked meanwhile shares the lock
            os.close(fd)

    def forget(self) -> None:
        """In a forked child: the lease is the parent's."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_leases: dict[str, set[Lease]] = {}
_guard = threading.Lock()


def _after_fork() -> None:
    global _guard  # noqa: PLW0603 - another thread of the parent may have held it
    _guard = threading.Lock()
    for held in _leases.values():
        for each in held:
            each.forget()
    _leases.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def lease(state: State, name: str | None = None, attempt: Attempt | None = None) -> Iterator[Lease]:
    """Nothing that this process brings in, looks for or reads meanwhile, in any thread, is collected.

    With a ``name`` it stays so until :func:`end_lease`, for any process; a process that dies before the end of the
    block leaves the name as it was. ``attempt`` is told of what is brought in. Raises
    :class:`~containerkit.errors.StateError`.
    """
    held = Lease(state.root, attempt)
    with _guard:
        _leases.setdefault(state.root, set()).add(held)
    try:
        yield held
        if name is not None:
            _record(state, name, held)
    finally:
        with _guard:
            _leases.get(state.root, set()).discard(held)
        held.close()


def hold(root: str, kind: str, digest: str) -> None:
    """Add a blob or layer to every lease that this process has on the state root ``root``."""
    for each in _of(root):
        each.hold(kind, digest)


def bring(root: str, kind: str, digest: str) -> None:
    """The same for one that is about to get its name: whoever takes notes of what comes notes it."""
    for each in _of(root):
        each.hold(kind, digest)
        if each.attempt is not None:
            each.attempt.note(kind, digest)


def _of(root: str) -> list[Lease]:
    if root not in _leases:
        return []
    with _guard:
        return list(_leases[root])


def _record(state: State, name: str, held: Lease) -> None:
    with state.transaction() as database:
        for kind, digest in held.held:
            database.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?)", (name, kind, digest))


def end_lease(state: State, name: str) -> bool:
    """End a lease with a name; False where there is none. What only it held goes with the next collection."""
    with state.transaction() as database:
        return bool(database.execute("DELETE FROM leases WHERE name = ?", (name,)).changes)


def leases(state: State) -> dict[str, frozenset[tuple[str, str]]]:
    """The leases with names, and what each holds: pairs of ``blob`` or ``layer`` and a digest."""
    found: dict[str, set[tuple[str, str]]] = {}
    for name, kind, digest in state.database.execute("SELECT name, kind, digest FROM leases"):
        found.setdefault(name, set()).add((kind, digest))
    return {name: frozenset(held) for name, held in found.items()}


def touch(state: State, image_id: str, every: float = MINUTE) -> None:
    """Note that an image is used now: at most one write in ``every`` seconds and image, else one look at a row.

    One that has just come counts as used. Inside a transaction that is open anyway, :func:`touch_in` costs less.
    """
    row = state.database.execute(
        "SELECT max(created_ns, ifnull(used_ns, 0)) FROM images LEFT JOIN uses ON image = id WHERE id = ?", (image_id,)
    ).fetchone()
    if row is not None and time.time_ns() - row[0] > every * _NS:
        with state.transaction() as database:
            touch_in(database, image_id)


def touch_in(database: Database, image_id: str) -> None:
    """The same within a transaction of the caller, one statement; silent where there is no such image."""
    now = time.time_ns()
    database.execute(
        "INSERT INTO uses SELECT id, ? FROM images WHERE id = ? "
        "ON CONFLICT (image) DO UPDATE SET used_ns = excluded.used_ns WHERE used_ns < excluded.used_ns - ?",
        (now, image_id, int(MINUTE * _NS)),
    )


# --- the locks


def open_locks(root: str, *, looking: bool = False) -> int:
    """A new open file description of the file whose bytes are locked.

    Where the file system is read-only, whoever is only ``looking`` gets one for shared locks, for others may have it
    writable elsewhere; -1 where there is no such file. Raises :class:`~containerkit.errors.StateError`.
    """
    path = os.path.join(root, "ingest.lock")
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if not looking or error.errno != errno.EROFS:
            raise StateError(f"cannot write {path}: {error.strerror}") from error
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def place_of(kind: str, digest: str) -> int:
    """The byte of a blob or layer."""
    return _PLACES[kind] + int(digest.rpartition(":")[2][:_HEX_DIGITS], 16)


def place(fd: int, lock: int, offset: int, *, length: int = 1, wait: bool = False) -> bool:
    """Lock or unlock bytes for the description of ``fd``; False where that would mean to wait and ``wait`` is not set.

    ``length`` 0 is to the end of all files.
    """
    wanted = struct.pack(_FLOCK, lock, os.SEEK_SET, offset, length, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, wanted)
    except BlockingIOError:
        return False
    return True


def begun_before(fd: int, time_ns: int) -> bool:
    """Whether any lease is still held that began before a file with the time stamp ``time_ns`` (ns since 1970)."""
    end = max(1, time_ns // _US + _COARSE_US)
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _BEGINNINGS, end, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return int(struct.unpack(_FLOCK, answer)[0]) != fcntl.F_UNLCK
