"""How every system call is made: one loaded libc, one errno check.

``PyDLL`` keeps the GIL during the call. That is what makes ``clone3`` safe from Python; the other calls made through
here are short and do not wait for anything.
"""

from __future__ import annotations

import ctypes
import os

from containerkit.errors.base import KernelError

TYPE_CHECKING = False  # typing itself would cost every keeper 0.8 MB
if TYPE_CHECKING:
    from typing import Any

libc = ctypes.PyDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def check(result: int, operation: str, path: str = "", hint: str = "") -> int:
    """``result``, or :class:`KernelError` from errno where it is negative."""
    if result < 0:
        raise KernelError(operation, ctypes.get_errno(), path, hint=hint)
    return result


def syscall(number: int, *arguments: Any) -> int:
    """``syscall(2)``: the raw result, -1 with errno set on failure. Integers are passed as 64 bit."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(libc.syscall(ctypes.c_long(number), *converted))


def fsencode(path: str | bytes) -> bytes:
    """A path as the kernel takes it."""
    return path if isinstance(path, bytes) else os.fsencode(path)


def machine_number(*, x86_64: int, aarch64: int) -> int:
    """The number of a system call that is older than the common table (below 424).

    -1 (``ENOSYS``) on other machines.
    """
    return {"x86_64": x86_64, "aarch64": aarch64}.get(os.uname().machine, -1)
