"""Walking a tree by descriptors: every step is relative to the open parent directory, no path is walked twice.

Names come in the order of their bytes, a directory before what is in it. Symlinks are never followed, mounts are
entered.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from containerkit.image.merged import is_whiteout
from containerkit.linux.paths import fd_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_OPEN = 100

# The host's business, not the image's: mount marks, and labels that only this host's policy and keys give a meaning.
LEFT_OUT = ("trusted.overlay.", "user.overlay.")
HOSTS_OWN = frozenset({"security.selinux", "security.ima", "security.evm", "system.nfs4_acl"})


class Visit(NamedTuple):
    """One file of a tree. The root has the empty name and no parent."""

    name: bytes
    """relative to the root"""
    base: bytes
    """the last component"""
    dir_fd: int
    """of the parent, open until the next step"""
    fd: int
    """of a directory itself, else -1"""
    status: os.stat_result
    carried: Any
    """what :attr:`Walk.carry` was set to at the parent"""

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return self.fd >= 0

    @property
    def is_whiteout(self) -> bool:
        """Whether this is overlay's mark for a deleted file."""
        return is_whiteout(self.status)

    def xattrs(self) -> tuple[tuple[bytes, bytes], ...]:
        """The extended attributes that belong to an image, sorted."""
        return xattrs_of(self.fd if self.is_directory else fd_path(self.dir_fd, self.base))

    def link(self) -> bytes:
        """A symlink's target."""
        return os.readlink(self.base, dir_fd=self.dir_fd)

    def open(self) -> int:
        """A regular file, for reading; without waiting for a writer where a FIFO has taken its place."""
        return os.open(self.base, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.dir_fd)


class _Level:
    """A directory that is being walked. Its descriptor is closed while the walk is far below it."""

    __slots__ = ("carry", "fd", "identity", "names", "prefix")

    def __init__(self, visit: Visit, carry: Any) -> None:
        self.fd = visit.fd
        self.prefix = visit.name + b"/" if visit.name else b""
        self.identity = (visit.status.st_dev, visit.status.st_ino)
        self.carry = carry
        with os.scandir(visit.fd) as entries:
            self.names = sorted((os.fsencode(entry.name) for entry in entries), reverse=True)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def reopen(self, below: int) -> None:
        """Come back from a directory below, by its ``..``. Raises ``OSError`` where that was moved meanwhile."""
        self.fd = os.open("..", OPEN_DIRECTORY, dir_fd=below)
        status = os.fstat(self.fd)
        if (status.st_dev, status.st_ino) != self.identity:
            raise OSError(f"the directory {os.fsdecode(self.prefix)} was moved while it was read")


class Walk:
    """Every file of the tree at ``root``, a path or a descriptor (which stays open); iterable, a context manager.

    At a directory, :meth:`prune` keeps the walk out of it, and what ``carry`` is set to is handed to what is in it.
    Files that vanish meanwhile are passed over.
    """

    def __init__(self, root: str | bytes | int) -> None:
        self._fd = os.open("." if isinstance(root, int) else root, OPEN_DIRECTORY, dir_fd=_directory(root))
        self._levels: list[_Level] = []
        self._pruned = False
        self.carry: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._levels:
            self._levels.pop().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def prune(self) -> None:
        """Do not enter the directory that came last."""
        self._pruned = True

    def __iter__(self) -> Iterator[Visit]:
        root = Visit(b"", b"", -1, self._fd, os.fstat(self._fd), None)
        yield root
        if not self._pruned:
            self._fd = -1
            self._enter(root)
        while self._levels:
            level = self._levels[-1]
            if not level.names:
                self._leave()
                continue
            visit = _visit(level, level.names.pop())
            if visit is None:
                continue
            self._pruned, self.carry = False, None
            yield visit
            if visit.is_directory:
                if self._pruned:
                    os.close(visit.fd)
                else:
                    self._enter(visit)

    def _enter(self, visit: Visit) -> None:
        try:
            level = _Level(visit, self.carry)
        except BaseException:
            os.close(visit.fd)
            raise
        self._levels.append(level)
        if len(self._levels) > MOST_OPEN:
            self._levels[-MOST_OPEN].close()

    def _leave(self) -> None:
        left = self._levels.pop()
        try:
            if self._levels and self._levels[-1].fd < 0:
                self._levels[-1].reopen(left.fd)
        finally:
            left.close()


def xattrs_of(place: int | bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes of a descriptor or (not followed) path that belong to an image, sorted."""
    follow = isinstance(place, int)
    names = os.listxattr(place, follow_symlinks=follow)
    if not names:
        return ()
    kept = sorted(os.fsencode(name) for name in names if not name.startswith(LEFT_OUT) and name not in HOSTS_OWN)
    return tuple((name, os.getxattr(place, name, follow_symlinks=follow)) for name in kept)


def _directory(root: str | bytes | int) -> int | None:
    return root if isinstance(root, int) else None


def _visit(level: _Level, base: bytes) -> Visit | None:
    try:
        status = os.stat(base, dir_fd=level.fd, follow_symlinks=False)
        fd = os.open(base, OPEN_DIRECTORY, dir_fd=level.fd) if stat.S_ISDIR(status.st_mode) else -1
    except FileNotFoundError:
        return None
    if fd >= 0:
        status = os.fstat(fd)
    return Visit(level.prefix + base, base, level.fd, fd, status, level.carry)
