"""Where cgroups can be made on this host, and what a container's will look like: both as values."""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

PARENT = "containerkit"
"""The cgroup, in each hierarchy, below which every container's cgroup is made."""

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Hierarchy(NamedTuple):
    """The host's cgroup tree, as far as this process may use it."""

    mode: Literal["v2", "hybrid", "v1", "none"]
    """``hybrid``: controllers on v1 and a v2 tree beside them that tracks processes"""
    controllers: Mapping[str, str]
    """controller -> directory below which cgroups with that controller can be made"""
    unified: str = ""
    """that directory on the v2 tree; empty where there is none"""
    reason: str = ""
    """why a tree that is mounted cannot be used"""


class CgroupLayout(NamedTuple):
    """All that makes, fills and removes the cgroups of one process tree, as data for plain file operations."""

    mode: str
    name: str
    dirs: tuple[str, ...] = ()
    """to mkdir in this order; those that exist already are fine"""
    writes: tuple[tuple[str, str, str], ...] = ()
    """(file, value, what it is for), to write in this order once ``dirs`` are there"""
    tasks: tuple[str, ...] = ()
    """v1: each is opened and given ``0`` by the new process itself while it is single-threaded.

    For a single-threaded process that is a short path in the kernel (0.02-0.1 ms a file) where ``cgroup.procs`` waits
    for an RCU grace period (5-17 ms after idle)."""
    into: str = ""
    """v2: directory to be born in, with CLONE_INTO_CGROUP"""
    tracking: str = ""
    """directory whose processes are this tree: on v2 if there is one, else v1's freezer"""
    kill: str = ""
    """file that kills the whole tree when given ``1``; empty on pure v1"""
    device_program: bytes = b""
    """v2: instructions to load (BPF_PROG_TYPE_CGROUP_DEVICE) and attach to ``into``"""
    devices_enforced: bool = False
    """whether ``writes`` or ``device_program`` apply the device rules"""
    remove: tuple[str, ...] = ()
    """to rmdir in this order"""


class _MountPoint(NamedTuple):
    type: str
    root: str
    path: str
    options: tuple[str, ...]


@functools.cache
def detect() -> Hierarchy:
    """The hierarchy of this process, from ``/proc/self/mountinfo`` and ``/proc/self/cgroup``; read once a process."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = _mounts(file.read())
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        own = parse_own(file.read())
    controllers: dict[str, str] = {}
    unified, reason = "", ""
    for mount in mounts:
        if mount.type == "cgroup":
            for name in mount.options:
                if name in own and not name.startswith("name="):
                    directory = _writable_v1(mount, own[name])
                    if directory:
                        controllers.setdefault(name, directory)
        elif not unified:
            unified, reason = _writable_v2(mount, own.get("", "/"))
    if any(mount.type == "cgroup" for mount in mounts):
        return Hierarchy("hybrid" if unified else "v1", controllers, unified, reason)
    if not mounts:
        return Hierarchy("none", {}, "", "no cgroup file system is mounted")
    if unified:
        controllers = dict.fromkeys(_read(f"{unified}/cgroup.controllers").split(), unified)
    return Hierarchy("v2", controllers, unified, reason)


def parse_own(text: str) -> dict[str, str]:
    """Controller -> own path, from ``/proc/PID/cgroup``; the empty name is v2's."""
    own: dict[str, str] = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    return own


def _mounts(mountinfo: str) -> list[_MountPoint]:
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(" "), right.split(" ", 2)
        if kind in {"cgroup", "cgroup2"}:
            root, path = (_ESCAPE.sub(lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
            found.append(_MountPoint(kind, root, path, tuple(options.split(","))))
    return found


def _own_directory(mount: _MountPoint, own: str) -> str:
    """The own cgroup below a mount point; the mount point where only a part that does not hold us is mounted."""
    root = mount.root.rstrip("/")
    if own != root and not own.startswith(f"{root}/"):
        return mount.path
    return (mount.path.rstrip("/") + "/" + own.removeprefix(root).strip("/")).rstrip("/")


def _writable_v1(mount: _MountPoint, own: str) -> str:
    for directory in (mount.path, _own_directory(mount, own)):
        if os.access(directory, os.W_OK):
            return directory
    return ""


def _writable_v2(mount: _MountPoint, own: str) -> tuple[str, str]:
    """The topmost cgroup that is ours to divide, or a reason.

    Controllers can only be handed down by a cgroup without processes of its own (cgroup-v2.rst, "No Internal Process
    Constraint"); the root of the whole tree, which has no ``cgroup.type``, is exempt.
    """
    here, reason = _own_directory(mount, own), ""
    depth = len([part for part in here.removeprefix(mount.path).split("/") if part])
    chain = [here]
    for _ in range(depth):
        chain.append(os.path.dirname(chain[-1]))
    for directory in reversed(chain):
        if not (os.access(directory, os.W_OK) and os.access(f"{directory}/cgroup.procs", os.W_OK)):
            continue
        if not os.path.exists(f"{directory}/cgroup.type") or not _read(f"{directory}/cgroup.procs"):
            return directory, ""
        reason = reason or f"{directory} holds processes of its own, so it cannot be divided"
    return "", reason or f"no cgroup from {mount.path} down to {here} is writable"


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
