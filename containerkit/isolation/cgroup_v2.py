"""Cgroup v2: one tree (kernel: Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import functools
import os
import select
from typing import TYPE_CHECKING

from containerkit.errors.base import Unsupported
from containerkit.isolation.cgroup_files import Stats, read, read_int, read_keys
from containerkit.isolation.cgroup_layout import PARENT, CgroupLayout
from containerkit.isolation.cgroup_v1 import missing
from containerkit.isolation.limits import PERIOD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from containerkit.isolation.cgroup_layout import Hierarchy
    from containerkit.isolation.limits import DeviceRule, Limits

_ALWAYS = ("memory", "pids", "cpu")
_FREEZE_SECONDS = 1.0


def controllers_for(hierarchy: Hierarchy, limits: Limits) -> tuple[str, ...]:
    """The controllers that a container with these limits uses. Raises :class:`Unsupported` for a missing one."""
    needed = {
        "memory": limits.memory or limits.memory_swap,
        "cpu": limits.cpus or limits.cpu_shares,
        "cpuset": limits.cpuset_cpus,
        "pids": limits.pids,
    }
    for name, value in needed.items():
        if value and name not in hierarchy.controllers:
            raise missing(hierarchy, name)
    return tuple(name for name in hierarchy.controllers if needed.get(name) or name in _ALWAYS)


def layout(
    hierarchy: Hierarchy, name: str, limits: Limits, devices: Sequence[DeviceRule], *, device_filter: bool
) -> CgroupLayout:
    """The layout of container ``name``; ``device_filter`` says whether this kernel can run device programs."""
    used = controllers_for(hierarchy, limits)
    if not hierarchy.unified:
        return CgroupLayout(mode=hierarchy.mode, name=name)
    parent = f"{hierarchy.unified}/{PARENT}"
    own, enforced = f"{parent}/{name}", bool(devices) and device_filter
    enable = " ".join(f"+{controller}" for controller in used)
    hand_down = [(f"{path}/cgroup.subtree_control", enable, "controllers") for path in (hierarchy.unified, parent)]
    return CgroupLayout(
        mode=hierarchy.mode,
        name=name,
        dirs=(parent, own),
        writes=(*(hand_down if used else ()), *_limit_writes(own, limits)),
        into=own,
        tracking=own,
        kill=f"{own}/cgroup.kill",
        device_program=_device_program(devices) if enforced else b"",
        devices_enforced=enforced,
        remove=(own,),
    )


def _device_program(devices: Sequence[DeviceRule]) -> bytes:
    from containerkit.isolation.device_program import compile_rules

    return compile_rules(tuple(devices))


def _limit_writes(own: str, limits: Limits) -> list[tuple[str, str, str]]:
    writes = []
    if limits.memory:
        size = limits.memory
        writes.append((f"{own}/memory.max", str(size), f"memory={size}"))
        if _swap_accounted():
            swap = "max" if limits.memory_swap == -1 else str((limits.memory_swap or 2 * size) - size)
            writes.append((f"{own}/memory.swap.max", swap, f"memory_swap={limits.memory_swap or 2 * size}"))
        elif limits.memory_swap:
            raise Unsupported("this kernel accounts no swap", remedy="boot with swapaccount=1, or drop memory_swap")
    if limits.cpu_shares:
        writes.append((f"{own}/cpu.weight", str(weight(limits.cpu_shares)), f"cpu_shares={limits.cpu_shares}"))
    if limits.quota:
        writes.append((f"{own}/cpu.max", f"{limits.quota} {PERIOD}", f"cpus={limits.cpus}"))
    if limits.cpuset_cpus:
        writes.append((f"{own}/cpuset.cpus", limits.cpuset_cpus, f"cpuset_cpus={limits.cpuset_cpus}"))
    if limits.pids:
        writes.append((f"{own}/pids.max", str(limits.pids), f"pids_limit={limits.pids}"))
    return writes


@functools.cache
def _swap_accounted() -> bool:
    """Whether ``memory.swap.max`` will be there: the root cgroup does not tell, so ask what decides it."""
    return os.path.exists("/proc/swaps") and "swapaccount=0" not in read("/proc/cmdline").split()


def weight(shares: int) -> int:
    """``cpu.weight`` (1 to 10000) for v1 shares (2 to 262144), linear between the ends of both ranges."""
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


def exec_layout(container: CgroupLayout, exec_id: str) -> CgroupLayout:
    """The layout of a process that joins ``container``: a sub-cgroup without limits of its own, to kill it by.

    The container's cgroup hands no controllers down, which is what lets it hold processes and children at once. On a
    hybrid host the process also joins the container's v1 controllers.
    """
    own = f"{container.into}/exec-{exec_id}"
    return CgroupLayout(
        mode=container.mode,
        name=f"{container.name}/exec-{exec_id}",
        dirs=(own,),
        tasks=container.tasks,
        into=own,
        tracking=own,
        kill=f"{own}/cgroup.kill",
        devices_enforced=container.devices_enforced,
        remove=(own,),
    )


def directories(hierarchy: Hierarchy, name: str) -> dict[str, str]:
    """Controller -> directory, for those that the cgroup has."""
    own = f"{hierarchy.unified}/{PARENT}/{name}"
    return dict.fromkeys((*read(f"{own}/cgroup.controllers").split(), "cgroup"), own) if os.path.isdir(own) else {}


def stats(dirs: Mapping[str, str]) -> Stats:
    """Counters and limits; -1 where the controller is not used."""
    own = dirs.get("cgroup", "")
    cpu = read_keys(f"{own}/cpu.stat")
    return Stats(
        memory=read_int(f"{own}/memory.current"),
        memory_inactive_file=read_keys(f"{own}/memory.stat").get("inactive_file", 0),
        memory_peak=read_int(f"{own}/memory.peak"),
        memory_limit=read_int(f"{own}/memory.max"),
        cpu_ns=cpu["usage_usec"] * 1000 if "usage_usec" in cpu else -1,
        throttled_ns=cpu.get("throttled_usec", 0) * 1000,
        pids=read_int(f"{own}/pids.current"),
        pids_limit=read_int(f"{own}/pids.max"),
    )


def oom_kills(dirs: Mapping[str, str]) -> int:
    """How often the kernel killed a process because the memory limit was reached."""
    return read_keys(f"{dirs.get('cgroup', '')}/memory.events").get("oom_kill", 0)


def freeze(tracking: str) -> None:
    """Stop every process, until :func:`thaw`. Raises :class:`TimeoutError` after about a second."""
    _set_frozen(tracking, frozen=True)


def thaw(tracking: str) -> None:
    """Let the processes go on."""
    _set_frozen(tracking, frozen=False)


def _set_frozen(tracking: str, *, frozen: bool) -> None:
    with open(f"{tracking}/cgroup.freeze", "w", encoding="ascii") as file:
        file.write("1" if frozen else "0")
    if frozen and not wait_event(tracking, "frozen", 1, _FREEZE_SECONDS):
        thaw(tracking)
        raise TimeoutError(f"{tracking} did not freeze")


def wait_event(directory: str, key: str, value: int, timeout: float) -> bool:
    """Sleep until ``cgroup.events`` says ``key value``, or the cgroup is gone; False after ``timeout`` seconds."""
    path = f"{directory}/cgroup.events"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLPRI)
        while True:
            events = dict(line.split() for line in os.pread(descriptor, 4096, 0).decode().splitlines())
            if int(events.get(key, -1)) == value:
                return True
            if not poll.poll(timeout * 1000):
                return False
    except OSError:  # ENODEV: removed meanwhile
        return not os.path.exists(path)
    finally:
        os.close(descriptor)


def kill(tracking: str) -> None:
    """SIGKILL to every process of the tree at once, frozen or being forked (``cgroup.kill``, Linux 5.14)."""
    with open(f"{tracking}/cgroup.kill", "w", encoding="ascii") as file:
        file.write("1")
