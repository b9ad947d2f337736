"""``syncfs(2)``: everything that was written to one file system."""

from __future__ import annotations

import ctypes
import os

from containerkit.errors.base import KernelError


def syncfs(path: str) -> None:
    """Return when the file system of ``path`` has all that was written to it so far on its disk, data and names.

    It may take seconds; other threads run meanwhile. Raises :class:`KernelError`: EIO, ENOSPC.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # unlike PyDLL it lets other threads run
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd):
            raise KernelError("syncfs", ctypes.get_errno(), path)
    finally:
        os.close(fd)
