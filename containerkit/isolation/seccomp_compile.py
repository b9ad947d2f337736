"""Seccomp profiles, and their compilation to a short classic BPF program (kernel: userspace-api/seccomp_filter.rst).

A program looks at the audit architecture, then finds the system call number in a binary tree of *ranges* with the same
verdict. Numbers beyond the last one that the profile names are answered with ENOSYS, so that a C library falls back
for calls that are newer than the profile; everything else that no rule allows gets the profile's own answer.
"""

from __future__ import annotations

import errno as errnos
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from containerkit.errors.base import Unsupported
from containerkit.isolation.profiles.syscalls import numbers

if TYPE_CHECKING:
    from collections.abc import Collection

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

Operator = Literal["==", "!=", "<", "<=", ">", ">=", "&=="]


def errno(number: int) -> int:
    """The verdict "fail with this errno"."""
    return _ERRNO | number


class Condition(NamedTuple):
    """A test of one argument of a system call, unsigned."""

    argument: int
    operator: Operator
    value: int
    mask: int = 0
    """for ``&==``: the argument's bits in ``mask`` equal ``value``"""
    bits: int = 64
    """32 where the kernel takes an ``int``: it ignores the upper half, so must the test"""


class Rule(NamedTuple):
    """What happens to some system calls, provided that all conditions hold.

    The rule itself applies only to containers that have all of ``capabilities`` and none of ``without``, on the
    machines in ``machines`` if there are any.
    """

    names: tuple[str, ...]
    action: int = ALLOW
    conditions: tuple[Condition, ...] = ()
    capabilities: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()


class Profile(NamedTuple):
    """Rules, and the verdict for calls that none of them covers."""

    default: int
    rules: tuple[Rule, ...]


class _Abi(NamedTuple):
    name: str
    bits: int


_MACHINES: dict[str, tuple[tuple[int, tuple[_Abi, ...]], ...]] = {
    "x86_64": ((0xC000003E, (_Abi("x86_64", 64), _Abi("x32", 32))), (0x40000003, (_Abi("i386", 32),))),
    "aarch64": ((0xC00000B7, (_Abi("aarch64", 64),)), (0x40000028, (_Abi("arm", 32),))),
}
"""machine -> (audit architecture, the ABIs that share it): include/uapi/linux/audit.h"""

# A verdict is a chain of (conditions, action), of which the last has no conditions.
_Verdict = tuple[tuple[tuple[Condition, ...], int], ...]

_UNKNOWN = errno(errnos.ENOSYS)
_REGION = 0xFFFF


def compile_profile(profile: Profile, machine: str, capabilities: Collection[str]) -> bytes:
    """The program, an array of ``struct sock_filter``, for a container with these capabilities.

    Raises :class:`Unsupported` for a machine without a table of system call numbers.
    """
    if machine not in _MACHINES:
        raise Unsupported(
            f"no table of system call numbers for {machine}", remedy="run the container with seccomp unconfined"
        )
    held = set(capabilities)
    rules = [
        rule
        for rule in profile.rules
        if held.issuperset(rule.capabilities)
        and held.isdisjoint(rule.without)
        and (not rule.machines or machine in rule.machines)
    ]
    code = _Assembler()
    entries = []
    for audit, abis in reversed(_MACHINES[machine]):
        code.follow(code.tree(_ranges(abis, rules, profile.default)))
        entries.append((audit, code.emit(_LOAD, 0, _NUMBER)))
    target = code.verdict(KILL_PROCESS)
    for audit, tree in entries:
        target = code.jump(_JEQ, audit, tree, target)
    code.emit(_LOAD, 0, _ARCHITECTURE)
    return code.program()


def _ranges(abis: tuple[_Abi, ...], rules: list[Rule], default: int) -> list[tuple[int, _Verdict]]:
    """(first number, verdict) of every range, ascending from 0, neighbours different."""
    verdicts: dict[int, _Verdict] = {}
    for abi in abis:
        verdicts.update(_verdicts(abi, rules, default))
    last: dict[int, int] = {}
    for number in verdicts:
        base = number & ~_REGION
        last[base] = max(last.get(base, number), number)
    edges: dict[int, _Verdict] = {0: (((), _UNKNOWN),)}
    for base, highest in last.items():
        for number in range(base, highest + 1):
            edges[number] = verdicts.get(number, (((), default),))
        edges[highest + 1] = (((), _UNKNOWN),)
    ranges: list[tuple[int, _Verdict]] = []
    for number, verdict in sorted(edges.items()):
        if not ranges or ranges[-1][1] != verdict:
            ranges.append((number, verdict))
    return ranges


def _verdicts(abi: _Abi, rules: list[Rule], default: int) -> dict[int, _Verdict]:
    """The verdict of every number that a rule names: an unconditional rule decides, else the first that fits."""
    table = numbers(abi.name)
    chains: dict[int, list[tuple[tuple[Condition, ...], int]]] = {}
    for rule in rules:
        conditions = tuple(condition._replace(bits=min(condition.bits, abi.bits)) for condition in rule.conditions)
        for name in rule.names:
            if name in table:
                chains.setdefault(table[name], []).append((conditions, rule.action))
    verdicts: dict[int, _Verdict] = {}
    for number, chain in chains.items():
        plain = [entry for entry in chain if not entry[0]]
        verdicts[number] = (plain[0],) if plain else (*chain, ((), default))
    return verdicts


# Classic BPF opcodes (linux/bpf_common.h), offsets in struct seccomp_data (linux/seccomp.h, little endian).
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_JA, _JEQ, _JGT, _JGE, _JSET = 0x05, 0x15, 0x25, 0x35, 0x45
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_REACH = 250
_LOW = 0xFFFFFFFF


class _Assembler:
    """Builds a program from its end: every jump goes forward, so its target is known already.

    A target is a position counted from the end.
    """

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int]] = []
        self._verdicts: dict[int | _Verdict, int] = {}

    def program(self) -> bytes:
        return b"".join(struct.pack("=HBBI", *instruction) for instruction in reversed(self._code))

    def emit(self, opcode: int, target: int, constant: int, otherwise: int = 0) -> int:
        self._code.append((opcode, target, otherwise, constant))
        return len(self._code) - 1

    def _near(self, target: int) -> int:
        """``target``, or an unconditional jump to it where a conditional one (8 bit) would not reach."""
        distance = len(self._code) - target - 1
        return target if distance < _REACH else self.emit(_JA, 0, distance)

    def follow(self, target: int) -> None:
        """Let what is emitted next run into ``target``."""
        if target != len(self._code) - 1:
            self.emit(_JA, 0, len(self._code) - target - 1)

    def jump(self, opcode: int, constant: int, yes: int, no: int) -> int:
        yes = self._near(yes)
        no = self._near(no)
        here = len(self._code)
        return self.emit(opcode, here - yes - 1, constant, here - no - 1)

    def verdict(self, action: int) -> int:
        known = self._verdicts.get(action)
        if known is None or len(self._code) - known >= _REACH:
            known = self._verdicts[action] = self.emit(_RETURN, 0, action)
        return known

    def tree(self, ranges: list[tuple[int, _Verdict]]) -> int:
        """A binary search by number among ``ranges``."""
        if len(ranges) == 1:
            return self._chain(ranges[0][1])
        middle = len(ranges) // 2
        above = self.tree(ranges[middle:])
        below = self.tree(ranges[:middle])
        return self.jump(_JGE, ranges[middle][0], above, below)

    def _chain(self, verdict: _Verdict) -> int:
        known = self._verdicts.get(verdict)
        if known is not None and len(self._code) - known < _REACH:
            return known
        target = self.verdict(verdict[-1][1])
        for conditions, action in reversed(verdict[:-1]):
            holds, fails = self.verdict(action), target
            for condition in reversed(conditions):
                holds = self._condition(condition, holds, fails)
            target = holds
        if len(verdict) > 1:
            self._verdicts[verdict] = target
        return target

    def _condition(self, condition: Condition, yes: int, no: int) -> int:
        if condition.operator in {"!=", "<", "<="}:
            yes, no = no, yes
        if condition.operator == "&==":
            return self._masked(condition, yes, no)
        low, high = condition.value & _LOW, condition.value >> 32
        offset = _ARGUMENTS + 8 * condition.argument
        opcode = {"==": _JEQ, "!=": _JEQ, ">": _JGT, "<=": _JGT, ">=": _JGE, "<": _JGE}[condition.operator]
        self.jump(opcode, low, yes, no)
        target = self.emit(_LOAD, 0, offset)
        if condition.bits > 32:  # noqa: PLR2004
            target = self.jump(_JEQ, high, target, no)
            if opcode != _JEQ:
                target = self.jump(_JGT, high, yes, target)
            target = self.emit(_LOAD, 0, offset + 4)
        return target

    def _masked(self, condition: Condition, yes: int, no: int) -> int:
        offset = _ARGUMENTS + 8 * condition.argument
        target = yes
        for shift in (0, 32) if condition.bits > 32 else (0,):  # noqa: PLR2004
            mask, value = condition.mask >> shift & _LOW, condition.value >> shift & _LOW
            if not mask and not value:
                continue
            if value:
                self.jump(_JEQ, value, target, no)
                self.emit(_AND, 0, mask)
            else:
                self.jump(_JSET, mask, no, target)
            target = self.emit(_LOAD, 0, offset + shift // 8)
        return target
