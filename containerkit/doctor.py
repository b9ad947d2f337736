"""``containerkit.doctor``: what this host can do, what it cannot, and what would help, as data that prints well."""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

from containerkit.errors import KernelError
from containerkit.isolation import cgroup
from containerkit.linux import capabilities, mount, seccomp
from containerkit.state import default_root

_LIMITED = ("memory", "pids", "cpu")


class Check(NamedTuple):
    """One thing that was tried. ``required`` ones decide whether containers run at all."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True

    def __str__(self) -> str:
        mark = "ok" if self.ok else ("NO" if self.required else "--")
        line = f"{mark:2}  {self.name:22} {self.detail}"
        return line if self.ok or not self.remedy else f"{line}\n    {'':22} -> {self.remedy}"


class Report(NamedTuple):
    """All of it. Prints as a table; ``ok`` says whether containers can run here."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every required check passed."""
        return all(check.ok for check in self.checks if check.required)

    def __getitem__(self, key: object) -> Check:  # type: ignore[override]
        """The check of that name."""
        for check in self.checks:
            if check.name == key:
                return check
        raise KeyError(key)

    def __str__(self) -> str:
        verdict = "Containers can run here." if self.ok else "Containers cannot run here yet."
        return "\n".join([*map(str, self.checks), verdict])


def doctor(root: str | None = None) -> Report:
    """Try what containers need on this host; nothing is left behind. ``root`` is the state root to check."""
    where = root or default_root()
    return Report(
        (_kernel(), _privileges(), *_namespaces(), _mounts(), _overlay(where), *_cgroups(), _seccomp(), _devices())
    )


def _kernel() -> Check:
    release = os.uname().release
    try:
        version = tuple(int(part) for part in release.split(".")[:2])
    except ValueError:
        version = (0, 0)
    return Check(
        "kernel", version >= (5, 15), f"Linux {release} on {os.uname().machine}", "Linux 5.15 or later is needed"
    )


def _privileges() -> Check:
    held = capabilities.capget().effective
    able = bool(held & capabilities.mask(("CAP_SYS_ADMIN",)))
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    detail = f"{who}, {'with' if able else 'without'} CAP_SYS_ADMIN"
    return Check("privileges", able, detail, "run as root; rootless containers come in a later release")


def _namespaces() -> list[Check]:
    needed = {"mnt": "mount", "pid": "pid", "net": "network", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup"}
    missing = [name for file, name in needed.items() if not os.path.exists(f"/proc/self/ns/{file}")]
    there = Check(
        "namespaces", not missing, ", ".join(sorted(needed.values())), f"the kernel lacks {', '.join(missing)}"
    )
    user = os.path.exists("/proc/self/ns/user")
    detail = "there" if user else "not there"
    return [there, Check("user namespaces", user, detail, "needed for rootless containers", required=False)]


def _mounts() -> Check:
    try:
        os.close(mount.new_mount("tmpfs"))
    except KernelError as error:
        return Check("mount API", False, str(error), "Linux 5.2 or later, and CAP_SYS_ADMIN")
    return Check("mount API", True, "detached mounts work")


def _overlay(root: str) -> Check:
    """A real overlay, detached, with its writable layer where the state root is or will be."""
    directory = root
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    if mount.file_system(directory) == mount.OVERLAYFS:
        detail = f"{directory} is on an overlay itself: writable layers live in memory, nothing can be detached"
        remedy = "put the state root on a volume or a tmpfs (CONTAINERKIT_ROOT)"
        return Check("overlay", False, detail, remedy, required=False)
    try:
        with tempfile.TemporaryDirectory(prefix=".containerkit-doctor-", dir=directory) as base:
            for name in ("lower", "upper", "work"):
                os.mkdir(f"{base}/{name}")
            try:
                mount.probe_overlay(f"{base}/lower", f"{base}/upper", f"{base}/work")
            except KernelError as error:
                remedy = (
                    "put the state root on ext4, xfs, btrfs or tmpfs (CONTAINERKIT_ROOT); an overlay cannot hold it"
                )
                return Check("overlay", False, f"below {directory}: {error}", remedy)
    except OSError as error:
        return Check(
            "overlay", False, f"{directory}: {error.strerror}", "choose a writable state root (CONTAINERKIT_ROOT)"
        )
    return Check("overlay", True, f"works below {directory}")


def _cgroups() -> list[Check]:
    hierarchy = cgroup.detect()
    usable = hierarchy.mode != "none" and bool(hierarchy.controllers)
    detail = f"{hierarchy.mode}; controllers {', '.join(sorted(hierarchy.controllers)) or 'none'}"
    checks = [
        Check("cgroups", usable, detail, hierarchy.reason or "mount a cgroup tree that root may write", required=False)
    ]
    for name in _LIMITED:
        there = name in hierarchy.controllers
        text = "can be limited" if there else "cannot be limited"
        checks.append(Check(f"{name} limits", there, text, f"enable or delegate the {name} controller", required=False))
    return checks


def _seccomp() -> Check:
    there = seccomp.available()
    return Check("seccomp", there, "filters work" if there else "no filters", "a kernel with CONFIG_SECCOMP_FILTER")


def _devices() -> Check:
    hierarchy = cgroup.detect()
    if hierarchy.mode == "v2":
        able = cgroup.device_filter_available()
        how = "by BPF program" if able else "device nodes are refused altogether"
    else:
        able = "devices" in hierarchy.controllers
        how = "by the devices controller" if able else "device nodes are refused altogether"
    return Check(
        "device filter", able, how, "a kernel with CONFIG_CGROUP_BPF, or the v1 devices controller", required=False
    )
