"""What a container may use: :class:`Limits` and :class:`DeviceRule`, and Docker's way to write them."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from containerkit.errors import InvalidOption

PERIOD = 100_000
MINIMUM_MEMORY = 6 << 20
_MINIMUM_CPUS = 0.01
_MINIMUM_SHARES = 2
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgtp]?)(?:i?b)?", re.ASCII | re.IGNORECASE)
_CPUSET = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*", re.ASCII)


class Limits(NamedTuple):
    """Resource limits; None is "not limited". Made and checked by :func:`parse_limits`."""

    memory: int | None = None
    """bytes"""
    memory_swap: int | None = None
    """memory and swap together, bytes; -1 for unlimited swap; None for Docker's default, twice the memory"""
    cpus: float | None = None
    """CPU seconds a second, enforced by quota over a period of 100 ms"""
    cpu_shares: int | None = None
    """relative weight, 1024 is the usual one (cgroup v1's scale)"""
    cpuset_cpus: str | None = None
    """CPUs to run on: ``0-2,4``"""
    pids: int | None = None
    """processes and threads"""

    @property
    def quota(self) -> int | None:
        """CPU time in microseconds a period of :data:`PERIOD` microseconds."""
        return None if self.cpus is None else max(1000, round(self.cpus * PERIOD))


class DeviceRule(NamedTuple):
    """One line of a device allow list; later rules win. None stands for every number."""

    allow: bool
    type: str = "a"
    """``c``, ``b`` or ``a`` for both"""
    major: int | None = None
    minor: int | None = None
    access: str = "rwm"
    """any of r(ead), w(rite), m(knod)"""

    def __str__(self) -> str:
        """The line as cgroup v1's ``devices.allow`` takes it."""
        if self.type == "a":
            return "a"
        major = "*" if self.major is None else self.major
        return f"{self.type} {major}:{'*' if self.minor is None else self.minor} {self.access}"


def parse_memory(value: str | int, option: str = "memory") -> int:
    """Bytes from ``67108864``, ``"64m"``, ``"1.5g"`` or ``"512KiB"``: Docker's suffixes, each 1024 of the one before.

    Raises :class:`InvalidOption` that names ``option``.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise InvalidOption(f"{option}: {value!r} is no size", hint="give bytes, or a number with b, k, m or g")
        unit = _UNITS[match[2].lower()]
        size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if not 0 <= size < 1 << 63:
        raise InvalidOption(f"{option}: {value!r} is out of range")
    return size


def parse_limits(
    *,
    memory: str | int | None = None,
    memory_swap: str | int | None = None,
    cpus: float | None = None,
    cpu_shares: int | None = None,
    cpuset_cpus: str | None = None,
    pids_limit: int | None = None,
) -> Limits:
    """Check Docker's options and give :class:`Limits`. As with Docker, 0 (and -1 for pids) means not limited.

    Raises :class:`InvalidOption` for values that cannot be meant: memory below 6 MiB, more CPUs than there are, a CPU
    list that does not parse, ``memory_swap`` without or below ``memory``.
    """
    size = parse_memory(memory) if memory is not None else 0
    if 0 < size < MINIMUM_MEMORY:
        raise InvalidOption(f"memory: {memory!r} is below the minimum of 6m")
    return Limits(
        memory=size or None,
        memory_swap=_swap(memory_swap, size),
        cpus=_cpus(cpus),
        cpu_shares=_shares(cpu_shares),
        cpuset_cpus=_cpuset(cpuset_cpus),
        pids=_pids(pids_limit),
    )


def _swap(value: str | int | None, memory: int) -> int | None:
    if value is None or value in {0, "0"}:
        return None
    if value in {-1, "-1"}:
        return -1
    size = parse_memory(value, "memory_swap")
    if not memory:
        raise InvalidOption("memory_swap: needs memory= as well")
    if size < memory:
        raise InvalidOption(f"memory_swap: {value!r} is below memory", hint="it counts memory and swap together")
    return size


def _pids(value: int | None) -> int | None:
    if value is not None and not isinstance(value, int):
        raise InvalidOption(f"pids_limit: {value!r} is no number of processes")
    return value if value and value > 0 else None


def _cpus(value: float | None) -> float | None:
    if not value:
        return None
    there = os.cpu_count() or 1
    if not isinstance(value, (int, float)) or not _MINIMUM_CPUS <= value <= there:
        raise InvalidOption(f"cpus: {value!r} is not from 0.01 to {there}", hint=f"this host has {there} CPUs")
    return float(value)


def _shares(value: int | None) -> int | None:
    if not value:
        return None
    if not isinstance(value, int) or value < 0:
        raise InvalidOption(f"cpu_shares: {value!r} is no weight from 2 upwards")
    return max(_MINIMUM_SHARES, value)


def _cpuset(value: str | None) -> str | None:
    if not value:
        return None
    if not isinstance(value, str) or not _CPUSET.fullmatch(value):
        raise InvalidOption(f"cpuset_cpus: {value!r} is no list of CPUs", hint='write "0-2,4"')
    return value
