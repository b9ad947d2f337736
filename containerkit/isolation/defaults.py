"""What a container gets unless told otherwise, as data: the same as Docker gives."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from containerkit.isolation.limits import DeviceRule
from containerkit.linux.fileview import Mount

CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV = (f"PATH={PATH}",)

SHM_SIZE = 64 << 20

MOUNTS = (
    Mount("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    Mount("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    Mount("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    Mount("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    Mount("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", f"size={SHM_SIZE}")),  # noqa: S108
)
"""In mount order. ``/sys/fs/cgroup`` depends on the host: :func:`containerkit.isolation.cgroup.cgroup_mounts`."""

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
"""Hidden; those that do not exist are skipped. :func:`masked_paths` adds the ones that depend on the host."""

READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

SYSCTLS = (("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647"))
"""Set in a container's own network namespace, so that its users may bind low ports and ping without a capability."""


class Device(NamedTuple):
    """A device node."""

    path: str
    type: str
    major: int
    minor: int
    mode: int = 0o666
    uid: int = 0
    gid: int = 0


DEVICES = (
    Device("/dev/null", "c", 1, 3),
    Device("/dev/zero", "c", 1, 5),
    Device("/dev/full", "c", 1, 7),
    Device("/dev/random", "c", 1, 8),
    Device("/dev/urandom", "c", 1, 9),
    Device("/dev/tty", "c", 5, 0),
)
"""OCI runtime-spec, config-linux.md, "Default Devices". ``/dev/console`` is made for a container with a terminal."""

DEVICE_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
)
"""(path, target of the symbolic link)"""

DEVICE_RULES = (
    DeviceRule(allow=False),
    DeviceRule(True, "c", None, None, "m"),
    DeviceRule(True, "b", None, None, "m"),
    *(DeviceRule(True, device.type, device.major, device.minor) for device in DEVICES),
    DeviceRule(True, "c", 5, 1),  # console
    DeviceRule(True, "c", 5, 2),  # ptmx
    DeviceRule(True, "c", 136, None),  # pts/N
)
"""mknod of anything, use of the default devices and terminals, nothing else."""


@functools.cache
def masked_paths() -> tuple[str, ...]:
    """:data:`MASKED_PATHS` and, where the host has them, the CPUs' throttling counters (they tell of other tenants)."""
    base = "/sys/devices/system/cpu"
    names = sorted(name for name in os.listdir(base) if name.startswith("cpu") and name[3:].isdecimal())
    paths = (f"{base}/{name}/thermal_throttle" for name in names)
    return (*MASKED_PATHS, *(path for path in paths if os.path.isdir(path)))
