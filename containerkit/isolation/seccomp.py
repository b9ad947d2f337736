"""The default seccomp program: compiled once, then read from a file.

This module is on the start path: it loads neither the profile nor the compiler where the file is there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

VERSION = 1
"""Of the default profile and the compiler, part of the file's name; a test fails when it should have changed."""

CAPABILITIES = (
    "CAP_BPF",
    "CAP_DAC_READ_SEARCH",
    "CAP_PERFMON",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
)
"""Those that the default profile depends on: each opens the system calls that it is about."""

_INSTRUCTION = 8
_cached: dict[str, bytes] = {}


def default_program(capabilities: Collection[str], cache_dir: str) -> bytes:
    """Docker's default filter for a container that is given ``capabilities``, as ``struct sock_filter`` bytes.

    ``cache_dir`` holds one file a program; it must be writable by nobody else. Raises :class:`Unsupported` on a machine
    without a table of system call numbers.
    """
    machine = os.uname().machine
    key = sum(1 << bit for bit, name in enumerate(CAPABILITIES) if name in capabilities)
    path = os.path.join(cache_dir, f"seccomp-{VERSION}-{machine}-{key:x}.bpf")
    program = _cached.get(path) or _read(path)
    if not program:
        program = compile_default(machine, capabilities)
        _write(path, program)
    _cached[path] = program
    return program


def compile_default(machine: str, capabilities: Collection[str]) -> bytes:
    """Compile the default profile (milliseconds). Raises :class:`Unsupported`."""
    from containerkit.isolation.profiles.default import PROFILE
    from containerkit.isolation.seccomp_compile import compile_profile

    return compile_profile(PROFILE, machine, capabilities)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            program = file.read()
    except OSError:
        return b""
    return program if len(program) % _INSTRUCTION == 0 else b""


def _write(path: str, program: bytes) -> None:
    """Atomically; where it cannot be written the next process compiles again."""
    temporary = f"{path}.{os.getpid()}.{id(program):x}"
    try:
        with open(temporary, "xb") as file:
            file.write(program)
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
