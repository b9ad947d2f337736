"""Copies of whole trees, cheap where the file system can share their blocks.

``FICLONE`` (ioctl_ficlonerange(2)) shares all blocks of a file at once; elsewhere ``copy_file_range(2)`` copies what is
data and leaves the holes between (lseek(2), ``SEEK_DATA``).
"""

from __future__ import annotations

import errno
import fcntl
import os

from containerkit.linux.owned import enterable, get_xattr, open_owned, set_xattr
from containerkit.linux.paths import CREATE
from containerkit.linux.tree import OPEN_DIRECTORY, Descent

_FICLONE = 0x40049409
_PIECE = 1 << 30
_BLOCK = 512  # what st_blocks counts
_TYPE, _DIRECTORY, _LINK, _REGULAR = 0o170000, 0o040000, 0o120000, 0o100000
_UNSHARED = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
_COPIED_ELSE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


def clone_tree(source: str, target: str) -> None:
    """Make ``target``, which must not exist, a copy of the directory ``source`` with all that is below it.

    Kept are types, owners, modes, times, extended attributes, holes, devices and which names share a file. Links are
    copied, never followed. Modes that forbid their owner what this needs are others meanwhile. Raises ``OSError``, and
    then leaves what is there so far.
    """
    with Descent(open_owned(source, OPEN_DIRECTORY)) as reading:
        os.mkdir(target, 0o700)
        with Descent(os.open(target, OPEN_DIRECTORY)) as writing:
            _plain(writing.fd)
            _Copy(reading, writing).run()


def copy_content(reading: int, writing: int, status: os.stat_result, *, share: bool = True) -> bool:
    """The content of one open file as that of another, which is empty; whether the two share blocks now.

    ``status`` is that of the first; with ``share`` false sharing is not tried.
    """
    size = status.st_size
    if not size:
        return share
    if share:
        try:
            fcntl.ioctl(writing, _FICLONE, reading)
        except OSError as error:
            if error.errno not in _UNSHARED:
                raise
        else:
            return True
    if status.st_blocks * _BLOCK >= size:
        _copy_range(reading, writing, 0, size)
        return False
    os.ftruncate(writing, size)
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(reading, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # nothing but a hole up to the end
        end = os.lseek(reading, offset, os.SEEK_HOLE)
        _copy_range(reading, writing, offset, end)
        offset = end
    return False


def _copy_range(reading: int, writing: int, offset: int, end: int) -> None:
    while offset < end:
        try:
            copied = os.copy_file_range(reading, writing, min(end - offset, _PIECE), offset, offset)
        except OSError as error:
            if error.errno not in _COPIED_ELSE:
                raise
            copied = os.pwrite(writing, os.pread(reading, min(end - offset, 1 << 20), offset), offset)
        if not copied:
            return  # somebody made the file shorter meanwhile
        offset += copied


class _Copy:
    """One copy of a tree: where it has come to, which files with several names it met, whether blocks can be shared."""

    def __init__(self, reading: Descent, writing: Descent) -> None:
        self._reading = reading
        self._writing = writing
        self._linked: dict[tuple[int, int], bytes] = {}
        self._shares = True
        self._root = writing.fd
        self._path: list[bytes] = []
        self._modes: list[int | None] = []  # of the directories that are read, where they are others meanwhile

    def run(self) -> None:
        """Copy all that is below, and give each directory what it has once it is complete."""
        root = self._root = os.dup(self._writing.fd)
        try:
            self._modes.append(enterable(self._reading.fd))
            waiting = [self._copy_files()]
            while waiting:
                if waiting[-1]:
                    self._enter(waiting[-1].pop())
                    waiting.append(self._copy_files())
                    continue
                waiting.pop()
                self._dress_directory()
                if waiting:
                    self._reading.leave()
                    self._writing.leave()
                    self._path.pop()
        finally:
            os.close(root)

    def _dress_directory(self) -> None:
        if (mode := self._modes.pop()) is not None:
            os.fchmod(self._reading.fd, mode)
        _dress(self._reading.fd, self._writing.fd, os.fstat(self._reading.fd))

    def _enter(self, name: bytes) -> None:
        self._reading.enter(open_owned(name, OPEN_DIRECTORY, self._reading.fd))
        self._modes.append(enterable(self._reading.fd))
        os.mkdir(name, 0o700, dir_fd=self._writing.fd)
        self._writing.enter(os.open(name, OPEN_DIRECTORY, dir_fd=self._writing.fd))
        self._path.append(name)

    def _copy_files(self) -> list[bytes]:
        """Copy what is in a directory and no directory itself; the names of the others."""
        directories = []
        source, target = self._reading.fd, self._writing.fd
        for name in map(os.fsencode, os.listdir(source)):
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            kind = status.st_mode & _TYPE
            if kind == _DIRECTORY:
                directories.append(name)
                continue
            identity = (status.st_dev, status.st_ino)
            if status.st_nlink > 1 and (first := self._linked.get(identity)) is not None:
                os.link(first, name, src_dir_fd=self._root, dst_dir_fd=target, follow_symlinks=False)
                continue
            if kind == _REGULAR:
                self._copy_file(name, source, target)
            else:
                _copy_node(name, source, target, status)
            if status.st_nlink > 1:
                self._linked[identity] = b"/".join((*self._path, name))
        return directories

    def _copy_file(self, name: bytes, source: int, target: int) -> None:
        reading = open_owned(name, os.O_RDONLY | os.O_CLOEXEC, source)
        try:
            status = os.fstat(reading)
            writing = os.open(name, CREATE, 0o600, dir_fd=target)
            try:
                self._shares = copy_content(reading, writing, status, share=self._shares)
                _dress(reading, writing, status)
            finally:
                os.close(writing)
        finally:
            os.close(reading)


def _copy_node(name: bytes, source: int, target: int, status: os.stat_result) -> None:
    """A link, device, FIFO or socket; by path, since such a thing cannot be opened for its attributes."""
    is_link = status.st_mode & _TYPE == _LINK
    if is_link:
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    origin, path = (b"/proc/self/fd/%d/%b" % (fd, name) for fd in (source, target))
    if not is_link:
        os.chmod(path, status.st_mode & 0o7777)
    for key in os.listxattr(origin, follow_symlinks=False):
        os.setxattr(path, key, os.getxattr(origin, key, follow_symlinks=False), follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _dress(source: int, target: int, status: os.stat_result) -> None:
    """Owner first, for chown clears set-ID bits and capabilities; times last."""
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, status.st_mode & 0o7777)
    for key in os.listxattr(source):
        set_xattr(target, key, get_xattr(source, key))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _plain(directory: int) -> None:
    """A set-group-ID bit or a default ACL that the new root has from its parent would go on to all below it."""
    os.fchmod(directory, 0o700)
    for key in os.listxattr(directory):
        if key.startswith("system.posix_acl"):
            os.removexattr(directory, key)
