"""What a test left behind: a snapshot before, a snapshot after, and the difference in words.

Everything is read from the kernel, nothing from the library, with one exception: the launcher's helper process,
which lives as long as the test process does, is known to ``containerkit.isolation.spawner`` and is left out with the
keepers that it has in reserve.
Other test sessions may run on the same machine: what is found is held to be ours unless a foreign process is in it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import time
from typing import NamedTuple

SETTLE_SECONDS = 2.0
HIERARCHY_TYPES = ("cgroup", "cgroup2")
PARENT = "containerkit"
RESERVE = (b"ck-spare", b"ck-launcher")  # the second for the moment after its fork
KINDS = 2
LAUNCHER = b"containerkit.isolation.launcher"


class Process(NamedTuple):
    """A process: the start time (clock ticks after boot) tells it from a later one with its number."""

    pid: int
    started: int
    parent: int


class Snapshot(NamedTuple):
    """Everything of the kernel's that a test could leave behind."""

    fds: frozenset[tuple[int, str]]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    links: frozenset[tuple[int, str]]
    processes: frozenset[tuple[int, int]]


def take() -> Snapshot:
    """The present state of the host and of this process. The reserve is no part of it: it is at work, next time."""
    helper = _helper()[0]
    processes = _processes()
    reserve = _reserve(processes, helper)
    return Snapshot(
        frozenset(_fds()),
        frozenset(_mounts()),
        frozenset(_cgroups()),
        frozenset(socket.if_nameindex()),
        frozenset(process[:2] for process in processes if process.pid not in reserve),
    )


def leaks(before: Snapshot, mark: str, *, parents: bool = False) -> list[str]:
    """What is there now and was not ``before``, one line each, with two seconds of grace for the kernel's teardown.

    ``mark`` is a path that betrays a stray process as this session's. ``parents`` counts the cgroups that hold all
    containers, too: they may stay from test to test and must be gone at the end.
    """
    lines = _difference(before, mark, parents=parents)
    deadline = time.monotonic() + SETTLE_SECONDS
    while lines and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
        # What other sessions make and remove all the time is there now and then, a leak each time.
        lines = sorted({*lines} & {*_difference(before, mark, parents=parents)})
    return lines


def shut_down() -> None:
    """End this process's launcher helper and remove the empty parents of all cgroups, where the library made them."""
    spawner = sys.modules.get("containerkit.isolation.spawner")
    if spawner is not None:
        _helper()  # one that is still coming up would be overlooked
        spawner.shutdown()
    cgroup = sys.modules.get("containerkit.isolation.cgroup")
    if cgroup is not None:
        cgroup.forget_parents(cgroup.detect())


def _difference(before: Snapshot, mark: str, *, parents: bool) -> list[str]:
    new = [process for process in _processes() if process[:2] not in before.processes]
    ours = _ours(new, mark)
    lines = [f"open fd: {fd} -> {target}" for fd, target in _fds() - before.fds]
    lines += [f"mount: {mount}" for mount in _mounts() - before.mounts]
    lines += [f"network link: {index} {name}" for index, name in set(socket.if_nameindex()) - before.links]
    lines += [f"process: {_describe(process)}" for process in new if process.pid in ours]
    for cgroup in _cgroups() - before.cgroups:
        members = _members(cgroup)
        foreign = bool(members) and not members & ours
        if not foreign and (parents or not os.path.basename(cgroup).startswith(PARENT)):
            lines.append(f"cgroup: {cgroup} {sorted(members) or ''}")
    return sorted(lines)


def _helper() -> tuple[int, frozenset[int]]:
    """The pid and the fds of the one process that may outlive a test, or 0 and no fds."""
    spawner = sys.modules.get("containerkit.isolation.spawner")
    if spawner is None:
        return 0, frozenset()
    launcher = spawner.get() if spawner._starting else spawner._current
    if launcher is None or launcher.owner != os.getpid():
        return 0, frozenset()
    return launcher.pid, frozenset({launcher.socket.fileno()})


def _fds() -> set[tuple[int, str]]:
    known = _helper()[1]
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own fd
        if int(name) not in known:
            found.add((int(name), target))
    return found


def _mounts() -> set[str]:
    with open("/proc/self/mountinfo") as lines:
        return {line.strip() for line in lines}


def _cgroups() -> set[str]:
    """Every cgroup that carries the library's name in its path, in every hierarchy."""
    rows = [mount.split() for mount in _mounts()]
    tops = [row[4] for row in rows if row[row.index("-") + 1] in HIERARCHY_TYPES]
    return {
        directory for top in tops for directory, _, _ in os.walk(top) if f"/{PARENT}" in directory.removeprefix(top)
    }


def _members(cgroup: str) -> set[int]:
    """The processes in a cgroup and in all below it."""
    found: set[int] = set()
    for directory, _, _ in os.walk(cgroup):
        found.update(map(int, _read(f"{directory}/cgroup.procs").split()))
    return found


def _processes() -> list[Process]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
            if fields:
                found.append(Process(int(name), int(fields[19]), int(fields[1])))
    return found


def _ours(processes: list[Process], mark: str) -> set[int]:
    """Those of ``processes`` that this session answers for: its descendants, its keepers, and who holds on to ``mark``.

    Launchers and keepers are daemons: no descendants of their owner, but they have its pid as an argument.
    """
    me, helper = os.getpid(), _helper()[0]
    ours = {me, helper} - {0}
    for process in sorted(processes, key=lambda process: (process.started, process.pid)):  # parents first
        command = _read(f"/proc/{process.pid}/cmdline")
        keeper = LAUNCHER in command and str(me).encode() in command.split(b"\0")
        if keeper or process.parent in ours or mark.encode() in _traces(process.pid):
            ours.add(process.pid)
    return ours - {me, helper} - _reserve(_processes(), helper)  # its older half may be no new process


def _reserve(processes: list[Process], helper: int) -> set[int]:
    """The keepers that the helper has in reserve, known by their names, which they change when they are wanted.

    One with a starter of its own for the next container and one for the next exec; more are none.
    """
    idle = {process for process in processes if _read(f"/proc/{process.pid}/comm").strip() in RESERVE}
    keepers = {process.pid for process in idle if process.parent == helper}
    starters = {process.pid for process in idle if process.parent in keepers}
    return keepers | starters if len(keepers) <= KINDS and len(starters) <= 1 else set()


def _traces(pid: int) -> bytes:
    """Everything readable of a process that may name the directories it works in."""
    parts = [_read(f"/proc/{pid}/{name}") for name in ("cmdline", "environ", "mountinfo")]
    with contextlib.suppress(OSError):  # it ended, or is a zombie
        parts += [os.fsencode(os.readlink(f"/proc/{pid}/fd/{fd}")) for fd in os.listdir(f"/proc/{pid}/fd")]
    return b"\0".join(parts)


def _describe(process: Process) -> str:
    command = _read(f"/proc/{process.pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    return f"{process.pid}, child of {process.parent}: {command or 'zombie'}"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
