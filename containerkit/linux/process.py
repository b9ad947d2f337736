"""Processes: clone3 as a fork, pidfds, prctl, close_range."""

from __future__ import annotations

import ctypes
import os
import select
import struct

from containerkit.errors.base import KernelError
from containerkit.linux.libc import check, libc, machine_number, syscall

_CLONE3, _PIDFD_OPEN, _PIDFD_SEND_SIGNAL, _CLOSE_RANGE = 435, 434, 424, 436
_KEYCTL = machine_number(x86_64=250, aarch64=219)
_KEYCTL_JOIN_SESSION_KEYRING = 1
_RT_SIGACTION = machine_number(x86_64=13, aarch64=134)
_GETCWD = machine_number(x86_64=79, aarch64=17)
_PATH_MAX = 4096
_LAST_FD = 0xFFFFFFFF

CLONE_PIDFD = 0x1000
CLONE_PARENT = 0x8000
CLONE_CHILD_SETTID = 0x1000000
CLONE_INTO_CGROUP = 0x200000000
CLOSE_RANGE_CLOEXEC = 0x4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
_PR_GET_TID_ADDRESS = 40

SIGCHLD = 17
SIGKILL = 9
_ESRCH = 3


def prctl(option: int, argument: int = 0) -> int:
    """``prctl(2)`` with one integer argument."""
    return check(libc.prctl(option, argument, 0, 0, 0), "prctl", str(option))


def set_name(name: str) -> None:
    """``PR_SET_NAME``: the thread's name as ps(1) shows it, 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15], 16)
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def clone3(flags: int, cgroup_fd: int = -1) -> tuple[int, int]:
    """``clone3(2)`` used as a fork: ``(pid, pidfd)`` in the parent, ``(0, -1)`` in the child.

    ``flags`` are ``CLONE_NEW*`` and ``CLONE_PARENT``; ``cgroup_fd`` is a cgroup v2 directory for the child to be born
    in. Only for a single-threaded process: the interpreter's after-fork work is not run. glibc caches the thread's
    id, so the kernel is asked to write the child's id where glibc keeps it.
    """
    address = ctypes.c_ulong()
    settid = libc.prctl(_PR_GET_TID_ADDRESS, ctypes.addressof(address), 0, 0, 0) == 0
    pidfd = ctypes.c_int(-1)
    flags |= CLONE_PIDFD
    exit_signal = 0 if flags & CLONE_PARENT else SIGCHLD  # a sibling takes over the caller's own
    if settid:
        flags |= CLONE_CHILD_SETTID
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    fields = (flags, ctypes.addressof(pidfd), address.value, 0, exit_signal, 0, 0, 0, 0, 0, max(cgroup_fd, 0))
    arguments = ctypes.create_string_buffer(struct.pack("=11Q", *fields), 88)
    pid = check(syscall(_CLONE3, arguments, 88), "clone3")
    return (pid, pidfd.value) if pid else (0, -1)


def pidfd_open(pid: int) -> int:
    """``pidfd_open(2)``: close-on-exec."""
    return check(syscall(_PIDFD_OPEN, pid, 0), "pidfd_open", str(pid))


def pidfd_send_signal(pidfd: int, signal: int) -> bool:
    """``pidfd_send_signal(2)``: False where the process is gone already."""
    if syscall(_PIDFD_SEND_SIGNAL, pidfd, signal, None, 0) == 0:
        return True
    errno = ctypes.get_errno()
    if errno == _ESRCH:
        return False
    raise KernelError("pidfd_send_signal", errno)


def close_range(first: int, last: int, flags: int = 0) -> None:
    """``close_range(2)``: closes, or with ``CLOSE_RANGE_CLOEXEC`` marks, every fd from ``first`` to ``last``."""
    check(syscall(_CLOSE_RANGE, first, last, flags), "close_range")


def close_others(kept: tuple[int, ...]) -> None:
    """Close every fd from 3 on that is not in ``kept``, and mark those close-on-exec."""
    first = 3
    for fd in sorted(kept):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first, _LAST_FD)
    close_range(3, first, CLOSE_RANGE_CLOEXEC)


def unreachable_directory() -> bool:
    """Whether the working directory lies outside the root: getcwd(2) then answers ``(unreachable)`` and no path.

    The C library's own getcwd(3) would walk up through the foreign tree instead. Raises :class:`KernelError`.
    """
    buffer = ctypes.create_string_buffer(_PATH_MAX)
    check(syscall(_GETCWD, buffer, _PATH_MAX), "getcwd")
    return buffer.value[:1] != b"/"


def default_signal(number: int) -> None:
    """``rt_sigaction(2)`` to ``SIG_DFL``, for the two signals too that the C library keeps to itself (32 and 33)."""
    check(syscall(_RT_SIGACTION, number, ctypes.create_string_buffer(32), None, 8), "rt_sigaction", str(number))


def join_new_session_keyring() -> None:
    """``keyctl(2)``, ``KEYCTL_JOIN_SESSION_KEYRING``: an own, empty session keyring, so that the host's stays unseen.

    Kernels without keyrings (ENOSYS) have none to hide; a caller over its key quota keeps going with the old one hidden
    by the user namespace or the seccomp filter.
    """
    syscall(_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, None)


def pidfd_of(pid: int, start: int) -> int:
    """A pidfd of the process with this pid *and* this start time (:func:`start_time`), or -1 where it is gone."""
    try:
        pidfd = pidfd_open(pid)
    except KernelError:
        return -1
    if start_time(pid) != start:  # the pid was taken by another before the fd could hold it
        os.close(pidfd)
        return -1
    return pidfd


def wait_gone(pid: int, start: int, timeout: float | None = None) -> bool:
    """Wait at most ``timeout`` seconds until the process with this pid and start time is gone; whether it is."""
    pidfd = pidfd_of(pid, start)
    if pidfd < 0:
        return True
    try:
        return ended(pidfd, None if timeout is None else max(0.0, timeout) * 1000)
    finally:
        os.close(pidfd)


def ended(pidfd: int, milliseconds: float | None = 0) -> bool:
    """Wait at most so long until the process of a pidfd has ended; whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(milliseconds))


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot (proc(5), stat field 22).

    With the pid, an identity. 0: gone.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0
