"""Seccomp (seccomp(2)): load a ready-made classic BPF filter for the calling thread."""

from __future__ import annotations

import ctypes
import errno

from containerkit.errors.base import KernelError
from containerkit.linux.libc import check, libc, machine_number, syscall

_SECCOMP = machine_number(x86_64=317, aarch64=277)
_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_PR_GET_SECCOMP = 21
_MODE_FILTER = 2
_MAX_INSTRUCTIONS = 4096
_SIZE = 8

_prctl = libc.prctl


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def load(program: bytes, flags: int = 0) -> None:
    """Install ``program``, an array of ``struct sock_filter``, for this thread and its children. Irrevocable.

    Needs no_new_privs or CAP_SYS_ADMIN in the own user namespace (else ``EACCES``). Afterwards the kernel is asked for
    the mode: a filter that forbids prctl(2) fails here. Raises :class:`KernelError`; ``EINVAL`` for an invalid program.
    """
    count, rest = divmod(len(program), _SIZE)
    if rest or not 0 < count <= _MAX_INSTRUCTIONS:
        raise KernelError("seccomp", errno.EINVAL, hint=f"{len(program)} bytes are no filter program")
    # c_char_p keeps the bytes alive as long as the structure; the kernel copies them during the call.
    argument = _Program(count, program)
    hint = "set no_new_privs first, or hold CAP_SYS_ADMIN"
    check(syscall(_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(argument)), "seccomp SET_MODE_FILTER", hint=hint)
    if mode() != _MODE_FILTER:
        raise KernelError("seccomp SET_MODE_FILTER", errno.EPERM, hint="the kernel reports no filter afterwards")


def mode() -> int:
    """0 without seccomp, 2 with a filter (``PR_GET_SECCOMP``). Raises :class:`KernelError`."""
    return check(_prctl(_PR_GET_SECCOMP, 0, 0, 0, 0), "prctl PR_GET_SECCOMP")


def available() -> bool:
    """Whether this kernel runs seccomp filters that answer with an errno (``SECCOMP_RET_ERRNO``)."""
    action = ctypes.c_uint32(0x00050000)
    return syscall(_SECCOMP, _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0
