"""Device rules as a cgroup v2 device program (kernel: Documentation/admin-guide/cgroup-v2.rst, "Device controller").

The kernel calls the program for every open and mknod of a device with ``struct bpf_cgroup_dev_ctx``: the access type
(the wanted access in the upper half, block or character in the lower), major and minor. 1 lets it happen.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from containerkit.isolation.limits import DeviceRule

# include/uapi/linux/bpf.h: opcode, destination register, source register, jump offset, constant.
_LOAD = 0x61  # BPF_LDX | BPF_MEM | BPF_W
_AND, _RIGHT_SHIFT = 0x54, 0x74  # BPF_ALU (32 bit) with a constant
_MOVE_REGISTER, _MOVE = 0xBC, 0xB4
_JUMP_NOT_EQUAL = 0x56  # BPF_JMP32 | BPF_JNE with a constant
_EXIT = 0x95
_RESULT, _CONTEXT, _TYPE, _ACCESS, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 0
_TYPES = {"b": 1, "c": 2}
_ACCESS_BITS = {"m": 1, "r": 2, "w": 4}
_EVERY_ACCESS = 7


def _instruction(opcode: int, destination: int, source: int, offset: int, constant: int) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | destination, offset, constant)


def _answer(allow: bool) -> bytes:
    return _instruction(_MOVE, _RESULT, 0, 0, int(allow)) + _instruction(_EXIT, 0, 0, 0, 0)


def _rule(rule: DeviceRule) -> bytes:
    """The tests of one rule and its answer; a test that fails jumps behind it."""
    tests: list[tuple[int, ...]] = []
    if rule.type != "a":
        tests.append((_JUMP_NOT_EQUAL, _TYPE, 0, _TYPES[rule.type]))
    allowed = sum(_ACCESS_BITS[letter] for letter in set(rule.access))
    if allowed != _EVERY_ACCESS:
        tests.append((_MOVE_REGISTER, _SCRATCH, _ACCESS, 0))
        tests.append((_AND, _SCRATCH, 0, _EVERY_ACCESS & ~allowed))
        tests.append((_JUMP_NOT_EQUAL, _SCRATCH, 0, 0))
    if rule.major is not None:
        tests.append((_JUMP_NOT_EQUAL, _MAJOR, 0, rule.major))
    if rule.minor is not None:
        tests.append((_JUMP_NOT_EQUAL, _MINOR, 0, rule.minor))
    code = b""
    for position, (opcode, destination, source, constant) in enumerate(tests):
        behind = len(tests) - position - 1 + 2 if opcode == _JUMP_NOT_EQUAL else 0
        code += _instruction(opcode, destination, source, behind, constant)
    return code + _answer(rule.allow)


@functools.cache
def compile_rules(rules: tuple[DeviceRule, ...]) -> bytes:
    """The program for ``rules``, of which the last that fits decides; what no rule covers is denied.

    A deny rule must cover all of an access to refuse it, an allow rule to let it happen.
    """
    code = (
        _instruction(_LOAD, _TYPE, _CONTEXT, 0, 0)
        + _instruction(_MOVE_REGISTER, _ACCESS, _TYPE, 0, 0)
        + _instruction(_AND, _TYPE, 0, 0, 0xFFFF)
        + _instruction(_RIGHT_SHIFT, _ACCESS, 0, 0, 16)
        + _instruction(_LOAD, _MAJOR, _CONTEXT, 4, 0)
        + _instruction(_LOAD, _MINOR, _CONTEXT, 8, 0)
    )
    for rule in reversed(rules):
        code += _rule(rule)
        if rule[1:] == ("a", None, None, "rwm"):  # nothing before it can decide any more; unreachable code is refused
            return code
    return code + _answer(allow=False)
