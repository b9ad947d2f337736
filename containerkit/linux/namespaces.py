"""Namespaces: flags, unshare(2), setns(2), sethostname(2)."""

from __future__ import annotations

import ctypes

from containerkit.linux.libc import check, libc

CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

NAMES = {
    "mount": CLONE_NEWNS,
    "pid": CLONE_NEWPID,
    "network": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
    "user": CLONE_NEWUSER,
}


def unshare(flags: int) -> None:
    """``unshare(2)``."""
    check(libc.unshare(flags), "unshare", describe(flags))


def setns(fd: int, flags: int) -> None:
    """``setns(2)`` with a pidfd: joins the named namespaces of that process in one call (Linux 5.8)."""
    check(libc.setns(fd, flags), "setns", describe(flags))


def sethostname(name: str) -> None:
    """``sethostname(2)``: at most 64 bytes."""
    encoded = name.encode()
    check(libc.sethostname(ctypes.c_char_p(encoded), ctypes.c_size_t(len(encoded))), "sethostname", name)


def describe(flags: int) -> str:
    """``pid,network``: the names of the namespaces in ``flags``."""
    return ",".join(name for name, flag in NAMES.items() if flags & flag)
