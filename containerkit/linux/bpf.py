"""bpf(2), as much as a cgroup v2 device filter needs."""

from __future__ import annotations

import ctypes
import os
import struct

from containerkit.linux.libc import check, machine_number, syscall

_BPF = machine_number(x86_64=321, aarch64=280)
_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_DEVICE = 15
_CGROUP_DEVICE = 6
_ALLOW_MULTI = 2
_INSTRUCTION = 8


def load_device_program(instructions: bytes) -> int:
    """``BPF_PROG_LOAD`` of a device program: a file descriptor, close-on-exec by the kernel.

    Needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN. Raises :class:`KernelError`: ``EINVAL`` or ``EACCES`` from the
    verifier, ``EINVAL`` also from a kernel without CONFIG_CGROUP_BPF.
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "=IIQQIIQII",
        _PROG_TYPE_CGROUP_DEVICE,
        len(instructions) // _INSTRUCTION,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        *(0, 0, 0, 0, 0),
    )
    return _bpf(_PROG_LOAD, attributes, "bpf PROG_LOAD")


def attach_device_program(cgroup_fd: int, program_fd: int) -> None:
    """``BPF_PROG_ATTACH`` to a cgroup v2 directory, for it and all below; every program on the way up must agree.

    Raises :class:`KernelError`.
    """
    _bpf(_PROG_ATTACH, struct.pack("=IIII", cgroup_fd, program_fd, _CGROUP_DEVICE, _ALLOW_MULTI), "bpf PROG_ATTACH")


def filter_devices(directory: str, instructions: bytes) -> None:
    """Load a device program and attach it to the cgroup v2 ``directory``. Raises :class:`KernelError`."""
    program = load_device_program(instructions)
    try:
        cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            attach_device_program(cgroup, program)
        finally:
            os.close(cgroup)
    finally:
        os.close(program)


def _bpf(command: int, attributes: bytes, operation: str) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return check(syscall(_BPF, command, buffer, len(attributes)), operation)
