"""Copies of whole trees, cheap where the file system can share their blocks.

``FICLONE`` (ioctl_ficlonerange(2)) shares all blocks of a file at once; elsewhere ``copy_file_range(2)`` copies what is
data and leaves the holes between (lseek(2), ``SEEK_DATA``).
"""

from __future__ import annotations

import errno
import fcntl
import os

_FICLONE = 0x40049409
_PIECE = 1 << 30
_BLOCK = 512  # what st_blocks counts
_TYPE, _DIRECTORY, _LINK, _REGULAR = 0o170000, 0o040000, 0o120000, 0o100000
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNSHARED = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
_COPIED_ELSE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


class _Copy:
    """What one copy of a tree remembers: where the files with several names are, and whether blocks can be shared."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.linked: dict[tuple[int, int], bytes] = {}
        self.shares = True


def clone_tree(source: str, target: str) -> None:
    """Make ``target``, which must not exist, a copy of the directory ``source`` with all that is below it.

    Kept are types, owners, modes, times, extended attributes, holes, devices and which names share a file. Links are
    copied, never followed. Raises ``OSError``, and then leaves what is there so far.
    """
    reading = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.mkdir(target, 0o700)
        writing = os.open(target, _OPEN_DIRECTORY)
        try:
            _plain(writing)
            _copy_entries(_Copy(writing), reading, writing, b"")
            _dress(reading, writing, os.fstat(reading))
        finally:
            os.close(writing)
    finally:
        os.close(reading)


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


def _copy_entries(copy: _Copy, source: int, target: int, path: bytes) -> None:
    for text in os.listdir(source):
        name = os.fsencode(text)
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = status.st_mode & _TYPE
        if kind == _DIRECTORY:
            _copy_directory(copy, name, source, target, path)
            continue
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and identity in copy.linked:
            first = copy.linked[identity]
            os.link(first, name, src_dir_fd=copy.root, dst_dir_fd=target, follow_symlinks=False)
            continue
        if kind == _REGULAR:
            _copy_file(copy, name, source, target)
        else:
            _copy_node(name, source, target, status)
        if status.st_nlink > 1:
            copy.linked[identity] = path + name


def _copy_directory(copy: _Copy, name: bytes, source: int, target: int, path: bytes) -> None:
    reading = os.open(name, _OPEN_DIRECTORY, dir_fd=source)
    try:
        os.mkdir(name, 0o700, dir_fd=target)
        writing = os.open(name, _OPEN_DIRECTORY, dir_fd=target)
        try:
            _copy_entries(copy, reading, writing, path + name + b"/")
            _dress(reading, writing, os.fstat(reading))
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_file(copy: _Copy, name: bytes, source: int, target: int) -> None:
    reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    try:
        status = os.fstat(reading)
        writing = os.open(name, _CREATE, 0o600, dir_fd=target)
        try:
            copy.shares = copy_content(reading, writing, status, share=copy.shares)
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
        os.setxattr(target, key, os.getxattr(source, key))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _plain(directory: int) -> None:
    """A set-group-ID bit or a default ACL that the new root has from its parent would go on to all below it."""
    os.fchmod(directory, 0o700)
    for key in os.listxattr(directory):
        if key.startswith("system.posix_acl"):
            os.removexattr(directory, key)
