"""The part of the kernel's BPF machine that device programs use."""

from __future__ import annotations

import struct


def allows(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """Run a device program on one access; an unknown instruction is a KeyError."""
    wanted = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in access)
    context = struct.pack("=III", wanted << 16 | {"b": 1, "c": 2}[kind], major, minor)
    registers: dict[int, int] = {}
    instructions = list(struct.iter_unpack("=BBhi", program))
    position = 0
    while True:
        opcode, both, offset, constant = instructions[position]
        destination, source = both & 15, both >> 4
        position += 1
        if opcode == 0x95:
            return {0: False, 1: True}[registers[0]]
        if opcode == 0x61:
            assert source == 1
            registers[destination] = struct.unpack_from("=I", context, offset)[0]
        elif opcode == 0x56:
            position += offset if registers[destination] != constant else 0
        else:
            registers[destination] = {
                0x54: lambda d, c: registers[d] & c,
                0x74: lambda d, c: registers[d] >> c,
                0xB4: lambda _, c: c,
                0xBC: lambda _, __, s=source: registers[s],
            }[opcode](destination, constant)
