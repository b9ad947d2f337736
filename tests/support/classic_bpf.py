"""A classic BPF machine for seccomp programs, and libseccomp as the oracle to compare with."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from containerkit.isolation.profiles.syscalls import numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from containerkit.isolation.seccomp_compile import Profile

X86_64, I386, X32, AARCH64, ARM = 0xC000003E, 0x40000003, 0x4000003E, 0xC00000B7, 0x40000028
ABIS = {"x86_64": X86_64, "i386": I386, "x32": X32, "aarch64": AARCH64, "arm": ARM}


class Call(NamedTuple):
    """One system call as a filter sees it (``struct seccomp_data``)."""

    architecture: int
    number: int
    arguments: tuple[int, ...] = (0, 0, 0, 0, 0, 0)

    def data(self) -> bytes:
        arguments = (*self.arguments, 0, 0, 0, 0, 0, 0)[:6]
        return struct.pack("=IIQ6Q", self.number, self.architecture, 0, *arguments)


def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("=HBBI", program))


def run(instructions: Sequence[tuple[int, int, int, int]], call: Call) -> int:
    """The verdict; an instruction that seccomp does not know is a KeyError, a jump out of the program an IndexError."""
    data, accumulator, memory, position = call.data(), 0, {}, 0
    while True:
        opcode, yes, no, constant = instructions[position]
        position += 1
        if opcode == 0x06:
            return constant
        if opcode == 0x20:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif opcode == 0x54:
            accumulator &= constant
        elif opcode == 0x02:
            memory[constant] = accumulator
        elif opcode == 0x60:
            accumulator = memory[constant]
        elif opcode == 0x05:
            position += constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x25: accumulator > constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }[opcode]
            position += yes if holds else no


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


_OPERATORS = {"!=": 1, "<": 2, "<=": 3, "==": 4, ">=": 5, ">": 6, "&==": 7}


class Libseccomp:
    """The library through ctypes; made only where it is installed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p

    def agrees(self, name: str) -> bool:
        """Whether this version has heard of the call, and gives it our number on every machine."""
        if self._library.seccomp_syscall_resolve_name(name.encode()) == -1:
            return False
        for abi, architecture in ABIS.items():
            theirs = self._library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(architecture), name.encode())
            # Below -1: not on this machine, or (-100 to -299) a call of socketcall or ipc, which get a rule as well.
            if theirs != numbers(abi).get(name, theirs if theirs < 0 else -1) and not -300 < theirs <= -100:
                return False
        return True

    def compile(self, profile: Profile, architectures: Iterable[int]) -> bytes:
        """The profile's rules as they stand, added one after the other as the OCI runtimes do."""
        library = self._library
        context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(profile.default)))
        assert library.seccomp_arch_remove(context, ctypes.c_uint32(0)) == 0
        for architecture in architectures:
            assert library.seccomp_arch_add(context, ctypes.c_uint32(architecture)) == 0
        for rule in profile.rules:
            tests = [
                _Comparison(c.argument, _OPERATORS[c.operator], *((c.mask, c.value) if c.mask else (c.value, 0)))
                for c in rule.conditions
            ]
            for name in rule.names:
                number = library.seccomp_syscall_resolve_name(name.encode())
                array = (_Comparison * len(tests))(*tests)
                result = library.seccomp_rule_add_array(
                    context, ctypes.c_uint32(rule.action), number, len(tests), array if tests else None
                )
                assert result == 0, (name, result)
        fd = os.memfd_create("bpf")
        try:
            assert library.seccomp_export_bpf(context, fd) == 0
            return os.pread(fd, 1 << 20, 0)
        finally:
            os.close(fd)
            library.seccomp_release(context)
