"""What a file's owner may do although its mode forbids it to him: the mode is another one meanwhile.

For the trees of ordinary users; root has the capability, and meets none of this. One call of a process at a time
changes a mode and gives it back. Whoever reads the mode of the same file in that moment sees the other one.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Result = TypeVar("Result")

_ENTERED = 0o500
_lock = allocate_lock()


def open_owned(name: str | bytes, flags: int, dir_fd: int | None = None) -> int:
    """``openat(2)`` of what exists, never following a last symlink. Raises ``OSError``, ``EACCES`` for another's."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=dir_fd)
    except PermissionError:
        return _granted(name, dir_fd, lambda: os.open(name, flags | os.O_NOFOLLOW, dir_fd=dir_fd))


def get_xattr(place: int | bytes, name: str | bytes) -> bytes:
    """``getxattr(2)`` of a descriptor or a path, whose last symlink is not followed."""
    follow = isinstance(place, int)
    try:
        return os.getxattr(place, name, follow_symlinks=follow)
    except PermissionError:
        return _granted(place, None, lambda: os.getxattr(place, name, follow_symlinks=follow))


def set_xattr(place: int | bytes, name: str | bytes, value: bytes) -> None:
    """``setxattr(2)`` of a descriptor or a path, whose last symlink is not followed.

    Raises ``OSError``: ``EPERM`` stays, for that is not about the mode.
    """
    follow = isinstance(place, int)
    try:
        os.setxattr(place, name, value, follow_symlinks=follow)
    except PermissionError as error:
        if error.errno != errno.EACCES:
            raise
        _granted(place, None, lambda: os.setxattr(place, name, value, follow_symlinks=follow))


def enterable(fd: int) -> int | None:
    """Let the owner read and search an open directory: the mode that it had, for ``fchmod``; None where he may."""
    status = os.fstat(fd)
    if status.st_mode & _ENTERED == _ENTERED or status.st_uid != os.geteuid() or not status.st_uid:
        return None
    os.fchmod(fd, status.st_mode & 0o7777 | 0o700)
    return status.st_mode & 0o7777


def rename_directory(rename: Callable[[], Result], path: str) -> Result:
    """A rename of the directory ``path`` to another parent, for which its owner must be allowed to write in it."""
    try:
        return rename()
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        return _granted(path, None, rename)


def _granted(place: int | str | bytes, dir_fd: int | None, call: Callable[[], Result]) -> Result:
    if isinstance(place, int):
        return _with_mode(b"/proc/self/fd/%d" % place, call)
    fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return _with_mode(b"/proc/self/fd/%d" % fd, call)
    finally:
        os.close(fd)


def _with_mode(path: bytes, call: Callable[[], Result]) -> Result:
    with _lock:
        status = os.stat(path)
        if status.st_uid != os.geteuid():
            return call()  # for its own error
        mode = status.st_mode & 0o7777
        os.chmod(path, mode | 0o600)
        try:
            return call()
        finally:
            os.chmod(path, mode)
