"""What a process may see and use: :class:`Spec` for a container, :class:`ExecSpec` for a process that joins one.

The fields follow the OCI runtime specification (config.md, config-linux.md). A spec names things; how they are done,
and in which order, is decided by :mod:`containerkit.isolation.compile`.
"""

from __future__ import annotations

from typing import NamedTuple

from containerkit.isolation import defaults
from containerkit.isolation.limits import Limits
from containerkit.linux.fileview import Mount  # noqa: TC001 - NamedTuple fields are looked up at run time


class Root(NamedTuple):
    """The container's root: layers below, a writable layer above.

    ``directory`` holds ``upper``, ``work`` and ``merged``; nothing is ever mounted there that the host can see. With
    ``in_memory`` the writable layer is a tmpfs of at most that many bytes, and ``hidden`` paths of the lowest layer are
    empty in it. ``volatile`` leaves out every sync: for containers that end with their owner.

    With ``clone`` the root is no overlay but a tree of its own in ``directory/rootfs``: made from the one lower tree
    before the first start, by a ``copy`` or by a snapshot of ``btrfs``, and there until the container is removed.
    """

    lowers: tuple[str, ...]
    directory: str
    readonly: bool = False
    volatile: bool = False
    in_memory: int = 0
    hidden: tuple[str, ...] = ()
    clone: str = ""


class File(NamedTuple):
    """A small file that the engine provides: the path inside and its content."""

    target: str
    content: str


class ProcessSpec(NamedTuple):
    """What is executed, as whom and where (config.md, "process")."""

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = "/"
    user: str = ""
    groups: tuple[str, ...] = ()
    umask: int = 0o022
    capabilities: tuple[str, ...] = defaults.CAPABILITIES
    no_new_privileges: bool = False
    seccomp: bool = True


class Spec(NamedTuple):
    """A container."""

    id: str
    root: Root
    process: ProcessSpec
    hostname: str = ""
    namespaces: tuple[str, ...] = ("mount", "pid", "network", "ipc", "uts", "cgroup")
    mounts: tuple[Mount, ...] = defaults.MOUNTS
    files: tuple[File, ...] = ()
    sysctls: tuple[tuple[str, str], ...] = defaults.SYSCTLS
    masked_paths: tuple[str, ...] = defaults.MASKED_PATHS
    readonly_paths: tuple[str, ...] = defaults.READONLY_PATHS
    limits: Limits = Limits()


class ExecSpec(NamedTuple):
    """A process that joins a running container."""

    id: str
    process: ProcessSpec
    namespaces: tuple[str, ...] = ("mount", "pid", "network", "ipc", "uts", "cgroup")
