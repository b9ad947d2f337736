"""Cgroup v1: one hierarchy a controller (kernel: Documentation/admin-guide/cgroup-v1)."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from containerkit.errors.base import Unsupported
from containerkit.isolation.cgroup_files import Stats, read, read_int, read_keys, signal_all
from containerkit.isolation.cgroup_layout import PARENT, CgroupLayout
from containerkit.isolation.limits import PERIOD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from containerkit.isolation.cgroup_layout import Hierarchy
    from containerkit.isolation.limits import DeviceRule, Limits

_ALWAYS = ("memory", "pids", "cpuacct")
_FREEZE_ATTEMPTS = 200
_FREEZE_PAUSE = 0.005


def controllers_for(hierarchy: Hierarchy, limits: Limits, devices: Sequence[DeviceRule]) -> tuple[str, ...]:
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
    wanted = [name for name in hierarchy.controllers if needed.get(name) or name in _ALWAYS]
    if devices and "devices" in hierarchy.controllers:
        wanted.append("devices")
    if not hierarchy.unified and "freezer" in hierarchy.controllers:
        wanted.append("freezer")
    return tuple(wanted)


def missing(hierarchy: Hierarchy, controller: str) -> Unsupported:
    """The error for a limit whose controller is not there."""
    return Unsupported(
        f"this host offers no usable {controller} cgroup controller"
        + (f": {hierarchy.reason}" if hierarchy.reason else f" (cgroup mode {hierarchy.mode})"),
        remedy=f"run as root, mount or delegate the {controller} controller, or drop the limit",
    )


def layout(hierarchy: Hierarchy, name: str, limits: Limits, devices: Sequence[DeviceRule]) -> CgroupLayout:
    """The layout of container ``name`` on v1; on a hybrid host with a tracking directory on the v2 tree beside it."""
    used = controllers_for(hierarchy, limits, devices)
    own = {controller: f"{hierarchy.controllers[controller]}/{PARENT}/{name}" for controller in used}
    directories = tuple(dict.fromkeys(own.values()))
    tracking = f"{hierarchy.unified}/{PARENT}/{name}" if hierarchy.unified else own.get("freezer", "")
    everything = tuple(dict.fromkeys((*directories, tracking))) if tracking else directories
    return CgroupLayout(
        mode=hierarchy.mode,
        name=name,
        dirs=tuple(path for directory in everything for path in (os.path.dirname(directory), directory)),
        writes=(*_limit_writes(hierarchy, own, limits), *_device_writes(own, devices)),
        tasks=tuple(f"{directory}/tasks" for directory in directories),
        into=tracking if hierarchy.unified else "",
        tracking=tracking,
        kill=f"{tracking}/cgroup.kill" if hierarchy.unified else "",
        devices_enforced="devices" in own,
        remove=everything,
    )


def _limit_writes(hierarchy: Hierarchy, own: Mapping[str, str], limits: Limits) -> list[tuple[str, str, str]]:
    writes = []
    if limits.memory:
        size, directory = limits.memory, own["memory"]
        writes.append((f"{directory}/memory.limit_in_bytes", str(size), f"memory={size}"))
        swap = limits.memory_swap or 2 * size
        if os.path.exists(f"{hierarchy.controllers['memory']}/memory.memsw.limit_in_bytes"):
            writes.append((f"{directory}/memory.memsw.limit_in_bytes", str(swap), f"memory_swap={swap}"))
        elif limits.memory_swap:
            raise Unsupported(
                "this kernel does not account swap", remedy="boot with swapaccount=1, or drop memory_swap"
            )
    if limits.cpu_shares:
        writes.append((f"{own['cpu']}/cpu.shares", str(limits.cpu_shares), f"cpu_shares={limits.cpu_shares}"))
    if limits.quota:
        if not os.path.exists(f"{hierarchy.controllers['cpu']}/cpu.cfs_quota_us"):
            raise Unsupported("this kernel has no CPU quota", remedy="use a kernel with CONFIG_CFS_BANDWIDTH")
        writes.append((f"{own['cpu']}/cpu.cfs_period_us", str(PERIOD), f"cpus={limits.cpus}"))
        writes.append((f"{own['cpu']}/cpu.cfs_quota_us", str(limits.quota), f"cpus={limits.cpus}"))
    if limits.cpuset_cpus:
        writes.extend(_cpuset_writes(hierarchy.controllers["cpuset"], own["cpuset"], limits.cpuset_cpus))
    if limits.pids:
        writes.append((f"{own['pids']}/pids.max", str(limits.pids), f"pids_limit={limits.pids}"))
    return writes


def _cpuset_writes(base: str, own: str, cpus: str) -> list[tuple[str, str, str]]:
    """A new v1 cpuset has no CPUs and no memory nodes, and takes no task before it has both."""
    there = (read(f"{base}/cpuset.cpus") or read(f"{base}/cpuset.effective_cpus")).strip()
    nodes = (read(f"{base}/cpuset.mems") or read(f"{base}/cpuset.effective_mems")).strip()
    parent, what = os.path.dirname(own), f"cpuset_cpus={cpus}"
    return [
        (f"{parent}/cpuset.cpus", there, what),
        (f"{parent}/cpuset.mems", nodes, what),
        (f"{own}/cpuset.cpus", cpus, what),
        (f"{own}/cpuset.mems", nodes, what),
    ]


def _device_writes(own: Mapping[str, str], devices: Sequence[DeviceRule]) -> list[tuple[str, str, str]]:
    if "devices" not in own:
        return []
    return [
        (f"{own['devices']}/devices.{'allow' if rule.allow else 'deny'}", str(rule), f"device rule {rule}")
        for rule in devices
    ]


def exec_layout(container: CgroupLayout, exec_id: str) -> CgroupLayout:
    """The layout of a process that joins ``container`` on pure v1: its own freezer, all else shared."""
    freezer = container.tracking
    own = f"{freezer}/exec-{exec_id}" if freezer else ""
    swapped = {f"{freezer}/tasks": f"{own}/tasks"} if freezer else {}
    return CgroupLayout(
        mode=container.mode,
        name=f"{container.name}/exec-{exec_id}",
        dirs=(own,) if own else (),
        tasks=tuple(swapped.get(task, task) for task in container.tasks),
        tracking=own,
        devices_enforced=container.devices_enforced,
        remove=(own,) if own else (),
    )


def directories(hierarchy: Hierarchy, name: str) -> dict[str, str]:
    """Controller -> directory, for those that exist."""
    paths = {controller: f"{base}/{PARENT}/{name}" for controller, base in hierarchy.controllers.items()}
    return {controller: path for controller, path in paths.items() if os.path.isdir(path)}


def stats(dirs: Mapping[str, str]) -> Stats:
    """Counters and limits; -1 where the controller is not used."""
    memory, pids, cpu = dirs.get("memory", ""), dirs.get("pids", ""), dirs.get("cpu", "")
    throttled = read_keys(f"{cpu}/cpu.stat")
    cache = read_keys(f"{memory}/memory.stat").get("total_inactive_file", 0)
    return Stats(
        memory=read_int(f"{memory}/memory.usage_in_bytes"),
        memory_inactive_file=cache,
        memory_peak=read_int(f"{memory}/memory.max_usage_in_bytes"),
        memory_limit=_unlimited(read_int(f"{memory}/memory.limit_in_bytes")),
        cpu_ns=read_int(f"{dirs.get('cpuacct', '')}/cpuacct.usage"),
        throttled_ns=throttled.get("throttled_time", 0),
        pids=read_int(f"{pids}/pids.current"),
        pids_limit=read_int(f"{pids}/pids.max"),
    )


def _unlimited(value: int) -> int:
    """v1 says "no limit" as the highest multiple of the page size."""
    return -1 if value >= (1 << 63) - (1 << 20) else value


def oom_kills(dirs: Mapping[str, str]) -> int:
    """How often the kernel killed a process because the memory limit was reached."""
    return read_keys(f"{dirs.get('memory', '')}/memory.oom_control").get("oom_kill", 0)


def freeze(tracking: str) -> None:
    """Stop every process, until :func:`thaw`. Raises :class:`TimeoutError` after about a second."""
    state = f"{tracking}/freezer.state"
    for _ in range(_FREEZE_ATTEMPTS):
        # A fork that races with the freeze leaves the group in FREEZING until the state is written again.
        with open(state, "w", encoding="ascii") as file:
            file.write("FROZEN")
        if read(state).strip() == "FROZEN":
            return
        time.sleep(_FREEZE_PAUSE)
    thaw(tracking)
    raise TimeoutError(f"{tracking} did not freeze")


def thaw(tracking: str) -> None:
    """Let the processes go on."""
    with open(f"{tracking}/freezer.state", "w", encoding="ascii") as file:
        file.write("THAWED")


def kill(tracking: str) -> None:
    """SIGKILL to every process: frozen first, so that none can fork away; they die when thawed."""
    freeze(tracking)
    try:
        signal_all(tracking)
    finally:
        thaw(tracking)
