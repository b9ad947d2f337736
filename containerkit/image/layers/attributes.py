"""Owner, mode, extended attributes and times: setting them on unpacked files, and copying a file with all of them."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from containerkit.linux.clone import copy_content
from containerkit.linux.owned import get_xattr, open_owned, set_xattr
from containerkit.linux.paths import CREATE, fd_path

_ROOM = 1 << 20
OVERLAY = (b"trusted.overlay.", b"user.overlay.")


class Attributes(NamedTuple):
    """What a file has besides its content. Times in nanoseconds."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    atime: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class XattrRefused(OSError):
    """The kernel did not take an extended attribute, ``name``, of ``size`` bytes.

    ``is_too_large`` says that there is room on the disk, but not in the file: ext4 has an inode and a block for it.
    """

    def __init__(self, error: OSError, place: int | bytes, name: bytes, value: bytes) -> None:
        super().__init__(error.errno, error.strerror)
        self.name = name
        self.size = len(value)
        self.is_too_large = False
        if error.errno == errno.ENOSPC:
            status = os.statvfs(place if isinstance(place, int) else os.path.dirname(place))
            self.is_too_large = status.f_bavail * status.f_frsize > _ROOM


def read_attributes(path: bytes, status: os.stat_result) -> Attributes:
    """Those of the file at ``path``, without overlay's own."""
    names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    xattrs = tuple((name, get_xattr(path, name)) for name in names if not name.startswith(OVERLAY))
    mode = stat.S_IMODE(status.st_mode)
    return Attributes(mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_atime_ns, xattrs)


def set_xattrs(path: int | bytes, xattrs: tuple[tuple[bytes, bytes], ...]) -> None:
    """Set them on a descriptor or, not following a last symlink, a path.

    Overlay's own attributes are left out: a layer that carried some would steer the mount. So is what the file system
    does not know (labels, ACLs, other systems' attributes), as tar, Docker and umoci do, and ``user.*`` on what is
    neither file nor directory and can never have it (xattr(7)). Raises :class:`XattrRefused`.
    """
    for name, value in xattrs:
        if name.startswith(OVERLAY):
            continue
        try:
            set_xattr(path, name, value)
        except OSError as error:
            if error.errno != errno.ENOTSUP and not _impossible(path, name, error):
                raise XattrRefused(error, path, name, value) from error


def _impossible(path: int | bytes, name: bytes, error: OSError) -> bool:
    if error.errno != errno.EPERM or not name.startswith(b"user.") or isinstance(path, int):
        return False
    mode = os.lstat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def copy_file(source: bytes, status: os.stat_result, dir_fd: int, name: bytes) -> None:
    """Copy one file that is not a directory, with all attributes, to a new ``name`` below ``dir_fd``."""
    attributes = read_attributes(source, status)
    if stat.S_ISREG(status.st_mode):
        _copy_content(source, status, dir_fd, name)
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), name, dir_fd=dir_fd)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=dir_fd)
    os.chown(name, attributes.uid, attributes.gid, dir_fd=dir_fd, follow_symlinks=False)
    path = fd_path(dir_fd, name)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, attributes.mode)
    set_xattrs(path, attributes.xattrs)
    os.utime(name, ns=(attributes.atime, attributes.mtime), dir_fd=dir_fd, follow_symlinks=False)


def _copy_content(source: bytes, status: os.stat_result, dir_fd: int, name: bytes) -> None:
    reading = open_owned(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(name, CREATE, 0o600, dir_fd=dir_fd)
        try:
            copy_content(reading, writing, status)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
