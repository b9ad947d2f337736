"""Capabilities (capabilities(7)): names, masks, capset(2), the bounding and the ambient set.

Every setter reads back what the kernel holds afterwards and raises :class:`KernelError` where that is not what was
asked: a process that keeps a capability by accident is not confined.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from containerkit.errors.base import KernelError
from containerkit.errors.container import InvalidOption
from containerkit.linux.libc import check, libc

TYPE_CHECKING = False  # typing itself would cost every keeper 0.8 MB
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# By number, from 0: include/uapi/linux/capability.h.
_WORDS = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
NAMES = tuple(f"CAP_{word}" for word in _WORDS.split())
_NUMBERS = {name: number for number, name in enumerate(NAMES)}

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_CAP_AMBIENT = 47
_AMBIENT_IS_SET, _AMBIENT_RAISE, _AMBIENT_CLEAR_ALL = 1, 2, 4
_VERSION_3 = 0x20080522
_HALF = 0xFFFFFFFF

# Bound when the module loads: the launcher looks nothing up by name once it is inside a container.
_capget, _capset, _prctl = libc.capget, libc.capset, libc.prctl


class Sets:
    """The three sets of capset(2) as bit masks."""

    __slots__ = ("effective", "inheritable", "permitted")

    def __init__(self, effective: int, permitted: int, inheritable: int) -> None:
        self.effective = effective
        self.permitted = permitted
        self.inheritable = inheritable

    def __iter__(self) -> Iterator[int]:
        return iter((self.effective, self.permitted, self.inheritable))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sets) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Sets({self.effective:#x}, {self.permitted:#x}, {self.inheritable:#x})"


_last_cap = -1


def last_cap() -> int:
    """The highest capability number that the running kernel knows (``/proc/sys/kernel/cap_last_cap``)."""
    global _last_cap  # noqa: PLW0603 - read once a process
    if _last_cap < 0:
        with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
            _last_cap = int(file.read())
    return _last_cap


def number(name: str) -> int:
    """The number of ``CAP_CHOWN``, also written ``chown``. Raises :class:`InvalidOption` for an unknown name."""
    full = name.upper()
    full = full if full.startswith("CAP_") else f"CAP_{full}"
    if full not in _NUMBERS:
        raise InvalidOption(f"unknown capability {name!r}")
    return _NUMBERS[full]


def mask(names: Iterable[str]) -> int:
    """The bit mask of the named capabilities. Raises :class:`InvalidOption` for an unknown name."""
    bits = 0
    for name in names:
        bits |= 1 << number(name)
    return bits


def names(bits: int) -> tuple[str, ...]:
    """The capabilities in a mask, by ascending number; a number without a name is written ``CAP_41``."""
    return tuple(
        NAMES[bit] if bit < len(NAMES) else f"CAP_{bit}" for bit in range(bits.bit_length()) if bits >> bit & 1
    )


def known(bits: int) -> int:
    """``bits`` without the capabilities that the running kernel does not know."""
    return bits & ((1 << (last_cap() + 1)) - 1)


def capget() -> Sets:
    """``capget(2)`` of the calling thread."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    check(_capget(header, data), "capget")
    low_e, low_p, low_i, high_e, high_p, high_i = struct.unpack("=6I", data.raw)
    return Sets(high_e << 32 | low_e, high_p << 32 | low_p, high_i << 32 | low_i)


def capset(sets: Sets) -> None:
    """``capset(2)`` of the calling thread, read back. Raises :class:`KernelError`."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
    halves = [value & _HALF for value in sets] + [value >> 32 for value in sets]
    check(_capset(header, ctypes.create_string_buffer(struct.pack("=6I", *halves), 24)), "capset")
    held = capget()
    if held != sets:
        raise KernelError("capset", errno.EPERM, hint=f"asked for {sets}, the kernel holds {held}")


def bounding() -> int:
    """The bounding set of the calling thread as a mask."""
    bits = 0
    for cap in range(last_cap() + 1):
        if _control(_PR_CAPBSET_READ, cap):
            bits |= 1 << cap
    return bits


def drop_bounding(keep: int) -> None:
    """Drop every capability that is not in ``keep`` from the bounding set, read back. Irrevocable.

    What is already missing from the bounding set stays missing: it cannot be added. Raises :class:`KernelError`.
    """
    unwanted = [cap for cap in range(last_cap() + 1) if not keep >> cap & 1]
    for cap in unwanted:
        _control(_PR_CAPBSET_DROP, cap)
    left = [cap for cap in unwanted if _control(_PR_CAPBSET_READ, cap)]
    if left:
        still = ", ".join(names(sum(1 << cap for cap in left)))
        raise KernelError("prctl PR_CAPBSET_DROP", errno.EPERM, hint=f"still there: {still}")


def ambient() -> int:
    """The ambient set of the calling thread as a mask."""
    bits = 0
    for cap in range(last_cap() + 1):
        if _control(_PR_CAP_AMBIENT, _AMBIENT_IS_SET, cap):
            bits |= 1 << cap
    return bits


def set_ambient(bits: int) -> None:
    """Make the ambient set exactly ``bits``, read back; each must be permitted and inheritable already.

    Raises :class:`KernelError`.
    """
    _control(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0)
    for cap in range(bits.bit_length()):
        if bits >> cap & 1:
            _control(_PR_CAP_AMBIENT, _AMBIENT_RAISE, cap)
    if ambient() != bits:
        raise KernelError("prctl PR_CAP_AMBIENT", errno.EPERM, hint=f"wanted {', '.join(names(bits)) or 'none'}")


def _control(option: int, first: int, second: int = 0) -> int:
    return check(_prctl(option, first, second, 0, 0), "prctl", f"{option} {first}")
