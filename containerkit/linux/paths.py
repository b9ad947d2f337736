"""Paths relative to directory descriptors: openat2(2), renameat2(2), extended attributes below a descriptor, umask."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from containerkit.errors.base import KernelError
from containerkit.linux.libc import check, fsencode, libc, machine_number, syscall

_OPENAT2 = 437
_RENAMEAT2 = machine_number(x86_64=316, aarch64=276)
_CLONE_FS = 0x200
_RENAME_NOREPLACE = 0x1

AT_FDCWD = -100
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def openat2(dir_fd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """``openat2(2)`` (Linux 5.6): open ``path`` below ``dir_fd`` as ``resolve`` restricts, close-on-exec.

    Raises :class:`KernelError`: ELOOP for a symlink where ``RESOLVE_NO_SYMLINKS`` forbids it, EXDEV for an escape from
    ``RESOLVE_BENEATH``.
    """
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    encoded = ctypes.c_char_p(fsencode(path))
    while True:
        fd = syscall(_OPENAT2, dir_fd, encoded, how, 24)
        # EAGAIN: a rename somewhere else raced with the walk of "..", the kernel asks to try again.
        if fd >= 0 or ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            return check(fd, "openat2", os.fsdecode(path))


def rename_noreplace(source: str, target: str, *, source_fd: int = AT_FDCWD, target_fd: int = AT_FDCWD) -> bool:
    """``renameat2(2)`` with ``RENAME_NOREPLACE``: False where the target exists, and then nothing has changed."""
    names = ctypes.c_char_p(fsencode(source)), ctypes.c_char_p(fsencode(target))
    if syscall(_RENAMEAT2, source_fd, names[0], target_fd, names[1], _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    raise KernelError("renameat2", number, target)


def private_umask(mask: int = 0) -> None:
    """Give the calling thread its own umask (and working directory) and set it.

    The umask belongs to the whole process; ``unshare(CLONE_FS)`` takes one thread out. There is no way back, so this is
    for threads that end with their task.
    """
    check(libc.unshare(_CLONE_FS), "unshare", "CLONE_FS")
    os.umask(mask)


def fd_path(dir_fd: int, name: bytes = b"") -> bytes:
    """A path for calls without a form relative to a descriptor (extended attributes): by the magic link in /proc.

    The link itself is followed; ``name``, one component, is only followed where the call follows it.
    """
    return b"/proc/self/fd/%d/%b" % (dir_fd, name) if name else b"/proc/self/fd/%d" % dir_fd


def write_all(fd: int, content: bytes | memoryview) -> None:
    """``write(2)`` all of it; a disk takes it at once, save at its end or where a signal comes."""
    written = os.write(fd, content)
    while written < len(content):
        content = memoryview(content)[written:]
        written = os.write(fd, content)
