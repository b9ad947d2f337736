"""Owner, mode, extended attributes and times: setting them on unpacked files, and copying a file with all of them."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from containerkit.linux.clone import copy_content
from containerkit.linux.paths import CREATE, fd_path

OVERLAY = (b"trusted.overlay.", b"user.overlay.")


class Attributes(NamedTuple):
    """What a file has besides its content. Times in nanoseconds."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    atime: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


def read_attributes(path: bytes, status: os.stat_result) -> Attributes:
    """Those of the file at ``path``, without overlay's own."""
    names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    xattrs = tuple(
        (name, os.getxattr(path, name, follow_symlinks=False)) for name in names if not name.startswith(OVERLAY)
    )
    mode = stat.S_IMODE(status.st_mode)
    return Attributes(mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_atime_ns, xattrs)


def set_xattrs(path: int | bytes, xattrs: tuple[tuple[bytes, bytes], ...]) -> None:
    """Set them on a descriptor or, not following a last symlink, a path.

    Overlay's own attributes are left out: a layer that carried some would steer the mount. So are security labels where
    the file system has none, for their policy is not here either.
    """
    for name, value in xattrs:
        if name.startswith(OVERLAY):
            continue
        try:
            if isinstance(path, int):
                os.setxattr(path, name, value)
            else:
                os.setxattr(path, name, value, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENOTSUP or not name.startswith(b"security."):
                raise


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
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        writing = os.open(name, CREATE, 0o600, dir_fd=dir_fd)
        try:
            copy_content(reading, writing, status)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
