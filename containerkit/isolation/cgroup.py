"""Cgroups: the limits of a container, and the handle on all its processes.

:func:`layout` decides everything as data; the launcher performs it with plain file operations. :class:`Cgroup` is the
handle afterwards. v1, hybrid and v2 hosts differ only in which of two modules of the same functions is asked:
``cgroup_v1`` or ``cgroup_v2`` for the controllers, and likewise for tracking (on a hybrid host v1 and v2).
"""

from __future__ import annotations

import functools
import os
import time
from typing import TYPE_CHECKING

from containerkit.errors.base import KernelError, Unsupported
from containerkit.isolation import cgroup_v1, cgroup_v2
from containerkit.isolation.cgroup_files import Stats, children, processes, read
from containerkit.isolation.cgroup_layout import PARENT, CgroupLayout, Hierarchy, detect
from containerkit.isolation.limits import DeviceRule, Limits, parse_limits, parse_memory
from containerkit.linux.fileview import Mount

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PARENT", "Cgroup", "CgroupLayout", "DeviceRule", "Hierarchy", "Limits", "Stats", "cgroup_mounts", "detect",
    "device_filter_available", "exec_layout", "forget_parents", "layout", "parse_limits", "parse_memory",
]  # fmt: skip

_ONLINE = "/sys/devices/system/cpu/online"
_BUSY_ATTEMPTS = 100
_BUSY_PAUSE = 0.002


def layout(
    hierarchy: Hierarchy, container_id: str, limits: Limits | None = None, devices: Sequence[DeviceRule] = ()
) -> CgroupLayout:
    """The cgroups of a container: which directories to make, what to write, where to go.

    ``devices`` are applied in order; empty means no device filter. Whether they can be applied is in
    ``devices_enforced``. Raises :class:`Unsupported` for a limit that this host cannot enforce.
    """
    limits = limits or Limits()
    if limits.cpuset_cpus:
        _require_cpus(limits.cpuset_cpus)
    if hierarchy.mode == "v2":
        available = bool(devices and hierarchy.unified) and device_filter_available()
        return cgroup_v2.layout(hierarchy, container_id, limits, devices, device_filter=available)
    return cgroup_v1.layout(hierarchy, container_id, limits, devices)


def _require_cpus(wanted: str) -> None:
    online = read(_ONLINE).strip()
    there = {number for first, last in _ranges(online) for number in range(first, last + 1)}
    for first, last in _ranges(wanted):
        if first > last or not {first, last} <= there:
            raise Unsupported(f"cpuset_cpus: {wanted} is not on this host", remedy=f"its CPUs are {online}")


def _ranges(cpus: str) -> list[tuple[int, int]]:
    parts = (part.partition("-") for part in cpus.split(",") if part)
    return [(int(first), int(last or first)) for first, _, last in parts]


def exec_layout(container: CgroupLayout, exec_id: str) -> CgroupLayout:
    """The cgroups of a process that joins ``container``: the same limits, and a handle of its own to kill it by."""
    make = cgroup_v2.exec_layout if container.into else cgroup_v1.exec_layout
    return make(container, exec_id)


@functools.cache
def device_filter_available() -> bool:
    """Whether this kernel and this user can load a cgroup v2 device program."""
    from containerkit.isolation.device_program import compile_rules
    from containerkit.linux import bpf

    try:
        os.close(bpf.load_device_program(compile_rules((DeviceRule(allow=False),))))
    except KernelError:
        return False
    return True


def cgroup_mounts(hierarchy: Hierarchy, layout: CgroupLayout) -> tuple[Mount, ...]:
    """What to mount at ``/sys/fs/cgroup`` inside a new cgroup namespace: read-only, the container's own part only."""
    flags = ("ro", "nosuid", "noexec", "nodev")
    if hierarchy.mode == "v2":
        return (Mount("/sys/fs/cgroup", "cgroup2", "cgroup", flags),) if layout.into else ()
    used = {os.path.dirname(task) for task in layout.tasks}
    together: dict[str, list[str]] = {}
    for controller, base in hierarchy.controllers.items():
        if f"{base}/{PARENT}/{layout.name}" in used:
            together.setdefault(base, []).append(controller)
    if not together:
        return ()
    size = ("mode=755", "size=64k")
    mounts = [Mount("/sys/fs/cgroup", "tmpfs", "tmpfs", ("nosuid", "noexec", "nodev", *size))]
    mounts += [
        Mount(f"/sys/fs/cgroup/{','.join(names)}", "cgroup", "cgroup", (*flags, *names)) for names in together.values()
    ]
    if layout.into:
        mounts.append(Mount("/sys/fs/cgroup/unified", "cgroup2", "cgroup", flags))
    return (*mounts, Mount("/sys/fs/cgroup", "tmpfs", "tmpfs", ("remount", *flags, *size)))


class Cgroup:
    """The cgroups of one container (or of one exec'd process), by name: every fact is read anew."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        """``name`` as in :attr:`CgroupLayout.name`: the container id, or ``ID/exec-X``."""
        self.hierarchy = hierarchy
        self.name = name

    def __repr__(self) -> str:
        return f"<Cgroup {self.name} ({self.hierarchy.mode})>"

    @property
    def tracking(self) -> str:
        """The directory whose processes are the container's; empty where this host can track none."""
        base = self.hierarchy.unified or self.hierarchy.controllers.get("freezer", "")
        return f"{base}/{PARENT}/{self.name}" if base else ""

    def exists(self) -> bool:
        """Whether the tracking directory is there."""
        return bool(self.tracking) and os.path.isdir(self.tracking)

    def stats(self) -> Stats:
        """What has been used, and the limits."""
        stats = cgroup_v2.stats if self.hierarchy.mode == "v2" else cgroup_v1.stats
        return stats(self._directories())

    def oom_kills(self) -> int:
        """How many processes the kernel killed at the memory limit. 0 where memory is not accounted."""
        oom_kills = cgroup_v2.oom_kills if self.hierarchy.mode == "v2" else cgroup_v1.oom_kills
        return oom_kills(self._directories())

    def processes(self) -> tuple[int, ...]:
        """All pids, those of exec'd processes too."""
        return processes(self._require_tracking())

    def freeze(self) -> None:
        """Stop every process where it stands, until :meth:`thaw`. Raises :class:`TimeoutError` after a second."""
        freeze = cgroup_v2.freeze if self.hierarchy.unified else cgroup_v1.freeze
        freeze(self._require_tracking())

    def thaw(self) -> None:
        """Let the processes go on."""
        thaw = cgroup_v2.thaw if self.hierarchy.unified else cgroup_v1.thaw
        thaw(self._require_tracking())

    def kill(self) -> None:
        """SIGKILL to every process at once. Nothing where the cgroup is gone."""
        if self.exists():
            kill = cgroup_v2.kill if self.hierarchy.unified else cgroup_v1.kill
            kill(self.tracking)

    def remove(self) -> None:
        """Remove the directories; idempotent. The processes must be dead, and may still be on their way out.

        Raises :class:`KernelError` (``EBUSY``) where one is alive after a while.
        """
        for directory in dict.fromkeys((*self._directories().values(), self.tracking)):
            for path in children(directory) if directory else ():
                _rmdir(path)

    def _directories(self) -> dict[str, str]:
        directories = cgroup_v2.directories if self.hierarchy.mode == "v2" else cgroup_v1.directories
        return directories(self.hierarchy, self.name)

    def _require_tracking(self) -> str:
        if not self.tracking:
            raise Unsupported(
                "this host offers no cgroup to track the container's processes in",
                remedy="run as root, or delegate a cgroup v2 subtree to this user",
            )
        return self.tracking


def forget_parents(hierarchy: Hierarchy) -> None:
    """Remove the ``containerkit`` parents where no container is left below.

    For the end of a test run or an uninstallation: a container that is being started at this moment would fail.
    """
    for base in {*hierarchy.controllers.values(), hierarchy.unified} - {""}:
        try:
            os.rmdir(f"{base}/{PARENT}")
        except OSError:
            continue


def _rmdir(path: str) -> None:
    """rmdir, patient with a dying process: it leaves its cgroup only after its exit has been reported."""
    for attempt in range(_BUSY_ATTEMPTS):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if attempt == _BUSY_ATTEMPTS - 1:
                raise KernelError("rmdir", error.errno or 0, path, hint="a process is still in this cgroup") from error
            time.sleep(_BUSY_PAUSE)
        else:
            return
