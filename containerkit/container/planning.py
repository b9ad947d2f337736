"""What a record and this host together make: the plan of a start, the plan of an exec, the stdin of a container."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

from containerkit.container.specify import specify
from containerkit.isolation import cgroup, defaults, seccomp
from containerkit.isolation.compile import Facts, compile_container, compile_exec
from containerkit.isolation.process import DEVNULL
from containerkit.linux import capabilities

if TYPE_CHECKING:
    from containerkit.container.record import Record
    from containerkit.isolation.plan import Plan
    from containerkit.isolation.spec import ExecSpec

    Stdin = None | bytes | int | IO[bytes]

_EVERY_CAPABILITY = (1 << 64) - 1


def container_plan(record: Record, directory: str, cache: str, *, log: bool, remove: bool) -> Plan:
    """The plan that starts the container whose files are in ``directory``; ``cache`` holds compiled seccomp programs.

    With ``log`` its output goes to a file, else to the plan's fds; with ``remove`` the directory goes with it. Raises
    :class:`Unsupported` for limits that this host cannot enforce.
    """
    hierarchy = cgroup.detect()
    layout = cgroup.layout(hierarchy, record.id, record.limits, defaults.DEVICE_RULES)
    facts = Facts(
        cgroups=layout,
        cgroup_mounts=cgroup.cgroup_mounts(hierarchy, layout),
        seccomp=_seccomp(record, cache),
        known_capabilities=capabilities.known(_EVERY_CAPABILITY),
        log=log,
        with_owner=not record.detached,
        remove=remove,
    )
    return compile_container(specify(record, directory, _host_files()), facts)


def exec_plan(record: Record, spec: ExecSpec, cache: str) -> Plan:
    """The plan that starts a process in the running container of ``record``."""
    container = cgroup.layout(cgroup.detect(), record.id, record.limits, defaults.DEVICE_RULES)
    facts = Facts(
        cgroups=cgroup.exec_layout(container, spec.id),
        seccomp=_seccomp(record, cache),
        known_capabilities=capabilities.known(_EVERY_CAPABILITY),
    )
    return compile_exec(spec, facts)


def stdin_fd(source: Stdin) -> tuple[int, bool]:
    """An fd to hand over, and whether to close it afterwards.

    Bytes become a file in memory that ends where they end.
    """
    if source is None:
        return DEVNULL, False
    if isinstance(source, int):
        return source, False
    if not isinstance(source, bytes):
        return source.fileno(), False
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    view = memoryview(source)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd, True


def _seccomp(record: Record, cache: str) -> bytes:
    return seccomp.default_program(record.capabilities, cache) if record.seccomp else b""


def _host_files() -> dict[str, str]:
    found = {}
    for path in ("/etc/hosts", "/etc/resolv.conf"):
        try:
            with open(path, errors="surrogateescape") as file:
                found[path] = file.read()
        except OSError:
            continue
    return found
