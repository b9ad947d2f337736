"""Walking a tree by descriptors: every step is relative to the open parent directory, no path is walked twice.

Names come in the order of their bytes, a directory before what is in it. Symlinks are never followed, mounts are
entered.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from containerkit.image.layers.merged import OPAQUE, is_opaque, is_whiteout
from containerkit.linux.owned import enterable, get_xattr, open_owned
from containerkit.linux.paths import fd_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
MOST_OPEN = 100
#: What a call on a file says that is no more there, or not what it was: a symlink or a socket stands in its place.
GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE})

# The host's business, not the image's: mount marks, and labels that only this host's policy and keys give a meaning.
LEFT_OUT = ("trusted.overlay.", "user.overlay.")
HOSTS_OWN = frozenset({"security.selinux", "security.ima", "security.evm", "system.nfs4_acl"})


class Visit:
    """One file of a tree. The root has the empty name and no parent."""

    __slots__ = ("_status", "base", "carried", "dir_fd", "fd", "is_regular", "name")

    name: bytes
    """relative to the root"""
    base: bytes
    """the last component"""
    dir_fd: int
    """of the parent, open until the next step"""
    fd: int
    """of a directory itself, else -1"""
    is_regular: bool
    """as the parent directory says"""
    carried: Any
    """what :attr:`Walk.carry` was set to at the parent"""

    def __init__(
        self, name: bytes, base: bytes, dir_fd: int, fd: int, status: os.stat_result | None, carried: Any
    ) -> None:
        self.name = name
        self.base = base
        self.dir_fd = dir_fd
        self.fd = fd
        self.is_regular = status is None
        self.carried = carried
        self._status = status

    @property
    def status(self) -> os.stat_result:
        """Of a regular file it is read when it is first asked for: ``FileNotFoundError`` where that is gone by then."""
        status = self._status
        if status is None:
            status = self._status = os.stat(self.base, dir_fd=self.dir_fd, follow_symlinks=False)
        return status

    @property
    def has_vanished(self) -> bool:
        """Whether it is gone since its directory was read."""
        try:
            return not self.status
        except FileNotFoundError:
            return True

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return self.fd >= 0

    @property
    def is_whiteout(self) -> bool:
        """Whether this is overlay's mark for a deleted file."""
        return not self.is_regular and is_whiteout(self.status)

    @property
    def is_opaque(self) -> bool:
        """Whether this is a directory that overlay shows without those below it."""
        # Most have no attributes at all, and an error that says so costs more than the list.
        return self.fd >= 0 and OPAQUE in os.listxattr(self.fd) and is_opaque(fd_path(self.fd, b"."))

    def xattrs(self) -> tuple[tuple[bytes, bytes], ...]:
        """The extended attributes that belong to an image, sorted."""
        return xattrs_of(self.fd if self.is_directory else fd_path(self.dir_fd, self.base))

    def link(self) -> bytes:
        """A symlink's target. Raises ``FileNotFoundError`` where it is none any more."""
        try:
            return os.readlink(self.base, dir_fd=self.dir_fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.base) from error

    def open(self) -> int:
        """A regular file, for reading; without waiting for a writer where a FIFO has taken its place."""
        return open_owned(self.base, OPEN_FILE, self.dir_fd)


class _Level:
    """A directory that is being walked. Its descriptor is closed while the walk is far below it."""

    __slots__ = ("carry", "entries", "fd", "identity", "mode", "prefix")

    def __init__(self, visit: Visit, carry: Any) -> None:
        self.fd = visit.fd
        self.prefix = visit.name + b"/" if visit.name else b""
        self.identity = (visit.status.st_dev, visit.status.st_ino)
        self.carry = carry
        #: What the mode is again afterwards, where it kept its owner out.
        self.mode = enterable(visit.fd)
        with os.scandir(fd_path(visit.fd)) as found:  # by a path of bytes the names are bytes, too
            #: The names that are left to visit, each with whether it is a regular file.
            self.entries = iter(sorted([(each.name, each.is_file(follow_symlinks=False)) for each in found]))

    def close(self) -> None:
        if self.fd >= 0:
            if self.mode is not None:
                os.fchmod(self.fd, self.mode)
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
            yield from self._rest_of(self._levels[-1])

    def _rest_of(self, level: _Level) -> Iterator[Visit]:
        """What is left of a directory, up to the next directory in it, which becomes the last level."""
        prefix, fd, carry = level.prefix, level.fd, level.carry
        for base, is_regular in level.entries:
            if is_regular:
                yield Visit(prefix + base, base, fd, -1, None, carry)
                continue
            visit = _visit(level, base)
            if visit is None:
                continue
            if visit.fd < 0:
                yield visit
                continue
            self._pruned, self.carry = False, None
            try:
                yield visit
            except BaseException:
                os.close(visit.fd)
                raise
            if not self._pruned:
                self._enter(visit)
                return
            os.close(visit.fd)
        self._leave()

    def _enter(self, visit: Visit) -> None:
        try:
            level = _Level(visit, self.carry)
        except BaseException:
            os.close(visit.fd)
            raise
        self._levels.append(level)
        if len(self._levels) > MOST_OPEN and self._levels[-MOST_OPEN].mode is None:
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
    return tuple((name, get_xattr(place, name)) for name in kept)


def _directory(root: str | bytes | int) -> int | None:
    return root if isinstance(root, int) else None


def _visit(level: _Level, base: bytes) -> Visit | None:
    """Something else than a regular file; None where it is gone."""
    fd = -1
    try:
        status = os.stat(base, dir_fd=level.fd, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            fd = open_owned(base, OPEN_DIRECTORY, level.fd)
            status = os.fstat(fd)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return None
    return Visit(level.prefix + base, base, level.fd, fd, status, level.carry)
